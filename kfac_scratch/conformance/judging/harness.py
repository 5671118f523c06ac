"""Ask an adapter about a case, and have the answer judged.

Two halves: `answered` goes from an adapter to numbers, `judged` from numbers to a verdict.
`verdict` joins them in one process, whose adapter is trusted: it could replace the judge.
`isolation` runs the first half in a process of its own, and only numbers come back.

Whatever goes wrong in an adapter becomes that case's verdict; the run goes on.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import Case, Data
from kfac_scratch.conformance.cases.ops import Op, layer_ops, network, projections, tied_uses
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.diagnoses import diagnosis, diagnosis_in_expectation
from kfac_scratch.conformance.judging.judge import (
    Result,
    bad_scale,
    judge,
    known_scale,
    unusable,
)
from kfac_scratch.conformance.judging.layout import (
    Malformed,
    canonical,
    part_choices,
    wrong_parts,
)
from kfac_scratch.conformance.judging.pieces import Answer, PieceKey, Pieces
from kfac_scratch.conformance.judging.scalars import UNEXPLAINED, Sizes
from kfac_scratch.conformance.judging.ways import asked_about
from kfac_scratch.conformance.protocol import (
    Adapter,
    Capabilities,
    NotSupported,
    Request,
)
from kfac_scratch.conformance.vocabulary import Flavour, PartName, Verdict

SAMPLES, REPETITIONS = 3, 40  # labels per datum, and independent draws, for `mc`
STANDARD_ERRORS = 6.0


def run(adapter: Adapter, cases: Sequence[Case], device: str = "cpu") -> Iterator[Result]:
    """A verdict for every flavour of every case."""
    for case in cases:
        for flavour in case.flavours:
            yield verdict(adapter, case, flavour, device)


def verdict(adapter: Adapter, case: Case, flavour: Flavour, device: str = "cpu") -> Result:
    """A verdict on one flavour of a case; never raises."""
    return concluded(case, flavour, partial(answered, adapter, case, flavour, device), device)


def concluded(
    case: Case, flavour: Flavour, ask: Callable[[], Answer], device: str = "cpu"
) -> Result:
    """Ask, and judge what comes; never raises.

    Args:
        case: What is asked.
        flavour: Of KFAC.
        ask: It returns the answer, or raises anything.
        device: Where the answer's numbers are.
    """
    start = time.perf_counter()
    try:
        result = judged(case, flavour, ask(), device)
    except Exception as error:  # an adapter may raise anything, and the run goes on
        result = Result(case.id, flavour, *complaint_of(error))
    return replace(result, seconds=time.perf_counter() - start)


def complaint_of(error: Exception) -> tuple[Verdict, str]:
    """The verdict on who raised an exception instead of answering, and the reason in words."""
    try:
        words = str(error)
    except Exception:  # its text is made by the adapter, too
        words = "its text cannot be made."
    if isinstance(error, NotSupported):
        return "not-supported", words
    return "error", words if isinstance(error, Malformed) else f"{type(error).__name__}: {words}"


# ---- from an adapter to numbers ------------------------------------------------------------------


def answered(adapter: Adapter, case: Case, flavour: Flavour, device: str = "cpu") -> Answer:
    """An adapter's numbers, without a judgement.

    Raises:
        NotSupported: If the implementation does not offer what a case needs.
        Malformed: If what it returns is no answer.
        Exception: Whatever the adapter raises.
    """
    lacking = missing(adapter.capabilities(), case, flavour)
    if lacking:
        raise NotSupported(lacking)
    data = case.build(device)
    draws = _draws(adapter, case, data, flavour)
    asked = request(case, data, flavour)
    return Answer(draws, {key: adapter.scale(asked, *key) for key in draws[0]})


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
        "a weight that layers apply both ways": offered.ties or not tied_uses(case.ops),
        "masks of positions": offered.masks or not case.masked,
        "differential operators": offered.operators or not case.operator,
        "the projections of an attention module": offered.projections
        or not {*case.judged} & {*projections(case.ops)},
    }
    return ", ".join(reason for reason, holds in reasons.items() if not holds)


def request(case: Case, data: Data, flavour: Flavour, seed: int = 0) -> Request:
    """What an adapter is asked; a fresh module every time."""
    gradient = truth.gradients(case, data) if case.damping else {}
    masks = [case.mask(y) for _, y in case.split(data)]
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
        masks=[mask for mask in masks if mask is not None],
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


def _draws(adapter: Adapter, case: Case, data: Data, flavour: Flavour) -> list[Pieces]:
    """An adapter's pieces: for the same request twice, or for `mc` for every seed."""
    seeds = range(REPETITIONS) if case.fisher == "mc" else (0, 0)
    return [answer(adapter, case, request(case, data, flavour, seed)) for seed in seeds]


# ---- from numbers to a verdict -------------------------------------------------------------------


