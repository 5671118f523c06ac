"""Who does what, and what is packed: pure functions, without processes."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_scratch.approximations.brand import Brand
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.distributed.packing import (
    buckets,
    from_triangle,
    is_symmetric,
    leaves,
    through,
    upper_triangle,
    with_leaves,
)
from kfac_scratch.distributed.sharing import assignment, columns, gradient_workers, grid_rows
from kfac_scratch.layer_io import LayerIO

COSTS = st.lists(st.integers(1, 50), min_size=1, max_size=7)


def named(costs):
    return {f"layer {i}": float(cost) for i, cost in enumerate(costs)}


def loads(costs, owners, size):
    return [sum(costs[n] for n in costs if owners[n] == rank) for rank in range(size)]


@settings(deadline=None)  # a busy machine is no fault
@given(COSTS, st.integers(1, 4))
def test_every_layer_has_an_owner_and_the_busiest_one_is_near_the_optimum(costs, size):
    costs = named(costs)
    owners = assignment(costs, size)
    assert set(owners) == set(costs)
    assert owners == assignment(dict(costs), size)
    choices = itertools.product(range(size), repeat=len(costs))
    best = min(max(loads(costs, dict(zip(costs, c, strict=True)), size)) for c in choices)
    assert max(loads(costs, owners, size)) <= (4 / 3 - 1 / (3 * size)) * best + 1e-9


@settings(deadline=None)  # a busy machine is no fault
@given(COSTS, COSTS, st.integers(1, 4))
def test_owners_stay_when_layers_appear(first, later, size):
    before = assignment(named(first), size)
    after = assignment(named(first + later), size, before)
    assert {name: after[name] for name in before} == before
    assert set(after) == set(named(first + later))


def test_ties_go_to_the_earlier_layer_and_the_lower_rank():
    assert assignment({"a": 1.0, "b": 1.0, "c": 1.0}, 2) == {"a": 0, "b": 1, "c": 0}


@pytest.mark.parametrize("size", [1, 2, 4, 6, 12])
def test_a_grid_has_every_rank_once_in_its_columns_and_once_in_its_rows(size):
    for rows in (m for m in range(1, size + 1) if size % m == 0):
        cols, across = columns(size, rows), grid_rows(size, rows)
        for parts in (cols, across):
            assert sorted(itertools.chain(*parts)) == list(range(size))
        assert {len(column) for column in cols} == {rows}
        assert all(len(set(column) & set(row)) == 1 for column in cols for row in across)


@pytest.mark.parametrize(
    ("workers", "size", "rows"), [(0.0, 4, 1), (0.25, 4, 1), (0.5, 4, 2), (1.0, 4, 4), (1.0, 3, 3)]
)
def test_a_share_of_the_ranks_holds_each_inverse(workers, size, rows):
    assert gradient_workers(workers, size) == rows


@pytest.mark.parametrize(
    ("workers", "size", "words"),
    [
        (1.5, 4, r"\[0, 1\], got 1.5"),
        (-0.1, 4, r"\[0, 1\]"),
        (0.75, 4, r"Shares that do: 0.25, 0.5"),
    ],
)
def test_a_share_that_fits_no_grid_is_refused(workers, size, words):
    with pytest.raises(ValueError, match=words):
        gradient_workers(workers, size)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_half_a_symmetric_matrix_is_all_of_it(d):
    M = torch.randn(d, d)
    M = M + M.mT
    assert is_symmetric(M)
    half = upper_triangle(M)
    assert len(half) == d * (d + 1) // 2
    assert torch.equal(from_triangle(half, d), M)
    assert not is_symmetric(torch.randn(3, 3))
    assert not is_symmetric(torch.randn(3, 2))


@settings(deadline=None)  # a busy machine is no fault
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=9), st.integers(1, 80))
def test_tensors_come_out_as_they_went_in(sizes, limit):
    dtypes = {True: torch.float64, False: torch.float32}
    tensors = [torch.randn(size, 2, dtype=dtypes[wide]) for size, wide in sizes]
    flats = []
    doubled = through(tensors, lambda flat: flats.append(flat.mul_(2)), limit)
    assert all(torch.equal(t, 2 * s) for s, t in zip(tensors, doubled, strict=True))
    assert all(t.dtype == s.dtype for s, t in zip(tensors, doubled, strict=True))
    assert sum(flat.numel() for flat in flats) == sum(t.numel() for t in tensors)
    for bucket in buckets(tensors, limit):
        assert len(bucket) == 1 or sum(tensors[i].nbytes for i in bucket) <= limit


@pytest.mark.parametrize("make", [kfac, lambda io: Brand(2).update(None, io, 1.0)])
def test_a_matrix_is_its_tensors_and_its_form(make):
    io = LayerIO(torch.randn(6, 1, 4), torch.randn(1, 6, 1, 3))
    M = make(io)
    meta = with_leaves(M, iter([t.to("meta") for t in leaves(M)]))
    again = with_leaves(meta, iter(leaves(M)))
    V = torch.randn(3, 4)
    assert torch.equal(again @ V, M @ V)
