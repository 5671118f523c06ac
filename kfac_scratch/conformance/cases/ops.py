"""Networks as data: a list of operations that a reader in any language can run.

Every operation takes the results of earlier ones (by default of the one before; -1 is the network's
input) and may have parameters, which belong to its name: two operations of one name share them.
`network` builds a PyTorch module from a list, `forward` interprets it directly. The second is what
the truth is computed from, so that it shares no module code with what is judged.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Numbers = tuple[float, ...]
Value = int | float | str | bool | tuple[int, ...] | Numbers
Geometry = dict[str, Value]
Parameters = Mapping[str, Tensor]
CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLING_MODULES: dict[int, Callable[..., nn.Module]] = {
    1: nn.AdaptiveAvgPool1d,
    2: nn.AdaptiveAvgPool2d,
    3: nn.AdaptiveAvgPool3d,
}
BATCH_NORMS: dict[int, Callable[..., nn.Module]] = {
    0: nn.BatchNorm1d,
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}
NORMS = ("layer-norm", "group-norm", "batch-norm")
EPSILON = 1e-5  # what normalisations add to a variance
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        kind: What it computes, see `forward`.
        name: Whose parameters it has; empty if it has none.
        inputs: Which results it takes; empty for the one before.
        settings: Sizes and switches, by name.
    """

    kind: str
    name: str = ""
    inputs: tuple[int, ...] = ()
    settings: tuple[tuple[str, Value], ...] = ()

    def __getitem__(self, key: str) -> Any:
        return dict(self.settings)[key]

    @property
    def is_layer(self) -> bool:
        """Whether it applies a matrix, and so has a block."""
        return self.kind in ("linear", "conv", "embedding")

    @property
    def groups(self) -> int:
        """Independent matrices side by side; 1 except for grouped convolutions."""
        return int(self["groups"]) if self.kind == "conv" else 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters, as PyTorch has them."""
        if self.kind in NORMS:
            return {f"{self.name}.{key}": (self["features"],) for key in ("weight", "bias")}
        if self.kind == "embedding":
            return {f"{self.name}.weight": (self["d_in"], self["d_out"])}
        if not self.is_layer:
            return {}
        kernel = self["kernel"] if self.kind == "conv" else ()
        shapes = {f"{self.name}.weight": (self["d_out"], self["d_in"] // self.groups, *kernel)}
        if self["bias"]:
            shapes[f"{self.name}.bias"] = (self["d_out"],)
        return shapes

    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of one group's matrix `W`, the bias column included."""
        if self.kind == "embedding":
            return self["d_out"], self["d_in"]
        weight = self.shapes()[f"{self.name}.weight"]
        return weight[0] // self.groups, prod(weight[1:]) + bool(self["bias"])


def linear(name: str, d_in: int, d_out: int, bias: bool = True, inputs: tuple[int, ...] = ()) -> Op:
    """`W x + b` on the last axis, whatever axes are between it and the batch."""
    settings = (("d_in", d_in), ("d_out", d_out), ("bias", bias))
    return Op("linear", name, inputs, settings)


def conv(
    name: str,
    d_in: int,
    d_out: int,
    kernel: tuple[int, ...],
    bias: bool = True,
    geometry: Geometry | None = None,
) -> Op:
    """A convolution over as many axes as the kernel has: 1, 2 or 3.

    `geometry`: stride, padding and dilation (one number each), groups, padding_mode. The padding
    may be `same`: as many results as inputs, and of an odd number the larger half behind.
    """
    default: dict[str, Value] = {
        "stride": 1,
        "padding": 0,
        "dilation": 1,
        "groups": 1,
        "padding_mode": "zeros",
    }
    sizes: dict[str, Value] = {"d_in": d_in, "d_out": d_out, "kernel": kernel, "bias": bias}
    return Op("conv", name, (), tuple((sizes | default | (geometry or {})).items()))


def embedding(name: str, words: int, d_out: int) -> Op:
    """A row of the weight for every word: `W` times the one-hot vector of a number."""
    return Op("embedding", name, (), (("d_in", words), ("d_out", d_out), ("bias", False)))


def tied_linear(name: str, words: str, d_in: int, d_out: int) -> Op:
    """`W x` with the weight of the embedding `words`, as the head of a language model has it."""
    return Op("tied-linear", name, (), (("words", words), ("d_in", d_in), ("d_out", d_out)))


def tied_uses(ops: Sequence[Op]) -> dict[str, list[int]]:
    """For every embedding whose weight linear layers have, too, the places of these."""
    found: dict[str, list[int]] = {}
    for i, op in enumerate(ops):
        if op.kind == "tied-linear":
            found.setdefault(op["words"], []).append(i)
    return found


