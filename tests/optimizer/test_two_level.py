from functools import partial

import pytest
import torch
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Linear, MSELoss, Sequential, Tanh

from kfac_scratch import Dense, LayerIO, ekfac, factored_inverse, kfac, layer_ios, preconditioner
from kfac_scratch.curvature import block_index, ggn
from kfac_scratch.optimizer.coarse_spaces import (
    krylov_space,
    nicolaides_space,
    residual_space,
    spectral_space,
)
from kfac_scratch.optimizer.two_level import (
    additive,
    adef1,
    adef2,
    bnn,
    coarse_inverse,
    coarse_matrix,
    joint_curvature,
    two_level,
)
from tests import nets
from tests.laws import check_differs, check_equal

DAMPING = 0.05
COMBINATIONS = (additive, adef1, adef2, bnn)
SPACES = (nicolaides_space, residual_space, spectral_space, krylov_space(nicolaides_space))
dependent = pytest.mark.filterwarnings("default:.*coarse directions are zero or depend")


class Problem:
    """A network with its exact damped curvature, and both levels as functions of flat vectors."""

    def __init__(self, model, loss, X, y, damping=DAMPING):
        self.model, self.damping, self.index = model, damping, block_index(model)
        self.ios = layer_ios(model, loss, X, y)
        F = ggn(model, loss, X, y)
        self.F = F + damping * torch.eye(len(F), dtype=F.dtype, device=F.device)
        self.maps = {name: kfac(io).inverse(damping) for name, io in self.ios.items()}
        self.product = joint_curvature(self.ios, damping)

    def split(self, v):
        return {name: v[index] for name, index in self.index.items()}

    def joined(self, X):
        v = self.F.new_zeros(len(self.F))
        for name, index in self.index.items():
            v[index] = X[name]
        return v

    def random(self):
        return torch.randn_like(self.F[0])

    def fine(self, r):
        return {name: self.maps[name] @ v for name, v in r.items()}

    def dense(self, Z):
        """The directions as columns."""
        columns = []
        for name, index in self.index.items():
            for z in Z[name]:
                column = torch.zeros_like(self.F[0])
                column[index] = z
                columns.append(column)
        return torch.stack(columns, 1)

    def space(self, make, r=None):
        return make(self.maps, self.split(self.random() if r is None else r))

    def step(self, r, combine=adef2, Z=None, make=nicolaides_space):
        Z = make(self.maps, self.split(r)) if Z is None else Z
        Q = coarse_inverse(self.ios, Z, self.damping)
        return self.joined(combine(self.fine, self.product, Q)(self.split(r)))

    def error(self, x, r):
        """Distance to the exact solution in the norm of the damped curvature."""
        e = x - torch.linalg.solve(self.F, r)
        return float(e @ self.F @ e)

    def everything(self):
        return {
            name: torch.eye(i.numel(), dtype=self.F.dtype, device=i.device).unflatten(1, i.shape)
            for name, i in self.index.items()
        }


