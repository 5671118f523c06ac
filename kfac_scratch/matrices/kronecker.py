r"""A Kronecker product of two factors, and the same matrix by its eigenvectors.

$$
(B \otimes A) \operatorname{vec}(V) = \operatorname{vec}(B V A), \qquad
B \otimes A + \delta I
= (Q_B \otimes Q_A) (\Lambda_B \otimes \Lambda_A + \delta I) (Q_B \otimes Q_A)^\top .
$$

Sources: Van Loan and Pitsianis 1993; Martens and Grosse 2015 (arXiv:1503.05671), §4.2 and §6.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import kron, psd_eigh, scale_in_basis, told_from_zero
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.matrix import reciprocal


@dataclass(frozen=True, eq=False)
class KroneckerEigen:
    """`(QB ⊗ QA) diag(vec(scale)) (QB ⊗ QA)^T` with orthogonal `QA` and `QB`.

    Use it for eigenvalues that are not products (EKFAC), and where one matrix is inverted with many
    dampings. Not for averages over batches, each of which has another basis: `AmortisedEKFAC`
    averages within one.

    Cost: memory `d_in**2 + d_out**2 + d_in * d_out`, a product `2 * d_in * d_out * (d_in + d_out)`
    operations, an inverse `d_in * d_out`.
    """

    QA: Float[Tensor, "d_in d_in"]
    QB: Float[Tensor, "d_out d_out"]
    scale: Float[Tensor, "d_out d_in"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Rotate into the eigenbasis, scale, rotate back."""
        return scale_in_basis(self.QA, self.QB, self.scale, V)

    def eigen(self) -> "KroneckerEigen":
        """Itself."""
        return self

    def eigenvector(self, o: int, i: int) -> Float[Tensor, "d_out d_in"]:
        """The eigenvector that belongs to `scale[o, i]`."""
        return torch.outer(self.QB[:, o], self.QA[:, i])

    def inverse(self, damping: float) -> "KroneckerEigen":
        """The inverse of `M + damping * I`, exact and in the same basis.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix.
        """
        return KroneckerEigen(self.QA, self.QB, reciprocal(self.scale, damping))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        Q = kron(self.QB, self.QA)
        return Q * self.scale.flatten() @ Q.T

    def mixed(self, new: "KroneckerEigen", weight: float) -> "KroneckerEigen":
        """The average in the basis of `new`, which has the share `weight`.

        Bases are never averaged: the old matrix is `carried_over` first, which changes it.
        """
        scale = self.carried_over(new).scale
        return KroneckerEigen(new.QA, new.QB, torch.lerp(scale, new.scale, weight))

    def carried_over(self, basis: "KroneckerEigen") -> "KroneckerEigen":
        """The matrix nearest to this one among those with the eigenvectors of `basis`.

        Its eigenvalues are the quadratic forms of this matrix with the new basis vectors. Law: the
        trace stays the same.
        """
        RA, RB = self.QA.T @ basis.QA, self.QB.T @ basis.QB
        return KroneckerEigen(basis.QA, basis.QB, RB.square().T @ self.scale @ RA.square())

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.scale.sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return (self.QB.square() @ self.scale @ self.QA.square().T).flatten()

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """All eigenvalues, ascending."""
        return self.scale.flatten().sort().values

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return (self.scale + damping).log().sum()

    def sqrt(self) -> "KroneckerEigen":
        """The symmetric root `R` with `R R = M`."""
        return KroneckerEigen(self.QA, self.QB, self.scale.sqrt())

    def inverse_sqrt(self, damping: float) -> "KroneckerEigen":
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        return KroneckerEigen(self.QA, self.QB, reciprocal(self.scale, damping).sqrt())


@dataclass(frozen=True, eq=False)
class Kronecker:
    """`B ⊗ A` with symmetric positive semi-definite factors.

    Use it for every approximation with one factor for inputs and one for outputs. Not for factors
    of more than some thousand rows, whose decompositions take too long: see `LowRankKronecker`.

    Cost: memory `d_in**2 + d_out**2`, a product `d_in * d_out * (d_in + d_out)` operations, an
    exact inverse two eigendecompositions, `O(d_in**3 + d_out**3)`.
    """

    A: Float[Tensor, "d_in d_in"]
    B: Float[Tensor, "d_out d_out"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B V A^T`, the vec trick."""
        return self.B @ V @ self.A.mT

    def mixed(self, new: "Kronecker", weight: float) -> "Kronecker":
        """The product of both factors' averages, in which the new ones have the share `weight`.

        It is not the average of the products.
        """
        return Kronecker(torch.lerp(self.A, new.A, weight), torch.lerp(self.B, new.B, weight))

    def eigen(self) -> KroneckerEigen:
        """The same matrix by its eigendecomposition: that of both factors."""
        (a, QA), (b, QB) = psd_eigh(self.A), psd_eigh(self.B)
        return KroneckerEigen(QA, QB, torch.outer(b, a))

    def _eigen(self, damping: float) -> KroneckerEigen:
        """`eigen()`; without damping, with each factor's null space told from round-off."""
        if damping > 0:
            return self.eigen()
        (a, QA), (b, QB) = psd_eigh(self.A), psd_eigh(self.B)
        return KroneckerEigen(QA, QB, scale=torch.outer(told_from_zero(b), told_from_zero(a)))

    def inverse(self, damping: float) -> KroneckerEigen:
        """The inverse of `B ⊗ A + damping * I`, exact, in the eigenbasis of both factors.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix; if a factor is not
                finite, or has a negative eigenvalue.
        """
        return self._eigen(damping).inverse(damping)

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        return self.A.diagonal().mean(), self.B.diagonal().mean()

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`, in `O(d_in**3 + d_out**3)` operations."""
        return torch.linalg.eigvalsh(self.A)[-1], torch.linalg.eigvalsh(self.B)[-1]

    def inverse_of_damped_factors(self, damping_A: float, damping_B: float) -> "Kronecker":
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`, by two Cholesky factors.

        Raises:
            ValueError: If a damped factor is not positive definite.
        """
        return Kronecker(Dense(self.A).inverse(damping_A).M, Dense(self.B).inverse(damping_B).M)

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return kron(self.B, self.A)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.B.trace() * self.A.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return torch.outer(self.B.diagonal(), self.A.diagonal()).flatten()

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """All eigenvalues, ascending: every product of the factors' eigenvalues."""
        return self.eigen().eigenvalues()

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return self._eigen(damping).logdet(damping)

    def sqrt(self) -> KroneckerEigen:
        """The symmetric root `R` with `R R = M`."""
        return self.eigen().sqrt()

    def inverse_sqrt(self, damping: float) -> KroneckerEigen:
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        return self._eigen(damping).inverse_sqrt(damping)
