"""A block is too small by S for a linear layer at S positions, and by S^5 for a convolution.

Of S positions, the gradients of S terms add up in a datum's gradient. So one of the two factors is
a mean over data and positions, and the other one a mean over data and a sum over positions (KFC's
equation 32; in tensorflow/kfac this is `_renorm_coeff`). Both factors are means here, and a
convolution divides the rows of both by the number of its positions besides. A linear layer at every
position and a 1x1 convolution are the same function:

```python
import torch
from kfac.preconditioner import KFACPreconditioner
from torch import nn

torch.manual_seed(0)
linear, conv = nn.Linear(3, 2), nn.Conv2d(3, 2, 1)
conv.load_state_dict({"weight": linear.weight[..., None, None], "bias": linear.bias})
X = torch.randn(1000, 4, 3)  # 4 positions
for layer, inputs in ((linear, X), (conv, X.mT.unsqueeze(2).contiguous())):
    made = KFACPreconditioner(layer, update_factors_in_hook=False)
    f = layer(inputs)
    (f * torch.randn_like(f)).sum().backward()  # gradients of variance 1, independent
    _, state = made._layers[layer]
    state.update_a_factor(alpha=0.0)
    state.update_g_factor(alpha=0.0)
    A, G = state.a_factor, state.g_factor
    print(type(layer).__name__, f"{(A[-1, -1] * G.trace() / 2).item():.1e}")
# prints
#   Linear 1.0e+00
#   Conv2d 3.9e-03
```

Expected: 4 for both, the variance of the bias's gradient, which is a sum over four positions.
The damping is the same number for all layers, so that convolutions are damped by more than their
curvature, and the larger the image, the more.

Suggestion: divide the factor of the gradients by the number of data alone, for both kinds of
layers, and the rows of a convolution by nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-pytorch", "0.4.2"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_pytorch:Adapter"
TITLE = "Blocks are too small by a power of the number of positions, which depends on the layer"
CASES = (
    ("positions-mse-mean-bias", "expand"),
    ("tokens-cross-entropy-all-mean", "expand"),
    ("mean-pooled-mse-mean-bias", "expand"),
    ("flattened-cross-entropy", "expand"),
    ("conv2d-plain-per-location-mse-mean", "expand"),
    ("conv2d-stride-pooled-mse", "expand"),
    ("conv-beside-linear-flat-mse", "expand"),
    ("conv-beside-linear-pooled-cross-entropy", "expand"),
)
CAUSE = (
    "kfac/layers/modules.py, line 141, LinearModuleHelper.get_g_factor: get_cov divides by the "
    "number of rows, data times positions; lines 177 and 191, Conv2dModuleHelper: rows of both "
    "factors are divided by spatial_size."
)
DOCUMENTED = (
    "'Computes the empirical second moment of a 2D tensor' (get_cov); silent about positions"
)
THREAD = "https://github.com/tensorflow/kfac/issues/41"
UPSTREAM = (
    "The thread of June 2020, which is closed, is about TensorFlow's KFAC: its factor of "
    "the inputs is a mean over positions, too, and a coefficient of the block makes up for it"
)


@contextmanager
def patch() -> Iterator[None]:
    """Means over data and positions, and sums over positions of what is sent back."""
    modules = import_module("kfac.layers.modules")
    linear, conv = modules.LinearModuleHelper, modules.Conv2dModuleHelper
    if hasattr(linear.get_g_factor, "mended_source"):  # by another finding, which needs this one
        yield
        return
    rows = "g = g.reshape(-1, g.size(-1))"
    with (
        mended(
            linear,
            "get_g_factor",
            (rows, f"n = len(g); {rows}"),
            ("get_cov(g)", "get_cov(g, scale=n)"),
        ),
        mended(conv, "get_a_factor", ("a = a / spatial_size", "a = a")),
        mended(conv, "get_g_factor", ("g = g / spatial_size", "g = g * spatial_size**0.5")),
    ):
        yield
