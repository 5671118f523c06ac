from itertools import pairwise

import pytest
import torch

from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.pinn.gramian import (
    block_weights,
    flat,
    inner_product,
    layer_jacobian,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.krylov import KFACKrylov, krylov_direction, stacked, unstacked
from kfac_scratch.pinn.preconditioners import TermWise
from kfac_scratch.pinn.problems import mlp, poisson
from kfac_scratch.pinn.solvers import best_combination, dense_solver, linear_combination
from kfac_scratch.pinn.steps import KFACStar
from kfac_scratch.pinn.terms import Term, linearize
from kfac_scratch.taylor.expansions import value_only
from tests.laws import check_differs, check_equal


def setting(device, hidden=3):
    torch.manual_seed(0)
    model = mlp(2, hidden, 1).to(device)
    terms = poisson(2).terms(20, 10, torch.Generator(device).manual_seed(0))
    return model, terms


def linear_problem(device):
    torch.manual_seed(0)
    X = torch.randn(30, 5, device=device)
    model = torch.nn.Sequential(torch.nn.Linear(5, 1)).to(device)
    return model, [Term(lambda u, x: u.value - x[:, :1].sin(), X, value_only(5))]


def as_vector(direction):
    return torch.cat([V.flatten() for V in direction.values()])


def preconditioner(W):
    """Some positive definite Kronecker products."""
    roots = {n: (torch.randn(2 * V.shape[1], V.shape[1]), torch.randn(8, len(V))) for n, V in W}
    return {n: Kronecker((A.T @ A).to(V), (B.T @ B).to(V)) for (n, V), (A, B) in _pairs(W, roots)}


def _pairs(W, roots):
    return [((n, V), roots[n]) for n, V in W]


class Fixed:
    """A metric that is the same in every step, and notes the damping."""

    def __init__(self, P):
        self.P, self.seen = P, []

    def update(self, state, terms, damping, count):
        self.seen.append(damping)
        return None, self.P


@pytest.mark.parametrize("k", [1, 2, 5])
def test_krylov_minimises_the_model_over_the_space(k, device):
    model, terms = setting(device)
    parts, W = flat(linearize(model, terms)), block_weights(model)
    P, damping = preconditioner(W.items()), 0.3
    J, rho = torch.cat([layer_jacobian(parts, name) for name in W], 1), residuals(parts)
    M = J.T @ J + damping * torch.eye(J.shape[1], device=device)
    P_dense = torch.block_diag(*(P[name].dense() for name in W))
    columns = [P_dense @ J.T @ rho]
    for _ in range(k - 1):
        columns.append(P_dense @ M @ columns[-1])
    Q = torch.linalg.qr(torch.stack([c / c.norm() for c in columns], 1)).Q
    expected = -Q @ torch.linalg.solve(Q.T @ M @ Q, Q.T @ J.T @ rho)
    found = as_vector(krylov_direction(parts, P, damping, k))
    assert (found - expected).norm() <= 1e-7 * expected.norm()  # Q's columns are nearly parallel


def test_one_iteration_is_the_best_step_along_the_preconditioned_gradient(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    P = preconditioner(block_weights(model).items())
    newest = {n: P[n] @ V for n, V in transposed_times(parts, residuals(parts)).items()}
    expected = linear_combination([newest], best_combination(parts, [newest], 0.3))
    check_equal(as_vector(krylov_direction(parts, P, 0.3, 1)), as_vector(expected))


def test_as_many_iterations_as_weights_are_gauss_newton(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    W, damping = block_weights(model), 0.3
    P = {n: Kronecker(*(torch.eye(d).to(V) for d in (V.shape[1], len(V)))) for n, V in W.items()}
    expected = as_vector(dense_solver(parts, residuals(parts))(damping).step)
    found = as_vector(krylov_direction(parts, P, damping, 2 * len(expected)))
    assert (found - expected).norm() <= 1e-9 * expected.norm()
    check_differs(as_vector(krylov_direction(parts, P, damping, 2)), expected)


@pytest.mark.parametrize("memory", [1, 3])
def test_one_direction_and_the_last_steps_are_kfac_star_on_a_linear_problem(memory, device):
    """Conjugate gradients: steps before the last one add nothing."""
    model, terms = linear_problem(device)
    fixed = Fixed(preconditioner(block_weights(model).items()))
    krylov_method = KFACKrylov(1, memory, 0.0, 0.0, preconditioner=fixed)
    star, state, state_of_star = KFACStar(damping=0.0, preconditioner=fixed), None, None
    other, _ = linear_problem(device)
    for _ in range(4):
        state = krylov_method.step(model, terms, state)
        state_of_star = star.step(other, terms, state_of_star)
        found, expected = as_vector(block_weights(model)), as_vector(block_weights(other))
        assert (found - expected).norm() <= 1e-7 * expected.norm()
    assert all(len(V) == memory for V in state.previous.values())


def test_every_direction_lowers_the_model(device):
    """What one step leaves of the model's value, with more and more directions."""
    model, terms = setting(device, 8)
    first = KFACKrylov(1, 2).step(model, terms)
    state = KFACKrylov(1, 2).step(model, terms, first)
    parts = flat(linearize(model, terms))
    _, P = TermWise().update(None, linearize(model, terms), 1e-6, 3)
    last, damping = unstacked(state.previous), 1e-6

    def left(iterations, memory):
        directions = [krylov_direction(parts, P, damping, iterations), *last[:memory]]
        p = linear_combination(directions, best_combination(parts, directions, damping))
        return float(
            (residuals(parts) + times(parts, p)).square().sum() + damping * inner_product(p, p)
        )

    assert left(1, 0) > left(1, 1) > left(1, 2)
    assert left(1, 0) > left(3, 0) > left(10, 0)


def test_what_is_remembered_are_the_last_steps(device):
    model, terms = setting(device)
    state, taken = None, []
    for _ in range(3):
        before = as_vector(block_weights(model))
        state = KFACKrylov(3, 2).step(model, terms, state)
        taken.insert(0, as_vector(block_weights(model)) - before)
        steps = unstacked(state.previous)
        assert len(steps) == min(2, len(taken))
        for found, expected in zip(steps, taken, strict=False):
            assert (as_vector(found) - expected).abs().max() <= 1e-12 * as_vector(
                block_weights(model)
            ).abs().max()
    assert KFACKrylov(3, 0).step(model, terms).previous == {}
    assert KFACKrylov(3, 0).step(model, terms, KFACKrylov(3, 0).step(model, terms)).count == 2


def test_the_damping_follows_the_models_success_and_the_metrics_has_a_floor(device):
    model, terms = linear_problem(device)
    fixed = Fixed(preconditioner(block_weights(model).items()))
    method, state, dampings = KFACKrylov(2, 1, 8e-4, 1e-4, 3e-4, fixed), None, []
    for _ in range(5):
        state = method.step(model, terms, state)
        dampings.append(state.damping)
    assert dampings == [4e-4, 2e-4, 1e-4, 1e-4, 1e-4]
    assert fixed.seen == [8e-4, 4e-4, 3e-4, 3e-4, 3e-4]
    hard, other = [Term(_wavy, terms[0].X, terms[0].expansion)], linear_problem(device)[0]
    method, state, dampings = KFACKrylov(damping=1e-6), None, [1e-6]
    for _ in range(6):
        state = method.step(other, hard, state)
        dampings.append(state.damping)
    assert any(after > before for before, after in pairwise(dampings))


def _wavy(u, x):
    return (40 * u.value).sin() - 1


def test_stacked_steps_are_unstacked():
    steps = [{"a": torch.randn(2, 3), "b": torch.randn(1, 4)} for _ in range(3)]
    assert stacked(steps)["a"].shape == (3, 2, 3)
    for found, expected in zip(unstacked(stacked(steps)), steps, strict=True):
        check_equal(as_vector(found), as_vector(expected))
    assert unstacked(stacked([])) == []


@pytest.mark.parametrize("numbers", [(0, 1), (1, -1)])
def test_krylov_needs_an_iteration(numbers):
    with pytest.raises(ValueError, match="iterations of at least 1"):
        KFACKrylov(*numbers)


def test_kfac_krylov_in_float32(device):
    torch.set_default_dtype(torch.float32)
    model, terms = setting(device, 8)
    state = None
    for _ in range(4):
        state = KFACKrylov(5, 2, 1e-3, 1e-4, 1e-4).step(model, terms, state)
    assert state.loss < 20
    assert all(V.dtype == torch.float32 for V in state.previous.values())
