"""The oracle's own truth: cases hold what they claim, by two independent ways to compute it."""

from dataclasses import replace
from itertools import combinations
from math import gcd

import pytest
import torch

from kfac_scratch import curvature, kfac, layer_ios
from kfac_scratch.conformance.adapters.ours import Adapter
from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, Case
from kfac_scratch.conformance.cases.families import CASES, FAMILIES, family
from kfac_scratch.conformance.cases.ops import (
    forward,
    held_parameters,
    layer_ops,
    network,
    tied_uses,
)
from kfac_scratch.conformance.cases.selection import tasks
from kfac_scratch.conformance.cases.theorems import THEOREMS
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.harness import missing, request, verdict
from kfac_scratch.conformance.protocol import DenseAnswer, LayerBlock
from tests import reference
from tests.laws import check_equal, error
from tests.thinned import thinned

each = pytest.mark.parametrize("case", thinned(CASES.values(), 6, kind=family), ids=str)
DOUBLE = [case for case in CASES.values() if case.dtype == "float64"]
GROUPED = [case for case in DOUBLE if any(op.is_layer and op.groups > 1 for op in case.ops)]
PLAIN = [c for c in DOUBLE if not (c.operator or c.batches or c in GROUPED)]


def flavours(case, expectation):
    return [f for f, found in case.flavours.items() if found == expectation]


def as_(case, flavour, expectation):
    return replace(case, flavours={flavour: expectation}, damping=None)


def test_there_are_many_cases_and_each_has_its_own_name_and_a_theorem():
    assert len(CASES) >= 120
    assert len(CASES) == sum(len(cases) for cases in FAMILIES.values())
    assert {case.theorem for case in CASES.values()} == set(THEOREMS)
    assert all(case.id == case.id.lower() and " " not in case.id for case in CASES.values())


@each
def test_a_theorem_makes_the_definition_exact(case):
    """Where a case says that KFAC is exact, the definition equals the exact block."""
    if case.operator:
        pytest.skip("the truth has no definition for operators: see test_pinn")
    data = case.build()
    for flavour in flavours(case, EXACT):
        exact = truth.expected(as_(case, flavour, EXACT), data, flavour)
        defined = truth.expected(as_(case, flavour, DEFINITION), data, flavour)
        for key in exact:
            assert error(defined[key], exact[key]) <= case.tolerance, (flavour, key)


@each
def test_without_a_theorem_the_definition_is_not_exact(case):
    data = case.build()
    for flavour in flavours(case, DEFINITION):
        exact = truth.expected(as_(case, flavour, EXACT), data, flavour)
        defined = truth.expected(as_(case, flavour, DEFINITION), data, flavour)
        assert max(error(defined[key], exact[key]) for key in exact) > 1e-3, flavour


@each
def test_nothing_that_is_expected_is_zero(case):
    """A zero matrix has every scale."""
    data = case.build()
    for flavour in case.flavours:
        for key, M in truth.expected(case, data, flavour).items():
            assert M.abs().max() > 1e-6, (flavour, key)


@each
def test_the_module_computes_what_the_operations_say(case):
    data = case.build()
    model = network(case.ops, data.parameters)
    check_equal(model(data.X.clone()), forward(case.ops, data.parameters, data.X))
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert names == set(held_parameters(case.ops, data.parameters))


def as_in_the_package(case, name, M):
    """The block of a weight that is applied both ways is numbered as the linear layer's there."""
    if name not in tied_uses(case.ops):
        return M
    d_out, d_in = layer_ops(case.ops)[name].matrix_shape()
    return M.reshape(d_out, d_in, d_out, d_in).permute(1, 0, 3, 2).reshape(M.shape)


