"""Run an adapter in a process, and if need be in an environment, of its own; judge in this one.

Only numbers come back (`receiving`), so that whatever an adapter does to the process that it runs
in, the verdict is ours. It is not locked up: it runs with the user's rights, and whoever judges
code that may do harm needs a container or a machine for it.

A crash or a hang ends the process and becomes that case's verdict; the next case gets a new one.
While an answer is judged here, the process already works on the next question: two cores are busy.
Nothing stays: a worker and the processes that it has started are one group, which ends with it. A
guard ends the group if this process dies, by whatever signal.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from io import BufferedIOBase
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any, TypeVar

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import concluded
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.layout import Malformed
from kfac_scratch.conformance.judging.pieces import Answer
from kfac_scratch.conformance.judging.receiving import (
    WORDS,
    Garbled,
    answer_of,
    capabilities_of,
    most_bytes,
    next_file,
)
from kfac_scratch.conformance.printable import printable
from kfac_scratch.conformance.vocabulary import Flavour, Task

PACKAGE = Path(__file__).resolve().parents[3]
START = 120.0  # seconds that an adapter may take to be imported
ENDING = 5.0  # seconds that a process may take to end when it has closed its pipe
T = TypeVar("T")
TAIL = 2**16  # bytes of the error stream that are looked at for its last line


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

    popen: subprocess.Popen[bytes]
    guard: "subprocess.Popen[bytes] | None"
    log: Any
    wanted: Queue[int] = field(default_factory=Queue)  # how long the next file may be; 0: no more
    files: "Queue[bytes | Garbled]" = field(default_factory=Queue)
    capabilities: dict[str, Any] = field(default_factory=dict)

    def ask(self, question: object, timeout: float, most: int = WORDS) -> bytes:
        """Send a question, and wait for the file that answers it.

        Args:
            question: As JSON; None for what the worker says by itself.
            timeout: Seconds to wait.
            most: How long the file may be.

        Raises:
            Empty: If there is none in time.
            EOFError: If the process has ended.
            Garbled: If what came is no file.
        """
        if question is not None:
            assert self.popen.stdin is not None
            try:
                self.popen.stdin.write(json.dumps(question).encode() + b"\n")
                self.popen.stdin.flush()
            except BrokenPipeError:
                raise EOFError from None
        self.wanted.put(most)
        answer = self.files.get(timeout=timeout)
        if isinstance(answer, Garbled):
            raise answer
        if not answer:
            raise EOFError
        return answer

    def stop(self) -> None:
        """End the process and all that it has started."""
        _end_group(self.popen)
        self.wanted.put(0)
        if self.guard is not None:
            self.guard.kill()
            self.guard.wait()
        self.log.close()

    def last_words(self) -> str:
        """How the process ended, and the last line of its error stream."""
        try:
            status = f"exit status {self.popen.wait(ENDING)}"
        except subprocess.TimeoutExpired:
            status = "it closed the channel of its answers and went on"
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - TAIL))
        written = self.log.read().decode(errors="replace").splitlines()
        last = next((line for line in reversed(written) if line.strip()), "")
        return status + (f"; {last}" if last else "")


def start(place: Place) -> Process:
    """Start a worker, and wait until it has its adapter.

    Raises:
        AdapterFailed: If it cannot be imported, with the reason.
    """
    folders = [str(PACKAGE), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    path = {"PYTHONPATH": os.pathsep.join(f for f in folders if f)}
    environment = {"OMP_NUM_THREADS": "1"} | os.environ | path  # cases are small: threads only wait
    log = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
    pipe = subprocess.PIPE
    popen = subprocess.Popen(
        place.command(),
        stdin=pipe,
        stdout=pipe,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    process = Process(popen, _guard_of(popen), log)
    reading = (popen.stdout, process.wanted, process.files)
    Thread(target=_read, args=reading, daemon=True).start()
    try:
        process.capabilities = capabilities_of(process.ask(None, START))
    except (EOFError, Empty, Garbled) as failure:
        words = f"{process.last_words()}." if isinstance(failure, EOFError) else str(failure)
        if isinstance(failure, Empty):
            words = f"no answer within {START:.0f} s."
        process.stop()
        raise AdapterFailed(f"{place.adapter}: {printable(words)}") from None
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
        """A verdict for each pair of case and flavour; the next is asked while one is judged.

        Whoever stops early has the process ended, and with it the question that it has.
        """
        ended = Event()
        asking = [partial(self._asked, CASES[case], flavour, ended) for case, flavour in tasks]
        following = begun(asking[0]) if asking else None
        try:
            for i, (case, flavour) in enumerate(tasks):
                assert following is not None
                answer, seconds = following.result()
                following = begun(asking[i + 1]) if i + 1 < len(asking) else None
                result = concluded(CASES[case], flavour, answer.result)
                yield replace(result, seconds=result.seconds + seconds)
        finally:
            ended.set()
            self.stop()

    def verdict(self, case: str, flavour: Flavour) -> Result:
        """A verdict, whatever the adapter does."""
        return concluded(CASES[case], flavour, partial(self.answer, CASES[case], flavour))

    def _asked(self, case: Case, flavour: Flavour, ended: Event) -> "tuple[Future[Answer], float]":
        """What comes of a question, an answer or an exception, and how many seconds it took."""
        start, answer = time.perf_counter(), Future[Answer]()
        try:
            answer.set_result(self.answer(case, flavour))
        except Exception as error:  # it becomes the case's verdict
            answer.set_exception(error)
        if ended.is_set():  # meanwhile: a process that was started since is of no use
            self.stop()
        return answer, time.perf_counter() - start

    def answer(self, case: Case, flavour: Flavour) -> Answer:
        """The adapter's numbers, on the CPU; a process that is of no more use is ended.

        Raises:
            NotSupported: With the adapter's reason.
            Malformed: With the reason why there are none.
        """
        token = secrets.token_hex(16)
        try:
            process = self.running()
        except AdapterFailed as failure:
            raise Malformed(str(failure)) from None
        try:
            question = [case.id, flavour, token]
            content = process.ask(question, self.place.timeout, most_bytes(case))
            return answer_of(content, case, token)
        except Empty:
            words = f"no answer within {self.place.timeout:g} s."
        except EOFError:
            words = f"the process ended: {process.last_words()}."
        except Garbled as failure:
            words = str(failure)
        self.stop()
        raise Malformed(words)

    def stop(self) -> None:
        """End the process."""
        if self.process:
            self.process.stop()
        self.process = None


def begun(compute: Callable[[], T]) -> "Future[T]":
    """A computation in a thread of its own, which does not keep this process alive."""
    found = Future[T]()
    Thread(target=lambda: found.set_result(compute()), daemon=True).start()
    return found


def _guard_of(worker: subprocess.Popen[bytes]) -> "subprocess.Popen[bytes] | None":
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


def _end_group(worker: subprocess.Popen[bytes]) -> None:
    if os.name == "posix":
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()
    worker.wait()


def _read(stream: BufferedIOBase, wanted: Queue[int], files: "Queue[bytes | Garbled]") -> None:
    """Read one file for each that is wanted, so that what nobody wants fills no memory."""
    while most := wanted.get():
        try:
            content: bytes | Garbled = next_file(stream, most)
        except Garbled as failure:
            content = failure
        files.put(content)
        if not isinstance(content, bytes) or not content:
            return
