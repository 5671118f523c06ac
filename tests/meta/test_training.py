"""The comparison of methods in training: its protocol, and that every method is what it says."""

import copy
import math
from dataclasses import replace
from importlib import import_module
from itertools import pairwise, product

import pytest
import torch
from torch import nn

import benchmarks.protocol as protocol
import benchmarks.training as training
from benchmarks.averaging import LastBatches
from benchmarks.calls import counted
from benchmarks.loop import take_step, train
from benchmarks.measure import RESULTS, stored, written
from benchmarks.methods import curvature, settings, spread
from benchmarks.papers import POSITIONS
from benchmarks.relatives import Shampoo
from benchmarks.tasks import TASKS
from benchmarks.training import (
    COMPARED,
    METHODS,
    broken,
    cost,
    interval,
    run_finals,
    run_search,
    sign_test,
    summary,
)
from kfac_scratch import LayerIO, MovingAverage, kfac, tkfac
from tests.laws import check_differs, check_equal
from tests.meta.stored_results import spoiled

pytestmark = pytest.mark.long


@pytest.fixture(autouse=True)
def _single_precision(_defaults):
    torch.set_default_dtype(torch.float32)


# ---- averages -----------------------------------------------------------------------------------


def batches(count: int) -> list[LayerIO]:
    generator = torch.Generator().manual_seed(0)
    return [
        LayerIO(
            torch.randn(6, 1, 4, generator=generator), torch.randn(2, 6, 1, 3, generator=generator)
        )
        for _ in range(count)
    ]


def averaged(estimator, ios, decay=0.8):
    state = None
    for t, io in enumerate(ios, 1):
        state = estimator.update(state, io, (1 - decay) / (1 - decay**t))
    return state


@pytest.mark.parametrize("approximation", [kfac, tkfac])
def test_a_window_that_drops_nothing_is_the_moving_average(approximation):
    ios = batches(4)
    window, moving = (
        averaged(of, ios) for of in (LastBatches(5, approximation), MovingAverage(approximation))
    )
    check_equal(window.dense(), moving.dense())


def test_a_window_forgets_what_is_older():
    ios = batches(5)
    window = averaged(LastBatches(2, kfac), ios)
    parts = [kfac(io) for io in ios[-2:]]
    check_equal(window.mean.A, (0.8 * parts[0].A + parts[1].A) / 1.8)
    check_differs(window.dense(), averaged(MovingAverage(kfac), ios).dense())


# ---- calls --------------------------------------------------------------------------------------


def test_calls_are_counted_and_functions_are_put_back():
    module = import_module("kfac_scratch.approximations.kfac")
    name = "kfac_scratch.approximations.kfac:one_product"
    original = module.one_product
    with counted([name]) as calls:
        kfac(batches(1)[0])
        kfac(batches(1)[0])
    assert calls == {name: 2}
    assert module.one_product is original
    with pytest.raises(AttributeError), counted(["kfac_scratch.approximations.kfac:typo"]):
        pass


def test_every_method_is_compared_somewhere_and_names_its_proof():
    assert set(METHODS) == {name for names in COMPARED.values() for name in names}
    assert set(COMPARED) == set(TASKS)
    assert all(method.proof for method in METHODS.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_and_runs_what_proves_it(name):
    """For two settings, on the first task that it is compared on, made short."""
    if name == "soap":
        pytest.importorskip("pytorch_optimizer")
    task = next(task for task, names in COMPARED.items() if name in names)
    task = "T2" if name in COMPARED["T2"] else task
    short = replace(TASKS[task](), budget=12, every=2)
    if task == "wide":
        short = replace(short, model=lambda: perceptron(64, 128, 10), batch=8)
    for point in spread(METHODS[name].space, 2, seed=3):
        config = settings(METHODS[name].space, point) | {"horizon": 1.0, "lr": 1e-3}
        config |= {"rank": 8} if "rank" in config else {}
        config |= {"periods": (1, 1)}
        run = train(short, METHODS[name], config, seed=0)
        assert min(run.calls.values()) > 0, run.calls
        assert not run.error or "negative curvature" in run.error or "no inverse" in run.error


def perceptron(*widths: int) -> nn.Module:
    first, second = (nn.Linear(m, n) for m, n in pairwise(widths))
    return nn.Sequential(first, nn.ReLU(), second)


def test_a_rank_above_every_width_is_found_out():
    """The method would be KFAC under another name."""
    task = replace(TASKS["T2"](), budget=4)
    space = METHODS["rs-kfac"].space
    config = settings(space, [0.5] * len(space)) | {"rank": 64, "horizon": 1.0}
    run = train(task, METHODS["rs-kfac"], config, seed=0)
    assert list(run.calls.values()) == [0]
    assert cost(replace(run, steps=2, cpu=0.1)) is None
    assert cost(replace(run, steps=2, cpu=0.1, calls={"sketch": 1})) == 0.2


# ---- methods ------------------------------------------------------------------------------------


def test_the_length_of_the_network_keeps_the_ratios_of_the_layers():
    """Both have the norm that the layers' lengths give together, and different directions."""
    task, found = TASKS["T2"](), {}
    X, y = task.X[:50], task.y[:50]
    space = METHODS["kfac, two lengths"].space
    for length in ("layer", "network"):
        torch.manual_seed(0)
        model = task.model()
        before = copy.deepcopy(model)
        config = settings(space, [0.3] * len(space)) | {"length": length, "weight_decay": 0.0}
        take_step(model, task.loss, curvature(task, model, config), X, y)
        found[length] = [
            p.detach() - q.detach()
            for p, q in zip(model.parameters(), before.parameters(), strict=True)
        ]
    layer, network = (torch.cat([d.flatten() for d in of]) for of in found.values())
    check_equal(layer.norm(), network.norm())
    check_differs(layer, network)


def test_shampoo_is_the_root_of_the_partial_traces_with_adams_length():
    """Of one gradient, with power 1/2: both sides inverted by their roots."""
    torch.manual_seed(0)
    p, G = nn.Parameter(torch.zeros(4, 3)), torch.randn(4, 3)
    options = {"lr": 1.0, "betas": (0.9, 0.9), "weight_decay": 0.0, "every": 1}
    p.grad = G.clone()
    Shampoo([p], power=0.5, eps=1e-3, **options).step()

    def root(M):
        d, Q = torch.linalg.eigh(M + 1e-3 * torch.eye(len(M)))
        return Q * d.rsqrt() @ Q.mT

    expected = root(G @ G.mT) @ G @ root(G.mT @ G)
    adam = G / (G.abs() + 1e-8)
    check_equal(-p.detach(), expected * adam.norm() / expected.norm())


def test_positions_of_the_three_strategies():
    io = LayerIO(torch.randn(2, 16, 3), torch.randn(1, 2, 16, 4))
    assert {name: of(io).a.shape[1] for name, of in POSITIONS.items()}["every second"] == 4
    check_equal(POSITIONS["every second"](io).a, io.a[:, [0, 2, 8, 10]])
    with pytest.raises(ValueError, match="15 positions"):
        POSITIONS["every second"](LayerIO(io.a[:, 1:], io.g[:, :, 1:]))
    assert all(
        of(LayerIO(io.a[:, :1], io.g[:, :, :1])).a.shape[1] == 1 for of in POSITIONS.values()
    )


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [3, 5, 9, 12])
def test_the_interval_of_a_median_is_that_of_the_binomial(count):
    """All orders of values below and above the median, counted."""
    low, high = interval(count)
    covered = sum(low < sum(below) <= high for below in product((0, 1), repeat=count))
    assert covered / 2**count >= (0.9 if count >= 5 else 0)
    if count >= 5:
        tighter = sum(low + 1 < sum(below) <= high - 1 for below in product((0, 1), repeat=count))
        assert tighter / 2**count < 0.9


