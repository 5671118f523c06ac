"""Laplace's approximation: exact for linear models, ordered where theorems say so, closed forms."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.func import functional_call, jacrev
from torch.nn import Conv2d, CrossEntropyLoss, Flatten, Linear, Sequential, Tanh

from kfac_scratch import REDUCE, LayerIO, ekfac, kfac, kfac_reduce
from kfac_scratch.applications.laplace import (
    BOUNDS,
    Laplace,
    effective_parameters,
    evidence_gradient,
    laplace,
    log_evidence,
    mackay,
    mackay_noise,
    mackay_shared,
    sampled_weights,
)
from kfac_scratch.applications.predictive import (
    predicted_outputs,
    probit,
    sampled_probabilities,
)
from kfac_scratch.approximations.kpsvd import deflation
from kfac_scratch.linalg import kron
from tests.applications.structures import SQUARES, STRUCTURES, SUM, dense, diagonal
from tests.laws import check_differs, check_equal

EXACT = ("dense", "kfac", "ekfac")  # on linear models with squared error


def units(W):
    """Unit vectors in the shape of a weight."""
    return torch.eye(W.numel()).to(W).reshape(-1, *W.shape)


def as_matrix(linear_map, W):
    """A linear map on weights as a matrix."""
    return torch.stack([(linear_map @ V).flatten() for V in units(W)], 1)


# ---- linear models ------------------------------------------------------------------------------


def fitted(prior, beta, device="cpu", C=3, N=11, d=4):
    """A linear model at the minimum of `beta` times the squared error plus the prior."""
    torch.manual_seed(0)
    X, y = torch.randn(N, d, device=device), torch.randn(N, C, device=device)
    Phi = torch.cat([X, torch.ones_like(X[:, :1])], 1)
    P = 2 * beta * Phi.T @ Phi + prior * torch.eye(d + 1, device=device)
    W = torch.linalg.solve(P, 2 * beta * Phi.T @ y).T
    model = Sequential(Linear(d, C)).to(device)
    with torch.no_grad():
        model[0].weight.copy_(W[:, :-1])
        model[0].bias.copy_(W[:, -1])
    return model, X, y, Phi, P


def exact_evidence(Phi, y, prior, beta):
    """That of Bayesian linear regression: targets are normal, with noise and prior in them."""
    covariance = torch.eye(len(y)) / (2 * beta) + Phi @ Phi.T / prior
    normal = MultivariateNormal(torch.zeros(len(y)), covariance)
    return sum(normal.log_prob(column) for column in y.T)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(("prior", "beta"), [(0.3, 1.7), (5.0, 0.5)])
def test_the_evidence_of_a_linear_model_is_that_of_bayesian_regression(prior, beta, structure):
    model, X, y, Phi, _ = fitted(prior, beta)
    p = laplace(model, SQUARES, [(X, y)], prior, beta, STRUCTURES[structure])
    exact = exact_evidence(Phi, y, prior, beta)
    check = check_equal if structure in EXACT else check_differs
    check(log_evidence(p), exact)


@pytest.mark.parametrize("structure", EXACT)
def test_the_covariance_of_a_linear_model_is_that_of_bayesian_regression(structure, device):
    model, X, y, _, P = fitted(0.3, 1.7, device)
    p = laplace(model, SQUARES, [(X, y)], 0.3, 1.7, STRUCTURES[structure])
    eye = torch.eye(3, device=device)
    check_equal(as_matrix(p.covariances()["0"], p.weights["0"]), kron(eye, P.inverse()))
    new = torch.randn(5, 4, device=device)
    f, covariance = predicted_outputs(p, model, new)
    check_equal(f, model(new))
    phi = torch.cat([new, torch.ones_like(new[:, :1])], 1)
    variance = torch.einsum("ni,ij,nj->n", phi, P.inverse(), phi)
    check_equal(covariance, variance[:, None, None] * eye)


def test_mackay_with_refits_reaches_the_largest_evidence_of_a_linear_model():
    """The curvature of a linear model is the same at all weights."""
    prior, beta = 1.0, 1.0
    model, X, y, Phi, _ = fitted(prior, beta)
    p = laplace(model, SQUARES, [(X, y)], prior, beta)
    for _ in range(300):
        model, *_ = fitted(prior, beta)
        W = torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], 1).detach()
        total = float(SQUARES(model(X), y).detach())
        p = replace(p, weights={"0": W}, loss=total, prior={"0": prior}, beta=beta)
        prior, beta = mackay_shared(p).prior["0"], mackay_noise(p).beta
    best = exact_evidence(Phi, y, prior, beta)
    for c in (0.99, 1.01):
        assert exact_evidence(Phi, y, c * prior, beta) < best
        assert exact_evidence(Phi, y, prior, c * beta) < best
    model, X, y, *_ = fitted(prior, beta)
    gradient = evidence_gradient(laplace(model, SQUARES, [(X, y)], prior, beta))
    assert gradient.log_prior["0"].abs().max() < 1e-9
    assert abs(gradient.log_beta) < 1e-9


# ---- networks -----------------------------------------------------------------------------------


def classifier(device="cpu", seed=0, dtype=torch.float64, N=13):
    torch.manual_seed(seed)
    model = Sequential(Linear(5, 4), Tanh(), Linear(4, 3)).to(device, dtype)
    X = torch.randn(N, 5, device=device, dtype=dtype)
    return model, X, torch.randint(3, (N,), device=device)


def convolutional(device):
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 3, 2, groups=1), Tanh(), Flatten(), Linear(12, 3)).to(device)
    return model, torch.randn(7, 2, 3, 3, device=device), torch.randint(3, (7,), device=device)


def formula(p, log_prior, log_beta):
    """The evidence, with the determinants of dense matrices."""
    beta = log_beta.exp()
    value = -beta * p.loss - p.numbers / 2 * torch.log(math.pi / beta)
    for name, M in p.matrices.items():
        W, delta = p.weights[name], log_prior[name].exp()
        columns = delta.expand(W.shape[1]).expand_as(W)
        precision = beta * M.dense() + columns.flatten().diag()
        value = value - (columns * W.square()).sum() / 2
        value = value - (precision.logdet() - columns.log().sum()) / 2
    return value


def by_hand(p):
    """Evidence and derivatives by autodiff through the formula."""
    log_prior = {n: torch.as_tensor(d).log().requires_grad_() for n, d in p.prior.items()}
    log_beta = torch.tensor(p.beta).log().requires_grad_()
    value = formula(p, log_prior, log_beta)
    by_beta, *by_prior = torch.autograd.grad(value, [log_beta, *log_prior.values()])
    return value.detach(), dict(zip(log_prior, by_prior, strict=True)), by_beta


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("loss", ["cross-entropy", "mse"])
def test_the_evidence_and_its_gradient_are_those_of_dense_determinants(loss, structure):
    model, X, y = classifier()
    data = (SUM, [(X, y)]) if loss == "cross-entropy" else (SQUARES, [(X, model(X).detach().sin())])
    p = laplace(model, *data, {"0": 0.7, "2": 2.5}, 1.3, STRUCTURES[structure])
    value, by_prior, by_beta = by_hand(p)
    check_equal(log_evidence(p), value)
    gradient = evidence_gradient(p)
    for name, d in by_prior.items():
        check_equal(gradient.log_prior[name], d.reshape(1))
    check_equal(torch.tensor(gradient.log_beta), by_beta)


def test_a_prior_for_each_column_is_exact(device):
    model, X, y = classifier(device)
    priors = {"0": torch.rand(6, device=device) + 0.2, "2": torch.rand(5, device=device) + 0.2}
    p = laplace(model, SUM, [(X, y)], priors, 1.3)
    value, by_prior, _ = by_hand(
        replace(p, prior={n: d.cpu() for n, d in priors.items()}) if 0 else p
    )
    check_equal(log_evidence(p), value.cpu())
    gradient = evidence_gradient(p)
    for name, d in priors.items():
        W, M = p.weights[name], p.matrices[name].dense()
        precision = 1.3 * M + d.expand_as(W).flatten().diag()
        check_equal(as_matrix(p.covariances()[name], W), precision.inverse())
        check_equal(gradient.log_prior[name], by_prior[name])
        root = as_matrix(p.blocks()[name].root(), W)
        check_equal(root @ root.T, precision.inverse())


def test_a_prior_of_equal_columns_is_one_number():
    model, X, y = classifier()
    one = laplace(model, SUM, [(X, y)], 0.7)
    columns = laplace(
        model, SUM, [(X, y)], {"0": torch.full((6,), 0.7), "2": torch.full((5,), 0.7)}
    )
    check_equal(log_evidence(columns), log_evidence(one))
    for name, gamma in effective_parameters(one).items():
        check_equal(effective_parameters(columns)[name].sum(0, keepdim=True), gamma)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("problem", [classifier, convolutional])
def test_the_outputs_covariance_is_that_of_the_whole_jacobian(problem, structure, device):
    model, X, y = problem(device)
    p = laplace(model, SUM, [(X, y)], 0.7, 1.3, STRUCTURES[structure])
    _, covariance = predicted_outputs(p, model, X)
    theta = {name: t.detach() for name, t in model.named_parameters()}
    J = jacrev(lambda theta: functional_call(model, theta, (X,)))(theta)
    expected = 0
    for name, S in p.covariances().items():
        layer = [J[f"{name}.weight"].flatten(3), J[f"{name}.bias"].unsqueeze(-1)]
        rows = torch.cat(layer, -1)
        expected = expected + torch.einsum("nuoi,nvoi->nuv", rows, S @ rows)
    check_equal(covariance, expected)


def test_samples_have_the_posterior_covariance(device):
    model, X, y = classifier(device)
    p = laplace(model, SUM, [(X, y)], 0.7, 1.3)
    for name, block in p.blocks().items():
        root = as_matrix(block.root(), p.weights[name])
        check_equal(root @ root.T, as_matrix(block.covariance(), p.weights[name]))
    generator = torch.Generator(device).manual_seed(0)
    first = sampled_weights(p, 2, generator)
    again = sampled_weights(p, 2, generator.manual_seed(0))
    assert all(torch.equal(first[name], again[name]) for name in p.weights)
    assert all(first[name].shape == (2, *W.shape) for name, W in p.weights.items())


def test_the_evidence_of_a_loader_is_that_of_one_batch(device):
    model, X, y = classifier(device)
    whole = laplace(model, SUM, [(X, y)], 0.7)
    parts = laplace(model, SUM, list(zip(X.split(5), y.split(5), strict=True)), 0.7)
    check_equal(log_evidence(parts), log_evidence(whole))


def test_one_layer_can_have_a_posterior_alone(device):
    model, X, y = classifier(device)
    last = laplace(model, SUM, [(X, y)], 0.7, layers=["2"])
    whole = laplace(model, SUM, [(X, y)], 0.7)
    assert list(last.weights) == ["2"]
    _, covariance = predicted_outputs(last, model, X)
    _, larger = predicted_outputs(whole, model, X)
    assert (larger - covariance).diagonal(dim1=1, dim2=2).min() > 0


def test_kfac_reduce_has_an_evidence_of_its_own(device):
    model, X, y = convolutional(device)
    expand = laplace(model, SUM, [(X, y)], 0.7)
    reduce = laplace(model, SUM, [(X, y)], 0.7, flavour=REDUCE)
    by_hand = laplace(model, SUM, [(X, y)], 0.7, approximation=kfac_reduce)
    check_equal(log_evidence(reduce), log_evidence(by_hand))
    check_differs(log_evidence(reduce), log_evidence(expand), by=1e-3)


def test_in_single_precision_everything_is_near_double_precision():
    values = []
    for dtype in (torch.float32, torch.float64):
        model, X, y = classifier()
        model, X = model.to(dtype), X.to(dtype)
        p = laplace(model, SUM, [(X, y)], 0.7)
        _, covariance = predicted_outputs(p, model, X)
        values.append((log_evidence(p), covariance.double()))
    for single, double in zip(*values, strict=True):
        check_differs(single, double, by=1e-12)
        assert (single - double).abs().max() <= 1e-4 * double.abs().max()


# ---- what is ordered, and what is not -----------------------------------------------------------


def of_layer(seed, structure):
    """The evidence of one random layer, but for what all structures share."""
    torch.manual_seed(seed)
    N, S, V, d = (6, 2, 2, 3) if seed % 2 else (40, 1, 1, 2)
    io = LayerIO(torch.randn(N, S, d), torch.randn(V, N, S, d))
    W = {"l": torch.zeros(d, d)}
    return float(log_evidence(Laplace(W, {"l": structure(io)}, 0.0, 0, {"l": 1.0})))


def test_ekfac_and_the_diagonal_never_have_more_evidence_than_the_block():
    """Hadamard: a matrix's determinant is at most the product of its diagonal, in any basis."""
    for seed in range(40):
        block = of_layer(seed, dense)
        assert of_layer(seed, ekfac) <= block
        assert of_layer(seed, diagonal) <= block


