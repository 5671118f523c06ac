"""laplace-torch (https://github.com/aleximmer/Laplace), release 0.3: `KronLaplace`.

With its default backend, which is curvlinops: what the oracle says of that it says of this, too.
Release 0.2.2.2 imports a module of curvlinops that release 3 has not, and is asked with release 2.

Scale: the curvature is that of the sum over data of negative log-likelihoods, for regression of a
Gaussian with unit variance: "factor: conversion factor between torch losses and base likelihoods.
For example, 1/2 to get to N(f, 1) from MSELoss" (`CurvatureInterface`). So it is half of that of
the sum of PyTorch's squared errors; and a quarter of its empirical Fisher, which is quadratic in
the loss.

Not asked for: grouped convolutions, which the backend documents to average over groups. What the
backend refuses with a NotImplementedError is not supported.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

from laplace import Laplace
from laplace.curvature import CurvlinopsEF, CurvlinopsGGN
from torch import Tensor, nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
)


class Loader:
    """Mini-batches as they are, and how many data there are."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.dataset = batches, range(sum(len(X) for X, _ in batches))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


class Adapter:
    """The factors of a fitted `KronLaplace`."""

    def capabilities(self) -> Capabilities:
        """Linear layers and 2d convolutions."""
        return Capabilities(
            "laplace-torch",
            version("laplace-torch"),
            fishers=frozenset({"type2", "mc", "empirical"}),
            flavours=frozenset({"expand", "reduce"}),
            libraries=drivers.installed("curvlinops-for-pytorch"),
        )

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Weight and bias by themselves, with factors `[B, A]` and `[B]`."""
        _check(request)
        names = [name for name, _ in request.model.named_parameters()]
        kfacs = dict(zip(names, _fitted(request).H_facs.kfacs, strict=True))
        found = {}
        for name in request.layers:
            B, A = kfacs[f"{name}.weight"]
            bias = [KroneckerAnswer(b.new_ones(1, 1), b) for b in kfacs.get(f"{name}.bias", [])]
            found[name] = LayerBlock(weight=KroneckerAnswer(A, B), bias=next(iter(bias), None))
        return found

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """A sum over data, of half the squared error."""
        half = (0.25 if request.fisher == "empirical" else 0.5) if _regression(request) else 1.0
        if request.loss.reduction == "sum":
            return half
        return half * float(sum((y != -100).sum() for _, y in request.batches))


def _regression(request: Request) -> bool:
    return isinstance(request.loss, nn.MSELoss)


def _check(request: Request) -> None:
    if getattr(request.loss, "weight", None) is not None:
        raise NotSupported("a likelihood, without class weights")
    y = request.batches[0][1]
    if getattr(request.loss, "label_smoothing", 0) or (
        not _regression(request) and y.is_floating_point()
    ):
        raise NotSupported("a likelihood of labels, without smoothing or probabilities")
    for name, layer in request.model.named_modules():
        if getattr(layer, "weight", None) is None:
            continue
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            raise NotSupported(f"{name}: only Linear and Conv2d")
        if getattr(layer, "groups", 1) > 1:
            raise NotSupported(f"{name}: documented to average patches over groups")


def _fitted(request: Request) -> Any:
    options: dict[str, object] = {"kfac_approx": request.flavour}
    if request.fisher == "mc":
        options |= {"mc_samples": request.samples, "seed": request.seed}
    fitted = Laplace(
        request.model,
        "regression" if _regression(request) else "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=CurvlinopsEF if request.fisher == "empirical" else CurvlinopsGGN,
        backend_kwargs={"stochastic": True} if request.fisher == "mc" else {},
        asdl_fisher_kwargs=options,
    )
    try:
        fitted.fit(Loader(request.batches))
    except NotImplementedError as reason:
        raise NotSupported(str(reason)) from reason
    return fitted
