from itertools import pairwise

import pytest
import torch

import kfac_scratch.approximations.randomized as module
from kfac_scratch import LayerIO, kfac, layer_ios
from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.approximations.randomized import (
    Randomized,
    Sketch,
    SketchedInverse,
    leading,
    nystrom,
    randomized,
    range_basis,
    rsvd,
    smallest_kept,
    srevd,
    trace_matched,
    zero_tail,
)
from kfac_scratch.curvature import diagonal_blocks, ggn
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.damping import (
    default_inverse,
    factored_inverse,
    relative_factored_inverse,
    relative_inverse,
)
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.low_rank import LowRankKronecker
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.checkpoints import restored, tensors
from kfac_scratch.optimizer.state_dicts import name_of
from tests.cases import CONV_PER_LOCATION, DEEP_LINEAR, NONLINEAR
from tests.laws import check_differs, check_equal, check_matrix

EACH = pytest.mark.parametrize("decomposition", [rsvd, srevd, nystrom])
SMALL = Sketch(rank=7, oversampling=4, iterations=1)


def decaying(device, d=40, rate=0.1, dtype=torch.float64, rank=None):
    """A PSD matrix with eigenvalues `10^(-rate * i)`, from rank on zero."""
    Q = torch.linalg.qr(torch.randn(d, d, device=device)).Q
    values = 10 ** (-rate * torch.arange(d, device=device))
    values[rank or d :] = 0
    M = Q * values @ Q.T
    return ((M + M.T) / 2).to(dtype), values.to(dtype)


def dense(d, U, c=0.0):
    return U * d @ U.T + c * (eye_like(U @ U.T) - U @ U.T)


def smallest_eigenvalue(M):
    return torch.linalg.eigvalsh(M)[0]


def random_io(device, n=6, d_in=31, d_out=23, S=1, dtype=torch.float64):
    a = torch.randn(n, S, d_in, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(2, n, S, d_out, device=device, dtype=dtype))


# ---- the decompositions -------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_eigenvectors_are_orthonormal_and_eigenvalues_descend(decomposition, dtype, device):
    M, _ = decaying(device, dtype=dtype)
    d, U = leading(M, SMALL, decomposition)
    assert d.shape == (7,)
    check_equal(U.T @ U, torch.eye(7, device=device, dtype=dtype))
    assert (d.diff() <= 0).all()
    assert (d >= 0).all()


def test_rs_is_a_root_and_never_more_than_the_factor(device):
    M, _ = decaying(device)
    Q = range_basis(M, SMALL)
    found = dense(*rsvd(M, Q))
    check_equal(found @ found, M @ Q @ Q.T @ M)
    assert smallest_eigenvalue(found) > -1e-12
    assert smallest_eigenvalue(M - dense(*rsvd(M, Q))) > -1e-12
    assert smallest_eigenvalue(M - dense(*leading(M, SMALL, rsvd))) > -1e-12


def test_sre_is_a_compression_and_may_be_more_than_the_factor(device):
    M, values = decaying(device)
    Q = range_basis(M, SMALL)
    d, U = srevd(M, Q)
    check_equal(dense(d, U), Q @ Q.T @ M @ Q @ Q.T)
    assert (d <= values[:11]).all()
    assert smallest_eigenvalue(M - dense(d, U)) < -1e-3


def test_nystrom_is_a_schur_complement(device):
    M, _ = decaying(device)
    Q = range_basis(M, SMALL)
    expected = M @ Q @ torch.linalg.solve(Q.T @ M @ Q, Q.T @ M)
    check_equal(dense(*nystrom(M, Q)), expected)
    assert smallest_eigenvalue(M - expected) > -1e-12


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_srevd_rsvd_and_nystrom_are_ordered(rate, seed, device):
    torch.manual_seed(seed)
    M, values = decaying(device, rate=rate)
    Q = range_basis(M, SMALL)
    chain = [*(f(M, Q)[0] for f in (srevd, rsvd, nystrom)), values[:11]]
    for lower, upper in pairwise(chain):
        assert (lower <= upper + 1e-12).all()
    below = dense(*nystrom(M, Q)) - dense(*rsvd(M, Q))
    assert smallest_eigenvalue(below) > -1e-12


@EACH
def test_iterations_bring_the_leading_eigenpairs(decomposition, device):
    M, values = decaying(device)
    errors = [
        (leading(M, Sketch(7, 4, k), decomposition)[0] - values[:7]).abs().max() for k in (0, 1, 4)
    ]
    assert errors[0] > 2 * errors[1] > 20 * errors[2]


