r"""TKFAC: a Kronecker product with the exact block's trace.

Sum the exact block $F$ over the outputs, or over the inputs. These are its two partial traces,

$$
A_{ij} = \sum_o F_{(o,i),(o,j)} , \quad A = \sum_{v,n} G_{vn}^\top G_{vn} ,
\qquad
B_{op} = \sum_i F_{(o,i),(p,i)} , \quad B = \sum_{v,n} G_{vn} G_{vn}^\top ,
$$

and both have the trace of $F$. TKFAC is the Kronecker product with the same two partial traces,
$B \otimes A / \operatorname{tr} A$. With one position, $A = \sum_n \|g_n\|^2 a_n a_n^\top$ and
$B = \sum_n \|a_n\|^2 g_n g_n^\top$, where KFAC has no weights.

Source: Gao et al. 2021 (arXiv:2011.10741), where $A$ and $B$ are $\delta \Phi$ and $\delta \Psi$
with $\delta$ the trace. Their usual damping is `even_traces_inverse`. They have another one for
convolutional networks, which chapter 15 is about. For convolutions they take positions as
uncorrelated, as notes on the paper say; here the products of all positions are kept.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.layer_io import LayerIO, check_not_reduced
from kfac_scratch.linalg import gram
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.rearranged import gradients_in_parts


@dataclass(frozen=True, eq=False)
class PartialTraces:
    """`B ⊗ A / tr A`, the product with the partial traces `A` and `B` of a block.

    `A` and `B` are not divided by their trace, because the partial traces of a mean of blocks are
    the means of theirs: `MovingAverage(tkfac)` is TKFAC of the averaged block. Law: `tr A == tr B`.
    Cost: as a `Kronecker`.
    """

    A: Float[Tensor, "d_in d_in"]
    B: Float[Tensor, "d_out d_out"]

    def kronecker(self) -> Kronecker:
        """The same matrix as a product of two factors, the first of trace one (or zero)."""
        trace = self.trace()
        A = self.A / trace.where(trace > 0, 1.0)
        return Kronecker(A, self.B)

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`B V A / tr A`."""
        return self.kronecker() @ V

    def inverse(self, damping: float) -> KroneckerEigen:
        """The inverse of `M + damping * I`, exact, in the eigenbasis of both factors."""
        return self.kronecker().inverse(damping)

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A` and of `B`."""
        return self.kronecker().mean_eigenvalues()

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of `A / tr A` and of `B`."""
        return self.kronecker().largest_eigenvalues()

    def inverse_of_damped_factors(self, damping_A: float, damping_B: float) -> Kronecker:
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`."""
        return self.kronecker().inverse_of_damped_factors(damping_A, damping_B)

    def mixed(self, new: "PartialTraces", weight: float) -> "PartialTraces":
        """The matrix of the averaged block, in which the new one has the share `weight`."""
        return PartialTraces(torch.lerp(self.A, new.A, weight), torch.lerp(self.B, new.B, weight))

    def eigen(self) -> KroneckerEigen:
        """The same matrix by the eigendecompositions of both factors."""
        return self.kronecker().eigen()

    def dense(self) -> Float[Tensor, "D D"]:
        """The whole matrix."""
        return self.kronecker().dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues: that of the block."""
        return self.A.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries in the order of `vec(V)`."""
        return self.kronecker().diagonal()


def tkfac(io: LayerIO) -> PartialTraces:
    """TKFAC: the Kronecker product with the partial traces, and so the trace, of the exact block.

    Use it where the sizes of `a` and `g` vary together, which KFAC ignores: it weights each side by
    the size of the other. Not as a bound: it is usually nearer to the block than KFAC, but need not
    be.

    Law: exact if `a a^T` or `sum_v g g^T` is the same for all samples and there is one position, as
    KFAC is; and if all `a` and all `g` are multiples of one vector each.
    Cost: with one position, that of `kfac`; with several,
    `V * N * d_in * d_out * (S + d_in + d_out)` operations, by parts of the gradients with `2**22`
    entries. Memory `d_in**2 + d_out**2`.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """
    check_not_reduced(io, "TKFAC")
    if io.a.shape[1] == 1:
        return _weighted_factors(io)
    A = io.a.new_zeros(io.a.shape[-1], io.a.shape[-1])
    B = io.g.new_zeros(io.g.shape[-1], io.g.shape[-1])
    for G in gradients_in_parts(io):
        A += gram(G)
        B += gram(G.mT)
    return PartialTraces(A, B)


def even_traces_inverse(M: PartialTraces, damping: float) -> Kronecker:
    r"""TKFAC's usual damping: both factors get the same trace, and then `sqrt(damping)` each.

    It inverts $(\sqrt\delta\, \Psi + \sqrt\lambda I) \otimes (\sqrt\delta\, \Phi + \sqrt\lambda I)$
    with the damping $\lambda$, the trace $\delta$, and $\Phi$ and $\Psi$ of trace one.

    Use it as `invert=` of an optimizer to reproduce the paper. Not for a layer that is far from
    square: `factored_inverse` balances mean eigenvalues in place of traces, and adds less.

    Law: for square layers it is `factored_inverse`.
    Cost: two Cholesky factorisations, `O(d_in**3 + d_out**3)`.
    Source: Gao et al. 2021, by a public summary of it:
    https://github.com/junaidaliop/zij/blob/74a271e44cd8b7d1d855bd90a879c4449e359033/docs/math/tkfac.md#L7

    Raises:
        ValueError: If the damping is not positive, or a damped factor not positive definite.
    """
    if not damping > 0:
        raise ValueError(f"Damping both factors needs a positive damping, got {damping}.")
    size, root = float(M.trace()) ** 0.5 or 1.0, damping**0.5
    return M.inverse_of_damped_factors(root / size, root * size)


def _weighted_factors(io: LayerIO) -> PartialTraces:
    """One position: `g a^T` has the partial traces `|g|^2 a a^T` and `|a|^2 g g^T`."""
    size_a = io.a.square().sum(-1, keepdim=True)
    size_g = io.g.square().sum((0, -1)).unsqueeze(-1)
    A = gram(io.a * size_g.sqrt())  # sizes: [N, 1, 1]
    B = gram((io.g * size_a.sqrt()).flatten(0, 1))
    return PartialTraces(A, B)
