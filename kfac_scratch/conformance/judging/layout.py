"""From an implementation's layout to the canonical one.

Canonical: a block acts on a layer's matrix `[W | b]` with its rows behind each other, one block per
group of a grouped convolution: `[groups, D, D]`, or `[groups, D]` for vectors.
"""

from collections.abc import Iterable, Set
from math import prod
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from kfac_scratch.conformance.cases.ops import Op
from kfac_scratch.conformance.protocol import (
    DenseAnswer,
    EigenAnswer,
    KroneckerAnswer,
    LayerBlock,
    VectorAnswer,
)
from kfac_scratch.conformance.vocabulary import PART_NAMES, PartName


class Malformed(Exception):  # noqa: N818
    """What an adapter returned cannot be a block of its layer; says why."""


def canonical(name: str, block: Any, op: Op) -> dict[PartName, Tensor]:
    """A layer's blocks by part: `joint`, or `weight` and `bias`.

    Raises:
        Malformed: Naming the layer, what is wrong and what was expected.
    """
    if not isinstance(block, LayerBlock):
        raise Malformed(f"{name}: expected a LayerBlock, got {type(block).__name__}.")
    found = {p: v for p in PART_NAMES if (v := getattr(block, p)) is not None}
    wanted = part_choices(op)
    if set(found) not in wanted:
        raise Malformed(wrong_parts(name, set(found), wanted))
    d_out, d_in = op.matrix_shape()
    columns: dict[PartName, int] = {"joint": d_in, "weight": d_in - bool(op["bias"]), "bias": 1}
    result: dict[PartName, Tensor] = {}
    for part, value in found.items():
        numbering = places(op, part, block.bias_at, block.axes)
        shape = (d_out, columns[part])
        result[part] = _reordered(f"{name}, {part}", value, numbering, shape, op.groups)
    return result


def part_choices(op: Op) -> list[set[PartName]]:
    """Which parts a layer's answer may come in."""
    return [{"joint"}, {"weight", "bias"}] if op["bias"] else [{"joint"}, {"weight"}]


def wrong_parts(name: str, given: Set[PartName], wanted: Iterable[Set[PartName]]) -> str:
    """That a layer came in other parts than it may, in words."""
    choices = " or ".join(str(sorted(w)) for w in wanted)
    return f"{name}: got the parts {sorted(given)}, expected {choices}."


