r"""Fishers: the vectors that are sent from a loss backward through the network.

A loss is a sum over terms, divided by a number $D$ (1 for `reduction="sum"`),

$$
L = \frac{1}{D} \sum_n \ell_n, \qquad \ell_n = -\log p(y_n \mid f_n) + \text{const}.
$$

`BackpropagatedVectors` are a function `(loss, f, y) -> vectors` with vectors of shape
`[V, *f.shape]`. For each sample, the outer products of its `V` vectors sum to a curvature of $L$
with respect to $f_n$. With $C$ classes (or output entries) at each of $P$ positions:

| function | $V$ | the curvature is |
|---|---|---|
| `type2` | $C P$ | the loss Hessian, so that the network's is the GGN, which is the Fisher |
| `monte_carlo(M)` | $M$ | the same in expectation: gradients at $M$ labels drawn from the model |
| `empirical` | 1 | another matrix, the empirical Fisher: gradients at the labels of the batch |
| `type2_classwise` | $C$ | another one as soon as the network mixes positions |

For cross-entropy, `type2` has $(C - 1) P$ vectors. Everything after the loss costs in proportion to
$V$: the backward passes, the memory of a `LayerIO`, and the work of an approximation. The vectors
themselves are made when they are read: what a function returns has a length, a shape, and slices
`vectors[i:j]` that are tensors. All vectors have the scale of the loss as it is: its reduction and
weights are in them.

The likelihoods are Gaussian with variance 1/2 (`MSELoss`, so that $\ell_n$ is the squared error),
categorical (`CrossEntropyLoss`) and Bernoulli (`BCEWithLogitsLoss`). Class weights, `pos_weight`,
soft targets and label smoothing multiply the Hessian of a term by a number that depends on its
target; `ignore_index` makes that number zero.

Sources: Martens 2014 (arXiv:1412.1193), §§5, 8, 9; Kunstner et al. 2019 (arXiv:1905.12558);
Dangel et al. 2025 (arXiv:2507.05127), chapter 3; Tanabe and Sagae 1992, for the root of the
softmax's Hessian.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Num
from torch import Generator, Tensor
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Module, MSELoss
from torch.nn.functional import one_hot, pad

from kfac_scratch.border import check_count, check_instance

LIKELIHOODS = (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss)


@runtime_checkable
class Vectors(Protocol):
    """A stack of vectors `[V, *f.shape]` that is read in slices: a tensor, or one made on demand.

    Use one that makes its slices where all vectors together do not fit into memory. Its slices must
    agree with each other: `vectors[i:j]` is the same, whichever others were read before.

    Cost: that of the slices that are read.
    """

    @property
    def shape(self) -> torch.Size:
        """`[V, *f.shape]`."""
        ...

    def __len__(self) -> int:
        """The number `V` of vectors."""
        ...

    def __getitem__(self, part: slice, /) -> Float[Tensor, "V N ..."]:
        """Some of the vectors, as a tensor."""
        ...


BackpropagatedVectors = Callable[[Module, Tensor, Tensor], Vectors]
"""A function of loss, outputs and targets that gives the vectors to send back, `[V, *f.shape]`."""


@dataclass(frozen=True, eq=False)
class ScaledVectors:
    """Vectors times a number, multiplied when read.

    Use it in a Fisher that rescales another one's vectors: a curvature that is `c` times as large
    has vectors that are `sqrt(c)` times as long. Not for tensors, which are multiplied at once.

    Cost: that of reading the vectors.
    """

    vectors: Vectors
    factor: float

    @property
    def shape(self) -> torch.Size:
        """`[V, *f.shape]`."""
        return self.vectors.shape

    def __len__(self) -> int:
        """The number of vectors."""
        return len(self.vectors)

    def __getitem__(self, part: slice) -> Float[Tensor, "V N ..."]:
        """Some of the vectors, multiplied."""
        return self.factor * self.vectors[part]


def type2(loss: Module, f: Tensor, y: Tensor) -> "HessianRoot":
    """An exact square root of the loss Hessian: one vector per (class, position) of a sample.

    Use it for exact GGNs, and for losses with few classes. Not for many classes or positions:
    `monte_carlo(1)` sends one vector where this sends up to `C * P`.

    `type2(loss, f, y)[:]` is the tensor of all vectors.

    Cost: memory `f.numel()` for each vector that is read.

    Raises:
        ValueError: As `divisor`.
        NotImplementedError: As `divisor`.
    """
    return HessianRoot(loss, f.detach(), _hessian_weights(loss, f, y))


@dataclass(frozen=True, eq=False)
class HessianRoot:
    r"""A square root of the loss Hessian of every sample, whose columns are made when read.

    The Hessian of a position is a weight times $\operatorname{diag}(p) - p p^\top$ for
    cross-entropy, which has rank $C - 1$. Its root is lower triangular: with
    $q_c = \sum_{k \ge c} p_k$, column $c < C$ is

    $$
    s_c = \sqrt{\frac{p_c\, q_{c+1}}{q_c}}
    \Bigl( e_c - \sum_{i > c} \frac{p_i}{q_{c+1}}\, e_i \Bigr) .
    $$

    All ratios are at most 1 and come from logarithms, so that a saturated softmax loses no digits.
    The Hessians of the other losses are diagonal and have $C$ columns.

    Use it through `type2`. Not for single numbers: it is read by slices only.

    Cost: none until it is read; then `f.numel()` numbers for each vector.
    Source: Tanabe and Sagae 1992 (An exact Cholesky decomposition and the generalized inverse of
    the variance-covariance matrix of the multinomial distribution).

    Attributes:
        loss: The loss.
        f: The model's outputs.
        weight: The factor of every term's Hessian, with `P` positions of a sample.
    """

    loss: Module
    f: Float[Tensor, "N ..."]
    weight: Float[Tensor, "N P #C"]

    @property
    def shape(self) -> torch.Size:
        """`[V, *f.shape]`."""
        P, C = self.weight.shape[1], _rows(self.loss, self.f).shape[-1]
        columns = max(C - 1, 1) if isinstance(self.loss, CrossEntropyLoss) else C
        return torch.Size((columns * P, *self.f.shape))

    def __len__(self) -> int:
        """The number of vectors: one for each column, at each position."""
        return self.shape[0]

    def __getitem__(self, part: slice) -> Float[Tensor, "V N ..."]:
        """Some vectors: each is a column of the root at one position, and zero elsewhere."""
        rows = _rows(self.loss, self.f)
        N, P, C = rows.shape
        v = torch.arange(len(self), device=rows.device)[part]
        c, p = v // P, v % P
        columns = self.weight[:, p].sqrt() * _root_columns(self.loss, rows[:, p], c)  # [N, v, C]
        S = rows.new_zeros(len(v), N, P, C)
        S[torch.arange(len(v), device=rows.device), :, p] = columns.transpose(0, 1)
        return _as_output(self.loss, self.f, S)


def type2_classwise(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "V N ..."]:
    """One vector per class, sent to all positions of a sample at once: a root summed over them.

    Use it for losses per token or pixel, where `type2` has too many vectors. Not for exact blocks:
    with several positions these gain cross terms that the loss Hessian lacks. These depend on the
    root, which for cross-entropy has the columns `sqrt(p_c) (e_c - p)`, the scores of the classes.

    Law: another root of the same Hessian as `type2` for one position. With several, KFAC-expand has
    the same factors as with `type2`, as long as no layer behind the one in question mixes
    positions.
    Cost: memory `C * f.numel()`.

    Raises:
        ValueError: As `divisor`.
        NotImplementedError: As `divisor`.
    """
    return _as_output(loss, f, _class_vectors(loss, f, y))


def monte_carlo(samples: int, generator: Generator | None = None) -> BackpropagatedVectors:
    r"""Gradients at labels drawn from the model; their outer products average to `type2`'s.

    Use it in training, where moving averages reduce the noise. Not for a single batch that decides
    something by itself: the relative error falls as one over the root of the number of labels.

    Cost: memory `f.numel()` for each vector that is read, and the drawn labels: a number for each
    position of cross-entropy, and for each entry of `f` otherwise, times `samples` or `BLOCK`, the
    smaller of both. Each block is drawn again when it is read again, unless it was the last one.

    Args:
        samples: How many labels to draw for each sample of the batch. Each vector carries
            $1 / \sqrt{\text{samples}}$.
        generator: Source of randomness, on the device of the model's output.
            Default: PyTorch's global one.

    Raises:
        ValueError: If there is not at least one sample.
    """
    check_count("samples", samples)
    if generator is not None:
        check_instance("generator", generator, Generator, "torch.Generator().manual_seed(0)")

    def vectors(loss: Module, f: Tensor, y: Tensor) -> SampledScores:
        weight = _hessian_weights(loss, f, y) / samples
        draw = partial(_sampled, loss, _rows(loss, f.detach()))
        few = samples <= BLOCK
        drawn = draw(samples, generator) if few else _in_blocks(draw, samples, f, generator)
        return SampledScores(loss, f.detach(), weight, drawn)

    return vectors


BLOCK = 64
"""Labels for each sample that are drawn at once."""


@dataclass(frozen=True, eq=False)
class DrawnLabels:
    """Very many labels, block after block, and the same ones whenever they are read.

    Use it through `monte_carlo`. Not for single numbers: it is read by slices only.

    Cost: memory for `BLOCK` labels of each sample, and for those that are read.

    Attributes:
        block: From the number of a block to its labels, the last of which are kept.
        samples: The number of labels for each sample.
    """

    block: Callable[[int], Num[Tensor, "block N P ..."]]
    samples: int

    def __len__(self) -> int:
        """The number of labels for each sample."""
        return self.samples

    def __getitem__(self, part: slice) -> Num[Tensor, "V N P ..."]:
        """Some of the labels."""
        start, stop, step = part.indices(self.samples)
        first = start // BLOCK
        blocks = [self.block(i) for i in range(first, -(-stop // BLOCK))] or [self.block(0)[:0]]
        return torch.cat(blocks)[start - first * BLOCK : max(stop - first * BLOCK, 0) : step]


def _in_blocks(
    draw: Callable[[int, Generator], Tensor], samples: int, f: Tensor, generator: Generator | None
) -> DrawnLabels:
    """Every block from a generator of its own, whose seed is drawn once for all."""
    seed = int(torch.randint(2**62, (), generator=generator, device=f.device))

    @lru_cache(maxsize=1)
    def block(number: int) -> Tensor:
        size = min(BLOCK, samples - number * BLOCK)
        return draw(size, Generator(f.device).manual_seed(seed + number))

    return DrawnLabels(block, samples)


@dataclass(frozen=True, eq=False)
class SampledScores:
    """Gradients of the loss's terms at labels that were drawn, made when read.

    Use it through `monte_carlo`. Not for single numbers: it is read by slices only.

    Cost: memory for the labels; `f.numel()` numbers for each vector that is read.

    Attributes:
        loss: The loss.
        f: The model's outputs.
        weight: The factor of every term's outer product, with `P` positions of a sample.
        drawn: The labels: classes for cross-entropy, otherwise one for each entry; for the squared
            error, the scores `2 (f - y)` themselves.
    """

    loss: Module
    f: Float[Tensor, "N ..."]
    weight: Float[Tensor, "N P #C"]
    drawn: Num[Tensor, "V N P ..."] | DrawnLabels

    @property
    def shape(self) -> torch.Size:
        """`[V, *f.shape]`."""
        return torch.Size((len(self.drawn), *self.f.shape))

    def __len__(self) -> int:
        """The number of labels that were drawn for each sample."""
        return len(self.drawn)

    def __getitem__(self, part: slice) -> Float[Tensor, "V N ..."]:
        """The scores at some of the labels."""
        scores = _scores(self.loss, _rows(self.loss, self.f), self.drawn[part])
        return _as_output(self.loss, self.f, self.weight.sqrt() * scores)


def empirical(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "V N ..."]:
    r"""Gradients of $\ell_n / \sqrt{D}$ at the labels of the batch: one vector per sample.

    Use it where a method is defined by it (mini-block Fisher), or for its cost. Not as a substitute
    for the Fisher: it vanishes where the model fits the labels (Kunstner et al. 2019).

    Cost: one gradient of the loss by the output, memory `f.numel()`.

    Raises:
        ValueError: As `divisor`.
        NotImplementedError: As `divisor`.
    """
    D = divisor(loss, f, y)
    with torch.enable_grad():
        leaf = f.detach().requires_grad_()
        target = y.long() if y.dtype == torch.uint8 else y
        (gradient,) = torch.autograd.grad(loss(leaf, target), leaf)
    return D**0.5 * gradient.unsqueeze(0)


def divisor(loss: Module, f: Tensor, y: Tensor) -> float:
    """The number `D` by which a loss divides the sum of its terms.

    Batches of different sizes combine by it: the loss over all samples is the average of the batch
    losses weighted by `D`, or their sum for `reduction="sum"`.

    Targets are checked where a number is read from the device in any case: on a CPU always, on a
    GPU the labels of a mean cross-entropy. Elsewhere on a GPU a label that is no class is found by
    PyTorch's indexing, and a negative weight makes the vectors NaN.

    Raises:
        ValueError: If every target is ignored, a label is no class, the weights of the terms sum to
            nothing positive, or shapes or kinds of the targets do not fit the loss.
        NotImplementedError: If the loss is not one of the three, or its reduction is unknown.
    """
    _check(loss, f, y)
    if not isinstance(loss, CrossEntropyLoss):
        return 1.0 if loss.reduction == "sum" else float(f.numel())
    if y.is_floating_point():
        return 1.0 if loss.reduction == "sum" else float(f.numel() / f.shape[1])
    return _weight_of_labels(loss, f, y.long())


def _weight_of_labels(loss: CrossEntropyLoss, f: Tensor, y: Tensor) -> float:
    """The divisor for labels, after a check of them that costs no further synchronisation."""
    if loss.reduction == "sum" and y.is_cuda:
        return 1.0
    kept, C = y != loss.ignore_index, f.shape[1]
    wrong = kept & ((y < 0) | (y >= C))
    if loss.weight is None:
        D = kept.sum()
    else:
        D = (loss.weight.double()[y.where(kept & ~wrong, 0)] * kept).sum()
    D, any_wrong = torch.stack([D, wrong.any().to(D)]).tolist()
    if any_wrong:
        raise ValueError(
            f"CrossEntropyLoss got the label {int(y[wrong][0])}, but the outputs have {C} classes, "
            f"0 to {C - 1}. To leave targets out, give them ignore_index={loss.ignore_index}, or "
            "pass CrossEntropyLoss(ignore_index=...)."
        )
    if loss.reduction == "sum":
        return 1.0
    if not D > 0:
        raise ValueError(
            f"{loss} divides by zero, or by a negative sum of weights ({D:g}): every target is "
            "ignored or has weight 0, or class weights are negative."
        )
    return float(D)


def _class_vectors(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "C N P C"]:
    """The columns of a square root of the loss Hessian of every position by itself."""
    weight, rows = _hessian_weights(loss, f, y), _rows(loss, f)  # [N, P, C]
    match loss:
        case CrossEntropyLoss():  # diag(p) - p p^T = sum_c p_c (p - e_c) (p - e_c)^T
            p = rows.softmax(-1)
            S = p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
        case _:
            S = _diagonal_root(loss, rows).diag_embed()
    S = weight.sqrt().unsqueeze(-1) * S  # [N, P, C, column]
    return S.movedim(-1, 0)


def _root_columns(
    loss: Module, rows: Float[Tensor, "N v C"], c: Int[Tensor, " v"]
) -> Float[Tensor, "N v C"]:
    """Columns `c[v]` of a root of a term's Hessian, for the `v`-th outputs of every sample."""
    classes = torch.arange(rows.shape[-1], device=rows.device)
    own = (classes == c.unsqueeze(1)).to(rows.dtype)  # e_c
    if not isinstance(loss, CrossEntropyLoss):
        return own * _diagonal_root(loss, rows)
    logp = rows.log_softmax(-1)
    logq = pad(logp.flip(-1).logcumsumexp(-1).flip(-1), (0, 1), value=-torch.inf)  # q_C = 0
    index = c.unsqueeze(1).expand(len(rows), -1, 1)
    here, rest = logq.gather(2, index), logq.gather(2, index + 1)
    size = ((logp.gather(2, index) + rest - here) / 2).exp()
    later = torch.where(classes > c.unsqueeze(1), logp - rest, -torch.inf).exp()  # p_i / q_{c+1}
    return size * (own - later)


