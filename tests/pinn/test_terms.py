"""KFAC on PINNs: identities for any network and operator, and where it is exact."""

from itertools import pairwise, permutations, product

import pytest
import torch
from torch import nn

from kfac_scratch import ekfac, ekfac_reduce, foof, kfac, kfac_reduce
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.pinn.gramian import (
    assign,
    block_weights,
    flat,
    gramian,
    inner_product,
    joined,
    kernel_matrix,
    layer_gramian,
    layer_jacobian,
    moved,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.problems import mlp
from kfac_scratch.pinn.terms import Field, Term, linearize, pinn_loss
from kfac_scratch.taylor.expansions import (
    SecondOrder,
    directional,
    laplacian,
    second_order_sum,
    value_only,
)
from kfac_scratch.taylor.partials import Partials, biharmonic
from tests.laws import check_differs, check_equal, check_matrix


def linear_net(*sizes, bias=True):
    layers = [nn.Linear(a, b, bias=bias) for a, b in pairwise(sizes)]
    return nn.Sequential(*layers)


def ios_of(model, residual, X, expansion):
    ((part,),) = linearize(model.to(X), [Term(residual, X, expansion)])
    return part.ios


# ---- operators, each also by nested automatic differentiation ------------------------------------


def poisson(u, x):
    return u.lap + x[:, :1]


def burgers(u, x):
    return u.d[0] + u.value * u.d[1] - 0.1 * u.lap


def system(u, x):
    """Two unknowns, three residuals."""
    first = u.lap[:, 0] - u.value[:, 1] ** 2
    return torch.stack([first, u.d[0][:, 1] + u.d[1][:, 0], u.value[:, 0]], dim=1)


def plate(u, x):
    return u.lap + u.value - u.partial(0, 0) * u.partial(1)


def nested(model, X):
    """Value, gradient and Hessian by nested reverse mode, differentiable in the weights."""
    X = X.clone().requires_grad_()
    u = model(X)
    columns = []
    for k in range(u.shape[1]):
        (g,) = torch.autograd.grad(u[:, k].sum(), X, create_graph=True)
        H = [torch.autograd.grad(g[:, i].sum(), X, create_graph=True)[0] for i in range(2)]
        columns.append((g, torch.stack(H, 1)))
    return u, torch.stack([g for g, _ in columns], 2), torch.stack([H for _, H in columns], 3)


def nested_poisson(model, X):
    _, _, H = nested(model, X)
    return H[:, 0, 0] + H[:, 1, 1] + X[:, :1]


def nested_burgers(model, X):
    u, d, H = nested(model, X)
    return d[:, 0] + u * d[:, 1] - 0.1 * H[:, 1, 1]


def nested_system(model, X):
    u, d, H = nested(model, X)
    first = H[:, 0, 0, 0] + H[:, 1, 1, 0] - u[:, 1] ** 2
    return torch.stack([first, d[:, 0, 1] + d[:, 1, 0], u[:, 0]], dim=1)


OPERATORS = {
    "poisson": (poisson, nested_poisson, laplacian(2), 1),
    "burgers": (burgers, nested_burgers, laplacian(2, [1]), 1),
    "system": (system, nested_system, laplacian(2), 2),
}


def jacobian_by_autodiff(model, r):
    """Rows of the scaled residuals' derivatives, by block and with the bias as last column."""
    rows = []
    for entry in r.T.flatten():
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        grads = torch.autograd.grad(entry, list(model.parameters()), **options)
        W = [torch.cat([w, b[:, None]], 1) for w, b in zip(grads[::2], grads[1::2], strict=True)]
        rows.append(torch.cat([w.flatten() for w in W]))
    return torch.stack(rows)


@pytest.fixture(params=OPERATORS)
def problem(request, device):
    """Interior and boundary terms with weights, and both terms' scaled residuals by autodiff."""
    residual, by_nesting, expansion, outputs = OPERATORS[request.param]
    model = mlp(2, 5, 4, outputs).to(device)
    X, Xb = torch.randn(7, 2, device=device), torch.randn(3, 2, device=device)
    terms = [
        Term(residual, X, expansion, weight=2.0),
        Term(lambda u, x: u.value[:, 0] - x[:, 0], Xb, value_only(2), weight=0.3),
    ]
    r = [
        (2 / 7) ** 0.5 * by_nesting(model, X),
        (0.3 / 3) ** 0.5 * (model(Xb)[:, :1] - Xb[:, :1]),
    ]
    return model, terms, r


# ---- identities for any network and any operator -------------------------------------------------


def test_half_the_squared_residuals_are_the_loss(problem):
    model, terms, r = problem
    parts = flat(linearize(model, terms))
    check_equal(residuals(parts), torch.cat([part.T.flatten() for part in r]))
    check_equal(pinn_loss(model, terms), residuals(parts).square().sum() / 2)


def test_gramian_is_that_of_nested_autodiff(problem):
    """I0: the exact matrix, its products and the gradient from one forward and one reverse pass."""
    model, terms, r = problem
    parts = flat(linearize(model, terms))
    J = torch.cat([jacobian_by_autodiff(model, part) for part in r])
    check_equal(torch.cat([layer_jacobian(parts, name) for name in parts[0].ios], 1), J)
    check_equal(gramian(parts), J.T @ J)
    check_equal(kernel_matrix(parts), J @ J.T)
    position = 0
    for name, io in parts[0].ios.items():
        size = io.a.shape[-1] * io.g.shape[-1]
        block = (J.T @ J)[position : position + size, position : position + size]
        check_equal(layer_gramian(parts, name), block)
        position += size
    v = {name: torch.randn_like(W) for name, W in block_weights(model).items()}
    check_equal(times(parts, v), J @ torch.cat([V.flatten() for V in v.values()]))
    y = torch.randn_like(residuals(parts))
    found = transposed_times(parts, y)
    check_equal(torch.cat([V.flatten() for V in found.values()]), J.T @ y)


def test_gradient_is_autograds(problem):
    model, terms, _ = problem
    parts = flat(linearize(model, terms))
    gradient = transposed_times(parts, residuals(parts))
    expected = torch.autograd.grad(pinn_loss(model, terms), list(model.parameters()))
    for V, w, b in zip(gradient.values(), expected[::2], expected[1::2], strict=True):
        check_equal(V, torch.cat([w, b[:, None]], 1))


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_chunks_change_nothing(problem, chunk):
    model, terms, _ = problem
    whole, parts = flat(linearize(model, terms)), flat(linearize(model, terms, chunk))
    assert max(len(io.a) for part in parts for io in part.ios.values()) <= max(chunk, 0)
    check_equal(pinn_loss(model, terms, chunk), pinn_loss(model, terms))
    check_equal(gramian(parts), gramian(whole))
    for name, V in transposed_times(whole, residuals(whole)).items():
        check_equal(transposed_times(parts, residuals(parts))[name], V)


def test_per_datum_expansions_in_chunks(device):
    model, X = mlp(2, 5, 1).to(device), torch.randn(5, 2, device=device)
    C, normals = torch.randn(5, 2, 2, device=device), torch.randn(5, 1, 2, device=device)
    terms = [
        Term(lambda u, x: u.lap, X, second_order_sum(C)),
        Term(lambda u, x: u.d[0], X, directional(normals)),
    ]
    assert [io.ios["0"].a.shape[1] for (io,) in linearize(model, terms)] == [4, 2]
    check_equal(gramian(flat(linearize(model, terms, 2))), gramian(flat(linearize(model, terms))))
    check_equal(pinn_loss(model, terms, 2), pinn_loss(model, terms))


def test_first_layer_in_closed_form(problem):
    """I1: the first layer's input factor is data only, and a bias has 1 / S in every layer."""
    model, terms, _ = problem
    io = linearize(model, terms)[0][0].ios["0"]
    X, S = terms[0].X, 4
    N = len(X)
    eye = torch.eye(2, device=X.device)
    corner = torch.cat([X.T @ X / N + eye, X.mean(0)[:, None]], 1)
    last = torch.cat([X.mean(0), torch.ones(1, device=X.device)])[None]
    check_equal(kfac(io).A, torch.cat([corner, last]) / S)
    for of_layer in linearize(model, terms)[0][0].ios.values():
        check_equal(kfac(of_layer).A[-1, -1], torch.tensor(1 / S, device=X.device))


def test_last_vector_factor_is_the_operators(device):
    model, X = mlp(2, 5, 1).to(device), torch.randn(7, 2, device=device)
    heat = ios_of(model, lambda u, x: u.d[0] - u.lap / 4, X, laplacian(2, [1]))["2"]
    check_equal(kfac(heat).B, torch.tensor([[1 + 1 / 16]], device=device))
    check_equal(kfac(ios_of(model, poisson, X, laplacian(2))["2"]).B, torch.ones(1, 1).to(device))


def test_the_exact_block_is_at_most_n_s_squared_times_kfac(problem):
    """I2: the exact block is at most N S^2 times KFAC."""
    model, terms, _ = problem
    for (part,) in linearize(model, terms):
        for io in part.ios.values():
            N, S, _ = io.a.shape
            V = len(io.g)
            F, K = io.block(), kfac(io).dense()
            assert torch.linalg.eigvalsh(N * S * S * V * K - F)[0] >= -1e-12 * F.trace()
            outside = torch.linalg.eigh(K)
            null = outside.eigenvectors[:, outside.eigenvalues < 1e-12 * outside.eigenvalues[-1]]
            assert (F @ null).abs().max() <= 1e-6 * F.abs().max() if null.numel() else True


def test_duplicated_and_permuted_points_change_no_block(problem):
    """I3."""
    model, terms, _ = problem
    order = torch.randperm(len(terms[0].X), device=terms[0].X.device)
    X = terms[0].X
    for other in (torch.cat([X, X]), X[order]):
        a = linearize(model, [Term(terms[0].residual, other, terms[0].expansion)])[0][0]
        b = linearize(model, [Term(terms[0].residual, X, terms[0].expansion)])[0][0]
        for name, io in a.ios.items():
            check_equal(io.block(), b.ios[name].block())
            check_equal(kfac(io).A, kfac(b.ios[name]).A)
            check_equal(kfac(io).B, kfac(b.ios[name]).B)


def test_a_scaled_operator_scales_the_block(device):
    model, X = mlp(2, 5, 1).to(device), torch.randn(7, 2, device=device)
    one = ios_of(model, poisson, X, laplacian(2))
    three = ios_of(model, lambda u, x: 3 * poisson(u, x), X, laplacian(2))
    for name, io in one.items():
        check_equal(kfac(three[name]).A, kfac(io).A)
        check_equal(kfac(three[name]).B, 9 * kfac(io).B)


def test_joined_batches_have_the_sum_of_the_blocks(device):
    torch.manual_seed(1)
    ios = [
        LayerIO(torch.randn(N, S, 3, device=device), torch.randn(V, N, S, 2, device=device))
        for N, S, V in ((5, 4, 1), (3, 1, 2), (2, 2, 1))
    ]
    check_equal(joined(ios).block(), sum(io.block() for io in ios))
    check_equal(kfac(joined([ios[0]])).dense(), kfac(ios[0]).dense())


@pytest.mark.parametrize("approximation", [kfac, kfac_reduce, ekfac, ekfac_reduce, foof])
def test_every_approximation_runs_on_a_pinn(approximation, problem):
    model, terms, _ = problem
    linearized = linearize(model, terms)
    for name in block_weights(model):
        io = joined([part.ios[name] for (part,) in linearized])
        M = approximation(io)
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]), damping=0.1)
    if approximation in (ekfac, ekfac_reduce):
        check_equal(M.trace(), io.block().trace())


