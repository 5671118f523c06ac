"""Mutation tests of the oracle: no mistake in the catalogue passes."""

import sys
from collections import Counter

import pytest

from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.judging.scalars import UNEXPLAINED
from kfac_scratch.conformance.selftest.mutants import Rejection, catalogue, run_mutants
from kfac_scratch.conformance.selftest.mutations import MUTANTS, Mutant
from kfac_scratch.conformance.selftest.mutations.mutant import sources

CASE = ("mlp-cross-entropy-mean", "expand")
BEFORE = "gram(io.a).div_(io.rows)"

# What the verdict on a mutant says of the cause: the mistake, or the scale that it makes.
CAUSES = {
    "vectors averaged in KFAC-reduce": "too small by S² = 25",
    "calls averaged without their numbers of positions": "too small by S² (S = 1 or 2",
    "the mean of means of calls at different numbers of positions": (
        "as if all calls had one number of positions."
    ),
    "expand for reduce": "like the definition of KFAC-expand.",
    "no bias column in averages": "as if the input of the bias were 0",
    "the bias before the weights": "as if the bias stood first.",
    "the mean of the vectors in the reduced view": "too small by S² = 9",
    "the sum of the inputs in the reduced view": "too large by S² = 16",
    "inputs divided by the data only": "too large by S",
    "Taylor coefficients not counted": "too large by 4 or S = 4",
    "inputs of the first mini-batch only": "as if the inputs were those of the first mini-batch",
    "rows of later mini-batches not counted": "too large by N/2",  # 2 of N are in the first
    "mini-batches with equal weights": "too small by C = 5",  # 3.5 for half of N·C
    "each mini-batch divided by its own size": "too large by 2 or batches",
    "a sum divided like a mean, over mini-batches": "too small by 2 or batches",
    "the number of terms for its root": "too large by N = 7",
    "factors exchanged in scale": "too large by N·C = 35",
    "squares before the sum over positions": "as if every position of a datum were squared",
    "KFAC's own eigenvalues": "like the definition of KFAC-expand",
    "decay on the wrong side": "like the definition of KFAC-expand",  # the old scale is kept
    "pi squared": "as if pi² were taken for pi.",
    "pi upside down": "as if pi and 1/pi were exchanged.",
    "no pi": "as if pi were left out.",
    "the damping for its root": "as if the damping were taken for its root.",
    "one factor not damped": "as if one factor were not damped (that of the inputs).",
    "the damping twice": "as if the damping were added twice.",
    "half the squared error": "too small by 2.",
    "twice the squared error": "too large by 2.",
    "the first datum's prediction for all": "as if all data had the prediction of the first.",
    "every vector at all positions": "as if one vector were sent back for all positions",
    "a mean over the batch only": "too large by C",
    "a mean over everything, classes included": "too small by C = 5",
    "ignored positions counted": "too small by K/W = 1.5",
    "ignored positions not ignored": "as if ignored targets had curvature.",
    "class weights left out of the divisor": "too large by W/N = 1.75",
    "class weights left out of the Hessian": "like the same without the loss's weights.",
    "label smoothing left out of the weights": "like the same without label smoothing.",
    "every class of a probability as a term": "too small by C = 5",
    "weights of entries ignored": "like the same without the weights of the loss's entries.",
    "pos_weight ignored": "like the same without the loss's weights.",
    "a sum divided like a mean": "too large by N² = 49",
    "the loss averaged over samples": "too small by M.",
    "labels drawn uniformly": "as if labels were drawn uniformly.",
    "a Gaussian of variance 1": "too large by 2",
    "the same draw for every seed": "seeds give equal draws",
    "the model's most likely labels": "seeds give equal draws",
    "gradients of the mean loss for those of a datum": "too small by N = 7",
    "gradients of the sum for those of the mean": "too large by N = 7",
    "the empirical Fisher taken for the Fisher": "like the empirical Fisher.",
    "means over all rows, zeros included": "K/W = 1.4",
    "residuals divided by N, not by its root": "too small by N/2 = 3.5",  # the residual weighs 2
    "vectors without the residual's weight": "too large by N/2 = 3.5",
    "the value's slope alone": "too small by S² = 16",  # a sum of four becomes one of them
    "the embedding's use is lost": "as if the head alone had the weight.",
}
# Capture itself refuses these, since gradients do not fit: what the oracle hears is an exception.
REFUSED = "is not the sum of g a^T over the calls"
RAISING = {
    **dict.fromkeys(
        (
            "the last call's inputs only",
            "the last call's vectors only",
            "calls in another order for vectors",
            "biases of frozen columns",
            "dilation ignored",
            "the larger half of an odd padding in front",
            "channels of the wrong group",
            "groups interleaved",
            "groups interleaved at the output",
            "a transpose missing for convolutions",
            "kernel before channels in a patch",
            "zeros for the input of a convolution's bias",
            "zeros for the input of a linear layer's bias",
            "the bias's input as large as the layer",
            "float32 buffers in a float64 model",
            "a bias that has derivatives",
            "no bias column for the value",
            "a bias added to every derivative",
        ),
        REFUSED,
    ),
    **dict.fromkeys(
        (
            "settings in another order",
            "padding that the function does not get",
            "stride ignored",
            "padding ignored",
            "padding on the other axis",
        ),
        "shapes cannot be multiplied",
    ),
    "a bias that is not seen": "no function that has a rule used 'fc1.bias'",
    "the first matrix of a group alone": "no function that has a rule used 'conv[1]'",
    "vectors of another call": "Sizes of tensors must match",
}


