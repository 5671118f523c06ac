r"""Expansions: sets of derivatives that Taylor mode computes together, and their chain rules.

A quantity $h(x)$ is known at $x$ by its value and some of its partial derivatives along directions
$v_1, \dots, v_R$. Of $\sigma(h)$ the same derivatives follow, by the formula of Faà di Bruno,

$$
\partial^\alpha \sigma(h)
= \sum_{\pi} \sigma^{(\lvert \pi \rvert)}(h) \prod_{\beta \in \pi} \partial^\beta h ,
$$

a sum over all partitions $\pi$ of the multiset $\alpha$ of directions. The derivative of highest
order enters linearly. So a *sum* of such derivatives needs one coefficient: the Laplacian costs
$d + 2$ coefficients, not $1 + 2 d$. With $S$ coefficients, a forward pass costs about $S$ ordinary
ones, in time and in memory. `SecondOrder` has all operators of order two, `Partials` those of any
order.

Sources: Griewank and Walther 2008, chapter 13; Dangel et al. 2024 (arXiv:2405.15603), appendix C;
Dangel et al. 2025 (arXiv:2505.13644) for the sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.taylor.activations import Derivatives, evaluate
from kfac_scratch.taylor.faa_di_bruno import Multiset

Coefficients = Float[Tensor, "N S h"]
CoefficientsOrConstants = Float[Tensor, "N S #h"]


@runtime_checkable
class Expansion(Protocol):
    """A set of coefficients that determines the same set for every function of them."""

    @property
    def order(self) -> int:
        """The number of derivatives of an elementwise function that `compose` needs."""
        ...

    @property
    def names(self) -> list[Multiset | int]:
        """The name of each coefficient: a multiset of directions, or the number of a sum."""
        ...

    @property
    def tops(self) -> list[int]:
        """The coefficients that no other one is computed from.

        A residual that ignores one of them has declared too large an expansion.
        """
        ...

    def start(self, X: Float[Tensor, "N d"]) -> Coefficients:
        """The coefficients of `x` itself."""
        ...

    def compose(self, sigma: Derivatives, h: Coefficients) -> Coefficients:
        """The coefficients of `sigma(h)`, given the derivatives of `sigma`."""
        ...

    def product(self, f: CoefficientsOrConstants, g: CoefficientsOrConstants) -> Coefficients:
        """The coefficients of `f * g`."""
        ...

    def part(self, rows: slice) -> "Expansion":
        """The same expansion for some of the points."""
        ...


@dataclass(frozen=True, eq=False)
class SecondOrder:
    r"""The value, first derivatives along `R` directions, and `M` sums of second derivatives.

    Sum `m` is $\sum_{ij} C_{ij} \partial_{v_i} \partial_{v_j}$. Use it for equations of order up
    to two. Not for higher orders or single second derivatives beside each other: `Partials`.

    Cost: `1 + R + M` coefficients.

    Attributes:
        directions: `[R, d]`, or `[N, R, d]` if they differ between points, as normals do.
        C: The sums' weights, in one of four shapes. `[M, 1]`: one weight for all directions,
            `C_ij = C if i == j else 0`, as the Laplacian has. `[M, R]`: diagonal weights.
            `[M, R, R]`: all weights. `[M, N, R, R]`: all weights, for each point its own. The
            shape alone decides which formula runs; `[M, 1]` is the cheapest (`R * N * h` products
            less than `[M, R]`).
    """

    directions: Float[Tensor, "*points R d"]
    C: Float[Tensor, " M *pairs #R"]

    def __post_init__(self) -> None:
        R, d = self.directions.shape[-2:]
        per_point = (self.C.shape[1], R, R) if self.C.ndim == 4 else None
        if self.C.shape[1:] not in ((1,), (R,), (R, R), per_point):
            raise ValueError(
                f"C has shape {tuple(self.C.shape)}, but {R} directions in {d} dimensions need "
                f"[M, 1] (one weight for all), [M, {R}] (diagonal), [M, {R}, {R}], or "
                f"[M, N, {R}, {R}] for each point."
            )

    @property
    def order(self) -> int:
        """2 if there is a sum, 1 if there are only directions, 0 otherwise."""
        return 2 if len(self.C) else min(1, self.directions.shape[-2])

    @property
    def names(self) -> list[Multiset | int]:
        """The value, the directions, the sums."""
        singles = [(i,) for i in range(self.directions.shape[-2])]
        return [(), *singles, *range(len(self.C))]

    @property
    def tops(self) -> list[int]:
        """The sums; or the directions; or the value."""
        sums = range(1 + self.directions.shape[-2], len(self.names))
        return list(sums or range(1, len(self.names)) or [0])

    def start(self, X: Float[Tensor, "N d"]) -> Coefficients:
        """`x` has the directions as first derivatives, and no second ones."""
        N, d = checked(self.directions, X).shape
        if self.C.ndim == 4 and self.C.shape[1] != N:
            raise ValueError(f"{N} points need C of shape [M, {N}, R, R], not {self.C.shape}.")
        V = self.directions.to(X).expand(N, -1, d)
        return torch.cat([X.unsqueeze(1), V, X.new_zeros(N, len(self.C), d)], dim=1)

    def compose(self, sigma: Derivatives, h: Coefficients) -> Coefficients:
        """The coefficients of `sigma(h)`, by the chain rule of first and second order."""
        return _Chain.apply(h, sigma, self)

    def product(self, f: CoefficientsOrConstants, g: CoefficientsOrConstants) -> Coefficients:
        """The coefficients of `f * g`, by the rule of Leibniz."""
        R = self.directions.shape[-2]
        df, dg = f[:, 1 : 1 + R], g[:, 1 : 1 + R]
        result = torch.cat([f[:, :1] * g[:, :1], f[:, 1:] * g[:, :1] + f[:, :1] * g[:, 1:]], 1)
        if self.order < 2:
            return result
        mixed = self.form(df, dg) + self.form(dg, df)
        return torch.cat([result[:, : 1 + R], result[:, 1 + R :] + mixed], dim=1)

    def part(self, rows: slice) -> "SecondOrder":
        """The expansion of some points, whose directions and weights may differ between points."""
        V = self.directions[rows] if self.directions.ndim == 3 else self.directions
        return replace(self, directions=V, C=self.C[:, rows] if self.C.ndim == 4 else self.C)

    def form(
        self, x: Float[Tensor, "N R #h"], y: Float[Tensor, "N R #h"]
    ) -> Float[Tensor, "N M h"]:
        """`sum_ij C_ij x_i y_j` for every sum."""
        C = self.C.to(x)
        if C.ndim == 2 and C.shape[1] == 1:  # one weight for all directions
            return C * _sum_of_products(x, y).unsqueeze(1)
        if C.ndim == 2:
            return torch.stack([_sum_of_products(c.unsqueeze(1) * x, y) for c in C], dim=1)
        n = "n" if C.ndim == 4 else ""
        return torch.einsum(f"m{n}ij,nih,njh->nmh", C, x, y)

    def gradient_of_form(
        self, x: Float[Tensor, "N R h"], top: Float[Tensor, "N M h"]
    ) -> Float[Tensor, "N R h"]:
        """The derivative of `sum(top * form(x, x))` with respect to `x`."""
        C = self.C.to(x)
        if C.ndim == 2:
            parts = zip(2 * C, top.split(1, dim=1), strict=True)
            return x * sum(c.unsqueeze(1) * t for c, t in parts)
        n = "n" if C.ndim == 4 else ""
        return torch.einsum(f"m{n}ij,nmh,njh->nih", C + C.mT, top, x)


class _Chain(torch.autograd.Function):
    """`SecondOrder.compose` with a reverse pass of its own, which saves memory for intermediates.

    With `q = sum_ij C_ij d_i h d_j h`, forward `d_i -> s' d_i`, `l -> s' l + s'' q`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, sigma: Derivatives, expansion: SecondOrder) -> Tensor:
        R, outer = expansion.directions.shape[-2], evaluate(sigma, h[:, 0], expansion.order)
        if expansion.order == 0:
            return outer[0].unsqueeze(1)
        result = h * outer[1].unsqueeze(1)
        result[:, 0] = outer[0]
        if expansion.order == 2:
            first = h[:, 1 : 1 + R]
            result[:, 1 + R :] += outer[2].unsqueeze(1) * expansion.form(first, first)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        h, ctx.sigma, ctx.expansion = inputs
        ctx.save_for_backward(h)

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor, None, None]:
        (h,), E = ctx.saved_tensors, ctx.expansion
        R, outer = E.directions.shape[-2], evaluate(ctx.sigma, h[:, 0], E.order + 1)
        back = G * outer[1].unsqueeze(1)
        if E.order >= 1:
            back[:, 0] += outer[2] * _sum_of_products(G[:, 1:], h[:, 1:])
        if E.order == 2:
            first, top = h[:, 1 : 1 + R], G[:, 1 + R :]
            back[:, 0] += outer[3] * (top * E.form(first, first)).sum(1)
            back[:, 1 : 1 + R] += E.gradient_of_form(first, outer[2].unsqueeze(1) * top)
        return back, None, None


