r"""Inverse roots: powers of a damped matrix between none and its inverse.

$$
(M + \lambda I)^{-1/p} = Q (\Lambda + \lambda I)^{-1/p} Q^\top .
$$

KFAC divides by curvature, $p = 1$. Adam and its relatives divide by the root of second moments of
gradients, $p = 2$: a gradient that is multiplied by $c$ then gives the same step.

Source: Gupta, Koren and Singer 2018 (arXiv:1802.09568), who take inverse roots of Kronecker
factors; Golub and Van Loan, Matrix Computations, §9.1, for functions of matrices.
"""

from dataclasses import replace

from kfac_scratch.border import check_count
from kfac_scratch.matrices.dense import Dense, DenseEigen
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKroneckerEigen
from kfac_scratch.matrices.kronecker import KroneckerEigen
from kfac_scratch.matrices.low_rank import FourBlocks
from kfac_scratch.matrices.matrix import Matrix

Spectral = KroneckerEigen | DiagonalKroneckerEigen | DenseEigen | Diagonal | FourBlocks
"""Matrices whose eigenvalues are numbers in them, and whose eigenvectors are orthonormal."""


def inverse_root(M: Matrix, damping: float, p: int = 2) -> Spectral:
    """The symmetric map `R` with `R^p = (M + damping * I)^-1`.

    Use it as `invert=` of an optimizer for Shampoo, SOAP, and every matrix that stands for second
    moments of gradients; `partial(inverse_root, p=4)` is another root. Not for natural gradient
    steps, which take the whole inverse: `exact_inverse`.

    Law: `p` products with `R` undo one with `M + damping * I`. With `p = 1` it is `exact_inverse`.
    A loss that is multiplied by `c` multiplies a matrix of second moments and its damping by `c`,
    and `R` by `c**(-1/p)`.
    Cost: that of the exact inverse. A `Dense` matrix is decomposed, `O(D**3)` operations, where its
    inverse takes a Cholesky factorisation.

    Args:
        M: A matrix whose exact inverse is found by orthonormal eigenvectors.
        damping: In the units of `M`. Adam's `eps`, which is added to the root, corresponds to a
            damping of `eps**2`.
        p: Which root.

    Raises:
        TypeError: If the inverse of this kind of matrix is not found by orthonormal eigenvectors,
            as that of a sum of two Kronecker products; if `p` is not a whole number.
        ValueError: If `p` is below 1; as the exact inverse.
    """
    check_count("p", p)
    inverse = (M.eigen() if isinstance(M, Dense) else M).inverse(damping)
    if not isinstance(inverse, Spectral):
        raise TypeError(
            f"A {type(M).__name__} has no inverse root here, because its inverse is not found by "
            "orthonormal eigenvectors: use exact_inverse, or Dense(M.dense()) for a small layer."
        )
    return _root(inverse, p)


def _root(M: Spectral, p: int) -> Spectral:
    """The same eigenvectors with the roots of the eigenvalues."""
    if isinstance(M, FourBlocks):
        parts = (M.both, M.left, M.right, M.rest)
        return FourBlocks(M.UA, M.UB, *(part ** (1 / p) for part in parts))
    return replace(M, scale=M.scale ** (1 / p))