def test_linearizing_in_float32(problem):
    model, terms, _ = problem
    exact = gramian(flat(linearize(model, terms)))
    single = [
        Term(t.residual, t.X.float(), t.expansion, t.weight) for t in terms
    ]  # fmt: skip
    found = gramian(flat(linearize(model.float(), single)))
    check_equal(found, exact.float())


# ---- where KFAC is exact -------------------------------------------------------------------------

ANY_NET = {
    "tanh": lambda: mlp(3, 5, 4, 1),
    "silu": lambda: nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1)),
}


@pytest.mark.parametrize("name", ANY_NET)
def test_exact_for_one_datum_without_derivatives(name, device):
    """O1."""
    X = torch.randn(1, 3, device=device)
    for io in ios_of(ANY_NET[name](), lambda u, x: u.value, X, value_only(3)).values():
        check_equal(kfac(io).dense(), io.block())


def test_exact_for_deep_linear_boundaries(device):
    """O2."""
    X = torch.randn(7, 3, device=device)
    for io in ios_of(linear_net(3, 5, 4, 1), lambda u, x: u.value - 1, X, value_only(3)).values():
        check_equal(kfac(io).dense(), io.block())


def centred(N, d, device):
    X = torch.randn(N, d, device=device)
    return X - X.mean(0)