def _sum_of_products(x: Tensor, y: Tensor) -> Tensor:
    """`(x * y).sum(1)`, without the product in memory."""
    total = x[:, 0] * y[:, 0]
    for i in range(1, x.shape[1]):
        total = torch.addcmul(total, x[:, i], y[:, i])
    return total


def checked(directions: Tensor, X: Tensor) -> Tensor:
    """The points `X`, after a check that directions fit them.

    Raises:
        ValueError: If the dimension, or the number of points, differs.
    """
    if directions.shape[-1] != X.shape[1] or (directions.ndim == 3 and len(directions) != len(X)):
        raise ValueError(
            f"Directions of shape {tuple(directions.shape)} do not fit points of shape "
            f"{tuple(X.shape)}: they need [R, d], or [N, R, d]."
        )
    return X


# ---- usual operators ----------------------------------------------------------------------------


def value_only(d: int) -> SecondOrder:
    """The value without derivatives.

    Use it for Dirichlet conditions, initial values and measurements. Not for residuals with
    derivatives.

    Cost: 1 coefficient.
    """
    return SecondOrder(torch.zeros(0, d), torch.zeros(0, 0))


def directional(directions: Float[Tensor, "*points R d"]) -> SecondOrder:
    """The value and first derivatives along `R` directions.

    Use it for equations of first order, and for Neumann conditions with `[N, 1, d]` normals. Not
    for second derivatives.

    Cost: `1 + R` coefficients.
    """
    return SecondOrder(directions, torch.zeros(0, directions.shape[-2]))


