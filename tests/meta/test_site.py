"""The built pages (links, text alternatives, no network) and the faults that stop a build."""

import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from tests.meta.built_site import ROOT, built_site, missing, mkdocs_build, pages

pytestmark = pytest.mark.slow

LOADED = {("script", "src"), ("img", "src"), ("iframe", "src"), ("source", "src")}
LOADED_LINKS = {"stylesheet", "icon", "preload", "preconnect", "modulepreload", "dns-prefetch"}
MAX_PAGE, MAX_FIGURE = 400_000, 400_000  # bytes
CHAPTERS = sorted(path.stem for path in (ROOT / "tutorial").glob("[0-9]*.py"))


class Page(HTMLParser):
    """What the tests below want to know about a page."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.loaded, self.titles = path, [], [], [], 0
        self.images = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.ids += [a[key] for key in ("id",) if a.get(key)]
        self.titles += tag == "h1"
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        if tag == "img":
            self.images.append(a)
        self.loaded += [a[key] for t, key in LOADED if t == tag and a.get(key)]
        if tag == "link" and LOADED_LINKS & set(a.get("rel", "").split()):
            self.loaded.append(a["href"])

    def broken(self):
        """Links to files or anchors that do not exist."""
        for link in self.links + self.loaded:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            target = (self.path.parent / unquote(url.path)).resolve() if url.path else self.path
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield link
            elif url.fragment and target.suffix == ".html" and not url.fragment.startswith("__"):
                ids = self.ids if target == self.path else Page(target).ids
                if unquote(url.fragment) not in ids:
                    yield link


@pytest.fixture(scope="module")
def site():
    return built_site()


@pytest.fixture(scope="module")
def parsed(site):
    return [Page(path) for path in pages()]


def named(parsed, value):
    """What is wrong on which page."""
    return {page.path.name: found for page in parsed if (found := value(page))}


def test_every_link_and_anchor_exists(parsed):
    assert named(parsed, lambda page: list(page.broken())) == {}


def test_nothing_is_loaded_from_the_network(site, parsed):
    assert named(parsed, lambda page: [u for u in page.loaded if urlsplit(u).netloc]) == {}
    styles = "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*", styles) == []


def test_no_page_asks_the_api_of_github(parsed):
    assert named(parsed, lambda page: 'data-md-component="source"' in page.text) == {}


def test_every_image_has_a_text_alternative(parsed):
    assert named(parsed, lambda page: [i["src"] for i in page.images if not i.get("alt")]) == {}


def test_every_page_has_one_title_and_unique_ids(parsed):
    assert named(parsed, lambda page: page.titles != 1) == {}
    assert named(parsed, lambda page: {i for i in page.ids if page.ids.count(i) > 1}) == {}


def test_every_reference_became_a_link(parsed):
    """Nothing like [(1.2)] is left in the text outside of code."""
    left = re.compile(r"\[\(\d+\.\d+\w?\)\]|\[(?:Theorem|Figure) \d+\.\d+\]")
    outside_code = lambda text: re.sub(r"<(pre|code)\b.*?</\1>", "", text, flags=re.DOTALL)  # noqa: E731
    assert named(parsed, lambda page: left.findall(outside_code(page.text))) == {}


def test_pages_and_figures_are_light(site, parsed):
    assert named(parsed, lambda page: len(page.text) > MAX_PAGE) == {}
    assert [p.name for p in site.rglob("*_files/*") if p.stat().st_size > MAX_FIGURE] == []


@pytest.mark.parametrize("stem", CHAPTERS)
def test_a_chapter_comes_with_script_and_notebook(site, stem):
    nbformat = pytest.importorskip("nbformat")
    text = (site / f"{stem}.html").read_text(encoding="utf-8")
    assert f'download="{stem}.ipynb"' in text
    assert f'download="{stem}.py"' in text
    assert (site / f"{stem}.py").read_bytes() == (ROOT / "tutorial" / f"{stem}.py").read_bytes()
    notebook = json.loads((site / f"{stem}.ipynb").read_text(encoding="utf-8"))
    nbformat.validate(nbformat.from_dict(notebook))
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.parametrize("stem", CHAPTERS)
def test_a_chapter_is_in_navigation_and_reading_map(site, stem):
    for page in ("index.html", "reading_map.html"):
        assert f'href="{stem}.html"' in (site / page).read_text(encoding="utf-8")


def test_every_module_is_in_the_api(site):
    for path in (ROOT / "kfac_scratch").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "kfac_scratch").with_suffix("").parts)
        catalogue = {"consumers", "findings", "mutations"} & {*path.parts}
        if not path.stem.startswith(("_", "test_")) and not catalogue:
            assert f"kfac_scratch.{name}" in Page(site / "api" / f"{name}.html").ids
            assert f'href="api/{name}.html"' in (site / "api.html").read_text(encoding="utf-8")


def test_nothing_of_the_workshop_is_published(site):
    assert not (site / "_site").exists()
    here = str(ROOT)
    for path in site.rglob("*"):
        if path.suffix in {".html", ".ipynb", ".json", ".svg", ".xml"}:
            assert here not in path.read_text(encoding="utf-8"), path


# ---------------------------------------------------------------- faults that must stop the build
HEADER = """\
# %% [markdown]
# # 1. Probe: a small chapter
#
# **Part I: Curvature.** Does it build?
#
# $$
# x = y
# \\tag{1.1}
# $$
#
# As [(1.1)] says, see [the end](other.md#end).

