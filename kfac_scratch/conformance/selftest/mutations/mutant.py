"""A mutant: a second copy of this package beside the real one, with one snippet replaced."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import CodeType, ModuleType

from kfac_scratch.conformance.protocol import Adapter
from kfac_scratch.conformance.vocabulary import Task

PACKAGE = "kfac_scratch"
FOLDER = Path(__file__).parents[3]
OURS = FOLDER / "conformance" / "adapters" / "ours.py"


@cache
def sources() -> dict[str, str]:
    """The source of every module that may be mutated: the package without the oracle."""
    files = {".".join(p.relative_to(FOLDER).with_suffix("").parts): p for p in FOLDER.rglob("*.py")}
    return {
        name: path.read_text(encoding="utf-8")
        for name, path in files.items()
        if not name.startswith("conformance.")
    }


@dataclass(frozen=True)
class Mutant:
    """One wrong snippet in one module of this package.

    Attributes:
        name: The mistake.
        before: The snippet as it is, which occurs once in the package.
        after: What it becomes.
        case: The case that rejects it, and the flavour.
    """

    name: str
    before: str
    after: str
    case: Task

    @cached_property
    def module(self) -> str:
        """Where the snippet is, without the package's name.

        Raises:
            ValueError: If the snippet does not occur exactly once in the package.
        """
        places = {
            name: count for name, text in sources().items() if (count := text.count(self.before))
        }
        if sum(places.values()) != 1:
            raise ValueError(
                f"{self.name!r}: the snippet must occur once in the package, but occurs in "
                f"{places or 'no module'}. If the code has changed, so must the catalogue:\n"
                f"{self.before}"
            )
        return next(iter(places))

    @property
    def path(self) -> str:
        """The module's whole name."""
        return f"{PACKAGE}.{self.module}"

    def applied(self) -> str:
        """The module's source with the mistake."""
        return sources()[self.module].replace(self.before, self.after)

    def adapter(self) -> AbstractContextManager[Adapter]:
        """Our own adapter, on a copy of the package with the mistake."""
        return _copied(self)


@contextmanager
def _copied(mutant: Mutant) -> Iterator[Adapter]:
    """Import the package anew with a mutant's snippet, and have the old one back afterwards.

    The oracle itself is not copied: what judges is the real one.
    """
    finder = _Finder(mutant.path, mutant.applied())
    real = {name: module for name, module in sys.modules.items() if _is_copied(name)}
    for name in real:
        del sys.modules[name]
    sys.meta_path.insert(0, finder)
    try:
        yield _ours().Adapter()
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if _is_copied(name)]:
            del sys.modules[name]
        sys.modules.update(real)


def _is_copied(name: str) -> bool:
    oracle = f"{PACKAGE}.conformance"
    return name.split(".")[0] == PACKAGE and not f"{name}.".startswith(f"{oracle}.")


def _ours() -> ModuleType:
    """Our adapter's module once more, on the copy."""
    spec = spec_from_file_location("ours", OURS)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Finder(MetaPathFinder):
    """Finds the package's modules where they are, and has other source for one of them."""

    def __init__(self, changed: str, source: str) -> None:
        self.changed, self.source = changed, source

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where a module of the copy is loaded from."""
        if not _is_copied(name):
            return None
        spec = PathFinder.find_spec(name, path or [str(FOLDER.parent)])
        if spec is not None and name == self.changed:
            spec.loader = _Rewritten(name, str(spec.origin), self.source)
        return spec


class _Rewritten(SourceFileLoader):
    """Loads a module from other source than its file's."""

    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        """The other source, compiled."""
        code: CodeType = compile(self.source, self.path, "exec")
        return code
