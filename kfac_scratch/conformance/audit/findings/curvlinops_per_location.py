"""Two findings meet: a convolution with another `padding_mode`, and a loss term per location.

See `curvlinops_padding_mode` for the first and `curvlinops_positions` for the second. With one of
them mended alone, these blocks stay wrong; with both they are the exact GGN.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kfac_scratch.conformance.audit.findings import curvlinops_padding_mode, curvlinops_positions

LIBRARY, VERSION = "curvlinops", "3.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.curvlinops:Adapter"
TITLE = "padding_mode, and vectors of different positions"
CASES = tuple(
    (f"conv2d-{mode}-per-location-mse-mean", "expand")
    for mode in ("circular", "reflect", "replicate")
)
CAUSE = f"{curvlinops_padding_mode.CAUSE} {curvlinops_positions.CAUSE}"
DOCUMENTED = curvlinops_positions.DOCUMENTED
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Both patches."""
    with curvlinops_padding_mode.patch(), curvlinops_positions.patch():
        yield
