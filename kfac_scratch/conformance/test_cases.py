"""The oracle as tests, by `pytest --pyargs kfac_scratch.conformance --kfac-adapter ...`."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kfac_scratch.conformance.cases.selection import expected_failures, tasks
from kfac_scratch.conformance.judging.isolation import Isolated, Place
from kfac_scratch.conformance.vocabulary import Flavour


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each case and flavour; expected failures are strict."""
    path = metafunc.config.getoption("kfac_expected")
    expected = expected_failures(Path(path) if path else None)
    parameters = [
        pytest.param(
            case,
            flavour,
            id=f"{case}-{flavour}",
            marks=[pytest.mark.xfail(reason=expected[case, flavour], strict=True)]
            if (case, flavour) in expected
            else [],
        )
        for case, flavour in tasks()
    ]
    metafunc.parametrize(("case", "flavour"), parameters)


@pytest.fixture(scope="session")
def implementation(request: pytest.FixtureRequest) -> Iterator[Isolated]:
    """The adapter in a process of its own."""
    option = request.config.getoption
    if not option("kfac_adapter"):
        pytest.skip("no implementation to judge: give --kfac-adapter pkg.mod:Adapter")
    python = option("kfac_python") or sys.executable
    place = Place(option("kfac_adapter"), python, option("kfac_device"), option("kfac_timeout"))
    isolated = Isolated(place)
    yield isolated
    isolated.stop()


def test_case(implementation: Isolated, case: str, flavour: Flavour) -> None:
    """An implementation is exact where a theorem says so, else what the definition says."""
    result = implementation.verdict(case, flavour)
    if result.verdict == "not-supported":
        pytest.skip(result.words)
    assert result.passes, f"{result.verdict}: {result.words}"
