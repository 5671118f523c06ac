"""A linear layer whose input is a transposed tensor raises an error.

`LinearModuleHelper.get_a_factor` flattens positions by `view`, which needs an input whose axes lie
behind each other in memory. `get_g_factor` has `reshape`:

```python
import torch
from kfac.preconditioner import KFACPreconditioner
from torch import nn

model = nn.Linear(3, 2)
KFACPreconditioner(model)
print(model(torch.randn(5, 4, 3)).shape)
try:
    model(torch.randn(5, 3, 4).mT)
except RuntimeError as error:
    print(str(error)[:45])
# prints
#   torch.Size([5, 4, 2])
#   view size is not compatible with input tensor
```

Expected: no error, since PyTorch's layer has none.

Suggestion: `a.reshape(-1, a.size(-1))`, as for the gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-pytorch", "0.4.2"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_pytorch:Adapter"
TITLE = "Transposed inputs of a linear layer raise an error"
CASES = (
    ("transposed-tokens-mse", "expand"),
    ("transposed-last-layer-mse", "expand"),
    ("transposed-pooled-cross-entropy", "expand"),
)
CAUSE = "kfac/layers/modules.py, line 129, LinearModuleHelper.get_a_factor: view for reshape."
DOCUMENTED = "silent"
THREAD = ""
WITH = ("kfac_pytorch_positions",)


@contextmanager
def patch() -> Iterator[None]:
    """Reshape; and the scale of positions, which is another finding."""
    linear = import_module("kfac.layers.modules").LinearModuleHelper
    scale = import_module(f"{__name__.rpartition('.')[0]}.kfac_pytorch_positions")
    with scale.patch(), mended(linear, "get_a_factor", ("a.view", "a.reshape")):
        yield
