"""What chapters show is the source that is installed, and pictures of the right numbers."""

from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

from kfac_scratch import linalg
from kfac_scratch.show import STYLES, Source, code, source, style, table


@dataclass(frozen=True)
class Pair:
    """A class to be shown."""

    first: int = 1

    @property
    def second(self) -> int:
        """A property to be shown."""
        return self.first + 1

    @cached_property
    def third(self) -> int:
        """A cached property
        with a docstring of two lines.
        """

        return self.first + 2

    def only_a_docstring(self) -> None:
        """Nothing but this."""


def test_source_is_the_text_of_the_file_under_its_place():
    first, *rest = source(linalg.vec).text.splitlines()
    file, _, line = first.removeprefix("# ").rpartition(":")
    assert file == "kfac_scratch/linalg.py"
    with open(linalg.__file__) as lines:
        text = lines.read().splitlines()
    assert text[int(line) - 1 : int(line) - 1 + len(rest)] == rest
    assert rest[0].startswith("def vec(")


def test_code_leaves_out_the_docstring_and_nothing_else():
    assert '"""' in source(linalg.unvec).text
    assert '"""' not in code(linalg.unvec).text
    kept = code(linalg.unvec).text.splitlines()
    assert [line for line in source(linalg.unvec).text.splitlines() if line in kept] == kept


@pytest.mark.parametrize("show", [source, code])
@pytest.mark.parametrize("shown", [Pair, Pair.second, vars(Pair)["third"], torch.nn.Linear.forward])
def test_classes_methods_and_properties_compile(show, shown):
    assert compile(show(shown).text, "shown", "exec").co_names


def test_decorators_are_shown_and_methods_are_dedented():
    assert "@dataclass(frozen=True)\nclass Pair:" in source(Pair).text
    assert "\n@property\ndef second" in source(Pair.second).text
    assert code(vars(Pair)["third"]).text.splitlines()[-1] == "    return self.first + 2"


def test_a_body_that_is_only_a_docstring_is_kept():
    assert "Nothing but this." in code(Pair.only_a_docstring).text


def test_other_packages_are_named_from_their_top():
    assert source(torch.nn.Linear).text.startswith("# torch/nn/modules/linear.py:")


def test_several_objects_stand_one_below_the_other():
    assert code(linalg.vec, linalg.unvec).text.count("# kfac_scratch/linalg.py:") == 2


def test_markdown_survives_fences_in_the_source():
    shown = Source("'''\n```python\nx\n```\n'''")
    lines = shown._repr_markdown_().splitlines()
    assert lines[0] == "``````python"
    assert lines[-1] == "``````"
    assert repr(shown) == shown.text


def test_a_table_has_text_to_the_left_and_numbers_to_the_right():
    shown = table(["method", "steps", "seconds"], [["KFAC", "8", "1.5"]])
    lines = ["| method | steps | seconds |", "| --- | ---: | ---: |", "| KFAC | 8 | 1.5 |"]
    assert shown._repr_markdown_().splitlines() == repr(shown).splitlines() == lines
    assert "| --- | --- | ---: |" in table(["a", "b", "c"], [], text_columns=2).text


def test_a_row_with_another_number_of_cells_is_refused():
    with pytest.raises(ValueError, match="A row has 1 cells, the head 2"):
        table(["method", "steps"], [["KFAC"]])


@pytest.fixture
def matrices(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    from kfac_scratch.show import matrices

    with matplotlib.rc_context({"backend": "agg"}):
        yield matrices


def test_matrices_share_one_symmetric_scale(matrices):
    figure = matrices({"A": torch.tensor([[1.0, -3.0]]), "B": 2 * torch.eye(3)})
    images = [image for axes in figure.axes for image in axes.get_images()]
    assert [image.get_clim() for image in images] == [(-3.0, 3.0), (-3.0, 3.0)]
    assert images[0].get_array().tolist() == [[1.0, -3.0]]
    assert [axes.get_title() for axes in figure.axes[:2]] == ["A", "B"]
    assert [axes.get_xlabel() for axes in figure.axes[:2]] == ["1 × 2", "3 × 3"]


def test_zero_is_transparent_and_signs_differ(matrices):
    image = matrices({"A": torch.tensor([[-1.0, 0.0, 1.0]])}).axes[0].get_images()[0]
    below, zero, above = image.cmap(image.norm(image.get_array()))[0]
    assert zero[3] < 0.02
    assert below[3] == above[3] == 1.0
    assert below[2] > below[0]
    assert above[0] > above[2]


def test_blocks_are_ruled_off_and_entries_written(matrices):
    figure = matrices({"A": torch.arange(24.0).reshape(4, 6)}, blocks={"A": (2, 3)}, digits=1)
    axes = figure.axes[0]
    assert len(axes.lines) == 2
    assert [text.get_text() for text in axes.texts[:2]] == ["0.0", "1.0"]
    assert len(axes.texts) == 24


def test_vectors_zeros_and_gradients_can_be_drawn(matrices):
    figure = matrices({"v": torch.zeros(3, requires_grad=True)}, scale=None)
    assert figure.axes[0].get_images()[0].get_array().shape == (3, 1)
    assert matrices({"v": torch.ones(3)}, scale=5.0).axes[0].get_images()[0].get_clim() == (-5, 5)


def test_the_figure_is_not_left_open(matrices):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    matrices({"A": torch.eye(2)})
    assert plt.get_fignums() == before


def luminance(colour):
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour, paper):
    low, high = sorted(luminance(c) + 0.05 for c in (colour, paper))
    return high / low


@pytest.mark.parametrize("method", STYLES)
def test_the_style_of_a_method_can_be_seen_on_light_and_on_dark_paper(method):
    matplotlib = pytest.importorskip("matplotlib")
    for ink, paper in (("#23262d", "#ffffff"), ("#d8dbe3", "#1b1d23")):
        with matplotlib.rc_context({"text.color": ink}):
            assert contrast(style(method)["color"], paper) >= 3


def test_styles_differ_by_colour_or_shape():
    pytest.importorskip("matplotlib")
    shapes = [(style(m)["marker"], style(m)["markerfacecolor"] == "none") for m in STYLES]
    assert len({(style(m)["color"], *shape) for m, shape in zip(STYLES, shapes, strict=True)}) == 7
    assert [style(m)["marker"] for m in ("KFAC", "AdamW", "Newton", "gradient")] == list("os^x")


def test_a_curve_can_be_drawn_in_the_style_of_a_method():
    matplotlib = pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    (line,) = Figure().subplots().plot([0, 1], **style("reduce"))
    assert (line.get_marker(), line.get_markerfacecolor()) == ("o", "none")
    assert line.get_color() == style("KFAC")["color"]
    with matplotlib.rc_context({"text.color": "#010203"}):
        assert style("GGN")["color"] == "#010203"  # ink, which the site exchanges


def test_a_method_without_a_style_is_refused():
    with pytest.raises(KeyError, match="'Adam' has no style; these have: KFAC, reduce"):
        style("Adam")
