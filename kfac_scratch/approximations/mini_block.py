r"""Mini-block Fisher: one block for every neuron, none between neurons.

The weights of one output neuron are a row of `W`. Their curvature is a small matrix,

$$
F_o = \sum_{v,n} (G_{vn})_{o \cdot}^\top (G_{vn})_{o \cdot}
\in \mathbb{R}^{d_\text{in} \times d_\text{in}},
$$

a diagonal block of the layer's block $F$, since `vec` stacks rows. The matrix of these blocks is
the best approximation that does not mix neurons: the squared Frobenius error is
$\|F\|^2 - \sum_o \|F_o\|^2$, and the trace is exact. For a convolution, the blocks are those of
single filters, one for each pair of an output and an input channel.

Source: Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124), MBF, who use the empirical Fisher. Their
abstract does not say where a layer is cut; rows and filters are not checked against the paper.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.layer_io import LayerIO, check_not_reduced
from kfac_scratch.linalg import eye_like, gram
from kfac_scratch.matrices.block_diagonal import BlockDiagonal, FiltersAndBias
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker


def mini_block(io: LayerIO) -> BlockDiagonal:
    """The mini-block Fisher: one `[d_in, d_in]` block for every neuron of a layer.

    Use it for layers with few inputs or few neurons, where it keeps the correlation of inputs and
    vectors that KFAC drops. Not for wide layers: its memory is `d_out` times that of KFAC's `A`.
    The paper has the empirical Fisher: `KFAC(..., approximation=mini_block, fisher=empirical)`.

    Law: exact if no sample's vectors reach two neurons, or if there is one neuron; no matrix
    without entries between neurons is nearer.
    Cost: `N * d_out * d_in**2` operations with one position, `V * N * d_out * d_in * (S + d_in)`
    with several; memory `d_out * d_in**2 + N * d_out * d_in`. An inverse takes
    `O(d_out * d_in**3)`.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """
    check_not_reduced(io, "The mini-block Fisher")
    return BlockDiagonal(_blocks(io, io.a.shape[-1]))


def mini_block_filters(size: int) -> Callable[[LayerIO], FiltersAndBias]:
    """Mini-block Fisher of a convolution: a `[size, size]` block for every filter.

    The bias gets its diagonal entries. Use it for convolutions. Not for other layers, nor where
    the correlation of input channels matters, which it drops.

    Cost: `V * N * d_out * d_in * (S + size)` operations, with `V = 1` for one position; memory
    `d_out * d_in * size + N * d_out * d_in`. An inverse takes `O(d_out * d_in * size**2)`.

    Args:
        size: Entries of one filter, the product of the kernel's sizes: rows of `W` are cut into
            pieces of that size, one for each input channel.

    Raises:
        ValueError: On a layer whose `W` has rows of another length.
    """

    def approximation(io: LayerIO) -> FiltersAndBias:
        check_not_reduced(io, "The mini-block Fisher")
        d_out, d_in = io.g.shape[-1], io.a.shape[-1]
        if size < 1 or d_in < size or d_in % size > 1:
            raise ValueError(
                f"Rows of {d_in} weights are not filters of {size} entries with or without a "
                "bias: pass the number of entries of the layer's kernel."
            )
        end = d_in - d_in % size
        squares = _blocks(LayerIO(io.a[..., end:], io.g), 1).reshape(d_out, d_in - end)
        return FiltersAndBias(
            BlockDiagonal(_blocks(LayerIO(io.a[..., :end], io.g), size)), Diagonal(squares)
        )

    return approximation


def mini_block_shared(io: LayerIO) -> Kronecker:
    r"""Mini-block Fisher with one block for all neurons, the mean of theirs.

    It is `I ⊗ A` with $A = \sum_o F_o / d_\text{out}$: FOOF with every sample weighted by the
    squared size of its vectors. Use it for wide layers, where `mini_block` does not fit. Not where
    the outputs of a layer differ in scale, which it drops.

    Law: no matrix of the form `I ⊗ A` is nearer to the exact block, and the trace is exact.
    Cost: `N * d_in**2` operations with one position, `V * N * d_out * d_in * (S + d_in)` with
    several, where memory holds `N * d_out * d_in` numbers; memory `d_in**2 + d_out**2`.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """
    check_not_reduced(io, "The mini-block Fisher")
    d_out = io.g.shape[-1]
    if io.a.shape[1] == 1:
        A = gram(io.g.square().sum((0, 3)).sqrt().unsqueeze(-1) * io.a)
    else:
        A = sum((gram(G) for G in _gradients(io)), io.a.new_zeros(()))
    return Kronecker(A / d_out, torch.eye(d_out, dtype=A.dtype, device=A.device))


def _blocks(io: LayerIO, size: int) -> Float[Tensor, "K size size"]:
    """Sums of outer products of pieces of gradients' rows, one for each piece."""
    K = io.g.shape[-1] * io.a.shape[-1] // size
    blocks = io.a.new_zeros(K, size, size)
    for G in _gradients(_merged(io)):
        pieces = G.reshape(len(G), K, size).movedim(0, 1)  # [K, N, size]
        blocks.baddbmm_(pieces.mT, pieces)
    return blocks


