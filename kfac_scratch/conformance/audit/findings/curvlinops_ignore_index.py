"""KFAC with `fisher_type="type-2"` gives targets at `ignore_index` curvature.

`CrossEntropyLoss` drops such targets, and so does `GGNLinearOperator`. KFAC's square root of the
loss Hessian does not look at the target. Two data of which one is ignored should give the same as
the other alone:

```python
import torch
from torch import nn
from curvlinops import KFACLinearOperator

torch.manual_seed(0)
model, loss = nn.Sequential(nn.Linear(3, 4)).double(), nn.CrossEntropyLoss()
params, X = list(model.parameters()), torch.randn(2, 3).double()

def trace(X, y):
    data = [(X, y)]
    return KFACLinearOperator(model, loss, params, data, fisher_type="type-2").trace.item()

print(trace(X, torch.tensor([1, -100])), trace(X[:1], torch.tensor([1])))
# prints
#   1.7998337816655188 1.5081160928080954
```

Expected: equal numbers. With `fisher_type="mc"` the drawn labels replace the ignored targets, with
the same effect; `empirical` drops them, as the loss does.

Suggestion: set the root to zero where `y == loss_func.ignore_index`, and for `reduction="mean"`
count only the other targets. The docstring of `num_per_example_loss_terms` says that the number of
terms is expected to be the same for all examples; an error would fit that, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "curvlinops", "3.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.curvlinops:Adapter"
TITLE = "Targets that the loss ignores count in KFAC"
CASES = (
    ("tokens-cross-entropy-ignored-mean", "expand"),
    ("tokens-cross-entropy-ignored-sum", "expand"),
)
CAUSE = (
    "curvlinops/kfac_utils.py, line 123, loss_hessian_matrix_sqrt: c is 1 whatever the target "
    "is; curvlinops/kfac.py, line 609: the mean is taken over all targets."
)
DOCUMENTED = (
    "silent about ignore_index; num_per_example_loss_terms 'is expected to be the same for all "
    "examples' (docstring of KFACLinearOperator.__init__)"
)
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """No curvature where the target is ignored, and the mean over the others."""
    kfac = import_module("curvlinops.kfac")
    kept = "(y != self._loss_func.ignore_index).sum().item()"
    has = "hasattr(self._loss_func, 'ignore_index') and not y.is_floating_point()"
    label = "target_one_datum.is_floating_point() or target_one_datum.item()"
    terms = f"(num_loss_terms * ({kept} if {has} else num_loss_terms)) ** -0.5"
    with (
        mended(
            kfac,
            "loss_hessian_matrix_sqrt",
            ("c = 1.0", f"c = 1.0 * float({label} != loss_func.ignore_index)"),
        ),
        mended(
            kfac.KFACLinearOperator,
            "_compute_loss_and_backward",
            ("1.0 / num_loss_terms", terms),
        ),
    ):
        yield
