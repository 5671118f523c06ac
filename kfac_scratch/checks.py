"""What chapters check with: exact where a theorem holds, a distance where none does.

- `assert_exact` is for theorems: no entry is off by more than a tiny share of the largest one.
- `largest_error` is the number that `assert_exact` compares with its tolerance. Print it, or
  bound it from below where a theorem says that two things must differ.
- `relative_error` is for approximations: one number for the whole matrix, in Frobenius' norm.
- `set_up` makes a script repeatable. It is for the first cell of a chapter, never for a library.

Both measures refuse what would prove nothing: tensors of different shapes, which would be broadcast
silently, and an expected value that is zero everywhere.
"""

import torch
from torch import Tensor


def set_up(seed: int = 0, *, dtype: torch.dtype = torch.float64, device: str | None = None) -> None:
    """Start a chapter: seed every generator, and set the dtype and device of new tensors.

    This changes PyTorch's global state.

    Args:
        seed: Seed of PyTorch's generators on all devices.
        dtype: Default dtype of floating-point tensors. Float64 tells a theorem from a coincidence.
        device: Default device of new tensors, by default the GPU if there is one, else the CPU.
    """
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_default_device(None if device == "cpu" else device)  # "cpu" is None, but slower


def assert_exact(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    """Assert that two tensors agree in every entry, up to rounding.

    Law: passes if and only if `largest_error(actual, expected) <= tolerance`, so that a tensor that
    holds NaN or infinity never passes.

    Args:
        actual: What was computed, of any shape.
        expected: What it must be, of the same shape and not zero.
        tolerance: Largest difference that is rounding, as a share of the largest entry of
            `expected`. The default is for float64 and one decomposition or solve; be stricter
            where only products are formed.

    Raises:
        AssertionError: If an entry is off by more, or if there is nothing to compare.
    """
    error = largest_error(actual, expected)
    if not error <= tolerance:
        raise AssertionError(
            f"off by {error:.1e} of the largest entry; at most {tolerance:.1e} is rounding"
        )


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """The largest difference of two entries, as a share of the largest entry of `expected`.

    Args:
        actual: What was computed, of any shape.
        expected: What it is compared with, of the same shape and not zero.

    Raises:
        AssertionError: If the shapes differ, or if `expected` is zero or empty.
    """
    _check_comparable(actual, expected)
    return float(((actual - expected).abs().max() / expected.abs().max()).detach())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    r"""The distance $\lVert M - F \rVert / \lVert F \rVert$ of an approximation $M$ from $F$.

    The norm is Frobenius', the root of the sum of all squared entries. 0 is exact, and
    1 is as far off as if the approximation were zero.

    Args:
        actual: The approximation, of any shape.
        expected: What it approximates, of the same shape and not zero.

    Raises:
        AssertionError: If the shapes differ, or if `expected` is zero or empty.
    """
    _check_comparable(actual, expected)
    return float(((actual - expected).norm() / expected.norm()).detach())


def _check_comparable(actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {list(actual.shape)}, not {list(expected.shape)}")
    if not expected.any():
        raise AssertionError("the expected value is zero: agreeing with it would prove nothing")
