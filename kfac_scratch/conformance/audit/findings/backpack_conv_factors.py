"""The factors of a convolution are those of two approximations: KFAC-expand and KFAC-reduce.

The docstrings of `HBPConvNd` say that the factors are those of the KFC paper, except that the
factor of the vectors is |T| times as large, |T| being the number of positions. KFC's factor is
`Gamma = 1/|T| E[sum_t g_t g_t^T]`. What is computed is `E[(sum_t g_t) (sum_t g_t)^T]`: the sum
over positions is taken before the product. The two are in the ratio |T| only if the vectors of
different positions are uncorrelated. In front of a global pool, they are equal, and the ratio is
|T|^2:

```python
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR
from torch import nn

torch.manual_seed(0)
X = torch.randn(5, 1, 3, 3)
for pool in (nn.Identity(), nn.AvgPool2d(2)):
    conv, end = nn.Conv2d(1, 2, 2, bias=False), nn.Sequential(pool, nn.Flatten())
    z = conv(X)
    f = end(z)
    columns = [torch.autograd.grad(c.sum(), z, retain_graph=True)[0] for c in f.T]
    g = 2**0.5 * torch.stack(columns).flatten(3)  # [C, N, c_out, T]
    Gamma = torch.einsum("vnot,vnpt->op", g, g) / 4
    f = extend(nn.Sequential(conv, *end))(X)
    with backpack(KFLR()):
        extend(nn.MSELoss(reduction="sum"))(f, torch.zeros_like(f)).backward()
    print(pool, (conv.weight.kflr[0].diagonal() / Gamma.diagonal()).tolist())
# prints
#   Identity() [4.0, 4.0]
#   AvgPool2d(kernel_size=2, stride=2, padding=0) [16.0, 16.0]
```

Expected, by the docstring: 4, the number of positions, for both. With the input factor, which is
KFC's (a sum over positions), the block is neither KFAC-expand nor KFAC-reduce: it is |T| times the
first where vectors are uncorrelated, and |T|^2 times the first where they are equal.

Suggestion: `einsum("vnct,vndt->cd", ...)` for the weight's factor. For the bias the present factor
is the exact GGN block, as documented; only the weight's should change. A TODO in
`HBPConvNd.weight` says that a change must be announced.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "BackPACK", "1.7.1"
ADAPTER = "kfac_scratch.conformance.adapters.backpack:Adapter"
TITLE = "A convolution's vectors are summed over positions before the product"
CASES = (
    ("conv2d-stride-pooled-mse-float32", "expand"),
    ("conv-beside-linear-flat-cross-entropy", "expand"),
    ("conv-beside-linear-flat-mse", "expand"),
)
CAUSE = (
    "backpack/extensions/secondorder/hbp/convnd.py, line 151, _factor_from_sqrt: the "
    "backpropagated root is summed over positions, and its outer product is taken afterwards."
)
DOCUMENTED = (
    "'In the notation of KFC, this computes |T| * Gamma' (docstring of "
    "HBPConvNd._factor_from_sqrt), which is another number; the input factor is documented and "
    "computed as KFC's Omega"
)
THREAD = "https://github.com/f-dangel/backpack/pull/250"
UPSTREAM = (
    "The thread of March 2022, closed without being merged, compares the methods with the paper's "
    "and adds a test of a convolution that is equal to a linear layer, where both approximations "
    "agree. The docstrings came in November 2022 (pull request 290)"
)


@contextmanager
def patch() -> Iterator[None]:
    """The product first, then the sum over positions: |T| Gamma."""
    layer = import_module("backpack.extensions.secondorder.hbp.convnd").HBPConvNd
    with mended(
        layer,
        "_factor_from_sqrt",
        ('einsum("cbij->cbi", sqrt_ggn)', "sqrt_ggn"),
        ('"cbi,cbl->il"', '"cbij,cblj->il"'),
    ):
        yield
