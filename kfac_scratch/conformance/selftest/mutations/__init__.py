"""Mistakes put into this package, one snippet each: see `mutant` and `selftest.mutants`.

Every module of this folder that has a list `MUTANTS` takes part: a mutant is one new entry.
"""

from kfac_scratch.conformance.discovery import modules_with
from kfac_scratch.conformance.selftest.mutations.mutant import Mutant

MUTANTS: list[Mutant] = [
    mutant
    for module in modules_with(__name__, __path__, "MUTANTS").values()
    for mutant in module.MUTANTS
]

__all__ = ["MUTANTS", "Mutant"]
