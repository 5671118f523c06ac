r"""Coarse spaces: few directions, in which two-level KFAC solves the whole network's system.

A coarse space is a function of the fine level (one map for each block, usually the damped inverse)
and of the gradient. Every direction lies in one block, so that a space is one stack of matrices
for each block.

Sources: Nicolaides 1987 for one constant direction per subdomain, used in the code of Tselepidis,
Kohler and Orvieto 2020 (arXiv:2011.00573; github.com/ntselepidis/KFAC-Pytorch at 74b6c7d,
`optimizers/gkfac.py`, line 301); the others as in the code of Koroko et al. 2023 (arXiv:2303.18083;
github.com/Abdoulaye-Koroko/natural-gradients at 97105b6, `optimizers/twolevel_kfac.py`, line 588).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker, DiagonalKroneckerEigen
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.matrix import LinearMap

BlockValues = Mapping[str, Tensor]  # one [d_out, d_in] for each block
BlockMaps = Mapping[str, LinearMap]
Space = Mapping[str, Tensor]  # [m, d_out, d_in]: m directions that lie in one block
CoarseSpace = Callable[[BlockMaps, BlockValues], Space]


def nicolaides_space(maps: BlockMaps, r: BlockValues) -> Space:
    """One direction for each block, all ones: the choice of two-level KFAC's authors.

    Use it as the reference. Not for the largest effect: the direction knows nothing of the network.

    Cost: memory of the weights.
    """
    return {name: torch.ones_like(v).unsqueeze(0) for name, v in r.items()}


def residual_space(maps: BlockMaps, r: BlockValues) -> Space:
    """One direction for each block: the fine level's step in this block.

    Use it to correct the lengths of the layers' steps relative to each other. Not to find new
    directions: the span has none.

    Law: with `adef2`, the step consists of the layers' fine steps, with lengths that minimise the
    quadratic model together.
    Cost: one product with each fine map.
    """
    return {name: (maps[name] @ v).unsqueeze(0) for name, v in r.items()}


def spectral_space(maps: BlockMaps, r: BlockValues) -> Space:
    """One direction for each block: the top eigenvector of the fine map.

    For inverses it is the direction of least curvature. Use it to see whether the flattest
    direction of each layer is coupled to other layers. Not with maps without eigenvectors.

    Cost: for a `Kronecker`, two eigendecompositions at every call; for a `KroneckerEigen`, none.

    Raises:
        TypeError: If a map is not a Kronecker product, perhaps by its eigenvectors.
    """
    return {name: _top(name, maps[name]).unsqueeze(0) for name in r}


def krylov_space(space: CoarseSpace) -> CoarseSpace:
    """The directions of a space, and the products of the fine maps with them.

    Use it to enrich `nicolaides_space` or `residual_space`. Not repeatedly: the number of
    directions doubles each time.

    Cost: one product with a fine map for each direction.
    """

    def enriched(maps: BlockMaps, r: BlockValues) -> Space:
        return {name: torch.cat([z, maps[name] @ z]) for name, z in space(maps, r).items()}

    return enriched


def _top(name: str, M: LinearMap) -> Float[Tensor, "d_out d_in"]:
    if isinstance(M, Kronecker):
        M = M.eigen()
    if isinstance(M, DiagonalKronecker):
        M = M.eigen_of_outputs()
    if not isinstance(M, KroneckerEigen | DiagonalKroneckerEigen):
        raise TypeError(
            f"The inverse of block {name!r}, a {type(M).__name__}, has no eigenvectors."
        )
    o, i = divmod(int(M.scale.argmax()), M.scale.shape[1])
    return M.eigenvector(o, i)
