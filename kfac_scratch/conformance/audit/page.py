"""The audit as text: tables and findings, made from stored files and never typed."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kfac_scratch.conformance.audit import explain
from kfac_scratch.conformance.audit.proofs import proven, stored_proofs
from kfac_scratch.conformance.audit.prove import finding, finding_names
from kfac_scratch.conformance.audit.stale import all_stale, stale_results
from kfac_scratch.conformance.cases.families import FAMILIES
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.report import Report
from kfac_scratch.conformance.vocabulary import VERDICTS
from kfac_scratch.show import Markdown, table

# What a verdict can become from one release to the next, in the words of a table's head.
CHANGES = {
    "mended": {("fails", "passes")},
    "broken": {("passes", "fails")},
    "offered now, passes": {("refused", "passes")},
    "offered now, fails": {("refused", "fails")},
    "no longer offered": {("passes", "refused"), ("fails", "refused")},
    "passes as before": {("passes", "passes")},
    "fails as before": {("fails", "fails")},
}


def name_and_version(run: Report) -> str:
    """Of the implementation that was run."""
    return f"{run.capabilities['name']} {run.capabilities['version']}"


def libraries(run: Report) -> str:
    """What an implementation's numbers depend on beside PyTorch, if the file says it."""
    return ", ".join(run.capabilities.get("libraries", ()))


def newest(runs: Mapping[str, Report]) -> dict[str, Report]:
    """Of every implementation the run with the newest version."""
    found: dict[str, str] = {}
    for stem in sorted(runs, key=lambda stem: _release(runs[stem])):
        found[runs[stem].capabilities["name"]] = stem
    return {stem: run for stem, run in runs.items() if stem in found.values()}


def judged_results(run: Report, family: str = "") -> list[Result]:
    """What was asked of an implementation and is offered by it, of one family or all."""
    return [
        r
        for r in run.results
        if r.verdict != "not-supported" and family in ("", run.families[r.case])
    ]


def overview(runs: Mapping[str, Report]) -> Markdown:
    """How many verdicts pass, of how many that were judged, by family; what is stale is marked."""
    old, rows = {stale.what for stale in stale_results(runs)}, []
    for stem, run in runs.items():
        cells = [_share(judged_results(run, family)) for family in (*FAMILIES, "")]
        mark = " (stale)" if f"results/{stem}.json" in old else ""
        rows.append([f"{name_and_version(run)}{mark}", *cells])
    return table(["implementation", *FAMILIES, "all"], rows)


def notices() -> Markdown:
    """What is stored and older than the cases: by which cases, and how it is made again."""
    found = all_stale()
    if not found:
        return Markdown("Nothing on this page is older than the cases.")
    lines = [f"- `{stale.what}`: {stale.words}. Again: `{stale.command}`" for stale in found]
    return Markdown("\n".join(["Older than the cases:", "", *lines]))


def verdicts(runs: Mapping[str, Report]) -> Markdown:
    """How often each verdict occurs."""
    counts = {stem: Counter(r.verdict for r in run.results) for stem, run in runs.items()}
    rows = [
        [name_and_version(run), *(str(counts[stem][v] or "") for v in VERDICTS)]
        for stem, run in runs.items()
    ]
    return table(["implementation", *VERDICTS], rows)


def changes(runs: Mapping[str, Report]) -> Markdown:
    """What differs between a release and the next one that was asked, in numbers of verdicts."""
    releases: dict[str, list[Report]] = {}
    for run in sorted(runs.values(), key=_release):
        releases.setdefault(run.capabilities["name"], []).append(run)
    rows = []
    for name, asked in sorted(releases.items()):
        for old, new in pairwise(asked):
            before = {(r.case, r.flavour): _state(r) for r in old.results}
            now = {(r.case, r.flavour): _state(r) for r in new.results}
            pairs = Counter((before[task], now[task]) for task in before.keys() & now.keys())
            counts = [sum(pairs[pair] for pair in kind) for kind in CHANGES.values()]
            between = f"{old.capabilities['version']} → {new.capabilities['version']}"
            rows.append([name, between, *(str(n or "") for n in counts)])
    return table(["implementation", "releases", *CHANGES], rows, text_columns=2)


def _state(r: Result) -> str:
    if r.verdict == "not-supported":
        return "refused"
    return "passes" if r.passes else "fails"


def documented_scales(runs: Mapping[str, Report]) -> Markdown:
    """Scales that are documented and real: conventions, not mistakes."""
    rows = []
    for run in runs.values():
        scaled = Counter(_scale(r.words) for r in run.results if r.verdict == "scaled")
        words = "; ".join(words for words, _ in scaled.most_common(3))
        if scaled:
            rows.append([name_and_version(run), words, str(scaled.total())])
    return table(["implementation", "the most frequent scales", "verdicts"], rows, text_columns=2)


