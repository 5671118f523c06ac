"""From the data loaders of all ranks to KFAC of their data together.

Source: Osawa et al. 2019 (arXiv:1811.12019), §4, for factors that are added up over ranks.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Unpack

from torch import Tensor
from torch.nn import Module

from kfac_scratch.approximations.accumulators import FactorSums, RunningFactors, TiedFactors
from kfac_scratch.data_loader import LoaderOptions, over_loader
from kfac_scratch.distributed.packing import from_triangle, upper_triangle
from kfac_scratch.distributed.ranks import Ranks
from kfac_scratch.losses import BackpropagatedVectors, type2
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import KroneckerSum


def kfac_over_ranks(
    ranks: Ranks,
    model: Module,
    loss: Module,
    data: Iterable[tuple[Any, Tensor]],
    fisher: BackpropagatedVectors = type2,
    **options: Unpack[LoaderOptions],
) -> dict[str, Kronecker | DiagonalKronecker | KroneckerSum]:
    """KFAC of every block over the data of all ranks, on every rank.

    Use it as `kfac_over`, where each rank has a part of the data: in any number of batches, of any
    size. Every rank has the same model. Not for Fishers that draw labels from one seed on all
    ranks: give each rank a generator of its own.

    Law: equal to `kfac_over` of all data in one process.
    Cost: that of `kfac_over` for the data here, and one collective of half of all factors.

    Args:
        ranks: The ranks, `Ranks()`.
        model: The module.
        loss: The loss of one batch.
        data: The batches here.
        fisher: The vectors that are sent backward.
        options: As `over_loader`.

    Raises:
        ValueError: As `over_loader`, on all ranks, naming the one where it happened.
        RuntimeError: If a rank is lost.
    """
    with ranks.together("kfac_over_ranks"):
        here = over_loader(_Unfinished(), model, loss, data, fisher, **options)
    factors = [part for state, _ in here.values() for part in _parts(state)]
    divisors = [factors[0].B.new_tensor(divisor) for _, divisor in here.values()]
    numbers = [part.B.new_tensor(float(part.rows)) for part in factors]
    packed = [t for part in factors for t in (_half(part.A), upper_triangle(part.B))]
    sums = iter(ranks.summed("factors of the data", [*packed, *numbers, *divisors]))
    wholes = [(next(sums), next(sums)) for _ in factors]
    joint = iter(
        RunningFactors(_whole(A, part.A), from_triangle(B, len(part.B)), next(sums))
        for part, (A, B) in zip(factors, wholes, strict=True)
    )
    states = {
        name: TiedFactors(next(joint), next(joint))
        if isinstance(state, TiedFactors)
        else next(joint)
        for name, (state, _) in here.items()
    }
    is_mean = getattr(loss, "reduction", None) == "mean"
    totals = [float(next(sums)) if is_mean else 1.0 for _ in here]
    return {
        name: FactorSums().matrix(state, total)
        for (name, state), total in zip(states.items(), totals, strict=True)
    }


@dataclass(frozen=True)
class _Unfinished(FactorSums):
    """Sums over the data here that are not divided yet."""

    def matrix(self, state: Any, divisor: float) -> Any:
        """The sums, and what a mean would divide them by."""
        return state, divisor


def _parts(state: RunningFactors | TiedFactors) -> list[RunningFactors]:
    return [state.direct, state.turned] if isinstance(state, TiedFactors) else [state]


def _half(A: Tensor) -> Tensor:
    return A if A.ndim == 1 else upper_triangle(A)


def _whole(sent: Tensor, like: Tensor) -> Tensor:
    return sent if like.ndim == 1 else from_triangle(sent, len(like))
