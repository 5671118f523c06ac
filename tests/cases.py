"""Problems, grouped by the theorem that holds on them (see the chapters on KFAC).

All sizes within a problem are pairwise coprime where they can be, so that a wrong scale is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import (
    BCEWithLogitsLoss,
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
    CrossEntropyLoss,
    Embedding,
    Flatten,
    Linear,
    Module,
    MSELoss,
    ReLU,
    Sequential,
    Sigmoid,
    Tanh,
)

from kfac_scratch import LayerIO

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Case:
    """A model with data. `layers`: the blocks for which the theorem holds (None: all)."""

    name: str
    model: Callable[[], Module]
    X: Callable[[], Tensor]
    loss: Callable[..., Module] = MSELoss
    reduction: str = "mean"
    y: Callable[[Tensor], Tensor] | None = None
    layers: tuple[str, ...] | None = None

    def __str__(self) -> str:
        return f"{self.name}-{self.loss.__name__}-{self.reduction}"

    def build(self, device="cpu", dtype=torch.float64) -> tuple[Module, Module, Tensor, Tensor]:
        torch.manual_seed(0)
        model, X = self.model().to(torch.float64), self.X()
        with torch.no_grad():
            f = model(X).clone()
        y = self.y(f) if self.y else targets(self.loss, f)

        def move(t: Tensor) -> Tensor:
            return t.to(device, dtype) if t.is_floating_point() else t.to(device)

        return model.to(device, dtype), self.loss(reduction=self.reduction), move(X), move(y)


def targets(loss: type[Module], f: Tensor) -> Tensor:
    """Random targets for a loss on given outputs."""
    if loss is CrossEntropyLoss:
        return torch.randint(f.shape[1], (len(f), *f.shape[2:]))
    return torch.rand_like(f)


class Transposed(Module):
    """Move the last axis of a network's output to axis 1, where cross-entropy has its classes."""

    def __init__(self, net: Module):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).movedim(-1, 1)


class Pool(Module):
    """Mean (or sum) over all shared axes between the batch and the last axis."""

    def __init__(self, mean: bool = True):
        super().__init__()
        self.mean = mean

    def forward(self, x):
        x = x.flatten(1, -2)
        return x.mean(1) if self.mean else x.sum(1)


class GlobalPool(Module):
    """Mean over all spatial axes."""

    def forward(self, x):
        return x.flatten(2).mean(2)


class Both(Module):
    """Apply a module to both halves of the last axis, and join the results."""

    def __init__(self, first: Module, second: Module, join: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.first, self.second, self.join = first, second, join

    def forward(self, x):
        left, right = x.chunk(2, dim=-1)
        return self.join(self.first(left), self.second(right))


def tied(join: Callable[[Tensor, Tensor], Tensor], same_module: bool) -> Module:
    first = Linear(4, 3)
    second = first if same_module else Linear(4, 3)
    second.weight, second.bias = first.weight, first.bias
    return Both(first, second, join)


def add(a: Tensor, b: Tensor) -> Tensor:
    return a + b


def stack(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b], dim=1)


def normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def tokens(*shape: int, high: int = 5) -> Callable[[], Tensor]:
    return lambda: torch.randint(high, shape)


