"""A KFAC to read: small, slow and correct.

It is put together in `adapter.KFAC` from functions of a few lines each: these, and those of
`vectors`. Every piece of the museum replaces one of them, so that a mistake can be read beside
what is right.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_scratch.conformance.protocol import KroneckerAnswer, LayerBlock

Mix = Callable[[Tensor, Tensor, Sequence[float]], Tensor]


@dataclass(frozen=True, eq=False)
class Call:
    """One use of a layer: what went in, what came out."""

    layer: nn.Module
    x: Tensor
    z: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """A layer on one mini-batch.

    Attributes:
        a: Inputs `[N, S, d_in]`, the bias's 1 included.
        g: Vectors `[V, N, S, d_out]` of the sum of the loss's terms.
        positions: The number `S` to divide by.
        terms: How many terms the loss has.
    """

    a: Tensor
    g: Tensor
    positions: int
    terms: float


# ---- capture -------------------------------------------------------------------------------------


def run(model: nn.Module, X: Tensor) -> Tensor:
    """The model's output."""
    output: Tensor = model(X)
    return output


def record(calls: list[Call], layer: nn.Module, x: Tensor, z: Tensor) -> Tensor | None:
    """Keep what a hook sees. What it returns goes on instead of `z`, and may be overwritten."""
    calls.append(Call(layer, x.detach(), z))
    return z.clone()


def used(calls: list[Call]) -> list[Call]:
    """Which calls of a layer count."""
    return calls


def padded(layer: Any, x: Tensor) -> Tensor:
    """What a convolution makes of its input first."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    sides = [p for p in reversed(layer.padding) for _ in range(2)]
    return functional.pad(x, sides, mode=mode) if any(sides) else x


def geometry(layer: Any) -> dict[str, tuple[int, ...]]:
    """How a convolution steps over its input."""
    return {"stride": layer.stride, "dilation": layer.dilation}


def in_rows(patches: Tensor) -> Tensor:
    """From `[N, d_in, S]`, where a convolution has its channels, to `[N, S, d_in]`."""
    return patches.mT


def with_ones(rows: Tensor) -> Tensor:
    """The input of the bias, which is 1 everywhere."""
    return torch.cat([rows, torch.ones_like(rows[..., :1])], -1)


def positions(calls: list[Call], a: Tensor) -> int:
    """At how many positions a layer is applied."""
    return a.shape[1]


def reduced(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """KFAC-reduce: the mean of the inputs, the sum of the vectors."""
    return a.mean(1, keepdim=True), g.sum(2, keepdim=True)


# ---- factors -------------------------------------------------------------------------------------


def terms(loss: nn.Module, f: Tensor, y: Tensor) -> float:
    """The number of a loss's terms: what the sum is to the mean."""
    if not isinstance(loss, nn.CrossEntropyLoss):
        return float(f.numel())
    kept = y[y != loss.ignore_index]
    return float(kept.numel() if loss.weight is None else loss.weight[kept].sum())


def input_factor(a: Tensor, positions: int) -> Tensor:
    """The mean of `a a^T`."""
    return torch.einsum("nsi,nsj->ij", a, a) / (len(a) * positions)


def vector_factor(g: Tensor, terms: float) -> Tensor:
    """The mean of `g g^T` over the loss's terms."""
    return torch.einsum("vnso,vnsp->op", g, g) / terms


def mixed(old: Tensor, new: Tensor, sizes: Sequence[float]) -> Tensor:
    """The mean over all mini-batches so far; `sizes` are theirs, the newest last."""
    share = sizes[-1] / sum(sizes)
    return (1 - share) * old + share * new


def second_moments(batch: Batch, QA: Tensor, QB: Tensor) -> Tensor:
    """Squares of every datum's gradient in KFAC's basis, as a mean over terms: for EKFAC."""
    G = torch.einsum("vnso,nsi->vnoi", batch.g @ QB, batch.a @ QA)
    return G.square().sum((0, 1)) / batch.terms


def basis(
    batches: Sequence[Batch], of_one: Callable[[Batch], KroneckerAnswer], mix: Mix
) -> tuple[Tensor, Tensor]:
    """The eigenvectors of the factors over all mini-batches."""
    K = over_all(batches, of_one, mix)
    return torch.linalg.eigh(K.A)[1], torch.linalg.eigh(K.B)[1]


def over_all(
    batches: Sequence[Batch], of_one: Callable[[Batch], KroneckerAnswer], mix: Mix
) -> KroneckerAnswer:
    """Both factors over all mini-batches: `A` by the number of rows, `B` by that of terms."""
    rows = [float(len(batch.a) * batch.positions) for batch in batches]
    terms = [batch.terms for batch in batches]
    K = of_one(batches[0])
    for i, batch in enumerate(batches[1:], start=2):
        new = of_one(batch)
        K = KroneckerAnswer(mix(K.A, new.A, rows[:i]), mix(K.B, new.B, terms[:i]))
    return K


def presented(K: KroneckerAnswer, batches: Sequence[Batch]) -> LayerBlock:
    """A layer's block: weight and bias have one pair of factors."""
    return LayerBlock(joint=K)


# ---- damped inverses -----------------------------------------------------------------------------


def balance(A: Tensor, B: Tensor) -> Tensor:
    """The number pi that says how to divide the damping between two factors."""
    return (A.diagonal().mean() / B.diagonal().mean()).sqrt()


def damped_factors(A: Tensor, B: Tensor, pi: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Both factors with their part of the damping."""
    A = A + damping**0.5 * pi * torch.eye(len(A)).to(A)
    B = B + damping**0.5 / pi * torch.eye(len(B)).to(B)
    return A, B


def divided(V: Tensor, eigenvalues: Tensor, damping: float) -> Tensor:
    """Multiply with the inverse of damped eigenvalues."""
    return V / (eigenvalues + damping)
