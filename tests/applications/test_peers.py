"""What laplace-torch and kronfluence compute is what this package computes."""

import json
from pathlib import Path

import pytest

from tests.applications import peers

STORED = json.loads((Path(__file__).parent / "peers.json").read_text(encoding="utf-8"))
IMPORTED = {"laplace-torch": "laplace", "kronfluence": "kronfluence"}
COMPARED = {"laplace-torch": 2 * 2 * (3 + 3 + 2), "kronfluence": 2 * 3}


@pytest.mark.parametrize("library", peers.LIBRARIES)
def test_a_library_agrees_as_stored(library):
    found = STORED[library]
    assert len(found["errors"]) == COMPARED[library]
    assert max(found["errors"].values()) <= 1e-10
    assert found["version"]


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
