"""Which code ran: calls of named functions, counted during a run.

A benchmark that says `B-KFAC` must have called the update of B-KFAC. Some settings avoid it: a rank
above every width, for one. The method is then another one under its name.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import reduce, wraps
from importlib import import_module
from typing import Any
from unittest.mock import patch


@contextmanager
def counted(names: Iterable[str]) -> Iterator[dict[str, int]]:
    """Count the calls of functions, each given as `module:function` or `module:Class.method`.

    Only calls by that name in that module count.

    Raises:
        AttributeError: If there is no such function.
    """
    calls = dict.fromkeys(names, 0)
    with ExitStack() as stack:
        for name in calls:
            module, _, path = name.partition(":")
            *owners, attribute = path.split(".")
            owner = reduce(getattr, owners, import_module(module))
            counting = _counting(getattr(owner, attribute), name, calls)
            stack.enter_context(patch.object(owner, attribute, counting))
        yield calls


def _counting(function: Any, name: str, calls: dict[str, int]) -> Any:
    @wraps(function)
    def of(*args: Any, **options: Any) -> Any:
        calls[name] += 1
        return function(*args, **options)

    return of
