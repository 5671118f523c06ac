import io as files

import pytest
import torch

from kfac_scratch import LayerIO, ekfac, kfac
from kfac_scratch.approximations.ekfac import AmortisedEKFAC
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.optimizer.checkpoints import example_io, restored, tensors
from tests.laws import check_equal


def random_io(device, d_in=5, d_out=3):
    return LayerIO(
        torch.randn(7, 2, d_in, device=device), torch.randn(2, 7, 2, d_out, device=device)
    )


MATRICES = {
    "kfac": kfac,
    "ekfac": ekfac,
    "amortised": lambda io: AmortisedEKFAC().update(None, io, 1.0),
    "sum": lambda io: KroneckerSum(kfac(io), kfac(io.reduced())),
}


@pytest.mark.everywhere
@pytest.mark.parametrize("name", MATRICES)
def test_round_trip_through_a_file_without_pickled_code(name, device):
    make = MATRICES[name]
    M = make(random_io(device))
    file = files.BytesIO()
    torch.save(tensors(M), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    back = restored(make(example_io(torch.empty(3, 5, device=device))), saved)
    assert type(back) is type(M)
    check_equal(back.dense(), M.dense())
    for damping in (0.1, 1.0):
        V = torch.randn(3, 5, device=device)
        check_equal(back.inverse(damping) @ V, M.inverse(damping) @ V)


@pytest.mark.everywhere
def test_inverses_are_restored_as_matrices_are(device):
    M = MATRICES["sum"](random_io(device))  # its inverse holds the matrix and a number
    inverse = M.inverse(0.3)
    like = MATRICES["sum"](example_io(torch.empty(3, 5, device=device))).inverse(1.0)
    V = torch.randn(3, 5, device=device)
    check_equal(restored(like, tensors(inverse)) @ V, inverse @ V)


def test_another_structure_is_refused(device):
    saved = tensors(kfac(random_io(device)))
    with pytest.raises(ValueError, match=r"holds \['A', 'B'\], but a KroneckerEigen"):
        restored(ekfac(random_io(device)), saved)


def test_an_example_has_the_shape_of_its_layer(device):
    io = example_io(torch.empty(3, 5, device=device))
    assert (io.a.shape, io.g.shape) == ((1, 1, 5), (1, 1, 1, 3))
    assert io.a.device.type == device.type
