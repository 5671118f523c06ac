from collections import Counter

import pytest
import torch

import kfac_scratch.approximations.brand as brand
from kfac_scratch import LayerIO, kfac, layer_ios
from kfac_scratch.approximations.brand import (
    Brand,
    ContinuedInverse,
    Repaired,
    corrected,
    is_low_rank_update,
    product_of_rows,
    refreshed,
    ritz,
    truncated,
    updated_factor,
    zero_factors,
)
from kfac_scratch.approximations.estimators import MovingAverage, weight_of_newest
from kfac_scratch.approximations.randomized import (
    Randomized,
    Sketch,
    smallest_kept,
    trace_matched,
    zero_tail,
)
from kfac_scratch.curvature import diagonal_blocks, ggn
from kfac_scratch.layer_io import concatenate
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.damping import factored_inverse, relative_factored_inverse
from kfac_scratch.matrices.factors_and_eigenpairs import FactorsAndEigenpairs
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.low_rank import LowRankKronecker
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.checkpoints import restored, tensors
from tests.cases import CONV_PER_LOCATION, DEEP_LINEAR, NONLINEAR
from tests.laws import check_differs, check_equal, check_matrix, error

TAILS = pytest.mark.parametrize("tail", [zero_tail, smallest_kept, trace_matched])
DECAY = 0.9


def random_io(device, n=3, d_in=31, d_out=23, V=1, S=1, dtype=torch.float64):
    """Inputs and vectors whose coordinates decay, as those of a network do."""
    scale = [0.8 ** torch.arange(d, device=device, dtype=dtype) for d in (d_in, d_out)]
    a = torch.randn(n, S, d_in, device=device, dtype=dtype) * scale[0]
    return LayerIO(a, torch.randn(V, n, S, d_out, device=device, dtype=dtype) * scale[1])


def follow(estimator, ios):
    state = None
    for t, io in enumerate(ios, start=1):
        state = estimator.update(state, io, weight_of_newest(DECAY, t))
    return state


def orthonormal(device, d, r, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(d, r, device=device, dtype=dtype)).Q


def from_full(M, rank, tail):
    """What `truncated` does, of a dense matrix."""
    d, U = (t.flip(-1) for t in torch.linalg.eigh(M))
    P = U[:, :rank] @ U[:, :rank].T
    c = tail(d[:rank], M.trace(), len(M))
    return U[:, :rank] * d[:rank] @ U[:, :rank].T + c * (eye_like(M) - P)


def dense(U, d, c=0.0):
    return U * (d - c) @ U.T + c * eye_like(U @ U.T)


def check_orthonormal(M):
    for U in (M.UA, M.UB):
        check_equal(U.T @ U, torch.eye(U.shape[1], dtype=U.dtype, device=U.device))


# ---- the average --------------------------------------------------------------------------------


@pytest.mark.parametrize("V", [1, 2])
@pytest.mark.parametrize("S", [1, 2])
def test_without_truncation_the_factors_are_those_of_the_average(S, V, device):
    ios = [random_io(device, n=1, V=V, S=S) for _ in range(5)]
    M, K = follow(Brand(rank=30), ios), follow(MovingAverage(kfac), ios)
    A, B = M.factors()
    check_equal(A, K.A)
    check_equal(B, K.B)
    check_orthonormal(M)
    assert len(M.dA) == 5 * S
    assert len(M.dB) == 5 * S * V
    check_equal(M.inverse(0.1).dense(), K.inverse(0.1).dense())


@pytest.mark.parametrize("n", [1, 20, 50])
@pytest.mark.parametrize("view", [lambda io: io, LayerIO.reduced])
def test_brand_of_full_rank_is_kfac(view, n, device):
    """A layer that is too small for the update is decomposed in full: nothing is lost."""
    ios = [view(random_io(device, n, 11, 7, V=2, S=3)) for _ in range(4)]
    M, K = follow(Brand(rank=11), ios), follow(MovingAverage(kfac), ios)
    check_equal(M.dense(), K.dense())
    check_equal(M.inverse(0.1).dense(), K.inverse(0.1).dense())
    A, B = K.A + 0.1 * eye_like(K.A), K.B + 0.3 * eye_like(K.B)
    damped = M.inverse_of_damped_factors(0.1, 0.3)
    check_equal(damped.dense(), Kronecker(torch.linalg.inv(A), torch.linalg.inv(B)).dense())


