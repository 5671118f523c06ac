r"""Eigenpairs of a low-rank matrix after a low-rank change, by a small eigendecomposition.

For orthonormal $U$ with $r$ columns and $X = U C + Q R$ with $K$,

$$
U \operatorname{diag}(d)\, U^\top + X X^\top
= \begin{bmatrix} U & Q \end{bmatrix}
\left( \begin{bmatrix} \operatorname{diag}(d) & \\ & 0 \end{bmatrix}
+ \begin{bmatrix} C \\ R \end{bmatrix} \begin{bmatrix} C \\ R \end{bmatrix}^\top \right)
\begin{bmatrix} U & Q \end{bmatrix}^\top ,
$$

and the matrix in the middle has at most $r + K$ rows.

Sources: Brand 2006 (Linear Algebra and its Applications 415), §3, for singular values; Golub and
Van Loan, Matrix Computations, §5.2.8, for projecting twice.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def brand_update(
    U: Float[Tensor, "d r"], d: Float[Tensor, " r"], X: Float[Tensor, "d K"]
) -> tuple[Float[Tensor, "d k"], Float[Tensor, " k"]]:
    """Eigenvectors and eigenvalues, descending, of `U diag(d) U^T + X X^T`: `r + K` at most.

    Columns of `X` in the span of `U` add no eigenpairs. Use it for `r + K` below `d`; not above,
    where the eigendecomposition of the whole matrix costs less.

    Cost: `O(d * (r + K)**2 + (r + K)**3)` operations, memory `d * (r + K)`.
    """
    C, Q, R = split_by_span(U, X)
    H = torch.cat([C, R])
    w, W = torch.linalg.eigh(H @ H.mT + torch.cat([d, d.new_zeros(len(R))]).diag())
    return reorthonormalized(torch.cat([U, Q], 1) @ W).flip(1), w.flip(0)


def split_by_span(
    U: Float[Tensor, "d r"], X: Float[Tensor, "d K"]
) -> tuple[Float[Tensor, "r K"], Float[Tensor, "d k"], Float[Tensor, "k K"]]:
    """`X = U C + Q R` with `Q` orthonormal, and orthogonal to `U`.

    If `X` lies in the span of `U` up to round-off, `X - U U^T X` is round-off, and *not* orthogonal
    to `U`. So the projection is done twice, directions below the precision (`10 * eps` times the
    norm of `X`) are dropped, and the basis of the others is projected once more.
    """
    C = U.mT @ X
    rest = X - U @ C
    again = U.mT @ rest
    C, rest = C + again, rest - U @ again
    Q, R = torch.linalg.qr(rest)
    left, s, right = torch.linalg.svd(R, full_matrices=False)
    size = torch.linalg.matrix_norm(torch.cat([C, R]), 2)  # that of X
    kept = s > 10 * torch.finfo(X.dtype).eps * size
    Q, R = Q @ left[:, kept], s[kept].unsqueeze(1) * right[kept]
    Q, T = torch.linalg.qr(Q - U @ (U.mT @ Q))
    return C, Q, T @ R


def reorthonormalized(U: Float[Tensor, "d r"]) -> Float[Tensor, "d r"]:
    """One step of Newton and Schulz to the nearest orthonormal basis, against round-off."""
    return 1.5 * U - 0.5 * U @ (U.mT @ U)
