"""What several processes do beside equal steps: DDP, labels, micro-batches, payload, refusals."""

import functools
import itertools
import re

import pytest
import torch

from kfac_scratch import kfac, kfac_over, layer_ios, monte_carlo
from kfac_scratch.approximations.estimators import MovingAverage, weight_of_newest
from kfac_scratch.distributed.packing import leaves
from kfac_scratch.losses import divisor
from tests.distributed.behaviour import (
    CASE,
    DIFFERENT,
    MISTAKES,
    REFUSED,
    SIZE,
    UNEQUAL,
    after_refusals,
    data_set,
    epochs,
    owner_local_defined,
    promoting,
    trained_on,
    work,
)
from tests.distributed.jobs import job
from tests.distributed.runs import LOSSES, SHARDS, Case, alone, flat, shard, train

EXACT = 1e-12
FAR = 1e-3


@functools.cache
def everywhere():
    return job(work, SIZE)


def results(name):
    """What every rank has found."""
    found = [result[name] for result in everywhere()]
    for result in found:
        assert not (isinstance(result, str) and result.startswith("Traceback")), result
    return found


def assert_all_equal(name, expected):
    found = results(name)
    for theta in found:
        assert (theta - expected).abs().max() <= EXACT * expected.abs().max()
        assert torch.equal(theta, found[0])


@pytest.mark.parametrize("shards", ["equal", "unequal"])
@pytest.mark.parametrize("name", ["labels-mean", "labels-sum", "ignored-mean"])
def test_ddp_with_the_joint_loss_is_one_process(name, shards):
    assert_all_equal(f"ddp {name} {shards}", alone(LOSSES[name]))


def test_ddp_is_right_by_itself_for_equal_shards_and_a_mean():
    assert_all_equal("ddp alone labels-mean equal", alone(LOSSES["labels-mean"]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("labels-mean unequal", r"their shards count \[0\.2.*0\.79.*joint_loss"),
        ("labels-sum equal", r"sum reduction needs their sum.*joint_loss"),
        ("labels-sum unequal", r"sum reduction needs their sum.*joint_loss"),
    ],
)
def test_ddp_by_itself_is_refused_where_it_is_wrong(name, words):
    for said in results(f"ddp alone {name}"):
        assert re.search(words, said)


def test_a_forward_pass_around_ddp_is_found():
    for said in results("through the module"):
        assert re.search("DistributedDataParallel has not averaged them: call", said)
    for said in results("behind its back"):
        assert re.search(r"were they averaged by a DistributedDataParallel.*was not given", said)


def test_micro_batches_with_ddp_and_the_joint_loss():
    assert_all_equal("micro-batches with DDP", alone(Case(targets="labels")))


def test_update_curvature_with_ddp_asks_for_no_gradients():
    case = LOSSES["labels-sum"]
    model = case.model()
    optimizer = case.optimizer(model)
    for X, y in itertools.islice(case.batches(), 3):
        optimizer.update_curvature(X, y)
    assert_all_equal("update_curvature with DDP", train(case, model, optimizer))


def test_what_one_rank_alone_cannot_use_is_refused_once_by_all():
    for said, equal in results("one overflow"):
        assert len(said) == 1
        assert re.search(r"Rank \d of 2 refused .*not finite", said[0])
        assert equal


@pytest.mark.parametrize("more", ["equal", "unequal"])
def test_each_batch_of_dp_kfac_has_its_own_share(more):
    """Curvature may get a batch with other shards between observe and step."""
    model, batches = CASE.model(), list(CASE.batches())
    rank = {name: owner for _, owners in results(f"more {more}") for name, owner in owners.items()}
    for name, owner in rank.items():
        state, count = None, 0
        for step in range(3):
            for number, sizes in ((5, SHARDS[SIZE][more]), (step, UNEQUAL)):
                X, y = (t[shard(sizes, owner)] for t in batches[number])
                io = layer_ios(model, CASE.loss(), X, y)[name]
                count += 1
                state = MovingAverage(kfac).update(state, io, weight_of_newest(0.8, count))
        found, _ = results(f"more {more}")[owner]
        for actual, expected in zip(found[name], leaves(state), strict=True):
            assert (actual - expected).abs().max() <= EXACT * expected.abs().max()


