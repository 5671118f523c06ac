"""A storm of faults: after every action a run is bit for bit its twin, which saw no fault.

Both runs take the same clean actions: steps, micro-batches, freezing, other numbers, other groups,
copies, saving and loading. Only one of them is also shown bad batches, exceptions and interrupts at
all places of a step, and refused groups and checkpoints.
"""

import copy
import io as files
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import CrossEntropyLoss, LayerNorm, Linear, Sequential, Tanh

from kfac_scratch import KFAC, AmortisedEKFAC, foof, graft, kfac, tkfac
from kfac_scratch.matrices.damping import levenberg_marquardt
from kfac_scratch.optimizer.finite import tensors_in

APPROXIMATIONS = {"kfac": kfac, "amortised": AmortisedEKFAC(2), "tkfac": tkfac, "foof": foof}
ARMED = {"place": ""}


class Fault(BaseException):
    """Neither an Exception nor expected by anybody."""


@contextmanager
def armed(place):
    ARMED["place"] = place
    try:
        yield
    finally:
        ARMED["place"] = ""


def trap(place):
    if ARMED["place"] == place:
        raise Fault(place)


def watched_control(step):
    trap("control")
    return (
        step.scaled(dict.fromkeys(step.direction, float("nan")))
        if ARMED["place"] == "nan"
        else step
    )


def watched_record(row):
    trap("record")


def watched_adaptation(damping, ratio):
    trap("adapt_damping")
    return levenberg_marquardt(damping, ratio)


def watched_inverse(M, damping):
    trap("invert")
    return M.inverse(damping)


class WatchedAdamW(torch.optim.AdamW):
    def step(self, closure=None):
        super().step(closure)
        trap("rest")


def network():
    torch.manual_seed(0)
    return Sequential(Linear(3, 4), Tanh(), LayerNorm(4), Linear(4, 2))


def built(name, model):
    groups = [{"params": model[i].parameters()} for i in (0, 3)]
    groups[0]["params"] = [*groups[0]["params"], *model[2].parameters()]
    return KFAC(
        model,
        CrossEntropyLoss(),
        groups,
        approximation=APPROXIMATIONS[name],
        controls=[graft(), watched_control],
        invert=watched_inverse,
        record=watched_record,
        adapt_damping=watched_adaptation,
        adapt_every=3,
        factor_every=2,
        inverse_every=3,
        lr=0.05,
        weight_decay=0.01,
        rest=WatchedAdamW,
        generator=torch.Generator().manual_seed(3),
    )


def batch(seed, N=6):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, 3, generator=generator)
    return X, torch.randint(2, (N,), generator=generator)


def backward(optimizer, X, y, share=1.0):
    (share * optimizer.loss(optimizer.model(X), y)).backward()


def begun(optimizer, X, y):
    optimizer.zero_grad()
    backward(optimizer, X, y)
    optimizer.observe(X, y)


# ---- what both runs do: from an optimizer to the one that goes on --------------------------------


def takes_a_step(optimizer, seed):
    begun(optimizer, *batch(seed))
    optimizer.step()
    return optimizer


def takes_micro_batches(optimizer, seed):
    X, y = batch(seed)
    optimizer.zero_grad()
    for part in (slice(2), slice(2, 6)):
        backward(optimizer, X[part], y[part], len(X[part]) / len(X))
        optimizer.observe(X[part], y[part])
    optimizer.step()
    return optimizer


def freezes_or_unfreezes(optimizer, seed):
    names = ["0.weight", "0.bias", "2.weight", "3.bias"]  # 3.weight always moves
    p = optimizer.model.get_parameter(names[seed % 4])
    p.requires_grad_(not p.requires_grad)
    return takes_a_step(optimizer, seed)


def changes_numbers(optimizer, seed):
    group = optimizer.param_groups[seed % 2]
    group["damping"], group["lr"] = (1e-3, 1e-2, 0.1)[seed % 3], (0.01, 0.05)[seed % 2]
    return takes_a_step(optimizer, seed)


def regroups(optimizer, seed):
    """Without one group for a step, and with it again."""
    group = optimizer.param_groups.pop(1)
    takes_a_step(optimizer, seed) if any(
        p.requires_grad for p in optimizer.model[0].parameters()
    ) else None
    optimizer.add_param_group({"params": group["params"], "lr": 0.02})
    optimizer.param_groups.insert(1, optimizer.param_groups.pop())
    return takes_a_step(optimizer, seed + 1)


def is_copied(optimizer, seed):
    return takes_a_step(copy.deepcopy(optimizer), seed)


