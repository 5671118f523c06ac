"""The pieces of `benchmarks.training` that could be wrong without anyone noticing."""

import json
import math
from random import Random

import pytest
import torch
from torch import nn

from benchmarks.loop import batches, cosine, first_hit, train
from benchmarks.methods import (
    METHODS,
    Choice,
    Log,
    Method,
    neighbour,
    place,
    settings,
    spread,
    sweep,
)
from benchmarks.step_time import PERIODS as TIMED_PERIODS
from benchmarks.step_time import STEPS
from benchmarks.tasks import TASKS, Task, autoencoder, squared_error
from benchmarks.training import RESULTS, cost, median, rank, search, stored, summary, written
from benchmarks.variants import VARIANTS
from kfac_scratch import EXPAND, KFAC, REDUCE, layer_ios, monte_carlo
from kfac_scratch.capture.layer_groups import layer_groups, uncovered

SPACE = {"lr": Log(1e-3, 1e-1), "mode": Choice(("a", "b", "c"))}


@pytest.fixture(autouse=True)
def _single_precision(_defaults):
    torch.set_default_dtype(torch.float32)


def toy(target=0.5, sign=-1, every=2, budget=20) -> Task:
    """Least squares with a known result; its metric is the loss."""
    X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    y = X @ torch.tensor([[1.0], [2.0], [3.0]])
    return Task(
        *(lambda: nn.Linear(3, 1), nn.MSELoss(), X, y, X, y, squared_error),
        **{"target": target, "sign": sign, "batch": 6, "budget": budget, "every": every},
        **{"trials": 4, "seeds": 2},
    )


def of_sgd(lr: float) -> Method:
    return Method({}, lambda task, model, config: torch.optim.SGD(model.parameters(), lr=lr))


# ---- hits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "sign", "expected"),
    [
        ([0.9, 0.4, 0.6, 0.4, 0.3], -1, 3),  # one evaluation alone does not count
        ([0.9, 0.5, 0.5], -1, 1),  # at the target is enough
        ([0.4, 0.6, 0.5, 0.4, 0.7], 1, 1),
        ([0.4, 0.6], 1, None),  # nothing confirms the last one
        ([], 1, None),
        ([math.nan, math.nan], -1, None),
        ([math.nan, math.nan], 1, None),
    ],
)
def test_a_hit_is_the_first_of_two_consecutive(metric, sign, expected):
    assert first_hit(toy(sign=sign), metric) == expected


def test_steps_and_time_are_those_of_the_first_of_the_two():
    task = toy(target=2.0)
    run = train(task, of_sgd(0.1), {"horizon": 1.0, "warmup": 0.0}, seed=0)
    first = next(i for i, value in enumerate(run.metric) if value <= 2.0)
    assert first > 0
    assert run.steps == (first + 1) * task.every
    assert 0 < run.cpu < run.total
    assert len(run.metric) == len(run.loss) == task.budget // task.every


def test_a_limit_changes_when_a_run_stops_but_not_its_hit():
    task, config = toy(target=2.0), {"horizon": 1.0, "warmup": 0.0}
    full, limited = (train(task, of_sgd(0.1), config, 0, limit) for limit in (None, math.inf))
    assert limited.steps == full.steps
    assert limited.metric == full.metric[: len(limited.metric)] != full.metric
    hopeless = train(task, of_sgd(1e-6), config, 0, limit=0.0)
    assert hopeless.steps is None
    assert len(hopeless.metric) == 1


@pytest.mark.parametrize("lr", [1e30, math.nan])
def test_a_run_that_diverges_ends_as_a_miss(lr):
    run = train(toy(), of_sgd(lr), {"horizon": 1.0, "warmup": 0.0}, seed=0)
    assert run.steps is None
    assert run.error


# ---- schedule and data --------------------------------------------------------------------------


def test_the_schedule_rises_to_one_and_ends_at_zero():
    assert cosine(0.0, 0.0) == 1
    assert cosine(0.5, 0.0) == pytest.approx(0.5)
    assert cosine(1.0, 0.0) == pytest.approx(0)
    assert cosine(0.1, 0.2) == pytest.approx(0.5, abs=2e-3)
    assert cosine(0.2, 0.2) == 1
    assert cosine(0.6, 0.2) == pytest.approx(0.5)
    assert all(0 < cosine(k / 100, w) <= 1 for k in range(100) for w in (0.0, 0.1, 0.2))


