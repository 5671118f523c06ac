"""Joint curvature is that of the joined `LayerIO`; the usual mistakes are far from it.

The ranks are threads here, which meet at a barrier: the laws need no processes.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from kfac_scratch import (
    AmortisedEKFAC,
    Brand,
    KLShampoo,
    LayerIO,
    OfBatch,
    Window,
    ekfac,
    ekfac_reduce,
    ekpsvd,
    foof,
    kfac,
    kfac_reduce,
    kpsvd,
    mini_block,
    shampoo_bound,
    skfac,
    tkfac,
)
from kfac_scratch.approximations.estimators import Latest, MovingAverage
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.distributed.joint import JOINT_RULES, joined_layers, joint_update
from kfac_scratch.distributed.ranks import Ranks
from kfac_scratch.layer_io import concatenate
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.one_hot import OneHot

EXACT, FAR = 1e-10, 1e-3
COUNTS = [3, 9, 2]
TERMS = [3.0, 4.0, 2.0]  # some targets of the second rank are ignored


class Threads(Ranks):
    """What `Ranks` does for tensors, between threads."""

    def __init__(self, rank, size, board, barrier):
        self.rank, self.size, self.board, self.barrier = rank, size, board, barrier

    def shared(self, value):
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def summed(self, what, tensors):
        return [sum(parts) for parts in zip(*self.shared(tensors), strict=True)]

    def exchange(self, what, numbers=()):
        return torch.tensor(self.shared([float(number) for number in numbers]))

    def gathered(self, what, rows, counts):
        return torch.cat(self.shared(rows))


def on_ranks(work, shards):
    """What `work(ranks, shard)` returns on every rank."""
    size = len(shards)
    board, barrier = [None] * size, threading.Barrier(size, timeout=20)

    def run(rank):
        try:
            return work(Threads(rank, size, board, barrier), shards[rank])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        runs = [pool.submit(run, rank) for rank in range(size)]
    errors = [error for error in (each.exception() for each in runs) if error is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error  # those who only waited for the others come last
    return [each.result() for each in runs]


def layers(kind, seed=0):
    """A layer on every rank, with the vectors of the loss there."""
    torch.manual_seed(seed)
    S = 1 if kind in ("plain", "words") else 3
    ios = []
    for N in COUNTS:
        a = torch.randn(N, S, 4)
        if kind == "words":
            a = OneHot(torch.randint(4, (N, S)), 4, a.dtype)
        io = LayerIO(a, torch.randn(2, N, S, 3))
        if kind == "padded":
            counted = torch.rand(N, S) < 0.7
            counted[:, 0] = True
            io = LayerIO(a * counted[..., None], io.g * counted[..., None], counted=counted)
        ios.append(io)
    return ios


SHARES = [count / sum(TERMS) for count in TERMS]


def scaled(ios):
    return [replace(io, g=s**0.5 * io.g) for io, s in zip(ios, SHARES, strict=True)]


APPROXIMATIONS = {
    a.__name__: a
    for a in (
        *(kfac, kfac_reduce, tkfac, ekfac, ekfac_reduce, foof, kpsvd, ekpsvd, tekfac),
        *(skfac, mini_block),
    )
}
AVERAGED = ("kfac", "kfac_reduce", "tkfac")
ESTIMATORS = {
    **{f"average of {name}": MovingAverage(APPROXIMATIONS[name]) for name in AVERAGED},
    **{
        f"latest of {name}": Latest(approximation) for name, approximation in APPROXIMATIONS.items()
    },
    "amortised": AmortisedEKFAC(2),
    "amortised tkfac": AmortisedEKFAC(2, MovingAverage(tkfac)),
    "soap": OfBatch(AmortisedEKFAC(2, MovingAverage(tkfac))),
    "shampoo": OfBatch(shampoo_bound),
    "kl-shampoo": OfBatch(KLShampoo(0.1)),
    "window": Window(2),
    "brand": Brand(3),
}
ALIKE = ("plain", "shared", "words")  # of which every estimator makes a matrix


def three_batches(ranks, shards, estimator):
    """The matrix after three batches, on a rank."""
    state = {}
    for io, weight in zip(shards, (1.0, 0.4, 0.3), strict=True):
        state = joint_update(ranks, estimator, state, {"layer": io}, {"layer": weight})
    return state["layer"]


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_matrix_is_that_of_the_joined_batch(name, kind):
    estimator = ESTIMATORS[name]
    rounds = [scaled(layers(kind, seed)) for seed in range(3)]
    found = on_ranks(
        lambda ranks, shards: three_batches(ranks, shards, estimator),
        list(zip(*rounds, strict=True)),
    )
    state = None
    for ios, weight in zip(rounds, (1.0, 0.4, 0.3), strict=True):
        state = estimator.update(state, concatenate(ios, [1.0] * len(ios)), weight)
    V = torch.randn(5, 3, 4)
    for M in found:
        assert_close(M @ V, state @ V)


@pytest.mark.parametrize("name", ["kfac", "kfac_reduce"])
def test_padding_is_left_out_of_the_joint_mean(name):
    ios = scaled(layers("padded"))
    found = on_ranks(lambda ranks, io: JOINT_RULES[APPROXIMATIONS[name]](ranks, {"layer": io}), ios)
    expected = APPROXIMATIONS[name](concatenate(ios, [1.0] * len(ios)))
    for matrices in found:
        assert_close(matrices["layer"].A, expected.A)
        assert_close(matrices["layer"].B, expected.B)


@pytest.mark.parametrize("kind", ["plain", "shared", "words", "padded"])
def test_the_joined_layer_is_the_shards_one_after_another(kind):
    ios = scaled(layers(kind))
    expected = concatenate(ios, [1.0] * len(ios))
    for joint in on_ranks(lambda ranks, io: joined_layers(ranks, {"layer": io})["layer"], ios):
        assert torch.equal(joint.a, expected.a)
        assert torch.equal(joint.g, expected.g)
        if kind == "padded":
            assert torch.equal(joint.counted, expected.counted)


def test_shards_of_other_lengths_cannot_be_joined():
    ios = layers("shared")
    short = replace(ios[1], a=ios[1].a[:, :2], g=ios[1].g[:, :, :2])
    with pytest.raises(ValueError, match=r"'layer' has different numbers of positions.*Pad"):
        on_ranks(lambda ranks, io: joined_layers(ranks, {"layer": io}), [ios[0], short, ios[2]])


def test_a_layer_that_an_approximation_refuses_is_named():
    ios = [LayerIO(io.a[:, :1], io.g[:, :, :1], positions=3) for io in layers("shared")]
    with pytest.raises(ValueError, match="curvature of block 'layer' cannot be estimated"):
        on_ranks(
            lambda ranks, io: joint_update(
                ranks, MovingAverage(tkfac), {}, {"layer": io}, {"layer": 1.0}
            ),
            ios,
        )


def mean_of(matrices):
    return sum(matrices) / len(matrices)


def averaged_factors(ios):
    """Plain means over ranks, as gpauloski/kfac-pytorch takes of both factors."""
    own = [kfac(io) for io in ios]
    return Kronecker(mean_of([K.A for K in own]), mean_of([K.B for K in own]))


def one_weight(ios):
    """The weights of the loss's terms for `A`, too."""
    own = [kfac(io) for io in scaled(ios)]
    A = sum(s * K.A for s, K in zip(SHARES, own, strict=True))
    return Kronecker(A, sum(K.B for K in own))


