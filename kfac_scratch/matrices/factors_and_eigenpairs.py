r"""A Kronecker product that is kept twice: by its factors, and by leading eigenpairs of both.

An average over batches needs the factors $A$ and $B$. An inverse that is cheap to apply needs their
leading eigenpairs, which are computed now and then. The matrix is that of the eigenpairs.

Sources: RS-KFAC, Puiu 2022 (arXiv:2206.15397), stores both; so do two of the Brand new K-FACs, Puiu
2022 (arXiv:2210.08494).
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.low_rank import FourBlocks, LowRankKronecker


@dataclass(frozen=True, eq=False)
class FactorsAndEigenpairs:
    """The state of an estimator that follows dense factors and their eigenpairs.

    Use it as the state of `Repaired` and `AdaptiveRank`. Not by itself: what the factors say and
    the eigenpairs do not say acts only when an estimator computes the eigenpairs anew.

    Cost: memory `d_in**2 + d_out**2` for the factors, and that of `modes`; products and inverses
    cost as those of `modes`.

    Attributes:
        factors: The moving average of KFAC's factors, dense.
        modes: The eigenpairs. Product, inverse and dense matrix are those of `modes`.
        count: The number of batches so far.
    """

    factors: Kronecker
    modes: LowRankKronecker
    count: int

    def __matmul__(self, V: Float[Tensor, "*batch d_out d_in"]) -> Tensor:
        """`modes @ V`."""
        return self.modes @ V

    def inverse(self, damping: float) -> FourBlocks:
        """The inverse of `modes + damping * I`, exact."""
        return self.modes.inverse(damping)

    def mean_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of both factors of `modes`."""
        return self.modes.mean_eigenvalues()

    def largest_eigenvalues(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Of both factors of `modes`."""
        return self.modes.largest_eigenvalues()

    def inverse_of_damped_factors(self, damping_A: float, damping_B: float) -> LowRankKronecker:
        """The inverse of both factors of `modes`, each with a damping of its own."""
        return self.modes.inverse_of_damped_factors(damping_A, damping_B)

    def dense(self) -> Float[Tensor, "D D"]:
        """The matrix of `modes`, dense."""
        return self.modes.dense()

    def trace(self) -> Float[Tensor, ""]:
        """Sum of the eigenvalues of `modes`."""
        return self.modes.trace()

    def diagonal(self) -> Float[Tensor, " D"]:
        """Diagonal entries of `modes` in the order of `vec(V)`."""
        return self.modes.diagonal()
