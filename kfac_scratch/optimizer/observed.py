"""What an optimizer observes of one step: its batches, and their layers' inputs and vectors.

A step may be for several micro-batches, whose gradients are added up. The loss of all of them is a
weighted sum of theirs. A batch's share in a mean loss is its number of terms over that of all; in a
sum it is 1. The `LayerIO`s of all batches with these shares are those of one large batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module, Parameter

from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.losses import divisor
from kfac_scratch.optimizer.progress import Progress
from kfac_scratch.optimizer.step_control import Batch

LayerIOs = Mapping[str, LayerIO]


@dataclass(frozen=True, eq=False)
class Draws:
    """The states of a generator around what was drawn from it: before and after."""

    generator: Generator
    before: Tensor
    after: Tensor

    def undo(self) -> None:
        """Take the draws back, unless something else has drawn since."""
        if torch.equal(self.generator.get_state(), self.after):
            self.generator.set_state(self.before)

    def redo(self) -> None:
        """Draw again what `undo` took back."""
        if torch.equal(self.generator.get_state(), self.before):
            self.generator.set_state(self.after)


def together(earlier: Draws | None, later: Draws | None) -> Draws | None:
    """Both as one, if nothing else has drawn between them; otherwise the later alone."""
    if earlier is None or later is None or not torch.equal(earlier.after, later.before):
        return later
    return replace(later, before=earlier.before)


@dataclass(frozen=True, eq=False)
class Observed:
    """The batches of one step.

    It has many parameters, because what belongs to a step arrives at different times.

    Attributes:
        due: Whether the matrices are updated in this step.
        batches: The micro-batches.
        ios: Their layers, one entry for each batch if an update is due.
        modes: Which modules of the model were in training mode.
        draws: What the Fisher drew.
        gradient: A parameter and its gradient at the last `observe`. A new tensor in its place
            means that gradients were renewed, and a new step began.
        expected: What is known with these batches, None as long as nobody asked.
        totals: The terms and the samples of the batches of all processes; None if there is one.
        ended: Whether the next batch belongs to another step.
        undone: Whether the step raised.
    """

    due: bool = False
    batches: tuple[Batch, ...] = ()
    ios: tuple[LayerIOs, ...] = ()
    modes: Mapping[Module, bool] = field(default_factory=dict)
    draws: Draws | None = None
    gradient: tuple[Parameter, Tensor] | None = None
    expected: Progress | None = None
    totals: tuple[float, float] | None = None
    ended: bool = False
    undone: bool = False

    @property
    def gradients_are_renewed(self) -> bool:
        """Whether the gradient that was seen last is gone."""
        return self.gradient is not None and self.gradient[0].grad is not self.gradient[1]

    @property
    def terms(self) -> float | None:
        """The terms of the batches of all processes, None if there is only this one."""
        return None if self.totals is None else self.totals[0]

    def layers(self) -> LayerIOs:
        """Every layer on all batches together."""
        parts = shares(self.batches, self.terms)
        if len(self.ios) > 1:
            return {
                name: concatenate([ios[name] for ios in self.ios], parts) for name in self.ios[0]
            }
        if self.totals is None:
            return self.ios[0]
        return {name: replace(io, g=parts[0] ** 0.5 * io.g) for name, io in self.ios[0].items()}

    def shared(self) -> tuple[tuple[float, Batch], ...]:
        """Every batch with its share in the loss of all."""
        return tuple(zip(shares(self.batches, self.terms), self.batches, strict=True))

    def share(self) -> float:
        """The share of the batches here in the loss of all processes."""
        if self.totals is None or is_sum(self.batches):
            return 1.0
        return sum(shares(self.batches, self.terms))

    def part(self) -> float:
        """The part of the data of all processes that is here, as the loss counts them."""
        if self.totals is None or not is_sum(self.batches):
            return self.share()
        return sum(len(batch.y) for batch in self.batches) / self.totals[1]


def shares(batches: Sequence[Batch], total: float | None = None) -> list[float]:
    """The share of every batch's loss in the loss of all of them.

    For a mean it is the batch's number of terms (`losses.divisor`) over that of all; for a sum, 1.

    Args:
        batches: The batches.
        total: The number of terms of all, if there are more batches than these.

    Raises:
        NotImplementedError: For several batches of a loss whose number of terms is not known.
    """
    if len(batches) == 1 and total is None:
        return [1.0]
    counts = [terms_of(batch) for batch in batches]
    total = sum(counts) if total is None else total
    return counts if is_sum(batches) else [count / total for count in counts]


def is_sum(batches: Sequence[Batch]) -> bool:
    """Whether the loss of the batches adds up its terms, so that it divides by nothing."""
    return any(adds_up(batch.loss) for batch in batches)


def adds_up(loss: Module) -> bool:
    """Whether a loss is the sum of its terms, so that it divides by nothing."""
    return getattr(loss, "reduction", None) == "sum"


def terms_of(batch: Batch) -> float:
    """The number that the batch's loss divides by."""
    try:
        return divisor(batch.loss, _outputs_like(batch.loss, batch.y), batch.y)
    except (NotImplementedError, AttributeError) as error:
        raise NotImplementedError(
            f"The share of each of several batches in {batch.loss} is not known, since "
            "losses.divisor does not know its number of terms: observe one batch in every step."
        ) from error


def _outputs_like(loss: Module, y: Tensor) -> Tensor:
    """Outputs of a shape that the targets fit: the number of terms depends on the targets alone."""
    if y.is_floating_point():
        return y
    weight: Tensor | None = getattr(loss, "weight", None)
    classes = max(2, int(y.max()) + 1) if weight is None else len(weight)
    return torch.zeros((), device=y.device).expand(len(y), classes, *y.shape[1:])


def training_modes(model: Module) -> dict[Module, bool]:
    """The mode of every module: whether it is in training mode."""
    return {module: module.training for module in model.modules()}


@contextmanager
def in_modes(modes: Mapping[Module, bool]) -> Iterator[None]:
    """Modules in the modes that they were once in; afterwards they are as before."""
    now = {module: module.training for module in modes}
    try:
        for module, training in modes.items():
            module.training = training
        yield
    finally:
        for module, training in now.items():
            module.training = training


def a_gradient(parameters: Mapping[str, Parameter]) -> tuple[Parameter, Tensor] | None:
    """The first parameter that has a gradient, with it."""
    found: Any = ((p, p.grad) for p in parameters.values() if p.grad is not None)
    return next(found, None)
