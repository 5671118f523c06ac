"""With M Monte Carlo samples, the Fisher is too small by M.

`fisher_mc` adds the outer products of M samples' gradients. Each sample's loss is divided by
`n_mc_samples`, so that its outer product is divided by the square of it, and the sum of M of them
is 1/M of an estimate. For a classifier whose classes are equally likely, the squared norm of `p -
e_y` is 1 - 1/C whatever label y is drawn, so that the trace of the last layer's `B` does not
depend on chance:

```python
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

for samples in (1, 2, 10):
    model = nn.Sequential(nn.Linear(3, 4)).double()
    nn.init.zeros_(model[0].weight), nn.init.zeros_(model[0].bias)
    config = FisherConfig(
        "fisher_mc", ["kron"], loss_type="cross_entropy", n_mc_samples=samples, data_size=5
    )
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, torch.randn(5, 3).double())
    maker.forward_and_backward()
    print(samples, model[0].fisher.kron.B.trace().item())
# prints
#   1 0.75
#   2 0.375
#   10 0.07500000000000004
```

Expected: 0.75 three times. The other shapes (diagonal, layer-wise, full) go through the same loop.

Suggestion: divide the loss by the square root of `n_mc_samples`, for cross-entropy and for the
squared error.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "M samples make the Fisher M times too small"
CASES = tuple(
    (f"sampled-{kind}-{reduction}", "expand")
    for kind in ("mse", "cross-entropy")
    for reduction in ("mean", "sum")
)
CAUSE = (
    "asdl/fisher.py, lines 458 and 489, _fisher_loop of FisherMCCrossEntropy and FisherMCMSE: "
    "the loss of a sample is divided by n_mc_samples, not by its square root."
)
DOCUMENTED = "'an estimate by MC samples'; silent about the scale"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Divide a sample's loss by the root of their number."""
    fisher = import_module("asdl.fisher")
    root = ("/ n_mc_samples", "/ n_mc_samples**0.5")
    with (
        mended(fisher.FisherMCCrossEntropy, "_fisher_loop", root),
        mended(fisher.FisherMCMSE, "_fisher_loop", root),
    ):
        yield
