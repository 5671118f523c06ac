"""Flags: which mistakes a case catches, computed and not claimed.

Each mistake of `mistakes` is made on a case. If its answer differs from what is right by more than
the case allows, the case has the mistake's key as a flag, with the flavours that catch it. A
mistake that leaves the answer right is no flag, whatever the case was written for.

Not among the flags is what nearly every case catches: a wrong scale, and entries that are numbered
otherwise. A case of a differential operator, or with a weight that is applied both ways, has few
flags: its answer is no single product whose steps could be replaced.
"""

from collections.abc import Iterator

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.judge import fit
from kfac_scratch.conformance.judging.mistakes import MISTAKES, answers
from kfac_scratch.conformance.judging.pieces import Pieces
from kfac_scratch.conformance.judging.ways import asked_about
from kfac_scratch.conformance.vocabulary import Flavour

MEANINGS = {mistake.key: f"The answer is {mistake.words}." for mistake in MISTAKES}
CLEAR = 0.25  # of the largest entry: what the mean of random draws shows without doubt


def flags(case: Case) -> dict[str, dict[Flavour, float]]:
    """The mistakes that a case catches, by key, and what each changes in every flavour.

    A change is the largest difference, relative to the largest entry of the layer; infinite if an
    answer is not finite.
    """
    found: dict[str, dict[Flavour, float]] = {key: {} for key in MEANINGS}
    for key, flavour, change in changes(case):
        if change > least_change(case):
            found[key][flavour] = change
    return {key: by_flavour for key, by_flavour in found.items() if by_flavour}


def changes(case: Case) -> Iterator[tuple[str, Flavour, float]]:
    """What every mistake that a case is about changes in a flavour, also if that is nothing."""
    data = case.build()
    for flavour in case.flavours:
        right = truth.expected(case, data, flavour)
        for mistake, got in answers(asked_about(case, data, flavour)):
            yield mistake.key, flavour, difference(got, right)


def least_change(case: Case) -> float:
    """Which change is seen: what exceeds the tolerance, or stands out of random draws."""
    return CLEAR if case.fisher == "mc" else case.tolerance


def difference(got: Pieces, right: Pieces) -> float:
    """The largest difference of two answers, relative to the largest entry of a piece."""
    if not all(M.isfinite().all() for M in got.values()):
        return float("inf")
    return max(fit(got[key].double(), M.double()).error for key, M in right.items())
