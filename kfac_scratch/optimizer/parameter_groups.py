"""What an optimizer was given: its parameters and blocks, and the functions that make it up."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from inspect import isclass
from typing import Any

from torch.nn import Module, Parameter
from torch.optim import AdamW, Optimizer

from kfac_scratch.approximations.estimators import Estimator
from kfac_scratch.border import check_callable, check_function
from kfac_scratch.capture.layer_groups import LayerGroup

NUMBERS = ("lr", "momentum", "weight_decay", "damping")
EXAMPLE = "adapt_damping=levenberg_marquardt"
REST = "rest=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)"


def adamw(parameters: list[Parameter]) -> Optimizer:
    """AdamW with learning rate 3e-3 and without weight decay.

    Use it for the few parameters of norms and positions beside layers with curvature. Not where
    these carry the network: choose its numbers then, `rest=lambda ps: torch.optim.AdamW(ps, ...)`.

    Cost: two numbers for each parameter.
    """
    return AdamW(parameters, lr=3e-3, weight_decay=0.0)


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
    check_numbers(groups, numbers)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in groups:
        for p in group["params"]:
            if id(p) not in names:
                raise ValueError(
                    f"A parameter of shape {tuple(p.shape)} is not one of the model's. If a layer "
                    "was replaced, build a new optimizer."
                )
            if p.requires_grad:
                found[names[id(p)]] = p
    return found


def check_numbers(groups: Sequence[Mapping[str, Any]], numbers: Collection[str] = NUMBERS) -> None:
    """Refuse numbers out of range, before anything has changed. Groups of `rest` have their own.

    Raises:
        ValueError: Naming the number.
    """
    for group in groups:
        for key in numbers if "rest" not in group else ():
            if not group[key] >= 0:
                raise ValueError(f"{key} must be at least 0, got {group[key]}.")


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


def check_behaviour(
    approximation: object,
    invert: object,
    controls: object,
    adapt_damping: object,
    record: object,
    rest: object,
) -> None:
    """Refuse functions of the wrong kind when an optimizer is made, not at its first step.

    Raises:
        TypeError: Naming the argument, its value and the way out.
    """
    if not isinstance(approximation, Estimator) or isclass(approximation):
        check_function("approximation", approximation, "approximation=ekfac")
    check_function("invert", invert, "invert=factored_inverse")
    if callable(controls) or isinstance(controls, str) or not isinstance(controls, Iterable):
        name = getattr(controls, "__name__", repr(controls))
        raise TypeError(f"controls must be a list, for example controls=[graft()]; got {name}.")
    for control in controls:
        check_function("control", control, "controls=[graft()]")
    for name, function in (("adapt_damping", adapt_damping), ("record", record)):
        if function is not None:
            check_callable(name, function, {"record": "record=history.append"}.get(name, EXAMPLE))
    if isinstance(rest, Optimizer):
        raise TypeError(
            f"rest must make an optimizer from parameters, not be one: pass {REST} instead of a "
            f"{type(rest).__name__}."
        )
    if rest is not None and not isclass(rest):
        check_callable("rest", rest, REST)
