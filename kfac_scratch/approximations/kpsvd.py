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
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_scratch.approximations.ekfac import rescaled
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like, simultaneous_eigh
from kfac_scratch.matrices.damping import balance
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.kronecker_sum import Congruence, KroneckerSum
from kfac_scratch.matrices.rearranged import Rearranged, lanczos_svd, power_svd


def kpsvd(io: LayerIO, tolerance: float = 1e-6) -> Kronecker:
    """The Kronecker product nearest to the exact block, by power iteration from the identity."""
    return nearest_product(Rearranged(io), tolerance)


def deflation(io: LayerIO, tolerance: float = 1e-6) -> KroneckerSum:
    """The nearest sum of two products: the nearest one, then the nearest to what it leaves."""
    return nearest_sum(Rearranged(io), tolerance)


def lanczos(io: LayerIO, steps: int = 12) -> KroneckerSum:
    """The same sum, both terms at once, from the given number of Lanczos steps: at least 2."""
    if steps < 2:
        raise ValueError(f"Two terms need at least two steps, got {steps}.")
    R = Rearranged(io)
    return KroneckerSum(*lanczos_svd(R, R.generic(), steps)[:2])


def kfac_corrected(io: LayerIO, tolerance: float = 1e-6) -> KroneckerSum:
    """KFAC and the product nearest to its error."""
    first, R = kfac(io), Rearranged(io)
    return KroneckerSum(first, power_svd(R.minus(first), R.generic(), tolerance))


def ekpsvd(io: LayerIO, tolerance: float = 1e-6) -> KroneckerEigen:
    """The best eigenvalues for the eigenvectors of the nearest product (not in the paper)."""
    return rescaled(kpsvd(io, tolerance).eigen(), io)


def nearest_product(R: Rearranged, tolerance: float = 1e-6) -> Kronecker:
    """The product nearest to a rearranged matrix that has positive terms only."""
    return power_svd(R, R.identity(), tolerance)


def nearest_sum(R: Rearranged, tolerance: float = 1e-6) -> KroneckerSum:
    """The sum of two products nearest to a rearranged matrix."""
    first = nearest_product(R, tolerance)
    return KroneckerSum(first, power_svd(R.minus(first), R.generic(), tolerance))


# ---- in use -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recompressed:
    """An estimator: add the new block to the matrix so far, and take what is nearest to the sum.

    `nearest` is `nearest_product` or `nearest_sum`. Unlike averaged factors, whose product is not
    the averaged product, and which may change their order and their signs, this is the average of
    the blocks, as long as it has that few terms.
    """

    nearest: Callable[[Rearranged], Kronecker | KroneckerSum]

    def update(
        self, state: Kronecker | KroneckerSum | None, io: LayerIO, weight: float
    ) -> Kronecker | KroneckerSum:
        """The matrix after one more batch, which has this weight."""
        if state is None:
            return self.nearest(Rearranged(io))
        terms = (state.first, state.second) if isinstance(state, KroneckerSum) else (state,)
        old = tuple(Kronecker((1 - weight) * K.A, K.B) for K in terms)
        return self.nearest(Rearranged(LayerIO(io.a, weight**0.5 * io.g), old))


def guarded(M: KroneckerSum, damping: float, margin: float = 0.1) -> KroneckerSum:
    r"""Damp the factors of the first term, and shrink the second until the sum is safe.

    The first becomes `(B1 + sqrt(damping) / pi * I) ⊗ (A1 + sqrt(damping) * pi * I)`, as in
    `factored_inverse`. The second is multiplied by the largest factor, at most 1, that leaves the
    sum at least `margin` times the first. So it is positive definite, and `.inverse(0)` is direct.
    """
    first, theta, _ = _common_basis(M, damping, margin)
    return KroneckerSum(first, Kronecker(theta * M.second.A, M.second.B))


def guarded_inverse(M: KroneckerSum, damping: float, margin: float = 0.1) -> Congruence:
    """The inverse of `guarded(M, damping, margin)`, at the price of four small decompositions."""
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
