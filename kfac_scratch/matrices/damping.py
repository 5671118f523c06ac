r"""Damping: how much to trust the quadratic model, and where to put the distrust.

`M.inverse(damping)` is the exact inverse of $B \otimes A + \lambda I$. Two things remain: the
cheaper damping of both factors, and how to choose $\lambda$. Damping is never stored in a factor:
whatever is done here leaves the matrix as it is.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §6.3 (factored Tikhonov) and §6.5
(Levenberg-Marquardt).
"""

from math import isfinite
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker


@runtime_checkable
class HasDiagonal(Protocol):
    """A matrix that knows its diagonal."""

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        ...


def factored_inverse(K: Kronecker, damping: float) -> Kronecker:
    r"""The inverse of `(B + sqrt(damping) / pi * I) ⊗ (A + sqrt(damping) * pi * I)`.

    Two Cholesky factorisations instead of two eigendecompositions. What is inverted exceeds
    `B ⊗ A + damping * I` by a positive semi-definite matrix, whose trace `balance` minimises, so
    that steps are shorter than exact damping's.

    Raises:
        ValueError: If a damped factor is not positive definite.
    """
    if not damping > 0:
        raise ValueError(f"Damping both factors needs a positive damping, got {damping}.")
    pi, root = float(balance(K)), damping**0.5
    return Kronecker(Dense(K.A).inverse(root * pi).M, Dense(K.B).inverse(root / pi).M)


def balance(K: Kronecker) -> Float[Tensor, ""]:
    r"""The root of the ratio of mean eigenvalues, `pi = sqrt((tr A / d_in) / (tr B / d_out))`.

    Invariant: rescaling `A` by `c` and `B` by `1 / c` changes neither `K` nor the damped inverse.
    One if a factor is zero.
    """
    mean_A, mean_B = K.A.diagonal().mean(), K.B.diagonal().mean()
    ratio = mean_A / mean_B
    usable = (ratio > 0) & ratio.isfinite()
    return torch.where(usable, ratio, torch.ones_like(ratio)).sqrt()


def relative_damping(M: HasDiagonal, fraction: float) -> float:
    """A layer's own damping: a fraction of its mean eigenvalue, for every scale of the loss."""
    return fraction * float(M.diagonal().mean())


def reduction_ratio(before: float, after: float, predicted: float) -> float | None:
    """The loss's change on one batch over the change that the quadratic model predicted.

    None where the model predicts no change beyond round-off: then a ratio says nothing.
    """
    if abs(predicted) <= 1e-12 * abs(before):
        return None
    return (after - before) / predicted


def levenberg_marquardt(
    damping: float, ratio: float | None, factor: float = 0.9**5, minimum: float = 1e-8
) -> float:
    """Shrink the damping where the model can be trusted, raise it where it cannot.

    Args:
        damping: The damping so far.
        ratio: The `reduction_ratio` of the last step; not finite if the loss was not.
        factor: What to multiply the damping by above 3/4; below 1/4, it is divided by it.
        minimum: The smallest damping.
    """
    if ratio is None:
        return damping
    if not isfinite(ratio) or ratio < 1 / 4:
        return damping / factor
    return max(minimum, damping * factor) if ratio > 3 / 4 else damping
