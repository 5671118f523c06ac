"""The usual methods of `benchmarks.training`, and where each may look for its settings.

Every method gets the same schedule, a cosine that ends at a horizon of its own choice, after a
linear warm-up. Settings are drawn from quasi-random sequences with fixed seeds. All methods with
curvature are one optimizer: they share every axis, and the length of each layer's step is Adam's.
What papers add is in `benchmarks.papers`, and optimizers that only see gradients are in
`benchmarks.relatives`.
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

from benchmarks.averaging import AVERAGES, of_mean
from benchmarks.tasks import Task
from kfac_scratch import REDUCE, factored_inverse, kfac
from kfac_scratch.approximations.ekfac import AmortisedEKFAC
from kfac_scratch.approximations.estimators import Estimator, MovingAverage
from kfac_scratch.matrices.damping import relative_factored_inverse
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
    proof: tuple[str, ...] = ()  # functions that a run must have called, or it was another method


Point = list[float]  # of the unit cube, one coordinate for each axis of a space


def spread(space: Space, count: int, seed: int) -> list[Point]:
    """Points of a scrambled Sobol sequence: they fill the space evenly."""
    engine = torch.quasirandom.SobolEngine(len(space), scramble=True, seed=seed)
    return engine.draw(count, dtype=torch.float64).clamp(max=1 - 1e-9).tolist()


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
        ("torch.optim.sgd:sgd",),
    ),
    "adamw": Method(SCHEDULE | ADAM, adamw, ("torch.optim.adamw:AdamW.step",)),
}

# ---- KFAC ---------------------------------------------------------------------------------------

INVERSES = {"exact": exact_inverse, "factored": factored_inverse}
CURVATURE: Space = {
    "damping": Log(1e-6, 1e-2),
    "momentum": Choice((0.0, 0.3, 0.6, 0.8)),
    "decay": Choice((0.8, 0.9, 0.95)),
    "periods": Choice(((1, 1), (5, 5), (5, 10), (10, 10))),  # of factors and inverses
}


LENGTHS = ("layer", "network")  # whose norm is that of Adam's step
SHARED: Space = SCHEDULE | ADAM | CURVATURE
DAMPINGS = INVERSES | {"relative": lambda M, damping: relative_factored_inverse(M, damping**0.5)}
INVERSE: Space = {"inverse": Choice(tuple(INVERSES))}
RELATIVE: Space = {"inverse": Choice(tuple(DAMPINGS))}
AVERAGE: Space = {"average": Choice(tuple(AVERAGES))}
LENGTH: Space = {"length": Choice(LENGTHS)}


def curvature(
    task: Task, model: nn.Module, config: Config, approximation=kfac, **options: Any
) -> KFAC:
    """KFAC with the length of every layer's step from Adam.

    `lr` means what it means for Adam: with momentum, steps add up to a multiple of it, which is
    divided out. Parameters of norms and positions get AdamW.

    Args:
        task: What is trained.
        model: The network.
        config: Settings; `average` and `inverse` are moving and exact if they are missing.
        approximation: From a `LayerIO` to a matrix, which is averaged as the settings say, or an
            `Estimator`, which has its own average.
        options: Further arguments of `KFAC`. `controls` act before the length is Adam's.
    """
    betas, momentum = (config["beta1"], config["beta2"]), config["momentum"]
    adam = {"lr": config["lr"], "betas": betas, "weight_decay": config["weight_decay"]}
    length = graft(betas, per=config.get("length", "layer"))
    controls = (*options.pop("controls", ()), length)
    invert = options.pop("invert", DAMPINGS[config.get("inverse", "exact")])
    if not isinstance(approximation, Estimator):
        approximation = AVERAGES[config.get("average", "moving")](approximation)
    return KFAC(
        *(model, task.loss),
        lr=config["lr"] * (1 - momentum),
        momentum=momentum,
        weight_decay=config["weight_decay"],
        controls=controls,
        rest=lambda params: torch.optim.AdamW(params, **adam),
        approximation=approximation,
        damping=config["damping"],
        decay=config["decay"],
        factor_every=config["periods"][0],
        inverse_every=config["periods"][1],
        invert=of_mean(invert),
        **options,
    )


def no_curvature(task: Task, model: nn.Module, config: Config) -> KFAC:
    """A control: damping 1000 leaves nothing but the gradient, with the same graft."""
    once = {"damping": 1e3, "decay": 0.95, "periods": (10**9, 10**9)}
    return curvature(task, model, config | once | {"inverse": "factored"})


def amortised_ekfac(
    task: Task, model: nn.Module, config: Config, basis: Estimator | None = None, **options: Any
) -> KFAC:
    """Eigenvalues follow every update of the matrices, bases every so many steps."""
    update, every = config["periods"]
    own = {"inverse": "exact", "periods": (update, update)}
    found = AmortisedEKFAC(every // update, basis or MovingAverage(kfac))
    return curvature(task, model, config | own, found, **options)


KFACS = "kfac_scratch.approximations.kfac"
REDUCING = "kfac_scratch.capture.flavours:_mean"
MOMENTS = "kfac_scratch.approximations.ekfac:second_moments"
SECOND_ORDER = {
    "kfac-expand": Method(SHARED | INVERSE | AVERAGE, curvature, (f"{KFACS}:one_product",)),
    "kfac-reduce": Method(
        SHARED | INVERSE | AVERAGE, partial(curvature, flavour=REDUCE), (REDUCING,)
    ),
    "ekfac": Method(SHARED, amortised_ekfac, (MOMENTS,)),
}
CONTROL = {
    "no-curvature": Method(
        SCHEDULE | ADAM | {"momentum": CURVATURE["momentum"]},
        no_curvature,
        ("kfac_scratch.optimizer.optimizer:KFAC.step",),
    )
}


def fixed(average: str, inverse: str) -> Method:
    """A control: KFAC with one average and one damping, which are then no choices."""

    def build(task: Task, model: nn.Module, config: Config) -> KFAC:
        return curvature(task, model, config | {"average": average, "inverse": inverse})

    return Method(SHARED, build, (f"{KFACS}:one_product",))


KFAC_UNDER_ALL = {
    f"kfac, {average}, {inverse}": fixed(average, inverse)
    for average in AVERAGES
    for inverse in INVERSES
}
MORE_OF_KFAC = {
    "kfac, two lengths": Method(
        SHARED | INVERSE | AVERAGE | LENGTH, curvature, (f"{KFACS}:one_product",)
    ),
    "kfac, three dampings": Method(
        SHARED | RELATIVE | AVERAGE, curvature, (f"{KFACS}:one_product",)
    ),
}
USUAL_METHODS = FIRST_ORDER | SECOND_ORDER | CONTROL
