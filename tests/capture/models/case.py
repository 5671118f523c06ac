"""A model with what capture says about it, and what many models are made of."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import (
    Module,
    Parameter,
)

N, S, D, C, WORDS, HEADS = 3, 3, 4, 2, 5, 2


@dataclass(frozen=True)
class Case:
    """A model and a batch, and what capture says.

    Attributes:
        build: Makes the model.
        inputs: Makes a batch.
        uncovered: Names of the parameters that no block covers, each with the reason. Those of
            normalisations are not among them: they have blocks, since they are named.
        refusal: What is said about the layers in `left_out`, if the model is refused with them.
        left_out: The layers that the way out leaves out; their parameters are in `uncovered`.
        tolerance: Largest relative error; more than that of float64 where float32 is inside.
    """

    build: Callable[[], Module]
    inputs: Callable[[], Any]
    uncovered: dict[str, str] = field(default_factory=dict)
    refusal: str = ""
    left_out: Collection[str] = ()
    tolerance: float = 1e-10


class Made(Module):
    """A forward pass, and its layers and parameters by name."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.way = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.way(self, x)


def parameter(*shape):
    return Parameter(torch.randn(*shape))


def vectors():
    return torch.randn(N, D)


def sequences():
    return torch.randn(N, S, D)


def words():
    return torch.randint(1, WORDS, (N, S))


def images():
    return torch.randn(N, 2, 4, 4)


def masked_words():
    """Sentences of different lengths, as tokenisers give them."""
    mask = torch.ones(N, S, dtype=torch.long)
    mask[0, -1] = 0
    return {"input_ids": words(), "attention_mask": mask}


def heads_apart(x):
    return x.unflatten(-1, (-1, 2)).transpose(1, 2)  # [N, heads, S, 2]


def heads_joined(x):
    return x.transpose(1, 2).flatten(2)


def softmax_attention(q, k, v, bias=0.0):
    return (q @ k.mT / q.shape[-1] ** 0.5 + bias).softmax(-1) @ v


def causal_mask(x):
    size = x.shape[1]
    return torch.full((size, size), -1e9, device=x.device).triu(1)


def every_position(x):
    """The numbers of the positions, for every sample."""
    return torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])


def all_positions(x):
    """The numbers of the positions, once for all samples."""
    return torch.arange(x.shape[1], device=x.device).unsqueeze(0)


def transformer_layer(kind=nn.TransformerEncoderLayer, **options):
    return kind(D, HEADS, 6, **{"dropout": 0.0, "batch_first": True} | options)


OF_NO_LAYER = "a parameter of no layer"
SHARED_BY_ALL = "its output is the same for all samples, so none has a gradient of its own"
