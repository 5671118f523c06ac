r"""Laplace's approximation: a normal distribution over weights, and the evidence of a model.

A trained network minimises $\beta L(W) + \sum_l \tfrac{\delta_l}{2} \lVert W_l \rVert^2$, the
negative logarithm of likelihood times prior. $L$ is the *sum* of the losses and $\delta_l$ a
layer's prior precision, which is the weight decay of that sum. With a curvature matrix $M_l$ of $L$
for every layer,

$$
p(W \mid \text{data}) \approx \prod_l \mathcal N \bigl( W_l, (\beta M_l + \delta_l I)^{-1} \bigr),
$$

$$
\log Z = -\beta L - \tfrac{n}{2} \log \tfrac{\pi}{\beta}
- \sum_l \Bigl[ \tfrac{\delta_l}{2} \lVert W_l \rVert^2
+ \tfrac12 \sum_i \log \Bigl( 1 + \tfrac{\beta s_{li}}{\delta_l} \Bigr) \Bigr]
$$

with the eigenvalues $s_{li}$ of $M_l$. The *evidence* $\log Z$ compares models without validation
data. The second term is there for the squared error alone, of $n$ numbers. There $\beta = 1 / (2
\sigma^2)$ for a noise of variance $\sigma^2$, because PyTorch's squared error has no $\tfrac12$.
For cross-entropy, $\beta$ is 1, or the inverse temperature.

All derivatives have closed forms in the eigenvalues, so that a block is decomposed once, whatever
is tried for $\delta$ and $\beta$.

Sources: MacKay 1992 (Neural Computation 4(3)) for the evidence and its maximisation; Ritter et al.
2018 (ICLR) for Kronecker factors; Immer et al. 2021 (arXiv:2104.04975) for neural networks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, Unpack, runtime_checkable

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import Module, MSELoss

from kfac_scratch.applications.trained import check_sum, trained_weights
from kfac_scratch.approximations.accumulators import Accumulator, FactorSums
from kfac_scratch.data_loader import LoaderOptions, over_loader
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import BackpropagatedVectors, type2
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.matrix import LinearMap, Matrix

BOUNDS = 1e-8, 1e8  # of what MacKay's step makes of a prior precision
Prior = float | Float[Tensor, "..."]
"""The prior precision of one block: one number, or a vector with one for each column of `W`."""


@runtime_checkable
class Decomposed(Matrix, Protocol):
    """A curvature matrix in its eigenbasis."""

    def eigenvalues(self) -> Float[Tensor, " D"]:
        """All of them."""
        ...

    def inverse_sqrt(self, damping: float) -> LinearMap:
        """The symmetric root of the damped inverse."""
        ...


@runtime_checkable
class BlockPosterior(Protocol):
    """The distribution of one block's weights around their mean."""

    def log_ratio(self) -> Float[Tensor, ""]:
        """The logarithm of the posterior precision's determinant over the prior's."""
        ...

    def determined(self) -> Float[Tensor, " k"]:
        """The number of parameters that the data determine, for each number of the prior."""
        ...

    def covariance(self) -> LinearMap:
        """The posterior covariance."""
        ...

    def root(self) -> LinearMap:
        """A matrix that makes samples of the posterior from normal numbers."""
        ...


@dataclass(frozen=True, eq=False)
class _Isotropic:
    """`(beta M + delta I)^-1`, in the eigenbasis of `M`."""

    M: Decomposed
    delta: float
    beta: float

    def log_ratio(self) -> Tensor:
        return torch.log1p(self.beta * self.M.eigenvalues() / self.delta).sum()

    def determined(self) -> Tensor:
        s = self.beta * self.M.eigenvalues()
        return (s / (s + self.delta)).sum().unsqueeze(0)

    def covariance(self) -> LinearMap:
        return _Scaled(self.M.inverse(self.delta / self.beta), 1 / self.beta)

    def root(self) -> LinearMap:
        return _Scaled(self.M.inverse_sqrt(self.delta / self.beta), self.beta**-0.5)


