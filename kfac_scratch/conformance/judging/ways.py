r"""Ways to compute KFAC: the definition, step by step, so that a mistake can replace a step.

Of every mini-batch, a way takes a layer's rows `a` and the vectors `g` that arrive at its result,
columns of a root of the loss's curvature among them; it makes factors of both, and averages over
mini-batches. `Way()` is right, and a test compares it with `truth`. Like there, nothing of the
package's own capture, losses or matrices is used.

Derivatives come from `truth`; what differs is that a root of the loss's curvature is chosen, since
some mistakes depend on it: every term of the loss has a column per class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad

from kfac_scratch.conformance.cases.case import DEFINITION, IGNORED, Case, Data
from kfac_scratch.conformance.cases.ops import Op, calls, layer_ops
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.pieces import LayerParts, PieceKey
from kfac_scratch.conformance.vocabulary import Flavour

Of = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Batch:
    """A layer on one mini-batch: its rows, what arrives there, and the number of loss terms."""

    a: Float[Tensor, "groups N rows d_in"]
    g: Float[Tensor, "V groups N S d_out"]
    terms: float
    counted: Bool[Tensor, "N rows"] | None = None
    calls: Sequence[int] = ()  # how many rows each call has

    @property
    def rows(self) -> float:
        """How many rows are counted."""
        if self.counted is None:
            return float(self.a.shape[1] * self.a.shape[2])
        return float(self.counted.sum())


# ---- the steps -----------------------------------------------------------------------------------


def itself(x: Any) -> Any:
    """What it is given."""
    return x


def result_of(case: Case, place: int) -> int:
    """Where vectors are collected: at the layer's own result."""
    return place


def input_of(case: Case, place: int) -> int:
    """Where inputs are collected: at the layer itself."""
    return place


def joined(rows: Sequence[Tensor]) -> Tensor:
    """Rows of all calls, one behind the other."""
    return torch.cat([*rows], 2)


def cut(op: Op, rows: Tensor) -> Tensor:
    """Rows as they are."""
    return rows


def class_probabilities(f: Tensor) -> Tensor:
    """Of every class; cross-entropy has them on axis 1."""
    return f.softmax(1)


def softmax_root(p: Tensor) -> Tensor:
    """A root of `diag(p) - p p^T`, its columns last."""
    return p.sqrt().diag_embed() - p.unsqueeze(-1) * p.sqrt().unsqueeze(-2)


def term_weights(case: Case, f: Tensor, y: Tensor) -> Tensor:
    """The factor of every term's curvature, `[N, T]`, or `[N, T, C]` for `bce`."""
    loss = case.loss
    if loss.kind == "cross-entropy":
        weight = f.new_tensor(loss.weight) if loss.weight else f.new_ones(f.shape[1])
        return (class_shares(case, f, y) @ weight).reshape(len(f), -1)
    weights = torch.ones_like(f)
    if loss.entry_weight:
        weights = weights * f.new_tensor(loss.entry_weight)
    if loss.weight:
        weights = weights * (1 + (f.new_tensor(loss.weight) - 1) * y)
    return classes_last(case, weights)


def class_shares(case: Case, f: Tensor, y: Tensor) -> Float[Tensor, "N ... C"]:
    """The share of every class in the target of a term of cross-entropy; none if it is ignored."""
    C, smoothing = f.shape[1], case.loss.label_smoothing
    if y.is_floating_point():
        shares = y.movedim(1, -1)
    else:
        kept = y != IGNORED
        shares = torch.nn.functional.one_hot(y.where(kept, 0), C).to(f) * kept.unsqueeze(-1)
    return (1 - smoothing) * shares + smoothing / C * shares.sum(-1, keepdim=True)


def apart(case: Case, S: Float[Tensor, "T K N T2 C"], f: Tensor) -> Float[Tensor, "V N T C"]:
    """A vector for every term and column of its root."""
    return S.flatten(0, 1)


def reduced(batch: Batch) -> Batch:
    """KFAC-reduce: the mean of the rows, the sum of the vectors."""
    a, counted = truth.row_means(batch.a, batch.counted)
    return replace(batch, a=a, g=batch.g.sum(3, keepdim=True), counted=counted)


