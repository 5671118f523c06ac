"""How long KFAC's factors take, beside curvlinops and BackPACK: `python -m benchmarks.factors`.

Everything in one run, on one device, in float32 and on the same data; implementations take turns
in every round, and the median over rounds is reported. Before the clock starts, results are
compared through the product of each layer's block with a random matrix. Monte Carlo vectors come
from different seeds and are not compared. Needs the test dependencies.
"""

import argparse
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor, nn

from kfac_scratch import EXPAND, REDUCE, empirical, kfac_over, monte_carlo, type2
from tests import reference

FISHERS = {
    "type-2": (type2, {"fisher_type": "type-2"}, ("KFLR", {})),
    "MC-1": (monte_carlo(1), {"fisher_type": "mc"}, ("KFAC", {"mc_samples": 1})),
    "empirical": (empirical, {"fisher_type": "empirical"}, None),
}
FLAVOURS = {"expand": EXPAND, "reduce": REDUCE}
TOLERANCE = 1e-3  # float32, sums over thousands of rows in different orders


class Block(nn.Module):
    """A transformer block built of linear layers."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (
            p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class MeanOverPositions(nn.Module):
    def forward(self, x):
        return x.mean(1)


def mlp():
    layers = [nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return nn.Sequential(*layers), torch.randn(128, 784)


def cnn():
    first = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(2048, 10)), torch.randn(
        64, 3, 32, 32
    )


def transformer():
    blocks = [Block(128), Block(128)]
    model = nn.Sequential(*blocks, MeanOverPositions(), nn.Linear(128, 10))
    return model, torch.randn(16, 64, 128)


NETS = {"mlp": mlp, "cnn": cnn, "transformer": transformer}


def contenders(model, loss, X, y, fisher: str, flavour: str) -> dict[str, Callable]:
    """Functions without arguments that compute all factors, by implementation."""
    vectors, of_curvlinops, of_backpack = FISHERS[fisher]
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    def ours():
        options = {"flavour": FLAVOURS[flavour], "layers": layers, "progress": False}
        return kfac_over(model, loss, [(X, y)], vectors, **options)

    def curvlinops():
        options = {"kfac_approx": flavour, "num_per_example_loss_terms": 1}
        return reference.kfac_operator(model, loss, X, y, **of_curvlinops, **options)

    found = {"ours": ours, "curvlinops": curvlinops}
    if of_backpack is not None and flavour == "expand":  # it has one flavour, a mix of both
        extension, options = of_backpack
        run = reference.backpack_runner(model, loss, extension, **options)
        found["backpack"] = lambda: run(X, y)
    return found


def works(name: str, function: Callable, notes: list[str]) -> bool:
    """Whether an implementation runs; if not, the first line of its error is noted."""
    try:
        function()
    except Exception as error:
        first = str(error).splitlines()[0] if str(error) else ""
        notes.append(f"{name}: {type(error).__name__}: {first}")
        return False
    return True


def error_to_curvlinops(model, mine: dict, operator) -> float:
    """Largest difference of the product with a random vector, relative to the largest entry."""
    p = next(model.parameters())
    generator = torch.Generator(p.device).manual_seed(0)
    worst, vectors = [], {}
    for name in mine:
        for kind, q in model.get_submodule(name).named_parameters():
            vectors[f"{name}.{kind}"] = torch.randn(q.shape, generator=generator, device=q.device)
    names = [name for name, _ in model.named_parameters() if name in vectors]
    product = (operator @ torch.cat([vectors[n].flatten() for n in names])).split(
        [vectors[n].numel() for n in names]
    )
    theirs = dict(zip(names, product, strict=True))
    for name, M in mine.items():
        V, R = (
            torch.cat([d[f"{name}.weight"].reshape(len(M.B), -1), d[f"{name}.bias"][:, None]], 1)
            for d in (vectors, theirs)
        )
        worst.append(float((M @ V - R).abs().max()))
    return max(worst) / max(float(t.abs().max()) for t in theirs.values())


def error_to_backpack(expand: dict, reduced: dict, theirs: dict[str, Tensor], field: str) -> float:
    """The same for BackPACK's mix: A summed over positions, B of the reduce flavour."""
    errors = []
    for name, M in expand.items():
        B, A = getattr(theirs[f"{name}.weight"], field)
        d = len(A)
        V = torch.randn(len(B), d, device=A.device)
        ours = reduced[name].B @ V @ M.A[:d, :d]
        of_backpack = B @ V @ A
        ours = ours * (A.trace() / M.A[:d, :d].trace()).round()  # S
        errors.append(float((ours - of_backpack).abs().max() / of_backpack.abs().max()))
    return max(errors)


