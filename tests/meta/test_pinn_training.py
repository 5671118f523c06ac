"""The comparison of PINN optimizers: its protocol, and that every method is what it says."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import benchmarks.pinn_methods as methods
import benchmarks.pinn_training as training
from benchmarks.calls import counted
from benchmarks.measure import RESULTS, stored
from benchmarks.methods import place, settings
from benchmarks.pinn_methods import PINN_METHODS, PINN_TASKS, OfTorch, squared_norm
from benchmarks.pinn_training import (
    broken,
    proposal,
    run_finals,
    run_search,
    summary,
    train,
    trials,
    winner,
)
from kfac_scratch.pinn.problems import mlp
from kfac_scratch.pinn.solvers import dense_solver, kernel_solver
from kfac_scratch.pinn.steps import Spring
from kfac_scratch.pinn.terms import pinn_loss
from tests.laws import check_differs, check_equal
from tests.meta.stored_results import spoiled

pytestmark = pytest.mark.long
NAME = "poisson-2d"
SMALL = replace(PINN_TASKS[NAME], sizes=(2, 4, 1), inside=12, border=6)


@pytest.fixture(autouse=True)
def ticks(monkeypatch):
    """A clock of which every reading is a second later: a step takes one second, or three."""
    now = iter(range(10**9))
    clock = SimpleNamespace(process_time=lambda: float(next(now)))
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(methods, "time", clock)


# ---- methods ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PINN_METHODS)
def test_every_method_lowers_the_loss_and_runs_what_proves_it(name):
    method = PINN_METHODS[name]
    run = train(SMALL, name, method.first, 0, 12.0)
    assert set(run.calls) == set(method.proof)
    assert min(run.calls.values()) > 0, run.calls
    assert run.stopped is None
    torch.manual_seed(0)
    model, state = mlp(*SMALL.sizes), None
    terms = SMALL.terms(torch.Generator().manual_seed(0))
    before, optimizer = pinn_loss(model, terms), method.build(SMALL, method.first, 12.0)
    for _ in range(4):
        state = optimizer.step(model, terms, state)
    assert pinn_loss(model, terms) < before


def test_a_method_that_did_not_run_has_no_error():
    """SPRING's momentum enters at the second step: after one step, it was ENGD."""
    short, long = (train(SMALL, "SPRING", PINN_METHODS["SPRING"].first, 0, t) for t in (1.0, 2.0))
    assert short.calls["kfac_scratch.pinn.steps:times"] == 0
    assert short.error is None
    assert long.error == long.errors[-1]


def test_engd_is_not_spring():
    with counted(["kfac_scratch.pinn.steps:times"]) as calls:
        train(SMALL, "ENGD", PINN_METHODS["ENGD"].first, 0, 4.0)
    assert calls == {"kfac_scratch.pinn.steps:times": 0}


@pytest.mark.parametrize("name", PINN_METHODS)
def test_the_first_settings_lie_in_the_space(name):
    method = PINN_METHODS[name]
    assert set(method.first) == set(method.space)
    found = settings(method.space, place(method.space, method.first))
    for key, value in method.first.items():
        assert found[key] == (pytest.approx(value) if isinstance(value, float) else value)


def test_the_solver_is_the_cheaper_of_two_that_give_the_same_step():
    assert PINN_TASKS["poisson-2d"].solver is dense_solver
    assert PINN_TASKS["poisson-2d-deep"].solver is kernel_solver
    assert PINN_TASKS["poisson-5d-wide"].weights == 116_865


def test_iterations_of_lbfgs_are_counted_one_by_one():
    run = train(SMALL, "L-BFGS", PINN_METHODS["L-BFGS"].first, 0, 3.0)
    assert run.calls == {"torch.optim.lbfgs:_strong_wolfe": run.steps[-1]}
    assert run.steps[-1] > 10  # in one call
    assert train(SMALL, "Adam", PINN_METHODS["Adam"].first, 0, 9.0).steps[-1] == 3


