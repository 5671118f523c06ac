"""Which parameters an optimizer moves, and in which blocks, as model and groups are at a time.

Parameters may be frozen, unfrozen, added and removed while training goes on. An arrangement is a
value: when the model or the groups have changed, a new one takes its place.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from kfac_scratch.capture.layer_groups import (
    LayerGroup,
    TiedGroup,
    default_layers,
    layer_groups,
    layer_names,
    parameters_of,
)
from kfac_scratch.optimizer.parameter_groups import covered, trainable


@dataclass(frozen=True)
class BlockShape:
    """The parameters that a block's matrix is for, with the shape and the dtype of their `W`.

    `layer` is the kind of its layers: `Linear`, `Conv2d`, `Embedding`.
    """

    parameters: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    layer: str


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The parameters that are moved, and their blocks.

    Attributes:
        trained: All given parameters that require gradients, by name.
        blocks: The blocks that they make up.
        layers: Names of the layers in these.
        shapes: What each block's matrix is for, by the block's name.
        seen: The model and the groups for which it holds, to be compared.
        held: All parameters in `seen`, so that their ids stay theirs.
    """

    trained: dict[str, Parameter]
    blocks: list[LayerGroup]
    layers: list[str]
    shapes: dict[str, BlockShape]
    seen: tuple[Any, ...]
    held: list[Parameter]

    @property
    def preconditioned(self) -> dict[str, Parameter]:
        """The parameters in blocks, by name."""
        names = {name for block in self.blocks for name in block.parameter_names}
        return {name: p for name, p in self.trained.items() if name in names}


@dataclass(frozen=True, eq=False)
class Slopes:
    """The gradients that a step is for.

    Attributes:
        all: By name, of all parameters that have one; the others stay as they are.
        blocks: The blocks in which a parameter has one.
        parameters: The parameters in blocks, by name, with or without a gradient.
    """

    all: dict[str, Tensor]
    blocks: list[LayerGroup]
    parameters: dict[str, Parameter]


def slopes(arrangement: Arrangement) -> Slopes:
    """The gradients as they are."""
    found = {n: p.grad for n, p in arrangement.trained.items() if p.grad is not None}
    blocks = [b for b in arrangement.blocks if any(n in found for n in b.parameter_names)]
    return Slopes(found, blocks, arrangement.preconditioned)


def arranged(
    model: Module, groups: Sequence[dict[str, Any]], layers: Collection[str] | None
) -> Arrangement:
    """The arrangement for a model and groups as they are.

    Args:
        model: The module.
        groups: As `torch.optim.Optimizer.param_groups`. Those with a key `rest` belong to the
            optimizer of the rest.
        layers: Names of the layers that may have blocks. Default: all supported ones.

    Raises:
        ValueError: If a parameter is not one of the model's, only a part of a block's parameters
            is given, or a parameter has no block and no rule.
    """
    trained = trainable(model, groups, ())
    blocks = covered(layer_groups(model, _with_parameters(model, layers)), trained)
    _check_untied(blocks)
    values = {name: p.detach() for name, p in model.named_parameters()}
    found = Arrangement(
        trained,
        blocks,
        layer_names(model, blocks),
        {
            name: BlockShape(block.parameter_names, tuple(W.shape), W.dtype, block.kind.__name__)
            for block in blocks
            for name, W in zip(block.names, block.matrices(values), strict=True)
        },
        seen(model, groups),
        [*model.parameters(), *(p for group in groups for p in group["params"])],
    )
    of_rest = {id(p) for group in groups if "rest" in group for p in group["params"]}
    ours = found.preconditioned
    lost = [n for n, p in trained.items() if n not in ours and id(p) not in of_rest]
    if lost:
        raise ValueError(
            f"No block covers the parameters {lost}: pass rest=lambda params: "
            "torch.optim.AdamW(params, lr=1e-3), say, or do not give them to the optimizer."
        )
    return found


def _check_untied(blocks: Sequence[LayerGroup]) -> None:
    """Refuse a weight that is applied as `W` and as its transpose.

    Raises:
        NotImplementedError: Naming the layers and the ways out.
    """
    for block in blocks:
        if isinstance(block, TiedGroup):
            raise NotImplementedError(
                f"Layers {block.direct.name!r} and {block.turned.name!r} share a weight that one "
                "of them applies turned. Its KFAC is a sum of two Kronecker products, of which the "
                "optimizer keeps no averages and no inverse. Leave both out with layers=[...] and "
                "pass rest=lambda params: torch.optim.AdamW(params, lr=1e-3), say, or untie them."
            )


def seen(model: Module, groups: Sequence[Mapping[str, Any]]) -> tuple[Any, ...]:
    """The ids and flags that an arrangement depends on, to be compared."""
    return (
        [(id(p), p.requires_grad, p.dtype) for p in model.parameters()],
        [(id(p), "rest" in group) for group in groups for p in group["params"]],
    )


def check_known(model: Module, known: Sequence[Parameter]) -> None:
    """Refuse trainable parameters that came to the model after its optimizer was built.

    Raises:
        ValueError: Naming them and the way out.
    """
    ids = {id(p) for p in known}
    new = [n for n, p in model.named_parameters() if id(p) not in ids and p.requires_grad]
    if new:
        raise ValueError(
            f"The parameters {new} came to the model after the optimizer was built, which does not "
            "train them: call optimizer.add_param_group({'params': [...]}), freeze them, or build "
            "a new optimizer."
        )


def coverable(model: Module, layers: Collection[str] | None) -> set[int]:
    """The ids of all parameters that are in a block as soon as they are trainable."""
    chosen = default_layers(model) if layers is None else layers
    modules = (layer for name, layer in model.named_modules() if name in chosen)
    return {id(p) for layer in modules for p in parameters_of(layer)}


def _with_parameters(model: Module, layers: Collection[str] | None) -> Collection[str] | None:
    """The layers that are not frozen as a whole."""
    if layers is None:
        return None
    modules = dict(model.named_modules())
    frozen = {
        name
        for name in layers
        if name in modules and not any(p.requires_grad for p in modules[name].parameters(False))
    }
    return [name for name in layers if name not in frozen]