def test_the_horizon_is_where_the_schedule_ends():
    task, rates = toy(), []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            rates.append(self.param_groups[0]["lr"])

    method = Method({}, lambda task, model, config: Watched(model.parameters(), lr=2.0))
    train(task, method, {"horizon": 0.5, "warmup": 0.0}, seed=0)
    assert rates == pytest.approx([2 * cosine(k / 10, 0.0) for k in range(10)])


def test_an_epoch_has_every_datum_once_and_seeds_differ():
    task = toy()
    data = batches(task, seed=3)
    epoch = torch.cat([next(data)[0] for _ in range(2)])
    assert torch.equal(epoch.sort(0).values, task.X.sort(0).values)
    assert torch.equal(next(batches(task, 3))[0], epoch[:6])
    assert not torch.equal(next(batches(task, 4))[0], epoch[:6])


def test_kfac_looks_at_the_batch_that_the_step_is_for():
    task, seen = toy(), []

    class Watched(KFAC):
        def observe(self, X, y):
            seen.append((X, y))
            super().observe(X, y)

    method = Method({}, lambda task, model, config: Watched(model, task.loss, lr=0.0))
    train(task, method, {"horizon": 0.2, "warmup": 0.0}, seed=3)
    data = batches(task, seed=3)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for pair in seen for a, b in zip(pair, next(data), strict=True))


def test_a_final_run_is_reproducible():
    task = TASKS["T2"]()
    config = settings(METHODS["kfac-expand"].space, [0.1] * len(METHODS["kfac-expand"].space))
    one, two = (train(task, METHODS["kfac-expand"], config, seed=5) for _ in range(2))
    assert one.metric == two.metric
    assert one.metric


# ---- search -------------------------------------------------------------------------------------


def test_axes_of_the_search_map_the_unit_interval():
    log, choice = SPACE["lr"], SPACE["mode"]
    assert (log(0.0), log(0.5), log(1.0)) == (1e-3, 1e-2, 1e-1)
    assert log.where(1e-2) == pytest.approx(0.5)
    assert [choice(u) for u in (0.0, 0.34, 0.99)] == ["a", "b", "c"]
    assert all(choice(choice.where(v)) == v for v in choice.values)
    for method in METHODS.values():
        config = settings(method.space, spread(method.space, 5, seed=1)[-1])
        assert settings(method.space, place(method.space, config)) == config


def test_settings_are_seeded_and_fill_the_space():
    points = spread(SPACE, 16, seed=0)
    assert points == spread(SPACE, 16, seed=0) != spread(SPACE, 16, seed=1)
    assert len({int(16 * p[0]) for p in points}) == 16  # one in each sixteenth
    assert {settings(SPACE, p)["mode"] for p in points} == {"a", "b", "c"}
    swept = [settings(SPACE, p) for p in sweep(SPACE, {"mode": "b"}, 4)]
    assert [c["mode"] for c in swept] == ["b"] * 4
    assert [c["lr"] for c in swept] == [SPACE["lr"]((i + 0.5) / 4) for i in range(4)]


def test_neighbours_differ_and_stay_in_the_space():
    random = Random(0)
    for point in ([0.0, 0.0], [0.999, 0.999]):
        for _ in range(50):
            new = neighbour(SPACE, point, random)
            assert new != point
            assert all(0 <= u < 1 for u in new)


def test_the_search_prefers_hits_then_cost_then_progress():
    task = toy()
    trials = [{"cost": c, "best": b} for c, b in ((None, 0.9), (2.0, 0.4), (1.0, 0.5), (None, 0.6))]
    assert [t["best"] for t in sorted(trials, key=lambda t: rank(task, t))] == [0.5, 0.4, 0.6, 0.9]
    run = train(toy(target=2.0), of_sgd(0.1), {"horizon": 1.0, "warmup": 0.0}, seed=0)
    assert cost(run) == run.steps * run.cpu


def test_search_gives_first_order_methods_more_trials_and_returns_one_of_them():
    task = toy(target=2.0)
    found = search(task, "adamw")
    assert len(found["trials"]) == 8 + 6
    assert found["winner"] in [trial["config"] for trial in found["trials"]]
    assert all(set(t["config"]) == set(METHODS["adamw"].space) for t in found["trials"])
    longer = search(task, "adamw", json.loads(written(found))["trials"], more=3)
    assert len(longer["trials"]) == len(found["trials"]) + 3


