"""The judge: from an implementation's numbers to a verdict, with the scale named in words.

| verdict | meaning | passes |
|---|---|---|
| `exact` | equals the exact curvature block, where the theorem says that it must | yes |
| `definition` | equals the definition, where that is not exact | yes |
| `scaled` | one of the two after the scale that the documentation states | yes |
| `undocumented-scale` | right up to one number for all, which no documentation states | no |
| `inconsistent-scale` | right up to numbers that differ between layers, or weight and bias | no |
| `wrong` | not right up to any scale | no |
| `not-supported` | the implementation says that it does not offer this | yes |
| `error` | no numbers: an exception, a wrong shape or precision, not finite, a time-out | no |
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.expectations import Judged
from kfac_scratch.conformance.judging.pieces import PieceKey, Pieces
from kfac_scratch.conformance.judging.scalars import Sizes, in_words, meanings, off_by, readings
from kfac_scratch.conformance.printable import printable
from kfac_scratch.conformance.vocabulary import EXACT, PASSING, Flavour, Verdict


@dataclass(frozen=True)
class Result:
    """A verdict on one case.

    Attributes:
        case: The case's identifier.
        flavour: What was asked for.
        verdict: See the module.
        words: The reason, for people. It is made printable: an adapter may raise any text.
        error: Largest difference after the documented scale, relative to the largest entry.
        residual: The same after the best scale.
        scales: The best scale by layer and part, relative to the documented one. None if there is
            none, because what is expected is zero.
        seconds: How long it took.
    """

    case: str
    flavour: Flavour
    verdict: Verdict
    words: str = ""
    error: float | None = None
    residual: float | None = None
    scales: Mapping[str, float | None] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", printable(str(self.words)))

    @property
    def passes(self) -> bool:
        """Whether the implementation does what is asked, or says that it does not offer it."""
        return self.verdict in PASSING

    def as_json(self) -> dict[str, Any]:
        """As numbers and strings."""
        return asdict(self)


@dataclass(frozen=True)
class Fit:
    """How well one piece agrees: as it is, and after the best scale."""

    scale: float
    error: float
    residual: float


def judge(
    case: Judged,
    flavour: Flavour,
    got: Pieces,
    expected: Pieces,
    documented: Mapping[PieceKey, float | None],
    sizes: Mapping[str, Sizes],
) -> Result:
    """Compare canonical pieces of an implementation with the truth's.

    Args:
        case: What was asked.
        flavour: Of KFAC.
        got: The implementation's numbers, in canonical layout.
        expected: What is right, for the same pieces.
        documented: The factor by which, says the documentation, pieces exceed canonical ones.
        sizes: Every layer's sizes, by letter.
    """
    complaint = unusable(case, got, expected) or bad_scale(documented)
    if complaint:
        return Result(case.id, flavour, "error", complaint)
    fits = {
        key: fit(got[key].double() / known_scale(documented[key]), expected[key].double())
        for key in expected
    }
    stated = all(d is not None for d in documented.values())
    verdict, words = _verdict(case, flavour, fits, stated, documented, sizes)
    scales = {" ".join(key): f.scale for key, f in fits.items()}
    error, residual = max(f.error for f in fits.values()), max(f.residual for f in fits.values())
    return Result(case.id, flavour, verdict, words, error, residual, scales)


def known_scale(documented: float | None) -> float:
    """The scale to divide by: 1 if the documentation states none."""
    return 1.0 if documented is None else float(documented)


def bad_scale(documented: Mapping[PieceKey, Any]) -> str:
    """Why a documented scale is none; empty if all are positive numbers."""
    for key, scale in documented.items():
        is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
        if scale is not None and not (is_number and 0 < scale <= sys.float_info.max):
            return f"{' '.join(key)}: scale() returned {scale!r}, which is no positive number."
    return ""


def unusable(case: Judged, got: Pieces, expected: Pieces) -> str:
    """Why numbers cannot be compared at all; empty if they can."""
    missing = sorted({name for name, _ in expected} - {name for name, _ in got})
    if missing:
        return f"no block for the layers {missing}."
    for (name, part), M in got.items():
        if M.dtype != getattr(torch, case.dtype):
            return f"{name}, {part}: {M.dtype} where the model and the data are {case.dtype}."
        if not M.isfinite().all():
            return f"{name}, {part}: {int((~M.isfinite()).sum())} numbers are not finite."
    return ""


def fit(got: Tensor, expected: Tensor) -> Fit:
    """The best scale in the sense of least squares, and what differs before and after it."""
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    scale = float((got * expected).sum() / (expected * expected).sum())
    error = float((got - expected).abs().max() / largest)
    if not scale > 0:
        return Fit(scale, error, float("inf"))
    return Fit(scale, error, float((got / scale - expected).abs().max() / largest))


def _verdict(
    case: Judged,
    flavour: Flavour,
    fits: Mapping[PieceKey, Fit],
    stated: bool,
    documented: Mapping[PieceKey, float | None],
    sizes: Mapping[str, Sizes],
) -> tuple[Verdict, str]:
    if all(f.error <= case.tolerance for f in fits.values()):
        if any(d is not None and abs(d - 1) > 1e-12 for d in documented.values()):
            return "scaled", _documented(documented, sizes)
        return ("exact", "") if case.flavours[flavour] == EXACT else ("definition", "")
    bad = {key: f for key, f in fits.items() if not f.residual <= case.tolerance}
    if bad:
        return "wrong", _wrong(bad)
    values = [f.scale for f in fits.values()]
    if max(values) - min(values) > case.tolerance * max(values):
        return "inconsistent-scale", _differing(case, fits, sizes)
    words = off_by(values[0], [sizes[name] for name, _ in fits], case.tolerance)
    claim = "" if stated else "the documentation is silent; "
    return "undocumented-scale", f"every block: {claim}{words}."


def _differing(case: Judged, fits: Mapping[PieceKey, Fit], sizes: Mapping[str, Sizes]) -> str:
    """Scales that differ between pieces: by one formula if there is one, else one by one."""
    words = {key: off_by(f.scale, sizes[key[0]], case.tolerance) for key, f in fits.items()}
    small = all(f.scale <= 1 + case.tolerance for f in fits.values())
    scales = [(1 / f.scale if small else f.scale, sizes[key[0]]) for key, f in fits.items()]
    found = readings(scales, case.tolerance)
    if not found:
        return _each("", words)
    direction, several = "small" if small else "large", [of_layer for _, of_layer in scales]
    numbers = {key: f"{s:.6g}" for key, (s, _) in zip(fits, scales, strict=True)}
    lead = f"too {direction} by {' or '.join(found)} ({meanings(found, several)}):"
    return _each(lead, numbers)


def _wrong(bad: Mapping[PieceKey, Fit]) -> str:
    """The worst piece, and the names of all that no scale mends."""
    key = max(bad, key=lambda key: bad[key].residual)
    worst, pieces = bad[key], ", ".join(map(" ".join, bad))
    found = f"off by {worst.residual:.2g} of the largest entry after the best scale"
    if not worst.scale > 0:
        found = f"no positive scale fits, the best is {worst.scale:.2g}"
    return f"{' '.join(key)}: {found}; wrong pieces: {pieces}."


def _documented(documented: Mapping[PieceKey, float | None], sizes: Mapping[str, Sizes]) -> str:
    words = {key: in_words(d or 1.0, sizes[key[0]]) for key, d in documented.items()}
    if len(set(words.values())) == 1:
        return f"documented: {next(iter(words.values()))}."
    return _each("documented", words)


def _each(lead: str, words: Mapping[PieceKey, str]) -> str:
    pieces = "; ".join(f"{' '.join(key)}: {text}" for key, text in words.items())
    return f"{lead} {pieces}.".lstrip()
