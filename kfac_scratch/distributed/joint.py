r"""Joint curvature: the matrices of the batch of all ranks.

Rank $r$ has a shard of the batch and a loss that divides by $D_r$. With $c_r = \sqrt{D_r / D}$ and
$D = \sum_r D_r$ (and $c_r = 1$ if the loss is a sum), the `LayerIO` of the whole batch is

$$
\bigl(a, g\bigr) = \operatorname{concatenate}_r \bigl(a_r, c_r\, g_r\bigr) .
$$

Everything here follows from this one line. Sums over samples can be added up rank by rank, which
sends `d * d` numbers for a factor. All other approximations get the joint `LayerIO` itself.

The functions here get `g` with its `c_r` in it.

Source: Osawa et al. 2019 (arXiv:1811.12019), §4, for factors that are added up over ranks.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.approximations.ekfac import (
    AmortisedEKFAC,
    ekfac,
    ekfac_reduce,
    second_moments,
)
from kfac_scratch.approximations.estimators import Estimator, Latest, MovingAverage
from kfac_scratch.approximations.kfac import kfac, kfac_reduce
from kfac_scratch.approximations.tkfac import PartialTraces, tkfac
from kfac_scratch.distributed.packing import from_triangle, upper_triangle
from kfac_scratch.distributed.ranks import Ranks
from kfac_scratch.layer_io import LayerIO, all_counted
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.one_hot import OneHot
from kfac_scratch.optimizer.progress import updated

IOs = Mapping[str, LayerIO]
JointRule = Callable[[Ranks, IOs], dict[str, Any]]
"""From the layers here to the matrices of all ranks' batch: one collective for all layers."""


def joint_kfac(ranks: Ranks, ios: IOs) -> dict[str, Kronecker | DiagonalKronecker]:
    """KFAC of every layer on the batch of all ranks.

    `B` is the sum of the ranks'. `A` is a mean over rows, of which the ranks have different
    numbers; these numbers are other weights than those in `g` if some targets are ignored.

    Law: equal to `kfac` of the joined batch.
    Cost: `t(d_in) + t(d_out) + 1` numbers for each layer, where `t(d) = d (d + 1) / 2`; for an
    embedding `d_in + t(d_out) + 1`.
    """
    local = _each(kfac, ios)
    tensors: list[Tensor] = []
    for name, K in local.items():
        rows = _rows(ios[name]).to(K.B)
        A = upper_triangle(K.A) if isinstance(K, Kronecker) else K.a
        tensors += [rows * A, upper_triangle(K.B), rows]
    sums = iter(ranks.summed("factors", tensors))
    joint: dict[str, Kronecker | DiagonalKronecker] = {}
    for name, K in local.items():
        A, B, rows = next(sums), next(sums), next(sums).clamp(min=1)
        B = from_triangle(B, len(K.B))
        if isinstance(K, Kronecker):
            joint[name] = Kronecker(from_triangle(A / rows, len(K.A)), B)
        else:
            joint[name] = DiagonalKronecker(A / rows, B)
    return joint


def joint_kfac_reduce(ranks: Ranks, ios: IOs) -> dict[str, Kronecker | DiagonalKronecker]:
    """KFAC-reduce of every layer on the batch of all ranks, as `joint_kfac`."""
    return joint_kfac(ranks, {name: io.reduced() for name, io in ios.items()})


def joint_tkfac(ranks: Ranks, ios: IOs) -> dict[str, PartialTraces]:
    """TKFAC of every layer on the batch of all ranks, whose partial traces are sums.

    Law: equal to `tkfac` of the joined batch.
    Cost: `t(d_in) + t(d_out)` numbers for each layer.
    """
    local = _each(tkfac, ios)
    tensors = [upper_triangle(X) for M in local.values() for X in (M.A, M.B)]
    sums = iter(ranks.summed("factors", tensors))
    return {
        name: PartialTraces(
            from_triangle(next(sums), len(M.A)), from_triangle(next(sums), len(M.B))
        )
        for name, M in local.items()
    }


def joint_ekfac(ranks: Ranks, ios: IOs) -> dict[str, KroneckerEigen]:
    """EKFAC of every layer on the batch of all ranks: joint factors, then joint second moments.

    Eigenvectors are computed on every rank, from the same factors. Averages of the ranks' own EKFAC
    would mix different eigenvectors.

    Law: equal to `ekfac` of the joined batch.
    Cost: that of `joint_kfac`, and `d_in * d_out` numbers for each layer.
    """
    return _with_moments(ranks, ios, joint_kfac(ranks, ios))


def joint_ekfac_reduce(ranks: Ranks, ios: IOs) -> dict[str, KroneckerEigen]:
    """EKFAC-reduce of every layer on the batch of all ranks, as `joint_ekfac`."""
    return _with_moments(ranks, ios, joint_kfac_reduce(ranks, ios))


def _with_moments(
    ranks: Ranks, ios: IOs, joint: Mapping[str, Kronecker | DiagonalKronecker]
) -> dict[str, KroneckerEigen]:
    bases = {name: K.eigen() for name, K in joint.items()}
    moments = [second_moments(ios[name], M.QA, M.QB) for name, M in bases.items()]
    sums = ranks.summed("moments", moments)
    return {
        name: KroneckerEigen(M.QA, M.QB, scale)
        for (name, M), scale in zip(bases.items(), sums, strict=True)
    }


