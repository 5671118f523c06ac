"""SINGD (https://github.com/f-dangel/singd), release 0.0.5: what its hooks collect before a step.

The optimizer "uses the empirical Fisher", and here it is asked for that directly. For the type-2
Fisher, a batch is repeated for every column of a square root `S` of the loss's Hessian, and the
loss is `<f, S>`, summed or averaged over rows: its gradients are the type-2 vectors.

Scale: `loss_average` "is used to ensure that the preconditioner is scaled consistently with the
loss". With `batch`, the loss is "a mean over per-sample losses", and a sample's squared error is
PyTorch's mean over its C outputs: the empirical Fisher of C such terms is 1/C of the canonical one.

Several mini-batches are accumulated as in the library's example: a mean loss is multiplied by the
share of the data. Not asked for: grouped convolutions, documented to average patches over groups.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Mapping
from importlib.metadata import version

import torch
from singd.optim.optimizer import SINGD
from torch import Tensor, nn
from torch.func import hessian, vmap

from kfac_scratch.conformance.protocol import (
    Capabilities,
    Kronecker,
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
        )

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Weight and bias together, the bias as last input."""
        for name in request.layers:
            _check(name, request.model.get_submodule(name))
        optimizer = SINGD(
            request.model,
            kfac_approx=request.flavour,
            loss_average=_average(request),
            warn_unsupported=False,
        )
        for X, y in request.batches:
            make = _own_loss if request.fisher == "empirical" else _linear_loss
            make(request, X, y).backward()
        K, C = optimizer.H_Ks, optimizer.H_Cs
        return {
            name: LayerBlock(joint=Kronecker(K[name].to_dense(), C[name].to_dense()))
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


def _average(request: Request) -> str | None:
    """How the loss averages, in SINGD's words."""
    y = request.batches[0][1]
    if request.loss.reduction == "sum":
        return None
    positions = y.ndim > (2 if y.is_floating_point() else 1)
    return "batch+sequence" if positions and request.fisher == "empirical" else "batch"


def _own_loss(request: Request, X: Tensor, y: Tensor) -> Tensor:
    """With mean reduction, a mini-batch has the share of its terms."""
    total = sum(y.numel() for _, y in request.batches)
    share = y.numel() / total if request.loss.reduction == "mean" else 1.0
    return share * request.loss(request.model(X), y)


def _linear_loss(request: Request, X: Tensor, y: Tensor) -> Tensor:
    """`<f, S>` for a batch that is repeated for every column of `S`.

    As a mean over rows it is that of `<f, S> sqrt(rows)`, all mini-batches' rows counted.
    """
    columns = _roots(request, request.model(X).detach(), y)  # [V, N, F]
    repeated = X.repeat(len(columns), *[1] * (X.ndim - 1))
    total = (request.model(repeated).flatten(1) * columns.flatten(0, 1)).sum()
    rows = len(columns) * sum(len(X) for X, _ in request.batches)
    return total if _average(request) is None else total / rows**0.5


def _roots(request: Request, f: Tensor, y: Tensor) -> Tensor:
    """Columns of a square root of the Hessian of every datum's part of the loss."""
    loss, all_y = request.loss, torch.cat([y for _, y in request.batches])
    names = ("weight", "pos_weight")
    weights = {name: w for name in names if (w := getattr(loss, name, None)) is not None}
    terms = type(loss)(reduction="sum", **weights)
    like_all = f[:1].expand(len(all_y), *f.shape[1:])
    divisor = terms(like_all, all_y) / loss(like_all, all_y)

    def of_datum(v: Tensor, t: Tensor) -> Tensor:
        return terms(v.reshape(1, *f.shape[1:]), t.unsqueeze(0)) / divisor

    values, Q = torch.linalg.eigh(vmap(hessian(of_datum))(f.flatten(1), y))
    return (Q * values.clamp_min(0).sqrt().unsqueeze(1)).permute(2, 0, 1)