def said_of_the_cause(result):
    """A mistake or a scale in words, or the text of an exception; empty if there is none."""
    if result.verdict == "error":
        return result.words
    if result.verdict == "wrong":
        return result.words.partition(" It looks ")[2]
    return "" if UNEXPLAINED in result.words else result.words


def check_rejection(mutant):
    """By the case that it names, and with its cause in words, if there are any for it."""
    (rejection,) = run_mutants([mutant])
    assert rejection.as_named, str(rejection)
    said, cause = said_of_the_cause(rejection.result), {**CAUSES, **RAISING}.get(mutant.name)
    assert (cause in said) if cause else not said, str(rejection)


def named(mutant):
    return f"{mutant.module}: {mutant.name}"


@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_snippets_occur_once_and_the_result_is_python(mutant):
    changed = mutant.applied()
    assert changed != sources()[mutant.module]
    compile(changed, mutant.module, "exec")


def test_the_catalogue_is_large_and_names_cases_that_exist():
    assert len(MUTANTS) >= 60
    assert len(catalogue()) >= 90
    assert all(flavour in CASES[case].flavours for case, flavour in (m.case for m in catalogue()))


def test_no_two_mutants_are_the_same():
    assert max(Counter((m.module, m.before, m.after) for m in MUTANTS).values()) == 1
    assert max(Counter(map(named, catalogue())).values()) == 1


def test_every_module_that_the_adapter_needs_has_mutants():
    """All that computes on the way from a network to a block or its inverse, by our own adapter."""
    modules = {mutant.module for mutant in MUTANTS}
    assert modules >= {"losses", "capture.layers", "capture.layer_groups", "capture.forward_pass"}
    assert modules >= {"capture.functions", "capture.calls", "capture.flavours"}
    assert modules >= {"layer_io", "approximations.kfac", "approximations.ekfac", "linalg"}
    assert modules >= {"matrices.matrix", "matrices.dense", "matrices.kronecker"}
    assert modules >= {"matrices.damping", "pinn.terms", "taylor.rules", "taylor.expansions"}


@pytest.mark.parametrize("mutant", MUTANTS[::20], ids=named)
def test_some_mutants_are_rejected_by_the_case_that_they_name(mutant):
    check_rejection(mutant)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_all_mutants_are_rejected_by_the_case_that_they_name(mutant):
    check_rejection(mutant)


def test_causes_are_those_of_mutants():
    """Each has one or none, and most of those that return numbers have one."""
    assert not CAUSES.keys() & RAISING.keys()
    assert CAUSES.keys() | RAISING.keys() <= {mutant.name for mutant in MUTANTS}
    assert len(CAUSES) > (len(MUTANTS) - len(RAISING)) / 2


# ---- what does the rejecting ---------------------------------------------------------------------


def test_a_copy_without_a_mistake_passes():
    """So that what is rejected is rejected for its mistake."""
    harmless = Mutant("nothing", BEFORE, f"({BEFORE})", CASE)
    with harmless.adapter() as adapter:
        for case in ("mlp-cross-entropy-mean", "operator-expand-1d-sum"):
            for flavour in CASES[case].flavours:
                assert verdict(adapter, CASES[case], flavour).passes


def test_the_package_is_left_as_it_was():
    before = {name: module for name, module in sys.modules.items() if "kfac_scratch" in name}
    finders = list(sys.meta_path)
    with MUTANTS[0].adapter():
        assert sys.modules["kfac_scratch.losses"] is not before["kfac_scratch.losses"]
        assert sys.modules["kfac_scratch.conformance"] is before["kfac_scratch.conformance"]
    assert {n: m for n, m in sys.modules.items() if "kfac_scratch" in n} == before
    assert sys.meta_path == finders


def test_a_snippet_that_is_gone_is_an_error():
    """A catalogue that no longer fits the code must not look like one that passes."""
    gone = Mutant("gone", "no such code", "", CASE)
    with (
        pytest.raises(ValueError, match="must occur once in the package, but occurs in no module"),
        gone.adapter(),
    ):
        pass
    twice = Mutant("twice", "return", "", CASE)
    with (
        pytest.raises(
            ValueError, match=r"must occur once in the package, but occurs in .*layer_io"
        ),
        twice.adapter(),
    ):
        pass


def test_a_survivor_is_told(monkeypatch):
    """One that its case lets pass is looked for in the others."""
    name = ("one-datum-mse-tanh-sum", "expand")
    few = {case: CASES[case] for case in (name[0], "mlp-cross-entropy-sum")}
    monkeypatch.setattr("kfac_scratch.conformance.selftest.mutants.CASES", few)
    harmless = Mutant("nothing", BEFORE, f"({BEFORE})", ("one-datum-mse-tanh-sum", "expand"))
    (survivor,) = run_mutants([harmless])
    assert survivor.result is None
    assert not survivor.as_named
    assert "SURVIVES" in str(survivor)
    softmax = next(m for m in MUTANTS if m.name == "softmax over the batch")
    other = Mutant(softmax.name, softmax.before, softmax.after, name)
    (found,) = run_mutants([other])
    assert found.result is not None
    assert found.result.case == "mlp-cross-entropy-sum"
    assert not found.as_named
    assert "wrong" in str(found)
    assert Rejection(softmax, found.result).as_named