def is_saved_and_loaded(optimizer, seed):
    file = files.BytesIO()
    torch.save({"model": optimizer.model.state_dict(), "kfac": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model = network()
    model.load_state_dict(saved["model"])
    for p, q in zip(model.parameters(), optimizer.model.parameters(), strict=True):
        p.requires_grad_(q.requires_grad)
    name = next(n for n, a in APPROXIMATIONS.items() if a is made_by(optimizer))
    loaded = built(name, model)
    loaded.load_state_dict(saved["kfac"])
    return takes_a_step(loaded, seed)


def made_by(optimizer):
    return getattr(optimizer.estimator, "approximation", APPROXIMATIONS["amortised"])


CLEAN = [
    takes_a_step,
    takes_micro_batches,
    freezes_or_unfreezes,
    changes_numbers,
    regroups,
    is_copied,
    is_saved_and_loaded,
]

# ---- what one run suffers ------------------------------------------------------------------------


def an_infinite_input(optimizer, seed):
    X, y = batch(seed)
    if not optimizer.model[0].weight.requires_grad:
        raise Fault("Tanh hides it from all other parameters, whose gradients are right")
    X[seed % 6, seed % 3] = float("inf")
    begun(optimizer, X, y)
    optimizer.step()


def a_missing_number(optimizer, seed):
    X, y = batch(seed)
    X[seed % 6, seed % 3] = float("nan")
    begun(optimizer, X, y)
    optimizer.step()


def a_gradient_that_is_no_number(optimizer, seed):
    begun(optimizer, *batch(seed))
    with torch.no_grad():
        next(p for p in optimizer.model.parameters() if p.grad is not None).grad[0] = float("nan")
    optimizer.step()


def no_backward(optimizer, seed):
    optimizer.zero_grad()
    optimizer.observe(*batch(seed))
    optimizer.step()


def a_batch_of_another_width(optimizer, seed):
    X = torch.ones(4, 5)
    optimizer.observe(X, batch(seed, 4)[1])  # raises if an update is due
    optimizer.model(X)


def an_exception(place):
    def fault(optimizer, seed):
        begun(optimizer, *batch(seed))
        due = {"invert": optimizer.steps % 3 == 0, "adapt_damping": optimizer.steps % 3 == 2}
        with armed(place if due.get(place, True) else "record"):
            optimizer.step()

    fault.__name__ = f"an_exception_in_{place}"
    return fault


def an_interrupt_between_parameters(optimizer, seed):
    begun(optimizer, *batch(seed))
    mul, count = torch.Tensor.mul_, iter(range(100))
    moved = [p for g in optimizer.param_groups[:2] for p in g["params"] if p.grad is not None]
    place = seed % len(moved)

    def interrupted(self, other):
        if next(count) == place:
            raise KeyboardInterrupt
        return mul(self, other)

    with patch.object(torch.Tensor, "mul_", interrupted):
        optimizer.step()


def a_closure_that_raises(optimizer, seed):
    begun(optimizer, *batch(seed))
    with armed("closure"):
        optimizer.step(lambda: trap("closure"))


def a_negative_number(optimizer, seed):
    group = optimizer.param_groups[seed % 2]
    begun(optimizer, *batch(seed))
    was, group["lr"] = group["lr"], -1.0
    try:
        optimizer.step()
    finally:
        group["lr"] = was


def a_foreign_group(optimizer, seed):
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


def a_broken_checkpoint(optimizer, seed):
    saved = copy.deepcopy(optimizer.state_dict())
    key = ("matrices", "inverses", "dampings", "blocks")[seed % 4]
    saved["kfac"][key] = {name: {} for name in ("0", "3", "4")}
    optimizer.load_state_dict(saved)


FAULTS = [
    an_infinite_input,
    a_missing_number,
    a_gradient_that_is_no_number,
    no_backward,
    a_batch_of_another_width,
    an_interrupt_between_parameters,
    a_closure_that_raises,
    a_negative_number,
    a_foreign_group,
    a_broken_checkpoint,
    *(an_exception(place) for place in ("control", "nan", "record", "adapt_damping", "rest")),
    an_exception("invert"),
]


# ---- the storm -----------------------------------------------------------------------------------


def everything(optimizer):
    """All that a step may change, to the last bit."""
    state = [optimizer.state.get(p, {}) for p in optimizer.model.parameters()]
    held = [list(optimizer.model.parameters()), optimizer.matrices, optimizer.inverses, state]
    numbers = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    tensors = [t.detach().numpy().tobytes() for t in tensors_in(held)]
    counts = optimizer.steps, optimizer.updates, optimizer.generator.get_state().tolist()
    return tensors, numbers, counts, [p.requires_grad for p in optimizer.model.parameters()]


def weather(name, actions):
    """The number of steps that were tried, after all actions."""
    tried, twin = built(name, network()), built(name, network())
    for clean, faults, seed in actions:
        tried, twin = clean(tried, seed), clean(twin, seed)
        assert everything(tried) == everything(twin), clean.__name__
        for i, fault in enumerate(faults):
            before = everything(tried)
            try:
                fault(tried, seed + i)
            except (Exception, Fault, KeyboardInterrupt):
                pass
            else:
                raise AssertionError(f"{fault.__name__} raised nothing")
            assert everything(tried) == before, fault.__name__
    return sum(1 + len(faults) for _, faults, _ in actions)


def storms(actions, examples):
    """A test of several sequences of so many actions."""
    action = st.tuples(
        st.sampled_from(CLEAN),
        st.lists(st.sampled_from(FAULTS), max_size=2),
        st.integers(0, 10**6),
    )
    checks = [
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.large_base_example,
    ]
    once = settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=checks,
    )
    sequences = st.lists(action, min_size=actions, max_size=actions)
    return lambda test: once(given(actions=sequences)(test))


@pytest.mark.parametrize("name", APPROXIMATIONS)
@storms(actions=4, examples=2)
def test_a_short_storm_leaves_no_trace(name, actions):
    weather(name, actions)


def test_every_fault_leaves_no_trace():
    assert weather("kfac", [(takes_a_step, FAULTS, 1), (takes_a_step, [], 2)]) == len(FAULTS) + 2


@pytest.mark.slow
@pytest.mark.parametrize("name", APPROXIMATIONS)
def test_a_long_storm_leaves_no_trace(name):
    """Some 500 steps and faults for each approximation."""
    steps = []

    @storms(actions=12, examples=25)
    def storm(actions):
        steps.append(weather(name, actions))

    storm()
    assert sum(steps) >= 500
