"""Capture: from a model and a batch to every layer's `LayerIO`.

Every function that uses a layer's weight is recorded, with what enters it and what leaves it; one
batched backward pass sends the loss's vectors from the model's output to all recorded outputs.
Nothing else is touched, also after an exception: no `.grad` is written, no parameter gradient is
computed, and modes and flags stay as they were. Threads may capture one model at the same time.

Rows and vectors have the precision of the parameters, and float32 at least: sums over many rows
and inverses need it. Under `torch.autocast`, whose parameters are in float32, nothing is lost by
it. A model whose parameters are in half precision has rounded its own vectors.

Memory: `N * S * d_in + V * N * S * d_out` numbers for each layer, besides the graph of one forward
pass. `stream` yields the vectors in chunks, so that `V` is bounded.

Source: Eschenhagen et al. 2023 (arXiv:2311.00636), §3, for both flavours.
"""

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import (
    check_count,
    check_function,
    check_instance,
    check_result,
    checked_names,
)
from kfac_scratch.capture.calls import Call, Calls, recorded, sent_back
from kfac_scratch.capture.counted import (
    Counted,
    check_some_layer_has,
    check_unreached,
    counted_rows,
    mask_of_batch,
)
from kfac_scratch.capture.flavours import EXPAND, Flavour
from kfac_scratch.capture.layer_groups import LayerGroup, TiedGroup, layer_groups, parts_of
from kfac_scratch.capture.plan import Plan, Plans, plan_of_groups
from kfac_scratch.capture.refusals import check_calls, check_model, check_output
from kfac_scratch.layer_io import LayerIO, TiedIO
from kfac_scratch.linalg import at_least_float32, stored_as_columns
from kfac_scratch.losses import BackpropagatedVectors, Vectors, type2


def layer_ios(
    model: Module,
    loss: Module,
    X: Any,
    y: Tensor,
    fisher: BackpropagatedVectors = type2,
    *,
    flavour: Flavour | None = None,
    layers: Collection[str] | None = None,
    chunk: int | None = None,
    plan: Plan | Plans | None = None,
    counted: Counted | None = None,
) -> dict[str, LayerIO]:
    """The `LayerIO` of every block of a model on one batch, by name (see `layer_groups`).

    Use it for one batch. Not for a whole data set, which `over_loader` takes batch by batch, and
    not if all vectors together do not fit into memory: `stream` yields them in parts.

    Cost: one forward pass and `V` reverse passes; memory `N * S * d_in + V * N * S * d_out` for
    each layer.

    It has many parameters, because it is the one door to a model: what to send back, how rows are
    made, which layers, and how much memory.

    Args:
        model: Any module; axis 0 of its output is the batch, or holds the positions of every
            sample, `[N * T, C]`. `fisher` gets such outputs as `[N, C, T]` for `CrossEntropyLoss`
            and as `[N, T, ...]` for other losses.
        loss: The loss module; `fisher` says for which losses it works.
        X: The model's input, with the batch on axis 0, see `plan`. In what a layer gets, the batch
            may be on any axis of its rows.
        y: Targets for the loss.
        fisher: The vectors that are sent backward, see `losses`. The default `type2` is exact; the
            default of the optimizer `KFAC` is one Monte Carlo vector.
        flavour: `EXPAND` (default): every position is a row. `REDUCE`: positions are averaged, and
            the result equals `io.reduced()` but no convolution's patches are ever formed.
        layers: Names of the layers to cover. Default: all supported ones; trainable parameters
            that this leaves out are named in a warning.
        chunk: How many vectors are sent backward at once. With 1, by plain autodiff without
            `torch.vmap`, which works for operations that cannot be batched. Default: as many as
            `default_chunk` allows, and 1 for a model with such an operation.
        plan: What `plan` found for batches of this kind, or `Plans`, which keeps what it has found.
            Default: found here, at the cost of `plan`.
        counted: From the batch to a mask `[N, T]` of the positions that are part of the data, for
            padded sentences: `counted=lambda X, y: X != pad`. It holds for layers with
            `T` positions of each sample; of others, all are counted. The rest of the positions is
            in no mean of an approximation. Default: all are counted.

    Raises:
        ValueError: For an empty batch, non-finite numbers, samples that meet each other, a
            model on another device than its input, batch statistics in training mode, a layer
            that never ran, and more: each names the layer and the way out.
        NotImplementedError: For layers and losses that are not covered.
    """
    parts = list(
        stream(
            *(model, loss, X, y, fisher),
            flavour=flavour,
            layers=layers,
            chunk=chunk,
            plan=plan,
            counted=counted,
        )
    )
    if len(parts) == 1:
        return parts[0]
    return {name: _with_all_vectors([part[name] for part in parts]) for name in parts[0]}


