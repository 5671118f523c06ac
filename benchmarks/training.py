"""Steps and CPU time to a target, every method beside the others: `python -m benchmarks.training`.

Protocol. On a task, every method has the same budget of steps, the same family of schedules, and
the same number of trials, all of which are stored. A hit is the first of two consecutive
evaluations that reach the target. CPU time is that of training alone, on one thread. Settings are
drawn and tried on one seed, the best of them are tried on a few more, and the smallest median of
steps times seconds wins. All numbers that count are from fresh seeds, where the methods take turns.
A run that misses counts as infinite in every median. A run counts the calls of the functions that
make its method, and a trial in which one of them was not called counts as a miss.

Controls: KFAC under every average and damping that another method may choose; KFAC's optimizer
without curvature; SGD and AdamW.

    python -m benchmarks.training --search --task T3   # every method of it, stored one by one
    python -m benchmarks.training --finals --task T3   # from the winners that are stored
    python -m benchmarks.training --check              # whether what is stored keeps the protocol
"""

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from math import comb
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.loop import Run, first_hit, train
from benchmarks.measure import RESULTS, about, finite, stored, write
from benchmarks.methods import (
    FIRST_ORDER,
    KFAC_UNDER_ALL,
    MORE_OF_KFAC,
    USUAL_METHODS,
    Method,
    neighbour,
    place,
    settings,
    spread,
)
from benchmarks.papers import PAPERS
from benchmarks.protocol import check, final_seeds, never_called
from benchmarks.relatives import RELATIVES
from benchmarks.tasks import BATCHES, TASKS, Task

KEPT = 4  # settings of the second round

METHODS: dict[str, Method] = USUAL_METHODS | RELATIVES | KFAC_UNDER_ALL | MORE_OF_KFAC | PAPERS
MAIN = (*USUAL_METHODS, *RELATIVES)
UPDATED = ("rs-kfac, adaptive rank", "b-kfac", "b-r-kfac", "b-kfac-c")
CONTROLS = ("sgd", "adamw", "no-curvature", "kfac-expand")
PRODUCTS = ("tkfac", "tekfac", "kpsvd", "deflation", "lanczos", "kfac-corrected")
OF_PAPERS = tuple(name for name in PAPERS if name not in UPDATED)
COMPARED: dict[str, tuple[str, ...]] = {
    "T1": MAIN,
    "T2": (*MAIN, *PRODUCTS),
    "T3": tuple(
        name
        for name in (*MAIN, *KFAC_UNDER_ALL, *OF_PAPERS)
        if name
        not in ("kfac-reduce", "foof", "tekfac", "lanczos", "sre-kfac", "mini-block", "cg-fac")
    ),
    "T4": (*MAIN, *KFAC_UNDER_ALL, *OF_PAPERS),
    "T5": MAIN,
    "wide": (*CONTROLS, "kfac, three dampings", "skfac", "rs-kfac", "sre-kfac", *UPDATED),
    "curves": (*CONTROLS, "ekfac", *KFAC_UNDER_ALL, *PRODUCTS, "mini-block"),
    "deep": (*CONTROLS, "kfac, two lengths", "two-level"),
    **{f"batch-{batch}": ("sgd", "adamw", "kfac-expand") for batch in BATCHES},
}
"""Which methods are tried on which task.

The updates of Brand and adaptive ranks need layers wider than rank and batch, so that they stand
in `wide` alone.
"""


def median(values: Iterable[float | None]) -> float:
    """With a miss as infinity."""
    return statistics.median(math.inf if v is None else v for v in values)


# ---- search -------------------------------------------------------------------------------------


