"""`padding_mode` of a convolution is ignored, and `padding="same"` raises an error.

Patches are cut with zeros around the image. With an output per pixel, the Fisher matrix of a
regression is the Jacobian's Gram matrix, which autodiff gives:

```python
import torch
from nngeometry.metrics import FIM
from nngeometry.object import PMatDense
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

for mode in ("zeros", "circular", "reflect", "replicate"):
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3, padding=1, padding_mode=mode, bias=False)
    X = torch.randn(1, 1, 4, 4)
    F = FIM(conv, DataLoader(TensorDataset(X, X)), PMatDense, variant="regression").to_torch()
    J = torch.func.jacrev(lambda w: torch.func.functional_call(conv, {"weight": w}, X))(conv.weight)
    J = J.flatten(4).flatten(0, 3).detach()
    print(mode, f"{(F - J.T @ J).abs().max() / F.abs().max():.1e}")
# prints
#   zeros 3.0e-08
#   circular 5.6e-01
#   reflect 7.2e-01
#   replicate 6.7e-01
```

Expected: rounding errors for all modes. `conv2d_backward_using_unfold`, `kfac_xx` and `kfe_diag`
of one- and two-dimensional convolutions call `unfold` with `mod.padding` alone. In the same
places, `padding="same"` raises "TypeError: im2col(): argument 'padding' must be tuple of ints",
and `groups` is not looked at: the factors are those of a convolution without groups, whose weight
has another shape.

Suggestion: pad first, by `mod._reversed_padding_repeated_twice`, if the mode is not `zeros` or the
padding is a string; raise an error for `groups > 1`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "nngeometry", "0.4"
ADAPTER = "kfac_scratch.conformance.adapters.nngeometry:Adapter"
TITLE = "padding_mode of a convolution is ignored, and padding='same' raises an error"
CASES = (
    *((f"conv2d-{mode}-pooled-mse", "expand") for mode in ("circular", "reflect", "replicate")),
    *(
        (f"conv2d-{mode}-per-location-mse-mean", "expand")
        for mode in ("circular", "reflect", "replicate")
    ),
    *(
        (f"conv2d-{name}-{end}-mse", "expand")
        for name in ("same", "same-dilation", "same-circular")
        for end in ("per-location", "pooled")
    ),
    ("circular-convolutions-mean", "expand"),
    ("circular-convolutions-sum", "expand"),
)
CAUSE = (
    "nngeometry/backend/torch_hooks/grads.py, lines 156 and 401, kfac_xx of both convolutions: "
    "unfold gets mod.padding, and mod.padding_mode is not used; the same in kfe_diag and "
    "grads_conv.py."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Pad first, in the layer's own way."""
    grads = import_module("nngeometry.backend.torch_hooks.grads")
    padded = (
        "\n    around = mod._reversed_padding_repeated_twice"
        "\n    zeros = mod.padding_mode == 'zeros' and not isinstance(mod.padding, str)"
        "\n    x = x if zeros else F.pad(x, around, mod.padding_mode.replace('zeros', 'constant'))"
    )
    sizes = [f"ks = ({n}, mod.weight.size({i}))" for n, i in (("mod.weight.size(2)", 3), ("1", 2))]
    with (
        mended(
            grads.Conv2dJacobianFactory,
            "kfac_xx",
            (sizes[0], sizes[0] + padded),
            ("padding=mod.padding", "padding=mod.padding if zeros else 0"),
        ),
        mended(
            grads.Conv1dJacobianFactory,
            "kfac_xx",
            (sizes[1], sizes[1] + padded),
            ("padding=(0, mod.padding[0])", "padding=(0, mod.padding[0] if zeros else 0)"),
        ),
    ):
        yield
