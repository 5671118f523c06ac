"""The tasks of `benchmarks.training`: small networks on data that packages bring with them.

T1 to T4 learn scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, split once into 1400
for training and 397 for validation. T5 learns to write the manual of Python's own help system,
`pydoc_data.topics`, character by character; its text depends on the version of Python. The others
are made for one question each: layers wider than the batch, a second deep autoencoder, a deep
chain of layers, and one network at several batch sizes. All models are built of linear layers,
convolutions and embeddings, and every layer's input has the batch on axis 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from benchmarks.nets import Block

TRAINING = 1400  # of 1797 images
LABELS, NEIGHBOURS = 200, 10  # of the graph network
WINDOW = 64  # characters that the language model sees at once


@dataclass(frozen=True, eq=False)
class Task:
    """A model, data, and the result that counts as success."""

    model: Callable[[], nn.Module]
    loss: nn.Module
    X: Tensor
    y: Tensor
    X_test: Tensor  # what the metric is measured on
    y_test: Tensor
    metric: Callable[[Tensor, Tensor], float]
    target: float
    sign: int  # 1 if the metric should be above the target, -1 if below
    batch: int
    budget: int  # steps
    every: int  # steps between two evaluations
    trials: int  # settings to try for each method
    seeds: int  # to compare the best of them on
    finals: int = 9  # fresh seeds of the results

    def measured(self, model: nn.Module) -> float:
        with torch.no_grad():
            return self.metric(model(self.X_test), self.y_test)

    def reached(self, value: float) -> bool:
        return self.sign * value >= self.sign * self.target

    def best(self, values: list[float]) -> float:
        """The best of finite values, and infinitely bad if there is none."""
        finite = [value for value in values if math.isfinite(value)]
        return max(finite, key=lambda v: self.sign * v, default=-self.sign * math.inf)


class VisionTransformer(nn.Module):
    """Tokens are patches of 2 x 2 pixels; the class is read off the mean token."""

    def __init__(self, width: int = 64, depth: int = 2):
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.position = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):  # [N, 1, 8, 8]
        patches = nn.functional.unfold(x, 2, stride=2).transpose(1, 2)  # [N, 16, 4]
        h = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(h).mean(1))


class GraphNetwork(nn.Module):
    """Two graph convolutions on an image and its neighbours, a mean, and a classifier.

    Input: every node's pixels, followed by its row of the normalised adjacency matrix.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        self.first, self.second = nn.Linear(64, width), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x):  # [N, nodes, 64 + nodes]
        pixels, adjacency = x[..., :64], x[..., 64:]
        h = torch.relu(self.first(adjacency @ pixels))
        h = torch.relu(self.second(adjacency @ h))
        return self.head(h.mean(1))


class CausalBlock(Block):
    """A transformer block in which a position sees itself and those before it."""

    causal = True


class CharacterTransformer(nn.Module):
    """The next character after every prefix of a window; classes are on axis 1."""

    def __init__(self, characters: int, width: int = 128, depth: int = 2):
        super().__init__()
        self.embed = nn.Embedding(characters, width)
        self.position = nn.Parameter(0.02 * torch.randn(WINDOW, width))
        self.blocks = nn.Sequential(*(CausalBlock(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x):  # [N, WINDOW]
        h = self.blocks(self.embed(x) + self.position)
        return self.head(self.norm(h)).transpose(1, 2)


def perceptron(widths: tuple[int, ...], activation: Callable[[], nn.Module]) -> nn.Module:
    """Fully connected layers with an activation between them."""
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


def chain() -> nn.Module:
    """16 layers, with the scale of weights that keeps signals alive so deep (Glorot)."""
    model = perceptron((64, *[32] * 15, 10), nn.Tanh)
    for layer in model[::2]:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def autoencoder() -> nn.Module:
    return perceptron((64, 100, 50, 10, 50, 100, 64), nn.Tanh)


def convolutional() -> nn.Module:
    first = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU()]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 10))


def accuracy(f: Tensor, y: Tensor) -> float:
    return float((f.argmax(1) == y).float().mean())


def squared_error(f: Tensor, y: Tensor) -> float:
    """Summed over pixels, averaged over images."""
    return float((f - y).square().sum(1).mean())


def cross_entropy(f: Tensor, y: Tensor) -> float:
    """In nats for each character."""
    return float(nn.functional.cross_entropy(f, y))


@cache
def manual() -> tuple[Tensor, int]:
    """The text of Python's help topics as numbers of characters, and how many characters it has."""
    text = "\n".join(topics[name] for name in sorted(topics))
    characters = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([characters[character] for character in text]), len(characters)


