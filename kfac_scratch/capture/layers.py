r"""A layer as rows: how each kind of layer applies one matrix, `z[n, s] = W a[n, s]`.

| layer | rows `a[n, s]` | `W` |
|---|---|---|
| `Linear` on `[N, *, d]` | entries of the shared axes `*` | `weight` |
| `Conv1d/2d/3d` | patches, one per output position | `weight.flatten(1)` |
| `ConvTranspose1d/2d/3d` | patches of the input with zeros between entries | as above, turned |
| `Embedding` | one-hot rows | `weight.T` |

A grouped convolution is `groups` such layers side by side, each with its own `W`; groups are a
leading axis of all tensors here. Biases are columns of `W`, see `layer_groups`.

Rows do not depend on a layer's numbers, only on its settings. So the functions for rows take a
layer, or a `Use`: the settings with which a function was called.

Sources: Grosse and Martens 2016 (arXiv:1602.01407), §3 for convolutions; Eschenhagen et al. 2023
(arXiv:2311.00636), §3; for averages of patches without patches, Dangel 2023 (arXiv:2307.02275).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, get_args

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor
from torch.nn import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    Embedding,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    Linear,
    Module,
    RMSNorm,
)
from torch.nn.functional import pad

from kfac_scratch.one_hot import OneHot

PlainConvolution = Conv1d | Conv2d | Conv3d
TransposedConvolution = ConvTranspose1d | ConvTranspose2d | ConvTranspose3d
Layer = Linear | PlainConvolution | TransposedConvolution | Embedding
LAYERS = get_args(Layer)
NORMS = (
    LayerNorm,
    RMSNorm,
    GroupNorm,
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
)


@dataclass(frozen=True)
class Use:
    """A use of a weight by a function such as `F.linear`: its settings.

    Attributes:
        dtype: The precision of the weight.
    """

    dtype: torch.dtype = field(compare=False)


@dataclass(frozen=True)
class LinearUse(Use):
    """As `Linear`."""


@dataclass(frozen=True)
class ConvolutionUse(Use):
    """As `Conv1d`, `Conv2d` or `Conv3d`.

    It has many parameters, because these layers have them.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str = "zeros"


@dataclass(frozen=True)
class TransposedConvolutionUse(Use):
    """As `ConvTranspose1d`, `ConvTranspose2d` or `ConvTranspose3d`.

    It has many parameters, because these layers have them.
    """

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class ScaleUse(Use):
    """As the scale and shift of a normalisation.

    Attributes:
        dims: The number of last axes along which they vary; 0 if they belong to channels, axis 1.
        scaled: Whether the scale is trainable.
        shifted: Whether there is a shift that is trainable.
    """

    dims: int
    scaled: bool = True
    shifted: bool = True


@dataclass(frozen=True)
class EmbeddingUse(Use):
    """As `Embedding`."""

    num_embeddings: int
    padding_idx: int | None


USES: dict[type[Module], type[Use]] = {
    Linear: LinearUse,
    Embedding: EmbeddingUse,
    **dict.fromkeys(get_args(PlainConvolution), ConvolutionUse),
    **dict.fromkeys(get_args(TransposedConvolution), TransposedConvolutionUse),
    **dict.fromkeys(NORMS, ScaleUse),
}
"""How the weight of every kind of layer is used."""

Transposed = TransposedConvolution | TransposedConvolutionUse
Convolution = PlainConvolution | ConvolutionUse | Transposed
Words = Embedding | EmbeddingUse


def row_dtype(layer: Layer | Use) -> torch.dtype:
    """The precision of a layer's rows and vectors: that of its weight, float32 at least.

    Sums over many rows lose most digits of half precision, and its inverses lose all of them.
    """
    dtype = layer.dtype if isinstance(layer, Use) else layer.weight.dtype
    return torch.promote_types(dtype, torch.float32)


def input_rows(
    layer: Layer | Use, x: Tensor, ends: Sequence[float] = ()
) -> Float[Tensor, "groups N S d_in"]:
    """The rows that `W` multiplies, each with the numbers `ends` behind it for bias columns."""
    if isinstance(layer, Convolution):
        return _written_patches(layer, x.to(row_dtype(layer)), ends)
    if isinstance(layer, Words):
        x = one_hot_rows(layer, x).dense()
    return with_ends(x.to(row_dtype(layer)).reshape(1, len(x), -1, x.shape[-1]), ends)


def one_hot_rows(layer: Words, tokens: Int[Tensor, "N ..."]) -> OneHot:
    """The rows of an embedding without forming them; that of the padding index is zero."""
    columns = tokens.reshape(len(tokens), -1).long()
    if layer.padding_idx is not None:
        columns = columns.where(columns != layer.padding_idx, -1)
    return OneHot(columns, layer.num_embeddings, row_dtype(layer))


