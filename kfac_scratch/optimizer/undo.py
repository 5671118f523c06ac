"""Undoing a step: functions that write back what was there before.

Each function here keeps old values, and returns the function that restores them. An `ExitStack`
calls these in reverse order if anything raises, an interrupt from the keyboard included:

    with ExitStack() as undo:
        undo.callback(kept_values(parameters))
        ...  # change parameters, and whatever may raise
        undo.pop_all()  # the step stands
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

Undo = Callable[[], object]


def kept_values(parameters: Iterable[Tensor]) -> Undo:
    """Restore the values of some parameters. Memory: one copy of them."""
    return partial(_set_values, [(p, p.detach().clone()) for p in parameters])


def kept_state(state: MutableMapping[Any, Any], written: Iterable[Any]) -> Undo:
    """Restore the state of an optimizer.

    Args:
        state: From parameters to their states, each of which is replaced when it changes.
        written: Parameters whose states are written in place, of which a copy is kept.
    """
    kept = dict(state) | {p: copied(state[p]) for p in written if p in state}
    return partial(_set_items, state, kept)


def kept_groups(groups: list[dict[str, Any]]) -> Undo:
    """Restore the numbers in parameter groups, and which groups and parameters there are."""
    kept = [(group, group | {"params": list(group["params"])}) for group in groups]
    return partial(_set_groups, groups, kept)


def kept_draws(generator: Generator | None) -> Undo:
    """Restore the state of a source of randomness."""
    return nothing if generator is None else partial(generator.set_state, generator.get_state())


def nothing() -> None:
    """An undo where nothing was changed."""


def _set_values(kept: list[tuple[Tensor, Tensor]]) -> None:
    with torch.no_grad():
        for p, value in kept:
            p.copy_(value)


def _set_items(items: MutableMapping[Any, Any], kept: Mapping[Any, Any]) -> None:
    items.clear()
    items.update(kept)


def _set_groups(
    groups: list[dict[str, Any]], kept: list[tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    groups[:] = [group for group, _ in kept]
    for group, values in kept:
        _set_items(group, values)


def default_generator(device: torch.device) -> Generator | None:
    """PyTorch's global source of randomness for a device, None for devices of other kinds."""
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return None


def copied(value: Any) -> Any:
    """A copy of a state that shares no tensor, dictionary or list with it."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(part) for part in value)
    return value
