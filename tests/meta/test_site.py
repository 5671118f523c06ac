"""The built pages (links, text alternatives, no network) and the faults that stop a build."""

import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import package
import pytest

import kfac_scratch
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
    assert any(cell.get("outputs") for cell in notebook["cells"])
    assert 'pip install -e ".[docs]"' in "".join(notebook["cells"][0]["source"])


@pytest.mark.parametrize("stem", CHAPTERS)
def test_a_chapter_is_in_navigation_and_reading_map(site, stem):
    for page in ("index.html", "reading_map.html"):
        assert f'href="{stem}.html"' in (site / page).read_text(encoding="utf-8")


USED = re.compile(r"^from kfac_scratch\.([\w.]+) import", re.MULTILINE)  # of modules, directly


@pytest.mark.parametrize("stem", CHAPTERS)
def test_a_chapter_and_its_row_of_the_reading_map_lead_to_all_modules_that_it_uses(site, stem):
    script = (ROOT / "tutorial" / f"{stem}.py").read_text(encoding="utf-8")
    modules = {module.name for module in package.modules()}
    used = {*USED.findall(script)} & modules
    used = {name for name in used if name.partition(".")[0] not in ("checks", "show", "moving")}
    page = (site / f"{stem}.html").read_text(encoding="utf-8")
    rows = (site / "reading_map.html").read_text(encoding="utf-8").split("<tr>")
    (row,) = [row for row in rows if f'<td><a href="{stem}.html"' in row]
    for name in used:
        assert f'<a href="api/{name}.html"><code>{name}</code></a>' in page, name
        assert f'<a href="api/{name}.html"><code>{name}</code></a>' in row, name
    for place in re.findall(r"<code>(tests/[^<]*)</code>", row):
        assert (ROOT / place).exists()
    for script in re.findall(r"<code>(benchmarks/[^<]*)</code>", row):
        assert (ROOT / script).exists()
    assert "Tests: " in row


def test_every_module_and_folder_is_in_the_api(site):
    overview = (site / "api.html").read_text(encoding="utf-8")
    for name, module in package.files().items():
        page = Page(site / "api" / f"{name or 'kfac_scratch'}.html")
        assert module.full_name in page.ids
        assert f'href="api/{page.path.name}"' in overview


def test_every_public_name_leads_to_its_definition(site):
    links = {*Page(site / "api" / "kfac_scratch.html").links}
    for name in kfac_scratch.__all__:
        source = package.files()[package.origin("", name)]
        anchor = f"#{source.full_name}.{name}" if name in source.defined else ""
        assert f"{source.name}.html{anchor}" in links


def test_signatures_are_wrapped(site):
    """By a formatter, without which each of them is one line."""
    long = []
    for path in (site / "api").glob("*.html"):
        text = path.read_text(encoding="utf-8")
        for block in re.findall(
            r'<div class="[^"]*doc-signature[^"]*">(.*?)</div>', text, re.DOTALL
        ):
            lines = html.unescape(re.sub(r"<[^>]*>", "", block)).splitlines()
            long += [(path.name, line) for line in lines if len(line) > 100]
    assert long == []


def test_pages_lead_only_to_addresses_that_somebody_wrote(parsed):
    """No page leads to a repository or a site that a template made up."""
    texts = [ROOT / "mkdocs.yml", *(ROOT / "tutorial").rglob("*.*"), *package.PACKAGE.rglob("*.*")]
    kinds = {".md", ".py", ".json", ".yml"}
    written = "".join(path.read_text(encoding="utf-8") for path in texts if path.suffix in kinds)
    outside = lambda page: {a for a in page.links if urlsplit(a).netloc}  # noqa: E731
    unknown = lambda page: {a for a in outside(page) if urlsplit(a).netloc not in written}  # noqa: E731
    assert named(parsed, unknown) == {}
    assert any(map(outside, parsed))


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
    (tmp_path / "tutorial" / "other.md").write_text("# Other\n\n## End\n")
    config = (ROOT / "mkdocs.yml").read_text()
    for page in re.findall(r"^ +- .*: (\w+)\.md$", config, re.MULTILINE):  # of the navigation
        (tmp_path / "tutorial" / f"{page}.md").write_text(f"# {page}\n")
    (tmp_path / "mkdocs.yml").write_text(config.replace("\nnav:", "\nnav:\n  - other.md"))
    return tmp_path


