"""Every variant trains two tasks, with the settings that were found for EKFAC and no others.

Nothing is tuned: only what gives the curvature is exchanged, so that this says whether a variant
can be trained with, not which is best.
"""

from functools import partial
from typing import Any

from torch import nn

from benchmarks.loop import train
from benchmarks.methods import Config, Method, curvature
from benchmarks.tasks import Task
from kfac_scratch import KFAC, kfac, monte_carlo
from kfac_scratch.approximations.brand import Brand
from kfac_scratch.approximations.cg_fac import cg_fac, truncated_inverse
from kfac_scratch.approximations.ekfac import AmortisedEKFAC
from kfac_scratch.approximations.estimators import Latest, MovingAverage
from kfac_scratch.approximations.kpsvd import (
    Recompressed,
    guarded_inverse,
    kfac_corrected,
    nearest_product,
    nearest_sum,
)
from kfac_scratch.approximations.mini_block import mini_block, mini_block_shared
from kfac_scratch.approximations.randomized import randomized
from kfac_scratch.approximations.skfac import Window, mean_over_positions, skfac
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.kronecker_columns import KroneckerColumns
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.two_level import adef2, coarse_correction

SEEDS = (200, 201, 202)


def skfac_of_averages(io: LayerIO) -> KroneckerColumns:
    """A convolution's positions are averaged: otherwise columns are as many as rows."""
    return skfac(mean_over_positions(io))


VARIANTS: dict[str, dict[str, Any]] = {
    "none": {"approximation": kfac, "damping": 1e3},  # the same graft without curvature
    "kfac": {"approximation": kfac},
    "ekfac": {"approximation": AmortisedEKFAC(1)},
    "tkfac": {"approximation": tkfac},
    "tekfac": {"approximation": AmortisedEKFAC(1, MovingAverage(tkfac))},
    "kpsvd": {"approximation": Recompressed(nearest_product)},
    "deflation": {"approximation": Recompressed(nearest_sum), "invert": guarded_inverse},
    "kfac_corrected": {"approximation": Latest(kfac_corrected), "invert": guarded_inverse},
    "skfac": {"approximation": Window(5, skfac_of_averages)},
    "randomized": {"approximation": randomized(32)},
    "brand": {"approximation": Brand(32)},
    "mini_block": {"approximation": mini_block},
    "mini_block_shared": {"approximation": mini_block_shared},
    "cg_fac": {"approximation": Latest(cg_fac), "invert": truncated_inverse},
    "two_level_additive": {"approximation": kfac, "controls": [coarse_correction(monte_carlo(1))]},
    "two_level_adef2": {
        "approximation": kfac,
        "controls": [coarse_correction(monte_carlo(1), combine=adef2)],
    },
}


def build(options: dict[str, Any], task: Task, model: nn.Module, config: Config) -> KFAC:
    """The optimizer with another approximation, its inverse, and controls before the graft."""
    own = {"inverse": "exact", "damping": options.get("damping", config["damping"])}
    optimizer = curvature(task, model, config | own, options["approximation"])
    optimizer.invert = options.get("invert", exact_inverse)
    optimizer.controls = (*options.get("controls", ()), *optimizer.controls)
    return optimizer


def outcomes(task: Task, config: Config) -> dict[str, dict]:
    """For every variant: hits, steps to the hit, the best value, and errors, over three seeds."""
    table = {}
    for name, options in VARIANTS.items():
        method = Method({}, partial(build, options))
        runs = [train(task, method, config, seed) for seed in SEEDS]
        table[name] = {
            "steps": [run.steps for run in runs],
            "best": [task.best(run.metric) for run in runs],
            "seconds": [run.total for run in runs],
            "errors": [run.error for run in runs if run.error],
        }
        print(f"{name:20s}{table[name]}", flush=True)
    return table
