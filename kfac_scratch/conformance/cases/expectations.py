"""What can be expected of a block, and what a judge has to know of a case."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from kfac_scratch.conformance.vocabulary import Expectation, Flavour, Precision

TOLERANCES: dict[Precision, float] = {"float64": 1e-10, "float32": 1e-4}


@runtime_checkable
class Judged(Protocol):
    """A case as far as a judge needs it: one of ours, or one read from a file."""

    @property
    def id(self) -> str:
        """Stable for ever."""
        ...

    @property
    def dtype(self) -> Precision:
        """`float64` or `float32`."""
        ...

    @property
    def flavours(self) -> Mapping[Flavour, Expectation]:
        """What each flavour must be: `EXACT` or `DEFINITION`."""
        ...

    @property
    def tolerance(self) -> float:
        """Largest allowed difference, relative to the largest entry."""
        ...
