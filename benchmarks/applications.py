"""Curvature in use, at size: `python -m benchmarks.applications`.

The rows `laplace` and `influence` belong to a network of a million parameters and 50,000 samples,
in batches; influence is that of all samples on 100 queries. `MiB` is the peak
memory above what was in use before, and `limit` what is stated: for influence, the
gradients of all queries and those of one batch for the largest block; for Laplace, all factors and
their eigenvectors, and what the decomposition of the largest one needs in float64. No number of
samples is in it. `seconds` is one run.

A row `evidence, seed k` trains a convolutional network on 500 digits with every weight decay of a
list, and compares the decay with the largest evidence, with KFAC-expand and with KFAC-reduce, to
the decay with the best accuracy on other digits. `seconds` are those of both evidences, in turns.
The row `evidence, exact blocks` has a network so small that the exact blocks fit beside both.

Source: for the evidence, Eschenhagen et al. 2023 (arXiv:2311.00636), §4.2.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.measure import (
    Run,
    about,
    all_within,
    arguments,
    at_most,
    chosen,
    clock,
    fastest,
    peak_memory,
    write,
)
from kfac_scratch import EXPAND, REDUCE, Dense, LayerIO, monte_carlo
from kfac_scratch.applications.influence import influence_scores
from kfac_scratch.applications.laplace import laplace, log_evidence
from kfac_scratch.data_loader import kfac_over

SUM = nn.CrossEntropyLoss(reduction="sum")
SIZES = {False: (784, 900, 320, 10), True: (20, 16, 8, 3)}
SAMPLES, QUERIES, BATCH = {False: 50_000, True: 256}, {False: 100, True: 4}, 64
DECAYS = (0.01, 0.1, 1.0, 3.0, 10.0)
FLAVOURS = {"expand": EXPAND, "reduce": REDUCE}
SLACK = 2.5  # times what is stated: products are formed beside what they read


class Batches:
    """Random samples in batches, made when they are asked for, always the same."""

    def __init__(self, sizes: tuple[int, ...], samples: int, device: torch.device) -> None:
        self.sizes, self.samples, self.device = sizes, samples, device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of inputs and labels."""
        generator = torch.Generator(self.device).manual_seed(0)
        options: Any = {"generator": generator, "device": self.device}
        for start in range(0, self.samples, BATCH):
            N = min(BATCH, self.samples - start)
            yield (
                torch.randn(N, self.sizes[0], **options),
                torch.randint(self.sizes[-1], (N,), **options),
            )


