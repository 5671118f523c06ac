"""What the parent makes of a worker's bytes: numbers or a reason, and never code that runs.

A worker may send anything: its adapter runs in it, and can write to every stream that it has. So
nothing is believed. A file that is none, or that belongs to another question, is `Garbled`: then
the pipe is in no known state, and its worker has to go.
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from io import BufferedIOBase
from math import prod
from typing import Any

from safetensors.torch import load
from torch import Tensor

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.ops import layer_ops
from kfac_scratch.conformance.judging.harness import REPETITIONS
from kfac_scratch.conformance.judging.judge import bad_scale
from kfac_scratch.conformance.judging.layout import Malformed
from kfac_scratch.conformance.judging.pieces import Answer, PieceKey
from kfac_scratch.conformance.judging.sending import LENGTH_BYTES, MARK
from kfac_scratch.conformance.printable import printable
from kfac_scratch.conformance.protocol import Capabilities, NotSupported
from kfac_scratch.conformance.vocabulary import PART_NAMES, PartName

WORDS = 2**20  # bytes of a file for all that is no number
# The kinds of fields of capabilities that are no lists.
CAPABILITY_KINDS = {
    "name": str,
    "version": str,
    "batches": bool,
    "operators": bool,
    "projections": bool,
    "ties": bool,
    "masks": bool,
}
INTO_THE_CHANNEL = "did something else write into the channel of its answers?"


class Garbled(Malformed):
    """What came from a worker is no answer to what was asked; says why."""


def most_bytes(case: Case) -> int:
    """How long an answer can be at most: all requests with a dense block of every layer."""
    blocks = [op.groups * prod(op.matrix_shape()) ** 2 for op in layer_ops(case.ops).values()]
    return WORDS + 8 * max(2, REPETITIONS) * sum(blocks)


def next_file(stream: BufferedIOBase, most: int) -> bytes:
    """The next file in a pipe; empty if the pipe ends before it does.

    Raises:
        Garbled: If what comes is no file, or one that is longer than an answer can be.
    """
    head = stream.read(len(MARK) + LENGTH_BYTES)
    if not MARK.startswith(head[: len(MARK)]):
        raise Garbled(f"no answer, but {_shown(head)}: {INTO_THE_CHANNEL}")
    if len(head) < len(MARK) + LENGTH_BYTES:
        return b""
    length = int.from_bytes(head[len(MARK) :], "little")
    if length > most:
        raise Garbled(f"an answer of {length} bytes, where it has {most} at most.")
    content = stream.read(length)
    return content if len(content) == length else b""


def capabilities_of(content: bytes) -> dict[str, Any]:
    """What an implementation offers.

    Raises:
        Garbled: If the file does not say it.
    """
    _, about = _opened(content)
    if about.get("outcome") != "capabilities":
        raise Garbled(f"no capabilities, but {about.get('outcome')!r}.")
    found = _json_object(about, "json")
    for field in fields(Capabilities):
        value, kind = found.get(field.name), CAPABILITY_KINDS.get(field.name, list)
        if not isinstance(value, kind):
            words = f"{field.name!r} is {value!r}, expected a {kind.__name__}."
            raise Garbled(f"capabilities: {words}")
    return found


def answer_of(content: bytes, asked: Case, token: str) -> Answer:
    """The numbers in a file; whether they are right in shape and kind, `judged` finds out.

    Raises:
        NotSupported: With the adapter's reason.
        Malformed: With the reason why there is no answer.
        Garbled: If the file is none, or the answer to another question.
    """
    tensors, about = _opened(content)
    if about.get("token") != token:
        raise Garbled(f"an answer to another question: {INTO_THE_CHANNEL}")
    match about.get("outcome"):
        case "not-supported":
            raise NotSupported(about.get("words", ""))
        case "error":
            raise Malformed(about.get("words", ""))
        case "answer":
            return _answer(tensors, _json_object(about, "scales"), asked)
    raise Garbled(f"the outcome is {about.get('outcome')!r}.")


def _answer(tensors: Mapping[str, Tensor], scales: Mapping[str, Any], asked: Case) -> Answer:
    draws: dict[int, dict[PieceKey, Tensor]] = {}
    for name, M in tensors.items():
        number, _, piece = name.partition("/")
        if number not in map(str, range(REPETITIONS)):
            raise Garbled(f"a tensor is called {name!r}, which says no request.")
        draws.setdefault(int(number), {})[_key(piece)] = M
    if sorted(draws) != [*range(len(draws))]:
        raise Garbled(f"answers to the requests {sorted(draws)}, and none to those between.")
    stated = {_key(piece): scale for piece, scale in scales.items()}
    if complaint := bad_scale(stated):
        raise Malformed(complaint)
    return Answer([_in_order(draws[i], asked) for i in range(len(draws))], stated)


def _key(piece: str) -> PieceKey:
    """A layer and a part by a piece's name."""
    part, _, layer = piece.partition("/")
    known: dict[str, PartName] = {name: name for name in PART_NAMES}
    if part not in known:
        raise Garbled(f"a piece is called {piece!r}, which begins with no part of a layer.")
    return layer, known[part]


def _in_order(draw: Mapping[PieceKey, Tensor], asked: Case) -> dict[PieceKey, Tensor]:
    """Pieces in the order of layers and parts; a file has another one."""
    names = [*asked.judged, *(name for name, _ in draw)]
    return {
        (name, part): draw[name, part]
        for name in dict.fromkeys(names)
        for part in PART_NAMES
        if (name, part) in draw
    }


def _opened(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        Garbled: If it is none.
    """
    try:
        tensors = load(content)
        end = LENGTH_BYTES + int.from_bytes(content[:LENGTH_BYTES], "little")
        metadata = json.loads(content[LENGTH_BYTES:end]).get("__metadata__") or {}
    except Exception as error:  # whatever the library raises about bytes that are no file
        words = printable(str(error), 200)
        raise Garbled(f"what came is no safetensors file ({words}).") from None
    return tensors, metadata


def _json_object(about: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(about.get(key, ""))
    except (ValueError, RecursionError) as error:
        raise Garbled(f"{key}: no JSON ({printable(str(error), 200)}).") from None
    if not isinstance(value, dict):
        raise Garbled(f"{key}: expected an object, got a {type(value).__name__}.")
    return value


def _shown(content: bytes) -> str:
    return repr(content[:40])
