from functools import partial
from math import factorial

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_scratch.taylor import activations
from kfac_scratch.taylor.expansions import (
    SecondOrder,
    directional,
    laplacian,
    second_order_sum,
    value_only,
)
from kfac_scratch.taylor.faa_di_bruno import partitions, splits, submultisets
from kfac_scratch.taylor.jets import Elementwise, Jet, forward_laplacian, taylor_coefficients
from kfac_scratch.taylor.partials import Partials, biharmonic, univariate_jets
from tests.laws import check_differs, check_equal


def shifted(derivatives):
    """A function of positive numbers, moved to the left."""
    return lambda z, K: derivatives(z + 3, K)


FUNCTIONS = {  # derivatives, and a definition that autodiff can differentiate as often as it likes
    "tanh": (activations.tanh, torch.tanh),
    "sigmoid": (activations.sigmoid, torch.sigmoid),
    "sin": (activations.sin, torch.sin),
    "cos": (activations.cos, torch.cos),
    "exp": (activations.exp, torch.exp),
    "softplus": (activations.softplus, lambda z: z.exp().log1p()),
    "softplus-3": (partial(activations.softplus, beta=3.0), lambda z: (3 * z).exp().log1p() / 3),
    "silu": (activations.silu, lambda z: z * z.sigmoid()),
    "gelu": (activations.gelu, lambda z: z * (1 + (z / 2**0.5).erf()) / 2),
    "relu": (activations.relu, torch.relu),
    "sinh": (activations.sinh, torch.sinh),
    "cosh": (activations.cosh, torch.cosh),
    "atan": (activations.atan, torch.atan),
    "erf": (activations.erf, torch.erf),
    "elu": (activations.elu, lambda z: torch.where(z > 0, z, z.exp() - 1)),
    "elu-2": (
        partial(activations.elu, alpha=2.0),
        lambda z: torch.where(z > 0, z, 2 * z.exp() - 2),
    ),
    "mish": (activations.mish, lambda z: z * z.exp().log1p().tanh()),
    "gelu-tanh": (
        activations.gelu_tanh,
        lambda z: z * (1 + ((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)).tanh()) / 2,
    ),
    "abs": (activations.abs, torch.abs),
    "softplus-3-1": (
        partial(activations.softplus, beta=3.0, threshold=1.0),
        lambda z: torch.where(3 * z > 1, z, (3 * z).exp().log1p() / 3),
    ),
    "power-7": (partial(activations.power, exponent=7), lambda z: z**7),
    "root": (shifted(partial(activations.power, exponent=0.5)), lambda z: (z + 3) ** 0.5),
    "log": (shifted(activations.log), lambda z: (z + 3).log()),
    "power-2": (partial(activations.power, exponent=2), lambda z: z**2),
    "reciprocal": (partial(activations.power, exponent=-1), lambda z: 1 / z),
}
MODULES = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "sin": lambda: Elementwise(activations.sin),
    "softplus": nn.Softplus,
    "softplus-3": lambda: nn.Softplus(beta=3.0),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "relu-squared": lambda: nn.Sequential(
        nn.ReLU(), Elementwise(partial(activations.power, exponent=2))
    ),
    "user's": lambda: Elementwise(mixed),
}
TOLERANCE = 1e-12


def mixed(z, K):
    """A function that the package does not know: `z tanh(z)` by its derivatives."""
    t = activations.tanh(z, K)
    return [z * t[k] + (k * t[k - 1] if k else 0) for k in range(K + 1)]


def close(actual, expected, tolerance=TOLERANCE):
    size = expected.abs().max()
    assert size > 0, "a zero matrix proves nothing"
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * size