def test_small_layers_are_never_truncated(device):
    """Nor is their tail lost when a batch is larger than those before."""
    ios = [random_io(device, 9, 11, 7) for _ in range(4)]
    M, K = follow(Brand(rank=4), ios), follow(MovingAverage(kfac), ios)
    check_equal(M.dense(), K.dense())
    io = random_io(device, 1, 11, 7)
    M = Brand(rank=4).update(Brand(rank=4).update(M, io, 0.2), io, 0.2)
    assert min(M.cA, M.cB) > 0
    after = Brand(rank=4).update(M, ios[0], 0.3).factors()
    batch = kfac(ios[0])
    for new, old, share in zip(after, M.factors(), (batch.A, batch.B), strict=True):
        check_equal(new, 0.7 * old + 0.3 * share)


@pytest.fixture
def ran(monkeypatch):
    """How often a factor was updated in each of the two ways."""
    calls = Counter()
    for name in ("brand_update", "updated_in_full"):
        function = getattr(brand, name)

        def counting(*args, name=name, function=function):
            calls[name] += 1
            return function(*args)

        monkeypatch.setattr(brand, name, counting)
    return calls


@pytest.mark.parametrize(("rank", "fits"), [(12, 2), (13, 1), (20, 1), (21, 0)])
def test_an_update_is_of_low_rank_where_pairs_and_columns_fit_into_a_factor(
    rank, fits, ran, device
):
    """A factor with 31 rows and one with 23, and 11 columns in every batch."""
    state = follow(Brand(rank), [random_io(device, 11) for _ in range(4)])
    ran.clear()
    Brand(rank).update(state, random_io(device, 11), 0.1)
    assert (ran["brand_update"], ran["updated_in_full"]) == (fits, 2 - fits)
    assert sum(is_low_rank_update(size, rank, 11) for size in (31, 23)) == fits


def test_the_first_updates_may_be_of_low_rank_where_the_others_are_not(ran, device):
    state = Brand(20).update(None, random_io(device, 12), 1.0)
    assert ran == {"brand_update": 2}
    ran.clear()
    follow(Brand(20), [random_io(device, 12) for _ in range(3)])
    assert ran == {"brand_update": 3, "updated_in_full": 3}
    assert is_low_rank_update(31, len(state.dA), 12)
    assert not is_low_rank_update(31, 20, 12)


@pytest.mark.parametrize("case", DEEP_LINEAR, ids=str)
def test_brand_of_full_rank_is_exact_where_kfac_is(case, device):
    problem = case.build(device)
    exact = diagonal_blocks(problem[0], ggn(*problem))
    for name, io in layer_ios(*problem).items():
        check_equal(Brand().update(None, io, 1.0).dense(), exact[name])


@pytest.mark.parametrize("weight", [0.05, 0.5, 1.0])
def test_the_tail_is_a_part_of_the_matrix(weight, device):
    """`(1 - weight) * state + weight * batch`, whatever the state: say, the identity."""
    io = random_io(device)
    start = LowRankKronecker(
        *(orthonormal(device, 31, 4), torch.tensor([5.0, 4.0, 3.0, 0.5], device=device)),
        *(torch.tensor(1.0, device=device), *(getattr(zero_factors(io), k) for k in ("UB", "dB"))),
        torch.tensor(2.0, device=device),
    )
    A, B = Brand(rank=20).update(start, io, weight).factors()
    (A0, B0), batch = start.factors(), kfac(io)
    check_equal(A, (1 - weight) * A0 + weight * batch.A)
    check_equal(B, (1 - weight) * B0 + weight * batch.B)


def test_starting_at_the_identity_is_a_damping(device):
    ios = [random_io(device) for _ in range(4)]
    zero = zero_factors(ios[0])
    one = LowRankKronecker(zero.UA, zero.dA, zero.cA + 1, zero.UB, zero.dB, zero.cB + 1)
    for io in ios:
        zero, one = (Brand(rank=15).update(M, io, 0.1) for M in (zero, one))
    for started, plain in zip(one.factors(), zero.factors(), strict=True):
        check_equal(started, plain + 0.9**4 * eye_like(plain))


def test_one_batch_is_woodbury(device):
    io = random_io(device)
    M, weight, damping = Brand().update(zero_factors(io), io, 0.05), 0.05, 0.1
    X = (weight / 3) ** 0.5 * io.a.squeeze(1)  # [N, d_in]
    small = torch.linalg.inv(damping * torch.eye(3, device=device) + X @ X.T)
    woodbury = (torch.eye(31, device=device) - X.T @ small @ X) / damping
    inverse = M.inverse_of_damped_factors(damping, 1.0)
    check_equal(inverse.factors()[0], woodbury)


