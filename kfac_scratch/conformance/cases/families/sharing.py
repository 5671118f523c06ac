"""Weight sharing by linear layers: sequences, pools, masks, attention, layers used twice."""

from itertools import product

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, IGNORED, Case, Data, spread
from kfac_scratch.conformance.cases.families.common import (
    BOTH_DEFINITION,
    LOSSES,
    REDUCTIONS,
    Expected,
    chain,
    in_single_precision,
    loss,
    reductions_and_biases,
)
from kfac_scratch.conformance.cases.ops import (
    Op,
    add,
    attention,
    classes_first,
    flatten,
    linear,
    mask,
    mean_positions,
    sum_positions,
    tanh,
)

PLACE = 2  # in reports and vectors
EXPAND_EXACT: Expected = {"expand": EXACT}
REDUCE_EXACT: Expected = {"reduce": EXACT, "expand": DEFINITION}
POOLS = {"mean": mean_positions(), "sum": sum_positions()}

POSITIONS = [
    Case(
        f"positions-mse-{end}",
        "deep-linear-positions",
        chain(4, 3, 2, bias=bias),
        loss("mse", reduction),
        (7, 5, 4),
        EXPAND_EXACT,
        tags=("sequence", "mse"),
    )
    for end, reduction, bias in reductions_and_biases()
]
ND_TARGETS = [
    Case(
        f"nd-positions-mse-{reduction}",
        "deep-linear-positions",
        chain(4, 3, 2),
        loss("mse", reduction),
        (5, 3, 3, 4),
        EXPAND_EXACT,
        tags=("sequence", "mse", "n-d"),
    )
    for reduction in REDUCTIONS
]
POOLED = [
    Case(
        f"{pool}-pooled-mse-{end}",
        "deep-linear-pooled",
        (*chain(4, 3, bias=bias), POOLS[pool], linear("head", 3, 2, bias)),
        loss("mse", reduction),
        (7, 5, 4),
        REDUCE_EXACT,
        layers=("fc1",),
        tags=("sequence", "pool", "mse"),
    )
    for pool, (end, reduction, bias) in product(POOLS, reductions_and_biases())
]
AFTER = [
    Case(
        f"after-the-{pool}-pool-mse",
        "after-the-pool",
        (*chain(4, 3), tanh(), POOLS[pool], linear("head", 3, 2)),
        loss("mse"),
        (7, 5, 4),
        {"expand": EXACT, "reduce": EXACT},
        layers=("head",),
        tags=("sequence", "pool", "mse"),
    )
    for pool in POOLS
]
POOLED_BIAS = [
    Case(
        f"pooled-bias-{kind}",
        "bias",
        (*chain(4, 3), tanh(), linear("fc2", 3, 5), mean_positions(), linear("head", 5, 3)),
        loss(kind),
        (7, 2, 4),
        {"reduce": EXACT},
        part="bias",
        tags=("sequence", "pool", kind),
    )
    for kind in LOSSES
]


def ignored(case: Case) -> Data:
    """Targets of which some are -100, which cross-entropy ignores."""
    data = spread(case)
    y = data.y.flatten().clone()
    y[::3] = IGNORED
    return Data(data.parameters, data.X, y.reshape(data.y.shape))


TOKENS = [
    Case(
        f"tokens-cross-entropy-{name}-{reduction}",
        "definition",
        (*chain(4, 3, 5, between=tanh()), classes_first()),
        loss("cross-entropy", reduction),
        (N, S, 4),
        {"expand": DEFINITION},
        data=data,
        tags=("sequence", "cross-entropy", name),
    )
    for name, N, S, data in (
        ("all", 7, 2, spread),
        ("ignored", 7, 3, ignored),
        ("one-datum", 1, 3, spread),
    )
    for reduction in REDUCTIONS
]
MASKED = [
    Case(
        f"masked-{pool}-pool-{kind}",
        "definition",
        (*chain(4, 3), tanh(), linear("fc2", 3, 5), mask(1, 1, 0), POOLS[pool]),
        loss(kind),
        (7, 3, 4),
        BOTH_DEFINITION,
        tags=("sequence", "mask", kind),
    )
    for pool, kind in product(POOLS, LOSSES[:2])
]


def transformer(*end: Op) -> tuple[Op, ...]:
    """Attention of linear layers with a residual connection."""
    return (
        linear("query", 4, 3),
        linear("key", 4, 3, inputs=(-1,)),
        linear("value", 4, 5, inputs=(-1,)),
        attention(0, 1, 2),
        linear("out", 5, 4),
        add(4, -1),
        *end,
    )


ATTENTION = [
    Case(
        "attention-tokens-mse",
        "definition",
        transformer(),
        loss("mse"),
        (5, 3, 4),
        {"expand": DEFINITION},
        tags=("attention", "sequence", "mse"),
    ),
    Case(
        "attention-tokens-cross-entropy",
        "definition",
        transformer(classes_first()),
        loss("cross-entropy"),
        (5, 3, 4),
        {"expand": DEFINITION},
        tags=("attention", "sequence", "cross-entropy"),
    ),
    Case(
        "attention-pooled-cross-entropy",
        "definition",
        transformer(mean_positions(), linear("head", 4, 3)),
        loss("cross-entropy"),
        (7, 2, 4),
        BOTH_DEFINITION,
        layers=("query", "value", "out", "head"),  # a shift of all keys changes nothing: 0 there
        tags=("attention", "pool", "cross-entropy"),
    ),
    Case(
        "attention-pooled-bias",
        "bias",
        transformer(mean_positions(), linear("head", 4, 3)),
        loss("cross-entropy"),
        (7, 2, 4),
        {"reduce": EXACT},
        part="bias",
        layers=("query", "value", "out", "head"),
        tags=("attention", "pool", "cross-entropy"),
    ),
]
REUSED = [
    Case(
        "used-twice-added-mse",
        "repeated-use",
        (
            linear("first", 4, 3),
            linear("second", 4, 3, inputs=(-1,)),
            linear("fc", 3, 5, inputs=(0,)),
            linear("fc", 3, 5, inputs=(1,)),
            add(2, 3),
        ),
        loss("mse"),
        (7, 4),
        {"reduce": EXACT, "expand": DEFINITION},
        layers=("fc",),
        tags=("reused", "mse"),
    ),
    *[
        Case(
            f"used-in-a-row-{kind}",
            "definition",
            (linear("fc", 3, 3), tanh(), linear("fc", 3, 3), tanh(), linear("head", 3, 5)),
            loss(kind),
            (7, 3),
            BOTH_DEFINITION,
            tags=("reused", kind),
        )
        for kind in LOSSES[:2]
    ],
]
ND_LOSS = [
    Case(
        f"flattened-{kind}",
        "definition",
        (*chain(4, 3), tanh(), flatten(), linear("head", 15, 2)),
        loss(kind),
        (7, 5, 4),
        BOTH_DEFINITION,
        tags=("sequence", kind),
    )
    for kind in LOSSES[:2]
]

CASES = [*POSITIONS, *ND_TARGETS, *POOLED, *AFTER, *POOLED_BIAS, *TOKENS, *MASKED, *ATTENTION]
CASES += [*REUSED, *ND_LOSS]
CASES += [in_single_precision(family[0]) for family in (POSITIONS, POOLED, TOKENS, ATTENTION)]
