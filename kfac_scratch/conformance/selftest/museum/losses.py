"""Mistakes about the loss: what is sent backward, and by what it is divided."""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from kfac_scratch.conformance.selftest.museum import vectors
from kfac_scratch.conformance.selftest.museum.piece import Piece

PLACE = 1  # of the room


def data_gradients(loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """Wrong: gradients of the mean loss for those of a datum."""
    f = f.detach().requires_grad_()
    return torch.autograd.grad(loss(f, y), f)[0]


MEAN_GRADIENTS = Piece(
    "mean-gradients",
    "gradients of the mean loss for those of a datum",
    "data_gradients",
    data_gradients,
    "`.grad` holds a gradient for every row, so the rows look like per-datum gradients. But the "
    "loss was divided before the backward pass, so each row carries 1/N, and their squares "
    "1/N².",
    ("empirical-mlp-cross-entropy-mean", "expand"),
    "wiseodd/natural-gradients #2",
    "The author agreed: a negative log-likelihood is a sum over data, not a mean.",
)


def second_derivative() -> float:
    """Wrong: ½‖·‖² for ‖·‖²."""
    return 1.0


HALF = Piece(
    "half",
    "½‖·‖² for ‖·‖²",
    "second_derivative",
    second_derivative,
    "Textbooks write a squared error with one half, so that its derivative is f - y and its "
    "second derivative 1. PyTorch's has no one half. Two libraries with one convention each "
    "differ by 2.",
    ("last-layer-mse-tanh-sum", "expand"),
    "f-dangel/curvlinops #82",
    "The factor was found in the code that called the library, in aleximmer/Laplace #146.",
)


def terms(loss: nn.Module, f: Tensor, y: Tensor) -> float:
    """Wrong: a mean over the batch only."""
    return float(len(f))


BATCH_SIZE = Piece(
    "batch-size",
    "a mean over the batch only",
    "terms",
    terms,
    "`mean` sounds like the mean over data, and for cross-entropy on [N, C] it is. `MSELoss` "
    "also divides by the number of outputs, cross-entropy on tokens by that of tokens.",
    ("mlp-mse-mean", "expand"),
    "f-dangel/curvlinops #108",
)


def type2(kfac: Any, loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """Wrong: the empirical Fisher taken for the Fisher."""
    gradient: Tensor = kfac.data_gradients(loss, f, y)
    return gradient.unsqueeze(0)


EMPIRICAL = Piece(
    "empirical",
    "the empirical Fisher taken for the Fisher",
    "type2",
    type2,
    "These are the gradients that training computes anyway, at no cost, and each term of the "
    "Fisher is an outer product of gradients. But the Fisher's labels come from the model.",
    ("one-datum-mse-tanh-mean", "expand"),
    "gpauloski/kfac-pytorch #109",
    "A question there, and closed. Who uses it on purpose and says so has no bug.",
)


def class_probabilities_of_first(f: Tensor) -> Tensor:
    """Wrong: the first datum's prediction for all."""
    return f[:1].softmax(1).expand_as(f)


FIRST_DATUM = Piece(
    "first-datum",
    "the first datum's prediction for all",
    "class_probabilities",
    class_probabilities_of_first,
    "With one datum it is right, and with a batch the shapes broadcast. The scale is right, too.",
    ("mlp-cross-entropy-sum", "expand"),
)


def class_probabilities(f: Tensor) -> Tensor:
    """Wrong: a softmax over the batch."""
    return f.softmax(0)


BATCH_AXIS = Piece(
    "batch-axis",
    "a softmax over the batch",
    "class_probabilities",
    class_probabilities,
    "The axis of the classes is 0 if there is no batch, and code written for one datum keeps it.",
    ("mlp-cross-entropy-sum", "expand"),
)


def class_probabilities_last(f: Tensor) -> Tensor:
    """Wrong: the last axis for axis 1."""
    return f.softmax(-1)


LAST_AXIS = Piece(
    "last-axis",
    "the last axis for axis 1",
    "class_probabilities",
    class_probabilities_last,
    "On [N, C] both are the same axis. PyTorch has the classes of [N, C, d] on axis 1.",
    ("tokens-cross-entropy-all-sum", "expand"),
)


def drawn_class(p: Tensor, generator: Generator) -> Tensor:
    """Wrong: labels drawn uniformly."""
    return torch.randint(p.shape[-1], p.shape[:-1], generator=generator)


UNIFORM = Piece(
    "uniform",
    "labels drawn uniformly",
    "drawn_class",
    drawn_class,
    "Labels are drawn at random, as they should be, and at the start of training a network's "
    "prediction is nearly uniform.",
    ("sampled-cross-entropy-mean", "expand"),
)


def share_of_a_sample(samples: int) -> float:
    """Wrong: a loss averaged over sampled labels."""
    return 1 / samples


SAMPLES = Piece(
    "samples",
    "a loss averaged over sampled labels",
    "share_of_a_sample",
    share_of_a_sample,
    "The mean of the losses at M labels has the right gradient. Curvature is a square: each "
    "vector needs 1/√M, and 1/M gives M times too little.",
    ("sampled-mse-mean", "expand"),
)


def term_weights(loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """Wrong: class weights and pos_weight ignored."""
    return vectors.classes_last(loss, torch.ones_like(f))[..., :1]


WEIGHTS = Piece(
    "weights",
    "class weights and pos_weight ignored",
    "term_weights",
    term_weights,
    "The Hessian of a softmax does not contain the label, so that a weight that depends on the "
    "label seems to have no place in it. It multiplies the whole term.",
    ("class-weights-mlp-sum", "expand"),
)

PIECES = [MEAN_GRADIENTS, HALF, BATCH_SIZE, EMPIRICAL, FIRST_DATUM, BATCH_AXIS, LAST_AXIS]
PIECES += [UNIFORM, SAMPLES, WEIGHTS]
