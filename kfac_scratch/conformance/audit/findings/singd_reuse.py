"""A layer that is used T times has a Kronecker product that is too large by T.

Every call adds its own `H_K`, a mean over the batch, and its own `H_C`. The sum of T products is
replaced by a product of two sums, which has T squared terms; one of the factors should be a mean
over calls, as it is over the positions of a sequence. With `kfac_approx="reduce"`, inputs are
averaged and gradients summed within a call, not over calls. A linear layer that is applied to two
halves of the data at once and one that is called for each half do the same:

```python
import torch
from singd.optim.optimizer import SINGD
from torch import nn

class Siamese(nn.Module):
    def __init__(self, together):
        super().__init__()
        self.fc, self.together = nn.Linear(3, 2), together

    def forward(self, x):  # [N, 2, 3] -> [N, 4]
        if self.together:
            return self.fc(x).flatten(1)
        return torch.cat([self.fc(x[:, 0]), self.fc(x[:, 1])], 1)

for approximation in ("expand", "reduce"):
    for together in (True, False):
        torch.manual_seed(0)
        model, X, y = Siamese(together), torch.randn(5, 2, 3), torch.randn(5, 4)
        optimizer = SINGD(model, kfac_approx=approximation)
        nn.MSELoss()(model(X), y).backward()
        traces = [H["fc"].to_dense().trace().item() for H in (optimizer.H_Ks, optimizer.H_Cs)]
        print(approximation, together, f"{traces[0] * traces[1]:.6g}")
# prints
#   expand True 2.70838
#   expand False 5.41675
#   reduce True 2.1084
#   reduce False 5.41675
```

Expected: equal numbers for `expand`, and equal numbers for `reduce`.

Suggestion: treat calls as positions: concatenate inputs and gradients over the calls of a forward
pass before `H_K` and `H_C` are made; or refuse a layer whose hook fires twice.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor, cat, is_grad_enabled, nn

LIBRARY, VERSION = "singd", "0.0.5"
ADAPTER = "kfac_scratch.conformance.adapters.singd:Adapter"
TITLE = "A layer that is used several times is counted as often again"
CASES = (
    ("used-twice-added-mse", "expand"),
    ("used-twice-added-mse", "reduce"),
    ("used-in-a-row-mse", "expand"),
    ("used-in-a-row-mse", "reduce"),
    ("used-in-a-row-cross-entropy", "expand"),
    ("used-in-a-row-cross-entropy", "reduce"),
    ("used-at-other-positions-mse", "expand"),
    ("used-at-other-positions-mse", "reduce"),
    ("used-at-other-positions-cross-entropy", "expand"),
    ("used-at-other-positions-cross-entropy", "reduce"),
)
CAUSE = (
    "singd/optim/optimizer.py, line 631, _accumulate_H_terms: every call of a module adds its "
    "H_K, and nothing divides by the number of calls."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Calls are positions: join them, then let the library's own function work."""
    optimizer = import_module("singd.optim.optimizer").SINGD
    names = ("_register_tensor_hook_on_output_to_accumulate_H_terms", "_accumulate_H_terms")
    register, accumulate = before = [vars(optimizer)[name] for name in names]
    calls: dict[nn.Module, int] = defaultdict(int)
    pairs: dict[nn.Module, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def counted(self: Any, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        calls[module] += is_grad_enabled()
        register(self, module, inputs, output)

    def joined(self: Any, module: nn.Module, inputs: tuple[Tensor], gradient: Tensor) -> None:
        pairs[module].append((inputs[0], gradient))
        if len(pairs[module]) == calls[module]:
            x, g = zip(*pairs.pop(module), strict=True)
            several = calls.pop(module) > 1
            joint = (_positions(x), _positions(g)) if several else (x[0], g[0])
            accumulate(self, module, joint[:1], joint[1])

    for name, function in zip(names, (counted, joined), strict=True):
        setattr(optimizer, name, function)
    try:
        yield
    finally:
        for name, function in zip(names, before, strict=True):
            setattr(optimizer, name, function)


def _positions(calls: tuple[Tensor, ...]) -> Tensor:
    """The positions of all calls behind each other."""
    return cat([x.reshape(len(x), -1, x.shape[-1]) for x in calls], 1)
