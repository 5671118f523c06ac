"""Language models."""

import torch
from torch.nn import (
    Conv1d,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    ModuleList,
    RMSNorm,
    functional,
)

from tests.capture.models.case import (
    HEADS,
    OF_NO_LAYER,
    SHARED_BY_ALL,
    WORDS,
    C,
    Case,
    D,
    Made,
    S,
    all_positions,
    causal_mask,
    every_position,
    heads_apart,
    heads_joined,
    masked_words,
    parameter,
    sequences,
    softmax_attention,
    transformer_layer,
    words,
)


class Conv1D(Module):
    """The linear layer of the library's GPT-2: its weight is `[d_in, d_out]`."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.weight, self.bias = parameter(d_in, d_out), parameter(d_out)

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


class Addmm(Linear):
    """The same computation with the weight of a `Linear`."""

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight.T).unflatten(0, x.shape[:-1])


class Gpt2(Module):
    """A block of GPT-2 with a head of its own."""

    def __init__(self, linear, positions):
        super().__init__()
        self.positions = positions
        self.wte, self.wpe = Embedding(WORDS, D), Embedding(S + 1, D)
        self.ln_1, self.c_attn, self.c_proj = LayerNorm(D), linear(D, 3 * D), linear(D, D)
        self.ln_2, self.mlp_fc, self.mlp_proj = LayerNorm(D), linear(D, 6), linear(6, D)
        self.ln_f, self.lm_head = LayerNorm(D), Linear(D, WORDS, bias=False)

    def forward(self, X):
        ids, mask = (X["input_ids"], X["attention_mask"]) if isinstance(X, dict) else (X, None)
        h = self.wte(ids) + self.wpe(self.positions(ids))
        bias = causal_mask(h) if mask is None else causal_mask(h) - 1e9 * (1 - mask[:, None, None])
        q, k, v = (heads_apart(x) for x in self.c_attn(self.ln_1(h)).split(D, dim=2))
        h = h + self.c_proj(heads_joined(softmax_attention(q, k, v, bias)))
        h = h + self.mlp_proj(functional.gelu(self.mlp_fc(self.ln_2(h)), approximate="tanh"))
        return self.lm_head(self.ln_f(h)).movedim(-1, 1)


CONV1D = {
    f"{layer}.{p}": "no layer that is known; its function has a rule"
    for layer in ("c_attn", "c_proj", "mlp_fc", "mlp_proj")
    for p in ("weight", "bias")
}


class Bert(Module):
    """A layer of BERT with the head of a classifier, or of masked words."""

    def __init__(self, classifies):
        super().__init__()
        self.classifies = classifies
        self.word, self.position, self.token_type = (Embedding(n, D) for n in (WORDS, S, 2))
        self.norm_0, self.norm_1, self.norm_2 = (LayerNorm(D) for _ in range(3))
        self.query, self.key, self.value, self.out = (Linear(D, D) for _ in range(4))
        self.intermediate, self.output, self.dense = Linear(D, 6), Linear(6, D), Linear(D, D)
        self.norm_3, self.head = LayerNorm(D), Linear(D, C if classifies else WORDS)

    def forward(self, X):
        ids, bias = X["input_ids"], -1e9 * (1 - X["attention_mask"][:, None, None])
        h = self.word(ids) + self.position(every_position(ids)) + self.token_type(ids % 2)
        h = self.norm_0(h)
        q, k, v = (heads_apart(f(h)) for f in (self.query, self.key, self.value))
        h = self.norm_1(h + self.out(heads_joined(softmax_attention(q, k, v, bias))))
        h = self.norm_2(h + self.output(functional.gelu(self.intermediate(h))))
        if self.classifies:
            return self.head(self.norm_3(self.dense(h[:, 0]).tanh()))
        return self.head(self.norm_3(functional.gelu(self.dense(h)))).movedim(-1, 1)


def tied(model, words, head):
    """A model whose head has the weight of its words."""
    getattr(model, head).weight = getattr(model, words).weight
    return model


class Float32Norm(Module):
    """The root-mean-square norm of Llama and T5, in float32 inside."""

    def __init__(self, d):
        super().__init__()
        self.weight = parameter(d)

    def forward(self, x):
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


def rotated(x):
    """Rotary positions of `[N, heads, S, 2]`."""
    angle = torch.arange(x.shape[2], device=x.device, dtype=x.dtype).unsqueeze(-1)
    return x * angle.cos() + torch.cat([-x[..., 1:], x[..., :1]], -1) * angle.sin()


class Llama(Module):
    """A block of Llama: grouped queries, rotary positions, a gated MLP."""

    def __init__(self, norm):
        super().__init__()
        self.embed, self.norm_1, self.norm_2, self.norm = Embedding(WORDS, D), *map(norm, [D] * 3)
        self.q, self.o = (Linear(D, D, bias=False) for _ in range(2))
        self.k, self.v = (Linear(D, D // HEADS, bias=False) for _ in range(2))
        self.gate, self.up = (Linear(D, 6, bias=False) for _ in range(2))
        self.down, self.lm_head = Linear(6, D, bias=False), Linear(D, WORDS, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        x = self.norm_1(h)
        q, k, v = (heads_apart(f(x)) for f in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(HEADS, 1) for t in (rotated(k), v))
        h = h + self.o(heads_joined(softmax_attention(rotated(q), k, v, causal_mask(h))))
        x = self.norm_2(h)
        h = h + self.down(functional.silu(self.gate(x)) * self.up(x))
        return self.lm_head(self.norm(h)).movedim(-1, 1)


FLOAT32_NORMS = {
    f"{name}.weight": "a norm that is no module of PyTorch's" for name in ("norm_1", "norm_2")
}


class T5(Module):
    """An encoder and a decoder of T5, with an embedding of distances for each."""

    def __init__(self, for_all, fused=False):
        super().__init__()
        self.for_all, self.fused = for_all, fused
        self.shared, self.head = Embedding(WORDS, D), Linear(D, WORDS, bias=False)
        self.far, self.back = Embedding(2 * S, HEADS), Embedding(2 * S, HEADS)
        self.encoder = ModuleList(Linear(D, D, bias=False) for _ in range(4))
        self.own = ModuleList(Linear(D, D, bias=False) for _ in range(4))
        self.cross = ModuleList(Linear(D, D, bias=False) for _ in range(4))
        self.wi, self.wo = Linear(D, 6, bias=False), Linear(6, D, bias=False)
        self.norm_1, self.norm_2 = Float32Norm(D), Float32Norm(D)

    def distances(self, table, h):
        numbers = torch.arange(h.shape[1], device=h.device)
        distance = numbers - numbers[:, None] + S
        rows = distance if self.for_all else distance.expand(len(h), -1, -1)
        return table(rows).movedim(-1, -3)

    def attend(self, layers, x, y, bias=0.0):
        q, k, v = (heads_apart(f(t)) for f, t in zip(layers, (x, y, y), strict=False))
        if self.fused and isinstance(bias, torch.Tensor):
            z = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        else:
            z = (q @ k.mT + bias).softmax(-1) @ v
        return layers[3](heads_joined(z))

    def forward(self, ids):
        h, z = self.shared(ids), self.shared(ids.roll(1, 1))
        x = self.norm_1(h)
        h = h + self.attend(self.encoder, x, x, self.distances(self.far, h))
        z = z + self.attend(self.own, z, z, self.distances(self.back, z) + causal_mask(z))
        z = z + self.attend(self.cross, self.norm_2(z), h)
        return self.head(z + self.wo(self.wi(z).relu())).movedim(-1, 1)


def gpt2_of_pytorch(positions=every_position):
    """The same kind of model with PyTorch's own layers."""
    layer = transformer_layer(activation="gelu", norm_first=True)

    def forward(m, ids):
        h = m.wte(ids) + m.wpe(positions(ids))
        h = m.layer(h, src_mask=causal_mask(h), is_causal=True)
        return m.head(m.norm(h)).movedim(-1, 1)

    return Made(
        forward,
        wte=Embedding(WORDS, D),
        wpe=Embedding(S, D),
        layer=layer,
        norm=LayerNorm(D),
        head=Linear(D, WORDS, bias=False),
    )


