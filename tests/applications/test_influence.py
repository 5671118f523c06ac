"""Influence: exact where a closed form is known, and a derivative elsewhere."""

import math
import weakref

import pytest
import torch
from torch.func import functional_call, grad, vmap
from torch.nn import (
    BatchNorm1d,
    Conv2d,
    CrossEntropyLoss,
    Embedding,
    Flatten,
    Linear,
    Sequential,
    Tanh,
)
from torch.nn.functional import cross_entropy

from kfac_scratch import Kronecker, LayerIO, ekfac, factored_inverse, kfac, layer_ios
from kfac_scratch.applications.influence import (
    influence_by_block,
    influence_scores,
    inverse_as_sum,
    product_kernels,
    self_influence,
)
from kfac_scratch.applications.laplace import laplace
from kfac_scratch.curvature import block_index, hessian
from kfac_scratch.losses import empirical
from tests.applications.structures import SQUARES, STRUCTURES, SUM, dense
from tests.laws import check_differs, check_equal, error


def inverses_of(model, loss, X, y, decay, structure=kfac):
    return {n: structure(io).inverse(decay) for n, io in layer_ios(model, loss, X, y).items()}


# ---- where a closed form is known ---------------------------------------------------------------


def ridge(X, y, decay):
    """The minimum of the sum of squared errors and the decay, and the Hessian."""
    H = 2 * X.T @ X + decay * torch.eye(X.shape[1], device=X.device)
    return torch.linalg.solve(H, 2 * X.T @ y), H


def linear(w):
    model = Sequential(Linear(*w.shape, bias=False)).to(w.device)
    with torch.no_grad():
        model[0].weight.copy_(w.T)
    return model


@pytest.mark.parametrize("structure", ["dense", "kfac", "ekfac"])
def test_ridge_regression_without_a_datum_is_the_score_over_one_minus_leverage(structure, device):
    torch.manual_seed(0)
    X, y = torch.randn(15, 4, device=device), torch.randn(15, 1, device=device)
    queries = torch.randn(3, 4, device=device), torch.randn(3, 1, device=device)
    w, H = ridge(X, y, 0.8)
    model = linear(w)
    inverses = inverses_of(model, SQUARES, X, y, 0.8, STRUCTURES[structure])
    scores = influence_scores(model, SQUARES, inverses, [queries], [(X, y)])
    of_predictions = influence_scores(
        model, SQUARES, inverses, [queries], [(X, y)], lambda f, y: f.squeeze(1)
    )
    by_query = 2 * (queries[0] @ w - queries[1]) * queries[0]  # gradients of the queries' losses
    moves = []
    for n in range(len(X)):
        rest = torch.arange(len(X), device=device) != n
        moves.append(ridge(X[rest], y[rest], 0.8)[0] - w)
    move = torch.cat(moves, 1)
    leverage = 2 * ((X @ H.inverse()) * X).sum(1)
    check_equal(scores / (1 - leverage), by_query @ move)
    check_differs(scores, by_query @ move)
    check_equal(of_predictions / (1 - leverage), queries[0] @ move)  # the whole change
    assert (of_predictions.abs() <= (queries[0] @ move).abs()).all()


def refitted(model, X, y, weights, decay):
    """Newton's method for softmax regression with a weight for each datum."""

    class Weighted(CrossEntropyLoss):
        def forward(self, f, t):
            return (cross_entropy(f, t, reduction="none") * weights).sum()

    model = Sequential(Linear(model[0].in_features, model[0].out_features))
    W = torch.zeros_like(torch.cat([p.flatten() for p in model.parameters()]))
    for _ in range(30):
        torch.nn.utils.vector_to_parameters(W, model.parameters())
        value = Weighted()(model(X), y)
        g = torch.cat([p.flatten() for p in torch.autograd.grad(value, model.parameters())])
        g = g + decay * W
        if g.abs().max() < 1e-13:
            return model
        W = W - torch.linalg.solve(hessian(model, Weighted(), X, y) + decay * torch.eye(len(W)), g)
    raise AssertionError("Newton's method did not converge")


