"""Layers beside normalisations: their vectors pass through the norm, and so may their inputs.

No block of a norm is asked for. A batch normalisation is in evaluation: with known means and
variances it is an affine map, and data do not meet.
"""

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case
from kfac_scratch.conformance.cases.families.common import (
    ALL_DEFINITION,
    ALL_EXACT,
    BOTH_DEFINITION,
    BOTH_EXACT,
    LOSSES,
    REDUCTIONS,
    constant_output,
    loss,
)
from kfac_scratch.conformance.cases.ops import (
    Op,
    add,
    batch_norm,
    classes_first,
    conv,
    flatten,
    group_norm,
    layer_norm,
    linear,
    mean_space,
    relu,
    sigmoid,
    tanh,
)

PLACE = 10  # in reports and vectors
KNOWN = batch_norm("norm", (0.5, -1.0, 0.25), (2.0, 0.25, 0.5))


def mlp(d_in: int, d_out: int, norm: Op, activation: Op) -> tuple[Op, ...]:
    """Two layers and a norm of three features behind the first."""
    return linear("fc1", d_in, 3), norm, activation, linear("fc2", 3, d_out)


LAYER_NORM = [
    Case(
        f"layer-norm-mlp-{kind}",
        "definition",
        mlp(4, 5, layer_norm("norm", 3), tanh()),
        loss(kind),
        (7, 4),
        ALL_DEFINITION,
        tags=("norm", "layer-norm", kind),
    )
    for kind in LOSSES[:2]
]
LAYER_NORM_EXACT = [
    Case(
        "layer-norm-constant-hessian-cross-entropy",
        "constant-hessian",
        mlp(5, 2, layer_norm("norm", 3), sigmoid()),
        loss("cross-entropy"),
        (7, 5),
        ALL_EXACT,
        data=constant_output,
        tags=("norm", "layer-norm", "cross-entropy"),
    ),
    Case(
        "layer-norm-bias-cross-entropy",
        "bias",
        mlp(4, 5, layer_norm("norm", 3), tanh()),
        loss("cross-entropy", "sum"),
        (7, 4),
        BOTH_EXACT,
        part="bias",
        tags=("norm", "layer-norm", "cross-entropy"),
    ),
    Case(
        "layer-norm-last-layer-mse",
        "last-layer",
        (linear("fc1", 3, 4), tanh(), layer_norm("norm", 4), linear("fc2", 4, 5)),
        loss("mse"),
        (7, 3),
        ALL_EXACT,
        layers=("fc2",),
        tags=("norm", "layer-norm", "mse"),
    ),
]
PRE_NORM = Case(
    "layer-norm-residual-tokens-cross-entropy",
    "definition",
    (
        layer_norm("norm", 4),
        linear("fc1", 4, 3),
        tanh(),
        linear("fc2", 3, 4),
        add(3, -1),
        classes_first(),
    ),
    loss("cross-entropy"),
    (7, 5, 4),
    {"expand": DEFINITION},
    tags=("norm", "layer-norm", "sequence", "cross-entropy"),
)
GROUP_NORM = [
    Case(
        f"group-norm-cnn-{end}-{kind}",
        "definition",
        (conv("conv", 2, 4, (2, 2)), group_norm("norm", 4, 2), relu(), *tail),
        loss(kind),
        (7, 2, 4, 3),
        BOTH_DEFINITION,
        tags=("norm", "group-norm", "conv", "cnn", kind),
    )
    for end, tail in (
        ("flat", (flatten(), linear("head", 24, 5))),
        ("pooled", (mean_space(2), linear("head", 4, 5))),
    )
    for kind in LOSSES[:2]
]
BATCH_NORM = [
    Case(
        f"batch-norm-deep-linear-mse-{reduction}",
        "deep-linear",
        (linear("fc1", 5, 3), KNOWN, linear("fc2", 3, 2)),
        loss("mse", reduction),
        (7, 5),
        ALL_EXACT,
        tags=("norm", "batch-norm", "linear", "mse"),
    )
    for reduction in REDUCTIONS
]
BATCH_NORM_CONVOLUTIONS = [
    Case(
        "batch-norm-1x1-convolutions",
        "invariant-convolutions",
        (
            conv("conv1", 2, 3, (2, 1)),
            batch_norm("norm", KNOWN["mean"], KNOWN["variance"], dims=2),
            conv("conv2", 3, 3, (1, 1)),
            mean_space(2),
            linear("head", 3, 2),
        ),
        loss("mse"),
        (7, 2, 4, 5),
        {"reduce": EXACT, "expand": DEFINITION},
        layers=("conv1", "conv2"),
        tags=("norm", "batch-norm", "conv", "pool", "mse"),
    ),
    Case(
        "batch-norm-cnn-cross-entropy",
        "definition",
        (
            conv("conv1", 2, 3, (2, 2), bias=False),
            batch_norm("norm", KNOWN["mean"], KNOWN["variance"], dims=2),
            relu(),
            flatten(),
            linear("head", 18, 5),
        ),
        loss("cross-entropy"),
        (7, 2, 4, 3),
        ALL_DEFINITION,
        tags=("norm", "batch-norm", "conv", "cnn", "cross-entropy"),
    ),
]
CASES = [*LAYER_NORM, *LAYER_NORM_EXACT, PRE_NORM, *GROUP_NORM, *BATCH_NORM]
CASES += BATCH_NORM_CONVOLUTIONS
