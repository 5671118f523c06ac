"""Capture cannot be fooled: every model is exact, or refused by name; plans are made once."""

import warnings
from collections import UserDict
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from math import prod

import pytest
import torch
from torch import nn
from torch.nn import (
    Conv1d,
    Conv2d,
    CrossEntropyLoss,
    Dropout,
    Embedding,
    Flatten,
    Linear,
    Module,
    MSELoss,
    ReLU,
    Sequential,
    Tanh,
)
from torch.nn.functional import (
    batch_norm,
    bilinear,
    embedding_bag,
    linear,
    prelu,
    relu,
    relu_,
    scaled_dot_product_attention,
)
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

import kfac_scratch.capture.plan as plans
from kfac_scratch import (
    EXPAND,
    KFAC,
    REDUCE,
    Plans,
    additive,
    coarse_correction,
    empirical,
    kfac_over,
    layer_groups,
    layer_ios,
    monte_carlo,
    plan,
    type2,
)
from kfac_scratch.curvature import diagonal_blocks, ggn
from tests.laws import check_equal
from tests.second_device import NAME as SECOND_DEVICE

N, S, D, C = 5, 3, 4, 2


class Net(Module):
    """Layers by name, and any forward pass."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.way = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.way(self, x)


def sequences(device, n=N, s=S):
    return torch.randn(n, s, D, device=device)


def vectors(device):
    return torch.randn(N, D, device=device)


def two(a=None, b=None):
    return {"a": a or Linear(D, D), "b": b or Linear(D, C)}


def check_exact(model, X, device, written=None, x=None):
    """Every block is the exact one, and the reduced view is that of the expanded rows.

    A softmax ignores its keys' bias, so that a sum of vectors may vanish. Plain autodiff takes one
    tensor: `written` is the same model for that tensor `x`.
    """
    data = model, MSELoss(), X, torch.randn(len(model(X)), C, device=device)
    of = data if written is None else (written, data[1], x, data[3])
    exact, ios = diagonal_blocks(model, ggn(*of)), layer_ios(*data)
    reduced = layer_ios(*data, flavour=REDUCE)
    for name, io in ios.items():
        check_equal(io.block(), exact[name])
        check_equal(reduced[name].a, io.reduced().a)
        assert (reduced[name].g - io.reduced().g).abs().max() <= 1e-12 * io.g.abs().max()
        assert reduced[name].positions == io.a.shape[1]
    return ios


# ---- exact -------------------------------------------------------------------------------------


def changed(hook):
    """A model with a hook of the user's that changes what a layer gives."""
    model = Sequential(Linear(D, D), Tanh(), Linear(D, C))
    model[0].register_forward_hook(hook)
    return model


def with_pre_hook():
    model = Sequential(Linear(D, D), Tanh(), Linear(D, C))
    model[0].register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    return model


def recurrent(m, x):
    h = torch.zeros_like(x[:, 0])
    for s in range(x.shape[1]):
        h = (m.a(x[:, s]) + m.b(h)).tanh()
    return m.c(h)


def frames(m, x):
    """Films of images: the convolution sees `[N * T, 1, S, D]`."""
    images = torch.stack([x, x.sin()], 1).flatten(0, 1).unsqueeze(1)
    return m.b(m.a(images).tanh().flatten(1).unflatten(0, (len(x), -1)).mean(1))


def windows(m, x):
    """Rows of a datum on both sides of the batch: `[2, N, S]` in one axis."""
    both = torch.stack([x, x.cos()]).flatten(0, 2)
    return m.b(m.a(both).tanh().unflatten(0, (2, len(x), -1)).mean((0, 2)))


