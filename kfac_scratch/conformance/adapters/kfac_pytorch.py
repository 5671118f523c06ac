"""kfac-pytorch (https://github.com/gpauloski/kfac-pytorch), commit 869cf11 of release 0.4.2.

A preconditioner that sees gradients only: the empirical Fisher is that of the loss it is given. For
the type-2 Fisher, a batch is repeated for every column of a square root `S` of the loss's Hessian,
and the loss is `<f, S>` times the root of the number of rows.

Scale: "computes the empirical second moment of a 2D tensor", a mean over its rows (`get_cov`), of
gradients of the loss as it is. That several positions change the scale, and in another way for
convolutions, is not documented.

Not asked for: in-place activations, which PyTorch refuses below full backward hooks.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from kfac.preconditioner import KFACPreconditioner
from torch import Tensor, nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
)


class Adapter:
    """The factors `A` and `G` that one step takes into its running averages."""

    def capabilities(self) -> Capabilities:
        """Linear layers and 2d convolutions, any loss."""
        return Capabilities(
            "kfac-pytorch",
            version("kfac_pytorch"),
            fishers=frozenset({"type2", "empirical"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
        )

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Weight and bias together, the bias as last input."""
        _check(request)
        batches = _driven(request)
        made = KFACPreconditioner(
            request.model, accumulation_steps=len(batches), update_factors_in_hook=False
        )
        for X, v in batches:
            _backward(request, X, v)
        states = dict(made._layers.values())
        return {name: LayerBlock(joint=_factors(states[name])) for name in request.layers}

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """A mean over data of the outer products of a mean loss's gradients."""
        if request.fisher != "empirical":
            return 1.0
        N = sum(len(X) for X, _ in request.batches)
        return 1 / (N * drivers.total_divisor(request))


def _check(request: Request) -> None:
    if any(getattr(m, "inplace", False) for m in request.model.modules()):
        raise NotSupported("in-place activations, which PyTorch refuses below full backward hooks")
    for name in request.layers:
        if not isinstance(request.model.get_submodule(name), nn.Linear | nn.Conv2d):
            raise NotSupported(f"{name}: only Linear and Conv2d")


def _driven(request: Request) -> list[tuple[Tensor, Tensor]]:
    """Inputs, and targets or the vectors that are sent back."""
    if request.fisher == "empirical":
        return request.batches
    pairs = drivers.rows(request)
    count = sum(len(X) for X, _ in pairs)
    return [(X, v * count**0.5) for X, v in pairs]


def _backward(request: Request, X: Tensor, v: Tensor) -> None:
    f = request.model(X)
    if request.fisher != "empirical":
        (f * v).sum().backward()
        return
    share = 1.0
    if request.loss.reduction == "mean":  # of all the data
        share = len(X) / sum(len(X) for X, _ in request.batches)
    (share * request.loss(f, v)).backward()


def _factors(layer: Any) -> KroneckerAnswer:
    """What a step does with the factors of its batches, where the running average forgets."""
    layer.update_a_factor(alpha=0.0)
    layer.update_g_factor(alpha=0.0)
    return KroneckerAnswer(layer.a_factor, layer.g_factor)
