"""The triangle of probabilities: the Fisher of three classes, at every prediction."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import CrossEntropyLoss

from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import type2_classwise
from kfac_scratch.moving.drawing import Number, Panel, Scale
from kfac_scratch.moving.figure import MovingFigure, Slider

PLANE = torch.tensor(
    [[2**-0.5, -(2**-0.5), 0.0], [-(6**-0.5), -(6**-0.5), 2 * 6**-0.5]],
    dtype=torch.float64,
    device="cpu",
)
"""Two orthonormal directions of the plane in which three probabilities add up to one."""

X, Y, ANGLES = Scale(-0.95, 0.95, 4, 346), Scale(-0.66, 1.032, 304, 0), 72


def class_vectors(logits: Sequence[float]) -> tuple[Tensor, Tensor]:
    r"""The probabilities of three classes, and the vectors whose outer products sum to the Fisher.

    Args:
        logits: Three of them.

    Returns:
        `p` of shape `[3]`, and $\sqrt{p_c}\,(e_c - p)$ in the rows of a matrix `[3, 3]`.
    """
    f = PLANE.new_tensor([list(logits)])
    loss = CrossEntropyLoss(reduction="sum")
    return f.softmax(1)[0], type2_classwise(loss, f, torch.tensor([0], device="cpu"))[:, 0]


def fisher_ellipse(vectors: Tensor) -> Tensor:
    """The image of the unit circle under the root of the vectors' Fisher, in the plane: `[72, 2]`.

    A Fisher `H` has the root `(H + sqrt(det H) I) / sqrt(tr H + 2 sqrt(det H))` in two dimensions.
    """
    flat = vectors @ PLANE.T
    H = flat.T @ flat
    det = torch.linalg.det(H).clamp(min=0).sqrt()
    root = (H + det * eye_like(H)) / (H.trace() + 2 * det).sqrt()
    angles = PLANE.new_tensor(range(ANGLES)) * 2 * math.pi / ANGLES
    return torch.stack([angles.cos(), angles.sin()], 1) @ root


def probability_triangle(first: Number = 0.5, second: Number = -0.5) -> MovingFigure:
    """Draw a prediction for three classes as a point to drag, with its vectors and Fisher ellipse.

    The corners are certainty. The prediction is the softmax of three logits, the last of which is
    zero; two sliders move the others.

    Args:
        first: The first logit at the start, from -5 to 5.
        second: The second one.

    Raises:
        ValueError: If a logit lies outside of its range.

    Source: Chapter 3.
    """
    sliders = tuple(
        Slider(name, f"logit {words}, less logit 3", -5, 5, 0.05, start)
        for name, words, start in (("first", "1", first), ("second", "2", second))
    )
    p, vectors = class_vectors([sliders[0].value, sliders[1].value, 0.0])
    return MovingFigure(
        "probability_triangle",
        (_triangle(p, vectors),),
        sliders,
        {"angles": ANGLES},
        triangle_in_words(p.tolist()),
        "<b>Drag the prediction</b>, or move its logits. The arrows are the vectors "
        "√<i>p<sub>c</sub></i> (<i>e<sub>c</sub></i> − <i>p</i>), one towards each corner, and "
        "the ellipse is that of the Fisher with respect to the logits, the sum of the arrows’ "
        "outer products. All of them are largest where the prediction is undecided. They vanish "
        "at the corners, where another step of the logits changes hardly anything.",
        "A triangle whose corners are three classes, with a prediction in it, an arrow towards "
        "each corner and an ellipse around the prediction.",
    )


def triangle_in_words(p: Sequence[float]) -> str:
    """The probabilities and the trace of the Fisher, as HTML."""
    shown = ", ".join(f"{v:.3f}" for v in p)
    trace = 1 - sum(v * v for v in p)
    return f"<i>p</i> = ({shown}); the trace of the Fisher, 1 − ‖<i>p</i>‖², is <b>{trace:.3f}</b>."


def _triangle(p: Tensor, vectors: Tensor) -> Panel:
    panel = Panel("triangle", "A prediction for three classes", X, Y, (350, 324))
    corners = PLANE.T.tolist()
    panel.add("path", "edge", d=panel.path([tuple(c) for c in corners]) + "Z")
    for label, (x, y), anchor, shift in zip(
        "123", corners, ("end", "start", "middle"), (17, 17, -7), strict=True
    ):
        panel.text(X.at(x), Y.at(y) + shift, f"class {label}", anchor=anchor)
    panel.nodes.append(
        '<defs><marker id="triangle-tip" class="mark gradient" viewBox="-6 -5 8 10" '
        'markerWidth="8" markerHeight="10" orient="auto" markerUnits="userSpaceOnUse">'
        '<path d="M-5 -4L0 0L-5 4"/>'
        "</marker></defs>"
    )
    here = PLANE @ p
    ring = [tuple(v) for v in (here + fisher_ellipse(vectors)).tolist()]
    panel.add("path", "area line ggn", "ellipse", d=panel.path(ring) + "Z")
    for c, tip in enumerate((here + vectors @ PLANE.T).tolist()):
        path = panel.path([tuple(here.tolist()), tuple(tip)])
        panel.add("path", "line gradient", f"vector {c}", d=path, marker_end="url(#triangle-tip)")
    knob = {"cx": X.at(here[0].item()), "cy": Y.at(here[1].item())}
    panel.add("circle", "hit", "hit", r=27, **knob)
    panel.add("circle", "knob", "knob", r=8, **knob)
    return panel
