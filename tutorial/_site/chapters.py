"""MkDocs hook: every tutorial/NN_*.py and every file of the package becomes a page.

Navigation and lists are made from the files themselves: see package.py and api.py.

A chapter is executed once and rewritten as ordinary Markdown (see notebook.py), so that math,
link checking, cross-references and search work in chapters as on any page. The first two
paragraphs of a chapter state its title, part and question; navigation and reading map are made
of these. Numbered equations, theorems and figures can be referred to from every page.
"""

import ast
import logging
import os
import posixpath
import re
import time
import xml.etree.ElementTree as etree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import api
import graph
import jupytext
import package
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel
from notebook import ChapterError, clean, render, run, stored
from package import PACKAGE, ROOT

log = logging.getLogger("mkdocs.hooks.chapters")

TUTORIAL = ROOT / "tutorial"
CACHE = ROOT / ".cache" / "chapters"
INSIDES = "The oracle's insides"  # a group of the API
RUNS = re.compile(r"\bbenchmarks[./](\w+)")  # `python -m benchmarks.training`, `benchmarks/step.py`
EVERYWHERE = {"", "checks", "moving", "show"}  # tools of all chapters, not what one is about
NAV, NAV_API = "[0-9]*.py", "api/*.md"  # stand for lists in the nav of mkdocs.yml
OPENING = re.compile(r"# (\d+)\. (.+)\n\n\*\*Part ([IVX]+): (.+?)\.\*\* ((?:.+\n?)+)")