def test_kfac_of_a_linear_net_is_exact_in_one_dimension(device):
    """O3: linear, no bias, u + u' + u'', centred points."""
    net = linear_net(1, 5, 4, 1, bias=False)
    X = centred(7, 1, device)

    def operator(u, x):
        return u.value + u.d[0] + u.lap

    for io in ios_of(net, operator, X, laplacian(1)).values():
        assert io.a.shape[1] == 3
        check_equal(kfac(io).dense(), io.block())
    for io in ios_of(net, operator, X + 1, laplacian(1)).values():
        check_differs(kfac(io).dense(), io.block())


@pytest.mark.parametrize("c", [(1.0, 1.0), (0.7, -2.0)])
def test_exact_with_first_derivatives_only(c, device):
    """O3': any two coefficients at -1 and 1."""
    X = torch.tensor([[-1.0], [1.0]], device=device)

    def operator(u, x):
        return c[0] * u.value + c[1] * u.d[0]

    first = directional(torch.ones(1, 1))
    for io in ios_of(linear_net(1, 5, 1, bias=False), operator, X, first).values():
        check_equal(kfac(io).dense(), io.block())


def test_exact_for_first_derivatives_at_centred_points(device):
    """O3'."""
    net, X = linear_net(1, 5, 4, 1, bias=False), centred(7, 1, device)
    for io in ios_of(net, lambda u, x: u.value + u.d[0], X, directional(torch.ones(1, 1))).values():
        check_equal(kfac(io).dense(), io.block())


