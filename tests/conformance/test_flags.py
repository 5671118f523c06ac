"""A flag is true: with its mistake, no flavour that it names passes, and every other one does."""

import json
import re

import pytest
import torch

from kfac_scratch.conformance.adapters.ours import Adapter
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging import harness, truth
from kfac_scratch.conformance.judging.flags import MEANINGS, difference, flags
from kfac_scratch.conformance.judging.judge import judge
from kfac_scratch.conformance.judging.mistakes.catalogue import MISTAKES, answers
from kfac_scratch.conformance.judging.mistakes.damping import inverted
from kfac_scratch.conformance.judging.pieces import Answer
from kfac_scratch.conformance.judging.ways import asked_about
from kfac_scratch.conformance.protocol import NotSupported
from kfac_scratch.conformance.selftest.museum import PIECES
from kfac_scratch.conformance.vectors import files
from tests.thinned import thinned

SAMPLED = [case for case in CASES.values() if case.fisher == "mc"]
OTHERS = [case for case in CASES.values() if case.fisher != "mc"]
SHIPPED = json.loads((files.SHIPPED / "manifest.json").read_text(encoding="utf-8"))
FLAGS = {entry["id"]: entry["flags"] for entry in SHIPPED["cases"]}


def listed(case):
    """A case's flags as the vectors list them."""
    return {key: list(by_flavour) for key, by_flavour in flags(case).items()}


def made(case):
    """Every mistake that a case is about, in every flavour: its key, the answer, what is right."""
    data = case.build()
    for flavour in case.flavours:
        right = truth.expected(case, data, flavour)
        for mistake, got in answers(asked_about(case, data, flavour)):
            yield mistake.key, flavour, got, right


# ---- the mistake of a flag fails -----------------------------------------------------------------


@pytest.mark.parametrize("case", thinned(OTHERS, 80), ids=str)
def test_the_judge_rejects_a_mistake_exactly_where_its_flag_says(case):
    """And no flag hangs on a rounding: the vectors' flags are the same on every machine."""
    rejected, letters = {}, truth.letters(case, case.build())
    for key, flavour, got, right in made(case):
        change = difference(got, right)
        assert not case.tolerance / 10 < change < 10 * case.tolerance, (key, flavour)
        if not judge(case, flavour, got, right, dict.fromkeys(right, 1.0), letters).passes:
            rejected.setdefault(key, []).append(flavour)
    assert rejected
    assert rejected == (FLAGS[case.id] if case.id in FLAGS else listed(case))


@pytest.mark.parametrize("case", thinned(SAMPLED, 80), ids=str)
def test_random_draws_with_a_flagged_mistake_are_rejected(case):
    """Draws that are right, moved to the mean that the mistake gives."""
    (flavour,) = case.flavours
    given, said = harness.answered(Adapter(), case, flavour), flags(case)
    assert harness.judged(case, flavour, given).passes
    for key, _, got, right in made(case):
        if key in said:
            shift = {at: got[at] - M for at, M in right.items()}
            moved = [{at: M + shift[at] for at, M in draw.items()} for draw in given.draws]
            assert not harness.judged(case, flavour, Answer(moved, given.scales)).passes, key


def test_a_mistake_that_leaves_a_case_right_is_no_flag():
    assert "padding-mode" in flags(CASES["conv2d-circular-pooled-mse"])
    assert "padding-mode" not in flags(CASES["conv2d-padding-pooled-mse"])
    assert "weights" not in flags(CASES["class-weights-one-datum-mean"])  # they cancel
    assert "weights" in flags(CASES["class-weights-mlp-mean"])


def test_where_there_is_no_inverse_the_answer_is_no_number():
    """Not an exception: a rounding decides whether a pivot is exactly zero."""
    W = torch.ones(1, 2)
    found = inverted(torch.zeros(1, 2, 2), W)
    assert found.isnan().all()
    assert difference({("fc", "joint"): found}, {("fc", "joint"): W}) == float("inf")


# ---- the list of mistakes ------------------------------------------------------------------------


def test_every_mistake_has_a_key_and_words_of_its_own():
    assert len({mistake.key for mistake in MISTAKES}) == len(MISTAKES) == len(MEANINGS)
    assert len({mistake.words for mistake in MISTAKES}) == len(MISTAKES)
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in MEANINGS)


def test_the_vectors_say_what_every_flag_means():
    assert SHIPPED["flags"] == MEANINGS


def test_every_mistake_is_caught_by_a_case():
    caught = {key for of_case in FLAGS.values() for key in of_case}
    caught |= flags(CASES["sampled-tokens-cross-entropy"]).keys()  # which vectors leave out
    assert MEANINGS.keys() == caught


# ---- the museum ----------------------------------------------------------------------------------

PIECE = {piece.slug: piece for piece in PIECES if piece.slug in MEANINGS}
TASKS = {
    slug: [(name, flavour) for name, found in FLAGS.items() for flavour in found.get(slug, [])]
    for slug in PIECE
}


def passes(slug, case, flavour):
    """Whether a piece passes, or does not offer what is asked."""
    try:
        given = harness.answered(PIECE[slug].adapter(), case, flavour)
    except NotSupported:
        return None
    except Exception:  # any error of an adapter is a verdict
        return False
    got, data = given.draws[0], case.build()
    right = truth.expected(case, data, flavour, harness.parts_of(got))
    return judge(case, flavour, got, right, given.scales, truth.letters(case, data)).passes


def check_piece(slug, tasks):
    """It fails on all tasks that it has, and has some."""
    found = {(name, flavour): passes(slug, CASES[name], flavour) for name, flavour in tasks}
    assert [task for task, passed in found.items() if passed] == []
    assert False in found.values()


def test_most_pieces_of_the_museum_are_flags():
    assert len(PIECE) > len(PIECES) / 2
    assert [slug for slug, tasks in TASKS.items() if not tasks] == ["uniform"]  # of random draws


@pytest.mark.parametrize("slug", thinned([slug for slug, tasks in TASKS.items() if tasks], 5))
def test_a_piece_of_the_museum_fails_where_the_flag_of_its_name_says(slug):
    check_piece(slug, TASKS[slug][:1] + TASKS[slug][1::120])


@pytest.mark.slow
@pytest.mark.parametrize("slug", [slug for slug, tasks in TASKS.items() if tasks])
def test_a_piece_of_the_museum_fails_on_every_case_with_the_flag_of_its_name(slug):
    check_piece(slug, TASKS[slug])