def _each(approximation: Callable[[LayerIO], Any], ios: IOs) -> dict[str, Any]:
    """An approximation of every layer on the batch here; an error names the layer."""
    return updated(Latest(approximation), {}, ios, dict.fromkeys(ios, 1.0))


def _rows(io: LayerIO) -> Tensor:
    """The number of rows that are part of the data, which may be none here."""
    return torch.tensor(io.a.shape[0] * io.a.shape[1]) if io.counted is None else io.counted.sum()


JOINT_RULES: dict[Any, JointRule] = {
    kfac: joint_kfac,
    kfac_reduce: joint_kfac_reduce,
    tkfac: joint_tkfac,
    ekfac: joint_ekfac,
    ekfac_reduce: joint_ekfac_reduce,
}


@dataclass(frozen=True)
class Known:
    """An approximation that is known already: it is the same for every `LayerIO`."""

    M: Matrix

    def __call__(self, io: LayerIO) -> Matrix:
        """The matrix."""
        return self.M


def joint_update(
    ranks: Ranks,
    estimator: Estimator,
    states: Mapping[str, Matrix],
    ios: IOs,
    weights: Mapping[str, float],
) -> dict[str, Matrix]:
    """Every layer's matrix after the batch of all ranks.

    Law: equal to `estimator.update` with the `LayerIO` of the joined batch.
    Cost: see the functions of `JOINT_RULES`, which are used for the approximations that they are
    named after. For all others, that of `joined_layers`.

    Args:
        ranks: The ranks.
        estimator: The rule.
        states: Matrices so far, by name.
        ios: Every layer on the batch here, with `c_r` in its vectors.
        weights: The share of the new batch in each matrix.
    """
    if isinstance(estimator, AmortisedEKFAC):
        inside = estimator.factors
        if isinstance(inside, MovingAverage) and inside.approximation in (kfac, kfac_reduce):
            return _amortised(ranks, estimator, inside, states, ios, weights)
    if isinstance(estimator, MovingAverage | Latest) and estimator.approximation in JOINT_RULES:
        new = JOINT_RULES[estimator.approximation](ranks, ios)
        return {
            name: replace(estimator, approximation=Known(new[name])).update(
                states.get(name), io, weights[name]
            )
            for name, io in ios.items()
        }
    return updated(estimator, states, joined_layers(ranks, ios), weights)


def _amortised(
    ranks: Ranks,
    estimator: AmortisedEKFAC,
    factors: MovingAverage,
    states: Mapping[str, Any],
    ios: IOs,
    weights: Mapping[str, float],
) -> dict[str, Matrix]:
    """Amortised EKFAC: the moments of all ranks, in a basis that all ranks have.

    The new eigenvalues are `(1 - w) s + w m`, where `m` are the joint moments. A rank that takes
    its vectors times `sqrt(P)` has `(1 - w) s + w P m_r`, and the mean of these is the same.
    """
    new = JOINT_RULES[factors.approximation](ranks, ios)
    P = ranks.size
    local = {
        name: replace(estimator, factors=replace(factors, approximation=Known(new[name]))).update(
            states.get(name), replace(io, g=P**0.5 * io.g), weights[name]
        )
        for name, io in ios.items()
    }
    sums = ranks.summed("moments", [state.M.scale for state in local.values()])
    return {
        name: replace(state, M=replace(state.M, scale=scale / P))
        for (name, state), scale in zip(local.items(), sums, strict=True)
    }


def joined_layers(ranks: Ranks, ios: IOs) -> dict[str, LayerIO]:
    """Every layer on the batch of all ranks: the rows and vectors of the ranks one after another.

    Use it for approximations that are no sums over samples. Not where `JOINT_RULES` has a cheaper
    way.

    Cost: `N * S * (d_in + V * d_out)` numbers for each layer, where `N` is the number of samples of
    the rank that has most. Of the rows of an embedding, the words' numbers are sent.

    Raises:
        ValueError: If the ranks have other numbers of positions or vectors.
    """
    return {name: _joined(ranks, name, io) for name, io in ios.items()}


def _joined(ranks: Ranks, name: str, io: LayerIO) -> LayerIO:
    one_hot = isinstance(io.a, OneHot)
    a = io.a.columns.to(io.g.dtype).unsqueeze(-1) if isinstance(io.a, OneHot) else io.a
    (N, S), V = a.shape[:2], len(io.g)
    masked = io.counted is not None
    table = ranks.exchange(f"rows of {name}", [N, S, V, masked])
    if (table[:, 1:3] != table[0, 1:3]).any():
        raise ValueError(
            f"Layer {name!r} has different numbers of positions or vectors on the ranks: "
            f"{table[:, 1:3].long().tolist()}. Pad all shards to one length."
        )
    counts = [int(n) for n in table[:, 0]]
    parts = [a.flatten(1), io.g.movedim(0, 1).flatten(1)]
    if table[:, 3].any():
        mask = all_counted(io.a) if io.counted is None else io.counted
        parts.append(mask.to(a.dtype))
    rows = ranks.gathered("rows", torch.cat(parts, dim=1), counts)
    a_, g, *mask_ = rows.split([part.shape[1] for part in parts], dim=1)
    a_ = a_.reshape(-1, *a.shape[1:])
    return LayerIO(
        OneHot(a_.squeeze(-1).long(), io.a.shape[-1], io.a.dtype) if one_hot else a_,
        g.reshape(-1, *io.g.movedim(0, 1).shape[1:]).movedim(1, 0),
        io.positions,
        mask_[0] > 0 if mask_ else None,
    )
