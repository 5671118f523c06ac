r"""The exact quadratic model on a batch: it chooses a step's length, and its prediction is judged.

$$
\mathcal{M}(\delta) = \nabla^\top \delta + \tfrac12 \delta^\top C \delta
$$

with the exact GGN $C$ of the batch. KFAC's matrices choose directions; this model can choose their
lengths. It has the curvature between layers, and costs one forward derivative for each direction.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §6.5 (damping) and §7 (learning rate, momentum).
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.curvature import flatten_values, ggn_gram, parameter_vector
from kfac_scratch.matrices.damping import reduction_ratio
from kfac_scratch.optimizer.step_control import Batch, Control, Step, Values, dot


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
        ValueError: If the batch is not known.
    """

    def control(step: Step) -> Step:
        if step.batch is None:
            raise ValueError(
                "quadratic_model needs the batch: call observe(X, y) before every step."
            )
        model, loss, X, y = step.batch
        basis: list[Values] = [{name: -P for name, P in step.direction.items()}, step.previous]
        damped = [{name: step.damping[name] * v for name, v in d.items()} for d in basis]
        C = ggn_gram(model, loss, X, y, torch.stack([flatten_values(model, d) for d in basis]))
        C = C.double().cpu() + torch.tensor([[dot(u, v) for v in damped] for u in basis]).double()
        slope = torch.tensor([dot(step.gradient, d) for d in basis]).double()
        lr, momentum = (-torch.linalg.pinv(C, hermitian=True) @ slope).tolist()
        return replace(
            step,
            lr=dict.fromkeys(step.lr, lr),
            momentum=dict.fromkeys(step.momentum, momentum),
            notes={**step.notes, "model_lr": lr, "model_momentum": momentum},
        )

    return control


class Before(NamedTuple):
    """A batch's loss and gradient before a step, and the parameters that they are for."""

    batch: Batch
    loss: float
    theta: Float[Tensor, "D"]
    gradient: Float[Tensor, "D"]


def before_step(batch: Batch | None, gradients: Values) -> Before:
    """The loss, gradient and parameters before the step, for `ratio_after_step`.

    Raises:
        ValueError: If the batch is not known.
    """
    if batch is None:
        raise ValueError("Adapting the damping needs the batch: call observe(X, y) in every step.")
    gradient = flatten_values(batch.model, gradients)
    return Before(batch, _loss(batch), parameter_vector(batch.model), gradient)


def ratio_after_step(before: Before) -> float | None:
    """The change of the loss over the change that the model without damping predicted.

    All trainable parameters count, also those that `rest` moved. See `damping.reduction_ratio`.
    Cost: one forward derivative and one forward pass.
    """
    model, loss, X, y = before.batch
    change = parameter_vector(model) - before.theta
    C = ggn_gram(model, loss, X, y, change.unsqueeze(0), before.theta)
    predicted = float(C.squeeze() / 2 + before.gradient @ change)
    return reduction_ratio(before.loss, _loss(before.batch), predicted)


def _loss(batch: Batch) -> float:
    with torch.no_grad():
        return float(batch.loss(batch.model(batch.X), batch.y))
