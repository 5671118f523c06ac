import inspect
import io
from dataclasses import replace
from math import inf, nan

import pytest
import torch

from kfac_scratch import ekfac, kfac
from kfac_scratch.approximations.estimators import Latest
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.pinn.gramian import (
    assign,
    block_weights,
    flat,
    gramian,
    inner_product,
    kernel_matrix,
    layer_jacobian,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.hessian_free import HessianFree
from kfac_scratch.pinn.krylov import KFACKrylov
from kfac_scratch.pinn.preconditioners import Joined, TermWise, damped_factors, ekfac_inverse
from kfac_scratch.pinn.problems import kovasznay, mlp, poisson
from kfac_scratch.pinn.solvers import (
    Solved,
    backtracked,
    best_combination,
    dense_solver,
    kernel_solver,
    layerwise_solver,
    line_search,
    linear_combination,
    two_directions,
    two_directions_per_layer,
)
from kfac_scratch.pinn.steps import (
    GaussNewton,
    KFACStar,
    PinnKFAC,
    PinnOptimizer,
    PinnState,
    Spring,
)
from kfac_scratch.pinn.steps import _preconditioned as preconditioned
from kfac_scratch.pinn.terms import Term, linearize, pinn_loss
from kfac_scratch.taylor.expansions import laplacian, value_only
from tests.laws import check_equal

OPTIMIZERS = {
    "kfac": PinnKFAC(),
    "kfac-star": KFACStar(),
    "kfac-star-per-layer": KFACStar(candidates=two_directions_per_layer),
    "ekfac-star": KFACStar(preconditioner=TermWise(inverse=ekfac_inverse)),
    "kfac-star-joined": KFACStar(preconditioner=Joined(kfac)),
    "ekfac-star-joined": KFACStar(preconditioner=Joined(Latest(ekfac))),
    "kfac-krylov": KFACKrylov(4, 2),
    "hessian-free": HessianFree(20),
    "gauss-newton": GaussNewton(),
    "gauss-newton-kernel": GaussNewton(solver=kernel_solver),
    "gauss-newton-layerwise": GaussNewton(solver=layerwise_solver),
    "engd": Spring(solver=dense_solver),
    "spring": Spring(momentum=0.8),
}


def setting(device, problem=None, seed=0, N=20):
    problem = poisson(2) if problem is None else problem
    torch.manual_seed(seed)
    model = mlp(len(problem.box), 8, problem.outputs).to(device)
    return model, problem.terms(N, 10, torch.Generator(device).manual_seed(seed))


def with_chunk(optimizer, chunk):
    return type(optimizer)(**{**optimizer.__dict__, "chunk": chunk})


def as_vector(direction):
    return torch.cat([V.flatten() for V in direction.values()])


# ---- systems -------------------------------------------------------------------------------------


def test_gramian_and_kernel_are_products_of_the_jacobian(device):
    """Both are summed up to the diagonal in blocks of rows: here there are several."""
    model, terms = setting(device, N=150)
    parts = flat(linearize(model, terms, chunk=70))
    J = torch.cat([layer_jacobian(parts, name) for name in block_weights(model)], 1)
    assert len(kernel_matrix(parts)) == 160
    check_equal(gramian(parts), J.T @ J)
    check_equal(kernel_matrix(parts), J @ J.T)
    wide = mlp(2, 40, 1).to(device)
    few = flat(linearize(wide, setting(device, N=10)[1]))
    J = torch.cat([layer_jacobian(few, name) for name in block_weights(wide)], 1)
    check_equal(gramian(few), J.T @ J)  # 161 weights


@pytest.mark.everywhere
@pytest.mark.parametrize("solver", [dense_solver, kernel_solver])
def test_solvers_solve_the_damped_system(solver, device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    J, rho = (
        torch.cat([layer_jacobian(parts, name) for name in block_weights(model)], 1),
        residuals(parts),
    )
    for damping in (1e-2, 1.0):
        M = J.T @ J + damping * torch.eye(J.shape[1], device=device)
        found, used = solver(parts, rho)(damping)
        check_equal(as_vector(found), -torch.linalg.solve(M, J.T @ rho))
        assert used == damping


def test_layerwise_solves_each_block(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    found = layerwise_solver(parts, residuals(parts))(0.1).step
    for name, V in found.items():
        J = layer_jacobian(parts, name)
        M = J.T @ J + 0.1 * torch.eye(J.shape[1], device=device)
        check_equal(V.flatten(), -torch.linalg.solve(M, J.T @ residuals(parts)))
    one = torch.nn.Sequential(torch.nn.Linear(2, 1)).to(device)
    parts = flat(linearize(one, terms[1:]))
    rho = residuals(parts)
    one_block, whole = (solver(parts, rho)(0.1) for solver in (layerwise_solver, dense_solver))
    check_equal(one_block.step["0"], whole.step["0"])


def test_a_singular_system_gets_the_damping_it_needs(device):
    one = torch.nn.Sequential(torch.nn.Linear(2, 1)).to(device)
    X = torch.zeros(3, 2, device=device)
    parts = flat(linearize(one, [Term(lambda u, x: u.value - 1, X, value_only(2))]))
    eps, rho = torch.finfo(X.dtype).eps, residuals(parts)
    for solver in (dense_solver, layerwise_solver):
        solved = solver(parts, rho)(0.0)
        step = solved.step["0"]
        assert step.isfinite().all()
        check_equal(step[:, 2], 1 - one[0].bias)
        assert solved.damping == pytest.approx(eps / 3, rel=1e-6)  # J^T J is diag(0, 0, 1)
    assert kernel_solver(parts, rho)(0.0).damping >= eps / 3


@pytest.mark.parametrize("optimizer", [GaussNewton(0.0, minimum=0.0, tries=1), Spring(0.0)])
def test_a_state_tells_the_damping_that_its_system_needed(optimizer, device):
    one = torch.nn.Sequential(torch.nn.Linear(2, 1)).to(device)
    X = torch.zeros(3, 2, device=device)
    state = optimizer.step(one, [Term(lambda u, x: u.value - 1, X, value_only(2))])
    assert state.damping == 0.0
    assert state.solved_with > 0
    enough = replace(optimizer, damping=0.5)
    state = enough.step(one, [Term(lambda u, x: u.value - 2, X, value_only(2))])
    assert state.solved_with == 0.5
    assert PinnKFAC().step(*setting(device)).solved_with is None  # there is no such system


@pytest.mark.parametrize("candidates", [two_directions, two_directions_per_layer])
def test_best_combination_minimises_the_model(candidates, device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    J, rho = (
        torch.cat([layer_jacobian(parts, name) for name in block_weights(model)], 1),
        residuals(parts),
    )
    a, b = ({n: torch.randn_like(W) for n, W in block_weights(model).items()} for _ in range(2))
    directions = candidates(a, b)
    assert len(directions) == (2 if candidates is two_directions else 4)
    zero = {n: torch.zeros_like(W) for n, W in a.items()}
    P = torch.stack([as_vector({**zero, **d}) for d in directions], 1)
    M = P.T @ (J.T @ J + 0.1 * torch.eye(len(P), device=device)) @ P
    c = best_combination(parts, directions, 0.1)
    check_equal(c, -torch.linalg.solve(M, P.T @ J.T @ rho))
    check_equal(as_vector(linear_combination(directions, c)), P @ c)


def test_directions_that_depend_on_each_other(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    a = {n: torch.randn_like(W) for n, W in block_weights(model).items()}
    twice, zero = {n: -2 * V for n, V in a.items()}, {n: 0 * V for n, V in a.items()}
    expected = linear_combination([a], best_combination(parts, [a], 0.1))
    for directions in ([a, twice], [a, zero], [zero, a], [a, a, twice]):
        found = linear_combination(directions, best_combination(parts, directions, 0.1))
        check_equal(as_vector(found), as_vector(expected))
    assert (
        as_vector(linear_combination([zero], best_combination(parts, [zero], 0.1))).abs().max() == 0
    )


@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_directions_that_depend_on_each_other_up_to_the_rounding_of_float32(damping, device):
    torch.set_default_dtype(torch.float32)
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    a, b = ({n: torch.randn_like(W) for n, W in block_weights(model).items()} for _ in range(2))
    both = {n: V + b[n] / 3 for n, V in a.items()}
    expected = linear_combination([a, b], best_combination(parts, [a, b], damping))
    found = linear_combination([a, b, both], best_combination(parts, [a, b, both], damping))
    check_equal(as_vector(found), as_vector(expected))


# ---- how far -------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [2.0**-8, 1.0, 8.0])
@pytest.mark.parametrize("best", [2.0**-10, 0.25, 4.0])
def test_line_search_finds_the_best_power_of_two(start, best):
    calls = []

    def at(step):
        calls.append(step)
        return (step - best) ** 2 + 1

    assert line_search(at, 1 + best**2, start) == (best, 1.0)
    assert len(calls) <= 24


@pytest.mark.parametrize("bad", [nan, inf])
def test_line_search_survives_what_is_not_a_number(bad):
    def at(step):
        return bad if step > 0.01 else (step - 0.004) ** 2

    step, found = line_search(at, 1e-3)
    assert step == 2.0**-8
    assert found == at(step)
    assert line_search(lambda step: bad, 1.0) == (0.0, 1.0)
    assert line_search(lambda step: 2.0, 1.0) == (0.0, 1.0)
    assert backtracked(at, 1e-3) == (2.0**-7, at(2.0**-7))
    assert backtracked(lambda step: bad, 1.0) == (0.0, 1.0)


# ---- steps ---------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_loss_never_rises_and_falls(name, device):
    model, terms = setting(
        device, kovasznay() if "layer" in name or name == "spring" else poisson(2)
    )
    before, state = pinn_loss(model, terms).item(), None
    first = before
    for count in range(1, 4):
        state = OPTIMIZERS[name].step(model, terms, state)
        assert state.count == count
        assert state.loss <= before
        check_equal(pinn_loss(model, terms).detach(), torch.tensor(state.loss, device=device))
        before = state.loss
    assert state.loss < first


@pytest.mark.long
@pytest.mark.parametrize(
    "name", ["kfac", "ekfac-star", "kfac-star-joined", "gauss-newton", "spring"]
)
def test_chunks_change_no_step(name, device):
    ends = []
    for chunk in (None, 15):
        model, terms = setting(device)
        state = None
        for _ in range(2):
            state = with_chunk(OPTIMIZERS[name], chunk).step(model, terms, state)
        ends.append(as_vector(block_weights(model)))
    assert (ends[0] - ends[1]).abs().max() <= 1e-5 * ends[0].abs().max()


@pytest.mark.long
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_resumes_bit_by_bit(name, device):
    optimizer, (model, terms) = OPTIMIZERS[name], setting(device)
    state = optimizer.step(model, terms)
    file = io.BytesIO()
    torch.save({"state": state, "model": model.state_dict()}, file)
    for _ in range(2):
        state = optimizer.step(model, terms, state)
    file.seek(0)
    with torch.serialization.safe_globals([PinnState, Kronecker, KroneckerEigen]):
        saved = torch.load(file, weights_only=True)
    other, _ = setting(device, seed=1)
    other.load_state_dict(saved["model"])
    resumed = saved["state"]
    for _ in range(2):
        resumed = optimizer.step(other, terms, resumed)
    assert torch.equal(as_vector(block_weights(model)), as_vector(block_weights(other)))
    assert state.loss == resumed.loss


@pytest.mark.parametrize("name", ["kfac", "kfac-star", "gauss-newton", "spring"])
def test_states_are_values(name, device):
    optimizer, (model, terms) = OPTIMIZERS[name], setting(device)
    state = optimizer.step(model, terms)
    W, kept = block_weights(model), as_vector(state.previous).clone()
    optimizer.step(model, terms, state)
    once = as_vector(block_weights(model))
    assign(model, W)
    optimizer.step(model, terms, state)  # the same again
    assert torch.equal(once, as_vector(block_weights(model)))
    assert torch.equal(kept, as_vector(state.previous))


@pytest.mark.everywhere
def test_exact_preconditioner_solves_a_linear_problem_in_one_step(device):
    """O8: one linear layer, an orthogonal design and boundary points on which KFAC is exact."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 1)).to(device)
    rows = torch.cartesian_prod(*[torch.tensor([1.0, -1.0], device=device)] * 4)  # [16, 4]
    X, signs = torch.randn(3, 2, device=device).repeat_interleave(16, 0), rows.repeat(3, 1)
    target = torch.randn(48, 1, device=device)

    def interior(u, x):
        parts = [u.value, *u.d, u.lap]
        return sum(signs[:, s : s + 1] * part for s, part in enumerate(parts)) - target

    terms = [
        Term(interior, X, laplacian(2)),
        Term(lambda u, x: u.value - x[:, :1] ** 2, torch.randn(5, 2, device=device), value_only(2)),
    ]
    optimizer = KFACStar(damping=0.0, preconditioner=TermWise(decay=0.0))
    lin = linearize(model, terms)
    _, inverses = optimizer.preconditioner.update(None, lin, 0.0, 1)
    gradient = transposed_times(flat(lin), residuals(flat(lin)))
    newest = {n: -(M @ gradient[n]) for n, M in inverses.items()}
    c = best_combination(flat(lin), [newest, {"0": torch.randn(1, 3, device=device)}], 0.0)
    check_equal(c + 1, torch.tensor([2.0, 1.0], device=device))  # coefficients 1 and 0
    for method in (optimizer, PinnKFAC(damping=0.0, preconditioner=TermWise(decay=0.0))):
        model.load_state_dict({"0.weight": torch.ones(1, 2), "0.bias": torch.ones(1)})
        before = as_vector(gradient).norm()
        method.step(model, terms)
        parts = flat(linearize(model, terms))
        after = as_vector(transposed_times(parts, residuals(parts))).norm()
        assert after <= 1e-12 * before


class Fixed:
    """A preconditioner that stays."""

    def __init__(self, M):
        self.M = M

    def update(self, state, terms, damping, count):
        return None, {"0": self.M}


def test_star_is_conjugate_gradients_on_a_quadratic(device):
    """O10: fixed preconditioner, linear residuals, and an exact first step."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 1)).to(device)
    X = torch.randn(20, 6, device=device)
    terms = [Term(lambda u, x: u.value - x[:, :1].sin(), X, value_only(6))]
    R = torch.randn(7, 7, device=device)
    K = damped_factors(Kronecker(R @ R.T, torch.ones(1, 1, device=device)), 1.0, 0.5)
    P = K.inverse(0.0)
    W = block_weights(model)["0"]
    G = gramian(flat(linearize(model, terms)))
    gradient = transposed_times(
        flat(linearize(model, terms)), residuals(flat(linearize(model, terms)))
    )["0"]
    x, r = torch.zeros_like(W), -gradient
    z = P @ r
    p, state = z, None
    for _ in range(5):  # preconditioned conjugate gradients, by the book
        Gp = (G @ p.flatten()).view_as(p)
        alpha = (r * z).sum() / (p * Gp).sum()
        x, r_new = x + alpha * p, r - alpha * Gp
        z_new = P @ r_new
        p, r, z = z_new + (r_new * z_new).sum() / (r * z).sum() * p, r_new, z_new
        state = KFACStar(damping=0.0, preconditioner=Fixed(P)).step(model, terms, state)
        found = block_weights(model)["0"] - W
        assert (found - x).abs().max() <= 1e-8 * x.abs().max()


@pytest.mark.everywhere
def test_per_layer_is_never_worse_in_the_model(device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms))
    a, b = ({n: torch.randn_like(W) for n, W in block_weights(model).items()} for _ in range(2))

    def left(candidates):
        directions = candidates(a, b)
        p = linear_combination(directions, best_combination(parts, directions, 0.0))
        return (residuals(parts) + times(parts, p)).norm()

    assert left(two_directions_per_layer) < left(two_directions)


def test_spring_minimises_its_objective(device):
    model, terms = setting(device)
    optimizer = Spring(damping=0.1, momentum=0.7)
    state = optimizer.step(model, terms)
    parts = flat(linearize(model, terms))
    J, rho = (
        torch.cat([layer_jacobian(parts, name) for name in block_weights(model)], 1),
        residuals(parts),
    )
    kept = 0.7 * as_vector(state.previous)
    M = J.T @ J + 0.1 * torch.eye(J.shape[1], device=device)
    expected = torch.linalg.solve(M, 0.1 * kept - J.T @ rho)
    check_equal(as_vector(optimizer.step(model, terms, state).previous), expected)
    check_equal(
        as_vector(Spring(0.1, 0.0).step(*setting(device)).previous),
        as_vector(Spring(0.1, 0.0, dense_solver).step(*setting(device)).previous),
    )


def test_momentum_accumulates_directions(device):
    model, terms = setting(device)
    W = block_weights(model)
    first = PinnKFAC(momentum=0.5).step(model, terms)
    moved_by = {n: V - W[n] for n, V in block_weights(model).items()}
    check_equal(as_vector(moved_by), first.length * as_vector(first.previous))
    second = PinnKFAC(momentum=0.5).step(model, terms, first)
    model2, _ = setting(device)
    without = PinnKFAC(momentum=0.0)
    one = without.step(model2, terms)
    two = without.step(model2, terms, one)
    expected = as_vector(two.previous) + 0.5 * as_vector(first.previous)
    check_equal(as_vector(second.previous), expected)


def test_what_is_remembered_is_the_step_that_was_taken():
    """Also where the model's step was too long and has been shortened."""
    model, terms = setting("cpu")
    terms = [Term(lambda u, x: u.value**5 - 1, terms[0].X[:3], value_only(2))]
    lengths, state = [], None
    for _ in range(4):
        W = block_weights(model)
        state = KFACStar().step(model, terms, state)
        moved_by = {n: V - W[n] for n, V in block_weights(model).items()}
        check_equal(as_vector(state.previous), as_vector(moved_by))
        lengths.append(state.length)
    assert min(lengths) < 1


def test_gauss_newton_raises_the_damping_until_it_succeeds(device):
    model, terms = setting(device)
    terms = [Term(lambda u, x: (40 * u.value).sin() + u.lap, terms[0].X, laplacian(2))]
    state = GaussNewton(damping=1e-14, minimum=1e-14).step(model, terms)
    assert state.damping > 1e-14
    assert state.loss < pinn_loss(setting(device)[0], terms).item()


def test_at_a_minimum_nothing_moves(device):
    model = torch.nn.Sequential(torch.nn.Linear(2, 1)).to(device)
    terms = [Term(lambda u, x: u.value, torch.randn(9, 2, device=device), value_only(2))]
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    for optimizer in OPTIMIZERS.values():
        state = optimizer.step(model, terms, optimizer.step(model, terms))
        assert state.loss == 0
        assert as_vector(block_weights(model)).abs().max() == 0
        assert inner_product(state.previous, state.previous) == 0


def test_pinn_optimizers_in_float32(device):
    torch.set_default_dtype(torch.float32)
    model, terms = setting(device)
    state, first = None, pinn_loss(model, terms).item()
    for _ in range(5):
        state = KFACStar(damping=1e-4).step(model, terms, state)
    assert state.loss < 0.7 * first
    assert all(V.dtype == torch.float32 for V in state.previous.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_pinn_optimizer_obeys_one_protocol(name):
    assert isinstance(OPTIMIZERS[name], PinnOptimizer)
    step = inspect.signature(OPTIMIZERS[name].step)
    assert list(step.parameters) == list(inspect.signature(PinnOptimizer.step).parameters)[1:]


# ---- a step that raises changes nothing ----------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_stay_if_a_step_is_interrupted(name, monkeypatch):
    """After the line search has moved them, before the last assignment."""
    model, terms = setting("cpu")
    optimizer = OPTIMIZERS[name]
    state = optimizer.step(model, terms)
    before, calls = block_weights(model), []
    real = pinn_loss

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("kfac_scratch.pinn.steps.pinn_loss", interrupted)
    for _ in range(20):  # some steps need one loss only
        try:
            optimizer.step(model, terms, state)
        except KeyboardInterrupt:
            break
        assign(model, before)
    assert len(calls) == 2
    assert all(torch.equal(W, before[n]) for n, W in block_weights(model).items())


@pytest.mark.parametrize("entry", [nan, inf])
def test_a_direction_that_is_no_number_is_refused_and_changes_nothing(entry, monkeypatch):
    """A length of zero would not save the weights: zero times it is no number either."""
    model, terms = setting("cpu")
    before = block_weights(model)

    def broken(parts, rho):
        step = {n: torch.full_like(W, entry) for n, W in before.items()}
        return lambda damping: Solved(step, damping)

    def without_number(*args):
        newest, *others = preconditioned(*args)
        return {n: entry * V for n, V in newest.items()}, *others

    monkeypatch.setattr("kfac_scratch.pinn.steps._preconditioned", without_number)
    for optimizer in (Spring(solver=broken), PinnKFAC()):
        with pytest.raises(ValueError, match="not finite; the weights were not changed"):
            optimizer.step(model, terms)
        assert all(torch.equal(W, before[n]) for n, W in block_weights(model).items())
