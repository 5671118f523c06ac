r"""Rules: how a function of PyTorch applies a weight to rows, `z = W a + b`.

Every layer calls a function in the end, and so does code that has weights but no layers. A rule
reads a function's arguments and says which one is the input, how the weight is `W`, and with which
settings it is used. The scale and shift of a normalisation are one column whose input is 1, so that
the vectors of a sample are its gradient. A rule need not be trusted: `plan` compares the gradients
that follow from it with those of autodiff, and refuses a wrong rule.

| function | input | `W` | bias |
|---|---|---|---|
| `F.linear(x, w, b)` | `x` | `w` | `b` |
| `torch.inner(x, w)` | `x` | `w` | added by the next function |
| `x @ w`, `torch.matmul`, `torch.mm`, `torch.bmm` | `x` | `w.T` | added by the next function |
| `w @ x` | columns of `x` | `w` | |
| `torch.einsum("ni,oi->no", x, w)` and its kin | `x` | `w`, output letters first | as for `x @ w` |
| `torch.addmm(b, x, w)` | `x` | `w.T` | `b` |
| `F.conv1d/2d/3d(x, w, b, ...)` | `x` | `w` by groups | `b` |
| `F.conv_transpose1d/2d/3d(x, w, b, ...)` | `x` | `w` by groups, `in` and `out` exchanged | `b` |
| `F.embedding(t, w)`, `w[t]` | words `t` | `w.T` | |
| `F.layer_norm(x, ..., w, b)` and its kin | 1 | `[w, b]` as one column | |

`F.multi_head_attention_forward` is made of such functions, and is opened for them.

Some rows of a weight, such as `w[:k]` or a `chunk`, count as the whole weight with vectors that are
zero at the other rows. The block is exact. KFAC-expand then has no covariance between vectors of
rows that are used apart; KFAC-reduce has.

Source: `torch.overrides`, for the mechanism: a `TorchFunctionMode` sees every function that is
called on tensors before it runs.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from string import ascii_uppercase
from types import FunctionType
from typing import Any, NamedTuple

import torch
from jaxtyping import Num
from torch import Tensor
from torch.nn import functional

from kfac_scratch.capture.layers import (
    ConvolutionUse,
    EmbeddingUse,
    LinearUse,
    ScaleUse,
    TransposedConvolutionUse,
    Use,
)


class Applied(NamedTuple):
    """A weight as a function applies it.

    Attributes:
        x: The input.
        W: The weight as matrices side by side, as a view of what the function got.
        bias: What is added; None if nothing is.
        use: The settings.
        order: The output's axes in the order of the rows; None if they have it.
    """

    x: Tensor
    W: Num[Tensor, "groups d_out *d_in"]
    bias: Tensor | None
    use: Use
    order: tuple[int, ...] | None = None


Rule = Callable[..., Applied | None]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Applied:
    return Applied(input, weight[None], bias, LinearUse(weight.dtype))


def _matmul(input: Tensor, other: Tensor) -> Applied | None:
    W = _of_all_samples(other)
    if W.ndim != 2 or input.ndim < 2:
        return None
    return Applied(input, W.mT[None], None, LinearUse(W.dtype))


def _matmul_from_left(input: Tensor, other: Tensor) -> Applied | None:
    """What enters are columns of `other`, and columns leave."""
    W, lead = _of_all_samples(input), other.ndim - 2
    if W.ndim != 2 or lead < 0:
        return None
    return Applied(other.mT, W[None], None, LinearUse(W.dtype), (*range(lead), lead + 1, lead))


def _of_all_samples(matrices: Tensor) -> Tensor:
    """One matrix of a stack if all are the same by `expand`."""
    same = matrices.ndim == 3 and (matrices.stride(0) == 0 or len(matrices) == 1)
    return matrices[0] if same else matrices


def _einsum(equation: str, *operands: Tensor, weight: int) -> Applied | None:
    """A matrix has a letter that leaves, for outputs, and one that does not, for inputs.

    Args:
        equation: The letters.
        operands: Two tensors.
        weight: The number of the one that is the weight.
    """
    if len(operands) != 2 or not isinstance(equation, str) or "->" not in equation:
        return None
    W, x, letters = operands[weight], operands[1 - weight], equation.replace(" ", "")
    known = letters.split("->")[0].split(",")[1 - weight].replace("...", "")
    more = [s for s in ascii_uppercase if s not in letters][: x.ndim - len(known)]
    terms, out = letters.replace("...", "".join(more)).split("->")
    of_W, of_x = (terms.split(",")[i] for i in (weight, 1 - weight))
    o, i = [s for s in of_W if s in out], [s for s in of_W if s not in out]
    lead = [s for s in of_x if s in out]
    if len(o) != 1 or len(i) != 1 or sorted(of_x) != sorted(lead + i) or len(lead + o) != len(out):
        return None
    order = tuple(out.index(s) for s in lead + o)
    return Applied(
        x.permute([of_x.index(s) for s in lead + i]),
        (W if of_W == o[0] + i[0] else W.mT)[None],
        None,
        LinearUse(W.dtype),
        None if order == tuple(range(len(out))) else order,
    )


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Applied | None:
    if beta != 1 or alpha != 1 or input.ndim != 1:
        return None
    return Applied(mat1, mat2.mT[None], input, LinearUse(mat2.dtype))


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Applied:
    """It has these parameters, because the function has them."""
    each, kernel = partial(_each, weight.ndim - 2), tuple(weight.shape[2:])
    around = padding if isinstance(padding, str) else each(padding)
    use = ConvolutionUse(weight.dtype, kernel, each(stride), around, each(dilation), groups)
    return Applied(input, weight.unflatten(0, (groups, -1)), bias, use)


def _transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Applied:
    """It has these parameters, because the function has them."""
    each, kernel = partial(_each, weight.ndim - 2), tuple(weight.shape[2:])
    use = TransposedConvolutionUse(
        weight.dtype,
        kernel,
        each(stride),
        each(padding),
        each(output_padding),
        each(dilation),
        groups,
    )
    return Applied(input, weight.unflatten(0, (groups, -1)).transpose(1, 2), bias, use)


def _each(dims: int, setting: Any) -> tuple[int, ...]:
    """A setting for every axis, of which one number may be given for all."""
    return (
        (setting,) * dims if isinstance(setting, int) else tuple(setting) * (dims // len(setting))
    )


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Applied | None:
    """It has these parameters, because the function has them."""
    if max_norm is not None or scale_grad_by_freq or sparse:
        return None
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    use = EmbeddingUse(weight.dtype, len(weight), padding_idx)
    return Applied(input, weight.mT[None], None, use)


def _indexed(input: Tensor, index: Any) -> Applied | None:
    """Words, of which negative ones count from the end."""
    whole = isinstance(index, Tensor) and index.dtype in (torch.int32, torch.long)
    if not whole or input.ndim != 2:
        return None
    words = index.remainder(len(input))
    return Applied(words, input.mT[None], None, EmbeddingUse(input.dtype, len(input), None))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Applied | None:
    if weight is None:
        return None
    normed = functional.layer_norm(input, normalized_shape, eps=eps)
    return Applied(normed, weight[None], bias, ScaleUse(weight.dtype, len(normalized_shape)))


def _rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Applied | None:
    if weight is None:
        return None
    normed = functional.rms_norm(input, normalized_shape, eps=eps)
    return Applied(normed, weight[None], None, ScaleUse(weight.dtype, len(normalized_shape)))


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Applied | None:
    if weight is None:
        return None
    normed = functional.group_norm(input, num_groups, eps=eps)
    return Applied(normed, weight[None], bias, ScaleUse(weight.dtype, 0))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Applied | None:
    """It has many parameters, because the function has them."""
    if weight is None or training:
        return None
    normed = functional.batch_norm(input, running_mean, running_var, eps=eps)
    return Applied(normed, weight[None], bias, ScaleUse(weight.dtype, 0))


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Applied | None:
    """It has many parameters, because the function has them."""
    if weight is None:
        return None
    if use_input_stats:
        running_mean = running_var = None  # they would be changed
    normed = functional.instance_norm(
        input, running_mean, running_var, use_input_stats=use_input_stats, eps=eps
    )
    return Applied(normed, weight[None], bias, ScaleUse(weight.dtype, 0))


_PRODUCTS = (torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm)
_PRODUCT = (_matmul, _matmul_from_left)

WEIGHT_RULES: dict[Callable[..., Any], tuple[Rule, ...]] = {
    **dict.fromkeys((functional.linear, torch.inner), (_linear,)),
    **dict.fromkeys((*_PRODUCTS, Tensor.__matmul__), _PRODUCT),
    **dict.fromkeys((torch.addmm, Tensor.addmm), (_addmm,)),
    torch.einsum: (partial(_einsum, weight=1), partial(_einsum, weight=0)),
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), (_convolution,)),
    **dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d), (_convolution,)),
    functional.conv_transpose1d: (_transposed_convolution,),
    functional.conv_transpose2d: (_transposed_convolution,),
    functional.conv_transpose3d: (_transposed_convolution,),
    functional.embedding: (_embedding,),
    Tensor.__getitem__: (_indexed,),
    functional.layer_norm: (_layer_norm,),
    functional.rms_norm: (_rms_norm,),
    functional.group_norm: (_group_norm,),
    functional.batch_norm: (_batch_norm,),
    functional.instance_norm: (_instance_norm,),
}
"""The rules of a function: several if the weight may be one argument or another."""

ADDITIONS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}

"""Functions that add a bias to what a function of a weight alone gave."""

MADE_OF_FUNCTIONS = {functional.multi_head_attention_forward}


@cache
def opened(func: Callable[..., Any]) -> Callable[..., Any]:
    """The same function without its question for a mode, which would call the mode for ever.

    A mode sees such a function as one call, and none of those inside. This is a copy of it, whose
    calls a mode sees.
    """
    assert isinstance(func, FunctionType)
    asks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    scope = {**func.__globals__, **dict.fromkeys(asks, lambda *_: False)}
    copy = FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy
