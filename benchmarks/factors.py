"""How long KFAC's factors take, beside a limit and beside peers: `python -m benchmarks.factors`.

A row is a network, a Fisher and a flavour, in float32 on the same data. It has

- the smallest seconds of every contender, taken in turns, and of the limit's parts (`limit`);
- the peak memory of every contender, each in its own process, and of one gradient for comparison;
- the errors of the peers' blocks, which are compared with ours before anything is timed;
- bounds: ours at most 1.25 times the limit; where the limit leaves room, at most 0.8 of a peer;
  memory at most 1.1 times curvlinops's, and not above BackPACK's. `within` says whether all hold.

The peers, and how to install them, are in `benchmarks.contenders`. Those that are missing are named
in the rows.

    python -m benchmarks.factors --json benchmarks/results/factors-cpu.json
    python -m benchmarks.factors --rows "mlp.*expand"
"""

import statistics
from collections.abc import Iterator
from itertools import product

import torch

from benchmarks import limit as limits
from benchmarks.contenders import FISHERS, FLAVOURS, contenders, disagreements, prepared
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
from benchmarks.nets import FULL, TINY, NetsOfASize, Problem, Row, problem_of

LIMIT, MEDIAN = 1.25, 1.15  # times the limit, on every row and in the median
ROOM, AHEAD = 0.7, 0.8  # where the limit is below so much of a peer, we are below so much of it
MEMORY = {"curvlinops": 1.1, "backpack": 1.0}  # times the peer's


ROWS = [Row(*names) for names in product(FULL, FISHERS, FLAVOURS)]


def vectors(fisher: str, of: Problem) -> int:
    """How many are needed: the rank of cross-entropy's Hessian is one less than its classes."""
    return of.classes - 1 if fisher == "type-2" else 1


def measured(row: Row, nets: NetsOfASize, rounds: int, device: torch.device) -> dict:
    """Everything that is measured for a row, and what follows from it."""
    of = problem_of(nets, row.net, device)
    found, notes = contenders(of, row.fisher, row.flavour)
    errors = disagreements(of, row.fisher, found)
    needed = limits.limit(of, vectors(row.fisher, of), FLAVOURS[row.flavour])
    parts = limits.parts(of, needed)
    times = fastest(parts | {name: c.run for name, c in found.items()}, rounds, device)
    names = row.net, row.fisher, row.flavour
    memory = {
        who: peak(prepared, who, *names, nets, device, device=device)
        for who in ("gradient", *found)
    }
    return judged(
        {"name": str(row), "net": row.net, "fisher": row.fisher, "flavour": row.flavour}
        | {"seconds": {name: times[name] for name in found}}
        | {"limit": needed.seconds({name: times[name] for name in parts})}
        | {"MiB": memory, "error": errors, "notes": notes}
    )


def judged(row: dict) -> dict:
    """A row with ratios and bounds, computed from its seconds and mebibytes."""
    seconds, limit, MiB = row["seconds"], row["limit"]["seconds"], row["MiB"]
    peers = [name for name in seconds if name != "ours"]
    to_peers = {name: seconds["ours"] / seconds[name] for name in peers}
    room = {name: limit / seconds[name] for name in peers}
    ratio = seconds["ours"] / limit
    bounds = [at_most("ours / limit", ratio, LIMIT)]
    bounds += [
        at_most(f"ours / {name}", to_peers[name], AHEAD) for name in peers if room[name] <= ROOM
    ]
    bounds += [
        at_most(f"MiB: ours / {name}", _quotient(MiB["ours"], MiB[name]), most)
        for name, most in MEMORY.items()
        if name in MiB
    ]
    ratios = {"ratio": ratio, "ours / peer": to_peers, "limit / peer": room}
    return row | ratios | {"bounds": bounds, "within": all_within(bounds)}


def _quotient(ours: float | str | None, theirs: float | str | None) -> float | None:
    numbers = isinstance(ours, float) and isinstance(theirs, float) and theirs > 0
    return ours / theirs if numbers else None


def median(rows: list[dict]) -> dict:
    """The bound of all rows together."""
    return at_most("median of ours / limit", statistics.median(r["ratio"] for r in rows), MEDIAN)


def lines(row: dict) -> Iterator[str]:
    """A row as text."""
    seconds, split = row["seconds"], row["limit"]
    ours = f"{1e3 * seconds['ours']:8.1f} ms"
    yield (
        f"{row['name']:30s}{ours}  limit {1e3 * split['seconds']:.1f} (forward "
        f"{1e3 * split['forward']:.1f}, {split['vectors']} backward {1e3 * split['backward']:.1f}, "
        f"products {1e3 * split['products']:.1f})  ratio {row['ratio']:.2f}"
    )
    for name in row["MiB"]:
        time = f"{1e3 * seconds[name]:8.1f} ms" if name in seconds else 11 * " "
        MiB = row["MiB"][name]
        memory = f"{MiB:7.1f} MiB" if isinstance(MiB, float) else str(MiB)
        error = f"  error {row['error'][name]:.0e}" if name in row["error"] else ""
        yield f"    {name:26s}{time}{memory}{error}"
    yield from (f"    {name:26s}{note}" for name, note in row["notes"].items())
    for bound in row["bounds"]:
        if not bound["within"]:
            yield f"    not within: {bound['what']} is {bound['value']}, not <= {bound['at most']}"


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv, rounds=9)
    result, rows = about(args.device), []
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    for row in chosen(ROWS, args.rows):
        rows.append(measured(row, TINY if args.quick else FULL, args.rounds, args.device))
        print("\n".join(lines(rows[-1])), flush=True)
    result |= {"rounds": args.rounds, "median": median(rows), "rows": rows}
    print(result["median"])
    if args.json:
        write(args.json, result)


if __name__ == "__main__":
    main()
