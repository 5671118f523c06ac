"""Vectors `kfac-vectors/1`: what KFAC must be, as files, for implementations in any language.

A port reads `manifest.json` and a safetensors file per case, computes, and writes
`results/<case>.safetensors` (see the manifest's `conventions`). `judge_results` does the rest; it
knows nothing but the two folders.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kfac_scratch.conformance.judging.judge import Result, judge
from kfac_scratch.conformance.protocol import NotSupported
from kfac_scratch.conformance.vectors.conventions import FORMAT

SHIPPED = Path(__file__).with_name("kfac-vectors-1")
Pieces = dict[tuple[str, str], Tensor]


@dataclass(frozen=True, eq=False)
class Reference:
    """One case, read from files.

    Attributes:
        entry: Its description in the manifest.
        tensors: Everything in its file.
    """

    entry: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def id(self) -> str:
        """Stable for ever."""
        return str(self.entry["id"])

    @property
    def dtype(self) -> str:
        """Of all floats, the results' included."""
        return str(self.entry["dtype"])

    @property
    def tolerance(self) -> float:
        """Largest allowed difference, relative to the largest entry."""
        return float(self.entry["tolerance"])

    @cached_property
    def flavours(self) -> dict[str, str]:
        """What each flavour must be."""
        return {name: value["expectation"] for name, value in self.entry["flavours"].items()}

    def expected(self, flavour: str) -> Pieces:
        """The blocks, or damped inverses times the gradient, of all judged layers."""
        place = self.entry["flavours"][flavour]["stored"]
        return {(name, self._part): self._stored(place, name) for name in self.entry["layers"]}

    @property
    def _part(self) -> str:
        return "bias" if self.entry["part"] == "bias" else "joint"

    def _stored(self, place: str, layer: str) -> Tensor:
        if place.startswith("expected/"):
            return self.tensors[f"{place}/{layer}"]
        A, B = (self.tensors[f"{place}/{layer}/{factor}"] for factor in "AB")
        D = A.shape[-1] * B.shape[-1]
        return torch.einsum("gop,gij->goipj", B, A).reshape(-1, D, D)


def read(directory: Path = SHIPPED) -> dict[str, Reference]:
    """All cases of a folder, by identifier.

    Raises:
        ValueError: Naming the file that is missing, damaged, or of another format.
    """
    manifest = _json(directory / "manifest.json")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{directory / 'manifest.json'}: the format is {manifest.get('format')!r}, "
            f"expected {FORMAT!r}."
        )
    return {
        entry["id"]: Reference(entry, _tensors(directory / entry["file"], entry["sha256"]))
        for entry in manifest["cases"]
    }


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object, got a {type(content).__name__}.")
    return content


def _tensors(path: Path, checksum: str | None = None) -> dict[str, Tensor]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error}") from error
    found = sha256(content).hexdigest()
    if checksum not in (None, found):
        raise ValueError(f"{path}: SHA-256 is {found}, the manifest says {checksum}.")
    try:
        return load(content)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is no safetensors file: {error}.") from error


# ---- the results of a port -----------------------------------------------------------------------


@dataclass(frozen=True)
class About:
    """What a port says of itself, in `about.json`.

    Attributes:
        name: Of the implementation.
        version: Of the implementation.
        not_supported: Reasons by pattern of `case` or `case/flavour`.
        scales: By pattern of `case/flavour/layer`: by what results exceed the canonical ones, as
            the documentation says; None where it is silent; 1 where no pattern fits.
    """

    name: str = ""
    version: str = ""
    not_supported: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float | None] = field(default_factory=dict)

    def reason(self, case: str, flavour: str) -> str | None:
        """Why a port does not offer something; None if it claims to offer it."""
        for pattern, reason in self.not_supported.items():
            if fnmatchcase(case, pattern) or fnmatchcase(f"{case}/{flavour}", pattern):
                return reason
        return None

    def scale(self, case: str, flavour: str, layer: str) -> float | None:
        """The documented scale of a piece."""
        fitting = (s for p, s in self.scales.items() if fnmatchcase(f"{case}/{flavour}/{layer}", p))
        return next(fitting, 1.0)


def about(results: Path) -> About:
    """What a port says of itself; nothing if there is no `about.json`.

    Raises:
        ValueError: If the file cannot be understood.
    """
    path = results / "about.json"
    if not path.exists():
        return About()
    try:
        return About(**_json(path))
    except TypeError as error:
        raise ValueError(f"{path}: {error}.") from error


def judge_results(results: Path, vectors: Path = SHIPPED) -> list[Result]:
    """A verdict for every flavour of every case.

    Args:
        results: What a port wrote.
        vectors: What it read.
    """
    return judge_all(results, read(vectors).values())


def judge_all(results: Path, references: Iterable[Reference]) -> list[Result]:
    """The same for cases that were read already."""
    claims = about(results)
    return [
        verdict(results, claims, reference, flavour)
        for reference in references
        for flavour in reference.flavours
    ]


def verdict(results: Path, claims: About, reference: Reference, flavour: str) -> Result:
    """A verdict on one flavour of a case, whatever the port wrote."""
    case, right = reference.id, reference.expected(flavour)
    try:
        got = answered(results, claims, case, flavour, right)
    except NotSupported as reason:
        return Result(case, flavour, "not-supported", str(reason))
    except ValueError as reason:
        return Result(case, flavour, "error", str(reason))
    documented = {key: claims.scale(case, flavour, key[0]) for key in right}
    return judge(reference, flavour, got, right, documented, reference.entry["sizes"])


def answered(results: Path, claims: About, case: str, flavour: str, right: Pieces) -> Pieces:
    """A port's numbers for one flavour of a case.

    Raises:
        NotSupported: With the port's reason.
        ValueError: If a file or a tensor is missing, damaged or of another shape.
    """
    reason = claims.reason(case, flavour)
    if reason is not None:
        raise NotSupported(reason)
    path = results / f"{case}.safetensors"
    if not path.exists():
        raise ValueError(f"no file {path.name}, and about.json does not list it.")
    tensors, got = _tensors(path), {}
    for layer, part in right:
        key = f"{flavour}/{layer}"
        if key not in tensors:
            raise ValueError(f"{path.name}: no tensor {key}; it has {sorted(tensors)}.")
        got[layer, part] = tensors[key]
        if got[layer, part].shape != right[layer, part].shape:
            raise ValueError(
                f"{path.name}: {key} has shape {list(tensors[key].shape)}, "
                f"expected {list(right[layer, part].shape)}."
            )
    return got
