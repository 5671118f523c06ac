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

from torch import Tensor, nn
from torch.nn import functional

Value = int | float | str | bool | tuple[int, ...]
Geometry = dict[str, Value]
Parameters = Mapping[str, Tensor]
CONVOLUTIONS: dict[int, Callable[..., nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
POOLING_MODULES: dict[int, Callable[..., nn.Module]] = {
    1: nn.AdaptiveAvgPool1d,
    2: nn.AdaptiveAvgPool2d,
    3: nn.AdaptiveAvgPool3d,
}


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
        """Whether it has a weight, and so a block."""
        return self.kind in ("linear", "conv")

    @property
    def groups(self) -> int:
        """Independent matrices side by side; 1 except for grouped convolutions."""
        return int(self["groups"]) if self.kind == "conv" else 1

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of its parameters."""
        if not self.is_layer:
            return {}
        kernel = self["kernel"] if self.kind == "conv" else ()
        shapes = {f"{self.name}.weight": (self["d_out"], self["d_in"] // self.groups, *kernel)}
        if self["bias"]:
            shapes[f"{self.name}.bias"] = (self["d_out"],)
        return shapes

    def matrix_shape(self) -> tuple[int, int]:
        """Rows and columns of one group's matrix `W`, the bias column included."""
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

    `geometry`: stride, padding and dilation (one number each), groups, padding_mode.
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


def mask(*kept: int) -> Op:
    """Set positions (axis 1) to zero where the number is 0."""
    return Op("mask", settings=(("kept", kept),))


def add(first: int, second: int) -> Op:
    """Sum of two results: a residual connection."""
    return Op("add", inputs=(first, second))


def attention(query: int, key: int, value: int) -> Op:
    """`softmax(q k^T / sqrt(d)) v` with one head, over axis 1."""
    return Op("attention", inputs=(query, key, value))


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
        case "mask":
            return x * x.new_tensor(op["kept"]).unsqueeze(-1)
        case "add":
            return x + others[0]
        case "attention":
            key, value = others
            return (x @ key.mT / x.shape[-1] ** 0.5).softmax(-1) @ value
    raise ValueError(f"Unknown operation {op.kind!r}: a newer version of kfac_scratch made it.")


def _weight_and_bias(op: Op, parameters: Parameters) -> tuple[Tensor, Tensor | None]:
    return parameters[f"{op.name}.weight"], parameters.get(f"{op.name}.bias")


def _convolved(op: Op, parameters: Parameters, x: Tensor) -> Tensor:
    dims, padding = len(op["kernel"]), op["padding"]
    mode = "constant" if op["padding_mode"] == "zeros" else op["padding_mode"]
    x = functional.pad(x, [padding] * 2 * dims, mode=mode) if padding else x
    run = getattr(functional, f"conv{dims}d")
    weight, bias = _weight_and_bias(op, parameters)
    result: Tensor = run(x, weight, bias, op["stride"], 0, op["dilation"], op["groups"])
    return result


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
    """A network that is no chain, or that uses a layer more than once. Layers are attributes."""

    def __init__(self, ops: Sequence[Op], modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.ops, self.keys = tuple(ops), [_key(i, op) for i, op in enumerate(ops)]
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, X: Tensor) -> Tensor:
        """Run the operations in order."""
        results: list[Tensor] = []
        for i, (op, key) in enumerate(zip(self.ops, self.keys, strict=True)):
            places = op.inputs or (i - 1,)
            x = [X if place < 0 else results[place] for place in places]
            results.append(getattr(self, key)(*x))
        return results[-1]


def network(ops: Sequence[Op], parameters: Parameters) -> nn.Module:
    """A module that computes `forward`: `nn.Sequential` with named layers where possible."""
    modules = OrderedDict((_key(i, op), _module(op)) for i, op in enumerate(ops))
    chain = len(modules) == len(ops) and not any(op.inputs for op in ops)
    net = nn.Sequential(modules) if chain else Graph(ops, modules)
    first = next(iter(parameters.values()))
    net.to(first.device, first.dtype)
    net.load_state_dict({name: p.detach() for name, p in parameters.items()})
    return net


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


def parameter_shapes(ops: Sequence[Op]) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters, in the order of `network(ops, ...).named_parameters()`."""
    return {name: shape for op in layer_ops(ops).values() for name, shape in op.shapes().items()}
