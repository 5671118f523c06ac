r"""The linear systems behind a PINN's step, and the line searches for its length.

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
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import eye_like
from kfac_scratch.pinn.gramian import (
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


class Solved(NamedTuple):
    """The solution of a damped system, and the damping that it was solved with.

    Attributes:
        step: The Gauss-Newton step, `[d_out, d_in]` for each block.
        damping: The damping that was used: the one that was asked for, or a larger one if the
            system had no Cholesky factorisation with that (see `_solved`). Of a solver with
            several systems, the largest.
    """

    step: dict[str, Tensor]
    damping: float


OfDamping = Callable[[float], Solved]
Solver = Callable[[Sequence[Linearization], Tensor], OfDamping]


def dense_solver(parts: Sequence[Linearization], rho: Float[Tensor, " K"]) -> OfDamping:
    """The step with the whole matrix `J^T J`, as a function of the damping.

    Use it for networks with up to a few thousand weights `D`, and more residuals than weights. Not
    with fewer residuals than weights: `kernel_solver` gives the same step for less.

    Cost: `K * D**2` operations for the matrix, once; `D**3 / 3` for each damping. Memory `D**2`.
    """
    G, gradient = gramian(parts), transposed_times(parts, rho)
    h = torch.cat([V.flatten() for V in gradient.values()])

    def solve(damping: float) -> Solved:
        solution, used = _solved(G, h, damping)
        pieces = zip(solution.split([V.numel() for V in gradient.values()]), gradient, strict=True)
        return Solved({name: -piece.view_as(gradient[name]) for piece, name in pieces}, used)

    return solve


def layerwise_solver(parts: Sequence[Linearization], rho: Float[Tensor, " K"]) -> OfDamping:
    """The step with the exact block of every layer, as a function of the damping.

    It ignores what layers have in common, and is not the Gauss-Newton step. Use it to see what a
    block-diagonal matrix loses, before any Kronecker factor does. Not for layers with more than a
    few thousand weights `D_l`.

    Cost: `sum_l K * D_l**2` operations, once; `sum_l D_l**3 / 3` for each damping. Memory
    `sum_l D_l**2`.
    """
    gradient = transposed_times(parts, rho)
    blocks = {name: layer_gramian(parts, name) for name in gradient}

    def solve(damping: float) -> Solved:
        solved = {n: _solved(blocks[n], V.flatten(), damping) for n, V in gradient.items()}
        step = {name: -x.view_as(gradient[name]) for name, (x, _) in solved.items()}
        return Solved(step, max(used for _, used in solved.values()))

    return solve


def kernel_solver(parts: Sequence[Linearization], rho: Float[Tensor, " K"]) -> OfDamping:
    """`dense_solver`'s step by the kernel `J J^T`, with one unknown for each of `K` residuals.

    Use it for networks with more weights than there are residuals. Not for many residuals:
    `dense_solver` then gives the same step for less.

    Cost: `K**2 * D` operations for the kernel, once; `K**3 / 3` for each damping. Memory `K**2`,
    and `K` times the weights of the largest layer.
    """
    K = kernel_matrix(parts)

    def solve(damping: float) -> Solved:
        y, used = _solved(K, rho, damping)
        return Solved(transposed_times(parts, -y), used)

    return solve


def _solved(
    M: Float[Tensor, "D D"], b: Float[Tensor, " D"], damping: float
) -> tuple[Float[Tensor, " D"], float]:
    """`(M + used * I)^{-1} b` and `used`, the first damping with which a factorisation exists.

    `damping` itself is tried first. Each of up to seven further tries takes ten times the last
    one, but at least the precision times the mean diagonal entry.

    Raises:
        ValueError: If the eighth damping fails, too.
    """
    for _ in range(8):
        L, failed = torch.linalg.cholesky_ex(M + damping * eye_like(M))
        if not failed:
            return torch.cholesky_solve(b.unsqueeze(1), L).squeeze(1), damping
        damping = max(10 * damping, torch.finfo(M.dtype).eps * float(M.diagonal().mean()))
    raise ValueError(f"A Gauss-Newton system cannot be solved with damping {damping:g}.")


# ---- a few directions ---------------------------------------------------------------------------


def two_directions(newest: Direction, previous: Direction | None) -> list[Direction]:
    """The preconditioned gradient and the last step: KFAC*'s two directions."""
    return [newest] if previous is None else [newest, previous]


