"""The exact Fisher of a squared error counts outputs on the last axis and reads them on axis 1.

`FisherExactMSE` runs one backward pass per output feature, `logits.size(-1)` of them, and takes
`logits[:, i]` in each. For outputs with one feature axis the two are the same. For an image or a
sequence they are not: passes are missing, repeated positions are added up, or an index is out of
bounds. A last layer's `B` for a squared error is a multiple of the identity:

```python
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

for height, width in ((4, 3), (3, 4), (7, 7)):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2)).double()
    config = FisherConfig("fisher_exact", ["kron"], loss_type="mse", data_size=1)
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, torch.randn(5, 1, height, width).double())
    try:
        maker.forward_and_backward()
        print(height, width, model[0].fisher.kron.B.tolist())
    except IndexError as error:
        print(height, width, "IndexError:", error)
# prints
#   4 3 [[30.0, 0.0, 0.0], [0.0, 30.0, 0.0], [0.0, 0.0, 0.0]]
#   3 4 [[30.0, 0.0, 0.0], [0.0, 30.0, 0.0], [0.0, 0.0, 30.0]]
#   7 7 IndexError: index 3 is out of bounds for dimension 1 with size 3
```

Expected: the number of data times the number of positions on the diagonal, 5·3·2 = 30 for both of
the first two and 5·6·6 = 180 for the last.

Suggestion: one pass per entry of a datum's output, `logits.flatten(1)`; or refuse outputs with
more than two axes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "The outputs of a squared error are read on the wrong axis"
CASES = (
    ("conv2d-plain-per-location-mse-mean", "expand"),
    ("conv2d-plain-per-location-mse-sum", "expand"),
    ("conv2d-stride-per-location-mse-mean", "expand"),
    ("conv2d-nobias-per-location-mse", "expand"),
)
CAUSE = (
    "asdl/fisher.py, line 471, FisherExactMSE._fisher_loop: n_dims is the size of the last axis, "
    "and line 473 takes the entries of axis 1."
)
DOCUMENTED = "silent about outputs with more than two axes; fisher_exact is 'an exact calculation'"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """One pass for each entry of a datum's output."""
    maker = import_module("asdl.fisher").FisherExactMSE
    flat = ("logits = self._logits", "logits = self._logits.flatten(1)")
    with mended(maker, "_fisher_loop", flat):
        yield
