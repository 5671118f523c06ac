"""The optimizer: exact steps, PyTorch's habits, checkpoints, faults."""

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import (
    Conv2d,
    CrossEntropyLoss,
    Embedding,
    Flatten,
    LayerNorm,
    Linear,
    MSELoss,
    ReLU,
    Sequential,
    Tanh,
)

from kfac_scratch import EXPAND, REDUCE, ekfac, empirical, foof, kfac, kfac_reduce, layer_ios, type2
from kfac_scratch.approximations.ekfac import AmortisedEKFAC
from kfac_scratch.approximations.estimators import Latest, MovingAverage
from kfac_scratch.curvature import block_index, flatten_values, ggn, hessian
from kfac_scratch.matrices.damping import factored_inverse, levenberg_marquardt, relative_damping
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.quadratic_model import quadratic_model
from kfac_scratch.optimizer.step_control import graft, kl_clip, norm_constraint
from tests.laws import check_differs, check_equal

ROOT = Path(__file__).resolve().parents[2]


def classifier(device="cpu"):
    torch.manual_seed(0)
    return Sequential(Linear(6, 5), Tanh(), Linear(5, 3)).to(device)


def data(device="cpu", N=11, seed=1):
    torch.manual_seed(seed)
    return torch.randn(N, 6, device=device), torch.randint(3, (N,), device=device)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def gradients(model, loss, X, y):
    model.zero_grad()
    loss(model(X), y).backward()


def take(optimizer, X, y):
    gradients(optimizer.model, optimizer.loss, X, y)
    optimizer.observe(X, y)
    optimizer.step()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def change(model, before):
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


# ---- what a step is ---------------------------------------------------------------------------

EXACT: dict[str, Any] = {
    **{"momentum": 0.9, "damping": 1e-3, "decay": 0.95, "factor_every": 10, "inverse_every": 10},
    **{"invert": exact_inverse, "controls": []},
}  # steps of the length that lr gives them, with exact damping
PLAIN = EXACT | {"momentum": 0.0, "fisher": type2, "lr": 0.3, "damping": 0.2}


def newton(matrix, model, damping):
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    gradient = flatten_values(model, {n: p.grad for n, p in model.named_parameters()})
    return -torch.linalg.solve(matrix + damping * eye, gradient)


@pytest.mark.everywhere
def test_linear_regression_takes_the_damped_newton_step(device):
    torch.manual_seed(0)
    model, loss = Sequential(Linear(6, 4)).to(device), MSELoss()
    X, y = torch.randn(11, 6, device=device), torch.randn(11, 4, device=device)
    gradients(model, loss, X, y)
    expected = 0.3 * newton(hessian(model, loss, X, y), model, 0.2)
    before = values(model)
    take(KFAC(model, loss, **PLAIN), X, y)
    check_equal(flatten_values(model, change(model, before)), expected)


@pytest.mark.parametrize("approximation", [kfac, ekfac, AmortisedEKFAC()])
def test_deep_linear_net_takes_the_damped_newton_step_of_every_block(approximation, device):
    torch.manual_seed(0)
    model, loss = Sequential(Linear(6, 5), Linear(5, 4), Linear(4, 3)).to(device), MSELoss()
    X, y = torch.randn(11, 6, device=device), torch.randn(11, 3, device=device)
    gradients(model, loss, X, y)
    G = ggn(model, loss, X, y)
    blocks = torch.zeros_like(G)
    for index in block_index(model).values():
        i = index.flatten()
        blocks[i.unsqueeze(1), i] = G[i.unsqueeze(1), i]
    expected = 0.3 * newton(blocks, model, 0.2)
    before = values(model)
    take(KFAC(model, loss, approximation=approximation, **PLAIN), X, y)
    check_equal(flatten_values(model, change(model, before)), expected)
    check_differs(expected, 0.3 * newton(G, model, 0.2))  # without blocks it is another step


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE])
def test_matrices_are_those_of_the_approximation(flavour, device):
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 3, 3), ReLU(), Flatten(), Linear(27, 3)).to(device)
    X, y = torch.randn(7, 2, 5, 5, device=device), torch.randint(3, (7,), device=device)
    loss = CrossEntropyLoss()
    optimizer = KFAC(model, loss, approximation=foof, flavour=flavour, **PLAIN)
    optimizer.observe(X, y)
    for name, io_ in layer_ios(model, loss, X, y, flavour=flavour).items():
        check_equal(optimizer.matrices[name].dense(), foof(io_).dense())


