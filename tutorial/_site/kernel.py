"""Kernels of chapters as forks of one process that has imported what all chapters import.

Importing torch, scikit-learn and matplotlib takes longer than what many chapters compute. Python's
own fork server imports them once, and each chapter gets a new process of it, as fresh as any other.
The package is not among them, since `mkdocs serve` follows its edits. Only Linux forks a process
with these libraries safely; elsewhere each kernel imports everything itself.
"""

import multiprocessing
import os
import runpy
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

SERVE = Path(__file__).with_name("serve_kernel.py")
PRELOADED = ["__main__", "ipykernel.ipkernel", "ipykernel.kernelapp", "matplotlib.pyplot"]
PRELOADED += ["matplotlib_inline.backend_inline", "sklearn.datasets", "jaxtyping", "torch"]
PRELOADED += [
    "torch.func",
    "torch.profiler",
    "torch._decomp",
    "torch._dynamo",
]  # on first use, else


@cache
def _context(settings: tuple[tuple[str, str], ...]) -> Any:
    """The fork server, whose process reads these variables when it imports the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = {name: os.environ.get(name) for name, _ in settings}
    os.environ.update(settings)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


class _Child:
    """A process of the fork server with the methods of `subprocess.Popen` that Jupyter calls."""

    stdin = stdout = stderr = None

    def __init__(self, process: Any) -> None:
        process.start()
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int | None:
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class _Forked(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        arguments = cmd[cmd.index("-m") + 2 :]  # python -m ipykernel_launcher -f FILE ...
        settings = {n: kwargs["env"][n] for n in ("OMP_NUM_THREADS", "MPLBACKEND")}
        context = _context(tuple(settings.items()))
        environment = {**kwargs["env"], "JPY_PARENT_PID": str(os.getpid())}
        request = {"COMMAND": arguments, "FOLDER": kwargs["cwd"], "ENVIRONMENT": environment}
        # A path, since the module cannot be imported where MkDocs loads hooks.
        process = context.Process(target=runpy.run_path, args=(str(SERVE), request))
        self.process = _Child(process)
        self.pid = self.process.pid
        return self.connection_info


def manager() -> AsyncKernelManager:
    """A manager of one kernel that is still to start."""
    made = AsyncKernelManager(kernel_name="python3")
    if sys.platform == "linux":
        made.provisioner = _Forked(kernel_spec=made.kernel_spec, parent=made)
    return made
