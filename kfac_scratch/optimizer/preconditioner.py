"""From matrices to a step: apply every block's inverse to the gradient of the whole network.

A preconditioner is a function from gradients to a step, both by parameter name. It is block
diagonal: curvature between blocks has no effect.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §4.2.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import check_instance, check_result, checked_names
from kfac_scratch.capture.layer_groups import LayerGroup, layer_groups
from kfac_scratch.linalg import at_least_float32
from kfac_scratch.matrices.matrix import LinearMap, Matrix, exact_inverse

Preconditioner = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""A function from the gradient of every parameter to a step for every parameter, by name."""


def preconditioner(
    model: Module,
    maps: Mapping[str, LinearMap],
    *,
    layers: Collection[str] | None = None,
    rest: Callable[[Tensor], Tensor] | None = None,
) -> Preconditioner:
    """A function that applies one linear map to each block of a model.

    Use it with inverses `{name: M.inverse(damping)}`: gradients become the (unscaled) natural
    gradient step. With the matrices themselves, it is the curvature's product with a direction. Not
    for curvature between blocks: `two_level`.

    Cost: one product with each map.

    Args:
        model: The module that the maps belong to.
        maps: One map for every block, by its name (as `layer_ios` names them).
        layers: The layers that were covered, if not all.
        rest: The map for the values of parameters that no block covers, for example
            `lambda v: v`. Default: such a parameter is an error.

    Raises:
        ValueError: If maps and blocks do not go together, or a value has no block and `rest` is
            not given.
    """
    check_instance("model", model, Module, "nn.Sequential(...)")
    check_instance(
        "maps", maps, Mapping, "{name: kfac(io).inverse(1e-3) for name, io in ios.items()}"
    )
    for name, M in maps.items():
        check_instance(f"maps[{name!r}]", M, LinearMap, "kfac(io).inverse(1e-3)")
    groups = layer_groups(model, checked_names("layers", layers))
    names = [name for group in groups for name in group.names]
    if set(names) != set(maps):
        raise ValueError(
            f"Blocks without a map: {sorted(set(names) - set(maps))}; maps without a block: "
            f"{sorted(set(maps) - set(names))}."
        )

    return blockwise(groups, lambda Vs: {name: maps[name] @ V for name, V in Vs.items()}, rest)


def blockwise(
    groups: list[LayerGroup],
    step: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    rest: Callable[[Tensor], Tensor] | None = None,
) -> Preconditioner:
    """A function of matrices by block name as a function of values by parameter name.

    Law: a step has the precision of its value. The matrices have float32 at least, as curvature
    has, so that a model in half precision is stepped by it.

    Args:
        groups: The layers' groups, as `layer_groups` gives them.
        step: From one `[d_out, d_in]` matrix for each block to as many.
        rest: As in `preconditioner`.
    """
    return partial(_stepped, groups, step, rest)


def _stepped(
    groups: list[LayerGroup],
    step: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    rest: Callable[[Tensor], Tensor] | None,
    values: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    moved = step(block_matrices(groups, values))
    result = {}
    for group in groups:
        result.update(group.parameters([moved[name] for name in group.names]))
    result = {name: value.to(values[name].dtype) for name, value in result.items()}
    others = [name for name in values if name not in result]
    if others and rest is None:
        raise ValueError(f"No block covers {others}: pass rest=..., for example the identity.")
    return result | {name: rest(values[name]) for name in others if rest is not None}


def block_matrices(groups: list[LayerGroup], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values by parameter name as one `[d_out, d_in]` matrix for each block, by its name.

    The matrices have float32 at least, as the rows of `layer_ios` have.
    """
    return {
        name: at_least_float32(V)
        for group in groups
        for name, V in zip(group.names, group.matrices(values), strict=True)
    }


def inverses(
    groups: list[LayerGroup],
    matrices: Mapping[str, Matrix],
    damping: Mapping[str, float],
    invert: Callable[[Any, float], LinearMap] = exact_inverse,
) -> dict[str, LinearMap]:
    """The inverse of every block's matrix, with a damping that may differ between blocks.

    Use it as the optimizer does, where dampings belong to parameter groups. Not for one damping:
    `{name: M.inverse(damping) for name, M in matrices.items()}`.

    Cost: that of `invert` for each matrix.

    Args:
        groups: The layers' groups, as `layer_groups` gives them.
        matrices: Their matrices, by name.
        damping: The damping of every parameter, by its name: all of a block have the same.
        invert: From a matrix and a damping to the inverse.

    Raises:
        ValueError: If a matrix has no inverse, or the parameters of a block differ in damping.
    """
    result = {}
    for group in groups:
        value, *others = {damping[name] for name in group.parameter_names}
        if others:
            raise ValueError(
                f"The parameters of block {group.name!r} are in groups with the dampings "
                f"{sorted([value, *others])}: a block has one."
            )
        for name in group.names:
            try:
                result[name] = invert(matrices[name], value)
            except (ValueError, RuntimeError) as error:  # RuntimeError: of torch.linalg
                raise ValueError(
                    f"The curvature of block {name!r} has no inverse with damping {value:g}. "
                    f"{error}"
                ) from error
            check_result("invert", result[name], LinearMap, "the inverse, a LinearMap")
    return result