class _PerColumn:
    r"""`(beta B ⊗ A + I ⊗ diag(d))^-1`, exactly.

    With $D = \operatorname{diag}(d)$ the precision is $(I \otimes D^{1/2}) (\beta B \otimes
    D^{-1/2} A D^{-1/2} + I) (I \otimes D^{1/2})$. The matrix in the middle is a Kronecker product
    with damping 1.
    """

    def __init__(self, K: Kronecker, d: Float[Tensor, " d_in"], beta: float) -> None:
        self.r = d.rsqrt()
        rescaled = Kronecker(self.r.unsqueeze(1) * K.A * self.r, beta * K.B)
        self.middle = _Isotropic(rescaled.eigen(), 1.0, 1.0)

    def log_ratio(self) -> Tensor:
        return self.middle.log_ratio()

    def determined(self) -> Tensor:
        E = self.middle.M.inverse(1.0)
        share = E.diagonal().unflatten(0, (-1, len(self.r)))  # type: ignore[attr-defined]
        return (1 - share).sum(0)

    def covariance(self) -> LinearMap:
        return _BetweenColumns(self.middle.covariance(), self.r, self.r)

    def root(self) -> LinearMap:
        one = torch.ones_like(self.r)
        return _BetweenColumns(self.middle.root(), one, self.r)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """`c * M`."""

    M: LinearMap
    c: float

    def __matmul__(self, V: Tensor) -> Tensor:
        return self.c * (self.M @ V)


@dataclass(frozen=True, eq=False)
class _BetweenColumns:
    """`V` with its columns scaled, times `M`, with the result's columns scaled."""

    M: LinearMap
    before: Tensor
    behind: Tensor

    def __matmul__(self, V: Tensor) -> Tensor:
        return (self.M @ (V * self.before)) * self.behind


@dataclass(frozen=True, eq=False)
class Laplace:
    """A normal distribution over a network's weights, as numbers: functions ask it.

    Use it for a trained network, to state how certain it is and to choose the prior without
    validation data. Not before training: the formulas hold at a minimum of loss and prior.

    Attributes:
        weights: The trained `[W | b]` of every block, by name.
        matrices: The curvature of the *sum* of the losses, by name of block.
        loss: The sum of the losses over all data.
        numbers: How many numbers the squared error compares; 0 for other losses.
        prior: Precision by name of block.
        beta: The factor in front of the loss.
    """

    weights: Mapping[str, Float[Tensor, "d_out d_in"]]
    matrices: Mapping[str, Matrix]
    loss: float
    numbers: int
    prior: Mapping[str, Prior]
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("beta", self.beta)
        missing = sorted(set(self.weights) ^ set(self.prior))
        if missing:
            raise ValueError(
                f"prior has the blocks {sorted(self.prior)}, but {missing} are not in both: pass "
                f"one number for all, or one entry for each of {sorted(self.weights)}."
            )
        for name, value in self.prior.items():
            _check_prior(name, value, self.weights[name].shape[1])

    def blocks(self) -> dict[str, BlockPosterior]:
        """The posterior of every block, by name."""
        return {
            name: _block(name, M, self.prior[name], self.beta) for name, M in self.matrices.items()
        }

    def covariances(self) -> dict[str, LinearMap]:
        """Every block's posterior covariance, which multiplies what is shaped like its `W`."""
        return {name: block.covariance() for name, block in self.blocks().items()}


def laplace(
    model: Module,
    loss: Module,
    data: Iterable[tuple[Any, Tensor]],
    prior: Prior | Mapping[str, Prior] = 1.0,
    beta: float = 1.0,
    approximation: Callable[[LayerIO], Matrix] | Accumulator[Any] | None = None,
    fisher: BackpropagatedVectors = type2,
    **options: Unpack[LoaderOptions],
) -> Laplace:
    """Laplace's approximation of a trained network.

    Use it after training with the weight decay `prior / number of data` of a mean loss, or `prior`
    of a sum. Not for a network that was trained with another decay: its weights are no minimum.

    Cost: that of `over_loader`, a forward pass of all data, and an eigendecomposition per block.

    It has many parameters, because it passes those of `over_loader` on.

    Args:
        model: The network, in the mode in which it predicts.
        loss: With `reduction="sum"`.
        data: Batches `(X, y)`; they are gone through twice.
        prior: The precision: one number, or one for each column of `W`, or a dictionary of these by
            name of block. A column's own precision needs a `Kronecker`.
        beta: See the module.
        approximation: As in `over_loader`. Default: KFAC.
        fisher: The vectors that are sent backward, see `losses`.
        options: `flavour`, `layers` and others, see `over_loader`. `layers=["4"]` makes a posterior
            for one layer, the last, say; the others are fixed.

    Raises:
        ValueError: For a loss with mean reduction, a prior or `beta` that is not positive, priors
            of other blocks, data that can be gone through once only, and what `over_loader`
            refuses.
        TypeError: For an approximation whose matrices have no eigenvalues.
    """
    check_sum(
        loss,
        "a posterior belongs to the sum over all data, and so does its prior: the decay of a mean, "
        "times what the mean divides by.",
    )
    gather = FactorSums() if approximation is None else approximation
    matrices: dict[str, Matrix] = over_loader(gather, model, loss, data, fisher, **options)
    weights = trained_weights(model, matrices)
    priors = dict(prior) if isinstance(prior, Mapping) else dict.fromkeys(weights, prior)
    for name, M in matrices.items():
        if name in priors and not isinstance(priors[name], Tensor):
            matrices[name] = _decomposed(name, M)
    total, numbers = _summed(model, loss, data)
    return Laplace(weights, matrices, total, numbers, priors, beta)


