"""Block-diagonal matrices: many small blocks of one size, handled as a batch.

Source: the matrices of Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import cholesky_factor, eye_like
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.matrix import check_damping


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """`K` blocks of size `d` along the diagonal; each acts on one of `K` pieces of `vec(V)`.

    Use it for blocks of neurons or filters. Not for wide layers with a block for each neuron: the
    memory is `d_out` times that of one input factor.

    Cost: memory `K * d**2`, a product `K * d**2` operations, an inverse `K * d**3`, each as one
    batched operation.
    """

    blocks: Float[Tensor, "K d d"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Every block times its piece of `vec(V)`."""
        pieces = V.reshape(*V.shape[:-2], *self.blocks.shape[:2], 1)
        return (self.blocks @ pieces).reshape(V.shape)

    def inverse(self, damping: float) -> "BlockDiagonal":
        """The inverse of `M + damping * I`: one Cholesky factorisation for each block.

        Raises:
            ValueError: If the damping is negative, or a damped block not symmetric positive
                definite.
        """
        check_damping(damping)
        L = cholesky_factor(
            self.blocks + damping * eye_like(self.blocks[0]),
            f"M + {damping:g} I is not positive definite: use a larger damping.",
        )
        return BlockDiagonal(torch.cholesky_inverse(L))

    def mixed(self, new: "BlockDiagonal", weight: float) -> "BlockDiagonal":
        """The average `(1 - weight) * M + weight * new`."""
        return BlockDiagonal(torch.lerp(self.blocks, new.blocks, weight))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return torch.block_diag(*self.blocks)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.diagonal().sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.blocks.diagonal(dim1=1, dim2=2).flatten()


@dataclass(frozen=True, eq=False)
class FiltersAndBias:
    """Two matrices side by side: `filters` acts on the first columns of `V`, `bias` on the others.

    Use it for convolutions with a bias (`mini_block_filters`). Not for layers without filters.

    Cost: that of its two parts.
    """

    filters: BlockDiagonal
    bias: Diagonal

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Each matrix on its own columns."""
        end = V.shape[-1] - self.bias.scale.shape[-1]
        return torch.cat([self.filters @ V[..., :end], self.bias @ V[..., end:]], -1)

    def inverse(self, damping: float) -> "FiltersAndBias":
        """The inverse of `M + damping * I`, each part by itself."""
        return FiltersAndBias(self.filters.inverse(damping), self.bias.inverse(damping))

    def mixed(self, new: "FiltersAndBias", weight: float) -> "FiltersAndBias":
        """The average `(1 - weight) * M + weight * new`."""
        return FiltersAndBias(
            self.filters.mixed(new.filters, weight), self.bias.mixed(new.bias, weight)
        )

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        unit = self.diagonal().new_ones(len(self.diagonal())).diag()
        return (self @ unit.unflatten(1, (len(self.bias.scale), -1))).flatten(1)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.filters.trace() + self.bias.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        rows = self.filters.diagonal().unflatten(0, (len(self.bias.scale), -1))
        return torch.cat([rows, self.bias.scale], -1).flatten()
