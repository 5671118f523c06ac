r"""Partial derivatives of any order, and sums of such, by Faà di Bruno's formula.

The derivatives of `h` that one of `sigma(h)` consists of are counted once. Then all products with
equally many factors are one gather, one product and one small matrix. Derivatives that are only
needed as a sum are one coefficient.

Sources: see `expansions`; Hardy 2006 (arXiv:math/0601149) for multisets.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.taylor.activations import Derivatives, evaluate
from kfac_scratch.taylor.expansions import Coefficients, CoefficientsOrConstants, checked
from kfac_scratch.taylor.faa_di_bruno import Multiset, partitions, splits, submultisets

TermTable = dict[tuple[int, tuple[int, ...]], float]  # {(row, coefficients multiplied): factor}


@dataclass(frozen=True, eq=False)
class Partials:
    """Partial derivatives of any order up to 10 along `R` directions, and sums of such.

    Use it for orders above two, and for single second derivatives. Not for a Laplacian or another
    sum of second derivatives: `SecondOrder` has a reverse pass of its own.

    Cost: one coefficient for the value, one for each derivative and each of lower order that it is
    computed from, one for each sum.

    Attributes:
        directions: `[R, d]`.
        partials: The derivatives, as multisets of directions: `(0, 0, 1)`.
        sums: Weighted sums of derivatives. The derivatives of lower order that they are computed
            from are added by themselves (`kept`).

    Raises:
        ValueError: If a derivative is empty, has an unknown direction, or is of an order above 10.
    """

    directions: Float[Tensor, "R d"]
    partials: Sequence[Multiset] = ()
    sums: Sequence[Mapping[Multiset, float]] = ()

    def __post_init__(self) -> None:
        R, wanted = len(self.directions), [*self.partials, *(a for s in self.sums for a in s)]
        for alpha in wanted:
            if not all(0 <= i < R for i in alpha) or not alpha:
                raise ValueError(f"{alpha} is no derivative along directions 0 to {R - 1}.")
            if len(alpha) > 10:
                raise ValueError(
                    f"A derivative of order {len(alpha)} is a sum over more than half a million "
                    "partitions: order 10 is the highest here."
                )

    @cached_property
    def kept(self) -> list[Multiset]:
        """The derivatives that are coefficients of their own: the value, then by their order."""
        found: set[Multiset] = {()}
        for alpha in self.partials:
            found |= {tuple(sorted(alpha)), *submultisets(alpha)}
        for total in self.sums:
            found |= {beta for alpha in total for beta in submultisets(alpha)}
        return sorted(found, key=lambda alpha: (len(alpha), alpha))

    @property
    def order(self) -> int:
        """The highest order of all derivatives."""
        return max([len(a) for a in self.kept] + [len(a) for s in self.sums for a in s])

    @property
    def names(self) -> list[Multiset | int]:
        """The derivatives that are coefficients of their own, then the sums."""
        return [*self.kept, *range(len(self.sums))]

    @property
    def tops(self) -> list[int]:
        """The sums, and the derivatives that no other one is computed from."""
        all_of_them = [*self.kept, *(alpha for total in self.sums for alpha in total)]
        parts = {beta for alpha in all_of_them for beta in submultisets(alpha)}
        return [s for s, name in enumerate(self.names) if name not in parts]

    def start(self, X: Float[Tensor, "N d"]) -> Coefficients:
        """`x` has the directions as first derivatives, and no others."""
        c = X.new_zeros(len(X), len(self.names), checked(self.directions, X).shape[1])
        c[:, 0] = X
        for s, name in enumerate(self.names):
            if isinstance(name, tuple) and len(name) == 1:
                c[:, s] = self.directions[name[0]].to(X)
        for m, total in enumerate(self.sums):
            linear = [w * self.directions[a[0]].to(X) for a, w in total.items() if len(a) == 1]
            c[:, len(self.kept) + m] = sum(linear, X.new_zeros(X.shape[1]))
        return c

    def compose(self, sigma: Derivatives, h: Coefficients) -> Coefficients:
        """Faà di Bruno's formula, all partitions into equally many blocks at once."""
        outer = evaluate(sigma, h[:, 0], self.order)
        value = outer[0].unsqueeze(1)
        result = torch.cat([value, torch.zeros_like(h[:, 1:])], dim=1)
        for blocks, terms in self._chain.items():
            index, M = _matrix(terms, h)
            factors = h[:, index[0]]
            for column in index[1:]:
                factors = factors * h[:, column]
            result = result + outer[blocks].unsqueeze(1) * (M @ factors)
        return result

    def product(self, f: CoefficientsOrConstants, g: CoefficientsOrConstants) -> Coefficients:
        """Leibniz's rule: every way to give each derivative to one of the factors."""
        (left, right), M = _matrix(self._leibniz, f)
        return M @ (f[:, left] * g[:, right])

    def part(self, rows: slice) -> "Partials":
        """The same expansion: directions do not differ between points."""
        return self

    @cached_property
    def _chain(self) -> dict[int, TermTable]:
        """Terms by their number of blocks."""
        found: dict[int, TermTable] = {}
        for row, own in self._rows():
            for alpha, weight in own.items():
                for pi, count in partitions(alpha).items():
                    whole = row if len(pi) == 1 else None
                    key = (row, tuple(self._slot(beta, whole) for beta in pi))
                    terms = found.setdefault(len(pi), {})
                    terms[key] = terms.get(key, 0.0) + count * weight
        for m in range(len(self.sums)):  # a sum enters itself once, not once for each of its terms
            row = len(self.kept) + m
            found.setdefault(1, {})[row, (row,)] = 1.0
        return found

    @cached_property
    def _leibniz(self) -> TermTable:
        found: TermTable = {(0, (0, 0)): 1.0}
        for row, own in self._rows():
            for alpha, weight in own.items():
                for (beta, gamma), count in splits(alpha).items():
                    pair = self._slot(beta, row if not gamma else None)
                    key = (row, (pair, self._slot(gamma, row if not beta else None)))
                    found[key] = found.get(key, 0.0) + count * weight
            found[row, (row, 0)] = found[row, (0, row)] = 1.0
        return found

    def _rows(self) -> list[tuple[int, Mapping[Multiset, float]]]:
        """Each coefficient but the value as a weighted sum of derivatives."""
        own: list[Mapping[Multiset, float]] = [{alpha: 1.0} for alpha in self.kept[1:]]
        return list(enumerate([*own, *self.sums], start=1))

    def _slot(self, beta: Multiset, whole: int | None) -> int:
        return self.kept.index(beta) if whole is None else whole


