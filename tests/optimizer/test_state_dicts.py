"""Checkpoints are checked whole before anything is replaced; copies are runs of their own."""

import copy
import io as files
import pickle

import pytest
import torch
from torch.nn import CrossEntropyLoss, LayerNorm, Linear, Sequential, Tanh

from kfac_scratch import (
    KFAC,
    REDUCE,
    AmortisedEKFAC,
    Latest,
    MovingAverage,
    ekfac,
    factored_inverse,
    foof,
    graft,
    kfac,
    kl_clip,
    quadratic_model,
    tkfac,
)
from kfac_scratch.matrices.damping import levenberg_marquardt
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.state_dicts import name_of
from kfac_scratch.optimizer.step_control import norm_constraint
from tests.optimizer.test_promises import adamw, build, data, network, snapshot, take


def trained(steps=3, **options):
    optimizer = build(**options)
    for seed in range(steps):
        take(optimizer, *data(seed))
    return optimizer


def written(optimizer):
    """A checkpoint as it comes out of a file."""
    file = files.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def wide():
    torch.manual_seed(0)
    return Sequential(Linear(6, 7), Tanh(), LayerNorm(7), Linear(7, 3))


def longer():
    torch.manual_seed(0)
    return Sequential(Linear(6, 5), Tanh(), LayerNorm(5), Linear(5, 3), Linear(3, 3))


OTHERS = {
    "tkfac": (lambda: build(approximation=tkfac), r"approximation MovingAverage\(kfac\)"),
    "foof": (lambda: build(approximation=foof), r"has MovingAverage\(foof\)"),
    "newest": (lambda: build(approximation=Latest(kfac)), r"has Latest\(kfac\)"),
    "amortised": (lambda: build(approximation=AmortisedEKFAC()), "AmortisedEKFAC"),
    "inverse": (lambda: build(invert=factored_inverse), "inverse exact_inverse"),
    "reduce": (lambda: build(flavour=REDUCE), "flavour EXPAND, but the optimizer has REDUCE"),
    "widths": (lambda: build(model=wide()), r"Block '0' is \(5, 7\).*but \(7, 7\)"),
    "layers": (lambda: build(model=longer()), r"only in the optimizer: \['4.bias', '4.weight'\]"),
    "dtype": (lambda: build(model=network().float()), r"float64 in the checkpoint.*float32"),
    "frozen": (lambda: frozen(), r"Block '0' is \(5, 7\).*but \(5, 6\)"),
    "generator": (lambda: without_generator(), "optimizer has none"),
}


def without_generator():
    return KFAC(network(), CrossEntropyLoss(), rest=adamw, invert=exact_inverse)


def frozen():
    model = network()
    model[0].bias.requires_grad_(False)
    return build(model=model)


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_optimizer_is_refused_and_changes_nothing(other):
    make, message = OTHERS[other]
    optimizer, checkpoint = make(), written(trained())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    assert snapshot(optimizer) == before


def corrupted(change):
    checkpoint = written(trained())
    change(checkpoint)
    return checkpoint


def without_own(c):
    del c["kfac"]


def of_an_older_format(c):
    del c["kfac"]["format"]


def nan_in_a_matrix(c):
    c["kfac"]["matrices"]["3"]["B"][0, 1] = float("nan")


def nan_in_an_inverse(c):
    c["kfac"]["inverses"]["3"]["scale"][0, 1] = float("inf")


def nan_in_a_state(c):
    c["state"][1]["previous"][0] = float("nan")


def of_another_shape(c):
    c["kfac"]["matrices"]["0"]["A"] = torch.eye(3)


def of_a_state_of_another_shape(c):
    c["state"][1]["previous"] = torch.zeros(2, 2)


def of_a_negative_damping(c):
    c["param_groups"][0]["damping"] = -1.0


def of_a_broken_generator(c):
    c["kfac"]["generator"] = torch.zeros(3, dtype=torch.uint8)


def in_double(c):
    c["kfac"]["matrices"]["0"]["A"] = c["kfac"]["matrices"]["0"]["A"].float()


