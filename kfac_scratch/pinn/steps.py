r"""Optimizers for PINNs: how to get from linearised residuals to the next weights.

`PinnKFAC` follows a preconditioned gradient with momentum and a line search. `KFACStar` asks the
exact Gauss-Newton model for the best combination of the preconditioned gradient $\Delta$ and the
last step $\delta$: two unknowns, whose equations need $J \Delta$ and $J \delta$ only.
`GaussNewton` and `Spring` use the exact matrix, as a whole, per layer, or as a kernel.

A step is a function from a state to a state; that it moves the model's weights is its effect.
A state is a plain value, which `torch.save` writes; a run resumes from it bit by bit.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §7; Dangel, Müller and Zeinhofer 2024
(arXiv:2405.15603), §3.3; Müller and Zeinhofer 2023 (arXiv:2302.13163); Goldshlager, Abrahamsen and
Lin 2024 (arXiv:2401.10190) for Spring; Guzmán-Cordero et al. 2025 (arXiv:2505.12149).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from kfac_scratch.matrices.damping import levenberg_marquardt, reduction_ratio
from kfac_scratch.pinn.jacobian import (
    Direction,
    assign,
    block_weights,
    flat,
    moved,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.preconditioners import PinnPreconditioner, TermWise
from kfac_scratch.pinn.solvers import (
    Solver,
    backtracked,
    best_combination,
    dense_solver,
    kernel_solver,
    line_search,
    linear_combination,
    two_directions,
)
from kfac_scratch.pinn.terms import Term, linearize, pinn_loss


@dataclass(frozen=True, eq=False)
class PinnState:
    """What an optimizer remembers between two steps.

    Attributes:
        count: Steps so far.
        loss: Of the last batch, after the step.
        previous: The last step, or with momentum the direction that is accumulated.
        damping: As adapted so far.
        length: The factor that the last line search gave its direction; 1 if that was 0.
        preconditioner: The state of the preconditioner.
        solved_with: The damping with which the last step's system was solved, None if there was no
            such system. It is larger than the one that was asked for if that was too small for a
            Cholesky factorisation (`solvers.Solved`).
    """

    count: int
    loss: float
    previous: dict[str, Tensor]
    damping: float
    length: float = 1.0
    preconditioner: Any = None
    solved_with: float | None = None


@dataclass(frozen=True)
class PinnKFAC:
    """Momentum on preconditioned gradients, and a line search along the result."""

    damping: float = 1e-10
    momentum: float = 0.9
    preconditioner: PinnPreconditioner = field(default_factory=TermWise)
    chunk: int | None = None

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state."""
        W, count = block_weights(model), state.count + 1 if state else 1
        direction, rho, _, preconditioner = _preconditioned(self, model, terms, state)
        if state:
            direction = moved(direction, state.previous, self.momentum)
        at, before = loss_along(model, terms, W, direction, self.chunk), half_square(rho)
        length, after = line_search(at, before, state.length if state else 1.0)
        assign(model, moved(W, direction, length))
        return PinnState(count, after, direction, self.damping, length or 1.0, preconditioner)


