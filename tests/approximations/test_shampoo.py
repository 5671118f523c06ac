"""Shampoo: its statistics are TKFAC's, its matrix bounds the block, its square is a first step."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

import kfac_scratch as ks
from kfac_scratch import LayerIO, inverse_root, shampoo_bound, shampoo_inverse
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.kpsvd import kpsvd
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.matrices.rearranged import Rearranged
from tests.approximations.test_batch_gradients import LOSS, MODELS, gradient, labels
from tests.laws import check_differs, check_equal, check_matrix

every_model = pytest.mark.parametrize("name", MODELS)
every_fisher = pytest.mark.parametrize("fisher", [ks.empirical, ks.type2])


def random_io(device, N=6, S=1, V=1, d_in=5, d_out=3, dtype=torch.float64):
    a = torch.randn(N, S, d_in, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(V, N, S, d_out, device=device, dtype=dtype))


def ios(name, device, fisher=ks.empirical):
    model, X = MODELS[name](device)
    return ks.layer_ios(model, LOSS, X, labels(device), fisher).values()


def power(M, p):
    """Of a symmetric matrix on its range."""
    s, Q = torch.linalg.eigh(M)
    kept = s > 1e-10 * s[-1]
    return (Q * s.where(kept, 1.0).pow(p) * kept) @ Q.T


# ---- its statistics ---------------------------------------------------------------------------


@every_model
def test_both_sums_over_the_gradients_of_samples_are_the_partial_traces_of_tkfac(name, device):
    """By plain autodiff, one sample after another; the loss is their mean."""
    model, X = MODELS[name](device)
    y = labels(device)
    each = [gradient(model, LOSS, X[n : n + 1], y[n : n + 1]) for n in range(len(X))]
    for io, G in zip(ios(name, device), map(torch.stack, zip(*each, strict=True)), strict=True):
        L, R = torch.einsum("noi,npi->op", G, G), torch.einsum("noi,noj->ij", G, G)
        check_equal(tkfac(io).B, L / len(X))
        check_equal(tkfac(io).A, R / len(X))
        check_differs(kfac(io).A / kfac(io).A.trace(), R / R.trace())


@every_fisher
@every_model
def test_the_rearranged_block_maps_the_identities_to_them(name, fisher, device):
    for io in ios(name, device, fisher):
        R, M = Rearranged(io), tkfac(io)
        check_equal(R.to_inputs(torch.eye(len(M.B), device=device)), M.A)
        check_equal(R.to_outputs(torch.eye(len(M.A), device=device)), M.B)


# ---- one weight for each sample ---------------------------------------------------------------


def weighted(w, x):
    return torch.einsum("n,ni,nj->ij", w, x, x)


def form(x, M):
    """`x^T M x` of every row."""
    return torch.einsum("ni,ij,nj->n", x, M, x)


def test_four_products_differ_in_one_weight_for_each_sample(device):
    io = random_io(device, N=9)
    a, g = io.a[:, 0], io.g[0, :, 0]
    (N, d_in), d_out = a.shape, g.shape[1]
    one = torch.ones(N, device=device)
    best, flat = kpsvd(io, 1e-13), ks.kl_factors(io, 0.0, 200)
    A, B = torch.linalg.inv(flat.A), torch.linalg.inv(flat.B)
    sigma = best.A.norm() * best.B.norm()
    for M, wA, wB in (
        (kfac(io), one / N, one),
        (tkfac(io), g.square().sum(1), a.square().sum(1)),
        (best, form(g, best.B) / sigma, form(a, best.A) / sigma),
        (flat, form(g, B) / d_out, form(a, A) / d_in),
    ):
        check_equal(M.A, weighted(wA, a))
        check_equal(M.B, weighted(wB, g))


def test_kfac_is_tkfac_if_all_inputs_and_all_vectors_have_one_length(device):
    io = random_io(device, N=9)
    unit = partial(torch.nn.functional.normalize, dim=-1)
    same = LayerIO(3 * unit(io.a), 2 * unit(io.g))
    check_equal(tkfac(same).dense(), kfac(same).dense())
    check_differs(tkfac(LayerIO(unit(io.a), io.g)).dense(), kfac(io).dense(), by=0.05)


def kronecker_block(device):
    """A layer whose block is a product of full rank: all inputs with all vectors."""
    a, g = torch.randn(7, 5, device=device), torch.randn(4, 3, device=device)
    return LayerIO(a.repeat(4, 1)[:, None], g.repeat_interleave(7, 0)[None, :, None])


def test_a_block_that_is_a_product_is_found_by_all_four_but_not_by_the_bound(device):
    io = kronecker_block(device)
    F = io.block()
    for M in (kfac(io), tkfac(io), kpsvd(io, 1e-13), ks.kl_factors(io, 0.0, steps=1)):
        check_equal(M.dense(), F)
    check_differs(shampoo_bound(io).dense(), F, by=0.3)
    check_equal(shampoo_bound(io).dense() @ shampoo_bound(io).dense() / F.trace(), F)


# ---- the square is a first step ---------------------------------------------------------------


def cosine(M, F):
    return float((M.dense() * F).sum() / (M.dense().norm() * F.norm()))


@every_fisher
@every_model
def test_half_steps_from_the_identity_never_turn_away_from_the_block(name, fisher, device):
    """Each factor is the best for the other; the square is both half-steps from the identity."""
    for io in ios(name, device, fisher):
        R, F = Rearranged(io), io.block()
        M = tkfac(io).kronecker()
        B, A = R.to_outputs(torch.eye(len(M.A), device=device)), R.to_inputs(R.identity())
        check_equal(torch.kron(B, A) / A.trace(), M.dense())
        found = [float(F.trace() / F.norm() / len(F) ** 0.5)]  # of the identity
        X = torch.eye(len(M.A), device=device)
        for _ in range(4):
            Y = R.to_outputs(X)
            found.append(cosine(ks.Kronecker(X, Y), F))
            X = R.to_inputs(Y)
            found.append(cosine(ks.Kronecker(X, Y), F))
        assert all(later >= sooner - 1e-12 for sooner, later in pairwise(found))
        best = cosine(kpsvd(io, 1e-12), F)
        assert max(found[-1], cosine(M, F)) <= best + 1e-12
        assert found[0] < found[2] - 0.01


@every_model
def test_the_square_is_often_nearer_in_direction_than_the_bound(name, device):
    """An observation on untrained networks of two kinds, no theorem."""
    for io in ios(name, device):
        F = io.block()
        assert cosine(tkfac(io), F) > cosine(shampoo_bound(io), F) + 0.01


# ---- the bound --------------------------------------------------------------------------------


def lowest(M, F):
    """The smallest eigenvalue of a difference, relative to the block."""
    return float(torch.linalg.eigvalsh(M - F)[0] / F.norm())


@pytest.mark.parametrize("S", [1, 2, 4])
@pytest.mark.parametrize("make", [shampoo_bound, ks.one_sided])
def test_r_times_the_matrix_bounds_the_block_from_above(make, S, device):
    for _ in range(20):
        io = random_io(device, S=S, V=2)
        r = min(S, 3)
        assert lowest(r * make(io).dense(), io.block()) >= -1e-12


@pytest.mark.parametrize("make", [shampoo_bound, ks.one_sided])
def test_the_rank_in_the_bound_is_needed(make, device):
    """The identity as gradient: its block has the eigenvalue 3, and both sums are identities."""
    io = ks.from_gradient(torch.eye(3, device=device))
    top = torch.linalg.eigvalsh(io.block())[-1]
    check_equal(top, torch.full_like(top, 3.0))
    check_equal(make(io).dense(), torch.eye(9, device=device))
    assert lowest(make(io).dense(), io.block()) < -0.5
    assert lowest(3 * make(io).dense(), io.block()) >= -1e-12


@every_model
def test_tkfac_is_no_bound(name, device):
    for io in ios(name, device):
        r = min(io.a.shape[1], io.a.shape[2], io.g.shape[3])
        assert lowest(r * shampoo_bound(io).dense(), io.block()) >= -1e-12
        assert lowest(tkfac(io).dense(), io.block()) < -0.1


# ---- as a matrix, and in training -------------------------------------------------------------


@pytest.mark.parametrize("S", [1, 4])
def test_both_obey_the_laws_of_matrices(S, device):
    io = random_io(device, S=S, V=2)
    for M in (shampoo_bound(io), ks.one_sided(io), shampoo_bound(ks.pooled(io))):
        check_matrix(M, (3, 5))
        check_equal(M.trace(), M.dense().trace())
        check_equal(M.diagonal(), M.dense().diagonal())


def test_the_bound_is_the_product_of_roots(device):
    io = random_io(device, S=4)
    G = io.gradients()[0]
    L, R = torch.einsum("noi,npi->op", G, G), torch.einsum("noi,noj->ij", G, G)
    check_equal(shampoo_bound(io).dense(), torch.kron(power(L, 0.5), power(R, 0.5)))
    check_equal(ks.one_sided(io).dense(), torch.kron(torch.eye(3, device=device), R))


def test_an_average_is_the_bound_of_the_averaged_block_and_no_average_of_bounds(device):
    both = [random_io(device, S=4) for _ in range(2)]
    average = ks.MovingAverage(shampoo_bound)
    M = average.update(average.update(None, both[0], 1.0), both[1], 0.5)
    A, B = (sum(getattr(tkfac(io), f) for io in both) / 2 for f in ("A", "B"))
    check_equal(M.dense(), torch.kron(power(B, 0.5), power(A, 0.5)))
    roots = [[power(getattr(tkfac(io), f), 0.5) for io in both] for f in "AB"]
    wrong = ks.Kronecker(*(sum(pair) / 2 for pair in roots))
    check_differs(wrong.dense(), M.dense())


def test_the_inverse_root_is_a_fourth_root_on_each_side(device):
    M, V = shampoo_bound(random_io(device, S=4)), torch.randn(3, 5, device=device)
    check_equal(inverse_root(M, 0.0) @ V, power(M.B, -0.25) @ V @ power(M.A, -0.25))
    check_differs(inverse_root(M, 0.0) @ V, power(M.B, -0.5) @ V @ power(M.A, -0.5))


def test_the_damping_of_the_paper_is_in_both_sums(device):
    M, V = shampoo_bound(random_io(device, S=4)), torch.randn(2, 3, 5, device=device)
    A, B = (X + 9 * torch.eye(len(X), device=device) for X in (M.A, M.B))
    P = shampoo_inverse(M, 9.0)
    check_equal(P @ V, power(B, -0.25) @ V @ power(A, -0.25))
    check_equal(P @ (P @ (P @ (P @ (B @ V @ A)))), V)
    check_differs(P @ V, inverse_root(M, 9.0) @ V)


@pytest.mark.usefixtures("as_users_run_it")
def test_the_damping_of_the_paper_is_for_two_sums_only(device):
    io = random_io(device)
    with pytest.raises(TypeError, match=r"a Kronecker has not: pass approximation=shampoo_bound"):
        shampoo_inverse(kfac(io), 0.1)
    with pytest.raises(ValueError, match="singular"):
        shampoo_inverse(shampoo_bound(LayerIO(io.a[:2], io.g[:, :2])), 0.0)


def test_without_damping_the_bound_of_too_few_samples_has_no_inverse(device):
    """Round-off in the null space of a factor is no eigenvalue, and its root is none."""
    for _ in range(20):
        M = shampoo_bound(random_io(device, N=4))
        with pytest.raises(ValueError, match="singular"):
            M.inverse(0.0)
        assert M.inverse(1e-3).dense().isfinite().all()


def test_a_loss_times_c_multiplies_the_bound_by_c(device):
    io = random_io(device, S=4)
    scaled = shampoo_bound(replace(io, g=3 * io.g))
    check_equal(scaled.dense(), 9 * shampoo_bound(io).dense())


def damped_power(M, p):
    return power(M + 0.01 * torch.eye(len(M), device=M.device), p)


def two_layers(device):
    torch.manual_seed(0)
    return Sequential(Linear(4, 5), Tanh(), Linear(5, 3)).to(device)


PLAIN = {"fisher": ks.empirical, "momentum": 0.0, "controls": [], "rest": None}
EVERY = {"factor_every": 1, "inverse_every": 1}


@pytest.mark.parametrize(
    ("approximation", "invert", "powers"),
    [
        (shampoo_bound, shampoo_inverse, (-0.25, -0.25)),
        (ks.one_sided, inverse_root, (0.0, -0.5)),
    ],
)
def test_the_optimizer_takes_the_steps_of_shampoo(approximation, invert, powers, device):
    """A loop of one's own, beside it: sums of products of gradients, and roots of them."""
    model, loss = two_layers(device), CrossEntropyLoss(reduction="sum")
    optimizer = ks.KFAC(
        *(model, loss),
        approximation=ks.OfBatch(approximation),
        invert=invert,
        lr=0.1,
        damping=0.01,
        decay=0.9,
        **PLAIN,
        **EVERY,
    )
    W = {n: p.detach().clone() for n, p in model.named_parameters()}
    twin, sums, weight = two_layers(device), {}, 0.0
    for _ in range(4):
        X, y = torch.randn(6, 4, device=device), torch.randint(3, (6,), device=device)
        optimizer.zero_grad()
        loss(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
        twin.load_state_dict(W)
        weight = 0.9 * weight + 0.1
        for k, G in zip("02", gradient(twin, loss, X, y), strict=True):
            L, R = sums.get(k, (0 * G @ G.T, 0 * G.T @ G))
            sums[k] = L, R = 0.9 * L + 0.1 * G @ G.T, 0.9 * R + 0.1 * G.T @ G
            left, right = (damped_power(M / weight, p) for M, p in zip((L, R), powers, strict=True))
            step = left @ G @ right
            W[f"{k}.weight"] = W[f"{k}.weight"] - 0.1 * step[:, :-1]
            W[f"{k}.bias"] = W[f"{k}.bias"] - 0.1 * step[:, -1]
    for name, p in model.named_parameters():
        check_equal(p, W[name])


# ---- at a real width --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("fraction", [1e-2, 1e-4])
@pytest.mark.parametrize(
    ("make", "invert"), [(shampoo_bound, shampoo_inverse), (tkfac, inverse_root)]
)
def test_at_a_real_width_single_precision_gives_the_step_of_double(make, invert, fraction, device):
    """From the same gradients. Rounding changes a matrix by `eps * top`, which is what the damping
    is compared with; the constant does not depend on the width.
    """
    a = torch.randn(24, 1, 512, device=device).relu().float()
    io = ks.pooled(LayerIO(a, torch.randn(1, 24, 1, 32, device=device).float()))
    M, exact = make(io), make(LayerIO(io.a.double(), io.g.double()))
    eps, top = torch.finfo(torch.float32).eps, float(torch.linalg.eigvalsh(exact.B)[-1])
    damping, V = fraction * top, torch.randn(32, 512, device=device).float()
    found, expected = invert(M, damping) @ V, invert(exact, damping) @ V.double()
    assert found.dtype == torch.float32
    error = float((found.double() - expected).norm() / expected.norm())
    assert error <= 2 * eps / fraction + 20 * eps
