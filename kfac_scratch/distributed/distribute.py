"""KFAC in several processes: `distribute` makes their steps those of one process with all data.

    torch.distributed.init_process_group()
    optimizer = KFAC(model, loss)  # as in one process; the model may be a DistributedDataParallel
    distribute(optimizer)
    for X, y in shard:
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()

What is sent when, for `P` ranks of which `m` hold each inverse:

- in every step the gradients, unless DistributedDataParallel has joined them;
- every `factor_every` steps the factors of all layers, in a few messages;
- every `inverse_every` steps the inverses, from each owner to its column (if `m > 1`);
- in every step the preconditioned gradients, from every column to the others (if `m < P`).

Sources: Pauloski et al. 2021 (arXiv:2107.01739), for the placement; Osawa et al. 2019
(arXiv:1811.12019), for joint factors; Zhang et al. 2022 (arXiv:2206.15143), for `owner_local`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Generator, Tensor
from torch.nn import Module, Parameter
from torch.nn.parallel import DistributedDataParallel

from kfac_scratch.approximations.estimators import Estimator
from kfac_scratch.border import check_instance
from kfac_scratch.capture.layer_groups import LayerGroup
from kfac_scratch.distributed.joint import joint_update
from kfac_scratch.distributed.packing import (
    from_triangle,
    is_symmetric,
    leaves,
    upper_triangle,
    with_leaves,
)
from kfac_scratch.distributed.ranks import Ranks
from kfac_scratch.distributed.sharing import assignment, columns, gradient_workers, grid_rows
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import monte_carlo
from kfac_scratch.matrices.matrix import LinearMap, Matrix
from kfac_scratch.optimizer.observed import adds_up, terms_of
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.placement import AgreedError, Invert
from kfac_scratch.optimizer.preconditioner import inverses
from kfac_scratch.optimizer.progress import Progress, updated
from kfac_scratch.optimizer.state_dicts import name_of
from kfac_scratch.optimizer.step_control import Batch
from kfac_scratch.optimizer.undo import Undo


def distribute(
    optimizer: KFAC,
    workers: float = 1.0,
    *,
    owner_local: bool = False,
    timeout: float = 60.0,
    diagnosis: float = 5.0,
) -> "Together":
    """Let all processes of `torch.distributed` take the optimizer's steps together.

    Every rank has the whole model and a part of each batch, its shard. A step is the one that a
    single process would take with all shards as one batch: for shards of any sizes, for means and
    sums, and for every approximation. Call it on every rank, before the first step.

    Use it where a batch is too large for one device, or where inversions take too long. Not to save
    memory for the model, of which every rank has a copy. Not for other groups than all processes.

    Without DistributedDataParallel, `step` joins the gradients. With it, they are joined when
    `step` is called, and are right if all shards have the same number of terms and the loss is a
    mean. Otherwise train with `joint_loss` of the result.

    Law: parameters and matrices equal those of one process up to rounding, if nothing is drawn at
    random. Labels that the default `fisher` draws come from a stream of each rank's own. A `fisher`
    that is passed draws as its generator is seeded: give each rank another seed.
    Every rank calls the same methods in the same order, `state_dict` included. `matrices` and
    `inverses` show what this rank holds.

    Without DistributedDataParallel, gradients are those of the shard until `step` joins them. So
    `clip_grad_norm_` and `torch.amp.GradScaler` would act on each rank by itself: use them with
    DistributedDataParallel only. All ranks need the same hardware and versions, since each computes
    eigenvectors by itself. Every shard needs a target that the loss counts. In training mode,
    BatchNorm sees one shard at a time.

    Cost: see the module for what is sent; memory for inverses as `workers` says.

    Args:
        optimizer: A new optimizer, built in the same way on every rank.
        workers: The share of the ranks that hold each inverse. With 1 (comm-opt), inverses are sent
            when they are new, and nothing else. With 0 (mem-opt), only a layer's owner has its
            inverse, and sends a preconditioned gradient in every step.
        owner_local: The owner of a layer makes its matrix from its own shard alone (DP-KFAC), and
            no factors are sent. It is another estimator, with the noise of a shard.
        timeout: Seconds after which a rank that does not come is lost.
        diagnosis: Seconds for finding out which one.

    Returns:
        The placement: owners of layers, and counts of what was sent.

    Raises:
        ValueError: If the ranks' models or settings differ, `workers` does not fit the number of
            ranks, the optimizer has taken steps, or `torch.distributed` is not initialised.
        RuntimeError: Later, from `observe`, `step` and others, if a rank is lost. It names the
            rank. No further step is possible then.
    """
    check_instance("optimizer", optimizer, KFAC, "KFAC(model, loss)")
    ranks = Ranks(timeout, diagnosis)
    try:
        with ranks.together("distribute"):
            _check_new(optimizer)
            rows = gradient_workers(workers, ranks.size)
            items = described(optimizer, workers, owner_local)
        ranks.check_same("the model or the optimizer", items)
    except AgreedError:
        ranks.close()
        raise
    ddp = optimizer._wrapper if isinstance(optimizer._wrapper, DistributedDataParallel) else None
    together = Together(optimizer, ranks, rows, owner_local, ddp)
    if ranks.size > 1:
        optimizer.placement = together
    return together


def _check_new(optimizer: KFAC) -> None:
    if optimizer.placement.size > 1:
        raise ValueError("distribute() was called for this optimizer already.")
    if optimizer.steps or optimizer.updates:
        raise ValueError(
            "The optimizer has learnt from batches of one rank already: call distribute() before "
            "the first observe(), and load_state_dict() after it."
        )


def described(optimizer: KFAC, workers: float, owner_local: bool) -> list[tuple[str, Any]]:
    """All that must be the same on every rank, as names and values.

    Functions are compared by their names and by the arguments that `functools.partial` keeps.
    """
    parameters = dict(optimizer.model.named_parameters())
    settings = ("decay", "factor_every", "inverse_every", "adapt_every", "adapt_damping")
    functions = ("estimator", "invert", "fisher", "flavour", "counted", "controls")
    return [
        *(
            (f"parameter {name!r}", (tuple(p.shape), str(p.dtype), p.requires_grad))
            for name, p in parameters.items()
        ),
        *((f"block {n!r}", str(shape)) for n, shape in optimizer._arranged().shapes.items()),
        *((f"group {i}", str(group)) for i, group in enumerate(_numbers(optimizer))),
        *((name, _words(getattr(optimizer, name))) for name in settings + functions),
        ("loss", str(optimizer.loss)),
        *((f"loss.{name}", value) for name, value in _attributes(optimizer.loss)),
        ("record", owner_local and optimizer.record is not None),
        ("DistributedDataParallel", isinstance(optimizer._wrapper, DistributedDataParallel)),
        ("workers", workers),
        ("owner_local", owner_local),
        *(
            (f"the sum of {name!r}", float(p.detach().double().sum()))
            for name, p in parameters.items()
        ),
    ]


def _numbers(optimizer: KFAC) -> list[dict[str, Any]]:
    """The numbers of every parameter group."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def _attributes(loss: Module) -> list[tuple[str, str]]:
    """What a loss was built with, its weights included."""
    buffers = dict(loss.named_buffers())
    numbers = {n: t.tolist() if t.numel() < 20 else float(t.sum()) for n, t in buffers.items()}
    settings = {name: v for name, v in vars(loss).items() if not name.startswith("_")}
    return [(name, _words(value)) for name, value in (settings | numbers).items()]


