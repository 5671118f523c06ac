"""The check of every annotation of the package, shapes included, while its tests run.

`jaxtyping.install_import_hook` writes `@jaxtyping.jaxtyped(typechecker=beartype)` above every
function. That decorator binds each call to the signature and checks each parameter twice, which
takes half of the time of all tests. `checked` stands in its place: one check for each call, and a
scope for the sizes of shapes only where a function names shapes.
"""

import dataclasses
import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

_scope = jaxtyping.jaxtyped
_check = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def install(package):
    """Check the annotations of a package that has not been imported yet."""
    jaxtyping.jaxtyped = checked
    jaxtyping.install_import_hook(package, "beartype.beartype")


def checked(fn=None, *, typechecker=None):
    """A function, method, property or class of dataclasses whose annotations are checked."""
    if fn is None:
        return checked
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = checked(fn.__init__)
        return fn
    if isinstance(fn, property):
        return property(*(f and checked(f) for f in (fn.fget, fn.fset, fn.fdel)))
    if isinstance(fn, classmethod | staticmethod):
        return type(fn)(checked(fn.__func__))
    as_written = getattr(fn, "__annotations__", {})
    fn.__annotations__ = {name: _resolved(hint, fn) for name, hint in as_written.items()}
    with_checks = _check(fn)
    if any(map(_names_shapes, fn.__annotations__.values())):
        with_checks = _with_sizes(with_checks)
    fn.__annotations__ = as_written
    return _switched(fn, with_checks)


def _switched(fn, with_checks):
    """The function itself where `jaxtyping_disable` is set, as users run it."""

    @functools.wraps(fn)
    def call(*args, **kwargs):
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        return with_checks(*args, **kwargs)

    return call


def _with_sizes(fn):
    """Each call has its own sizes: `n` is the same in all of its parameters and its result."""

    def call(*args, **kwargs):
        with _scope("context"):
            return fn(*args, **kwargs)

    return call


def _resolved(hint, fn):
    """What a text stands for; anything, where the name is not there when the module is read."""
    try:
        return typing.get_type_hints(_of(hint), fn.__globals__, include_extras=True)["value"]
    except NameError:
        return typing.Any


def _of(hint):
    def example(value): ...

    example.__annotations__ = {"value": hint}
    return example


def _names_shapes(hint):
    """Whether a type is, or has in it, something like `Float[Tensor, "n m"]`."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(_names_shapes, _parts(hint)))


def _parts(hint):
    if isinstance(hint, list | tuple):  # the parameters in Callable[[...], ...]
        return hint
    return typing.get_args(hint)