def test_adams_rate_falls_like_a_cosine_over_the_seconds_of_the_run():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 1))
    terms = SMALL.terms(torch.Generator().manual_seed(0))
    rates, state = [], None
    for _ in range(3):  # each takes one second
        state = OfTorch(lambda p: torch.optim.Adam(p, lr=1.0), 2.0).step(model, terms, state)
        rates.append(state.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.0, 0.5, 0.0])


def test_the_squared_norm_solves_its_equation():
    problem, X = squared_norm(4), torch.rand(5, 4)
    H = torch.func.vmap(torch.func.hessian(lambda x: problem.solution(x[None])[0, 0]))(X)
    lap = H.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
    assert (problem.equation(SimpleNamespace(lap=lap), X) == 0).all()
    assert (problem.equation(SimpleNamespace(lap=1.1 * lap), X) != 0).all()


# ---- the protocol -------------------------------------------------------------------------------


def test_an_exception_ends_a_run_at_the_weights_before_it(monkeypatch):
    """With the error there, and a reason."""
    original, count = Spring.step, iter(range(100))

    def failing(self, *args):
        if next(count) == 3:
            raise ValueError("no more")
        return original(self, *args)

    monkeypatch.setattr(Spring, "step", failing)
    run = train(SMALL, "SPRING", PINN_METHODS["SPRING"].first, 0, 9.0)
    assert (run.stopped, run.steps[-1], run.used) == ("no more", 3, 3.0)
    assert run.error == run.errors[-1] == run.errors[-2]


def test_proposals_are_the_first_settings_then_others_and_the_same_every_time():
    tried = []
    for i in range(6):
        config = proposal(SMALL, "L-BFGS", tried)
        assert config == proposal(SMALL, "L-BFGS", tried)
        tried.append({"config": config, "error": 1.0 + i})
    assert tried[0]["config"] == PINN_METHODS["L-BFGS"].first
    assert len({tuple(t["config"].items()) for t in tried}) == 6  # of twelve in the space


@pytest.fixture
def task(monkeypatch):
    task = replace(SMALL, compared=("KFACKrylov", "Adam"), trials=4, trial_seconds=3.0, seconds=6.0)
    monkeypatch.setitem(training.PINN_TASKS, NAME, task)
    return task


@pytest.fixture
def path(task, tmp_path):
    """A whole comparison that is made small, as it is stored."""
    path = tmp_path / f"pinn-training-{NAME}.json"
    run_search(task, path, task.compared)
    run_finals(task, path, task.compared)
    return path


def test_the_check_passes_what_keeps_the_protocol_and_names_what_does_not(path):
    result = stored(path)
    assert list(broken(NAME, result)) == []
    proof = PINN_METHODS["KFACKrylov"].proof[0]
    run = ("finals", "KFACKrylov", 0)
    for where, words in [
        (("search", "Adam", "pop"), "3 trials, 4 expected"),
        (("finals", "Adam", "pop"), "the seeds are not"),
        (("finals", "Adam", 1, "seed", 0), "the seeds are not"),
        (("search", "Adam", 0, "seed", 101), "were searched on"),
        ((*run, "calls", proof, 0), f"{proof} was never called"),
        ((*run, "calls", {"another": 1}), "other functions were counted"),
        ((*run, "budget", 7.0), "different seconds"),
        ((*run, "used", 2.0), "it ended after 2.0 of 6.0 seconds"),
        ((*run, "config", "damping", 1.0), "did not win the search"),
        ((*run, "config", {}), "other settings than"),
        ((*run, "error", 1e-9), "not that at the end of the curve"),
        ((*run, "seconds", 0, 9.0), "does not go forward"),
        (("processor", None), "processor is missing"),
        (("summary", None), "the summary does not follow"),
    ]:
        found = list(broken(NAME, spoiled(result, *where)))
        assert any(words in fault for fault in found), (words, found)
    del result["finals"]["Adam"]
    assert any("differs from the list in ['Adam']" in fault for fault in broken(NAME, result))


