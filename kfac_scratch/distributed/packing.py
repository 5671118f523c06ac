"""Tensors on the wire: joined to few large ones, and symmetric matrices without their lower half.

All functions here are pure, and what is unpacked equals what was packed, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

BUCKET = 25 * 2**20  # bytes of one message


def upper_triangle(M: Float[Tensor, "d d"]) -> Float[Tensor, " t"]:
    """The `d (d + 1) / 2` entries on and above the diagonal."""
    i, j = torch.triu_indices(*M.shape, device=M.device)
    return M[i, j]


def from_triangle(entries: Float[Tensor, " t"], d: int) -> Float[Tensor, "d d"]:
    """The symmetric matrix that `upper_triangle` was taken of."""
    M = entries.new_empty(d, d)
    i, j = torch.triu_indices(d, d, device=entries.device)
    M[i, j] = M[j, i] = entries
    return M


def is_symmetric(t: Tensor) -> bool:
    """Whether a tensor is a matrix that equals its transpose, bit for bit."""
    return t.ndim == 2 and t.shape[0] == t.shape[1] and torch.equal(t, t.mT)


def buckets(tensors: Sequence[Tensor], limit: int = BUCKET) -> Iterator[list[int]]:
    """Positions of tensors that travel together: of one dtype, and at most `limit` bytes.

    A tensor larger than the limit travels alone.
    """
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        bucket: list[int] = []
        size = 0
        for i in (i for i, t in enumerate(tensors) if t.dtype == dtype):
            if bucket and size + tensors[i].nbytes > limit:
                yield bucket
                bucket, size = [], 0
            bucket.append(i)
            size += tensors[i].nbytes
        if bucket:
            yield bucket


def through(
    tensors: Sequence[Tensor], transmit: Callable[[Tensor], object], limit: int = BUCKET
) -> list[Tensor]:
    """Tensors of the same shapes, after a collective has changed their entries.

    Args:
        tensors: What goes in, which stays as it is.
        transmit: A collective that changes one flat tensor in place.
        limit: The most bytes in one flat tensor.
    """
    results = list(tensors)
    for bucket in buckets(tensors, limit):
        flat = torch.cat([tensors[i].reshape(-1) for i in bucket])
        transmit(flat)
        parts = flat.split([tensors[i].numel() for i in bucket])
        for i, part in zip(bucket, parts, strict=True):
            results[i] = part.reshape(tensors[i].shape)
    return results


def leaves(value: Any) -> list[Tensor]:
    """The tensors in a matrix or an inverse, in the order of its fields."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [t for f in fields(value) for t in leaves(getattr(value, f.name))]
    if isinstance(value, list | tuple):
        return [t for part in value for t in leaves(part)]
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in leaves(part)]
    return []


def with_leaves(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same matrix or inverse with other tensors, in the order of `leaves`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(
            value, **{f.name: with_leaves(getattr(value, f.name), tensors) for f in fields(value)}
        )
    if isinstance(value, list | tuple):
        return type(value)(with_leaves(part, tensors) for part in value)
    if isinstance(value, Mapping):
        return {key: with_leaves(part, tensors) for key, part in value.items()}
    return value