def _diagonal_root(loss: Module, rows: Float[Tensor, "N P C"]) -> Float[Tensor, "N P C"]:
    """The root of a term's Hessian, where that is diagonal."""
    match loss:
        case BCEWithLogitsLoss():  # p (1 - p)
            return (rows.sigmoid() * (-rows).sigmoid()).sqrt()
        case _:  # 2
            return torch.full_like(rows, 2**0.5)


def _sampled(
    loss: Module, rows: Float[Tensor, "N P C"], samples: int, generator: Generator | None
) -> Num[Tensor, "samples N P ..."]:
    """Labels `y` that are drawn from a term's likelihood; for the squared error, `2 (f - y)`."""
    match loss:
        case CrossEntropyLoss():
            p = rows.softmax(-1).flatten(0, 1)
            drawn = p.multinomial(samples, replacement=True, generator=generator)
            return drawn.T.reshape(samples, *rows.shape[:2])
        case BCEWithLogitsLoss():
            p = rows.sigmoid().expand(samples, *rows.shape)
            return torch.bernoulli(p, generator=generator)
        case _:  # y is normal around f, with variance 1/2
            normal = rows.new_empty(samples, *rows.shape).normal_(generator=generator)
            return 2**0.5 * normal


def _scores(
    loss: Module, rows: Float[Tensor, "N P C"], drawn: Num[Tensor, "V N P ..."]
) -> Float[Tensor, "V N P C"]:
    """Gradients of a term with respect to `f` at labels that `_sampled` gave."""
    match loss:
        case CrossEntropyLoss():
            return rows.softmax(-1) - one_hot(drawn, rows.shape[-1]).to(rows.dtype)
        case BCEWithLogitsLoss():
            return rows.sigmoid() - drawn
        case _:
            return drawn


