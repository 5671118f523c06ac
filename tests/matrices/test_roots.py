"""Inverse roots: the power that undoes the matrix, for every kind of matrix, width and precision.

In float32 the truth is computed in float64 from the same stored matrix. The bound on a step by a
root is that on a damped step, `20 * eps`, and `2 * eps * top / damping + 20 * eps` on what is left
after the root has undone the matrix, where `top` is the largest eigenvalue. Neither depends on the
width.
"""

from dataclasses import replace
from functools import partial
from itertools import pairwise, product

import pytest
import torch

import kfac_scratch as ks
from kfac_scratch import LayerIO, exact_inverse, inverse_root
from kfac_scratch.approximations.cg_fac import cg_fac
from kfac_scratch.approximations.skfac import skfac
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.matrix import LinearMap
from kfac_scratch.matrices.roots import Spectral
from tests.laws import check_differs, check_equal
from tests.matrices.test_real_widths import EPS, problem
from tests.spectra import few_samples, images, relu, tabular

DAMPING = 0.1


def layer(device, dtype=torch.float64):
    a = torch.randn(6, 4, 5, device=device, dtype=dtype)
    return LayerIO(a, torch.randn(2, 6, 4, 3, device=device, dtype=dtype))


def words(device):
    columns = torch.randint(-1, 5, (6, 4), device=device)
    a = ks.OneHot(columns, 5, torch.float64)
    return ks.kfac(LayerIO(a, torch.randn(2, 6, 4, 3, device=device)))


