"""Kronfluence (https://github.com/pomonam/kronfluence), releases 1.0.0 and 1.0.1.

A task tells it the loss, so that every kind of Fisher is a loss: the empirical one is the sum over
all terms, as the documentation demands; a sampled one draws the targets, as its examples do, the
data repeated once per label; the GGN is `sqrt(V) <f, S_v>` with the data repeated for all V columns
of a root of the loss's Hessian.

Scale: "the function should return the summed loss (over batches and tokens)", and factors are means
over examples: `D / N` if `D` is what the loss divides its terms by. That several positions of an
example change the scale of `kfac`, and not of `ekfac`, is not documented.

Not asked for: grouped convolutions. `extract_patches` documents that it averages patches over the
groups, which is an approximation of its own. What the library refuses with an
`UnsupportableModuleError` is not supported.
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Mapping
from copy import deepcopy
from importlib.metadata import version

import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor import covariance, eigen
from kronfluence.task import Task
from kronfluence.utils.exceptions import UnsupportableModuleError
from kronfluence.utils.state import State
from torch import Tensor, nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
)

Factors = Mapping[str, Mapping[str, Tensor]]


class Adapter:
    """The `kfac` and `ekfac` strategies, weight and bias together."""

    def capabilities(self) -> Capabilities:
        """Linear layers and 2d convolutions."""
        return Capabilities(
            "kronfluence",
            version("kronfluence"),
            fishers=frozenset({"type2", "mc", "empirical"}),
            flavours=frozenset({"expand", "ekfac"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
            libraries=drivers.installed("einconv"),
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """Of a mean over examples of the curvature of the summed loss."""
        return drivers.total_divisor(request) / sum(len(X) for X, _ in request.batches)

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """The factors; the bias is the last input."""
        for name in request.layers:
            if not isinstance(request.model.get_submodule(name), nn.Linear | nn.Conv2d):
                raise NotSupported(f"{name}: only Linear and Conv2d, as the documentation says")
            if getattr(request.model.get_submodule(name), "groups", 1) > 1:
                raise NotSupported(f"{name}: documented to average patches over groups")
        try:
            return _fitted(request)
        except UnsupportableModuleError as reason:
            raise NotSupported(str(reason)) from reason


class _Sampled(Task):
    """The summed loss at the targets, or at targets drawn from the model's distribution."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = deepcopy(loss)
        self.loss.reduction = "sum"  # type: ignore[assignment]

    def compute_train_loss(
        self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        X, y = batch
        f = model(X)
        return self.loss(f, _drawn(self.loss, f.detach()) if sample else y)

    def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class _Linear(_Sampled):
    """A linear function of the output, whose coefficients stand in the place of the targets."""

    def compute_train_loss(
        self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
    ) -> Tensor:
        X, v = batch
        return (v * model(X)).sum()


def _drawn(loss: nn.Module, f: Tensor) -> Tensor:
    if isinstance(loss, nn.MSELoss):
        return torch.normal(f, 0.5**0.5)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return f.sigmoid().bernoulli()
    p = f.softmax(1).movedim(1, -1)
    return p.flatten(0, -2).multinomial(1).reshape(p.shape[:-1])


def _driven(request: Request) -> tuple[Task, list[tuple[Tensor, Tensor]]]:
    """A task and data whose factors are those of the Fisher that is asked for."""
    if request.fisher == "empirical":
        return _Sampled(request.loss), request.batches
    if request.fisher == "mc":
        torch.manual_seed(request.seed)
        return _Sampled(request.loss), request.batches * request.samples
    D = drivers.total_divisor(request)  # what is driven is the summed loss
    rows = [
        (repeated, (D * len(repeated) / len(X)) ** 0.5 * v)
        for (X, _), (repeated, v) in zip(request.batches, drivers.rows(request), strict=True)
    ]
    return _Linear(request.loss), rows


def _fitted(request: Request) -> dict[str, LayerBlock]:
    task, batches = _driven(request)
    strategy = "ekfac" if request.flavour == "ekfac" else "kfac"
    dtype = batches[0][0].dtype
    options = FactorArguments(
        strategy,
        use_empirical_fisher=request.fisher != "mc",
        has_shared_parameters=True,
        activation_covariance_dtype=dtype,
        gradient_covariance_dtype=dtype,
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )
    model, state = prepare_model(deepcopy(request.model), task), State(cpu=True)
    inputs = (model, state, task, batches, options)
    _, C = covariance.fit_covariance_matrices_with_loader(*inputs, disable_tqdm=True)
    if strategy == "kfac":
        return {name: LayerBlock(_kronecker(C, name)) for name in request.layers}
    Q = eigen.perform_eigendecomposition(C, model, state, options, disable_tqdm=True)
    _, L = eigen.fit_lambda_matrices_with_loader(*inputs, eigen_factors=Q, disable_tqdm=True)
    return {name: LayerBlock(_eigen(Q, L, name)) for name in request.layers}


def _kronecker(C: Factors, name: str) -> KroneckerAnswer:
    A, B = (
        C[f"{side}_covariance"][name] / C[f"num_{side}_covariance_processed"][name]
        for side in ("activation", "gradient")
    )
    return KroneckerAnswer(A, B)


def _eigen(Q: Factors, L: Factors, name: str) -> EigenAnswer:
    scale = L["lambda_matrix"][name] / L["num_lambda_processed"][name]
    return EigenAnswer(Q["activation_eigenvectors"][name], Q["gradient_eigenvectors"][name], scale)
