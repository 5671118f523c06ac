"""Files that cannot be understood: one line on the error stream, status 2, never a traceback.

Status 1 means that something was judged and failed.
"""

import json
import shutil
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kfac_scratch.conformance.__main__ import main
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.selection import expected_failures
from kfac_scratch.conformance.judging import isolation, report
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.vectors import files

CASE, EKFAC = "one-datum-mse-tanh-mean", "ekfac-flattened-mse"
DEEP = 100_000 * "["
ANY_FILE = {  # what no file may be, and what is said
    "empty": (b"", ""),
    "no UTF-8": (b'{"name": "\xff"}', "utf-8"),
    "a list": (b"[1]", ""),
    "a number": (b"5", ""),
    "deep": (f'{{"name": {DEEP}'.encode(), "nested too deeply"),
    "cut": (b'{"name": "x"', ""),
    "NaN": (b'{"name": NaN}', "NaN is not JSON"),
    "a folder": (None, "Is a directory"),
}


def status(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["conformance", *map(str, arguments)])
    return main()


def refused(capsys, monkeypatch, *arguments):
    """What is said about an input that is refused: one line, with status 2 and no table."""
    assert status(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return captured.err


def put(path, content):
    """Write bytes, text or JSON; None is a folder."""
    if content is None:
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


# ---- the manifest of vectors ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def manifest():
    """The shipped manifest with two cases."""
    content = json.loads((files.SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    cases = [case for case in content["cases"] if case["id"] in (CASE, EKFAC)]
    return {"format": content["format"], "cases": cases}


@pytest.fixture
def vectors(tmp_path):
    """A folder with the tensors of two cases, and without a manifest."""
    folder = tmp_path / "vectors"
    folder.mkdir()
    for case in (CASE, EKFAC):
        shutil.copy(files.SHIPPED / f"{case}.safetensors", folder)
    (tmp_path / "results").mkdir()
    return folder


def judging(vectors):
    return ["judge", vectors.parent / "results", "--vectors", vectors]


def test_two_cases_without_results_are_judged(vectors, manifest, monkeypatch, capsys):
    put(vectors / "manifest.json", manifest)
    assert status(monkeypatch, *judging(vectors)) == 1
    assert "about.json does not list it" in capsys.readouterr().out


@pytest.mark.parametrize("name", ANY_FILE)
def test_a_manifest_that_cannot_be_read(name, vectors, monkeypatch, capsys):
    content, words = ANY_FILE[name]
    put(vectors / "manifest.json", content)
    said = refused(capsys, monkeypatch, *judging(vectors))
    assert "manifest.json: " in said
    assert words in said


def expand(expectation, stored):
    return {"expand": {"expectation": expectation, "stored": stored}}


FIELDS = [
    ("id", 5, "'id' is a int"),
    ("id", None, "'id' is a NoneType"),
    ("file", "../results/x.safetensors", "is not in the folder"),
    ("file", ".", "Is a directory"),
    ("sha256", "0", "the manifest says 0"),
    ("dtype", "float16", "unknown dtype 'float16'"),
    ("part", "half", "part 'half'"),
    ("tolerance", 0, "the tolerance is 0"),
    ("tolerance", "1e-10", "the tolerance is '1e-10'"),
    ("tolerance", 1e9, "the tolerance is 1000000000.0"),
    ("layers", [], "the layers are []"),
    ("layers", ["fc9"], "there is no 'fc9'"),
    ("layers", [["fc1"]], "expected names"),
    ("sizes", {}, "sizes: there is no"),
    ("sizes", {"fc1": {"N": 0}, "fc2": {"N": 1}, "fc3": {}}, "{'N': 0}"),
    ("flavours", {}, "it asks for no flavour"),
    (
        "flavours",
        {"exapnd": {}},
        "'exapnd': it is none of",
    ),
    ("flavours", {"expand": "definition"}, "it is a str"),
    (
        "flavours",
        {"expand": {"expectation": "right", "stored": "expected/ggn"}},
        "unknown expectation 'right'",
    ),
    ("flavours", {"expand": {"expectation": "definition"}}, "there is no 'stored'"),
    (
        "flavours",
        {"expand": {"expectation": "definition", "stored": "elsewhere"}},
        "unknown place 'elsewhere'",
    ),
    (
        "flavours",
        {"expand": {"expectation": "definition", "stored": "expected/nothing"}},
        "there is no expected/nothing/",
    ),
    (
        "flavours",
        {"expand": {"expectation": "definition", "stored": "factors/nothing"}},
        "there is no factors/nothing/",
    ),
]


@pytest.mark.parametrize(("key", "value", "words"), FIELDS)
def test_a_case_that_makes_no_sense(key, value, words, vectors, manifest, monkeypatch, capsys):
    first, second = manifest["cases"]
    put(vectors / "manifest.json", manifest | {"cases": [first | {key: value}, second]})
    assert words in refused(capsys, monkeypatch, *judging(vectors))


@pytest.mark.parametrize("key", files.FIELDS)
def test_a_case_that_lacks_something(key, vectors, manifest, monkeypatch, capsys):
    case = {name: value for name, value in manifest["cases"][0].items() if name != key}
    put(vectors / "manifest.json", manifest | {"cases": [case]})
    assert f"there is no {key!r}" in refused(capsys, monkeypatch, *judging(vectors))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"format": "kfac-vectors/2", "cases": []}, "the format is 'kfac-vectors/2'"),
        ({"format": files.VECTORS_FORMAT}, "there is no 'cases'"),
        ({"format": files.VECTORS_FORMAT, "cases": {}}, "'cases' is a dict"),
        ({"format": files.VECTORS_FORMAT, "cases": [5]}, "a case is a int"),
        ({"format": files.VECTORS_FORMAT, "cases": []}, "No case of the vectors"),
    ],
)
def test_a_manifest_of_another_form(content, words, vectors, monkeypatch, capsys):
    put(vectors / "manifest.json", content)
    assert words in refused(capsys, monkeypatch, *judging(vectors))


