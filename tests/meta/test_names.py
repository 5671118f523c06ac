"""A name never means two things: public names of the package, and what stands for the version."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

import kfac_scratch
from tests.definitions import defined

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kfac_scratch"
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if "conformance" not in p.parts]


def places():
    """Where every public name is defined. The public namespace itself only imports."""
    found = defaultdict(list)
    for path in FILES:
        if path.name != "__init__.py":
            for name in defined(ast.parse(path.read_text(encoding="utf-8"))):
                found[name].append(path.relative_to(PACKAGE).as_posix())
    return found


def test_no_public_name_is_defined_twice():
    assert {name: files for name, files in places().items() if len(files) > 1} == {}


def test_a_name_that_is_also_a_modules_is_that_modules_own():
    """`kfac` is a function in `kfac.py`; nothing else is called like a module."""
    modules = {path.stem: path.relative_to(PACKAGE).as_posix() for path in FILES}
    for name, files in places().items():
        if name in modules:
            assert files == [modules[name]], name


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=str)
def test_a_folder_passes_on_no_names(path):
    if path.parent != PACKAGE:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes)


def test_the_public_namespace_lists_what_it_imports():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = [a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names]
    assert sorted(imported) == sorted(kfac_scratch.__all__)
    assert len(set(imported)) == len(imported)


def test_the_version_is_the_same_wherever_it_must_be_said():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert cited[1] == newest[1] == kfac_scratch.__version__
    assert not re.search(r'^version = "', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
