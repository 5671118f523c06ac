import pytest
import torch

from kfac_scratch import KroneckerSum, ekfac, foof, kfac
from kfac_scratch.approximations.ekfac import second_moments
from kfac_scratch.approximations.estimators import Latest
from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.pinn.gramian import joined
from kfac_scratch.pinn.preconditioners import (
    Joined,
    TermWise,
    by_layer,
    congruence,
    damped_factors,
    ekfac_inverse,
    kfac_inverse,
    kfac_of_parts,
)
from kfac_scratch.pinn.problems import mlp, poisson
from kfac_scratch.pinn.terms import Term, linearize
from kfac_scratch.taylor.expansions import directional, laplacian, value_only
from tests.laws import check_differs, check_equal


def spd(d, device, rank=None):
    R = torch.randn(d, d if rank is None else rank, device=device)
    return R @ R.T


def products(n, device, rank=None):
    return tuple(Kronecker(spd(5, device, rank), spd(3, device, rank)) for _ in range(n))


def linearized(device, seed=0, kinds=2):
    torch.manual_seed(7)
    model = mlp(2, 5, 4, 1).to(device)
    g = torch.Generator(device).manual_seed(seed)
    terms = poisson(2).terms(9, 4, g)
    terms.append(Term(lambda u, x: u.value, poisson(2).points(3, g), value_only(2)))  # merged
    if kinds > 2:
        terms.append(
            Term(lambda u, x: u.d[0], poisson(2).points(3, g), directional(torch.eye(2)[:1]))
        )
    return linearize(model, terms), linearize(model, terms, chunk=2)


def dense_inverse(M, like):
    """What an inverse does to all unit matrices, as a matrix."""
    D = like.numel()
    eye = torch.eye(D, dtype=like.dtype, device=like.device).view(D, *like.shape)
    return torch.stack([(M @ E).flatten() for E in eye], dim=1)


# ---- one layer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_inverse_of_a_sum_of_products(n, device):
    terms, V = products(n, device), torch.randn(3, 5, device=device)
    dense = torch.stack([K.dense() for K in terms]).sum(0)
    found = dense_inverse(kfac_inverse(terms, terms, []), V)
    check_equal(found, torch.linalg.inv(dense))


def test_one_of_two_terms_may_be_singular(device):
    singular, regular = products(1, device, rank=2)[0], products(1, device)[0]
    for pair in ((singular, regular), (regular, singular)):
        found = dense_inverse(congruence(pair), torch.randn(3, 5, device=device))
        check_equal(found, torch.linalg.inv(KroneckerSum(*pair).dense()))


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
def test_inverses_hold_for_small_dampings(damping, device):
    """The solution stays accurate as far as the condition of the sum allows."""
    terms = tuple(damped_factors(K, 1.0, damping) for K in products(2, device, rank=1))
    total, V = KroneckerSum(*terms), torch.randn(3, 5, device=device)
    condition = torch.linalg.cond(total.dense())
    assert condition > 1 / damping
    found = congruence(terms) @ (total @ V)
    assert (found - V).abs().max() <= 1e-14 * condition * V.abs().max()


def test_factors_of_parts_are_those_of_the_batch(device):
    whole, parts = linearized(device)
    for name, groups in by_layer(whole).items():
        assert len(groups) == 2  # the two terms without derivatives are one kind
        for group, chunked in zip(groups, by_layer(parts)[name], strict=True):
            expected = kfac(concatenate(group, [1.0] * len(group)))
            for ios in (group, chunked):
                check_equal(kfac_of_parts(ios).A, expected.A)
                check_equal(kfac_of_parts(ios).B, expected.B)


def test_moments_correct_the_diagonal_in_the_common_basis(device):
    """In the basis of the damped sum, its diagonal becomes that of exact block plus damping."""
    whole, _ = linearized(device)
    for groups in by_layer(whole).values():
        factors = tuple(kfac_of_parts(group) for group in groups)
        damped = tuple(damped_factors(K, 1.0, 0.3) for K in factors)
        ios = [io for group in groups for io in group]
        found, basis = ekfac_inverse(damped, factors, ios), congruence(damped)
        K = torch.kron(basis.KB, basis.KA)
        added = KroneckerSum(*damped).dense() - KroneckerSum(*factors).dense()
        exact = sum(io.block() for io in ios)
        check_equal(1 / found.scale.flatten(), (K.T @ (exact + added) @ K).diagonal())
        check_differs(found.scale, basis.scale)


