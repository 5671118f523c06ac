"""Flags: the mistakes that a case catches. They are computed, and nobody writes them down.

Every mistake of `mistakes` is made on a case. The mistake's key is a flag of the case if the answer
then differs from the right one by more than the tolerance. A flag names the flavours in which it
does. So a mistake that leaves the answer right is no flag, whatever the case was written for.

Two kinds of mistakes have no flag, since nearly every case catches them: a wrong scale, and entries
that are numbered otherwise. Cases of differential operators, and cases with a weight that is
applied both ways, have few flags: their answer is no single product whose steps could be replaced.
"""

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.judge import fit
from kfac_scratch.conformance.judging.mistakes.catalogue import MISTAKES, answers
from kfac_scratch.conformance.judging.pieces import Pieces
from kfac_scratch.conformance.judging.ways import asked_about
from kfac_scratch.conformance.vocabulary import Flavour

MEANINGS = {mistake.key: f"The answer is {mistake.words}." for mistake in MISTAKES}
CLEAR = 0.25  # of the largest entry: a change that the mean of random draws shows


def flags(case: Case) -> dict[str, dict[Flavour, float]]:
    """The mistakes that a case catches, by key, and how much each changes in a flavour.

    A change is the largest difference, relative to the largest entry of the layer. The change is
    infinite if the wrong answer is not finite.
    """
    data = case.build()
    found: dict[str, dict[Flavour, float]] = {key: {} for key in MEANINGS}
    for flavour in case.flavours:
        right = truth.expected(case, data, flavour)
        for mistake, got in answers(asked_about(case, data, flavour)):
            change = difference(got, right)
            if change > least_change(case):
                found[mistake.key][flavour] = change
    return {key: by_flavour for key, by_flavour in found.items() if by_flavour}


def least_change(case: Case) -> float:
    """The change that a case sees: its tolerance, or what stands out of random draws."""
    return CLEAR if case.fisher == "mc" else case.tolerance


def difference(got: Pieces, right: Pieces) -> float:
    """The largest difference of two answers, relative to the largest entry of a piece."""
    if not all(M.isfinite().all() for M in got.values()):
        return float("inf")
    return max(fit(got[key].double(), M.double()).error for key, M in right.items())
