"""A matrix without structure.

Source: Golub and Van Loan, Matrix Computations, §4.2 (Cholesky factorisation).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import cholesky_factor, eye_like, psd_eigh, told_from_zero
from kfac_scratch.matrices.matrix import check_damping, reciprocal


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix without structure: `M` is `[D, D]` with `D = d_out * d_in`.

    Use it for the exact block of a small layer, and as the reference in tests. Not for layers with
    more than a few thousand weights.

    Cost: memory `D**2`, a product `D**2` operations, an inverse `D**3`.
    """

    M: Float[Tensor, "D D"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`M vec(V)`."""
        return (V.flatten(-2) @ self.M.mT).reshape(V.shape)

    def inverse(self, damping: float) -> "Dense":
        """The inverse of `M + damping * I`, by a Cholesky factorisation.

        Raises:
            ValueError: If the damping is negative, or `M + damping * I` not symmetric positive
                definite.
        """
        check_damping(damping)
        L = cholesky_factor(
            self.M + damping * eye_like(self.M),
            f"M + {damping:g} I is not positive definite: use a larger damping.",
        )
        return Dense(torch.cholesky_inverse(L))

    def dense(self) -> Float[Tensor, "D D"]:
        """The matrix itself."""
        return self.M

    def mixed(self, new: "Dense", weight: float) -> "Dense":
        """The average `(1 - weight) * M + weight * new`."""
        return Dense(torch.lerp(self.M, new.M, weight))

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.M.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.M.diagonal()

    def eigen(self) -> "DenseEigen":
        """The same matrix by its eigendecomposition."""
        s, Q = psd_eigh(self.M)
        return DenseEigen(Q, s)

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """All eigenvalues, ascending."""
        return psd_eigh(self.M)[0]

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        s = self.eigenvalues()
        return ((s if damping > 0 else told_from_zero(s)) + damping).log().sum()

    def sqrt(self) -> "Dense":
        """The symmetric root `R` with `R R = M`."""
        s, Q = psd_eigh(self.M)
        return Dense(Q * s.sqrt() @ Q.T)

    def inverse_sqrt(self, damping: float) -> "Dense":
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        s, Q = psd_eigh(self.M)
        s = s if damping > 0 else told_from_zero(s)
        return Dense(Q * reciprocal(s, damping).sqrt() @ Q.T)


@dataclass(frozen=True, eq=False)
class DenseEigen:
    """`Q diag(scale) Q^T` with an orthogonal `Q`: a matrix without structure, decomposed once.

    Use it where one matrix is inverted with many dampings. Not for a single one: `Dense.inverse`.

    Cost: memory `D**2`, a product `4 * D**2` operations, an inverse `D`.
    """

    Q: Float[Tensor, "D D"]
    scale: Float[Tensor, " D"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Rotate into the eigenbasis, scale, rotate back."""
        return ((V.flatten(-2) @ self.Q) * self.scale @ self.Q.mT).reshape(V.shape)

    def eigen(self) -> "DenseEigen":
        """Itself."""
        return self

    def inverse(self, damping: float) -> "DenseEigen":
        """The inverse of `M + damping * I`, in the same basis.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix.
        """
        s = self.scale if damping > 0 else told_from_zero(self.scale)
        return DenseEigen(self.Q, reciprocal(s, damping))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.Q * self.scale @ self.Q.T

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.scale.sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.Q.square() @ self.scale

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """All eigenvalues, ascending."""
        return self.scale.sort().values

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return (self.scale + damping).log().sum()

    def sqrt(self) -> "DenseEigen":
        """The symmetric root `R` with `R R = M`."""
        return DenseEigen(self.Q, self.scale.sqrt())

    def inverse_sqrt(self, damping: float) -> "DenseEigen":
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        return DenseEigen(self.Q, self.inverse(damping).scale.sqrt())
