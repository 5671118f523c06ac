"""The optimizer trains a network as it trains the same network written in another way."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import (
    Conv2d,
    CrossEntropyLoss,
    Embedding,
    LayerNorm,
    Linear,
    Module,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from torch.nn.functional import unfold

from kfac_scratch import (
    KFAC,
    FactorSums,
    default_inverse,
    layer_groups,
    over_loader,
    preconditioner,
    type2,
)
from kfac_scratch.capture.layer_groups import parameters_of
from tests.capture.models.case import HEADS, WORDS, C, D, S, causal_mask, heads_apart, heads_joined
from tests.capture.models.language import gpt2_of_pytorch
from tests.capture.test_counted import (
    IGNORED,
    IN_READER,
    LENGTHS,
    Reader,
    is_word,
    sentences,
)
from tests.laws import check_differs, check_equal
from tests.thinned import thinned

pytestmark = pytest.mark.long

STEPS, LOSS = 6, CrossEntropyLoss(ignore_index=IGNORED)
OPTIONS = {"lr": 0.3, "damping": 0.05, "fisher": type2, "controls": [], "momentum": 0.5}


def losses(model, batches, observed=lambda model, training: None, **options):
    """The losses of some steps, one for each batch.

    `observed` is called around the observation of a batch: with False before it, with True after.
    """
    optimizer, found = KFAC(model, LOSS, **OPTIONS | options), []
    for X, y in batches:
        optimizer.zero_grad()
        value = LOSS(model(X), y)
        value.backward()
        observed(model, False)
        optimizer.observe(X, y)
        optimizer.step()
        observed(model, True)
        found.append(value.detach())
    return torch.stack(found)


def check_same_training(one, other):
    check_equal(one, other)
    assert one[-1] < 0.5 * one[0]


# ---- a residual network in training mode ---------------------------------------------------------


class Patches(Module):
    """A convolution as a linear layer of patches."""

    def __init__(self, conv):
        super().__init__()
        self.setting = {"stride": conv.stride, "padding": conv.padding}
        self.kernel = conv.kernel_size
        self.linear = Linear(conv.weight[0].numel(), conv.out_channels, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(conv.weight.flatten(1))

    def forward(self, x):
        rows = self.linear(unfold(x, self.kernel, **self.setting).mT)
        side = int(rows.shape[1] ** 0.5)
        return rows.mT.unflatten(2, (side, side))


class BatchStatistics(Module):
    """A batch normalisation in plain arithmetic."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(t) for t in (torch.ones(channels), torch.zeros(channels))
        )
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x):
        mean, var = self.mean, self.var
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            n = x.numel() // len(mean)
            self.mean.lerp_(mean.detach(), 0.1)
            self.var.lerp_(var.detach() * n / (n - 1), 0.1)
        mean, scale = mean.view(-1, 1, 1), self.weight / (var + 1e-5).sqrt()
        return (x - mean) * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class ResNet(Module):
    """Two residual blocks behind a stem, with the convolutions and norms that are given."""

    def __init__(self, convs, norm):
        super().__init__()
        self.convs = nn.ModuleList(convs)
        self.norms = nn.ModuleList(norm(4) for _ in convs)
        self.fc = Linear(4, C)

    def forward(self, x):
        layers = [lambda x, c=c, n=n: n(c(x)) for c, n in zip(self.convs, self.norms, strict=True)]
        x = layers[0](x).relu()
        x = (x + layers[2](layers[1](x).relu())).relu()
        x = (layers[5](x) + layers[4](layers[3](x).relu())).relu()
        return self.fc(x.mean((2, 3)))


