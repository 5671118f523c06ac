import pytest
import torch

from kfac_scratch import LayerIO, ekfac, kfac, mini_block_rows
from kfac_scratch.approximations.estimators import (
    Estimator,
    Latest,
    MovingAverage,
    estimator,
    weight_of_newest,
)
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from tests.laws import check_differs, check_equal


def stream(device, count=4):
    for _ in range(count):
        a = torch.randn(7, 2, 5, device=device)
        yield LayerIO(a, torch.randn(2, 7, 2, 3, device=device))


def run(how, ios, decay):
    state = None
    for t, io in enumerate(ios, start=1):
        state = how.update(state, io, weight_of_newest(decay, t))
    return state


def weighted_mean(tensors, decay):
    weights = [decay ** (len(tensors) - 1 - i) for i in range(len(tensors))]
    return sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)


@pytest.mark.everywhere
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95, 1.0])
def test_is_the_bias_corrected_average(decay, device):
    ios = list(stream(device))
    M = run(MovingAverage(kfac), ios, decay)
    check_equal(M.A, weighted_mean([kfac(io).A for io in ios], decay))
    check_equal(M.B, weighted_mean([kfac(io).B for io in ios], decay))


def test_equals_the_zero_started_average_after_correction(device):
    ios, decay = list(stream(device)), 0.9
    A = torch.zeros(5, 5, device=device)
    for io in ios:
        A = decay * A + (1 - decay) * kfac(io).A
    check_equal(run(MovingAverage(kfac), ios, decay).A, A / (1 - decay ** len(ios)))


def test_equals_the_weighted_average_with_a_running_total(device):
    """`w <- decay w + 1; M <- M + (new - M) / w`, the form that counts weights instead of steps."""
    ios, decay, total = list(stream(device)), 0.9, 0.0
    A = torch.zeros(5, 5, device=device)
    for io in ios:
        total = decay * total + 1
        A = A + (kfac(io).A - A) / total
    check_equal(run(MovingAverage(kfac), ios, decay).A, A)


def test_martens_and_grosses_schedule_is_the_plain_mean_at_first(device):
    """`min(1 - 1/t, decay)` averages plainly until `t = 1 / (1 - decay)`; ours decays at once."""
    ios = list(stream(device))
    A = torch.zeros(5, 5, device=device)
    for t, io in enumerate(ios, start=1):
        rho = min(1 - 1 / t, 0.95)
        A = rho * A + (1 - rho) * kfac(io).A
    check_equal(A, torch.stack([kfac(io).A for io in ios]).mean(0))
    check_equal(A, run(MovingAverage(kfac), ios, 1.0).A)
    check_differs(A, run(MovingAverage(kfac), ios, 0.5).A)


def test_a_start_at_the_identity_is_a_damping_that_decays(device):
    """What many implementations do adds `decay^t I` to the uncorrected average."""
    ios, decay = list(stream(device)), 0.9
    eye = torch.eye(5, device=device)
    A = eye
    for io in ios:
        A = decay * A + (1 - decay) * kfac(io).A
    share = decay ** len(ios)
    check_equal(A, share * eye + (1 - share) * run(MovingAverage(kfac), ios, decay).A)


def test_the_average_of_factors_is_not_the_average_of_products(device):
    ios = list(stream(device))
    mean = torch.stack([kfac(io).dense() for io in ios]).mean(0)
    check_differs(run(MovingAverage(kfac), ios, 1.0).dense(), mean)


def test_averages_of_equal_shards_and_over_time_commute(device):
    """Data-parallel workers may average their averaged factors, if they average linearly."""
    shards = [list(stream(device)) for _ in range(3)]
    apart = torch.stack([run(MovingAverage(kfac), ios, 0.9).A for ios in shards]).mean(0)
    steps = [torch.stack([kfac(io).A for io in ios]).mean(0) for ios in zip(*shards, strict=True)]
    check_equal(apart, weighted_mean(steps, 0.9))


def test_latest_forgets(device):
    ios = list(stream(device))
    check_equal(run(Latest(kfac), ios, 0.9).dense(), kfac(ios[-1]).dense())


def test_the_state_is_a_value(device):
    first, second = stream(device, 2)
    M = kfac(first)
    before = M.dense().clone()
    MovingAverage(kfac).update(M, second, 0.3)
    check_equal(M.dense(), before)


@pytest.mark.parametrize(
    "approximation",
    [
        kfac,
        lambda io: Dense(io.block()),
        lambda io: Diagonal(io.block().diagonal().reshape(3, 5)),
    ],
)
def test_every_field_is_averaged_with_its_weight(approximation, device):
    first, second = (approximation(io) for io in stream(device, 2))
    M = first.mixed(second, 0.3)
    for name in vars(M):
        check_equal(getattr(M, name), 0.7 * getattr(first, name) + 0.3 * getattr(second, name))


def test_sums_of_products_are_not_averaged_factor_by_factor(device):
    """Their terms may change places, and signs: `Recompressed` averages the blocks instead."""
    (io,) = stream(device, 1)
    with pytest.raises(TypeError, match="KroneckerSum has no method mixed"):
        MovingAverage(lambda io: KroneckerSum(kfac(io), kfac(io.reduced()))).update(None, io, 1.0)


# ---- bases ------------------------------------------------------------------------------------


def test_bases_are_never_averaged(device):
    first, second = (ekfac(io) for io in stream(device, 2))
    M = first.mixed(second, 0.3)
    check_equal(M.QA, second.QA)
    U = torch.kron(second.QB, second.QA)
    average = 0.7 * first.dense() + 0.3 * second.dense()
    check_equal(M.scale.flatten(), (U.T @ average @ U).diagonal())
    check_equal(M.trace(), average.trace())


def test_carried_over_is_the_nearest_with_that_basis(device):
    first, second = (ekfac(io) for io in stream(device, 2))
    best = first.carried_over(second)
    distance = (best.dense() - first.dense()).norm()
    for _ in range(20):
        other = type(best)(best.QA, best.QB, best.scale + 0.01 * torch.randn_like(best.scale))
        assert (other.dense() - first.dense()).norm() > distance
    check_equal(first.carried_over(first).dense(), first.dense())


# ---- border -----------------------------------------------------------------------------------


def test_what_has_no_average_is_refused_by_name(device):
    (io,) = stream(device, 1)
    with pytest.raises(TypeError, match=r"BlocksByRows has no method mixed.*Latest"):
        MovingAverage(mini_block_rows).update(None, io, 1.0)


def test_two_kinds_are_not_averaged(device):
    (io,) = stream(device, 1)
    with pytest.raises(TypeError, match="Kronecker cannot be averaged with a Dense"):
        MovingAverage(kfac).update(Dense(io.block()), io, 0.5)


def test_a_function_is_averaged_and_an_estimator_left_alone():
    assert estimator(kfac) == MovingAverage(kfac)
    assert estimator(Latest(kfac)) == Latest(kfac)
    assert isinstance(Latest(kfac), Estimator)


@pytest.mark.parametrize(("decay", "count"), [(-0.1, 1), (1.1, 1), (float("nan"), 1), (0.9, 0)])
def test_weights_out_of_range_are_refused(decay, count):
    with pytest.raises(ValueError, match="decay must lie in"):
        weight_of_newest(decay, count)


def test_weights_start_at_one_and_end_at_one_minus_decay():
    assert weight_of_newest(0.9, 1) == pytest.approx(1)
    assert weight_of_newest(0.9, 1000) == pytest.approx(0.1)
    assert weight_of_newest(1.0, 4) == 0.25
