"""Write the vectors: every deterministic case as a file that any language can read.

Left out are cases whose labels are drawn at random, and those in float32: their numbers are those
of the case of the same name in float64.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import save
from torch import Tensor

from kfac_scratch.conformance.cases.case import EXACT, Case, Data
from kfac_scratch.conformance.cases.families import CASES, family
from kfac_scratch.conformance.cases.ops import calls, tied_uses
from kfac_scratch.conformance.cases.questions import given, question
from kfac_scratch.conformance.cases.theorems import THEOREMS
from kfac_scratch.conformance.json_files import read_object
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.flags import MEANINGS, flags
from kfac_scratch.conformance.vectors import grid
from kfac_scratch.conformance.vectors.conventions import CONVENTIONS, VECTORS_FORMAT
from kfac_scratch.conformance.vocabulary import Flavour

TIES = Path(__file__).with_name("ties.json")
Ties = Mapping[str, Mapping[str, Mapping[str, int]]]  # by case, tensor and index
Tensors = dict[str, Tensor]
BITS, GRADIENT_BITS = 38, 42  # a damped inverse makes a gradient's rounding larger


def exported(cases: Mapping[str, Case] = CASES) -> list[Case]:
    """Cases that the vectors have."""
    return [c for c in cases.values() if c.fisher != "mc" and c.dtype == "float64"]


def computed(case: Case) -> Tensors:
    """Everything in a case's file that is computed, before it is rounded."""
    data = case.build()
    f = truth.output(case, data)
    found = {"outputs": f}
    if hessian_number(case, f) is None:
        found["loss_hessian"] = own_hessians(truth.output_curvature(case, f, data.y), len(f))
    if case.damping:
        found |= {f"gradient/{name}": g for name, g in truth.gradients(case, data).items()}
    return found | cotangents(case, data) | expected_tensors(case, data)


def export(
    directory: Path,
    cases: Sequence[Case] | None = None,
    compute: Callable[[Case], Tensors] = computed,
) -> None:
    """Write a manifest and one file per case: the same bytes on every machine."""
    directory.mkdir(parents=True, exist_ok=True)
    ties, entries = known_ties(), []
    for case in exported() if cases is None else cases:
        content = save(given(case) | rounded(case, compute(case), ties), {"format": VECTORS_FORMAT})
        (directory / f"{case.id}.safetensors").write_bytes(content)
        entries.append(manifest_entry(case) | {"sha256": sha256(content).hexdigest()})
    (directory / "manifest.json").write_text(manifest(entries), encoding="utf-8")


# ---- numbers -------------------------------------------------------------------------------------


def rounded(case: Case, tensors: Tensors, ties: Ties) -> Tensors:
    """Computed tensors on their grids.

    Raises:
        ValueError: Naming the case and the tensor that has entries between two grid points.
    """
    found = {}
    for name, x in tensors.items():
        try:
            found[name] = grid.snapped(
                x, bits(name), ties.get(case.id, {}).get(name, {})
            ).contiguous()
        except ValueError as error:
            raise ValueError(f"{case.id}, {name}: {error}") from error
    return found


def bits(name: str) -> int:
    """How fine a tensor's grid is."""
    return GRADIENT_BITS if name.startswith("gradient/") else BITS


def known_ties() -> Ties:
    """Numbers between two grid points, as they were resolved once and for all."""
    return read_object(TIES)


def new_ties(cases: Sequence[Case]) -> Ties:
    """What `ties.json` must say of some cases: what is listed already, and what is missing."""
    known = known_ties()
    found: dict[str, dict[str, dict[str, int]]] = {}
    for case in cases:
        listed = known.get(case.id, {})
        tensors = {name: grid.ties(x, bits(name)) for name, x in computed(case).items()}
        found[case.id] = {n: {**t, **listed.get(n, {})} for n, t in tensors.items() if t}
    return {case: ties for case, ties in found.items() if ties}


