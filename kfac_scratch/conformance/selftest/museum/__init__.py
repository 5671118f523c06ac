"""The bug museum: mistakes that people made in public, each as a small wrong implementation.

`naive` and `vectors` hold a KFAC that is right; every `Piece` replaces one function of it. All
pieces are written in our own words, after the public thread that they name. Every module of this
folder that has a list `PIECES` is a room: a piece is one new entry. See the chapter "The bug
museum".
"""

from kfac_scratch.conformance.discovery import modules_with
from kfac_scratch.conformance.selftest.museum.adapter import KFAC, Adapter
from kfac_scratch.conformance.selftest.museum.piece import Piece

PIECES: list[Piece] = [
    piece
    for module in modules_with(__name__, __path__, "PIECES").values()
    for piece in module.PIECES
]

__all__ = ["KFAC", "PIECES", "Adapter", "Piece"]