def two_directions_per_layer(newest: Direction, previous: Direction | None) -> list[Direction]:
    """The two directions of `two_directions` cut into layers, each with its own coefficient.

    Cost: products with `J` for `2 * layers` directions, each for one layer.
    """
    return [{name: V} for d in two_directions(newest, previous) for name, V in d.items()]


def best_combination(
    parts: Sequence[Linearization], directions: Sequence[Direction], damping: float
) -> Float[Tensor, " q"]:
    """Coefficients `c` that minimise `|J p + rho|^2 + damping |p|^2` for `p = sum_i c_i d_i`.

    Directions that depend on each other share their coefficient; a zero direction gets zero. For
    this, eigenvalues of the scaled `q x q` system that round-off could have made count as zero. The
    system is formed in float64, so that in float32 these are far below the genuine ones: `(100 *
    eps)**2` of the largest, the square of the round-off in `J d_i`. In float64 they are `100 * eps`
    of it.

    Cost: one product with `J` for each direction, and an eigendecomposition of size `q`; a copy of
    the directions in float64.
    """
    J = torch.stack([times(parts, d) for d in directions], dim=1)  # [K, q]
    exact, wide = J.double(), [{name: V.double() for name, V in d.items()} for d in directions]
    lengths = torch.stack([torch.stack([inner_product(x, y) for y in wide]) for x in wide])
    M, h = exact.T @ exact + damping * lengths, exact.T @ residuals(parts).double()
    scale = M.diagonal().clamp_min(torch.finfo(J.dtype).tiny).rsqrt()
    s, Q = torch.linalg.eigh(scale[:, None] * M * scale)
    round_off = max((100 * torch.finfo(J.dtype).eps) ** 2, 100 * torch.finfo(s.dtype).eps)
    kept = s > round_off * s[-1]
    inverse = torch.where(kept, 1 / s.where(kept, 1.0), 0.0)
    return (-scale * (Q @ (inverse * (Q.T @ (scale * h))))).to(J.dtype)


def linear_combination(
    directions: Sequence[Direction], c: Float[Tensor, " q"]
) -> dict[str, Tensor]:
    """`sum_i c_i d_i`."""
    result: dict[str, Tensor] = {}
    for coefficient, d in zip(c, directions, strict=True):
        for name, V in d.items():
            result[name] = coefficient * V + result[name] if name in result else coefficient * V
    return result


# ---- line searches ------------------------------------------------------------------------------


def line_search(
    at: Callable[[float], float], before: float, start: float = 1.0, lowest: float = 2.0**-30
) -> tuple[float, float]:
    """A step length at which halving and doubling do not lower the loss further, and the loss.

    The search goes over powers of two from `start`. The step is 0 if no length down to `lowest` has
    a smaller loss than `before`. A loss that is not a number never counts as smaller.

    Cost: one evaluation of the loss for each length, at least three and usually few.

    Args:
        at: The loss as a function of the length.
        before: The loss at length 0.
        start: The first length, usually the last step's.
        lowest: The smallest length that is tried.
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
    """The first length of 1, 1/2, 1/4, ... at which the loss is lower, and the loss there.

    Use it for steps that have a natural length of 1. Not for directions without one: `line_search`
    also lengthens. If the loss is not lower after `tries` lengths, the length is 0.
    """
    for k in range(tries):
        if (found := at(2.0**-k)) < before:
            return 2.0**-k, found
    return 0.0, before
