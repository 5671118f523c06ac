"""A well-known mistake: a key, words, the questions that it is about, and what is got with it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kfac_scratch.conformance.judging.mistakes.concerns import Holds, all_of, has_way
from kfac_scratch.conformance.judging.pieces import Pieces
from kfac_scratch.conformance.judging.ways import (
    Question,
    Way,
)


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        key: Its name, and that of the flag of cases that catch it.
        words: What follows "It looks": "as if ..." or "like ...".
        concerns: Whether a question has what it is about.
        answer: What is got with it. It may raise a RuntimeError where it makes no sense.
    """

    key: str
    words: str
    concerns: Holds
    answer: Callable[[Question], Pieces]


def step(key: str, words: str, concerns: Holds, **steps: Callable[..., Any]) -> Mistake:
    """A way with other steps."""
    return Mistake(key, words, all_of(has_way, concerns), Way(**steps).pieces)
