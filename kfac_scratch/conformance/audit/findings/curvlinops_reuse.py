"""A layer that is used T times has a KFAC block that is too large by T.

Every call adds its own input covariance, divided by the number of data, and its own gradient
covariance. The sum of T products is replaced by a product of two sums, which has T squared terms;
one of the factors should be a mean over calls, as it is over the positions of a sequence. A linear
layer that is applied to two halves of the data at once and one that is called for each half do the
same:

```python
import torch
from torch import nn
from curvlinops import KFACLinearOperator

class Siamese(nn.Module):
    def __init__(self, together):
        super().__init__()
        self.fc, self.together = nn.Linear(3, 2), together

    def forward(self, x):  # [N, 2, 3] -> [N, 4]
        if self.together:
            return self.fc(x).flatten(1)
        return torch.cat([self.fc(x[:, 0]), self.fc(x[:, 1])], 1)

for together in (True, False):
    torch.manual_seed(0)
    model, loss = Siamese(together).double(), nn.MSELoss()
    data = [(torch.randn(5, 2, 3).double(), torch.randn(5, 4).double())]
    K = KFACLinearOperator(model, loss, list(model.parameters()), data, fisher_type="type-2")
    print(K.trace.item())
# prints
#   5.3391154259845734
#   8.678230851969147
```

Expected: equal numbers. With `kfac_approx="reduce"`, inputs are averaged and vectors summed within
a call but not over calls. `EKFACLinearOperator` keeps the last call's inputs only. Two modules
that share a parameter are worse off: `_matmat` writes the result of the second over that of the
first.

Suggestion: treat calls as positions: concatenate inputs and vectors over calls before the
covariances are made; or refuse a layer whose hook fires twice.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor, cat, nn

LIBRARY, VERSION = "curvlinops", "3.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.curvlinops:Adapter"
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
    ("ekfac-used-in-a-row-mse", "ekfac"),
    ("ekfac-used-in-a-row-cross-entropy", "ekfac"),
)
CAUSE = (
    "curvlinops/kfac.py, line 823, _hook_accumulate_input_covariance: every call of a module "
    "adds to its covariance, and the divisor counts data and positions, not calls."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Calls are positions: join them, then let the library's own functions work."""
    with ExitStack() as stack:
        stack.enter_context(_factors(import_module("curvlinops.kfac").KFACLinearOperator))
        if find_spec("curvlinops.ekfac"):  # since release 3
            ekfac = import_module("curvlinops.ekfac").EKFACLinearOperator
            stack.enter_context(_eigenvalues(ekfac))
        yield


@contextmanager
def _factors(operator: Any) -> Iterator[None]:
    """Covariances of the inputs and vectors of all calls, as soon as every call has its vector."""
    names = ("_hook_accumulate_input_covariance", "_accumulate_gradient_covariance")
    of_input, of_vector = (vars(operator)[name] for name in names)
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    vectors: dict[str, list[Tensor]] = defaultdict(list)
    done: set[str] = set()

    def keep(self: Any, module: nn.Module, args: tuple[Tensor], module_name: str) -> None:
        if module_name in done:  # by the data before
            inputs.pop(module_name)
            done.remove(module_name)
        inputs[module_name].append(args[0].detach().clone())

    def joined(self: Any, grad_output: Tensor, module: nn.Module, module_name: str) -> None:
        vectors[module_name].append(grad_output)
        if len(vectors[module_name]) < len(inputs[module_name]):
            return
        if module_name not in done:
            of_input(self, module, (_joined(inputs[module_name]),), module_name)
            done.add(module_name)
        of_vector(self, _joined(vectors.pop(module_name)), module, module_name)

    with _replaced(operator, dict(zip(names, (keep, joined), strict=True))):
        yield


@contextmanager
def _eigenvalues(operator: Any) -> Iterator[None]:
    """Gradients of a datum, summed over all calls before they are squared."""
    names = (
        "_hook_cache_inputs",
        "_register_tensor_hook_on_output_to_accumulate_corrected_eigenvalues",
    )
    correct = vars(operator)["_accumulate_corrected_eigenvalues"]
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    vectors: dict[str, dict[int, Tensor]] = defaultdict(dict)

    def keep(self: Any, module: nn.Module, args: tuple[Tensor], module_name: str) -> None:
        if module_name not in self._cached_activations:
            inputs.pop(module_name, None)  # those of an earlier computation
        inputs[module_name].append(args[0].detach().clone())
        self._cached_activations[module_name] = _joined(inputs[module_name])

    def register(
        self: Any, module: nn.Module, args: object, output: Tensor, module_name: str
    ) -> None:
        call, own = len(inputs[module_name]) - 1, vectors[module_name]

        def joined(g: Tensor) -> None:
            own[call] = g
            if len(own) == len(inputs[module_name]):
                correct(self, _joined([own[i] for i in sorted(own)]), module, module_name)
                own.clear()

        output.register_hook(joined)

    with _replaced(operator, dict(zip(names, (keep, register), strict=True))):
        yield


@contextmanager
def _replaced(operator: Any, methods: dict[str, Any]) -> Iterator[None]:
    before = {name: vars(operator)[name] for name in methods}
    for name, function in methods.items():
        setattr(operator, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(operator, name, function)


def _joined(calls: list[Tensor]) -> Tensor:
    """The positions of all calls behind each other."""
    return cat([x.reshape(len(x), -1, x.shape[-1]) for x in calls], 1) if calls[1:] else calls[0]
