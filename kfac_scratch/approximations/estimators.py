r"""Estimators: papers that remember. From one batch after another to one matrix.

An approximation sees one batch. Training averages over batches with exponentially decaying
weights, and every update is a weighted mean of the state so far and the batch:

$$
M_t = (1 - w_t)\, M_{t-1} + w_t \hat M_t , \qquad w_t = \frac{1 - \rho}{1 - \rho^t} .
$$

The first weight is 1, so that nothing needs a start value, and $M_t$ is the bias-corrected average
$\sum_i \rho^{t-i} \hat M_i / \sum_i \rho^{t-i}$. The state is the matrix itself, a value.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §5 (moving averages of factors); the bias
correction is that of Kingma and Ba 2015 (arXiv:1412.6980), §3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import Matrix

Approximation = Callable[[LayerIO], Matrix]
"""A paper as a function: from a layer on a batch to a matrix that approximates its block."""


@runtime_checkable
class Estimator(Protocol):
    """How a matrix follows a stream of batches."""

    def update(self, state: Any, io: LayerIO, weight: float) -> Matrix:
        """The matrix after one more batch.

        Args:
            state: The matrix so far, which stays as it is; None before the first batch.
            io: The layer on the new batch.
            weight: Share of the new batch in the result, in (0, 1]; what was before has the rest.
        """
        ...


def weight_of_newest(decay: float, count: int) -> float:
    """Share of batch number `count` (from 1) in a bias-corrected average with that decay.

    With `decay = 1` this is `1 / count`: the plain mean of all batches.

    Raises:
        ValueError: If the decay is not in [0, 1], or there is no batch.
    """
    if not 0 <= decay <= 1 or count < 1:
        raise ValueError(
            f"decay must lie in [0, 1] and count from 1 on, got decay={decay}, count={count}."
        )
    return 1 / count if decay == 1 else (1 - decay) / (1 - decay**count)


@dataclass(frozen=True)
class MovingAverage:
    """Average an approximation over batches, by the matrices' own method `mixed`.

    For a Kronecker product this is the usual moving average of both factors, which differs from
    the average of the products.
    """

    approximation: Approximation

    def update(self, state: Any, io: LayerIO, weight: float) -> Matrix:
        """Move the state towards the matrix of the new batch.

        Raises:
            TypeError: If matrices of this kind have no average.
        """
        new = self.approximation(io)
        kind = type(new).__name__
        if not hasattr(new, "mixed"):
            raise TypeError(
                f"A {kind} has no method mixed(new, weight), so it cannot be averaged over "
                "batches: use an estimator made for this approximation, or "
                "Latest(approximation), which keeps the newest batch only."
            )
        if state is not None and type(state) is not type(new):
            raise TypeError(f"A {kind} cannot be averaged with a {type(state).__name__}.")
        return new if state is None else state.mixed(new, weight)


@dataclass(frozen=True)
class Latest:
    """Forget: the matrix of the newest batch alone."""

    approximation: Approximation

    def update(self, state: Any, io: LayerIO, weight: float) -> Matrix:
        """The approximation on the new batch."""
        return self.approximation(io)


def estimator(approximation: "Approximation | Estimator") -> Estimator:
    """What remembers as it is; a function of one batch as the average of its results."""
    return approximation if isinstance(approximation, Estimator) else MovingAverage(approximation)