def mamba(m, x):
    """A selective state space: a causal depthwise convolution, and a scan."""
    u, gate = m.inward(x).chunk(2, -1)
    u = functional.silu(m.conv(u.mT)[..., : x.shape[1]].mT)
    step, read, write = functional.softplus(m.step(u)), m.read(u), m.write(u)
    state, found = 0.0, []
    for s in range(x.shape[1]):
        kept = torch.exp(-step[:, s, :, None] * m.decay.exp())
        state = kept * state + step[:, s, :, None] * write[:, s, None] * u[:, s, :, None]
        found.append((state * read[:, s, None]).sum(-1))
    y = torch.stack(found, 1) + m.skip * u
    return m.head((y * functional.silu(gate)).mean(1))


MAMBA = {
    "inward": lambda: Linear(D, 6),
    "conv": lambda: Conv1d(3, 3, 2, padding=1, groups=3),
    "step": lambda: Linear(3, 3),
    "read": lambda: Linear(3, 2, bias=False),
    "write": lambda: Linear(3, 2, bias=False),
    "decay": lambda: parameter(3, 2),
    "skip": lambda: parameter(3),
    "head": lambda: Linear(3, C),
}

LANGUAGE = {
    "GPT-2 with addmm": Case(lambda: Gpt2(Addmm, every_position), words),
    "GPT-2 with a tied head": Case(
        lambda: tied(Gpt2(Addmm, every_position), "wte", "lm_head"), words
    ),
    "GPT-2 with a tied head and a mask in a dict": Case(
        lambda: tied(Gpt2(Addmm, every_position), "wte", "lm_head"), masked_words
    ),
    "BERT for masked words, tied": Case(lambda: tied(Bert(False), "word", "head"), masked_words),
    "GPT-2 with a mask in a dict": Case(lambda: Gpt2(Addmm, every_position), masked_words),
    "GPT-2 with a weight of a layer of its own": Case(
        lambda: Gpt2(Conv1D, every_position), words, CONV1D
    ),
    "GPT-2 with positions for all samples": Case(
        lambda: Gpt2(Addmm, all_positions),
        words,
        {"wpe.weight": SHARED_BY_ALL},
        r"'wpe' \(Embedding\) has an output of the same shape.*layers=\[\.\.\.\]",
        ["wpe"],
    ),
    "GPT-2 of PyTorch's layers": Case(gpt2_of_pytorch, words),
    "BERT, a classifier": Case(lambda: Bert(True), masked_words),
    "BERT for masked words": Case(lambda: Bert(False), masked_words),
    "Llama": Case(lambda: Llama(RMSNorm), words),
    "Llama in float32 inside": Case(
        lambda: Llama(Float32Norm),
        words,
        FLOAT32_NORMS | {"norm.weight": FLOAT32_NORMS["norm_1.weight"]},
        tolerance=1e-6,
    ),
    "T5 with distances for all samples": Case(
        lambda: T5(True),
        words,
        {"far.weight": SHARED_BY_ALL, "back.weight": SHARED_BY_ALL} | FLOAT32_NORMS,
        r"'far' \(Embedding\) has an output of the same shape.*layers=\[\.\.\.\]",
        ["far", "back"],
        tolerance=1e-6,
    ),
    "T5 with distances for every sample": Case(
        lambda: T5(False), words, FLOAT32_NORMS, tolerance=1e-6
    ),
    "T5 with distances for every sample, in a fused attention": Case(
        lambda: T5(False, fused=True), words, FLOAT32_NORMS, tolerance=1e-6
    ),
    "Mamba": Case(
        lambda: Made(mamba, **{name: make() for name, make in MAMBA.items()}),
        sequences,
        {"decay": OF_NO_LAYER, "skip": OF_NO_LAYER},
    ),
}
