"""KFAC is too large by the number of classes if `CrossEntropyLoss` has probabilities as targets.

`CrossEntropyLoss` takes class indices `[N]` or class probabilities `[N, C]`. The number of loss
terms is read from the targets as if they were indices, so that with probabilities and
`reduction="mean"` every datum counts as C terms. The loss's Hessian does not depend on targets
that sum to one: index and one-hot vector should give the same.

```python
import torch
from torch import nn
from curvlinops import KFACLinearOperator

torch.manual_seed(0)
model, loss = nn.Sequential(nn.Linear(3, 4)).double(), nn.CrossEntropyLoss()
params, X, y = list(model.parameters()), torch.randn(5, 3).double(), torch.tensor([0, 1, 2, 3, 0])
for target in (y, nn.functional.one_hot(y, 4).double()):
    print(KFACLinearOperator(model, loss, params, [(X, target)], fisher_type="type-2").trace.item())
# prints
#   2.2720123613085508
#   9.088049445234203
```

Expected: equal numbers. With `reduction="sum"` they are. `mc` is too large in the same way;
`empirical` raises an error, since
the targets are flattened as if they were indices.

Suggestion: count `y.numel() // y.shape[1]` if `y` is a floating-point tensor, or refuse it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "curvlinops", "3.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.curvlinops:Adapter"
TITLE = "Cross-entropy with probabilities: too large by the number of classes"
CASES = (("probabilities-cross-entropy-mean", "expand"),)
CAUSE = (
    "curvlinops/kfac.py, line 325, _set_num_per_example_loss_terms: y.numel() is taken for the "
    "number of loss terms of CrossEntropyLoss; line 545, _rearrange_for_larger_than_2d_output: "
    "the classes of a target are flattened into the batch."
)
DOCUMENTED = "silent about probabilities as targets"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """A datum with probabilities is one term."""
    operator = import_module("curvlinops.kfac").KFACLinearOperator
    terms = "(y.numel() // (y.shape[1] if y.is_floating_point() else 1))"
    flat = 'y = rearrange(y, "batch ... -> (batch ...)")'
    kept = f"{flat} if not y.is_floating_point() else rearrange(y, 'batch c ... -> (batch ...) c')"
    by_itself = "_rearrange_for_larger_than_2d_output"  # since release 3
    rows = by_itself if hasattr(operator, by_itself) else "_compute_loss_and_backward"
    with (
        mended(operator, "_set_num_per_example_loss_terms", ("y.numel()", terms)),
        mended(operator, rows, (flat, kept)),
    ):
        yield
