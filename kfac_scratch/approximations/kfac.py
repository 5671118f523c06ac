r"""KFAC: average over inputs and over vectors separately.

The exact block of a layer is an average of products, KFAC is the product of averages,

$$
\sum_{v,n} \operatorname{vec}(g_{vn} a_n^\top) \operatorname{vec}(g_{vn} a_n^\top)^\top
\;\approx\;
\Bigl(\sum_{v,n} g_{vn} g_{vn}^\top\Bigr) \otimes \Bigl(\frac{1}{N} \sum_n a_n a_n^\top\Bigr)
= B \otimes A .
$$

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §3; with weight sharing, Eschenhagen et al.
2023 (arXiv:2311.00636): KFAC-expand is `kfac(io)`, KFAC-reduce is `kfac(io.reduced())`; input
factor only, Benzing 2022 (arXiv:2201.12250).
"""

from dataclasses import replace
from typing import overload

from torch.nn.functional import pad

from kfac_scratch.layer_io import LayerIO, TiedIO
from kfac_scratch.linalg import eye_like, gram
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.one_hot import OneHot


@overload
def kfac(io: TiedIO) -> KroneckerSum: ...  # type: ignore[overload-overlap]


@overload
def kfac(io: LayerIO) -> Kronecker | DiagonalKronecker: ...


def kfac(io: LayerIO) -> Kronecker | DiagonalKronecker | KroneckerSum:
    """KFAC: a layer's block as the product of an input factor `A` and a vector factor `B`.

    `A` is the mean of `a a^T` over samples and positions, `B` the sum of `g g^T` over all vectors.

    Use it as the default. Not for layers with very many inputs, and not where inputs and vectors
    vary together, which it drops: `ekfac` and `tkfac` keep some.

    A weight that an embedding shares with a linear layer gets the sum of two products, one for each
    use (see `tied_sum`).

    Law: exact if there is one position, and `a a^T` or `sum_v g g^T` is the same for all samples.
    Units: `A` has those of the inputs, `B` those of the loss.
    Cost: `N * S * (d_in**2 + V * d_out**2)` operations, memory `d_in**2 + d_out**2`. For an
    embedding, whose rows are `OneHot`, `A` is diagonal and is kept so: `N * S` operations and
    memory `d_in` in place of `d_in**2`.
    """
    return tied_sum(kfac(io.direct), kfac(io.turned)) if isinstance(io, TiedIO) else one_product(io)


def one_product(io: LayerIO) -> Kronecker | DiagonalKronecker:
    """`kfac` of layers with rows, which all but a `TiedIO` have.

    Use it where a method needs one product.

    Law: equal to `kfac`.
    Cost: that of `kfac`.
    """
    if not isinstance(io.a, OneHot):
        return kfac_in_full(io)
    return DiagonalKronecker(io.a.counts().div_(io.rows), gram(io.g.flatten(0, 1)))


def tied_sum(
    direct: Kronecker | DiagonalKronecker, turned: Kronecker | DiagonalKronecker
) -> KroneckerSum:
    """The sum of both products of a weight that is applied as `W` and as its transpose.

    The second one changes places: `W^T` maps words to vectors, so that its vectors' factor belongs
    to the columns of `W`, and its inputs' to the rows. What both uses have in common is left out.

    Use it for what `kfac` gives of both parts of a `TiedIO`. Its `inverse(damping)` runs conjugate
    gradients; `guarded_inverse` does not.

    Law: the block without the products of both sums, where KFAC is exact for each.
    Cost: memory `2 * (d_in**2 + d_out**2)`; the words' counts are a full matrix here.

    Args:
        direct: Of the linear layers, whose `W` it is.
        turned: Of the embeddings.
    """
    first, biases = Kronecker(direct.A, direct.B), len(direct.A) - len(turned.B)
    return KroneckerSum(first, Kronecker(pad(turned.B, (0, biases, 0, biases)), turned.A))


def kfac_in_full(io: LayerIO) -> Kronecker:
    """`kfac` with both factors as full matrices, whatever the rows are.

    Use it where a method needs the factors as matrices. Not for the vocabulary of an embedding.

    Law: equal to `kfac`.
    Cost: that of `kfac` for rows that are not one-hot. The rows of an embedding are formed.
    """
    return Kronecker(gram(io.a).div_(io.rows), gram(io.g.flatten(0, 1)))


def kfac_reduce(io: LayerIO) -> Kronecker | DiagonalKronecker | KroneckerSum:
    """KFAC-reduce: KFAC of the mean input and the summed vector over positions.

    Use it where one set of vectors serves both forms, and for the eigenvectors of `AmortisedEKFAC`.
    Not for a convolution by itself: `kfac` with `flavour=REDUCE` gives the same without its rows.

    Law: exact if all positions of a sample receive the same vector, or have the same input, and
    KFAC is exact for the mean input and the summed vector.
    Cost: that of `kfac` with one position.
    Source: Eschenhagen et al. 2023 (arXiv:2311.00636), eq. 22.
    """
    return kfac(io.reduced())


def foof(io: LayerIO) -> Kronecker | DiagonalKronecker:
    """FOOF: the input factor alone, `I ⊗ A`.

    Use it to see how much of KFAC's effect comes from the inputs, which is its paper's question.
    Not as curvature: nothing of the loss is in it.

    Units: those of squared inputs, so that the damping does not scale with the loss.
    Cost: that of `kfac`, from which it takes `A`. `B` is only needed for its size.
    Source: Benzing 2022 (arXiv:2201.12250), §5.
    """
    found = one_product(io)
    return replace(found, B=eye_like(found.B))
