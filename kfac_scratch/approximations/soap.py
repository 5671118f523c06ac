r"""SOAP: Adam in Shampoo's eigenbasis, which is TEKFAC of batch gradients.

The eigenvectors are those of TKFAC's factors, the eigenvalues the second moments of the gradients
in that basis, $s_{oi} = \sum_k (Q_B^\top G_k Q_A)_{oi}^2$. Their sums over rows and columns are the
factors' own eigenvalues,

$$
\sum_i s_{oi} = \lambda_o(B), \qquad \sum_o s_{oi} = \lambda_i(A),
$$

so that TKFAC, whose eigenvalues are $\lambda_o(B) \lambda_i(A) / \operatorname{tr} A$, has what is
left of $s$ if only these sums are kept, as Adafactor keeps them. EKFAC's second moments have no
such sums, because KFAC's factors are no partial traces.

Source: Vyas et al. 2025 (arXiv:2409.11321), claim 1 for the sums.
"""

from kfac_scratch.approximations.ekfac import AmortisedEKFAC
from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.approximations.tkfac import tkfac


def soap(basis_every: int = 10) -> AmortisedEKFAC:
    """SOAP's estimator: TKFAC's averaged factors now and then give the basis, batches the moments.

    Use it as `OfBatch(soap())` with `invert=inverse_root`: that is SOAP. Without `OfBatch` it is
    amortised TEKFAC of the gradients of samples, which can carry the whole inverse. Not as SOAP's
    published code to the last digit: that skips the first step, refines its basis by one QR
    iteration, relabels the moments in a new basis, and adds Adam's `eps` to the root.

    Law: with the basis of the first batch, a step is Adam's in that basis, with `damping` under the
    root, and the momentum that the optimizer adds.
    Cost: that of `AmortisedEKFAC`.

    Args:
        basis_every: Updates between two eigendecompositions.

    Raises:
        ValueError: If `basis_every` is below 1.
    """
    return AmortisedEKFAC(basis_every, MovingAverage(tkfac))
