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
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "nngeometry", "0.4"
ADAPTER = "kfac_scratch.conformance.adapters.nngeometry:Adapter"
TITLE = "Of a layer that is used several times, the last call's inputs are taken for all"
CASES = (
    ("used-twice-added-mse", "expand"),
    ("used-in-a-row-mse", "expand"),
    ("used-in-a-row-cross-entropy", "expand"),
    ("ekfac-used-in-a-row-mse", "ekfac"),
    ("ekfac-used-in-a-row-cross-entropy", "ekfac"),
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
    """Every gradient with its own call's input; means, and gradients of a datum, over calls."""
    backend = import_module("nngeometry.backend.torch_hooks.torch_hooks").TorchHooksJacobianBackend
    own = (
        "o.register_hook(lambda g_o, x=i[0]: (self.xs.update({mod: x}), hook_gy(mod, g_o))[1])\n"
        "        rows, calls = (self.__dict__.setdefault(k, {}) for k in ('rows', 'calls'))\n"
        "        rows[mod] = rows.get(mod, 0) + len(i[0])\n"
        "        calls[mod] = calls.get(mod, 0) + 1"
    )
    mean = "[0].div_(self.rows[self.l_to_m[layer_id]] / n_output**0.5)"
    apart = vars(backend)["_hook_compute_kfe_diag"]
    parts: list[tuple[Tensor, Tensor]] = []

    def together(self: Any, mod: Any, gy: Tensor) -> None:
        if self.calls[mod] == 1:
            return apart(self, mod, gy)
        parts.append((self.xs[mod], gy))
        if len(parts) == self.calls[mod]:
            name = self.m_to_l[mod]
            QA, QB = self._kfe[name]
            self._diags[name].add_(_squares(parts, QA, QB, mod.bias is not None))
            parts.clear()
        return None

    with (
        mended(backend, "_add_hooks", ("o.register_hook(lambda g_o: hook_gy(mod, g_o))", own)),
        mended(backend, "get_kfac_blocks", ("[0].div_(n_examples / n_output**0.5)", mean)),
        mended(
            backend,
            "get_kfe_diag",
            ("self._kfe = kfe", "self._kfe = kfe; self.__dict__.pop('calls', None)"),
        ),
    ):
        backend._hook_compute_kfe_diag = together
        try:
            yield
        finally:
            backend._hook_compute_kfe_diag = apart


def _squares(calls: list[tuple[Tensor, Tensor]], QA: Tensor, QB: Tensor, with_bias: bool) -> Tensor:
    """Squares of a datum's gradient in the eigenbasis, the sum over data."""
    total = QA.new_zeros(())
    for x, g in calls:
        a = torch.cat([x, torch.ones_like(x[:, :1])], 1) if with_bias else x
        total = total + torch.einsum("no,ni->noi", g @ QB, a @ QA)
    return total.square().sum(0).flatten()
