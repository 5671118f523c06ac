import pytest
import torch

from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.damping import (
    balance,
    default_inverse,
    factored_inverse,
    levenberg_marquardt,
    reduction_ratio,
    relative_damping,
    relative_factored_inverse,
    relative_inverse,
)
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_columns import KroneckerColumns
from kfac_scratch.matrices.low_rank import LowRankKronecker
from tests.laws import check_differs, check_equal

DAMPING = 0.1


def example(device, rank=9):
    roots = torch.randn(5, rank, device=device), torch.randn(3, rank, device=device)
    return Kronecker(*(R @ R.T / rank for R in roots))


def damped(K, pi):
    root = DAMPING**0.5
    return Kronecker(K.A + pi * root * eye_like(K.A), K.B + root / pi * eye_like(K.B))


def test_factored_inverse_inverts_the_damped_factors(device):
    K, V = example(device), torch.randn(2, 3, 5, device=device)
    check_equal(factored_inverse(K, DAMPING) @ (damped(K, balance(K)) @ V), V)


def test_factored_inverse_is_not_the_inverse_of_the_damped_product(device):
    K = example(device)
    check_differs(factored_inverse(K, DAMPING).dense(), K.inverse(DAMPING).dense())


def test_factored_damping_always_damps_more(device):
    """What it adds beyond `damping * I` is positive semi-definite, so that steps are shorter."""
    K = example(device)
    excess = damped(K, balance(K)).dense() - K.dense() - DAMPING * eye_like(K.dense())
    assert torch.linalg.eigvalsh(excess).min() >= -1e-12
    V = torch.randn(3, 5, device=device)
    assert (V * (factored_inverse(K, DAMPING) @ V)).sum() < (V * (K.inverse(DAMPING) @ V)).sum()


def test_pi_minimises_the_trace_of_what_is_added_too_much(device):
    K = example(device)
    traces = [damped(K, balance(K) * s).trace() for s in (0.5, 0.9, 1.0, 1.1, 2.0)]
    assert min(traces) == traces[2]


def test_pi_makes_damping_invariant_to_the_split_of_the_scale(device):
    K = example(device)
    other = Kronecker(7 * K.A, K.B / 7)
    check_equal(factored_inverse(other, DAMPING).dense(), factored_inverse(K, DAMPING).dense())
    check_differs(damped(other, 1.0).dense(), damped(K, 1.0).dense())


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_zero_factor_is_damped_all_the_same(zero, device):
    K = example(device)
    K = Kronecker(*(0 * M if name == zero else M for name, M in vars(K).items()))
    check_equal(balance(K), torch.ones_like(balance(K)))
    assert factored_inverse(K, DAMPING).dense().isfinite().all()


def test_damping_is_not_stored(device):
    K = example(device)
    before = K.dense().clone()
    check_equal(factored_inverse(K, DAMPING).dense(), factored_inverse(K, DAMPING).dense())
    check_equal(K.dense(), before)


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_factored_damping_must_be_positive(damping, device):
    with pytest.raises(ValueError, match="positive damping"):
        factored_inverse(example(device), damping)


def test_relative_damping_is_a_fraction_of_the_mean_eigenvalue(device):
    K = example(device)
    for M in (K, K.eigen(), Dense(K.dense())):
        assert relative_damping(M, 0.3) == pytest.approx(
            0.3 * float(K.eigenvalues().mean()), rel=1e-12
        )
    scaled = Kronecker(K.A, 5 * K.B)
    assert relative_damping(scaled, 0.3) == pytest.approx(5 * relative_damping(K, 0.3), rel=1e-12)


# ---- dampings of each layer's own ---------------------------------------------------------------


def products(device):
    """Kronecker products in every form that knows the largest eigenvalues of its factors."""
    UA, UB = torch.randn(5, 2, device=device), torch.randn(3, 7, device=device)
    QA, QB = (torch.linalg.qr(torch.randn(d, 2, device=device)).Q for d in (5, 3))
    d, c = torch.tensor([2.0, 1.0], device=device), torch.tensor(0.3, device=device)
    return {
        "factors": example(device),
        "columns": KroneckerColumns(UA, UB),
        "low rank": LowRankKronecker(QA, d, c, QB, 3 * d, c),
        "nothing but tails": LowRankKronecker(QA[:, :0], d[:0], c, QB[:, :0], d[:0], 2 * c),
        "full rank": LowRankKronecker(
            *(torch.linalg.qr(UA @ UA.T + 1).Q, torch.arange(5.0, 0, -1, device=device), 99 * c),
            *(torch.linalg.qr(UB @ UB.T).Q, torch.arange(3.0, 0, -1, device=device), 99 * c),
        ),
        "a diagonal": DiagonalKronecker(torch.rand(5, device=device), UB @ UB.T),
    }


def factors(M):
    if isinstance(M, Kronecker):
        return M.A, M.B
    if isinstance(M, KroneckerColumns):
        return M.UA @ M.UA.T, M.UB @ M.UB.T
    return (M.a.diag(), M.B) if isinstance(M, DiagonalKronecker) else M.factors()


