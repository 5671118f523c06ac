"""Is every number finite? One question to the device for all tensors of a step.

A norm answers it: it is finite only if all entries are. Squares of finite numbers may overflow, so
that a norm which is not finite starts a search, entry by entry, which has the last word.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

from kfac_scratch.matrices.kronecker import Kronecker

Suspects = Mapping[str, Any]
"""Tensors, or values that hold tensors, by words that name them in a sentence."""


def all_finite(values: Iterable[Any]) -> bool:
    """Whether the norm of all entries is finite, by one synchronisation.

    Args:
        values: Tensors, matrices, inverses, and dictionaries or lists of these. Of a `Kronecker`
            the diagonals are enough: its factors are sums of outer products.
    """
    parts = [part for value in values for part in _leaves(value, _diagonals)]
    return bool(get_total_norm(parts).isfinite())


def first_not_finite(suspects: Suspects) -> str | None:
    """The name of the first value with an entry that is not finite, None if there is none.

    Cost: a pass over every entry, and a synchronisation for each tensor.
    """
    for name, value in suspects.items():
        if not all(bool(t.isfinite().all()) for t in tensors_in(value)):
            return name
    return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All floating-point tensors in a value: in fields of dataclasses, dictionaries and lists."""
    return _leaves(value, lambda _: None)


def _diagonals(value: Any) -> tuple[Tensor, ...] | None:
    return (value.A.diagonal(), value.B.diagonal()) if isinstance(value, Kronecker) else None


def _leaves(value: Any, known: Callable[[Any], tuple[Tensor, ...] | None]) -> Iterator[Tensor]:
    if (parts := known(value)) is not None:
        yield from parts
    elif isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif is_dataclass(value):
        for f in fields(value):
            yield from _leaves(getattr(value, f.name), known)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _leaves(part, known)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, known)