@dataclass(frozen=True)
class KFACStar:
    """The best combination of directions in the exact Gauss-Newton model, safeguarded.

    Attributes:
        damping: Of the factors, and of the quadratic model.
        candidates: From the preconditioned gradient and the last step to the directions that are
            combined: `two_directions`, or `per_layer`.
        preconditioner: How gradients are preconditioned.
        chunk: How many data are linearised at once.
    """

    damping: float = 1e-10
    candidates: Callable[[Direction, Direction | None], list[Direction]] = two_directions
    preconditioner: PinnPreconditioner = field(default_factory=TermWise)
    chunk: int | None = None

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state."""
        W, count = block_weights(model), state.count + 1 if state else 1
        newest, rho, parts, preconditioner = _preconditioned(self, model, terms, state)
        directions = self.candidates(newest, state.previous if state else None)
        best = linear_combination(directions, best_combination(parts, directions, self.damping))
        at = loss_along(model, terms, W, best, self.chunk)
        length, after = backtracked(at, half_square(rho))
        assign(model, moved(W, best, length))
        step = {name: length * V for name, V in best.items()}
        return PinnState(count, after, step, self.damping, length or 1.0, preconditioner)


@dataclass(frozen=True)
class GaussNewton:
    """Levenberg-Marquardt: the exact matrix, with a damping that follows the model's success.

    A step that does not lower the loss is not taken, but tried again with more damping; the
    linearisation is still valid then.

    Attributes:
        damping: At the first step.
        solver: `dense_solver`, `kernel_solver` (the same step), or `layerwise`.
        factor: What a success multiplies the damping by; a failure divides.
        minimum: The smallest damping.
        tries: How many dampings one step may try.
        chunk: How many data are linearised at once.
    """

    damping: float = 1e-3
    solver: Solver = dense_solver
    factor: float = 0.5
    minimum: float = 1e-14
    tries: int = 10
    chunk: int | None = None

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state."""
        W, parts = block_weights(model), flat(linearize(model, terms, self.chunk))
        rho, damping = residuals(parts), state.damping if state else self.damping
        before, solve = half_square(rho), self.solver(parts, rho)
        after, step = before, {name: torch.zeros_like(V) for name, V in W.items()}
        used: float | None = None
        for _ in range(self.tries):
            proposed, used = solve(damping)
            found = loss_along(model, terms, W, proposed, self.chunk)(1.0)
            predicted = half_square(rho + times(parts, proposed)) - before
            ratio = reduction_ratio(before, found, predicted) if predicted else None
            damping = levenberg_marquardt(damping, ratio, self.factor, self.minimum)
            if found < before:
                after, step = found, proposed
            if found < before or ratio is None:
                break
        assign(model, moved(W, step))
        count = state.count + 1 if state else 1
        return PinnState(count, after, step, damping, solved_with=used)


@dataclass(frozen=True)
class Spring:
    """The exact matrix with constant damping, momentum and a line search.

    The direction minimises `|J p + rho|^2 + damping |p - momentum * previous|^2`. With a kernel,
    this is SPRING; without momentum, ENGD, in each of its forms.
    """

    damping: float = 1e-8
    momentum: float = 0.0
    solver: Solver = kernel_solver
    chunk: int | None = None

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state."""
        W, parts = block_weights(model), flat(linearize(model, terms, self.chunk))
        rho = residuals(parts)
        kept = {n: self.momentum * V for n, V in state.previous.items()} if state else {}
        solve = self.solver(parts, rho + times(parts, kept) if kept else rho)
        change, used = solve(self.damping)
        direction = moved(change, kept)
        at = loss_along(model, terms, W, direction, self.chunk)
        length, after = line_search(at, half_square(rho), state.length if state else 1.0)
        assign(model, moved(W, direction, length))
        count = state.count + 1 if state else 1
        return PinnState(count, after, direction, self.damping, length or 1.0, solved_with=used)


def half_square(rho: Tensor) -> float:
    """The loss, given all scaled residuals."""
    return float(rho.square().sum()) / 2


def _preconditioned(
    method: PinnKFAC | KFACStar, model: Module, terms: Sequence[Term], state: PinnState | None
) -> tuple[dict[str, Tensor], Tensor, Any, Any]:
    """Minus the preconditioned gradient, the residuals, all parts, the preconditioner's state."""
    lin = linearize(model, terms, method.chunk)
    parts, count = flat(lin), state.count + 1 if state else 1
    rho = residuals(parts)
    remembered = state.preconditioner if state else None
    preconditioner, inverses = method.preconditioner.update(remembered, lin, method.damping, count)
    gradient = transposed_times(parts, rho)
    return {name: -(M @ gradient[name]) for name, M in inverses.items()}, rho, parts, preconditioner


def loss_along(
    model: Module,
    terms: Sequence[Term],
    W: Direction,
    direction: Direction,
    chunk: int | None,
) -> Callable[[float], float]:
    """The loss as a function of the length of a step. It leaves the model wherever it was asked."""

    def at(length: float) -> float:
        assign(model, moved(W, direction, length))
        with torch.no_grad():
            return float(pinn_loss(model, terms, chunk))

    return at
