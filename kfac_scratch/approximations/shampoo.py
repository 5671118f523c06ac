r"""Shampoo: the roots of both partial traces.

Shampoo keeps two sums over gradients, the partial traces $A = \sum_k G_k^\top G_k$ and
$B = \sum_k G_k G_k^\top$ of the block $F$ (see `tkfac`; the paper calls them $R$ and $L$). If no
gradient has a rank above $r$,

$$
F \preceq r \, B^{1/2} \otimes A^{1/2} ,
\qquad \text{and the step is} \quad
(B^{1/2} \otimes A^{1/2})^{-1/2} \operatorname{vec}(G) = \operatorname{vec}(B^{-1/4} G A^{-1/4}) .
$$

Three matrices go by this name. The bound is `shampoo_bound`. Its square, divided by the trace, is
`tkfac`, the first step of the iteration that `kpsvd` runs to its end. One side alone is
`one_sided`. As published, all are of gradients of batches: `OfBatch(shampoo_bound)`.

Sources: Gupta, Koren and Singer 2018 (arXiv:1802.09568); Morwani et al. 2025 (arXiv:2406.17748),
for the square; An et al. 2025 (arXiv:2503.20762), for one side.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.roots import inverse_root


@dataclass(frozen=True, eq=False)
class ShampooBound:
    """`B^1/2 ⊗ A^1/2`, stored as the partial traces `A` and `B` of a block.

    The roots are taken when the matrix is used, because those of a mean are no means of roots:
    `MovingAverage(shampoo_bound)` is the bound of the averaged block. In directions that a factor
    lacks, half of the digits are lost: round-off of `eps` becomes its root.

    Use it as `shampoo_bound` makes it, and `MovingAverage` averages it. Not for many products:
    every use decomposes both factors, and `eigen()` does so once for all.

    Cost: memory `d_in**2 + d_out**2`; every use two eigendecompositions, `O(d_in**3 + d_out**3)`.
    """

    A: Float[Tensor, "d_in d_in"]
    B: Float[Tensor, "d_out d_out"]

    def eigen(self) -> KroneckerEigen:
        """The same matrix by the eigendecompositions of both factors."""
        return Kronecker(self.A, self.B).sqrt()

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B^1/2 V A^1/2`."""
        return self.eigen() @ V

    def inverse(self, damping: float) -> KroneckerEigen:
        """The inverse of `M + damping * I`, exact, in the eigenbasis of both factors.

        Raises:
            ValueError: If the damping is negative, or 0 for a singular matrix.
        """
        if damping == 0:  # the null space of the factors is told from round-off before their roots
            return Kronecker(self.A, self.B).inverse_sqrt(damping)
        return self.eigen().inverse(damping)

    def mixed(self, new: "ShampooBound", weight: float) -> "ShampooBound":
        """The bound of the averaged block, in which the new one has the share `weight`."""
        return ShampooBound(torch.lerp(self.A, new.A, weight), torch.lerp(self.B, new.B, weight))

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.eigen().dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues."""
        return self.eigen().trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.eigen().diagonal()


def shampoo_bound(io: LayerIO) -> ShampooBound:
    """Shampoo's matrix `B^1/2 ⊗ A^1/2`, an upper bound on the block up to a factor.

    Use it where too large a matrix does less harm than too small a one, with `invert=inverse_root`,
    or with `shampoo_inverse` for the damping of the paper. Not as an estimate of the block: in the
    size of its eigenvalues it is the root of one, so that it is not exact even where the block is a
    Kronecker product, where `tkfac` is.

    Law: `r` times it exceeds the block by a positive semi-definite matrix, where `r` is the largest
    rank of a gradient: at most `S`, `d_in` and `d_out`. `r` is needed. TKFAC is no such bound.
    Cost: that of `tkfac`.

    Raises:
        ValueError: As `tkfac`.
    """
    M = tkfac(io)
    return ShampooBound(M.A, M.B)


def shampoo_inverse(M: ShampooBound, damping: float) -> Kronecker:
    """The map of Shampoo's step, `(B + damping * I)^-1/4 ⊗ (A + damping * I)^-1/4`.

    Use it as `invert=` with `shampoo_bound`, to damp both partial traces as the paper does. Not as
    a root of `M + damping * I`: that is `inverse_root`.

    Law: four products with it undo one with `(B + damping * I) ⊗ (A + damping * I)`.
    Units: the damping has those of the partial traces, which are the block's.
    Cost: two eigendecompositions, `O(d_in**3 + d_out**3)`; memory `d_in**2 + d_out**2`.

    Raises:
        TypeError: If the matrix is another than `shampoo_bound` makes.
        ValueError: If the damping is negative, or 0 for a singular factor.
    """
    if not isinstance(M, ShampooBound):
        raise TypeError(
            f"shampoo_inverse takes roots of two partial traces, which a {type(M).__name__} has "
            "not: pass approximation=shampoo_bound, or invert=inverse_root."
        )
    A, B = (inverse_root(Dense(factor), damping, p=4).dense() for factor in (M.A, M.B))
    return Kronecker(A, B)


def one_sided(io: LayerIO) -> Kronecker:
    """`I ⊗ A` with the partial trace `A` over outputs: Shampoo on the side of the inputs alone.

    Use it where `d_out` is too large for a factor, with `invert=inverse_root`. Not for layers with
    very many inputs. It is `foof` with every sample's input weighted by the square of its vector,
    so that the loss is in it.

    Law: `r` times it exceeds the block by a positive semi-definite matrix, as with `shampoo_bound`.
    Cost: that of `tkfac`; an inverse decomposes the identity, too.

    Raises:
        ValueError: As `tkfac`.
    """
    M = tkfac(io)
    return Kronecker(M.A, eye_like(M.B))
