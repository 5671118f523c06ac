"""Monte Carlo and empirical Fishers."""

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case, spread
from kfac_scratch.conformance.cases.families.common import (
    LOSSES,
    REDUCTIONS,
    Expected,
    chain,
    constant_output,
    loss,
)
from kfac_scratch.conformance.cases.ops import classes_first, mean_positions, tanh

PLACE = 5  # in reports and vectors
EXPAND_DEFINITION: Expected = {"expand": DEFINITION}

SAMPLED = [
    Case(
        f"sampled-{kind}-{reduction}",
        "expectation",
        chain(4, 3, 2, between=tanh()),
        loss(kind, reduction),
        (7, 4),
        EXPAND_DEFINITION,
        fisher="mc",
        tags=("mc", kind),
    )
    for kind in LOSSES
    for reduction in REDUCTIONS
]
SAMPLED_TOKENS = Case(
    "sampled-tokens-cross-entropy",
    "expectation",
    (*chain(4, 3, 2, between=tanh()), classes_first()),
    loss("cross-entropy"),
    (7, 5, 4),
    EXPAND_DEFINITION,
    fisher="mc",
    tags=("mc", "cross-entropy", "sequence"),
)
SAMPLED_POOL = Case(
    "sampled-pooled-mse",
    "expectation",
    (*chain(4, 3, 2, between=tanh()), mean_positions()),
    loss("mse"),
    (7, 5, 4),
    {"reduce": DEFINITION},
    fisher="mc",
    tags=("mc", "mse", "pool"),
)
EMPIRICAL = [
    Case(
        f"empirical-{name}-{kind}-{reduction}",
        theorem,
        chain(*sizes, between=tanh()),
        loss(kind, reduction),
        (N, sizes[0]),
        {"expand": expected, "reduce": expected, "ekfac": expected},
        fisher="empirical",
        tags=("empirical", kind),
        data=data,
    )
    for name, theorem, sizes, N, expected, data in (
        ("one-datum", "one-datum", (4, 3, 5), 1, EXACT, spread),
        ("constant", "constant-hessian", (5, 3, 2), 7, EXACT, constant_output),
        ("mlp", "definition", (4, 3, 5), 7, DEFINITION, spread),
    )
    for kind in LOSSES
    for reduction in REDUCTIONS
    if reduction == "mean" or kind == "cross-entropy"
]
EMPIRICAL_BATCHES = Case(
    "empirical-batches-cross-entropy",
    "definition",
    chain(4, 3, 5, between=tanh()),
    loss("cross-entropy"),
    (7, 4),
    EXPAND_DEFINITION,
    fisher="empirical",
    batches=(2, 5),
    tags=("empirical", "batches", "cross-entropy"),
)
CASES = [*SAMPLED, SAMPLED_TOKENS, SAMPLED_POOL, *EMPIRICAL, EMPIRICAL_BATCHES]
