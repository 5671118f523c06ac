from itertools import pairwise

import pytest
import torch

from kfac_scratch.approximations.cg_fac import (
    Gradients,
    TruncatedInverse,
    cg_fac,
    gradient_kernel,
    kernel_inverse,
    same_batch_step,
    truncated_inverse,
)
from kfac_scratch.approximations.estimators import Latest, MovingAverage
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.skfac import skfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.linalg import conjugate_gradient
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.optimizer.checkpoints import restored, tensors
from tests.cases import CONV_PER_LOCATION, NONLINEAR, one_position
from tests.laws import check_differs, check_equal, check_matrix

D_IN, D_OUT = 7, 5
SIZES = pytest.mark.parametrize(("N", "S", "V"), [(1, 1, 1), (3, 1, 1), (4, 1, 2), (2, 3, 2)])


def random_io(device, N=3, S=1, V=1, dtype=torch.float64):
    a = torch.randn(N, S, D_IN, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(V, N, S, D_OUT, device=device, dtype=dtype))


def gradient(device, *batch, dtype=torch.float64):
    return torch.randn(*batch, D_OUT, D_IN, device=device, dtype=dtype)


def exact_step(M, damping, G):
    """By the dense matrix."""
    return Dense(M.dense()).inverse(damping) @ G


def relative(M, fraction):
    """A fraction of the mean eigenvalue."""
    return fraction * float(M.diagonal().mean())


class Counted:
    """A matrix that counts its products."""

    def __init__(self, M):
        self.M, self.count = M, 0

    def __matmul__(self, V):
        self.count += 1
        return self.M @ V


# ---- products -----------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_operators_are_the_dense_products(N, S, V, dtype, device):
    io, X = random_io(device, N, S, V, dtype), gradient(device, 2, dtype=dtype)
    for M, dense in ((cg_fac(io), io.block()), (skfac(io), kfac(io).dense())):
        check_equal(M @ X, (X.flatten(1) @ dense).reshape(X.shape))
        check_equal(M @ X[1], (M @ X)[1])


@SIZES
def test_products_and_sums_are_those_of_the_gradients(N, S, V, device):
    io, X = random_io(device, N, S, V), gradient(device, 2)
    c = torch.randn(3, V, N, device=device)
    check_equal(io.inner_products(X), torch.einsum("vnoi,boi->bvn", io.gradients(), X))
    check_equal(io.combination(c), torch.einsum("vnoi,bvn->boi", io.gradients(), c))
    G = io.gradients().flatten(0, 1).flatten(1)
    check_equal(gradient_kernel(io), G @ G.T)


@pytest.mark.parametrize("view", [lambda io: io, one_position])
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
def test_obeys_the_laws_of_matrices(case, view, device):
    for io in layer_ios(*case.build(device)).values():
        M = cg_fac(view(io))
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))
        check_equal(M.dense(), view(io).block())
        check_equal(M.trace(), M.dense().trace())
        check_equal(M.diagonal(), M.dense().diagonal())


def test_obeys_the_laws_in_single_precision(device):
    check_matrix(cg_fac(random_io(device, dtype=torch.float32)), (D_OUT, D_IN), damping=1.0)


def test_the_operators_differ_by_pairs_of_different_data(device):
    """Of `g_n^T V a_m`, the exact block uses `n = m`, KFAC all pairs."""
    io, X = random_io(device, N=4), gradient(device)
    a, g = io.a.squeeze(1), io.g.squeeze(2).squeeze(0)
    pairs = g @ X @ a.T
    check_equal(cg_fac(io) @ X, g.T @ pairs.diagonal().diag() @ a)
    check_equal(skfac(io) @ X, g.T @ pairs @ a / 4)
    check_differs(cg_fac(io) @ X, skfac(io) @ X)


def test_the_operators_coincide_for_one_datum(device):
    io, X = random_io(device, N=1, V=3), gradient(device)
    check_equal(cg_fac(io) @ X, skfac(io) @ X)
    check_equal(truncated_inverse(skfac(io), 0.1, 4) @ X, truncated_inverse(cg_fac(io), 0.1, 4) @ X)


# ---- converged ----------------------------------------------------------------------------------


