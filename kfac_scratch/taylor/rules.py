r"""The rules of Taylor mode: what one of PyTorch's functions does to the coefficients of a jet.

A jet of a batch of arrays `[N, ...]` has coefficients `c` of shape `[N, S, ...]`. A function that
is linear in its argument acts on all of them alike; a constant that is added reaches the value
only. Elementwise functions and products ask the expansion. All others are made of these: a layer
normalisation is a mean, a product and a power.

No rule mixes points: axis 0 is never summed, joined, split or indexed. A comparison looks at
values, and the kinks of functions such as `relu` have no derivative here.

Sources: see `expansions`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from string import ascii_letters
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.taylor import activations
from kfac_scratch.taylor.activations import Derivatives
from kfac_scratch.taylor.expansions import Expansion


@runtime_checkable
class Expanded(Protocol):
    """Coefficients and what they are the coefficients of: a `Jet`, as the rules see it."""

    @property
    def c(self) -> Float[Tensor, "N S *shape"]:
        """The coefficients."""
        ...

    @property
    def expansion(self) -> Expansion:
        """The derivatives that they are."""
        ...


def elementwise(derivatives: Derivatives, x: Expanded) -> Any:
    """The jet of an elementwise function of a jet, given the function's derivatives."""
    return _with(x, x.expansion.compose(derivatives, _rows(x.c)).reshape(x.c.shape))


def _with(x: Any, c: Tensor) -> Any:
    return replace(x, c=c)


def _rows(c: Float[Tensor, "N S *shape"]) -> Float[Tensor, "N S h"]:
    """The arrays as vectors, as the expansion takes them."""
    return c if c.ndim == 3 else c.reshape(*c.shape[:2], -1)


def _axes(x: Expanded, dim: int | Sequence[int], more: int = 0) -> list[int]:
    """Axes of the coefficients, given axes of the values: the axis of the points is refused.

    Args:
        x: The jet.
        dim: Axes of its values; negative ones from the last.
        more: How many axes the result has more.
    """
    found = [d % (x.c.ndim - 1 + more) for d in ([dim] if isinstance(dim, int) else dim)]
    if 0 in found:
        raise ValueError(f"Axis 0 of a jet is that of the points, which stay apart: got {dim=}.")
    return [d + 1 for d in found]


def _coefficients(y: Any, like: Expanded) -> Tensor:
    """Coefficients of a jet or a constant, with as many axes as those of another jet."""
    if isinstance(y, Expanded):
        if y.c.ndim != like.c.ndim:
            raise ValueError(
                f"Jets of {y.c.ndim - 1} and of {like.c.ndim - 1} axes would meet point by point "
                "and entry by entry at once: give both the same number, as x[:, 0:1] does."
            )
        return y.c
    y = torch.as_tensor(y, dtype=like.c.dtype, device=like.c.device)
    y = _aligned(y, like)
    return torch.cat([y, y.new_zeros(y.shape[0], like.c.shape[1] - 1, *y.shape[2:])], dim=1)


def _aligned(y: Tensor, like: Expanded) -> Tensor:
    """A constant with an axis for the coefficients; one without points is the same for all."""
    axes = like.c.ndim - 1
    if y.ndim > axes:
        raise ValueError(f"A constant of shape {tuple(y.shape)} meets a jet of {axes} axes.")
    return y.reshape((1,) * (axes - y.ndim) + y.shape).unsqueeze(1)


# ---- arithmetic ---------------------------------------------------------------------------------


def add(x: Any, y: Any, alpha: float | int = 1) -> Any:
    """`x + alpha * y`, of two jets, or a jet and a constant."""
    if not isinstance(x, Expanded):
        return add(multiply(y, alpha), x)
    return _with(x, torch.add(x.c, _coefficients(y, x), alpha=alpha))


