"""The calls in one forward pass that use the layers' weights, and where the samples are in them.

A `TorchFunctionMode` sees every function before it runs. One that gets the weight of a block, or a
view of it, is recorded, whether a layer calls it or any other code. What follows, such as a hook of
the user's that changes a layer's output, comes after it. A mode belongs to its thread, and nothing
is left of it when the forward pass ends.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import Module
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

from kfac_scratch.capture.functions import (
    ADDITIONS,
    MADE_OF_FUNCTIONS,
    WEIGHT_RULES,
    Applied,
    opened,
)
from kfac_scratch.capture.layer_groups import LayerGroup
from kfac_scratch.capture.layers import (
    USES,
    Convolution,
    EmbeddingUse,
    ScaleUse,
    Use,
    averaged_rows,
    input_rows,
    mean_of_positions,
    one_hot_rows,
    output_rows,
    positions,
    row_dtype,
    scale_gradients,
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
    """One use of a weight in a forward pass.

    It has many parameters, because rows, vectors and checks need different parts of a call.

    Attributes:
        use: The function's settings.
        matrices: Which matrices `W` of the group are used.
        bias: The name of the trainable bias that is added, if any.
        x: The input.
        version: That of `x` when the function read it.
        z: The output.
        edge: Its place in the graph; None if no gradient reaches it.
        unused: How many of the first and the last rows of `W` are not used.
        axis: Where the samples are.
    """

    use: Use
    matrices: range
    bias: str | None
    x: Tensor
    version: int
    z: Tensor
    edge: GradientEdge | None
    unused: tuple[int, int] = (0, 0)
    axis: Axis = field(default=Axis())

    @property
    def kind(self) -> tuple[Use, range, tuple[int, int], str | None, int]:
        """The part that is the same in every forward pass."""
        return self.use, self.matrices, self.unused, self.bias, self.z.ndim

    @property
    def leading(self) -> range:
        """Axes of the output whose entries are rows; the samples are in one of them."""
        return range(1 if isinstance(self.use, Convolution) else self.z.ndim - 1)

    @property
    def positions(self) -> int:
        """The number of positions of every sample."""
        z = self.axis.in_front(self.z)
        return self.axis.outer * self.axis.inner * positions(self.use, z)

    def rows(self, ends: Sequence[float] = ()) -> Float[Tensor, "groups N S d_in"]:
        """`input_rows` by sample; one group stands for all matrices that have the same rows."""
        rows = input_rows(self.use, self.axis.in_front(self.x), ends)
        return self.axis.by_sample(rows, 1)

    def one_hot_rows(self) -> OneHot:
        """`rows` of an embedding, not formed."""
        rows = one_hot_rows(cast(EmbeddingUse, self.use), self.axis.in_front(self.x))
        columns = self.axis.by_sample(rows.columns.unsqueeze(-1), 0).squeeze(-1)
        return OneHot(columns, rows.shape[-1], rows.dtype)

    def averaged_rows(self) -> tuple[Float[Tensor, "groups N 1 d_in"], int]:
        """The mean of `rows` over positions, and how many there are."""
        rows, S = averaged_rows(self.use, self.axis.in_front(self.x))
        rows = self.axis.by_sample(rows, 1)
        return mean_of_positions(rows), S * rows.shape[2]

    def vectors(self, g: Float[Tensor, "V ..."]) -> Float[Tensor, "groups V N S d_out"]:
        """Vectors at the output, in the order of `rows`, for each of the matrices."""
        rows = self.axis.by_sample(output_rows(self.use, self.axis.in_front(g, 1)), 2)
        if any(self.unused):
            return pad(rows, self.unused)
        if len(rows) == len(self.matrices):
            return rows
        return rows[0].unflatten(-1, (len(self.matrices), -1)).movedim(-2, 0)


@dataclass(frozen=True, eq=False)
class ScaleCall(Call):
    """One use of the scale and shift of a normalisation; `x` is normalised.

    They are one column `W`, whose input is 1: the vectors of a sample are its gradient.

    It has many parameters, because every call has them.
    """

    @property
    def leading(self) -> range:
        """Axes of the output along which neither scale nor shift varies."""
        dims = cast(ScaleUse, self.use).dims
        return range(self.z.ndim - dims if dims else 1)

    def rows(self, ends: Sequence[float] = ()) -> Float[Tensor, "1 N 1 1"]:
        """Ones."""
        M = self.z.shape[self.axis.axis]
        N = M // (self.axis.outer * self.axis.inner)
        return self.z.new_ones(1, N, 1, 1, dtype=row_dtype(self.use))

    def vectors(self, g: Float[Tensor, "V ..."]) -> Float[Tensor, "1 V N 1 d_out"]:
        """The gradients of scale and shift."""
        rows = self._gradients(self.x, g)
        return self.axis.by_sample(rows.unsqueeze(2), 1).sum(2, keepdim=True)[None]

    def bound(self, g: Float[Tensor, "V ..."]) -> float:
        """The most that an entry of the gradients' sum may be, whatever cancels."""
        return float(self._gradients(self.x.abs(), g.abs()).sum((0, 1)).max())

    def _gradients(self, x: Tensor, g: Tensor) -> Float[Tensor, "V M d_out"]:
        dtype = row_dtype(self.use)
        x, g = self.axis.in_front(x).to(dtype), self.axis.in_front(g, 1).to(dtype)
        return scale_gradients(cast(ScaleUse, self.use), x, g)


