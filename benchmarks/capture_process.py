"""A version's process in `benchmarks.capture`: it reads names of rows, and writes CPU seconds.

It is run as a file, with one version of the package on `PYTHONPATH`, and takes nothing but the
networks from this folder, so that all versions capture the same.
"""

import importlib.util
import inspect
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import kfac_scratch
from kfac_scratch import EXPAND, REDUCE, layer_ios, monte_carlo, type2

FISHERS = {"MC-1": monte_carlo(1), "type-2": type2}
FLAVOURS = {"expand": EXPAND, "reduce": REDUCE}


def networks() -> Any:
    """The module `benchmarks.nets` of this folder."""
    spec = importlib.util.spec_from_file_location("nets", Path(__file__).with_name("nets.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nets"] = module  # where its data classes look for themselves
    spec.loader.exec_module(module)
    return module


def runs_of(problem: Any) -> dict[str, Callable[[], Any]]:
    """What can be asked for, without the network's name."""
    flavour = "setting" if "setting" in inspect.signature(layer_ios).parameters else "flavour"
    data = problem.model, problem.loss, problem.X, problem.y
    options: dict[str, Any] = {"layers": problem.layers}
    runs = {}
    if hasattr(kfac_scratch, "Plans"):
        runs["plan"] = partial(kfac_scratch.plan, problem.model, problem.X, layers=problem.layers)
        options["plan"] = kfac_scratch.Plans()
    for fisher, vectors in FISHERS.items():
        for name, rows in FLAVOURS.items():
            runs[f"{fisher} {name}"] = partial(
                layer_ios, *data, vectors, **{flavour: rows}, **options
            )
    return runs


def main() -> None:
    torch.set_num_threads(1)
    nets = networks()
    sizes = nets.TINY if sys.argv[1] == "tiny" else nets.FULL
    problems = {net: nets.problem_of(sizes, net, torch.device("cpu")) for net in sizes}
    runs = {f"{net} {what}": f for net, of in problems.items() for what, f in runs_of(of).items()}
    print(json.dumps(kfac_scratch.__file__), flush=True)
    for line in sys.stdin:
        run = runs.get(line.strip())
        start = time.process_time()
        if run is not None:
            run()
        seconds = time.process_time() - start
        print(json.dumps(None if run is None else seconds), flush=True)


if __name__ == "__main__":
    main()
