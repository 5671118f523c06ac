import pytest
import torch

from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.low_rank_update import brand_update, split_by_span
from tests.laws import check_equal, error


def orthonormal(device, d, r, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(d, r, device=device, dtype=dtype)).Q


def dense(U, d):
    return U * d @ U.T


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("K", [1, 4, 13])
@pytest.mark.parametrize("r", [0, 1, 7])
def test_an_update_is_an_eigendecomposition(r, K, dtype, device):
    U = orthonormal(device, 20, r, dtype)
    d = torch.arange(1.0, r + 1, device=device, dtype=dtype)
    X = torch.randn(20, K, device=device, dtype=dtype)
    new, w = brand_update(U, d, X)
    assert new.shape == (20, r + K)
    check_equal(new.T @ new, torch.eye(r + K, device=device, dtype=dtype))
    check_equal(dense(new, w), dense(U, d) + X @ X.T)
    assert (w.diff() <= 0).all()


def test_split_is_by_the_span(device):
    U, X = orthonormal(device, 20, 7), torch.randn(20, 4, device=device)
    C, Q, R = split_by_span(U, X)
    check_equal(U @ C + Q @ R, X)
    check_equal(U @ C, U @ U.T @ X)
    assert (U.T @ Q).abs().max() < 1e-14
    check_equal(Q.T @ Q, torch.eye(4, device=device))


def naive_update(U, d, X):
    """As in public code: one projection, and every direction that QR returns."""
    C = U.T @ X
    Q, R = torch.linalg.qr(X - U @ C)
    H = torch.cat([C, R])
    w, W = torch.linalg.eigh(H @ H.T + torch.cat([d, torch.zeros_like(R[:, 0])]).diag())
    return (torch.cat([U, Q], 1) @ W).flip(1), w.flip(0)


def precision(X):
    """Small, but enough to be told from round-off."""
    return 100 * torch.finfo(X.dtype).eps


DEGENERATE = {
    "in the span": lambda U, X: U @ U.T @ X,
    "partly in the span": lambda U, X: torch.cat([U @ U.T @ X, X[:, :1]], 1),
    "almost in the span": lambda U, X: U @ U.T @ X + 1e-12 * X,
    "repeated": lambda U, X: X[:, [0, 1, 0, 1, 0]],
    "almost repeated": lambda U, X: torch.stack([X[:, 0], X[:, 0] + precision(X) * X[:, 1]], 1),
    "zero": lambda U, X: torch.zeros_like(X),
    "a row of zeros": lambda U, X: torch.cat([X, torch.zeros_like(X[:, :1])], 1),
    "tiny": lambda U, X: 1e-200 * X,
}


@pytest.mark.parametrize("make", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_degenerate_batches_keep_the_basis_orthonormal(make, dtype, device):
    U = orthonormal(device, 40, 7, dtype)
    d, X = torch.linspace(3, 1, 7, device=device, dtype=dtype), torch.randn(40, 4, device=device)
    X = make(U, X.to(dtype))
    expected = dense(U, d) + 10 * X @ X.T
    for _ in range(10):
        U, d = brand_update(U, d, X)
    check_equal(U.T @ U, torch.eye(len(d), device=device, dtype=dtype))
    check_equal(dense(U, d), expected)
    assert len(d) <= 11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_wide_batch_in_the_span_adds_nothing(dtype, device):
    """One projection leaves round-off that grows with the width; two do not."""
    U = orthonormal(device, 4000, 200, dtype)
    X = U @ torch.randn(200, 64, device=device, dtype=dtype)
    assert split_by_span(U, X)[1].shape == (4000, 0)


def test_without_care_the_basis_is_lost(device):
    """Where the naive update fails, and that the matrix itself does not show it."""
    U, d = orthonormal(device, 100, 8), torch.linspace(3, 1, 8, device=device)
    X = U @ torch.randn(8, 8, device=device)
    M = dense(U, d) + 10 * X @ X.T
    naive, safe = (U, d), (U, d)
    for _ in range(10):
        naive, safe = naive_update(*naive, X), brand_update(*safe, X)
    assert safe[0].shape[1] == 8
    assert naive[0].shape[1] == 88
    check_equal(dense(*safe), M)
    check_equal(dense(*naive), M)
    assert torch.linalg.matrix_norm(naive[0].T @ naive[0] - torch.eye(88, device=device)) > 1
    inverse = torch.linalg.inv(M + 0.1 * eye_like(M))

    def error_of_inverse(U, d):
        return error(10 * eye_like(M) + U * (1 / (d + 0.1) - 10) @ U.T, inverse)

    assert error_of_inverse(*safe) < 1e-13
    assert error_of_inverse(*naive) > 1e-4


def test_small_parts_are_kept_down_to_the_precision(device):
    """What lies beyond the span counts through its product with what lies within."""
    U = orthonormal(device, 40, 7)
    X = U @ torch.randn(7, 2, device=device) + 1e-9 * torch.randn(40, 2, device=device)
    d = torch.ones(7, device=device)
    M, kept = dense(U, d) + X @ X.T, dense(*brand_update(U, d, X))
    assert error(kept, M) < 1e-14
    assert error(dense(*brand_update(U, d, U @ U.T @ X)), M) > 1e-10
