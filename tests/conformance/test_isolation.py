"""Adapters in processes of their own: a crash or a hang is a verdict, and the run goes on."""

import subprocess
import sys
import threading
from pathlib import Path
from threading import Event
from typing import ClassVar
from xml.etree import ElementTree

import pytest

from kfac_scratch.conformance.__main__ import main
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.questions import digests
from kfac_scratch.conformance.cases.selection import expected_failures, tasks
from kfac_scratch.conformance.judging import isolation, report
from kfac_scratch.conformance.judging.isolation import AdapterFailed, Isolated, Place
from kfac_scratch.conformance.judging.judge import Result
from kfac_scratch.conformance.judging.sending import complaint_file
from kfac_scratch.conformance.protocol import NotSupported

TESTS = Path(__file__).resolve().parents[1]
OURS = "kfac_scratch.conformance.adapters.ours:Adapter"
TASKS = [(f"deep-linear-mse-{end}", "expand") for end in ("mean-bias", "sum-bias", "mean-nobias")]


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    monkeypatch.chdir(TESTS)


def run(adapter, timeout=60.0, chosen=TASKS):
    return list(Isolated(Place(f"faulty:{adapter}", timeout=timeout)).run(chosen))


@pytest.mark.slow
def test_a_crash_is_that_cases_verdict_and_the_run_goes_on():
    verdicts = run("Crashing")
    assert [r.verdict for r in verdicts] == ["exact", "error", "exact"]
    assert "exit status -11" in verdicts[1].words


@pytest.mark.slow
def test_a_hang_is_that_cases_verdict_and_the_run_goes_on():
    verdicts = run("Hanging", timeout=5.0)
    assert [r.verdict for r in verdicts] == ["exact", "error", "exact"]
    assert verdicts[1].words == "no answer within 5 s."


def test_what_an_adapter_prints_is_no_answer():
    assert [r.verdict for r in run("Talking")] == ["exact"] * 3


def test_the_next_question_is_asked_while_an_answer_is_judged(monkeypatch):
    asked = {case: Event() for case, _ in TASKS}

    def answer(self, case, flavour):
        asked[case.id].set()
        raise NotSupported("on Sundays")

    def judge(case, flavour, ask):
        following = [name for name, _ in TASKS][1:][[*asked].index(case.id) :][:1]
        assert all(asked[name].wait(10) for name in following)
        with pytest.raises(NotSupported):
            ask()
        return Result(case.id, flavour, "not-supported", seconds=0.25)

    monkeypatch.setattr(Isolated, "answer", answer)
    monkeypatch.setattr(isolation, "concluded", judge)
    found = list(Isolated(Place("faulty:Scaled")).run(TASKS))
    assert [(r.case, r.flavour) for r in found] == TASKS
    assert all(r.seconds > 0.25 for r in found)  # asking and judging
    assert list(Isolated(Place("faulty:Scaled")).run([])) == []


class Started(isolation.Process):
    """A process that dies of the first question; the second one starts only when told to."""

    every: ClassVar[list["Started"]] = []
    told = Event()

    def __init__(self, place):
        self.stopped, self.first = False, not self.every
        self.every.append(self)
        assert self.first or self.told.wait(10)

    def ask(self, question, *_):
        if self.first:
            raise EOFError
        return complaint_file("not-supported", "", question[2])

    def last_words(self):
        return ""

    def stop(self):
        self.stopped = True


