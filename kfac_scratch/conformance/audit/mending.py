"""Replace expressions of a function in memory: the smallest proof that they are the cause.

A proof by patch is worth most if it changes one expression and nothing else. The function's source
is compiled again, in its own module, with the expression replaced.
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
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        if source.count(old) != 1:
            raise ValueError(f"{name}: {old!r} occurs {source.count(old)} times, expected one.")
        source = source.replace(old, new)
    made: dict[str, Any] = {}
    exec(compile(source, inspect.getfile(function), "exec"), function.__globals__, made)
    setattr(owner, name, made[function.__name__])
    try:
        yield
    finally:
        setattr(owner, name, before)
