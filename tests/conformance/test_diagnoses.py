"""Wrong numbers come with words: the mistake that they are equal to, and never another one."""

from dataclasses import replace

import pytest
import torch

from kfac_scratch.conformance import DenseAnswer, KroneckerAnswer, LayerBlock, VectorAnswer
from kfac_scratch.conformance.adapters.ours import Adapter
from kfac_scratch.conformance.cases.case import DEFINITION
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.ops import layer_ops, tied_uses
from kfac_scratch.conformance.drivers import columns
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.diagnoses import (
    EQUAL,
    agree,
    diagnosis,
    explanations,
    merged,
)
from kfac_scratch.conformance.judging.harness import run, verdict
from kfac_scratch.conformance.judging.mistakes.catalogue import MISTAKES
from kfac_scratch.conformance.judging.mistakes.layouts import layouts
from kfac_scratch.conformance.judging.narrowing import narrowed
from kfac_scratch.conformance.judging.ways import Way, asked_about
from kfac_scratch.conformance.selftest.museum import PIECES
from tests import faulty
from tests.laws import error
from tests.thinned import thinned

# A way is one product per weight: neither an operator nor a weight that is applied both ways.
ONE_PRODUCT = [c for c in CASES.values() if not c.operator and not tied_uses(c.ops)]
TASKS = [(case, f) for case in ONE_PRODUCT for f in case.flavours]
OTHERS = [(c, f) for c in CASES.values() if c not in ONE_PRODUCT for f in c.flavours]
PIECE = {piece.slug: piece for piece in PIECES}

# What a piece of the museum may be called: the first where it has a name of its own.
NAMES = {
    "mean-gradients": ["gradients were those of each mini-batch's mean loss", "too small by N²"],
    "half": ["small by 2"],
    "batch-size": [
        "divided by the number of data",
        "large by C",
        "large by T",
        "large by S",
        "or C.",
    ],
    "empirical": ["like the empirical Fisher"],
    "first-datum": ["all data had the prediction of the first"],
    "batch-axis": ["the softmax were over the batch"],
    "last-axis": ["the softmax were over the last axis"],
    "uniform": ["labels were drawn uniformly"],
    "samples": ["small by M", "or M."],
    "weights": ["without the loss's weights", "ignored targets had curvature"],
    "input-positions": ["S_in"],
    "transpose": ["patches were reshaped where they are transposed"],
    "activation-in-place": ["an activation had written over what was recorded"],
    "last-call": ["a layer's last call alone"],
    "padding-mode": ["padding_mode were ignored"],
    "dilation": ["dilation were ignored"],
    "bias-zeros": ["the input of the bias were 0"],
    "mean-of-vectors": ["small by S²"],
    "positions": ["large by S"],
    "cross-terms": ["different data were summed before the square"],
    "single": ["computed in float32"],
    "wrong-side": ["the old and the new in a running mean were exchanged"],
    "equal": ["all mini-batches had one size"],
    "local": ["all mini-batches had one size", "large by 4 or batches²"],
    "eigenvectors": ["eigenvectors were averaged"],
    "squares": ["every position of a datum were squared by itself"],
    "bias-scale": ["too large by S", "the 1 of the bias were summed over positions"],
    "pi-squared": ["pi² were taken for pi"],
    "missing": ["the damping were missing in one term"],
}
SILENT = {"never-called", "damping-in-place"}  # no numbers, or others every time


def judged(adapter, case, flavour="expand"):
    return verdict(adapter, CASES[case], flavour)


def named(words):
    """What a verdict says of the cause, if it says anything."""
    return words.partition(" It looks ")[2]


# ---- the ways ------------------------------------------------------------------------------------


def check_ways(tasks):
    for case, flavour in tasks:
        data = case.build()
        defined = replace(case, flavours={flavour: DEFINITION})
        right = truth.expected(defined, data, flavour)
        found = Way().pieces(asked_about(case, data, flavour))
        assert max(error(found[key], M) for key, M in right.items()) <= case.tolerance, case.id


def test_the_way_without_a_mistake_is_the_definition():
    check_ways(TASKS[::40])


