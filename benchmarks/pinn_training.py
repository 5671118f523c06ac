"""Error of PINNs after equal processor time: `python -m benchmarks.pinn_training`.

Protocol. On a problem, every method has the same number of trials on seed 0, the same seconds of
processor time for each, and its own space of settings (`benchmarks.pinn_methods`). All trials are
stored. The settings with the smallest error run on fresh seeds, where the methods take turns, with
equal seconds. Time is that of drawing points and of the steps, not that of measuring the error.
Errors are root mean squares on points of their own. A run counts the calls of the functions that
make its method. One in which any of them was not called has no error, and cannot win.

With three seeds, no sign test can tell two methods apart: the largest and smallest value are shown.

    python -m benchmarks.pinn_training --search --finals            # all of it: about 2 1/4 hours
    python -m benchmarks.pinn_training --search --finals --missing  # what is not stored yet
    python -m benchmarks.pinn_training --problem poisson-5d-wide --search --finals  # larger ones
    python -m benchmarks.pinn_training --check                      # is the protocol kept?
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.linalg import LinAlgError

from benchmarks.calls import counted
from benchmarks.measure import RESULTS, about, finite, first_line, keep_memory, stored, write
from benchmarks.methods import Config, neighbour, place, settings, spread
from benchmarks.pinn_methods import MAIN, PINN_METHODS, PINN_TASKS, PinnTask
from benchmarks.protocol import check, final_seeds, never_called
from kfac_scratch.pinn.problems import mlp

SEARCH_SEED = 0
FEWEST_SEEDS = 3
DRIFT = 1.15  # the ratio of the times of two evaluations
CONDITIONS = ("versions", "processor", "threads", "clock", "dtype")

# ---- one run ------------------------------------------------------------------------------------


@dataclass
class PinnRun:
    """What one training run gave; the three lists have one entry for each evaluation."""

    seed: int
    budget: float  # seconds
    config: Config
    used: float = 0.0
    seconds: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    errors: list[float | None] = field(default_factory=list)  # None: not a number
    error: float | None = None  # at the end
    stopped: str | None = None  # why it ended early
    calls: dict[str, int] = field(default_factory=dict)  # of the functions that prove the method


def train(task: PinnTask, name: str, config: Config, seed: int, budget: float) -> PinnRun:
    """Train until the processor time is used up, or the method raises, which moves no weight."""
    method, run = PINN_METHODS[name], PinnRun(seed, budget, config)
    with counted(method.proof) as run.calls:
        _train(task, method.build(task, config, budget), run)
    run.error = run.errors[-1] if min(run.calls.values()) > 0 else None
    return run


def _train(task: PinnTask, optimizer: Any, run: PinnRun) -> None:
    torch.manual_seed(run.seed)
    model, state = mlp(*task.sizes), None
    draw = torch.Generator().manual_seed(run.seed)
    test = task.problem.points(9000, torch.Generator().manual_seed(1000 + run.seed))
    calls, count, due = 0, 0, run.budget / 200

    def measure() -> None:
        value = task.problem.error(model, test)
        run.seconds.append(round(run.used, 3))
        run.steps.append(count)
        run.errors.append(float(f"{value:.4g}") if math.isfinite(value) else None)

    measure()
    while run.used < run.budget:
        start = time.process_time()
        if calls % run.config["keep"] == 0:
            terms = task.terms(draw)
        try:
            state = optimizer.step(model, terms, state)
        except (ValueError, LinAlgError) as error:  # not finite, or a matrix without an inverse
            run.stopped = first_line(error)
            break
        run.used += time.process_time() - start
        calls, count = calls + 1, state.count
        if run.used >= due and run.used < run.budget:
            measure()
            due = DRIFT * run.used
    measure()
    run.used = round(run.used, 3)


# ---- search and finals --------------------------------------------------------------------------


def proposal(task: PinnTask, name: str, tried: list[dict]) -> Config:
    """The settings of the next trial: the first ones, then some that fill the space, then near.

    The last third are neighbours of the best so far.
    """
    method, number = PINN_METHODS[name], len(tried)
    if number == 0:
        return method.first
    near = task.trials // 3
    if number < task.trials - near:
        return settings(method.space, spread(method.space, number, seed=0)[-1])
    best, random = place(method.space, min(tried, key=rank)["config"]), Random(number)
    for _ in range(100):  # coordinates can move without another choice
        found = settings(method.space, neighbour(method.space, best, random))
        if finite(found) not in [finite(trial["config"]) for trial in tried]:
            break
    return found


def rank(run: dict) -> float:
    """The smaller the better."""
    return math.inf if run["error"] is None else run["error"]


def run_search(task: PinnTask, path: Path, names: Iterable[str]) -> None:
    """All trials of some methods that are not stored yet, each written as it comes."""
    for name in names:
        warm_up(task, name)
        while len(tried := trials(path, name)) < task.trials:
            config = proposal(task, name, tried)
            run = train(task, name, config, SEARCH_SEED, task.trial_seconds)
            keep(path, ("search", name), [*tried, asdict(run)])
            said(path, name, run)


def run_finals(task: PinnTask, path: Path, names: Iterable[str]) -> None:
    """Fresh seeds one after the other; in each the methods take turns. Written as they come."""
    names = list(names)
    for name in names:
        warm_up(task, name)
    for seed in final_seeds(task):
        for name in names:
            runs = stored(path).get("finals", {}).get(name, [])
            if any(run["seed"] == seed for run in runs):
                continue
            run = train(task, name, winner(trials(path, name)), seed, task.seconds)
            keep(path, ("finals", name), [*runs, asdict(run)])
            said(path, name, run)
    result = stored(path)
    write(path, result | {"summary": summary(result["finals"])})


def warm_up(task: PinnTask, name: str) -> None:
    """One step, so that what happens once in a process counts in no run."""
    train(task, name, PINN_METHODS[name].first, SEARCH_SEED, 1e-9)


def said(path: Path, name: str, run: PinnRun) -> None:
    what = f"{path.stem}, {name}, seed {run.seed}, {run.steps[-1]} steps: {run.error}"
    print(what, run.config, run.stopped or "", flush=True)


def trials(path: Path, name: str) -> list[dict]:
    return stored(path).get("search", {}).get(name, [])


def winner(tried: list[dict]) -> Config:
    """The settings of the smallest error."""
    return min(tried, key=rank)["config"]


def conditions() -> dict[str, Any]:
    return about(torch.device("cpu")) | {"dtype": "float64"}


def keep(path: Path, place: tuple[str, str], runs: list[dict] | None) -> None:
    """Put runs into the file, or take those of a method out; a changed search has no finals.

    Raises:
        SystemExit: If what is stored was measured under other conditions, or for other seconds.
    """
    part, name = place
    result, now = stored(path), conditions()
    for key in CONDITIONS if result else ():
        if result.get(key) != now[key]:
            raise SystemExit(
                f"{path}: what is stored has another {key}. Move the file away to start afresh."
            )
    result = now | {"search": {}, "finals": {}} | result
    result.pop("summary", None)
    if runs is None:
        result[part].pop(name, None)
    else:
        result[part][name] = runs
    if part == "search":
        result["finals"].pop(name, None)
    budgets = {run["budget"] for of in result[part].values() for run in of}
    if len(budgets) > 1:
        raise SystemExit(f"{path}: the {part} would have different seconds, {sorted(budgets)}.")
    write(path, result)


def summary(finals: dict[str, list[dict]]) -> dict[str, dict]:
    """The errors at the end, sorted, their median, and the median number of steps."""
    table = {}
    for name, runs in finals.items():
        errors = sorted(rank(run) for run in runs)
        steps = statistics.median(run["steps"][-1] for run in runs)
        table[name] = {"median": statistics.median(errors), "errors": errors, "steps": steps}
    return finite(table)


# ---- check --------------------------------------------------------------------------------------


def broken(name: str, result: dict) -> Iterator[str]:
    """What a stored result of a problem violates, in words."""
    task, search, final = PINN_TASKS[name], result.get("search", {}), result.get("finals", {})
    for part, of in (("search", search), ("finals", final)):
        if others := set(of) ^ set(task.compared):
            yield f"{name}: the {part} differs from the list in {sorted(others)}"
        budgets = {run["budget"] for runs in of.values() for run in runs}
        if len(budgets) > 1:
            yield f"{name}: the {part} gave methods different seconds, {sorted(budgets)}"
        for method, runs in of.items():
            for run in runs:
                yield from _broken_run(f"{name}, {part}, {method}, seed {run['seed']}", method, run)
    seeds = {run["seed"] for runs in search.values() for run in runs}
    for method, runs in search.items():
        if len(runs) != task.trials:
            yield f"{name}, {method}: {len(runs)} trials, {task.trials} expected"
    expected = final_seeds(task)
    if len(expected) < FEWEST_SEEDS or seeds & set(expected):
        yield f"{name}: final seeds {expected} are fewer than {FEWEST_SEEDS} or were searched on"
    for method, runs in final.items():
        if [run["seed"] for run in runs] != expected:
            yield f"{name}, {method}: the seeds are not {expected}"
        for run in runs:
            if search.get(method) and run["config"] != winner(search[method]):
                yield f"{name}, {method}, seed {run['seed']}: its settings did not win the search"
            yield from never_called(f"{name}, {method}, seed {run['seed']}", run["calls"])
    if result.get("summary") != summary(final):
        yield f"{name}: the summary does not follow from the runs"
    for key in CONDITIONS:
        if not result.get(key):
            yield f"{name}: {key} is missing"


def _broken_run(where: str, method: str, run: dict) -> Iterator[str]:
    """What any run violates, in the search or the finals."""
    if set(run["config"]) != set(PINN_METHODS[method].space):
        yield f"{where}: other settings than the method's space has"
    if set(run["calls"]) != set(PINN_METHODS[method].proof):
        yield f"{where}: other functions were counted than those that prove the method"
    if run["stopped"] is None and run["used"] < run["budget"] - 1e-2:
        yield f"{where}: it ended after {run['used']} of {run['budget']} seconds"
    if run["error"] != (run["errors"][-1] if min(run["calls"].values()) > 0 else None):
        yield f"{where}: the error is not that at the end of the curve"
    curve = list(zip(run["seconds"], run["steps"], strict=True))
    if curve != sorted(curve) or len(curve) != len(run["errors"]):
        yield f"{where}: the curve does not go forward"


# ---- command line -------------------------------------------------------------------------------


def estimate(task: PinnTask, path: Path) -> float:
    """Seconds of processor time that the runs which are not stored take, by their budgets."""
    result, total = stored(path), 0.0
    for name in task.compared:
        total += (task.trials - len(trials(path, name))) * task.trial_seconds
        done = len(result.get("finals", {}).get(name, []))
        total += (task.finals - done) * task.seconds
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--problem", choices=PINN_TASKS, action="append", help=f"default: {', '.join(MAIN)}"
    )
    parser.add_argument("--method", choices=PINN_METHODS, action="append", help="only this one")
    parser.add_argument("--search", action="store_true", help="try settings, and store them all")
    parser.add_argument("--finals", action="store_true", help="run the best settings")
    parser.add_argument("--missing", action="store_true", help="keep what is stored, do the rest")
    parser.add_argument("--check", action="store_true", help="hold what is stored to the protocol")
    parser.add_argument("--seconds", type=float, help="processor time of a final run")
    parser.add_argument("--trial-seconds", type=float, help="processor time of a trial")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    keep_memory()
    chosen = args.problem or (PINN_TASKS if args.check else MAIN)
    given = {"seconds": args.seconds, "trial_seconds": args.trial_seconds}
    tasks = {
        name: replace(PINN_TASKS[name], **{k: v for k, v in given.items() if v is not None})
        for name in chosen
    }
    paths = {name: args.results / f"pinn-training-{name}.json" for name in chosen}
    parts = [part for part in ("search", "finals") if getattr(args, part)]
    for name, task in tasks.items():
        for method in task.compared if parts and not args.missing else ():
            if method in (args.method or PINN_METHODS) and paths[name].exists():
                keep(paths[name], (parts[0], method), None)
    if parts:
        left = sum(estimate(task, paths[name]) for name, task in tasks.items())
        print(f"About {left / 60:.0f} minutes of processor time for all that is not stored.")
    for name, task in tasks.items():
        names = [m for m in task.compared if m in (args.method or PINN_METHODS)]
        if args.search:
            run_search(task, paths[name], names)
        if args.finals:
            run_finals(task, paths[name], names)
    if args.check:
        check({path: partial(broken, name) for name, path in paths.items()})


if __name__ == "__main__":
    main()
