r"""Brand new K-FACs: eigenpairs of KFAC's factors, updated with every batch, without the factors.

A batch of $K$ rows changes a factor by a matrix of rank $K$. If the factor is known as
$U \operatorname{diag}(d)\, U^\top + c\, (I - U U^\top)$ with $r$ columns, the eigenpairs of

$$
(1 - w) \bigl(U \operatorname{diag}(d)\, U^\top + c\, (I - U U^\top)\bigr) + w X X^\top
$$

are those of a matrix with $r + K$ rows, rotated. This update is exact, at a cost of
$\mathcal{O}(d (r + K)^2)$. The only error is the truncation to $r$ eigenpairs before the next
batch. There are three algorithms: `Brand()` (B-KFAC), and two that also keep the factors,
`Repaired(brand, refreshed(sketch), period)` (B-R-KFAC) and `Repaired(brand, corrected(), period)`
(B-KFAC-C). Each is an `approximation=` of the optimizer.

Sources: Puiu 2022 (arXiv:2210.08494); the update is that of `low_rank_update`. "The author's code"
is github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs at 74bac50, of the author's
thesis: in `solvers/solver_utils`, line 3 of `Brand_S_subroutine.py` and line 2 of
`solver_LA_utils.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.kfac import kfac_in_full
from kfac_scratch.approximations.randomized import Randomized, Sketch, Tail, trace_matched
from kfac_scratch.border import check_count, check_function, check_instance
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import psd_eigh
from kfac_scratch.matrices.damping import relative_factored_inverse
from kfac_scratch.matrices.factors_and_eigenpairs import FactorsAndEigenpairs
from kfac_scratch.matrices.low_rank import LowRankKronecker
from kfac_scratch.matrices.low_rank_update import brand_update
from kfac_scratch.matrices.matrix import LinearMap, Matrix

TruncatedFactor = tuple[Float[Tensor, "d _"], Float[Tensor, " _"], Float[Tensor, ""]]  # U, d, c


# ---- one factor ---------------------------------------------------------------------------------


def truncated(factor: TruncatedFactor, rank: int, tail: Tail) -> TruncatedFactor:
    """The factor with its leading eigenpairs only; the others become part of the tail."""
    U, d, c = factor
    if len(d) <= rank:
        return factor
    trace = d.sum() + c * (len(U) - len(d))
    return U[:, :rank], d[:rank], tail(d[:rank], trace, len(U))


def is_low_rank_update(size: int, pairs: int, columns: int) -> bool:
    """Whether the next update of a factor is the low-rank one: pairs and columns fit into the size.

    Use it to choose a rank and a batch for `Brand`, which asks it at every update. Not as a proof
    of what a run did: for that, count the calls of `brand_update` and `updated_in_full` in this
    module.

    Law: once a factor has `rank` eigenpairs or more, it is `rank + columns <= size`. Until then it
    has those of all its batches, so that the first updates may be of low rank and the others not.
    Cost: none.

    Args:
        size: The number of rows of the factor: `d_in`, with the bias, or `d_out`.
        pairs: The eigenpairs that the factor has after truncation: `rank` at most.
        columns: The columns that a batch adds: `N * S` for `A`, `V * N * S` for `B`.
    """
    return pairs + columns <= size


def updated_factor(
    factor: TruncatedFactor, X: Float[Tensor, "d K"], weight: float, rank: int, tail: Tail
) -> TruncatedFactor:
    """The eigenpairs of `(1 - weight)` times the truncated factor plus `weight * X X^T`.

    By `brand_update` where `is_low_rank_update` says so. A factor that is too small for that is not
    truncated: see `updated_in_full`.
    """
    U, d, c = truncated(factor, rank, tail)
    if not is_low_rank_update(len(U), len(d), X.shape[1]):
        return updated_in_full(factor, X, weight)
    c = (1 - weight) * c
    U, d = brand_update(U, (1 - weight) * d - c, weight**0.5 * X)
    return U, (d + c).clamp(min=0), c


def updated_in_full(
    factor: TruncatedFactor, X: Float[Tensor, "d K"], weight: float
) -> TruncatedFactor:
    """The same update by an eigendecomposition of the whole factor, as KFAC has it.

    Law: nothing is lost; all eigenpairs are kept, and there is no tail.
    Cost: `O(d**3)` operations, memory `d**2`.
    """
    U, d, c = factor
    M = (1 - weight) * (U * (d - c) @ U.mT) + weight * (X @ X.mT)
    M.diagonal().add_((1 - weight) * c)
    d, U = psd_eigh(M)
    return U.flip(1), d.flip(0), torch.zeros_like(c)


# ---- B-KFAC -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Brand:
    """B-KFAC: an estimator that keeps `rank` eigenpairs of each factor from batch to batch.

    Use it for fully connected layers much wider than `rank` plus the number of columns of a batch:
    `N * S` for `A`, `V * N * S` for `B`. Not for convolutions: with many positions or vectors, the
    columns reach the size of a factor, which is then decomposed in full at every update, and the
    method is KFAC. `is_low_rank_update` tells the two cases apart.

    Law: without truncation, the factors are the moving averages of KFAC's; with `trace_matched`,
    their traces always are. The tail is a part of the matrix that is updated, so that the excess of
    `smallest_kept` over the eigenvalues that were cut off adds up. The author's code has no tail
    (`zero_tail`).
    Cost: with `K` columns, `O(d * (rank + K)**2)` operations and memory `d * (rank + K)` for a
    factor of size `d`.

    Attributes:
        rank: Eigenpairs at the start of an update; the state has up to `K` more.
        tail: The rule for the eigenvalues that are cut off.

    Raises:
        ValueError: If the rank is below 1.
    """

    rank: int = 64
    tail: Tail = trace_matched

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_function("tail", self.tail, "tail=trace_matched")

    def update(
        self, state: LowRankKronecker | None, io: LayerIO, weight: float
    ) -> LowRankKronecker:
        """Both factors after one more batch, whose share is `weight`; the old have `1 - weight`."""
        a, g = io.a.flatten(0, 1), io.g.flatten(0, 2)
        if state is None:
            state, weight = zero_factors(io), 1.0
        A, B = (state.UA, state.dA, state.cA), (state.UB, state.dB, state.cB)
        return LowRankKronecker(
            *updated_factor(A, (a / io.rows**0.5).mT, weight, self.rank, self.tail),
            *updated_factor(B, g.mT, weight, self.rank, self.tail),
        )


def zero_factors(io: LayerIO) -> LowRankKronecker:
    """No eigenpairs and no tail: zero factors of a layer's sizes."""
    zero = io.a.new_zeros(())
    (dA, UA), (dB, UB) = ((x.new_zeros(0), x.new_zeros(x.shape[-1], 0)) for x in (io.a, io.g))
    return LowRankKronecker(UA, dA, zero, UB, dB, zero)


