"""The form of docstrings, as far as a machine can check it: every public name of the package.

Whether a docstring is true or readable, a reader must judge. Here it is only checked that what a
user looks for stands there: use, cost and source of an approximation, a reason for many
parameters; and that known riddles do not come back.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path
from typing import is_typeddict

import pytest

import kfac_scratch

PACKAGE = Path(kfac_scratch.__file__).parent
MODULES = sorted(
    ".".join(("kfac_scratch", *path.relative_to(PACKAGE).with_suffix("").parts))
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py" and "conformance" not in path.parts
)
MOST_PARAMETERS = 6
REASON = "many parameters, because"
RIDDLES = (
    r"^By what\b",
    r"^(What|Where|How|Which) [^?]*\.$",  # a question as a sentence, without a subject
    r"^(That|Those|Of all|Undo)\b",
    r"Right away from",
    r"where to put the distrust",
    r"wherever it was asked",
    r"whatever completes",
    r"\bover; what is left\b",
    r"\bis looked at\b",
    r"\bLet (chance|the)\b",
    r"\bdatum\b",
    r"\b(\d+|N|\{N\}) data\b",
    r"\bhow (seldom|far to go)\b",
    r"\bcan be had\b",
)


def functions_and_classes(module):
    """Public functions and classes that a module defines, by name."""
    found = vars(importlib.import_module(module))
    return {
        name: value
        for name, value in found.items()
        if not name.startswith("_")
        and (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module
    }


def is_protocol(value):
    return getattr(value, "_is_protocol", False)


def public():
    """Every public function and class, and every public method that a class itself defines."""
    for module in MODULES:
        for name, value in functions_and_classes(module).items():
            yield f"{module}.{name}", value
            for key, member in vars(value).items() if inspect.isclass(value) else ():
                function = getattr(member, "fget", None) or getattr(member, "func", member)
                if inspect.isfunction(function) and not key.startswith("_"):
                    yield f"{module}.{name}.{key}", function


PUBLIC = dict(public())
ERRORS = [v for v in PUBLIC.values() if inspect.isclass(v) and issubclass(v, Exception)]
EXPORTED = {name: getattr(kfac_scratch, name) for name in kfac_scratch.__all__}
CHOICES = (  # modules whose exported names a user chooses between
    "approximations.",
    "matrices.",
    "optimizer.",
    "taylor.",
    "pinn.steps",
    "pinn.krylov",
    "pinn.hessian_free",
    "pinn.preconditioners",
    "capture.forward_pass",
    "losses",
    "data_loader",
)
NOT_A_CHOICE = {"divisor", "Flavour"}
CHOSEN = {
    name: value
    for name, value in EXPORTED.items()
    if getattr(value, "__module__", "").startswith(tuple(f"kfac_scratch.{m}" for m in CHOICES))
    and (inspect.isfunction(value) or inspect.isclass(value))
    and name not in NOT_A_CHOICE
}


def text(value):
    """A docstring on one line; a dataclass without one has its signature, which does not count."""
    docstring = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    docstring = docstring or ""
    if inspect.isclass(value) and docstring.startswith(f"{value.__name__}("):
        return ""
    return " ".join(docstring.split())


def parameters(value):
    if is_protocol(value) or is_typeddict(value) or value in ERRORS:
        return []
    return [name for name in inspect.signature(value).parameters if name != "self"]


def faults(value):
    """What is wrong with a docstring of any public name."""
    docstring = text(value)
    if not docstring:
        return ["has no docstring"]
    wrong = [f"says {riddle!r}" for riddle in RIDDLES if re.search(riddle, docstring)]
    if len(parameters(value)) > MOST_PARAMETERS and REASON not in docstring:
        wrong.append(f"has {len(parameters(value))} parameters and not the words {REASON!r}")
    if "found" in parameters(value):
        wrong.append("has a parameter 'found', which does not say what it is")
    return wrong


def faults_of_choice(value, module_docstring):
    """What is missing in the docstring of an approximation, a matrix, a Fisher, an optimizer."""
    docstring = text(value)
    needed = {
        "when to use it": r"\bUse (it|one|larger|them)\b",
        "when not": r"\bNot\b",
        "its cost": r"\b(Cost|Memory):",
        "a source": r"\bSources?:",
    }
    everywhere = docstring + " " + (module_docstring or "")
    return [
        f"does not say {what}"
        for what, words in needed.items()
        if not re.search(words, everywhere if what == "a source" else docstring)
    ]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_without_riddles(name):
    assert faults(PUBLIC[name]) == []


@pytest.mark.parametrize("name", [n for n, v in CHOSEN.items() if not is_protocol(v)])
def test_what_a_user_chooses_tells_use_cost_and_source(name):
    value = CHOSEN[name]
    assert faults_of_choice(value, inspect.getmodule(value).__doc__) == []


def test_every_exported_name_of_ours_is_among_those_that_are_checked():
    checked = {id(value) for value in PUBLIC.values()}
    for name, value in EXPORTED.items():
        if inspect.isfunction(value) or inspect.isclass(value):
            assert id(value) in checked, name
    modules = {value.__module__.removeprefix("kfac_scratch.") for value in CHOSEN.values()}
    assert all(any(module.startswith(choice) for module in modules) for choice in CHOICES)


def strings(source):
    """All texts of a source; in an f-string, a value is written as {}."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(getattr(part, "value", "{}") for part in map(plain, node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def plain(part):
    return part if isinstance(part, ast.Constant) else None


def counts_data(source):
    """Texts in which "data" or "datum" is what is counted."""
    return [s for s in strings(source) if re.search(r"\bdatum\b|(\b\d+|\bN|\{\}) data\b", s)]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_counts_samples_and_points_not_data(module):
    """Error messages and docstrings of private functions included."""
    file = Path(importlib.import_module(module).__file__)
    assert counts_data(file.read_text(encoding="utf-8")) == []


def test_counted_data_would_be_found():
    wrong = ['f"output is for {N} " "data: axis 0"', '"numbers for N data"', '"of a datum"']
    assert all(counts_data(source) for source in wrong)
    assert not counts_data('"a data loader" f"data must be {kind}"')


def a_function(model, loss, X, y, fisher, layers, found):
    """By what a datum of the function is looked at."""


class Undocumented:
    pass


def test_faults_of_docstrings_are_found():
    wrong = " ".join(faults(a_function))
    for what in ("By what", "datum", "looked at", "7 parameters", "'found'"):
        assert what in wrong
    assert faults(Undocumented) == ["has no docstring"]
    assert len(faults_of_choice(a_function, "No words on its origin.")) == 4
    assert faults_of_choice(a_function, "Source: nobody.")[-1] != "does not say a source"
