"""Random networks: every one is exact or refused, and those without a spoiler are exact.

A network is a list of operations on states `[N, S, D]`, between a first layer, a way to read the
last state, and a head. Spoilers let data meet each other, use parameters where no rule sees them,
or change gradients.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import (
    Conv1d,
    ConvTranspose1d,
    Embedding,
    InstanceNorm1d,
    LayerNorm,
    Linear,
    Module,
    ModuleDict,
    MSELoss,
    MultiheadAttention,
    RMSNorm,
    TransformerEncoderLayer,
)
from torch.nn.functional import layer_norm, linear, relu_
from torch.utils.checkpoint import checkpoint

from kfac_scratch import layer_ios
from kfac_scratch.capture.layer_groups import parameters_of
from kfac_scratch.curvature import diagonal_blocks

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:No block covers")]

N, S, D, C, WORDS = 4, 4, 3, 2, 5  # N = S, so that no size tells data from positions
LAYERS = {
    "linear": lambda: Linear(D, D),
    "linear without bias": lambda: Linear(D, D, bias=False),
    "conv": lambda: Conv1d(D, D, 3, padding=1),
    "dilated conv": lambda: Conv1d(D, D, 2, padding="same", dilation=2, padding_mode="circular"),
    "grouped conv": lambda: Conv1d(D, D, 3, padding=1, groups=D, bias=False),
    "transposed conv": lambda: ConvTranspose1d(D, D, 3, padding=1),
}
NORMS = {
    "layer norm": lambda: LayerNorm(D),
    "layer norm without shift": lambda: LayerNorm(D, bias=False),
    "norm of states": lambda: LayerNorm((S, D)),
    "root mean square": lambda: RMSNorm(D),
    "instance norm": lambda: InstanceNorm1d(S, affine=True),
}
ATTENTIONS = {
    "multihead attention": lambda: MultiheadAttention(D, 1, batch_first=True),
    "attention, positions first": lambda: MultiheadAttention(D, D, bias=False),
    "attention to other sizes": lambda: MultiheadAttention(D, 1, kdim=2, vdim=1),
    "encoder layer": lambda: TransformerEncoderLayer(D, 1, 2, dropout=0.0, batch_first=True),
}


def attended(layer, h):
    """An attention to the state, or to parts of it."""
    if isinstance(layer, TransformerEncoderLayer):
        return layer(h)
    if layer.batch_first:
        return layer(h, h, h)[0]
    q, k, v = h.transpose(0, 1), h[:, 1:].transpose(0, 1), h[:, 1:].sin().transpose(0, 1)
    return layer(q, k[..., : layer.kdim], v[..., : layer.vdim])[0].transpose(0, 1)


def on_positions_first(layer, h):
    return layer(h.transpose(0, 1)).transpose(0, 1)


def on_positions_first_in_one_axis(layer, h):
    rows = layer(h.transpose(0, 1).flatten(0, 1))
    return rows.unflatten(0, (h.shape[1], len(h))).transpose(0, 1)


def on_data_first_in_one_axis(layer, h):
    return layer(h.flatten(0, 1)).unflatten(0, (len(h), h.shape[1]))


def on_some_positions(layer, h):
    return torch.cat([layer(h[:, :2]), h[:, 2:]], 1)


def without_gradient(layer, h):
    with torch.no_grad():
        z = layer(h)
    return z + 0 * h


def by_matmul(layer, h):
    z = h @ layer.weight.T
    return z if layer.bias is None else layer.bias + z


def by_addmm(layer, h):
    """As some language models write a linear layer."""
    if layer.bias is None:
        return torch.mm(h.flatten(0, 1), layer.weight.T).view_as(h)
    return torch.addmm(layer.bias, h.flatten(0, 1), layer.weight.T).view_as(h)


def by_einsum(layer, h):
    z = torch.einsum("nsi,oi->nso", h, layer.weight)
    return z if layer.bias is None else z + layer.bias


def by_rows(layer, h):
    """The first row of the weight, and the others."""
    biases = [None, None] if layer.bias is None else layer.bias.split([1, D - 1])
    pairs = zip(layer.weight.split([1, D - 1]), biases, strict=True)
    return torch.cat([linear(h, w, b) for w, b in pairs], -1)


WAYS = {  # to call a linear layer
    "batch first": lambda layer, h: layer(h),
    "positions first": on_positions_first,
    "positions first in one axis": on_positions_first_in_one_axis,
    "data first in one axis": on_data_first_in_one_axis,
    "some positions": on_some_positions,
    "twice": lambda layer, h: layer(layer(h).tanh()),
    "checkpoint": lambda layer, h: layer(h.detach()) + h,
    "no gradient": without_gradient,
    "function": lambda layer, h: linear(layer(h), layer.weight),
    "matmul": by_matmul,
    "matmul of the other": lambda layer, h: h @ layer.weight.mT + layer(h),
    "addmm": by_addmm,
    "einsum": by_einsum,
    "rows": by_rows,
    "from the left": lambda layer, h: (layer.weight @ h.mT).mT + layer(h),
}
PLAIN = {  # without parameters
    "tanh": torch.tanh,
    "sin": torch.sin,
    "relu in place": lambda h: relu_(h.clone()),
    "square": lambda h: h.square() / 2,
    "norm": lambda h: layer_norm(h, (D,)),
    "attention": lambda h: (h @ h.mT).softmax(-1) @ h,
    "causal": lambda h: h.cumsum(1) / 2,
    "next position": lambda h: h.roll(1, 1),
    "mask": lambda h: h * torch.tensor([1.0, 0.0, 1.0, 1.0], device=h.device).unsqueeze(-1),
    "one position": lambda h: h[:, 1:2].expand_as(h),
    "detached centre": lambda h: h - h.mean(0).detach(),
    "detached": lambda h: h.detach() + h.sin(),
}
MEETING = {  # of data
    "centre": lambda h: h - h.mean(0),
    "next datum": lambda h: h + h.roll(1, 0),
    "attention over data": lambda h: (h.flatten(1) @ h.flatten(1).T).softmax(-1) @ h.flatten(1),
    "earlier data": lambda h: h.cumsum(0),
    "sorted": lambda h: h.sort(0).values,
    "transposed": lambda h: h + h.mean(1).cumsum(0).unsqueeze(1),
    "scaled": lambda h: h / (1 + h.abs().amax()),
}


def slope(layer, h):
    """The derivative of a layer's output, which is a second use of its weight."""
    inside = h.detach().requires_grad_()
    return torch.autograd.grad(layer(inside).tanh().sum(), inside, create_graph=True)[0]


