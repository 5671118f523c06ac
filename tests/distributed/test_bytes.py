"""No hidden traffic: the bytes that the processes write are those of the formula."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from kfac_scratch import KFAC, distribute, kl_clip, type2
from tests.distributed.jobs import job

WIDTH, LAYERS, STEPS = 192, 7, 4


def written():
    """The bytes that this process has written, to sockets, too."""
    lines = Path("/proc/self/io").read_text(encoding="utf-8").splitlines()
    return int(dict(line.split(": ") for line in lines)["wchar"])


def work(rank, size, workers, owner_local):
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    model, loss = nn.Sequential(*layers), nn.MSELoss()
    options = {"fisher": type2, "damping": 1e-2, "controls": [kl_clip(1e-2)], "lr": 1e-3}
    optimizer = KFAC(model, loss, **options, factor_every=1, inverse_every=1)
    distribute(optimizer, workers, owner_local=owner_local, timeout=60)
    X, y = torch.randn(2, 2, 8, WIDTH)[rank % 2]
    before = written()
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
    return written() - before


def formula(P, m, owner_local):
    """The bytes of one step, on average over ranks."""
    G, half = LAYERS * WIDTH**2, LAYERS * WIDTH * (WIDTH + 1)
    factors = 0 if owner_local else half + LAYERS
    sums = 2 * (P - 1) / P * (G + factors)
    return 8 * (sums + (m - 1) / P * half + (1 - m / P) * G)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("P", "m", "owner_local"),
    [(2, 1, False), (2, 2, False), (2, 1, True), (4, 1, False), (4, 2, False), (4, 4, False)],
)
def test_the_processes_write_what_the_formula_says(P, m, owner_local):
    found = sum(job(work, P, m / P, owner_local)) / P / STEPS
    assert found == pytest.approx(formula(P, m, owner_local), rel=0.02)