def derivative(f, x, directions):
    """Of the outputs' derivatives along directions: nested reverse mode, one after the other."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        outputs = list(f(x).unbind(1))
        for k, u in enumerate(outputs):
            for v in directions:
                if not u.requires_grad:
                    u = torch.zeros(len(x)).to(x)
                    break
                (g,) = torch.autograd.grad(u.sum(), x, create_graph=True, allow_unused=True)
                u = torch.zeros(len(x)).to(x) if g is None else (g * v).sum(1)
            outputs[k] = u
    return torch.stack(outputs, dim=1).detach()


def net(activation=nn.Tanh, d=3, outputs=2):
    return nn.Sequential(
        nn.Linear(d, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, outputs)
    )


def plain(model):
    """The model with its activations written such that autodiff nests without limit."""
    known = {
        nn.Softplus: lambda m: FUNCTIONS["softplus-3" if m.beta == 3 else "softplus"][1],
        nn.SiLU: lambda m: FUNCTIONS["silu"][1],
        nn.GELU: lambda m: FUNCTIONS["gelu"][1],
        nn.ReLU: lambda m: lambda z: z * (z > 0),
    }

    def forward(x):
        for layer in model:
            x = known[type(layer)](layer)(x) if type(layer) in known else layer(x)
        return x

    return forward


# ---- functions of one variable ------------------------------------------------------------------


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_equal_nested_autodiff(name, device):
    derivatives, function = FUNCTIONS[name]
    z = torch.linspace(-2.1, 2, 24, device=device)[:, None]
    found = derivatives(z, 6)
    assert len(found) == 7
    for k, f in enumerate(found):
        expected = derivative(function, z, [torch.ones(1, device=device)] * k)
        assert (f - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max()), k


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("K", range(3))
def test_as_many_derivatives_as_asked_for(name, K, device):
    assert len(FUNCTIONS[name][0](torch.ones(2, device=device), K)) == K + 1


def test_softplus_is_torchs_beyond_the_threshold(device):
    z = torch.tensor([-30.0, 0.0, 19.0, 500.0], device=device)
    close(activations.softplus(z, 2)[0], softplus(z))
    assert all(f.isfinite().all() for f in activations.softplus(z, 6))


# ---- partitions ---------------------------------------------------------------------------------


def test_partitions_are_faa_di_brunos(device):
    shapes = {tuple(len(b) for b in blocks): n for blocks, n in partitions((0,) * 4).items()}
    assert shapes == {(4,): 1, (1, 3): 4, (2, 2): 3, (1, 1, 2): 6, (1, 1, 1, 1): 1}


@pytest.mark.parametrize(("K", "bell"), list(enumerate([1, 1, 2, 5, 15, 52, 203])))
def test_partitions_are_counted_by_bell_and_by_the_formula(K, bell):
    assert sum(partitions(tuple(range(K))).values()) == bell
    for blocks, n in partitions((0,) * K).items():
        sizes = [len(block) for block in blocks]
        expected = factorial(K)
        for size in set(sizes):
            expected //= factorial(sizes.count(size)) * factorial(size) ** sizes.count(size)
        assert n == expected


def test_splits_are_binomials():
    assert [splits((0,) * 4)[(0,) * k, (0,) * (4 - k)] for k in range(5)] == [1, 4, 6, 4, 1]
    assert submultisets((1, 0, 1)) == {(), (0,), (1,), (0, 1), (1, 1)}


# ---- jets and partial derivatives ---------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_jets_equal_nested_autodiff_up_to_order_six(name, device):
    model, X = net(MODULES[name]).to(device), torch.randn(4, 3, device=device)
    V = torch.randn(2, 3, device=device)
    c, expansion = taylor_coefficients(model, X, univariate_jets(V, 6)), univariate_jets(V, 6)
    assert len(expansion.names) == 1 + 2 * 6
    for s, alpha in enumerate(expansion.names):
        expected = derivative(plain(model), X, [V[r] for r in alpha])
        assert (c[:, s] - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max()), alpha


def test_mixed_partials_are_those_of_autodiff(device):
    model, X = net().to(device), torch.randn(4, 3, device=device)
    V = torch.randn(3, 3, device=device)
    wanted = [(0, 1, 2, 2), (2, 1), (1, 1, 1, 0, 0)]
    expansion = Partials(V, wanted)
    c = taylor_coefficients(model, X, expansion)
    assert {tuple(sorted(a)) for a in wanted} <= set(expansion.names)
    for s, alpha in enumerate(expansion.names):
        close(c[:, s], derivative(model, X, [V[r] for r in alpha]))


@pytest.mark.parametrize(
    "add",
    [
        lambda x, b: torch.add(torch.tanh(x), x[:, :1] * x, alpha=0.3),
        lambda x, b: torch.add(torch.tanh(x), b, alpha=0.3),
        lambda x, b: torch.add(b, torch.tanh(x), alpha=0.3),
    ],
    ids=["two jets", "a constant", "to a constant"],
)
def test_a_sum_has_the_factor_of_its_second_term(add, device):
    X, b, V = (torch.randn(*shape, device=device) for shape in ((4, 3), (3,), (2, 3)))
    model, expansion = partial(add, b=b), Partials(V, [(0, 1)])
    c = taylor_coefficients(model, X, expansion)
    for s, alpha in enumerate(expansion.names):
        close(c[:, s], derivative(model, X, [V[r] for r in alpha]))


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_biharmonic_is_that_of_autodiff(d, device):
    model, X = net(d=d).to(device), torch.randn(4, d, device=device)
    eye = torch.eye(d, device=device)
    pairs = [(eye[i], eye[i], eye[j], eye[j]) for i in range(d) for j in range(d)]
    expected = sum(derivative(model, X, p) for p in pairs)
    expansion = biharmonic(d)
    close(taylor_coefficients(model, X, expansion)[:, -1], expected)
    assert len(expansion.names) == 2 + d + d * (d + 1) // 2 + d * d


def test_sums_are_sums_of_their_members(device):
    model, X = net().to(device), torch.randn(4, 3, device=device)
    V, total = torch.randn(2, 3, device=device), {(0, 0, 1): 2.0, (1, 1, 1): -0.5}
    several = Partials(V, sums=[total, {(0, 1): 3.0}, {(1,): 0.7, (0, 0): 1.0}])
    singly = Partials(V, [*total, (0, 1), (1,), (0, 0)])
    for f in (model, lambda x: model(x) * torch.tanh(x[:, :1] * x[:, 1:2])):  # Leibniz, too
        c, e = taylor_coefficients(f, X, several), taylor_coefficients(f, X, singly).unbind(1)
        e = dict(zip(singly.names, e, strict=True))
        close(c[:, -3], 2 * e[0, 0, 1] - 0.5 * e[1, 1, 1])
        close(c[:, -2], 3 * e[0, 1])
        close(c[:, -1], 0.7 * e[(1,)] + e[0, 0])
    start = several.start(X)
    close(start[:, -1], (0.7 * V[1]).expand(4, 3))
    assert len(several.names) < len(singly.names) + 3


# ---- second order -------------------------------------------------------------------------------


def hessian(model, X):
    eye, d = torch.eye(X.shape[1]).to(X), X.shape[1]
    rows = [[derivative(model, X, [eye[i], eye[j]]) for j in range(d)] for i in range(d)]
    return torch.stack([torch.stack(row, 1) for row in rows], 1)  # [N, d, d, outputs]


def test_the_forward_laplacian_is_that_of_autodiff(device):
    model, X = net().to(device), torch.randn(4, 3, device=device)
    u, du, lap = forward_laplacian(model, X)
    close(u, model(X))
    eye = torch.eye(3, device=device)
    close(du, torch.stack([derivative(model, X, [v]) for v in eye], 1))
    close(lap, torch.einsum("niio->no", hessian(model, X)))


@pytest.mark.parametrize("name", MODULES)
def test_second_order_equals_the_general_formula(name, device):
    model, X = net(MODULES[name]).to(device), torch.randn(5, 3, device=device)
    c = taylor_coefficients(model, X, laplacian(3, [0, 2]))
    e = taylor_coefficients(model, X, Partials(torch.eye(3), [(1,)], [{(0, 0): 1.0, (2, 2): 1.0}]))
    close(c, e)


class EntriesWritten(TorchDispatchMode):
    """Counts the entries that elementwise operations write."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mul.Tensor, torch.ops.aten.addcmul.default):
            self.count += result.numel()
        return result


