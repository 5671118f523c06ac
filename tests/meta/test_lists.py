"""Lists of modules are read off the files, and addresses stand in one place."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

import api
import package
import pytest

import kfac_scratch
from tests.meta.test_floors import MODULES, imported

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "kfac_scratch"
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
STATED = yaml.safe_load(re.search(r"^  api:.*\n(?:    .*\n)+", CONFIG, re.MULTILINE)[0])["api"]
HIDDEN = re.compile(r"(^|/)(_|test_)|/(findings|mutations|consumers)/(?!__init__)")


def pages():
    """Files that deserve a page."""
    paths = (path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
    return {path for path in paths if path.endswith("__init__.py") or not HIDDEN.search(path)}


# ------------------------------------------------------------------ the files
def test_every_file_and_folder_is_listed_once():
    listed = [module.path.relative_to(PACKAGE).as_posix() for module in package.files().values()]
    assert sorted(listed) == sorted(pages())
    inside = [module.name for modules in package.folders().values() for module in modules]
    assert sorted(inside) == sorted(module.name for module in package.modules())
    assert {*inside, *package.folders()} == {*package.files()}


def test_every_module_stands_after_those_that_it_imports():
    order = [module.name for module in package.modules()]
    for module in order:
        below = {name for name in imported(MODULES[module]) if name in order} - {module}
        assert below <= {*order[: order.index(module)]}, module


def test_everything_says_what_it_is():
    assert [name for name, module in package.files().items() if not module.summary] == []


@pytest.mark.parametrize("name", kfac_scratch.__all__)
def test_a_public_name_is_traced_to_the_module_that_defines_it(name):
    module = importlib.import_module(f"kfac_scratch.{package.origin('', name)}")
    assert getattr(module, name) is getattr(kfac_scratch, name)
    assert getattr(getattr(module, name), "__module__", module.__name__) in (
        module.__name__,
        "typing",  # aliases
        "collections.abc",
        "builtins",
    )


@pytest.mark.parametrize(
    ("line", "modules"),
    [
        ("from kfac_scratch import kfac, LayerIO", ["approximations.kfac", "layer_io"]),
        ("from kfac_scratch import curvature", ["curvature"]),
        ("from kfac_scratch.taylor import jets as taylor", ["taylor.jets"]),
        ("from kfac_scratch.linalg import psd_eigh, vec", ["linalg"]),
        ("import kfac_scratch.matrices.dense as dense", ["matrices.dense"]),
        ("from kfac_scratch.conformance import Adapter", ["conformance.protocol"]),
        (
            "from kfac_scratch.conformance.cases.families import CASES",
            ["conformance.cases.families"],
        ),
        (
            "from kfac_scratch.conformance.audit.findings.backpack_float64 import TITLE",
            ["conformance.audit.findings"],
        ),
        ("import torch\nfrom kfac_scratch_other import vec", []),
    ],
)
def test_modules_are_found_however_they_are_imported(line, modules):
    assert [*dict.fromkeys(package.used(ast.parse(line)))] == modules


def test_tests_are_found_where_the_module_is_mirrored():
    assert package.tests("linalg") == "tests/test_linalg.py"
    assert package.tests("matrices.damping") == "tests/matrices/test_damping.py"
    assert package.tests("matrices.dense") == "tests/matrices/"
    assert package.tests("conformance.judging.truth") == "tests/conformance/"
    assert package.tests("moving.cells") == "tests/test_moving.py"
    assert package.tests("nowhere") == ""


def test_values_are_documented_by_the_string_below_them(tmp_path):
    file = tmp_path / "values.py"
    file.write_text(
        'A = 1\n"""One.\n\nMore."""\nB: int = 2\n"""Two\nlines."""\nC = 3\n_D = 4\n"""No."""\n'
    )
    assert package.Module(file).defined == {"A": "One.", "B": "Two lines."}


# ------------------------------------------------------------------ the groups of the API
def test_every_folder_stands_in_one_group():
    folders = [folder for group in api.grouped(STATED).values() for folder in group]
    assert sorted(folders) == sorted(package.folders())


def test_a_folder_without_a_group_is_named():
    groups = {title: places for title, places in STATED.items() if "pinn" not in places}
    with pytest.raises(api.GroupError, match=r"kfac_scratch/\w+ stands in no group.*mkdocs\.yml"):
        api.grouped(groups)


def test_a_group_without_a_folder_is_named():
    with pytest.raises(api.GroupError, match=r"no folder fits Ghosts: \['ghosts'\]"):
        api.grouped({**STATED, "Ghosts": ["ghosts"]})


def test_every_page_is_in_the_navigation_and_on_the_overview():
    def leaves(entries):
        for entry in entries:
            ((_, below),) = entry.items()
            yield from [below] if isinstance(below, str) else leaves(below)

    written = api.pages()
    assert sorted(leaves(api.nav(STATED))) == sorted(written)
    linked = re.findall(r"\]\((api/[\w.]+\.md)\)", api.overview(STATED))
    assert sorted(linked) == sorted(written)


def test_the_page_of_public_names_links_each_of_them():
    text = api.pages()[api.PUBLIC]
    for name in kfac_scratch.__all__:
        source = package.files()[package.origin("", name)]
        assert name in source.defined, f"{source.full_name}.{name} has no docstring"
        assert f"\n| [`{name}`]({source.name}.md#{source.full_name}.{name}) | " in text


# ------------------------------------------------------------------ addresses and extras
OWN = re.compile(r"https?://[^\s)>\"']*kfac[-_]scratch")
TEXTS = [*ROOT.glob("*.*"), *(ROOT / "tutorial").rglob("*.*"), *PACKAGE.rglob("*.*")]


def addresses(path):
    """Addresses of this project in a file, unless mkdocs.yml states that they are real."""
    if path.suffix not in {".md", ".py", ".toml", ".yml", ".cff", ".json", ".html", ".css", ".js"}:
        return []
    if re.search(r"^repo_url:", CONFIG, re.MULTILINE):
        return []
    return OWN.findall(path.read_text(encoding="utf-8"))


def test_no_address_of_this_project_is_invented():
    assert [str(path) for path in TEXTS if addresses(path)] == []


def test_an_invented_address_would_be_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("See [us](https" + "://kfac-scratch.example.org/).")
    assert addresses(page)


def test_the_site_is_built_with_a_formatter_for_signatures():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    docs = [re.match(r"[\w-]+", name)[0] for name in project["optional-dependencies"]["docs"]]
    assert {"ruff", "black"} & {*docs}
