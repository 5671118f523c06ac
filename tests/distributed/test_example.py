"""The example, by the two commands that its text and the README give."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "digits.py"
COMMANDS = {
    1: [sys.executable],
    2: [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
}


def loss(size):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*COMMANDS[size], str(EXAMPLE)],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return float(re.search(rf"{size} processes: loss (\S+)", run.stdout)[1])


@pytest.mark.slow
def test_two_processes_reach_the_loss_of_one():
    alone = loss(1)
    assert alone < 0.1
    assert abs(loss(2) - alone) <= 1e-10


def test_the_readme_gives_the_command_of_the_example():
    command = "torchrun --nproc-per-node 2 examples/digits.py"
    for path in (EXAMPLE, ROOT / "README.md"):
        assert command in path.read_text(encoding="utf-8")
