"""The museum: what is right passes, and every piece is rejected by the case that it names."""

import inspect
from pathlib import Path

import pytest

from kfac_scratch.conformance.cases.families import CASES, FAMILIES, family
from kfac_scratch.conformance.judging.harness import run, verdict
from kfac_scratch.conformance.selftest.museum import KFAC, PIECES, Adapter

THREADS = {
    "wiseodd/natural-gradients #2",
    "ikostrikov/pytorch-a2c-ppo-acktr-gail #54",
    "f-dangel/curvlinops #82",
    "f-dangel/curvlinops #108",
    "f-dangel/curvlinops #156",
    "gpauloski/kfac-pytorch #109",
    "gpauloski/kfac-pytorch #267",
    "Thrandis/EKFAC-pytorch #4",
    "tfjgeorge/nngeometry #75",
    "LBANN/lbann #2010",
    "f-dangel/singd #17",
}
each_piece = pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.slug)
FEW = {piece.case[0]: CASES[piece.case[0]] for piece in PIECES}


def judged(adapter, piece):
    case, flavour = piece.case
    return verdict(adapter, CASES[case], flavour)


def refused(cases, device):
    """Verdicts on the naive KFAC that are neither right nor about what it does not offer."""
    results = run(Adapter(), cases, str(device))
    return [(r.case, r.flavour, r.verdict, r.words) for r in results if not r.passes]


def test_the_naive_one_is_right_where_pieces_are_not(device):
    assert refused(list(FEW.values())[::2], device) == []


@pytest.mark.slow
def test_the_naive_one_is_right_everywhere(device):
    assert refused(list(CASES.values()), device) == []
    named = [verdict(Adapter(), CASES[case], flavour) for case, flavour in (p.case for p in PIECES)]
    assert {r.verdict for r in named} == {"exact", "definition"}


def test_the_naive_one_refuses_what_it_is_too_simple_for():
    refused = {"groups", "label-smoothing", "entry-weights", "probabilities", "same"}
    cases = [c for c in CASES.values() if c.operator or refused & {*c.tags}]
    cases += [c for c in CASES.values() if "attention.v_proj" in c.judged]
    cases += [c for c in CASES.values() if "embedding" in c.judged]
    assert {r.verdict for r in run(Adapter(), cases[::3])} == {"not-supported"}


@each_piece
def test_a_piece_of_the_museum_is_rejected_by_the_oracle(piece):
    result = judged(piece.adapter(), piece)
    assert not result.passes
    assert result.words


@each_piece
def test_a_piece_replaces_one_function_by_one_of_the_same_form(piece):
    right, wrong = (list(inspect.signature(f).parameters) for f in (piece.right, piece.wrong))
    assert right == wrong
    assert inspect.getsource(piece.right) != inspect.getsource(piece.wrong)
    assert piece.adapter().kfac != KFAC()


@pytest.mark.slow
@each_piece
def test_a_piece_looks_right_somewhere(piece):
    """None is broken beyond recognition: each passes a case of one layer kind at least."""
    easy = [CASES["deep-linear-mse-sum-nobias"], CASES["one-datum-cross-entropy-tanh-sum"]]
    easy += [CASES["conv1d-plain-per-location-mse-mean"], CASES["empirical-one-datum-bce-mean"]]
    assert any(result.passes for result in run(piece.adapter(), easy))


def test_every_public_thread_has_its_piece():
    assert {piece.thread for piece in PIECES if piece.thread} >= THREADS
    assert all(
        piece.url.startswith("https://github.com/") == bool(piece.thread) for piece in PIECES
    )


def test_the_chapter_links_every_thread():
    chapter = Path(__file__).parents[2] / "tutorial" / "36_museum.py"
    text = chapter.read_text(encoding="utf-8")
    told = [piece for piece in PIECES if f'"{piece.slug}"' in text]  # the depot shows the others
    assert {piece.thread for piece in told} >= THREADS
    assert [piece.url for piece in told if piece.url not in text] == []


def test_pieces_are_told_apart_by_slug_and_title():
    assert len({piece.slug for piece in PIECES}) == len(PIECES) == len({p.title for p in PIECES})


@pytest.mark.parametrize(
    ("slug", "words"),
    [
        ("mean-gradients", "too small by N²"),
        ("half", "too small by 2."),
        ("batch-size", "C = 5"),
        ("positions", "S or T = 16"),
        ("mean-of-vectors", "too small by S²"),
        ("empirical", "looks like the empirical Fisher"),
        ("weights", "without the loss's weights"),
        ("damping-in-place", "not deterministic"),
    ],
)
def test_the_verdict_names_what_was_forgotten(slug, words):
    piece = next(piece for piece in PIECES if piece.slug == slug)
    assert words in judged(piece.adapter(), piece).words


def test_cases_that_mutants_asked_for_are_needed():
    """A piece that the family `extra` rejects, and none of the families before it."""
    squares = next(piece for piece in PIECES if piece.slug == "squares")
    before = list(FAMILIES)[: list(FAMILIES).index("extra")]
    others = [c for c in CASES.values() if "ekfac" in c.flavours and family(c) in before]
    adapter = squares.adapter()
    assert all(verdict(adapter, case, "ekfac").passes for case in others[::8])
    assert any(not r.passes for r in run(adapter, FAMILIES["extra"][:1]))
