import pytest
import torch

from kfac_scratch.matrices.block_diagonal import BlockDiagonal, FiltersAndBias
from kfac_scratch.matrices.diagonal import Diagonal
from tests.laws import check_equal, check_matrix


def psd(K, d, device, dtype=torch.float64):
    R = torch.randn(K, d + 2, d, device=device, dtype=dtype)
    return R.mT @ R


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("K", [3, 6])  # a block for each row of V, or for half a row
def test_obeys_the_laws_of_matrices(K, dtype, device):
    M = BlockDiagonal(psd(K, 30 // K, device, dtype))
    check_matrix(M, (3, 10))
    check_equal(M.dense(), torch.block_diag(*M.blocks))
    check_equal(M.trace(), M.dense().trace())
    check_equal(M.diagonal(), M.dense().diagonal())


@pytest.mark.parametrize("biases", [0, 1, 2])
def test_filters_and_bias_obey_the_laws(biases, device):
    scale = torch.rand(3, biases, device=device)
    M = FiltersAndBias(BlockDiagonal(psd(6, 4, device)), Diagonal(scale))
    check_matrix(M, (3, 8 + biases))
    check_equal(M.trace(), M.dense().trace())
    check_equal(M.diagonal(), M.dense().diagonal())


def test_filters_and_bias_act_on_their_own_columns(device):
    filters, bias = BlockDiagonal(psd(6, 4, device)), Diagonal(torch.rand(3, 1, device=device))
    V = torch.randn(3, 9, device=device)
    expected = torch.cat([filters @ V[:, :8], bias @ V[:, 8:]], 1)
    check_equal(FiltersAndBias(filters, bias) @ V, expected)


def test_a_block_without_inverse_is_refused(device):
    M = BlockDiagonal(torch.stack([torch.eye(2), torch.zeros(2, 2)]).to(device))
    with pytest.raises(ValueError, match="use a larger damping"):
        M.inverse(0.0)
    with pytest.raises(ValueError, match="damping must be at least 0"):
        M.inverse(-1.0)
