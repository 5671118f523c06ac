"""Figures that a reader can move, moved in Chromium: what is drawn is what Python computes.

A page holds one figure, with the site's style and script and nothing else. Every control is moved
by mouse and by keyboard, on a wide light screen and on a dark phone. After each move, all
coordinates are read back: they equal those that Python draws for the controls' new numbers, and
`tests/moving_figures` turns them into numbers and compares these with the package.
"""

import math
import re
from functools import cache

import pytest

from tests.meta.built_site import ROOT, built_site, chromium, watched
from tests.meta.test_browser import inaccessible
from tests.moving_figures import FIGURES, Drawn, difference

pytestmark = pytest.mark.slow

ASSETS = ROOT / "tutorial" / "assets"
WIDE = {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"}
PHONE = {
    "viewport": {"width": 390, "height": 844},
    "color_scheme": "dark",
    "is_mobile": True,
    "has_touch": True,
}
SCREENS = {"wide": WIDE, "phone": PHONE}
FRAME = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>A figure</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="{style}">
<style>body {{ margin: 12px 16px; font: 16px system-ui; background: var(--paper); }}
main {{ max-width: 60rem; }}</style></head><body><main><h1>A figure</h1>{figure}</main>
<script src="{script}"></script></body></html>"""
WITH_KNOB = {
    "damping_filter": ["damping"],
    "valley_steps": ["u", "w"],
    "probability_triangle": ["first", "second"],
}
PAGE_BUDGET = 400_000

each_figure = pytest.mark.parametrize("kind", FIGURES)
each_screen = pytest.mark.parametrize("screen", SCREENS)


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


@cache
def drawn_by_python(kind, values=()):
    return FIGURES[kind].draw(**dict(values)).html()


@pytest.fixture
def visit(browser, tmp_path):
    """Open a page that holds one figure, with the given script."""
    contexts = []

    def visit(kind, screen="wide", script=None, **more):
        page_file, script_file = tmp_path / "page.html", ASSETS / "moving.js"
        if script is not None:
            script_file = tmp_path / "moving.js"
            script_file.write_text(script, encoding="utf-8")
        addresses = {"style": (ASSETS / "moving.css").as_uri(), "script": script_file.as_uri()}
        text = FRAME.format(figure=drawn_by_python(kind), **addresses)
        page_file.write_text(text, encoding="utf-8")
        context = browser.new_context(**{**SCREENS[screen], "reduced_motion": "reduce", **more})
        contexts.append(context)
        page = watched(context.new_page())
        page.goto(page_file.as_uri())
        if more.get("java_script_enabled", True):
            page.wait_for_selector("figure.moving.ready", timeout=10_000)
        return page

    yield visit
    for context in contexts:
        context.close()


def shown(page):
    return Drawn(page.locator("figure.moving").evaluate("f => f.outerHTML"))


def numbers(page, kind):
    """The numbers of the controls, by the positions of the sliders."""
    found = {}
    for control in FIGURES[kind].draw().controls if kind not in _controls else _controls[kind]:
        position = float(page.locator(f"input[name={control.name}]").input_value())
        found[control.name] = 10**position if control.log else position
    return found


_controls = {}


def judge(page, kind):
    """Compare the page with Python and with the package; return the controls' numbers."""
    if kind not in _controls:
        _controls[kind] = FIGURES[kind].draw().controls
    values, drawing = numbers(page, kind), shown(page)
    assert difference(drawing, Drawn(drawn_by_python(kind, tuple(values.items())))) < 1e-6
    FIGURES[kind].check(drawing, values)
    assert page.problems == []
    return values


def centre(locator):
    locator.evaluate("e => e.scrollIntoView({ block: 'center' })")
    box = locator.bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


@each_screen
@each_figure
def test_every_slider_moves_the_figure_by_keyboard_and_by_mouse(visit, kind, screen):
    page = visit(kind, screen)
    before = judge(page, kind)
    for name in before:
        slider = page.locator(f"input[name={name}]")
        slider.focus()
        for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "PageUp", "Home", "End"):
            page.keyboard.press(key)
            if key in ("ArrowRight", "Home", "End"):
                after = judge(page, kind)
                assert after[name] != before[name]
                before = after
        for share in (0.3, 0.75):
            x, y = centre(slider)
            width = slider.bounding_box()["width"]
            page.mouse.click(x + (share - 0.5) * width, y)
            after = judge(page, kind)
            assert after[name] != before[name]
            before = after


