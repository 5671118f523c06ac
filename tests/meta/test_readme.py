"""The README's example runs as it stands, and shows what it says."""

import base64
import io
import json
import re
import statistics
from pathlib import Path

import package
import pytest
import torch

from kfac_scratch import REDUCE, kfac, layer_ios
from kfac_scratch.curvature import diagonal_blocks, ggn
from tests.laws import check_equal
from tests.meta.built_site import built_site

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
    for name, layer in layer_ios(*data, flavour=REDUCE).items():
        check_equal(shown["reduce"][name].A, kfac(layer).A)
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


# ------------------------------------------------------------------ the first screen
def first_screen():
    return " ".join(README.read_text(encoding="utf-8").partition("\n## ")[0].split())


def of_task(task):
    stored = README.parent / "benchmarks" / "results" / f"training-{task}.json"
    return json.loads(stored.read_text(encoding="utf-8"))


def spread(task, method, key):
    """Median, smallest and largest over the seeds."""
    values = [run[key] for run in of_task(task)["finals"][method]]
    return statistics.median(values), min(values), max(values)


def test_its_result_is_the_stored_one():
    text = first_screen()
    kfac_, adamw = (spread("T1", method, "steps") for method in ("kfac-expand", "adamw"))
    seeds = len(of_task("T1")["finals"]["adamw"])
    assert (
        f"after {kfac_[0]} steps with KFAC ({kfac_[1]} to {kfac_[2]} over {seeds} seeds) "
        f"and after {adamw[0]} with AdamW ({adamw[1]} to {adamw[2]})"
    ) in text
    trials = {len(of_task("T1")["search"][m]["trials"]) for m in ("kfac-expand", "adamw")}
    assert f"with {trials.pop()} trials of tuning for each" in text
    assert not trials
    kfac_, adamw = (spread("T1", method, "cpu") for method in ("kfac-expand", "adamw"))
    said = [f"{middle:.1f} s ({low:.1f} to {high:.1f})" for middle, low, high in (kfac_, adamw)]
    assert f"{said[0]} and {said[1]}" in text


def test_its_counterexample_is_the_stored_one():
    kfac_, adamw = (spread("T4", method, "steps")[0] for method in ("kfac-expand", "adamw"))
    assert f"KFAC needs {kfac_} steps where AdamW needs {adamw}, and no less time" in first_screen()
    times = [spread("T4", method, "cpu") for method in ("kfac-expand", "adamw")]
    assert times[1][1] < times[0][0] < times[1][2]  # KFAC's median within AdamW's range


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["", "-dark"])
def test_its_picture_is_the_first_figure_of_the_first_chapter(suffix):
    """Up to the last digit of a colour, which depends on the machine."""
    image = pytest.importorskip("matplotlib.image")
    drawn = built_site() / "00_thirty_minutes_files" / f"figure-1{suffix}.svg"
    kept = README.parent / "tutorial" / "assets" / f"exact-and-kfac{suffix}.svg"
    texts = [path.read_text(encoding="utf-8") for path in (drawn, kept)]
    embedded = re.compile(r"data:image/png;base64,([^\"]*)")
    assert embedded.sub("", texts[0]) == embedded.sub("", texts[1]), (
        "python tutorial/_site/picture.py"
    )
    for now, then in zip(*map(embedded.findall, texts), strict=True):
        a, b = (image.imread(io.BytesIO(base64.b64decode(png))) for png in (now, then))
        assert a.shape == b.shape
        assert abs(a - b).max() < 0.02


def test_the_site_is_linked_once_it_has_an_address():
    config = (README.parent / "mkdocs.yml").read_text(encoding="utf-8")
    address = re.search(r"^site_url: (\S+)", config, re.MULTILINE)
    assert address is None or address[1] in first_screen()
