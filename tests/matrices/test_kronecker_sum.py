"""A sum of two Kronecker products; that it obeys the laws of matrices: see test_matrices."""

import pytest
import torch

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