@pytest.mark.slow
def test_the_way_without_a_mistake_is_the_definition_everywhere():
    check_ways(TASKS)


# ---- the museum ----------------------------------------------------------------------------------


def test_every_piece_of_the_museum_has_a_name():
    assert NAMES.keys() | SILENT == PIECE.keys()


@pytest.mark.parametrize("slug", thinned(NAMES))
def test_a_piece_of_the_museum_is_called_by_its_name(slug):
    case, flavour = PIECE[slug].case
    assert any(name in judged(PIECE[slug].adapter(), case, flavour).words for name in NAMES[slug])


def check_names(piece, cases):
    """No cause is named without the true one; how many verdicts have one is returned."""
    adapter, count = piece.adapter(), 0
    for found in run(adapter, cases):
        if cause := named(found.words):
            count += 1
            assert any(name in cause for name in NAMES.get(piece.slug, [])), found
    return count


FEW = ("conv2d-circular-pooled-mse", "batches-unequal-conv", "inverse-factored-0.25-mlp")


@pytest.mark.parametrize("piece", PIECES[::15], ids=lambda piece: piece.slug)
def test_no_piece_is_called_by_the_name_of_another(piece):
    check_names(piece, [CASES[case] for case in (*FEW, piece.case[0])])


@pytest.mark.slow
@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.slug)
def test_no_piece_is_called_by_the_name_of_another_on_a_third_of_all_cases(piece):
    """Every case is asked of a third of the pieces."""
    check_names(piece, list(CASES.values())[PIECES.index(piece) % 3 :: 3])


# ---- every mistake -------------------------------------------------------------------------------


def whole(case):
    """Every layer in one part."""
    return dict.fromkeys(case.judged, ("joint",))


def diagnosed(case, flavour, got):
    data = case.build()
    return diagnosis(asked_about(case, data, flavour, whole(case)), got, truth.letters(case, data))


def explained(case, flavour):
    """All mistakes that a case is about, and what they give."""
    data = case.build()
    right = truth.expected(case, data, flavour, whole(case))
    asked = asked_about(case, data, flavour, whole(case))
    return right, list(explanations(asked, right, truth.letters(case, data)))


def equal(got, right, case):
    return agree(got, right, case.tolerance) == (EQUAL, 1.0)


SOME = [
    ("mlp-mse-mean", "expand"),
    ("batches-class-weights", "expand"),
    ("batches-unequal-ekfac", "ekfac"),
    ("empirical-batches-cross-entropy", "expand"),
    ("class-weights-mlp-mean", "expand"),
    ("attention-tokens-cross-entropy", "expand"),
    ("tokens-cross-entropy-ignored-sum", "expand"),
    ("mean-pooled-mse-mean-bias", "reduce"),
    ("one-datum-mse-relu-inplace-mean", "expand"),
    ("used-in-a-row-mse", "expand"),
    ("conv2d-circular-pooled-mse", "expand"),
    ("conv2d-dilation-pooled-mse", "expand"),
    ("conv2d-stride-pooled-mse", "expand"),
    ("cnn-groups-mse", "expand"),
    ("ekfac-flattened-cross-entropy", "ekfac"),
    ("inverse-exact-0.25-mlp", "expand"),
    ("inverse-factored-0.25-mlp", "expand"),
    ("padded-sentences-cross-entropy", "expand"),
    ("entry-weights-constant-mean", "expand"),
    ("label-smoothing-class-weights-one-datum-mean", "expand"),
    ("layer-norm-mlp-mse", "expand"),
    ("layer-norm-last-layer-mse", "expand"),
    ("used-at-other-positions-mse", "expand"),
    ("used-at-other-positions-mse", "reduce"),
    ("tokens-cross-entropy-all-mean", "expand"),
    ("conv2d-plain-per-location-mse-mean", "expand"),
    ("ekfac-used-in-a-row-mse", "ekfac"),
    ("inverse-factored-cnn-groups", "expand"),
    ("tied-head-pooled-mse", "reduce"),
]


