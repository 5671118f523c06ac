import pytest
import torch

from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.low_rank import LowRankKronecker
from kfac_scratch.optimizer.checkpoints import restored, tensors
from tests.laws import check_differs, check_equal, check_matrix

D_IN, D_OUT = 5, 3
RANKS = pytest.mark.parametrize("ranks", [(2, 1), (0, 2), (2, 0), (0, 0), (5, 2), (2, 3), (5, 3)])
TAILS = pytest.mark.parametrize("tails", [(0.0, 0.0), (0.3, 0.0), (0.0, 0.7), (0.3, 0.7)])


def example(device, ranks=(2, 1), tails=(0.3, 0.7), dtype=torch.float64):
    factors = []
    for d, r, c in zip((D_IN, D_OUT), ranks, tails, strict=True):
        Q = torch.linalg.qr(torch.randn(d, d, device=device, dtype=dtype)).Q
        values = 1 + torch.arange(r, device=device, dtype=dtype)
        factors += [Q[:, :r], values, torch.tensor(c, device=device, dtype=dtype)]
    return LowRankKronecker(*factors)


def by_loop(U, d, c):
    """A factor as a sum over its eigenpairs."""
    A = c * eye_like(U @ U.T)
    for u, value in zip(U.T, d, strict=True):
        A = A + (value - c) * torch.outer(u, u)
    return A


def twin(M):
    return Kronecker(by_loop(M.UA, M.dA, M.cA), by_loop(M.UB, M.dB, M.cB))


@RANKS
@TAILS
def test_obeys_the_laws_of_matrices(ranks, tails, device):
    M = example(device, ranks, tails)
    if twin(M).dense().any():
        check_matrix(M, (D_OUT, D_IN))
        check_equal(M.dense(), twin(M).dense())
        check_equal(M.trace(), twin(M).trace())
        check_equal(M.diagonal(), twin(M).diagonal())
        check_equal(M.eigen().dense(), twin(M).dense())
    check_equal(M.inverse(0.1).dense(), twin(M).inverse(0.1).dense())


@RANKS
def test_obeys_the_laws_in_single_precision(ranks, device):
    check_matrix(example(device, ranks, dtype=torch.float32), (D_OUT, D_IN))


@pytest.mark.parametrize("ranks", [(2, 1), (5, 2), (2, 3), (5, 3)])
def test_factored_inverse_inverts_both_damped_factors(ranks, device):
    M, V = example(device, ranks), torch.randn(2, D_OUT, D_IN, device=device)
    A, B = M.factors()
    damped = Kronecker(A + 0.2 * eye_like(A), B + 0.7 * eye_like(B))
    inverse = M.inverse_of_damped_factors(0.2, 0.7)
    check_equal(inverse @ (damped @ V), V)
    check_equal(inverse.dense(), torch.linalg.inv(damped.dense()))
    check_differs(inverse.dense(), M.inverse(0.2 * 0.7).dense())


@pytest.mark.parametrize("ranks", [(5, 3), (5, 1), (2, 3)])
def test_full_rank_needs_no_damping_and_no_tail(ranks, device):
    """An eigenvalue of nothing is not divided by; one that belongs to something is."""
    tails = (0.0 if ranks[0] == D_IN else 0.3, 0.0 if ranks[1] == D_OUT else 0.7)
    M, V = example(device, ranks, tails), torch.randn(D_OUT, D_IN, device=device)
    check_equal(M.inverse(0.0) @ (M @ V), V)


@pytest.mark.parametrize("ranks", [(2, 3), (5, 1), (2, 1), (0, 0)])
def test_a_singular_matrix_has_no_undamped_inverse(ranks, device):
    with pytest.raises(ValueError, match="pass a positive damping"):
        example(device, ranks, tails=(0.0, 0.0)).inverse(0.0)


@pytest.mark.parametrize("damping", [-0.1, float("nan")])
def test_dampings_without_an_inverse_are_refused(damping, device):
    with pytest.raises(ValueError, match="at least 0"):
        example(device).inverse(damping)
    with pytest.raises(ValueError, match="two positive dampings"):
        example(device).inverse_of_damped_factors(damping, 1.0)
    with pytest.raises(ValueError, match="two positive dampings"):
        example(device).inverse_of_damped_factors(1.0, 0.0)


def test_no_square_matrix_is_needed(device):
    """A million inputs: any matrix of that size would need eight terabytes."""
    d = 1_000_000
    U = torch.zeros(d, 2, device=device)
    U[3, 0] = U[7, 1] = 1
    zero = torch.zeros((), device=device)
    values = torch.tensor([4.0, 9.0], device=device)
    one = torch.ones(1, 1, device=device)
    M = LowRankKronecker(U, values, zero, one, one[0], zero)
    V = torch.ones(1, d, device=device)
    check_equal((M.inverse(1.0) @ V)[0, [3, 7, 8]], torch.tensor([0.2, 0.1, 1.0], device=device))
    check_equal(M.trace(), torch.tensor(13.0, device=device))


def test_bases_are_never_averaged(device):
    io = LayerIO(torch.randn(2, 1, D_IN, device=device), torch.randn(1, 2, 1, D_OUT, device=device))
    average = MovingAverage(lambda _: example(device))
    with pytest.raises(TypeError, match="no method mixed"):
        average.update(example(device), io, 0.5)


def test_a_low_rank_matrix_survives_a_checkpoint(device):
    M, other = example(device), example(device)
    check_equal(restored(other, tensors(M)).dense(), M.dense())


def test_four_blocks_are_an_eigendecomposition(device):
    M = example(device, ranks=(2, 2))
    E, x, y = M.eigen(), torch.linalg.svd(M.UA.T).Vh[-1], torch.linalg.svd(M.UB.T).Vh[-1]
    for i in range(2):
        check_equal(M @ torch.outer(M.UB[:, i], x), E.left[i] * torch.outer(M.UB[:, i], x))
        check_equal(M @ torch.outer(y, M.UA[:, i]), E.right[i] * torch.outer(y, M.UA[:, i]))
        for j in range(2):
            G = torch.outer(M.UB[:, i], M.UA[:, j])
            check_equal(M @ G, E.both[i, j] * G)
    check_equal(M @ torch.outer(y, x), E.rest * torch.outer(y, x))