EXACT = {
    "positions first": (
        lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().mean(0)),
        two,
        sequences,
    ),
    "positions first, as many as data": (
        lambda m, x: m.b(m.a(x.transpose(0, 1)).tanh().mean(0)),
        two,
        lambda device: sequences(device, S, S),
    ),
    "positions first in one axis": (
        lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh().view(-1, len(x), D).sum(0)),
        two,
        sequences,
    ),
    "data first in one axis": (
        lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh().unflatten(0, (len(x), -1)).sum(1)),
        two,
        sequences,
    ),
    "both in one axis": (windows, two, sequences),
    "positions first, one of them read": (
        lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh().view(-1, len(x), D)[1]),
        two,
        sequences,
    ),
    "data first, the last position read": (
        lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh().unflatten(0, (len(x), -1))[:, -1]),
        two,
        lambda device: sequences(device, 2 * S),  # in the other order, rows of several data meet
    ),
    "frames": (
        frames,
        lambda: two(Conv2d(1, 2, 2), Linear(2 * (S - 1) * (D - 1), C)),
        sequences,
    ),
    "words, positions first": (
        lambda m, x: m.b(m.a(x.T).tanh().mean(0)),
        lambda: two(Embedding(7, D, padding_idx=2)),
        lambda device: torch.randint(7, (N, S), device=device),
    ),
    "words in one axis": (
        lambda m, x: m.b(m.a(x.T.flatten()).view(-1, len(x), D).tanh().mean(0)),
        lambda: two(Embedding(7, D)),
        lambda device: torch.randint(7, (N, S), device=device),
    ),
    "recurrent": (recurrent, lambda: two(b=Linear(D, D)) | {"c": Linear(D, C)}, sequences),
    "used at two lengths": (
        lambda m, x: m.b(m.a(x).tanh().mean(1) + m.a(x[:, :2]).sin().mean(1)),
        two,
        sequences,
    ),
    "centred by a detached mean": (
        lambda m, x: m.b((m.a(x) - m.a(x).mean(0).detach()).tanh()),
        two,
        vectors,
    ),
    "a segment without gradients": (
        lambda m, x: m.b(m.a(x).tanh() + _without_gradient(m.a, x)),
        two,
        vectors,
    ),
    "in place after a view": (
        lambda m, x: m.b(relu_(m.a(x).view(len(x), -1)).view_as(x).mean(1)),
        two,
        sequences,
    ),
    "attention with a key bias that a softmax ignores": (
        lambda m, x: m.b((m.q(x) @ m.a(x).mT).softmax(-1) @ x).mean(1),
        lambda: two() | {"q": Linear(D, D)},
        sequences,
    ),
}


def _without_gradient(layer, x):
    with torch.no_grad():
        return layer(x)


@pytest.mark.parametrize("name", EXACT)
def test_the_data_are_found_wherever_they_are(name, device):
    forward, modules, inputs = EXACT[name]
    check_exact(Net(forward, **modules()).to(device), inputs(device), device)


@pytest.mark.parametrize(
    "model",
    [
        lambda: changed(lambda m, x, z: relu(z)),
        lambda: changed(lambda m, x, z: z.mul_(2)),
        with_pre_hook,
        lambda: Sequential(Linear(D, D), ReLU(inplace=True), Linear(D, C)),
        lambda: Sequential(Linear(D, D), nn.BatchNorm1d(D), Linear(D, C)).eval(),
        lambda: Sequential(nn.utils.parametrizations.weight_norm(Linear(D, D)), Linear(D, C)),
    ],
    ids=["changed", "changed in place", "pre-hook", "in place", "batch norm", "weight norm"],
)
@pytest.mark.filterwarnings("ignore:No block covers")
def test_what_follows_a_layer_changes_nothing(model, device):
    check_exact(model().to(device), vectors(device), device)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", ["positions first in one axis", "frames", "recurrent"])
def test_few_data_are_enough(name, n, device):
    forward, modules, _ = EXACT[name]
    check_exact(Net(forward, **modules()).to(device), sequences(device, n), device)


@dataclass
class Pair:
    """An input of two tensors and a number."""

    x: torch.Tensor
    scale: torch.Tensor
    power: int = 2


