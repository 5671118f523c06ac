"""Eigenpairs that follow a stream of batches: what B-KFAC keeps of a factor, batch after batch."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.brand import TruncatedFactor, updated_factor
from kfac_scratch.approximations.estimators import weight_of_newest
from kfac_scratch.approximations.randomized import trace_matched
from kfac_scratch.checks import relative_error
from kfac_scratch.linalg import psd_eigh
from kfac_scratch.moving.drawing import Panel, Scale
from kfac_scratch.moving.figure import MovingFigure, Slider
from kfac_scratch.moving.filtering import ZERO

GAMMA = 0.1  # the damping of the error that is told, as a share of the largest eigenvalue
DECADES = 4  # of eigenvalues that are drawn


@dataclass(frozen=True)
class _Factor:
    """B-KFAC's factor after a batch, in the eight digits that Python and the script draw."""

    pairs: list[float]  # its eigenvalues
    shares: list[float]  # of each exact eigenvector, in the span of its own
    tail: float
    error: float  # of the damped inverse


def online_eigenpairs(
    batches: Sequence[Float[Tensor, "d K"]],
    ranks: Sequence[int] = (2, 4, 8, 12),
    decay: float = 0.9,
    seen: int = 12,
    rank: int = 1,
) -> MovingFigure:
    r"""Draw B-KFAC's factor beside the exact moving average, with sliders for batches and rank.

    The left panel has the eigenvalues of both after the batches so far. B-KFAC has `ranks[rank]`
    eigenpairs before a batch and up to $K$ more after it; all other directions have its tail. The
    right panel has, for each eigenvector $v$ of the exact average, the share
    $\lVert U^\top v \rVert^2$ that lies in the span of B-KFAC's eigenvectors $U$.

    Args:
        batches: The columns of each batch. The average after it has $X X^\top$ as its newest term.
        ranks: Numbers of eigenpairs before a batch, each of them a position of a slider.
        decay: Of the moving average, which is bias-corrected.
        seen: How many batches have gone by at the start.
        rank: The position among `ranks` at the start, counted from zero.

    Raises:
        ValueError: If there is no batch, or `ranks` leaves no room for a batch's columns.

    Source: Chapter 19, Theorem 19.1 and equation (19.2).
    """
    if not batches:
        raise ValueError("A stream needs at least one batch.")
    d, K = batches[0].shape
    if max(ranks) + K > d:
        raise ValueError(
            f"{max(ranks)} eigenpairs and {K} columns exceed the {d} rows of a batch: B-KFAC would "
            "keep all of them. Use smaller ranks."
        )
    columns = [X.detach().double().cpu() for X in batches]
    averages = _averages(columns, decay)
    kept = [_followed(columns, averages, r, decay) for r in ranks]
    exact = [_short(psd_eigh(M)[0].flip(0)) for M in averages]
    at = kept[rank][seen - 1]
    sliders = (
        Slider("seen", "batches", 1, len(batches), 1, seen),
        Slider("rank", "eigenpairs r", 0, len(ranks) - 1, 1, rank, words=tuple(map(str, ranks))),
    )
    numbers = {
        "ranks": list(ranks),
        "exact": exact,
        "pairs": [[factor.pairs for factor in of] for of in kept],
        "tails": [[factor.tail for factor in of] for of in kept],
        "shares": [[factor.shares for factor in of] for of in kept],
        "errors": [[factor.error for factor in of] for of in kept],
    }
    top = 2 * max(map(max, exact))
    return MovingFigure(
        "online_eigenpairs",
        (_spectra(exact[seen - 1], at, top), _captured(at.shares)),
        sliders,
        numbers,
        _state(at, seen, ranks[rank]),
        "<b>Let batches go by</b> with the first slider, and keep more or fewer eigenpairs with "
        "the second. On the left are the eigenvalues of the exact average and of B-KFAC. "
        "Behind the dashed line B-KFAC has no eigenpairs, but one common eigenvalue, the tail. On "
        "the right is the share of each exact eigenvector that lies in the span of B-KFAC’s "
        "eigenvectors.",
        "Two falling staircases of eigenvalues, of the exact moving average and of B-KFAC, which "
        "agree for the leading ones; and bars, one for each exact eigenvector, that are one for "
        "the leading ones and small for the others.",
    )


