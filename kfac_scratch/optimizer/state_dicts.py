"""The optimizer's part of a checkpoint: what is written, and what is checked before it is read.

A checkpoint says what it is: a format number, the approximation, the inverse and the flavour by
name, and for every block its parameters and the shape and dtype of its `W`. Everything is compared
with the optimizer that reads it, and every number is looked for, before anything is replaced.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator
from torch.nn import Embedding, Parameter

from kfac_scratch.approximations.estimators import Estimator
from kfac_scratch.capture.flavours import EXPAND, REDUCE, Flavour
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import LinearMap
from kfac_scratch.optimizer.arrangement import BlockShape
from kfac_scratch.optimizer.checkpoints import (
    HALF,
    example_io,
    one_hot_example_io,
    restored,
    tensors,
)
from kfac_scratch.optimizer.finite import first_not_finite, tensors_in
from kfac_scratch.optimizer.progress import Progress

FORMAT = 1
PREFIXES = ("module.", "_orig_mod.")
FLAVOURS = {"EXPAND": EXPAND, "REDUCE": REDUCE}
Groups = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Makers:
    """The functions that make matrices and inverses; a checkpoint holds their names.

    Functions without a name of their own, such as two lambdas, are not told apart.
    """

    estimator: Estimator
    invert: Callable[[Any, float], LinearMap]
    flavour: Flavour

    def example(self, shape: BlockShape, device: torch.device) -> LayerIO:
        """A layer with a block's kind of rows, of which the functions make examples of matrices."""
        W = torch.zeros(shape.shape, dtype=shape.dtype, device=device)
        one_hot = shape.layer == Embedding.__name__ and self.flavour is EXPAND
        return one_hot_example_io(W) if one_hot else example_io(W)

    def names(self) -> dict[str, str]:
        """Their names, as a checkpoint has them."""
        return {
            "approximation": name_of(self.estimator),
            "inverse": name_of(self.invert),
            "flavour": flavour_name(self.flavour) or "another",
        }


def flavour_name(flavour: Flavour) -> str | None:
    """The name of a flavour, None for one that a user has made."""
    return next((name for name, value in FLAVOURS.items() if value is flavour), None)


def name_of(maker: Any) -> str:
    """The name of a function, or of a value with the functions in it: `MovingAverage(kfac)`."""
    if isinstance(maker, partial):
        return name_of(maker.func)
    if not is_dataclass(maker):
        return str(getattr(maker, "__qualname__", type(maker).__name__))
    parts = [getattr(maker, f.name) for f in fields(maker)]
    inside = [name_of(part) for part in parts if is_dataclass(part) or callable(part)]
    return f"{type(maker).__name__}({', '.join(inside)})"


