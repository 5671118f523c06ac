"""Every chapter runs from top to bottom as a plain script and has the form of a chapter."""

import re
import runpy
from itertools import groupby, pairwise
from pathlib import Path

import pytest
import torch

matplotlib = pytest.importorskip("matplotlib")
pytest.importorskip("matplotlib.pyplot")  # the attribute
jupytext = pytest.importorskip("jupytext")
nbformat = pytest.importorskip("nbformat")

TUTORIAL = Path(__file__).resolve().parents[2] / "tutorial"
CHAPTERS = sorted(TUTORIAL.glob("[0-9]*.py"))
NUMERALS = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"]
DRAWS = re.compile(r"\b(plt\.(subplots|figure|plot)|matrices)\(")

QUICK = ("01", "04", "26")  # the site build runs all of them
each_chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


@pytest.fixture
def defaults(monkeypatch):
    """Leave torch and matplotlib as they were, whatever a chapter sets."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    monkeypatch.setenv("MPLBACKEND", "agg")
    with matplotlib.rc_context({"backend": "agg"}):
        yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None if device.type == "cpu" else device)
    matplotlib.pyplot.close("all")


def cells(path):
    """Text and code cells of a chapter, without the header that names the kernel."""
    return [cell for cell in jupytext.read(path).cells if cell.cell_type != "raw"]


def code_cells(path):
    return [cell for cell in cells(path) if cell.cell_type == "code"]


def test_there_are_chapters():
    assert CHAPTERS
    numbers = [int(path.name[:2]) for path in CHAPTERS]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.long
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path, id=path.stem, marks=[pytest.mark.slow] * (not path.name.startswith(QUICK))
        )
        for path in CHAPTERS
    ],
)
@pytest.mark.filterwarnings(
    "error",
    "ignore:FigureCanvasAgg is non-interactive",
    "ignore:.*torch.jit.script.*:DeprecationWarning",  # PyTorch's own, at its first jvp
)
def test_runs_as_a_script(path, defaults, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # a chapter needs no file beside it
    runpy.run_path(str(path), run_name="__main__")
    assert not list(tmp_path.iterdir())


@each_chapter
def test_is_a_valid_notebook(path):
    notebook = jupytext.read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


@each_chapter
def test_states_number_title_part_and_question(path):
    first = cells(path)[0]
    assert first.cell_type == "markdown"
    title, opening = first.source.split("\n\n")[:2]
    assert title.startswith(f"# {int(path.name[:2])}. ")
    assert re.match(r"\*\*Part [IVX]+: .+?\.\*\* ", opening)
    assert opening.endswith("?")


def parts_in_order(openings):
    """Whether numerals of parts only rise, so that each stands together under one name."""
    stated = [re.match(r"\*\*Part (\w+): (.+?)\.\*\* ", opening).groups() for opening in openings]
    numerals = [NUMERALS.index(numeral) for (numeral, _), _ in groupby(stated)]
    return all(before < after for before, after in pairwise(numerals))


def test_chapters_of_a_part_agree_on_its_name_and_parts_begin_in_their_order():
    """On the site a part holds all of its chapters, whatever their numbers."""
    openings = [cells(path)[0].source.split("\n\n")[1] for path in CHAPTERS]
    parts = [re.match(r"\*\*Part (\w+: .+?)\.\*\* ", opening)[1] for opening in openings]
    first = list(dict.fromkeys(parts))
    assert parts_in_order(sorted(openings, key=lambda o: first.index(parts[openings.index(o)])))


@pytest.mark.parametrize(
    "wrong",
    [["I: A", "II: B", "I: A"], ["I: A", "I: a", "II: B"], ["II: B", "I: A"]],
    ids=["apart", "two names", "falling"],
)
def test_parts_out_of_order_would_be_found(wrong):
    assert not parts_in_order(f"**Part {part}.** Why?" for part in wrong)
    assert parts_in_order(["**Part I: A.** Why?", "**Part I: A.** Why?", "**Part III: B.** Why?"])


@each_chapter
def test_figures_have_a_text_alternative(path):
    for cell in code_cells(path):
        if DRAWS.search(cell.source):
            assert len(cell.metadata.get("alt", "")) > 30, cell.source
            assert cell.metadata.get("caption"), cell.source


WHITE_IN_THE_MIDDLE = ("RdBu", "bwr", "seismic", "coolwarm", "PiYG", "PRGn", "BrBG", "PuOr")


@each_chapter
def test_no_picture_is_a_bright_field_on_a_dark_page(path):
    """Numbers of both signs have the colours of `show.diverging`, whose middle is transparent."""
    for cell in code_cells(path):
        assert not [name for name in WHITE_IN_THE_MIDDLE if name in cell.source]


@each_chapter
def test_asserts_what_it_claims(path):
    assert any(re.search(r"^\s*assert", cell.source, re.MULTILINE) for cell in code_cells(path))


@each_chapter
def test_is_plain_python(path):
    """No magics or shell commands; jupytext would have commented them out."""
    for cell in code_cells(path):
        assert not re.search(r"^\s*(# )?[%!]\w", cell.source, re.MULTILINE), cell.source


@each_chapter
def test_numbers_equations_by_its_own_number(path):
    for number in re.findall(r"\\tag\{(\d+)\.\d+\w?\}", path.read_text()):
        assert int(number) == int(path.name[:2])


@pytest.mark.parametrize("page", sorted(TUTORIAL.glob("*.md")), ids=lambda page: page.stem)
def test_code_on_pages_runs(page, defaults):
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, str(page), "exec"), {})
