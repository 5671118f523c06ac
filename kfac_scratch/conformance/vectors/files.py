"""Vectors `kfac-vectors/1`: what KFAC must be, as files, for implementations in any language.

A port reads `manifest.json` and a safetensors file per case, computes, and writes
`results/<case>.safetensors` (see the manifest's `conventions`). `judge_results` does the rest; it
knows nothing but the two folders.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kfac_scratch.conformance.cases.digests import content_digest
from kfac_scratch.conformance.json_files import entry, is_number, read_object
from kfac_scratch.conformance.judging.judge import Result, judge
from kfac_scratch.conformance.judging.pieces import PieceKey, Pieces
from kfac_scratch.conformance.protocol import NotSupported
from kfac_scratch.conformance.vectors.conventions import VECTORS_FORMAT
from kfac_scratch.conformance.vocabulary import (
    FLAVOURS,
    Expectation,
    Flavour,
    JudgedEntries,
    PartName,
    Precision,
)

SHIPPED = Path(__file__).with_name("kfac-vectors-1")
ASKED = (  # fields that an entry may have and a verdict depends on: those of `questions.question`
    "id",
    "ops",
    "loss",
    "fisher",
    "layers",
    "part",
    "batches",
    "damping",
    "operator",
    "masked",
    "dtype",
    "tolerance",
)
FIELDS = {  # of an entry that are read, and their kinds; a tolerance is checked by itself
    **dict.fromkeys(("id", "file", "sha256", "dtype", "family", "fisher", "part"), str),
    **dict.fromkeys(("ops", "layers", "batches"), list),
    **dict.fromkeys(("sizes", "flavours", "loss"), dict),
    **dict.fromkeys(("tolerance", "damping"), object),
    "operator": bool,
}
MOST_OF_A_SIZE = 10**9
GIVEN = ("parameters/", "X", "y", "coefficients")  # how the names of given tensors begin


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
    def dtype(self) -> Precision:
        """Of all floats, the results' included."""
        dtype: Precision = self.entry["dtype"]
        return dtype

    @property
    def tolerance(self) -> float:
        """Largest allowed difference, relative to the largest entry."""
        return float(self.entry["tolerance"])

    @cached_property
    def flavours(self) -> dict[Flavour, Expectation]:
        """What each flavour must be."""
        return {name: value["expectation"] for name, value in self.entry["flavours"].items()}

    @cached_property
    def digest(self) -> str:
        """What it asks and its numbers: the digest of the case that it was written from."""
        asked = {key: self.entry[key] for key in ASKED if key in self.entry}
        question = asked | {"flavours": self.flavours}
        numbers = {name: x for name, x in self.tensors.items() if name.startswith(GIVEN)}
        return content_digest(question, numbers)

    def expected(self, flavour: Flavour) -> dict[PieceKey, Tensor]:
        """The blocks, or damped inverses times the gradient, of all judged layers.

        Raises:
            ValueError: If the case's file lacks them.
        """
        place = self.entry["flavours"][flavour]["stored"]
        missing = [key for key in self._needed(place) if key not in self.tensors]
        if missing:
            raise ValueError(f"{self.entry['file']}: there is no {', '.join(missing)}.")
        return {(name, self._part): self._stored(place, name) for name in self.entry["layers"]}

    @property
    def _part(self) -> PartName:
        return "bias" if self.entry["part"] == "bias" else "joint"

    def _needed(self, place: str) -> list[str]:
        """The tensors that are read for all layers from a place."""
        ends = [""] if place.startswith("expected/") else ["/A", "/B"]
        return [f"{place}/{layer}{end}" for layer in self.entry["layers"] for end in ends]

    def _stored(self, place: str, layer: str) -> Tensor:
        if place.startswith("expected/"):
            return self.tensors[f"{place}/{layer}"]
        A, B = (self.tensors[f"{place}/{layer}/{factor}"] for factor in "AB")
        if A.ndim != 3 or B.ndim != 3 or len(A) != len(B):
            shapes = f"{list(A.shape)} and {list(B.shape)}"
            raise ValueError(f"{self.entry['file']}: the factors of {layer} are {shapes}.")
        D = A.shape[-1] * B.shape[-1]
        return torch.einsum("gop,gij->goipj", B, A).reshape(-1, D, D)


def read(directory: Path = SHIPPED) -> dict[str, Reference]:
    """All cases of a folder, by identifier.

    Raises:
        ValueError: Naming the file that is missing, damaged, or of another format.
    """
    path = directory / "manifest.json"
    manifest = read_object(path)
    if manifest.get("format") != VECTORS_FORMAT:
        raise ValueError(
            f"{path}: the format is {manifest.get('format')!r}, expected {VECTORS_FORMAT!r}."
        )
    cases = [_checked(case, path) for case in entry(manifest, "cases", list, path)]
    names = [case["id"] for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path}: more than one case is called {', '.join(twice)}.")
    return {case["id"]: _reference(directory, case) for case in cases}


