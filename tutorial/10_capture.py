# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 10. Capture: how a program finds a and g
#
# **Part III: KFAC.** How does a program find the inputs $a$ and the vectors $g$ of every weight in a network that
# somebody else wrote, and how can it check that none is missing?
#
# [Chapter 4](04_layer_io.py) makes the block of a layer, its part of the GGN, from the layer's input $a$ and the
# vectors $g$ that arrive at the layer's output when vectors are sent back from the network's outputs. Forward hooks
# record $a$ and the output, with respect to which $g$ is the derivative. Hooks are enough if every weight is used by
# calling its layer. PyTorch's attention uses the weight of a layer and never calls the layer. This chapter records
# calls of *functions* instead of layers, and checks the record. Let $f$ be the network's outputs, $v$ a random vector,
# and $g_c$ the derivative of $v^\top f$ with respect to the output of call $c$. If no use of the weight $W$ is missing,
# the recorded calls explain its gradient:
#
# $$
# \frac{\partial (v^\top f)}{\partial W} = \sum_c g_c a_c^\top .
# $$
#
# *Capture* means to run a network on a batch, to record every $a$, and to send vectors back from the outputs for every
# $g$.

# %%
import textwrap
import warnings

import matplotlib.pyplot as plt
import torch
from matplotlib.lines import Line2D
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, resolve_name

from kfac_scratch import curvature
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture import calls, functions, plan
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.capture.layer_groups import layer_groups, uncovered
from kfac_scratch.checks import assert_exact, largest_error, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import type2
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one


EXACT = 1e-10  # what we call equal in float64

# %% tags=["hide-input"] alt="A dot plot with the trace of each of the 14 blocks of a transformer with two layers, on a logarithmic axis. Blocks of feed-forward layers, embedding and head are marked as seen by a hook. Queries, keys, values and output projections, eight blocks with smaller traces, are marked as blocks for which no hook runs." caption="The trace of every block of the GGN, for a transformer of PyTorch's modules, found by capture. For the four matrices of each attention, no forward hook on a layer runs."
torch.manual_seed(0)
encoder = nn.TransformerEncoderLayer(16, nhead=2, dim_feedforward=32, batch_first=True)
stack = nn.TransformerEncoder(encoder, num_layers=2)
first = nn.Sequential(nn.Embedding(12, 16), stack, nn.Flatten(), nn.Linear(5 * 16, 4)).eval()
words, classes = torch.randint(12, (6, 5)), torch.randint(4, (6,))
ran: set[str] = set()
for name, m in first.named_modules():
    if isinstance(m, nn.Linear | nn.Embedding):
        m.register_forward_hook(lambda m, inputs, z, name=name: ran.add(name))
with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # normalisations have no block
    ios = layer_ios(first, nn.CrossEntropyLoss(), words, classes)
traces = {name: io.block().trace().item() for name, io in ios.items()}
sizes = {name: len(io.block()) for name, io in ios.items()}
by_size, by_trace = (
    sum(of[name] for name in traces.keys() - ran) / sum(of.values()) for of in (sizes, traces)
)
print(f"no hook runs for {len(traces.keys() - ran)} of {len(traces)} blocks:", end=" ")
print(f"{by_size:.0%} of their parameters, {by_trace:.0%} of their trace")
assert traces.keys() - ran == {name for name in traces if "_proj" in name}
assert by_size > 0.4

fig, ax = plt.subplots(figsize=(6.8, 3.6), layout="constrained")
for y, (name, trace) in enumerate(traces.items()):
    ax.semilogx(trace, y, "o" if name in ran else "s", color="C0" if name in ran else "C1")
short = {"0": "embedding", "3": "head"}
shown = [short.get(n, n.replace("1.layers.", "").replace("self_attn.", "")) for n in traces]
ax.set_yticks(range(len(traces)), shown, fontsize="small")
ax.invert_yaxis()
ax.grid(axis="y", alpha=0.3)
ax.set_xlabel("trace of the block")
marks = (("o", "C0", "a hook runs"), ("s", "C1", "no hook runs"))
kinds = [Line2D([], [], marker=m, color=c, linestyle="", label=label) for m, c, label in marks]
ax.legend(handles=kinds, fontsize="small")
plt.show()
_ = torch.manual_seed(0)

# %% [markdown]
# After this chapter you will be able to
#
# - record the inputs and vectors of every use of a weight, whatever function uses it;
# - check a record: no derivative may pass from one datum to another, and the recorded calls must explain the
#   gradient;
# - say for which networks capture raises an error and why, and which mistakes its checks cannot find.
#
# ## Why hooks are not enough
#
# A forward hook belongs to a module. PyTorch calls it after the module's `forward`, with the module's
# input and output. The following program has one hook for every linear layer, as in Chapter 4. It accepts inputs with
# positions, too: all axes between the first and the last are joined to one axis of positions. `type2` gives the
# vectors $\sigma_{vn}$ of Chapter 4, a square root of the loss's Hessian, which are sent back all at once.


# %%
def with_ones(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1)  # the bias column


def by_hooks(model, loss, X, y) -> dict[str, LayerIO]:
    ran = {}

    def record(layer, inputs, output):
        ran[layer] = inputs[0].detach(), output
        return output.clone()

    linear = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [layer.register_forward_hook(record) for layer in linear]
    f = model(X)
    for hook in hooks:
        hook.remove()

    outputs = [z for _, z in ran.values()]
    gs = torch.autograd.grad(f, outputs, type2(loss, f, y)[:], is_grads_batched=True)
    rows = [with_ones(a.flatten(1, -2) if a.ndim > 2 else a[:, None]) for a, _ in ran.values()]
    return {
        linear[layer]: LayerIO(a, g.reshape(len(g), len(X), -1, g.shape[-1]))
        for layer, a, g in zip(ran, rows, gs, strict=True)
    }


def errors(ios: dict[str, LayerIO], model, loss, X, y) -> dict[str, float]:
    """How far every block is from the exact one, by plain autodiff."""
    exact = curvature.diagonal_blocks(model, curvature.ggn(model, loss, X, y))
    return {name: largest_error(io.block(), exact[name]) for name, io in ios.items()}


# %% [markdown]
# Three networks follow. In the first, the weight of a layer is used a second time, by a function. In the
# second, a hook of other code doubles the output of a layer. That hook was registered before ours and runs
# before ours, so our hook records $2 W a$ as $z$. In the third, an attention module reads the input, and a
# linear layer, the head, reads the attention's output.


# %% tags=["hide-input"] fold="Two kinds of networks"
class Uses(nn.Module):
    """Two layers, and something between them."""

    def __init__(self, between):
        super().__init__()
        self.layer, self.head, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between

    def forward(self, x):
        return self.head(self.between(self.layer, x).tanh())


class Attends(nn.Module):
    """Attention, whose module has positions on axis 0 and data on axis 1."""

    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 3)

    def forward(self, x):  # [N, S, 4]
        x = x.transpose(0, 1)
        h = x.sin()
        return self.head(self.attention(x, h, h)[0]).mean(0)