def multiply(x: Any, y: Any) -> Any:
    """The product of two jets, entry by entry, or of a jet and a constant."""
    if not isinstance(x, Expanded):
        return multiply(y, x)
    if not isinstance(y, Expanded):
        return _with(x, x.c * (_aligned(y, x) if isinstance(y, Tensor) and y.ndim else y))
    f, g = x.c, _coefficients(y, x)
    if f.ndim == 3:
        return _with(x, x.expansion.product(f, g))
    f, g = torch.broadcast_tensors(f, g)
    return _with(x, x.expansion.product(_rows(f), _rows(g)).reshape(f.shape))


def divide(x: Any, y: Any) -> Any:
    """The quotient of two jets, or of a jet and a constant."""
    return multiply(x, raised(y, -1) if isinstance(y, Expanded) else 1 / y)


def raised(x: Any, exponent: Any) -> Any:
    """A jet to a power that is a number, or a positive number to the power of a jet."""
    if isinstance(exponent, Expanded):
        return _exponential(x, exponent)
    if isinstance(exponent, Tensor) and exponent.ndim:
        raise NotImplementedError(
            "Taylor mode has powers with a number as the exponent: write (exponent * x.log()).exp()"
            " for a positive x."
        )
    return elementwise(partial(activations.power, exponent=exponent), x)


def _exponential(base: Any, x: Expanded) -> Any:
    if isinstance(base, Expanded):
        return elementwise(activations.exp, multiply(elementwise(activations.log, base), x))
    base = torch.as_tensor(base, dtype=x.c.dtype, device=x.c.device)
    if not bool((base > 0).all()):
        raise ValueError("The base of a power whose exponent is a jet must be positive.")
    return elementwise(activations.exp, multiply(x, base.log()))


def matmul(x: Any, M: Any) -> Any:
    """A jet times a constant matrix or vector."""
    if not isinstance(x, Expanded) or isinstance(M, Expanded) or M.ndim > 2 or x.c.ndim < 3:
        raise ValueError(
            "A jet of at least two axes is multiplied by a constant matrix from the right: x @ M. "
            "torch.einsum has other products."
        )
    return _with(x, x.c @ M)


def _linear(x: Expanded, weight: Tensor, bias: Tensor | None = None) -> Any:
    c = matmul(x, weight.T).c
    return _with(x, c if bias is None else c + _coefficients(bias, x))


def einsum(equation: str, *operands: Any) -> Any:
    """`torch.einsum` with one or two jets among the operands, for every point by itself.

    Raises:
        ValueError: If there are more jets, or the first letter of a jet is not that of the output.
    """
    if len(operands) == 1 and isinstance(operands[0], Sequence):
        operands = tuple(operands[0])
    inputs, _, output = equation.replace(" ", "").partition("->")
    words, jets = inputs.split(","), [i for i, v in enumerate(operands) if isinstance(v, Expanded)]
    points = words[jets[0]][:1]
    apart = all(words[i].startswith(points) and words[i].count(points) == 1 for i in jets)
    if len(jets) > 2 or not apart or not output.startswith(points) or "." in equation:
        raise ValueError(
            f"einsum({equation!r}) of jets needs one or two of them, an output, no ellipsis, and "
            "the axis of the points first in each, as in 'ni,oi->no'."
        )
    if len(jets) == 2:
        first, second = (operands[i] for i in jets)
        word, joint = _outer(words[jets[0]], words[jets[1]], first, second)
        rest = [i for i in range(len(words)) if i not in jets]
        words, operands = [word, *(words[i] for i in rest)], (joint, *(operands[i] for i in rest))
    s = next(letter for letter in ascii_letters if letter not in equation)
    marked = [
        word[0] + s + word[1:] if isinstance(v, Expanded) else word
        for word, v in zip(words, operands, strict=True)
    ]
    values = [v.c if isinstance(v, Expanded) else v for v in operands]
    like = next(v for v in operands if isinstance(v, Expanded))
    return _with(like, torch.einsum(f"{','.join(marked)}->{points}{s}{output[1:]}", *values))


