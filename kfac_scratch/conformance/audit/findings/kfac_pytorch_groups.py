"""Grouped convolutions have the input factor of a convolution without groups.

Patches are made of the channels of all groups, so that the factor does not fit the gradient, and
`step` raises an error about two matrices:

```python
import torch
from kfac.preconditioner import KFACPreconditioner
from torch import nn

for groups in (1, 2):
    model = nn.Conv2d(4, 6, 3, groups=groups)
    preconditioner = KFACPreconditioner(model)
    model(torch.randn(5, 4, 3, 3)).square().mean().backward()
    try:
        preconditioner.step()
        print(groups, "no error")
    except RuntimeError as error:
        print(groups, error)
# prints
#   1 no error
#   2 mat1 and mat2 shapes cannot be multiplied (6x19 and 37x37)
```

Expected: no error, or one that names the layer when it is registered.

Suggestion: skip convolutions with `groups > 1` in `get_module_helper`, as other layers that are
not known; or keep one pair of factors per group.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-pytorch", "0.4.2"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_pytorch:Adapter"
TITLE = "groups of a convolution are ignored"
CASES = (
    ("conv2d-groups-per-location-mse", "expand"),
    ("cnn-groups-mse", "expand"),
    ("cnn-groups-cross-entropy", "expand"),
)
CAUSE = (
    "kfac/layers/modules.py, line 170, Conv2dModuleHelper.get_a_factor: patches of all channels, "
    "whatever module.groups is."
)
DOCUMENTED = "silent"
THREAD = ""
WITH = ("kfac_pytorch_positions",)


@contextmanager
def patch() -> Iterator[None]:
    """One pair of factors per group; and the scale, which is another finding."""
    conv = import_module("kfac.layers.modules").Conv2dModuleHelper
    scale = import_module(f"{__name__.rpartition('.')[0]}.kfac_pytorch_positions")
    layer = import_module("kfac.layers.base").KFACBaseLayer
    first = [
        mended(layer, f"update_{x}_factor", (f"{x}_new.shape[0]", f"{x}_new.shape[-1]"))
        for x in "ag"
    ]  # the identity that an average begins with
    with scale.patch(), first[0], first[1]:
        whole = conv.get_a_factor, conv.get_g_factor

        def of_inputs(self: Any, a: Tensor) -> Tensor:
            return _apart(whole[0], self, a)

        def of_gradients(self: Any, g: Tensor) -> Tensor:
            return _apart(whole[1], self, g)

        of_inputs.mended_source = of_gradients.mended_source = ""  # type: ignore[attr-defined]
        conv.get_a_factor, conv.get_g_factor = of_inputs, of_gradients
        try:
            yield
        finally:
            conv.get_a_factor, conv.get_g_factor = whole


def _apart(factor: Callable[[Any, Tensor], Tensor], helper: Any, x: Tensor) -> Tensor:
    parts = [factor(helper, part.contiguous()) for part in x.chunk(helper.module.groups, 1)]
    return torch.stack(parts) if len(parts) > 1 else parts[0]
