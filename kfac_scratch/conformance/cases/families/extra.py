"""Cases that mutation testing asked for: mistakes that all other cases let pass.

EKFAC squares the gradients of data, not of positions; the two differ only where a layer is shared
and positions meet again. The groups of a convolution may be cut wrongly at its output, which shows
only where different channels receive different vectors.
"""

from kfac_scratch.conformance.cases.case import DEFINITION, Case
from kfac_scratch.conformance.cases.families.common import (
    LOSSES,
    Expected,
    chain,
    in_single_precision,
    loss,
)
from kfac_scratch.conformance.cases.families.sharing import transformer
from kfac_scratch.conformance.cases.ops import conv, flatten, linear, mean_positions, relu, tanh

PLACE = 8  # in reports and vectors
SOME_LOSSES = LOSSES[:2]
EKFAC: Expected = {"ekfac": DEFINITION}

FLATTENED = [
    Case(
        f"ekfac-flattened-{kind}",
        "definition",
        (*chain(4, 3), tanh(), flatten(), linear("head", 15, 2)),
        loss(kind),
        (7, 5, 4),
        EKFAC,
        layers=("fc1",),
        tags=("ekfac", "sequence", kind),
    )
    for kind in SOME_LOSSES
]
EKFAC_POOLED = Case(
    "ekfac-pooled-cross-entropy",
    "definition",
    (*chain(4, 3), tanh(), linear("fc2", 3, 5), mean_positions(), linear("head", 5, 3)),
    loss("cross-entropy"),
    (7, 2, 4),
    EKFAC,
    tags=("ekfac", "sequence", "pool", "cross-entropy"),
)
EKFAC_ATTENTION = Case(
    "ekfac-attention-tokens-mse",
    "definition",
    transformer(),
    loss("mse"),
    (5, 3, 4),
    EKFAC,
    layers=("query", "value", "out"),
    tags=("ekfac", "attention", "sequence", "mse"),
)
CNN = [
    Case(
        f"ekfac-cnn-{kind}",
        "definition",
        (
            conv("conv1", 2, 3, (2, 2)),
            relu(inplace=True),
            conv("conv2", 3, 2, (2, 1), bias=False),
            tanh(),
            flatten(),
            linear("head", 8, 5),
        ),
        loss(kind),
        (7, 2, 4, 3),
        EKFAC,
        layers=("conv1", "conv2"),
        tags=("ekfac", "conv", "cnn", kind),
    )
    for kind in SOME_LOSSES
]
EKFAC_REUSED = [
    Case(
        f"ekfac-used-in-a-row-{kind}",
        "definition",
        (linear("fc", 3, 3), tanh(), linear("fc", 3, 3), tanh(), linear("head", 3, 5)),
        loss(kind),
        (7, 3),
        EKFAC,
        layers=("fc",),
        tags=("ekfac", "reused", kind),
    )
    for kind in SOME_LOSSES
]
CNN_GROUPS = [
    Case(
        f"cnn-groups-{kind}",
        "definition",
        (
            conv("conv", 4, 6, (2, 2), geometry={"groups": 2}),
            tanh(),
            flatten(),
            linear("head", 36, 5),
        ),
        loss(kind),
        (7, 4, 4, 3),
        {"expand": DEFINITION, "reduce": DEFINITION, "ekfac": DEFINITION},
        layers=("conv",),
        tags=("conv", "groups", kind),
    )
    for kind in SOME_LOSSES
]
CASES = [*FLATTENED, EKFAC_POOLED, EKFAC_ATTENTION, *CNN, *EKFAC_REUSED, *CNN_GROUPS]
CASES += [in_single_precision(FLATTENED[1])]
