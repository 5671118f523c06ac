r"""TEKFAC: the best eigenvalues in TKFAC's eigenbasis.

TEKFAC is to TKFAC what EKFAC is to KFAC. Its eigenvectors $U = Q_B \otimes Q_A$ are TKFAC's, its
eigenvalues the second moments of the gradients along them, $s = \operatorname{diag}(U^\top F U)$.

Source: Gao et al. 2020 (arXiv:2011.13609), who correct TKFAC as George et al. 2018
(arXiv:1806.03884) correct KFAC.
"""

from kfac_scratch.approximations.ekfac import rescaled
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.kronecker import KroneckerEigen


def tekfac(io: LayerIO) -> KroneckerEigen:
    """TEKFAC: TKFAC's eigenvectors with the second moments of the gradients as eigenvalues.

    Use it where `ekfac` is used. Not as a bound on EKFAC's error: either may be the nearer one.
    Not with `MovingAverage`; in training, pass `AmortisedEKFAC(factors=MovingAverage(tkfac))`.

    Law: nearest to the exact block among all matrices with TKFAC's eigenvectors, and so at least as
    near as TKFAC; the trace is exact.
    Cost: that of `tkfac`, two eigendecompositions and `second_moments`; memory
    `d_in**2 + d_out**2 + d_in * d_out`.
    """
    return rescaled(tkfac(io).eigen(), io)
