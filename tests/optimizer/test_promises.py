"""The optimizer's promises: after an error nothing has changed, and what is accepted has effect."""

import io as files
from collections import UserDict
from contextlib import suppress
from functools import partial
from traceback import extract_stack

import pytest
import torch
from torch.nn import (
    BatchNorm1d,
    CrossEntropyLoss,
    Dropout,
    LayerNorm,
    Linear,
    Module,
    MSELoss,
    Sequential,
    Tanh,
)

from kfac_scratch import (
    KFAC,
    AmortisedEKFAC,
    Latest,
    ekfac,
    empirical,
    foof,
    graft,
    kfac,
    kl_clip,
    layer_ios,
    quadratic_model,
    tkfac,
    type2,
)
from kfac_scratch.curvature import flatten_values, ggn
from kfac_scratch.matrices.damping import levenberg_marquardt
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.finite import tensors_in
from kfac_scratch.optimizer.observed import shares
from kfac_scratch.optimizer.step_control import Batch
from tests.laws import check_differs, check_equal

pytestmark = pytest.mark.long

APPROXIMATIONS = {
    "kfac": kfac,
    "amortised": AmortisedEKFAC(2),
    "tkfac": tkfac,
    "foof": foof,
    "ekfac": Latest(ekfac),
}


def network(device="cpu"):
    torch.manual_seed(0)
    return Sequential(Linear(6, 5), Tanh(), LayerNorm(5), Linear(5, 3)).to(device)


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def data(seed, device="cpu", N=11):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(N, 6, generator=generator).to(device)
    return X, torch.randint(3, (N,), generator=generator).to(device)


def build(device="cpu", loss=None, model=None, **options):
    defaults = {"rest": adamw, "lr": 0.05, "controls": [graft()], "factor_every": 1}
    defaults |= {"invert": exact_inverse, "damping": 1e-3, "inverse_every": 10}
    generator = torch.Generator(device).manual_seed(3)
    model = network(device) if model is None else model
    return KFAC(model, loss or CrossEntropyLoss(), generator=generator, **defaults | options)


def take(optimizer, X, y):
    optimizer.zero_grad()
    optimizer.loss(optimizer.model(X), y).backward()
    optimizer.observe(X, y)
    optimizer.step()


def snapshot(optimizer):
    """Everything that a step may change, to the last bit."""
    file = files.BytesIO()
    torch.save((optimizer.model.state_dict(), optimizer.state_dict()), file)
    return file.getvalue(), [t.detach().cpu().numpy().tobytes() for t in everything(optimizer)]


def everything(optimizer):
    """All tensors, by another way than `state_dict`."""
    yield from optimizer.model.parameters()
    yield from tensors_in(optimizer.matrices)
    yield from tensors_in(optimizer.inverses)
    for p in optimizer.model.parameters():
        yield from tensors_in(optimizer.state.get(p, {}))
    if optimizer.generator is not None:
        yield optimizer.generator.get_state()


def values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# ---- nothing has changed (2.1, 2.9) --------------------------------------------------------------


def infinite(X, y):
    X = X.clone()
    X[3, 2] = float("inf")  # Tanh hides it
    return X, y


def huge(X, y):
    return X * 1e25, y


def nan_input(X, y):
    return X * float("nan"), y


BAD = {"infinite": infinite, "huge": huge, "nan": nan_input}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_a_bad_batch_leaves_no_trace(approximation, bad, device):
    """Clean steps after it are bit for bit those of an optimizer that never saw it."""
    runs = []
    for seen in (True, False):
        optimizer = build(device, approximation=APPROXIMATIONS[approximation])
        optimizer.model.float()
        optimizer = build(
            device, model=optimizer.model, approximation=APPROXIMATIONS[approximation]
        )
        for seed in range(3):
            X, y = data(seed, device)
            take(optimizer, X.float(), y)
        if seen:
            before = snapshot(optimizer)
            X, y = BAD[bad](*data(7, device))
            with pytest.raises(ValueError, match=r"not finite|non-finite"):
                take(optimizer, X.float(), y)
            assert snapshot(optimizer) == before
        for seed in range(3, 6):
            X, y = data(seed, device)
            take(optimizer, X.float(), y)
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]