def witnesses():
    """For every mistake a case on which its numbers are not right."""
    found, wanted = {}, {mistake.words for mistake in MISTAKES}
    for name, flavour in SOME:
        case = CASES[name]
        right, all_of_case = explained(case, flavour)
        for words, got in all_of_case:
            finite = all(M.isfinite().all() for M in got.values())
            if words not in found and finite and not equal(got, right, case):
                found[words] = case, flavour, got
        if found.keys() >= wanted:
            break
    return found


@pytest.mark.slow
def test_every_mistake_is_recognised_by_its_own_numbers():
    found = witnesses()
    about_draws = {"as if labels were drawn uniformly"}
    assert {mistake.words for mistake in MISTAKES} - found.keys() == about_draws
    for words, (case, flavour, got) in found.items():
        assert words in diagnosed(case, flavour, got), (words, case.id)


def check_silence(tasks):
    """Nothing is named that a case's right numbers fit, whatever their scales are."""
    for case, flavour in tasks:
        right, all_of_case = explained(case, flavour)
        assert diagnosed(case, flavour, right) == ""
        harmless = [w for w, got in all_of_case if agree(got, right, case.tolerance) is not None]
        scaled = {key: (2 + i) * M for i, (key, M) in enumerate(right.items())}
        cause = diagnosed(case, flavour, scaled)
        same = [w for w, got in all_of_case if equal(got, scaled, case)]
        assert not [w for w in harmless if w in cause and w not in same], (case.id, cause)


def test_what_leaves_a_case_right_is_never_named():
    check_silence([*TASKS[::60], *OTHERS[::12]])


@pytest.mark.slow
def test_what_leaves_a_case_right_is_never_named_on_any_case():
    check_silence(TASKS + OTHERS)


@pytest.mark.parametrize(
    ("word", "holds"),
    [
        ("padding_mode", lambda op: op.kind == "conv" and op["padding_mode"] != "zeros"),
        ("dilation", lambda op: op.kind == "conv" and op["dilation"] > 1),
        ("stride", lambda op: op.kind == "conv" and op["stride"] > 1),
        ("groups of a convolution", lambda op: op.groups > 1),
        ("patches", lambda op: op.kind == "conv"),
        ("input of the bias", lambda op: op["bias"]),
    ],
)
def test_a_mistake_is_tried_only_where_there_is_what_it_is_about(word, holds):
    tried = [mistake for mistake in MISTAKES if word in mistake.words]
    assert tried
    concerned = []
    for case, flavour in TASKS[::5]:
        asked = asked_about(case, case.build(), flavour)
        ops = layer_ops(case.ops)
        for mistake in tried:
            concerned.append(mistake.concerns(asked))
            assert concerned[-1] == any(holds(ops[name]) for name in case.judged), case.id
    assert set(concerned) == {True, False}


def test_mistakes_about_calls_batches_and_losses_are_tried_where_they_can_be_made():
    def tried(name, flavour="expand"):
        asked = asked_about(CASES[name], CASES[name].build(), flavour)
        return " ".join(mistake.words for mistake in MISTAKES if mistake.concerns(asked))

    assert "last call" in tried("used-twice-added-mse", "reduce")
    assert "last call" not in tried("mlp-mse-mean")
    assert "mini-batches had one size" in tried("batches-unequal-mse-mean")
    assert "mini-batches had one size" not in tried("batches-equal-mse-mean")
    assert "mini-batch" not in tried("mlp-mse-mean")
    assert "softmax" in tried("mlp-cross-entropy-mean")
    assert "softmax" not in tried("mlp-mse-mean")
    assert "last axis" not in tried("mlp-cross-entropy-mean")
    assert "last axis" in tried("tokens-cross-entropy-all-sum")
    assert "written over" in tried("one-datum-mse-relu-inplace-mean")
    assert "written over" not in tried("one-datum-mse-relu-mean")
    assert "loss's weights" not in tried("mlp-cross-entropy-mean")
    assert "ignored targets" not in tried("tokens-cross-entropy-all-sum")
    assert "pi" not in tried("inverse-exact-0.25-mlp").split()
    assert "pi²" in tried("inverse-factored-0.25-mlp")