USES = {  # of a layer's weight that no rule explains
    "penalty": lambda layer, h: layer(h) + layer.weight.square().sum() / 9,
    "slope": slope,
    "reentrant": lambda layer, h: checkpoint(layer, h, use_reentrant=True),
    "hook": lambda layer, h: _hooked(layer)(h),
}


def _hooked(layer):
    if not layer.weight._backward_hooks:
        layer.weight.register_hook(lambda g: 2 * g)
    return layer


FIRST = ("numbers", "words", "words that the head has, too")
READ = {
    "mean": lambda h: h.mean(1),
    "first": lambda h: h[:, 0],
    "last": lambda h: h[:, -1],
    "flat": lambda h: h.flatten(1),
}

norm = st.tuples(st.just("norm"), st.sampled_from(sorted(NORMS)), st.booleans())
attention = st.tuples(st.just("attention"), st.sampled_from(sorted(ATTENTIONS)), st.booleans())
layer_step = st.tuples(
    st.just("layer"), st.sampled_from(sorted(LAYERS)), st.sampled_from(sorted(WAYS))
)
again = st.tuples(st.just("again"), st.integers(0, 3), st.sampled_from(sorted(WAYS)))
plain = st.tuples(st.just("plain"), st.sampled_from(sorted(PLAIN)), st.booleans())
meeting = st.tuples(st.just("meeting"), st.sampled_from(sorted(MEETING)), st.booleans())
use = st.tuples(st.just("use"), st.integers(0, 3), st.sampled_from(sorted(USES)))