def signed(signs):
    """The operator whose coefficients are the signs of the datum."""

    def operator(u, x):
        parts = [u.value, *u.d, u.lap]
        return sum(signs[:, s : s + 1] * part for s, part in enumerate(parts))

    return operator


def hadamard(S, device):
    H = torch.ones(1, 1, device=device)
    while len(H) < S:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H[:, :S]


@pytest.mark.parametrize("design", ["all", "hadamard"])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_exact_for_an_orthogonal_design(d, design, device):
    """O4: biases, any dimension; every point once for every row of signs."""
    S, points = d + 2, torch.randn(3, d, device=device)
    rows = (
        torch.tensor(list(product([1.0, -1.0], repeat=S)), device=device)
        if design == "all"
        else hadamard(S, device)
    )
    X, signs = points.repeat_interleave(len(rows), 0), rows.repeat(3, 1)
    for io in ios_of(linear_net(d, 5, 4, 1), signed(signs), X, laplacian(d)).values():
        check_equal(kfac(io).dense(), io.block())
    wrong = signs.abs()  # not a design
    for io in ios_of(linear_net(d, 5, 4, 1), signed(wrong), X, laplacian(d)).values():
        check_differs(kfac(io).dense(), io.block())


@pytest.mark.parametrize("d", [1, 3])
def test_reduce_is_exact_for_equal_coefficients(d, device):
    """O5."""
    X = torch.randn(7, d, device=device)

    def operator(u, x):
        return 0.7 * (u.value + sum(u.d) + u.lap)

    for io in ios_of(linear_net(d, 5, 4, 1), operator, X, laplacian(d)).values():
        check_equal(kfac(io.reduced()).dense(), io.block())
        check_differs(kfac(io).dense(), io.block())


def pruned(io):
    """Without the positions at which nothing comes back."""
    alive = io.g.abs().amax((0, 1, 3)) > 0
    return LayerIO(io.a[:, alive], io.g[:, :, alive])


@pytest.mark.parametrize(
    ("operator", "expansion"),
    [(poisson, laplacian(2)), (lambda u, x: u.d[0], directional(torch.eye(2)[:1]))],
)
def test_pruned_is_exact_in_the_last_layer(operator, expansion, device):
    """O6: one child of the operator, any network, any N."""
    X = torch.randn(7, 2, device=device)
    io = ios_of(mlp(2, 5, 4, 1), operator, X, expansion)["4"]
    check_equal(kfac(pruned(io)).dense(), io.block())
    check_differs(kfac(io).dense(), io.block())


def test_pruned_is_exact_for_linear_nets_and_one_derivative(device):
    """O6''."""

    def first_only(u, x):
        return u.d[0] + 0 * u.d[1]

    X = torch.randn(7, 2, device=device)
    for io in ios_of(linear_net(2, 5, 4, 1), first_only, X, directional(torch.eye(2))).values():
        check_equal(kfac(pruned(io)).dense(), io.block())


