"""The combinatorics of derivatives: partitions and splits of multisets of directions.

A derivative along directions `i, j, ...` is a multiset, written as a sorted tuple: `(0, 0, 1)`.
Each rule of calculus is a sum over ways to distribute its members. Those that give the same
product of derivatives are counted here, not listed.

Source: Faà di Bruno 1855; for multisets, Hardy 2006 (arXiv:math/0601149).
"""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

Multiset = tuple[int, ...]


@lru_cache
def partitions(alpha: Multiset) -> Counter[tuple[Multiset, ...]]:
    """The partitions of a multiset into non-empty blocks, each with its number: the chain rule.

    `(0, 0)` has one block `((0, 0),)` once and `((0,), (0,))` once. The numbers add up to the Bell
    number of the order: 2, 5, 15, ..., 115975 for order 10.
    """
    if not alpha:
        return Counter({(): 1})
    *rest, last = alpha
    found: Counter[tuple[Multiset, ...]] = Counter()
    for blocks, count in partitions(tuple(rest)).items():
        found[_arranged([*blocks, (last,)])] += count  # the last by itself
        for b, block in enumerate(blocks):  # or in one of the blocks
            found[_arranged([*blocks[:b], (*block, last), *blocks[b + 1 :]])] += count
    return found


def splits(alpha: Multiset) -> Counter[tuple[Multiset, Multiset]]:
    """The ways to divide a multiset among two factors, each with its number: the product rule."""
    found: Counter[tuple[Multiset, Multiset]] = Counter({((), ()): 1})
    for i in alpha:
        grown: Counter[tuple[Multiset, Multiset]] = Counter()
        for (left, right), count in found.items():
            grown[_sorted((*left, i)), right] += count
            grown[left, _sorted((*right, i))] += count
        found = grown
    return found


def submultisets(alpha: Multiset) -> set[Multiset]:
    """All proper submultisets: the derivatives of `h` that the chain rule multiplies."""
    return {left for left, right in splits(alpha) if right}


def _arranged(blocks: Sequence[Multiset]) -> tuple[Multiset, ...]:
    return tuple(sorted(_sorted(block) for block in blocks))


def _sorted(alpha: Multiset) -> Multiset:
    return tuple(sorted(alpha))
