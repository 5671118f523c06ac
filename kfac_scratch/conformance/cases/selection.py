"""Which cases are run, and which failures their owner expects."""

import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from kfac_scratch.conformance.cases.families import CASES, FAMILIES
from kfac_scratch.conformance.vocabulary import Task


def tasks(pattern: str = "", tags: Sequence[str] = ()) -> list[Task]:
    """Pairs of case and flavour.

    Args:
        pattern: Part of an identifier, or a pattern with `*`; empty for all.
        tags: Of which a case has all. A family's name is a tag, too.

    Raises:
        ValueError: If nothing is left.
    """
    wild = pattern if "*" in pattern else f"*{pattern}*"
    found = [
        (case.id, flavour)
        for family, cases in FAMILIES.items()
        for case in cases
        if fnmatchcase(case.id, wild) and {*tags} <= {*case.tags, family}
        for flavour in case.flavours
    ]
    if not found:
        known = sorted({*FAMILIES} | {tag for case in CASES.values() for tag in case.tags})
        raise ValueError(
            f"No case matches {pattern!r} with the tags {list(tags)}. Tags are {', '.join(known)}."
        )
    return found


def expected_failures(path: Path | None) -> dict[Task, str]:
    """Read a file of expected failures, which the implementer owns.

    TOML with entries `[[expected]]`: `case` (a pattern), `flavour` (a pattern, by default `*`),
    `reason` and `link`; the last two are not optional.

    Raises:
        ValueError: Naming the entry and what is wrong with it.
    """
    if path is None:
        return {}
    found: dict[Task, str] = {}
    for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("expected", []):
        missing = {"case", "reason", "link"} - entry.keys()
        if missing:
            raise ValueError(f"{path}: the entry {entry} lacks {sorted(missing)}.")
        matching = [
            (case.id, flavour)
            for case in CASES.values()
            for flavour in case.flavours
            if fnmatchcase(case.id, entry["case"])
            and fnmatchcase(flavour, entry.get("flavour", "*"))
        ]
        if not matching:
            raise ValueError(f"{path}: no case matches {entry['case']!r}.")
        found |= dict.fromkeys(matching, f"{entry['reason']} ({entry['link']})")
    return found
