"""A second device without hardware: its tensors refuse to meet those of the CPU.

A tensor that is `elsewhere` keeps its numbers in a CPU tensor and says that it is on another
device. What CUDA refuses, it refuses: a tensor made without `device=` raises where it meets one of
its own, and so does a generator. What CUDA allows, it allows: copies, CPU indices, and a
0-dimensional CPU tensor in what is done entry by entry. Its results are the CPU's, bit by bit, and
what is saved there is loaded there.

What it does not show: another rounding than the CPU's, memory, asynchronous work, operations that
CUDA lacks, one of its generators in a method of a CPU tensor, and a gradient on the CPU until it
meets a tensor that is elsewhere. What mixes within a backward pass is told by the next operation.

PyTorch's hook for devices written in Python is experimental: `why_missing` tells if it is there.
"""

import sys
from contextlib import contextmanager
from functools import cache, partial, wraps
from typing import ClassVar
from weakref import WeakValueDictionary

import pytest
import torch
from torch import Tensor

NAME = "elsewhere"
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
ENTRYWISE = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor}  # untagged
MAKERS = (  # what all others are made of, and what else sets the size of its result
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.eye.default,
    aten.eye.m,
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.randperm.default,
    aten.randperm.generator,
)
DRAWING = ("rand", "randn", "randint", "randperm", "normal", "multinomial", "bernoulli")
LOWERED = (  # by autocast
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
)


