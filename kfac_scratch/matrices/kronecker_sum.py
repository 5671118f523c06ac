"""A sum of two Kronecker products, and its inverse.

Two symmetric matrices, one of them positive definite, can be diagonalised at once, though not by
an orthogonal basis. So can two pairs of factors, which inverts `B1 ⊗ A1 + B2 ⊗ A2` at the price of
four small decompositions. A third term shares no basis with two general ones.

Sources: Koroko et al. 2022 (arXiv:2201.10285), who approximate curvature by such sums; Golub and
Van Loan, Matrix Computations, §8.7, for two matrices.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import (
    conjugate_gradient,
    scale_in_basis,
    simultaneous_eigh,
    symmetric,
)
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.matrix import LinearMap, Matrix, check_damping


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """`B1 ⊗ A1 + B2 ⊗ A2`: positive semi-definite as a sum, though the second need not be.

    Use it where one product misses too much of a block, with `guarded_inverse`. Not with
    `inverse(damping)` in training, which solves by conjugate gradients at every product, and not
    with `MovingAverage`: sums have no average of the same form (see `Recompressed`).

    Cost: memory and product twice a `Kronecker`'s.
    """

    first: Kronecker
    second: Kronecker

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The sum of both products."""
        return self.first @ V + self.second @ V

    def inverse(self, damping: float) -> LinearMap:
        """The inverse of the sum plus `damping * I`.

        Without damping, both pairs of factors are diagonalised at once, which needs a positive
        definite first term. A third term `damping * I` shares no basis with two general ones, and
        two antisymmetric factors, whose product is symmetric, no real one with symmetric factors.
        In these cases, the inverse runs conjugate gradients at every product, preconditioned by the
        damped first term. `guarded_inverse` damps the factors of the first term instead, and needs
        no iteration.

        Raises:
            ValueError: If the damping is negative, or the second term is not symmetric. Without
                damping, if the first term or the sum is not positive definite; where conjugate
                gradients run, the product raises if the sum is not.
        """
        check_damping(damping)
        if not self._symmetric_factors() or damping > 0:
            return ConjugateGradientInverse(self, damping, self.first.inverse(damping))
        self.first.inverse(damping)  # refuses a null space
        (p, KA), (q, KB) = (
            simultaneous_eigh(self.first.A, self.second.A),
            simultaneous_eigh(self.first.B, self.second.B),
        )
        ratios = torch.outer(q, p)
        if (1 + ratios <= 10 * torch.finfo(p.dtype).eps * (1 + ratios.abs())).any():
            raise ValueError("The sum of two Kronecker products is not positive definite.")
        return Congruence(KA, KB, 1 / (1 + ratios))

    def _symmetric_factors(self) -> bool:
        """Whether the second term's factors are symmetric; the alternative is antisymmetric.

        Raises:
            ValueError: If they are neither, so that their product is not symmetric.
        """
        K = self.second
        found = [symmetric(K.A), symmetric(K.B), symmetric(K.A, -1.0), symmetric(K.B, -1.0)]
        A, B, anti_A, anti_B = torch.stack(found).tolist()
        if not ((A and B) or (anti_A and anti_B)):
            raise ValueError(
                "The second of two Kronecker products is not symmetric: its factors are neither "
                "both symmetric nor both antisymmetric. Pass the nearest product of symmetric "
                "matrices, as kpsvd and deflation find it."
            )
        return A and B

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.first.dense() + self.second.dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.first.trace() + self.second.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.first.diagonal() + self.second.diagonal()


@dataclass(frozen=True, eq=False)
class Congruence:
    """`(KB ⊗ KA) diag(vec(scale)) (KB ⊗ KA)^T` with invertible, not orthogonal, `KA` and `KB`.

    Cost: memory `d_in**2 + d_out**2 + d_in * d_out`, a product `2 * d_in * d_out * (d_in + d_out)`
    operations.
    """

    KA: Float[Tensor, "d_in d_in"]
    KB: Float[Tensor, "d_out d_out"]
    scale: Float[Tensor, "d_out d_in"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Map into the common basis, scale, map back."""
        return scale_in_basis(self.KA, self.KB, self.scale, V)


@dataclass(frozen=True, eq=False)
class ConjugateGradientInverse:
    """`(M + damping * I)^{-1}` by preconditioned conjugate gradients at every product.

    Use it in tests, and for a few products. Not in training: each product takes as many products
    with `M` as full accuracy needs, at most `10 * d_out * d_in`, after which it stops and warns.

    Raises:
        ValueError: From the product, if `M + damping * I` is not positive definite.
    """

    M: Matrix
    damping: float
    preconditioner: LinearMap

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Solve `M X + damping * X = V`."""
        return conjugate_gradient(
            lambda X: self.M @ X + self.damping * X, V, lambda X: self.preconditioner @ X
        )
