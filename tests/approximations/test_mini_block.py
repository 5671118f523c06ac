import pytest
import torch
from torch.nn import CrossEntropyLoss

from kfac_scratch import Kronecker, LayerIO, ekfac, foof, kfac, layer_ios
from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.approximations.mini_block import (
    mini_block,
    mini_block_filters,
    mini_block_rows,
    mini_block_shared,
)
from kfac_scratch.curvature import diagonal_blocks, ggn
from kfac_scratch.layer_io import concatenate
from tests.cases import CONV_PER_LOCATION, NONLINEAR, one_position
from tests.laws import check_differs, check_equal, check_matrix


def random_io(device, S=1, n=7, d_in=5, dtype=torch.float64):
    a = torch.randn(n, S, d_in, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(2, n, S, 3, device=device, dtype=dtype))


def on_the_diagonal(F, size):
    """What a matrix has in square blocks of one size along its diagonal."""
    number = torch.arange(len(F), device=F.device) // size
    return F.where(number == number.unsqueeze(1), 0.0)


def distance(M, io):
    return (M - io.block()).norm()


SHARED = pytest.mark.parametrize("S", [1, 4])
VIEWS = pytest.mark.parametrize("view", [lambda io: io, one_position])
APPROXIMATIONS = (mini_block, mini_block_rows, mini_block_shared)


@SHARED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_are_those_on_the_diagonal(S, dtype, device):
    """By rows of `W`, because `vec` stacks rows."""
    io = random_io(device, S, dtype=dtype)
    check_equal(mini_block(io).dense(), on_the_diagonal(io.block(), 5))


@SHARED
def test_block_of_a_neuron_by_hand(S, device):
    io = random_io(device, S)
    F = torch.zeros(5, 5, device=device)
    for v in range(2):
        for n in range(7):
            row = io.g[v, n, :, 1] @ io.a[n]
            F += torch.outer(row, row)
    check_equal(mini_block(io).blocks[1], F)


@pytest.mark.parametrize("case", NONLINEAR + CONV_PER_LOCATION[18:20], ids=str)
def test_blocks_are_those_of_the_ggn(case, device):
    problem = case.build(device)
    exact = diagonal_blocks(problem[0], ggn(*problem))
    for name, io in layer_ios(*problem).items():
        check_equal(mini_block(io).dense(), on_the_diagonal(exact[name], io.a.shape[-1]))


def test_positions_are_summed_before_the_product(device):
    io = random_io(device, 4)
    flat = LayerIO(io.a.reshape(28, 1, 5), io.g.reshape(2, 28, 1, 3))
    check_differs(mini_block(io).dense(), mini_block(flat).dense())


# ---- where it is exact ------------------------------------------------------------------------


@SHARED
def test_mini_blocks_are_exact_for_one_neuron(S, device):
    io = random_io(device, S)
    io = LayerIO(io.a, io.g[..., :1])
    check_equal(mini_block(io).dense(), io.block())
    check_equal(mini_block_shared(io).dense(), io.block())


@SHARED
def test_exact_if_no_datum_reaches_two_neurons(S, device):
    io = random_io(device, S)
    mine = torch.arange(3, device=device) == torch.arange(7, device=device).unsqueeze(1) % 3
    io = LayerIO(io.a, io.g * mine.unsqueeze(1))
    check_equal(mini_block(io).dense(), io.block())
    check_differs(kfac(io).dense(), io.block())


@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_exact_on_the_last_layer_unless_the_loss_mixes_outputs(case, device):
    """The Hessians of squared error and BCE are diagonal, that of cross-entropy is not."""
    problem = case.build(device)
    exact = diagonal_blocks(problem[0], ggn(*problem))
    hidden, last = layer_ios(*problem).items()
    check_differs(mini_block(hidden[1]).dense(), exact[hidden[0]])
    check = check_differs if case.loss is CrossEntropyLoss else check_equal
    check(mini_block(last[1]).dense(), exact[last[0]])


def test_equals_kfac_if_inputs_tell_nothing_about_uncorrelated_vectors(device):
    """All pairs of an input and a vector; the vectors' second moments are diagonal."""
    a = torch.randn(4, 1, 5, device=device).repeat_interleave(3, 0)
    io = LayerIO(
        a, torch.tensor([1.0, 2, 3], device=device).diag()[None, :, None].repeat(1, 4, 1, 1)
    )
    check_equal(mini_block(io).dense(), io.block())
    check_equal(mini_block(io).dense(), kfac(io).dense())


@SHARED
def test_mini_blocks_of_several_neurons_are_not_exact(S, device):
    io = random_io(device, S)
    for approximation in APPROXIMATIONS:
        check_differs(approximation(io).dense(), io.block())


