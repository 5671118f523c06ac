"""How time and memory of KFAC's factors grow with every size: `python -m benchmarks.growth`.

A row is a size (see `benchmarks.sweeps`). It has the smallest seconds at every value, in turns,
the peak memory, each in its own process, and the powers fitted to the largest values. A power
should exceed the one that the mathematics has, `limit`, by at most 0.1. Memory below one MiB is
noise, so that one MiB is added before the fit. What runs out of 4 GiB or of a minute says so.

The row `chunks` compares the default number of vectors that are sent back at once with fixed ones,
for many sampled vectors and a small network: at most 1.2 times the best.

    python -m benchmarks.growth --json benchmarks/results/growth-cpu.json
    python -m benchmarks.growth --rows "V|chunks"
"""

from argparse import Namespace
from functools import partial

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
from benchmarks.scaling import slope
from benchmarks.sweeps import CHUNKS, SAMPLED, SWEEPS, prepared, streamed_samples

FIT = 3  # powers are fitted to so many of the largest values
SLACK = 0.1
CHUNK = 1.2  # times the best
QUICK = (2, 4, 8)


def power(points: list[tuple[float, float | str | None]], offset: float = 0.0) -> float | None:
    """Of the line through the logarithms of the largest values, if all of them are numbers."""
    numbers = [(x, y + offset) for x, y in points[-FIT:] if isinstance(y, float)]
    return slope(numbers) if len(numbers) == FIT else None


def measured(name: str, args: Namespace) -> dict:
    """A row: time and memory at every value of a size."""
    sweep, device = SWEEPS[name], args.device
    values = QUICK if args.quick else sweep.values
    runs = {str(x): sweep.run(x, device) for x in values} if sweep.time is not None else {}
    return judged(
        {"name": name, "values": list(values)}
        | {"limit": {"time": sweep.time, "memory": sweep.memory}}
        | {"seconds": [*fastest(runs, args.rounds, device).values()]}
        | {"MiB": [peak(prepared, name, x, device, device=device, seconds=60) for x in values]}
    )


def judged(row: dict) -> dict:
    """A row with its powers, or its ratio, and bounds, computed from its seconds and mebibytes."""
    found = ratio_of_chunks(row) if row["name"] == "chunks" else powers(row)
    bounds = [at_most(what, value, bound) for what, (value, bound) in found.items()]
    values = {what: value for what, (value, _) in found.items()}
    return row | values | {"bounds": bounds, "within": all_within(bounds)}


def powers(row: dict) -> dict[str, tuple[float | None, float]]:
    """The powers that are measured, and their bounds."""
    limit, found = row["limit"], {}
    if limit["time"] is not None:
        time = power(list(zip(row["values"], row["seconds"], strict=True)))
        found["power of time"] = time, limit["time"] + SLACK
    memory = power(list(zip(row["values"], row["MiB"], strict=True)), offset=1.0)
    return found | {"power of memory": (memory, limit["memory"] + SLACK)}


def ratio_of_chunks(row: dict) -> dict[str, tuple[float, float]]:
    """The default's time over the best one."""
    best = min(s for name, s in row["seconds"].items() if name != "default")
    return {"default / best chunk": (row["seconds"]["default"] / best, CHUNK)}


def chunks(args: Namespace) -> dict:
    """A row: time by the number of vectors that are sent back at once."""
    V = 16 if args.quick else SAMPLED
    sizes = {"default": None} | {str(chunk): chunk for chunk in CHUNKS if chunk <= V}
    runs = {name: streamed_samples(V, args.device, chunk) for name, chunk in sizes.items()}
    seconds = fastest(runs, args.rounds, args.device)
    return judged({"name": "chunks", "V": V, "limit": {}, "seconds": seconds})


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv, rounds=5)
    result, rows = about(args.device), []
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    makers = {name: partial(measured, name) for name in SWEEPS} | {"chunks": chunks}
    for name in chosen(makers, args.rows):
        rows.append(makers[name](args))
        print(line(rows[-1]), flush=True)
    if args.json:
        write(args.json, result | {"rounds": args.rounds, "rows": rows})


def line(row: dict) -> str:
    """A row as text."""
    marks = []
    for bound in row["bounds"]:
        value = "unknown" if bound["value"] is None else f"{bound['value']:.2f}"
        sign = "<=" if bound["within"] else "not <="
        marks.append(f"{bound['what']} {value} ({sign} {bound['at most']:.2f})")
    return f"{row['name']:36s}{', '.join(marks)}\n    {row['seconds']}\n    {row.get('MiB', '')}"


if __name__ == "__main__":
    main()
