"""A figure with its controls: complete without a script, and moved by one on the site."""

import base64
import html
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kfac_scratch.moving.drawing import SHEET, Number, Panel, plain

MIME = "text/vnd.kfac-scratch.moving"
"""The type under which a figure sends its HTML for the site, beside `text/html` for notebooks."""

GAP, PICTURE_WIDTH, TITLE = 20, 960, 24


@dataclass(frozen=True)
class Slider:
    """A slider. The script makes a native one of it, which mouse, touch and keyboard can move.

    It has many parameters, because a native slider has.

    Attributes:
        name: What the script calls its number.
        label: What a reader calls it.
        low: The lowest position.
        high: The highest one.
        step: Between two positions that follow each other.
        start: The position before a reader moves it: a whole number of steps above `low`.
        log: Whether the number is ten to the power of the position.
        words: If given, what is shown at each position instead of the number.
    """

    name: str
    label: str
    low: Number
    high: Number
    step: Number
    start: Number
    log: bool = False
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        steps = round((self.start - self.low) / self.step)
        if not self.low <= self.start <= self.high + 1e-9:
            allowed = f"{self.low:g} to {self.high:g}"
            raise ValueError(f"{self.label} starts at {self.start:g}, which is not in {allowed}.")
        object.__setattr__(self, "start", round(self.low + steps * self.step, 9))

    @property
    def value(self) -> float:
        """The number at the start, on the slider's grid."""
        return 10.0**self.start if self.log else float(self.start)


@dataclass(frozen=True)
class MovingFigure:
    """A figure that a reader of the site can move, as a value that a cell displays.

    On the site (`MIME`) it is inline SVG. The script `tutorial/assets/moving.js` makes the controls
    and moves the marked nodes; without it, the drawing at the starting values stands there, and no
    control. In Jupyter, on GitHub and wherever else `text/html` is shown, it is one static picture
    without any script (`picture`), with the table, the state in words and the caption below it.

    Use it as the last value of a cell. Not for figures that nothing can be learnt from by moving.
    It has many parameters, because it is all that a page needs.

    Attributes:
        kind: Which function of the script moves it. Once a page.
        panels: Its drawings.
        controls: Its sliders.
        numbers: What the script computes with, as JSON.
        state: What the drawing shows at present, in words: HTML.
        caption: What to move and what to see: HTML.
        alt: What a reader who cannot see it needs to know.
        table: A legend or a table of numbers: HTML.
    """

    kind: str
    panels: tuple[Panel, ...]
    controls: tuple[Slider, ...]
    numbers: Mapping[str, Any]
    state: str
    caption: str
    alt: str
    table: str = ""

    def html(self) -> str:
        """The figure for the site: one block without blank lines, which Markdown leaves alone."""
        drawn = "".join(map(self._panel, self.panels))
        controls = [vars(control) | {"words": list(control.words)} for control in self.controls]
        numbers = json.dumps({"controls": controls, **self.numbers}, ensure_ascii=False)
        escaped = numbers.replace("</", "<\\/")
        sheet = f'<svg class="sheet" width="0" height="0" aria-hidden="true"><style>{SHEET}'
        block = (
            f'<figure class="moving" id="moving-{self.kind}" data-figure="{self.kind}" '
            f'data-search-exclude aria-label="{html.escape(self.alt)}">\n{sheet}</style></svg>'
            f'<div class="panels">{drawn}{self._table()}</div>\n'
            f'<div class="controls"></div><p class="state" aria-live="polite">{self.state}</p>\n'
            f"<figcaption>{self.caption}</figcaption>\n"
            f'<script type="application/json">{escaped}</script>\n</figure>'
        )
        return re.sub(r"\n\s*\n", "\n", block)

    def picture(self) -> str:
        """All panels as one SVG that stands alone: on white paper, in light colours."""
        placed, x, y, row = [], 0, 0, 0
        for panel in self.panels:
            w, h = panel.size
            if x and x + w > PICTURE_WIDTH:
                x, y, row = 0, y + row + GAP, 0
            title = f'<text class="strong" x="{x + 1}" y="{y + 14}">{plain(panel.title)}</text>'
            placed.append(title + panel.svg(x=x, y=y + TITLE, width=w, height=h))
            x, row = x + w + GAP, max(row, h + TITLE)
        width = max(sum(p.size[0] + GAP for p in self.panels), 1)
        size = f"{min(width, PICTURE_WIDTH)} {y + row}"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {size}" '
            f'width="{size.split()[0]}"><style>{SHEET}.knob,.hit{{display:none}}</style>'
            f'<rect width="100%" height="100%" fill="#fff"/>{"".join(placed)}</svg>'
        )

    def _panel(self, panel: Panel) -> str:
        return (
            f'<div class="panel" style="--w:{panel.size[0]}px"><b>{panel.title}</b>'
            f"{panel.svg()}</div>"
        )

    def _table(self) -> str:
        if not self.table:
            return ""
        return f'<div class="panel numbers" style="--w:320px">{self.table}</div>'

    def _repr_html_(self) -> str:
        """The static picture of a notebook, with the words that belong to it and no script."""
        data = base64.b64encode(self.picture().encode()).decode()
        words = "".join(f"<p>{text}</p>" for text in (self.state, self.caption) if text)
        image = f'<img alt="{html.escape(self.alt)}" src="data:image/svg+xml;base64,{data}">'
        return f"{image}\n{self.table}{words}"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {MIME: self.html(), "text/html": self._repr_html_(), "text/plain": repr(self)}

    def __repr__(self) -> str:
        return f"MovingFigure({self.kind!r}: {self.alt})"
