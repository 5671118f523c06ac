"""Where positions are averaged decides which of expand and reduce is exact."""

from collections.abc import Mapping, Sequence

from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.checks import relative_error
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.moving.drawing import Panel, Scale
from kfac_scratch.moving.figure import MovingFigure, Slider

EXACT = 1e-10
BOX, TOP = 44, 60  # width of a layer, and middle of the chain


def flavour_errors(layers: Mapping[str, LayerIO]) -> list[tuple[float, float]]:
    """The relative errors of KFAC-expand and KFAC-reduce, for each layer in turn."""
    return [
        (
            relative_error(kfac(io).dense(), io.block()),
            relative_error(kfac(io.reduced()).dense(), io.block()),
        )
        for io in layers.values()
    ]


def pool_position(captured: Mapping[str, Mapping[str, LayerIO]], position: int = 2) -> MovingFigure:
    """Draw a chain of layers, with a slider for the place where it averages over positions.

    Below every layer stand the errors of KFAC-expand and KFAC-reduce; the table says which of them
    is exact for all places.

    Args:
        captured: The layers of a chain, in order, for each place of the average: at the input,
            after the first layer and so on, and last without any average. Keys name the places.
        position: The place at the start, counted from zero.

    Raises:
        ValueError: If there is not one place before and after every layer and one for none at all.

    Source: Chapter 6, Theorem 6.1.
    """
    errors = [flavour_errors(layers) for layers in captured.values()]
    depth = len(errors[0])
    if len(captured) != depth + 2:
        raise ValueError(f"{depth} layers have {depth + 2} places, not {len(captured)}.")
    names = tuple(captured)
    slider = Slider("pool", "average", 0, depth + 1, 1, position, words=names)
    at = int(slider.value)
    top = max(e for row in errors for pair in row for e in pair)
    return MovingFigure(
        "pool_position",
        (_chain(errors[at], at, top),),
        (slider,),
        {"errors": errors, "top": top, "exact": EXACT},
        f"Average {names[at]}: {pool_in_words(errors[at])}.",
        "<b>Move the average</b> along the chain. Layers before it are applied at many positions "
        "(three lines), layers behind it once. Filled bars are the errors of expand, open ones "
        "those of reduce, relative to the exact block. Reduce is exact before the average, both "
        "are exact behind it, and expand is exact if there is none.",
        "A chain of layers with a triangle where positions are averaged, and two bars below each "
        "layer: the errors of KFAC-expand and of KFAC-reduce.",
        _table(names, errors, at),
    )


def which_is_exact(expand: float, reduce: float) -> str:
    """The flavour of KFAC whose error is round-off: "expand", "reduce", "both" or "neither"."""
    if expand < EXACT and reduce < EXACT:
        return "both"
    return "expand" if expand < EXACT else "reduce" if reduce < EXACT else "neither"


def pool_in_words(errors: Sequence[tuple[float, float]]) -> str:
    """The exact flavours of all layers in words, as HTML."""
    return ", ".join(f"layer {i} <b>{which_is_exact(*e)}</b>" for i, e in enumerate(errors, 1))


def _table(names: Sequence[str], errors: Sequence[Sequence[tuple[float, float]]], at: int) -> str:
    head = "".join(f"<th>layer {i}</th>" for i in range(1, len(errors[0]) + 1))
    rows = "".join(
        f'<tr data-move="place {k}" class="{"now" if k == at else "other"}"><td>{name}</td>'
        + "".join(f"<td>{which_is_exact(*pair)}</td>" for pair in errors[k])
        + "</tr>"
        for k, name in enumerate(names)
    )
    return f"<table><thead><tr><th>average</th>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _chain(errors: Sequence[tuple[float, float]], at: int, top: float) -> Panel:
    depth = len(errors)
    x, y = Scale(0, depth + 1, 0, 398), Scale(0, top, 230, 118)
    panel = Panel("chain", "Which of expand and reduce is exact?", x, y, (400, 272))
    gap = (x.at(1) - x.at(0) - BOX) / 2
    for half in range(2 * depth + 2):  # to the left and to the right of the middle of each gap
        start = x.at(half // 2 + 0.5) - (gap if half % 2 == 0 else 0)
        many = half <= 2 * at
        lines = "".join(f"M{start:g} {TOP + d}h{gap:g}" for d in (-10, 0, 10))
        panel.add("path", "edge", f"many {half}", d=lines, opacity=float(many))
        panel.add(
            "path", "edge", f"one {half}", d=f"M{start:g} {TOP}h{gap:g}", opacity=float(not many)
        )
    panel.add(
        "path", "dot kfac", "pool", d=pool_triangle(min(at, depth), x), opacity=float(at <= depth)
    )
    for i, pair in enumerate(errors, 1):
        left = x.at(i) - BOX / 2
        panel.add("rect", "box", x=left, y=TOP - 22, width=BOX, height=44, rx=4)
        panel.text(x.at(i), TOP + 5, f"{i}", "strong", "middle")
        for flavour, error, place in zip(("expand", "reduce"), pair, (-20, 2), strict=True):
            style = "dot kfac" if flavour == "expand" else "mark ggn kfac open"
            size = {
                "x": x.at(i) + place,
                "y": y.at(error),
                "height": 230 - y.at(error),
                "width": 18,
            }
            panel.add("rect", style, f"{flavour} {i}", **size)
        panel.add("path", "axis", d=f"M{x.at(i) - 26:g} 230h52")
        panel.add(
            "text",
            "strong",
            f"words {i}",
            which_is_exact(*pair),
            x=x.at(i),
            y=250,
            text_anchor="middle",
        )
    panel.text(x.at(depth + 1) - 2, TOP - 26, "loss", anchor="end")
    panel.text(2, TOP - 26, "input")
    panel.text(
        2, 267, "error: filled bars expand, open bars reduce; the tallest is " + f"{top:.2f}"
    )
    return panel


def pool_triangle(position: int, x: Scale) -> str:
    """The path of the mark of an average behind a layer."""
    middle = x.at(position + 0.5)
    return f"M{middle - 9:.9g} {TOP - 16}L{middle + 9:.9g} {TOP}L{middle - 9:.9g} {TOP + 16}Z"
