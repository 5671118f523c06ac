"""Ask an adapter about a case, and have the answer judged.

Whatever goes wrong in an adapter becomes that case's verdict; the run goes on.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import Case, Data
from kfac_scratch.conformance.cases.ops import Op, layer_ops, network
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.diagnoses import diagnosis
from kfac_scratch.conformance.judging.judge import (
    Result,
    bad_scale,
    judge,
    known_scale,
    unusable,
)
from kfac_scratch.conformance.judging.layout import Malformed, canonical
from kfac_scratch.conformance.judging.pieces import PieceKey, Pieces
from kfac_scratch.conformance.protocol import (
    Adapter,
    Capabilities,
    NotSupported,
    Request,
)
from kfac_scratch.conformance.vocabulary import Flavour, PartName

SAMPLES, REPETITIONS = 3, 40  # labels per datum, and independent draws, for `mc`
STANDARD_ERRORS = 6.0


def run(adapter: Adapter, cases: Sequence[Case], device: str = "cpu") -> Iterator[Result]:
    """A verdict for every flavour of every case."""
    for case in cases:
        for flavour in case.flavours:
            yield verdict(adapter, case, flavour, device)


def verdict(adapter: Adapter, case: Case, flavour: Flavour, device: str = "cpu") -> Result:
    """A verdict on one flavour of a case; never raises."""
    start = time.perf_counter()
    try:
        result = _verdict(adapter, case, flavour, device)
    except NotSupported as reason:
        result = Result(case.id, flavour, "not-supported", str(reason))
    except Malformed as reason:
        result = Result(case.id, flavour, "error", str(reason))
    except Exception as error:  # an adapter may raise anything, and the run goes on
        result = Result(case.id, flavour, "error", f"{type(error).__name__}: {error}")
    return replace(result, seconds=time.perf_counter() - start)


def missing(offered: Capabilities, case: Case, flavour: Flavour) -> str:
    """What a case needs and an implementation does not offer, in words; empty if nothing."""
    kinds = {op.kind for op in case.ops if op.is_layer}
    reasons = {
        f"flavour {flavour}": flavour in offered.flavours,
        f"fisher {case.fisher}": case.fisher in offered.fishers,
        f"loss {case.loss.kind}": case.loss.kind in offered.losses,
        f"dtype {case.dtype}": case.dtype in offered.dtypes,
        f"operations {', '.join(sorted(kinds - offered.ops))}": not offered.ops
        or kinds <= offered.ops,
        "several mini-batches": offered.batches or len(case.batches) < 2,
        "damped inverses": not case.damping or case.damping[0] in offered.damping,
        "differential operators": offered.operators or not case.operator,
    }
    return ", ".join(reason for reason, holds in reasons.items() if not holds)


def request(case: Case, data: Data, flavour: Flavour, seed: int = 0) -> Request:
    """What an adapter is asked; a fresh module every time."""
    gradient = truth.gradients(case, data) if case.damping else {}
    return Request(
        case=case.id,
        model=network(case.ops, data.parameters),
        loss=case.loss.module(data.X),
        batches=[(X.clone(), y.clone()) for X, y in case.split(data)],
        layers=case.judged,
        flavour=flavour,
        fisher=case.fisher,
        samples=SAMPLES,
        seed=seed,
        damping=case.damping,
        gradient=gradient,
        coefficients=data.coefficients,
    )


def answer(adapter: Adapter, case: Case, asked: Request) -> dict[PieceKey, Tensor]:
    """An adapter's numbers in canonical layout."""
    returned = adapter.blocks(asked)
    if not isinstance(returned, Mapping):
        raise Malformed(f"blocks() returned a {type(returned).__name__}, expected a mapping.")
    return pieces(case, returned)


def pieces(case: Case, returned: Mapping[str, Any]) -> dict[PieceKey, Tensor]:
    """Raw blocks in canonical layout, by layer and part, as far as a case judges them."""
    ops, found = layer_ops(case.ops), {}
    for name in case.judged:
        if name not in returned:
            raise Malformed(f"no block for the layer {name!r}; got {sorted(returned)}.")
        for part, M in canonical(name, returned[name], ops[name]).items():
            if truth.columns_of(case, ops[name], part):
                found[name, part] = _judged(case, ops[name], part, M)
    return found


