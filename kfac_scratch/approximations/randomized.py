r"""RS-KFAC and SRE-KFAC: the leading eigenpairs of KFAC's factors, from a few products with each.

The moving average of a factor has a spectrum that decays. Instead of all $d$ eigenpairs, in
$\mathcal{O}(d^3)$, a few are found in $\mathcal{O}(d^2 q)$ from an orthonormal basis $Q$ of
$q \ll d$ columns that holds most of the range of the factor $M$. Three things to make of it:

- `rsvd`, the right singular vectors of $Q^\top M$: an eigendecomposition of
  $(M Q Q^\top M)^{1/2} \preceq M$;
- `srevd`, the Ritz pairs: an eigendecomposition of $Q Q^\top M Q Q^\top$;
- `nystrom`, not in the paper: one of $M Q (Q^\top M Q)^{-1} Q^\top M \preceq M$.

For one basis, eigenvalue by eigenvalue, `srevd` $\le$ `rsvd` $\le$ `nystrom` $\le$ those of $M$.
All that is left out is replaced by one number, the tail.

Sources: Puiu 2022 (arXiv:2206.15397); Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), §4 and
§5; for `nystrom`, Tropp, Yurtsever, Udell and Cevher 2017 (arXiv:1706.05736).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.border import check_count
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import psd_eigh
from kfac_scratch.matrices.low_rank import FourBlocks, LowRankKronecker

Eigenpairs = tuple[Float[Tensor, "r"], Float[Tensor, "d r"]]  # eigenvalues descending
Decomposition = Callable[[Float[Tensor, "d d"], Float[Tensor, "d q"]], Eigenpairs]
Tail = Callable[[Float[Tensor, "r"], Float[Tensor, ""], int], Float[Tensor, ""]]


@dataclass(frozen=True)
class Sketch:
    """How much of a factor is looked at.

    Attributes:
        rank: Eigenpairs that are kept.
        oversampling: Further columns of the basis, for the sake of those that are kept.
        iterations: Products with the factor between the first one and the decomposition.
        seed: Of the random start: the same factor and seed give the same result on a device.
    """

    rank: int = 64
    oversampling: int = 10
    iterations: int = 2
    seed: int = 0


# ---- a factor's leading eigenpairs --------------------------------------------------------------


def range_basis(M: Float[Tensor, "d d"], sketch: Sketch) -> Float[Tensor, "d q"]:
    """An orthonormal basis that holds most of the range of a PSD matrix.

    Every product is followed by a QR decomposition: powers of `M` without it lose all directions
    that are smaller than the largest by more than the precision.
    """
    generator = torch.Generator(M.device).manual_seed(sketch.seed)
    q = min(sketch.rank + sketch.oversampling, len(M))
    start = torch.randn(len(M), q, generator=generator, dtype=M.dtype, device=M.device)
    Q = torch.linalg.qr(M @ start).Q
    for _ in range(sketch.iterations):
        Q = torch.linalg.qr(M @ Q).Q
    return Q


def rsvd(M: Float[Tensor, "d d"], Q: Float[Tensor, "d q"]) -> Eigenpairs:
    """Singular values and right singular vectors of `Q.T @ M`."""
    _, s, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return s, Vh.mT


def srevd(M: Float[Tensor, "d d"], Q: Float[Tensor, "d q"]) -> Eigenpairs:
    """Ritz pairs: eigenpairs of `Q.T @ M @ Q`, mapped back by `Q`."""
    d, W = psd_eigh(Q.mT @ M @ Q)
    return d.flip(0), (Q @ W).flip(1)


def nystrom(M: Float[Tensor, "d d"], Q: Float[Tensor, "d q"]) -> Eigenpairs:
    """Eigenpairs of the largest matrix below `M` with the range of `M @ Q`."""
    Y = M @ Q
    t, W = psd_eigh(Q.mT @ Y)
    inverse_root = torch.where(t > 0, t.rsqrt(), 0.0)  # a pseudo-inverse: M may be singular
    _, s, Vh = torch.linalg.svd((Y @ W * inverse_root).mT, full_matrices=False)
    return s.square(), Vh.mT


def leading(
    M: Float[Tensor, "d d"], sketch: Sketch, decomposition: Decomposition = rsvd
) -> Eigenpairs:
    """The leading eigenpairs of a PSD matrix, at most `sketch.rank` of them.

    Where the basis would have as many columns as rows, of the exact decomposition.
    """
    if len(M) <= sketch.rank + sketch.oversampling:
        d, U = (t.flip(-1) for t in psd_eigh(M))
    else:
        d, U = decomposition(M, range_basis(M, sketch))
    return d[: sketch.rank], U[:, : sketch.rank]


# ---- one number for the rest --------------------------------------------------------------------


def trace_matched(d: Float[Tensor, "r"], trace: Float[Tensor, ""], size: int) -> Float[Tensor, ""]:
    """The mean of the `size - r` eigenvalues that are left out: the trace is exact."""
    return (trace - d.sum()).clamp(min=0) / max(size - len(d), 1)


def smallest_kept(d: Float[Tensor, "r"], trace: Float[Tensor, ""], size: int) -> Float[Tensor, ""]:
    """The spectrum continued as it ended: more than is left out, so that steps are shorter."""
    return d[-1]


def zero_tail(d: Float[Tensor, "r"], trace: Float[Tensor, ""], size: int) -> Float[Tensor, ""]:
    """Zero: less than is left out, so that steps are longer."""
    return torch.zeros_like(trace)


# ---- RS-KFAC ------------------------------------------------------------------------------------


def randomized(
    rank: int = 64, *, oversampling: int = 10, iterations: int = 2, seed: int = 0
) -> Callable[[LayerIO], "Randomized"]:
    """RS-KFAC: KFAC whose factors are known by `rank` eigenpairs and a tail.

    Raises:
        ValueError: If the rank is below 1, or one of the others below 0.
    """
    check_count("rank", rank)
    check_count("oversampling", oversampling, 0)
    check_count("iterations", iterations, 0)
    sketch = Sketch(rank, oversampling, iterations, seed)

    def of(io: LayerIO) -> Randomized:
        factors = kfac(io)
        return Randomized(factors.A, factors.B, sketch)

    return of


@dataclass(frozen=True, eq=False)
class Randomized:
    """KFAC's factors, known by their leading eigenpairs: the matrix `low_rank()`.

    It is the factors that are averaged over batches. Products, inverse and dense twin are those of
    `low_rank()`, and each costs a decomposition: keep an inverse and use it many times. Where the
    rank reaches both sizes, the matrix is `B ⊗ A`.
    """

    A: Float[Tensor, "d_in d_in"]
    B: Float[Tensor, "d_out d_out"]
    sketch: Sketch

    def low_rank(
        self, decomposition: Decomposition = rsvd, tail: Tail = trace_matched
    ) -> LowRankKronecker:
        """Both factors by leading eigenpairs and a tail. SRE-KFAC inverts `low_rank(srevd)`."""
        (dA, UA), (dB, UB) = (leading(M, self.sketch, decomposition) for M in (self.A, self.B))
        return LowRankKronecker(
            *(UA, dA, tail(dA, self.A.trace(), len(UA))),
            *(UB, dB, tail(dB, self.B.trace(), len(UB))),
        )

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`low_rank() @ V`."""
        return self.low_rank() @ V

    def inverse(self, damping: float) -> FourBlocks:
        """The inverse of `low_rank() + damping * I`, exact."""
        return self.low_rank().inverse(damping)

    def mixed(self, new: "Randomized", weight: float) -> "Randomized":
        """Averages of both factors, in which the new ones have the weight."""
        A, B = torch.lerp(self.A, new.A, weight), torch.lerp(self.B, new.B, weight)
        return Randomized(A, B, self.sketch)

    def dense(self) -> Float[Tensor, "D D"]:
        """The dense twin of `low_rank()`."""
        return self.low_rank().dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues, which is that of `B ⊗ A`."""
        return self.B.trace() * self.A.trace()
