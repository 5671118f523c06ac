"""The border: arguments of the wrong kind are refused where a user passes them.

Behaviour is passed to this package as functions: an approximation, a Fisher, a control. Three
mistakes are common, and Python notices them late, with words that name neither cause nor way out:
a name in place of the function (`"ekfac"`), the function that makes one in place of the one that
it makes (`randomized` for `randomized()`), a class in place of its instance. The checks here find
them before anything is computed.
"""

import inspect
from collections.abc import Callable, Collection, Iterable
from numbers import Integral
from types import FunctionType
from typing import Any, get_origin


def check_function(parameter: str, value: object, example: str) -> None:
    """Refuse what is not a function, or is one that has to be called first.

    A function is known to make another one by the annotation of what it returns, so that functions
    without annotations pass. See `check_callable` for the arguments.

    Raises:
        TypeError: Naming the parameter, the value and the way out.
    """
    check_callable(parameter, value, example)
    if makes_a_function(value):
        name = getattr(value, "__name__", type(value).__name__)
        raise TypeError(
            f"{parameter}={name} is a function that makes one: call it, {parameter}={name}(...)."
        )


def check_callable(parameter: str, value: object, example: str) -> None:
    """Refuse a name in place of a function, a class in place of its instance, and what is neither.

    Args:
        parameter: The parameter's name, as the user wrote it.
        value: What was passed.
        example: Something that would be right, as code.

    Raises:
        TypeError: Naming the parameter, the value and the way out.
    """
    if isinstance(value, str):
        raise TypeError(
            f"{parameter}={value!r} is a string: pass the function itself, for example {example}."
        )
    name = getattr(value, "__name__", type(value).__name__)
    if inspect.isclass(value):
        raise TypeError(
            f"{parameter}={name} is a class: make an instance of it, {parameter}={name}(...), or "
            f"pass a function, for example {example}."
        )
    if not callable(value):
        raise TypeError(
            f"{parameter} must be a function, for example {example}; got a {name}: {value!r}."
        )


def makes_a_function(function: Any) -> bool:
    """Whether a function's annotation says that it returns a function, or an estimator.

    An estimator is known by its method `update`, which collections have, too.
    """
    if isinstance(function, FunctionType):  # as below, but much faster
        returned = function.__annotations__.get("return")
    else:
        try:
            returned = inspect.signature(function).return_annotation
        except (TypeError, ValueError):  # built-in functions may have no signature
            return False
    if inspect.isclass(returned) and not issubclass(returned, Collection):
        return hasattr(returned, "update")
    return get_origin(returned) is Callable


def check_result(parameter: str, value: object, kind: type, meaning: str) -> None:
    """Refuse what a user's function returned, if it is of another kind.

    Args:
        parameter: What the function was passed as.
        value: What it returned.
        kind: A class, or a protocol that can be checked at run time.
        meaning: What it should return, in words.

    Raises:
        TypeError: Naming the parameter, the value's type and what was expected.
    """
    if not isinstance(value, kind):
        raise TypeError(
            f"The function passed as {parameter} must return {meaning}, but it returned a "
            f"{type(value).__name__}."
        )


def check_instance(parameter: str, value: object, kind: type, example: str) -> None:
    """Refuse a value of another type.

    Raises:
        TypeError: Naming the parameter, the value and an example of what is right.
    """
    if inspect.isclass(value) or not isinstance(value, kind):
        what = f"the class {value.__name__}" if inspect.isclass(value) else repr(value)
        raise TypeError(
            f"{parameter} must be a {kind.__name__}, for example {example}; got {what}."
        )


def check_count(parameter: str, value: object, minimum: int = 1) -> None:
    """Refuse what is not a whole number, or is too small.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is below the minimum.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{parameter} must be a whole number of at least {minimum}, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{parameter} must be at least {minimum}, got {value}.")


def checked_names(parameter: str, names: Iterable[str] | None) -> Collection[str] | None:
    """Names as a collection that can be read twice; None stays None.

    Raises:
        TypeError: For a single string, whose letters would be taken for names, and for what does
            not list strings.
    """
    if names is None or (isinstance(names, Collection) and not isinstance(names, str)):
        found = names
    elif isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(f"{parameter} must list names, for example ['0', '2']; got {names!r}.")
    else:
        found = list(names)
    wrong = [name for name in found or () if not isinstance(name, str)]
    if wrong:
        raise TypeError(f"{parameter} must list names of layers, got {wrong[0]!r} among them.")
    return found
