import pytest
import torch

from kfac_scratch.pinn.problems import (
    burgers,
    heat,
    helmholtz,
    kovasznay,
    log_fokker_planck,
    mlp,
    poisson,
    poisson_cosines,
)
from kfac_scratch.pinn.terms import Field, linearize
from kfac_scratch.taylor.expansions import laplacian
from tests.laws import check_equal

PROBLEMS = {
    "poisson-2": poisson(2),
    "poisson-10": poisson(10),
    "cosines-5": poisson_cosines(5),
    "helmholtz-2": helmholtz(2),
    "heat-1": heat(1),
    "heat-4": heat(4),
    "log-fokker-planck-9": log_fokker_planck(9),
    "burgers": burgers(),
    "kovasznay": kovasznay(),
}
each = pytest.mark.parametrize("name", PROBLEMS)


def field(problem, X):
    """The solution and its derivatives, by nested reverse mode."""
    d = X.shape[1]
    space = range(d) if problem.space is None else problem.space
    x = X.clone().requires_grad_()
    u = problem.solution(x)
    d1, lap = [], []
    for k in range(u.shape[1]):
        (g,) = torch.autograd.grad(u[:, k].sum(), x, create_graph=True)
        d1.append(g)
        second = [torch.autograd.grad(g[:, i].sum(), x, retain_graph=True)[0][:, i] for i in space]
        lap.append(torch.stack(second).sum(0))
    first = [torch.stack([g[:, i] for g in d1], 1) for i in range(d)]
    return Field([u, *first, torch.stack(lap, 1)], laplacian(d, list(space)))


@each
def test_solutions_solve(name, device):
    problem = PROBLEMS[name]
    X = problem.points(50, torch.Generator(device).manual_seed(0))
    u = field(problem, X)
    size = max(part.abs().max() for part in u.parts)
    assert problem.equation(u, X).abs().max() <= 1e-11 * size
    assert u.value.shape == (50, problem.outputs)
    assert u.lap.abs().max() > 0.01  # the equation is about something


@each
def test_wrong_functions_do_not(name, device):
    problem = PROBLEMS[name]
    X = problem.points(50, torch.Generator(device).manual_seed(0))
    u = field(problem, X)
    wrong = Field([part * (1 + 0.1 * s) for s, part in enumerate(u.parts)], u.expansion)
    assert problem.equation(wrong, X).abs().max() > 1e-3


@each
def test_points_are_where_they_belong(name, device):
    problem = PROBLEMS[name]
    inside, outside = problem.terms(200, 300, torch.Generator(device).manual_seed(0))
    low, high = torch.tensor(problem.box, dtype=torch.float64, device=device).T
    for term in (inside, outside):
        assert ((low <= term.X) & (high >= term.X)).all()
    assert ((low < inside.X) & (high > inside.X)).all()
    used = set()
    for x in outside.X:
        faces = {(i, e) for i, e in problem.faces if x[i] == problem.box[i][e]}
        assert faces
        used |= faces
    assert used == set(problem.faces)
    check_equal(
        outside.residual(Field([problem.solution(outside.X) + 1], outside.expansion), outside.X),
        torch.ones(300, problem.outputs, device=device),
    )


def test_half_of_heats_points_are_at_the_start(device):
    _, outside = heat(4).terms(2, 2000, torch.Generator(device).manual_seed(0))
    assert abs((outside.X[:, 0] == 0).double().mean() - 0.5) < 0.05


@each
def test_terms_run_on_a_network(name, device):
    problem = PROBLEMS[name]
    model = mlp(len(problem.box), 4, problem.outputs).to(device)
    terms = problem.terms(5, 3, torch.Generator(device).manual_seed(0))
    inside, outside = linearize(model, terms)
    assert inside[0].residuals.shape == (3 if name == "kovasznay" else 1, 5)
    assert outside[0].residuals.shape == (problem.outputs, 3)


def test_error_is_the_root_mean_square(device):
    problem = poisson_cosines(5)
    model, X = mlp(5, 3, 1).to(device), problem.points(4000, torch.Generator(device).manual_seed(0))
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    assert abs(problem.error(model, X) - 2.5**0.5) < 0.05


def test_points_follow_the_generator_and_the_default_dtype(device):
    a, b = (poisson(2).points(5, torch.Generator(device).manual_seed(s)) for s in (1, 1))
    check_equal(a, b)
    torch.set_default_dtype(torch.float32)
    assert poisson(2).points(5, torch.Generator(device)).dtype == torch.float32
