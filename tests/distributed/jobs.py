"""Jobs of several processes on this machine, as torchrun starts them, and what they return."""

import os
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SECONDS = 60


def job(work, size, *args):
    """What `work(rank, size, *args)` returns on every rank of a job."""
    with tempfile.TemporaryDirectory() as folder:
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # the processes share the cores of one machine
        try:
            mp.spawn(_entered, (size, folder, work, args), nprocs=size, join=True)
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            if threads is not None:
                os.environ["OMP_NUM_THREADS"] = threads
        return [torch.load(Path(folder) / str(r), weights_only=False) for r in range(size)]


def _entered(rank, size, folder, work, args):
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)  # as in the process that compares
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/init",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        torch.save(work(rank, size, *args), Path(folder) / str(rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def attempted(function):
    """What a function returns; if it raises, the traceback as text."""
    try:
        return function()
    except Exception:
        return traceback.format_exc()