# ---- several causes ------------------------------------------------------------------------------


def test_what_a_cause_has_beyond_another_is_a_part_of_it():
    both = ["as if a", "as if b", "as if a, for c alone"]
    assert merged(both) == ["as if a (perhaps for c alone)", "as if b"]
    assert merged(both[::-1]) == ["as if b", "as if a (perhaps for c alone)"]
    assert merged(both[2:]) == ["as if a, for c alone"]
    assert merged(both[::2], "up to d") == ["as if a (perhaps for c alone; up to d)"]
    assert merged(both[:2], "up to d") == ["as if a", "as if b (each up to d)"]
    assert merged(["as if diag(p)"], "up to d") == ["as if diag(p) (up to d)"]
    scales = ["as if x were too large by 2", "as if x were too large by C"]
    assert merged([*scales, "as if x were too small by C"]) == [
        "as if x were too large by 2 or C",
        "as if x were too small by C",
    ]


def test_no_cause_is_named_beside_one_that_contains_it():
    """The vectors' factor is the same in all mini-batches, so that this case cannot tell."""
    words = named(judged(PIECE["equal"].adapter(), "batches-unequal-mse-mean").words)
    assert words == "as if all mini-batches had one size (perhaps for the inputs alone)."


def of_mistake(key, case, scale=1.0):
    """What is said of numbers with a mistake of `MISTAKES`, and a scale."""
    (mistake,) = [mistake for mistake in MISTAKES if mistake.key == key]
    asked = asked_about(case, case.build(), "expand", whole(case))
    got = {at: scale * M for at, M in mistake.answer(asked).items()}
    return diagnosed(case, "expand", got)


def test_a_scale_beside_a_mistake_has_a_simple_formula_or_none():
    """With a few powers of a few sizes one can make nearly any round number."""
    case = CASES["conv2d-dilation-pooled-mse"]
    S = truth.letters(case, case.build())["conv"]["S"]
    said = " It looks as if dilation were ignored"
    assert of_mistake("dilation", case, 1 / 6.48e8) == f"{said} (up to one scale)."
    assert of_mistake("dilation", case, S**-5.0).startswith(
        f"{said} (with every block too small by S⁵"
    )
    assert of_mistake("dilation", case) == f"{said}."


def test_a_mistake_whose_scale_has_a_formula_is_named_before_those_without():
    case = CASES["batches-unequal-mse-mean"]
    words = of_mistake("equal-and-squared", case, 2.0)
    assert words.startswith(
        " It looks as if mini-batches had equal shares for the inputs, and squared"
    )
    assert "one size" not in words


# ---- calls ---------------------------------------------------------------------------------------


class Overwriting(Adapter):
    """Hooks that keep one thing for each module: the last that came, forward and backward."""

    def blocks(self, request):
        found = super().blocks(request)
        fc, kept = request.model.get_submodule("fc"), {}
        A, B = 0.0, 0.0
        for X, v in columns(request):
            hooks = [
                fc.register_forward_hook(lambda m, i, o: kept.update(a=i[0].detach())),
                fc.register_full_backward_hook(lambda m, i, o: kept.update(g=o[0])),
            ]
            (request.model(X) * v).sum().backward()
            for hook in hooks:
                hook.remove()
            a = torch.cat([kept["a"], torch.ones(len(X), 1).to(X)], 1)
            A, B = a.T @ a / len(X), B + kept["g"].T @ kept["g"]
        return {**found, "fc": LayerBlock(KroneckerAnswer(A[None], B[None]))}


@pytest.mark.parametrize("case", ["used-in-a-row-mse", "used-in-a-row-cross-entropy"])
def test_the_inputs_of_one_call_with_the_vectors_of_another_have_a_name(case):
    """Backward, calls come in the opposite order."""
    words = named(judged(Overwriting(), case).words)
    assert words == (
        "as if a layer had the inputs of its last call alone, and the vectors of its first."
    )


# ---- layouts -------------------------------------------------------------------------------------