def search(task: Task, name: str) -> dict:
    """Try settings on one seed, the best of them on more, and keep the one of smallest cost.

    The first half of the settings fills the space, the others are neighbours of the best so far.

    Args:
        task: What to train, and how many settings to try.
        name: The method.
    """
    method, random, tried = METHODS[name], Random(0), []
    half = task.trials // 2
    for start in [*spread(method.space, half, seed=0), *[None] * (task.trials - half)]:
        best = sorted(tried, key=partial(rank, task))[:KEPT]
        near = start or neighbour(
            method.space, place(method.space, random.choice(best)["config"]), random
        )
        limit = best[-1]["cost"] or math.inf if len(best) == KEPT else math.inf
        config = settings(method.space, near)
        run = train(task, method, config, 0, limit)
        trial = {"config": config, "cost": cost(run), "best": task.best(run.metric)}
        tried.append(trial | ({"error": run.error} if run.error else {}))
    kept = sorted(tried, key=partial(rank, task))[:KEPT]
    for trial in kept:
        runs = [train(task, method, trial["config"], s, math.inf) for s in range(task.seeds)]
        trial |= {"all_steps": [run.steps for run in runs], "all_costs": [cost(r) for r in runs]}
    winner = min(kept, key=lambda t: (median(t["all_costs"]), rank(task, t)))
    return {"trials": tried, "winner": winner["config"], "steps": winner["all_steps"]}


def cost(run: Run) -> float | None:
    """Steps times CPU seconds to the hit: a method should be good at both.

    None for a miss, and for a run that did not call all that makes the method.
    """
    if run.steps is None or run.cpu is None or 0 in run.calls.values():
        return None
    return run.steps * run.cpu


def rank(task: Task, trial: dict) -> tuple[float, float]:
    """The smaller the better; settings that missed are told apart by how far they got."""
    return trial["cost"] or math.inf, -task.sign * trial["best"]


# ---- finals -------------------------------------------------------------------------------------


def finals(task: Task, winners: Mapping[str, dict[str, Any]]) -> dict[str, list[dict]]:
    """Fresh seeds, one after the other; in each the methods take turns.

    The usual methods train to the end of their schedule, the others to their hit.
    """
    runs: dict[str, list[dict]] = {name: [] for name in winners}
    for seed in final_seeds(task):
        for name, config in winners.items():
            limit = None if name in USUAL_METHODS else math.inf  # which ends at the hit
            run = asdict(train(task, METHODS[name], config, seed, limit))
            runs[name].append({key: value for key, value in run.items() if key != "loss"})
    return runs


def summary(runs: Mapping[str, list[dict]]) -> dict[str, dict]:
    """Medians with intervals, hits, and ratios to the best of the first-order methods."""
    table: dict[str, dict] = {}
    for name, of in runs.items():
        row: dict[str, Any] = {"hits": sum(run["steps"] is not None for run in of)}
        for key in ("steps", "cpu"):
            values = sorted(math.inf if run[key] is None else run[key] for run in of)
            low, high = interval(len(values))
            row |= {key: statistics.median(values), f"{key}_sorted": values}
            row[f"{key}_interval"] = [values[low], values[high]]
        table[name] = row
    for key in ("steps", "cpu"):
        reference = min(table[name][key] for name in FIRST_ORDER if name in table)
        for row in table.values():
            row[f"{key}_ratio"] = round(row[key] / reference, 3)
    return table