def test_reduced_view_as_an_approximation_equals_the_reduce_setting(device):
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 3, 3), Flatten(), Linear(27, 3)).to(device)
    X, y = torch.randn(7, 2, 5, 5, device=device), torch.randint(3, (7,), device=device)
    one = KFAC(model, CrossEntropyLoss(), flavour=REDUCE, **PLAIN)
    other = KFAC(model, CrossEntropyLoss(), approximation=lambda io: kfac(io.reduced()), **PLAIN)
    for optimizer in (one, other):
        optimizer.observe(X, y)
    check_equal(one.matrices["0"].dense(), other.matrices["0"].dense())


def test_momentum_repeats_the_previous_change(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, **PLAIN | {"momentum": 0.7})
    before = values(model)
    take(optimizer, *data(device))
    first, before = change(model, before), values(model)
    gradients(model, loss, *data(device, seed=2))
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    optimizer.step()
    second = change(model, before)
    for name, block in (("0", optimizer.inverses["0"]), ("2", optimizer.inverses["2"])):
        G = torch.cat([gradient[f"{name}.weight"], gradient[f"{name}.bias"][:, None]], dim=1)
        P = block @ G
        expected = 0.7 * first[f"{name}.weight"] - 0.3 * P[:, :-1]
        check_equal(second[f"{name}.weight"], expected)


def test_weight_decay_is_decoupled(device):
    changes = []
    for weight_decay in (0.0, 0.1):
        model, loss = classifier(device), CrossEntropyLoss()
        before = values(model)
        take(KFAC(model, loss, weight_decay=weight_decay, **PLAIN), *data(device))
        changes.append(change(model, before)["0.weight"])
    check_equal(changes[1], changes[0] - 0.3 * 0.1 * before["0.weight"])


def test_matrices_and_inverses_are_renewed_at_their_periods(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, **PLAIN | {"factor_every": 2, "inverse_every": 3})
    seen = []
    for seed in range(7):
        M, inverse = optimizer.matrices.get("0"), optimizer.inverses.get("0")
        take(optimizer, *data(device, seed=seed))
        seen.append((optimizer.matrices["0"] is not M, optimizer.inverses["0"] is not inverse))
    updated, inverted = zip(*seen, strict=True)
    assert updated == (True, False, True, False, True, False, True)
    assert inverted == (True, False, False, True, False, False, True)


def test_stale_inverse_is_that_of_the_step_when_it_was_due(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, **PLAIN | {"factor_every": 1, "inverse_every": 3})
    for seed in range(4):
        take(optimizer, *data(device, seed=seed))
        if seed == 0:
            first = optimizer.matrices["0"].inverse(0.2).dense()
        if seed == 2:
            check_equal(optimizer.inverses["0"].dense(), first)
            check_differs(optimizer.matrices["0"].inverse(0.2).dense(), first)


def test_damping_is_never_stored_in_a_matrix(device):
    model, loss = classifier(device), CrossEntropyLoss()
    X, y = data(device)
    periods = {"factor_every": 100, "inverse_every": 1}
    optimizer = KFAC(model, loss, **PLAIN | periods | {"lr": 0.0})
    take(optimizer, X, y)
    before = optimizer.matrices["0"].dense().clone()
    for _ in range(5):
        take(optimizer, X, y)
    check_equal(optimizer.matrices["0"].dense(), before)
    check_equal(
        optimizer.inverses["0"].dense(),
        optimizer.matrices["0"].inverse(0.2).dense(),
    )


def test_the_curvature_may_be_warmed_up_before_the_first_step(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, **PLAIN | {"decay": 1.0})
    for seed in range(3):
        optimizer.update_curvature(*data(device, seed=seed))
    As = [kfac(layer_ios(model, loss, *data(device, seed=s))["0"]).A for s in range(3)]
    check_equal(optimizer.matrices["0"].A, torch.stack(As).mean(0))