# %% [markdown]
# For the first two, the blocks by hooks are compared with the exact ones of [Chapter 2](02_curvature.py). For
# the third, the cell counts the calls of `out_proj`, a linear layer inside the attention.

# %% tags=["hide-input"] fold="Checked: hooks give two wrong blocks, and none for the attention"
N, S = 5, 3
X, sequences, y = torch.randn(N, 4), torch.randn(N, S, 4), torch.randn(N, 3)
loss = nn.MSELoss()
twice = Uses(lambda layer, x: layer(x) + functional.linear(x.sin(), layer.weight))
hooked = Uses(lambda layer, x: layer(x))
hooked.layer.register_forward_hook(lambda layer, inputs, z: 2 * z)
attends = Attends()

for name, net in (("a weight used twice", twice), ("a hook of other code", hooked)):
    found = errors(by_hooks(net, loss, X, y), net, loss, X, y)
    print(f"{name:>24}: block of the layer off by {found['layer']:.2f}")
    assert found["layer"] > 0.1
    assert found["head"] <= EXACT

seen = []
hook = attends.attention.out_proj.register_forward_hook(lambda *_: seen.append("ran"))
loss(attends(sequences), y).backward()
hook.remove()
gradient = attends.attention.out_proj.weight.grad.norm()
print(
    f"{'attention':>24}: out_proj has a gradient of norm {gradient:.3f} and ran {len(seen)} times"
)
assert gradient > 0
assert seen == []

# %% [markdown]
# Hooks give two wrong blocks without a warning. For the output projection of the attention they give nothing,
# although its weight has a gradient ([a public
# example](https://github.com/gpauloski/kfac-pytorch/issues/267)). The projections to queries, keys and values
# are not even layers: their weights are rows of one parameter, `in_proj_weight`.

# %% [markdown]
# ## Functions instead of modules
#
# Every layer computes by calling a function, `nn.Linear` by `functional.linear`. Code without layers calls
# the same functions. PyTorch lets a program intercept them: whenever a function is called on tensors, a
# `TorchFunctionMode` gets the function and its arguments, and returns the result for the caller.


# %%
class Names(TorchFunctionMode):
    """Write down the name of every function."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(resolve_name(func))
        return func(*args, **(kwargs or {}))


for net in (twice, hooked):
    with Names() as mode:
        net(X)
    print(*(name.removeprefix("torch.") for name in mode.names))
    assert mode.names.count("torch.nn.functional.linear") == (3 if net is twice else 2)

# %% [markdown]
# The second use of the weight is in the list. The doubling by the other hook is in the list, too, as
# `Tensor.mul` behind the layer's `linear`. A recorder needs three things from every call:
#
# - *The input* is the first argument of `functional.linear`. If a third argument, the bias, is given, the row
#   ends with a one. Otherwise it ends with a zero, because this call does not use the bias.
# - *The weight* is the second argument: a parameter, or a view of one. A view has the tensor that it was taken from as
#   `_base`, and its first entry's place there as `storage_offset()`. Parameter and place determine which rows a
#   function used, if it used whole rows.
# - *The place to ask for derivatives* is the output's edge in the graph of autograd. An edge is an
#   operation in this graph and the number of one of its outputs; `get_gradient_edge` returns it. It stays the
#   same if the tensor is overwritten later. An output that is a view is copied first; the next section
#   explains why.


# %%
def copy_of_view(z: Tensor) -> Tensor:
    return z.clone() if z._is_view() else z


class Recorder(TorchFunctionMode):
    """Record every functional.linear: parameter and rows of the weight, input, edge of the output."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        z = func(*args, **(kwargs or {}))
        if func is not functional.linear:
            return z
        z = copy_of_view(z)
        x, weight, *bias = args
        ones = torch.full_like(x[..., :1], float(bias != [] and bias[0] is not None))
        parameter = weight if weight._base is None else weight._base
        first = weight.storage_offset() // weight.shape[1]
        rows = range(first, first + len(weight))
        a = torch.cat([x, ones], dim=-1).detach()  # without a bias, the last column is zero
        self.calls.append((parameter, rows, a, get_gradient_edge(z)))
        return z


# %% [markdown]
# The recorder has calls only, without the model's names. So `matrices_of` lists the matrices $W$ of the model: for each
# its name, the parameter that holds it, and its rows there. Then `by_functions` brings matrices and calls together. A
# call that uses the rows of several matrices counts for each of them, with the entries of $g$ that belong to its rows.
# Inside attention, the axis of the positions comes before the axis of the data. If `positions_first` is true,
# `by_functions` puts the data first. Both networks without attention get their exact blocks:


# %%
def matrices_of(model):
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear):
            yield name, m.weight, range(len(m.weight))
        if isinstance(m, nn.MultiheadAttention):
            for i, x in enumerate("qkv"):
                rows = range(i * m.embed_dim, (i + 1) * m.embed_dim)
                yield f"{name}.{x}_proj", m.in_proj_weight, rows


def by_functions(model, loss, X, y, recorder, positions_first=False) -> dict[str, LayerIO]:
    def by_sample(t):  # [..., d] -> [N, S, d]
        if positions_first:
            return t.reshape(-1, len(X), t.shape[-1]).transpose(0, 1)
        return t.reshape(len(X), -1, t.shape[-1])

    with recorder:
        f = model(X)
    edges = [edge for *_, edge in recorder.calls]
    gs = torch.autograd.grad(f, edges, type2(loss, f, y)[:], is_grads_batched=True)
    ios = {}
    for name, parameter, rows in matrices_of(model):
        a, g = [], []
        for (used, those, x, _), vectors in zip(recorder.calls, gs, strict=True):
            if used is parameter and those.start <= rows.start and rows.stop <= those.stop:
                part = vectors[..., rows.start - those.start : rows.stop - those.start]
                a.append(by_sample(x))
                g.append(torch.stack([by_sample(v) for v in part]))
        if a:
            ios[name] = LayerIO(torch.cat(a, 1), torch.cat(g, 2))
    return ios


for name, net in (("a weight used twice", twice), ("a hook of other code", hooked)):
    found = errors(by_functions(net, loss, X, y, Recorder()), net, loss, X, y)
    print(f"{name:>24}:", {block: f"{error:.0e}" for block, error in found.items()})
    assert found.keys() == {"layer", "head"}
    assert max(found.values()) <= EXACT

# %% [markdown]
# ### A view is copied
#
# The hook of [Chapter 4](04_layer_io.py) returns a copy of every output, because the next function may write
# into it. An edge makes most copies unnecessary: it is a place in the graph, and it stays the same place
# when the tensor gets new values. Views are the exception. With a bias, and a contiguous input with positions,
# `functional.linear` computes one large matrix product and returns a view of it. If a function writes into a view,
# autograd records the write at the tensor that the view was taken from, and takes the view from there anew. The
# view's old edge is then no longer on any path to the output. The cell asks for the derivative at the edge of $z$,
# with an activation in place behind it.


