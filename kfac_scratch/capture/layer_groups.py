"""Blocks: the sets of trainable parameters of a model that make up one matrix `W` each.

A block is a layer, or all layers that share a weight, or one group of a grouped convolution. Its
`W` is `[weight | bias]`; layers that share a weight but not their biases give one column for each
bias, and frozen parameters have no columns. Named after the first of its layers in
`model.named_modules()`, with `[i]` behind it for group `i`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Num
from torch import Tensor
from torch.nn import Embedding, Module, Parameter

from kfac_scratch.capture.layers import LAYERS, Layer, check_layer, weight_matrix, weight_tensor


@dataclass(frozen=True, eq=False)
class LayerGroup:
    """Layers that apply the same weight, and the names of its trainable parameters.

    Attributes:
        name: Name of the first layer.
        layers: All layers with this weight, in the order of `model.named_modules()`.
        weight: Name of the weight, or None if it is frozen.
        biases: Names and values of the trainable biases, one column of `W` each.
    """

    name: str
    layers: tuple[Layer, ...]
    weight: str | None
    biases: dict[str, Tensor]

    @cached_property
    def groups(self) -> int:
        """Number of matrices `W` side by side in the weight."""
        return int(getattr(self.layers[0], "groups", 1))

    @cached_property
    def names(self) -> list[str]:
        """Names of the blocks: one for each group."""
        return [self.name if self.groups == 1 else f"{self.name}[{i}]" for i in range(self.groups)]

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the trainable parameters."""
        return (*([] if self.weight is None else [self.weight]), *self.biases)

    def bias_inputs(self, layer: Layer) -> list[float]:
        """The inputs of the bias columns for one layer: 1 for its own bias, 0 for the others."""
        return [float(bias is layer._parameters.get("bias")) for bias in self.biases.values()]

    def matrices(self, values: Mapping[str, Tensor]) -> list[Num[Tensor, "d_out d_in"]]:
        """Arrange values of the parameters (say, their gradients) as `W`, one for each group."""
        columns = []
        if self.weight is not None:
            columns.append(weight_matrix(self.layers[0], values[self.weight]))
        for name in self.biases:
            columns.append(values[name].reshape(self.groups, -1, 1))
        return list(torch.cat(columns, dim=-1))

    def parameters(self, Ws: list[Num[Tensor, "d_out d_in"]]) -> dict[str, Tensor]:
        """The values of the parameters, given the `W` of every group: the inverse of `matrices`."""
        W = torch.stack(Ws)
        values = {}
        for name in reversed(self.biases):
            values[name], W = W[..., -1].flatten(), W[..., :-1]
        if self.weight is not None:
            values[self.weight] = weight_tensor(self.layers[0], W)
        return values


def layer_groups(model: Module, layers: Collection[str] | None = None) -> list[LayerGroup]:
    """All blocks of a model, or those of the named layers.

    Args:
        model: Any module.
        layers: Names, as in `model.named_modules()`, of the layers to cover. Default: all
            supported layers with a trainable parameter of their own.

    Raises:
        ValueError: If a name is unknown, a layer has no trainable parameters, or two blocks share
            a bias or a name.
        NotImplementedError: If a named layer is of an unsupported kind, or layers share a weight
            in ways that no single `W` describes.
    """
    chosen = _supported(model) if layers is None else _named(model, layers)
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    by_weight: dict[int, dict[str, Layer]] = {}
    for name, layer in chosen.items():
        by_weight.setdefault(id(layer.weight), {})[name] = layer
    groups = [_shared(family, trainable) for family in by_weight.values()]
    groups = [group for group in groups if group.weight is not None or group.biases]
    if layers is not None and len(groups) < len(by_weight):
        raise ValueError(f"Among the layers {sorted(layers)} one has no trainable parameter.")
    _check_names(groups)
    owners: dict[str, str] = {}
    for group in groups:
        for bias in group.biases:
            if owners.setdefault(bias, group.name) != group.name:
                raise ValueError(
                    f"Layers {owners[bias]!r} and {group.name!r} share the bias {bias!r} but not "
                    "their weight, so it belongs to two blocks: leave one out with layers=[...]."
                )
    return groups


def layer_names(model: Module, groups: list[LayerGroup]) -> list[str]:
    """Names of all layers of some blocks, as `layer_groups(model, layers)` takes them."""
    layers = {id(layer) for group in groups for layer in group.layers}
    return [name for name, module in model.named_modules() if id(module) in layers]


def uncovered(model: Module, covered: list[LayerGroup]) -> list[str]:
    """Names of the trainable parameters that are in none of the blocks."""
    names = {name for b in covered for name in b.parameter_names}
    return [n for n, p in model.named_parameters() if p.requires_grad and n not in names]


def _check_names(groups: list[LayerGroup]) -> None:
    """Refuse two blocks of one name: the second would take the place of the first."""
    seen: set[str] = set()
    for name in (name for group in groups for name in group.names):
        if name in seen:
            grouped = name.rpartition("[")[0]
            raise ValueError(
                f"Two blocks have the name {name!r}: a module of that name, and a group of the "
                f"convolution {grouped!r}. Rename the module, or leave one out with layers=[...]."
            )
        seen.add(name)


def _supported(model: Module) -> dict[str, Layer]:
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, LAYERS) and isinstance(layer._parameters.get("weight"), Parameter)
    }


def _named(model: Module, layers: Collection[str]) -> dict[str, Layer]:
    modules, supported = dict(model.named_modules()), _supported(model)
    for name in layers:
        if name not in modules:
            raise ValueError(f"The model has no layer {name!r}; it has {sorted(modules)}.")
        if name not in supported:
            raise NotImplementedError(
                f"Layer {name!r} is a {type(modules[name]).__name__}: only "
                f"{', '.join(kind.__name__ for kind in LAYERS)} with a weight that is a "
                "parameter (no parametrization) have a block."
            )
    return {name: layer for name, layer in supported.items() if name in layers}


def _shared(family: dict[str, Layer], trainable: dict[int, str]) -> LayerGroup:
    (name, first), *others = family.items()
    check_layer(name, first)
    for other, layer in others:
        check_layer(other, layer)
        same_groups = getattr(layer, "groups", 1) == getattr(first, "groups", 1)
        if isinstance(layer, Embedding) != isinstance(first, Embedding) or not same_groups:
            raise NotImplementedError(
                f"Layers {name!r} and {other!r} share a weight that one of them uses transposed "
                "or in other groups, so that no single W describes both: leave one out with "
                "layers=[...], or untie them."
            )
    biases = [b for layer in family.values() if (b := layer._parameters.get("bias")) is not None]
    return LayerGroup(
        name,
        tuple(family.values()),
        trainable.get(id(first.weight)),
        {trainable[id(b)]: b for b in biases if id(b) in trainable},
    )