PAIRS = {
    "dict": lambda x: {"x": x, "scale": x.sin()},
    "user dict": lambda x: UserDict(x=x, scale=x.sin()),
    "tuple": lambda x: (x, x.sin()),
    "list in a tuple": lambda x: ([x], x.sin()),
    "dataclass": lambda x: Pair(x, x.sin()),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_inputs_of_several_tensors_are_cut(kind, device):
    def forward(m, X):
        x, y = X.values() if hasattr(X, "values") else (X.x, X.scale) if kind == "dataclass" else X
        return m.b(m.a(x[0] if isinstance(x, list) else x).tanh() * y)

    modules, x = two(), vectors(device)
    model = Net(forward, **modules).to(device)
    written = Net(lambda m, x: forward(m, PAIRS[kind](x)), **modules)
    check_exact(model, PAIRS[kind](x), device, written, x)


# ---- outputs with the positions of every sample on axis 0 ---------------------------------------


def flat(m, x):
    """Logits as language models flatten them."""
    return m.b((m.a(x) + m.a(x).mean(1, keepdim=True)).tanh()).flatten(0, 1)


def flat_positions_first(m, x):
    return m.b((m.a(x) + m.a(x).mean(1, keepdim=True)).tanh()).transpose(0, 1).flatten(0, 1)


FLAT_TARGETS = {
    "labels": (CrossEntropyLoss, lambda rows: torch.randint(C, (rows,))),
    "soft labels": (CrossEntropyLoss, lambda rows: torch.rand(rows, C).softmax(1)),
    "numbers": (MSELoss, lambda rows: torch.randn(rows, C)),
    "bits": (nn.BCEWithLogitsLoss, lambda rows: torch.randint(2, (rows, C)).double()),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("targets", FLAT_TARGETS)
@pytest.mark.parametrize("forward", [flat, flat_positions_first])
def test_flattened_outputs_are_unflattened(forward, targets, reduction, device):
    kind, make = FLAT_TARGETS[targets]
    n = 2 * S  # with coprime sizes, a wrong order would separate the samples, too
    model, X = Net(forward, **two()).to(device), sequences(device, n)
    data = model, kind(reduction=reduction), X, make(n * S).to(device)
    exact = diagonal_blocks(model, ggn(*data))
    for name, io in layer_ios(*data).items():
        assert io.g.shape[1] == n
        check_equal(io.block(), exact[name])


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8])
def test_any_two_samples_that_meet_are_refused(n, device):
    """The output of one depends on what one other gives, and on no other sample."""
    for i, j in permutations(range(n), 2):

        def meeting(m, x, i=i, j=j):
            z = m.a(x).tanh()
            others = torch.zeros_like(z[i : i + 1])
            rows = [z[j : j + 1] if k == i else others for k in range(len(z))]
            return m.b(z + torch.cat(rows) if len(z) == n else z)

        model, X = Net(meeting, **two()).to(device), sequences(device, n)
        with pytest.raises(ValueError, match=MEET[1]):
            layer_ios(model, MSELoss(), X, torch.randn(n, S, C, device=device))


@pytest.mark.parametrize("n", [1, 2, 3, 8, 50])
def test_sets_tell_any_two_samples_apart(n, device):
    sets = plans.separating_sets(n, device)
    for i, j in permutations(range(n), 2):
        assert (sets[:, i] & ~sets[:, j]).any()
    assert len(sets.sum(0).unique()) == 1
    assert sets.any()


def test_flattened_outputs_of_samples_that_meet_are_refused(device):
    def meeting(m, x):
        return flat(m, x - x.mean(0)) + m.a(x).cumsum(0)[..., :C].flatten(0, 1)

    model, X = Net(meeting, **two()).to(device), sequences(device)
    with pytest.raises(ValueError, match=MEET[1]):
        layer_ios(model, CrossEntropyLoss(), X, torch.randint(C, (N * S,), device=device))


def test_targets_that_are_not_flattened_with_the_output_are_refused(device):
    model, X = Net(flat, **two()).to(device), sequences(device)
    with pytest.raises(ValueError, match=r"15 entries on axis 0.*flatten them in the same way"):
        layer_ios(model, CrossEntropyLoss(), X, torch.randint(C, (N, S), device=device))


def test_the_order_of_a_flattened_output_is_told_by_the_inputs_if_positions_do_not_meet(device):
    """Every row is a network's output by itself; the gradient of a sample sums over its rows."""
    layers, X = two(), sequences(device)
    ways = {
        "data first": lambda m, x: m.b(m.a(x.flatten(0, 1)).tanh()),
        "positions first": lambda m, x: m.b(m.a(x.transpose(0, 1).flatten(0, 1)).tanh()),
    }
    y, found = torch.randn(N, S, C, device=device), []
    for order, way in ways.items():
        targets = (y if order == "data first" else y.transpose(0, 1)).flatten(0, 1)
        net = Net(way, **layers).to(device)
        found.append(layer_ios(net, MSELoss(), X, targets, empirical))
    for name in found[0]:
        check_equal(found[0][name].gradients(), found[1][name].gradients())


@pytest.mark.parametrize("fisher", [type2, empirical, monte_carlo(3)], ids=["type2", "emp", "mc"])
def test_flattened_outputs_are_those_with_an_axis_for_positions(fisher, device):
    """Whatever is sent back, and in the optimizer and over a loader, too."""
    layers, X = two(), sequences(device)
    model = Net(flat, **layers).to(device)
    other = Net(lambda m, x: flat(m, x).unflatten(0, (len(x), -1)).movedim(-1, 1), **layers)
    y = torch.randint(C, (N, S), device=device)
    found = []
    for net, targets in ((model, y.flatten()), (other, y)):
        torch.manual_seed(0)
        ios = layer_ios(net, CrossEntropyLoss(), X, targets, fisher)
        torch.manual_seed(0)
        over = kfac_over(net, CrossEntropyLoss(), [(X, targets)], fisher)
        optimizer = KFAC(net, CrossEntropyLoss(), fisher=fisher)
        torch.manual_seed(0)
        CrossEntropyLoss()(net(X), targets).backward()
        optimizer.observe(X, targets)
        found.append((ios, over, optimizer.matrices))
        net.zero_grad()
    for name in found[0][0]:
        check_equal(found[0][0][name].g, found[1][0][name].g)
        check_equal(found[0][1][name].dense(), found[1][1][name].dense())
        check_equal(found[0][2][name].dense(), found[1][2][name].dense())