def _averages(batches: Sequence[Tensor], decay: float) -> list[Tensor]:
    """The exact moving averages, formed."""
    M, found = torch.zeros_like(batches[0] @ batches[0].mT), []
    for t, X in enumerate(batches, start=1):
        w = weight_of_newest(decay, t)
        M = (1 - w) * M + w * X @ X.mT
        found.append(M)
    return found


def _followed(
    batches: Sequence[Tensor], averages: Sequence[Tensor], rank: int, decay: float
) -> list[_Factor]:
    """B-KFAC's factor after each batch, beside the exact average."""
    d = len(averages[0])
    zero = averages[0].new_zeros(())
    factor: TruncatedFactor = (zero.new_zeros(d, 0), zero.new_zeros(0), zero)
    kept = []
    for t, (X, M) in enumerate(zip(batches, averages, strict=True), start=1):
        factor = updated_factor(factor, X, weight_of_newest(decay, t), rank, trace_matched)
        U, values, tail = factor
        exact, V = (part.flip(-1) for part in psd_eigh(M))
        shares = (U.mT @ V).square().sum(0)
        shares[exact <= ZERO * exact[0]] = 0  # directions that no batch has reached yet
        own = (U * (values - tail)) @ U.mT + tail * torch.eye(d).to(M)
        damping = GAMMA * exact[0] * torch.eye(d).to(M)
        error = relative_error(torch.linalg.inv(own + damping), torch.linalg.inv(M + damping))
        told = torch.stack([tail, tail.new_tensor(error)])
        kept.append(_Factor(_short(values), _short(shares), *_short(told)))
    return kept


def _short(values: Tensor) -> list[float]:
    return [float(f"{v:.8g}") for v in values.tolist()]


def _spectra(exact: list[float], at: _Factor, top: float) -> Panel:
    d, low = len(exact), top / 10**DECADES
    panel = Panel(
        "spectrum",
        "Eigenvalues of the average",
        Scale(0, d, 44, 388),
        Scale(low, top, 226, 30, log=True),
        (400, 270),
    )
    powers = [10.0**k for k in range(-9, 9) if low <= 10.0**k <= top]
    panel.axes(range(0, d + 1, max(1, d // 5)), powers, ("number of the eigenvalue", "eigenvalue"))
    own = [*at.pairs, *[at.tail] * (d - len(at.pairs))]
    for style, name, values in (("line ggn", "exact", exact), ("line kfac", "kept", own)):
        steps = [(i + k, max(v, low)) for i, v in enumerate(values) for k in (0, 1)]
        panel.add("path", style, name, d=panel.path(steps))
    last = len(at.pairs)
    panel.add("path", "guide", "last", d=panel.path([(last, low), (last, top)]))
    panel.text(panel.x.end, 44, "exact average", "ggn", "end")
    panel.text(panel.x.end, 62, "B-KFAC", "kfac", "end")
    return panel


def _captured(shares: list[float]) -> Panel:
    d = len(shares)
    panel = Panel(
        "captured",
        "How much of each exact eigenvector B-KFAC has",
        Scale(0, d, 36, 388),
        Scale(0, 1, 226, 30),
        (400, 270),
    )
    panel.axes(range(0, d + 1, max(1, d // 5)), [0, 0.5, 1], ("number of the eigenvector", "share"))
    for i, share in enumerate(shares):
        width = panel.x.at(1) - panel.x.at(0) - 3
        size = {"y": panel.y.at(share), "height": panel.y.at(0) - panel.y.at(share)}
        panel.add("rect", "dot kfac", f"share {i}", x=panel.x.at(i) + 1.5, width=width, **size)
    return panel


def _state(at: _Factor, seen: int, rank: int) -> str:
    return (
        f"{seen} batches, <i>r</i> = {rank}: B-KFAC has {len(at.pairs)} eigenpairs and the tail "
        f"<b>{at.tail:.4f}</b>. The error of its damped inverse is <b>{at.error:.4f}</b>."
    )