def norms_in(model, training):
    """As the optimizer's documentation says: statistics of the batch in the loss's pass alone."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | BatchStatistics):
            module.train(training)


def test_a_residual_network_with_batch_norm_trains_as_one_of_linear_layers(device):
    kinds = [(2, 3, 1), (4, 3, 1), (4, 3, 1), (4, 3, 2), (4, 3, 1), (4, 1, 2)]
    convs = [Conv2d(c, 4, k, stride, k // 2, bias=False) for c, k, stride in kinds]
    patches = [Patches(conv) for conv in convs]
    model, by_hand = ResNet(convs, nn.BatchNorm2d), ResNet(patches, BatchStatistics)
    by_hand.fc.load_state_dict(model.fc.state_dict())
    X = torch.randn(8, 2, 6, 6, device=device)
    batches = [(X, torch.arange(8, device=device) % C)] * STEPS
    options = {"observed": norms_in, "lr": 0.1}
    found = losses(model.to(device), batches, **options)
    check_same_training(found, losses(by_hand.to(device), batches, **options))
    for norm, other in zip(model.norms, by_hand.norms, strict=True):
        assert norm.training
        assert other.training
        assert norm.num_batches_tracked == STEPS  # the observation leaves the statistics alone
        check_equal(norm.running_mean, other.mean)
        check_equal(norm.running_var, other.var)


# ---- sentences with and without padding ----------------------------------------------------------


def reader(device):
    torch.manual_seed(1)
    return Reader().to(device)


def test_padded_batches_train_as_sentences_one_by_one(device):
    """Without the padding, every sentence is a batch, and factors and gradients are summed."""
    X, _, mask = sentences(device)
    y = (X % 3).where(mask, IGNORED)
    options = {"layers": IN_READER, "lr": 0.5, "momentum": 0.0, "decay": 0.0}
    padded = losses(reader(device), [(X, y)] * STEPS, counted=is_word, **options)
    check_differs(losses(reader(device), [(X, y)] * STEPS, **options)[1:], padded[1:], 1e-6)

    model, one_by_one = reader(device), []
    batches = [(X[n : n + 1, :T], y[n : n + 1, :T]) for n, T in enumerate(LENGTHS)]
    total = CrossEntropyLoss(reduction="sum")
    for _ in range(STEPS):
        value = sum(total(model(x), labels) for x, labels in batches) / sum(LENGTHS)
        one_by_one.append(value.detach())
        names = [name for name, _ in model.named_parameters()]
        gradients = dict(
            zip(names, torch.autograd.grad(value, list(model.parameters())), strict=True)
        )
        matrices = over_loader(FactorSums(), model, LOSS, batches, layers=IN_READER)
        inverses = {n: default_inverse(M, OPTIONS["damping"]) for n, M in matrices.items()}
        step = preconditioner(model, inverses, layers=IN_READER)(gradients)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= options["lr"] * step[name]
    check_same_training(padded, torch.stack(one_by_one))


@pytest.mark.slow
def test_padded_batches_of_one_length_train_as_batches_without_padding(device):
    """With averages over batches and momentum: a batch for each length, padded to the longest."""
    T, lengths = 7, [7, 3, 4, 2] * 3
    X = torch.randint(1, WORDS, (len(lengths), 5, T), device=device)
    pairs = [
        (x.where(torch.arange(T, device=device) < n, 0), x.remainder(3))
        for x, n in zip(X, lengths, strict=True)
    ]
    padded = [(x, labels.where(x > 0, IGNORED)) for x, labels in pairs]
    cut = [(x[:, :n], labels[:, :n]) for (x, labels), n in zip(pairs, lengths, strict=True)]
    options = {"layers": IN_READER}
    found = losses(reader(device), padded, counted=is_word, **options)
    check_same_training(found, losses(reader(device), cut, **options))
    check_differs(losses(reader(device), padded, **options), found, 1e-6)


# ---- a language model ----------------------------------------------------------------------------


class LayerByHand(Module):
    """A layer of PyTorch's transformer, with a linear layer for each projection."""

    def __init__(self, of):
        super().__init__()
        self.norms_first, self.activation = of.norm_first, of.activation
        self.norm1, self.norm2 = LayerNorm(D), LayerNorm(D)
        self.q, self.k, self.v, self.out = (Linear(D, D) for _ in range(4))
        self.linear1, self.linear2 = Linear(D, 6), Linear(6, D)
        for name in ("norm1", "norm2", "linear1", "linear2"):
            self.get_submodule(name).load_state_dict(of.get_submodule(name).state_dict())
        self.out.load_state_dict(of.self_attn.out_proj.state_dict())
        weights, biases = of.self_attn.in_proj_weight, of.self_attn.in_proj_bias
        parts = zip((self.q, self.k, self.v), weights.chunk(3), biases.chunk(3), strict=True)
        for linear, weight, bias in parts:
            linear.load_state_dict({"weight": weight, "bias": bias})

    def attended(self, x, bias):
        q, k, v = (heads_apart(f(x)) for f in (self.q, self.k, self.v))
        return self.out(heads_joined((q @ k.mT / (D / HEADS) ** 0.5 + bias).softmax(-1) @ v))

    def between(self, x):
        return self.linear2(self.activation(self.linear1(x)))

    def forward(self, h, bias=0.0):
        if self.norms_first:
            h = h + self.attended(self.norm1(h), bias)
            return h + self.between(self.norm2(h))
        h = self.norm1(h + self.attended(h, bias))
        return self.norm2(h + self.between(h))


