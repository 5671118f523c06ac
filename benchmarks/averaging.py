"""The three ways in which `benchmarks.training` averages curvature over batches.

A comparison of two matrices must not be one of two averages, so every method whose matrices have an
average is tried with all three.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from kfac_scratch.approximations.estimators import Approximation, Estimator, Latest, MovingAverage
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import LinearMap, Matrix

WINDOW = 5  # batches


@dataclass(frozen=True, eq=False)
class Recent:
    """The weighted mean of the matrices of the last batches, whose parts are kept."""

    parts: tuple[Any, ...]
    shares: tuple[float, ...]
    mean: Any

    def __matmul__(self, V):
        return self.mean @ V

    def inverse(self, damping: float):
        return self.mean.inverse(damping)

    def dense(self):
        return self.mean.dense()


def of_mean(invert: Callable[[Any, float], LinearMap]) -> Callable[[Any, float], LinearMap]:
    """An inverse that takes the mean of a window, and every other matrix as it is."""
    return lambda M, damping: invert(M.mean if isinstance(M, Recent) else M, damping)


@dataclass(frozen=True)
class LastBatches:
    """An estimator: the average over the last batches, and of none before them.

    Law: as long as no batch was dropped, it is `MovingAverage(approximation)`.
    """

    batches: int
    approximation: Approximation

    def update(self, state: Recent | None, io: LayerIO, weight: float) -> Matrix:
        old = () if state is None else state.parts
        shares = () if state is None else tuple((1 - weight) * s for s in state.shares)
        parts = (*old, self.approximation(io))[-self.batches :]
        shares = (*shares, weight)[-self.batches :]
        mean, total = parts[0], shares[0]
        for part, share in zip(parts[1:], shares[1:], strict=True):
            total += share
            mean = mean.mixed(part, share / total)
        return Recent(parts, shares, mean)


AVERAGES: dict[str, Callable[[Approximation], Estimator]] = {
    "newest": Latest,
    "window": partial(LastBatches, WINDOW),
    "moving": MovingAverage,
}