def test_a_target_that_is_no_number_leaves_no_trace(device):
    model = Sequential(Linear(6, 5), Tanh(), Linear(5, 3)).to(device)
    optimizer = build(device, MSELoss(), model, fisher=empirical)
    X, y = data(0, device)[0], torch.randn(11, 3, device=device)
    take(optimizer, X, y)
    before, wrong = snapshot(optimizer), y.clone()
    wrong[2, 1] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        take(optimizer, X, wrong)
    assert snapshot(optimizer) == before
    take(optimizer, X, y)


class Interrupts:
    """Raises at the given call, of whatever it stands in for."""

    def __init__(self, error, function=lambda x, *_: x):
        self.error, self.function, self.armed = error, function, False

    def __call__(self, *args):
        if self.armed:
            raise self.error
        return self.function(*args)


class Interrupted(torch.optim.AdamW):
    """Raises after it has moved its parameters."""

    def __init__(self, params):
        super().__init__(params, lr=1e-3)
        self.armed = False

    def step(self, closure=None):
        super().step(closure)
        if self.armed:
            raise KeyboardInterrupt


PLACES = ("control", "record", "adapt_damping", "rest", "invert", "closure", "parameters")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("approximation", ["kfac", "amortised"])
def test_an_exception_at_any_place_changes_nothing(approximation, place, monkeypatch):
    error = KeyboardInterrupt() if place in ("record", "parameters") else RuntimeError("no")
    here = Interrupts(error, exact if place == "invert" else lambda x, *_: x)
    options = {
        "control": {"controls": [graft(), here]},
        "record": {"record": here},
        "adapt_damping": {"adapt_damping": here, "adapt_every": 1},
        "rest": {"rest": Interrupted},
        "invert": {"invert": here, "inverse_every": 1},
    }.get(place, {})
    runs = []
    for faulty in (True, False):
        optimizer = build(approximation=APPROXIMATIONS[approximation], **options)
        for seed in range(3):
            take(optimizer, *data(seed))
        if faulty:
            before = snapshot(optimizer)
            optimizer.zero_grad()
            X, y = data(8)
            optimizer.loss(optimizer.model(X), y).backward()
            optimizer.observe(X, y)
            here.armed = True
            if place == "rest":
                optimizer._rest.armed = True
            act = optimizer.step
            if place == "parameters":
                act = partial(interrupted_between_parameters, optimizer, monkeypatch)
            elif place == "closure":
                act = partial(optimizer.step, here)
            with pytest.raises((RuntimeError, KeyboardInterrupt, ValueError)):
                act()
            here.armed = False
            if place == "rest":
                optimizer._rest.armed = False
            assert snapshot(optimizer) == before
        for seed in range(3, 6):
            take(optimizer, *data(seed))
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]


def exact(M, damping):
    return M.inverse(damping)


def interrupted_between_parameters(optimizer, monkeypatch):
    """Ctrl-C after some of the parameters have moved."""
    done, mul = [], torch.Tensor.mul_

    def counted(self, other):
        done.append(self)
        if len(done) == 3:
            raise KeyboardInterrupt
        return mul(self, other)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "mul_", counted)
        optimizer.step()


def test_a_control_that_gives_no_number_is_refused(device):
    broken = Interrupts(None)
    broken.function = lambda step: step.scaled(
        dict.fromkeys(step.direction, float("nan") if broken.on else 1.0)
    )
    broken.on = False
    optimizer = build(device, controls=[broken])
    take(optimizer, *data(0, device))
    before, broken.on = snapshot(optimizer), True
    with pytest.raises(ValueError, match=r"change of '0.weight' is not finite; nothing was chang"):
        take(optimizer, *data(1, device))
    assert snapshot(optimizer) == before
    broken.on = False
    take(optimizer, *data(1, device))


