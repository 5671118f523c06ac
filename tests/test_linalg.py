import warnings

import pytest
import torch

from kfac_scratch.linalg import (
    conjugate_gradient,
    eye_like,
    gram,
    kron_matvec,
    positive_part,
    psd_eigh,
    simultaneous_eigh,
    stored_as_columns,
    told_from_zero,
    unvec,
    vec,
)
from tests.laws import check_differs, check_equal


def psd(d, device, rank=None):
    root = torch.randn(d, rank or d + 1, device=device)
    return root @ root.T


def test_vec_stacks_rows(device):
    V = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=device)
    assert vec(V).tolist() == [1, 2, 3, 4, 5, 6]
    check_equal(unvec(vec(V), rows=2), V)
    check_equal(unvec(vec(V.expand(7, 2, 3)), rows=2), V.expand(7, 2, 3))


@pytest.mark.parametrize("rows", [0, -1, 4])
def test_unvec_refuses_a_vector_that_does_not_fit(rows):
    with pytest.raises(ValueError, match=f"no matrix with {rows} rows"):
        unvec(torch.zeros(6), rows)


def test_the_vec_trick_is_the_dense_kronecker_product(device):
    B, A, V = (torch.randn(*s, device=device) for s in ((5, 2), (7, 3), (4, 2, 3)))
    dense = torch.kron(B, A)
    check_equal(kron_matvec(B, A, vec(V)), vec(V) @ dense.T)
    check_equal(kron_matvec(B, A, vec(V)), vec(B @ V @ A.T))


def test_the_factors_of_the_vec_trick_do_not_commute(device):
    B, A, v = (torch.randn(*s, device=device) for s in ((3, 3), (3, 3), (9,)))
    check_differs(kron_matvec(A, B, v), torch.kron(B, A) @ v)


@pytest.mark.parametrize("as_columns", [True, False])
@pytest.mark.parametrize(("K", "S", "d"), [(67, 5, 3), (2, 3, 5), (1, 1, 1)])
def test_gram_sums_outer_products_of_rows(K, S, d, as_columns, device):
    rows = torch.randn(K, S, d, device=device)
    if as_columns:
        rows = rows.mT.contiguous().mT
    if S > 1 and d > 1:  # otherwise both layouts are the same
        assert stored_as_columns(rows) == as_columns
    check_equal(gram(rows), torch.einsum("ksi,ksj->ij", rows, rows))


@pytest.mark.parametrize("as_columns", [True, False])
@pytest.mark.parametrize(("K", "S", "d"), [(1, 100, 193), (3, 260, 255), (33, 12, 387)])
def test_gram_by_quarters_is_the_symmetric_sum_of_outer_products(K, S, d, as_columns, device):
    for dtype in (torch.float64, torch.float32):
        rows = torch.randn(K, S, d, device=device, dtype=dtype)
        flat = rows.reshape(-1, d)
        M = gram(rows.mT.contiguous().mT if as_columns else rows)
        check_equal(M, flat.T @ flat)
        assert (M - M.mT).abs().max() <= 4 * torch.finfo(dtype).eps * M.abs().max()


def test_psd_eigh_decomposes(device):
    M = psd(5, device, rank=3)
    s, Q = psd_eigh(M)
    assert (s >= 0).all()
    check_equal(Q * s @ Q.T, M)
    check_equal(Q.T @ Q, eye_like(M))


