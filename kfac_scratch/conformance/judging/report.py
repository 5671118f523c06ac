"""Results as a table in the terminal, as JSON, as JUnit's XML, and as Markdown for a site."""

import json
import math
import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from kfac_scratch.conformance.json_files import entry, is_number, read_object
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.printable import printable
from kfac_scratch.conformance.vocabulary import FLAVOURS, VERDICTS, Task

RESULTS_FORMAT = "kfac-conformance-results/1"


@dataclass(frozen=True)
class Report:
    """Everything about one run.

    Attributes:
        capabilities: What the implementation says of itself.
        results: Verdicts.
        families: The family of each case.
        expected: Reasons for failures that the implementer expects, by case and flavour.
        about: Date, versions, and how to repeat the run.
        cases: The digest of every case that there was, by identifier; empty if nobody noted them.
    """

    capabilities: Mapping[str, Any]
    results: Sequence[Result]
    families: Mapping[str, str]
    expected: Mapping[Task, str]
    about: Mapping[str, str]
    cases: Mapping[str, str] = field(default_factory=dict)

    def surprises(self) -> list[Result]:
        """Failures that nobody expected, and passes where a failure was expected."""
        return [r for r in self.results if r.passes == ((r.case, r.flavour) in self.expected)]


def environment() -> dict[str, str]:
    """When and with what a run is made."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "machine": platform.machine(),
    }


def counts(report: Report) -> dict[str, Counter[str]]:
    """How often each verdict occurs, by family."""
    found: dict[str, Counter[str]] = {}
    for r in report.results:
        found.setdefault(report.families[r.case], Counter())[r.verdict] += 1
    return found


def table(report: Report) -> str:
    """One line per family, one per failure, and how many questions were judged."""
    used = [v for v in VERDICTS if any(r.verdict == v for r in report.results)]
    total = Counter(r.verdict for r in report.results)
    rows = [["", *used]]
    rows += [[f, *(str(n[v] or "") for v in used)] for f, n in counts(report).items()]
    rows += [["all", *(str(total[v]) for v in used)]]
    first, *others = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], others)]) for row in rows]
    name, version = (printable(str(report.capabilities[k]), 200) for k in ("name", "version"))
    return "\n".join([f"{name} {version}", "", *lines, "", *details(report), judged_words(report)])


def judged_words(report: Report) -> str:
    """The number of questions that got an answer, and of those that did not."""
    refused = sum(r.verdict == "not-supported" for r in report.results)
    right = sum(r.passes for r in report.results) - refused
    judged = len(report.results) - refused
    return (
        f"{len(report.results)} questions: {judged} judged, of which {right} are right and "
        f"{judged - right} are not; {refused} not supported."
    )


def details(report: Report) -> list[str]:
    """A line for each failure, and for each expected one that did not come."""
    lines = []
    for r in report.results:
        reason = report.expected.get((r.case, r.flavour))
        if r.passes and reason:
            lines.append(f"PASSES {r.case} [{r.flavour}] although expected to fail: {reason}")
        elif not r.passes:
            lead = "expected" if reason else "FAILS"
            lines.append(f"{lead} {r.case} [{r.flavour}] {r.verdict}: {reason or r.words}")
    return lines


def as_json(report: Report) -> dict[str, Any]:
    """The whole report, for files and for `read_report`."""
    return {
        "format": RESULTS_FORMAT,
        "about": dict(report.about),
        "implementation": dict(report.capabilities),
        "cases": dict(report.cases),
        "results": [
            _rounded(r) | {"family": report.families[r.case]} | _reason(report, r)
            for r in report.results
        ],
    }


def text(report: Report) -> str:
    """The whole report as JSON, one verdict per line."""
    value = as_json(report)
    value["implementation"] = _printable(value["implementation"])
    head = {key: part for key, part in value.items() if key != "results"}
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in value["results"])
    return json.dumps(head, indent=1)[:-2] + ',\n "results": [\n' + lines + "\n]\n}\n"


def read_report(path: Path) -> Report:
    """Read what `write` wrote.

    Raises:
        ValueError: Naming the file and what is wrong with it.
    """
    return from_object(read_object(path), path)


def from_object(value: Mapping[str, Any], where: object) -> Report:
    """A report from what `as_json` made.

    Args:
        value: The object.
        where: The file that it was read from, for errors.

    Raises:
        ValueError: Naming the file and what is wrong with it.
    """
    if value.get("format") != RESULTS_FORMAT:
        raise ValueError(
            f"{where}: expected the format {RESULTS_FORMAT!r}, got {value.get('format')!r}."
        )
    capabilities = entry(value, "implementation", dict, where)
    for key in ("name", "version"):
        entry(capabilities, key, str, f"{where}, implementation")
    rows = entry(value, "results", list, where)
    results = [_result(row, f"{where}, result {i}") for i, row in enumerate(rows)]
    families = {r["case"]: r["family"] for r in rows}
    expected = {(r["case"], r["flavour"]): r["reason"] for r in rows if "reason" in r}
    about, cases = _texts(value, "about", where), {}
    if "cases" in value:  # files from before there were digests have none
        cases = _texts(value, "cases", where)
    return Report(capabilities, results, families, expected, about, cases)


def _texts(value: Mapping[str, Any], key: str, where: object) -> dict[str, str]:
    """A field that is an object of texts.

    Raises:
        ValueError: If it is none.
    """
    found: dict[str, str] = entry(value, key, dict, where)
    for name in found:
        entry(found, name, str, f"{where}, {key}")
    return found


def _result(row: Any, where: str) -> Result:
    """One verdict.

    Raises:
        ValueError: If a field is missing, unknown, or has a value that there is not.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object, got a {type(row).__name__}.")
    for key in ("case", "flavour", "verdict", "family"):
        entry(row, key, str, where)
    for key in ("error", "residual", "seconds"):
        if not (row.get(key) is None or is_number(row[key])):
            raise ValueError(f"{where}: {key!r} is {row[key]!r}, expected a number.")
    for key in ("words", "reason"):
        entry({key: "", **row}, key, str, where)
    scales = entry({"scales": {}, **row}, "scales", dict, where)
    wrong = [key for key, s in scales.items() if not (s is None or is_number(s))]
    if wrong:
        raise ValueError(f"{where}: the scales of {', '.join(wrong)} are no numbers.")
    for key, known in (("verdict", VERDICTS), ("flavour", FLAVOURS)):
        if row[key] not in known:
            raise ValueError(f"{where}: {key} {row[key]!r} is none of {', '.join(known)}.")
    try:
        return Result(**{k: v for k, v in row.items() if k not in ("family", "reason")})
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error