def log_evidence(posterior: Laplace) -> Float[Tensor, ""]:
    """The logarithm of the probability of the data under the model, by Laplace's approximation.

    Use it to compare models, priors and noises on the same data: the larger, the better. Not for a
    network that was trained with another prior than the posterior's.
    """
    value = torch.as_tensor(-posterior.beta * posterior.loss, dtype=torch.float64)
    value = value - posterior.numbers / 2 * math.log(math.pi / posterior.beta)
    for name, block in posterior.blocks().items():
        decay = (posterior.prior[name] * posterior.weights[name].square()).sum()
        value = value - (decay + block.log_ratio()).cpu() / 2
    return value


def effective_parameters(posterior: Laplace) -> dict[str, Float[Tensor, " k"]]:
    """The number of parameters that the data determine, by block and number of the prior.

    A direction counts by the share of its precision that the data give, from 0 to 1.
    """
    return {name: block.determined() for name, block in posterior.blocks().items()}


@dataclass(frozen=True, eq=False)
class EvidenceGradient:
    """The derivatives of `log_evidence` at fixed weights and curvature.

    Attributes:
        log_prior: By `log delta`, by block, for each number of the prior.
        log_beta: By `log beta`.
    """

    log_prior: Mapping[str, Float[Tensor, " k"]]
    log_beta: float


def evidence_gradient(posterior: Laplace) -> EvidenceGradient:
    r"""The derivatives of the evidence, in closed form.

    $\partial \log Z / \partial \log \delta = \tfrac12 (\gamma - \delta \lVert W \rVert^2)$ with the
    effective number $\gamma$ of parameters, and
    $\partial \log Z / \partial \log \beta = -\beta L + \tfrac{n}{2} - \tfrac{\gamma}{2}$.
    """
    gamma, squares = effective_parameters(posterior), _squares(posterior)
    by_prior = {name: (gamma[name] - posterior.prior[name] * squares[name]) / 2 for name in squares}
    total = _total(gamma)
    by_beta = -posterior.beta * posterior.loss + (posterior.numbers - total) / 2
    return EvidenceGradient(by_prior, by_beta)


def mackay(posterior: Laplace) -> Laplace:
    r"""One step towards the prior of the largest evidence: $\delta = \gamma / \lVert W \rVert^2$.

    Every number of the prior has its own. It stays within `BOUNDS`, of which the larger one says
    that a column is switched off. Use it in turn with training: weights and curvature move with the
    prior. Not as if it were ascent: the evidence of retrained weights may fall, so keep the best.
    """
    gamma, squares = effective_parameters(posterior), _squares(posterior)
    steps = {name: _bounded(g, squares[name]) for name, g in gamma.items()}
    prior = {
        name: step if isinstance(posterior.prior[name], Tensor) else float(step)
        for name, step in steps.items()
    }
    return replace(posterior, prior=prior)


def _bounded(gamma: Tensor, squares: Tensor) -> Tensor:
    """Their ratio, within `BOUNDS`: the largest where the weights are zero."""
    least, most = BOUNDS
    return torch.where(squares * most > gamma, gamma / squares, most).clamp(least, most)


def mackay_shared(posterior: Laplace) -> Laplace:
    """`mackay` with one number for all blocks.

    Use it first: the priors of single layers have a nearly flat direction, in which the scale of
    one layer's weights is traded for another's.
    """
    gamma, squares = _total(effective_parameters(posterior)), _total(_squares(posterior))
    delta = float(_bounded(torch.tensor(gamma), torch.tensor(squares)))
    return replace(posterior, prior=dict.fromkeys(posterior.prior, delta))