@pytest.mark.parametrize("view", [lambda io: io, LayerIO.reduced])
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_obeys_the_laws_of_matrices(case, view, rank, dtype, device):
    for io in layer_ios(*case.build(device, dtype)).values():
        M = follow(Brand(rank), [view(io), view(io)])
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))
        check_orthonormal(M)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_long_run_keeps_the_basis_orthonormal(dtype, device):
    """To a few units of round-off, however many updates there were."""
    M = follow(Brand(rank=5), [random_io(device, dtype=dtype) for _ in range(300)])
    for U in (M.UA, M.UB):
        wrong = U.T @ U - torch.eye(U.shape[1], device=device, dtype=dtype)
        assert wrong.abs().max() < 10 * torch.finfo(dtype).eps


# ---- truncation ---------------------------------------------------------------------------------


@TAILS
def test_truncation_keeps_the_leading_eigenpairs(tail, device):
    U, d = orthonormal(device, 20, 9), torch.linspace(9, 1, 9, device=device)
    factor = U, d, torch.tensor(0.5, device=device)
    check_equal(dense(*truncated(factor, 4, tail)), from_full(dense(*factor), 4, tail))
    assert truncated(factor, 9, tail) is factor


def test_what_is_cut_off_is_all_of_the_error(device):
    """Without a tail: the errors of all truncations, decayed, and none is negative."""
    factor = zero_factors(random_io(device))
    factor, rank, rho = (factor.UA, factor.dA, factor.cA), 5, 0.8
    exact, errors = torch.zeros(31, 31, device=device), torch.zeros(31, 31, device=device)
    for _ in range(12):
        X = torch.randn(31, 3, device=device)
        cut = dense(*factor) - dense(*truncated(factor, rank, zero_tail))
        factor = updated_factor(factor, X, 1 - rho, rank, zero_tail)
        exact = rho * exact + (1 - rho) * X @ X.T
        errors = rho * (errors + cut)
        check_equal(dense(*factor), exact - errors)
        assert torch.linalg.eigvalsh(cut)[0] > -1e-12
    check_differs(dense(*factor), exact)
    assert torch.linalg.eigvalsh(exact - dense(*factor))[0] > -1e-12


@pytest.mark.parametrize("V", [1, 2])
def test_traces_are_those_of_the_average(V, device):
    ios = [random_io(device, V=V) for _ in range(12)]
    M, K = follow(Brand(rank=4), ios), follow(MovingAverage(kfac), ios)
    for mine, exact in zip(M.factors(), (K.A, K.B), strict=True):
        check_equal(mine.trace(), exact.trace())
        check_differs(mine, exact)
    check_differs(follow(Brand(4, zero_tail), ios).trace(), K.trace())


@pytest.mark.parametrize("seed", range(5))
def test_following_is_nearly_as_good_as_truncating_the_average(seed, device):
    torch.manual_seed(seed)
    ios = [random_io(device) for _ in range(40)]
    M, K = follow(Brand(rank=8), ios), follow(MovingAverage(kfac), ios)
    eye = eye_like(K.A)
    exact = torch.linalg.inv(K.A + 0.01 * eye)

    def distance(A):
        return error(torch.linalg.inv(A + 0.01 * eye), exact)

    best = distance(from_full(K.A, 8, trace_matched))
    assert distance(M.factors()[0]) < 1.5 * best
    # a tail that is larger than what was cut off grows from one update to the next
    continued = follow(Brand(8, smallest_kept), ios)
    assert distance(continued.factors()[0]) > 1.5 * distance(M.factors()[0])


def test_the_state_has_the_batch_besides_the_rank(device):
    M = follow(Brand(rank=4), [random_io(device) for _ in range(6)])
    assert M.UA.shape == (31, 7)
    assert M.UB.shape == (23, 7)


def test_the_state_is_left_as_it_is(device):
    io = random_io(device)
    state = follow(Brand(rank=4), [io, io, random_io(device)])
    before = {name: value.clone() for name, value in tensors(state).items()}
    Brand(rank=2).update(state, io, 0.3)
    for name, value in tensors(state).items():
        assert torch.equal(value, before[name])


# ---- gradients in factors -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_gradient_in_factors_stays_in_factors(dtype, device):
    M = follow(Brand(rank=4), [random_io(device, dtype=dtype) for _ in range(5)])
    io = random_io(device, n=6, dtype=dtype)
    g, a = io.g.flatten(0, 2), io.a.flatten(0, 1)
    inverse = M.inverse_of_damped_factors(0.1, 0.3)
    for map_ in (M, inverse):
        h, b = product_of_rows(map_, g, a)
        check_equal(h.T @ b, map_ @ (g.T @ a))
    A, B = M.factors()
    A, B = A + 0.1 * eye_like(A), B + 0.3 * eye_like(B)
    check_equal(B @ (h.T @ b) @ A, g.T @ a)


