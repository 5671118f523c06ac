"""The networks that are timed, full and tiny."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A transformer block built of linear layers."""

    causal = False  # if True, no position sees those after it

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class MeanOverPositions(nn.Module):
    def forward(self, x):
        return x.mean(1)


def mlp(N: int = 128, d_in: int = 784, width: int = 512, C: int = 10):
    layers = [nn.Linear(d_in, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, C)), torch.randn(N, d_in)


def cnn(N: int = 64, pixels: int = 32, channels: int = 16, C: int = 10):
    first = [nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    last = nn.Linear(2 * channels * (pixels // 4) ** 2, C)
    return nn.Sequential(*first, *second, nn.Flatten(), last), torch.randn(N, 3, pixels, pixels)


def transformer(N: int = 16, S: int = 64, width: int = 128, C: int = 10):
    blocks = [Block(width), Block(width)]
    model = nn.Sequential(*blocks, MeanOverPositions(), nn.Linear(width, C))
    return model, torch.randn(N, S, width)


FULL = {"mlp": mlp, "cnn": cnn, "transformer": transformer}
TINY = {
    "mlp": partial(mlp, 16, 6, 5, 3),
    "cnn": partial(cnn, 16, 8, 2, 3),
    "transformer": partial(transformer, 16, 3, 8, 3),
}
NetsOfASize = dict[str, Callable[[], tuple[nn.Module, Tensor]]]


@dataclass(frozen=True)
class Row:
    """What is computed."""

    net: str
    fisher: str
    flavour: str

    def __str__(self) -> str:
        return f"{self.net} {self.fisher} {self.flavour}"


@dataclass(frozen=True, eq=False)
class Problem:
    """A network, a classification loss, and a batch."""

    model: nn.Module
    loss: nn.Module
    X: Tensor
    y: Tensor

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose factors are computed."""
        layers = self.model.named_modules()
        return [name for name, m in layers if isinstance(m, nn.Linear | nn.Conv2d)]

    @property
    def classes(self) -> int:
        return [m for m in self.model.modules() if isinstance(m, nn.Linear)][-1].out_features


def problem_of(nets: NetsOfASize, net: str, device: torch.device) -> Problem:
    """A network with random parameters and data, the same every time."""
    torch.manual_seed(0)
    model, X = nets[net]()
    of = Problem(model.to(device), nn.CrossEntropyLoss(), X.to(device), X)
    y = torch.randint(of.classes, (len(X),)).to(device)
    return Problem(of.model, of.loss, of.X, y)
