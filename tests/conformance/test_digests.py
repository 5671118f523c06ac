"""A digest changes with what a case asks and its numbers, and with nothing else."""

from dataclasses import replace

import pytest
import torch

from kfac_scratch.conformance.cases.case import EXACT, spread
from kfac_scratch.conformance.cases.digests import Staleness, content_digest, staleness
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.questions import case_digest, digests

CASE = CASES["mlp-cross-entropy-mean"]
CHANGES = {
    "id": {"id": "mlp-cross-entropy-mean-again", "data": lambda case: spread(CASE)},
    "network": {"ops": CASE.ops[::-1], "data": lambda case: spread(CASE)},
    "loss": {"loss": replace(CASE.loss, reduction="sum")},
    "expectation": {"flavours": {**CASE.flavours, "expand": EXACT}},
    "flavours": {"flavours": {"expand": CASE.flavours["expand"]}},
    "fisher": {"fisher": "empirical"},
    "layers": {"layers": ("fc1",)},
    "part": {"part": "bias"},
    "batches": {"batches": (2, 5)},
    "damping": {"damping": ("exact", 0.25)},
    "dtype": {"dtype": "float32"},
    "one number": {"data": lambda case: replace(spread(case), X=spread(case).X + 2.0**-20)},
    "parameters": {
        "data": lambda case: replace(
            spread(case), parameters={n: 2 * p for n, p in spread(case).parameters.items()}
        )
    },
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_asked_and_every_number_counts(change):
    assert case_digest(replace(CASE, **CHANGES[change])) != case_digest(CASE)


@pytest.mark.parametrize("change", [{"tags": ("other",)}, {"theorem": "one-datum"}], ids=str)
def test_words_do_not_count(change):
    assert case_digest(replace(CASE, **change)) == case_digest(CASE)


def test_neither_the_order_of_keys_nor_the_sign_of_a_zero_counts():
    x, y = torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0])
    assert content_digest({"a": 1, "b": (2,)}, {"x": x}) == content_digest(
        {"b": [2], "a": 1}, {"x": y}
    )
    assert content_digest({}, {"x": x}) != content_digest({}, {"x": x.reshape(2, 1)})
    assert content_digest({}, {"x": x}) != content_digest({}, {"z": x})


def test_every_case_has_a_digest_of_its_own():
    found = digests(CASES)
    assert list(found) == list(CASES)
    assert len({*found.values()}) == len(CASES)
    assert all(len(digest) == 16 for digest in found.values())


def test_what_is_new_changed_and_gone_is_told_by_name():
    state = staleness({"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "other", "d": "4"})
    assert state == Staleness(added=("d",), changed=("b",), gone=("c",))
    assert state
    assert str(state) == (
        "stale: 1 case was added since: d; 1 case was changed since: b; 1 case was removed since: c"
    )


def test_what_was_made_with_todays_cases_is_not_stale():
    state = staleness({"a": "1"}, {"a": "1"})
    assert not state
    assert str(state) == "up to date"


def test_what_does_not_say_its_cases_is_stale():
    assert staleness({}, {"a": "1"})
    assert "does not say which cases" in str(staleness({}, {"a": "1"}))


def test_many_names_are_counted():
    words = str(staleness({"x": "0"}, {"x": "0"} | {str(i): "1" for i in range(8)}))
    assert words == "stale: 8 cases were added since: 0, 1, 2, 3, 4 and 3 more"
