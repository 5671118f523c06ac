"""Grouped convolutions have the factors of a convolution without groups.

`LayerCollection` reads the number of channels and the kernel of a convolution, and not its groups.
The input factor then is that of all channels, and the matrix is larger than the layer has
parameters:

```python
import torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatKFAC
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, bias=False))
X = torch.randn(5, 4, 3, 3)
F = FIM(model, DataLoader(TensorDataset(X, X)), PMatKFAC, variant="regression")
print(len(F.to_torch()), sum(p.numel() for p in model.parameters()))
# prints
#   216 108
```

Expected: equal numbers, or an error. The matrix cannot be multiplied with the model's gradient.

Suggestion: raise NotImplementedError for `groups > 1`, as for other layers that are not known; or
keep one pair of factors per group.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "nngeometry", "0.4"
ADAPTER = "kfac_scratch.conformance.adapters.nngeometry:Adapter"
TITLE = "groups of a convolution are ignored"
CASES = (("conv2d-groups-per-location-mse", "expand"), ("conv1d-groups-pooled-mse", "expand"))
CAUSE = (
    "nngeometry/layercollection.py, line 99, _module_to_layer: mod.groups is not read; "
    "nngeometry/backend/torch_hooks/torch_hooks.py, get_kfac_blocks: in_channels is taken for the "
    "channels that an output sees."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """One pair of factors per group, along a leading axis."""
    backend = import_module("nngeometry.backend.torch_hooks.torch_hooks").TorchHooksJacobianBackend
    grads = import_module("nngeometry.backend.torch_hooks.grads")
    groups = "getattr(self.l_to_m[layer_id], 'groups', 1)"
    shapes = (
        ("sA = layer.in_channels * layer.kernel_size[0] * ", _per_group(groups, "[0] * ")),
        ("sA = layer.in_channels * layer.kernel_size[0]\n", _per_group(groups, "[0]\n")),
        ("torch.zeros((sA, sA)", f"torch.zeros(({groups}, sA, sA)"),
        ("torch.zeros((sG, sG)", f"torch.zeros(({groups}, sG // {groups}, sG // {groups})"),
    )
    with ExitStack() as stack:
        stack.enter_context(mended(backend, "get_kfac_blocks", *shapes))
        for factory in (grads.Conv1dJacobianFactory, grads.Conv2dJacobianFactory):
            stack.enter_context(_apart(factory))
        yield


def _per_group(groups: str, rest: str) -> str:
    return f"sA = layer.in_channels // {groups} * layer.kernel_size{rest}"


@contextmanager
def _apart(factory: Any) -> Iterator[None]:
    """Have a factory's functions work on one group of channels after the other."""
    before = [vars(factory)[name] for name in ("kfac_xx", "kfac_gg")]
    of_inputs, of_vectors = (method.__func__ for method in before)

    def inputs(cls: Any, buffer: Tensor, mod: Any, layer: Any, x: Tensor, gy: Tensor) -> None:
        for part, own in zip(buffer, x.chunk(mod.groups, 1), strict=True):
            of_inputs(cls, part, mod, layer, own, gy)

    def vectors(cls: Any, buffer: Tensor, mod: Any, layer: Any, x: Tensor, gy: Tensor) -> None:
        for part, own in zip(buffer, gy.chunk(mod.groups, 1), strict=True):
            of_vectors(cls, part, mod, layer, x, own)

    factory.kfac_xx, factory.kfac_gg = classmethod(inputs), classmethod(vectors)
    try:
        yield
    finally:
        factory.kfac_xx, factory.kfac_gg = before
