"""This package, as the oracle sees it: through its public functions only."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

import kfac_scratch as ks
from kfac_scratch.conformance.protocol import (
    Capabilities,
    DenseAnswer,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    Part,
    Request,
    VectorAnswer,
)
from kfac_scratch.pinn.terms import Field, Term, linearize
from kfac_scratch.taylor.expansions import laplacian

FLAVOURS = {"expand": ks.EXPAND, "reduce": ks.REDUCE, "ekfac": ks.EXPAND}


class Adapter:
    """kfac_scratch."""

    def capabilities(self) -> Capabilities:
        """Everything that the oracle asks for."""
        return Capabilities(
            "kfac_scratch",
            ks.__version__,
            fishers=frozenset({"type2", "mc", "empirical"}),
            flavours=frozenset({"expand", "reduce", "ekfac"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
            damping=frozenset({"exact", "factored"}),
            operators=True,
            projections=True,
            ties=True,
            masks=True,
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """The canonical scale is ours."""
        return 1.0

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Weight and bias together, the bias as last input."""
        found = matrices(request)
        names = {name: [n for n in found if n.split("[")[0] == name] for name in request.layers}
        return {
            name: LayerBlock(joint=_part(request, name, [found[n] for n in groups]))
            for name, groups in names.items()
        }


def matrices(request: Request) -> Mapping[str, ks.Matrix]:
    """The matrix of every block."""
    if request.coefficients is not None:
        reduced = request.flavour == "reduce"
        ios = _of_operator(request, request.coefficients)
        return {name: ks.kfac(io.reduced() if reduced else io) for name, io in ios.items()}
    return ks.over_loader(
        ks.ekfac if request.flavour == "ekfac" else ks.FactorSums(),
        request.model,
        request.loss,
        request.batches,
        _fisher(request),
        flavour=FLAVOURS[request.flavour],
        layers=_modules(request),
        progress=False,
        counted=_counted(request),
    )


def _modules(request: Request) -> list[str] | None:
    """The modules that hold the weights of what is asked, if that is not every parameter.

    Projections of attention have one module in common.
    """
    if not ks.uncovered(request.model, ks.layer_groups(request.model)):
        return None
    modules = dict(request.model.named_modules())
    names = [name if name in modules else name.rpartition(".")[0] for name in request.layers]
    return list(dict.fromkeys(names))


def _counted(request: Request) -> Callable[[Any, Tensor], Tensor] | None:
    """The masks of the batches, which come in their order."""
    masks = iter(request.masks)
    return (lambda X, y: next(masks)) if request.masks else None


def _fisher(request: Request) -> ks.BackpropagatedVectors:
    match request.fisher:
        case "type2":
            return ks.type2
        case "empirical":
            return ks.empirical
    device = request.batches[0][0].device
    return ks.monte_carlo(request.samples, Generator(device).manual_seed(request.seed))


def _of_operator(request: Request, c: Tensor) -> dict[str, ks.LayerIO]:
    """The layers of a network whose Taylor coefficients make a residual."""
    ((X, y),) = request.batches

    def residual(u: Field, X: Tensor) -> Tensor:
        slopes = torch.stack([d.squeeze(1) for d in u.d], 1)
        values, lap = u.value.squeeze(1), u.lap.squeeze(1)
        return c[:, 0] * values + (c[:, 1:-1] * slopes).sum(1) + c[:, -1] * lap - y.squeeze(1)

    weight = 2.0 if request.loss.reduction == "mean" else 2.0 * len(X)
    ((lin,),) = linearize(request.model, [Term(residual, X, laplacian(X.shape[1]), weight)])
    return lin.ios


def _part(request: Request, name: str, groups: list[Any]) -> Part:
    """One matrix per group, with a leading axis of groups; or their inverses on the gradient."""
    if request.damping:
        return VectorAnswer(torch.cat([_solved(request, name, M, i) for i, M in enumerate(groups)]))
    if isinstance(groups[0], ks.KroneckerSum):
        return DenseAnswer(groups[0].dense())
    if isinstance(groups[0], ks.Kronecker | ks.DiagonalKronecker):
        return KroneckerAnswer(
            torch.stack([M.A for M in groups]), torch.stack([M.B for M in groups])
        )
    fields = [torch.stack([getattr(M, f) for M in groups]) for f in ("QA", "QB", "scale")]
    return EigenAnswer(*fields)


def _solved(request: Request, name: str, M: Any, group: int) -> Tensor:
    weight = request.gradient[f"{name}.weight"].flatten(1)
    bias = request.gradient.get(f"{name}.bias")
    V = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)
    V = V.chunk(getattr(request.model.get_submodule(name), "groups", 1))[group]
    assert request.damping is not None
    form, damping = request.damping
    inverse = ks.factored_inverse(M, damping) if form == "factored" else M.inverse(damping)
    return (inverse @ V).flatten()
