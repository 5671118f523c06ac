"""Four methods in one valley: what a curvature matrix makes of a gradient."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, MSELoss, Sequential, Tanh
from torch.nn.utils import skip_init

from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.curvature import ggn, hessian
from kfac_scratch.moving.drawing import Number, Panel, Scale, markers, swatch
from kfac_scratch.moving.figure import MovingFigure, Slider

STEPS, RATE, FAR = 15, 0.25, 99.0
METHODS = {  # by the name of their colour
    "gradient": f"gradient, {RATE} of it",
    "newton": "Newton: Hessian",
    "ggn": "Gauss-Newton: GGN",
    "kfac": "KFAC: B ⊗ A per layer",
}
INPUTS = (-1.5, -1.1, -0.6, -0.2, 0.3, 0.7, 1.2, 1.6)
NOISE = (0.1, -0.2, 0.1, 0.2, -0.1, -0.1, 0.2, -0.1)
U, W = Scale(-0.5, 3.3, 34, 392), Scale(-0.5, 2.9, 334, 24)

Paths = dict[str, list[list[float]]]
"""The points of every method, each a pair of weights."""


class TwoWeights:
    """The network `f(x) = w tanh(u x)` with a squared error on eight points, which is a picture."""

    def __init__(self) -> None:
        x = torch.tensor(INPUTS, dtype=torch.float64)
        one, two = (skip_init(Linear, 1, 1, bias=False) for _ in range(2))
        self.model = Sequential(one, Tanh(), two).double()
        self.loss, self.X = MSELoss(), x[:, None]
        self.y = (1.1 * torch.tanh(x) + x.new_tensor(NOISE))[:, None]

    def at(self, weights: Tensor) -> Tensor:
        """The loss at weights `(u, w)`, where the network is left."""
        with torch.no_grad():
            for p, value in zip(self.model.parameters(), weights, strict=True):
                p.fill_(value)
        return self.loss(self.model(self.X), self.y)

    def curvature(self, method: str) -> Tensor:
        """The matrix that a method inverts, at the present weights: `[2, 2]`."""
        problem = (self.model, self.loss, self.X, self.y)
        if method == "newton":
            return hessian(*problem)
        if method == "ggn":
            return ggn(*problem)
        return torch.block_diag(*(kfac(io).dense() for io in layer_ios(*problem).values()))

    def step(self, method: str, weights: Tensor, damping: Number) -> Tensor:
        """The weights after one step of a method."""
        slopes = torch.autograd.grad(self.at(weights), list(self.model.parameters()))
        gradient = torch.stack(slopes).flatten()
        if method == "gradient":
            return weights - RATE * gradient
        M = self.curvature(method) + damping * torch.eye(2, dtype=torch.float64)
        return weights - torch.linalg.solve(M, gradient)


def valley_paths(start: tuple[Number, Number], damping: Number) -> tuple[Paths, dict[str, float]]:
    """The paths of four methods from a start in the valley, and the loss at the end of each.

    Args:
        start: The two weights `(u, w)`.
        damping: Added to the diagonal of every matrix that is inverted.
    """
    valley, paths, last = TwoWeights(), Paths(), {}
    for method in METHODS:
        weights = torch.tensor(start, dtype=torch.float64)
        paths[method] = [weights.tolist()]
        for _ in range(STEPS):
            weights = valley.step(method, weights, damping)
            paths[method].append(weights.tolist())
        last[method] = valley.at(weights).item()
    return paths, last


def valley_steps(start: tuple[Number, Number] = (2.7, 2.3), damping: Number = 0.1) -> MovingFigure:
    """Draw four methods' steps in a valley, with a start to drag and a slider for the damping.

    The methods are gradient descent, Newton with the Hessian, Gauss-Newton with the GGN, and KFAC.
    The loss is that of `w tanh(u x)` on eight points. All numbers are float64.

    Args:
        start: The two weights `(u, w)` where all methods begin.
        damping: Added to the diagonal of every matrix that is inverted.

    Raises:
        ValueError: If the start or the damping lies outside of the axes.
    """
    sliders = (
        Slider("u", "start: first weight u", U.low, U.high, 0.05, start[0]),
        Slider("w", "start: second weight w", W.low, W.high, 0.05, start[1]),
        Slider("damping", "damping δ", -4, 1, 0.05, math.log10(damping), log=True),
    )
    (u, w), damping = (sliders[0].value, sliders[1].value), sliders[2].value
    paths, last = valley_paths((u, w), damping)
    (x, y), lowest = _points(), _minimum()
    rows = "".join(
        f'<tr><td>{swatch(method)} {words}</td><td data-move="loss {method}">'
        f"{loss_in_words(last[method])}</td></tr>"
        for method, words in METHODS.items()
    )
    return MovingFigure(
        "valley_steps",
        (_land(paths, (u, w)),),
        sliders,
        {"x": x, "y": y, "rate": RATE, "steps": STEPS},
        f"From <i>u</i> = {u:.2f}, <i>w</i> = {w:.2f} ".replace("-", "−")
        + f"KFAC ends at a loss of <b>{loss_in_words(last['kfac'])}</b>, "
        + f"Newton’s method at <b>{loss_in_words(last['newton'])}</b>.",
        "<b>Drag the start</b>, or move it with the sliders; then move the damping. Every method "
        "but the gradient takes the step −(<i>M</i> + <i>δI</i>)⁻¹∇<i>L</i>, and only <i>M</i> "
        "differs. At <i>u</i> = 0.4, <i>w</i> = 0.5 with <i>δ</i> = 0.1 the Hessian has an "
        "eigenvalue of about −<i>δ</i>, so that its damped inverse is huge and Newton’s first step "
        "leaves the picture; the GGN goes straight to the minimum. With the least damping the "
        "GGN’s steps are too long there as well.",
        "The contours of a curved valley over two weights, with the paths of gradient descent, "
        "Newton, Gauss-Newton and KFAC from one start; the last two reach the minimum in few "
        "steps.",
        f"<table><thead><tr><th>method</th><th>loss after {STEPS} steps</th></tr></thead>"
        f"<tbody>{rows}"
        f"<tr><td>the minimum</td><td>{lowest:.5f}</td></tr></tbody></table>",
    )


def loss_in_words(loss: float) -> str:
    """A loss with five digits, or that it is very large."""
    return f"{loss:.5f}" if loss <= FAR else f"above {FAR:g}"


def _points() -> tuple[list[float], list[float]]:
    valley = TwoWeights()
    return valley.X.flatten().tolist(), valley.y.flatten().tolist()


def _minimum() -> float:
    valley, weights = TwoWeights(), torch.tensor([0.9, 1.1], dtype=torch.float64)
    for _ in range(30):
        weights = valley.step("ggn", weights, 1e-9)
    return valley.at(weights).item()


def _land(paths: Paths, start: tuple[Number, Number]) -> Panel:
    panel = Panel("land", "The loss over two weights, and four paths", U, W, (400, 374))
    panel.axes([0, 1, 2, 3], [0, 1, 2], ("first weight u", "second weight w"))
    panel.nodes.append(
        f'<clipPath id="valley-clip"><rect x="{U.start}" y="{W.end}" width="{U.end - U.start}" '
        f'height="{W.start - W.end}"/></clipPath><g clip-path="url(#valley-clip)">'
    )
    for line in _contours():
        panel.add("path", "contour", d=panel.path(line, digits=4))
    for method, path in paths.items():
        ends = {f"marker_{end}": f"url(#valley-{method})" for end in ("start", "mid", "end")}
        points = [(_drawn(u), _drawn(w)) for u, w in path]
        panel.add("path", f"line {method}", f"path {method}", d=panel.path(points), **ends)
    panel.nodes.append("</g>" + markers("valley", METHODS))
    knob = {"cx": U.at(start[0]), "cy": W.at(start[1])}
    panel.add("circle", "hit", "hit", r=27, **knob)
    panel.add("circle", "knob", "knob", r=9, **knob)
    return panel


def _drawn(weight: float) -> float:
    """Where a weight is drawn: not farther away than a browser can draw."""
    return min(max(weight, -FAR), FAR)


def _contours() -> Iterable[list[tuple[float, float]]]:
    """Lines of equal loss, from matplotlib's contours."""
    import contourpy
    import numpy as np

    valley = _points()
    u, w = np.meshgrid(np.linspace(U.low, U.high, 76), np.linspace(W.low, W.high, 70))
    f = w[..., None] * np.tanh(u[..., None] * np.array(valley[0]))
    loss = ((f - np.array(valley[1])) ** 2).mean(-1)
    generator = contourpy.contour_generator(u, w, loss)
    for level in loss.min() + np.geomspace(0.004, 6, 13):
        lines: Any = generator.lines(level)
        for line in lines:
            yield [(float(a), float(b)) for a, b in line]
