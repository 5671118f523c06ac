"""The methods of `benchmarks.training`, and where each may look for its settings.

Every method gets the same schedule, a cosine that ends at a horizon of its own choice, after a
linear warm-up. Settings are drawn from quasi-random sequences with fixed seeds.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks.tasks import Task
from kfac_scratch import EXPAND, REDUCE, factored_inverse, kfac
from kfac_scratch.approximations.ekfac import AmortisedEKFAC
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.step_control import graft

Config = dict[str, Any]


@dataclass(frozen=True)
class Log:
    """Log-uniform between two bounds."""

    low: float
    high: float

    def __call__(self, u: float) -> float:
        return float(f"{self.low * (self.high / self.low) ** u:.3g}")

    def where(self, value: float) -> float:
        u = math.log(value / self.low) / math.log(self.high / self.low)
        return min(max(u, 0.0), 1 - 1e-9)  # values are rounded


@dataclass(frozen=True)
class Choice:
    """One of several values, all equally likely."""

    values: tuple

    def __call__(self, u: float) -> Any:
        return self.values[int(u * len(self.values))]

    def where(self, value: Any) -> float:
        value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        return (self.values.index(value) + 0.5) / len(self.values)


Space = Mapping[str, Log | Choice]


@dataclass(frozen=True)
class Method:
    """A search space and an optimizer for a model with settings from it."""

    space: Space
    build: Callable[[Task, nn.Module, Config], Optimizer]
    usual: Config | None = None  # where a sweep of learning rates starts, if there is one


Point = list[float]  # of the unit cube, one coordinate for each axis of a space


def spread(space: Space, count: int, seed: int) -> list[Point]:
    """Points of a scrambled Sobol sequence: they fill the space evenly."""
    engine = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed)
    return engine.draw(count, dtype=torch.float64).clamp(max=1 - 1e-9).tolist()


def sweep(space: Space, usual: Config, count: int) -> list[Point]:
    """Learning rates over their whole range, with the usual settings for all else."""
    rates = (space["lr"]((i + 0.5) / count) for i in range(count))
    return [place(space, usual | {"lr": rate}) for rate in rates]


def neighbour(space: Space, point: Point, random: Random) -> Point:
    """A point nearby: every other coordinate moves, a choice to any of its values."""
    moved = list(point)
    while moved == point:
        for i, axis in enumerate(space.values()):
            if random.random() < 0.5:
                new = random.random() if isinstance(axis, Choice) else random.gauss(point[i], 0.1)
                moved[i] = min(max(new, 0.0), 1 - 1e-9)
    return moved


def place(space: Space, config: Config) -> Point:
    """Where settings are: the inverse of `settings`, up to the middle of each choice."""
    return [axis.where(config[name]) for name, axis in space.items()]


def settings(space: Space, point: Point) -> Config:
    return {name: axis(u) for (name, axis), u in zip(space.items(), point, strict=True)}


SCHEDULE: Space = {"horizon": Log(0.1, 1.0), "warmup": Choice((0.0, 0.1, 0.2))}
ADAM: Space = {
    "lr": Log(1e-3, 1e-1),
    "beta1": Choice((0.8, 0.9, 0.95)),
    "beta2": Choice((0.9, 0.95, 0.99, 0.999)),
    "weight_decay": Choice((0.0, 0.01, 0.1, 1.0)),
}


def sgd(task: Task, model: nn.Module, config: Config) -> Optimizer:
    options = {name: config[name] for name in ("lr", "momentum", "nesterov", "weight_decay")}
    return torch.optim.SGD(model.parameters(), **options)


def adamw(task: Task, model: nn.Module, config: Config) -> Optimizer:
    options = {name: config[name] for name in ("lr", "weight_decay")}
    betas = config["beta1"], config["beta2"]
    return torch.optim.AdamW(model.parameters(), betas=betas, **options)


USUAL: Config = {"horizon": 0.9, "warmup": 0.1}
FIRST_ORDER = {
    "sgd": Method(
        SCHEDULE
        | {
            "lr": Log(3e-3, 10.0),
            "momentum": Choice((0.8, 0.9, 0.95, 0.98)),
            "nesterov": Choice((False, True)),
            "weight_decay": Choice((0.0, 1e-4, 1e-3)),
        },
        sgd,
        USUAL | {"momentum": 0.9, "nesterov": True, "weight_decay": 0.0},
    ),
    "adamw": Method(
        SCHEDULE | ADAM, adamw, USUAL | {"beta1": 0.9, "beta2": 0.95, "weight_decay": 0.0}
    ),
}

# ---- KFAC ---------------------------------------------------------------------------------------

INVERSES = {"exact": exact_inverse, "factored": factored_inverse}
CURVATURE: Space = {
    "damping": Log(1e-6, 1e-2),
    "momentum": Choice((0.0, 0.3, 0.6, 0.8)),
    "decay": Choice((0.8, 0.9, 0.95)),
    "periods": Choice(((1, 1), (5, 5), (5, 10), (10, 10))),  # of factors and inverses
}


def curvature(
    task: Task, model: nn.Module, config: Config, approximation=kfac, flavour=EXPAND
) -> KFAC:
    """KFAC with the length of every layer's step from Adam.

    `lr` means what it means for Adam: with momentum, steps add up to a multiple of it, which is
    divided out. Parameters of norms and positions get AdamW.
    """
    betas, momentum = (config["beta1"], config["beta2"]), config["momentum"]
    adam = {"lr": config["lr"], "betas": betas, "weight_decay": config["weight_decay"]}
    return KFAC(
        *(model, task.loss),
        lr=config["lr"] * (1 - momentum),
        momentum=momentum,
        weight_decay=config["weight_decay"],
        invert=INVERSES[config["inverse"]],
        controls=[graft(betas)],
        rest=lambda params: torch.optim.AdamW(params, **adam),
        approximation=approximation,
        flavour=flavour,
        damping=config["damping"],
        decay=config["decay"],
        factor_every=config["periods"][0],
        inverse_every=config["periods"][1],
    )


def no_curvature(task: Task, model: nn.Module, config: Config) -> KFAC:
    """A control: damping 1000 leaves nothing but the gradient, with the same graft."""
    once = {"damping": 1e3, "decay": 0.95, "periods": (10**9, 10**9)}
    return curvature(task, model, config | once | {"inverse": "factored"})


def amortised_ekfac(task: Task, model: nn.Module, config: Config) -> KFAC:
    """Eigenvalues follow every update of the matrices, bases every so many steps."""
    update, basis = config["periods"]
    own = {"inverse": "exact", "periods": (update, update)}
    return curvature(task, model, config | own, AmortisedEKFAC(basis // update))


ANY_INVERSE: Space = {"inverse": Choice(tuple(INVERSES))}
SECOND_ORDER = {
    "kfac-expand": Method(SCHEDULE | ADAM | CURVATURE | ANY_INVERSE, curvature),
    "kfac-reduce": Method(
        SCHEDULE | ADAM | CURVATURE | ANY_INVERSE, partial(curvature, flavour=REDUCE)
    ),
    "ekfac": Method(SCHEDULE | ADAM | CURVATURE, amortised_ekfac),
}
CONTROL = {
    "no-curvature": Method(SCHEDULE | ADAM | {"momentum": CURVATURE["momentum"]}, no_curvature)
}
METHODS = FIRST_ORDER | SECOND_ORDER | CONTROL
