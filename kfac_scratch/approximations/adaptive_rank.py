r"""RS-KFAC with a rank that follows the spectrum of each factor.

A rank that is chosen in advance is too large for some layers and too small for others. What it
should reach is known after a decomposition: the smallest of the $r$ eigenvalues that were found,
$d_r$, tells what those that were left out are like. So the next decomposition has a few eigenpairs
more if $d_r$ is still more than a fraction of the largest one, and a few less if it is not,

$$
r \leftarrow r + s \quad \text{if } d_r \gt \epsilon\, d_1 , \qquad
r \leftarrow r - s \quad \text{otherwise} .
$$

Source: later code of the author of RS-KFAC, Puiu 2022 (arXiv:2206.15397), whose numbers are the
defaults here:
https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/adaptive_rank_utils.py#L13-L30
There, the rank changes only if the mean of five fractions leaves a band, .026 to .053.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.kfac import kfac_in_full
from kfac_scratch.approximations.randomized import (
    Decomposition,
    Sketch,
    Tail,
    leading,
    rsvd,
    trace_matched,
)
from kfac_scratch.border import check_count, check_function, check_instance
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.factors_and_eigenpairs import FactorsAndEigenpairs
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.low_rank import LowRankKronecker

NextRank = Callable[[Float[Tensor, " r"]], int]


def rank_by_ratio(
    ratio: float = 0.033, step: int = 10, lowest: int = 10, highest: int = 700
) -> NextRank:
    """A step up as long as the smallest kept eigenvalue is too large, and a step down otherwise.

    Use it in `AdaptiveRank`. Not with a damping that is far below `ratio` times the largest
    eigenvalue: eigenvalues that are left out then matter.

    Law: with exact eigenpairs that fall strictly, the rank moves to the number of eigenvalues above
    `ratio` times the largest one, and stays within one step of it.
    Cost: one synchronisation with the device.

    Args:
        ratio: The smallest kept eigenvalue over the largest one at which the rank is right.
        step: How much the rank changes.
        lowest: The lowest rank.
        highest: The highest rank.

    Raises:
        ValueError: If the ratio is not in (0, 1), a count is below 1, or the bounds do not fit.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"The ratio of eigenvalues lies in (0, 1), got {ratio}.")
    check_count("step", step)
    check_count("lowest", lowest)
    check_count("highest", highest, lowest)

    def following(d: Float[Tensor, " r"]) -> int:
        more = bool(d[-1] > ratio * d[0])
        return min(max(len(d) + (step if more else -step), lowest), highest)

    return following


@dataclass(frozen=True)
class AdaptiveRank:
    """RS-KFAC whose ranks follow the spectra: an estimator.

    The factors are averaged with every batch. Every `period` batches their eigenpairs are computed
    anew, as many as `following` makes of those of the last time. Each factor has a rank of its own.

    Use it as `approximation=` of an optimizer, for layers of different widths and spectra, with
    `period` updates to an inversion. Not where inversions are rarer than `period` says: then
    decompositions are made that no inverse uses, and `randomized` makes none of them.

    Law: right after a decomposition, it is `randomized` with the same ranks; the rank of a factor
    never exceeds its size.
    Cost: that of `kfac` for each batch, and every `period` batches that of `Sketch` with the ranks
    so far; memory that of `randomized`, and the eigenpairs.

    Attributes:
        sketch: The rank at the start, and the other sizes of all decompositions.
        following: From the eigenvalues of a factor, descending, to its next rank.
        period: Batches from one decomposition to the next.
        decomposition: `rsvd`, `srevd` or `nystrom`.
        tail: The rule for all other eigenvalues.

    Raises:
        ValueError: If the period is below 1.
    """

    sketch: Sketch = field(default_factory=Sketch)
    following: NextRank = field(default_factory=rank_by_ratio)
    period: int = 1
    decomposition: Decomposition = rsvd
    tail: Tail = trace_matched

    def __post_init__(self) -> None:
        check_instance("sketch", self.sketch, Sketch, "Sketch(rank=64)")
        check_function("following", self.following, "following=rank_by_ratio(0.033)")
        check_count("period", self.period)
        check_function("decomposition", self.decomposition, "decomposition=srevd")
        check_function("tail", self.tail, "tail=smallest_kept")

    def update(
        self, state: FactorsAndEigenpairs | None, io: LayerIO, weight: float
    ) -> FactorsAndEigenpairs:
        """The factors' average with one more batch, whose share is `weight`, and the eigenpairs."""
        new = kfac_in_full(io)
        if state is None:
            rank = self.sketch.rank
            return FactorsAndEigenpairs(new, self._decomposed(new, rank, rank), 1)
        factors, modes = state.factors.mixed(new, weight), state.modes
        if state.count % self.period == 0:
            ranks = self.following(modes.dA), self.following(modes.dB)
            modes = self._decomposed(factors, *ranks)
        return FactorsAndEigenpairs(factors, modes, state.count + 1)

    def _decomposed(self, factors: Kronecker, rank_A: int, rank_B: int) -> LowRankKronecker:
        return LowRankKronecker(
            *self._truncated(factors.A, rank_A), *self._truncated(factors.B, rank_B)
        )

    def _truncated(
        self, M: Float[Tensor, "d d"], rank: int
    ) -> tuple[Float[Tensor, "d r"], Float[Tensor, " r"], Float[Tensor, ""]]:
        check_count("The rank that following=... returns", rank)
        d, U = leading(M, replace(self.sketch, rank=rank), self.decomposition)
        return U, d, self.tail(d, M.trace(), len(M))
