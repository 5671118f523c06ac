"""What the comparisons of methods share: fresh seeds for results, and a check of what is stored."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from benchmarks.measure import stored

FIRST_FINAL_SEED = 100


class HasFinals(Protocol):
    """A task that knows how many fresh seeds its results are from."""

    @property
    def finals(self) -> int: ...


def final_seeds(task: HasFinals) -> list[int]:
    """Seeds that no search has seen."""
    return list(range(FIRST_FINAL_SEED, FIRST_FINAL_SEED + task.finals))


def never_called(where: str, calls: Mapping[str, int]) -> Iterator[str]:
    """The functions that should prove which method ran, and were not called."""
    for function, count in calls.items():
        if count == 0:
            yield f"{where}: {function} was never called"


def check(files: Mapping[Path, Callable[[dict], Iterable[str]]]) -> None:
    """Print for each file of results what it violates.

    Args:
        files: From a file to the function that finds what a result violates, in words.

    Raises:
        SystemExit: If anything is violated. A file that is missing violates nothing.
    """
    faults: list[str] = []
    for path, broken in files.items():
        found = list(broken(stored(path))) if path.exists() else []
        print(f"{path.name}: {(found or 'kept') if path.exists() else 'not stored'}")
        faults += found
    if faults:
        raise SystemExit(f"{len(faults)} violations of the protocol.")