@SIZES
def test_every_solver_gives_the_dense_solution(N, S, V, device):
    io, X = random_io(device, N, S, V), gradient(device, 2)
    M = cg_fac(io)
    for damping in (0.01, 1.0):
        right = exact_step(M, damping, X)
        check_equal(M.inverse(damping) @ X, right)
        check_equal(kernel_inverse(M, damping) @ X, right)
        check_equal(kernel_inverse(M, damping) @ X[1], right[1])
        check_equal(truncated_inverse(M, damping, 50, 1e-13) @ X, right)


@SIZES
def test_the_kronecker_operator_converges_to_kfac(N, S, V, device):
    io, X = random_io(device, N, S, V), gradient(device)
    found = truncated_inverse(skfac(io), 0.1, 100, 1e-13) @ X
    check_equal(found, kfac(io).inverse(0.1) @ X)


@SIZES
def test_the_step_of_the_batch_itself(N, S, V, device):
    io, c = random_io(device, N, S, V), torch.randn(V, N, device=device)
    G = torch.einsum("vn,vnoi->oi", c, io.gradients())
    for damping in (0.01, 1.0):
        check_equal(same_batch_step(io, c, damping), exact_step(cg_fac(io), damping, G))


@pytest.mark.parametrize(("N", "S", "V"), [(3, 1, 1), (6, 1, 1), (3, 1, 2), (3, 4, 2)])
def test_one_step_for_each_different_eigenvalue(N, S, V, device):
    """K gradients: the eigenvalues of `F + damping * I` are K numbers and the damping itself."""
    io, X = random_io(device, N, S, V), gradient(device)
    K, right = V * N, exact_step(cg_fac(io), 1.0, X)
    check_equal(truncated_inverse(cg_fac(io), 1.0, K + 1, 0.0) @ X, right)
    check_differs(truncated_inverse(cg_fac(io), 1.0, K - 1, 0.0) @ X, right, by=1e-4)
    G = io.combination(torch.randn(V, N, device=device))  # of the batch itself: one step less
    right = exact_step(cg_fac(io), 1.0, G)
    check_equal(truncated_inverse(cg_fac(io), 1.0, K, 0.0) @ G, right)


def test_the_kronecker_operator_has_many_more_eigenvalues(device):
    io, X = random_io(device, N=4), gradient(device)
    found = truncated_inverse(skfac(io), 1.0, 5, 0.0) @ X
    check_differs(found, kfac(io).inverse(1.0) @ X)


def test_duplicated_data_are_one_eigenvalue(device):
    io, X = random_io(device), gradient(device)
    twice = concatenate([io, io], [1.0, 1.0])
    twice = LayerIO(twice.a, twice.g / 2**0.5)
    right = exact_step(cg_fac(io), 1.0, X)
    check_equal(truncated_inverse(cg_fac(twice), 1.0, 4, 0.0) @ X, right)
    check_equal(kernel_inverse(cg_fac(twice), 1.0) @ X, right)
    check_equal(cg_fac(twice).inverse(1.0) @ X, right)


def test_cg_fac_of_a_zero_batch_divides_by_the_damping(device):
    io, X = random_io(device), gradient(device)
    M = cg_fac(LayerIO(0 * io.a, io.g))
    for inverse in (M.inverse(0.1), kernel_inverse(M, 0.1), truncated_inverse(M, 0.1)):
        check_equal(inverse @ X, 10 * X)


# ---- a few steps --------------------------------------------------------------------------------


def quadratic(M, damping, X, G):
    """The damped parabola that the exact step minimises."""
    return ((M @ X + damping * X) * X).sum() / 2 - (X * G).sum()


@pytest.mark.parametrize("make", [cg_fac, skfac])
def test_one_step_is_an_exact_line_search_along_the_gradient(make, device):
    M, G = make(random_io(device, N=6)), gradient(device)
    best = (G * G).sum() / ((M @ G + 0.1 * G) * G).sum()
    check_equal(truncated_inverse(M, 0.1, max_iter=1) @ G, best * G)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("make", [cg_fac, skfac])
def test_every_number_of_steps_descends_and_more_steps_more(make, seed, device):
    torch.manual_seed(seed)
    M, G = make(random_io(device, N=8)), gradient(device)
    damping = relative(M, 1e-3)
    steps = [truncated_inverse(M, damping, k, tol=0.0) @ G for k in range(1, 12)]
    inner = [float((P * G).sum()) for P in steps]
    values = [float(quadratic(M, damping, P, G)) for P in steps]
    assert min(inner) > 0
    slack = 1e-9 * abs(values[-1])
    assert all(new <= old + slack for old, new in pairwise(values))
    assert values[0] < 0