# %% alt="A line that rises from left to right." caption="A line $a^\\top b$."
import matplotlib.pyplot as plt

plt.plot([0, 1])
plt.show()
"""
FAULTS = {
    "a failing cell": ("plt.show()", "assert 1 == 2, 'no'", "AssertionError.*no"),
    "no text alternative": ('alt="A line that rises from left to right." ', "", "without alt="),
    "an unknown equation": ("As [(1.1)]", "As [(1.2)]", r"\(1\.2\), which does not exist"),
    "an equation twice": ("x = y", "x = y \\tag{1.1}", r"\(1\.1\) is defined twice"),
    "a dead link": ("other.md#end", "nowhere.md", "nowhere.md"),
    "a dead anchor": ("other.md#end", "other.md#start", "start"),
    "no part": ("**Part I: Curvature.** ", "", "must start with"),
    "the wrong number": ("# # 1. Probe", "# # 2. Probe", "must start with"),
    "output on stderr": ("plt.show()", "import sys; print('x', file=sys.stderr)", "stderr"),
}


@pytest.fixture
def small_site(tmp_path):
    """The real configuration and hooks around a single chapter."""
    missing("mkdocs", "material", "mkdocstrings", "nbclient", "nbconvert", "jupytext", "ipykernel")
    for folder in ("tutorial/_site", "tutorial/assets", "kfac_scratch"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.pyc"))
    for page in ("index", "reading_map", "notation", "api", "bibliography"):
        (tmp_path / "tutorial" / f"{page}.md").write_text(f"# {page}\n")
    (tmp_path / "tutorial" / "other.md").write_text("# Other\n\n## End\n")
    config = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(config.replace("\nnav:", "\nnav:\n  - other.md"))
    return tmp_path


def build(folder, chapter):
    (folder / "tutorial" / "01_probe.py").write_text(chapter)
    return mkdocs_build(folder, folder / "site")


def test_the_small_site_builds(small_site):
    built = build(small_site, HEADER)
    assert built.returncode == 0, built.stderr
    assert r"\(a^\top b\)" in (small_site / "site" / "01_probe.html").read_text()
    figures = small_site / "site" / "01_probe_files"
    assert "#23262d" in (figures / "figure-1.svg").read_text()
    assert "#23262d" not in (figures / "figure-1-dark.svg").read_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_build(small_site, fault):
    old, new, message = FAULTS[fault]
    assert HEADER.count(old) == 1
    built = build(small_site, HEADER.replace(old, new))
    assert built.returncode != 0
    assert re.search(message, built.stderr, re.DOTALL), built.stderr


def test_chapters_run_in_this_interpreter(small_site, tmp_path, monkeypatch):
    """Even if somebody registered another kernel as python3."""
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    argv = ["/nonexistent", "-f", "{connection_file}"]
    kernel.joinpath("kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "Other", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.delenv("JUPYTER_PREFER_ENV_PATH", raising=False)
    built = build(small_site, HEADER)
    assert built.returncode == 0, built.stderr
