"""Weights in functions, several inputs, and wrappers."""

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import (
    Embedding,
    Linear,
    Module,
    ModuleList,
    Sequential,
    Tanh,
    functional,
)
from torch.utils.checkpoint import checkpoint

from tests.capture.models.case import (
    OF_NO_LAYER,
    WORDS,
    C,
    Case,
    D,
    Made,
    N,
    S,
    masked_words,
    parameter,
    sequences,
    softmax_attention,
    vectors,
    words,
)


def two(forward, **others):
    return Made(forward, a=Linear(D, D), head=Linear(D, C), **others)


def experts(m, x):
    """A mixture of all experts."""
    weights = m.gate(x).softmax(-1)
    return m.head(sum(w.unsqueeze(-1) * e(x) for w, e in zip(weights.unbind(-1), m.e, strict=True)))


def experts_by_bmm(m, x):
    y = torch.bmm(x.expand(2, -1, -1), m.e).movedim(0, 1)
    return m.head((m.gate(x).softmax(-1).unsqueeze(-1) * y).sum(1))


def routed(m, x):
    """Every expert sees only the samples that are sent to it."""
    chosen = m.gate(x).argmax(-1)
    y = torch.zeros_like(x)
    for i, expert in enumerate(m.e):
        y = y.index_add(0, (chosen == i).nonzero()[:, 0], expert(x[chosen == i]))
    return m.head(y + m.gate(x).sum(-1, keepdim=True))


def of_graphs(m, X):
    """A graph convolution over the nodes of every sample."""
    h = (X["neighbours"] @ m.a(X["nodes"])).relu()
    return m.head((X["neighbours"] @ h).mean(1))


def of_sets(m, x):
    return m.head(m.a(x).relu().sum(1))


def hypernetwork(m, x):
    """A layer makes the weight that another part of the sample meets."""
    W = m.makes(x[:, :2]).unflatten(1, (2, D))
    return m.head((W @ x.unsqueeze(-1)).squeeze(-1).tanh())


def flow(m, x):
    """Euler's method through a field that depends on time."""
    for t in range(3):
        x = x + m.a(torch.cat([x, torch.full_like(x[:, :1], t / 3)], 1)).tanh() / 3
    return m.head(x)


def hooked():
    model = two(lambda m, x: m.head(m.a(x)))
    model.a.register_forward_hook(lambda m, args, z: z.tanh())
    model.head.register_forward_pre_hook(lambda m, args: (args[0].sin(),))
    return model


def data_parallel():
    """As where there is one device, whatever this machine has."""
    model = nn.DataParallel(Sequential(Linear(D, D), Tanh(), Linear(D, C)))
    model.device_ids = []
    return model


def without_gradient(layer, x):
    with torch.no_grad():
        return layer(x)


class Output(dict):
    """What a library's model returns."""


