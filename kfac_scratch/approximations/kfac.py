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

from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like, gram
from kfac_scratch.matrices.kronecker import Kronecker


def kfac(io: LayerIO) -> Kronecker:
    """Approximate a layer's block by its input factor and its vector factor.

    `A` is the mean of `a a^T` over data and positions, `B` the sum of `g g^T` over all vectors.
    Law: exact if `a a^T` or `sum_v g g^T` is the same for all data and there is one position.
    """
    N, S, _ = io.a.shape
    return Kronecker(gram(io.a).div_(N * S), gram(io.g.flatten(0, 1)))


def foof(io: LayerIO) -> Kronecker:
    """Keep only the input factor: `I ⊗ A`.

    Source: Benzing 2022 (arXiv:2201.12250), §5, where it is called FOOF.
    """
    factors = kfac(io)
    return Kronecker(factors.A, eye_like(factors.B))
