"""`nn.MultiheadAttention`: four matrices, of which PyTorch holds three in one parameter.

Its four layers are asked for by name: `q_proj`, `k_proj`, `v_proj` and `out_proj`. The first three
are no modules. The last one is a module, with a weight of its own, but PyTorch never calls it, so
that a forward hook on it stays silent. An implementation without blocks for them does not claim
`projections`, and is asked for none of them. Two cases ask for `out_proj` alone, for there KFAC is
exact.

The key's layer is judged by KFAC-expand only. A shift of all keys changes nothing, so the sum of
its vectors over positions is zero.
"""

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case
from kfac_scratch.conformance.cases.families.common import (
    BOTH_DEFINITION,
    in_single_precision,
    loss,
)
from kfac_scratch.conformance.cases.ops import (
    classes_first,
    linear,
    mean_positions,
    multihead,
    transpose,
)

PLACE = 9  # in reports and vectors
SELF = multihead("attention", 4, 2)
ATTENDED_POOL = (*SELF, mean_positions(), linear("head", 4, 5))
WITHOUT_KEYS = ("attention.q_proj", "attention.v_proj", "attention.out_proj", "head")
OUT = ("attention.out_proj",)

ATTENDED_TOKENS = Case(
    "multihead-tokens-cross-entropy",
    "definition",
    (*SELF, classes_first()),
    loss("cross-entropy"),
    (7, 3, 4),
    {"expand": DEFINITION, "ekfac": DEFINITION},
    tags=("attention", "multihead", "sequence", "cross-entropy"),
)
MEMORY = Case(
    "multihead-memory-mse",
    "definition",
    (linear("memory", 4, 4), *multihead("attention", 4, 2, sources=(-1, 0, 0), start=1)),
    loss("mse"),
    (7, 3, 4),
    {"expand": DEFINITION},
    tags=("attention", "multihead", "sequence", "mse"),
)
OTHER_SIZES = Case(
    "multihead-other-sizes-cross-entropy",
    "definition",
    (
        transpose(),
        linear("value", 3, 5),
        *multihead("attention", 4, 2, others=(3, 5), sources=(-1, 0, 1), start=2),
        mean_positions(),
        linear("head", 4, 5),
    ),
    loss("cross-entropy"),
    (7, 3, 4),
    {"expand": DEFINITION},
    tags=("attention", "multihead", "sequence", "cross-entropy"),
)
ATTENDED_POOLS = [
    Case(
        "multihead-pooled-cross-entropy",
        "definition",
        ATTENDED_POOL,
        loss("cross-entropy"),
        (7, 3, 4),
        BOTH_DEFINITION,
        layers=WITHOUT_KEYS,
        tags=("attention", "multihead", "pool", "cross-entropy"),
    ),
    Case(
        "multihead-pooled-bias",
        "bias",
        ATTENDED_POOL,
        loss("cross-entropy"),
        (7, 3, 4),
        {"reduce": EXACT},
        part="bias",
        layers=WITHOUT_KEYS,
        tags=("attention", "multihead", "pool", "cross-entropy"),
    ),
]
OUT_PROJECTION = [
    Case(
        "multihead-out-tokens-mse",
        "last-layer",
        SELF,
        loss("mse"),
        (7, 3, 4),
        {"expand": EXACT, "ekfac": EXACT},
        layers=OUT,
        tags=("attention", "multihead", "sequence", "mse"),
    ),
    Case(
        "multihead-out-pooled-mse",
        "deep-linear-pooled",
        (*SELF, mean_positions()),
        loss("mse", "sum"),
        (7, 3, 4),
        {"reduce": EXACT, "expand": DEFINITION},
        layers=OUT,
        tags=("attention", "multihead", "pool", "mse"),
    ),
]
CASES = [ATTENDED_TOKENS, MEMORY, OTHER_SIZES, *ATTENDED_POOLS, *OUT_PROJECTION]
CASES += [in_single_precision(ATTENDED_TOKENS)]
