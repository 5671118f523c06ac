"""KFAC on several ranks, by placement: `python -m benchmarks.distributed`.

Every row is a job of `P` processes on this machine, with one thread each, that trains a network of
linear layers on one batch of 256 samples, cut into `P` shards. The matrices are renewed in every
step, and so are the inverses: what is measured is the most that a placement can cost.

`seconds` is the CPU time of a step on the busiest rank. It is not the time that a step takes on a
network of machines: gloo's copying on one machine is a part of it. `MiB` is the memory of matrices
and inverses on the rank that holds most, `sent` the numbers that it gives to collectives in a step,
by kind. The limit for both is what the formulas state for the placement.
"""

import resource
import tempfile
from argparse import Namespace
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from benchmarks.measure import about, all_within, arguments, at_most, chosen, write
from kfac_scratch import KFAC, distribute, monte_carlo
from kfac_scratch.distributed.packing import leaves
from kfac_scratch.distributed.sharing import assignment

SIZES = {False: (784, 512, 512, 512, 10), True: (20, 16, 8, 3)}
SAMPLES, STEPS = 256, 4
SLACK = 1.01  # times what is stated


@dataclass(frozen=True)
class Row:
    """A number of ranks, the share of them that holds each inverse, and whether DP-KFAC is used."""

    P: int
    m: int
    owner_local: bool = False

    def __str__(self) -> str:
        placement = {1: "mem-opt", self.P: "comm-opt"}.get(self.m, "hybrid")
        if self.P == 1:
            return "P=1"
        return f"P={self.P} {'DP-KFAC' if self.owner_local else placement}"


ROWS = [
    Row(1, 1),
    *(Row(P, m) for P in (2, 4) for m in (1, 2, 4) if m <= P),
    *(Row(P, 1, True) for P in (2, 4)),
]


def rank(number: int, row: Row, quick: bool, folder: str) -> None:
    """One process of a job: it writes its numbers into a file."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=number, world_size=row.P
    )
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(SIZES[quick]):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    model, loss = nn.Sequential(*layers[:-1]), nn.CrossEntropyLoss()
    fisher = monte_carlo(1, torch.Generator().manual_seed(number))
    optimizer = KFAC(model, loss, fisher=fisher, factor_every=1, inverse_every=1)
    placed = distribute(optimizer, row.m / row.P, owner_local=row.owner_local)
    X = torch.randn(SAMPLES, SIZES[quick][0])[number :: row.P]
    y = torch.randint(SIZES[quick][-1], (SAMPLES,))[number :: row.P]
    before, sent = 0.0, dict(placed.ranks.sent)
    for step in range(STEPS + 1):
        if step == 1:  # the first one warms up
            before, sent = _cpu(), dict(placed.ranks.sent)
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
    held = [optimizer._progress.matrices, optimizer._progress.inverses]
    bytes_held = sum(t.nbytes for values in held for M in values.values() for t in leaves(M))
    numbers = {
        "seconds": (_cpu() - before) / STEPS,
        "MiB": bytes_held / 2**20,
        "sent": {what: (n - sent.get(what, 0)) / STEPS for what, n in placed.ranks.sent.items()},
    }
    torch.save(numbers, f"{folder}/{number}")
    dist.barrier()
    dist.destroy_process_group()


def _cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def stated(row: Row, quick: bool) -> dict[str, float]:
    """The memory in MiB and the numbers sent that the formulas state, at most on any rank."""
    shapes = {str(k): (i + 1, o) for k, (i, o) in enumerate(pairwise(SIZES[quick]))}
    half = {name: sum(d * (d + 1) // 2 for d in shape) for name, shape in shapes.items()}
    full = {name: sum(d * d for d in shape) for name, shape in shapes.items()}
    owners = assignment({n: float(sum(d**3 for d in s)) for n, s in shapes.items()}, row.P)
    width = row.P // row.m
    held, sent = [], []
    for number in range(row.P):
        column = [n for n in shapes if owners[n] % width == number % width]
        own = [n for n in shapes if owners[n] == number]
        matrices = own if row.owner_local else list(shapes)
        held.append(sum(full[n] for n in matrices) + sum(full[n] for n in column))
        factors = 0 if row.owner_local else sum(half.values()) + len(shapes)
        sent.append(factors + (sum(half[n] for n in column) if row.m > 1 else 0))
    G = sum(i * o for i, o in shapes.values())
    gradients = G + (G if row.m < row.P else 0)
    return {
        "MiB": max(held) * 4 / 2**20,
        "sent": float(max(sent) + gradients) if row.P > 1 else 0.0,
    }


def measured(row: Row, args: Namespace) -> dict[str, Any]:
    """A row: the numbers of the rank that has most of each."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank, (row, args.quick, folder), nprocs=row.P, join=True)
        ranks = [torch.load(Path(folder) / str(number)) for number in range(row.P)]
    most = max(ranks, key=lambda numbers: sum(numbers["sent"].values()))
    return judged(
        {
            "name": str(row),
            "seconds": max(numbers["seconds"] for numbers in ranks),
            "MiB": max(numbers["MiB"] for numbers in ranks),
            "least MiB": min(numbers["MiB"] for numbers in ranks),
            "sent": most["sent"],
            "limit": stated(row, args.quick),
        }
    )


def judged(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its bounds."""
    sent = sum(count for what, count in row["sent"].items() if what != "control")
    bounds = [
        at_most("MiB", row["MiB"], SLACK * row["limit"]["MiB"]),
        at_most("sent", sent, row["limit"]["sent"]),
    ]
    return row | {"bounds": bounds, "within": all_within(bounds)}


def main(argv: list[str] | None = None) -> None:
    """Measure the chosen rows, and store them as they come."""
    args = arguments(__doc__ or "", argv, rounds=1)
    result, rows = about(args.device), []
    result["clock"] = "CPU time of the busiest process"
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    for row in chosen(ROWS, args.rows):
        rows.append(measured(row, args))
        shown = rows[-1]
        parts = ", ".join(f"{what} {count:,.0f}" for what, count in shown["sent"].items())
        print(
            f"{shown['name']:14} {1e3 * shown['seconds']:6.0f} ms  {shown['MiB']:6.1f} MiB  "
            f"(least {shown['least MiB']:.1f})  sent: {parts}",
            flush=True,
        )
        if args.json:
            write(args.json, result | {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
