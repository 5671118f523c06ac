"""Figures that a reader can move: what Python draws is what the package computes."""

import base64
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from kfac_scratch import kfac
from kfac_scratch.checks import assert_exact
from kfac_scratch.curvature import hessian
from kfac_scratch.moving.descent import TwoWeights, valley_paths
from kfac_scratch.moving.drawing import (
    MARKERS,
    SHEET,
    Panel,
    Scale,
    grid,
    markers,
    number,
    plain,
    significant,
    swatch,
    ticks,
)
from kfac_scratch.moving.figure import MIME, MovingFigure, Slider
from kfac_scratch.moving.filtering import damping_filter
from kfac_scratch.moving.following import online_eigenpairs
from kfac_scratch.moving.pairing import matched_pairs, paired
from kfac_scratch.moving.pooling import pool_position, which_is_exact
from kfac_scratch.show import STYLES
from tests.moving_figures import FIGURES, Drawn, difference, pooled, stream
from tests.test_show import contrast

ROOT = Path(__file__).resolve().parents[1]

each_figure = pytest.mark.parametrize("kind", FIGURES)
STATES = [(kind, state) for kind, tried in FIGURES.items() for state in ({}, *tried.states)]
BUDGET = 100_000  # bytes of a figure on the site


@pytest.mark.parametrize(("kind", "state"), STATES, ids=str)
def test_a_drawing_shows_what_the_package_computes(kind, state):
    figure = FIGURES[kind].draw(**state)
    values = {control.name: control.value for control in figure.controls}
    assert all(math.isclose(values[name], v, abs_tol=1e-12) for name, v in state.items())
    FIGURES[kind].check(Drawn(figure.html()), values)


@each_figure
def test_a_drawing_at_another_state_would_be_refused(kind):
    """The checks are strong enough to tell two states apart."""
    figure, other = FIGURES[kind].draw(), FIGURES[kind].draw(**FIGURES[kind].states[0])
    values = {control.name: control.value for control in other.controls}
    assert difference(Drawn(figure.html()), Drawn(other.html())) > 1e-3
    with pytest.raises(AssertionError):
        FIGURES[kind].check(Drawn(figure.html()), values)


@each_figure
def test_the_html_for_the_site_is_one_block_within_the_budget(kind):
    text = FIGURES[kind].draw().html()
    assert text.startswith("<figure")
    assert text.endswith("</figure>")
    assert "\n\n" not in text
    assert "`" not in text
    assert len(text.encode()) < BUDGET
    assert text.count("<script") == text.count('<script type="application/json">') == 1
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(set(ids)) == len(ids)
    assert all(f'id="{name}"' in text for name in re.findall(r"url\(#([^)]+)\)", text))


@each_figure
def test_every_figure_says_what_it_shows(kind):
    figure = FIGURES[kind].draw()
    assert len(figure.alt) > 30
    assert len(plain(figure.caption)) > 60
    assert figure.caption.startswith("<b>")  # what to move
    assert len({panel.name for panel in figure.panels}) == len(figure.panels)
    assert all(panel.title for panel in figure.panels)
    assert kind in repr(figure)


@each_figure
def test_a_notebook_shows_a_static_picture_without_any_script(kind):
    figure = FIGURES[kind].draw()
    bundle = figure._repr_mimebundle_()
    assert bundle[MIME] == figure.html()
    shown = bundle["text/html"]
    assert "<script" not in shown
    assert figure.caption in shown
    assert figure.state in shown
    assert figure.table in shown
    data = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', shown)[1]
    root = ElementTree.fromstring(base64.b64decode(data))
    namespace = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{namespace}svg"
    assert len(root.findall(f"{namespace}svg")) == len(figure.panels)
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    for panel in root.findall(f"{namespace}svg"):  # all of them lie within it
        assert float(panel.attrib["x"]) + float(panel.attrib["width"]) <= width
        assert float(panel.attrib["y"]) + float(panel.attrib["height"]) <= height