def test_memory_of_controls_that_overflows_is_refused():
    """The step itself is finite: Adam's second moment is not."""
    optimizer = build(model=network().float(), lr=1e-3)
    X, y = data(0)
    take(optimizer, X.float(), y)
    before = snapshot(optimizer)
    optimizer.zero_grad()
    (1e25 * optimizer.loss(optimizer.model(X.float()), y)).backward()
    with pytest.raises(ValueError, match=r"not finite; nothing was changed"):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_a_damping_that_makes_an_infinite_inverse_is_refused():
    optimizer = build(model=Sequential(Linear(6, 3, bias=False)).float(), damping=1e-44)
    before = snapshot(optimizer)
    X, y = data(0)
    with pytest.raises(ValueError, match=r"inverse of block '0' with damping 1\S* is not finite"):
        take(optimizer, 0 * X.float(), y)
    assert snapshot(optimizer) == before


def test_an_adapted_damping_that_is_no_number_is_refused():
    optimizer = build(adapt_damping=lambda damping, ratio: float("nan"), adapt_every=1)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"adapt_damping made nan of the damping"):
        take(optimizer, *data(0))
    assert snapshot(optimizer) == before


def test_a_step_that_raised_may_be_taken_again():
    """It still has its batches, and draws what it drew."""
    runs = []
    for fails in (True, False):
        stop = Interrupts(RuntimeError("not yet"))
        optimizer = build(controls=[stop])
        take(optimizer, *data(0))
        optimizer.zero_grad()
        X, y = data(1)
        optimizer.loss(optimizer.model(X), y).backward()
        optimizer.observe(X, y)
        if fails:
            stop.armed = True
            with pytest.raises(RuntimeError, match="not yet"):
                optimizer.step()
            stop.armed = False
        optimizer.step()
        take(optimizer, *data(2))
        runs.append(snapshot(optimizer))
    assert runs[0] == runs[1]


def test_a_batch_whose_step_was_skipped_is_forgotten():
    """A GradScaler skips steps without a word: the batch must not join the next one's."""
    for zero in ("optimizer", "model"):
        runs = []
        for skipped in (True, False):
            optimizer = build(controls=[quadratic_model()])
            for seed in range(4):
                getattr(optimizer, zero if zero == "model" else "zero_grad")
                (optimizer if zero == "optimizer" else optimizer.model).zero_grad()
                if seed == 2 and not skipped:
                    continue
                X, y = data(seed)
                optimizer.loss(optimizer.model(X), y).backward()
                optimizer.observe(X, y)
                if seed != 2:
                    optimizer.step()
            runs.append(snapshot(optimizer))
        assert runs[0] == runs[1]


def test_nothing_is_final_before_the_step(device):
    optimizer = build(device)
    take(optimizer, *data(0, device))
    before = snapshot(optimizer)[0]
    optimizer.zero_grad()
    optimizer.observe(*data(1, device))
    M = optimizer.matrices["0"]
    assert snapshot(optimizer)[0] == before
    with suppress(ValueError):
        optimizer.step()  # there is no gradient
    assert optimizer.matrices["0"] is not M


def test_a_step_asks_the_device_once(monkeypatch):
    """One question whether everything is finite, and no other, when no inverse is due."""
    optimizer = build(controls=[], rest=None, model=Sequential(Linear(6, 5), Tanh(), Linear(5, 3)))
    for seed in range(2):
        take(optimizer, *data(seed))
    optimizer.zero_grad()
    X, y = data(2)
    optimizer.loss(optimizer.model(X), y).backward()
    optimizer.observe(X, y)
    questions = []
    for name in ("__bool__", "item", "__float__", "tolist", "__int__", "__index__"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, real=real: (questions.append((t, stack())), real(t))[1]
        )
    optimizer.step()
    monkeypatch.undo()
    asked = {id(t): where for t, where in questions}
    assert len(asked) == 1, list(asked.values())


def stack():
    """Who asked: the functions above, innermost last."""
    return [f"{frame.filename}:{frame.lineno}" for frame in extract_stack(limit=6)]


# ---- gradient accumulation (2.3) -----------------------------------------------------------------

WHOLE = {"fisher": type2, "controls": [quadratic_model()], "adapt_every": 1, "damping": 0.1}


