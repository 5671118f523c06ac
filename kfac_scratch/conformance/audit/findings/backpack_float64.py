"""Second-order extensions fail in double precision behind `AvgPool2d`, and KFRA with `MSELoss`.

The pool's Jacobian is applied by a convolution that is made in PyTorch's default precision, and
KFRA's loss Hessian is an identity in it:

```python
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR, KFRA
from torch import nn

pooled = nn.Sequential(nn.Conv2d(1, 2, 2), nn.AvgPool2d(2), nn.Flatten())
for extension, model, X in (
    (KFLR(), pooled, torch.randn(5, 1, 3, 3)),
    (KFRA(), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)), torch.randn(5, 3)),
):
    f = extend(model.double())(X.double())
    try:
        with backpack(extension):
            extend(nn.MSELoss())(f, torch.zeros_like(f)).backward()
    except RuntimeError as error:
        print(type(extension).__name__, error)
# prints
#   KFLR expected scalar type Double but found Float
#   KFRA expected scalar type Double but found Float
```

Expected: no error. A way around it is `torch.set_default_dtype(torch.float64)`.

Suggestion: `.to(module.input0.device, module.input0.dtype)` in `avgpoolnd.py`, twice, and
`dtype=module.input0.dtype` in `MSELossDerivatives._sum_hessian` (mseloss.py, line 70).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "BackPACK", "1.7.1"
ADAPTER = "kfac_scratch.conformance.adapters.backpack:Adapter"
TITLE = "Average pooling and KFRA's squared error in double precision raise an error"
CASES = (("conv2d-plain-pooled-mse", "expand"), ("conv2d-stride-pooled-mse", "expand"))
BESIDE = ("backpack_conv_factors",)
CAUSE = (
    "backpack/core/derivatives/avgpoolnd.py, line 129, __apply_jacobian_t_of: the helper "
    "convolution is moved to the input's device, and not to its dtype."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """The helper convolution in the input's precision."""
    pool = import_module("backpack.core.derivatives.avgpoolnd").AvgPoolNDDerivatives
    device = ".to(module.input0.device)"
    both = ".to(module.input0.device, module.input0.dtype)"
    with mended(pool, "_AvgPoolNDDerivatives__apply_jacobian_t_of", (device, both)):
        yield
