"""Damped inverses applied to the loss's gradient."""

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case
from kfac_scratch.conformance.cases.families.common import REDUCTIONS, chain, constant_output, loss
from kfac_scratch.conformance.cases.ops import conv, flatten, linear, mean_space, sigmoid, tanh
from kfac_scratch.conformance.vocabulary import DampingForm

PLACE = 6  # in reports and vectors
DAMPINGS: tuple[tuple[DampingForm, float], ...] = (
    ("exact", 0.25),
    ("exact", 1e-3),
    ("factored", 0.25),
    ("factored", 1e-2),
)

MLP = [
    Case(
        f"inverse-{form}-{damping:g}-mlp",
        "definition",
        chain(4, 3, 5, between=tanh()),
        loss("cross-entropy"),
        (7, 4),
        {"expand": DEFINITION, "ekfac": DEFINITION} if form == "exact" else {"expand": DEFINITION},
        damping=(form, damping),
        tags=("inverse", form, "cross-entropy"),
    )
    for form, damping in DAMPINGS
]
EXACT_BLOCKS = [
    Case(
        f"inverse-exact-deep-linear-{reduction}",
        "deep-linear",
        chain(5, 3, 2),
        loss("mse", reduction),
        (7, 5),
        {"expand": EXACT, "reduce": EXACT, "ekfac": EXACT},
        damping=("exact", 0.25),
        tags=("inverse", "exact", "mse"),
    )
    for reduction in REDUCTIONS
]
CONSTANT = Case(
    "inverse-exact-constant-hessian",
    "constant-hessian",
    chain(5, 3, 2, between=sigmoid()),
    loss("cross-entropy"),
    (7, 5),
    {"expand": EXACT, "ekfac": EXACT},
    data=constant_output,
    damping=("exact", 0.25),
    tags=("inverse", "exact", "cross-entropy"),
)
INVERSE_POOLED = Case(
    "inverse-exact-conv-pooled",
    "last-convolution",
    (conv("conv", 2, 3, (2, 3)), mean_space(2)),
    loss("mse"),
    (7, 2, 5, 4),
    {"reduce": EXACT, "expand": DEFINITION},
    damping=("exact", 0.25),
    tags=("inverse", "exact", "conv", "mse"),
)
INVERSE_GROUPS = [
    Case(
        "inverse-exact-conv-groups",
        "last-convolution",
        (conv("conv", 4, 6, (2, 3), geometry={"groups": 2}),),
        loss("mse"),
        (7, 4, 2, 7),
        {"expand": EXACT},
        damping=("exact", 0.25),
        tags=("inverse", "exact", "conv", "groups", "mse"),
    ),
    Case(
        "inverse-factored-cnn-groups",
        "definition",
        (
            conv("conv", 4, 6, (2, 2), geometry={"groups": 2}),
            tanh(),
            flatten(),
            linear("head", 36, 5),
        ),
        loss("cross-entropy"),
        (7, 4, 4, 3),
        {"expand": DEFINITION, "reduce": DEFINITION},
        layers=("conv",),
        damping=("factored", 0.25),
        tags=("inverse", "factored", "conv", "groups", "cross-entropy"),
    ),
]
CASES = [*MLP, *EXACT_BLOCKS, CONSTANT, INVERSE_POOLED, *INVERSE_GROUPS]