# %% tags=["hide-input"] fold="Checked: a derivative is lost exactly where the output is a view"
layer = nn.Linear(4, 6)


def derivative(x: Tensor, passed_on) -> Tensor | None:
    """The derivative at the recorded edge."""
    z = passed_on(layer(x))
    edge = get_gradient_edge(z)
    f = torch.relu_(z).sin().sum()
    return torch.autograd.grad(f, [edge], allow_unused=True)[0]


for kind, x in (("samples", X), ("samples and positions", sequences)):
    as_it_is, copied = derivative(x, lambda z: z), derivative(x, copy_of_view)
    is_view = layer(x)._is_view()
    print(f"{kind}: a view: {is_view}, derivative lost without a copy: {as_it_is is None}")
    z = layer(x).detach()
    assert_exact(copied, z.relu().cos() * (z > 0))
    assert is_view == (as_it_is is None) == (kind != "samples")

# %% [markdown]
# The package takes a missing derivative for zero, because an output may be unused. Without a copy, $g$ would be zero
# here, and the second check below would raise an error.
#
# A copy takes time. The derivative can also be asked for at the matrix product itself, `z._base`, which stays in the
# graph. If the view $z$ has all entries of the product, the derivative with respect to the product is the derivative
# with respect to $z$, in another shape:

# %% tags=["hide-input"] fold="Checked: the derivative at the product is the one at the view"
z = layer(sequences)
edge = get_gradient_edge(z._base)
f = torch.relu_(z).sin().sum()
(at_product,) = torch.autograd.grad(f, [edge])
print(f"output {tuple(z.shape)}, matrix product {tuple(at_product.shape)}")
assert_exact(at_product.view_as(z), derivative(sequences, copy_of_view))

# %% [markdown]
# The package asks for the derivative there. It copies only those views that have a part of the entries, or
# their axes in another order. The recorder of this chapter copies every view, because that is shorter.
#
# ### A function that hides others
#
# The recorder still has no calls from inside attention. PyTorch switches a mode off while the mode runs a function, or
# else the mode would get its own calls again. Most functions that get a weight call no other function, so nothing is
# missed. A few functions that are written in Python call others. Their first line asks whether a mode is on, and if so,
# gives the whole call to the mode. The mode is switched off while it runs the function again, so it does not see which
# other functions are called. One of these is `functional.multi_head_attention_forward`:

# %% tags=["hide-input"] fold="Checked: no call behind the attention is in the list"
with Names() as mode:
    attends(sequences)
names = [name.rpartition(".")[2] for name in mode.names]
attention = names.index("multi_head_attention_forward")
print(f"calls of linear: {names.count('linear')}, behind the attention: {names[attention + 1 :]}")
assert names.count("linear") == 1  # the head

# %% [markdown]
# The function calls `linear` for its projections, and none of these calls is in the list. It does not help if
# the mode switches itself on again and then runs the function: the first line gives the call to the mode, the
# mode runs the function, and so on without end.


