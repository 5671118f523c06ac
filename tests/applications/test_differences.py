"""The findings about other libraries hold as stored, and again where the release is installed."""

import json
from pathlib import Path

import pytest

from tests.applications.differences import DIFFERENCES, installed, measured

STORED = json.loads(Path(__file__).with_name("differences.json").read_text(encoding="utf-8"))
each = pytest.mark.parametrize("name", DIFFERENCES)


@each
def test_what_is_stored_shows_the_difference(name):
    assert STORED[name]["version"] == DIFFERENCES[name].version
    assert DIFFERENCES[name].shows(STORED[name]["numbers"])


def test_nothing_else_is_stored():
    assert STORED.keys() == DIFFERENCES.keys()


@each
def test_right_numbers_would_not_show_it(name):
    """As if the library did what it states."""
    right = {
        "evidence_training_of_several_outputs": lambda what: 0.0 if "stated" in what else 0.5,
        "damping_of_kronecker_factors": lambda what: -30.0 if "False" in what else -40.0,
        "inverses_of_batches": lambda what: 1.0,
    }[name]
    assert not DIFFERENCES[name].shows({what: right(what) for what in STORED[name]["numbers"]})


@each
def test_a_maintainer_is_told_everything(name):
    text = DIFFERENCES[name].measure.__doc__
    assert text.startswith(f"{DIFFERENCES[name].library} {DIFFERENCES[name].version}: ")
    for part in (".py, line", "Expected: ", "Measured: ", "Suggestion: "):
        assert part in " ".join(text.split()), part


@pytest.mark.slow
@each
def test_it_is_found_again_where_the_release_is_installed(name):
    if not installed(DIFFERENCES[name]):
        pytest.skip(f"{DIFFERENCES[name].library} {DIFFERENCES[name].version} is not installed")
    try:
        numbers = measured(name)
    except (ImportError, RuntimeError) as reason:  # RuntimeError: of a torchvision of another build
        if "torchvision" not in str(reason):
            raise
        pytest.skip(f"{DIFFERENCES[name].library} cannot be imported: {reason}")
    assert DIFFERENCES[name].shows(numbers)
