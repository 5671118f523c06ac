"""How long capture takes, beside an earlier checkout's: `python -m benchmarks.capture`.

A row is a network, a Fisher and a flavour. Each version runs in a process of its own
(`benchmarks.capture_process`), with the same networks, data and layers; both take turns in every
round, and the one that is first changes. `seconds` are medians of CPU time on one thread. `limit`
is the release's, and the bound 1.1 times that. `within` says whether it holds.

This version keeps a plan for all rounds, as `kfac_over` and the optimizer do. `plan` has the
seconds of making one, which the release did not do, and how many captures of the row cost the same.

Freed memory stays with the processes: whether the system's allocator gives it back and takes it
again depends on what came before, and would count as much as capture. The versions differ in what
they compute, too: an exact root of cross-entropy's Hessian has one vector less than classes here,
and one for each class in the first release.

`--release` is the path of that checkout, here of 7ec8957, which captured with hooks:

    git worktree add ../release 7ec8957
    python -m benchmarks.capture --release ../release --json benchmarks/results/capture-cpu.json
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.measure import about, all_within, arguments, at_most, chosen, write
from benchmarks.nets import Row

BOUND = 1.1  # times the release's seconds
HERE = Path(__file__).parents[1]
NETS, FISHERS, FLAVOURS = ("mlp", "cnn", "transformer"), ("MC-1", "type-2"), ("expand", "reduce")
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**36),
    "MALLOC_TOP_PAD_": str(2**28),
}


ROWS = [Row(*names) for names in product(NETS, FISHERS, FLAVOURS)]


class Version:
    """A process that captures with the package of one checkout, when it is asked."""

    def __init__(self, checkout: Path, quick: bool) -> None:
        script = Path(__file__).with_name("capture_process.py")
        settings = {"PYTHONPATH": str(checkout.resolve()), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, script, "tiny" if quick else "full"],
            env=os.environ | settings | KEEP_FREED_MEMORY,
            cwd=checkout,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.package = Path(self._answer())

    def seconds(self, what: str) -> float | None:
        """CPU seconds of a row's capture or of a plan; None if the version has no such thing."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


def times(versions: dict[str, Version], names: Iterable[str], rounds: int) -> dict[str, dict]:
    """Median seconds by name and version, over rounds in which both take turns, after one more."""
    taken: dict[str, dict[str, list[float]]] = {n: {who: [] for who in versions} for n in names}
    for i in range(rounds + 1):
        for name, of in taken.items():
            for who in list(versions)[:: -1 if i % 2 else 1]:
                seconds = versions[who].seconds(name)
                if i > 0 and seconds is not None:
                    of[who].append(seconds)
    return {n: {who: statistics.median(s) for who, s in of.items() if s} for n, of in taken.items()}


def judged(row: dict) -> dict:
    """A row with its ratio, its bound and what a plan costs, computed from its seconds."""
    ratio = row["seconds"] / row["limit"]["release"]
    plan = {"seconds": row["plan"]["seconds"], "captures": row["plan"]["seconds"] / row["seconds"]}
    bounds = [at_most("capture / the release's", ratio, BOUND)]
    return row | {"ratio": ratio, "plan": plan, "bounds": bounds, "within": all_within(bounds)}


def line(row: dict) -> str:
    """A row as text."""
    ms = f"{1e3 * row['seconds']:8.2f} ms  {row['ratio']:5.2f} x the release's"
    plan = f"a plan {1e3 * row['plan']['seconds']:6.1f} ms, {row['plan']['captures']:5.2f} captures"
    return f"{row['name']:28s}{ms}   {plan}{'' if row['within'] else '   not within'}"


def commit(checkout: Path) -> str:
    """What git calls the state of a checkout."""
    command = ["git", "-C", checkout, "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv, rounds=31, paths=["release"])
    rows = chosen(ROWS, args.rows)
    checkouts = {"release": args.release, "this": HERE}
    result = about(args.device) | {"commits": {who: commit(p) for who, p in checkouts.items()}}
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    versions = {who: Version(path, args.quick) for who, path in checkouts.items()}
    try:
        for who, path in checkouts.items():
            assert versions[who].package.is_relative_to(path.resolve()), versions[who].package
        plans = [f"{net} plan" for net in dict.fromkeys(row.net for row in rows)]
        found = times(versions, [*map(str, rows), *plans], args.rounds)
    finally:
        for version in versions.values():
            version.close()
    of_rows = [
        judged(
            {"name": str(row), "seconds": found[str(row)]["this"]}
            | {"limit": {"release": found[str(row)]["release"]}}
            | {"plan": {"seconds": found[f"{row.net} plan"]["this"]}}
        )
        for row in rows
    ]
    print("\n".join(map(line, of_rows)))
    if args.json:
        write(args.json, result | {"rounds": args.rounds, "rows": of_rows})


if __name__ == "__main__":
    main()