def entries_written(expansion, x, top):
    with EntriesWritten() as form:
        expansion.form(x, x)
    with EntriesWritten() as gradient:
        expansion.gradient_of_form(x, top)
    return form.count, gradient.count


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("used", [torch.float32, torch.float64])
def test_one_weight_for_all_directions_stays_one_in_every_dtype(given, used, device):
    """The Laplacian's path is chosen by a shape, which conversions and copies keep."""
    N, R, h = 5, 4, 3
    x = torch.randn(N, R, h, device=device, dtype=used)
    top = torch.randn(N, 1, h, device=device, dtype=used)
    one = SecondOrder(torch.eye(R), torch.ones(1, 1, dtype=given))
    each = SecondOrder(torch.eye(R), torch.ones(1, R, dtype=given))
    assert laplacian(R).C.shape == (1, 1)
    close(one.form(x, x), each.form(x, x), 1e-6)
    close(one.gradient_of_form(x, top), each.gradient_of_form(x, top), 1e-6)
    fast, slow = entries_written(one, x, top), entries_written(each, x, top)
    assert fast[0] == N * R * h + N * h  # a sum of products, and one weight
    assert slow[0] == fast[0] + N * R * h - N * h
    assert fast[1] < slow[1]


def test_several_sums_with_one_weight_each(device):
    model, X = net().to(device), torch.randn(4, 3, device=device)
    c = taylor_coefficients(model, X, SecondOrder(torch.eye(3), torch.tensor([[2.0], [-1.0]])))
    lap = taylor_coefficients(model, X, laplacian(3))[:, -1]
    close(c[:, -2], 2 * lap)
    close(c[:, -1], -lap)


