"""Networks along sequences, and positions."""

import torch
from torch import nn
from torch.nn import (
    Embedding,
    Linear,
)

from tests.capture.models.case import (
    OF_NO_LAYER,
    SHARED_BY_ALL,
    C,
    Case,
    D,
    Made,
    S,
    all_positions,
    parameter,
    sequences,
)


def recurrent(m, x):
    h = torch.zeros_like(x[:, 0])
    for s in range(x.shape[1]):
        h = (m.inward(x[:, s]) + m.again(h)).tanh()
    return m.head(h)


def recurrent_over_time(m, x):
    """One call for the inputs of all positions, which come first; the rest goes through them."""
    h = torch.zeros_like(x[:, 0])
    for entering in m.inward(x.transpose(0, 1)):
        h = (entering + m.again(h)).tanh()
    return m.head(h)


def by_a_cell(m, x):
    h = torch.zeros_like(x[:, 0, :2])
    for s in range(x.shape[1]):
        h = m.cell(m.inward(x[:, s]), h)
    return m.head(h)


def gated(m, x):
    """An LSTM by hand: four gates from two linear layers."""
    h = c = torch.zeros_like(x[:, 0])
    for s in range(x.shape[1]):
        i, f, g, o = (m.inward(x[:, s]) + m.again(h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return m.head(h)


def by_a_kernel(m, x):
    h, _ = m.rnn(m.inward(x))
    return m.head(h[:, -1])


SEQUENCES = {
    "recurrent": Case(
        lambda: Made(recurrent, inward=Linear(D, D), again=Linear(D, D), head=Linear(D, C)),
        sequences,
    ),
    "recurrent, positions first": Case(
        lambda: Made(
            recurrent_over_time, inward=Linear(D, D), again=Linear(D, D), head=Linear(D, C)
        ),
        sequences,
    ),
    "LSTM by hand": Case(
        lambda: Made(gated, inward=Linear(D, 4 * D), again=Linear(D, 4 * D), head=Linear(D, C)),
        sequences,
    ),
    "RNN": Case(
        lambda: Made(
            by_a_kernel,
            inward=Linear(D, 2),
            rnn=nn.RNN(2, 2, batch_first=True),
            head=Linear(2, C),
        ),
        sequences,
        {f"rnn.{p}_{of}_l0": "in a kernel" for p in ("weight", "bias") for of in ("ih", "hh")},
    ),
    "LSTM": Case(
        lambda: Made(
            by_a_kernel,
            inward=Linear(D, 2),
            rnn=nn.LSTM(2, 2, batch_first=True),
            head=Linear(2, C),
        ),
        sequences,
        {f"rnn.{p}_{of}_l0": "in a kernel" for p in ("weight", "bias") for of in ("ih", "hh")},
    ),
    "a recurrent cell": Case(
        lambda: Made(by_a_cell, inward=Linear(D, 2), cell=nn.RNNCell(2, 2), head=Linear(2, C)),
        sequences,
        {f"cell.{p}_{of}": "in a kernel" for p in ("weight", "bias") for of in ("ih", "hh")},
    ),
    "a layer at two lengths": Case(
        lambda: Made(
            lambda m, x: m.head(m.a(x).tanh().mean(1) + m.a(x[:, :2]).sin().mean(1)),
            a=Linear(D, D),
            head=Linear(D, C),
        ),
        sequences,
    ),
    "as many samples as positions, positions first": Case(
        lambda: Made(
            lambda m, x: m.head(m.a(x.transpose(0, 1)).tanh().mean(0)),
            a=Linear(D, D),
            head=Linear(D, C),
        ),
        lambda: torch.randn(S, S, D),
    ),
    "a table of positions": Case(
        lambda: Made(
            lambda m, x: m.head((m.a(x) + m.table).tanh().mean(1)),
            table=parameter(S, D),
            a=Linear(D, D),
            head=Linear(D, C),
        ),
        sequences,
        {"table": OF_NO_LAYER},
    ),
    "a part of a table of positions": Case(
        lambda: Made(
            lambda m, x: m.head((m.a(x) + m.table[: x.shape[1]]).tanh().mean(1)),
            table=parameter(S + 2, D),
            a=Linear(D, D),
            head=Linear(D, C),
        ),
        sequences,
        {"table": OF_NO_LAYER},
    ),
    "an embedding of positions for all samples": Case(
        lambda: Made(
            lambda m, x: m.head((m.a(x) + m.places(all_positions(x))).tanh().mean(1)),
            places=Embedding(S, D),
            a=Linear(D, D),
            head=Linear(D, C),
        ),
        sequences,
        {"places.weight": SHARED_BY_ALL},
        r"'places' \(Embedding\) has an output of the same shape.*layers=\[\.\.\.\]",
        ["places"],
    ),
}
