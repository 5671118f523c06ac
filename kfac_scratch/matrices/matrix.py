r"""Curvature matrices: they act on matrices `V` of shape `[d_out, d_in]`.

A matrix of this package stands for a symmetric positive semi-definite one on `vec(V)`. Its laws,
for every `V` (leading batch axes are allowed) and every damping $\delta$ for which the inverse
exists:

- `M @ V` is `M.dense()` times `vec(V)`;
- `M.inverse(delta) @ (M @ V + delta * V) == V`: damping is added when the inverse is taken and
  is never stored in the matrix.

The unit of a matrix is that of the loss: a loss that is multiplied by `c` multiplies the matrix by
`c`. A damping with the same effect is then also `c` times as large.

`M.mixed(new, weight)` is the average of two matrices of a kind, where that has a meaning:
`weight` is the share of the new one, and the old one has `1 - weight`. Rows of `V` are stored one
after the other, so that `vec` stacks rows; see `linalg`.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §4.2 and §6.
"""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@runtime_checkable
class LinearMap(Protocol):
    """A linear map on gradients."""

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The product of the map with `vec(V)`, as a matrix of the shape of `V`."""
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


def exact_inverse(M: Matrix, damping: float) -> LinearMap:
    """The inverse of `M + damping * I`: the method `M.inverse` as a function.

    Use it as `invert=` of an optimizer, for every matrix of this package. Not for Kronecker
    products in training if Cholesky factorisations are to replace eigendecompositions:
    `factored_inverse` does that, with another damping.

    Cost: that of the matrix's own method.
    """
    return M.inverse(damping)


def check_damping(damping: float) -> None:
    """Refuse a damping that is negative or not a number."""
    if not damping >= 0:
        raise ValueError(f"damping must be at least 0, got {damping}.")


def reciprocal(eigenvalues: Tensor, damping: float) -> Tensor:
    """Damped eigenvalues inverted, `1 / (eigenvalues + damping)`; a singular matrix is refused."""
    check_damping(damping)
    if damping == 0 and (eigenvalues <= 0).any():
        raise ValueError("A singular matrix has no inverse: pass a positive damping.")
    return 1 / (eigenvalues + damping)
