"""What laplace-torch and kronfluence compute is what this package computes."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from tests.applications import differences, peers

STORED = json.loads((Path(__file__).parent / "peers.json").read_text(encoding="utf-8"))
IMPORTED = {"laplace-torch": "laplace", "kronfluence": "kronfluence"}
COMPARED = {"laplace-torch": 2 * 2 * (3 + 3 + 2), "kronfluence": 2 * 3}


@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_a_library_agrees_as_stored(library):
    found = STORED[library]
    assert len(found["errors"]) == COMPARED[library]
    assert max(found["errors"].values()) <= 1e-10
    assert found["version"]


@pytest.mark.parametrize("module", [peers, differences], ids=["peers", "differences"])
def test_the_command_in_the_text_is_understood(module, tmp_path, monkeypatch):
    """As its docstring says it, where no library is installed."""
    file = tmp_path / "stored.json"
    monkeypatch.setattr(sys, "argv", [module.__name__, "--json", str(file)])
    monkeypatch.setattr(module, "version", not_installed)
    module.main()
    assert json.loads(file.read_text(encoding="utf-8")) == {}


def not_installed(library):
    raise PackageNotFoundError


@pytest.mark.long
@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_a_library_that_is_installed_agrees_now(library):
    try:
        __import__(IMPORTED[library])
    except (ImportError, RuntimeError) as reason:  # RuntimeError: of a torchvision of another build
        pytest.skip(f"{library} cannot be imported: {reason}")
    errors = peers.errors_of(library)
    assert set(errors) == set(STORED[library]["errors"])
    assert max(errors.values()) <= 1e-10
