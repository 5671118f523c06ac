"""Whether `KFAC(model, loss)` trains without another argument: `python -m benchmarks.defaults`.

Every task of `benchmarks.tasks` is trained with all defaults, and so with a constant learning rate,
for the task's whole budget. A row says in how many steps each seed hit the target, and how large
the mean loss between two evaluations became in comparison with the loss before the first step.

Bounds: the median over seeds is at most 1.5 times that of KFAC-expand with tuned settings and a
schedule, and no mean is ever larger than the loss at the start. Tuned steps are those that
`benchmarks.training` has stored. The seeds are not those on which the defaults were chosen.

    python -m benchmarks.defaults --json benchmarks/results/defaults-cpu.json
    python -m benchmarks.defaults --rows T2 --seeds 1
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from benchmarks.loop import batches, first_hit, take_step
from benchmarks.measure import RESULTS, about, chosen, stored, write
from benchmarks.methods import KFAC_UNDER_ALL
from benchmarks.tasks import MAIN, TASKS, Task
from benchmarks.training import median
from kfac_scratch import KFAC

BOUND = 1.5  # times the tuned steps
SEEDS = tuple(range(300, 305))
TUNED = "kfac-expand"


def train_bare(task: Task, seed: int, steps: int) -> dict[str, Any]:
    """One run with all defaults: when it hit, and its largest mean loss between evaluations."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = KFAC(model, task.loss)
    data, metric, losses = batches(task, seed), [], []
    for step in range(1, steps + 1):
        losses.append(take_step(model, task.loss, optimizer, *next(data)))
        if step % task.every == 0:
            metric.append(task.measured(model))
    values = torch.stack(losses)
    hit = first_hit(task, metric)
    means = values.unfold(0, task.every, task.every).mean(1)  # the first one has the start in it
    largest = float(means[1:].max() / values[0])
    return {
        "seed": seed,
        "steps": None if hit is None else (hit + 1) * task.every,
        "largest_loss": round(largest, 4) if math.isfinite(largest) else None,
        "last_metric": round(metric[-1], 5),
    }


def row_of(name: str, tuned: float, seeds: tuple[int, ...], steps: int | None = None) -> dict:
    """A task's runs, the bound on their median, and whether all bounds hold."""
    task = TASKS[name]()
    runs = [train_bare(task, seed, steps or task.budget) for seed in seeds]
    return judged(name, tuned, runs)


def judged(name: str, tuned: float, runs: list[dict[str, Any]]) -> dict:
    """What some runs say about the bounds."""
    middle = median([run["steps"] for run in runs])
    stable = all(run["largest_loss"] is not None and run["largest_loss"] <= 1 for run in runs)
    return {
        "task": name,
        "tuned": tuned,
        "bound": BOUND * tuned,
        "median": middle,
        "stable": stable,
        "within": middle <= BOUND * tuned and stable,
        "runs": runs,
    }


def tuned_steps(name: str) -> float | None:
    """The median steps of tuned KFAC-expand; None for a task that has not been searched yet.

    The fewest of all its searches: with a choice of average and damping, and with fixed ones.
    """
    summary = stored(RESULTS / f"training-{name}.json").get("summary", {})
    searches = {TUNED, *KFAC_UNDER_ALL} & set(summary)
    return min((summary[n]["steps"] or math.inf for n in searches), default=None)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the result here, with what it holds")
    parser.add_argument("--rows", default="", help="only tasks whose name matches this pattern")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="how many of the seeds")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = stored(args.json) if args.json else {}
    rows = {row["task"]: row for row in result.get("rows", [])}
    for name in chosen(MAIN, args.rows):
        tuned = tuned_steps(name)
        if tuned is None:
            print(f"{name} has no tuned steps yet: run benchmarks.training first.")
            continue
        rows[name] = row_of(name, tuned, SEEDS[: args.seeds])
        print({key: value for key, value in rows[name].items() if key != "runs"}, flush=True)
        for run in rows[name]["runs"]:
            print("  ", run, flush=True)
    result |= about(torch.device("cpu")) | {"rows": list(rows.values())}
    if args.json:
        write(args.json, result)


if __name__ == "__main__":
    main()
