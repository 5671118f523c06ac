"""KFAC ignores `Conv2d.padding_mode`, and raises an error for `padding="same"`.

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

Expected: 1 and 1. With `padding="same"`, `im2col_2d` raises "ValueError: too many values to unpack
(expected 2)"; the other string that PyTorch knows, `"valid"`, is handled.

Suggestion: pad by `conv2d._reversed_padding_repeated_twice`, where PyTorch keeps the numbers for
`"same"`, with `conv2d.padding_mode`; or refuse, as a dilation is refused.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "padding_mode of a convolution is ignored, and padding='same' raises an error"
CASES = tuple(
    (f"conv2d-{name}-pooled-mse", "expand")
    for name in ("circular", "reflect", "replicate", "same", "same-circular")
)
CAUSE = (
    "asdl/utils.py, line 63, im2col_2d: F.pad is called with the padding of the layer and "
    "without its padding_mode; line 59: a padding is a pair or 'valid'."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Pad in the layer's own way."""
    conv = import_module("asdl.operations.conv")
    around = "conv2d._reversed_padding_repeated_twice"
    mode = "conv2d.padding_mode.replace('zeros', 'constant')"
    with mended(
        conv,
        "im2col_2d",
        ("conv2d.padding if conv2d.padding != 'valid' else (0, 0)", f"{around}[2], {around}[0]"),
        ("if ph + pw > 0", f"if any({around})"),
        ("(pw, pw, ph, ph)", f"{around}, {mode}"),
    ):
        yield