@each_figure
def test_drawing_a_figure_leaves_the_random_numbers_of_a_chapter_alone(kind):
    FIGURES[kind].draw()  # whose data are made once
    before = torch.get_rng_state()
    FIGURES[kind].draw()
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------ drawing
@pytest.mark.parametrize("axis", [Scale(-1, 3, 40, 200), Scale(1e-9, 10, 34, 388, log=True)])
def test_a_scale_and_its_inverse(axis):
    for value in (axis.low, 2.0, axis.high):
        assert axis.value(axis.at(value)) == pytest.approx(value, rel=1e-12)
    assert (axis.at(axis.low), axis.at(axis.high)) == (axis.start, axis.end)
    assert str(axis).endswith("log") == axis.log


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.1, "0.100"),
        (-2.5, "−2.50"),
        (123.0, "123"),
        (1e-4, "1.00 · 10⁻⁴"),
        (-12345.0, "−1.23 · 10⁴"),
    ],
)
def test_numbers_for_readers(value, text):
    assert significant(value) == text


def test_numbers_of_a_drawing_have_nine_digits_and_texts_stay():
    assert number(1 / 3) == "0.333333333"
    assert number("a") == "a"
    assert ticks(130) == [0, 50, 100]
    assert ticks(2.2, most=3) == [0, 1, 2]
    assert plain("<i>B</i> ⊗ A") == "B ⊗ A"


def test_entries_of_a_matrix_are_signed_and_opaque_by_their_root():
    panel = grid("M", "a matrix", 1, 2, 10)
    panel.matrix("entry", [[1.0, -0.25]], limit=1.0)
    _, one, two = panel.nodes
    assert 'class="plus" data-move="entry 0 0"' in one
    assert 'fill-opacity="1"' in one
    assert 'class="minus" data-move="entry 0 1" x="11"' in two
    assert 'fill-opacity="0.5"' in two


def test_an_attribute_that_is_empty_is_not_written():
    panel = Panel("p", "<i>a</i> panel", Scale(0, 1, 0, 10), Scale(0, 1, 10, 0), (10, 10))
    panel.add("rect", stroke_width=2.0)
    assert panel.nodes == ['<rect stroke-width="2"/>']
    assert 'aria-label="a panel"' in panel.svg()


def test_colours_and_shapes_are_those_of_the_book():
    """One shape for a method: in drawings, and in matplotlib's figures."""
    shapes = {"o": "circle", "s": "rect", "^": "path", "x": "path"}
    for method, shape in MARKERS.items():
        (name,) = [name for name in STYLES if name.lower() == method]
        assert shape.startswith(f"<{shapes[STYLES[name][1]]}")
        assert f"var(--{method}," in SHEET
        assert f'class="mark {method}"' in swatch(method)
    assert markers("x", ["kfac"]).count('id="x-kfac"') == 1


def test_the_sites_colours_cover_all_schemes_and_begin_with_those_of_a_lone_drawing():
    """Four lists of variables: light, dark, dark without the theme, and print."""
    css = (ROOT / "tutorial" / "assets" / "moving.css").read_text(encoding="utf-8")
    lists = [
        dict(re.findall(r"--([a-z]+): (#\w+);", block))
        for block in re.findall(r"{([^{}]*--ink:[^{}]*)}", css)
    ]
    assert len(lists) == 4
    assert all(found.keys() == lists[0].keys() for found in lists)
    assert lists[1] == lists[2]
    alone = dict(re.findall(r"var\(--([a-z]+),(#\w+)\)", SHEET))
    assert alone.keys() <= lists[0].keys()
    for name, colour in alone.items():
        assert lists[0][name] == (colour if len(colour) == 7 else "#ffffff")
    assert {*MARKERS, "ekfac"} <= lists[0].keys()
    for light, paper in ((lists[0], "#ffffff"), (lists[1], "#1b1d23")):
        for method in {*MARKERS, "ekfac"}:
            assert contrast(light[method], paper) >= 4.5, method


# ------------------------------------------------------------------ controls
def test_a_control_starts_on_its_grid():
    control = Slider("damping", "damping", -9, 1, 0.05, math.log10(1.1e-4), log=True)
    assert control.start == -3.95
    assert control.value == pytest.approx(10**-3.95)


