"""Which parameters an optimizer was given, and which blocks these make up."""

from collections.abc import Collection, Sequence
from typing import Any

from torch.nn import Module, Parameter

from kfac_scratch.capture.layer_groups import LayerGroup


def trainable(
    model: Module, groups: Sequence[dict[str, Any]], numbers: Collection[str]
) -> dict[str, Parameter]:
    """The parameters of some groups that require gradients, by their names in the model.

    Args:
        model: The module that they must belong to.
        groups: As in `torch.optim.Optimizer.param_groups`.
        numbers: Keys of the groups whose values must not be negative.

    Raises:
        ValueError: If a number is negative, or a parameter is not one of the model's.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in groups:
        for key in numbers:
            if not group[key] >= 0:
                raise ValueError(f"{key} must be at least 0, got {group[key]}.")
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"A parameter of shape {tuple(p.shape)} is not one of the model's."
                )
            if p.requires_grad:
                found[names[id(p)]] = p
    return found


def covered(groups: Sequence[LayerGroup], names: Collection[str]) -> list[LayerGroup]:
    """The blocks all of whose parameters are named. Blocks without a named one are left out.

    Raises:
        ValueError: If only a part of a block's parameters is named.
    """
    kept = []
    for group in groups:
        inside = [name in names for name in group.parameter_names]
        if any(inside) and not all(inside):
            raise ValueError(
                f"Of the parameters {list(group.parameter_names)} of block {group.name!r} only a "
                "part was given: give all of them, freeze those that shall stay as they are, or "
                "leave the layer out with layers=[...]."
            )
        if all(inside):
            kept.append(group)
    return kept
