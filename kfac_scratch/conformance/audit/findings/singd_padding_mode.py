"""SINGD ignores `Conv2d.padding_mode`.

Patches for `H_K` are cut with zeros around the image, whatever the layer's `padding_mode` is,
under `expand` as under `reduce`. A constant image with circular padding has constant patches, so
that every entry of `H_K` is equal before the first step:

```python
import torch
from singd.optim.optimizer import SINGD
from torch import nn

for approximation in ("expand", "reduce"):
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular", bias=False)
    model = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    optimizer = SINGD(model, kfac_approx=approximation)
    nn.MSELoss()(model(torch.ones(1, 1, 4, 4)), torch.zeros(1, 2)).backward()
    H_K = optimizer.H_Ks["0"].to_dense()
    print(approximation, H_K.min().item(), H_K.max().item())
# prints
#   expand 0.25 1.0
#   reduce 0.31640625 1.0
```

Expected: 1 and 1, twice.

Suggestion: pad with `torch.nn.functional.pad(x, layer._reversed_padding_repeated_twice,
layer.padding_mode)` first if the mode is not `zeros`, and cut patches without padding; or refuse.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "singd", "0.0.5"
ADAPTER = "kfac_scratch.conformance.adapters.singd:Adapter"
TITLE = "padding_mode of a convolution is ignored"
CASES = tuple(
    (case.format(mode), flavour)
    for mode in ("circular", "reflect", "replicate")
    for case, flavour in (
        ("conv2d-{}-pooled-mse", "reduce"),
        ("conv2d-{}-pooled-mse", "expand"),
        ("conv2d-{}-per-location-mse-mean", "expand"),
    )
)
CAUSE = (
    "singd/optim/utils.py, line 165, conv2d_process_input: layer.padding is handed to the patch "
    "extractor, layer.padding_mode is not."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Pad first, in the layer's own way."""
    utils = import_module("singd.optim.utils")
    call = "x = patch_extractor_fn("
    padded = (
        "other = layer.padding_mode != 'zeros'\n"
        "    if other:\n"
        "        x = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode)\n"
        f"    {call}"
    )
    cut = ("layer.padding,", "0 if other else layer.padding,")
    with mended(utils, "conv2d_process_input", (call, padded), cut):
        yield