def test_weights_per_batch_and_per_datum(device):
    model, X = net().to(device), torch.randn(4, 3, device=device)
    H = hessian(model, X)
    C = torch.randn(3, 3, device=device)  # neither symmetric nor definite
    close(
        taylor_coefficients(model, X, second_order_sum(C))[:, -1], torch.einsum("ij,nijo->no", C, H)
    )
    Cn = torch.randn(4, 3, 3, device=device)
    close(
        taylor_coefficients(model, X, second_order_sum(Cn))[:, -1],
        torch.einsum("nij,nijo->no", Cn, H),
    )
    several = SecondOrder(torch.eye(3, device=device), torch.stack([Cn, Cn.mT * 2]))
    c = taylor_coefficients(model, X, several)
    close(c[:, -1], torch.einsum("nij,nijo->no", 2 * Cn.mT, H))
    for rows in (slice(0, 1), slice(2, 4)):  # a part of the data has its part of the weights
        close(taylor_coefficients(model, X[rows], several.part(rows)), c[rows])
    diagonal = SecondOrder(torch.eye(3, device=device), torch.randn(2, 3, device=device))
    close(
        taylor_coefficients(model, X, diagonal)[:, -2:],
        torch.einsum("mi,niio->nmo", diagonal.C.to(device), H),
    )


def test_directions_may_differ_between_points(device):
    model, X = net().to(device), torch.randn(4, 3, device=device)
    normals = torch.randn(4, 1, 3, device=device)
    c = taylor_coefficients(model, X, directional(normals))
    close(c[:, 1], derivative(model, X, [normals[:, 0]]))
    close(taylor_coefficients(model, X[1:3], directional(normals).part(slice(1, 3))), c[1:3])
    twice = SecondOrder(normals, torch.ones(1, 1))
    close(taylor_coefficients(model, X, twice)[:, 2], derivative(model, X, [normals[:, 0]] * 2))


def test_no_derivative_is_the_network(device):
    model, X = net().to(device), torch.randn(4, 3, device=device)
    close(taylor_coefficients(model, X, value_only(3)), model(X)[:, None])


@pytest.mark.parametrize("N", [1, 3])
def test_jets_of_the_smallest_sizes(N, device):
    model, X = net(d=1, outputs=1).to(device), torch.randn(N, 1, device=device)
    one = torch.ones(1, device=device)
    close(taylor_coefficients(model, X, laplacian(1))[:, 2], derivative(model, X, [one, one]))


def test_dead_units_and_linear_nets_have_no_second_derivatives(device):
    for activation in (nn.ReLU, nn.Identity):
        model, X = net(activation).to(device), torch.randn(4, 3, device=device)
        c = taylor_coefficients(model, X, laplacian(3))
        assert (c[:, -1] == 0).all()
        assert (c[:, 1:-1] != 0).any()


def test_jets_in_float32(device):
    model = net().to(device, torch.float32)
    X = torch.randn(4, 3, device=device, dtype=torch.float32)
    for expansion in (laplacian(3), biharmonic(3), second_order_sum(torch.eye(3))):
        c = taylor_coefficients(model, X, expansion)
        assert c.dtype == torch.float32
        close(c, taylor_coefficients(model.double(), X.double(), expansion).float(), 1e-4)
        model.float()


# ---- reverse passes through a forward pass ------------------------------------------------------

