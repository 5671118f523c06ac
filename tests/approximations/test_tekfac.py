import pytest
import torch

from kfac_scratch import LayerIO, ekfac, layer_ios
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.curvature import diagonal_blocks, ggn
from tests.approximations.test_tkfac import (
    common_size,
    frobenius,
    opposite_sizes,
    product_measure,
    random_io,
    same_inputs_up_to_sign,
    with_data_of_no_weight,
)
from tests.cases import (
    CONSTANT_HESSIAN,
    CONV_PER_LOCATION,
    DEEP_LINEAR,
    NONLINEAR,
    ONE_DATUM,
    one_position,
)
from tests.laws import check_differs, check_equal, check_matrix, check_spectrum

SHARED = pytest.mark.parametrize("S", [1, 4])


@SHARED
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_diagonal_of_the_block_in_the_basis_of_tkfac(S, dtype, device):
    io = random_io(device, S, dtype=dtype)
    M, T, F = tekfac(io), tkfac(io), io.block()
    U = torch.kron(M.QB.contiguous(), M.QA.contiguous())
    check_equal(M.scale.flatten(), (U.T @ F @ U).diagonal())
    for Q, factor in ((M.QA, T.A), (M.QB, T.B)):
        rotated = Q.T @ factor @ Q
        check_equal(rotated, rotated.diagonal().diag())


@SHARED
def test_tekfacs_squared_error_and_trace(S, device):
    io = random_io(device, S)
    M, F = tekfac(io), io.block()
    check_equal((F - M.dense()).square().sum(), F.square().sum() - M.scale.square().sum())
    check_equal(M.trace(), F.trace())


@SHARED
def test_tekfac_is_never_farther_than_tkfac(S, device):
    for seed in range(200):
        torch.manual_seed(seed)
        io = common_size(seed, device) if S == 1 and seed % 2 else random_io(device, S)
        F = io.block()
        assert frobenius(tekfac(io), F) < frobenius(tkfac(io), F)


def test_nearer_than_ekfac_if_some_data_have_no_weight(device):
    io = with_data_of_no_weight(device)
    check_equal(tekfac(io).dense(), io.block())
    check_differs(ekfac(io).dense(), io.block(), by=0.1)


def balanced_but_for_one_datum(device):
    """Inputs along two diagonals, where `A` has its eigenvectors and TKFAC's `A` nearly has none.

    Data along the first diagonal are twice as many, with vectors of half the square. A small datum
    along the first axis then decides on TKFAC's eigenvectors.
    """
    a = torch.tensor([[1.0, 1], [1, 1], [1, -1], [0.1, 0]])
    g = torch.tensor([[1.0, 0], [1, 0], [0, 2**0.5], [1, 0]])
    return LayerIO(a[:, None].to(device), g[None, :, None].to(device))


def test_farther_than_ekfac_if_the_weights_hide_the_basis(device):
    io = balanced_but_for_one_datum(device)
    F = io.block()
    assert frobenius(tekfac(io), F) > 5 * frobenius(ekfac(io), F)


@pytest.mark.parametrize("case", DEEP_LINEAR + ONE_DATUM + CONSTANT_HESSIAN, ids=str)
def test_tekfac_is_exact_where_kfac_is(case, device):
    problem = case.build(device)
    exact = diagonal_blocks(problem[0], ggn(*problem))
    for name, io in layer_ios(*problem).items():
        check_equal(tekfac(io).dense(), exact[name])


@pytest.mark.parametrize(
    "make", [product_measure, same_inputs_up_to_sign, lambda device: opposite_sizes(device)[0]]
)
def test_tekfac_is_exact_where_tkfac_is(make, device):
    io = make(device)
    check_equal(tekfac(io).dense(), io.block())


@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_not_exact_on_nonlinear_nets(case, device):
    io = next(iter(layer_ios(*case.build(device)).values()))
    check_differs(tekfac(io).dense(), io.block())


@pytest.mark.parametrize("view", [lambda io: io, one_position])
@pytest.mark.parametrize("case", [NONLINEAR[0], CONV_PER_LOCATION[10]], ids=str)
def test_obeys_the_laws_of_matrices(case, view, device):
    for io in layer_ios(*case.build(device)).values():
        M = tekfac(view(io))
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))
        check_spectrum(M)


def test_a_batch_without_gradients_gives_zero(device):
    io = random_io(device)
    M = tekfac(LayerIO(io.a, 0 * io.g))
    assert (M.dense() == 0).all()