def test_kfac_has_no_such_order():
    more = [of_layer(seed, kfac) > of_layer(seed, dense) for seed in range(40)]
    assert any(more)
    assert not all(more)


def test_blocks_alone_have_at_most_as_many_times_the_variance_as_there_are_blocks():
    """`M <= L blockdiag(M)` for L blocks."""
    model, X, y = classifier()
    theta = {name: t.detach() for name, t in model.named_parameters()}
    J = jacrev(lambda theta: functional_call(model, theta, (X,)))(theta)
    rows = torch.cat([t.flatten(2) for t in J.values()], -1)  # [N, C, P]
    p = model(X).detach().softmax(1)
    H = p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1)
    M = torch.einsum("nci,ncd,ndj->ij", rows, H, rows)
    full = torch.einsum("nui,ij,nuj->nu", rows, (M + 0.1 * torch.eye(len(M))).inverse(), rows)
    _, blocks = predicted_outputs(laplace(model, SUM, [(X, y)], 0.1, 1.0, dense), model, X)
    ratio = blocks.diagonal(dim1=1, dim2=2) / full
    assert ratio.max() <= 2
    assert ratio.max() > 1 or ratio.min() < 1  # they are not the same


# ---- priors -------------------------------------------------------------------------------------


def test_mackays_step_is_the_zero_of_the_gradient_at_fixed_effective_parameters():
    model, X, y = classifier()
    p = laplace(model, SUM, [(X, y)], {"0": torch.full((6,), 0.5), "2": 2.0})
    gamma, new = effective_parameters(p), mackay(p)
    assert isinstance(new.prior["2"], float)
    for name, W in p.weights.items():
        squares = W.square().sum(0)
        squares = squares if name == "0" else squares.sum()
        check_equal((torch.as_tensor(new.prior[name]) * squares).flatten(), gamma[name])
    shared = mackay_shared(p)
    assert len(set(shared.prior.values())) == 1
    total = sum(float(g.sum()) for g in gamma.values())
    squares = sum(float(W.square().sum()) for W in p.weights.values())
    assert math.isclose(shared.prior["0"] * squares, total, rel_tol=1e-12)


