"""A piece of the museum: one mistake that somebody made, in our own words."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kfac_scratch.conformance.selftest.museum.adapter import KFAC, Adapter
from kfac_scratch.conformance.vocabulary import Task


@dataclass(frozen=True)
class Piece:
    """One function of the naive KFAC, done wrong.

    Attributes:
        slug: Its name in the museum.
        title: The mistake in words.
        part: The field of `KFAC` that is replaced.
        wrong: The mistaken function that replaces it.
        why: Why it looks right.
        case: The case that rejects it first, and the flavour.
        thread: Where it happened, `owner/repository #number`; empty if it was seen in more places
            than one, or in private.
        note: What the thread says that matters for judging it fairly.
    """

    slug: str
    title: str
    part: str
    wrong: Callable[..., Any]
    why: str
    case: Task
    thread: str = ""
    note: str = ""

    @property
    def right(self) -> Callable[..., Any]:
        """The function as it should be."""
        function: Callable[..., Any] = getattr(KFAC(), self.part)
        return function

    @property
    def url(self) -> str:
        """Address of the public thread, or empty."""
        repository, _, number = self.thread.partition(" #")
        return f"https://github.com/{repository}/issues/{number}" if number else ""

    def adapter(self) -> Adapter:
        """The naive KFAC with this mistake, as the oracle sees it."""
        return Adapter(replace(KFAC(), **{self.part: self.wrong}), self.title)
