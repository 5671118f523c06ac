"""The pieces of the benchmarks that could be wrong without anyone noticing."""

import json
import math
import re
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kfac_scratch
from benchmarks import applications, capture, distributed, factors, growth, step
from benchmarks.contenders import FLAVOURS, Contender, contenders, disagreements, ours
from benchmarks.defaults import BOUND, row_of, tuned_steps
from benchmarks.defaults import SEEDS as DEFAULT_SEEDS
from benchmarks.limit import Limit, limit, parts
from benchmarks.loop import batches, cosine, first_hit, train
from benchmarks.measure import RESULTS, at_most, fastest, peak, stored, written
from benchmarks.methods import (
    Choice,
    Log,
    Method,
    neighbour,
    place,
    settings,
    spread,
)
from benchmarks.nets import TINY, problem_of
from benchmarks.optimizers import DEFAULT, EVERY_5, EVERY_STEP, STEPS
from benchmarks.sweeps import SWEEPS
from benchmarks.tasks import MAIN, TASKS, Task, autoencoder, curves, squared_error
from benchmarks.training import METHODS, cost, median, rank, search, summary
from kfac_scratch import EXPAND, KFAC, REDUCE, layer_ios, monte_carlo
from kfac_scratch.capture.layer_groups import layer_groups, uncovered

pytestmark = pytest.mark.long

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


@pytest.mark.parametrize("name", ["adamw", "kfac-expand"])
def test_search_gives_every_method_the_same_number_of_trials_and_returns_one_of_them(name):
    task = toy(target=2.0)
    found = search(task, name)
    assert len(found["trials"]) == task.trials
    assert found["winner"] in [trial["config"] for trial in found["trials"]]
    assert all(set(t["config"]) == set(METHODS[name].space) for t in found["trials"])


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


# ---- time and memory ----------------------------------------------------------------------------

CPU = torch.device("cpu")


def flops(run) -> int:
    with FlopCounterMode(display=False) as counted:
        run()
    return counted.get_total_flops()


@pytest.mark.parametrize("net", TINY)
@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("V", [1, 3])
def test_the_limit_has_half_the_operations_of_the_plain_products_of_all_rows(net, flavour, V):
    of = problem_of(TINY, net, CPU)
    options = {"flavour": FLAVOURS[flavour], "layers": of.layers}
    ios = layer_ios(of.model, of.loss, of.X, of.y, monte_carlo(V), **options)
    rows = [t.flatten(0, -2) for io in ios.values() for t in (io.a, io.g)]
    found = limit(of, V, FLAVOURS[flavour])
    assert 2 * found.flops == sum(flops(lambda r=r: r.T @ r) for r in rows)
    assert 2 * found.flops == flops(parts(of, found)["products"])


def test_the_limit_sends_vectors_to_outputs_and_to_no_parameter():
    of, V = problem_of(TINY, "mlp", CPU), 3
    timed = parts(of, limit(of, V, EXPAND))
    first, *others = (of.model.get_submodule(name).weight.numel() for name in of.layers)
    assert flops(timed["forward"]) == 2 * len(of.X) * (first + sum(others))
    assert flops(timed["backward"]) == V * 2 * len(of.X) * sum(others)


def test_the_limit_adds_up_its_parts():
    found = Limit(3, Counter({(10, 4): 2, (5, 2): 1}))
    split = found.seconds({"forward": 1.0, "backward": 30.0, "products": 4400.0})
    assert split["seconds"] == 1 + 30 + 4400 / 2
    assert split["flops"] == 2 * 160 + 20
    assert split["flops per second"] == split["flops"] / split["products"]


def test_type_2_needs_one_vector_less_than_classes():
    of = problem_of(TINY, "mlp", CPU)
    io = layer_ios(of.model, of.loss, of.X, of.y, layers=["4"], flavour=EXPAND)["4"]
    assert torch.linalg.matrix_rank(io.g[:, 0, 0].double(), rtol=1e-5) == of.classes - 1
    assert factors.vectors("type-2", of) == of.classes - 1
    assert factors.vectors("MC-1", of) == factors.vectors("empirical", of) == 1


@pytest.mark.parametrize("fisher", ["type-2", "MC-1", "empirical"])
def test_a_contender_with_another_scale_is_not_timed(fisher):
    of = problem_of(TINY, "mlp", CPU)

    def products(found, V):
        return {n: scale * (M @ V[n]) for n, M in found.items()}

    other = Contender(
        lambda: ours(of, fisher, "expand"), products, lambda kind: ours(of, kind, "expand")
    )
    scale = 1.0
    assert disagreements(of, fisher, {"right": other})["right"] < 0.5
    scale = 2.0
    with pytest.raises(AssertionError, match="wrong"):
        disagreements(of, fisher, {"wrong": other})


