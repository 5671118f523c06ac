"""The judge says what kind of wrong, and names the scale."""

import pytest
import torch

from kfac_scratch.conformance import DenseAnswer, KroneckerAnswer, LayerBlock, VectorAnswer
from kfac_scratch.conformance.adapters.ours import Adapter
from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.cases.ops import conv, linear
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.judging.layout import Malformed, canonical
from kfac_scratch.conformance.judging.scalars import formulas, in_words, off_by, readings
from tests import faulty
from tests.laws import check_equal

SIZES = {"N": 7, "S": 5, "C": 13, "T": 3, "d_in": 17, "d_out": 11}


def by(factor, documented=1.0):
    """An adapter that is right up to a scale."""
    adapter = faulty.Scaled()
    adapter.factor, adapter.documented = factor, documented
    return adapter


def judged(adapter, case, flavour="expand"):
    return verdict(adapter, CASES[case], flavour)


# ---- scales --------------------------------------------------------------------------------------


POSITIONS, MLP = "positions-mse-mean-bias", "mlp-mse-mean"


@pytest.mark.parametrize(
    ("case", "factor", "formula"),
    [
        (POSITIONS, lambda s: s["S"], "large by S or T"),
        (POSITIONS, lambda s: s["T"] ** 2, "large by S² or T²"),
        (POSITIONS, lambda s: s["S"] ** 0.5, "large by S^(1/2) or T^(1/2)"),
        (POSITIONS, lambda s: s["S"] / s["N"], "small by N/S or N/T"),
        (POSITIONS, lambda s: s["T"] ** -5, "small by S⁵ or T⁵"),
        ("conv2d-plain-pooled-mse", lambda s: s["S"] ** 2, "large by S²"),
        (MLP, lambda s: 1 / s["N"], "small by N"),
        (MLP, lambda s: s["N"] ** 2, "large by N²"),
        (MLP, lambda s: 1 / s["N"] ** 2, "small by N²"),
        (MLP, lambda s: s["N"] ** -4 * s["C"] ** 3, "small by N⁴/C³"),
        (MLP, lambda s: s["C"] / 2, "large by C/2"),
        (MLP, lambda s: 1 / s["C"], "small by C"),
        (MLP, lambda s: 2.0, "large by 2."),
        (MLP, lambda s: 0.5, "small by 2."),
    ],
)
def test_the_scale_is_named(case, factor, formula):
    def scale(request, layer):
        return factor(truth.sizes(CASES[case], CASES[case].build())[layer])

    found = judged(by(scale), case)
    assert found.verdict == "undocumented-scale"
    ending = "" if formula.endswith(".") else " = "
    assert f"every block: too {formula}{ending}" in found.words


@pytest.mark.parametrize("letter", ["N", "S", "C", "T", "d_in", "d_out"])
@pytest.mark.parametrize("power", [5, 4, 3, 2, 1, -1, -2, -3, -4, -5])
def test_every_power_of_every_size_is_told_apart(letter, power):
    found = formulas(float(SIZES[letter]) ** power, SIZES)
    above = letter + {1: "", 2: "²", 3: "³", 4: "⁴", 5: "⁵"}[abs(power)]
    assert found == [above if power > 0 else f"1/{above}"]


@pytest.mark.parametrize(
    ("scale", "found"),
    [
        (7**3 / 5**4, "N³/S⁴"),
        (7.0 * 5 * 13, "N·S·C"),
        (5**5 * 3 / 11**2, "S⁵·T/d_out²"),
        (7 * 5 / (13 * 3), "N·S/(C·T)"),
        (7**2 * 5 * 13 * 17 / 11, "N²·S·C·d_in/d_out"),
        (2.0 * 7 * 5 * 13 * 3 * 17 * 11, "2·N·S·C·T·d_in·d_out"),
    ],
)
def test_products_of_any_sizes_are_read(scale, found):
    assert formulas(scale, SIZES) == [found]


def test_products_of_two_sizes_and_half_the_classes():
    assert formulas(13 / 2, SIZES) == ["C/2"]
    assert formulas(63.0, SIZES) == ["N·T²"]
    assert formulas(2 / 49, SIZES) == ["2/N²"]
    assert formulas(5 / (2 * 7), SIZES) == ["S/(N·2)"]
    assert formulas(1.2345, SIZES) == []


