"""Which finding explains which failure: the one whose patch mends it.

`python -m kfac_scratch.conformance explain RESULTS.json`, run where the library is, asks every case
that fails again, once within the patch of each finding, and within all of them together, of which
those that are not needed are left out. What no patch mends is unexplained, and the audit says so.

A patch is written for one version of a library. In another version the finding may still be there,
which its patch proves if it fits; a patch that does not fit explains nothing.
"""

from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

from kfac_scratch.conformance.audit.prove import adapter, finding, finding_names
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.questions import case_digest
from kfac_scratch.conformance.json_files import entry, read_object, write_object
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.report import Report, environment, read_report

RESULTS = Path(__file__).parent / "results"
EXPLAINED = Path(__file__).parent / "explained"
Reasons = dict[str, list[str]]  # findings by `case flavour`


def runs() -> dict[str, Report]:
    """The stored results of every implementation, by file."""
    return {file.stem: read_report(file) for file in sorted(RESULTS.glob("*.json"))}


def about_run(run: Report) -> dict[str, ModuleType]:
    """The findings about a library, as far as they ask the adapter that made a run."""
    found = {name: finding(name) for name in finding_names()}
    return {name: module for name, module in found.items() if is_about(module, run)}


def is_about(module: ModuleType, run: Report) -> bool:
    """Whether a finding is about the library, in whatever version, and the adapter of a run."""
    made_by = run.about.get("adapter", "")
    return run.capabilities["name"] == module.LIBRARY and made_by in ("", module.ADAPTER)


def explain(run: Report) -> Reasons:
    """For every failure of a run, `case flavour`, the findings whose patch mends it.

    Several names that begin with `+` mend it only together, and without any of them they do not.
    A finding whose patch contains another finding's (`WITH`) is not named beside that.

    Raises:
        ValueError: Naming failing cases that there are not.
    """
    found = {name: module for name, module in about_run(run).items() if _fits(module, run)}
    failures = [r for r in run.results if not r.passes]
    unknown = sorted({r.case for r in failures} - CASES.keys())
    if unknown:
        raise ValueError(f"There are no cases {', '.join(unknown)} (any more).")
    reasons: Reasons = {failure_key(r): [] for r in failures}
    for name, module in found.items():
        for r in _mended(failures, {name: module}):
            reasons[failure_key(r)].append(name)
    for names in reasons.values():
        names[:] = [n for n in names if not {*getattr(found[n], "WITH", ())} & {*names}]
    left = [r for r in failures if not reasons[failure_key(r)]]
    for r in _mended(left, found):
        reasons[failure_key(r)] = [f"+{name}" for name in _needed(r, found)]
    return reasons


def store_explanations(results: Path) -> tuple[Reasons, Path | None]:
    """Explain a result file, and store what was found if the file is one of the audit's.

    It is stored in `EXPLAINED`, with versions and digests.

    Returns:
        The reasons, and the path that they are stored at; None for a file of someone else's.
    """
    run = read_report(results)
    reasons = explain(run)
    if results.resolve().parent != RESULTS.resolve():
        return reasons, None
    asked = dict.fromkeys(key.split()[0] for key in reasons)
    value = {
        "about": environment(),
        "implementation": run.capabilities["name"],
        "version": run.capabilities["version"],
        "cases": {case: case_digest(CASES[case]) for case in asked},
        "explained": reasons,
    }
    write_object(EXPLAINED / results.name, value)
    return reasons, EXPLAINED / results.name


def stored_explanations(stem: str) -> dict[str, Any]:
    """What was written about the result file of a name; empty if nothing was.

    Raises:
        ValueError: If the file is malformed.
    """
    path = EXPLAINED / f"{stem}.json"
    return read_object(path) if path.exists() else {}


def reasons_of(stem: str, run: Report) -> Reasons:
    """For every failure of a stored run the findings that explain it; none if nobody has looked."""
    stored = stored_explanations(stem)
    explained = entry(stored, "explained", dict, f"{stem}.json") if stored else {}
    keys = [failure_key(r) for r in run.results if not r.passes]
    return {key: explained.get(key, []) for key in keys}


def failure_key(r: Result) -> str:
    """A verdict's name in files: `case flavour`."""
    return f"{r.case} {r.flavour}"


def _fits(module: ModuleType, run: Report) -> bool:
    """Whether what a finding's patch replaces is there in the version that was run.

    Raises:
        Exception: Whatever the patch raises in the version that it is written for.
    """
    try:
        with module.patch():
            return True
    except (ValueError, KeyError, AttributeError, ImportError):
        if run.capabilities["version"] == module.VERSION:
            raise
        return False


def _needed(failure: Result, patches: dict[str, ModuleType]) -> list[str]:
    """Of patches that mend a failure together, some without any of which they do not."""
    kept = dict(patches)
    for name in patches:
        fewer = {other: module for other, module in kept.items() if other != name}
        if _mended([failure], fewer):
            kept = fewer
    return list(kept)


def _mended(failures: list[Result], patches: dict[str, ModuleType]) -> list[Result]:
    """Failures that pass within some patches; without patches, none does."""
    if not patches:
        return []
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
