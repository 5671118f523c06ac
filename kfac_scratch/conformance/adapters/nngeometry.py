r"""NNGeometry (https://github.com/tfjgeorge/nngeometry), release 0.4, and 0.3.2 before it.

Scale: the docstring of `TorchHooksJacobianBackend` says
$F = \frac1n \sum_{i,j} J_{ij} J_{ij}^\top$ of the functions that `FIM` makes: a normal distribution
with identity covariance, a softmax or a sigmoid model. There is no loss argument, so that its mean
or sum, and the 2 of PyTorch's squared error, are scales that the documentation states. The
empirical Fisher is the same formula for every datum's loss.

`FIM(..., "classif_logits")` builds its constants in PyTorch's default precision. Most cases are in
double precision, which is therefore the default in every call: somebody who works in it says
`torch.set_default_dtype(torch.float64)` once. It stays the default for the cases in single
precision.

A `LayerCollection` names the layers whose blocks are wanted: normalisations have other blocks than
Kronecker ones, and would be asked for them. Not asked for: embeddings, which no `LayerCollection`
takes ("I do not know what to do with layer").
"""
# mypy: disable-error-code="import-untyped, import-not-found, misc"

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from importlib.metadata import version
from typing import Any

import torch
from nngeometry import metrics
from nngeometry.backend import TorchHooksJacobianBackend
from nngeometry.layercollection import LayerCollection
from nngeometry.object import PMatEKFAC, PMatKFAC
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
)

VARIANTS = {
    nn.MSELoss: "regression",
    nn.CrossEntropyLoss: "classif_logits",
    nn.BCEWithLogitsLoss: "classif_binary_logits",
}


class Adapter:
    """The KFAC and EKFAC representations, weight and bias together."""

    def capabilities(self) -> Capabilities:
        """KFAC-expand of linear layers, 1d and 2d convolutions."""
        return Capabilities(
            "nngeometry",
            version("nngeometry"),
            fishers=frozenset({"type2", "mc", "empirical"}),
            flavours=frozenset({"expand", "ekfac"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """`D / N`, and a half for the normal distribution, if `D` is what the loss divides by."""
        N, D = len(_data(request)[0]), drivers.total_divisor(request)
        gaussian = isinstance(request.loss, nn.MSELoss) and request.fisher != "empirical"
        return D / N / (2.0 if gaussian else 1.0)

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """The factors; the bias is the last input."""
        _check(request)
        with _double_precision():
            return _fitted(request)


def _fitted(request: Request) -> dict[str, LayerBlock]:
    loader = _loader(request)
    if request.flavour != "ekfac":
        matrix = _matrix(request, PMatKFAC, loader)
        return {n: LayerBlock(KroneckerAnswer(A, B)) for n, (A, B) in matrix.data.items()}
    matrix = _matrix(request, PMatEKFAC, loader)
    matrix.update_diag(loader)
    vectors, values = matrix.data
    return {
        n: LayerBlock(EigenAnswer(QA, QB, values[n].reshape(*QB.shape[:-1], QA.shape[-1])))
        for n, (QA, QB) in vectors.items()
    }


def _check(request: Request) -> None:
    loss = request.loss
    if any(getattr(loss, name, None) is not None for name in ("weight", "pos_weight")):
        raise NotSupported("weights in a loss")
    f, linear = _axes(request)
    if linear > 2:
        raise NotSupported("linear layers on more than two axes")
    if request.fisher == "empirical":
        return
    if isinstance(loss, nn.CrossEntropyLoss) and f > 2:
        raise NotSupported("cross-entropy per position, other than sampled for images")
    if request.fisher == "mc" and not isinstance(loss, nn.CrossEntropyLoss):
        raise NotSupported("sampled labels other than of a softmax")


def _axes(request: Request) -> tuple[int, int]:
    """How many axes the output has, and at most the result of a linear layer."""
    found = [0]
    handles = [
        m.register_forward_hook(lambda m, x, z: found.append(z.ndim))
        for m in request.model.modules()
        if isinstance(m, nn.Linear)
    ]
    with torch.no_grad():
        f = request.model(request.batches[0][0].clone())
    for handle in handles:
        handle.remove()
    return f.ndim, max(found)


def _matrix(request: Request, kind: Any, loader: DataLoader[Any]) -> Any:
    layers = _layers(request)
    if request.fisher == "empirical":
        function = _losses(request.model, request.loss)
        backend = TorchHooksJacobianBackend(request.model, function, layer_collection=layers)
        return kind(generator=backend, examples=loader)
    model, variant = request.model, VARIANTS[type(request.loss)]
    if request.fisher == "mc":
        torch.manual_seed(request.seed)
        return metrics.FIM_MonteCarlo(
            model, loader, kind, variant, request.samples, layer_collection=layers
        )
    return metrics.FIM(model, loader, kind, variant, layer_collection=layers)


def _layers(request: Request) -> LayerCollection:
    """The layers whose blocks are wanted."""
    layers = LayerCollection()
    for name in request.layers:
        module = request.model.get_submodule(name)
        try:
            layers.add_layer_from_model(request.model, module)
        except NotImplementedError as reason:
            raise NotSupported(f"{name}: no block for {type(module).__name__}") from reason
    return layers


def _losses(model: nn.Module, loss: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """Every datum's sum of the loss's terms, `[N, 1]`."""
    terms = deepcopy(loss)
    terms.reduction = "none"  # type: ignore[assignment]
    return lambda X, y: terms(model(X), y).reshape(len(X), -1).sum(1, keepdim=True)


def _data(request: Request) -> tuple[Tensor, Tensor]:
    X, y = zip(*request.batches, strict=True)
    return torch.cat(X), torch.cat(y)


def _loader(request: Request) -> DataLoader[Any]:
    sizes = [len(X) for X, _ in request.batches]
    batches = torch.arange(sum(sizes)).split(sizes)
    return DataLoader(TensorDataset(*_data(request)), batch_sampler=[b.tolist() for b in batches])


@contextmanager
def _double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