def softmax_regression():
    """Its Gauss-Newton matrix is the Hessian."""
    torch.manual_seed(0)
    X, y = torch.randn(20, 4), torch.randint(3, (20,))
    queries = torch.randn(5, 4), torch.randint(3, (5,))
    return refitted(Sequential(Linear(4, 3)), X, y, torch.ones(20), 0.5), X, y, queries


def test_scores_are_the_derivative_by_the_weight_of_a_datum():
    """Central differences of refits: the error falls with the square of the step."""
    model, X, y, queries = softmax_regression()
    inverses = inverses_of(model, SUM, X, y, 0.5, dense)
    scores = influence_scores(model, SUM, inverses, [queries], [(X, y)])

    def losses(n, step):
        weights = torch.ones(20)
        weights[n] += step
        f = refitted(model, X, y, weights, 0.5)(queries[0])
        return cross_entropy(f, queries[1], reduction="none").detach()

    errors = []
    for step in (4e-2, 1e-2):
        slopes = [(losses(n, -step) - losses(n, step)) / (2 * step) for n in (3, 11)]
        errors.append(error(torch.stack(slopes, 1), scores[:, [3, 11]]))
    assert 14 < errors[0] / errors[1] < 18
    assert errors[1] < 1e-4


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
def test_other_structures_are_not_the_derivative(structure):
    model, X, y, queries = softmax_regression()
    exact, other = (
        influence_scores(model, SUM, inverses_of(model, SUM, X, y, 0.5, s), [queries], [(X, y)])
        for s in (dense, STRUCTURES[structure])
    )
    check_differs(other, exact)


# ---- networks -----------------------------------------------------------------------------------


def perceptron(device):
    torch.manual_seed(0)
    model = Sequential(Linear(5, 4), Tanh(), Linear(4, 3)).to(device)
    return model, torch.randn(12, 5, device=device)


def convolutional(device):
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 4, 2, groups=2), Tanh(), Flatten(), Linear(16, 3)).to(device)
    return model, torch.randn(12, 2, 3, 3, device=device)


def words(device):
    torch.manual_seed(0)
    model = Sequential(Embedding(7, 2), Flatten(), Linear(6, 3)).to(device)
    return model, torch.randint(7, (12, 3), device=device)


MODELS = {"perceptron": perceptron, "convolutional": convolutional, "words": words}


def problem(name, device):
    model, X = MODELS[name](device)
    return model, X, torch.randint(3, (12,), device=device)


def gradients(model, measurement, X, y):
    """Those of every datum, by torch.func: `[N, P]`."""
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def one(theta, x, t):
        return measurement(functional_call(model, theta, (x[None],)), t[None]).sum()

    G = vmap(grad(one), (None, 0, 0))(theta, X, y)
    return torch.cat([g.flatten(1) for g in G.values()], 1)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_of_dense_inverses_and_single_gradients(name, structure, device):
    model, X, y = problem(name, device)
    ios = layer_ios(model, SUM, X, y)
    Ms = {block: STRUCTURES[structure](io) for block, io in ios.items()}
    inverses = {block: M.inverse(0.3) for block, M in Ms.items()}
    own, others = gradients(model, SUM, X, y), gradients(model, SUM, X[:4], y[:4])
    found = influence_by_block(model, SUM, inverses, [(X[:4], y[:4])], [(X, y)])
    assert list(found) == list(Ms)
    total = 0
    for block, index in block_index(model).items():
        columns = index.flatten()
        damped = Ms[block].dense() + 0.3 * torch.eye(len(columns), device=device)
        expected = others[:, columns] @ torch.linalg.solve(damped, own[:, columns].T)
        check_equal(found[block], expected)
        total = total + expected
    check_equal(influence_scores(model, SUM, inverses, [(X[:4], y[:4])], [(X, y)]), total)
    whole = influence_scores(model, SUM, inverses, [(X, y)], [(X, y)])
    check_equal(self_influence(model, SUM, inverses, [(X, y)]), whole.diagonal())


def test_scores_do_not_depend_on_the_batches(device):
    model, X, y = problem("perceptron", device)
    inverses = inverses_of(model, SUM, X, y, 0.3)
    parts = list(zip(X.split(5), y.split(5), strict=True))
    whole = influence_scores(model, SUM, inverses, [(X, y)], [(X, y)])
    check_equal(influence_scores(model, SUM, inverses, parts, parts, progress=True), whole)
    check_equal(self_influence(model, SUM, inverses, parts), whole.diagonal())


