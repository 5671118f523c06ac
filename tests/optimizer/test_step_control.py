from dataclasses import replace

import pytest
import torch

from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.optimizer.step_control import (
    Step,
    dot,
    graft,
    kl_clip,
    norm,
    norm_constraint,
    squared_length,
)
from tests.laws import check_differs, check_equal

NAMES = ("first", "second")
SHAPES = {"first": (3, 5), "second": (4, 3)}


def values(device):
    return {name: torch.randn(SHAPES[name], device=device) for name in NAMES}


def example(device, gradient=None, direction=None, lr=0.1, base_lr=0.1):
    gradient = values(device) if gradient is None else gradient
    return Step(
        gradient,
        gradient if direction is None else direction,
        previous=values(device),
        lr=dict.fromkeys(NAMES, lr),
        base_lr=dict.fromkeys(NAMES, base_lr),
        momentum=dict.fromkeys(NAMES, 0.9),
        damping=dict.fromkeys(NAMES, 0.1),
        layers=tuple((name,) for name in NAMES),
        memory={name: {} for name in NAMES},
    )


def psd(d, device):
    R = torch.randn(d, d, device=device)
    return R @ R.T


def test_change_is_minus_lr_times_direction_plus_momentum(device):
    step = example(device)
    for name, change in step.change().items():
        check_equal(change, -0.1 * step.direction[name] + 0.9 * step.previous[name])


def test_norm_and_product_are_over_all_tensors(device):
    x, y = values(device), values(device)
    flat_x, flat_y = (torch.cat([t.flatten() for t in v.values()]) for v in (x, y))
    assert norm(x) == pytest.approx(float(flat_x.norm()), rel=1e-12)
    assert dot(x, y) == pytest.approx(float(flat_x @ flat_y), rel=1e-12)


# ---- KL clip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1e-3, 1e-5])
def test_active_clip_makes_the_damped_length_equal_the_limit(limit, device):
    """With the exact damped inverse, `step^T (F + damping I) step` is the limit itself."""
    gradient, damping, lr = values(device), 0.1, 0.5
    matrices = {n: Kronecker(psd(s[1], device), psd(s[0], device)) for n, s in SHAPES.items()}
    direction = {n: M.inverse(damping) @ gradient[n] for n, M in matrices.items()}
    step = kl_clip(limit)(example(device, gradient, direction, lr, lr))
    moved = {n: -lr * P for n, P in step.direction.items()}
    length = sum(float((d * (matrices[n] @ d + damping * d)).sum()) for n, d in moved.items())
    undamped = sum(float((d * (matrices[n] @ d)).sum()) for n, d in moved.items())
    assert step.notes["nu"] < 1
    assert length == pytest.approx(limit, rel=1e-10)
    assert undamped < limit


def test_inactive_clip_changes_nothing(device):
    step = example(device)
    clipped = kl_clip(1e6)(step)
    assert clipped.notes["nu"] == 1
    for name in NAMES:
        check_equal(clipped.direction[name], step.direction[name])


def test_active_clip_cancels_the_base_rate_but_not_the_schedule(device):
    """The trap: with the scheduled rate inside of the clip, a schedule would have no effect."""
    gradient = values(device)
    changes = []
    for lr, base_lr in ((0.1, 0.1), (0.4, 0.4), (0.05, 0.1)):
        step = replace(example(device, gradient, lr=lr, base_lr=base_lr), previous=gradient)
        step = replace(step, momentum=dict.fromkeys(NAMES, 0.0))
        changes.append(kl_clip(1e-6)(step).change()["first"])
    check_equal(changes[1], changes[0])
    check_equal(changes[2], changes[0] / 2)


def test_clip_counts_every_layer_with_its_own_rate(device):
    step = replace(example(device), base_lr={"first": 0.1, "second": 0.3})
    expected = sum(
        step.base_lr[n] ** 2 * float((step.direction[n] * step.gradient[n]).sum()) for n in NAMES
    )
    assert squared_length(step) == pytest.approx(expected, rel=1e-12)


def test_zero_gradients_pass_the_clip(device):
    zero = {name: torch.zeros(SHAPES[name], device=device) for name in NAMES}
    step = kl_clip(1e-3)(example(device, zero))
    assert step.notes["nu"] == 1
    assert norm(step.direction) == 0


def test_an_ascending_direction_is_refused(device):
    gradient = values(device)
    step = example(device, gradient, {name: -g for name, g in gradient.items()})
    with pytest.raises(ValueError, match=r"ascends.*larger damping"):
        kl_clip(1e-3)(step)


