"""The README's example runs as it stands, and shows what it says."""

import re
from pathlib import Path

import package
import torch

from kfac_scratch import REDUCE, kfac, layer_ios
from kfac_scratch.curvature import diagonal_blocks, ggn
from tests.laws import check_equal

README = Path(__file__).parents[2] / "README.md"


def run(count):
    """What is defined after the first `count` examples."""
    codes = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    shown: dict = {}
    for code in codes[:count]:
        exec(compile(code, str(README), "exec"), shown)
    return shown


def test_example_runs():
    shown = run(1)
    data = shown["model"], shown["loss"], shown["X"], shown["y"]
    assert {n: v.shape for n, v in shown["step"].items()} == {
        n: p.shape for n, p in shown["model"].named_parameters()
    }
    for name, io in layer_ios(*data, flavour=REDUCE).items():
        check_equal(shown["reduce"][name].A, kfac(io).A)
    few = data[0].double(), data[1], data[2][:3].double(), data[3][:3]
    exact = diagonal_blocks(few[0], ggn(*few))["0"]
    check_equal(layer_ios(*few)["0"].block(), exact)
    assert shown["exact"].shape == exact.shape


def test_training_example_descends():
    shown = run(2)
    X, y, loss = shown["X"], shown["y"], shown["loss"]
    assert loss(shown["model"](X), y) < loss(run(1)["model"](X), y) - 0.5


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []


def test_the_table_of_modules_is_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert text == package.with_table(text), "run: python tutorial/_site/package.py"


def test_a_missing_module_would_be_found():
    stale = README.read_text(encoding="utf-8").replace(", `mini_block`", "")
    assert package.with_table(stale) != stale


def test_the_table_is_short_and_names_every_file_and_folder_of_the_package():
    rows = package.table().splitlines()[2:]
    top = {path.stem for path in (README.parent / "kfac_scratch").iterdir() if path.suffix == ".py"}
    top |= {path.parent.name for path in (README.parent / "kfac_scratch").glob("*/__init__.py")}
    assert {row.split("`")[1].rstrip("/") for row in rows} == top - {"__init__"}
    assert len(rows) <= 24
