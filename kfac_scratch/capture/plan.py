r"""Plans: the place of the samples in every layer, and two checks that capture is exact.

A backward pass gives every sample's own gradient only if the samples do not meet: a vector at one
sample's output must reach that sample's rows and no other. Rows and vectors are all of a
parameter's gradient only if the recorded calls are its only uses. Neither can be read off a model's
layers. So both are tried, on a few of the samples:

1. *The axis of the samples* has two thirds as many entries for two samples as for three, and no
   other axis changes. Vectors at the outputs of some of the samples tell the order of the axis: at
   the rows of the others, they are zero, exactly. If no order has this, samples meet. For any two
   samples there is a set of these vectors that has the first sample and not the second.
2. *The gradient is explained.* For a random vector $v$ and every parameter $W$,
   $\partial (v^\top f) / \partial W = \sum_s g_s a_s^\top$, where the sum is over the recorded
   calls. Split every path from $W$ to $f$ by its first edge: those that begin at a recorded call
   add up to the right side, because $g$ is the whole derivative with respect to its output. All
   others are the difference of both sides. It is linear in $v$, so that a random $v$ misses it
   with probability zero. Rows, axes, biases and the order of columns are checked with it.

What is zero on the tried samples is not seen, such as a use behind a gate that is closed for all of
them. They are up to eight, spread over the batch.

Source: curvlinops checks that every path from a parameter in a traced graph is one that it knows.
This checks the same on numbers, without a trace.
"""

import itertools
import math
from collections.abc import Collection, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import CrossEntropyLoss, Module

from kfac_scratch.border import check_instance, checked_names
from kfac_scratch.capture.calls import (
    Axis,
    Call,
    Calls,
    ScaleCall,
    functions_that_get,
    recorded,
    sent_back,
)
from kfac_scratch.capture.flavours import EXPAND
from kfac_scratch.capture.layer_groups import LayerGroup, layer_groups, parts_of
from kfac_scratch.capture.refusals import (
    UnexplainedGradientError,
    apart,
    check_calls,
    check_explained,
    check_model,
    check_no_reentrant_checkpoint,
    check_output,
    check_small_run,
    unlike,
)
from kfac_scratch.one_hot import OneHot

MOST = 8  # samples that are tried


@dataclass(frozen=True)
class Place:
    """A call in a plan: its kind, and the place of the samples.

    Attributes:
        kind: That of the call.
        axis: Where the samples are, with as many positions as the tried samples had.
        off: How far the inputs of two samples are from those of the same two among three.
        several: Whether the tried samples fit other orders, too, because they are all alike.
    """

    kind: Hashable
    axis: Axis
    off: float = 0.0
    several: bool = False


@dataclass(frozen=True)
class Plan:
    """The place of the samples in every layer of a model, for batches of one kind.

    Use it where `layer_ios` is called for one model again and again: `layer_ios(..., plan=plan)`
    tries nothing. Not for another kind of batch, with other calls of layers: that is refused.

    Cost: none.

    Attributes:
        places: The calls of every group of layers, in the order of the forward pass.
        output: The place of the samples in the model's output, whose axis 0 may hold several
            positions of each: `[N * T, C]`, as `logits.flatten(0, 1)` is.
    """

    places: Mapping[str, tuple[Place, ...]]
    output: Axis = field(default=Axis())

    def unflattened(self, loss: Module, f: Tensor, y: Tensor, X: Any) -> tuple[Tensor, Tensor]:
        """Output and targets with the samples alone on axis 0.

        Those with several positions of a sample on axis 0 get an axis for these: `[N, C, T]` for
        `CrossEntropyLoss`, which has the classes on axis 1, and `[N, T, ...]` for other losses.

        Raises:
            ValueError: If there are not as many targets as outputs.
        """
        if self.output.outer * self.output.inner == 1:
            return f, y
        if len(y) != len(f):
            raise ValueError(
                f"The model's output has {len(f)} entries on axis 0, several for every sample, but "
                f"the targets have shape {tuple(y.shape)}: flatten them in the same way."
            )
        N = number_of_samples(X)
        classes = isinstance(loss, CrossEntropyLoss)
        return _unflattened(self.output, f, N, classes), _unflattened(
            self.output, y, N, classes and y.ndim == f.ndim
        )

    def located(self, groups: list[LayerGroup], calls: Calls, N: int) -> Calls:
        """The calls of a batch, each with the axis of its samples.

        Raises:
            ValueError: If they are not those of the plan.
        """
        located = {}
        for group in groups:
            places, here = self.places.get(group.name, ()), calls[group.name]
            if [place.kind for place in places] != [call.kind for call in here]:
                raise ValueError(unlike(group, f"was called otherwise ({len(here)} times)"))
            located[group.name] = [
                _at(call, _fitted(group, place, call, N))
                for place, call in zip(places, here, strict=True)
            ]
        return located


