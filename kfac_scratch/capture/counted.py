"""Positions that are part of the data, and those that are padding.

Sentences of different lengths make a rectangle when the short ones are padded with a token that
stands for nothing, and the loss ignores what the model says there. Then no gradient depends on
these positions, but KFAC's `A`, a mean over all positions, does: it gets worse the more of them
there are, and changes with the token. A mask of the others mends both.

The mask is not believed. A vector that is not zero where nothing is counted is refused.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kfac_scratch.border import check_result
from kfac_scratch.capture.calls import Call
from kfac_scratch.capture.flavours import EXPAND, Flavour, by_matrix
from kfac_scratch.capture.layer_groups import LayerGroup, ScaleGroup
from kfac_scratch.layer_io import counted_mean
from kfac_scratch.one_hot import OneHot

Counted = Callable[[Any, Tensor], Tensor]
"""From a batch `(X, y)` to a mask `[N, T]` of the positions that are part of the data."""


def mask_of_batch(counted: Counted | None, X: Any, y: Tensor, f: Tensor) -> Tensor | None:
    """The mask of a batch, on the device of its output; None if all positions are counted.

    Raises:
        TypeError: If it is not a tensor of booleans.
        ValueError: If it is not `[N, T]`.
    """
    if counted is None:
        return None
    mask = counted(X, y)
    check_result("counted", mask, Tensor, "a mask, a tensor of booleans of shape [N, T]")
    if mask.dtype != torch.bool:
        raise TypeError(f"counted must return a mask of booleans, not of {mask.dtype}.")
    if mask.ndim != 2 or len(mask) != len(f):
        raise ValueError(
            f"The mask of counted has shape {tuple(mask.shape)}, not [N, T] with N = {len(f)} "
            "samples and their T positions."
        )
    return mask.detach().to(f.device)


def check_some_layer_has(mask: Tensor | None, calls: list[Call]) -> None:
    """Refuse a mask whose number of positions no layer has.

    Raises:
        ValueError: With the numbers that layers have.
    """
    found = sorted({call.positions for call in calls})
    if mask is not None and mask.shape[1] not in found:
        raise ValueError(
            f"The mask of counted has T = {mask.shape[1]} positions, but no layer has so many: "
            f"theirs are {found}."
        )


def counted_positions(
    group: LayerGroup, calls: list[Call], mask: Bool[Tensor, "N T"]
) -> list[Bool[Tensor, "N S"]]:
    """The mask of the rows of each matrix `W` of a group.

    Calls with another number of positions than the mask have all of theirs counted.
    """
    if isinstance(group, ScaleGroup):  # whose vectors are summed over positions
        return [mask.new_ones(len(mask), 1)]
    T = mask.shape[1]
    of_calls = [
        [mask if call.positions == T else mask.new_ones(len(mask), call.positions)]
        for call in calls
    ]
    return [torch.cat(of_matrix, 1) for of_matrix in by_matrix(group, calls, of_calls)]


def counted_rows(
    flavour: Flavour, group: LayerGroup, calls: list[Call], mask: Bool[Tensor, "N T"]
) -> list[tuple[Float[Tensor, "N S d_in"], Bool[Tensor, "N S"]]]:
    """The rows of a group with zeros where they are not counted, and which of them are.

    `REDUCE` has the mean of the counted rows, which are formed for it.
    """
    rows = zip(EXPAND.inputs(group, calls), counted_positions(group, calls, mask), strict=True)
    if flavour is EXPAND:
        return [(_zeroed(a, counted), counted) for a, counted in rows]
    return [counted_mean(_zeroed(a, counted), counted) for a, counted in rows]


def _zeroed(a: Tensor, counted: Bool[Tensor, "N S"]) -> Tensor:
    if isinstance(a, OneHot):
        return OneHot(a.columns.where(counted, -1), a.shape[-1], a.dtype)
    return a.where(counted.unsqueeze(-1), 0.0)


def check_unreached(
    group: LayerGroup, calls: list[Call], gs: list[Tensor], mask: Bool[Tensor, "N T"]
) -> None:
    """Refuse vectors at positions that are not counted.

    Raises:
        ValueError: Naming the layer, the sample, the position and the way out.
    """
    expanded = EXPAND.outputs(group, calls, gs)
    for g, counted in zip(expanded, counted_positions(group, calls, mask), strict=True):
        reached = (g != 0).any(3).any(0) & ~counted
        if reached.any():
            n, s = reached.nonzero()[0].tolist()
            raise ValueError(
                f"Position {s} of sample {n} is not counted, but the loss depends on what layer "
                f"{group.name!r} gives there: the loss must ignore it, and no other position may "
                "read it (in attention, pass key_padding_mask), or it must be counted."
            )
