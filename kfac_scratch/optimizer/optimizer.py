"""KFAC as a `torch.optim.Optimizer`.

The loop is PyTorch's with one more line. Every `factor_every` steps, `observe` updates each layer's
curvature matrix with the batch; `step` applies the damped inverses to the gradients:

    optimizer = KFAC(model, loss)
    for X, y in data:
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()

The approximation, the Fisher, the inverse and the controls of a step are functions that the user
passes. After a step that raises, parameters and states are what they were before it, so that a loop
may catch the error and go on with the next batch.

If the gradients of several micro-batches are added up, each is shown with its backward pass. With a
mean loss, each gradient is multiplied by the share of its batch in all terms, as it must be for
every optimizer; then a step is that of one large batch:

    optimizer.zero_grad()
    for X, y in micro_batches:
        (len(X) / N * loss(model(X), y)).backward()
        optimizer.observe(X, y)
    optimizer.step()

Source: Martens and Grosse 2015 (arXiv:1503.05671), §§5 to 8.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import isfinite
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
from kfac_scratch.border import (
    check_count,
    check_instance,
    check_result,
    checked_names,
)
from kfac_scratch.capture.counted import Counted
from kfac_scratch.capture.flavours import EXPAND, Flavour
from kfac_scratch.capture.forward_pass import check_capture, full_precision, layer_ios
from kfac_scratch.capture.plan import Plans
from kfac_scratch.losses import BackpropagatedVectors, monte_carlo, type2
from kfac_scratch.matrices.damping import default_inverse
from kfac_scratch.matrices.matrix import LinearMap, Matrix
from kfac_scratch.optimizer.arrangement import (
    Arrangement,
    Slopes,
    arranged,
    check_known,
    coverable,
    seen,
    slopes,
)
from kfac_scratch.optimizer.finite import all_finite
from kfac_scratch.optimizer.observed import (
    Draws,
    LayerIOs,
    Observed,
    a_gradient,
    in_modes,
    terms_of,
    together,
    training_modes,
)
from kfac_scratch.optimizer.parameter_groups import (
    NUMBERS,
    adamw,
    check_behaviour,
    check_numbers,
    trainable,
)
from kfac_scratch.optimizer.periods import EARLY_OFTEN, Period, check_period, is_due
from kfac_scratch.optimizer.placement import (
    ONE_PROCESS,
    AgreedError,
    LostRankError,
    Placement,
)
from kfac_scratch.optimizer.preconditioner import blockwise
from kfac_scratch.optimizer.progress import Progress
from kfac_scratch.optimizer.quadratic_model import before_step, ratio_after_step
from kfac_scratch.optimizer.state_dicts import (
    FLAVOURS,
    Makers,
    check_generator,
    check_states,
    flavour_name,
    read,
    saved,
)
from kfac_scratch.optimizer.step_control import Batch, Control, Step, Values, dot, graft, norm
from kfac_scratch.optimizer.supported_models import check_processes, check_trainable, inside
from kfac_scratch.optimizer.suspects import (
    check_finite,
    suspect_matrices,
    suspect_rows,
    suspect_step,
)
from kfac_scratch.optimizer.undo import (
    default_generator,
    kept_draws,
    kept_groups,
    kept_state,
    kept_values,
)

COPIED = (
    *("model", "loss", "flavour", "estimator", "invert", "fisher", "controls", "decay", "record"),
    "counted",
    *("factor_every", "inverse_every", "adapt_damping", "adapt_every", "generator"),
    *("defaults", "state", "param_groups"),
    *("_layers", "_draws_labels", "_given_all", "_known", "_rest", "_progress"),
)


class KFAC(Optimizer):
    """KFAC as an optimizer: every layer's gradient times the damped inverse of its curvature.

    Use it as it is, `KFAC(model, loss)`: the defaults were chosen together on small networks
    (`benchmarks.defaults` holds them against tuned settings), and the default control bounds the
    length of every layer's step. A learning rate alone seldom bounds it. Not for models with layers
    that are only functions. Across several processes: `distribute`.

    Cost: every step a product with each inverse; every `factor_every` steps one more forward and
    reverse pass and the approximation; every `inverse_every` steps the inversions. Memory: the
    matrices, their inverses, and one copy of the parameters for the momentum.

    It has many parameters, because every part of the method is a choice.

    Every parameter moves by `-lr * P + momentum * previous` and shrinks by `lr * weight_decay`
    (decoupled), where `P` is the preconditioned gradient after all controls. One without a gradient
    stays as it is. Parameters may be frozen and unfrozen, and groups added and removed, at any
    time; a block whose parameters have changed starts with a new matrix at the next `observe`.

    `copy.deepcopy` copies the model with the optimizer, as of the last step. `pickle` does, too, if
    all functions that were passed can be pickled, which lambdas cannot.

    Active Dropout: the curvature is that of another draw of masks than the gradient, and averages
    over draws. BatchNorm: call `eval()` on it before `observe`; all passes that a step makes are in
    the modes in which the batch was observed.

    Args:
        model: The network, or the `DistributedDataParallel` around it.
        loss: The loss module that it is trained with, as for `layer_ios`.
        params: Parameters or groups of them, as for every optimizer, where a group may have its
            own `lr`, `momentum`, `weight_decay` and `damping`. Default: all of the model's.
        lr: Learning rate.
        momentum: Factor of the previous change.
        weight_decay: Decoupled weight decay.
        damping: The number that `invert` gets, in the units of the loss: one that is multiplied by
            `c` needs `c` times the damping. A change acts in the next step, which inverts anew.
        approximation: From a batch's `LayerIO` to a matrix, or an `Estimator`.
        fisher: The vectors that are sent backward. Default: Monte Carlo with one label for each
            sample, drawn with `generator`. (`layer_ios` has the exact `type2`, for single batches.)
        flavour: `EXPAND` or `REDUCE`.
        invert: From a matrix and a damping to its inverse. Default: `default_inverse`, which damps
            the factors of a Kronecker product, and every other matrix exactly. For a product,
            `exact_inverse` applies an eigenbasis with four products of matrices in every step;
            `factored_inverse` has two, and costs less to make. For layers as wide as the batch or
            wider, these products take most of a step, and `factored_inverse` about halves it; for
            narrower layers, both cost much the same.
        controls: Functions of `step_control`, applied in this order. Default: Adam's length for
            every layer's step, with shorter averages than Adam's own. Pass `[]` for steps of the
            length that `lr` alone gives them.
        decay: Share of the old matrix when a batch is averaged in, with bias correction.
        factor_every: Steps between two updates of the matrices, or a function from the number of
            steps so far to it. Default: 1 at first, 10 from step 180 on.
        inverse_every: Steps between two inversions, in the same way.
        rest: From the parameters without a block (of norms, say) to the optimizer for them. Its
            groups are appended to `param_groups`, so that schedules act on them, too. None refuses
            such parameters.
        layers: Names of the layers to precondition. Default: all supported ones.
        counted: From a batch to a mask of the positions that are part of the data, as for
            `layer_ios`.
        adapt_damping: From a damping and a reduction ratio to the next damping, for example
            `levenberg_marquardt`.
        adapt_every: Steps between two adaptations; the step after one inverts anew.
        generator: Source of randomness for the default `fisher`, saved with the state, and set
            back if a step raises.
        record: Called after every step with a dictionary of numbers: `step`, `lr`, `damping`,
            `step_norm`, `kl` (to second order, by the matrices), `loss` (if `step` got a closure),
            and what controls report. Reading them off a GPU costs time, not spent without it.

    Raises:
        ValueError: If a number is out of range, a parameter has no block and `rest` is missing, or
            only a part of a block's parameters is given.
    """

    placement: Placement = ONE_PROCESS
    """The processes that take a step together; `distribute` changes it."""

    def __init__(
        self,
        model: Module,
        loss: Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 3.5e-2,
        momentum: float = 0.3,
        weight_decay: float = 0.0,
        damping: float = 1.5e-6,
        approximation: Approximation | Estimator = kfac,
        fisher: BackpropagatedVectors | None = None,
        flavour: Flavour = EXPAND,
        invert: Callable[[Any, float], LinearMap] = default_inverse,
        controls: Sequence[Control] = (graft(betas=(0.9, 0.99)),),
        decay: float = 0.8,
        factor_every: Period = EARLY_OFTEN,
        inverse_every: Period = EARLY_OFTEN,
        rest: Callable[[list[Parameter]], Optimizer] | None = adamw,
        layers: Collection[str] | None = None,
        counted: Counted | None = None,
        adapt_damping: Callable[[float, float | None], float] | None = None,
        adapt_every: int = 5,
        generator: Generator | None = None,
        record: Callable[[dict[str, float]], None] | None = None,
    ) -> None:
        self._wrapper, model = model, inside(model)
        check_capture(model, loss, type2 if fisher is None else fisher, flavour, counted=counted)
        check_trainable(model)
        check_behaviour(approximation, invert, controls, adapt_damping, record, rest)
        layers = checked_names("layers", layers)
        if generator is not None:
            check_instance("generator", generator, Generator, "torch.Generator().manual_seed(0)")
        self.model, self.loss, self.flavour, self.counted = model, loss, flavour, counted
        self.estimator, self.invert = estimator(approximation), invert
        self.fisher = monte_carlo(1, generator) if fisher is None else fisher
        self.controls, self.decay = tuple(controls), decay
        self.factor_every, self.inverse_every = factor_every, inverse_every
        self.adapt_damping, self.adapt_every = adapt_damping, adapt_every
        self.generator, self.record = generator, record
        self._check_periods()
        self._draws_labels, self._given_all = fisher is None, params is None
        self._layers, self._progress, self._observed = layers, Progress(), Observed()
        self._arrangement: Arrangement | None = None
        self._plans = Plans()
        self._rest: Optimizer | None = None
        self._make_rest = rest  # for parameters that are added; copies have none
        self._known: list[Parameter] = []  # as long as this is empty, groups are only collected

        given = list(model.parameters()) if params is None else params
        numbers = (lr, momentum, weight_decay, damping)
        super().__init__(given, dict(zip(NUMBERS, numbers, strict=True)))
        trainable(model, self.param_groups, NUMBERS)
        self._rest = self._first_order(rest)
        self._known = list(model.parameters())
        if not self._arranged().blocks:
            raise ValueError("No given parameter is in a block: there is nothing to precondition.")

    # ---- what is known -----------------------------------------------------------------------

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The curvature of every block, with the batches that were observed for the coming step."""
        return self._expected().matrices

    @property
    def inverses(self) -> dict[str, LinearMap]:
        """The inverse of every block that the last step used."""
        return self._progress.inverses

    @property
    def steps(self) -> int:
        """The number of steps that were taken."""
        return self._progress.steps

    @property
    def updates(self) -> int:
        """The number of updates of the matrices."""
        return self._expected().updates

    def _expected(self) -> Progress:
        """What is known if the coming step is taken."""
        observed = self._observed
        if observed.undone or not observed.ios:
            return self._progress
        if observed.expected is None:
            arrangement = self._arranged()
            known = self._progress.fitting(arrangement)
            expected = self._averaged(observed, known, arrangement)
            self._observed = observed = replace(observed, expected=expected)
        return observed.expected or self._progress

    # ---- parameters --------------------------------------------------------------------------

    def _check_periods(self) -> None:
        weight_of_newest(self.decay, 1)
        check_period("factor_every", self.factor_every)
        check_period("inverse_every", self.inverse_every)
        check_count("adapt_every", self.adapt_every)

    def _first_order(self, rest: Callable[[list[Parameter]], Optimizer] | None) -> Optimizer | None:
        """The optimizer that `rest` makes for the parameters that no block can cover, if any.

        Groups keep the parameters that are preconditioned.
        """
        ours = coverable(self.model, self._layers)
        others = {
            name: p
            for name, p in self.model.named_parameters()
            if id(p) not in ours and any(p is q for g in self.param_groups for q in g["params"])
        }
        if not others or rest is None:
            return None
        for group in self.param_groups:
            own = [key for key in NUMBERS if group[key] != self.defaults[key]]
            names = [name for name, p in others.items() if any(p is q for q in group["params"])]
            if own and names:
                raise ValueError(
                    f"The parameters {names} are in a group with its own {own}, but have no block: "
                    "give them a group without, and set in rest=... what holds for them."
                )
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if id(p) in ours]
        self.param_groups = [group for group in self.param_groups if group["params"]]
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

    def _by_name(self, key: str, parameters: Mapping[str, Parameter]) -> dict[str, float]:
        values = {id(p): float(group[key]) for group in self._groups() for p in group["params"]}
        return {name: values[id(p)] for name, p in parameters.items()}

    def _arranged(self) -> Arrangement:
        """The parameters and blocks as model and groups are."""
        now = seen(self.model, self.param_groups)
        if self._arrangement is None or self._arrangement.seen != now:
            if self._given_all:
                check_known(self.model, self._known)
            self._arrangement = arranged(self.model, self.param_groups, self._layers)
            if self._rest is not None:
                self._share(self._rest)
        return self._arrangement

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model, as with every optimizer of PyTorch.

        Those that no block can cover are added to the optimizer of the rest, with its numbers.

        Raises:
            ValueError: If a parameter is not one of the model's or is in a group already, a number
                is out of range, or a parameter has no block and there is no `rest`.
        """
        if not self._known:  # the constructor
            super().add_param_group(param_group)
            return
        with ExitStack() as undo:
            undo.callback(self.__dict__.update, dict(self.__dict__))
            undo.callback(kept_groups(self.param_groups))
            super().add_param_group(param_group)
            self._settle(self.param_groups[-1], undo)
            self._known = list(self.model.parameters())
            self._arranged()
            undo.pop_all()

    def _settle(self, group: dict[str, Any], undo: ExitStack) -> None:
        """Give what no block can cover in a new group to the optimizer of the rest."""
        trainable(self.model, [group], NUMBERS)
        ours = coverable(self.model, self._layers)
        others = [p for p in group["params"] if id(p) not in ours]
        if not others or (self._rest is None and self._make_rest is None):
            return
        group["params"] = [p for p in group["params"] if id(p) in ours]
        if self._rest is not None:
            undo.callback(kept_groups(self._rest.param_groups))
            self._rest.add_param_group({"params": others})
        elif self._make_rest is not None:
            self._rest = self._make_rest(others)
        added = [g for g in self._rest.param_groups if "rest" not in g] if self._rest else []
        for new in added:
            new["rest"] = True
        self.param_groups = [g for g in self.param_groups if g["params"]] + added

    # ---- curvature ---------------------------------------------------------------------------

    def observe(self, X: Any, y: Tensor) -> None:
        """Show a batch of the coming step. The curvature learns from it if an update is due.

        An update is due `factor_every` steps after the last one, at the first `observe` from then
        on, and whenever a block has no matrix yet. Nothing is final before `step`.

        Call it once for each of several micro-batches whose gradients are added up.

        Raises:
            ValueError: As `layer_ios`.
            NotImplementedError: As `layer_ios`.
        """
        self._check()
        observed = self._continued()
        with ExitStack() as undo:
            with self.placement.together("observe"):
                observed = self._with_batch(observed, Batch(self.model, self.loss, X, y), undo)
            self._observed = observed
            undo.pop_all()

    def _with_batch(self, observed: Observed, batch: Batch, undo: ExitStack) -> Observed:
        """The batches of a step with one more."""
        arrangement = self._arranged()
        known = self._progress.fitting(arrangement)
        due = observed.due if observed.batches else self._update_is_due(known, arrangement)
        ios, draws = self._captured(batch.X, batch.y, arrangement, undo) if due else ({}, None)
        batches = (*observed.batches, batch)
        new = replace(
            observed,
            due=due,
            batches=batches,
            ios=(*observed.ios, ios) if due else (),
            modes=training_modes(self.model),
            draws=together(observed.draws, draws),
            gradient=a_gradient(arrangement.trained),
            expected=None,
            totals=self._totals(batches),
        )
        if not due or observed.batches:
            return new
        return replace(new, expected=self._averaged(new, known, arrangement))

    def _totals(self, batches: Sequence[Batch]) -> tuple[float, float] | None:
        """The terms and samples in the batches of all processes; None if there is one process."""
        if self.placement.size == 1:
            return None
        here = float(sum(terms_of(batch) for batch in batches))
        return self.placement.totals(here, sum(len(batch.y) for batch in batches))

    def _check(self) -> None:
        """Refuse a model that was changed, and processes that do not come together."""
        check_trainable(self.model)
        check_processes(self.placement.size)

    def update_curvature(self, X: Any, y: Tensor) -> None:
        """Average a batch's curvature in at once, whether it is due or not.

        Use it to start from the average of several batches.

        Raises:
            ValueError: As `layer_ios`, and if a matrix would not be finite.
            NotImplementedError: As `layer_ios`.
        """
        self._check()
        batch = Batch(self.model, self.loss, X, y)
        with ExitStack() as undo:
            with self.placement.together("update_curvature"):
                arrangement = self._arranged()
                known = self._progress.fitting(arrangement)
                ios, _ = self._captured(X, y, arrangement, undo)
                shown = Observed(batches=(batch,), ios=(ios,), totals=self._totals((batch,)))
                new = self._averaged(shown, known, arrangement)
                check_finite(suspect_matrices(new, known))
            self._progress, self._observed = new, replace(self._observed, expected=None)
            undo.pop_all()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients. The next `observe` is for another step."""
        self._observed = replace(self._observed, ended=True)
        super().zero_grad(set_to_none)

    def _update_is_due(self, known: Progress, arrangement: Arrangement) -> bool:
        if not arrangement.blocks:
            return False
        new = any(name not in known.counts for name in arrangement.shapes)
        return new or is_due("factor_every", self.factor_every, known.steps, known.updated_at)

    def _continued(self) -> Observed:
        """The batches of the step that the next batch belongs to."""
        observed = self._observed
        if not (observed.ended or observed.undone or observed.gradients_are_renewed):
            return observed
        if observed.draws is not None:
            observed.draws.undo()
        self._observed = Observed()
        return self._observed

    def _captured(
        self, X: Any, y: Tensor, arrangement: Arrangement, undo: ExitStack
    ) -> tuple[LayerIOs, Draws | None]:
        """Every layer on one batch, and what the Fisher drew for it."""
        generator = self._source()
        undo.callback(kept_draws(generator))
        before = None if generator is None else generator.get_state()
        ios = layer_ios(
            *(self.model, self.loss, X, y, self.fisher),
            flavour=self.flavour,
            layers=arrangement.layers,
            plan=self._plans,
            counted=self.counted,
        )
        if generator is None or before is None:
            return ios, None
        return ios, Draws(generator, before, generator.get_state())

    def _source(self) -> Generator | None:
        """The source of randomness that the default Fisher draws from."""
        return self.generator or self.placement.generator or default_generator(self._device())

    def _device(self) -> torch.device:
        return next(p.device for p in self.model.parameters())

    def _averaged(self, observed: Observed, known: Progress, arrangement: Arrangement) -> Progress:
        ios = observed.layers()
        with torch.no_grad(), full_precision(self._device()):
            try:
                update = partial(self.placement.updated, observed.part(), self.estimator)
                return known.averaged(update, ios, self.decay, arrangement.shapes)
            except (AgreedError, LostRankError):
                raise
            except Exception as error:
                check_finite(suspect_rows(ios), error)  # the cause, perhaps
                raise

    # ---- step --------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters. A closure that computes loss and gradients is called first.

        Whatever raises here, at whatever place, leaves parameters, states, groups, matrices,
        inverses and the generator as they were before the first `observe` of the step. The next
        `observe` begins another one.

        Returns:
            What the closure returned.

        Raises:
            ValueError: If nothing was observed yet, a number is not finite, or a matrix has no
                inverse.
        """
        check_processes(self.placement.size)
        loss = None
        with ExitStack() as undo:
            undo.callback(self._give_up, self._progress)
            with self.placement.together("step"):
                if closure is not None:
                    loss = self._closed(closure)
                undo.callback(kept_draws(self._source()))
                undo.callback(kept_groups(self.param_groups))
                new = self._taken(undo, loss)
            self._progress, self._observed = new, Observed()
            undo.pop_all()
        return loss

    def _closed(self, closure: Callable[[], Any]) -> Any:
        """What a closure returns."""
        if self.placement.size > 1:
            raise ValueError(
                "Pass no closure: step() joins the gradients of all processes, which must be there "
                "when it is called. Call loss.backward() and observe(X, y) before."
            )
        with torch.enable_grad():
            return closure()

    def _taken(self, undo: ExitStack, loss: Any) -> Progress:
        """Propose a step, check it, take it, and judge it; what is known after it."""
        arrangement, observed = self._arranged(), self._resumed()
        check_numbers(self.param_groups)
        if self.placement.size > 1 and observed.totals is None:
            raise ValueError(
                "Call observe(X, y) in every step before step(): the batches of all processes say "
                "how much the gradients here count."
            )
        known = self._expected().fitting(arrangement)
        if arrangement.blocks and not known.counts:
            raise ValueError("There is no curvature yet: call observe(X, y) before step().")
        undo.callback(self.placement.join_gradients(arrangement.trained, observed.share()))
        given = slopes(arrangement)
        if not given.all:
            raise ValueError("No parameter has a gradient: call loss.backward() before step().")
        suspects = {f"The gradient of {name!r}": g for name, g in given.all.items()}
        suspects |= suspect_matrices(known, self._progress)
        adapts = self.adapt_damping is not None and (self.steps + 1) % self.adapt_every == 0
        place = self.placement
        with in_modes(observed.modes):
            try:
                known = self._inverted(known, given)
                step = self._controlled(self._proposal(given, known, observed))
                before = before_step(observed.shared(), given.all, place) if adapts else None
            except (AgreedError, LostRankError):
                raise
            except Exception as error:
                check_finite(suspects, error)  # the cause, perhaps
                raise
            change = step.change()
            suspects |= suspect_step(known, self._progress, step, change)
            undo.callback(kept_state(self.state, self._rest_parameters()))
            undo.callback(kept_values(arrangement.trained.values()))
            if self._rest is not None:
                self._rest.step()
                suspects |= self._rest_values(arrangement)
            if not all_finite(suspects.values()):
                check_finite(suspects)
            self._move({name: given.parameters[name] for name in change}, change, step)
            notes = {} if before is None else self._adapted(ratio_after_step(before))
        if self.record is not None:
            self.record(self._summary(given, step, change, known, loss) | notes)
        if notes:
            known = replace(known, inverses={}, dampings={})  # the next step inverts anew
        updated = known.steps if observed.due else known.updated_at
        return replace(known, steps=known.steps + 1, updated_at=updated)

    def _give_up(self, before: Progress) -> None:
        """Forget what the step has learnt, but not its batches: it may be taken again."""
        self._progress, observed = before, self._observed
        if observed.draws is not None:
            observed.draws.undo()
        gradient = a_gradient(dict(self.model.named_parameters()))
        self._observed = replace(observed, undone=True, expected=None, gradient=gradient)

    def _resumed(self) -> Observed:
        """The batches of this step; those of one that raised, if the gradients are still theirs."""
        observed = self._observed
        if observed.undone:
            self._observed = (
                Observed()
                if observed.ended or observed.gradients_are_renewed
                else replace(observed, undone=False)
            )
            if observed.draws is not None and not self._observed.undone and self._observed.batches:
                observed.draws.redo()
        return self._observed

    def _inverted(self, known: Progress, given: Slopes) -> Progress:
        """With new inverses of all blocks if they are due, else of those that lack one."""
        damping = self._by_name("damping", given.parameters)
        due = is_due("inverse_every", self.inverse_every, known.steps, known.inverted_at)
        lacking = [b for b in given.blocks if due or not known.has_inverse(b, damping)]
        inverted_at = known.steps if due else known.inverted_at
        if lacking:
            known = known.inverted(lacking, damping, partial(self.placement.inverted, self.invert))
        return replace(known, inverted_at=inverted_at)

    def _proposal(self, given: Slopes, known: Progress, observed: Observed) -> Step:
        """The step before any control: for the parameters in blocks that have a gradient."""
        for group in self._groups():
            group.setdefault("initial_lr", group["lr"])  # as schedulers do
        moved = {name: p for name, p in given.parameters.items() if name in given.all}
        direction = _mapped(given, partial(self.placement.directions, known.inverses), given.all)
        return Step(
            {name: given.all[name] for name in moved},
            {name: direction[name] for name in moved},
            {name: self._previous(p) for name, p in moved.items()},
            lr=self._by_name("lr", moved),
            base_lr=self._by_name("initial_lr", moved),
            momentum=self._by_name("momentum", moved),
            damping=self._by_name("damping", moved),
            layers=tuple(tuple(n for n in b.parameter_names if n in moved) for b in given.blocks),
            memory={name: self.state.get(p, {}) for name, p in moved.items()},
            inverses={
                n: known.inverses[n]
                for block in given.blocks
                for n in block.names
                if n in known.inverses
            },
            batches=observed.shared(),
            placement=self.placement,
        )

    def _previous(self, p: Parameter) -> Tensor:
        state = self.state.get(p, {})
        return state["previous"] if "previous" in state else torch.zeros_like(p)

    def _controlled(self, step: Step) -> Step:
        for control in self.controls:
            step = control(step)
            check_result("controls", step, Step, "the Step that it was given, changed")
        return step

    def _rest_parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups if "rest" in group for p in group["params"]]

    def _rest_values(self, arrangement: Arrangement) -> dict[str, Any]:
        """What the optimizer of the rest has made of its parameters."""
        theirs = {id(p) for p in self._rest_parameters()}
        return {
            f"What rest=... makes of {name!r}": (p.detach(), self.state.get(p, {}))
            for name, p in arrangement.trained.items()
            if id(p) in theirs
        }

    def _move(self, parameters: Mapping[str, Parameter], change: Values, step: Step) -> None:
        lr, decay = (self._by_name(key, parameters) for key in ("lr", "weight_decay"))
        for name, p in parameters.items():
            d = change[name]
            p.mul_(1 - lr[name] * decay[name]).add_(d)
            memory = step.memory.get(name, {})
            self.state[p] = {**self.state.get(p, {}), **memory, "previous": d}

    def _adapted(self, ratio: float | None) -> dict[str, float]:
        """Adapt the damping of every group to the success of the step."""
        adapt = self.adapt_damping or (lambda damping, _: damping)
        for group in self._groups():
            damping = adapt(group["damping"], ratio)
            if not (damping >= 0 and isfinite(damping)):
                raise ValueError(
                    f"adapt_damping made {damping} of the damping {group['damping']} and the "
                    f"ratio {ratio}; nothing was changed. A damping is a number of at least 0."
                )
            group["damping"] = damping
        return {"ratio": float("nan") if ratio is None else ratio}

    def _summary(
        self, given: Slopes, step: Step, change: Values, known: Progress, loss: Any
    ) -> dict[str, float]:
        curved = partial(self.placement.curved, known.matrices)
        group, product = self._groups()[0], _mapped(given, curved, change)
        numbers = {
            "step": float(known.steps),
            "lr": group["lr"],
            "damping": group["damping"],
            "step_norm": norm(change),
            "kl": dot(change, product) / 2,
        }
        return numbers | ({} if loss is None else {"loss": float(loss)}) | dict(step.notes)

    # ---- checkpoints and copies --------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-exact continuation needs, as tensors, plain numbers and names.

        It is the state after the last step: batches that were observed since are not in it. The
        random state of the default `fisher` is in it if `generator` was given; otherwise it is
        PyTorch's global one, which is the caller's to save.
        """
        own = saved(self.placement.whole(self._progress), self._makers(), self._parameter_names())
        if self.generator is not None:
            own["generator"] = self._settled_draws(self.generator)
        source = self._source()
        streams = self.placement.streams(None if source is None else self._settled_draws(source))
        if streams is not None:
            own["generators"] = streams
        return super().state_dict() | {"kfac": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with an optimizer that was built the same way.

        Everything is checked before anything is replaced.

        Raises:
            ValueError: If the checkpoint does not fit: it was written with another approximation,
                inverse or flavour, for other blocks, shapes or dtypes, or has numbers that are not
                finite. The message names the block, and what is in the file and in the optimizer.
        """
        with ExitStack() as undo:
            with self.placement.together("load_state_dict"):
                self._load(state_dict, undo)
            undo.pop_all()

    def _load(self, state_dict: dict[str, Any], undo: ExitStack) -> None:
        own, arrangement = state_dict.get("kfac"), self._arranged()
        known = read(
            own, self._makers(), self._parameter_names(), arrangement.shapes, self._device()
        )
        names = {id(p): name for name, p in self.model.named_parameters()}
        check_states(state_dict["state"], state_dict["param_groups"], self.param_groups, names)
        check_numbers(state_dict["param_groups"])
        check_generator(state_dict["kfac"], self.generator)
        part = self.placement.part(known)
        if self._rest is not None:
            undo.callback(self._share, self._rest)
        undo.callback(self.__dict__.update, dict(self.__dict__))
        undo.callback(kept_draws(self._source()))
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self._progress, self._observed, self._arrangement = part, Observed(), None
        if self.generator is not None:
            self.generator.set_state(state_dict["kfac"]["generator"])
        self.placement.continue_streams(known.steps, state_dict["kfac"].get("generators"))
        self._arranged()

    def _makers(self) -> Makers:
        return Makers(self.estimator, self.invert, self.flavour)

    def _parameter_names(self) -> list[list[str]]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [[names[id(p)] for p in group["params"]] for group in self.param_groups]

    def _settled_draws(self, generator: Generator) -> Tensor:
        """The state of the generator without what was drawn for batches of the coming step."""
        now, draws = generator.get_state(), self._observed.draws
        return draws.before if draws is not None and torch.equal(draws.after, now) else now

    def __getstate__(self) -> dict[str, Any]:
        """All of it as of the last step, for `copy` and `pickle`, which copy the model with it.

        Raises:
            ValueError: If other processes hold parts of it.
        """
        if self.placement.size > 1:
            raise ValueError(
                f"{self.placement.size} processes hold this optimizer together: call state_dict() "
                "in all of them, and load it into another optimizer."
            )
        kept = {key: value for key, value in self.__dict__.items() if key in COPIED}
        if self.generator is not None:
            generator = Generator(self.generator.device)
            generator.set_state(self._settled_draws(self.generator))
            kept["generator"] = generator
        kept["fisher"] = None if self._draws_labels else self.fisher
        return kept | {"flavour": flavour_name(self.flavour) or self.flavour}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "model" in state:  # not if PyTorch loads a checkpoint
            self._observed, self._arrangement, self._make_rest = Observed(), None, None
            self._plans, self._wrapper = Plans(), self.model
            self.flavour = FLAVOURS.get(state["flavour"], state["flavour"])
            if self._draws_labels:
                self.fisher = monte_carlo(1, self.generator)


def _mapped(
    given: Slopes, products: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], values: Values
) -> dict[str, Tensor]:
    """Products with the matrices of all blocks; a parameter without a value counts as zero."""
    names = [name for block in given.blocks for name in block.parameter_names]
    zero = {n: torch.zeros_like(given.parameters[n]) for n in names if n not in values}
    full = {n: zero[n] if n in zero else values[n] for n in names}
    return blockwise(given.blocks, products)(full)
