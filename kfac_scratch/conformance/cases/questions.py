"""A case as JSON and plain numbers: what is asked, without anything that is expected in numbers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kfac_scratch.conformance.cases.case import Case, Loss
from kfac_scratch.conformance.cases.digests import content_digest
from kfac_scratch.conformance.cases.ops import Op


def given(case: Case) -> dict[str, Tensor]:
    """What an implementation starts from, by name: exact in any precision."""
    data = case.build()
    tensors = {f"parameters/{name}": p for name, p in data.parameters.items()}
    tensors |= {"X": data.X, "y": data.y}
    if data.coefficients is not None:
        tensors["coefficients"] = data.coefficients
    return {name: (x + 0).contiguous() for name, x in tensors.items()}  # + 0 turns -0.0 into 0.0


def question(case: Case, N: int) -> dict[str, Any]:
    """What a case asks, as JSON: everything that a verdict depends on, except for numbers.

    Args:
        case: The case.
        N: How many data its numbers have.
    """
    asked = {
        "id": case.id,
        "ops": [operation(i, op) for i, op in enumerate(case.ops)],
        "loss": _loss(case.loss),
        "fisher": case.fisher,
        "flavours": dict(case.flavours),
        "layers": case.judged,
        "part": case.part,
        "batches": case.batches or (N,),
        "damping": case.damping and {"form": case.damping[0], "value": case.damping[1]},
        "operator": case.operator,
        "dtype": case.dtype,
        "tolerance": case.tolerance,
    }
    return asked | ({"masked": True} if case.masked else {})


def _loss(loss: Loss) -> dict[str, Any]:
    """A loss as JSON: label smoothing and weights of entries where there are some."""
    more = {"label_smoothing": loss.label_smoothing, "entry_weight": loss.entry_weight}
    asked = {"kind": loss.kind, "reduction": loss.reduction, "weight": loss.weight}
    return asked | {key: value for key, value in more.items() if value}


def operation(i: int, op: Op) -> dict[str, Any]:
    """One operation as JSON, with its inputs spelled out."""
    return {
        "kind": op.kind,
        "name": op.name,
        "inputs": op.inputs or (i - 1,),
        "settings": dict(op.settings),
    }


def case_digest(case: Case) -> str:
    """What a case asks and its numbers, as one short word."""
    numbers = given(case)
    return content_digest(question(case, len(numbers["X"])), numbers)


def digests(cases: Mapping[str, Case]) -> dict[str, str]:
    """The digest of every case, by identifier."""
    return {name: case_digest(case) for name, case in cases.items()}
