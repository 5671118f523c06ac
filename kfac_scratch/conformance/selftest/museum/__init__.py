"""The bug museum: mistakes that people made in public, each as a small wrong implementation.

`naive` and `vectors` hold a KFAC that is right; every `Piece` replaces one function of it. All
pieces are written in our own words, after the public thread that they name. See the chapter "The
bug museum".
"""

from kfac_scratch.conformance.selftest.museum import factors, inverses, layers, losses
from kfac_scratch.conformance.selftest.museum.adapter import KFAC, Adapter
from kfac_scratch.conformance.selftest.museum.piece import Piece

PIECES: list[Piece] = [*losses.PIECES, *layers.PIECES, *factors.PIECES, *inverses.PIECES]

__all__ = ["KFAC", "PIECES", "Adapter", "Piece"]
