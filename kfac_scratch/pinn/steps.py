r"""Optimizers for PINNs: from linearised residuals to the next weights.

`PinnKFAC` follows a preconditioned gradient with momentum and a line search. `KFACStar` takes the
combination of the preconditioned gradient $\Delta$ and the last step $\delta$ that minimises the
exact Gauss-Newton model: two unknowns, whose equations need $J \Delta$ and $J \delta$ only.
`GaussNewton` and `Spring` use the exact matrix, as a whole, per layer, or as a kernel.

A step is a function from a state to a state; its one effect is to move the model's weights. A state
is a plain value, which `torch.save` writes; a run resumes from it bit by bit.

Every damping has the units of the loss. The defaults differ because the systems do: the constant
1e-10 of `PinnKFAC` and `KFACStar` only keeps factors invertible, since a line search or the exact
model chooses the length; 1e-8 in `Spring` does so for the kernel; `GaussNewton` and `KFACKrylov`
adapt theirs, and start higher.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §7; Dangel, Müller and Zeinhofer 2024
(arXiv:2405.15603), §3.3; Müller and Zeinhofer 2023 (arXiv:2302.13163); Goldshlager, Abrahamsen and
Lin 2024 (arXiv:2401.10190) for Spring; Guzmán-Cordero et al. 2025 (arXiv:2505.12149).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import check_callable, check_instance
from kfac_scratch.matrices.damping import levenberg_marquardt, reduction_ratio
from kfac_scratch.pinn.gramian import (
    Direction,
    assign,
    check_direction,
    flat,
    kept_on_error,
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
    """The state of an optimizer between two steps.

    It has many parameters, because one kind of state serves all optimizers here.

    Attributes:
        count: The number of steps so far.
        loss: The loss of the last batch, after the step.
        previous: The last step; of `PinnKFAC` and `Spring`, the last direction with momentum.
        damping: The damping of the next step.
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


@runtime_checkable
class PinnOptimizer(Protocol):
    """An optimizer for PINNs: from a state to the next one, with the model's weights moved.

    Use it as the type of what trains a PINN. Not for `torch.optim`, whose optimizers see gradients
    only, where these see the residuals and their derivatives.
    """

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state; None starts a run."""
        ...


@dataclass(frozen=True)
class PinnKFAC:
    """KFAC for PINNs: momentum on preconditioned gradients, and a line search along the result.

    Use it as the baseline of its paper. Not as the first choice: `KFACStar` finds momentum and
    length from the model, for little more.

    Cost: for each step one linearisation, the preconditioner, and some forward passes of the line
    search.

    Attributes:
        damping: The damping of the preconditioner, constant, in the units of the loss.
        momentum: The factor of the previous direction.
        preconditioner: From linearised terms to inverses. Default: `TermWise()`.
        chunk: How many points are linearised at once. Default: all.
    """

    damping: float = 1e-10
    momentum: float = 0.9
    preconditioner: PinnPreconditioner = field(default_factory=TermWise)
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_instance("preconditioner", self.preconditioner, PinnPreconditioner, "TermWise()")

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state; `state` is None before the first step."""
        with kept_on_error(model) as W:
            count = state.count + 1 if state else 1
            direction, rho, _, preconditioner = _preconditioned(self, model, terms, state)
            if state:
                direction = moved(direction, state.previous, self.momentum)
            check_direction(direction)
            at, before = loss_along(model, terms, W, direction, self.chunk), half_square(rho)
            length, after = line_search(at, before, state.length if state else 1.0)
            assign(model, moved(W, direction, length))
            return PinnState(count, after, direction, self.damping, length or 1.0, preconditioner)


