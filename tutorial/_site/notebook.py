"""A chapter as a jupytext script in; Markdown and files out. Nothing here knows MkDocs.

`run` executes a script in a fresh kernel of this interpreter, `render` writes the executed
notebook as Markdown, and `download` gives the notebook that readers download.
"""

import base64
import copy
import hashlib
import html
import json
import os
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import jupytext
import kernel
import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbformat import NotebookNode
from traitlets.config import Config

TIMEOUT = 300  # seconds per cell
MAX_SVG = 400_000  # bytes
BESIDE = 62  # characters of code that fit beside a text in a window of 1280 pixels
PLACEHOLDERS = ("#010203", "#fdfcfb")  # ink and paper while a figure is drawn
COLOURS = {"": ("#23262d", "#ffffff"), "-dark": ("#d8dbe3", "#1b1d23")}
# Headers of cells are read as Python strings; this undoes what becomes of \\top, \\beta, \\nu.
UNREAD = {ord(c): rf"\{name}" for c, name in zip("\a\b\t\n\v\f\r", "abtnvfr", strict=True)}
SET_UP = re.compile(r"^set_up\(", re.MULTILINE)  # in the cell that every chapter begins with
PAPER = f'<svg style="background: {COLOURS[""][1]}" '  # a page of Jupyter may be dark
INSTALL = """\
> Chapter {number} of kfac_scratch, with its outputs. To run it, install the package once: {where}\
`pip install -e ".[docs]"`. Cells whose code is collapsed draw figures or check what the text says."""
LINK = re.compile(r"\]\((\d\d_\w+)\.py(#[^)]*)?\)")

SETUP = f"""\
import matplotlib as _mpl
from matplotlib_inline.backend_inline import set_matplotlib_formats as _formats
_ink, _paper = {PLACEHOLDERS}
_mpl.rcParams.update({{
    "svg.fonttype": "path", "svg.hashsalt": "kfac", "font.size": 10.5, "axes.titlesize": 11,
    "axes.spines.top": False, "axes.spines.right": False, "legend.framealpha": 0.6,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
    "legend.facecolor": _paper, "figure.figsize": (6.4, 3.6), "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor",
                     "xtick.color", "ytick.color", "patch.edgecolor", "lines.color"), _ink),
    "axes.prop_cycle": _mpl.cycler(color=["#3f7fd6", "#dd6b32", "#35a077", "#b05fc4", "#a88a1b"]),
}})
_formats("svg", metadata={{"Date": None}}, bbox_inches="tight")
del _mpl, _formats, _ink, _paper
"""

TEMPLATE = """\
{%- extends 'markdown/index.md.j2' -%}
{%- macro fence(text, info) %}

``````{{ info }}
{{ text.rstrip() | strip_ansi }}
``````

{% endmacro -%}
{%- macro fold(title) %}

<details class="code" markdown="1">
<summary>{{ title }}</summary>
{{ caller() }}
</details>

{% endmacro -%}
{%- block markdowncell %}

{{ cell.source }}

{% endblock -%}
{%- block input -%}
{%- if 'hide-input' in cell.metadata.tags -%}
{%- call fold(cell.metadata.fold or 'Code') %}{{ fence(cell.source, 'python') }}{% endcall -%}
{%- else -%}{{ fence(cell.source, 'python') }}{%- endif -%}
{%- endblock -%}
{%- block outputs -%}
{%- if 'hide-output' in cell.metadata.tags -%}
{%- call fold('Output') %}{{ super() }}{% endcall -%}
{%- else -%}{{ super() }}{%- endif -%}
{%- endblock -%}
{%- block stream %}{{ fence(output.text, ' { .text .output }') }}{% endblock -%}
{%- block data_text %}{{ fence(output.data['text/plain'], ' { .text .output }') }}{% endblock -%}
{%- block data_html %}

{% if 'text/vnd.kfac-scratch.moving' in output.data %}{# of kfac_scratch.moving: one block of HTML #}
{{ output.data['text/vnd.kfac-scratch.moving'] }}
{% else %}
<div class="output-html" tabindex="0">
{{ output.data['text/html'] | replace('\\n\\n', '\\n') }}
</div>
{% endif %}

{% endblock -%}
"""


