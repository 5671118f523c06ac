"""With `accumulation_steps`, mini-batches of different sizes have equal weights.

Each forward and backward pass adds a mean over its rows, and `step` divides by the number of
passes. A datum of a small mini-batch then counts more than one of a large mini-batch. The same data
in two halves and in two unequal parts:

```python
import torch
from kfac.preconditioner import KFACPreconditioner
from torch import nn

torch.manual_seed(0)
X = torch.randn(8, 2) * torch.tensor([3.0] * 2 + [1.0] * 6)[:, None]
for sizes in ((8,), (4, 4), (2, 6)):
    model = nn.Linear(2, 1, bias=False)
    made = KFACPreconditioner(model, accumulation_steps=len(sizes), update_factors_in_hook=False)
    for part in X.split(sizes):
        model(part).sum().backward()
    _, state = made._layers[model]
    state.update_a_factor(alpha=0.0)
    print(sizes, f"{state.a_factor.trace().item():.4f}")
# prints
#   (8,) 4.5204
#   (4, 4) 4.5204
#   (2, 6) 7.2834
```

Expected: three equal numbers.

Suggestion: add sums over rows, and divide by the number of all rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-pytorch", "0.4.2"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_pytorch:Adapter"
TITLE = "Mini-batches of different sizes have equal weights when factors are accumulated"
CASES = (
    ("batches-unequal-mse-mean", "expand"),
    ("batches-unequal-mse-sum", "expand"),
    ("batches-unequal-cross-entropy-mean", "expand"),
    ("batches-class-weights", "expand"),
    ("empirical-batches-cross-entropy", "expand"),
)
CAUSE = (
    "kfac/layers/base.py, lines 351 and 357, save_layer_input, and lines 367 and 373, "
    "save_layer_grad_output: means over rows are added, and a pass is counted as one."
)
DOCUMENTED = (
    "'accumulation_steps: number of forward/backward passes between optimization steps'; silent "
    "about their sizes"
)
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Sums over data, divided by the number of data."""
    layer = import_module("kfac.layers.base").KFACBaseLayer
    outputs = weighted("g", "len(grad_output[0])")
    with weighted_inputs(), mended(layer, "save_layer_grad_output", *outputs):
        yield


@contextmanager
def weighted_inputs() -> Iterator[None]:
    """The factors of inputs by their numbers of rows, if nobody has done it."""
    layer = import_module("kfac.layers.base").KFACBaseLayer
    if hasattr(layer.save_layer_input, "mended_source"):
        yield
        return
    with mended(layer, "save_layer_input", *weighted("a", "input_[0][..., 0].numel()")):
        yield


def weighted(x: str, rows: str) -> tuple[tuple[str, str], ...]:
    """What is added, and counted, once becomes as often as there are rows."""
    return (
        (f"get_{x}_factor({x})", f"get_{x}_factor({x}) * {rows}"),
        (f"self._{x}_count = 1", f"self._{x}_count = {rows}"),
        (f"self._{x}_count += 1", f"self._{x}_count += {rows}"),
    )
