r"""The rearranged block: a matrix in which Kronecker products have rank one.

Move the entries of a layer's exact block $F$ such that every Kronecker product becomes an outer
product, $\mathcal{R}(B \otimes A) = \operatorname{vec}(B) \operatorname{vec}(A)^\top$. Singular
pairs of $R = \mathcal{R}(F)$ are then Kronecker products near $F$. With the gradients $G_{vn}$ of
the layer, $F$ is the sum of $\operatorname{vec}(G_{vn}) \operatorname{vec}(G_{vn})^\top$ and $R$
that of $G_{vn} \otimes G_{vn}$, with $d_\text{out}^2$ rows and $d_\text{in}^2$ columns. It is never
formed, since

$$
R \operatorname{vec}(X) = \operatorname{vec} \Bigl( \sum_{v,n} G_{vn} X G_{vn}^\top \Bigr) ,
\qquad
R^\top \operatorname{vec}(Y) = \operatorname{vec} \Bigl( \sum_{v,n} G_{vn}^\top Y G_{vn} \Bigr) .
$$

Both map symmetric matrices to symmetric ones, and positive semi-definite ones to positive
semi-definite ones. This module works with symmetric matrices only: with weight sharing, $R$ also
has singular pairs of antisymmetric matrices, which are of no use as factors.

Sources: Van Loan and Pitsianis 1993; Golub and Van Loan, Matrix Computations, §10.4 (Lanczos).
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.layer_io import LayerIO, check_not_reduced
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.kronecker import Kronecker


@dataclass(frozen=True, eq=False)
class Rearranged:
    """The rearranged block of a layer, plus `vec(B) vec(A)^T` for some further products `B ⊗ A`.

    Cost: memory is that of `io`. A product with `R` or its transpose costs
    `N * d_in**2 + V * N * d_out**2` operations with one position, as much as KFAC's factors, and
    `V * N * d_in * d_out * (S + d_in + d_out)` with several, where gradients are formed in parts.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """

    io: LayerIO
    plus: tuple[Kronecker, ...] = ()

    def __post_init__(self) -> None:
        check_not_reduced(self.io, "KPSVD")

    def to_outputs(self, X: Float[Tensor, "d_in d_in"]) -> Float[Tensor, "d_out d_out"]:
        """`R vec(X)` as a matrix: the sum of `G X G^T` over all gradients, for symmetric `X`."""
        a, g = self.io.a, self.io.g
        Y = g.new_zeros(g.shape[-1], g.shape[-1])
        if a.shape[1] == 1:  # a number for every sample, a^T X a, is the weight of g g^T
            weights = ((a @ X) * a).sum(-1, keepdim=True)  # [N, 1, 1]
            Y += (g * weights).flatten(0, 2).T @ g.flatten(0, 2)
        else:
            for G in gradients_in_parts(self.io):
                Y += torch.einsum("koi,kpi->op", G @ X, G)
        for K in self.plus:
            Y += K.B * (K.A * X).sum()
        return (Y + Y.T) / 2

    def to_inputs(self, Y: Float[Tensor, "d_out d_out"]) -> Float[Tensor, "d_in d_in"]:
        """`R^T vec(Y)` as a matrix: the sum of `G^T Y G` over all gradients, for symmetric `Y`."""
        a, g = self.io.a, self.io.g
        X = a.new_zeros(a.shape[-1], a.shape[-1])
        if a.shape[1] == 1:
            weights = ((g @ Y) * g).sum((0, -1)).unsqueeze(-1)  # [N, 1, 1]
            X += (a * weights).flatten(0, 1).T @ a.flatten(0, 1)
        else:
            for G in gradients_in_parts(self.io):
                X += torch.einsum("koi,koj->ij", Y @ G, G)
        for K in self.plus:
            X += K.A * (K.B * Y).sum()
        return (X + X.T) / 2

    def minus(self, K: Kronecker) -> "Rearranged":
        """The difference to a product: deflation."""
        return Rearranged(self.io, (*self.plus, Kronecker(-K.A, K.B)))

    def identity(self) -> Float[Tensor, "d_out d_out"]:
        """The start for the top pair: the identity, to which that pair is not orthogonal."""
        return eye_like(self.io.g.new_empty(2 * self.io.g.shape[-1:]))

    def generic(self) -> Float[Tensor, "d_out d_out"]:
        """The start for other pairs: the identity plus a fixed random symmetric matrix.

        The random numbers are drawn on the CPU with seed 0 at every call, so that results are the
        same on every device and in every run.
        """
        eye, generator = self.identity(), torch.Generator("cpu").manual_seed(0)
        noise = torch.randn(*eye.shape, generator=generator, device="cpu", dtype=eye.dtype)
        return eye + 0.1 * (noise + noise.T).to(eye)


def gradients_in_parts(
    io: LayerIO, entries: int = 2**22
) -> Iterator[Float[Tensor, "K d_out d_in"]]:
    """All gradients in parts of at most `entries` entries, or of one matrix if that has more."""
    size = max(1, entries // (io.g.shape[-1] * io.a.shape[-1]))
    for g in io.g:
        for a_part, g_part in zip(io.a.split(size), g.split(size), strict=True):
            yield g_part.mT @ a_part


def power_svd(
    R: Rearranged,
    Y: Float[Tensor, "d_out d_out"],
    tolerance: float = 1e-6,
    iterations: int | None = None,
) -> Kronecker:
    """The top singular pair of `R` by power iteration, as the Kronecker product of its matrices.

    Law: both factors have the same norm, the root of the singular value. At every iteration each
    is the best one for the other, so that the error never rises. From a positive semi-definite `Y`,
    and without negative terms in `R`, both are positive semi-definite.

    Args:
        R: The rearranged block.
        Y: The start on the side of the outputs: symmetric, not orthogonal to the pair.
        tolerance: The residual at which to stop, as a fraction of the largest singular value known
            (but not below 100 times the precision). The error of the singular value is of the order
            of its square.
        iterations: The number of iterations after which to stop in any case, without a warning.
            Default: 1000, with a warning. Each costs two products with `R` (see `Rearranged`), and
            contracts the error by the squared ratio of the second to the first singular value.

    Warns:
        UserWarning: If the residual is still above the tolerance after the default number of
            iterations, which happens where two singular values are nearly equal. The pair is then a
            mixture of both; `lanczos_svd` separates them.
    """
    tolerance = max(tolerance, 100 * torch.finfo(Y.dtype).eps)
    known = max((float(K.A.norm() * K.B.norm()) for K in R.plus), default=0.0)
    X = R.to_inputs(Y)
    for _ in range(1000 if iterations is None else iterations):
        X = _unit(X)
        Y = R.to_outputs(X)
        sigma, Y = Y.norm(), _unit(Y)
        X, old = R.to_inputs(Y), X
        if (X - sigma * old).norm() <= tolerance * max(float(sigma), known):
            break
    else:
        if iterations is None:
            warnings.warn(
                "Power iteration stopped after 1000 iterations with a residual above "
                f"{tolerance:.3g}, as happens if two singular values are nearly equal: use a "
                "larger tolerance, or lanczos(io, steps), which separates them.",
                stacklevel=2,
            )
    return _pair(X.norm(), _unit(X), Y)


def lanczos_svd(R: Rearranged, Y: Float[Tensor, "d_out d_out"], steps: int = 12) -> list[Kronecker]:
    """As many singular pairs of `R` as steps, the top ones first and most accurate.

    Golub-Kahan-Lanczos with full re-orthogonalisation. If there are fewer pairs, others are zero.
    The number of steps is fixed: nothing checks whether the pairs have converged.
    Cost: two products with `R` for each step, memory `steps * (d_in**2 + d_out**2)`.

    Builds orthonormal `Xs` and `Ys` with `R Xs = Ys L`, `L` lower bidiagonal, from one product with
    `R` and one with its transpose for each step, and takes the singular pairs of the small `L`.
    """
    Xs: list[Tensor] = []
    Ys, L = [_unit(Y)], Y.new_zeros(steps + 1, steps)
    for k in range(steps):
        L[k, k], X = _orthogonalised(R.to_inputs(Ys[k]), Xs, L.norm())
        L[k + 1, k], Y = _orthogonalised(R.to_outputs(X), Ys, L.norm())
        Xs.append(X)
        Ys.append(Y)
    U, sigma, Vh = torch.linalg.svd(L)
    X, Y = torch.stack(Xs), torch.stack(Ys)
    return [
        _pair(sigma[k], torch.tensordot(Vh[k], X, 1), torch.tensordot(U[:, k], Y, 1))
        for k in range(steps)
    ]


def _pair(sigma: Tensor, X: Tensor, Y: Tensor) -> Kronecker:
    """`sigma Y ⊗ X` with factors of one norm; of the two signs, the one with `tr X >= 0`."""
    root = torch.where(X.trace() < 0, -sigma.sqrt(), sigma.sqrt())
    return Kronecker(root * X, root * Y)


def _unit(X: Tensor) -> Tensor:
    """Divide by the norm; zero stays zero."""
    norm = X.norm()
    return X / norm.where(norm > 0, 1.0)


def _orthogonalised(X: Tensor, basis: Sequence[Tensor], scale: Tensor) -> tuple[Tensor, Tensor]:
    """The norm and the direction of the part of `X` orthogonal to an orthonormal basis.

    The projection is subtracted twice, because of round-off. A part below `100 * eps` times `scale`
    is round-off: its direction must not enter the basis, so it is set to zero.
    """
    x = X.flatten()
    for _ in range(2 if basis else 0):
        Q = torch.stack(list(basis)).flatten(1)
        x = x - Q.T @ (Q @ x)
    small = x.norm() <= 100 * torch.finfo(x.dtype).eps * scale
    x = x.where(~small, 0.0)
    return x.norm(), _unit(x).reshape(X.shape)
