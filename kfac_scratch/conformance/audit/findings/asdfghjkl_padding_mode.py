"""KFAC ignores `Conv2d.padding_mode`.

Patches for the input factor are cut with zeros around the image, whatever the layer's
`padding_mode` is. A constant image with circular padding has constant patches, so that every entry
of `A` is equal:

```python
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False)
model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
maker = get_fisher_maker(
    model, FisherConfig("fisher_exact", ["kron"], loss_type="mse", data_size=1)
)
maker.setup_model_call(model, torch.ones(1, 1, 4, 4).double())
maker.forward_and_backward()
A = conv.fisher.kron.A
print(A.min().item(), A.max().item())
# prints
#   0.25 1.0
```

Expected: 1 and 1.

Suggestion: pad with `conv2d.padding_mode` in `im2col_2d`, as it pads already; or refuse, as it
refuses a dilation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "padding_mode of a convolution is ignored"
CASES = tuple(
    (f"conv2d-{mode}-pooled-mse", "expand") for mode in ("circular", "reflect", "replicate")
)
CAUSE = (
    "asdl/utils.py, line 63, im2col_2d: F.pad is called with the padding of the layer and "
    "without its padding_mode."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Pad in the layer's own way."""
    conv = import_module("asdl.operations.conv")
    mode = "conv2d.padding_mode.replace('zeros', 'constant')"
    with mended(conv, "im2col_2d", ("(pw, pw, ph, ph)", f"(pw, pw, ph, ph), {mode}")):
        yield
