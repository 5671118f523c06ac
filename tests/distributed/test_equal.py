"""Several processes take the step of one: every loss, method, placement and shape of shards."""

import functools

import pytest
import torch

from tests.distributed.jobs import attempted, job
from tests.distributed.runs import LOSSES, METHODS, alone, together

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
        theta, _ = result[name]
        assert (theta - expected).abs().max() <= EXACT * expected.abs().max()
        assert torch.equal(theta, everywhere(size)[0][name][0])
