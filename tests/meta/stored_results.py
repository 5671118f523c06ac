"""Stored results of a comparison, spoiled on purpose."""

import copy


def spoiled(result, *path):
    """A copy without the last element that a path leads to ("pop"), or with another value."""
    result = copy.deepcopy(result)
    *path, last, value = path
    at = result
    for key in path:
        at = at[key]
    if value == "pop":
        at[last].pop()
    else:
        at[last] = value
    return result
