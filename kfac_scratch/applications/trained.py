"""A trained network as matrices: its weights by block, and back to its parameters.

The applications take a trained network and return other weights for it, or numbers. They work on
one matrix `[W | b]` for each block. This module converts parameters to such matrices and back.
"""

from collections.abc import Collection, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import check_instance
from kfac_scratch.capture.layer_groups import LayerGroup, groups_of, layer_names
from kfac_scratch.matrices.damping import HasDiagonal
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.optimizer.preconditioner import block_matrices


@runtime_checkable
class WithDiagonal(Matrix, HasDiagonal, Protocol):
    """A curvature matrix that knows its diagonal."""


def trained_weights(
    model: Module, blocks: Collection[str]
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """The weights `[W | b]` of blocks, by name: copies, in float32 at least.

    Args:
        model: Any module, see `layer_ios`.
        blocks: Names of blocks, as `layer_ios` and `over_loader` give them.

    Raises:
        ValueError: If the model has no such block.
    """
    values = {name: p.detach() for name, p in model.named_parameters()}
    found = block_matrices(_groups(model, blocks), values)
    return {name: found[name] for name in blocks}


def parameters_from(
    model: Module, weights: Mapping[str, Float[Tensor, "d_out d_in"]]
) -> dict[str, Tensor]:
    """Weights by block as parameters by name, in the model's precision.

    Use it to give a model new weights: `model.load_state_dict(found, strict=False)`. The
    parameters that no block covers are not in it, and stay.

    Args:
        model: The model, which is not changed.
        weights: A matrix for each block, for all groups of a grouped layer.

    Raises:
        ValueError: If the model has no such block, a grouped layer's other groups are missing, or
            a matrix has another shape than the block.
    """
    current = trained_weights(model, weights)
    for name, W in weights.items():
        if W.shape != current[name].shape:
            raise ValueError(
                f"The weights of block {name!r} have the shape {tuple(W.shape)}, but the block has "
                f"{tuple(current[name].shape)}: pass [W | b], with a column for each bias."
            )
    own = dict(model.named_parameters())
    found = {}
    for group in _groups(model, weights):
        missing = sorted(set(group.names) - set(weights))
        if missing:
            raise ValueError(
                f"Layer {group.name!r} has several blocks, of which {missing} are missing: pass "
                "all of them."
            )
        found.update(group.parameters([weights[name] for name in group.names]))
    return {name: value.to(own[name].dtype) for name, value in found.items()}


def weights_without_biases(
    model: Module, blocks: Collection[str]
) -> dict[str, Bool[Tensor, "d_out d_in"]]:
    """Masks that tell weights from biases in the blocks `[W | b]`: True for weights.

    Args:
        model: The model.
        blocks: Names of its blocks.

    Raises:
        ValueError: If the model has no such block.
    """
    groups = _groups(model, blocks)
    biases = {name for group in groups for name in group.biases}
    values = {
        name: torch.full_like(p, float(name not in biases)) for name, p in model.named_parameters()
    }
    found = block_matrices(groups, values)
    return {name: found[name] > 0 for name in blocks}


def check_sum(loss: Module, consequence: str) -> None:
    """Refuse a loss that is not the sum over its data.

    Args:
        loss: The loss.
        consequence: What belongs to the sum, and how a mean's numbers become a sum's.

    Raises:
        TypeError: If it is no module.
        ValueError: With the way out.
    """
    check_instance("loss", loss, Module, 'nn.CrossEntropyLoss(reduction="sum")')
    if getattr(loss, "reduction", None) != "sum":
        raise ValueError(
            f"loss is {loss} with reduction={getattr(loss, 'reduction', None)!r}: {consequence} "
            f'Pass {type(loss).__name__}(reduction="sum").'
        )


def layers_of(model: Module, blocks: Collection[str]) -> list[str]:
    """Names of the layers that some blocks belong to, as `layer_ios(..., layers=)` takes them.

    Raises:
        ValueError: If the model has no such block.
    """
    return layer_names(model, _groups(model, blocks))


def _groups(model: Module, blocks: Collection[str]) -> list[LayerGroup]:
    check_instance("model", model, Module, "nn.Sequential(...)")
    groups = groups_of(model, blocks)
    unknown = sorted(set(blocks) - {name for group in groups for name in group.names})
    if unknown:
        raise ValueError(
            f"The model has no blocks {unknown}: its layers' names are those that layer_ios gives."
        )
    return groups
