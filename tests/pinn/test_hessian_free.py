"""Hessian-free optimization: conjugate gradients on the exact model, stopped early."""

from dataclasses import replace
from math import inf, nan

import pytest
import torch

from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.pinn.gramian import (
    block_weights,
    flat,
    gramian,
    inner_product,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.hessian_free import HessianFree, earlier_if_better, truncated_solutions
from kfac_scratch.pinn.krylov import krylov_direction
from kfac_scratch.pinn.problems import mlp, poisson
from kfac_scratch.pinn.solvers import dense_solver
from kfac_scratch.pinn.terms import Term, linearize, pinn_loss
from kfac_scratch.taylor.expansions import value_only
from tests.laws import check_differs, check_equal

DAMPING = 0.3


def setting(device, hidden=3):
    torch.manual_seed(0)
    model = mlp(2, hidden, 1).to(device)
    return model, poisson(2).terms(20, 10, torch.Generator(device).manual_seed(0))


def as_vector(direction):
    return torch.cat([V.flatten() for V in direction.values()])


def zero(model):
    return {name: torch.zeros_like(V) for name, V in block_weights(model).items()}


def gap(parts, x, damping):
    """The model's value at `x`, above its minimum."""

    def model(p):
        left = times(parts, p) + residuals(parts)
        return float(left.square().sum() + damping * inner_product(p, p)) / 2

    return model(x) - model(dense_solver(parts, residuals(parts))(damping).step)


def test_the_products_are_those_of_the_dense_gramian(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    v = {name: torch.randn_like(V) for name, V in block_weights(model).items()}
    product = as_vector(transposed_times(parts, times(parts, v)))
    check_equal(product, gramian(parts) @ as_vector(v))
    check_differs(product, gramian(parts[:1]) @ as_vector(v))


@pytest.mark.parametrize("somewhere", [0.0, 1.0])
def test_enough_iterations_give_the_dense_step_from_any_start_and_few_do_not(somewhere, device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    start = {n: somewhere * torch.randn_like(V) for n, V in block_weights(model).items()}
    expected = as_vector(dense_solver(parts, residuals(parts))(DAMPING).step)
    found = truncated_solutions(parts, DAMPING, start, 4 * len(expected), 0.0)
    assert (as_vector(found[-1]) - expected).norm() <= 1e-9 * expected.norm()
    few = truncated_solutions(parts, DAMPING, start, 2, 0.0)
    check_differs(as_vector(few[-1]), expected)


def test_iterates_from_zero_are_those_of_the_krylov_space_without_a_preconditioner(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    one = {
        n: Kronecker(*(torch.eye(d).to(V) for d in (V.shape[1], len(V))))
        for n, V in block_weights(model).items()
    }
    found = truncated_solutions(parts, DAMPING, zero(model), 4, 0.0)
    assert len(found) == 4  # 1, 1.3, 1.69 and 2.197: all of the first
    for k, x in enumerate(found, start=1):
        check_equal(as_vector(x), as_vector(krylov_direction(parts, one, DAMPING, k)))
    assert len(truncated_solutions(parts, DAMPING, zero(model), 40, 0.0)) < 20


def test_the_iteration_stops_when_the_model_hardly_falls(device):
    """Kept iterates tell how far it went; what is left of the model is small, but not nothing."""
    model, terms = setting(device, 8)
    parts, damping = flat(linearize(model, terms)), 1e-6
    to_the_end, stopped, early = (
        truncated_solutions(parts, damping, zero(model), 400, progress)
        for progress in (0.0, 5e-4, 1e-1)
    )
    assert len(to_the_end) > len(stopped) > len(early)
    gaps = [gap(parts, x[-1], damping) for x in (to_the_end, stopped, early)]
    assert gaps[0] < gaps[1] < gaps[2]
    values = [gap(parts, x, damping) for x in stopped]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("damping", [1e-6, DAMPING, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_more_iterations_than_needed_change_nothing(dtype, damping, device):
    """Whether they run (a rule that never stops) or not, and however small the residuals are."""
    model, terms = setting(device)
    terms = [replace(term, X=term.X.to(dtype)) for term in terms]
    parts = flat(linearize(model.to(dtype), terms))
    condition = 1 + float(torch.linalg.eigvalsh(gramian(parts))[-1]) / damping
    size = sum(V.numel() for V in zero(model).values())
    found = as_vector(truncated_solutions(parts, damping, zero(model), 10 * size, -1.0)[-1])
    more = as_vector(truncated_solutions(parts, damping, zero(model), 100 * size, -1.0)[-1])
    small = [replace(part, residuals=1e-25 * part.residuals) for part in parts]
    tiny = as_vector(truncated_solutions(small, damping, zero(model), 10 * size, -1.0)[-1])
    for other in (more, 1e25 * tiny):
        error = float((other - found).norm() / found.norm())
        assert error <= (2 * condition + 20) * torch.finfo(dtype).eps


def test_a_start_at_the_solution_is_the_solution(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    solution = dense_solver(parts, residuals(parts))(DAMPING).step
    (found,) = truncated_solutions(parts, DAMPING, solution, 1, 0.0)
    check_equal(as_vector(found), as_vector(solution))
    (other,) = truncated_solutions(parts, DAMPING, zero(model), 1, 0.0)
    check_differs(as_vector(other), as_vector(solution))


@pytest.mark.parametrize(
    ("losses", "chosen"),
    [
        ([5.0, 4.0, 3.0], 2),
        ([5.0, 2.0, 3.0], 1),
        ([1.0, 4.0, 3.0], 2),  # the search stops at the first rise
        ([1.0, 2.0, nan], 0),
        ([1.0, nan, inf], 0),
    ],
)
def test_an_earlier_iterate_is_taken_while_the_loss_falls(losses, chosen):
    iterates = [{"0": torch.tensor(float(i))} for i in range(len(losses))]
    found, loss = earlier_if_better(iterates, lambda d: losses[int(d["0"])])
    assert int(found["0"]) == chosen
    assert loss == losses[chosen]


def test_a_step_with_enough_iterations_is_the_damped_gauss_newton_step(device):
    """On a linear problem, whose loss falls as the model says."""
    torch.manual_seed(0)
    X = torch.randn(30, 5, device=device)
    model = torch.nn.Sequential(torch.nn.Linear(5, 1)).to(device)
    terms = [Term(lambda u, x: u.value - x[:, :1].sin(), X, value_only(5))]
    parts, W = flat(linearize(model, terms)), block_weights(model)
    expected = W["0"] + dense_solver(parts, residuals(parts))(1e-2).step["0"]
    state = HessianFree(50, 1e-2, progress=0.0).step(model, terms)
    check_equal(block_weights(model)["0"], expected)
    assert state.damping == pytest.approx(1e-2 * 2 / 3)
    check_equal(torch.tensor(state.loss), pinn_loss(model, terms).detach().cpu())


def test_the_damping_rises_where_the_model_fails_and_the_loss_never_does(device):
    model, terms = setting(device)
    hard = [Term(lambda u, x: (40 * u.value).sin() - 1, terms[0].X, value_only(2))]
    state, dampings, losses = None, [], [float(pinn_loss(model, hard).detach())]
    for _ in range(6):
        state = HessianFree(20, 1e-6).step(model, hard, state)
        dampings.append(state.damping)
        losses.append(state.loss)
    assert max(dampings) > 1e-6
    assert losses == sorted(losses, reverse=True)


def test_it_needs_an_iteration():
    with pytest.raises(ValueError, match="at least 1 iteration, got 0"):
        HessianFree(0)
