"""The site opened from disk in Chromium, with the network switched off."""

from functools import cache
from pathlib import Path

import pytest

from tests.meta.built_site import built_site, chromium, once, pages, watched

pytestmark = pytest.mark.slow

READY = "document.documentElement.dataset.math === 'ready'"
DESKTOP = {"viewport": {"width": 1280, "height": 800}}
PHONE = {"viewport": {"width": 390, "height": 844}, "is_mobile": True}
SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]

BROKEN_MATH = """() => [...document.querySelectorAll('mjx-merror, mjx-mtext')]
    .filter(e => e.matches('mjx-merror') || /red/.test(e.getAttribute('style') || ''))
    .map(e => e.getAttribute('data-mjx-error') || e.textContent)"""
UNTYPESET = """() => [...document.querySelectorAll('.arithmatex')]
    .filter(e => !e.querySelector('mjx-container')).map(e => e.textContent)"""
SIDEWAYS = """() => [document.documentElement.scrollWidth > document.documentElement.clientWidth]
    .filter(Boolean)"""
CUT_OFF = """() => [...document.querySelectorAll('div.arithmatex')]
    .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1)
    .map(e => e.id || e.textContent)"""
OUT_OF_REACH = """() => [...document.querySelectorAll('.md-content *:not(span.arithmatex)')]
    .filter(e => e.checkVisibility() && /auto|scroll/.test(getComputedStyle(e).overflowX))
    .filter(e => e.scrollWidth > e.clientWidth + 1 && !e.querySelector('a, button, [tabindex]'))
    .filter(e => e.tabIndex < 0).map(e => e.className + ': ' + e.textContent.slice(0, 80))"""
CUT_CODE = """() => [...document.querySelectorAll('.md-content pre > code')]
    .filter(e => e.checkVisibility() && e.scrollWidth > e.clientWidth + 1)
    .map(e => e.textContent.slice(0, 60))"""
CODE_SHARE = """() => {
    const height = e => e.getBoundingClientRect().height;
    const shown = [...document.querySelectorAll('.md-content div.highlight:not(.output)')];
    return shown.filter(e => e.checkVisibility()).reduce((sum, e) => sum + height(e), 0)
        / height(document.querySelector('.md-content'));
}"""
FIRST_FIGURE = """() => [...document.querySelectorAll('.md-content figure')]
    .filter(e => e.checkVisibility()).slice(0, 1)
    .map(e => e.getBoundingClientRect().top + scrollY)"""
SHOWN = """() => [...document.querySelectorAll('figure.plot img')].filter(i => i.offsetParent)
    .map(i => i.getAttribute('src'))"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as running:
        yield running


def opened(context, path):
    """Open a page, wait for its formulas, and collect whatever goes wrong."""
    page = watched(context.new_page())
    page.on("requestfailed", lambda request: page.problems.append(request.url))
    page.goto(path.as_uri(), timeout=120_000)  # the machine may be busy
    page.wait_for_function(READY, timeout=120_000)
    return page


@pytest.fixture
def visit(browser):
    with browser.new_context(**DESKTOP) as context:
        yield lambda name: opened(context, built_site() / name)


@pytest.fixture(scope="module")
def survey(browser):
    """Answers by page and question, from one visit of every page for each screen and scheme."""
    asked = {
        "desktop": {
            "broken": BROKEN_MATH,
            "raw": UNTYPESET,
            "cut off": CUT_OFF,
            "cut code": CUT_CODE,
            "code share": CODE_SHARE,
            "first figure": FIRST_FIGURE,
            "shown": SHOWN,
        },
        "phone": {"sideways": SIDEWAYS, "out of reach": OUT_OF_REACH},
    }

    def answers(screen, scheme):
        found = {}
        for path in pages():
            if path.parent.name == "api" and (screen, scheme) != ("desktop", "light"):
                continue  # all of them are made from one template, and there are many
            size = DESKTOP if screen == "desktop" else PHONE
            with browser.new_context(color_scheme=scheme, **size) as context:
                page = opened(context, path)
                answer = {name: page.evaluate(js) for name, js in asked[screen].items()}
                answer["problems"] = list(page.problems)  # axe adds requests of its own
                if screen == "desktop":
                    answer["inaccessible"] = inaccessible(page)
                found[str(path)] = answer
        return found

    @cache
    def answers_of_all(screen, scheme):
        return once(f"survey-{screen}-{scheme}", lambda: answers(screen, scheme))

    def ask(question, screen, scheme="light"):
        found = answers_of_all(screen, scheme)
        return {Path(path): answer[question] for path, answer in found.items()}

    return ask


def inaccessible(page):
    """Violations of WCAG A and AA, as axe reports them."""
    from axe_playwright_python.sync_playwright import Axe

    options = {"resultTypes": ["violations"], "runOnly": {"type": "tag", "values": RULES}}
    results = Axe().run(page, options=options)
    return results.generate_report() if results.violations_count else ""


def chapter(path):
    """Is this the page of a chapter?"""
    return path.name[:2].isdigit() and path.parent.name != "api"


def some(answers):
    """Pages with an answer that should be empty."""
    return {path.name: answer for path, answer in answers.items() if answer}


def test_every_formula_is_typeset(survey):
    assert some(survey("broken", "desktop")) == {}
    assert some(survey("raw", "desktop")) == {}


def test_no_formula_is_cut_off_on_a_desktop(survey):
    assert some(survey("cut off", "desktop")) == {}


def test_no_code_and_no_output_is_cut_off_on_a_desktop(survey):
    assert some(survey("cut code", "desktop")) == {}


def test_a_chapter_shows_its_first_figure_within_1200_pixels(survey):
    tops = {p.stem: top for p, top in survey("first figure", "desktop").items() if chapter(p)}
    assert len(tops) > 30
    late = {name: top for name, top in tops.items() if not top or top[0] > 1200}
    assert late == {}


def test_code_takes_at_most_two_fifths_of_a_chapter(survey):
    """Of the page's height, as it opens; folded code is not shown."""
    shares = {p.stem: share for p, share in survey("code share", "desktop").items() if chapter(p)}
    much = {name: share for name, share in shares.items() if share > 0.4}
    assert much == {}