def stream(
    model: Module,
    loss: Module,
    X: Any,
    y: Tensor,
    fisher: BackpropagatedVectors = type2,
    *,
    flavour: Flavour | None = None,
    layers: Collection[str] | None = None,
    chunk: int | None = None,
    plan: Plan | Plans | None = None,
    counted: Counted | None = None,
) -> Iterator[dict[str, LayerIO]]:
    """The parts of `layer_ios`, of at most `chunk` vectors each; `a` is the same in all of them.

    Use it where an approximation is a sum over vectors, as KFAC's `B` is. Not where one needs all
    vectors of a sample together.

    Cost: as `layer_ios`, with `chunk` for `V` in the memory of a part. The vectors at the model's
    output are read by the part, so that those of `type2` are never all there. `layer_ios` describes
    the arguments.

    It has many parameters, because it has those of `layer_ios`.
    """
    run = forward_pass(
        *(model, loss, X, y, fisher),
        flavour=flavour,
        layers=layers,
        chunk=chunk,
        plan=plan,
        counted=counted,
    )
    rows = {group.name: run.rows(group) for group in run.groups}
    for part in run.sent_back():
        yield {
            name: io
            for group, gs in part
            for name, io in run.layer_ios(group, rows[group.name], gs).items()
        }


Rows = tuple[Float[Tensor, "N S d_in"], Bool[Tensor, "N S"] | None]
"""Rows that entered a layer, and which of them are part of the data, if not all."""


@dataclass(frozen=True, eq=False)
class ForwardPass:
    """A batch on its way through a model: the rows of every layer, and the vectors that go back.

    Use it to hold the rows and vectors of one layer at a time, as `over_loader` does. Not for all
    at once: `stream`.

    Cost: the graph of one forward pass, and the inputs and outputs of the layers.

    It has many parameters, because two functions go on with what one forward pass leaves.

    Attributes:
        flavour: The rules that make rows.
        groups: The layers.
        calls: Their uses, by the group's name.
        f: The model's output.
        vectors: The vectors that are sent back from it.
        chunk: How many at once; None for `default_chunk`.
        mask: Which positions are part of the data; None if all are.
    """

    flavour: Flavour
    groups: list[LayerGroup]
    calls: Calls
    f: Tensor
    vectors: Vectors
    chunk: int | None
    mask: Bool[Tensor, "N T"] | None = None

    def rows(self, group: LayerGroup) -> list[Rows]:
        """The rows that entered a group of layers, for each matrix of its parts."""
        return [rows for part in group.parts for rows in self._rows(part)]

    def _rows(self, part: LayerGroup) -> list[Rows]:
        calls = self.calls[part.name]
        with full_precision(self.f.device):
            if self.mask is None:
                return [(a, None) for a in self.flavour.inputs(part, calls)]
            return list(counted_rows(self.flavour, part, calls, self.mask))

    def layer_ios(
        self, group: LayerGroup, rows: list[Rows], gs: list[Float[Tensor, "V N S d_out"]]
    ) -> dict[str, LayerIO]:
        """The `LayerIO` of each block of a group, by name, from its rows and some vectors."""
        of_matrices = zip(rows, gs, self.positions(group), strict=True)
        ios = [LayerIO(a, g, S, counted) for (a, counted), g, S in of_matrices]
        if isinstance(group, TiedGroup):
            return {group.name: TiedIO(*ios)}
        return dict(zip(group.names, ios, strict=True))

    def vectors_by_block(
        self, group: LayerGroup, gs: list[Float[Tensor, "V N S d_out"]]
    ) -> dict[str, Any]:
        """The vectors of each block of a group, by name; a pair where a weight is tied."""
        if isinstance(group, TiedGroup):
            return {group.name: tuple(gs)}
        return dict(zip(group.names, gs, strict=True))

    def positions(self, group: LayerGroup) -> list[int]:
        """The number of positions that every row stands for, for each matrix of its parts."""
        return [
            S for part in group.parts for S in self.flavour.positions(part, self.calls[part.name])
        ]

    def sent_back(
        self,
    ) -> Iterator[Iterator[tuple[LayerGroup, list[Float[Tensor, "V N S d_out"]]]]]:
        """The vectors at all layers, in parts; of every part, one group of layers at a time."""
        calls = [call for part in parts_of(self.groups) for call in self.calls[part.name]]
        if self.chunk is None:
            parts = _batched_if_possible(self.f, calls, self.vectors)
        else:
            parts = _in_parts(self.f, calls, self.vectors, self.chunk)
        return (self._by_group(part) for part in parts)

    def _by_group(
        self, sent: list[Tensor]
    ) -> Iterator[tuple[LayerGroup, list[Float[Tensor, "V N S d_out"]]]]:
        for group in self.groups:
            gs = []
            for part in group.parts:
                calls = self.calls[part.name]
                received = [sent.pop(0) for _ in calls]
                if self.mask is not None:
                    check_unreached(part, calls, received, self.mask)
                gs += self.flavour.outputs(part, calls, received)
            yield group, [g.to(group.dtype) for g in gs]


