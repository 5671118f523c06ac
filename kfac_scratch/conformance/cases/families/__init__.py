"""All cases, by family: every module of this folder that has a list `CASES` is a family.

A new family is a new file; the order of its cases is that of the file. The files that say their
`PLACE` come first, and in that order: reports and vectors keep it.
"""

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.discovery import modules_with

FAMILIES: dict[str, list[Case]] = {
    name.replace("_", "-"): module.CASES
    for name, module in modules_with(__name__, __path__, "CASES").items()
}


def by_id(families: dict[str, list[Case]]) -> dict[str, Case]:
    """All cases by identifier, in order.

    Raises:
        ValueError: Naming the identifiers that more than one case has.
    """
    ids = [case.id for cases in families.values() for case in cases]
    twice = sorted({name for name in ids if ids.count(name) > 1})
    if twice:
        raise ValueError(f"More than one case has the identifier {', '.join(twice)}.")
    return {case.id: case for cases in families.values() for case in cases}


CASES: dict[str, Case] = by_id(FAMILIES)
_FAMILY = {case.id: name for name, cases in FAMILIES.items() for case in cases}


def family(case: Case) -> str:
    """The family that a case belongs to."""
    return _FAMILY[case.id]
