"""Replace expressions of a function in memory: the smallest proof that they are the cause.

A proof by patch is worth most if it changes one expression and nothing else; a few faults need two
or three. The function's source is compiled again, in its own module, with the expressions replaced.
Patches of one function can be nested if they replace different expressions.
"""

import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def mended(owner: Any, name: str, *changes: tuple[str, str]) -> Iterator[None]:
    """Have a module's function or a class's method use other expressions.

    Args:
        owner: The module or class.
        name: Of the function.
        changes: Pairs (old, new). Every old one occurs exactly once.

    Raises:
        ValueError: If an old expression is not found once: this is another version.
    """
    before = vars(owner)[name]
    function = inspect.unwrap(getattr(before, "__func__", before))
    source = getattr(function, "mended_source", "") or textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{name}: {old!r} occurs {source.count(old)} times, expected one.")
        source = source.replace(old, new)
    setattr(owner, name, _compiled(owner, name, source, function))
    try:
        yield
    finally:
        setattr(owner, name, before)


def _compiled(owner: Any, name: str, source: str, function: Any) -> Any:
    """A function of a module, or of a class of the same name, where private names are mangled."""
    made: dict[str, Any] = {}
    kept = source
    in_class = isinstance(owner, type)
    if in_class:
        source = f"class {owner.__name__}:\n" + textwrap.indent(source, "    ")
    exec(compile(source, inspect.getfile(function), "exec"), function.__globals__, made)
    result = vars(made[owner.__name__])[name] if in_class else made[name]
    getattr(result, "__func__", result).mended_source = kept
    return result