def test_two_cases_of_one_name(vectors, manifest, monkeypatch, capsys):
    put(vectors / "manifest.json", manifest | {"cases": 2 * manifest["cases"]})
    said = refused(capsys, monkeypatch, *judging(vectors))
    assert f"more than one case is called {EKFAC}, {CASE}" in said


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just(1e308),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=3,
)


def replaced(data, value):
    """JSON with something in it exchanged for junk."""
    if not value or not isinstance(value, dict | list) or data.draw(st.integers(0, 4)) == 0:
        return data.draw(JUNK)
    keys = sorted(value) if isinstance(value, dict) else range(len(value))
    key = data.draw(st.sampled_from(keys))
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    changed = {k: replaced(data, v) if k == key else v for k, v in pairs}
    return changed if isinstance(value, dict) else list(changed.values())


anything = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@anything
@given(data=st.data())
def test_a_manifest_with_anything_in_it_is_no_traceback(data, vectors, manifest, monkeypatch):
    put(vectors / "manifest.json", json.dumps(replaced(data, manifest)))
    assert status(monkeypatch, *judging(vectors)) in (1, 2)


def test_tensors_of_other_shapes_are_named(vectors, manifest, monkeypatch, capsys):
    """Someone has written them: their checksum is right."""
    case = next(c for c in manifest["cases"] if c["id"] == CASE)
    flavours = {"expand": {"expectation": "definition", "stored": "factors/expand"}}
    path, layer = vectors / case["file"], case["layers"][0]
    made = {f"factors/expand/{name}/{x}": torch.eye(2) for name in case["layers"] for x in "AB"}
    save_file(load_file(path) | made, path)
    checksum = files.sha256(path.read_bytes()).hexdigest()
    changed = case | {"flavours": flavours, "sha256": checksum}
    put(vectors / "manifest.json", manifest | {"cases": [changed]})
    said = refused(capsys, monkeypatch, *judging(vectors))
    assert f"the factors of {layer} are [2, 2] and [2, 2]" in said


# ---- what a port says of itself ------------------------------------------------------------------


@pytest.mark.parametrize("name", ANY_FILE)
def test_an_about_that_cannot_be_read(name, vectors, manifest, monkeypatch, capsys):
    content, words = ANY_FILE[name]
    put(vectors / "manifest.json", manifest)
    put(vectors.parent / "results" / "about.json", content)
    said = refused(capsys, monkeypatch, *judging(vectors))
    assert "about.json: " in said
    assert words in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"name": 5}, "'name' is a int"),
        ({"version": None}, "'version' is a NoneType"),
        ({"nmae": "x"}, "unknown fields nmae"),
        ({"scales": [1]}, "'scales' is a list"),
        ({"scales": {"*": "2"}}, "the scales of * are no numbers"),
        ({"scales": {"*": True}}, "the scales of * are no numbers"),
        ({"not_supported": ["*"]}, "'not_supported' is a list"),
        ({"not_supported": {"*": None}}, "the reasons of * in not_supported are no text"),
    ],
)
def test_an_about_that_makes_no_sense(content, words, vectors, manifest, monkeypatch, capsys):
    put(vectors / "manifest.json", manifest)
    put(vectors.parent / "results" / "about.json", content)
    assert words in refused(capsys, monkeypatch, *judging(vectors))


@anything
@given(data=st.data())
def test_an_about_with_anything_in_it_is_no_traceback(data, vectors, manifest, monkeypatch):
    put(vectors / "manifest.json", manifest)
    about = {
        "name": "port",
        "version": "1",
        "scales": {"*": 2.0, f"{CASE} expand fc1 joint": 1.0},
        "not_supported": {EKFAC: "no EKFAC"},
    }
    put(vectors.parent / "results" / "about.json", json.dumps(replaced(data, about)))
    assert status(monkeypatch, *judging(vectors)) in (1, 2)


def test_results_that_are_no_folder(vectors, manifest, monkeypatch, capsys):
    put(vectors / "manifest.json", manifest)
    results = vectors.parent / "results"
    results.rmdir()
    assert "is no folder" in refused(capsys, monkeypatch, *judging(vectors))
    put(results, b"")
    assert "is no folder" in refused(capsys, monkeypatch, *judging(vectors))