# %% tags=["hide-input"] fold="Checked: a mode that is switched on again runs for ever"
class Forever(Recorder):
    """Switched on again while the function runs."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.multi_head_attention_forward:
            with self:
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


try:
    with Forever():
        attends(sequences)
except RecursionError as reason:
    print(f"RecursionError: {reason}")
else:
    raise AssertionError("this should have run for ever")

# %% [markdown]
# The package therefore *opens* the function: it makes a copy with the same code, in which the test for an active
# mode always returns false. The mode gets every call that the copy makes. This gives the exact blocks of all four
# projections. Nothing else in the recorder is special to attention.

# %% tags=["remove-input"]
code(functions.opened)


# %%
class Opening(Recorder):
    """Record what attention calls, too."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.multi_head_attention_forward:
            with self:
                return functions.opened(func)(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


recorder = Opening()
ios = by_functions(attends, loss, sequences, y, recorder, positions_first=True)
found = errors(ios, attends, loss, sequences, y)
for block, error in found.items():
    print(f"{block:>20}: {error:.0e}")
print(
    "rows of in_proj_weight by call:",
    [f"{r.start} to {r.stop - 1}" for _, r, *_ in recorder.calls][:2],
)
assert list(found) == [
    *(f"attention.{x}_proj" for x in ("q", "k", "v")),
    "attention.out_proj",
    "head",
]
assert max(found.values()) <= EXACT

# %% [markdown]
# Here the queries have an input of their own, and keys and values share one. So PyTorch calls `linear` with
# two parts of `in_proj_weight`, which are views of it: the rows of the queries, and the rows of keys and
# values. The second call computes two projections. Each of them still has a block of its own.

# %% [markdown]
# ## What ships
#
# The package has a recorder like this one, with more functions. For each there is a *rule*, which says what a
# function's arguments mean: the input, the weight as $W$, and the bias. A function whose weight may be
# either of two arguments has two rules. The cell below the source checks four rules against their functions.

# %% tags=["remove-input"]
code(functions._linear, functions._matmul, functions._matmul_from_left, functions._addmm)

# %% tags=["hide-input"] fold="Checked: four rules against their functions"
x, W, b = torch.randn(N, 4), torch.randn(6, 4), torch.randn(6)
for func, rule, arguments in (
    (functional.linear, functions._linear, (x, W, b)),
    (torch.matmul, functions._matmul, (x, W.T)),
    (torch.matmul, functions._matmul_from_left, (W, x.T)),
    (torch.addmm, functions._addmm, (b, x, W.T)),
):
    applied, z = rule(*arguments), func(*arguments)
    if applied.order is not None:
        z = z.permute(applied.order)  # outputs last
    rows = applied.x @ applied.W[0].T  # W[0]: one matrix, not several side by side
    assert_exact(rows if applied.bias is None else rows + applied.bias, z)

# %% [markdown]
# The other rules are for `einsum` of two operands, for convolutions, plain and transposed, for embeddings, also
# as `weight[t]`, and for normalisations ([all of them](api/capture.functions.md)). A convolution has its
# stride, padding and groups in the arguments of the function, so that one kernel may be used with several
# settings. A product without a bias may be followed by an addition, as in `x @ W.T + b`: a bias that is
# added to the output of the last recorded call of the same weight belongs to this call, if no other function came
# between.
#
# The recorder runs a function, tries its rules, and looks for the weight among the matrices $W$ of the model,
# `_matrices`. A function may use whole matrices: then its weight begins at the first entry of one of them, in the same
# parameter, and has the same strides. Or it may use some consecutive rows of one matrix: then `unused` has the numbers
# of rows before and after them, where the vectors get zeros.
#
# The outputs may be on another axis than the last, as in `W @ x`. Then `order` moves them to the last axis,
# and the result is moved back. A model from `torch.compile` runs its functions in one piece that no mode
# sees, so capture runs such a model without compilation.

# %% tags=["remove-input"]
code(calls.Recorder.__torch_function__, calls.Recorder._matrices, calls.Recorder._record)

# %% [markdown]
# A layer may be written in several ways. All give the same rows and vectors:

# %% tags=["hide-input"] fold="Checked: six spellings of a layer give the same a and g"
spellings = {
    "layer(x)": lambda layer, x: layer(x),
    "linear(x, W, b)": lambda layer, x: functional.linear(x, layer.weight, layer.bias),
    "x @ W.T + b": lambda layer, x: x @ layer.weight.T + layer.bias,
    "b + matmul(x, W.t())": lambda layer, x: layer.bias + torch.matmul(x, layer.weight.t()),
    "addmm(b, x, W.T)": lambda layer, x: torch.addmm(layer.bias, x, layer.weight.mT),
    "einsum(x, W) + b": lambda layer, x: torch.einsum("ni,oi->no", x, layer.weight) + layer.bias,
}
plain = Uses(spellings["layer(x)"])
expected = layer_ios(plain, loss, X, y)
for spelling, between in spellings.items():
    net = Uses(between)
    net.load_state_dict(plain.state_dict())
    for name, io in layer_ios(net, loss, X, y).items():
        assert_exact(io.a, expected[name].a)
        assert_exact(io.g, expected[name].g)
    print(f"{spelling:>20}: the same a and g")

# %% [markdown]
# The blocks of the three networks that hooks get wrong are exact. Four more networks are tried: one that
# writes into the views of its layer, one with a product from the left, one that looks up an embedding as
# `weight[t]`, and one that uses a kernel with two strides. The last lines compile a network and compare its
# rows and vectors with those of the network itself.


# %% tags=["hide-input"] fold="Checked: the blocks of seven networks, and a compiled one"
class LooksUp(nn.Module):
    """An embedding that is not called."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(12, 4), nn.Linear(4, 3)

    def forward(self, t):  # [N, S]
        return self.head(self.words.weight[t].tanh().mean(1))


class TwoStrides(nn.Module):
    """A convolution, and its kernel with another stride."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(3, 4, 2), nn.Linear(4, 3)

    def forward(self, x):  # [N, 3, positions]
        far = functional.conv1d(x, self.conv.weight, self.conv.bias, stride=2)
        return self.head(self.conv(x).tanh().mean(2) + far.tanh().mean(2))


left = Uses(lambda layer, x: layer(x) + (layer.weight @ x.sin().T).T)
in_place = Uses(lambda layer, x: layer(x).relu_())
networks = {
    "a weight used twice": (twice, X, y),
    "a hook of other code": (hooked, X, y),
    "attention": (attends, sequences, y),
    "an activation in place": (in_place, sequences, torch.randn(N, S, 3)),
    "a product from the left": (left, X, y),
    "rows by number": (LooksUp(), torch.randint(12, (N, S)), y),
    "two strides": (TwoStrides(), sequences, y),
}
for name, (net, *data) in networks.items():
    found = errors(layer_ios(net, loss, *data), net, loss, *data)
    print(f"{name:>24}: {len(found)} blocks, error {max(found.values()):.0e}")
    assert max(found.values()) <= EXACT

compiled = layer_ios(torch.compile(plain, backend="eager"), loss, X, y)
for io, by_plain in zip(compiled.values(), expected.values(), strict=True):
    assert_exact(io.a, by_plain.a)
    assert_exact(io.g, by_plain.g)

# %% [markdown]
# ## Two checks
#
# So far a program has found *some* uses of $W$, and two conditions have been taken for granted. First, [Theorem 4.1]
# assumes that data do not meet: $f_n$ has no derivative with respect to what a layer computes for another datum.
# Second, the gradient is $\sum_s g_s a_s^\top$, [(4.3)], only if the recorded calls are all uses of $W$. Neither
# condition can be read off a network's layers. Data may meet each other behind a layer, by a mean over the batch, say.
# A weight may be used by a function that has no rule. Then the network can be trained, capture without checks raises no
# error, and the block is wrong.
#
# The package therefore tries a network on a few of the data, after the forward pass of the batch and before any
# vector of the loss is sent. One trial serves all
# batches of one kind: with the same shapes and types of the inputs (the number of data may differ), the same
# modes of the modules, and the same trainable parameters.
#
# 1. *Data do not meet.* Data $n$ and $m$ meet if $f_n$ has a derivative with respect to a layer's output $z_{ms}$. The
#    package sends random vectors back from the network's outputs for a set of the data. At all data outside the set,
#    the $g$ of every layer must be zero, exactly: no path leads there, so no rounded number arises. This is done for a
#    few sets. For any two data there is a set with the first and without the second. What arrives from two data of a
#    set could cancel, but for random vectors the probability of that is zero.
# 2. *The calls explain the gradient.* The package sends a random vector $v$ to all outputs. For every
#    parameter, the gradient by plain autodiff must be the sum of $g a^\top$ over the recorded calls, up to
#    rounding. The tolerance is a bound on the terms of this sum times the square root of the machine
#    precision. It is not a share of the gradient, since a gradient may be zero, such as that of a bias whose
#    effect cancels.
#
# The first check also finds the axis of the data, which the package does not assume. The package runs the network on
# two and on three data, and takes the axis of $z$ whose size changes. If this axis also contains positions, the zeros
# tell whether the positions of one datum are neighbours on it or far apart. If the zeros leave several possibilities,
# the inputs of the two small runs decide.
#
# <div class="admonition theorem" markdown="1" id="thm-10.1">
# <p class="admonition-title" markdown="1"><b>Theorem 10.1 (the calls explain the gradient)</b></p>
#
# Let a network with weight $W$ be given at fixed parameters and inputs, with the outputs of all data in one
# vector $f$. Let $c$ number the rows of all recorded calls, $z_c = W a_c$, and let $g_c$ be the derivative of
# $v^\top f$ with respect to $z_c$. If
#
# $$
# \frac{\partial (v^\top f)}{\partial W} = \sum_c g_c a_c^\top
# \tag{10.1}
# $$
#
# holds for one $v$ that is drawn from a distribution with a density, it holds for all $v$, with
# probability one.
#
# </div>
#
# **Proof.** Both sides of [(10.1)] are linear in $v$: the left side by the rules of differentiation, the
# right side because every $g_c$ is, and the $a_c$ do not depend on $v$. So the difference of both sides is a
# linear function of $v$. If [(10.1)] fails for some $v$, the difference is zero on a proper subspace only. The drawn
# vector lies in that subspace with probability zero, so [(10.1)] fails for it, too. $\blacksquare$
#
# The difference of both sides tells what is missing. The derivative with respect to $W$ is a sum over all paths from
# $W$ to $f$ in the graph of the computation. The paths whose first step goes from $W$ to $z_c$ contribute
# $g_c a_c^\top$, because $g_c$ is the derivative along all paths from $z_c$ to $f$. If the recording is right, the
# difference is the contribution of all other paths, those through uses of $W$ that were not recorded.
#
# If [(10.1)] holds for all $v$, blocks are exact, for this reason. Take for $v$ one of the vectors of the loss,
# $\sigma_{vn}$, at the output of datum $n$, and zero at the others. If data do not meet, $g_c$ is zero at the rows of
# all data but $n$. So the sum in [(10.1)] is over the rows of datum $n$, and by [(10.1)] it is the gradient $G_{vn}$ of
# [Theorem 4.1]. This proves the blocks for the data that are tried. For the rest of the batch it is assumed.
#
# The proof uses only that $g_c$ is linear in $v$ and that $a_c$ does not depend on $v$. So the second check also
# finds mistakes of a rule, namely all that change the sum, such as entries of $a$ in a wrong order or a missing bias
# column. The first check finds data on the wrong axis. A mistake that keeps every $G_{vn}$, such as $2 a$ with
# $g / 2$, keeps the block. It could still change the factors $A$ and $B$ of KFAC, so these are tested for every rule.
# By hand, both checks are a few lines.


# %%
def two_checks(net: Uses, X: Tensor, v=None, by=Recorder) -> tuple[float, float]:
    """What crosses from one datum to others, and what the calls leave unexplained."""
    recorder = by()
    with recorder:
        f = net(X)
    v = torch.randn_like(f) if v is None else v
    edges = [edge for *_, edge in recorder.calls]

    crossing = 0.0
    for one in torch.eye(len(X), dtype=torch.bool):
        sent = torch.autograd.grad(f, edges, v * one.unsqueeze(1), retain_graph=True)
        crossing = max(crossing, *(float(g[~one].abs().max()) for g in sent))

    gs = torch.autograd.grad(f, edges, v, retain_graph=True)
    unexplained = 0.0
    for layer in (net.layer, net.head):
        gradient = torch.autograd.grad(f, (layer.weight, layer.bias), v, retain_graph=True)
        total = torch.cat([gradient[0], gradient[1].unsqueeze(1)], dim=1)
        pairs = zip(gs, recorder.calls, strict=True)
        explained = sum(g.T @ a for g, (used, _, a, _) in pairs if used is layer.weight)
        unexplained = max(unexplained, largest_error(explained, total))
    return crossing, unexplained


# %% [markdown]
# In this program every set is one datum. The package needs fewer sets, five for eight data: each datum is in three of
# the five, and no two data are in the same three. So for any two data, one of the three sets of the first does not
# contain the second.

# %% tags=["hide-input"] fold="Checked: five sets separate eight data"
sets = plan.separating_sets(8, X.device)  # [sets, data]
print(sets.int())
assert len(sets) == 5
alone = sets.unsqueeze(2) & ~sets.unsqueeze(1)  # the first of two data, and not the second
assert torch.equal(alone.any(0), ~torch.eye(8, dtype=torch.bool))

# %% [markdown]
# Two sound networks and three unsound ones show what the checks find. In two of the unsound networks data meet; in the
# third, `written_out` uses the weight in a way that no rule describes. The last column is the error of the block. The
# package raises an error for all three. Its messages call a datum a sample. The last message ends with the functions
# that got the weight, among them the multiplication in `written_out`.


# %% tags=["hide-input"] fold="Checked: both checks pass sound networks only"
def refused(expected: type[Exception], *arguments, **options) -> None:
    """Run a capture that has to fail, and print why it does."""
    try:
        layer_ios(*arguments, **options)
    except expected as reason:
        print(textwrap.fill(f"{type(reason).__name__}: {reason}", width=90), end="\n\n")
    else:
        raise AssertionError("this should have been refused")


def written_out(layer, x):
    """A product whose factors are multiplied and summed by two functions."""
    return layer(x) + (x.sin().unsqueeze(1) * layer.weight).sum(2)


sound = {"a layer": plain, "a weight used twice": twice}
suspects = {
    "centred by the batch's mean": Uses(lambda layer, x: (z := layer(x)) - z.mean(0)),
    "times the next datum": Uses(lambda layer, x: layer(x) * layer(x).roll(1, 0)),
    "a function without a rule": Uses(written_out),
}
print(f"{'':27} crossing  unexplained  error")
for name, net in (sound | suspects).items():
    crossing, unexplained = two_checks(net, X)
    off = errors(by_functions(net, loss, X, y, Recorder()), net, loss, X, y)["layer"]
    print(f"{name:>27} {crossing:8.2f} {unexplained:12.0e} {off:6.0e}")
    passed = crossing == 0 and unexplained <= EXACT
    assert passed == (off <= EXACT) == (name in sound)

# %% tags=["hide-input"] fold="Checked: the package refuses all three"
for net, reason in zip(
    suspects.values(), (ValueError, ValueError, NotImplementedError), strict=True
):
    refused(reason, net, loss, X, y)

# %% [markdown]
# Three wrong recorders show that the second check finds mistakes in the recording as well. Each changes what
# the recorder above has written down: the input's entries in another order, no bias column, or the first call
# left out. The network is sound.


# %% tags=["hide-input"] fold="Checked: three wrong recorders leave something unexplained"
def wrong(change):
    class Wrong(Recorder):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            z = super().__torch_function__(func, types, args, kwargs)
            if func is functional.linear:
                self.calls[-1:] = change(len(self.calls), *self.calls[-1])
            return z

    return Wrong


def without_ones(a: Tensor) -> Tensor:
    """Rows whose last entry, the input of the bias, is zero."""
    return torch.cat([a[..., :-1], torch.zeros_like(a[..., -1:])], dim=-1)


mistakes = {
    "entries in another order": lambda number, W, r, a, edge: [(W, r, a.roll(1, -1), edge)],
    "no bias column": lambda number, W, r, a, edge: [(W, r, without_ones(a), edge)],
    "a call left out": lambda number, W, r, a, edge: [(W, r, a * (number > 1), edge)],
}
for mistake, change in mistakes.items():
    crossing, unexplained = two_checks(plain, X, by=wrong(change))
    print(f"{mistake:>25}: unexplained {unexplained:.2f}")
    assert crossing == 0
    assert unexplained > 0.01

# %% [markdown]
# [Figure 10.2] shows the first check. Vectors are sent back from the outputs of the last two data only.

# %% tags=["hide-input"] fold="Code of the figure" alt="Two heat maps with five rows and six columns. For a sound network, the first three rows are empty and the last two are filled. For the centred network, all five rows are filled." caption="The g at the output of the layer, a row for each datum, when vectors are sent back from the last two data. If data do not meet, the first three rows are zero. If the mean over the batch is subtracted, they are not."
arriving = {}
for title, name in {"a layer": "a layer", "centred": "centred by the batch's mean"}.items():
    with Recorder() as recorder:
        f = (sound | suspects)[name](X)
    v = torch.randn_like(f) * (torch.arange(N) >= 3).unsqueeze(1)
    (arriving[title],) = torch.autograd.grad(f, recorder.calls[0][-1], v)
matrices(arriving)

# %% tags=["hide-input"] fold="Checked: what the figure shows"
assert arriving["a layer"][:3].abs().max() == 0
assert arriving["centred"][:3].abs().min() > 0

# %% [markdown]
# A value that is detached from the graph is a constant for capture as for the exact matrix. With the mean detached, a
# datum has an influence on the outputs of others, but no derivative passes there. Autodiff leaves these derivatives out
# of the exact matrix, too, and the blocks agree:

# %% tags=["hide-input"] fold="Checked: a detached mean crosses nothing, and blocks are exact"
detached = Uses(lambda layer, x: (z := layer(x)) - z.mean(0).detach())
found = errors(layer_ios(detached, loss, X, y), detached, loss, X, y)
assert max(found.values()) <= EXACT
assert two_checks(detached, X)[0] == 0

# %% [markdown]
# `plan` does both checks and returns what it found: the axis and the order of the data in every call.
# `layer_ios(..., plan=...)` takes this plan and tries nothing. Loops over a data set and the optimizer keep
# their plans. The source has five of its functions: `_orders` finds the axis by sizes, `_place` and
# `_is_apart` are the first check, `_check_gradient` and `check_sums` are the second.

# %% tags=["remove-input"]
code(plan._orders, plan._place, plan._is_apart, plan._check_gradient, plan.check_sums)

# %% [markdown]
# ## A real transformer
#
# The following classifier consists of PyTorch's own modules: an embedding, two layers of
# `nn.TransformerEncoder`, a mean over positions, and a linear head. (Its layers call a fused attention whose
# derivative PyTorch cannot batch on a CPU without a warning. So the chapter asks for the variant that is made
# of products.)


# %%
class Classifier(nn.Module):
    """A transformer for sequences of words."""

    def __init__(self, words: int, d: int, classes: int):
        super().__init__()
        self.words = nn.Embedding(words, d)
        layer = nn.TransformerEncoderLayer(d, nhead=2, dim_feedforward=2 * d, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, num_layers=2)
        self.head = nn.Linear(d, classes)

    def forward(self, words):
        with sdpa_kernel(SDPBackend.MATH):
            return self.head(self.encoder(self.words(words)).mean(1))


transformer = Classifier(words=12, d=16, classes=4).eval()  # no dropout
texts, labels = torch.randint(12, (6, 5)), torch.randint(4, (6,))
cross_entropy = nn.CrossEntropyLoss()

groups = layer_groups(transformer)
blocks = [name for group in groups for name in group.names]
print(*blocks, sep="\n")
print(f"{len(blocks)} blocks; parameters without one: {len(uncovered(transformer, groups))}")
assert len(blocks) == 2 + 2 * 6

# %% [markdown]
# The exact GGN of the whole network is built from Jacobians by plain autodiff, without any knowledge of
# layers. Its diagonal blocks are compared with those from capture.

# %% tags=["hide-input"] fold="Checked: 14 blocks equal the exact ones; measured: errors of KFAC"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ios = layer_ios(transformer, cross_entropy, texts, labels)
assert len(caught) == 1
assert "No block covers" in str(caught[0].message)

whole = curvature.ggn(transformer, cross_entropy, texts, labels)
exact = curvature.diagonal_blocks(transformer, whole)
assert list(ios) == list(exact) == blocks

table = {}
print(f"{'block':>36}  size   capture  expand  reduce")
for name, io in ios.items():
    block, off = io.block(), largest_error(io.block(), exact[name])
    table[name] = [relative_error(kfac(x).dense(), exact[name]) for x in (io, io.reduced())]
    expand, reduce = table[name]
    print(f"{name:>36} {len(block):5}   {off:.0e} {expand:7.2f} {reduce:7.2f}")
    assert off <= EXACT
    assert min(expand, reduce) > 0.01

# %% [markdown]
# Every block is exact. The last two columns are the relative errors of KFAC, an approximation of the block,
# in its two flavours from [Chapter 6](06_weight_sharing.py): *expand* treats positions as if they were data,
# *reduce* averages over them. The head of this network reads a mean over positions. Reduce is nearer than expand for
# all blocks but two kinds. At the head both agree. For keys reduce is zero ([Theorem 6.2]), so that its relative
# error is 1. A later cell asserts these statements.

# %% tags=["hide-input"] alt="Dot plot with one line for each of the 14 blocks of the transformer and two marks on each: the relative error of KFAC-expand, large for all blocks but the head, and of KFAC-reduce, which is clearly smaller for most blocks but 1 for the two key projections." caption="Relative errors of KFAC, block by block, from the input at the top to the head at the bottom. Both flavours agree at the head, which comes after the mean. For keys, reduce is zero and its relative error is 1."
fig, ax = plt.subplots(figsize=(6.4, 4.2))
for i, (flavour, marker) in enumerate((("expand", "o"), ("reduce", "s"))):
    values = [pair[i] for pair in table.values()]
    size, fill = (
        (9, "none") if flavour == "expand" else (6, "full")
    )  # both are seen where they agree
    ax.plot(values, range(len(table)), marker, ms=size, fillstyle=fill, label=flavour)
shown = [name.replace("encoder.layers.", "").replace("self_attn.", "") for name in table]
ax.set_yticks(range(len(table)), labels=shown)
ax.invert_yaxis()
ax.set(xlabel="relative error", xlim=(0, 1.05))
ax.grid(axis="y", alpha=0.3)
ax.legend(loc="lower center")
plt.show()

# %% tags=["hide-input"] fold="Checked: reduce is nearer, except at the head and for keys"
keys = [name for name in table if name.endswith("k_proj")]
assert all(abs(table[name][1] - 1) <= EXACT for name in keys)
others = table.keys() - {*keys, "head"}
assert all(table[name][1] < table[name][0] for name in others)
assert abs(table["head"][0] - table["head"][1]) <= EXACT  # S = 1

# %% [markdown]
# **A bias without curvature.** The score of query $q_s$ and key $k_t$ is proportional to $q_s^\top k_t$. The
# bias $b$ of the keys adds $q_s^\top b$ to it, the same number for all $t$, and the softmax over $t$ does not
# change if such a number is added. So the bias's rows and columns of the exact block are zero. Those of KFAC-expand
# are not. The factor $A$ is the mean of $a a^\top$. The bias's entry of $a$ is the constant one, so its entry on the
# diagonal of $A$ is 1. So the bias's part of $B \otimes A$ is $1 \cdot B$:

# %% tags=["hide-input"] fold="Checked: the bias of the keys has no curvature, and KFAC's has"
for name in keys:
    io = ios[name]
    of_bias = io.block().unflatten(0, (16, 17))[:, -1]
    by_kfac = kfac(io).dense().unflatten(0, (16, 17))[:, -1]
    print(f"{name}: exact {of_bias.abs().max():.0e}, by KFAC {by_kfac.abs().max():.0e}")
    assert of_bias.abs().max() <= EXACT * io.block().abs().max()
    assert by_kfac.abs().max() > 1e-3 * io.block().abs().max()

# %% [markdown]
# **What is left out.** The scale and the shift of a layer norm are vectors that are multiplied and added
# entry by entry. The package treats both together as a matrix with a single column. Its input $a$ is the
# number 1, and its $g$ is the gradient of $\sigma_{vn}^\top f_n$ with respect to scale and shift, so that
# $g a^\top$ is the gradient. The factor $A$ is 1, and KFAC's $B \otimes A = B$ is the exact block in every
# network. The block has two rows for every channel, so it is as large as a factor of a wide layer, for few
# parameters. That is why a normalisation has a block only if `layers=[...]` names it. Otherwise a warning
# names its parameters, and the optimizer of [Chapter 13](13_in_practice.py) moves them by a first-order rule.
# The next cell prints how many parameters have no block, and what share of the GGN's trace is theirs.

# %% tags=["hide-input"] fold="Checked: normalisations are left out, and KFAC is exact for them"
left_out = uncovered(transformer, groups)
print(textwrap.fill(", ".join(left_out), width=90))
covered = sum(block.trace() for block in exact.values())
numbers = sum(p.numel() for name, p in transformer.named_parameters() if name in left_out)
print(f"share of the parameters: {numbers / len(whole):.3f}")
print(f"share of the GGN's trace: {1 - covered / whole.trace():.3f}")
assert all("norm" in name for name in left_out)
assert 0.01 < 1 - covered / whole.trace() < 0.5

norms = [n for n, module in transformer.named_modules() if isinstance(module, nn.LayerNorm)]
of_norms = curvature.diagonal_blocks(transformer, whole, norms)
for name, io in layer_ios(transformer, cross_entropy, texts, labels, layers=norms).items():
    print(f"{name}: a {tuple(io.a.shape)}, g {tuple(io.g.shape)}")
    assert_exact(kfac(io).dense(), of_norms[name])

# %% [markdown]
# Blocks also leave out all entries of the GGN that couple two layers. The next cell prints their share of
# the sum of the GGN's squared entries. The blocks of the normalisations are counted as blocks here.

# %% tags=["hide-input"] fold="Measured: what blocks leave out"
blocks_of_all = [*exact.values(), *of_norms.values()]
between = whole.square().sum() - sum(block.square().sum() for block in blocks_of_all)
print(f"share of the GGN's squares: {between / whole.square().sum():.3f}")
assert between > 0

# %% [markdown]
# ## What goes wrong in practice
#
# **A part of a weight.** A function may use some rows of a layer's weight, as `weight[:k]` or as a part from
# `torch.chunk`. Then it computes some of the layer's outputs. The package records a use of the whole weight with
# vectors that are zero at the other outputs, and the block is exact. For a use of some *columns* there is no rule.
# The recorder skips such a call, the second check finds the gradient unexplained, and the network is refused. The way
# out is to split the layer into two.

# %% tags=["hide-input"] fold="Checked: rows are exact, columns are refused"
rows = Uses(lambda layer, x: layer(x) + functional.linear(x.sin(), layer.weight[:1]))
assert max(errors(layer_ios(rows, loss, X, y), rows, loss, X, y).values()) <= EXACT

part = Uses(lambda layer, x: layer(x) + functional.linear(x[:, :1], layer.weight[:, :1]))
refused(NotImplementedError, part, loss, X, y)

# %% [markdown]
# **A table that all data share.** Many transformers look up an embedding of *positions* once, for the whole
# batch, and add the result to every datum's words. Then the table's output has no axis for data, and no datum
# has a $g$ of its own there. If the network looks the positions up once for every datum, it computes the same
# numbers and has a block:


# %% tags=["hide-input"] fold="Checked: a shared table is refused, one for every datum has exact blocks"
class Placed(nn.Module):
    """Embeddings of words and of their positions."""

    def __init__(self, of_everyone: bool):
        super().__init__()
        self.words, self.places = nn.Embedding(12, 4), nn.Embedding(5, 4)
        self.head, self.of_everyone = nn.Linear(4, 3), of_everyone

    def forward(self, words):
        places = torch.arange(words.shape[1])
        if not self.of_everyone:
            places = places.expand(words.shape)
        return self.head((self.words(words) + self.places(places)).tanh().mean(1))


targets = torch.randn(len(texts), 3)
refused(ValueError, Placed(of_everyone=True), loss, texts, targets)
shared, net = Placed(of_everyone=True), Placed(of_everyone=False)
net.load_state_dict(shared.state_dict())
assert_exact(net(texts), shared(texts))
found = errors(layer_ios(net, loss, texts, targets), net, loss, texts, targets)
assert max(found.values()) <= EXACT

# %% [markdown]
# **An input that is overwritten.** The input $a$ is recorded without a copy, to save memory. It may be changed
# later, say by a residual connection that is added in place. Then its version number differs from the one that
# was noted at the call, and the network is refused:


# %% tags=["hide-input"] fold="Checked: an overwritten input is refused"
class InPlaceResidual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        h = x.tanh()
        z = self.layer(h)
        h += z  # overwrites the layer's input
        return h


refused(ValueError, InPlaceResidual(), loss, X, torch.randn(N, 4))

# %% [markdown]
# **The batch is not on axis 0.** Recurrent code often puts time first, and so does PyTorch's attention internally.
# Then axis 0 of the layer's input counts positions, and a program that takes it for the batch adds up gradients of
# different data. If there are as many positions as data, no shape shows the mistake. So tests need sizes that are all
# different. The package finds the axis by trying. A plan that assumes axis 0, made by hand in this cell, shows the
# error that this avoids:


# %% tags=["hide-input"] fold="Checked: axis 0 assumed is wrong, axis found by trying is right"
class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):  # [N, T, 4]
        return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1).sum(1)


