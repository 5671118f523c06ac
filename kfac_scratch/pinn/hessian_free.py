r"""Hessian-free optimization: the damped Gauss-Newton system by truncated conjugate gradients.

The step minimises the same model as that of `GaussNewton`,

$$
m(p) = \tfrac12 \lVert J p + \rho \rVert^2 + \tfrac{\lambda}{2} \lVert p \rVert^2 ,
$$

but no matrix is formed. Conjugate gradients need products with $J$ and $J^\top$ only. They start
from a share of the last step's solution, and stop when the model hardly falls any more. An earlier
iterate is taken if the loss is lower there. The damping follows the success of the model.

Differences from the paper: there is no preconditioner, and the batch of the products with the
Gauss-Newton matrix is that of the gradient.

Source: Martens 2010 (Deep learning via Hessian-free optimization), §4.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, inf

import torch
from torch import Tensor
from torch.nn import Module

from kfac_scratch.matrices.damping import levenberg_marquardt, reduction_ratio
from kfac_scratch.pinn.gramian import (
    Direction,
    assign,
    check_direction,
    flat,
    inner_product,
    kept_on_error,
    moved,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.solvers import backtracked
from kfac_scratch.pinn.steps import PinnState, half_square, loss_along
from kfac_scratch.pinn.terms import Linearization, Term, linearize

SPACING = 1.3  # the ratio of the numbers of two iterates that are kept


@dataclass(frozen=True)
class HessianFree:
    """Martens' Hessian-free optimization: conjugate gradients on the damped Gauss-Newton model.

    Use it where neither weights nor residuals are few enough for the matrix of `GaussNewton`. Not
    where the model is badly conditioned and a preconditioner is at hand: `KFACKrylov` needs fewer
    iterations.

    Cost: for each step one linearisation, up to `iterations` products with `J` and `J^T`, and one
    forward pass for each iterate and length that is tried. Memory: `linearize`'s, and a copy of the
    weights for each iterate that is kept, `log(iterations) / log(1.3)` of them.

    Attributes:
        iterations: The largest number of conjugate gradient iterations in a step.
        damping: The damping of the first step, in the units of the loss.
        start: The share of the last solution at which conjugate gradients start.
        progress: The share by which the model must fall in each iteration, on average over the last
            tenth of them and at least ten. Below it, the iteration stops.
        minimum: The smallest damping.
        chunk: How many points are linearised at once. Default: all.

    Raises:
        ValueError: If there is not at least one iteration.
    """

    iterations: int = 250
    damping: float = 1e-2
    start: float = 0.95
    progress: float = 5e-4
    minimum: float = 1e-14
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"HessianFree needs at least 1 iteration, got {self.iterations}.")

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state, whose `previous` is the last solution."""
        with kept_on_error(model) as W:
            parts, damping = flat(linearize(model, terms, self.chunk)), self.damping
            start = {name: torch.zeros_like(V) for name, V in W.items()}
            if state:
                damping = state.damping
                start = {name: self.start * V for name, V in state.previous.items()}
            solutions = truncated_solutions(parts, damping, start, self.iterations, self.progress)
            check_direction(solutions[-1])

            def along(direction: Direction) -> Callable[[float], float]:
                return loss_along(model, terms, W, direction, self.chunk)

            rho = residuals(parts)
            before = half_square(rho)
            chosen, found = earlier_if_better(solutions, lambda d: along(d)(1.0))
            predicted = half_square(rho + times(parts, chosen)) - before
            ratio = reduction_ratio(before, found, predicted, rho.dtype) if predicted else None
            damping = levenberg_marquardt(damping, ratio, 2 / 3, self.minimum)
            length, after = backtracked(along(chosen), before)
            assign(model, moved(W, chosen, length))
            count = state.count + 1 if state else 1
            return PinnState(count, after, solutions[-1], damping, length or 1.0)


def truncated_solutions(
    parts: Sequence[Linearization],
    damping: float,
    start: Direction,
    iterations: int,
    progress: float,
) -> list[dict[str, Tensor]]:
    """Iterates of conjugate gradients on the damped model, ever fewer of them, and the last one.

    The kept ones are the first that are at least 1, 1.3, 1.3**2, ... . The iteration stops after
    number `i` if the model, relative to its value at 0, fell by less than the share `k * progress`
    in the last `k = max(10, i / 10)` iterations, and where round-off is all that is left of the
    gradient.

    Law: after as many iterations as weights, in exact arithmetic, the last one is the step of
    `GaussNewton`. Cost: a product with `J` and one with `J^T` for each iteration.

    Args:
        parts: The linearised points.
        damping: The damping of the model.
        start: Where the iteration starts.
        iterations: The largest number of iterations.
        progress: The share by which the model must fall in each of them.
    """
    rho = residuals(parts)
    lowest, x, Jx = half_square(rho), dict(start), times(parts, start)
    r = _downhill(parts, Jx + rho, x, damping)
    p, square = r, _square(r)
    values, kept, due = [_model(Jx + rho, x, damping) - lowest], [], 1.0
    smallest = (10 * torch.finfo(rho.dtype).eps) ** 2 * square  # below it, round-off is left
    for i in range(1, iterations + 1):
        Jp = times(parts, p)
        curvature = float(Jp.double().square().sum()) + damping * _square(p)
        if not (square > smallest and curvature > 0):
            break
        step = square / curvature
        x, Jx = moved(x, p, step), Jx + step * Jp
        r, old = moved(r, _downhill(parts, Jp, p, damping), step), square
        square = _square(r)
        p = moved(r, p, square / old)
        values.append(_model(Jx + rho, x, damping) - lowest)
        if i >= due:
            kept.append(x)
            due *= SPACING
        k = max(10, ceil(i / 10))
        if i > k and values[i] < 0 and values[i - k] - values[i] < -k * progress * values[i]:
            break
    return kept if kept and kept[-1] is x else [*kept, x]


def _downhill(
    parts: Sequence[Linearization], left: Tensor, x: Direction, damping: float
) -> dict[str, Tensor]:
    """Minus the gradient of the model, given `J x + rho`."""
    return {n: -V - damping * x[n] for n, V in transposed_times(parts, left).items()}


def _square(x: Direction) -> float:
    """The squared norm, in float64, in which the square of a small number does not underflow."""
    return sum(float(V.double().square().sum()) for V in x.values())


def _model(left: Tensor, x: Direction, damping: float) -> float:
    """The damped model, given `J x + rho`."""
    return half_square(left) + damping / 2 * float(inner_product(x, x))


def earlier_if_better(
    solutions: Sequence[dict[str, Tensor]], loss: Callable[[Direction], float]
) -> tuple[dict[str, Tensor], float]:
    """The last of some iterates, or an earlier one: back as long as the loss falls, and the loss.

    A loss that is not finite is never the lower one.
    """
    best, lowest = solutions[-1], loss(solutions[-1])
    for earlier in reversed(solutions[:-1]):
        found = loss(earlier)
        if not found < lowest and lowest < inf:
            break
        best, lowest = earlier, found
    return best, lowest
