"""Runs that one process and several processes take, with the same data."""

import itertools
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kfac_scratch import (
    KFAC,
    REDUCE,
    AmortisedEKFAC,
    Brand,
    Window,
    distribute,
    ekfac,
    ekfac_reduce,
    factored_inverse,
    foof,
    graft,
    kfac_reduce,
    kl_clip,
    kpsvd,
    levenberg_marquardt,
    norm_constraint,
    quadratic_model,
    tkfac,
    type2,
)
from kfac_scratch.approximations.estimators import MovingAverage

STEPS, BATCH = 10, 24
SHARDS = {
    2: {"equal": [12, 12], "unequal": [5, 19]},
    4: {"equal": [6, 6, 6, 6], "unequal": [3, 9, 4, 8]},
}
PERIODS = {"factor_every": 2, "inverse_every": 3}


class Words(nn.Module):
    """An embedding, a layer along the positions, and a head: words of which some are padding."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 5), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, X):
        return self.head(torch.tanh(self.inner(self.words(X)))).flatten(0, 1)


def dense():
    widths = [6, 8, 7, 7, 4]
    layers = [m for pair in itertools.pairwise(widths) for m in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def convolutional():
    """Two groups, and a norm that the rest trains."""
    return nn.Sequential(
        *(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.LayerNorm([4, 4, 4])),
        *(nn.Conv2d(4, 3, 2), nn.Flatten(), nn.Linear(27, 4)),
    )


NETS = {"dense": dense, "convolutional": convolutional, "words": Words}


@dataclass(frozen=True)
class Case:
    """A model, data, a loss, and how the optimizer is built."""

    net: str = "dense"
    targets: str = "ignored"
    reduction: str = "mean"
    options: dict = field(default_factory=dict)

    def model(self):
        torch.manual_seed(0)
        return NETS[self.net]().double()

    def loss(self):
        kind = nn.MSELoss if self.targets == "real" else nn.CrossEntropyLoss
        return kind(reduction=self.reduction)

    def batches(self):
        generator = torch.Generator().manual_seed(1)
        new = partial(torch.randn, generator=generator, dtype=torch.float64)
        for _ in range(STEPS):
            if self.net == "words":
                X = torch.randint(9, (BATCH, 3), generator=generator)
            else:
                X = new(BATCH, 2, 6, 6) if self.net == "convolutional" else new(BATCH, 6)
            if self.targets == "real":
                yield X, new(BATCH, 4)
                continue
            count = (BATCH, 3) if self.net == "words" else (BATCH,)
            y = torch.randint(4, count, generator=generator)
            if self.targets == "ignored":
                y.view(-1)[torch.randperm(y.numel(), generator=generator)[:9]] = -100
            yield X, y

    def optimizer(self, model, **more):
        options = {"lr": 0.1, "damping": 1e-2, "fisher": type2, "controls": [kl_clip(1e-2)]}
        if self.reduction == "sum":
            options["damping"] = 0.3
        return KFAC(model, self.loss(), **{**options, **PERIODS, **self.options, **more})


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def shard(sizes, rank):
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def train(case, model, optimizer, part=slice(None), forward=None, loss=None, steps=STEPS):
    """Ten steps on a part of every batch."""
    forward, loss = forward or model, loss or case.loss()
    for X, y in itertools.islice(case.batches(), steps):
        X, y = X[part], y[part]
        if case.net == "words":
            y = y.flatten()
        optimizer.zero_grad()
        loss(forward(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
    return flat(model)


def alone(case, steps=STEPS):
    """The parameters after the steps of one process."""
    model = case.model()
    return train(case, model, case.optimizer(model), steps=steps)


LOSSES = {
    f"{targets}-{reduction}": Case(targets=targets, reduction=reduction)
    for targets in ("real", "labels", "ignored")
    for reduction in ("mean", "sum")
}
METHODS = {
    "ekfac": Case(options={"approximation": ekfac}),
    "ekfac_reduce": Case(options={"approximation": ekfac_reduce}),
    "amortised": Case(options={"approximation": AmortisedEKFAC(2), "factor_every": 1}),
    "amortised-reduce": Case(
        "words",
        options={"approximation": AmortisedEKFAC(2, MovingAverage(kfac_reduce)), "factor_every": 1},
    ),
    "tkfac": Case(options={"approximation": tkfac}),
    "foof": Case(options={"approximation": foof}),
    "kpsvd": Case(options={"approximation": kpsvd}),
    "window": Case(options={"approximation": Window(2), "factor_every": 1}),
    "brand": Case(options={"approximation": Brand(6)}),
    "factored": Case(options={"invert": factored_inverse}),
    "graft": Case(options={"controls": [graft()], "lr": 0.02}),
    "graft of the network": Case(options={"controls": [graft(per="network")], "lr": 0.02}),
    "norm_constraint": Case(options={"controls": [norm_constraint(0.05)]}),
    "quadratic_model": Case(options={"controls": [quadratic_model()]}),
    "levenberg_marquardt": Case(options={"adapt_damping": levenberg_marquardt, "adapt_every": 2}),
    "convolutional-expand": Case("convolutional", "labels"),
    "convolutional-reduce": Case("convolutional", "labels", options={"flavour": REDUCE}),
    "words": Case("words"),
    "words-foof": Case("words", options={"approximation": foof}),
    "words-sum": Case("words", reduction="sum"),
}


def together(case, rank, size, shards, workers, ddp=False, **options):
    """The parameters after the steps of several processes, and what they know of them."""
    model = case.model()
    wrapped = DistributedDataParallel(model) if ddp else model
    optimizer = case.optimizer(wrapped)
    placed = distribute(optimizer, workers, timeout=30, **options)
    part = shard(SHARDS[size][shards], rank)
    loss = placed.joint_loss if ddp else None
    theta = train(case, model, optimizer, part, wrapped, loss)
    return theta, dict(placed.ranks.sent), placed.owners