class Plans:
    """The plans of a loop over batches: each is made once for every kind of batch.

    Use it where batches differ in kind, say in their lengths. Not for a single batch.

    Cost: that of `plan` for a batch of a new kind. A kind is the shapes and dtypes of the inputs
    but for the number of samples, the modes of all modules, the trainable parameters, and autocast.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, Plan] = {}

    def __len__(self) -> int:
        """The number of plans that were made."""
        return len(self._made)

    def of(self, model: Module, X: Any, groups: list[LayerGroup]) -> Plan:
        """The plan for a batch, made if there is none yet."""
        kind = _kind(model, X, groups)
        if kind not in self._made:
            self._made[kind] = plan_of_groups(model, X, groups)
        return self._made[kind]


def plan(model: Module, X: Any, *, layers: Collection[str] | None = None) -> Plan:
    """Try a model on few of the samples, find where the samples are in its layers, and check both.

    Use it before a loop of your own over `layer_ios`. Not before `over_loader` and not for the
    optimizer `KFAC`, which keep plans of their own, and not for a single batch: without a plan,
    `layer_ios` makes one.

    Law: with a plan, `layer_ios` gives exactly what it gives without.
    Cost: forward passes with two, with three and with up to eight of the samples, and up to five
    reverse passes. Buffers and sources of randomness are as before.

    Args:
        model: Any module; axis 0 of its output is the batch.
        X: The model's input: a tensor with the batch on axis 0, or lists, tuples, dictionaries and
            dataclasses with such tensors. The first tensor says how many samples there are, and all
            tensors of that length are cut.
        layers: Names of the layers to cover. Default: all supported ones.

    Raises:
        ValueError: If the samples are not independent, the model does not run on two and three of
            them, or has a layer that all samples share: each names the layer and the way out.
        NotImplementedError: If a parameter is used in a way that no call of a layer explains.
    """
    check_instance("model", model, Module, "nn.Sequential(...)")
    groups = layer_groups(model, checked_names("layers", layers))
    check_model(model, X, groups, layers)
    return plan_of_groups(model, X, groups)


def plan_of_groups(model: Module, X: Any, groups: list[LayerGroup]) -> Plan:
    """`plan`, for the groups of layers of a model that was checked."""
    N = number_of_samples(X)
    most = min(max(N, 2), MOST)
    spread = [i * (N - 1) // (most - 1) for i in range(most)]
    chosen = {2: [0, N - 1], 3: [0, N - 1, N // 2], most: spread}
    parts = parts_of(groups)
    with _untouched(model), torch.enable_grad():
        runs = {n: _small_run(model, _cut(X, N, few), parts, n) for n, few in chosen.items()}
        places = _places(parts, runs[2][1], runs[3][1])
        k = _positions_of_output({n: f for n, (f, _) in runs.items()})
        try:
            if k == 1:
                return _checked(groups, *runs[most], places, Axis())
            return _best([Axis(0, 1, k), Axis(0, k, 1)], groups, *runs[most], places)
        except UnexplainedGradientError as error:
            parameters = {name: p for part in parts for name, p in part.trainable.items()}
            names = functions_that_get(parameters[error.parameter], model, _cut(X, N, spread))
            raise error.with_functions(names) from None


def _positions_of_output(outputs: Mapping[int, Tensor]) -> int:
    """The number of positions of each sample on axis 0 of the output."""
    found = {len(f) / n for n, f in outputs.items()}
    k = round(found.pop())
    if found or k < 1:
        shapes = ", ".join(f"{tuple(f.shape)} for {n}" for n, f in outputs.items())
        raise ValueError(
            f"The model's output has the shapes {shapes} of the samples: axis 0 of the input and "
            "of the output must be the batch."
        )
    return k


def _best(
    orders: list[Axis],
    groups: list[LayerGroup],
    f: Tensor,
    calls: Calls,
    places: Mapping[str, list[list[Place]]],
) -> Plan:
    """Of the plans for several orders of the output, the one that fits the inputs best.

    Raises:
        ValueError: As for the first order, if there is none.
    """
    plans: list[Plan] = []
    errors: list[Exception] = []
    for order in orders:
        try:
            plans.append(_checked(groups, f, calls, places, order))
        except (ValueError, NotImplementedError) as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    return min(plans, key=lambda plan: sum(p.off for ps in plan.places.values() for p in ps))


def _unflattened(axis: Axis, t: Tensor, N: int, classes: bool) -> Tensor:
    """An axis for positions: the second, or the third if classes are on the second."""
    t = t.unflatten(0, (N, -1)) if axis.inner > 1 else t.unflatten(0, (-1, N)).transpose(0, 1)
    return t.movedim(2, 1) if classes else t


def number_of_samples(X: Any) -> int:
    """The length of the first tensor in a model's input.

    Raises:
        ValueError: If there is none.
    """
    for x in _tensors(X):
        if x.ndim > 0:
            return len(x)
    raise ValueError(
        f"X is a {type(X).__name__} without a tensor that has the batch on axis 0, so the model "
        "cannot be tried on two and three of the samples: pass a tensor, or lists, tuples, "
        "dictionaries and dataclasses of tensors."
    )


# ---- few of the samples ------------------------------------------------------------------------


def _small_run(model: Module, X: Any, groups: list[LayerGroup], n: int) -> tuple[Tensor, Calls]:
    with check_small_run(n):
        f, calls = recorded(model, X, groups)
    if len(check_output(f)) % n:
        raise ValueError(
            f"For {n} of the samples, the model's output has shape {tuple(f.shape)}: axis 0 of the "
            "input and of the output must be the batch."
        )
    check_calls(f, groups, calls)
    check_no_reentrant_checkpoint(f)
    return f, calls


def _tensors(X: Any) -> Iterator[Tensor]:
    if isinstance(X, Tensor):
        yield X
    elif is_dataclass(X) and not isinstance(X, type):
        for f in fields(X):
            yield from _tensors(getattr(X, f.name))
    elif isinstance(X, Mapping):
        for part in X.values():
            yield from _tensors(part)
    elif isinstance(X, list | tuple):
        for part in X:
            yield from _tensors(part)


def _cut(X: Any, N: int, chosen: list[int]) -> Any:
    """Some of the samples, from all tensors of their number."""
    if isinstance(X, Tensor):
        return X.detach()[chosen] if X.ndim > 0 and len(X) == N else X
    if is_dataclass(X) and not isinstance(X, type):
        return replace(X, **{f.name: _cut(getattr(X, f.name), N, chosen) for f in fields(X)})
    if isinstance(X, Mapping):
        return type(X)({key: _cut(part, N, chosen) for key, part in X.items()})  # type: ignore[call-arg]
    if isinstance(X, list | tuple):
        parts = [_cut(part, N, chosen) for part in X]
        return type(X)(*parts) if hasattr(X, "_fields") else type(X)(parts)
    return X


@contextmanager
def _untouched(model: Module) -> Iterator[None]:
    """Put buffers and sources of randomness back: they change in a forward pass."""
    kept = [
        (module._buffers, name, b, b._version, b.detach().clone())
        for module in model.modules()
        for name, b in module._buffers.items()
        if b is not None
    ]
    cuda = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(cuda)):
        try:
            yield
        finally:
            for owner, name, buffer, version, value in kept:
                owner[name] = buffer
                if buffer._version != version:
                    with torch.no_grad():
                        buffer.copy_(value)


def _kind(model: Module, X: Any, groups: list[LayerGroup]) -> Hashable:
    """What must be the same for a plan to hold."""
    tensors = list(_tensors(X))
    N = number_of_samples(X)
    return (
        tuple((x.shape[1:] if len(x) == N else x.shape, x.dtype) for x in tensors if x.ndim),
        tuple((type(module), module.training) for module in model.modules()),
        tuple((group.name, group.parameter_names) for group in groups),
        id(model),
        any(torch.is_autocast_enabled(x.device.type) for x in tensors),
    )


# ---- both checks --------------------------------------------------------------------------------


def _places(groups: list[LayerGroup], two: Calls, three: Calls) -> dict[str, list[list[Place]]]:
    """Where the samples may be in every call, from its sizes for two and three samples.

    There is one place for each order of the axis.
    """
    places = {}
    for group in groups:
        kinds = [[call.kind for call in calls[group.name]] for calls in (two, three)]
        if kinds[0] != kinds[1]:
            raise ValueError(apart(group, "is called otherwise with two samples than with three"))
        pairs = zip(two[group.name], three[group.name], strict=True)
        places[group.name] = [_orders(group, *pair) for pair in pairs]
    return places


def _checked(
    groups: list[LayerGroup],
    f: Tensor,
    calls: Calls,
    places: Mapping[str, list[list[Place]]],
    output: Axis,
) -> Plan:
    """The plan, if both checks pass with this order of the output."""
    N = len(f) // (output.outer * output.inner)
    sets, parts = separating_sets(N, f.device), parts_of(groups)
    rows = sets.repeat_interleave(output.inner, 1).repeat(1, output.outer)
    gs, gradients = _sent_from_sets(f, parts, calls, rows)
    found: dict[str, tuple[Place, ...]] = {}
    located: Calls = {}
    for part in parts:
        here, orders = calls[part.name], places[part.name]
        if [of_call[0].kind for of_call in orders] != [call.kind for call in here]:
            raise ValueError(apart(part, f"is called otherwise with two samples than with {N}"))
        found[part.name] = tuple(
            _place(part, *of_call, sets)
            for of_call in zip(orders, here, gs[part.name], strict=True)
        )
        places_here = zip(here, found[part.name], strict=True)
        located[part.name] = [_at(c, place.axis) for c, place in places_here]
    with torch.autocast(f.device.type, enabled=False):
        for group in groups:
            _check_gradient(group, located, gs, gradients)
    return Plan(found, output)


def _sent_from_sets(
    f: Tensor, parts: list[LayerGroup], calls: Calls, sets: Bool[Tensor, "sets rows"]
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Random vectors at the layers, and gradients.

    Returns:
        For every part's calls a tensor `[sets, *z.shape]`: what is sent to the output's rows of
        each set. By name, the sum of every parameter's gradients.
    """
    v = random_like(f)
    used = [call for part in parts for call in calls[part.name]]
    parameters = {name: p for part in parts for name, p in part.trainable.items()}
    sent = [
        sent_back(f, used, v * rows.view(-1, *[1] * (f.ndim - 1)), list(parameters.values()))
        for rows in sets
    ]
    at_calls = iter([torch.stack(of_call) for of_call in zip(*(gs for gs, _ in sent), strict=True)])
    gs = {part.name: [next(at_calls) for _ in calls[part.name]] for part in parts}
    sums = [reduce(torch.add, of_one) for of_one in zip(*(g for _, g in sent), strict=True)]
    return gs, dict(zip(parameters, sums, strict=True))


