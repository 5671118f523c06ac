"""The oracle, tested by mutation: mistakes put into our own code, and the museum's.

A `Mutant` is our package with one snippet of one module replaced, imported as a second copy beside
the real one. Each names the case that rejects it. A catalogue cannot rot: a snippet must occur
exactly once, and a mutant that its case lets pass is looked for in all cases.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.protocol import Adapter
from kfac_scratch.conformance.selftest.museum import PIECES, Piece
from kfac_scratch.conformance.selftest.mutations import MUTANTS
from kfac_scratch.conformance.vocabulary import Task


@dataclass(frozen=True)
class Exhibit:
    """A piece of the museum as a mutant."""

    piece: Piece

    @property
    def name(self) -> str:
        """The mistake."""
        return self.piece.title

    @property
    def module(self) -> str:
        """Where."""
        return f"conformance.museum, {self.piece.slug}"

    @property
    def case(self) -> Task:
        """The case that rejects it, and the flavour."""
        return self.piece.case

    def adapter(self) -> AbstractContextManager[Adapter]:
        """The piece as the oracle sees it."""
        return nullcontext(self.piece.adapter())


@runtime_checkable
class Wrong(Protocol):
    """A wrong implementation and the case that rejects it."""

    @property
    def name(self) -> str:
        """The mistake."""
        ...

    @property
    def module(self) -> str:
        """Where it is."""
        ...

    @property
    def case(self) -> Task:
        """The case that rejects it, and the flavour."""
        ...

    def adapter(self) -> AbstractContextManager[Adapter]:
        """How the oracle sees it."""
        ...


@dataclass(frozen=True)
class Rejection:
    """The first verdict against a mutant, or none: then it survives."""

    mutant: Wrong
    result: Result | None

    @property
    def as_named(self) -> bool:
        """Whether the case that the catalogue names rejects it."""
        found = self.result
        return found is not None and (found.case, found.flavour) == self.mutant.case

    def __str__(self) -> str:
        where = f"{self.mutant.name} ({self.mutant.module})"
        if self.result is None:
            return f"{where}\n    SURVIVES all cases"
        r = self.result
        return f"{where}\n    {r.case}, {r.flavour}: {r.verdict}. {r.words}"


def catalogue() -> list[Wrong]:
    """All mutants of our own code, and all pieces of the museum."""
    return [*MUTANTS, *map(Exhibit, PIECES)]


def run_mutants(mutants: Sequence[Wrong] | None = None) -> Iterator[Rejection]:
    """The first rejection of each mutant; the case that it names is tried first."""
    for mutant in catalogue() if mutants is None else mutants:
        with mutant.adapter() as adapter:
            yield Rejection(mutant, rejected(adapter, mutant.case))


def rejected(adapter: Adapter, first: Task) -> Result | None:
    """The first verdict that an implementation does not pass."""
    others = [(name, flavour) for name, case in CASES.items() for flavour in case.flavours]
    for name, flavour in [first, *others]:
        result = verdict(adapter, CASES[name], flavour)
        if not result.passes:
            return result
    return None
