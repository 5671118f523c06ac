"""Checkpoints hold everything, and no number of ranks: any job continues any other's run."""

import copy
import functools
import itertools

import pytest
import torch

from kfac_scratch import distribute, graft, type2
from tests.distributed.jobs import attempted, job
from tests.distributed.runs import SHARDS, Case, shard, train

EXACT = 1e-12
CASE = Case(
    targets="labels",
    options={"factor_every": 3, "inverse_every": 4, "controls": [graft()], "lr": 0.02},
)
BEFORE, AFTER = 6, 4


class Later(Case):
    """The batches after a checkpoint."""

    def batches(self):
        yield from itertools.islice(super().batches(), BEFORE, None)


LATER = Later(CASE.net, CASE.targets, CASE.reduction, CASE.options)


def built(fisher, generator, workers, owner_local):
    model = CASE.model()
    optimizer = CASE.optimizer(model, fisher=fisher, generator=generator)
    distribute(optimizer, workers, owner_local=owner_local, timeout=30)
    return model, optimizer


def begin(rank, size, workers, owner_local, fisher, generator):
    """A run of ten steps, and what was saved after six."""
    model, optimizer = built(fisher, generator, workers, owner_local)
    part = shard(SHARDS[size]["unequal"], rank)
    train(CASE, model, optimizer, part, steps=BEFORE)
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    saved = {key: {**value} for key, value in saved.items()}
    saved["model"] = {name: value.clone() for name, value in saved["model"].items()}
    return saved, train(LATER, model, optimizer, part)


def go_on(rank, size, file, workers, owner_local, fisher, generator):
    """The last four steps, from a file."""
    model, optimizer = built(fisher, generator, workers, owner_local)
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return train(LATER, model, optimizer, shard(SHARDS[size]["unequal"], rank))


def seeded():
    return torch.Generator().manual_seed(3)


KINDS = {
    "exact": lambda: (type2, None),
    "labels of PyTorch": lambda: (None, None),
    "labels of a generator": lambda: (None, seeded()),
}


def first(rank, size, folder):
    """Every kind of run, and its files, which rank 0 writes."""
    found = {}
    for kind, make in KINDS.items():
        for name, workers, local in (("mem", 0.0, False), ("comm", 1.0, False), ("dp", 0.0, True)):
            torch.manual_seed(7)
            saved, theta = begin(rank, size, workers, local, *make())
            if rank == 0:
                torch.save(saved, f"{folder}/{kind} {name} {size}")
            found[f"{kind} {name}"] = theta
    return found


def first_draw(file, fisher, generator):
    """The number that a rank draws first after it has read a file."""
    _, optimizer = built(fisher, generator, 0.0, False)
    optimizer.load_state_dict(torch.load(file, weights_only=True)["optimizer"])
    return float(torch.rand((), generator=optimizer.generator or optimizer.placement.generator))


def frozen_after(file):
    """A file is read by an optimizer whose first layer is frozen by now, and trains again later."""
    model = CASE.model()
    model[0].requires_grad_(False)
    optimizer = CASE.optimizer(model)
    distribute(optimizer, 0.0, timeout=30)
    optimizer.load_state_dict(torch.load(file, weights_only=True)["optimizer"])
    return optimizer.steps


def second(rank, size, folder, written):
    """Continue the runs of a job with `written` ranks."""
    found = {}
    frozen = functools.partial(frozen_after, f"{folder}/exact mem {written}")
    found["frozen"] = attempted(frozen)
    for kind, make in KINDS.items():
        if kind != "exact":
            draw = functools.partial(first_draw, f"{folder}/{kind} mem {written}", *make())
            found[f"{kind}: first draw"] = attempted(draw)
    ways = [("mem", 0.0, False), ("comm", 1.0, False), ("dp", 0.0, True)]
    ways += [("hybrid", 0.5, False)] if size == 4 else []
    for kind, make in KINDS.items():
        for name, workers, local in ways:
            for saved_as in ("mem", "comm", "dp"):
                if local == (saved_as == "dp"):
                    torch.manual_seed(8)
                    file = f"{folder}/{kind} {saved_as} {written}"
                    run = functools.partial(go_on, rank, size, file, workers, local, *make())
                    found[f"{kind} {saved_as} as {name}"] = attempted(run)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def begun(folder):
    return job(first, 2, str(folder))


