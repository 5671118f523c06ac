"""All cases, by family."""

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families import (
    convolutions,
    dense,
    extra,
    fishers,
    inverses,
    operators,
    sharing,
    weights,
)

FAMILIES: dict[str, list[Case]] = {
    "dense": dense.CASES,
    "sharing": sharing.CASES,
    "convolutions": convolutions.CASES,
    "weights": weights.CASES,
    "fishers": fishers.CASES,
    "inverses": inverses.CASES,
    "operators": operators.CASES,
    "extra": extra.CASES,
}
_FAMILY = {case.id: name for name, cases in FAMILIES.items() for case in cases}
CASES: dict[str, Case] = {case.id: case for family in FAMILIES.values() for case in family}


def family(case: Case) -> str:
    """The family that a case belongs to."""
    return _FAMILY[case.id]