@SCHEMES
@pytest.mark.parametrize("screen", ["desktop", "phone"])
def test_no_request_fails_and_no_error_is_logged(survey, screen, scheme):
    assert some(survey("problems", screen, scheme)) == {}


@SCHEMES
def test_a_phone_does_not_scroll_sideways(survey, scheme):
    assert some(survey("sideways", "phone", scheme)) == {}


def test_what_scrolls_on_a_phone_scrolls_by_keyboard_too(survey):
    """Tables, code, outputs and displayed formulas, but not formulas within a line."""
    assert some(survey("out of reach", "phone")) == {}


@SCHEMES
def test_pages_are_accessible(survey, scheme):
    found = some(survey("inaccessible", "desktop", scheme))
    assert found == {}, "\n".join(found.values())


def test_figures_follow_the_colour_scheme(survey):
    light, dark = survey("shown", "desktop", "light"), survey("shown", "desktop", "dark")
    assert any(light.values())
    for path in dark:
        figures = path.read_text(encoding="utf-8").count('class="plot"')
        assert len(light[path]) == len(dark[path]) == figures
        assert all(src.endswith("#only-light") for src in light[path])
        assert all(src.endswith("-dark.svg#only-dark") for src in dark[path])


def test_home_fits_on_one_screen(visit):
    page = visit("index.html")
    bottom = page.evaluate("document.querySelector('.start').getBoundingClientRect().bottom")
    assert bottom <= 800


def test_a_numbered_equation_can_be_jumped_to(visit):
    page = visit("01_flattening.html")
    page.click("a[href='#eq-1.6'] >> nth=0")
    assert page.evaluate("document.querySelector(':target').id") == "eq-1.6"


OBVIOUS = {  # what a reader looks for, and what the first page that is found has in its address
    "KFAC": ["KFAC", "kfac"],
    "natural gradient": ["losses", "natural"],
    "expand reduce": ["weight_sharing"],
    "damping": ["damping"],
    "empirical Fisher": ["losses", "fisher"],
    "marginal likelihood": ["laplace"],
    "Kronecker": ["flattening", "matrices", "kfac"],
}


@pytest.mark.parametrize("words", OBVIOUS)
def test_search_works_from_disk_and_finds_the_obvious_chapter_first(visit, words):
    page = visit("index.html")
    page.click(".md-search__input")
    page.keyboard.type(words, delay=20)
    result = page.locator(".md-search-result__link")
    page.wait_for_function(  # of these words, not of the first few letters
        "n => document.querySelector('.md-search-result__meta').textContent.includes(n)",
        arg="matching",
    )
    page.wait_for_timeout(1000)
    found = result.first.get_attribute("href").rpartition("/")[2].partition("?")[0]
    assert found[:2].isdigit(), found
    assert any(part in found for part in OBVIOUS[words]), found
    assert result.count() >= 2
    assert page.problems == []
