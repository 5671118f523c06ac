"""ASDL (https://github.com/kazukiosawa/asdl), on the package index `asdfghjkl`, 0.1a4 and 0.1a5.

Scale: factors are sums divided by `data_size`, "the size of data to be used for averaging curvature
information" (`PreconditioningConfig`); the squared error is that of a Gaussian whose variance `var`
is 1 by default (`KfacGradientMaker`), half of PyTorch's. The empirical Fisher is that of the loss
with the reduction `sum`.

`EkfacGradientMaker` refuses EKFAC with other Fishers than the empirical one. `FisherMaker`, on
which it is built, computes it without a word. It is asked where nothing else is added up: for
linear layers without positions that are used once, on one mini-batch. What it computes is no EKFAC
matrix if the columns of `Ua` or `Ub` have other lengths than 1. That is an error, in words.

Not asked for: dilated convolutions, which are refused with an error, and EKFAC with other Fishers
than the empirical one on all other models.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections import Counter
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
        _check(request, layers)
        if request.flavour == "ekfac" and request.fisher != "empirical":
            _check_plain(request)
        _run(request, "kfe" if request.flavour == "ekfac" else "kron")
        part = _products if request.flavour == "ekfac" else _factors
        return {name: part(layer) for name, layer in layers.items()}

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """A mean over data, of half the squared error."""
        half = isinstance(request.loss, nn.MSELoss) and request.fisher != "empirical"
        return drivers.total_divisor(request) / _size(request) / (2 if half else 1)


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


def _check_plain(request: Request) -> None:
    """Linear layers without positions, used once, on one mini-batch."""
    calls: Counter[str] = Counter()
    layers = {n: m for n, m in request.model.named_modules() if isinstance(m, nn.Linear)}
    handles = [
        layer.register_forward_hook(lambda m, x, z, name=name: calls.update({name: z.ndim - 1}))
        for name, layer in layers.items()
    ]
    with torch.no_grad():
        request.model(request.batches[0][0].clone())
    for handle in handles:
        handle.remove()
    others = {*request.layers} - {*layers}
    if others or len(request.batches) > 1 or any(calls[name] != 1 for name in request.layers):
        raise NotSupported("EkfacGradientMaker supports only fisher_emp")


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
    """`KFE.mvp` solves with the EKFAC matrix plus `eps`: here for all unit vectors."""
    W, b, kfe = layer.weight, layer.bias, layer.fisher.kfe
    for name, U in (("Ua", kfe.Ua), ("Ub", kfe.Ub)):
        lengths = (U * U).sum(-2)
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=1e-3):
            found = f"{float(lengths.min()):.3g} to {float(lengths.max()):.3g}"
            raise ValueError(f"the squared lengths of the eigenvectors {name} are {found}, not 1.")
    eps = float(kfe.scale[0].mean())  # of the matrix's size, for single precision
    solve = partial(kfe.mvp, eps=eps)
    if b is None:
        return LayerBlock(weight=_inverse([solve(unit) for unit in _units(W)], eps))
    nothing, none = torch.zeros_like(W), torch.zeros_like(b)
    return LayerBlock(
        weight=_inverse([solve(unit, none.clone())[0] for unit in _units(W)], eps),
        bias=_inverse([solve(nothing.clone(), unit)[1] for unit in _units(b)], eps),
    )


def _units(p: Tensor) -> Tensor:
    return torch.eye(p.numel(), dtype=p.dtype).reshape(-1, *p.shape)


def _inverse(columns: list[Tensor], eps: float) -> DenseAnswer:
    M = torch.linalg.inv(torch.stack([c.flatten() for c in columns], 1))
    return DenseAnswer(M - eps * torch.eye(len(M)).to(M))


def _size(request: Request) -> int:
    return sum(len(X) for X, _ in request.batches)
