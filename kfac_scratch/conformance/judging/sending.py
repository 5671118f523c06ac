"""What a worker sends: numbers and words as the bytes of a safetensors file, which holds no code.

The file is written here, so that an adapter's environment needs PyTorch and nothing else for it.
`receiving` reads it. What it says of itself stands in its metadata:

| `outcome` | what else there is |
|---|---|
| `capabilities` | `json`: what the implementation offers |
| `answer` | tensors `draw/part/layer`; `scales`: JSON by `part/layer` |
| `not-supported`, `error` | `words`: the reason |

`token` is that of the question. In the pipe, every file stands behind `MARK` and its length.
"""

import ctypes
import json
from collections.abc import Mapping
from io import BufferedIOBase
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.judging.judge import bad_scale
from kfac_scratch.conformance.judging.layout import Malformed
from kfac_scratch.conformance.judging.pieces import Answer, PieceKey
from kfac_scratch.conformance.printable import printable
from kfac_scratch.conformance.vocabulary import Verdict

MARK = b"answer\r\n"
LENGTH_BYTES = 8  # bytes of a number, the least significant first
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def send(stream: BufferedIOBase, content: bytes) -> None:
    """Write a file into the pipe."""
    stream.write(MARK + len(content).to_bytes(LENGTH_BYTES, "little") + content)
    stream.flush()


def capabilities_file(capabilities: Mapping[str, Any]) -> bytes:
    """What an implementation offers, as a file."""
    return file({}, {"outcome": "capabilities", "json": json.dumps(capabilities)})


def answer_file(answer: Answer, token: str) -> bytes:
    """An answer as a file.

    Raises:
        Malformed: If something in it is no number.
    """
    if complaint := bad_scale(answer.scales):
        raise Malformed(complaint)
    scales = {_name(key): d if d is None else float(d) for key, d in answer.scales.items()}
    tensors = {
        f"{i}/{_name(key)}": M for i, draw in enumerate(answer.draws) for key, M in draw.items()
    }
    return file(tensors, {"outcome": "answer", "token": token, "scales": json.dumps(scales)})


def complaint_file(outcome: Verdict, words: str, token: str) -> bytes:
    """The reason why there is no answer, as a file."""
    return file({}, {"outcome": outcome, "token": token, "words": printable(words)})


def file(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Tensors and metadata as a safetensors file.

    Raises:
        Malformed: If a tensor has numbers of a kind that nobody asks for.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    contents, end = [], 0
    for name, M in tensors.items():
        if M.dtype not in DTYPES:
            raise Malformed(f"{name}: there are no blocks of {M.dtype}.")
        content = _bytes(M)
        begin, end = end, end + len(content)
        header[name] = {
            "dtype": DTYPES[M.dtype],
            "shape": list(M.shape),
            "data_offsets": [begin, end],
        }
        contents.append(content)
    head = json.dumps(header).encode()
    return b"".join([len(head).to_bytes(LENGTH_BYTES, "little"), head, *contents])


def _name(key: PieceKey) -> str:
    """A piece's name: the part, which has no slash, and the layer."""
    layer, part = key
    return f"{part}/{layer}"


def _bytes(M: Tensor) -> bytes:
    M = M.detach().cpu().contiguous()
    return ctypes.string_at(M.data_ptr(), M.numel() * M.element_size()) if M.numel() else b""