def test_moments_make_one_kind_of_term_ekfac(device):
    """With one product and without damping: EKFAC itself."""
    io = LayerIO(torch.randn(40, 4, 5, device=device), torch.randn(2, 40, 4, 3, device=device))
    found = ekfac_inverse((kfac(io),), (kfac(io),), [io])
    V = torch.randn(3, 5, device=device)
    check_equal(found @ V, ekfac(io).inverse(0.0) @ V)
    check_equal(1 / found.scale, second_moments(io, found.KA, found.KB))


def test_three_kinds_have_no_common_basis(device):
    with pytest.raises(NotImplementedError, match="3 kinds of terms"):
        ekfac_inverse(products(3, device), products(3, device), [])


# ---- over steps ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [2, 3])
def test_averages_are_the_references_from_the_identity_on(kinds, device):
    """`X_t = b X_(t-1) + (1 - b) X` from `X_0 = I`, plus damping, for every factor."""
    b, damping, state, reference = 0.8, 0.01, None, {}
    preconditioner = TermWise(decay=b)
    for t in range(1, 4):
        terms, _ = linearized(device, seed=t, kinds=kinds)
        state, inverses = preconditioner.update(state, terms, damping, t)
        for name, groups in by_layer(terms).items():
            new = [kfac(concatenate(group, [1.0] * len(group))) for group in groups]
            eyes = [(torch.eye(len(K.A)).to(K.A), torch.eye(len(K.B)).to(K.B)) for K in new]
            old = reference.get(name, eyes)
            reference[name] = [
                (b * A + (1 - b) * K.A, b * B + (1 - b) * K.B)
                for (A, B), K in zip(old, new, strict=True)
            ]
            sum_ = sum(
                torch.kron(B + damping * eye_B, A + damping * eye_A)
                for (A, B), (eye_A, eye_B) in zip(reference[name], eyes, strict=True)
            )
            V = torch.randn(len(new[0].B), len(new[0].A), device=device)
            solved = torch.linalg.solve(sum_, V.flatten()).view_as(V)
            check_equal(inverses[name] @ V, solved)


def test_updates_change_no_state(device):
    terms, _ = linearized(device)
    state, _ = TermWise().update(None, terms, 0.1, 1)
    before = state["0"][0].A.clone()
    TermWise().update(state, linearized(device, seed=1)[0], 0.1, 2)
    check_equal(state["0"][0].A, before)


def test_chunks_do_not_change_a_metric(device):
    whole, parts = linearized(device)
    for preconditioner in (TermWise(), TermWise(inverse=ekfac_inverse), Joined(Latest(ekfac))):
        _, a = preconditioner.update(None, whole, 0.1, 1)
        _, b = preconditioner.update(None, parts, 0.1, 1)
        for name, M in a.items():
            V = torch.randn(len(M.KB) if hasattr(M, "KB") else len(M.QB), 3, device=device)
            V = V @ torch.randn(3, len(M.KA) if hasattr(M, "KA") else len(M.QA), device=device)
            check_equal(b[name] @ V, M @ V)


@pytest.mark.parametrize("approximation", [kfac, foof, Latest(ekfac)])
def test_joined_runs_any_approximation(approximation, device):
    terms, _ = linearized(device)
    preconditioner = Joined(approximation, decay=0.5)
    state, inverses = preconditioner.update(None, terms, 0.1, 1)
    for name, groups in by_layer(terms).items():
        io = joined([io for group in groups for io in group])
        f = getattr(approximation, "approximation", approximation)
        V = torch.randn(io.g.shape[-1], io.a.shape[-1], device=device)
        check_equal(inverses[name] @ V, f(io).inverse(0.1 + 0.5) @ V)
    second, _ = preconditioner.update(state, terms, 0.1, 2)
    for name in second:
        check_equal(second[name].dense(), state[name].dense())  # the mean of twice the same


def test_a_single_term_is_plain_kfac(device):
    model, X = mlp(2, 5, 1).to(device), torch.randn(9, 2, device=device)
    terms = linearize(model, [Term(lambda u, x: u.lap - 1, X, laplacian(2))])
    _, inverses = TermWise(decay=0.0).update(None, terms, 0.1, 1)
    for name, ((io,),) in by_layer(terms).items():
        K = damped_factors(kfac(io), 1.0, 0.1)
        V = torch.randn(len(K.B), len(K.A), device=device)
        check_equal(inverses[name] @ V, K.inverse(0.0) @ V)
