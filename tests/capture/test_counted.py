"""Positions that are no part of the data change nothing, and are in no mean."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import CrossEntropyLoss, Embedding, LayerNorm, Linear, Sequential, Tanh

import kfac_scratch as ks
from kfac_scratch import EXPAND, KFAC, REDUCE, FactorSums, LayerIO, layer_ios, over_loader, stream
from kfac_scratch.approximations.kfac import kfac_in_full
from kfac_scratch.approximations.skfac import (
    at_positions,
    mean_over_positions,
    push_through,
    skfac,
)
from kfac_scratch.layer_io import concatenate
from tests.laws import check_differs, check_equal, error

N, T, WORDS, D, PAD, IGNORED = 5, 7, 6, 4, 0, -100
LENGTHS = (7, 3, 1, 4, 2)
LOSS = CrossEntropyLoss()  # ignores -100


def is_word(X, y):
    return X != PAD


def sentences(device):
    torch.manual_seed(0)
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    X = torch.randint(1, WORDS, (N, T)).where(mask, PAD)
    y = torch.randint(0, 3, (N, T)).where(mask, IGNORED)
    return X.to(device), y.to(device), mask.to(device)


class Tagger(nn.Module):
    """Classes of every word, on axis 1 as the loss has them."""

    def __init__(self, *between):
        super().__init__()
        self.net = Sequential(Embedding(WORDS, D), *between, Linear(D, 3))

    def forward(self, X):
        return self.net(X).movedim(2, 1)


class Reader(nn.Module):
    """An encoder whose attention reads words only, with or without positions first."""

    def __init__(self, batch_first=True, masked=True):
        super().__init__()
        self.words, self.masked, self.batch_first = Embedding(WORDS, D), masked, batch_first
        self.encoder = nn.TransformerEncoderLayer(D, 2, 8, 0.0, batch_first=batch_first)
        self.head = Linear(D, 3)

    def forward(self, X):
        x = self.words(X)
        padding = X == PAD if self.masked else None
        x = x if self.batch_first else x.transpose(0, 1)
        z = self.head(self.encoder(x, src_key_padding_mask=padding))
        return (z if self.batch_first else z.transpose(0, 1)).movedim(2, 1)


def tagger():
    return Tagger(Linear(D, D), Tanh(), Linear(D, D), Tanh())


NETS = {
    "tagger": tagger,
    "with a norm": lambda: Tagger(Linear(D, D), LayerNorm(D), Tanh()),
    "attention": Reader,
    "attention, positions first": partial(Reader, batch_first=False),
}
ENCODER = ["self_attn", "self_attn.out_proj", "linear1", "linear2", "norm1", "norm2"]
IN_READER = ["words", *(f"encoder.{name}" for name in ENCODER), "head"]
NAMED = {
    "with a norm": ["net.0", "net.1", "net.2", "net.4"],
    "attention": IN_READER,
    "attention, positions first": IN_READER,
}


def made(name, device):
    torch.manual_seed(1)
    return NETS[name]().to(device)


def captured(name, device, X, y, **options):
    return layer_ios(made(name, device), LOSS, X, y, layers=NAMED.get(name), **options)


def with_other_padding(X, mask):
    """The same words, and other tokens in the padding."""
    return torch.where(mask, X, torch.randint_like(X, 1, WORDS))


def of_words(io, mask):
    """The layer with a sample for every word: what KFAC averages over if there is no padding."""
    return LayerIO(io.a[mask].unsqueeze(1), io.g[:, mask].unsqueeze(2))


def words_of(io, mask):
    return mask if io.a.shape[1] == T else mask.new_ones(io.a.shape[:2])


# ---- the theorem ------------------------------------------------------------------------------


@pytest.mark.everywhere
@pytest.mark.parametrize("name", NETS)
def test_kfac_is_that_of_the_words_alone(name, device):
    X, y, mask = sentences(device)
    ios, all_ios = captured(name, device, X, y, counted=is_word), captured(name, device, X, y)
    for block, io in ios.items():
        expected = kfac_in_full(of_words(all_ios[block], words_of(io, mask)))
        check_equal(kfac_in_full(io).dense(), expected.dense())
    assert any(error(ks.kfac(ios[b]).dense(), ks.kfac(all_ios[b]).dense()) > 1e-2 for b in ios)


@pytest.mark.parametrize("name", NETS)
def test_the_exact_blocks_stay(name, device):
    X, y, _ = sentences(device)
    ios, all_ios = captured(name, device, X, y, counted=is_word), captured(name, device, X, y)
    for block, io in ios.items():
        check_equal(io.block(), all_ios[block].block())


APPROXIMATIONS = {
    "kfac": ks.kfac,
    "kfac_reduce": ks.kfac_reduce,
    "foof": ks.foof,
    "ekfac": ks.ekfac,
    "ekfac_reduce": ks.ekfac_reduce,
    "tkfac": ks.tkfac,
    "tekfac": ks.tekfac,
    "kpsvd": ks.kpsvd,
    "shampoo": ks.shampoo_bound,
    "one-sided": ks.one_sided,
    "kl-shampoo": partial(ks.kl_factors, damping=0.1, steps=2),
    "soap": lambda io: ks.OfBatch(ks.soap()).update(None, io, 1.0),
    "kfac of the batch": lambda io: ks.kfac(ks.pooled(io)),
    "skfac": skfac,
    "skfac of means": lambda io: skfac(mean_over_positions(io)),
    "cg_fac": ks.cg_fac,
    "randomized": ks.randomized(rank=2),
    "brand": lambda io: ks.Brand(rank=2).update(None, io, 1.0),
    "mini blocks": ks.mini_block_rows,
}
ALONE = {"tkfac", "tekfac", "kpsvd", "cg_fac", "mini blocks"}  # functions of gradients alone
ALONE |= {"shampoo", "one-sided", "kl-shampoo", "soap"}


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_padding_changes_no_approximation(approximation, device):
    X, y, mask = sentences(device)
    other, of = with_other_padding(X, mask), APPROXIMATIONS[approximation]
    assert (other != X).any()
    model = tagger().to(device)
    masked = [layer_ios(model, LOSS, x, y, counted=lambda X, y: mask) for x in (X, other)]
    whole = [layer_ios(model, LOSS, x, y) for x in (X, other)]
    gaps = []
    for block in masked[0]:
        check_equal(*(of(ios[block]).dense() for ios in masked))
        gaps.append(error(*(of(ios[block]).dense() for ios in whole)))
    assert max(gaps) < 1e-10 if approximation in ALONE else max(gaps) > 1e-3


def test_kfac_is_nearer_to_the_exact_blocks_without_the_padding(device):
    """Most positions are padding: with them, the mean of the inputs is nearly that of padding."""
    better = []
    for seed in range(5):
        torch.manual_seed(seed)
        model, lengths = tagger().to(device), torch.randint(1, T // 2 + 1, (20, 1), device=device)
        mask = torch.arange(T, device=device) < lengths
        X = torch.randint(1, WORDS, (20, T), device=device).where(mask, PAD)
        y = torch.randint(0, 3, (20, T), device=device).where(mask, IGNORED)
        ios, whole = layer_ios(model, LOSS, X, y, counted=is_word), layer_ios(model, LOSS, X, y)
        for block in ("net.1", "net.3"):
            exact = whole[block].block()
            gaps = [
                float((ks.kfac(io).dense() - exact).norm() / exact.norm())
                for io in (ios[block], whole[block])
            ]
            better.append(gaps[0] < gaps[1])
    assert all(better)


def test_rows_of_an_embedding_stay_words(device):
    X, y, mask = sentences(device)
    io = captured("tagger", device, X, y, counted=is_word)["net.0"]
    assert isinstance(io.a, ks.OneHot)
    A = ks.kfac(io).A.diagonal()
    check_equal(A, torch.bincount(X[mask], minlength=WORDS) / mask.sum().double())


# ---- flavours, chunks, batches ----------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
def test_the_reduced_flavour_is_the_mean_of_the_words(name, device):
    X, y, mask = sentences(device)
    reduced = captured(name, device, X, y, counted=is_word, flavour=REDUCE)
    for block, io in captured(name, device, X, y, counted=is_word).items():
        here = words_of(io, mask)
        mean = (io.a * here.unsqueeze(-1)).sum(1) / here.sum(1, keepdim=True)
        for way in (reduced[block], io.reduced()):
            check_equal(way.a.squeeze(1), mean)
            check_equal(way.g, io.g.sum(2, keepdim=True))
            assert way.counted.all()


def test_a_sample_without_words_is_in_no_mean(device):
    X, y, _ = sentences(device)
    X, y = X.clone(), y.clone()
    X[1], y[1] = PAD, IGNORED
    left = [0, 2, 3, 4]
    for flavour in (EXPAND, REDUCE):
        io = captured("tagger", device, X, y, counted=is_word, flavour=flavour)["net.1"]
        fewer = captured("tagger", device, X[left], y[left], counted=is_word, flavour=flavour)
        check_equal(ks.kfac(io).dense(), ks.kfac(fewer["net.1"]).dense())
        assert io.a.isfinite().all()


def test_chunks_of_vectors_are_all_of_them(device):
    X, y, _ = sentences(device)
    model, options = tagger().to(device), {"counted": is_word}
    io = layer_ios(model, LOSS, X, y, **options)["net.3"]
    parts = [part["net.3"] for part in stream(model, LOSS, X, y, chunk=4, **options)]
    check_equal(torch.cat([part.g for part in parts]), io.g)
    assert all(torch.equal(part.a, io.a) for part in parts)
    assert all(torch.equal(part.counted, io.counted) for part in parts)


@pytest.mark.parametrize("gather", [FactorSums(), ks.kfac, ks.ekfac], ids=["sums", "kfac", "ekfac"])
@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
def test_batches_are_one_batch(gather, flavour, device):
    if flavour is REDUCE and gather is ks.ekfac:
        pytest.skip("EKFAC refuses reduced layers")
    X, y, _ = sentences(device)
    model, options = tagger().to(device), {"counted": is_word, "flavour": flavour}
    whole = layer_ios(model, LOSS, X, y, **options)
    batches = [(X[:1], y[:1]), (X[1:4], y[1:4]), (X[4:], y[4:])]
    approximation = ks.ekfac if gather is ks.ekfac else ks.kfac
    for name, M in over_loader(gather, model, LOSS, batches, **options).items():
        check_equal(M.dense(), approximation(whole[name]).dense())


def test_sums_take_batches_of_other_lengths(device):
    X, y, _ = sentences(device)
    model, options = tagger().to(device), {"counted": is_word}
    whole = layer_ios(model, LOSS, X, y, **options)
    batches = [(X[:1], y[:1]), (X[1:, :4], y[1:, :4])]  # the others have at most four words
    for name, M in over_loader(FactorSums(), model, LOSS, batches, **options).items():
        check_equal(M.dense(), ks.kfac(whole[name]).dense())


def test_joined_layers_keep_what_is_counted(device):
    X, y, _ = sentences(device)
    io = captured("tagger", device, X, y, counted=is_word)["net.1"]
    whole = replace(io, counted=None)
    joined = concatenate([io, whole], [0.5, 0.5])
    assert joined.counted.sum() == io.counted.sum() + N * T
    check_equal(ks.kfac(concatenate([io, io], [0.5, 0.5])).dense(), ks.kfac(io).dense())


def test_chosen_positions_keep_what_is_counted(device):
    X, y, mask = sentences(device)
    io = captured("tagger", device, X, y, counted=is_word)["net.1"]
    some = at_positions(io, torch.tensor([0, 2, 5], device=device))
    assert torch.equal(some.counted, mask[:, [0, 2, 5]])
    check_equal(ks.kfac(some).A, ks.kfac(of_words(io, io.counted & _at(mask, [0, 2, 5]))).A)


def _at(mask, positions):
    chosen = torch.zeros_like(mask)
    chosen[:, positions] = True
    return chosen


def test_the_step_for_the_own_gradient_is_that_of_the_factors(device):
    X, y, _ = sentences(device)
    io = captured("tagger", device, X, y, counted=is_word)["net.1"]
    c = torch.randn(io.g.shape[:2], device=device)
    K, gradient = ks.kfac(io), io.combination(c)
    A, B = (M + 0.1 * torch.eye(len(M), device=device) for M in (K.A, K.B))
    expected = torch.linalg.solve(B, torch.linalg.solve(A, gradient, left=False))
    check_equal(push_through(io, c, 0.1, 0.1), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_of_rows_is_as_precise_as_they_are(dtype, device):
    a = torch.ones(3, 1, 2, dtype=dtype, device=device)
    io = LayerIO(
        a, torch.ones_like(a)[None], counted=torch.ones(3, 1, dtype=torch.bool, device=device)
    )
    assert io.rows.dtype == dtype
    assert float(skfac(io).UA.square().sum()) == pytest.approx(2, abs=4 * torch.finfo(dtype).eps)


# ---- training ---------------------------------------------------------------------------------


def trained(model, X, y, **options):
    torch.manual_seed(2)
    optimizer = KFAC(model, LOSS, lr=0.1, damping=1e-2, controls=[], **options)
    for _ in range(4):
        optimizer.zero_grad()
        optimizer.observe(X, y)
        LOSS(model(X), y).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_optimizer_does_not_see_the_padding(device):
    X, y, mask = sentences(device)
    other = with_other_padding(X, mask)

    def runs(**options):
        return [trained(made("tagger", device), x, y, **options) for x in (X, other)]

    check_equal(*runs(counted=lambda X, y: y != IGNORED))
    check_differs(*runs())


# ---- what is refused --------------------------------------------------------------------------


def test_a_position_that_others_read_must_be_counted(device):
    X, y, _ = sentences(device)
    model = Reader(masked=False).to(device)
    with pytest.raises(ValueError, match=r"sample 1 is not counted.*'words'.*key_padding_mask"):
        layer_ios(model, LOSS, X, y, counted=is_word, layers=IN_READER)


def test_a_position_that_the_loss_reads_must_be_counted(device):
    X, y, _ = sentences(device)
    for flavour in (EXPAND, REDUCE):
        with pytest.raises(ValueError, match=r"Position 3 of sample 1 is not counted.*'net.0'"):
            layer_ios(
                tagger().to(device), LOSS, X, y.clamp(min=0), counted=is_word, flavour=flavour
            )


@pytest.mark.parametrize(
    ("counted", "refusal", "words"),
    [
        (lambda X, y: (X != PAD).double(), TypeError, "a mask of booleans, not of torch.float64"),
        (lambda X, y: [1], TypeError, "counted must return a mask.*list"),
        (lambda X, y: (X != PAD)[:2], ValueError, r"shape \(2, 7\), not \[N, T\] with N = 5"),
        (lambda X, y: (X != PAD)[0], ValueError, r"shape \(7,\), not \[N, T\]"),
        (lambda X, y: (X != PAD)[:, :3], ValueError, r"T = 3 positions.*theirs are \[7\]"),
    ],
)
def test_a_mask_that_is_none_is_refused(counted, refusal, words, device):
    X, y, _ = sentences(device)
    with pytest.raises(refusal, match=words):
        layer_ios(tagger().to(device), LOSS, X, y, counted=counted)
