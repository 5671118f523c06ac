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
from contextlib import contextmanager
from importlib import import_module

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
    groups = "getattr(self.l_to_m[layer_id], 'groups', 1)"
    shapes = (
        ("sA = layer.in_channels * layer.kernel_size[0] * ", _per_group(groups, "[0] * ")),
        ("sA = layer.in_channels * layer.kernel_size[0]\n", _per_group(groups, "[0]\n")),
        ("torch.zeros((sA, sA)", f"torch.zeros(({groups}, sA, sA)"),
        ("torch.zeros((sG, sG)", f"torch.zeros(({groups}, sG // {groups}, sG // {groups})"),
    )
    factory, n = "FactoryMap[layer.__class__]", "getattr(mod, 'groups', 1)"
    calls = (
        (
            f"{factory}.kfac_gg(block[1], mod, layer, x, gy)",
            f"[{factory}.kfac_gg(B, mod, layer, x, v) for B, v in zip(block[1], gy.chunk({n}, 1))]",
        ),
        (
            f"{factory}.kfac_xx(block[0], mod, layer, x, gy)",
            f"[{factory}.kfac_xx(A, mod, layer, a, gy) for A, a in zip(block[0], x.chunk({n}, 1))]",
        ),
    )
    with (
        mended(backend, "get_kfac_blocks", *shapes),
        mended(backend, "_hook_compute_kfac_blocks", *calls),
    ):
        yield


def _per_group(groups: str, rest: str) -> str:
    return f"sA = layer.in_channels // {groups} * layer.kernel_size{rest}"