def saved(known: Progress, makers: Makers, parameters: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The progress of a run as tensors, numbers and names.

    Args:
        known: Matrices, inverses and counters.
        makers: The functions that made them.
        parameters: The names of the parameters in every group.
    """
    return {
        "format": FORMAT,
        **makers.names(),
        "parameters": [list(names) for names in parameters],
        "steps": known.steps,
        "updates": known.updates,
        "updated_at": known.updated_at,
        "inverted_at": known.inverted_at,
        "blocks": {
            name: {
                "parameters": list(shape.parameters),
                "shape": list(shape.shape),
                "dtype": str(shape.dtype).removeprefix("torch."),
                "layer": shape.layer,
                "kind": type(known.matrices[name]).__name__,
                "batches": known.counts[name],
            }
            for name, shape in known.shapes.items()
        },
        "matrices": {name: tensors(M) for name, M in known.matrices.items()},
        "inverses": {name: tensors(M) for name, M in known.inverses.items()},
        "dampings": dict(known.dampings),
    }


def read(
    file: Any,
    makers: Makers,
    parameters: Sequence[Sequence[str]],
    shapes: Mapping[str, BlockShape],
    device: torch.device,
) -> Progress:
    """The progress that `saved` wrote, after all checks.

    A prefix that a wrapper adds to all names, `module.` or `_orig_mod.`, is added or removed.
    Numbers in half precision are cast to the precision of the optimizer.

    Args:
        file: The entry `kfac` of a checkpoint.
        makers: The functions of the optimizer that reads it.
        parameters: The names of its parameters, group by group.
        shapes: What its blocks are.
        device: Where its parameters are.

    Raises:
        ValueError: Naming the block, and what is in the file and in the optimizer.
    """
    if not isinstance(file, Mapping) or file.get("format") != FORMAT:
        version = file.get("format") if isinstance(file, Mapping) else None
        raise ValueError(
            f"This is no checkpoint of KFAC in the format {FORMAT} (it says {version}): was it "
            "written by another optimizer, or by another version of this package?"
        )
    for key, name in makers.names().items():
        if file[key] != name:
            raise ValueError(
                f"The checkpoint was written with {key} {file[key]}, but the optimizer has {name}: "
                f"build it with the same {key}, since another approximation's matrices mean "
                "something else."
            )
    rename = _renaming(file["parameters"], parameters)
    blocks = {
        rename(name): BlockShape(
            tuple(map(rename, block["parameters"])),
            tuple(block["shape"]),
            getattr(torch, block["dtype"]),
            block["layer"],
        )
        for name, block in file["blocks"].items()
    }
    for name, shape in blocks.items():
        _check_same(name, shape, shapes.get(name, shape))
    _check_counters(file)
    matrices, inverses = {}, {}
    for key, name in ((key, rename(key)) for key in file["matrices"]):
        shape = shapes.get(name, blocks[name])
        like: Any = makers.estimator.update(None, makers.example(shape, device), 1.0)
        matrices[name] = _restored(f"matrix of block {name!r}", like, file["matrices"][key], shape)
        if key in file["inverses"]:
            like = makers.invert(like, 1.0)
            of = f"inverse of block {name!r}"
            inverses[name] = _restored(of, like, file["inverses"][key], shape)
    return Progress(
        file["steps"],
        file["updates"],
        file["updated_at"],
        file["inverted_at"],
        matrices,
        {rename(name): block["batches"] for name, block in file["blocks"].items()},
        blocks,
        inverses,
        {rename(name): damping for name, damping in file["dampings"].items()},
    )


def check_states(
    states: Mapping[Any, Any],
    file_groups: Groups,
    groups: Groups,
    names: Mapping[int, str],
) -> None:
    """Refuse the states of parameters in a checkpoint that are not theirs, or not finite.

    Args:
        states: By the index of the parameter.
        file_groups: The groups in the checkpoint, with indices.
        groups: The optimizer's groups, with parameters.
        names: Names of the parameters, by id.

    Raises:
        ValueError: Naming the parameter.
    """
    for in_file, group in zip(file_groups, groups, strict=True):
        if ("rest" in in_file) != ("rest" in group):
            raise ValueError(
                "The checkpoint and the optimizer differ in which groups rest=... has."
            )
        for index, p in zip(in_file["params"], group["params"], strict=True):
            _check_state(names[id(p)], states.get(index, {}), p, "rest" in group)


def check_generator(file: Mapping[str, Any], generator: Generator | None) -> None:
    """Refuse a checkpoint whose random state is missing, left over, or of another kind.

    Raises:
        ValueError: If so.
    """
    if ("generator" in file) != (generator is not None):
        has, lacks = (
            ("checkpoint", "optimizer") if generator is None else ("optimizer", "checkpoint")
        )
        raise ValueError(
            f"The {has} has a generator, but the {lacks} has none: build the optimizer that is "
            "saved, and the one that loads it, both with generator=..., or both without."
        )
    if generator is not None:
        try:
            Generator(generator.device).set_state(file["generator"])
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"The random state in the checkpoint is none of a generator on {generator.device}."
            ) from error


def _renaming(file: Sequence[Sequence[str]], here: Sequence[Sequence[str]]) -> Callable[[str], str]:
    """The function from names in a file to names here: a prefix more, or less, or neither."""
    written, wanted = ([list(names) for names in of] for of in (file, here))
    if written == wanted:
        return lambda name: name
    for prefix in PREFIXES:
        if written == [[prefix + name for name in names] for names in wanted]:
            return lambda name: name.removeprefix(prefix)
        if wanted == [[prefix + name for name in names] for names in written]:
            return lambda name: prefix + name
    flat = [{name for names in of for name in names} for of in (written, wanted)]
    raise ValueError(
        "The checkpoint is of other parameters, or of other groups. Only in the checkpoint: "
        f"{sorted(flat[0] - flat[1])}; only in the optimizer: {sorted(flat[1] - flat[0])}; groups "
        f"of {[len(names) for names in written]} and of {[len(names) for names in wanted]} "
        "parameters."
    )


def _check_counters(file: Mapping[str, Any]) -> None:
    counts = [file["steps"], file["updates"], *(b["batches"] for b in file["blocks"].values())]
    last = file["steps"] if file["updated_at"] is None else file["updated_at"]
    if not all(isinstance(count, int) and count >= 0 for count in (*counts, last)):
        raise ValueError(f"The counters in the checkpoint are no whole numbers: {counts}.")
    if set(file["dampings"]) != set(file["inverses"]) or set(file["blocks"]) != set(
        file["matrices"]
    ):
        raise ValueError("Matrices, inverses and dampings in the checkpoint are of other blocks.")
    for name, damping in file["dampings"].items():
        if not (isinstance(damping, float | int) and damping >= 0):
            raise ValueError(f"The damping of block {name!r} in the checkpoint is {damping!r}.")


def _check_same(name: str, file: BlockShape, here: BlockShape) -> None:
    if file.shape != here.shape or file.parameters != here.parameters:
        raise ValueError(
            f"Block {name!r} is {file.shape} with the parameters {list(file.parameters)} in the "
            f"checkpoint, but {here.shape} with {list(here.parameters)} in the optimizer."
        )
    if not _castable(file.dtype, here.dtype):
        raise ValueError(
            f"Block {name!r} is {file.dtype} in the checkpoint, but {here.dtype} in the optimizer."
        )


def _castable(file: torch.dtype, here: torch.dtype) -> bool:
    return file == here or file in HALF


def _restored(what: str, like: Any, file: Any, shape: BlockShape) -> Any:
    """A matrix or inverse in the optimizer's precision, finite and of the right shape."""
    found = set()
    try:
        value = restored(like, file)
        found = {t.dtype for t in tensors_in(file)}
        if all(_castable(dtype, like_dtype(like)) for dtype in found):
            V = torch.zeros(shape.shape, dtype=like_dtype(like), device=_device(like))
            if (value @ V).shape == shape.shape and first_not_finite({what: value}) is None:
                return value
    except (ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(f"The {what} cannot be read from the checkpoint. {error}") from error
    raise ValueError(
        f"The {what} in the checkpoint, of {sorted(map(str, found))}, is not finite, or does not "
        f"fit the optimizer's, of {like_dtype(like)} and for weights of shape {shape.shape}."
    )


def like_dtype(like: Any) -> torch.dtype:
    """The dtype of the numbers in a matrix."""
    return tensors_in(like)[0].dtype


def _device(like: Any) -> torch.device:
    return tensors_in(like)[0].device


def _check_state(name: str, state: Any, p: Parameter, of_rest: bool) -> None:
    if first_not_finite({name: state}) is not None:
        raise ValueError(f"The state of parameter {name!r} in the checkpoint is not finite.")
    for t in () if of_rest else tensors_in(state):
        if t.ndim and t.shape != p.shape:
            raise ValueError(
                f"The state of parameter {name!r} has the shape {tuple(t.shape)} in the "
                f"checkpoint, but the parameter has {tuple(p.shape)} in the optimizer."
            )