def test_a_query_may_measure_anything(device):
    """The margin between two classes, as a function of outputs and targets."""

    def margin(f, y):
        return f.gather(1, y[:, None]).squeeze(1) - f.logsumexp(1)

    model, X, y = problem("perceptron", device)
    inverses = inverses_of(model, SUM, X, y, 0.3)
    found = influence_scores(model, SUM, inverses, [(X[:4], y[:4])], [(X, y)], margin)
    check_equal(found, -influence_scores(model, SUM, inverses, [(X[:4], y[:4])], [(X, y)]))
    first = influence_scores(model, SUM, inverses, [(X[:4], y[:4])], [(X, y)], lambda f, y: f[:, 0])
    G, H = gradients(model, lambda f, y: f[:, 0], X[:4], y[:4]), gradients(model, SUM, X, y)
    expected = sum(
        torch.einsum("qi,in->qn", G[:, i], torch.linalg.solve(M, H[:, i].T))
        for i, M in (
            (index.flatten(), kfac(io).dense() + 0.3 * torch.eye(index.numel(), device=device))
            for (_, index), io in zip(
                block_index(model).items(), layer_ios(model, SUM, X, y).values(), strict=True
            )
        )
    )
    check_equal(first, expected)


def test_covariances_of_a_posterior_are_inverses(device):
    model, X, y = problem("perceptron", device)
    found = influence_scores(
        model, SUM, laplace(model, SUM, [(X, y)], 0.3).covariances(), [(X, y)], [(X, y)]
    )
    inverses = inverses_of(model, SUM, X, y, 0.3)
    check_equal(found, influence_scores(model, SUM, inverses, [(X, y)], [(X, y)]))


def test_one_layer_may_stand_for_the_network(device):
    model, X, y = problem("perceptron", device)
    inverses = inverses_of(model, SUM, X, y, 0.3)
    found = influence_scores(model, SUM, {"2": inverses["2"]}, [(X, y)], [(X, y)])
    check_equal(found, influence_by_block(model, SUM, inverses, [(X, y)], [(X, y)])["2"])


def test_a_factor_of_the_loss_divides_the_damping(device):
    """The loss times `beta` with a decay: the scores of the loss with `decay / beta`, times it."""
    model, X, y = problem("perceptron", device)
    tripled = CrossEntropyLoss(torch.full((3,), 3.0, device=device), reduction="sum")
    found = influence_scores(
        model, tripled, inverses_of(model, tripled, X, y, 0.3), [(X[:4], y[:4])], [(X, y)]
    )
    inverses = inverses_of(model, SUM, X, y, 0.3 / 3)
    plain = influence_scores(model, SUM, inverses, [(X[:4], y[:4])], [(X, y)])
    check_equal(found, 3 * plain)


@pytest.mark.parametrize("call", [influence_by_block, self_influence])
def test_gradients_of_one_block_at_a_time_are_in_memory(call, monkeypatch):
    """When a block's gradients are formed, no other block's are there."""
    model, X, y = problem("perceptron", "cpu")
    inverses = inverses_of(model, SUM, X, y, 0.3)
    formed = []

    def gradients(io):
        assert all(G() is None for G in formed)
        G = torch.einsum("vnso,nsi->vnoi", io.g, io.a)
        formed.append(weakref.ref(G))
        return G

    monkeypatch.setattr(LayerIO, "gradients", gradients)
    call(model, SUM, inverses, *([[(X, y)]] * (1 if call is self_influence else 2)))
    assert len(formed) == (2 if call is self_influence else 4)


def test_in_single_precision_scores_are_near_double_precision():
    found = []
    for dtype in (torch.float32, torch.float64):
        model, X = perceptron("cpu")
        model, X = model.to(dtype), X.to(dtype)
        y = torch.arange(12) % 3
        inverses = inverses_of(model, SUM, X, y, 0.3)
        found.append(influence_scores(model, SUM, inverses, [(X, y)], [(X, y)]).double())
    assert 1e-12 < error(found[0], found[1]) < 1e-4