@pytest.mark.parametrize("case", thinned(PLAIN, 6, kind=family), ids=str)
def test_the_exact_blocks_are_those_of_the_whole_networks_matrix(case):
    """The same matrix by `curvature`, which knows nothing of operations."""
    data = case.build()
    model, loss = network(case.ops, data.parameters), case.loss.module(data.X)
    of = curvature.empirical_fisher if case.fisher == "empirical" else curvature.ggn
    blocks = curvature.diagonal_blocks(model, of(model, loss, data.X, data.y))
    for name, M in truth.exact(case, data).items():
        check_equal(as_in_the_package(case, name, M[0]), blocks[name])


@pytest.mark.parametrize(
    "case", thinned([c for c in PLAIN if c.fisher == "type2"], 9, kind=family), ids=str
)
def test_the_exact_blocks_are_those_of_curvlinops(case):
    data = case.build()
    model, loss = network(case.ops, data.parameters), case.loss.module(data.X)
    M = reference.ggn(model, loss, data.X, data.y)
    blocks = curvature.diagonal_blocks(model, M)
    for name, F in truth.exact(case, data).items():
        check_equal(as_in_the_package(case, name, F[0]), blocks[name])


def test_a_groups_block_is_a_diagonal_block_of_the_whole_convolution():
    case = CASES["conv2d-groups-per-location-mse"]
    data = case.build()
    model, loss = network(case.ops, data.parameters), case.loss.module(data.X)
    blocks = curvature.diagonal_blocks(model, curvature.ggn(model, loss, data.X, data.y))
    for i, M in enumerate(truth.exact(case, data)["conv"]):
        check_equal(M, blocks[f"conv[{i}]"])


@pytest.mark.parametrize(
    "case", thinned([c for c in DOUBLE if len(c.shape) > 1], kind=family), ids=str
)
def test_sizes_are_coprime_so_that_a_scale_names_its_cause(case):
    """The number of data, of positions and of outputs of the network."""
    data = case.build()
    for name, sizes in truth.sizes(case, data).items():
        letters = ("N", "C", "T") if case.operator else ("N", "S", "C")
        values = [sizes[x] for x in letters if sizes[x] > 1]
        assert all(gcd(a, b) == 1 for a, b in combinations(values, 2)), (name, sizes)


@pytest.mark.parametrize(
    "task", thinned(tasks(), 9, kind=lambda task: (family(CASES[task[0]]), task[1])), ids="-".join
)
def test_this_package_passes(task, device):
    case, flavour = CASES[task[0]], task[1]
    found = verdict(Adapter(), case, flavour, str(device))
    right = "exact" if case.flavours[flavour] == EXACT else "definition"
    assert found.verdict == right, found


@pytest.mark.parametrize("task", tasks(tags=["float32"]), ids="-".join)
def test_single_precision_asks_the_same_in_other_numbers(task):
    case = CASES[task[0]]
    twin = CASES[case.id.removesuffix("-float32")]
    assert torch.equal(case.build().X.double(), twin.build().X)


def test_expectations_do_not_depend_on_how_data_arrive():
    case = CASES["batches-unequal-cross-entropy-mean"]
    data = case.build()
    whole = truth.expected(replace(case, batches=()), data, "expand")
    for key, M in truth.expected(case, data, "expand").items():
        check_equal(M, whole[key])


def test_what_an_implementation_lacks_is_said_in_words():
    offered = replace(
        Adapter().capabilities(),
        fishers=frozenset({"mc"}),
        losses=frozenset({"mse"}),
        ops=frozenset({"linear"}),
        batches=False,
    )
    words = missing(offered, CASES["batches-unequal-conv"], "reduce")
    for lack in ("fisher type2", "loss cross-entropy", "operations conv", "mini-batches"):
        assert lack in words


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("multihead")])
def test_layers_inside_attention_modules_are_asked_of_those_who_claim_them(name):
    """The output projection among them: it is a module, but is never called."""
    claimed = Adapter().capabilities()
    for flavour in CASES[name].flavours:
        assert missing(claimed, CASES[name], flavour) == ""
        words = missing(replace(claimed, projections=False), CASES[name], flavour)
        assert words == "the projections of an attention module"