def product_of_rows(
    M: LowRankKronecker, g: Float[Tensor, "K d_out"], a: Float[Tensor, "K d_in"]
) -> tuple[Float[Tensor, "K d_out"], Float[Tensor, "K d_in"]]:
    """Rows `(h, b)` with `h.T @ b == M @ (g.T @ a)`: a factored gradient stays factored.

    Cost: `2 * K * (d_out * rB + d_in * rA)` operations, linear in the widths, where the product
    with `g.T @ a` is quadratic. To form `h.T @ b` costs as much as to form the gradient.
    """
    h = M.cB * g + ((g @ M.UB) * (M.dB - M.cB)) @ M.UB.mT
    b = M.cA * a + ((a @ M.UA) * (M.dA - M.cA)) @ M.UA.mT
    return h, b


@dataclass(frozen=True)
class ContinuedInverse:
    """An `invert=` for Brand new K-FACs without a tail: at every inverse the spectrum goes on.

    All directions without eigenpair get the smallest eigenvalue that there is, for the inverse
    only. `KFAC(..., approximation=Brand(220, zero_tail), invert=ContinuedInverse(), damping=0.1)`
    has the tail and the damping of the author's code, with the fraction 0.1.

    Use it to reproduce that code. Not with a tail of the updates, which it replaces: in chapter 19
    `trace_matched` is the more accurate one. Where a batch adds fewer directions than columns, that
    code keeps pairs with eigenvalues about 0, and continues with these; `Brand` keeps none.

    Law: of exact eigenpairs, it is at least every eigenvalue that was left out.
    Cost: that of `invert`.

    Attributes:
        invert: From the `LowRankKronecker` with that tail and a damping to the inverse.

    Raises:
        TypeError: If the matrix is no state of `Brand` or `Repaired`.
    """

    invert: Callable[[LowRankKronecker, float], LinearMap] = relative_factored_inverse

    def __post_init__(self) -> None:
        check_function("invert", self.invert, "invert=factored_inverse")

    def __call__(self, M: Matrix, damping: float) -> LinearMap:
        """The inverse of the matrix with another tail."""
        modes = M.modes if isinstance(M, FactorsAndEigenpairs) else M
        if not isinstance(modes, LowRankKronecker):
            raise TypeError(
                f"ContinuedInverse inverts eigenpairs of Brand or Repaired, not a "
                f"{type(M).__name__}: for randomized, use SketchedInverse(tail=smallest_kept)."
            )
        cA, cB = (d[-1] if len(d) else c for d, c in ((modes.dA, modes.cA), (modes.dB, modes.cB)))
        return self.invert(replace(modes, cA=cA, cB=cB), damping)


