"""Laws that every structured matrix obeys, as checks that any test may call."""

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry of what is expected."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    assert actual.dtype == expected.dtype, (actual.dtype, expected.dtype)
    assert actual.device == expected.device, (actual.device, expected.device)
    actual, expected = actual.detach(), expected.detach()
    size = expected.abs().max()
    assert size > 0, "a zero matrix proves nothing"
    return float((actual - expected).abs().max() / size)


def check_equal(actual: Tensor, expected: Tensor) -> None:
    found = error(actual, expected)
    assert found <= TOLERANCE[expected.dtype], f"relative error {found:.2e}"


def check_differs(actual: Tensor, expected: Tensor, by: float = 0.01) -> None:
    found = error(actual, expected)
    assert found >= by, f"relative error only {found:.2e}"


def check_matrix(M, shape: tuple[int, int], damping: float = 0.1) -> None:
    """Dense, product and damped inverse of a matrix belong together."""
    dense = M.dense()
    eye = torch.eye(len(dense), dtype=dense.dtype, device=dense.device)
    V = torch.randn(3, *shape, dtype=dense.dtype, device=dense.device)
    check_equal(dense, dense.T)
    check_equal(M @ V, (V.flatten(1) @ dense).reshape(V.shape))
    check_equal(M @ V[0], (M @ V)[0])  # a batch is its members
    check_equal(M.inverse(damping) @ (M @ V + damping * V), V)
    solved = torch.linalg.solve(dense + damping * eye, V.flatten(1).T).T.reshape(V.shape)
    check_equal(M.inverse(damping) @ V, solved)


def check_spectrum(M, damping: float = 0.1) -> None:
    """Trace, diagonal, eigenvalues, log-determinant and roots are those of the dense twin."""
    dense = M.dense()
    eye = torch.eye(len(dense), dtype=dense.dtype, device=dense.device)
    eigenvalues = torch.linalg.eigvalsh(dense)
    check_equal(M.trace(), dense.trace())
    check_equal(M.diagonal(), dense.diagonal())
    check_equal(M.eigenvalues(), eigenvalues)
    check_equal(M.logdet(damping), torch.logdet(dense + damping * eye))
    check_equal(M.sqrt().dense() @ M.sqrt().dense().T, dense)
    R = M.inverse_sqrt(damping).dense()
    check_equal(R @ R.T, torch.linalg.inv(dense + damping * eye))
