"""Pruning: costs and replies are the constrained minima of a quadratic, and of a linear model."""

import math

import pytest
import torch
from torch.nn import Linear, Sequential, Tanh

from kfac_scratch import (
    Dense,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LayerIO,
    ekfac,
    factored_inverse,
    kfac,
    layer_ios,
    over_loader,
)
from kfac_scratch.applications.pruning import (
    column_costs,
    costs_with_reply,
    costs_without_reply,
    eigenbasis_costs,
    factored_damping,
    lowest,
    predicted_increase,
    reply,
    row_costs,
    within_eigenbasis,
    without_column,
    without_row,
)
from kfac_scratch.applications.trained import (
    parameters_from,
    trained_weights,
    weights_without_biases,
)
from tests.applications.structures import SQUARES, SUM
from tests.laws import check_differs, check_equal

ROWS, COLUMNS = 4, 6


def kronecker(device="cpu", seed=0):
    torch.manual_seed(seed)
    A, B = (torch.randn(30, d, device=device) for d in (COLUMNS, ROWS))
    return Kronecker(A.T @ A / 30, B.T @ B / 30)


def matrices(device):
    """One curvature of each kind, with the correlations of random data."""
    torch.manual_seed(1)
    io = LayerIO(
        torch.randn(40, 1, COLUMNS, device=device), torch.randn(1, 40, 1, ROWS, device=device)
    )
    K = kronecker(device)
    return {
        "kronecker": K,
        "ekfac": ekfac(io),
        "dense": Dense(io.block()),
        "diagonal": Diagonal(io.gradients().square().sum((0, 1))),
        "input factor": Kronecker(K.A, torch.eye(ROWS, device=device)),
    }


KINDS = list(matrices("cpu"))


def weights(device="cpu"):
    torch.manual_seed(2)
    return torch.randn(ROWS, COLUMNS, device=device)


def constrained(W, M, decay, keep):
    """The minimum over weights with zeros, and what it costs, by the definition."""
    H = M.dense() + decay * torch.eye(W.numel(), device=W.device)
    k, w = keep.flatten(), W.flatten()
    V = torch.zeros_like(w)
    V[k] = torch.linalg.solve(H[k][:, k], (H @ w)[k])
    return V.reshape(W.shape), (V - w) @ H @ (V - w) / 2


def all_but(where, device="cpu"):
    keep = torch.ones(ROWS, COLUMNS, dtype=torch.bool, device=device)
    keep[where] = False
    return keep


