"""A diagonal matrix: one number for each weight.

Source: Becker and LeCun 1988 (Improving the convergence of back-propagation learning with second
order methods), who precondition by the diagonal of curvature.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.matrices.matrix import reciprocal


@dataclass(frozen=True, eq=False)
class Diagonal:
    """A diagonal matrix: `scale` holds the diagonal in the shape of `V`.

    Use it for a first comparison, and for parameters that have nothing better (biases beside
    filters). Not where the correlation of weights matters, which a diagonal cannot express.

    Cost: memory, product and inverse are linear in the number of weights.
    """

    scale: Float[Tensor, "d_out d_in"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Scale every entry of `V`."""
        return self.scale * V

    def inverse(self, damping: float) -> "Diagonal":
        """The inverse of `M + damping * I`.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix.
        """
        return Diagonal(reciprocal(self.scale, damping))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.scale.flatten().diag()

    def mixed(self, new: "Diagonal", weight: float) -> "Diagonal":
        """The average `(1 - weight) * M + weight * new`."""
        return Diagonal(torch.lerp(self.scale, new.scale, weight))

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.scale.sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.scale.flatten()

    def eigen(self) -> "Diagonal":
        """Itself: the unit vectors are its eigenvectors."""
        return self

    def eigenvalues(self) -> Float[Tensor, " D"]:
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
        return Diagonal(reciprocal(self.scale, damping).sqrt())
