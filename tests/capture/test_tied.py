"""A weight that an embedding and a linear layer share, as most language models have it."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import CrossEntropyLoss, Embedding, Linear, Module, MSELoss

import kfac_scratch as ks
from kfac_scratch import EXPAND, REDUCE, TiedIO, empirical, kfac, kfac_over, layer_ios, stream
from kfac_scratch.approximations.skfac import skfac
from kfac_scratch.curvature import diagonal_blocks, empirical_fisher, ggn
from kfac_scratch.layer_io import concatenate
from tests.laws import check_equal, error

N, S, D, WORDS, PAD = 5, 3, 4, 7, 0


class Language(Module):
    """A language model of one block; its head has the embedding's weight."""

    def __init__(self, bias=False, head_first=False, padding_idx=None):
        super().__init__()
        head = Linear(D, WORDS, bias=bias)
        if head_first:
            self.head = head
        self.words = Embedding(WORDS, D, padding_idx=padding_idx)
        self.block = nn.TransformerEncoderLayer(D, 2, D + 1, dropout=0.0, batch_first=True)
        self.head = head
        self.head.weight = self.words.weight

    def forward(self, t):
        mask = torch.full((t.shape[1],) * 2, -torch.inf, device=t.device).triu(1)
        mask = mask.to(self.words.weight.dtype)
        return self.head(self.block(self.words(t), src_mask=mask)).transpose(1, 2)


class TwoHeads(Module):
    """Two embeddings and two heads with biases of their own, all of one weight."""

    def __init__(self):
        super().__init__()
        self.words, self.others = Embedding(WORDS, D), Embedding(WORDS, D)
        self.inner = Linear(D, D)
        self.first, self.second = Linear(D, WORDS), Linear(D, WORDS)
        for layer in (self.others, self.first, self.second):
            layer.weight = self.words.weight

    def forward(self, t):
        h = self.inner(self.words(t) + self.others(t.flip(1)).sin()).tanh()
        h = self.words(t) * h
        return (self.first(h) + self.second(h.tanh())).transpose(1, 2)


MODELS = {
    "tied": Language,
    "tied, with a bias": partial(Language, bias=True),
    "head first": partial(Language, bias=True, head_first=True),
    "padding row": partial(Language, padding_idx=PAD),
    "two embeddings and two heads": TwoHeads,
}
each_model = pytest.mark.parametrize("name", MODELS)
pytestmark = pytest.mark.filterwarnings("ignore:No block covers")


def setting(name, device, dtype=torch.float64):
    torch.manual_seed(0)
    model = MODELS[name]().to(device, dtype)
    X = torch.randint(WORDS, (N, S), device=device)
    return model, CrossEntropyLoss(), X, torch.randint(WORDS, (N, S), device=device)


def tied_of(ios):
    ((name, io),) = ((name, io) for name, io in ios.items() if isinstance(io, TiedIO))
    return name, io


@each_model
def test_all_blocks_are_exact(name, device):
    args = setting(name, device)
    for exact, fisher in ((ggn, ks.type2), (empirical_fisher, empirical)):
        ios = layer_ios(*args, fisher)
        block = diagonal_blocks(args[0], exact(*args))
        assert ios.keys() == block.keys()
        for layer, io in ios.items():
            check_equal(io.block(), block[layer])


def with_turned(direct, turned, io):
    """A matrix on the linear layers' weight and biases, plus one on the embeddings' weight."""
    d_out, d_in = io.direct.g.shape[-1], io.direct.a.shape[-1]
    index = torch.arange(d_out * d_in, device=direct.device).unflatten(0, (d_out, d_in))
    places = index[:, : io.turned.g.shape[-1]].T.flatten()
    whole = direct.clone()
    whole[places.unsqueeze(1), places] += turned
    return whole


