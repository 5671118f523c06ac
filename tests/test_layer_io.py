import pytest
import torch
from jaxtyping import TypeCheckError

from kfac_scratch import LayerIO, OneHot
from kfac_scratch.layer_io import concatenate
from tests.laws import check_differs, check_equal

N, S, V, D_IN, D_OUT = 5, 3, 2, 7, 4


def example(device, dtype=torch.float64):
    a = torch.randn(N, S, D_IN, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(V, N, S, D_OUT, device=device, dtype=dtype))


def test_gradients_are_sums_of_outer_products(device):
    io = example(device)
    G = io.gradients()
    assert G.shape == (V, N, D_OUT, D_IN)
    check_equal(G[1, 2], sum(torch.outer(io.g[1, 2, s], io.a[2, s]) for s in range(S)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_block_is_the_sum_of_outer_products_of_gradients(device, dtype):
    io = example(device, dtype)
    G = io.gradients().flatten(2).flatten(0, 1)
    check_equal(io.block(), torch.einsum("ki,kj->ij", G, G))


def test_reduced_averages_inputs_and_sums_vectors(device):
    io = example(device)
    assert io.reduced().a.shape == (N, 1, D_IN)
    assert io.reduced().g.shape == (V, N, 1, D_OUT)
    check_equal(io.reduced().a[:, 0], io.a.mean(1))
    check_equal(io.reduced().g[:, :, 0], io.g.sum(2))
    check_differs(io.reduced().block(), io.block())


def test_reducing_twice_changes_nothing(device):
    once = example(device).reduced()
    check_equal(once.reduced().a, once.a)
    check_equal(once.reduced().g, once.g)
    assert once.reduced().positions == once.positions == S


def test_reduction_is_exact_if_all_positions_agree(device):
    io = example(device)
    same_a = LayerIO(io.a[:, :1].expand(N, S, D_IN), io.g)
    same_g = LayerIO(io.a, io.g[:, :, :1].expand(V, N, S, D_OUT))
    check_equal(same_a.reduced().block(), same_a.block())
    check_equal(same_g.reduced().block(), same_g.block())


def test_a_batch_is_its_parts(device):
    io = example(device)
    parts = [LayerIO(io.a[s], io.g[:, s]) for s in (slice(2), slice(2, N))]
    check_equal(concatenate(parts, [1.0] * len(parts)).a, io.a)
    check_equal(concatenate(parts, [1.0] * len(parts)).g, io.g)
    check_equal(parts[0].block() + parts[1].block(), io.block())


@pytest.mark.long  # annotations are not checked in the quick tier
def test_shapes_must_fit():
    with pytest.raises(TypeCheckError):
        LayerIO(torch.randn(N, S, D_IN), torch.randn(V, N + 1, S, D_OUT))


def test_joined_batches_have_the_weighted_sum_of_their_blocks():
    """Also with other numbers of vectors; a share of 1 for a mean loss would count it twice."""
    ios = [LayerIO(torch.randn(N, 3, 4), torch.randn(V, N, 3, 2)) for N, V in ((2, 5), (3, 2))]
    joined = concatenate(ios, [0.3, 0.7])
    check_equal(joined.block(), 0.3 * ios[0].block() + 0.7 * ios[1].block())
    check_differs(concatenate(ios, [1.0, 1.0]).block(), joined.block())


def test_batches_that_do_not_go_together_are_refused():
    ios = [LayerIO(torch.randn(2, S, 4), torch.randn(1, 2, S, 2)) for S in (3, 5)]
    with pytest.raises(ValueError, match=r"2 batches with 2 shares and \[3, 5\] positions"):
        concatenate(ios, [1.0, 1.0])
    with pytest.raises(ValueError, match="1 batches with 2 shares"):
        concatenate(ios[:1], [1.0, 1.0])


def test_products_with_the_gradients_are_those_of_the_exact_block(device):
    """`combination` after `inner_products` is the block, and neither forms a gradient."""
    io = example(device)
    X = torch.randn(2, D_OUT, D_IN, device=device)
    products = io.inner_products(X)
    check_equal(products, torch.einsum("vnoi,boi->bvn", io.gradients(), X))
    check_equal(io.combination(products), (X.flatten(1) @ io.block()).reshape(X.shape))


def test_positions_that_are_not_counted_must_be_zero(device):
    io, counted = example(device), torch.ones(N, S, dtype=torch.bool, device=device)
    counted[2, 1] = False
    a, g = io.a * counted.unsqueeze(-1), io.g * counted.unsqueeze(-1)
    assert LayerIO(a, g, counted=counted).rows == N * S - 1
    words = torch.ones(N, S, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="row of a at position 1 of sample 2 is not zero"):
        LayerIO(io.a, g, counted=counted)
    with pytest.raises(ValueError, match="row of a at position 1 of sample 2 is not zero"):
        LayerIO(OneHot(words, D_IN, a.dtype), g, counted=counted)
    with pytest.raises(ValueError, match="vector of g at position 1 of sample 2 is not zero"):
        LayerIO(a, io.g, counted=counted)
    with pytest.raises((ValueError, TypeCheckError)):  # whether annotations are checked or not
        LayerIO(a, g, counted=counted[:, :1])