def observed_in_parts(optimizer, X, y, sizes):
    """The documented sequence for micro-batches."""
    optimizer.zero_grad()
    for Xi, yi in zip(X.split(sizes), y.split(sizes), strict=True):
        share = len(Xi) / len(X) if optimizer.loss.reduction == "mean" else 1.0
        (share * optimizer.loss(optimizer.model(Xi), yi)).backward()
        optimizer.observe(Xi, yi)
    optimizer.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_micro_batches_of_any_size_are_one_batch(approximation, reduction, device):
    """Curvature, quadratic model and damping: all of them, over several steps."""
    runs = []
    for sizes in ([11], [2, 5, 4]):
        optimizer = build(
            device,
            CrossEntropyLoss(reduction=reduction),
            approximation=APPROXIMATIONS[approximation],
            adapt_damping=levenberg_marquardt,
            **WHOLE,
        )
        for seed in range(3):
            observed_in_parts(optimizer, *data(seed, device), sizes)
        dampings = torch.tensor([g["damping"] for g in optimizer.param_groups if "rest" not in g])
        runs.append((flatten_values(optimizer.model, values(optimizer.model)), dampings))
    check_equal(runs[1][0], runs[0][0])
    check_equal(runs[1][1], runs[0][1])


def test_the_last_micro_batch_alone_gives_another_step(device):
    runs = []
    for parts in ([11], [2, 5, 4]):
        optimizer = build(device, adapt_damping=levenberg_marquardt, **WHOLE)
        X, y = data(0, device)
        if len(parts) == 1:
            observed_in_parts(optimizer, X, y, parts)
        else:
            optimizer.loss(optimizer.model(X), y).backward()
            optimizer.observe(X[-4:], y[-4:])
            optimizer.step()
        runs.append(flatten_values(optimizer.model, values(optimizer.model)))
    check_differs(runs[1], runs[0])


def test_shares_are_those_of_terms_not_of_samples():
    X, y = torch.randn(6, 3, 4), torch.randint(3, (6, 4))
    y[0, :3] = -100
    y[1] = -100
    batches = [Batch(Linear(1, 1), CrossEntropyLoss(), X[i], y[i]) for i in (slice(2), slice(2, 6))]
    assert shares(batches) == [1 / 17, 16 / 17]
    weighted = CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]))
    y = torch.tensor([0, 1, 2])
    batches = [Batch(Linear(1, 1), weighted, X[:1], t) for t in y.split(1)]
    assert shares(batches) == [1 / 8, 2 / 8, 5 / 8]


def test_several_batches_of_an_unknown_loss_are_refused():
    class Own(Module):
        def forward(self, f, y):
            return (f - y).square().mean()

    own = Own()
    optimizer = build(
        loss=own, fisher=lambda loss, f, y: torch.ones_like(f).unsqueeze(0), rest=adamw
    )
    X, y = data(0)[0], torch.randn(11, 3)
    take(optimizer, X, y)
    for part in (slice(5), slice(5, 11)):
        own(optimizer.model(X[part]), y[part]).backward()
        optimizer.observe(X[part], y[part])
    with pytest.raises(NotImplementedError, match="observe one batch in every step"):
        optimizer.step()


# ---- periods and schedules (2.8, 2.11) -----------------------------------------------------------


def test_an_update_that_is_due_is_made_at_the_next_observe():
    """Observing odd steps only, with an even period, still learns."""
    optimizer = build(factor_every=2, controls=[])
    take(optimizer, *data(0))
    updates = []
    for seed in range(1, 12):
        optimizer.zero_grad()
        X, y = data(seed)
        optimizer.loss(optimizer.model(X), y).backward()
        if seed % 2:
            optimizer.observe(X, y)
        optimizer.step()
        updates.append(optimizer.updates)
    assert updates == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


def test_a_damping_acts_in_the_step_after_it_was_set():
    optimizer = build(inverse_every=100, damping=0.1)
    take(optimizer, *data(0))
    for damping in (0.3, 0.05):
        optimizer.param_groups[0]["damping"] = damping
        take(optimizer, *data(1))
        expected = optimizer.matrices["0"].inverse(damping)
        check_equal(optimizer.inverses["0"].dense(), expected.dense())


