"""How positions are arranged: exchanged axes, padding of equal size, calls at other positions.

Convolutions stand beside linear layers without an activation in place, so that a scale that differs
between the two kinds of layers is not hidden by another mistake.
"""

from dataclasses import replace

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case
from kfac_scratch.conformance.cases.families.common import (
    ALL_DEFINITION,
    BOTH_DEFINITION,
    LOSSES,
    loss,
)
from kfac_scratch.conformance.cases.ops import (
    Geometry,
    Op,
    add,
    conv,
    flatten,
    linear,
    mask,
    mean_positions,
    mean_space,
    relu,
    sum_positions,
    tanh,
    transpose,
)

PLACE = 12  # in reports and vectors
MIXED = (linear("fc1", 4, 3), tanh(), transpose(), linear("fc2", 5, 2))

TRANSPOSED = [
    Case(
        "transposed-tokens-mse",
        "definition",
        MIXED,
        loss("mse"),
        (7, 5, 4),
        {"expand": DEFINITION},
        tags=("sequence", "transpose", "mse"),
    ),
    Case(
        "transposed-last-layer-mse",
        "last-layer",
        MIXED,
        loss("mse", "sum"),
        (7, 5, 4),
        {"expand": EXACT},
        layers=("fc2",),
        tags=("sequence", "transpose", "mse"),
    ),
    Case(
        "transposed-pooled-cross-entropy",
        "definition",
        (*MIXED, mean_positions(), linear("head", 2, 4)),
        loss("cross-entropy"),
        (7, 5, 4),
        ALL_DEFINITION,
        tags=("sequence", "transpose", "pool", "cross-entropy"),
    ),
]
SAME: dict[str, Geometry] = {
    "same": {"padding": "same"},
    "same-dilation": {"padding": "same", "dilation": 3},
    "same-circular": {"padding": "same", "padding_mode": "circular"},
}


def same_convolution(geometry: Geometry) -> Op:
    """The convolution whose geometry is tested: its kernel has an even and an odd side."""
    return conv("conv", 2, 3, (2, 3), geometry=geometry)


SAME_PADDING = [
    Case(
        f"conv2d-{name}-per-location-mse",
        "last-convolution",
        (same_convolution(geometry),),
        loss("mse"),
        (7, 2, 5, 8),
        {"expand": EXACT},
        tags=("conv", name, "mse"),
    )
    for name, geometry in SAME.items()
]
SAME_PADDING += [
    Case(
        f"conv2d-{name}-pooled-mse",
        "last-convolution",
        (same_convolution(geometry), mean_space(2)),
        loss("mse"),
        (7, 2, 5, 8),
        {"reduce": EXACT, "expand": DEFINITION},
        tags=("conv", name, "pool", "mse"),
    )
    for name, geometry in SAME.items()
]
KEPT = replace(mask(1, 0, 1, 1, 0), inputs=(-1,))  # of the network's input
OTHER_POSITIONS = [
    Case(
        "used-at-other-positions-mse",
        "repeated-use",
        (
            linear("fc", 4, 5),
            sum_positions(),
            KEPT,
            mean_positions(),
            linear("fc", 4, 5),
            add(1, 4),
        ),
        loss("mse"),
        (7, 5, 4),
        {"reduce": EXACT, "expand": DEFINITION},
        tags=("reused", "sequence", "mse"),
    ),
    Case(
        "used-at-other-positions-cross-entropy",
        "definition",
        (
            linear("fc", 4, 3),
            tanh(),
            mean_positions(),
            KEPT,
            mean_positions(),
            linear("fc", 4, 3),
            add(2, 5),
            linear("head", 3, 5),
        ),
        loss("cross-entropy"),
        (7, 5, 4),
        BOTH_DEFINITION,
        tags=("reused", "sequence", "cross-entropy"),
    ),
]
BESIDE = [
    Case(
        f"conv-beside-linear-{end}-{kind}",
        "definition",
        (conv("conv1", 2, 3, (2, 2)), tanh(), conv("conv2", 3, 2, (2, 1)), relu(), *tail),
        loss(kind),
        (7, 2, 4, 3),
        ALL_DEFINITION,
        tags=("conv", "cnn", kind),
    )
    for end, tail in (
        ("flat", (flatten(), linear("head", 8, 5))),
        ("pooled", (mean_space(2), linear("head", 2, 5))),
    )
    for kind in LOSSES[:2]
]
EMPIRICAL_PER_LOCATION = Case(
    "empirical-cnn-per-location-cross-entropy",
    "definition",
    (conv("conv1", 2, 3, (2, 2)), tanh(), conv("conv2", 3, 5, (2, 1))),
    loss("cross-entropy"),
    (7, 2, 4, 3),
    {"expand": DEFINITION},
    fisher="empirical",
    tags=("empirical", "conv", "cross-entropy"),
)
EMPIRICAL_WITHOUT_BIAS = Case(
    "empirical-mlp-nobias-mse",
    "definition",
    (linear("fc1", 4, 3, bias=False), tanh(), linear("fc2", 3, 5, bias=False)),
    loss("mse"),
    (17, 4),
    {"ekfac": DEFINITION},
    fisher="empirical",
    tags=("empirical", "ekfac", "mse"),
)
CASES = [
    *TRANSPOSED,
    *SAME_PADDING,
    *OTHER_POSITIONS,
    *BESIDE,
    EMPIRICAL_PER_LOCATION,
    EMPIRICAL_WITHOUT_BIAS,
]