def test_what_a_case_cannot_tell_apart_is_said():
    assert formulas(5.0, SIZES | {"T": 5}) == ["S", "T"]
    assert formulas(2.0, SIZES | {"S": 2}) == ["2", "S"]
    assert formulas(0.5, SIZES | {"S": 2}) == ["1/2", "1/S"]
    assert "2 or S = 2 (S = 2: the number of positions" in in_words(2.0, SIZES | {"S": 2})


def test_words_say_what_a_letter_means():
    words = in_words(25.0, SIZES)
    assert words.startswith("S² = 25")
    assert "S = 5: the number of positions" in words
    assert "no simple product" in in_words(1.2345, SIZES)
    assert in_words(1.0, SIZES) == "1"


def test_a_reading_fits_all_layers_and_cases():
    """What one layer cannot tell apart, another does."""
    first, second = {"N": 7, "S": 5, "C": 5}, {"N": 7, "S": 4, "C": 5}
    assert readings([(5.0, first)]) == ["S", "C"]
    assert readings([(5.0, first), (4.0, second)]) == ["S"]
    assert readings([(5.0, first), (5.0, second)]) == ["C"]
    assert readings([(5.0, first), (6.0, second)]) == []


def test_no_reading_contradicts_a_layer_of_the_same_model():
    """In `fc1` the scale could be its inputs; in `fc2`, which has others, it could not."""
    case = CASES["deep-linear-mse-mean-bias"]
    sizes = truth.sizes(case, case.build())
    assert sizes["fc1"]["d_in"] != sizes["fc2"]["d_in"]
    factor = float(sizes["fc1"]["d_in"])
    assert formulas(factor, sizes["fc1"]) == ["d_in"]
    found = judged(by(lambda request, name: factor), case.id)
    assert found.verdict == "undocumented-scale"
    assert "d_in" not in found.words


@pytest.mark.parametrize("scale", [1 + 3e-8, 1 + 2e-10, 1 - 3e-8])
def test_a_scale_within_the_rounding_of_float32_is_said_to_be_one(scale):
    """With the digits in which it differs: it is not 1."""
    number = f"1 {'-' if scale < 1 else '+'} {abs(scale - 1):.0e}"
    assert in_words(scale, SIZES, 1e-10) == f"{number}, which is 1 up to the rounding of float32"
    words = f"right up to the rounding of float32, as it is {number} times as large"
    assert off_by(scale, SIZES, 1e-10) == words
    assert off_by(1 + 5e-11, SIZES, 1e-10) == "right"


@pytest.mark.parametrize(
    ("case", "scale", "formula"),
    [
        ("empirical-label-smoothing-mean", lambda N, W: W, "large by W = 12.25"),
        ("empirical-label-smoothing-mean", lambda N, W: 1 / (N * W), "small by N·W = 85.75"),
        ("class-weights-mlp-mean", lambda N, W: N / W, "small by W/N = 1.75"),
        ("tokens-cross-entropy-ignored-mean", lambda N, W: W / (3 * N), "small by K/W = 1.5"),
    ],
)
def test_a_scale_is_made_of_the_sum_of_the_weights_where_a_mean_divides_by_it(case, scale, formula):
    """Not of other sizes with a product that happens to be equal, as N²/4 or N³/4 are here."""
    data = CASES[case].build()
    W = CASES[case].loss.divisor(truth.output(CASES[case], data), data.y)
    found = judged(by(lambda request, name: scale(len(data.X), W)), case)
    assert found.verdict == "undocumented-scale"
    assert f"every block: too {formula}" in found.words
    assert (
        f"W = {W:.6g}: the number of those that count, or the sum of their weights" in found.words
    )


def test_a_sum_of_weights_is_no_size_where_all_positions_count_alike():
    letters = {"N", "S", "C", "T", "d_in", "d_out", "batches"}
    for name in (
        "mlp-cross-entropy-mean",
        "class-weights-mlp-sum",
        "tokens-cross-entropy-all-mean",
    ):
        assert letters == truth.letters(CASES[name], CASES[name].build())["fc1"].keys()


def test_a_documented_scale_is_no_mistake():
    found = judged(by(lambda request, name: 7.0, documented=7.0), "deep-linear-mse-mean-bias")
    assert found.verdict == "scaled"
    assert found.passes
    assert "documented: N = 7" in found.words


