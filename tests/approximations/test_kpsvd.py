from dataclasses import replace

import pytest
import torch

from kfac_scratch import Kronecker, KroneckerSum, LayerIO, ekfac, kfac, layer_ios
from kfac_scratch.approximations.estimators import Estimator, MovingAverage
from kfac_scratch.approximations.kpsvd import (
    Recompressed,
    deflation,
    ekpsvd,
    guarded,
    guarded_inverse,
    kfac_corrected,
    kpsvd,
    lanczos,
    nearest_product,
    nearest_sum,
)
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.curvature import diagonal_blocks, ggn
from kfac_scratch.matrices.damping import balance
from kfac_scratch.matrices.rearranged import Rearranged
from tests.approximations.test_tkfac import (
    common_size,
    frobenius,
    opposite_sizes,
    product_measure,
    random_io,
    same_inputs_up_to_sign,
    with_data_of_no_weight,
)
from tests.cases import (
    CONSTANT_HESSIAN,
    CONV_PER_LOCATION,
    DEEP_LINEAR,
    NONLINEAR,
    ONE_DATUM,
    one_position,
)
from tests.laws import check_differs, check_equal, check_matrix, check_spectrum
from tests.matrices.test_rearranged import counted, dense, symmetric_singular_values

SHARED = pytest.mark.parametrize("S", [1, 4])
ALL = [kpsvd, ekpsvd, deflation, lanczos, kfac_corrected]
SUMS = [deflation, lanczos, kfac_corrected]
UP_TO = 1 + 1e-10  # power iteration has stopped near the limit


def squared_error(M, F):
    return (M.dense() - F).square().sum()


def on(device, io):
    return LayerIO(io.a.to(device), io.g.to(device))


# ---- error identities -------------------------------------------------------------------------


@SHARED
def test_errors_are_those_of_truncated_singular_values(S, device):
    io = random_io(device, S, n=20)
    F = io.block()
    sigma = symmetric_singular_values(F, 3).to(device)
    total = F.square().sum()
    check_equal(squared_error(kpsvd(io), F), total - sigma[0] ** 2)
    for method in (deflation, lanczos):
        check_equal(squared_error(method(io), F), total - sigma[:2].square().sum())


@SHARED
def test_the_correction_takes_the_top_singular_value_of_the_error(S, device):
    io = random_io(device, S, n=20)
    F, K = io.block(), kfac(io).dense()
    kappa = symmetric_singular_values(F - K, 3).to(device)
    expected = (F - K).square().sum() - kappa[0] ** 2
    check_equal(squared_error(kfac_corrected(io), F), expected)
    check_equal(kfac_corrected(io).first.dense(), K)


def test_the_error_of_kfac_is_a_covariance(device):
    io = random_io(device, n=20)
    A = torch.einsum("nsi,nsj->nij", io.a, io.a).flatten(1)
    B = torch.einsum("vnso,vnsp->nop", io.g, io.g).flatten(1)
    covariance = (B - B.mean(0)).T @ (A - A.mean(0))
    check_equal(dense(io.block() - kfac(io).dense(), 3), covariance)


