"""What chapters show: installed source, tables, matrices as pictures, one style for a method.

All but `style` return a value that Jupyter displays, so put the call at the end of a cell.
matplotlib is needed only to draw.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
"""Where benchmarks keep what they measured: only the repository has this folder, and no wheel."""


class Source:
    """Source code that Jupyter displays highlighted, and `print` as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        fence = "`" * 6  # docstrings may hold shorter ones
        return f"{fence}python\n{self.text}\n{fence}"


class Markdown:
    """Text that Jupyter displays formatted, and `print` as it is."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    def _repr_markdown_(self) -> str:
        return self.text


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> Markdown:
    """A table: columns of text, then columns of numbers, which stand to the right.

    Use it for the results that a chapter is about. Not for the numbers of a check: print these.

    Args:
        head: The head of every column.
        rows: The cells of every row, as text in Markdown.
        text_columns: How many columns are text.

    Raises:
        ValueError: If a row has another number of cells than the head.
    """
    for row in rows:
        if len(row) != len(head):
            raise ValueError(f"A row has {len(row)} cells, the head {len(head)}: {list(row)}.")
    rule = ["---"] * text_columns + ["---:"] * (len(head) - text_columns)
    return Markdown("\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *rows)))


def source(*objects: Any) -> Source:
    """The source of functions, classes or methods as installed, each under its file and line."""
    return Source("\n\n\n".join(_listing(obj, lambda code: code) for obj in objects))


def code(*objects: Any) -> Source:
    """Like `source`, without the docstring: what is left is what the text beside it explains."""
    return Source("\n\n\n".join(_listing(obj, _without_docstring) for obj in objects))


def _listing(obj: Any, edit: Callable[[str], str]) -> str:
    obj = getattr(obj, "fget", None) or getattr(obj, "func", None) or obj  # (cached) properties
    lines, number = inspect.getsourcelines(obj)
    where = _location(obj)
    text = edit(textwrap.dedent("".join(lines)).rstrip())
    return f"# {where}:{number}\n{text}" if where else text


def _location(obj: Any) -> str:
    """The file relative to the folder that its top-level package lies in, or nothing."""
    package = inspect.unwrap(obj).__module__.partition(".")[0]
    origin = getattr(sys.modules.get(package), "__file__", None)
    file = Path(inspect.getsourcefile(inspect.unwrap(obj)) or "")
    if package == "__main__" or origin is None:
        return ""
    base = Path(origin).parent
    return file.relative_to(base.parent if Path(origin).name == "__init__.py" else base).as_posix()


def _without_docstring(text: str) -> str:
    definition = ast.parse(text).body[0]
    assert isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    first, lines = definition.body[0], text.splitlines()
    if ast.get_docstring(definition) is not None and len(definition.body) > 1:
        del lines[first.lineno - 1 : first.end_lineno]
        while not lines[first.lineno - 1].strip():
            del lines[first.lineno - 1]
    return "\n".join(lines)


def matrices(
    tensors: Mapping[str, Tensor],
    *,
    blocks: Mapping[str, tuple[int, int]] | None = None,
    digits: int | None = None,
    scale: float | None = None,
) -> "Figure":
    r"""Draw matrices side by side in one colour scale that is symmetric about zero.

    Zero takes the colour of the page, so the picture reads on light and dark backgrounds.

    Args:
        tensors: Matrices by title, which may hold math between dollar signs. A vector is
            drawn as one column.
        blocks: Sizes `(rows, columns)` of the blocks to be ruled off, by title.
        digits: If given, write each entry with so many digits after the point.
        scale: Magnitude at which the colours end, by default the largest entry's.

    Returns:
        The figure, which a cell displays as its last value; it is not left open in pyplot.
    """
    import matplotlib.pyplot as plt  # activates Jupyter's display of figures

    arrays = {title: t.detach().cpu().reshape(len(t), -1).double() for title, t in tensors.items()}
    limit = scale or max(float(M.abs().max()) for M in arrays.values()) or 1.0
    widths = [max(0.45, M.shape[1] / max(M.shape)) for M in arrays.values()]
    fig, axes = plt.subplots(
        *(1, len(arrays)),
        figsize=(min(9.6, 1.2 + 2.6 * sum(widths)), 2.9),
        width_ratios=widths,
        layout="constrained",
        squeeze=False,
    )
    for ax, (title, M) in zip(axes[0], arrays.items(), strict=True):
        image = ax.imshow(M.numpy(), cmap=diverging(), vmin=-limit, vmax=limit)
        ax.set(title=title, xlabel=f"{M.shape[0]} × {M.shape[1]}", xticks=[], yticks=[])
        ax.spines[:].set(visible=True, linewidth=0.6, alpha=0.5)
        if blocks and title in blocks:
            _rule(ax, M, blocks[title])
        if digits is not None:
            _annotate(ax, M, digits)
    bar = fig.colorbar(image, ax=axes[0].tolist(), shrink=0.75, aspect=16, pad=0.02)
    bar.outline.set(linewidth=0.6, alpha=0.5)
    plt.close(fig)
    return fig


STYLES: dict[str, tuple[str | None, str, bool]] = {
    "KFAC": ("#3f7fd6", "o", True),
    "reduce": ("#3f7fd6", "o", False),
    "EKFAC": ("#1f98a6", "D", True),
    "AdamW": ("#cf5f1e", "s", True),
    "Newton": ("#b05fc4", "^", True),
    "GGN": (None, "o", False),
    "gradient": ("#2f9a70", "x", True),
}
"""Colour, marker, and whether the marker is filled, by method. None is the colour of the text."""


def style(method: str) -> dict[str, Any]:
    """The colour and the marker of a method, which are the same in all figures of the book.

    Use it for curves of methods: `ax.plot(steps, losses, **style("KFAC"), label="KFAC")`. The
    colours reach a contrast of 3 on light and on dark paper. Those of figures that a reader can
    move are variables of the page (`tutorial/assets/moving.css`) with the same hues and shapes.

    Args:
        method: A key of `STYLES`: "KFAC" (or KFAC-expand), "reduce" for KFAC-reduce, "EKFAC",
            "AdamW", "Newton" for the Hessian, "GGN" for the exact matrix, "gradient" for SGD.

    Returns:
        Keyword arguments of `Axes.plot`: `color`, `marker` and `markerfacecolor`.

    Raises:
        KeyError: If the method has no style, with those that have one.
    """
    import matplotlib as mpl

    if method not in STYLES:
        raise KeyError(f"{method!r} has no style; these have: {', '.join(STYLES)}")
    colour, marker, filled = STYLES[method]
    colour = colour or mpl.rcParams["text.color"]
    return {"color": colour, "marker": marker, "markerfacecolor": colour if filled else "none"}


def diverging() -> Any:
    """The colours of numbers of both signs: blue below zero, the page's own at zero, orange above.

    Use it for a picture with limits that are symmetric about zero: `ax.imshow(values,
    cmap=diverging(), vmin=-end, vmax=end)`. `matrices` has it. A map whose middle is white would
    be a bright field on a dark page.
    """
    from matplotlib.colors import LinearSegmentedColormap

    blue, orange = (0.13, 0.42, 0.82), (0.88, 0.38, 0.12)
    opacity = (1.0, 0.62, 0.0)  # halfway a little stronger, which dark backgrounds need
    below, above = [(*blue, o) for o in opacity], [(*orange, o) for o in reversed(opacity)]
    at = (0.0, 0.25, 0.5, 0.5, 0.75, 1.0)
    return LinearSegmentedColormap.from_list("kfac", list(zip(at, below + above, strict=True)))


def _rule(ax: "Axes", M: Tensor, size: tuple[int, int]) -> None:
    style: dict[str, Any] = {"color": ax.xaxis.label.get_color(), "linewidth": 0.8, "alpha": 0.7}
    for row in range(size[0], M.shape[0], size[0]):
        ax.axhline(row - 0.5, **style)
    for column in range(size[1], M.shape[1], size[1]):
        ax.axvline(column - 0.5, **style)


def _annotate(ax: "Axes", M: Tensor, digits: int) -> None:
    for i, row in enumerate(M.tolist()):
        for j, entry in enumerate(row):
            ax.text(j, i, f"{entry:.{digits}f}", ha="center", va="center", fontsize="x-small")
