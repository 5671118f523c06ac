"""A rank that is killed, stopped, hangs or raises: every other one names it, and ends in time."""

import os
import re
import signal
import subprocess
import sys

import pytest

from tests.distributed.faulty import DIAGNOSIS, STEP, TIMEOUT

pytestmark = pytest.mark.slow
CASES = [
    *((2, victim, "between", kind) for victim in (0, 1) for kind in ("kill", "hang", "stop")),
    *((4, 2, place, kind) for place in ("between", "capture") for kind in ("kill", "hang", "stop")),
    *((4, 2, place, kind) for place in ("factors", "inverses") for kind in ("kill", "stop")),
    *((4, 2, "directions", kind) for kind in ("kill", "stop")),
    (4, 2, "between", "raise"),
    (4, 0, "capture", "kill"),
    (4, 0, "factors", "stop"),
]


def outputs(size, victim, place, kind, folder):
    """What every rank has printed but the victim."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.distributed.faulty"),
                *(str(rank), str(size), str(folder), str(victim), place, kind),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        said = {}
        for rank, process in enumerate(processes):
            if rank != victim:
                said[rank] = process.communicate(timeout=90)[0]
        return said
    finally:
        for process in processes:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if process.stdout:
                process.stdout.close()


@pytest.mark.parametrize(("size", "victim", "place", "kind"), CASES)
def test_every_survivor_names_the_rank_and_the_collective(size, victim, place, kind, tmp_path):
    said = outputs(size, victim, place, kind, tmp_path)
    assert set(said) == set(range(size)) - {victim}
    what = {
        "between": r"\w+",
        "capture": "terms",
        "factors": "factors",  # which all ranks wait for; the others, only some
    }.get(place, f"{place}|directions|step")
    for rank, text in said.items():
        told = re.search(rf"TOLD (\S+) Rank {rank} of {size}: '({what})' of step {STEP}(.*)", text)
        assert told, text
        assert float(told[1]) < TIMEOUT + DIAGNOSIS + 5
        assert re.search(rf"[Rr]ank {victim}\b", told[3]), text
        if place not in ("between", "capture"):
            words = f"Rank {victim} gives no sign of life (last seen in '{place}'"
            if victim == 0:  # which keeps the board where all write their places
                words = "Rank 0 does not answer"
            assert words in told[3]
        others = set(range(size)) - {rank, victim}
        assert not any(re.search(rf"[Rr]ank {other}\b", told[3]) for other in others), text


@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_that_raises_in_a_step_makes_all_refuse(size, tmp_path):
    said = outputs(size, 1, "capture", "raise", tmp_path)
    for text in said.values():
        assert re.search(rf"REFUSED .*Rank 1 of {size} refused in 'observe'.*KeyError", text), text