def test_masks_come_by_mini_batch_to_those_who_take_them():
    case = CASES["padded-sentences-in-batches"]
    asked = request(case, case.build(), "expand")
    assert [mask.shape for mask in asked.masks] == [(2, 3), (5, 3)]
    assert [mask.sum(1).tolist() for mask in asked.masks] == [[3, 1], [2, 3, 1, 2, 3]]
    assert all(
        torch.equal(mask, y != -100)
        for mask, (_, y) in zip(asked.masks, asked.batches, strict=True)
    )
    other = CASES["tokens-cross-entropy-ignored-mean"]
    assert not request(other, other.build(), "expand").masks
    modest = replace(Adapter().capabilities(), masks=False)
    assert missing(modest, case, "expand") == "masks of positions"
    assert missing(Adapter().capabilities(), case, "expand") == ""


@pytest.mark.parametrize("flavour", ["expand", "reduce"])
def test_padding_that_is_counted_is_wrong_and_named(flavour):
    class Counting(Adapter):
        def blocks(self, asked):
            return super().blocks(replace(asked, masks=()))

    found = verdict(Counting(), CASES["padded-sentences-cross-entropy"], flavour, "cpu")
    assert found.verdict == "wrong"
    assert "as if the padding were counted" in found.words
    alone = verdict(Counting(), CASES["padded-one-position-cross-entropy"], flavour, "cpu")
    assert not alone.passes


@pytest.mark.parametrize("use", ["embedding", "head"])
@pytest.mark.parametrize("name", ["tied-head-tokens-cross-entropy", "tied-head-pooled-mse"])
def test_one_use_of_a_tied_weight_alone_is_wrong_and_named(name, use):
    class Half(Adapter):
        def blocks(self, asked):
            ios = layer_ios(asked.model, asked.loss, *asked.batches[0])
            inner = super().blocks(asked)["inner"]
            K = kfac(ios["words"])
            half = K.second if use == "embedding" else K.first
            return {"words": LayerBlock(joint=DenseAnswer(half.dense())), "inner": inner}

    found = verdict(Half(), CASES[name], "expand", "cpu")
    assert found.verdict == "wrong"
    assert f"as if the {use} alone had the weight" in found.words


def test_a_tied_weight_is_asked_of_those_who_claim_it():
    case, claimed = CASES["tied-head-tokens-cross-entropy"], Adapter().capabilities()
    assert missing(claimed, case, "expand") == ""
    words = missing(replace(claimed, ties=False), case, "expand")
    assert words == "a weight that layers apply both ways"
    model = network(case.ops, case.build().parameters)
    assert model.head.weight is model.words.weight


def test_queries_keys_and_values_are_one_parameter_where_their_sizes_agree():
    held = {}
    for name in ("multihead-tokens-cross-entropy", "multihead-other-sizes-cross-entropy"):
        case = CASES[name]
        held[name] = held_parameters(case.ops, case.build().parameters)
    one, three = held.values()
    assert one["attention.in_proj_weight"].shape == (12, 4)
    assert [three[f"attention.{x}_proj_weight"].shape[1] for x in "qkv"] == [4, 3, 5]
    assert one["attention.in_proj_bias"].shape == three["attention.in_proj_bias"].shape == (12,)


def test_a_batch_normalisation_is_in_evaluation():
    case = CASES["batch-norm-deep-linear-mse-mean"]
    data = case.build()
    model = network(case.ops, data.parameters)
    before = [buffer.clone() for buffer in model.buffers()]
    check_equal(model(data.X[:1]), model(data.X)[:1])
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.buffers(), strict=True))


def test_a_case_knows_its_family():
    for name, cases in FAMILIES.items():
        assert {family(case) for case in cases} == {name}
        assert all(isinstance(case, Case) for case in cases)
        assert all(layer_ops(case.ops) for case in cases)