SCHEDULES = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 5]},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 7},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 7},
    "CosineAnnealingLR": {"T_max": 7},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 40},
    "LambdaLR": {"lr_lambda": lambda k: 0.9**k},
    "MultiplicativeLR": {"lr_lambda": lambda k: 0.9},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_of_torch_act_on_every_group(name):
    model = Sequential(Linear(6, 5), Tanh(), Linear(5, 3))
    optimizer = build(model=model, rest=None, momentum=0.5)
    reference = torch.optim.SGD(network().parameters(), lr=0.05, momentum=0.5)
    schedules = [
        getattr(torch.optim.lr_scheduler, name)(o, **SCHEDULES[name])
        for o in (optimizer, reference)
    ]
    for seed in range(20):
        take(optimizer, *data(seed))
        reference.step()
        for schedule in schedules:
            schedule.step()
        for key in ("lr", "momentum"):
            assert optimizer.param_groups[0][key] == reference.param_groups[0][key]


# ---- inputs and modes (1.10, 2.12, 2.13) ---------------------------------------------------------


class Keyed(Module):
    """A model whose input is a mapping or a tuple."""

    def __init__(self, key):
        super().__init__()
        self.key, self.inner = key, Sequential(Linear(6, 5), Tanh(), Linear(5, 3))

    def forward(self, X):
        return self.inner(X[self.key])


@pytest.mark.parametrize(
    ("key", "wrap"),
    [
        ("x", lambda X: {"x": X}),
        ("x", lambda X: UserDict(x=X)),
        (0, lambda X: (X,)),
        (0, lambda X: [X]),
    ],
)
def test_inputs_may_be_mappings_and_tuples(key, wrap):
    runs = []
    for keyed in (True, False):
        torch.manual_seed(0)
        model = Keyed(key)
        model = model if keyed else model.inner
        optimizer = build(
            model=model, controls=[quadratic_model()], adapt_damping=levenberg_marquardt,
            adapt_every=1, rest=None,
        )  # fmt: skip
        for seed in range(2):
            X, y = data(seed)
            take(optimizer, wrap(X) if keyed else X, y)
        optimizer.update_curvature(wrap(X) if keyed else X, y)
        runs.append(list(model.parameters()))
    assert all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def normalised(middle):
    torch.manual_seed(0)
    return Sequential(Linear(6, 5), middle, Tanh(), Linear(5, 3))


COMPARED = {
    "quadratic model": {"controls": [quadratic_model()]},
    "damping": {"adapt_damping": levenberg_marquardt, "adapt_every": 1},
}


@pytest.mark.parametrize("uses", COMPARED)
def test_active_dropout_is_refused_where_passes_are_compared(uses):
    optimizer = build(model=normalised(Dropout(0.3)), rest=None, **COMPARED[uses])
    before = snapshot(optimizer)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"draws random numbers.*layers \['1'\]"):
        take(optimizer, *data(0))
    assert snapshot(optimizer) == before
    assert not torch.equal(torch.get_rng_state(), state)  # of the user's own forward pass
    optimizer.model[1].eval()
    take(optimizer, *data(0))


def test_active_dropout_is_no_obstacle_to_curvature():
    optimizer = build(model=normalised(Dropout(0.3)), rest=None)
    for seed in range(3):
        take(optimizer, *data(seed))
    assert optimizer.steps == optimizer.updates == 3


@pytest.mark.parametrize("uses", COMPARED)
@pytest.mark.parametrize("trained_again", [True, False])
def test_batch_norm_follows_the_advice(trained_again, uses):
    """It is refused in training mode. In evaluation mode, all passes of a step are in that."""
    optimizer = build(model=normalised(BatchNorm1d(5)), **COMPARED[uses])
    model = optimizer.model
    with pytest.raises(ValueError, match=r"'1' \(BatchNorm1d\) uses the statistics of the batch"):
        take(optimizer, *data(0))
    statistics = model[1].running_mean.clone()
    for seed in range(2):
        X, y = data(seed)
        model.eval()
        optimizer.zero_grad()
        optimizer.loss(model(X), y).backward()
        optimizer.observe(X, y)
        model.train(trained_again)
        optimizer.step()
        assert model.training == trained_again == model[1].training
    assert torch.equal(model[1].running_mean, statistics)


# ---- momentum and weight decay (2.14) ------------------------------------------------------------


