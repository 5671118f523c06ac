"""KL-Shampoo: the flip-flop descends to the nearest product, starts at Shampoo, and needs divisors.

The divergence here is that of Gaussians, `KL(N(0, F + damping I) | N(0, M))`, up to what does not
depend on `M`: half of `tr(M^-1 (F + damping I)) + log det M`.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import kfac_scratch as ks
from kfac_scratch import LayerIO, inverse_root, kl_factors
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.kpsvd import kpsvd
from kfac_scratch.approximations.tkfac import tkfac
from tests.approximations.test_shampoo import every_fisher, every_model, ios, random_io
from tests.laws import check_differs, check_equal, check_matrix, error


def divergence(M, F):
    """Up to a constant, in nats."""
    return (torch.linalg.solve(M, F).trace() + torch.logdet(M)) / 2


def damped(io):
    """A damping, a hundredth of the mean eigenvalue, and the block with it."""
    F = io.block()
    damping = 0.01 * float(F.diagonal().mean())
    return damping, F + damping * torch.eye(len(F), device=F.device)


def generic(device, S=1):
    """A layer with more samples than weights, whose inputs and vectors vary together."""
    io = random_io(device, N=40, S=S)
    size = torch.linspace(0.1, 3, 40, device=device)[:, None, None]
    return replace(io, a=size * io.a, g=size * io.g)


# ---- the fixed point --------------------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 3])
def test_at_the_fixed_point_the_divergence_has_no_slope(S, device):
    io = generic(device, S)
    damping, F = damped(io)
    K = kl_factors(io, damping, steps=200)
    A, B = K.A.clone().requires_grad_(), K.B.clone().requires_grad_()
    slopes = torch.autograd.grad(divergence(torch.kron(B, A), F), (A, B))
    early = kl_factors(io, damping, steps=1)
    A1, B1 = early.A.clone().requires_grad_(), early.B.clone().requires_grad_()
    first = torch.autograd.grad(divergence(torch.kron(B1, A1), F), (A1, B1))
    for slope, M in zip(slopes, (A, B), strict=True):  # relative to half of tr(M^-1 dM)
        assert float(slope.norm() * M.detach().norm()) <= 1e-10 * len(F)
    assert float(first[1].norm() * early.B.norm()) > 0.01  # the other factor has moved since


@pytest.mark.parametrize("S", [1, 3])
def test_the_damped_block_has_the_trace_of_the_identity_in_units_of_the_product(S, device):
    io = generic(device, S)
    damping, F = damped(io)
    for steps in (1, 3):
        trace = torch.linalg.solve(kl_factors(io, damping, steps).dense(), F).trace()
        check_equal(trace, torch.full_like(trace, 15.0))  # after every flip-flop, already
    other = torch.linalg.solve(tkfac(io).dense() + damping * torch.eye(15, device=device), F)
    check_differs(other.trace(), torch.full_like(trace, 15.0))


@every_fisher
@every_model
def test_every_flip_flop_lowers_the_divergence(name, fisher, device):
    for io in ios(name, device, fisher):
        damping, F = damped(io)
        steps = [divergence(kl_factors(io, damping, k).dense(), F) for k in (1, 2, 3, 5, 10, 20)]
        assert all(later <= sooner + 1e-9 for sooner, later in pairwise(steps))
        assert steps[0] > steps[-1] + 0.01


def test_no_other_product_is_nearer(device):
    io = generic(device)
    damping, F = damped(io)
    K = kl_factors(io, damping, steps=200)
    best = divergence(K.dense(), F)

    def noise(d):
        return torch.randn(d, d, device=device)

    for _ in range(50):
        A, B = (M + 0.01 * M.norm() * Z @ Z.T for M, Z in ((K.A, noise(5)), (K.B, noise(3))))
        assert divergence(torch.kron(B, A), F) > best
    for M in (kfac(io), tkfac(io).kronecker(), kpsvd(io, 1e-12)):
        assert divergence(M.dense(), F) > best + 0.01


def test_a_product_plus_a_multiple_of_the_identity_may_be_nearer(device):
    """The last layer of a classifier: its block vanishes where all outputs move together."""
    *_, io = ios("mlp", device, ks.type2)
    F = io.block()
    damping = 1e-3 * float(F.diagonal().mean())
    F = F + damping * torch.eye(len(F), device=device)
    K = kfac(io).dense() + damping * torch.eye(len(F), device=device)
    assert divergence(kl_factors(io, damping, 300).dense(), F) > divergence(K, F) + 1


def test_factors_of_the_fixed_point_are_the_best_for_each_other(device):
    io = generic(device, S=3)
    damping, _ = damped(io)
    K, G = kl_factors(io, damping, steps=300), io.gradients()[0]
    A, B = torch.linalg.inv(K.A), torch.linalg.inv(K.B)
    eye_out, eye_in = torch.eye(3, device=device), torch.eye(5, device=device)
    check_equal(K.B, (torch.einsum("koi,ij,kpj->op", G, A, G) + damping * A.trace() * eye_out) / 5)
    check_equal(K.A, (torch.einsum("koi,op,kpj->ij", G, B, G) + damping * B.trace() * eye_in) / 3)
    check_differs(K.B / K.B.trace(), tkfac(io).B / tkfac(io).trace())


# ---- the start, and the divisors --------------------------------------------------------------


def test_the_first_half_step_from_the_identity_is_shampoo(device):
    io = generic(device, S=3)
    check_equal(kl_factors(io, 0.0, steps=1).B, tkfac(io).B / 5)
    turned = LayerIO(io.g[0], io.a[None])  # the sides change places
    check_equal(kl_factors(turned, 0.0, steps=1).B, tkfac(io).A / 3)
    check_differs(kl_factors(io, 0.0, steps=1).A, tkfac(io).A / 3)


def drifting(G, d_in, d_out, decay, steps, divisors):
    """Averages of both factors, updated from the old ones, with or without the divisors."""
    L, R = torch.eye(d_out).to(G), torch.eye(d_in).to(G)
    sizes = []
    for _ in range(steps):
        B, A = torch.linalg.inv(L), torch.linalg.inv(R)
        new = torch.einsum("koi,ij,kpj->op", G, A, G), torch.einsum("koi,op,kpj->ij", G, B, G)
        L, R = (
            decay * M + (1 - decay) * N / d for M, N, d in zip((L, R), new, divisors, strict=True)
        )
        sizes.append((float(L.trace().log()), float(R.trace().log())))
    return sizes


def test_without_its_divisors_the_recursion_has_no_fixed_point(device):
    """The logarithms of both traces drift apart, by `w (d_in - d_out) / (d_in + d_out)` a step.

    Let `L` grow by `exp(r)` at every step and `R` by `exp(-r)`, and `N_L`, `N_R` be the new sums.
    For small `w`, `N_L = (1 + r / w) L` and `N_R = (1 - r / w) R`. Both `tr(L^-1 N_L)` and
    `tr(R^-1 N_R)` are the same trace, so that `d_out (1 + r / w) = d_in (1 - r / w)`.
    """
    io, w = generic(device), 0.01
    G = io.gradients()[0]
    free = drifting(G, 5, 3, 1 - w, 3000, (1.0, 1.0))
    rate = [(free[-1][k] - free[-501][k]) / 500 for k in (0, 1)]
    expected = w * (5 - 3) / (5 + 3)
    assert rate[0] == pytest.approx(expected, rel=2 * w)
    assert rate[1] == pytest.approx(-expected, rel=2 * w)
    kept = drifting(G, 5, 3, 1 - w, 3000, (5.0, 3.0))
    assert abs(kept[-1][0] - kept[-501][0]) + abs(kept[-1][1] - kept[-501][1]) < 1e-5


# ---- over batches -----------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_one_batch_again_and_again_tends_to_the_nearest_product(weight, device):
    io = generic(device)
    damping, _ = damped(io)
    estimator, state = ks.KLShampoo(damping), None
    for _ in range(300):
        state = estimator.update(state, io, weight)
    check_equal(state.dense(), kl_factors(io, damping, 300).dense())


def test_without_memory_an_update_is_one_more_flip_flop(device):
    io = generic(device)
    state = kl_factors(io, 0.1, steps=2)
    check_equal(ks.KLShampoo(0.1).update(state, io, 1.0).dense(), kl_factors(io, 0.1, 3).dense())
    check_differs(kl_factors(io, 0.1, 3).B, state.B)


def test_a_loss_times_c_multiplies_every_matrix_by_c(device):
    """From the first batch on; if both first factors were made of the identity, by c squared."""
    io = generic(device)
    louder = replace(io, g=10 * io.g)
    one, other = (ks.Kronecker(tkfac(x).A / 3, tkfac(x).B / 5) for x in (io, louder))
    check_equal(other.dense(), 100**2 * one.dense())
    c, states = 100.0, [None, None]
    for seed in range(3):
        torch.manual_seed(seed)
        io = generic(device)
        for k, (x, damping) in enumerate(((io, 0.1), (replace(io, g=c**0.5 * io.g), c * 0.1))):
            states[k] = ks.KLShampoo(damping).update(states[k], x, 0.3)
        check_equal(states[1].dense(), c * states[0].dense())


def test_of_a_batch_gradient_the_damping_makes_the_factors_definite(device):
    io = ks.pooled(generic(device))
    state = ks.KLShampoo(0.1).update(None, io, 1.0)
    assert torch.linalg.eigvalsh(state.dense())[0] > 0
    check_matrix(state, (3, 5))
    V = torch.randn(3, 5, device=device)
    root = inverse_root(state, 0.0)
    check_equal(root @ (root @ (state @ V)), V)


def test_kl_soap_is_the_estimator_with_moments_in_its_basis(device):
    io = generic(device)
    state = ks.AmortisedEKFAC(10, ks.KLShampoo(0.1)).update(None, io, 1.0)
    E = ks.KLShampoo(0.1).update(None, io, 1.0).eigen()
    check_equal(state.dense(), ks.rescaled(E, io).dense())


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_an_estimator_needs_a_positive_damping(damping):
    with pytest.raises(ValueError, match="KLShampoo needs a positive damping"):
        ks.KLShampoo(damping)


def test_a_block_without_full_rank_needs_a_damping(device):
    io = random_io(device, N=2)
    with pytest.raises(ValueError, match="use a larger damping"):
        kl_factors(io, 0.0)
    assert kl_factors(io, 1e-3).dense().isfinite().all()


@pytest.mark.usefixtures("as_users_run_it")
def test_wrong_numbers_and_views_are_refused(device):
    io = generic(device, S=3)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        kl_factors(io, -1.0)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        kl_factors(io, 0.1, steps=0)
    state = ks.KLShampoo(0.1).update(None, io, 1.0)
    with pytest.raises(ValueError, match="KL-Shampoo needs the gradient of every sample"):
        kl_factors(io.reduced(), 0.1)
    with pytest.raises(ValueError, match="KL-Shampoo needs the gradient of every sample"):
        ks.KLShampoo(0.1).update(state, io.reduced(), 0.5)


@pytest.mark.parametrize("fraction", [1e-2, 1e-4])
def test_in_single_precision_the_factors_are_those_of_the_same_layer(fraction, device):
    """Both from the same numbers. The bound is that on a damped step, which a factor is made of."""
    io = random_io(device, N=4, dtype=torch.float32)
    damping = fraction * float(io.block().diagonal().mean())
    exact = kl_factors(LayerIO(io.a.double(), io.g.double()), damping, steps=3)
    found = kl_factors(io, damping, steps=3)
    assert found.A.dtype == torch.float32
    eps, top = torch.finfo(torch.float32).eps, float(torch.linalg.eigvalsh(io.block())[-1])
    for M, N in ((found.A, exact.A), (found.B, exact.B)):
        assert error(M.double(), N) <= 2 * eps * top / damping + 20 * eps