# ---- refused -----------------------------------------------------------------------------------


def double_backward(m, x):
    x = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad(m.a(x).tanh().sum(), x, create_graph=True)
    return m.b(slope)


def _before_its_bias(layer, x):
    z = x @ layer.weight.T
    return (z + layer.bias).tanh() + z


def shared_positions(m, x):
    return m.b((m.a(torch.arange(x.shape[1], device=x.device)) + x).tanh().mean(1))


def hooked(m, x):
    if not m.a.weight._backward_hooks:
        m.a.weight.register_hook(lambda g: 2 * g)
    return m.b(m.a(x).tanh())


def contrastive(m, x):
    z = m.b(m.a(x).tanh())
    return z @ z.T


def with_a_mean_of_many(m, x):
    z = m.a(x)
    return m.b((z - z.mean(0) if len(x) > 3 else z).tanh())


def in_a_cell(m, x):
    return m.b(m.a(x) + torch.rnn_tanh_cell(x, x.sin(), m.a.weight, m.a.weight))


def in_a_kernel(m, x):
    h = torch.rnn_tanh(
        *(x[None], x[None].sin(), [m.a.weight, m.a.weight, m.a.bias, m.a.bias]),
        *(True, 1, 0.0, False, False, False),
    )
    return m.b(m.a(x) + h[0][0])


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mm(x, weight.t())


@cache
def _scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(_product)


