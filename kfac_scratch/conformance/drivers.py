r"""Drive code that has no loss argument, or that draws labels by itself: make it deterministic.

An optimizer sees gradients only. If the loss is replaced by the linear function $\langle f, v
\rangle$, the vector sent backward is $v$; with the columns $v$ of a square root of every datum's
loss Hessian, one after the other, the sum of what it collects is the type-2 curvature, exactly.

- `rows`: every mini-batch is repeated for all columns, so that a row of the batch is one pair of
  datum and column. One pass; right also for code that squares gradients of rows (EKFAC).
- `columns`: one pass per column, with the batch as it is.

What such code divides by (the number of rows, say) is its own affair: an adapter multiplies the
vectors by the root of it, or states it as a scale.
"""

from collections.abc import Iterator
from importlib.metadata import version

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

from kfac_scratch.conformance.protocol import Request


def installed(*names: str) -> frozenset[str]:
    """Names of installed packages with their versions, for `Capabilities.libraries`."""
    return frozenset(f"{name} {version(name)}" for name in names)


def roots(request: Request) -> list[Tensor]:
    """For every mini-batch, vectors `[V, N, *output]` whose outer products sum to Hessians.

    The Hessian of a datum's part in the loss over all mini-batches, by its own outputs.
    """
    terms, divisor = sum_of(request.loss), total_divisor(request)
    found = []
    for X, y in request.batches:
        with torch.no_grad():
            f = request.model(X.clone())
        shape = f.shape[1:]

        def of_datum(v: Tensor, t: Tensor, shape: torch.Size = shape) -> Tensor:
            return terms(v.reshape(1, *shape), t.unsqueeze(0)) / divisor

        values, Q = torch.linalg.eigh(vmap(hessian(of_datum))(f.flatten(1), y))
        root = Q * values.clamp_min(0).sqrt().unsqueeze(1)  # [N, entries, V]
        found.append(root.permute(2, 0, 1).reshape(-1, *f.shape))
    return found


def rows(request: Request) -> list[tuple[Tensor, Tensor]]:
    """For every mini-batch, inputs and vectors `[V N, ...]`, column after column."""
    return [
        (X.repeat(len(S), *[1] * (X.ndim - 1)), S.flatten(0, 1))
        for (X, _), S in zip(request.batches, roots(request), strict=True)
    ]


def columns(request: Request) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and vectors `[N, ...]`, one pair for each mini-batch and column."""
    for (X, _), S in zip(request.batches, roots(request), strict=True):
        for v in S:
            yield X, v


def sum_of(loss: nn.Module) -> nn.Module:
    """The sum of a loss's terms, with its weights."""
    names = ("weight", "pos_weight")
    weights = {name: w for name in names if (w := getattr(loss, name, None)) is not None}
    if isinstance(loss, nn.CrossEntropyLoss):
        return nn.CrossEntropyLoss(reduction="sum", label_smoothing=loss.label_smoothing, **weights)
    made: nn.Module = type(loss)(reduction="sum", **weights)
    return made


def total_divisor(request: Request) -> float:
    """The number by which the loss over all mini-batches divides the sum of its terms."""
    if request.loss.reduction == "sum":
        return 1.0
    y = torch.cat([y for _, y in request.batches])
    with torch.no_grad():
        f = torch.cat([request.model(X.clone()) for X, _ in request.batches])
    return float(sum_of(request.loss)(f, y) / request.loss(f, y))
