r"""TEKFAC: the best eigenvalues in TKFAC's eigenbasis.

What EKFAC does for KFAC: the eigenvectors $U = Q_B \otimes Q_A$ of TKFAC with the second moments
of the gradients along them, $s = \operatorname{diag}(U^\top F U)$, are nearest to the exact block
among all matrices that are diagonal in this basis. So they are at least as near as TKFAC, and the
trace is exact again.

Source: Gao et al. 2020, who correct TKFAC as George et al. 2018 (arXiv:1806.03884) correct KFAC.
"""

from kfac_scratch.approximations.ekfac import rescaled
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.kronecker import KroneckerEigen


def tekfac(io: LayerIO) -> KroneckerEigen:
    """Rescale TKFAC's eigenbasis by the gradients' second moments in it."""
    return rescaled(tkfac(io).eigen(), io)