def places(op: Op, part: PartName, bias_at: str, axes: str) -> Int[Tensor, "d_out d_in"]:
    """Where every entry of a group's matrix stands in the adapter's numbering."""
    d_out, d_in = op.matrix_shape()
    if part == "bias":
        return torch.arange(d_out).unsqueeze(1)
    d_in -= bool(op["bias"])
    letters = ["o", "i", *"dhw"[3 - len(op["kernel"]) :]] if op.kind == "conv" else ["o", "i"]
    order = axes.split() or (["i", "o"] if op.kind == "embedding" else letters)
    if sorted(order) != sorted(letters):
        raise Malformed(f"axes={axes!r}: expected an order of the letters {' '.join(letters)}.")
    kernel = op["kernel"] if op.kind == "conv" else ()
    extent = dict(zip(letters, (d_out, d_in // prod(kernel), *kernel), strict=True))
    if part == "weight" or not op["bias"]:
        return _numbered(order, letters, extent)
    if bias_at == "behind":
        weight = _numbered(order, letters, extent)
        return torch.cat([weight, weight.numel() + torch.arange(d_out).unsqueeze(1)], 1)
    if bias_at not in ("first", "last"):
        raise Malformed(f"bias_at={bias_at!r}: expected 'last', 'first' or 'behind'.")
    return _with_bias_among_inputs(order, letters, extent, bias_at)


def _numbered(order: list[str], letters: list[str], extent: dict[str, int]) -> Tensor:
    """Numbers `0, 1, ...` in one order of the axes, arranged as a matrix in another."""
    numbers = torch.arange(prod(extent.values())).reshape([extent[x] for x in order])
    return numbers.permute([order.index(x) for x in letters]).flatten(1)


def _with_bias_among_inputs(
    order: list[str], letters: list[str], extent: dict[str, int], bias_at: str
) -> Tensor:
    if order[0] != "o" and order[-1] != "o":
        raise Malformed(f"axes={' '.join(order)!r}: with bias_at={bias_at!r}, o is first or last.")
    inputs = [x for x in order if x != "o"]
    numbers = torch.arange(prod(extent[x] for x in inputs)).reshape([extent[x] for x in inputs])
    column = numbers.permute([inputs.index(x) for x in letters[1:]]).flatten()
    d_in, d_out = len(column), extent["o"]
    if bias_at == "first":
        column = torch.cat([column + 1, torch.tensor([0])])
    else:
        column = torch.cat([column, torch.tensor([d_in])])
    if order[0] == "o":
        return torch.arange(d_out).unsqueeze(1) * (d_in + 1) + column
    return column * d_out + torch.arange(d_out).unsqueeze(1)


def _reordered(
    what: str, value: Any, numbering: Tensor, shape: tuple[int, int], groups: int
) -> Tensor:
    """A part in canonical order, with a leading axis of groups."""
    d_out, d_in = shape
    D = d_out * d_in
    match value:
        case KroneckerAnswer(A, B):
            A, B = (
                _checked(what, "A", A, groups, d_in, d_in),
                _checked(what, "B", B, groups, d_out, d_out),
            )
            order = inputs_order(numbering)
            A = A[:, order][:, :, order]
            M = torch.einsum("gop,gij->goipj", B, A).reshape(groups, D, D)
        case EigenAnswer(QA, QB, scale):
            QA = _checked(what, "QA", QA, groups, d_in, d_in)[:, inputs_order(numbering)]
            QB = _checked(what, "QB", QB, groups, d_out, d_out)
            scale = _checked(what, "scale", scale, groups, d_out, d_in).flatten(1)
            U = torch.einsum("gop,gij->goipj", QB, QA).reshape(groups, D, D)
            M = U * scale.unsqueeze(1) @ U.mT
        case DenseAnswer(M):
            M = _grouped(what, M, groups, D)
            order = numbering.flatten().to(M.device)
            M = M[:, order][:, :, order]
        case VectorAnswer(v):
            if v.numel() != groups * D:
                raise Malformed(f"{what}: v has {v.numel()} entries, expected {groups * D}.")
            M = v.reshape(groups, D)[:, numbering.flatten().to(v.device)]
        case _:
            raise Malformed(
                f"{what}: expected Kronecker, Eigen, Dense or Vector, got {type(value).__name__}."
            )
    return M.detach()


def inputs_order(numbering: Int[Tensor, "d_out d_in"]) -> Int[Tensor, " d_in"]:
    """Where the canonical inputs stand among the adapter's, whichever way outputs are numbered."""
    return numbering[0].argsort().argsort()


def _checked(what: str, name: str, M: Any, groups: int, rows: int, columns: int) -> Tensor:
    if not isinstance(M, Tensor):
        raise Malformed(f"{what}: {name} is a {type(M).__name__}, expected a tensor.")
    wanted = [(groups, rows, columns)] + [(rows, columns)] * (groups == 1)
    if tuple(M.shape) not in wanted:
        raise Malformed(
            f"{what}: {name} has shape {list(M.shape)}, expected "
            + " or ".join(str(list(w)) for w in wanted)
            + "."
        )
    return M.reshape(groups, rows, columns)


def _grouped(what: str, M: Any, groups: int, D: int) -> Tensor:
    """One block per group: given as such, or as diagonal blocks of the whole layer's matrix."""
    if not isinstance(M, Tensor):
        raise Malformed(f"{what}: M is a {type(M).__name__}, expected a tensor.")
    if tuple(M.shape) == (groups * D, groups * D):
        M = M.reshape(groups, D, groups, D)
        return torch.stack([M[g, :, g] for g in range(groups)])
    return _checked(what, "M", M, groups, D, D)
