"""KFAC: where it is exact, where it is not, and over a whole data loader."""

import pytest
import torch

from kfac_scratch import (
    LayerIO,
    empirical,
    foof,
    kfac,
    layer_ios,
    type2,
)
from kfac_scratch.curvature import diagonal_blocks, empirical_fisher, ggn
from tests.cases import (
    CONSTANT_HESSIAN,
    CONV_GLOBAL_POOL,
    CONV_PER_LOCATION,
    DEEP_LINEAR,
    DEEP_LINEAR_CROSS_ENTROPY,
    EXPAND_SETTING,
    LAST_LAYER_MSE,
    MIXED_AFTER_POOL,
    MIXED_BEFORE_POOL,
    NONLINEAR,
    ONE_DATUM,
    REDUCE_SETTING,
    SEVERAL_DATA,
    SHARED_CROSS_ENTROPY_ONE_DATUM,
    ZERO_PADDED_ABOVE,
    Case,
)
from tests.laws import check_differs, check_equal, check_matrix, check_spectrum
from tests.thinned import thinned

DTYPES = [torch.float64, torch.float32]


def expand(io: LayerIO):
    return kfac(io)


def reduce(io: LayerIO):
    return kfac(io.reduced())


BOTH = [expand, reduce]


def pairs(case: Case, flavour, device="cpu", dtype=torch.float64, fisher=type2, exact=ggn):
    """KFAC and the exact block of every layer that the theorem speaks of."""
    problem = case.build(device, dtype)
    truth = diagonal_blocks(problem[0], exact(*problem))
    ios = layer_ios(*problem, fisher)
    assert set(ios) == set(truth)
    names = [n for n in ios if case.layers is None or n in case.layers]
    assert names
    return [(flavour(ios[name]).dense(), truth[name]) for name in names]


def check_exact(case: Case, flavour, *args, **kwargs) -> None:
    for approximation, exact in pairs(case, flavour, *args, **kwargs):
        check_equal(approximation, exact)


def check_not_exact(case: Case, flavour, *args, **kwargs) -> None:
    for approximation, exact in pairs(case, flavour, *args, **kwargs):
        check_differs(approximation, exact)


