r"""CG-FAC: systems with the exact block, solved by products alone.

A product with the exact block does not need the block, only the layer's inputs and vectors,

$$
F V = \sum_{v,n} \langle G_{vn}, V \rangle\, G_{vn} , \qquad
\langle G_{vn}, V \rangle = \sum_s g_{vns}^\top V a_{ns} ,
$$

and conjugate gradients solve $(F + \delta I) X = V$ by such products. With $K = V N$ gradients,
$F + \delta I$ has at most $K + 1$ different eigenvalues, and that many steps are enough.
KFAC's matrix has such a product, too: `skfac(io)`. The abstract of the source does not say with
which of the two it solves.

The kernel $\langle G_{vn}, G_{wm} \rangle$, of size $K \times K$, solves the same system directly.

Sources: Chen 2021 (arXiv:2101.00218); Hestenes and Stiefel 1952. The direct solver is Woodbury's
identity.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.ekfac import second_moments
from kfac_scratch.layer_io import LayerIO, check_not_reduced, check_one_use
from kfac_scratch.linalg import conjugate_gradient, eye_like
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker_sum import ConjugateGradientInverse
from kfac_scratch.matrices.matrix import LinearMap, check_damping


def cg_fac(io: LayerIO) -> "Gradients":
    """CG-FAC: the exact block as products, with the layer's inputs and vectors in memory.

    Use it with `truncated_inverse` for wide layers and small batches, or `kernel_inverse` if there
    are few gradients. Not for averages over batches, which it does not have, and not for
    `steps * N * S` above `d_in + d_out`: KFAC's step then costs less.

    Law: `cg_fac(io).dense() == io.block()`.
    Cost: memory of the batch, `N * S * (d_in + V * d_out)`; a product
    `2 * N * S * d_out * (d_in + V)` operations.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
        NotImplementedError: For a `TiedIO`.
    """
    check_one_use(io)
    check_not_reduced(io, "CG-FAC")
    return Gradients(io)


@dataclass(frozen=True, eq=False)
class Gradients:
    """The exact block `F = U @ U.T`; columns of `U` are the gradients of all vectors and samples.

    The gradients are never formed: `U` is stored as inputs and vectors of the layer. See `cg_fac`.
    """

    U: LayerIO

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The sum of the gradients, each with its inner product with `V` as weight."""
        return self.U.combination(self.U.inner_products(V))

    def inverse(self, damping: float) -> ConjugateGradientInverse:
        """The inverse of `F + damping * I`: conjugate gradients to full accuracy at every product.

        Raises:
            ValueError: If the damping is 0 and there are fewer gradients than weights.
        """
        check_damping(damping)
        ones = torch.ones_like(self.U.g[0, 0, :1].mT @ self.U.a[0, :1])  # [d_out, d_in]
        if damping == 0 and self.U.g[..., 0, 0].numel() < ones.numel():
            raise ValueError("A singular matrix has no inverse: pass a positive damping.")
        return ConjugateGradientInverse(self, damping, Diagonal(ones))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.U.block()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.diagonal().sum()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        a, g = self.U.a, self.U.g
        QA, QB = (torch.eye(t.shape[-1], dtype=t.dtype, device=t.device) for t in (a, g))
        return second_moments(self.U, QA, QB).flatten()


