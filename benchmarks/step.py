"""How long a training step takes, beside AdamW's: `python -m benchmarks.step`.

A row is a training and an optimizer: two tasks of `benchmarks.training`, and a network of wide
layers at four sizes. It has the smallest seconds of a step, with what KFAC does every so often
spread over its period; all optimizers of a training take turns. `limit` is AdamW's step of the same
rounds, and `ratio` the quotient. Peak memory is that of ten steps in a process of its own, with the
optimizer's state.

Bounds, where there is one: 1.4 times AdamW with default periods on the tasks, 7 times for a
1024-wide network at 128 samples. `within` says whether they hold. Of wide networks, `exact` and
`factored` damping are rows, since their cost per step differs: products with four matrices for
every layer, or with two.

    python -m benchmarks.step --json benchmarks/results/step-cpu.json
    python -m benchmarks.step --rows "mlp 1024"
"""

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from benchmarks.measure import (
    about,
    all_within,
    arguments,
    at_most,
    chosen,
    fastest,
    peak,
    write,
)
from benchmarks.optimizers import FULL, OPTIMIZERS, STEPS, TINY, prepared, steps

ON_TASKS, ON_WIDE = tuple(OPTIMIZERS), ("adamw", "kfac exact", "kfac factored")
TASK, WIDE = 1.4, 7.0  # times AdamW's step
BOUNDS = {
    ("T1", "kfac exact"): TASK,
    ("T1", "kfac factored"): TASK,
    ("T4", "kfac exact"): TASK,
    ("T4", "kfac factored"): TASK,
    ("mlp 1024, N=128", "kfac exact"): WIDE,
    ("mlp 1024, N=128", "kfac factored"): WIDE,
}


@dataclass(frozen=True)
class Row:
    """Who takes a step of what."""

    training: str
    optimizer: str

    def __str__(self) -> str:
        return f"{self.training}: {self.optimizer}"


def rows() -> Iterator[Row]:
    """All optimizers on the tasks; on wide networks, AdamW and KFAC with both kinds of damping."""
    for training in FULL:
        for optimizer in ON_WIDE if training.startswith("mlp") else ON_TASKS:
            yield Row(training, optimizer)


def judged(row: dict) -> dict:
    """A row with its ratio and its bound, computed from its seconds."""
    ratio = row["seconds"] / row["limit"]["adamw"]
    bound = BOUNDS.get((row["training"], row["optimizer"]))
    bounds = [] if bound is None else [at_most("step / adamw's step", ratio, bound)]
    return row | {"ratio": ratio, "bounds": bounds, "within": all_within(bounds)}


def measured(training: str, optimizers: list[str], args: Namespace) -> Iterator[dict]:
    """The rows of one training, whose optimizers take turns, AdamW always among them."""
    trainings = TINY if args.quick else FULL
    of = trainings[training]()
    everyone = dict.fromkeys(["adamw", *optimizers])
    runs = {name: steps(of, name, args.device) for name in everyone}
    times = fastest(runs, args.rounds, args.device)
    memory = {
        name: peak(prepared, training, name, trainings, args.device, device=args.device)
        for name in everyone
    }
    for name in optimizers:
        yield judged(
            {"name": str(Row(training, name)), "training": training, "optimizer": name}
            | {"seconds": times[name] / STEPS, "limit": {"adamw": times["adamw"] / STEPS}}
            | {"MiB": {"this": memory[name], "adamw": memory["adamw"]}}
        )


def line(row: dict) -> str:
    """A row as text."""
    MiB = row["MiB"]["this"]
    memory = f"{MiB:7.1f} MiB" if isinstance(MiB, float) else str(MiB)
    bounds = (f"  {'' if b['within'] else 'not '}within {b['at most']}" for b in row["bounds"])
    ms = f"{1e3 * row['seconds']:9.2f} ms  {row['ratio']:6.2f} x adamw"
    return f"{row['name']:46s}{ms}{memory:>14s}{''.join(bounds)}"


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv, rounds=5)
    result: dict = about(args.device)
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    found = []
    for training, group in groupby(chosen(rows(), args.rows), lambda row: row.training):
        for row in measured(training, [of.optimizer for of in group], args):
            found.append(row)
            print(line(row), flush=True)
    if args.json:
        write(args.json, result | {"rounds": args.rounds, "steps": STEPS, "rows": found})


if __name__ == "__main__":
    main()
