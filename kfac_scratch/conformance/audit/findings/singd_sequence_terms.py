"""`loss_average="batch+sequence"` takes every layer's own positions for those of the loss.

The gradients of a mean over N·T terms are multiplied by the root of N·T to get `H_C`. T is the
number of the loss's positions; what is used is the number of positions of the layer at hand. In a
network whose layers have more or fewer of them (convolutions without padding, strides, pooled or
added tokens), the scales of blocks differ between layers. A mean over a 3x3 map of labels, and the
same told with `batch`, where the loss must be multiplied by the root of 9:

```python
import torch
from singd.optim.optimizer import SINGD
from torch import nn

for average in ("batch+sequence", "batch"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Conv2d(2, 3, 3))
    X, y = torch.randn(5, 1, 7, 7), torch.randint(3, (5, 3, 3))
    optimizer = SINGD(model, loss_average=average)
    loss = nn.CrossEntropyLoss()(model(X), y)
    (loss if average == "batch+sequence" else 3 * loss).backward()
    traces = {name: round(H.to_dense().trace().item(), 4) for name, H in optimizer.H_Cs.items()}
    print(average, traces)
# prints
#   batch+sequence {'2': 0.7131, '0': 0.4809}
#   batch {'2': 0.7131, '0': 0.1731}
```

Expected: equal numbers for both layers; they differ by 25/9 in the first, which has 5x5 positions.

Suggestion: let the user give the number of terms per datum, or let `loss_average` be a number.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "singd", "0.0.5"
ADAPTER = "kfac_scratch.conformance.adapters.singd:Adapter"
TITLE = "The loss's number of terms is taken from each layer's own positions"
CASES = (("empirical-cnn-per-location-cross-entropy", "expand"),)
CAUSE = (
    "singd/optim/utils.py, line 285, conv2d_process_grad_output: the number of loss terms is "
    "multiplied by the spatial size of the layer's own output; line 331 for linear layers."
)
DOCUMENTED = (
    "'a mean over as many terms as the size of the mini-batch times the sequence length': that "
    "of the loss, which is every layer's only in a sequence of constant length"
)
THREAD = "https://github.com/f-dangel/singd/pull/26"


@contextmanager
def patch() -> Iterator[None]:
    """The case's loss has 2x2 positions."""
    utils = import_module("singd.optim.utils")
    own = "num_loss_terms *= g.shape[2:].numel()"
    with mended(utils, "conv2d_process_grad_output", (own, "num_loss_terms *= 2 * 2")):
        yield
