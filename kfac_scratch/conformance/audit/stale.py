"""What is stored and older than the cases: results, explanations, proofs, vectors.

Whoever adds a case cannot run everybody's library. So nothing stored has to be made again at once;
the audit says what is older than the cases, by which cases, and which command makes it again.
`python -m kfac_scratch.conformance stale` prints it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pkgutil import iter_modules

from kfac_scratch.conformance import adapters
from kfac_scratch.conformance.audit.explain import failure_key, runs, stored_explanations
from kfac_scratch.conformance.audit.proofs import proven, stored_proofs
from kfac_scratch.conformance.audit.prove import asked_cases, finding, finding_names
from kfac_scratch.conformance.cases.digests import Staleness, staleness
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.questions import digests
from kfac_scratch.conformance.json_files import entry
from kfac_scratch.conformance.judging.report import Report
from kfac_scratch.conformance.vectors import files
from kfac_scratch.conformance.vectors.export import exported

NOTHING = "there is none yet"
COMMAND = "python -m kfac_scratch.conformance"
AUDIT = "kfac_scratch/conformance/audit"
SHIPPED_VECTORS = "kfac_scratch/conformance/vectors/kfac-vectors-1"


@dataclass(frozen=True)
class Stale:
    """One stored thing that is older than the cases.

    Attributes:
        what: The thing, as its path in the audit.
        words: By which cases, or that there is none yet.
        command: What makes it again, from the root of the repository. Behind `#`: the version of
            the library that has to be installed, for a file that is named after one.
    """

    what: str
    words: str
    command: str

    def __str__(self) -> str:
        return f"{self.what}: {self.words}\n    {self.command}"


def stale_run(run: Report, today: Mapping[str, str] | None = None) -> Staleness:
    """How today's cases differ from those that a run was made with.

    Args:
        run: Results, of an adapter or of a port that read vectors.
        today: Digests of today's cases; by default they are computed.
    """
    today = digests(CASES) if today is None else today
    if "vectors" in run.about:
        today = {case.id: today[case.id] for case in exported()}
    return staleness(run.cases, today)


def stale_results(
    stored: Mapping[str, Report], today: Mapping[str, str] | None = None
) -> list[Stale]:
    """Result files that are older than the cases, whose digests can be given."""
    today = digests(CASES) if today is None else today
    found = {stem: stale_run(run, today) for stem, run in stored.items()}
    return [
        Stale(f"results/{stem}.json", str(state), _run_again(stem, stored[stem]))
        for stem, state in found.items()
        if state
    ]


def missing_results(stored: Mapping[str, Report]) -> list[Stale]:
    """Adapters of this package that no result file is of."""
    judged = {str(run.about.get("adapter", "")).partition(":")[0] for run in stored.values()}
    names = [info.name for info in iter_modules(adapters.__path__)]
    return [
        Stale(f"adapters/{name}.py", "there are no results yet", _run(module, name))
        for name in names
        if (module := f"{adapters.__name__}.{name}") not in judged
    ]


def stale_explanations(
    stored: Mapping[str, Report], today: Mapping[str, str] | None = None
) -> list[Stale]:
    """Explanations that are missing, or older than the cases of the failures that they explain."""
    today, found = digests(CASES) if today is None else today, []
    for stem, run in stored.items():
        failing = [r for r in run.results if not r.passes and r.case in today]
        value, path = stored_explanations(stem), f"explained/{stem}.json"
        state = staleness(value.get("cases", {}), {r.case: today[r.case] for r in failing})
        others = {*map(failure_key, failing)} != {*value.get("explained", {})}
        if failing and (state or others):
            words = str(state or "stale: it explains other verdicts") if value else NOTHING
            command = f"{COMMAND} explain {AUDIT}/results/{stem}.json{_of_version(stem, run)}"
            found.append(Stale(path, words, command))
    return found


def stale_proofs() -> list[Stale]:
    """Proofs that are missing, or older than the cases of their finding."""
    found = []
    for name in finding_names():
        command, path = f"{COMMAND} prove --store {name}", f"proofs/{name}.json"
        if name not in proven():
            found.append(Stale(path, NOTHING, command))
            continue
        stored, module = stored_proofs(name), finding(name)
        state = staleness(stored.get("cases", {}), digests(asked_cases(module)))
        proofs = entry(stored, "proofs", list, path)
        proven_tasks = {(proof["case"], proof["flavour"]) for proof in proofs}
        if state or proven_tasks != {(str(case), flavour) for case, flavour in module.CASES}:
            found.append(Stale(path, str(state or "stale: it proves other verdicts"), command))
    return found


def stale_vectors(today: Mapping[str, str] | None = None) -> Staleness:
    """How today's cases differ from the vectors that are shipped."""
    today = digests(CASES) if today is None else today
    shipped = {name: reference.digest for name, reference in files.read().items()}
    return staleness(shipped, {case.id: today[case.id] for case in exported()})


def all_stale() -> list[Stale]:
    """Everything stored that is older than the cases, with the command that makes it again."""
    stored, today = runs(), digests(CASES)
    found = [*missing_results(stored), *stale_results(stored, today)]
    found += [*stale_explanations(stored, today), *stale_proofs()]
    vectors = stale_vectors(today)
    if vectors:
        again = f"{COMMAND} ties --write && {COMMAND} export {SHIPPED_VECTORS}"
        found.append(Stale("vectors/kfac-vectors-1", str(vectors), again))
    return found


def _run_again(stem: str, run: Report) -> str:
    adapter = run.about.get("adapter", f"{adapters.__name__}.{stem}")
    return _run(adapter, stem) + _of_version(stem, run)


def _of_version(stem: str, run: Report) -> str:
    """A comment in a command: the version that a file is named after."""
    name, version = run.capabilities["name"], run.capabilities["version"]
    return f"  # with {name} {version}" if stem.endswith(f"-{version}") else ""


def _run(adapter: str, stem: str) -> str:
    return f"{COMMAND} run --adapter {adapter} --json {AUDIT}/results/{stem}.json"