# ---- how far it is ----------------------------------------------------------------------------


@SHARED
def test_mini_blocks_squared_error_and_trace(S, device):
    io = random_io(device, S)
    F, M = io.block(), mini_block(io)
    check_equal(distance(M.dense(), io) ** 2, F.norm() ** 2 - M.blocks.norm() ** 2)
    check_equal(M.trace(), F.trace())
    check_equal(mini_block_rows(io).trace(), F.trace())
    check_equal(mini_block_shared(io).trace(), F.trace())
    check_differs(kfac(io).trace(), F.trace())


@SHARED
@pytest.mark.parametrize("seed", range(20))
def test_nearer_than_whatever_does_not_mix_neurons(seed, S, device):
    torch.manual_seed(seed)
    io = random_io(device, S)
    F, M = io.block(), mini_block(io).dense()
    rivals = [F.diagonal().diag(), on_the_diagonal(kfac(io).dense(), 5)]
    rivals += [mini_block_shared(io).dense(), foof(io).dense()]
    rivals += [M + 0.01 * on_the_diagonal(torch.randn_like(F), 5)]
    assert all(distance(M, io) < distance(rival, io) for rival in rivals)


def test_neither_kfac_nor_mini_blocks_are_always_nearer(device):
    nearer = 0
    for seed in range(100):
        torch.manual_seed(seed)
        io = random_io(device)
        nearer += int(distance(mini_block(io).dense(), io) < distance(kfac(io).dense(), io))
    assert 0 < nearer < 100


@SHARED
@pytest.mark.parametrize("seed", range(20))
def test_shared_is_nearest_of_its_form(seed, S, device):
    torch.manual_seed(seed)
    io = random_io(device, S)
    M = mini_block_shared(io)
    noise = torch.randn_like(M.A)
    for A in (M.A + 0.01 * (noise + noise.T), 1.01 * M.A, foof(io).A):
        assert distance(M.dense(), io) < distance(Kronecker(A, M.B).dense(), io)


# ---- relatives --------------------------------------------------------------------------------


@SHARED
def test_shared_is_the_mean_of_all_neurons_blocks(S, device):
    io = random_io(device, S)
    check_equal(mini_block_shared(io).A, mini_block(io).blocks.mean(0))
    check_equal(mini_block_shared(io).B, torch.eye(3, device=device))


@SHARED
def test_shared_is_one_side_of_tkfac(S, device):
    """TKFAC is `B ⊗ A / tr` with `A = E[G^T G]`: the same `A`, with `I` for the other factor."""
    io = random_io(device, S)
    A = torch.einsum("vnoi,vnoj->ij", io.gradients(), io.gradients())
    check_equal(3 * mini_block_shared(io).A, A)


def test_shared_is_foof_if_all_vectors_are_of_one_size(device):
    io = random_io(device)
    unit = LayerIO(io.a, io.g / io.g.norm(dim=-1, keepdim=True))
    shared, A = mini_block_shared(unit).A, foof(unit).A
    check_equal(shared / shared.trace(), A / A.trace())
    check_differs(mini_block_shared(io).A / mini_block_shared(io).A.trace(), A / A.trace())


@SHARED
def test_rows_give_the_same_matrix(S, device):
    io = random_io(device, S)
    M, V = mini_block_rows(io), torch.randn(4, 3, 5, device=device)
    check_equal(M.dense(), mini_block(io).dense())
    check_equal(M.diagonal(), mini_block(io).diagonal())
    check_equal(M @ V, mini_block(io) @ V)
    check_equal(M.inverse(0.1) @ V, mini_block(io).inverse(0.1) @ V)


def test_rows_need_one_small_system_per_neuron(device):
    """Of size N with one position, whatever the number of vectors and of inputs; V N otherwise."""
    assert mini_block_rows(random_io(device, 1, d_in=50)).inverse(0.1).L.shape == (3, 7, 7)
    assert mini_block_rows(random_io(device, 4, d_in=50)).inverse(0.1).L.shape == (3, 14, 14)


def test_averages_over_batches_are_those_of_all_data(device):
    first, second = random_io(device, 4), random_io(device, 4)
    both = concatenate([first, second], [1.0, 1.0])
    for approximation in (mini_block, mini_block_shared):
        estimator = MovingAverage(approximation)
        M = estimator.update(estimator.update(None, first, 1.0), second, 0.5)
        check_equal(2 * M.dense(), approximation(both).dense())


def test_rows_have_no_average(device):
    """A mean of rows is no rows of a mean: estimators refuse, instead of being wrong."""
    with pytest.raises(TypeError, match="BlocksByRows has no method mixed"):
        MovingAverage(mini_block_rows).update(None, random_io(device), 1.0)


