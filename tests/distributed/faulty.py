"""One rank of a job in which another one fails: `python -m tests.distributed.faulty ...`.

The last argument says how the victim fails, and the one before where. Every other rank prints what
it is told, and when.
"""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from kfac_scratch import distribute
from kfac_scratch.distributed import ranks
from kfac_scratch.optimizer import optimizer as module
from tests.distributed.runs import SHARDS, Case, shard

TIMEOUT, DIAGNOSIS = 8.0, 4.0  # seconds, for machines that are busy
STEP = 2


def fail(kind):
    print(f"FAILS {time.time()}", flush=True)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "hang":
        time.sleep(600)
    raise KeyError("a bug")


def main(rank, size, folder, victim, place, kind):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    case = Case(options={"factor_every": 1, "inverse_every": 1})
    model = case.model()
    optimizer = case.optimizer(model)
    placed = distribute(optimizer, 0.5 if size == 4 else 0.0, timeout=TIMEOUT, diagnosis=DIAGNOSIS)
    if rank == victim:
        inject(placed, place, kind, lambda: optimizer.steps == STEP)
    begun = time.time()
    try:
        for X, y in case.batches():
            X, y = (t[shard(SHARDS[size]["unequal"], rank)] for t in (X, y))
            begun = time.time()
            optimizer.zero_grad()
            case.loss()(model(X), y).backward()
            if rank == victim and place == "between" and optimizer.steps == STEP:
                fail(kind)
            optimizer.observe(X, y)
            optimizer.step()
    except (ranks.LostRankError, KeyError) as error:
        print(f"TOLD {time.time() - begun} {error}", flush=True)
    except ValueError as error:
        print(f"REFUSED {time.time() - begun} {error}", flush=True)
    os._exit(0)  # as a script that ends: no waiting for others


def inject(placed, place, kind, now):
    """Let this rank fail at a place of a step."""
    if place == "capture":
        real = module.layer_ios

        def captured(*args, **kwargs):
            if now():
                fail(kind)
            return real(*args, **kwargs)

        module.layer_ios = captured
    elif place != "between":  # inside the collective of this name
        counted = placed.ranks._counted

        def failing(what, transmit):
            def transmitted(flat):
                if now() and what == place:
                    fail(kind)
                transmit(flat)

            return counted(what, transmitted)

        placed.ranks._counted = failing


if __name__ == "__main__":
    number, count, where, last, at, how = sys.argv[1:]
    main(int(number), int(count), where, int(last), at, how)