def _judged(case: Case, op: Op, part: PartName, M: Tensor) -> Tensor:
    """Of an implementation's part, the entries that a case judges."""
    if case.part == "block" or part == "bias":
        return M
    index = truth.entries(op, [-1])
    return M[:, index][:, :, index]


def parts_of(got: Pieces) -> dict[str, tuple[PartName, ...]]:
    """Which parts each layer came in."""
    names = dict.fromkeys(name for name, _ in got)
    return {name: tuple(part for layer, part in got if layer == name) for name in names}


def _verdict(adapter: Adapter, case: Case, flavour: Flavour, device: str) -> Result:
    lacking = missing(adapter.capabilities(), case, flavour)
    if lacking:
        raise NotSupported(lacking)
    data = case.build(device)
    if case.fisher == "mc":
        return _in_expectation(adapter, case, data, flavour)
    got, again = (answer(adapter, case, request(case, data, flavour)) for _ in range(2))
    if any(not torch.equal(got[key], again[key]) for key in got if got[key].isfinite().all()):
        spread = max(float((got[key] - again[key]).abs().max()) for key in got)
        words = f"not deterministic: the same request twice differs by up to {spread:.2g}."
        return Result(case.id, flavour, "error", words)
    return compared(adapter, case, data, flavour, got)


def compared(adapter: Adapter, case: Case, data: Data, flavour: Flavour, got: Pieces) -> Result:
    """Have an implementation's numbers judged, with a diagnosis if they are wrong."""
    asked = request(case, data, flavour)
    right = truth.expected(case, data, flavour, parts_of(got))
    documented = {key: adapter.scale(asked, *key) for key in right}
    result = judge(case, flavour, got, right, documented, truth.sizes(case, data))
    if result.verdict != "wrong":
        return result
    return replace(result, words=result.words + diagnosis(case, data, flavour, got, parts_of(got)))


def _in_expectation(adapter: Adapter, case: Case, data: Data, flavour: Flavour) -> Result:
    """Judge a random estimator by the mean of independent draws, entry by entry.

    The mean must lie within a stated number of standard errors. What an implementation documents as
    a scale is taken out first.
    """
    draws = [
        answer(adapter, case, request(case, data, flavour, seed)) for seed in range(REPETITIONS)
    ]
    right = truth.expected(case, data, flavour, parts_of(draws[0]))
    asked, worst, scales = request(case, data, flavour), 0.0, {}
    documented = {key: adapter.scale(asked, *key) for key in right}
    if complaint := unusable(case, draws[0], right) or bad_scale(documented):
        return Result(case.id, flavour, "error", complaint)
    for key, M in right.items():
        of_key = known_scale(documented[key])
        samples = torch.stack([draw[key] for draw in draws]) / of_key  # [R, groups, D, D]
        mean, error = samples.mean(0), samples.std(0) / REPETITIONS**0.5
        if float(samples.std(0).max()) == 0:
            return Result(case.id, flavour, "error", f"{' '.join(key)}: seeds give equal draws.")
        noise = error.clamp_min(1e-12 * M.abs().max())
        worst = max(worst, float(((mean - M).abs() / noise).max()))
        scales[" ".join(key)] = float((mean * M).sum() / (M * M).sum())
    words = f"{REPETITIONS} draws of {SAMPLES} labels: within {worst:.2g} standard errors."
    if worst <= STANDARD_ERRORS:
        return Result(case.id, flavour, "definition", words, scales=scales)
    words = f"{REPETITIONS} draws of {SAMPLES} labels: off by {worst:.3g} standard errors"
    found = ", ".join(f"{key} {scale:.3g}" for key, scale in scales.items())
    return Result(case.id, flavour, "wrong", f"{words}; mean scales {found}.", scales=scales)
