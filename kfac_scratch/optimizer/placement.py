"""Where the parts of a step are computed: in one process, or in several that come together.

The optimizer asks its `Placement` wherever several processes would have to agree. The one here is
for a single process and changes nothing. `distributed.distribute` gives an optimizer another one.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

from torch import Generator, Tensor
from torch.nn import Parameter

from kfac_scratch.approximations.estimators import Estimator
from kfac_scratch.capture.layer_groups import LayerGroup
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import LinearMap, Matrix
from kfac_scratch.optimizer.preconditioner import inverses
from kfac_scratch.optimizer.progress import Progress, updated
from kfac_scratch.optimizer.undo import Undo, nothing


class AgreedError(ValueError):
    """An error that all processes raise, because one of them refused, or they disagree."""


class LostRankError(RuntimeError):
    """A process is gone, hangs, or has left the loop: no step can be taken together any more."""


Invert = Callable[[Any, float], LinearMap]


@runtime_checkable
class Placement(Protocol):
    """The processes that take a step together, as the step needs them.

    Every process calls the same methods in the same order.
    """

    generator: Generator | None
    """The source of the labels that the default Fisher draws here; None if it is the default."""

    @property
    def size(self) -> int:
        """The number of processes."""
        ...

    def together(self, what: str) -> AbstractContextManager[None]:
        """Work after which all processes go on, or all raise, because one of them did."""
        ...

    def totals(self, terms: float, samples: int) -> tuple[float, float]:
        """The terms and the samples of the batches of all processes.

        Args:
            terms: The number that a mean loss divides by, for the batches here.
            samples: The number of samples in them.
        """
        ...

    def updated(
        self,
        part: float,
        estimator: Estimator,
        states: Mapping[str, Matrix],
        ios: Mapping[str, LayerIO],
        weights: Mapping[str, float],
    ) -> dict[str, Matrix]:
        """The matrices that are held here, after the batch of all processes.

        Args:
            part: The part of the data of all processes that is here.
            estimator: The rule.
            states: Matrices so far, by block name.
            ios: Every layer on the batches here, with their share in the loss of all.
            weights: The share of the new batch in each matrix.
        """
        ...

    def join_gradients(self, trained: Mapping[str, Parameter], share: float) -> Undo:
        """Give every parameter the gradient of the batches of all processes.

        Args:
            trained: The parameters, by name.
            share: The share of the gradients here.

        Returns:
            The function that restores the gradients that were there.
        """
        ...

    def inverted(
        self,
        invert: Invert,
        blocks: Sequence[LayerGroup],
        matrices: Mapping[str, Matrix],
        damping: Mapping[str, float],
    ) -> dict[str, LinearMap]:
        """The inverses of some blocks that are held here, by name.

        Args:
            invert: From a matrix and a damping to the inverse.
            blocks: The blocks.
            matrices: By block name.
            damping: By parameter name.
        """
        ...

    def directions(
        self, inverses: Mapping[str, LinearMap], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every inverse applied to its block's value, whoever holds it."""
        ...

    def curved(
        self, matrices: Mapping[str, Matrix], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every matrix applied to its block's value, whoever holds it."""
        ...

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a value over the processes."""
        ...

    def streams(self, state: Tensor | None) -> list[Tensor] | None:
        """The states of the sources of all processes, None if there is nothing to tell apart.

        Args:
            state: The state here.
        """
        ...

    def continue_streams(self, steps: int, states: Sequence[Tensor] | None) -> None:
        """Continue the source here, from those of all processes that wrote a checkpoint.

        Args:
            steps: The number of steps in the checkpoint.
            states: The states of their sources, None if it has none.
        """
        ...

    def whole(self, known: Progress) -> Progress:
        """The knowledge of all processes together, for a checkpoint."""
        ...

    def part(self, known: Progress) -> Progress:
        """The part of a checkpoint that is held here."""
        ...


class OneProcess:
    """The placement of everything in one process."""

    size = 1
    generator: Generator | None = None

    def together(self, what: str) -> AbstractContextManager[None]:
        """Nobody else is there."""
        return nullcontext()

    def totals(self, terms: float, samples: int) -> tuple[float, float]:
        """The numbers here."""
        return terms, samples

    def updated(
        self,
        part: float,
        estimator: Estimator,
        states: Mapping[str, Matrix],
        ios: Mapping[str, LayerIO],
        weights: Mapping[str, float],
    ) -> dict[str, Matrix]:
        """The matrices, one by one."""
        return updated(estimator, states, ios, weights)

    def join_gradients(self, trained: Mapping[str, Parameter], share: float) -> Undo:
        """They are there already."""
        return nothing

    def inverted(
        self,
        invert: Invert,
        blocks: Sequence[LayerGroup],
        matrices: Mapping[str, Matrix],
        damping: Mapping[str, float],
    ) -> dict[str, LinearMap]:
        """All of them."""
        return inverses(list(blocks), matrices, damping, invert)

    def directions(
        self, inverses: Mapping[str, LinearMap], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """One product for each block."""
        return {name: inverses[name] @ V for name, V in values.items()}

    curved = directions

    def summed(self, value: Tensor) -> Tensor:
        """The value."""
        return value

    def streams(self, state: Tensor | None) -> list[Tensor] | None:
        """There is only one."""
        return None

    def continue_streams(self, steps: int, states: Sequence[Tensor] | None) -> None:
        """It is the optimizer's own."""

    def whole(self, known: Progress) -> Progress:
        """The knowledge of this process."""
        return known

    part = whole


ONE_PROCESS = OneProcess()
