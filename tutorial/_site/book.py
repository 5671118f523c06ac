"""The site as plain Markdown, whatever renders it: nothing here knows MkDocs.

    python tutorial/_site/book.py FOLDER

writes every page with its lists filled in and its references resolved, figures, notebooks, scripts
and assets into an empty folder. Every tutorial/NN_*.py and every file of the package becomes a
page, and navigation and lists are made from the files themselves: see package.py and api.py.

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
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import api
import graph
import jupytext
import notebook
import package
import yaml
from markup import EQUATION
from package import PACKAGE, ROOT

log = logging.getLogger(
    "mkdocs.hooks.book"
)  # a strict build of MkDocs counts warnings below its name

TUTORIAL = ROOT / "tutorial"
CACHE = ROOT / ".cache" / "chapters"
INSIDES = "The oracle's insides"  # a group of the API
RUNS = re.compile(r"\bbenchmarks[./](\w+)")  # `python -m benchmarks.training`, `benchmarks/step.py`
EVERYWHERE = {"", "checks", "moving", "show"}  # tools of all chapters, not what one is about
NAV, NAV_API = "[0-9]*.py", "api/*.md"  # stand for lists in the nav of mkdocs.yml
OPENING = re.compile(r"# (\d+)\. (.+)\n\n\*\*Part ([IVX]+): (.+?)\.\*\* ((?:.+\n?)+)")

THEOREM = re.compile(r'<div[^>]* id="([a-z]+-\d+\.\d+)"[^>]*>\s*<p[^>]*>\s*<b>(\w+ \d+\.\d+)')
FIGURE = re.compile(r'<figure[^>]* id="(fig-(\d+\.\d+))"')
REFERENCE = re.compile(r"(?<![\]\w`\\])\[(\(\d+\.\d+[a-z]?\)|[A-Z]\w+ \d+\.\d+)\](?![\[(])")
FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2`*~* *$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)


class BookError(Exception):
    """A chapter or a list that cannot become a page."""


@dataclass(frozen=True)
class Stated:
    """What mkdocs.yml states: where the repository is, the groups of the API, words for searches."""

    repository: str
    edited: str
    groups: Mapping[str, Sequence[str]]
    found_by: Mapping[str, Sequence[str]]

    @classmethod
    def in_config(cls, config: Mapping[str, Any]) -> "Stated":
        """From the settings of MkDocs, or from the parsed file."""
        addresses = (config.get("repo_url") or "").rstrip("/"), config.get("edit_uri") or ""
        return cls(*addresses, config["extra"]["api"], config["extra"]["found_by"])

    def address(self, place: str, view: str = "blob") -> str | None:
        """Where a file of the repository is shown ("blob") or edited, if there is an address."""
        branch = (self.edited or "edit/main/").split("/")[1]
        return f"{self.repository}/{view}/{branch}/{place}" if self.repository else None


@dataclass(frozen=True)
class Chapter:
    """What a chapter says about itself."""

    path: Path

    @cached_property
    def opening(self) -> re.Match[str]:
        """Number, title, part number, part name and question."""
        beginning = "\n# %%".join(self.path.read_text(encoding="utf-8").split("\n# %%")[:2])
        cells = jupytext.reads(beginning, "py:percent").cells
        texts = [cell.source for cell in cells if cell.cell_type != "raw"]  # the kernel's header
        found = OPENING.match(f"{texts[0]}\n")
        if not found or int(found[1]) != int(self.path.name[:2]):
            raise BookError(
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

    @cached_property
    def modules(self) -> list[str]:
        """Modules and folders of the package that the chapter imports from, in reading order."""
        used = {*package.used(ast.parse(self.path.read_text(encoding="utf-8")))}
        order = [*dict.fromkeys(m.name for m in package.modules()), *package.folders()]
        return [n for n in order if n in used and package.room(n) not in EVERYWHERE]

    @cached_property
    def runs(self) -> list[str]:
        """Scripts of benchmarks that the chapter names."""
        found = dict.fromkeys(RUNS.findall(self.path.read_text(encoding="utf-8")))
        scripts = [f"benchmarks/{name}.py" for name in found]
        return [script for script in scripts if (ROOT / script).exists()]

    @cached_property
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


@cache
def chapters() -> list[Chapter]:
    """All chapters in reading order: part after part, as they begin, and by number within a part."""
    found = [Chapter(path) for path in sorted(TUTORIAL.glob(NAV))]
    parts = list(dict.fromkeys(chapter.part for chapter in found))
    return sorted(found, key=lambda chapter: parts.index(chapter.part))


# ------------------------------------------------------------------ lists made from the files
def _reading_map(stated: Stated) -> str:
    rows = ["| Chapter | Answers | Code and tests |", "| --- | --- | --- |"]
    part = ""
    for chapter in chapters():
        if chapter.part != part:
            part = chapter.part
            rows.append(f"| **Part {part}** | | |")
        question = " ".join(chapter.opening[5].split())
        title = f"{chapter.opening[1]}. {chapter.opening[2]}"
        rows.append(f"| [{title}]({chapter.uri}) | {question} | {_code(chapter, stated, '<br>')} |")
    return "\n".join(rows)


def _graph(_: Stated) -> str:
    entries = []
    for chapter in chapters():
        text = chapter.path.read_text(encoding="utf-8")
        title = chapter.opening[2].partition(":")[0]
        page = f"{chapter.path.stem}.html"  # renderers do not rewrite links in a drawing
        entries.append(graph.Entry(chapter.part, int(chapter.opening[1]), title, page, text))
    return graph.drawn(entries)


def _code(chapter: Chapter, stated: Stated, between: str) -> str:
    """Links to modules and benchmarks that a chapter uses, and where these are tested."""
    modules = ", ".join(f"[`{name}`]({api.uri(name)})" for name in chapter.modules)
    runs = ", ".join(_in_repository(script, stated) for script in chapter.runs)
    tests = ", ".join(_in_repository(place, stated) for place in chapter.tests)
    found = [modules, runs and f"Benchmark: {runs}", tests and f"Tests: {tests}"]
    return between.join(filter(None, found))


def _in_repository(place: str, stated: Stated) -> str:
    """A path of the repository, as a link if mkdocs.yml gives an address."""
    address = stated.address(place)
    return f"[`{place}`]({address})" if address else f"`{place}`"


LISTS = {
    "<!-- chapters -->": _reading_map,
    "<!-- graph -->": _graph,
    "<!-- modules -->": lambda stated: api.overview(stated.groups),
}


def _head(chapter: Chapter, stated: Stated) -> str:
    """Downloads of a chapter, and the code that it is about."""
    stem = chapter.path.stem
    files = {"notebook-outline: Notebook": f"{stem}.ipynb", "language-python: Script": f"{stem}.py"}
    links = [f'[:material-{label}]({file}){{ download="{file}" }}' for label, file in files.items()]
    code = f"Code: {_code(chapter, stated, '. ')}\n{{ .uses }}" if chapter.tests else ""
    text = f"{' '.join(links)}\n\n{code}"
    return f'<div class="downloads" data-search-exclude markdown="1">\n{text}\n</div>'


# ------------------------------------------------------------------ numbers and references
def _prose(text: str) -> str:
    """The text with all code blanked out."""
    return CODE.sub(" ", FENCE.sub(" ", text))


def _targets(pages: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Where each label stands: "(1.2)" -> ("01_flattening.md", "eq-1.2")."""
    targets: dict[str, tuple[str, str]] = {}
    for uri, text in pages.items():
        text = _prose(text)
        found = [(f"({n})", f"eq-{n}") for n in EQUATION.findall(text)]
        found += [(label, anchor) for anchor, label in THEOREM.findall(text)]
        found += [(f"Figure {n}", anchor) for anchor, n in FIGURE.findall(text)]
        for label, anchor in found:
            if label in targets:
                log.warning("%s is defined twice: %s and %s", label, targets[label][0], uri)
            targets[label] = (uri, anchor)
    return targets


