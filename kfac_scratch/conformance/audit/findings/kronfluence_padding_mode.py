"""Factors and gradients of a convolution ignore `padding_mode`.

Patches are cut with zeros around the image, also where the gradient of a sample is computed, which
is what influence scores are made of:

```python
import torch
from kronfluence.module.conv2d import TrackedConv2d
from torch import nn

for options in ({}, {"padding_mode": "circular"}, {"padding_mode": "reflect"}, {"groups": 2}):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 2, 3, padding=1, bias=False, **options)
    X, v = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    right = torch.autograd.grad((conv(X) * v).sum(), conv.weight)[0].flatten(1)
    got = TrackedConv2d("conv", conv).compute_summed_gradient(X, v)[0]
    print(options, f"{(got - right).abs().max() / right.abs().max():.1e}")
# prints
#   {} 0.0e+00
#   {'padding_mode': 'circular'} 7.4e-01
#   {'padding_mode': 'reflect'} 6.4e-01
#   {'groups': 2} 6.4e-01
```

Expected: rounding errors. The last line shows that grouped convolutions have wrong gradients, too:
the docstring of `extract_patches` says that patches are averaged over groups, which makes a
Kronecker factor of a common size, but not a gradient.

Suggestion: pad first if the mode is not `zeros`; raise `UnsupportableModuleError` for `groups >
1`, or keep the groups apart where gradients are computed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended
from kfac_scratch.conformance.cases.case import EXACT, Case
from kfac_scratch.conformance.cases.families.common import loss
from kfac_scratch.conformance.cases.ops import conv

LIBRARY, VERSION = "kronfluence", "1.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.kronfluence:Adapter"
TITLE = "padding_mode of a convolution is ignored, by gradients, too"
MODES = ("circular", "reflect", "replicate")
OF_GRADIENTS = tuple(
    Case(
        f"conv2d-{mode}-per-location-ekfac",
        "last-convolution",
        (conv("conv", 2, 3, (2, 3), geometry={"padding": 1, "padding_mode": mode}),),
        loss("mse"),
        (7, 2, 5, 4),
        {"ekfac": EXACT},
    )
    for mode in MODES
)
CASES = (
    *((f"conv2d-{mode}-per-location-mse-mean", "expand") for mode in MODES),
    *((f"conv2d-{mode}-pooled-mse", "expand") for mode in MODES),
    *((case, "ekfac") for case in OF_GRADIENTS),
)
BESIDE = ("kronfluence_positions",)
CAUSE = (
    "kronfluence/module/conv2d.py, lines 111 and 139: the layer's padding is handed to "
    "extract_patches, its padding_mode is not, though TrackedConv2d has it as a property."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Pad first, in the layer's own way."""
    layer = import_module("kronfluence.module.conv2d").TrackedConv2d
    zeros = "self.padding_mode == 'zeros'"
    around = "self.original_module._reversed_padding_repeated_twice"
    padded = (
        f"input_activation if {zeros} else F.pad(input_activation, {around}, self.padding_mode)"
    )
    changes = (
        ("inputs=input_activation", f"inputs={padded}"),
        ("padding=self.original_module.padding", f"padding=self.padding if {zeros} else 0"),
    )
    with ExitStack() as stack:
        for name in ("get_flattened_activation", "_flatten_input_activation"):
            stack.enter_context(mended(layer, name, *changes))
        yield
