"""Weights are followed into functions: attention, layers written by hand, compiled models."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import (
    Conv1d,
    Conv2d,
    ConvTranspose1d,
    ConvTranspose2d,
    Linear,
    Module,
    MSELoss,
    MultiheadAttention,
    Sequential,
    Tanh,
)
from torch.nn.functional import conv1d, conv2d, conv_transpose1d, embedding, linear, relu_

from kfac_scratch import EXPAND, KFAC, REDUCE, kfac, layer_groups, layer_ios, plan, type2
from kfac_scratch.capture.calls import _is_reshaped, recorded
from kfac_scratch.curvature import diagonal_blocks, ggn
from tests.capture.test_plan import C, D, N, Net, S, check_exact, sequences, two, vectors
from tests.laws import check_equal

pytestmark = pytest.mark.filterwarnings("ignore:No block covers")


# ---- attention -----------------------------------------------------------------------------------


class Attends(Module):
    """An attention module between inputs `[N, S, D]` and a head, called in some way."""

    def __init__(self, attend, batch_first=True, **options):
        super().__init__()
        self.attention = MultiheadAttention(D, 2, batch_first=batch_first, **options)
        self.head, self.attend, self.batch_first = Linear(D, C), attend, batch_first

    def forward(self, x):
        if self.batch_first:
            return self.head(self.attend(self.attention, x).mean(1))
        return self.head(self.attend(self.attention, x.transpose(0, 1)).mean(0))


def to_itself(attention, x):
    return attention(x, x, x)[0]


def causal(attention, x):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
    return attention(x, x, x, attn_mask=mask, is_causal=True)[0]


def with_padding(attention, x):
    return attention(x, x, x, key_padding_mask=x[..., 0] > 0.9)[0]


ATTENTIONS = {
    "self": lambda: Attends(to_itself),
    "positions first": lambda: Attends(to_itself, batch_first=False),
    "without weights": lambda: Attends(lambda m, x: m(x, x, x, need_weights=False)[0]),
    "without biases": lambda: Attends(to_itself, bias=False),
    "evaluated": lambda: Attends(to_itself, dropout=0.5).eval(),
    "causal": lambda: Attends(causal),
    "padded": lambda: Attends(with_padding),
    "keys and values alike": lambda: Attends(lambda m, x: m(x, x.sin(), x.sin())[0]),
    "encoder and decoder": lambda: Attends(lambda m, x: m(x, h := x[:, 1:].sin(), h)[0]),
    "three inputs": lambda: Attends(lambda m, x: m(x[:, :2], x.sin(), x.cos())[0]),
    "other sizes": lambda: Attends(lambda m, x: m(x, x[..., :2], x[..., :3])[0], kdim=2, vdim=3),
    "other sizes, without biases": lambda: Attends(
        lambda m, x: m(x, x[..., :2], x[..., :3])[0], kdim=2, vdim=3, bias=False
    ),
    "learned key and value": lambda: Attends(to_itself, add_bias_kv=True, add_zero_attn=True),
    "twice, in two ways": lambda: Attends(lambda m, x: m(m(x, x, x)[0], x, x.sin())[0]),
    "one position is read": lambda: Attends(lambda m, x: to_itself(m, x)[:, :1]),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_blocks_of_attention_are_exact(name, device):
    """`check_exact` compares each with autodiff, and the reduced flavour with reduced rows."""
    ios = check_exact(ATTENTIONS[name]().to(device), sequences(device), device)
    assert list(ios) == [*(f"attention.{x}_proj" for x in ("q", "k", "v", "out")), "head"]


@pytest.mark.parametrize("n", [1, 2, S])
def test_attention_is_exact_for_few_samples_and_for_as_many_as_positions(n, device):
    model = Attends(to_itself, batch_first=False).to(device)
    check_exact(model, sequences(device, n), device)


def test_a_sample_may_attend_to_fewer_keys_than_queries(device):
    """Then rows of one projection have other numbers than those of another."""
    model = ATTENTIONS["encoder and decoder"]().to(device)
    X, y = sequences(device), torch.randn(N, C, device=device)
    for flavour, positions in ((EXPAND, (1, 1)), (REDUCE, (S, S - 1))):
        ios = layer_ios(model, MSELoss(), X, y, flavour=flavour)
        found = tuple(ios[f"attention.{x}_proj"].positions for x in "qk")
        assert found == positions


@pytest.mark.parametrize("frozen", ["in_proj_bias", "out_proj.weight"])
def test_frozen_parameters_of_attention_have_no_columns(frozen, device):
    model = Attends(to_itself).to(device)
    model.attention.get_parameter(frozen).requires_grad_(False)
    check_exact(model, sequences(device), device)


def test_biases_of_attention_alone_are_exact(device):
    """A softmax ignores the bias of the keys: its block is zero."""
    model = Attends(to_itself).to(device)
    model.attention.in_proj_weight.requires_grad_(False)
    data = MSELoss(), sequences(device), torch.randn(N, C, device=device)
    exact, ios = diagonal_blocks(model, ggn(model, *data)), layer_ios(model, *data)
    for x in "qv":
        assert ios[f"attention.{x}_proj"].a.shape[-1] == 1
        check_equal(ios[f"attention.{x}_proj"].block(), exact[f"attention.{x}_proj"])
    assert ios["attention.k_proj"].block().abs().max() <= 1e-20


def test_attention_that_is_frozen_in_part_is_refused(device):
    model = ATTENTIONS["other sizes"]().to(device)
    model.attention.k_proj_weight.requires_grad_(False)
    with pytest.raises(NotImplementedError, match=r"'attention' only.*q_proj.*are trainable"):
        layer_groups(model)
    assert [g.name for g in layer_groups(model, ["head"])] == ["head"]


def test_attention_over_the_batch_is_refused(device):
    model = Attends(to_itself, batch_first=False).to(device)
    model.batch_first = True
    with pytest.raises(ValueError, match=r"'attention'.*MultiheadAttention.*no sample"):
        layer_ios(model, MSELoss(), sequences(device), torch.randn(N, C, device=device))


def test_two_attentions_with_one_weight_are_refused():
    model = Sequential(MultiheadAttention(D, 2), MultiheadAttention(D, 2))
    model[1].in_proj_weight = model[0].in_proj_weight
    with pytest.raises(NotImplementedError, match="'0' and '1' share the weights of queries"):
        layer_groups(model)


@pytest.mark.parametrize("name", ["self", "other sizes", "without biases"])
def test_matrices_of_attention_and_parameters_are_inverse_to_each_other(name):
    model = ATTENTIONS[name]()
    values = dict(model.named_parameters())
    for group in layer_groups(model):
        Ws = group.matrices(values)
        assert len(Ws) == len(group.names)
        back = group.parameters(Ws)
        assert set(back) == set(group.parameter_names)
        for name, value in back.items():
            assert torch.equal(value, values[name])


TRANSFORMERS = {
    "encoder layer": lambda: nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0, batch_first=True),
    "encoder layer, norms first": lambda: nn.TransformerEncoderLayer(
        D, 2, 6, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
    ),
    "encoder, evaluated": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, 2, 6, batch_first=True), 2
    ).eval(),
    "encoder, positions first": lambda: nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_blocks_of_pytorchs_transformers_are_exact(name, device):
    encoder = TRANSFORMERS[name]()
    batch = 1 if name == "encoder, positions first" else 0

    def forward(m, x):
        return m.b(m.a(x.transpose(0, batch)).transpose(0, batch).mean(1))

    model = Net(forward, a=encoder, b=Linear(D, C)).to(device)
    check_exact(model, sequences(device), device)


def test_blocks_of_an_encoder_with_a_decoder_are_exact(device):
    transformer = nn.Transformer(D, 2, 1, 1, 6, dropout=0.0, batch_first=True)
    model = Net(lambda m, x: m.b(m.a(x, x[:, :2].sin()).mean(1)), a=transformer, b=Linear(D, C))
    check_exact(model.to(device), sequences(device), device)


def test_an_optimizer_trains_attention_in_one_parameter_as_in_three_layers(device):
    """The same network, written by hand with a linear layer for each projection."""

    class ByHand(Module):
        def __init__(self, of):
            super().__init__()
            attention, self.head = of.attention, of.head
            parts = zip(
                attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True
            )
            self.q, self.k, self.v, self.out = (Linear(D, D) for _ in range(4))
            with torch.no_grad():
                for layer, (w, b) in zip((self.q, self.k, self.v), parts, strict=True):
                    layer.weight.copy_(w)
                    layer.bias.copy_(b)
            self.out.load_state_dict(attention.out_proj.state_dict())

        def forward(self, x):
            q, k, v = (f(x).unflatten(2, (2, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            z = ((q @ k.mT / (D / 2) ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
            return self.head(self.out(z).mean(1))

    whole = Attends(to_itself)
    by_hand = ByHand(whole).to(device)
    by_hand.head = Linear(D, C)
    by_hand.head.load_state_dict(whole.head.state_dict())
    whole, by_hand = whole.to(device), by_hand.to(device)
    X, y = sequences(device), torch.randn(N, C, device=device)
    losses = []
    for model in (whole, by_hand):
        options = {"lr": 0.3, "damping": 0.1, "fisher": type2, "controls": []}
        optimizer, found = KFAC(model, MSELoss(), **options), []
        losses.append(found)
        for _ in range(6):
            optimizer.zero_grad()
            value = MSELoss()(model(X), y)
            value.backward()
            optimizer.observe(X, y)
            optimizer.step()
            found.append(value.detach())
    check_equal(torch.stack(losses[0]), torch.stack(losses[1]))
    assert losses[0][-1] < 0.5 * losses[0][0]


def test_an_optimizer_trains_a_transformer_with_norms_in_the_rest(device):
    """Blocks for attention and linear layers; the norms' scales and shifts are AdamW's."""
    encoder = nn.TransformerEncoderLayer(D, 2, 6, dropout=0.0, batch_first=True)
    model = Net(lambda m, x: m.b(m.a(x).mean(1)), a=encoder, b=Linear(D, C)).to(device)
    X, y = sequences(device, 12), torch.randint(C, (12,), device=device)
    loss = nn.CrossEntropyLoss()
    optimizer = KFAC(model, loss, lr=0.1, damping=1e-2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first = loss(model(X), y).item()
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        optimizer.observe(X, y)
        optimizer.step()
    assert value.item() < 0.2 * first
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---- layers written by hand ----------------------------------------------------------------------


def biased(layer, x):
    """A bias that is added by the next function is that of the layer."""
    z = x @ layer.weight.T
    z += layer.bias
    return z


def for_all(matrix, x):
    """A matrix for every sample, the same one."""
    return matrix.expand(len(x), -1, -1)


FUNCTIONS = {
    "linear": lambda m, x: linear(x, m.a.weight, m.a.bias),
    "by keywords": lambda m, x: linear(input=x, weight=m.a.weight, bias=m.a.bias),
    "matmul": lambda m, x: x @ m.a.weight.T + m.a.bias,
    "bias first": lambda m, x: m.a.bias + torch.matmul(x, m.a.weight.t()),
    "bias in place": lambda m, x: biased(m.a, x),
    "addmm": lambda m, x: torch.addmm(m.a.bias, x.flatten(0, -2), m.a.weight.mT).view_as(x),
    "einsum": lambda m, x: torch.einsum("...i,oi->...o", x, m.a.weight) + m.a.bias,
    "einsum of a weight first": lambda m, x: (
        m.a.bias + torch.einsum("oi, ...i -> ...o", m.a.weight, x)
    ),
    "einsum of a turned weight": lambda m, x: (
        torch.einsum("...i,io->...o", x, m.a.weight.T) + m.a.bias
    ),
    "bmm": lambda m, x: (
        torch.bmm(x.view(len(x), -1, D), for_all(m.a.weight.T, x)) + m.a.bias
    ).view_as(x),
    "inner": lambda m, x: torch.inner(x, m.a.weight) + m.a.bias,
    "called by parameters": lambda m, x: functional_call(m.a, dict(m.a.named_parameters()), x),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("inputs", [vectors, sequences])
def test_a_linear_layer_by_functions_is_the_layer(name, inputs, device):
    """All rows are, so that every approximation is."""
    modules, X = {"a": Linear(D, D), "b": Linear(D, C)}, inputs(device)
    y = torch.randn(*X.shape[:-1], C, device=device)
    model = Net(lambda m, x: m.b(relu_(FUNCTIONS[name](m, x))), **modules).to(device)
    layers = Net(lambda m, x: m.b(relu_(m.a(x))), **modules).to(device)
    expected = layer_ios(layers, MSELoss(), X, y)
    for block, io in layer_ios(model, MSELoss(), X, y).items():
        check_equal(io.a, expected[block].a)
        check_equal(io.g, expected[block].g)
        check_equal(kfac(io).dense(), kfac(expected[block]).dense())


def by_rows(layer, x):
    """As a projection to queries, keys and values is cut in three."""
    weights, biases = layer.weight.split([1, 2, 1]), layer.bias.split([1, 2, 1])
    first, second = (linear(x, w, b) for w, b in zip(weights[:2], biases[:2], strict=True))
    return torch.cat([first, second, x @ weights[2].T + biases[2]], -1)


PARTS = {
    "rows one after another": lambda m, x: by_rows(m.a, x),
    "rows that overlap": lambda m, x: (
        m.a(x) + linear(x.sin(), m.a.weight[1:3]).repeat_interleave(2, -1)
    ),
    "some rows alone": lambda m, x: linear(x, m.a.weight[:2], m.a.bias[:2]).repeat_interleave(
        2, -1
    ),
    "rows without their bias": lambda m, x: m.a(x) * linear(x, m.a.weight[1:2]),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("inputs", [vectors, sequences])
def test_rows_of_a_weight_are_exact(name, inputs, device):
    def forward(m, x):
        h = relu_(PARTS[name](m, x))
        return m.b(h.mean(1) if h.ndim == 3 else h)

    check_exact(Net(forward, **two()).to(device), inputs(device), device)


def test_rows_of_a_layer_are_the_layer_in_the_reduced_flavour(device):
    modules, X, y = two(), sequences(device), torch.randn(N, S, C, device=device)
    found, expected = (
        layer_ios(Net(way, **modules).to(device), MSELoss(), X, y, flavour=REDUCE)
        for way in (lambda m, x: m.b(by_rows(m.a, x).tanh()), lambda m, x: m.b(m.a(x).tanh()))
    )
    for block, io in found.items():
        check_equal(io.a, expected[block].a)
        check_equal(io.g, expected[block].g)


def test_some_channels_of_a_kernel_are_exact(device):
    def forward(m, x):
        wide = m.a(x)
        return m.b(
            (wide + conv2d(x, m.a.weight[:2], m.a.bias[:2]).repeat(1, 2, 1, 1)).tanh().mean((2, 3))
        )

    model = Net(forward, a=Conv2d(2, 4, 2), b=Linear(4, C)).to(device)
    check_exact(model, torch.randn(N, 2, 4, 3, device=device), device)


COLUMNS = {
    "matmul from the left": lambda W, x: W @ x,
    "bmm from the left": lambda W, x: torch.bmm(for_all(W, x), x),
    "einsum": lambda W, x: torch.einsum("nis,oi->nos", x, W),
    "einsum of a weight first": lambda W, x: torch.einsum("oi,nis->nos", W, x),
    "einsum to positions first": lambda W, x: torch.einsum("nis,oi->sno", x, W).permute(1, 2, 0),
    "einsum to outputs first": lambda W, x: torch.einsum("oi,nis->ons", W, x).movedim(0, 1),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_weight_that_meets_columns_is_the_layer(name, device):
    """What follows may write into the result, which is laid out as the function makes it."""
    modules = {"a": Linear(D, D + 1, bias=False), "b": Linear(D + 1, C)}
    X, y = sequences(device, N, S), torch.randn(N, S, C, device=device)
    W = modules["a"].to(device).weight
    assert [COLUMNS[name](W, X.mT).stride()] == seen_strides(COLUMNS[name], modules["a"], X)
    model = Net(lambda m, x: m.b(relu_(COLUMNS[name](m.a.weight, x.mT)).mT), **modules).to(device)
    layers = Net(lambda m, x: m.b(relu_(m.a(x))), **modules).to(device)
    expected = layer_ios(layers, MSELoss(), X, y)
    for block, io in layer_ios(model, MSELoss(), X, y).items():
        check_equal(io.a, expected[block].a)
        check_equal(io.g, expected[block].g)


def seen_strides(function, layer, X):
    """Those of what a function gives while it is recorded."""
    found = []

    def forward(m, x):
        z = function(m.a.weight, x.mT)
        found.append(z.stride())
        return z

    recorded(model := Net(forward, a=layer), X, layer_groups(model))
    return found


def test_products_of_samples_columns_are_exact(device):
    """The batch itself may be the columns."""
    model = Net(
        lambda m, x: m.b((m.a.weight @ x.T).T.tanh()), a=Linear(D, D, bias=False), b=Linear(D, C)
    )
    check_exact(model.to(device), vectors(device), device)


EQUATIONS = {
    "a sum over positions": lambda m, x: torch.einsum("nsi,oi->no", x, m.a.weight).unsqueeze(1),
    "an entry for each output": lambda m, x: torch.einsum("nso,oi->nso", x, m.a.weight),
    "three operands": lambda m, x: torch.einsum("nsi,oi,o->nso", x, m.a.weight, m.a.weight[0]),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_other_equations_are_refused(name, device):
    model = Net(lambda m, x: m.b(m.a(x) + EQUATIONS[name](m, x)), **two()).to(device)
    with pytest.raises(NotImplementedError, match=r"'a\.weight' is not"):
        layer_ios(model, MSELoss(), sequences(device), torch.randn(N, S, C, device=device))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("setting", [{}, {"stride": 2}, {"padding": "same"}, {"dilation": (2,)}])
def test_a_convolution_by_functions_is_the_layer(setting, groups, device):
    conv = Conv1d(4, 6, 3, groups=groups, **setting).to(device)
    X = torch.randn(N, 4, 7, device=device)
    settings = {"groups": groups} | setting
    written = lambda m, x: conv1d(x, m.a.weight, m.a.bias, **settings).tanh().mean(2)  # noqa: E731
    y = torch.randn(N, 6, device=device)
    expected = layer_ios(Net(lambda m, x: m.a(x).tanh().mean(2), a=conv), MSELoss(), X, y)
    for block, io in layer_ios(Net(written, a=conv), MSELoss(), X, y).items():
        check_equal(io.a, expected[block].a)
        check_equal(io.g, expected[block].g)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("setting", [{}, {"stride": 2, "output_padding": 1}, {"padding": (1,)}])
def test_a_transposed_convolution_by_functions_is_the_layer(setting, groups, device):
    layer = ConvTranspose1d(4, 6, 3, groups=groups, **setting).to(device)
    X, y = torch.randn(N, 4, 5, device=device), torch.randn(N, 6, device=device)
    settings = {"groups": groups} | setting
    ways = (
        lambda m, x: m.a(x).tanh().mean(2),
        lambda m, x: conv_transpose1d(x, m.a.weight, m.a.bias, **settings).tanh().mean(2),
    )
    expected, found = (layer_ios(Net(way, a=layer), MSELoss(), X, y) for way in ways)
    for block, io in found.items():
        check_equal(io.a, expected[block].a)
        check_equal(io.g, expected[block].g)


def test_an_autoencoder_with_transposed_convolutions_is_exact(device):
    """Also behind another layer, with and without positions that overlap."""
    model = Sequential(
        Conv2d(1, 3, 3, stride=2),
        Tanh(),
        ConvTranspose2d(3, 2, 3, stride=2),
        Tanh(),
        ConvTranspose2d(2, 1, 2, padding=1, dilation=2),
        nn.Flatten(),
        Linear(25, C),
    ).to(device)
    check_exact(model, torch.randn(N, 1, 5, 5, device=device), device)


def test_a_kernel_that_is_used_both_ways_is_refused(device):
    """No `W` describes a convolution and the transposed one."""

    def forward(m, x):
        return m.b(conv_transpose1d(m.a(x).tanh(), m.a.weight).flatten(1))

    model = Net(forward, a=Conv1d(2, 3, 3), b=Linear(2 * 5, C)).to(device)
    X, y = torch.randn(N, 2, 5, device=device), torch.randn(N, C, device=device)
    with pytest.raises(NotImplementedError, match=r"'a\.weight' is not"):
        layer_ios(model, MSELoss(), X, y)
    layers = Sequential(Conv1d(2, 3, 3), ConvTranspose1d(3, 2, 3))
    layers[1].weight = layers[0].weight
    with pytest.raises(NotImplementedError, match="'0' and '1' share a weight"):
        layer_groups(layers)


def test_an_embedding_by_functions_is_the_layer(device):
    model = Net(
        lambda m, x: m.b(embedding(x, m.a.weight, -5).tanh().mean(1)),
        a=nn.Embedding(7, D),
        b=Linear(D, C),
    ).to(device)
    X, y = torch.randint(7, (N, S), device=device), torch.randn(N, C, device=device)
    exact = diagonal_blocks(model, ggn(model, MSELoss(), X, y))
    for block, io in layer_ios(model, MSELoss(), X, y).items():
        check_equal(io.block(), exact[block])


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
def test_words_of_int32_are_words(flavour, device):
    model = Sequential(nn.Embedding(7, D), Tanh(), Linear(D, C)).to(device)
    X, y = torch.randint(7, (N, S), device=device), torch.randn(N, S, C, device=device)
    expected = layer_ios(model, MSELoss(), X, y, flavour=flavour)
    for block, io in layer_ios(model, MSELoss(), X.int(), y, flavour=flavour).items():
        check_equal(io.a + 0, expected[block].a + 0)
        check_equal(io.g, expected[block].g)


@pytest.mark.parametrize("dtype", [torch.int32, torch.long])
def test_rows_of_a_table_by_numbers_are_an_embedding(dtype, device):
    """Negative numbers count from the end."""
    modules = {"a": nn.Embedding(7, D), "b": Linear(D, C)}
    X, y = torch.randint(7, (N, S), device=device), torch.randn(N, C, device=device)
    X[0] -= 7
    X = X.to(dtype)
    ways = (lambda m, x: m.a(x % 7), lambda m, x: m.a.weight[x])
    expected, found = (
        layer_ios(
            Net(lambda m, x, way=way: m.b(way(m, x).tanh().mean(1)), **modules).to(device),
            MSELoss(),
            X,
            y,
        )
        for way in ways
    )
    for block, io in found.items():
        check_equal(io.a + 0, expected[block].a + 0)
        check_equal(io.g, expected[block].g)


@pytest.mark.parametrize("index", [(0, 1), slice(2, 4), None, [0, 1], torch.ones(7) > 0])
def test_other_parts_of_a_table_are_no_embedding(index):
    def forward(m, x):
        return m.b(m.a(x).mean(1)) + m.a.weight[index].square().sum()

    model = Net(forward, a=nn.Embedding(7, D), b=Linear(D, C))
    with pytest.raises(NotImplementedError, match=r"'a\.weight' is not"):
        layer_ios(model, MSELoss(), torch.randint(7, (N, S)), torch.randn(N, C))


def test_a_weight_that_several_functions_use_is_one_block(device):
    """Also with settings that differ: a convolution's kernel at two strides."""

    def forward(m, x):
        wide, narrow = m.a(x), conv2d(x, m.a.weight, stride=2)
        return m.b(wide.tanh().mean((2, 3)) + narrow.sin().mean((2, 3)))

    model = Net(forward, a=Conv2d(2, 3, 2), b=Linear(3, C)).to(device)
    check_exact(model, torch.randn(N, 2, 5, 5, device=device), device)


