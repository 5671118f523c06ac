r"""Linear algebra on tensors: the vec convention and positive semi-definite matrices.

`vec` stacks **rows**, as `torch.flatten` does, so that for $V \in \mathbb{R}^{m \times n}$

$$
(B \otimes A) \operatorname{vec}(V) = \operatorname{vec}(B V A^\top).
$$

Everything else in this package follows from this one choice.
"""

import warnings
from collections.abc import Callable
from functools import reduce

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor


def vec(V: Num[Tensor, "*batch m n"]) -> Num[Tensor, "*batch mn"]:
    """Stack the rows of a matrix (or of every matrix in a batch) into one vector."""
    return V.flatten(-2)


def unvec(v: Num[Tensor, "*batch mn"], rows: int) -> Num[Tensor, "*batch m n"]:
    """The matrix with the given number of rows whose `vec` is `v`.

    Raises:
        ValueError: If the vector does not fill that many rows.
    """
    size = v.shape[-1]
    if rows < 1 or size % rows:
        raise ValueError(f"A vector of {size} entries has no matrix with {rows} rows.")
    return v.unflatten(-1, (rows, size // rows))


def kron_matvec(
    B: Float[Tensor, "p m"], A: Float[Tensor, "q n"], v: Float[Tensor, "*batch mn"]
) -> Float[Tensor, "*batch pq"]:
    r"""Multiply `B ⊗ A` onto a vector without forming it: the vec trick.

    Costs $\mathcal{O}(mn(p + q))$ at most instead of the dense product's $\mathcal{O}(mnpq)$.
    """
    return vec(B @ unvec(v, rows=B.shape[1]) @ A.mT)


def kron(B: Float[Tensor, "p m"], A: Float[Tensor, "q n"]) -> Float[Tensor, "pq mn"]:
    """The dense Kronecker product `B ⊗ A`, for factors in any memory layout.

    `torch.kron` of torch 2.13 fails if one of them is stored by rows and the other by columns, as
    eigenvectors are. Memory is `p * q * m * n` numbers: use it in tests and pictures only.
    """
    return torch.kron(B.contiguous(), A.contiguous())


def scale_in_basis(
    QA: Float[Tensor, "n n"], QB: Float[Tensor, "m m"], scale: Float[Tensor, "m n"], V: Tensor
) -> Float[Tensor, "*batch m n"]:
    """The product of `(QB ⊗ QA) diag(vec(scale)) (QB ⊗ QA)^T` with matrices `V`.

    Cost: `2 * m * n * (m + n)` operations for each matrix.
    """
    return QB @ (scale * (QB.mT @ V @ QA)) @ QA.mT


def stored_as_columns(rows: Float[Tensor, "*batch S d"]) -> bool:
    """Whether rows lie in memory as columns: the positions `S` next to each other, not the `d`.

    Rows may be stored either way, and every function gives the same result for both. Capture
    stores the rows of a convolution as columns, because the image has its positions next to each
    other, too. Whoever copies or multiplies rows asks here, to read memory in its own order.
    """
    return rows.mT.is_contiguous()


TERMS = 512
"""Outer products in one sum of `gram`."""


def gram(rows: Float[Tensor, "K S d"]) -> Float[Tensor, "d d"]:
    """Sum of `r r^T` over all rows `r`, in either layout (see `stored_as_columns`).

    Law: symmetric up to the rounding of `torch.matmul`. Sums of more than `TERMS` products are sums
    of such sums: the round-off of one long sum grows with its length, and so much in float32 that
    ten thousand equal rows give a matrix with negative eigenvalues of a thousand `eps`.
    Cost: `K * S * d**2` operations, and half of them for large `d`: above 192, products are made by
    quarters. Rows that are stored as columns are not copied if `d < S`: then 32 of the `K` matrices
    at a time are multiplied as a batch, which needs memory for 32 products at once. Otherwise they
    are copied into rows.
    """
    _, S, d = rows.shape
    if stored_as_columns(rows) and d < S:
        return _symmetric_product(rows, _product_of_columns)
    return _symmetric_product(rows.reshape(-1, d), _product)


def _symmetric_product(
    x: Float[Tensor, "*K d"], product: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "d d"]:
    """`product(x, x)` by quarters: with halves `x = [p, q]` it is `[[p^T p, p^T q], [·, q^T q]]`.

    The last quarter is the second one's transpose. Those on the diagonal are made by quarters, too,
    unless that gains nothing: for 192 columns and fewer, and for more than four columns to a row.
    """
    d = x.shape[-1]
    if d <= 192 or d**2 > 4 * x.numel():
        return product(x, x)
    h, M = d // 2, x.new_empty(d, d)
    p, q = x[..., :h], x[..., h:]
    M[:h, :h], M[h:, h:] = _symmetric_product(p, product), _symmetric_product(q, product)
    M[:h, h:] = product(p, q)
    M[h:, :h] = M[:h, h:].mT
    return M


def _product(x: Float[Tensor, "K p"], y: Float[Tensor, "K q"]) -> Float[Tensor, "p q"]:
    whole = len(x) - len(x) % TERMS
    if whole <= TERMS:
        return x.mT @ y
    short = _product_of_columns(*(t[:whole].unflatten(0, (-1, TERMS)) for t in (x, y)))
    return torch.addmm(short, x[whole:].mT, y[whole:])


def _product_of_columns(
    x: Float[Tensor, "K S p"], y: Float[Tensor, "K S q"]
) -> Float[Tensor, "p q"]:
    pairs = zip(x.split(32), y.split(32), strict=True)
    return reduce(torch.add, ((p.mT @ q).sum(0) for p, q in pairs))


def at_least_float32(x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A tensor with the precision that curvature has: half precision becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def eye_like(M: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The identity of a matrix's size, dtype and device."""
    return torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)


COMPUTED = (
    "If it was computed in a lower precision and cast, decompose it in that precision: float32 is "
    "decomposed in float64 anyway."
)


def psd_eigh(
    M: Float[Tensor, "d d"], size: Float[Tensor, ""] | None = None
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues (ascending, none negative) and eigenvectors of a PSD matrix.

    Use it for a damped inverse, which needs no decision about rank: round-off below zero becomes
    zero, and nothing else is changed. Not to see a null space: then put the eigenvalues through
    `told_from_zero`.

    Law: the decomposition is that of the stored matrix, in float64 and rounded to the matrix's
    dtype. So the error of a damped inverse is a few `eps`, whatever the width and the damping.
    Cost: `O(d**3)` operations in float64, about twice those in float32 on a CPU.

    Args:
        M: The matrix.
        size: The magnitude that its round-off is relative to. Default: its largest diagonal entry.
            Of a small part of a large matrix, such as `Q.T @ M @ Q`, that is the large one's.

    Raises:
        ValueError: If the matrix has non-finite entries, is not symmetric, or has an eigenvalue
            that is negative beyond the round-off of long sums, `1000 * eps` of the largest: the
            error of a sum of `K` outer products is up to `K * eps`, and reaches a good part of that
            if all are equal. That of `gram` stays below, however many there are.
    """
    if not M.isfinite().all():
        raise ValueError(f"A {tuple(M.shape)} matrix to be decomposed has non-finite entries.")
    unit, largest = torch.finfo(M.dtype), M.diagonal().abs().amax()
    largest = largest if size is None else torch.maximum(largest, size)
    if (asymmetry := (M - M.mT).abs().amax()) > 100 * unit.eps * largest:
        raise not_symmetric(M, asymmetry)
    exact = M.double()
    eigenvalues, Q = torch.linalg.eigh((exact + exact.mT) / 2)
    top = torch.maximum(eigenvalues.abs().amax(), largest.double())
    tolerance = (1000 * unit.eps * top).clamp(min=unit.tiny)
    if (eigenvalues < -tolerance).any():
        raise ValueError(
            f"A matrix that should be positive semi-definite has the eigenvalue "
            f"{eigenvalues.min():.3g} (largest: {eigenvalues.max():.3g}). {COMPUTED}"
        )
    return eigenvalues.where(eigenvalues > unit.tiny, 0.0).to(M.dtype), Q.to(M.dtype)


def symmetric(M: Float[Tensor, "*batch d d"], sign: float = 1.0) -> Bool[Tensor, ""]:
    """Whether a matrix is its transpose times a sign, up to `100 * eps` of the largest entry.

    With `sign=-1`, whether it is antisymmetric. The answer stays on the matrix's device.
    """
    return (M - sign * M.mT).abs().amax() <= 100 * torch.finfo(M.dtype).eps * M.abs().amax()


def not_symmetric(M: Float[Tensor, "*batch d d"], asymmetry: Float[Tensor, ""]) -> ValueError:
    """The refusal of a matrix whose decomposition would silently be that of another one."""
    return ValueError(
        f"A {tuple(M.shape)} matrix to be decomposed is not symmetric: entries differ by up to "
        f"{asymmetry:.3g} (largest entry: {M.abs().amax():.3g}). {COMPUTED}"
    )


def cholesky_factor(M: Float[Tensor, "*batch d d"], failure: str) -> Float[Tensor, "*batch d d"]:
    """The lower Cholesky factor of a positive definite matrix, or of each in a batch.

    Cost: `d**3 / 3` operations for each matrix, and one synchronisation with the device.

    Args:
        M: The matrix.
        failure: What the error says if `M` is not positive definite.

    Raises:
        ValueError: If the matrix is not positive definite, or not symmetric, of which the
            factorisation reads one triangle only.
    """
    L, failed = torch.linalg.cholesky_ex(M)
    one_triangle = ~symmetric(M)
    if (failed.any() | one_triangle).any():
        if one_triangle and M.isfinite().all():
            raise not_symmetric(M, (M - M.mT).abs().amax())
        raise ValueError(failure)
    return L


def told_from_zero(eigenvalues: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """Eigenvalues of a PSD matrix, with zero for those that its own rounding could have made.

    Use it where a theorem needs a null space: an undamped inverse, a pseudo-inverse. Not before
    damping: genuine eigenvalues may be small. Of a Kronecker product, ask it for each factor.

    Law: what is below `10 * eps` of the largest becomes zero. Round-off in a rank-deficient sum of
    a few hundred outer products is at most `3 * eps` of the largest, for every width. It grows with
    the number of products, which a matrix does not tell.
    """
    unit = torch.finfo(eigenvalues.dtype)
    tolerance = (10 * unit.eps * eigenvalues.amax()).clamp(min=unit.tiny)
    return eigenvalues.where(eigenvalues > tolerance, 0.0)


def positive_part(M: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """The positive semi-definite matrix nearest to a symmetric one: negative eigenvalues are zero.

    Law: a matrix without negative eigenvalues is returned bit for bit.
    Cost: an eigendecomposition in float64, `O(d**3)` operations.
    Source: Higham 1988 (Computing a nearest symmetric positive semidefinite matrix).
    """
    eigenvalues, Q = torch.linalg.eigh(M.double())
    positive = (Q * eigenvalues.clamp(min=0)) @ Q.mT
    return positive.to(M.dtype).where(eigenvalues[0] < 0, M)


def simultaneous_eigh(
    P: Float[Tensor, "d d"], M: Float[Tensor, "d d"]
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    r"""Diagonalise two symmetric matrices at once: `K.T @ P @ K = I`, `K.T @ M @ K = diag(p)`.

    Returns `p` and `K`, computed in float64 and rounded.

    Source: Golub and Van Loan, Matrix Computations, §8.7.2.

    Raises:
        ValueError: If `P` is not positive definite, or one of both is not symmetric.
    """
    if not (symmetric(P) & symmetric(M)):
        wrong = M if symmetric(P) else P
        raise not_symmetric(wrong, (wrong - wrong.mT).abs().amax())
    exact = P.double()
    L = cholesky_factor(
        (exact + exact.mT) / 2,
        "Diagonalising two matrices at once needs a positive definite first one.",
    )
    W = torch.linalg.solve_triangular(L, M.double(), upper=False)  # L^-1 M
    W = torch.linalg.solve_triangular(L, W.mT, upper=False)  # L^-1 M L^-T
    p, E = torch.linalg.eigh((W + W.mT) / 2)
    K = torch.linalg.solve_triangular(L.mT, E, upper=True)
    return p.to(P.dtype), K.to(P.dtype)


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Float[Tensor, "*batch m n"],
    precondition: Callable[[Tensor], Tensor],
    max_iter: int | None = None,
    tol: float | None = None,
) -> Float[Tensor, "*batch m n"]:
    """The solution of `M x = b` for a positive definite `M`, for every matrix in a batch.

    Use it where products with `M` are cheap and `M` itself is not. Not where a Cholesky
    factorisation fits: it is exact, and serves many right-hand sides.

    Law: it starts from zero, so that `<x, b> > 0` after any number of steps.
    Cost: one product with `M` and one with the preconditioner for each step.
    Source: Hestenes and Stiefel 1952; Golub and Van Loan, Matrix Computations, §11.5.

    Args:
        matvec: The product with `M`.
        b: Right-hand sides: matrices, each a vector of the system.
        precondition: The product with an approximate inverse of `M`.
        max_iter: The number of steps after which all stop: the last iterate is wanted then, whether
            the tolerance is reached or not. Default: `10 * m * n`, with a warning if it is not.
            In exact arithmetic `m * n` steps suffice; round-off takes several times as many.
        tol: The residual at which a system stops, as a fraction of its right-hand side. Default:
            `10 * eps`.

    Raises:
        ValueError: If a direction of negative curvature shows that `M` is not positive definite.

    Warns:
        UserWarning: If the default number of steps does not reach the tolerance.
    """
    limit = 10 * b.shape[-2] * b.shape[-1] if max_iter is None else max_iter
    tol = 10 * torch.finfo(b.dtype).eps if tol is None else tol
    size = b.abs().amax((-2, -1), keepdim=True)  # divided by it, no square underflows
    size = size.where(size > 0, 1.0)
    x, r = torch.zeros_like(b), b / size
    z, target = precondition(r), (tol**2 * _dot(r, r)).clamp_min(_nothing(b))
    p, rz = z, _dot(r, z)
    for _ in range(limit):
        active = _dot(r, r) > target
        if not active.any():
            break
        Mp = matvec(p)
        curvature = _dot(p, Mp)
        if (active & (curvature <= 0)).any():
            raise ValueError("Conjugate gradients met negative curvature: use a larger damping.")
        step = torch.where(active, rz / curvature.where(active, 1.0), 0.0)
        x, r = x + step * p, r - step * Mp
        z = precondition(r)
        rz, old = _dot(r, z), rz
        p = z + rz / old.where(old > 0, 1.0) * p
    else:
        if max_iter is None and (_dot(r, r) > target).any():
            left = float((_dot(r, r) / target).max().sqrt())
            warnings.warn(
                f"Conjugate gradients stopped after {limit} steps with a residual {left:.3g} times "
                "the tolerance: use a larger damping, or an inverse by a factorisation.",
                stacklevel=2,
            )
    return size * x


def _nothing(b: Tensor) -> float:
    """The size below which a squared norm is round-off."""
    return torch.finfo(b.dtype).tiny / torch.finfo(b.dtype).eps


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum((-2, -1), keepdim=True)
