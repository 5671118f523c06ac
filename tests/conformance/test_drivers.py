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


# ---- what comes back ----------------------------------------------------------------------------


def psd(d):
    R = torch.randn(d, d + 1)
    return R @ R.T


def test_products_with_unit_vectors_are_the_matrix():
    A, B = psd(4), psd(3)
    check_equal(drivers.from_products(lambda W: B @ W @ A, torch.randn(3, 4)).M, torch.kron(B, A))


@pytest.mark.parametrize("size", [1e-9, 1e-4, 1.0, 1e4, 1e9])
def test_the_matrix_of_a_preconditioner_is_found_whatever_its_size(size):
    M = size * torch.kron(psd(3), psd(4))

    def precondition(W, damping):
        return torch.linalg.solve(M + damping * torch.eye(12), W.flatten()).reshape(3, 4)

    check_equal(drivers.from_preconditioner(precondition, torch.randn(3, 4)).M, M)


def test_a_preconditioner_that_damps_more_than_it_is_told_is_something_else():
    M = psd(4)

    def precondition(W, damping):
        return torch.linalg.solve(M + 2 * damping * torch.eye(4), W.flatten()).reshape(2, 2)

    check_differs(drivers.from_preconditioner(precondition, torch.randn(2, 2)).M, M)


def test_what_is_no_damped_inverse_is_refused():
    with pytest.raises(ValueError, match="must return the damped inverse times W"):
        drivers.from_preconditioner(lambda W, damping: W / damping, torch.ones(2, 2))


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.5, 0.95])
def test_a_running_average_forgets_its_start(decay):
    M, average, updates = psd(4), 1e3 * torch.eye(4), drivers.updates_to_forget(decay)
    for i in range(updates):
        if i == updates // 2 and decay:
            check_differs(average, M, by=1e-11)
        average = decay * average + (1 - decay) * M
    check_equal(average, M)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_a_running_average_that_never_forgets_is_refused(decay):
    with pytest.raises(ValueError, match=f"decay is {decay}: it must be"):
        drivers.updates_to_forget(decay)


@pytest.mark.parametrize("updates", [1, 2, 7])
def test_the_start_of_a_running_average_can_be_taken_out(updates):
    M, start, average = psd(4), torch.eye(4), torch.eye(4)
    for _ in range(updates):
        average = 0.9 * average + 0.1 * M
    check_differs(average, M)
    check_equal(drivers.without_start(average, start, 0.9, updates), M)