def test_a_groups_damping_is_that_of_its_layers(device):
    model, loss = classifier(device), CrossEntropyLoss()
    groups = [
        {"params": model[0].parameters(), "damping": 0.5},
        {"params": model[2].parameters(), "lr": 0.1},
    ]
    optimizer = KFAC(model, loss, groups, **PLAIN)
    take(optimizer, *data(device))
    for name, damping in (("0", 0.5), ("2", 0.2)):
        expected = optimizer.matrices[name].inverse(damping)
        check_equal(optimizer.inverses[name].dense(), expected.dense())
    invert = {"invert": lambda M, f: M.inverse(relative_damping(M, f))}
    optimizer = KFAC(model, loss, **PLAIN | invert)
    take(optimizer, *data(device))
    M = optimizer.matrices["0"]
    mean = float(M.eigenvalues().mean())
    check_equal(optimizer.inverses["0"].dense(), M.inverse(0.2 * mean).dense())


def test_one_block_has_one_damping(device):
    model = classifier(device)
    groups = [
        {"params": [p], "damping": d}
        for p, d in zip(model[0].parameters(), (0.1, 0.3), strict=True)
    ]
    optimizer = KFAC(model, CrossEntropyLoss(), groups, **EXACT)
    with pytest.raises(ValueError, match=r"block '0' are in groups with the dampings \[0.1, 0.3\]"):
        take(optimizer, *data(device))


def test_factored_damping_is_that_of_the_function(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, **PLAIN | {"invert": factored_inverse})
    take(optimizer, *data(device))
    expected = factored_inverse(optimizer.matrices["2"], 0.2)
    check_equal(optimizer.inverses["2"].dense(), expected.dense())


# ---- as a PyTorch optimizer -------------------------------------------------------------------


def test_a_control_that_fails_leaves_the_memory_of_those_before_it(device):
    """Moments are stored with the step that is taken, so that a loop may go on."""
    model, loss, (X, y) = classifier(device), CrossEntropyLoss(), data(device)
    fails = iter([False, True, False])

    def refuse(step):
        if next(fails):
            raise ValueError("not this one")
        return step

    optimizer = KFAC(model, loss, controls=[graft(), refuse], lr=0.1)
    take(optimizer, X, y)
    kept = {p: {k: v.clone() for k, v in state.items()} for p, state in optimizer.state.items()}
    before = values(model)
    with pytest.raises(ValueError, match="not this one"):
        take(optimizer, X, y)
    for p, state in optimizer.state.items():
        assert state.keys() == kept[p].keys()
        for key, tensor in state.items():
            check_equal(tensor, kept[p][key])
    for name, p in model.named_parameters():
        check_equal(p.detach(), before[name])
    take(optimizer, X, y)
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_closures_and_schedulers_work_as_in_torch(device):
    model, loss = classifier(device), CrossEntropyLoss()
    X, y = data(device)
    optimizer = KFAC(model, loss, controls=[graft()], lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=30, cycle_momentum=False
    )

    def closure():
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = []
        for _ in range(29):
            optimizer.observe(X, y)
            losses.append(float(optimizer.step(closure).detach()))
            schedule.step()
    assert losses[-1] < 0.2 * losses[0]
    assert optimizer.param_groups[0]["lr"] < 0.1 * optimizer.param_groups[0]["max_lr"]


def test_lr_zero_changes_nothing(device):
    model, loss = classifier(device), CrossEntropyLoss()
    before = values(model)
    optimizer = KFAC(model, loss, lr=0.0, weight_decay=0.1, controls=[graft(), kl_clip(1e-3)])
    for seed in range(3):
        take(optimizer, *data(device, seed=seed))
    assert all((d == 0).all() for d in change(model, before).values())


def with_norm(device="cpu"):
    torch.manual_seed(0)
    layers = (Embedding(5, 6), Linear(6, 6), LayerNorm(6), Tanh(), Flatten(), Linear(24, 3))
    return Sequential(*layers).to(device)


def token_data(device="cpu", seed=1):
    torch.manual_seed(seed)
    return torch.randint(5, (7, 4), device=device), torch.randint(3, (7,), device=device)


