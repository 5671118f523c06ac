"""Taylor mode and PINN optimizers: `python -m benchmarks.pinn laplacian`, `steps`, ...

- `laplacian`: time and memory of a Laplacian with its gradient, by forward Laplacian, by nested
  reverse mode and by `torch.func.hessian`, for dimensions 2 to 100.
- `steps`: milliseconds of processor time for one step of each optimizer, beside the same KFAC* step
  with autograd's passes instead of cached coefficients (`KFAC* by autograd`).
- `preconditioners`: error against seconds of processor time for one method with EKFAC, TKFAC, KPSVD
  in the place of KFAC. Rows are added to the file given by `--json`, so that runs may be split:
  `--problem`, `--method`, `--seeds`.

Methods are compared with each other by `benchmarks.pinn_training`.

Float64. Implementations take turns in every round, and results are compared before they are timed.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.measure import about, clock, keep_memory, peak_memory
from benchmarks.pinn_methods import PINN_TASKS, PinnTask
from kfac_scratch import ekfac, kfac
from kfac_scratch.approximations.estimators import Latest
from kfac_scratch.approximations.kpsvd import kpsvd
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.pinn.gramian import assign, block_weights, flat, moved, residuals
from kfac_scratch.pinn.krylov import KFACKrylov
from kfac_scratch.pinn.preconditioners import Joined, TermWise, ekfac_inverse
from kfac_scratch.pinn.problems import mlp
from kfac_scratch.pinn.solvers import (
    linear_combination,
    two_directions_per_layer,
)
from kfac_scratch.pinn.steps import GaussNewton, KFACStar, PinnKFAC, PinnOptimizer
from kfac_scratch.pinn.terms import Field, linearize, pinn_loss
from kfac_scratch.taylor.jets import forward_laplacian, taylor_coefficients

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


class Multiplications(TorchDispatchMode):
    """Counts the additions and multiplications of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.count += formula(*args, **(kwargs or {}), out_val=out)
        return out


def arithmetic(run: Callable[[], None]) -> int:
    """How many operations the matrix products of a run need."""
    with Multiplications() as counted:
        run()
    return counted.count


def laplacians(device: torch.device, rounds: int) -> list[dict]:
    rows = []
    for d in (2, 5, 10, 20, 50, 100):
        torch.manual_seed(0)
        net, X = mlp(d, 256, 256, 128, 128, 1).to(device), torch.randn(128, d, device=device)
        parameters = [p for p in net.parameters() if p.ndim == 2]

        def run(way: Callable[[nn.Module, Tensor], Tensor], net=net, X=X, W=parameters) -> None:
            torch.autograd.grad(way(net, X).sum(), W)

        results = [way(net, X).detach() for way in WAYS.values()]
        error = max(float((r - results[0]).abs().max() / results[0].abs().max()) for r in results)
        assert error < 1e-10, error
        runs = {name: (lambda way=way: run(way)) for name, way in WAYS.items()}
        ms = processor_times(runs, rounds, device)
        memory = {name: peak_memory(of, device) for name, of in runs.items()}
        flop = {name: arithmetic(of) for name, of in runs.items()}
        rows.append({"d": d, "ms": ms, "MiB": memory, "flop": flop, "error": error})
        cells = (
            f"{name} {ms[name]:6.1f} ms ({ms[name] / ms['forward']:.2f}) "
            f"{flop[name] / 1e9:5.2f} GFLOP ({flop[name] / flop['forward']:.2f}) "
            f"{memory[name] or 0:4.0f} MiB"
            for name in WAYS
        )
        print(f"d = {d:3}  " + "   ".join(cells), flush=True)
    return rows


