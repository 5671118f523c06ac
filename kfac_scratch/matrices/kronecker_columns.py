r"""Kronecker products of factors with few columns, inverted by Woodbury's identity.

A factor that is a sum of outer products of $K$ columns, $A = U_A U_A^\top$, has rank $K$ at most.
Where $K$ is smaller than the factor, the factor is never formed: products go through the columns,
and the inverse needs a $K \times K$ matrix,

$$
(U U^\top + \gamma I)^{-1}
= \tfrac{1}{\gamma} \bigl( I - U (U^\top U + \gamma I)^{-1} U^\top \bigr) .
$$

Source: Golub and Van Loan, Matrix Computations, §2.1.4 (Sherman-Morrison-Woodbury).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import eye_like, kron
from kfac_scratch.matrices.low_rank import FourBlocks, LowRankKronecker


@dataclass(frozen=True, eq=False)
class KroneckerColumns:
    """`B ⊗ A` with `A = UA @ UA.T` and `B = UB @ UB.T`, stored as these columns.

    Use it for factors with fewer columns than rows: one batch of a wide layer. Not for averages
    over many batches: columns add up, and there is no method `mixed` (see `Window`).

    Cost: memory `d_in * KA + d_out * KB`; a product
    `d_in * d_out * (KA + KB) + KA * KB * (d_in + d_out)` operations; an exact inverse two thin
    decompositions, `O(d_in * KA**2 + d_out * KB**2)`.
    """

    UA: Float[Tensor, "d_in KA"]
    UB: Float[Tensor, "d_out KB"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B V A`, with a `[KB, KA]` matrix in the middle."""
        return self.UB @ (self.UB.mT @ V @ self.UA) @ self.UA.mT

    def low_rank(self) -> LowRankKronecker:
        """The same matrix by the eigenpairs of both factors, from two thin decompositions."""
        zero = self.UA.new_zeros(())
        return LowRankKronecker(*_eigenpairs(self.UA), zero, *_eigenpairs(self.UB), zero)

    def inverse(self, damping: float) -> FourBlocks:
        """The inverse of `B ⊗ A + damping * I`, exact. See also `factored_inverse`.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix; if columns are not
                finite.
        """
        return self.low_rank().inverse(damping)

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        return self.UA.square().sum() / len(self.UA), self.UB.square().sum() / len(self.UB)

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`: the squared norms of their columns."""
        norm = torch.linalg.matrix_norm
        return norm(self.UA, 2).square(), norm(self.UB, 2).square()

    def inverse_of_damped_factors(
        self, damping_A: float, damping_B: float
    ) -> "FactoredWoodburyInverse":
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`, by Woodbury's identity.

        Not with a damping that is small beside `eps` times the largest inner product of columns.

        Cost: `KA**2 * d_in + KB**2 * d_out` operations twice, and `(KA**3 + KB**3) / 3`.

        Raises:
            ValueError: If a damping is not positive, or is lost in round-off.
        """
        WA = torch.linalg.solve_triangular(gram_root(self.UA, damping_A), self.UA.mT, upper=False)
        WB = torch.linalg.solve_triangular(gram_root(self.UB, damping_B), self.UB.mT, upper=False)
        return FactoredWoodburyInverse(WA, WB, 1 / (damping_A * damping_B))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return kron(self.UB @ self.UB.mT, self.UA @ self.UA.mT)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.UB.square().sum() * self.UA.square().sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return torch.outer(self.UB.square().sum(1), self.UA.square().sum(1)).flatten()


def reduced_columns(U: Float[Tensor, "d K"]) -> Float[Tensor, "d k"]:
    """At most `d` columns with the same `U @ U.T`: if there are more, by a QR decomposition."""
    return U if len(U) >= U.shape[1] else torch.linalg.qr(U.mT, mode="r").R.mT


@dataclass(frozen=True, eq=False)
class FactoredWoodburyInverse:
    """`scale * (I - WB.T @ WB) ⊗ (I - WA.T @ WA)`: the inverse of two damped factors.

    Cost: memory `d_in * KA + d_out * KB`, a product `2 * d_in * d_out * (KA + KB)` operations.
    """

    WA: Float[Tensor, "KA d_in"]
    WB: Float[Tensor, "KB d_out"]
    scale: float

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The product with one side after the other."""
        V = V - self.WB.mT @ (self.WB @ V)
        return self.scale * (V - (V @ self.WA.mT) @ self.WA)


def gram_root(U: Float[Tensor, "d K"], damping: float) -> Float[Tensor, "K K"]:
    """The Cholesky factor of `U.T @ U + damping * I`.

    Raises:
        ValueError: If the damping is not positive, or is lost in round-off.
    """
    if not damping > 0:
        raise ValueError(f"Few columns need a positive damping, got {damping}.")
    gram = U.mT @ U
    L, failed = torch.linalg.cholesky_ex(gram + damping * eye_like(gram))
    if failed.any():
        raise ValueError(
            f"A damping of {damping:.3g} is lost in the round-off of inner products up to "
            f"{gram.abs().max():.3g}: use a larger damping, or the exact inverse(damping)."
        )
    return L


def _eigenpairs(U: Float[Tensor, "d K"]) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"]]:
    """Eigenvectors and eigenvalues of `U @ U.T`; eigenvalues within round-off are zero."""
    if not U.isfinite().all():
        raise ValueError(f"Columns {tuple(U.shape)} to be decomposed have non-finite entries.")
    Q, s, _ = torch.linalg.svd(U, full_matrices=False)
    tolerance = 10 * torch.finfo(U.dtype).eps * s.amax()
    return Q, s.where(s > tolerance, 0.0).square()
