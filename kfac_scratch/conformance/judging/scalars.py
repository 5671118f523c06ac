"""Which number of a case a wrong scale is made of, in words.

Sizes within a case are coprime, so that a factor tells what was forgotten: 7 is the number of data
and nothing else. A scale is searched among products of at most two sizes, to powers between -2 and
2, times a small power of two; the simplest that fits is named.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import combinations, product

MEANING = {
    "N": "the number of data",
    "S": "the number of positions that the layer is applied at",
    "C": "the number of classes or output features",
    "T": "the number of positions of the output",
    "d_in": "the layer's inputs",
    "d_out": "the layer's outputs",
    "batches": "the number of mini-batches",
}
POWERS = [Fraction(p) for p in (1, -1, 2, -2)] + [Fraction(1, 2), Fraction(-1, 2)]
CONSTANTS = [Fraction(p) for p in (1, 2, Fraction(1, 2), 4, Fraction(1, 4))]
SUPERSCRIPTS = {"2": "²", "1/2": "^(1/2)"}


def formulas(scale: float, sizes: Mapping[str, int], tolerance: float = 1e-8) -> list[str]:
    """The simplest formulas for a scale, such as `S`, `2/N²` or `N·C/2`; empty if none is simple.

    More than one if a case cannot tell them apart: a 2, and a size that is 2.
    """
    fits = [
        (constant, powers)
        for constant, powers in candidates(sizes)
        if abs(scale / _value(constant, powers, sizes) - 1) <= tolerance
    ]
    simplest = min((_terms(*fit) for fit in fits), default=0)
    return [formula(*fit) for fit in fits if _terms(*fit) <= max(1, simplest)][:3]


def candidates(sizes: Mapping[str, int]) -> Iterator[tuple[Fraction, dict[str, Fraction]]]:
    """Constants and powers of sizes, simple ones first."""
    letters = [letter for letter, size in sizes.items() if size > 1]
    for count in range(3):
        for constant in CONSTANTS:
            for chosen in combinations(letters, count):
                for powers in product(POWERS, repeat=count):
                    yield constant, dict(zip(chosen, powers, strict=True))


def formula(constant: Fraction, powers: Mapping[str, Fraction]) -> str:
    """A product as people write it."""
    above = [_power(letter, p) for letter, p in powers.items() if p > 0]
    below = [_power(letter, -p) for letter, p in powers.items() if p < 0]
    if constant.numerator > 1 or not above:
        above = [str(constant.numerator), *above]
    if constant.denominator > 1:
        below = [*below, str(constant.denominator)]
    below_all = "·".join(below)
    return "·".join(above) + (
        "" if not below else f"/({below_all})" if len(below) > 1 else f"/{below_all}"
    )


def in_words(scale: float, sizes: Mapping[str, int], tolerance: float = 1e-8) -> str:
    """What a scale says: its formula, its value, and what the letters mean."""
    if abs(scale - 1) <= tolerance:
        return "1"
    found = formulas(scale, sizes, tolerance)
    if not found:
        return f"{scale:.6g}, which no simple product of the case's sizes gives"
    used = [x for x in MEANING if x in sizes and any(_mentions(f, x) for f in found)]
    meaning = ", ".join(f"{x} = {sizes[x]}: {MEANING[x]}" for x in used)
    return f"{' or '.join(found)} = {scale:.6g}" + (f" ({meaning})" if meaning else "")


def _power(letter: str, power: Fraction) -> str:
    return letter if power == 1 else f"{letter}{SUPERSCRIPTS[str(power)]}"


def _terms(constant: Fraction, powers: Mapping[str, Fraction]) -> int:
    """How complicated a formula is; a root counts twice."""
    roots = sum(power.denominator > 1 for power in powers.values())
    return len(powers) + (constant != 1) + roots


def _value(constant: Fraction, powers: Mapping[str, Fraction], sizes: Mapping[str, int]) -> float:
    value = float(constant)
    for letter, power in powers.items():
        value *= sizes[letter] ** float(power)
    return value


def _mentions(formula: str, letter: str) -> bool:
    factors = formula.replace("/", "·").replace("(", "·").replace(")", "·").split("·")
    return any(factor.rstrip("²^") == letter for factor in factors)