def test_steps_minimise_over_a_krylov_space(device):
    M, G, k = cg_fac(random_io(device, N=8)), gradient(device), 4
    powers = [G.flatten()]
    for _ in range(k - 1):
        powers.append((M @ powers[-1].reshape(G.shape)).flatten() + 0.1 * powers[-1])
    basis = torch.linalg.qr(torch.stack(powers, 1)).Q
    damped = M.dense() + 0.1 * torch.eye(D_OUT * D_IN, device=device)
    best = basis @ torch.linalg.solve(basis.T @ damped @ basis, basis.T @ G.flatten())
    check_equal(truncated_inverse(M, 0.1, k, 0.0) @ G, best.reshape(G.shape))


def test_a_nonzero_start_may_go_uphill(device):
    """Why there is no warm start: from another start than zero, nothing is promised."""
    M, G = cg_fac(random_io(device)), gradient(device)
    start = -10 * G
    moved = start + truncated_inverse(M, 0.1, 1) @ (G - (M @ start + 0.1 * start))
    assert (moved * G).sum() < 0


def test_stops_at_the_tolerance_of_the_norm_not_of_its_square(device):
    M, G = cg_fac(random_io(device, N=20)), gradient(device)
    damping, tol = relative(M, 1e-2), 0.1

    def residual(k, tol):
        P = truncated_inverse(M, damping, k, tol) @ G
        return float((G - (M @ P + damping * P)).norm() / G.norm())

    enough = next(k for k in range(1, 50) if residual(k, 0.0) <= tol)
    stopped = truncated_inverse(M, damping, 50, tol) @ G
    check_equal(stopped, truncated_inverse(M, damping, enough, 0.0) @ G)
    squared = next(k for k in range(1, 50) if residual(k, 0.0) <= tol**0.5)
    assert squared < enough


def test_a_batch_is_its_members_though_they_stop_at_different_times(device):
    io = random_io(device, N=6)
    easy, hard = io.combination(torch.eye(6, device=device)[:1]), gradient(device)
    V = torch.stack([easy, hard, 0 * hard, 1e-9 * hard])
    inverse = truncated_inverse(cg_fac(io), 0.1, 30, tol=0.05)
    together = inverse @ V
    for k in (0, 1, 3):
        check_equal(together[k], inverse @ V[k])
    assert not together[2].any()
    check_equal(together[3], 1e-9 * together[1])


@pytest.mark.parametrize("size", [1e-200, 1e-310, 1e150])
def test_no_square_of_a_gradient_underflows(size, device):
    M, G = cg_fac(random_io(device)), gradient(device)
    inverse = truncated_inverse(M, 0.1, max_iter=200, tol=0.0)  # far beyond convergence
    check_equal(inverse @ (size * G) / size, inverse @ G)


@pytest.mark.parametrize(("dtype", "damping"), [(torch.float32, 1e-3), (torch.float64, 1e-8)])
def test_a_residual_that_underflows_is_no_negative_curvature(dtype, damping, device):
    for seed in range(20):
        torch.manual_seed(seed)
        M, G = cg_fac(random_io(device, dtype=dtype)), gradient(device, dtype=dtype)
        assert (truncated_inverse(M, damping, 300, tol=0.0) @ G).isfinite().all()


def test_a_truncated_inverse_is_not_a_linear_map(device):
    M, (X, Y) = cg_fac(random_io(device, N=8)), gradient(device, 2)
    inverse = truncated_inverse(M, 0.1, max_iter=2)
    check_differs(inverse @ (X + Y), inverse @ X + inverse @ Y)
    check_equal(inverse @ (3 * X), 3 * (inverse @ X))


def test_does_one_product_a_step(device):
    counted = Counted(cg_fac(random_io(device, N=8)))
    TruncatedInverse(counted, 0.1, max_iter=5, tol=0.0) @ gradient(device)
    assert counted.count == 5


