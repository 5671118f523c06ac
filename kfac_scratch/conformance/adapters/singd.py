"""SINGD (https://github.com/f-dangel/singd), release 0.0.5: what its hooks collect before a step.

The optimizer "uses the empirical Fisher", and here it is asked for that directly. For the type-2
Fisher, a batch is repeated for every column of a square root `S` of the loss's Hessian, and the
loss is `<f, S>`, summed or averaged over rows: its gradients are the type-2 vectors.

Scale: `loss_average` "is used to ensure that the preconditioner is scaled consistently with the
loss". With `batch`, the loss is "a mean over per-sample losses", and a sample's squared error is
PyTorch's mean over its C outputs: the empirical Fisher of C such terms is 1/C of the canonical one.

Several mini-batches are accumulated as in the library's example: a mean loss is multiplied by the
share of the data.

Not asked for: grouped convolutions, documented to average patches over groups; the empirical Fisher
of a mean with class weights, which PyTorch divides by the sum of the targets' weights: it is no
"mean over as many terms as the size of the mini-batch". What the library refuses with a
NotImplementedError is not supported.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Mapping
from importlib.metadata import version

from singd.optim.optimizer import SINGD
from torch import nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
)


class Adapter:
    """`H_K` and `H_C` before the first step, where the preconditioner is the identity."""

    def capabilities(self) -> Capabilities:
        """Linear layers and 2d convolutions, any loss."""
        return Capabilities(
            "singd",
            version("singd"),
            fishers=frozenset({"type2", "empirical"}),
            flavours=frozenset({"expand", "reduce"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
            libraries=drivers.installed("einconv"),
        )

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Weight and bias together, the bias as last input."""
        for name in request.layers:
            _check(name, request.model.get_submodule(name))
        _check_mean(request)
        optimizer = SINGD(
            request.model,
            kfac_approx=request.flavour,
            loss_average=_average(request),
            warn_unsupported=False,
        )
        try:
            _backward(request)
        except NotImplementedError as reason:
            raise NotSupported(str(reason)) from reason
        K, C = optimizer.H_Ks, optimizer.H_Cs
        return {
            name: LayerBlock(joint=KroneckerAnswer(K[name].to_dense(), C[name].to_dense()))
            for name in request.layers
        }

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """The loss's own; see above for what a term of the empirical Fisher is."""
        y = request.batches[0][1]
        if request.fisher == "empirical" and _average(request) and y.is_floating_point():
            return 1 / y.shape[-1]
        return 1.0


def _check(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise NotSupported(f"{name}: only Linear and Conv2d")
    if getattr(layer, "groups", 1) > 1:
        raise NotSupported(f"{name}: documented to average patches over groups")


def _check_mean(request: Request) -> None:
    weighted = isinstance(request.loss, nn.CrossEntropyLoss) and request.loss.weight is not None
    if request.fisher == "empirical" and weighted and _average(request):
        raise NotSupported("a mean over as many terms as data, without class weights")


def _average(request: Request) -> str | None:
    """How the loss averages, in SINGD's words."""
    y = request.batches[0][1]
    if request.loss.reduction == "sum":
        return None
    positions = y.ndim > (2 if y.is_floating_point() else 1)
    return "batch+sequence" if positions and request.fisher == "empirical" else "batch"


def _backward(request: Request) -> None:
    """With mean reduction, a mini-batch's loss is multiplied by the share of the data."""
    mean, batches = _average(request) is not None, request.batches
    if request.fisher == "empirical":
        total = sum(y.numel() for _, y in batches)
        for X, y in batches:
            share = y.numel() / total if mean else 1.0
            (share * request.loss(request.model(X), y)).backward()
        return
    pairs = drivers.rows(request)
    data = sum(len(X) for X, _ in pairs)
    for X, v in pairs:  # a mean over rows of <f, v> sqrt(rows)
        total_loss = (request.model(X) * v).sum()
        (total_loss / data**0.5 if mean else total_loss).backward()