@pytest.mark.parametrize("decay", [0.2, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_cost_of_a_single_weight_is_that_of_the_quadratic(kind, decay, device):
    W, M = weights(device), matrices(device)[kind]
    H = M.dense() + decay * torch.eye(W.numel(), device=device)
    alone, best = costs_without_reply(W, M, decay), costs_with_reply(W, M, decay)
    for where in ((1, 2), (3, 5)):
        keep = all_but(where, device)
        change = (torch.where(keep, W, 0.0) - W).flatten()
        check_equal(alone[where], change @ H @ change / 2)
        check_equal(best[where], constrained(W, M, decay, keep)[1])
    assert (best <= alone * (1 + 1e-12)).all()
    check = check_equal if kind == "diagonal" else check_differs
    check(best, alone)


@pytest.mark.parametrize("decay", [0.2, 0.0])
@pytest.mark.parametrize("kind", KINDS)
def test_the_reply_to_many_zeros_is_the_constrained_minimum(kind, decay, device):
    W, M = weights(device), matrices(device)[kind]
    keep = torch.rand(ROWS, COLUMNS, device=device) > 0.5
    found = reply(W, M, decay, keep)
    exact, cost = constrained(W, M, decay, keep)
    check_equal(found, exact)
    check_equal(predicted_increase(found - W, M, decay), cost)
    assert (found[~keep] == 0).all()
    stays = reply(W, M, decay, torch.ones_like(keep))
    check_equal(stays, W)
    gone = reply(W, M, decay, torch.zeros_like(keep))
    assert (gone == 0).all()
    check = check_equal if kind == "diagonal" else check_differs
    check(found, torch.where(keep, W, 0.0))


def test_the_costs_of_single_weights_do_not_add_up(device):
    W, M = weights(device), kronecker(device)
    keep = torch.rand(ROWS, COLUMNS, device=device) > 0.5
    together = predicted_increase(reply(W, M, 0.0, keep) - W, M, 0.0)
    check_differs(costs_with_reply(W, M, 0.0)[~keep].sum(), together)
    without = predicted_increase(torch.where(keep, W, 0.0) - W, M, 0.0)
    check_differs(costs_without_reply(W, M, 0.0)[~keep].sum(), without)


def test_whole_rows_and_columns_are_the_constrained_minimum(device):
    W, K = weights(device), kronecker(device)
    for row in range(ROWS):
        exact, cost = constrained(W, K, 0.0, all_but(row, device))
        check_equal(row_costs(W, K)[row], cost)
        check_equal(without_row(W, K, row), exact)
        assert (without_row(W, K, row)[row] == 0).all()
    for column in range(COLUMNS):
        exact, cost = constrained(W, K, 0.0, all_but((slice(None), column), device))
        check_equal(column_costs(W, K)[column], cost)
        check_equal(without_column(W, K, column), exact)
        assert (without_column(W, K, column)[:, column] == 0).all()


def test_the_reply_to_a_row_does_not_depend_on_the_inputs(device):
    W, K = weights(device), kronecker(device)
    other = Kronecker(kronecker(device, seed=5).A, K.B)
    check_equal(without_row(W, other, 1), without_row(W, K, 1))
    check_differs(row_costs(W, other), row_costs(W, K))


@pytest.mark.parametrize("decay", [0.2, 1e-4])
def test_damped_factors_are_those_of_the_factored_inverse(decay, device):
    K, V = kronecker(device), weights(device)
    check_equal(factored_inverse(K, decay) @ (factored_damping(K, decay) @ V), V)
    check_differs(K.inverse(decay) @ (factored_damping(K, decay) @ V), V)
    check_equal(factored_damping(K, 0.0).dense(), K.dense())


@pytest.mark.parametrize("kind", ["kronecker", "ekfac"])
def test_costs_add_up_in_the_eigenbasis_and_no_reply_helps(kind, device):
    W, E = weights(device), matrices(device)[kind].eigen()
    keep = torch.rand(ROWS, COLUMNS, device=device) > 0.5
    found = within_eigenbasis(W, E, keep)
    costs = eigenbasis_costs(W, E, 0.2)
    check_equal(predicted_increase(found - W, E, 0.2), costs[~keep].sum())
    coefficients = E.QB.T @ found @ E.QA
    assert coefficients[~keep].abs().max() < 1e-12
    check_equal(within_eigenbasis(W, E, torch.ones_like(keep)), W)
    at_rest = Diagonal(E.scale)  # in the eigenbasis the matrix is diagonal
    check_equal(costs, costs_with_reply(E.QB.T @ W @ E.QA, at_rest, 0.2))


def test_with_the_input_factor_alone_every_row_is_a_least_squares_problem(device):
    """The problem of SparseGPT, whose squared Cholesky factor is the trailing blocks' inverse."""
    W, M = weights(device), matrices(device)["input factor"]
    keep = torch.rand(ROWS, COLUMNS, device=device) > 0.4
    found = reply(W, M, 0.0, keep)
    for row in range(ROWS):
        k = keep[row]
        check_equal(found[row, k], torch.linalg.solve(M.A[k][:, k], M.A[k] @ W[row]))
    upper = torch.linalg.cholesky(M.A.inverse(), upper=True)
    corners = [M.A[j:, j:].inverse()[0, 0] for j in range(COLUMNS)]
    check_equal(upper.diagonal().square(), torch.stack(corners))
    check_differs(upper.diagonal().square(), M.A.inverse().diagonal())


# ---- linear models and networks -----------------------------------------------------------------


def test_a_linear_models_loss_grows_as_predicted(device):
    torch.manual_seed(0)
    X, y = torch.randn(30, 5, device=device), torch.randn(30, 3, device=device)
    Phi, decay = torch.cat([X, torch.ones_like(X[:, :1])], 1), 0.7
    H = 2 * Phi.T @ Phi + decay * torch.eye(6, device=device)
    W = torch.linalg.solve(H, 2 * Phi.T @ y).T
    model = Sequential(Linear(5, 3)).to(device)
    model.load_state_dict(parameters_from(model, {"0": W}), strict=False)
    K = kfac(layer_ios(model, SQUARES, X, y)["0"])

    def J(V):
        return (Phi @ V.T - y).square().sum() + decay / 2 * V.square().sum()

    keep = torch.rand(3, 6, device=device) > 0.4
    found = reply(W, K, decay, keep)
    check_equal(predicted_increase(found - W, K, decay), J(found) - J(W))
    loss_alone = (Phi @ found.T - y).square().sum() - (Phi @ W.T - y).square().sum()
    first_order = -decay * (W * (found - W)).sum()
    check_equal(predicted_increase(found - W, K, 0.0) + first_order, loss_alone)
    check_differs(predicted_increase(found - W, K, 0.0), loss_alone)


def network(device="cpu"):
    torch.manual_seed(0)
    model = Sequential(Linear(5, 4), Tanh(), Linear(4, 3)).to(device)
    X = torch.randn(12, 5, device=device)
    return model, X, torch.randint(3, (12,), device=device)


def test_one_threshold_serves_all_blocks_and_biases_stay(device):
    model, X, y = network(device)
    Ms = over_loader(kfac, model, SUM, [(X, y)])
    Ws, may = trained_weights(model, Ms), weights_without_biases(model, Ms)
    costs = {name: costs_with_reply(Ws[name], Ms[name], 0.5) for name in Ms}
    keep = lowest(costs, 0.75, may)
    total = sum(int(m.sum()) for m in may.values())
    assert total == 4 * 5 + 3 * 4
    assert sum(int((~k).sum()) for k in keep.values()) == round(0.75 * total)
    dearest = max(float(costs[n][~keep[n]].max()) for n in Ms if (~keep[n]).any())
    assert dearest <= min(float(costs[n][keep[n] & may[n]].min()) for n in Ms)
    assert all(keep[name][:, -1].all() for name in Ms)
    assert all(k.all() for k in lowest(costs, 0.0, may).values())
    nothing = lowest(costs, 1.0, may)
    assert all(torch.equal(nothing[n], ~may[n]) for n in Ms)
    found = {name: reply(Ws[name], Ms[name], 0.5, keep[name]) for name in Ms}
    before = {name: p.clone() for name, p in model.named_parameters()}
    new = parameters_from(model, found)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert set(new) == set(before)
    trained_weights(model, Ms)["2"].zero_()  # a copy
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.load_state_dict(new, strict=False)
    for name, W in trained_weights(model, Ms).items():
        check_equal(W, found[name])


def test_in_single_precision_the_reply_is_near_double_precision():
    keep = torch.rand(ROWS, COLUMNS) > 0.5
    W, K = weights(), kronecker()
    single = reply(W.float(), Kronecker(K.A.float(), K.B.float()), 0.1, keep)
    double = reply(W, K, 0.1, keep)
    assert single.dtype == torch.float32
    assert 1e-12 < float((single - double).abs().max() / double.abs().max()) < 1e-4


# ---- refusals -----------------------------------------------------------------------------------

ALL = torch.ones(ROWS, COLUMNS, dtype=torch.bool)


def singular():
    return Kronecker(torch.diag(torch.tensor([1.0, 1, 1, 1, 1, 0])), torch.eye(ROWS))


def blind():
    """A linear map alone."""
    return KroneckerSum(kronecker(), kronecker()).inverse(0.0)


def costs(**changed):
    W = {"0": torch.ones(2, 2)}
    parts = {"costs": W, "share": 0.5, "prunable": {"0": W["0"] > 0}} | changed
    return lowest(**parts)


def nothing_of(**weights):
    return parameters_from(network()[0], weights)


BAD = {
    "a negative decay": (lambda: costs_without_reply(weights(), kronecker(), -1.0), "at least 0"),
    "a decay of NaN": (lambda: reply(weights(), kronecker(), math.nan, ALL), "at least 0"),
    "weights of another layer": (
        lambda: costs_with_reply(weights()[1:], kronecker(), 0.1),
        "W has 18 weights, but the matrix belongs to 24",
    ),
    "a weight that is not finite": (
        lambda: costs_without_reply(weights() / 0, kronecker(), 0.1),
        "not finite",
    ),
    "a singular matrix": (lambda: costs_with_reply(weights(), singular(), 0.0), "singular"),
    "a reply that is not determined": (
        lambda: reply(weights(), singular(), 0.0, ALL),
        "zeros on its diagonal",
    ),
    "a row without an inverse": (
        lambda: row_costs(weights().T, Kronecker(singular().B, singular().A)),
        "not positive definite",
    ),
    "a column without an inverse": (
        lambda: without_column(weights(), singular(), 0),
        "not positive definite",
    ),
    "a mask of numbers": (lambda: reply(weights(), kronecker(), 0.1, ALL.double()), "torch.bool"),
    "a mask of another shape": (lambda: reply(weights(), kronecker(), 0.1, ALL.T), "shape"),
    "a matrix without a diagonal": (
        lambda: costs_without_reply(weights(), blind(), 0.1),
        "Congruence does not know its diagonal",
    ),
    "an inverse without a diagonal": (
        lambda: costs_with_reply(weights(), KroneckerSum(kronecker(), kronecker()), 0.1),
        "inverse of a KroneckerSum does not know its diagonal",
    ),
    "a share above 1": (lambda: costs(share=90), "share is 90"),
    "a share of NaN": (lambda: costs(share=math.nan), "share is nan"),
    "other blocks": (lambda: costs(prunable={}), r"costs has the blocks \['0'\]"),
    "a mask of another block": (
        lambda: costs(prunable={"0": ALL}),
        r"block '0' have the shape \(2, 2\)",
    ),
    "a cost that is no number": (
        lambda: costs(costs={"0": torch.full((2, 2), math.nan)}),
        "cost of block '0' is not a number",
    ),
    "a negative decay of factors": (lambda: factored_damping(kronecker(), -0.1), "at least 0"),
    "a block that is not there": (lambda: nothing_of(head=weights()), r"no blocks \['head'\]"),
    "a block of another shape": (
        lambda: parameters_from(network()[0], {"0": weights().T}),
        r"'0' have the shape \(6, 4\), but the block has \(4, 6\)",
    ),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused_with_a_way_out(name):
    call, words = BAD[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()