def averaged_rows(layer: Layer | Use, x: Tensor) -> tuple[Float[Tensor, "groups N 1 d_in"], int]:
    """`input_rows(layer, x).mean(2, keepdim=True)` and `S`, without forming a convolution's rows.

    A sum over patches contracts every spatial axis with a 0/1 pattern of which entry meets which
    kernel element, so its cost and memory do not grow with the size of the kernel times `S`.
    """
    if isinstance(layer, Convolution):
        return _averaged_patches(layer, x.to(row_dtype(layer)))
    if isinstance(layer, Words):
        tokens = x.reshape(len(x), -1)
        ones = torch.ones_like(tokens, dtype=row_dtype(layer))
        if layer.padding_idx is not None:
            ones = ones * (tokens != layer.padding_idx)
        counts = ones.new_zeros(len(x), layer.num_embeddings).scatter_add_(1, tokens, ones)
        S = tokens.shape[1]
        return (counts / S).reshape(1, len(x), 1, -1), S
    rows = input_rows(layer, x)
    return mean_of_positions(rows), rows.shape[2]


def mean_of_positions(rows: Float[Tensor, "groups N S d"]) -> Float[Tensor, "groups N 1 d"]:
    """The mean over positions: the rows themselves if there is one."""
    return rows if rows.shape[2] == 1 else rows.mean(2, keepdim=True)


def scale_gradients(
    use: ScaleUse, normed: Float[Tensor, "M ..."], g: Float[Tensor, "V M ..."]
) -> Float[Tensor, "V M d_out"]:
    """The gradients of scale and shift, behind each other, from vectors at a layer's output.

    Args:
        use: Which of them are trainable, and along which axes they vary.
        normed: The input, normalised, without scale and shift.
        g: The vectors.
    """
    parts = [g * normed] * use.scaled + [g] * use.shifted
    if use.dims:
        kept = (*g.shape[:2], -1, prod(g.shape[-use.dims :]))
        sums = [part.reshape(kept).sum(2) for part in parts]
    else:
        sums = [part.flatten(3).sum(3) if g.ndim > 3 else part for part in parts]
    return torch.cat(sums, dim=-1)


def output_rows(
    layer: Layer | Use, g: Float[Tensor, "V N ..."]
) -> Float[Tensor, "groups V N S d_out"]:
    """Vectors at a layer's output, in the order of `input_rows`."""
    V, N = g.shape[:2]
    if isinstance(layer, Convolution):
        g = g.reshape(V, N, layer.groups, g.shape[2] // layer.groups, -1)
        return g.permute(2, 0, 1, 4, 3)
    return g.reshape(1, V, N, -1, g.shape[-1])


def positions(layer: Layer | Use, z: Float[Tensor, "N ..."]) -> int:
    """The number `S` of positions at which a layer was applied, from the shape of its output."""
    return prod(z.shape[2:] if isinstance(layer, Convolution) else z.shape[1:-1])


def weight_matrix(layer: Layer, weight: Tensor) -> Num[Tensor, "groups d_out d_in"]:
    """A tensor shaped like the layer's weight as the matrices `W` of its groups."""
    return weight_view(layer, weight).flatten(2)


def weight_view(layer: Layer, weight: Tensor) -> Num[Tensor, "groups d_out *d_in"]:
    """`weight_matrix` as a view, with the axes of a convolution's kernel apart."""
    if isinstance(layer, Convolution):
        W = weight.unflatten(0, (layer.groups, -1))
        return W.transpose(1, 2) if isinstance(layer, Transposed) else W
    return (weight.T if isinstance(layer, Embedding) else weight).unsqueeze(0)


def weight_tensor(layer: Layer, W: Num[Tensor, "groups d_out d_in"]) -> Tensor:
    """The tensor, shaped like the layer's weight, whose `weight_matrix` is `W`."""
    if isinstance(layer, Transposed):
        W = W.unflatten(2, (-1, *layer.kernel_size)).transpose(1, 2)
    if isinstance(layer, Convolution):
        return W.reshape(layer.weight.shape)
    return W[0].T if isinstance(layer, Embedding) else W[0]


def check_layer(name: str, layer: Layer) -> None:
    """Refuse settings under which a layer's gradient is not that of one matrix.

    Raises:
        ValueError: For an empty weight.
        NotImplementedError: For other settings, naming the layer and the way out.
    """
    if layer.weight.numel() == 0:
        raise ValueError(
            f"Layer {name!r} has an empty weight of shape {tuple(layer.weight.shape)}, so there is "
            "no curvature: leave the layer out with layers=[...]."
        )
    if isinstance(layer, Embedding):
        for setting in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(layer, setting):
                raise NotImplementedError(
                    f"Embedding {name!r} has {setting}={getattr(layer, setting)}, which changes "
                    f"its weight or gradient on the side: set {setting} to its default, or leave "
                    "the layer out with layers=[...]."
                )


def _written_patches(
    layer: Convolution, x: Float[Tensor, "N C *space"], ends: Sequence[float]
) -> Float[Tensor, "groups N S d_in"]:
    """The patches of a convolution as rows, copied once.

    They are stored as columns (`linalg.stored_as_columns`): neighbouring positions are next to each
    other in `x`, too, so that the copy reads and writes memory in order.
    """
    x = _patches(layer, x)  # [groups, N, C_group, *kernel, *positions]
    d = prod(x.shape[2 : 3 + len(layer.kernel_size)])
    S = prod(x.shape[3 + len(layer.kernel_size) :])
    columns = x.new_empty(*x.shape[:2], d + len(ends), S)
    columns[:, :, :d].view(x.shape).copy_(x)
    columns[:, :, d:] = x.new_tensor(ends).unsqueeze(-1)
    return columns.mT


def _patches(layer: Convolution, x: Float[Tensor, "N C *space"]) -> Float[Tensor, "groups N ..."]:
    """All patches, as a view `[groups, N, C_group, *kernel, *positions]` of the padded input."""
    dims = len(layer.kernel_size)
    if isinstance(layer, Transposed):
        return _patches(*_as_plain(layer, x)).flip(*range(3, 3 + dims))
    x = _padded(layer, x)
    for axis, (k, stride, dilation) in enumerate(_geometry(layer), start=2):
        x = x.unfold(axis, dilation * (k - 1) + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (layer.groups, -1))  # [N, groups, C_group, *positions, *kernel]
    return x.permute(1, 0, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))


