"""Each figure that a reader can move: how to draw it at any state, and what it must show there.

The same checks judge what Python draws and what a browser has drawn. They read coordinates back
from the SVG, turn them into numbers with the axes that the panel states, and compare these with the
package.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from xml.etree import ElementTree

import torch
from torch.nn import CrossEntropyLoss, Linear, Module, MSELoss, Sequential, Tanh

from kfac_scratch import LayerIO, kfac, layer_ios
from kfac_scratch.approximations.brand import Brand
from kfac_scratch.checks import relative_error
from kfac_scratch.curvature import ggn, hessian, loss_hessian
from kfac_scratch.moving.cells import kronecker_cells
from kfac_scratch.moving.descent import METHODS, RATE, TwoWeights, valley_steps
from kfac_scratch.moving.drawing import Scale, significant
from kfac_scratch.moving.figure import MovingFigure
from kfac_scratch.moving.filtering import damping_filter
from kfac_scratch.moving.following import online_eigenpairs
from kfac_scratch.moving.pairing import matched_pairs, paired
from kfac_scratch.moving.pooling import pool_position
from kfac_scratch.moving.triangle import PLANE, probability_triangle

TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}
NUMBERS = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


def scale(text: str) -> Scale:
    """What an attribute says about an axis."""
    return Scale(*map(float, text.split()[:4]), log=text.endswith("log"))


class Drawn:
    """The marked nodes of a figure's HTML, and the axes of their panels."""

    def __init__(self, html: str) -> None:
        self.axes: dict[str, tuple[Scale, Scale]] = {}
        self.nodes: dict[str, list[tuple[str, dict[str, str]]]] = {}
        for part in re.findall(r"<svg[^>]*data-panel=.*?</svg>|<table.*?</table>", html, re.DOTALL):
            self._read(ElementTree.fromstring(part))
        self.state = re.search(r'<p class="state".*?>(.*?)</p>', html, re.DOTALL)[1]

    def _read(self, root: ElementTree.Element) -> None:
        name = root.get("data-panel", "")
        if name:
            self.axes[name] = (scale(root.attrib["data-x"]), scale(root.attrib["data-y"]))
        for node in root.iter():
            if moved := node.get("data-move"):
                given = {k: v for k, v in node.attrib.items() if k not in ("style", "data-move")}
                found = given | {"text": "".join(node.itertext()) if node.tag != "tr" else ""}
                self.nodes.setdefault(moved, []).append((name, found))

    def number(self, node: str, attribute: str) -> float:
        return float(self.nodes[node][0][1][attribute])

    def text(self, node: str) -> str:
        return self.nodes[node][0][1]["text"]

    def place(self, node: str, x: str = "cx", y: str = "cy") -> torch.Tensor:
        """Where a node lies, in numbers of its panel's axes."""
        panel, found = self.nodes[node][0]
        across, up = self.axes[panel]
        return torch.tensor([across.value(float(found[x])), up.value(float(found[y]))])

    def points(self, node: str) -> torch.Tensor:
        """The corners of a path, in numbers of its panel's axes."""
        panel, found = self.nodes[node][0]
        across, up = self.axes[panel]
        corners = [
            map(float, NUMBERS.findall(part)) for part in re.split("[MLZ]", found["d"]) if part
        ]
        return torch.tensor([[across.value(a), up.value(b)] for a, b in corners])

    def said(self) -> list[float]:
        """The bold numbers of the state in words."""
        return [float(v.replace("−", "-")) for v in re.findall("<b>([−.\\d]+)</b>", self.state)]


def close(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual, dtype=torch.float64), expected, **TOLERANCE)


def difference(drawn: Drawn, other: Drawn) -> float:
    """The largest difference of two drawings in any number of any marked node, or infinity.

    Relative to the number where that is larger than one, since it is written in nine digits.
    """
    if drawn.nodes.keys() != other.nodes.keys():
        return float("inf")
    largest = 0.0
    for name, nodes in drawn.nodes.items():
        for (_, one), (_, two) in zip(nodes, other.nodes[name], strict=True):
            for key in one.keys() | two.keys():
                first, second = (str(found.get(key, "")) for found in (one, two))
                if NUMBERS.sub("", first) != NUMBERS.sub("", second):
                    return float("inf")
                pairs = zip(NUMBERS.findall(first), NUMBERS.findall(second), strict=True)
                for a, b in ((float(a), float(b)) for a, b in pairs):
                    largest = max(largest, abs(a - b) / max(1.0, abs(b)))
    return largest


