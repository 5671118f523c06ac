"""Mistakes put into this package, one snippet each: see `mutant` and `selftest.mutants`.

Every module of this folder that has a list `MUTANTS` takes part: a mutant is one new entry.

What no adapter is asked is out of the oracle's scope, and other tests reject it: what the optimizer
does with a direction (momentum beside weight decay: `tests/optimizer/test_promises.py`), the factor
of the second term in `torch.add` of jets (`tests/taylor/test_taylor.py`), and derivatives that are
named in any order (`tests/pinn/test_terms.py`).
"""

from kfac_scratch.conformance.discovery import modules_with
from kfac_scratch.conformance.selftest.mutations.mutant import Mutant

MUTANTS: list[Mutant] = [
    mutant
    for module in modules_with(__name__, __path__, "MUTANTS").values()
    for mutant in module.MUTANTS
]

__all__ = ["MUTANTS", "Mutant"]