def _gradients(io: LayerIO) -> Iterator[Float[Tensor, "N d_out d_in"]]:
    """Gradients of one vector after another: memory `N * D`, not `V * N * D`."""
    for g in io.g.split(1):
        yield LayerIO(io.a, g).gradients().squeeze(0)


def _merged(io: LayerIO) -> LayerIO:
    """A layer with the same block for every neuron, and one vector if there is one position.

    A neuron's block is a sum of `g**2 a a^T` then, so that only the sum of squares over the vectors
    matters.
    """
    if io.a.shape[1] > 1:
        return io
    return LayerIO(io.a, io.g.square().sum(0, keepdim=True).sqrt())


# ---- fewer samples than inputs ------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class BlocksByRows:
    """The blocks `R.T @ R` of `mini_block(U)`: rows `R` of gradients, stored as a `LayerIO`.

    See `mini_block_rows`.
    """

    U: LayerIO

    def along(self, X: Float[Tensor, "*batch d_out d_in"]) -> Float[Tensor, "*batch V N d_out"]:
        """Products of every gradient's rows with those of `X`."""
        z = torch.einsum("nsi,...oi->...nso", self.U.a, X)
        return torch.einsum("vnso,...nso->...vno", self.U.g, z)

    def back(self, c: Float[Tensor, "*batch V N d_out"]) -> Float[Tensor, "*batch d_out d_in"]:
        """The sum of every gradient's rows with weights `c`: the transpose of `along`."""
        z = torch.einsum("vnso,...vno->...nso", self.U.g, c)
        return torch.einsum("...nso,nsi->...oi", z, self.U.a)

    def __matmul__(self, X: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The product `R.T @ (R @ x)` for every neuron's row `x` of `X`."""
        return self.back(self.along(X))

    def inverse(self, damping: float) -> "BlocksByRowsInverse":
        """The inverse of `M + damping * I`, by one system of `K` unknowns for each neuron.

        `K` is `V * N`, or `N` with one position. All systems come from the same inner products of
        inputs. Cost: `O(d_out * K**3)` operations, memory `d_out * K**2`.

        Raises:
            ValueError: If the damping is not positive.
        """
        if not damping > 0:
            raise ValueError(f"Blocks of low rank need a positive damping, got {damping}.")
        kernel = torch.einsum("nsi,mti->nsmt", self.U.a, self.U.a)
        half = torch.einsum("vnso,nsmt->ovnmt", self.U.g, kernel)
        K = (
            torch.einsum("ovnmt,wmto->ovnwm", half, self.U.g).flatten(1, 2).flatten(2)
        )  # [o, VN, VN]
        return BlocksByRowsInverse(
            self, torch.linalg.cholesky(K + damping * eye_like(K[0])), damping
        )

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return mini_block(self.U).dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.diagonal().sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return _blocks(self.U, 1).flatten()


@dataclass(frozen=True, eq=False)
class BlocksByRowsInverse:
    r"""A damped inverse by Woodbury's identity, for every neuron with its rows $R$.

    $(R^\top R + \delta I)^{-1} = \frac{1}{\delta} (I - R^\top (R R^\top + \delta I)^{-1} R)$.
    """

    M: BlocksByRows
    L: Float[Tensor, "d_out K K"]
    damping: float

    def __matmul__(self, X: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The solution for every neuron's row of `X`."""
        along = self.M.along(X)
        rhs = along.flatten(-3, -2).mT.unsqueeze(-1)  # [*batch, d_out, K, 1]
        solved = torch.cholesky_solve(rhs, self.L).squeeze(-1).mT.reshape(along.shape)
        return (X - self.M.back(solved)) / self.damping


def mini_block_rows(io: LayerIO) -> BlocksByRows:
    """The mini-block Fisher without its blocks: the batch itself, and Woodbury's identity.

    Use it for layers with more inputs than there are samples. Not for averages over batches, which
    it does not have.

    Law: the same matrix as `mini_block`.
    Cost: memory of the batch, `N * S * (d_in + V * d_out)`, with `V = 1` for one position; a
    product `2 * N * S * d_out * (d_in + V)` operations; for the inverse see `BlocksByRows.inverse`.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """
    check_not_reduced(io, "The mini-block Fisher")
    return BlocksByRows(_merged(io))
