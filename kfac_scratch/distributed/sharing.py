"""Who does what: every layer has an owner, and every owner has a column of processes.

`P` processes stand in a grid of `m` rows and `P / m` columns. The owner of a layer inverts its
matrix, all processes of the owner's column hold the inverse and apply it, and each of them sends
the result to its row. With `m = P` there is one column: all hold everything, and nothing is sent
after the inverses (comm-opt). With `m = 1` only the owner holds an inverse, and sends a
direction in every step (mem-opt).

Everything here is a function of numbers and names, so that all processes come to the same result
without a word.

Sources: Pauloski et al. 2021 (arXiv:2107.01739), for the grid and its names; Graham 1969, "Bounds
on Multiprocessing Timing Anomalies", for the assignment, which their code has as well
(github.com/gpauloski/kfac-pytorch at 869cf11, `kfac/assignment.py`, line 228).
"""

from collections.abc import Mapping


def assignment(
    costs: Mapping[str, float], size: int, known: Mapping[str, int] | None = None
) -> dict[str, int]:
    """The owner of every layer: the most expensive layer first, to the process with least work.

    Use it for layers of different widths. Not for a guarantee of the optimum: the busiest process
    has at most `4/3 - 1/(3 * size)` times the least possible work (Graham 1969).

    Args:
        costs: What the inverse of each layer costs, in any unit.
        size: The number of processes.
        known: Owners that some layers have already, and keep.

    Returns:
        The owner of every layer, from 0 on. Ties go to the earlier layer and to the lower number.
    """
    owners = dict(known or {})
    load = [0.0] * size
    for name, owner in owners.items():
        load[owner] += costs.get(name, 0.0)
    for name in sorted(costs, key=costs.__getitem__, reverse=True):
        if name not in owners:
            owners[name] = min(range(size), key=load.__getitem__)
            load[owners[name]] += costs[name]
    return owners


def gradient_workers(workers: float, size: int) -> int:
    """The number of processes that hold each inverse.

    Args:
        workers: The share of all processes, from 0 (one of them) to 1 (all of them).
        size: The number of processes.

    Raises:
        ValueError: If the share is not in [0, 1], or the number does not divide `size`.
    """
    if not 0 <= workers <= 1:
        raise ValueError(f"workers must lie in [0, 1], got {workers}.")
    rows = max(1, round(workers * size))
    if size % rows:
        fitting = [m / size for m in range(1, size + 1) if size % m == 0]
        raise ValueError(
            f"workers={workers} makes {rows} of {size} processes hold each inverse, which does not "
            f"divide {size}. Shares that do: {', '.join(f'{share:.4g}' for share in fitting)}."
        )
    return rows


def columns(size: int, rows: int) -> list[list[int]]:
    """The processes of every column of the grid: those that hold the same inverses."""
    width = size // rows
    return [list(range(column, size, width)) for column in range(width)]


def grid_rows(size: int, rows: int) -> list[list[int]]:
    """The processes of every row of the grid: one of each column, which send to each other."""
    width = size // rows
    return [list(range(row * width, (row + 1) * width)) for row in range(rows)]
