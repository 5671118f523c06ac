import pytest
import torch

from kfac_scratch import LayerIO, ekfac, ekfac_reduce, kfac, kfac_reduce, layer_ios, rescaled
from kfac_scratch.approximations.ekfac import AmortisedEKFAC, second_moments
from kfac_scratch.approximations.estimators import MovingAverage, weight_of_newest
from kfac_scratch.curvature import diagonal_blocks, ggn
from kfac_scratch.matrices.kronecker import KroneckerEigen
from tests.cases import CONSTANT_HESSIAN, CONV_PER_LOCATION, DEEP_LINEAR, NONLINEAR, ONE_DATUM
from tests.laws import check_differs, check_equal, check_matrix, check_spectrum


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
def test_ekfacs_squared_error_is_the_blocks_norm_minus_its_own(S, device):
    """The squared error is that of the block minus that of its diagonal in the basis."""
    io = random_io(device, S)
    M, F = ekfac(io), io.block()
    check_equal((F - M.dense()).square().sum(), F.square().sum() - M.scale.square().sum())


@SHARED
@pytest.mark.parametrize("seed", range(20))
def test_ekfac_is_never_farther_than_kfac(S, seed, device):
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
def test_ekfacs_trace_is_exact(S, device):
    io = random_io(device, S)
    check_equal(ekfac(io).trace(), io.block().trace())
    check_differs(kfac(io).trace(), io.block().trace())


@pytest.mark.parametrize("seed", range(20))
def test_ekfac_reduce_is_never_farther_than_kfac_reduce_and_has_the_exact_trace(seed, device):
    torch.manual_seed(seed)
    io = random_io(device, 4)
    F, M = io.block(), ekfac_reduce(io)
    assert (F - M.dense()).norm() <= (F - kfac_reduce(io).dense()).norm() * (1 + 1e-12)
    check_equal(M.trace(), F.trace())
    check_equal(M.QA, kfac(io.reduced()).eigen().QA)


@pytest.mark.parametrize("case", DEEP_LINEAR + ONE_DATUM + CONSTANT_HESSIAN, ids=str)
def test_ekfac_is_exact_where_kfac_is(case, device):
    problem = case.build(device)
    exact = diagonal_blocks(problem[0], ggn(*problem))
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


@pytest.mark.everywhere
@pytest.mark.parametrize("approximation", [ekfac, ekfac_reduce])
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
def test_obeys_the_laws_of_matrices(case, approximation, device):
    for io in layer_ios(*case.build(device)).values():
        M = approximation(io)
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


def stream(device, count=5, S=2):
    return [random_io(device, S) for _ in range(count)]


def test_amortised_with_a_basis_for_every_batch_follows_the_averaged_factors(device):
    ios, how, state, K = stream(device), AmortisedEKFAC(basis_every=1), None, None
    for t, io in enumerate(ios, start=1):
        state = how.update(state, io, weight_of_newest(0.9, t))
        K = MovingAverage(kfac).update(K, io, weight_of_newest(0.9, t))
        check_equal(state.factors.dense(), K.dense())
        check_equal(KroneckerEigen(state.M.QA, state.M.QB, K.eigen().scale).dense(), K.dense())


def test_amortised_keeps_a_basis_for_its_period(device):
    how, state, bases = AmortisedEKFAC(basis_every=3), None, []
    for t, io in enumerate(stream(device, 7), start=1):
        state = how.update(state, io, weight_of_newest(0.9, t))
        bases.append(state.M.QA)
    changes = [bool((bases[t] != bases[t - 1]).any()) for t in range(1, 7)]
    assert changes == [False, False, True, False, False, True]


def test_amortised_scales_are_the_averaged_moments_in_the_one_basis(device):
    """Between two bases, they are the diagonal of the averaged exact block in the basis."""
    ios, how, state = stream(device), AmortisedEKFAC(basis_every=100), None
    for t, io in enumerate(ios, start=1):
        state = how.update(state, io, weight_of_newest(0.8, t))
    weights = torch.tensor([0.8 ** (4 - i) for i in range(5)], device=device)
    blocks = torch.stack([io.block() for io in ios])
    average = (weights[:, None, None] * blocks).sum(0) / weights.sum()
    U = torch.kron(state.M.QB, state.M.QA)
    check_equal(state.M.scale.flatten(), (U.T @ average @ U).diagonal())
    check_equal(state.trace(), average.trace())


def test_a_new_basis_starts_with_the_old_matrix_seen_in_it(device):
    first, second = stream(device, 2)
    old = AmortisedEKFAC(basis_every=1).update(None, first, 1.0)
    M = AmortisedEKFAC(basis_every=1).update(old, second, 0.3).M
    U = torch.kron(M.QB, M.QA)
    average = 0.7 * old.dense() + 0.3 * second.block()
    check_equal(M.scale.flatten(), (U.T @ average @ U).diagonal())


def test_a_new_basis_keeps_the_averaged_trace(device):
    ios, how, state = stream(device), AmortisedEKFAC(basis_every=2), None
    for t, io in enumerate(ios, start=1):
        state = how.update(state, io, weight_of_newest(1.0, t))
    check_equal(state.trace(), torch.stack([io.block().trace() for io in ios]).mean())


def test_amortised_state_is_a_matrix(device):
    state = AmortisedEKFAC().update(None, random_io(device, 2), 1.0)
    check_matrix(state, (3, 5))
    check_equal(state.trace(), state.dense().trace())
    check_equal(state.diagonal(), state.dense().diagonal())


def test_amortised_takes_other_factors(device):
    how = AmortisedEKFAC(factors=MovingAverage(kfac_reduce))
    io = random_io(device, 4)
    check_equal(how.update(None, io, 1.0).dense(), ekfac_reduce(io).dense())


def test_a_basis_needs_a_period():
    with pytest.raises(ValueError, match="basis_every must be at least 1"):
        AmortisedEKFAC(basis_every=0)
