"""The calls of layers in one forward pass, and where the samples are in what a layer gets.

Forward hooks record what enters each layer and what leaves it. A hook records the calls of its own
thread only, and it comes before the user's own hooks, so that what these make of an output counts
as what follows the layer.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor
from torch.nn import Embedding, Module

from kfac_scratch.capture.layer_groups import LayerGroup
from kfac_scratch.capture.layers import (
    Convolution,
    Layer,
    averaged_rows,
    input_rows,
    one_hot_rows,
    output_rows,
    positions,
)
from kfac_scratch.one_hot import OneHot


@dataclass(frozen=True)
class Axis:
    """The place of the samples in a layer's input and output.

    Axis `axis` has `outer * N * inner` entries: `inner` neighbours belong to one sample, and every
    sample has `outer` such runs. Frames `[N * T, C, H, W]` of films have `inner = T`; positions
    that come first, `[S * N, d]`, have `outer = S`.
    """

    axis: int = 0
    outer: int = 1
    inner: int = 1

    def in_front(self, x: Tensor, start: int = 0) -> Tensor:
        """This axis before the others, which begin at `start`."""
        return x if self.axis == 0 else x.movedim(start + self.axis, start)

    def by_sample(self, rows: Tensor, at: int) -> Tensor:
        """Rows `[..., outer * N * inner, S, d]` as `[..., N, outer * inner * S, d]`.

        Args:
            rows: The axis of the samples is number `at`, and that of the positions the next.
            at: Its number.
        """
        if self.outer * self.inner == 1:
            return rows
        rows = rows.unflatten(at, (self.outer, -1, self.inner)).movedim(at + 1, at)
        return rows.flatten(at + 1, at + 3)


@dataclass(frozen=True, eq=False)
class Call:
    """One use of a layer in a forward pass.

    Attributes:
        layer: The layer.
        x: Its input.
        version: That of `x` when the layer read it.
        z: Its output.
        axis: Where the samples are.
    """

    layer: Layer
    x: Tensor
    version: int
    z: Tensor
    axis: Axis = field(default=Axis())

    @property
    def leading(self) -> range:
        """Axes of the output whose entries are rows; the samples are in one of them."""
        return range(1 if isinstance(self.layer, Convolution) else self.z.ndim - 1)

    @property
    def positions(self) -> int:
        """The number of positions of every sample."""
        z = self.axis.in_front(self.z)
        return self.axis.outer * self.axis.inner * positions(self.layer, z)

    def rows(self, ends: Sequence[float] = ()) -> Float[Tensor, "groups N S d_in"]:
        """`input_rows` by sample."""
        rows = input_rows(self.layer, self.axis.in_front(self.x), ends)
        return self.axis.by_sample(rows, 1)

    def one_hot_rows(self) -> OneHot:
        """`rows` of an embedding, not formed."""
        rows = one_hot_rows(cast(Embedding, self.layer), self.axis.in_front(self.x))
        columns = self.axis.by_sample(rows.columns.unsqueeze(-1), 0).squeeze(-1)
        return OneHot(columns, rows.shape[-1], rows.dtype)

    def averaged_rows(self) -> tuple[Float[Tensor, "groups N 1 d_in"], int]:
        """The mean of `rows` over positions, and how many there are."""
        rows, S = averaged_rows(self.layer, self.axis.in_front(self.x))
        rows = self.axis.by_sample(rows, 1)
        return rows.mean(2, keepdim=True) if rows.shape[2] > 1 else rows, S * rows.shape[2]

    def vectors(self, g: Float[Tensor, "V ..."]) -> Float[Tensor, "groups V N S d_out"]:
        """Vectors at the output, in the order of `rows`."""
        return self.axis.by_sample(output_rows(self.layer, self.axis.in_front(g, 1)), 2)


Calls = dict[str, list[Call]]
"""The calls of all layers in one forward pass, by the name of their group."""


def recorded(model: Module, X: Any, groups: list[LayerGroup]) -> tuple[Any, Calls]:
    """The output of a model, and the calls of all layers by the group's name.

    Nothing is left behind, also after an exception: hooks are gone.
    """
    calls: Calls = {group.name: [] for group in groups}
    thread = get_ident()
    with ExitStack() as hooks:
        for group in groups:
            record = partial(_record, thread, calls[group.name])
            for layer in group.layers:
                handle = layer.register_forward_hook(record, prepend=True, with_kwargs=True)
                hooks.callback(handle.remove)
        f = model(X)
    return f, calls


def _record(
    thread: int,
    calls: list[Call],
    layer: Layer,
    args: tuple[Any, ...],
    *rest: Any,
) -> Tensor | None:
    """Keep what entered and left a layer in the capturing thread; others are not ours.

    The rest is the keyword arguments and the output. Another thread that calls the model while the
    hook is being registered or removed passes the output alone.
    """
    if get_ident() != thread:
        return None
    kwargs, output = rest
    x = args[0] if args else kwargs["input"]
    calls.append(Call(layer, x.detach(), x._version, output))
    return output.clone()  # the next layer may write into its input
