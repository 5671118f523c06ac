r"""EKFAC: KFAC's eigenvectors with the best eigenvalues for them.

In an orthogonal basis $U = Q_B \otimes Q_A$, the diagonal matrix nearest to the exact block $F$ has
the second moments of the gradients in that basis,

$$
s = \operatorname{diag}(U^\top F U), \qquad
s_{oi} = \sum_{v,n} \bigl(Q_B^\top G_{vn} Q_A\bigr)_{oi}^2 ,
$$

where KFAC has products of the factors' eigenvalues. The Frobenius error satisfies
$\|F - U \operatorname{diag}(s) U^\top\|^2 = \|F\|^2 - \|s\|^2$, so that it is at most KFAC's, and
the trace is exact.

Source: George et al. 2018 (arXiv:1806.03884), §3, who call the basis the Kronecker-factored
eigenbasis.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.estimators import Estimator, MovingAverage
from kfac_scratch.approximations.kfac import kfac, one_product
from kfac_scratch.border import check_count, check_instance
from kfac_scratch.layer_io import LayerIO, check_not_reduced
from kfac_scratch.matrices.kronecker import KroneckerEigen
from kfac_scratch.matrices.matrix import Matrix


def ekfac(io: LayerIO) -> KroneckerEigen:
    """EKFAC: KFAC's eigenvectors with the second moments of the gradients as eigenvalues.

    Use it where one matrix serves for long (Laplace, influence), or in training as
    `AmortisedEKFAC`. Not with `MovingAverage`, which would average matrices in different bases.

    Law: nearest to the exact block among all matrices with KFAC's eigenvectors, and so at least as
    near as KFAC; the trace is exact.
    Cost: that of `kfac`, two eigendecompositions, `O(d_in**3 + d_out**3)`, and `second_moments`;
    memory `d_in**2 + d_out**2 + d_in * d_out`.

    Raises:
        ValueError: As `second_moments`.
    """
    return rescaled(one_product(io).eigen(), io)


def ekfac_reduce(io: LayerIO) -> KroneckerEigen:
    """EKFAC-reduce: the eigenvectors of KFAC-reduce with the second moments of the gradients.

    Use it with `flavour=EXPAND`, where KFAC-reduce is the better one of the two. Not where its
    memory for all rows is too large. In training,
    `AmortisedEKFAC(factors=MovingAverage(kfac_reduce))` is its moving average.

    Law: nearest to the exact block among all matrices with KFAC-reduce's eigenvectors; the trace is
    exact. If a factor has a null space (fewer samples than inputs), its eigenvectors there are any
    basis of it, and their eigenvalues, which the gradients of samples have there, depend on it.
    Cost: as `ekfac`.
    Source: Eschenhagen et al. 2023 (arXiv:2311.00636) for the factors; curvlinops has it, too.

    Raises:
        ValueError: If `flavour=REDUCE` has already lost the gradients of samples.
    """
    return rescaled(one_product(io.reduced()).eigen(), io)


def rescaled(M: KroneckerEigen, io: LayerIO, decay: float = 0.0) -> KroneckerEigen:
    """The same eigenvectors, with eigenvalues moved towards the second moments of a new batch.

    Use it between two eigendecompositions (George et al. 2018, §3.2), or for the best eigenvalues
    in any Kronecker basis. Not across bases: eigenvalues of different bases are never averaged.

    Cost: that of `second_moments`.

    Args:
        M: The matrix so far.
        io: The new batch.
        decay: Share of the eigenvalues so far. The default forgets them, as `ekfac` needs it;
            averages over batches pass their own.

    Raises:
        ValueError: If the decay is not in [0, 1], or as `second_moments`.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}.")
    scale = second_moments(io, M.QA, M.QB)
    return KroneckerEigen(M.QA, M.QB, torch.lerp(scale, M.scale, decay))


@dataclass(frozen=True)
class AmortisedEKFAC:
    """EKFAC as an `Estimator`: new eigenvalues for every batch, a new basis every so many.

    Use it for EKFAC in training. Not for one matrix of one batch: that is `ekfac`.

    Cost: for each batch that of `factors` and of `second_moments`; every `basis_every` batches two
    eigendecompositions. Memory `2 * (d_in**2 + d_out**2) + d_in * d_out`.

    Args:
        basis_every: Updates between two eigendecompositions.
        factors: The estimator of the matrices whose eigenvectors are the basis; they need a method
            `eigen()`. Default: the moving average of KFAC's factors.

    Raises:
        ValueError: If `basis_every` is below 1.
    """

    basis_every: int = 10
    factors: Estimator = field(default_factory=lambda: MovingAverage(kfac))

    def __post_init__(self) -> None:
        check_count("basis_every", self.basis_every)
        check_instance("factors", self.factors, Estimator, "factors=MovingAverage(kfac)")

    def update(self, state: "EKFACState | None", io: LayerIO, weight: float) -> "EKFACState":
        """The averaged factors, and the averaged second moments in the current basis.

        A new basis starts with the moments that the old matrix has in it, which keeps the trace.

        Args:
            state: The state so far, None before the first batch.
            io: The layer on the new batch.
            weight: Share of the new batch; the old state has `1 - weight`.
        """
        factors: Any = self.factors.update(None if state is None else state.factors, io, weight)
        if state is None:
            M = factors.eigen()
            return EKFACState(factors, rescaled(M, io), 1)
        M, age = state.M, state.age
        if age % self.basis_every == 0:
            M = M.carried_over(factors.eigen())
        return EKFACState(factors, rescaled(M, io, 1 - weight), age + 1)


@dataclass(frozen=True, eq=False)
class EKFACState:
    """An EKFAC matrix `M`, the averaged factors for its next basis, and the batches so far."""

    factors: Matrix
    M: KroneckerEigen
    age: int

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`M` applied to `V`."""
        return self.M @ V

    def inverse(self, damping: float) -> KroneckerEigen:
        """The inverse of `M + damping * I`."""
        return self.M.inverse(damping)

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.M.dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.M.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.M.diagonal()


def second_moments(
    io: LayerIO, QA: Float[Tensor, "d_in d_in"], QB: Float[Tensor, "d_out d_out"]
) -> Float[Tensor, "d_out d_in"]:
    """The sum over samples and vectors of the squared gradients in a Kronecker basis.

    With weight sharing, a sample's gradient is summed over its positions first, then squared.

    Cost: `N * S * (d_in**2 + V * d_out**2)` operations for the rotation. Then `N * d_in * d_out`
    with one position; `V * N * S * d_in * d_out`, and memory `N * d_in * d_out`, with several.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """
    check_not_reduced(io, "EKFAC, or the second moments in any basis,")
    a, g = io.a @ QA, io.g @ QB
    if a.shape[1] == 1:  # the square of an outer product is the outer product of squares
        return g.square().sum((0, 2)).T @ a.squeeze(1).square()
    moments = a.new_zeros(g.shape[-1], a.shape[-1])
    for part in g.split(1):  # one vector at a time: memory N * d_out * d_in
        moments += LayerIO(a, part).gradients().square().sum((0, 1))
    return moments
