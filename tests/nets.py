"""Small networks of every kind, and one batch of data for each, to compare matrices on.

The sizes N, S, C, d_in and d_out that meet in one layer have no common factor where the
architecture allows it, so that a wrong scale shows which of them is to blame.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

N, C = 5, 3
LOSSES = (nn.MSELoss, nn.CrossEntropyLoss, nn.BCEWithLogitsLoss)
REDUCTIONS = ("mean", "sum")


class Apply(nn.Module):
    """A function as a layer without parameters."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class Attention(nn.Module):
    """One head of self-attention, built of linear layers."""

    def __init__(self, d_in: int, d: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d_in, d) for _ in range(3))
        self.attend = attend

    def forward(self, x):
        return self.attend(self.q(x), self.k(x), self.v(x))


class Unused(nn.Sequential):
    """A network with a layer that it never calls."""

    def __init__(self, *layers: nn.Module):
        super().__init__(*layers)
        self.add_module("unused", nn.Linear(2, 3))

    def forward(self, x):
        for layer in list(self)[:-1]:
            x = layer(x)
        return x


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def mlp():
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, C))


def mlp_without_bias():
    return nn.Sequential(nn.Linear(4, 7, bias=False), nn.ReLU(), nn.Linear(7, C, bias=False))


def mlp_in_place():
    layers = [nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 2), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(2, C))


def batch_norm_in_eval_mode():
    model = nn.Sequential(nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, C))
    model[1].running_mean.normal_()
    return model.eval()


def layer_norm():
    return nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.GELU(), nn.Linear(7, C))


def residual():
    block = Residual(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4))
    return nn.Sequential(block, nn.Linear(4, C))


def tied_calls():
    layer = nn.Linear(7, 7)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(7, C))


def tied_weights():
    """Two layers with one weight and two biases."""
    first, second = nn.Linear(7, 7), nn.Linear(7, 7)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(7, C))


def tied_to_embedding():
    """The decoder is the embedding transposed: no single W describes both."""
    embedding, decoder = nn.Embedding(C, 4), nn.Linear(4, C)
    decoder.weight = embedding.weight
    return nn.Sequential(embedding, nn.Tanh(), decoder)


def conv2d():
    conv = nn.Conv2d(2, 11, 2, stride=2, padding=1, dilation=3)
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(conv, nn.ReLU(inplace=True), pool, nn.Flatten(), nn.Linear(11, C))


def two_convolutions():
    first = [nn.Conv2d(1, 11, 2, bias=False), nn.Sigmoid(), nn.AvgPool2d(3)]
    second = [nn.Conv2d(11, 7, 1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(7, C))


def circular_conv2d():
    conv = nn.Conv2d(1, 11, (2, 2), padding=(1, 0), padding_mode="circular")
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(11, C))


def conv1d():
    conv = nn.Conv1d(2, 7, 2, padding="same")
    return nn.Sequential(conv, nn.Tanh(), Apply(lambda x: x.mean(2)), nn.Linear(7, C))


def conv3d():
    conv = nn.Conv3d(1, 11, 2, stride=(1, 2, 1))
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(11, C))


def grouped_conv2d():
    conv = nn.Conv2d(4, 14, (1, 2), groups=2)
    return nn.Sequential(conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(14, C))


def fused_attention():
    attention = Attention(4, 7, scaled_dot_product_attention)
    return nn.Sequential(attention, Apply(lambda x: x.mean(1)), nn.Linear(7, C))


def attention():
    return nn.Sequential(Attention(4, 7, softmax_attention), nn.Linear(7, C))


def tokens():
    """Linear layers along a sequence with nothing that mixes its positions."""
    return nn.Sequential(nn.Linear(4, 11), nn.Tanh(), nn.Linear(11, C))


def embedding():
    """Tokens that see the mean of the tokens before them."""
    mix = Apply(lambda x: x.cumsum(1) / 2)
    return nn.Sequential(nn.Embedding(11, 4), mix, nn.Tanh(), nn.Linear(4, C))


@dataclass(frozen=True)
class Net:
    """A network, the shape of one datum, and how many vocabulary entries it has if it is words."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    vocabulary: int | None = None
    per_token: bool = False

    def __str__(self) -> str:
        return self.build.__name__


NETS = [
    Net(mlp, (4,)),
    Net(mlp_without_bias, (4,)),
    Net(mlp_in_place, (4,)),
    Net(batch_norm_in_eval_mode, (4,)),
    Net(layer_norm, (4,)),
    Net(residual, (4,)),
    Net(tied_calls, (7,)),
    Net(tied_weights, (7,)),
    Net(tied_to_embedding, (2,), C, per_token=True),
    Net(conv2d, (2, 14, 15)),
    Net(two_convolutions, (1, 8, 8)),
    Net(circular_conv2d, (1, 6, 8)),
    Net(conv1d, (2, 11)),
    Net(conv3d, (1, 8, 3, 8)),
    Net(grouped_conv2d, (4, 11, 2)),
    Net(fused_attention, (11, 4)),
    Net(attention, (11, 4), per_token=True),
    Net(tokens, (7, 4), per_token=True),
    Net(embedding, (7,), 11, per_token=True),
]
BY_NAME = {str(net): net for net in NETS}


class ClassesFirst(nn.Sequential):
    """Move the classes to axis 1, where cross-entropy wants them."""

    def forward(self, x):
        return super().forward(x).movedim(-1, 1)


def problem(net: Net | str, loss: type = nn.MSELoss, reduction: str = "mean", **to):
    """A network with random weights, a loss, inputs and targets; `to` is a device or a dtype."""
    net = BY_NAME[net] if isinstance(net, str) else net
    model, loss = net.build(), loss(reduction=reduction)
    if net.per_token and isinstance(loss, nn.CrossEntropyLoss):
        model = ClassesFirst(*model)
    if net.vocabulary:
        X = torch.randint(net.vocabulary, (N, *net.shape))
    else:
        X = torch.randn(N, *net.shape)
    f = model(X).detach()
    model, f = model.to(**to), f.to(**to)
    return model, loss, X.to(f.device if net.vocabulary else f), targets(loss, f)


def targets(loss: nn.Module, f: Tensor) -> Tensor:
    """Random targets for outputs f; every class occurs."""
    match loss:
        case nn.CrossEntropyLoss():
            y = torch.randperm(f[:, 0].numel()) % f.shape[1]
            return y.reshape(f[:, 0].shape).to(f.device)
        case nn.BCEWithLogitsLoss():
            return torch.randint(2, f.shape, device=f.device).to(f)
        case _:
            return torch.randn_like(f)
