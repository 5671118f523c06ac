"""Is every number finite? One question to the device for all tensors of a step.

A norm answers it: it is finite only if all entries are. Squares of finite numbers may overflow, so
that a norm which is not finite starts a search, entry by entry, which has the last word.
"""

from collections.abc import Iterable, Mapping
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
    return bool(get_total_norm(tensors_in(list(values), (Kronecker,))).isfinite())


def first_not_finite(suspects: Suspects) -> str | None:
    """The name of the first value with an entry that is not finite, None if there is none.

    Cost: a pass over every entry, and a synchronisation for each tensor.
    """
    for name, value in suspects.items():
        if not all(bool(t.isfinite().all()) for t in tensors_in(value)):
            return name
    return None


def tensors_in(value: Any, by_diagonals: tuple[type[Kronecker], ...] = ()) -> list[Tensor]:
    """All floating-point tensors in a value: in fields of dataclasses, dictionaries and lists.

    Of products of the kinds `by_diagonals`, the diagonals of both factors stand for them.
    """
    parts: list[Any] = [value]
    tensors: list[Tensor] = []
    for part in parts:  # which grows meanwhile: a step looks at too many values for a recursion
        if isinstance(part, by_diagonals):
            tensors += [part.A.diagonal(), part.B.diagonal()]
        elif isinstance(part, Tensor):
            tensors += [part] if part.is_floating_point() else []
        elif is_dataclass(part):
            parts += [getattr(part, f.name) for f in fields(part)]
        elif isinstance(part, Mapping):
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
    return tensors
