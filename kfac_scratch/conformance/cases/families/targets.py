"""What targets do to a loss: smoothed labels, probabilities, weights of entries, confident outputs.

Label smoothing and probabilities leave the Hessian of cross-entropy alone, unless classes have
weights: then a term's weight is the mean of these under the target. The weights of terms are
divided by in a mean over labels, and not in one over probabilities.
"""

from dataclasses import replace

import torch

from kfac_scratch.conformance.cases.case import DEFINITION, Case, Data, Loss, spread
from kfac_scratch.conformance.cases.families.common import (
    ALL_DEFINITION,
    ALL_EXACT,
    REDUCTIONS,
    chain,
    constant_output,
    in_single_precision,
    loss,
)
from kfac_scratch.conformance.cases.families.weights import CLASSES, POSITIVE
from kfac_scratch.conformance.cases.ops import tanh

PLACE = 13  # in reports and vectors
REGIMES = (
    ("one-datum", "one-datum", (4, 5, 3), 1, ALL_EXACT, spread),
    ("constant", "constant-hessian", (5, 2, 3), 7, ALL_EXACT, constant_output),
    ("mlp", "definition", (4, 5, 3), 7, ALL_DEFINITION, spread),
)
SMOOTHED = Loss("cross-entropy", label_smoothing=0.25)
SMOOTHED_WEIGHTS = replace(SMOOTHED, weight=CLASSES)
ENTRIES = Loss("bce", entry_weight=(2.0, 0.5, 0.25))
ENTRIES_POSITIVE = replace(ENTRIES, weight=POSITIVE)


def probabilities(case: Case) -> Data:
    """Probabilities as targets: fractions, whose bits are the same everywhere."""
    data, C = spread(case), case.ops[-1]["d_out"]
    tail = [2 ** max(0, C - 2 - i) for i in range(C)]  # for five classes 8, 4, 2, 1, 1
    fractions = data.X.new_tensor(tail) / 2 ** (C - 1)
    return replace(data, y=torch.stack([fractions.roll(n) for n in range(len(data.X))]))


def confident(case: Case) -> Data:
    """One datum has a large input, and with it a confident prediction."""
    data = spread(case)
    X = data.X.clone()
    X[3] *= 32
    return replace(data, X=X)


SMOOTHING = [
    Case(
        f"label-smoothing-{words}{name}-{reduction}",
        theorem,
        chain(*sizes, between=tanh()),
        replace(smoothed, reduction=reduction),
        (N, sizes[0]),
        flavours,
        tags=("cross-entropy", "label-smoothing"),
        data=data,
    )
    for words, smoothed in (("", SMOOTHED), ("class-weights-", SMOOTHED_WEIGHTS))
    for name, theorem, sizes, N, flavours, data in REGIMES
    for reduction in REDUCTIONS
    if reduction == "mean" or words
]
EMPIRICAL_SMOOTHED = Case(
    "empirical-label-smoothing-mean",
    "definition",
    chain(4, 5, 3, between=tanh()),
    SMOOTHED_WEIGHTS,
    (7, 4),
    {"expand": DEFINITION},
    fisher="empirical",
    tags=("empirical", "cross-entropy", "label-smoothing"),
)
ENTRY_WEIGHTS = [
    Case(
        f"entry-weights-{words}{name}-{reduction}",
        theorem,
        chain(*sizes, between=tanh()),
        replace(weighted, reduction=reduction),
        (N, sizes[0]),
        flavours,
        tags=("bce", "entry-weights"),
        data=data,
    )
    for words, weighted in (("", ENTRIES), ("pos-weight-", ENTRIES_POSITIVE))
    for name, theorem, sizes, N, flavours, data in REGIMES
    for reduction in REDUCTIONS
    if reduction == "mean" or (words and name == "mlp")
]
PROBABILITIES = [
    Case(
        f"probabilities-cross-entropy-{reduction}",
        "definition",
        chain(4, 3, 5, between=tanh()),
        loss("cross-entropy", reduction),
        (7, 4),
        {"expand": DEFINITION},
        data=probabilities,
        tags=("cross-entropy", "probabilities"),
    )
    for reduction in REDUCTIONS
]
PROBABILITIES += [
    Case(
        f"probabilities-class-weights-{reduction}",
        "definition",
        chain(4, 5, 3, between=tanh()),
        loss("cross-entropy", reduction, *CLASSES),
        (7, 4),
        ALL_DEFINITION,
        data=probabilities,
        tags=("cross-entropy", "probabilities", "class-weights"),
    )
    for reduction in REDUCTIONS
]
CONFIDENT = Case(
    "confident-cross-entropy",
    "definition",
    chain(4, 3, 5),
    loss("cross-entropy"),
    (7, 4),
    {"expand": DEFINITION},
    data=confident,
    tags=("cross-entropy", "confident"),
)
CASES = [*SMOOTHING, EMPIRICAL_SMOOTHED, *ENTRY_WEIGHTS, *PROBABILITIES, CONFIDENT]
CASES += [in_single_precision(CONFIDENT)]
