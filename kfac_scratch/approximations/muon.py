r"""Muon: the nearest matrix with orthonormal rows or columns, and its iteration.

With the singular value decomposition $V = U \Sigma W^\top$, the polar factor of $V$ is
$U W^\top$. Muon's step is nearly the polar factor of the averaged gradient. Shampoo and SOAP of one
gradient, without any memory, have the same step:

$$
B^{-1/4} G A^{-1/4} = B^{-1/2} G = G A^{-1/2} = U W^\top ,
\qquad A = G^\top G , \; B = G G^\top ,
$$

whereas TKFAC's $B^{-1/2} G A^{-1/2} = U \Sigma^{-1} W^\top$ inverts the singular values. The polar
factor is found by products alone: $X \leftarrow a X + (b\, X X^\top + c\, (X X^\top)^2) X$ acts on
every singular value as $x \leftarrow a x + b x^3 + c x^5$.

Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Higham 2008 (Functions of
Matrices), chapter 8, for the polar factor and Newton-Schulz.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.border import check_count
from kfac_scratch.linalg import told_from_zero

Polynomial = tuple[float, float, float]
"""The numbers `a`, `b` and `c` of a polynomial `a x + b x^3 + c x^5`."""

CUBIC: Polynomial = (1.5, -0.5, 0.0)
"""Newton and Schulz: `(3 x - x^3) / 2`, which converges to 1 from every start in (0, sqrt(3))."""

MUON: Polynomial = (3.4445, -4.7750, 2.0315)
"""Muon's numbers: steep at zero, but without a stable fixed point. It does not converge."""


def polar_factor(V: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
    """The matrix `U W^T` of a singular value decomposition `V = U diag(s) W^T`.

    Use it as the truth that `newton_schulz` approaches. Not in training, where products cost less
    than a decomposition.

    Law: no matrix with orthonormal rows or columns is nearer to `V`, if `V` has full rank. It
    depends neither on the size of `V` nor on its singular values. Where a singular value is no more
    than round-off, at most `10 * eps` of the largest, it is zero.
    Cost: a singular value decomposition in float64.

    Raises:
        ValueError: If an entry is not finite.
    """
    if not V.isfinite().all():
        raise ValueError(f"A {tuple(V.shape)} matrix without polar factor: not all is finite.")
    U, s, Wh = torch.linalg.svd(V.double(), full_matrices=False)
    kept = told_from_zero(s.to(V.dtype)) > 0
    return ((U * kept) @ Wh).to(V.dtype)


def newton_schulz(
    V: Float[Tensor, "m n"], steps: int, coefficients: Polynomial = CUBIC
) -> Float[Tensor, "m n"]:
    """The polar factor by a polynomial in `V`, of which every step is three products of matrices.

    Use it with `CUBIC` and enough steps for the polar factor, with `MUON` and five steps for Muon's
    direction, which has singular values around 1 instead. Not with `MUON` for accuracy, however
    many steps, and not with many steps where the rank may not be full.

    Law: an odd polynomial of the singular values of `V / |V|`, with the vectors of `V`. `CUBIC`
    converges, quadratically in the end; a singular value of `x` times the norm takes about
    `log(1 / x) / log(1.5)` steps before. `MUON` brings all but the smallest into a band around 1,
    and moves them within it at every further step. Round-off in a direction that `V` lacks grows by
    the first coefficient at every step, until it is a direction of its own.
    Cost: `2 * m * n * min(m, n) + min(m, n)**3` operations for each step. They run in the precision
    of `V`: Muon passes its average in bfloat16.

    Args:
        V: The matrix. Zero stays zero.
        steps: How many.
        coefficients: The polynomial.

    Raises:
        TypeError: If `steps` is not a whole number.
        ValueError: If it is negative.
    """
    check_count("steps", steps, 0)
    a, b, c = coefficients
    norm, tall = V.norm(), V.shape[0] > V.shape[1]
    X = (V.T if tall else V) / norm.where(norm > 0, 1.0)
    for _ in range(steps):  # one rounding for each product, which tells in bfloat16
        S = X @ X.T
        P = torch.addmm(S, S, S, beta=b, alpha=c)
        X = torch.addmm(X, P, X, beta=a)
    return X.T if tall else X
