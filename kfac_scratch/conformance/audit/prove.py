"""Prove a finding: its cases fail, and pass once the line that is blamed is mended in memory."""

import importlib
from contextlib import ExitStack
from dataclasses import dataclass
from pkgutil import iter_modules
from types import ModuleType

from kfac_scratch.conformance.audit import findings
from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.protocol import Adapter


@dataclass(frozen=True)
class Proof:
    """A case's verdicts without and with the patch."""

    before: Result
    after: Result

    def __str__(self) -> str:
        state = "proven" if self.holds else "NOT PROVEN"
        case = f"{self.before.case} [{self.before.flavour}]"
        verdicts = f"{self.before.verdict} -> {self.after.verdict}"
        return f"{state}, {case} {verdicts}. {self.before.words}"

    @property
    def holds(self) -> bool:
        """Whether the patch, and nothing else, mends the case."""
        mended = self.after.passes and self.after.verdict != "not-supported"
        return not self.before.passes and mended


def adapter(path: str) -> Adapter:
    """An adapter by `package.module:Class`."""
    module, _, name = path.partition(":")
    made: Adapter = getattr(importlib.import_module(module), name or "Adapter")()
    return made


def finding_names() -> list[str]:
    """All findings: every module of the folder `findings` is one."""
    return sorted(module.name for module in iter_modules(findings.__path__))


def finding(name: str) -> ModuleType:
    """A finding's module; it imports what it is about only in `patch`."""
    return importlib.import_module(f"{findings.__name__}.{name}")


def asked_cases(module: ModuleType) -> dict[str, Case]:
    """The cases of a finding by identifier: of the catalogue, or the finding's own."""
    cases = [case if isinstance(case, Case) else CASES[case] for case, _ in module.CASES]
    return {case.id: case for case in cases}


def prove(name: str) -> list[Proof]:
    """The proofs of a finding, one for each of its cases.

    If a case shows other findings, too (`BESIDE`), these are mended before and after.
    """
    found, proofs = finding(name), []
    with ExitStack() as stack:
        for other in getattr(found, "BESIDE", ()):
            stack.enter_context(finding(other).patch())
        for case, flavour in found.CASES:
            asked = case if isinstance(case, Case) else CASES[case]
            before = verdict(adapter(found.ADAPTER), asked, flavour)
            with found.patch():
                after = verdict(adapter(found.ADAPTER), asked, flavour)
            proofs.append(Proof(before, after))
    return proofs