def test_an_inverse_that_cannot_be_sent_is_refused_by_all():
    for said in results("unsendable"):
        assert re.search(r"Rank \d of 2 refused in 'step' of step 0.*Local", said), said


@pytest.mark.parametrize("workers", [0.0, 1.0])
def test_inverses_of_higher_precision_are_as_in_one_process(workers):
    expected = promoting(0, 1, workers)
    for theta in results(f"promoting {workers}"):
        assert (theta - expected).abs().max() <= 1e-4 * expected.abs().max()  # float32
        assert torch.equal(theta, results(f"promoting {workers}")[0])


def test_a_record_of_dp_kfac_on_one_rank_is_refused_at_once():
    for said in results("recorder of one"):
        assert re.search("record: True, but rank 1 has record: False", said)


def test_parameters_that_are_spread_over_ranks_are_refused_by_name():
    for said in results("fully sharded"):
        assert re.search(r"'0.weight' is a DTensor.*fully_shard.*DistributedDataParallel", said)


def test_several_processes_that_do_not_come_together_are_refused():
    for said in results("not distributed"):
        assert re.search(r"There are 2 processes.*call kfac_scratch\.distribute\(optimizer\)", said)


def test_every_rank_draws_labels_of_its_own():
    """One process that draws the labels of each shard from the generator of its rank."""
    generators = [torch.Generator().manual_seed(5 + rank) for rank in range(SIZE)]

    def fisher(loss, f, y):
        parts = [shard(UNEQUAL, rank) for rank in range(SIZE)]
        terms = [divisor(loss, f[part], y[part]) for part in parts]
        vectors = [
            (count / sum(terms)) ** 0.5 * monte_carlo(2, generator)(loss, f[part], y[part])[:]
            for generator, part, count in zip(generators, parts, terms, strict=True)
        ]
        return torch.cat(vectors, dim=1)

    model = CASE.model()
    assert_all_equal("own labels", train(CASE, model, CASE.optimizer(model, fisher=fisher)))