Calls = dict[str, list[Call]]
"""The calls of all layers in one forward pass, by the name of their group."""


def recorded(model: Module, X: Any, groups: list[LayerGroup]) -> tuple[Any, Calls]:
    """The output of a model, and the calls of all layers by the group's name.

    Nothing is left behind, also after an exception.
    """
    recorder = Recorder(groups)
    with _not_compiled(model), recorder:
        f = model(X)
    return f, recorder.calls


def functions_that_get(parameter: Tensor, model: Module, X: Any) -> list[str]:
    """The names of the functions in a forward pass that get a parameter or a view of it.

    Functions that only make another view are not among them.
    """
    readers = Readers(parameter)
    with _not_compiled(model), readers:
        model(X)
    return readers.names


def _not_compiled(model: Module) -> AbstractContextManager[Any]:
    """Run a compiled model as ordinary Python, whose functions a mode sees."""
    if any(map(_is_compiled, model.modules())):
        return cast(AbstractContextManager[Any], torch.compiler.set_stance("force_eager"))
    return nullcontext()


def _is_compiled(module: Module) -> bool:
    """Whether a module was compiled: its functions run in one piece, which no mode sees."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


class _Matrix(NamedTuple):
    """The weight of one `W` of a group, as a view of a parameter."""

    group: LayerGroup
    number: int
    view: Tensor


class Watching(TorchFunctionMode):
    """A mode that sees every function of PyTorch, also within those that are made of others."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run a function, and see it; one that is made of others is opened, so that they are seen.

        It is the subclass's `_run` that runs it.
        """
        if func in MADE_OF_FUNCTIONS:
            with self:
                return opened(func)(*args, **kwargs or {})
        return self._run(func, args, kwargs or {})

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise NotImplementedError


class Recorder(Watching):
    """Record every function that uses a weight of some layers.

    Attributes:
        calls: What was recorded, by the group's name.
    """

    def __init__(self, groups: list[LayerGroup]) -> None:
        super().__init__()
        self.calls: Calls = {group.name: [] for group in groups}
        self._weights: dict[int, list[_Matrix]] = {}
        self._biases: dict[int, tuple[LayerGroup, str, Tensor]] = {}
        for group in groups:
            for number, view in enumerate(group.views()):
                holder = group.weights[number if len(group.weights) > 1 else 0]
                self._weights.setdefault(id(holder), []).append(_Matrix(group, number, view))
            for name, bias in group.biases.items():
                self._biases[id(bias)] = group, name, bias

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function, and record it if it uses a weight."""
        biased = (
            self._biased(*args) if func in ADDITIONS and len(args) == 2 and not kwargs else None
        )
        z = func(*args, **kwargs)
        if biased is not None:
            self._add(*biased, z)
        if func in WEIGHT_RULES and self._is_used(*args, *kwargs.values()):
            for rule in WEIGHT_RULES[func]:
                with torch.no_grad():
                    applied = rule(*args, **kwargs)
                if applied is not None and (found := self._matrices(applied)):
                    return self._record(applied, *found, z)
        return z

    def _is_used(self, *args: Any) -> bool:
        return any(isinstance(t, Tensor) and id(_owner(t)) in self._weights for t in args)

    def _matrices(self, applied: Applied) -> tuple[LayerGroup, range, tuple[int, int]] | None:
        """The group and its matrices that a function uses, and the numbers of rows around."""
        W, candidates = applied.W, self._weights.get(id(_owner(applied.W)), [])
        for i, (group, number, view) in enumerate(candidates):
            if type(applied.use) is not USES[group.kind]:
                continue
            groups, total = W.shape[0], W.shape[0] * W.shape[1]
            rows = list(accumulate(matrix.view.shape[0] for matrix in candidates[i:]))
            if _begins(W, view) and total in rows and groups in (1, rows.index(total) + 1):
                return group, range(number, number + rows.index(total) + 1), (0, 0)
            if groups == group.groups == 1 and (unused := _around(W[0], view)):
                return group, range(1), unused
        return None

    def _record(
        self,
        applied: Applied,
        group: LayerGroup,
        matrices: range,
        unused: tuple[int, int],
        z: Tensor,
    ) -> Tensor:
        if (order := applied.order) is not None:
            rows = z.permute(order)
            z = self._record(applied._replace(order=None), group, matrices, unused, rows)
            return z.permute([order.index(i) for i in range(len(order))])
        if z.requires_grad and z._is_view() and not _is_reshaped(z):
            z = z.clone()  # writing into a view would cut it out of the graph
        bias = None if applied.bias is None else self._name(applied.bias, group, matrices, unused)
        x, use, make = applied.x, applied.use, Call
        if isinstance(use, ScaleUse):
            make = ScaleCall
            use = replace(use, scaled=group.weight is not None, shifted=bias is not None)
        call = make(use, matrices, bias, x.detach(), x._version, z.detach(), _edge(z), unused)
        self.calls[group.name].append(call)
        return z

    def _name(
        self, bias: Tensor, group: LayerGroup, matrices: range, unused: tuple[int, int]
    ) -> str | None:
        """The name of the group's bias whose entries for some rows a function adds."""
        owner, name, whole = self._biases.get(id(_owner(bias)), (None, "", bias))
        if owner is not group:
            return None
        all_of_it = bias is whole and len(matrices) == group.groups and unused == (0, 0)
        part = all_of_it or _is_part(bias, whole, group.groups, matrices, unused)
        return name if part else None

    def _biased(self, *terms: Any) -> tuple[LayerGroup, str, Tensor] | None:
        """The group, the bias and the output, if a bias is added to what its weight gave."""
        for bias, product in (terms, terms[::-1]):
            if not isinstance(bias, Tensor) or not isinstance(product, Tensor):
                continue
            group = self._biases.get(id(_owner(bias)), (None,))[0]
            if group is None or not self.calls[group.name]:
                continue
            call = self.calls[group.name][-1]
            edge = _edge(product)
            if edge and call.edge and edge.node is call.edge.node and call.bias is None:
                name = self._name(bias, group, call.matrices, call.unused)
                return None if name is None else (group, name, call.z)
        return None

    def _add(self, group: LayerGroup, name: str, product: Tensor, z: Tensor) -> None:
        """Let the last call of a group have a bias."""
        if z.shape == product.shape:
            *_, call = self.calls[group.name]
            self.calls[group.name][-1] = replace(call, bias=name, z=z.detach(), edge=_edge(z))


