"""The chapters as a drawing: one line for each, and an arc to every earlier one that it builds on.

It is an SVG of links, 360 units wide, so that it fits a phone and needs no script. Its colours are
those of the text around it.
"""

import html
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LINE, WIDTH, LEFT, WIDEST = 24, 360, 236, 150  # a line is as high as a finger's target must be
OFTEN = 2  # references that make a chapter one to build on
REFERENCES = re.compile(r"\((\d\d)_\w+\.py|\[(?:\(|Theorem |Figure )(\d+)\.\d+[a-z]?\)?\]")


@dataclass(frozen=True)
class Entry:
    """A chapter: the heading it stands under, its number, its title, its page and its text."""

    part: str
    number: int
    title: str
    page: str
    text: str


def builds_on(entry: Entry, known: Sequence[int]) -> list[int]:
    """Numbers of the earlier chapters that a chapter refers to twice, or else most often."""
    found = [int(page or number) for page, number in REFERENCES.findall(entry.text)]
    counts = Counter(number for number in found if number in known)
    often = [number for number, count in counts.items() if count >= OFTEN]
    return sorted(often or [number for number, _ in counts.most_common(1)])


def drawn(entries: Sequence[Entry]) -> str:
    """The drawing of chapters in reading order, on a single line: Markdown leaves that alone."""
    y, lines, arcs, part, at = 0, [], [], "", {}
    for entry in entries:
        if entry.part != part:
            part, y = entry.part, y + LINE
            lines.append(f'<text class="part" x="0" y="{y - 7}">{html.escape(part)}</text>')
        y += LINE
        middle = y - LINE / 2
        for number in builds_on(entry, [*at]):
            wide = min(WIDEST, 10 + (middle - at[number]) / 4)
            bend = f"{LEFT + wide:.0f}"
            arcs.append(
                f'<path d="M{LEFT} {middle}C{bend} {middle} {bend} {at[number]} {LEFT} {at[number]}"/>'
            )
        at[entry.number] = middle
        name = html.escape(f"{entry.number}. {entry.title}")
        lines.append(
            f'<a href="{entry.page}"><rect x="0" y="{y - LINE}" width="{LEFT}" height="{LINE}"/>'
            f'<circle cx="{LEFT}" cy="{middle}" r="3"/><text x="8" y="{middle + 4}">{name}</text></a>'
        )
    label = "The chapters in reading order, with arcs to those that they build on"
    opening = f'<svg viewBox="0 0 {WIDTH} {y + 4}" role="group" aria-label="{label}">'
    return f'<div class="graph">{opening}<g>{"".join(arcs)}</g>{"".join(lines)}</svg></div>'