def test_rs_is_half_a_power_step_ahead_of_sre(device):
    """`srevd` with one more half step: the same `Q`, seen by the root of the factor's square."""
    M, _ = decaying(device)
    Q = range_basis(M, SMALL)
    check_equal(rsvd(M, Q)[0].square(), srevd(M @ M, Q)[0])


@EACH
def test_exact_if_the_basis_is_complete(decomposition, device):
    M, values = decaying(device, d=12)
    Q = torch.linalg.qr(torch.randn(12, 12, device=device)).Q
    d, U = decomposition(M, Q)
    check_equal(d, values)
    check_equal(dense(d, U), M)


@EACH
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_exact_if_the_rank_is_reached(decomposition, rank, device):
    M, values = decaying(device, rank=rank)
    d, U = leading(M, SMALL, decomposition)
    check_equal(d, values[:7])
    check_equal(dense(d, U), M)


@EACH
def test_a_small_factor_is_decomposed_in_full(decomposition, device):
    M, values = decaying(device, d=11)
    d, U = leading(M, Sketch(rank=7, oversampling=4, iterations=0), decomposition)
    check_equal(d, values[:7])
    check_equal(M @ U, U * d)
    M, values = decaying(device, d=12)
    check_differs(leading(M, Sketch(7, 4, 0), decomposition)[0], values[:7], by=1e-5)


@EACH
def test_a_zero_factor_has_zero_eigenvalues(decomposition, device):
    d, U = leading(torch.zeros(20, 20, device=device), SMALL, decomposition)
    assert not d.any()
    check_equal(U.T @ U, torch.eye(7, device=device))