# ---- where it is not -----------------------------------------------------------------------------


@pytest.mark.parametrize("N", [1, 7])
def test_not_exact_for_the_laplacian_of_a_nonlinear_net(N, device):
    """Not even for one datum: with a bias, the positions' inputs are independent."""
    ios = ios_of(mlp(2, 5, 4, 1), poisson, torch.randn(N, 2, device=device), laplacian(2))
    for io in ios.values():
        check_differs(kfac(io).dense(), io.block(), by=0.1)
        check_differs(kfac(io.reduced()).dense(), io.block(), by=0.1)


def test_dead_children_count_in_the_last_layer(device):
    """The bias of the last layer has no curvature in Poisson's equation, and KFAC gives it some."""
    X = torch.randn(7, 2, device=device)
    io = ios_of(mlp(2, 5, 1), poisson, X, laplacian(2))["2"]
    assert io.block()[-1, -1] == 0
    assert kfac(io).dense()[-1, -1] > 0.1


@pytest.mark.parametrize("bias", [True, False])
def test_linear_nets_have_no_laplacian(bias, device):
    """The exact matrix of Poisson's equation is zero, KFAC's is not."""
    X = torch.randn(7, 2, device=device)
    for io in ios_of(linear_net(2, 5, 1, bias=bias), poisson, X, laplacian(2)).values():
        assert (io.block() == 0).all()
        assert kfac(io).dense().abs().max() > 0.01


def test_not_exact_for_linear_nets_and_the_heat_equation(device):
    X = torch.randn(7, 2, device=device)

    def heat(u, x):
        return u.d[0] - u.lap / 4

    for io in ios_of(linear_net(2, 5, 1), heat, X, laplacian(2, [1])).values():
        check_differs(kfac(io).dense(), io.block(), by=0.1)


# ---- networks ------------------------------------------------------------------------------------


