"""`FIM(..., variant="classif_logits")` raises an error in another than the default precision.

The triangular matrix of the Cholesky factor is made in PyTorch's default precision:

```python
import torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatKFAC
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

model, X = nn.Sequential(nn.Linear(3, 4)).double(), torch.randn(5, 3).double()
try:
    FIM(model, DataLoader(TensorDataset(X, X)), PMatKFAC, variant="classif_logits")
except RuntimeError as error:
    print(error)
# prints
#   expected m1 and m2 to have the same dtype, but got: double != float
```

Expected: no error. With `torch.set_default_dtype(torch.float64)` there is none, but then a model in
single precision raises it. In the same function, `torch.finfo().eps` is that of the default
precision: with single precision as default it limits a double precision model to seven digits.

Suggestion: `dtype=logits.dtype` in `torch.ones`, and `torch.finfo(logits.dtype)`. Elsewhere
buffers of the default precision are added to, which rounds silently
(`JacobianFactory.layer_block`, `PMatKFAC.to_torch`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "nngeometry", "0.4"
ADAPTER = "kfac_scratch.conformance.adapters.nngeometry:Adapter"
TITLE = "The Fisher of a softmax model in another precision than PyTorch's default raises an error"
CASES = (("batches-equal-cross-entropy-mean-float32", "expand"),)
CAUSE = (
    "nngeometry/metrics.py, line 180, FIM: torch.ones without a dtype; line 188: torch.finfo "
    "without one."
)
DOCUMENTED = "silent"
THREAD = ""
UPSTREAM = (
    "New in release 0.4. Release 0.3.2 multiplied the logarithms of the probabilities by roots of "
    "the probabilities, without a triangular matrix and without a division, and answers these "
    "cases rightly"
)


@contextmanager
def patch() -> Iterator[None]:
    """Constants in the precision of the logits."""
    metrics = import_module("nngeometry.metrics")
    ones = ("n_out), device=device)", "n_out), device=device, dtype=logits.dtype)")
    eps = ("torch.finfo().eps", "torch.finfo(logits.dtype).eps")
    with mended(metrics, "FIM", ones, eps):
        yield
