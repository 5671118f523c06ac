"""Linear losses make code that sees only gradients compute the GGN, exactly."""

from dataclasses import replace

import pytest
import torch

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.cases.case import EXACT
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.harness import request
from tests.laws import check_differs, check_equal

NAMES = [
    "mlp-cross-entropy-mean",
    "mlp-bce-sum",
    "class-weights-mlp-mean",
    "pos-weight-mlp-mean",
    "label-smoothing-class-weights-mlp-mean",
    "entry-weights-mlp-mean",
    "probabilities-class-weights-mean",
    "batches-class-weights",
    "tokens-cross-entropy-ignored-mean",
    "attention-tokens-cross-entropy",
    "conv2d-plain-per-location-mse-mean",
    "batches-unequal-mse-mean",
]


def asked(name):
    case = replace(CASES[name], flavours={"expand": EXACT})
    data = case.build()
    return request(case, data, "expand"), truth.exact(case, data)


def outer(asked, pairs):
    """Sum of outer products of the gradients of all rows, by layer."""
    found = {}
    for X, v in pairs:
        for x, v_row in zip(X.split(1), v.split(1), strict=True):
            asked.model.zero_grad()
            (asked.model(x.clone()) * v_row).sum().backward()
            for name in asked.layers:
                layer = asked.model.get_submodule(name)
                G = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1).flatten()
                found[name] = found.get(name, 0) + torch.outer(G, G)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_the_terms_of_the_ggn(name):
    call, exact = asked(name)
    for layer, M in outer(call, drivers.rows(call)).items():
        check_equal(M, exact[layer][0])


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_the_same_terms(name):
    call, _ = asked(name)
    pairs = list(drivers.columns(call))
    rows = torch.cat([v for _, v in drivers.rows(call)])
    check_equal(torch.cat([v for _, v in pairs]), rows)
    check_equal(torch.cat([X for X, _ in pairs]), torch.cat([X for X, _ in drivers.rows(call)]))


def test_the_whole_batchs_gradient_mixes_data_and_is_something_else():
    """Why a pass per column is not enough for code that squares the gradient of a batch."""
    call, exact = asked("mlp-cross-entropy-mean")
    found = 0
    for X, v in drivers.columns(call):
        call.model.zero_grad()
        (call.model(X) * v).sum().backward()
        layer = call.model.fc1
        G = torch.cat([layer.weight.grad.flatten(1), layer.bias.grad[:, None]], 1).flatten()
        found = found + torch.outer(G, G)
    check_differs(found, exact["fc1"][0], by=0.1)
