"""What the benchmarks measure with: turns on one clock, memory in own processes, bounds, JSON.

- Time: implementations take turns in every round, and the smallest counts. On a CPU it is the time
  that the process computed, so that what else runs does not count, on one thread unless told
  otherwise.
- Memory: every implementation runs in a process of its own, once, after a tiny call of the same
  kind. What counts is the largest resident set (`ru_maxrss`) above that with model and data.
- Bounds: a row says what it is held against and whether it is within, computed from its numbers.
"""

import argparse
import ctypes
import gc
import json
import math
import multiprocessing
import platform
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from resource import RLIMIT_AS, RLIMIT_CPU, setrlimit
from typing import Any

import torch

from kfac_scratch import __version__

PACKAGES = (
    "torch",
    "curvlinops-for-pytorch",
    "backpack-for-pytorch",
    "nngeometry",
    "laplace-torch",
    "singd",
    "pytorch-optimizer",
)
RESULTS = Path(__file__).parent / "results"
Run = Callable[[], Any]

# ---- time ----------------------------------------------------------------------------------------


def clock(device: torch.device) -> float:
    """Seconds: of this process on a CPU, on the wall elsewhere."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def fastest(runs: dict[str, Run], rounds: int, device: torch.device) -> dict[str, float]:
    """Smallest seconds of each run over rounds in which all take turns, after one that warms up."""
    best = dict.fromkeys(runs, math.inf)
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = clock(device)
            run()
            if i > 0:
                best[name] = min(best[name], clock(device) - start)
    return best


# ---- memory --------------------------------------------------------------------------------------


def keep_memory() -> None:
    """Let the process keep memory that it frees, instead of giving it back and asking again."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def peak_memory(run: Run, device: torch.device) -> float | None:
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


def peak(
    prepare: Callable[..., tuple[Run, Run]],
    *args: Any,
    device: torch.device,
    most: int = 4096,
    seconds: int = 300,
) -> float | str | None:
    """The peak memory of a run in its own process, in MiB, or the error that it ended with.

    Args:
        prepare: From the arguments to a tiny run that warms up, and the run. Model and data that
            it makes do not count. It must stand in a module that is not run by `python -m`.
        args: Its arguments.
        device: Where it runs.
        most: Mebibytes of address space that the process may add on a CPU; beyond, it ends with an
            error.
        seconds: CPU time of the process; beyond, it is ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([prepare.__module__, "torch._dynamo"])  # PyTorch imports it late
    ours, theirs = context.Pipe()
    limits = most, seconds
    process = context.Process(target=_measured, args=(theirs, prepare, args, device, limits))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        process.join()
        too_long = process.exitcode == -signal.SIGXCPU
        return f"more than {seconds} s" if too_long else f"ended with status {process.exitcode}"
    finally:
        process.join()


def _measured(
    pipe: Connection,
    prepare: Callable[..., tuple[Run, Run]],
    args: tuple,
    device: torch.device,
    limits: tuple[int, int],
) -> None:
    torch.set_num_threads(1)
    most, seconds = limits
    try:
        tiny, run = prepare(*args)
        tiny()
        gc.collect()
        setrlimit(RLIMIT_CPU, (seconds, seconds + 1))
        if device.type == "cpu":
            with suppress(OSError):
                size = int(_status("VmSize") * 2**10) + most * 2**20
                setrlimit(RLIMIT_AS, (size, size))
        pipe.send(peak_memory(run, device))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {first_line(error)}")


def first_line(error: Exception) -> str:
    """Of its text, at most 80 characters."""
    line = next(iter(str(error).splitlines()), "")
    return line if len(line) <= 80 else f"{line[:80]}…"


# ---- bounds --------------------------------------------------------------------------------------


def at_most(what: str, value: float | None, bound: float) -> dict:
    """A number, what it should not exceed, and whether it does not; a missing one is not within."""
    within = value is not None and math.isfinite(value) and value <= bound
    return {"what": what, "value": value, "at most": bound, "within": within}


def all_within(bounds: Iterable[dict]) -> bool:
    return all(bound["within"] for bound in bounds)


# ---- files and the command line ------------------------------------------------------------------


def about(device: torch.device) -> dict:
    """What the numbers depend on."""
    return {
        "versions": {"kfac-scratch": __version__}
        | {name: _version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": device.type,
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
        "clock": "CPU time of the process" if device.type == "cpu" else "wall clock",
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


def written(result: dict) -> str:
    """JSON with every list of numbers on one line, and null for what is infinite."""
    text = json.dumps(finite(result), indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), text) + "\n"


def finite(value: Any) -> Any:
    """As JSON stores it: null for what is no finite number, and lists for tuples."""
    if isinstance(value, dict):
        return {key: finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stored(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(written(result))


def arguments(
    description: str, argv: list[str] | None, rounds: int, paths: Iterable[str] = ()
) -> argparse.Namespace:
    """The options that the benchmarks share, and paths that one needs; sets the threads."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    for name in paths:
        parser.add_argument(f"--{name}", type=Path, required=True, help="see the docstring")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--rows", default="", help="only rows whose name has this pattern")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run?")
    parser.add_argument("--rounds", default=rounds, type=int, help="timed rounds for each row")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", default=1, type=int, help="CPU threads")
    args = parser.parse_args(argv)
    args.rounds = 1 if args.quick else args.rounds
    torch.set_num_threads(args.threads)
    return args


def chosen(rows: Iterable[Any], pattern: str) -> list[Any]:
    """The rows whose name has the pattern.

    Raises:
        SystemExit: If there is none.
    """
    rows = list(rows)
    found = [row for row in rows if re.search(pattern, str(row))]
    if not found:
        raise SystemExit(f"No row has {pattern!r} in its name: {', '.join(map(str, rows))}.")
    return found
