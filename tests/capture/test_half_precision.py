"""Models in half precision: rows, factors and inverses have float32 at least."""

from copy import deepcopy

import pytest
import torch
from torch.nn import Conv2d, CrossEntropyLoss, Embedding, Flatten, Linear, ReLU, Sequential, Tanh

from kfac_scratch import (
    EXPAND,
    KFAC,
    REDUCE,
    Kronecker,
    factored_inverse,
    graft,
    kfac,
    kfac_over,
    layer_ios,
    preconditioner,
    two_level,
)
from tests.laws import check_differs, check_equal
from tests.thinned import thinned

pytestmark = pytest.mark.long

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
NETS = {
    "mlp": (lambda: Sequential(Linear(7, 5), Tanh(), Linear(5, 3)), (7,)),
    "conv": (lambda: Sequential(Conv2d(2, 3, 3), ReLU(), Flatten(), Linear(27, 3)), (2, 5, 5)),
    "embedding": (lambda: Sequential(Embedding(7, 5, padding_idx=1), Flatten(), Linear(10, 3)), 2),
}


def relative(actual, expected):
    """Largest difference from float64 numbers, relative to their largest entry."""
    return float((actual.double() - expected).abs().max() / expected.abs().max())


def problem(name, dtype, device, N=11):
    """A model and data in half precision, and the same numbers in float64."""
    make, shape = NETS[name]
    X = torch.randint(7, (N, shape)) if name == "embedding" else torch.randn(N, *shape)
    X, y = X.to(device), torch.randint(3, (N,), device=device)
    X = X.to(dtype) if X.is_floating_point() else X
    model = make().to(device, dtype)
    return (model, X, y), (deepcopy(model).double(), X.double() if X.is_floating_point() else X, y)


@DTYPES
@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("name", NETS)
def test_rows_vectors_and_factors_of_a_half_model_are_float32(name, flavour, dtype, device):
    (model, X, y), _ = problem(name, dtype, device)
    ios = layer_ios(model, CrossEntropyLoss(), X, y, flavour=flavour)
    over = kfac_over(model, CrossEntropyLoss(), [(X, y)] * 2, flavour=flavour)
    for name, io in ios.items():
        M, both = kfac(io), over[name]
        inverse = vars(M.inverse(0.1)).values()
        tensors = (io.a, io.g, M.A, M.B, both.A, both.B, *inverse)
        assert {t.dtype for t in tensors} == {torch.float32}


@DTYPES
@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("name", thinned(NETS))
def test_factors_of_a_half_model_are_right_to_its_precision_whatever_the_batches(
    name, flavour, dtype, device
):
    """A sum that runs in half precision would lose all later batches."""
    (model, X, y), (exact, X64, _) = problem(name, dtype, device, N=256)
    loss, bound = CrossEntropyLoss(), 4 * torch.finfo(dtype).eps
    for count in (1, 64):
        batches = list(zip(X.chunk(count), y.chunk(count), strict=True))
        half = kfac_over(model, loss, batches, flavour=flavour)
        for layer, M in kfac_over(exact, loss, [(X64, y)], flavour=flavour).items():
            assert relative(half[layer].A, M.A) <= bound
            assert relative(half[layer].B, M.B) <= bound


@DTYPES
def test_a_gram_of_large_half_rows_does_not_overflow(dtype, device):
    model = Linear(3, 2).to(device, dtype)
    X = torch.full((4096, 3), 300.0, device=device, dtype=dtype)
    y = torch.zeros(4096, dtype=torch.long, device=device)
    A = kfac(layer_ios(model, CrossEntropyLoss(), X, y)[""]).A
    assert A.isfinite().all()
    check_equal(A[0, 0], torch.tensor(9e4, device=device, dtype=torch.float32))


def test_a_wide_half_layer_has_another_inverse_than_the_damping_alone(device):
    """Eigenvalues in bfloat16 are all below `d * eps` of the largest from a width of 128 on."""
    model = Linear(256, 3).to(device, torch.bfloat16)
    X = torch.randn(512, 256, device=device, dtype=torch.bfloat16).relu()
    y = torch.randint(3, (512,), device=device)
    M = kfac(layer_ios(model, CrossEntropyLoss(), X, y)[""])
    V = torch.randn(3, 257, device=device, dtype=torch.float32)
    check_differs(M.inverse(1e-3) @ V, V / 1e-3)
    exact = Kronecker(M.A.double(), M.B.double()).inverse(1e-3) @ V.double()
    assert relative(M.inverse(1e-3) @ V, exact) <= 20 * torch.finfo(torch.float32).eps


@DTYPES
@pytest.mark.parametrize("name", NETS)
def test_the_step_of_a_half_model_has_its_precision_and_is_right_to_it(name, dtype, device):
    half, exact = problem(name, dtype, device, N=64)
    loss, steps = CrossEntropyLoss(), []
    for model, X, y in (half, exact):
        ios = layer_ios(model, loss, X, y)
        maps = {layer: kfac(io).inverse(0.1) for layer, io in ios.items()}
        loss(model(X), y).backward()
        gradient = {n: p.grad for n, p in model.named_parameters()}
        steps.append(preconditioner(model, maps)(gradient))
        both = two_level(model, ios, maps, 0.1)(gradient)
        assert all(both[n].dtype == p.dtype for n, p in model.named_parameters())
    for n, step in steps[1].items():
        assert steps[0][n].dtype == dtype
        assert relative(steps[0][n], step) <= 8 * torch.finfo(dtype).eps


@DTYPES
@pytest.mark.parametrize("name", ["mlp", "embedding"])
def test_a_half_model_trains_and_its_checkpoint_goes_on(name, dtype, device):
    (model, X, y), _ = problem(name, dtype, device, N=32)
    loss = CrossEntropyLoss()

    def optimizer(model):
        return KFAC(
            *(model, loss),
            controls=[graft(eps=1e-4)],
            inverse_every=3,
            invert=factored_inverse,
            generator=torch.Generator(device).manual_seed(0),
        )

    def run(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(model(X), y).backward()
            optimizer.observe(X, y)
            optimizer.step()

    first = optimizer(model)
    run(model, first, 2)
    copy = deepcopy(model)
    second = optimizer(copy)
    second.load_state_dict(first.state_dict())
    run(model, first, 2)
    run(copy, second, 2)
    for p, q in zip(model.parameters(), copy.parameters(), strict=True):
        assert p.dtype == dtype
        assert p.isfinite().all()
        assert torch.equal(p, q)


def test_float32_factors_that_were_cast_are_refused_with_the_way_out(device):
    """Their round-off is far beyond that of float64."""
    rows = torch.randn(8, 64, device=device, dtype=torch.float32).relu()
    A = rows.T @ rows
    Kronecker(A, A).inverse(0.1)
    with pytest.raises(ValueError, match="decompose it in that precision"):
        Kronecker(A.double(), A.double()).inverse(0.1)
