"""What stands on the two sheets is what the package computes and the audit has stored."""

import inspect
import json
import re

import pytest
import torch
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Linear, MSELoss, Sequential, Tanh

from kfac_scratch import EXPAND, KFAC, kfac, layer_ios
from kfac_scratch.conformance.cases.families import CASES as ORACLE
from kfac_scratch.curvature import loss_hessian
from kfac_scratch.losses import divisor, empirical, type2
from kfac_scratch.matrices.damping import factored_inverse, relative_damping
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.optimizer.periods import EARLY_OFTEN
from tests.laws import check_differs, check_equal
from tests.meta.built_site import ROOT, built_site, chromium

AUDIT = ROOT / "kfac_scratch" / "conformance" / "audit" / "results"
ADAPTERS = ROOT / "kfac_scratch" / "conformance" / "adapters"
SHEETS = ("sheet_formulas", "sheet_conventions")


def table(sheet, heading):
    """Rows of the first table below a heading, as lists of cells."""
    text = (ROOT / "tutorial" / f"{sheet}.md").read_text(encoding="utf-8")
    lines = text.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[c.strip() for c in line.strip("|").split(" | ")] for line in lines if line[:1] == "|"]
    return rows[2:]  # without the head


# ------------------------------------------------------------------ formulas and losses
E = torch.eye(3, dtype=torch.float64)
LOSSES = {
    "MSE": (MSELoss, lambda f: f, lambda y: y),
    "cross-entropy": (CrossEntropyLoss, lambda f: f.softmax(-1), lambda y: E[y]),
    "BCE": (BCEWithLogitsLoss, torch.sigmoid, lambda y: y),
}
HESSIANS = {
    "$2 I$": lambda p: 2 * E,
    r"$\operatorname{diag} p - p p^\top$": lambda p: p.diag() - p.outer(p),
    r"$\operatorname{diag}(p (1 - p))$": lambda p: (p * (1 - p)).diag(),
}
COLUMNS = {  # in rows
    r"$\sqrt 2\, e_c$": lambda p: 2**0.5 * E,
    r"$\sqrt{p_c}\, (e_c - p)$": lambda p: p.sqrt()[:, None] * (E - p),
    r"$\sqrt{p_c (1 - p_c)}\, e_c$": lambda p: (p * (1 - p)).sqrt().diag(),
}
AT_LABEL = {
    "$2 (f - y)$": lambda p, y: 2 * (p - y),
    "$p - e_y$": lambda p, y: p - y,
    "$p - y$": lambda p, y: p - y,
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("row", table(SHEETS[0], "What a loss sends back"), ids=lambda row: row[0])
def test_vectors_of_a_loss(row, reduction):
    name, hessian, columns, at_label = row
    kind, link, target = LOSSES[name]
    f, loss = torch.randn(4, 3), kind(reduction=reduction)
    y = torch.randint(3, (4,)) if name == "cross-entropy" else torch.rand(4, 3)
    D, p = divisor(loss, f, y), link(f)
    terms = 4 if name == "cross-entropy" else 12
    assert divisor(loss, f, y) == {"sum": 1, "mean": terms}[reduction]
    exact = loss_hessian(loss, f, y).reshape(4, 3, 4, 3)
    for n in range(4):
        check_equal(HESSIANS[hessian](p[n]) / D, exact[n, :, n])
        S = COLUMNS[columns](p[n]) / D**0.5
        check_equal(S.T @ S, exact[n, :, n])
        own = type2(loss, f, y)[:][:, n]
        check_equal(S.T @ S, own.T @ own)
        gradient = AT_LABEL[at_label](p[n], target(y)[n]) / D**0.5
        check_equal(gradient, empirical(loss, f, y)[0, n])


class Mean(torch.nn.Module):
    """The mean over positions."""

    def forward(self, x):
        return x.mean(1)


LINEAR = (Linear, 5, 4), (Linear, 4, 3)
CURVED = (Linear, 5, 4), (Tanh,), (Linear, 4, 3)
CASES = {  # layers, shape of the inputs, and of the targets of a squared error
    "one example, $S = 1$: any": (CURVED, (1, 5), None),
    "deep linear, MSE, $S = 1$": (LINEAR, (11, 5), (11, 3)),
    "last layer, MSE, $S = 1$": (CURVED, (11, 5), (11, 3)),
    "deep linear, MSE at every position": (LINEAR, (11, 7, 5), (11, 7, 3)),
    "deep linear, mean over positions, MSE": ((*LINEAR, (Mean,)), (11, 7, 5), (11, 3)),
    r"activations, $N \gt 1$": (CURVED, (11, 5), None),
}


@pytest.mark.parametrize("row", table(SHEETS[0], "Where KFAC is exact"), ids=lambda row: row[0])
def test_where_kfac_is_exact(row):
    layers, inputs, targets = CASES[row[0]]
    model = Sequential(*(kind(*sizes) for kind, *sizes in layers))
    y = torch.randn(targets) if targets else torch.randint(3, inputs[:1])
    ios = layer_ios(model, MSELoss() if targets else CrossEntropyLoss(), torch.randn(inputs), y)
    io = ios["2" if "last" in row[0] else "0"]
    for said, part in zip(row[1:], (io, io.reduced()), strict=True):
        {"yes": check_equal, "no": check_differs}[said](kfac(part).dense(), io.block())


def test_defaults():
    default = {n: p.default for n, p in inspect.signature(KFAC.__init__).parameters.items()}
    said = dict(table(SHEETS[0], "Start with"))
    assert said["`lr`, `momentum`, `decay`"] == ", ".join(
        str(default[name]) for name in ("lr", "momentum", "decay")
    )
    assert said["`damping`"] == str(default["damping"])
    assert said["`fisher`, `flavour`"] == "one drawn label, expand"
    assert default["fisher"] is None
    assert default["flavour"] == EXPAND
    assert said["`factor_every`, `inverse_every`"] == "1, growing to 10 at step 180"
    assert default["factor_every"] is default["inverse_every"] is EARLY_OFTEN
    assert [EARLY_OFTEN(steps) for steps in (0, 179, 180, 1000)] == [1, 9, 10, 10]


def test_damping():
    A, B = torch.randn(4, 4), torch.randn(3, 3)
    K = Kronecker(A @ A.T, B @ B.T)
    pi, root = (K.A.trace() / 4 / (K.B.trace() / 3)).sqrt(), 0.1**0.5
    factored = torch.kron(K.B + root / pi * torch.eye(3), K.A + pi * root * torch.eye(4))
    G = torch.randn(3, 4)
    check_equal(torch.linalg.solve(factored, G.flatten()), (factored_inverse(K, 0.1) @ G).flatten())
    check_equal(
        torch.as_tensor(relative_damping(K, 0.1)),
        0.1 * K.A.trace() * K.B.trace() / torch.tensor(12),
    )
    (beta, QB), (alpha, QA) = torch.linalg.eigh(K.B), torch.linalg.eigh(K.A)
    step = QB @ ((QB.T @ G @ QA) / (beta[:, None] * alpha + 0.1)) @ QA.T
    check_equal(step, K.inverse(0.1) @ G)


# ------------------------------------------------------------------ conventions across libraries
FILES = {
    "curvlinops": "curvlinops",
    "BackPACK": "backpack",
    "kfac-jax": "kfac_jax",
    "kfac-pytorch": "kfac_pytorch",
    "Kronfluence": "kronfluence",
    "laplace-torch": "laplace",
    "NNGeometry": "nngeometry",
    "ASDL": "asdfghjkl",
    "SINGD": "singd",
}
NUMBERS = {
    "$1$": lambda D, N: 1,
    "$D$": lambda D, N: D,
    "$D / 2$": lambda D, N: D / 2,
    "$D / N$": lambda D, N: D / N,
    "$D / (2 N)$": lambda D, N: D / (2 * N),
}
LIBRARIES = table(SHEETS[1], "To the canonical product: divide by this number")
each_library = pytest.mark.parametrize("row", LIBRARIES, ids=lambda row: row[0])


def stored(library):
    return json.loads((AUDIT / f"{FILES[library]}.json").read_text(encoding="utf-8"))


def test_every_library_of_the_audit_is_there():
    assert {row[0].split()[0] for row in LIBRARIES} == {*FILES}
    others = {path.stem.partition("-")[0] for path in AUDIT.glob("*.json")}
    assert others - {"ours", "backpack_kfra"} == {*FILES.values()}


@each_library
def test_the_number_is_the_one_that_the_audit_accepted(row):
    """A number other than 1 was documented and accepted (`scaled`); with 1 nothing was divided."""
    library, version = row[0].split()
    result = stored(library)
    assert result["implementation"]["version"] == version
    verdicts = {r["case"]: r["verdict"] for r in result["results"] if r["flavour"] == "expand"}
    for cell, loss in zip(row[1:3], ("mse", "cross-entropy"), strict=True):
        for reduction in ("mean", "sum"):
            case = ORACLE[f"mlp-{loss}-{reduction}"]
            y = case.build().y  # one number for every term of the loss
            D = y.numel() if case.loss.reduction == "mean" else 1
            scaled = NUMBERS[cell](D, len(y)) != 1
            assert verdicts[case.id] == ("scaled" if scaled else "definition"), case.id


@each_library
def test_bias_and_numbering_are_those_of_the_adapter(row):
    adapter = ADAPTERS / f"{FILES[row[0].split()[0]]}.py"
    text = adapter.read_text(encoding="utf-8")
    block = re.findall(r"LayerBlock\((\w+)?=?", text)
    assert {"weight": "separate"}.get(next(filter(None, block)), "joint, bias last") == row[3]
    assert ("axes=" in text) == (row[4] == "inputs first")


@pytest.mark.slow
@pytest.mark.parametrize("sheet", SHEETS)
def test_a_sheet_prints_on_one_page(sheet):
    with chromium() as browser:
        page = browser.new_page()
        page.goto((built_site() / f"{sheet}.html").as_uri())
        page.wait_for_function("document.documentElement.dataset.math === 'ready'")
        printed = page.pdf(format="A4", prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) == 1