@pytest.mark.long
@pytest.mark.parametrize("net", TINY)
def test_peers_that_are_installed_have_our_factors(net):
    of = problem_of(TINY, net, CPU)
    for fisher, flavour in (("type-2", "expand"), ("empirical", "reduce")):
        found, notes = contenders(of, fisher, flavour)
        assert not set(found) & set(notes)
        assert all(why.startswith(("not installed", "not covered")) for why in notes.values())
        assert max(disagreements(of, fisher, found).values()) < 1e-5


def test_the_fastest_of_all_rounds_counts_after_one_that_warms_up(monkeypatch):
    now, lengths = [0.0], {"a": iter([1.0, 7.0, 5.0, 6.0]), "b": iter([9.0, 3.0, 8.0, 4.0])}
    monkeypatch.setattr("benchmarks.measure.clock", lambda device: now[0])

    def passes(name):
        now[0] += next(lengths[name])

    runs = {name: partial(passes, name) for name in lengths}
    assert fastest(runs, 3, CPU) == {"a": 5.0, "b": 3.0}


def mebibytes(count: int):
    """For `peak`: a run that has so many numbers of a mebibyte at once."""
    return (lambda: torch.ones(8)), (lambda: torch.ones(count, 2**20, dtype=torch.uint8))


@pytest.mark.slow
def test_peak_memory_is_that_of_the_run_in_a_process_of_its_own():
    assert peak(mebibytes, 40, device=CPU) == pytest.approx(40, abs=2)
    assert "RuntimeError" in peak(mebibytes, 4000, device=CPU, most=1000)


def test_bounds_hold_for_numbers_that_exist():
    assert at_most("x", 1.0, 1.0)["within"]
    assert not at_most("x", 1.01, 1.0)["within"]
    assert not at_most("x", math.nan, 1.0)["within"]
    assert not at_most("x", None, 1.0)["within"]


def row_of_factors(**seconds) -> dict:
    MiB = {"ours": 22.0, "curvlinops": 20.0, "backpack": 22.0}
    return {"seconds": seconds, "limit": {"seconds": 1.0}, "MiB": MiB}


def test_a_row_of_factors_is_held_against_the_limit_and_against_peers_that_leave_room():
    row = factors.judged(row_of_factors(ours=1.2, curvlinops=1.5, backpack=1.3))
    assert row["within"]
    assert [b["what"] for b in row["bounds"] if b["what"].startswith("ours")] == [
        *("ours / limit", "ours / curvlinops")
    ]
    assert not factors.judged(row_of_factors(ours=1.26))["within"]
    assert not factors.judged(row_of_factors(ours=1.2, curvlinops=1.45))["within"]
    more = row_of_factors(ours=1.0) | {"MiB": {"ours": 22.1, "curvlinops": 20.0}}
    assert not factors.judged(more)["within"]
    lost = row_of_factors(ours=1.0) | {"MiB": {"ours": "RuntimeError: no", "curvlinops": 20.0}}
    assert not factors.judged(lost)["within"]


def test_timed_steps_hold_whole_periods():
    periods = (*DEFAULT, *EVERY_5, *EVERY_STEP)
    assert all(STEPS % period == 0 for period in periods)


@pytest.mark.parametrize("exponent", [0.0, 0.57, 1.0, 2.0, 3.0])
def test_a_fitted_power_is_the_known_one_of_the_largest_values(exponent):
    points = [(x, 3.0 * x**exponent) for x in (8, 16, 32, 64)]
    assert growth.power(points) == pytest.approx(exponent, abs=1e-12)
    assert growth.power([(2, 1e9), *points]) == pytest.approx(exponent, abs=1e-12)
    with_overhead = [(x, y - 1.0) for x, y in points]
    assert growth.power(with_overhead, offset=1.0) == pytest.approx(exponent, abs=1e-12)


def test_a_size_that_cannot_be_computed_has_no_power_and_is_not_within():
    row = {"name": "N", "values": [1, 2, 4], "seconds": [1.0, 2.0, 4.0]}
    row |= {"limit": {"time": 1, "memory": 1}}
    assert growth.judged(row | {"MiB": [7.0, 15.0, 31.0]})["within"]
    lost = growth.judged(row | {"MiB": [7.0, 15.0, "RuntimeError: no memory"]})
    assert lost["power of memory"] is None
    assert not lost["within"]
    assert not growth.judged(row | {"MiB": [7.0, 31.0, 127.0]})["within"]


def test_the_default_chunk_is_held_against_the_best_of_the_others():
    row = {"name": "chunks", "limit": {}, "seconds": {"default": 1.2, "1": 9.0, "8": 1.0}}
    assert growth.judged(row)["default / best chunk"] == 1.2
    assert growth.judged(row)["within"]
    assert not growth.judged(row | {"seconds": {"default": 1.3, "1": 9.0, "8": 1.0}})["within"]


