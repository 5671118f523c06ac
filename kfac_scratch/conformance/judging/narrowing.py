"""What other cases say about a scale: readings that one of them contradicts are dropped.

A case whose layers have as many positions as the output cannot tell `S` from `T`. Another case can.
Cases that ask for the same with the same loss are taken to be wrong for one reason: if there is a
formula that fits all of them, no other one is named.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.scalars import Sizes, off_by, readings


def narrowed(results: Sequence[Result], cases: Mapping[str, Case]) -> list[Result]:
    """The same verdicts; of several readings of a scale, those that fit all like cases."""
    alike: dict[tuple[str, ...], list[Result]] = {}
    for r in results:
        if r.verdict == "undocumented-scale":
            alike.setdefault(kind(cases[r.case], r), []).append(r)
    sizes: dict[str, Mapping[str, Sizes]] = {}
    found: dict[int, str] = {}
    for group in alike.values():
        if len(group) < 2 or not any(" or " in r.words for r in group):
            continue
        for r in group:
            if r.case not in sizes:
                sizes[r.case] = truth.letters(cases[r.case], cases[r.case].build())
        found |= {id(r): words for r, words in _words_of(group, cases, sizes)}
    return [replace(r, words=found.get(id(r), r.words)) for r in results]


def kind(case: Case, r: Result) -> tuple[str, ...]:
    """What like cases have in common."""
    batches = "mini-batches" if case.batches else ""
    return r.flavour, case.fisher, case.loss.kind, case.loss.reduction, batches


def _words_of(
    group: Sequence[Result], cases: Mapping[str, Case], sizes: Mapping[str, Mapping[str, Sizes]]
) -> list[tuple[Result, str]]:
    """The words of like cases with the readings that fit all; nothing if none does."""
    scales = {id(r): next(s for s in r.scales.values() if s is not None) for r in group}
    layers = {id(r): [sizes[r.case][name] for name in cases[r.case].judged] for r in group}
    directions = {scale > 1 for scale in scales.values()}
    if len(directions) > 1:
        return []
    tolerance = max(cases[r.case].tolerance for r in group)
    size = 1 if directions == {True} else -1
    pairs = [(scales[id(r)] ** size, of_layer) for r in group for of_layer in layers[id(r)]]
    common = readings(pairs, tolerance)
    if not common:
        return []
    words = []
    for r in group:
        given = scales[id(r)], layers[id(r)], cases[r.case].tolerance
        words.append((r, r.words.replace(off_by(*given), off_by(*given, common))))
    return words
