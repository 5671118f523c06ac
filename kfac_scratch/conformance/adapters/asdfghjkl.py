"""ASDL (https://github.com/kazukiosawa/asdl), on the package index `asdfghjkl`, 0.1a4 and 0.1a5.

Scale: factors are sums divided by `data_size`, "the size of data to be used for averaging curvature
information" (`PreconditioningConfig`); the squared error is that of a Gaussian whose variance `var`
is 1 by default (`KfacGradientMaker`), half of PyTorch's. The empirical Fisher is that of the loss
with the reduction `sum`.

Not asked for: dilated convolutions, which are refused with an error, and EKFAC with other Fishers
than the empirical one, which `EkfacGradientMaker` refuses. The `FisherMaker` below it does not
refuse them: `Unguarded` asks it.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import Tensor, nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    DenseAnswer,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
)
from kfac_scratch.conformance.vocabulary import Fisher

FISHERS: dict[Fisher, str] = {
    "type2": "fisher_exact",
    "mc": "fisher_mc",
    "empirical": "fisher_emp",
}


class Adapter:
    """What a `FisherMaker` leaves in the modules."""

    guarded = True

    def capabilities(self) -> Capabilities:
        """Linear layers and 2d convolutions."""
        return Capabilities(
            "asdfghjkl",
            version("asdfghjkl"),
            fishers=frozenset(FISHERS),
            flavours=frozenset({"expand", "ekfac"}),
        )

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Weight and bias by themselves."""
        layers = {name: request.model.get_submodule(name) for name in request.layers}
        if request.flavour == "ekfac" and request.fisher != "empirical" and self.guarded:
            raise NotSupported("EkfacGradientMaker supports only fisher_emp")
        _check(request, layers)
        _run(request, "kfe" if request.flavour == "ekfac" else "kron")
        part = _products if request.flavour == "ekfac" else _factors
        return {name: part(layer) for name, layer in layers.items()}

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """A mean over data, of half the squared error."""
        half = isinstance(request.loss, nn.MSELoss) and request.fisher != "empirical"
        return drivers.total_divisor(request) / _size(request) / (2 if half else 1)


class Unguarded(Adapter):
    """The same, also for what `EkfacGradientMaker` refuses and `FisherMaker` does not."""

    guarded = False


def _check(request: Request, layers: Mapping[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise NotSupported(f"{name}: only Linear and Conv2d")
        if getattr(layer, "dilation", (1, 1)) != (1, 1):
            raise NotSupported(f"{name}: dilated convolutions are refused")
    if request.fisher == "empirical":
        return
    if getattr(request.loss, "weight", None) is not None:
        raise NotSupported("a type of loss, without class weights")
    if getattr(request.loss, "label_smoothing", 0):
        raise NotSupported("a type of loss, without label smoothing")
    if any(bool((y == -100).any()) for _, y in request.batches):
        raise NotSupported("a type of loss, without targets that are ignored")


def _run(request: Request, shape: str) -> None:
    cross_entropy = isinstance(request.loss, nn.CrossEntropyLoss)
    config = FisherConfig(
        fisher_type=FISHERS[request.fisher],
        fisher_shapes=[shape],
        loss_type="cross_entropy" if cross_entropy else "mse",
        n_mc_samples=request.samples,
        seed=request.seed,
        data_size=_size(request),
    )
    maker = get_fisher_maker(request.model, config)
    for i, (X, y) in enumerate(request.batches):
        output = maker.setup_model_call(request.model, X)
        if cross_entropy and y.ndim > 1:  # its classes are on the last axis
            maker.setup_logits_repr(output.movedim(1, -1).flatten(0, -2))
        maker.setup_loss_call(request.loss, output, y)
        maker.forward_and_backward(accumulate=i > 0)


def _factors(layer: Any) -> LayerBlock:
    """`Kron.mvp` multiplies a bias by the factor of the outputs."""
    A, B = layer.fisher.kron.A, layer.fisher.kron.B
    one = B.new_ones(*B.shape[:-2], 1, 1)
    bias = None if layer.bias is None else KroneckerAnswer(one, B)
    return LayerBlock(weight=KroneckerAnswer(A, B), bias=bias)


def _products(layer: Any) -> LayerBlock:
    """`KFE.mvp` solves with the EKFAC matrix plus `eps`: here for all unit vectors, with 1."""
    W, b = layer.weight, layer.bias
    solve = partial(layer.fisher.kfe.mvp, eps=1.0)
    if b is None:
        return LayerBlock(weight=_inverse([solve(unit) for unit in _units(W)]))
    nothing, none = torch.zeros_like(W), torch.zeros_like(b)
    return LayerBlock(
        weight=_inverse([solve(unit, none.clone())[0] for unit in _units(W)]),
        bias=_inverse([solve(nothing.clone(), unit)[1] for unit in _units(b)]),
    )


def _units(p: Tensor) -> Tensor:
    return torch.eye(p.numel(), dtype=p.dtype).reshape(-1, *p.shape)


def _inverse(columns: list[Tensor]) -> DenseAnswer:
    M = torch.linalg.inv(torch.stack([c.flatten() for c in columns], 1))
    return DenseAnswer(M - torch.eye(len(M)).to(M))


def _size(request: Request) -> int:
    return sum(len(X) for X, _ in request.batches)
