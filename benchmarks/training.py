"""Steps and CPU time to a fixed target, KFAC beside SGD and AdamW: `python -m benchmarks.training`.

Protocol. Every method has the same budget of steps, the same family of schedules, and at least as
many trials. A hit is the first of two consecutive evaluations that reach the target. CPU time is
that of training alone, on one thread. Settings are drawn and tried on one seed, the best of them
are tried on a few more, and the smallest median wins. All numbers that count are from fresh seeds,
where the methods take turns. A run that misses counts as infinite in every median.

    python -m benchmarks.training --search            # most of an hour
    python -m benchmarks.training --finals --task T3  # from the winners that are stored
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random

import torch

from benchmarks.loop import Run, train
from benchmarks.measure import RESULTS, about, stored, write, written
from benchmarks.methods import (
    FIRST_ORDER,
    METHODS,
    Config,
    Point,
    neighbour,
    place,
    settings,
    spread,
    sweep,
)
from benchmarks.tasks import TASKS, Task
from benchmarks.variants import outcomes

SWEPT = 8  # learning rates of a first-order method's sweep
KEPT = 4  # settings of the second round
FINAL_SEEDS = tuple(range(100, 109))


def median(values: list[float | None]) -> float:
    """With a miss as infinity."""
    return statistics.median(math.inf if v is None else v for v in values)


# ---- search -------------------------------------------------------------------------------------


def search(task: Task, name: str, trials: Sequence[dict] = (), more: int = 0) -> dict:
    """Try settings on one seed, the best of them on more, and keep the one of smallest cost.

    The first half of the settings fills the space, the others are neighbours of the best so far.
    First-order methods, of which there are fewer, have half as many more, and before them a sweep.

    Args:
        task: What to train.
        name: The method.
        trials: Those of an earlier search, which this one continues.
        more: How many neighbours to try then.
    """
    space, random = METHODS[name].space, Random(len(trials))
    tried = list(trials)
    for start in [None] * more if trials else starts(task, name):
        best = sorted(tried, key=partial(rank, task))[:KEPT]
        point = start or neighbour(space, place(space, random.choice(best)["config"]), random)
        limit = best[-1]["cost"] or math.inf if len(best) == KEPT else math.inf
        config = settings(space, point)
        run = train(task, METHODS[name], config, 0, limit)
        tried.append({"config": config, "cost": cost(run), "best": task.best(run.metric)})
    kept = sorted(tried, key=partial(rank, task))[:KEPT]
    for trial in (trial for trial in kept if "all_steps" not in trial):
        runs = [train(task, METHODS[name], trial["config"], s, math.inf) for s in range(task.seeds)]
        trial |= {"all_steps": [run.steps for run in runs], "all_costs": [cost(r) for r in runs]}
    seen = [trial for trial in tried if "all_steps" in trial]
    winner = min(seen, key=lambda t: (median(t["all_costs"]), rank(task, t)))
    return {"trials": tried, "winner": winner["config"], "steps": winner["all_steps"]}


def starts(task: Task, name: str) -> list[Point | None]:
    """Where to look first; None is a neighbour of what is best by then."""
    method = METHODS[name]
    count = 3 * task.trials // 2 if name in FIRST_ORDER else task.trials
    swept = [] if method.usual is None else sweep(method.space, method.usual, SWEPT)
    half = count // 2
    return [*swept, *spread(method.space, half, seed=0), *[None] * (count - half)]


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


def run_search(task: Task, path: Path, names: Iterable[str], more: int = 0) -> None:
    for name in names:
        start = time.process_time()
        earlier = stored(path).get("search", {}).get(name, {}).get("trials", ()) if more else ()
        found = search(task, name, earlier, more)
        result = stored(path)
        result.setdefault("search", {})[name] = found
        path.write_text(written(result))
        seconds = time.process_time() - start
        print(path.stem, name, found["winner"], found["steps"], f"{seconds:.0f} s", flush=True)


def run_finals(task: Task, path: Path) -> None:
    result = stored(path)
    runs = finals(task, {name: of["winner"] for name, of in result["search"].items()})
    result |= about(torch.device("cpu")) | {"finals": runs, "summary": summary(runs)}
    path.write_text(written(result))
    for name, row in result["summary"].items():
        print(path.stem, f"{name:13s}", row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task")
    parser.add_argument("--method", choices=METHODS, action="append", help="search only for this")
    parser.add_argument("--search", action="store_true", help="find settings, and store them")
    parser.add_argument("--more", type=int, default=0, help="continue a search by so many settings")
    parser.add_argument("--finals", action="store_true", help="run the stored settings")
    parser.add_argument("--variants", action="store_true", help="every variant on T3 and T4")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Converting a tensor")
    results = {name: args.results / f"training-{name}.json" for name in TASKS}
    for name in args.task or TASKS:
        if args.search:
            run_search(TASKS[name](), results[name], args.method or METHODS, args.more)
        if args.finals:
            run_finals(TASKS[name](), results[name])
    if args.variants:
        found = {n: stored(results[n])["search"]["ekfac"]["winner"] for n in ("T3", "T4")}
        table = {name: outcomes(TASKS[name](), config) for name, config in found.items()}
        result = about(torch.device("cpu")) | {"settings": found} | table
        write(args.results / "training-variants.json", result)


if __name__ == "__main__":
    main()