time_first, square = TimeFirst(), torch.randn(N, N, 4)
_, recorded = calls.recorded(time_first, square, layer_groups(time_first))
places = tuple(plan.Place(call.kind, calls.Axis(0)) for call in recorded["layer"])
by_assumption = layer_ios(time_first, loss, square, y, plan=plan.Plan({"layer": places}))
silent = errors(by_assumption, time_first, loss, square, y)
print(f"as many positions as data, axis 0 assumed: error {silent['layer']:.2f}")
assert silent["layer"] > 0.1
by_trying = layer_ios(time_first, loss, square, y)
assert max(errors(by_trying, time_first, loss, square, y).values()) <= EXACT

# %% [markdown]
# **What a trial cannot find.** A use of a weight may be zero on every datum that is tried, such as a use behind a gate
# that is closed for all of them. Then the recorded calls explain the gradient of the tried data, and the block is wrong
# for the datum whose gate is open. A use whose effect is smaller than the tolerance is not found, either. The tried
# data are spread over the batch. So a gate that opens often is probably noticed, but there is no guarantee. Below, one
# gate is open. If its datum is not tried, the block is wrong. If it is put first in the batch, it is tried, and the
# network is refused:


# %% tags=["hide-input"] fold="Checked: a gate that is not tried is missed, one that is tried is refused"
def gated(layer, x):
    return layer(x) + (x[:, :1] > 0) * written_out(layer, x)


