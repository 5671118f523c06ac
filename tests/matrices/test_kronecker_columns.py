import pytest
import torch

from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_columns import (
    KroneckerColumns,
    gram_root,
    reduced_columns,
)
from tests.laws import check_differs, check_equal, check_matrix

D_IN, D_OUT = 7, 5
COLUMNS = pytest.mark.parametrize("columns", [(3, 2), (1, 1), (7, 2), (3, 5), (11, 6)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def example(device, columns=(3, 2), dtype=torch.float64):
    return KroneckerColumns(
        torch.randn(D_IN, columns[0], device=device, dtype=dtype),
        torch.randn(D_OUT, columns[1], device=device, dtype=dtype),
    )


def twin(M):
    return Kronecker(M.UA @ M.UA.T, M.UB @ M.UB.T)


def on_basis(inverse, like):
    """A linear map as a dense matrix."""
    eye = eye_like(like.dense())
    return (inverse @ eye.unflatten(1, (D_OUT, D_IN))).flatten(1)


@COLUMNS
@DTYPES
def test_obeys_the_laws_of_matrices(columns, dtype, device):
    M = example(device, columns, dtype)
    check_matrix(M, (D_OUT, D_IN), damping=1.0)
    check_equal(M.dense(), twin(M).dense())
    check_equal(M.trace(), twin(M).trace())
    check_equal(M.diagonal(), twin(M).diagonal())
    check_equal(M.low_rank().dense(), twin(M).dense())
    check_equal(M.inverse(0.1).dense(), twin(M).inverse(0.1).dense())


@COLUMNS
@DTYPES
def test_woodbury_is_the_dense_inverse_of_the_damped_factors(columns, dtype, device):
    """Exact for any number of columns, also for more than the factor has rows."""
    M = example(device, columns, dtype)
    A, B = twin(M).A, twin(M).B
    expected = Kronecker(
        torch.linalg.inv(A + 0.3 * eye_like(A)), torch.linalg.inv(B + 0.7 * eye_like(B))
    )
    inverse = M.inverse_of_damped_factors(0.3, 0.7)
    V = torch.randn(3, D_OUT, D_IN, device=device, dtype=dtype)
    check_equal(on_basis(inverse, M), expected.dense())
    check_equal(inverse @ V, expected @ V)
    check_equal(inverse @ V[1], (inverse @ V)[1])


@COLUMNS
def test_factored_woodbury_is_the_factored_inverse(columns, device):
    M = example(device, columns)
    check_equal(on_basis(factored_inverse(M, 0.1), M), factored_inverse(twin(M), 0.1).dense())


@pytest.mark.parametrize("columns", [(3, 2), (11, 6)])
def test_factored_is_not_exact_damping(columns, device):
    M = example(device, columns)
    check_differs(on_basis(factored_inverse(M, 0.1), M), M.inverse(0.1).dense())


def test_factored_woodbury_is_invariant_to_the_split_of_the_scale(device):
    M, V = example(device), torch.randn(D_OUT, D_IN, device=device)
    other = KroneckerColumns(3 * M.UA, M.UB / 3)
    check_equal(factored_inverse(other, 0.1) @ V, factored_inverse(M, 0.1) @ V)


@pytest.mark.parametrize("zero", ["UA", "UB"])
def test_a_zero_factor_is_damped_all_the_same(zero, device):
    M, V = example(device), torch.randn(D_OUT, D_IN, device=device)
    M = KroneckerColumns(*(0 * U if name == zero else U for name, U in vars(M).items()))
    check_equal(factored_inverse(M, 0.1) @ V, factored_inverse(twin(M), 0.1) @ V)
    check_equal(M.inverse(0.1) @ V, 10 * V)


@pytest.mark.parametrize("K", [1, 6, 7, 8, 30])
def test_few_columns_have_the_same_gram(K, device):
    U = torch.randn(D_IN, K, device=device)
    assert reduced_columns(U).shape == (D_IN, min(K, D_IN))
    check_equal(reduced_columns(U) @ reduced_columns(U).T, U @ U.T)


def test_dependent_columns_have_an_exact_inverse(device):
    """Duplicates and zeros: fewer eigenvalues than columns, and no round-off among them."""
    M = example(device)
    double = KroneckerColumns(
        torch.cat([M.UA, M.UA, 0 * M.UA], 1) / 2**0.5, torch.cat([M.UB, 0 * M.UB], 1)
    )
    low_rank = double.low_rank()
    assert (low_rank.dA > 0).sum() == M.UA.shape[1]
    assert (low_rank.dB > 0).sum() == M.UB.shape[1]
    for U in (low_rank.UA, low_rank.UB):
        check_equal(U.T @ U, eye_like(U.T @ U))
    V = torch.randn(D_OUT, D_IN, device=device)
    check_equal(double.inverse(1e-6) @ V, M.inverse(1e-6) @ V)
    check_equal(
        double.inverse_of_damped_factors(0.1, 0.2) @ V, M.inverse_of_damped_factors(0.1, 0.2) @ V
    )


def test_eigenvectors_are_orthonormal_where_those_of_the_gram_matrix_are_not(device):
    """Squaring the columns first loses the small eigenvectors: not done here."""
    Q = torch.linalg.qr(torch.randn(D_IN, D_IN, device=device)).Q
    scale = torch.logspace(0, -10, D_IN, device=device)
    U = Q * scale @ torch.linalg.qr(torch.randn(D_IN, D_IN, device=device)).Q.T
    found = KroneckerColumns(U, U).low_rank().UA
    check_equal(found.T @ found, eye_like(found))
    w, P = torch.linalg.eigh(U.T @ U)
    naive = U @ P / w.clamp_min(1e-300).sqrt()
    check_differs(naive.T @ naive, eye_like(found))


def test_a_singular_matrix_has_no_undamped_inverse(device):
    with pytest.raises(ValueError, match="pass a positive damping"):
        example(device, (3, 2)).inverse(0.0)
    repeated = KroneckerColumns(torch.ones(2, 2, device=device), torch.ones(1, 1, device=device))
    with pytest.raises(ValueError, match="pass a positive damping"):
        repeated.inverse(0.0)
    M, V = example(device, (9, 8)), torch.randn(D_OUT, D_IN, device=device)
    check_equal(M.inverse(0.0) @ (M @ V), V)


@pytest.mark.parametrize("damping", [0.0, -0.1, float("nan")])
def test_dampings_that_are_not_positive_are_refused(damping, device):
    M = example(device)
    with pytest.raises(ValueError, match="positive damping"):
        factored_inverse(M, damping)
    with pytest.raises(ValueError, match="positive damping"):
        M.inverse_of_damped_factors(damping, 1.0)
    with pytest.raises(ValueError, match="positive damping"):
        M.inverse_of_damped_factors(1.0, damping)


def test_a_damping_lost_in_round_off_is_refused(device):
    columns = 1000 * torch.ones(3, 4, device=device)
    with pytest.raises(ValueError, match="exact inverse"):
        gram_root(columns, 1e-12)
    M, V = KroneckerColumns(columns, torch.ones(1, 1, device=device)), torch.randn(1, 3).to(device)
    mean = V.mean().expand(1, 3)  # what the message points to works
    check_equal(M.inverse(1e-3) @ V, (V - mean) / 1e-3 + mean / (12e6 + 1e-3))


def test_non_finite_columns_are_refused(device):
    M = example(device)
    M.UA[0, 0] = float("nan")
    with pytest.raises(ValueError, match="non-finite"):
        M.inverse(0.1)


def test_no_square_matrix_is_needed(device):
    """A million inputs: any matrix of that size would need eight terabytes."""
    d = 1_000_000
    UA = torch.zeros(d, 2, device=device)
    UA[3, 0], UA[7, 1] = 2, 3
    one = torch.ones(1, 1, device=device)
    M, V = KroneckerColumns(UA, one), torch.ones(1, d, device=device)
    expected = torch.tensor([0.2, 0.1, 1.0], device=device)
    check_equal((M.inverse(1.0) @ V)[0, [3, 7, 8]], expected)
    check_equal((M.inverse_of_damped_factors(1.0, 1.0) @ V)[0, [3, 7, 8]], expected / 2)