def own_divisor(ios):
    """Every rank's vectors with the divisor of its own loss, added up."""
    own = [kfac(io) for io in ios]
    rows = [io.rows for io in ios]
    A = sum(n * K.A for n, K in zip(rows, own, strict=True)) / sum(rows)
    return Kronecker(A, sum(K.B for K in own))


def local(ios):
    """No word between the ranks, as in google-deepmind/ferminet#67."""
    return kfac(ios[0])


def averaged_eigen(ios):
    """The mean of eigenvectors and eigenvalues, each rank's of its own."""
    own = [ekfac(io) for io in scaled(ios)]
    return KroneckerEigen(
        mean_of([M.QA for M in own]), mean_of([M.QB for M in own]), sum(M.scale for M in own)
    )


MISTAKES = {
    averaged_factors: kfac,
    one_weight: kfac,
    own_divisor: kfac,
    local: kfac,
    averaged_eigen: ekfac,
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("kind", ["plain", "shared"])
def test_a_known_mistake_is_far_from_the_joint_matrix(mistake, kind):
    ios = layers(kind)
    expected = MISTAKES[mistake](concatenate(scaled(ios), [1.0] * len(ios)))
    V = torch.randn(5, 3, 4)
    wrong, right = mistake(ios) @ V, expected @ V
    assert (wrong - right).abs().max() > FAR * right.abs().max()


def assert_close(actual, expected):
    assert (actual - expected).abs().max() <= EXACT * expected.abs().max()