@pytest.mark.everywhere
def test_rest_is_moved_by_the_users_rule(device):
    """Norms, and an embedding that is left out, take the steps that their own optimizer takes."""
    model, loss, (X, y) = with_norm(device), CrossEntropyLoss(), token_data(device)
    optimizer = KFAC(model, loss, lr=0.0, layers=["1", "5"], rest=adamw)
    reference = with_norm(device)
    others = [reference[0].weight, *reference[2].parameters()]
    adam = torch.optim.AdamW(others, lr=1e-3)
    for _ in range(3):
        take(optimizer, X, y)
        gradients(reference, loss, X, y)
        adam.step()
    for name, p in reference.named_parameters():
        check_equal(dict(model.named_parameters())[name], p.detach())


def test_schedules_act_on_the_rest_too(device):
    model, loss = with_norm(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, lr=0.1, rest=adamw)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    take(optimizer, *token_data(device))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.0005]
    before = values(model)
    optimizer.param_groups[1]["lr"] = 0.0
    take(optimizer, *token_data(device))
    moved = change(model, before)
    assert moved["2.weight"].abs().max() == 0 < moved["1.weight"].abs().max()


def test_parameters_without_a_block_need_a_rule(device):
    with pytest.raises(ValueError, match=r"\['2.weight', '2.bias'\].*rest="):
        KFAC(with_norm(device), CrossEntropyLoss(), rest=None)


def test_a_groups_own_numbers_are_not_lost_on_parameters_without_a_block(device):
    model = with_norm(device)
    norms = list(model[2].parameters())
    layers = [p for i in (0, 1, 5) for p in model[i].parameters()]
    groups = [{"params": layers}, {"params": norms, "weight_decay": 0.1}]
    with pytest.raises(ValueError, match=r"\['2.weight', '2.bias'\] are in a group with its own"):
        KFAC(model, CrossEntropyLoss(), groups, rest=adamw)
    groups[1].pop("weight_decay")
    KFAC(model, CrossEntropyLoss(), groups, rest=adamw)


def test_an_adapted_damping_is_used_in_the_next_step(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, adapt_damping=lambda d, _: 2 * d, adapt_every=2, **PLAIN)
    dampings = []
    for seed in range(5):
        take(optimizer, *data(device, seed=seed))
        M = optimizer.matrices["0"]
        used = [d for d in (0.2, 0.4, 0.8) if optimizer.inverses and torch.equal(
            optimizer.inverses["0"].scale, M.inverse(d).scale)]  # fmt: skip
        dampings.append(used)
    assert dampings == [[0.2], [], [0.4], [], [0.8]]


def test_a_perfect_fit_is_no_error(device):
    model, loss = Sequential(Linear(6, 3)).to(device), MSELoss()
    X, _ = data(device)
    y = model(X).detach()
    optimizer = KFAC(model, loss, adapt_damping=levenberg_marquardt, adapt_every=1, **EXACT)
    before = values(model)
    take(optimizer, X, y)
    assert all((d == 0).all() for d in change(model, before).values())
    assert optimizer.param_groups[0]["damping"] == 1e-3


def test_parameters_that_were_not_given_stay(device):
    model, loss = classifier(device), CrossEntropyLoss()
    before = values(model)
    optimizer = KFAC(model, loss, model[0].parameters(), **PLAIN)
    take(optimizer, *data(device))
    moved = change(model, before)
    assert set(optimizer.matrices) == {"0"}
    assert moved["2.weight"].abs().max() == 0 < moved["0.weight"].abs().max()


def test_frozen_parameters_stay(device):
    model, loss = classifier(device), CrossEntropyLoss()
    model[0].bias.requires_grad_(False)
    before = values(model)
    take(KFAC(model, loss, **PLAIN), *data(device))
    assert change(model, before)["0.bias"].abs().max() == 0


@pytest.mark.everywhere
def test_tied_weights_move_together(device):
    torch.manual_seed(0)
    first, second = Linear(6, 6), Linear(6, 6)
    second.weight = first.weight
    model, loss = Sequential(first, Tanh(), second).to(device), MSELoss()
    X, y = torch.randn(11, 6, device=device), torch.randn(11, 6, device=device)
    optimizer = KFAC(model, loss, **PLAIN)
    take(optimizer, X, y)
    assert model[0].weight is model[2].weight
    assert set(optimizer.matrices) == {"0"}


def test_modes_and_flags_stay(device):
    model, loss = with_norm(device).eval(), CrossEntropyLoss()
    take(KFAC(model, loss, rest=adamw), *token_data(device))
    assert not model.training
    assert not any(module._forward_hooks for module in model.modules())


