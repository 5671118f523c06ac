r"""Coarse spaces: the few directions in which two-level KFAC solves the whole network's system.

A coarse space is a function of the fine level (one map for each block, usually the damped inverse)
and of the gradient. Every direction lies in one block, so that a space is one stack of matrices
for each block.

Sources: Nicolaides 1987 for one constant direction per subdomain, used by Tselepidis, Kohler and
Orvieto 2020 (arXiv:2011.00573); the others as in Koroko et al. 2023 (arXiv:2303.18083).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.matrix import LinearMap

BlockValues = Mapping[str, Tensor]  # one [d_out, d_in] for each block
BlockMaps = Mapping[str, LinearMap]
Space = Mapping[str, Tensor]  # [m, d_out, d_in]: m directions that lie in one block
CoarseSpace = Callable[[BlockMaps, BlockValues], Space]


def nicolaides_space(maps: BlockMaps, r: BlockValues) -> Space:
    """One direction for each block, all ones: the paper's choice."""
    return {name: torch.ones_like(v).unsqueeze(0) for name, v in r.items()}


def residual_space(maps: BlockMaps, r: BlockValues) -> Space:
    """One direction for each block, its own fine step.

    Law: the two-level step then consists of the fine steps, each with the best length in view of
    all others.
    """
    return {name: (maps[name] @ v).unsqueeze(0) for name, v in r.items()}


def spectral_space(maps: BlockMaps, r: BlockValues) -> Space:
    """One direction for each block, the one that its inverse stretches most.

    Raises:
        TypeError: If a map is not a Kronecker product, perhaps by its eigenvectors.
    """
    return {name: _top(name, maps[name]).unsqueeze(0) for name in r}


def krylov_space(space: CoarseSpace) -> CoarseSpace:
    """Every direction of a space, and what the fine level makes of it."""

    def enriched(maps: BlockMaps, r: BlockValues) -> Space:
        return {name: torch.cat([z, maps[name] @ z]) for name, z in space(maps, r).items()}

    return enriched


def _top(name: str, M: LinearMap) -> Float[Tensor, "d_out d_in"]:
    if isinstance(M, Kronecker):
        M = M.eigen()
    if not isinstance(M, KroneckerEigen):
        raise TypeError(
            f"The inverse of block {name!r}, a {type(M).__name__}, has no eigenvectors."
        )
    o, i = divmod(int(M.scale.argmax()), M.scale.shape[1])
    return torch.outer(M.QB[:, o], M.QA[:, i])
