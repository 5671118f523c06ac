"""Stored proofs: what `python -m kfac_scratch.conformance prove --store` found, and when.

A proof needs the library that it is about, in an environment of its own, so that the site and the
tests read what was stored. A stored proof that does not hold is an error of the audit.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kfac_scratch.conformance.audit.prove import Proof, asked_cases, finding, finding_names
from kfac_scratch.conformance.cases.questions import digests
from kfac_scratch.conformance.json_files import read_object, write_object
from kfac_scratch.conformance.judging.report import environment

PROOFS = Path(__file__).parent / "proofs"


def store_proofs(name: str, proofs: Iterable[Proof]) -> None:
    """Write a finding's proofs, with versions, date and the digests of its cases."""
    found = finding(name)
    value = {
        "finding": name,
        "library": found.LIBRARY,
        "version": found.VERSION,
        "about": environment(),
        "cases": digests(asked_cases(found)),
        "proofs": [
            {
                "case": proof.before.case,
                "flavour": proof.before.flavour,
                "before": proof.before.verdict,
                "words": proof.before.words,
                "after": proof.after.verdict,
                "holds": proof.holds,
            }
            for proof in proofs
        ],
    }
    write_object(PROOFS / f"{name}.json", value)


def stored_proofs(name: str) -> dict[str, Any]:
    """Read a finding's proofs.

    Raises:
        ValueError: If it was never proven, or the file is malformed.
    """
    return read_object(PROOFS / f"{name}.json")


def proven() -> list[str]:
    """The findings that have stored proofs; the others are shown as not proven yet."""
    return [name for name in finding_names() if (PROOFS / f"{name}.json").exists()]
