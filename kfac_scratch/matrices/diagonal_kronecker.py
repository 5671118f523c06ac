r"""A Kronecker product whose input factor is diagonal: KFAC of an embedding.

$$
(B \otimes \operatorname{diag}(a)) \operatorname{vec}(V)
= \operatorname{vec}(B V \operatorname{diag}(a)) ,
\qquad
B \otimes \operatorname{diag}(a) + \delta I
= (Q_B \otimes I) (\Lambda_B \otimes \operatorname{diag}(a) + \delta I) (Q_B \otimes I)^\top .
$$

Words do not occur together in one row, so that the second moment of one-hot rows is the diagonal
matrix of the words' frequencies. Nothing here is as large as `d_in**2`, unless it is asked for.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §3, for one-hot rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import kron, psd_eigh, told_from_zero
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import KroneckerEigen
from kfac_scratch.matrices.matrix import reciprocal


@dataclass(frozen=True, eq=False)
class DiagonalKroneckerEigen:
    """`(QB ⊗ I) diag(vec(scale)) (QB ⊗ I)^T` with orthogonal `QB`.

    Use it for the inverse of a `DiagonalKronecker`. Not for averages over batches, each of which
    has another basis.

    Cost: memory `d_out**2 + d_in * d_out`, a product `2 * d_in * d_out**2` operations.
    """

    QB: Float[Tensor, "d_out d_out"]
    scale: Float[Tensor, "d_out d_in"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Rotate into the eigenbasis, scale, rotate back."""
        return self.QB @ (self.scale * (self.QB.mT @ V))

    def eigenvector(self, o: int, i: int) -> Float[Tensor, "d_out d_in"]:
        """The eigenvector that belongs to `scale[o, i]`: an eigenvector of `B` in one column."""
        V = torch.zeros_like(self.scale)
        V[:, i] = self.QB[:, o]
        return V

    def inverse(self, damping: float) -> "DiagonalKroneckerEigen":
        """The inverse of `M + damping * I`, exact and in the same basis.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix.
        """
        return DiagonalKroneckerEigen(self.QB, reciprocal(self.scale, damping))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.in_full().dense()

    def in_full(self) -> KroneckerEigen:
        """The same matrix with the identity for the eigenvectors of the inputs.

        Cost: memory `d_in**2`.
        """
        QA = torch.eye(self.scale.shape[1], dtype=self.QB.dtype, device=self.QB.device)
        return KroneckerEigen(QA, self.QB, self.scale)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.scale.sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return (self.QB.square() @ self.scale).flatten()

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """All eigenvalues, ascending."""
        return self.scale.flatten().sort().values

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return (self.scale + damping).log().sum()

    def sqrt(self) -> "DiagonalKroneckerEigen":
        """The symmetric root `R` with `R R = M`."""
        return DiagonalKroneckerEigen(self.QB, self.scale.sqrt())

    def inverse_sqrt(self, damping: float) -> "DiagonalKroneckerEigen":
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        return DiagonalKroneckerEigen(self.QB, reciprocal(self.scale, damping).sqrt())


@dataclass(frozen=True, eq=False)
class DiagonalKronecker:
    """`B ⊗ diag(a)` with a symmetric positive semi-definite `B` and a non-negative vector `a`.

    Use it for layers whose inputs are one-hot rows, as embeddings have. Not for other inputs, whose
    correlations a diagonal lacks.

    Cost: memory `d_in + d_out**2`, a product `d_in * d_out**2` operations, an exact inverse one
    eigendecomposition, `O(d_out**3)`, and `d_in * d_out` numbers.
    """

    a: Float[Tensor, " d_in"]
    B: Float[Tensor, "d_out d_out"]

    @property
    def A(self) -> Float[Tensor, "d_in d_in"]:
        """The input factor as a matrix. Cost: memory `d_in**2`."""
        return self.a.diag()

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B V diag(a)`."""
        return self.B @ V * self.a

    def mixed(self, new: "DiagonalKronecker", weight: float) -> "DiagonalKronecker":
        """The product of both factors' averages, in which the new ones have the share `weight`."""
        a, B = torch.lerp(self.a, new.a, weight), torch.lerp(self.B, new.B, weight)
        return DiagonalKronecker(a, B)

    def eigen(self) -> KroneckerEigen:
        """The same matrix by its eigenvectors, as `Kronecker.eigen` gives them.

        Cost: memory `d_in**2`, for the identity.
        """
        return self.eigen_of_outputs().in_full()

    def eigen_of_outputs(self) -> DiagonalKroneckerEigen:
        """The same matrix by the eigenvectors of `B`; those of the inputs are single columns."""
        b, QB = psd_eigh(self.B)
        return DiagonalKroneckerEigen(QB, torch.outer(b, self.a))

    def _eigen(self, damping: float) -> DiagonalKroneckerEigen:
        """`eigen_of_outputs`; without damping, with the null space of `B` told from round-off."""
        if damping > 0:
            return self.eigen_of_outputs()
        b, QB = psd_eigh(self.B)
        return DiagonalKroneckerEigen(QB, torch.outer(told_from_zero(b), self.a))

    def inverse(self, damping: float) -> DiagonalKroneckerEigen:
        """The inverse of `B ⊗ diag(a) + damping * I`, exact, in the eigenbasis of `B`.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix; if `B` is not
                finite, or has a negative eigenvalue.
        """
        return self._eigen(damping).inverse(damping)

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        return self.a.mean(), self.B.diagonal().mean()

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `diag(a)` and of `B`."""
        return self.a.amax(), torch.linalg.eigvalsh(self.B)[-1]

    def inverse_of_damped_factors(self, damping_A: float, damping_B: float) -> "DiagonalKronecker":
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`, by one Cholesky factor.

        Raises:
            ValueError: If a damped factor is not positive definite.
        """
        return DiagonalKronecker(reciprocal(self.a, damping_A), Dense(self.B).inverse(damping_B).M)

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return kron(self.B, self.A)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.B.trace() * self.a.sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return torch.outer(self.B.diagonal(), self.a).flatten()

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """All eigenvalues, ascending: every product of the factors' eigenvalues."""
        return self.eigen_of_outputs().eigenvalues()

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return self._eigen(damping).logdet(damping)

    def sqrt(self) -> DiagonalKroneckerEigen:
        """The symmetric root `R` with `R R = M`."""
        return self.eigen_of_outputs().sqrt()

    def inverse_sqrt(self, damping: float) -> DiagonalKroneckerEigen:
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        return self._eigen(damping).inverse_sqrt(damping)