def laplacian(d: int, coordinates: Sequence[int] | None = None) -> SecondOrder:
    """The value, all first derivatives, and the Laplacian over some coordinates (default: all).

    Use it for equations with a Laplacian in space. Not for other sums of second derivatives:
    `second_order_sum`.

    Cost: `d + 2` coefficients. Over all coordinates, the sum has one weight for all directions, in
    the shape `[1, 1]`, which is cheaper than one for each (see `SecondOrder.C`).

    Raises:
        ValueError: If a coordinate is given twice, or does not exist.
    """
    if coordinates is None:
        return SecondOrder(torch.eye(d), torch.ones(1, 1))
    if len({*coordinates} & {*range(d)}) < len(coordinates):
        raise ValueError(
            f"The coordinates {list(coordinates)} of a Laplacian must be different numbers from 0 "
            f"to {d - 1}. A weight of 2 is an entry of second_order_sum's C."
        )
    C = torch.zeros(1, d)
    C[0, list(coordinates)] = 1.0
    return SecondOrder(torch.eye(d), C)


def second_order_sum(C: Float[Tensor, "*points d d"]) -> SecondOrder:
    """The value, all first derivatives, and `sum_ij C_ij d_i d_j`.

    Use it for anisotropic diffusion and mixed derivatives, with one `C` or one for each point. Not
    for the Laplacian, which costs `d**2` products for each entry here.

    Cost: `d + 2` coefficients.

    Raises:
        ValueError: If `C` is not `[d, d]` or `[N, d, d]`.
    """
    if C.ndim not in (2, 3) or C.shape[-1] != C.shape[-2]:
        raise ValueError(f"C has shape {tuple(C.shape)}, not [d, d], or [N, d, d] for each point.")
    return SecondOrder(torch.eye(C.shape[-1], dtype=C.dtype, device=C.device), C.unsqueeze(0))
