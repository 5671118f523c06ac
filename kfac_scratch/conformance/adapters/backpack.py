"""BackPACK (https://backpack.pt), releases 1.6 and 1.7: KFLR (exact), KFAC (sampled), KFRA.

Scale: that of the loss it is given (docstrings of `MSELossDerivatives` and others). For the weights
of convolutions, the docstring of `HBPConvNd.weight` says that the factor of the vectors differs
from the KFC paper's, which is the canonical one, by the number of positions. The factor of the
bias, it says, is the GGN.

BackPACK's squared error takes matrices only: what a convolution returns is flattened before. It
knows no adaptive pooling: a pool over the whole map is written as `AvgPool2d`.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import KFAC, KFLR, KFRA
from torch import Tensor, nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Part,
    Request,
)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Kernels = Mapping[str, tuple[int, ...]]


class Adapter:
    """Weight and bias by themselves."""

    def capabilities(self) -> Capabilities:
        """Chains of layers, on one mini-batch."""
        return Capabilities(
            "BackPACK",
            version("backpack-for-pytorch"),
            fishers=frozenset({"type2", "mc"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
            batches=False,
            libraries=drivers.installed("unfoldNd"),
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """The number of positions for the weight of a convolution."""
        if part == "bias" or not isinstance(request.model.get_submodule(layer), CONVOLUTIONS):
            return 1.0
        X = request.batches[0][0]
        return float(_outputs(request.model, X)[layer].flatten(2).shape[2])

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """The factors, written into the parameters."""
        torch.manual_seed(request.seed)
        return _run(request, KFAC(request.samples) if request.fisher == "mc" else KFLR())


class Recursive(Adapter):
    """KFRA, which sends averages over data backward, in the precision of the model.

    It is another approximation than KFAC, and the same only where both are exact: for one datum, or
    without activations under squared error.
    """

    def capabilities(self) -> Capabilities:
        """Chains of linear layers."""
        return replace(
            super().capabilities(),
            name="BackPACK KFRA",
            fishers=frozenset({"type2"}),
            ops=frozenset({"linear"}),
        )

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """The factors, written into the parameters."""
        ((X, _),) = request.batches
        linear = all(isinstance(child, nn.Linear) for child in request.model.children())
        if len(X) > 1 and not (linear and isinstance(request.loss, nn.MSELoss)):
            raise NotSupported("an approximation of its own with several data")
        before = torch.get_default_dtype()
        torch.set_default_dtype(X.dtype)  # see the finding about double precision
        try:
            return _run(request, KFRA())
        finally:
            torch.set_default_dtype(before)


def _run(request: Request, extension: Any) -> dict[str, LayerBlock]:
    ((X, y),) = request.batches
    model, loss = _chain(request, X), extend(request.loss)
    for child in model.children():
        if type(child) not in extension._BackpropExtension__module_extensions:
            raise NotSupported(f"no extension for {type(child).__name__}")
    try:
        f = extend(model)(X)
        with backpack(extension):
            loss(f, _as_matrix(y) if isinstance(loss, nn.MSELoss) else y).backward()
    except NotImplementedError as reason:
        raise NotSupported(str(reason) or "BackPACK raises NotImplementedError") from reason
    return {name: _block(model.get_submodule(name), extension.savefield) for name in request.layers}


def _block(layer: Any, field: str) -> LayerBlock:
    def part(p: Tensor) -> Part:
        B, *A = getattr(p, field)
        return KroneckerAnswer(A[0] if A else B.new_ones(1, 1), B)

    bias = layer.bias
    return LayerBlock(weight=part(layer.weight), bias=part(bias) if bias is not None else None)


def _outputs(model: nn.Module, X: Tensor) -> dict[str, Tensor]:
    """What every child of a chain returns."""
    found = {}
    with torch.no_grad():
        for name, child in model.named_children():
            X = found[name] = child(X.clone())
    return found


def _as_matrix(y: Tensor) -> Tensor:
    return y.flatten(1)


def _chain(request: Request, X: Tensor) -> nn.Sequential:
    """The same network of the modules that BackPACK knows."""
    if not isinstance(request.model, nn.Sequential):
        raise NotSupported("networks that are no chain of modules")
    if any(getattr(child, "inplace", False) for child in request.model.children()):
        raise NotSupported("in-place activations, which PyTorch refuses below full backward hooks")
    chain, outputs = nn.Sequential(), _outputs(request.model, X)
    before = X
    for name, child in request.model.named_children():
        if isinstance(child, nn.Sequential):  # global average pooling
            if before.ndim != 4:
                raise NotSupported("average pooling other than AvgPool2d")
            chain.append(nn.AvgPool2d((before.shape[2], before.shape[3]))).append(nn.Flatten())
        else:
            chain.add_module(name, child)
        before = outputs[name]
    if before.ndim > 2 and isinstance(request.loss, nn.MSELoss):
        chain.append(nn.Flatten())
    return chain
