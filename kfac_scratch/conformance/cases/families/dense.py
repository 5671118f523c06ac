"""Linear layers with one position."""

from itertools import product

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families.common import (
    ALL_DEFINITION,
    ALL_EXACT,
    BOTH_EXACT,
    LOSSES,
    REDUCTIONS,
    chain,
    constant_output,
    in_single_precision,
    loss,
    reductions_and_biases,
)
from kfac_scratch.conformance.cases.ops import relu, sigmoid, tanh

PLACE = 1  # in reports and vectors
ACTIVATIONS = {"tanh": tanh(), "relu": relu(), "relu-inplace": relu(inplace=True)}

DEEP_LINEAR = [
    Case(
        f"deep-linear-mse-{end}",
        "deep-linear",
        chain(5, 3, 2, bias=bias),
        loss("mse", reduction),
        (7, 5),
        ALL_EXACT,
        tags=("linear", "mse"),
    )
    for end, reduction, bias in reductions_and_biases()
]
DEEPER = [
    Case(
        f"deeper-linear-mse-{reduction}",
        "deep-linear",
        chain(3, 5, 4, 2),
        loss("mse", reduction),
        (7, 3),
        ALL_EXACT,
        tags=("linear", "mse"),
    )
    for reduction in REDUCTIONS
]
ONE_DATUM = [
    Case(
        f"one-datum-{kind}-{name}-{reduction}",
        "one-datum",
        chain(4, 5, 3, between=ACTIVATIONS[name]),
        loss(kind, reduction),
        (1, 4),
        ALL_EXACT,
        tags=(kind, name),
    )
    for kind, name, reduction in product(LOSSES, ACTIVATIONS, REDUCTIONS)
    if reduction == "mean" or name == "tanh"
]
CONSTANT_HESSIAN = [
    Case(
        f"constant-hessian-{kind}-{end}",
        "constant-hessian",
        chain(5, 3, 2, bias=bias, between=sigmoid()),
        loss(kind, reduction),
        (7, 5),
        ALL_EXACT,
        data=constant_output,
        tags=(kind, "sigmoid"),
    )
    for kind in LOSSES
    for end, reduction, bias in reductions_and_biases()
    if bias or reduction == "mean"
]
LAST_LAYER = [
    Case(
        f"last-layer-mse-{name}-{reduction}",
        "last-layer",
        chain(3, 4, 5, between=ACTIVATIONS[name]),
        loss("mse", reduction),
        (7, 3),
        ALL_EXACT,
        layers=("fc2",),
        tags=("mse", name),
    )
    for name, reduction in product(ACTIVATIONS, REDUCTIONS)
]
BIAS = [
    Case(
        f"bias-{kind}-{reduction}",
        "bias",
        chain(3, 4, 5, between=tanh()),
        loss(kind, reduction),
        (7, 3),
        BOTH_EXACT,
        part="bias",
        tags=(kind, "tanh"),
    )
    for kind, reduction in product(LOSSES, REDUCTIONS)
]
NOT_EXACT = [
    Case(
        f"mlp-{kind}-{reduction}",
        "definition",
        chain(4, 3, 5, between=tanh()),
        loss(kind, reduction),
        (7, 4),
        ALL_DEFINITION,
        tags=(kind, "tanh"),
    )
    for kind, reduction in product(LOSSES, REDUCTIONS)
]
LINEAR_CE = [
    Case(
        f"deep-linear-cross-entropy-{end}",
        "definition",
        chain(4, 3, 5, bias=bias),
        loss("cross-entropy", reduction),
        (7, 4),
        ALL_DEFINITION,
        tags=("linear", "cross-entropy"),
    )
    for end, reduction, bias in reductions_and_biases()
    if bias or reduction == "sum"
]

CASES = [*DEEP_LINEAR, *DEEPER, *ONE_DATUM, *CONSTANT_HESSIAN, *LAST_LAYER, *BIAS, *NOT_EXACT]
CASES += LINEAR_CE
CASES += [
    in_single_precision(family[0])
    for family in (DEEP_LINEAR, ONE_DATUM, CONSTANT_HESSIAN, LAST_LAYER, BIAS, NOT_EXACT)
]
