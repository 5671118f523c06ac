"""The audit is complete and up to date: results, findings, proofs, explanations."""

from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from kfac_scratch.conformance.audit import explain, page, proofs, prove
from kfac_scratch.conformance.audit.mending import mended
from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.selection import tasks
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.report import Report, about
from tests import faulty

RUNS = explain.runs()
OTHERS = {stem: run for stem, run in RUNS.items() if stem != "ours"}
LIBRARIES = {run.capabilities["name"]: run for run in OTHERS.values()}
LOCAL = ("curvlinops", "BackPACK")  # what the tests are installed with

each_run = pytest.mark.parametrize("stem", RUNS)
each_finding = pytest.mark.parametrize("name", prove.names())


def test_eight_implementations_besides_ours_are_judged():
    assert len({name.split()[0] for name in LIBRARIES}) == 8
    assert all(r.verdict in ("exact", "definition") for r in RUNS["ours"].results)


@each_run
def test_a_result_file_answers_all_cases_of_today(stem):
    """A case that is added or renamed makes result files old: run the adapters again."""
    assert {(r.case, r.flavour) for r in RUNS[stem].results} == {*tasks()}
    assert RUNS[stem].about["date"]
    assert RUNS[stem].capabilities["version"]


def test_there_are_many_real_findings():
    assert len(prove.names()) >= 10
    assert {prove.finding(name).LIBRARY for name in prove.names()} <= set(LIBRARIES)


@each_finding
def test_a_finding_says_everything(name):
    found = prove.finding(name)
    assert LIBRARIES[found.LIBRARY].capabilities["version"] == found.VERSION
    assert len(found.__doc__) > 300  # for the maintainer, with a reproduction
    assert "```python" in found.__doc__
    for part in ("TITLE", "CAUSE", "DOCUMENTED", "ADAPTER"):
        assert len(getattr(found, part)) > 5, part
    assert "line" in found.CAUSE
    assert found.THREAD == "" or found.THREAD.startswith("https://")
    assert found.CASES
    for case, flavour in found.CASES:
        asked = case if isinstance(case, Case) else CASES[case]
        assert flavour in asked.flavours


@each_finding
def test_a_finding_is_proven(name):
    stored, found = proofs.stored(name), prove.finding(name)
    assert stored["version"] == found.VERSION
    assert len(stored["proofs"]) == len(found.CASES)
    assert all(proof["holds"] for proof in stored["proofs"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
@pytest.mark.parametrize("name", [n for n in prove.names() if prove.finding(n).LIBRARY in LOCAL])
def test_a_finding_can_be_proven_again(name):
    pytest.importorskip("curvlinops")
    pytest.importorskip("backpack")
    torch.set_default_dtype(torch.float32)  # as users have it; some findings are about that
    for proof in prove.prove(name):
        assert proof.holds, str(proof)


@pytest.mark.parametrize("stem", OTHERS)
def test_every_failure_was_looked_into(stem):
    failing = {f"{r.case} {r.flavour}" for r in OTHERS[stem].results if not r.passes}
    explained = explain.stored(stem) if failing else {}
    assert set(explained) == failing
    known = {n for reasons in explained.values() for n in reasons}
    assert {n.removeprefix("+") for n in known} <= set(prove.names())


def test_pages_are_made_from_the_files():
    text = page.overview(RUNS).text
    for run in RUNS.values():
        assert f"| {run.capabilities['name']} {run.capabilities['version']} |" in text
    assert "scaled" in page.verdicts(RUNS).text
    assert "N = " in page.conventions(OTHERS).text or "1/2" in page.conventions(OTHERS).text
    cards = page.all_cards(OTHERS).text
    assert all(prove.finding(name).TITLE in cards for name in prove.names())


# ---- the machinery, on an adapter whose mistake is known ----------------------------------------


def made_finding():
    @contextmanager
    def patch():
        with mended(faulty.Scaled, "factor", ("return 2.0", "return 1.0")):
            yield

    found = ModuleType("twice")
    vars(found).update(
        LIBRARY="faulty",
        VERSION="1",
        ADAPTER="tests.faulty:Scaled",
        TITLE="twice",
        CASES=(("deep-linear-mse-mean-nobias", "expand"),),
        patch=patch,
    )
    return found


@pytest.fixture
def made(monkeypatch):
    found = made_finding()
    monkeypatch.setattr(prove, "finding", lambda name: found)
    monkeypatch.setattr(explain, "finding", lambda name: found)
    monkeypatch.setattr(explain, "names", lambda: ["twice"])
    return found


def test_a_proof_holds_if_and_only_if_the_patch_mends(made):
    (proof,) = prove.prove("twice")
    assert proof.holds
    assert proof.before.verdict == "undocumented-scale"
    assert proof.after.verdict == "exact"
    made.CASES = (("class-weights-mlp-mean", "ekfac"),)  # fails for another reason: no factors
    (proof,) = prove.prove("twice")
    assert not proof.holds


def test_a_patch_of_another_version_is_refused():
    with (
        pytest.raises(ValueError, match="occurs 0 times"),
        mended(faulty.Scaled, "factor", ("return 3.0", "return 1.0")),
    ):
        pass


def test_failures_are_explained_by_what_mends_them(made):
    results = [
        Result("deep-linear-mse-mean-nobias", "expand", "undocumented-scale"),
        Result("deep-linear-mse-mean-nobias", "ekfac", "error"),
        Result("deep-linear-mse-sum-bias", "reduce", "exact"),
    ]
    run = Report({"name": "faulty", "version": "1"}, results, {}, {}, about())
    assert explain.explain(run) == {
        "deep-linear-mse-mean-nobias expand": ["twice"],
        "deep-linear-mse-mean-nobias ekfac": [],
    }


def test_proofs_and_explanations_are_stored(made, monkeypatch, tmp_path):
    monkeypatch.setattr(proofs, "FOLDER", tmp_path / "proofs")
    monkeypatch.setattr(proofs, "finding", lambda name: made)
    proofs.store("twice", prove.prove("twice"))
    assert proofs.stored("twice")["proofs"][0]["holds"]