# ---- controls in the loop ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"controls": [graft()], "lr": 0.03},
        {"controls": [kl_clip(0.01)], "lr": 0.3},
        {"controls": [norm_constraint(0.1)], "lr": 0.3},
        {"controls": [quadratic_model()], "adapt_damping": levenberg_marquardt, "damping": 1.0},
        {"controls": [graft()], "lr": 0.03, "approximation": AmortisedEKFAC(3), "factor_every": 2},
        {"controls": [graft()], "lr": 0.03, "approximation": ekfac, "fisher": empirical},
        {"controls": [graft()], "lr": 0.03, "approximation": Latest(kfac)},
        {"controls": [graft()], "lr": 0.03, "invert": factored_inverse, "decay": 0.0},
    ],
)
def test_kfac_descends(settings, device):
    model, loss = classifier(device), CrossEntropyLoss()
    X, y = data(device)
    optimizer = KFAC(model, loss, **EXACT | settings)
    with torch.no_grad():
        first = float(loss(model(X), y))
    for _ in range(30):
        take(optimizer, X, y)
    with torch.no_grad():
        assert float(loss(model(X), y)) < 0.3 * first


def test_record_gets_the_numbers_of_every_step(device):
    model, loss, history = classifier(device), CrossEntropyLoss(), []
    optimizer = KFAC(
        model, loss, record=history.append, adapt_damping=levenberg_marquardt, adapt_every=2,
        **PLAIN | {"controls": [kl_clip(1e-4)], "damping": 1e-3},
    )  # fmt: skip
    X, y = data(device)
    optimizer.observe(X, y)

    def closure():
        gradients(model, loss, X, y)
        return loss(model(X), y)

    before = values(model)
    value = optimizer.step(closure)
    (row,) = history
    moved = change(model, before)
    flat = flatten_values(model, moved)
    assert row["loss"] == float(value.detach())
    assert row["step_norm"] == pytest.approx(float(flat.norm()), rel=1e-9)
    assert 0 < row["nu"] < 1
    vectors = {n: flat[i.flatten()].reshape(i.shape) for n, i in block_index(model).items()}
    kl = sum(float((V * (optimizer.matrices[n] @ V)).sum()) for n, V in vectors.items()) / 2
    assert row["kl"] == pytest.approx(kl, rel=1e-9)
    assert row["kl"] < 1e-4 / 2
    take(optimizer, X, y)
    assert "ratio" in history[1]
    assert optimizer.param_groups[0]["damping"] == pytest.approx(1e-3 * 0.9**5)


# ---- checkpoints ------------------------------------------------------------------------------

RESUMED = """
import sys, torch
sys.path.insert(0, {tests!r})
from tests.optimizer.test_optimizer import RESUMABLE, resumable, run
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)  # as in the tests: sums in one order
for name in RESUMABLE:
    file = {folder!r} + "/" + name + ".pt"
    optimizer = resumable(name)
    saved = torch.load(file, weights_only=True)
    optimizer.model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(optimizer, range(10, 20))
    torch.save(optimizer.model.state_dict(), file)
"""
RESUMABLE = {
    "kfac": {"controls": [graft(), kl_clip(0.01)]},
    "amortised": {
        "approximation": AmortisedEKFAC(2, MovingAverage(kfac_reduce)),
        "controls": [graft()],
    },
    "reduce": {"controls": [graft()], "flavour": REDUCE},
    "model": {"controls": [quadratic_model()], "adapt_damping": levenberg_marquardt},
    "factored": {"invert": factored_inverse, "lr": 0.1, "controls": [norm_constraint(0.3)]},
}


def resumable(name):
    return KFAC(
        with_norm(), CrossEntropyLoss(), rest=adamw, factor_every=3, inverse_every=4,
        generator=torch.Generator().manual_seed(3), **RESUMABLE[name],
    )  # fmt: skip


def run(optimizer, steps):
    for seed in steps:
        take(optimizer, *token_data(seed=seed))


@pytest.mark.slow
def test_resumes_bit_for_bit_in_another_process(tmp_path):
    for name in RESUMABLE:
        half = resumable(name)
        run(half, range(10))
        checkpoint = {"model": half.model.state_dict(), "optimizer": half.state_dict()}
        torch.save(checkpoint, tmp_path / f"{name}.pt")
    code = RESUMED.format(tests=str(ROOT), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    for name in RESUMABLE:
        whole = resumable(name)
        run(whole, range(20))
        resumed = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed[key]), (name, key)


