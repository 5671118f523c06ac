"""Two ways from the calls of a layer to rows: KFAC-expand's and KFAC-reduce's.

Source: Eschenhagen et al. 2023 (arXiv:2311.00636), §3.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Embedding

from kfac_scratch.capture.calls import Call
from kfac_scratch.capture.layer_groups import LayerGroup, ScaleGroup
from kfac_scratch.capture.layers import with_ends
from kfac_scratch.one_hot import OneHot

T = TypeVar("T")


@dataclass(frozen=True)
class Flavour:
    """A pair of rules that make the `S` rows of a `LayerIO` from a layer's positions.

    There are two: `EXPAND`, in which every position is a row, and `REDUCE`, which averages inputs
    and sums vectors over positions to one row. `positions` says how many a row stands for.
    """

    inputs: Callable[[LayerGroup, list[Call]], list[Float[Tensor, "N S d_in"]]]
    outputs: Callable[[LayerGroup, list[Call], list[Tensor]], list[Float[Tensor, "V N S d_out"]]]
    positions: Callable[[LayerGroup, list[Call]], list[int]]


def by_matrix(group: LayerGroup, calls: list[Call], values: Sequence[Sequence[T]]) -> list[list[T]]:
    """For every matrix `W` of a group its values of all calls that use it.

    Args:
        group: The layers.
        calls: Their calls.
        values: For each call, one value for each matrix that it uses, or one for all of these.
    """
    found: list[list[T]] = [[] for _ in range(group.groups)]
    for call, of_call in zip(calls, values, strict=True):
        for i, number in enumerate(call.matrices):
            found[number].append(of_call[i if len(of_call) > 1 else 0])
    return found


def _joined(tensors: list[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _expanded_inputs(group: LayerGroup, calls: list[Call]) -> list[Float[Tensor, "N S d_in"]]:
    if isinstance(group, ScaleGroup):
        return [calls[0].rows()[0]]
    if group.kind is Embedding:
        return [_joined_words(calls)]
    rows = []
    for call in calls:
        row = _of_trainable(group, call.rows(group.bias_inputs(call.bias)))
        rows.append(row.unbind())
    return [_joined(of_matrix, 1) for of_matrix in by_matrix(group, calls, rows)]


def _of_trainable(group: LayerGroup, row: Tensor) -> Tensor:
    """The columns of trainable parameters: those of biases alone if the weight is frozen."""
    return row if group.weight is not None else row[..., -len(group.biases) :]


def _joined_words(calls: list[Call]) -> OneHot:
    """The one-hot rows of all calls of an embedding."""
    rows = [call.one_hot_rows() for call in calls]
    return OneHot(torch.cat([r.columns for r in rows], 1), rows[0].shape[-1], rows[0].dtype)


def _expanded_outputs(
    group: LayerGroup, calls: list[Call], gs: list[Tensor]
) -> list[Float[Tensor, "V N S d_out"]]:
    if isinstance(group, ScaleGroup):
        return _summed_outputs(group, calls, gs)
    rows = [c.vectors(g).unbind() for c, g in zip(calls, gs, strict=True)]
    return [_joined(of_matrix, 2) for of_matrix in by_matrix(group, calls, rows)]


def _averaged_inputs(group: LayerGroup, calls: list[Call]) -> list[Float[Tensor, "N 1 d_in"]]:
    if isinstance(group, ScaleGroup):
        return [calls[0].rows()[0]]
    means = []
    for call in calls:
        row, S = call.averaged_rows()
        row = _of_trainable(group, with_ends(row, group.bias_inputs(call.bias)))
        means.append([(mean, S) for mean in row.unbind()])
    return [_mean(of_matrix) for of_matrix in by_matrix(group, calls, means)]


def _mean(parts: list[tuple[Tensor, int]]) -> Tensor:
    """The mean over all positions, from means over some and their numbers."""
    if len(parts) == 1:
        return parts[0][0]
    total = torch.stack([S * mean for mean, S in parts]).sum(0)
    return total / sum(S for _, S in parts)


def _summed_outputs(
    group: LayerGroup, calls: list[Call], gs: list[Tensor]
) -> list[Float[Tensor, "V N 1 d_out"]]:
    vectors = [c.vectors(g) for c, g in zip(calls, gs, strict=True)]
    sums = [
        (g if g.shape[3] == 1 else g.sum(3, keepdim=True, dtype=group.dtype)).unbind()
        for g in vectors
    ]
    return [
        of_matrix[0] if len(of_matrix) == 1 else torch.stack(of_matrix).sum(0)
        for of_matrix in by_matrix(group, calls, sums)
    ]


def _all_positions(group: LayerGroup, calls: list[Call]) -> list[int]:
    if isinstance(group, ScaleGroup):
        return [1]
    counts = [[call.positions] for call in calls]
    return [sum(of_matrix) for of_matrix in by_matrix(group, calls, counts)]


def _one_position(group: LayerGroup, calls: list[Call]) -> list[int]:
    return [1] * group.groups


EXPAND = Flavour(_expanded_inputs, _expanded_outputs, _one_position)
"""KFAC-expand: every position is a row, as if it were another sample.

The rows of an embedding are `OneHot`: they are kept as the words' numbers.
"""

REDUCE = Flavour(_averaged_inputs, _summed_outputs, _all_positions)
"""KFAC-reduce: one row per sample, with mean inputs and summed vectors over positions.

The rows of an embedding are counts of words, formed in full: memory `N * d_in`, and `d_in**2` for
KFAC's `A`. For a large vocabulary, use EXPAND.

Use it for `kfac` and what keeps its factors: `foof`, `skfac`, `randomized`, `Brand`. Approximations
of the gradients of samples refuse it where a layer has several positions; see `ekfac_reduce`.
"""