# ---- expected failures ---------------------------------------------------------------------------


@pytest.fixture
def _no_run(monkeypatch):
    monkeypatch.setattr(isolation, "start", lambda place: pytest.fail("it ran"))


RUN = ["run", "--adapter", "faulty:Scaled", "-k", CASE, "--expected"]
ENTRY = '[[expected]]\ncase = "{}"\nreason = "r"\nlink = "l"\n'.format


@pytest.mark.usefixtures("_no_run")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Is a directory"),
        (b"\xff", "utf-8"),
        (b"expected = [", "at end of document"),
        (b"x = " + DEEP.encode(), "nested too deeply"),
        (b"expected = 5", "no list of tables"),
        (b"expected = [5]", "no list of tables"),
        (b"excepted = []", "there is no `[[expected]]`"),
        (ENTRY("*") + "flavor = 'ekfac'", "unknown fields ['flavor']"),
        (ENTRY("*") + "flavour = 5", "'flavour' is a int"),
        (ENTRY("*").replace('"r"', "5"), "'reason' is a int"),
        (ENTRY("*").replace('link = "l"', ""), "lacks ['link']"),
        (ENTRY("nothing"), "no case matches 'nothing'"),
    ],
)
def test_expected_failures_that_make_no_sense(content, words, tmp_path, monkeypatch, capsys):
    path = put(tmp_path / "expected.toml", content)
    said = refused(capsys, monkeypatch, *RUN, path)
    assert "expected.toml: " in said
    assert words in said


VALUES = st.one_of(
    st.integers(-3, 3).map(str),
    st.booleans().map(lambda truth: str(truth).lower()),
    st.text(max_size=6).map(json.dumps),
    st.just("[]"),
    st.just("{}"),
    st.just("1979-05-27"),
    st.just("nan"),
)
KEYS = st.sampled_from(["case", "flavour", "reason", "link", "expected", "x"])
HEADS = st.sampled_from(["[[expected]]", "[expected]", "[[expected.x]]", "[x]", ""])
LINES = st.one_of(
    HEADS,
    st.tuples(KEYS, VALUES).map(" = ".join),
    st.just(ENTRY("*")),
    st.text(max_size=8),
)


@anything
@given(lines=st.lists(LINES, max_size=8))
def test_expected_failures_with_anything_in_them_are_read_or_refused(lines, tmp_path):
    """The reasons are texts; whatever makes no sense is refused by one kind of error."""
    path = put(tmp_path / "expected.toml", "\n".join(lines).encode("utf-8", "replace"))
    with suppress(ValueError):
        found = expected_failures(path)
        assert all(task[0] in CASES and isinstance(reason, str) for task, reason in found.items())


@pytest.mark.usefixtures("_no_run")
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_is_none(seconds, monkeypatch, capsys):
    said = refused(capsys, monkeypatch, *RUN[:-1], f"--timeout={seconds}")
    assert "expected seconds" in said


# ---- result files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    """A result file as JSON."""
    result = Result(CASE, "expand", "wrong", "words", 0.5, 0.25, {"fc1 joint": 2.0})
    capabilities = {"name": "curvlinops", "version": "1"}
    made = report.Report(
        capabilities, [result], {CASE: "dense"}, {}, {"date": "today"}, {CASE: "0"}
    )
    return json.loads(report.text(made))


COMMANDS = ["report", "explain"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ANY_FILE)
def test_a_result_file_that_cannot_be_read(name, command, tmp_path, monkeypatch, capsys):
    content, words = ANY_FILE[name]
    said = refused(capsys, monkeypatch, command, put(tmp_path / "r.json", content))
    assert "r.json: " in said
    assert words in said


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("case", 5),
        ("flavour", "exapnd"),
        ("verdict", "excat"),
        ("error", "small"),
        ("residual", [1]),
        ("seconds", {}),
        ("words", 5),
        ("reason", 5),
        ("scales", [1]),
        ("scales", {"fc1 joint": "2"}),
        ("further", 1),
    ],
)
def test_a_result_that_makes_no_sense(key, value, stored, tmp_path, monkeypatch, capsys):
    rows = [stored["results"][0] | {key: value}]
    path = put(tmp_path / "r.json", stored | {"results": rows})
    said = refused(capsys, monkeypatch, "report", path)
    assert "r.json, result 0: " in said
    assert key in said


@anything
@given(data=st.data())
def test_a_result_file_with_anything_in_it_is_no_traceback(data, stored, tmp_path, monkeypatch):
    monkeypatch.setattr("kfac_scratch.conformance.commands.implementers.stale_run", lambda r: "")
    path = put(tmp_path / "r.json", json.dumps(replaced(data, stored)))
    assert status(monkeypatch, "report", path) in (0, 2)


def test_a_failure_of_a_case_that_there_is_not_cannot_be_explained(
    stored, tmp_path, monkeypatch, capsys
):
    rows = [stored["results"][0] | {"case": "gone"}]
    path = put(tmp_path / "r.json", stored | {"results": rows})
    assert "There are no cases gone" in refused(capsys, monkeypatch, "explain", path)
    assert CASE in CASES