@each_screen
@pytest.mark.parametrize("kind", WITH_KNOB)
def test_a_knob_can_be_dragged(visit, kind, screen):
    page = visit(kind, screen)
    before = judge(page, kind)
    x, y = centre(page.locator("[data-move=hit]"))
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 35, y - 30, steps=4)
    page.mouse.up()
    after = judge(page, kind)
    assert all(after[name] != before[name] for name in WITH_KNOB[kind])
    page.mouse.move(x, y)  # released: the pointer moves nothing any more
    assert judge(page, kind) == after
    knob = centre(page.locator("[data-move=knob]"))
    assert abs(knob[0] - x - 35) < 12  # it is where the pointer left it, up to the slider's grid
    page.locator("[data-move=hit]").hover()
    page.mouse.down()
    page.mouse.move(3, 3, steps=3)  # beyond the edge
    page.mouse.up()
    judge(page, kind)


@each_screen
def test_a_cell_can_be_pointed_at(visit, screen):
    page = visit("kronecker_cells", screen)
    judge(page, "kronecker_cells")
    cells = page.locator("[data-panel=product]")
    cells.evaluate("e => e.scrollIntoView({ block: 'center' })")
    box = cells.bounding_box()
    side = (12 * 26 + 22) / box["width"]  # units of the drawing in a pixel
    for row, column in ((2, 7), (11, 0), (5, 5)):
        x, y = ((20 + 26 * (place + 0.5)) / side for place in (column, row))
        if screen == "phone":
            page.touchscreen.tap(box["x"] + x, box["y"] + y)
        else:
            page.mouse.move(box["x"] + x, box["y"] + y)
        assert judge(page, "kronecker_cells") == {"row": row, "column": column}


@each_screen
@each_figure
def test_all_targets_are_at_least_44_pixels(visit, kind, screen):
    page = visit(kind, screen)
    for target in page.locator("figure input[type=range]").all():
        assert target.bounding_box()["height"] >= 44
        assert target.bounding_box()["width"] >= 90
    for target in page.locator("[data-move=hit]").all():
        assert min(target.bounding_box()["width"], target.bounding_box()["height"]) >= 44


@each_screen
@each_figure
def test_a_figure_fits_its_screen_and_its_text_can_be_read(visit, kind, screen):
    page = visit(kind, screen)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    sizes = page.evaluate(
        """() => [...document.querySelectorAll('svg.drawing text')].map(t =>
            parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"""
    )
    assert all(size >= 11 for size in sizes if size)


@each_figure
def test_without_a_script_the_drawing_is_complete_and_no_control_is_dead(visit, kind):
    page = visit(kind, java_script_enabled=False)
    html = page.content()
    start = Drawn(drawn_by_python(kind))
    assert difference(Drawn(html), start) == 0
    assert page.locator("figure input").count() == 0
    assert not page.locator(".controls").is_visible()
    assert not any(knob.is_visible() for knob in page.locator(".knob, .hit").all())
    assert page.locator("figcaption").is_visible()
    for svg in page.locator("svg[data-panel]").all():
        assert svg.is_visible()


@each_figure
def test_the_script_starts_with_what_python_has_drawn(visit, kind):
    page = visit(kind)
    assert difference(shown(page), Drawn(drawn_by_python(kind))) < 1e-6
    state = Drawn(drawn_by_python(kind)).state
    assert re.sub("&thinsp;", "\u2009", shown(page).state) == re.sub("&thinsp;", "\u2009", state)


@each_figure
def test_print_has_no_controls_and_light_colours(visit, kind):
    page = visit(kind, "phone")
    ink = "getComputedStyle(document.querySelector('figure')).color"
    assert page.evaluate(ink) != "rgb(0, 0, 0)"
    page.emulate_media(media="print")
    assert not page.locator(".controls").is_visible()
    assert not any(knob.is_visible() for knob in page.locator(".knob, .hit").all())
    assert page.evaluate(ink) == "rgb(0, 0, 0)"
    paper = "getComputedStyle(document.documentElement).getPropertyValue('--paper').trim()"
    assert page.evaluate(paper) == "#fff"


@each_screen
@each_figure
def test_a_figure_is_accessible(visit, kind, screen):
    page = visit(kind, screen)
    assert inaccessible(page) == ""
    for slider in page.locator("figure input").all():
        assert slider.get_attribute("aria-valuetext")
        slider.focus()
        assert slider.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"


