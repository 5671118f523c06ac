"""Imports only go down: floors are read off the tree, and no room lies below itself."""

import ast
import importlib
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from pkgutil import walk_packages
from types import ModuleType

import pytest

import kfac_scratch

PACKAGE = Path(kfac_scratch.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def room(module):
    """The folder of the package that a module lies in, or the module itself."""
    return module.split(".")[0]


def imported(path):
    """Modules of the package that a file imports, at any place in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kfac_scratch"):
            base = node.module.removeprefix("kfac_scratch").lstrip(".")
            for alias in node.names:  # a module, or a name in one
                below = f"{base}.{alias.name}".lstrip(".")
                yield below if below in MODULES else base
        if isinstance(node, ast.Import):
            yield from (
                a.name.removeprefix("kfac_scratch.")
                for a in node.names
                if a.name.startswith("kfac_scratch.")
            )


def graph(name):
    """Who imports whom, among modules or among the rooms that these lie in."""
    edges = {name(module): set() for module in MODULES}
    for module, path in MODULES.items():
        edges[name(module)] |= {name(other) for other in imported(path) if other in MODULES}
    return {node: others - {node} for node, others in edges.items()}


def floors(edges):
    """Every node's floor: one above the highest that it imports.

    Raises:
        CycleError: If there is no order in which everything is above what it imports.
    """
    found = {}
    for node in TopologicalSorter(edges).static_order():
        found[node] = 1 + max((found[other] for other in edges[node]), default=-1)
    return found


@pytest.mark.parametrize("name", [str, room], ids=["modules", "rooms"])
def test_imports_only_go_down(name):
    assert floors(graph(name))["conformance" if name is room else "conformance.judging.harness"] > 0


def test_a_circle_of_imports_would_be_found():
    with pytest.raises(CycleError):
        floors({"linalg": {"capture"}, "capture": {"linalg"}})


KNOWN = {"border", "linalg", "one_hot", "layer_io", "matrices", "approximations"}
NOUNS = [m for m in MODULES if room(m) in KNOWN]


@pytest.mark.parametrize("module", NOUNS)
def test_a_paper_is_a_function_of_tensors_and_knows_no_network(module):
    """What lies above `LayerIO` and matrices never sees a model: only capture does."""
    assert "torch.nn import" not in MODULES[module].read_text(encoding="utf-8")
    assert {room(other) for other in imported(MODULES[module])} <= KNOWN


OPTIONAL = ("audit.findings", "adapters", "vectors.consumers")  # import what they are about


@pytest.mark.parametrize(
    "info", list(walk_packages(kfac_scratch.__path__, "kfac_scratch.")), ids=lambda info: info.name
)
def test_a_module_is_a_module_however_it_is_imported(info):
    """`import M as m` gives the module, not a function that bears its name."""
    if "__main__" in info.name or any(f".{part}." in info.name for part in OPTIONAL):
        pytest.skip("imports a package that is not installed, or runs a command")
    importlib.import_module(info.name)
    names: dict = {}
    exec(f"import {info.name} as m", names)
    assert isinstance(names["m"], ModuleType)
    assert names["m"].__name__ == info.name


HOUSE = re.compile(r"^\| (.+?) \| .+ \| .+ \|$", re.MULTILINE)


def test_contributing_shows_every_room_on_its_floor():
    """The table of the architecture page names every room, each below what imports it."""
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## The house")[2].partition("### Three walks")[0]
    rows = [re.findall(r"`(\w+)/?`", row) for row in HOUSE.findall(table)]
    floor = {name: i for i, row in enumerate(rows) for name in row}
    edges = graph(room)
    assert set(floor) == set(edges)
    for name, others in edges.items():
        assert all(floor[other] <= floor[name] for other in others), name