def test_who_stops_early_leaves_no_process(monkeypatch):
    """Not even one that is started at that moment, for the next question."""
    monkeypatch.setattr(isolation, "start", Started)
    isolated, before = Isolated(Place("faulty:Scaled")), threading.enumerate()
    verdicts = isolated.run(TASKS)
    assert next(verdicts).verdict == "error"
    (asking,) = {*threading.enumerate()} - {*before}
    verdicts.close()
    Started.told.set()
    asking.join(10)
    assert [process.stopped for process in Started.every] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ("faulty:Missing", "has no attribute 'Missing'"),
        ("no_such_module:Adapter", "No module named 'no_such_module'"),
        ("faulty:NoCapabilities", "capabilities() returned a dict"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_an_error_for_people(
    adapter, words, monkeypatch, capsys
):
    with pytest.raises(AdapterFailed) as caught:
        Isolated(Place(adapter)).running()
    assert words in str(caught.value)
    monkeypatch.setattr(sys, "argv", ["conformance", "run", "--adapter", adapter])
    assert main() == 2
    assert words in capsys.readouterr().err


def command(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["conformance", *args])
    return main()


@pytest.mark.slow
def test_the_command_line_prints_a_table_and_writes_files(tmp_path, monkeypatch, capsys):
    files = ["--json", str(tmp_path / "r.json"), "--junit", str(tmp_path / "r.xml")]
    args = ["run", "--adapter", "faulty:Scaled", "-k", "deep-linear-mse-mean-nobias", *files]
    assert command(monkeypatch, *args) == 1
    printed = capsys.readouterr().out
    assert "undocumented-scale" in printed
    assert "FAILS deep-linear-mse-mean-nobias [expand]" in printed
    stored = report.read_report(tmp_path / "r.json")
    assert {r.verdict for r in stored.results} == {"undocumented-scale", "error"}
    assert stored.about["torch"]
    suite = ElementTree.fromstring((tmp_path / "r.xml").read_text())
    assert suite.get("tests") == "3"
    assert suite.get("failures") == "3"
    assert command(monkeypatch, "report", str(tmp_path / "r.json")) == 0
    assert capsys.readouterr().out == printed
    assert stored.about["adapter"] == "faulty:Scaled"
    assert stored.cases == digests(CASES)


@pytest.mark.slow
def test_a_green_run_exits_with_zero(monkeypatch):
    assert command(monkeypatch, "run", "--adapter", OURS, "-k", "one-datum-mse-tanh-mean") == 0


EXPECTED = """
[[expected]]
case = "deep-linear-mse-mean-nobias"
flavour = "{flavour}"
reason = "twice as large on purpose"
link = "https://example.org/why"
"""


@pytest.mark.slow
@pytest.mark.parametrize(("flavour", "status"), [("*", 0), ("reduce", 1)])
def test_failures_that_the_implementer_expects_do_not_fail(flavour, status, tmp_path, monkeypatch):
    (tmp_path / "expected.toml").write_text(EXPECTED.format(flavour=flavour))
    args = ["run", "--adapter", "faulty:Scaled", "-k", "deep-linear-mse-mean-nobias"]
    assert command(monkeypatch, *args, "--expected", str(tmp_path / "expected.toml")) == status


@pytest.mark.slow
def test_an_expected_failure_that_passes_fails(tmp_path, monkeypatch, capsys):
    (tmp_path / "expected.toml").write_text(EXPECTED.format(flavour="expand"))
    args = ["run", "--adapter", OURS, "-k", "deep-linear-mse-mean-nobias"]
    assert command(monkeypatch, *args, "--expected", str(tmp_path / "expected.toml")) == 1
    assert "PASSES deep-linear-mse-mean-nobias [expand] although" in capsys.readouterr().out


def test_a_file_of_expected_failures_is_checked(tmp_path):
    path = tmp_path / "expected.toml"
    path.write_text('[[expected]]\ncase = "deep-linear-mse-mean-nobias"\nreason = "why"\n')
    with pytest.raises(ValueError, match=r"lacks \['link'\]"):
        expected_failures(path)
    path.write_text(EXPECTED.format(flavour="*").replace("deep-linear", "deap-linear"))
    with pytest.raises(ValueError, match="no case matches 'deap-linear"):
        expected_failures(path)


def test_cases_are_chosen_by_name_and_tag():
    assert len(tasks()) > 300
    assert {case for case, _ in tasks("conv2d-stride*")} == {
        "conv2d-stride-per-location-mse-mean",
        "conv2d-stride-pooled-mse",
        "conv2d-stride-pooled-mse-float32",
    }
    assert {case.split("-")[0] for case, _ in tasks(tags=["operators"])} == {"operator"}
    with pytest.raises(ValueError, match="No case matches 'nothing'"):
        tasks("nothing")


def test_a_result_file_of_another_format_is_refused():
    with pytest.raises(ValueError, match="r: expected the format 'kfac-conformance-results/1'"):
        report.from_object({"format": "other"}, "r")


def test_a_result_passes_or_not():
    assert Result("a", "expand", "scaled").passes
    assert not Result("a", "expand", "undocumented-scale").passes


@pytest.mark.slow
def test_pytest_runs_the_oracle_from_any_folder(tmp_path):
    """One test for each case, failures that are expected from a file, options without a plugin."""
    (tmp_path / "expected.toml").write_text(EXPECTED.format(flavour="expand"))
    (tmp_path / "faulty.py").write_text((TESTS / "faulty.py").read_text())
    args = (
        "--kfac-adapter faulty:Scaled --kfac-expected expected.toml -k deep-linear-mse-mean-nobias"
    )
    command = "-m pytest -q -p no:cacheprovider --pyargs kfac_scratch.conformance"
    found = subprocess.run(
        [sys.executable, *command.split(), *args.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert "1 xfailed" in found.stdout, found.stdout
    assert found.stdout.count("FAILED test_cases.py::test_case[deep-linear-mse-mean-nobias-") == 2