def processor_times(
    runs: dict[str, Callable], rounds: int, device: torch.device
) -> dict[str, float]:
    """Median milliseconds over rounds: of the processor, or on a GPU of the clock."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            start = clock(device)
            run()
            if i > 1:
                times[name].append(1e3 * (clock(device) - start))
    return {name: statistics.median(values) for name, values in times.items()}


# ---- problems and methods ------------------------------------------------------------------------

NAMES = {
    "Poisson 2d": "poisson-2d",
    "heat 1+1d": "heat",
    "Poisson 5d": "poisson-5d",
    "Poisson 2d, deep": "poisson-2d-deep",
}
PROBLEMS = {name: PINN_TASKS[short] for name, short in NAMES.items()}


class StarByAutograd:
    """KFAC* whose gradient and products with `J` are passes of autograd, as is common."""

    def __init__(self, preconditioner: TermWise, damping: float) -> None:
        self.preconditioner, self.damping = preconditioner, damping

    def step(self, model: nn.Module, terms: list, state=None):
        count, preconditioner, previous = state or (0, None, None)
        lin = linearize(model, terms)
        preconditioner, inverses = self.preconditioner.update(
            preconditioner, lin, self.damping, count + 1
        )
        value = pinn_loss(model, terms)
        parameters = dict(model.named_parameters())
        grads = torch.autograd.grad(value, list(parameters.values()))
        layers = dict(model.named_modules())
        gradient, columns = dict(zip(parameters, grads, strict=True)), []
        newest = {
            n: -(M @ torch.cat([gradient[f"{n}.weight"], gradient[f"{n}.bias"][:, None]], 1))
            for n, M in inverses.items()
        }
        directions = [newest] if previous is None else [newest, previous]
        for d in directions:  # J d by double reverse mode
            parts = []
            for term in terms:
                parts.append(_forward_mode(model, layers, term, d))
            columns.append(torch.cat(parts))
        J, rho = torch.stack(columns, 1), residuals(flat(lin))
        lengths = torch.tensor(
            [[sum((x[n] * y[n]).sum() for n in x) for y in directions] for x in directions]
        )
        c = -torch.linalg.solve(J.T @ J + self.damping * lengths, J.T @ rho)
        step = linear_combination(directions, c)
        assign(model, moved(block_weights(model), step))
        return count + 1, preconditioner, step


def _forward_mode(model, layers, term, direction) -> Tensor:
    c = taylor_coefficients(model, term.X, term.expansion)
    r = term.residual(Field(list(c.unbind(1)), term.expansion), term.X).flatten()
    r = r * (term.weight / len(term.X)) ** 0.5
    W = [p for n in direction for p in (layers[n].weight, layers[n].bias)]
    V = [v for n in direction for v in (direction[n][:, :-1], direction[n][:, -1])]
    dummy = torch.zeros_like(r, requires_grad=True)
    rows = torch.autograd.grad(r, W, dummy, create_graph=True, allow_unused=True)
    used = [(row, v) for row, v in zip(rows, V, strict=True) if row is not None]
    (product,) = torch.autograd.grad([row for row, _ in used], dummy, [v for _, v in used])
    return product


class Setup(NamedTuple):
    """A method, and for how many steps it keeps its points."""

    method: object
    keep: int = 100


def methods(task: PinnTask) -> dict[str, PinnOptimizer]:
    options, wise = {"chunk": task.chunk}, TermWise(0.6)
    corrected = TermWise(0.6, ekfac_inverse)
    return {
        "KFAC": PinnKFAC(preconditioner=wise, **options),
        "KFAC*": KFACStar(preconditioner=wise, **options),
        "KFAC* per layer": KFACStar(
            candidates=two_directions_per_layer, preconditioner=wise, **options
        ),
        "EKFAC*": KFACStar(preconditioner=corrected, **options),
        "KFAC*, more directions": more_directions(task).method,
        "Gauss-Newton": GaussNewton(solver=task.solver, **options),
    }


def more_directions(task: PinnTask) -> Setup:
    """Settings found on seed 0."""
    corrected = TermWise(0.6, ekfac_inverse)
    if len(task.sizes) > 3:
        return Setup(KFACKrylov(20, 1, 1e-13, preconditioner=corrected), 10)
    if task.sizes[0] == 5:
        slowly = TermWise(0.9, ekfac_inverse)
        return Setup(KFACKrylov(10, 1, 1e-2, preconditioner=slowly, chunk=task.chunk))
    return Setup(KFACKrylov(1, 8, 1e-10, 1e-10, preconditioner=corrected))


def preconditioners(task: PinnTask) -> dict[str, Setup]:
    """The method with more directions, with any approximation in the place of the paper's KFAC."""
    method, keep = more_directions(task)
    wise = {
        "KFAC for each term": TermWise(0.6),
        "EKFAC for each term": TermWise(0.6, ekfac_inverse),
    }
    of_all = {
        "KFAC": kfac,
        "EKFAC": Latest(ekfac),
        "TKFAC": tkfac,
        "KPSVD": partial(kpsvd, tolerance=0.01),
    }
    found = {
        name: replace(method, preconditioner=preconditioner)
        for name, preconditioner in wise.items()
    }
    for name, approximation in of_all.items():
        preconditioner = Joined(approximation, 0.6)
        found[f"{name} of all terms"] = replace(method, preconditioner=preconditioner, floor=1e-7)
    return {name: Setup(of, keep) for name, of in found.items()}


