"""Muon: the polar factor, which relatives without memory have as their step, and its iteration."""

import pytest
import torch
from torch.nn import Linear, MSELoss, Sequential
from torch.utils.flop_counter import FlopCounterMode

import kfac_scratch as ks
from kfac_scratch import CUBIC, MUON, from_gradient, inverse_root, newton_schulz, polar_factor
from kfac_scratch.approximations.tekfac import tekfac
from tests.approximations.test_shampoo import power
from tests.laws import check_differs, check_equal

SHAPES = [(4, 7), (7, 4), (5, 5)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def polar(V):
    U, _, Wh = torch.linalg.svd(V, full_matrices=False)
    return U @ Wh


def with_values(s, shape, device):
    """A matrix with given singular values."""
    U = torch.linalg.qr(torch.randn(shape[0], len(s), device=device)).Q
    W = torch.linalg.qr(torch.randn(shape[1], len(s), device=device)).Q
    return U * torch.as_tensor(s, device=device) @ W.T


# ---- the polar factor -------------------------------------------------------------------------


@pytest.mark.everywhere
@each_shape
def test_the_polar_factor_is_orthonormal_and_nearest(shape, device):
    V = torch.randn(*shape, device=device)
    P, (m, n) = polar_factor(V), shape
    check_equal(P, polar(V))
    small = P @ P.T if m <= n else P.T @ P
    check_equal(small, torch.eye(min(shape), device=device))
    nearest = (V - P).norm()
    for _ in range(20):
        assert (V - polar(torch.randn(*shape, device=device))).norm() > nearest
        assert (V - polar(P + 0.01 * torch.randn(*shape, device=device))).norm() > nearest


def test_it_forgets_size_and_singular_values_and_keeps_the_range(device):
    V = with_values([3.0, 1.0, 1e-3], (6, 5), device)
    check_equal(polar_factor(7 * V), polar_factor(V))
    s = torch.linalg.svdvals(polar_factor(V))
    check_equal(s, torch.tensor([1.0, 1, 1, 0, 0], device=device))
    assert torch.equal(polar_factor(0 * V), 0 * V)


def test_round_off_of_a_stored_matrix_is_no_direction(device):
    V = with_values([3.0, 1.0], (300, 200), device).float()
    s = torch.linalg.svdvals(polar_factor(V).double())
    assert int((s > 0.5).sum()) == 2
    assert polar_factor(V).dtype == torch.float32
    assert polar_factor(V.bfloat16()).dtype == torch.bfloat16


def test_a_matrix_that_is_not_finite_has_none(device):
    with pytest.raises(ValueError, match="not all is finite"):
        polar_factor(torch.full((2, 3), torch.nan, device=device))


# ---- relatives without memory -----------------------------------------------------------------


@each_shape
def test_shampoo_of_one_gradient_is_the_polar_factor_and_its_square_is_not(shape, device):
    """On the range, each way to spend half a power of the square gives it."""
    G = torch.randn(*shape, device=device)
    L, R = G @ G.T, G.T @ G
    for left, right in ((-0.25, -0.25), (-0.5, 0.0), (0.0, -0.5)):
        check_equal(power(L, left) @ G @ power(R, right), polar_factor(G))
    square = power(L, -0.5) @ G @ power(R, -0.5)
    check_equal(square, torch.linalg.pinv(G).T)
    check_differs(square / square.norm(), polar_factor(G) / polar_factor(G).norm(), by=0.1)


def damped_error(G, damping, smallest, N=1.0):
    """What a damping and round-off change in the polar factor, as curvature `N G^T G` gives it.

    A curvature `N s**2` with damping gives `1 / sqrt(1 + d / (N s**2))` for 1. Where the curvature
    is zero, the gradient is round-off, `10 * eps` of its norm, times the root of `N / d`.
    """
    eps = torch.finfo(G.dtype).eps
    small = damping / (2 * N * smallest**2) * min(G.shape) ** 0.5
    return small + 10 * eps * float(G.norm()) * (N / damping) ** 0.5


@pytest.mark.parametrize("make", [ks.shampoo_bound, ks.one_sided, tekfac])
@each_shape
def test_with_a_small_damping_the_matrices_give_the_polar_factor(make, shape, device):
    """Shampoo and SOAP of one gradient with power -1/2; TKFAC, the square, does not."""
    G, damping = with_values([2.0, 1.0, 0.5, 0.25], shape, device), 1e-16
    step = inverse_root(make(from_gradient(G)), damping) @ G
    assert float((step - polar_factor(G)).norm()) <= damped_error(G, damping, smallest=0.25)
    square = inverse_root(ks.tkfac(from_gradient(G)), damping) @ G
    assert float((square - polar_factor(G)).norm()) > 0.1


def test_the_optimizer_without_memory_takes_the_steps_of_muon(device):
    """One-sided Shampoo of the newest batch, without momentum: the polar factor of the gradient."""
    torch.manual_seed(0)
    model, loss = Sequential(Linear(6, 4, bias=False)).to(device), MSELoss()
    optimizer = ks.KFAC(
        *(model, loss),
        approximation=ks.OfBatch(ks.Latest(ks.one_sided)),
        invert=inverse_root,
        fisher=ks.empirical,
        controls=[],
        lr=0.1,
        momentum=0.0,
        damping=1e-12,
    )
    X, y = torch.randn(20, 6, device=device), torch.randn(20, 4, device=device)
    before = model[0].weight.detach().clone()
    loss(model(X), y).backward()
    G = model[0].weight.grad.clone()
    optimizer.observe(X, y)
    optimizer.step()
    step = (before - model[0].weight.detach()) / 0.1
    N = 20 * 4  # the divisor of the loss: see `pooled`
    bound = damped_error(G, 1e-12, float(torch.linalg.svdvals(G)[-1]), N)
    assert float((N**0.5 * step - polar_factor(G)).norm()) <= bound


# ---- Newton and Schulz ------------------------------------------------------------------------


def polynomial(x, steps, coefficients):
    a, b, c = coefficients
    for _ in range(steps):
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize("coefficients", [CUBIC, MUON], ids=["cubic", "muon"])
@each_shape
def test_the_iteration_is_a_polynomial_of_the_singular_values(coefficients, shape, device):
    V = torch.randn(*shape, device=device)
    U, s, Wh = torch.linalg.svd(V / V.norm(), full_matrices=False)
    for steps in (0, 1, 5):
        check_equal(
            newton_schulz(V, steps, coefficients), U * polynomial(s, steps, coefficients) @ Wh
        )


@pytest.mark.everywhere
@each_shape
def test_the_cubic_converges_to_the_polar_factor_and_muons_does_not(shape, device):
    V = with_values([2.0, 1.0, 0.5, 0.25], shape, device)
    check_equal(newton_schulz(V, 15), polar_factor(V))
    for steps in (5, 15, 100):
        check_differs(newton_schulz(V, steps, MUON), polar_factor(V), by=0.05)


def test_a_small_singular_value_takes_the_cubic_a_step_for_each_factor_of_three_halves(device):
    """Below 1e-2 the cubic multiplies by 1.5 up to 1e-4 of it: `log(1/x) / log(1.5)` steps."""
    V = with_values([1.0, 0.9, 0.8, 1e-4], (5, 4), device)
    x = 1e-4 / float(V.norm())
    early, late = (torch.linalg.svdvals(newton_schulz(V, steps))[3] for steps in (10, 30))
    assert float(early) == pytest.approx(x * 1.5**10, rel=1e-3)
    assert float(late) > 0.99
    check_equal(newton_schulz(V, 40), polar_factor(V))


def test_where_the_rank_is_not_full_round_off_grows_by_three_halves_a_step(device):
    """So that many steps make a direction of it, which the polar factor leaves out."""
    V = with_values([1.0, 0.5], (5, 4), device)
    P, sizes = polar_factor(V), []
    for steps in (20, 30, 40):
        sizes.append(float((newton_schulz(V, steps) - P).norm()))
    assert sizes[0] < 1e-10
    assert sizes[1] / sizes[0] == pytest.approx(1.5**10, rel=0.3)
    assert sizes[2] / sizes[1] == pytest.approx(1.5**10, rel=0.3)
    assert torch.linalg.matrix_rank(newton_schulz(V, 120)) == 4


def test_muons_numbers_bring_singular_values_into_a_band_and_keep_them_there(device):
    x = torch.logspace(-4, 0, 4001, device=device)
    after = polynomial(x, 5, MUON)
    assert 1.19 < float(after.max()) < 1.21
    assert float(after[x >= 0.01].min()) > 0.68
    assert float(after[x <= 1e-3].max()) < 0.5
    end = polynomial(torch.logspace(-4, 0, 4001, device=device), 60, MUON)
    assert 0.675 < float(end.min()) < float(end.max()) < 1.135
    fixed = ((4.7750 - (4.7750**2 - 4 * 2.0315 * 2.4445) ** 0.5) / (2 * 2.0315)) ** 0.5
    assert polynomial(fixed, 1, MUON) == pytest.approx(fixed)
    slope = 3.4445 - 3 * 4.7750 * fixed**2 + 5 * 2.0315 * fixed**4
    assert slope < -1.5  # a fixed point, from which every step moves away


def test_zero_stays_zero_and_large_numbers_do_not_matter(device):
    V = torch.randn(3, 5, device=device)
    assert torch.equal(newton_schulz(0 * V, 5), 0 * V)
    check_equal(newton_schulz(1e8 * V, 5), newton_schulz(V, 5))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_a_step_costs_three_products_of_the_shorter_side(shape, device):
    V, (m, n), r = torch.randn(*shape, device=device), shape, min(shape)
    with FlopCounterMode(display=False) as counter:
        newton_schulz(V, 5, MUON)
    assert "`2 * m * n * min(m, n) + min(m, n)**3`" in " ".join(newton_schulz.__doc__.split())
    assert counter.get_total_flops() // 2 == 5 * (2 * m * n * r + r**3)


@pytest.mark.usefixtures("as_users_run_it")
def test_steps_are_a_number_of_steps():
    with pytest.raises(TypeError, match="steps must be a whole number"):
        newton_schulz(torch.eye(2), 2.5)
    with pytest.raises(ValueError, match="steps must be at least 0"):
        newton_schulz(torch.eye(2), -1)


# ---- beside torch.optim.Muon ------------------------------------------------------------------


def step_of_torch(G, **options):
    """One step of `torch.optim.Muon` without momentum; the matrix is wide, so that lr stays."""
    p = torch.nn.Parameter(torch.zeros_like(G))
    p.grad = G.clone()
    settings = {"lr": 1.0, "momentum": 0.0, "nesterov": False, "weight_decay": 0.0}
    torch.optim.Muon([p], **settings | options).step()
    return -p.detach()


@pytest.mark.parametrize("shape", [(4, 7), (5, 5), (64, 128)])
def test_muons_step_is_that_of_pytorch_to_the_last_bit_of_its_bfloat16(shape, device):
    G = torch.randn(*shape, device=device)
    found = newton_schulz(G.bfloat16(), 5, MUON)
    assert torch.equal(step_of_torch(G), found.to(G.dtype))
    check_differs(newton_schulz(G.bfloat16(), 5).to(G.dtype), step_of_torch(G), by=0.05)


def rounding_bound(V, steps):
    """What rounding to bfloat16 does to the cubic at most, to first order, in the Frobenius norm.

    With `u` half of `eps`, the rounding of `X X^T` and of its multiple by -0.5 changes the next
    iterate by `u |X| / 2` each, and its own rounding by `u` of its norm. All later steps multiply a
    change by at most `1 / s`, the steepest chord of an odd, concave function that ends at 1, where
    `s` is the smallest singular value. At first there are rounding `V`, its norm, and the quotient.
    """
    u, X = torch.finfo(torch.bfloat16).eps / 2, V / V.norm()
    total = 3 * u / float(torch.linalg.svdvals(X)[-1])
    for _ in range(steps):
        new = newton_schulz_step(X)
        change = u * float(X.norm()) + u * float(new.norm())
        X = new
        total += change / min(1.0, float(torch.linalg.svdvals(X)[-1]))
    return total


def newton_schulz_step(X):
    return 1.5 * X - 0.5 * X @ X.T @ X


@pytest.mark.parametrize("shape", [(4, 7), (3, 12)])
def test_with_the_cubics_numbers_pytorch_finds_the_polar_factor_up_to_its_rounding(shape, device):
    V = with_values([2.0, 1.5, 1.0], shape, device)
    V = V + with_values([0.8], shape, device) if shape[0] > 3 else V
    found = step_of_torch(V, ns_coefficients=CUBIC, ns_steps=8)
    bound = rounding_bound(V, 8)
    assert float((newton_schulz(V, 8) - polar_factor(V)).norm()) < 1e-3
    assert float((found - polar_factor(V)).norm()) <= bound
    assert bound < 0.35 * float(polar_factor(V).norm())
