r"""SKFAC: KFAC by the rows of a batch, without a square matrix of a factor's size.

KFAC's factors are sums of outer products, $A$ of the $N S$ scaled inputs and $B$ of the $V N S$
vectors. Stored as these columns, they are multiplied and inverted at a cost that is linear in the
sizes of the layer (`kronecker_columns`). To have few columns, a convolution sums over its positions
(`reduce_sum`), or leaves out most of them (`spatial_subsampling`): the two methods that the paper
names. The average over a few batches has few columns, too (`Window`).

Source: Tang et al. 2021 (CVPR), who invert the damped factors of one batch. Of the paper, the
abstract and its authors' code (github.com/fL0n9/SKFAC-MindSpore, commit aca020f) were read. The
exact inverse of the damped product, the window, and one step for the batch's own gradient are
additions.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from kfac_scratch.border import check_count, check_function
from kfac_scratch.layer_io import LayerIO, check_not_reduced
from kfac_scratch.matrices.kronecker_columns import (
    FactoredWoodburyInverse,
    KroneckerColumns,
    gram_root,
    reduced_columns,
)
from kfac_scratch.matrices.low_rank import FourBlocks


def skfac(io: LayerIO) -> KroneckerColumns:
    """SKFAC: KFAC's factors, stored as the columns whose outer products they sum.

    Use it for wide layers and small batches, with the paper's inverse `factored_inverse`.
    Not for averages over many batches: use `Window` for a few. Not for convolutions as they are:
    pass `reduce_sum(io)` or `spatial_subsampling(io, stride)`. In the optimizer, this is
    `approximation=Window(5, lambda io: skfac(reduce_sum(io)))`.

    Law: `skfac(io).dense() == kfac(io).dense()`.
    Cost: memory `d_in * min(N * S, d_in) + d_out * min(V * N * S, d_out)`. A factor with more
    columns than rows costs a QR decomposition; otherwise the inputs are scaled, and that is all.
    """
    a = io.a.flatten(0, 1) / io.rows**0.5
    return KroneckerColumns(reduced_columns(a.mT), reduced_columns(io.g.flatten(0, 2).mT))


def reduce_sum(io: LayerIO) -> LayerIO:
    """SKFAC's "reduce sum": one row for each sample, the mean of its inputs and the sum of vectors.

    Use it for convolutions whose outputs are averaged over positions in the end. Not where the
    positions of a sample receive very different vectors.

    Law: KFAC of it is KFAC-reduce; it is `io.reduced()`. A sum of inputs in place of the mean
    multiplies `A` by `S` squared, which is a matter of the damping.
    Cost: memory `N * (d_in + V * d_out)`; `flavour=REDUCE` gives the same without the rows of a
    convolution.
    """
    return io.reduced()


def mean_over_positions(io: LayerIO) -> LayerIO:
    """The layer with the mean of its inputs and the mean of its vectors over positions.

    Use it to reproduce the code of SKFAC's authors, where it is the only reduction:
    https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/skfac_layer.py#L166
    Not with a damping that was chosen for `reduce_sum`: the vectors are those of `reduce_sum(io)`
    divided by `S`, so that the curvature is divided by `S` squared.

    Cost: memory `N * (d_in + V * d_out)`.
    """
    reduced = io.reduced()
    S = io.a.shape[1] if io.counted is None else io.counted.sum(1).clamp(min=1)[:, None, None]
    return replace(reduced, g=reduced.g / S)


def spatial_subsampling(
    io: LayerIO, stride: int, start: tuple[int, int] = (0, 0), height: int | None = None
) -> LayerIO:
    """SKFAC's "spatial subsampling": every `stride`-th row and column of a grid of positions.

    Use it for convolutions of images, whose number of columns it divides by `stride` squared. Not
    for sequences, which have no second axis: `subsampled` is for these. A layer with one position,
    such as a linear one, stays as it is.

    Law: as `at_positions`; the factors of the `stride**2` parts of a grid that `stride` divides
    average to those of all positions.
    Cost: memory of the rows that are kept.

    Args:
        io: The layer, with positions row by row.
        stride: The distance of two rows, and of two columns, that are kept.
        start: The first row and the first column.
        height: The number of rows. Default: as many as columns, which suits square images.

    Raises:
        ValueError: If the positions fill no such grid, nothing is left, or the stride is not
            positive.
    """
    S = io.a.shape[1]
    rows = isqrt(S) if height is None else height
    if rows < 1 or S % rows or (height is None and rows**2 != S):
        raise ValueError(
            f"{S} positions are no grid of {rows} rows: pass height=, the rows of the layer's "
            "output, or use subsampled for positions that are no image."
        )
    within = 0 <= start[0] < rows and 0 <= start[1] < S // rows
    if stride < 1 or not within:
        raise ValueError(
            f"stride={stride} from {start} on keeps none of {rows} × {S // rows} positions."
        )
    grid = torch.arange(S, device=io.a.device).reshape(rows, -1)
    return at_positions(io, grid[start[0] :: stride, start[1] :: stride].flatten())


def subsampled(io: LayerIO, stride: int, start: int = 0) -> LayerIO:
    """The layer at every `stride`-th position of the flat axis `S`, from `start` on.

    Use it to shorten sequences for `skfac`. Not for images: the flat axis runs along their rows, so
    that a stride that divides the width keeps whole columns. There, use `spatial_subsampling`. For
    other patterns, `at_positions` takes any list.

    Law: as `at_positions`. Cost: memory of the rows that are kept.

    Raises:
        ValueError: If no position is left, or the stride is not positive.
    """
    S = io.a.shape[1]
    if stride < 1 or not 0 <= start < S:
        raise ValueError(f"stride={stride} from {start} on keeps none of the {S} positions.")
    return at_positions(io, torch.arange(start, S, stride, device=io.a.device))


def at_positions(io: LayerIO, positions: Int[Tensor, " T"]) -> LayerIO:
    """The layer at some positions, with vectors scaled so that these count for all.

    Vectors are multiplied by the root of `S` over the number of positions that are kept. `A` is a
    mean and needs no scale. Law: the factors of the parts of an equal partition average to those of
    all positions. Not for approximations of the gradients of samples, which the gradients of some
    positions are not.
    """
    grow = (io.a.shape[1] / len(positions)) ** 0.5
    counted = None if io.counted is None else io.counted[:, positions]
    return replace(io, a=io.a[:, positions], g=grow * io.g[:, :, positions], counted=counted)


def push_through(
    io: LayerIO, c: Float[Tensor, "V N"], damping_A: float, damping_B: float
) -> Float[Tensor, "d_out d_in"]:
    r"""The step for the gradient `sum_{v,n} c[v, n] G[v, n]` of the batch itself.

    It equals `inverse_of_damped_factors(skfac(io), damping_A, damping_B) @ gradient`, without a
    division by the dampings: $(U U^\top + \gamma I)^{-1} U = U (U^\top U + \gamma I)^{-1}$ on both
    sides. Use it for the gradient of the same batch and labels only.

    Cost: with `K = V * N * S` columns, `O((d_in + d_out) * K**2 + K**3)` operations, memory `K**2`.

    Raises:
        ValueError: If a damping is not positive, or is lost in round-off; if rows stand for several
            positions (`flavour=REDUCE`): the gradient of a sample is not in them.
    """
    check_not_reduced(io, "The step for a batch's own gradient")
    S = io.a.shape[1]
    a, g = io.a.flatten(0, 1), io.g.flatten(0, 2)  # [NS, d_in], [VNS, d_out]
    between = torch.cholesky_inverse(gram_root(a.mT / io.rows**0.5, damping_A))  # [NS, NS]
    between = c.repeat_interleave(S, dim=1).unsqueeze(2) * between  # [V, NS, NS]
    between = torch.cholesky_solve(between.flatten(0, 1), gram_root(g.mT, damping_B))
    return g.mT @ between @ a


# ---- several batches ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RecentBatches:
    """`B ⊗ A`, both factors a weighted mean over the last batches, stored as their columns.

    Attributes:
        UA: Columns of every batch, the oldest first; padded with zeros, which add nothing.
        UB: Columns of every batch likewise.
        shares: Weight of every batch, up to a common scale.
    """

    UA: Float[Tensor, "T d_in KA"]
    UB: Float[Tensor, "T d_out KB"]
    shares: Float[Tensor, " T"]

    def columns(self) -> KroneckerColumns:
        """All columns side by side, scaled by the root of their batch's share."""
        root = (self.shares / self.shares.sum()).sqrt().reshape(-1, 1, 1)
        UA, UB = ((root * U).movedim(0, 1).flatten(1) for U in (self.UA, self.UB))
        return KroneckerColumns(reduced_columns(UA), reduced_columns(UB))

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B V A`."""
        return self.columns() @ V

    def inverse(self, damping: float) -> FourBlocks:
        """The inverse of `B ⊗ A + damping * I`, exact."""
        return self.columns().inverse(damping)

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        return self.columns().mean_eigenvalues()

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        return self.columns().largest_eigenvalues()

    def inverse_of_damped_factors(
        self, damping_A: float, damping_B: float
    ) -> FactoredWoodburyInverse:
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`."""
        return self.columns().inverse_of_damped_factors(damping_A, damping_B)

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.columns().dense()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.columns().diagonal()


@dataclass(frozen=True)
class Window:
    """An estimator: both of KFAC's factors averaged over the last batches, as columns.

    Use it for SKFAC in training with `Window(batches)`. Not for long averages: with `T` batches the
    systems are `T` times as large, and `MovingAverage(kfac)` soon costs less.

    Law: as long as no batch was dropped, it is `MovingAverage(kfac)`, whose factors are never
    formed. Afterwards, it is the average of the remaining batches with the same relative weights.
    Cost: memory `T` times that of one batch's columns.

    Attributes:
        batches: The number `T` of batches that are kept.
        approximation: From a batch to its columns.

    Raises:
        ValueError: From `update`, if fewer than 1 batch is kept.
    """

    batches: int
    approximation: Callable[[LayerIO], KroneckerColumns] = skfac

    def __post_init__(self) -> None:
        check_count("batches", self.batches)
        check_function("approximation", self.approximation, "approximation=skfac")

    def update(self, state: Any, io: LayerIO, weight: float) -> RecentBatches:
        """The columns with those of a new batch, and without the oldest beyond the window.

        `weight` is the share of the new batch; the shares of the old ones are multiplied by
        `1 - weight`.
        """
        new = self.approximation(io)
        share = new.UA.new_tensor([weight])
        if state is None:
            return RecentBatches(new.UA.unsqueeze(0), new.UB.unsqueeze(0), share)
        return RecentBatches(
            _appended(state.UA, new.UA)[-self.batches :],
            _appended(state.UB, new.UB)[-self.batches :],
            torch.cat([(1 - weight) * state.shares, share])[-self.batches :],
        )


def _appended(old: Float[Tensor, "T d K"], new: Float[Tensor, "d k"]) -> Float[Tensor, "T1 d Kmax"]:
    K = max(old.shape[2], new.shape[1])
    return torch.cat([pad(U, (0, K - U.shape[2])) for U in (old, new.unsqueeze(0))])
