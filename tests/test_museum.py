"""The museum: what is right passes, and every piece is rejected by the case that it names."""

import inspect

import pytest

from kfac_scratch.conformance.families import CASES, FAMILIES, family
from kfac_scratch.conformance.harness import run, verdict
from kfac_scratch.conformance.museum import KFAC, PIECES, Adapter

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
FEW = list(CASES.values())[::9]


def judged(adapter, piece):
    case, flavour = piece.case
    return verdict(adapter, CASES[case], flavour)


def refused(cases, device):
    """Verdicts on the naive KFAC that are neither right nor about what it does not offer."""
    results = run(Adapter(), cases, str(device))
    return [(r.case, r.flavour, r.verdict, r.words) for r in results if not r.passes]


def test_the_naive_one_is_right(device):
    assert refused(FEW, device) == []


@pytest.mark.slow
def test_the_naive_one_is_right_everywhere(device):
    assert refused(list(CASES.values()), device) == []


def test_the_naive_one_offers_all_but_two_things():
    """What it does not support is not judged: operators, and groups of a convolution."""
    results = run(Adapter(), [c for c in CASES.values() if c.operator or "groups" in c.tags])
    assert {r.verdict for r in results} == {"not-supported"}
    others = [c for c in FEW if not (c.operator or "groups" in c.tags)]
    assert "not-supported" not in {r.verdict for r in run(Adapter(), others)}


@each_piece
def test_a_piece_is_rejected_and_what_is_right_is_not(piece):
    assert judged(Adapter(), piece).verdict in ("exact", "definition")
    result = judged(piece.adapter(), piece)
    assert not result.passes
    assert result.words


@each_piece
def test_a_piece_replaces_one_function_by_one_of_the_same_form(piece):
    right, wrong = (list(inspect.signature(f).parameters) for f in (piece.right, piece.wrong))
    assert right == wrong
    assert inspect.getsource(piece.right) != inspect.getsource(piece.wrong)
    assert piece.adapter().kfac != KFAC()


@each_piece
def test_a_piece_looks_right_somewhere(piece):
    """None is broken beyond recognition: each passes a case of one layer kind at least."""
    easy = [CASES["deep-linear-mse-sum-nobias"], CASES["one-datum-cross-entropy-tanh-sum"]]
    easy += [CASES["conv1d-plain-per-location-mse-mean"], CASES["empirical-one-datum-bce-mean"]]
    assert any(result.passes for result in run(piece.adapter(), easy))


def test_every_public_thread_has_its_piece():
    assert {piece.thread for piece in PIECES if piece.thread} == THREADS
    assert all(
        piece.url.startswith("https://github.com/") == bool(piece.thread) for piece in PIECES
    )


def test_pieces_are_told_apart_by_slug_and_title():
    assert len({piece.slug for piece in PIECES}) == len(PIECES) == len({p.title for p in PIECES})


def test_scales_are_named():
    """Where a mistake is a scale, the verdict says which number was forgotten."""
    words = {piece.slug: judged(piece.adapter(), piece).words for piece in PIECES}
    assert "1/N²" in words["mean-gradients"]
    assert "1/2" in words["half"]
    assert "by C = 5" in words["batch-size"]
    assert "S = 8" in words["positions"]
    assert "1/S²" in words["mean-of-vectors"]
    assert "looks like the empirical Fisher" in words["empirical"]
    assert "without the loss's weights" in words["weights"]
    assert "not deterministic" in words["damping-in-place"]


def test_cases_that_mutants_asked_for_are_needed():
    """A piece that only the family `extra` rejects."""
    squares = next(piece for piece in PIECES if piece.slug == "squares")
    others = [c for c in CASES.values() if "ekfac" in c.flavours and family(c) != "extra"]
    adapter = squares.adapter()
    assert all(verdict(adapter, case, "ekfac").passes for case in others[::4])
    assert any(not r.passes for r in run(adapter, FAMILIES["extra"][:1]))
