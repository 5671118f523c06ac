"""`FIM(..., variant="classif_logits")` is NaN as soon as one prediction is confident.

The Cholesky factor of `diag(p) - p p^T` needs the probabilities behind each class, `q_k =
sum_{j>k} p_j`. They are computed as `1 - cumsum(p)`. If the probabilities so far are 1 up to
rounding, `q` is zero or a negative rounding error, and the next lines divide by it and take its
square root. In single precision a logit that leads by 17 is enough:

```python
import torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatKFAC
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
model, X = nn.Sequential(nn.Linear(3, 4)), torch.randn(100, 3)
for lead in (5.0, 10.0, 20.0):
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([lead, 0.0, 0.0, 0.0]))
    F = FIM(model, DataLoader(TensorDataset(X, X)), PMatKFAC, variant="classif_logits")
    print(lead, float(F.trace()))
# prints
#   5.0 0.167545884847641
#   10.0 0.0011935689253732562
#   20.0 nan
```

Expected: small numbers. One such datum among many makes the whole matrix NaN.

Suggestion: add from the other end, `p.flip(1).cumsum(1).flip(1)` of the later classes, which is
positive, and divide by `q.clamp_min(torch.finfo(q.dtype).tiny)` instead of `q + eps`; or use the
root `diag(sqrt(p)) - p sqrt(p)^T`, which needs no division and one column more.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "nngeometry", "0.4"
ADAPTER = "kfac_scratch.conformance.adapters.nngeometry:Adapter"
TITLE = "One confident prediction makes the Fisher of a softmax model NaN"
CASES = (("confident-cross-entropy-float32", "expand"),)
CAUSE = (
    "nngeometry/metrics.py, line 165, FIM: the probability of the later classes is 1 minus a "
    "cumulative sum, which can be zero or negative; its root and its inverse are taken."
)
DOCUMENTED = "silent"
THREAD = ""
BESIDE = ("nngeometry_float64",)
UPSTREAM = (
    "New in release 0.4. Release 0.3.2 multiplied the logarithms of the probabilities by roots of "
    "the probabilities, without a triangular matrix and without a division, and answers these "
    "cases rightly"
)


@contextmanager
def patch() -> Iterator[None]:
    """Sums from the other end, which are positive."""
    metrics = import_module("nngeometry.metrics")
    later = "torch.nn.functional.pad(p[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))"
    with mended(metrics, "FIM", ("1 - p.cumsum(dim=1)", later)):
        yield
