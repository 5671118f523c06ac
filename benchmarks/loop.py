"""One training run of `benchmarks.training`: the loop, its schedule, and when a target is hit."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from benchmarks.calls import counted
from benchmarks.measure import first_line
from benchmarks.methods import Config, Method
from benchmarks.tasks import Task
from kfac_scratch import KFAC


@dataclass
class Run:
    """What one training run gave; lists have one entry for every evaluation."""

    seed: int
    steps: int | None = None  # to the hit
    cpu: float | None = None  # seconds to the hit
    total: float = 0.0  # CPU seconds of the whole run
    metric: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # on the batch
    error: str | None = None  # why it ended early
    calls: dict[str, int] = field(default_factory=dict)  # of the functions that prove the method


def train(task: Task, method: Method, config: Config, seed: int, limit: float | None = None) -> Run:
    """Train until the schedule ends; with a limit, until the hit or until the cost exceeds it.

    The clock runs from the batch to the new parameters, and stands still while they are evaluated.
    """
    run = Run(seed)
    with counted(method.proof) as run.calls:
        _train(run, task, method, config, limit)
    return run


def _train(run: Run, task: Task, method: Method, config: Config, limit: float | None) -> None:
    torch.manual_seed(run.seed)
    model = task.model()
    optimizer = method.build(task, model, config)
    horizon = round(config["horizon"] * task.budget)
    schedule = LambdaLR(optimizer, lambda k: cosine(k / horizon, config["warmup"]))
    data, clock = batches(task, run.seed), []
    for step in range(1, horizon + 1):
        start = time.process_time()
        try:
            loss = take_step(model, task.loss, optimizer, *next(data))
        except (ValueError, LinAlgError) as error:  # not finite, or a matrix without an inverse
            run.error = first_line(error)
            break
        schedule.step()
        run.total += time.process_time() - start
        if step % task.every == 0:
            run.metric.append(round(task.measured(model), 5))
            run.loss.append(round(loss.item(), 5))
            clock.append(run.total)
            if run.steps is None and (hit := first_hit(task, run.metric)) is not None:
                run.steps, run.cpu = (hit + 1) * task.every, clock[hit]
            if not math.isfinite(run.loss[-1]):
                run.error = "The loss is not finite."
                break
            if limit is not None and (run.steps is not None or step * run.total > limit):
                break


def take_step(
    model: nn.Module, loss: nn.Module, optimizer: Optimizer, X: Tensor, y: Tensor
) -> Tensor:
    """The loop that every optimizer here has, with KFAC's one more line."""
    optimizer.zero_grad()
    value = loss(model(X), y)
    value.backward()
    if isinstance(optimizer, KFAC):
        optimizer.observe(X, y)
    optimizer.step()
    return value.detach()


def cosine(progress: float, warmup: float) -> float:
    """The learning rate's factor: up a line, then down half a cosine."""
    if progress < warmup:
        return progress / warmup + 1e-3
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def first_hit(task: Task, metric: list[float]) -> int | None:
    """Index of the first of two consecutive evaluations that reach the target."""
    reached = [task.reached(value) for value in metric]
    return next((i for i in range(len(reached) - 1) if reached[i] and reached[i + 1]), None)


def batches(task: Task, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of one size, for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(task.X), generator=generator)
        for index in order.split(task.batch):
            if len(index) == task.batch:
                yield task.X[index], task.y[index]
