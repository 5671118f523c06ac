"""The right answer in another layout, which is a mistake of the adapter."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from kfac_scratch.conformance.cases.ops import Op
from kfac_scratch.conformance.judging.layout import places
from kfac_scratch.conformance.judging.mistakes.concerns import biases, layers
from kfac_scratch.conformance.judging.pieces import Pieces
from kfac_scratch.conformance.judging.ways import Question


def layouts(asked: Question, right: Pieces) -> Iterator[tuple[str, Pieces]]:
    """The right answer, numbered otherwise, with the mistake in words."""
    ops = {op.name: op for op in layers(asked)}
    for words, bias_at, axes in _numberings(asked):
        for inverse in (False, True):
            yield (
                words,
                {
                    (name, part): _renumbered(M, ops[name], part, bias_at, axes, inverse)
                    for (name, part), M in right.items()
                },
            )


def _numberings(asked: Question) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Places of the bias and orders of the axes, other than those that are right."""
    places_of_bias, orders = ["last"], ["", "o s i", "s i o", "i s o", "i o s"]
    if biases(asked):  # which stands among the inputs only if the outputs are first or last
        places_of_bias, orders = ["last", "first", "behind"], orders[:-1]
    for bias_at in places_of_bias:
        for order in orders:
            axes = {op.name: _axes(op, order) for op in layers(asked)}
            said = [f"axes were numbered {text!r}" for text in dict.fromkeys(axes.values()) if text]
            if bias_at != "last":
                said.append(f"the bias stood {bias_at}")
            if said:
                yield "as if " + " and ".join(said), bias_at, axes


def _axes(op: Op, order: str) -> str:
    """An order of channels and space for one layer; a linear layer has no space."""
    space = "dhw"[3 - len(op["kernel"]) :] if op.kind == "conv" else ""
    letters = " ".join(order.replace("s", space).replace(" ", ""))
    return "" if letters == "o i" else letters


def _renumbered(
    M: Tensor, op: Op, part: Any, bias_at: str, axes: Mapping[str, str], inverse: bool
) -> Tensor:
    """A piece whose entries stand elsewhere."""
    numbering = places(op, part, bias_at, axes[op.name]).flatten()
    if len(numbering) != M.shape[1]:  # a case that judges a part of the entries
        return M
    index = numbering.argsort() if inverse else numbering
    return M[:, index][:, :, index] if M.ndim == 3 else M[:, index]