class ChapterError(Exception):
    """A chapter that does not run or cannot be rendered."""


def digest(path: Path, package: Path) -> str:
    """What an executed chapter depends on: its text, the package, these settings, the versions."""
    text = path.read_text(encoding="utf-8")
    h = hashlib.sha256(text.encode() + _common(package))
    for file in sorted(path.parent.glob("[a-z]*.py")):  # that the chapter shows
        if file.name in text:
            h.update(file.read_bytes())
    return h.hexdigest()[:16]


@cache
def _common(package: Path) -> bytes:
    """What all chapters depend on."""
    h = hashlib.sha256(Path(__file__).read_bytes() + sys.version.encode())
    for file in sorted([*package.rglob("*.py"), *package.rglob("*.json")]):
        h.update(file.relative_to(package).as_posix().encode() + b"\0" + file.read_bytes())
    for name in ("torch", "numpy", "matplotlib"):
        h.update(metadata.version(name).encode())
    return h.digest()


def forget() -> None:
    """Read the package again at the next call."""
    _common.cache_clear()


def stored(path: Path, package: Path, cache: Path) -> Path:
    """Where the executed chapter is kept, which exists if nothing has changed since."""
    return cache / f"{path.stem}.{digest(path, package)}.ipynb"


def run(path: Path, package: Path, cache: Path) -> NotebookNode:
    """Execute a chapter, or load the result from the cache."""
    kept = stored(path, package, cache)
    if kept.exists():
        return nbformat.read(kept, as_version=4)
    nb = jupytext.read(path)
    nb.cells.insert(0, nbformat.v4.new_code_cell(SETUP))
    where = {"metadata": {"path": str(path.parent)}}
    # The kernel of this interpreter, whatever else is registered as python3.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    client = NotebookClient(
        nb,
        km=kernel.manager(),
        timeout=TIMEOUT,
        extra_arguments=["--log-level=ERROR"],
        coalesce_streams=True,
        resources=where,
    )
    # One thread each, since several chapters run at once and their matrices are small.
    own = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "OMP_NUM_THREADS": "1"}
    try:
        client.execute(env={**os.environ, **own}, cleanup_kc=True)
    except Exception as error:  # a failing cell, a dead kernel, a timeout
        raise ChapterError(f"{path.name} failed:\n{error}") from None
    del nb.cells[0]
    cache.mkdir(parents=True, exist_ok=True)
    for old in cache.glob(f"{path.stem}.*.ipynb"):
        old.unlink()
    nbformat.write(nb, kept)
    return nb