def interval(count: int, level: float = 0.9) -> tuple[int, int]:
    """Which of the sorted values bound the median with at least that confidence.

    Exact and free of assumptions: the number of values below the median is binomial. With fewer
    than five values, the bounds are the smallest and the largest, at a lower confidence.
    """
    below = [comb(count, k) / 2**count for k in range(count + 1)]
    low = max((k for k in range(count // 2) if sum(below[: k + 1]) <= (1 - level) / 2), default=0)
    return low, count - 1 - low


def sign_test(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """The chance that we win at least as often by chance, over pairs of runs with the same seed.

    One-sided; ties, two misses among them, do not count. 1 if every pair is a tie.
    """
    pairs = [
        tuple(math.inf if v is None else v for v in pair) for pair in zip(ours, theirs, strict=True)
    ]
    wins, losses = (sum(a < b for a, b in pairs), sum(a > b for a, b in pairs))
    n = wins + losses
    return sum(comb(n, k) for k in range(wins, n + 1)) / 2**n


# ---- check --------------------------------------------------------------------------------------


def broken(name: str, result: dict) -> Iterator[str]:
    """What a stored result of a task violates, in words."""
    task, search_, final = TASKS[name](), result.get("search", {}), result.get("finals", {})
    expected = set(COMPARED[name])
    for part, of in (("search", search_), ("finals", final)):
        if set(of) != expected:
            yield f"{name}: the {part} differs from the list in {sorted(set(of) ^ expected)}"
    for method, of in search_.items():
        if len(of["trials"]) != task.trials:
            yield f"{name}, {method}: {len(of['trials'])} trials, {task.trials} expected"
        if of["winner"] not in [trial["config"] for trial in of["trials"]]:
            yield f"{name}, {method}: the winner is none of the trials"
        if set(of["winner"]) != set(METHODS[method].space):
            yield f"{name}, {method}: the winner has other axes than the method's space"
    seeds = final_seeds(task)
    if len(seeds) < 5 or min(seeds) < task.seeds:
        yield f"{name}: final seeds {seeds} are fewer than 5 or were searched on"
    for method, runs in final.items():
        if [run["seed"] for run in runs] != seeds:
            yield f"{name}, {method}: the seeds are not {seeds}"
        for run in runs:
            where = f"{name}, {method}, seed {run['seed']}"
            if set(run["calls"]) != set(METHODS[method].proof) or not run["calls"]:
                yield f"{where}: other functions were counted than those that prove the method"
            yield from never_called(where, run["calls"])
            hit = first_hit(task, [math.nan if m is None else m for m in run["metric"]])
            if run["steps"] != (None if hit is None else (hit + 1) * task.every):
                yield f"{where}: the hit is not that of the curve"
    if final and finite(summary(final)) != result.get("summary"):
        yield f"{name}: the summary does not follow from the runs"
    for key in ("versions", "processor", "threads", "clock"):
        if final and not result.get(key):
            yield f"{name}: {key} is missing"


# ---- command line -------------------------------------------------------------------------------


def run_search(task: Task, path: Path, names: Iterable[str]) -> None:
    for name in names:
        start = time.process_time()
        found = search(task, name)
        result = stored(path)
        result.setdefault("search", {})[name] = found
        write(path, result)
        seconds = time.process_time() - start
        print(path.stem, name, found["winner"], found["steps"], f"{seconds:.0f} s", flush=True)


def run_finals(task: Task, path: Path, names: Iterable[str]) -> None:
    result = stored(path)
    found = result["search"]
    runs = finals(task, {name: found[name]["winner"] for name in names})
    ordered = {name: found[name] for name in names}
    result |= about(torch.device("cpu")) | {"search": ordered, "finals": runs}
    result["summary"] = summary(runs)
    write(path, result)
    for name, row in result["summary"].items():
        print(path.stem, f"{name:24s}", row, flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, action="append", help="only this task")
    parser.add_argument("--method", choices=METHODS, action="append", help="search only for this")
    parser.add_argument(
        "--missing", action="store_true", help="search only where nothing is stored"
    )
    parser.add_argument("--search", action="store_true", help="find settings, and store them")
    parser.add_argument("--finals", action="store_true", help="run the stored settings")
    parser.add_argument("--check", action="store_true", help="hold what is stored to the protocol")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Converting a tensor")
    warnings.filterwarnings("ignore", message="Power iteration stopped")
    names = args.task or list(TASKS)
    paths = {name: args.results / f"training-{name}.json" for name in names}
    for name, path in paths.items():
        methods = [m for m in COMPARED[name] if m in (args.method or METHODS)]
        if args.search:
            known = stored(path).get("search", {}) if args.missing else {}
            run_search(TASKS[name](), path, [m for m in methods if m not in known])
        if args.finals:
            run_finals(TASKS[name](), path, COMPARED[name])
    if args.check:
        check({path: partial(broken, name) for name, path in paths.items()})


if __name__ == "__main__":
    main()