class ByHand(Module):
    """The language model of PyTorch's layers, with a linear layer for each projection."""

    def __init__(self, of, tied=False):
        super().__init__()
        self.wte, self.wpe, self.norm = Embedding(WORDS, D), Embedding(S, D), LayerNorm(D)
        self.layer, self.head = LayerByHand(of.layer), Linear(D, WORDS, bias=False)
        for name in ("wte", "wpe", "norm", "head"):
            self.get_submodule(name).load_state_dict(of.get_submodule(name).state_dict())
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids):
        h = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device).expand_as(ids))
        return self.head(self.norm(self.layer(h, causal_mask(h)))).movedim(-1, 1)


def sentences_of_numbers(device):
    """Batches of words that count up, so that the next word is known."""
    batches = []
    for _ in range(2 * STEPS):
        first = torch.randint(WORDS, (6, 1), device=device)
        ids = (first + torch.arange(S + 1, device=device)) % WORDS
        batches.append((ids[:, :-1], ids[:, 1:]))
    return batches


def check_trained_alike(model, by_hand, batches, left_out, **options):
    """All layers but some have blocks, as many in both networks."""
    blocks, found = [], []
    for net in (model, by_hand):
        names = [name for name, module in net.named_modules() if parameters_of(module)]
        names = [name for name in names if not any(part in name for part in left_out)]
        blocks.append(sum(len(group.names) for group in layer_groups(net, names)))
        found.append(losses(net, batches, layers=names, **options))
    assert blocks[0] == blocks[1] > 0
    check_same_training(*found)


@pytest.mark.parametrize("norms", thinned(["in blocks", "in the rest"]))
def test_a_language_model_of_pytorchs_layers_trains_as_one_of_linear_layers(norms, device):
    model = gpt2_of_pytorch()
    by_hand, batches = ByHand(model), sentences_of_numbers(device)
    left_out = ["norm"] if norms == "in the rest" else []
    check_trained_alike(model.to(device), by_hand.to(device), batches, left_out)


def test_a_language_model_with_a_tied_head_trains_with_it_in_the_rest(device):
    """The optimizer has no step for a tied weight and says so; this is the way out."""
    model = gpt2_of_pytorch()
    model.head.weight = model.wte.weight
    by_hand, batches = ByHand(model, tied=True), sentences_of_numbers(device)
    with pytest.raises(NotImplementedError, match=r"'head' and 'wte'.*layers=.*rest=.*untie"):
        KFAC(model, LOSS)
    rest = {"rest": partial(torch.optim.AdamW, lr=0.1)}
    left_out = ["norm", "head", "wte"]
    check_trained_alike(model.to(device), by_hand.to(device), batches, left_out, **rest)


# ---- a classifier of sequences -------------------------------------------------------------------


class Classifier(Module):
    """A transformer encoder over words, a mean over positions, and a head."""

    def __init__(self, encoder):
        super().__init__()
        self.words, self.encoder, self.head = Embedding(WORDS, D), encoder, Linear(D, C)

    def forward(self, ids):
        return self.head(self.encoder(self.words(ids)).mean(1))


@pytest.mark.parametrize("norms", thinned(["in the rest", "in blocks"]))
def test_an_encoder_of_pytorch_trains_as_one_of_linear_layers(norms, device):
    layer = TransformerEncoderLayer(D, HEADS, 6, dropout=0.0, batch_first=True)
    model = Classifier(TransformerEncoder(layer, 2, enable_nested_tensor=False))
    by_hand = Classifier(nn.Sequential(*map(LayerByHand, model.encoder.layers)))
    for name in ("words", "head"):
        by_hand.get_submodule(name).load_state_dict(model.get_submodule(name).state_dict())
    X = torch.randint(WORDS, (12, S), device=device)
    batches = [(X, (X == 0).any(1).long())] * (2 * STEPS)
    left_out = ["norm"] if norms == "in the rest" else []
    check_trained_alike(model.to(device), by_hand.to(device), batches, left_out)