def with_ends(rows: Float[Tensor, "*rows d"], ends: Sequence[float]) -> Float[Tensor, "*rows d_in"]:
    """Rows with some more numbers behind each of them, for bias columns; nearly always one 1."""
    if not ends:
        return rows
    columns = rows.new_ones(*rows.shape[:-1], len(ends))
    for i, end in enumerate(ends):
        if end != 1:
            columns[..., i] = end
    return torch.cat([rows, columns], dim=-1)


def _averaged_patches(
    layer: Convolution, x: Tensor
) -> tuple[Float[Tensor, "groups N 1 d_in"], int]:
    if isinstance(layer, Transposed):
        rows, S = _averaged_patches(*_as_plain(layer, x))
        kernel = layer.kernel_size
        axes = range(-len(kernel), 0)
        return rows.unflatten(-1, (-1, *kernel)).flip(*axes).flatten(3), S
    x = _padded(layer, x)
    S = 1
    for k, stride, dilation in _geometry(layer):
        size = x.shape[2]
        positions = (size - dilation * (k - 1) - 1) // stride + 1
        start = dilation * torch.arange(k, device=x.device)
        index = start + stride * torch.arange(positions, device=x.device).unsqueeze(1)
        pattern = x.new_zeros(size, k)  # which entries does kernel element j meet?
        pattern[index, torch.arange(k, device=x.device).expand_as(index)] = 1
        x = torch.tensordot(x, pattern / positions, dims=([2], [0]))  # to the end
        S *= positions
    rows = x.reshape(len(x), layer.groups, -1).movedim(1, 0)
    return rows.unsqueeze(2), S


def _as_plain(
    layer: Transposed, x: Float[Tensor, "N C *space"]
) -> tuple[ConvolutionUse, Float[Tensor, "N C *wider"]]:
    """A convolution with the kernel turned around, and its input: zeros stand between entries.

    An entry at the border meets the kernel's last element first, so there are `dilation * (k - 1)`
    zeros around, less the padding; negative numbers cut.
    """
    settings = (layer.stride, layer.dilation, layer.padding, layer.output_padding)
    strides, dilation, padding, more = (tuple(map(int, setting)) for setting in settings)
    kernel = layer.kernel_size
    wide = [(n - 1) * stride + 1 for n, stride in zip(x.shape[2:], strides, strict=True)]
    between = x.new_zeros(*x.shape[:2], *wide)
    every: Any = (..., *(slice(None, None, stride) for stride in strides))
    between[every] = x
    before = [d * (k - 1) - p for k, d, p in zip(kernel, dilation, padding, strict=True)]
    sides = [(n, n + m) for n, m in zip(before, more, strict=True)]
    ones, none = (1,) * len(kernel), (0,) * len(kernel)
    use = ConvolutionUse(x.dtype, kernel, ones, none, dilation, layer.groups)
    return use, pad(between, [n for side in reversed(sides) for n in side])


def _geometry(layer: Convolution) -> Iterator[tuple[int, int, int]]:
    return zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)


def _padded(layer: PlainConvolution | ConvolutionUse, x: Tensor) -> Tensor:
    """Apply the layer's own padding, in its padding mode."""
    if layer.padding == "same":  # an odd total puts the larger half behind
        totals = [d * (k - 1) for k, _, d in _geometry(layer)]
        sides = [(total // 2, total - total // 2) for total in totals]
    elif layer.padding == "valid":
        sides = []
    else:
        sides = [(int(p), int(p)) for p in layer.padding]
    amounts = [side for pair in reversed(sides) for side in pair]
    if not any(amounts):
        return x
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return pad(x, amounts, mode=mode)