# ---- numbers ------------------------------------------------------------------------------------


def test_a_miss_is_infinite_in_the_median():
    assert median([3, None, 1]) == 3
    assert median([3, None, None]) == math.inf


def test_ratios_are_to_the_best_first_order_method():
    def runs(*steps):
        return [{"steps": s, "cpu": s and s / 10} for s in steps]

    table = summary(
        {"sgd": runs(40, None, None), "adamw": runs(20, 30, 25), "kfac-expand": runs(5, 10, None)}
    )
    assert table["kfac-expand"]["steps_ratio"] == 0.4
    assert table["kfac-expand"]["hits"] == 2
    assert table["adamw"]["cpu_ratio"] == 1
    assert table["sgd"]["steps"] == math.inf


def test_json_is_compact_and_has_no_infinity():
    text = written({"a": [1.5, math.inf], "b": {"c": [[1, 2], [3]]}, "d": math.nan})
    assert json.loads(text) == {"a": [1.5, None], "b": {"c": [[1, 2], [3]]}, "d": None}
    assert '"a": [ 1.5, null ]' in text or '"a": [1.5, null]' in text


def test_timed_steps_hold_whole_periods():
    assert all(STEPS % period == 0 for periods in TIMED_PERIODS.values() for period in periods)


# ---- tasks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("flavour", [EXPAND, REDUCE])
@pytest.mark.filterwarnings("ignore:No block covers")
def test_kfac_sees_every_layer_of_every_task(name, flavour):
    task = TASKS[name]()
    model = task.model()
    ios = layer_ios(model, task.loss, task.X[:8], task.y[:8], monte_carlo(1), flavour=flavour)
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert list(ios) == layers
    assert all(io.g.abs().sum() > 0 for io in ios.values())
    left = {n for n in uncovered(model, layer_groups(model)) if "norm" not in n and n != "position"}
    assert not left


@pytest.mark.parametrize("name", TASKS)
def test_training_and_test_data_do_not_overlap(name):
    task = TASKS[name]()
    if task.metric is squared_error:  # the training error is what T3 is about
        assert task.X is task.X_test
        return
    seen = {x.numpy().tobytes() for x in task.X}
    assert len(task.X_test) == 397
    assert not any(x.numpy().tobytes() in seen for x in task.X_test)


def test_the_graph_task_hides_labels_but_no_pixels():
    task = TASKS["T2"]()
    pixels, adjacency = task.X[..., :64], task.X[..., 64:]
    assert task.X.shape == (200, 11, 75)
    assert torch.equal(pixels[:, 0], TASKS["T3"]().X[:200])  # the node itself is the first
    assert torch.allclose(adjacency, adjacency.mT)
    assert (torch.linalg.eigvalsh(adjacency)[:, -1] <= 1 + 1e-5).all()


def test_the_autoencoder_has_its_widths():
    layers = [m for m in autoencoder() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in layers] == [100, 50, 10, 50, 100, 64]


# ---- stored results -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_stored_results_hold_every_method_and_their_ratios(name):
    result, task = stored(RESULTS / f"training-{name}.json"), TASKS[name]()
    assert set(result["search"]) == set(result["finals"]) == set(METHODS)
    for method, runs in result["finals"].items():
        assert len({run["seed"] for run in runs}) == len(runs) >= 5
        assert all(run["seed"] >= task.seeds for run in runs)  # none that the search has seen
        horizon = round(result["search"][method]["winner"]["horizon"] * task.budget)
        for run in runs:
            assert len(run["metric"]) == horizon // task.every or run["error"]
            hit = first_hit(task, run["metric"])
            assert run["steps"] == (None if hit is None else (hit + 1) * task.every)
    assert (
        json.loads(written({"summary": summary(result["finals"])}))["summary"]
        == (result["summary"])
    )
    trials = {method: len(of["trials"]) for method, of in result["search"].items()}
    kfac = [n for method, n in trials.items() if method not in ("sgd", "adamw")]
    assert min(trials["sgd"], trials["adamw"]) >= max(kfac)


def test_stored_variants_are_all_of_them():
    result = stored(RESULTS / "training-variants.json")
    for name in ("T3", "T4"):
        assert set(result[name]) == set(VARIANTS)
        assert all(len(of["best"]) == 3 for of in result[name].values())
