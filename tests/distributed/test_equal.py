"""Several processes take the step of one: every loss, method, placement and shape of shards."""

import functools

import pytest
import torch

from tests.distributed.jobs import attempted, job
from tests.distributed.runs import LOSSES, METHODS, PERIODS, STEPS, alone, together

EXACT = 1e-12  # relative to the largest parameter, after ten steps
PLACEMENTS = {2: (0.0, 1.0), 4: (0.0, 0.5, 1.0)}


def runs(size):
    """Every run of a job: its case, its shards, and the share of ranks that hold an inverse."""
    for workers in PLACEMENTS[size]:
        for shards in ("equal", "unequal"):
            for name in LOSSES:
                yield f"{name}-{shards}-{workers}", LOSSES[name], shards, workers
    for name, case in METHODS.items():
        yield name, case, "unequal", PLACEMENTS[size][-2]


def work(rank, size):
    """All runs, in one job: processes take seconds to start."""
    return {
        name: attempted(functools.partial(together, case, rank, size, shards, workers))
        for name, case, shards, workers in runs(size)
    }


@functools.cache
def everywhere(size):
    return job(work, size)


def formula(case, size, shards, workers, rank, owners):
    """The entries that a rank gives to collectives in all steps: KFAC's, in the default form."""
    model = case.model()
    shapes = {n: (p.shape[0], p.shape[1] + 1) for n, p in model.named_parameters() if p.ndim == 2}
    half = {n: sum(d * (d + 1) // 2 for d in shape) for n, shape in shapes.items()}
    rows = max(1, round(workers * size))
    width = size // rows
    mine = [n for n in shapes if owners[n.removesuffix(".weight")] % width == rank % width]
    updates, inversions = (len(range(0, STEPS, PERIODS[key])) for key in sorted(PERIODS))
    averages = not (shards == "equal" and case.targets != "ignored") and case.reduction == "mean"
    exchanges = STEPS * (5 + (width > 1) + averages) + updates + (1 + (rows > 1)) * inversions
    exchanges += 2  # before the settings are compared, and when they are
    counted = {
        "control": 8 * exchanges,
        "factors": updates * sum(half[n] + 1 for n in shapes),
        "gradients": STEPS * sum(p.numel() for p in model.parameters()),
        "inverses": inversions * sum(half[n] for n in mine) if rows > 1 else 0,
        "directions": STEPS * sum(a * b for a, b in shapes.values()) if width > 1 else 0,
    }
    return {what: count for what, count in counted.items() if count}


PLAIN = [
    pytest.param(size, *run, marks=[] if size == 2 else pytest.mark.slow, id=f"{size}-{run[0]}")
    for size in (2, 4)
    for run in runs(size)
    if run[0].split("-")[0] in ("real", "labels", "ignored")
]


@pytest.mark.parametrize(("size", "name", "case", "shards", "workers"), PLAIN)
def test_every_rank_sends_what_the_formula_says(size, name, case, shards, workers):
    for rank, result in enumerate(everywhere(size)):
        _, sent, owners = result[name]
        assert sent == formula(case, size, shards, workers, rank, owners)


NAMES = [
    pytest.param(size, name, case, marks=[] if size == 2 else pytest.mark.slow, id=f"{size}-{name}")
    for size in (2, 4)
    for name, case, _, _ in runs(size)
]


@pytest.mark.parametrize(("size", "name", "case"), NAMES)
def test_ranks_take_the_step_of_one_process(size, name, case):
    expected = alone(case)
    for result in everywhere(size):
        assert not isinstance(result[name], str), result[name]
        theta = result[name][0]
        assert (theta - expected).abs().max() <= EXACT * expected.abs().max()
        assert torch.equal(theta, everywhere(size)[0][name][0])