def test_the_sign_test_counts_pairs():
    assert sign_test([1, 2, 3, 4, 5], [2, 3, 4, 5, 6]) == 1 / 32
    assert sign_test([1, 2, None, 4, 5], [2, 3, 4, 5, 6]) == 6 / 32  # a miss is a loss
    assert sign_test([None, 2], [None, 3]) == 1 / 2  # two misses are a tie
    assert sign_test([1], [1]) == 1


# ---- the protocol -------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A whole comparison on a task that is made small, as it is stored."""
    task = replace(TASKS["T2"](), budget=8, trials=4, seeds=2, finals=5)
    monkeypatch.setitem(training.TASKS, "T2", lambda: task)
    monkeypatch.setitem(training.COMPARED, "T2", ("adamw", "kfac-expand"))
    path = tmp_path / "training-T2.json"
    run_search(task, path, COMPARED["T2"])
    run_finals(task, path, COMPARED["T2"])
    return stored(path)


def test_the_check_passes_what_keeps_the_protocol_and_names_what_does_not(small):
    assert list(broken("T2", small)) == []
    proof = METHODS["kfac-expand"].proof[0]
    for path, words in {
        ("search", "adamw", "trials", "pop"): "3 trials, 4 expected",
        ("finals", "kfac-expand", "pop"): "the seeds are not",
        ("finals", "kfac-expand", 0, "calls", proof, 0): f"{proof} was never called",
        ("finals", "adamw", 1, "seed", 0): "the seeds are not",
        ("finals", "adamw", 1, "steps", 0): "the hit is not that of the curve",
        ("search", "adamw", "winner", "lr", 0): "the winner is none of the trials",
        ("processor", 0): "processor is missing",
        ("summary", 0): "the summary does not follow",
    }.items():
        assert any(words in fault for fault in broken("T2", spoiled(small, *path))), words
    del small["finals"]["adamw"]
    assert any("differs from the list in ['adamw']" in fault for fault in broken("T2", small))


def test_final_seeds_that_were_searched_on_are_a_violation(small, monkeypatch):
    monkeypatch.setattr(protocol, "FIRST_FINAL_SEED", 1)
    assert any("were searched on" in fault for fault in broken("T2", small))


@pytest.mark.parametrize("name", TASKS)
def test_what_is_stored_keeps_the_protocol(name):
    path = RESULTS / f"training-{name}.json"
    if not path.exists():
        pytest.skip(f"{name} has not been run")
    assert list(broken(name, stored(path))) == []


def test_a_command_without_a_violation_ends_well(tmp_path, capsys, small, monkeypatch):
    (tmp_path / "training-T2.json").write_text(written(small))
    monkeypatch.setattr("sys.argv", ["training", "--check", "--results", str(tmp_path)])
    training.main()
    assert "training-T2.json: kept" in capsys.readouterr().out
    small["finals"]["adamw"].pop()
    (tmp_path / "training-T2.json").write_text(written(small))
    with pytest.raises(SystemExit, match="violations"):
        training.main()


def test_the_summary_has_intervals_and_ratios():
    def runs(*steps):
        return [{"steps": s, "cpu": s and s / 10} for s in steps]

    table = summary({"adamw": runs(20, 30, 25, 35, None), "kfac-expand": runs(5, 10, 8, 9, 7)})
    assert table["kfac-expand"]["steps_interval"] == [5, 10]
    assert table["adamw"]["steps_interval"] == [20, math.inf]
    assert table["kfac-expand"]["steps_ratio"] == round(8 / 30, 3)
