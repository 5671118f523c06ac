"""What the default backend computes wrongly is wrong in `KronLaplace`, too.

`CurvlinopsGGN` and `CurvlinopsEF` take their Kronecker factors from curvlinops. Its mismatches
that concern the factors (`padding_mode` ignored, layers that are used several times, type-2
vectors of several positions added up, targets that the loss ignores) come through unchanged. They
are described and proven in the findings whose names begin with `curvlinops_`; here they are mended
in curvlinops, and this library's verdicts follow.

```python
import torch
from laplace.curvature import CurvlinopsGGN
from torch import nn

for mode in ("zeros", "circular"):
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode, bias=False)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    X, y = torch.randn(1, 1, 4, 4), torch.zeros(1, 2)
    backend = CurvlinopsGGN(model, "regression")
    kron = backend.kron(X, y, N=1, kfac_approx="reduce")[1].to_matrix()
    full = backend.full(X, y)[1]
    print(mode, f"{((kron - full).abs().max() / full.abs().max()).item():.1e}")
# prints
#   zeros 2.7e-07
#   circular 6.5e-01
```

Expected: rounding errors for both modes (one datum and a global pool, where KFAC-reduce is the
GGN).

Suggestion: none beyond those to curvlinops; until then, a word in the documentation of
`KronLaplace`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module

LIBRARY, VERSION = "laplace-torch", "0.3"
ADAPTER = "kfac_scratch.conformance.adapters.laplace:Adapter"
TITLE = "Inherited from curvlinops"
INHERITED = ("ignore_index", "padding_mode", "positions", "reuse")
CASES = (
    *((f"conv2d-{mode}-pooled-mse", "reduce") for mode in ("circular", "reflect", "replicate")),
    ("conv2d-plain-per-location-mse-mean", "expand"),
    ("attention-tokens-mse", "expand"),
    ("attention-tokens-cross-entropy", "expand"),
    ("used-twice-added-mse", "reduce"),
    ("used-in-a-row-cross-entropy", "expand"),
    ("tokens-cross-entropy-ignored-sum", "expand"),
)
CAUSE = (
    "laplace/curvature/curvlinops.py, lines 67 and 68, _get_kron_factors, takes the factors of "
    "curvlinops.KFACLinearOperator as they are."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Mend curvlinops, not this library."""
    with ExitStack() as stack:
        for name in INHERITED:
            folder = __name__.rpartition(".")[0]
            stack.enter_context(import_module(f"{folder}.curvlinops_{name}").patch())
        yield