def test_an_input_that_is_always_zero_is_switched_off():
    """Its weights are zero at the minimum, and the data determine none of them."""
    model, X, y = classifier()
    X[:, 1] = 0
    with torch.no_grad():
        model[0].weight[:, 1] = 0
    p = mackay(laplace(model, SUM, [(X, y)], {"0": torch.ones(6), "2": 1.0}))
    assert p.prior["0"][1] == BOUNDS[1]
    assert (p.prior["0"][[0, 2, 3, 4, 5]] < BOUNDS[1]).all()
    assert log_evidence(p).isfinite()
    assert effective_parameters(p)["0"][1].abs() < 1e-12


# ---- predictions --------------------------------------------------------------------------------


def test_without_uncertainty_probabilities_are_the_softmax(device):
    f, zero = torch.randn(5, 3, device=device), torch.zeros(5, 3, 3, device=device)
    check_equal(probit(f, zero), f.softmax(1))
    check_equal(sampled_probabilities(f, zero, 2), f.softmax(1))


def test_sampled_probabilities_are_the_integral_of_the_softmax():
    """Of two classes, the difference of the logits is normal: the mean of its sigmoid."""
    torch.manual_seed(0)
    root = torch.randn(4, 2, 2)
    f, covariance = torch.randn(4, 2), root @ root.mT
    mean = f[:, 0] - f[:, 1]
    e = torch.tensor([1.0, -1.0])
    sd = (e @ covariance @ e).sqrt()
    points, weights = (torch.as_tensor(t) for t in np.polynomial.hermite_e.hermegauss(80))
    values = (mean.unsqueeze(1) + sd.unsqueeze(1) * points).sigmoid()
    exact = (values * weights).sum(1) / weights.sum()
    found = sampled_probabilities(f, covariance, 40_000)[:, 0]
    spread = ((values - exact.unsqueeze(1)).square() * weights).sum(1) / weights.sum()
    assert ((found - exact).abs() <= 5 * (spread / 40_000).sqrt()).all()


