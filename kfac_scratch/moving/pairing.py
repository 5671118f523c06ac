"""Inputs and vectors that meet more or less at random: KFAC's error is their covariance."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.moving.drawing import Number, Panel, Scale, grid, ticks
from kfac_scratch.moving.figure import MovingFigure, Slider

REPEATS, _CELL = 20, 30


class Paired(NamedTuple):
    """A layer whose inputs and vectors were paired, and what KFAC makes of it."""

    io: LayerIO
    exact: Float[Tensor, "D D"]
    product: Float[Tensor, "D D"]
    error: float
    covariance: float


def paired(a: Float[Tensor, "k d_in"], g: Float[Tensor, "k d_out"], share: Number) -> Paired:
    """A layer on `20 k**2` samples, each with one of `k` inputs and one of `k` vectors.

    In a share of the samples input `i` meets vector `i`; in the others every input meets every
    vector equally often. So both factors are the same for every share.

    Args:
        a: The inputs.
        g: The vectors. They are divided by the root of the number of samples, as for a mean loss.
        share: A whole number of twentieths.

    Returns:
        The layer, its exact block, KFAC's product, the norm of the difference, and `N` times the
        norm of the covariance of both outer products, which is the same by Theorem 5.1.
    """
    matched = round(REPEATS * share)
    k, each = len(a), torch.arange(len(a), device=a.device)
    counts = (REPEATS - matched) * a.new_ones(k, k) + matched * k * eye_like(a @ a.T)
    repeats = counts.flatten().long()  # vector after vector
    i = each.repeat(k).repeat_interleave(repeats)
    j = each.repeat_interleave(k).repeat_interleave(repeats)
    N = len(i)
    io = LayerIO(a[i].unsqueeze(1), (g[j] / N**0.5).unsqueeze(1).unsqueeze(0))
    exact, product = io.block(), kfac(io).dense()
    entries_B = torch.einsum("ni,nj->nij", io.g[0, :, 0], io.g[0, :, 0]).flatten(1)
    entries_A = torch.einsum("ni,nj->nij", io.a[:, 0], io.a[:, 0]).flatten(1)
    centred = (entries_B - entries_B.mean(0), entries_A - entries_A.mean(0))
    covariance = (centred[0].T @ centred[1]).norm().item()
    return Paired(io, exact, product, (exact - product).norm().item(), covariance)


def matched_pairs(
    a: Float[Tensor, "k d_in"], g: Float[Tensor, "k d_out"], share: Number = 0.6
) -> MovingFigure:
    """Draw KFAC's error while inputs and vectors become dependent, with a slider for how much.

    Use it for few pairs of a small layer: each entry of the block is drawn three times.

    Args:
        a: The inputs, which are sorted by their length.
        g: As many vectors, which are sorted by their length, too.
        share: How many of the samples are matched pairs, at the start: twentieths.

    Raises:
        ValueError: If the share is not between zero and one.

    Source: Chapter 5, Theorem 5.1.
    """
    a, g = (t.detach().double().cpu() for t in (a, g))
    a, g = (t[t.norm(dim=1).argsort()] for t in (a, g))
    slider = Slider("share", "share of matched pairs", 0, 1, 1 / REPEATS, share)
    now, last = paired(a, g, slider.value), paired(a, g, 1.0)
    limit = float(max(last.exact.abs().max(), last.product.abs().max()))
    panels = (
        _counts(len(a), slider.value),
        _matrix("exact", "exact <i>F</i>", now.exact, limit),
        _matrix("product", "<i>B</i> ⊗ <i>A</i>", now.product, limit),
        _matrix("lost", "difference", now.exact - now.product, limit),
        _error(last.error, now, slider.value),
    )
    return MovingFigure(
        "matched_pairs",
        panels,
        (slider,),
        {"a": a.tolist(), "g": g.tolist(), "repeats": REPEATS, "limit": limit},
        f"‖<i>F</i> − <i>B</i> ⊗ <i>A</i>‖ = <b>{now.error:.6f}</b>, "
        f"<i>N</i> ‖Cov‖ = <b>{now.covariance:.6f}</b>",
        "<b>Move the slider</b> from pairs at random, all equally often, to matched ones, where "
        "long inputs meet long vectors. The exact block changes. <i>B</i> ⊗ <i>A</i> does not, "
        "because the inputs and the vectors stay the same and only their pairing changes. The "
        "error (line) is <i>N</i> times the norm of the covariance (○) at every position: Theorem "
        "5.1.",
        "Circles that show how often each input meets each vector; three small matrices, the "
        "exact block, KFAC's product and their difference; and KFAC's error, a straight line from "
        "zero over the share of matched pairs.",
    )


def _counts(k: int, share: Number) -> Panel:
    x, y = Scale(-0.5, k - 0.5, 26, 200), Scale(-0.5, k - 0.5, 178, 4)
    panel = Panel("counts", "how often a pair occurs", x, y, (220, 206))
    panel.add("rect", "frame", x=26, y=4, width=174, height=174)
    panel.text(113, 197, "inputs a: short → long", anchor="middle")
    turned = {"transform": "translate(14 91) rotate(-90)", "text_anchor": "middle"}
    panel.add("text", text="vectors g: short → long", **turned)
    for j in range(k):
        for i in range(k):
            count = 1 - share + (share * k if i == j else 0)
            place = {"cx": x.at(i), "cy": y.at(j), "r": 5 * count**0.5}
            panel.add("circle", "dot kfac", f"pair {j} {i}", **place)
    return panel


def _matrix(name: str, title: str, M: Tensor, limit: float) -> Panel:
    panel = grid(name, title, len(M), len(M), _CELL)
    panel.matrix(name, M.tolist(), limit)
    return panel


def _error(top: float, now: Paired, share: Number) -> Panel:
    high = 1.12 * top
    panel = Panel(
        "error", "error of KFAC", Scale(0, 1, 40, 228), Scale(0, high, 168, 22), (240, 206)
    )
    panel.axes([0, 0.5, 1], ticks(high, most=3), ("share of matched pairs", ""))
    panel.add("path", "line kfac", d=panel.path([(0, 0), (1, top)]))
    panel.add("circle", "dot kfac", "error", r=5, cx=panel.x.at(share), cy=panel.y.at(now.error))
    place = {"cx": panel.x.at(share), "cy": panel.y.at(now.covariance)}
    panel.add("circle", "ring", "covariance", r=9, **place)
    panel.text(48, 34, "— ‖F − B ⊗ A‖", "kfac")
    panel.text(48, 52, "○ N ‖Cov‖")
    return panel
