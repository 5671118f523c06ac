"""MkDocs hook: every tutorial/NN_*.py becomes a page, listed from the files themselves.

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
import xml.etree.ElementTree as etree
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from graphlib import TopologicalSorter
from pathlib import Path

import jupytext
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, InclusionLevel
from notebook import ChapterError, clean, render, run

log = logging.getLogger("mkdocs.hooks.chapters")

ROOT = Path(__file__).resolve().parents[2]
TUTORIAL, PACKAGE = ROOT / "tutorial", ROOT / "kfac_scratch"
CACHE = ROOT / ".cache" / "chapters"
CATALOGUES = {"consumers", "findings", "mutations"}  # entries, shown by other pages
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
                "paragraph '**Part I: Name.** Its question?'; see AUTHORING.md."
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
        """The module of the same stem, or else those that the chapter imports."""
        stem = self.path.stem[3:]
        found = re.findall(
            r"^from kfac_scratch\.([\w.]+) import", self.path.read_text(), re.MULTILINE
        )
        if own := [name for name in modules() if name.split(".")[-1] == stem]:
            return [_short(own[0])]
        known = {_short(name) for name in modules()} - {"show"}
        return [name for name in dict.fromkeys(found) if name in known]


def chapters() -> list[Chapter]:
    """All chapters in reading order."""
    return [Chapter(path) for path in sorted(TUTORIAL.glob(NAV))]


def modules() -> list[str]:
    """All modules of the package, every one after those that it imports."""
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if not file.stem.startswith(("_", "test_")) and not CATALOGUES & {*file.parts}:
            nodes = ast.walk(ast.parse(file.read_text()))
            names[name] = {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}
    order = TopologicalSorter({name: sorted(names[name] & names.keys()) for name in names})
    return list(order.static_order())


# ------------------------------------------------------------------ lists made from the files
def _reading_map(config) -> str:
    rows = ["| Chapter | Answers | Code and tests |", "| --- | --- | --- |"]
    part = ""
    for chapter in chapters():
        if chapter.part != part:
            part = chapter.part
            rows.append(f"| **Part {part}** | | |")
        links = []
        for name in chapter.modules:
            tests = f"tests/test_{name.split('.')[-1]}.py"
            link = f"[`{name}`](api/{name}.md)"
            if (ROOT / tests).exists():
                link += f" ([tests]({config.repo_url}/blob/main/{tests}))"
            links.append(link)
        question = " ".join(chapter.opening[5].split())
        title = f"{chapter.opening[1]}. {chapter.opening[2]}"
        rows.append(f"| [{title}]({chapter.uri}) | {question} | {', '.join(links)} |")
    return "\n".join(rows)


def _api(config) -> str:
    rows = ["| Module | |", "| --- | --- |"]
    for name in modules():
        text = (
            ast.get_docstring(ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text())) or ""
        )
        summary = text.partition("\n\n")[0].replace("\n", " ").replace("|", r"\|")
        rows.append(f"| [`{_short(name)}`]({_api_uri(name)}) | {summary} |")
    return "\n".join(rows)


def _short(name: str) -> str:
    return name.removeprefix(f"{PACKAGE.name}.")


def _api_uri(name: str) -> str:
    return f"api/{_short(name)}.md"


LISTS = {"<!-- chapters -->": _reading_map, "<!-- modules -->": _api}


def _buttons(stem: str) -> str:
    files = {"notebook-outline: Notebook": f"{stem}.ipynb", "language-python: Script": f"{stem}.py"}
    links = [f'[:material-{label}]({file}){{ download="{file}" }}' for label, file in files.items()]
    return f'<div class="downloads" data-search-exclude markdown="1">\n{" ".join(links)}\n</div>'


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
    parts: dict[str, list[dict[str, str]]] = {}
    for chapter in chapters():
        parts.setdefault(chapter.part, []).append(chapter.nav)
    lists = {NAV: [{part: pages} for part, pages in parts.items()]}
    lists[NAV_API] = [{_short(name): _api_uri(name)} for name in modules()]
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
    try:
        return render(run(chapter.path, PACKAGE, CACHE), chapter.path.stem)
    except ChapterError as error:
        raise PluginError(str(error)) from None


def on_files(files, config):
    """Execute the chapters and add their pages, figures and notebooks."""
    _targets.clear()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rendered = list(pool.map(_execute, chapters()))
    for chapter, (text, extra) in zip(chapters(), rendered, strict=True):
        stem = chapter.path.stem
        title, _, rest = text.lstrip().partition("\n")
        extra |= {chapter.uri: f"{title}\n\n{_buttons(stem)}\n{rest}".encode()}
        extra |= {f"{stem}.ipynb": clean(chapter.path)}
        for uri, content in extra.items():
            included = InclusionLevel.INCLUDED  # although *.ipynb in the folder are ignored
            files.append(File.generated(config, uri, content=content, inclusion=included))
    for name in modules():
        page = f"# {_short(name)}\n\n::: {name}\n"
        files.append(File.generated(config, _api_uri(name), content=page))
    for file in files.documentation_pages():
        _collect(file.src_uri, file.content_string)
    return files


def on_page_markdown(text, page, config, files):
    """Fill in the lists and turn [(1.2)], [Theorem 1.1] and [Figure 1.1] into links."""
    here = page.file.src_uri
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
    which would be a third of a page.
    """
    entries = list(page.toc)
    while entries:
        entry = entries.pop()
        entry.title = re.sub(r"\\\((.*?)\\\)", r"\1", entry.title)
        entries += entry.children
    return re.sub(r'<span class="[nw]">([^<]*)</span>', r"\1", html)


def on_page_context(context, page, config, nav):
    """Let the edit link of a chapter lead to its script."""
    source = TUTORIAL / f"{page.file.name}.py"
    if source.exists():
        page.edit_url = f"{config.repo_url}/edit/main/tutorial/{source.name}"
    return context