def test_a_mean_loss_in_all_places_gives_other_scores():
    """Why it is refused: its gradients depend on the number of queries, and scores with them."""
    model, X, y = problem("perceptron", "cpu")
    mean = CrossEntropyLoss()
    G = layer_ios(model, mean, X[:4], y[:4], empirical)["2"].gradients()
    H = layer_ios(model, mean, X[:2], y[:2], empirical)["2"].gradients()
    check_differs(G[:, :2], H)


# ---- product kernels ----------------------------------------------------------------------------


def gradient_rows(device):
    model, X, y = problem("perceptron", device)
    ios = layer_ios(model, SUM, X, y)
    rows = layer_ios(model, SUM, X, y, empirical)
    few = layer_ios(model, SUM, X[:4], y[:4], empirical)
    return kfac(ios["0"]), ekfac(ios["0"]), few["0"], rows["0"]


def by_gradients(inverse, few, rows):
    return torch.einsum(
        "qoi,noi->qn", inverse @ few.gradients().squeeze(0), rows.gradients().squeeze(0)
    )


def test_kfac_and_ekfac_have_one_scale_where_all_tokens_have_one_input(device):
    """A library that divides only one of them by the positions has scores of two scales."""
    torch.manual_seed(0)
    a = torch.randn(3, device=device).expand(6, 4, 3)
    g = torch.zeros(2, 6, 4, 5, device=device)
    g[:, :, 1] = torch.randn(2, 6, 5, device=device)  # one position answers for each datum
    io = LayerIO(a, g)
    K, E = kfac(io), ekfac(io)
    check_equal(K.dense(), io.block())
    check_equal(E.dense(), io.block())
    check_differs(Kronecker(K.A / 4, K.B).dense(), io.block())
    V = torch.randn(5, 3, device=device)
    check_equal(K.inverse(0.3) @ V, E.inverse(0.3) @ V)


def test_with_factored_damping_scores_are_a_product_of_two_kernels(device):
    K, _, few, rows = gradient_rows(device)
    inverse = factored_inverse(K, 0.3)
    errors, inputs = product_kernels(inverse, few, rows)
    check_equal(errors * inputs, by_gradients(inverse, few, rows))
    check_differs(errors * inputs, by_gradients(K.inverse(0.3), few, rows))


@pytest.mark.parametrize("structure", [0, 1], ids=["kfac", "ekfac"])
def test_with_exact_damping_scores_are_a_sum_of_few_products(structure, device):
    *Ms, few, rows = gradient_rows(device)
    M = Ms[structure]
    exact = by_gradients(M.inverse(0.3), few, rows)
    terms = inverse_as_sum(M, 0.3, 1e-14)
    total = sum(e * a for e, a in (product_kernels(K, few, rows) for K in terms))
    check_equal(total, exact)
    fewer = inverse_as_sum(M, 0.3, 1e-2)
    assert len(fewer) < len(terms)
    total = sum(e * a for e, a in (product_kernels(K, few, rows) for K in fewer))
    assert 1e-10 < error(total, exact) < 0.1


def wide(d_out=96, d_in=65, N=300):
    """A layer with a spectrum that spans four orders of magnitude, as inputs of images have."""
    torch.manual_seed(0)
    a = torch.randn(N, 1, d_in) * torch.logspace(0, -2, d_in)
    g = torch.randn(1, N, 1, d_out) * torch.logspace(0, -2, d_out)
    return LayerIO(a, g)


@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_few_terms_suffice_for_a_wide_layer(damping):
    """Also for data along directions that are not in the curvature."""
    io = wide()
    a = io.a.clone()
    a[..., -10:] = 0
    io = LayerIO(a, io.g)
    K = kfac(io)
    few = LayerIO(io.a[:20] + 0.1 * torch.randn(20, 1, 65), io.g[:, :20])
    terms = inverse_as_sum(K, damping, 1e-6)
    assert len(terms) < 24
    for data in (io, few):
        exact = by_gradients(K.inverse(damping), few, data)
        total = sum(e * a for e, a in (product_kernels(T, few, data) for T in terms))
        assert error(total, exact) < 1e-5


