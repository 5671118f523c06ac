"""What capture refuses, each with the layer, the value and the way out.

A result for part of a model, or for a batch axis that is not one, would look right and be wrong. So
these checks run before and after every forward pass; they read tensors and change nothing.
"""

import warnings
from collections import Counter
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.batchnorm import _BatchNorm

from kfac_scratch.capture.layer_groups import LayerGroup, uncovered
from kfac_scratch.capture.layers import LAYERS, Call

Output = TypeVar("Output")


def check_model(
    model: Module, X: Any, groups: list[LayerGroup], layers: Collection[str] | None
) -> None:
    """The checks before the forward pass: of layers, modes, devices and uncovered parameters."""
    if not groups:
        kinds = ", ".join(kind.__name__ for kind in LAYERS)
        raise ValueError(f"The model has no trainable layer of a supported kind ({kinds}).")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"Layer {name!r} ({type(module).__name__}) uses the statistics of the batch, so no "
                "sample has a gradient of its own: call model.eval() first."
            )
    if isinstance(X, Tensor):
        if len(X) == 0:
            raise ValueError("The batch is empty.")
        device = groups[0].layers[0].weight.device
        if X.device != device:
            raise ValueError(f"X is on {X.device} but the model is on {device}: move one of them.")
    if layers is None and (names := uncovered(model, groups)):
        warnings.warn(
            f"No block covers the trainable parameters {names}. To say that this is meant, pass "
            "layers=[...].",
            stacklevel=4,
        )


def check_output(f: Output) -> Output:
    """The model's output, which must be one tensor."""
    if not isinstance(f, Tensor) or f.ndim == 0:
        raise ValueError("The model must return one tensor with the batch on axis 0.")
    return f


def check_calls(f: Tensor, groups: list[LayerGroup], calls: dict[str, list[Call]]) -> None:
    """The checks after the forward pass: every layer ran on axis 0, no weight outside of one."""
    uses = _uses_of_leaves(f)
    for group in groups:
        name = group.name
        silent = [layer for layer in group.layers if all(c.layer is not layer for c in calls[name])]
        if silent:
            raise ValueError(
                f"Layer {name!r} ({type(silent[0]).__name__}) never ran in the forward pass: its "
                "weight is unused, or used without calling the layer (as nn.MultiheadAttention "
                "does). Leave it out with layers=[...], or call it as a layer."
            )
        for call in calls[name]:
            _check_call(name, call, len(f))
        _check_uses(group, calls[name], uses)
    if not f.isfinite().all():
        raise ValueError(_where_not_finite(calls))


def _check_call(name: str, call: Call, N: int) -> None:
    layer, x, z = call.layer, call.x, call.z
    kind = f"Layer {name!r} ({type(layer).__name__})"
    if x._version != call.version:
        raise ValueError(f"The input of {kind} was modified in place after the layer used it.")
    dims = len(getattr(layer, "kernel_size", ())) + 2
    if x.ndim < 1 or len(x) != N or (dims > 2 and x.ndim != dims) or z.ndim < 2:
        raise ValueError(
            f"{kind} got an input of shape {tuple(x.shape)} while the model's output is for {N} "
            "samples: axis 0 of a layer's input must be the batch; other shared axes come after it."
        )
    _check_subclass(kind, call)


def _check_uses(group: LayerGroup, calls: list[Call], uses: Counter[int]) -> None:
    """Refuse a weight that is also used outside of its layers, where no hook records it."""
    if any(type(layer) not in LAYERS for layer in group.layers):
        return  # a subclass may use its weight in several steps
    count = uses[id(group.layers[0].weight)]
    if group.weight is not None and count > len(calls):
        raise NotImplementedError(
            f"The weight {group.weight!r} is used {count} times, but the layers that hold it ran "
            f"{len(calls)} times: somewhere it is used by a function, as in F.linear(x, weight). "
            "Use a layer there, or leave this one out with layers=[...]."
        )


def _uses_of_leaves(f: Tensor) -> Counter[int]:
    """The number of uses of every leaf (by its id) in the graph of a tensor."""
    uses: Counter[int] = Counter()
    todo, seen = [f.grad_fn], {f.grad_fn}
    while todo:
        for node, _ in getattr(todo.pop(), "next_functions", ()):
            if hasattr(node, "variable"):
                uses[id(node.variable)] += 1
            elif node is not None and node not in seen:
                seen.add(node)
                todo.append(node)
    return uses


def _where_not_finite(calls: dict[str, list[Call]]) -> str:
    for name, uses in calls.items():
        for call in uses:
            for what, t in (("input", call.x), ("output", call.z)):
                if not t.isfinite().all():
                    n = int((~t.isfinite()).flatten(1).any(1).nonzero()[0])
                    return f"The {what} of layer {name!r} is not finite, first for sample {n}."
    return "The model's output has non-finite entries although its layers have none."


def _check_subclass(kind: str, call: Call) -> None:
    """Refuse a subclass whose forward pass differs from that of the supported layer."""
    layer = call.layer
    if type(layer) in LAYERS:
        return
    parent = next(cls for cls in LAYERS if isinstance(layer, cls))
    with torch.no_grad():
        same = parent.forward(layer, call.x)
    if same.shape != call.z.shape or not torch.allclose(same, call.z, rtol=1e-4, atol=1e-6):
        raise NotImplementedError(
            f"{kind} does not compute what {parent.__name__} computes, so its gradient is not that "
            "of one matrix applied to its input: leave it out with layers=[...]."
        )
