"""Pieces that families share."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import torch

from kfac_scratch.conformance.cases.case import (
    DEFINITION,
    EXACT,
    Case,
    Data,
    Loss,
    generator,
    numbers,
    parameters,
    targets,
)
from kfac_scratch.conformance.cases.ops import Op, forward, linear
from kfac_scratch.conformance.vocabulary import Expectation, Flavour, LossKind, Reduction

Expected = dict[Flavour, Expectation]
ALL_EXACT: Expected = {"expand": EXACT, "reduce": EXACT, "ekfac": EXACT}
BOTH_EXACT: Expected = {"expand": EXACT, "reduce": EXACT}
ALL_DEFINITION: Expected = {"expand": DEFINITION, "reduce": DEFINITION, "ekfac": DEFINITION}
BOTH_DEFINITION: Expected = {"expand": DEFINITION, "reduce": DEFINITION}
LOSSES: tuple[LossKind, ...] = ("mse", "cross-entropy", "bce")
REDUCTIONS: tuple[Reduction, ...] = ("mean", "sum")
BIASES = {"bias": True, "nobias": False}


def reductions_and_biases() -> Iterator[tuple[str, Reduction, bool]]:
    """Reductions and biases: the end of an identifier, and both."""
    for reduction, (word, bias) in product(REDUCTIONS, BIASES.items()):
        yield f"{reduction}-{word}", reduction, bias


def chain(*sizes: int, bias: bool = True, between: Op | None = None) -> tuple[Op, ...]:
    """Linear layers, with an activation between them or not."""
    ops: list[Op] = []
    for i, (d_in, d_out) in enumerate(pairwise(sizes)):
        if i and between:
            ops.append(between)
        ops.append(linear(f"fc{i + 1}", d_in, d_out, bias))
    return tuple(ops)


def in_single_precision(case: Case) -> Case:
    """The same numbers in float32."""
    return replace(case, id=f"{case.id}-float32", dtype="float32", tags=(*case.tags, "float32"))


def constant_output(case: Case) -> Data:
    """Inputs that differ by elements of the first weight's null space.

    The first weight is `[P, P K]`, so that `(-K c, c)` is in its null space; with small
    multiples of powers of two, the layer's result is the same for all data without any rounding.
    """
    random = generator(case)
    theta, first = parameters(random, case.ops), case.ops[0]
    half = first["d_in"] // 2
    P = numbers(random, first["d_out"], first["d_in"] - half) / 2
    K = numbers(random, first["d_in"] - half, half).round()
    theta[f"{first.name}.weight"] = torch.cat([P, P @ K], 1)
    c = numbers(random, case.shape[0], half)
    X = numbers(random, 1, first["d_in"]) + torch.cat([-c @ K.T, c], 1)
    y = targets(random, case.loss, forward(case.ops, theta, X[:1]))
    return Data(theta, X, y.expand(len(X), *y.shape[1:]).contiguous())


def loss(kind: LossKind, reduction: Reduction = "mean", *weight: float) -> Loss:
    """A loss."""
    return Loss(kind, reduction, weight)
