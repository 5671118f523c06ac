"""A layer that is used T times in a forward pass has a block that is too small by T.

`save_layer_grad_output` adds the factor of every call's gradients, and `step` divides the sum by
the number of calls. The calls of one pass are like positions: their gradients add up in a datum's
gradient, so that one of the factors is a sum over calls. The same sum over two positions, by two
calls and by one:

```python
import torch
from kfac.preconditioner import KFACPreconditioner
from torch import nn

class Siamese(nn.Module):
    def __init__(self, together):
        super().__init__()
        self.fc, self.together = nn.Linear(3, 2), together

    def forward(self, x):  # [N, 6] -> [N, 4]
        parts = x.unflatten(1, (2, 3))
        if self.together:
            return self.fc(parts.flatten(0, 1)).unflatten(0, (-1, 2)).flatten(1)
        return torch.cat([self.fc(parts[:, i]) for i in (0, 1)], 1)

for together in (True, False):
    torch.manual_seed(0)
    model, X = Siamese(together), torch.randn(5, 6)
    made = KFACPreconditioner(model, update_factors_in_hook=False)
    model(X).square().mean().backward()
    _, state = made._layers[model.fc]
    state.update_g_factor(alpha=0.0)
    print(together, f"{state.g_factor.trace().item():.4g}")
# prints
#   True 0.00492
#   False 0.00492
```

Expected: twice these numbers, a mean over five data of a sum over two calls.

Suggestion: count the calls of a pass apart from the passes of `accumulation_steps`, and divide the
factor of the gradients by the latter alone; or refuse a layer whose hook fires twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-pytorch", "0.4.2"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_pytorch:Adapter"
TITLE = "A layer that is used several times has a block that is too small by as much"
CASES = (
    ("used-twice-added-mse", "expand"),
    ("used-in-a-row-mse", "expand"),
    ("used-in-a-row-cross-entropy", "expand"),
    ("used-at-other-positions-mse", "expand"),
    ("used-at-other-positions-cross-entropy", "expand"),
)
CAUSE = (
    "kfac/layers/base.py, line 400, update_g_factor: the sum over calls is divided by their "
    "number; line 357, save_layer_input: calls with other numbers of positions have equal weights."
)
DOCUMENTED = "silent"
THREAD = ""
WITH = ("kfac_pytorch_positions",)


@contextmanager
def patch() -> Iterator[None]:
    """A sum over the calls of one pass, as these cases have, and inputs weighted by positions."""
    folder = __name__.rpartition(".")[0]
    scale, batches = (
        import_module(f"{folder}.kfac_pytorch_{name}") for name in ("positions", "micro_batches")
    )
    layer = import_module("kfac.layers.base").KFACBaseLayer
    received = "g = grad_output[0].to(self.factor_dtype)"
    counted = f"self._calls = getattr(self, '_calls', 0) + 1; {received}"
    with (
        scale.patch(),
        batches.weighted_inputs(),
        mended(layer, "save_layer_grad_output", (received, counted)),
        mended(layer, "update_g_factor", ("(1 / self._g_count)", "(self._calls / self._g_count)")),
    ):
        yield
