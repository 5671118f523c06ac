"""How the cost of a layer grows with its width: `python -m benchmarks.scaling`.

A square layer in float32 with a batch of fixed size. For each method two times: `update`, what is
done to one factor when its inverse is due, and `apply`, what a step costs beyond the gradient. They
are never added up, since the period between updates is the user's. `share` rows are what methods
share: the factor's moving average, which K-FAC, RS-KFAC and SRE-KFAC need, and the product of
rows that forms a gradient or a step. What every row measures is in the result, under `what`.

The inputs are Gaussian with variances that fall as a power of the coordinate's number. Errors are
those of the damped inverse of the moving average, at one width.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from kfac_scratch.approximations.brand import TruncatedFactor, product_of_rows, updated_factor
from kfac_scratch.approximations.randomized import Sketch, leading, rsvd, srevd, trace_matched
from kfac_scratch.linalg import eye_like, psd_eigh
from kfac_scratch.matrices.kronecker import KroneckerEigen
from kfac_scratch.matrices.kronecker_columns import KroneckerColumns
from kfac_scratch.matrices.low_rank import FourBlocks, LowRankKronecker

N, RANK, BATCHES, DECAY, POWER = 128, 64, 40, 0.95, 1.5
SKETCH = Sketch(RANK, oversampling=10, iterations=2)
DAMPING = 0.01  # times the largest eigenvalue
WIDTHS = [256, 512, 1024, 2048, 4096, 8192]
WIDER = [16384, 32768]  # where no square matrix is needed
FIT = 3  # exponents are fitted to so many of the largest widths

WHAT = {
    ("K-FAC", "update"): "one factor: eigendecomposition",
    ("RS-KFAC", "update"): "one factor: randomised decomposition with right singular vectors",
    ("SRE-KFAC", "update"): "one factor: randomised decomposition with Ritz pairs",
    ("B-KFAC", "update"): "one factor: truncation and Brand's update with the rows of a batch",
    ("SKFAC", "update"): "one factor: Cholesky decomposition of the rows' inner products",
    ("K-FAC", "apply"): "both factors: into the eigenbases, scale, and back",
    ("RS-KFAC", "apply"): "both factors: low-rank inverse times a gradient",
    ("B-KFAC", "apply"): "both factors: low-rank inverses times the rows of a gradient",
    ("SKFAC", "apply"): "both factors: Woodbury inverses times the rows of a gradient",
    ("average", "share"): "one factor: product of the rows, and moving average",
    ("gradient", "share"): "product of the rows of a gradient, or of a step in rows",
}


def rows_of(d: int, count: int, generator: torch.Generator) -> Tensor:
    """Rows with variances that decay, `count` of them."""
    device = generator.device
    scale = torch.arange(1, d + 1, device=device, dtype=torch.float32) ** (-POWER / 2)
    return torch.randn(count, d, generator=generator, device=device) * scale


def average(d: int, generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    """The moving average of a factor over some batches, and the batches."""
    batches = [rows_of(d, N, generator) / N**0.5 for _ in range(BATCHES)]
    total = 1 - DECAY**BATCHES
    weights = [(1 - DECAY) * DECAY ** (BATCHES - 1 - k) / total for k in range(BATCHES)]
    X = torch.cat([w**0.5 * X for w, X in zip(weights, batches, strict=True)])
    return X.T @ X, batches


def square_parts(d: int, generator: torch.Generator) -> dict[tuple[str, str], Callable]:
    """What needs a factor, or a gradient, as a square matrix."""
    M, (*_, X) = average(d, generator)
    G, Q = torch.randn(2, d, d, generator=generator, device=generator.device)
    kfac = KroneckerEigen(Q, Q, G)
    U, r, c = Q[:, :RANK].contiguous(), Q[:RANK, :RANK], Q[0, 0]
    low_rank = FourBlocks(U, U, r, r[0], r[1], c)
    return {
        ("K-FAC", "update"): lambda: psd_eigh(M),
        ("K-FAC", "apply"): lambda: kfac @ G,
        ("RS-KFAC", "update"): lambda: leading(M, SKETCH, rsvd),
        ("SRE-KFAC", "update"): lambda: leading(M, SKETCH, srevd),
        ("RS-KFAC", "apply"): lambda: low_rank @ G,
        ("average", "share"): lambda: M.lerp(X.T @ X, 1 - DECAY),
        ("gradient", "share"): lambda: X.T @ X,
    }


def row_parts(d: int, generator: torch.Generator) -> dict[tuple[str, str], Callable]:
    """What needs only the rows of a batch and a few eigenvectors."""
    X, X2, X3 = (rows_of(d, N, generator) / N**0.5 for _ in range(3))
    state = updated_factor(
        updated_factor(empty(X), X.T, 1.0, RANK, trace_matched), X2.T, 0.5, RANK, trace_matched
    )
    U, w, c = state
    brand = LowRankKronecker(U, w, c, U, w, c)
    one = X.new_ones(1, 1)
    woodbury = KroneckerColumns(X.T, X.T).inverse_of_damped_factors(0.1, 0.1)

    def rows_by_woodbury() -> tuple[Tensor, Tensor]:
        WA, WB = woodbury.WA, woodbury.WB
        return X2 - (X2 @ WB.T) @ WB, X3 - (X3 @ WA.T) @ WA

    return {
        ("B-KFAC", "update"): lambda: updated_factor(state, X3.T, 0.05, RANK, trace_matched),
        ("B-KFAC", "apply"): lambda: product_of_rows(brand, X2, X3),
        ("SKFAC", "update"): lambda: KroneckerColumns(X.T, one).inverse_of_damped_factors(0.1, 0.1),
        ("SKFAC", "apply"): rows_by_woodbury,
    }


def empty(X: Tensor) -> TruncatedFactor:
    return X.new_zeros(X.shape[1], 0), X.new_zeros(0), X.new_zeros(())


def seconds(run: Callable, budget: float, device: torch.device) -> list[float]:
    """At least two times, and as many as fit the budget, after a run that warms up if it is short.

    On a CPU, the time that the process computed, on one thread: what else runs does not count.
    """
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 30):
        start = clock(device)
        run()
        times.append(clock(device) - start)
        if len(times) == 2 and times[0] > 10:
            return times
    return times[1:]


def clock(device: torch.device) -> float:
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(widths: list[int], wider: list[int], budget: float, device: torch.device) -> list[dict]:
    """All times, one row for each width, method and part, printed as they come."""
    rows = []
    for d in widths + wider:
        generator = torch.Generator(device).manual_seed(d)
        parts = row_parts(d, generator)
        if d in widths:
            parts |= square_parts(d, generator)
        for (method, part), run in parts.items():
            times = seconds(run, budget, device)
            rows.append({"width": d, "method": method, "part": part, "seconds": times})
            print(f"{d:6d} {method:9s}{part:7s}{1e3 * median(times):12.3f} ms", flush=True)
    return rows


def slope(points: list[tuple[float, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    x, y = ([math.log(p[i]) for p in points] for i in (0, 1))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )


def exponents(rows: list[dict], draws: int = 2000) -> list[dict]:
    """The power of the width that each median time grows with at the large end, and its spread.

    The interval holds 90 % of the fits to repetitions drawn anew, with replacement.
    """
    found, chance = [], random.Random(0)
    for method, part in WHAT:
        mine = [r for r in rows if (r["method"], r["part"]) == (method, part)][-FIT:]
        times = {r["width"]: r["seconds"] for r in mine}
        fit = slope([(d, median(t)) for d, t in times.items()])
        fits = sorted(
            slope([(d, median(chance.choices(t, k=len(t)))) for d, t in times.items()])
            for _ in range(draws)
        )
        low, high = fits[draws // 20], fits[-draws // 20]
        row = {"method": method, "part": part, "exponent": fit, "interval": [low, high]}
        found.append(row | {"widths": list(times)})
        print(f"{method:9s}{part:7s} grows as d^{fit:.2f} (90 %: {low:.2f} to {high:.2f})")
    return found


def faster_from(rows: list[dict]) -> dict[str, dict[str, int | None]]:
    """The width from which on, as far as measured, a method takes less time than K-FAC."""
    times = {(r["method"], r["part"], r["width"]): median(r["seconds"]) for r in rows}
    widths = sorted({d for m, _, d in times if m == "K-FAC"})
    found: dict[str, dict[str, int | None]] = {}
    for method, part in WHAT:
        if part == "share" or method == "K-FAC":
            continue
        slower = [d for d in widths if times[method, part, d] >= times["K-FAC", part, d]]
        rest = [d for d in widths if d > max(slower, default=0)]
        found.setdefault(method, {})[part] = min(rest, default=None)
    return found


def errors(d: int, device: torch.device) -> dict[str, float]:
    """Relative Frobenius errors of the damped inverse of the average after the last batch."""
    M, batches = average(d, torch.Generator(device).manual_seed(0))
    damping = DAMPING * float(torch.linalg.eigvalsh(M)[-1])

    def inverse(M: Tensor) -> Tensor:
        return torch.linalg.inv(M.double() + damping * eye_like(M.double()))

    def dense(U: Tensor, w: Tensor, c: Tensor) -> Tensor:
        return (U * (w - c)) @ U.T + c * eye_like(M)

    factor = empty(batches[0])
    for t, X in enumerate(batches, start=1):
        weight = (1 - DECAY) / (1 - DECAY**t)
        factor = updated_factor(factor, X.T, weight, RANK, trace_matched)
    found = {"B-KFAC": dense(*factor), "SKFAC (last batch only)": batches[-1].T @ batches[-1]}
    w, U = (t.flip(-1) for t in psd_eigh(M))
    pairs = {"exact eigenpairs": (w[:RANK], U[:, :RANK])}
    pairs |= {"RS-KFAC": leading(M, SKETCH, rsvd), "SRE-KFAC": leading(M, SKETCH, srevd)}
    for name, (w, U) in pairs.items():
        found[name] = dense(U, w, trace_matched(w, M.trace(), d))
    found["no factor at all"] = M.trace() / d * eye_like(M)
    exact = inverse(M)
    return {k: float((inverse(A) - exact).norm() / exact.norm()) for k, A in found.items()}


def about(device: torch.device) -> dict:
    """What the numbers depend on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "versions": {"torch": version("torch"), "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processor": names[0] if names else platform.machine(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "clock": "CPU time of the process" if device.type == "cpu" else "wall clock",
        "dtype": "float32",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--wider", type=int, nargs="*", default=WIDER, help="for rows only")
    parser.add_argument("--error-width", type=int, default=1024)
    parser.add_argument("--budget", default=2.0, type=float, help="seconds for each time")
    parser.add_argument("--json", type=Path, help="where to write the result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    result = about(args.device)
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    result |= {"batch": N, "rank": RANK, "oversampling": SKETCH.oversampling}
    result |= {"iterations": SKETCH.iterations, "decay": DECAY, "variances": f"i^-{POWER}"}
    result["what"] = [{"method": m, "part": p, "is": text} for (m, p), text in WHAT.items()]
    rows = measure(args.widths, args.wider, args.budget, args.device)
    result |= {"exponents": exponents(rows), "faster than K-FAC from": faster_from(rows)}
    found = errors(args.error_width, args.device)
    result["errors"] = {"width": args.error_width, "damping": DAMPING, "of the inverse": found}
    print(result["faster than K-FAC from"], result["errors"], sep="\n")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