def separating_sets(N: int, device: torch.device) -> Bool[Tensor, "sets N"]:
    """Sets of samples or points: for any two, there is a set with the first and without the second.

    Every sample is in as many sets as every other, so that the sets of none are all among those of
    another. Two samples need 2 sets, eight need 5.
    """
    sets = next(m for m in itertools.count(1) if math.comb(m, (m + 1) // 2) >= N)
    chosen = itertools.combinations(range(sets), (sets + 1) // 2)
    members = torch.zeros(sets, N, dtype=torch.bool)
    for n, of_sample in zip(range(N), chosen, strict=False):
        members[list(of_sample), n] = True
    return members.to(device)


def random_half(N: int, device: torch.device) -> Bool[Tensor, " N"]:
    """Half of `N` points, the same at every call and on every device."""
    return (torch.randperm(N, generator=_seeded(), device="cpu") < N // 2).to(device)


def random_like(x: Tensor) -> Tensor:
    """Normal numbers like a tensor, the same at every call and on every device."""
    return torch.randn(x.shape, generator=_seeded(), device="cpu", dtype=torch.float32).to(x)


def _seeded() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(0)


def _orders(group: LayerGroup, two: Call, three: Call) -> list[Place]:
    """All orders that the samples may have in a call, from the sizes for two and three samples."""
    sizes = [(two.z.shape[i], three.z.shape[i]) for i in two.leading]
    changing = [i for i, (a, b) in enumerate(sizes) if a != b]
    if not changing:
        raise ValueError(apart(group, "has an output of the same shape for any number of samples"))
    axis = changing[0]
    k = sizes[axis][0] // 2
    if len(changing) > 1 or sizes[axis] != (2 * k, 3 * k):
        raise ValueError(
            apart(group, f"has no axis for the samples: from two to three, its sizes are {sizes}")
        )
    orders = [Axis(axis, k // inner, inner) for inner in range(1, k + 1) if k % inner == 0]
    return [Place(two.kind, order, _disagreement(order, two, three)) for order in orders]


def _disagreement(axis: Axis, two: Call, three: Call) -> float:
    """How far the inputs of the first two samples differ, in one order, between both runs.

    It decides if the vectors are zero at so many rows that several orders fit.
    """
    a, b = (axis.in_front(c.x) for c in (two, three))
    a, b = (axis.by_sample(x.reshape(len(x), 1, -1), 0)[:2].double() for x in (a, b))
    return float((a - b).abs().sum()) if a.shape == b.shape else math.inf


def _place(
    group: LayerGroup, orders: list[Place], call: Call, g: Tensor, sets: Bool[Tensor, "sets N"]
) -> Place:
    """The order in which the vectors for some of the samples are zero at all others."""
    axis, N = orders[0].axis, sets.shape[1]
    if call.z.shape[axis.axis] != axis.outer * N * axis.inner:
        raise ValueError(apart(group, f"has other positions for two samples than for {N}"))
    fitting = [place for place in orders if _is_apart(place.axis, g, sets)]
    if not fitting:
        raise ValueError(apart(group, "gets vectors of one sample at the rows of another"))
    best = min(place.off for place in fitting)
    places = [place for place in fitting if place.off == best]
    return replace(places[0], several=len(places) > 1)


def _is_apart(axis: Axis, g: Tensor, sets: Bool[Tensor, "sets N"]) -> bool:
    """Whether the vectors for each set of samples are zero at all samples outside, exactly."""
    by_sample = axis.by_sample(axis.in_front(g, 1).flatten(2).unsqueeze(2), 1)  # [sets, N, ...]
    return not by_sample[~sets].any()


def _at(call: Call, axis: Axis) -> Call:
    """A call with its axis of the samples."""
    return call if call.axis == axis else replace(call, axis=axis)


def _fitted(group: LayerGroup, place: Place, call: Call, N: int) -> Axis:
    """The same order for a batch with another number of positions."""
    axis, size = place.axis, call.z.shape[place.axis.axis]
    k = axis.outer * axis.inner
    here = size // max(N, 1)
    if size != here * N or (here != k and axis.outer > 1 and axis.inner > 1):
        raise ValueError(unlike(group, f"has {size} entries on axis {axis.axis} for {N} samples"))
    if N > 1 and here > 1 and (place.several or k == 1):
        raise ValueError(
            unlike(group, f"has {here} rows of every sample, in an order that cannot be told")
        )
    outer = axis.inner == 1
    if here == k:
        return axis
    return replace(axis, outer=here if outer else 1, inner=1 if outer else here)


def _check_gradient(
    group: LayerGroup,
    calls: Calls,
    gs: Mapping[str, list[Tensor]],
    gradients: Mapping[str, Tensor],
) -> None:
    """Compare the gradient of every parameter with the sum over recorded calls."""
    rows, vectors, dtypes, size = [], [], [], 0.0
    for part in group.parts:
        here, sums = calls[part.name], [g.sum(0, keepdim=True) for g in gs[part.name]]
        rows += EXPAND.inputs(part, here)  # [N, S, d_in] for every matrix of the part
        vectors += [g[0].to(rows[0].dtype) for g in EXPAND.outputs(part, here, sums)]
        dtypes += [t.dtype for c in here for t in (c.x, c.z) if t.is_floating_point()]
        pairs = zip(here, sums, strict=True)
        size += math.fsum(c.bound(g) for c, g in pairs if isinstance(c, ScaleCall))
    check_sums(group, rows, vectors, gradients, dtypes, size)


def check_sums(
    group: LayerGroup,
    rows: list[Tensor],
    vectors: list[Tensor],
    gradients: Mapping[str, Tensor],
    dtypes: list[torch.dtype],
    size: float = 0.0,
) -> None:
    """Refuse a group of layers whose gradients are not the sums of `g a^T` over their rows.

    Args:
        group: The layers.
        rows: For each matrix of their parts what enters it, `[N, S, d_in]`.
        vectors: What comes back to it, `[N, S, d_out]`.
        gradients: By name, the gradient of every parameter by autodiff.
        dtypes: The precisions of what was computed on the way; the coarsest counts.
        size: A bound on entries of the gradients, if vectors are sums already, which may cancel.

    Raises:
        NotImplementedError: Naming the parameter, its layers and the way out.
    """
    pairs = list(zip(vectors, rows, strict=True))
    sums = group.parameters(group.joined([_outer(g, a) for g, a in pairs]))
    bound = max(size, *(_bound(g, a) for g, a in pairs))
    eps = max(torch.finfo(dtype).eps for dtype in (*dtypes, group.weights[0].dtype))
    for name, value in sums.items():
        off = float((gradients[name] - value).abs().max())
        check_explained(group, name, off, eps**0.5 * bound)


def _outer(g: Tensor, a: Tensor) -> Tensor:
    """`sum_s g[s] a[s]^T`, without forming one-hot rows."""
    g = g.flatten(0, 1)
    if not isinstance(a, OneHot):
        return g.mT @ a.flatten(0, 1)
    columns = a.columns.flatten()
    W = g.new_zeros(g.shape[-1], a.shape[-1])
    return W.index_add_(1, columns.clamp(min=0), (g * (columns >= 0).unsqueeze(-1)).mT)


def _bound(g: Tensor, a: Tensor) -> float:
    """What no entry of the gradient exceeds."""
    largest = a.columns >= 0 if isinstance(a, OneHot) else a.abs().amax(-1)
    return float((g.abs().amax(-1) * largest).sum())
