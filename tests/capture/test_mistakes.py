"""A mistake in a rule or in the rows of a layer is refused: no rule needs to be trusted."""

import pytest
import torch
from torch import nn
from torch.nn import Conv2d, ConvTranspose2d, Embedding, Flatten, Linear, Sequential, Tanh

from kfac_scratch import plan
from kfac_scratch.capture import layers
from kfac_scratch.capture.functions import WEIGHT_RULES
from kfac_scratch.one_hot import OneHot
from tests.capture.test_plan import C, D, N, Net, S, sequences, two, vectors

# ---- rows and vectors of layers ----------------------------------------------------------------


def broken(name, change):
    original = getattr(layers, name)
    return lambda *args: change(original(*args))


MUTANTS = {
    "kernel axes exchanged": ("input_rows", lambda a: _with_columns(a, lambda c: c.mT)),
    "channels exchanged": ("input_rows", lambda a: _with_columns(a, lambda c: c.flip(-3))),
    "positions exchanged": ("input_rows", lambda a: a.flip(2)),
    "a position forgotten": ("input_rows", lambda a: torch.cat([0 * a[:, :, :1], a[:, :, 1:]], 2)),
    "the vectors' positions exchanged": ("output_rows", lambda g: g.flip(3)),
    "data exchanged": ("input_rows", lambda a: a.flip(1)),
    "outputs exchanged": ("output_rows", lambda g: g.flip(4)),
    "vectors doubled": ("output_rows", lambda g: 2 * g),
    "half of the bias": ("input_rows", lambda a: torch.cat([a[..., :-1], a[..., -1:] / 2], -1)),
}


def _with_columns(a, change):
    """Rows with their columns, `[channels, kernel, kernel]`, in another order."""
    columns = change(a[..., :-1].unflatten(-1, (2, 2, 2)))
    return torch.cat([columns.flatten(-3), a[..., -1:]], -1)


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mistake_in_a_rule_is_refused(name, device, monkeypatch):
    model = Sequential(Conv2d(2, 3, 2), Tanh(), Flatten(), Linear(18, C)).to(device)
    X = torch.randn(N, 2, 4, 3, device=device)
    plan(model, X)
    which, change = MUTANTS[name]
    monkeypatch.setattr(f"kfac_scratch.capture.calls.{which}", broken(which, change))
    with pytest.raises(NotImplementedError, match=r"'0\.(weight|bias)' is not"):
        plan(model, X, layers=["0"])


def _unpadded(rows):
    """The rows of an embedding, with a one for the padding word, number 2."""
    return OneHot(rows.columns.where(rows.columns >= 0, 2), rows.shape[-1], rows.dtype)


OF_OTHER_LAYERS = {
    "groups exchanged": (
        lambda: Sequential(Conv2d(4, 4, 2, groups=2), Tanh(), Flatten(), Linear(24, C)),
        lambda device: torch.randn(N, 4, 4, 3, device=device),
        "input_rows",
        lambda a: a.flip(0),
    ),
    "a kernel that is not turned": (
        lambda: Sequential(ConvTranspose2d(2, 2, 2), Tanh(), Flatten(), Linear(40, C)),
        lambda device: torch.randn(N, 2, 4, 3, device=device),
        "input_rows",
        lambda a: _with_columns(a, lambda columns: columns.flip(-1, -2)),
    ),
    "a padding word that counts": (
        lambda: Sequential(Embedding(4, D, padding_idx=2), Tanh(), Flatten(), Linear(S * D, C)),
        lambda device: (torch.arange(N * S, device=device) % 4).view(N, S),
        "one_hot_rows",
        _unpadded,
    ),
}


@pytest.mark.parametrize("name", OF_OTHER_LAYERS)
def test_mistakes_of_other_kinds_of_layers_are_refused(name, device, monkeypatch):
    make, inputs, which, change = OF_OTHER_LAYERS[name]
    model, X = make().to(device), inputs(device)
    plan(model, X)
    monkeypatch.setattr(f"kfac_scratch.capture.calls.{which}", broken(which, change))
    with pytest.raises(NotImplementedError, match=r"'0\.weight' is not"):
        plan(model, X, layers=["0"])


# ---- rules of functions -----------------------------------------------------------------------


def _by(function):
    """A network whose layer `a` is square and is used by a function."""
    return lambda: Net(lambda m, x: m.b(function(m.a, x).tanh()), **two())


def _normalised(norm, inputs):
    return lambda: Net(lambda m, x: m.b(m.a(x).flatten(1)), a=norm(), b=Linear(inputs, C))