def input_factor(a: Tensor) -> Tensor:
    """The mean of `a a^T`."""
    return torch.einsum("gnsi,gnsj->gij", a, a) / (a.shape[1] * a.shape[2])


def vector_factor(g: Tensor) -> Tensor:
    """The sum of `g g^T`."""
    return torch.einsum("vgnso,vgnsp->gop", g, g)


def squares(a: Tensor, g: Tensor) -> Tensor:
    """The sum of the outer products of all data's gradients."""
    G = torch.einsum("vgnso,gnsi->vgnoi", g, a).flatten(3)
    return torch.einsum("vgnd,vgne->gde", G, G)


def by_size(sizes: Sequence[float]) -> list[float]:
    """The shares of mini-batches in a mean over all: those of their sizes."""
    return [size / sum(sizes) for size in sizes]


def averaged(batches: Sequence["truth.KroneckerFactors"], A: Any, B: Any) -> Any:
    """The factors over all mini-batches, with a share of each."""
    return truth.KroneckerFactors(
        sum(share * K.A for share, K in zip(A, batches, strict=True)),
        sum(share * K.B for share, K in zip(B, batches, strict=True)),
    )


def right(piece: truth.Columns, data: Data) -> Tensor:
    """What a case asks for."""
    return piece.right(data)


# ---- the root of the loss's curvature ------------------------------------------------------------


def classes_last(case: Case, f: Tensor) -> Float[Tensor, "N T C"]:
    """What the loss sees, with one axis of positions and the classes behind it."""
    f = f.movedim(truth.class_axis(case), -1)
    return f.reshape(len(f), -1, f.shape[-1])


def as_output(case: Case, S: Float[Tensor, "V N T C"], f: Tensor) -> Tensor:
    """Vectors as the network's output has them: undo `classes_last`."""
    shape = f.movedim(truth.class_axis(case), -1).shape
    axis = truth.class_axis(case)
    return S.reshape(len(S), *shape).movedim(-1, axis + 1 if axis > 0 else axis)


