"""Two findings meet: a convolution with another `padding_mode`, and the strategy `kfac`.

See `kronfluence_padding_mode` for the first and `kronfluence_positions` for the second. With one of
them mended alone, these blocks stay wrong; with both they are right.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from kfac_scratch.conformance.audit.findings import kronfluence_padding_mode, kronfluence_positions

LIBRARY, VERSION = "kronfluence", "1.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.kronfluence:Adapter"
TITLE = "padding_mode, and the number of positions"
CASES = tuple(
    (f"conv2d-{mode}-{end}", "expand")
    for mode in ("circular", "reflect", "replicate")
    for end in ("pooled-mse", "per-location-mse-mean")
)
CAUSE = f"{kronfluence_padding_mode.CAUSE} {kronfluence_positions.CAUSE}"
DOCUMENTED = kronfluence_positions.DOCUMENTED
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """Both patches."""
    with kronfluence_padding_mode.patch(), kronfluence_positions.patch():
        yield