def test_the_same_seed_gives_the_same_result(device):
    M, _ = decaying(device)
    assert torch.equal(range_basis(M, SMALL), range_basis(M, SMALL))
    before = torch.get_rng_state()
    check_differs(range_basis(M, SMALL), range_basis(M, Sketch(7, 4, 1, seed=1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_powers_without_qr_lose_small_directions(device):
    """As a public implementation does it: the 30th eigenvalue is lost in single precision."""
    M, values = decaying(device, d=60, dtype=torch.float32)
    sketch = Sketch(rank=30, oversampling=10, iterations=3)
    Y = torch.randn(60, 40, device=device, dtype=torch.float32)
    for _ in range(4):
        Y = M @ Y
    naive = srevd(M, torch.linalg.qr(Y).Q)[0]
    proper = srevd(M, range_basis(M, sketch))[0]
    assert abs(proper[29] / values[29] - 1) < 0.01
    assert abs(naive[29] / values[29] - 1) > 0.1
    assert abs(naive[9] / values[9] - 1) < 0.01  # large ones are right


# ---- the tail -----------------------------------------------------------------------------------

TAILS = pytest.mark.parametrize("tail", [zero_tail, smallest_kept, trace_matched])


@TAILS
def test_error_of_the_damped_inverse(tail, device):
    """With exact eigenpairs the error is the largest one in the tail, and c tells its sign."""
    M, values = decaying(device)
    d, U = torch.linalg.eigh(M)
    d, U = d.flip(0)[:7], U.flip(1)[:, :7]
    c, damping = tail(d, M.trace(), 40), 0.01
    wrong = torch.linalg.inv(dense(d, U, c) + damping * eye_like(M))
    wrong -= torch.linalg.inv(M + damping * eye_like(M))
    expected = (1 / (values[7:] + damping) - 1 / (c + damping)).abs().max()
    check_equal(torch.linalg.matrix_norm(wrong, 2), expected)
    eigenvalues = torch.linalg.eigvalsh(wrong)
    if tail is zero_tail:
        assert eigenvalues[0] > -1e-9
    if tail is smallest_kept:
        check_equal(c, values[6])
        assert eigenvalues[-1] < 1e-9
    if tail is trace_matched:
        assert eigenvalues[0] < -0.1 < 0.1 < eigenvalues[-1]


def test_matching_the_trace_is_the_best_of_the_three(device):
    """For this spectrum and damping; the best of all is the midpoint of the two extremes."""
    M, values = decaying(device, rate=0.03)
    tail, damping = values[7:], 0.1

    def error(c):
        return (1 / (tail + damping) - 1 / (c + damping)).abs().max()

    d, trace = values[:7], M.trace()
    mine, none, continued = (f(d, trace, 40) for f in (trace_matched, zero_tail, smallest_kept))
    check_equal(mine, tail.mean())
    assert error(mine) < error(none)
    assert error(mine) < error(continued)
    lowest = (1 / (tail.min() + damping) - 1 / (tail.max() + damping)) / 2
    assert lowest < error(mine)


@TAILS
def test_there_is_no_tail_at_full_rank(tail, device):
    M = Randomized(*(decaying(device, d)[0] for d in (5, 3)), Sketch(7))
    check_equal(M.low_rank(rsvd, tail).dense(), Kronecker(M.A, M.B).dense())


def test_a_trace_matched_tail_keeps_the_trace(device):
    M = randomized(7, oversampling=0, iterations=0)(random_io(device))
    for f in (rsvd, srevd, nystrom):
        check_equal(M.low_rank(f).trace(), Kronecker(M.A, M.B).trace())
    check_equal(M.trace(), M.low_rank().trace())
    check_differs(M.low_rank(rsvd, zero_tail).trace(), M.trace())


# ---- RS-KFAC ------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [lambda io: io, LayerIO.reduced])
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
@pytest.mark.parametrize("rank", [1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_obeys_the_laws_of_matrices(case, view, rank, dtype, device):
    for io in layer_ios(*case.build(device, dtype)).values():
        M = randomized(rank, oversampling=0)(view(io))
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))
        check_equal(M.dense(), M.low_rank().dense())


@pytest.mark.parametrize("S", [1, 4])
def test_rs_kfac_of_full_rank_is_kfac(S, device):
    io = random_io(device, S=S)
    M, K = randomized(31)(io), kfac(io)
    check_equal(M.dense(), K.dense())
    check_equal(M.inverse(0.1).dense(), K.inverse(0.1).dense())
    damped = M.low_rank().inverse_of_damped_factors(0.1, 0.3)
    A, B = K.A + 0.1 * eye_like(K.A), K.B + 0.3 * eye_like(K.B)
    check_equal(damped.dense(), Kronecker(torch.linalg.inv(A), torch.linalg.inv(B)).dense())
    check_differs(randomized(11, oversampling=0)(io).dense(), K.dense())


@pytest.mark.parametrize("case", DEEP_LINEAR, ids=str)
def test_rs_kfac_of_full_rank_is_exact_where_kfac_is(case, device):
    problem = case.build(device)
    exact = diagonal_blocks(problem[0], ggn(*problem))
    for name, io in layer_ios(*problem).items():
        check_equal(randomized()(io).dense(), exact[name])


def test_rank_of_the_batch_is_enough(device):
    """Six data with two vectors each: rank 6 and 12, however wide the layer."""
    io = random_io(device, n=6)
    check_equal(randomized(12, oversampling=0, iterations=1)(io).dense(), kfac(io).dense())
    check_differs(randomized(5, oversampling=0, iterations=1)(io).dense(), kfac(io).dense())


@pytest.mark.parametrize("decomposition", [srevd, nystrom])
def test_other_decompositions_are_other_matrices(decomposition, device):
    M = randomized(3, oversampling=0, iterations=0)(random_io(device, n=30))
    check_equal(M.low_rank(rsvd).dense(), M.dense())
    check_differs(M.low_rank(decomposition).dense(), M.dense(), by=1e-3)


INVERSES = [default_inverse, exact_inverse, relative_factored_inverse, relative_inverse]


@pytest.mark.parametrize("invert", INVERSES)
@TAILS
@EACH
def test_an_inverse_of_the_optimizer_has_any_decomposition_tail_and_damping(
    decomposition, tail, invert, device
):
    M = randomized(7, oversampling=0, iterations=0)(random_io(device, n=30))
    found = SketchedInverse(decomposition, tail, invert)(M, 0.1)
    check_equal(found.dense(), invert(M.low_rank(decomposition, tail), 0.1).dense())
    other = smallest_kept if tail is not smallest_kept else zero_tail
    check_differs(SketchedInverse(decomposition, other, invert)(M, 0.1).dense(), found.dense())


@pytest.mark.parametrize("invert", INVERSES)
def test_the_default_of_a_sketched_inverse_is_the_inverse_itself(invert, device):
    M = randomized(7, oversampling=0)(random_io(device, n=30))
    found = SketchedInverse(invert=invert)(M, 0.1)
    check_equal(found.dense(), invert(M, 0.1).dense())


def test_a_factored_inverse_decomposes_each_factor_once(device, monkeypatch):
    M, calls = randomized(7, oversampling=0)(random_io(device, n=30)), []
    monkeypatch.setattr(
        module, "leading", lambda *args, f=module.leading: calls.append(1) or f(*args)
    )
    factored_inverse(M, 0.1)
    assert len(calls) == 2


def test_an_average_of_sketches_knows_its_diagonal_and_eigenvalues(device):
    M = randomized(7, oversampling=0)(random_io(device, n=30))
    check_equal(M.diagonal(), M.dense().diagonal())
    for mean, largest, F in zip(
        M.mean_eigenvalues(), M.largest_eigenvalues(), M.low_rank().factors(), strict=True
    ):
        check_equal(mean, F.diagonal().mean())
        check_equal(largest, torch.linalg.eigvalsh(F)[-1])


def test_a_sketched_inverse_says_what_it_is_and_refuses_other_matrices(device):
    invert = SketchedInverse(srevd, smallest_kept, factored_inverse)
    assert name_of(invert) == "SketchedInverse(srevd, smallest_kept, factored_inverse)"
    with pytest.raises(TypeError, match=r"randomized\(...\) makes, not a Kronecker"):
        invert(kfac(random_io(device)), 0.1)


def test_factors_are_averaged_before_they_are_decomposed(device):
    first, second = random_io(device), random_io(device)
    average = MovingAverage(randomized(7))
    M = average.update(average.update(None, first, 1.0), second, 0.25)
    assert M.sketch == Sketch(7)
    check_equal(M.A, 0.75 * kfac(first).A + 0.25 * kfac(second).A)
    check_equal(M.B, 0.75 * kfac(first).B + 0.25 * kfac(second).B)


def test_starting_at_the_identity_is_a_damping(device):
    """An average that starts at I has the same eigenvectors, and its share of I in the tail."""
    M, _ = decaying(device, rank=7)
    d, U = leading(M, SMALL)
    shift = 0.95**10
    started = dense(d + shift, U, shift) + 0.01 * eye_like(M)
    check_equal(started, M + (shift + 0.01) * eye_like(M))
    zero, one = torch.zeros_like(d[0]), torch.ones(1, 1, device=device)
    L = LowRankKronecker(U, d, zero, one, one[0], zero)
    expected = torch.linalg.inv(started)
    check_equal(L.inverse_of_damped_factors(shift + 0.01, 1.0).dense(), expected / 2)


@pytest.mark.parametrize("seed", range(5))
def test_decay_of_the_spectrum_of_an_average(seed, device):
    """Weyl: all but `j * N` eigenvalues are below what decay left of the largest one."""
    torch.manual_seed(seed)
    N, j, decay = 3, 4, 0.5
    for growth in (1.0, 20.0):
        history = [torch.zeros(20, 20, device=device)]
        for k in range(8):
            rows = (growth if k >= 8 - j else 1.0) * torch.randn(N, 20, device=device)
            history.append(decay * history[-1] + (1 - decay) / N * rows.T @ rows)
        now, then = (torch.linalg.eigvalsh(history[k]).flip(0) for k in (8, 8 - j))
        assert now[j * N] <= decay**j * then[0]
    assert now[j * N - 1] > decay**j * then[0]  # so `j * N` cannot be one less


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 23), (31, 1)])
def test_rs_kfac_on_layers_of_size_one(n, sizes, device):
    io = random_io(device, n, *sizes)
    check_equal(randomized(4, oversampling=0)(io).dense(), kfac(io).dense())


def test_zero_vectors_leave_only_the_damping(device):
    io = random_io(device)
    M = randomized(4, oversampling=1)(LayerIO(io.a, torch.zeros_like(io.g)))
    V = torch.randn(23, 31, device=device)
    check_equal(M.inverse(0.5) @ V, 2 * V)


def test_rs_kfac_survives_a_checkpoint(device):
    M, other = (randomized(k, oversampling=0)(random_io(device)) for k in (7, 5))
    saved = tensors(M)
    assert saved["sketch"] == {"rank": 7, "oversampling": 0, "iterations": 2, "seed": 0}
    check_equal(restored(other, saved).dense(), M.dense())


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"oversampling": -1}, {"iterations": -1}])
def test_impossible_settings_of_rs_kfac_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must be at least [01], got"):
        randomized(**wrong)


def test_non_finite_factors_are_refused(device):
    M = Randomized(*(torch.full((d, d), torch.nan, device=device) for d in (5, 3)), Sketch())
    with pytest.raises(ValueError, match="non-finite"):
        M.inverse(0.1)