def test_too_few_final_seeds_are_a_violation(path, task, monkeypatch):
    monkeypatch.setitem(training.PINN_TASKS, NAME, replace(task, finals=2))
    assert any("fewer than 3" in fault for fault in broken(NAME, stored(path)))


def test_what_is_interrupted_goes_on_to_the_same_result(path, task):
    whole, result = stored(path), stored(path)
    result["search"]["Adam"] = result["search"]["Adam"][:3]
    del result["finals"]["Adam"]
    result["finals"]["KFACKrylov"].pop()
    training.write(path, result)
    run_search(task, path, task.compared)
    run_finals(task, path, task.compared)
    assert stored(path) == whole


def test_a_new_trial_makes_the_finals_of_its_method_invalid(path, task):
    run_search(replace(task, trials=5), path, ["Adam"])
    assert set(stored(path)["finals"]) == {"KFACKrylov"}
    assert len(trials(path, "Adam")) == 5


def test_other_seconds_or_another_version_are_not_mixed(path, task):
    with pytest.raises(SystemExit, match=r"different seconds, \[3.0, 4.0\]"):
        run_search(replace(task, trials=5, trial_seconds=4.0), path, ["Adam"])
    training.write(path, stored(path) | {"processor": "another"})
    with pytest.raises(SystemExit, match="another processor"):
        run_search(replace(task, trials=5), path, ["Adam"])


def test_the_settings_of_the_smallest_error_win_and_a_miss_never_does():
    tried = [{"error": None, "config": {"lr": 1}}, {"error": 0.5, "config": {"lr": 2}}]
    assert winner(tried) == {"lr": 2}
    assert winner(tried[:1]) == {"lr": 1}


def test_the_summary_is_of_the_errors_at_the_end():
    runs = [{"error": e, "steps": [0, s]} for e, s in ((0.3, 5), (None, 1), (0.1, 9))]
    expected = {"median": 0.3, "errors": [0.1, 0.3, None], "steps": 5}
    assert summary({"Adam": runs}) == {"Adam": expected}


@pytest.mark.parametrize("name", PINN_TASKS)
def test_what_is_stored_keeps_the_protocol(name):
    path = RESULTS / f"pinn-training-{name}.json"
    if not path.exists():
        pytest.skip(f"{name} has not been run")
    assert list(broken(name, stored(path))) == []


def command(monkeypatch, path, *words):
    words = ("--problem", NAME, "--results", str(path.parent), *words)
    monkeypatch.setattr("sys.argv", ["pinn_training", *words])
    training.main()


def test_the_command_searches_goes_on_starts_afresh_and_checks(path, task, monkeypatch, capsys):
    whole = stored(path)
    command(monkeypatch, path, "--search", "--finals", "--missing", "--check")
    out = capsys.readouterr().out
    assert "About 0 minutes" in out
    assert f"{path.name}: kept" in out
    assert stored(path) == whole
    command(monkeypatch, path, "--search", "--method", "Adam", "--trial-seconds", "3")
    assert f"{path.stem}, Adam, seed 0" in capsys.readouterr().out
    assert set(stored(path)["finals"]) == {"KFACKrylov"}
    with pytest.raises(SystemExit, match="violations"):
        command(monkeypatch, path, "--check")
    command(monkeypatch, path, "--finals", "--missing", "--check")
    assert stored(path) == whole


def test_differences_between_seeds_are_seen():
    first, second = (train(SMALL, "Adam", PINN_METHODS["Adam"].first, s, 6.0) for s in (0, 1))
    again = train(SMALL, "Adam", PINN_METHODS["Adam"].first, 0, 6.0)
    check_equal(*(torch.tensor(run.errors) for run in (first, again)))
    check_differs(torch.tensor(first.errors), torch.tensor(second.errors))
