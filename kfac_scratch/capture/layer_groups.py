"""Blocks: the sets of trainable parameters of a model that make up one matrix `W` each.

A block is a layer, or all layers that share a weight, or one group of a grouped convolution. Its
`W` is `[weight | bias]`; layers that share a weight but not their biases give one column for each
bias, and frozen parameters have no columns. Named after the first of its layers in
`model.named_modules()`, with `[i]` behind it for group `i`.

`nn.MultiheadAttention` has four blocks. Those of queries, keys and values are called `q_proj`,
`k_proj` and `v_proj`, as they are in most models: PyTorch may keep their weights in one parameter,
and may use it for two or three of them at once, but their inputs are not the same in general. The
fourth is its layer `out_proj`.

An embedding and a linear layer may share a weight, as the first and the last layer of a language
model do. They are one block with the `W` of the linear layer, which the embedding applies turned.

The scale and shift of a normalisation are one column `W`, and its input is 1. So KFAC's block, of
`2 * channels` rows, is the exact one. It takes as much as a factor of that width for few
parameters, so it is made for normalisations that are named only.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Num
from torch import Tensor
from torch.nn import Embedding, Linear, Module, MultiheadAttention, Parameter
from torch.nn.functional import pad

from kfac_scratch.capture.layers import (
    LAYERS,
    NORMS,
    USES,
    check_layer,
    weight_matrix,
    weight_tensor,
    weight_view,
)


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
    layers: tuple[Any, ...]
    weight: str | None
    biases: dict[str, Tensor]

    @property
    def parts(self) -> tuple["LayerGroup", ...]:
        """The layers by the way in which they apply the weight, each with matrices of its own."""
        return (self,)

    @cached_property
    def kind(self) -> type[Module]:
        """The kind of layer, which says how the weight is used."""
        return _kind(self.layers[0])

    @cached_property
    def groups(self) -> int:
        """Number of matrices `W` side by side in the weight."""
        return int(getattr(self.layers[0], "groups", 1))

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters, trainable or not, that hold the weights."""
        return (self.layers[0].weight,)

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        weight = {} if self.weight is None else {self.weight: self.weights[0]}
        return weight | self.biases

    @property
    def dtype(self) -> torch.dtype:
        """The precision of rows and vectors, float32 at least."""
        return torch.promote_types(self.weights[0].dtype, torch.float32)

    def views(self) -> list[Num[Tensor, " d_out *d_in"]]:
        """The weight of every `W`, as a view of its parameter."""
        return [*weight_view(self.layers[0], self.weights[0].detach()).unbind()]

    @cached_property
    def names(self) -> list[str]:
        """Names of the blocks: one for each group."""
        return [self.name if self.groups == 1 else f"{self.name}[{i}]" for i in range(self.groups)]

    @cached_property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the trainable parameters."""
        return tuple(self.trainable)

    def bias_inputs(self, bias: str | None) -> list[float]:
        """The inputs of the bias columns where one bias is added: 1 for it, 0 for the others."""
        return [float(bias == name) for name in self.biases]

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

    def joined(self, Ws: list[Num[Tensor, "d_out d_in"]]) -> list[Num[Tensor, "d_out d_in"]]:
        """Values for the matrices of all parts (say, gradients), added up to one for each `W`."""
        return Ws


@dataclass(frozen=True, eq=False)
class TiedGroup(LayerGroup):
    """Linear layers, and embeddings that apply the same weight turned.

    The `W` is that of the linear layers.

    Attributes:
        direct: The linear layers.
        turned: The embeddings.
    """

    direct: LayerGroup
    turned: LayerGroup

    @property
    def parts(self) -> tuple[LayerGroup, ...]:
        """The linear layers, and the embeddings."""
        return (self.direct, self.turned)

    @cached_property
    def kind(self) -> type[Module]:
        """The linear layers' kind, as the `W` is theirs."""
        return Linear

    def matrices(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Arrange values of the parameters as the `W` of the linear layers."""
        return self.direct.matrices(values)

    def parameters(self, Ws: list[Tensor]) -> dict[str, Tensor]:
        """The values of the parameters, given `W`: the inverse of `matrices`."""
        return self.direct.parameters(Ws)

    def joined(self, Ws: list[Tensor]) -> list[Tensor]:
        """The sum of both matrices, the second one turned."""
        W, other = Ws
        return [W + pad(other.mT, (0, len(self.biases)))]


@dataclass(frozen=True, eq=False)
class InProjection(LayerGroup):
    """The projections to queries, keys and values of an `nn.MultiheadAttention`.

    Attributes:
        held: Names and values of the trainable weights: one parameter for all three projections,
            or three, or none if they are frozen.
    """

    held: dict[str, Tensor]

    @cached_property
    def kind(self) -> type[Module]:
        """As it is used by `F.multi_head_attention_forward`."""
        return Linear

    @cached_property
    def groups(self) -> int:
        """Queries, keys and values."""
        return 3

    @cached_property
    def names(self) -> list[str]:
        """Names as for layers in the attention module."""
        prefix = self.name and f"{self.name}."
        return [f"{prefix}{x}_proj" for x in "qkv"]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The parameters, trainable or not, that hold the weights."""
        return _in_projection_weights(self.layers[0])

    @property
    def trainable(self) -> dict[str, Tensor]:
        """The trainable parameters by name."""
        return self.held | self.biases

    def views(self) -> list[Tensor]:
        """The weight of every `W`, as a view of its parameter."""
        return self._apart([w.detach() for w in self.weights])

    def matrices(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Arrange values of the parameters as `W` of queries, keys and values."""
        columns = [self._apart([values[name] for name in self.held])] if self.held else []
        columns += [list(values[name].reshape(3, -1, 1)) for name in self.biases]
        return [torch.cat(of_matrix, dim=-1) for of_matrix in zip(*columns, strict=True)]

    def parameters(self, Ws: list[Tensor]) -> dict[str, Tensor]:
        """The values of the parameters, given the three `W`: the inverse of `matrices`."""
        values = {}
        for name in self.biases:
            values[name] = torch.cat([W[:, -1] for W in Ws])
            Ws = [W[:, :-1] for W in Ws]
        weights = [torch.cat(Ws)] if len(self.held) == 1 else Ws
        return values | dict(zip(self.held, weights, strict=True)) if self.held else values

    def _apart(self, weights: list[Tensor]) -> list[Tensor]:
        return list(weights[0].unflatten(0, (3, -1))) if len(weights) == 1 else weights


@dataclass(frozen=True, eq=False)
class ScaleGroup(LayerGroup):
    """The scale and shift of a normalisation, one behind the other, as one column `W`."""

    def views(self) -> list[Tensor]:
        """The scale."""
        return [self.weights[0].detach()]

    def matrices(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Arrange values of the parameters as one column."""
        return [torch.cat([values[n].flatten() for n in self.parameter_names]).unsqueeze(1)]

    def parameters(self, Ws: list[Tensor]) -> dict[str, Tensor]:
        """The values of the parameters, given the column: the inverse of `matrices`."""
        names, shape = self.parameter_names, self.weights[0].shape
        parts = Ws[0].reshape(len(names), *shape)
        return dict(zip(names, parts, strict=True))


def layer_groups(model: Module, layers: Collection[str] | None = None) -> list[LayerGroup]:
    """All blocks of a model, or those of the named layers.

    Args:
        model: Any module.
        layers: Names, as in `model.named_modules()`, of the layers to cover. Default: all
            supported layers with a trainable parameter of their own, but for normalisations.

    Raises:
        ValueError: If a name is unknown, a layer has no trainable parameters, or two blocks share
            a bias or a name.
        NotImplementedError: If a named layer is of an unsupported kind, or layers share a weight
            in ways that no single `W` describes.
    """
    chosen = default_layers(model) if layers is None else _named(model, layers)
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    by_weight: dict[int, dict[str, Module]] = {}
    for name, layer in chosen.items():
        by_weight.setdefault(id(_weights(layer)[0]), {})[name] = layer
    groups = [_shared(family, trainable) for family in by_weight.values()]
    frozen = [group.name for group in groups if not group.parameter_names]
    groups = [group for group in groups if group.parameter_names]
    if layers is not None and frozen:
        raise ValueError(
            f"Layer {frozen[0]!r} has no trainable parameter: leave it out of layers=[...]."
        )
    _check_names(groups)
    owners: dict[str, str] = {}
    for group in groups:
        for bias in group.biases:
            if owners.setdefault(bias, group.name) != group.name:
                raise ValueError(
                    f"Layers {owners[bias]!r} and {group.name!r} share the bias {bias!r} but not "
                    "their weight, so it belongs to two blocks: freeze it, or leave both layers "
                    "out with layers=[...]."
                )
    return groups


def parts_of(groups: list[LayerGroup]) -> list[LayerGroup]:
    """The parts of all groups: layers that apply one weight in one way."""
    return [part for group in groups for part in group.parts]


def groups_of(model: Module, blocks: Collection[str]) -> list[LayerGroup]:
    """The groups of layers that some blocks belong to.

    Args:
        model: The module.
        blocks: Names of blocks; normalisations are among the groups only if they are named.
    """
    norms = [n for n, layer in model.named_modules() if isinstance(layer, NORMS) and n in blocks]
    groups = layer_groups(model)
    if norms:
        groups = layer_groups(model, [*layer_names(model, groups), *norms])
    return [group for group in groups if set(group.names) & set(blocks)]


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


def _kind(layer: Module) -> type[Module]:
    return next(kind for kind in (*LAYERS, *NORMS) if isinstance(layer, kind))


def parameters_of(layer: Module) -> list[Tensor]:
    """The parameters of a layer, trainable or not, that are in a block; none for other modules."""
    bias = "in_proj_bias" if isinstance(layer, MultiheadAttention) else "bias"
    weights = _weights(layer)
    found = (*weights, layer._parameters.get(bias)) if weights else ()
    return [p for p in found if p is not None]


def _weights(layer: Module) -> tuple[Tensor, ...]:
    """The parameters that hold a layer's weights: none for a kind that has no block."""
    if isinstance(layer, MultiheadAttention):
        found = _in_projection_weights(layer)
    elif isinstance(layer, (*LAYERS, *NORMS)):
        found = (layer._parameters.get("weight"),)
    else:
        return ()
    return found if all(isinstance(w, Parameter) for w in found) else ()


def _in_projection_weights(layer: Module) -> tuple[Any, ...]:
    """One parameter for queries, keys and values, or three if keys or values have other sizes."""
    names = [f"{x}_proj_weight" for x in "qkv"]
    if layer._parameters.get("in_proj_weight") is not None:
        names = ["in_proj_weight"]
    return tuple(layer._parameters.get(name) for name in names)


def _supported(modules: Iterable[tuple[str, Module]]) -> dict[str, Module]:
    return {name: layer for name, layer in modules if _weights(layer)}


def default_layers(model: Module) -> dict[str, Module]:
    """The layers that have blocks without being named: all supported ones but normalisations."""
    found = _supported(model.named_modules()).items()
    return {name: layer for name, layer in found if not isinstance(layer, NORMS)}


def _named(model: Module, layers: Collection[str]) -> dict[str, Module]:
    modules = dict(model.named_modules())
    supported = _supported(modules.items())
    for name in layers:
        if name not in modules:
            raise ValueError(f"The model has no layer {name!r}; it has {sorted(modules)}.")
        if name not in supported:
            kinds = ", ".join(kind.__name__ for kind in (*LAYERS, MultiheadAttention, *NORMS))
            raise NotImplementedError(
                f"Layer {name!r} is a {type(modules[name]).__name__}: only {kinds} with a weight "
                "that is a parameter (no parametrization) have a block."
            )
    return {name: layer for name, layer in supported.items() if name in layers}


def _shared(family: dict[str, Any], trainable: dict[int, str]) -> LayerGroup:
    (name, first), *others = family.items()
    if any(isinstance(layer, MultiheadAttention) for layer in family.values()):
        return _in_projection(family, trainable)
    if any(isinstance(layer, NORMS) for layer in family.values()):
        return _scale(family, trainable)
    for other, layer in family.items():
        check_layer(other, layer)
    words = {n: layer for n, layer in family.items() if isinstance(layer, Embedding)}
    linear = {n: layer for n, layer in family.items() if isinstance(layer, Linear)}
    if words and linear and len(words) + len(linear) == len(family):
        return _tied(family, linear, words, trainable)
    for other, layer in others:
        same_groups = getattr(layer, "groups", 1) == getattr(first, "groups", 1)
        if USES[_kind(layer)] is not USES[_kind(first)] or not same_groups:
            raise NotImplementedError(
                f"Layers {name!r} and {other!r} share a weight that one of them uses transposed "
                "or in other groups, so that no single W describes both: leave both out with "
                "layers=[...], or untie them."
            )
    biases = _by_name((layer._parameters.get("bias") for layer in family.values()), trainable)
    return LayerGroup(name, tuple(family.values()), trainable.get(id(first.weight)), biases)


def _tied(
    family: dict[str, Any],
    linear: dict[str, Any],
    words: dict[str, Any],
    trainable: dict[int, str],
) -> LayerGroup:
    direct, turned = _shared(linear, trainable), _shared(words, trainable)
    if direct.weight is None:
        return direct
    name, layers = next(iter(family)), tuple(family.values())
    return TiedGroup(name, layers, direct.weight, direct.biases, direct, turned)


def _by_name(parameters: Iterable[Any], trainable: dict[int, str]) -> dict[str, Tensor]:
    """Of some parameters the trainable ones, by name."""
    return {trainable[id(p)]: p for p in parameters if id(p) in trainable}


def _single(family: dict[str, Any], shared: str) -> tuple[str, Any]:
    """The one layer of a kind that may not share its weight.

    Raises:
        NotImplementedError: Naming the layers if there are several.
    """
    (name, layer), *others = family.items()
    if others:
        raise NotImplementedError(
            f"Layers {name!r} and {others[0][0]!r} share {shared}: leave both out with "
            "layers=[...], or untie them."
        )
    return name, layer


def _in_projection(family: dict[str, Any], trainable: dict[int, str]) -> InProjection:
    name, layer = _single(family, "the weights of queries, keys and values")
    held = _by_name(_weights(layer), trainable)
    if held and len(held) < len(_weights(layer)):
        raise NotImplementedError(
            f"Of the weights of layer {name!r} only {sorted(held)} are trainable: freeze all of "
            "its projections or none, or leave the layer out with layers=[...]."
        )
    biases = _by_name([layer._parameters.get("in_proj_bias")], trainable)
    return InProjection(name, (layer,), next(iter(held), None), biases, held)


def _scale(family: dict[str, Any], trainable: dict[int, str]) -> ScaleGroup:
    name, layer = _single(family, "a scale")
    biases = _by_name([layer._parameters.get("bias")], trainable)
    return ScaleGroup(name, (layer,), trainable.get(id(layer.weight)), biases)