class Readers(Watching):
    """Note which functions compute with a parameter or a view of it.

    Attributes:
        names: Their names, in the order of the forward pass.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__()
        self.names: list[str] = []
        self._parameter = parameter

    def _run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function, and note its name if it gets the parameter and computes with it."""
        z = func(*args, **kwargs)
        if any(map(self._is_part, tree_leaves((args, kwargs)))) and self._computes(z):
            name = resolve_name(func) or func.__name__
            if name not in self.names:
                self.names.append(name)
        return z

    def _is_part(self, t: Any) -> bool:
        return isinstance(t, Tensor) and _owner(t) is self._parameter

    def _computes(self, z: Any) -> bool:
        """Whether a result is new: no view of the parameter, and no size or other property."""
        found = [t for t in tree_leaves(z) if isinstance(t, Tensor)]
        return bool(found) and not any(map(self._is_part, found))


def _owner(t: Tensor) -> Tensor:
    """The tensor that holds the entries of another: itself, or what it is a view of."""
    return t if t._base is None else t._base


def _begins(part: Tensor, view: Tensor) -> bool:
    """Whether rows begin at the same entry of their owner and go on in the same way.

    Of several matrices side by side, it is the first one's rows that are compared.
    """
    shape, stride = part.shape[-view.ndim :], part.stride()[-view.ndim :]
    axes = zip(stride, view.stride(), shape, view.shape, strict=False)
    return (
        part.storage_offset() == view.storage_offset()
        and shape[1:] == view.shape[1:]
        and all(s == t for s, t, n, m in axes if min(n, m) > 1)
    )


