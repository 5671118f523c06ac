"""Mistakes about layers: what a hook sees, and what a layer's matrix multiplies."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kfac_scratch.conformance.selftest.museum import naive
from kfac_scratch.conformance.selftest.museum.naive import Call
from kfac_scratch.conformance.selftest.museum.piece import Piece

PLACE = 2  # of the room


def run(model: nn.Module, X: Tensor) -> Tensor:
    """Wrong: a layer whose hook never fires."""
    if isinstance(out := getattr(model, "out", None), nn.Linear):
        setattr(model, "out", _Functional(out))  # noqa: B010
    return naive.run(model, X)


class _Functional(nn.Module):
    """Multiply with a layer's weight without calling the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """What the layer computes."""
        return functional.linear(x, self.layer.weight, self.layer.bias)


NEVER_CALLED = Piece(
    "never-called",
    "a layer whose hook never fires",
    "run",
    run,
    "The layer is in `named_modules()`, has a weight, and the weight has a gradient. But fused "
    "attention passes the weight to a function and never calls the layer, so no hook sees it.",
    ("attention-tokens-mse", "expand"),
    "gpauloski/kfac-pytorch #267",
    "It fails with an error there, not silently. The cases' attention calls its layers; this "
    "piece exchanges the call as PyTorch does.",
)


def positions(calls: list[Call], a: Tensor) -> int:
    """Wrong: positions of the input for those of the output."""
    x = calls[0].x
    if isinstance(calls[0].layer, nn.Linear):
        return a.shape[1]
    return x[0, 0].numel()


INPUT_POSITIONS = Piece(
    "input-positions",
    "positions of the input for those of the output",
    "positions",
    positions,
    "The input factor is about inputs, so its positions are taken to be the input's. A patch "
    "stands at every position of the output, and with a stride there are fewer.",
    ("conv2d-stride-per-location-mse-mean", "expand"),
    "ikostrikov/pytorch-a2c-ppo-acktr-gail #54",
    "Open, and titled as potential bugs: the author followed the code of OpenAI.",
)


def in_rows(patches: Tensor) -> Tensor:
    """Wrong: a transpose missing for convolutions."""
    return patches.reshape(len(patches), patches.shape[2], patches.shape[1])


TRANSPOSE = Piece(
    "transpose",
    "a transpose missing for convolutions",
    "in_rows",
    in_rows,
    "The shape is right, and a reshape raises no error. Entries of different patches end up in "
    "one row.",
    ("conv1d-plain-per-location-mse-mean", "expand"),
    "LBANN/lbann #2010",
)


def record(calls: list[Call], layer: nn.Module, x: Tensor, z: Tensor) -> Tensor | None:
    """Wrong: an activation that writes over what was recorded."""
    calls.append(Call(layer, x.detach(), z))
    return None


ACTIVATION_IN_PLACE = Piece(
    "activation-in-place",
    "an activation that writes over what was recorded",
    "record",
    record,
    "A hook that returns nothing changes nothing, as it should. But `ReLU(inplace=True)` writes "
    "into the very tensor that was kept, whose gradient is then one behind the activation.",
    ("one-datum-mse-relu-inplace-mean", "expand"),
)


def used(calls: list[Call]) -> list[Call]:
    """Wrong: the last call of a layer only."""
    return calls[-1:]


LAST_CALL = Piece(
    "last-call",
    "the last call of a layer only",
    "used",
    used,
    "`layer.input = x` in a hook is the shortest way to remember, and with one call per pass it "
    "is right. A second call writes over the first.",
    ("used-twice-added-mse", "reduce"),
)


def padded(layer: Any, x: Tensor) -> Tensor:
    """Wrong: padding_mode ignored."""
    sides = [p for p in reversed(layer.padding) for _ in range(2)]
    return functional.pad(x, sides)


PADDING_MODE = Piece(
    "padding-mode",
    "padding_mode ignored",
    "padded",
    padded,
    "Zero padding is the default, and `unfold` offers nothing else.",
    ("conv2d-circular-per-location-mse-mean", "expand"),
)


def geometry(layer: Any) -> dict[str, tuple[int, ...]]:
    """Wrong: dilation ignored."""
    return {"stride": layer.stride}


DILATION = Piece(
    "dilation",
    "dilation ignored",
    "geometry",
    geometry,
    "Most networks have none. Where there is one, even the number of positions changes.",
    ("conv2d-dilation-pooled-mse", "expand"),
)


def with_ones(rows: Tensor) -> Tensor:
    """Wrong: zeros for the input of the bias."""
    return torch.cat([rows, torch.zeros_like(rows[..., :1])], -1)


BIAS_ZEROS = Piece(
    "bias-zeros",
    "zeros for the input of the bias",
    "with_ones",
    with_ones,
    "The shapes fit, the weight's block is exact, and damping keeps the matrix invertible: the "
    "bias then takes plain gradient steps divided by the damping.",
    ("bias-mse-mean", "expand"),
)


def reduced(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong: a mean for the sum of vectors in KFAC-reduce."""
    return a.mean(1, keepdim=True), g.mean(2, keepdim=True)


MEAN_OF_VECTORS = Piece(
    "mean-of-vectors",
    "a mean for the sum of vectors in KFAC-reduce",
    "reduced",
    reduced,
    "The inputs are averaged, so it looks consistent to average the vectors. But the gradient "
    "is the sum over positions of g aᵀ: one of the two must be summed.",
    ("mean-pooled-mse-mean-bias", "reduce"),
)

PIECES = [NEVER_CALLED, INPUT_POSITIONS, TRANSPOSE, ACTIVATION_IN_PLACE, LAST_CALL]
PIECES += [PADDING_MODE, DILATION, BIAS_ZEROS, MEAN_OF_VECTORS]
