r"""Choosing the weight decay by the evidence while a network trains.

`laplace` and `mackay` judge a network that is trained. To choose a prior with them alone, one
trains to the end for each step of the prior. Online, the prior takes a step every now and then
during one training. For a batch of $b$ of $N$ data the objective is

$$
\frac{N}{b} \beta L_{\text{batch}}(W) + \sum_l \tfrac{\delta_l}{2} \lVert W_l \rVert^2 ,
$$

with the sum of the batch's losses. Its mean over random batches is what `laplace` assumes to be at
its minimum. Between two steps it is a fixed function, so that any optimizer can minimise it.
Nothing guarantees that the prior settles: the evidence neglects the objective's gradient, which is
not zero yet.

Source: Immer et al. 2021 (arXiv:2104.04975), algorithm 1, with MacKay's step instead of a gradient
step for the prior.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Unpack

from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.applications.laplace import Laplace, Prior, laplace, log_evidence, mackay_shared
from kfac_scratch.approximations.accumulators import Accumulator
from kfac_scratch.border import check_callable, check_instance
from kfac_scratch.capture.layer_groups import groups_of
from kfac_scratch.data_loader import LoaderOptions
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import BackpropagatedVectors, type2
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.optimizer.observed import in_modes
from kfac_scratch.optimizer.preconditioner import block_matrices


class OnlinePrior:
    """A prior, and so a weight decay, that follows the evidence during a training.

    Use it in a training loop of your own, in place of the optimizer's weight decay:

        online = OnlinePrior(model, nn.CrossEntropyLoss(reduction="sum"), batches)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)  # without weight decay
        for epoch in range(60):
            for X, y in batches:
                optimizer.zero_grad()
                online.objective(model(X), y).backward()
                optimizer.step()
            if epoch >= 10 and epoch % 5 == 0:
                online.update()
        final = laplace(model, online.loss, batches, online.posterior.prior, online.posterior.beta)

    The first `update` comes after some training. At the start the curvature is large and the
    weights are small, so that the step is a large prior, which may keep the network from learning.
    Not for a network that is trained already: `laplace` and `mackay` are enough.

    Not with random augmentation in `data`: the curvature is then that of other data than the loss.
    The evidence falls from one update to the next where the training goes astray; then go back to
    `best_state`, which is made at an update alone.

    The objective is a sum over all data, so that its gradient is as many times larger than a mean's
    as there are data. Adam does not see that; for plain gradient descent divide the learning rate
    by their number.

    It has many parameters, because it passes those of `laplace` on.

    Attributes:
        loss: As it was passed.
        posterior: Laplace's approximation at the weights of the last update (before the first: at
            those of the start), with the prior after its step.
        best: The one of the largest evidence so far, with the prior before its step; None before
            the first update.
        best_state: A copy of the model's `state_dict()` at that time; None before the first update.
        evidences: The logarithm of the evidence at each update, before its step.
    """

    loss: Module
    posterior: Laplace
    best: Laplace | None
    best_state: dict[str, Tensor] | None
    evidences: list[float]

    def __init__(
        self,
        model: Module,
        loss: Module,
        data: Iterable[tuple[Any, Tensor]],
        prior: Prior | dict[str, Prior] = 1.0,
        beta: float = 1.0,
        step: Callable[[Laplace], Laplace] = mackay_shared,
        approximation: Callable[[LayerIO], Matrix] | Accumulator[Any] | None = None,
        fisher: BackpropagatedVectors = type2,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """Start with a prior.

        Cost: that of `laplace`, here and for each update.

        Args:
            model: The network that is trained.
            loss: With `reduction="sum"`.
            data: All training data in batches `(X, y)` on the model's device, which are gone
                through three times here and twice at each update. In whatever order.
            prior: The precision to start with, see `laplace`.
            beta: To start with. A `step` may change it.
            step: From a posterior to one with another prior: `mackay_shared`, `mackay`,
                `mackay_noise`, or a function that calls several after each other.
            approximation: As in `over_loader`. Default: KFAC.
            fisher: The vectors that are sent backward, see `losses`.
            options: `flavour`, `layers` and others, see `over_loader`. Layers that `layers` leaves
                out are trained without a decay.

        Raises:
            ValueError, TypeError: As `laplace`; a `TypeError` for a `step` that is no function.
        """
        check_callable("step", step, "mackay_shared")
        self.loss = loss
        self._model, self._data, self._step = model, data, step
        self._approximation, self._fisher, self._options = approximation, fisher, options
        self.best, self.best_state, self.evidences = None, None, []
        self.posterior = self._at_present(prior, beta)
        self._groups = groups_of(model, self.posterior.weights)
        self._size = sum(len(y) for _, y in data)

    def objective(self, f: Float[Tensor, "b ..."], y: Tensor) -> Float[Tensor, ""]:
        """The negative logarithm of likelihood times prior for all data, estimated by a batch.

        Terms without weights are left out, so that values before and after an update cannot be
        compared.

        Args:
            f: The outputs for a batch, with their graph.
            y: Its targets.
        """
        likelihood = self.posterior.beta * self._size / len(y) * self.loss(f, y)
        return likelihood + self.penalty()

    def penalty(self) -> Float[Tensor, ""]:
        """Half the sum of every weight's square times its prior precision, with its graph.

        Parameters that are in no block, such as those of normalisations, are not in it.
        """
        weights = block_matrices(self._groups, dict(self._model.named_parameters()))
        prior = self.posterior.prior
        terms = [
            (prior[name] * W.square()).sum() / 2 for name, W in weights.items() if name in prior
        ]
        return sum(terms[1:], terms[0])

    def update(self) -> float:
        """Take a step of the prior at the present weights.

        The model is in its mode of prediction meanwhile.

        Returns:
            The logarithm of the evidence before the step.

        Raises:
            ValueError: If the evidence is not finite, and whatever `laplace` and `step` refuse.
                Then nothing was changed.
            TypeError: If `step` returned something else than a `Laplace`. Then nothing was changed.
        """
        reached = self._at_present(self.posterior.prior, self.posterior.beta)
        evidence = float(log_evidence(reached))
        if not math.isfinite(evidence):
            raise ValueError(
                f"The evidence is {evidence}: the training has diverged. The prior was not "
                "changed. Use a smaller learning rate, and go back to the last good weights, which "
                "`best_state` has after the first update."
            )
        moved = self._step(reached)
        check_instance("The result of step", moved, Laplace, "mackay_shared")
        if not self.evidences or evidence > max(self.evidences):
            state = self._model.state_dict()
            self.best_state = {name: value.clone() for name, value in state.items()}
            self.best = reached
        self.evidences.append(evidence)
        self.posterior = moved
        return evidence

    def _at_present(self, prior: Any, beta: float) -> Laplace:
        with in_modes(dict.fromkeys(self._model.modules(), False)):
            return laplace(
                self._model,
                self.loss,
                self._data,
                prior,
                beta,
                self._approximation,
                self._fisher,
                **self._options,
            )