def _outer(word: str, other: str, x: Expanded, y: Expanded) -> tuple[str, Any]:
    """The product of two jets over all letters of both, and these letters."""
    if len({*word}) < len(word) or len({*other}) < len(other):
        raise ValueError(f"A letter stands twice in {word!r} or {other!r}: take a diagonal first.")
    joint = word + "".join(letter for letter in other if letter not in word)
    left = x.c.reshape(*x.c.shape, *[1] * (len(joint) - len(word)))
    order = [other.index(letter) for letter in joint if letter in other]
    right = y.c.permute(0, 1, *(i + 1 for i in order[1:]))
    sizes = iter(right.shape[2:])
    right = right.reshape(*right.shape[:2], *(next(sizes) if k in other else 1 for k in joint[1:]))
    return joint, multiply(_with(x, left), _with(y, right))


# ---- sums along axes ----------------------------------------------------------------------------


def _sum(x: Expanded, dim: int | Sequence[int], keepdim: bool = False) -> Any:
    return _with(x, x.c.sum(_axes(x, dim), keepdim=keepdim))


def _mean(x: Expanded, dim: int | Sequence[int], keepdim: bool = False) -> Any:
    return _with(x, x.c.mean(_axes(x, dim), keepdim=keepdim))


def _prod(x: Expanded, dim: int, keepdim: bool = False) -> Any:
    result = reduce(multiply, _unbind(x, dim))
    return _unsqueeze(result, dim) if keepdim else result


