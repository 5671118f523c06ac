"""Checkpoints: matrices and their inverses as nested dictionaries of tensors and numbers.

A checkpoint holds no code and no class names, so that `torch.load(..., weights_only=True)` reads
it. To read it, an example of the same structure is needed, which says what the tensors mean.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import at_least_float32
from kfac_scratch.one_hot import OneHot

HALF = (torch.float16, torch.bfloat16)


def tensors(value: Any) -> dict[str, Any]:
    """A matrix or its inverse as a nested dictionary of tensors and numbers, for checkpoints."""
    return {
        f.name: tensors(v) if is_dataclass(v := getattr(value, f.name)) else v
        for f in fields(value)
    }


def restored(like: Any, saved: Mapping[str, Any]) -> Any:
    """The value that `tensors` wrote, given any value `like` of the same structure.

    Numbers in half precision are cast to the precision of `like`.

    Raises:
        ValueError: If the structures differ.
    """
    names = [f.name for f in fields(like)]
    if set(names) != set(saved):
        raise ValueError(
            f"A checkpoint holds {sorted(saved)}, but a {type(like).__name__} consists of "
            f"{sorted(names)}: was it written with another approximation?"
        )
    return replace(like, **{name: _restored(getattr(like, name), v) for name, v in saved.items()})


def _restored(like: Any, saved: Any) -> Any:
    if isinstance(saved, Mapping):
        return restored(like, saved)
    if not isinstance(saved, Tensor):
        return saved
    if saved.dtype in HALF:
        saved = saved.to(like.dtype)
    return saved.to(like.device)


def example_io(W: Float[Tensor, "d_out d_in"]) -> LayerIO:
    """A layer with weights of this shape on one sample of ones, to make examples of matrices.

    Its rows have float32 at least, as those of `layer_ios` have.
    """
    W = at_least_float32(W)
    a, g = torch.ones_like(W[0]), torch.ones_like(W[:, 0])
    return LayerIO(a[None, None], g[None, None, None])


def one_hot_example_io(W: Float[Tensor, "d_out d_in"]) -> LayerIO:
    """`example_io` with a one-hot row, as an embedding has with `EXPAND`.

    Of such rows some matrices have another structure: `DiagonalKronecker`.
    """
    io = example_io(W)
    word = torch.zeros(1, 1, dtype=torch.long, device=W.device)
    return replace(io, a=OneHot(word, W.shape[1], io.a.dtype))