# ---- B-R-KFAC and B-KFAC-C ----------------------------------------------------------------------

SKETCH = Sketch(rank=4, oversampling=2, iterations=1, seed=3)
REPAIRS = pytest.mark.parametrize("repair", [refreshed(SKETCH), corrected()])


def test_after_a_refresh_it_is_rs_kfac(device):
    ios = [random_io(device) for _ in range(7)]
    estimator = Repaired(Brand(rank=4), refreshed(SKETCH), period=3)
    M, K = follow(estimator, ios[:6]), follow(MovingAverage(kfac), ios[:6])
    check_equal(M.factors.dense(), K.dense())
    check_equal(M.dense(), Randomized(K.A, K.B, SKETCH).dense())
    io = random_io(device, n=9)
    first = Repaired(Brand(rank=4), refreshed(SKETCH), period=1).update(None, io, 1.0)
    check_equal(first.dense(), Randomized(kfac(io).A, kfac(io).B, SKETCH).dense())
    later = estimator.update(M, ios[6], 0.1)
    check_equal(later.dense(), Brand(4).update(M.modes, ios[6], 0.1).dense())
    A = 0.9 * K.A + 0.1 * kfac(ios[6]).A
    check_differs(later.dense(), Randomized(A, K.B, SKETCH).dense())


@REPAIRS
def test_between_repairs_it_is_b_kfac(repair, device):
    ios = [random_io(device) for _ in range(5)]
    M = follow(Repaired(Brand(rank=4), repair, period=6), ios)
    check_equal(M.dense(), follow(Brand(rank=4), ios).dense())
    check_differs(follow(Repaired(Brand(rank=4), repair, 5), ios).dense(), M.dense(), by=1e-4)
    assert M.count == 5


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("fraction", [0.0, 0.2, 1.0])
def test_a_correction_never_adds_to_the_error(fraction, seed, device):
    torch.manual_seed(seed)
    M = torch.randn(20, 20, device=device)
    M = M @ M.T
    U = orthonormal(device, 20, 8)
    d, c = torch.rand(8, device=device).sort(descending=True).values * 30, 1.5
    chosen = torch.randperm(8)[: min(round(fraction * 8 + 1), 8)].to(device)
    new, basis = ritz(M, d, U, chosen)
    before, after = ((M - dense(*f, c)).square().sum() for f in ((U, d), (basis, new)))
    gain = (U[:, chosen].T @ (M - dense(U, d, c)) @ U[:, chosen]).square().sum()
    check_equal(before - after, gain)
    assert (new.diff() <= 0).all()
    check_equal(basis @ basis.T, U @ U.T)  # the span stays


def test_a_full_correction_of_the_right_span_is_the_truncated_decomposition(device):
    A, B = (kfac(random_io(device, n=50)).A for _ in range(2))
    bases = [torch.linalg.eigh(M).eigenvectors[:, -8:] for M in (A, B)]
    turned = [U @ orthonormal(device, 8, 8) for U in bases]
    zero, d = torch.zeros((), device=device), torch.ones(8, device=device)
    state = FactorsAndEigenpairs(
        Kronecker(A, B), LowRankKronecker(turned[0], d, zero, turned[1], d, zero), 1
    )
    M = corrected(fraction=1.0)(state)
    check_equal(M.dense(), Kronecker(*(from_full(F, 8, zero_tail) for F in (A, B))).dense())
    check_orthonormal(M)


def test_the_subset_changes_from_one_correction_to_the_next(device):
    ios = [random_io(device) for _ in range(6)]
    M = follow(Repaired(Brand(rank=4), corrected(), period=7), ios)

    def corrections(count, seed):
        return corrected(seed=seed)(FactorsAndEigenpairs(M.factors, M.modes, count)).dense()

    assert torch.equal(corrections(1, 0), corrections(1, 0))
    assert not torch.equal(corrections(1, 0), corrections(4, 0))
    assert not torch.equal(corrections(1, 0), corrections(1, 3))


