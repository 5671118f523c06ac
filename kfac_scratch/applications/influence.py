r"""Influence: the change of a network's answers if a training sample is left out.

Training minimises $L(W) + \tfrac{\delta}{2} \lVert W \rVert^2$ with the *sum* $L$ of the losses
$\ell_n$. Without sample $n$, the minimum moves, to first order, by
$(M + \delta I)^{-1} \nabla \ell_n$ with the Hessian $M$ of $L$, in place of which a block of the
Gauss-Newton matrix is taken for each layer. So the loss of a query $q$, or
any other number that the network computes from $q$, grows by

$$
s_{qn} = \langle \nabla \ell_q, \, (M + \delta I)^{-1} \nabla \ell_n \rangle .
$$

A positive score says that the sample helps: without it, the query's loss is larger. The damping
$\delta$ is not free to choose: it is the weight decay of the sum of the losses.

Gradients are those of single samples, without a factor. The number of samples is in no score. All
functions take inverses by name of block: `{name: M.inverse(decay) for name, M in ...}`. With a
factor `beta` in front of the loss, the damping is `decay / beta`.

Sources: Koh and Liang 2017 (arXiv:1703.04730); Grosse et al. 2023 (arXiv:2308.03296) for Kronecker
factors; Cook and Weisberg 1982 for linear models.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.applications.trained import check_sum, layers_of
from kfac_scratch.border import check_callable, check_instance
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.capture.plan import Plans
from kfac_scratch.data_loader import batches
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import BackpropagatedVectors, empirical
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.matrix import LinearMap

FLOOR = 1e-3  # smallest weight of an error in `inverse_as_sum`, as a share of the largest
Measurement = Callable[[Tensor, Tensor], Tensor]
"""A function of outputs and targets, with one number for each query."""


def influence_scores(
    model: Module,
    loss: Module,
    inverses: Mapping[str, LinearMap],
    queries: Iterable[tuple[Any, Tensor]],
    data: Iterable[tuple[Any, Tensor]],
    measurement: Measurement | None = None,
    *,
    progress: bool | None = None,
) -> Float[Tensor, "Q N"]:
    """The influence of every training sample on every query, summed over blocks.

    Use it to find the training samples that a prediction rests on. Not for the whole effect of
    samples that matter much, of which a score is the first order. For a linear model and squared
    errors it is too small by the factor one minus the sample's leverage.

    It has many parameters, because queries and data are of different kinds. See
    `influence_by_block` for them, for errors and cost.
    """
    found = influence_by_block(model, loss, inverses, queries, data, measurement, progress=progress)
    return reduce(torch.add, found.values())


def influence_by_block(
    model: Module,
    loss: Module,
    inverses: Mapping[str, LinearMap],
    queries: Iterable[tuple[Any, Tensor]],
    data: Iterable[tuple[Any, Tensor]],
    measurement: Measurement | None = None,
    *,
    progress: bool | None = None,
) -> dict[str, Float[Tensor, "Q N"]]:
    """The part of every block's weights in the influence of training samples on queries.

    Cost: a forward and a reverse pass for each batch, and `Q N D` operations for a block with `D`
    weights. Memory: the gradients of all queries, `Q` times the number of weights, and those of one
    batch for one block. For more queries, call it with a part of them at a time.

    It has many parameters, because queries and data are of different kinds.

    Args:
        model: The trained network, in the mode in which it predicts.
        loss: With `reduction="sum"`.
        inverses: `M.inverse(decay)` of every block, by its name, where `M` belongs to the sum of
            the losses over the data.
        queries: Batches `(X, y)`.
        data: Batches `(X, y)` of training data.
        measurement: The number of each query that may change, as a function of outputs and targets.
            Default: the query's loss.
        progress: Show a progress bar. Default: on a terminal only.

    Raises:
        ValueError: For a loss with another reduction, inverses of blocks that the model has not,
            no batch, a measurement without one number for each query, and what `layer_ios` refuses,
            inputs that are not finite among it.
        TypeError: For what is no inverse, no batch or no function.
    """
    vectors = empirical if measurement is None else _Measured(measurement)
    source = _Layers(model, loss, inverses)
    parts: dict[str, list[Tensor]] = {name: [] for name in inverses}
    for X, y in batches(queries, False, "queries"):
        for name, io in source.of(X, y, vectors).items():
            parts[name].append(inverses[name] @ io.gradients().squeeze(0))
    found = {name: torch.cat(Us) for name, Us in parts.items()}
    scores: dict[str, list[Tensor]] = {name: [] for name in inverses}
    for X, y in batches(data, progress):
        for name, io in source.of(X, y, empirical).items():
            G = io.gradients().squeeze(0)
            scores[name].append(found[name].flatten(1) @ G.flatten(1).T)
    return {name: torch.cat(columns, 1) for name, columns in scores.items()}


def self_influence(
    model: Module,
    loss: Module,
    inverses: Mapping[str, LinearMap],
    data: Iterable[tuple[Any, Tensor]],
    *,
    progress: bool | None = None,
) -> Float[Tensor, " N"]:
    """The influence of every sample on its own loss.

    Use it to look for wrong labels, beside the losses themselves, which often find as many. It is
    the diagonal of `influence_scores(..., data, data)`.

    Cost: in an eigenbasis, `N (d_in**2 + d_out**2 + D)` operations for a block of `D` weights;
    for other inverses, a product with each of `N` gradients. Memory: the gradients of one batch for
    one block.

    Args:
        model: As in `influence_by_block`.
        loss: As there.
        inverses: As there.
        data: Batches `(X, y)`.
        progress: Show a progress bar. Default: on a terminal only.

    Raises:
        ValueError: As there.
        TypeError: As there.
    """
    source = _Layers(model, loss, inverses)
    found = []
    for X, y in batches(data, progress):
        ios = source.of(X, y, empirical)
        found.append(reduce(torch.add, (_own(inverses[name], io) for name, io in ios.items())))
    return torch.cat(found)


def product_kernels(
    K: Kronecker, queries: LayerIO, data: LayerIO
) -> tuple[Float[Tensor, "Q N"], Float[Tensor, "Q N"]]:
    """The two kernels whose product is the matrix of scores of a Kronecker product `B ⊗ A`.

    A gradient is `g a^T`, so that `<g a^T, B h c^T A> = (g^T B h) (a^T A c)`: how alike the errors
    are, times how alike the inputs are. No gradient is formed.

    Use it with `factored_inverse`, which makes a Kronecker product, and with `inverse_as_sum`,
    which makes a few. Not for layers with positions, whose gradients are sums of products.

    Cost: `Q N (d_in + d_out)` operations, instead of `Q N d_in d_out`.

    Args:
        K: The inverse, or one term of it.
        queries: The layer, with one vector for each query: `layer_ios(..., empirical)`.
        data: The layer on training data.

    Raises:
        ValueError: For a layer with positions, or with several vectors for each sample.
    """
    for what, io in (("queries", queries), ("data", data)):
        if len(io.g) != 1 or io.a.shape[1] != 1:
            raise ValueError(
                f"{what} has {len(io.g)} vectors and {io.a.shape[1]} positions for each sample, "
                "but only gradients g a^T of one each are products: use influence_scores."
            )
    errors = queries.g[0, :, 0] @ K.B @ data.g[0, :, 0].T
    inputs = queries.a[:, 0] @ K.A @ data.a[:, 0].T
    return errors, inputs


def inverse_as_sum(
    M: Kronecker | KroneckerEigen, damping: float, tolerance: float = 1e-6
) -> list[Kronecker]:
    r"""The exactly damped inverse as a sum of few Kronecker products.

    In the eigenbasis the inverse is $1 / (s_{oi} + \delta)$, which is nearly of low rank: a
    singular value decomposition makes each term a product of a function of `o` and one of `i`.
    Errors are weighed by the curvature, $s_{oi}$: the gradients of a query and of a sample along
    an eigenvector are each as large as its root. The weight is at least `FLOOR` of the largest, for
    data with directions that were not in those of the curvature.

    Use it with `product_kernels`, where many queries meet many samples. Not for few: one product
    with the inverse is cheaper.

    Cost: that of `M.eigen()` and of one decomposition of a matrix `[d_out, d_in]`, then
    `Q N (d_in + d_out)` operations for each term.

    Args:
        M: The curvature.
        damping: The weight decay, positive.
        tolerance: Singular values are left out that are smaller than this share of the largest.

    Raises:
        ValueError: If the damping is not positive, or the tolerance not between 0 and 1.
    """
    if not damping > 0 or not 0 < tolerance < 1:
        raise ValueError(
            f"damping is {damping} and tolerance {tolerance}: pass a positive damping and a "
            "tolerance between 0 and 1."
        )
    E = M.eigen()
    means = E.scale.mean(1), E.scale.mean(0)
    r, c = (mean.clamp_min(FLOOR * mean.max()) for mean in means)
    U, s, V = torch.linalg.svd(r.unsqueeze(1) * E.inverse(damping).scale * c, full_matrices=False)
    kept = int((s > tolerance * s[0]).sum())
    return [
        Kronecker((E.QA * (v / c)) @ E.QA.T, (E.QB * (size * u / r)) @ E.QB.T)
        for u, size, v in zip(U.T[:kept], s, V, strict=False)
    ]


def _own(inverse: LinearMap, io: LayerIO) -> Float[Tensor, " N"]:
    """The quadratic form of an inverse at the gradient of every sample."""
    if isinstance(inverse, KroneckerEigen):  # vectors are turned, gradients need not be
        turned = LayerIO(io.a @ inverse.QA, io.g @ inverse.QB).gradients().squeeze(0)
        return torch.einsum("noi,oi->n", turned.square(), inverse.scale)
    G = io.gradients().squeeze(0)
    return (G * (inverse @ G)).sum((1, 2))


class _Measured:
    """The vectors of a measurement: its gradient by the outputs of every query."""

    def __init__(self, measurement: Measurement) -> None:
        check_callable("measurement", measurement, "lambda f, y: f.logsumexp(1)")
        self.measurement = measurement

    def __call__(self, loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "1 Q ..."]:
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            values = self.measurement(leaf, y)
            if not isinstance(values, Tensor) or values.shape != f.shape[:1]:
                shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    f"measurement gave {shape} for {len(f)} queries: return one number for each, "
                    f"a tensor of shape ({len(f)},)."
                )
            (gradient,) = torch.autograd.grad(values.sum(), leaf)
        return gradient.unsqueeze(0)


class _Layers:
    """The layers of the blocks, with a vector for every sample."""

    def __init__(self, model: Module, loss: Module, inverses: Mapping[str, LinearMap]) -> None:
        check_sum(
            loss,
            "scores need the gradients of single samples, and the curvature of the sum of losses.",
        )
        check_instance("inverses", inverses, Mapping, "{name: M.inverse(decay) for ...}")
        for name, inverse in inverses.items():
            check_instance(f"inverses[{name!r}]", inverse, LinearMap, "M.inverse(decay)")
        if not inverses:
            raise ValueError("inverses is empty: pass that of one block at least.")
        self.model, self.loss, self.blocks = model, loss, set(inverses)
        self.layers, self.plans = layers_of(model, inverses), Plans()

    def of(self, X: Any, y: Tensor, vectors: BackpropagatedVectors) -> dict[str, LayerIO]:
        """Those of one batch, by name of block."""
        ios = layer_ios(self.model, self.loss, X, y, vectors, layers=self.layers, plan=self.plans)
        return {name: io for name, io in ios.items() if name in self.blocks}