def test_a_checkpoint_of_another_approximation_is_refused():
    one, other = resumable("kfac"), resumable("amortised")
    run(one, range(2))
    with pytest.raises(ValueError, match="another approximation"):
        other.load_state_dict(one.state_dict())


def test_a_refused_checkpoint_changes_nothing():
    one, other = resumable("kfac"), resumable("amortised")
    run(one, range(2))
    run(other, range(2))
    one.param_groups[0]["lr"] = 0.5
    before = snapshot(other)
    with pytest.raises(ValueError, match="another approximation"):
        other.load_state_dict(one.state_dict())
    assert snapshot(other) == before


@pytest.mark.everywhere
def test_loading_onto_a_device_moves_the_matrices(device):
    model, loss = classifier(), CrossEntropyLoss()
    optimizer = KFAC(model, loss)
    take(optimizer, *data())
    moved = KFAC(classifier(device), loss)
    moved.load_state_dict(optimizer.state_dict())
    assert moved.matrices["0"].A.device.type == device.type
    take(moved, *data(device))


# ---- faults -----------------------------------------------------------------------------------


def snapshot(optimizer):
    file = io.BytesIO()
    torch.save((optimizer.model.state_dict(), optimizer.state_dict()), file)
    return file.getvalue()


def test_a_batch_with_nan_is_refused_and_nothing_changes(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss, factor_every=1)
    take(optimizer, *data(device))
    X, y = data(device)
    X[3, 2] = float("nan")
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="input of layer '0' is not finite, first for sample 3"):
        optimizer.observe(X, y)
    gradients(model, loss, X, y)
    with pytest.raises(
        ValueError, match=r"gradient of '0.weight' is not finite; nothing was changed"
    ):
        optimizer.step()
    assert snapshot(optimizer) == before
    take(optimizer, *data(device))  # and on it goes


@pytest.mark.everywhere
def test_float16_overflow_is_seen_and_a_scaler_skips_it(device):
    model, loss = classifier(device).float(), CrossEntropyLoss()
    optimizer = KFAC(model, loss, lr=0.1)
    X, y = data(device)
    X = X.float()
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**127)
    before = values(model)
    optimizer.observe(X, y)
    scaler.scale(loss(model(X), y) * 1e3).backward()  # overflows
    scaler.step(optimizer)
    scaler.update()
    assert all((d == 0).all() for d in change(model, before).values())
    with pytest.raises(ValueError, match=r"not finite.*GradScaler"):
        optimizer.step()


@pytest.mark.parametrize("controls", [[], [graft()], [kl_clip(1e-3)], [quadratic_model()]])
@pytest.mark.parametrize("approximation", [kfac, ekfac, AmortisedEKFAC()])
def test_all_zero_inputs_move_only_biases(approximation, controls, device):
    model, loss = classifier(device), CrossEntropyLoss()
    X, y = data(device)
    before = values(model)
    optimizer = KFAC(model, loss, approximation=approximation, controls=controls)
    for _ in range(2):
        take(optimizer, 0 * X, y)
    moved = change(model, before)
    assert all(p.isfinite().all() for p in model.parameters())
    assert moved["0.weight"].abs().max() == 0 < moved["2.bias"].abs().max()


@pytest.mark.parametrize("controls", [[], [graft()], [kl_clip(1e-3)], [quadratic_model()]])
@pytest.mark.parametrize("invert", [None, factored_inverse])
def test_a_dead_layer_stays_and_the_others_move(controls, invert, device):
    torch.manual_seed(0)
    model = Sequential(Linear(6, 5), ReLU(), Linear(5, 3)).to(device)
    with torch.no_grad():
        model[0].bias.fill_(-100)  # no unit is ever active
    before, settings = values(model), {} if invert is None else {"invert": invert}
    optimizer = KFAC(model, CrossEntropyLoss(), controls=controls, **settings)
    for _ in range(2):
        take(optimizer, *data(device))
    moved = change(model, before)
    assert moved["0.weight"].abs().max() == 0 < moved["2.bias"].abs().max()


