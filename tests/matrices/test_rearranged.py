"""The rearranged block and its singular pairs, against the dense one."""

import warnings
from functools import partial

import pytest
import torch

from kfac_scratch import Kronecker, LayerIO
from kfac_scratch.matrices import rearranged
from kfac_scratch.matrices.rearranged import (
    Rearranged,
    gradients_in_parts,
    lanczos_svd,
    power_svd,
)
from tests.approximations.test_tkfac import random_io
from tests.laws import check_differs, check_equal

SHARED = pytest.mark.parametrize("S", [1, 4])


def dense(F, d_out):
    """Entry `((o, i), (p, j))` of a block moves to row `(o, p)` and column `(i, j)`."""
    d_in = len(F) // d_out
    return F.reshape(d_out, d_in, d_out, d_in).transpose(1, 2).reshape(d_out**2, d_in**2)


def symmetric_basis(d):
    """An orthonormal basis of the symmetric matrices, as vectors in columns."""
    units = torch.eye(d * d).reshape(d, d, d, d)
    M = units + units.mT
    M = torch.stack([M[i, j] / M[i, j].norm() for i in range(d) for j in range(i + 1)])
    return M.flatten(1).T


def symmetric_singular_values(F, d_out):
    """By dense algebra: those whose singular vectors are symmetric matrices."""
    R = dense(F.cpu(), d_out)
    d_in = len(F) // d_out
    return torch.linalg.svdvals(symmetric_basis(d_out).T @ R @ symmetric_basis(d_in))


def counted(counts, outputs=None, inputs=None):
    """Data with inputs `inputs[j] e_j` and vectors `outputs[i] e_i`, `counts[i][j]` times each.

    Its rearranged block, cut to diagonal matrices, is `counts` times the squares of both sizes.
    """
    counts = torch.tensor(counts)
    i, j = torch.repeat_interleave(counts.nonzero(), counts[counts > 0], dim=0).T
    outputs, inputs = (
        torch.eye(d) if sizes is None else torch.tensor(sizes).diag()
        for d, sizes in zip(counts.shape, (outputs, inputs), strict=True)
    )
    return LayerIO(inputs[j][:, None], outputs[i][None, :, None])


def symmetric(d, device, dtype=torch.float64):
    X = torch.randn(d, d, device=device, dtype=dtype)
    return X + X.T


# ---- products ---------------------------------------------------------------------------------


def test_the_rearrangement_of_a_product_has_rank_one():
    A, B = torch.randn(5, 5), torch.randn(3, 3)
    check_equal(dense(torch.kron(B, A), 3), torch.outer(B.flatten(), A.flatten()))


