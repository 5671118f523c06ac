"""One cell of a Kronecker product: the two entries that it is a product of, and its two weights."""

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.moving.drawing import Panel, Scale, grid, significant
from kfac_scratch.moving.figure import MovingFigure, Slider

_CELL, _MARGIN = 26, 20


def kronecker_cells(
    B: Float[Tensor, "d_out d_out"], A: Float[Tensor, "d_in d_in"], cell: tuple[int, int] = (6, 3)
) -> MovingFigure:
    """Draw `B`, `A`, their Kronecker product and the layer's weights, and mark a cell in all four.

    Rows and columns are counted from zero, and the weights are stacked by rows. Use it for small
    layers: every entry of the product is a node, so 16 weights are about the most.

    Args:
        B: The factor of the outputs.
        A: The factor of the inputs.
        cell: Row and column of the product at the start.

    Raises:
        ValueError: If the cell lies outside of the product.

    Source: Chapter 1, equation (1.4).
    """
    (d_out, d_in), limit = (len(B), len(A)), float(B.abs().max() * A.abs().max())
    rows, columns, D = B.tolist(), A.tolist(), d_out * d_in
    row, column = (
        Slider(name, f"{name} of B ⊗ A", 0, D - 1, 1, start)
        for name, start in zip(("row", "column"), cell, strict=True)
    )
    r, c = int(row.value), int(column.value)
    (i, j), (k, m) = divmod(r, d_in), divmod(c, d_in)
    product = torch.kron(B, A).tolist()
    panels = (
        _product(product, limit, (d_out, d_in), (r, c)),
        _factor("B", "<i>B</i>, outputs", rows, (i, k)),
        _factor("A", "<i>A</i>, inputs", columns, (j, m)),
        _weights(d_out, d_in, (i, j), (k, m)),
    )
    return MovingFigure(
        "kronecker_cells",
        panels,
        (row, column),
        {"B": rows, "A": columns},
        cell_in_words(rows, columns, r, c),
        "<b>Point at a cell</b> of <i>B</i> ⊗ <i>A</i>, or choose its row and its column with the "
        "sliders. Its row belongs to the weight ●, its column to the weight ○. The two rows of "
        "<i>W</i> choose the entry of <i>B</i>, and the two columns of <i>W</i> that of <i>A</i>. "
        "Orange is positive, blue negative; opacity grows with the root of an entry.",
        "Heat maps of two small matrices B and A and of their Kronecker product, in which every "
        "tile is a multiple of A. One cell is marked, with the entries of B and A whose product "
        "it is, and the two weights of the layer that it belongs to.",
    )


def cell_in_words(B: list[list[float]], A: list[list[float]], row: int, column: int) -> str:
    """A cell of the product in words, as HTML."""
    (i, j), (k, m) = divmod(row, len(A)), divmod(column, len(A))
    b, a = B[i][k], A[j][m]
    return (
        f"Row {row} belongs to the weight ● <i>W</i><sub>{i}{j}</sub>, column {column} to "
        f"○ <i>W</i><sub>{k}{m}</sub>. The cell is <i>B</i><sub>{i}{k}</sub> · "
        f"<i>A</i><sub>{j}{m}</sub> = {significant(b)} × {significant(a)} = "
        f"<b>{significant(b * a)}</b>."
    )


def _frame(panel: Panel, name: str, row: int, column: int) -> None:
    width = abs(panel.x.at(1) - panel.x.at(0))
    place = {"x": panel.x.at(column), "y": panel.y.at(row), "width": width, "height": width}
    for _ in range(2):  # a dark frame on a light one, for any colour below
        panel.add("rect", "pick", name, **place)


def _product(
    entries: list[list[float]], limit: float, sizes: tuple[int, int], cell: tuple[int, int]
) -> Panel:
    D, d_in = len(entries), sizes[1]
    end = _MARGIN + _CELL * D
    axes = (Scale(0, D, _MARGIN, end), Scale(0, D, _MARGIN, end))
    panel = Panel("product", "<i>B</i> ⊗ <i>A</i>", *axes, (end + 2, end + 2))
    panel.matrix("entry", entries, limit)
    lines = "".join(
        f"M{_MARGIN} {panel.y.at(t)}H{end}M{panel.x.at(t)} {_MARGIN}V{end}"
        for t in range(0, D + 1, d_in)
    )
    panel.add("path", "tiles", d=lines)
    panel.add("circle", "dot kfac", "of row", r=5.5, cx=_MARGIN / 2, cy=panel.y.at(cell[0] + 0.5))
    panel.add("circle", "ring", "of column", r=6.5, cx=panel.x.at(cell[1] + 0.5), cy=_MARGIN / 2)
    _frame(panel, "cell", *cell)
    return panel


def _factor(name: str, title: str, entries: list[list[float]], cell: tuple[int, int]) -> Panel:
    panel = grid(name, title, len(entries), len(entries), _CELL)
    panel.matrix(f"entry {name}", entries, max(abs(v) for row in entries for v in row))
    _frame(panel, f"cell {name}", *cell)
    return panel


def _weights(d_out: int, d_in: int, row: tuple[int, int], column: tuple[int, int]) -> Panel:
    panel = grid("W", "weights <i>W</i>", d_out, d_in, _CELL)
    lines = [f"M1 {panel.y.at(t)}H{panel.x.end}" for t in range(1, d_out)]
    lines += [f"M{panel.x.at(t)} 1V{panel.y.end}" for t in range(1, d_in)]
    panel.add("path", "rule", d="".join(lines))
    for style, name, (o, i), r in (("dot kfac", "row", row, 5.5), ("ring", "column", column, 9)):
        place = {"cx": panel.x.at(i + 0.5), "cy": panel.y.at(o + 0.5)}
        panel.add("circle", style, f"weight {name}", r=r, **place)
    return panel
