r"""Estimators: from one batch after another to one matrix.

An approximation sees one batch. Training averages over batches with exponentially decaying
weights, and every update is a weighted mean of the state so far and the batch:

$$
M_t = (1 - w_t)\, M_{t-1} + w_t \hat M_t , \qquad w_t = \frac{1 - \rho}{1 - \rho^t} .
$$

The first weight is 1, so that no start value is needed, and $M_t$ is the bias-corrected average
$\sum_i \rho^{t-i} \hat M_i / \sum_i \rho^{t-i}$. The state is the matrix itself, a value.

Two words name the two shares everywhere in this package: `decay`, here $\rho$, is the share of the
old average, which a user chooses; `weight`, here $w_t$, is the share of the new batch, which an
update gets from `weight_of_newest(decay, t)`.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §5 (moving averages of factors); the bias
correction is that of Kingma and Ba 2015 (arXiv:1412.6980), §3.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import isclass
from typing import Any, Protocol, runtime_checkable

from kfac_scratch.border import check_function, check_result
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import Matrix

Approximation = Callable[[LayerIO], Matrix]
"""A paper as a function: from a layer on a batch to a matrix that approximates its block."""


@runtime_checkable
class Estimator(Protocol):
    """A rule that moves a matrix with every batch.

    Use one in training. Not for one matrix of a whole data set: that is an `Accumulator`'s, and
    counts every sample the same.

    Cost: that of its approximation for each update, and memory for its state.
    """

    def update(self, state: Any, io: LayerIO, weight: float) -> Matrix:
        """The matrix after one more batch.

        Args:
            state: The matrix so far, which stays as it is; None before the first batch.
            io: The layer on the new batch.
            weight: Share of the new batch in the result, in (0, 1]; the old state has
                `1 - weight`. It is never a decay.
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
    """The moving average of an approximation over batches, by the matrices' own method `mixed`.

    Use it for matrices that have an average of the same form: `kfac`, `foof`, `tkfac`,
    `randomized`, `mini_block`. Not for `ekfac`, whose basis changes with every batch, and not for
    matrices without `mixed`: these have estimators of their own.

    Law: for a Kronecker product it is the usual moving average of both factors, which differs from
    the average of the products.
    Cost: that of the approximation, and memory for one matrix more during an update.
    """

    approximation: Approximation

    def __post_init__(self) -> None:
        check_function("approximation", self.approximation, "approximation=ekfac")

    def update(self, state: Any, io: LayerIO, weight: float) -> Matrix:
        """The average `(1 - weight) * state + weight * new` in the form of the matrix.

        Raises:
            TypeError: If matrices of this kind have no average.
        """
        new = self.approximation(io)
        check_result("approximation", new, Matrix, "a Matrix")
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
    """The matrix of the newest batch alone.

    Use it for approximations without an average (`ekfac`, `deflation`, `cg_fac`, `skfac`), and to
    see what averaging does. Not with small batches, of which each has another matrix.

    Cost: that of the approximation; `weight` is ignored.
    """

    approximation: Approximation

    def __post_init__(self) -> None:
        check_function("approximation", self.approximation, "approximation=ekfac")

    def update(self, state: Any, io: LayerIO, weight: float) -> Matrix:
        """The approximation on the new batch."""
        new = self.approximation(io)
        check_result("approximation", new, Matrix, "a Matrix")
        return new


def estimator(approximation: "Approximation | Estimator") -> Estimator:
    """An estimator as it is; a function of one batch as the `MovingAverage` of its results."""
    if isinstance(approximation, Estimator) and not isclass(approximation):
        return approximation
    return MovingAverage(approximation)
