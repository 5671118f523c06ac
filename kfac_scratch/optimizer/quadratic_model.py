r"""The exact quadratic model on a batch: it chooses a step's length, and its prediction is judged.

$$
\mathcal{M}(\delta) = \nabla^\top \delta + \tfrac12 \delta^\top C \delta
$$

with the exact GGN $C$ of the batch. KFAC's matrices choose directions; this model can choose their
lengths. It has the curvature between layers, and costs one forward derivative for each direction.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §6.5 (damping) and §7 (learning rate, momentum).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module, RReLU
from torch.nn.modules.dropout import _DropoutNd

from kfac_scratch.curvature import flatten_values, ggn_gram, parameter_vector
from kfac_scratch.matrices.damping import reduction_ratio
from kfac_scratch.optimizer.placement import ONE_PROCESS, Placement
from kfac_scratch.optimizer.step_control import Batches, Control, Step, Values, dot
from kfac_scratch.optimizer.undo import default_generator


def quadratic_model() -> Control:
    r"""A control: the learning rate and momentum that minimise the exact quadratic model.

    Use it with batches large enough that the model holds beyond them. Not with small batches, which
    it overfits, and not with a learning rate schedule, which it replaces.

    $\mathcal{M}(\delta) = \tfrac12 \delta^\top (C + \lambda I) \delta + \nabla^\top \delta$ over
    $\delta = -\eta P + \mu \delta_0$, with the exact GGN $C$ by two forward derivatives. On a fixed
    quadratic with a fixed preconditioner, this is the method of conjugate gradients.

    Cost: two forward derivatives of the network, and memory for the outputs' derivatives.
    Source: Martens and Grosse 2015 (arXiv:1503.05671), §7.

    Raises:
        ValueError: If the batch is not known, or the model draws random numbers, as active Dropout
            does.
    """
    return _minimised


def _minimised(step: Step) -> Step:
    if not step.batches:
        raise ValueError("quadratic_model needs the batch: call observe(X, y) before every step.")
    model = step.batches[0][1].model
    basis: list[Values] = [{name: -P for name, P in step.direction.items()}, step.previous]
    damped = [{name: step.damping[name] * v for name, v in d.items()} for d in basis]
    rows = torch.stack([flatten_values(model, d) for d in basis])
    with repeatable(model):
        grams = [share * ggn_gram(*batch, rows) for share, batch in step.batches]
    C = step.placement.summed(torch.stack(grams).sum(0))
    C = C.double().cpu() + torch.tensor([[dot(u, v) for v in damped] for u in basis]).double()
    slope = torch.tensor([dot(step.gradient, d) for d in basis]).double()
    lr, momentum = (-torch.linalg.pinv(C, hermitian=True) @ slope).tolist()
    return replace(
        step,
        lr=dict.fromkeys(step.lr, lr),
        momentum=dict.fromkeys(step.momentum, momentum),
        notes={**step.notes, "model_lr": lr, "model_momentum": momentum},
    )


@contextmanager
def repeatable(model: Module) -> Iterator[None]:
    """Refuse forward passes that draw random numbers: no two of them are of the same function.

    Raises:
        ValueError: Naming the layers, if they are known.
    """
    generator = default_generator(next(p.device for p in model.parameters()))
    before = None if generator is None else generator.get_state()
    yield
    if generator is None or before is None or torch.equal(generator.get_state(), before):
        return
    random = (_DropoutNd, RReLU)
    names = [n for n, m in model.named_modules() if isinstance(m, random) and m.training]
    raise ValueError(
        f"The model draws random numbers in its forward pass (layers {names}, or a function), so "
        "that the passes of one step are of different functions. quadratic_model and adapt_damping "
        "compare them: call eval() on these layers, or use another control, such as graft()."
    )


class Before(NamedTuple):
    """The loss and gradient before a step, and the parameters that they are for."""

    batches: Batches
    placement: Placement
    loss: float
    theta: Float[Tensor, " D"]
    gradient: Float[Tensor, " D"]


def before_step(batches: Batches, gradients: Values, placement: Placement = ONE_PROCESS) -> Before:
    """The loss, gradient and parameters before the step, for `ratio_after_step`.

    Args:
        batches: The batches here, with their shares.
        gradients: The gradients of the loss of all processes.
        placement: The processes.

    Raises:
        ValueError: If the batch is not known, or the model draws random numbers.
    """
    if not batches:
        raise ValueError("Adapting the damping needs the batch: call observe(X, y) in every step.")
    model = batches[0][1].model
    gradient = flatten_values(model, gradients)
    with repeatable(model):
        loss = _loss(batches, placement)
    return Before(batches, placement, loss, parameter_vector(model), gradient)


def ratio_after_step(before: Before) -> float | None:
    """The change of the loss over the change that the model without damping predicted.

    All trainable parameters count, also those that `rest` moved. See `damping.reduction_ratio`.
    Cost: one forward derivative and one forward pass.
    """
    change = parameter_vector(before.batches[0][1].model) - before.theta
    C = torch.stack(
        [share * ggn_gram(*b, change.unsqueeze(0), before.theta) for share, b in before.batches]
    ).sum(0)
    C = before.placement.summed(C)
    predicted = float(C.squeeze() / 2 + before.gradient @ change)
    loss = _loss(before.batches, before.placement)
    return reduction_ratio(before.loss, loss, predicted, before.theta.dtype)


def _loss(batches: Batches, placement: Placement) -> float:
    """The loss of all batches of all processes together."""
    with torch.no_grad():
        here = sum(share * b.loss(b.model(b.X), b.y) for share, b in batches)
        return float(placement.summed(torch.as_tensor(here)))
