"""Catalogues are folders: whatever module defines the right name belongs, and no list names it."""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

LAST = 1000


def modules_with(package: str, folders: Iterable[str], name: str) -> dict[str, ModuleType]:
    """The modules of a folder that define a name, by their own name.

    First those that say their `PLACE`, a number, then all others by name: one order everywhere.
    Use it for catalogues in which a new entry is a new file.

    Args:
        package: The folder as a package, `__name__` of its `__init__`.
        folders: Where it lies, `__path__` of its `__init__`.
        name: What a module of the catalogue defines.
    """
    stems = sorted(info.name for info in iter_modules(folders))
    modules = {stem: import_module(f"{package}.{stem}") for stem in stems}
    belonging = {stem: module for stem, module in modules.items() if hasattr(module, name)}
    return dict(sorted(belonging.items(), key=lambda item: getattr(item[1], "PLACE", LAST)))
