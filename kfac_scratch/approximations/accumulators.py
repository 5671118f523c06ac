r"""Accumulators: from the parts of a data set to the matrix of all of it.

A data set arrives in batches, and a batch in parts: some vectors at a time, all with the same
inputs. Every part is a `LayerIO` whose vectors belong to the *sum* of the loss's terms. An
accumulator adds the parts up and divides once, at the end, so that batches of unequal size count
by their terms. Law of both accumulators here: they give what one batch with all samples would give.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §3: factors are expectations over the data.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from inspect import isclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.kfac import tied_sum
from kfac_scratch.border import check_function, check_result
from kfac_scratch.layer_io import LayerIO, TiedIO, concatenate
from kfac_scratch.linalg import gram
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.one_hot import OneHot

M = TypeVar("M", bound=Matrix)
M_co = TypeVar("M_co", bound=Matrix, covariant=True)
GatheredBatches = tuple[tuple[LayerIO, ...], ...]
"""The parts of every batch of a layer, all parts of a batch with the same `a`."""


@runtime_checkable
class Accumulator(Protocol[M_co]):
    """A rule that makes one matrix of a layer from the parts of many batches.

    Use one with `over_loader`. Not in training, where an `Estimator` forgets old batches.

    Cost: see `FactorSums` and `Gathered`.
    """

    def add(self, state: Any, io: LayerIO) -> Any:
        """The state after the first part of one more batch, with its inputs.

        Args:
            state: The state so far; None before the first batch.
            io: The part. Its vectors belong to the sum of the loss's terms.
        """
        ...

    def add_vectors(self, state: Any, g: Any) -> Any:
        """The state after further vectors `[V, N, S, d_out]` of the last batch.

        It has their inputs already. For a `TiedIO` they are a pair, one of each part.
        """
        ...

    def matrix(self, state: Any, divisor: float) -> M_co:
        """The matrix of all samples, for a loss that is the sum of its terms over `divisor`.

        It may use the state's memory, so that the state is not used again.
        """
        ...


@dataclass(frozen=True)
class Gathered(Generic[M_co]):
    """Any approximation of all batches, joined to one `LayerIO` at the end.

    Use it for approximations that are no sums over samples: EKFAC, KPSVD. Not for KFAC, which
    `FactorSums` gives in bounded memory, and not for data sets that do not fit into memory.

    Cost: memory `N * S * (d_in + V * d_out)` for `N` samples in all, and the approximation once.

    Args:
        approximation: From a `LayerIO` to a matrix.
    """

    approximation: Callable[[LayerIO], M_co]

    def __post_init__(self) -> None:
        check_function("approximation", self.approximation, "approximation=ekfac or FactorSums()")

    def add(self, state: GatheredBatches | None, io: LayerIO) -> GatheredBatches:
        """The batches with one more.

        Raises:
            ValueError: If a layer meets another number of positions than before.
        """
        if state is None:
            return ((io,),)
        before, now = state[-1][0].a.shape[1], io.a.shape[1]
        if before != now:
            raise ValueError(
                f"A layer met {before} positions in one batch and {now} in another, which cannot "
                "be joined: pass batches of one length, or FactorSums(), which takes any. "
                "Approximations of KFAC's factors take flavour=REDUCE, too."
            )
        return (*state, (io,))

    def add_vectors(
        self, state: GatheredBatches, g: Float[Tensor, "V N S d_out"]
    ) -> GatheredBatches:
        """The batches with more vectors of the last one."""
        *others, last = state
        return (*others, (*last, replace(last[0], g=g)))

    def matrix(self, state: GatheredBatches, divisor: float) -> M_co:
        """The approximation of all batches together, whose parts are joined here."""
        ios = [replace(io, g=torch.cat([part.g for part in (io, *more)])) for io, *more in state]
        M = self.approximation(concatenate(ios, [1 / divisor] * len(ios)))
        check_result("approximation", M, Matrix, "a Matrix")
        return M


@dataclass(frozen=True)
class FactorSums:
    """KFAC of all batches, by running sums of `a a^T` and `g g^T`.

    Use it for KFAC over a whole data set of any size. Not for other approximations, whose factors
    are no such sums.

    Cost: that of `kfac` for each part; memory `d_in**2 + d_out**2`, for an embedding `d_in`.
    """

    def add(self, state: "RunningFactors | TiedFactors | None", io: LayerIO) -> Any:
        """The sums with the outer products of a batch's inputs and of its first vectors."""
        if isinstance(io, TiedIO):
            before = state if isinstance(state, TiedFactors) else TiedFactors(None, None)
            return TiedFactors(
                self.add(before.direct, io.direct), self.add(before.turned, io.turned)
            )
        assert not isinstance(state, TiedFactors)
        A = io.a.counts() if isinstance(io.a, OneHot) else gram(io.a)
        B = gram(io.g.flatten(0, 1))
        if state is None:
            return RunningFactors(A, B, io.rows)
        return RunningFactors(A.add_(state.A), B.add_(state.B), state.rows + io.rows)

    def add_vectors(self, state: "RunningFactors | TiedFactors", g: Any) -> Any:
        """The sums with the outer products of more vectors of the last batch."""
        if isinstance(state, TiedFactors):
            parts = zip((state.direct, state.turned), g, strict=True)
            return TiedFactors(*(self.add_vectors(*part) for part in parts))
        return replace(state, B=gram(g.flatten(0, 1)).add_(state.B))

    def matrix(
        self, state: "RunningFactors | TiedFactors", divisor: float
    ) -> Kronecker | DiagonalKronecker | KroneckerSum:
        """`kfac` of all parts together, in the memory of the sums."""
        if isinstance(state, TiedFactors):
            return tied_sum(state.direct.product(divisor), state.turned.product(divisor))
        return state.product(divisor)


@dataclass(frozen=True, eq=False)
class RunningFactors:
    """Sums of `a a^T` and `g g^T` over all parts so far, and the number of rows `a`.

    Of one-hot rows, `A` is the diagonal of the sum, which has no other entries.
    """

    A: Float[Tensor, "d_in ..."]
    B: Float[Tensor, "d_out d_out"]
    rows: int | Tensor

    def product(self, divisor: float) -> Kronecker | DiagonalKronecker:
        """The product of both factors, in the memory of the sums."""
        if self.A.ndim == 1:
            return DiagonalKronecker(self.A.div_(self.rows), self.B.div_(divisor))
        return Kronecker(self.A.div_(self.rows), self.B.div_(divisor))


@dataclass(frozen=True, eq=False)
class TiedFactors:
    """The sums of both parts of a `TiedIO`."""

    direct: Any
    turned: Any


def accumulator(approximation: Callable[[LayerIO], M] | Accumulator[M]) -> Accumulator[M]:
    """An accumulator as it is; a function of one `LayerIO` by gathering everything for it."""
    if isinstance(approximation, Accumulator) and not isclass(approximation):
        return approximation
    return Gathered(approximation)