def forward_pass(
    model: Module,
    loss: Module,
    X: Any,
    y: Tensor,
    fisher: BackpropagatedVectors = type2,
    *,
    flavour: Flavour | None = None,
    layers: Collection[str] | None = None,
    chunk: int | None = None,
    plan: Plan | Plans | None = None,
    counted: Counted | None = None,
) -> ForwardPass:
    """The first half of `layer_ios`, which describes the arguments: all that goes forward.

    Use it to go through the layers one by one. Not for a `LayerIO` of each: `layer_ios`.

    Cost: one forward pass.

    It has many parameters, because it has those of `layer_ios`.
    """
    flavour = EXPAND if flavour is None else flavour
    check_capture(model, loss, fisher, flavour, chunk, counted)
    if not isinstance(plan, Plans) and plan is not None:
        check_instance("plan", plan, Plan, "plan(model, X)")
    groups = layer_groups(model, checked_names("layers", layers))
    check_model(model, X, groups, layers)
    with torch.enable_grad():
        f, calls = recorded(model, X, parts_of(groups))
    check_calls(check_output(f), parts_of(groups), calls)
    if not isinstance(plan, Plan):
        plan = plan_of_groups(model, X, groups) if plan is None else plan.of(model, X, groups)
    f, y = plan.unflattened(loss, f, y, X)
    calls = plan.located(parts_of(groups), calls, len(f))
    with full_precision(f.device):
        vectors = fisher(loss, at_least_float32(f), y)
    check_vectors(vectors, f)
    mask = mask_of_batch(counted, X, y, f)
    check_some_layer_has(mask, [call for part in parts_of(groups) for call in calls[part.name]])
    return ForwardPass(flavour, groups, calls, f, vectors, chunk, mask)


def check_capture(
    model: object,
    loss: object,
    fisher: object,
    flavour: object,
    chunk: object = None,
    counted: object = None,
) -> None:
    """Refuse arguments of the wrong kind before anything runs.

    Raises:
        TypeError: Naming the argument, its value and the way out.
        ValueError: If the chunk is below 1.
    """
    check_instance("model", model, Module, "nn.Sequential(...)")
    check_instance("loss", loss, Module, "nn.CrossEntropyLoss()")
    check_function("fisher", fisher, "fisher=type2")
    check_instance("flavour", flavour, Flavour, "flavour=REDUCE (or EXPAND)")
    if chunk is not None:
        check_count("chunk", chunk)
    if counted is not None:
        check_function("counted", counted, "counted=lambda X, y: X != pad")


