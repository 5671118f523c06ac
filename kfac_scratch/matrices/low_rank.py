r"""Kronecker products of factors with few eigenpairs, and one eigenvalue for all other directions.

A factor that was estimated from few rows, or whose spectrum decays, is known by a few eigenpairs
$(u_i, d_i)$. Every direction orthogonal to all $u_i$ gets the same eigenvalue $c \ge 0$,

$$
A = U_A \operatorname{diag}(d_A)\, U_A^\top + c_A \bigl(I - U_A U_A^\top\bigr) ,
$$

and likewise $B$. The eigenvalues of $B \otimes A$ then come in four blocks, by whether a side lies
in the span of the known eigenvectors or not: $d^B_i d^A_j$, $d^B_i c_A$, $c_B d^A_j$ and
$c_B c_A$. No square matrix of the factors' size is formed.

Source: low-rank damped inverses of a factor, Puiu 2022 (arXiv:2206.15397). Damping the product
instead of its factors needs all four blocks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import eye_like, kron
from kfac_scratch.matrices.matrix import check_damping


@dataclass(frozen=True, eq=False)
class LowRankKronecker:
    """`B ⊗ A` with `A = UA diag(dA) UA^T + cA (I - UA UA^T)`, and `B` likewise.

    Use it for wide layers whose factors have a decaying spectrum. Not where the rank comes near the
    size of a factor: a `Kronecker` then costs less.

    Cost: memory `d_in * rA + d_out * rB`, a product `2 * d_in * d_out * (rA + rB)` operations, an
    exact inverse `rA * rB`.

    Attributes:
        UA: Orthonormal columns: the known eigenvectors of `A`. There may be none, or `d_in`.
        dA: Their eigenvalues.
        cA: The eigenvalue of every direction orthogonal to them. It is unused if there are `d_in`.
        UB: The known eigenvectors of `B`.
        dB: Their eigenvalues.
        cB: The eigenvalue of every direction orthogonal to them.
    """

    UA: Float[Tensor, "d_in rA"]
    dA: Float[Tensor, " rA"]
    cA: Float[Tensor, ""]
    UB: Float[Tensor, "d_out rB"]
    dB: Float[Tensor, " rB"]
    cB: Float[Tensor, ""]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B V A`, one side after the other."""
        V = self.cB * V + self.UB @ ((self.dB - self.cB).unsqueeze(1) * (self.UB.mT @ V))
        return self.cA * V + ((V @ self.UA) * (self.dA - self.cA)) @ self.UA.mT

    def eigen(self) -> "FourBlocks":
        """The same matrix by its eigenvalues, in four blocks."""
        return FourBlocks(
            *(self.UA, self.UB, torch.outer(self.dB, self.dA)),
            *(self.dB * self.cA, self.cB * self.dA, self.cB * self.cA),
        )

    def inverse(self, damping: float) -> "FourBlocks":
        """The inverse of `B ⊗ A + damping * I`, exact."""
        return self.eigen().inverse(damping)

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        mean_A = _diagonal(self.UA, self.dA, self.cA).mean()
        return mean_A, _diagonal(self.UB, self.dB, self.cB).mean()

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`, the tails included."""
        return _largest(self.UA, self.dA, self.cA), _largest(self.UB, self.dB, self.cB)

    def inverse_of_damped_factors(self, damping_A: float, damping_B: float) -> "LowRankKronecker":
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`: low-rank factors again.

        Raises:
            ValueError: If a damping is not positive.
        """
        if not (damping_A > 0 and damping_B > 0):
            raise ValueError(
                "Damping both factors needs two positive dampings, got "
                f"{damping_A} and {damping_B}."
            )
        return LowRankKronecker(
            *(self.UA, 1 / (self.dA + damping_A), 1 / (self.cA + damping_A)),
            *(self.UB, 1 / (self.dB + damping_B), 1 / (self.cB + damping_B)),
        )

    def factors(self) -> tuple[Float[Tensor, "d_in d_in"], Float[Tensor, "d_out d_out"]]:
        """`A` and `B` as dense matrices, for tests and pictures."""
        return _dense(self.UA, self.dA, self.cA), _dense(self.UB, self.dB, self.cB)

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        A, B = self.factors()
        return kron(B, A)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return _diagonal(self.UB, self.dB, self.cB).sum() * (
            _diagonal(self.UA, self.dA, self.cA).sum()
        )

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        A, B = _diagonal(self.UA, self.dA, self.cA), _diagonal(self.UB, self.dB, self.cB)
        return torch.outer(B, A).flatten()


@dataclass(frozen=True, eq=False)
class FourBlocks:
    """A symmetric matrix with four kinds of eigenvectors, given by two sets of columns.

    The columns of `UA` and `UB` are orthonormal. Complete each to an orthonormal basis in any way:
    the matrix is diagonal in the products of the basis vectors, and does not depend on the choice.
    It is what `LowRankKronecker.inverse` returns.

    Cost: memory `d_in * rA + d_out * rB + rA * rB`, a product
    `2 * d_in * d_out * (rA + rB) + 2 * d_in * rA * rB` operations.

    Attributes:
        UA: Orthonormal columns.
        UB: Orthonormal columns.
        both: Eigenvalues of `UB[:, i] ⊗ UA[:, j]`.
        left: Eigenvalues of `UB[:, i] ⊗ x` for all `x` orthogonal to `UA`.
        right: Eigenvalues of `y ⊗ UA[:, j]` for all `y` orthogonal to `UB`.
        rest: Eigenvalue of all `y ⊗ x`.
    """

    UA: Float[Tensor, "d_in rA"]
    UB: Float[Tensor, "d_out rB"]
    both: Float[Tensor, "rB rA"]
    left: Float[Tensor, " rB"]
    right: Float[Tensor, " rA"]
    rest: Float[Tensor, ""]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The product: all of `V` times `rest`, and corrections in each span and in both."""
        X = self.UB.mT @ V  # [rB, d_in]
        both = self.both - self.left.unsqueeze(1) - self.right + self.rest
        inside = (self.left - self.rest).unsqueeze(1) * X + (both * (X @ self.UA)) @ self.UA.mT
        outside = ((V @ self.UA) * (self.right - self.rest)) @ self.UA.mT
        return self.rest * V + self.UB @ inside + outside

    def inverse(self, damping: float) -> "FourBlocks":
        """The inverse of `M + damping * I`, exact and with the same eigenvectors.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix.
        """
        check_damping(damping)
        beyond_A, beyond_B = (U.shape[1] < U.shape[0] for U in (self.UA, self.UB))
        blocks = (
            (self.both, True),
            (self.left, beyond_A),
            (self.right, beyond_B),
            (self.rest, beyond_A and beyond_B),
        )
        if any(exists and (block + damping <= 0).any() for block, exists in blocks):
            raise ValueError("A singular matrix has no inverse: pass a positive damping.")
        return FourBlocks(
            *(self.UA, self.UB),  # an eigenvalue without eigenvectors is never divided by
            *(1 / (b + damping) if exists else torch.zeros_like(b) for b, exists in blocks),
        )

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        shape = (self.UB.shape[0], self.UA.shape[0])
        eye = torch.eye(shape[0] * shape[1], dtype=self.UA.dtype, device=self.UA.device)
        return (self @ eye.unflatten(1, shape)).flatten(1)


def _dense(
    U: Float[Tensor, "d r"], d: Float[Tensor, " r"], c: Float[Tensor, ""]
) -> Float[Tensor, "d d"]:
    P = U @ U.mT
    return (U * d) @ U.mT + c * (eye_like(P) - P)


def _diagonal(
    U: Float[Tensor, "d r"], d: Float[Tensor, " r"], c: Float[Tensor, ""]
) -> Float[Tensor, " d"]:
    return c + U.square() @ (d - c)


def _largest(
    U: Float[Tensor, "d r"], d: Float[Tensor, " r"], c: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    return torch.cat([d, c.reshape(1)])[: len(U)].amax()  # a tail without directions is left out