def test_a_documented_scale_that_is_not_the_real_one_is():
    found = judged(by(lambda request, name: 7.0, documented=14.0), "deep-linear-mse-mean-bias")
    assert found.verdict == "undocumented-scale"
    assert "too small by 2 or C = 2" in found.words


def test_silence_of_the_documentation_is_said():
    found = judged(by(lambda request, name: 7.0, documented=None), "deep-linear-mse-mean-bias")
    assert found.verdict == "undocumented-scale"
    assert "the documentation is silent; too large by N = 7" in found.words


def test_silence_is_no_mistake_where_the_scale_is_canonical():
    found = judged(by(lambda request, name: 1.0, documented=None), "deep-linear-mse-mean-bias")
    assert found.verdict == "exact"


def test_scales_that_differ_between_layers():
    adapter = by(lambda request, name: 7.0 if name == "fc1" else 1.0)
    found = judged(adapter, "deep-linear-mse-mean-bias")
    assert found.verdict == "inconsistent-scale"
    assert "fc1 joint: too large by N = 7" in found.words
    assert "fc2 joint: right" in found.words


def test_scales_that_differ_between_weight_and_bias():
    adapter = faulty.Separate()
    assert judged(adapter, "deep-linear-mse-mean-bias").verdict == "exact"
    adapter.scales = (1.0, 7.0)
    found = judged(adapter, "deep-linear-mse-mean-bias")
    assert found.verdict == "inconsistent-scale"
    assert "fc1 weight: right" in found.words
    assert "fc1 bias: too large by N = 7" in found.words


def test_a_negative_or_zero_scale_is_wrong():
    for factor in (-1.0, 0.0):
        adapter = by(lambda request, name, factor=factor: factor)
        assert judged(adapter, "deep-linear-mse-mean-bias").verdict == "wrong"


# ---- what is wrong -------------------------------------------------------------------------------


class Swapped(Adapter):
    def blocks(self, request):
        other = {"expand": "reduce", "reduce": "expand"}[request.flavour]
        return super().blocks(type(request)(**{**request.__dict__, "flavour": other}))


class Empirical(Adapter):
    def blocks(self, request):
        return super().blocks(type(request)(**{**request.__dict__, "fisher": "empirical"}))


class LastBatch(Adapter):
    def blocks(self, request):
        batches = request.batches[-1:]
        return super().blocks(type(request)(**{**request.__dict__, "batches": batches}))


class Unweighted(Adapter):
    def blocks(self, request):
        request.loss.weight = None
        return super().blocks(request)


@pytest.mark.parametrize(
    ("adapter", "case", "flavour", "words"),
    [
        (Swapped(), "mean-pooled-mse-mean-bias", "reduce", "the definition of KFAC-expand"),
        (Swapped(), "mean-pooled-mse-mean-bias", "expand", "the definition of KFAC-reduce"),
        (Empirical(), "mlp-cross-entropy-mean", "expand", "the empirical Fisher"),
        (LastBatch(), "batches-unequal-cross-entropy-mean", "expand", "the last mini-batch alone"),
        (Unweighted(), "class-weights-mlp-mean", "expand", "without the loss's weights"),
    ],
)
def test_a_well_known_mistake_is_recognised(adapter, case, flavour, words):
    found = judged(adapter, case, flavour)
    assert found.verdict == "wrong"
    assert f"It looks like {words}" in found.words or words in found.words, found.words


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (faulty.NotFinite(), "fc1, joint: 324 numbers are not finite"),
        (faulty.WrongShape(), "fc1, joint: A has shape [1, 5, 5], expected [1, 6, 6]"),
        (faulty.WrongType(), "fc1: expected a LayerBlock, got Kronecker"),
        (faulty.WrongParts(), "fc1: got the parts ['weight'], expected ['joint'] or"),
        (faulty.WrongAxes(), "expected an order of the letters o i"),
        (faulty.SinglePrecision(), "torch.float32 where the model and the data are float64"),
        (faulty.Random(), "not deterministic: the same request twice differs"),
        (faulty.Accumulating(), "not deterministic: the same request twice differs"),
        (faulty.Forgetful(), "no block for the layer 'fc2'; got ['fc1']"),
        (faulty.NoMapping(), "blocks() returned a list, expected a mapping"),
        (faulty.Raising(), "RuntimeError: out of ideas"),
    ],
)
def test_what_cannot_be_judged_is_an_error_in_words(adapter, words):
    found = judged(adapter, "deep-linear-mse-mean-bias")
    assert found.verdict == "error"
    assert words in found.words, found.words


