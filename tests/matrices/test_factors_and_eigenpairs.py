import pytest
import torch

from kfac_scratch.matrices.damping import HasLargestEigenvalues, factored_inverse
from kfac_scratch.matrices.factors_and_eigenpairs import FactorsAndEigenpairs
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.low_rank import LowRankKronecker
from tests.laws import check_differs, check_equal, check_matrix


@pytest.fixture
def M(device):
    """Factors, and eigenpairs that are those of other factors: of an earlier batch, say."""
    roots = [torch.randn(d, d, device=device) for d in (5, 3)]
    U = [torch.linalg.qr(torch.randn(d, 2, device=device)).Q for d in (5, 3)]
    d, c = torch.tensor([2.0, 1.0], device=device), torch.tensor(0.3, device=device)
    return FactorsAndEigenpairs(
        Kronecker(*(R @ R.T for R in roots)), LowRankKronecker(U[0], d, c, U[1], 2 * d, c), 7
    )


def test_the_matrix_is_that_of_the_eigenpairs(M):
    check_matrix(M, (3, 5))
    check_equal(M.dense(), M.modes.dense())
    check_differs(M.dense(), M.factors.dense())
    check_equal(M.trace(), M.dense().trace())
    check_equal(M.diagonal(), M.dense().diagonal())


def test_its_factors_are_damped_as_those_of_any_product(M):
    assert isinstance(M, HasLargestEigenvalues)
    check_equal(factored_inverse(M, 0.1).dense(), factored_inverse(M.modes, 0.1).dense())
    for found, factor in zip(M.largest_eigenvalues(), M.modes.factors(), strict=True):
        check_equal(found, torch.linalg.eigvalsh(factor)[-1])
    for found, factor in zip(M.mean_eigenvalues(), M.modes.factors(), strict=True):
        check_equal(found, factor.diagonal().mean())
