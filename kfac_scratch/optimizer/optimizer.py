"""KFAC as a `torch.optim.Optimizer`.

The loop is PyTorch's with one more line. Every `factor_every` steps, `observe` updates each layer's
curvature matrix with the batch; `step` applies the damped inverses to the gradients:

    optimizer = KFAC(model, loss, lr=1e-3, controls=[graft()])
    for X, y in data:
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()

The approximation, the Fisher, the inverse and the controls of a step are functions that the user
passes. Whatever is refused raises before a parameter or a matrix has changed, so that a loop may
catch the error and go on with the next batch.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §§5 to 8.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import Module, Parameter
from torch.optim import Optimizer

from kfac_scratch.approximations.estimators import (
    Approximation,
    Estimator,
    estimator,
    weight_of_newest,
)
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.border import check_count, check_instance, check_result, checked_names
from kfac_scratch.capture.hooks import EXPAND, Flavour, check_capture, full_precision, layer_ios
from kfac_scratch.capture.layer_groups import layer_groups, layer_names
from kfac_scratch.losses import BackpropagatedVectors, monte_carlo, type2
from kfac_scratch.matrices.matrix import LinearMap, Matrix, exact_inverse
from kfac_scratch.optimizer.checkpoints import example_io, restored, tensors
from kfac_scratch.optimizer.parameter_groups import check_behaviour, covered, trainable
from kfac_scratch.optimizer.preconditioner import Preconditioner, inverses, preconditioner
from kfac_scratch.optimizer.quadratic_model import before_step, ratio_after_step
from kfac_scratch.optimizer.step_control import Batch, Control, Step, dot, norm

NUMBERS = ("lr", "momentum", "weight_decay", "damping")


class KFAC(Optimizer):
    """KFAC as an optimizer: every layer's gradient times the damped inverse of its curvature.

    Use it with a control, `graft()` or `kl_clip(limit)`: a learning rate alone seldom bounds the
    length of its steps. Not for models with layers that are only functions, and not across several
    processes.

    Cost: every step a product with each inverse; every `factor_every` steps one more forward and
    reverse pass and the approximation; every `inverse_every` steps the inversions. Memory: the
    matrices, their inverses, and one copy of the parameters for the momentum.

    It has many parameters, because every part of the method is a choice.

    Every parameter moves by `-lr * P + momentum * previous` and shrinks by `lr * weight_decay`
    (decoupled), where `P` is the preconditioned gradient after all controls.

    Args:
        model: The network.
        loss: The loss module that it is trained with, as for `layer_ios`.
        params: Parameters or groups of them, as for every optimizer, where a group may have its
            own `lr`, `momentum`, `weight_decay` and `damping`. Default: all trainable ones.
        lr: Learning rate.
        momentum: Factor of the previous change.
        weight_decay: Decoupled weight decay.
        damping: The number that `invert` gets, in the units of the loss: one that is multiplied by
            `c` needs `c` times the damping.
        approximation: From a batch's `LayerIO` to a matrix, or an `Estimator`.
        fisher: The vectors that are sent backward. Default: Monte Carlo with one label for each
            sample, drawn with `generator`. (`layer_ios` has the exact `type2`, for single batches.)
        flavour: `EXPAND` or `REDUCE`.
        invert: From a matrix and a damping to its inverse, for example `factored_inverse`.
        controls: Functions of `step_control`, applied in this order.
        decay: Share of the old matrix when a batch is averaged in, with bias correction.
        factor_every: Steps between two updates of the matrices.
        inverse_every: Steps between two inversions.
        rest: From the parameters without a block (of norms, say) to the optimizer for them. Its
            groups are appended to `param_groups`, so that schedules act on them, too.
        layers: Names of the layers to precondition. Default: all supported ones.
        adapt_damping: From a damping and a reduction ratio to the next damping, for example
            `levenberg_marquardt`.
        adapt_every: Steps between two adaptations; the step after one inverts anew.
        generator: Source of randomness for the default `fisher`, saved with the state.
        record: Called after every step with a dictionary of numbers: `step`, `lr`, `damping`,
            `step_norm`, `kl` (to second order, by the matrices), `loss` (if `step` got a closure),
            and what controls report. Reading them off a GPU costs time, not spent without it.

    Raises:
        ValueError: If a number is out of range, a parameter has no block and `rest` is missing, or
            only a part of a block's parameters is given.
    """

    def __init__(
        self,
        model: Module,
        loss: Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        approximation: Approximation | Estimator = kfac,
        fisher: BackpropagatedVectors | None = None,
        flavour: Flavour = EXPAND,
        invert: Callable[[Any, float], LinearMap] = exact_inverse,
        controls: Sequence[Control] = (),
        decay: float = 0.95,
        factor_every: int = 10,
        inverse_every: int = 10,
        rest: Callable[[list[Parameter]], Optimizer] | None = None,
        layers: Collection[str] | None = None,
        adapt_damping: Callable[[float, float | None], float] | None = None,
        adapt_every: int = 5,
        generator: Generator | None = None,
        record: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        check_capture(model, loss, type2 if fisher is None else fisher, flavour, None)
        check_behaviour(approximation, invert, controls, adapt_damping, record, rest)
        layers = checked_names("layers", layers)
        if generator is not None:
            check_instance("generator", generator, Generator, "torch.Generator().manual_seed(0)")
        self.model, self.loss, self.flavour = model, loss, flavour
        self.estimator, self.invert = estimator(approximation), invert
        self.fisher = monte_carlo(1, generator) if fisher is None else fisher
        self.controls, self.decay = tuple(controls), decay
        self.factor_every, self.inverse_every = factor_every, inverse_every
        self.adapt_damping, self.adapt_every = adapt_damping, adapt_every
        self.generator, self.record = generator, record
        self._check_periods()

        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        defaults = dict(zip(NUMBERS, (lr, momentum, weight_decay, damping), strict=True))
        super().__init__(params, defaults)
        self._trained = trainable(model, self.param_groups, NUMBERS)
        self._blocks = covered(layer_groups(model, layers), self._trained)
        self._layers = layer_names(model, self._blocks)
        self._rest = self._first_order(rest)

        self.matrices: dict[str, Matrix] = {}
        self.inverses: dict[str, LinearMap] = {}
        self.steps = self.updates = 0
        self._precondition: Preconditioner | None = None
        self._batch: Batch | None = None

    # ---- parameters ------------------------------------------------------------------------

    def _check_periods(self) -> None:
        weight_of_newest(self.decay, 1)
        for name in ("factor_every", "inverse_every", "adapt_every"):
            check_count(name, getattr(self, name))

    def _first_order(self, rest: Callable[[list[Parameter]], Optimizer] | None) -> Optimizer | None:
        """The optimizer that `rest` makes for the parameters without a block, if there are any.

        Groups keep the parameters with a block, which are preconditioned.
        """
        ours = {name for block in self._blocks for name in block.parameter_names}
        others = {name: p for name, p in self._trained.items() if name not in ours}
        if others and rest is None:
            raise ValueError(
                f"No block covers the parameters {list(others)}: pass rest=lambda params: "
                "torch.optim.AdamW(params, lr=1e-3), say, or do not give them to the optimizer."
            )
        for group in self.param_groups:
            own = [key for key in NUMBERS if group[key] != self.defaults[key]]
            names = [name for name, p in others.items() if any(p is q for q in group["params"])]
            if own and names:
                raise ValueError(
                    f"The parameters {names} are in a group with its own {own}, but have no block: "
                    "give them a group without, and set in rest=... what holds for them."
                )
        if not ours:
            raise ValueError("No given parameter is in a block: there is nothing to precondition.")
        self._names = {name: p for name, p in self._trained.items() if name in ours}
        mine = {id(p) for p in self._names.values()}
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in mine]
        self.param_groups = [group for group in self.param_groups if group["params"]]
        if not others or rest is None:
            return None
        optimizer = rest(list(others.values()))
        self.param_groups += [group | {"rest": True} for group in optimizer.param_groups]
        self._share(optimizer)
        return optimizer

    def _share(self, rest: Optimizer) -> None:
        """Give the optimizer of the rest our groups and our state, so that there is one of each."""
        rest.param_groups = [group for group in self.param_groups if "rest" in group]
        rest.state = self.state

    def _groups(self) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if "rest" not in group]

    def _by_name(self, key: str) -> dict[str, float]:
        values = {id(p): float(group[key]) for group in self._groups() for p in group["params"]}
        return {name: values[id(p)] for name, p in self._names.items()}

    # ---- curvature -------------------------------------------------------------------------

    def observe(self, X: Tensor, y: Tensor) -> None:
        """Store the batch of the coming step, and update the curvature if that is due.

        Raises:
            ValueError: As `layer_ios`.
            NotImplementedError: As `layer_ios`.
        """
        self._batch = Batch(self.model, self.loss, X, y)
        if self.steps % self.factor_every == 0:
            self.update_curvature(X, y)

    def update_curvature(self, X: Tensor, y: Tensor) -> None:
        """Average a batch's curvature in, whether it is due or not.

        Use it to start from the average of several batches.
        """
        ios = layer_ios(
            *(self.model, self.loss, X, y, self.fisher),
            flavour=self.flavour,
            layers=self._layers,
        )
        weight = weight_of_newest(self.decay, self.updates + 1)
        with full_precision(X.device):
            self.matrices = {
                name: self.estimator.update(self.matrices.get(name), io, weight)
                for name, io in ios.items()
            }
        self.updates += 1

    # ---- step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters. A closure that computes loss and gradients is called first.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If nothing was observed yet, a gradient is not finite, or a matrix has no
                inverse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        if self._precondition is None or self.steps % self.inverse_every == 0:
            damping = self._by_name("damping")
            self.inverses = inverses(self._blocks, self.matrices, damping, self.invert)
            self._precondition = self._preconditioner()
        step = self._proposal(self._precondition)
        for control in self.controls:
            step = control(step)
            check_result("controls", step, Step, "the Step that it was given, changed")
        notes = self._move(step)
        if self.record is not None:
            self.record(self._summary(step, loss) | notes)
        self.steps, self._batch = self.steps + 1, None
        return loss

    def _check_gradients(self) -> None:
        if not self.matrices:
            raise ValueError("There is no curvature yet: call observe(X, y) before step().")
        gradients = self._gradients()
        if not gradients:
            raise ValueError("No parameter has a gradient: call loss.backward() before step().")
        if torch.stack([g.sum() for g in gradients.values()]).isfinite().all():
            return  # one pass and one synchronisation; a sum may also overflow
        for name in (name for name, g in gradients.items() if not g.isfinite().all()):
            raise ValueError(
                f"The gradient of {name!r} is not finite; nothing was changed. Skip the batch, or, "
                "with float16, step through a torch.amp.GradScaler, which does so."
            )

    def _gradients(self) -> dict[str, Tensor]:
        """The gradients of all parameters that have one, including those of `rest`."""
        return {name: p.grad for name, p in self._trained.items() if p.grad is not None}

    def _preconditioner(self) -> Preconditioner:
        return preconditioner(self.model, self.inverses, layers=self._layers)

    def _proposal(self, precondition: Preconditioner) -> Step:
        gradient = {n: torch.zeros_like(p) for n, p in self._names.items()} | {
            n: g for n, g in self._gradients().items() if n in self._names
        }
        for group in self._groups():
            group.setdefault("initial_lr", group["lr"])  # as schedulers do
        return Step(
            gradient,
            precondition(gradient),
            {n: self.state[p].get("previous", torch.zeros_like(p)) for n, p in self._names.items()},
            lr=self._by_name("lr"),
            base_lr=self._by_name("initial_lr"),
            momentum=self._by_name("momentum"),
            damping=self._by_name("damping"),
            layers=tuple(block.parameter_names for block in self._blocks),
            memory={name: self.state[p] for name, p in self._names.items()},
            inverses=self.inverses,
            batch=self._batch,
        )

    def _move(self, step: Step) -> dict[str, float]:
        """Take the step; every `adapt_every` steps, adapt the damping to its success."""
        adapts = self.adapt_damping is not None and (self.steps + 1) % self.adapt_every == 0
        before = before_step(self._batch, self._gradients()) if adapts else None
        lr, decay = self._by_name("lr"), self._by_name("weight_decay")
        for name, change in step.change().items():
            p = self._names[name]
            p.mul_(1 - lr[name] * decay[name]).add_(change)
            self.state[p] |= {**step.memory.get(name, {}), "previous": change}
        if self._rest is not None:
            self._rest.step()
        if before is None or self.adapt_damping is None:
            return {}
        ratio = ratio_after_step(before)
        for group in self._groups():
            group["damping"] = self.adapt_damping(group["damping"], ratio)
        self.inverses, self._precondition = {}, None  # the next step inverts with it
        return {"ratio": float("nan") if ratio is None else ratio}

    def _summary(self, step: Step, loss: Any) -> dict[str, float]:
        group, change = self._groups()[0], step.change()
        curve = preconditioner(self.model, self.matrices, layers=self._layers)
        numbers = {
            "step": float(self.steps),
            "lr": group["lr"],
            "damping": group["damping"],
            "step_norm": norm(change),
            "kl": dot(change, curve(change)) / 2,
        }
        return numbers | ({} if loss is None else {"loss": float(loss)}) | dict(step.notes)

    # ---- checkpoints -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors and plain numbers.

        The random state of the default `fisher` is in it if `generator` was given; otherwise it is
        PyTorch's global one, which is the caller's to save.
        """
        own: dict[str, Any] = {
            "steps": self.steps,
            "updates": self.updates,
            "matrices": {name: tensors(M) for name, M in self.matrices.items()},
            "inverses": {name: tensors(M) for name, M in self.inverses.items()},
        }
        if self.generator is not None:
            own["generator"] = self.generator.get_state()
        return super().state_dict() | {"kfac": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with an optimizer that was built the same way."""
        own = state_dict["kfac"]
        parameters = dict(self.model.named_parameters())
        like = {
            name: self.estimator.update(None, example_io(W), 1.0)
            for block in self._blocks
            for name, W in zip(block.names, block.matrices(parameters), strict=True)
        }
        matrices = {n: restored(like[n], saved) for n, saved in own["matrices"].items()}
        inverses = {
            n: restored(self.invert(like[n], 1.0), saved) for n, saved in own["inverses"].items()
        }
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        if self._rest is not None:
            self._share(self._rest)
        self.matrices, self.inverses = matrices, inverses
        self.steps, self.updates = own["steps"], own["updates"]
        self._precondition = self._preconditioner() if self.inverses else None
        if self.generator is not None:
            self.generator.set_state(own["generator"])
