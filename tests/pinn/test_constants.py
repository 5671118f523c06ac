"""Unknown constants of an equation: exact blocks beside those of layers, found by every method."""

import pytest
import torch
from torch import nn

from kfac_scratch import kfac
from kfac_scratch.pinn.gramian import (
    assign,
    block_weights,
    flat,
    gramian,
    layer_gramian,
    residuals,
    transposed_times,
)
from kfac_scratch.pinn.hessian_free import HessianFree
from kfac_scratch.pinn.krylov import KFACKrylov
from kfac_scratch.pinn.preconditioners import Joined, TermWise, ekfac_inverse
from kfac_scratch.pinn.problems import heat, mlp
from kfac_scratch.pinn.steps import GaussNewton, KFACStar, Spring
from kfac_scratch.pinn.terms import Term, linearize, pinn_loss
from kfac_scratch.taylor.expansions import laplacian, value_only
from tests.laws import check_differs, check_equal


class Inverse(nn.Module):
    """A network, a viscosity and two rates."""

    def __init__(self):
        super().__init__()
        self.net = mlp(2, 4, 1)
        self.viscosity = nn.Parameter(torch.tensor(0.4))
        self.rates = nn.Parameter(torch.tensor([0.3, -0.7]))

    def forward(self, x):
        return self.net(x)

    def burgers(self, u, x):
        """Neither linear in the constants nor the same in all points."""
        reaction = (self.rates[0] * u.value).exp() * x[:, :1] + self.rates[1] ** 2
        return u.d[0] + u.value * u.d[1] - self.viscosity * u.lap + reaction

    def terms(self, device):
        X = torch.randn(6, 2, device=device)
        return [
            Term(self.burgers, X, laplacian(2, [1]), weight=2.0),
            Term(lambda u, x: u.value - x[:, :1], X[:4], value_only(2)),
        ]


def setting(device):
    torch.manual_seed(0)
    model = Inverse().to(device)
    return model, model.terms(device)


def rows_by_autodiff(model, parts):
    """The derivatives of all scaled residuals, in the order of the blocks."""

    def nested(model, X):
        X = X.clone().requires_grad_()
        u = model(X)
        (d,) = torch.autograd.grad(u.sum(), X, create_graph=True)
        (dd,) = torch.autograd.grad(d[:, 1].sum(), X, create_graph=True)
        return u, d, dd[:, 1:]

    (X, w), (Y, v) = parts
    u, d, lap = nested(model, X)
    inner = d[:, :1] + u * d[:, 1:] - model.viscosity * lap
    inner = inner + (model.rates[0] * u).exp() * X[:, :1] + model.rates[1] ** 2
    rho = torch.cat([(w / 6) ** 0.5 * inner, (v / 4) ** 0.5 * (model(Y) - Y[:, :1])])[:, 0]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    named = dict(model.named_parameters())
    rows = []
    for r in rho:
        found = torch.autograd.grad(r, list(named.values()), **options)
        grads = dict(zip(named, found, strict=True))
        W = [
            torch.cat([grads[f"net.{i}.weight"], grads[f"net.{i}.bias"][:, None]], 1)
            for i in (0, 2)
        ]
        both = [grads["viscosity"], grads["rates"]]
        rows.append(torch.cat([M.flatten() for M in (*W, *both)]))
    return rho.detach(), torch.stack(rows)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_gramian_with_constants_is_that_of_autodiff(chunk, device):
    model, terms = setting(device)
    parts = flat(linearize(model, terms, chunk))
    rho, J = rows_by_autodiff(model, [(t.X, t.weight) for t in terms])
    assert list(parts[0].ios) == ["net.0", "net.2", "viscosity", "rates"]
    check_equal(residuals(parts), rho)
    check_equal(gramian(parts), J.T @ J)
    check_equal(layer_gramian(parts, "rates"), (J.T @ J)[-2:, -2:])
    gradient = transposed_times(parts, residuals(parts))
    pinn_loss(model, terms).backward()
    check_equal(gradient["rates"][:, 0], model.rates.grad)
    check_equal(gradient["viscosity"], model.viscosity.grad.reshape(1, 1))