@pytest.mark.parametrize("seed", range(5))
def test_following_beats_standing_still(seed, device):
    """Data drift for twenty batches after a refresh."""
    torch.manual_seed(seed)
    turn = orthonormal(device, 31, 31)
    ios = [random_io(device) for _ in range(60)]
    for t in range(40, 60):
        mixed = ios[t].a + (t - 40) / 10 * (random_io(device).a @ turn)
        ios[t] = LayerIO(mixed, ios[t].g)
    K = follow(MovingAverage(kfac), ios)
    estimator = Repaired(Brand(rank=12), refreshed(Sketch(12, seed=seed)), period=40)
    stale, now = follow(estimator, ios[:40]), follow(estimator, ios)
    damped = K.A + 0.1 * eye_like(K.A)
    old, new = (
        error(
            torch.linalg.inv(M.modes.factors()[0] + 0.1 * eye_like(K.A)), torch.linalg.inv(damped)
        )
        for M in (stale, now)
    )
    assert new < old / 2


@pytest.mark.parametrize("view", [lambda io: io, LayerIO.reduced])
@REPAIRS
def test_repaired_obeys_the_laws_of_matrices(repair, view, device):
    for io in layer_ios(*NONLINEAR[0].build(device)).values():
        M = follow(Repaired(Brand(rank=3), repair, period=2), [view(io)] * 3)
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@REPAIRS
def test_brand_survives_a_checkpoint(repair, dtype, device):
    ios = [random_io(device, dtype=dtype) for _ in range(6)]
    estimator = Repaired(Brand(rank=4), repair, period=3)
    M = follow(estimator, ios[:4])
    saved = tensors(M)
    again = restored(follow(estimator, ios[:1]), saved)
    check_equal(
        estimator.update(again, ios[5], 0.1).dense(), estimator.update(M, ios[5], 0.1).dense()
    )


# ---- edges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1, 1), (1, 23), (31, 1)])
@pytest.mark.parametrize("n", [1, 4])
def test_brand_on_layers_of_size_one(n, sizes, device):
    ios = [random_io(device, n, *sizes) for _ in range(3)]
    M = follow(Brand(rank=31), ios)
    check_equal(M.dense(), follow(MovingAverage(kfac), ios).dense())


def test_duplicated_data_change_nothing(device):
    io = random_io(device)
    twice = concatenate([io, LayerIO(io.a, io.g)], [1.0, 1.0])
    M = Brand().update(None, twice, 1.0)
    A, B = M.factors()
    check_equal(A, kfac(io).A)
    check_equal(B, 2 * kfac(io).B)
    assert len(M.dA) == 3
    again = Brand().update(M, twice, 0.3)
    check_equal(again.dense(), M.dense())
    check_orthonormal(again)


def test_dead_units_and_zero_vectors(device):
    io = random_io(device)
    dead = LayerIO(io.a * (torch.arange(31, device=device) % 3 > 0), torch.zeros_like(io.g))
    M = follow(Brand(rank=4), [dead] * 3)
    check_equal(M.factors()[0], kfac(dead).A)
    V = torch.randn(23, 31, device=device)
    check_equal(M.inverse(0.5) @ V, 2 * V)


@pytest.mark.parametrize("invert", [exact_inverse, factored_inverse, relative_factored_inverse])
def test_a_continued_inverse_has_the_smallest_eigenvalue_for_all_other_directions(invert, device):
    ios = [random_io(device) for _ in range(4)]
    M = follow(Brand(4, zero_tail), ios)
    A, B = (dense(U, d, d[-1]) for U, d in ((M.UA, M.dA), (M.UB, M.dB)))
    found = ContinuedInverse(invert)(M, 0.1)
    check_equal(found.dense(), invert(Kronecker(A, B), 0.1).dense())
    check_differs(found.dense(), invert(M, 0.1).dense())
    repaired = follow(Repaired(Brand(4, zero_tail), corrected(), 9), ios)
    check_equal(ContinuedInverse(invert)(repaired, 0.1).dense(), found.dense())


def test_the_damping_of_the_authors_code_is_the_default_of_a_continued_inverse(device):
    M, V = follow(Brand(4, zero_tail), [random_io(device)] * 4), torch.randn(23, 31, device=device)
    check_equal(
        ContinuedInverse()(M, 0.1) @ V, ContinuedInverse(relative_factored_inverse)(M, 0.1) @ V
    )
    nothing = zero_factors(random_io(device))  # no eigenpairs: the tail stays
    check_equal(ContinuedInverse()(nothing, 0.1) @ V, 100 * V)
    with pytest.raises(TypeError, match=r"not a Kronecker.*SketchedInverse"):
        ContinuedInverse()(kfac(random_io(device)), 0.1)


def test_impossible_settings_of_brand_are_refused():
    with pytest.raises(ValueError, match="rank must be at least 1"):
        Brand(rank=0)
    with pytest.raises(ValueError, match="period must be at least 1"):
        Repaired(Brand(), corrected(), period=0)
    with pytest.raises(ValueError, match="fraction"):
        corrected(fraction=1.5)
