"""A layer that is used T times has a weight block that is too large by T.

Every call adds its own input factor to the module's, and every call's gradient its own factor of
the outputs. The sum of T products is replaced by a product of two sums, which has T squared terms;
one of the factors should be a mean over calls. The bias's block, which is the factor of the
outputs alone, is right, so that weight and bias of one layer have different scales. The same
function, with the layer called twice and with a 1x1 convolution over two positions:

```python
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):  # [N, 3, 1, 2]
        return self.fc(x[:, :, 0, 0]) + self.fc(x[:, :, 0, 1])

class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.fc(x).sum((2, 3))

for Model in (Siamese, Convolution):
    torch.manual_seed(0)
    model, X = Model().double(), torch.randn(5, 3, 1, 2, generator=torch.Generator().manual_seed(0))
    config = FisherConfig("fisher_exact", ["kron"], loss_type="mse", data_size=5)
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, X.double())
    maker.forward_and_backward()
    print(Model.__name__, model.fc.fisher.kron.trace(), model.fc.fisher.kron.B.trace().item())
# prints
#   Siamese 20.299333719718156 4.0
#   Convolution 10.149666859859078 4.0
```

Expected: equal numbers.

Suggestion: divide `A` by the number of calls; or refuse a module whose forward hook fires twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "A layer that is used several times is counted as often again"
CASES = (
    ("used-twice-added-mse", "expand"),
    ("used-in-a-row-mse", "expand"),
    ("used-in-a-row-cross-entropy", "expand"),
)
CAUSE = (
    "asdl/operations/operation.py, line 200, forward_post_process: every call adds its input "
    "factor, and nothing divides by the number of calls."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Keep a running mean over calls, with the weights of their numbers of positions."""
    operation = import_module("asdl.operations.operation").Operation
    added = "A = self.cov_kron_A(module, in_data).mul_(cov_scale)"
    mean = (
        "own = out_data[0].numel() // len(module.weight)\n"
        "            total = self._positions = getattr(self, '_positions', 0) + own\n"
        f"            {added}.mul_(own / total)\n"
        "            if total > own:\n"
        "                self._op_results[OP_COV_KRON]['A'].mul_((total - own) / total)"
    )
    with mended(operation, "forward_post_process", (added, mean)):
        yield