def hessian_number(case: Case, f: Tensor) -> float | None:
    """The loss's Hessian where it is a multiple of the identity: squared error, type 2."""
    if case.loss.kind != "mse" or case.fisher != "type2":
        return None
    return 2.0 / f.numel() if case.loss.reduction == "mean" else 2.0


def own_hessians(H: Float[Tensor, "NF NF"], N: int) -> Float[Tensor, "N F F"]:
    """Every datum's block: no loss couples data."""
    blocks = H.reshape(N, len(H) // N, N, len(H) // N)
    n = torch.arange(N)
    return blocks[n, :, n]


def cotangents(case: Case, data: Data) -> Tensors:
    """Derivatives of every datum's outputs by the results of judged layers, at their positions."""
    if case.operator:
        return {}
    n, last = torch.arange(len(data.X)), len(case.ops) - 1
    found: Tensors = {}
    for name in case.judged:
        if calls(case.ops, name) != [last]:
            J = truth.derivatives(case, data, name)  # [N F, groups, N, S, d_out]
            found[f"cotangents/{name}"] = J.unflatten(0, (len(n), -1))[n, :, :, n]
    return found


def expected_tensors(case: Case, data: Data) -> Tensors:
    """What is right, and the factors that it is made of."""
    found: Tensors = {}
    for flavour in case.flavours:
        place = place_of(case, flavour)
        if place.startswith("expected/"):
            blocks = truth.expected(case, data, flavour)
            found |= {f"{place}/{name}": M for (name, _), M in blocks.items()}
        if case.needs_factors(flavour) and not tied_uses(case.ops):
            found |= kronecker(case, data, "reduce" if flavour == "reduce" else "expand")
    return found


def kronecker(case: Case, data: Data, flavour: Flavour) -> Tensors:
    """The factors of judged layers."""
    found = truth.factors(case, data, flavour)
    pairs = {f"factors/{flavour}/{name}": found[name] for name in case.judged}
    return {f"{key}/{x}": getattr(pair, x) for key, pair in pairs.items() for x in "AB"}


# ---- the manifest --------------------------------------------------------------------------------


def place_of(case: Case, flavour: Flavour) -> str:
    """Where in a file a flavour's expectation is."""
    if case.flavours[flavour] == EXACT:
        return "expected/ggn"
    kronecker = flavour != "ekfac" and not case.damping and not tied_uses(case.ops)
    return f"factors/{flavour}" if kronecker else f"expected/{flavour}"


def manifest(entries: Sequence[Mapping[str, Any]]) -> str:
    """All that is not a tensor, one case per line."""
    head = {"format": VECTORS_FORMAT, "conventions": CONVENTIONS, "theorems": THEOREMS}
    head |= {"flags": MEANINGS}
    text = json.dumps(head, ensure_ascii=False, indent=1).removesuffix("\n}")
    lines = ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries)
    return f'{text},\n "cases": [\n{lines}\n ]\n}}\n'


def manifest_entry(case: Case) -> dict[str, Any]:
    """A case as JSON: what it asks, and where what is right stands."""
    data = case.build()
    sizes = truth.sizes(case, data)
    asked = question(case, len(data.X))
    return {
        "id": case.id,
        "file": f"{case.id}.safetensors",
        "family": family(case),
        "theorem": case.theorem,
        "ops": asked["ops"],
        "loss": asked["loss"],
        "fisher": case.fisher,
        "flavours": {
            name: {"expectation": value, "stored": place_of(case, name)}
            for name, value in case.flavours.items()
        },
        **{
            key: asked[key]
            for key in ("layers", "part", "batches", "damping", "operator", "masked")
            if key in asked
        },
        "dtype": case.dtype,
        "tolerance": case.tolerance,
        "loss_hessian": hessian_number(case, truth.output(case, data)),
        "sizes": {name: letters for name, letters in sizes.items() if name in case.judged},
        "tags": case.tags,
        "flags": {key: list(changes) for key, changes in flags(case).items()},
    }