@SHARED
@pytest.mark.parametrize("V", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_are_those_of_the_dense_matrix(V, S, dtype, device):
    io = random_io(device, S, dtype=dtype, V=V)
    R, D = Rearranged(io), dense(io.block(), 3)
    X, Y = symmetric(5, device, dtype), symmetric(3, device, dtype)
    check_equal(R.to_outputs(X).flatten(), D @ X.flatten())
    check_equal(R.to_inputs(Y).flatten(), D.T @ Y.flatten())


@SHARED
def test_further_products_are_added_to_the_rearranged_block(S, device):
    io = random_io(device, S)
    K, L = (Kronecker(symmetric(5, device), symmetric(3, device)) for _ in range(2))
    R = Rearranged(io, (K,)).minus(L)
    D = dense(io.block() + K.dense() - L.dense(), 3)
    X, Y = symmetric(5, device), symmetric(3, device)
    check_equal(R.to_outputs(X).flatten(), D @ X.flatten())
    check_equal(R.to_inputs(Y).flatten(), D.T @ Y.flatten())


@SHARED
def test_only_the_symmetric_part_counts(S, device):
    R = Rearranged(random_io(device, S))
    X, Y = torch.randn(5, 5, device=device), torch.randn(3, 3, device=device)
    check_equal(R.to_outputs(X), R.to_outputs((X + X.T) / 2))
    check_equal(R.to_inputs(Y), R.to_inputs((Y + Y.T) / 2))


@pytest.mark.parametrize("entries", [1, 15, 40, 10**6])
def test_gradients_come_in_parts(entries, device):
    io = random_io(device, 4)
    parts = list(gradients_in_parts(io, entries))
    check_equal(torch.cat(parts), io.gradients().flatten(0, 1))
    assert all(part.numel() <= max(entries, 15) for part in parts)


def test_parts_do_not_change_the_products(device, monkeypatch):
    R, X, Y = Rearranged(random_io(device, 4)), symmetric(5, device), symmetric(3, device)
    expected = R.to_outputs(X), R.to_inputs(Y)
    monkeypatch.setattr(rearranged, "gradients_in_parts", partial(gradients_in_parts, entries=40))
    check_equal(R.to_outputs(X), expected[0])
    check_equal(R.to_inputs(Y), expected[1])


# ---- singular pairs ---------------------------------------------------------------------------


@SHARED
def test_power_iteration_finds_the_top_pair(S, device):
    io = random_io(device, S, n=9)
    K = power_svd(Rearranged(io), torch.eye(3, device=device), tolerance=1e-13)
    U, s, Vh = torch.linalg.svd(dense(io.block(), 3))
    check_equal(K.dense(), s[0] * torch.kron(U[:, 0].reshape(3, 3), Vh[0].reshape(5, 5)))
    check_equal(K.A.norm(), s[0].sqrt())
    check_equal(K.B.norm(), s[0].sqrt())


def test_the_top_pair_is_positive_semi_definite(device):
    for seed in range(50):
        torch.manual_seed(seed)
        K = power_svd(Rearranged(random_io(device, 1 + seed % 3)), torch.eye(3, device=device))
        for factor in (K.A, K.B):
            eigenvalues = torch.linalg.eigvalsh(factor)
            assert eigenvalues[0] >= -1e-14 * eigenvalues[-1]


def test_signs_do_not_depend_on_the_start(device):
    R, eye = Rearranged(random_io(device)), torch.eye(3, device=device)
    K, flipped = power_svd(R, eye), power_svd(R, -eye)
    check_equal(flipped.A, K.A)
    check_equal(flipped.B, K.B)


def test_iterations_that_do_not_suffice_are_announced(device):
    """Two singular values, 1 and 0.9999: a thousand iterations leave a mixture of both pairs."""
    basis = torch.eye(3, device=device)[:2]
    R = Rearranged(
        LayerIO(
            basis.unsqueeze(1),
            (basis * torch.tensor([[1.0], [0.9999**0.5]]).to(basis)).reshape(1, 2, 1, 3),
        )
    )
    check_equal(symmetric_singular_values(R.io.block(), 3)[:2], torch.tensor([1.0, 0.9999]))
    with pytest.warns(
        UserWarning, match="stopped after 1000 iterations with a residual above 1e-06"
    ):
        power_svd(R, R.identity())
    with warnings.catch_warnings():  # who gives a number has chosen it
        warnings.simplefilter("error")
        power_svd(R, R.identity(), iterations=3)
        power_svd(R, R.identity(), tolerance=1e-3)


@SHARED
def test_every_iteration_is_at_least_as_near(S, device):
    io = random_io(device, S)
    F, start = io.block(), torch.eye(3, device=device)
    errors = [
        (F - power_svd(Rearranged(io), start, 0.0, iterations=k).dense()).norm()
        for k in range(1, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_the_tolerance_is_the_residual(device):
    io = random_io(device)
    D = dense(io.block(), 3)
    for tolerance in (1e-2, 1e-4, 1e-8):
        tiny = Rearranged(LayerIO(io.a, 1e-4 * io.g))
        K = power_svd(tiny, torch.eye(3, device=device), tolerance)
        scaled = Kronecker(1e4 * K.A, 1e4 * K.B)
        K = power_svd(Rearranged(io), torch.eye(3, device=device), tolerance)
        check_equal(scaled.A, K.A)
        x, y, sigma = K.A.flatten() / K.A.norm(), K.B.flatten() / K.B.norm(), K.A.norm() ** 2
        check_equal(D.T @ y, sigma * x)
        assert tolerance / 1e4 < (D @ x - sigma * y).norm() / sigma < tolerance


@SHARED
@pytest.mark.parametrize("steps", [6, 12, 50])
def test_lanczos_finds_all_pairs_if_there_are_no_more_than_steps(S, steps, device):
    io = random_io(device, S, n=9)
    pairs = lanczos_svd(Rearranged(io), symmetric(3, device), steps)[:6]
    expected = symmetric_singular_values(io.block(), 3)
    check_equal(torch.stack([K.A.norm() * K.B.norm() for K in pairs]).cpu(), expected)
    if S == 1:  # then the block has symmetric pairs only
        check_equal(sum(K.dense() for K in pairs), io.block())


def test_lanczos_reaches_the_top_pairs_of_a_larger_layer(device):
    a, g = torch.randn(300, 1, 9, device=device), torch.randn(1, 300, 1, 6, device=device)
    size = torch.randn(300, 1, 1, device=device).exp()
    io = LayerIO(size * a, size * g)
    expected = symmetric_singular_values(io.block(), 6)[:2]
    pairs = lanczos_svd(Rearranged(io), Rearranged(io).generic())
    assert abs(pairs[0].A.norm() ** 2 - expected[0]) < 1e-10 * expected[0]
    assert abs(pairs[1].A.norm() ** 2 - expected[1]) < 1e-4 * expected[1]


def test_lanczos_stays_orthogonal_where_singular_values_fall_steeply(device):
    for seed in range(3):
        torch.manual_seed(seed)
        a = torch.randn(60, 1, 6, device=device) * torch.logspace(0, -5, 6, device=device)
        g = torch.randn(1, 60, 1, 5, device=device) * torch.logspace(0, -5, 5, device=device)
        R = Rearranged(LayerIO(a, g))
        pairs = lanczos_svd(R, R.generic(), steps=15)
        F = R.io.block()
        assert (sum(K.dense() for K in pairs) - F).norm() < 1e-12 * F.norm()


def test_two_steps_are_too_few_for_two_pairs(device):
    io = random_io(device, n=40)
    expected = symmetric_singular_values(io.block(), 3)[1]
    second = lanczos_svd(Rearranged(io), Rearranged(io).generic(), steps=2)[1]
    assert second.A.norm() ** 2 < 0.99 * expected


def test_the_identity_may_be_orthogonal_to_the_second_pair(device):
    """With inputs and outputs that may be exchanged in pairs, `diag(1, -1, 0)` is one."""
    io = counted([[4, 1, 1], [1, 4, 1], [1, 1, 3]])
    io = LayerIO(io.a.to(device), io.g.to(device))
    R, eye = Rearranged(io), torch.eye(3, device=device)
    expected = symmetric_singular_values(io.block(), 3)
    second, third = 3.0, 4 - 3**0.5
    check_equal(expected, torch.tensor([4 + 3**0.5, second, third, *3 * [0.0]]))
    rest = R.minus(power_svd(R, eye, 1e-13))
    assert float(power_svd(rest, eye).A.norm() ** 2) == pytest.approx(third)
    assert float(power_svd(rest, R.generic()).A.norm() ** 2) == pytest.approx(second)


def test_antisymmetric_pairs_are_left_aside(device):
    """Gradients that are the identity, or a rotation by a right angle: the block is a sum of two
    products, but the second is one of two rotations, which are no factors."""
    a = torch.eye(2, device=device).expand(2, 2, 2)
    turn = torch.tensor([[0.0, 1], [-1, 0]], device=device)
    g = torch.stack([torch.eye(2, device=device), turn])[None]
    io = LayerIO(a, g)
    check_equal(torch.linalg.svdvals(dense(io.block(), 2))[:2], 2 * torch.ones(2, device=device))
    check_equal(symmetric_singular_values(io.block(), 2), torch.tensor([2.0, 0, 0]))
    R = Rearranged(io)
    first = power_svd(R, torch.eye(2, device=device))
    check_equal(first.dense(), torch.eye(4, device=device))
    second = power_svd(R.minus(first), torch.tensor([[1.0, 2], [3, 4]], device=device))
    assert second.dense().abs().max() < 1e-12
    check_differs(first.dense(), io.block(), by=0.5)


def test_the_top_pair_of_a_zero_block_is_zero(device):
    io = random_io(device)
    R = Rearranged(LayerIO(io.a, 0 * io.g))
    for K in (power_svd(R, R.identity()), *lanczos_svd(R, R.identity())):
        assert (K.A == 0).all()
        assert (K.B == 0).all()
