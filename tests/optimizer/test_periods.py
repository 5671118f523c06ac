"""Periods: numbers of steps between two updates, constant or growing."""

from itertools import pairwise

import pytest

from kfac_scratch.optimizer.periods import Growing, check_period, is_due


def steps_that_are_due(period, steps: int) -> list[int]:
    due: list[int] = []
    for step in range(steps):
        if is_due("factor_every", period, step, due[-1] if due else None):
            due.append(step)
    return due


def test_constant_period_is_due_at_its_multiples():
    assert steps_that_are_due(7, 40) == [0, 7, 14, 21, 28, 35]


def test_growing_period_rises_by_one_until_its_limit():
    periods = [Growing(limit=3, rise=4)(steps) for steps in range(14)]
    assert periods == [1] * 4 + [2] * 4 + [3] * 6


def test_growing_period_is_due_in_every_early_step_and_rarely_later():
    due = steps_that_are_due(Growing(10, 10), 1000)
    assert due[:10] == list(range(10))
    gaps = [later - earlier for earlier, later in pairwise(due)]
    assert sorted(gaps) == gaps
    assert gaps[-1] == 10
    early = [step for step in due if step < 100]
    assert 2.5 <= len(early) / 10 <= 3.5  # "about three times", as the docstring says


def test_growing_period_with_limit_one_is_due_in_every_step():
    assert steps_that_are_due(Growing(1), 30) == list(range(30))


@pytest.mark.parametrize("period", [0, -1, Growing])
def test_check_period_refuses_what_is_no_period(period):
    with pytest.raises((TypeError, ValueError), match="factor_every"):
        check_period("factor_every", period)


@pytest.mark.parametrize("period", [2.5, "10", None, True])
def test_check_period_refuses_what_is_no_whole_number(period):
    with pytest.raises(TypeError, match="factor_every must be a whole number"):
        check_period("factor_every", period)


@pytest.mark.parametrize("returned", [0, 1.5, None])
def test_period_function_that_returns_no_period_is_named(returned):
    with pytest.raises((TypeError, ValueError), match="What factor_every returns after 3 steps"):
        is_due("factor_every", lambda steps: returned, 3, 0)


@pytest.mark.parametrize(("limit", "rise"), [(0, 1), (1, 0), (-3, 1)])
def test_growing_period_refuses_bad_numbers(limit, rise):
    with pytest.raises(ValueError, match="must be at least 1"):
        Growing(limit, rise)
