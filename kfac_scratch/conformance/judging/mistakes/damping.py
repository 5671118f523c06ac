"""Mistakes in damped inverses: where the damping enters, and how it is split over factors."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import Data
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.mistakes.concerns import all_of, damping, has
from kfac_scratch.conformance.judging.mistakes.mistake import Mistake, step
from kfac_scratch.conformance.judging.ways import itself


def factored(
    piece: truth.Columns,
    data: Data,
    change: Callable[..., tuple[Any, Any]],
    means: Callable[[Tensor], Tensor] = itself,
) -> Tensor:
    """A factored inverse with other damping of `A` and of `B`, or pi of other means."""
    assert piece.case.damping is not None
    K, root = piece.factors(), piece.case.damping[1] ** 0.5
    mean_A, mean_B = (means(M.diagonal(dim1=1, dim2=2).mean(1)) for M in (K.A, K.B))
    of_A, of_B = change((mean_A / mean_B).sqrt()[:, None, None], root)
    eye_A, eye_B = (torch.eye(M.shape[-1]).to(M) for M in (K.A, K.B))
    M = truth.KroneckerFactors(K.A + of_A * eye_A, K.B + of_B * eye_B).dense()
    return inverted(M, piece.gradient(data))


def whole_damped(piece: truth.Columns, data: Data, factor: float = 1.0) -> Tensor:
    """An exact inverse with a multiple of the damping."""
    assert piece.case.damping is not None
    M = piece.matrix()
    M = M + factor * piece.case.damping[1] * torch.eye(M.shape[-1]).to(M)
    return inverted(M, piece.gradient(data))


def inverted(M: Tensor, W: Tensor) -> Tensor:
    """An inverse times a vector; not a number where there is none, on every machine alike."""
    try:
        return torch.linalg.solve(M, W)
    except RuntimeError:  # a rounding decides whether a pivot is exactly zero
        return torch.full_like(W, torch.nan)


def with_pi(pi: Tensor, root: float) -> tuple[Tensor, Tensor]:
    """What is added to the diagonals of `A` and of `B`, as it should be."""
    return root * pi, root / pi


def of_all(mean: Tensor) -> Tensor:
    """One mean for all groups."""
    return mean.mean().expand_as(mean)


def damped_twice(piece: truth.Columns, data: Data) -> Tensor:
    """Everything that is added to a diagonal, twice."""
    assert piece.case.damping is not None
    if piece.case.damping[0] == "exact":
        return whole_damped(piece, data, 2.0)
    return factored(piece, data, lambda pi, root: (2 * root * pi, 2 * root / pi))


def groups_exchanged(piece: truth.Columns, data: Data) -> Tensor:
    """Every group's gradient with the matrices of another group."""
    K, F = piece.K, piece.F
    rolled = K and truth.KroneckerFactors(K.A.roll(1, 0), K.B.roll(1, 0))
    return replace(piece, K=rolled, F=None if F is None else F.roll(1, 0)).right(data)


def balanced(key: str, words: str, change: Callable[..., tuple[Any, Any]]) -> Mistake:
    """A mistake about the damping of two factors, from pi and the root of the damping."""
    return step(key, words, damping("factored"), solved=partial(factored, change=change))


DAMPING = [
    balanced(
        "pi-squared", "as if pi² were taken for pi", lambda pi, root: (root * pi**2, root / pi**2)
    ),
    balanced(
        "pi-exchanged",
        "as if pi and 1/pi were exchanged",
        lambda pi, root: (root / pi, root * pi),
    ),
    balanced("no-pi", "as if pi were left out", lambda pi, root: (root, root)),
    balanced(
        "missing",
        "as if the damping were missing in one term (that of the vectors)",
        lambda pi, root: (root * pi, 1 / pi),
    ),
    balanced(
        "missing-for-inputs",
        "as if the damping were missing in one term (that of the inputs)",
        lambda pi, root: (pi, root / pi),
    ),
    balanced(
        "damping-for-root",
        "as if the damping were taken for its root",
        lambda pi, root: (root**2 * pi, root**2 / pi),
    ),
    balanced(
        "undamped-vectors",
        "as if one factor were not damped (that of the vectors)",
        lambda pi, root: (root * pi, 0),
    ),
    balanced(
        "undamped-inputs",
        "as if one factor were not damped (that of the inputs)",
        lambda pi, root: (0, root / pi),
    ),
    step(
        "one-pi",
        "as if all groups had one pi",
        all_of(damping("factored"), has("groups", 1)),
        solved=partial(factored, change=with_pi, means=of_all),
    ),
    step(
        "damped-as-a-whole",
        "as if the damping were added to the whole block",
        damping("factored"),
        solved=whole_damped,
    ),
    step(
        "damped-by-factors",
        "as if each factor were damped",
        damping("exact"),
        solved=partial(factored, change=with_pi),
    ),
    step(
        "damped-twice",
        "as if the damping were added twice",
        damping("exact", "factored"),
        solved=damped_twice,
    ),
    step(
        "undamped",
        "as if there were no damping",
        damping("exact", "factored"),
        solved=partial(whole_damped, factor=0.0),
    ),
    step(
        "groups-exchanged",
        "as if the gradient of a group had the matrices of another one",
        all_of(damping("exact", "factored"), has("groups", 1)),
        solved=groups_exchanged,
    ),
]
