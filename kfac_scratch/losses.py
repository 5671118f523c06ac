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

Everything after the loss costs in proportion to $V$: the backward passes, the memory of a
`LayerIO`, and the work of an approximation. All vectors have the scale of the loss as it is: its
reduction and weights are in them.

The likelihoods are Gaussian with variance 1/2 (`MSELoss`, so that $\ell_n$ is the squared error),
categorical (`CrossEntropyLoss`) and Bernoulli (`BCEWithLogitsLoss`). Class weights, `pos_weight`,
soft targets and label smoothing multiply the Hessian of a term by a number that depends on its
target; `ignore_index` makes that number zero.

Sources: Martens 2014 (arXiv:1412.1193), §§5, 8, 9; Kunstner et al. 2019 (arXiv:1905.12558);
Dangel et al. 2025 (arXiv:2507.05127), chapter 3.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Module, MSELoss
from torch.nn.functional import one_hot

from kfac_scratch.border import check_count, check_instance

BackpropagatedVectors = Callable[[Module, Tensor, Tensor], Float[Tensor, "V N ..."]]
"""A function of loss, outputs and targets that gives the vectors to send back, `[V, *f.shape]`."""
LIKELIHOODS = (MSELoss, CrossEntropyLoss, BCEWithLogitsLoss)


def type2(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "V N ..."]:
    """An exact square root of the loss Hessian: one vector per (class, position) of a sample.

    Use it for exact GGNs, and for losses with few classes. Not for many classes or positions:
    `monte_carlo(1)` sends one vector where this sends `C * P`.

    Cost: memory `C * P * f.numel()`, all at once.

    Raises:
        ValueError: As `divisor`.
        NotImplementedError: As `divisor`.
    """
    S = _class_vectors(loss, f, y)  # [C, N, P, C]
    P = S.shape[2]
    if P > 1:
        own = torch.eye(P, dtype=S.dtype, device=S.device)
        S = torch.einsum("vnpc,pq->vpnqc", S, own).flatten(0, 1)  # [C * P, N, P, C]
    return _as_output(loss, f, S)


def type2_classwise(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "V N ..."]:
    """One vector per class, sent to all positions of a sample at once: `type2` summed over them.

    Use it for losses per token or pixel, where `type2` has too many vectors. Not for exact blocks:
    with several positions these gain cross terms that the loss Hessian lacks.

    Law: equal to `type2` for one position. With several, KFAC-expand has the same factors as with
    `type2`, as long as no layer behind the one in question mixes positions.
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

    Cost: memory `samples * f.numel()`.

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

    def vectors(loss: Module, f: Tensor, y: Tensor) -> Tensor:
        scale = _hessian_weights(loss, f, y) / samples
        noise = _score_samples(loss, _rows(loss, f), samples, generator)  # [samples, N, P, C]
        return _as_output(loss, f, scale.sqrt() * noise)

    return vectors


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
        (gradient,) = torch.autograd.grad(loss(leaf, y), leaf)
    return D**0.5 * gradient.unsqueeze(0)


def divisor(loss: Module, f: Tensor, y: Tensor) -> float:
    """The number `D` by which a loss divides the sum of its terms.

    Batches of different sizes combine by it: the loss over all samples is the average of the batch
    losses weighted by `D`, or their sum for `reduction="sum"`.

    Raises:
        ValueError: If every target is ignored, or shapes do not fit the loss.
        NotImplementedError: If the loss is not one of the three, or its reduction is unknown.
    """
    _check(loss, f, y)
    if loss.reduction == "sum":
        return 1.0
    if not isinstance(loss, CrossEntropyLoss):
        return float(f.numel())
    if y.is_floating_point():
        return float(f.numel() / f.shape[1])
    kept = y[y != loss.ignore_index]
    D = float(kept.numel() if loss.weight is None else loss.weight[kept].sum())
    if D == 0:
        raise ValueError(f"{loss} divides by zero: every target is ignored or has weight 0.")
    return D


def _class_vectors(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "C N P C"]:
    """The columns of a square root of the loss Hessian of every position by itself."""
    weight, rows = _hessian_weights(loss, f, y), _rows(loss, f)  # [N, P, C]
    match loss:
        case CrossEntropyLoss():  # diag(p) - p p^T = sum_c p_c (p - e_c) (p - e_c)^T
            p = rows.softmax(-1)
            S = p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
        case BCEWithLogitsLoss():  # diag(p (1 - p))
            S = (rows.sigmoid() * (-rows).sigmoid()).sqrt().diag_embed()
        case _:  # 2 I
            S = torch.full_like(rows, 2**0.5).diag_embed()
    S = weight.sqrt().unsqueeze(-1) * S  # [N, P, C, column]
    return S.movedim(-1, 0)


def _score_samples(
    loss: Module, rows: Tensor, samples: int, generator: Generator | None
) -> Float[Tensor, "samples N P C"]:
    """Gradients of a term with respect to `f` at labels drawn from its likelihood."""
    match loss:
        case CrossEntropyLoss():
            p = rows.softmax(-1)
            drawn = p.flatten(0, 1).multinomial(samples, replacement=True, generator=generator)
            labels = one_hot(drawn.T, p.shape[-1]).reshape(samples, *p.shape)
            return p - labels.to(p.dtype)
        case BCEWithLogitsLoss():
            p = rows.sigmoid().expand(samples, *rows.shape)
            return p - torch.bernoulli(p, generator=generator)
        case _:  # 2 (f - y) with y normal around f, variance 1/2
            normal = rows.new_empty(samples, *rows.shape).normal_(generator=generator)
            return 2**0.5 * normal


def _hessian_weights(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "N P #C"]:
    """The factor of each term's Hessian: the weight that its target has in the loss, over `D`."""
    D = divisor(loss, f, y)
    match loss:
        case CrossEntropyLoss(label_smoothing=smoothing, ignore_index=ignored):
            C = f.shape[1]
            w = f.new_ones(C) if loss.weight is None else loss.weight.to(f.dtype)
            if y.is_floating_point():
                soft = (1 - smoothing) * y.movedim(1, -1) + smoothing / C
                return (soft * w).sum(-1).reshape(len(f), -1, 1).to(f.dtype) / D
            kept = y != ignored
            weight = (1 - smoothing) * w[y.where(kept, 0)] + smoothing * w.mean()
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
        labels = (len(f), *f.shape[2:])
        if f.ndim < 2 or y.shape != (f.shape if y.is_floating_point() else labels):
            raise ValueError(
                f"CrossEntropyLoss got outputs {tuple(f.shape)} and targets {tuple(y.shape)}: it "
                "needs outputs [N, C, ...] with the classes on axis 1 and targets [N, ...], or "
                "class probabilities of the outputs' shape."
            )
    elif y.shape != f.shape:
        raise ValueError(
            f"{type(loss).__name__} got outputs {tuple(f.shape)} and targets {tuple(y.shape)}, "
            "which would be broadcast: give both the same shape."
        )