def as_layer(op: Op) -> Op:
    """An operation as the layer that holds its weight: itself, but for a tied one."""
    if op.kind != "tied-linear":
        return op
    return linear(op["words"], op["d_in"], op["d_out"], bias=False)


def layer_norm(name: str, features: int) -> Op:
    """Mean 0 and variance 1 over the last axis, then a scale and a shift of every entry."""
    return Op("layer-norm", name, (), (("features", features), ("eps", EPSILON)))


def group_norm(name: str, features: int, groups: int) -> Op:
    """Mean 0 and variance 1 over groups of channels (axis 1) with their space, then scaled."""
    settings = (("features", features), ("groups", groups), ("eps", EPSILON))
    return Op("group-norm", name, (), settings)


def batch_norm(name: str, mean: Numbers, variance: Numbers, dims: int = 0) -> Op:
    """Channels (axis 1) less a known mean, over the root of a known variance, then scaled.

    As in evaluation: data do not meet. `dims`: how many axes are behind the channels.
    """
    settings: dict[str, Value] = {"features": len(mean), "mean": mean, "variance": variance}
    return Op("batch-norm", name, (), tuple((settings | {"dims": dims, "eps": EPSILON}).items()))


def relu(inplace: bool = False) -> Op:
    """The larger of x and 0, written over its input or not."""
    return Op("relu", settings=(("inplace", inplace),))


def tanh() -> Op:
    """The hyperbolic tangent."""
    return Op("tanh")


def sigmoid() -> Op:
    """The logistic function."""
    return Op("sigmoid")


def flatten() -> Op:
    """All axes behind the batch as one."""
    return Op("flatten")


def mean_positions() -> Op:
    """Mean over all axes between the batch and the last."""
    return Op("mean-positions")


def sum_positions() -> Op:
    """Sum over all axes between the batch and the last."""
    return Op("sum-positions")


def mean_space(dims: int) -> Op:
    """Global average pooling: mean over all axes behind the channels."""
    return Op("mean-space", settings=(("dims", dims),))


def classes_first() -> Op:
    """Move the last axis behind the batch, where cross-entropy has its classes."""
    return Op("classes-first")


def transpose() -> Op:
    """Exchange axis 1 and the last axis."""
    return Op("transpose")


def mask(*kept: int) -> Op:
    """Set positions (axis 1) to zero where the number is 0."""
    return Op("mask", settings=(("kept", kept),))


def add(first: int, second: int) -> Op:
    """Sum of two results: a residual connection."""
    return Op("add", inputs=(first, second))


def attention(query: int, key: int, value: int) -> Op:
    """`softmax(q k^T / sqrt(d)) v` with one head, over axis 1."""
    return Op("attention", inputs=(query, key, value))


def multihead(
    name: str,
    width: int,
    heads: int,
    others: tuple[int, int] | None = None,
    sources: tuple[int, int, int] = (-1, -1, -1),
    start: int = 0,
) -> tuple[Op, ...]:
    """Attention with several heads, between four layers `name.q_proj` to `name.out_proj`.

    Every head has its share of the last axis. The five operations are one module of PyTorch, which
    may hold three of the four matrices in one parameter, so no other operation sees what is between
    them.

    Args:
        name: Of the module.
        width: Of queries and results.
        heads: How many; they share the width.
        others: Widths of what keys and values are made of; by default that of queries.
        sources: Which results queries, keys and values are made of.
        start: The place of the first of these operations in the network.
    """
    d_key, d_value = others or (width, width)
    q, k, v, out = (f"{name}.{projection}" for projection in PROJECTIONS)
    settings: dict[str, Value] = {"heads": heads, "width": width}
    settings |= {"d_key": d_key, "d_value": d_value}
    return (
        linear(q, width, width, inputs=sources[:1]),
        linear(k, d_key, width, inputs=sources[1:2]),
        linear(v, d_value, width, inputs=sources[2:]),
        Op("multihead", name, (start, start + 1, start + 2), tuple(settings.items())),
        linear(out, width, width, inputs=(start + 3,)),
    )


def projections(ops: Sequence[Op]) -> list[str]:
    """Names of the layers inside attention modules: no modules of their own, but the last."""
    held = [op.name for op in ops if op.kind == "multihead"]
    return [f"{name}.{projection}" for name in held for projection in PROJECTIONS]


def layer_ops(ops: Sequence[Op]) -> dict[str, Op]:
    """The operations that have a weight, each name once."""
    return {op.name: op for op in ops if op.is_layer}


def calls(ops: Sequence[Op], name: str) -> list[int]:
    """At which places a layer is used."""
    return [i for i, op in enumerate(ops) if op.name == name]