# ------------------------------------------------------------------ the filter
@cache
def layer():
    """KFAC of a layer of a small network, some of whose inputs are always zero."""
    torch.manual_seed(0)
    X, y = torch.rand(40, 8), torch.randint(3, (40,))
    X[:, 6:] = 0
    model = Sequential(Linear(8, 5), Tanh(), Linear(5, 3)).double()
    return kfac(layer_ios(model, CrossEntropyLoss(), X, y)["0"])


def check_filter(drawn, values):
    damping, K = values["damping"], layer()
    curve = drawn.points("curve")
    close(curve[:, 1], curve[:, 0] / (curve[:, 0] + damping))
    close(drawn.points("guide")[:, 0], [damping, damping])
    close(drawn.place("knob"), [damping, 0.5])
    close(drawn.place("hit"), [damping, 0.5])
    exact = torch.linalg.eigvalsh(K.dense() @ K.inverse(damping).dense()).flip(0)
    exact = exact[exact > 1e-9 * exact[0]]
    area = drawn.points("area")[1:-1]
    close(area[::2, 1], exact[: len(area) // 2])
    close(area[1::2, 1], area[::2, 1])
    close(area[1::2, 0], torch.arange(1, len(area) // 2 + 1))
    assert abs(drawn.said()[0] - (K.dense() @ K.inverse(damping).dense()).trace()) <= 0.0051


# ------------------------------------------------------------------ the valley
def check_valley(drawn, values):
    u, w, damping = (values[name] for name in ("u", "w", "damping"))
    valley = TwoWeights()
    problem = (valley.model, valley.loss, valley.X, valley.y)
    for method in METHODS:
        points = drawn.points(f"path {method}")
        close(points[0], [u, w])
        for here, there in pairwise(points):
            if here.abs().max() > 90 or there.abs().max() > 90:
                break  # drawn at the edge
            value = valley.at(here)
            gradient = torch.stack(torch.autograd.grad(value, [*valley.model.parameters()]))
            if method == "gradient":
                step = RATE * gradient.flatten()
            elif method == "kfac":
                M = [kfac(io).inverse(damping) for io in layer_ios(*problem).values()]
                step = torch.cat([m @ g for m, g in zip(M, gradient, strict=True)]).flatten()
            else:
                M = (hessian if method == "newton" else ggn)(*problem) + damping * torch.eye(2)
                step = torch.linalg.solve(M, gradient.flatten())
            torch.testing.assert_close(there, here - step, rtol=1e-6, atol=1e-6 * (1 + step.norm()))
        if points.abs().max() < 90:
            assert abs(float(drawn.text(f"loss {method}")) - valley.at(points[-1])) <= 0.51e-5
    close(drawn.place("knob"), [u, w])


# ------------------------------------------------------------------ a cell of B ⊗ A
@cache
def factors():
    torch.manual_seed(0)
    return tuple(M @ M.T / len(M) for M in (torch.randn(3, 3), torch.randn(4, 4)))


def check_cells(drawn, values):
    B, A = factors()
    row, column = int(values["row"]), int(values["column"])
    for frame in (drawn.nodes["cell"], drawn.nodes["cell B"], drawn.nodes["cell A"]):
        assert frame[0] == frame[1]
    close(drawn.place("cell", "x", "y"), [column, row])
    (k, i), (m, j) = (drawn.place(f"cell {name}", "x", "y").round().long() for name in "BA")
    close(drawn.place("cell B", "x", "y"), [k, i])
    value = (B[i, k] * A[j, m]).item()
    close(value, torch.kron(B, A)[row, column])
    assert f"<b>{significant(value)}</b>" in drawn.state
    for weight, place in (("row", (i, j)), ("column", (k, m))):
        x, y = drawn.place(f"weight {weight}") - 0.5
        close([y, x], place)
    close(drawn.place("of row")[1], row + 0.5)
    close(drawn.place("of column")[0], column + 0.5)


# ------------------------------------------------------------------ pairs
@cache
def pairs():
    torch.manual_seed(4)
    return torch.randn(6, 2) + 0.4, torch.randn(6, 2)


def check_pairs(drawn, values):
    a, g = (t[t.norm(dim=1).argsort()] for t in pairs())
    found = paired(a, g, values["share"])
    F, K = found.io.block(), kfac(found.io).dense()
    most = paired(a, g, 1.0).io
    limit = max(most.block().abs().max(), kfac(most).dense().abs().max()).item()
    for name, M in (("exact", F), ("product", K), ("lost", F - K)):
        for r, row in enumerate(M.tolist()):
            for c, v in enumerate(row):
                ((_, node),) = drawn.nodes[f"{name} {r} {c}"]
                close(float(node["fill-opacity"]) ** 2 * limit, abs(v))
                assert abs(v) < 1e-9 or node["class"] == ("plus" if v > 0 else "minus")
    for j, i in ((0, 0), (2, 2), (5, 1), (0, 3)):
        same = (found.io.a[:, 0] == a[i]).all(1)
        meets = ((found.io.g[0, :, 0] * len(same) ** 0.5 - g[j]).abs() < 1e-9).all(1)
        close((drawn.number(f"pair {j} {i}", "r") / 5) ** 2, 36 * (same & meets).double().mean())
    error = (F - K).norm().item()
    close(drawn.place("error"), [values["share"], error])
    close(drawn.place("covariance"), [values["share"], error])  # Theorem 5.1
    close(drawn.said(), [error, error])


# ------------------------------------------------------------------ the pool
class MeanOfPositions(Module):
    def forward(self, x):
        return x.mean(1)


@cache
def pooled():
    torch.manual_seed(0)
    captured = {}
    for words, place in {
        "before": 0,
        "after 1": 1,
        "after 2": 2,
        "after 3": 3,
        "never": None,
    }.items():
        layers = [Linear(5, 4), Linear(4, 6), Linear(6, 2)]
        if place is not None:
            layers.insert(place, MeanOfPositions())
        y = torch.randn(11, 7, 2) if place is None else torch.randn(11, 2)
        model = Sequential(*layers).double()
        captured[words] = layer_ios(model, MSELoss(), torch.rand(11, 7, 5), y)
    return captured


def check_pool(drawn, values):
    place, layers = int(values["pool"]), [*pooled().values()][int(values["pool"])]
    for i, io in enumerate(layers.values(), 1):
        for name, part in (("expand", io), ("reduce", io.reduced())):
            error = relative_error(kfac(part).dense(), io.block())
            up = drawn.axes["chain"][1]
            top = drawn.number(f"{name} {i}", "y")
            close(up.value(top), error)
            close(up.value(up.start - drawn.number(f"{name} {i}", "height")), error)
        exact = "expand" if place == 4 else "reduce" if i <= place else "both"
        assert drawn.text(f"words {i}") == exact
    for half in range(8):
        many, one = (drawn.number(f"{name} {half}", "opacity") for name in ("many", "one"))
        assert (many, one) == ((1, 0) if half <= 2 * place else (0, 1))
    assert drawn.number("pool", "opacity") == (place < 4)
    across = drawn.axes["chain"][0]
    middle = [float(v) for v in NUMBERS.findall(drawn.nodes["pool"][0][1]["d"])][::2]
    close(across.value((min(middle) + max(middle)) / 2), min(place, 3) + 0.5)
    rows = [drawn.nodes[f"place {k}"][0][1]["class"] for k in range(5)]
    assert rows == ["now" if k == place else "other" for k in range(5)]


# ------------------------------------------------------------------ the triangle
def check_triangle(drawn, values):
    f = torch.tensor([[values["first"], values["second"], 0.0]])
    p = f.softmax(1)[0]
    H = PLANE @ loss_hessian(CrossEntropyLoss(), f, torch.tensor([0])).reshape(3, 3) @ PLANE.T
    here = PLANE @ p
    close(drawn.place("knob"), here)
    vectors = []
    for c in range(3):
        start, tip = drawn.points(f"vector {c}")
        close(start, here)
        assert (tip - start) @ (PLANE[:, c] - here) > 0  # towards its corner
        vectors.append(tip - start)
    close(sum(torch.outer(v, v) for v in vectors), H)
    around = drawn.points("ellipse") - here
    close(torch.einsum("ki,ij,kj->k", around, torch.linalg.inv(H), around), torch.ones(72))
    assert abs(drawn.said()[0] - H.trace()) <= 0.00051


# ------------------------------------------------------------------ eigenpairs that follow batches
ONLINE_RANKS = (2, 3, 5)


@cache
def stream():
    torch.manual_seed(0)
    scale = 10 ** -(torch.arange(9.0) / 4)
    return [scale[:, None] * torch.randn(9, 2) for _ in range(7)]


@cache
def followed(rank, seen):
    """The exact average, and the pairs and the tail of `Brand`, which has them as its factor A."""
    state, exact = None, torch.zeros(9, 9, dtype=torch.float64)
    for t, X in enumerate(stream()[:seen], start=1):
        X, w = X.double(), 0.1 / (1 - 0.9**t)
        exact = (1 - w) * exact + w * X @ X.T
        io = LayerIO((X.T * 2**0.5)[:, None], torch.ones(1, 2, 1, 1, dtype=torch.float64))
        state = Brand(rank).update(state, io, w)
    return exact, state


def check_online(drawn, values):
    rank, seen = ONLINE_RANKS[int(values["rank"])], int(values["seen"])
    exact, state = followed(rank, seen)
    eigenvalues, V = (part.flip(-1) for part in torch.linalg.eigh(exact))
    low = drawn.axes["spectrum"][1].low
    own = torch.cat([state.dA, state.cA.expand(9 - len(state.dA))])
    for name, wanted in (("exact", eigenvalues), ("kept", own)):
        path = drawn.points(name)
        close(path[:, 0], torch.arange(9).repeat_interleave(2) + torch.tensor([0, 1]).repeat(9))
        close(path[:, 1], wanted.clamp(min=low).repeat_interleave(2))
    close(drawn.points("last")[:, 0], [len(state.dA)] * 2)
    across, up = drawn.axes["captured"]
    shares = (state.UA.T @ V).square().sum(0) * (eigenvalues > 1e-10 * eigenvalues[0])
    for i, share in enumerate(shares):
        close(up.value(drawn.number(f"share {i}", "y")), share)
        close(up.value(up.start - drawn.number(f"share {i}", "height")), share)
        assert i < across.value(drawn.number(f"share {i}", "x")) < i + 1
    damping = 0.1 * eigenvalues[0] * torch.eye(9)
    factor = (state.UA * (state.dA - state.cA)) @ state.UA.T + state.cA * torch.eye(9)
    error = relative_error(torch.linalg.inv(factor + damping), torch.linalg.inv(exact + damping))
    tail, told = drawn.said()
    assert abs(tail - state.cA) <= 0.51e-4
    assert abs(told - error) <= 0.51e-4


# ------------------------------------------------------------------ all of them
@dataclass(frozen=True)
class Tried:
    """One figure: how it is drawn from the numbers of its controls, and what it must show."""

    draw: Callable[..., MovingFigure]
    check: Callable[[Drawn, dict[str, float]], None]
    states: tuple[dict[str, float], ...]


FIGURES = {
    "damping_filter": Tried(
        lambda damping=1e-4: damping_filter(layer().eigenvalues(), damping),
        check_filter,
        ({"damping": 1e-6}, {"damping": 10**-1.55}, {"damping": 10.0}),
    ),
    "valley_steps": Tried(
        lambda u=2.7, w=2.3, damping=0.1: valley_steps((u, w), damping),
        check_valley,
        ({"u": 0.4, "w": 0.5, "damping": 0.1}, {"u": -0.5, "w": 2.9, "damping": 1e-4}),
    ),
    "kronecker_cells": Tried(
        lambda row=6, column=3: kronecker_cells(*factors(), (int(row), int(column))),
        check_cells,
        ({"row": 0, "column": 0}, {"row": 11, "column": 2}, {"row": 5, "column": 9}),
    ),
    "matched_pairs": Tried(
        lambda share=0.6: matched_pairs(*pairs(), share),
        check_pairs,
        ({"share": 0.0}, {"share": 0.35}, {"share": 1.0}),
    ),
    "pool_position": Tried(
        lambda pool=2: pool_position(pooled(), int(pool)),
        check_pool,
        tuple({"pool": place} for place in range(5)),
    ),
    "online_eigenpairs": Tried(
        lambda seen=4, rank=1: online_eigenpairs(
            stream(), ONLINE_RANKS, seen=int(seen), rank=int(rank)
        ),
        check_online,
        tuple({"seen": seen, "rank": rank} for seen, rank in ((1, 0), (7, 2), (3, 2), (6, 0))),
    ),
    "probability_triangle": Tried(
        lambda first=0.5, second=-0.5: probability_triangle(first, second),
        check_triangle,
        ({"first": 0.0, "second": 0.0}, {"first": 4.95, "second": -5.0}),
    ),
}
