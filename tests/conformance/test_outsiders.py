"""A case, an adapter and a finding are one new file each: nothing else changes, nothing breaks.

Minutes of work on a copy of the repository; `test_stale` has the same by replacing catalogues.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
COPIED = ("kfac_scratch", "tests", "tutorial", "benchmarks")
FILES = {
    "kfac_scratch/conformance/cases/families/toy.py",
    "kfac_scratch/conformance/adapters/toy.py",
    "kfac_scratch/conformance/audit/findings/toy_half.py",
    "kfac_scratch/conformance/audit/results/toy.json",
    "kfac_scratch/conformance/audit/proofs/toy_half.json",
}
RESULTS = "kfac_scratch/conformance/audit/results/toy.json"
CASE = "toy-linear-mse-mean"


def python(repository, *args):
    """Run Python in a copy of the repository, and import that copy."""
    variables = {"PYTHONPATH": str(repository)}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=repository,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def oracle(repository, *args):
    return python(repository, "-m", "kfac_scratch.conformance", *args)


def files_of(repository):
    files = [p for p in repository.rglob("*.*") if "__pycache__" not in p.parts and p.is_file()]
    return {str(p.relative_to(repository)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy, in which an outsider has followed the three recipes."""
    copy = tmp_path_factory.mktemp("repository")
    for name in COPIED:
        copytree(ROOT / name, copy / name, ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "_kfac_scratch_pytest.py"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    before = files_of(copy)
    for kind, name in (("case", "toy"), ("adapter", "toy"), ("finding", "toy_half")):
        assert oracle(copy, "skeleton", kind, name).returncode == 0
    adapter = "kfac_scratch.conformance.adapters.toy:Adapter"
    made = oracle(copy, "run", "--adapter", adapter, "--json", RESULTS)
    assert made.returncode == 0, made.stderr
    assert oracle(copy, "prove", "--store", "toy_half").returncode == 0
    after = files_of(copy)
    assert {name for name in after if after[name] != before.get(name)} == FILES
    return copy


def test_the_new_case_is_asked_of_everybody(repository):
    ours = "kfac_scratch.conformance.adapters.ours:Adapter"
    made = oracle(repository, "run", "--adapter", ours, "--tag", "toy")
    assert made.returncode == 0
    assert re.search(r"^toy +3$", made.stdout, re.MULTILINE)
    assert f"{CASE} (family toy," in oracle(repository, "show", CASE).stdout
    assert f'"{CASE}"' in (repository / RESULTS).read_text()


def test_what_is_older_than_the_new_case_is_told(repository):
    told = oracle(repository, "stale")
    assert told.returncode == 1
    words = dict(re.findall(r"^(\S+): (.+)$", told.stdout, re.MULTILINE))
    others = {path.name for path in (ROOT / RESULTS).parent.glob("*.json")}
    added = f"stale: 1 case was added since: {CASE}"
    assert words == {f"results/{name}": added for name in others} | {
        "vectors/kfac-vectors-1": added
    }
    report = oracle(repository, "report", "kfac_scratch/conformance/audit/results/singd.json")
    assert report.returncode == 0
    assert f"singd.json is {added}." in report.stdout


def test_the_default_tests_ask_the_new_case(repository):
    args = ["-q", "-p", "no:cacheprovider", "tests/conformance/test_conformance.py", "-k", CASE]
    made = python(repository, "-m", "pytest", *args)
    assert made.returncode == 0, made.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", made.stdout)[1]) >= 8


def test_the_slow_test_tells_what_to_make_again(repository):
    name = "test_nothing_that_is_stored_is_older_than_the_cases"
    args = ["-q", "-p", "no:cacheprovider", "-m", "slow"]
    made = python(repository, "-m", "pytest", *args, f"tests/conformance/test_audit.py::{name}")
    assert made.returncode == 1
    assert f"1 case was added since: {CASE}" in made.stdout


def test_all_default_tests_of_the_oracle_still_pass(repository):
    others = ["--deselect", "tests/conformance/test_outsiders.py", "-p", "no:cacheprovider", "-q"]
    made = python(repository, "-m", "pytest", "tests/conformance", *others)
    assert made.returncode == 0, made.stdout[-3000:]


@pytest.mark.parametrize("chapter", ["35_conformance", "36_museum", "37_audit"])
def test_the_chapters_of_the_oracle_still_run(repository, chapter):
    program = f"import matplotlib; matplotlib.use('Agg'); import runpy; runpy.run_path({chapter!r})"
    program = program.replace(repr(chapter), repr(f"tutorial/{chapter}.py"))
    made = python(repository, "-c", program)
    assert made.returncode == 0, made.stderr[-3000:]