def _hessian_weights(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "N P #C"]:
    """The factor of each term's Hessian: the weight that its target has in the loss, over `D`."""
    weights = _target_weights(loss, f, y, divisor(loss, f, y))
    if not weights.is_cuda and not (weights >= 0).all():
        raise ValueError(
            f"{loss} gives a target the weight {float(weights.min()):.3g}, and a Hessian with a "
            "negative or undefined weight has no square root: class weights, pos_weight, weights "
            "and soft targets must not be negative or NaN in sum."
        )
    return weights


def _target_weights(loss: Module, f: Tensor, y: Tensor, D: float) -> Float[Tensor, "N P #C"]:
    match loss:
        case CrossEntropyLoss(label_smoothing=smoothing, ignore_index=ignored):
            C = f.shape[1]
            w = f.new_ones(C) if loss.weight is None else loss.weight.to(f.dtype)
            if y.is_floating_point():
                soft = (1 - smoothing) * y.movedim(1, -1) + smoothing / C
                return (soft * w).sum(-1).reshape(len(f), -1, 1).to(f.dtype) / D
            label = y.long()
            kept = label != ignored
            label = label.where(kept, 0)
            label = label.where(label >= 0, C)  # no class: refused by indexing, as in the loss
            weight = (1 - smoothing) * w[label] + smoothing * w.mean()
            return (weight * kept).reshape(len(f), -1, 1) / D
        case BCEWithLogitsLoss():
            positive = 1.0 if loss.pos_weight is None else loss.pos_weight
            weight = positive * y + (1 - y)
            if loss.weight is not None:
                weight = loss.weight * weight
            return _rows(loss, weight.expand_as(f).to(f.dtype)) / D
        case _:
            return _rows(loss, torch.ones_like(f)) / D


