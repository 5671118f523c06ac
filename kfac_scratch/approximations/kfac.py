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

from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like, gram
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.one_hot import OneHot


def kfac(io: LayerIO) -> Kronecker | DiagonalKronecker:
    """KFAC: a layer's block as the product of an input factor `A` and a vector factor `B`.

    `A` is the mean of `a a^T` over samples and positions, `B` the sum of `g g^T` over all vectors.

    Use it as the default. Not for layers with very many inputs, and not where inputs and vectors
    vary together, which it drops: `ekfac` and `tkfac` keep some.

    Law: exact if there is one position, and `a a^T` or `sum_v g g^T` is the same for all samples.
    Units: `A` has those of the inputs, `B` those of the loss.
    Cost: `N * S * (d_in**2 + V * d_out**2)` operations, memory `d_in**2 + d_out**2`. For an
    embedding, whose rows are `OneHot`, `A` is diagonal and is kept so: `N * S` operations and
    memory `d_in` in place of `d_in**2`.
    """
    if not isinstance(io.a, OneHot):
        return kfac_in_full(io)
    return DiagonalKronecker(io.a.counts().div_(io.rows), gram(io.g.flatten(0, 1)))


def kfac_in_full(io: LayerIO) -> Kronecker:
    """`kfac` with both factors as full matrices, whatever the rows are.

    Use it where a method needs the factors as matrices. Not for the vocabulary of an embedding.

    Law: equal to `kfac`.
    Cost: that of `kfac` for rows that are not one-hot. The rows of an embedding are formed.
    """
    return Kronecker(gram(io.a).div_(io.rows), gram(io.g.flatten(0, 1)))


def kfac_reduce(io: LayerIO) -> Kronecker | DiagonalKronecker:
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
    factors = kfac(io)
    return replace(factors, B=eye_like(factors.B))
