import pytest
import torch
from cases import CONSTANT_HESSIAN, CONV_PER_LOCATION, DEEP_LINEAR, NONLINEAR, ONE_DATUM
from laws import check_differs, check_equal, check_matrix, check_spectrum

from kfac_scratch import LayerIO, ekfac, kfac, layer_ios, rescaled
from kfac_scratch.curvature import block_diagonal, ggn
from kfac_scratch.ekfac import second_moments
from kfac_scratch.matrices import KroneckerEigen


def random_io(device, S, n=6, dtype=torch.float64):
    a = torch.randn(n, S, 5, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(2, n, S, 3, device=device, dtype=dtype))


def orthogonal(d, device, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(d, d, device=device, dtype=dtype)).Q


SHARED = pytest.mark.parametrize("S", [1, 4])


@SHARED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_second_moments_are_the_diagonal_in_the_basis(S, dtype, device):
    io = random_io(device, S, dtype=dtype)
    QA, QB = orthogonal(5, device, dtype), orthogonal(3, device, dtype)
    U = torch.kron(QB, QA)
    check_equal(second_moments(io, QA, QB).flatten(), (U.T @ io.block() @ U).diagonal())


def test_moments_are_per_datum_not_per_position(device):
    io = random_io(device, 4)
    QA, QB = orthogonal(5, device), orthogonal(3, device)
    a, g = (io.a @ QA).flatten(0, 1), (io.g @ QB).flatten(1, 2)
    per_position = torch.einsum("vno,ni->oi", g.square(), a.square())
    check_differs(second_moments(io, QA, QB), per_position)


@SHARED
def test_error_identity(S, device):
    """The squared error is that of the block minus that of its diagonal in the basis."""
    io = random_io(device, S)
    M, F = ekfac(io), io.block()
    check_equal((F - M.dense()).square().sum(), F.square().sum() - M.scale.square().sum())


@SHARED
@pytest.mark.parametrize("seed", range(20))
def test_never_farther_than_kfac(S, seed, device):
    torch.manual_seed(seed)
    io = random_io(device, S)
    F = io.block()
    assert (F - ekfac(io).dense()).norm() <= (F - kfac(io).dense()).norm() * (1 + 1e-12)


@SHARED
def test_no_other_diagonal_in_the_basis_is_nearer(S, device):
    io = random_io(device, S)
    M, F = ekfac(io), io.block()
    best = (F - M.dense()).norm()
    for _ in range(20):
        other = M.scale + 0.01 * torch.randn_like(M.scale)
        assert (F - KroneckerEigen(M.QA, M.QB, other).dense()).norm() > best


@SHARED
def test_trace_is_exact(S, device):
    io = random_io(device, S)
    check_equal(ekfac(io).trace(), io.block().trace())
    check_differs(kfac(io).trace(), io.block().trace())


@pytest.mark.parametrize("case", DEEP_LINEAR + ONE_DATUM + CONSTANT_HESSIAN, ids=str)
def test_exact_where_kfac_is(case, device):
    problem = case.build(device)
    exact = block_diagonal(problem[0], ggn(*problem))
    for name, io in layer_ios(*problem).items():
        check_equal(ekfac(io).dense(), exact[name])


def test_exact_over_a_product_measure(device):
    a = torch.randn(5, 1, 4, device=device).repeat_interleave(3, 0)
    io = LayerIO(a, torch.randn(2, 3, 1, 7, device=device).repeat(1, 5, 1, 1))
    check_equal(ekfac(io).dense(), io.block())


@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_not_exact_on_nonlinear_nets(case, device):
    io = next(iter(layer_ios(*case.build(device)).values()))
    check_differs(ekfac(io).dense(), io.block())


@pytest.mark.parametrize("view", [lambda io: io, LayerIO.reduced])
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
def test_obeys_the_laws_of_matrices(case, view, device):
    for io in layer_ios(*case.build(device)).values():
        M = ekfac(view(io))
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))
        check_spectrum(M)


# ---- amortised --------------------------------------------------------------------------------


def test_rescaling_keeps_the_basis(device):
    first, second = random_io(device, 1), random_io(device, 1)
    M = rescaled(ekfac(first), second)
    check_equal(M.QA, ekfac(first).QA)
    check_equal(M.scale, second_moments(second, M.QA, M.QB))
    check_equal(rescaled(ekfac(first), first).dense(), ekfac(first).dense())


def test_decay_is_the_weight_of_the_old(device):
    first, second = random_io(device, 1), random_io(device, 1)
    M = ekfac(first)
    fresh = second_moments(second, M.QA, M.QB)
    check_equal(rescaled(M, second, decay=0.9).scale, 0.9 * M.scale + 0.1 * fresh)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_decay_outside_of_the_unit_interval_is_refused(decay, device):
    io = random_io(device, 1)
    with pytest.raises(ValueError, match="decay must lie in"):
        rescaled(ekfac(io), io, decay)
