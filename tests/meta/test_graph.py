"""The drawing of the chapters: who builds on whom, and that it holds every chapter."""

import re
from pathlib import Path
from xml.etree import ElementTree

import graph
import pytest

TUTORIAL = Path(__file__).parents[2] / "tutorial"


def entries(*texts):
    return [graph.Entry("I · A", n, f"T{n} & more", f"0{n}_t.html", t) for n, t in enumerate(texts)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see (00_a.py)", [0]),
        ("(00_a.py), (01_b.py), (01_b.py#x)", [1]),  # twice, which the other is not
        ("[(1.2)], [(1.2)], [(0.3)], [(0.4b)]", [0, 1]),
        ("[Theorem 1.1] and [Figure 0.1] and (01_b.py)", [1]),
        ("own [(2.1)], [(2.1)]; later (07_z.py), (07_z.py)", []),
        ("numbers [0.25], [0.25] in code", []),
    ],
)
def test_a_chapter_builds_on_those_that_it_refers_to(text, found):
    assert graph.builds_on(entries("", "", text)[2], known=[0, 1]) == found


def test_the_drawing_holds_every_chapter_as_a_link_and_every_arc():
    svg = ElementTree.fromstring(graph.drawn(entries("", "(00_a.py)", "(01_b.py) (00_a.py)")))[0]
    assert [link.get("href") for link in svg.iter("a")] == ["00_t.html", "01_t.html", "02_t.html"]
    assert [t.text for t in svg.iter("text")] == ["I · A", *(f"{n}. T{n} & more" for n in range(3))]
    assert len([*svg.iter("path")]) == 2
    assert {float(rect.get("height")) for rect in svg.iter("rect")} == {24}  # WCAG's target size


def test_arcs_and_titles_stay_inside():
    chapters = sorted(TUTORIAL.glob("[0-9]*.py"))
    found = [
        graph.Entry("I · A", i, "T", f"{path.stem}.html", path.read_text(encoding="utf-8"))
        for i, path in enumerate(chapters)
    ]
    drawing = graph.drawn(found)
    reach = [float(x) for x in re.findall(r"C(\d+)", drawing)]
    assert max(graph.LEFT + 0.75 * (x - graph.LEFT) for x in reach) < graph.WIDTH  # of a cubic
    assert "\n" not in drawing