def mlp(*sizes: int, bias: bool = True, activation: Callable[[], Module] | None = None) -> Module:
    layers: list[Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [Linear(d_in, d_out, bias=bias)] + ([activation()] if activation else [])
    return Sequential(*(layers[:-1] if activation else layers))


def with_reductions(*cases: Case) -> list[Case]:
    return [
        Case(**{**case.__dict__, "reduction": reduction})
        for case in cases
        for reduction in REDUCTIONS
    ]


# ---- deep linear nets with squared error: Jacobians and loss Hessian are constant -------------

DEEP_LINEAR = with_reductions(
    Case("linear-bias", lambda: mlp(5, 4, 3, 2), normal(7, 5)),
    Case("linear", lambda: mlp(5, 4, 3, 2, bias=False), normal(7, 5)),
    Case("embedding", lambda: Sequential(Embedding(5, 4), Linear(4, 3)), tokens(7)),
    Case(
        "conv1d-one-patch",
        lambda: Sequential(Conv1d(2, 3, 5), Flatten(), Linear(3, 4)),
        normal(7, 2, 5),
    ),
)

EXPAND_SETTING = with_reductions(
    Case("sequence-bias", lambda: mlp(5, 4, 3, 2), normal(7, 11, 5)),
    Case("sequence", lambda: mlp(5, 4, 3, 2, bias=False), normal(7, 11, 5)),
    Case("grid", lambda: mlp(5, 4, 3), normal(7, 2, 3, 5)),
    Case("embedding", lambda: Sequential(Embedding(5, 4), Linear(4, 3)), tokens(7, 11)),
    Case(
        "embedding-padded",
        lambda: Sequential(Embedding(5, 4, padding_idx=2), Linear(4, 3)),
        tokens(7, 11),
    ),
    Case("pointwise-conv", lambda: Sequential(Conv1d(5, 4, 1), Conv1d(4, 3, 1)), normal(7, 5, 11)),
    Case("called-twice", lambda: tied(stack, same_module=True), normal(7, 8)),
    Case("tied", lambda: tied(stack, same_module=False), normal(7, 8)),
)

REDUCE_SETTING = with_reductions(
    *(
        Case(
            f"sequence-{'bias-' if bias else ''}{'mean' if mean else 'sum'}",
            lambda bias=bias, mean=mean: Sequential(mlp(5, 4, 3, bias=bias), Pool(mean)),
            normal(7, 11, 5),
        )
        for bias in (True, False)
        for mean in (True, False)
    ),
    Case("embedding", lambda: Sequential(Embedding(5, 4), Linear(4, 3), Pool()), tokens(7, 11)),
    Case(
        "embedding-padded",
        lambda: Sequential(Embedding(5, 4, padding_idx=2), Linear(4, 3), Pool()),
        tokens(7, 11),
        layers=("0",),
    ),
    Case("called-twice", lambda: tied(add, same_module=True), normal(7, 8)),
    Case("tied", lambda: tied(add, same_module=False), normal(7, 8)),
)

MIXED_BEFORE_POOL = [
    Case(
        "pool-in-the-middle",
        lambda: Sequential(Linear(5, 4), Linear(4, 3), Pool(), Linear(3, 2)),
        normal(7, 11, 5),
        layers=("0", "1"),
    )
]
MIXED_AFTER_POOL = [Case(**{**case.__dict__, "layers": ("3",)}) for case in MIXED_BEFORE_POOL]

# ---- convolutions: every geometry -------------------------------------------------------------

GEOMETRIES: dict[str, tuple[Callable[[], Module], tuple[int, ...]]] = {
    "1d": (lambda: Conv1d(2, 3, 3), (2, 11)),
    "1d-stride-dilation": (lambda: Conv1d(2, 3, 3, stride=2, dilation=3, padding=1), (2, 13)),
    "1d-circular": (lambda: Conv1d(2, 3, 4, padding="same", padding_mode="circular"), (2, 11)),
    "1d-reflect": (lambda: Conv1d(2, 3, 3, padding=2, padding_mode="reflect"), (2, 11)),
    "2d": (lambda: Conv2d(2, 3, (3, 2)), (2, 5, 7)),
    "2d-no-bias": (lambda: Conv2d(2, 3, 3, bias=False), (2, 5, 7)),
    "2d-stride": (lambda: Conv2d(2, 3, 3, stride=(2, 3), padding=(1, 2)), (2, 7, 8)),
    "2d-dilation": (lambda: Conv2d(2, 3, (2, 3), dilation=(3, 2)), (2, 7, 8)),
    "2d-same": (lambda: Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 2)), (2, 5, 7)),
    "2d-valid": (lambda: Conv2d(2, 3, 2, padding="valid"), (2, 5, 4)),
    "2d-circular": (lambda: Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 7)),
    "2d-reflect": (
        lambda: Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect", stride=2),
        (2, 5, 7),
    ),
    "2d-replicate": (
        lambda: Conv2d(2, 3, 3, padding="same", padding_mode="replicate", dilation=2),
        (2, 5, 7),
    ),
    "2d-groups": (lambda: Conv2d(4, 6, (2, 3), groups=2, padding=1), (4, 5, 3)),
    "2d-depthwise": (lambda: Conv2d(3, 6, 2, groups=3, bias=False), (3, 5, 4)),
    "3d": (lambda: Conv3d(2, 3, (2, 1, 3), stride=(1, 2, 1)), (2, 3, 4, 5)),
    "3d-replicate": (
        lambda: Conv3d(2, 3, 2, padding=1, padding_mode="replicate", dilation=2),
        (2, 3, 4, 3),
    ),
    "3d-groups-circular": (
        lambda: Conv3d(4, 2, 2, groups=2, padding="same", padding_mode="circular"),
        (4, 2, 3, 2),
    ),
    "1d-transposed": (lambda: ConvTranspose1d(2, 3, 3, stride=2, padding=1), (2, 5)),
    "1d-transposed-cut": (
        lambda: ConvTranspose1d(2, 3, 2, stride=3, padding=2, output_padding=2),
        (2, 4),
    ),
    "2d-transposed": (
        lambda: ConvTranspose2d(2, 3, (3, 2), (2, 3), (1, 0), (1, 2), dilation=(1, 2)),
        (2, 3, 4),
    ),
    "2d-transposed-groups": (
        lambda: ConvTranspose2d(4, 6, 3, groups=2, stride=2, bias=False),
        (4, 3, 2),
    ),
    "3d-transposed": (lambda: ConvTranspose3d(2, 3, (2, 1, 3), stride=(1, 2, 1)), (2, 2, 3, 2)),
}