@SHARED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_both_ways_to_a_sum_agree(S, dtype, device):
    io = random_io(device, S, n=20, dtype=dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    check_equal(deflation(io, tolerance).dense(), lanczos(io).dense())


# ---- orders -----------------------------------------------------------------------------------


@pytest.mark.slow
@SHARED
def test_errors_of_kpsvd_and_kfac_are_ordered(S, device):
    for seed in range(100 if S == 1 else 20):
        io = common_size(seed, device)
        if S > 1 or seed % 3 == 0:
            torch.manual_seed(seed)
            io = random_io(device, S, n=12)
        F = io.block()
        methods = (kfac, tkfac, kpsvd, ekpsvd, kfac_corrected, deflation)
        to_kfac, to_tkfac, nearest, diagonal, corrected, deflated = (
            frobenius(method(io), F) for method in methods
        )
        assert deflated <= nearest * UP_TO
        assert nearest <= min(to_kfac, to_tkfac) * UP_TO
        assert diagonal <= nearest * UP_TO
        assert deflated <= corrected * UP_TO
        assert corrected <= to_kfac * UP_TO
        assert frobenius(lanczos(io), F) <= deflated * UP_TO


@SHARED
def test_no_other_product_is_nearer(S, device):
    io = random_io(device, S)
    F, K = io.block(), kpsvd(io, tolerance=1e-12)
    best = frobenius(K, F)
    for _ in range(20):
        A, B = K.A + 0.01 * torch.randn_like(K.A), K.B + 0.01 * torch.randn_like(K.B)
        assert frobenius(Kronecker(A, B), F) > best


def test_the_correction_of_kfac_may_be_farther_than_one_product(device):
    """Where KFAC's first term is far off, the second is spent on it."""
    counts = [[1, 2, 3], [0, 1, 2], [0, 2, 1]]
    io = on(device, counted(counts, outputs=[3.0, 1, 1], inputs=[1.0, 1, 3]))
    assert frobenius(kfac_corrected(io), io.block()) > 3 * frobenius(kpsvd(io), io.block())


def test_the_correction_of_kfac_may_be_nearer_than_one_product(device):
    io = on(device, counted([[3, 0, 0], [0, 2, 0], [0, 0, 1]]))
    assert frobenius(kfac_corrected(io), io.block()) < 0.9 * frobenius(kpsvd(io), io.block())


def test_eigenvalues_or_the_product_may_be_nearer(device):
    io = on(device, counted([[3, 0, 0], [0, 2, 0], [0, 0, 1]]))
    check_equal(ekfac(io).dense(), io.block())
    check_differs(kpsvd(io).dense(), io.block(), by=0.1)
    io = with_data_of_no_weight(device)
    check_equal(kpsvd(io).dense(), io.block())
    check_differs(ekfac(io).dense(), io.block(), by=0.1)


def test_the_trace_is_not_kept(device):
    io = random_io(device)
    check_differs(kpsvd(io).trace(), io.block().trace())
    check_equal(ekpsvd(io).trace(), io.block().trace())


def test_equals_kfac_only_without_correlation(device):
    io = random_io(device)
    check_differs(kpsvd(io).dense(), kfac(io).dense())
    io = product_measure(device)
    check_equal(kpsvd(io).dense(), kfac(io).dense())


# ---- where they are exact ---------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("case", DEEP_LINEAR[::2] + ONE_DATUM[::5] + CONSTANT_HESSIAN[::5], ids=str)
def test_kpsvd_is_exact_where_kfac_is(case, method, device):
    problem = case.build(device)
    exact = diagonal_blocks(problem[0], ggn(*problem))
    for name, io in layer_ios(*problem).items():
        check_equal(method(io).dense(), exact[name])


PRODUCTS = {
    "product-measure": product_measure,
    "same-inputs": same_inputs_up_to_sign,
    "opposite-sizes": lambda device: opposite_sizes(device)[0],
    "data-of-no-weight": with_data_of_no_weight,
}


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("make", PRODUCTS.values(), ids=PRODUCTS)
def test_exact_if_the_block_is_a_product(method, make, device):
    io = make(device)
    check_equal(method(io).dense(), io.block())


@pytest.mark.parametrize("method", [deflation, lanczos])
def test_sums_are_exact_for_blocks_of_two_data(method, device):
    io = random_io(device, n=2)
    assert torch.linalg.matrix_rank(dense(io.block(), 3)) == 2
    check_equal(method(io).dense(), io.block())
    check_differs(kpsvd(io).dense(), io.block())


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_not_exact_on_nonlinear_nets(case, method, device):
    io = next(iter(layer_ios(*case.build(device)).values()))
    check_differs(method(io).dense(), io.block())


# ---- as matrices ------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [lambda io: io, one_position])
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
def test_obey_the_laws_of_matrices(case, view, device):
    for io in layer_ios(*case.build(device)).values():
        shape = io.g.shape[-1], io.a.shape[-1]
        for method in (kpsvd, ekpsvd):
            check_matrix(method(view(io)), shape)
            check_spectrum(method(view(io)))
        for method in SUMS:
            check_matrix(guarded(method(view(io)), 0.1), shape)


@pytest.mark.parametrize("method", ALL)
def test_a_batch_without_gradients_gives_zero(method, device):
    io, V = random_io(device), torch.randn(3, 5, device=device)
    M = method(LayerIO(io.a, 0 * io.g))
    assert (M.dense() == 0).all()
    check_equal(M.inverse(0.5) @ V, 2 * V)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("S", [1, 3])
def test_one_input_and_one_output(method, S, device):
    io = LayerIO(torch.randn(4, S, 1, device=device), torch.randn(2, 4, S, 1, device=device))
    check_equal(method(io).dense(), io.block())


# ---- sums in use ------------------------------------------------------------------------------


def indefinite(device):
    """A layer whose nearest sum of two products has a negative diagonal entry."""
    return on(device, counted([[2, 1, 0], [1, 2, 1], [0, 1, 2]]))


def test_the_nearest_sum_may_be_indefinite(device):
    io = indefinite(device)
    M = deflation(io)
    assert torch.linalg.eigvalsh(io.block())[0] >= -1e-12
    assert M.diagonal().min() < -0.1
    with pytest.raises(ValueError, match="negative curvature"):
        M.inverse(0.01) @ torch.ones(3, 3, device=device)


@pytest.mark.parametrize("method", SUMS)
def test_guarded_sums_are_positive_definite(method, device):
    shrunk = 0
    for seed in range(40):
        io = common_size(seed, device)
        M, damping = method(io), 1e-3 * float(io.block().trace()) / 12
        safe = guarded(M, damping)
        L = torch.linalg.inv(torch.linalg.cholesky(safe.first.dense()))
        lowest = torch.linalg.eigvalsh(L @ safe.dense() @ L.T)[0]
        assert lowest >= 0.1 * (1 - 1e-8)
        if not torch.equal(safe.second.A, M.second.A):
            shrunk += 1
            assert lowest <= 0.1 * (1 + 1e-8)  # no more than needed
    assert 0 < shrunk < 40


@pytest.mark.parametrize("make", [indefinite, random_io])
def test_the_guarded_inverse_is_that_of_the_guarded_sum(make, device):
    M = deflation(make(device))
    safe, V = guarded(M, 0.01), torch.randn(2, *M.first.B.shape[:1], len(M.first.A), device=device)
    check_equal(guarded_inverse(M, 0.01) @ V, safe.inverse(0.0) @ V)
    check_equal(guarded_inverse(M, 0.01) @ (safe @ V), V)
    solved = torch.linalg.solve(safe.dense(), V.flatten(1).T).T.reshape(V.shape)
    check_equal(guarded_inverse(M, 0.01) @ V, solved)


def test_the_first_term_is_damped_as_one_product_is(device):
    M = deflation(random_io(device))
    safe, pi = guarded(M, 0.04), balance(M.first)
    check_equal(safe.first.A, M.first.A + 0.2 * pi * torch.eye(5, device=device))
    check_equal(safe.first.B, M.first.B + 0.2 / pi * torch.eye(3, device=device))


def test_a_sum_that_is_safe_is_not_shrunk(device):
    K = kfac(random_io(device))
    M = KroneckerSum(K, Kronecker(0.5 * K.A, K.B))
    safe = guarded(M, 0.01)
    check_equal(safe.second.dense(), M.second.dense())
    assert torch.equal(guarded(M, 0.01, margin=1.0).second.A, M.second.A)


def test_a_margin_of_one_leaves_a_second_term_that_is_negative_nowhere_or_none(device):
    safe = guarded(deflation(indefinite(device)), 0.01, margin=1.0)
    assert (safe.second.dense() == 0).all()


@pytest.mark.parametrize(("damping", "margin"), [(0.0, 0.1), (-1.0, 0.1), (0.1, 0.0), (0.1, 1.1)])
def test_guarded_inverses_need_a_positive_damping_and_a_margin(damping, margin, device):
    M = deflation(random_io(device))
    with pytest.raises(ValueError, match=r"positive damping|margin must lie in \(0, 1\]"):
        guarded_inverse(M, damping, margin)


def test_one_step_is_too_few_for_two_terms(device):
    with pytest.raises(ValueError, match="at least two steps"):
        lanczos(random_io(device), steps=1)


# ---- over batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("nearest", [nearest_product, nearest_sum])
@SHARED
def test_the_first_batch_and_a_batch_of_all_weight_stand_alone(nearest, S, device):
    estimator = Recompressed(nearest)
    assert isinstance(estimator, Estimator)
    first, second = random_io(device, S), random_io(device, S)
    M = estimator.update(None, first, 1.0)
    alone = {nearest_product: kpsvd, nearest_sum: deflation}[nearest]
    check_equal(M.dense(), alone(first).dense())
    assert frobenius(estimator.update(M, second, 1.0), alone(second).dense()) < 1e-5


def test_the_average_of_blocks_of_few_terms_is_exact(device):
    ios = [random_io(device, n=1) for _ in range(2)]
    estimator = Recompressed(nearest_sum)
    M = estimator.update(estimator.update(None, ios[0], 1.0), ios[1], 0.3)
    check_equal(M.dense(), 0.7 * ios[0].block() + 0.3 * ios[1].block())


def test_the_first_term_of_an_average_of_sums_stays_positive_and_is_inverted(device):
    """An old second term is indefinite, and so may be the top pair of the average."""
    estimator, dropped = Recompressed(nearest_sum), 0
    for _ in range(6):
        old, new = (random_io(device, S=2, n=1, V=1) for _ in range(2))
        M = estimator.update(None, old, 1.0)
        terms = tuple(Kronecker(0.5 * K.A, K.B) for K in (M.first, M.second))
        top = nearest_product(Rearranged(replace(new, g=0.5**0.5 * new.g), terms))
        M = estimator.update(M, new, 0.5)
        for factor, of_pair in ((M.first.A, top.A), (M.first.B, top.B)):
            s = torch.linalg.eigvalsh(factor)
            assert s[0] >= -1e-14 * s[-1]
            dropped += int(torch.linalg.eigvalsh(of_pair)[0] < -1e-3 * s[-1])
        damping, V = float(M.first.trace()), torch.randn(3, 5, device=device)
        check_equal(M.inverse(damping) @ (M @ V + damping * V), V)
        guarded_inverse(M, 1e-10 * damping)
    assert dropped > 0


def test_equal_batches_change_nothing(device):
    io = random_io(device)
    for nearest in (nearest_product, nearest_sum):
        estimator = Recompressed(nearest)
        M = estimator.update(None, io, 1.0)
        after = estimator.update(M, io, 0.3)
        assert frobenius(after, M.dense()) < 1e-4 * float(M.dense().norm())


def test_it_is_the_nearest_to_the_average_of_old_and_new(device):
    first, second = random_io(device), random_io(device)
    M = kpsvd(first)
    after = Recompressed(nearest_product).update(M, second, 0.25)
    target = 0.75 * M.dense() + 0.25 * second.block()
    sigma = symmetric_singular_values(target, 3).to(device)
    check_equal(squared_error(after, target), target.square().sum() - sigma[0] ** 2)
    factors = MovingAverage(kpsvd).update(M, second, 0.25)
    assert frobenius(after, target) < frobenius(factors, target)
