"""Second-order extensions ignore `padding_mode`, and raise an error for `padding="same"`.

The input is unfolded with zeros around it, whatever the layer's `padding_mode` is. One datum and
one position per output pixel, squared error per pixel: the input factor is the sum of the patches'
outer products, which PyTorch itself can compute.

```python
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR
from torch import nn

for mode in ("zeros", "circular", "reflect", "replicate"):
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode, bias=False)
    model, X = extend(nn.Sequential(conv, nn.Flatten())), torch.randn(1, 1, 4, 4)
    f = model(X)
    with backpack(KFLR()):
        extend(nn.MSELoss())(f, torch.zeros_like(f)).backward()
    pad = {"mode": "constant" if mode == "zeros" else mode}
    patches = nn.functional.unfold(nn.functional.pad(X, (1, 1, 1, 1), **pad), 3)[0]
    A = patches @ patches.T
    print(mode, f"{(conv.weight.kflr[1] - A).abs().max() / A.abs().max():.1e}")
# prints
#   zeros 0.0e+00
#   circular 5.6e-01
#   reflect 5.6e-01
#   replicate 4.8e-01
```

Expected: rounding errors for all modes. With `padding="same"`, KFLR and KFAC raise "TypeError:
im2col(): argument 'padding' must be tuple of ints". `HBPConvNd` refuses grouped convolutions;
`padding_mode` is not looked at anywhere, so that vectors sent back through such a layer
(`_jac_t_mat_prod`) are wrong, too, and with them all extensions that use them.

Suggestion: pad first, by `module._reversed_padding_repeated_twice`, if the mode is not `zeros` or
the padding is a string, or raise NotImplementedError as for groups.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "BackPACK", "1.7.1"
ADAPTER = "kfac_scratch.conformance.adapters.backpack:Adapter"
TITLE = "padding_mode of a convolution is ignored, and padding='same' raises an error"
CASES = tuple(
    (f"conv2d-{name}", "expand")
    for name in (
        *(f"{mode}-per-location-mse-mean" for mode in ("circular", "reflect", "replicate")),
        *(f"{same}-per-location-mse" for same in ("same", "same-dilation", "same-circular")),
    )
)
CAUSE = (
    "backpack/utils/conv.py, line 71, unfold_input: module.padding is used, module.padding_mode "
    "is not."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Pad first, in the layer's own way."""
    start = "if input.dim() == 4:"
    padded = (
        "zeros = module.padding_mode == 'zeros' and not isinstance(module.padding, str)\n"
        "    if not zeros:\n"
        "        from torch.nn.functional import pad\n"
        "        around = module._reversed_padding_repeated_twice\n"
        "        input = pad(input, around, module.padding_mode.replace('zeros', 'constant'))\n"
        f"    {start}"
    )
    cut = ("padding=module.padding", "padding=module.padding if zeros else 0")
    with mended(import_module("backpack.utils.conv"), "unfold_input", (start, padded), cut):
        yield