# ---- norm constraint --------------------------------------------------------------------------


def test_norm_constraint_shortens_to_the_limit_and_never_lengthens(device):
    step = example(device)
    long = 0.1 * norm(step.direction)
    short = norm_constraint(long / 3)(step)
    assert 0.1 * norm(short.direction) == pytest.approx(long / 3, rel=1e-12)
    check_equal(norm_constraint(2 * long)(step).direction["first"], step.direction["first"])


@pytest.mark.parametrize("control", [kl_clip, norm_constraint])
@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_limits_must_be_positive(control, limit):
    with pytest.raises(ValueError, match="must be positive"):
        control(limit)


# ---- grafting ---------------------------------------------------------------------------------


@pytest.mark.everywhere
def test_graft_takes_adams_norm_and_keeps_the_direction(device):
    """Against PyTorch's Adam, over several steps, layer by layer."""
    parameters = {n: torch.zeros(s, device=device) for n, s in SHAPES.items()}
    adam = torch.optim.Adam(parameters.values(), lr=1.0, betas=(0.8, 0.95), eps=1e-6)
    control, memory = graft((0.8, 0.95), eps=1e-6), {name: {} for name in NAMES}
    for _ in range(4):
        gradient, direction = values(device), values(device)
        before = {name: p.clone() for name, p in parameters.items()}
        for name, p in parameters.items():
            p.grad = gradient[name]
        adam.step()
        step = control(replace(example(device, gradient, direction), memory=memory))
        memory = step.memory  # as the optimizer does with the step that it takes
        for name in NAMES:
            found = step.direction[name]
            check_equal(found.norm(), (parameters[name] - before[name]).norm())
            check_equal(found / found.norm(), direction[name] / direction[name].norm())


def test_a_step_that_is_not_taken_leaves_nothing_in_the_memory(device):
    """`Step` is frozen, and its memory too: a control returns a new one."""
    first = graft()(example(device))
    kept = {n: {key: t.clone() for key, t in own.items()} for n, own in first.memory.items()}
    retried = [graft()(replace(first, gradient=values(device))) for _ in range(2)]
    for name in NAMES:
        assert float(first.memory[name]["step"]) == 1
        for key, tensor in kept[name].items():
            check_equal(first.memory[name][key], tensor)
        assert float(retried[1].memory[name]["step"]) == 2
    untouched = example(device)
    graft()(untouched)
    assert all(own == {} for own in untouched.memory.values())


def test_graft_is_per_layer_and_not_per_parameter(device):
    step = replace(example(device), layers=(NAMES,), direction=values(device))
    grafted = graft()(step)
    ratios = [grafted.direction[n].norm() / step.direction[n].norm() for n in NAMES]
    check_equal(ratios[0], ratios[1])
    assert norm(grafted.direction) == pytest.approx((15 + 12) ** 0.5, rel=1e-6)  # signs at first


def test_a_dead_layer_stays_where_it_is(device):
    gradient = values(device)
    gradient["first"] = torch.zeros_like(gradient["first"])
    step = graft()(example(device, gradient))
    assert step.direction["first"].abs().max() == 0
    assert step.direction["second"].abs().max() > 0


def test_a_graft_of_the_network_keeps_the_ratios_of_its_layers(device):
    """The whole step is as long as Adam's; a graft per layer changes the ratios."""
    step = example(device)
    together, by_layer = graft(per="network")(step), graft()(step)
    assert norm(together.direction) == pytest.approx(norm(by_layer.direction), rel=1e-12)
    ratios = [together.direction[n].norm() / step.direction[n].norm() for n in NAMES]
    check_equal(ratios[0], ratios[1])
    ratios = [by_layer.direction[n].norm() / step.direction[n].norm() for n in NAMES]
    check_differs(ratios[0], ratios[1])
    for name in NAMES:
        check_equal(together.memory[name]["step"], by_layer.memory[name]["step"])


def test_what_graft_cannot_use_is_refused():
    with pytest.raises(ValueError, match="eps must be positive"):
        graft(eps=0.0)
    with pytest.raises(ValueError, match="per must be 'layer' or 'network', got 'block'"):
        graft(per="block")


def test_controls_compose_from_left_to_right(device):
    step = example(device)
    one = norm_constraint(1e-3)(graft()(step))
    other = graft()(norm_constraint(1e-3)(replace(step, memory={n: {} for n in NAMES})))
    assert norm(one.direction) < 0.1 * norm(other.direction)
