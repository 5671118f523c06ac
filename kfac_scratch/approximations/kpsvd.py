r"""KPSVD: the nearest Kronecker product to the exact block, and sums of two.

With the singular values $\sigma_k$ of the rearranged block $R$ (see `rearranged`),

$$
\min_{A, B} \|F - B \otimes A\|^2 = \|F\|^2 - \sigma_1^2 , \qquad
\min \Bigl\|F - \sum_{k=1}^2 B_k \otimes A_k \Bigr\|^2 = \|F\|^2 - \sigma_1^2 - \sigma_2^2 .
$$

The factors of the nearest product are positive semi-definite. Those of a second term are not, and
the sum itself may be indefinite, although $F$ is not: `guarded` repairs that.

Source: Koroko et al. 2022 (arXiv:2201.10285): KPSVD, Deflation, Lanczos, KFAC-CORRECTED.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kfac_scratch.approximations.ekfac import rescaled
from kfac_scratch.approximations.kfac import kfac_in_full
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like, positive_part, simultaneous_eigh
from kfac_scratch.matrices.damping import balance
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.kronecker_sum import Congruence, KroneckerSum
from kfac_scratch.matrices.rearranged import Rearranged, lanczos_svd, power_svd


def kpsvd(io: LayerIO, tolerance: float = 1e-6) -> Kronecker:
    """KPSVD: the Kronecker product nearest to the exact block, by power iteration.

    Use it where the distance to the block matters, and to judge other products. Not where an update
    must be cheap: each costs many times what `kfac` does, and a nearer matrix need not give a
    better step.

    Law: no Kronecker product is nearer; both factors are positive semi-definite.
    Cost: for each iteration twice that of `kfac` with one position, or
    `2 * V * N * d_in * d_out * (S + d_in + d_out)` operations with several; memory
    `d_in**2 + d_out**2`. With one position, that is 10 to 30 times the cost of `kfac` on the small
    network of chapter 16. The number of iterations grows as the two largest singular values get
    nearer to each other. It warns if 1000 do not suffice, see `power_svd`; a larger tolerance needs
    fewer.
    """
    return nearest_product(Rearranged(io), tolerance)


def deflation(io: LayerIO, tolerance: float = 1e-6) -> KroneckerSum:
    """Deflation: the nearest sum of two products, the second nearest to the error of the first.

    Use it with `guarded_inverse`. Not as positive definite curvature: the sum may be indefinite.
    Not where two singular values are nearly equal: prefer `lanczos`.

    Law: no sum of two Kronecker products is nearer to the block.
    Cost: as `kpsvd` for each term, of which the second needs several times as many iterations. It
    may take all 1000, and then warns. Memory `2 * (d_in**2 + d_out**2)`.
    """
    return nearest_sum(Rearranged(io), tolerance)


def lanczos(io: LayerIO, steps: int = 12) -> KroneckerSum:
    """The sum of `deflation`, both terms at once by Lanczos steps.

    Use it instead of `deflation` where the cost must be known in advance. Not with few steps
    without a check: nothing tests whether the terms have converged.

    Cost: `steps` times an iteration of `kpsvd`, and memory `steps * (d_in**2 + d_out**2)`.

    Raises:
        ValueError: If there are fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"Two terms need at least two steps, got {steps}.")
    R = Rearranged(io)
    return KroneckerSum(*lanczos_svd(R, R.generic(), steps)[:2])


def kfac_corrected(io: LayerIO, tolerance: float = 1e-6) -> KroneckerSum:
    """KFAC-CORRECTED: KFAC plus the product nearest to its error.

    Use it to see what KFAC leaves out, with `guarded_inverse`. Not as positive definite curvature,
    and not as the best sum: `deflation` is at least as near.

    Law: at least as near to the block as KFAC.
    Cost: `kfac`, and the second term as in `deflation`; memory `2 * (d_in**2 + d_out**2)`.
    """
    first, R = kfac_in_full(io), Rearranged(io)
    return KroneckerSum(first, power_svd(R.minus(first), R.generic(), tolerance))


def ekpsvd(io: LayerIO, tolerance: float = 1e-6) -> KroneckerEigen:
    """The eigenvectors of `kpsvd` with the second moments of the gradients as eigenvalues.

    Use it as the third of its kind beside `ekfac` and `tekfac` (it is not in the paper). Not with
    `MovingAverage`.

    Law: at least as near to the block as `kpsvd`; the trace is exact.
    Cost: that of `kpsvd`, two eigendecompositions and `second_moments`; memory
    `d_in**2 + d_out**2 + d_in * d_out`.
    """
    return rescaled(kpsvd(io, tolerance).eigen(), io)