many, many_targets = torch.randn(20, 4), torch.randn(20, 3)
many[:, 0] = -many[:, 0].abs()
many[1, 0] = 1.0  # the only open gate
net = Uses(gated)
missed = errors(layer_ios(net, loss, many, many_targets), net, loss, many, many_targets)
print(f"an open gate that is not tried: error {missed['layer']:.2f}\n")
assert missed["layer"] > 0.01
refused(NotImplementedError, net, loss, many.roll(-1, 0), many_targets.roll(-1, 0))

# %% [markdown]
# Among the data that are tried, the first check misses no pair, as there is a set for any two of them. Here
# only the last two data meet: the output of the last but one depends on the last one.


# %% tags=["hide-input"] fold="Checked: two data that meet are found"
def last_two_meet(layer, x):
    z = layer(x)
    return z + functional.pad(z[-1:], (0, 0, len(z) - 2, 1))


net = Uses(last_two_meet)
assert two_checks(net, X)[0] > 0
assert errors(by_functions(net, loss, X, y, Recorder()), net, loss, X, y)["layer"] > 0.01
refused(ValueError, net, loss, X, y)

# %% [markdown]
# ## In one minute
#
# - Forward hooks run at calls of layers. Attention and code without layers use weights by functions.
# - A mode of PyTorch intercepts functions, and `opened` makes those inside of attention visible.
# - Two checks on a few data: no derivative passes between data, and a random vector's gradient is the sum of $g a^\top$
#   over the recorded calls. If both hold, blocks are exact for these data, with probability one.
# - Capture raises an error if a check fails. A use that has no effect on the tried data is not found.
# - Expand and reduce agree for a head that reads a mean over positions. For keys of attention, reduce is zero.
#
# ## Exercises
#
# **Exercise 10.1.** How many calls of `linear` does PyTorch's attention need for queries, keys, values and
# output, if all three inputs are one tensor, if keys and values share one, and if there are three? How
# many blocks are there in each case?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# One tensor: one call with all rows of `in_proj_weight`, and one for the output. A shared tensor for
# keys and values: one call with the rows of the queries, and one with the rest. Three tensors: three calls.
# So there are two, three and four calls. The blocks are four in all cases, because the four
# matrices are the same and only the number of products differs.
#
# </details>
#
# **Exercise 10.2.** The vector $v$ of [Theorem 10.1] must be random. Find a network with an unexplained use of
# a weight, and a $v$ that is not zero and does not find it.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Let the unexplained use act on some outputs only, and let $v$ be zero there. For instance, add the number
# `(x.unsqueeze(1) * W).sum((1, 2))` of each datum to its last output. Every $v$ whose last column is zero lies in the
# subspace of the proof.
#
# </details>
#
# **Exercise 10.3 (write it).** The package has a rule for `torch.einsum`. Teach this chapter's recorder the equation
# `torch.einsum("ni,oi->no", x, W)`: write a class that inherits from `Recorder`. The cell below has
# `check_recorder`, which compares the blocks that your class finds with exact ones, and one solution.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The arguments of the function are the equation, $x$ and $W$, so it is recorded as if it were
# `linear(x, W)`. In a class that inherits from `Recorder`, pass
# `functional.linear` and these arguments to the method of the parent.
#
# </details>
#
# **Exercise 10.4.** A network subtracts the mean over the batch after a layer and adds it again before the
# next. Do data meet?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# No: the two terms cancel, in the output as in the derivative. Autograd computes the derivative with respect to the
# mean as the sum of two numbers that differ only in sign, and that sum is exactly zero. If the mean is multiplied by
# 3 and divided by 3 before it is added, rounding may leave a small number instead of zero. The check would then
# refuse a network that is sound. The opposite mistake, to accept a network in which tried data meet, has probability
# zero, as in [Theorem 10.1]: what arrives at the other data is a linear function of the vectors that were sent.
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
class Attention(nn.Module):
    def __init__(self, inputs):
        super().__init__()
        self.attention, self.inputs = nn.MultiheadAttention(4, 2), inputs

    def forward(self, x):
        return self.attention(*self.inputs(x.transpose(0, 1)))[0].mean(0)