def mlp_problem(device, loss=CrossEntropyLoss, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    model = Sequential(Linear(4, 6), Tanh(), Linear(6, 5), Tanh(), Linear(5, 3))
    X = torch.randn(11, 4)
    y = nets.targets(loss(), torch.randn(11, 3))
    model, X = model.to(device, dtype), X.to(device, dtype)
    y = y.to(device) if loss is CrossEntropyLoss else y.to(device, dtype)
    return Problem(model, loss(), X, y, **settings)


# ---- the curvature of all layers --------------------------------------------------------------


UNCOVERED = ("batch_norm_in_eval_mode", "layer_norm", "tied_to_embedding")


@pytest.mark.parametrize("net", [n for n in nets.NETS if str(n) not in UNCOVERED], ids=str)
def test_curvature_is_the_whole_ggn(net, device):
    """Cross-blocks included: convolutions, sequences, attention, tied weights, groups."""
    p = Problem(*nets.problem(net, device=device))
    v = p.random()
    check_equal(p.joined(p.product(p.split(v))), p.F @ v)
    E = coarse_matrix(p.ios, p.space(krylov_space(nicolaides_space)), p.damping)
    assert E.shape == (2 * len(p.ios), 2 * len(p.ios))


@pytest.mark.parametrize("loss", [MSELoss, CrossEntropyLoss, BCEWithLogitsLoss])
@pytest.mark.parametrize("space", SPACES)
def test_coarse_matrix_is_exact(loss, space, device):
    p = mlp_problem(device, loss)
    Z = p.space(space)
    check_equal(coarse_matrix(p.ios, Z, p.damping), p.dense(Z).T @ p.F @ p.dense(Z))


def test_coarse_damping_is_the_number_of_weights(device):
    """Not the identity: a direction of ones is as long as the block has weights."""
    p = mlp_problem(device)
    Z = p.space(nicolaides_space)
    damping = coarse_matrix(p.ios, Z, 1.0) - coarse_matrix(p.ios, Z, 0.0)
    check_equal(damping, torch.tensor([30.0, 35, 18], device=device).diag())


def test_factors_between_layers_are_not_exact(device):
    """Kronecker-approximated cross-blocks, as in the paper's code, give another coarse matrix."""
    p = mlp_problem(device)
    E = coarse_matrix(p.ios, p.space(nicolaides_space), 0.0)
    a = torch.stack([io.a[:, 0].sum(1) for io in p.ios.values()])  # [L, N]
    g = torch.stack([io.g[:, :, 0].sum(2) for io in p.ios.values()])  # [L, V, N]
    factored = a @ a.T / a.shape[1] * torch.einsum("kvn,lvn->kl", g, g)
    check_differs(factored, E, by=0.05)
    check_equal(torch.einsum("kn,kvn,lvn,ln->kl", a, g, g, a), E)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("space", SPACES)
@dependent
def test_the_coarse_inverse_is_z_e_inverse_z(space, dtype, device):
    p = mlp_problem(device, dtype=dtype)
    Z = p.space(space)
    Q, columns, v = coarse_inverse(p.ios, Z, p.damping), p.dense(Z), p.random()
    U, s, _ = torch.linalg.svd(columns / columns.norm(dim=0), full_matrices=False)
    U = U[:, s > 1e-5]  # a basis of the span: two directions of a layer may be the same
    expected = U @ torch.linalg.solve(U.T @ p.F @ U, U.T @ v)
    check_equal(p.joined(Q(p.split(v))), expected)


@dependent
def test_only_the_span_of_the_directions_counts(device):
    p = mlp_problem(device)
    Z, r = p.space(krylov_space(nicolaides_space)), p.random()
    mixed = {name: torch.stack([1e6 * z[0] + z[1], 1e-6 * z[1]]) for name, z in Z.items()}
    twice = {name: torch.cat([z, z, 0 * z]) for name, z in Z.items()}
    for other in (mixed, twice):
        error = (p.step(r, Z=other) - p.step(r, Z=Z)).norm() / p.step(r, Z=Z).norm()
        assert error < 1e-8
    Q = coarse_inverse(p.ios, {name: 0 * z for name, z in Z.items()}, p.damping)
    assert p.joined(Q(p.split(r))).abs().max() == 0


# ---- what is exact ----------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_an_empty_space_changes_nothing(combine, device):
    p = mlp_problem(device)
    empty = {name: z[:0] for name, z in p.space(nicolaides_space).items()}
    r = p.random()
    check_equal(p.step(r, combine, empty), p.joined(p.fine(p.split(r))))


def test_a_block_may_have_no_direction(device):
    p = mlp_problem(device)
    Z = p.space(krylov_space(nicolaides_space))
    Z = {**Z, "2": Z["2"][:0]}
    check_equal(coarse_matrix(p.ios, Z, p.damping), p.dense(Z).T @ p.F @ p.dense(Z))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_the_full_space_solves_exactly(combine, device):
    """The additive form then adds the fine step to the exact one."""
    p = mlp_problem(device)
    r = p.random()
    exact, step = torch.linalg.solve(p.F, r), p.step(r, combine, p.everything())
    if combine is additive:
        check_equal(step, exact + p.joined(p.fine(p.split(r))))
        check_differs(step, exact, by=0.1)
    else:
        check_equal(step, exact)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_gradients_from_the_coarse_space_are_solved_exactly(combine, device):
    """`r` in the span of `F Z`: by the forms that start with the coarse step."""
    p = mlp_problem(device)
    Z = p.space(nicolaides_space)
    x = p.dense(Z) @ torch.randn(3, device=device)
    check = check_equal if combine in (adef1, bnn) else check_differs
    check(p.step(p.F @ x, combine, Z), x)


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_nothing_is_left_in_the_coarse_space(combine, device):
    """For every `r`, by the forms that end with the coarse step."""
    p = mlp_problem(device)
    r, Z = p.random(), p.space(nicolaides_space)
    left = p.dense(Z).T @ (r - p.F @ p.step(r, combine, Z))
    size = (p.dense(Z).T @ r).abs().max()
    if combine in (adef2, bnn):
        assert left.abs().max() < 1e-12 * size
    else:
        assert left.abs().max() > 0.01 * size


@pytest.mark.parametrize("combine", COMBINATIONS)
@dependent
def test_a_perfect_fine_level_is_left_alone(combine, device):
    """One layer with its exact block."""
    torch.manual_seed(0)
    model, X = Sequential(Linear(4, 3)).to(device), torch.randn(11, 4, device=device)
    p = Problem(model, CrossEntropyLoss(), X, torch.randint(3, (11,), device=device))
    p.maps = {name: Dense(io.block()).inverse(DAMPING) for name, io in p.ios.items()}
    r = p.random()
    check = check_differs if combine is additive else check_equal
    for space in (nicolaides_space, krylov_space(nicolaides_space)):
        check(p.step(r, combine, make=space), torch.linalg.solve(p.F, r))


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_additive_and_bnn_are_symmetric_and_adef_are_not(combine, device):
    p = mlp_problem(device)
    Z = p.space(nicolaides_space)
    P = matrix(p, combine, Z)
    if combine in (additive, bnn):
        check_equal(P, P.T)
        assert torch.linalg.eigvalsh(P).min() > 0
    else:
        check_differs(P, P.T)


def test_adef1_and_adef2_are_transposes(device):
    p = mlp_problem(device)
    Z, r, v = p.space(nicolaides_space), p.random(), p.random()
    check_equal(p.step(r, adef1, Z) @ v, p.step(v, adef2, Z) @ r)


# ---- what is never worse ----------------------------------------------------------------------


def matrix(p, combine, Z):
    """A two-level map with a fixed space, as a matrix."""
    Q = coarse_inverse(p.ios, Z, p.damping)
    P = combine(p.fine, p.product, Q)
    unit = torch.eye(len(p.F), dtype=p.F.dtype, device=p.F.device)
    return torch.stack([p.joined(P(p.split(e))) for e in unit], 1)


def worse(p, combine, Z, trials=500):
    """In how many of many random gradients the error exceeds that of the fine level."""
    r = torch.randn(len(p.F), trials, dtype=p.F.dtype, device=p.F.device)
    exact = torch.linalg.solve(p.F, r)
    empty = {name: z[:0] for name, z in Z.items()}
    errors = []
    for space in (Z, empty):
        e = matrix(p, combine, space) @ r - exact
        errors.append((e * (p.F @ e)).sum(0))
    return int((errors[0] > errors[1] * (1 + 1e-12)).sum())


@pytest.mark.long
@pytest.mark.parametrize(
    "space",
    [
        nicolaides_space,
        spectral_space,
        krylov_space(nicolaides_space),
        krylov_space(spectral_space),
    ],
)
@dependent
def test_adef2_is_never_worse_than_its_fine_level(space, device):
    p = mlp_problem(device)
    assert worse(p, adef2, p.space(space)) == 0


@pytest.mark.parametrize("space", [residual_space, krylov_space(residual_space)])
def test_nor_with_a_space_that_depends_on_the_gradient(space, device):
    p = mlp_problem(device)
    for _ in range(30):
        r = p.random()
        one, two = p.joined(p.fine(p.split(r))), p.step(r, make=space)
        assert p.error(two, r) < p.error(one, r)


@pytest.mark.long
def test_adef2_is_never_worse_than_any_fine_level(device):
    """Even one that goes uphill."""
    p = mlp_problem(device)
    Z = p.space(nicolaides_space)
    for maps in (
        {name: ekfac(io).inverse(0.5) for name, io in p.ios.items()},
        {name: factored_inverse(kfac(io), DAMPING) for name, io in p.ios.items()},
        {name: Dense(-io.block()) for name, io in p.ios.items()},
    ):
        p.maps = maps
        assert worse(p, adef2, Z) == 0


def test_a_larger_space_is_never_worse(device):
    p = mlp_problem(device)
    for _ in range(20):
        r = p.random()
        small, large = p.step(r, make=residual_space), p.step(r, make=krylov_space(residual_space))
        assert p.error(large, r) <= p.error(small, r)


@pytest.mark.long
def test_the_others_may_be_worse(device):
    """The additive form in most cases."""
    p = mlp_problem(device, damping=0.01)
    found = {combine: worse(p, combine, p.space(nicolaides_space)) for combine in COMBINATIONS}
    assert found[adef2] == 0
    assert 100 < found[bnn] < 400 < found[additive]


def test_the_error_is_projected(device):
    """ADEF2 leaves `(I - Q F) e` of KFAC's error `e`: a projection, orthogonal in F's norm."""
    p = mlp_problem(device)
    r, Z = p.random(), p.dense(p.space(nicolaides_space))
    exact, x = torch.linalg.solve(p.F, r), p.joined(p.fine(p.split(r)))
    Pi = Z @ torch.linalg.solve(Z.T @ p.F @ Z, Z.T @ p.F)
    e = x - exact
    check_equal(p.step(r) - exact, e - Pi @ e)
    before, gone = p.error(x, r), (Pi @ e) @ p.F @ (Pi @ e)
    check_equal(gone, torch.as_tensor(before - p.error(p.step(r), r), device=device))


def test_residual_space_gives_every_block_its_best_length(device):
    """The minimum of the damped quadratic model over all lengths of the blocks' fine steps."""
    p = mlp_problem(device)
    r = p.random()
    Z = p.dense(p.space(residual_space, r))
    best = Z @ torch.linalg.solve(Z.T @ p.F @ Z, Z.T @ r)
    check_equal(p.step(r, make=residual_space), best)
    check_differs(best, Z.sum(1))


# ---- coarse spaces ----------------------------------------------------------------------------


def test_spectral_directions_are_the_flattest(device):
    """Eigenvectors of a block's KFAC with the least curvature, by both kinds of inverse."""
    p = mlp_problem(device, MSELoss)
    K = {name: kfac(io) for name, io in p.ios.items()}
    factored = {name: factored_inverse(M, DAMPING) for name, M in K.items()}
    for maps in (p.maps, factored):
        for name, (z,) in spectral_space(maps, p.split(p.random())).items():
            eigenvalues = K[name].eigenvalues()
            assert (K[name] @ z - eigenvalues[0] * z).abs().max() < 1e-10 * eigenvalues[-1]
            check_equal(z.norm(), torch.ones_like(z[0, 0]))


def test_spectral_needs_eigenvectors(device):
    p = mlp_problem(device)
    maps = {name: Dense(io.block()) for name, io in p.ios.items()}
    with pytest.raises(TypeError, match="The inverse of block '0', a Dense"):
        spectral_space(maps, p.split(p.random()))


def test_krylov_adds_what_the_fine_level_makes_of_a_space(device):
    p = mlp_problem(device)
    r = p.split(p.random())
    for name, Z in krylov_space(krylov_space(residual_space))(p.maps, r).items():
        x = p.maps[name] @ r[name]
        check_equal(Z[3], p.maps[name] @ (p.maps[name] @ x))
        check_equal(Z[0], x)
        assert len(Z) == 4


# ---- for a model ------------------------------------------------------------------------------


def gradients(model, loss, X, y):
    values = torch.autograd.grad(loss(model(X), y), list(model.parameters()))
    return dict(zip((name for name, _ in model.named_parameters()), values, strict=True))


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("net", ["mlp", "grouped_conv2d", "tied_weights", "embedding"])
def test_gradients_in_steps_out(net, space, device):
    problem = nets.problem(net, device=device)
    p, g = Problem(*problem), gradients(*problem)
    r = torch.cat([v.flatten() for v in g.values()])
    for combine in COMBINATIONS:
        step = two_level(p.model, p.ios, p.maps, DAMPING, space=space, combine=combine)(g)
        assert {n: v.shape for n, v in step.items()} == {n: v.shape for n, v in g.items()}
        check_equal(torch.cat([step[n].flatten() for n in g]), p.step(r, combine, make=space))


def test_by_default_one_direction_for_each_block_after_the_fine_step(device):
    problem = nets.problem("mlp", device=device)
    p, g = Problem(*problem), gradients(*problem)
    r = torch.cat([v.flatten() for v in g.values()])
    step = two_level(p.model, p.ios, p.maps, DAMPING)(g)
    check_equal(torch.cat([step[n].flatten() for n in g]), p.step(r, adef2, make=nicolaides_space))


def test_without_directions_it_is_one_level(device):
    problem = nets.problem("conv2d", device=device)
    p, g = Problem(*problem), gradients(*problem)

    def empty(maps, r):
        return {name: v[:0].unsqueeze(1).expand(0, *v.shape) for name, v in r.items()}

    two = two_level(p.model, p.ios, p.maps, DAMPING, space=empty)(g)
    for name, v in preconditioner(p.model, p.maps)(g).items():
        check_equal(two[name], v)


def test_other_parameters_need_a_rule(device):
    problem = nets.problem("layer_norm", device=device)
    with pytest.warns(UserWarning, match="1.weight"):
        ios = layer_ios(*problem)
    model = problem[0]
    maps = {name: kfac(io).inverse(DAMPING) for name, io in ios.items()}
    g = gradients(*problem)
    with pytest.raises(ValueError, match=r"No block covers \['1.weight', '1.bias'\]"):
        two_level(model, ios, maps, DAMPING)(g)
    step = two_level(model, ios, maps, DAMPING, rest=lambda v: 2 * v)(g)
    check_equal(step["1.weight"], 2 * g["1.weight"])


def test_blocks_that_do_not_match_are_refused(device):
    p = mlp_problem(device)
    without = {name: M for name, M in p.maps.items() if name != "2"}
    with pytest.raises(ValueError, match="Two levels need the same blocks"):
        two_level(p.model, p.ios, without, DAMPING)
    with pytest.raises(ValueError, match="Two levels need the same blocks"):
        two_level(p.model, {**p.ios, "x": p.ios["2"]}, p.maps, DAMPING)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        two_level(p.model, p.ios, p.maps, -1.0)


@dependent
def test_a_zero_gradient_gives_no_step(device):
    p = mlp_problem(device)
    for space in SPACES:
        for combine in COMBINATIONS:
            assert p.step(torch.zeros_like(p.F[0]), combine, make=space).abs().max() == 0


@pytest.mark.parametrize("combine", COMBINATIONS)
def test_two_levels_in_float32(combine, device):
    p, q = mlp_problem(device, dtype=torch.float32), mlp_problem(device)
    r = q.random()
    step = partial(p.step, r.float(), combine)
    for space in (nicolaides_space, residual_space):
        check_equal(step(make=space), q.step(r, combine, make=space).float())


def test_arguments_stay_as_they_are(device):
    problem = nets.problem("mlp", device=device)
    p, g = Problem(*problem), gradients(*problem)
    kept = {name: v.clone() for name, v in g.items()}
    ios = {name: (io.a.clone(), io.g.clone()) for name, io in p.ios.items()}
    for combine in COMBINATIONS:
        two_level(p.model, p.ios, p.maps, DAMPING, combine=combine)(g)
    assert all(torch.equal(g[name], v) for name, v in kept.items())
    assert all(
        torch.equal(p.ios[n].a, a) and torch.equal(p.ios[n].g, b) for n, (a, b) in ios.items()
    )


def test_dependent_and_zero_coarse_directions_are_named_and_change_nothing(device):
    ios = {
        "0": LayerIO(torch.randn(7, 1, 4, device=device), torch.randn(2, 7, 1, 3, device=device))
    }
    Z, r = torch.randn(2, 3, 4, device=device), {"0": torch.randn(3, 4, device=device)}
    more = torch.cat([Z, Z.sum(0, keepdim=True), 0 * Z[:1]])
    with pytest.warns(UserWarning, match="2 of 4 coarse directions.*has dimension 2"):
        step = coarse_inverse(ios, {"0": more}, 0.1)(r)
    check_equal(step["0"], coarse_inverse(ios, {"0": Z}, 0.1)(r)["0"])