class Library(Module):
    """A model of several inputs by name that returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.words, self.head = Embedding(WORDS, D), Linear(D, C)

    def forward(self, input_ids, attention_mask):
        h = (self.words(input_ids) * attention_mask.unsqueeze(-1)).sum(1)
        return Output(logits=self.head(h), hidden=h)


def written_out(m, x):
    return functional.linear(functional.linear(x, m.w1, m.b1).tanh(), m.w2)


def flat_vector(m, x):
    w1, w2 = m.theta.split([D * D, D * C])
    return (x @ w1.view(D, D)).tanh() @ w2.view(D, C)


def by_thirds(m, x):
    parts = zip(m.qkv.weight.chunk(3), m.qkv.bias.chunk(3), strict=True)
    return m.head(softmax_attention(*(functional.linear(x, w, b) for w, b in parts)).mean(1))


FUNCTIONS = {
    "einsum": Case(
        lambda: two(
            lambda m, x: m.head(torch.einsum("nsi,oi->nso", x, m.a.weight) + m.a.bias).sum(1)
        ),
        sequences,
    ),
    "matmul": Case(lambda: two(lambda m, x: m.head((x @ m.a.weight.T + m.a.bias).sin())), vectors),
    "functional_call": Case(
        lambda: two(
            lambda m, x: m.head(functional_call(m.a, dict(m.a.named_parameters()), x).tanh())
        ),
        vectors,
    ),
    "parameters beside a layer": Case(
        lambda: Made(
            lambda m, x: m.head(written_out(m, x)),
            w1=parameter(D, D),
            b1=parameter(D),
            w2=parameter(D, D),
            head=Linear(D, C),
        ),
        vectors,
        dict.fromkeys(["w1", "b1", "w2"], OF_NO_LAYER),
    ),
    "a vector of all parameters beside a layer": Case(
        lambda: Made(
            lambda m, x: m.head(flat_vector(m, x)),
            theta=parameter(D * D + D * C),
            head=Linear(C, C),
        ),
        vectors,
        {"theta": OF_NO_LAYER},
    ),
    "scale and shift of one's own": Case(
        lambda: two(
            lambda m, x: m.head(m.scale * m.a(x).tanh() + m.shift),
            scale=parameter(D),
            shift=parameter(D),
        ),
        vectors,
        {"scale": OF_NO_LAYER, "shift": OF_NO_LAYER},
    ),
    "biases of one's own for two thirds of a layer": Case(
        lambda: Made(
            lambda m, x: m.head(
                softmax_attention(
                    *functional.linear(x, m.qkv.weight, torch.cat([m.q, 0 * m.q, m.v])).chunk(3, -1)
                ).mean(1)
            ),
            q=parameter(D),
            v=parameter(D),
            qkv=Linear(D, 3 * D, bias=False),
            head=Linear(D, C),
        ),
        sequences,
        {"q": OF_NO_LAYER, "v": OF_NO_LAYER},
    ),
    "queries, keys and values of thirds of a layer": Case(
        lambda: Made(by_thirds, qkv=Linear(D, 3 * D), head=Linear(D, C)), sequences
    ),
    "PReLU, Bilinear and EmbeddingBag": Case(
        lambda: Made(
            lambda m, x: m.head(m.prelu(m.a(m.words(x))) + m.bilinear(m.words(x), m.words(x))),
            words=nn.EmbeddingBag(WORDS, D),
            a=Linear(D, D),
            prelu=nn.PReLU(),
            bilinear=nn.Bilinear(D, D, D, bias=False),
            head=Linear(D, C),
        ),
        words,
        {
            "words.weight": "its rows are sums",
            "prelu.weight": "no matrix",
            "bilinear.weight": "a function of two inputs",
        },
    ),
    "a mixture of experts": Case(
        lambda: Made(
            experts,
            gate=Linear(D, 2),
            e=ModuleList([Linear(D, D), Linear(D, D)]),
            head=Linear(D, C),
        ),
        vectors,
    ),
    "a mixture of experts in one parameter": Case(
        lambda: Made(experts_by_bmm, gate=Linear(D, 2), e=parameter(2, D, D), head=Linear(D, C)),
        vectors,
        {"e": OF_NO_LAYER},
    ),
    "experts that see some samples": Case(
        lambda: Made(
            routed, gate=Linear(D, 2), e=ModuleList([Linear(D, D), Linear(D, D)]), head=Linear(D, C)
        ),
        lambda: torch.randn(N, 1).sign() * torch.ones(N, D),
        dict.fromkeys(["e.0.weight", "e.0.bias", "e.1.weight", "e.1.bias"], "rows vary"),
        r"'e\.[01]' \(Linear\) has .*no sample has rows and vectors.*layers=\[\.\.\.\]",
        ["e.0", "e.1"],
    ),
    "graphs": Case(
        lambda: two(of_graphs),
        lambda: {"nodes": torch.randn(N, S, D), "neighbours": torch.rand(N, S, S)},
    ),
    "sets": Case(lambda: two(of_sets), sequences),
    "two inputs, one layer": Case(
        lambda: Made(
            lambda m, X: m.head((m.a(X[0]).tanh() - m.a(X[1]).tanh()).abs()),
            a=Linear(D, D),
            head=Linear(D, C),
        ),
        lambda: (vectors(), vectors()),
    ),
    "hypernetwork": Case(
        lambda: Made(hypernetwork, makes=Linear(2, 2 * D), head=Linear(2, C)), vectors
    ),
    "flow": Case(lambda: Made(flow, a=Linear(D + 1, D), head=Linear(D, C)), vectors),
    "a dictionary as output": Case(
        lambda: Made(lambda m, X: m.model(**X)["logits"], model=Library()), masked_words
    ),
    "checkpoint": Case(
        lambda: two(
            lambda m, x: m.head(checkpoint(lambda x: m.a(x).tanh(), x, use_reentrant=False))
        ),
        vectors,
    ),
    "DataParallel": Case(data_parallel, vectors),
    "hooks that change inputs and outputs": Case(hooked, vectors),
    "in place": Case(
        lambda: two(lambda m, x: m.head(functional.relu_(m.a(x)) * 2).sum(1)), sequences
    ),
    "a mean that is detached": Case(
        lambda: two(lambda m, x: m.head((m.a(x) - m.a(x).mean(0).detach()).tanh())), vectors
    ),
    "with and without gradients": Case(
        lambda: two(lambda m, x: m.head(m.a(x).tanh() + without_gradient(m.a, x))), vectors
    ),
    "a copy that shares its entries but no gradient": Case(
        lambda: two(
            lambda m, x: m.head(
                (m.a(x) + functional.linear(x, m.a.weight.detach().requires_grad_())).tanh()
            )
        ),
        vectors,
    ),
    "one sample": Case(
        lambda: two(lambda m, x: m.head(m.a(x).tanh().mean(1))), lambda: torch.randn(1, S, D)
    ),
}
