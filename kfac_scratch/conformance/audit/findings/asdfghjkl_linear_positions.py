"""A linear layer's weight has a KFAC block that is too large by the number of positions.

A linear layer on a sequence is applied at S positions. Its input factor is the sum over data and
positions, where that of a convolution is divided by the number of positions; the factor of the
outputs is a sum for both. So the scale of a block depends on the kind of layer, and within a
linear layer it differs between the weight and the bias, whose block is the factor of the outputs
alone. A linear layer at every position and a 1x1 convolution are the same function:

```python
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

torch.manual_seed(0)
linear, conv = nn.Linear(3, 2).double(), nn.Conv2d(3, 2, 1).double()
conv.load_state_dict({"weight": linear.weight[..., None, None], "bias": linear.bias})
X = torch.randn(5, 3, 1, 7).double()
at_linear = nn.Sequential(linear, nn.Flatten(), nn.Linear(14, 2).double())
at_conv = nn.Sequential(conv, nn.Flatten(), nn.Linear(14, 2).double())
order = torch.arange(14).reshape(2, 7).T.flatten()  # the flattened outputs differ in order
at_linear[2].load_state_dict({"weight": at_conv[2].weight[:, order], "bias": at_conv[2].bias})
for model, inputs in ((at_linear, X[:, :, 0].mT.contiguous()), (at_conv, X)):
    config = FisherConfig("fisher_exact", ["kron"], loss_type="mse", data_size=5)
    maker = get_fisher_maker(model, config)
    maker.setup_model_call(model, inputs)
    maker.forward_and_backward()
    factors = model[0].fisher.kron
    print("weight", factors.trace(), "bias", factors.B.trace().item())
# prints
#   weight 15.77178221874878 bias 0.695094788458057
#   weight 2.25311174553554 bias 0.695094788458057
```

Expected: equal numbers. The second is right: with it, `A` is a mean over data and positions and
`B` the sum, so that `B` alone is the bias's block.

Suggestion: divide `Linear.cov_kron_A` by the number of positions, as `Conv2d.cov_kron_A` does;
`preprocess_in_data` knows it before it flattens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "The input factor of a linear layer is a sum over positions, of a convolution a mean"
CASES = (
    ("mean-pooled-mse-mean-bias", "expand"),
    ("sum-pooled-mse-sum-bias", "expand"),
    ("tokens-cross-entropy-all-mean", "expand"),
    ("tokens-cross-entropy-one-datum-sum", "expand"),
    ("masked-mean-pool-cross-entropy", "expand"),
    ("attention-pooled-cross-entropy", "expand"),
    ("flattened-mse", "expand"),
    ("flattened-cross-entropy", "expand"),
)
CAUSE = (
    "asdl/operations/linear.py, line 24, preprocess_in_data, flattens positions into the batch, "
    "and cov_kron_A, line 73, sums over both; operations/conv.py, line 88, divides by out_size."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """A mean over positions."""
    linear = import_module("asdl.operations.linear").Linear
    flat = "in_data = in_data.flatten(end_dim=in_data.ndim - 2)"
    root = "in_data[0, ..., 0].numel() ** 0.5"
    with mended(linear, "preprocess_in_data", (flat, f"{flat} / {root}")):
        yield
