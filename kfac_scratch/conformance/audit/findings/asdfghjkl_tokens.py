"""The exact Fisher of cross-entropy sends a class's vectors of all positions backward at once.

With a label per position, the Fisher has one vector per position and class.
`FisherExactCrossEntropy` runs one backward pass per class, for all rows of the flattened logits
together. Rows of different data do not meet, but positions of one datum do, wherever a layer below
sees several of them. What one position's vector does to another position's activations then adds
up with its sign. What is got is not what `fisher_mc` converges to, where labels of different
positions are independent. Two positions whose logits are one layer's output, with the classes in
one order and in the other:

```python
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x):  # [N, 3] -> [N, 2 positions, 2 classes]
        z = self.fc(x)
        return torch.stack([z, z.roll(1, -1)], 1)

for kind in ("fisher_exact", "fisher_mc"):
    torch.manual_seed(0)
    model, X = Twice().double(), torch.randn(5, 3).double()
    total = 0.0
    for _ in range(1 if kind == "fisher_exact" else 2000):
        maker = get_fisher_maker(
            model, FisherConfig(kind, ["kron"], loss_type="cross_entropy", data_size=5)
        )
        output = maker.setup_model_call(model, X)
        maker.setup_logits_repr(output.flatten(0, 1))
        maker.forward_and_backward()
        total += model.fc.fisher.kron.B.trace().item()
    print(kind, round(total / (1 if kind == "fisher_exact" else 2000), 2))
# prints
#   fisher_exact 0.04
#   fisher_mc 0.86
```

Expected: the same but for the noise of 2000 samples.

Suggestion: one pass per position and class; or the present vectors times random signs per
position, which is right in expectation; or a sentence in the documentation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "Vectors of different positions are added up in the exact Fisher of cross-entropy"
CASES = (("attention-tokens-cross-entropy", "expand"),)
BESIDE = ("asdfghjkl_linear_positions",)
CAUSE = (
    "asdl/fisher.py, line 439, FisherExactCrossEntropy._fisher_loop: the losses of class i are "
    "summed over all rows, which are (datum, position), for one backward pass."
)
DOCUMENTED = "silent about positions; fisher_exact is 'an exact calculation'"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """One pass per class and position."""
    maker = import_module("asdl.fisher").FisherExactCrossEntropy
    weighted = "nll.mul(sqrt_probs[:, i])"
    one = f"{weighted}.reshape(len(self._model_output), -1)[:, s]"
    run = "closure(nll_expr, retain_graph=i < n_classes - 1)"
    runs = (
        "S = n // len(self._model_output)\n"
        "        for s in range(S):\n"
        "            closure(nll_expr, retain_graph=(i, s) != (n_classes - 1, S - 1))"
    )
    with mended(maker, "_fisher_loop", (weighted, one), (run, runs)):
        yield
