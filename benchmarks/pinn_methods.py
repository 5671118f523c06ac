"""The methods and problems of `benchmarks.pinn_training`, and where each looks for its settings.

Every method has the same number of trials. The first one has the settings of its paper, or the
package's defaults where a paper has none that carry over. All others come from its space. How long
the points are kept is a choice of every method.

What differs from the papers. KFAC's line search goes over powers of two from the last length and
stops when the loss no longer falls; the paper evaluates 31 of them. KFAC* halves a step that does
not lower the loss, and its first step is the best one along the preconditioned gradient. ENGD does
not average its matrix. Hessian-free has no preconditioner.

Gauss-Newton and ENGD solve the same system. Gauss-Newton adapts the damping and takes the step as
it is, or none (Levenberg and Marquardt). ENGD has a constant damping and a line search. SPRING is
ENGD with momentum.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.methods import Choice, Config, Log, Space
from kfac_scratch.pinn.hessian_free import HessianFree
from kfac_scratch.pinn.krylov import KFACKrylov
from kfac_scratch.pinn.preconditioners import TermWise, ekfac_inverse, kfac_inverse
from kfac_scratch.pinn.problems import Problem, dirichlet, heat, mlp, poisson, poisson_cosines
from kfac_scratch.pinn.solvers import dense_solver, kernel_solver
from kfac_scratch.pinn.steps import GaussNewton, KFACStar, PinnKFAC, PinnOptimizer, Spring
from kfac_scratch.pinn.terms import Term, pinn_loss

# ---- problems -----------------------------------------------------------------------------------

SMALL = (
    "KFAC",
    "KFAC*",
    "KFACKrylov",
    "ENGD",
    "Gauss-Newton",
    "Hessian-free",
    "SPRING",
    "Adam",
    "L-BFGS",
)


@dataclass(frozen=True)
class PinnTask:
    """A problem, a network and a number of points; what is compared on it, and for how long."""

    problem: Problem
    sizes: tuple[int, ...]
    inside: int  # points of the equation
    border: int  # and of the condition
    chunk: int | None = None
    compared: tuple[str, ...] = SMALL
    trials: int = 6  # settings of each method
    trial_seconds: float = 6.0  # of processor time, for the steps alone
    finals: int = 3  # fresh seeds
    seconds: float = 60.0

    def terms(self, generator: torch.Generator) -> list[Term]:
        return self.problem.terms(self.inside, self.border, generator)

    @property
    def weights(self) -> int:
        return sum(p.numel() for p in mlp(*self.sizes).parameters())

    @property
    def solver(self) -> Callable:
        """The cheaper of two solvers that give the same step, here with one residual a point."""
        return dense_solver if self.weights < self.inside + self.border else kernel_solver


def squared_norm(d: int) -> Problem:
    """Poisson's equation for `|x|^2` on the unit cube, as in the paper's 100 dimensions."""

    def solution(x: Tensor) -> Tensor:
        return x.square().sum(1, keepdim=True)

    faces = [(i, end) for i in range(d) for end in (0, 1)]
    box = [(0.0, 1.0)] * d
    return Problem(box, solution, lambda u, x: u.lap - 2 * d, dirichlet(solution), faces)


WIDE = (256, 256, 128, 128, 1)
LARGE = ("KFAC", "KFAC*", "KFACKrylov", "Hessian-free", "SPRING", "Adam")
LONGER = {"compared": LARGE, "trials": 3, "trial_seconds": 20.0, "seconds": 120.0}
PINN_TASKS = {
    "poisson-2d": PinnTask(poisson(2), (2, 64, 1), 900, 120),
    "heat": PinnTask(heat(1), (2, 64, 1), 900, 120),
    "poisson-5d": PinnTask(poisson_cosines(5), (5, 64, 1), 3000, 500, chunk=500),
    "poisson-2d-deep": PinnTask(poisson(2), (2, 64, 64, 48, 48, 1), 900, 120),
    "poisson-5d-wide": PinnTask(poisson_cosines(5), (5, *WIDE), 500, 100, **LONGER),
    "poisson-100d": PinnTask(squared_norm(100), (100, 64, 64, 1), 100, 50, **LONGER),
}
MAIN = ("poisson-2d", "heat", "poisson-5d", "poisson-2d-deep")  # the others are run by name only

# ---- first-order methods ------------------------------------------------------------------------


class Followed(NamedTuple):
    """The state of an optimizer of torch between two steps."""

    optimizer: torch.optim.Optimizer
    used: float  # seconds of all steps
    count: int


@dataclass(frozen=True)
class OfTorch:
    """An optimizer of torch behind the interface of the others.

    Its learning rate falls like a cosine over `falls` seconds of processor time, or stays.
    """

    make: Callable[..., torch.optim.Optimizer]
    falls: float = math.inf

    def step(
        self, model: nn.Module, terms: Sequence[Term], state: Followed | None = None
    ) -> Followed:
        start = time.process_time()
        optimizer, used, count = state or (self.make(model.parameters()), 0.0, 0)

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = pinn_loss(model, terms)
            value.backward()
            return value

        factor = (1 + math.cos(math.pi * min(1.0, used / self.falls))) / 2
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]
        optimizer.step(closure)
        used += time.process_time() - start
        return Followed(optimizer, used, iterations(optimizer, count + 1))


def iterations(optimizer: torch.optim.Optimizer, calls: int) -> int:
    """L-BFGS makes up to 20 in each call of `step`; all others one."""
    states = optimizer.state.values()
    return next((s["n_iter"] for s in states if "n_iter" in s), calls)


def adam(task: PinnTask, config: Config, seconds: float) -> OfTorch:
    make = partial(torch.optim.Adam, lr=config["lr"], betas=(config["beta1"], 0.999))
    return OfTorch(make, seconds if config["schedule"] == "cosine" else math.inf)


def lbfgs(task: PinnTask, config: Config, seconds: float) -> OfTorch:
    """Without its tolerances, which would end a run early."""
    never = {"tolerance_grad": 0, "tolerance_change": 0}
    options = {"history_size": config["history"], "line_search_fn": "strong_wolfe"}
    return OfTorch(partial(torch.optim.LBFGS, **options, **never))


# ---- second-order methods -----------------------------------------------------------------------

INVERSES = {"kfac": kfac_inverse, "ekfac": ekfac_inverse}


def kfac(task: PinnTask, config: Config, seconds: float) -> PinnKFAC:
    wise = TermWise(config["decay"])
    return PinnKFAC(config["damping"], config["momentum"], wise, task.chunk)


def kfac_star(task: PinnTask, config: Config, seconds: float) -> KFACStar:
    wise = TermWise(config["decay"])
    return KFACStar(config["damping"], preconditioner=wise, chunk=task.chunk)


def kfac_krylov(task: PinnTask, config: Config, seconds: float) -> KFACKrylov:
    wise = TermWise(config["decay"], INVERSES[config["inverse"]])
    options = {"damping": config["damping"], "preconditioner": wise, "chunk": task.chunk}
    return KFACKrylov(*config["directions"], **options)


def engd(task: PinnTask, config: Config, seconds: float) -> Spring:
    return Spring(config["damping"], 0.0, task.solver, task.chunk)


def spring(task: PinnTask, config: Config, seconds: float) -> Spring:
    return Spring(config["damping"], config["momentum"], task.solver, task.chunk)


def gauss_newton(task: PinnTask, config: Config, seconds: float) -> GaussNewton:
    return GaussNewton(config["damping"], task.solver, config["factor"], chunk=task.chunk)


def hessian_free(task: PinnTask, config: Config, seconds: float) -> HessianFree:
    options = {name: config[name] for name in ("iterations", "damping", "start")}
    return HessianFree(**options, chunk=task.chunk)


# ---- where each looks ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PinnMethod:
    """A search space, the first settings that are tried, and an optimizer with settings from it."""

    space: Space
    first: Config
    build: Callable[[PinnTask, Config, float], PinnOptimizer | OfTorch]
    proof: tuple[str, ...]  # functions that a run must have called, or it was another method


NEVER = 10**9
KEEP: Space = {"keep": Choice((1, 10, 100))}  # steps with the same points
CONSTANT: Space = {"damping": Log(1e-14, 1e-4)}
FACTORS: Space = {"decay": Choice((0.6, 0.9, 0.95, 0.99))}
STEPS, SOLVERS = "kfac_scratch.pinn.steps", "kfac_scratch.pinn.solvers"
KFACS = "kfac_scratch.pinn.preconditioners:kfac_of_parts"
SOLVED = f"{SOLVERS}:_solved"
PINN_METHODS = {
    "KFAC": PinnMethod(
        CONSTANT | FACTORS | KEEP | {"momentum": Choice((0.5, 0.8, 0.9, 0.95))},
        {"damping": 1e-10, "decay": 0.95, "keep": 100, "momentum": 0.9},
        kfac,
        (f"{STEPS}:PinnKFAC.step", KFACS, f"{STEPS}:line_search"),
    ),
    "KFAC*": PinnMethod(
        CONSTANT | FACTORS | KEEP,
        {"damping": 1e-10, "decay": 0.95, "keep": 1},
        kfac_star,
        (f"{STEPS}:KFACStar.step", KFACS, f"{STEPS}:best_combination"),
    ),
    "KFACKrylov": PinnMethod(
        FACTORS
        | KEEP
        | {
            "damping": Log(1e-12, 1e-2),
            "directions": Choice(((1, 8), (5, 4), (10, 1), (20, 1))),  # new ones, and old steps
            "inverse": Choice(tuple(INVERSES)),
        },
        {"decay": 0.95, "keep": 100, "damping": 1e-4, "directions": (20, 1), "inverse": "kfac"},
        kfac_krylov,
        ("kfac_scratch.pinn.krylov:krylov_direction", KFACS),
    ),
    "ENGD": PinnMethod(
        CONSTANT | KEEP,
        {"damping": 1e-8, "keep": 1},
        engd,
        (f"{STEPS}:Spring.step", SOLVED, f"{STEPS}:line_search"),
    ),
    "Gauss-Newton": PinnMethod(
        KEEP | {"damping": Log(1e-8, 1e-1), "factor": Choice((0.5, 0.7, 0.9))},
        {"keep": 100, "damping": 1e-3, "factor": 0.5},
        gauss_newton,
        (f"{STEPS}:GaussNewton.step", SOLVED, f"{STEPS}:levenberg_marquardt"),
    ),
    "Hessian-free": PinnMethod(
        KEEP
        | {
            "damping": Log(1e-6, 1.0),
            "iterations": Choice((50, 100, 250)),
            "start": Choice((0.0, 0.5, 0.95)),
        },
        {"keep": 1, "damping": 1e-2, "iterations": 250, "start": 0.95},
        hessian_free,
        (
            "kfac_scratch.pinn.hessian_free:truncated_solutions",
            "kfac_scratch.pinn.hessian_free:levenberg_marquardt",
        ),
    ),
    "SPRING": PinnMethod(
        CONSTANT | KEEP | {"momentum": Choice((0.5, 0.9, 0.99))},
        {"damping": 1e-8, "keep": 1, "momentum": 0.99},
        spring,
        (f"{STEPS}:Spring.step", SOLVED, f"{STEPS}:times"),  # of the last step: the momentum
    ),
    "Adam": PinnMethod(
        KEEP
        | {
            "lr": Log(1e-3, 1e-1),
            "beta1": Choice((0.8, 0.9, 0.95)),
            "schedule": Choice(("constant", "cosine")),
        },
        {"keep": 1, "lr": 1e-3, "beta1": 0.9, "schedule": "constant"},
        adam,
        ("torch.optim.adam:Adam.step",),
    ),
    "L-BFGS": PinnMethod(
        {"keep": Choice((10, 100, NEVER)), "history": Choice((10, 50, 100, 200))},
        {"keep": NEVER, "history": 100},
        lbfgs,
        ("torch.optim.lbfgs:_strong_wolfe",),
    ),
}
"""By the functions under `proof`, counted during a run, one knows the method.

ENGD and SPRING are the same class. With momentum, a step asks for a product of `J` with the last
step, in `steps:times`; without, it does not.
"""