# ---- B-R-KFAC and B-KFAC-C ----------------------------------------------------------------------


@dataclass(frozen=True)
class Repaired:
    """B-R-KFAC and B-KFAC-C: B-KFAC whose eigenpairs are repaired from the dense factors at times.

    Use it where B-KFAC's truncation loses too much. Not where dense factors do not fit into memory,
    which is what `Brand` is for.

    Cost: that of `brand` and `kfac` for each batch, and of `repair` every `period` batches; memory
    `d_in**2 + d_out**2` more than `Brand`.

    Attributes:
        brand: The update with every batch.
        repair: The repair after every `period`-th update: `refreshed(...)` or `corrected(...)`.
        period: Batches from one repair to the next.

    Raises:
        ValueError: If the period is below 1.
    """

    brand: Brand
    repair: Callable[[FactorsAndEigenpairs], LowRankKronecker]
    period: int

    def __post_init__(self) -> None:
        check_instance("brand", self.brand, Brand, "Brand(rank=64)")
        check_function("repair", self.repair, "repair=corrected(fraction=0.2)")
        check_count("period", self.period)

    def update(
        self, state: FactorsAndEigenpairs | None, io: LayerIO, weight: float
    ) -> FactorsAndEigenpairs:
        """The factors' average and the eigenpairs after one more batch, whose share is `weight`."""
        new = kfac_in_full(io)
        if state is None:
            now = FactorsAndEigenpairs(new, self.brand.update(None, io, weight), 1)
        else:
            modes = self.brand.update(state.modes, io, weight)
            now = FactorsAndEigenpairs(state.factors.mixed(new, weight), modes, state.count + 1)
        return now if now.count % self.period else replace(now, modes=self.repair(now))


def refreshed(
    sketch: Sketch, tail: Tail = trace_matched
) -> Callable[[FactorsAndEigenpairs], LowRankKronecker]:
    """B-R-KFAC's repair: RS-KFAC of the averaged factors replaces all eigenpairs.

    Use it in `Repaired`, where most of the spectrum has drifted. Not for a few wrong eigenpairs,
    which `corrected` repairs for less.

    Cost: that of `sketch` for both factors.
    """

    def repair(state: FactorsAndEigenpairs) -> LowRankKronecker:
        return Randomized(state.factors.A, state.factors.B, sketch).low_rank(tail=tail)

    return repair


def corrected(
    fraction: float = 0.2, seed: int = 0
) -> Callable[[FactorsAndEigenpairs], LowRankKronecker]:
    """B-KFAC-C's repair: a random part of the eigenpairs becomes Ritz pairs of the factors.

    Use it in `Repaired`, for eigenvalues and rotations within the span of the eigenvectors. Not for
    directions that the truncation has lost: the span stays the same, `refreshed` replaces it.

    Law: the Frobenius error of a factor never grows. The error within the span of the chosen
    eigenvectors becomes zero.
    Cost: with `s = fraction * r + 1` eigenpairs, `O(d**2 * s + d * s**2)` operations for a factor.

    Args:
        fraction: The part of the eigenpairs that is corrected.
        seed: The seed of the choice. The number of batches so far is added, so that every repair
            chooses anew, and every run the same.

    Raises:
        ValueError: If the fraction is not in [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"The fraction of corrected eigenpairs lies in [0, 1], got {fraction}.")

    def repair(state: FactorsAndEigenpairs) -> LowRankKronecker:
        generator = torch.Generator(state.modes.UA.device).manual_seed(seed + state.count)
        K, M = state.factors, state.modes
        dA, UA = ritz(K.A, M.dA, M.UA, _subset(M.dA, fraction, generator))
        dB, UB = ritz(K.B, M.dB, M.UB, _subset(M.dB, fraction, generator))
        return replace(M, UA=UA, dA=dA, UB=UB, dB=dB)

    return repair


def ritz(
    M: Float[Tensor, "d d"], d: Float[Tensor, " r"], U: Float[Tensor, "d r"], chosen: Tensor
) -> tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]:
    """All eigenpairs, sorted, with Ritz pairs of `M` in the span of the chosen ones for these."""
    mu, W = psd_eigh(U[:, chosen].mT @ M @ U[:, chosen], M.diagonal().amax())
    d = d.index_copy(0, chosen, mu)
    U = U.index_copy(1, chosen, U[:, chosen] @ W)
    d, order = d.sort(descending=True)
    return d, U[:, order]


def _subset(d: Tensor, fraction: float, generator: torch.Generator) -> Tensor:
    size = min(round(fraction * len(d) + 1), len(d))
    return torch.randperm(len(d), generator=generator, device=d.device)[:size]