def test_capture_is_held_against_the_release_and_a_plan_against_capture():
    row = {"name": "x", "seconds": 2.2, "limit": {"release": 2.0}, "plan": {"seconds": 1.1}}
    found = capture.judged(row)
    assert found["within"]
    assert found["plan"]["captures"] == pytest.approx(0.5)
    assert not capture.judged(row | {"seconds": 2.21})["within"]


class Answers:
    """In place of a version's process: known seconds, and who was asked in which order."""

    def __init__(self, asked, who, *seconds):
        self.asked, self.who, self.left = asked, who, iter(seconds)

    def seconds(self, what):
        self.asked.append(self.who)
        return None if what == "plan" and self.who == "a" else next(self.left)


def test_versions_take_turns_and_the_median_after_the_first_round_counts():
    asked: list[str] = []
    answers = {"a": (9.0, 1.0, 5.0, 2.0), "b": (4.0,) * 8}
    versions = {who: Answers(asked, who, *seconds) for who, seconds in answers.items()}
    found = capture.times(versions, ["row", "plan"], rounds=3)
    assert found == {"row": {"a": 2.0, "b": 4.0}, "plan": {"b": 4.0}}
    assert asked == ["a", "b", "a", "b", "b", "a", "b", "a"] * 2


@pytest.mark.slow
def test_capture_of_two_checkouts_is_measured_and_stored(tmp_path, capsys):
    release, path = tmp_path / "release", tmp_path / "result.json"
    shutil.copytree(Path(kfac_scratch.__file__).parent, release / "kfac_scratch")
    options = ["--quick", "--rows", "mlp MC-1", "--json", str(path)]
    capture.main(["--release", str(release), *options])
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["rows"]] == ["mlp MC-1 expand", "mlp MC-1 reduce"]
    assert set(result["commits"]) == {"release", "this"}
    for row in result["rows"]:
        assert json.loads(written(capture.judged(row))) == row
        assert row["name"] in capsys.readouterr().out or row is not result["rows"][0]
    with pytest.raises(SystemExit):
        capture.main(options)


COMMANDS = {
    applications: ("^(laplace|influence)$", ["laplace", "influence"]),
    distributed: ("P=2 (mem|comm)", ["P=2 mem-opt", "P=2 comm-opt"]),
    factors: ("mlp MC-1 reduce", ["mlp MC-1 reduce"]),
    growth: ("^layers|chunks", ["layers", "chunks"]),
    step: ("T4: (sgd|kfac f.*d)$", ["T4: sgd", "T4: kfac factored"]),
}


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.slow)
        for command in (applications, distributed, growth, factors, step)
    ],
    ids=lambda command: command.__name__,
)
def test_a_command_stores_its_rows_with_everything_they_depend_on(command, tmp_path, capsys):
    pattern, names = COMMANDS[command]
    path = tmp_path / "new" / "result.json"
    command.main(["--quick", "--rows", pattern, "--json", str(path)])
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["rows"]] == names
    assert {"torch", "curvlinops-for-pytorch"} <= set(result["versions"])
    assert result["threads"] == 1
    for row in result["rows"]:
        assert {"seconds", "limit", "bounds", "within"} <= set(row)
        assert row["name"] == "chunks" or "MiB" in row
        assert row["name"] in capsys.readouterr().out or row is not result["rows"][0]
        again = json.loads(written(command.judged(row)))
        assert again == row


def test_a_pattern_without_a_row_says_which_there_are():
    with pytest.raises(SystemExit, match=r"No row has 'typo'.*mlp type-2 expand"):
        factors.main(["--quick", "--rows", "typo"])


# ---- tasks --------------------------------------------------------------------------------------


DIFFERENT = [name for name in TASKS if not name.startswith("batch")]


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("flavour", [EXPAND, REDUCE])
@pytest.mark.filterwarnings("ignore:No block covers")
def test_kfac_sees_every_layer_of_every_task(name, flavour):
    task = TASKS[name]()
    model = task.model()
    ios = layer_ios(model, task.loss, task.X[:8], task.y[:8], monte_carlo(1), flavour=flavour)
    layers = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)
    ]
    assert list(ios) == layers
    assert all(io.g.abs().sum() > 0 for io in ios.values())
    left = {n for n in uncovered(model, layer_groups(model)) if "norm" not in n and n != "position"}
    assert not left