def check(net: str, model, loss, X, y, fisher: str, flavour: str, runs: dict) -> dict[str, float]:
    """Relative errors of the other implementations' results to ours.

    Raises:
        AssertionError: If they are not the same up to float32.
    """
    errors: dict[str, float] = {}
    if fisher != "MC-1":
        mine = runs["ours"]()
        if "curvlinops" in runs:
            errors["curvlinops"] = error_to_curvlinops(model, mine, runs["curvlinops"]())
        if "backpack" in runs:
            reduced = contenders(model, loss, X, y, fisher, "reduce")["ours"]()
            errors["backpack"] = error_to_backpack(mine, reduced, runs["backpack"](), "kflr")
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE}
    assert not wrong, f"{net}, {fisher}, {flavour}: {wrong}"
    return errors


def median_times(runs: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Median milliseconds of each function over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if i > 0:  # the first round warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(rounds: int, device: torch.device, only: str | None) -> list[dict]:
    """One row for every network, Fisher and flavour, printed as it comes."""
    rows = []
    print(f"{'':32s}{'ours':>8s}{'curvlinops':>18s}{'BackPACK':>18s}   relative errors")
    for net, build in NETS.items():
        if only not in (None, net):
            continue
        torch.manual_seed(0)
        model, X = build()
        model, X = model.to(device), X.to(device)
        loss, y = nn.CrossEntropyLoss(), torch.randint(10, (len(X),), device=device)
        for fisher in FISHERS:
            for flavour in FLAVOURS:
                notes: list[str] = []
                runs = contenders(model, loss, X, y, fisher, flavour)
                runs = {name: run for name, run in runs.items() if works(name, run, notes)}
                errors = check(net, model, loss, X, y, fisher, flavour, runs)
                ms = median_times(runs, rounds, device)
                row = {"net": net, "fisher": fisher, "flavour": flavour, "ms": ms}
                row |= {"ratio": {name: t / ms["ours"] for name, t in ms.items()}}
                row |= {"error": errors, "notes": notes}
                rows.append(row)
                print(_line(row), flush=True)
    return rows


def _line(row: dict) -> str:
    text = f"{row['net']:12s}{row['fisher']:11s}{row['flavour']:9s}{row['ms']['ours']:8.1f}"
    for name in ("curvlinops", "backpack"):
        cell = f"{row['ms'][name]:.1f} ({row['ratio'][name]:.2f}x)" if name in row["ms"] else "-"
        text += f"{cell:>18s}"
    text += "   " + ", ".join(f"{name} {e:.0e}" for name, e in row["error"].items())
    return "\n".join([text, *(f"    {note}" for note in row["notes"])])


def about(device: torch.device) -> dict:
    """What the numbers depend on."""
    packages = ("kfac-scratch", "torch", "curvlinops-for-pytorch", "backpack-for-pytorch")
    return {
        "versions": {name: _version(name) for name in packages}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "dtype": "float32",
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--rounds", default=9, type=int, help="timed rounds for each row")
    parser.add_argument("--net", choices=NETS, help="only this network")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--threads", type=int, help="CPU threads, by default PyTorch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Full backward hook is firing")  # BackPACK's
    result = about(args.device)
    print(", ".join(f"{key} {value}" for key, value in result.items()))
    result |= {"rounds": args.rounds, "rows": measure(args.rounds, args.device, args.net)}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