# ---- what is computed once -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Network:
    """A case's network on some data, with derivatives that are kept: all ways need the same."""

    case: Case
    data: Data
    kept: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """What a function returned the first time."""
        if key not in self.kept:
            self.kept[key] = compute()
        return self.kept[key]

    def output(self) -> Tensor:
        """What the loss sees."""
        f: Tensor = self.once("output", partial(truth.output, self.case, self.data))
        return f

    def rows(self, place: int, op: Op) -> Float[Tensor, "groups N S d_in"]:
        """What the operation at a place multiplies if it is `op`."""
        record = self.once("record", partial(truth.recorded, self.case, self.data))
        rows: Tensor = self.once(
            (place, op), lambda: truth.rows_of(op, record[place][0], self.data)
        )
        return rows

    def slopes(self, op: Op, place: int) -> Float[Tensor, "F groups N S d_out"]:
        """The output's derivative by what the operation at a place returns."""
        J: Tensor = self.once(
            (op.name, place),
            lambda: truth.positions(op, *truth.slopes(self.case, self.data, [place])),
        )
        return J


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked for: a case, its data in mini-batches, a flavour, and how layers come."""

    case: Case
    data: Data
    flavour: Flavour
    parts: LayerParts | None
    networks: Sequence[Network]


def asked_about(
    case: Case, data: Data, flavour: Flavour, parts: LayerParts | None = None
) -> Question:
    """A question about a case."""
    split = [replace(data, X=X, y=y) for X, y in case.split(data)]
    return Question(case, data, flavour, parts, [Network(case, part) for part in split])


# ---- put together --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How KFAC is computed: every field is a step, and right by default.

    A weight has one product: what applies it both ways, or a differential operator, has no way.
    """

    op: Of = itself
    used: Of = itself
    used_inputs: Of = itself
    used_vectors: Of = itself
    input_of: Of = input_of
    joined: Of = joined
    result_of: Of = result_of
    cut: Of = cut
    probabilities: Of = class_probabilities
    softmax_root: Of = softmax_root
    term_weights: Of = term_weights
    columns: Of = apart
    seen: Of = itself
    reduced: Of = reduced
    input_factor: Of = input_factor
    vector_factor: Of = vector_factor
    squares: Of = squares
    input_shares: Of = by_size
    vector_shares: Of = by_size
    averaged: Of = averaged
    solved: Of = right
    mask: Of = Case.mask

    def pieces(self, asked: Question) -> dict[PieceKey, Tensor]:
        """The answer, computed this way.

        Raises:
            RuntimeError: If the steps do not fit together on this case.
        """
        case, flavour = asked.case, asked.flavour
        batches = [self.batch(case, network) for network in asked.networks]
        total = sum(batch[case.judged[0]].terms for batch in batches)
        D = 1.0 if case.loss.reduction == "mean" else 1 / total  # a sum is not divided
        K, F = {}, {}
        for name in case.judged:
            of_layer = [batch[name] for batch in batches]
            shares = self.vector_shares([batch.terms for batch in of_layer])
            if flavour == "ekfac":
                moments = [self.squares(batch.a, batch.g) / batch.terms for batch in of_layer]
                F[name] = sum(w * M for w, M in zip(shares, moments, strict=True)) / D
            kept = [self.reduced(batch) if flavour == "reduce" else batch for batch in of_layer]
            rows = self.input_shares([batch.rows for batch in kept])
            over_all = self.averaged([self.factors(batch) for batch in kept], rows, shares)
            K[name] = truth.KroneckerFactors(over_all.A, over_all.B / D)
        plain = replace(case, flavours={flavour: DEFINITION})
        found = truth.asked_columns(plain, flavour, asked.parts, F, K)
        return {key: self.solved(piece, asked.data) for key, piece in found.items()}

    def factors(self, batch: Batch) -> truth.KroneckerFactors:
        """Both factors of one mini-batch, of the mean of the loss's terms."""
        B, a = self.vector_factor(batch.g) / batch.terms, batch.a
        if batch.counted is None:
            return truth.KroneckerFactors(self.input_factor(a), B)
        A = self.input_factor(a * batch.counted.unsqueeze(-1))  # of which many rows are zero
        return truth.KroneckerFactors(A * (batch.counted.numel() / batch.rows), B)

    def batch(self, case: Case, network: Network) -> dict[str, Batch]:
        """Every judged layer on one mini-batch."""
        f, y = network.output(), network.data.y
        root = self.root(case, f, y).flatten(1)
        divisor, found = replace(case.loss, reduction="mean").divisor(f, y), {}
        for name in case.judged:
            op = layer_ops(case.ops)[name]
            places = self.used(calls(case.ops, name))
            rows = [
                network.rows(self.input_of(case, i), self.op(case.ops[i]))
                for i in self.used_inputs(places)
            ]
            a = self.joined([self.cut(op, of_call) for of_call in rows])
            J = torch.cat(
                [network.slopes(op, self.result_of(case, i)) for i in self.used_vectors(places)],
                3,
            )
            g = torch.einsum("vf,fgnso->vgnso", root, J)
            counted = truth.counted_rows(a, self.mask(case, y))
            numbers = [of_call.shape[2] for of_call in rows]
            found[name] = self.seen(Batch(a, g, divisor, counted, numbers))
        return found

    def root(self, case: Case, f: Tensor, y: Tensor) -> Float[Tensor, "V ..."]:
        """Vectors whose outer products sum to the curvature of the sum of the loss's terms."""
        if case.fisher == "empirical":
            loss = replace(case.loss, reduction="sum").module(f)
            return grad(lambda v: loss(v, y))(f).unsqueeze(0)
        rows = classes_last(case, f)
        weights = self.term_weights(case, f, y)
        match case.loss.kind:
            case "cross-entropy":
                p = classes_last(case, self.probabilities(f))
                roots = weights.sqrt()[..., None, None] * self.softmax_root(p)
            case "bce":
                roots = (weights * rows.sigmoid() * (-rows).sigmoid()).sqrt().diag_embed()
            case _:
                roots = (2 * weights).sqrt().diag_embed()  # [N, T, C, K]
        T = torch.eye(rows.shape[1]).to(f)
        S = torch.einsum("ntck,tu->ukntc", roots, T)
        return as_output(case, self.columns(case, S, f), f)
