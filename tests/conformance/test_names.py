"""Inside the oracle one name means one thing, and no function takes a handful too many."""

import ast
from collections import defaultdict
from pathlib import Path

import kfac_scratch.conformance
from tests.definitions import defined

ROOM = Path(kfac_scratch.conformance.__file__).parent
CATALOGUES = {"findings", "adapters", "consumers", "museum", "mutations"}  # entries, not namespaces
CONTRACTS = {"CASES", "PLACE"}  # what every family says of itself
MODULES = {
    path.relative_to(ROOM): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(ROOM.rglob("*.py"))
    if not CATALOGUES & {*path.relative_to(ROOM).parts}
}


def twice(modules):
    """Names that more than one module binds, with the modules."""
    places = defaultdict(set)
    for path, tree in modules.items():
        for name in defined(tree):
            places[name].add(str(path))
    return {name: found for name, found in places.items() if len(found) > 1}


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def arguments(function):
    """Names of a function's parameters, without the instance or class."""
    names = [a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)]
    return [name for name in names if name not in ("self", "cls")]


def test_a_name_is_defined_in_one_module():
    assert {name: found for name, found in twice(MODULES).items() if name not in CONTRACTS} == {}


def test_a_name_that_is_defined_twice_would_be_found():
    one, other = ast.parse("def rows(): ...\n_a = 1"), ast.parse("rows: int = 1\n_a = 2")
    assert twice({"one": one, "other": other}) == {"rows": {"one", "other"}}


def test_no_function_takes_more_than_six_arguments():
    many = [
        f"{path}: {function.name}"
        for path, tree in MODULES.items()
        for function in functions(tree)
        if len(arguments(function)) > 6
    ]
    assert many == []


def test_no_parameter_is_called_found():
    named = [
        f"{path}: {function.name}"
        for path, tree in MODULES.items()
        for function in functions(tree)
        if "found" in arguments(function)
    ]
    assert named == []


def test_verdicts_and_axes_are_spelled_in_one_place():
    """No other module lists the words of a `Literal` again."""
    lists = [
        str(path)
        for path, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Subscript)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Literal"
    ]
    assert {*lists} == {"vocabulary.py"}