def failures(runs: Mapping[str, Report]) -> dict[str, dict[str, list[str]]]:
    """For each implementation its failures, and which findings explain each."""
    return {stem: explain.reasons_of(stem, run) for stem, run in runs.items()}


def unexplained(runs: Mapping[str, Report]) -> list[tuple[str, str]]:
    """Failures that no patch mends, or that nobody has looked into: implementation and case."""
    return [
        (stem, key)
        for stem, reasons in failures(runs).items()
        for key, names in reasons.items()
        if not names
    ]


@dataclass(frozen=True)
class Occurrence:
    """What stored results say of a finding in the versions of its library that were asked.

    Attributes:
        seen: Versions in which its patch mends a verdict, of a stored result or of its proof.
        passing: Versions in which all of its verdicts pass without it.
        explains: How many verdicts it explains, in the version that it is about.
    """

    seen: list[str]
    passing: list[str]
    explains: int

    def __str__(self) -> str:
        words = f"Seen in {_enumerated(self.seen)}" if self.seen else "Not proven yet"
        if self.passing:
            words += f"; its cases pass in {_enumerated(self.passing)}"
        return f"{words}."


def occurrence(name: str, runs: Mapping[str, Report]) -> Occurrence:
    """In which versions a finding is seen, and in which it is not."""
    found, explains = finding(name), 0
    seen, passing = {found.VERSION} if name in proven() else set(), set()
    own = {(str(case), flavour) for case, flavour in found.CASES}
    for stem, run in runs.items():
        if not explain.is_about(found, run):
            continue
        version = run.capabilities["version"]
        reasons = explain.reasons_of(stem, run).values()
        mended = sum(name in {n.removeprefix("+") for n in names} for names in reasons)
        judged = [r for r in judged_results(run) if (r.case, r.flavour) in own]
        if mended:
            seen.add(version)
        elif judged and all(r.passes for r in judged):
            passing.add(version)
        if version == found.VERSION:
            explains += mended
    return Occurrence(sorted(seen, key=_numbers), sorted(passing, key=_numbers), explains)


def card(name: str, where: Occurrence) -> str:
    """A finding for people: what, where, what the documentation says, and the text for upstream."""
    found = finding(name)
    thread = f"[public thread]({found.THREAD})" if found.THREAD else "no public thread known"
    upstream = f"*Upstream.* {found.UPSTREAM}.\n\n" if hasattr(found, "UPSTREAM") else ""
    text = (found.__doc__ or "").strip()
    title, cause, documented = (
        part.replace("__", r"\_\_") for part in (found.TITLE, found.CAUSE, found.DOCUMENTED)
    )
    return (
        f"#### {found.LIBRARY} {found.VERSION}: {title}\n\n"
        f"*Cause.* {cause}\n\n*Documentation.* {documented}; {thread}.\n\n"
        f"{upstream}*Versions.* {where}{_proven_on(name)}\n\n"
        f"*Explains* {where.explains} of the verdicts that do not pass in {found.VERSION}.\n\n"
        f'<details markdown="1">\n<summary>For the maintainer</summary>\n\n{text}\n\n</details>\n'
    )


def all_cards(runs: Mapping[str, Report]) -> Markdown:
    """All findings, by library."""
    return Markdown("\n\n".join(card(name, occurrence(name, runs)) for name in finding_names()))


def _proven_on(name: str) -> str:
    """When a finding was last proven, in words."""
    if name not in proven():
        return ""
    stored = stored_proofs(name)
    beside = [finding(other).TITLE for other in getattr(finding(name), "BESIDE", ())]
    mended = "".join(f", with another mended: '{title}'" for title in beside)
    return f" Proven in {stored['version']} on {stored['about']['date']}{mended}."


def _release(run: Report) -> list[int]:
    return _numbers(run.capabilities["version"])


def _numbers(version: str) -> list[int]:
    """The numbers in a version, by which versions are ordered."""
    return [*map(int, re.findall(r"\d+", version))]


def _enumerated(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _scale(words: str) -> str:
    """The first scale that a verdict states."""
    stated = re.sub(r"^documented:? (\w+ (joint|weight|bias): )?", "", words)
    return stated.split(" (")[0].rstrip(".")


def _share(results: Sequence[Result]) -> str:
    if not results:
        return ""
    passing = sum(r.passes for r in results)
    text = f"{passing}/{len(results)}"
    return text if passing == len(results) else f"**{text}**"