def _matrix(terms: TermTable, like: Coefficients) -> tuple[list[Tensor], Float[Tensor, "S T"]]:
    """The coefficients that each product multiplies, and the matrix that adds products up."""
    products = sorted({key for _, key in terms})
    position = {key: t for t, key in enumerate(products)}
    M = torch.zeros(like.shape[1], len(products), dtype=like.dtype)
    for (row, key), factor in terms.items():
        M[row, position[key]] = factor
    index = torch.tensor(products, device=like.device).T
    return list(index), M.to(like.device)


# ---- usual operators ----------------------------------------------------------------------------


def univariate_jets(directions: Float[Tensor, "R d"], order: int) -> Partials:
    """All derivatives up to an order along each direction by itself.

    Use it for equations without mixed derivatives. Not for sums of second ones: `SecondOrder`.

    Cost: `1 + R * order` coefficients.
    """
    return Partials(directions, [(r,) * order for r in range(len(directions))])


def biharmonic(d: int) -> Partials:
    """The Laplacian of the Laplacian, and the derivatives of lower order that it is computed from.

    Use it for plates and streamfunctions. Not for the Laplacian alone: `laplacian`.

    Cost: 11 coefficients for `d = 2`, 20 for `d = 3`; the number grows with `d**2`.
    """
    pairs = Counter(tuple(sorted((i, i, j, j))) for i in range(d) for j in range(d))
    return Partials(torch.eye(d), sums=[{alpha: float(n) for alpha, n in pairs.items()}])
