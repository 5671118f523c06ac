"""KFAC ignores `Conv2d.padding_mode`.

Patches for the input factor are cut with zeros around the image, whatever the layer's
`padding_mode` is. One datum, a convolution and a global pool: KFAC-reduce is the GGN.

```python
import torch
from torch import nn
from curvlinops import GGNLinearOperator, KFACLinearOperator

for mode in ("zeros", "circular", "reflect", "replicate"):
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode, bias=False)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    params, loss = list(model.parameters()), nn.MSELoss()
    data = [(torch.randn(1, 1, 4, 4).double(), torch.zeros(1, 2).double())]
    G = GGNLinearOperator(model, loss, params, data) @ torch.eye(18).double()
    K = KFACLinearOperator(
        model, loss, params, data, fisher_type="type-2", kfac_approx="reduce"
    ) @ torch.eye(18).double()
    print(mode, f"{(K - G).abs().max() / G.abs().max():.1e}")
# prints
#   zeros 1.3e-16
#   circular 6.5e-01
#   reflect 7.7e-01
#   replicate 6.9e-01
```

Expected: rounding errors for all modes.

Suggestion: pad with `torch.nn.functional.pad(x, module._reversed_padding_repeated_twice,
module.padding_mode)` first if the mode is not `zeros`, and cut patches without padding; or refuse.
`EKFACLinearOperator` cuts patches in the same way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "curvlinops", "3.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.curvlinops:Adapter"
TITLE = "padding_mode of a convolution is ignored"
CASES = tuple(
    (f"conv2d-{mode}-pooled-mse", flavour)
    for mode in ("circular", "reflect", "replicate")
    for flavour in ("reduce", "expand")
)
CAUSE = (
    "curvlinops/kfac.py, line 801, _hook_accumulate_input_covariance: module.padding is handed "
    "to the patch extractor, module.padding_mode is not; the same in ekfac.py."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Pad first, in the layer's own way."""
    operator = import_module("curvlinops.kfac").KFACLinearOperator
    read = "x = inputs[0].data.detach()"
    padded = (
        "import torch.nn.functional as F\n"
        f"    {read}\n"
        "    other = getattr(module, 'padding_mode', 'zeros') != 'zeros'\n"
        "    if other:\n"
        "        x = F.pad(x, module._reversed_padding_repeated_twice, module.padding_mode)"
    )
    cut = ("module.padding,", "0 if other else module.padding,")
    with mended(operator, "_hook_accumulate_input_covariance", (read, padded), cut):
        yield