def _around(part: Tensor, view: Tensor) -> tuple[int, int] | None:
    """How many rows of a view are before and behind a part of it; None if it is no part."""
    start = (part.storage_offset() - view.storage_offset()) // max(1, view.stride(0))
    rows = view[max(0, start) : max(0, start) + len(part)]
    found = len(rows) == len(part) and _begins(part, rows)
    return (start, len(view) - start - len(part)) if found else None


def _is_part(
    bias: Tensor, whole: Tensor, groups: int, matrices: range, unused: tuple[int, int]
) -> bool:
    """Whether a tensor is the part of a bias that belongs to some of a group's matrices."""
    part = whole.detach().unflatten(0, (groups, -1))[matrices.start : matrices.stop]
    part = part[:, unused[0] : part.shape[1] - unused[1]]
    return _begins(bias, part[0]) and bias.numel() == part.numel()


def _is_reshaped(z: Tensor) -> bool:
    """Whether a view is all that a function computed, in another shape, as `F.linear` returns.

    A view of a parameter is not: no function computed that.
    """
    base = z._base
    return (
        base is not None
        and base.grad_fn is not None
        and base.numel() == z.numel()
        and base.is_contiguous()
        and z.is_contiguous()
    )


def _edge(z: Tensor) -> GradientEdge | None:
    """Its place in the graph, or that of what it reshapes: in-place functions leave that there."""
    if not z.requires_grad:
        return None
    return get_gradient_edge(cast(Tensor, z._base) if _is_reshaped(z) else z)


def sent_back(
    f: Tensor,
    calls: Sequence[Call],
    v: Tensor,
    parameters: Sequence[Tensor] = (),
    *,
    batched: bool = False,
    retain: bool = True,
) -> tuple[list[Tensor], list[Tensor]]:
    """Send a vector from the model's output to the outputs of calls, and to parameters.

    Cost: a reverse pass.

    Args:
        f: The model's output.
        calls: The calls.
        v: The vector, or a stack of vectors.
        parameters: Tensors with gradients.
        batched: Whether it is a stack.
        retain: Whether the graph is kept.

    Returns:
        For every call a tensor like its output, for every parameter one like it, or stacks of
        these: zeros where nothing arrives.
    """
    ends: list[Any] = [call.edge for call in calls if call.edge is not None]
    grads = iter(
        torch.autograd.grad(
            f,
            [*ends, *parameters],
            v,
            is_grads_batched=batched,
            retain_graph=retain,
            allow_unused=True,
        )
    )

    stack = v.shape[: int(batched)]
    at_calls = [_or_zeros(None if c.edge is None else next(grads), c.z, stack) for c in calls]
    return at_calls, [_or_zeros(g, p, stack) for g, p in zip(grads, parameters, strict=True)]


def _or_zeros(g: Tensor | None, like: Tensor, stack: torch.Size) -> Tensor:
    shape = (*stack, *like.shape)
    return like.new_zeros(1).expand(shape) if g is None else g.reshape(shape)
