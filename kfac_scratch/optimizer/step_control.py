r"""Step control: small functions that change a step before it is taken, and compose.

A step moves the parameters by $-\eta P + \mu \delta_0$, with the preconditioned gradient $P$ and
the previous change $\delta_0$. A natural gradient minimises a quadratic model, which holds near the
parameters only. Each function here limits or chooses the length of the step in another way:

- `kl_clip` and `norm_constraint` shorten a step that is too long by the curvature or by its norm;
- `graft` takes the length of every layer's step from Adam;
- `quadratic_model`, in a file of its own, minimises the exact quadratic model on the batch.

Clips compare with the *base* learning rate, not the scheduled one. A clip that used the
scheduled rate would undo the schedule, since the rate cancels while the clip is active.

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §6.4; Ba et al. 2017 (KL clip); Agarwal
et al. 2020 (arXiv:2002.11803), grafting; Kingma and Ba 2015 (arXiv:1412.6980).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from kfac_scratch.matrices.matrix import LinearMap
from kfac_scratch.optimizer.placement import ONE_PROCESS, Placement

Values = Mapping[str, Tensor]


class Batch(NamedTuple):
    """A mini-batch that a step is for, and the function that it descends."""

    model: Module
    loss: Module
    X: Any
    y: Tensor


Batches = Sequence[tuple[float, Batch]]
"""Batches, each with the share of its loss in the loss of all."""


@dataclass(frozen=True)
class Step:
    """A step that is not yet taken: `-lr * direction + momentum * previous`, all by parameter name.

    It has many parameters, because a control may need anything that the optimizer knows.

    Attributes:
        gradient: Gradients of the loss.
        direction: Preconditioned gradients.
        previous: The last change of the parameters; zero before the first step.
        lr: Learning rates.
        base_lr: Learning rates before any schedule.
        momentum: Factors of the previous change.
        damping: Damping of the block that a parameter is in.
        layers: Names of the parameters of each layer.
        inverses: The maps that gave the directions, by block name, as far as they are held here.
        memory: Tensors that controls keep from step to step, by parameter name and a key. A
            control changes none of them. It returns a step with new ones, and the optimizer stores
            those of the step that is taken. A step that is given up changes no memory.
        batches: The mini-batches, if they are known, each with the share of its loss in the loss
            that the step descends: one with share 1, or several whose gradients were added up. If
            several processes take the step, those of this one.
        placement: The processes that take the step. `placement.summed` adds a sum over `batches`
            up over all of them.
        notes: Numbers that controls report, for a history.
    """

    gradient: Values
    direction: Values
    previous: Values
    lr: Mapping[str, float]
    base_lr: Mapping[str, float]
    momentum: Mapping[str, float]
    damping: Mapping[str, float]
    layers: tuple[tuple[str, ...], ...]
    memory: Mapping[str, Mapping[str, Tensor]]
    inverses: Mapping[str, LinearMap] = field(default_factory=dict)
    batches: Batches = ()
    placement: Placement = ONE_PROCESS
    notes: Mapping[str, float] = field(default_factory=dict)

    def scaled(self, scales: Mapping[str, Tensor | float], **notes: float) -> "Step":
        """The step with every direction multiplied by its scale."""
        direction = {name: scales[name] * P for name, P in self.direction.items()}
        return replace(self, direction=direction, notes={**self.notes, **notes})

    def change(self) -> dict[str, Tensor]:
        """The change of the parameters."""
        return {
            name: self.momentum[name] * self.previous[name] - self.lr[name] * P
            for name, P in self.direction.items()
        }


Control = Callable[[Step], Step]


def kl_clip(limit: float) -> Control:
    r"""A control: shorten the step so that its squared length in the curvature is at most `limit`.

    Use it to keep the predictions near the old ones, with the exact damped inverse. Not behind
    `graft`, which changes the length of every layer: the limit then has no such meaning.

    $\nu = \min(1, \sqrt{\kappa / \sum_l \eta_l^2 \langle P_l, G_l \rangle})$. If $P$ is the damped
    inverse applied to $G$, the sum is $\delta^\top (F + \lambda I) \delta$, and half of it bounds
    the KL divergence between the model's predictions before and after the step, to second order.

    Units: `limit` has those of the loss. Cost: one inner product over all parameters, and a
    synchronisation with the device.

    Raises:
        ValueError: If the limit is not positive; from the control, if the direction ascends.
    """
    _check_limit(limit)
    return partial(_kl_clipped, limit)


def _kl_clipped(limit: float, step: Step) -> Step:
    size = squared_length(step)
    if size < 0:
        raise ValueError(
            f"kl_clip met a direction that ascends (its squared length is {size:.3g}): the "
            "inverse that gave it is not positive definite. Use a larger damping."
        )
    nu = min(1.0, (limit / size) ** 0.5) if size > 0 else 1.0
    return step.scaled(dict.fromkeys(step.direction, nu), nu=nu)


def norm_constraint(limit: float) -> Control:
    """A control: shorten the step to a Euclidean norm of at most `limit` at the base learning rate.

    Use it against single long steps, also behind `graft`. Not as a trust region of the predictions:
    `kl_clip`.

    Units: those of the parameters. Cost: as `kl_clip`.

    Raises:
        ValueError: If the limit is not positive.
    """
    _check_limit(limit)
    return partial(_norm_constrained, limit)


def _norm_constrained(limit: float, step: Step) -> Step:
    size = norm({name: step.base_lr[name] * P for name, P in step.direction.items()})
    return step.scaled(dict.fromkeys(step.direction, min(1.0, limit / size if size else 1.0)))


def graft(
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    per: str = "layer",
) -> Control:
    """A control: the direction of every layer, with the norm that Adam's step would have.

    Use it to reuse learning rates that were found for Adam. Not before `kl_clip`, and not where the
    length of the natural gradient step is the point, which it discards. With `per="network"` only
    the length of the whole step is Adam's, and layers keep the ratios of their lengths: use this
    behind `coarse_correction`, whose second level consists of such ratios.

    Cost: Adam's operations, and its two moments for every parameter, as part of the optimizer's
    state. Source: Agarwal et al. 2020 (arXiv:2002.11803).

    Args:
        betas: Adam's decay rates of the first and the second moment.
        eps: Adam's constant in the denominator.
        per: Whose norm is Adam's: that of each `"layer"`, or that of the `"network"`.

    Raises:
        ValueError: If `eps` is not positive, or `per` is neither of the two.
    """
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}: gradients may be zero.")
    if per not in ("layer", "network"):
        raise ValueError(f"per must be 'layer' or 'network', got {per!r}.")
    return partial(_grafted, betas, eps, per)


def _grafted(betas: tuple[float, float], eps: float, per: str, step: Step) -> Step:
    moments = {n: _moments(step.memory[n], g, betas) for n, g in step.gradient.items()}
    adam = {name: _adam(m, betas, eps) for name, m in moments.items()}
    scales: dict[str, Tensor | float] = {}
    for names in step.layers if per == "layer" else [[n for of in step.layers for n in of]]:
        wanted, length = (_norm([v[n] for n in names]) for v in (adam, step.direction))
        scale = torch.where(length > 0, wanted / length, torch.zeros_like(length))
        scales |= dict.fromkeys(names, scale)
    return replace(step.scaled(scales), memory=moments)


def squared_length(step: Step) -> float:
    """The sum of `base_lr**2 * <P, G>`: the squared length in the curvature that gave `P`."""
    direction = {name: step.base_lr[name] ** 2 * P for name, P in step.direction.items()}
    return dot(direction, step.gradient)


def norm(values: Values) -> float:
    """Euclidean norm over all tensors."""
    return float(_norm(values.values()))


def _norm(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack([t.norm() for t in tensors]).norm()


def dot(x: Values, y: Values) -> float:
    """Sum of products over all tensors."""
    return float(torch.stack([(x[name] * y[name]).sum() for name in x]).sum())


def _moments(
    memory: Mapping[str, Tensor], g: Tensor, betas: tuple[float, float]
) -> dict[str, Tensor]:
    """The memory of one parameter after one more gradient: Adam's moments and their count."""
    m = memory.get("exp_avg", torch.zeros_like(g))
    v = memory.get("exp_avg_sq", torch.zeros_like(g))
    return {
        **memory,
        "exp_avg": m.lerp(g, 1 - betas[0]),
        "exp_avg_sq": (v * betas[1]).addcmul_(g, g, value=1 - betas[1]),
        "step": memory.get("step", torch.zeros((), dtype=torch.float32)) + 1,
    }


def _adam(moments: Mapping[str, Tensor], betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's step for one parameter at learning rate 1."""
    count = float(moments["step"])
    m_scale, v_scale = 1 - betas[0] ** count, 1 - betas[1] ** count
    root = moments["exp_avg_sq"].sqrt().div_(v_scale**0.5).add_(eps)
    return moments["exp_avg"] / m_scale / root


def _check_limit(limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"The limit of a step must be positive, got {limit}.")
