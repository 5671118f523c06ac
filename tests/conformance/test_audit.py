"""The audit is complete and up to date: results, findings, proofs, explanations."""

from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pkgutil import iter_modules
from types import ModuleType

import pytest
import torch

from kfac_scratch.conformance import adapters
from kfac_scratch.conformance.audit import explain, findings, page, proofs, prove, stale
from kfac_scratch.conformance.audit.mending import mended
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.questions import case_digest
from kfac_scratch.conformance.drivers import installed
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.report import Report, environment, write
from kfac_scratch.conformance.judging.scalars import UNEXPLAINED
from tests import faulty
from tests.conformance.stored import RUNS

OTHERS = {stem: run for stem, run in RUNS.items() if stem != "ours"}
VERSIONS = {(run.capabilities["name"], run.capabilities["version"]) for run in RUNS.values()}
LIBRARIES = {name for name, _ in VERSIONS}


def walk(package):
    return [f"{package.__name__}.{info.name}" for info in iter_modules(package.__path__)]


each_run = pytest.mark.parametrize("stem", RUNS)
each_finding = pytest.mark.parametrize("name", prove.finding_names())


def test_ours_is_right_and_others_are_judged_too():
    assert all(r.verdict in ("exact", "definition") for r in RUNS["ours"].results)
    assert len(OTHERS) > 1


def test_a_result_file_says_which_adapter_of_this_package_made_it():
    modules = {*walk(adapters), *walk(findings)}  # a finding may bring its own
    assert {run.about["adapter"].partition(":")[0] for run in RUNS.values()} <= modules


@each_run
def test_a_result_file_answers_all_cases_that_it_was_made_with(stem):
    """Today's cases may be more: then the file is stale, which the page and a slow test say."""
    run = RUNS[stem]
    assert {r.case for r in run.results} == {*run.cases}
    assert run.about["date"]
    assert run.capabilities["version"]


@each_run
def test_a_result_file_is_of_the_version_that_it_is_named_after(stem):
    """And all others are of the newest version that was asked."""
    run, newest = RUNS[stem], page.newest(RUNS)
    assert (stem in newest) == ("-" not in stem)
    assert stem in newest or stem.partition("-")[2] == run.capabilities["version"]


def test_a_result_says_which_libraries_it_depends_on():
    assert page.libraries(RUNS["laplace-0.2.2.2"]) == "curvlinops-for-pytorch 2.0.1"
    without = replace(RUNS["singd"], capabilities={"name": "singd", "version": "0.0.5"})
    assert page.libraries(without) == ""  # a file from before the field
    assert installed("torch") == {f"torch {version('torch')}"}


def test_many_implementations_and_versions_are_judged():
    assert len(OTHERS) >= 14
    assert len(page.newest(OTHERS)) >= 10


def test_there_are_many_real_findings():
    assert len(prove.finding_names()) >= 10


@each_finding
def test_a_finding_says_everything(name):
    found = prove.finding(name)
    assert (found.LIBRARY, found.VERSION) in VERSIONS or found.LIBRARY not in LIBRARIES
    assert len(found.__doc__) > 300  # for the maintainer, with a reproduction
    assert "```python" in found.__doc__
    for part in ("TITLE", "CAUSE", "DOCUMENTED", "ADAPTER"):
        assert len(getattr(found, part)) > 5, part
    assert "line" in found.CAUSE
    assert found.THREAD == "" or found.THREAD.startswith("https://")
    assert found.CASES
    asked = prove.asked_cases(found)
    for case, flavour in found.CASES:
        assert flavour in asked[str(case)].flavours


@each_finding
def test_who_has_the_same_mistake_fails_the_public_suite(name):
    """A finding is proven with public cases, which fail with the library's default adapter."""
    found = prove.finding(name)
    module, _, made = found.ADAPTER.partition(":")
    public = [task for task in found.CASES if isinstance(task[0], str)]
    assert public
    assert {p["case"] for p in proofs.stored_proofs(name)["proofs"]} >= {case for case, _ in public}
    if module == found.__name__:
        return  # the finding brings its adapter, as the skeleton's example does: no result file
    stem = module.rpartition(".")[2]
    run = RUNS[stem]
    assert run.capabilities["version"] == found.VERSION
    assert run.about["adapter"] == found.ADAPTER
    assert made == "Adapter"
    results = {(r.case, r.flavour): r for r in run.results}
    assert not any(results[task].passes for task in public)
    reasons = explain.reasons_of(stem, run)
    assert any(name in {n.removeprefix("+") for n in names} for names in reasons.values())