def test_momentum_repeats_the_change_without_the_decay(device):
    """Decoupled: what the decay has shrunk does not come back as momentum."""
    lr, momentum, decay = 0.1, 0.7, 0.3
    model = Sequential(Linear(6, 3)).to(device)
    options = {"controls": [], "rest": None, "fisher": type2, "inverse_every": 1, "damping": 0.2}
    optimizer = build(device, model=model, lr=lr, momentum=momentum, weight_decay=decay, **options)
    theta, change, As = flatten_values(model, values(model)), 0.0, []
    for seed in range(4):
        X, y = data(seed, device)
        take(optimizer, X, y)
        gradient = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
        P = optimizer.inverses["0"] @ gradient
        P = torch.cat([P[:, :-1].flatten(), P[:, -1]])
        change = momentum * change - lr * P
        theta = (1 - lr * decay) * theta + change
        As.append(theta)
        check_equal(flatten_values(model, values(model)), theta)


# ---- parameters without a gradient (2.7) ---------------------------------------------------------


def test_a_parameter_without_a_gradient_stays():
    """As with PyTorch's own optimizers: neither momentum nor weight decay moves it."""
    optimizer = build(weight_decay=0.1, controls=[kl_clip(1.0)])
    for seed in range(2):
        take(optimizer, *data(seed))
    before = values(optimizer.model)
    X, y = data(2)
    optimizer.zero_grad()
    optimizer.loss(optimizer.model(X), y).backward()
    optimizer.observe(X, y)
    for name in ("0.weight", "0.bias", "3.bias"):
        optimizer.model.get_parameter(name).grad = None
    optimizer.step()
    for name, p in optimizer.model.named_parameters():
        stays = name in ("0.weight", "0.bias", "3.bias")
        assert torch.equal(p, before[name]) == stays, name


def test_the_exact_curvature_of_micro_batches(device):
    optimizer = build(device, fisher=type2, model=Sequential(Linear(6, 3)).to(device), rest=None)
    X, y = data(0, device)
    for i in (slice(3), slice(3, 11)):
        optimizer.observe(X[i], y[i])
    expected = kfac(layer_ios(optimizer.model, optimizer.loss, X, y)["0"])
    check_equal(optimizer.matrices["0"].A, expected.A)
    check_equal(optimizer.matrices["0"].B, expected.B)
    assert ggn(optimizer.model, optimizer.loss, X, y).trace() > 0


# ---- groups (2.4) --------------------------------------------------------------------------------


def test_an_added_group_is_trained():
    model = network()
    options = {"rest": adamw, "lr": 0.05, "invert": exact_inverse}
    optimizer = KFAC(model, CrossEntropyLoss(), model[0].parameters(), **options)
    take(optimizer, *data(0))
    before = values(model)
    optimizer.add_param_group({"params": model[3].parameters(), "lr": 0.2, "damping": 0.3})
    optimizer.add_param_group({"params": model[2].parameters()})  # has no block
    take(optimizer, *data(1))
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters())
    expected = optimizer.matrices["3"].inverse(0.3)
    check_equal(optimizer.inverses["3"].dense(), expected.dense())


def test_parameters_that_no_rule_covers_cannot_be_added():
    model = network()
    optimizer = KFAC(model, CrossEntropyLoss(), model[0].parameters(), rest=None)
    take(optimizer, *data(0))
    before = [list(g["params"]) for g in optimizer.param_groups]
    wrong = {
        r"No block covers the parameters \['2.weight', '2.bias'\].*rest=": model[2].parameters(),
        "not one of the model's": [torch.nn.Parameter(torch.ones(3))],
        "block '3' only a part was given": [model[3].weight],
        "more than one parameter group": [model[0].weight],
    }
    for message, params in wrong.items():
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group({"params": params})
        with pytest.raises(ValueError, match="must be at least 0"):
            optimizer.add_param_group({"params": model[3].parameters(), "lr": -1.0})
        assert all(
            g["params"][i] is p for g, ps in zip(optimizer.param_groups, before, strict=True)
            for i, p in enumerate(ps)
        )  # fmt: skip
    take(optimizer, *data(1))


@pytest.mark.parametrize("key", ["lr", "momentum", "weight_decay", "damping"])
def test_a_negative_number_is_refused_when_it_is_used(key):
    optimizer = build()
    take(optimizer, *data(0))
    was, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], -1.0
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"{key} must be at least 0, got -1"):
        take(optimizer, *data(1))
    assert snapshot(optimizer) == before
    optimizer.param_groups[0][key] = was
    take(optimizer, *data(1))


