"""A layer that is used several times is computed with the inputs of its last call.

Hooks keep a module's input by module, so that a later call overwrites an earlier one's, and every
gradient meets the last input. A layer that is applied to two halves of the data and one whose
halves are swapped have the same Fisher matrix:

```python
import torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatDense, PMatKFAC
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class Siamese(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.fc, self.order = nn.Linear(3, 2), order

    def forward(self, x):  # [N, 2, 3] -> [N, 4]
        return torch.cat([self.fc(x[:, i]) for i in self.order], 1)

for kind in (PMatDense, PMatKFAC):
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(0)
        model, X = Siamese(order), torch.randn(5, 2, 3) * torch.tensor([1.0, 3.0])[:, None]
        loader = DataLoader(TensorDataset(X, X), batch_size=5)
        print(kind.__name__, float(FIM(model, loader, kind, variant="regression").trace()))
# prints
#   PMatDense 76.1966781616211
#   PMatDense 9.33460807800293
#   PMatKFAC 152.3933563232422
#   PMatKFAC 18.66921615600586
```

Expected: twice the same for each representation, and for `PMatDense` the Fisher's trace, which
does not depend on the order. All representations use the same hooks. For KFAC there is a second
cause: the inputs of all T calls are added and divided by the number of examples, so that the block
is too large by T.

Suggestion: let the hook of a call's output remember that call's input, and divide the input factor
by the number of calls; or refuse a module whose forward hook fires twice.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "nngeometry", "0.4"
ADAPTER = "kfac_scratch.conformance.adapters.nngeometry:Adapter"
TITLE = "Of a layer that is used several times, the last call's inputs are taken for all"
CASES = (
    ("used-twice-added-mse", "expand"),
    ("used-in-a-row-mse", "expand"),
    ("used-in-a-row-cross-entropy", "expand"),
)
CAUSE = (
    "nngeometry/backend/torch_hooks/torch_hooks.py, line 754, _hook_savex: the input is kept by "
    "module and read when the gradient arrives; line 292, get_kfac_blocks: the sum over calls "
    "is divided by the number of examples alone."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Every gradient with its own call's input; the input factor as a mean over calls."""
    backend = import_module("nngeometry.backend.torch_hooks.torch_hooks").TorchHooksJacobianBackend
    own = (
        "o.register_hook(lambda g_o, x=i[0]: (self.xs.update({mod: x}), hook_gy(mod, g_o))[1])\n"
        "        rows = self.__dict__.setdefault('rows', {})\n"
        "        rows[mod] = rows.get(mod, 0) + len(i[0])"
    )
    calls = "div_(self.rows[self.l_to_m[layer_id]] / n_output**0.5)"
    with ExitStack() as stack:
        hook = ("o.register_hook(lambda g_o: hook_gy(mod, g_o))", own)
        stack.enter_context(mended(backend, "_add_hooks", hook))
        mean = ("[0].div_(n_examples / n_output**0.5)", f"[0].{calls}")
        stack.enter_context(mended(backend, "get_kfac_blocks", mean))
        yield