@pytest.fixture(scope="module")
def continued(folder, begun):
    return job(second, 2, str(folder), 2)


@pytest.fixture(scope="module")
def continued_by_four(folder, begun):
    return job(second, 4, str(folder), 2)


def close(theta, expected):
    assert not isinstance(theta, str), theta
    return (theta - expected).abs().max() <= EXACT * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["mem", "comm", "dp"])
def test_a_job_continues_its_own_run_bit_for_bit(begun, continued, kind, name):
    for rank in range(2):
        theta = continued[rank][f"{kind} {name} as {name}"]
        assert not isinstance(theta, str), theta
        assert torch.equal(theta, begun[rank][f"{kind} {name}"])


@pytest.mark.parametrize("name", ["mem as comm", "comm as mem"])
def test_another_placement_continues_it(begun, continued, name):
    for rank in range(2):
        assert close(continued[rank][f"exact {name}"], begun[rank][f"exact {name.split()[0]}"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["mem as mem", "mem as comm", "comm as mem", "mem as hybrid", "comm as hybrid"]
)
def test_more_ranks_continue_it(begun, continued_by_four, name):
    for rank in range(4):
        assert close(continued_by_four[rank][f"exact {name}"], begun[0][f"exact {name.split()[0]}"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["labels of PyTorch", "labels of a generator"])
def test_more_ranks_draw_new_labels(begun, continued_by_four, kind):
    """The run goes on, the same on all ranks, with other draws."""
    thetas = [continued_by_four[rank][f"{kind} mem as mem"] for rank in range(4)]
    assert len({continued_by_four[rank][f"{kind}: first draw"] for rank in range(4)}) == 4
    assert all(torch.equal(theta, thetas[0]) for theta in thetas)
    assert not torch.equal(thetas[0], begun[0][f"{kind} mem"])


@pytest.mark.parametrize("name", ["mem", "comm"])
def test_one_process_continues_it(folder, begun, name):
    saved = torch.load(f"{folder}/exact {name} 2", weights_only=True)
    model = CASE.model()
    optimizer = CASE.optimizer(model)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    assert close(train(LATER, model, optimizer), begun[0][f"exact {name}"])


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_loads_every_kind(folder, begun, kind):
    saved = torch.load(f"{folder}/{kind} mem 2", weights_only=True)
    fisher, generator = KINDS[kind]()
    model = CASE.model()
    optimizer = CASE.optimizer(model, fisher=fisher, generator=generator)
    optimizer.load_state_dict(saved["optimizer"])
    assert optimizer.steps == BEFORE


def refusing_a_copy(rank, size):
    """A copy of a distributed optimizer, and a file that one rank cannot read."""
    model, optimizer = built(type2, None, 0.0, False)
    found = []
    state = optimizer.state_dict()
    if rank == 1:
        state["kfac"]["format"] = 0
    train(CASE, model, optimizer, shard(SHARDS[size]["unequal"], rank), steps=2)
    before = optimizer.state_dict()
    for act in (lambda: copy.deepcopy(optimizer), lambda: optimizer.load_state_dict(state)):
        try:
            act()
        except ValueError as error:
            found.append(str(error))
    assert same(before, optimizer.state_dict())
    return found


def same(x, y):
    """Whether two nested values are the same, tensors bit for bit."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return set(x) == set(y) and all(same(x[key], y[key]) for key in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


def test_copies_and_unreadable_files_are_refused():
    for copied, loaded in job(refusing_a_copy, 2):
        assert "2 processes hold this optimizer together: call state_dict()" in copied
        assert "Rank 1 of 2 refused in 'load_state_dict'" in loaded
        assert "no checkpoint of KFAC in the format 1" in loaded


def test_a_block_that_is_frozen_by_now_is_read(continued):
    assert [found["frozen"] for found in continued] == [BEFORE, BEFORE]