@dataclass(frozen=True)
class KFACStar:
    """KFAC*: the step that minimises the exact Gauss-Newton model over a few directions.

    Its length is halved until the loss falls. Use it as the first choice for PINNs of a size for
    which `GaussNewton` is too expensive. Not for a single linear layer, where the exact step costs
    no more.

    Cost: that of `PinnKFAC`, and one product with `J` for each direction.

    Attributes:
        damping: The damping of the preconditioner and of the model, constant.
        candidates: From the preconditioned gradient and the last step to the directions that are
            combined: `two_directions`, or `two_directions_per_layer`.
        preconditioner: From linearised terms to inverses. Default: `TermWise()`.
        chunk: How many points are linearised at once. Default: all.
    """

    damping: float = 1e-10
    candidates: Callable[[Direction, Direction | None], list[Direction]] = two_directions
    preconditioner: PinnPreconditioner = field(default_factory=TermWise)
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_instance("preconditioner", self.preconditioner, PinnPreconditioner, "TermWise()")
        check_callable("candidates", self.candidates, "candidates=two_directions")

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state; `state` is None before the first step."""
        with kept_on_error(model) as W:
            count = state.count + 1 if state else 1
            newest, rho, parts, preconditioner = _preconditioned(self, model, terms, state)
            directions = self.candidates(newest, state.previous if state else None)
            best = linear_combination(directions, best_combination(parts, directions, self.damping))
            check_direction(best)
            at = loss_along(model, terms, W, best, self.chunk)
            length, after = backtracked(at, half_square(rho))
            assign(model, moved(W, best, length))
            step = {name: length * V for name, V in best.items()}
            return PinnState(count, after, step, self.damping, length or 1.0, preconditioner)


@dataclass(frozen=True)
class GaussNewton:
    """Levenberg-Marquardt: the exact matrix, with a damping that is adapted in every step.

    A step that does not lower the loss is not taken. It is computed again with more damping, from
    the same linearisation.

    Use it for networks with a few thousand weights, or batches with a few thousand residuals. Not
    for larger ones, or noisy batches, on which a small damping overfits.

    Cost: for each step one linearisation and the solver's matrix, and for each damping that is
    tried one factorisation and one forward pass.

    Attributes:
        damping: The damping of the first step, in the units of the loss.
        solver: `dense_solver`, `kernel_solver` (the same step), or `layerwise_solver` (another).
        factor: A success multiplies the damping by it, a failure divides. 1/2 rather than
            `levenberg_marquardt`'s default, because every step adapts.
        minimum: The smallest damping. A system that has no factorisation with it is solved with
            more, which `PinnState.solved_with` tells.
        tries: The largest number of dampings that one step tries. If none lowers the loss, the
            weights stay as they are.
        chunk: How many points are linearised at once. Default: all.
    """

    damping: float = 1e-3
    solver: Solver = dense_solver
    factor: float = 0.5
    minimum: float = 1e-14
    tries: int = 10
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_callable("solver", self.solver, "solver=kernel_solver")

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state; `state` is None before the first step."""
        with kept_on_error(model) as W:
            parts = flat(linearize(model, terms, self.chunk))
            rho, damping = residuals(parts), state.damping if state else self.damping
            before, solve = half_square(rho), self.solver(parts, rho)
            after, step = before, {name: torch.zeros_like(V) for name, V in W.items()}
            used: float | None = None
            for _ in range(self.tries):
                proposed, used = solve(damping)
                found = loss_along(model, terms, W, proposed, self.chunk)(1.0)
                predicted = half_square(rho + times(parts, proposed)) - before
                ratio = reduction_ratio(before, found, predicted, rho.dtype) if predicted else None
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
    """SPRING and ENGD: the exact matrix with constant damping, momentum and a line search.

    The direction minimises `|J p + rho|^2 + damping |p - momentum * previous|^2`. With the kernel
    and momentum, it is SPRING; without momentum, ENGD with any of the solvers.

    Use it for batches with a few thousand residuals, in networks of any size. Not where the
    damping must change during training: `GaussNewton` adapts it.

    Cost: for each step one linearisation, the solver's matrix and one factorisation, and some
    forward passes of the line search.

    Attributes:
        damping: The damping, constant, in the units of the loss. `PinnState.solved_with` tells if a
            system needed more.
        momentum: The factor of the previous direction. The default 0 is ENGD; SPRING takes a value
            near 1. (The default of `PinnKFAC` and `KFAC` is 0.9.)
        solver: `kernel_solver`, `dense_solver` (the same step), or `layerwise_solver` (another).
        chunk: How many points are linearised at once. Default: all.
    """

    damping: float = 1e-8
    momentum: float = 0.0
    solver: Solver = kernel_solver
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_callable("solver", self.solver, "solver=kernel_solver")

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state; `state` is None before the first step."""
        with kept_on_error(model) as W:
            parts = flat(linearize(model, terms, self.chunk))
            rho = residuals(parts)
            old = state.previous if state and self.momentum else {}
            kept = {name: self.momentum * V for name, V in old.items()}
            solve = self.solver(parts, rho + times(parts, kept) if kept else rho)
            change, used = solve(self.damping)
            direction = moved(change, kept)
            check_direction(direction)
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
    """The loss as a function of the length of a step from the weights `W`.

    Every call writes `W + length * direction` into the model and leaves it there. The caller
    assigns the weights that are to stay.

    Raises:
        ValueError: If the direction is not finite.
    """

    def at(length: float) -> float:
        assign(model, moved(W, direction, length))
        with torch.no_grad():
            return float(pinn_loss(model, terms, chunk))

    return at