CORRUPTED = {
    without_own: "no checkpoint of KFAC",
    of_an_older_format: "in the format 1",
    nan_in_a_matrix: r"matrix of block '3'.*is not finite",
    nan_in_an_inverse: r"inverse of block '3'.*is not finite",
    nan_in_a_state: r"state of parameter '0.bias' in the checkpoint is not finite",
    of_another_shape: "matrix of block '0'",
    of_a_state_of_another_shape: r"'0.bias' has the shape \(2, 2\)",
    of_a_negative_damping: "damping must be at least 0",
    of_a_broken_generator: "random state",
    in_double: r"matrix of block '0'.*torch.float32",
}


@pytest.mark.parametrize("change", CORRUPTED)
def test_a_corrupted_checkpoint_is_refused_and_changes_nothing(change):
    optimizer = trained(2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=CORRUPTED[change]):
        optimizer.load_state_dict(corrupted(change))
    assert snapshot(optimizer) == before
    take(optimizer, *data(5))


def test_a_loading_that_is_interrupted_changes_nothing(monkeypatch):
    optimizer, checkpoint = trained(2), written(trained())
    before = snapshot(optimizer)

    def interrupted(self, rest):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(KFAC, "_share", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(checkpoint)
    assert snapshot(optimizer) == before
    take(optimizer, *data(5))


@pytest.mark.parametrize("prefixes", [("", "module"), ("module", "")])
def test_the_prefix_of_a_wrapper_is_added_or_removed(prefixes):
    runs = []
    for prefix in prefixes:
        model = network()
        wrapped = Sequential()
        wrapped.add_module("module", model)
        optimizer = build(model=wrapped if prefix else model)
        if runs:
            optimizer.model.load_state_dict(
                dict(zip(optimizer.model.state_dict(), runs[0][0].values(), strict=True))
            )
            optimizer.load_state_dict(runs[0][1])
        for seed in range(2):
            take(optimizer, *data(seed))
        runs.append((copy.deepcopy(optimizer.model.state_dict()), written(optimizer)))
    straight = trained(2)
    for seed in range(2):
        take(straight, *data(seed))
    for p, q in zip(straight.model.parameters(), runs[1][0].values(), strict=True):
        assert torch.equal(p, q)


def test_half_precision_is_cast_up():
    optimizer, checkpoint = trained(2), written(trained())
    M = checkpoint["kfac"]["matrices"]["0"]
    M["A"] = M["A"].bfloat16()
    optimizer.load_state_dict(checkpoint)
    assert optimizer.matrices["0"].A.dtype == torch.float64
    assert torch.equal(optimizer.matrices["0"].A, M["A"].double())
    take(optimizer, *data(5))


def test_makers_are_told_apart_by_name():
    assert name_of(MovingAverage(kfac)) == "MovingAverage(kfac)"
    assert name_of(AmortisedEKFAC(3)) == "AmortisedEKFAC(MovingAverage(kfac))"
    assert name_of(Latest(ekfac)) != name_of(Latest(tkfac))


# ---- copies (2.5) --------------------------------------------------------------------------------

CONTROLS = [graft(), norm_constraint(10.0), kl_clip(1.0), quadratic_model()]
COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("approximation", [kfac, AmortisedEKFAC(2)])
def test_a_copy_is_a_run_of_its_own(approximation, how):
    """It has its own model and generator, and goes on as the original does."""
    options = {"controls": CONTROLS, "adapt_damping": levenberg_marquardt, "adapt_every": 2}
    original = trained(approximation=approximation, **options)
    schedule = torch.optim.lr_scheduler.StepLR(original, 2)
    schedule.step()
    original.observe(*data(9))  # is not in the copy
    taken = COPIES[how](original)
    assert taken.model is not original.model
    for seed in range(3, 5):
        take(taken, *data(seed))
    for seed in range(3, 5):
        take(original, *data(seed))
    assert snapshot(taken)[1] == snapshot(original)[1]


def test_a_copy_moves_its_own_parameters_only():
    original = trained()
    before = snapshot(original)
    model, taken = copy.deepcopy((original.model, original))
    assert taken.model is model
    take(taken, *data(3))
    assert snapshot(original) == before != snapshot(taken)


def test_a_lambda_can_be_copied_but_not_pickled():
    original = trained(controls=[lambda step: step])
    take(copy.deepcopy(original), *data(3))
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(original)