# ---- filters of a convolution -----------------------------------------------------------------


@pytest.mark.parametrize("case", CONV_PER_LOCATION[:10], ids=str)
def test_blocks_of_filters(case, device):
    """Kernels of one, two and three axes, strides, padding, dilation, with and without bias."""
    problem = case.build(device)
    (layer,) = [m for m in problem[0].modules() if hasattr(m, "kernel_size")]
    (io,) = layer_ios(*problem).values()
    size, d_in = layer.weight[0, 0].numel(), io.a.shape[-1]
    F, M = io.block(), mini_block_filters(size)(io)
    piece = torch.arange(d_in, device=device) // size
    piece = torch.cat([piece + 1000 * o for o in range(io.g.shape[-1])])
    check_equal(M.dense(), F.where(piece == piece.unsqueeze(1), 0.0))
    check_equal(M.trace(), F.trace())
    assert M.filters.blocks.shape == (d_in // size * io.g.shape[-1], size, size)
    assert (M.bias.scale.shape[-1] == 0) == (layer.bias is None)


def test_filters_of_one_channel_and_all_weights(device):
    io = random_io(device, 4)
    check_equal(mini_block_filters(5)(io).dense(), mini_block(io).dense())
    check_equal(mini_block_filters(1)(io).dense(), io.block().diagonal().diag())


@pytest.mark.parametrize("size", [0, -2, 3, 6])
def test_filters_that_do_not_fit_are_refused(size, device):
    with pytest.raises(ValueError, match="Rows of 5 weights are not filters"):
        mini_block_filters(size)(random_io(device))


# ---- laws and edges ---------------------------------------------------------------------------


@VIEWS
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
def test_obeys_the_laws_of_matrices(case, approximation, view, device):
    for io in layer_ios(*case.build(device)).values():
        M = approximation(view(io))
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))
        check_equal(M.trace(), M.dense().trace())
        check_equal(M.diagonal(), M.dense().diagonal())


@VIEWS
def test_filters_obey_the_laws_of_matrices(view, device):
    (io,) = layer_ios(*CONV_PER_LOCATION[10].build(device)).values()
    check_matrix(mini_block_filters(6)(view(io)), (io.g.shape[-1], io.a.shape[-1]))


@SHARED
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_mini_blocks_in_float32(approximation, S, device):
    check_matrix(approximation(random_io(device, S, dtype=torch.float32)), (3, 5))


@SHARED
def test_mini_blocks_on_the_smallest_layers(S, device):
    """One datum, one input, dead neurons, repeated data: right, and invertible with damping."""
    io = random_io(device, S)
    dead = LayerIO(io.a, io.g * torch.tensor([1.0, 0, 1], device=device))
    repeated = LayerIO(io.a[:1].expand(7, -1, -1), io.g)
    one_input = LayerIO(io.a[..., :1], io.g)
    one_datum = LayerIO(io.a[:1], io.g[:, :1])
    for edge in (dead, repeated, one_input, one_datum):
        M = mini_block(edge)
        check_equal(M.dense(), on_the_diagonal(edge.block(), edge.a.shape[-1]))
        for approximation in APPROXIMATIONS:
            check_matrix(approximation(edge), (3, edge.a.shape[-1]))


def test_zero_vectors_leave_the_gradient_over_the_damping(device):
    io = random_io(device)
    zero, V = LayerIO(io.a, torch.zeros_like(io.g)), torch.randn(3, 5, device=device)
    for approximation in APPROXIMATIONS:
        check_equal(approximation(zero).inverse(0.5) @ V, 2 * V)


def test_singular_blocks_need_damping(device):
    with pytest.raises(ValueError, match="use a larger damping"):
        mini_block(random_io(device, n=2)).inverse(0.0)
    with pytest.raises(ValueError, match="positive damping, got 0"):
        mini_block_rows(random_io(device)).inverse(0.0)


def test_inputs_stay_as_they_are(device):
    io = random_io(device, 4)
    a, g = io.a.clone(), io.g.clone()
    for approximation in (*APPROXIMATIONS, mini_block_filters(2)):
        approximation(io).inverse(0.1) @ torch.ones(3, 5, device=device)
    assert torch.equal(io.a, a)
    assert torch.equal(io.g, g)


def test_a_neuron_is_preconditioned_by_itself(device):
    """The step of one neuron does not depend on the gradient of another; EKFAC's does."""
    io = random_io(device)
    V = torch.randn(3, 5, device=device)
    other = V.clone()
    other[0] += 1
    P, E = mini_block(io).inverse(0.1), ekfac(io).inverse(0.1)
    check_equal((P @ V)[1:], (P @ other)[1:])
    check_differs((E @ V)[1:], (E @ other)[1:])