def stepper(method, model: nn.Module, terms: list) -> Callable[[], None]:
    """A function that makes the next step, each time it is called."""
    state = None

    def run() -> None:
        nonlocal state
        state = method.step(model, terms, state)

    return run


def steps(device: torch.device, rounds: int) -> list[dict]:
    rows = []
    for name, task in PROBLEMS.items():
        terms = task.terms(torch.Generator(device).manual_seed(0))
        chosen = methods(task) | {"KFAC* by autograd": StarByAutograd(TermWise(0.6), 1e-10)}
        runs = {}
        for method_name, method in chosen.items():
            torch.manual_seed(0)
            runs[method_name] = stepper(method, mlp(*task.sizes).to(device), terms)
        ms = processor_times(runs, rounds, device)
        rows.append({"problem": name, "ms": ms})
        print(f"{name:18}" + "  ".join(f"{n} {t:6.1f}" for n, t in ms.items()), flush=True)
    return rows


# ---- training ------------------------------------------------------------------------------------


def run(
    task: PinnTask, setup: Setup, seconds: float, seed: int, device: torch.device
) -> list[tuple[float, float]]:
    """Pairs of processor time, of the steps only, and error; fresh points now and then."""
    problem = task.problem
    torch.manual_seed(seed)
    model, state = mlp(*task.sizes).to(device), None
    generator = torch.Generator(device).manual_seed(seed)
    test = problem.points(9000, torch.Generator(device).manual_seed(1000 + seed))
    used, count, curve, due = 0.0, 0, [(0.0, problem.error(model, test))], 0.25
    while used < seconds:
        start = clock(device)
        if count % setup.keep == 0:
            terms = task.terms(generator)
        state = setup.method.step(model, terms, state)
        used, count = used + clock(device) - start, count + 1
        if used >= due:
            curve.append((used, problem.error(model, test)))
            due *= 1.15
    curve.append((used, problem.error(model, test)))
    print(f"    seed {seed}: {curve[-1][1]:.2e} after {count} steps", flush=True)
    return curve


def at(curve: list[tuple[float, float]], seconds: float) -> float:
    return [error for t, error in curve if t <= seconds * 1.001 or t == 0][-1]


def training(args: argparse.Namespace) -> None:
    for name, task in PROBLEMS.items():
        if args.problem not in (None, name):
            continue
        for method_name, setup in preconditioners(task).items():
            if args.method and method_name not in args.method:
                continue
            print(f"{name}, {method_name}", flush=True)
            curves = [
                run(task, setup, args.seconds, seed, args.device)
                for seed in range(args.first_seed, args.first_seed + args.seeds)
            ]
            grid = [t for t in (0.25 * 1.15**k for k in range(60)) if t < args.seconds]
            grid.append(args.seconds * 1.01)
            median = [statistics.median(at(curve, t) for curve in curves) for t in grid]
            row = {
                "problem": name,
                "method": method_name,
                "seeds": [args.first_seed + i for i in range(args.seeds)],
                "seconds": [round(t, 3) for t in grid],
                "median": [float(f"{e:.3e}") for e in median],
                "final": [float(f"{curve[-1][1]:.3e}") for curve in curves],
            }
            if args.json:
                save(args, [row])


def save(args: argparse.Namespace, rows: list[dict]) -> None:
    """Write rows; training keeps those of other problems and methods that are in the file."""
    result = about(args.device) | {"dtype": "float64", "rows": []}
    if args.what == "preconditioners":
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
    parser.add_argument("what", choices=["laplacian", "steps", "preconditioners"])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=15, type=int)
    parser.add_argument("--threads", default=1, type=int)
    parser.add_argument("--seconds", default=10.0, type=float, help="budget of a training run")
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--first-seed", default=1, type=int, help="settings were tuned on seed 0")
    parser.add_argument("--problem", help="only this one")
    parser.add_argument("--method", action="append", help="only this one; may be repeated")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_default_dtype(torch.float64)
    if args.what != "laplacian":  # which measures memory
        keep_memory()
    if args.what == "preconditioners":
        training(args)
        return
    rows = (laplacians if args.what == "laplacian" else steps)(args.device, args.rounds)
    if args.json:
        save(args, rows)


if __name__ == "__main__":
    main()
