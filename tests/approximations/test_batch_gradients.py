"""The gradient of a batch as a layer: a sample with many positions, and what its square estimates.

Expectations are sums over all draws, or over all labels, with their probabilities: no sampling.
"""

import math
from functools import partial
from itertools import combinations, product

import pytest
import torch
from torch.nn import Conv2d, CrossEntropyLoss, Embedding, Flatten, Linear, Sequential, Tanh

import kfac_scratch as ks
from kfac_scratch import LayerIO, from_gradient, pooled
from kfac_scratch.approximations.tkfac import tkfac
from tests.laws import check_differs, check_equal

N, CLASSES = 7, 4
LOSS = CrossEntropyLoss()


def mlp(device):
    torch.manual_seed(0)
    model = Sequential(Linear(6, 5), Tanh(), Linear(5, CLASSES)).to(device)
    return model, torch.randn(N, 6, device=device)


def cnn(device):
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 3, 2), Tanh(), Conv2d(3, 5, 2), Flatten(), Linear(20, CLASSES))
    return model.to(device), torch.randn(N, 2, 4, 4, device=device)


MODELS = {"mlp": mlp, "cnn": cnn}
every_model = pytest.mark.parametrize("name", MODELS)
every_fisher = pytest.mark.parametrize("fisher", [ks.empirical, ks.type2])


def labels(device):
    return torch.arange(N, device=device) % CLASSES


def gradient(model, loss, X, y):
    """The gradient of every layer by plain autodiff, as a matrix with the bias as last column."""
    layers = [m for m in model if hasattr(m, "weight")]
    parameters = [p for m in layers for p in (m.weight, m.bias)]
    found = torch.autograd.grad(loss(model(X), y), parameters)
    pairs = zip(found[::2], found[1::2], strict=True)
    return [torch.cat([W.flatten(1), b.unsqueeze(1)], 1) for W, b in pairs]


def random_io(device, S=3, V=2):
    a = torch.randn(N, S, 5, device=device)
    return LayerIO(a, torch.randn(V, N, S, 4, device=device))


def square(G):
    return torch.outer(G.flatten(), G.flatten())


# ---- one sample with the positions of all -----------------------------------------------------


@every_model
def test_the_pooled_block_is_n_times_the_square_of_the_gradient(name, device):
    model, X = MODELS[name](device)
    y = labels(device)
    ios = ks.layer_ios(model, LOSS, X, y, ks.empirical)
    for io, G in zip(ios.values(), gradient(model, LOSS, X, y), strict=True):
        check_equal(pooled(io).block(), N * square(G))
        check_equal(pooled(io).gradients()[0, 0], N**0.5 * G)
        check_differs(io.block(), N * square(G), by=0.1)


@every_model
def test_of_a_summed_loss_the_pooled_block_is_the_square_of_the_gradient(name, device):
    model, X = MODELS[name](device)
    y, loss = labels(device), CrossEntropyLoss(reduction="sum")
    ios = ks.layer_ios(model, loss, X, y, ks.empirical)
    for io, G in zip(ios.values(), gradient(model, loss, X, y), strict=True):
        check_equal(pooled(io).block(), square(G))


@every_model
def test_a_bare_gradient_is_the_pooled_layer_up_to_n(name, device):
    model, X = MODELS[name](device)
    y = labels(device)
    ios = ks.layer_ios(model, LOSS, X, y, ks.empirical)
    for io, G in zip(ios.values(), gradient(model, LOSS, X, y), strict=True):
        bare, whole = tkfac(from_gradient(G)), tkfac(pooled(io))
        check_equal(N * bare.A, whole.A)
        check_equal(N * bare.B, whole.B)
        check_equal(N * from_gradient(G).block(), pooled(io).block())


@pytest.mark.everywhere
def test_a_bare_gradient_is_its_own(device):
    G = torch.randn(3, 5, device=device)
    io = from_gradient(G)
    assert torch.equal(io.gradients()[0, 0], G)
    assert io.gradients().shape == (1, 1, 3, 5)


