"""The naive KFAC, put together, and as the oracle sees it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from kfac_scratch.conformance.protocol import (
    Capabilities,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
    VectorAnswer,
)
from kfac_scratch.conformance.selftest.museum import naive, vectors
from kfac_scratch.conformance.selftest.museum.naive import Batch, Call

CONVOLVE = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
Of = Callable[..., Any]


def type2(kfac: "KFAC", loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """An exact square root of the loss's Hessian."""
    rows = vectors.classes_last(loss, f)
    p = vectors.classes_last(loss, kfac.class_probabilities(f))
    roots = vectors.hessian_root(loss, rows, p, kfac.second_derivative())
    weight = kfac.term_weights(loss, f, y)
    return vectors.one_by_one(loss, f, weight.sqrt().unsqueeze(-1) * roots)


@dataclass(frozen=True)
class KFAC:
    """The functions that the naive KFAC consists of, and how they follow each other."""

    run: Of = naive.run
    record: Of = naive.record
    used: Of = naive.used
    padded: Of = naive.padded
    geometry: Of = naive.geometry
    in_rows: Of = naive.in_rows
    with_ones: Of = naive.with_ones
    positions: Of = naive.positions
    reduced: Of = naive.reduced
    type2: Of = type2
    class_probabilities: Of = vectors.class_probabilities
    second_derivative: Of = vectors.second_derivative
    term_weights: Of = vectors.term_weights
    data_gradients: Of = vectors.data_gradients
    drawn_class: Of = vectors.drawn_class
    share_of_a_sample: Of = vectors.share_of_a_sample
    terms: Of = naive.terms
    input_factor: Of = naive.input_factor
    vector_factor: Of = naive.vector_factor
    mixed: Of = naive.mixed
    basis: Of = naive.basis
    second_moments: Of = naive.second_moments
    presented: Of = naive.presented
    balance: Of = naive.balance
    damped_factors: Of = naive.damped_factors
    divided: Of = naive.divided

    def vectors(self, request: Request, f: Tensor, y: Tensor, generator: Generator) -> Tensor:
        """What is sent back from the output, for the sum of the loss's terms."""
        if request.fisher == "type2":
            vectors_: Tensor = self.type2(self, request.loss, f, y)
            return vectors_
        if request.fisher == "empirical":
            gradient: Tensor = self.data_gradients(request.loss, f, y)
            return gradient.unsqueeze(0)
        draws = [self.sample(request.loss, f, y, generator) for _ in range(request.samples)]
        return self.share_of_a_sample(request.samples) * torch.stack(draws)

    def sample(self, loss: nn.Module, f: Tensor, y: Tensor, generator: Generator) -> Tensor:
        """Every term's gradient at one label from the model."""
        rows = vectors.classes_last(loss, f)
        p = vectors.classes_last(loss, self.class_probabilities(f))
        drawn = self.drawn_class(p, generator)
        scores = vectors.score(loss, rows, p, drawn, generator)
        return vectors.as_output(loss, f, self.term_weights(loss, f, y).sqrt() * scores)

    def batch(
        self, request: Request, X: Tensor, y: Tensor, generator: Generator
    ) -> dict[str, Batch]:
        """Every layer on one mini-batch."""
        calls: dict[str, list[Call]] = {name: [] for name in request.layers}
        handles = [
            request.model.get_submodule(name).register_forward_hook(
                lambda layer, x, z, name=name: self.record(calls[name], layer, x[0], z)
            )
            for name in request.layers
        ]
        f = self.run(request.model, X)
        for handle in handles:
            handle.remove()
        sent = self.vectors(request, f.detach(), y, generator)
        terms, found = self.terms(request.loss, f.detach(), y), {}
        for name in request.layers:
            a, g, S = self.layer(name, self.used(calls[name]), f, sent)
            if request.flavour == "reduce":
                (a, g), S = self.reduced(a, g), 1
            found[name] = Batch(a, g, S, terms)
        return found

    def layer(
        self, name: str, calls: list[Call], f: Tensor, sent: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """Rows and vectors of one layer; several calls are more positions."""
        if not calls:
            raise ValueError(f"Layer {name!r} was registered, but its hook was never called.")
        a = torch.cat([self.rows(call.layer, call.x) for call in calls], 1)
        zs = [call.z for call in calls]
        back = [torch.autograd.grad(f, zs, v, retain_graph=True) for v in sent]
        gs = [torch.stack(of_call) for of_call in zip(*back, strict=True)]
        g = torch.cat([positions_last(c.layer, g) for c, g in zip(calls, gs, strict=True)], 2)
        return a, g, self.positions(calls, a)

    def rows(self, layer: Any, x: Tensor) -> Tensor:
        """What the layer's matrix multiplies, `[N, S, d_in]`."""
        if isinstance(layer, nn.Linear):
            rows = x.reshape(len(x), -1, x.shape[-1])
        else:
            rows = self.in_rows(self.patches(layer, x))
        return rows if layer.bias is None else self.with_ones(rows)

    def patches(self, layer: Any, x: Tensor) -> Tensor:
        """`[N, d_in, S]`: a convolution whose kernels each copy one entry of a patch."""
        dims, d_in = len(layer.kernel_size), x.shape[1] * prod(layer.kernel_size)
        kernels = torch.eye(d_in).to(x).reshape(d_in, x.shape[1], *layer.kernel_size)
        z = CONVOLVE[dims](self.padded(layer, x), kernels, **self.geometry(layer))
        return z.flatten(2)

    def factors(self, batch: Batch) -> KroneckerAnswer:
        """Both factors of one mini-batch, of the mean loss."""
        A = self.input_factor(batch.a, batch.positions)
        return KroneckerAnswer(A, self.vector_factor(batch.g, batch.terms))

    def block(self, request: Request, batches: Sequence[Batch]) -> LayerBlock:
        """A layer's factors, or EKFAC's basis and scale, over all mini-batches."""
        total = sum(batch.terms for batch in batches)
        D = 1.0 if request.loss.reduction == "mean" else 1 / total  # a sum is not divided
        if request.flavour == "ekfac":
            QA, QB = self.basis(batches, self.factors, self.mixed)
            scale = self.second_moments(batches[0], QA, QB)
            for i, batch in enumerate(batches[1:], start=2):
                new = self.second_moments(batch, QA, QB)
                scale = self.mixed(scale, new, [b.terms for b in batches[:i]])
            return LayerBlock(joint=EigenAnswer(QA, QB, scale / D))
        K = naive.over_all(batches, self.factors, self.mixed)
        block: LayerBlock = self.presented(KroneckerAnswer(K.A, K.B / D), batches)
        return block

    def solved(self, part: Any, V: Tensor, form: str, damping: float) -> Tensor:
        """The damped inverse times a gradient `[d_out, d_in]`."""
        if form == "factored":
            pi = self.balance(part.A, part.B)
            A, B = self.damped_factors(part.A, part.B, pi, damping)
            return torch.linalg.solve(B, torch.linalg.solve(A, V.T).T)
        if isinstance(part, KroneckerAnswer):
            raise TypeError("An exact damped inverse needs eigenvalues.")
        W = self.divided(part.QB.T @ V @ part.QA, part.scale, damping)
        return part.QB @ W @ part.QA.T


def positions_last(layer: Any, g: Tensor) -> Tensor:
    """Vectors at a layer's output as `[V, N, S, d_out]`."""
    if isinstance(layer, nn.Linear):
        return g.reshape(*g.shape[:2], -1, g.shape[-1])
    return g.flatten(3).mT


def diagonalised(part: KroneckerAnswer | EigenAnswer) -> EigenAnswer:
    """By eigenvectors and eigenvalues."""
    if isinstance(part, EigenAnswer):
        return part
    (a, QA), (b, QB) = torch.linalg.eigh(part.A), torch.linalg.eigh(part.B)
    return EigenAnswer(QA, QB, torch.outer(b, a))


@dataclass(frozen=True)
class Adapter:
    """The naive KFAC, or a piece of the museum, as the oracle sees it.

    What is computed for a case is kept, as optimizers keep their curvature: the oracle asks twice.
    """

    kfac: KFAC = KFAC()
    name: str = "the naive KFAC"
    kept: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)

    def capabilities(self) -> Capabilities:
        """All but differential operators and the layers inside attention modules."""
        return Capabilities(
            self.name,
            "1",
            fishers=frozenset({"type2", "mc", "empirical"}),
            flavours=frozenset({"expand", "reduce", "ekfac"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
            damping=frozenset({"exact", "factored"}),
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """It claims the canonical scale."""
        return 1.0

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Factors, or damped inverses times the gradient."""
        _check(request)
        if request.damping is None:
            return self.curvature(request)
        key = request.case, request.flavour
        if key not in self.kept:
            form = partial(_for_inverse, request.damping[0])
            blocks = self.curvature(request)
            if any(block.joint is None for block in blocks.values()):
                raise NotSupported("damped inverses of separate weight and bias")
            self.kept[key] = {name: form(block.joint) for name, block in blocks.items()}
        return {
            name: LayerBlock(joint=VectorAnswer(self.solved(request, name, part)))
            for name, part in self.kept[key].items()
        }

    def curvature(self, request: Request) -> dict[str, LayerBlock]:
        """Every layer's block."""
        generator = Generator(request.batches[0][0].device).manual_seed(request.seed)
        found = [self.kfac.batch(request, X, y, generator) for X, y in request.batches]
        return {
            name: self.kfac.block(request, [batch[name] for batch in found])
            for name in request.layers
        }

    def solved(self, request: Request, name: str, part: Any) -> Tensor:
        """The damped inverse of a layer times its gradient."""
        weight = request.gradient[f"{name}.weight"].flatten(1)
        bias = request.gradient.get(f"{name}.bias")
        V = weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)
        assert request.damping is not None
        return self.kfac.solved(part, V, *request.damping)


def _check(request: Request) -> None:
    """Refuse what the naive KFAC is too simple for."""
    for layer in map(request.model.get_submodule, request.layers):
        if getattr(layer, "groups", 1) > 1:
            raise NotSupported("grouped convolutions")
        if isinstance(layer, nn.Embedding):
            raise NotSupported("embeddings")
        if getattr(layer, "padding", 0) == "same":
            raise NotSupported("a padding that is said in words")
    loss, y = request.loss, request.batches[0][1]
    if isinstance(loss, nn.CrossEntropyLoss) and (loss.label_smoothing or y.is_floating_point()):
        raise NotSupported("targets that are no labels")
    if isinstance(loss, nn.BCEWithLogitsLoss) and loss.weight is not None:
        raise NotSupported("weights of entries")


def _for_inverse(form: str, part: Any) -> Any:
    return part if form == "factored" else diagonalised(part)