SECOND = {  # made in the test, in its precision
    "value": lambda: (value_only(3), Partials(torch.eye(3))),
    "gradient": lambda: (directional(torch.eye(3)), Partials(torch.eye(3), [(0,), (1,), (2,)])),
    "laplacian": lambda: (laplacian(3), sums({(0, 0): 1.0, (1, 1): 1.0, (2, 2): 1.0})),
    "partial laplacian": lambda: (laplacian(3, [1, 2]), sums({(1, 1): 1.0, (2, 2): 1.0}, (0,))),
    "constant": lambda: (
        SecondOrder(torch.eye(3), torch.tensor([[0.5], [-2.0]]).expand(2, 3)),
        sums(*({(i, i): c for i in range(3)} for c in (0.5, -2.0))),
    ),
    "several": lambda: (
        SecondOrder(torch.eye(3), torch.tensor([[1.0, 2, 0], [0, -1, 3]])),
        sums({(0, 0): 1.0, (1, 1): 2.0}, {(1, 1): -1.0, (2, 2): 3.0}),
    ),
    "weighted": lambda: (
        SecondOrder(torch.eye(3), torch.tensor([[[1.0, 2, 0], [0, -1, 0], [0, 0, 3]]])),
        sums({(0, 0): 1.0, (0, 1): 2.0, (1, 1): -1.0, (2, 2): 3.0}),
    ),
}


def sums(*totals):
    """Sums of second derivatives; first derivatives as tuples."""
    singles = [t for t in totals if isinstance(t, tuple)]
    return Partials(torch.eye(3), singles, [t for t in totals if isinstance(t, dict)])


@pytest.mark.parametrize("name", SECOND)
@pytest.mark.parametrize("activation", ["tanh", "user's"])
def test_reverse_pass_by_hand_equals_autodiffs(name, activation, device):
    """`Partials` is differentiated by autodiff, `SecondOrder` has its own reverse pass."""
    model, X = net(MODULES[activation]).to(device), torch.randn(5, 3, device=device)
    mine, general = (taylor_coefficients(model, X, e) for e in SECOND[name]())
    close(mine, general)
    w = torch.randn_like(mine)
    for a, b in zip(
        torch.autograd.grad((mine * w).sum(), model.parameters()),
        torch.autograd.grad((general * w).sum(), model.parameters()),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize("name", SECOND)
def test_reverse_pass_can_be_differentiated_again(name, device):
    expansion = SECOND[name]()[0]
    h = torch.randn(1, len(expansion.names), 2, device=device, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda h: expansion.compose(activations.tanh, h), h)
    N = torch.randn(2, 3, 3, device=device)
    per_datum = second_order_sum(N)
    h = torch.randn(2, 5, 3, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h: per_datum.compose(activations.gelu, h), h)


def test_works_below_torch_func(device):
    model, X = net(outputs=1).to(device), torch.randn(4, 3, device=device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    expansion = laplacian(3)  # outside of what is transformed

    def f(parameters, x):
        jet = Jet(expansion.start(x[None]), expansion)
        return torch.func.functional_call(model, parameters, (jet,)).c[0, -1, 0]

    J = torch.func.vmap(torch.func.grad(f), (None, 0))(parameters, X)
    lap = taylor_coefficients(model, X, laplacian(3))[:, -1].sum()
    (expected,) = torch.autograd.grad(lap, model[0].weight)
    close(J["0.weight"].sum(0), expected)


# ---- whole networks -----------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2, bias=False)

    def forward(self, x):
        x = x + torch.tanh(self.a(x))
        x = 0.5 * x - nn.functional.gelu(self.b(x)) + torch.ones(3, device=x.device)
        x = torch.linspace(0, 1, 3, device=x.device) - x  # torch's own subtraction
        return self.out(x)


class Fourier(nn.Module):
    """Features with fixed frequencies, and a constant beside them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("B", torch.randn(3, 4))
        self.net = nn.Sequential(nn.Linear(9, 4), nn.SiLU(), nn.Linear(4, 2))

    def forward(self, x):
        z = x @ self.B
        one = torch.full((x.shape[0], 1), 0.3, device=x.device)
        return self.net(torch.cat([torch.sin(z), torch.cos(z), one], dim=1))


class Hard(nn.Module):
    """Zero where the first coordinate is 0 or 1, plus a lift; with every kind of arithmetic."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        first = x[:, 0:1]
        shape = first * (1 - first) / (2 + torch.square(x[:, 1:2]))
        return shape * self.net(x) - (1 / torch.exp(x)).sum(1, keepdim=True) + x[:, :2] ** 3 / 7


EVERYTHING = {"residual": Residual, "fourier": Fourier, "hard": Hard}


@pytest.mark.parametrize("name", EVERYTHING)
def test_jets_pass_through_any_forward_pass(name, device):
    model, X = EVERYTHING[name]().to(device), torch.randn(4, 3, device=device)
    for expansion in (
        laplacian(3),
        Partials(torch.eye(3), [(0, 1, 2), (0, 0, 1, 1)], [{(0, 2): 1.0, (1, 1): -2.0}]),
    ):
        c = taylor_coefficients(model, X, expansion)
        close(c[:, 0], model(X))
        eye = torch.eye(3, device=device)
        for s, alpha in enumerate(expansion.names):
            if isinstance(alpha, tuple):
                close(c[:, s], derivative(model, X, [eye[i] for i in alpha]))
    check_equal(
        taylor_coefficients(model, X, laplacian(3))[:, -1],
        torch.einsum("niio->no", hessian(model, X)),
    )


def test_products_with_per_datum_weights(device):
    model, X = Hard().to(device), torch.randn(4, 3, device=device)
    C = torch.randn(4, 3, 3, device=device)
    lap = taylor_coefficients(model, X, second_order_sum(C))[:, -1]
    close(lap, torch.einsum("nij,nijo->no", C, hessian(model, X)))
    check_differs(lap, torch.einsum("ij,nijo->no", C[0], hessian(model, X)))


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "named"),
    [(nn.Hardtanh(), "hardtanh"), (nn.Softmax(-1), "softmax"), (nn.Softsign(), "softsign")],
)
def test_unknown_functions_are_named(layer, named, device):
    with pytest.raises(NotImplementedError, match=rf"'{named}'.*Elementwise"):
        taylor_coefficients(layer, torch.randn(4, 3, device=device), laplacian(3))


