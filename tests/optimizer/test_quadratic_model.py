"""The quadratic model's learning rate and momentum, and the reduction ratio on a batch."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import CrossEntropyLoss, Linear, MSELoss, Sequential, Tanh

from kfac_scratch.curvature import flatten_values, ggn, ggn_gram, parameter_vector
from kfac_scratch.optimizer.quadratic_model import before_step, quadratic_model, ratio_after_step
from kfac_scratch.optimizer.step_control import Batch, Step, dot
from tests.laws import check_equal
from tests.optimizer.test_step_control import example


def batch_on(device, nonlinear=True, N=11):
    torch.manual_seed(0)
    middle = [Tanh()] if nonlinear else []
    model = Sequential(Linear(5, 4), *middle, Linear(4, 3)).to(device)
    if not nonlinear:
        model = Sequential(Linear(5, 3)).to(device)
    X, y = torch.randn(N, 5, device=device), torch.randn(N, 3, device=device)
    return Batch(model, MSELoss(), X, y)


def gradients(batch):
    model, loss, X, y = batch
    model.zero_grad()
    loss(model(X), y).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def step_on(batch, direction, previous, damping=0.0):
    gradient = gradients(batch)
    names = list(gradient)
    return Step(
        gradient,
        direction,
        previous,
        lr=dict.fromkeys(names, 0.1),
        base_lr=dict.fromkeys(names, 0.1),
        momentum=dict.fromkeys(names, 0.9),
        damping=dict.fromkeys(names, damping),
        layers=(tuple(names),),
        memory={},
        batches=((1.0, batch),),
    )


@pytest.mark.everywhere
@pytest.mark.parametrize("loss", [MSELoss(), CrossEntropyLoss()])
def test_gram_is_the_ggn_between_directions(loss, device):
    model, _, X, y = batch_on(device)
    y = y if isinstance(loss, MSELoss) else torch.randint(3, (len(X),), device=device)
    V = torch.randn(3, len(parameter_vector(model)), device=device)
    check_equal(ggn_gram(model, loss, X, y, V), V @ ggn(model, loss, X, y) @ V.T)


def test_gram_may_be_taken_at_another_point(device):
    batch = batch_on(device)
    model, loss, X, y = batch
    theta = parameter_vector(model)
    V = torch.randn(2, len(theta), device=device)
    expected = ggn_gram(model, loss, X, y, V)
    with torch.no_grad():
        for p in model.parameters():
            p += 1
    check_equal(ggn_gram(model, loss, X, y, V, theta), expected)


def test_flattened_values_are_in_the_models_order_and_zero_where_missing(device):
    model = batch_on(device).model
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    check_equal(flatten_values(model, values), parameter_vector(model))
    del values["2.bias"]
    assert flatten_values(model, values)[-3:].abs().max() == 0


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_no_other_pair_of_coefficients_has_a_smaller_model(damping, device):
    batch = batch_on(device)
    names = dict(batch.model.named_parameters())
    direction, previous = ({n: torch.randn_like(p) for n, p in names.items()} for _ in range(2))
    step = quadratic_model()(step_on(batch, direction, previous, damping))
    C = ggn(*batch) + damping * torch.eye(len(parameter_vector(batch.model)), device=device)
    gradient = flatten_values(batch.model, step.gradient)

    def value(change):
        delta = flatten_values(batch.model, change)
        return float(gradient @ delta + delta @ C @ delta / 2)

    best = value(step.change())
    slope = float(gradient @ flatten_values(batch.model, step.change()))
    assert best == pytest.approx(slope / 2, rel=1e-9)  # the value at the optimum
    for d_lr, d_momentum in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        lr = {n: v + d_lr for n, v in step.lr.items()}
        momentum = {n: v + d_momentum for n, v in step.momentum.items()}
        assert value(replace(step, lr=lr, momentum=momentum).change()) > best


def test_first_step_is_the_exact_line_search(device):
    batch = batch_on(device)
    gradient = gradients(batch)
    step = quadratic_model()(
        step_on(batch, gradient, {n: torch.zeros_like(g) for n, g in gradient.items()})
    )
    g = flatten_values(batch.model, gradient)
    assert step.lr["0.weight"] == pytest.approx(float(g @ g / (g @ ggn(*batch) @ g)), rel=1e-9)
    assert step.momentum["0.weight"] == 0


def test_on_a_quadratic_the_rule_is_preconditioned_conjugate_gradients(device):
    """With a fixed preconditioner: the minimum after as many steps as there are parameters."""
    batch = batch_on(device, nonlinear=False, N=23)
    model, _, X, y = batch
    D = len(parameter_vector(model))
    R = torch.randn(D, D, device=device)
    P = R @ R.T / D + torch.eye(D, device=device)
    C = ggn(*batch)
    theta, direction, residual = parameter_vector(model), None, None
    previous = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    for _ in range(D):
        gradient = gradients(batch)
        g = flatten_values(model, gradient)
        parts = (P @ g).split([s.numel() for s in shapes.values()])
        found = {n: v.reshape(s) for (n, s), v in zip(shapes.items(), parts, strict=True)}
        previous = quadratic_model()(step_on(batch, found, previous)).change()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += previous[name]
        # one step of conjugate gradients, as in a textbook
        z = -(P @ g)
        beta = 0.0 if residual is None else float(g @ -z / residual)
        direction = z if direction is None else z + beta * direction
        residual = float(g @ -z)
        theta = theta + residual / float(direction @ C @ direction) * direction
        assert float((parameter_vector(model) - theta).abs().max()) < 1e-8
    W = torch.linalg.lstsq(torch.cat([X, X.new_ones(len(X), 1)], dim=1), y).solution
    check_equal(model[0].weight, W[:-1].T.contiguous())


def test_collinear_directions_are_no_problem(device):
    batch = batch_on(device)
    gradient = gradients(batch)
    twice = quadratic_model()(step_on(batch, gradient, {n: -2 * g for n, g in gradient.items()}))
    zero = {n: torch.zeros_like(g) for n, g in gradient.items()}
    once = quadratic_model()(step_on(batch, gradient, zero))
    check_equal(twice.change()["0.weight"], once.change()["0.weight"])


def test_the_batch_must_be_known(device):
    with pytest.raises(ValueError, match="observe"):
        quadratic_model()(example(device))
    with pytest.raises(ValueError, match="observe"):
        before_step((), {})


# ---- reduction ratio --------------------------------------------------------------------------


def moved(model, scale, seed=1):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p += scale * torch.randn_like(p)


def test_ratio_is_one_where_the_model_is_the_loss(device):
    batch = batch_on(device, nonlinear=False)
    before = before_step(((1.0, batch),), gradients(batch))
    moved(batch.model, 0.7)
    assert ratio_after_step(before) == pytest.approx(1, rel=1e-9)


def test_ratio_tends_to_one_for_short_steps_and_only_for_these(device):
    errors = []
    for scale in (1e-2, 1e-3, 1e-4):
        batch = batch_on(device)
        before = before_step(((1.0, batch),), gradients(batch))
        moved(batch.model, scale)
        errors.append(abs(ratio_after_step(before) - 1))
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0


def test_ratio_compares_on_the_same_batch(device):
    batch = batch_on(device)
    before = before_step(((1.0, batch),), gradients(batch))
    copied = copy.deepcopy(batch.model)
    gradient = gradients(batch)
    step = {n: -0.05 * g for n, g in gradient.items()}
    with torch.no_grad():
        for name, p in batch.model.named_parameters():
            p += step[name]
    model, loss, X, y = batch
    with torch.no_grad():
        change = float(loss(model(X), y) - loss(copied(X), y))
    delta = flatten_values(model, step)
    predicted = dot(gradient, step) + float(delta @ ggn(copied, loss, X, y) @ delta) / 2
    assert ratio_after_step(before) == pytest.approx(change / predicted, rel=1e-9)
