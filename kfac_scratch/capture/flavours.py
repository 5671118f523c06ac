"""Two ways from the calls of a layer to rows: KFAC-expand's and KFAC-reduce's.

Source: Eschenhagen et al. 2023 (arXiv:2311.00636), §3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Embedding

from kfac_scratch.capture.calls import Call
from kfac_scratch.capture.layer_groups import LayerGroup
from kfac_scratch.capture.layers import row_dtype
from kfac_scratch.one_hot import OneHot


@dataclass(frozen=True)
class Flavour:
    """A pair of rules that make the `S` rows of a `LayerIO` from a layer's positions.

    There are two: `EXPAND`, in which every position is a row, and `REDUCE`, which averages inputs
    and sums vectors over positions to one row. `positions` says how many a row stands for.
    """

    inputs: Callable[[LayerGroup, list[Call]], list[Float[Tensor, "N S d_in"]]]
    outputs: Callable[[list[Call], list[Tensor]], Float[Tensor, "groups V N S d_out"]]
    positions: Callable[[list[Call]], int]


def _expanded_inputs(group: LayerGroup, calls: list[Call]) -> list[Float[Tensor, "N S d_in"]]:
    if isinstance(group.layers[0], Embedding):
        return [_joined_words(calls)]
    rows = []
    for call in calls:
        ends = group.bias_inputs(call.layer)
        row = call.rows(ends)
        rows.append(row if group.weight is not None else row[..., -len(ends) :])
    return list(rows[0] if len(rows) == 1 else torch.cat(rows, dim=2))


def _joined_words(calls: list[Call]) -> OneHot:
    """The one-hot rows of all calls of an embedding."""
    rows = [call.one_hot_rows() for call in calls]
    return OneHot(torch.cat([r.columns for r in rows], 1), rows[0].shape[-1], rows[0].dtype)


def _expanded_outputs(calls: list[Call], gs: list[Tensor]) -> Float[Tensor, "groups V N S d_out"]:
    rows = [c.vectors(g) for c, g in zip(calls, gs, strict=True)]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=3)


def _averaged_inputs(group: LayerGroup, calls: list[Call]) -> list[Float[Tensor, "N 1 d_in"]]:
    means, counts = [], []
    for call in calls:
        row, S = call.averaged_rows()
        ends = row.new_tensor(group.bias_inputs(call.layer)).expand(*row.shape[:-1], -1)
        means.append(torch.cat([row, ends] if group.weight is not None else [ends], dim=-1))
        counts.append(S)
    if len(means) == 1:
        return list(means[0])
    sums = [S * mean for S, mean in zip(counts, means, strict=True)]
    return list(torch.stack(sums).sum(0) / sum(counts))


def _summed_outputs(calls: list[Call], gs: list[Tensor]) -> Float[Tensor, "groups V N 1 d_out"]:
    sums = [
        c.vectors(g).sum(3, keepdim=True, dtype=row_dtype(c.layer))
        for c, g in zip(calls, gs, strict=True)
    ]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)


def _all_positions(calls: list[Call]) -> int:
    return sum(call.positions for call in calls)


EXPAND = Flavour(_expanded_inputs, _expanded_outputs, lambda calls: 1)
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
