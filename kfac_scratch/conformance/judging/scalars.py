"""Which number of a case a wrong scale is made of, in words.

Sizes within a case are coprime, so that a factor tells what was forgotten: 7 is the number of data
and nothing else. A scale is searched among products of powers of the sizes and a small power of
two, and the simplest that fits is named. If layers or cases have scales with one cause, what is
named fits all of them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, product

import torch
from torch import Tensor

MEANING = {
    "N": "the number of data",
    "S": "the number of positions that the layer is applied at",
    "C": "the number of classes or output features",
    "T": "the number of positions of the output",
    "d_in": "the layer's inputs",
    "d_out": "the layer's outputs",
    "batches": "the number of mini-batches",
    "S_in": "the number of positions of a convolution's input",
    "M": "the number of labels drawn for a datum",
    "K": "the number of all data's positions",
    "W": "the number of those that count, or the sum of their weights",
}
HALF = Fraction(1, 2)
FEW = [Fraction(p) for p in (1, -1, 2, -2)]
POWERS = [*FEW, HALF, -HALF, *(Fraction(p) for p in (3, -3, 4, -4, 5, -5))]
CONSTANTS = [Fraction(p) for p in (1, 2, Fraction(1, 2), 4, Fraction(1, 4))]
SUPERSCRIPTS = {"1/2": "^(1/2)"} | {str(i): power for i, power in enumerate("⁰¹²³⁴⁵")}
ROUGH = 1e-6  # with a larger tolerance, products of many sizes fit by chance
SINGLE = 1e-4  # how far from 1 a number can be by rounding in float32
UNEXPLAINED = "which no simple product of the case's sizes gives"

Sizes = Mapping[str, int | float]
Product = tuple[Fraction, tuple[tuple[str, Fraction], ...]]  # a constant, and powers by letter


def formulas(scale: float, sizes: Sizes, tolerance: float = 1e-8) -> list[str]:
    """The simplest formulas for a scale, such as `S`, `2/N²` or `N·C/2`; empty if none is simple.

    More than one if a case cannot tell them apart: a 2, and a size that is 2.
    """
    return readings([(scale, sizes)], tolerance)


def readings(
    scales: Sequence[tuple[float, Sizes]], tolerance: float = 1e-8, most: int = 10**6
) -> list[str]:
    """The simplest formulas that fit all scales, each with the sizes of its own layer or case.

    Args:
        scales: With sizes.
        tolerance: Relative.
        most: How complicated a formula may be: of how many parts.
    """
    most_sizes = 2 if tolerance > ROUGH else len(MEANING)
    letters = [x for x in scales[0][1] if all(x in sizes for _, sizes in scales)]
    letters = [x for x in letters if any(sizes[x] > 1 for _, sizes in scales)]
    logs = torch.tensor(
        [[float(sizes[x]) for x in letters] for _, sizes in scales], dtype=torch.float64
    ).log()
    wanted = torch.tensor([scale for scale, _ in scales], dtype=torch.float64).log()
    found: list[Product] = []
    for count in range(min(most_sizes, len(letters)) + 1):
        if found and min(map(_terms, found)) < count:
            break  # whatever follows is more complicated
        found += _fitting(count, letters, logs, wanted, tolerance)
    simplest = max(1, min(map(_terms, found), default=0))
    kept = [reading for reading in found if _terms(reading) <= min(simplest, most)]
    if any(c == 1 and "W" in dict(powers) for c, powers in kept):  # which is no plain number
        kept = [(c, powers) for c, powers in kept if c == 1]
    return [formula(c, dict(powers)) for c, powers in kept][:3]


def _fitting(
    count: int, letters: Sequence[str], logs: Tensor, wanted: Tensor, tolerance: float
) -> Iterator[Product]:
    """All products of so many sizes that fit; `logs` and `wanted` are logarithms."""
    grid = list(product(exponents(count), repeat=count))
    powers = torch.tensor([[float(p) for p in row] for row in grid], dtype=torch.float64)
    for constant in CONSTANTS:
        offset = wanted - math.log(constant)
        for chosen in combinations(range(len(letters)), count):
            values = powers.reshape(len(grid), count) @ logs[:, list(chosen)].T
            fits = ((values - offset).abs() <= tolerance).all(1)
            for i in fits.nonzero().flatten().tolist():
                yield constant, tuple(zip([letters[j] for j in chosen], grid[i], strict=True))


def exponents(count: int) -> list[Fraction]:
    """The powers that are tried in a product of so many sizes: all in one of three at most."""
    return POWERS if count <= 3 else FEW


def candidates(sizes: Sizes, most: int = 3) -> Iterator[tuple[Fraction, dict[str, Fraction]]]:
    """Constants and powers of sizes, simple ones first."""
    letters = [letter for letter, size in sizes.items() if size > 1]
    for count in range(most + 1):
        for constant in CONSTANTS:
            for chosen in combinations(letters, count):
                for powers in product(exponents(count), repeat=count):
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


def off_by(
    scale: float,
    sizes: Sizes | Sequence[Sizes],
    tolerance: float = 1e-8,
    known: Sequence[str] = (),
) -> str:
    """In which direction a block is wrong and by how much: "too small by N² = 49 ..."."""
    if abs(scale - 1) <= tolerance:
        return "right"
    if _is_rounding(scale, sizes, tolerance, known):
        return f"right up to the rounding of float32, as it is {_near_one(scale)} times as large"
    if scale < 1:
        return f"too small by {in_words(1 / scale, sizes, tolerance, known)}"
    return f"too large by {in_words(scale, sizes, tolerance, known)}"


def in_words(
    scale: float,
    sizes: Sizes | Sequence[Sizes],
    tolerance: float = 1e-8,
    known: Sequence[str] = (),
) -> str:
    """What a scale says: its formula, its value, and what the letters mean.

    Args:
        scale: How many times larger a block is.
        sizes: Of its layer, or those of all layers that have this scale.
        tolerance: Relative.
        known: Formulas that fit, if they are known.
    """
    several = [sizes] if isinstance(sizes, Mapping) else list(sizes)
    if abs(scale - 1) <= tolerance:
        return "1"
    if _is_rounding(scale, several, tolerance, known):
        return f"{_near_one(scale)}, which is 1 up to the rounding of float32"
    found = list(known) or readings([(scale, of_layer) for of_layer in several], tolerance)
    if not found:
        return f"{scale:.6g}, {UNEXPLAINED}"
    if found == [f"{scale:.6g}"]:  # a plain number
        return found[0]
    meaning = meanings(found, several)
    return f"{' or '.join(found)} = {scale:.6g}" + (f" ({meaning})" if meaning else "")


def _is_rounding(
    scale: float, sizes: Sizes | Sequence[Sizes], tolerance: float, known: Sequence[str]
) -> bool:
    """Whether a scale is 1 but for what float32 rounds away, and nothing else explains it."""
    several = [sizes] if isinstance(sizes, Mapping) else list(sizes)
    if known or abs(scale - 1) > SINGLE:
        return False
    return not readings([(scale, of_layer) for of_layer in several], tolerance)


def _near_one(scale: float) -> str:
    """Such as `1 + 3e-08`, of which no digit is lost."""
    return f"1 {'-' if scale < 1 else '+'} {abs(scale - 1):.1g}"


def meanings(texts: Sequence[str], several: Sequence[Sizes]) -> str:
    """What the letters of some formulas mean, with their values."""
    used = [x for x in MEANING if x in several[0] and any(_mentions(f, x) for f in texts)]
    values = {x: " or ".join(f"{n:.6g}" for n in sorted({s[x] for s in several})) for x in used}
    return ", ".join(f"{x} = {values[x]}: {MEANING[x]}" for x in used)


def _power(letter: str, power: Fraction) -> str:
    return letter if power == 1 else f"{letter}{SUPERSCRIPTS[str(power)]}"


def _terms(reading: Product) -> int:
    """How complicated a formula is; a root counts twice, and so does a power beyond the square."""
    constant, powers = reading
    odd = sum(power.denominator > 1 or abs(power) > 2 for _, power in powers)
    return len(powers) + (constant != 1) + odd


def _mentions(formula: str, letter: str) -> bool:
    factors = formula.replace("/", "·").replace("(", "·").replace(")", "·").split("·")
    return any(factor.rstrip("".join(SUPERSCRIPTS.values())) == letter for factor in factors)
