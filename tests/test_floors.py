"""Imports only go down: the floors of the house, from tensors to curvature in use."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "kfac_scratch"
FLOORS = [
    "linalg low_rank_update activations faa_di_bruno expansions partials taylor show",
    "layer_io matrices kronecker_sum low_rank block_diagonal",
    "losses layers blocks capture refusals curvature preconditioner",
    "kfac ekfac damping estimators roots step_control variants",
    "quadratic_model parameter_groups checkpoints optimizer pinn pinn_gramian pinn_metric "
    "pinn_krylov pinn_problems pinn_solvers pinn_steps",
    "conformance",
]
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names.split()}
FILES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py"]


def room(parts):
    """A module's name, or that of the folder it is in."""
    return parts[1] if len(parts) > 1 else ""


def imported(path):
    """Rooms of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kfac_scratch."):
            yield room(node.module.split("."))


def test_every_module_has_its_floor():
    found = {room(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in FILES}
    assert found == set(FLOOR)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_only_go_down(path):
    own = FLOOR[room(path.relative_to(PACKAGE.parent).with_suffix("").parts)]
    assert {name for name in imported(path) if FLOOR[name] > own} == set()


LOW = [p for p in FILES if FLOOR.get(p.stem, 9) <= 1 and p.stem not in ("activations", "taylor")]


@pytest.mark.parametrize("path", LOW, ids=lambda path: path.stem)
def test_tensors_and_the_two_nouns_know_no_network(path):
    """Only Taylor mode has rules for modules, the classes of activations."""
    assert "torch.nn import" not in path.read_text(encoding="utf-8")
