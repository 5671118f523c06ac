"""kfac-jax (https://github.com/google-deepmind/kfac-jax), release 0.0.8, with jax 0.8.2 on the CPU.

Scale: losses are registered with the `weight` that makes "a loss of the form weight *
sum(...) / batch_size" PyTorch's, so that every scale is 1; except for the empirical Fisher, where
gradients are those of that mean: the mode "will introduce an additional normalization of the
2nd-order statistics by the batch size" (`BlockDiagonalCurvature`).

Not asked for: class weights, which `weight` cannot express; convolutions over one or three axes and
grouped ones, for which other blocks than Kronecker ones are made; layers that are used twice, for
the same reason; masked positions and ignored targets, which the default `use_masking=True` of
`RepeatedDenseKroneckerFactored` leaves out of the inputs' factor, an approximation of its own; the
empirical Fisher of several mini-batches, each of which is normalized alone; float32, which does not
work while JAX's 64-bit mode is on.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc, no-untyped-call"

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.protocol import (
    Capabilities,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
    VectorAnswer,
)
from kfac_scratch.conformance.vectors.consumers import kfac_jax_port as port
from kfac_scratch.conformance.vocabulary import LossKind

LOSSES: dict[type[nn.Module], LossKind] = {
    nn.MSELoss: "mse",
    nn.CrossEntropyLoss: "cross-entropy",
    nn.BCEWithLogitsLoss: "bce",
}


class Adapter:
    """The blocks of `BlockDiagonalCurvature`."""

    def capabilities(self) -> Capabilities:
        """Linear layers and 2d convolutions."""
        return Capabilities(
            "kfac-jax",
            version("kfac-jax"),
            fishers=frozenset({"type2", "mc", "empirical"}),
            flavours=frozenset({"expand"}),
            losses=frozenset(LOSSES.values()),
            dtypes=frozenset({"float64"}),
            damping=frozenset({"exact", "factored"}),
            libraries=drivers.installed("jax", "jaxlib"),
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """The loss's own; for the empirical Fisher that of a mean's gradients."""
        return 1 / _divisor(request) if request.fisher == "empirical" else 1.0

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Weight and bias together."""
        _check(request)
        estimate = port.estimate(_problem(request))
        found, factors = {}, estimate.factors()
        for name in request.layers:
            if isinstance(factors[name], str):
                raise NotSupported(f"{name}: its block is a {factors[name]}")
        if request.damping:
            return _solved(request, estimate)
        for name in request.layers:
            A, B = (torch.tensor(M) for M in factors[name])
            found[name] = LayerBlock(joint=KroneckerAnswer(A, B), axes=_axes(request, name))
        return found


def _check(request: Request) -> None:
    loss = request.loss
    if any(getattr(loss, name, None) is not None for name in ("weight", "pos_weight")):
        raise NotSupported("losses without class weights")
    if getattr(loss, "label_smoothing", 0) or _has_probabilities(request):
        raise NotSupported("cross-entropy of labels")
    if unknown := port.unknown(_operations(request)):
        raise NotSupported(f"this port of a network has no {', '.join(sorted(unknown))}")
    masked = any(op["kind"] == "mask" for op in _operations(request))
    if masked or any(bool((y == port.IGNORED).any()) for _, y in request.batches):
        raise NotSupported("use_masking leaves positions without vectors out of the inputs' factor")
    if request.fisher == "empirical" and len(request.batches) > 1:
        raise NotSupported("mini-batches are normalized one by one, as documented")
    for name, layer in request.model.named_modules():
        if isinstance(layer, nn.Conv1d | nn.Conv3d):
            raise NotSupported(f"{name}: no convolutions over one or three axes")


def _has_probabilities(request: Request) -> bool:
    y = request.batches[0][1]
    return isinstance(request.loss, nn.CrossEntropyLoss) and y.is_floating_point()


def _operations(request: Request) -> list[dict[str, Any]]:
    return [
        {"kind": op.kind, "name": op.name, "inputs": op.inputs, "settings": dict(op.settings)}
        for op in CASES[request.case].ops
    ]


def _problem(request: Request) -> port.Problem:
    return port.Problem(
        _operations(request),
        {name: p.detach().numpy() for name, p in request.model.named_parameters()},
        [(X.numpy(), y.numpy()) for X, y in request.batches],
        LOSSES[type(request.loss)],
        _divisor(request),
        request.fisher,
        request.samples,
        request.seed,
    )


def _divisor(request: Request) -> float:
    """The number by which the loss divides the sum of its terms."""
    if request.loss.reduction == "sum":
        return 1.0
    return float(sum((y != port.IGNORED).sum() for _, y in request.batches))


def _axes(request: Request, name: str) -> str:
    return "h w i o" if isinstance(request.model.get_submodule(name), nn.Conv2d) else "i o"


def _solved(request: Request, estimate: Any) -> dict[str, LayerBlock]:
    assert request.damping is not None
    form, damping = request.damping
    gradient = {name: g.numpy() for name, g in request.gradient.items()}
    solution = estimate.solve(gradient, damping, exact=form == "exact")

    def vector(name: str) -> Tensor:
        keys = [key for key in (f"{name}.weight", f"{name}.bias") if key in solution]
        return torch.cat([torch.tensor(solution[key]).flatten() for key in keys])

    return {
        name: LayerBlock(
            joint=VectorAnswer(vector(name)), axes=_axes(request, name), bias_at="behind"
        )
        for name in request.layers
    }