def perceptron(sizes: tuple[int, ...], device: torch.device) -> nn.Module:
    """A network of linear layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).to(device)


def of_large_data(what: str, quick: bool, device: torch.device) -> tuple[Run, Run]:
    """A run on few samples that warms up, and the run."""
    sizes = SIZES[quick]
    model, data = perceptron(sizes, device), Batches(sizes, SAMPLES[quick], device)
    few = Batches(sizes, 2 * BATCH, device)
    if what == "laplace":
        run = partial(laplace, model, SUM, prior=1.0, fisher=monte_carlo(1), progress=False)
    else:
        Ks = kfac_over(model, SUM, few, monte_carlo(1), progress=False)
        inverses = {name: K.inverse(1.0) for name, K in Ks.items()}
        queries = list(Batches(sizes, QUERIES[quick], device))
        run = partial(influence_scores, model, SUM, inverses, queries, progress=False)
    return partial(run, data=few), partial(run, data=data)


def stated(what: str, quick: bool) -> float:
    """The mebibytes that are stated."""
    sizes = SIZES[quick]
    blocks = [(d_in + 1) * d_out for d_in, d_out in pairwise(sizes)]
    factors = sum((d_in + 1) ** 2 + d_out**2 for d_in, d_out in pairwise(sizes))
    numbers = {
        "laplace": 2 * factors + 8 * max(sizes) ** 2,  # eigenvectors; four matrices in float64
        "influence": QUERIES[quick] * sum(blocks) + BATCH * max(blocks),
    }[what]
    return numbers * 4 / 2**20


def large(what: str, args: Namespace) -> dict:
    """A row: peak memory and seconds."""
    warm_up, run = of_large_data(what, args.quick, args.device)
    warm_up()
    start = clock(args.device)
    MiB = peak_memory(run, args.device)
    seconds = clock(args.device) - start
    row = {"name": what, "samples": SAMPLES[args.quick], "seconds": seconds, "MiB": MiB}
    return judged(row | {"limit": {"MiB": stated(what, args.quick)}})


def judged(row: dict) -> dict:
    """The row with its bounds."""
    bounds = []
    if "MiB" in row["limit"]:
        memory = row["MiB"] if isinstance(row["MiB"], float) else None
        bounds = [at_most("MiB", memory, SLACK * row["limit"]["MiB"])]
    if "reduce / expand" in row["limit"]:
        ratio = row["seconds"]["reduce"] / row["seconds"]["expand"]
        bounds = [at_most("reduce / expand", ratio, row["limit"]["reduce / expand"])]
    return row | {"bounds": bounds, "within": all_within(bounds)}


def convolutional() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def trained(model: nn.Module, X: Tensor, y: Tensor, decay: float, steps: int) -> nn.Module:
    """A network after Adam on all data, with a decay of the sum of the losses."""
    model = model.to(X.device)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        adam.zero_grad()
        squares = torch.stack([p.square().sum() for p in model.parameters()]).sum()
        (SUM(model(X), y) + decay / 2 * squares).backward()
        adam.step()
        schedule.step()
    return model


def digits_of(args: Namespace) -> tuple[Tensor, Tensor, int, int]:
    """All digits in random order, the number of those to train on, and the steps."""
    digits = load_digits()
    order = torch.randperm(len(digits.target))
    X = torch.tensor(digits.images, dtype=torch.float32)[order].to(args.device) / 16
    y = torch.tensor(digits.target)[order].to(args.device)
    return X, y, *((40, 5) if args.quick else (500, 300))


def of_digits(seed: int, args: Namespace) -> dict:
    """A row: accuracy and evidences for every decay of one seed."""
    torch.manual_seed(seed)
    X, y, N, steps = digits_of(args)
    batches = list(zip(X[:N].split(100), y[:N].split(100), strict=True))
    accuracy, evidence = [], {name: [] for name in FLAVOURS}  # type: ignore[var-annotated]
    seconds = dict.fromkeys(FLAVOURS, 0.0)
    for decay in DECAYS:
        torch.manual_seed(seed)
        model = trained(convolutional(), X[:N], y[:N], decay, steps)
        with torch.no_grad():
            accuracy.append(float((model(X[N:]).argmax(1) == y[N:]).float().mean()))
        runs = {
            name: partial(laplace, model, SUM, batches, decay, flavour=flavour, progress=False)
            for name, flavour in FLAVOURS.items()
        }
        for name, run in runs.items():
            evidence[name].append(float(log_evidence(run())) / N)
        for name, s in fastest(runs, args.rounds, args.device).items():
            seconds[name] += s
    picked = {name: DECAYS[values.index(max(values))] for name, values in evidence.items()}
    return judged(
        {
            "name": f"evidence, seed {seed}",
            "decays": list(DECAYS),
            "accuracy": accuracy,
            "evidence": evidence,
            "chosen": picked,
            "accuracy of the chosen": {n: accuracy[DECAYS.index(d)] for n, d in picked.items()},
            "seconds": seconds,
            "limit": {"reduce / expand": 1.0},
        }
    )


def small() -> nn.Module:
    """Two convolutions and a linear layer whose exact blocks fit into memory."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(4, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def exact_block(io: LayerIO) -> Dense:
    return Dense(io.block())


def beside_the_exact_block(args: Namespace) -> dict:
    """A row: the evidences of a small network, with the exact blocks, too."""
    torch.manual_seed(0)
    X, y, N, steps = digits_of(args)
    batches = list(zip(X[:N].split(100), y[:N].split(100), strict=True))
    structures: dict[str, dict[str, Any]] = {"exact": {"approximation": exact_block}}
    structures |= {name: {"flavour": flavour} for name, flavour in FLAVOURS.items()}
    evidence, runs = {name: [] for name in structures}, {}  # type: ignore[var-annotated]
    for decay in DECAYS:
        torch.manual_seed(0)
        model = trained(small(), X[:N], y[:N], decay, steps)
        for name, options in structures.items():
            runs[name] = partial(laplace, model, SUM, batches, decay, progress=False, **options)
            evidence[name].append(float(log_evidence(runs[name]())) / N)
    return judged(
        {
            "name": "evidence, exact blocks",
            "decays": list(DECAYS),
            "evidence": evidence,
            "chosen": {n: DECAYS[values.index(max(values))] for n, values in evidence.items()},
            "seconds": fastest(runs, args.rounds, args.device),
            "limit": {},
        }
    )


ROWS: dict[str, Callable[[Namespace], dict]] = {
    what: partial(large, what) for what in ("laplace", "influence")
} | {f"evidence, seed {k}": partial(of_digits, k) for k in range(3)}
ROWS["evidence, exact blocks"] = beside_the_exact_block


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, argv, rounds=2)
    result, rows = about(args.device), []
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    for name in chosen(ROWS, args.rows):
        rows.append(ROWS[name](args))
        print({k: v for k, v in rows[-1].items() if k != "bounds"}, flush=True)
        if args.json:
            write(args.json, result | {"rounds": args.rounds, "rows": rows})


if __name__ == "__main__":
    main()
