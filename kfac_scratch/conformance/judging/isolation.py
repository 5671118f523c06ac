"""Run an adapter in a process, and if need be in an environment, of its own.

A crash or a hang ends the process and becomes that case's verdict; the next case gets a new one.
Nothing stays: a worker and the processes that it has started are one group, which ends with it. A
guard ends the group if this process dies, by whatever signal.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import TextIOWrapper
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Any

from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.vocabulary import Flavour, Task

PACKAGE = Path(__file__).resolve().parents[3]
START = 120.0  # seconds that an adapter may take to be imported


class AdapterFailed(Exception):  # noqa: N818
    """An adapter could not be loaded at all; says why."""


@dataclass(frozen=True)
class Place:
    """Where an adapter runs.

    Attributes:
        adapter: `package.module:Class`, importable from the current folder.
        python: The interpreter of its environment.
        device: Where tensors are.
        timeout: Seconds for one case.
    """

    adapter: str
    python: str = sys.executable
    device: str = "cpu"
    timeout: float = 60.0

    def command(self) -> list[str]:
        """How the process is started."""
        worker = "kfac_scratch.conformance.judging.worker"
        return [self.python, "-m", worker, self.adapter, self.device]


@dataclass
class Process:
    """A running worker, and what it has written to its error stream."""

    popen: subprocess.Popen[str]
    guard: "subprocess.Popen[bytes] | None"
    lines: Queue[str]
    log: Any
    capabilities: dict[str, Any] = field(default_factory=dict)

    def ask(self, line: str, timeout: float) -> Any:
        """Send a line, and wait for the answer.

        Raises:
            Empty: If there is none in time.
            EOFError: If the process has ended.
        """
        if line:
            assert self.popen.stdin is not None
            try:
                self.popen.stdin.write(line + "\n")
                self.popen.stdin.flush()
            except BrokenPipeError:
                raise EOFError from None
        answer = self.lines.get(timeout=timeout)
        if not answer:
            raise EOFError
        return json.loads(answer)

    def stop(self) -> None:
        """End the process and all that it has started."""
        _end_group(self.popen)
        if self.guard is not None:
            self.guard.kill()
            self.guard.wait()
        self.log.close()

    def last_words(self) -> str:
        """The exit status, and the last line of the error stream."""
        status = self.popen.wait()
        self.log.seek(0)
        written = [line for line in self.log.read().splitlines() if line.strip()]
        return f"exit status {status}" + (f"; {written[-1]}" if written else "")


def start(place: Place) -> Process:
    """Start a worker, and wait until it has its adapter.

    Raises:
        AdapterFailed: If it cannot be imported, with the reason.
    """
    folders = [str(PACKAGE), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(f for f in folders if f)}
    log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (lives as long as the process)
    pipe = subprocess.PIPE
    popen = subprocess.Popen(
        place.command(),
        stdin=pipe,
        stdout=pipe,
        stderr=log,
        text=True,
        errors="backslashreplace",
        env=environment,
        start_new_session=True,
    )
    process = Process(popen, _guard_of(popen), Queue(), log)
    Thread(target=_read, args=(popen.stdout, process.lines), daemon=True).start()
    try:
        process.capabilities = process.ask("", START)
    except EOFError:
        raise AdapterFailed(f"{place.adapter}: {process.last_words()}.") from None
    except Empty:
        process.stop()
        raise AdapterFailed(f"{place.adapter}: no answer within {START:.0f} s.") from None
    return process


@dataclass
class Isolated:
    """An adapter in a process, which is started again when it has died."""

    place: Place
    process: Process | None = None

    def running(self) -> Process:
        """The process, started if there is none."""
        self.process = self.process or start(self.place)
        return self.process

    def run(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """A verdict for each pair of case and flavour."""
        for case, flavour in tasks:
            yield self.verdict(case, flavour)
        self.stop()

    def verdict(self, case: str, flavour: Flavour) -> Result:
        """A verdict, whatever the adapter does."""
        process = self.running()
        try:
            return Result(**process.ask(json.dumps([case, flavour]), self.place.timeout))
        except Empty:
            words = f"no answer within {self.place.timeout:g} s."
        except EOFError:
            words = f"the process ended: {process.last_words()}."
        self.stop()
        return Result(case, flavour, "error", words)

    def stop(self) -> None:
        """End the process."""
        if self.process:
            self.process.stop()
        self.process = None


def _guard_of(worker: subprocess.Popen[str]) -> "subprocess.Popen[bytes] | None":
    """A process that ends a worker's group as soon as this process is gone.

    It waits for the end of a pipe that only this process holds open. There is none on Windows.
    """
    if os.name != "posix":
        return None
    command = f"cat >/dev/null; kill -9 -{worker.pid}"
    return subprocess.Popen(
        ["sh", "-c", command],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _end_group(worker: subprocess.Popen[str]) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()
    worker.wait()


def _read(stream: TextIOWrapper, lines: Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")
