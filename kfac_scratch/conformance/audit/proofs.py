"""Stored proofs: what `python -m kfac_scratch.conformance prove --store` found, and when.

A proof needs the library that it is about, in an environment of its own, so that the site and the
tests read what was stored. A stored proof that does not hold is an error of the audit.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kfac_scratch.conformance.audit.prove import Proof, finding
from kfac_scratch.conformance.judging.report import about

FOLDER = Path(__file__).parent / "proofs"


def store(name: str, proofs: Iterable[Proof]) -> None:
    """Write a finding's proofs, with versions and date."""
    found = finding(name)
    value = {
        "finding": name,
        "library": found.LIBRARY,
        "version": found.VERSION,
        "about": about(),
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
    FOLDER.mkdir(exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False)
    (FOLDER / f"{name}.json").write_text(text + "\n", encoding="utf-8")


def stored(name: str) -> dict[str, Any]:
    """Read a finding's proofs.

    Raises:
        FileNotFoundError: If it was never proven.
    """
    value: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return value
