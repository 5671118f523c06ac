"""Whatever adapters write, document and start: no lost report, no wrong pass, no process left."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_scratch.conformance.__main__ import main
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging import isolation, report
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.judging.isolation import Isolated, Place
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.printable import MOST, printable
from tests import faulty
from tests.thinned import thinned

TESTS = Path(__file__).resolve().parents[1]
CASE = "deep-linear-mse-sum-bias"
any_text = st.text(st.characters(), max_size=40)  # lone surrogates and controls included


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(TESTS)


# ---- text ----------------------------------------------------------------------------------------


@settings(max_examples=300, derandomize=True)
@given(any_text)
def test_printable_text_survives_every_format(text):
    shown = printable(text)
    assert shown.encode("utf-8").decode("utf-8") == shown
    xml = f"<a>{ElementTree.tostring(_element(shown), encoding='unicode')}</a>"
    read = ElementTree.fromstring(xml)[0].text or ""
    assert read == shown
    assert not any(c < " " and c not in "\n\t" for c in shown)
    assert printable(shown) == shown


def _element(text):
    element = ElementTree.Element("b")
    element.text = text
    return element


def test_printable_text_is_itself_where_nothing_is_wrong_and_short():
    assert printable("α = 0.5,\n\tà propos 👍") == "α = 0.5,\n\tà propos 👍"
    shown = printable(10 * MOST * "x")
    assert len(shown) < MOST + 50
    assert f"({9 * MOST} characters left out)" in shown


@settings(max_examples=100, derandomize=True)
@given(words=any_text, name=any_text, scale=st.floats(), error=st.floats())
def test_a_report_survives_any_text_and_any_number(words, name, scale, error):
    result = Result(CASE, "expand", "wrong", words, error, error, {"0 weight": scale})
    capabilities = {"name": name, "version": name, "notes": [name]}
    made = report.Report(capabilities, [result], {CASE: "deep"}, {}, {})
    written = report.text(made).encode("utf-8").decode("utf-8")
    value = json.loads(written, parse_constant=_refuse)
    stored = report.from_object(value, "a file")
    assert stored.results[0].words == printable(words)
    assert stored.results[0].error is None or math.isfinite(stored.results[0].error)
    assert ElementTree.fromstring(report.junit(made)).get("failures") == "1"
    assert report.table(stored) == report.table(made)


def _refuse(constant):
    raise AssertionError(f"{constant} is not JSON")


def test_a_reason_of_any_length_arrives():
    result = Isolated(Place("faulty:Babbling", timeout=60.0))
    try:
        found = result.verdict(CASE, "expand")
    finally:
        result.stop()
    assert found.verdict == "error"
    assert found.words.startswith("RuntimeError: \\udc80 \\x00 \\x1b[31mxxx")
    assert found.words.endswith("characters left out)")


# ---- scales --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", thinned([0, 0.0, -1.0, math.nan, math.inf, "2", True]))
@pytest.mark.parametrize("fisher", ["type2", "mc"])
def test_a_documented_scale_that_is_no_positive_number_is_an_error(scale, fisher, as_users_run_it):
    adapter = faulty.Scaled()
    adapter.documented = scale
    case = next(c for c in CASES.values() if c.fisher == fisher and not c.operator)
    found = verdict(adapter, case, next(iter(case.flavours)))
    assert found.verdict == "error"
    assert f"scale() returned {scale!r}, which is no positive number" in found.words


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--junit"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(
    option, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(isolation, "start", lambda place: pytest.fail("it ran"))
    args = ["conformance", "run", "--adapter", "faulty:Scaled", option, str(tmp_path)]
    monkeypatch.setattr(sys, "argv", args)
    assert main() == 2
    assert "cannot be written" in capsys.readouterr().err


# ---- processes -----------------------------------------------------------------------------------


def gone(pid):
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] == "Z"


def wait_until(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def noted(file):
    return [int(pid) for pid in file.read_text().split()] if file.exists() else []


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes are guarded on POSIX only")
@pytest.mark.parametrize(
    "name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGABRT", "SIGUSR1"]
)
def test_no_signal_to_the_parent_leaves_a_process(name, tmp_path):
    pids, number = tmp_path / "pids", getattr(signal, name)
    environment = os.environ | {"FAULTY_PIDS": str(pids)}
    command = [sys.executable, "-m", "kfac_scratch.conformance", "run"]
    parent = subprocess.Popen(
        [*command, "--adapter", "faulty:Spawning", "-k", CASE],
        env=environment | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=None if name == "SIGKILL" else partial(signal.signal, number, signal.SIG_DFL),
    )
    assert wait_until(lambda: len(noted(pids)) == 2, 60)
    parent.send_signal(number)
    _, written = parent.communicate(timeout=20)
    assert wait_until(lambda: all(gone(pid) for pid in noted(pids)), 5)
    assert "Traceback" not in written
    if name == "SIGINT":
        assert parent.returncode == 130
        assert written.splitlines()[-1] == "interrupted: nothing was written."


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="processes are guarded on POSIX only")
def test_what_an_adapter_has_started_ends_with_it(tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    monkeypatch.setenv("FAULTY_PIDS", str(pids))
    isolated = Isolated(Place("faulty:Spawning", timeout=5.0))
    assert "no answer within 5 s" in isolated.verdict(CASE, "expand").words
    assert isolated.process is None
    assert wait_until(lambda: all(gone(pid) for pid in noted(pids)), 5)