@cache
def digits() -> tuple[Tensor, Tensor]:
    """All images in [0, 1] and their labels, shuffled once."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return images[order].unsqueeze(1), torch.tensor(data.target)[order]


def neighbourhoods(images: Tensor) -> Tensor:
    """Each image and its nearest neighbours as a graph: pixels and normalised adjacency.

    Two nodes are connected if one of them is among the other's nearest neighbours. Adjacency
    matrices have self-loops and are normalised as `D^-1/2 (A + I) D^-1/2`.
    """
    flat = images.flatten(1)
    nearest = torch.cdist(flat, flat).topk(NEIGHBOURS + 1, largest=False).indices  # itself first
    linked = torch.zeros(len(flat), len(flat)).scatter_(1, nearest, 1.0)
    linked = torch.maximum(linked, linked.T)
    A = linked[nearest[:, :, None], nearest[:, None, :]]  # [N, nodes, nodes]
    root = A.sum(-1).rsqrt()
    return torch.cat([flat[nearest], root[:, :, None] * A * root[:, None, :]], dim=-1)


@cache
def curves(count: int, side: int = 16) -> Tensor:
    """Drawn curves in the manner of the data set CURVES, whose file cannot be had any more.

    Every image is one cubic Bézier curve between four random points, in ink that fades with the
    squared distance. Source of the idea: Hinton and Salakhutdinov 2006.
    """
    generator = torch.Generator().manual_seed(0)
    points = side * (0.1 + 0.8 * torch.rand(count, 4, 2, generator=generator))
    t = torch.linspace(0, 1, 4 * side)[:, None]
    weights = torch.cat([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
    on_curve = weights @ points  # [count, times, 2]
    middle = torch.arange(side) + 0.5
    pixels = torch.cartesian_prod(middle, middle)
    return torch.stack([(-torch.cdist(pixels, c).amin(1).square()).exp() for c in on_curve])


def split(X: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"X": X[:TRAINING], "y": y[:TRAINING], "X_test": X[TRAINING:], "y_test": y[TRAINING:]}


def transformer_task() -> Task:
    options = {
        "target": 0.95,
        "batch": 64,
        "budget": 600,
        "every": 5,
        "trials": 20,
        "seeds": 5,
        "finals": 5,
    }
    data = split(*digits())
    return Task(
        VisionTransformer, nn.CrossEntropyLoss(), **data, metric=accuracy, sign=1, **options
    )


def graph_task() -> Task:
    options = {"target": 0.96, "batch": 100, "budget": 100, "every": 2, "trials": 48, "seeds": 5}
    images, y = digits()
    data = split(neighbourhoods(images), y)
    data |= {"X": data["X"][:LABELS], "y": data["y"][:LABELS]}
    return Task(GraphNetwork, nn.CrossEntropyLoss(), **data, metric=accuracy, sign=1, **options)


def autoencoder_task() -> Task:
    options = {
        "target": 0.40,
        "batch": 700,
        "budget": 2000,
        "every": 10,
        "trials": 20,
        "seeds": 3,
        "finals": 5,
    }
    X = digits()[0][:TRAINING].flatten(1)
    return Task(autoencoder, nn.MSELoss(), X, X, X, X, metric=squared_error, sign=-1, **options)


def convolutional_task() -> Task:
    options = {"target": 0.98, "batch": 128, "budget": 150, "every": 5, "trials": 32, "seeds": 5}
    data = split(*digits())
    return Task(convolutional, nn.CrossEntropyLoss(), **data, metric=accuracy, sign=1, **options)


def character_task() -> Task:
    options = {
        "target": 2.2,  # AdamW reaches it within the budget, in about a minute
        "batch": 32,
        "budget": 600,
        "every": 10,
        "trials": 10,
        "seeds": 3,
        "finals": 5,
    }
    text, characters = manual()
    windows = text[: len(text) // (WINDOW + 1) * (WINDOW + 1)].unflatten(0, (-1, WINDOW + 1))
    held_out = len(windows) // 10  # the end of the text
    X, y = windows[:-held_out, :-1], windows[:-held_out, 1:]
    test = windows[-held_out :: held_out // 64][:65]  # the length of the manual differs by version
    data = {"X": X, "y": y, "X_test": test[:, :-1], "y_test": test[:, 1:]}
    model = partial(CharacterTransformer, characters)
    return Task(model, nn.CrossEntropyLoss(), **data, metric=cross_entropy, sign=-1, **options)


def wide_task() -> Task:
    """Layers much wider than the batch, for which updates of low rank are made.

    The target was lowered from .97 after a search in which KFAC and SGD had no hit, and before any
    final run.
    """
    options = {"target": 0.95, "batch": 64, "budget": 100, "every": 5, "trials": 20, "seeds": 3}
    images, y = digits()
    data = split(images.flatten(1), y)
    model = partial(perceptron, (64, 1024, 1024, 10), nn.ReLU)
    return Task(model, nn.CrossEntropyLoss(), **data, metric=accuracy, sign=1, **options)


def curves_task() -> Task:
    """The second of the three autoencoders of KFAC's papers, with smaller images and layers."""
    options = {"target": 4.2, "batch": 500, "budget": 1000, "every": 10, "trials": 16, "seeds": 3}
    X = curves(2000)
    model = partial(perceptron, (256, 100, 50, 25, 6, 25, 50, 100, 256), nn.Tanh)
    return Task(model, nn.MSELoss(), X, X, X, X, metric=squared_error, sign=-1, **options)


def deep_task() -> Task:
    """A chain of 16 layers, in which all are coupled."""
    options = {"target": 0.95, "batch": 200, "budget": 300, "every": 5, "trials": 20, "seeds": 3}
    images, y = digits()
    data = split(images.flatten(1), y)
    return Task(chain, nn.CrossEntropyLoss(), **data, metric=accuracy, sign=1, **options)


def batch_task(batch: int) -> Task:
    """The convolutional network with another batch size."""
    options = {"batch": batch, "budget": 300, "trials": 12, "seeds": 3}
    return replace(convolutional_task(), **options)


BATCHES = (32, 64, 128, 256, 512)
TASKS: dict[str, Callable[[], Task]] = {
    "T1": transformer_task,
    "T2": graph_task,
    "T3": autoencoder_task,
    "T4": convolutional_task,
    "T5": character_task,
    "wide": wide_task,
    "curves": curves_task,
    "deep": deep_task,
    **{f"batch-{batch}": partial(batch_task, batch) for batch in BATCHES},
}
MAIN = ("T1", "T2", "T3", "T4", "T5")