EQUATION = re.compile(r"\\tag\{(\d+\.\d+[a-z]?)\}")
THEOREM = re.compile(r'<div[^>]* id="([a-z]+-\d+\.\d+)"[^>]*>\s*<p[^>]*>\s*<b>(\w+ \d+\.\d+)')
FIGURE = re.compile(r'<figure[^>]* id="(fig-(\d+\.\d+))"')
REFERENCE = re.compile(r"(?<![\]\w`\\])\[(\(\d+\.\d+[a-z]?\)|[A-Z]\w+ \d+\.\d+)\](?![\[(])")
FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2`*~* *$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)

_targets: dict[str, tuple[str, str]] = {}  # "(1.2)" -> ("01_flattening.md", "eq-1.2")


@dataclass(frozen=True)
class Chapter:
    """What a chapter says about itself."""

    path: Path

    @cached_property
    def opening(self) -> re.Match[str]:
        """Number, title, part number, part name and question."""
        first = jupytext.read(self.path).cells[0]
        if first.cell_type == "raw":  # the header with the kernel
            first = jupytext.read(self.path).cells[1]
        found = OPENING.match(first.source + "\n")
        if not found or int(found[1]) != int(self.path.name[:2]):
            raise PluginError(
                f"{self.path.name} must start with '# {int(self.path.name[:2])}. Title' and a "
                "paragraph '**Part I: Name.** Its question?'; see writing_a_chapter.md."
            )
        return found

    @property
    def uri(self) -> str:
        """The page."""
        return f"{self.path.stem}.md"

    @property
    def part(self) -> str:
        """The heading of the navigation that the chapter stands under."""
        return f"{self.opening[3]} · {self.opening[4]}"

    @property
    def nav(self) -> dict[str, str]:
        """Entry of the navigation: number and the title up to its colon."""
        return {f"{self.opening[1]}. {self.opening[2].partition(':')[0]}": self.uri}

    @property
    def modules(self) -> list[str]:
        """Modules and folders of the package that the chapter imports from, in reading order."""
        used = {*package.used(ast.parse(self.path.read_text(encoding="utf-8")))}
        order = [*dict.fromkeys(m.name for m in package.modules()), *package.folders()]
        return [n for n in order if n in used and package.room(n) not in EVERYWHERE]

    @property
    def runs(self) -> list[str]:
        """Scripts of benchmarks that the chapter names."""
        found = dict.fromkeys(RUNS.findall(self.path.read_text(encoding="utf-8")))
        scripts = [f"benchmarks/{name}.py" for name in found]
        return [script for script in scripts if (ROOT / script).exists()]

    @property
    def tests(self) -> list[str]:
        """Where modules are tested, a folder if several of its files do; and then the scripts."""
        places = dict.fromkeys(filter(None, map(package.tests, self.modules)))
        folders = [posixpath.dirname(place.rstrip("/")) for place in places]
        several = {f"{f}/" for f in folders if f != "tests" and folders.count(f) > 1}
        several |= {place for place in places if place.endswith("/")}
        shown = [next((f for f in several if place.startswith(f)), place) for place in places]
        own = [f"tests/meta/test_{Path(script).stem}.py" for script in self.runs]
        own = [
            place if (ROOT / place).exists() else "tests/meta/test_benchmarks.py" for place in own
        ]
        return list(dict.fromkeys([*shown, *own]))


def chapters() -> list[Chapter]:
    """All chapters in reading order: part after part, as they begin, and by number within a part."""
    found = [Chapter(path) for path in sorted(TUTORIAL.glob(NAV))]
    parts = list(dict.fromkeys(chapter.part for chapter in found))
    return sorted(found, key=lambda chapter: parts.index(chapter.part))


# ------------------------------------------------------------------ lists made from the files
def _reading_map(config) -> str:
    rows = ["| Chapter | Answers | Code and tests |", "| --- | --- | --- |"]
    part = ""
    for chapter in chapters():
        if chapter.part != part:
            part = chapter.part
            rows.append(f"| **Part {part}** | | |")
        question = " ".join(chapter.opening[5].split())
        title = f"{chapter.opening[1]}. {chapter.opening[2]}"
        rows.append(f"| [{title}]({chapter.uri}) | {question} | {_code(chapter, config, '<br>')} |")
    return "\n".join(rows)


def _graph(config) -> str:
    entries = []
    for chapter in chapters():
        text = chapter.path.read_text(encoding="utf-8")
        title = chapter.opening[2].partition(":")[0]
        page = f"{chapter.path.stem}.html"  # MkDocs does not rewrite links in a drawing
        entries.append(graph.Entry(chapter.part, int(chapter.opening[1]), title, page, text))
    return graph.drawn(entries)


def _code(chapter: Chapter, config, between: str) -> str:
    """Links to modules and benchmarks that a chapter uses, and where these are tested."""
    modules = ", ".join(f"[`{name}`]({api.uri(name)})" for name in chapter.modules)
    runs = ", ".join(_in_repository(script, config) for script in chapter.runs)
    tests = ", ".join(_in_repository(place, config) for place in chapter.tests)
    found = [modules, runs and f"Benchmark: {runs}", tests and f"Tests: {tests}"]
    return between.join(filter(None, found))


def _in_repository(place: str, config) -> str:
    """A path of the repository, as a link if mkdocs.yml gives an address."""
    address = _address(config, place)
    return f"[`{place}`]({address})" if address else f"`{place}`"


def _address(config, place: str, view: str = "blob") -> str | None:
    """Where a file of the repository is shown ("blob") or edited, if mkdocs.yml says where it is."""
    if not config.repo_url:
        return None
    branch = (config.edit_uri or "edit/main/").split("/")[1]
    return f"{config.repo_url.rstrip('/')}/{view}/{branch}/{place}"


LISTS = {
    "<!-- chapters -->": _reading_map,
    "<!-- graph -->": _graph,
    "<!-- modules -->": lambda config: api.overview(config.extra["api"]),
}


def _head(chapter: Chapter, config) -> str:
    """Downloads of a chapter, and the code that it is about."""
    stem = chapter.path.stem
    files = {"notebook-outline: Notebook": f"{stem}.ipynb", "language-python: Script": f"{stem}.py"}
    links = [f'[:material-{label}]({file}){{ download="{file}" }}' for label, file in files.items()]
    code = f"Code: {_code(chapter, config, '. ')}\n{{ .uses }}" if chapter.tests else ""
    text = f"{' '.join(links)}\n\n{code}"
    return f'<div class="downloads" data-search-exclude markdown="1">\n{text}\n</div>'


# ------------------------------------------------------------------ numbers and references
def _prose(text: str) -> str:
    """The text with all code blanked out."""
    return CODE.sub(" ", FENCE.sub(" ", text))


def _collect(uri: str, text: str) -> None:
    text = _prose(text)
    found = [(f"({n})", f"eq-{n}") for n in EQUATION.findall(text)]
    found += [(label, anchor) for anchor, label in THEOREM.findall(text)]
    found += [(f"Figure {n}", anchor) for anchor, n in FIGURE.findall(text)]
    for label, anchor in found:
        if label in _targets:
            log.warning("%s is defined twice: %s and %s", label, _targets[label][0], uri)
        _targets[label] = (uri, anchor)


class _EquationIds(Treeprocessor):
    def run(self, root: etree.Element) -> None:
        for element in root.iter("div"):
            if element.get("class") == "arithmatex":
                element.set("tabindex", "0")  # a wide formula scrolls by keyboard, too
                for index, number in enumerate(EQUATION.findall(element.text or "")):
                    if index == 0:
                        element.set("id", f"eq-{number}")
                    else:
                        etree.SubElement(element, "span", {"id": f"eq-{number}"})


class _EquationExtension(Extension):
    def extendMarkdown(self, md) -> None:  # noqa: N802
        md.treeprocessors.register(_EquationIds(md), "equation_ids", 15)


# ------------------------------------------------------------------ events of MkDocs
def on_config(config):
    """Put every chapter into the navigation, under its part, and every module."""
    config.markdown_extensions.append(_EquationExtension())
    package.forget()
    parts: dict[str, list[dict[str, str]]] = {}
    for chapter in chapters():
        parts.setdefault(chapter.part, []).append(chapter.nav)
    lists = {NAV: [{part: pages} for part, pages in parts.items()]}
    try:
        lists[NAV_API] = api.nav(config.extra["api"])
    except api.GroupError as error:
        raise PluginError(str(error)) from None
    config.nav = list(_expanded(config.nav, lists))
    return config


def _expanded(nav, lists):
    for item in nav:
        if isinstance(item, dict):
            ((title, pages),) = item.items()
            yield {title: pages if isinstance(pages, str) else list(_expanded(pages, lists))}
        else:
            yield from lists.get(item, [item])


def _execute(chapter: Chapter):
    path, start = chapter.path, time.monotonic()
    cached = stored(path, PACKAGE, CACHE).exists()
    try:
        result = render(run(path, PACKAGE, CACHE), path.stem)
    except ChapterError as error:
        raise PluginError(str(error)) from None
    if not cached:
        log.info("Executed %s in %.0f s", path.name, time.monotonic() - start)
    return result


def on_files(files, config):
    """Execute the chapters and add their pages, figures and notebooks."""
    _targets.clear()
    missing = sum(not stored(chapter.path, PACKAGE, CACHE).exists() for chapter in chapters())
    if missing:
        log.info("Executing %d of %d chapters: a few minutes if all", missing, len(chapters()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rendered = list(pool.map(_execute, chapters()))
    for chapter, (text, extra) in zip(chapters(), rendered, strict=True):
        stem = chapter.path.stem
        title, _, rest = text.lstrip().partition("\n")
        extra |= {chapter.uri: f"{title}\n\n{_head(chapter, config)}\n{rest}".encode()}
        extra |= {f"{stem}.ipynb": clean(chapter.path)}
        for uri, content in extra.items():
            included = InclusionLevel.INCLUDED  # although *.ipynb in the folder are ignored
            files.append(File.generated(config, uri, content=content, inclusion=included))
    for uri, page in api.pages().items():
        files.append(File.generated(config, uri, content=page))
    for file in files.documentation_pages():
        _collect(file.src_uri, file.content_string)
    return files


def on_page_markdown(text, page, config, files):
    """Fill in the lists and turn [(1.2)], [Theorem 1.1] and [Figure 1.1] into links.

    In searches, chapters come before all else, the API comes last, and what only the oracle itself
    uses does not appear.
    """
    here = page.file.src_uri
    if (TUTORIAL / f"{page.file.name}.py").exists():
        page.meta["search"] = {"boost": 4}
        page.meta["tags"] = config.extra["found_by"].get(page.file.name[3:], [])
    elif here.startswith("api/"):
        inside = api.grouped(config.extra["api"])[INSIDES]
        hidden = posixpath.dirname(here) == "api" and page.file.name.startswith(tuple(inside))
        page.meta["search"] = {"exclude": True} if hidden else {"boost": 0.25}
    for mark, written in LISTS.items():
        if mark in text:
            text = text.replace(mark, written(config))
    for label in dict.fromkeys(REFERENCE.findall(_prose(text))):
        if label in _targets:
            uri, anchor = _targets[label]
            path = "" if uri == here else posixpath.relpath(uri, posixpath.dirname(here) or ".")
            text += f"\n\n[{label}]: {path}#{anchor}"
        else:
            log.warning("%s refers to %s, which does not exist", here, label)
    return text + "\n"


def on_page_content(html, page, config, files):
    """Lists of contents show text only: leave out the marks of formulas in headings.

    In code, names and spaces have the colour of code itself and need no element of their own,
    which would be a third of a page. Code and output are not searched.
    """
    entries = list(page.toc)
    while entries:
        entry = entries.pop()
        entry.title = re.sub(r"\\\((.*?)\\\)", r"\1", entry.title)
        entries += entry.children
    html = re.sub(r'<div class="([^"]*\bhighlight)"', r'<div data-search-exclude class="\1"', html)
    return re.sub(r'<span class="[nw]">([^<]*)</span>', r"\1", html)


def on_page_context(context, page, config, nav):
    """Let the edit link of a chapter lead to its script."""
    source = TUTORIAL / f"{page.file.name}.py"
    if source.exists():
        page.edit_url = _address(config, f"tutorial/{source.name}", "edit")
    return context
