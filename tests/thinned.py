"""Parameters of which plain `pytest` takes some, and the slow tier all others."""

from collections import Counter

import pytest


def thinned(values, every=3, kind=lambda value: None):
    """All values, of which the tests of most are slow: of each kind every third (or so) is not.

    The first of a kind is always in plain `pytest`.
    """
    seen, found = Counter(), []
    for value in values:
        slow = seen[kind(value)] % every
        seen[kind(value)] += 1
        found.append(pytest.param(value, marks=pytest.mark.slow) if slow else value)
    return found
