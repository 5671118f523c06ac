"""Which finding explains which failure: the one whose patch mends it.

`python -m kfac_scratch.conformance explain RESULTS.json`, run where the library is, asks every case
that fails again, once within the patch of each finding, and within all of them together. What no
patch mends is unexplained, and the audit says so.
"""

import json
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from kfac_scratch.conformance.audit.prove import adapter, finding, names
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.report import Report, about, from_json

FOLDER = Path(__file__).parent
RESULTS, EXPLAINED = FOLDER / "results", FOLDER / "explained"


def runs() -> dict[str, Report]:
    """The stored results of every implementation, by file."""
    files = sorted(RESULTS.glob("*.json"))
    return {file.stem: from_json(file.read_text(encoding="utf-8")) for file in files}


def about_library(library: str) -> dict[str, ModuleType]:
    """The findings about a library."""
    found = {name: finding(name) for name in names()}
    return {name: module for name, module in found.items() if library == module.LIBRARY}


def explain(run: Report) -> dict[str, list[str]]:
    """For every failure of a run, `case flavour`, the findings whose patch mends it.

    Several names that begin with `+` mend it only together.
    """
    found = about_library(str(run.capabilities["name"]))
    failures = [r for r in run.results if not r.passes]
    reasons: dict[str, list[str]] = {_key(r): [] for r in failures}
    for name, module in found.items():
        for r in _mended(failures, {name: module}):
            reasons[_key(r)].append(name)
    left = [r for r in failures if not reasons[_key(r)]]
    for r in _mended(left, found):
        reasons[_key(r)] = [f"+{name}" for name in found]
    return reasons


def store(results: Path) -> dict[str, list[str]]:
    """Explain a result file, and write what was found beside it."""
    run = from_json(results.read_text(encoding="utf-8"))
    reasons = explain(run)
    value = {"about": about(), "implementation": run.capabilities["name"], "explained": reasons}
    EXPLAINED.mkdir(exist_ok=True)
    text = json.dumps(value, indent=1, ensure_ascii=False)
    (EXPLAINED / results.name).write_text(text + "\n", encoding="utf-8")
    return reasons


def stored(stem: str) -> dict[str, list[str]]:
    """What was found for the result file of a name."""
    value: dict[str, Any] = json.loads((EXPLAINED / f"{stem}.json").read_text(encoding="utf-8"))
    explained: dict[str, list[str]] = value["explained"]
    return explained


def _mended(failures: list[Result], patches: dict[str, ModuleType]) -> list[Result]:
    """Failures that pass within some patches."""
    passing = []
    with ExitStack() as stack:
        for module in patches.values():
            stack.enter_context(module.patch())
        for r in failures:
            made = next(iter(patches.values())).ADAPTER
            again = verdict(adapter(made), CASES[r.case], r.flavour)
            if again.passes and again.verdict != "not-supported":
                passing.append(r)
    return passing


def _key(r: Result) -> str:
    return f"{r.case} {r.flavour}"
