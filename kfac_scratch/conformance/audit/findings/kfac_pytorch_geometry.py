"""A convolution's patches ignore `padding_mode` and `dilation`, and `padding="same"` is an error.

`Conv2dModuleHelper._extract_patches` reads the padding, the kernel and the stride. A constant image
with circular padding has constant patches, and so has an image whose even columns are ones under a
dilation of 2, up to a factor. So every entry of `A` should be the largest one:

```python
import torch
from kfac.layers.modules import Conv2dModuleHelper
from torch import nn

ones, columns = torch.ones(1, 1, 4, 4), torch.tensor([1.0, 0, 1, 0]).expand(1, 1, 4, 4)
for X, options in (
    (ones, {"padding": 1, "padding_mode": "circular"}),
    (columns, {"dilation": 2}),
    (ones, {"padding": "same"}),
):
    conv = nn.Conv2d(1, 2, 2, bias=False, **options)
    try:
        A = Conv2dModuleHelper(conv).get_a_factor(X)
        print(options, ((A - A.max()).abs().max() / A.max()).item())
    except TypeError as error:
        print(options, error)
# prints
#   {'padding': 1, 'padding_mode': 'circular'} 0.4375000298023224
#   {'dilation': 2} 1.0
#   {'padding': 'same'} '>' not supported between instances of 'str' and 'int'
```

Expected: zeros for the first two, and no error for the third.

Suggestion: pad by `module._reversed_padding_repeated_twice` in the module's mode, where PyTorch
keeps the numbers for `"same"`, and cut patches by `torch.nn.functional.unfold` with the dilation;
or refuse such layers in `get_module_helper`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-pytorch", "0.4.2"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_pytorch:Adapter"
TITLE = "padding_mode and dilation of a convolution are ignored; padding='same' raises an error"
CASES = tuple(
    (f"conv2d-{name}-pooled-mse", "expand")
    for name in (
        *("circular", "reflect", "replicate", "dilation"),
        *("same", "same-dilation", "same-circular"),
    )
)
CAUSE = (
    "kfac/layers/modules.py, lines 223 to 229, Conv2dModuleHelper._extract_patches: the padding "
    "is taken for two numbers, around which there are zeros, and unfold has no dilation."
)
DOCUMENTED = "silent"
THREAD = ""
WITH = ("kfac_pytorch_positions",)


@contextmanager
def patch() -> Iterator[None]:
    """Pad in the layer's way, and cut with holes; and the scale, which is another finding."""
    conv = import_module("kfac.layers.modules").Conv2dModuleHelper
    scale = import_module(f"{__name__.rpartition('.')[0]}.kfac_pytorch_positions")
    changes = (
        ("padding[0] + padding[1] > 0", "any(self.module._reversed_padding_repeated_twice)"),
        (
            "(padding[1], padding[1], padding[0], padding[0]),",
            "self.module._reversed_padding_repeated_twice, "
            "self.module.padding_mode.replace('zeros', 'constant'),",
        ),
        *(
            (
                f"x = x.unfold({axis}, kernel_size[{i}], stride[{i}])",
                f"x = x.unfold({axis}, (kernel_size[{i}] - 1) * self.module.dilation[{i}] + 1, "
                f"stride[{i}])[..., :: self.module.dilation[{i}]]",
            )
            for i, axis in enumerate((2, 3))
        ),
    )
    with scale.patch(), mended(conv, "_extract_patches", *changes):
        yield