# ---- a few steps --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TruncatedInverse:
    """Approximately `(M + damping * I)^{-1}`: a few steps of conjugate gradients at every product.

    Law: `X = T @ V` has `<X, V> > 0` after any number of steps, since they start from zero. It is
    not a linear map: the polynomial in `M` that multiplies `V` depends on `V`.
    """

    M: LinearMap
    damping: float
    max_iter: int
    tol: float
    preconditioner: LinearMap | None = None

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The approximate solution of `M X + damping * X = V`."""
        P = self.preconditioner
        return conjugate_gradient(
            lambda X: self.M @ X + self.damping * X,
            V,
            (lambda R: R) if P is None else (lambda R: P @ R),
            self.max_iter,
            self.tol,
        )


def truncated_inverse(
    M: LinearMap, damping: float, max_iter: int = 20, tol: float = 1e-2
) -> TruncatedInverse:
    """CG-FAC's inverse: conjugate gradients at every product, with a loose tolerance.

    Use it as `invert=` for `cg_fac` in training. Not where an accurate or linear map is needed:
    `M.inverse(damping)` iterates to full accuracy, `kernel_inverse` solves directly.

    Cost: one product with `M` for each step. The steps end without a warning when `max_iter` is
    reached.

    Args:
        M: The curvature.
        damping: The multiple of the identity that is added, in the units of `M`.
        max_iter: The largest number of steps.
        tol: The residual at which to stop, as a fraction of the right-hand side. A step of training
            needs no more; the default of `linalg.conjugate_gradient` is full accuracy.

    Raises:
        ValueError: If there is not at least one step, or the damping is negative.
    """
    check_damping(damping)
    if max_iter < 1:
        raise ValueError(f"Conjugate gradients need at least 1 step, got max_iter={max_iter}.")
    return TruncatedInverse(M, damping, max_iter, tol)


# ---- directly -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class KernelInverse:
    """`(U @ U.T + damping * I)^{-1}` by the Cholesky factor `L` of the damped kernel."""

    U: LayerIO
    L: Float[Tensor, "K K"]
    damping: float

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """The product by Woodbury's identity."""
        inner = self.U.inner_products(V)
        y = torch.cholesky_solve(inner.flatten(-2).unsqueeze(-1), self.L)
        return (V - self.U.combination(y.reshape(inner.shape))) / self.damping


def gradient_kernel(io: LayerIO) -> Float[Tensor, "K K"]:
    """The inner products of all pairs of gradients, in the order of `io.g.flatten(0, 1)`.

    Cost: with `K = V * N` gradients, `K**2 * d_out + N**2 * d_in` operations for one position. With
    several, gradients are formed: `K**2 * D` operations, memory `K * D`.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """
    check_not_reduced(io, "The kernel of gradients")
    V, _, S, _ = io.g.shape
    if S == 1:
        a, g = io.a.squeeze(1), io.g.squeeze(2).flatten(0, 1)
        return (g @ g.mT) * (a @ a.mT).repeat(V, V)
    G = io.gradients().flatten(2).flatten(0, 1)  # [VN, D]
    return G @ G.mT


def kernel_inverse(M: Gradients, damping: float) -> KernelInverse:
    """CG-FAC's system solved directly: the inverse of `M + damping * I` by the kernel.

    Use it for few gradients `K = V * N`: one factorisation serves every product. Not for more than
    a few thousand gradients.

    Law: exact.
    Cost: that of `gradient_kernel` and `K**3 / 3` operations; memory `K**2`.

    Raises:
        ValueError: If the damping is not positive, or lost in round-off.
    """
    return KernelInverse(M.U, _damped_kernel(M.U, damping), damping)


def same_batch_step(
    io: LayerIO, c: Float[Tensor, "V N"], damping: float
) -> Float[Tensor, "d_out d_in"]:
    r"""The step for the gradient `sum_{v,n} c[v, n] G[v, n]` of the same batch.

    It needs no division by the damping:
    $(U U^\top + \delta I)^{-1} U c = U (U^\top U + \delta I)^{-1} c$ with the kernel $U^\top U$.

    Raises:
        ValueError: As `kernel_inverse` and `gradient_kernel`.
    """
    y = torch.cholesky_solve(c.reshape(-1, 1), _damped_kernel(io, damping))
    return io.combination(y.reshape(c.shape))


def _damped_kernel(io: LayerIO, damping: float) -> Float[Tensor, "K K"]:
    if not damping > 0:
        raise ValueError(f"Solving by the kernel needs a positive damping, got {damping}.")
    K = gradient_kernel(io)
    L, failed = torch.linalg.cholesky_ex(K + damping * eye_like(K))
    if failed.any():
        raise ValueError(
            f"A damping of {damping:g} is lost in the round-off of a kernel with entries up to "
            f"{K.abs().max():.3g}: use a larger one, or inverse(damping)."
        )
    return L
