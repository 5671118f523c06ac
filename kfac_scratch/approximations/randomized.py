r"""RS-KFAC and SRE-KFAC: the leading eigenpairs of KFAC's factors, from a few products with each.

The moving average of a factor has a spectrum that decays. Instead of all $d$ eigenpairs, in
$\mathcal{O}(d^3)$, a few are found in $\mathcal{O}(d^2 q)$ from an orthonormal basis $Q$ of
$q \ll d$ columns that holds most of the range of the factor $M$. There are three ways to use it:

- `rsvd`, the right singular vectors of $Q^\top M$: an eigendecomposition of
  $(M Q Q^\top M)^{1/2} \preceq M$;
- `srevd`, the Ritz pairs: an eigendecomposition of $Q Q^\top M Q Q^\top$;
- `nystrom`, not in the paper: one of $M Q (Q^\top M Q)^{-1} Q^\top M \preceq M$.

For one basis, eigenvalue by eigenvalue, `srevd` $\le$ `rsvd` $\le$ `nystrom` $\le$ those of $M$.
One number, the tail, stands for all other eigenvalues.

Sources: Puiu 2022 (arXiv:2206.15397); Halko, Martinsson and Tropp 2011 (arXiv:0909.4061), §4 and
§5; for `nystrom`, Tropp, Yurtsever, Udell and Cevher 2017 (arXiv:1706.05736).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.kfac import kfac_in_full
from kfac_scratch.border import check_count, check_function
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import psd_eigh, told_from_zero
from kfac_scratch.matrices.damping import default_inverse
from kfac_scratch.matrices.low_rank import FourBlocks, LowRankKronecker
from kfac_scratch.matrices.matrix import LinearMap, Matrix

Eigenpairs = tuple[Float[Tensor, " r"], Float[Tensor, "d r"]]  # eigenvalues descending
Decomposition = Callable[[Float[Tensor, "d d"], Float[Tensor, "d q"]], Eigenpairs]
Tail = Callable[[Float[Tensor, " r"], Float[Tensor, ""], int], Float[Tensor, ""]]


@dataclass(frozen=True)
class Sketch:
    """The sizes of a randomised decomposition, and the seed of its random start.

    Use larger numbers of iterations for spectra that decay slowly. Not with a rank near the width:
    a factor with `rank + oversampling` rows or fewer is decomposed in full.

    Cost: with `q = rank + oversampling`, `d**2 * q * (iterations + 2) + d * q**2` operations for a
    factor of size `d`.

    Attributes:
        rank: The number of eigenpairs that are kept.
        oversampling: The number of further columns of the basis, which make the kept pairs more
            accurate.
        iterations: The number of products with the factor between the first one and the
            decomposition.
        seed: The seed of the random start, which is the same for every layer and every call: the
            same factor and seed give the same result on a device.
    """

    rank: int = 64
    oversampling: int = 10
    iterations: int = 2
    seed: int = 0


# ---- a factor's leading eigenpairs --------------------------------------------------------------


def range_basis(M: Float[Tensor, "d d"], sketch: Sketch) -> Float[Tensor, "d q"]:
    """An orthonormal basis that holds most of the range of a PSD matrix.

    Every product is followed by a QR decomposition. Without it, powers of `M` lose all directions
    whose eigenvalues are below the precision times the largest one.
    """
    generator = torch.Generator(M.device).manual_seed(sketch.seed)
    q = min(sketch.rank + sketch.oversampling, len(M))
    start = torch.randn(len(M), q, generator=generator, dtype=M.dtype, device=M.device)
    Q = torch.linalg.qr(M @ start).Q
    for _ in range(sketch.iterations):
        Q = torch.linalg.qr(M @ Q).Q
    return Q


def rsvd(M: Float[Tensor, "d d"], Q: Float[Tensor, "d q"]) -> Eigenpairs:
    """RS-KFAC's eigenpairs of a factor: singular values and right singular vectors of `Q.T @ M`.

    Use it as the default. Not where every operation counts: `srevd` decomposes a smaller matrix.

    Law: the matrix with these eigenpairs is below `M`.
    Cost: `O(d**2 * q + d * q**2)` operations.
    """
    _, s, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    return s, Vh.mT


def srevd(M: Float[Tensor, "d d"], Q: Float[Tensor, "d q"]) -> Eigenpairs:
    """SRE-KFAC's eigenpairs of a factor: those of `Q.T @ M @ Q`, mapped back by `Q` (Ritz pairs).

    Use it where the decomposition dominates the cost. Not without iterations: its eigenvalues are
    the least accurate of the three.

    Law: each eigenvalue is at most that of `M`; the matrix with these eigenpairs need not be below
    `M`.
    Cost: `O(d**2 * q + q**3)` operations.
    """
    d, W = psd_eigh(Q.mT @ M @ Q, M.diagonal().amax())
    return d.flip(0), (Q @ W).flip(1)


def nystrom(M: Float[Tensor, "d d"], Q: Float[Tensor, "d q"]) -> Eigenpairs:
    """Nyström's eigenpairs of a factor: of the largest matrix below `M` in the range of `M @ Q`.

    Use it for the most accurate eigenvalues from one basis. Not to reproduce the paper, which does
    not have it.

    Law: the matrix with these eigenpairs is below `M`.
    Cost: `O(d**2 * q + d * q**2)` operations.
    """
    Y = M @ Q
    t, W = psd_eigh(Q.mT @ Y, M.diagonal().amax())
    t = told_from_zero(t)
    inverse_root = torch.where(t > 0, t.rsqrt(), 0.0)  # a pseudo-inverse: M may be singular
    _, s, Vh = torch.linalg.svd((Y @ W * inverse_root).mT, full_matrices=False)
    return s.square(), Vh.mT


def leading(
    M: Float[Tensor, "d d"], sketch: Sketch, decomposition: Decomposition = rsvd
) -> Eigenpairs:
    """The leading eigenpairs of a PSD matrix, at most `sketch.rank` of them.

    A matrix with `rank + oversampling` rows or fewer is decomposed in full.
    """
    if len(M) <= sketch.rank + sketch.oversampling:
        d, U = (t.flip(-1) for t in psd_eigh(M))
    else:
        d, U = decomposition(M, range_basis(M, sketch))
    return d[: sketch.rank], U[:, : sketch.rank]


# ---- the tail: one number for all other eigenvalues ---------------------------------------------


def trace_matched(d: Float[Tensor, " r"], trace: Float[Tensor, ""], size: int) -> Float[Tensor, ""]:
    """The tail that keeps the trace: the mean of the `size - r` eigenvalues that are left out.

    Use it as the default. Not to reproduce the paper's code, which has one of the other two.

    Law: the trace of the factor is exact. Cost: none beside the trace.
    """
    return (trace - d.sum()).clamp(min=0) / max(size - len(d), 1)


def smallest_kept(d: Float[Tensor, " r"], trace: Float[Tensor, ""], size: int) -> Float[Tensor, ""]:
    """The tail that continues the spectrum: the smallest eigenvalue that was kept.

    Use it for cautious steps. Not in `Brand`, where the excess adds up from batch to batch.

    Law: with exact eigenpairs, it is at least every eigenvalue that was left out, so that the
    inverse is too small and steps are shorter. Cost: none.
    """
    return d[-1]


def zero_tail(d: Float[Tensor, " r"], trace: Float[Tensor, ""], size: int) -> Float[Tensor, ""]:
    """The tail without curvature: zero.

    Use it to reproduce the RS-KFAC of its author's code. Not with a small damping, by which steps
    in all other directions are then divided.

    Law: at most every eigenvalue that was left out, so that the inverse is too large and steps are
    longer. Cost: none.
    """
    return torch.zeros_like(trace)


# ---- RS-KFAC ------------------------------------------------------------------------------------


def randomized(
    rank: int = 64, *, oversampling: int = 10, iterations: int = 2, seed: int = 0
) -> Callable[[LayerIO], "Randomized"]:
    """RS-KFAC: KFAC with `rank` eigenpairs of each factor and a tail.

    Use it for layers much wider than `rank`, with factors that were averaged over many batches. Not
    for narrow layers, whose factors it decomposes in full, and not where inversions are so seldom
    that their cost does not matter.

    Law: `kfac` where the rank reaches the size of both factors.
    Cost: that of `kfac` for each batch; for each inversion that of `Sketch` for both factors.
    Memory `d_in**2 + d_out**2` for the factors, and `rank * (d_in + d_out)` for the inverse.

    Args:
        rank: The number of eigenpairs of each factor.
        oversampling: As in `Sketch`.
        iterations: As in `Sketch`.
        seed: As in `Sketch`.

    Raises:
        ValueError: If the rank is below 1, or one of the others below 0.
    """
    check_count("rank", rank)
    check_count("oversampling", oversampling, 0)
    check_count("iterations", iterations, 0)
    sketch = Sketch(rank, oversampling, iterations, seed)

    def of(io: LayerIO) -> Randomized:
        factors = kfac_in_full(io)
        return Randomized(factors.A, factors.B, sketch)

    return of


@dataclass(frozen=True, eq=False)
class Randomized:
    """The matrix of RS-KFAC: KFAC's factors, and `low_rank()` by their leading eigenpairs.

    Averages over batches are averages of the factors. Product, inverse and dense matrix are those
    of `low_rank()`, and each costs a decomposition: compute an inverse once and use it many times.
    Law: `B ⊗ A` where the rank reaches both sizes.
    """

    A: Float[Tensor, "d_in d_in"]
    B: Float[Tensor, "d_out d_out"]
    sketch: Sketch

    def low_rank(
        self, decomposition: Decomposition = rsvd, tail: Tail = trace_matched
    ) -> LowRankKronecker:
        """Both factors by leading eigenpairs and a tail, which `SketchedInverse` inverts."""
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

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of both factors of `low_rank()`, whose traces are those of `A` and `B`."""
        return self.A.trace() / len(self.A), self.B.trace() / len(self.B)

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of both factors of `low_rank()`."""
        return self.low_rank().largest_eigenvalues()

    def inverse_of_damped_factors(self, damping_A: float, damping_B: float) -> LowRankKronecker:
        """The inverse of `(B + damping_B * I) ⊗ (A + damping_A * I)`."""
        return self.low_rank().inverse_of_damped_factors(damping_A, damping_B)

    def mixed(self, new: "Randomized", weight: float) -> "Randomized":
        """Averages of both factors, in which the new ones have the share `weight`."""
        A, B = torch.lerp(self.A, new.A, weight), torch.lerp(self.B, new.B, weight)
        return Randomized(A, B, self.sketch)

    def dense(self) -> Float[Tensor, "D D"]:
        """The matrix `low_rank()`, dense."""
        return self.low_rank().dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues, which is that of `B ⊗ A`."""
        return self.B.trace() * self.A.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries of `low_rank()` in the order of `vec(V)`."""
        return self.low_rank().diagonal()


@dataclass(frozen=True)
class SketchedInverse:
    """An `invert=` for `randomized`: another decomposition, another tail, another damping.

    Use it in the optimizer for what the paper and its author's code have. Tail and damping of the
    latter are in
    https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L7
    `KFAC(..., approximation=randomized(64), invert=SketchedInverse(srevd))` is SRE-KFAC, and
    `invert=SketchedInverse(tail=smallest_kept, invert=relative_factored_inverse)` has spectrum
    continuation and the damping of the author's code, with `damping=` for the fraction. Not for
    other approximations, which have no sketch.

    Law: `SketchedInverse(rsvd, trace_matched, invert)` is `invert` itself.
    Cost: one decomposition of both factors, see `Sketch`, and `invert` of a `LowRankKronecker`.

    Attributes:
        decomposition: `rsvd`, `srevd` or `nystrom`.
        tail: `trace_matched`, `smallest_kept` or `zero_tail`.
        invert: From the `LowRankKronecker` and a damping to the inverse.

    Raises:
        TypeError: If the matrix is not one of `randomized`.
    """

    decomposition: Decomposition = rsvd
    tail: Tail = trace_matched
    invert: Callable[[LowRankKronecker, float], LinearMap] = default_inverse

    def __post_init__(self) -> None:
        check_function("decomposition", self.decomposition, "decomposition=srevd")
        check_function("tail", self.tail, "tail=smallest_kept")
        check_function("invert", self.invert, "invert=factored_inverse")

    def __call__(self, M: Matrix, damping: float) -> LinearMap:
        """The inverse of the low-rank matrix."""
        if not isinstance(M, Randomized):
            raise TypeError(
                f"SketchedInverse inverts what approximation=randomized(...) makes, not a "
                f"{type(M).__name__}: use factored_inverse, or exact_inverse."
            )
        return self.invert(M.low_rank(self.decomposition, self.tail), damping)