def test_what_is_refused_is_not_supported():
    found = judged(faulty.Refusing(), "deep-linear-mse-mean-bias")
    assert found.verdict == "not-supported"
    assert found.words == "only on Sundays"


# ---- Monte Carlo ---------------------------------------------------------------------------------


class Biased(Adapter):
    """Draws with a scale."""

    scale_of_draws = 1.5

    def blocks(self, request):
        found = super().blocks(request)
        return {
            n: LayerBlock(KroneckerAnswer(b.joint.A, self.scale_of_draws * b.joint.B))
            for n, b in found.items()
        }


class SameDraw(Adapter):
    def blocks(self, request):
        return super().blocks(type(request)(**{**request.__dict__, "seed": 0}))


def test_a_random_estimator_is_judged_in_expectation():
    assert judged(Adapter(), "sampled-mse-mean").verdict == "definition"
    assert judged(Biased(), "sampled-mse-mean").verdict == "wrong"
    assert "equal draws" in judged(SameDraw(), "sampled-mse-mean").words


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias_at", ["last", "first", "behind"])
@pytest.mark.parametrize("axes", ["", "o i h w", "h w i o", "i h w o", "o h w i"])
def test_layouts_are_undone(axes, bias_at):
    """A block, numbered another way, comes back as it was."""
    op = conv("conv", 2, 3, (2, 5))
    torch.manual_seed(0)
    W = torch.randn(3, 2, 2, 5)
    b = torch.randn(3)
    raw, order = W, axes.split() or ["o", "i", "h", "w"]
    raw = W.permute([["o", "i", "h", "w"].index(x) for x in order])
    if bias_at == "behind":
        v = torch.cat([raw.flatten(), b])
    elif order[0] == "o":
        parts = [raw.flatten(1), b[:, None]]
        v = torch.cat(parts if bias_at == "last" else parts[::-1], 1).flatten()
    else:
        parts = [raw.flatten(0, -2), b[None]]
        v = torch.cat(parts if bias_at == "last" else parts[::-1], 0).flatten()
    right = torch.cat([W.flatten(1), b[:, None]], 1).flatten()
    block = LayerBlock(DenseAnswer(torch.outer(v, v)), bias_at=bias_at, axes=axes)
    check_equal(canonical("conv", block, op)["joint"][0], torch.outer(right, right))
    vector = LayerBlock(VectorAnswer(v), bias_at=bias_at, axes=axes)
    check_equal(canonical("conv", vector, op)["joint"][0], right)


@pytest.mark.parametrize("axes", ["o i h w", "h w i o"])
@pytest.mark.parametrize("bias_at", ["last", "first"])
def test_layouts_of_factors_are_undone(axes, bias_at):
    op = conv("conv", 2, 3, (2, 5))
    a, g, b = torch.randn(2, 2, 5), torch.randn(3), torch.ones(1)
    raw = a if axes == "o i h w" else a.permute(1, 2, 0)
    row = torch.cat([raw.flatten(), b] if bias_at == "last" else [b, raw.flatten()])
    block = LayerBlock(
        KroneckerAnswer(torch.outer(row, row), torch.outer(g, g)), bias_at=bias_at, axes=axes
    )
    right = torch.outer(g, torch.cat([a.flatten(), b])).flatten()
    check_equal(canonical("conv", block, op)["joint"][0], torch.outer(right, right))


def test_what_no_layout_fits_is_refused():
    op = linear("fc", 2, 3)
    M = torch.zeros(9, 9)
    middle = LayerBlock(DenseAnswer(M))
    object.__setattr__(middle, "bias_at", "middle")  # as somebody without a type checker has it
    for block, words in [
        (middle, "expected 'last', 'first' or 'behind'"),
        (LayerBlock(DenseAnswer(M[:8, :8])), "M has shape [8, 8], expected [1, 9, 9] or [9, 9]"),
        (LayerBlock(VectorAnswer(M)), "v has 81 entries, expected 9"),
        (LayerBlock(), "got the parts []"),
    ]:
        with pytest.raises(Malformed) as caught:
            canonical("fc", block, op)
        assert words in str(caught.value)