def test_parameters_of_a_removed_group_stay():
    model = network()
    groups = [{"params": model[i].parameters()} for i in (0, 2, 3)]
    optimizer = build(model=model, params=groups)
    take(optimizer, *data(0))
    for index, names in ((1, ("3.weight", "3.bias")), (1, ("2.weight", "2.bias"))):
        optimizer.param_groups.pop(index)
        before = values(model)
        take(optimizer, *data(1))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) or not name.startswith(names)
        assert all(torch.equal(model.get_parameter(n), before[n]) for n in names)
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match="block '0' only a part was given"):
        take(optimizer, *data(2))


def test_a_foreign_parameter_in_a_group_is_refused():
    optimizer = build()
    optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="not one of the model's"):
        take(optimizer, *data(0))


# ---- freezing (2.7), other models (2.15), other processes (2.2) ----------------------------------


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("names", [("0.weight", "0.bias"), ("3.bias",), ("2.weight", "0.weight")])
def test_what_is_frozen_stays_and_what_is_unfrozen_moves(names, approximation):
    optimizer = build(approximation=APPROXIMATIONS[approximation], weight_decay=0.1)
    model = optimizer.model
    for frozen in (False, True, False):
        for name in names:
            model.get_parameter(name).requires_grad_(not frozen)
        before = values(model)
        for seed in range(2):
            take(optimizer, *data(seed))
        for name, p in model.named_parameters():
            assert torch.equal(p, before[name]) == (frozen and name in names), name


def test_what_was_frozen_at_first_is_trained_when_it_is_unfrozen():
    model = network()
    for p in model[3].parameters():
        p.requires_grad_(False)
    optimizer = build(model=model)
    take(optimizer, *data(0))
    assert set(optimizer.matrices) == {"0"}
    for p in model[3].parameters():
        p.requires_grad_(True)
    before = values(model)
    take(optimizer, *data(1))
    assert set(optimizer.matrices) == {"0", "3"}
    assert not torch.equal(model[3].weight, before["3.weight"])


def test_an_unfrozen_parameter_without_a_rule_is_named():
    model = network()
    for p in model[2].parameters():
        p.requires_grad_(False)
    optimizer = build(model=model, rest=None)
    take(optimizer, *data(0))
    for p in model[2].parameters():
        p.requires_grad_(True)
    with pytest.raises(ValueError, match=r"\['2.weight', '2.bias'\].*rest="):
        take(optimizer, *data(1))


def test_a_changed_model_is_refused_by_name():
    optimizer = build()
    take(optimizer, *data(0))
    optimizer.model.append(Linear(3, 3))
    with pytest.raises(ValueError, match=r"\['4.weight', '4.bias'\] came to the model after"):
        take(optimizer, *data(1))
    optimizer.add_param_group({"params": optimizer.model[4].parameters()})
    take(optimizer, *data(1))
    optimizer.model.float()
    X, y = data(2)
    with pytest.raises(ValueError, match=r"block '0' are torch.float32.*in torch.float64"):
        take(optimizer, X.float(), y)
    optimizer = build()
    optimizer.model[3] = Linear(5, 3)
    with pytest.raises(ValueError, match=r"\(3, 5\) is not one of the model's|came to the model"):
        take(optimizer, *data(0))


def test_a_compiled_model_is_refused_with_the_way_out():
    model = network()
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(ValueError, match=r"The model is compiled.*compiled = torch.compile"):
        build(model=compiled)
    optimizer = build(model=model)
    X, y = data(0)
    optimizer.loss(compiled(X), y).backward()
    optimizer.observe(X, y)
    optimizer.step()


def test_several_processes_that_do_not_come_together_are_refused(monkeypatch):
    optimizer = build()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for act in (optimizer.observe, optimizer.update_curvature, lambda X, y: optimizer.step()):
        with pytest.raises(ValueError, match=r"There are 2 processes.*distribute\(optimizer\)"):
            act(*data(0))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    take(optimizer, *data(0))


def test_a_model_for_several_devices_is_refused():
    with pytest.raises(ValueError, match=r"model\.module"):
        build(model=torch.nn.DataParallel(network()))