class Declared(Adapter):
    """Right numbers with a wrong word about their layout."""

    def __init__(self, axes, bias_at):
        self.axes, self.bias_at = axes, bias_at

    def blocks(self, request):
        return {
            name: LayerBlock(self.part(block.joint), bias_at=self.bias_at, axes=self.axes)
            for name, block in super().blocks(request).items()
        }

    def part(self, joint):
        """As a matrix, or a vector: factors have no order of outputs and inputs."""
        is_vector = isinstance(joint, VectorAnswer)
        return joint if is_vector else DenseAnswer(torch.kron(joint.B, joint.A))


@pytest.mark.parametrize(
    ("case", "flavour", "axes", "bias_at", "words"),
    [
        ("mlp-mse-mean", "expand", "i o", "last", "axes were numbered 'i o'"),
        ("mlp-mse-mean", "expand", "", "first", "the bias stood first"),
        ("mlp-mse-mean", "expand", "", "behind", "the bias stood behind"),
        ("mlp-mse-mean", "expand", "i o", "first", "'i o' and the bias stood first"),
        ("conv2d-nobias-per-location-mse", "expand", "h w i o", "last", "numbered 'h w i o'"),
        ("conv2d-plain-pooled-mse", "reduce", "o h w i", "last", "numbered 'o h w i'"),
        ("inverse-exact-0.25-mlp", "ekfac", "", "first", "the bias stood first"),
    ],
)
def test_a_layout_that_is_not_the_declared_one_is_named(case, flavour, axes, bias_at, words):
    found = judged(Declared(axes, bias_at), case, flavour)
    assert found.verdict == "wrong"
    assert words in named(found.words), found.words


def test_layouts_are_not_the_right_one():
    for name in ("mlp-mse-mean", "conv2d-nobias-per-location-mse", "conv2d-plain-pooled-mse"):
        case = CASES[name]
        data, flavour = case.build(), next(iter(case.flavours))
        right = truth.expected(case, data, flavour)
        found = list(layouts(asked_about(case, data, flavour), right))
        assert found
        for words, got in found:
            agreement = agree(got, right, case.tolerance)
            assert agreement is None, (words, agreement)


# ---- scales --------------------------------------------------------------------------------------


def results_of(scale, cases):
    """Verdicts on an implementation that is right up to a scale."""
    adapter = faulty.Scaled()
    adapter.factor = lambda request, name: scale(
        truth.sizes(CASES[request.case], CASES[request.case].build())[name]
    )
    return [verdict(adapter, CASES[case], "expand") for case in cases]


def test_a_reading_that_a_like_case_contradicts_is_dropped():
    """A position of the layer is one of the output in one case, and not in the other."""
    apart, alike = "mean-pooled-mse-mean-nobias", "positions-mse-mean-bias"
    results = results_of(lambda sizes: sizes["S"], (alike, apart))
    assert "too large by S or T = 5" in results[0].words
    assert "too large by S = 5" in results[1].words
    after = narrowed(results, CASES)
    assert ["too large by S = 5" in r.words for r in after] == [True, True]
    assert "T" not in after[0].words
    assert [replace(r, words="") for r in after] == [replace(r, words="") for r in results]
    assert narrowed(results[:1], CASES) == results[:1]


def test_scales_with_different_causes_keep_their_readings():
    """Two numbers that no formula joins, and cases with another loss."""
    first = results_of(lambda sizes: sizes["S"], ["positions-mse-mean-bias"])
    second = results_of(lambda sizes: sizes["N"], ["mean-pooled-mse-mean-nobias"])
    third = results_of(lambda sizes: sizes["S"], ["mean-pooled-mse-sum-nobias"])
    for others in (second, third):
        assert narrowed([*first, *others], CASES) == [*first, *others]


def test_a_scale_that_no_size_makes_is_explained_by_a_mistake_that_gives_it():
    """On this case the empirical Fisher differs by a number."""
    found = judged(PIECE["empirical"].adapter(), "constant-hessian-cross-entropy-sum-bias")
    assert found.verdict == "undocumented-scale"
    assert named(found.words) == "like the empirical Fisher."