def _layer_norm(
    x: Expanded,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    axes = [-1 - i for i in range(len(normalized_shape))]
    if tuple(x.c.shape[2:][axes[-1] :]) != tuple(normalized_shape):
        raise ValueError(
            f"Values of shape {tuple(_values(x).shape)} end not on {normalized_shape}."
        )
    centred = add(x, _mean(x, axes, keepdim=True), alpha=-1)
    variance = _mean(raised(centred, 2), axes, keepdim=True)
    result = multiply(centred, raised(add(variance, eps), -0.5))
    result = result if weight is None else multiply(result, weight)
    return result if bias is None else add(result, bias)


# ---- shapes -------------------------------------------------------------------------------------


def take(x: Expanded, key: Any) -> Any:
    """Entries of every point: the first index is a full slice, or an ellipsis before others.

    Raises:
        IndexError: If points are chosen.
    """
    key = key if isinstance(key, tuple) else (key,)
    if key and key[0] is Ellipsis:
        named = sum(k is not None for k in key[1:])
        key = (slice(None),) * (x.c.ndim - 1 - named) + key[1:]
    if not key or not isinstance(key[0], slice) or key[0] != slice(None):
        raise IndexError("A jet keeps all of its points: the first index is a colon, x[:, 0:1].")
    return _with(x, x.c[(slice(None), slice(None), *key[1:])])


def _reshape(x: Expanded, *shape: Any) -> Any:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    N, values = len(x.c), x.c[:, 0]
    found = torch.empty(values.shape, device="meta").reshape(*sizes).shape
    if not found or found[0] != N:
        raise ValueError(f"The first axis of a jet is that of its {N} points: got shape {sizes}.")
    return _with(x, x.c.reshape(N, x.c.shape[1], *found[1:]))


def _flatten(x: Expanded, start_dim: int = 0, end_dim: int = -1) -> Any:
    return _with(x, x.c.flatten(*_axes(x, [start_dim, end_dim])))


def _unsqueeze(x: Expanded, dim: int) -> Any:
    return _with(x, x.c.unsqueeze(*_axes(x, dim, more=1)))


def _squeeze(x: Expanded, dim: int) -> Any:
    return _with(x, x.c.squeeze(*_axes(x, dim)))


def _unbind(x: Expanded, dim: int = 0) -> tuple[Any, ...]:
    return tuple(_with(x, c) for c in x.c.unbind(*_axes(x, dim)))


def _split(x: Expanded, sizes: Any, dim: int = 0) -> tuple[Any, ...]:
    return tuple(_with(x, c) for c in x.c.split(sizes, *_axes(x, dim)))


def _chunk(x: Expanded, chunks: int, dim: int = 0) -> tuple[Any, ...]:
    return tuple(_with(x, c) for c in x.c.chunk(chunks, *_axes(x, dim)))


def _first(xs: Sequence[Any]) -> Any:
    return next(x for x in xs if isinstance(x, Expanded))


def _cat(xs: Sequence[Any], dim: int = 0) -> Any:
    like = _first(xs)
    return _with(like, torch.cat([_coefficients(x, like) for x in xs], *_axes(like, dim)))


def _stack(xs: Sequence[Any], dim: int = 0) -> Any:
    like = _first(xs)
    parts = [_coefficients(x, like) for x in xs]
    return _with(like, torch.stack(parts, *_axes(like, dim, more=1)))


# ---- choices ------------------------------------------------------------------------------------


def _where(condition: Tensor, x: Any, y: Any) -> Any:
    like = _first((x, y))
    chosen = _aligned(condition, like)
    return _with(like, torch.where(chosen, _coefficients(x, like), _coefficients(y, like)))


def _values(x: Any) -> Any:
    return x.c[:, 0] if isinstance(x, Expanded) else x


def _of_values(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that gives a tensor, not a jet: comparisons, and constants of a jet's shape."""
    return lambda *xs, **options: function(*map(_values, xs), **options)


def _dropout(x: Expanded, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p:
        raise NotImplementedError(
            "Dropout in training draws another network at every call, which has no derivatives "
            "that a residual could be made of: call eval() first."
        )
    return x


# ---- elementwise functions ----------------------------------------------------------------------


def _of(derivatives: Derivatives) -> Callable[..., Any]:
    return lambda x, inplace=False: elementwise(derivatives, x)


def _with_options(derivatives: Callable[..., list[Tensor]], *names: str) -> Callable[..., Any]:
    """A function with numbers of its own, by position or by name."""

    def rule(x: Expanded, *given: float, inplace: bool = False, **named: float) -> Any:
        options = dict(zip(names, given, strict=False)) | named
        return elementwise(partial(derivatives, **options), x)

    return rule


def _gelu(x: Expanded, approximate: str = "none") -> Any:
    kinds = {"none": activations.gelu, "tanh": activations.gelu_tanh}
    return elementwise(kinds[approximate], x)


ELEMENTWISE: dict[str, Callable[..., Any]] = {
    **{
        name: _of(getattr(activations, name))
        for name in (
            *("tanh", "sigmoid", "exp", "sin", "cos", "sinh", "cosh", "log", "erf", "atan"),
            *("silu", "relu", "mish", "abs"),
        )
    },
    "arctan": _of(activations.atan),
    "elu": _with_options(activations.elu, "alpha"),
    "gelu": _gelu,
    "softplus": _with_options(activations.softplus, "beta", "threshold"),
    "pow": raised,
    "square": lambda x: raised(x, 2),
    "sqrt": lambda x: raised(x, 0.5),
    "rsqrt": lambda x: raised(x, -0.5),
    "reciprocal": lambda x: raised(x, -1),
    "neg": lambda x: multiply(x, -1),
}
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": add,
    "sub": lambda x, y, alpha=1: add(x, y, alpha=-alpha),
    "mul": multiply,
    "div": divide,
    "linear": _linear,
    "matmul": matmul,
    "einsum": einsum,
    "sum": _sum,
    "mean": _mean,
    "prod": _prod,
    "layer_norm": _layer_norm,
    "dropout": _dropout,
    "where": _where,
}
SHAPES: dict[str, Callable[..., Any]] = {
    "reshape": _reshape,
    "view": _reshape,
    "flatten": _flatten,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "unbind": _unbind,
    "split": _split,
    "chunk": _chunk,
    "cat": _cat,
    "concat": _cat,
    "stack": _stack,
}
OF_VALUES: dict[str, Callable[..., Any]] = {
    name: _of_values(getattr(torch, name))
    for name in ("gt", "lt", "ge", "le", "ones_like", "zeros_like", "full_like")
}
RULES = ELEMENTWISE | ARITHMETIC | SHAPES | OF_VALUES
"""A rule for each function of PyTorch that Taylor mode knows, by its name."""
