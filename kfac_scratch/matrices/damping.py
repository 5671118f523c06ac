r"""Damping: the multiple of the identity that is added to curvature before it is inverted.

The damping $\lambda$ limits how far a step goes in directions of small curvature, where the
quadratic model is not to be trusted. `M.inverse(damping)` is the exact inverse of
$B \otimes A + \lambda I$. This module has the cheaper damping of both factors, and rules that
choose $\lambda$. No function here changes a matrix: damping is never stored in a factor.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §6.3 (factored Tikhonov) and §6.5
(Levenberg-Marquardt).
"""

from math import isfinite
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.matrices.matrix import LinearMap, Matrix, exact_inverse


@runtime_checkable
class HasDiagonal(Protocol):
    """A matrix that knows its diagonal."""

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        ...


@runtime_checkable
class HasFactors(Protocol):
    """A Kronecker product `B ⊗ A` whose factors can be damped one by one."""

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        ...

    def inverse_of_damped_factors(self, damping_A: float, damping_B: float) -> LinearMap:
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`."""
        ...


@runtime_checkable
class HasLargestEigenvalues(HasFactors, Protocol):
    """A Kronecker product that knows the largest eigenvalue of each factor."""

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        ...


def factored_inverse(M: HasFactors, damping: float) -> LinearMap:
    r"""The inverse of `(B + sqrt(damping) / pi * I) ⊗ (A + sqrt(damping) * pi * I)`.

    Use it in training with fixed damping. For `Kronecker` it takes two Cholesky factorisations,
    where the exact inverse takes two eigendecompositions. For `KroneckerColumns` it is SKFAC's
    inverse, by Woodbury's identity. Not where the damping changes between inversions, which an
    eigendecomposition allows at no cost, and not as the exact inverse.

    Law: the inverted matrix exceeds `B ⊗ A + damping * I` by a positive semi-definite one, so that
    steps are shorter than with exact damping. `balance` minimises the trace of the difference.
    Cost: that of the matrix's method `inverse_of_damped_factors`; for `Kronecker`,
    `O(d_in**3 + d_out**3)` operations and memory `d_in**2 + d_out**2`.

    Raises:
        TypeError: If the matrix is no Kronecker product.
        ValueError: If the damping is not positive, or a damped factor is not positive definite.
    """
    if not isinstance(M, HasFactors):
        raise TypeError(
            f"A {type(M).__name__} has no two factors to be damped: use its exact inverse(damping)."
        )
    if not damping > 0:
        raise ValueError(f"Damping both factors needs a positive damping, got {damping}.")
    pi, root = float(balance(M)), damping**0.5
    return M.inverse_of_damped_factors(root * pi, root / pi)


def default_inverse(M: Matrix, damping: float) -> LinearMap:
    """The `factored_inverse` of a Kronecker product, and the exact inverse of every other matrix.

    Use it where approximations are exchanged and each should get the inverse that it is usually
    trained with. Not where two of them are compared: give both the same damping.

    Law: with damping 0 both are the inverse of `M`. Cost: that of the inverse which is taken.

    Raises:
        ValueError: As the inverse that is taken.
    """
    if damping > 0 and isinstance(M, HasFactors):
        return factored_inverse(M, damping)
    return exact_inverse(M, damping)


def balance(M: HasFactors) -> Float[Tensor, ""]:
    r"""The root of the ratio of mean eigenvalues, `pi = sqrt((tr A / d_in) / (tr B / d_out))`.

    Law: rescaling `A` by `c` and `B` by `1 / c` changes neither `M` nor its `factored_inverse`.
    The result is 1 if a factor is zero.
    """
    mean_A, mean_B = M.mean_eigenvalues()
    ratio = mean_A / mean_B
    usable = (ratio > 0) & ratio.isfinite()
    return torch.where(usable, ratio, torch.ones_like(ratio)).sqrt()


def relative_damping(M: HasDiagonal, fraction: float) -> float:
    """A layer's own damping: a fraction of its mean eigenvalue.

    Use it where one damping must suit layers or losses of different scales. Not where all layers
    are to have the same trust region.

    Cost: linear in the number of weights, and one synchronisation with the device.
    """
    return fraction * float(M.diagonal().mean())


@runtime_checkable
class HasDiagonalAndInverse(HasDiagonal, Matrix, Protocol):
    """A matrix with a diagonal."""


def relative_inverse(M: HasDiagonalAndInverse, fraction: float) -> LinearMap:
    """The exact inverse with a damping of each layer's own: a fraction of its mean eigenvalue.

    A matrix of zeros counts as if its mean eigenvalue were 1.

    Use it as `invert=` of an optimizer, whose `damping=` is then the fraction. Not together with
    `adapt_damping=`, which expects a damping in the units of the loss.

    Law: a loss that is multiplied by `c` divides the inverse by `c`.
    Cost: that of the exact inverse and of `relative_damping`.

    Raises:
        ValueError: As the exact inverse.
    """
    return exact_inverse(M, relative_damping(M, fraction) or fraction)


def relative_factored_inverse(M: Matrix, fraction: float) -> LinearMap:
    r"""The inverse of both factors, each damped by a fraction of its own largest eigenvalue.

    It inverts $(B + f \beta_1 I) \otimes (A + f \alpha_1 I)$ with the largest eigenvalues
    $\alpha_1$ and $\beta_1$. A factor that is zero counts as if its largest eigenvalue were 1.

    Use it as `invert=` of an optimizer, whose `damping=` is then the fraction `f`, to reproduce the
    code of RS-KFAC and the Brand new K-FACs. Not together with `adapt_damping=`, which expects a
    damping in the units of the loss, and not as the inverse of `M` with any multiple of the
    identity. Steps become shorter at once when a largest eigenvalue jumps.

    Law: rescaling `A` by `c` and `B` by `1 / c` does not change it; a loss that is multiplied by
    `c` divides it by `c`.
    Cost: that of the matrix's methods `largest_eigenvalues` and `inverse_of_damped_factors`; no
    more than of the latter for low-rank factors, and for `Kronecker` the eigenvalues of both.
    Source: code of Puiu 2022 (arXiv:2206.15397):
    https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/RS_KFAC_optimizer_file.py#L16

    Raises:
        TypeError: If the matrix is no Kronecker product with that method.
        ValueError: If the fraction is not positive, or a damped factor not positive definite.
    """
    if not isinstance(M, HasLargestEigenvalues):
        raise TypeError(
            f"A {type(M).__name__} has no two factors with known largest eigenvalues: use "
            "relative_inverse, or factored_inverse."
        )
    if not fraction > 0:
        raise ValueError(f"Damping both factors needs a positive fraction, got {fraction}.")
    largest = (float(value) for value in M.largest_eigenvalues())
    return M.inverse_of_damped_factors(*(fraction * (value or 1.0) for value in largest))


def reduction_ratio(
    before: float, after: float, predicted: float, dtype: torch.dtype = torch.float64
) -> float | None:
    """The change of the loss on one batch over the change that the quadratic model predicted.

    The result is None if the predicted change is at most `100 * eps` of the loss, of which the
    change of the loss has only round-off.

    Args:
        before: The loss before the step.
        after: The loss after it.
        predicted: The change that the model predicted.
        dtype: The precision in which the losses were computed.
    """
    if abs(predicted) <= 100 * torch.finfo(dtype).eps * abs(before):
        return None
    return (after - before) / predicted


def levenberg_marquardt(
    damping: float, ratio: float | None, factor: float = 0.9**5, minimum: float = 1e-8
) -> float:
    """The next damping: smaller if the last step succeeded as predicted, larger if it did not.

    Use it as `adapt_damping=` of an optimizer. Not with a single noisy batch for each step unless
    the ratio is of that batch before and after the step.

    Cost: none. The ratio costs one evaluation of the loss and of the quadratic model.

    Args:
        damping: The damping so far.
        ratio: The `reduction_ratio` of the last step; not finite if the loss was not; None leaves
            the damping as it is.
        factor: A ratio above 3/4 multiplies the damping by it, one below 1/4 divides by it. The
            default is the paper's for an adaptation every five steps; the PINN optimizers adapt
            in every step, and take 1/2.
        minimum: The smallest damping. The default suits losses of order 1 in float32; the PINN
            optimizers, whose losses become tiny in float64, take 1e-14.
    """
    if ratio is None:
        return damping
    if not isfinite(ratio) or ratio < 1 / 4:
        return damping / factor
    return max(minimum, damping * factor) if ratio > 3 / 4 else damping