def test_a_bare_gradient_in_half_precision_has_curvature_in_single(device):
    G = torch.randn(3, 5, device=device, dtype=torch.bfloat16)
    assert from_gradient(G).g.dtype == torch.float32
    assert torch.equal(from_gradient(G).gradients()[0, 0], G.float())


@pytest.mark.parametrize("S", [1, 3])
def test_kfac_never_asks_which_positions_belong_to_one_sample_and_tkfac_does(S, device):
    io = random_io(device, S)
    check_equal(ks.kfac(pooled(io)).dense(), ks.kfac(io).dense())
    check_equal(ks.foof(pooled(io)).dense(), ks.foof(io).dense())
    check_differs(tkfac(pooled(io)).dense(), tkfac(io).dense(), by=0.3)
    check_differs(ks.kfac_reduce(pooled(io)).dense(), ks.kfac_reduce(io).dense(), by=0.3)


@pytest.mark.parametrize("S", [1, 3])
def test_a_batch_of_one_sample_stays_as_it_is(S, device):
    io = random_io(device, S)
    one = LayerIO(io.a[:1], io.g[:, :1])
    for approximation in (tkfac, ks.tekfac, partial(ks.kpsvd, tolerance=1e-12)):
        check_equal(approximation(pooled(one)).dense(), approximation(one).dense())


def test_kfac_of_a_bare_gradient_is_one_sided(device):
    G = torch.randn(3, 5, device=device)
    eye = torch.eye(5, device=device)
    check_equal(ks.kfac(from_gradient(G)).dense(), torch.kron(G @ G.T, eye / 5))


# ---- padding, words, reduced views, tied weights ----------------------------------------------


def test_pooled_positions_that_are_not_counted_stay_out_of_means(device):
    io, counted = random_io(device), torch.ones(N, 3, dtype=torch.bool, device=device)
    counted[2, 1:] = False
    counted[4] = False
    mask = counted.unsqueeze(-1)
    io = LayerIO(io.a * mask, io.g * mask, counted=counted)
    assert pooled(io).rows == io.rows == N * 3 - 5
    check_equal(ks.kfac(pooled(io)).dense(), ks.kfac(io).dense())
    plain = LayerIO(io.a, io.g)
    check_equal(pooled(io).block(), pooled(plain).block())
    check_differs(ks.kfac(pooled(io)).dense(), ks.kfac(pooled(plain)).dense())


def test_pooled_words_stay_words(device):
    torch.manual_seed(0)
    model = Sequential(Embedding(6, 3), Flatten(), Linear(15, CLASSES)).to(device)
    X = torch.randint(6, (N, 5), device=device)
    io = ks.layer_ios(model, LOSS, X, labels(device), ks.empirical)["0"]
    assert isinstance(pooled(io).a, ks.OneHot)
    assert pooled(io).a.columns.tolist() == [X.flatten().tolist()]
    full = LayerIO(io.a.dense(), io.g)
    check_equal(pooled(io).gradients(), pooled(full).gradients())
    check_equal(ks.kfac(pooled(io)).dense(), ks.kfac(io).dense())


def test_a_reduced_view_has_lost_the_gradient_and_is_refused(device):
    with pytest.raises(ValueError, match=r"pooled\(io\).*stands for 3 positions.*flavour=EXPAND"):
        pooled(random_io(device).reduced())


def test_both_uses_of_a_tied_weight_are_pooled(device):
    direct, turned = random_io(device, 3), random_io(device, 2)
    turned = LayerIO(turned.g[0], turned.a.expand(2, N, 2, 5))  # from 4 to 5 and back
    io = ks.TiedIO(direct, turned)
    check_equal(pooled(io).gradients(), io.gradients().sum(1, keepdim=True))
    check_equal(ks.kfac(pooled(io)).dense(), ks.kfac(io).dense())
    with pytest.raises(NotImplementedError, match=r"pass io\.direct and io\.turned"):
        tkfac(pooled(io))


# ---- mean of squares and square of means ------------------------------------------------------


def samples(device, M=6):
    """Gradients of few samples as vectors, their mean, and the mean of their squares."""
    g = torch.randn(M, 6, device=device) + 1
    return g, g.mean(0), g.T @ g / M


