r"""The gradient of a batch as a layer: what Shampoo, SOAP and Muon are functions of.

KFAC sums products of the gradients $G_n$ of single samples. Its relatives see one gradient for each
batch, $\bar G = \sum_n G_n$. A batch gradient is a `LayerIO`, too, so that every approximation of
this package exists for it. With all loss scale in $g$, the two curvatures are

$$
F = \sum_n \operatorname{vec}(G_n) \operatorname{vec}(G_n)^\top
\quad \text{and} \quad
\Bigl(\sum_n \operatorname{vec}(G_n)\Bigr) \Bigl(\sum_n \operatorname{vec}(G_n)\Bigr)^\top .
$$

Let the samples be independent draws, and $m$ the mean of $\operatorname{vec}(G_n)$. Then the mean
of the second is that of $F$ plus $N (N - 1)\, m m^\top$. It is unbiased where $m$ vanishes: at a
stationary point, and everywhere if the labels are drawn from the model.

Sources: Morwani et al. 2025 (arXiv:2406.17748), who compare both; with labels from the model, Liu
et al. 2024 (arXiv:2305.14342), for the diagonal.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.estimators import Approximation, Estimator, estimator
from kfac_scratch.border import check_function
from kfac_scratch.layer_io import LayerIO, TiedIO, check_not_reduced
from kfac_scratch.linalg import at_least_float32
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.one_hot import OneHot


def pooled(io: LayerIO) -> LayerIO:
    """The batch as one sample with `N * S` positions: its gradients are those of the whole batch.

    Use it with one label for each sample, `fisher=empirical` or `fisher=monte_carlo(1)`. Not with
    `type2`, whose vectors of one sample belong to none of another. Not with `kfac`, which it leaves
    as it is.

    Law: `gradients()` are the sums over samples, one for each vector. For a mean loss and its
    gradient `G` at the labels of the batch, `block()` is `N * vec(G) vec(G)^T`, with `N` the loss's
    `divisor`; for a sum it is `vec(G) vec(G)^T`. KFAC never asks which positions belong to one
    sample: `kfac(pooled(io))` equals `kfac(io)`. A batch of one sample stays as it is.
    Cost: no operations. Everything that needs gradients takes the route for several positions.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them, nor is that of the batch.
    """
    check_not_reduced(io, "The gradient of a batch, as pooled(io) has it,")
    if isinstance(io, TiedIO):
        return TiedIO(pooled(io.direct), pooled(io.turned))
    a: Tensor
    if isinstance(io.a, OneHot):
        a = OneHot(io.a.columns.reshape(1, -1), io.a.shape[-1], io.a.dtype)
    else:
        a = io.a.flatten(0, 1).unsqueeze(0)
    counted = None if io.counted is None else io.counted.reshape(1, -1)
    return LayerIO(a, io.g.flatten(1, 2).unsqueeze(1), counted=counted)


def from_gradient(G: Float[Tensor, "d_out d_in"]) -> LayerIO:
    """A layer whose only gradient is `G`: no capture is needed, and no loss.

    Use it for the gradients that training has anyway, `.grad` with the bias as the last column. Not
    for curvature in the units of the Fisher: for a mean loss over `N` samples this is `1 / N` of
    what `pooled` gives. Preconditioned by a root, it has the scale of Adam's step, and `pooled`
    that of Adam's step divided by the root of `N`.

    Law: `gradients()` is `G`, in float32 at least. `kfac(from_gradient(G))` is `G G^T ⊗ I / d_in`.
    Cost: `d_in**2 + d_in * d_out` numbers.
    """
    G = at_least_float32(G)
    eye = torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    return LayerIO(eye.unsqueeze(0), G.T[None, None])


@dataclass(frozen=True)
class OfBatch:
    """An estimator or approximation that sees the gradient of every batch, not those of samples.

    Use it for Shampoo and SOAP in training: `OfBatch(soap())` with `invert=inverse_root`. Not for
    KFAC's factors, which it leaves as they are. Not with short averages: every batch adds a matrix
    of rank one, and an inverse multiplies by the largest numbers where nothing was seen.

    Law: the matrix is that of `inner` on `pooled` layers, in the units of the Fisher: `N` times the
    squares of a mean loss's gradient.
    Cost: that of `inner` for one sample with `N * S` positions.

    Args:
        inner: An estimator; an approximation stands for its `MovingAverage`.
    """

    inner: Approximation | Estimator

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Estimator) or isinstance(self.inner, type):
            check_function("inner", self.inner, "inner=tkfac")
        object.__setattr__(self, "inner", estimator(self.inner))

    def update(self, state: Any, io: LayerIO, weight: float) -> Matrix:
        """The matrix of `inner` after one more batch, as `Estimator.update`."""
        return estimator(self.inner).update(state, pooled(io), weight)