def test_probit_is_less_confident_the_larger_the_variance():
    f = torch.tensor([[2.0, 0.0, -1.0]])
    confidences = [float(probit(f, v * torch.eye(3)[None]).max()) for v in (0.0, 1.0, 10.0, 1e9)]
    assert confidences == sorted(confidences, reverse=True)
    assert math.isclose(confidences[-1], 1 / 3, rel_tol=1e-3)


# ---- refusals -----------------------------------------------------------------------------------


def made(prior=1.0, beta=1.0, loss=SUM, approximation=None, data=None, **options):
    model, X, y = classifier()
    return laplace(model, loss, data or [(X, y)], prior, beta, approximation, **options)


BAD = {
    "a mean loss": (
        lambda: made(loss=CrossEntropyLoss()),
        ValueError,
        "reduction='mean'.*sum over all data",
    ),
    "no reduction": (lambda: made(loss=Tanh()), ValueError, "reduction=None"),
    "no module": (lambda: made(loss=torch.sum), TypeError, "loss"),
    "a prior of 0": (lambda: made(0.0), ValueError, "prior of block '0' is 0.0"),
    "a negative prior": (lambda: made(-1.0), ValueError, "prior of block '0' is -1.0"),
    "a prior of NaN": (lambda: made(math.nan), ValueError, "prior of block '0' is nan"),
    "an infinite prior": (lambda: made(math.inf), ValueError, "prior of block '0' is inf"),
    "a prior of another block": (lambda: made({"0": 1.0, "1": 1.0}), ValueError, r"\['1', '2'\]"),
    "a missing prior": (lambda: made({"0": 1.0}), ValueError, r"\['2'\] are not in both"),
    "columns of another layer": (
        lambda: made({"0": torch.ones(5), "2": 1.0}),
        ValueError,
        r"'0' has the shape \(5,\).*6 columns",
    ),
    "a column of 0": (
        lambda: made({"0": torch.zeros(6), "2": 1.0}),
        ValueError,
        "'0' must be positive",
    ),
    "columns without a Kronecker": (
        lambda: log_evidence(made({"0": torch.ones(6), "2": 1.0}, approximation=ekfac)),
        TypeError,
        "'0' is a KroneckerEigen.*needs a Kronecker",
    ),
    "columns afterwards": (
        lambda: log_evidence(replace(made(), prior={"0": torch.ones(6), "2": 1.0})),
        TypeError,
        "passed to laplace",
    ),
    "beta of 0": (lambda: made(beta=0.0), ValueError, "beta is 0.0"),
    "no eigenvalues": (
        lambda: made(approximation=deflation),
        TypeError,
        "'0' is a KroneckerSum, which has no eigenvalues",
    ),
    "no batch": (lambda: made(data=iter(())), ValueError, "yielded no batch"),
    "a generator": (
        lambda: made(data=(pair for pair in [classifier()[1:]])),
        ValueError,
        "gone through only once",
    ),
    "a layer that is not there": (lambda: made(layers=["1"]), NotImplementedError, "1"),
    "noise of a classifier": (lambda: mackay_noise(made()), ValueError, "Only a squared error"),
    "another model": (
        lambda: predicted_outputs(made(), Sequential(Linear(5, 3)), torch.randn(2, 5)),
        ValueError,
        "2",
    ),
    "positions": (
        lambda: predicted_outputs(made(layers=["2"]), classifier()[0], torch.randn(2, 4, 5)),
        ValueError,
        r"shape \(2, 4, 3\).*one vector for each sample",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_with_the_way_out(name):
    call, kind, words = BAD[name]
    with pytest.raises(kind, match=words):
        call()


def test_noise_is_refused_where_the_data_determine_everything():
    model, X, y, *_ = fitted(1e-9, 1.0, C=1, N=5, d=4)
    p = laplace(model, SQUARES, [(X, y)], 1e-300, 1.0)
    with pytest.raises(ValueError, match="nothing is left to be noise"):
        mackay_noise(p)
