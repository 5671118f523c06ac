"""Convolutions: geometry, pools, groups."""

from itertools import product

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case
from kfac_scratch.conformance.cases.families.common import (
    BOTH_DEFINITION,
    LOSSES,
    REDUCTIONS,
    in_single_precision,
    loss,
)
from kfac_scratch.conformance.cases.ops import (
    Geometry,
    Op,
    conv,
    flatten,
    linear,
    mean_space,
    relu,
    tanh,
)

PLACE = 3  # in reports and vectors
SPACE = {1: (10,), 2: (3, 10), 3: (3, 2, 6)}
KERNEL = {1: (3,), 2: (2, 3), 3: (2, 1, 3)}
GEOMETRY: dict[str, Geometry] = {
    "plain": {},
    "stride": {"stride": 2},
    "padding": {"padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
}


def last(dims: int, bias: bool = True, groups: int = 1, geometry: Geometry | None = None) -> Op:
    """The convolution whose geometry is tested."""
    settings: Geometry = {"groups": groups, **(geometry or {})}
    return conv("conv", 2 * groups, 3 * groups, KERNEL[dims], bias, settings)


PER_LOCATION = [
    Case(
        f"conv{dims}d-{name}-per-location-mse-{reduction}",
        "last-convolution",
        (last(dims, geometry=geometry),),
        loss("mse", reduction),
        (7, 2, *SPACE[dims]),
        {"expand": EXACT},
        tags=("conv", name, "mse"),
    )
    for dims, (name, geometry), reduction in product(SPACE, GEOMETRY.items(), REDUCTIONS)
    if (dims == 2 or name in ("plain", "stride")) and (reduction == "mean" or name == "plain")
]
POOLED_CONVOLUTIONS = [
    Case(
        f"conv2d-{name}-pooled-mse",
        "last-convolution",
        (last(2, geometry=geometry), mean_space(2)),
        loss("mse"),
        (7, 2, *SPACE[2]),
        {"reduce": EXACT, "expand": DEFINITION},
        tags=("conv", name, "pool", "mse"),
    )
    for name, geometry in GEOMETRY.items()
]
GROUPED = [
    Case(
        "conv2d-groups-per-location-mse",
        "last-convolution",
        (last(2, groups=3),),
        loss("mse"),
        (7, 6, *SPACE[2]),
        {"expand": EXACT},
        tags=("conv", "groups", "mse"),
    ),
    Case(
        "conv1d-groups-pooled-mse",
        "last-convolution",
        (last(1, groups=3), mean_space(1)),
        loss("mse"),
        (7, 6, *SPACE[1]),
        {"reduce": EXACT, "expand": DEFINITION},
        tags=("conv", "groups", "pool", "mse"),
    ),
]
INVARIANT = [
    Case(
        f"{name}-{reduction}",
        "invariant-convolutions",
        (*layers, mean_space(dims), linear("head", 3, 2)),
        loss("mse", reduction),
        (7, 2, *space),
        {"reduce": EXACT, "expand": DEFINITION},
        layers=("conv1", "conv2"),
        tags=("conv", "pool", "mse"),
    )
    for name, layers, dims, space in (
        (
            "1x1-convolutions",
            (conv("conv1", 2, 3, (2, 1), geometry={"stride": 2}), conv("conv2", 3, 3, (1, 1))),
            2,
            (6, 5),
        ),
        (
            "circular-convolutions",
            (
                conv("conv1", 2, 3, (3,), geometry=GEOMETRY["circular"]),
                conv("conv2", 3, 3, (3,), geometry=GEOMETRY["circular"]),
            ),
            1,
            (5,),
        ),
    )
    for reduction in REDUCTIONS
]
ZERO_PADDED = Case(
    "zero-padded-convolutions-pooled",
    "definition",
    (
        conv("conv1", 2, 3, (3,), geometry=GEOMETRY["padding"]),
        conv("conv2", 3, 3, (3,), geometry=GEOMETRY["padding"]),
        mean_space(1),
        linear("head", 3, 2),
    ),
    loss("mse"),
    (7, 2, 5),
    BOTH_DEFINITION,
    tags=("conv", "pool", "mse"),
)
NETWORKS = [
    Case(
        f"cnn-{end}-{kind}",
        "definition",
        (
            conv("conv1", 2, 3, (2, 2)),
            relu(inplace=True),
            conv("conv2", 3, 2, (2, 1), bias=False),
            tanh(),
            *tail,
        ),
        loss(kind),
        (7, 2, 4, 3),
        BOTH_DEFINITION,
        tags=("conv", "cnn", kind),
    )
    for end, tail in (
        ("flat", (flatten(), linear("head", 8, 5))),
        ("pooled", (mean_space(2), linear("head", 2, 5))),
    )
    for kind in LOSSES[:2]
]
ONE_POSITION = [
    Case(
        f"one-patch-{kind}",
        "one-datum",
        (conv("conv", 2, 3, (2, 2)), flatten(), tanh(), linear("head", 3, 5)),
        loss(kind),
        (1, 2, 2, 2),
        {"expand": EXACT, "reduce": EXACT, "ekfac": EXACT},
        tags=("conv", kind),
    )
    for kind in LOSSES[:2]
]
NO_BIAS = Case(
    "conv2d-nobias-per-location-mse",
    "last-convolution",
    (last(2, bias=False),),
    loss("mse"),
    (7, 2, *SPACE[2]),
    {"expand": EXACT},
    tags=("conv", "mse"),
)
CASES = [
    *PER_LOCATION,
    *POOLED_CONVOLUTIONS,
    *GROUPED,
    *INVARIANT,
    ZERO_PADDED,
    *NETWORKS,
    *ONE_POSITION,
]
CASES += [
    NO_BIAS,
    in_single_precision(PER_LOCATION[0]),
    in_single_precision(POOLED_CONVOLUTIONS[1]),
]
