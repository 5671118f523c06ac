"""Which cases are run, and which failures their owner expects."""

import tomllib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from kfac_scratch.conformance.cases.families import CASES, FAMILIES
from kfac_scratch.conformance.json_files import entry
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
    found: dict[Task, str] = {}
    for table in _entries(path) if path else []:
        matching = [
            (case.id, flavour)
            for case in CASES.values()
            for flavour in case.flavours
            if fnmatchcase(case.id, table["case"])
            and fnmatchcase(flavour, table.get("flavour", "*"))
        ]
        if not matching:
            raise ValueError(f"{path}: no case matches {table['case']!r}.")
        found |= dict.fromkeys(matching, f"{table['reason']} ({table['link']})")
    return found


def _entries(path: Path) -> list[dict[str, str]]:
    """The tables `[[expected]]` of a file.

    Raises:
        ValueError: Naming the file, and the entry that lacks something.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply.") from None
    if content and "expected" not in content:
        raise ValueError(f"{path}: there is no `[[expected]]`, but {', '.join(content)}.")
    entries = content.get("expected", [])
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise ValueError(f"{path}: `expected` is no list of tables `[[expected]]`.")
    for table in entries:
        unknown = sorted(table.keys() - {"case", "flavour", "reason", "link"})
        if unknown:
            raise ValueError(f"{path}: the entry {table} has unknown fields {unknown}.")
        missing = {"case", "reason", "link"} - table.keys()
        if missing:
            raise ValueError(f"{path}: the entry {table} lacks {sorted(missing)}.")
        for key in table:
            entry(table, key, str, path)
    return entries