@pytest.mark.parametrize("source", ["a generator", "PyTorch"])
def test_the_default_labels_differ_between_ranks_with_one_seed(source):
    numbers = [number for number, _ in results(f"streams of {source}")]
    assert len(set(numbers)) == SIZE
    assert all(kept for _, kept in results(f"streams of {source}"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_micro_batches_on_every_rank_are_one_batch(reduction):
    expected = alone(Case(targets="labels", reduction=reduction))
    assert_all_equal(f"micro-batches {reduction}", expected)


def test_epochs_of_a_distributed_sampler():
    ranks = [list(epochs(rank, SIZE)) for rank in range(SIZE)]
    union = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
    assert len({len(X) for X, _ in union}) == 2  # the last batch of an epoch is smaller
    model = CASE.model()
    assert_all_equal("epochs", trained_on(model, CASE.optimizer(model), union))


@pytest.mark.parametrize("name", ["record", "DP-KFAC's record"])
def test_every_rank_records_the_same(name):
    first, *others = results(name)
    assert len(first) == 10
    assert all(rows == first for rows in others)


def test_the_record_is_that_of_one_process():
    rows = []
    model = CASE.model()
    train(CASE, model, CASE.optimizer(model, record=rows.append))
    for row, expected in zip(results("record")[0], rows, strict=True):
        assert row == pytest.approx(expected, rel=1e-10)


def test_a_parameter_without_a_gradient_on_some_ranks():
    """Elsewhere its gradient counts; a parameter without any stays as it is."""
    model = CASE.model()
    optimizer = CASE.optimizer(model)
    for i, (X, y) in enumerate(CASE.batches()):
        optimizer.zero_grad()
        part = shard(UNEQUAL, 0)
        CASE.loss()(model(X[part]), y[part]).backward()
        share = (y[part] != -100).sum() / (y != -100).sum()
        only_here = [share * p.grad for p in (model[2].weight, model[2].bias)]
        optimizer.zero_grad()
        CASE.loss()(model(X), y).backward()
        optimizer.observe(X, y)
        for p, grad in zip((model[2].weight, model[2].bias), only_here, strict=True):
            p.grad = None if i % 3 == 2 else grad
        optimizer.step()
    assert_all_equal("partly used", flat(model))


def test_freezing_and_unfreezing_on_all_ranks():
    model = CASE.model()
    optimizer = CASE.optimizer(model)
    for flag in (True, False, True):
        model[2].requires_grad_(flag)
        train(CASE, model, optimizer, steps=3)
    assert_all_equal("frozen meanwhile", flat(model))


def test_a_copy_can_be_distributed():
    assert_all_equal("copied", alone(CASE))


def test_update_curvature_takes_the_batches_of_all_ranks():
    model = CASE.model()
    optimizer = CASE.optimizer(model)
    for X, y in itertools.islice(CASE.batches(), 3):
        optimizer.update_curvature(X, y)
    assert_all_equal("update_curvature", train(CASE, model, optimizer))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shards", ["equal", "unequal"])
def test_dp_kfac_is_its_own_estimator(shards, reduction):
    expected = owner_local_defined(SHARDS[SIZE][shards], reduction)
    assert_all_equal(f"DP-KFAC {shards} {reduction}", expected)
    joint = alone(Case(targets="labels", reduction=reduction))
    assert (expected - joint).abs().max() > FAR * joint.abs().max()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("net", ["dense", "words", "tied"])
def test_kfac_of_the_data_of_all_ranks(net, reduction):
    model, loss, parts = data_set(net, reduction)
    expected = kfac_over(model, loss, [batch for part in parts for batch in part])
    for found in results(f"over data {net} {reduction}"):
        assert set(found) == set(expected)
        for name, M in expected.items():
            for actual, right in zip(found[name], leaves(M), strict=True):
                assert (actual - right).abs().max() <= EXACT * right.abs().max()


def test_a_rank_without_data_is_named():
    for said in results("no data"):
        assert re.search(r"Rank 1 of 2 refused in 'kfac_over_ranks'.*yielded no batch", said)


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_a_mistake_is_found(kind):
    expected = alone(MISTAKES[kind], steps=4)
    for theta in results(kind.__name__):
        assert (theta - expected).abs().max() > FAR * expected.abs().max()


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_difference_between_ranks_is_named_at_once(name):
    what = {
        "names": "parameter 'p.weight'",
        "width": "parameter '0.weight'",
        "dtype": "float32",
        "value": "the sum of '0.weight'",
        "frozen": "parameter '2.bias'",
        "period": "inverse_every: 3",
        "lr": "'lr': 0.1",
        "damping": "'damping': 0.1",
        "loss": "loss: CrossEntropyLoss",
        "control": "controls: .*1e-08.*2e-08",
        "reduction": "loss.reduction: mean",
        "class weights": r"loss.weight: \(1.0, 1.0, 1.0, 1.0\), but rank 1",
        "approximation": "approximation=other_kfac",
    }
    first, *others = [found[name] for found in results("differences")]
    assert re.search(rf"The ranks differ in .*rank 0 has.*{what[name]}", first)
    assert all(said == first for said in others)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_is_everybodys_and_changes_nothing(name):
    for found, _, _ in results("refusals"):
        said, kept = found[name]
        assert re.search(REFUSED[name], said), said
        assert kept


def test_the_loop_goes_on_after_refusals():
    expected = after_refusals()
    for _, equal, theta in results("refusals"):
        assert equal
        assert (theta - expected).abs().max() <= EXACT * expected.abs().max()
