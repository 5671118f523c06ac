"""KFAC with `fisher_type="type-2"` sends one vector to all positions at once.

With a loss term per position, the loss's Hessian has one block per position, and its square root
one column per (position, class). `_compute_loss_and_backward` sends column c of all positions
backward in one pass. What one position's term does to another position's activations then adds up
with its sign, and the result is not what `fisher_type="mc"` converges to, where labels are drawn
independently.

A convolution whose output goes into a squared error: `B` should be a multiple of the identity.

```python
import torch
from torch import nn
from curvlinops import KFACLinearOperator

torch.manual_seed(0)
model, loss = nn.Sequential(nn.Conv2d(1, 3, 2)).double(), nn.MSELoss(reduction="sum")
X, y = torch.randn(5, 1, 3, 3).double(), torch.randn(5, 3, 2, 2).double()
for options in ({"fisher_type": "type-2"}, {"fisher_type": "mc", "mc_samples": 10_000}):
    K = KFACLinearOperator(
        model, loss, list(model.parameters()), [(X, y)], check_deterministic=False, **options
    )
    K.compute_kronecker_factors()
    print(K._gradient_covariances["0"].round())
# prints
#   tensor([[40., 40., 40.],
#           [40., 40., 40.],
#           [40., 40., 40.]], dtype=torch.float64)
#   tensor([[40., -0., -0.],
#           [-0., 40., -0.],
#           [-0., -0., 40.]], dtype=torch.float64)
```

Expected: twice the same, 40 times the identity (a weight of 2, five data, four positions).
Attention shows it, too; with `kfac_approx="reduce"` and position-wise layers the result is too
large by the number of positions. Where positions never meet, under `expand`, the two agree.

Suggestion: one column per (position, class), which costs as many passes; or the present vectors
times random signs per position, which is right in expectation; or a sentence in the documentation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "curvlinops", "3.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.curvlinops:Adapter"
TITLE = "Type-2 vectors of different positions are added up"
CASES = (
    ("attention-tokens-mse", "expand"),
    ("attention-tokens-mse-float32", "expand"),
    ("attention-tokens-cross-entropy", "expand"),
    ("conv2d-plain-per-location-mse-mean", "expand"),
    ("conv2d-plain-per-location-mse-sum", "expand"),
    ("conv2d-stride-per-location-mse-mean", "expand"),
    ("conv2d-padding-per-location-mse-mean", "expand"),
    ("conv2d-dilation-per-location-mse-mean", "expand"),
    ("conv2d-nobias-per-location-mse", "expand"),
)
CAUSE = (
    "curvlinops/kfac.py, line 615, _compute_loss_and_backward: the column of the Hessian's root "
    "is taken for all rows of the flattened output at once, whose rows are (datum, position)."
)
DOCUMENTED = (
    "'the exact Hessian of the loss w.r.t. the model outputs is used' (docstring of "
    "FisherType); that Hessian has a column per position and class. That the last axis is the "
    "random variable's for MSELoss is documented"
)
THREAD = "https://github.com/f-dangel/curvlinops/pull/62"


@contextmanager
def patch() -> Iterator[None]:
    """One column per position and class."""
    operator = import_module("curvlinops.kfac").KFACLinearOperator
    columns = "num_cols = hessian_sqrts.shape[-1]"
    position = "eye(S, dtype=output.dtype).repeat(len(output) // S, 1)[:, None, :, None]"
    apart = (
        "S = self._num_per_example_loss_terms; "
        f"hessian_sqrts = (hessian_sqrts.unsqueeze(2) * {position}).flatten(2); {columns}"
    )
    with mended(operator, "_compute_loss_and_backward", (columns, apart)):
        yield