def _checked(case: Any, path: Path) -> dict[str, Any]:
    """An entry of a manifest, if it is a case.

    Raises:
        ValueError: Naming the manifest, the case and what is wrong with it.
    """
    if not isinstance(case, dict):
        raise ValueError(f"{path}: a case is a {type(case).__name__}, expected an object.")
    where = f"{path}, case {case.get('id')!r}"
    for key, kind in FIELDS.items():
        entry(case, key, kind, where)
    if "/" in case["file"] or "\\" in case["file"]:
        raise ValueError(f"{where}: the file {case['file']!r} is not in the folder.")
    if case["dtype"] not in get_args(Precision) or case["part"] not in get_args(JudgedEntries):
        raise ValueError(f"{where}: unknown dtype {case['dtype']!r} or part {case['part']!r}.")
    if not (is_number(case["tolerance"]) and 0 < case["tolerance"] < 1):
        raise ValueError(f"{where}: the tolerance is {case['tolerance']!r}.")
    if not case["layers"] or not all(isinstance(name, str) for name in case["layers"]):
        raise ValueError(f"{where}: the layers are {case['layers']!r}, expected names.")
    for name in case["layers"]:
        sizes = entry(case["sizes"], name, dict, f"{where}, sizes")
        if not all(type(size) is int and 0 < size < MOST_OF_A_SIZE for size in sizes.values()):
            raise ValueError(f"{where}: the sizes of {name} are {sizes!r}.")
    if not case["flavours"]:
        raise ValueError(f"{where}: it asks for no flavour.")
    for flavour, asked in case["flavours"].items():
        _check_flavour(flavour, asked, f"{where}, flavour {flavour!r}")
    return case


def _check_flavour(flavour: str, asked: Any, where: str) -> None:
    """Refuse what a manifest says of a flavour if it cannot be understood.

    Raises:
        ValueError: Naming the flavour and what is wrong with it.
    """
    if flavour not in FLAVOURS:
        raise ValueError(f"{where}: it is none of {', '.join(FLAVOURS)}.")
    if not isinstance(asked, dict):
        raise ValueError(f"{where}: it is a {type(asked).__name__}, expected an object.")
    if entry(asked, "expectation", str, where) not in get_args(Expectation):
        raise ValueError(f"{where}: unknown expectation {asked['expectation']!r}.")
    if not entry(asked, "stored", str, where).startswith(("expected/", "factors/")):
        raise ValueError(f"{where}: unknown place {asked['stored']!r}.")


def _reference(directory: Path, case: Mapping[str, Any]) -> Reference:
    return Reference(case, _tensors(directory / case["file"], case["sha256"]))


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
    except (SafetensorError, KeyError) as error:  # KeyError: numbers that PyTorch has not
        raise ValueError(f"{path.name} is no safetensors file: {error}.") from error


# ---- the results of a port -----------------------------------------------------------------------


@dataclass(frozen=True)
class Claims:
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
    scales: Mapping[str, int | float | None] = field(default_factory=dict)

    def reason(self, case: str, flavour: str) -> str | None:
        """Why a port does not offer something; None if it claims to offer it."""
        for pattern, reason in self.not_supported.items():
            if fnmatchcase(case, pattern) or fnmatchcase(f"{case}/{flavour}", pattern):
                return reason
        return None

    def scale(self, case: str, flavour: str, layer: str) -> int | float | None:
        """The documented scale of a piece."""
        fitting = (s for p, s in self.scales.items() if fnmatchcase(f"{case}/{flavour}/{layer}", p))
        return next(fitting, 1.0)


def claims_of(results: Path) -> Claims:
    """What a port says of itself; nothing if there is no `about.json`.

    Raises:
        ValueError: If the file cannot be understood.
    """
    if not results.is_dir():
        raise ValueError(f"{results} is no folder.")
    path = results / "about.json"
    if not path.exists():
        return Claims()
    content = read_object(path)
    unknown = sorted(content.keys() - {f.name for f in fields(Claims)})
    if unknown:
        raise ValueError(f"{path}: unknown fields {', '.join(unknown)}.")
    for key in content:
        entry(content, key, type(getattr(Claims(), key)), path)
    scales, reasons = content.get("scales", {}), content.get("not_supported", {})
    wrong = [p for p, scale in scales.items() if not (scale is None or is_number(scale))]
    if wrong:
        raise ValueError(f"{path}: the scales of {', '.join(wrong)} are no numbers, nor null.")
    wrong = [pattern for pattern, reason in reasons.items() if not isinstance(reason, str)]
    if wrong:
        raise ValueError(f"{path}: the reasons of {', '.join(wrong)} in not_supported are no text.")
    return Claims(**content)


def judge_results(results: Path, vectors: Path = SHIPPED) -> list[Result]:
    """A verdict for every flavour of every case.

    Args:
        results: What a port wrote.
        vectors: What it read.
    """
    return judge_all(results, read(vectors).values())


def judge_all(results: Path, references: Iterable[Reference]) -> list[Result]:
    """The same for cases that were read already."""
    claims = claims_of(results)
    return [
        verdict_on_results(results, claims, reference, flavour)
        for reference in references
        for flavour in reference.flavours
    ]


def verdict_on_results(
    results: Path, claims: Claims, reference: Reference, flavour: Flavour
) -> Result:
    """A verdict on one flavour of a case, whatever the port wrote."""
    case, right = reference.id, reference.expected(flavour)
    try:
        got = numbers_of_port(results, claims, case, flavour, right)
    except NotSupported as reason:
        return Result(case, flavour, "not-supported", str(reason))
    except ValueError as reason:
        return Result(case, flavour, "error", str(reason))
    documented = {key: claims.scale(case, flavour, key[0]) for key in right}
    return judge(reference, flavour, got, right, documented, reference.entry["sizes"])


def numbers_of_port(
    results: Path, claims: Claims, case: str, flavour: Flavour, right: Pieces
) -> dict[PieceKey, Tensor]:
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