@pytest.mark.parametrize("d", [2, 8, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_psd_eigh_takes_round_off_for_zero_and_refuses_more_at_every_width(d, dtype, device):
    """A bound that grows with the width would let a negative eigenvalue of 1e-3 pass."""
    eps, s = torch.finfo(dtype).eps, torch.ones(d, device=device, dtype=dtype)
    s[0] = -300 * eps
    assert (psd_eigh(torch.diag(s))[0] >= 0).all()
    s[0] = -3000 * eps
    with pytest.raises(ValueError, match="positive semi-definite"):
        psd_eigh(torch.diag(s))


@pytest.mark.parametrize("K", [1000, 10_000, 100_000])
def test_a_sum_of_many_equal_rows_is_decomposed(K):
    """Its round-off grows with the number of rows: up to thousands of `eps`."""
    row = torch.rand(11, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    M = gram(row.expand(K, 1, 11)) / K
    assert torch.linalg.eigvalsh(M.double())[0] < -10 * torch.finfo(torch.float32).eps * M.trace()
    s, Q = psd_eigh(M)
    assert (s >= 0).all()
    error = (Q * s @ Q.mT - torch.outer(row, row)).abs().max()
    assert error <= 1000 * torch.finfo(torch.float32).eps * row.square().sum()


def test_psd_eigh_changes_no_eigenvalue_that_is_positive(device):
    s = torch.tensor([1e-14, 1e-9, 1.0], device=device, dtype=torch.float32)
    check_equal(psd_eigh(torch.diag(s))[0], s)
    assert (psd_eigh(torch.diag(s))[0] > 0).all()


def test_psd_eigh_refuses_a_matrix_that_is_not_symmetric(device):
    M = torch.eye(8, device=device)
    M[0, 1] = 0.1
    with pytest.raises(ValueError, match=r"not symmetric: entries differ by up to 0\.1"):
        psd_eigh(M)


def test_psd_eigh_of_a_small_part_of_a_large_matrix_knows_its_round_off(device):
    part = 1e-6 * torch.eye(3, device=device, dtype=torch.float32)
    part[0, 1] = 2e-8
    part[2, 2] = -1e-8
    with pytest.raises(ValueError, match="not symmetric"):
        psd_eigh(part)
    eigenvalues, _ = psd_eigh(part, torch.ones((), device=device, dtype=torch.float32))
    assert eigenvalues[0] == 0


def test_told_from_zero_keeps_what_rounding_cannot_make(device):
    for dtype in (torch.float64, torch.float32):
        eps = torch.finfo(dtype).eps
        s = torch.tensor([0.0, 5 * eps, 20 * eps, 1.0], device=device, dtype=dtype)
        assert (told_from_zero(s) > 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_psd_eigh_refuses_non_finite_entries(bad):
    with pytest.raises(ValueError, match="non-finite"):
        psd_eigh(torch.full((2, 2), bad))


def test_psd_eigh_decomposes_float32_in_double_precision(monkeypatch):
    """Float32's own decomposition fails for some matrices, and rounds all of them."""
    original, seen = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda M: seen.append(M.dtype) or original(M))
    M = psd(4, "cpu").float()
    s, Q = psd_eigh(M)
    assert seen == [torch.float64]
    assert s.dtype == Q.dtype == torch.float32
    check_equal(Q * s @ Q.T, M)


def test_simultaneous_eigh_diagonalises_both(device):
    P, M = psd(5, device), torch.randn(5, 5, device=device)
    M = M + M.T
    p, K = simultaneous_eigh(P, M)
    check_equal(K.T @ P @ K, eye_like(P))
    check_equal(K.T @ M @ K, torch.diag(p))


def test_simultaneous_eigh_needs_a_definite_matrix(device):
    with pytest.raises(ValueError, match="positive definite"):
        simultaneous_eigh(psd(5, device, rank=2), eye_like(psd(5, device)))


def test_the_positive_part_is_the_nearest_positive_matrix(device):
    M, positive = torch.randn(5, 5, device=device), psd(5, device)
    M = M + M.T
    found = positive_part(M)
    rest = found - M  # also positive, and orthogonal to it: the conditions of the nearest one
    for part in (found, rest):
        assert torch.linalg.eigvalsh(part)[0] >= -1e-13
    check_differs(found, M)
    check_equal(found @ rest + M, M)
    assert torch.equal(positive_part(positive), positive)


def test_conjugate_gradient_solves_every_system_of_a_batch(device):
    M, b = psd(12, device) + torch.eye(12, device=device), torch.randn(3, 4, 3, device=device)
    b[1] = 0  # a zero right-hand side has a zero solution
    x = conjugate_gradient(lambda X: (X.flatten(1) @ M).reshape(X.shape), b, lambda r: r)
    check_equal(x.flatten(1), torch.linalg.solve(M, b.flatten(1).T).T)


def test_conjugate_gradients_in_float32_take_the_steps_that_round_off_costs(device):
    """More than twice as many as in exact arithmetic, for a condition of only 1e4."""
    scales = torch.logspace(0, -4, 20, device=device, dtype=torch.float32)
    b = torch.ones(1, 20, device=device, dtype=torch.float32)

    def residual(**limit):
        x = conjugate_gradient(lambda x: scales * x, b, lambda r: r, **limit)
        return float((scales * x - b).norm() / b.norm())

    assert residual(max_iter=40) > 1e-2
    assert residual() < 1e-5


def test_conjugate_gradient_refuses_an_indefinite_matrix(device):
    b = torch.ones(1, 3, device=device)
    scale = torch.tensor([1.0, -2.0, 0.5], device=device)
    with pytest.raises(ValueError, match="negative curvature"):
        conjugate_gradient(lambda x: scale * x, b, lambda r: r)


def test_psd_eigh_of_numbers_at_the_end_of_the_range(device):
    """Eigenvalues below the smallest normal number are zero, whatever their sign."""
    M = 3e-316 * torch.ones(4, 4, device=device)
    eigenvalues, _ = psd_eigh(M - 1e-317 * torch.eye(4, device=device))
    assert (eigenvalues == 0).all()


def test_conjugate_gradients_that_stop_at_their_own_limit_warn_and_at_a_given_one_do_not(device):
    """A condition of 1e14: round-off takes the steps that the theorem promises."""
    scales = torch.logspace(0, -14, 40, device=device)
    b = torch.ones(1, 40, device=device)

    def solve(**limit):
        return conjugate_gradient(lambda x: scales * x, b, lambda r: r, **limit)

    with pytest.warns(UserWarning, match="stopped after 400 steps with a residual"):
        solve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solve(max_iter=400)
