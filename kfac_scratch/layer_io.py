"""LayerIO: what flows through one layer, in one format for every layer.

Every layer that KFAC supports applies one matrix `W` at `S` shared positions: a linear layer
along a sequence, a convolution at every patch, a tied layer at every call. Two tensors then say
everything about the layer's curvature on a batch: the rows that go into `W` and the vectors that
come back to its output. Every approximation in this package is a function of them.

In memory, rows may be stored as columns; `linalg.stored_as_columns` says which layout a tensor has.
Results do not depend on it, only speed does.

Source: the shared-weight view of Eschenhagen et al. 2023 (arXiv:2311.00636), §2.3 and §3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import pad

from kfac_scratch.one_hot import OneHot


@dataclass(frozen=True, eq=False)
class LayerIO:
    """Inputs and back-propagated vectors of a layer `z[n, s] = W @ a[n, s]`.

    Attributes:
        a: Inputs of `W`. A bias is a trailing column: its input is 1. Those of an embedding are
            `OneHot`: `kfac` and `foof` take only the words' counts from it. Everything else forms
            the rows, which takes `N * S * d_in` numbers, and may have results of size `d_in**2`.
        g: `V` vectors for each sample, sent back from the loss to `z`. Their outer products sum to
            the loss curvature with respect to `z`. All scale of the loss is in `g`, none in `a`: a
            loss that is multiplied by `c` multiplies `g` by `sqrt(c)`, and every curvature by `c`.
        positions: How many positions every row stands for. It is 1, except in a layer that
            `reduced()` or `flavour=REDUCE` made of several: its `a` and `g` give KFAC-reduce, but
            the gradient of a sample is lost (see `check_not_reduced`).
        counted: Which positions are part of the data; None if all are. Others, such as
            padding, have rows and vectors of zeros, so that no gradient is changed by
            them. Means over positions leave them out.
    """

    a: Float[Tensor, "N S d_in"]
    g: Float[Tensor, "V N S d_out"]
    positions: int = 1
    counted: Bool[Tensor, "N S"] | None = None

    def __post_init__(self) -> None:
        if self.counted is not None:
            _check_zeros(self.a, self.g, self.counted)

    @property
    def parts(self) -> tuple["LayerIO", ...]:
        """The layer by the way in which its weight is applied: itself alone, but for a `TiedIO`."""
        return (self,)

    @property
    def rows(self) -> int | Tensor:
        """The number of rows that are part of the data, over which `A` is a mean; 1 at least."""
        if self.counted is None:
            return self.a.shape[0] * self.a.shape[1]
        return self.counted.sum().clamp(min=1).to(self.a.dtype)

    def reduced(self) -> "LayerIO":
        """The layer as if it were applied once: mean of the inputs, sum of the vectors.

        KFAC-reduce is `kfac(io.reduced())` (Eschenhagen et al. 2023, eq. 22). Use it in tests and
        for rows that exist already; `layer_ios(..., flavour=REDUCE)` gives the same without forming
        the rows of a convolution.
        """
        S = self.positions * self.a.shape[1]
        if self.counted is None:
            return LayerIO(self.a.mean(1, keepdim=True), self.g.sum(2, keepdim=True), S)
        a, counted = counted_mean(self.a, self.counted)
        return LayerIO(a, self.g.sum(2, keepdim=True), S, counted)

    def gradients(self) -> Float[Tensor, "V N d_out d_in"]:
        """Every vector's gradient with respect to `W`: `G[v, n] = sum_s g[v, n, s] a[n, s]^T`.

        Cost: `V * N * S * d_out * d_in` operations, memory `V * N * d_out * d_in`.
        """
        return torch.einsum("vnso,nsi->vnoi", self.g, self.a)

    def inner_products(self, V: Float[Tensor, "*batch d_out d_in"]) -> Float[Tensor, "*batch V N"]:
        """The inner products of `V` with every gradient, `sum_s g^T V a`.

        Cost: `N S d_in d_out + V N S d_out` operations for each matrix `V`; no gradient is formed.
        """
        z = torch.einsum("nsi,...oi->...nso", self.a, V)
        return torch.einsum("vnso,...nso->...vn", self.g, z)

    def combination(self, c: Float[Tensor, "*batch V N"]) -> Float[Tensor, "*batch d_out d_in"]:
        """The gradients' sum with given weights, `sum_{v,n} c[v, n] G[v, n]`.

        The transpose of `inner_products`: after it, the product with the exact block.
        """
        g = torch.einsum("...vn,vnso->...nso", c, self.g)
        return torch.einsum("...nso,nsi->...oi", g, self.a)

    def block(self) -> Float[Tensor, "D D"]:
        """The exact curvature block on `vec(W)`, which every paper approximates.

        `sum_{v, n} vec(G[v, n]) vec(G[v, n])^T` with `D = d_out * d_in`. Use it for small layers
        and in tests; not for layers with more than a few thousand weights.

        Cost: `V * N * D**2` operations, memory `D**2 + N * D`.
        """
        D = self.a.shape[-1] * self.g.shape[-1]
        block = self.a.new_zeros(D, D)
        for g in self.g.split(1):  # one vector at a time: memory N * D, not V * N * D
            G = LayerIO(self.a, g).gradients().flatten(2).squeeze(0)  # [N, D]
            block += G.T @ G
        return block


NO_ROWS = (
    "A weight that an embedding and a linear layer share has no rows `a` that serve all vectors. "
    "kfac(io) and the methods of TiedIO take it; for other approximations pass io.direct and "
    "io.turned, leave both layers out with layers=[...], or untie them."
)


class TiedIO(LayerIO):
    """A weight that linear layers apply as `W`, and embeddings as its transpose.

    So do the head and the first layer of most language models. The gradient of a sample is a sum of
    outer products again, `sum_s g[s] a[s]^T + sum_t a'[t] g'[t]^T`, but there are no rows that stay
    the same for all vectors: those of the second sum are vectors themselves. `a` and `g` are thus
    refused, and so is every approximation that reads them. The methods here and `kfac` know both
    sums.

    Attributes:
        direct: The linear layers, with a column for each bias.
        turned: The embeddings, as layers of their own.
    """

    direct: LayerIO
    turned: LayerIO

    def __init__(self, direct: LayerIO, turned: LayerIO) -> None:
        object.__setattr__(self, "direct", direct)
        object.__setattr__(self, "turned", turned)

    def __repr__(self) -> str:
        return f"TiedIO(direct={self.direct!r}, turned={self.turned!r})"

    @property
    def parts(self) -> tuple[LayerIO, ...]:
        """The linear layers, and the embeddings."""
        return (self.direct, self.turned)

    @property
    def a(self) -> Tensor:
        """Refused: there are none.

        Raises:
            NotImplementedError: With the ways out.
        """
        raise NotImplementedError(NO_ROWS)

    g = a

    @property
    def positions(self) -> int:
        """As many as the rows of either kind of layer stand for, at most."""
        return max(self.direct.positions, self.turned.positions)

    def reduced(self) -> "TiedIO":
        """Both kinds of layers reduced."""
        return TiedIO(self.direct.reduced(), self.turned.reduced())

    def gradients(self) -> Float[Tensor, "V N d_out d_in"]:
        """Every vector's gradient with respect to `W`, the sum over both kinds of layers."""
        return self.direct.gradients() + self._with_bias_columns(self.turned.gradients().mT)

    def inner_products(self, V: Float[Tensor, "*batch d_out d_in"]) -> Float[Tensor, "*batch V N"]:
        """The inner products of `V` with every gradient."""
        weight = V[..., : self.turned.g.shape[-1]]
        return self.direct.inner_products(V) + self.turned.inner_products(weight.mT)

    def combination(self, c: Float[Tensor, "*batch V N"]) -> Float[Tensor, "*batch d_out d_in"]:
        """The gradients' sum with given weights."""
        turned = self._with_bias_columns(self.turned.combination(c).mT)
        return self.direct.combination(c) + turned

    def block(self) -> Float[Tensor, "D D"]:
        """The exact curvature block on `vec(W)`, with the products of both sums."""
        vectors = zip(self.direct.g.split(1), self.turned.g.split(1), strict=True)
        pairs = ((replace(self.direct, g=g), replace(self.turned, g=h)) for g, h in vectors)
        return reduce(torch.add, (TiedIO(*pair).folded().block() for pair in pairs))

    def folded(self) -> LayerIO:
        """The same gradients and block as a `LayerIO`: every vector of a sample is a sample.

        Use it for what needs gradients. Not for KFAC: the vectors of the embedding stand among the
        inputs of the linear layers, and have other units.

        Cost: memory `V * N * (S + T) * (d_in + d_out)` for `S` positions of the linear layers and
        `T` of the embeddings: inputs are repeated for every vector, and one-hot rows are formed.
        """
        V = len(self.direct.g)
        inputs = self.direct.a.expand(V, *self.direct.a.shape)
        words = self.turned.a
        words = words.dense() if isinstance(words, OneHot) else words
        a = torch.cat([inputs, self._with_bias_columns(self.turned.g)], dim=2)
        g = torch.cat([self.direct.g, words.expand(V, *words.shape)], dim=2)
        return LayerIO(a.flatten(0, 1), g.flatten(0, 1).unsqueeze(0))

    def _with_bias_columns(self, W: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d_in"]:
        """The columns of `W` that belong to the weight, and zeros for those of biases."""
        return pad(W, (0, self.direct.a.shape[-1] - W.shape[-1]))


def _check_zeros(a: Tensor, g: Tensor, counted: Tensor) -> None:
    """Refuse a mask of another shape, and rows or vectors that are not zero outside of it.

    Raises:
        ValueError: Naming what is not zero, and where.
    """
    if counted.shape != a.shape[:2]:
        raise ValueError(
            f"counted has shape {tuple(counted.shape)}, but a has {tuple(a.shape[:2])} rows."
        )
    used = a.columns >= 0 if isinstance(a, OneHot) else (a != 0).any(-1)
    for what, reached in (("row of a", used), ("vector of g", (g != 0).any(-1).any(0))):
        if (reached & ~counted).any():
            n, s = (reached & ~counted).nonzero()[0].tolist()
            raise ValueError(
                f"The {what} at position {s} of sample {n} is not zero, but counted leaves the "
                "position out: write zeros there, or count it."
            )


def check_one_use(io: LayerIO) -> None:
    """Refuse a weight that is applied as `W` and as its transpose where rows are needed.

    Raises:
        NotImplementedError: With the ways out.
    """
    if isinstance(io, TiedIO):
        raise NotImplementedError(NO_ROWS)


def counted_mean(
    a: Float[Tensor, "N S d_in"], counted: Bool[Tensor, "N S"]
) -> tuple[Float[Tensor, "N 1 d_in"], Bool[Tensor, "N 1"]]:
    """The mean of every sample's counted rows, and which samples have any.

    Args:
        a: Rows that are zero where they are not counted.
        counted: Which are counted.
    """
    numbers = counted.sum(1, keepdim=True)
    return a.sum(1, keepdim=True) / numbers.clamp(min=1).unsqueeze(-1), numbers > 0


def check_not_reduced(io: LayerIO, approximation: str) -> None:
    """Refuse a reduced layer where an approximation needs the gradients of samples.

    The mean input times the sum of vectors is not the sum of their products over positions, so that
    a reduced layer with several positions has the factors of KFAC-reduce and nothing else.

    Raises:
        ValueError: Naming the approximation, the positions, and the way out.
    """
    if io.positions > 1:
        raise ValueError(
            f"{approximation} needs the gradient of every sample, but each row stands for "
            f"{io.positions} positions of it (flavour=REDUCE or io.reduced()): use flavour=EXPAND. "
            "With it, approximation=ekfac_reduce has KFAC-reduce's eigenvectors; in training, "
            "AmortisedEKFAC(factors=MovingAverage(kfac_reduce)) has."
        )


def concatenate(ios: Sequence[LayerIO], shares: Sequence[float]) -> LayerIO:
    """Join several batches of one layer along `N`, for a loss that is a weighted sum of theirs.

    Law: the block of the result is the sum of the batches' blocks, each times its share. To join
    all batches of a data loader, use `over_loader`, which knows the shares.

    Args:
        ios: The layer on every batch, with the same `S`. Batches with fewer vectors than others
            get zero vectors, which add nothing.
        shares: Weight of every batch's loss in the joint loss. For a loss with sum reduction they
            are 1. With mean reduction the share of a batch is its `losses.divisor` over the sum of
            all of them, and 1 would count every batch as if it were all data.

    Raises:
        ValueError: If there is not one share for every batch, or batches differ in `S`.
    """
    positions = sorted({io.a.shape[1] for io in ios})
    if len(positions) != 1 or len(shares) != len(ios):
        raise ValueError(
            f"Cannot join {len(ios)} batches with {len(shares)} shares and {positions} positions: "
            "every batch needs a share, and all the same number of positions."
        )
    V = max(len(io.g) for io in ios)
    g = [share**0.5 * io.g for io, share in zip(ios, shares, strict=True)]
    g = [torch.cat([x, x.new_zeros(V - len(x), *x.shape[1:])]) for x in g]
    counted = None
    if any(io.counted is not None for io in ios):
        counted = torch.cat([all_counted(io.a) if io.counted is None else io.counted for io in ios])
    S = max(io.positions for io in ios)
    return LayerIO(torch.cat([io.a for io in ios]), torch.cat(g, dim=1), S, counted)


def all_counted(a: Float[Tensor, "N S d_in"]) -> Bool[Tensor, "N S"]:
    """The mask of a layer whose rows are all part of the data."""
    return torch.ones(a.shape[:2], dtype=torch.bool, device=a.device)
