"""The file of 80 lines stands alone, computes what the package does, and trains in fewer steps."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

from kfac_scratch import kfac, layer_ios
from tests.laws import check_equal

FILE = Path(__file__).parents[2] / "tutorial" / "kfac_in_80_lines.py"
TEXT = FILE.read_text(encoding="utf-8")
MOST_LINES, MOST_SECONDS, REACHED = 80, 60, 0.3


def defined(old="", new=""):
    """What the file defines, perhaps with a mistake."""
    assert not old or TEXT.count(old) == 1
    names = {"__name__": "probe"}
    exec(compile(TEXT.replace(old, new) if old else TEXT, str(FILE), "exec"), names)
    return names


def test_it_is_short_and_imports_torch_alone():
    assert len(TEXT.splitlines()) <= MOST_LINES
    nodes = [*ast.walk(ast.parse(TEXT))]
    names = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"torch"}


@pytest.mark.long
def test_it_runs_by_itself_and_kfac_ends_below_adam(tmp_path):
    shutil.copy(FILE, tmp_path)
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    alone["OMP_NUM_THREADS"] = "1"  # several threads spin while they wait, which counts as time
    command, before = [sys.executable, "-W", "error", FILE.name], os.times()
    ran = subprocess.run(
        command, cwd=tmp_path, env=alone, capture_output=True, text=True, check=False
    )
    after = os.times()
    assert (ran.returncode, ran.stderr) == (0, "")
    assert after.children_user - before.children_user < MOST_SECONDS  # however busy the machine is
    rows = [line.split() for line in ran.stdout.splitlines()]
    last = {m: min(float(row[-1]) for row in rows if row[0] == m) for m in ("Adam", "KFAC")}
    assert last["KFAC"] < last["Adam"]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_kfac_reaches_a_loss_in_fewer_steps(seed):
    train = defined()["train"]
    adam, ours = train(0.05, seed=seed), train(0.1, 0.01, seed=seed)
    steps = [int((losses < REACHED).nonzero()[0]) for losses in (ours, adam)]
    assert steps[0] < steps[1]


def test_its_factors_and_its_step_are_those_of_the_package():
    short, loss = defined(), CrossEntropyLoss()
    model = Sequential(Linear(5, 4), Tanh(), Linear(4, 3))
    X, y = torch.randn(11, 5), torch.randint(3, (11,))
    optimizer = short["KFAC"](model, lr=0.5, damping=0.01)
    for layer, io in zip(optimizer.layers, layer_ios(model, loss, X, y).values(), strict=True):
        layer.expected = kfac(io)
        layer.before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    f = model(X)
    optimizer.observe(f, short["cross_entropy_vectors"](f))
    loss(f, y).backward()
    optimizer.step()
    for layer in optimizer.layers:
        check_equal(layer.A, layer.expected.A)
        check_equal(layer.B, layer.expected.B)
        gradient = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        after = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
        check_equal(layer.before - after, 0.5 * (layer.expected.inverse(0.01) @ gradient))


def test_a_forgotten_mean_or_scale_would_be_found():
    defined()["check_exactness"]()
    for old, new in [(" / len(layer.a)", ""), ("(2 / y.numel())", "(1 / y.numel())")]:
        with pytest.raises(AssertionError):
            defined(old, new)["check_exactness"]()
