r"""KL-Shampoo: the Kronecker product that is nearest to the block as the covariance of a Gaussian.

Among all products $B \otimes A$, minimise $\operatorname{KL}(\mathcal{N}(0, F + \lambda I) \,\|\,
\mathcal{N}(0, B \otimes A))$. Each factor has a best value for the other,

$$
B = \frac{1}{d_\text{in}} \Bigl( \sum_k G_k A^{-1} G_k^\top + \lambda \operatorname{tr}(A^{-1}) I
\Bigr) , \qquad
A = \frac{1}{d_\text{out}} \Bigl( \sum_k G_k^\top B^{-1} G_k + \lambda \operatorname{tr}(B^{-1}) I
\Bigr) ,
$$

and taking them in turn, the flip-flop, lowers the divergence at every step. From $A = I$ and
$\lambda = 0$ the first $B$ is Shampoo's, divided by $d_\text{in}$. Without the divisions by
$d_\text{in}$ and $d_\text{out}$ the two updates have no common fixed point unless both are equal.

The damping is in the matrix here, against the rule of this package: the factors of a block without
full rank exist only with it.

Sources: Lin et al. 2025 (arXiv:2509.03378); Dutilleul 1999 (The MLE algorithm for the matrix normal
distribution), for the flip-flop.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.border import check_count
from kfac_scratch.layer_io import LayerIO, check_not_reduced
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.matrix import check_damping
from kfac_scratch.matrices.rearranged import Rearranged


def kl_factors(io: LayerIO, damping: float, steps: int = 30) -> Kronecker:
    """The product nearest to the damped block in the divergence of Gaussians, by flip-flops.

    Use it to judge other products by the divergence, which counts small eigenvalues as much as
    large ones. Not as the nearest in norm, which is `kpsvd`, and not as nearer than every damped
    matrix: the sum of a product and a multiple of the identity may be nearer.

    Law: no flip-flop raises the divergence. At a fixed point the derivatives by both factors are
    zero, and `tr((B ⊗ A)^-1 (F + damping * I))` is the number of weights. With damping 0, one
    flip-flop finds a block that is a Kronecker product of full rank.
    Units: the damping has those of the loss, as everywhere. It stays in the result, so that an
    inverse needs none.
    Cost: for each flip-flop as an iteration of `kpsvd`, and two Cholesky factorisations in float64.

    Args:
        io: The layer.
        damping: The multiple of the identity that is added to the block.
        steps: Flip-flops. Nothing tests whether they have converged: few suffice for a block of
            full rank, and many are needed for one that is nearly singular.

    Raises:
        TypeError: If `steps` is not a whole number.
        ValueError: If the damping is negative, or too small for the rank of the block; if there is
            no step; if rows stand for several positions (`flavour=REDUCE`).
    """
    check_damping(damping)
    check_count("steps", steps)
    R = _rearranged(io)
    A = eye_like(R.io.a.new_empty(2 * R.io.a.shape[-1:]))
    for _ in range(steps):
        B = _best_factor(R.to_outputs, A, damping)
        A = _best_factor(R.to_inputs, B, damping)
    return Kronecker(A, B)


@dataclass(frozen=True)
class KLShampoo:
    """KL-Shampoo as an `Estimator`: one flip-flop for every batch, averaged into both factors.

    Use it as `OfBatch(KLShampoo(damping))` with `invert=inverse_root`, and as the `factors` of
    `AmortisedEKFAC`, which is KL-SOAP. Not with the damping of a Levenberg-Marquardt rule, because
    it stays in the averages.

    The first batch gives `kl_factors` with one flip-flop. Then the factors are updated in turn, the
    inputs' by the new one of the outputs.

    Law: with one batch again and again it tends to `kl_factors` of that batch; without memory every
    update is one more flip-flop. A loss that is multiplied by `c`, with `c` times the damping,
    multiplies the matrix by `c`. If both first factors were made of the identity, it would be by
    `c**2` at first.
    Cost: as one step of `kl_factors`.

    Args:
        damping: The multiple of the identity that is added to every batch's block.

    Raises:
        ValueError: If the damping is not positive: one batch seldom has full rank.
    """

    damping: float

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise ValueError(
                f"KLShampoo needs a positive damping, got {self.damping}: the averages that it "
                "inverts seldom have full rank."
            )

    def update(self, state: Kronecker | None, io: LayerIO, weight: float) -> Kronecker:
        """The factors after one more batch, as `Estimator.update`."""
        if state is None:
            return kl_factors(io, self.damping, steps=1)
        R = _rearranged(io)
        B = torch.lerp(state.B, _best_factor(R.to_outputs, state.A, self.damping), weight)
        A = torch.lerp(state.A, _best_factor(R.to_inputs, B, self.damping), weight)
        return Kronecker(A, B)


def _rearranged(io: LayerIO) -> Rearranged:
    check_not_reduced(io, "KL-Shampoo")
    return Rearranged(io)


def _best_factor(
    weighted: Callable[[Tensor], Tensor], other: Float[Tensor, "d d"], damping: float
) -> Float[Tensor, "e e"]:
    """The best factor for the other one, given the sum of gradients that its inverse weights."""
    inverse = _inverse(other)
    M = weighted(inverse)
    return (M + damping * inverse.trace() * eye_like(M)) / len(other)


def _inverse(M: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The inverse of the stored factor, in float64 and rounded."""
    return Dense(M.double()).inverse(0.0).M.to(M.dtype)
