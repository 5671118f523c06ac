"""Pieces: what is compared, tensors by layer and by the part of the layer that they belong to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from kfac_scratch.conformance.vocabulary import PartName

PieceKey = tuple[str, PartName]  # a layer's name, and joint, weight or bias
Pieces = Mapping[PieceKey, Tensor]
LayerParts = Mapping[str, tuple[PartName, ...]]  # which parts each layer came in


@dataclass(frozen=True, eq=False)
class Answer:
    """What an adapter says about one flavour of a case: numbers, and nothing that decides.

    Attributes:
        draws: Pieces in canonical layout: of the same request twice, or for `mc` one per seed.
        scales: The factor by which each piece exceeds the canonical one, as the documentation says;
            None where it is silent.
    """

    draws: Sequence[Pieces]
    scales: Mapping[PieceKey, float | None]
