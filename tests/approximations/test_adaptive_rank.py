from collections import Counter
from itertools import pairwise

import pytest
import torch

import kfac_scratch.approximations.adaptive_rank as module
from kfac_scratch import LayerIO
from kfac_scratch.approximations.adaptive_rank import AdaptiveRank, rank_by_ratio
from kfac_scratch.approximations.estimators import MovingAverage, weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.randomized import (
    Randomized,
    Sketch,
    SketchedInverse,
    randomized,
    smallest_kept,
    srevd,
)
from kfac_scratch.matrices.damping import relative_factored_inverse
from kfac_scratch.optimizer.checkpoints import restored, tensors
from tests.laws import check_differs, check_equal, check_matrix


def random_io(device, n=40, rate_A=0.1, rate_B=0.02):
    """Inputs and vectors whose variances fall by a factor of ten in every `1 / (2 * rate)`."""
    a, g = (
        torch.randn(n, 1, d, device=device) * 10 ** (-rate * torch.arange(d, device=device))
        for d, rate in ((31, rate_A), (23, rate_B))
    )
    return LayerIO(a, g.unsqueeze(0))


def follow(estimator, ios):
    states = []
    for t, io in enumerate(ios, start=1):
        states.append(
            estimator.update(states[-1] if states else None, io, weight_of_newest(0.9, t))
        )
    return states


def ranks(state):
    return len(state.modes.dA), len(state.modes.dB)


# ---- the rule -----------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1, 17, 60])
@pytest.mark.parametrize(("rate", "ratio"), [(0.1, 0.033), (0.05, 0.01)])
def test_the_rank_comes_within_a_step_of_the_eigenvalues_above_the_ratio(
    rate, ratio, start, device
):
    spectrum, rank = 10 ** (2 - rate * torch.arange(60, device=device)), start
    following = rank_by_ratio(ratio, step=3, lowest=1)
    found = [rank := following(spectrum[:rank]) for _ in range(40)]
    right = int((spectrum > ratio * spectrum[0]).sum())
    assert all(abs(rank - right) <= 3 for rank in found[20:])
    assert all(abs(after - before) == 3 for before, after in pairwise(found[20:]))


def test_the_rank_stays_within_its_bounds(device):
    flat, steep = torch.ones(12, device=device), 10.0 ** -torch.arange(12, device=device)
    following = rank_by_ratio(0.1, step=5, lowest=8, highest=15)
    assert (following(flat), following(steep), following(steep[:3])) == (15, 8, 8)
    assert following(torch.zeros(12, device=device)) == 8


@pytest.mark.parametrize(
    "wrong",
    [{"ratio": 0.0}, {"ratio": 1.0}, {"step": 0}, {"lowest": 0}, {"lowest": 20, "highest": 10}],
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(ValueError, match=r"lies in \(0, 1\)|must be at least"):
        rank_by_ratio(**wrong)


# ---- the estimator ------------------------------------------------------------------------------


def test_right_after_a_decomposition_it_is_rs_kfac_of_the_same_rank(device):
    ios = [random_io(device) for _ in range(5)]
    state = follow(AdaptiveRank(Sketch(6, 2), lambda d: 6), ios)[-1]
    plain = follow(MovingAverage(randomized(6, oversampling=2)), ios)[-1]
    check_equal(state.dense(), plain.dense())
    check_equal(state.inverse(0.1).dense(), plain.inverse(0.1).dense())
    other = AdaptiveRank(Sketch(6, 2), lambda d: 6, decomposition=srevd, tail=smallest_kept)
    check_equal(follow(other, ios)[-1].dense(), plain.low_rank(srevd, smallest_kept).dense())
    check_matrix(state, (23, 31))


def test_each_factor_gets_the_rank_that_its_spectrum_needs(device):
    """Inputs decay fast, vectors slowly: with exact eigenpairs, a rank of 8 and one of 23."""
    ios = [random_io(device, n=400) for _ in range(14)]
    estimator = AdaptiveRank(Sketch(12, 40), rank_by_ratio(0.033, step=1, lowest=1))
    states = follow(estimator, ios)
    factors = states[-1].factors
    right = [
        int((s > 0.033 * s[-1]).sum()) for s in map(torch.linalg.eigvalsh, vars(factors).values())
    ]
    assert ranks(states[0]) == (12, 12)
    assert all(abs(r - n) <= 1 for r, n in zip(ranks(states[-1]), right, strict=True))
    assert right[0] < 12 < right[1]


def test_a_rank_above_the_size_of_a_factor_is_its_size(device):
    ios = [random_io(device) for _ in range(3)]
    state = follow(AdaptiveRank(Sketch(8), lambda d: len(d) + 100), ios)[-1]
    assert ranks(state) == (31, 23)
    check_equal(state.dense(), follow(MovingAverage(kfac), ios)[-1].dense())


def test_eigenpairs_are_computed_once_in_a_period(device, monkeypatch):
    calls = Counter()

    def counting(*args, function=module.leading):
        calls["leading"] += 1
        return function(*args)

    monkeypatch.setattr(module, "leading", counting)
    states = follow(AdaptiveRank(Sketch(6), period=3), [random_io(device) for _ in range(7)])
    assert calls == {"leading": 6}  # of both factors after batches 1, 4 and 7
    assert states[1].modes is states[0].modes
    assert states[3].modes is not states[2].modes
    check_differs(states[1].factors.A, states[0].factors.A)


def test_the_state_survives_a_checkpoint(device):
    states = follow(AdaptiveRank(Sketch(6)), [random_io(device) for _ in range(3)])
    check_equal(restored(states[0], tensors(states[-1])).dense(), states[-1].dense())


def test_the_damping_of_the_authors_code_acts_on_it(device):
    state = follow(AdaptiveRank(Sketch(6), lambda d: 6), [random_io(device)] * 2)[-1]
    sketched = SketchedInverse(invert=relative_factored_inverse)
    plain = Randomized(*vars(state.factors).values(), Sketch(6))
    found, expected = relative_factored_inverse(state, 0.1), sketched(plain, 0.1)
    check_equal(found.dense(), expected.dense())


@pytest.mark.parametrize("wrong", [{"period": 0}, {"following": lambda d: 0}])
def test_impossible_settings_of_adaptive_ranks_are_refused(wrong, device):
    with pytest.raises(ValueError, match="must be at least 1"):
        follow(AdaptiveRank(**wrong), [random_io(device)] * 2)