class Product(torch.autograd.Function):
    """A product with a derivative of its own."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        return g @ weight, g.T @ x


def as_a_mask(m, x):
    heads = x.unsqueeze(1)
    mask = m.a.weight[: x.shape[1], : x.shape[1]]
    attended = scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
    return m.b((m.a(x) + attended.squeeze(1)).mean(1))


MEET, OTHERWISE = (
    (ValueError, "'a'.*no sample"),
    (NotImplementedError, r"'a\.(weight|bias)' is not"),
)
BAD = {
    "centred": (lambda m, x: m.b((m.a(x) - m.a(x).mean(0)).tanh()), two, vectors, MEET),
    "batch statistics": (
        lambda m, x: m.b(batch_norm(m.a(x), None, None, training=True)),
        two,
        vectors,
        MEET,
    ),
    "attention over the batch": (
        lambda m, x: m.b((m.a(x) @ m.a(x).T).softmax(-1) @ x),
        two,
        vectors,
        MEET,
    ),
    "the next datum": (lambda m, x: m.b(m.a(x).tanh() * m.a(x).roll(1, 0)), two, vectors, MEET),
    "sums over earlier data": (
        lambda m, x: m.b(m.a(x).tanh().cumsum(0)),
        two,
        vectors,
        MEET,
    ),
    "sums over later data": (
        lambda m, x: m.b(m.a(x).tanh().flip(0).cumsum(0).flip(0)),
        two,
        vectors,
        MEET,
    ),
    "sorted": (lambda m, x: m.b(m.a(x).sort(0).values), two, vectors, MEET),
    "the largest of the batch": (
        lambda m, x: m.b(m.a(x) / m.a(x).abs().amax()),
        two,
        vectors,
        MEET,
    ),
    "shared positions": (shared_positions, lambda: two(Embedding(9, D)), sequences, MEET),
    "shared positions, as many as data": (
        shared_positions,
        lambda: two(Embedding(9, D)),
        lambda device: sequences(device, S, S),
        MEET,
    ),
    "contrastive logits": (contrastive, two, vectors, MEET),
    "a graph of any size": (
        lambda m, x: m.b((torch.eye(len(x), device=x.device).roll(1, 0) @ m.a(x)).tanh()),
        two,
        vectors,
        MEET,
    ),
    "a mean over more than three": (with_a_mean_of_many, two, vectors, MEET),
    "positions along the batch, as many as data": (
        lambda m, x: m.b((m.a(torch.arange(len(x), device=x.device)) + x).tanh().mean(1)),
        lambda: two(Embedding(9, D)),
        lambda device: sequences(device, S, S),
        (ValueError, "fails on 2 of the samples alone"),
    ),
    "the batch on axis 1, as many positions as data": (
        lambda m, x: m.b(m.a(x).tanh().mean(0)),
        two,
        lambda device: sequences(device, S, S),
        (ValueError, r"For 2 of the samples.*shape \(3, 2\)"),
    ),
    "data as columns": (
        lambda m, x: m.b(m.a(x.T).T.tanh()),
        lambda: two(Linear(N, N)),
        vectors,
        (ValueError, "fails on 2 of the samples alone"),
    ),
    "a graph of fixed size": (
        lambda m, x: m.b(torch.eye(N, device=x.device).roll(1, 0) @ m.a(x)),
        two,
        vectors,
        (ValueError, "fails on 2 of the samples alone"),
    ),
    "second derivatives": (double_backward, two, vectors, OTHERWISE),
    "a bias in a function": (lambda m, x: m.b((m.a(x) + m.a.bias).tanh()), two, vectors, OTHERWISE),
    "a column of a weight": (
        lambda m, x: m.b((m.a(x) + linear(x[:, :1], m.a.weight[:, :1])).tanh()),
        two,
        vectors,
        OTHERWISE,
    ),
    "every other row of a weight": (
        lambda m, x: m.b((m.a(x) + linear(x, m.a.weight[::2]).repeat(1, 2)).tanh()),
        two,
        vectors,
        OTHERWISE,
    ),
    "the bias of other rows": (
        lambda m, x: m.b(m.a(x) + linear(x, m.a.weight[:2], m.a.bias[1:3]).repeat(1, 2)),
        two,
        vectors,
        OTHERWISE,
    ),
    "a weight twice transposed": (
        lambda m, x: m.b((m.a(x) + linear(x, m.a.weight.T)).tanh()),
        two,
        vectors,
        OTHERWISE,
    ),
    "a weight times something": (
        lambda m, x: m.b((m.a(x) + linear(x, 2 * m.a.weight)).tanh()),
        two,
        vectors,
        OTHERWISE,
    ),
    "a bias times something": (
        lambda m, x: m.b((x @ m.a.weight.T + 2 * m.a.bias + m.a(x)).tanh()),
        two,
        vectors,
        OTHERWISE,
    ),
    "a product that is used before its bias is added": (
        lambda m, x: m.b(_before_its_bias(m.a, x)),
        two,
        vectors,
        OTHERWISE,
    ),
    "a recurrent cell": (in_a_cell, two, vectors, OTHERWISE),
    "a recurrent kernel": (in_a_kernel, two, vectors, OTHERWISE),
    "a scripted function": (
        lambda m, x: m.b(m.a(x) + _scripted()(x.sin(), m.a.weight)),
        two,
        vectors,
        OTHERWISE,
    ),
    "a sparse product": (
        lambda m, x: m.b(m.a(x) + torch.sparse.mm(x.relu().to_sparse(), m.a.weight.T)),
        two,
        vectors,
        OTHERWISE,
    ),
    "a function with a derivative of its own": (
        lambda m, x: m.b(m.a(x) + Product.apply(x.sin(), m.a.weight)),
        two,
        vectors,
        OTHERWISE,
    ),
    "a mask in an attention": (as_a_mask, two, sequences, OTHERWISE),
    "sums of words": (
        lambda m, t: m.b(m.a(t).mean(1) + embedding_bag(t, m.a.weight, mode="sum").tanh()),
        lambda: two(Embedding(7, D)),
        lambda device: torch.randint(7, (N, S), device=device),
        OTHERWISE,
    ),
    "a bilinear form": (
        lambda m, x: m.b(m.a(x) + bilinear(x, x.sin(), m.a.weight.unsqueeze(0))),
        two,
        vectors,
        OTHERWISE,
    ),
    "a bias as slopes": (lambda m, x: m.b(prelu(m.a(x), m.a.bias)), two, vectors, OTHERWISE),
    "a penalty in the output": (
        lambda m, x: m.b(m.a(x).tanh()) + m.a.weight.square().sum(),
        two,
        vectors,
        OTHERWISE,
    ),
    "a gradient hook": (hooked, two, vectors, OTHERWISE),
    "a reentrant checkpoint": (
        lambda m, x: m.b(checkpoint(m.a, x.requires_grad_(), use_reentrant=True).tanh()),
        two,
        vectors,
        (NotImplementedError, "use_reentrant=False"),
    ),
    "a batch of one shape only": (
        lambda m, x: m.b(m.a(x).tanh().mean(0, keepdim=True)),
        two,
        vectors,
        (ValueError, r"For 2 of the samples.*shape \(1, 2\)"),
    ),
    "other calls for other numbers of data": (
        lambda m, x: m.b(m.a(m.a(x)) if len(x) == 2 else m.a(x)),
        two,
        vectors,
        (ValueError, "'a'.*called otherwise with two samples"),
    ),
    "other calls for a large batch": (
        lambda m, x: m.b(m.a(m.a(x)) if len(x) > 3 else m.a(x)),
        two,
        vectors,
        (ValueError, "'a'.*called otherwise with two samples than with 5"),
    ),
    "other calls for a larger batch than is tried": (
        lambda m, x: m.b(m.a(m.a(x)) if len(x) > 8 else m.a(x)),
        two,
        lambda device: torch.randn(9, D, device=device),
        (ValueError, r"'a'.*was called otherwise \(2 times\)"),
    ),
    "other positions for other numbers of data": (
        lambda m, x: m.b(
            m.a(torch.stack([x] * (2 if len(x) > 3 else 1), 1).flatten(0, 1))[: len(x)]
        ),
        two,
        vectors,
        (ValueError, "'a'.*has other positions for two samples than for 5"),
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_exact_block_is_refused_by_name(name, device):
    if name == "a sparse product" and device.type == SECOND_DEVICE:
        pytest.skip("the second device has no sparse tensors")
    forward, modules, inputs, (error, match) = BAD[name]
    model, X = Net(forward, **modules()).to(device), inputs(device)
    with pytest.raises(error, match=match):
        layer_ios(model, MSELoss(), X, torch.randn(len(X), C, device=device))


GOT = {
    "a bias in a function": "torch.nn.functional.linear, torch.Tensor.add",
    "a weight times something": "torch.nn.functional.linear, torch.Tensor.mul",
    "a recurrent cell": "torch.nn.functional.linear, torch.rnn_tanh_cell",
    "a recurrent kernel": "torch.rnn_tanh, torch.nn.functional.linear",
    "a mask in an attention": (
        "torch.nn.functional.linear, torch.nn.functional.scaled_dot_product_attention"
    ),
    "a scripted function": "torch.nn.functional.linear",  # no mode sees the other
    "sums of words": "torch.nn.functional.embedding, torch.nn.functional.embedding_bag",
    "a bilinear form": "torch.nn.functional.linear, torch.nn.functional.bilinear",
    "a bias as slopes": "torch.nn.functional.linear, torch.nn.functional.prelu",
    "a penalty in the output": "torch.nn.functional.linear, torch.Tensor.square",
    "a gradient hook": "torch.nn.functional.linear",
}


@pytest.mark.parametrize("name", GOT)
def test_the_functions_that_got_an_unexplained_parameter_are_named(name, device):
    forward, modules, inputs, _ = BAD[name]
    model, X = Net(forward, **modules()).to(device), inputs(device)
    before = state(model, device)
    with pytest.raises(NotImplementedError) as caught:
        plan(model, X)
    found = str(caught.value).rpartition("Functions that got it: ")[2].rstrip(".")
    assert set(found.split(", ")) == set(GOT[name].split(", "))
    assert state(model, device) == before


def test_a_use_behind_a_closed_gate_is_seen_if_it_is_open_for_a_datum_that_is_tried(device):
    """What capture cannot see: the second of the tried data is the last one."""

    def gated(m, x):
        return m.b(m.a(x).tanh()) + relu(x[:, :1]) * m.a.weight.sum()

    model, X = Net(gated, **two()).to(device), -vectors(device).abs()
    check_exact(model, X, device)  # closed for all
    X[-1] *= -1
    with pytest.raises(NotImplementedError, match=r"'a\.weight' is not"):
        plan(model, X)


def test_an_input_without_tensors_is_refused():
    model = Net(lambda m, x: m.b(m.a(torch.tensor(x.numbers))), **two())

    class Opaque:
        numbers = torch.randn(N, D).tolist()

    with pytest.raises(ValueError, match="Opaque without a tensor"):
        layer_ios(model, MSELoss(), Opaque(), torch.randn(N, C))


# ---- plans -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_with_a_plan_everything_is_as_without(name, device):
    forward, modules, inputs = EXACT[name]
    model, X = Net(forward, **modules()).to(device), inputs(device)
    data = model, MSELoss(), X, torch.randn(len(X), C, device=device)
    kept = Plans()
    for given in (plan(model, X), kept, kept):
        for flavour in (EXPAND, REDUCE):
            without = layer_ios(*data, flavour=flavour)
            for block, io in layer_ios(*data, flavour=flavour, plan=given).items():
                assert torch.equal(io.g, without[block].g)
                assert torch.equal(io.a + 0, without[block].a + 0)
    assert len(kept) == 1


@pytest.mark.parametrize("name", ["positions first in one axis", "data first in one axis"])
def test_a_plan_holds_for_other_numbers_of_data_and_positions(name, device):
    model = Net(EXACT[name][0], **two()).to(device)
    found = plan(model, sequences(device, 4, 3))
    for n, s in ((7, 5), (1, 2), (3, 1), (2, 3)):
        data = model, MSELoss(), sequences(device, n, s), torch.randn(n, C, device=device)
        exact = diagonal_blocks(model, ggn(*data))
        for block, io in layer_ios(*data, plan=found).items():
            check_equal(io.block(), exact[block])


@pytest.mark.parametrize(
    "tried",
    [
        lambda device: sequences(device, N, 1),
        lambda device: torch.ones(1, S, D, device=device),
        lambda device: torch.ones(2, S, D, device=device),
    ],
    ids=["one position", "one datum", "equal rows"],
)
def test_a_plan_that_cannot_know_the_order_is_refused_where_it_matters(tried, device):
    model = Net(EXACT["positions first, one of them read"][0], **two()).to(device)
    if tried(device).shape[1] == 1:
        model.way = EXACT["positions first in one axis"][0]
    found = plan(model, tried(device))
    X, y = sequences(device), torch.randn(N, C, device=device)
    with pytest.raises(ValueError, match=r"'a'.*order that cannot be told.*plan\(model, X\)"):
        layer_ios(model, MSELoss(), X, y, plan=found)
    layer_ios(model, MSELoss(), X, y, plan=plan(model, X))


def test_a_plan_of_another_model_is_refused(device):
    found = plan(Net(recurrent, **two(b=Linear(D, D)), c=Linear(D, C)), torch.randn(N, S, D))
    model = Net(EXACT["recurrent"][0], **two(b=Linear(D, D)), c=Linear(D, C)).to(device)
    X, y = sequences(device, N, S + 1), torch.randn(N, C, device=device)
    with pytest.raises(ValueError, match=r"'a'.*called otherwise \(4 times\).*plan\(model, X\)"):
        layer_ios(model, MSELoss(), X, y, plan=found)


@pytest.fixture
def made(monkeypatch):
    """The plans that are made, counted."""
    count, original = [], plans.plan_of_groups

    def counting(model, X, groups):
        count.append(X)
        return original(model, X, groups)

    monkeypatch.setattr(plans, "plan_of_groups", counting)
    return count


def test_a_loop_over_a_loader_plans_once_for_every_kind_of_batch(made, device):
    model = Net(EXACT["positions first"][0], **two()).to(device)
    batches = [
        (sequences(device, n, s), torch.randn(n, C, device=device))
        for n, s in ((4, 2), (4, 3), (3, 2), (1, 3), (4, 2))
    ]
    kfac_over(model, MSELoss(), batches)
    assert len(made) == 2


@pytest.mark.parametrize("controls", [[], [coarse_correction(type2, combine=additive)]])
def test_an_optimizer_plans_once_for_every_kind_of_batch(controls, made, device):
    model = Sequential(Linear(D, D), Dropout(0.5), Linear(D, C)).to(device)
    optimizer = KFAC(model, MSELoss(), damping=1.0, controls=controls, factor_every=1)
    for _ in range(3):
        for n in (4, 3):
            X, y = torch.randn(n, D, device=device), torch.randn(n, C, device=device)
            optimizer.zero_grad()
            MSELoss()(model(X), y).backward()
            optimizer.observe(X, y)
            optimizer.step()
    assert len(made) == 1 + len(controls)
    model[1].eval()  # another kind
    optimizer.observe(X, y)
    assert len(made) == 2 + len(controls)


# ---- leaves nothing behind ---------------------------------------------------------------------


def state(model, device):
    return (
        torch.get_rng_state().tolist(),
        [b.tolist() for b in model.buffers()],
        [id(b) for b in model.buffers()],
        [p.grad for p in model.parameters()],
        [p.requires_grad for p in model.parameters()],
        [len(m._forward_hooks) for m in model.modules()],
        [m.training for m in model.modules()],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device.type),
        torch._C._len_torch_function_stack(),
    )


class Interrupts(Module):
    """An interrupt from the keyboard, in a certain forward pass or in the backward pass behind it.

    Attributes:
        at: The number of the forward pass, with a minus for the backward pass behind it.
    """

    def __init__(self):
        super().__init__()
        self.passes, self.at = 0, None
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        self.mean = self.mean + x.detach().mean()
        if self.passes == self.at:
            raise KeyboardInterrupt
        if self.at == -self.passes:
            x.register_hook(self._interrupt)
        return x

    def _interrupt(self, _):
        raise KeyboardInterrupt


def interrupted(at, device):
    """A model with buffers and randomness that is interrupted, and its probe."""
    if at is not None and at < 0 and device.type != "cpu":
        pytest.skip("autograd has a thread of its own there, which no interrupt reaches")
    probe = Interrupts()
    model = Sequential(spectral_norm(Linear(D, D)), Dropout(0.5), Linear(D, D), probe, Linear(D, C))
    probe.at = at
    return model.to(device), probe


@pytest.mark.parametrize("at", [None, 1, 2, 3, -3])
@pytest.mark.filterwarnings("ignore:No block covers")
def test_a_plan_leaves_nothing_behind(at, device):
    model, _ = interrupted(at, device)
    X, before = vectors(device), state(model, device)
    if at is None:
        plan(model, X)
    else:
        with pytest.raises(KeyboardInterrupt):
            plan(model, X)
    assert state(model, device) == before
    assert X.grad is None
    assert not X.requires_grad


IN_PHASE = {"forward": 1, "trial": 4, "trial, backward": -4, "vectors": None, "backward": -1}


@pytest.mark.parametrize("phase", IN_PHASE)
@pytest.mark.filterwarnings("ignore:No block covers")
def test_an_interrupt_in_any_phase_of_capture_leaves_nothing_behind(phase, device):
    """Buffers and sources of randomness are as the batch's own forward pass leaves them."""
    model, probe = interrupted(IN_PHASE[phase], device)
    X, y = vectors(device), torch.randint(C, (N,), device=device)
    before, source = state(model, device), torch.get_rng_state()

    def fisher(loss, f, y):
        if phase == "vectors":
            raise KeyboardInterrupt
        return type2(loss, f, y)

    twin = deepcopy(model)
    twin[3].at = None
    twin(X)
    expected = state(twin, device)[:2]
    torch.set_rng_state(source)
    with pytest.raises(KeyboardInterrupt):
        layer_ios(model, CrossEntropyLoss(), X, y, fisher)
    after = state(model, device)
    if phase != "forward":
        assert after[:2] == expected
    assert after[3:] == before[3:]
    assert probe.passes == {"forward": 1}.get(phase, 4)
    assert X.grad is None
    assert not X.requires_grad


