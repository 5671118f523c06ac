"""What an optimizer has learnt about the curvature: a value, replaced as a whole by every step."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kfac_scratch.approximations.estimators import Estimator, weight_of_newest
from kfac_scratch.capture.layer_groups import LayerGroup
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import LinearMap, Matrix
from kfac_scratch.optimizer.arrangement import Arrangement, BlockShape

Matrices = Mapping[str, Matrix]
Update = Callable[[Matrices, Mapping[str, LayerIO], Mapping[str, float]], dict[str, Matrix]]
"""From matrices, a batch's layers and its weights to the matrices with the batch."""
InvertBlocks = Callable[[Sequence[LayerGroup], Matrices, Mapping[str, float]], dict[str, LinearMap]]
"""From blocks, all matrices and the dampings of parameters to the inverses of the blocks."""


@dataclass(frozen=True, eq=False)
class Progress:
    """The matrices of all blocks, their inverses, and how they came about.

    It has many parameters, because a run is continued from it bit for bit.

    Attributes:
        steps: Steps so far.
        updates: Updates of the matrices so far.
        updated_at: The step of the last update that was due; None before the first.
        inverted_at: The step of the last inversions that were due; None before the first.
        matrices: By block name.
        counts: The number of batches in each matrix.
        shapes: What each matrix is for.
        inverses: By block name.
        dampings: The damping in each inverse.
    """

    steps: int = 0
    updates: int = 0
    updated_at: int | None = None
    inverted_at: int | None = None
    matrices: dict[str, Matrix] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, BlockShape] = field(default_factory=dict)
    inverses: dict[str, LinearMap] = field(default_factory=dict)
    dampings: dict[str, float] = field(default_factory=dict)

    def averaged(
        self,
        update: Update,
        ios: Mapping[str, LayerIO],
        decay: float,
        shapes: Mapping[str, BlockShape],
    ) -> "Progress":
        """With one more batch in every matrix that it has a layer for.

        Raises:
            ValueError: As `update`.
        """
        counts = {name: self.counts.get(name, 0) + 1 for name in ios}
        weights = {name: weight_of_newest(decay, count) for name, count in counts.items()}
        new = update(self.matrices, ios, weights)
        return replace(
            self,
            updates=self.updates + 1,
            matrices=self.matrices | new,
            counts=self.counts | counts,
            shapes=self.shapes | {name: shapes[name] for name in ios},
        )

    def fitting(self, arrangement: Arrangement) -> "Progress":
        """Without the matrices of blocks that consist of other parameters than before.

        Raises:
            ValueError: If parameters have another dtype than their matrix was made for.
        """
        for name, shape in arrangement.shapes.items():
            made_for = self.shapes.get(name, shape)
            if shape.dtype != made_for.dtype:
                raise ValueError(
                    f"The parameters of block {name!r} are {shape.dtype}, but its curvature was "
                    f"estimated in {made_for.dtype}. Build a new optimizer after a cast."
                )
        now = arrangement.shapes
        stale = {n for n, shape in self.shapes.items() if now.get(n, shape) != shape}
        return self if not stale else self.without(stale)

    def without(self, names: set[str]) -> "Progress":
        """Without some blocks."""

        def kept(values: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if name not in names}

        return replace(
            self,
            matrices=kept(self.matrices),
            counts=kept(self.counts),
            shapes=kept(self.shapes),
            inverses=kept(self.inverses),
            dampings=kept(self.dampings),
        )

    def inverted(
        self,
        blocks: Sequence[LayerGroup],
        damping: Mapping[str, float],
        invert: InvertBlocks,
    ) -> "Progress":
        """With new inverses of some blocks.

        Args:
            blocks: The blocks.
            damping: By parameter name.
            invert: From blocks, the matrices and the dampings to the inverses that are held here.

        Raises:
            ValueError: As `invert`, and if a block has no curvature yet.
        """
        missing = [n for block in blocks for n in block.names if n not in self.counts]
        if missing:
            raise ValueError(
                f"There is no curvature yet for the blocks {missing}: call observe(X, y) before "
                "step()."
            )
        new = invert(blocks, self.matrices, damping)
        used = {n: damping[block.parameter_names[0]] for block in blocks for n in block.names}
        return replace(self, inverses=self.inverses | new, dampings=self.dampings | used)

    def has_inverse(self, block: LayerGroup, damping: Mapping[str, float]) -> bool:
        """Whether a block has inverses, with the damping of its parameters."""
        wanted = {damping[name] for name in block.parameter_names}
        return all(n in self.dampings and wanted == {self.dampings[n]} for n in block.names)


def updated(
    estimator: Estimator,
    states: Mapping[str, Matrix],
    ios: Mapping[str, LayerIO],
    weights: Mapping[str, float],
) -> dict[str, Matrix]:
    """The matrices after one more batch.

    Args:
        estimator: The rule.
        states: Matrices so far, by block name.
        ios: Every layer on the batch.
        weights: The share of the batch in each matrix.

    Raises:
        ValueError: If an approximation fails on the batch, naming the block.
    """
    new: dict[str, Matrix] = {}
    for name, io in ios.items():
        try:
            new[name] = estimator.update(states.get(name), io, weights[name])
        except (ValueError, RuntimeError) as error:  # RuntimeError: of torch.linalg
            raise ValueError(
                f"The curvature of block {name!r} cannot be estimated from this batch; nothing "
                f"was changed. {error}"
            ) from error
    return new
