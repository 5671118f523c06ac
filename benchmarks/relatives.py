"""Optimizers that see gradients only, for `benchmarks.training`: Shampoo, SOAP and Muon.

Muon is PyTorch's, SOAP that of the package `pytorch-optimizer`. No package has the Shampoo that is
compared most, with the length of Adam's step, so it is here; it equals `Shampoo` of
facebookresearch/optimizers with Adam's graft. All three get a convolution's weight as the matrix
that KFAC sees, or as a tensor with a factor for each axis, which is the default of SOAP's authors.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.methods import ADAM, SCHEDULE, Choice, Config, Log, Method
from benchmarks.tasks import Task


class Views(Optimizer):
    """Several optimizers as one, on other shapes of the parameters; groups are shared."""

    def __init__(
        self, views: list[tuple[Tensor, Tensor]], build: Callable[[], list[Optimizer]]
    ) -> None:
        self.views = views  # [(parameter, view)]
        super().__init__([p for p, _ in views], {})
        self.inner = build()
        self.param_groups = [group for optimizer in self.inner for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p, view in self.views:
            view.grad = None if p.grad is None else p.grad.reshape(view.shape)
        for optimizer in self.inner:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p, _ in self.views:
            p.grad = None


SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "matrix": lambda p: p.detach().flatten(1) if p.ndim > 2 else p.detach(),
    "tensor": lambda p: p.detach(),
}


def views(model: nn.Module, shape: str) -> list[tuple[Tensor, Tensor]]:
    """Every parameter, and the same numbers in the shape that an optimizer gets."""
    return [(p, SHAPES[shape](p)) for p in model.parameters()]


# ---- SOAP ---------------------------------------------------------------------------------------


def soap(task: Task, model: nn.Module, config: Config) -> Optimizer:
    try:
        from pytorch_optimizer import SOAP
    except ImportError as error:
        raise SystemExit("SOAP is that of a package: pip install pytorch-optimizer") from error
    both = views(model, config["shape"])
    options = {name: config[name] for name in ("lr", "weight_decay", "precondition_1d")}
    betas = config["beta1"], config["beta2"]
    every = config["every"]
    return Views(
        both,
        lambda: [SOAP([v for _, v in both], betas=betas, precondition_frequency=every, **options)],
    )


# ---- Shampoo ------------------------------------------------------------------------------------


class Shampoo(Optimizer):
    """Shampoo with the length of Adam's step: `L^-p M R^-p` for matrices, AdamW for vectors.

    `L` and `R` are moving averages of `G G^T` and `G^T G`, and `M` that of `G`. A tensor has a
    factor for each axis and the power one over twice their number. Source: Gupta et al. 2018
    (arXiv:1802.09568); the graft is that of Agarwal et al. 2020 (arXiv:2002.11803).
    """

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(self.direction(p.grad, self.state[p], group), alpha=-group["lr"])

    def direction(self, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta1, beta2 = group["betas"]
        if not state:
            state |= {"step": 0, "m": torch.zeros_like(g), "v": torch.zeros_like(g)}
            state["factors"] = [g.new_zeros(d, d) for d in g.shape] if g.ndim > 1 else []
        state["step"] += 1
        state["m"].lerp_(g, 1 - beta1)
        state["v"].lerp_(g.square(), 1 - beta2)
        first, second = (1 - beta ** state["step"] for beta in (beta1, beta2))
        m = state["m"] / first
        adam = m / ((state["v"] / second).sqrt() + 1e-8)
        if g.ndim == 1:
            return adam
        for axis, factor in enumerate(state["factors"]):
            rows = g.movedim(axis, 0).flatten(1)
            factor.lerp_(rows @ rows.mT, 1 - beta2)
        if state["step"] % group["every"] == 0:
            power = group["power"] if g.ndim == 2 else 1 / (2 * g.ndim)
            state["roots"] = [
                inverse_power(factor / second, power, group["eps"]) for factor in state["factors"]
            ]
        if "roots" not in state:
            return adam
        step = m
        for root in state["roots"]:  # each contracts axis 0 and puts the new one last
            step = torch.tensordot(step, root, ([0], [0]))
        return step * (adam.norm() / step.norm().clamp(min=torch.finfo(step.dtype).tiny))


def inverse_power(M: Tensor, power: float, eps: float) -> Tensor:
    """`(M + eps I)^-power`."""
    d, Q = torch.linalg.eigh(M)
    return Q * (d.clamp(min=0) + eps).pow(-power) @ Q.mT


def shampoo(task: Task, model: nn.Module, config: Config) -> Optimizer:
    both = views(model, config["shape"])
    options = {name: config[name] for name in ("lr", "weight_decay", "every", "power", "eps")}
    betas = config["beta1"], config["beta2"]
    return Views(both, lambda: [Shampoo([v for _, v in both], betas=betas, **options)])


# ---- Muon ---------------------------------------------------------------------------------------


def muon(task: Task, model: nn.Module, config: Config) -> Optimizer:
    """Muon for the hidden matrices, or for all of them, and AdamW for the rest."""
    both = views(model, "matrix")
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Embedding)]
    weights = [m.weight for m in layers]
    chosen = {id(p) for p in (weights if config["where"] == "all" else weights[1:-1])}
    decay = config["weight_decay"]
    adam = {"lr": config["lr"], "betas": (config["beta1"], config["beta2"]), "weight_decay": decay}
    own = {"lr": config["muon_lr"], "momentum": config["momentum"], "weight_decay": decay}

    def build() -> list[Optimizer]:
        parts = {True: [], False: []}
        for p, view in both:
            parts[id(p) in chosen].append(view)
        return [
            torch.optim.AdamW(parts[False], **adam),
            torch.optim.Muon(parts[True], adjust_lr_fn=config["length"], **own),
        ]

    return Views(both, build)


OFTEN = {"every": Choice((1, 2, 5, 10)), "shape": Choice(tuple(SHAPES))}
RELATIVES = {
    "shampoo": Method(
        SCHEDULE | ADAM | OFTEN | {"power": Choice((0.25, 0.5)), "eps": Log(1e-12, 1e-4)},
        shampoo,
        (f"{__name__}:inverse_power",),
    ),
    "soap": Method(
        SCHEDULE | ADAM | OFTEN | {"precondition_1d": Choice((False, True))},
        soap,
        ("pytorch_optimizer.optimizer.soap:SOAP.get_orthogonal_matrix_qr",),
    ),
    "muon": Method(
        SCHEDULE
        | ADAM
        | {
            "muon_lr": Log(1e-3, 1e-1),
            "momentum": Choice((0.8, 0.9, 0.95)),
            "where": Choice(("hidden", "all")),
            "length": Choice(("original", "match_rms_adamw")),
        },
        muon,
        ("torch.optim._muon:_zeropower_via_newtonschulz",),
    ),
}
