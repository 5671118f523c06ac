"""The command line of who writes cases: skeletons, what a case asks, ties; and malformed files."""

import json
import runpy
import sys

import pytest

from kfac_scratch.conformance.__main__ import main
from kfac_scratch.conformance.cases.digests import Staleness
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.questions import case_digest
from kfac_scratch.conformance.cases.selection import tasks
from kfac_scratch.conformance.cases.theorems import THEOREMS
from kfac_scratch.conformance.commands import authors
from kfac_scratch.conformance.commands.skeletons import FOLDERS, KINDS, write_skeleton
from kfac_scratch.conformance.commands.templates import SHAPES
from kfac_scratch.conformance.judging.flags import MEANINGS, flags
from kfac_scratch.conformance.judging.harness import missing, run
from kfac_scratch.conformance.vectors import export, grid
from tests.thinned import thinned


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command: its exit status, what it prints, and its errors."""

    def call(*args):
        monkeypatch.setattr(sys, "argv", ["conformance", *map(str, args)])
        status = main()
        return status, *capsys.readouterr()

    return call


# ---- skeletons -----------------------------------------------------------------------------------


def test_a_skeleton_of_a_family_has_cases(command, tmp_path):
    status, out, _ = command("skeleton", "case", "my_toy", "--folder", tmp_path)
    assert status == 0
    assert out.startswith(str(tmp_path / "my_toy.py"))
    assert "show 'my-toy-*'" in out
    (case,) = runpy.run_path(str(tmp_path / "my_toy.py"))["CASES"]
    assert case.id == "my-toy-linear-mse-mean"
    assert case.theorem in THEOREMS


@pytest.mark.parametrize("shape", SHAPES)
def test_a_skeleton_of_an_adapter_passes_or_refuses_every_case(shape, command, tmp_path):
    words = ("skeleton", "adapter", "toy", "--folder", tmp_path, "--shape", shape)
    assert command(*words)[0] == 0
    adapter = runpy.run_path(str(tmp_path / "toy.py"))["Adapter"]()
    verdicts = {r.verdict for r in run(adapter, list(CASES.values())[:40:3])}
    assert verdicts == {"exact", "definition", "not-supported"}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_skeleton_of_an_adapter_passes_or_refuses_all_cases(shape, tmp_path):
    path, _ = write_skeleton("adapter", "toy", tmp_path, shape)
    results = run(runpy.run_path(str(path))["Adapter"](), list(CASES.values()))
    assert not [r for r in results if not r.passes]


def test_a_stranger_without_a_loss_or_a_matrix_is_judged_on_many_questions(tmp_path):
    """Of the same questions that are asked of who shows factors, and by any loss."""
    path, _ = write_skeleton("adapter", "toy", tmp_path, "preconditioner")
    offered = runpy.run_path(str(path))["Adapter"]().capabilities()
    asked = [task for task in tasks() if not missing(offered, CASES[task[0]], task[1])]
    assert len(asked) >= 150


def test_only_adapters_have_shapes(command, tmp_path):
    words = ("skeleton", "case", "toy", "--folder", tmp_path, "--shape", "dense")
    status, _, error = command(*words)
    assert status == 2
    assert "leave out --shape dense" in error
    assert not list(tmp_path.iterdir())


def test_a_skeleton_of_a_finding_runs(command, tmp_path):
    status, out, _ = command("skeleton", "finding", "toy_half", "--folder", tmp_path)
    assert status == 0
    assert "prove --store toy_half" in out
    found = runpy.run_path(str(tmp_path / "toy_half.py"))
    assert found["LIBRARY"] == "toy"
    cases = [CASES[case] for case, _ in found["CASES"]]
    assert {r.verdict for r in run(found["Adapter"](), cases) if r.flavour == "expand"} == {
        "undocumented-scale"
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_has_nothing_left_to_fill_in(kind, tmp_path):
    path, _ = write_skeleton(kind, "toy_half", tmp_path)
    text = path.read_text()
    assert "$" not in text.replace("$ ", "")
    assert "TODO" not in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("case", "dense", "exists already"),
        ("adapter", "ours", "exists already"),
        ("case", "my-toy", "'my-toy' is no name"),
        ("case", "2d", "'2d' is no name"),
        ("finding", "toy", "a finding is called library_slug"),
    ],
)
def test_a_skeleton_overwrites_nothing_and_wants_a_name(kind, name, words, command):
    status, _, error = command("skeleton", kind, name)
    assert status == 2
    assert words in error
    assert len(error.splitlines()) == 1


def test_skeletons_go_where_the_oracle_looks():
    assert (FOLDERS["case"] / "dense.py").exists()
    assert (FOLDERS["adapter"] / "ours.py").exists()
    assert (FOLDERS["finding"] / "singd_reuse.py").exists()


# ---- what a case asks ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["class-weights-tokens", "inverse-factored-0.25-mlp"])
def test_what_a_case_asks_is_shown(name, command):
    status, out, _ = command("show", name)
    case, words = CASES[name], " ".join(out.split())
    assert status == 0
    assert case_digest(case) in words
    assert THEOREMS[case.theorem] in words
    for part in (*case.tags, *case.judged, case.loss.kind, "N = 7"):
        assert part in words
    for key, changes in flags(case).items():
        effect = ", ".join(f"{flavour} {change:.2g}" for flavour, change in changes.items())
        assert f"{key} ({effect}): {MEANINGS[key]}" in words


def test_a_batched_operator_and_a_graph_can_be_shown(command):
    names = ["operator-reduce-1d-mean", "batches-unequal-conv", "attention-tokens-mse"]
    _, out, _ = command("show", *names)
    assert "of a differential operator" in out
    assert "in mini-batches of 2, 5" in out
    assert "attention  of 0, 1, 2" in out
    assert [line.split()[0] for line in out.splitlines() if "(family" in line] == [
        name for name in CASES if name in names
    ]


@pytest.mark.parametrize("case", thinned(CASES.values(), 40), ids=str)
def test_every_case_can_be_shown(case):
    assert authors.described_case(case).startswith(case.id)


def test_a_case_that_there_is_not_is_an_error_with_a_hint(command):
    status, out, error = command("show", "deep-linear-mse")
    assert (status, out) == (2, "")
    assert "Did you mean deep-linear-mse-mean-bias" in error


# ---- ties ----------------------------------------------------------------------------------------

TIED = "mlp-cross-entropy-sum"


def test_cases_that_vectors_have_need_no_ties(command):
    status, out, _ = command("ties", TIED)
    assert (status, out) == (0, "1 cases looked at; 0 have ties that are not listed.\n")


def test_a_tie_that_nobody_lists_is_told_and_can_be_written(command, monkeypatch, tmp_path):
    known = {name: ties for name, ties in export.known_ties().items() if name != TIED}
    file = tmp_path / "ties.json"
    file.write_text(json.dumps(known))
    monkeypatch.setattr(export, "TIES", file)
    monkeypatch.setattr(authors, "TIES", file)
    monkeypatch.setattr(grid, "LISTED", 2.0**-41)  # a wider band, so that there are some
    status, out, _ = command("ties", TIED)
    assert status == 1
    assert out.startswith(f"{TIED}: ")
    assert "1 have ties that are not listed" in out
    assert json.loads(file.read_text()) == known
    assert command("ties", TIED, "--write")[0] == 0
    written = json.loads(file.read_text())
    assert {name: ties for name, ties in written.items() if name != TIED} == known
    assert written[TIED]
    assert command("ties", TIED)[0] == 0


def test_by_default_ties_are_of_cases_that_the_vectors_lack(command, monkeypatch):
    state = Staleness(added=("bias-bce-mean",), changed=("bias-mse-sum",))
    monkeypatch.setattr(authors, "stale_vectors", lambda: state)
    assert [case.id for case in authors.unexported()] == ["bias-bce-mean", "bias-mse-sum"]
    assert command("ties")[1].startswith("2 cases looked at")


# ---- malformed files -----------------------------------------------------------------------------

ROW = {"case": "a", "flavour": "expand", "verdict": "exact", "family": "dense"}


def report_of(row=ROW, **changes):
    value = {
        "format": "kfac-conformance-results/1",
        "about": {},
        "implementation": {"name": "n", "version": "1"},
        "results": [row],
    }
    return json.dumps(value | changes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "r.json: Expecting property name"),
        ("[]", "r.json: expected an object, got a list"),
        ("[" * 100_000, "r.json: nested too deeply"),
        ("\x00", "r.json: "),
        (report_of(format="other"), "expected the format"),
        (report_of(results={}), "'results' is a dict, expected a list"),
        (report_of(implementation={"name": "n"}), "there is no 'version'"),
        (report_of(about=None), "'about' is a NoneType"),
        (report_of(cases=[]), "'cases' is a list, expected a dict"),
        (report_of([]), "result 0: expected an object, got a list"),
        (report_of({**ROW, "verdict": "fine"}), "verdict 'fine' is none of exact, definition"),
        (report_of({**ROW, "flavour": "extend"}), "flavour 'extend' is none of expand"),
        (report_of({**ROW, "colour": "red"}), "unexpected keyword argument 'colour'"),
        (report_of({"case": "a"}), "there is no 'flavour'"),
    ],
)
@pytest.mark.parametrize("name", ["report", "explain"])
def test_a_malformed_result_file_is_an_error_in_one_line(name, text, words, command, tmp_path):
    (tmp_path / "r.json").write_text(text)
    status, out, error = command(name, tmp_path / "r.json")
    assert (status, out) == (2, "")
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_well_formed_one_is_printed(command, tmp_path):
    (tmp_path / "r.json").write_text(report_of())
    assert command("report", tmp_path / "r.json")[0] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[expected", "expected.toml: "),
        ("expected = 3", "`expected` is no list of tables"),
        ("expected = [3]", "`expected` is no list of tables"),
        ("[[other]]", "there is no `[[expected]]`, but other"),
        ('[[expected]]\ncase = 3\nreason = "r"\nlink = "l"', "'case' is a int, expected a str"),
    ],
)
def test_a_malformed_file_of_expected_failures_is_one_line(text, words, command, tmp_path):
    (tmp_path / "expected.toml").write_text(text)
    args = ["run", "--adapter", "faulty:Scaled", "--expected", tmp_path / "expected.toml"]
    status, _, error = command(*args)
    assert status == 2
    assert words in error
    assert len(error.splitlines()) == 1


CASE = {
    "id": "a",
    "file": "a.safetensors",
    "sha256": "0",
    "dtype": "float64",
    "family": "dense",
    "fisher": "type2",
    "part": "block",
    "ops": [],
    "loss": {},
    "batches": [7],
    "damping": None,
    "operator": False,
    "tolerance": 1e-10,
    "layers": ["fc"],
    "sizes": {"fc": {"N": 7}},
    "flavours": {"expand": {}},
}


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        (None, "'cases' is a NoneType, expected a list"),
        ([3], "a case is a int, expected an object"),
        ([{"id": "a"}], "case 'a': there is no 'file'"),
        ([CASE | {"flavours": {}}], "case 'a': it asks for no flavour"),
        ([], "No case of the vectors matches ''"),
    ],
)
def test_a_malformed_manifest_is_one_line(cases, words, command, tmp_path):
    manifest = {"format": "kfac-vectors/1", "cases": cases}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    status, out, error = command("judge", tmp_path, "--vectors", tmp_path)
    assert (status, out) == (2, "")
    assert words in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"scales": []}, "'scales' is a list, expected a dict"),
        ({"not_supported": "all"}, "'not_supported' is a str, expected a dict"),
        ({"scales": {"*": "two"}}, "the scales of * are no numbers, nor null"),
        ({"nmae": "x"}, "unknown fields nmae"),
        ({"name": 3}, "'name' is a int, expected a str"),
    ],
)
def test_a_malformed_about_is_one_line(content, words, command, tmp_path):
    (tmp_path / "about.json").write_text(json.dumps(content))
    status, _, error = command("judge", tmp_path, "-k", "deep-linear-mse-sum-bias")
    assert status == 2
    assert words in error
    assert len(error.splitlines()) == 1


def test_a_choice_of_nothing_is_an_error(command, tmp_path):
    assert command("judge", tmp_path, "-k", "typo")[0] == 2
    assert command("mutants", "-k", "typo")[0] == 2
    assert "There is no finding typo" in command("prove", "typo")[2]
