"""What capture refuses, each with the layer, the value and the way out.

A result for part of a model, or for a batch axis that is not one, would look right and be wrong. So
these checks run before and after every forward pass; they read tensors and change nothing.
"""

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Module, MultiheadAttention
from torch.nn.modules.batchnorm import _BatchNorm

from kfac_scratch.capture.calls import Calls
from kfac_scratch.capture.layer_groups import LayerGroup, uncovered
from kfac_scratch.capture.layers import LAYERS

Output = TypeVar("Output")


def check_model(
    model: Module, X: Any, groups: list[LayerGroup], layers: Collection[str] | None
) -> None:
    """The checks before the forward pass: of layers, modes, devices and uncovered parameters."""
    if not groups:
        kinds = ", ".join(kind.__name__ for kind in (*LAYERS, MultiheadAttention))
        raise ValueError(f"The model has no trainable layer of a supported kind ({kinds}).")
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"Layer {name!r} ({type(module).__name__}) uses the statistics of the batch, so no "
                "sample has a gradient of its own: call model.eval() first."
            )
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Capture needs derivatives, which torch.inference_mode() forbids: leave that mode. "
            "torch.no_grad() may stay on."
        )
    if isinstance(X, Tensor):
        if len(X) == 0:
            raise ValueError("The batch is empty.")
        device = groups[0].weights[0].device
        if X.device != device:
            raise ValueError(f"X is on {X.device} but the model is on {device}: move one of them.")
    if layers is None and (names := uncovered(model, groups)):
        warnings.warn(
            f"No block covers the trainable parameters {names}. To say that this is meant, pass "
            "layers=[...]; normalisations have a block if they are named there.",
            stacklevel=4,
        )


def check_output(f: Output) -> Output:
    """The model's output, which must be one tensor."""
    if not isinstance(f, Tensor):
        raise ValueError(
            f"The model returns a {type(f).__name__}, but it must return one tensor with the batch "
            "on axis 0. Wrap it in a module whose forward returns what the loss gets, for example "
            "self.model(**X).logits. That module may take several inputs as one dictionary X."
        )
    if f.ndim == 0:
        raise ValueError("The model must return a tensor with the batch on axis 0, not one number.")
    return f


def check_calls(f: Tensor, groups: list[LayerGroup], calls: Calls) -> None:
    """The checks after every forward pass: every layer ran, its input is as it was, f is finite."""
    for group in groups:
        here = calls[group.name]
        used = {number for call in here for number in call.matrices}
        silent = [name for i, name in enumerate(group.names) if i not in used]
        silent += [bias for bias in group.biases if all(call.bias != bias for call in here)]
        if silent:
            raise ValueError(
                f"{_kind(group)} never ran in the forward pass, or not all of it: no function that "
                f"has a rule used {silent[0]!r}. Leave the layer out with layers=[...], or call it."
            )
        if any(call.x._version != call.version for call in here):
            raise ValueError(
                f"The input of {_kind(group)} was modified in place after the layer used it."
            )
    if not f.isfinite().all():
        raise ValueError(_where_not_finite(calls))


@contextmanager
def check_small_run(n: int) -> Iterator[None]:
    """Say why the model was run on few of the samples, if it fails there."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"The model fails on {n} of the samples alone ({type(error).__name__}: {error}), but "
            "not on the whole batch: the samples meet each other, or axis 0 of its input is not "
            "the batch. Capture tries every model on two and three of the samples; with "
            "plan=plan(model, X) it is tried on those of another X."
        ) from error


def apart(group: LayerGroup, what: str) -> str:
    """Why the samples are not apart in a layer, and the way out."""
    return (
        f"{_kind(group)} {what}, so that no sample has rows and vectors of its own there. Samples "
        "meet each other, or axis 0 of the model's input and output is not the batch. Leave the "
        "layer out with layers=[...], or give every sample its own."
    )


def unlike(group: LayerGroup, what: str) -> str:
    """Why a plan does not hold for a batch, and the way out."""
    return (
        f"{_kind(group)} {what}, which is not what the plan says: make one for this kind of batch "
        "with plan(model, X), from samples that differ from each other."
    )


class UnexplainedGradientError(NotImplementedError):
    """The gradient of a parameter is not the sum over the recorded calls.

    Attributes:
        parameter: The name of the parameter.
    """

    def __init__(self, message: str, parameter: str = "") -> None:
        super().__init__(message)
        self.parameter = parameter

    def with_functions(self, names: list[str]) -> NotImplementedError:
        """The same error, with the functions that got the parameter."""
        found = ", ".join(names) or "none that a mode sees"
        return NotImplementedError(f"{self} Functions that got it: {found}.")


def check_explained(group: LayerGroup, name: str, off: float, tolerance: float) -> None:
    """Refuse a parameter whose gradient is not that of the recorded calls.

    Raises:
        NotImplementedError: Naming the parameter, its layers and the way out.
    """
    if not off <= tolerance:
        raise UnexplainedGradientError(
            f"The gradient of {name!r} is not the sum of g a^T over the calls of {_kind(group)}: "
            f"it is off by {off:.1e}, where rounding explains {tolerance:.1e}. The parameter is "
            "used somewhere else, by a function that has no rule or not as this layer's matrix; or "
            "a second derivative or a hook changes its gradient. Use a layer there, or leave this "
            "one out with layers=[...].",
            name,
        )


def check_no_reentrant_checkpoint(f: Tensor) -> None:
    """Refuse segments whose parameters autograd does not see.

    Raises:
        NotImplementedError: With the way out.
    """
    todo, seen = [f.grad_fn], {f.grad_fn}
    while todo:
        node = todo.pop()
        if type(node).__name__ == "CheckpointFunctionBackward":
            raise NotImplementedError(
                "The model uses a reentrant checkpoint, within which no layer can be captured: "
                "pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
            )
        new = {n for n, _ in getattr(node, "next_functions", ()) if n is not None} - seen
        seen |= new
        todo += new


def _kind(group: LayerGroup) -> str:
    return f"Layer {group.name!r} ({type(group.layers[0]).__name__})"


def _where_not_finite(calls: Calls) -> str:
    for name, uses in calls.items():
        for call in uses:
            for what, t in (("input", call.x), ("output", call.z)):
                if not t.isfinite().all():
                    n = int((~t.isfinite()).flatten(1).any(1).nonzero()[0])
                    return f"The {what} of layer {name!r} is not finite, first for sample {n}."
    return "The model's output has non-finite entries although its layers have none."
