"""Mistakes put into this package, one snippet each: see `mutant` and `conformance.mutants`."""

from kfac_scratch.conformance.selftest.mutations import (
    capture,
    factors,
    inverses,
    layers,
    losses,
    operators,
)
from kfac_scratch.conformance.selftest.mutations.mutant import Mutant

MUTANTS: list[Mutant] = [
    *losses.MUTANTS,
    *layers.MUTANTS,
    *capture.MUTANTS,
    *factors.MUTANTS,
    *inverses.MUTANTS,
    *operators.MUTANTS,
]

__all__ = ["MUTANTS", "Mutant"]