@pytest.mark.parametrize("name", DIFFERENT)
def test_training_and_test_data_do_not_overlap(name):
    task = TASKS[name]()
    if task.metric is squared_error:  # the training error is what autoencoders are about
        assert task.X is task.X_test
        return
    seen = {x.numpy().tobytes() for x in task.X}
    assert len(task.X_test) in ({64, 65} if name == "T5" else {397})
    assert not any(x.numpy().tobytes() in seen for x in task.X_test)


def test_the_graph_task_hides_labels_but_no_pixels():
    task = TASKS["T2"]()
    pixels, adjacency = task.X[..., :64], task.X[..., 64:]
    assert task.X.shape == (200, 11, 75)
    assert torch.equal(pixels[:, 0], TASKS["T3"]().X[:200])  # the node itself is the first
    assert torch.allclose(adjacency, adjacency.mT)
    assert (torch.linalg.eigvalsh(adjacency)[:, -1] <= 1 + 1e-5).all()


def test_curves_are_drawn_in_one_stroke_and_are_all_different():
    images = curves(50).unflatten(1, (16, 16))
    assert ((images >= 0) & (images <= 1)).all()
    assert (images.flatten(1).amax(1) > 0.8).all()
    assert len({image.numpy().tobytes() for image in images}) == 50
    for image in images:  # from one dark pixel, all others are reached by steps to a neighbour
        dark = image > 0.5
        reached = torch.zeros_like(dark)
        reached.view(-1)[int(dark.flatten().nonzero()[0])] = True
        for _ in range(256):
            near = nn.functional.max_pool2d(reached.float()[None], 3, 1, 1)[0] > 0
            reached = near & dark
        assert torch.equal(reached, dark)


def test_the_autoencoder_has_its_widths():
    layers = [m for m in autoencoder() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in layers] == [100, 50, 10, 50, 100, 64]


# ---- stored results -----------------------------------------------------------------------------


def test_stored_defaults_hold_every_task_with_bounds_from_tuned_steps():
    result = stored(RESULTS / "defaults-cpu.json")
    assert [row["task"] for row in result["rows"]] == list(MAIN)
    for row in result["rows"]:
        assert row["tuned"] == tuned_steps(row["task"])
        assert row["median"] == median([run["steps"] for run in row["runs"]])
        assert len({run["seed"] for run in row["runs"]}) >= 5
        stable = all(run["largest_loss"] is not None for run in row["runs"])
        stable = stable and max(run["largest_loss"] for run in row["runs"]) <= 1
        assert (row["stable"], row["bound"]) == (stable, 1.5 * row["tuned"])
        assert row["within"] == (stable and row["median"] <= row["bound"])


@pytest.mark.parametrize(
    "name", ["T2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("T1", "T3", "T4"))]
)
def test_bare_defaults_reach_the_target_in_less_than_one_and_a_half_tuned_steps(name):
    tuned = tuned_steps(name)
    row = row_of(name, tuned, DEFAULT_SEEDS[:3], steps=int(BOUND * tuned) + 2 * TASKS[name]().every)
    assert row["within"], row


SPEED = {
    "factors": (factors, list(map(str, factors.ROWS))),
    "step": (step, list(map(str, step.rows()))),
    "growth": (growth, [*SWEEPS, "chunks"]),
    "applications": (applications, list(applications.ROWS)),
}
OTHERS = {"capture": capture, "distributed": distributed}
SPEEDS = SPEED | {name: (of, list(map(str, of.ROWS))) for name, of in OTHERS.items()}


@pytest.mark.parametrize("name", SPEEDS)
def test_stored_speeds_hold_every_row_and_what_follows_from_their_numbers(name):
    command, names = SPEEDS[name]
    result = stored(RESULTS / f"{name}-cpu.json")
    assert [row["name"] for row in result["rows"]] == names
    assert all(json.loads(written(command.judged(row))) == row for row in result["rows"])
    if name == "factors":
        assert json.loads(written(factors.median(result["rows"]))) == result["median"]
        assert set(result["rows"][0]["seconds"]) >= {"ours", "curvlinops", "backpack"}


CHAPTER = RESULTS.parents[1] / "tutorial" / "33_speed.py"


def test_the_chapter_on_speed_states_no_measured_figure_in_its_text():
    lines = CHAPTER.read_text(encoding="utf-8").splitlines()
    prose = "\n".join(line for line in lines if line.startswith("# "))
    for part in (r"(?s)\$\$.*?\$\$", r"\$[^$\n]+\$", r"\(?33\.\d\)?", r"\(\S+\)", "alt=.*"):
        prose = re.sub(part, "", prose)
    assert "The limit in seconds" in prose
    assert not re.findall(r"\d+\.\d+|\d+ ?(?:ms|s|MiB|%|x|GFLOP)\b|\d+ times", prose)
    read = [line for line in lines if 'stored("' in line]
    assert [name for line in read for name in SPEED if f'stored("{name}")' in line] == list(SPEED)