def _words(value: Any) -> str:
    """A setting in words that are the same in every process: no addresses."""
    if isinstance(value, partial):
        named = [f"{key}={_words(of)}" for key, of in value.keywords.items()]
        return f"{_words(value.func)}({', '.join([*map(_words, value.args), *named])})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_words, value))})"
    if is_dataclass(value):
        parts = [f"{f.name}={_words(getattr(value, f.name))}" for f in fields(value)]
        return f"{type(value).__name__}({', '.join(parts)})"
    return name_of(value) if callable(value) else str(value)


class Together:
    """The placement of an optimizer's work on several ranks, as one of them sees it.

    `distribute` makes it. It has many parameters, because it is what all of them decide together.

    Attributes:
        ranks: The collectives, with the numbers of what was sent.
        rows: The number of ranks that hold each inverse.
        owners: The owner of every matrix, by its name. More get owners when they appear.
        generator: The source of this rank's labels, None if the optimizer has one of its own.
    """

    def __init__(
        self,
        optimizer: KFAC,
        ranks: Ranks,
        rows: int,
        owner_local: bool,
        ddp: DistributedDataParallel | None,
    ) -> None:
        self.ranks, self.rows, self.owners = ranks, rows, dict[str, int]()
        self.owner_local = owner_local
        self.generator: Generator | None = None
        self._optimizer, self._ddp = optimizer, ddp
        self._columns = ranks.groups(columns(ranks.size, rows))
        self._rows = ranks.groups(grid_rows(ranks.size, rows))
        self._joint_loss_of = -1  # the step for which it was used
        self._assign(optimizer._arranged().blocks)
        if ranks.size > 1:
            self._fork_draws()
            if ddp is not None:
                ddp.register_forward_pre_hook(self._before_forward)

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self.ranks.size

    @property
    def rank(self) -> int:
        """The number of this rank."""
        return self.ranks.rank

    @property
    def joint_loss(self) -> "JointLoss":
        """The loss to train with under DistributedDataParallel, right for shards of any sizes."""
        return JointLoss(self._optimizer.loss, self)

    def _before_forward(self, module: Module, args: Any) -> None:
        """Find a lost rank before a collective of DistributedDataParallel meets it."""
        if module.training and torch.is_grad_enabled():
            self.ranks.step = self._optimizer.steps
            self.ranks.exchange("forward")

    def share_of_loss(self, loss: Module, y: Tensor) -> float:
        """The factor of this rank's loss whose mean over ranks is the loss of the whole batch."""
        self.ranks.step = self._optimizer.steps
        with self.ranks.together("loss"):
            here = terms_of(Batch(self._optimizer.model, loss, None, y))
            table = self.ranks.exchange("terms of the loss", [here])
        self._joint_loss_of = self._optimizer.steps
        return self.size * (1.0 if adds_up(loss) else here / float(table.sum()))

    # ---- labels -------------------------------------------------------------------------------

    def _fork_draws(self) -> None:
        """Give every rank a stream of its own for the labels that the default Fisher draws.

        The same stream on all ranks would be right on average, but the draws of two ranks would
        tell no more than those of one.
        """
        optimizer = self._optimizer
        if not optimizer._draws_labels:
            return
        given = optimizer._source()
        state = None if given is None else given.get_state().tolist()
        states = self.ranks.objects("generators", state)
        if optimizer.generator is not None and len(set(map(str, states))) == self.size:
            return  # they differ already
        seed = torch.initial_seed() if given is None else given.initial_seed()
        generator = optimizer.generator
        if generator is None:
            generator = self.generator = Generator(optimizer._device())
        generator.manual_seed(self.ranks.objects("generators", seed)[0] + self.rank)
        optimizer.fisher = monte_carlo(1, generator)

    def streams(self, state: Tensor | None) -> list[Tensor] | None:
        """The states of the sources of all ranks, for a checkpoint."""
        if not self._optimizer._draws_labels:
            return None
        return self.ranks.objects("state_dict", None if state is None else state.cpu())

    def continue_streams(self, steps: int, states: Sequence[Tensor] | None) -> None:
        """Continue the stream of this rank; with another number of ranks, begin another one."""
        generator = self._optimizer.generator or self.generator
        if generator is None:
            return
        if states is not None and len(states) == self.size:
            generator.set_state(states[self.rank].cpu())
        else:
            base = self.ranks.objects("load_state_dict", generator.initial_seed())[0]
            generator.manual_seed(base + self.size * (steps + 1) + self.rank)

    # ---- placement ----------------------------------------------------------------------------

    def together(self, what: str) -> AbstractContextManager[None]:
        """Work after which all ranks go on, or all raise."""
        self.ranks.step = self._optimizer.steps
        return self.ranks.together(what)

    def totals(self, terms: float, samples: int) -> tuple[float, float]:
        """The terms and the samples of the batches of all ranks.

        Raises:
            ValueError: If there is nothing to learn from on any rank.
        """
        total, everywhere = self.ranks.exchange("terms", [terms, samples]).sum(0).tolist()
        if not total:
            raise ValueError("The loss has no term on any rank: skip the batch.")
        return total, everywhere

    def updated(
        self,
        part: float,
        estimator: Estimator,
        states: Mapping[str, Matrix],
        ios: Mapping[str, LayerIO],
        weights: Mapping[str, float],
    ) -> dict[str, Matrix]:
        """The matrices of the batch of all ranks; with `owner_local`, those owned here."""
        if not self.owner_local:
            return joint_update(self.ranks, estimator, states, ios, weights)
        self._assign(self._optimizer._arranged().blocks)
        mine = {name: io for name, io in ios.items() if self.owners[name] == self.rank}
        scaled = {name: replace(io, g=part**-0.5 * io.g) for name, io in mine.items()}
        return updated(estimator, states, scaled, weights)

    def join_gradients(self, trained: Mapping[str, Parameter], share: float) -> Undo:
        """Replace every gradient by that of all ranks; one without any stays without.

        Raises:
            ValueError: If the ranks differ in parameters or in the numbers of groups, or if
                DistributedDataParallel did not average the gradients, or averaged what counts
                differently.
        """
        here = [p.grad is not None for p in trained.values()]
        names = [(name, tuple(p.shape), str(p.dtype)) for name, p in trained.items()]
        numbers = _numbers(self._optimizer)
        same = crc32(str((names, numbers)).encode())
        table = self.ranks.exchange("parameters", [len(here), crc32(bytes(here)), same, share])
        if (table[:, 2] != table[0, 2]).any():
            self.ranks.check_same("parameters and groups", [*_by_name(names), *_by_name(numbers)])
        there = here
        if (table[:, 1] != table[0, 1]).any():
            flags = self.ranks.objects("parameters", here)
            there = [any(of) for of in zip(*flags, strict=True)]
        undo = partial(_set_gradients, [(p, p.grad) for p in trained.values()])
        self._check_averaged(trained, table[:, 3].tolist())
        if self._ddp is not None:
            return undo
        joined = [p for p, some in zip(trained.values(), there, strict=True) if some]
        local = [torch.zeros_like(p) if p.grad is None else share * p.grad for p in joined]
        _set_gradients(list(zip(joined, self.ranks.summed("gradients", local), strict=True)))
        return undo

    def _check_averaged(self, trained: Mapping[str, Parameter], shares: list[float]) -> None:
        """Refuse gradients that are averaged where they should not be, and the other way round."""
        equal = max(shares) - min(shares) < 1e-9
        if self._ddp is None and equal:
            return  # the mean of equal gradients is each of them
        gradients = [p.grad for p in trained.values() if p.grad is not None]
        total = float(torch.stack([g.double().sum() for g in gradients]).sum()) if gradients else 0
        totals = self.ranks.exchange("averages", [total])[:, 0].tolist()
        alike = len(set(totals)) == 1 and total != 0 and total == total
        summed = adds_up(self._optimizer.loss)
        used = self._joint_loss_of == self._optimizer.steps
        if self._ddp is None and alike:
            raise ValueError(
                "All ranks have the same gradients, although their shards count "
                f"{shares} of the loss: were they averaged by a DistributedDataParallel that KFAC "
                "was not given? Pass it, KFAC(DistributedDataParallel(model), loss)."
            )
        if self._ddp is not None and len(set(totals)) > 1 and all(t == t for t in totals):
            raise ValueError(
                "The ranks have different gradients, so that DistributedDataParallel has not "
                "averaged them: call the DistributedDataParallel itself in the forward pass, not "
                "the module in it, and not within no_sync() in the last backward pass of a step."
            )
        if self._ddp is not None and (summed or not equal) and not used:
            raise ValueError(
                "DistributedDataParallel has averaged the gradients of the ranks, but "
                + (
                    "a loss with sum reduction needs their sum"
                    if summed
                    else f"their shards count {shares} of the loss"
                )
                + ". Train with the loss distribute(optimizer).joint_loss in place of loss."
            )

    def inverted(
        self,
        invert: Invert,
        blocks: Sequence[LayerGroup],
        matrices: Mapping[str, Matrix],
        damping: Mapping[str, float],
    ) -> dict[str, LinearMap]:
        """The inverses of some blocks that are held here: each is made by its owner."""
        self._assign(blocks)
        mine = [block for block in blocks if self.owners[block.names[0]] == self.rank]
        with self.together("inversion"):
            made = inverses(mine, matrices, damping, invert)
            forms = {name: self._form(name, M) for name, M in made.items()}
        return made if self.rows == 1 else self._from_column(made, forms)

    def _form(self, name: str, M: LinearMap) -> Any:
        """What an inverse looks like, without its numbers, for those who will get it."""
        if self.rows == 1:
            return None
        tensors = leaves(M)
        if not tensors:
            raise ValueError(
                f"The inverse of block {name!r}, a {type(M).__name__}, is no dataclass of tensors, "
                "so that it cannot be sent: call distribute(optimizer, workers=0)."
            )
        shapes = [t.to("meta") for t in tensors]
        return with_leaves(M, iter(shapes)), [is_symmetric(t) for t in tensors]

    def _from_column(
        self, made: Mapping[str, LinearMap], forms: Mapping[str, Any]
    ) -> dict[str, LinearMap]:
        """The inverses of this column, as their owners have made and sent them.

        An owner uses what it sent, too: its own tensors may be stored in another order of rows and
        columns, and products with them be rounded in another way.
        """
        device = self._optimizer._device()
        width = self.size // self.rows
        received: dict[str, LinearMap] = {}
        for owner, theirs in enumerate(self.ranks.objects("inverses", dict(forms))):
            if owner % width != self.rank % width or not theirs:
                continue
            packed: list[Tensor] = []
            for name, (form, symmetric) in theirs.items():
                like = [torch.empty_like(t, device=device) for t in leaves(form)]
                tensors = leaves(made[name]) if owner == self.rank else like
                packed += [
                    upper_triangle(t) if halved else t
                    for t, halved in zip(tensors, symmetric, strict=True)
                ]
            group = self._columns[owner % width]
            sent = iter(self.ranks.sent_from("inverses", packed, owner, group))
            for name, (form, symmetric) in theirs.items():
                whole = [
                    from_triangle(next(sent), len(t)) if halved else next(sent)
                    for t, halved in zip(leaves(form), symmetric, strict=True)
                ]
                received[name] = with_leaves(form, iter(whole))
        return received

    def directions(
        self, inverses: Mapping[str, LinearMap], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every inverse applied to its block's value, by the column that holds it."""
        width = self.size // self.rows
        columns_of = {name: self.owners[name] % width for name in values}
        mine = {n: V for n, V in values.items() if columns_of[n] == self.rank % width}
        local = {name: _checked(name, inverses[name] @ V, V) for name, V in mine.items()}
        if width == 1:
            return local
        row = self.rank // width
        senders = {name: row * width + column for name, column in columns_of.items()}
        return self._spread("directions", local, values, senders, self._rows[row])

    def curved(
        self, matrices: Mapping[str, Matrix], values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every matrix applied to its block's value: with `owner_local`, by its owner."""
        if not self.owner_local:
            return {name: matrices[name] @ V for name, V in values.items()}
        owners = {name: self.owners[name] for name in values}
        mine = {name: V for name, V in values.items() if owners[name] == self.rank}
        local = {name: matrices[name] @ V for name, V in mine.items()}
        return self._spread("products", local, values, owners, self.ranks.everyone)

    def _spread(
        self,
        what: str,
        local: Mapping[str, Tensor],
        values: Mapping[str, Tensor],
        senders: Mapping[str, int],
        group: Any,
    ) -> dict[str, Tensor]:
        """The values that some ranks have, on all ranks of a group, in the order of `values`."""
        self.ranks.exchange(what)
        found: dict[str, Tensor] = {}
        for sender in sorted(set(senders.values())):
            names = [name for name in values if senders[name] == sender]
            tensors = [local[n] if n in local else torch.empty_like(values[n]) for n in names]
            sent = self.ranks.sent_from(what, tensors, sender, group)
            found |= dict(zip(names, sent, strict=True))
        return {name: found[name] for name in values}

    def summed(self, value: Tensor) -> Tensor:
        """The sum of a value over all ranks."""
        (total,) = self.ranks.summed("controls", [value])
        return total

    # ---- checkpoints --------------------------------------------------------------------------

    def whole(self, known: Progress) -> Progress:
        """All matrices and inverses, on every rank. Every rank calls it."""
        self._assign(self._optimizer._arranged().blocks)
        with self.together("state_dict"):
            mine = [n for n in known.dampings if self.owners[n] == self.rank]
            parts = {n: _moved(known.inverses[n], "cpu") for n in mine}
            estimated = {}
            if self.owner_local:  # else every rank has all of them
                owned = [n for n in known.counts if self.owners[n] == self.rank]
                estimated = {n: _moved(known.matrices[n], "cpu") for n in owned}
        inverses = self._from_all(parts)
        matrices = self._from_all(estimated) if self.owner_local else known.matrices
        return replace(
            known,
            inverses={name: inverses[name] for name in known.dampings},
            matrices={name: matrices[name] for name in known.counts},
        )

    def _from_all(self, here: Mapping[str, Any]) -> dict[str, Any]:
        """The matrices that all ranks have, on the CPU."""
        everywhere = self.ranks.objects("state_dict", dict(here))
        return {name: M for theirs in everywhere for name, M in theirs.items()}

    def part(self, known: Progress) -> Progress:
        """The part of a checkpoint that this rank holds.

        Raises:
            ValueError: If the ranks have read different checkpoints.
        """
        sums = [float(t.double().sum()) for M in known.matrices.values() for t in leaves(M)]
        items = [("steps", known.steps), ("batches", known.counts), ("sums of matrices", sums)]
        self.ranks.check_same("the checkpoint", items)
        by_parameters = {shape.parameters: name for name, shape in known.shapes.items()}
        first = {name: by_parameters[shape.parameters] for name, shape in known.shapes.items()}
        self._own({n: sum(d**3 for d in known.shapes[n].shape) for n in first.values()}, first)
        width = self.size // self.rows
        owners = self.owners
        return replace(
            known,
            inverses={
                n: M for n, M in known.inverses.items() if owners[n] % width == self.rank % width
            },
            matrices={
                n: M
                for n, M in known.matrices.items()
                if not self.owner_local or owners[n] == self.rank
            },
        )

    # ---- owners -------------------------------------------------------------------------------

    def _assign(self, blocks: Sequence[LayerGroup]) -> None:
        """Owners for blocks that have none, by the cost of their inversion."""
        values = dict(self._optimizer.model.named_parameters())
        costs = {
            block.names[0]: float(sum(d**3 for W in block.matrices(values) for d in W.shape))
            for block in blocks
        }
        self._own(costs, {name: block.names[0] for block in blocks for name in block.names})

    def _own(self, costs: Mapping[str, float], first: Mapping[str, str]) -> None:
        """Owners for matrices that have none; those of one block have the same.

        Args:
            costs: By the name that stands for a block.
            first: That name, for the names of all matrices.
        """
        known = {
            first[name]: owner for name, owner in self.owners.items() if first.get(name) in costs
        }
        owners = assignment({n: float(cost) for n, cost in costs.items()}, self.size, known)
        self.owners = {name: owners[block] for name, block in first.items()} | self.owners


class JointLoss(Module):
    """A loss on one rank whose mean over the ranks is the loss of the whole batch.

    Use it in place of the loss under DistributedDataParallel, which takes the mean of the ranks'
    gradients, if shards have different numbers of terms or the loss is a sum. Not without it, and
    not in `KFAC(model, loss)`, which gets the loss itself. Without gradients, it is the loss here.

    It is the loss of one micro-batch of all ranks. If the gradients of several are added up, a mean
    is multiplied by the share of this micro-batch, that of all ranks together, in all terms. The
    share of this rank's part would be wrong for unequal shards.

    Cost: one exchange.
    """

    def __init__(self, loss: Module, together: Together) -> None:
        super().__init__()
        self.loss, self.together = loss, together

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        """The loss here, times `P * D_r / D`; for a sum, times `P`."""
        value: Tensor = self.loss(f, y)
        if not torch.is_grad_enabled():
            return value
        return self.together.share_of_loss(self.loss, y) * value


def _by_name(items: Sequence[Any]) -> list[tuple[str, str]]:
    return [(f"number {i}", str(item)) for i, item in enumerate(items)]


def _checked(name: str, P: Tensor, V: Tensor) -> Tensor:
    """A direction in the dtype of its gradient, as those who receive it expect it."""
    if P.shape != V.shape:
        raise ValueError(
            f"The inverse of block {name!r} makes {tuple(P.shape)} of {tuple(V.shape)}."
        )
    return P.to(V.dtype)


def _set_gradients(gradients: Sequence[tuple[Parameter, Tensor | None]]) -> None:
    for p, grad in gradients:
        p.grad = grad


def _moved(M: Any, device: Any) -> Any:
    """A matrix or an inverse on another device."""
    return with_leaves(M, iter([t.to(device) for t in leaves(M)]))