def forward(
    ops: Sequence[Op],
    parameters: Parameters,
    X: Tensor,
    added: Mapping[int, Tensor] | None = None,
    record: list[tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """The network's output.

    Args:
        ops: The network.
        parameters: By name.
        X: Its input.
        added: What to add to the results of some operations, by their place.
        record: Where to put every operation's first input and its result.
    """
    results: list[Tensor] = []
    for i, op in enumerate(ops):
        places = op.inputs or (i - 1,)
        x = [X if place < 0 else results[place] for place in places]
        z = apply(op, parameters, *x)
        if added and i in added:
            z = z + added[i]
        if record is not None:
            record.append((x[0], z))
        results.append(z)
    return results[-1]


def apply(op: Op, parameters: Parameters, x: Tensor, *others: Tensor) -> Tensor:
    """One operation by itself."""
    match op.kind:
        case "linear":
            return functional.linear(x, *_weight_and_bias(op, parameters))
        case "embedding":
            return functional.embedding(x, parameters[f"{op.name}.weight"])
        case "tied-linear":
            return functional.linear(x, parameters[f"{op['words']}.weight"])
        case "layer-norm" | "group-norm" | "batch-norm":
            return _normalised(op, parameters, x)
        case "conv":
            return _convolved(op, parameters, x)
        case "relu":
            return x.relu()
        case "tanh" | "sigmoid":
            return getattr(x, op.kind)()
        case "flatten":
            return x.flatten(1)
        case "mean-positions":
            return x.flatten(1, -2).mean(1)
        case "sum-positions":
            return x.flatten(1, -2).sum(1)
        case "mean-space":
            return x.flatten(2).mean(2)
        case "classes-first":
            return x.movedim(-1, 1)
        case "transpose":
            return x.transpose(1, -1)
        case "mask":
            return x * x.new_tensor(op["kept"]).unsqueeze(-1)
        case "add":
            return x + others[0]
        case "attention":
            key, value = others
            return (x @ key.mT / x.shape[-1] ** 0.5).softmax(-1) @ value
        case "multihead":
            q, k, v = (t.unflatten(-1, (op["heads"], -1)).movedim(-2, 1) for t in (x, *others))
            heads = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v  # [N, heads, S, width / heads]
            return heads.movedim(1, -2).flatten(-2)
    raise ValueError(f"Unknown operation {op.kind!r}: a newer version of kfac_scratch made it.")


def _weight_and_bias(op: Op, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
    return parameters[f"{op.name}.weight"], parameters.get(f"{op.name}.bias")


def _convolved(op: Op, parameters: Parameters, x: Tensor) -> Tensor:
    dims, padding = len(op["kernel"]), op["padding"]
    mode = "constant" if op["padding_mode"] == "zeros" else op["padding_mode"]
    if padding == "same":
        totals = [op["dilation"] * (k - 1) for k in reversed(op["kernel"])]  # the last axis first
        x = functional.pad(x, [n for t in totals for n in (t // 2, t - t // 2)], mode=mode)
    elif padding:
        x = functional.pad(x, [padding] * 2 * dims, mode=mode)
    run = getattr(functional, f"conv{dims}d")
    weight, bias = _weight_and_bias(op, parameters)
    result: Tensor = run(x, weight, bias, op["stride"], 0, op["dilation"], op["groups"])
    return result


def _normalised(op: Op, parameters: Parameters, x: Tensor) -> Tensor:
    weight, bias = (parameters[f"{op.name}.{key}"] for key in ("weight", "bias"))
    if op.kind == "layer-norm":
        return _standard(x, -1, op["eps"]) * weight + bias
    channels = (-1, *[1] * (x.ndim - 2))
    if op.kind == "group-norm":
        x = _standard(x.reshape(len(x), op["groups"], -1), -1, op["eps"]).reshape(x.shape)
    else:
        mean, variance = (x.new_tensor(op[key]).reshape(channels) for key in ("mean", "variance"))
        x = (x - mean) / (variance + op["eps"]).sqrt()
    return x * weight.reshape(channels) + bias.reshape(channels)


def _standard(x: Tensor, axis: int, eps: float) -> Tensor:
    """Mean 0 and variance 1 along an axis."""
    x = x - x.mean(axis, keepdim=True)
    return x / (x.square().mean(axis, keepdim=True) + eps).sqrt()


# ---- as PyTorch modules --------------------------------------------------------------------------


class Apply(nn.Module):
    """An operation without parameters that PyTorch has no module for."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, *x: Tensor) -> Tensor:
        """Apply the operation."""
        return apply(self.op, {}, *x)

    def extra_repr(self) -> str:
        """Show the operation."""
        return repr(self.op)


class Graph(nn.Module):
    """A network that is no chain, or that uses a layer more than once. Layers are attributes.

    What an attention module does by itself is left to it: its layers pass on what they get.
    """

    def __init__(self, ops: Sequence[Op], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.ops, held = tuple(ops), projections(ops)
        self.keys = ["" if op.name in held else _key(i, op) for i, op in enumerate(ops)]
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, X: Tensor) -> Tensor:
        """Run the operations in order."""
        results: list[Tensor] = []
        for i, (op, key) in enumerate(zip(self.ops, self.keys, strict=True)):
            places = op.inputs or (i - 1,)
            x = [X if place < 0 else results[place] for place in places]
            results.append(_run(getattr(self, key), x) if key else x[0])
        return results[-1]


def network(ops: Sequence[Op], parameters: Parameters) -> nn.Module:
    """A module that computes `forward`: `nn.Sequential` with named layers where possible."""
    held = projections(ops)
    modules = OrderedDict((_key(i, p), _module(p)) for i, p in enumerate(ops) if p.name not in held)
    chain = len(modules) == len(ops) and not any(op.inputs for op in ops)
    net = nn.Sequential(modules) if chain else Graph(ops, modules)
    first = next(iter(parameters.values()))
    for name, places in tied_uses(ops).items():
        for i in places:
            net.get_submodule(ops[i].name).weight = net.get_parameter(f"{name}.weight")
    net.to(first.device, first.dtype)
    net.load_state_dict(dict(net.named_buffers()) | held_parameters(ops, parameters))
    return net


def held_parameters(ops: Sequence[Op], parameters: Parameters) -> dict[str, Tensor]:
    """Parameters by their names in `network`: an attention module joins those of three layers."""
    values = {name: p.detach() for name, p in parameters.items()}
    for op in ops:
        if op.kind == "tied-linear":
            values[f"{op.name}.weight"] = values[f"{op['words']}.weight"]
        if op.kind == "multihead":
            layers = [f"{op.name}.{projection}" for projection in PROJECTIONS[:3]]
            weights = [values.pop(f"{layer}.weight") for layer in layers]
            values[f"{op.name}.in_proj_bias"] = torch.cat([values.pop(f"{x}.bias") for x in layers])
            if op["d_key"] == op["d_value"] == op["width"]:
                values[f"{op.name}.in_proj_weight"] = torch.cat(weights)
            else:
                values |= {f"{x}_weight": w for x, w in zip(layers, weights, strict=True)}
    return values


def _run(module: nn.Module, x: Sequence[Tensor]) -> Tensor:
    if isinstance(module, nn.MultiheadAttention):
        attended: Tensor = module(*x)[0]
        return attended
    result: Tensor = module(*x)
    return result


def _key(i: int, op: Op) -> str:
    return op.name or f"{op.kind.replace('-', '_')}_{i}"


def _module(op: Op) -> nn.Module:
    match op.kind:
        case "linear":
            return nn.Linear(op["d_in"], op["d_out"], bias=op["bias"])
        case "conv":
            keys = ("stride", "padding", "dilation", "groups", "padding_mode", "bias")
            return CONVOLUTIONS[len(op["kernel"])](
                op["d_in"], op["d_out"], op["kernel"], **{key: op[key] for key in keys}
            )
        case "embedding":
            return nn.Embedding(op["d_in"], op["d_out"])
        case "tied-linear":
            return nn.Linear(op["d_in"], op["d_out"], bias=False)
        case "layer-norm":
            return nn.LayerNorm(op["features"], eps=op["eps"])
        case "group-norm":
            return nn.GroupNorm(op["groups"], op["features"], eps=op["eps"])
        case "batch-norm":
            return _batch_norm(op)
        case "multihead":
            return nn.MultiheadAttention(
                op["width"], op["heads"], kdim=op["d_key"], vdim=op["d_value"], batch_first=True
            )
        case "relu":
            return nn.ReLU(inplace=op["inplace"])
        case "tanh":
            return nn.Tanh()
        case "sigmoid":
            return nn.Sigmoid()
        case "flatten":
            return nn.Flatten()
        case "mean-space":
            return nn.Sequential(POOLING_MODULES[op["dims"]](1), nn.Flatten())
    return Apply(op)


def _batch_norm(op: Op) -> nn.Module:
    """In evaluation, whatever mode the network is in."""
    module = BATCH_NORMS[op["dims"]](op["features"], eps=op["eps"]).eval()
    module.get_buffer("running_mean").copy_(torch.tensor(op["mean"]))
    module.get_buffer("running_var").copy_(torch.tensor(op["variance"]))
    return module


def parameter_shapes(ops: Sequence[Op]) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, in the order of the operations."""
    return {name: shape for op in ops for name, shape in op.shapes().items()}