inputs = {
    2: lambda x: (x, x, x),
    3: lambda x: (x, *[x.sin()] * 2),
    4: lambda x: (x, x.sin(), x.cos()),
}
for expected_calls, chosen in inputs.items():  # 10.1
    net, recorder = Attention(chosen), Opening()
    ios = by_functions(net, loss, sequences, torch.randn(N, 4), recorder, positions_first=True)
    assert len(recorder.calls) == expected_calls
    assert len(ios) == len(layer_ios(net, loss, sequences, torch.randn(N, 4))) == 4


class AtTheLastOutput(Uses):
    def forward(self, x):
        unseen = (x.unsqueeze(1) * self.layer.weight).sum(2).sum(1, keepdim=True)
        return super().forward(x) + functional.pad(unseen, (2, 0))


net = AtTheLastOutput(lambda layer, x: layer(x))  # 10.2
v = torch.randn(N, 3)
assert two_checks(net, X, v)[1] > 0.01
v[:, -1] = 0
assert two_checks(net, X, v)[1] <= EXACT


class WithEinsum(Recorder):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.einsum and args[0] == "ni,oi->no":
            func, args = functional.linear, args[1:]
        return super().__torch_function__(func, types, args, kwargs)


def check_recorder(recorder: type[Recorder]) -> None:  # 10.3
    net = Uses(lambda layer, x: layer(x) + torch.einsum("ni,oi->no", x.sin(), layer.weight))
    assert errors(by_functions(net, loss, X, y, Recorder()), net, loss, X, y)["layer"] > 0.01
    for ios in (by_functions(net, loss, X, y, recorder()), layer_ios(net, loss, X, y)):
        assert max(errors(ios, net, loss, X, y).values()) <= EXACT


check_recorder(WithEinsum)


def there_and_back(layer, x):
    z = layer(x)
    mean = z.mean(0)
    return (z - mean) + mean


net = Uses(there_and_back)  # 10.4
assert two_checks(net, X)[0] == 0
assert max(errors(layer_ios(net, loss, X, y), net, loss, X, y).values()) <= EXACT
print("all hold")

# %% [markdown]
# ## Further reading
#
# PyTorch's notes on [extending functions with modes](https://docs.pytorch.org/docs/stable/notes/extending.html)
# and [`torch.overrides`](https://docs.pytorch.org/docs/stable/torch.overrides.html);
# [Eschenhagen et al. (2023)](bibliography.md#weight-sharing) for attention as linear layers with shared
# weights; [curvlinops](bibliography.md#curvlinops), which traces a network and checks that every path from a
# parameter in the graph is one that it knows.
#
# [Chapter 35](35_conformance.py) tests a program from the outside: are its factors right?
