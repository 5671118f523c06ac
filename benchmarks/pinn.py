"""Taylor mode and PINN optimizers: `python -m benchmarks.pinn laplacian`, `steps` or `training`.

- `laplacian`: time and memory of a Laplacian with its gradient, by forward Laplacian, by nested
  reverse mode and by `torch.func.hessian`, for dimensions 2 to 100.
- `steps`: milliseconds of processor time for one step of each optimizer, beside the same KFAC* step
  with autograd's passes instead of cached coefficients (`KFAC* by autograd`).
- `training`: error against seconds of processor time. Rows are added to the file given by `--json`,
  so that runs may be split: `--problem`, `--method`, `--seeds`.

Float64. Implementations take turns in every round, and results are compared before they are timed.
"""

import argparse
import ctypes
import json
import math
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.factors import _synchronize, about
from kfac_scratch.pinn import Field, linearize, loss
from kfac_scratch.pinn_gramian import assign, flat, moved, residuals, weights
from kfac_scratch.pinn_krylov import KFACKrylov
from kfac_scratch.pinn_metric import TermWise, ekfac_inverse
from kfac_scratch.pinn_problems import Problem, heat, mlp, poisson, poisson_cosines
from kfac_scratch.pinn_solvers import combined, dense, in_kernel, per_layer
from kfac_scratch.pinn_steps import KFAC, GaussNewton, KFACStar, Spring
from kfac_scratch.taylor import forward_laplacian, taylor

# ---- Laplacians ----------------------------------------------------------------------------------


def by_forward(net: nn.Module, X: Tensor) -> Tensor:
    return forward_laplacian(net, X)[2].squeeze(1)


def by_nesting(net: nn.Module, X: Tensor) -> Tensor:
    X = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(X).sum(), X, create_graph=True)
    total = torch.zeros(len(X)).to(X)
    for i in range(X.shape[1]):
        total = total + torch.autograd.grad(gradient[:, i].sum(), X, create_graph=True)[0][:, i]
    return total


def by_hessian(net: nn.Module, X: Tensor) -> Tensor:
    H = torch.func.vmap(torch.func.hessian(lambda x: net(x).squeeze()))(X)
    return H.diagonal(dim1=1, dim2=2).sum(1)


WAYS = {"forward": by_forward, "nested": by_nesting, "torch.func": by_hessian}


def peak_memory(run: Callable[[], None], device: torch.device) -> float | None:
    """Mebibytes above what was in use before, if the system can tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory would be used again, unseen
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 2**10
    except OSError:
        return None


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith(name)).split()[1])


def laplacians(device: torch.device, rounds: int) -> list[dict]:
    rows = []
    for d in (2, 5, 10, 20, 50, 100):
        torch.manual_seed(0)
        net, X = mlp(d, 256, 256, 128, 128, 1).to(device), torch.randn(128, d, device=device)
        parameters = [p for p in net.parameters() if p.ndim == 2]

        def run(
    case: tuple[Problem, tuple, int, int], setup: Setup, seconds: float, seed: int, device
) -> list[tuple[float, float]]:
    """Pairs of processor time, of the steps only, and error; fresh points now and then."""
    problem, sizes, inside, border = case
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    torch.manual_seed(seed)
    model, state = mlp(*sizes).to(device), None
    generator = torch.Generator(device).manual_seed(seed)
    test = problem.points(9000, torch.Generator(device).manual_seed(1000 + seed))
    used, count, curve, due = 0.0, 0, [(0.0, problem.error(model, test))], 0.25
    while used < seconds:
        start = clock()
        if count % setup.keep == 0:
            terms = problem.terms(inside, border, generator)
        state = setup.method.step(model, terms, state)
        _synchronize(device)
        used, count = used + clock() - start, count + 1
        if used >= due:
            curve.append((used, problem.error(model, test)))
            due *= 1.15
    curve.append((used, problem.error(model, test)))
    print(f"    seed {seed}: {curve[-1][1]:.2e} after {count} steps", flush=True)
    return curve


def at(curve: list[tuple[float, float]], seconds: float) -> float:
    return [error for t, error in curve if t <= seconds * 1.001 or t == 0][-1]


def training(args: argparse.Namespace) -> list[dict]:
    rows = []
    for name, case in (LARGE if args.large else PROBLEMS).items():
        if args.problem not in (None, name):
            continue
        for method_name, setup in methods(name, args.seconds).items():
            if args.method and method_name not in args.method:
                continue
            print(f"{name}, {method_name}", flush=True)
            curves = [
                run(case, setup, args.seconds, seed, args.device)
                for seed in range(args.first_seed, args.first_seed + args.seeds)
            ]
            grid = [t for t in (0.25 * 1.15**k for k in range(60)) if t < args.seconds]
            grid.append(args.seconds * 1.01)
            median = [statistics.median(at(curve, t) for curve in curves) for t in grid]
            rows.append(
                {
                    "problem": name,
                    "method": method_name,
                    "seeds": [args.first_seed + i for i in range(args.seeds)],
                    "seconds": [round(t, 3) for t in grid],
                    "median": [float(f"{e:.3e}") for e in median],
                    "final": [float(f"{curve[-1][1]:.3e}") for curve in curves],
                }
            )
            if args.json:
                save(args, rows[-1:])
    return rows


def save(args: argparse.Namespace, rows: list[dict]) -> None:
    """Write rows; training keeps those of other problems and methods that are in the file."""
    result = about(args.device) | {"dtype": "float64", "rows": []}
    if args.what == "training":
        result["budget"] = args.seconds
        if args.json.exists():
            new = {(row["problem"], row["method"]) for row in rows}
            old = json.loads(args.json.read_text())["rows"]
            result["rows"] = [r for r in old if (r["problem"], r["method"]) not in new]
    result["rows"] += rows
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["laplacian", "steps", "training"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--seconds", default=60.0, type=float, help="budget of a training run")
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--first-seed", default=1, type=int, help="settings were tuned on seed 0")
    parser.add_argument("--problem", help="only this one")
    parser.add_argument("--method", action="append", help="only this one; may be repeated")
    parser.add_argument("--large", action="store_true", help="the networks with 117k weights")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float64)
    if args.what != "laplacian":  # which measures memory
        keep_memory()
    if args.what == "training":
        training(args)
        return
    rows = (laplacians if args.what == "laplacian" else steps)(args.device, args.rounds)
    if args.json:
        save(args, rows)


if __name__ == "__main__":
    main()
