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

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.kfac import kfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices import KroneckerEigen


def ekfac(io: LayerIO) -> KroneckerEigen:
    """Rescale KFAC's eigenbasis by the gradients' second moments in it."""
    basis = kfac(io).eigen()
    return KroneckerEigen(basis.QA, basis.QB, second_moments(io, basis.QA, basis.QB))


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