class Elsewhere(Tensor):
    """A tensor that is elsewhere, with its numbers, which are not."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        return Tensor._make_wrapper_subclass(
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, numbers):
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if any(_acts_itself(t) for t in types):
            return NotImplemented  # rows of ones, say: they take their own turn, and then this one
        kwargs = kwargs or {}
        given = [*_leaves(args), *_leaves(kwargs.values())]
        _check(func, given, args[1] if func in INDEXED else ())
        out = func(*_each(_here, args), **{name: _each(_here, x) for name, x in kwargs.items()})
        if not _there(kwargs.get("device") or NAME):
            return out
        if torch.Tag.inplace_view in func.tags:  # as squeeze_: what the tensor says of its size
            with torch._C._DisableTorchDispatch():
                func(*args, **kwargs)
        own = {id(_here(x)): x for x in given if isinstance(x, Tensor)}

        def back(x):
            if id(x) not in own:
                return cls(x) if isinstance(x, Tensor) else x
            assert own[id(x)].shape == x.shape, f"{func} sets a size: it belongs to the makers"
            return own[id(x)]

        return _each(back, out)

    @property
    def data(self):
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, other):
        Tensor.data.__set__(self, other)
        self.numbers = other.numbers

    def tolist(self):
        return self.numbers.tolist()

    def __repr__(self):
        return f"Elsewhere({self.numbers})"

    def __format__(self, spec):
        return format(self.numbers, spec)

    def __reduce_ex__(self, protocol):
        """As PyTorch saves the tensors of a device that has no storage of its own."""
        rebuild = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (self.detach().cpu(), self.dtype, str(self.device), self.requires_grad)


def _acts_itself(kind):
    """Whether a kind of tensor, other than those of this device, has operations of its own."""
    own = getattr(kind.__torch_dispatch__, "__func__", None)
    return own not in (Elsewhere.__torch_dispatch__.__func__, None)


class Generator(torch.Generator):
    """PyTorch's; for this device, one of the CPU's that says that it is elsewhere."""

    there: ClassVar = WeakValueDictionary()  # by address: operations get another Python object

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls, "cpu" if _there(device) else device)
        if _there(device):
            cls.there[generator._cdata] = generator
        return generator

    def __init__(self, device="cpu"):
        """All is done."""

    @property
    def device(self):
        return torch.device(NAME, 0) if self._cdata in self.there else super().device


def check(func, given, indices=()):
    """Refuse what CUDA refuses.

    Raises:
        RuntimeError: If a tensor or a generator is not where it should be.
    """
    for x in given:
        if isinstance(x, torch._C.Generator) and x._cdata not in Generator.there:
            raise RuntimeError(f"{func} expected a generator that is {NAME}, got one of the CPU.")
        if isinstance(x, Elsewhere) or not isinstance(x, Tensor) or func in COPIES:
            continue
        entrywise = func in ENTRYWISE or torch.Tag.pointwise in func.tags
        written = x is given[0] and func._schema.is_mutable
        number = x.dim() == 0 and entrywise and not written
        if not number and not any(x is i for i in indices):
            raise RuntimeError(
                f"{func} expected all tensors to be on the same device, but found at least two: "
                f"{NAME} and {x.device} (of shape {tuple(x.shape)})."
            )


LATER = []


def _check(*args):
    """As `check`, but what mixes within a backward pass is told later.

    An error there would end the process: on its way, PyTorch asks our device for its type, which
    Python does not answer while an error is set.
    """
    if torch._C._current_graph_task_id() < 0:
        _tell()
        return check(*args)
    try:
        return check(*args)
    except RuntimeError as error:
        return LATER.append(error)


def _tell():
    if LATER:
        error = LATER[0]
        LATER.clear()
        raise error


def _leaves(xs):
    """Everything in nested lists and tuples."""
    for x in xs:
        if isinstance(x, list | tuple):
            yield from _leaves(x)
        else:
            yield x


def _each(f, x):
    """A function of everything in nested lists and tuples."""
    return type(x)([_each(f, y) for y in x]) if isinstance(x, list | tuple) else f(x)


def _there(device):
    return torch.device(device).type == NAME


def _here(x):
    """What is elsewhere as the CPU knows it."""
    if isinstance(x, Elsewhere):
        return x.numbers
    return torch.device("cpu") if isinstance(x, torch.device) and _there(x) else x


# ---- as PyTorch gets to know it ------------------------------------------------------------------


@cache
def register():
    """Make the device known to PyTorch, for good.

    Raises:
        Exception: Of any kind, if this release of PyTorch has no such hook or another.
    """
    from torch.utils import backend_registration as hook

    module = hook._DummyBackendModule()
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    hook._setup_privateuseone_for_python_backend(NAME, backend_module=module)
    ops, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    for op in MAKERS:
        ops.impl(op, partial(_made, op), "PrivateUse1")
    ops.impl("_efficientzerotensor", partial(_made, aten.zeros.default), "PrivateUse1")
    ops.impl("_copy_from", _copied, "PrivateUse1")
    for op in LOWERED:
        ops.impl(op, partial(_lowered, op), "AutocastPrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return ops, fallback  # as long as these live


@cache
def why_missing():
    """Register the device; in words, why that fails, or nothing."""
    try:
        register()
    except Exception as error:
        return f"no {NAME}: PyTorch {torch.__version__} has another hook, {error!r}"
    return ""


def _made(op, *args, **kwargs):
    return Elsewhere(op(*args, **kwargs | {"device": torch.device("cpu")}))


def _copied(source, to, non_blocking=False):
    _here(to).copy_(_here(source))
    return to


def _lowered(op, *args, **kwargs):
    """An operation as autocast does it."""
    dtype = torch.get_autocast_dtype(NAME)

    def lower(x):
        return x.to(dtype) if isinstance(x, Tensor) and x.dtype == torch.float32 else x

    autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    with torch._C._ExcludeDispatchKeyGuard(autocast):
        return op(*_each(lower, args), **{name: lower(x) for name, x in kwargs.items()})


@contextmanager
def in_use():
    """While a test runs there: generators know the device, and tied weights arrive tied."""
    real = torch.Generator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "_apply", _swapping(torch.nn.Module._apply))
        for name in DRAWING:
            patch.setattr(torch, name, _watched(getattr(torch, name)))
        for name, module in list(sys.modules.items()):
            ours = name == "torch" or name.startswith("kfac_scratch")
            if ours and vars(module).get("Generator") is real:
                patch.setattr(module, "Generator", Generator)
        yield
    _tell()


def _watched(draw):
    """A function that draws on the CPU with generators of the CPU only."""

    @wraps(draw)
    def watched(*args, generator=None, **kwargs):
        out = draw(*args, generator=generator, **kwargs)
        if generator is not None and _there(generator.device) and not _there(out.device):
            raise RuntimeError(
                f"{draw.__name__} expected a generator of the CPU, got a {NAME} one."
            )
        return out

    return watched


def _swapping(apply):
    """`Module._apply` under which a parameter that leaves the CPU stays the same object."""
    future = torch.__future__

    def applied(module, *args, **kwargs):
        before = future.get_swap_module_params_on_conversion()
        leaves = any(not isinstance(p, Elsewhere) for p in module.parameters(recurse=False))
        future.set_swap_module_params_on_conversion(leaves)
        try:
            return apply(module, *args, **kwargs)
        finally:
            future.set_swap_module_params_on_conversion(before)

    return applied