def mackay_noise(posterior: Laplace) -> Laplace:
    r"""One step towards the noise of the largest evidence: $\sigma^2 = L / (n - \gamma)$.

    Use it for the squared error. `beta` is then $1 / (2 \sigma^2)$.

    Raises:
        ValueError: For other losses, and if the data determine as many parameters as there are
            numbers: then nothing is left to be noise.
    """
    if not posterior.numbers:
        raise ValueError("Only a squared error has noise: with another loss, choose beta yourself.")
    total = _total(effective_parameters(posterior))
    if not total < posterior.numbers:
        raise ValueError(
            f"The data determine {total:.4g} parameters, but have {posterior.numbers} numbers: "
            "nothing is left to be noise. Use a larger prior precision, or more data."
        )
    return replace(posterior, beta=(posterior.numbers - total) / (2 * posterior.loss))


def sampled_weights(
    posterior: Laplace, samples: int, generator: Generator | None = None
) -> dict[str, Float[Tensor, "samples d_out d_in"]]:
    """Independent samples of every block's weights.

    Use it for the linearised network, and in tests. Not to send a network with sampled weights
    forward: the posterior is that of the linearised one (`predictive` says more).

    Args:
        posterior: The distribution.
        samples: How many.
        generator: Source of randomness on the weights' device. Default: torch's own.
    """
    found = {}
    for name, block in posterior.blocks().items():
        W = posterior.weights[name]
        noise = torch.randn(samples, *W.shape, generator=generator, device=W.device, dtype=W.dtype)
        found[name] = W + block.root() @ noise
    return found


def _total(by_block: Mapping[str, Tensor]) -> float:
    return math.fsum(float(values.sum()) for values in by_block.values())


def _squares(posterior: Laplace) -> dict[str, Tensor]:
    """The weights' squares, summed over what has one number of the prior."""
    columns = {name: W.square().sum(0) for name, W in posterior.weights.items()}
    return {
        name: c if isinstance(posterior.prior[name], Tensor) else c.sum().unsqueeze(0)
        for name, c in columns.items()
    }


def _block(name: str, M: Matrix, prior: Prior, beta: float) -> BlockPosterior:
    if not isinstance(prior, Tensor):
        return _Isotropic(_decomposed(name, M), prior, beta)
    if not isinstance(M, Kronecker):
        raise TypeError(
            f"The matrix of block {name!r} is a {type(M).__name__}: a prior for each column needs "
            "a Kronecker, as KFAC gives, and is passed to laplace(...). Or pass one number."
        )
    return _PerColumn(M, prior.to(M.A), beta)


def _decomposed(name: str, M: Matrix) -> Decomposed:
    eigen = getattr(M, "eigen", None)
    found = M if eigen is None else eigen()
    if not isinstance(found, Decomposed):
        raise TypeError(
            f"The matrix of block {name!r} is a {type(M).__name__}, which has no eigenvalues: use "
            "an approximation whose matrices have, for example KFAC, EKFAC, Dense or Diagonal."
        )
    return found


def _check_positive(what: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{what} is {value!r}: pass a positive, finite number.")


def _check_prior(name: str, prior: Prior, columns: int) -> None:
    if not isinstance(prior, Tensor):
        _check_positive(f"The prior of block {name!r}", prior)
        return
    if prior.shape != (columns,):
        raise ValueError(
            f"The prior of block {name!r} has the shape {tuple(prior.shape)}: pass one number, or "
            f"one for each of its {columns} columns, [{columns}]."
        )
    if not (prior > 0).all() or not prior.isfinite().all():
        raise ValueError(
            f"The prior of block {name!r} must be positive and finite in every column."
        )


def _summed(model: Module, loss: Module, data: Iterable[tuple[Any, Tensor]]) -> tuple[float, int]:
    """The sum of the losses, and how many numbers a squared error compares."""
    total, numbers = 0.0, 0
    with torch.no_grad():
        for f, y in _outputs(model, data):
            total += float(loss(f, y))
            numbers += f.numel() if isinstance(loss, MSELoss) else 0
    return total, numbers


def _outputs(model: Module, data: Iterable[tuple[Any, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    count = 0
    for X, y in data:
        count += 1
        yield model(X), y
    if count == 0:
        raise ValueError(
            "data could be gone through only once: pass a list of batches or a DataLoader, not a "
            "generator."
        )