@each_model
def test_the_blocks_of_both_uses_are_not_the_whole(name, device):
    """So that no test passes which looks at the uses one by one."""
    args = setting(name, device)
    layer, io = tied_of(layer_ios(*args))
    apart = with_turned(io.direct.block(), io.turned.block(), io)
    assert error(apart, diagonal_blocks(args[0], ggn(*args))[layer]) > 1e-2
    silent = [ks.LayerIO(part.a, 0 * part.g) for part in io.parts]
    one_by_one = TiedIO(io.direct, silent[1]).block() + TiedIO(silent[0], io.turned).block()
    check_equal(one_by_one, apart)


@each_model
def test_the_methods_agree_with_the_gradients(name, device):
    _, io = tied_of(layer_ios(*setting(name, device)))
    G = io.gradients()
    check_equal(io.block(), torch.einsum("vno,vnp->op", G.flatten(2), G.flatten(2)))
    V, c = torch.randn_like(G[0, :2]), torch.randn_like(G[:, :, 0, :2]).movedim(2, 0)
    check_equal(io.inner_products(V), torch.einsum("boi,vnoi->bvn", V, G))
    check_equal(io.combination(c), torch.einsum("bvn,vnoi->boi", c, G))
    check_equal(io.folded().gradients(), G.flatten(0, 1).unsqueeze(0))
    assert all(part.g.shape[2] == 1 for part in io.reduced().parts)


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@each_model
def test_kfac_is_the_sum_of_both_uses(name, flavour, device):
    args = setting(name, device)
    layer, io = tied_of(layer_ios(*args, flavour=flavour))
    M = kfac(io)
    check_equal(M.dense(), with_turned(*(kfac(part).dense() for part in io.parts), io))
    assert error(M.dense(), diagonal_blocks(args[0], ggn(*args))[layer]) > 1e-2


def test_kfac_is_exact_where_each_use_has_one_input(device):
    """And no vector reaches both."""
    g, h = torch.randn(2, 1, 1, WORDS, device=device), torch.randn(2, 1, 1, D, device=device)
    g[0], h[1] = 0.0, 0.0
    io = TiedIO(
        ks.LayerIO(torch.randn(1, 1, D, device=device), g),
        ks.LayerIO(torch.eye(WORDS, device=device)[None, 2:3], h),
    )
    check_equal(kfac(io).dense(), io.block())


@each_model
def test_damped_inverses_solve(name, device):
    model, *data = setting(name, device)
    ios = layer_ios(model, *data)
    _, io = tied_of(ios)
    M, V = kfac(io), torch.randn_like(io.gradients()[0, 0])
    step = M.inverse(0.1) @ V
    assert error(M @ step + 0.1 * step, V) < 1e-8
    assert error(ks.guarded(M, 0.1) @ (ks.guarded_inverse(M, 0.1) @ V), V) < 1e-8
    maps = {n: kfac(of).inverse(0.1) for n, of in ios.items()}
    moved = ks.preconditioner(model, maps, rest=lambda v: v)(
        {n: torch.randn_like(p) for n, p in model.named_parameters()}
    )
    assert all(moved[n].shape == p.shape for n, p in model.named_parameters())


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("chunk", [None, 2])
@each_model
def test_kfac_over_batches_is_that_of_all_data(name, chunk, flavour, device):
    model, loss, X, y = setting(name, device)
    batches = [(X[:2], y[:2]), (X[2:], y[2:])]
    over = kfac_over(model, loss, batches, flavour=flavour, chunk=chunk)
    layer, io = tied_of(layer_ios(model, loss, X, y, flavour=flavour))
    check_equal(over[layer].dense(), kfac(io).dense())


def test_parts_of_a_stream_are_the_whole(device):
    args = setting("tied, with a bias", device)
    name, whole = tied_of(layer_ios(*args, chunk=1000))
    parts = [part[name] for part in stream(*args, chunk=2)]
    assert len(parts) > 1
    check_equal(sum(part.block() for part in parts), whole.block())
    check_equal(tied_of(layer_ios(*args, chunk=2))[1].block(), whole.block())


