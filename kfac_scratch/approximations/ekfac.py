r"""EKFAC: keep KFAC's eigenbasis, correct its eigenvalues.

In an orthogonal basis $U = Q_B \otimes Q_A$, the diagonal matrix nearest to the exact block $F$ has
the second moments of the gradients in that basis,

$$
s = \operatorname{diag}(U^\top F U), \qquad
s_{oi} = \sum_{v,n} \bigl(Q_B^\top G_{vn} Q_A\bigr)_{oi}^2 ,
$$

where KFAC has products of the factors' eigenvalues. The Frobenius error satisfies
$\|F - U \operatorname{diag}(s) U^\top\|^2 = \|F\|^2 - \|s\|^2$, so that it is at most KFAC's, and
the trace is exact.

Source: George et al. 2018 (arXiv:1806.03884), §3.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.estimators import Estimator, MovingAverage
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.border import check_count, check_instance
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.kronecker import KroneckerEigen
from kfac_scratch.matrices.matrix import Matrix


def ekfac(io: LayerIO) -> KroneckerEigen:
    """Rescale KFAC's eigenbasis by the gradients' second moments in it."""
    return rescaled(kfac(io).eigen(), io)


def rescaled(M: KroneckerEigen, io: LayerIO, decay: float = 0.0) -> KroneckerEigen:
    """Move the eigenvalues of a matrix towards the second moments of a new batch in its basis.

    The amortised EKFAC calls `ekfac` now and then, for a basis, and this in between, at a small
    part of the cost (George et al. 2018, §3.2). Eigenvalues of different bases are never averaged.

    Args:
        M: The matrix so far.
        io: The new batch.
        decay: Weight of the eigenvalues so far.

    Raises:
        ValueError: If the decay is not in [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in [0, 1], got {decay}.")
    scale = second_moments(io, M.QA, M.QB)
    return KroneckerEigen(M.QA, M.QB, torch.lerp(scale, M.scale, decay))


@dataclass(frozen=True)
class AmortisedEKFAC:
    """EKFAC as an `Estimator`: cheap new eigenvalues for every batch, a new basis now and then.

    Args:
        basis_every: Updates between two eigendecompositions.
        factors: The estimator that the basis is taken from; its matrices need a method `eigen()`.
    """

    basis_every: int = 10
    factors: Estimator = field(default_factory=lambda: MovingAverage(kfac))

    def __post_init__(self) -> None:
        check_count("basis_every", self.basis_every)
        check_instance("factors", self.factors, Estimator, "factors=MovingAverage(kfac)")

    def update(self, state: "EKFACState | None", io: LayerIO, weight: float) -> "EKFACState":
        """Average the factors, and the second moments in the current basis.

        A new basis starts with the moments that the old matrix has in it, which keeps the trace.
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

    def diagonal(self) -> Float[Tensor, "D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.M.diagonal()


def second_moments(
    io: LayerIO, QA: Float[Tensor, "d_in d_in"], QB: Float[Tensor, "d_out d_out"]
) -> Float[Tensor, "d_out d_in"]:
    """Sum over data and vectors of the squared gradients in a Kronecker basis.

    With weight sharing a datum's gradient is summed over its positions first, then squared.
    """
    a, g = io.a @ QA, io.g @ QB
    if a.shape[1] == 1:  # the square of an outer product is the outer product of squares
        return g.square().sum((0, 2)).T @ a.squeeze(1).square()
    moments = a.new_zeros(g.shape[-1], a.shape[-1])
    for part in g.split(1):  # one vector at a time: memory N * d_out * d_in
        moments += LayerIO(a, part).gradients().square().sum((0, 1))
    return moments