@pytest.mark.parametrize("seed", range(6))
def test_kfac_as_a_preconditioner_helps_first_and_hurts_later(seed, device):
    """It starts nearer to the solution, and spreads what were seven different eigenvalues."""
    torch.manual_seed(seed)
    io = random_io(device, N=6)
    sizes_a, sizes_g = (torch.logspace(0, -1.5, d, device=device) for d in (D_IN, D_OUT))
    io = LayerIO(io.a * sizes_a, io.g * sizes_g)
    M, G = cg_fac(io), gradient(device)
    damping = relative(M, 1e-2)
    right, K = exact_step(M, damping, G), kfac(io).inverse(damping)

    def error(k, preconditioner):
        P = TruncatedInverse(M, damping, k, 0.0, preconditioner) @ G
        return float((P - right).norm() / right.norm())

    def steps(preconditioner):
        counted = Counted(M)
        TruncatedInverse(counted, damping, 500, 1e-9, preconditioner) @ G
        return counted.count

    assert error(1, K) < 0.8 * error(1, None)
    assert steps(K) > 2 * steps(None)


def test_a_preconditioner_does_not_change_the_solution(device):
    io, G = random_io(device), gradient(device)
    M = cg_fac(io)
    found = TruncatedInverse(M, 0.5, 200, 1e-13, kfac(io).inverse(0.5)) @ G
    check_equal(found, exact_step(M, 0.5, G))


# ---- borders ------------------------------------------------------------------------------------


def test_negative_curvature_is_an_error_not_a_plain_gradient(device):
    with pytest.raises(ValueError, match="negative curvature"):
        conjugate_gradient(lambda X: -X, gradient(device), lambda R: R, 5, 0.1)


def test_a_singular_matrix_has_no_undamped_inverse(device):
    with pytest.raises(ValueError, match="pass a positive damping"):
        cg_fac(random_io(device)).inverse(0.0)
    M, G = cg_fac(random_io(device, N=80)), gradient(device)
    check_equal(M.inverse(0.0) @ (M @ G), G)


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_dampings_that_have_no_inverse_are_refused(damping, device):
    M = cg_fac(random_io(device))
    for make in (M.inverse, lambda d: truncated_inverse(M, d)):
        with pytest.raises(ValueError, match="at least 0"):
            make(damping)
    for bad in (damping, 0.0):
        with pytest.raises(ValueError, match="positive damping"):
            kernel_inverse(M, bad)
        with pytest.raises(ValueError, match="positive damping"):
            same_batch_step(M.U, torch.ones(1, 3, device=device), bad)


def test_a_damping_lost_in_round_off_is_refused(device):
    io = LayerIO(
        torch.full((4, 1, D_IN), 1e3, device=device), torch.full((1, 4, 1, 4), 1e3, device=device)
    )
    with pytest.raises(ValueError, match="inverse"):
        kernel_inverse(cg_fac(io), 1e-12)


@pytest.mark.parametrize("max_iter", [0, -1])
def test_at_least_one_step(max_iter, device):
    with pytest.raises(ValueError, match="at least 1 step"):
        truncated_inverse(cg_fac(random_io(device)), 0.1, max_iter)


def test_rows_are_never_averaged(device):
    io = random_io(device)
    with pytest.raises(TypeError, match="averaged"):
        MovingAverage(cg_fac).update(cg_fac(io), io, 0.5)
    M = Latest(cg_fac).update(cg_fac(random_io(device)), io, 0.5)
    check_equal(M.dense(), io.block())


def test_cg_fac_survives_a_checkpoint(device):
    M, other = cg_fac(random_io(device)), cg_fac(random_io(device, N=5))
    check_equal(restored(other, tensors(M)).dense(), M.dense())
    assert isinstance(restored(other, tensors(M)), Gradients)


def test_never_forms_a_block_or_a_gradient(device):
    """For 100000 inputs, 10 outputs and 16 data, a block would need eight terabytes."""
    io = LayerIO(
        torch.randn(16, 1, 100_000, device=device) / 300, torch.randn(1, 16, 1, 10).to(device)
    )
    c = torch.ones(1, 16, device=device)
    G = io.combination(c)
    assert (truncated_inverse(cg_fac(io), 1.0, 2) @ G).isfinite().all()
    step = same_batch_step(io, c, 1.0)
    check_equal(cg_fac(io) @ step + step, G)