# ---- theorems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", DEEP_LINEAR, ids=str)
def test_exact_on_deep_linear_nets_with_squared_error(case, dtype, flavour, device):
    check_exact(case, flavour, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", thinned(EXPAND_SETTING, 2), ids=str)
def test_expand_exact_in_the_expand_setting(case, dtype, device):
    check_exact(case, expand, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", thinned(REDUCE_SETTING, 2), ids=str)
def test_reduce_exact_in_the_reduce_setting(case, dtype, device):
    check_exact(case, reduce, device, dtype)


@pytest.mark.parametrize("case", MIXED_BEFORE_POOL, ids=str)
def test_before_a_pool_reduce_is_exact_and_expand_is_not(case, device):
    check_exact(case, reduce, device)
    check_not_exact(case, expand, device)
    ios = layer_ios(*case.build(device))
    for name in case.layers:  # what expand misses is in A: the products of different positions
        S = ios[name].a.shape[1]
        check_equal(S * reduce(ios[name]).A[-1, -1], S * expand(ios[name]).A[-1, -1])
        check_equal(reduce(ios[name]).B, S * expand(ios[name]).B)
        check_differs(reduce(ios[name]).A, expand(ios[name]).A)


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("case", MIXED_AFTER_POOL, ids=str)
def test_after_a_pool_both_are_exact(case, flavour, device):
    check_exact(case, flavour, device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", thinned(CONV_PER_LOCATION), ids=str)
def test_expand_exact_on_the_last_conv_with_squared_error_per_location(case, dtype, device):
    check_exact(case, expand, device, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", thinned(CONV_GLOBAL_POOL), ids=str)
def test_reduce_exact_on_conv_with_global_average_pooling(case, dtype, device):
    check_exact(case, reduce, device, dtype)


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("case", ONE_DATUM, ids=str)
def test_exact_for_one_datum_without_sharing(case, flavour, device):
    check_exact(case, flavour, device)
    check_exact(case, flavour, device, fisher=empirical, exact=empirical_fisher)


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("case", thinned(CONSTANT_HESSIAN), ids=str)
def test_exact_on_the_constant_hessian_family(case, flavour, device):
    a = layer_ios(*case.build(device))["net.0"].a[:, 0]
    assert len(a) > 1
    assert torch.linalg.matrix_rank(a - a[0]) == 2  # the inputs do vary
    check_exact(case, flavour, device)
    check_exact(case, flavour, device, fisher=empirical, exact=empirical_fisher)


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("case", LAST_LAYER_MSE, ids=str)
def test_exact_on_the_last_layer_of_any_net_with_squared_error(case, flavour, device):
    check_exact(case, flavour, device)


@pytest.mark.parametrize("case", SEVERAL_DATA, ids=str)
def test_bias_block_exact_on_any_net(case, device):
    for _, io, exact in with_bias(case, device):
        for factors in (expand(io), reduce(io)):
            check_equal(factors.A[-1, -1], torch.ones_like(factors.A[-1, -1]))
            check_equal(factors.A[-1, -1] * factors.B, exact)


@pytest.mark.parametrize("case", MIXED_BEFORE_POOL + ZERO_PADDED_ABOVE, ids=str)
def test_bias_block_with_sharing_exact_under_reduce_only(case, device):
    for name, io, exact in with_bias(case, device):
        if name in case.layers:
            check_equal(reduce(io).A[-1, -1] * reduce(io).B, exact)
            check_differs(expand(io).A[-1, -1] * expand(io).B, exact)


def with_bias(case: Case, device):
    problem = case.build(device)
    truth = diagonal_blocks(problem[0], ggn(*problem))
    for name, io in layer_ios(*problem).items():
        if problem[0].get_submodule(name).bias is not None:
            d_in = io.a.shape[-1]
            yield name, io, truth[name][d_in - 1 :: d_in, d_in - 1 :: d_in]


def test_exact_over_a_product_measure(device):
    """Every input meets every vector equally often."""
    a = torch.randn(5, 1, 4, device=device).repeat_interleave(3, 0)
    g = torch.randn(2, 3, 1, 7, device=device).repeat(1, 5, 1, 1)
    io = LayerIO(a, g)
    check_equal(kfac(io).dense(), io.block())


def test_exact_if_the_inputs_differ_in_sign_only(device):
    sign = torch.tensor([1.0, -1, -1, 1, 1], device=device).reshape(5, 1, 1)
    io = LayerIO(sign * torch.randn(4, device=device), torch.randn(2, 5, 1, 7, device=device))
    check_equal(kfac(io).dense(), io.block())


def test_error_is_the_covariance_of_inputs_and_vectors(device):
    """What KFAC drops: how `a a^T` and `sum_v g g^T` vary together from datum to datum."""
    io = LayerIO(torch.randn(6, 1, 4, device=device), torch.randn(2, 6, 1, 3, device=device))
    aa = torch.einsum("nsi,nsj->nij", io.a, io.a)
    gg = torch.einsum("vnso,vnsp->nop", io.g, io.g)
    covariance = torch.einsum("nop,nij->oipj", gg - gg.mean(0), aa - aa.mean(0)).reshape(12, 12)
    check_equal(io.block() - kfac(io).dense(), covariance)


# ---- where theory says that it is not exact ---------------------------------------------------


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("case", DEEP_LINEAR_CROSS_ENTROPY, ids=str)
def test_not_exact_on_deep_linear_nets_with_cross_entropy(case, flavour, device):
    check_not_exact(case, flavour, device)


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_not_exact_on_nonlinear_nets(case, flavour, device):
    name = next(iter(layer_ios(*case.build())))  # the first layer: everything is above it
    check_not_exact(Case(**{**case.__dict__, "layers": (name,)}), flavour, device)


@pytest.mark.parametrize("case", REDUCE_SETTING, ids=str)
def test_expand_not_exact_in_the_reduce_setting(case, device):
    check_not_exact(case, expand, device)


@pytest.mark.parametrize("case", EXPAND_SETTING, ids=str)
def test_reduce_not_exact_in_the_expand_setting(case, device):
    check_not_exact(case, reduce, device)


@pytest.mark.parametrize("case", SHARED_CROSS_ENTROPY_ONE_DATUM, ids=str)
def test_expand_not_exact_for_one_datum_with_shared_cross_entropy(case, device):
    check_not_exact(case, expand, device)


@pytest.mark.parametrize("case", ZERO_PADDED_ABOVE, ids=str)
def test_reduce_not_exact_below_a_zero_padded_conv(case, device):
    check_not_exact(case, reduce, device)


@pytest.mark.parametrize("flavour", BOTH)
@pytest.mark.parametrize("case", NONLINEAR + DEEP_LINEAR[:2], ids=str)
def test_of_the_empirical_fisher_not_exact(case, flavour, device):
    check_not_exact(case, flavour, device, fisher=empirical, exact=empirical_fisher)


@pytest.mark.parametrize("case", NONLINEAR, ids=str)
def test_of_the_empirical_fisher_is_not_that_of_the_fisher(case, device):
    problem = case.build(device)
    ios, others = layer_ios(*problem), layer_ios(*problem, empirical)
    for name in ios:
        check_differs(kfac(others[name]).dense(), kfac(ios[name]).dense())


# ---- as a matrix ------------------------------------------------------------------------------


@pytest.mark.everywhere
@pytest.mark.parametrize("approximation", [expand, reduce, foof])
@pytest.mark.parametrize("case", [EXPAND_SETTING[0], CONV_PER_LOCATION[10]], ids=str)
def test_obeys_the_laws_of_matrices(case, approximation, device):
    for io in layer_ios(*case.build(device)).values():
        M = approximation(io)
        check_matrix(M, (io.g.shape[-1], io.a.shape[-1]))
        check_spectrum(M)


def test_foof_keeps_the_input_factor_only(device):
    io = layer_ios(*DEEP_LINEAR[0].build(device))["0"]
    check_equal(foof(io).A, kfac(io).A)
    check_equal(foof(io).B, torch.eye(4, device=device))