def check_vectors(vectors: Vectors, f: Tensor) -> None:
    """Refuse what a Fisher returned if it is no stack of vectors for the model's output.

    Raises:
        TypeError: If it has no length, shape or slices.
        ValueError: If its shape is not that of the output behind the number of vectors, or it has
            none.
    """
    check_result("fisher", vectors, Vectors, f"vectors, a tensor of shape [V, *{[*f.shape]}]")
    if len(vectors) == 0 or vectors.shape[1:] != f.shape:
        raise ValueError(
            f"The vectors of fisher have shape {tuple(vectors.shape)}, not [V, *{tuple(f.shape)}] "
            "with at least one vector."
        )


def _read(vectors: Vectors, part: slice, f: Tensor) -> Float[Tensor, "V N ..."]:
    with full_precision(f.device):
        read = vectors[part]
    check_result("fisher", read, Tensor, "vectors whose slices are tensors")
    return read.to(f.dtype)


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Suspend autocast, so that rows, vectors and factors keep their precision."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()  # every layer asks, and the other one takes ten times as long
    return torch.autocast(device.type, enabled=False)


def _with_all_vectors(ios: list[LayerIO]) -> LayerIO:
    """A layer with the vectors of several parts of `stream`."""
    if isinstance(first := ios[0], TiedIO):
        tied = [io for io in ios if isinstance(io, TiedIO)]
        return TiedIO(
            _with_all_vectors([io.direct for io in tied]),
            _with_all_vectors([io.turned for io in tied]),
        )
    return replace(first, g=_joined([io.g for io in ios]))


def _joined(gs: list[Tensor]) -> Float[Tensor, "V N S d_out"]:
    """Concatenate along V; rows that are stored as columns (of convolutions) stay so."""
    return torch.cat([g.mT for g in gs]).mT if stored_as_columns(gs[0]) else torch.cat(gs)


def default_chunk(outputs: list[Tensor]) -> int:
    """The number of vectors to send backward at once: what a budget of bytes allows, up to 512.

    On a CPU the budget is 4 MiB: more vectors at once save calls, but only as long as their pass
    stays in the cache. Elsewhere it is 256 MiB, and 32 vectors at least.

    Args:
        outputs: The layers' outputs, which a vector's pass makes once each.
    """
    size = sum(z.numel() * z.element_size() for z in outputs)
    on_cpu = outputs[0].device.type == "cpu"
    least, budget = (1, 4 * 2**20) if on_cpu else (32, 256 * 2**20)
    return min(max(least, budget // max(size, 1)), 512)


def _in_parts(
    f: Tensor, calls: list[Call], vectors: Vectors, chunk: int, start: int = 0
) -> Iterator[list[Tensor]]:
    """Vectors from number `start` on, sent to all recorded outputs, `chunk` at a time."""
    for i in range(start, len(vectors), chunk):
        part = _read(vectors, slice(i, i + chunk), f)
        yield _backward(f, calls, part, retain=i + chunk < len(vectors))


def _batched_if_possible(f: Tensor, calls: list[Call], vectors: Vectors) -> Iterator[list[Tensor]]:
    """All vectors in parts of `default_chunk`; one by one if an operation cannot be batched.

    That is tried with the first part.
    """
    chunk = min(default_chunk([call.z for call in calls]), len(vectors))
    if chunk == 1:
        yield from _in_parts(f, calls, vectors, 1)
        return
    try:
        first = _backward(f, calls, _read(vectors, slice(chunk), f), retain=True)
    except RuntimeError:
        yield from _in_parts(f, calls, vectors, 1)
        return
    yield first
    yield from _in_parts(f, calls, vectors, chunk, start=chunk)


def _backward(f: Tensor, calls: list[Call], vectors: Tensor, retain: bool) -> list[Tensor]:
    """Send a stack of vectors from the model's output to recorded ones: zeros if unconnected."""
    batched = len(vectors) > 1
    try:
        sent, _ = sent_back(
            f, calls, vectors if batched else vectors[0], batched=batched, retain=retain
        )
    except RuntimeError as error:
        if not batched:
            raise
        raise RuntimeError(
            "Sending several vectors backward at once failed; if an operation of the model cannot "
            "be batched, pass chunk=1 to send them one by one."
        ) from error
    return sent if batched else [g.unsqueeze(0) for g in sent]
