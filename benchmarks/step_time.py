"""Milliseconds of a step, with what KFAC does every so often spread over its period."""

import statistics
import time

import torch

from benchmarks.loop import batches, take_step
from benchmarks.methods import METHODS, Config
from benchmarks.tasks import Task

STEPS = 50  # of one measurement: a multiple of every period
CONFIG: Config = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "momentum": 0.9,
    "nesterov": False,
    "damping": 1e-3,
    "decay": 0.95,
    "inverse": "factored",
}
PERIODS = {"default": (10, 10), "factors every 5": (5, 10), "every step": (1, 1)}


def step_times(task: Task, rounds: int) -> dict[str, dict]:
    """Median over rounds in which all methods take turns, and ratios to SGD's and AdamW's."""
    runs = {"sgd": ("sgd", (10, 10)), "adamw": ("adamw", (10, 10))} | {
        f"{name}, {when}": (name, periods)
        for name in ("kfac-expand", "kfac-reduce", "ekfac")
        for when, periods in PERIODS.items()
    }
    steps = {}
    for label, (name, periods) in runs.items():
        torch.manual_seed(0)
        model = task.model()
        steps[label] = model, METHODS[name].build(task, model, CONFIG | {"periods": periods})
    data = batches(task, seed=0)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for i in range(rounds + 1):
        for label, (model, optimizer) in steps.items():
            start = time.process_time()
            for _ in range(STEPS):
                take_step(model, task.loss, optimizer, *next(data))
            if i > 0:  # the first round warms up
                seconds[label].append((time.process_time() - start) / STEPS)
    ms = {label: 1e3 * statistics.median(of) for label, of in seconds.items()}
    return {
        label: {"ms": of, "to sgd": of / ms["sgd"], "to adamw": of / ms["adamw"]}
        for label, of in ms.items()
    }