def test_kfac_of_a_constant_is_its_exact_block_and_not_of_a_layer(device):
    model, terms = setting(device)
    part = flat(linearize(model, terms))[0]
    for name in ("viscosity", "rates"):
        check_equal(kfac(part.ios[name]).dense(), part.ios[name].block())
    check_differs(kfac(part.ios["net.2"]).dense(), part.ios["net.2"].block())


def test_constants_are_written_back_in_their_shape(device):
    model, _ = setting(device)
    W = block_weights(model)
    assert W["viscosity"].shape == (1, 1)
    assert W["rates"].shape == (2, 1)
    assign(model, {name: 2 * V for name, V in W.items()})
    check_equal(model.rates.detach(), torch.tensor([0.6, -1.4], device=device))
    check_equal(model.viscosity.detach(), torch.tensor(0.8, device=device))


class Rod(nn.Module):
    """A rod of unknown conductivity, which is 1/4; one of the features is the solution."""

    def __init__(self):
        super().__init__()
        self.out, self.conductivity = nn.Linear(3, 1), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        t, x = x[:, :1], x[:, 1:]
        solution = (-(torch.pi**2) / 4 * t).exp() * (torch.pi * x).sin()
        return self.out(torch.cat([solution, (t - x).tanh(), t * x], dim=1))

    def terms(self, device):
        """The equation inside, and measurements of the solution."""
        problem, draw = heat(1), torch.Generator(device).manual_seed(0)
        inside, measured = problem.points(40, draw), problem.points(20, draw)
        return [
            Term(lambda u, x: u.d[0] - self.conductivity * u.lap, inside, laplacian(2, [1])),
            Term(lambda u, x: u.value - problem.solution(x), measured, value_only(2)),
        ]


METHODS = {  # steps, and how near they come
    "gauss-newton": (GaussNewton(), 8, 1e-10),
    "engd": (Spring(1e-8), 8, 1e-10),
    "kfac-krylov": (KFACKrylov(5, 1, 1e-6, preconditioner=TermWise(0.6, ekfac_inverse)), 10, 1e-6),
    "hessian-free": (HessianFree(10, 1e-4), 8, 1e-10),
    "kfac-star": (KFACStar(preconditioner=TermWise(0.6)), 36, 1e-4),
    "kfac-star-joined": (KFACStar(1e-8, preconditioner=Joined(kfac, 0.6)), 36, 1e-4),
}


@pytest.mark.parametrize("name", METHODS)
def test_a_conductivity_is_found_from_measurements(name, device):
    torch.manual_seed(0)
    model, (method, steps, near) = Rod().to(device), METHODS[name]
    terms, state = model.terms(device), None
    for _ in range(steps):
        state = method.step(model, terms, state)
    assert model.conductivity.item() == pytest.approx(0.25, rel=near)


def test_without_measurements_no_conductivity_is_found(device):
    torch.manual_seed(0)
    model, state = Rod().to(device), None
    for _ in range(10):
        state = GaussNewton().step(model, model.terms(device)[:1], state)
    assert state.loss < 1e-10
    assert abs(model.conductivity.item() - 0.25) > 0.01


def test_a_frozen_constant_stays_and_is_no_block(device):
    torch.manual_seed(0)
    model = Rod().to(device)
    model.conductivity.requires_grad_(False)
    state = GaussNewton().step(model, model.terms(device))
    assert set(state.previous) == {"out"}
    assert model.conductivity == 1.0


def test_constants_that_no_residual_uses_or_the_network_uses_are_refused(device):
    model, terms = setting(device)
    with pytest.raises(ValueError, match=r"\['viscosity', 'rates'\], and no residual uses them"):
        linearize(model, terms[1:])

    class Scaled(Inverse):
        def forward(self, x):
            return self.net(x) * self.viscosity

    scaled = Scaled().to(device)
    with pytest.raises(ValueError, match=r"\['viscosity'\], which the network uses"):
        linearize(scaled, scaled.terms(device))
    scaled.viscosity.requires_grad_(False)
    assert set(flat(linearize(scaled, scaled.terms(device)))[0].ios) == {"net.0", "net.2", "rates"}
    scaled.viscosity.requires_grad_(True)
    with pytest.raises(ValueError, match="which the network uses"):
        linearize(scaled, scaled.terms(device))
