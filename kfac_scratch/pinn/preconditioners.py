r"""Preconditioners for PINNs: one matrix for each layer, from terms of different kinds.

Each term has its own Kronecker factors, because its layers have their own number of coefficients.
The paper's block is their sum, with damped factors,

$$
P = \sum_t (B_t + \lambda I) \otimes (A_t + \lambda I) ,
$$

which has a closed inverse for up to two terms. Or all terms are one batch (`joined`), and any
approximation of this package makes one matrix of it.

The reference averages factors from the identity on: $\hat X_0 = I$ and
$\hat X_t = \beta \hat X_{t-1} + (1 - \beta) X_t$. With the bias-corrected average $\bar X_t$ this
is $(1 - \beta^t) \bar X_t + \beta^t I$: a damping that decays, from 1 to $\lambda$. Here it is
written that way.

Source: Dangel, Müller and Zeinhofer 2024 (arXiv:2405.15603), §3.3 and appendix I.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.ekfac import second_moments
from kfac_scratch.approximations.estimators import (
    Approximation,
    Estimator,
    estimator,
    weight_of_newest,
)
from kfac_scratch.border import check_function
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import conjugate_gradient, eye_like, gram, simultaneous_eigh
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import Congruence
from kfac_scratch.matrices.matrix import LinearMap
from kfac_scratch.pinn.gramian import joined
from kfac_scratch.pinn.terms import Linearization

LinearizedTerms = Sequence[Sequence[Linearization]]
TermFactors = tuple[Kronecker, ...]  # of one layer: one for each kind of term
TermInverse = Callable[
    [TermFactors, TermFactors, Sequence[LayerIO]], LinearMap
]  # damped, undamped, the layer on all points


@runtime_checkable
class PinnPreconditioner(Protocol):
    """A rule that makes a preconditioner from linearised terms: one inverse for each layer."""

    def update(
        self, state: Any, terms: LinearizedTerms, damping: float, count: int
    ) -> tuple[Any, dict[str, LinearMap]]:
        """The next state, and the inverses.

        Args:
            state: The state after the last step; None before the first one.
            terms: The linearised terms.
            damping: The multiple of the identity that is added: to each factor (`TermWise`), or to
                the matrix (`Joined`).
            count: The number of this step, from 1.
        """
        ...


def by_layer(terms: LinearizedTerms) -> dict[str, list[list[LayerIO]]]:
    """For each layer its `LayerIO`s, grouped by the number of coefficients."""
    result: dict[str, list[list[LayerIO]]] = {}
    for name in terms[0][0].ios:
        groups: dict[int, list[LayerIO]] = {}
        for part in (part for term in terms for part in term):
            io = part.ios[name]
            groups.setdefault(io.a.shape[1], []).append(io)
        result[name] = list(groups.values())
    return result


def kfac_of_parts(ios: Sequence[LayerIO]) -> Kronecker:
    """`kfac` of all parts as one batch, without copies of them."""
    rows = sum(io.a.shape[0] * io.a.shape[1] for io in ios)
    A = torch.stack([gram(io.a) for io in ios]).sum(0) / rows
    return Kronecker(A, torch.stack([gram(io.g.flatten(0, 1)) for io in ios]).sum(0))


def damped_factors(K: Kronecker, share: float, damping: float) -> Kronecker:
    """`(share * B + damping * I) ⊗ (share * A + damping * I)`."""
    A, B = share * K.A, share * K.B
    return Kronecker(A + damping * eye_like(A), B + damping * eye_like(B))


def kfac_inverse(damped: TermFactors, factors: TermFactors, ios: Sequence[LayerIO]) -> LinearMap:
    """The inverse of a sum of damped Kronecker products: KFAC for PINNs.

    Use it as the default of `TermWise`. Not for three or more kinds of terms in training: the
    inverse then runs conjugate gradients at every product.

    Cost: for up to two products, a Cholesky factorisation and an eigendecomposition of each factor,
    `O(d_in**3 + d_out**3)`.

    Raises:
        ValueError: If a damped factor is not positive definite.
    """
    if len(damped) <= 2:
        return congruence(damped)
    return SumInverse(damped, congruence(damped[:2]))


def ekfac_inverse(damped: TermFactors, factors: TermFactors, ios: Sequence[LayerIO]) -> LinearMap:
    """The inverse of `kfac_inverse`'s sum with a corrected diagonal: EKFAC for PINNs.

    In the basis in which the sum is diagonal, and which is not orthogonal, the diagonal of the
    undamped products is replaced by the diagonal of the exact block, the second moments of the
    gradients. The part that the damping added stays.

    Use it where KFAC's directions limit the progress. Not with three or more kinds of terms.

    Cost: that of `kfac_inverse`, and `second_moments` of all points.

    Raises:
        ValueError: If a damped factor is not positive definite.
        NotImplementedError: If there are more than two kinds of terms.
    """
    if len(damped) > 2:
        raise NotImplementedError(
            f"{len(damped)} kinds of terms share no basis: use TermWise(inverse=kfac_inverse)."
        )
    basis = congruence(damped)
    products = torch.stack([diagonal_in(basis, K) for K in factors]).sum(0)
    exact = torch.stack([second_moments(io, basis.KA, basis.KB) for io in ios]).sum(0)
    return Congruence(basis.KA, basis.KB, 1 / (1 / basis.scale - products + exact))


def diagonal_in(basis: Congruence, K: Kronecker) -> Float[Tensor, "d_out d_in"]:
    """The diagonal of `(KB ⊗ KA)^T (B ⊗ A) (KB ⊗ KA)`."""
    a, b = (((Q.T @ M) * Q.T).sum(1) for Q, M in ((basis.KA, K.A), (basis.KB, K.B)))
    return torch.outer(b, a)


def congruence(products: TermFactors) -> Congruence:
    """The inverse of one Kronecker product, or of a sum of two.

    Each factor of the first product is diagonalised together with the sum of both, so that all
    eigenvalues lie between 0 and 1, and one of the two factors may be singular.
    """
    if len(products) == 1:
        eigen = products[0].inverse(0.0)
        return Congruence(eigen.QA, eigen.QB, eigen.scale)
    first, second = products
    a, KA = simultaneous_eigh(first.A + second.A, first.A)
    b, KB = simultaneous_eigh(first.B + second.B, first.B)
    return Congruence(KA, KB, 1 / (torch.outer(b, a) + torch.outer(1 - b, 1 - a)))


@dataclass(frozen=True, eq=False)
class SumInverse:
    """The inverse of a sum of many Kronecker products, by conjugate gradients at every product.

    Cost: a product with each of them for each iteration, to full accuracy.
    """

    products: TermFactors
    preconditioner: LinearMap

    def __matmul__(self, V: Float[Tensor, "d_out d_in"]) -> Tensor:
        """The solution of the system for `V`."""
        return conjugate_gradient(
            lambda X: torch.stack([K @ X for K in self.products]).sum(0),
            V,
            lambda X: self.preconditioner @ X,
        )


def _mixed(old: TermFactors, new: TermFactors, weight: float) -> TermFactors:
    return tuple(o.mixed(n, weight) for o, n in zip(old, new, strict=True))


# ---- all layers ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TermWise:
    """The paper's KFAC: a sum of one Kronecker product for each kind of term.

    Terms with equally many coefficients are of one kind. Use it for one or two kinds of terms: an
    equation and a boundary condition. Not for three or more: use `Joined`.

    Cost: that of `kfac` for all points, and of `inverse`; memory `d_in**2 + d_out**2` for each kind
    and layer.

    Attributes:
        decay: The share of the old factors in an average, the paper's `beta`. The identity that is
            added to the factors decays with it, too.
        inverse: From damped factors, the undamped ones and the layer's `LayerIO`s to the inverse:
            `kfac_inverse` or `ekfac_inverse`.
    """

    decay: float = 0.95
    inverse: TermInverse = kfac_inverse

    def __post_init__(self) -> None:
        check_function("inverse", self.inverse, "inverse=kfac_inverse")

    def update(
        self, state: Any, terms: LinearizedTerms, damping: float, count: int
    ) -> tuple[dict[str, TermFactors], dict[str, LinearMap]]:
        """The averaged factors, and the inverse of their damped sum for each layer."""
        weight, left = weight_of_newest(self.decay, count), self.decay**count
        averages, inverses = {}, {}
        for name, groups in by_layer(terms).items():
            new = tuple(kfac_of_parts(group) for group in groups)
            mean = new if state is None else _mixed(state[name], new, weight)
            damped = tuple(damped_factors(K, 1 - left, damping + left) for K in mean)
            ios = [io for group in groups for io in group]
            averages[name], inverses[name] = mean, self.inverse(damped, mean, ios)
        return averages, inverses


@dataclass(frozen=True)
class Joined:
    """One matrix for all terms as one batch, by any approximation of the package.

    Use it for three or more kinds of terms, and for approximations other than KFAC. Not where terms
    differ much in their number of coefficients: all are padded to the largest.

    Cost: that of `joined`, of the approximation, and of its exact inverse.

    Attributes:
        approximation: A function of a `LayerIO`, or an `Estimator`.
        decay: The share of the old matrix in an average. The damping that is added at the first
            steps decays with it, too.
    """

    approximation: Approximation | Estimator
    decay: float = 0.95

    def __post_init__(self) -> None:
        estimator(self.approximation)  # refuses what is neither

    def update(
        self, state: Any, terms: LinearizedTerms, damping: float, count: int
    ) -> tuple[dict[str, Any], dict[str, LinearMap]]:
        """The averaged matrices, and their inverses with a damping that decays to `damping`."""
        follow, weight = estimator(self.approximation), weight_of_newest(self.decay, count)
        matrices = {}
        for name, groups in by_layer(terms).items():
            io = joined([io for group in groups for io in group])
            matrices[name] = follow.update(None if state is None else state[name], io, weight)
        total = damping + self.decay**count
        return matrices, {name: M.inverse(total) for name, M in matrices.items()}