def test_a_start_outside_of_the_range_is_refused():
    with pytest.raises(ValueError, match="damping starts at 3, which is not in -9 to 1"):
        Slider("damping", "damping", -9, 1, 0.05, 3)


def test_a_figure_is_a_value():
    figure = MovingFigure("none", (), (), {}, "", "", "nothing at all")
    assert figure == MovingFigure("none", (), (), {}, "", "", "nothing at all")


# ------------------------------------------------------------------ what captions claim
def test_newton_leaves_the_picture_where_damping_cancels_an_eigenvalue_and_the_ggn_arrives():
    paths, last = valley_paths((0.4, 0.5), 0.1)
    valley = TwoWeights()
    valley.at(torch.tensor([0.4, 0.5]))
    H = hessian(valley.model, valley.loss, valley.X, valley.y)
    assert abs(torch.linalg.eigvalsh(H)[0] + 0.1) < 0.005
    assert max(abs(v) for point in paths["newton"] for v in point) > 10
    assert max(abs(v) for point in paths["ggn"] for v in point) < 2
    assert last["ggn"] < 0.0206 < last["newton"]
    assert max(abs(v) for p in valley_paths((0.4, 0.5), 1e-4)[0]["ggn"] for v in p) > 10


def test_kfac_is_behind_the_ggn_at_the_start_of_the_figure():
    last = valley_paths((2.7, 2.3), 0.1)[1]
    assert last["ggn"] < 1.01 * 0.02051 < last["kfac"] < last["gradient"]


def test_the_factors_do_not_depend_on_the_pairing():
    torch.manual_seed(0)
    a, g = torch.randn(5, 3), torch.randn(5, 2)
    products = [kfac(paired(a, g, share).io).dense() for share in (0.0, 0.45, 1.0)]
    for product in products[1:]:
        assert_exact(product, products[0])
    assert paired(a, g, 0.0).error < 1e-12
    for share in (0.5, 1.0):
        found = paired(a, g, share)
        assert found.error == pytest.approx(found.covariance, rel=1e-10)
        assert found.error == pytest.approx(share * paired(a, g, 1.0).error, rel=1e-10)


# ------------------------------------------------------------------ the border
def test_a_spectrum_without_a_positive_eigenvalue_is_refused():
    with pytest.raises(ValueError, match="at least one positive eigenvalue"):
        damping_filter(torch.zeros(3))


def test_a_chain_needs_every_place_of_the_average():
    with pytest.raises(ValueError, match="3 layers have 5 places, not 4"):
        pool_position(dict(list(pooled().items())[:4]))


def test_a_share_is_between_zero_and_one():
    with pytest.raises(ValueError, match="share of matched pairs starts at 2"):
        matched_pairs(torch.randn(3, 2), torch.randn(3, 2), 2.0)


@pytest.mark.parametrize(
    ("errors", "word"),
    [((0.0, 0.0), "both"), ((0.0, 1.0), "expand"), ((1.0, 0.0), "reduce"), ((1.0, 1.0), "neither")],
)
def test_the_exact_flavour_has_a_name(errors, word):
    assert which_is_exact(*errors) == word


def test_a_difference_of_two_drawings_is_found():
    html = '<svg data-panel="p" data-x="0 1 0 1" data-y="0 1 0 1">'
    html += '<path data-move="m" d="M1 {}"/></svg>'
    html += '<p class="state">{}</p>'
    one, two, other = (Drawn(html.format(v, "")) for v in ("2", "2.5", "2L3 4"))
    assert difference(one, one) == 0
    assert difference(one, two) == 0.5 / 2.5
    assert difference(one, other) == float("inf")


def test_a_stream_needs_batches_and_ranks_that_fit():
    with pytest.raises(ValueError, match="at least one batch"):
        online_eigenpairs([])
    with pytest.raises(ValueError, match="8 eigenpairs and 2 columns exceed the 9 rows"):
        online_eigenpairs(stream(), ranks=(2, 8))
