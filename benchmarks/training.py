"""Steps and CPU time to a fixed target, KFAC beside SGD and AdamW: `python -m benchmarks.training`.

Protocol. Every method gets the same budget of steps, the same family of schedules and at least as
many trials. A hit is the first of two consecutive evaluations that reach the target. CPU time is
that of training alone, on one thread. Settings are drawn and tried on one seed; the best of
them are tried on two more, and the smallest median wins; all numbers reported are from fresh seeds,
where the methods take turns. A run that misses counts as infinite in every median.

    python -m benchmarks.training --search            # most of an hour
    python -m benchmarks.training --finals --task T3  # from the winners that are stored
"""

import argparse
import json
import math
import re
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.factors import about
from benchmarks.methods import FIRST_ORDER, METHODS, Config, Method, neighbour, settings, spread
from benchmarks.tasks import TASKS, Task

RESULTS = Path(__file__).parent / "results"
KEPT, SEARCH_SEEDS = 4, (0, 1, 2)  # settings of the second round, and its seeds
FINAL_SEEDS = tuple(range(100, 109))


@dataclass
class Run:
    """What one training run gave; all lists have one entry per evaluation."""

    seed: int
    steps: int | None = None  # to the hit
    cpu: float | None = None  # seconds to the hit
    total: float = 0.0  # CPU seconds of the whole run
    metric: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


def train(task: Task, method: Method, config: Config, seed: int, limit: float | None = None) -> Run:
    """Train until the schedule ends; with a limit, until the hit or until the cost exceeds it."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = method.build(task, model, config)
    horizon = round(config["horizon"] * task.budget)
    schedule = LambdaLR(optimizer, lambda k: cosine(k / horizon, config["warmup"]))
    observe = getattr(optimizer, "observe", lambda X, y: None)
    data = batches(task, seed)
    run = Run(seed)
    at_evaluations = []
    for step in range(1, horizon + 1):
        start = time.process_time()
        X, y = next(data)
        optimizer.zero_grad()
        loss = task.loss(model(X), y)
        loss.backward()
        observe(X, y)
        optimizer.step()
        schedule.step()
        run.total += time.process_time() - start
        if step % task.every == 0:
            run.metric.append(round(task.measured(model), 5))
            run.loss.append(round(loss.item(), 5))
            at_evaluations.append(run.total)
            if not math.isfinite(run.loss[-1]):
                break
            if run.steps is None and (hit := first_hit(task, run.metric)) is not None:
                run.steps, run.cpu = (hit + 1) * task.every, at_evaluations[hit]
            if limit is not None and (run.steps is not None or step * run.total > limit):
                break
    return run


def cosine(progress: float, warmup: float) -> float:
    """The learning rate's factor: up a line, then down half a cosine."""
    if progress < warmup:
        return progress / warmup + 1e-3
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def first_hit(task: Task, metric: list[float]) -> int | None:
    """Index of the first of two consecutive evaluations that reach the target."""
    reached = [task.reached(value) for value in metric]
    return next((i for i in range(len(reached) - 1) if reached[i] and reached[i + 1]), None)


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of one size, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(task.X), generator=generator)
        for index in order.split(task.batch):
            if len(index) == task.batch:
                yield task.X[index], task.y[index]


def median(values: list[float | None]) -> float:
    """With a miss as infinity."""
    return statistics.median(math.inf if v is None else v for v in values)


# ---- search -------------------------------------------------------------------------------------


