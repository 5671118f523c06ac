r"""Structured curvature matrices, as values that act on matrices `V` of shape `[d_out, d_in]`.

A matrix here stands for a symmetric positive semi-definite one on `vec(V)`. Its laws, for every
`V` (leading batch axes are allowed) and every damping $\delta$ for which the inverse exists:

- `M @ V` is `M.dense()` times `vec(V)`;
- `M.inverse(delta) @ (M @ V + delta * V) == V`: damping is added when the inverse is taken and
  is never stored in the matrix.

`M.mixed(new, weight)` is the average of two matrices of a kind, where that has a meaning.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §4.2 and §6; Van Loan and Pitsianis 1993.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import eye_like, kron, psd_eigh, scale_in_basis


@runtime_checkable
class LinearMap(Protocol):
    """Something that acts on gradients."""

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Apply the map to `vec(V)`, written as a matrix again."""
        ...


@runtime_checkable
class Matrix(LinearMap, Protocol):
    """Curvature of one layer: symmetric positive semi-definite."""

    def inverse(self, damping: float) -> LinearMap:
        """The inverse of `M + damping * I`."""
        ...

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix on `vec(V)`, for tests and pictures."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix without structure. `M` is `[D, D]` with `D = d_out * d_in`."""

    M: Float[Tensor, "D D"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`M vec(V)`."""
        return (V.flatten(-2) @ self.M.mT).reshape(V.shape)

    def inverse(self, damping: float) -> "Dense":
        """The inverse of `M + damping * I`."""
        check_damping(damping)
        L, failed = torch.linalg.cholesky_ex(self.M + damping * eye_like(self.M))
        if failed.any():
            raise ValueError(f"M + {damping:g} I is not positive definite: use a larger damping.")
        return Dense(torch.cholesky_inverse(L))

    def dense(self) -> Float[Tensor, "D D"]:
        """The matrix itself."""
        return self.M

    def mixed(self, new: "Dense", weight: float) -> "Dense":
        """The average with another matrix, which has the weight."""
        return Dense(torch.lerp(self.M, new.M, weight))

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.M.trace()

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.M.diagonal()

    def eigenvalues(self) -> Float[Tensor, "D"]:
        """All eigenvalues, ascending."""
        return psd_eigh(self.M)[0]

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return (self.eigenvalues() + damping).log().sum()

    def sqrt(self) -> "Dense":
        """The symmetric root `R` with `R R = M`."""
        s, Q = psd_eigh(self.M)
        return Dense(Q * s.sqrt() @ Q.T)

    def inverse_sqrt(self, damping: float) -> "Dense":
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        s, Q = psd_eigh(self.M)
        return Dense(Q * _reciprocal(s, damping).sqrt() @ Q.T)


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal matrix. `scale` holds the diagonal in the shape of `V`."""

    scale: Float[Tensor, "d_out d_in"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Scale every entry of `V`."""
        return self.scale * V

    def inverse(self, damping: float) -> "Diagonal":
        """The inverse of `M + damping * I`."""
        return Diagonal(_reciprocal(self.scale, damping))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.scale.flatten().diag()

    def mixed(self, new: "Diagonal", weight: float) -> "Diagonal":
        """The average with another matrix, which has the weight."""
        return Diagonal(torch.lerp(self.scale, new.scale, weight))

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.scale.sum()

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.scale.flatten()

    def eigenvalues(self) -> Float[Tensor, "D"]:
        """All eigenvalues, ascending."""
        return self.scale.flatten().sort().values

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return (self.scale + damping).log().sum()

    def sqrt(self) -> "Diagonal":
        """The symmetric root `R` with `R R = M`."""
        return Diagonal(self.scale.sqrt())

    def inverse_sqrt(self, damping: float) -> "Diagonal":
        """The symmetric root of `inverse(damping)`."""
        return Diagonal(_reciprocal(self.scale, damping).sqrt())


@dataclass(frozen=True, eq=False)
class KroneckerEigen:
    """`(QB ⊗ QA) diag(vec(scale)) (QB ⊗ QA)^T` with orthogonal `QA` and `QB`."""

    QA: Float[Tensor, "d_in d_in"]
    QB: Float[Tensor, "d_out d_out"]
    scale: Float[Tensor, "d_out d_in"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Rotate into the eigenbasis, scale, rotate back."""
        return scale_in_basis(self.QA, self.QB, self.scale, V)

    def inverse(self, damping: float) -> "KroneckerEigen":
        """The inverse of `M + damping * I`, exact and in the same basis."""
        return KroneckerEigen(self.QA, self.QB, _reciprocal(self.scale, damping))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        Q = kron(self.QB, self.QA)
        return Q * self.scale.flatten() @ Q.T

    def mixed(self, new: "KroneckerEigen", weight: float) -> "KroneckerEigen":
        """The average in the new basis; bases themselves are never averaged."""
        scale = self.carried_over(new).scale
        return KroneckerEigen(new.QA, new.QB, torch.lerp(scale, new.scale, weight))

    def carried_over(self, basis: "KroneckerEigen") -> "KroneckerEigen":
        """The matrix nearest to this one among those with the eigenvectors of `basis`.

        Its eigenvalues are this matrix's curvatures along the new basis vectors.
        """
        RA, RB = self.QA.T @ basis.QA, self.QB.T @ basis.QB
        return KroneckerEigen(basis.QA, basis.QB, RB.square().T @ self.scale @ RA.square())

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.scale.sum()

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return (self.QB.square() @ self.scale @ self.QA.square().T).flatten()

    def eigenvalues(self) -> Float[Tensor, "D"]:
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
        return KroneckerEigen(self.QA, self.QB, _reciprocal(self.scale, damping).sqrt())


@dataclass(frozen=True, eq=False)
class Kronecker:
    """`B ⊗ A` with symmetric positive semi-definite factors."""

    A: Float[Tensor, "d_in d_in"]
    B: Float[Tensor, "d_out d_out"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B V A`, the vec trick."""
        return self.B @ V @ self.A

    def mixed(self, new: "Kronecker", weight: float) -> "Kronecker":
        """Averages of both factors, with a weight for the new ones: not the average product."""
        return Kronecker(torch.lerp(self.A, new.A, weight), torch.lerp(self.B, new.B, weight))

    def eigen(self) -> KroneckerEigen:
        """The same matrix by its eigendecomposition: that of both factors."""
        (a, QA), (b, QB) = psd_eigh(self.A), psd_eigh(self.B)
        return KroneckerEigen(QA, QB, torch.outer(b, a))

    def inverse(self, damping: float) -> KroneckerEigen:
        """The inverse of `B ⊗ A + damping * I`, exact, in the eigenbasis of both factors."""
        return self.eigen().inverse(damping)

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return kron(self.B, self.A)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.B.trace() * self.A.trace()

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return torch.outer(self.B.diagonal(), self.A.diagonal()).flatten()

    def eigenvalues(self) -> Float[Tensor, "D"]:
        """All eigenvalues, ascending: every product of the factors' eigenvalues."""
        return self.eigen().eigenvalues()

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """`log det(M + damping * I)`."""
        return self.eigen().logdet(damping)

    def sqrt(self) -> KroneckerEigen:
        """The symmetric root `R` with `R R = M`."""
        return self.eigen().sqrt()

    def inverse_sqrt(self, damping: float) -> KroneckerEigen:
        """The symmetric root of `inverse(damping)`: `R @ noise` samples with that covariance."""
        return self.eigen().inverse_sqrt(damping)


def exact_inverse(M: Matrix, damping: float) -> LinearMap:
    """The inverse of `M + damping * I`, to be passed where damping is chosen."""
    return M.inverse(damping)


def check_damping(damping: float) -> None:
    """Refuse a damping that is negative or not a number."""
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}.")


def _reciprocal(eigenvalues: Tensor, damping: float) -> Tensor:
    check_damping(damping)
    if damping == 0 and (eigenvalues <= 0).any():
        raise ValueError("A singular matrix has no inverse: pass a positive damping.")
    return 1 / (eigenvalues + damping)