@pytest.mark.parametrize("groups", [1, 3])
def test_a_kernel_in_other_groups_is_exact_or_refused(groups, device):
    """The kernel `[6, 2, 3]` of three groups may be that of one group, but not the other way."""

    def forward(m, x):
        other = conv1d(x[:, :2], m.a.weight) if groups == 3 else conv1d(x, m.a.weight, groups=3)
        return m.b((m.a(x[:, : 2 * groups]) + other).tanh().mean(2))

    model = Net(forward, a=Conv1d(2 * groups, 6, 3, groups=groups), b=Linear(6, C)).to(device)
    X = torch.randn(N, 6, 5, device=device)
    if groups == 3:
        check_exact(model, X, device)
    else:
        with pytest.raises(NotImplementedError, match=r"'a\.weight' is not"):
            layer_ios(model, MSELoss(), X, torch.randn(N, C, device=device))


def test_a_weight_that_is_stored_in_another_order_is_found(device):
    model = Sequential(Conv2d(2, 3, 2), Tanh(), nn.Flatten(), Linear(27, C)).to(device)
    model = model.to(memory_format=torch.channels_last)
    X = torch.randn(N, 2, 4, 4, device=device).to(memory_format=torch.channels_last)
    check_exact(model, X, device)


def test_a_subclass_that_scales_its_output_is_exact(device):
    """What follows the product with the weight is no part of the layer."""

    class Scaled(Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    check_exact(Sequential(Scaled(D, C)).to(device), vectors(device), device)


def test_other_views_of_a_weight_are_refused(device):
    def forward(m, x):
        return m.b((m.a(x) + linear(x, m.a.weight.flip(0)) + m.a.weight.diagonal()).tanh())

    model = Net(forward, a=Linear(D, D), b=Linear(D, C)).to(device)
    with pytest.raises(NotImplementedError, match=r"'a\.weight' is not"):
        layer_ios(model, MSELoss(), vectors(device), torch.randn(N, C, device=device))


def test_an_embeddings_weight_in_a_product_is_refused(device):
    """Its rows are words; those of a product are any numbers, and no value holds both."""

    def forward(m, t):
        h = m.a(t)
        return m.b((h + linear(h[..., :1].expand(*h.shape[:-1], 7), m.a.weight.T)).mean(1))

    model = Net(forward, a=nn.Embedding(7, D), b=Linear(D, C)).to(device)
    X, y = torch.randint(7, (N, S), device=device), torch.randn(N, C, device=device)
    with pytest.raises(NotImplementedError, match=r"'a\.weight' is not"):
        layer_ios(model, MSELoss(), X, y)


@pytest.mark.slow
def test_compiled_models_are_exact():
    layers = Sequential(Linear(D, D), Tanh(), Linear(D, C))
    compiled = torch.compile(layers, backend="eager")
    X, y = vectors(torch.device("cpu")), torch.randn(N, C)
    expected = layer_ios(layers, MSELoss(), X, y)
    compiled(X)
    for name, io in layer_ios(compiled, MSELoss(), X, y).items():
        check_equal(io.g, expected[name.removeprefix("_orig_mod.")].g)
    layers.compile(backend="eager")
    for name, io in layer_ios(layers, MSELoss(), X, y).items():
        check_equal(io.g, expected[name].g)


# ---- nothing is left behind, nothing is copied without need --------------------------------------


def test_capture_registers_no_hooks_and_leaves_no_mode(device):
    model, seen = Sequential(Linear(D, D), Tanh(), Linear(D, C)).to(device), []

    class Looks(Module):
        def forward(self, x):
            seen.append([len(m._forward_hooks) for m in model.modules()])
            return x

    before = modes()
    model.append(Looks())
    plan(model, vectors(device))
    assert seen
    assert not any(map(any, seen))
    assert modes() == before


def modes():
    return torch._C._len_torch_function_stack()


def turned(layer, x):
    """A linear layer whose result has its axes in another order."""
    return torch.einsum("...i,oi->o...", x, layer.weight).movedim(0, -1) + layer.bias


@pytest.mark.parametrize("inputs", [vectors, sequences])
def test_only_outputs_that_are_views_in_another_order_are_copied(inputs, device):
    """A view that is written to later would be cut out of the graph, but what it reshapes not."""
    X, copies = inputs(device), []
    for output in (lambda m, x: m.a(x), lambda m, x: turned(m.a, x)):
        model = Net(output, a=Linear(D, C)).to(device)
        f, calls = recorded(model, X, layer_groups(model))
        copies.append([n for n in nodes(f) if n.name() == "CloneBackward0"])
        assert calls["a"][-1].edge.node in nodes(f)
    assert not copies[0]
    assert copies[1]


def nodes(f):
    """All nodes of a graph."""
    found, todo = [], [f.grad_fn]
    while todo:
        node = todo.pop()
        found.append(node)
        todo += [n for n, _ in node.next_functions if n is not None]
    return found


WRITTEN = {
    "all": relu_,
    "scaled": lambda z: z.mul_(2.0),
    "a part": lambda z: (z[:, :1].mul_(3.0), z)[1],
    "a part of another view": lambda z: (z.view(-1, C)[::2].sin_(), z)[1],
    "a part twice": lambda z: (z[:, 1:].mul_(2.0), z[..., 1:].sin_(), z)[2],
    "replaced in part": lambda z: (z[:, 1].zero_(), z)[1],
    "and a view is used": lambda z: z.view(-1, C).mul_(z.detach().clone().view(-1, C)).view_as(z),
    "after a use": lambda z: z + z.view(-1, C).sum(-1).exp().view(*z.shape[:-1], 1) + z.cos_(),
}


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_into_an_output_of_several_axes_is_no_part_of_the_layer(
    name, chunk, device
):
    """As if the output had been copied first."""
    modules, X = {"a": Linear(D, C), "b": Linear(C, C)}, sequences(device)
    y, write = torch.randn(*X.shape[:-1], C, device=device), WRITTEN[name]
    model = Net(lambda m, x: m.b(write(m.a(x))), **modules).to(device)
    copied = Net(lambda m, x: m.b(write(m.a(x).clone())), **modules).to(device)
    expected = layer_ios(copied, MSELoss(), X, y)
    for block, io in layer_ios(model, MSELoss(), X, y, chunk=chunk).items():
        check_equal(io.a, expected[block].a)
        check_equal(io.g, expected[block].g)
        check_equal(io.block(), diagonal_blocks(copied, ggn(copied, MSELoss(), X, y))[block])


@pytest.mark.parametrize(
    ("view", "whole"),
    [
        (lambda p, z: z.view(2, -1), True),
        (lambda p, z: z.unsqueeze(1), True),
        (lambda p, z: z, False),
        (lambda p, z: z[:2], False),
        (lambda p, z: z.mT, False),
        (lambda p, z: z.mT.mT.diagonal(), False),
        (lambda p, z: p.view(2, -1), False),
    ],
)
def test_a_view_of_all_that_was_computed_is_told_from_a_part_and_a_parameter(view, whole):
    p = nn.Parameter(torch.randn(4, 4))
    assert _is_reshaped(view(p, p * 2)) == whole