def test_padding_is_in_no_mean(device):
    model, loss, X, y = setting("tied, with a bias", device)
    mask = torch.arange(S, device=device) < torch.tensor([[1], [3], [2], [3], [1]], device=device)
    X, y, loss = X.where(mask, PAD), y.where(mask, -1), CrossEntropyLoss(ignore_index=-1)
    name, io = tied_of(layer_ios(model, loss, X, y, counted=lambda X, y: mask))
    plain = layer_ios(model, loss, X, y)[name]
    check_equal(io.block(), plain.block())
    assert [int(part.rows) for part in io.parts] == [int(mask.sum())] * 2
    assert [part.rows for part in plain.parts] == [mask.numel()] * 2


@each_model
def test_single_precision_stays(name, device):
    model, *data = setting(name, device, torch.float32)
    layer, io = tied_of(layer_ios(model, *data))
    assert io.block().dtype == torch.float32
    exact = diagonal_blocks(model.double(), ggn(model, *data))[layer]
    assert error(io.block().double(), exact) < 1e-4


OTHERS = {
    "foof": ks.foof,
    "ekfac": ks.ekfac,
    "ekfac_reduce": ks.ekfac_reduce,
    "tkfac": ks.tkfac,
    "tekfac": ks.tekfac,
    "kpsvd": ks.kpsvd,
    "deflation": ks.deflation,
    "lanczos": ks.lanczos,
    "kfac_corrected": ks.kfac_corrected,
    "shampoo": ks.shampoo_bound,
    "one-sided": ks.one_sided,
    "kl-shampoo": lambda io: ks.kl_factors(io, 0.1),
    "soap": lambda io: ks.OfBatch(ks.soap()).update(None, io, 1.0),
    "skfac": skfac,
    "cg_fac": ks.cg_fac,
    "randomized": ks.randomized(rank=2),
    "brand": lambda io: ks.Brand(rank=2).update(None, io, 1.0),
    "mini blocks": ks.mini_block,
    "mini blocks of rows": ks.mini_block_rows,
    "joined": lambda io: concatenate([io, io], [0.5, 0.5]),
}


@pytest.mark.parametrize("approximation", OTHERS)
def test_other_approximations_are_refused(approximation, device):
    _, io = tied_of(layer_ios(*setting("tied", device)))
    with pytest.raises(NotImplementedError, match=r"share.*io\.direct and io\.turned.*leave both"):
        OTHERS[approximation](io)


def test_it_has_no_moving_average(device):
    _, io = tied_of(layer_ios(*setting("tied", device)))
    with pytest.raises(TypeError, match=r"KroneckerSum has no method mixed.*Latest"):
        ks.MovingAverage(kfac).update(None, io, 0.5)
    check_equal(ks.Latest(kfac).update(None, io, 0.5).dense(), kfac(io).dense())


def test_over_a_loader_other_approximations_are_refused(device):
    model, loss, X, y = setting("tied", device)
    with pytest.raises(NotImplementedError, match="leave both layers out"):
        ks.over_loader(ks.tkfac, model, loss, [(X, y)])


def test_the_optimizer_refuses_and_its_way_out_trains(device):
    """Both uses move together, by the optimizer of the rest."""
    model, loss, X, y = setting("tied", device)
    rest = partial(torch.optim.AdamW, lr=1e-2)
    with pytest.raises(NotImplementedError, match=r"'head' and 'words'.*layers=.*rest=.*untie"):
        ks.KFAC(model, loss, rest=rest)
    inner = [n for n, m in model.block.named_modules() if isinstance(m, Linear)]
    layers = [f"block.{n}" for n in inner if "attn" not in n] + ["block.self_attn"]
    optimizer = ks.KFAC(model, loss, layers=layers, rest=rest)
    before, losses = model.words.weight.detach().clone(), []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        optimizer.observe(X, y)
        optimizer.step()
        losses.append(value.item())
    assert model.head.weight is model.words.weight
    assert not torch.equal(before, model.words.weight)
    assert losses[-1] < losses[0] / 2


def test_a_head_that_is_not_called_is_named(device):
    model, _, X, _ = setting("tied", device)
    model.forward = lambda t: model.block(model.words(t)).mean(1)
    with pytest.raises(ValueError, match=r"'head'.*never ran"):
        layer_ios(model, MSELoss(), X, torch.randn(N, D, device=device))