CONV_PER_LOCATION = with_reductions(
    *(Case(f"conv-{name}", make, normal(5, *shape)) for name, (make, shape) in GEOMETRIES.items()),
    Case(
        "last-of-two",
        lambda: Sequential(Conv2d(2, 3, 3), Tanh(), Conv2d(3, 4, 2)),
        normal(5, 2, 7, 6),
        layers=("2",),
    ),
)

CONV_GLOBAL_POOL = with_reductions(
    *(
        Case(
            f"conv-{name}-pool",
            lambda make=make: Sequential(make(), GlobalPool()),
            normal(5, *shape),
        )
        for name, (make, shape) in GEOMETRIES.items()
    ),
    Case(
        "pointwise-above",
        lambda: Sequential(Conv2d(2, 3, 3, stride=2), Conv2d(3, 4, 1), GlobalPool(), Linear(4, 3)),
        normal(5, 2, 7, 6),
    ),
    Case(
        "circular-above",
        lambda: Sequential(
            Conv2d(2, 3, 3),
            Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
            GlobalPool(),
            Linear(4, 3),
        ),
        normal(5, 2, 7, 6),
    ),
)

# ---- any loss, any nonlinearity ---------------------------------------------------------------

ANY_LOSS = (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss)
ANY_NET: dict[str, tuple[Callable[[], Module], tuple[int, ...]]] = {
    "tanh": (lambda: mlp(5, 4, 3, activation=Tanh), (5,)),
    "relu-in-place": (
        lambda: mlp(5, 7, 4, 3, bias=False, activation=lambda: ReLU(inplace=True)),
        (5,),
    ),
    "conv-one-patch": (
        lambda: Sequential(Conv2d(2, 4, (3, 5)), Sigmoid(), Flatten(), Linear(4, 3)),
        (2, 3, 5),
    ),
}

ONE_DATUM = [
    Case(name, make, normal(1, *shape), loss, reduction)
    for name, (make, shape) in ANY_NET.items()
    for loss in ANY_LOSS
    for reduction in REDUCTIONS
]

SEVERAL_DATA = [
    Case(**{**case.__dict__, "X": normal(7, *ANY_NET[case.name][1])}) for case in ONE_DATUM
]

LAST_LAYER_MSE = [
    Case(**{**case.__dict__, "layers": ("2" if name != "conv-one-patch" else "3",)})
    for case in SEVERAL_DATA
    if case.loss is MSELoss and (name := case.name) != "relu-in-place"
]


class ConstantHessian(Module):
    """A network whose inputs are moved only where its first layer does not look."""

    def __init__(self, activation: Module, bias: bool):
        super().__init__()
        self.net = Sequential(
            Linear(5, 3, bias=bias), activation, Linear(3, 4), Tanh(), Linear(4, 2)
        )
        self.register_buffer("start", torch.randn(5, dtype=torch.float64))

    def forward(self, c):
        W = self.net[0].weight.detach()
        null = torch.linalg.svd(W, full_matrices=True)[2][len(W) :]  # [2, 5]
        return self.net(self.start + c @ null)


CONSTANT_HESSIAN = [
    Case(
        f"{activation.__name__}{'-bias' if bias else ''}",
        lambda activation=activation, bias=bias: ConstantHessian(activation(), bias),
        normal(7, 2),
        loss,
        reduction,
        y=lambda f, loss=loss: targets(loss, f)[:1].repeat_interleave(len(f), 0),
    )
    for activation in (Tanh, Sigmoid)
    for bias in (True, False)
    for loss in ANY_LOSS
    for reduction in REDUCTIONS
]

# ---- where KFAC is not exact ------------------------------------------------------------------

DEEP_LINEAR_CROSS_ENTROPY = with_reductions(
    Case("linear", lambda: mlp(5, 4, 3), normal(7, 5), CrossEntropyLoss)
)
NONLINEAR = [case for case in SEVERAL_DATA if case.name == "tanh"]
SHARED_CROSS_ENTROPY_ONE_DATUM = with_reductions(
    Case("sequence", lambda: Transposed(mlp(5, 4, 3)), normal(1, 11, 5), CrossEntropyLoss)
)
ZERO_PADDED_ABOVE = with_reductions(
    Case(
        "zero-padded-above",
        lambda: Sequential(Conv2d(2, 3, 3), Conv2d(3, 4, 3, padding=1), GlobalPool()),
        normal(5, 2, 7, 6),
        layers=("0",),
    )
)


def one_position(io: LayerIO) -> LayerIO:
    """The first position of a layer alone."""
    return LayerIO(io.a[:, :1], io.g[:, :, :1])