def networks(*steps):
    return st.tuples(
        st.sampled_from(FIRST),
        st.lists(st.one_of(steps), max_size=6),
        st.sampled_from(sorted(READ)),
    )


GOOD = networks(layer_step, again, plain, attention, norm)
ANY = networks(layer_step, again, plain, attention, norm, meeting, use)


class Network(Module):
    """What a list of operations says."""

    def __init__(self, first, steps, read):
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.read = steps, READ[read]
        tied = first == FIRST[2] and read != "flat"
        first = Linear(2, D) if first == FIRST[0] else Embedding(WORDS, D)
        kinds = LAYERS | ATTENTIONS | NORMS
        made = {str(i): kinds[what]() for i, (_, what, _) in enumerate(steps) if what in kinds}
        head = Linear(S * D if read == "flat" else D, WORDS if tied else C)
        if tied:
            head.weight = first.weight
        self.layers = ModuleDict({"first": first, **made, "head": head})
        self.linear = [m for m in made.values() if isinstance(m, Linear)]

    def forward(self, x):
        h = self.layers["first"](x)
        for i, (kind, what, how) in enumerate(self.steps):
            if kind == "layer":
                h = self._applied(self.layers[str(i)], WAYS[how], h)
            elif kind == "norm":
                h = self.layers[str(i)](h * 2 if how else h)
            elif kind == "attention":
                h = attended(self.layers[str(i)], h) + h * how
            elif kind == "again" and self.linear:
                h = self._applied(self.linear[what % len(self.linear)], WAYS[how], h)
            elif kind == "use" and self.linear:
                h = USES[how](self.linear[what % len(self.linear)], h)
            elif kind in ("plain", "meeting"):
                new = (PLAIN | MEETING)[what](h)
                h = (new.reshape_as(h) + h) / 2 if how else new.reshape_as(h)
        return self.layers["head"](self.read(h))

    def _applied(self, layer, way, h):
        if isinstance(layer, Conv1d | ConvTranspose1d):
            return layer(h.mT).mT
        return way(layer, h)


def ggn_by_plain_autodiff(model, X):
    """Of the mean squared error, by one reverse pass for each output: nothing is transformed."""
    parameters, f = list(model.parameters()), model(X).flatten()
    rows = [
        torch.autograd.grad(
            entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for entry in f
    ]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    return 2 / len(f) * J.T @ J


def is_refused(network):
    """Whether a network is refused; if not, its blocks are exact."""
    model = Network(*network)
    X = torch.randn(N, S, 2) if network[0] == FIRST[0] else torch.randint(WORDS, (N, S))
    data = model, MSELoss(), X, torch.randn(N, model.layers["head"].out_features)
    names = [name for name, module in model.named_modules() if parameters_of(module)]
    try:
        ios = layer_ios(*data, layers=names)
    except (ValueError, NotImplementedError):
        return True
    whole = ggn_by_plain_autodiff(model, X)
    for name, block in diagonal_blocks(model, whole, names).items():
        assert (ios[name].block() - block).abs().max() <= 1e-10 * whole.abs().max(), name
    return False


def checked(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@checked(50)
@given(GOOD)
def test_networks_of_what_is_covered_are_exact(network):
    assert not is_refused(network)


@checked(50)
@given(ANY)
def test_spoiled_networks_are_exact_or_refused(network):
    is_refused(network)


@pytest.mark.slow
@checked(1000)
@given(GOOD)
def test_many_networks_of_what_is_covered_are_exact(network):
    assert not is_refused(network)


@pytest.mark.slow
@checked(1000)
@given(ANY)
def test_many_spoiled_networks_are_exact_or_refused(network):
    is_refused(network)


@pytest.mark.parametrize("kind", ["meeting", "use"])
def test_every_spoiler_alone_is_refused(kind):
    """So that the generator does not pass because its spoilers do nothing."""
    layer = ("layer", "linear", "batch first")
    for how in MEETING if kind == "meeting" else USES:
        spoiler = (kind, how, False) if kind == "meeting" else (kind, 0, how)
        assert is_refused((FIRST[0], [layer, ("plain", "tanh", False), spoiler], "mean")), how
