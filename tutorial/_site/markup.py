"""A Markdown extension for what the book needs beside ordinary Markdown."""

import re
import xml.etree.ElementTree as etree

from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor
from markdown.treeprocessors import Treeprocessor

EQUATION = re.compile(r"\\tag\{(\d+\.\d+[a-z]?)\}")
FORMULA = re.compile(r"\\\((.*?)\\\)")


class _EquationIds(Treeprocessor):
    """Numbered equations can be linked, and a wide formula scrolls by keyboard, too."""

    def run(self, root: etree.Element) -> None:
        for element in root.iter("div"):
            if element.get("class") == "arithmatex":
                element.set("tabindex", "0")
                for index, number in enumerate(EQUATION.findall(element.text or "")):
                    if index == 0:
                        element.set("id", f"eq-{number}")
                    else:
                        etree.SubElement(element, "span", {"id": f"eq-{number}"})


class _Lighter(Postprocessor):
    """Code and output are not searched, and lists of contents show formulas without their marks.

    In code, names and spaces have the colour of code itself and need no element of their own,
    which would be a third of a page.
    """

    def run(self, text: str) -> str:
        entries = list(getattr(self.md, "toc_tokens", ()))
        while entries:
            entry = entries.pop()
            entry["name"] = FORMULA.sub(r"\1", entry["name"])
            entries += entry["children"]
        mark = r'<div data-search-exclude class="\1"'
        text = re.sub(r'<div class="([^"]*\bhighlight)"', mark, text)
        return re.sub(r'<span class="[nw]">([^<]*)</span>', r"\1", text)


class Markup(Extension):
    """Both, after all other extensions."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        md.treeprocessors.register(_EquationIds(md), "equation_ids", 15)
        md.postprocessors.register(_Lighter(md), "lighter", 1)


def makeExtension(**settings: object) -> Markup:  # noqa: N802
    """For renderers that name extensions by their module."""
    return Markup(**settings)
