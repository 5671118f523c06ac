"""Panels of SVG that state their axes, so that a script can move what is marked in them.

A panel is one drawing. Its `<svg>` says where every number lies: `data-x` and `data-y` hold a
`Scale`. A node that can move is marked with `data-move`, and its coordinates are written in nine
digits; the script of the site (`tutorial/assets/moving.js`) writes the same attributes anew.

The style of a drawing is in the drawing. Its colours are variables that the site sets for its light
and its dark scheme. Elsewhere, in a notebook say, each has the light value that stands beside it.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Number = float | int
Points = Iterable[tuple[Number, Number]]

SHEET = (
    """\
svg.drawing{font-family:system-ui,sans-serif}
.drawing text{font-size:12.5px;fill:var(--soft,#565c68);stroke:var(--paper,#fff);\
stroke-width:3px;stroke-linejoin:round;paint-order:stroke}
.drawing .strong{fill:var(--ink,#23262d);font-weight:600}
.drawing :is(.rule,.axis,.frame,.tiles,.contour,.guide,.line,.pick,.ring,.edge){fill:none}
.drawing .rule{stroke:var(--line,#e3e5ea)}
.drawing .axis{stroke:var(--soft,#565c68)}
.drawing .frame{stroke:var(--soft,#565c68);stroke-width:.8}
.drawing .tiles{stroke:var(--ink,#23262d);stroke-width:.7;opacity:.35}
.drawing .contour{stroke:var(--soft,#565c68);stroke-width:.8;opacity:.42}
.drawing .guide{stroke:var(--soft,#565c68);stroke-dasharray:3 3}
.drawing .spectrum{stroke:var(--ink,#23262d);stroke-width:.8;opacity:.45}
.drawing .line{stroke-width:2;stroke-linejoin:round}
.drawing .ring{stroke:var(--ink,#23262d);stroke-width:1.5}
.drawing .edge{stroke:var(--ink,#23262d);stroke-width:1.2}
.drawing .plus{fill:var(--plus,#e0611f)}
.drawing .minus{fill:var(--minus,#2973d9)}
.drawing .box{fill:var(--wash,#f6f7f9);stroke:var(--soft,#565c68)}
.drawing .zero{stroke:var(--ink,#23262d);stroke-width:4}
.drawing .pick{stroke:var(--paper,#fff);stroke-width:4}
.drawing .pick+.pick{stroke:var(--ink,#23262d);stroke-width:2}
.drawing .knob{fill:var(--paper,#fff);stroke:var(--ink,#23262d);stroke-width:2.5}
.drawing .hit{fill:transparent}
.drawing .open{fill:var(--paper,#fff)}
"""
    + "".join(
        f".drawing :is(.line,.mark).{name}{{stroke:var(--{name},{colour})}}"
        f".drawing :is(.area,.dot).{name}{{fill:var(--{name},{colour})}}"
        f".drawing text.{name}{{fill:var(--{name},{colour});font-weight:600}}\n"
        for name, colour in {
            "kfac": "#1f4f9e",
            "adamw": "#b04a00",
            "newton": "#8f3a86",
            "ggn": "#23262d",
            "gradient": "#007a5e",
        }.items()
    )
    + """\
.drawing .mark{stroke-width:1.6}
.drawing .mark.kfac{fill:var(--kfac,#1f4f9e)}
.drawing .mark.newton{fill:var(--newton,#8f3a86)}
.drawing .mark.gradient{fill:none}
.drawing .mark.ggn{fill:var(--paper,#fff)}
.drawing .area{fill-opacity:.3}
.drawing .area.ggn{fill-opacity:.1}
"""
)
"""The style of all drawings. `tutorial/assets/moving.css` gives its variables other values."""

ROUND_OFF = 1e-12

MARKERS = {
    "kfac": '<circle r="3"/>',
    "adamw": '<rect x="-3" y="-3" width="6" height="6"/>',
    "newton": '<path d="M0 -3.6L3.6 3H-3.6Z"/>',
    "ggn": '<circle r="3.2"/>',
    "gradient": '<path d="M-3 -3L3 3M-3 3L3 -3"/>',
}
"""The marker of every method, about the origin: the same as in `show.style`."""


@dataclass(frozen=True)
class Scale:
    """One axis of a panel: the numbers from `low` to `high` lie between two places.

    Attributes:
        low: The number at `start`.
        high: The number at `end`.
        start: A place in the units of the drawing.
        end: Another one.
        log: Whether equal ratios are equally long; then `low` and `high` are positive.
    """

    low: Number
    high: Number
    start: Number
    end: Number
    log: bool = False

    def at(self, value: Number) -> float:
        """The place of a number."""
        low, high, value = (self._even(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def value(self, place: Number) -> float:
        """The number at a place: the inverse of `at`."""
        low, high = self._even(self.low), self._even(self.high)
        even = low + (place - self.start) / (self.end - self.start) * (high - low)
        return math.exp(even) if self.log else even

    def _even(self, value: Number) -> float:
        return math.log(value) if self.log else float(value)

    def __str__(self) -> str:
        kind = " log" if self.log else ""
        return f"{self.low:.9g} {self.high:.9g} {self.start:.9g} {self.end:.9g}{kind}"


@dataclass
class Panel:
    """One drawing: nodes of SVG in the units of its two axes.

    It is drawn 100 to 400 units wide and shown at 0.9 to 1.25 pixels a unit, so that its text can
    be read on a phone, too.

    Attributes:
        name: What the script calls it. It is unique in its figure.
        title: Written above it, and read out: HTML without entities.
        x: The horizontal axis.
        y: The vertical one; its `start` is usually below its `end`.
        size: Width and height.
        nodes: What has been drawn.
    """

    name: str
    title: str
    x: Scale
    y: Scale
    size: tuple[int, int]
    nodes: list[str] = field(default_factory=list)

    def add(
        self,
        tag: str,
        style: str = "",
        move: str = "",
        /,
        text: Number | str = "",
        **attributes: Number | str,
    ) -> None:
        """Draw one node.

        Args:
            tag: Its kind, such as "path".
            style: Classes of `SHEET`.
            move: If given, the name by which the script finds the node.
            text: What it holds.
            **attributes: The others. Numbers are written in nine digits, and an underscore in a
                name is a hyphen.
        """
        named: dict[str, Number | str] = {"class": style, "data-move": move}
        named |= {name.replace("_", "-"): value for name, value in attributes.items()}
        written = "".join(f' {k}="{number(v)}"' for k, v in named.items() if v != "")
        self.nodes.append(f"<{tag}{written}>{text}</{tag}>" if text else f"<{tag}{written}/>")

    def text(self, x: Number, y: Number, text: str, style: str = "", anchor: str = "start") -> None:
        """Write at a place of the drawing."""
        self.add("text", style, text=text, x=x, y=y, text_anchor=anchor)

    def path(self, points: Points, digits: int = 9) -> str:
        """Straight lines through points that are given in numbers of the axes."""
        places = (f"{self.x.at(a):.{digits}g} {self.y.at(b):.{digits}g}" for a, b in points)
        return "M" + "L".join(places)

    def axes(self, across: Sequence[Number], up: Sequence[Number], labels: tuple[str, str]) -> None:
        """Draw both axes with a tick at some numbers, and write what they show."""
        left, right, bottom, top = self.x.start, self.x.end, self.y.start, self.y.end
        for v in up:
            self.add("path", "rule", d=f"M{number(left)} {number(self.y.at(v))}H{number(right)}")
            self.text(left - 6, self.y.at(v) + 4, f"{v:g}", anchor="end")
        for v in across:
            self.add("path", "axis", d=f"M{number(self.x.at(v))} {number(bottom)}v4")
            label = _power(v) if self.x.log else f"{v:g}"
            self.text(self.x.at(v), bottom + 17, label, anchor="middle")
        self.add("path", "axis", d=f"M{number(left)} {number(bottom)}H{number(right)}")
        self.text(right, bottom + 33, labels[0], anchor="end")
        self.text(left, top - 9, labels[1])

    def matrix(self, move: str, rows: Sequence[Sequence[Number]], limit: Number) -> None:
        """Draw the entries of a matrix: orange above zero, blue below; opacity is a root.

        Args:
            move: Beginning of the nodes' names: entry `(r, c)` is called `<move> <r> <c>`.
            rows: The matrix. Axes count its columns and rows.
            limit: The size of an entry that is opaque.
        """
        width = abs(self.x.at(1) - self.x.at(0))
        for r, row in enumerate(rows):
            for c, v in enumerate(row):
                place = {"x": self.x.at(c), "y": self.y.at(r), "width": width, "height": width}
                sign = "minus" if v < -ROUND_OFF * limit else "plus"
                opacity = (abs(v) / limit) ** 0.5
                self.add("rect", sign, f"{move} {r} {c}", **place, fill_opacity=opacity)

    def svg(self, **attributes: Number | str) -> str:
        """The drawing as one node, with its axes."""
        given = "".join(f' {name}="{number(value)}"' for name, value in attributes.items())
        return (
            f'<svg class="drawing" viewBox="0 0 {self.size[0]} {self.size[1]}" role="img" '
            f'aria-label="{plain(self.title)}" data-panel="{self.name}" '
            f'data-x="{self.x}" data-y="{self.y}"'
            f"{given}>{''.join(self.nodes)}</svg>"
        )


def grid(name: str, title: str, rows: int, columns: int, cell: Number) -> Panel:
    """An empty panel for a matrix, whose axes count columns from the left and rows from the top.

    Args:
        name: What the script calls the panel.
        title: Written above it.
        rows: How many rows the matrix has.
        columns: How many columns.
        cell: Width and height of an entry.
    """
    w, h = cell * columns, cell * rows
    size = (round(w + 2), round(h + 2))
    panel = Panel(name, title, Scale(0, columns, 1, 1 + w), Scale(0, rows, 1, 1 + h), size)
    panel.add("rect", "frame", x=1, y=1, width=w, height=h)
    return panel


def ticks(high: Number, most: int = 5) -> list[float]:
    """Round numbers from zero to `high`, with steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high / most))
    step = next(power * k for k in (1, 2, 5, 10) if high / (power * k) <= most)
    return [step * k for k in range(int(high / step + 1e-9) + 1)]


def plain(text: str) -> str:
    """HTML without its tags."""
    return re.sub("<.*?>", "", text)


def number(value: Number | str) -> str:
    """A number in nine digits; a text as it is."""
    return value if isinstance(value, str) else f"{value:.9g}"


def significant(value: Number, digits: int = 3) -> str:
    """A number for readers, with so many significant digits: `0.100`, `−2.50`, `1.00 · 10⁻⁴`."""
    size = abs(value)
    if value == 0 or 1e-3 <= size < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".").replace("-", "−")
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    raised = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{mantissa.replace('-', '−')} · 10{raised}"


def swatch(method: str) -> str:
    """A short line with the marker of a method, for a legend."""
    return (
        '<svg class="drawing swatch" viewBox="-14 -7 28 14" width="28" height="14" '
        f'aria-hidden="true"><path class="line {method}" d="M-13 0H13"/>'
        f'<g class="mark {method}">{MARKERS[method]}</g></svg>'
    )


def markers(prefix: str, methods: Iterable[str]) -> str:
    """Definitions of markers for paths, called `<prefix>-<method>`."""
    return (
        "<defs>"
        + "".join(
            f'<marker id="{prefix}-{m}" class="mark {m}" viewBox="-5 -5 10 10" markerWidth="10" '
            f'markerHeight="10" markerUnits="userSpaceOnUse">{MARKERS[m]}</marker>'
            for m in methods
        )
        + "</defs>"
    )


def _power(value: Number) -> str:
    exponent = str(round(math.log10(value))).replace("-", "−")
    return f'10<tspan dy="-4" font-size="9">{exponent}</tspan>'
