"""Weighted losses, and data that arrive in mini-batches."""

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case, spread
from kfac_scratch.conformance.cases.families.common import (
    ALL_DEFINITION,
    ALL_EXACT,
    LOSSES,
    REDUCTIONS,
    chain,
    constant_output,
    in_single_precision,
    loss,
)
from kfac_scratch.conformance.cases.ops import classes_first, conv, flatten, linear, tanh

PLACE = 4  # in reports and vectors
CLASSES, POSITIVE = (1.0, 0.25, 3.0), (0.5, 2.0, 5.0)

CLASS_WEIGHTS = [
    Case(
        f"class-weights-{name}-{reduction}",
        theorem,
        chain(*sizes, between=tanh()),
        loss("cross-entropy", reduction, *CLASSES),
        (N, sizes[0]),
        flavours,
        tags=("cross-entropy", "class-weights"),
        data=data,
    )
    for name, theorem, sizes, N, flavours, data in (
        ("one-datum", "one-datum", (4, 5, 3), 1, ALL_EXACT, spread),
        ("constant", "constant-hessian", (5, 2, 3), 7, ALL_EXACT, constant_output),
        ("mlp", "definition", (4, 5, 3), 7, ALL_DEFINITION, spread),
    )
    for reduction in REDUCTIONS
]
WEIGHTED_TOKENS = Case(
    "class-weights-tokens",
    "definition",
    (*chain(4, 2, 3, between=tanh()), classes_first()),
    loss("cross-entropy", "mean", *CLASSES),
    (7, 5, 4),
    {"expand": DEFINITION},
    tags=("cross-entropy", "class-weights", "sequence"),
)
POS_WEIGHT = [
    Case(
        f"pos-weight-{name}-{reduction}",
        theorem,
        chain(*sizes, between=tanh()),
        loss("bce", reduction, *POSITIVE),
        (N, sizes[0]),
        flavours,
        tags=("bce", "pos-weight"),
        data=data,
    )
    for name, theorem, sizes, N, flavours, data in (
        ("one-datum", "one-datum", (4, 5, 3), 1, ALL_EXACT, spread),
        ("constant", "constant-hessian", (5, 2, 3), 7, ALL_EXACT, constant_output),
        ("mlp", "definition", (4, 5, 3), 7, ALL_DEFINITION, spread),
    )
    for reduction in REDUCTIONS
]
BATCHES = [
    Case(
        f"batches-{word}-{kind}-{reduction}",
        "deep-linear" if kind == "mse" else "definition",
        chain(4, 3, 5, between=None if kind == "mse" else tanh()),
        loss(kind, reduction),
        (sum(sizes), 4),
        {"expand": EXACT, "reduce": EXACT} if kind == "mse" else {"expand": DEFINITION},
        batches=sizes,
        tags=("batches", kind),
    )
    for word, sizes in (("equal", (3, 3)), ("unequal", (2, 5)))
    for kind in LOSSES[:2]
    for reduction in REDUCTIONS
]
CONV_BATCHES = Case(
    "batches-unequal-conv",
    "definition",
    (conv("conv", 2, 3, (2,)), tanh(), flatten(), linear("head", 12, 5)),
    loss("cross-entropy"),
    (7, 2, 5),
    {"expand": DEFINITION, "reduce": DEFINITION},
    batches=(2, 5),
    tags=("batches", "conv", "cross-entropy"),
)
EKFAC_BATCHES = Case(
    "batches-unequal-ekfac",
    "definition",
    chain(4, 3, 5, between=tanh()),
    loss("cross-entropy"),
    (7, 4),
    {"ekfac": DEFINITION},
    batches=(2, 5),
    tags=("batches", "cross-entropy"),
)
WEIGHTED_BATCHES = Case(
    "batches-class-weights",
    "definition",
    chain(4, 2, 3, between=tanh()),
    loss("cross-entropy", "mean", *CLASSES),
    (7, 4),
    {"expand": DEFINITION},
    batches=(2, 5),
    tags=("batches", "cross-entropy", "class-weights"),
)
CASES = [*CLASS_WEIGHTS, WEIGHTED_TOKENS, *POS_WEIGHT, *BATCHES, CONV_BATCHES, EKFAC_BATCHES]
CASES += [WEIGHTED_BATCHES, in_single_precision(BATCHES[2])]
