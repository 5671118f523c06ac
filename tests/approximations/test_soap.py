"""SOAP is amortised TEKFAC of batch gradients with a root: sums of its moments, and Adam's steps.

The loop of one's own in this file follows the published algorithm, with eigendecompositions in
place of its QR iteration, and the first basis kept.
"""

import io as files
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

import kfac_scratch as ks
from kfac_scratch import LayerIO, from_gradient, inverse_root, soap
from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.estimators import weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.kpsvd import ekpsvd, kpsvd
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.matrices.kronecker import KroneckerEigen
from kfac_scratch.optimizer.state_dicts import name_of
from tests.approximations.test_shampoo import every_fisher, every_model, ios
from tests.laws import check_differs, check_equal, check_matrix, error


def adafactor(M):
    """What is left of eigenvalues if only their sums over rows and columns are kept."""
    rows, columns = M.scale.sum(1), M.scale.sum(0)
    return torch.outer(rows, columns) / M.scale.sum()


# ---- the moments ------------------------------------------------------------------------------


@every_fisher
@every_model
def test_moments_in_the_basis_of_shampoo_have_its_eigenvalues_as_sums(name, fisher, device):
    said = []
    for io in ios(name, device, fisher):
        M, E, T = tkfac(io), tkfac(io).eigen(), tekfac(io)
        check_equal(T.scale.sum(1), (E.QB.T @ M.B @ E.QB).diagonal())
        check_equal(T.scale.sum(0), (E.QA.T @ M.A @ E.QA).diagonal())
        check_equal(adafactor(T), E.scale)
        said.append(error(T.scale, E.scale))
    assert max(said) > 0.05  # moments say more than their sums


@every_model
def test_moments_in_the_basis_of_kfac_have_no_such_sums(name, device):
    found = []
    for io in ios(name, device):
        E, T = kfac(io).eigen(), ekfac(io)
        found.append(error(adafactor(T), E.scale))
    assert max(found) > 0.1


@every_fisher
@every_model
def test_own_moments_are_never_farther_than_products_of_eigenvalues(name, fisher, device):
    for io in ios(name, device, fisher):
        F = io.block()
        far = {
            M.__name__: float((M(io).dense() - F).norm() / F.norm())
            for M in (kfac, ekfac, tkfac, tekfac, kpsvd, ekpsvd)
        }
        tolerance = 1e-5  # of the power iteration: its own is 1e-6
        assert far["tekfac"] <= far["tkfac"]
        assert far["ekfac"] <= far["kfac"]
        assert far["ekpsvd"] <= far["kpsvd"] + tolerance
        assert far["kpsvd"] <= far["tkfac"] + tolerance


# ---- the steps --------------------------------------------------------------------------------


def published(gradients, basis, betas, eps):
    """Steps of SOAP: the first gradient has given the basis and no step; Adam in that basis."""
    m, v, steps = 0.0, 0.0, []
    for t, G in enumerate(gradients[1:], start=1):
        rotated = basis.QB.T @ G @ basis.QA
        m = betas[0] * m + (1 - betas[0]) * rotated
        v = betas[1] * v + (1 - betas[1]) * rotated.square()
        m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
        steps.append(basis.QB @ (m_hat / (v_hat.sqrt() + eps)) @ basis.QA.T)
    return steps


def states(gradients, decay):
    """The estimator's after each gradient but the first, of which only the basis is kept."""
    estimator = soap(10**6)
    state = estimator.update(None, from_gradient(gradients[0]), 1.0)
    for t, G in enumerate(gradients[1:], start=1):
        state = estimator.update(state, from_gradient(G), weight_of_newest(decay, t))
        yield state


def averages(gradients, decay):
    """Bias-corrected averages of all gradients but the first."""
    m = 0.0
    for t, G in enumerate(gradients[1:], start=1):
        m = decay * m + (1 - decay) * G
        yield m / (1 - decay**t)


def several_gradients(device, count=8):
    mean = torch.randn(4, 6, device=device)
    return [mean + torch.randn(4, 6, device=device) for _ in range(count)]


