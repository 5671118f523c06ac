"""How an executed notebook becomes a page: what is folded, and what stands beside a text."""

import importlib
import json

import pytest

from tests.meta.built_site import missing

pytestmark = pytest.mark.slow  # needs packages of the docs extra, which plain tests go without


@pytest.fixture(autouse=True)
def _packages():
    missing("jupytext", "nbformat", "nbclient", "nbconvert")


def page(*cells):
    v4, notebook = importlib.import_module("nbformat.v4"), importlib.import_module("notebook")
    nb = v4.new_notebook(
        cells=[v4.new_markdown_cell("# 1. Title\n\n## A section\n\nText."), *cells]
    )
    return notebook.render(nb, "01_probe")[0]


def cell(source, *tags, output="", **metadata):
    v4 = importlib.import_module("nbformat.v4")
    made = v4.new_code_cell(source, metadata={"tags": list(tags), **metadata})
    if output:
        made.outputs = [v4.new_output("stream", name="stdout", text=output)]
    return made


def test_the_set_up_is_folded_by_itself_and_says_so():
    text = page(cell("import torch\n\nset_up()  # seed 0"), cell("x = 1"))
    folded, open_ = text.split("</details>")
    assert "<summary>Set-up</summary>" in folded
    assert "import torch" in folded
    assert "x = 1" in open_
    assert "<details" not in page(cell("found = set_up_of(1)"))
    assert page(cell("set_up()", "hide-input")) == page(cell("set_up()"))
    assert "<summary>Set-up</summary>" in page(cell('set_up(device="cpu")'))


def test_a_fold_has_the_title_that_its_cell_states():
    assert "<summary>Code</summary>" in page(cell("x = 1", "hide-input"))
    checked = page(cell("assert 1 == 1", "hide-input", fold="Checked: one is one"))
    assert "<summary>Checked: one is one</summary>" in checked


@pytest.mark.parametrize("length", [62, 63])
def test_code_that_would_be_cut_stands_below_its_text(length):
    """In the source of a cell, and in what it prints."""
    line = "x = " + "1" * (length - 4)
    beside = '<div class="beside"'
    assert (beside in page(cell(line, "beside"))) == (length == 62)
    assert (beside in page(cell("x", "beside", output=line))) == (length == 62)
    assert beside in page(cell("x", "beside"))
    assert (beside in page(cell(line, "beside", "remove-input", output="x"))) is True


def test_a_chapter_runs_again_when_a_file_that_it_shows_has_changed(tmp_path):
    digest = importlib.import_module("notebook").digest
    chapter, other = tmp_path / "00_t.py", tmp_path / "01_t.py"
    chapter.write_text("# see shown.py")
    other.write_text("# see nothing")
    shown = tmp_path / "shown.py"
    shown.write_text("x = 1")
    before = digest(chapter, tmp_path / "no"), digest(other, tmp_path / "no")
    shown.write_text("x = 2")
    after = digest(chapter, tmp_path / "no"), digest(other, tmp_path / "no")
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_a_chapter_runs_again_when_the_package_has_changed(tmp_path):
    """Read once in a build, and again in the next one."""
    notebook = importlib.import_module("notebook")
    chapter, module = tmp_path / "00_t.py", tmp_path / "package" / "module.py"
    chapter.touch()
    module.parent.mkdir()
    module.write_text("x = 1")
    before = notebook.digest(chapter, module.parent)
    module.write_text("x = 2")
    notebook.forget()
    assert notebook.digest(chapter, module.parent) != before


def downloaded(*cells, address=""):
    """A notebook as readers get it, and its text."""
    v4, notebook = importlib.import_module("nbformat.v4"), importlib.import_module("notebook")
    nb = v4.new_notebook(cells=[v4.new_markdown_cell("# 7. Title, [on](08_next.py)"), *cells])
    before = json.dumps(nb)
    data = notebook.download(nb, "07_probe", address)
    assert data == notebook.download(nb, "07_probe", address)
    assert json.dumps(nb) == before
    return json.loads(data)["cells"], data.decode()


def test_a_downloaded_notebook_says_how_to_install_and_has_the_outputs():
    made = cell("print(1)", output="1\n")
    made.metadata.execution = {"iopub.execute_input": "2026-01-01T00:00:00Z"}
    made.execution_count = 5
    (first, title, code), text = downloaded(made)
    assert "Chapter 7" in first["source"]
    assert "in a clone of the repository `pip install" in first["source"].replace("\n> ", "")
    assert title["source"] == "# 7. Title, [on](08_next.ipynb)"
    assert code["outputs"][0]["text"] == "1\n"
    assert code["execution_count"] == 1
    assert "2026" not in text
    assert "git clone https://host/a/b" in downloaded(made, address="https://host/a/b")[1]


def test_a_downloaded_notebook_collapses_what_the_page_folds():
    made = [cell("x"), cell("x", "hide-input"), cell("x", "remove-input")]
    hidden = [c["metadata"].get("jupyter", {}) for c in downloaded(*made)[0][2:]]
    assert hidden == [{}, {"source_hidden": True}, {"source_hidden": True}]


def test_a_downloaded_figure_has_the_colours_of_paper():
    v4, notebook = importlib.import_module("nbformat.v4"), importlib.import_module("notebook")
    ink, paper = notebook.PLACEHOLDERS
    made, data = cell("plot()"), {"image/svg+xml": f'<svg width="9"><g fill="{ink}"/>{paper}</svg>'}
    made.outputs = [v4.new_output("display_data", data=data)]
    svg = downloaded(made)[0][2]["outputs"][0]["data"]["image/svg+xml"]
    (dark, white) = notebook.COLOURS[""]
    assert svg == f'<svg style="background: {white}" width="9"><g fill="{dark}"/>{white}</svg>'