@pytest.mark.parametrize("name", proofs.proven())
def test_a_stored_proof_holds(name):
    stored, found = proofs.stored_proofs(name), prove.finding(name)
    assert stored["version"] == found.VERSION
    assert stored["proofs"]
    assert all(proof["holds"] for proof in stored["proofs"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the libraries
@each_finding
def test_a_finding_can_be_proven_again(name):
    found = prove.finding(name)
    pytest.importorskip(found.ADAPTER.split(":")[0], exc_type=ImportError)
    installed = prove.adapter(found.ADAPTER).capabilities().version
    if installed != found.VERSION:
        pytest.skip(f"{found.LIBRARY} {installed}, not {found.VERSION}")
    torch.set_default_dtype(torch.float32)  # as users have it; some findings are about that
    for proof in prove.prove(name):
        assert proof.holds, str(proof)


@pytest.mark.parametrize("stem", RUNS)
def test_what_explains_a_failure_is_a_finding(stem):
    named = {n for reasons in explain.reasons_of(stem, RUNS[stem]).values() for n in reasons}
    assert {n.removeprefix("+") for n in named} <= set(prove.finding_names())


@pytest.mark.slow
def test_nothing_that_is_stored_is_older_than_the_cases():
    """After a case was added: each line says what to make again, and by which command."""
    assert [str(old) for old in stale.all_stale()] == []


# ---- causes in words -----------------------------------------------------------------------------

LAST_CALL = ("inputs of the last",)
CALLS = ("KFAC-expand", "number of positions", "call", "too large by 2", "too large by S")
# What a finding's patch confirms: one of these, wherever a verdict that it mends has a cause.
CONFIRMED = {
    "asdfghjkl_ekfac_basis": (),
    "asdfghjkl_ekfac_passes": ("squared lengths of the eigenvectors",),
    "asdfghjkl_groups": ("A has shape",),
    "asdfghjkl_linear_positions": ("too large by 2 or S", "too large by S"),
    "asdfghjkl_mse_outputs": ("IndexError: index 3 is out of bounds",),
    "asdfghjkl_padding_mode": ("padding_mode were ignored", "ValueError: too many values"),
    "asdfghjkl_reuse": ("fc weight: too large by",),
    "asdfghjkl_samples": ("too small by M", "or M."),
    "asdfghjkl_tokens": ("one vector were sent back for all positions",),
    "backpack_conv_factors": ("summed over positions before the product", "too large by 4 or S"),
    "backpack_float64": ("expected scalar type Double but found Float",),
    "backpack_padding_mode": ("padding_mode were ignored", "argument 'padding'"),
    "curvlinops_ignore_index": ("ignored targets had curvature",),
    "curvlinops_loss_weights": ("without the loss's weights", "entries", "too large by 4"),
    "curvlinops_padding_mode": ("padding_mode were ignored",),
    "curvlinops_positions": ("one vector were sent back for all",),
    "curvlinops_reuse": (*CALLS, *LAST_CALL),
    "curvlinops_soft_targets": ("too large by C",),
    "kfac_jax_dilation": ("dilation were ignored",),
    "kfac_jax_masked_bias": ("the 1 of the bias were summed over positions",),
    "kfac_jax_tokens": ("vector of one position reached all others",),
    "kfac_pytorch_geometry": ("padding_mode were", "dilation were ignored", "TypeError: '>'"),
    "kfac_pytorch_groups": ("A has shape",),
    "kfac_pytorch_micro_batches": ("mini-batches had one size",),
    "kfac_pytorch_positions": ("too small by S", "too small by 2 or S"),
    "kfac_pytorch_reuse": ("too small by S", "too small by 2 or S", "number of positions"),
    "kfac_pytorch_strides": ("view size is not compatible",),
    "kronfluence_padding_mode": ("padding_mode were ignored",),
    "kronfluence_positions": ("too small by S", "too small by 2 or S", "too small by 4 or S"),
    "laplace_backend": (
        *("padding_mode were ignored", "ignored targets", "one vector were sent back for all"),
        *CALLS,
    ),
    "laplace_empirical_regression": ("too large by 2.", "too large by 2 or C"),
    "nngeometry_confident": ("numbers are not finite",),
    "nngeometry_float64": ("the same dtype, but got: float != double",),
    "nngeometry_groups": ("A has shape",),
    "nngeometry_padding_mode": ("padding_mode were ignored", "argument 'padding'"),
    "nngeometry_reuse": LAST_CALL,
    "singd_micro_batches": ("for the inputs", "too large by 2 or batches"),
    "singd_padding_mode": ("padding_mode were ignored",),
    "singd_reuse": CALLS,
    "singd_sequence_terms": ("too large by S/",),
}


def failing(run):
    return [r for r in run.results if not r.passes]


def has_a_cause(r):
    """A mistake in words, or a scale with a reading; not an exception's text."""
    if r.verdict in ("undocumented-scale", "inconsistent-scale"):
        return UNEXPLAINED not in r.words or " It looks " in r.words
    return " It looks " in r.words


def test_most_wrong_numbers_have_a_cause_in_words():
    found = [has_a_cause(r) for run in RUNS.values() for r in failing(run) if r.verdict != "error"]
    assert len(found) > 500
    assert sum(found) / len(found) >= 0.8


@each_run
def test_no_cause_is_one_that_the_finding_does_not_confirm(stem):
    reasons = explain.reasons_of(stem, RUNS[stem])
    for r in failing(RUNS[stem]):
        names = [name.removeprefix("+") for name in reasons[explain.failure_key(r)]]
        if has_a_cause(r) or r.verdict == "error":
            words = [words for name in names for words in CONFIRMED[name]]
            assert any(w in r.words for w in words), (names, r)


def test_pages_are_made_from_the_files():
    text = page.overview(RUNS).text
    for run in RUNS.values():
        assert f"| {run.capabilities['name']} {run.capabilities['version']}" in text
    assert "scaled" in page.verdicts(RUNS).text
    assert (
        "N = " in page.documented_scales(OTHERS).text
        or "1/2" in page.documented_scales(OTHERS).text
    )
    cards = page.all_cards(OTHERS).text
    assert all(prove.finding(name).TITLE in cards for name in prove.finding_names())
    date = proofs.stored_proofs("singd_reuse")["about"]["date"]
    assert f"Proven in {prove.finding('singd_reuse').VERSION} on {date}." in cards
    assert "*Upstream.* New in release 0.4." in cards


# ---- the machinery, on an adapter whose mistake is known ----------------------------------------


FAULTY = {"name": "faulty", "version": "1"}


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
    monkeypatch.setattr(explain, "finding_names", lambda: ["twice"])
    return found


def test_a_proof_holds_if_and_only_if_the_patch_mends(made):
    (proof,) = prove.prove("twice")
    assert proof.holds
    assert proof.before.verdict == "undocumented-scale"
    assert proof.after.verdict == "exact"
    made.CASES = (("class-weights-mlp-mean", "ekfac"),)  # fails for another reason: no factors
    (proof,) = prove.prove("twice")
    assert not proof.holds


def test_what_a_finding_stands_beside_is_mended_before_and_after(monkeypatch):
    said = finding_that_patches(documented=6.0)
    larger = finding_that_patches(factor=lambda self, request, name: 6.0)
    said.BESIDE = ("larger",)
    monkeypatch.setattr(prove, "finding", {"said": said, "larger": larger}.get)
    (proof,) = prove.prove("said")
    assert proof.holds
    assert "too large by 6" in proof.before.words
    assert proof.after.verdict == "scaled"
    said.BESIDE = ()  # alone it mends nothing
    (proof,) = prove.prove("said")
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
    run = Report(FAULTY, results, {}, {}, environment())
    assert explain.explain(run) == {
        "deep-linear-mse-mean-nobias expand": ["twice"],
        "deep-linear-mse-mean-nobias ekfac": [],
    }


def finding_that_patches(adapter="tests.faulty:Scaled", **attributes):
    """A finding whose patch gives `Scaled` other attributes."""
    found = made_finding()
    before = {name: vars(faulty.Scaled)[name] for name in attributes}

    @contextmanager
    def patch():
        try:
            for name, value in attributes.items():
                setattr(faulty.Scaled, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(faulty.Scaled, name, value)

    vars(found).update(patch=patch, ADAPTER=adapter)
    return found


def explained_by(monkeypatch, modules, about):
    monkeypatch.setattr(explain, "finding", modules.get)
    monkeypatch.setattr(explain, "finding_names", lambda: [*modules])
    results = [Result("deep-linear-mse-mean-nobias", "expand", "undocumented-scale")]
    (found,) = explain.explain(Report(FAULTY, results, {}, {}, about)).values()
    return found


def test_of_patches_that_mend_together_those_that_are_not_needed_are_not_named(monkeypatch):
    modules = {
        "idle": finding_that_patches(),
        "larger": finding_that_patches(factor=lambda self, request, name: 6.0),
        "said": finding_that_patches(documented=6.0),
        "unused": finding_that_patches(),
    }
    assert explained_by(monkeypatch, modules, environment()) == ["+larger", "+said"]


def test_a_finding_that_contains_another_is_not_named_beside_it(monkeypatch):
    modules = {name: finding_that_patches(documented=2.0) for name in ("larger", "said")}
    assert explained_by(monkeypatch, modules, environment()) == ["larger", "said"]
    modules["larger"].WITH = ("said",)
    assert explained_by(monkeypatch, modules, environment()) == ["said"]


def test_a_finding_about_another_adapter_explains_nothing(monkeypatch):
    modules = {"said": finding_that_patches(documented=2.0)}
    asked = {"adapter": "tests.faulty:Scaled"}
    assert explained_by(monkeypatch, modules, asked) == ["said"]
    modules = {"said": finding_that_patches("tests.faulty:Other", documented=2.0)}
    assert explained_by(monkeypatch, modules, asked) == []


def without_its_line():
    found = made_finding()

    @contextmanager
    def patch():
        with mended(faulty.Scaled, "factor", ("return 3.0", "return 1.0")):
            yield

    found.patch = patch
    return found


def test_a_patch_for_another_version_that_does_not_fit_explains_nothing(monkeypatch):
    modules = {"twice": without_its_line(), "said": finding_that_patches(documented=2.0)}
    for module in modules.values():
        module.VERSION = "2"
    assert explained_by(monkeypatch, modules, environment()) == ["said"]


def test_a_patch_that_does_not_fit_the_version_that_it_is_for_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="occurs 0 times"):
        explained_by(monkeypatch, {"twice": without_its_line()}, environment())


def in_version(release, verdict):
    return Report(
        FAULTY | {"version": release},
        [Result("deep-linear-mse-mean-nobias", "expand", verdict)],
        {"deep-linear-mse-mean-nobias": "dense"},
        {},
        environment(),
    )


@pytest.fixture
def versions(made, monkeypatch, tmp_path):
    """Three versions with a finding about the second, which the third still has."""
    monkeypatch.setattr(page, "finding", lambda name: made)
    monkeypatch.setattr(page, "proven", list)
    monkeypatch.setattr(explain, "EXPLAINED", tmp_path / "explained")
    monkeypatch.setattr(explain, "RESULTS", tmp_path)
    made.VERSION = "0.9"
    found = {
        "faulty-0.8": in_version("0.8", "exact"),
        "faulty-0.9": in_version("0.9", "undocumented-scale"),
        "faulty": in_version("0.10", "undocumented-scale"),
    }
    for stem in ("faulty-0.9", "faulty"):
        write(found[stem], tmp_path / f"{stem}.json", None)
        explain.store_explanations(tmp_path / f"{stem}.json")
    return found


def test_a_finding_is_seen_where_its_patch_mends_and_not_where_its_cases_pass(versions):
    where = page.occurrence("twice", versions)
    assert where == page.Occurrence(["0.9", "0.10"], ["0.8"], 1)
    assert str(where) == "Seen in 0.9 and 0.10; its cases pass in 0.8."
    refusing = versions | {"faulty-0.8": in_version("0.8", "not-supported")}
    assert str(page.occurrence("twice", refusing)) == "Seen in 0.9 and 0.10."


def test_a_finding_that_no_stored_result_shows_is_seen_where_it_is_proven(versions, monkeypatch):
    assert str(page.occurrence("twice", {})) == "Not proven yet."
    monkeypatch.setattr(page, "proven", lambda: ["twice"])
    assert str(page.occurrence("twice", {})) == "Seen in 0.9."


def test_versions_are_ordered_by_their_numbers(versions):
    assert [*page.newest(versions)] == ["faulty"]
    first, second = page.changes(versions).text.splitlines()[2:]
    assert first.split("|")[1:5] == [" faulty ", " 0.8 → 0.9 ", "  ", " 1 "]  # broken
    assert second.split("|")[2] == " 0.9 → 0.10 "
    assert second.split("|")[-2] == " 1 "  # fails as before


@pytest.mark.parametrize(
    ("pair", "head"),
    [
        (("error", "exact"), "mended"),
        (("scaled", "wrong"), "broken"),
        (("not-supported", "definition"), "offered now, passes"),
        (("not-supported", "wrong"), "offered now, fails"),
        (("exact", "not-supported"), "no longer offered"),
        (("wrong", "not-supported"), "no longer offered"),
        (("exact", "scaled"), "passes as before"),
    ],
)
def test_a_verdict_that_changed_is_counted_once(pair, head):
    runs = {v: in_version(v, verdict) for v, verdict in zip("12", pair, strict=True)}
    heads, _, row = (line.split("|")[1:-1] for line in page.changes(runs).text.splitlines())
    assert {h.strip() for h, n in zip(heads[2:], row[2:], strict=True) if n.strip()} == {head}


def test_proofs_and_explanations_are_stored(made, monkeypatch, tmp_path):
    monkeypatch.setattr(proofs, "PROOFS", tmp_path / "proofs")
    monkeypatch.setattr(proofs, "finding", lambda name: made)
    proofs.store_proofs("twice", prove.prove("twice"))
    stored = proofs.stored_proofs("twice")
    assert stored["proofs"][0]["holds"]
    (name,) = stored["cases"]
    assert stored["cases"][name] == case_digest(CASES[name])


def test_explanations_are_stored_with_versions_and_digests(made, monkeypatch, tmp_path):
    monkeypatch.setattr(explain, "EXPLAINED", tmp_path / "explained")
    results = [Result("deep-linear-mse-mean-nobias", "expand", "undocumented-scale")]
    families = {"deep-linear-mse-mean-nobias": "dense"}
    run = Report(FAULTY, results, families, {}, environment())
    write(run, tmp_path / "faulty.json", None)
    key = "deep-linear-mse-mean-nobias expand"
    monkeypatch.setattr(explain, "RESULTS", tmp_path)
    place = tmp_path / "explained" / "faulty.json"
    assert explain.store_explanations(tmp_path / "faulty.json") == ({key: ["twice"]}, place)
    stored = explain.stored_explanations("faulty")
    assert stored["version"] == "1"
    assert stored["cases"] == {key.split()[0]: case_digest(CASES[key.split()[0]])}
    assert explain.reasons_of("faulty", run) == {key: ["twice"]}


def test_a_failure_that_nobody_looked_into_is_unexplained(monkeypatch, tmp_path):
    monkeypatch.setattr(explain, "EXPLAINED", tmp_path)
    results = [Result("deep-linear-mse-mean-nobias", "expand", "wrong")]
    run = Report(FAULTY, results, {}, {}, environment())
    assert explain.reasons_of("faulty", run) == {"deep-linear-mse-mean-nobias expand": []}
    assert page.unexplained({"faulty": run}) == [("faulty", "deep-linear-mse-mean-nobias expand")]


def test_the_explanations_of_a_strangers_file_are_stored_nowhere(tmp_path, monkeypatch):
    """Not even those of a copy, under the name of a stored one."""
    monkeypatch.setattr(explain, "explain", lambda run: {})
    monkeypatch.setattr(explain, "EXPLAINED", tmp_path / "explained")
    (tmp_path / "explained").mkdir()
    copy = tmp_path / "ours.json"
    copy.write_bytes((explain.RESULTS / "ours.json").read_bytes())
    assert explain.store_explanations(copy) == ({}, None)
    assert not list((tmp_path / "explained").iterdir())
    _, stored = explain.store_explanations(explain.RESULTS / "ours.json")
    assert list((tmp_path / "explained").iterdir()) == [stored]