def test_without_weights_the_same_number_of_terms_is_worse():
    """Errors of a decomposition that does not know where gradients are large."""
    io = wide()
    E = kfac(io).eigen()
    exact = by_gradients(E.inverse(0.01), io, io)
    terms = inverse_as_sum(E, 0.01, 1e-4)
    total = sum(e * a for e, a in (product_kernels(T, io, io) for T in terms))
    U, s, V = torch.linalg.svd(E.inverse(0.01).scale, full_matrices=False)
    scale = (U[:, : len(terms)] * s[: len(terms)]) @ V[: len(terms)]
    plain = by_gradients(type(E)(E.QA, E.QB, scale), io, io)
    assert error(plain, exact) > 10 * error(total, exact)


# ---- refusals -----------------------------------------------------------------------------------


def scored(change=None, call=influence_scores, **changed):
    model, X, y = problem("perceptron", "cpu")
    parts = {"loss": SUM, "inverses": inverses_of(model, SUM, X, y, 0.3)}
    parts |= {"queries": [(X, y)], "data": [(X, y)]} | changed
    if change is not None:
        change(model, X, y, parts)
    return call(model, **parts)


def not_finite(model, X, y, parts):
    bad = X.clone()
    bad[7, 2] = math.nan
    parts["data"] = [(bad, y)]


def with_a_norm():
    model = Sequential(Linear(5, 4), BatchNorm1d(4), Linear(4, 3))
    X, y = torch.randn(6, 5), torch.arange(6) % 3
    return influence_scores(model, SUM, {"0": kfac(wide()).inverse(1.0)}, [(X, y)], [(X, y)])


BAD = {
    "a mean loss": (lambda: scored(loss=CrossEntropyLoss()), ValueError, "reduction='mean'"),
    "a loss without reduction": (lambda: scored(loss=Tanh()), ValueError, "reduction=None"),
    "a loss that is no module": (lambda: scored(loss=cross_entropy), TypeError, "loss"),
    "no inverses": (lambda: scored(inverses={}), ValueError, "inverses is empty"),
    "inverses of another model": (
        lambda: scored(inverses={"5": kfac(wide()).inverse(1.0)}),
        ValueError,
        r"no blocks \['5'\]",
    ),
    "one inverse": (
        lambda: scored(inverses=kfac(wide()).inverse(1.0)),
        TypeError,
        "inverses must be a Mapping",
    ),
    "a number": (lambda: scored(inverses={"0": 0.3}), TypeError, r"inverses\['0'\]"),
    "a tensor of queries": (
        lambda: scored(queries=torch.randn(3, 5)),
        TypeError,
        r"queries must yield batches \(X, y\)",
    ),
    "queries without targets": (
        lambda: scored(queries=[torch.randn(3, 5)]),
        TypeError,
        "Batch 0 of queries is a Tensor",
    ),
    "no query": (lambda: scored(queries=[]), ValueError, "queries yielded no batch"),
    "no datum": (lambda: scored(data=[]), ValueError, "data yielded no batch"),
    "a datum that is not finite": (
        lambda: scored(not_finite),
        ValueError,
        "input of layer '0' is not finite, first for sample 7",
    ),
    "one number for all queries": (
        lambda: scored(measurement=lambda f, y: f.sum()),
        ValueError,
        r"measurement gave \(\) for 12 queries",
    ),
    "a number that is no tensor": (
        lambda: scored(measurement=lambda f, y: 1.0),
        ValueError,
        "measurement gave float for 12 queries",
    ),
    "a string for a measurement": (
        lambda: scored(measurement="margin"),
        TypeError,
        "measurement='margin' is a string",
    ),
    "batch norm in training": (with_a_norm, ValueError, "BatchNorm"),
    "kernels of a layer with positions": (
        lambda: product_kernels(
            kfac(wide()), wide(), LayerIO(torch.randn(2, 3, 65), torch.randn(1, 2, 3, 96))
        ),
        ValueError,
        "data has 1 vectors and 3 positions",
    ),
    "a sum without damping": (
        lambda: inverse_as_sum(kfac(wide()), 0.0),
        ValueError,
        "damping is 0",
    ),
    "a tolerance of 1": (
        lambda: inverse_as_sum(kfac(wide()), 0.1, 1.0),
        ValueError,
        "tolerance 1.0",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused_with_a_way_out(name):
    call, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        call()
