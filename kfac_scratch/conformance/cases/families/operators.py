"""Differential operators: the Taylor coefficients of a layer are its positions (PINNs)."""

from collections.abc import Callable

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import EXACT, Case, Data, generator, numbers, parameters
from kfac_scratch.conformance.cases.families.common import REDUCTIONS, chain, loss

PLACE = 7  # in reports and vectors
HADAMARD = torch.tensor(
    [[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], dtype=torch.float64
)


def with_coefficients(make: Callable[[Case], Tensor]) -> Callable[[Case], Data]:
    """Numbers for a case whose operator has the coefficients that a function makes."""

    def data(case: Case) -> Data:
        random = generator(case)
        theta, X = parameters(random, case.ops), numbers(random, *case.shape)
        c = make(case)
        X = X.repeat_interleave(len(c) // len(X), 0)
        return Data(theta, X, numbers(random, len(X), 1), c)

    return data


def equal(case: Case) -> Tensor:
    """`u + sum_i du/dx_i + Lap u`, at every datum."""
    return torch.ones(case.shape[0], case.shape[1] + 2, dtype=torch.float64)


def signs(case: Case) -> Tensor:
    """Every datum once for each row of a Hadamard matrix, whose signs are the coefficients."""
    return HADAMARD[:, : case.shape[1] + 2].repeat(case.shape[0], 1)


OPERATOR_REDUCE = [
    Case(
        f"operator-reduce-{d}d-{reduction}",
        "operator-reduce",
        chain(d, 5, 3, 1),
        loss("mse", reduction),
        (7, d),
        {"reduce": EXACT},
        operator=True,
        data=with_coefficients(equal),
        tags=("operator", "mse"),
    )
    for d in (1, 2)
    for reduction in REDUCTIONS
]
OPERATOR_EXPAND = [
    Case(
        f"operator-expand-{d}d-{reduction}",
        "operator-expand",
        chain(d, 5, 3, 1),
        loss("mse", reduction),
        (7, d),
        {"expand": EXACT},
        operator=True,
        data=with_coefficients(signs),
        tags=("operator", "mse"),
    )
    for d in (1, 2)
    for reduction in REDUCTIONS
]
CASES = [*OPERATOR_REDUCE, *OPERATOR_EXPAND]
