"""What `benchmarks.step` times: trainings, and the optimizers that take their steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import methods
from benchmarks.loop import batches, take_step
from benchmarks.measure import Run
from benchmarks.nets import mlp
from benchmarks.tasks import TASKS
from kfac_scratch import REDUCE

STEPS = 10  # of one measurement: a multiple of every period
CONFIG: methods.Config = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "nesterov": False,
    "damping": 1e-3,
    "decay": 0.95,
}
DEFAULT, EVERY_5, EVERY_STEP = (10, 10), (5, 10), (1, 1)  # periods of factors and inverses


@dataclass(frozen=True, eq=False)
class Training:
    """A model, its loss, and data to draw batches from."""

    model: Callable[[], nn.Module]
    loss: nn.Module
    X: Tensor
    y: Tensor
    batch: int


def digits(name: str) -> Training:
    """One of the tasks of `benchmarks.training`."""
    task = TASKS[name]()
    return Training(task.model, task.loss, task.X, task.y, task.batch)


def wide_mlp(width: int, N: int, d_in: int = 784) -> Training:
    """Three layers, two of them so wide, with random data."""
    torch.manual_seed(0)
    X, y = torch.randn(N, d_in), torch.randint(10, (N,))
    return Training(lambda: mlp(1, d_in, width)[0], nn.CrossEntropyLoss(), X, y, N)


FULL: dict[str, Callable[[], Training]] = {
    "T1": partial(digits, "T1"),
    "T4": partial(digits, "T4"),
    "mlp 256, N=128": partial(wide_mlp, 256, 128),
    "mlp 512, N=128": partial(wide_mlp, 512, 128),
    "mlp 1024, N=128": partial(wide_mlp, 1024, 128),
    "mlp 1024, N=1024": partial(wide_mlp, 1024, 1024),
}
TINY = dict.fromkeys(FULL, partial(wide_mlp, 8, 16, 12))
Trainings = dict[str, Callable[[], Training]]


def kfac(inverse: str, periods: tuple[int, int], **options: Any) -> Callable[..., Optimizer]:
    config = CONFIG | {"inverse": inverse, "periods": periods}
    return lambda of, model: methods.curvature(of, model, config, **options)


def ekfac(of: Training, model: nn.Module) -> Optimizer:
    return methods.amortised_ekfac(of, model, CONFIG | {"periods": DEFAULT})


OPTIMIZERS: dict[str, Callable[[Training, nn.Module], Optimizer]] = {
    "adamw": lambda of, model: methods.adamw(of, model, CONFIG),
    "sgd": lambda of, model: methods.sgd(of, model, CONFIG),
    "kfac exact": kfac("exact", DEFAULT),
    "kfac factored": kfac("factored", DEFAULT),
    "kfac factored, factors every 5": kfac("factored", EVERY_5),
    "kfac exact, every step": kfac("exact", EVERY_STEP),
    "kfac factored, every step": kfac("factored", EVERY_STEP),
    "kfac reduce, factored": kfac("factored", DEFAULT, flavour=REDUCE),
    "ekfac": ekfac,
}


def steps(of: Training, optimizer: str, device: torch.device) -> Run:
    """So many steps of a training that goes on, with `STEPS` a whole number of all periods."""
    torch.manual_seed(0)
    model = of.model().to(device)
    of = Training(of.model, of.loss, of.X.to(device), of.y.to(device), of.batch)
    built, data = OPTIMIZERS[optimizer](of, model), batches(of, seed=0)

    def run() -> None:
        for _ in range(STEPS):
            take_step(model, of.loss, built, *next(data))

    return run


def prepared(
    training: str, optimizer: str, trainings: Trainings, device: torch.device
) -> tuple[Run, Run]:
    """For a process of its own: tiny steps that warm up, and the steps."""
    tiny, full = (of[training]() for of in (TINY, trainings))
    return steps(tiny, optimizer, device), steps(full, optimizer, device)
