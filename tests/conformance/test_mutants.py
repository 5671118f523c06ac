"""Mutation tests of the oracle: no mistake in the catalogue passes."""

import sys
from collections import Counter

import pytest

from kfac_scratch.conformance.cases.families import CASES
from kfac_scratch.conformance.judging.harness import verdict
from kfac_scratch.conformance.selftest.mutants import Rejection, catalogue, run_mutants
from kfac_scratch.conformance.selftest.mutations import MUTANTS, Mutant
from kfac_scratch.conformance.selftest.mutations.mutant import sources

CASE = ("mlp-cross-entropy-mean", "expand")
BEFORE = "gram(io.a).div_(io.rows)"


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
    assert modules >= {"matrices.damping", "pinn.terms", "taylor.jets", "taylor.expansions"}


@pytest.mark.parametrize("mutant", MUTANTS[::20], ids=named)
def test_some_mutants_are_rejected_by_the_case_that_they_name(mutant):
    (rejection,) = run_mutants([mutant])
    assert rejection.as_named, str(rejection)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=named)
def test_all_mutants_are_rejected_by_the_case_that_they_name(mutant):
    (rejection,) = run_mutants([mutant])
    assert rejection.as_named, str(rejection)


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