def nearest_product(R: Rearranged, tolerance: float = 1e-6) -> Kronecker:
    """The Kronecker product nearest to a rearranged matrix that has positive terms only.

    Use it in `Recompressed`. Not with negative terms, for which the start may be orthogonal to the
    top pair: `power_svd` with another start finds that.

    Cost: as `kpsvd`.
    """
    return power_svd(R, R.identity(), tolerance)


def nearest_sum(R: Rearranged, tolerance: float = 1e-6) -> KroneckerSum:
    """The sum of two Kronecker products nearest to a rearranged matrix.

    Use it in `Recompressed`. Not with negative terms, as `nearest_product`.

    Law: the factors of the first term are positive semi-definite. Those of the top pair need not be
    if `R` has further products, such as an old second term. Then their positive parts are taken,
    and the second term is the nearest to what is left.
    Cost: as `deflation`; with further products, two eigendecompositions.
    """
    first = nearest_product(R, tolerance)
    if R.plus:
        first = Kronecker(positive_part(first.A), positive_part(first.B))
    return KroneckerSum(first, power_svd(R.minus(first), R.generic(), tolerance))


# ---- in use -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recompressed:
    """An estimator: the nearest product, or sum of two, to the average of old matrix and new block.

    Use it for KPSVD and its sums in training: averages of factors are no average of products, and
    the second terms of two batches may differ in order and sign. Not for KFAC's factors, which
    `MovingAverage` averages for less.

    Cost: that of `nearest` for each batch.

    Attributes:
        nearest: `nearest_product` or `nearest_sum`.
    """

    nearest: Callable[[Rearranged], Kronecker | KroneckerSum]

    def update(
        self, state: Kronecker | KroneckerSum | None, io: LayerIO, weight: float
    ) -> Kronecker | KroneckerSum:
        """The matrix after one more batch, whose share is `weight`; the old has `1 - weight`."""
        if state is None:
            return self.nearest(Rearranged(io))
        terms = (state.first, state.second) if isinstance(state, KroneckerSum) else (state,)
        old = tuple(Kronecker((1 - weight) * K.A, K.B) for K in terms)
        return self.nearest(Rearranged(replace(io, g=weight**0.5 * io.g), old))


def guarded(M: KroneckerSum, damping: float, margin: float = 0.1) -> KroneckerSum:
    r"""A positive definite sum: the first term damped, the second shrunk as far as needed.

    The first becomes `(B1 + sqrt(damping) / pi * I) ⊗ (A1 + sqrt(damping) * pi * I)`, as in
    `factored_inverse`. The second is multiplied by the largest factor, at most 1, that leaves the
    sum at least `margin` times the first.

    Use it to look at the matrix that `guarded_inverse` inverts. Not as the exact damping: the sum
    is another matrix than `M + damping * I`.

    Law: positive definite, so that `.inverse(0)` needs no iteration.
    Cost: that of `guarded_inverse`.

    Raises:
        ValueError: If the damping is not positive, or the margin not in (0, 1].
    """
    first, theta, _ = _common_basis(M, damping, margin)
    return KroneckerSum(first, Kronecker(theta * M.second.A, M.second.B))


def guarded_inverse(M: KroneckerSum, damping: float, margin: float = 0.1) -> Congruence:
    """The inverse of `guarded(M, damping, margin)`, without iterations.

    Use it as `invert=` for `deflation`, `lanczos` and `kfac_corrected`. Not as the inverse of
    `M + damping * I`: that is `M.inverse(damping)`.

    Cost: two Cholesky factorisations and two eigendecompositions, `O(d_in**3 + d_out**3)`; memory
    `d_in**2 + d_out**2 + d_in * d_out`.

    Raises:
        ValueError: As `guarded`.
    """
    return _common_basis(M, damping, margin)[2]


def _common_basis(
    M: KroneckerSum, damping: float, margin: float
) -> tuple[Kronecker, Tensor, Congruence]:
    """The damped first term, the second's factor, and the inverse of the sum of both."""
    if not damping > 0:
        raise ValueError(f"Damping the first term needs a positive damping, got {damping}.")
    if not 0 < margin <= 1:
        raise ValueError(f"margin must lie in (0, 1], got {margin}.")
    first = _damped(M.first, damping)
    p, KA = simultaneous_eigh(first.A, M.second.A)
    q, KB = simultaneous_eigh(first.B, M.second.B)
    ratios = torch.outer(q, p)  # of the second term to the first, in the common basis
    lowest = ratios.amin()
    theta = torch.where(lowest < margin - 1, (margin - 1) / lowest, 1.0)
    return first, theta, Congruence(KA, KB, 1 / (1 + theta * ratios))


def _damped(K: Kronecker, damping: float) -> Kronecker:
    pi, root = float(balance(K)), damping**0.5
    return Kronecker(K.A + root * pi * eye_like(K.A), K.B + root / pi * eye_like(K.B))
