"""Accumulating over micro-batches gives other factors than one batch of the same data.

`H_K` is a mean over a batch, and the means of micro-batches are added. With a loss that is a sum
(`loss_average=None`), `H_C` is right and `H_K` too large by the number of micro-batches. With
`loss_average="batch"` and losses multiplied by the share of the data, as in the library's example,
`H_C` is too small by the same number and the product `H_C ⊗ H_K` right; but only if micro-batches
are of one size: else data of a small one count more in `H_K` and less in `H_C`.

```python
import torch
from singd.optim.optimizer import SINGD
from torch import nn

for average, sizes in ((None, (6,)), (None, (3, 3)), ("batch", (6,)), ("batch", (5, 1))):
    torch.manual_seed(0)
    model, X, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(6, 3), torch.randn(6, 2)
    X[:3] *= 10
    optimizer = SINGD(model, loss_average=average)
    loss = nn.MSELoss(reduction="mean" if average else "sum")
    for X_b, y_b in zip(X.split(sizes), y.split(sizes)):
        share = len(X_b) / 6 if average else 1
        (share * loss(model(X_b), y_b)).backward()
    traces = [H["0"].to_dense().trace().item() for H in (optimizer.H_Ks, optimizer.H_Cs)]
    print(average, sizes, *(f"{t:.4g}" for t in traces), f"product {traces[0] * traces[1]:.4g}")
# prints
#   None (6,) 64.13 305.6 product 1.96e+04
#   None (3, 3) 128.3 305.6 product 3.92e+04
#   batch (6,) 64.13 12.73 product 816.6
#   batch (5, 1) 82.55 10.14 product 836.7
```

Expected: equal products for each of the two losses.

Suggestion: keep the number of data with the buffers: average `H_K` with the sizes of the batches
as weights, and multiply `H_C` by the total number of data instead of each batch's own.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "singd", "0.0.5"
ADAPTER = "kfac_scratch.conformance.adapters.singd:Adapter"
TITLE = "Input factors of micro-batches are added, not averaged"
CASES = (
    ("batches-equal-mse-sum", "expand"),
    ("batches-equal-mse-sum", "reduce"),
    ("batches-equal-cross-entropy-sum", "expand"),
    ("batches-unequal-mse-mean", "expand"),
    ("batches-unequal-mse-mean", "reduce"),
    ("batches-unequal-mse-sum", "expand"),
    ("batches-unequal-mse-sum", "reduce"),
    ("batches-unequal-cross-entropy-mean", "expand"),
    ("batches-unequal-cross-entropy-sum", "expand"),
    ("batches-class-weights", "expand"),
    ("empirical-batches-cross-entropy", "expand"),
)
CAUSE = (
    "singd/optim/optimizer.py, line 631, _accumulate_H_terms: H_K, which process_input has made "
    "a mean over its batch, is added to the one before; line 634 for H_C, scaled by its batch's "
    "size."
)
DOCUMENTED = (
    "the example 'Advanced usage' multiplies a mean loss by the share of the data; silent about "
    "sums and about micro-batches of different sizes"
)
THREAD = "https://github.com/f-dangel/singd/pull/46"


@contextmanager
def patch() -> Iterator[None]:
    """Weights by the number of data, for as many batches as there are."""
    optimizer = import_module("singd.optim.optimizer").SINGD
    comment = "# store or update existing quantities (they get flushed in `.step`)"
    sizes = (
        "n, seen = len(inputs[0]), self.__dict__.setdefault('_seen', {})\n"
        "    old = seen.get(module_name, 0)\n"
        "    N = seen[module_name] = old + n\n"
        "    mean = loss_average is not None"
    )
    K, C = "self.H_Ks[module_name].add_(H_K)", "self.H_Cs[module_name].add_(H_C)"
    weighted_K = "self.H_Ks[module_name].mul_(old / N).add_(H_K, alpha=n / N)"
    weighted_C = (
        "self.H_Cs[module_name].mul_(N / max(old, 1) if mean else 1.0)"
        ".add_(H_C, alpha=N / n if mean else 1.0)"
    )
    changes = ((comment, sizes), (K, weighted_K), (C, weighted_C))
    with mended(optimizer, "_accumulate_H_terms", *changes):
        yield
