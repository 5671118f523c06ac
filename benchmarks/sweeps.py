"""What `benchmarks.growth` runs: one computation for every value of one size."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from benchmarks.measure import Run
from benchmarks.nets import MeanOverPositions
from kfac_scratch import Plans, kfac_over, monte_carlo, type2
from kfac_scratch.capture.forward_pass import stream
from kfac_scratch.data_loader import LoaderOptions

SAMPLED = 3000  # vectors, for the chunks
CHUNKS = (1, 8, 32, 128, 512, SAMPLED)


@dataclass(frozen=True)
class Sizes:
    """Of a network with the same layers at every position, and of its batches."""

    N: int = 64
    S: int = 8
    d: int = 64
    layers: int = 2
    V: int = 1
    batches: int = 1


def network(sizes: Sizes, device: torch.device) -> Run:
    """KFAC of a network with the same layers at every position, by sampled vectors."""
    torch.manual_seed(0)
    hidden = ([nn.Linear(sizes.d, sizes.d), nn.Tanh()] for _ in range(sizes.layers))
    model = nn.Sequential(*chain(*hidden), MeanOverPositions(), nn.Linear(sizes.d, 10)).to(device)
    X = torch.randn(sizes.N, sizes.S, sizes.d, device=device)
    data = [(X, torch.randint(10, (sizes.N,), device=device))] * sizes.batches
    options: LoaderOptions = {"progress": False, "plan": Plans()}
    return lambda: kfac_over(model, nn.CrossEntropyLoss(), data, monte_carlo(sizes.V), **options)


def streamed_samples(V: int, device: torch.device, chunk: int | None = 1) -> Run:
    """So many sampled vectors, sent back one at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 10)).to(device)
    X, y = torch.randn(64, 8, device=device), torch.randint(10, (64,), device=device)

    def run() -> None:
        for _ in stream(model, nn.CrossEntropyLoss(), X, y, monte_carlo(V), chunk=chunk):
            pass

    return run


def streamed_positions(S: int, device: torch.device) -> Run:
    """The exact vectors of a loss at every position, as many as positions times classes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 50), LastAxisSecond()).to(device)
    X, y = torch.randn(2, S, 8, device=device), torch.randint(50, (2, S), device=device)

    def run() -> None:
        for _ in stream(model, nn.CrossEntropyLoss(), X, y, type2, chunk=1):
            pass

    return run


class LastAxisSecond(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def words(vocabulary: int, device: torch.device) -> Run:
    """KFAC of a classifier of sentences and its damped inverse."""
    torch.manual_seed(0)
    layers = [nn.Embedding(vocabulary, 16), MeanOverPositions(), nn.Linear(16, 4)]
    model = nn.Sequential(*layers).to(device)
    X = torch.randint(vocabulary, (32, 16), device=device)
    data = [(X, torch.randint(4, (32,), device=device))]

    def run() -> None:
        found = kfac_over(model, nn.CrossEntropyLoss(), data, monte_carlo(1), progress=False)
        for M in found.values():
            M.inverse(1e-3)

    return run


@dataclass(frozen=True)
class Sweep:
    """A computation at growing values of one size, and the powers that it may grow with.

    Attributes:
        run: From a value and a device to the computation.
        values: The sizes.
        time: The power of its time; None if time is not measured.
        memory: The power of its peak memory.
    """

    run: Callable[[int, torch.device], Run]
    values: tuple[int, ...]
    time: float | None
    memory: float


def along(name: str, values: tuple[int, ...], time: float, memory: float) -> Sweep:
    """The network at values of one of its sizes."""
    sizes = Sizes(d=256) if name in ("N", "S") else Sizes()
    return Sweep(lambda x, device: network(_at(sizes, name, x), device), values, time, memory)


def _at(sizes: Sizes, name: str, value: int) -> Sizes:
    return Sizes(**(vars(sizes) | {name: value}))


SWEEPS = {
    "N": along("N", (64, 128, 256, 512, 1024), 1, 1),
    "S": along("S", (8, 16, 32, 64, 128), 1, 1),
    "d": along("d", (128, 256, 512, 1024), 2, 2),
    "layers": along("layers", (4, 8, 16, 32, 64), 1, 1),
    "V": along("V", (16, 32, 64, 128, 256), 1, 0),
    "batches": along("batches", (8, 16, 32, 64, 128), 1, 0),
    "V, chunk=1": Sweep(streamed_samples, (800, 1600, 3200, 6400, 12800), 1, 0),
    "S of a loss per position, chunk=1": Sweep(streamed_positions, (16, 32, 64, 128), 2, 1),
    "vocabulary": Sweep(words, (500, 2000, 10_000, 50_000), None, 1),
}


def prepared(name: str, value: int, device: torch.device) -> tuple[Run, Run]:
    """For a process of its own: the smallest value, far below the sweep's, and the value."""
    sweep = SWEEPS[name]
    return sweep.run(2, device), sweep.run(value, device)
