"""Damping as a filter over a spectrum: what each direction keeps of its Newton step."""

import math
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor

from kfac_scratch.moving.drawing import Number, Panel, Scale, significant, ticks
from kfac_scratch.moving.figure import MovingFigure, Slider

ZERO = 1e-10  # smaller shares of the largest eigenvalue are round-off
MOST_DRAWN = 300  # as many directions are drawn


def damping_filter(eigenvalues: Float[Tensor, " D"], damping: Number = 1e-4) -> MovingFigure:
    r"""Draw the filter $\lambda / (\lambda + \delta)$ over a spectrum, with a slider for $\delta$.

    The left panel has the filter against the eigenvalue, with a tick for every eigenvalue. The
    right one has the filter's value for every eigenvalue, from the largest to the smallest. Their
    sum is the number of directions in which the damped step is still a Newton step.

    Args:
        eigenvalues: Those of a positive semi-definite matrix, in any order.
        damping: The damping at the start. The slider has 20 positions for each power of ten, and
            the nearest one counts.

    Raises:
        ValueError: If no eigenvalue is positive, or the damping lies outside of the axis.

    Source: Chapter 9, equation (9.4).
    """
    spectrum = eigenvalues.detach().double().cpu().sort(descending=True).values
    positive = spectrum[spectrum > ZERO * spectrum[0]].tolist()
    if not positive or positive[0] <= 0:
        raise ValueError("A filter needs at least one positive eigenvalue.")
    top = math.ceil(math.log10(positive[0])) + 1
    slider = Slider("damping", "damping δ", top - 10, top, 0.05, math.log10(damping), log=True)
    damping, low, high = slider.value, 10.0**slider.low, 10.0**slider.high
    numbers = {"eigenvalues": [float(f"{v:.12g}") for v in positive], "directions": len(spectrum)}
    stride = math.ceil(len(positive) / MOST_DRAWN)
    panels = (
        _curve(positive, damping, Scale(low, high, 36, 388, log=True)),
        _shares(positive, damping, Scale(0, len(spectrum), 36, 388), stride),
    )
    return MovingFigure(
        "damping_filter",
        panels,
        (slider,),
        numbers | {"stride": stride},
        _state(positive, damping, len(spectrum)),
        "<b>Move the damping</b> with the slider, or drag the knob. A direction keeps the share "
        "<i>λ</i>&thinsp;/&thinsp;(<i>λ</i>&thinsp;+&thinsp;<i>δ</i>) of its Newton step, one "
        "half where <i>λ</i> = <i>δ</i>. The short lines on the left axis are the eigenvalues. "
        "The shaded area on the right is the number of directions in which the step is still a "
        "Newton step.",
        "An S-shaped curve over the logarithm of the eigenvalue, which is one half at the "
        "damping, and the same shares in the order of the eigenvalues, as an area that falls from "
        "one to zero.",
    )


def _keeps(eigenvalue: float, damping: Number) -> float:
    return eigenvalue / (eigenvalue + damping)


def _curve(spectrum: list[float], damping: Number, x: Scale) -> Panel:
    panel = Panel("filter", "What a direction keeps", x, Scale(0, 1, 226, 30), (400, 270))
    low, high = (round(math.log10(v)) for v in (x.low, x.high))
    panel.axes(
        [10.0**k for k in range(low, high + 1, 2)],
        [0, 0.5, 1],
        ("eigenvalue λ", "share of the Newton step: λ / (λ + δ)"),
    )
    places = sorted({round(2 * x.at(v)) / 2 for v in spectrum if v > x.low})
    panel.add("path", "spectrum", d="".join(f"M{place:g} 226v-9" for place in places))
    values = [x.low * (x.high / x.low) ** (k / 160) for k in range(161)]
    points = [(v, _keeps(v, damping)) for v in values]
    panel.add("path", "line kfac", "curve", d=panel.path(points))
    panel.add("path", "guide", "guide", d=panel.path([(damping, 0), (damping, 1)]))
    knob = {"cx": x.at(damping), "cy": panel.y.at(0.5)}
    panel.add("circle", "hit", "hit", r=27, **knob)
    panel.add("circle", "knob", "knob", r=9, **knob)
    return panel


def _shares(spectrum: list[float], damping: Number, x: Scale, stride: int) -> Panel:
    panel = Panel("shares", "All directions, in order", x, Scale(0, 1, 226, 30), (400, 270))
    panel.axes(
        ticks(x.high), [0, 0.5, 1], (f"directions, {x.high} in all", "share, by the size of λ")
    )
    shown = [*range(0, len(spectrum), stride), len(spectrum)]
    corners = [(float(shown[0]), 0.0)]
    for i, j in pairwise(shown):
        share = _keeps(spectrum[i], damping)
        corners += [(i, share), (j, share)]
    panel.add("path", "area kfac", "area", d=panel.path([*corners, (len(spectrum), 0.0)]))
    zeros = round(x.high) - len(spectrum)
    if zeros:
        place = panel.x.at(len(spectrum))
        panel.add("path", "zero", d=f"M{place:g} 223H{x.end:g}")
        panel.text(x.end, 21, f"{zeros} with λ = 0", anchor="end")
    return panel


def _state(spectrum: list[float], damping: Number, directions: int) -> str:
    kept = sum(_keeps(v, damping) for v in spectrum)
    above = sum(v > damping for v in spectrum)
    return (
        f"<i>δ</i> = {significant(damping)}: the step is a Newton step in <b>{kept:.2f}</b> of "
        f"{directions} directions, the sum of all shares. {above} eigenvalues exceed <i>δ</i>."
    )
