"""The site opened from disk in Chromium, with the network switched off."""

import pytest
from built_site import CHROMIUM, built_site, missing, pages, unavailable

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
SHOWN = """() => [...document.querySelectorAll('figure.plot img')].filter(i => i.offsetParent)
    .map(i => i.getAttribute('src'))"""


@pytest.fixture(scope="module")
def browser():
    missing("playwright", "axe_playwright_python")
    if not CHROMIUM:
        unavailable("no Chromium: install it or set CHROMIUM to the executable")
    from playwright.sync_api import sync_playwright

    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield running
        running.close()


@pytest.fixture
def visit(browser):
    """Open a page, wait for its formulas, and collect whatever goes wrong."""
    contexts = []

    def opened(path, **options):
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("requestfailed", lambda request: page.problems.append(request.url))
        page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
        page.on("request", lambda r: r.url.startswith("http") and page.problems.append(r.url))
        page.goto(path.as_uri())
        page.wait_for_function(READY)
        return page

    yield opened
    for context in contexts:
        context.close()


def on_every_page(visit, script, **options):
    """Answers of a script that should be empty, by page."""
    found = {}
    for path in pages():
        page = visit(path, **options)
        answer = page.evaluate(script) + page.problems
        if answer:
            found[path.name] = answer
        page.context.close()
    return found


def test_every_formula_is_typeset(visit):
    assert on_every_page(visit, BROKEN_MATH, **DESKTOP) == {}
    assert on_every_page(visit, UNTYPESET, **DESKTOP) == {}


def test_no_formula_is_cut_off_on_a_desktop(visit):
    assert on_every_page(visit, CUT_OFF, **DESKTOP) == {}


@SCHEMES
def test_a_phone_does_not_scroll_sideways(visit, scheme):
    assert on_every_page(visit, SIDEWAYS, color_scheme=scheme, **PHONE) == {}


@SCHEMES
def test_pages_are_accessible(visit, scheme):
    from axe_playwright_python.sync_playwright import Axe

    axe, found = Axe(), {}
    for path in pages():
        page = visit(path, color_scheme=scheme, **DESKTOP)
        options = {"resultTypes": ["violations"], "runOnly": {"type": "tag", "values": RULES}}
        results = axe.run(page, options=options)
        if results.violations_count:
            found[path.name] = results.generate_report()
        page.context.close()
    assert found == {}, "\n".join(found.values())


def test_figures_follow_the_colour_scheme(visit):
    figures = [path for path in pages() if 'class="plot"' in path.read_text(encoding="utf-8")]
    assert figures
    for path in figures:
        light = visit(path, color_scheme="light", **DESKTOP).evaluate(SHOWN)
        dark = visit(path, color_scheme="dark", **DESKTOP).evaluate(SHOWN)
        assert len(light) == len(dark) == path.read_text(encoding="utf-8").count('class="plot"')
        assert all(src.endswith("#only-light") for src in light)
        assert all(src.endswith("-dark.svg#only-dark") for src in dark)


def test_home_fits_on_one_screen(visit):
    page = visit(built_site() / "index.html", **DESKTOP)
    bottom = page.evaluate("document.querySelector('.start').getBoundingClientRect().bottom")
    assert bottom <= 800


def test_a_numbered_equation_can_be_jumped_to(visit):
    page = visit(built_site() / "01_flattening.html", **DESKTOP)
    page.click("a[href='#eq-1.6'] >> nth=0")
    assert page.evaluate("document.querySelector(':target').id") == "eq-1.6"


def test_search_works_from_disk(visit):
    page = visit(built_site() / "index.html", **DESKTOP)
    page.click(".md-search__input")
    page.keyboard.type("Kronecker", delay=20)
    page.wait_for_selector(".md-search-result__item")
    assert page.locator(".md-search-result__item").count() >= 2
    assert page.problems == []
