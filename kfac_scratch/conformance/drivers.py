r"""Drive code that has no loss argument, or that draws labels by itself: make it deterministic.

An optimizer sees gradients only. If the loss is replaced by the linear function $\langle f, v
\rangle$, the vector sent backward is $v$; with the columns $v$ of a square root of every datum's
loss Hessian, one after the other, the sum of what it collects is the type-2 curvature, exactly.

- `rows`: every mini-batch is repeated for all columns, so that a row of the batch is one pair of
  datum and column. One pass; right also for code that squares gradients of rows (EKFAC).
- `columns`: one pass per column, with the batch as it is.

Both run the model, without gradients: call them before your code puts hooks into it.

What such code divides by (the number of rows, say) is its own affair: an adapter multiplies the
vectors by the root of it, or states it as a scale. It must be one number for all layers: what
differs between layers is a finding and stays visible. What the code makes of a mean loss is not
seen with linear losses. For the empirical Fisher, use the loss itself, as its users do.

What comes back need not be a matrix:

- `from_products` asks code that multiplies with its curvature for every column.
- `from_preconditioner` finds the curvature of code that only changes gradients, by which it takes
  as many questions as code that shows its matrix.
- `updates_to_forget` says how often to drive code with a running average until its start, say the
  identity, is forgotten; `without_start` takes the start out of a factor.
"""

import math
from collections.abc import Callable, Iterator
from importlib.metadata import version

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import hessian, vmap

from kfac_scratch.conformance.protocol import DenseAnswer, Request


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


# ---- what comes back ----------------------------------------------------------------------------


def from_products(product: Callable[[Tensor], Tensor], like: Float[Tensor, "..."]) -> DenseAnswer:
    """The block of code that multiplies something shaped like a gradient with its curvature.

    Use it for matrix-free code. Not where the matrix or its factors are there: return these.

    Cost: a product for each of the gradient's entries.

    Args:
        product: The code: of the gradient's shape, and so is its result. It must be linear.
        like: A gradient, in the order in which the answer's rows are numbered, see `LayerBlock`.
    """
    units = torch.eye(like.numel()).to(like).reshape(-1, *like.shape)
    return DenseAnswer(torch.stack([product(unit).detach().flatten() for unit in units], 1))


def from_preconditioner(
    precondition: Callable[[Tensor, float], Tensor], like: Float[Tensor, "..."]
) -> DenseAnswer:
    """The block `M` of code that only returns `(M + damping I)^-1` times a gradient.

    Use it for gradient preconditioners whose matrices cannot be read. Switch off whatever is not
    linear in the gradient, clipping for example, and let the matrices stay as they are meanwhile.
    Not for code that damps its factors instead of the block: that has no `M` to be found; read its
    factors, or answer only the cases of damped inverses.

    Cost: as many gradients as one has entries, and the inverse of a matrix of that size; twice
    that if `M` is far from 1. The rounding of `M` is the smallest with a damping near its largest
    eigenvalue, which is tried second.

    Args:
        precondition: The code, of a gradient and a damping. What it returns has the gradient's
            shape.
        like: A gradient, in the order in which the answer's rows are numbered, see `LayerBlock`.

    Raises:
        ValueError: If what is found has no positive eigenvalue.
    """
    M = _undamped(precondition, like, 1.0)
    if torch.linalg.matrix_norm(M) < 1e-6:  # below its rounding nothing can be seen
        M = _undamped(precondition, like, 1e-6)
    largest = float(torch.linalg.eigvalsh((M + M.mT) / 2)[-1])
    if not largest > 0:
        raise ValueError(
            f"The largest eigenvalue that was found is {largest}: precondition(W, damping) must "
            "return the damped inverse times W, and must not be the identity."
        )
    return DenseAnswer(_undamped(precondition, like, largest))


def _undamped(
    precondition: Callable[[Tensor, float], Tensor], like: Tensor, damping: float
) -> Tensor:
    P = from_products(lambda W: precondition(W, damping), like).M
    M = torch.linalg.inv(P)
    return M - damping * torch.eye(len(M)).to(M)


def updates_to_forget(decay: float) -> int:
    """How many updates with the same data leave nothing of where a running average started.

    Use it for code that starts with the identity and cannot be told otherwise. Not where the decay
    can be set to 0: then one update is enough.

    Args:
        decay: The share of the old value that an update keeps, from 0 to below 1.

    Raises:
        ValueError: If `decay` is not in this range.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}: it must be from 0 to below 1.")
    rounding = torch.finfo(torch.float64).eps
    return 1 if decay == 0 else math.ceil(math.log(rounding) / math.log(decay))


def without_start(
    average: Float[Tensor, "d d"], start: Float[Tensor, "d d"], decay: float, updates: int
) -> Float[Tensor, "d d"]:
    """The mean that a running average is of, without the share that its start still has in it.

    Use it on factors, of updates that all had the same data. Not on inverses.

    Args:
        average: After all updates `average = decay * average + (1 - decay) * new`.
        start: Before the first.
        decay: The share of the old value that an update keeps.
        updates: How many there were, at least one.
    """
    left = decay**updates
    return (average - left * start) / (1 - left)