def download(nb: NotebookNode, name: str, address: str = "") -> bytes:
    """An executed chapter as a notebook with its outputs, the same bytes on every build.

    Its first cell says how to install what the chapter imports, with the repository's address if
    there is one. Code that the page folds or leaves out is collapsed in Jupyter.
    """
    nb = copy.deepcopy(nb)
    nb.metadata.pop("jupytext", None)
    where = f"`git clone {address}`, and there " if address else "in a clone of the repository "
    text = INSTALL.format(number=int(name.split("_")[0]), where=where)
    nb.cells.insert(0, nbformat.v4.new_markdown_cell(text))
    count = 0
    for index, cell in enumerate(nb.cells):
        cell["id"] = f"cell-{index}"
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(r"](\1.ipynb)", cell.source)
        elif cell.cell_type == "code":
            cell.metadata.pop("execution", None)  # times
            cell.execution_count = count = count + 1
            if {"hide-input", "remove-input"} & {*cell.metadata.get("tags", ())}:
                cell.metadata.jupyter = NotebookNode(source_hidden=True)
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = count
                data = output.get("data", {})
                if svg := data.get("image/svg+xml"):
                    data["image/svg+xml"] = _coloured(svg.replace("<svg ", PAPER, 1))
    return (json.dumps(nb, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def render(nb: NotebookNode, name: str) -> tuple[str, dict[str, bytes]]:
    """Markdown of an executed notebook, and the files it refers to by their relative path."""
    files: dict[str, bytes] = {}
    cells: list[NotebookNode] = []
    for number, cell in enumerate(nb.cells, 1):
        tags = cell.metadata.setdefault("tags", [])
        cell.metadata.setdefault("fold", "")
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(r"](\1.md\2)", cell.source)
        elif SET_UP.search(cell.source):
            tags += ["hide-input"] if "hide-input" not in tags else []
            cell.metadata.fold = cell.metadata.fold or "Set-up"
        for output in cell.get("outputs", ()):
            where = f"{name}.py, code cell {number}, {cell.source[:60]!r}"
            if output.get("name") == "stderr":
                raise ChapterError(f"{where} writes to stderr:\n{output.text}")
            if "image/svg+xml" in output.get("data", {}) or "image/png" in output.get("data", {}):
                figure = _figure(output.data, cell, name, files, where)
                output.data = NotebookNode({"text/markdown": figure})
        beside = "beside" in tags and _width(cell) <= BESIDE
        cells += _beside(cells.pop(), cell) if beside else [cell]
    nb.cells = cells
    tagged = {"enabled": True, "remove_cell_tags": {"remove-cell"}}
    tagged |= {"remove_input_tags": {"remove-input"}, "remove_all_outputs_tags": {"remove-output"}}
    exporter = MarkdownExporter(config=Config({"TagRemovePreprocessor": tagged}))
    exporter.raw_template = TEMPLATE
    text, _ = exporter.from_notebook_node(nb)
    return text, files


def _width(cell: NotebookNode) -> int:
    """The longest line of what a cell shows, in characters; none of a figure."""
    shown = [] if "remove-input" in cell.metadata.tags else [cell.source]
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if "image/svg+xml" not in data and "image/png" not in data:
            shown.append(
                output.get("text") or data.get("text/markdown") or data.get("text/plain", "")
            )
    return max((len(line) for text in shown for line in text.splitlines()), default=0)


def _beside(left: NotebookNode, right: NotebookNode) -> list[NotebookNode]:
    """Text since the last heading to the left, a code cell to its right."""
    *head, last = re.split(r"(?m)^(?=##+ )", left.source)
    heading, _, text = last.partition("\n") if last.startswith("#") else ("", "", last)
    opening = '<div class="beside" markdown="1">\n<div class="beside-text" markdown="1">'
    above = "".join([*head, heading])
    left.source = f'{above}\n\n{opening}\n\n{text}\n\n</div>\n<div markdown="1">'
    return [left, right, nbformat.v4.new_markdown_cell("</div>\n</div>")]


def _coloured(svg: str, suffix: str = "") -> str:
    """A drawing in the colours of the light or of the dark scheme."""
    for old, new in zip(PLACEHOLDERS, COLOURS[suffix], strict=True):
        svg = svg.replace(old, new)
    return svg


def _figure(
    data: NotebookNode, cell: NotebookNode, name: str, files: dict[str, bytes], where: str
) -> str:
    """One drawing as a light and a dark image with its text alternative and caption."""
    alt = html.escape(cell.metadata.get("alt", "").translate(UNREAD))
    if not alt:
        raise ChapterError(f'{where} draws a figure without alt="..." in its cell header.')
    caption = cell.metadata.get("caption", "").translate(UNREAD)
    number = 1 + len({file.split("-")[1].split(".")[0] for file in files})
    stem, size, images = f"{name}_files/figure-{number}", "", {}
    if svg := data.get("image/svg+xml"):
        if len(svg) > MAX_SVG:
            raise ChapterError(f"{where}: a figure of {len(svg)} bytes; use rasterized=True.")
        box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
        width, height = (float(x) * 4 / 3 for x in box.groups()) if box else (0, 0)
        size = f'width="{width:.0f}" height="{height:.0f}"'
        for suffix in COLOURS:
            files[f"{stem}{suffix}.svg"] = _coloured(svg, suffix).encode()
        images = {f"{stem}.svg#only-light": size, f"{stem}-dark.svg#only-dark": size}
    else:
        files[f"{stem}.png"] = base64.b64decode(data["image/png"])
        images = {f"{stem}.png": ""}
    label = f"{int(name.split('_')[0])}.{number}"
    lines = [f'<img src="{src}" alt="{alt}" {size} loading="lazy">' for src in images]
    lines += [f'<figcaption markdown="span">**Figure {label}.** {caption}</figcaption>']
    return "\n".join([f'<figure class="plot" id="fig-{label}" markdown="1">', *lines, "</figure>"])