def judged(case: Case, flavour: Flavour, given: Answer, device: str = "cpu") -> Result:
    """A verdict on numbers, wherever they come from, with a diagnosis if they are wrong.

    Args:
        case: What was asked.
        flavour: Of KFAC.
        given: The numbers. Nothing is assumed about them but their types.
        device: Where they are.
    """
    if complaint := incomplete(case, given):
        return Result(case.id, flavour, "error", complaint)
    data, got = case.build(device), given.draws[0]
    right = truth.expected(case, data, flavour, parts_of(got))
    if complaint := misshapen(given, right):
        return Result(case.id, flavour, "error", complaint)
    if case.fisher == "mc":
        return _in_expectation(case, data, flavour, given, right)
    again = given.draws[1]
    if any(not torch.equal(got[key], again[key]) for key in got if got[key].isfinite().all()):
        spread = max(float((got[key] - again[key]).abs().max()) for key in got)
        words = f"not deterministic: the same request twice differs by up to {spread:.2g}."
        return Result(case.id, flavour, "error", words)
    sizes = OnDemand(partial(truth.letters, case, data))
    result = judge(case, flavour, got, right, given.scales, sizes)
    if result.verdict != "wrong" and UNEXPLAINED not in result.words:
        return result
    unscaled = {key: M / known_scale(given.scales[key]) for key, M in got.items()}
    cause = diagnosis(asked_about(case, data, flavour, parts_of(got)), unscaled, sizes)
    return replace(result, words=result.words + cause)


class OnDemand(Mapping[str, Sizes]):
    """The sizes of layers, computed when one is asked for: a verdict without a scale needs none."""

    def __init__(self, compute: Callable[[], Mapping[str, Sizes]]) -> None:
        self._compute = compute

    @cached_property
    def _sizes(self) -> Mapping[str, Sizes]:
        return self._compute()

    def __getitem__(self, layer: str) -> Sizes:
        return self._sizes[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)


def incomplete(case: Case, given: Answer) -> str:
    """What an answer lacks, or has beside what was asked, in words; empty if nothing."""
    wanted = REPETITIONS if case.fisher == "mc" else 2
    if len(given.draws) != wanted:
        return f"{len(given.draws)} answers to {wanted} requests."
    ops, first = layer_ops(case.ops), parts_of(given.draws[0])
    if missing_layers := [name for name in case.judged if name not in first]:
        return f"no block for the layers {missing_layers}."
    if others := [name for name in first if name not in case.judged]:
        return f"blocks for {others}, which nobody asked for."
    for name, parts in first.items():
        choices = [_judged_parts(case, ops[name], choice) for choice in part_choices(ops[name])]
        if set(parts) not in choices:
            return wrong_parts(name, set(parts), choices)
    if any(draw.keys() != given.draws[0].keys() for draw in given.draws):
        return "other parts at one time than at another."
    if given.scales.keys() != given.draws[0].keys():
        return "scales of other parts than there are blocks of."
    return ""


def misshapen(given: Answer, right: Pieces) -> str:
    """Which piece has another shape than what is right, in words; empty if none has."""
    for draw in given.draws:
        for (name, part), M in right.items():
            if draw[name, part].shape != M.shape:
                shape = list(draw[name, part].shape)
                return f"{name}, {part}: the shape is {shape}, expected {list(M.shape)}."
    return ""


def _judged_parts(case: Case, op: Op, parts: Iterable[PartName]) -> set[PartName]:
    """Of some parts, those that have columns that a case judges."""
    return {part for part in parts if truth.columns_of(case, op, part)}


def _in_expectation(
    case: Case, data: Data, flavour: Flavour, given: Answer, right: Pieces
) -> Result:
    """Judge a random estimator by the mean of independent draws, entry by entry.

    The mean must lie within a stated number of standard errors, and these must be small beside the
    largest entry, or any mean would do. What an implementation documents as a scale is taken out
    first.
    """
    complaints = (unusable(case, draw, right) for draw in given.draws)
    if complaint := next(filter(None, complaints), "") or bad_scale(given.scales):
        return Result(case.id, flavour, "error", complaint)
    scales, means, noises = {}, {}, {}
    for key, M in right.items():
        of_key = known_scale(given.scales[key])
        samples = torch.stack([draw[key] for draw in given.draws]) / of_key  # [R, groups, D, D]
        mean, error = samples.mean(0), samples.std(0) / REPETITIONS**0.5
        if float(samples.std(0).max()) == 0:
            return Result(case.id, flavour, "error", f"{' '.join(key)}: seeds give equal draws.")
        largest = float(torch.maximum(mean.abs().max(), M.abs().max()))
        if not STANDARD_ERRORS * float(error.max()) < largest:
            words = f"{' '.join(key)}: draws spread so much that their mean says nothing."
            return Result(case.id, flavour, "error", words)
        means[key], noises[key] = mean, error.clamp_min(1e-12 * M.abs().max())
        scales[" ".join(key)] = float((mean * M).sum() / (M * M).sum())

    def distance(answer: Pieces) -> float:
        """The largest, in standard errors; not a number if one of them is none."""
        found = [((means[key] - M).abs() / noises[key]).max() for key, M in answer.items()]
        return float(torch.stack(found).max())

    worst = distance(right)
    words = f"{REPETITIONS} draws of {SAMPLES} labels: within {worst:.2g} standard errors."
    if worst <= STANDARD_ERRORS:
        return Result(case.id, flavour, "definition", words, scales=scales)
    words = f"{REPETITIONS} draws of {SAMPLES} labels: off by {worst:.3g} standard errors"
    found = ", ".join(f"{key} {scale:.3g}" for key, scale in scales.items())
    sizes = OnDemand(partial(truth.letters, case, data))
    parts = parts_of(given.draws[0])

    def near(answer: Pieces) -> bool:
        return distance(answer) <= STANDARD_ERRORS

    drawn = {name: {**sizes[name], "M": SAMPLES} for name in case.judged}
    cause = diagnosis_in_expectation(asked_about(case, data, flavour, parts), near, drawn)
    words = f"{words}; mean scales {found}.{cause}"
    return Result(case.id, flavour, "wrong", words, scales=scales)