def search(task: Task, name: str) -> dict:
    """Try settings on one seed, the best of them on more, and keep the one of smallest cost.

    The first half of the settings fills the space, the others are neighbours of the best so far.
    """
    method, random = METHODS[name], Random(0)
    count = 3 * task.trials // 2 if name in FIRST_ORDER else task.trials
    trials: list[dict] = []
    for point in spread(method.space, count // 2, seed=0) + (count - count // 2) * [None]:
        best = sorted(trials, key=partial(rank, task))[:KEPT]
        point = point or neighbour(method.space, random.choice(best)["point"], random)
        limit = best[-1]["cost"] or math.inf if len(best) == KEPT else math.inf
        config = settings(method.space, point)
        run = train(task, method, config, SEARCH_SEEDS[0], limit)
        metric = max(run.metric, key=lambda value: task.sign * value, default=math.nan)
        trials.append({"config": config, "point": point, "cost": cost(run), "best": metric})
    kept = sorted(trials, key=partial(rank, task))[:KEPT]
    for trial in kept:
        runs = [train(task, method, trial["config"], s, math.inf) for s in SEARCH_SEEDS]
        trial |= {"all_steps": [run.steps for run in runs], "all_costs": [cost(r) for r in runs]}
    winner = min(kept, key=lambda t: (median(t["all_costs"]), rank(task, t)))
    for trial in trials:
        trial["point"] = [round(u, 4) for u in trial["point"]]
    return {"trials": trials, "winner": winner["config"], "steps": winner["all_steps"]}


def cost(run: Run) -> float | None:
    """Steps times CPU seconds to the hit: a method should be good at both."""
    return None if run.steps is None or run.cpu is None else run.steps * run.cpu


def rank(task: Task, trial: dict) -> tuple[float, float]:
    """The smaller the better; settings that missed are told apart by how far they got."""
    return trial["cost"] or math.inf, -task.sign * trial["best"]


# ---- finals -------------------------------------------------------------------------------------


def finals(task: Task, winners: dict[str, Config]) -> dict[str, list[dict]]:
    """Fresh seeds, one after the other; in each the methods take turns."""
    runs: dict[str, list[dict]] = {name: [] for name in winners}
    for seed in FINAL_SEEDS:
        for name, config in winners.items():
            runs[name].append(asdict(train(task, METHODS[name], config, seed)))
    return runs


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians, hit rates, and ratios to the best of the first-order methods."""
    table: dict[str, dict] = {
        name: {
            "hits": sum(run["steps"] is not None for run in of),
            "steps": median([run["steps"] for run in of]),
            "cpu": median([run["cpu"] for run in of]),
            "steps_sorted": sorted(run["steps"] or math.inf for run in of),
        }
        for name, of in runs.items()
    }
    for key in ("steps", "cpu"):
        reference = min(table[name][key] for name in FIRST_ORDER if name in table)
        for row in table.values():
            row[f"{key}_ratio"] = round(row[key] / reference, 3)
    return table


# ---- command line -------------------------------------------------------------------------------


def written(result: dict) -> str:
    """JSON with every list of numbers on one line, and null for what is infinite."""

    def finite(value):
        if isinstance(value, dict):
            return {k: finite(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [finite(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(finite(result), indent=1)
    join = lambda found: " ".join(found.group().split())  # noqa: E731
    return re.sub(r"\[[^\[\]{}]*\]", join, text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task")
    parser.add_argument("--method", choices=METHODS, action="append", help="only this method")
    parser.add_argument("--search", action="store_true", help="find settings, and store them")
    parser.add_argument("--finals", action="store_true", help="run the stored settings")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task_name in args.task or TASKS:
        path = args.results / f"training-{task_name}.json"
        task, stored = TASKS[task_name](), json.loads(path.read_text()) if path.exists() else {}
        if args.search:
            for name in args.method or METHODS:
                start = time.process_time()
                found = search(task, name)
                stored.setdefault("search", {})[name] = found
                seconds = time.process_time() - start
                print(
                    task_name, name, found["winner"], found["steps"], f"{seconds:.0f} s", flush=True
                )
                path.write_text(written(stored))
        if args.finals:
            winners = {n: stored["search"][n]["winner"] for n in METHODS if n in stored["search"]}
            runs = finals(task, winners)
            stored |= {
                "about": about(torch.device("cpu")),
                "finals": runs,
                "summary": summary(runs),
            }
            path.write_text(written(stored))
            for name, row in stored["summary"].items():
                print(task_name, name, row, flush=True)


if __name__ == "__main__":
    main()