def test_rank_deficient_factors_need_damping_and_say_so(device):
    model, loss = classifier(device), CrossEntropyLoss()
    X, y = data(device, N=2)
    before = values(model)
    optimizer = KFAC(model, loss, damping=0.0)
    gradients(model, loss, X, y)
    optimizer.observe(X, y)
    with pytest.raises(
        ValueError, match=r"block '0' has no inverse with damping 0.*positive damping"
    ):
        optimizer.step()
    assert all((d == 0).all() for d in change(model, before).values())
    optimizer.param_groups[0]["damping"] = 1e-3
    optimizer.step()


def test_tiny_damping_on_rank_deficient_float32_factors_is_finite(device):
    model, loss = classifier(device).float(), CrossEntropyLoss()
    X, y = data(device, N=2)
    optimizer = KFAC(model, loss, damping=1e-8, controls=[graft()], lr=1e-3)
    for _ in range(3):
        take(optimizer, X.float(), y)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_failed_decomposition_names_the_block(device):
    model, loss = classifier(device), CrossEntropyLoss()

    def broken(M, damping):
        raise torch.linalg.LinAlgError("did not converge")

    optimizer = KFAC(model, loss, invert=broken)
    with pytest.raises(ValueError, match=r"block '0' has no inverse.*did not converge"):
        take(optimizer, *data(device))


def test_an_empty_layer_is_refused_by_name_and_may_be_left_out(device):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # initialising nothing
        empty = Sequential(Linear(6, 0), Linear(0, 3), Linear(3, 3)).to(device)
    with pytest.raises(ValueError, match=r"Layer '0' has an empty weight of shape \(0, 6\)"):
        KFAC(empty, CrossEntropyLoss())
    before = values(empty)
    optimizer = KFAC(empty, CrossEntropyLoss(), layers=["2"], rest=adamw)
    take(optimizer, *data(device))
    moved = change(empty, before)
    assert moved["1.bias"].abs().max() > 0 < moved["2.bias"].abs().max()


def test_order_of_calls_is_checked(device):
    model, loss = classifier(device), CrossEntropyLoss()
    optimizer = KFAC(model, loss)
    with pytest.raises(ValueError, match=r"call observe\(X, y\) before step"):
        optimizer.step()
    optimizer.observe(*data(device))
    with pytest.raises(ValueError, match=r"loss.backward"):
        optimizer.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"damping": float("nan")}, "damping must be at least 0"),
        ({"factor_every": 0}, "factor_every must be at least 1"),
        ({"decay": 1.5}, "decay must lie in"),
        ({"layers": ["3"]}, "no layer '3'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        KFAC(classifier(), CrossEntropyLoss(), **settings)


def test_nothing_to_precondition_is_refused():
    model = Sequential(LayerNorm(3))
    with pytest.raises(ValueError, match="nothing to precondition"):
        KFAC(model, MSELoss(), rest=adamw)


# ---- precision --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fisher", [None, type2, empirical])
def test_autocast_keeps_factors_and_steps_in_float32(fisher, dtype, device):
    model, loss = classifier(device).float(), CrossEntropyLoss()
    X, y = data(device)
    X = X.float()
    optimizer = KFAC(model, loss, fisher=fisher, controls=[graft()], lr=0.03)
    with torch.no_grad():
        first = float(loss(model(X), y))
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype):
            value = loss(model(X), y)
            optimizer.observe(X, y)
        value.backward()
        optimizer.step()
    assert optimizer.matrices["0"].A.dtype == optimizer.matrices["0"].B.dtype == torch.float32
    assert all(p.dtype == torch.float32 for p in model.parameters())
    with torch.no_grad():
        assert float(loss(model(X), y)) < 0.5 * first


@pytest.mark.everywhere
def test_autocast_factors_are_near_those_in_full_precision(device):
    model, loss = classifier(device).float(), CrossEntropyLoss()
    X, y = data(device, N=64)
    optimizers = [KFAC(model, loss, fisher=type2) for _ in range(2)]
    optimizers[0].observe(X.float(), y)
    with torch.autocast(device.type, torch.bfloat16):
        optimizers[1].observe(X.float(), y)
    full, half = (optimizer.matrices["0"].dense() for optimizer in optimizers)
    assert (half - full).norm() < 0.02 * full.norm()
