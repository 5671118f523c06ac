"""Grouped convolutions have the factors of a convolution without groups.

`Conv2d.cov_kron_A` is made of the patches of all channels, whatever `groups` is. The matrix does
not fit the weight, so that preconditioning raises an error:

```python
import torch
from asdl.precondition import KfacGradientMaker, PreconditioningConfig
from torch import nn

for groups in (1, 2):
    conv = nn.Conv2d(4, 6, 3, groups=groups, bias=False)
    model = nn.Sequential(conv, nn.Flatten())
    maker = KfacGradientMaker(model, PreconditioningConfig(data_size=5), loss_type="mse")
    output = maker.setup_model_call(model, torch.randn(5, 4, 3, 3))
    maker.setup_loss_call(nn.MSELoss(), output, torch.randn(5, 6))
    try:
        maker.forward_and_backward()
        print(groups, "no error")
    except RuntimeError as error:
        print(groups, error)
# prints
#   1 no error
#   2 mat1 and mat2 shapes cannot be multiplied (6x18 and 36x36)
```

Expected: no error, or one that says that grouped convolutions are not supported. Without a step,
`module.fisher.kron` holds the factors of another layer, and nothing says so.

Suggestion: raise an error for `groups > 1` in `im2col_2d`, as for a dilation; or keep one pair of
factors per group.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "groups of a convolution are ignored"
CASES = (("cnn-groups-mse", "expand"), ("cnn-groups-cross-entropy", "expand"))
CAUSE = (
    "asdl/operations/conv.py, line 86, cov_kron_A, and line 103, cov_kron_B: the channels of all "
    "groups are taken together."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """One pair of factors per group, along a leading axis."""
    conv = import_module("asdl.operations.conv").Conv2d
    rows = "m.unflatten(0, (module.groups, -1)).squeeze(0)"
    grouped = ("torch.matmul(m, m.T)", f"torch.matmul({rows}, {rows}.mT)")
    inputs = ("torch.matmul(\n        m, m.T\n    )", f"torch.matmul({rows}, {rows}.mT)")
    with mended(conv, "cov_kron_A", inputs), mended(conv, "cov_kron_B", grouped):
        yield
