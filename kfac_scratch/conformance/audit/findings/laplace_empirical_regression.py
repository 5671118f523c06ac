"""For regression, the empirical Fisher is twice that of the likelihood.

The likelihood of regression is a Gaussian with unit variance, whose negative logarithm is half of
PyTorch's squared error: `factor` is the "conversion factor between torch losses and base
likelihoods. For example, 1/2 to get to N(f, 1) from MSELoss". The GGN is linear in the loss, and
1/2 is right. The empirical Fisher has the loss's gradients twice, and takes the square of it. One
datum:

```python
import torch
from laplace.curvature import AsdlEF, CurvlinopsEF
from torch import nn

torch.manual_seed(0)
model, X, y = nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3), torch.randn(1, 2)
(0.5 * (model(X) - y) ** 2).sum().backward()  # -log N(y | f, 1), up to a constant
print("squared gradient", sum((p.grad**2).sum() for p in model.parameters()).item())
for Backend in (CurvlinopsEF, AsdlEF):
    _, kron = Backend(model, "regression").kron(X, y, N=1)
    print(Backend.__name__, kron.to_matrix().trace().item())
# prints
#   squared gradient 26.65032958984375
#   CurvlinopsEF 53.30065155029297
#   AsdlEF 53.30065155029297
```

Expected: one number. The Kronecker factors, the diagonal and the dense matrix of all backends have
the same factor; `AsdlEF` writes its own 0.5 with the comment "correct scaling for diag ef". In a
Laplace approximation, the curvature of the data counts twice against the prior.

Suggestion: `factor**2` in `EFInterface` and its backends, or gradients of `factor * loss`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "laplace-torch", "0.3"
ADAPTER = "kfac_scratch.conformance.adapters.laplace:Adapter"
TITLE = "The empirical Fisher of regression is twice that of the likelihood"
CASES = tuple(
    (f"empirical-{name}-mse-mean", flavour)
    for name in ("one-datum", "constant", "mlp")
    for flavour in ("expand", "reduce")
)
CAUSE = (
    "laplace/curvature/curvlinops.py, line 110, CurvlinopsInterface.kron multiplies by the "
    "factor of the loss, whose gradients occur twice; likewise curvature.py, lines 543 and 555, "
    "and asdl.py, lines 323 and 362."
)
DOCUMENTED = (
    "'For example, 1/2 to get to N(f, 1) from MSELoss', of which the empirical Fisher is asked"
)
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """The square of the factor for the empirical Fisher."""
    interface = import_module("laplace.curvature.curvlinops").CurvlinopsInterface
    factor = "kron *= self.factor"
    squared = f"{factor} ** (2 if isinstance(self, EFInterface) else 1)"
    with mended(interface, "kron", (factor, squared)):
        yield