def _with_kernel(conv, inputs):
    return lambda: Net(lambda m, x: m.b(m.a(x).flatten(1)), a=conv(2, 2, 2), b=Linear(inputs, C))


def _images(device):
    return torch.randn(N, 2, 4, 4, device=device)


def _words(device):
    return (torch.arange(N * S, device=device) % D).view(N, S)


RULES = {
    "linear": (_by(lambda layer, x: layer(x)), vectors),
    "matmul": (_by(lambda layer, x: x @ layer.weight.T + layer.bias), vectors),
    "matmul from the left": (
        lambda: Net(lambda m, x: m.b((m.a.weight @ x.T).T), **two(Linear(D, D, bias=False))),
        vectors,
    ),
    "addmm": (_by(lambda layer, x: torch.addmm(layer.bias, x, layer.weight.T)), vectors),
    "einsum": (
        _by(lambda layer, x: torch.einsum("ni,oi->no", x, layer.weight) + layer.bias),
        vectors,
    ),
    "convolution": (_with_kernel(Conv2d, 18), _images),
    "transposed convolution": (_with_kernel(ConvTranspose2d, 50), _images),
    "embedding": (
        lambda: Net(lambda m, t: m.b(m.a(t).mean(1)), **two(Embedding(D, D))),
        _words,
    ),
    "rows by number": (
        lambda: Net(lambda m, t: m.b(m.a.weight[t].mean(1)), **two(Embedding(D, D))),
        _words,
    ),
    "layer norm": (_normalised(lambda: nn.LayerNorm(D), S * D), sequences),
    "root mean square": (_normalised(lambda: nn.RMSNorm(D), S * D), sequences),
    "group norm": (_normalised(lambda: nn.GroupNorm(1, 2), 32), _images),
    "batch norm": (_normalised(lambda: nn.BatchNorm2d(2).eval(), 32), _images),
    "instance norm": (_normalised(lambda: nn.InstanceNorm2d(2, affine=True), 32), _images),
}
NORMALISATIONS = ("layer norm", "root mean square", "group norm", "batch norm", "instance norm")
WITH_BIAS = ("linear", "addmm", "convolution", "transposed convolution", *NORMALISATIONS)
MISTAKES = {
    "another input": lambda applied: applied._replace(
        x=applied.x + 1 if applied.x.is_floating_point() else (applied.x + 1) % D
    ),
    "W transposed": lambda applied: applied._replace(W=applied.W.transpose(1, 2)),
    "no bias": lambda applied: applied._replace(bias=None),
    "no rule": lambda applied: None,
}
MISTAKEN = [
    (name, mistake)
    for name in RULES
    for mistake in MISTAKES
    if not (mistake == "no bias" and (name not in WITH_BIAS or name == "root mean square"))
    and not (mistake == "W transposed" and name in NORMALISATIONS)
]


def with_rules(monkeypatch, model, change):
    """Change what the rules say about layer `a`; returns those that say something."""
    used, holder = set(), model.a.weight.data_ptr()

    def changed(rule):
        def wrong(*args, **kwargs):
            applied = rule(*args, **kwargs)
            if applied is None or applied.W.data_ptr() != holder:
                return applied
            used.add(getattr(rule, "func", rule))
            return change(applied)

        return wrong

    for func, rules in list(WEIGHT_RULES.items()):
        monkeypatch.setitem(WEIGHT_RULES, func, tuple(map(changed, rules)))
    return used


def test_every_rule_is_among_those_that_are_broken(monkeypatch):
    used = set()
    for make, inputs in RULES.values():
        model, X = make(), inputs("cpu")
        with monkeypatch.context() as patched:
            of_model = with_rules(patched, model, lambda applied: applied)
            plan(model, X, layers=["a", "b"])
        used |= of_model
    rules = {getattr(rule, "func", rule) for rules in WEIGHT_RULES.values() for rule in rules}
    assert used == rules


@pytest.mark.parametrize(("name", "mistake"), MISTAKEN)
def test_every_mistake_in_the_rule_of_a_function_is_refused(name, mistake, device, monkeypatch):
    make, inputs = RULES[name]
    model, X = make().to(device), inputs(device)
    plan(model, X, layers=["a", "b"])
    used = with_rules(monkeypatch, model, MISTAKES[mistake])
    with pytest.raises((NotImplementedError, ValueError), match=r"'a(\.weight|\.bias)?'"):
        plan(model, X, layers=["a", "b"])
    assert used
