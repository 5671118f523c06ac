"""One-hot rows are rows: every function of them gives what it gives for the rows in full."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import CrossEntropyLoss, Embedding, Flatten, Linear, Sequential

from kfac_scratch import (
    EXPAND,
    KFAC,
    REDUCE,
    Brand,
    DiagonalKronecker,
    FactorSums,
    Kronecker,
    LayerIO,
    MovingAverage,
    OfBatch,
    OneHot,
    cg_fac,
    ekfac,
    ekfac_reduce,
    factored_inverse,
    foof,
    graft,
    kfac,
    kfac_over,
    kfac_reduce,
    kl_factors,
    kpsvd,
    layer_ios,
    mini_block,
    one_sided,
    over_loader,
    randomized,
    shampoo_bound,
    skfac,
    soap,
    tekfac,
    tkfac,
)
from kfac_scratch.capture.layers import input_rows
from kfac_scratch.layer_io import concatenate
from tests.laws import check_equal, check_matrix, check_spectrum
from tests.test_speed import Largest

WORDS, D, N, S, V = 7, 3, 5, 4, 2


def one_hot(device, dtype=torch.float64):
    columns = torch.randint(-1, WORDS, (N, S), device=device)
    return OneHot(columns, WORDS, dtype)


def layer(device):
    return LayerIO(one_hot(device), torch.randn(V, N, S, D, device=device))


def test_one_hot_rows_are_a_tensor_with_one_one_in_a_row(device):
    a = one_hot(device)
    rows = torch.zeros(N, S, WORDS, device=device)
    for n in range(N):
        for s in range(S):
            if a.columns[n, s] >= 0:
                rows[n, s, a.columns[n, s]] = 1
    assert a.shape == rows.shape
    assert a.dtype == rows.dtype
    assert a.device.type == device.type
    check_equal(a.dense(), rows)
    check_equal(a.counts(), rows.sum((0, 1)))
    check_equal(a.sum(), rows.sum())
    check_equal(a @ torch.ones(WORDS, 2, device=device), rows @ torch.ones(WORDS, 2, device=device))
    assert not isinstance(a + 0, OneHot)


ANY = {
    "kfac": kfac,
    "kfac-reduce": kfac_reduce,
    "foof": foof,
    "ekfac": ekfac,
    "ekfac-reduce": ekfac_reduce,
    "tkfac": tkfac,
    "tekfac": tekfac,
    "kpsvd": partial(kpsvd, tolerance=1e-12),
    "mini-block": mini_block,
    "exact": cg_fac,
    "shampoo": shampoo_bound,
    "one-sided": one_sided,
    "kl-shampoo": partial(kl_factors, damping=0.1),
    "soap": lambda io: OfBatch(soap()).update(None, io, 1.0),
    "skfac": skfac,
    "randomized": randomized(rank=7),
    "brand": lambda io: Brand(rank=7).update(None, io, 1.0),
    "average": lambda io: MovingAverage(kfac).update(kfac(io), replace(io, g=2 * io.g), 0.3),
    "sums": lambda io: FactorSums().matrix(
        FactorSums().add_vectors(FactorSums().add(None, io), io.g), 2.0
    ),
    "joined": lambda io: kfac(concatenate([io, io], [1.0, 0.5])),
}


@pytest.mark.parametrize("name", ANY)
def test_every_approximation_of_one_hot_rows_is_that_of_the_rows_in_full(name, device):
    io = layer(device)
    full = replace(io, a=io.a.dense())
    check_equal(ANY[name](io).dense(), ANY[name](full).dense())


def test_functions_of_a_layer_are_those_of_the_rows_in_full(device):
    io = layer(device)
    full = replace(io, a=io.a.dense())
    check_equal(io.block(), full.block())
    check_equal(io.gradients(), full.gradients())
    check_equal(io.reduced().a, full.reduced().a)


# ---- the matrix --------------------------------------------------------------------------------


def diagonal_kronecker(device, words=WORDS):
    root = torch.randn(D, D + 1, device=device)
    return DiagonalKronecker(torch.rand(words, device=device), root @ root.T)


def test_a_product_with_a_diagonal_factor_obeys_the_laws(device):
    M = diagonal_kronecker(device)
    check_matrix(M, (D, WORDS))
    check_spectrum(M)
    check_spectrum(M.inverse(0.1))
    check_matrix(M.inverse(0.1), (D, WORDS))


def test_a_product_with_a_diagonal_factor_is_its_full_twin(device):
    M = diagonal_kronecker(device)
    full, X = Kronecker(M.A, M.B), torch.randn(2, D, WORDS, device=device)
    check_equal(M @ X, full @ X)
    check_equal(M.inverse(0.1) @ X, full.inverse(0.1) @ X)
    check_equal(M.inverse(0.0) @ X, full.inverse(0.0) @ X)
    check_equal(M.inverse_sqrt(0.1) @ X, full.inverse_sqrt(0.1) @ X)
    check_equal(factored_inverse(M, 0.1) @ X, factored_inverse(full, 0.1) @ X)
    check_equal(M.eigen().dense(), full.dense())
    new = diagonal_kronecker(device)
    check_equal(M.mixed(new, 0.3).dense(), full.mixed(Kronecker(new.A, new.B), 0.3).dense())


def test_eigenvectors_of_a_product_with_a_diagonal_factor_are_scaled_by_it(device):
    eigen = diagonal_kronecker(device).eigen_of_outputs()
    for M in (eigen, eigen.in_full()):
        X = M.eigenvector(1, 3)
        check_equal(M @ X, M.scale[1, 3] * X)
        check_equal(X.norm(), torch.ones((), device=device))


def test_a_word_that_never_occurs_has_no_undamped_inverse(device):
    M = diagonal_kronecker(device)
    M = replace(M, a=M.a * (torch.arange(WORDS, device=device) > 0))
    with pytest.raises(ValueError, match="singular"):
        M.inverse(0.0)
    V = torch.ones(D, WORDS, device=device)
    check_equal((M.inverse(0.1) @ V)[:, 0], 10 * V[:, 0])


# ---- from a model ------------------------------------------------------------------------------


def problem(device, words=WORDS, d=D, padding=None):
    model = Sequential(Embedding(words, d, padding_idx=padding), Flatten(), Linear(S * d, 3))
    X, y = torch.randint(words, (N, S), device=device), torch.randint(3, (N,), device=device)
    return model.to(device), X, y


@pytest.mark.parametrize("padding", [None, 2])
def test_capture_keeps_the_words_of_an_embedding(padding, device):
    model, X, y = problem(device, padding=padding)
    io = layer_ios(model, CrossEntropyLoss(), X, y)["0"]
    assert isinstance(io.a, OneHot)
    check_equal(io.a.dense(), input_rows(model[0], X)[0])
    assert isinstance(kfac(io), DiagonalKronecker)
    over = kfac_over(model, CrossEntropyLoss(), [(X, y)] * 2, chunk=1)["0"]
    assert isinstance(over, DiagonalKronecker)
    check_equal(over.dense(), kfac(replace(io, a=io.a.dense())).dense())


def test_memory_for_an_embedding_is_linear_in_the_vocabulary():
    """50,000 words: its rows would have ten times as many numbers as the weight."""
    words, d = 50_000, 2
    model, X, y = problem("cpu", words, d)
    with Largest() as largest:
        optimizer = KFAC(model, CrossEntropyLoss(), controls=[graft()])
        CrossEntropyLoss()(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
        kfac_over(model, CrossEntropyLoss(), [(X, y)])
        KFAC(model, CrossEntropyLoss(), controls=[graft()]).load_state_dict(optimizer.state_dict())
    assert largest.entries <= 2 * words * d


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("invert", [None, factored_inverse])
def test_a_checkpoint_restores_the_matrix_of_an_embedding(invert, flavour, device):
    model, X, y = problem(device)

    def optimizer():
        options = {} if invert is None else {"invert": invert}
        return KFAC(model, CrossEntropyLoss(), flavour=flavour, controls=[graft()], **options)

    first, second = optimizer(), optimizer()
    CrossEntropyLoss()(model(X), y).backward()
    first.observe(X, y)
    first.step()
    second.load_state_dict(first.state_dict())
    assert type(second.matrices["0"]) is type(first.matrices["0"])
    check_equal(second.matrices["0"].dense(), first.matrices["0"].dense())
    G = torch.randn(D, WORDS, device=device)
    check_equal(second.inverses["0"] @ G, first.inverses["0"] @ G)


def test_any_approximation_over_a_loader_takes_embeddings(device):
    model, X, y = problem(device)
    batches = [(X[:2], y[:2]), (X[2:], y[2:])]
    for approximation in (kfac, ekfac):
        whole = over_loader(approximation, model, CrossEntropyLoss(), batches)
        one = layer_ios(model, CrossEntropyLoss(), X, y)["0"]
        check_equal(whole["0"].dense(), approximation(one).dense())
