"""Findings meet: convolutions in front of average pooling.

In double precision the pool raises an error (`backpack_float64`). With that mended, the weight's
factor is summed over positions before the product (`backpack_conv_factors`), and for some cases
the layer's `padding_mode` is ignored (`backpack_padding_mode`). With all three mended, the blocks
are those of KFAC-expand, times the documented number of positions. The second patch changes the
bias's factor in the same way; what BackPACK has for the bias, the exact GGN, is documented and no
mistake.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kfac_scratch.conformance.audit.findings import (
    backpack_conv_factors,
    backpack_float64,
    backpack_padding_mode,
)

LIBRARY, VERSION = "BackPACK", "1.7.1"
ADAPTER = "kfac_scratch.conformance.adapters.backpack:Adapter"
TITLE = "Convolutions in front of average pooling"
MODES = ("plain", "stride", "padding", "dilation", "circular", "reflect", "replicate")
CASES = (
    *((f"conv2d-{mode}-pooled-mse", "expand") for mode in MODES),
    ("conv2d-stride-pooled-mse-float32", "expand"),
    ("1x1-convolutions-mean", "expand"),
    ("1x1-convolutions-sum", "expand"),
)
CAUSE = f"{backpack_float64.CAUSE} {backpack_conv_factors.CAUSE}"
DOCUMENTED = backpack_conv_factors.DOCUMENTED
THREAD = backpack_conv_factors.THREAD


@contextmanager
def patch() -> Iterator[None]:
    """All three patches."""
    with (
        backpack_float64.patch(),
        backpack_conv_factors.patch(),
        backpack_padding_mode.patch(),
    ):
        yield
