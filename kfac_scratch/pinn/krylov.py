r"""KFAC* in a larger space: more new directions, and more steps remembered.

KFAC* minimises the exact Gauss-Newton model

$$
m(p) = \tfrac12 \lVert J p + \rho \rVert^2 + \tfrac{\lambda}{2} \lVert p \rVert^2
$$

over two directions, $P^{-1} \nabla L$ and the last step. The first is what one iteration of
conjugate gradients gives, with KFAC's $P$ as the preconditioner. Here are $k$ iterations, whose
result is the minimum over the Krylov space

$$
\operatorname{span} \bigl\{ (P^{-1} (J^\top J + \lambda I))^i P^{-1} \nabla L : i < k \bigr\} ,
$$

and then the best combination of it with the last $m$ steps. Products with $J$ are cheap beside a
pass through the graph, so a step with $k = 20$ takes about three times as long as one of KFAC*.
With $k \to \infty$ it is the step of Gauss-Newton; KFAC determines how fast it is approached.

Source: Martens 2010 (Deep learning via Hessian-free optimization) for conjugate gradients;
Martens and Grosse 2015 (arXiv:1503.05671), §7, for the combination.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import check_instance
from kfac_scratch.linalg import conjugate_gradient
from kfac_scratch.matrices.damping import levenberg_marquardt, reduction_ratio
from kfac_scratch.matrices.matrix import LinearMap
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
from kfac_scratch.pinn.solvers import best_combination, line_search, linear_combination
from kfac_scratch.pinn.steps import PinnState, half_square, loss_along
from kfac_scratch.pinn.terms import Linearization, Term, linearize


@dataclass(frozen=True)
class KFACKrylov:
    """KFAC* over a Krylov space: the best step among `iterations` new directions and `memory` old.

    Use it where `KFACStar` makes too little progress for each linearisation. Not for networks or
    batches so small that `GaussNewton` solves the system directly.

    Cost: for each step one linearisation, `iterations` products with `J`, `J^T` and the
    preconditioner, and some forward passes of the line search. Memory: `linearize`'s, and `memory`
    copies of the weights.

    It has many parameters, because it has two systems, each with a damping, and remembers steps.

    Attributes:
        iterations: The number `k` of conjugate gradient iterations.
        memory: The number `m` of last steps that are kept.
        damping: The damping of the model at the first step, in the units of the loss. Each step
            adapts it to the model's success, so that its start matters less than the constant
            damping of `PinnKFAC`.
        minimum: The lower bound of the damping of the model.
        floor: The lower bound of the damping of the preconditioner. Above it, the preconditioner
            has the damping of the model. A preconditioner that is inverted by Cholesky
            factorisations needs more damping than the model does.
        preconditioner: The preconditioner.
        chunk: How many points are linearised at once. Default: all.

    Raises:
        ValueError: If there is not at least one iteration, or `memory` is negative.
    """

    iterations: int = 20
    memory: int = 1
    damping: float = 1e-4
    minimum: float = 1e-14
    floor: float = 1e-10
    preconditioner: PinnPreconditioner = field(default_factory=TermWise)
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_instance("preconditioner", self.preconditioner, PinnPreconditioner, "TermWise()")
        if self.iterations < 1 or self.memory < 0:
            raise ValueError(
                "KFACKrylov needs iterations of at least 1 and memory of at least 0, got "
                f"iterations={self.iterations}, memory={self.memory}."
            )

    def step(
        self, model: Module, terms: Sequence[Term], state: PinnState | None = None
    ) -> PinnState:
        """Move the weights, and return the next state, whose `previous` stacks the last steps."""
        with kept_on_error(model) as W:
            count = state.count + 1 if state else 1
            damping = state.damping if state else self.damping
            lin = linearize(model, terms, self.chunk)
            parts = flat(lin)
            remembered, rho = state.preconditioner if state else None, residuals(parts)
            added = max(damping, self.floor)
            preconditioner, P = self.preconditioner.update(remembered, lin, added, count)
            last = unstacked(state.previous) if state else []
            directions = [krylov_direction(parts, P, damping, self.iterations), *last]
            best = linear_combination(directions, best_combination(parts, directions, damping))
            check_direction(best)
            at, before = loss_along(model, terms, W, best, self.chunk), half_square(rho)
            length, after = line_search(at, before, state.length if state else 1.0)
            taken = {name: length * V for name, V in best.items()}
            assign(model, moved(W, taken))
            predicted = half_square(rho + times(parts, taken)) - before
            ratio = reduction_ratio(before, after, predicted, rho.dtype) if predicted else None
            damping = levenberg_marquardt(damping, ratio, 0.5, self.minimum)
            kept = stacked([taken, *last][: self.memory])
            return PinnState(count, after, kept, damping, length or 1.0, preconditioner)


def krylov_direction(
    parts: Sequence[Linearization], P: Mapping[str, LinearMap], damping: float, iterations: int
) -> dict[str, Tensor]:
    """The minimum of the damped model over the Krylov space, by conjugate gradients.

    Args:
        parts: The linearised points.
        P: The inverse of the preconditioner of every layer.
        damping: The damping of the model.
        iterations: The dimension of the space.
    """
    gradient = transposed_times(parts, residuals(parts))

    def curvature(v: Tensor) -> Tensor:
        product = transposed_times(parts, times(parts, _like(gradient, v)))
        return _vector(product) + damping * v

    def precondition(v: Tensor) -> Tensor:
        return _vector({name: P[name] @ V for name, V in _like(gradient, v).items()})

    return _like(
        gradient, conjugate_gradient(curvature, -_vector(gradient), precondition, iterations)
    )


def stacked(steps: Sequence[Direction]) -> dict[str, Tensor]:
    """Several directions as one, stacked along a new first axis."""
    return {name: torch.stack([d[name] for d in steps]) for name in (steps[0] if steps else ())}


def unstacked(steps: Direction) -> list[dict[str, Tensor]]:
    """The directions that `stacked` joined."""
    number = len(next(iter(steps.values()))) if steps else 0
    return [{name: V[i] for name, V in steps.items()} for i in range(number)]


def _vector(direction: Direction) -> Float[Tensor, "1 D"]:
    return torch.cat([V.flatten() for V in direction.values()]).unsqueeze(0)


def _like(direction: Direction, v: Float[Tensor, "1 D"]) -> dict[str, Tensor]:
    pieces = v.squeeze(0).split([V.numel() for V in direction.values()])
    pairs = zip(direction.items(), pieces, strict=True)
    return {name: piece.view_as(V) for (name, V), piece in pairs}
