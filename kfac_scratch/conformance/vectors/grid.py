"""Numbers that are the same on every machine, although their last bits are not.

Two builds of PyTorch differ in the last bits of a sum. Rounded to a coarser grid, they agree,
unless a number lies so close to the middle between two grid points that the last bits decide. Those
few numbers are listed as ties, with the grid point that was taken once and for all.

The grid's cell is `2^-bits` times the power of two above a tensor's largest entry, so rounding
changes nothing by more than `2^-bits` of the largest entry: 4e-12 for 38 bits, far below the
judge's 1e-10.
"""

from collections.abc import Mapping
from math import ceil, log2

import torch
from torch import Tensor

LISTED = 2.0**-45  # this close to the middle, relative to the largest entry, a number is listed
AMBIGUOUS = 2.0**-49  # this close, one that is not listed is refused


def cell(x: Tensor, bits: int) -> float:
    """The distance of grid points; 1 for a tensor of zeros."""
    largest = float(x.abs().max()) if x.numel() else 0.0
    if largest == 0:
        return 1.0
    return 2.0 ** (ceil(log2(largest * (1 + 2.0**-30))) - bits)


def snapped(x: Tensor, bits: int, ties: Mapping[str, int]) -> Tensor:
    """The nearest grid points; for the entries that are listed, the points that are given.

    Args:
        x: Any floats.
        bits: How fine the grid is.
        ties: Multiples of the cell by index into the flat tensor (a string, as JSON has it).

    Raises:
        ValueError: If an entry is too close to a middle and not listed, or listed and elsewhere.
    """
    steps = x.flatten() / cell(x, bits)
    places = steps.round()
    listed = [int(i) for i in ties]
    unsure = set(close(steps, AMBIGUOUS * 2**bits)) - set(listed)
    if unsure:
        raise ValueError(f"the entries {sorted(unsure)} lie between two grid points; list them.")
    if listed:
        taken = torch.tensor([ties[str(i)] for i in listed], dtype=steps.dtype)
        if ((steps[listed] - taken).abs() > 0.5 + 2 * LISTED * 2**bits).any():
            raise ValueError(f"the ties {ties} are not those of these numbers.")
        places[listed] = taken
    return (places * cell(x, bits) + 0.0).reshape(x.shape)  # + 0.0 turns -0.0 into 0.0


def ties(x: Tensor, bits: int) -> dict[str, int]:
    """Entries too close to a middle for other machines to agree, and the points for them."""
    steps = x.flatten() / cell(x, bits)
    return {str(i): int(steps[i].round()) for i in close(steps, LISTED * 2**bits)}


def close(steps: Tensor, band: float) -> list[int]:
    """Which entries lie in a band, in cells, around the middle between grid points."""
    off = ((steps - steps.floor()) - 0.5).abs()
    return torch.nonzero(off < band).flatten().tolist()
