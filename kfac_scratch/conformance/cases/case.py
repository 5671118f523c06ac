"""Cases: a small network with a loss and data, and what KFAC must be on it.

Cases are grouped by the theorem that holds on them, in `families`. An identifier never changes its
meaning: what was published under it stays. Sizes within a case are pairwise coprime where they can
be, so that a wrong scale tells which size was forgotten.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from random import Random

import torch
from torch import Tensor, nn

from kfac_scratch.conformance.cases.expectations import TOLERANCES
from kfac_scratch.conformance.cases.ops import Op, Parameters, forward, layer_ops, parameter_shapes
from kfac_scratch.conformance.vocabulary import (
    DEFINITION,
    EXACT,
    DampingForm,
    Expectation,
    Fisher,
    Flavour,
    JudgedEntries,
    LossKind,
    Precision,
    Reduction,
)

__all__ = ["DEFINITION", "EXACT", "TOLERANCES", "Case", "Data", "Loss"]


IGNORED = -100  # the target that cross-entropy leaves out


@dataclass(frozen=True)
class Loss:
    """A loss of PyTorch as data.

    Attributes:
        kind: `mse`, `cross-entropy` or `bce` (with logits).
        reduction: `mean` or `sum`, as PyTorch defines them.
        weight: Class weights of cross-entropy, or `pos_weight` of `bce`; empty for none.
        label_smoothing: Of cross-entropy.
        entry_weight: Of `bce`, what PyTorch calls `weight`: for every output; empty for none.
    """

    kind: LossKind
    reduction: Reduction = "mean"
    weight: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    entry_weight: tuple[float, ...] = ()

    def module(self, like: Tensor) -> nn.Module:
        """The loss as PyTorch has it."""
        weight = like.new_tensor(self.weight) if self.weight else None
        match self.kind:
            case "mse":
                return nn.MSELoss(reduction=self.reduction)
            case "cross-entropy":
                return nn.CrossEntropyLoss(
                    reduction=self.reduction, weight=weight, label_smoothing=self.label_smoothing
                )
            case "bce":
                entry = like.new_tensor(self.entry_weight) if self.entry_weight else None
                return nn.BCEWithLogitsLoss(
                    reduction=self.reduction, pos_weight=weight, weight=entry
                )
        raise ValueError(f"Unknown loss {self.kind!r}: a newer version of kfac_scratch made it.")

    def divisor(self, f: Tensor, y: Tensor) -> float:
        """The number by which the loss divides the sum of its terms."""
        total = replace(self, reduction="sum").module(f)(f, y)
        return float(total / self.module(f)(f, y))


@dataclass(frozen=True)
class Data:
    """What a case computes with: everything a port needs, too."""

    parameters: Parameters
    X: Tensor
    y: Tensor
    coefficients: Tensor | None = None  # of a differential operator, see `Case.operator`

    def to(self, device: torch.device, dtype: torch.dtype) -> "Data":
        """The same numbers in another place and precision."""
        moved = partial(_moved, device, dtype)
        return Data(
            {name: moved(p) for name, p in self.parameters.items()},
            moved(self.X),
            moved(self.y),
            None if self.coefficients is None else moved(self.coefficients),
        )


def _moved(device: torch.device, dtype: torch.dtype, t: Tensor) -> Tensor:
    return t.to(device, dtype) if t.is_floating_point() else t.to(device)


@dataclass(frozen=True)
class Case:
    """What is given, and what is expected.

    Attributes:
        id: Stable for ever.
        theorem: Why the expectation holds: a key of `theorems.THEOREMS`.
        ops: The network.
        loss: The loss.
        shape: Of the input, batch first.
        flavours: What `expand`, `reduce` or `ekfac` must be: `EXACT` or `DEFINITION`.
        fisher: `type2`, `empirical` or `mc`.
        layers: Layers that are judged; empty for all.
        part: `block`, or `bias` for the bias's entries alone.
        batches: Sizes of the mini-batches; empty for one.
        damping: With it, the damped inverse times the loss's gradient is asked for: `exact`
            (of `B ⊗ A + damping`) or `factored` (each factor damped, with `pi`).
        masked: Whether positions whose targets are ignored are padding, and in no mean.
        dtype: Of parameters and data.
        data: How to fill a case with numbers.
        tags: For selection.
    """

    id: str
    theorem: str
    ops: tuple[Op, ...]
    loss: Loss
    shape: tuple[int, ...]
    flavours: Mapping[Flavour, Expectation]
    fisher: Fisher = "type2"
    layers: tuple[str, ...] = ()
    part: JudgedEntries = "block"
    batches: tuple[int, ...] = ()
    damping: tuple[DampingForm, float] | None = None
    operator: bool = False
    masked: bool = False
    dtype: Precision = "float64"
    data: "Callable[[Case], Data]" = field(default=lambda case: spread(case))
    tags: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.id

    @property
    def judged(self) -> tuple[str, ...]:
        """Names of the layers that are judged."""
        return self.layers or tuple(layer_ops(self.ops))

    def needs_factors(self, flavour: Flavour) -> bool:
        """Whether the expectation is made of Kronecker factors."""
        return self.flavours[flavour] != EXACT or bool(self.damping and self.damping[0] != "exact")

    @property
    def tolerance(self) -> float:
        """Largest allowed difference, relative to the largest entry."""
        return TOLERANCES[self.dtype]

    def build(self, device: torch.device | str = "cpu") -> Data:
        """The case's numbers."""
        return self.data(self).to(torch.device(device), getattr(torch, self.dtype))

    def mask(self, y: Tensor) -> Tensor | None:
        """Which positions `[N, T]` are part of the data, by the targets; None if all are."""
        return y != IGNORED if self.masked else None

    def split(self, data: Data) -> list[tuple[Tensor, Tensor]]:
        """The data as mini-batches."""
        sizes = list(self.batches) or [len(data.X)]
        return list(zip(data.X.split(sizes), data.y.split(sizes), strict=True))


# ---- numbers -------------------------------------------------------------------------------------
# Multiples of 1/16 from Python's own generator: the same everywhere, and exact in any precision.


def numbers(random: Random, *shape: int) -> Tensor:
    """Multiples of 1/16 between -2 and 2."""
    flat = [random.randint(-32, 32) / 16 for _ in range(prod(shape))]
    return torch.tensor(flat, dtype=torch.float64).reshape(shape)


def parameters(random: Random, ops: Sequence[Op]) -> dict[str, Tensor]:
    """Parameters of a network, small enough that nothing saturates."""
    return {name: numbers(random, *shape) / 2 for name, shape in parameter_shapes(ops).items()}


def targets(random: Random, loss: Loss, f: Tensor) -> Tensor:
    """Targets that fit a loss."""
    if loss.kind == "cross-entropy":
        shape = (len(f), *f.shape[2:])
        drawn = [random.randrange(f.shape[1]) for _ in range(prod(shape))]
        return torch.tensor(drawn).reshape(shape)
    y = numbers(random, *f.shape)
    return (y > 0).to(f.dtype) if loss.kind == "bce" else y


def generator(case: Case) -> Random:
    """Numbers that depend on a case's identifier alone."""
    return Random(case.id.removesuffix("-float32"))


def spread(case: Case) -> Data:
    """Unstructured numbers."""
    random = generator(case)
    theta, X = parameters(random, case.ops), numbers(random, *case.shape)
    return Data(theta, X, targets(random, case.loss, forward(case.ops, theta, X)))
