"""What wrong numbers are equal to: well-known mistakes that explain them, in words.

Each of `mistakes` says what a case's answer becomes if it is made. Those that give the given
numbers are named, all of them if a case cannot tell them apart. The best agreement counts: equal
numbers, else equal up to one scale, else up to a scale for every piece. A mistake whose answer
agrees as well with what is right is never named.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import TOLERANCES, Data
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.judge import fit
from kfac_scratch.conformance.judging.mistakes.catalogue import answers
from kfac_scratch.conformance.judging.mistakes.layouts import layouts
from kfac_scratch.conformance.judging.pieces import Pieces
from kfac_scratch.conformance.judging.scalars import SINGLE, Sizes, off_by, readings
from kfac_scratch.conformance.judging.ways import Question, Way

SIMPLE = 2  # parts of a formula: beside a mistake, a longer one fits by chance
EQUAL, ONE_SCALE, OWN_SCALES = range(3)  # how well numbers agree, the best first
Agreement = tuple[int, float]  # one of these, and the scale
Explained = tuple[str, Pieces]  # in words, and the answer that there would be


def diagnosis(asked: Question, got: Pieces, sizes: Mapping[str, Sizes]) -> str:
    """Which mistakes the numbers fit, as a sentence; empty if none does.

    Args:
        asked: What was asked.
        got: The implementation's numbers, without their documented scale.
        sizes: Every layer's sizes.
    """
    case = asked.case
    right = truth.expected(case, asked.data, asked.flavour, asked.parts)
    found: dict[str, Agreement] = {}
    for words, answer in explanations(asked, right, sizes):
        agreement = agree(answer, got, case.tolerance)
        if agreement and not (case.damping and agreement[0] != EQUAL):  # no scale of a curvature
            harmless = agree(answer, right, case.tolerance)
            if harmless is None or harmless[0] > agreement[0]:
                found[words] = min(found.get(words, agreement), agreement)
    if found:
        return _sentence(found, [sizes[name] for name in case.judged], case.tolerance)
    rough = TOLERANCES["float32"]
    if agree(right, got, rough) and not agree(right, got, case.tolerance):
        return " It looks as if something were computed in float32."
    return ""


def explanations(asked: Question, right: Pieces, sizes: Mapping[str, Sizes]) -> Iterator[Explained]:
    """Mistakes that a question is about, and what is got with them."""
    yield from ((mistake.words, answer) for mistake, answer in answers(asked))
    yield from layouts(asked, right)
    if asked.case.damping:
        yield from scaled(asked, sizes)


def scaled(asked: Question, sizes: Mapping[str, Sizes]) -> Iterator[Explained]:
    """Damped inverses of a curvature with a wrong scale."""
    for words, factor in wrong_scales([sizes[name] for name in asked.case.judged]):

        def solved(piece: truth.Columns, data: Data, factor: float = factor) -> Tensor:
            F = None if piece.F is None else factor * piece.F
            K = piece.K and truth.KroneckerFactors(piece.K.A, factor * piece.K.B)
            return replace(piece, F=F, K=K).right(data)

        yield f"as if the curvature were {words}", Way(solved=solved).pieces(asked)


def wrong_scales(sizes: list[Sizes]) -> Iterator[tuple[str, float]]:
    """Two, every size that all layers share, and their squares: in words, and as factors."""
    shared = {x: n for x, n in sizes[0].items() if all(s.get(x) == n for s in sizes) and n > 1}
    for name, value in [("2", 2), *shared.items()]:
        for power in (1, 2):
            text = f"{name}{'²' * (power == 2)}" if name != "2" else str(2**power)
            yield f"too large by {text}", float(value) ** power
            yield f"too small by {text}", 1 / float(value) ** power


def agree(answer: Pieces, got: Pieces, tolerance: float) -> Agreement | None:
    """How well numbers agree with what a mistake gives; None if they do not."""
    fits = []
    for key, M in answer.items():
        given = got.get(key)
        if given is None or given.shape != M.shape or not torch.isfinite(M).all():
            return None
        if not M.any():  # nothing has a scale
            if given.any():
                return None
            continue
        fits.append(fit(given.double(), M.double()))
        if not fits[-1].residual <= tolerance:
            return None
    if all(f.error <= tolerance for f in fits):
        return EQUAL, 1.0
    scales = [f.scale for f in fits]
    one = max(scales) - min(scales) <= tolerance * max(scales)
    return (ONE_SCALE, scales[0]) if one else (OWN_SCALES, 1.0)


def _sentence(fitting: Mapping[str, Agreement], sizes: list[Sizes], tolerance: float) -> str:
    """The best causes, in words; of some that need a scale, those whose scale has a reading."""
    best = min(level for level, _ in fitting.values())
    kept = {words: scale for words, (level, scale) in fitting.items() if level == best}
    if best != ONE_SCALE:
        return sentence(merged(kept, "" if best == EQUAL else "up to a scale for every piece"))
    told = {words: _scale_beside(scale, sizes, tolerance) for words, scale in kept.items()}
    told = {words: scale for words, scale in told.items() if scale} or told
    by_scale: dict[str, list[str]] = {}
    for words, scale in told.items():
        by_scale.setdefault(scale, []).append(words)
    causes = [
        merged(words, f"with every block {scale}" if scale else "up to one scale")
        for scale, words in by_scale.items()
    ]
    return sentence([words for of_scale in causes for words in of_scale])


def _scale_beside(scale: float, sizes: list[Sizes], tolerance: float) -> str:
    """A scale beside a mistake, as `off_by` says it; empty if no `SIMPLE` formula gives it."""
    large = [(scale if scale > 1 else 1 / scale, of_layer) for of_layer in sizes]
    known = readings(large, tolerance, SIMPLE)
    return off_by(scale, sizes, tolerance, known) if known or abs(scale - 1) <= SINGLE else ""


def merged(causes: Iterable[str], up_to: str = "") -> list[str]:
    """Causes without repetition: what one has beyond another is said as a part of that.

    Args:
        causes: What follows "It looks".
        up_to: What all of them need beside.
    """
    by_scale: dict[str, list[str]] = {}  # "as if ... too large by": 2, C
    for cause in causes:
        start, by, factor = cause.rpartition(" by ")
        is_scale = start.endswith(("too large", "too small"))
        by_scale.setdefault(start + by if is_scale else cause, []).append(factor)
    joined = [
        start + " or ".join(factors) if start.endswith(" by ") else start
        for start, factors in by_scale.items()
    ]
    notes: dict[str, list[str]] = {}
    for cause in joined:
        if not any(cause.startswith(f"{other}, ") for other in joined):
            further = [o.removeprefix(f"{cause}, ") for o in joined if o.startswith(f"{cause}, ")]
            notes[cause] = [f"perhaps {' or '.join(further)}"] if further else []
    if up_to:
        notes[[*notes][-1]].append(f"each {up_to}" if len(notes) > 1 else up_to)
    return [cause + (f" ({'; '.join(of)})" if of else "") for cause, of in notes.items()]


def sentence(causes: Sequence[str]) -> str:
    """Causes that a case cannot tell apart; empty if there is none."""
    return f" It looks {', or '.join(causes)}." if causes else ""


def diagnosis_in_expectation(
    asked: Question, near: Callable[[Pieces], bool], sizes: Mapping[str, Sizes]
) -> str:
    """Which mistakes the mean of random draws fits, as a sentence; empty if none does.

    Args:
        asked: What was asked.
        near: Whether the mean is near some numbers, as far as chance tells.
        sizes: Every layer's sizes, and `M`, how many labels are drawn for a datum.
    """
    right = truth.expected(asked.case, asked.data, asked.flavour, asked.parts)
    causes: dict[str, None] = dict.fromkeys(
        words for words, answer in explanations(asked, right, sizes) if near(answer)
    )
    for words, factor in wrong_scales([sizes[name] for name in asked.case.judged]):
        if near({key: factor * M for key, M in right.items()}):
            causes[f"as if every block were {words}"] = None
    return sentence(merged(causes))
