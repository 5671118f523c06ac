"""A case that is added makes stored things stale, which is said, and breaks nothing."""

import json
import sys
from dataclasses import replace

import pytest

from kfac_scratch.conformance.__main__ import main
from kfac_scratch.conformance.audit import explain, page, proofs, prove, stale
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.questions import case_digest, digests
from kfac_scratch.conformance.judging import report
from kfac_scratch.conformance.vectors import export
from kfac_scratch.conformance.vectors import files as vectors
from tests.conformance.stored import RUNS

OLD = "deep-linear-mse-mean-bias"
TOY = replace(CASES[OLD], id="toy")
TODAY = digests(CASES)
STORED = {stem: replace(run, cases=TODAY) for stem, run in RUNS.items()}  # as if new


@pytest.fixture
def toy(monkeypatch):
    """One more case, for everything that looks at what is stored."""
    more = {**CASES, "toy": TOY}
    monkeypatch.setattr(stale, "CASES", more)
    monkeypatch.setattr(stale, "runs", lambda: STORED)
    monkeypatch.setattr(stale, "exported", lambda: export.exported(more))
    return TOY


def test_every_result_file_says_that_the_new_case_is_missing(toy):
    found = stale.stale_results(STORED)
    assert {old.what for old in found} == {f"results/{stem}.json" for stem in STORED}
    assert {old.words for old in found} == {"stale: 1 case was added since: toy"}
    (ours,) = [old for old in found if old.what == "results/ours.json"]
    assert ours.command == (
        "python -m kfac_scratch.conformance run "
        "--adapter kfac_scratch.conformance.adapters.ours:Adapter "
        "--json kfac_scratch/conformance/audit/results/ours.json"
    )


def test_a_file_that_is_named_after_a_version_says_which_one_is_needed(toy):
    run = replace(STORED["singd"], capabilities={"name": "singd", "version": "0.0.1"})
    (old,) = stale.stale_results({"singd-0.0.1": run})
    assert old.command.endswith("results/singd-0.0.1.json  # with singd 0.0.1")
    (old,) = stale.stale_explanations({"singd-0.0.1": run})
    assert old.command.endswith(
        "explain kfac_scratch/conformance/audit/results/singd-0.0.1.json  # with singd 0.0.1"
    )


def test_the_page_says_so(toy):
    overview, notices = page.overview(STORED).text, page.notices().text
    for run in STORED.values():
        name = f"{run.capabilities['name']} {run.capabilities['version']}"
        assert f"| {name} (stale) |" in overview
    assert "added since: toy" in notices
    assert "`python -m kfac_scratch.conformance run --adapter" in notices


def test_a_page_of_today_says_that_nothing_is_older(monkeypatch):
    monkeypatch.setattr(page, "all_stale", list)
    assert page.notices().text == "Nothing on this page is older than the cases."


def test_vectors_that_were_not_exported_again_are_stale(toy):
    """Explanations and proofs are not: a new case is no failure yet, and of no finding."""
    found = stale.all_stale()
    assert [old for old in found if "toy" in old.words and old.what.startswith(("e", "p"))] == []
    (old,) = [old for old in found if old.what == "vectors/kfac-vectors-1"]
    assert "added since: " in old.words
    assert "toy" in stale.stale_vectors().added
    assert "export kfac_scratch/conformance/vectors/kfac-vectors-1" in old.command


def test_a_changed_case_makes_its_explanations_and_proofs_stale(monkeypatch):
    name, (case, _) = "singd_reuse", prove.finding("singd_reuse").CASES[0]
    changed = {**CASES, case: replace(CASES[case], fisher="empirical")}
    monkeypatch.setattr(stale, "CASES", changed)
    monkeypatch.setattr(prove, "CASES", changed)
    found = [*stale.stale_results(STORED), *stale.stale_explanations(STORED)]
    words = {old.what: old.words for old in [*found, *stale.stale_proofs()]}
    said = f"stale: 1 case was changed since: {case}"
    for what in (f"proofs/{name}.json", "explained/singd.json", "results/singd.json"):
        assert said.removeprefix("stale: ") in words[what]


def test_a_proof_of_other_verdicts_is_stale(monkeypatch):
    module = prove.finding("singd_reuse")
    monkeypatch.setattr(module, "CASES", module.CASES[:1])
    case = str(module.CASES[0][0])
    kept = proofs.stored_proofs("singd_reuse") | {"cases": {case: case_digest(CASES[case])}}
    monkeypatch.setattr(stale, "stored_proofs", lambda name: kept)
    monkeypatch.setattr(stale, "proven", lambda: ["singd_reuse"])
    monkeypatch.setattr(stale, "finding_names", lambda: ["singd_reuse"])
    (old,) = stale.stale_proofs()
    assert old.words == "stale: it proves other verdicts"


def test_explanations_of_other_verdicts_are_stale():
    run = STORED["singd"]
    failing = [r for r in run.results if not r.passes]
    twins = [r for r in failing if sum(r.case == other.case for other in failing) > 1]
    fewer = replace(run, results=[r for r in run.results if r is not twins[0]])
    (old,) = stale.stale_explanations({"singd": fewer})
    assert old.words == "stale: it explains other verdicts"


def test_what_was_never_made_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(explain, "EXPLAINED", tmp_path)
    monkeypatch.setattr(stale, "proven", list)
    some = {"singd": STORED["singd"]}
    (old,) = stale.stale_explanations(some)
    assert (old.what, old.words) == ("explained/singd.json", "there is none yet")
    assert {old.words for old in stale.stale_proofs()} == {"there is none yet"}
    missing = stale.missing_results(some)
    assert "adapters/ours.py" in {old.what for old in missing}
    assert "adapters/singd.py" not in {old.what for old in missing}


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["conformance", *map(str, args)])
    return main()


def test_the_report_of_an_old_file_says_by_which_cases(toy, monkeypatch, capsys, tmp_path):
    path = tmp_path / "singd.json"
    report.write(STORED["singd"], path, None)
    assert command(monkeypatch, "report", path) == 0
    assert "singd.json is stale: 1 case was added since: toy." in capsys.readouterr().out


def test_the_report_of_a_file_of_today_does_not(monkeypatch, capsys, tmp_path):
    report.write(STORED["singd"], tmp_path / "r.json", None)
    assert command(monkeypatch, "report", tmp_path / "r.json") == 0
    assert "stale" not in capsys.readouterr().out


def test_a_file_without_digests_is_stale(monkeypatch, capsys, tmp_path):
    value = report.as_json(STORED["singd"])
    del value["cases"]
    (tmp_path / "r.json").write_text(json.dumps(value))
    assert command(monkeypatch, "report", tmp_path / "r.json") == 0
    assert "does not say which cases" in capsys.readouterr().out


def test_a_ports_results_are_compared_with_what_vectors_have():
    """Cases that no vectors hold, sampled ones and those in float32, were never asked of a port."""
    references = vectors.read()
    run = replace(
        STORED["singd"],
        about={"vectors": "kfac-vectors/1"},
        cases={name: reference.digest for name, reference in references.items()},
    )
    state = stale.stale_run(run)
    assert not state.changed
    assert not any("float32" in name for name in state.added)


def test_the_command_lists_what_is_old(toy, monkeypatch, capsys):
    assert command(monkeypatch, "stale") == 1
    out = capsys.readouterr().out
    assert "results/kfac_jax.json: stale: 1 case was added since: toy" in out
    monkeypatch.setattr("kfac_scratch.conformance.commands.authors.all_stale", list)
    assert command(monkeypatch, "stale") == 0
    assert "Nothing that is stored is older" in capsys.readouterr().out