class Tied(nn.Module):
    """The same layer twice, a frozen one, and one without bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 3)
        self.c = nn.Linear(3, 1, bias=False)
        self.b.requires_grad_(False)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(torch.tanh(self.a(x)))))))


@pytest.mark.everywhere
def test_tied_frozen_and_unbiased_layers(device):
    model, X = Tied().to(device), torch.randn(5, 2, device=device)
    terms = [Term(poisson, X, laplacian(2))]
    parts = flat(linearize(model, terms))
    assert set(parts[0].ios) == {"a", "c"}
    assert parts[0].ios["a"].a.shape[1] == 2 * 4
    gradient = transposed_times(parts, residuals(parts))
    w, b, c = torch.autograd.grad(
        pinn_loss(model, terms), [model.a.weight, model.a.bias, model.c.weight]
    )
    check_equal(gradient["a"], torch.cat([w, b[:, None]], 1))
    check_equal(gradient["c"], c)


@pytest.mark.everywhere
def test_higher_order_and_named_derivatives(device):
    model, X = mlp(2, 5, 1).to(device), torch.randn(5, 2, device=device)
    terms = [
        Term(plate, X, Partials(torch.eye(2), [(0, 0), (1,)], [{(1, 1): 1.0}])),
        Term(lambda u, x: u.lap - 1, X, biharmonic(2)),
    ]
    parts = flat(linearize(model, terms))
    expected = torch.autograd.grad(pinn_loss(model, terms), model[0].weight)[0]
    check_equal(transposed_times(parts, residuals(parts))["0"][:, :2], expected)


def test_weights_move_along_directions(device):
    model = mlp(2, 3, 1).to(device)
    W = block_weights(model)
    check_equal(W["0"], torch.cat([model[0].weight, model[0].bias[:, None]], 1))
    d = {"0": torch.randn_like(W["0"])}
    assign(model, moved(W, d, 0.5))
    check_equal(block_weights(model)["0"], W["0"] + 0.5 * d["0"])
    check_equal(block_weights(model)["2"], W["2"])
    check_equal(inner_product(W, d), (W["0"] * d["0"]).sum())
    assert inner_product(d, {"2": W["2"]}) == 0


def test_linearizing_leaves_no_trace(problem):
    model, terms, _ = problem
    linearize(model, terms)
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())
    with pytest.raises(NotImplementedError):
        linearize(nn.Sequential(*model, nn.Softsign()), terms)
    assert not any(m._forward_hooks for m in model.modules())
    with torch.no_grad():
        check_equal(
            residuals(flat(linearize(model, terms))), residuals(flat(linearize(model, terms)))
        )


# ---- errors --------------------------------------------------------------------------------------


def refused(residual, match, expansion=None, model=None, X=None, error=ValueError):
    X = torch.randn(5, 2) if X is None else X
    term = Term(residual, X, laplacian(2) if expansion is None else expansion)
    with pytest.raises(error, match=match):
        linearize(mlp(2, 3, 1) if model is None else model, [term])


def test_a_residual_must_use_what_it_declares():
    refused(lambda u, x: u.value, r"ignores 0 .* declare a smaller expansion")
    refused(lambda u, x: u.d[0], r"ignores \(1,\)", directional(torch.eye(2)))
    refused(lambda u, x: x[:, :1], r"ignores \(\)", value_only(2))
    refused(
        lambda u, x: u.lap, r"ignores \(0, 1\)", Partials(torch.eye(2), [(0, 1)], [{(0, 0): 1.0}])
    )
    two = SecondOrder(torch.eye(2), torch.eye(2))
    refused(lambda u, x: u.sums[1], "ignores 0", two)


def test_residuals_of_wrong_shapes_are_refused():
    refused(lambda u, x: u.lap - x[:, 0], r"shape \(5, 5\), not \[5\] or \[5, M\]")
    refused(lambda u, x: u.lap.sum(), "shape")
    refused(lambda u, x: u.lap[1:], "shape")


def test_derivatives_that_do_not_travel():
    refused(lambda u, x: u.lap, "Sum 0 does not travel", value_only(2))
    refused(lambda u, x: u.partial(0, 0), r"Derivative \(0, 0\) does not travel")


def test_residuals_that_are_not_finite_are_refused():
    refused(lambda u, x: u.lap / 0, "not finite")


def test_networks_that_no_step_could_train():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.scale = mlp(2, 3, 1), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.net(x) * self.scale

    refused(poisson, r"\['scale'\].*requires_grad_\(False\)", model=Scaled())

    class Unused(Scaled):
        def __init__(self):
            super().__init__()
            self.scale.requires_grad_(False)
            self.extra = nn.Linear(2, 2)

    refused(poisson, r"\['extra'\] never ran", model=Unused())
    unknown = nn.Sequential(nn.Softmax(-1), nn.Linear(2, 1))
    refused(poisson, "softmax", model=unknown, error=NotImplementedError)


def layer_norm(h):
    centred = h - h.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


class AtPositions(nn.Module):
    """One layer for every coordinate, whose outputs are multiplied and normalised."""

    def __init__(self):
        super().__init__()
        self.each, self.out = nn.Linear(1, 3), nn.Linear(3, 1)
        self.norm = nn.LayerNorm(3, elementwise_affine=False)

    def forward(self, x):
        h = self.each(x.unsqueeze(-1)).tanh()  # [N, 2, 3]
        a, b = h.unbind(1)
        return self.out(self.norm(a * b + h.mean(1)))


@pytest.mark.parametrize("name", ["poisson", "burgers"])
def test_a_layer_at_several_positions_has_the_exact_block(name, device):
    residual, by_nesting, expansion, _ = OPERATORS[name]
    model, X = AtPositions().to(device), torch.randn(6, 2, device=device)
    parts = flat(linearize(model, [Term(residual, X, expansion)]))
    model.norm.forward = layer_norm  # a third derivative through PyTorch's is wrong
    J = jacobian_by_autodiff(model, by_nesting(model, X).reshape(6, -1) / 6**0.5)
    check_equal(gramian(parts), J.T @ J)
    assert parts[0].ios["each"].a.shape == (6, 2 * 4, 2)
    check_equal(parts[0].ios["each"].block(), (J.T @ J)[:6, :6])


def test_terms_without_points_are_refused():
    refused(poisson, "needs at least 1 point", X=torch.randn(0, 2))
    with pytest.raises(ValueError, match="chunk at least 1"):
        linearize(mlp(2, 3, 1), [Term(poisson, torch.randn(3, 2), laplacian(2))], chunk=0)


def test_a_field_knows_its_derivatives_by_name():
    u = Field(list(torch.randn(4, 3, 1)), laplacian(2))
    assert u.partial(1) is u.d[1] is u.parts[2]
    assert u.lap is u.sums[0] is u.parts[3]


def test_a_derivative_has_no_order_of_directions():
    mixed = Partials(torch.eye(2), [(0, 0, 1)])
    u = Field(list(torch.randn(len(mixed.names), 4, 1)), mixed)
    expected = u.parts[mixed.names.index((0, 0, 1))]
    assert u.partial(0, 0, 1) is u.partial(0, 1, 0) is u.partial(1, 0, 0) is expected


# ---- nothing wrong in silence ------------------------------------------------------------------

OTHER_POINTS = {
    "the mean": lambda u, x: u.lap - u.value.mean(0),
    "the next point": lambda u, x: u.lap * u.value.roll(1, 0),
    "earlier points": lambda u, x: u.lap + u.value.cumsum(0),
    "later points": lambda u, x: u.lap + u.value.flip(0).cumsum(0).flip(0),
    "two residuals whose sum does not": lambda u, x: torch.cat(
        [u.lap + u.value.mean(), -u.value.mean().expand_as(u.lap)], 1
    ),
}


@pytest.mark.parametrize("name", OTHER_POINTS)
def test_a_residual_that_depends_on_other_points_is_refused(name):
    refused(OTHER_POINTS[name], "field at other points", model=mlp(2, 3, 1))


def test_a_residual_that_depends_on_one_other_point_is_refused(device):
    """Whichever points they are."""
    X = torch.randn(5, 2, device=device)
    for i, j in permutations(range(5), 2):
        model = mlp(2, 3, 1).to(device)

        def residual(u, x, i=i, j=j):
            others = torch.zeros_like(u.lap)
            return u.lap + others.index_add(0, torch.tensor([i], device=device), u.value[j : j + 1])

        with pytest.raises(ValueError, match="field at other points"):
            linearize(model, [Term(residual, X, laplacian(2))])


def test_a_residual_may_depend_on_detached_values_of_other_points(device):
    model, X = mlp(2, 3, 1).to(device), torch.randn(5, 2, device=device)

    def residual(u, x):
        return u.lap - u.value.mean(0).detach()

    parts = flat(linearize(model, [Term(residual, X, laplacian(2))]))
    mean = parts[0].residuals.new_tensor(0) + model(X).mean(0).detach()
    fixed = flat(linearize(model, [Term(lambda u, x: u.lap - mean, X, laplacian(2))]))
    for name, io in parts[0].ios.items():
        check_equal(io.g, fixed[0].ios[name].g)


class Used(nn.Module):
    """A network in which a parameter is used outside of its layer."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(2, 3), nn.Linear(3, 1), way

    def forward(self, x):
        return self.b(torch.tanh(self.way(self.a, x)))


