r"""The small and large linear systems behind a PINN's step, and how far to go.

With residuals $\rho$ and their Jacobian $J$, the damped Gauss-Newton step is

$$
p = -(J^\top J + \lambda I)^{-1} J^\top \rho = -J^\top (J J^\top + \lambda I)^{-1} \rho ,
$$

a system with as many unknowns as weights (`dense_solver`), or as residuals (`kernel_solver`, by
Woodbury's identity). `layerwise_solver` solves one system for each layer, which is another step.
In the span of a few directions, the system is as small as their number.

Sources: Müller and Zeinhofer 2023 (arXiv:2302.13163); Guzmán-Cordero et al. 2025
(arXiv:2505.12149); Martens and Grosse 2015 (arXiv:1503.05671), §6.4 and §7.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import eye_like
from kfac_scratch.pinn.jacobian import (
    Direction,
    gramian,
    inner_product,
    kernel_matrix,
    layer_gramian,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.terms import Linearization

OfDamping = Callable[[float], dict[str, Tensor]]
Solver = Callable[[Sequence[Linearization], Tensor], OfDamping]


def dense_solver(parts: Sequence[Linearization], rho: Float[Tensor, "K"]) -> OfDamping:
    """Solve with the whole matrix: `D^3` work, `D^2` numbers. Returns the step for a damping."""
    G, gradient = gramian(parts), transposed_times(parts, rho)
    h = torch.cat([V.flatten() for V in gradient.values()])

    def solve(damping: float) -> dict[str, Tensor]:
        pieces = _solved(G, h, damping).split([V.numel() for V in gradient.values()])
        return {
            name: -piece.view_as(V)
            for piece, (name, V) in zip(pieces, gradient.items(), strict=True)
        }

    return solve


def layerwise_solver(parts: Sequence[Linearization], rho: Float[Tensor, "K"]) -> OfDamping:
    """Solve for each layer as if the others did not move. Returns the step for a damping."""
    gradient = transposed_times(parts, rho)
    blocks = {name: layer_gramian(parts, name) for name in gradient}

    def solve(damping: float) -> dict[str, Tensor]:
        return {
            name: -_solved(blocks[name], V.flatten(), damping).view_as(V)
            for name, V in gradient.items()
        }

    return solve


def kernel_solver(parts: Sequence[Linearization], rho: Float[Tensor, "K"]) -> OfDamping:
    """`dense_solver`'s step by a system with one unknown for each residual."""
    K = kernel_matrix(parts)

    def solve(damping: float) -> dict[str, Tensor]:
        return transposed_times(parts, -_solved(K, rho, damping))

    return solve


def _solved(M: Float[Tensor, "D D"], b: Float[Tensor, "D"], damping: float) -> Float[Tensor, "D"]:
    """`(M + damping I)^{-1} b`; with as much more damping as a decomposition needs to exist."""
    for _ in range(8):
        L, failed = torch.linalg.cholesky_ex(M + damping * eye_like(M))
        if not failed:
            return torch.cholesky_solve(b.unsqueeze(1), L).squeeze(1)
        damping = max(10 * damping, torch.finfo(M.dtype).eps * float(M.diagonal().mean()))
    raise ValueError(f"A Gauss-Newton system cannot be solved with damping {damping:g}.")


# ---- a few directions ---------------------------------------------------------------------------


def two_directions(newest: Direction, previous: Direction | None) -> list[Direction]:
    """The preconditioned gradient and the last step: the paper's two directions."""
    return [newest] if previous is None else [newest, previous]


def two_directions_per_layer(newest: Direction, previous: Direction | None) -> list[Direction]:
    """The same, with a coefficient of its own for each layer."""
    return [{name: V} for d in two_directions(newest, previous) for name, V in d.items()]


def best_combination(
    parts: Sequence[Linearization], directions: Sequence[Direction], damping: float
) -> Float[Tensor, "q"]:
    """Coefficients `c` that minimise `|J p + rho|^2 + damping |p|^2` for `p = sum_i c_i d_i`.

    Directions that depend on each other share their coefficient; a zero direction gets none.
    """
    J = torch.stack([times(parts, d) for d in directions], dim=1)  # [K, q]
    lengths = torch.stack(
        [torch.stack([inner_product(x, y) for y in directions]) for x in directions]
    )
    M, h = J.T @ J + damping * lengths, J.T @ residuals(parts)
    scale = M.diagonal().clamp_min(torch.finfo(M.dtype).tiny).rsqrt()
    s, Q = torch.linalg.eigh(scale[:, None] * M * scale)
    kept = s > 1e-12 * s[-1]
    inverse = torch.where(kept, 1 / s.where(kept, 1.0), 0.0)
    return -scale * (Q @ (inverse * (Q.T @ (scale * h))))


def linear_combination(directions: Sequence[Direction], c: Float[Tensor, "q"]) -> dict[str, Tensor]:
    """`sum_i c_i d_i`."""
    result: dict[str, Tensor] = {}
    for coefficient, d in zip(c, directions, strict=True):
        for name, V in d.items():
            result[name] = coefficient * V + result[name] if name in result else coefficient * V
    return result


# ---- how far ------------------------------------------------------------------------------------


def line_search(
    at: Callable[[float], float], before: float, start: float = 1.0, lowest: float = 2.0**-30
) -> tuple[float, float]:
    """A step at which halving and doubling do not lower the loss further, and the loss there.

    Walks over powers of two from `start`. If nothing down to `lowest` is better than `before`, the
    step is 0. Every comparison asks for a smaller loss, which one that is not a number never is.
    """
    step, best = start, at(start)
    while not best < before and step > lowest:  # downhill first
        step /= 2
        best = at(step)
    if not best < before:
        return 0.0, before
    for factor in (0.5, 2.0):
        while (found := at(factor * step)) < best and factor * step >= lowest:
            step, best = factor * step, found
    return step, best


def backtracked(
    at: Callable[[float], float], before: float, tries: int = 20
) -> tuple[float, float]:
    """The first of 1, 1/2, 1/4, ... at which the loss is lower, and the loss there; or 0."""
    for k in range(tries):
        if (found := at(2.0**-k)) < before:
            return 2.0**-k, found
    return 0.0, before