FORMS = ["factors", "columns", "low rank", "nothing but tails", "full rank", "a diagonal"]


@pytest.mark.parametrize("form", FORMS)
def test_each_factor_may_be_damped_by_a_fraction_of_its_largest_eigenvalue(form, device):
    M = products(device)[form]
    A, B = (F + 0.3 * torch.linalg.eigvalsh(F)[-1] * eye_like(F) for F in factors(M))
    V = torch.randn(3, 5, device=device)
    check_equal(relative_factored_inverse(M, 0.3) @ (B @ V @ A), V)


def test_damping_by_largest_eigenvalues_does_not_see_scales(device):
    K, c = example(device), 7.0
    found = relative_factored_inverse(K, 0.3).dense()
    check_equal(relative_factored_inverse(Kronecker(c * K.A, K.B / c), 0.3).dense(), found)
    check_equal(c * relative_factored_inverse(Kronecker(K.A, c * K.B), 0.3).dense(), found)
    check_equal(c * relative_inverse(Kronecker(K.A, c * K.B), 0.3).dense(), K_inverse(K, 0.3))
    absolute = factored_inverse(Kronecker(K.A, c * K.B), 0.3)
    check_differs(c * absolute.dense(), factored_inverse(K, 0.3).dense())


def K_inverse(K, fraction):
    return K.inverse(fraction * float(K.eigenvalues().mean())).dense()


@pytest.mark.parametrize("zero", ["A", "B"])
def test_a_zero_factor_counts_as_one_with_the_largest_eigenvalue_one(zero, device):
    K, V = example(device), torch.randn(3, 5, device=device)
    K = Kronecker(*(0 * M if name == zero else M for name, M in vars(K).items()))
    kept = K.B if zero == "A" else K.A
    damped = kept + 0.3 * torch.linalg.eigvalsh(kept)[-1] * eye_like(kept)
    once = damped @ V if zero == "A" else V @ damped
    check_equal(relative_factored_inverse(K, 0.3) @ (0.3 * once), V)
    check_equal(relative_inverse(K, 0.3) @ (0.3 * V), V)


def test_relative_dampings_refuse_what_they_cannot_damp(device):
    K = example(device)
    with pytest.raises(ValueError, match="positive fraction"):
        relative_factored_inverse(K, 0.0)
    with pytest.raises(TypeError, match=r"A Dense has no two factors.*relative_inverse"):
        relative_factored_inverse(Dense(K.dense()), 0.1)


# ---- Levenberg-Marquardt ----------------------------------------------------------------------


def test_reduction_ratio_is_one_on_the_model_itself(device):
    """For a quadratic loss and its own exact model, the prediction is the change."""
    H, b, step = example(device).dense(), torch.randn(15, device=device), torch.randn(15)
    step = step.to(device)

    def loss(x):
        return float(x @ H @ x / 2 + b @ x)

    x = torch.randn(15, device=device)
    predicted = float(step @ H @ step / 2 + (H @ x + b) @ step)
    assert reduction_ratio(loss(x), loss(x + step), predicted) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize(
    ("ratio", "change"),
    [
        (0.76, 0.5),
        (0.75, 1),
        (0.5, 1),
        (0.25, 1),
        (0.24, 2),
        (-3.0, 2),
        (float("nan"), 2),
        (float("inf"), 2),
        (None, 1),
    ],
)
def test_levenberg_marquardt_changes_the_damping_at_its_thresholds(ratio, change):
    assert levenberg_marquardt(1.0, ratio, factor=0.5) == change


def test_damping_has_a_minimum():
    assert levenberg_marquardt(1e-8, 1.0) == 1e-8


def test_nothing_predicted_of_nothing_is_no_ratio():
    assert reduction_ratio(0.0, 0.0, 0.0) is None


def test_at_convergence_damping_stays():
    ratio = reduction_ratio(1.0, 1.0 - 2e-16, -1e-14)
    assert ratio is None
    assert levenberg_marquardt(0.3, ratio) == 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_ratio_of_round_off_is_none_in_the_precision_of_the_loss(dtype):
    eps = torch.finfo(dtype).eps
    assert reduction_ratio(1.0, 1.0 - 2 * eps, -50 * eps, dtype) is None
    assert reduction_ratio(1.0, 1.0 - 400 * eps, -400 * eps, dtype) == pytest.approx(1)


def test_default_inverse_damps_the_factors_of_a_product_and_other_matrices_exactly(device):
    K, V = example(device), torch.randn(2, 3, 5, device=device)
    dense = Dense(K.dense())
    check_equal(default_inverse(K, DAMPING) @ V, factored_inverse(K, DAMPING) @ V)
    check_differs(default_inverse(K, DAMPING) @ V, K.inverse(DAMPING) @ V)
    check_equal(default_inverse(dense, DAMPING) @ V, K.inverse(DAMPING) @ V)


def test_default_inverse_without_damping_is_the_exact_one(device):
    K, V = example(device), torch.randn(2, 3, 5, device=device)
    check_equal(default_inverse(K, 0.0) @ (K @ V), V)
