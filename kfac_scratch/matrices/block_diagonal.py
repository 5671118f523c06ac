"""Block-diagonal matrices: many small blocks of one size, handled as a batch.

Memory is `K * d**2` for `K` blocks of size `d`, and everything is one batched operation, which is
what GPUs are built for.

Source: the matrices of Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.matrix import check_damping


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """`K` blocks along the diagonal; the rows of `V`, lined up, are cut into `K` pieces."""

    blocks: Float[Tensor, "K d d"]

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """Every block times its piece of `vec(V)`."""
        pieces = V.reshape(*V.shape[:-2], *self.blocks.shape[:2], 1)
        return (self.blocks @ pieces).reshape(V.shape)

    def inverse(self, damping: float) -> "BlockDiagonal":
        """The inverse of `M + damping * I`: one Cholesky factorisation for each block."""
        check_damping(damping)
        L, failed = torch.linalg.cholesky_ex(self.blocks + damping * eye_like(self.blocks[0]))
        if failed.any():
            raise ValueError(f"M + {damping:g} I is not positive definite: use a larger damping.")
        return BlockDiagonal(torch.cholesky_inverse(L))

    def mixed(self, new: "BlockDiagonal", weight: float) -> "BlockDiagonal":
        """The average with another matrix, which has the weight."""
        return BlockDiagonal(torch.lerp(self.blocks, new.blocks, weight))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return torch.block_diag(*self.blocks)

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.diagonal().sum()

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.blocks.diagonal(dim1=1, dim2=2).flatten()


@dataclass(frozen=True, eq=False)
class FiltersAndBias:
    """`filters` on the first columns of `V`, `bias` on the others, which it scales."""

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
        """The average with another matrix, which has the weight."""
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

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        rows = self.filters.diagonal().unflatten(0, (len(self.bias.scale), -1))
        return torch.cat([rows, self.bias.scale], -1).flatten()