def test_a_plan_draws_nothing(device):
    model = Sequential(Linear(D, D), Dropout(0.5), Linear(D, C)).to(device)
    X, y = vectors(device), torch.randint(C, (N,), device=device)
    found, ios = plan(model, X), []
    for given in (None, found):
        torch.manual_seed(3)
        ios.append(layer_ios(model, CrossEntropyLoss(), X, y, monte_carlo(1), plan=given))
    for name in ios[0]:
        assert torch.equal(ios[0][name].g, ios[1][name].g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_is_no_unexplained_gradient(dtype, device):
    """A tolerance that is relative to the gradient would refuse the key's bias."""
    forward, modules, _ = EXACT["attention with a key bias that a softmax ignores"]
    model = Net(forward, **modules()).to(device, dtype)
    plan(model, sequences(device).to(dtype))
    if dtype != torch.float16:
        with torch.autocast(device.type, torch.bfloat16):
            plan(model.float(), sequences(device).float())


@pytest.mark.filterwarnings("ignore:No block covers")
def test_a_transformer_under_autocast_is_accepted(device, monkeypatch):
    """Both sides of the check are compared in the precision of the parameters."""
    encoder = nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0, batch_first=True)
    model = Net(lambda m, x: m.b(m.a(x).mean(1)), a=encoder, b=Linear(D, C)).to(device).float()
    X, under, original = sequences(device).float(), [], plans.check_sums

    def check_sums(*arguments):
        under.append(torch.is_autocast_enabled(device.type))
        original(*arguments)

    monkeypatch.setattr(plans, "check_sums", check_sums)
    with torch.autocast(device.type, torch.bfloat16):
        assert model(X).dtype == torch.bfloat16
        plan(model, X)
    assert len(under) == len(layer_groups(model))
    assert not any(under)


@pytest.mark.parametrize("kind", [Conv1d, Conv2d])
def test_circular_padding_and_groups_are_explained(kind, device):
    space = (5,) if kind is Conv1d else (5, 3)
    conv = kind(4, 6, 3, padding=1, padding_mode="circular", groups=2)
    model = Sequential(conv, Tanh(), Flatten(), Linear(6 * prod(space), C)).to(device)
    check_exact(model, torch.randn(N, 4, *space, device=device), device)