def first_basis(gradients):
    return tkfac(from_gradient(gradients[0])).eigen()


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_step_is_adams_in_the_basis_of_shampoo(beta1, device):
    gradients = several_gradients(device)
    basis, first = first_basis(gradients), gradients[0]
    for Q, M in ((basis.QB, first @ first.T), (basis.QA, first.T @ first)):
        check_equal(Q.T @ M @ Q, (Q.T @ M @ Q).diagonal().diag())
    steps = published(gradients, basis, (beta1, 0.95), eps=0.0)
    found = zip(states(gradients, 0.95), averages(gradients, beta1), steps, strict=True)
    for state, m, step in found:
        check_equal(inverse_root(state, 0.0) @ m, step)
    check_differs(state.inverse(0.0) @ m, step, by=0.1)  # KFAC's power
    v = sum(0.95**t * G.square() for t, G in enumerate(reversed(gradients[1:])))
    adam = m / (v / sum(0.95**t for t in range(len(gradients) - 1))).sqrt()
    check_differs(adam, step, by=0.1)  # the basis of Adam


def test_the_step_depends_on_the_basis_of_a_null_space(device):
    """The first gradient has rank 4 and 6 columns: two eigenvectors are anybody's choice."""
    gradients = several_gradients(device)
    basis = first_basis(gradients)
    QA, turn = basis.QA.clone(), torch.linalg.qr(torch.randn(2, 2, device=device)).Q
    QA[:, :2] = QA[:, :2] @ turn
    first = gradients[0]
    check_equal(QA.T @ first.T @ first @ QA, basis.QA.T @ first.T @ first @ basis.QA)
    pair = [published(gradients, b, (0.9, 0.95), 0.0) for b in (basis, replace(basis, QA=QA))]
    check_differs(pair[0][-1], pair[1][-1])


def test_adams_eps_beside_the_root_and_its_square_under_it_differ_by_eps_over_the_root(device):
    """`1 / (r + eps)` and `1 / sqrt(r^2 + eps^2)` differ by less than `eps / r` of themselves."""
    gradients, eps = several_gradients(device), 1e-6
    steps = published(gradients, first_basis(gradients), (0.0, 0.95), eps)
    for state, m, step in zip(
        states(gradients, 0.95), averages(gradients, 0.0), steps, strict=True
    ):
        under, smallest = inverse_root(state, eps**2) @ m, float(state.M.scale.min()) ** 0.5
        assert 0 < float((step - under).norm()) <= eps / smallest * float(under.norm())


def test_a_basis_in_another_order_changes_no_step(device):
    """Eigenvectors have no order: moments must move with them, as `carried_over` moves them."""
    state = soap(10**6).update(None, from_gradient(several_gradients(device)[0]), 1.0)
    M, V = state.M, torch.randn(4, 6, device=device)
    a, b = torch.randperm(6, device=device), torch.randperm(4, device=device)
    a, b = (p.flip(0) if (p == p.sort().values).all() else p for p in (a, b))
    basis = KroneckerEigen(M.QA[:, a], M.QB[:, b], M.scale)
    moved = M.carried_over(basis)
    check_equal(moved.scale, M.scale[b][:, a])
    check_equal(inverse_root(moved, 0.01) @ V, inverse_root(M, 0.01) @ V)
    check_differs(inverse_root(basis, 0.01) @ V, inverse_root(M, 0.01) @ V, by=0.1)  # stale


def test_a_new_basis_comes_after_so_many_updates(device):
    state, estimator, bases = None, soap(2), []
    for G in several_gradients(device, 5):
        state = estimator.update(state, from_gradient(G), 0.5 if bases else 1.0)
        bases.append(state.M.QA)
    assert [torch.equal(*pair) for pair in pairwise(bases)] == [*(True, False, True, False)]


