"""Mistakes about factors: what is averaged, in which precision, over which mini-batches."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kfac_scratch.conformance.protocol import DenseAnswer, KroneckerAnswer, LayerBlock
from kfac_scratch.conformance.selftest.museum.naive import Batch, Mix
from kfac_scratch.conformance.selftest.museum.piece import Piece

PLACE = 3  # of the room


def input_factor(a: Tensor, positions: int) -> Tensor:
    """Wrong: a sum over positions for a mean."""
    return torch.einsum("nsi,nsj->ij", a, a) / len(a)


POSITIONS = Piece(
    "positions",
    "a sum over positions for a mean",
    "input_factor",
    input_factor,
    "The paper on convolutions defines the input factor as a sum over positions and the vector "
    "factor as a mean over them. With one factor from there and one from here, S is in neither "
    "or in both.",
    ("conv2d-plain-per-location-mse-mean", "expand"),
    "tfjgeorge/nngeometry #75",
    "Announced as a fix and taken back in the same thread: the scale was that of the paper. "
    "With its documentation, the verdict on such a library is `scaled`.",
)


def vector_factor(g: Tensor, terms: float) -> Tensor:
    """Wrong: the square of a sum over data."""
    g = g.sum(1, keepdim=True)
    return torch.einsum("vnso,vnsp->op", g, g) / terms


CROSS_TERMS = Piece(
    "cross-terms",
    "the square of a sum over data",
    "vector_factor",
    vector_factor,
    "Summed over the batch is what a backward pass delivers. Its square has products of "
    "different data, which the block does not have.",
    ("mlp-cross-entropy-sum", "expand"),
)


def vector_factor_in_float32(g: Tensor, terms: float) -> Tensor:
    """Wrong: a float32 buffer in a float64 model."""
    B = torch.zeros(g.shape[-1], g.shape[-1], dtype=torch.float32)
    B += torch.einsum("vnso,vnsp->op", g, g) / terms
    return B.to(g.dtype)


SINGLE = Piece(
    "single",
    "a float32 buffer in a float64 model",
    "vector_factor",
    vector_factor_in_float32,
    "`torch.zeros` is float32 by default, and adding in place converts without a word. Seven "
    "digits are enough for training, and not enough to tell a mistake from rounding.",
    ("mlp-mse-mean", "expand"),
)


def mixed(old: Tensor, new: Tensor, sizes: Sequence[float]) -> Tensor:
    """Wrong: the weight of an average on the wrong side."""
    share = sizes[-1] / sum(sizes)
    return share * old + (1 - share) * new


WRONG_SIDE = Piece(
    "wrong-side",
    "the weight of an average on the wrong side",
    "mixed",
    mixed,
    "Momentum, decay and learning rate are written both ways in the literature. With equal "
    "shares nothing is seen.",
    ("batches-unequal-mse-mean", "expand"),
)


def mixed_equally(old: Tensor, new: Tensor, sizes: Sequence[float]) -> Tensor:
    """Wrong: equal weights for unequal mini-batches."""
    share = 1 / len(sizes)
    return (1 - share) * old + share * new


EQUAL = Piece(
    "equal",
    "equal weights for unequal mini-batches",
    "mixed",
    mixed_equally,
    "All mini-batches but the last have one size, so that the error is small and changes with "
    "the number of data.",
    ("batches-unequal-mse-mean", "expand"),
)


def mixed_by_sum(old: Tensor, new: Tensor, sizes: Sequence[float]) -> Tensor:
    """Wrong: each worker's own batch size."""
    return old + new


LOCAL = Piece(
    "local",
    "each worker's own batch size",
    "mixed",
    mixed_by_sum,
    "Every worker divides by the number of its data, and the results are added, as gradients "
    "often are. Both factors are then too large by the number of workers, and the block by its "
    "square.",
    ("batches-equal-mse-mean", "expand"),
)


def basis(
    batches: Sequence[Batch], of_one: Callable[[Batch], KroneckerAnswer], mix: Mix
) -> tuple[Tensor, Tensor]:
    """Wrong: eigenvectors averaged."""
    found = [torch.linalg.eigh(M)[1] for K in map(of_one, batches) for M in (K.A, K.B)]
    return torch.stack(found[::2]).mean(0), torch.stack(found[1::2]).mean(0)


EIGENVECTORS = Piece(
    "eigenvectors",
    "eigenvectors averaged",
    "basis",
    basis,
    "What is averaged elsewhere is averaged here, too. The mean of two orthogonal matrices is "
    "not orthogonal, and even the signs of eigenvectors are arbitrary.",
    ("batches-unequal-ekfac", "ekfac"),
)


def second_moments(batch: Batch, QA: Tensor, QB: Tensor) -> Tensor:
    """Wrong: squares of positions for squares of data."""
    a, g = batch.a @ QA, batch.g @ QB
    return torch.einsum("vnso,nsi->oi", g.square(), a.square()) / batch.terms


SQUARES = Piece(
    "squares",
    "squares of positions for squares of data",
    "second_moments",
    second_moments,
    "KFAC's factors cannot tell positions from data, so that both may be one long axis. The "
    "square of a datum's gradient can: it is taken after the sum over its positions.",
    ("ekfac-flattened-mse", "ekfac"),
)


def presented(K: KroneckerAnswer, batches: Sequence[Batch]) -> LayerBlock:
    """Wrong: scales of weight and bias that differ."""
    if batches[0].a.shape[-1] != len(K.A) or not bool((batches[0].a[..., -1] == 1).all()):
        return LayerBlock(joint=K)
    A, ones = K.A[:-1, :-1], batches[0].a[0, :, -1].sum()
    return LayerBlock(weight=KroneckerAnswer(A, K.B), bias=DenseAnswer(ones * K.B))


BIAS_SCALE = Piece(
    "bias-scale",
    "scales of weight and bias that differ",
    "presented",
    presented,
    "A bias is treated as a layer of its own, whose input is a sum of ones over the positions "
    "where the weight has a mean. Without shared positions there is no difference.",
    ("positions-mse-mean-bias", "expand"),
)

PIECES = [POSITIONS, CROSS_TERMS, SINGLE, WRONG_SIDE, EQUAL, LOCAL, EIGENVECTORS, SQUARES]
PIECES += [BIAS_SCALE]