def _rows(loss: Module, f: Tensor) -> Float[Tensor, "N P C"]:
    """Arrange outputs so that the entries that the loss couples are the last axis.

    Cross-entropy couples the classes, on axis 1; the other losses couple nothing: last axis.
    """
    f = f.detach()
    if isinstance(loss, CrossEntropyLoss):
        f = f.movedim(1, -1)
    elif f.ndim == 1:
        f = f.unsqueeze(-1)
    return f.reshape(len(f), -1, f.shape[-1])


def _as_output(loss: Module, f: Tensor, S: Float[Tensor, "V N P C"]) -> Float[Tensor, "V N ..."]:
    """Undo `_rows` for a stack of vectors."""
    if isinstance(loss, CrossEntropyLoss):
        return S.reshape(len(S), len(f), *f.shape[2:], f.shape[1]).movedim(-1, 2)
    return S.reshape(len(S), *f.shape)


def _check(loss: Module, f: Tensor, y: Tensor) -> None:
    if type(loss) not in LIKELIHOODS:
        raise NotImplementedError(
            f"No likelihood is known for {type(loss).__name__}. To use it, pass a function "
            "fisher(loss, f, y) that returns vectors of shape [V, *f.shape] whose outer products "
            "sum, for every sample, to the Hessian of the loss with respect to f."
        )
    if loss.reduction not in ("mean", "sum"):
        raise NotImplementedError(f"{loss} has reduction={loss.reduction!r}: use 'mean' or 'sum'.")
    if isinstance(loss, CrossEntropyLoss):
        _check_cross_entropy(loss, f, y)
    elif y.shape != f.shape:
        raise ValueError(
            f"{type(loss).__name__} got outputs {tuple(f.shape)} and targets {tuple(y.shape)}, "
            "which would be broadcast: give both the same shape."
        )
    elif isinstance(loss, BCEWithLogitsLoss):
        _check_binary(loss, f, y)


