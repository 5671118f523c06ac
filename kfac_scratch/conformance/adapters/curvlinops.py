"""curvlinops (https://github.com/f-dangel/curvlinops), release 3.0.1, and releases 3.0.0 and 2.0.1.

Scale: the operator represents the Fisher or GGN of the loss that it is given, mean or sum included
(docstrings of `KFACLinearOperator` and `GGNLinearOperator`), so that every scale is 1, except for
the empirical Fisher of a mean with class weights: `EFLinearOperator` documents a mean over data of
terms whose mean is the loss, where the canonical one divides by the sum of the targets' weights.

Not asked for: grouped convolutions. `kfac_utils.extract_patches` documents that it averages patches
over the groups, which is an approximation of its own. What the library refuses with a
NotImplementedError is not supported: `extract_patches` documents one for a padding that is not the
same on both sides.

Release 2 has no EKFAC, and other names for what computes factors, and for products with tensors.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import curvlinops
import torch
from curvlinops import KFACInverseLinearOperator, KFACLinearOperator
from torch import nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Part,
    Request,
    VectorAnswer,
)
from kfac_scratch.conformance.vocabulary import Fisher, Flavour

EKFACLinearOperator = getattr(curvlinops, "EKFACLinearOperator", None)
FISHERS: dict[Fisher, str] = {"type2": "type-2", "mc": "mc", "empirical": "empirical"}


class Adapter:
    """KFAC and EKFAC with weight and bias together."""

    def capabilities(self) -> Capabilities:
        """Linear layers and 2d convolutions."""
        kfac: frozenset[Flavour] = frozenset({"expand", "reduce"})
        return Capabilities(
            "curvlinops",
            version("curvlinops-for-pytorch"),
            fishers=frozenset(FISHERS),
            flavours=kfac | {"ekfac"} if EKFACLinearOperator else kfac,
            losses=frozenset({"mse", "cross-entropy", "bce"}),
            damping=frozenset({"exact", "factored"}),
            libraries=drivers.installed("einconv"),
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """The loss's own; for a weighted mean of the empirical Fisher, terms by their weights."""
        weighted = isinstance(request.loss, nn.CrossEntropyLoss) and request.loss.weight is not None
        if request.fisher == "empirical" and weighted and request.loss.reduction == "mean":
            return sum(y.numel() for _, y in request.batches) / drivers.total_divisor(request)
        return 1.0

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """The factors that the operator keeps; the bias is the last input."""
        layers = {name: request.model.get_submodule(name) for name in request.layers}
        for name, layer in layers.items():
            _check(name, layer)
        _check_output(request)
        try:
            made = _operator(request)
        except NotImplementedError as reason:
            raise NotSupported(str(reason)) from reason
        if request.damping:
            return _solved(request, made, request.damping)
        part = _eigen if request.flavour == "ekfac" else _kronecker
        return {name: LayerBlock(joint=part(made, name)) for name in layers}


def _check(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise NotSupported(f"{name}: only Linear and Conv2d, as the documentation says")
    if getattr(layer, "groups", 1) > 1:
        raise NotSupported(f"{name}: documented to average patches over groups")


def _parameters(request: Request) -> dict[str, nn.Parameter]:
    layers = [
        (n, m) for n, m in request.model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    return {f"{n}.{key}": p for n, m in layers for key, p in m.named_parameters()}


def _operator(request: Request) -> Any:
    kind = EKFACLinearOperator if request.flavour == "ekfac" else KFACLinearOperator
    operator = kind(
        request.model,
        request.loss,
        list(_parameters(request).values()),
        request.batches,
        check_deterministic=False,
        seed=request.seed,
        fisher_type=FISHERS[request.fisher],
        mc_samples=request.samples if request.fisher == "mc" else 1,
        kfac_approx="reduce" if request.flavour == "reduce" else "expand",
        separate_weight_and_bias=False,
    )
    _method(operator, "compute_kronecker_factors", "_compute_kfac")()
    if request.flavour == "ekfac":
        operator.compute_eigenvalue_correction()
    return operator


def _method(owner: Any, *names: str) -> Any:
    """The first method of these that a release has."""
    return next(getattr(owner, name) for name in names if hasattr(owner, name))


def _check_output(request: Request) -> None:
    with torch.no_grad():
        axes = request.model(request.batches[0][0].clone()).ndim
    if request.flavour == "ekfac" and axes > 2:
        raise NotSupported("EKFAC with more than two axes of the output, as the documentation says")


def _kronecker(operator: Any, name: str) -> Part:
    return KroneckerAnswer(operator._input_covariances[name], operator._gradient_covariances[name])


def _eigen(operator: Any, name: str) -> Part:
    scale = operator._corrected_eigenvalues[name]
    return EigenAnswer(
        operator._input_covariances_eigenvectors[name],
        operator._gradient_covariances_eigenvectors[name],
        next(iter(scale.values())) if isinstance(scale, dict) else scale,  # without a bias
    )


def _solved(request: Request, operator: Any, damping: tuple[str, float]) -> dict[str, LayerBlock]:
    """The damped inverse times the gradient, the bias behind the whole weight."""
    form, value = damping
    flag = "use_exact_damping" if form == "exact" else "use_heuristic_damping"
    inverse = KFACInverseLinearOperator(operator, damping=value, **{flag: True})
    names = list(_parameters(request))
    times = _method(inverse, "torch_matvec", "__matmul__")
    vectors = dict(zip(names, times([request.gradient[n] for n in names]), strict=True))
    found = {}
    for name in request.layers:
        parts = [vectors[key].flatten() for key in names if key.rpartition(".")[0] == name]
        found[name] = LayerBlock(joint=VectorAnswer(torch.cat(parts)), bias_at="behind")
    return found
