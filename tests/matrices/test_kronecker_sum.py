"""A sum of two Kronecker products; that it obeys the laws of matrices: see test_matrices."""

import pytest
import torch

from kfac_scratch.approximations.kpsvd import guarded_inverse
from kfac_scratch.linalg import simultaneous_eigh
from kfac_scratch.matrices.block_diagonal import BlockDiagonal
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import ConjugateGradientInverse, KroneckerSum
from tests.laws import check_equal
from tests.matrices.test_matrices import D_IN, D_OUT, kronecker_sum, to


def test_a_sum_is_inverted_directly_without_damping(device):
    M, V = to(kronecker_sum(), device), torch.randn(5, D_OUT, D_IN, device=device)
    check_equal(M.inverse(0.0) @ (M @ V), V)


def test_an_indefinite_sum_is_refused(device):
    first = Kronecker(torch.eye(D_IN), torch.eye(D_OUT))
    second = Kronecker(torch.diag(torch.tensor([1.0, -3, 0])), torch.eye(D_OUT))
    M = to(KroneckerSum(first, second), device)
    with pytest.raises(ValueError, match="not positive definite"):
        M.inverse(0.0)
    with pytest.raises(ValueError, match="negative curvature"):
        M.inverse(0.1) @ torch.ones(D_OUT, D_IN, device=device)


def test_with_damping_every_product_solves_a_system(device):
    M, V = to(kronecker_sum(), device), torch.randn(5, D_OUT, D_IN, device=device)
    inverse = M.inverse(0.3)
    assert isinstance(inverse, ConjugateGradientInverse)
    check_equal(inverse @ (M @ V + 0.3 * V), V)


def test_damping_times_the_identity_may_be_the_first_of_two_terms(device):
    """`B ⊗ A + damping I` is a sum of two products itself, inverted directly."""
    M, V = to(kronecker_sum(), device).second, torch.randn(D_OUT, D_IN, device=device)
    eyes = torch.eye(D_IN, device=device), torch.eye(D_OUT, device=device)
    damped = KroneckerSum(Kronecker(2.0 * eyes[0], eyes[1]), Kronecker(M.A, M.B))
    check_equal(damped.inverse(0.0) @ (M @ V + 2.0 * V), V)


# ---- factors that are not symmetric -------------------------------------------------------------

TURN = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
EYES = Kronecker(torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64))
TURNED = KroneckerSum(EYES, Kronecker(TURN / 2, TURN))


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_two_antisymmetric_factors_are_a_symmetric_sum_and_inverted_exactly(damping, device):
    M, V = to(TURNED, device), torch.randn(3, 2, 2, device=device)
    check_equal(torch.linalg.eigvalsh(M.dense()), M.diagonal().new_tensor([0.5, 0.5, 1.5, 1.5]))
    check_equal(M @ V, (V.flatten(1) @ M.dense()).reshape(V.shape))
    check_equal(M.inverse(damping) @ (M @ V + damping * V), V)


def test_an_indefinite_sum_of_antisymmetric_factors_is_refused(device):
    M = to(KroneckerSum(EYES, Kronecker(2 * TURN, TURN)), device)
    with pytest.raises(ValueError, match="negative curvature"):
        M.inverse(0.0) @ torch.tensor([[1.0, 0.0], [0.0, -1.0]], device=device)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_a_sum_that_is_not_symmetric_is_refused(damping, device):
    M = to(KroneckerSum(EYES, Kronecker(TURN / 2, EYES.B)), device)
    with pytest.raises(ValueError, match="neither both symmetric nor both antisymmetric"):
        M.inverse(damping)


def test_guarding_a_sum_needs_symmetric_factors(device):
    with pytest.raises(ValueError, match="not symmetric"):
        guarded_inverse(to(TURNED, device), 0.1)


def test_undamped_a_singular_first_term_or_sum_is_refused(device):
    singular = Kronecker(torch.diag(torch.tensor([1.0, 1e-17])), EYES.B)
    with pytest.raises(ValueError, match="singular"):
        to(KroneckerSum(singular, EYES), device).inverse(0.0)
    negative = KroneckerSum(EYES, Kronecker(-EYES.A * (1 - 1e-16), EYES.B))
    with pytest.raises(ValueError, match="not positive definite"):
        to(negative, device).inverse(0.0)


@pytest.mark.parametrize(
    "inverse",
    [
        lambda M: Dense(M).inverse(1.0),
        lambda M: BlockDiagonal(M.unsqueeze(0)).inverse(1.0),
        lambda M: Kronecker(M, M).inverse(1.0),
        lambda M: factored_inverse(Kronecker(M, M), 1.0),
        lambda M: simultaneous_eigh(M, M + M.T),
    ],
    ids=["dense", "blocks", "kronecker", "factored", "simultaneous"],
)
def test_a_matrix_of_which_one_triangle_is_read_must_be_symmetric(inverse, device):
    M = torch.tensor([[2.0, 1.0], [0.0, 2.0]], device=device)
    with pytest.raises(ValueError, match="not symmetric"):
        inverse(M)
    inverse(M + M.T)