def build(folder, chapter):
    (folder / "tutorial" / "01_probe.py").write_text(chapter)
    return mkdocs_build(folder, folder / "site")


def test_progress_is_reported_once_for_what_is_executed(small_site):
    first, again = build(small_site, HEADER), build(small_site, HEADER)
    assert "Executing 1 of 1 chapters" in first.stderr
    assert re.search(r"Executed 01_probe\.py in \d+ s", first.stderr)
    assert "Execut" not in again.stderr


def test_addresses_appear_once_they_are_stated(small_site):
    (small_site / "tutorial" / "reading_map.md").write_text("# Map\n\n<!-- chapters -->\n")
    (small_site / "tests").mkdir()
    (small_site / "tests" / "test_linalg.py").touch()
    uses = "from kfac_scratch.linalg import vec\nimport matplotlib"
    chapter = HEADER.replace("import matplotlib", uses)
    names = ("reading_map.html", "01_probe.html", "other.html")
    pages = [small_site / "site" / name for name in names]
    links = ["/blob/trunk/tests/test_linalg.py", "/edit/trunk/tutorial/01_probe.py"]
    links += ["/edit/trunk/tutorial/other.md"]

    assert build(small_site, chapter).returncode == 0
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "/trunk/" not in text
        assert "md-source" not in text
        assert 'rel="edit"' not in text
    assert "Tests: <code>tests/test_linalg.py</code>" in pages[0].read_text(encoding="utf-8")

    config = small_site / "mkdocs.yml"
    stated = {"repo_url": "https://code.example.org/us/it", "edit_uri": "edit/trunk/tutorial/"}
    for key, value in stated.items():
        config.write_text(re.sub(rf"# {key}: .*", f"{key}: {value}", config.read_text()))
    assert build(small_site, chapter).returncode == 0
    for page, link in zip(pages, links, strict=True):
        assert f'href="https://code.example.org/us/it{link}"' in page.read_text(encoding="utf-8")


def test_a_folder_without_a_group_stops_the_build(small_site):
    (small_site / "kfac_scratch" / "stray").mkdir()
    (small_site / "kfac_scratch" / "stray" / "__init__.py").write_text('"""Stray."""\n')
    built = build(small_site, HEADER)
    assert built.returncode != 0
    assert "kfac_scratch/stray stands in no group" in built.stderr


def test_the_small_site_builds(small_site):
    built = build(small_site, HEADER)
    assert built.returncode == 0, built.stderr
    assert "end of life" not in built.stderr  # of Material, which prints it above all others
    assert r"\(a^\top b\)" in (small_site / "site" / "01_probe.html").read_text()
    figures = small_site / "site" / "01_probe_files"
    assert "#23262d" in (figures / "figure-1.svg").read_text()
    assert "#23262d" not in (figures / "figure-1-dark.svg").read_text()


def test_the_book_is_plain_markdown_without_mkdocs(small_site):
    """Lists are filled in, references are links, and all that a page needs is there."""
    (small_site / "tutorial" / "01_probe.py").write_text(HEADER)
    (small_site / "tutorial" / "reading_map.md").write_text("# Map\n\n<!-- chapters -->\n")
    script = """
import runpy, sys
sys.modules["mkdocs"] = None
sys.path.insert(0, "tutorial/_site")
sys.argv = ["book.py", "written"]
runpy.run_path("tutorial/_site/book.py", run_name="__main__")
"""
    command = [sys.executable, "-c", script]
    made = subprocess.run(command, cwd=small_site, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    book = small_site / "written"
    page = (book / "01_probe.md").read_text(encoding="utf-8")
    assert page.startswith("---\nsearch:\n  boost: 4\n---\n\n# 1. Probe")
    assert "(other.md#end)" in page
    assert page.endswith("[(1.1)]: #eq-1.1\n")
    for place in re.findall(r'(?:src="|download=")([^"#]+)', page):
        assert (book / place).exists(), place
    assert "[1. Probe: a small chapter](01_probe.md)" in (book / "reading_map.md").read_text(
        encoding="utf-8"
    )
    assert (book / "api" / "linalg.md").read_text(encoding="utf-8").startswith("---\nsearch:")
    assert (book / "assets" / "site.css").exists()
    assert not (book / "_site").exists()
    again = subprocess.run(command, cwd=small_site, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert again.stderr.strip().endswith("is not empty: name a folder that is new.")


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
