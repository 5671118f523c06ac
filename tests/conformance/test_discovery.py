"""Catalogues are derived from their folders: a new file belongs, and no list names it."""

import importlib

import pytest

from kfac_scratch.conformance.cases.families import CASES, FAMILIES, by_id
from kfac_scratch.conformance.discovery import modules_with
from kfac_scratch.conformance.selftest import museum, mutations


@pytest.fixture
def catalogue(tmp_path, monkeypatch):
    """A package `shelf` with entries, one that says its place, and a helper."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    for name, text in {
        "__init__": "",
        "b": "BOOKS = ['b']",
        "a": "BOOKS = ['a']",
        "z": "BOOKS = ['z']\nPLACE = 2",
        "y": "BOOKS = ['y']\nPLACE = 1",
        "helper": "PLACE = 0",
    }.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("shelf")


def test_modules_come_by_place_and_then_by_name(catalogue):
    found = modules_with("shelf", catalogue.__path__, "BOOKS")
    assert list(found) == ["y", "z", "a", "b"]
    assert [module.BOOKS for module in found.values()] == [["y"], ["z"], ["a"], ["b"]]


def test_families_keep_their_published_order():
    published = ["dense", "sharing", "convolutions", "weights", "fishers", "inverses", "operators"]
    assert list(FAMILIES)[: len(published)] == published
    assert "common" not in FAMILIES


def test_an_identifier_that_two_cases_have_is_refused():
    case = CASES["mlp-mse-sum"]
    with pytest.raises(ValueError, match="More than one case has the identifier mlp-mse-sum"):
        by_id({"one": [case], "other": [case]})


@pytest.mark.parametrize(("package", "name"), [(mutations, "MUTANTS"), (museum, "PIECES")])
def test_mutants_and_pieces_are_those_of_all_modules(package, name):
    modules = modules_with(package.__name__, package.__path__, name).values()
    assert getattr(package, name) == [entry for module in modules for entry in vars(module)[name]]
    assert len(list(modules)) >= 4