def mean_square(batches):
    """The mean over batches of the square of the batch's mean gradient."""
    return sum(torch.outer(b.mean(0), b.mean(0)) for b in batches) / len(batches)


def test_the_square_of_a_drawn_batch_has_one_over_b_of_the_mean_square(device):
    """All 216 draws of three from six, with replacement."""
    B, (g, m, F) = 3, samples(device)
    found = mean_square([g[list(draw)] for draw in product(range(6), repeat=B)])
    check_equal(found, F / B + (1 - 1 / B) * torch.outer(m, m))
    check_differs(B * found, F, by=0.3)


def test_without_replacement_it_has_the_covariance_of_finite_sets(device):
    B, M, (g, m, F) = 3, 6, samples(device)
    batches = [g[list(draw)] for draw in combinations(range(M), B)]
    assert len(batches) == math.comb(M, B)
    covariance = F - torch.outer(m, m)
    share = (M - B) / (B * (M - 1))
    check_equal(mean_square(batches), torch.outer(m, m) + share * covariance)
    check_differs(mean_square(batches), torch.outer(m, m) + covariance / B)


def test_at_a_stationary_point_the_square_of_a_batch_is_unbiased(device):
    B, (g, m, _) = 3, samples(device)
    g = g - m
    found = mean_square([g[list(draw)] for draw in product(range(6), repeat=B)])
    check_equal(B * found, g.T @ g / 6)


def with_labels(model, X, y, drawn):
    """A Fisher of given labels: what `monte_carlo(1)` sends back if it draws them."""

    def fisher(loss, f, _):
        f = f.detach()
        return ((f.softmax(1) - torch.nn.functional.one_hot(drawn, CLASSES)) / len(f) ** 0.5)[None]

    return ks.layer_ios(model, LOSS, X, y, fisher)


@every_model
def test_with_labels_of_the_model_the_pooled_block_is_unbiased_everywhere(name, device):
    """All 64 labels of three samples, with their probabilities; at those of the batch it is not."""
    model, X = MODELS[name](device)
    X, y = X[:3], labels(device)[:3]
    p = model(X).softmax(1).detach()
    expected, exact = {}, ks.layer_ios(model, LOSS, X, y, ks.type2)
    for drawn in product(range(CLASSES), repeat=3):
        weight = math.prod(float(p[n, c]) for n, c in enumerate(drawn))
        ios = with_labels(model, X, y, torch.tensor(drawn, device=device))
        for layer, io in ios.items():
            expected[layer] = expected.get(layer, 0) + weight * pooled(io).block()
    for layer, io in exact.items():
        check_equal(expected[layer], io.block())
    at_y = ks.layer_ios(model, LOSS, X, y, ks.empirical)
    for layer, io in at_y.items():
        check_differs(pooled(io).block(), expected[layer], by=0.1)


def test_pooled_type2_vectors_are_no_estimate(device):
    """Vectors of one number belong together in one sample only: cross terms remain."""
    model, X = mlp(device)
    io = ks.layer_ios(model, LOSS, X, labels(device), ks.type2)["0"]
    check_differs(pooled(io).block(), io.block(), by=0.3)


# ---- in training ------------------------------------------------------------------------------


def test_of_batch_is_the_estimator_of_pooled_layers(device):
    ios, estimator = [random_io(device), random_io(device)], ks.AmortisedEKFAC(1)
    of_batch, plain = ks.OfBatch(estimator), None
    state = None
    for io, weight in zip(ios, (1.0, 0.3), strict=True):
        state = of_batch.update(state, io, weight)
        plain = estimator.update(plain, pooled(io), weight)
    check_equal(state.dense(), plain.dense())


def test_an_approximation_stands_for_its_moving_average(device):
    assert ks.OfBatch(tkfac) == ks.OfBatch(ks.MovingAverage(tkfac))
    ios = [random_io(device), random_io(device)]
    first = ks.OfBatch(tkfac).update(None, ios[0], 1.0)
    M = ks.OfBatch(tkfac).update(first, ios[1], 0.5)
    A, B = ([getattr(tkfac(pooled(io)), f) for io in ios] for f in "AB")
    check_equal(M.A, sum(A) / 2)
    check_equal(M.B, sum(B) / 2)