USES = {
    "the bias once more": lambda a, x: a(x) + a.bias,
    "the weight in a function": lambda a, x: a(x) + nn.functional.linear(x, a.weight),
}


@pytest.mark.parametrize("name", USES)
def test_a_use_outside_of_a_layer_is_refused_by_name(name):
    match = r"'a\.(weight|bias)' is not the sum of g a\^T"
    refused(lambda u, x: u.lap, match, model=Used(USES[name]), error=NotImplementedError)


def test_what_a_hook_makes_of_an_output_follows_the_layer(device):
    model = mlp(2, 3, 1).to(device)
    model[0].register_forward_hook(lambda m, x, z: 2 * z)
    X = torch.randn(5, 2, device=device)
    terms = [Term(lambda u, x: u.lap - 1, X, laplacian(2))]
    parts = flat(linearize(model, terms))
    expected = torch.autograd.grad(pinn_loss(model, terms), model[0].weight)[0]
    check_equal(transposed_times(parts, residuals(parts))["0"][:, :2], expected)


def test_a_network_is_tried_once_for_each_kind(monkeypatch):
    passes, model = [], mlp(2, 3, 1)
    model.register_forward_hook(lambda m, x, z: passes.append(len(x[0].c)))
    terms = [Term(lambda u, x: u.lap, torch.randn(11, 2), laplacian(2))] * 2
    for _ in range(2):
        linearize(model, terms)
    assert passes == [8, 11, 11, 11, 11]
    linearize(model, [Term(lambda u, x: u.value, torch.randn(3, 2), value_only(2))])
    assert passes[5:] == [3]  # of the same kind: an expansion of second order
    model[0].bias.requires_grad_(False)
    linearize(model, terms)
    assert passes[6:] == [8, 11, 11]