def _linked(here: str, text: str, targets: Mapping[str, tuple[str, str]]) -> str:
    """Turn [(1.2)], [Theorem 1.1] and [Figure 1.1] into links."""
    for label in dict.fromkeys(REFERENCE.findall(_prose(text))):
        if label in targets:
            uri, anchor = targets[label]
            path = "" if uri == here else posixpath.relpath(uri, posixpath.dirname(here) or ".")
            text += f"\n\n[{label}]: {path}#{anchor}"
        else:
            log.warning("%s refers to %s, which does not exist", here, label)
    return text + "\n"


# ------------------------------------------------------------------ the whole
def forget() -> None:
    """Read all files again at the next call, as each build of `mkdocs serve` must."""
    package.forget()
    notebook.forget()
    chapters.cache_clear()


def nav(entries: Sequence[Any], stated: Stated) -> list[Any]:
    """The navigation of mkdocs.yml with every chapter, under its part, and every module."""
    forget()
    parts: dict[str, list[dict[str, str]]] = {}
    for chapter in chapters():
        parts.setdefault(chapter.part, []).append(chapter.nav)
    lists: dict[str, list] = {NAV: [{part: pages} for part, pages in parts.items()]}
    try:
        lists[NAV_API] = api.nav(stated.groups)
    except api.GroupError as error:
        raise BookError(str(error)) from None
    return list(_expanded(entries, lists))


