"""The words that cases, adapters and verdicts are made of, each spelled in this one place.

They are plain strings, so that an adapter, a JSON file and a port in another language need no
import; as `Literal` types they are checked wherever this package compares them.
"""

from typing import Literal, get_args

Verdict = Literal[
    "exact",
    "definition",
    "scaled",
    "undocumented-scale",
    "inconsistent-scale",
    "wrong",
    "error",
    "not-supported",
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)  # in the order of reports
PASSING: tuple[Verdict, ...] = ("exact", "definition", "scaled", "not-supported")

Flavour = Literal["expand", "reduce", "ekfac"]
FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
Task = tuple[str, Flavour]  # a case's identifier, and what is asked for
Fisher = Literal["type2", "mc", "empirical"]
LossKind = Literal["mse", "cross-entropy", "bce"]
Reduction = Literal["mean", "sum"]
Precision = Literal["float64", "float32"]
DampingForm = Literal["exact", "factored"]

Expectation = Literal["equals-ggn", "definition"]  # what a case expects of a flavour
EXACT: Expectation = "equals-ggn"
DEFINITION: Expectation = "definition"

JudgedEntries = Literal["block", "bias"]  # which entries of a layer's block a case judges
PartName = Literal["joint", "weight", "bias"]  # what a layer's answer comes in
PART_NAMES: tuple[PartName, ...] = get_args(PartName)
BiasPlace = Literal["last", "first", "behind"]  # where the bias stands in a joint answer