def test_the_state_is_a_matrix(device):
    io = LayerIO(torch.randn(6, 2, 5, device=device), torch.randn(1, 6, 2, 3, device=device))
    state = ks.OfBatch(soap()).update(None, io, 1.0)
    check_matrix(state, (3, 5))
    check_equal(state.dense(), tekfac(ks.pooled(io)).dense())


# ---- in the optimizer -------------------------------------------------------------------------


def network(device):
    torch.manual_seed(0)
    return Sequential(Linear(6, 8), Tanh(), Linear(8, 4)).to(device)


def trained(device, steps, **options):
    model, loss = network(device), CrossEntropyLoss()
    settings = {
        "approximation": ks.OfBatch(soap(2)),
        "invert": inverse_root,
        "fisher": ks.empirical,
        "controls": [ks.graft()],
        "damping": 1e-6,
        "decay": 0.95,
        "lr": 0.1,
    }
    optimizer = ks.KFAC(model, loss, **settings | options)
    g, losses = torch.Generator().manual_seed(1), []
    X = torch.randn(60, 6, generator=g).to(device)
    y = (X[:, :4].argmax(1) + (X[:, 4] > 1)) % 4
    for t in range(steps):
        part = slice(20 * (t % 3), 20 * (t % 3) + 20)
        optimizer.zero_grad()
        value = loss(model(X[part]), y[part])
        value.backward()
        optimizer.observe(X[part], y[part])
        optimizer.step()
        losses.append(float(value.detach()))
    return optimizer, losses


def test_soap_trains_in_the_optimizer(device):
    _, losses = trained(device, 40)
    assert losses[-1] < 0.4 * losses[0]


def test_the_factor_between_pooled_and_bare_gradients_is_a_root_and_graft_undoes_it(device):
    """The step by `pooled` is Adam's over the root of N; a control sets its length again."""
    plain, _ = trained(device, 1, controls=[], damping=1e-12)
    G = {n: p.grad for n, p in plain.model.named_parameters()}
    W = torch.cat([G["0.weight"], G["0.bias"][:, None]], 1)
    bare = soap().update(None, from_gradient(W), 1.0)
    whole = plain.matrices["0"]
    check_equal(whole.M.scale, 20 * bare.M.scale)
    check_equal(inverse_root(whole, 20e-8) @ W, inverse_root(bare, 1e-8) @ W / 20**0.5)


def test_a_checkpoint_continues_bit_by_bit(device):
    optimizer, _ = trained(device, 5)
    file = files.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, _ = trained(device, 1)
    other.load_state_dict(torch.load(file, weights_only=True))
    for key, M in optimizer.matrices.items():
        V = torch.randn_like(M.M.scale)
        assert torch.equal(other.matrices[key] @ V, M @ V)
        assert torch.equal(other.inverses[key] @ V, optimizer.inverses[key] @ V)
        assert other.matrices[key].age == M.age == 5


def test_makers_of_batches_have_names_of_their_own():
    assert name_of(ks.OfBatch(soap(3))) == "OfBatch(AmortisedEKFAC(MovingAverage(tkfac)))"
    assert name_of(ks.OfBatch(tkfac)) != name_of(ks.MovingAverage(tkfac))


# ---- at a real width --------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("fraction", [1e-2, 1e-4])
def test_at_a_real_width_in_single_precision_the_root_undoes_the_moments(fraction, device):
    """The bound of `tests/matrices/test_roots.py`: the constant does not depend on the width."""
    state, estimator = None, ks.OfBatch(soap(2))
    for weight in (1.0, 0.5, 0.3):
        a = torch.randn(16, 1, 512, device=device).relu().float()
        g = torch.randn(1, 16, 1, 32, device=device).float()
        state = estimator.update(state, LayerIO(a, g), weight)
    eps, top = torch.finfo(torch.float32).eps, float(state.M.scale.max())
    damping, V = fraction * top, torch.randn(32, 512, device=device).float()
    root = inverse_root(state, damping)
    back = root @ (root @ (state @ V + damping * V))
    assert float((back - V).norm() / V.norm()) <= 2 * eps / fraction + 20 * eps
