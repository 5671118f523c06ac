"""What the naive KFAC sends backward: square roots of the loss's curvature, not yet divided.

For the *sum* of a loss's terms: vectors `[V, *f.shape]` whose outer products sum, for every datum,
to the curvature in `f`. The number of terms is divided by later, in the factor `B`. Each of these
functions is one that a piece of the museum gets wrong.
"""

import copy

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


def class_probabilities(f: Tensor) -> Tensor:
    """Of every class; cross-entropy has them on axis 1."""
    return f.softmax(1)


def second_derivative() -> float:
    """Of a squared error by the prediction."""
    return 2.0


def sum_of_terms(loss: nn.Module) -> nn.Module:
    """The loss without its division."""
    total = copy.copy(loss)
    setattr(total, "reduction", "sum")  # noqa: B010
    return total


def data_gradients(loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """Every datum's gradient with respect to the output, at its own label."""
    f = f.detach().requires_grad_()
    return torch.autograd.grad(sum_of_terms(loss)(f, y), f)[0]


def term_weights(loss: nn.Module, f: Tensor, y: Tensor) -> Tensor:
    """The factor of the curvature of each term, `[N, positions, 1 or C]`."""
    if isinstance(loss, nn.CrossEntropyLoss):
        weight = f.new_ones(f.shape[1]) if loss.weight is None else loss.weight
        kept = y != loss.ignore_index
        return (weight[y.where(kept, 0)] * kept).reshape(len(f), -1, 1)
    if isinstance(loss, nn.BCEWithLogitsLoss) and loss.pos_weight is not None:
        return classes_last(loss, loss.pos_weight * y + 1 - y)
    return classes_last(loss, torch.ones_like(f))


def drawn_class(p: Tensor, generator: Generator) -> Tensor:
    """A class from the model's distribution `p` over the last axis."""
    return p.flatten(0, -2).multinomial(1, generator=generator).reshape(p.shape[:-1])


def share_of_a_sample(samples: int) -> float:
    """What each of several sampled gradients carries, so that their outer products average."""
    return 1 / samples**0.5


# ---- put together --------------------------------------------------------------------------------


def classes_last(loss: nn.Module, f: Tensor) -> Tensor:
    """Outputs as `[N, positions, C]`: what the loss couples is the last axis."""
    f = f.movedim(1, -1) if isinstance(loss, nn.CrossEntropyLoss) else f
    return f.reshape(len(f), -1, f.shape[-1])


def as_output(loss: nn.Module, f: Tensor, rows: Tensor) -> Tensor:
    """Undo `classes_last`."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return rows.reshape(len(f), *f.shape[2:], f.shape[1]).movedim(-1, 1)
    return rows.reshape(f.shape)


def hessian_root(loss: nn.Module, rows: Tensor, p: Tensor, mse: float) -> Tensor:
    """For every term, a matrix whose columns' outer products sum to its Hessian."""
    if isinstance(loss, nn.CrossEntropyLoss):  # diag(p) - p p^T
        return p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return (rows.sigmoid() * (1 - rows.sigmoid())).sqrt().diag_embed()
    return torch.full_like(rows, mse**0.5).diag_embed()


def one_by_one(loss: nn.Module, f: Tensor, roots: Tensor) -> Tensor:
    """A vector for every position and every column of its root, and zero at other positions."""
    vectors = []
    for position in range(roots.shape[1]):
        for column in range(roots.shape[3]):
            v = torch.zeros_like(roots[..., 0])
            v[:, position] = roots[:, position, :, column]
            vectors.append(as_output(loss, f, v))
    return torch.stack(vectors)


def score(loss: nn.Module, rows: Tensor, p: Tensor, drawn: Tensor, generator: Generator) -> Tensor:
    """The gradient of every term at a label from the model (`drawn`, if labels are classes)."""
    if isinstance(loss, nn.CrossEntropyLoss):
        return p - functional.one_hot(drawn, p.shape[-1])
    if isinstance(loss, nn.BCEWithLogitsLoss):
        p = rows.sigmoid()
        return p - torch.bernoulli(p, generator=generator)
    noise = torch.empty_like(rows).normal_(generator=generator)
    return 2**0.5 * noise  # 2 (f - y) with a variance of 1/2