def _expanded(entries, lists):
    for item in entries:
        if isinstance(item, dict):
            ((title, pages),) = item.items()
            yield {title: pages if isinstance(pages, str) else list(_expanded(pages, lists))}
        else:
            yield from lists.get(item, [item])


def _execute(chapter: Chapter, stated: Stated) -> tuple[str, dict[str, bytes]]:
    """Markdown of a chapter, and the files that belong to it, its notebook among them."""
    path, start = chapter.path, time.monotonic()
    cached = notebook.stored(path, PACKAGE, CACHE).exists()
    try:
        nb = notebook.run(path, PACKAGE, CACHE)
        own = {f"{path.stem}.ipynb": notebook.download(nb, path.stem, stated.repository)}
        text, figures = notebook.render(nb, path.stem)
    except notebook.ChapterError as error:
        raise BookError(str(error)) from None
    if not cached:
        log.info("Executed %s in %.0f s", path.name, time.monotonic() - start)
    title, _, rest = text.lstrip().partition("\n")
    words = stated.found_by.get(path.stem[3:], [])
    settings = _settings(search={"boost": 4}, **({"tags": words} if words else {}))
    return f"{settings}{title}\n\n{_head(chapter, stated)}\n{rest}", figures | own


def _settings(**settings: Any) -> str:
    """What stands before a page's text, for its renderer."""
    return f"---\n{yaml.safe_dump(settings)}---\n\n" if settings else ""


def _api(stated: Stated) -> dict[str, str]:
    """Pages of the API, which searches show last; not those that only the oracle itself uses."""
    inside, pages = tuple(api.grouped(stated.groups)[INSIDES]), api.pages()
    for uri, text in pages.items():
        hidden = uri.removeprefix("api/").startswith(inside)
        pages[uri] = _settings(search={"exclude": True} if hidden else {"boost": 0.25}) + text
    return pages


def files(stated: Stated) -> dict[str, bytes]:
    """Every page as Markdown, and what the chapters draw, by path. Chapters are executed."""
    missing = sum(
        not notebook.stored(chapter.path, PACKAGE, CACHE).exists() for chapter in chapters()
    )
    if missing:
        log.info("Executing %d of %d chapters: a few minutes if all", missing, len(chapters()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        executed = list(pool.map(partial(_execute, stated=stated), chapters()))
    written = [path for path in sorted(TUTORIAL.rglob("*.md")) if not _left_out(path)]
    pages = {path.relative_to(TUTORIAL).as_posix(): path.read_text("utf-8") for path in written}
    own: dict[str, bytes] = {}
    for chapter, (text, extra) in zip(chapters(), executed, strict=True):
        pages[chapter.uri] = text
        own |= extra
    pages |= _api(stated)
    for uri, text in pages.items():
        for mark, listed in LISTS.items():
            if mark in text:
                pages[uri] = text = text.replace(mark, listed(stated))
    targets = _targets(pages)
    return own | {uri: _linked(uri, text, targets).encode() for uri, text in pages.items()}


def _left_out(path: Path) -> bool:
    return bool({"_site", "__pycache__"} & {*path.relative_to(TUTORIAL).parts})


class _Settings(yaml.SafeLoader):
    """Reads mkdocs.yml without what it tells Python to call."""


_Settings.add_multi_constructor("tag:yaml.org,2002:python", lambda *_: None)


def write(folder: Path) -> None:
    """The whole book into an empty folder."""
    config = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), _Settings)  # noqa: S506
    if folder.exists() and any(folder.iterdir()):
        raise BookError(f"{folder} is not empty: name a folder that is new.")
    kept = [path for path in TUTORIAL.rglob("*") if path.is_file() and not _left_out(path)]
    for path in kept:
        target = folder / path.relative_to(TUTORIAL)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    for uri, content in files(Stated.in_config(config)).items():
        (folder / uri).parent.mkdir(parents=True, exist_ok=True)
        (folder / uri).write_bytes(content)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    try:
        write(Path(sys.argv[1]))
    except BookError as error:
        sys.exit(str(error))