KINDS = {
    "Kronecker": lambda device: ks.kfac(layer(device)),
    "KroneckerEigen": lambda device: ks.ekfac(layer(device)),
    "EKFACState": lambda device: ks.AmortisedEKFAC().update(None, layer(device), 1.0),
    "PartialTraces": lambda device: ks.tkfac(layer(device)),
    "ShampooBound": lambda device: ks.shampoo_bound(layer(device)),
    "Diagonal": lambda device: ks.Diagonal(layer(device).gradients().square().sum((0, 1))),
    "DiagonalKronecker": words,
    "DiagonalKroneckerEigen": lambda device: words(device).eigen_of_outputs(),
    "Dense": lambda device: ks.Dense(layer(device).block()),
    "DenseEigen": lambda device: ks.Dense(layer(device).block()).eigen(),
    "KroneckerColumns": lambda device: skfac(layer(device)),
    "Randomized": lambda device: ks.randomized(2)(layer(device)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def undone(M, root, p, V):
    """`root^p (M + damping * I) V`, which should be `V`."""
    X = M @ V + DAMPING * V
    for _ in range(p):
        X = root @ X
    return X


@pytest.mark.parametrize("p", [1, 2, 3, 4])
@every_kind
def test_p_products_with_the_root_undo_one_with_the_damped_matrix(kind, p, device):
    M, V = KINDS[kind](device), torch.randn(2, 3, 5, device=device)
    root = inverse_root(M, DAMPING, p)
    assert type(M).__name__ == kind
    assert isinstance(root, LinearMap)
    check_equal(undone(M, root, p, V), V)
    check_equal(root @ V[0], (root @ V)[0])


@pytest.mark.everywhere
def test_a_square_root_is_the_default(device):
    K, V = ks.kfac(layer(device)), torch.randn(3, 5, device=device)
    check_equal(inverse_root(K, DAMPING).dense(), K.inverse_sqrt(DAMPING).dense())
    check_equal(undone(K, inverse_root(K, DAMPING), 2, V), V)


@every_kind
def test_the_first_root_is_the_exact_inverse(kind, device):
    M, V = KINDS[kind](device), torch.randn(2, 3, 5, device=device)
    check_equal(inverse_root(M, DAMPING, p=1) @ V, exact_inverse(M, DAMPING) @ V)


@every_kind
def test_another_root_does_not_undo_the_matrix(kind, device):
    M, V = KINDS[kind](device), torch.randn(2, 3, 5, device=device)
    check_differs(undone(M, inverse_root(M, DAMPING, p=2), 4, V), V)
    check_differs(undone(M, inverse_root(M, DAMPING, p=4), 2, V), V)


def test_on_the_identity_every_root_would_pass(device):
    """As a test on multiples of it nearly does: they hide a wrong exponent up to a factor."""
    eye = [torch.eye(d, device=device) for d in (5, 3)]
    V = torch.randn(3, 5, device=device)
    M = ks.Kronecker(*(factor * (1 - DAMPING) ** 0.5 for factor in eye))
    check_equal(undone(M, inverse_root(M, DAMPING, p=2), 4, V), V)
    wrong, right = (inverse_root(ks.Kronecker(7 * eye[0], eye[1]), 0.0, p) @ V for p in (2, 4))
    check_equal(wrong / wrong.norm(), right / right.norm())


def test_the_root_of_a_product_is_the_product_of_roots_without_damping_only(device):
    K = ks.tkfac(layer(device)).kronecker()
    A, B = (inverse_root(ks.Dense(M), 0.0, p=4).dense() for M in (K.A, K.B))
    check_equal(inverse_root(K, 0.0, p=4).dense(), torch.kron(B, A))
    A, B = (inverse_root(ks.Dense(M), DAMPING, p=4).dense() for M in (K.A, K.B))
    check_differs(inverse_root(K, DAMPING, p=4).dense(), torch.kron(B, A))


@pytest.mark.parametrize("p", [1, 2, 4])
def test_a_loss_times_c_gives_a_step_by_the_root_times_a_power_of_c(p, device):
    io, c = layer(device), 9.0
    other = replace(io, g=c**0.5 * io.g)  # a curvature times c
    root, scaled = (inverse_root(ks.kfac(x), d, p) for x, d in ((io, DAMPING), (other, c * 0.1)))
    check_equal(scaled.dense(), c ** (-1 / p) * root.dense())


# ---- refusals ---------------------------------------------------------------------------------

REFUSED = {
    "KroneckerSum": lambda device: ks.KroneckerSum(ks.kfac(layer(device)), ks.kfac(layer(device))),
    "Gradients": lambda device: cg_fac(layer(device)),
    "BlockDiagonal": lambda device: ks.mini_block(layer(device)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_matrix_without_orthonormal_eigenvectors_is_refused_with_the_way_out(kind, device):
    M = REFUSED[kind](device)
    with pytest.raises(TypeError, match=r"no inverse root.*exact_inverse, or Dense\(M.dense"):
        inverse_root(M, DAMPING)
    V = torch.randn(3, 5, device=device)
    whole = ks.Dense((M.dense() + M.dense().T) / 2)
    check_equal(undone(M, inverse_root(whole, DAMPING), 2, V), V)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("p", "error", "words"),
    [(0, ValueError, "p must be at least 1"), (2.5, TypeError, "p must be a whole number")],
)
def test_a_root_has_a_whole_number(p, error, words):
    with pytest.raises(error, match=words):
        inverse_root(ks.kfac(layer("cpu")), DAMPING, p)


def of_two_samples(device):
    """A layer whose factors have no full rank."""
    io = layer(device)
    return LayerIO(io.a[:2, :1], io.g[:1, :2, :1])


SINGULAR = {
    "Kronecker": lambda io: ks.kfac(io),
    "PartialTraces": lambda io: ks.tkfac(io),
    "ShampooBound": lambda io: ks.shampoo_bound(io),
    "KroneckerColumns": lambda io: skfac(io),
    "Dense": lambda io: ks.Dense(io.block()),
    "Diagonal": lambda io: ks.Diagonal(0 * io.gradients()[0, 0]),
}


@pytest.mark.parametrize("kind", SINGULAR)
def test_without_damping_a_singular_matrix_is_refused_as_is_a_negative_damping(kind, device):
    M = SINGULAR[kind](of_two_samples(device))
    with pytest.raises(ValueError, match="singular"):
        inverse_root(M, 0.0)
    with pytest.raises(ValueError, match="at least 0"):
        inverse_root(M, -0.1)


def test_the_roots_are_of_all_matrices_with_their_own_eigenvalues(device):
    for make in KINDS.values():
        assert isinstance(inverse_root(make(device), DAMPING), Spectral)


# ---- precision --------------------------------------------------------------------------------


def stepped(p, root):
    """The step by a root of the stored matrix: in float32, and the truth in float64."""
    (A, B), found = (p.K.A, p.K.B), inverse_root(p.K, p.damping, root) @ p.V
    (a, QA), (b, QB) = (torch.linalg.eigh(M.double()) for M in (A, B))
    scale = torch.outer(b.clamp(min=0), a.clamp(min=0))
    return found, QB @ (QB.T @ p.V.double() @ QA * (scale + p.damping) ** (-1 / root)) @ QA.T


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


SPECTRA, FRACTIONS = [relu, images, few_samples, tabular], [1e-2, 1e-7]
WIDE = [pytest.param(*case, 1024, marks=pytest.mark.slow) for case in product(SPECTRA, FRACTIONS)]
WIDE += [pytest.param(s, 1e-7, 2048, marks=pytest.mark.slow) for s in (images, few_samples)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("spectrum", "fraction", "d"), [*product(SPECTRA, FRACTIONS, [64, 512]), *WIDE]
)
def test_a_root_is_right_to_rounding_whatever_the_width_and_damping(spectrum, fraction, d):
    p = problem(spectrum, d, fraction)
    for root in (2, 4):
        found, expected = stepped(p, root)
        assert relative(found, expected) <= 20 * EPS
    back = inverse_root(p.K, p.damping)
    X = back @ (back @ (p.K @ p.V + p.damping * p.V))
    assert relative(X, p.V.double()) <= 2 * p.unit + 20 * EPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_root_is_as_accurate_as_an_inverse(dtype):
    eps, K = torch.finfo(dtype).eps, ks.kfac(layer("cpu"))
    K, V = ks.Kronecker(K.A.to(dtype), K.B.to(dtype)), torch.randn(3, 5).to(dtype)
    twin = ks.Kronecker(*((M.double() + M.double().T) / 2 for M in (K.A, K.B)))
    for invert in (exact_inverse, inverse_root, partial(inverse_root, p=4)):
        found = invert(K, DAMPING) @ V
        assert found.dtype == dtype
        assert relative(found, invert(twin, DAMPING) @ V.double()) <= 20 * eps


# ---- a root that moves with an average --------------------------------------------------------


def moved(K, S, beta, half):
    """One product step of IKFAC towards the root of an average's inverse: no inverse is taken."""
    eye = eye_like(S)
    return K @ (eye - half * beta * (K.T @ S @ K - eye))


@pytest.mark.parametrize(("half", "order"), [(0.5, 2), (1.0, 1)])
def test_a_root_follows_the_inverse_of_an_average_by_products_to_first_order(half, order, device):
    """`K K^T` and the inverse of `(1 - beta) S0 + beta S`, as Lin et al. 2023 (SINGD) have it.

    With half of `beta` the error is of second order: half the step, a quarter of it. With `beta`
    itself it is of first order.
    """
    S = ks.kfac(layer(device)).A + DAMPING * torch.eye(5, device=device)
    S0 = 0.8 * torch.eye(5, device=device)
    K = torch.linalg.cholesky(torch.linalg.inv(S0))
    errors = []
    for beta in (2**-8, 2**-9, 2**-10):
        new = moved(K, S, beta, half)
        exact = torch.linalg.inv((1 - beta) * S0 + beta * S)
        errors.append(float((new @ new.T - exact).norm()))
    for larger, smaller in pairwise(errors):
        assert larger / smaller == pytest.approx(2**order, rel=0.05)