def junit(report: Report) -> str:
    """JUnit's XML: failures are verdicts that do not pass, what is not supported is skipped."""
    name = printable(str(report.capabilities["name"]), 200)
    suite = ElementTree.Element("testsuite", name=name, tests=str(len(report.results)))
    surprises = report.surprises()
    suite.set("failures", str(len(surprises)))
    for r in report.results:
        test = ElementTree.SubElement(
            suite,
            "testcase",
            name=f"{r.case}[{r.flavour}]",
            classname=f"{name}.{report.families[r.case]}",
        )
        test.set("time", f"{r.seconds:.3f}")
        if r in surprises:
            ElementTree.SubElement(test, "failure", message=r.verdict).text = r.words
        elif r.verdict == "not-supported" or not r.passes:
            ElementTree.SubElement(test, "skipped", message=r.words)
    return ElementTree.tostring(suite, encoding="unicode")


def check_writable(*files: Path | None) -> None:
    """Refuse files that could not be written, before anything runs.

    Raises:
        OSError: Naming the file.
    """
    for file in (f for f in files if f is not None):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
            raise OSError(f"{file} cannot be written.")


def write(report: Report, json_file: Path | None, junit_file: Path | None) -> None:
    """Write the files that are wanted."""
    if json_file:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(text(report), encoding="utf-8")
    if junit_file:
        junit_file.parent.mkdir(parents=True, exist_ok=True)
        junit_file.write_text(junit(report), encoding="utf-8")


def _printable(value: Any) -> Any:
    """What an implementation says of itself, with every text made printable."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _printable(part) for key, part in value.items()}
    return [_printable(part) for part in value] if isinstance(value, list | tuple) else value


def _rounded(r: Result) -> dict[str, Any]:
    """A result without digits that differ from run to run."""
    value = r.as_json()
    for key in ("error", "residual"):
        value[key] = _rounded_number(value[key], 2)
    value["scales"] = {k: _rounded_number(v, 10) for k, v in r.scales.items()}
    value["seconds"] = round(r.seconds, 3)
    return value


def _rounded_number(value: float | None, digits: int) -> float | None:
    """A number as JSON can hold it: None for what is not finite."""
    rounded = math.nan if value is None else float(f"{value:.{digits}g}")
    return rounded if math.isfinite(rounded) else None


def _reason(report: Report, r: Result) -> dict[str, str]:
    reason = report.expected.get((r.case, r.flavour))
    return {"reason": reason} if reason else {}