def test_transitions_respect_reduced_motion(visit):
    duration = "getComputedStyle(document.querySelector('.dot')).transitionDuration"
    assert visit("matched_pairs").evaluate(duration) == "0s"
    assert "0.12s" in visit("matched_pairs", reduced_motion="no-preference").evaluate(duration)


MISTAKES = {  # one for each kind, and some for what all of them use
    "damping_filter": ("v / (v + damping)", "v / (v + 1.001 * damping)"),
    "valley_steps": ("hw += (2 * r * s * xn) / N", "hw += (r * s * xn) / N"),
    "kronecker_cells": (
        "[i, j, k, m] = [Math.floor(row / d)",
        "[i, j, k, m] = [Math.floor(row / D)",
    ),
    "matched_pairs": ("(i === j ? share * k : 0)", "(i === j ? share : 0)"),
    "pool_position": ("half <= 2 * pool)", "half <= pool)"),
    "probability_triangle": ("Math.sqrt(q) * (", "q * ("),
    "online_eigenpairs": ("const t = seen - 1, own", "const t = seen % 7, own"),
}
COMMON = [
    ("const low = even(a)", "const low = a"),
    ("Math.sqrt(Math.abs(v) / limit)", "Math.abs(v) / limit"),
    ("control.log ? 10 ** input.value", "control.log ? Math.exp(input.value)"),
]
WRONG = [(kind, *mistake) for kind, mistake in MISTAKES.items()] + [
    ("damping_filter", *COMMON[0]),
    ("matched_pairs", *COMMON[1]),
    ("valley_steps", *COMMON[2]),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), WRONG)
def test_a_mistake_in_the_script_would_be_found(visit, kind, right, wrong):
    text = (ASSETS / "moving.js").read_text(encoding="utf-8")
    assert right in text
    page = visit(kind, script=text.replace(right, wrong))
    with pytest.raises(AssertionError):
        judge(page, kind)
    drawing, values = shown(page), numbers(page, kind)
    with pytest.raises((AssertionError, ValueError, KeyError)):
        FIGURES[kind].check(drawing, values)


def test_no_kind_is_without_a_test_and_the_script_is_small():
    text = (ASSETS / "moving.js").read_text(encoding="utf-8")
    assert set(re.findall(r"kinds\.(\w+) = ", text)) == set(FIGURES) == set(MISTAKES)
    assert len(text.encode()) < 20_000
    assert "http" not in text.replace("http://www.w3.org", "")
    assert "import " not in text


# ------------------------------------------------------------------ on the site
@cache
def pages_with_figures():
    found = {page: page.read_text(encoding="utf-8") for page in built_site().glob("[0-9]*.html")}
    return {page: text for page, text in found.items() if 'class="moving"' in text}


def test_chapters_have_figures_and_stay_within_the_budget():
    assert len(pages_with_figures()) >= 4
    for page, text in pages_with_figures().items():
        figures = re.findall(r'<figure class="moving".*?</figure>', text, re.DOTALL)
        assert all(len(figure.encode()) < 100_000 for figure in figures), page.name
        assert sum(len(figure.encode()) for figure in figures) < PAGE_BUDGET / 4, page.name


@each_screen
def test_figures_of_chapters_can_be_moved(browser, screen):
    """The theme changes neither their drawings nor their controls."""
    for path, text in pages_with_figures().items():
        context = browser.new_context(**SCREENS[screen])
        page = context.new_page()
        problems = []
        page.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
        page.goto(path.as_uri())
        page.wait_for_selector("figure.moving.ready", timeout=30_000)
        for figure in page.locator("figure.moving").all():
            kind = figure.get_attribute("data-figure")
            html = re.search(
                rf'<figure class="moving" id="moving-{kind}".*?</figure>', text, re.DOTALL
            )
            at_start = Drawn(figure.evaluate("f => f.outerHTML"))
            assert difference(at_start, Drawn(html[0])) < 1e-6, (path.name, kind)
            slider = figure.locator("input").first
            slider.focus()
            page.keyboard.press("ArrowRight")
            moved = difference(Drawn(figure.evaluate("f => f.outerHTML")), at_start)
            assert moved > 1e-3, (path.name, kind)
            assert math.isfinite(moved) or kind == "pool_position"
            assert slider.bounding_box()["height"] >= 44
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), path.name
        assert problems == []
        context.close()