def _check_cross_entropy(loss: CrossEntropyLoss, f: Tensor, y: Tensor) -> None:
    labels = (len(f), *f.shape[2:])
    if f.ndim < 2 or y.shape != (f.shape if y.is_floating_point() else labels):
        hint = " Class indices are integers: pass y.long()." if y.shape == labels else ""
        raise ValueError(
            f"CrossEntropyLoss got outputs {tuple(f.shape)} and targets {tuple(y.shape)} of "
            f"{y.dtype}: it needs outputs [N, C, ...] with the classes on axis 1 and targets "
            f"[N, ...], or class probabilities of the outputs' shape.{hint}"
        )
    if not y.is_floating_point() and y.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"CrossEntropyLoss got labels of {y.dtype}, which PyTorch takes as int64 or uint8 "
            "only: pass y.long()."
        )
    if y.is_floating_point() and loss.ignore_index >= 0:
        raise ValueError(
            f"CrossEntropyLoss(ignore_index={loss.ignore_index}) has no meaning for class "
            "probabilities, and PyTorch refuses it: give such targets the probabilities 0."
        )
    if loss.weight is not None and loss.weight.shape != f.shape[1:2]:
        raise ValueError(
            f"CrossEntropyLoss has class weights of shape {tuple(loss.weight.shape)} for outputs "
            f"with {f.shape[1]} classes: one weight for each class is needed."
        )
    if not 0 <= loss.label_smoothing <= 1:
        raise ValueError(
            f"label_smoothing must lie in [0, 1], got {loss.label_smoothing}: PyTorch refuses it."
        )


def _check_binary(loss: BCEWithLogitsLoss, f: Tensor, y: Tensor) -> None:
    if not y.is_floating_point():
        raise ValueError(
            f"BCEWithLogitsLoss got targets of {y.dtype}, which PyTorch refuses: pass y.float()."
        )
    for name in ("weight", "pos_weight"):
        weight = getattr(loss, name)
        if weight is not None and not _broadcasts_to(weight.shape, f.shape):
            raise ValueError(
                f"BCEWithLogitsLoss has a {name} of shape {tuple(weight.shape)}, which does not "
                f"broadcast to that of the outputs, {tuple(f.shape)}."
            )


def _broadcasts_to(shape: torch.Size, target: torch.Size) -> bool:
    tail = target[len(target) - len(shape) :]
    return len(shape) <= len(target) and all(a in (1, b) for a, b in zip(shape, tail, strict=True))