def test_too_few_derivatives_are_refused(device):
    few = Elementwise(lambda z, K: activations.tanh(z, min(K, 2)))
    X = torch.randn(4, 3, device=device)
    with pytest.raises(ValueError, match=r"4 derivatives.*value and 2 of them"):
        taylor_coefficients(few, X, biharmonic(3))
    c = taylor_coefficients(nn.Sequential(nn.Linear(3, 2), few).to(device), X, laplacian(3))
    with pytest.raises(ValueError, match=r"3 derivatives.*K \+ 1 in a reverse pass"):
        c.sum().backward()


@pytest.mark.parametrize("shape", [(1, 2), (1, 3, 2), (1, 4, 2, 2), (2,)])
def test_weights_of_another_shape_are_refused(shape):
    with pytest.raises((ValueError, TypeError)):
        SecondOrder(torch.eye(3), torch.ones(shape))


@pytest.mark.parametrize("shape", [(3,), (3, 2), (2, 2, 3, 3)])
def test_weighted_needs_square_weights(shape):
    with pytest.raises((ValueError, TypeError)):
        second_order_sum(torch.ones(shape))


def test_points_must_fit(device):
    X = torch.randn(4, 2, device=device)
    with pytest.raises(ValueError, match="do not fit points"):
        taylor_coefficients(net(), X, laplacian(3))
    with pytest.raises(ValueError, match="do not fit points"):
        taylor_coefficients(net(), X, directional(torch.ones(5, 1, 2)))
    with pytest.raises(ValueError, match=r"4 points need C of shape \[M, 4, R, R\]"):
        taylor_coefficients(net(), X, second_order_sum(torch.ones(3, 2, 2)))
    with pytest.raises((ValueError, TypeError)):
        taylor_coefficients(net(), X[0], laplacian(2))
    with pytest.raises(ValueError, match="ignores its input"):
        taylor_coefficients(lambda x: torch.ones(4, 1), X, laplacian(2))


def test_orders_and_directions_are_checked():
    with pytest.raises(ValueError, match="order 10 is the highest"):
        univariate_jets(torch.eye(2), 11)
    for alpha in ((), (0, 2), (-1,)):
        with pytest.raises(ValueError, match="no derivative along directions 0 to 1"):
            Partials(torch.eye(2), [alpha])


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x[:, 0],
        lambda x: x[0],
        lambda x: x[1:, :],
        lambda x: x.sum(0, keepdim=True),
        lambda x: torch.cat([x, x]),
        lambda x: torch.ones(2, 4) @ x,
        lambda x: x @ x,
    ],
)
def test_what_would_mix_data_is_refused(forward, device):
    with pytest.raises((ValueError, IndexError)):
        taylor_coefficients(forward, torch.randn(4, 3, device=device), laplacian(3))
