"""Parameters of which plain `pytest` takes some, and the slow tier all others."""

import pytest


def thinned(values, every=3):
    """All values; but for every third (or so), their tests are slow."""
    return [
        value if i % every == 0 else pytest.param(value, marks=pytest.mark.slow)
        for i, value in enumerate(values)
    ]
