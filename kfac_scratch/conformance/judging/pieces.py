"""Pieces: what is compared, tensors by layer and by the part of the layer that they belong to."""

from collections.abc import Mapping

from torch import Tensor

from kfac_scratch.conformance.vocabulary import PartName

PieceKey = tuple[str, PartName]  # a layer's name, and joint, weight or bias
Pieces = Mapping[PieceKey, Tensor]
LayerParts = Mapping[str, tuple[PartName, ...]]  # which parts each layer came in
