"""Attention, and what is made of it."""

from torch import nn
from torch.nn import (
    Embedding,
    Linear,
    MultiheadAttention,
)

from tests.capture.models.case import (
    HEADS,
    OF_NO_LAYER,
    C,
    Case,
    D,
    Made,
    causal_mask,
    parameter,
    sequences,
    transformer_layer,
)
from tests.capture.test_functions import ATTENTIONS


def attended_to_by_latents(m, x):
    """A Perceiver: learned queries read the sequence."""
    latents = m.latents.expand(len(x), -1, -1)
    return m.head(m.attention(latents, x, x)[0].mean(1))


def queries_of_an_embedding(m, x):
    """As in DETR, whose queries are an embedding's whole weight."""
    queries = m.queries.weight.expand(len(x), -1, -1)
    return m.head(m.attention(queries, x, x)[0].mean(1))


def decoder(m, x):
    memory = x[:, :2].sin()
    return m.head(m.decoder(x, memory, tgt_mask=causal_mask(x)).mean(1))


def encoded(encoder):
    return Made(lambda m, x: m.head(m.encoder(x).mean(1)), encoder=encoder, head=Linear(D, C))


OF_ATTENTION = {
    "learned key and value": dict.fromkeys(
        ("attention.bias_k", "attention.bias_v"), "a position more, which no layer makes"
    )
}
ATTENTION = {
    **{
        f"attention, {name}": Case(make, sequences, OF_ATTENTION.get(name, {}))
        for name, make in ATTENTIONS.items()
    },
    "attention, one position of an odd number": Case(
        lambda: Made(
            lambda m, x: m.head(m.attention(*[x.transpose(0, 1)] * 3)[0][0]),
            attention=MultiheadAttention(D, HEADS),
            head=Linear(D, C),
        ),
        sequences,
    ),
    "encoder layer": Case(lambda: encoded(transformer_layer()), sequences),
    "encoder layer, norms first": Case(
        lambda: encoded(transformer_layer(norm_first=True)), sequences
    ),
    "encoder, evaluated": Case(
        lambda: encoded(nn.TransformerEncoder(transformer_layer(dropout=0.3), 1)).eval(),
        sequences,
    ),
    "decoder layer": Case(
        lambda: Made(
            decoder, decoder=transformer_layer(nn.TransformerDecoderLayer), head=Linear(D, C)
        ),
        sequences,
    ),
    "encoder and decoder": Case(
        lambda: Made(
            lambda m, x: m.head(m.transformer(x, x[:, :2].sin()).mean(1)),
            transformer=nn.Transformer(D, HEADS, 1, 1, 6, dropout=0.0, batch_first=True),
            head=Linear(D, C),
        ),
        sequences,
    ),
    "Perceiver": Case(
        lambda: Made(
            attended_to_by_latents,
            latents=parameter(2, D),
            attention=MultiheadAttention(D, HEADS, batch_first=True),
            head=Linear(D, C),
        ),
        sequences,
        {"latents": OF_NO_LAYER},
    ),
    "DETR": Case(
        lambda: Made(
            queries_of_an_embedding,
            queries=Embedding(2, D),
            attention=MultiheadAttention(D, HEADS, batch_first=True),
            head=Linear(D, C),
        ),
        sequences,
        {"queries.weight": "an embedding that is never called"},
        r"'queries' \(Embedding\) never ran.*layers=\[\.\.\.\]",
        ["queries"],
    ),
}
