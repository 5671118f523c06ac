"""Well-known mistakes that explain a wrong block: what else the numbers are equal to.

Each hypothesis is another computation by the truth: with other data, another loss, another flavour.
If the implementation's numbers equal it up to one scale, the judge says so.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case, Data
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.judge import fit
from kfac_scratch.conformance.judging.pieces import LayerParts, Pieces
from kfac_scratch.conformance.vocabulary import FLAVOURS, Fisher, Flavour

Hypothesis = tuple[str, Case, Data, Flavour]  # in words; and with what the truth is computed


def diagnosis(case: Case, data: Data, flavour: Flavour, got: Pieces, parts: LayerParts) -> str:
    """Which hypothesis the numbers fit, in words; empty if none does."""
    for words, other, changed, kind in hypotheses(case, data, flavour):
        try:
            blocks = truth.expected(other, changed, kind, parts)
        except (RuntimeError, ValueError):  # not every change makes sense for every case
            continue
        if all(_fits(M, got.get(key), case.tolerance) for key, M in blocks.items()):
            return f" It looks like {words}."
    return ""


def hypotheses(case: Case, data: Data, flavour: Flavour) -> Iterator[Hypothesis]:
    """Other computations, the likely ones first."""
    for other in FLAVOURS[:2]:
        changed = replace(case, flavours={**case.flavours, other: DEFINITION})
        yield f"the definition of KFAC-{other}", changed, data, other
    yield "the exact block", replace(case, flavours={flavour: EXACT}), data, flavour
    others: tuple[Fisher, ...] = ("empirical", "type2")
    for fisher in others:
        if fisher != case.fisher and flavour != "ekfac":
            changed = replace(case, fisher=fisher, flavours={flavour: DEFINITION})
            yield f"the {fisher} Fisher", changed, data, flavour
    plain = replace(case, flavours={flavour: DEFINITION}) if flavour != "ekfac" else case
    if case.loss.weight:
        loss = replace(case.loss, weight=())
        yield "the same without the loss's weights", replace(plain, loss=loss), data, flavour
    parts = {"first datum": slice(None, 1), "last datum": slice(-1, None)}
    if case.batches:
        parts["first mini-batch"] = slice(None, case.batches[0])
        parts["last mini-batch"] = slice(-case.batches[-1], None)
    for words, keep in parts.items():
        part = replace(data, X=data.X[keep], y=data.y[keep])
        yield f"the {words} alone", replace(plain, batches=()), part, flavour


def _fits(M: Tensor, got: Tensor | None, tolerance: float) -> bool:
    if got is None or got.shape != M.shape or not torch.isfinite(M).all():
        return False
    return fit(got.double(), M.double()).residual <= tolerance
