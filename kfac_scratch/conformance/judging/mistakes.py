"""Well-known mistakes: what a case's answer becomes if one of them is made.

Each is a computation by `ways` with one step replaced, or the right answer in another layout. It is
tried only on a case that it concerns: `padding_mode` where a convolution has one, say. To add a
mistake, write the step and one line of `MISTAKES`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import EXACT, IGNORED, Case, Data
from kfac_scratch.conformance.cases.ops import Op, calls, layer_ops
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.layout import places
from kfac_scratch.conformance.judging.pieces import Pieces
from kfac_scratch.conformance.judging.ways import (
    Batch,
    Network,
    Question,
    Way,
    input_factor,
    term_weights,
    vector_factor,
)
from kfac_scratch.conformance.vocabulary import FLAVOURS, Fisher, Flavour

Holds = Callable[[Question], bool]


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        words: What follows "It looks": "as if ..." or "like ...".
        concerns: Whether a question has what it is about.
        answer: What is got with it. It may raise a RuntimeError where it makes no sense.
    """

    words: str
    concerns: Holds
    answer: Callable[[Question], Pieces]


def step(words: str, concerns: Holds, **steps: Callable[..., Any]) -> Mistake:
    """A way with other steps."""
    return Mistake(words, concerns, Way(**steps).pieces)


# ---- what a question has -------------------------------------------------------------------------


def layers(asked: Question) -> list[Op]:
    """The layers that are judged."""
    ops = layer_ops(asked.case.ops)
    return [ops[name] for name in asked.case.judged]


def has(key: str, usual: Any) -> Holds:
    """Whether a convolution has a setting other than the usual one."""
    return lambda asked: any(op.kind == "conv" and op[key] != usual for op in layers(asked))


def convolutions(asked: Question) -> bool:
    """Whether there is a convolution."""
    return any(op.kind == "conv" for op in layers(asked))


def padding_modes(asked: Question) -> bool:
    """Whether a convolution pads, and not with zeros."""
    return any(
        op.kind == "conv" and op["padding"] and op["padding_mode"] != "zeros"
        for op in layers(asked)
    )


def biases(asked: Question) -> bool:
    """Whether a layer has a bias."""
    return any(op["bias"] for op in layers(asked))


def has_positions(asked: Question) -> bool:
    """Whether a layer is applied at several positions."""
    network, ops = asked.networks[0], asked.case.ops
    return any(
        len(calls(ops, op.name)) > 1 or network.rows(calls(ops, op.name)[0], op).shape[2] > 1
        for op in layers(asked)
    )


def reuse(asked: Question) -> bool:
    """Whether a layer is called more than once."""
    return any(len(calls(asked.case.ops, op.name)) > 1 for op in layers(asked))


def writes_in_place(asked: Question) -> bool:
    """Whether an activation writes over the result of a layer that is judged."""
    ops = asked.case.ops
    return any(behind(asked.case, i) != i for op in layers(asked) for i in calls(ops, op.name))


def has_loss(*kinds: str) -> Holds:
    """Whether a Fisher that is no empirical one has a loss of some kinds."""
    return lambda asked: asked.case.fisher != "empirical" and asked.case.loss.kind in kinds


def root_is_chosen(asked: Question) -> bool:
    """Whether vectors are columns of a root of the loss's Hessian."""
    return asked.case.fisher == "type2"


def weights(asked: Question) -> bool:
    """Whether the loss has weights."""
    return bool(asked.case.loss.weight or asked.case.loss.entry_weight)


def has_ignored(asked: Question) -> bool:
    """Whether there are targets that the loss leaves out."""
    return has_loss("cross-entropy")(asked) and bool((asked.data.y == IGNORED).any())


def uneven_mean(asked: Question) -> bool:
    """Whether a mean loss divides by another number than that of its terms."""
    return asked.case.loss.reduction == "mean" and (weights(asked) or has_ignored(asked))


def output_positions(asked: Question) -> bool:
    """Whether the loss has several terms, or blocks of outputs, for a datum."""
    f = asked.networks[0].output()
    return f[0].numel() > f.shape[truth.class_axis(asked.case)]


def batches(asked: Question) -> bool:
    """Whether there are several mini-batches."""
    return len(asked.networks) > 1


def unequal(asked: Question) -> bool:
    """Whether mini-batches differ in size."""
    return len({len(network.data.X) for network in asked.networks}) > 1


def flavour(*wanted: Flavour) -> Holds:
    """Whether a flavour is asked for."""
    return lambda asked: asked.flavour in wanted


def damping(*forms: str) -> Holds:
    """Whether damped inverses of some form are asked for."""
    return lambda asked: asked.case.damping is not None and asked.case.damping[0] in forms


def all_of(*conditions: Holds) -> Holds:
    """Whether all hold."""
    return lambda asked: all(holds(asked) for holds in conditions)


def always(asked: Question) -> bool:
    """It concerns every case."""
    return True


# ---- other steps ---------------------------------------------------------------------------------


def with_setting(key: str, value: Any) -> Callable[[Op], Op]:
    """A convolution with another setting."""

    def changed(op: Op) -> Op:
        settings = tuple((k, value if k == key else old) for k, old in op.settings)
        return replace(op, settings=settings)

    return changed


def behind(case: Case, place: int) -> int:
    """The activation that writes over a result; the place itself if none does."""
    for i, op in enumerate(case.ops):
        if place in (op.inputs or (i - 1,)) and op.kind == "relu" and op["inplace"]:
            return i
    return place


def reshaped(op: Op, rows: Tensor) -> Tensor:
    """Patches `[d_in, S]` that are reshaped, not transposed."""
    if op.kind != "conv":
        return rows
    d = prod(op.shapes()[f"{op.name}.weight"][1:])
    x = rows[..., :d]
    return torch.cat([x.mT.reshape(x.shape), rows[..., d:]], -1)


def without_ones(op: Op, rows: Tensor) -> Tensor:
    """Zeros for the input of the bias."""
    return torch.cat([rows[..., :-1], 0 * rows[..., -1:]], -1) if op["bias"] else rows


def ones_summed(a: Tensor) -> Tensor:
    """An input factor whose entry for the bias is a sum over positions."""
    A = input_factor(a)
    if bool((a[..., -1] == 1).all()):
        A[:, -1, -1] *= a.shape[2]
    return A


def of_mean_inputs(a: Tensor) -> Tensor:
    """The input factor of KFAC-reduce."""
    return input_factor(a.mean(2, keepdim=True))


def of_summed_vectors(g: Tensor) -> Tensor:
    """The vector factor of KFAC-reduce."""
    return vector_factor(g.sum(3, keepdim=True))


def centred(a: Tensor) -> Tensor:
    """A covariance."""
    return input_factor(a - a.mean((1, 2), keepdim=True))


def each_by_last(places: Sequence[int]) -> list[int]:
    """The last call's inputs at every call."""
    return [places[-1]] * len(places)


def data_joined(g: Tensor) -> Tensor:
    """The square of a sum over data."""
    return vector_factor(g.sum(2, keepdim=True))


def gradients_joined(a: Tensor, g: Tensor) -> Tensor:
    """The square of the sum of all data's gradients."""
    G = torch.einsum("vgnso,gnsi->vgoi", g, a).flatten(2)
    return torch.einsum("vgd,vge->gde", G, G)


def squares_of_positions(a: Tensor, g: Tensor) -> Tensor:
    """A square for every position, where there should be one for every datum."""
    G = torch.einsum("vgnso,gnsi->vgnsoi", g, a).flatten(4)
    return torch.einsum("vgnsd,vgnse->gde", G, G)


def unweighted(case: Case, f: Tensor, y: Tensor) -> Tensor:
    """The weights of terms without those of the loss."""
    return term_weights(replace(case, loss=replace(case.loss, weight=(), entry_weight=())), f, y)


def not_ignored(case: Case, f: Tensor, y: Tensor) -> Tensor:
    """The weights of terms if none is left out."""
    return term_weights(case, f, y.clamp_min(0))


def together(S: Tensor) -> Tensor:
    """One vector for all positions."""
    return S.sum(0)


def by_data(batch: Batch) -> Batch:
    """The number of data for that of the loss's terms."""
    return replace(batch, terms=float(batch.a.shape[1]))


def of_mean_loss(batch: Batch) -> Batch:
    """Gradients that are divided by the number of terms before they are squared."""
    return replace(batch, g=batch.g / batch.terms)


def groups_rolled(batch: Batch) -> Batch:
    """Every group with the channels of the next."""
    return replace(batch, a=batch.a.roll(1, 0))


def of_all_groups(factor: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The mean of all groups' factors for each."""
    return lambda x: factor(x).mean(0, keepdim=True).expand(factor(x).shape)


def equally(sizes: Sequence[float]) -> list[float]:
    """One share for all mini-batches."""
    return [1 / len(sizes)] * len(sizes)


def on_the_wrong_side(sizes: Sequence[float]) -> list[float]:
    """A running mean that gives the old the share of the new."""
    shares = [1.0]
    for i in range(1, len(sizes)):
        new = sizes[i] / sum(sizes[: i + 1])
        shares = [new * share for share in shares] + [1 - new]
    return shares


def only(place: int) -> Callable[[Sequence[float]], list[float]]:
    """One mini-batch alone."""

    def shares(sizes: Sequence[float]) -> list[float]:
        return [float(i == place % len(sizes)) for i in range(len(sizes))]

    return shares


def bases_averaged(of_batches: Sequence[truth.KroneckerFactors], A: Any, B: Any) -> Any:
    """The mean of eigenvectors, in the place of factors."""
    bases = [[torch.linalg.eigh(M)[1] for M in (K.A, K.B)] for K in of_batches]
    A_basis, B_basis = (torch.stack(of_factor).mean(0) for of_factor in zip(*bases, strict=True))
    return truth.KroneckerFactors(A_basis, B_basis)


def in_given_basis(piece: truth.Columns, data: Data) -> Tensor:
    """EKFAC in a basis that is taken as it is."""
    U, F = piece.factors().dense(), piece.exact()
    return U * torch.einsum("gde,gdf,gfe->ge", U, F, U).unsqueeze(-2) @ U.mT


def uniformly(p: Tensor) -> Tensor:
    """A root of the curvature if all labels are drawn alike."""
    C = p.shape[-1]
    return (p.unsqueeze(-1) - torch.eye(C).to(p)) / C**0.5


# ---- damped inverses -----------------------------------------------------------------------------


def factored(piece: truth.Columns, data: Data, change: Callable[..., tuple[Any, Any]]) -> Tensor:
    """A factored inverse with other damping of `A` and of `B`."""
    assert piece.case.damping is not None
    K, root = piece.factors(), piece.case.damping[1] ** 0.5
    mean_A, mean_B = (M.diagonal(dim1=1, dim2=2).mean(1) for M in (K.A, K.B))
    of_A, of_B = change((mean_A / mean_B).sqrt()[:, None, None], root)
    eye_A, eye_B = (torch.eye(M.shape[-1]).to(M) for M in (K.A, K.B))
    M = truth.KroneckerFactors(K.A + of_A * eye_A, K.B + of_B * eye_B).dense()
    return torch.linalg.solve(M, piece.gradient(data))


def whole_damped(piece: truth.Columns, data: Data, factor: float = 1.0) -> Tensor:
    """An exact inverse with a multiple of the damping."""
    assert piece.case.damping is not None
    M = piece.matrix()
    M = M + factor * piece.case.damping[1] * torch.eye(M.shape[-1]).to(M)
    return torch.linalg.solve(M, piece.gradient(data))


def balanced(words: str, change: Callable[..., tuple[Any, Any]]) -> Mistake:
    """A mistake about the damping of two factors, from pi and the root of the damping."""
    return step(words, damping("factored"), solved=partial(factored, change=change))


DAMPING = [
    balanced("as if pi² were taken for pi", lambda pi, root: (root * pi**2, root / pi**2)),
    balanced("as if pi and 1/pi were exchanged", lambda pi, root: (root / pi, root * pi)),
    balanced("as if pi were left out", lambda pi, root: (root, root)),
    balanced("as if the damping were missing in one term", lambda pi, root: (root * pi, 1 / pi)),
    balanced("as if the damping were missing in one term", lambda pi, root: (pi, root / pi)),
    balanced(
        "as if the damping were taken for its root", lambda pi, root: (root**2 * pi, root**2 / pi)
    ),
    balanced("as if one factor were not damped", lambda pi, root: (root * pi, 0)),
    balanced("as if one factor were not damped", lambda pi, root: (0, root / pi)),
    step(
        "as if the damping were added to the whole block", damping("factored"), solved=whole_damped
    ),
    step(
        "as if each factor were damped",
        damping("exact"),
        solved=partial(factored, change=lambda pi, root: (root * pi, root / pi)),
    ),
    step(
        "as if the damping were added twice",
        damping("exact"),
        solved=partial(whole_damped, factor=2.0),
    ),
    step(
        "as if there were no damping",
        damping("exact", "factored"),
        solved=partial(whole_damped, factor=0.0),
    ),
]


# ---- other questions -----------------------------------------------------------------------------


def of_flavour(asked: Question, other: Flavour) -> Pieces:
    """The definition of another flavour."""
    return Way().pieces(replace(asked, flavour=other))


def exact_block(asked: Question) -> Pieces:
    """What KFAC approximates."""
    case = replace(asked.case, flavours={asked.flavour: EXACT})
    return truth.expected(case, asked.data, asked.flavour, asked.parts)


def of_fisher(asked: Question, fisher: Fisher) -> Pieces:
    """Another Fisher."""
    return Way().pieces(replace(asked, case=replace(asked.case, fisher=fisher)))


def without_weights(asked: Question) -> Pieces:
    """The loss without its weights, also in its divisor."""
    case = replace(asked.case, loss=replace(asked.case.loss, weight=()))
    return Way().pieces(replace(asked, case=case))


def of_data(asked: Question, keep: slice) -> Pieces:
    """Some data alone."""
    part = replace(asked.data, X=asked.data.X[keep], y=asked.data.y[keep])
    return Way().pieces(replace(asked, networks=[Network(asked.case, part)]))


def of_batch(asked: Question, place: int) -> Pieces:
    """One mini-batch alone."""
    return Way().pieces(replace(asked, networks=[asked.networks[place]]))


def other_fisher(fisher: Fisher) -> Holds:
    """Whether another Fisher is asked for."""
    return lambda asked: asked.case.fisher not in (fisher, "mc")


QUESTIONS = [
    *(
        Mistake(f"like the definition of KFAC-{other}", always, partial(of_flavour, other=other))
        for other in FLAVOURS[:2]
    ),
    Mistake("like the exact block", always, exact_block),
    *(
        Mistake(
            f"like the {fisher} Fisher", other_fisher(fisher), partial(of_fisher, fisher=fisher)
        )
        for fisher in ("empirical", "type2")
    ),
    Mistake("like the same without the loss's weights", weights, without_weights),
    Mistake("like the first datum alone", always, partial(of_data, keep=slice(None, 1))),
    Mistake("like the last datum alone", always, partial(of_data, keep=slice(-1, None))),
    Mistake("like the first mini-batch alone", batches, partial(of_batch, place=0)),
    Mistake("like the last mini-batch alone", batches, partial(of_batch, place=-1)),
]

# ---- all of them ---------------------------------------------------------------------------------

EXPAND_OR_REDUCE = flavour("expand", "reduce")
SOFTMAX, TYPE2 = has_loss("cross-entropy"), has_loss("mse", "cross-entropy", "bce")

STEPS = [
    step(
        "as if padding_mode were ignored",
        padding_modes,
        op=with_setting("padding_mode", "zeros"),
    ),
    step("as if dilation were ignored", has("dilation", 1), op=with_setting("dilation", 1)),
    step("as if stride were ignored", has("stride", 1), op=with_setting("stride", 1)),
    step("as if padding were ignored", has("padding", 0), op=with_setting("padding", 0)),
    step(
        "as if the groups of a convolution had the channels of each other",
        has("groups", 1),
        seen=groups_rolled,
    ),
    step(
        "as if the groups of a convolution had one pair of factors",
        has("groups", 1),
        input_factor=of_all_groups(input_factor),
        vector_factor=of_all_groups(vector_factor),
    ),
    step("as if patches were reshaped where they are transposed", convolutions, cut=reshaped),
    step("as if the input of the bias were 0", biases, cut=without_ones),
    step(
        "as if the 1 of the bias were summed over positions",
        all_of(biases, has_positions),
        input_factor=ones_summed,
    ),
    step("as if the mean were subtracted from the inputs", always, input_factor=centred),
    step(
        "as if an activation had written over what was recorded",
        writes_in_place,
        result_of=behind,
    ),
    step("like a layer's last call alone", reuse, used=lambda places: places[-1:]),
    step("like a layer's first call alone", reuse, used=lambda places: places[:1]),
    step("as if every call had the inputs of the last", reuse, used_inputs=each_by_last),
    step(
        "as if the softmax were over the batch",
        SOFTMAX,
        probabilities=lambda f: f.softmax(0),
    ),
    step(
        "as if the softmax were over the last axis",
        all_of(SOFTMAX, lambda asked: asked.networks[0].output().ndim > 2),
        probabilities=lambda f: f.softmax(-1),
    ),
    step(
        "as if all data had the prediction of the first",
        SOFTMAX,
        probabilities=lambda f: f[:1].softmax(1).expand_as(f),
    ),
    step(
        "as if the softmax's Hessian were diag(p)",
        SOFTMAX,
        softmax_root=lambda p: p.sqrt().diag_embed(),
    ),
    step(
        "as if the softmax's Hessian were diagonal",
        SOFTMAX,
        softmax_root=lambda p: (p * (1 - p)).sqrt().diag_embed(),
    ),
    step(
        "as if labels were drawn uniformly",
        all_of(SOFTMAX, lambda asked: asked.case.fisher == "mc"),
        softmax_root=uniformly,
    ),
    step(
        "as if the mean loss divided by the number of data",
        uneven_mean,
        seen=by_data,
    ),
    step(
        "as if gradients were those of each mini-batch's mean loss",
        all_of(batches, lambda asked: asked.case.fisher == "empirical"),
        seen=of_mean_loss,
    ),
    step(
        "like the same without the loss's weights",
        all_of(weights, TYPE2),
        term_weights=unweighted,
    ),
    step(
        "as if the padding were counted",
        lambda asked: asked.case.masked,
        mask=lambda case, y: None,
    ),
    step(
        "as if ignored targets had curvature",
        has_ignored,
        term_weights=not_ignored,
    ),
    step(
        "as if one vector were sent back for all positions",
        all_of(root_is_chosen, output_positions),
        columns=together,
    ),
    step(
        "as if different data were summed before the square",
        lambda asked: asked.case.fisher != "mc",  # whose labels are independent
        vector_factor=data_joined,
        squares=gradients_joined,
    ),
    step(
        "as if different data were summed before the square",
        flavour("ekfac"),  # in its eigenvectors alone
        vector_factor=data_joined,
    ),
    step(
        "as if inputs were averaged over positions before the product, as in KFAC-reduce",
        all_of(has_positions, flavour("expand")),
        input_factor=of_mean_inputs,
    ),
    step(
        "as if vectors were summed over positions before the product, as in KFAC-reduce",
        all_of(has_positions, flavour("expand")),
        vector_factor=of_summed_vectors,
    ),
    step(
        "as if EKFAC had the eigenvectors of KFAC-reduce",
        all_of(has_positions, flavour("ekfac")),
        input_factor=of_mean_inputs,
        vector_factor=of_summed_vectors,
    ),
    step(
        "as if every position of a datum were squared by itself",
        all_of(has_positions, flavour("ekfac")),
        squares=squares_of_positions,
    ),
    step(
        "as if all mini-batches had one size",
        unequal,
        input_shares=equally,
        vector_shares=equally,
    ),
    step(
        "as if all mini-batches had one size, for the inputs alone", unequal, input_shares=equally
    ),
    step(
        "as if all mini-batches had one size, for the vectors alone", unequal, vector_shares=equally
    ),
    step(
        "as if the shares of the old and the new in a running mean were exchanged",
        unequal,
        input_shares=on_the_wrong_side,
        vector_shares=on_the_wrong_side,
    ),
    step("as if the inputs were those of the first mini-batch", batches, input_shares=only(0)),
    step("as if the inputs were those of the last mini-batch", batches, input_shares=only(-1)),
    step(
        "as if eigenvectors were averaged",
        all_of(batches, flavour("ekfac"), lambda asked: asked.case.loss.reduction == "mean"),
        averaged=bases_averaged,
        solved=in_given_basis,
    ),
]

MISTAKES: list[Mistake] = [*QUESTIONS, *STEPS, *DAMPING]


# ---- the right answer in another layout ----------------------------------------------------------


def layouts(asked: Question, right: Pieces) -> Iterator[tuple[str, Pieces]]:
    """The right answer, numbered otherwise, with the mistake in words."""
    ops = {op.name: op for op in layers(asked)}
    for words, bias_at, axes in _numberings(asked):
        for inverse in (False, True):
            yield (
                words,
                {
                    (name, part): _renumbered(M, ops[name], part, bias_at, axes, inverse)
                    for (name, part), M in right.items()
                },
            )


def _numberings(asked: Question) -> Iterator[tuple[str, str, Mapping[str, str]]]:
    """Places of the bias and orders of the axes, other than those that are right."""
    places_of_bias, orders = ["last"], ["", "o s i", "s i o", "i s o", "i o s"]
    if biases(asked):  # which stands among the inputs only if the outputs are first or last
        places_of_bias, orders = ["last", "first", "behind"], orders[:-1]
    for bias_at in places_of_bias:
        for order in orders:
            axes = {op.name: _axes(op, order) for op in layers(asked)}
            said = [f"axes were numbered {text!r}" for text in dict.fromkeys(axes.values()) if text]
            if bias_at != "last":
                said.append(f"the bias stood {bias_at}")
            if said:
                yield "as if " + " and ".join(said), bias_at, axes


def _axes(op: Op, order: str) -> str:
    """An order of channels and space for one layer; a linear layer has no space."""
    space = "dhw"[3 - len(op["kernel"]) :] if op.kind == "conv" else ""
    letters = " ".join(order.replace("s", space).replace(" ", ""))
    return "" if letters == "o i" else letters


def _renumbered(
    M: Tensor, op: Op, part: Any, bias_at: str, axes: Mapping[str, str], inverse: bool
) -> Tensor:
    """A piece whose entries stand elsewhere."""
    numbering = places(op, part, bias_at, axes[op.name]).flatten()
    if len(numbering) != M.shape[1]:  # a case that judges a part of the entries
        return M
    index = numbering.argsort() if inverse else numbering
    return M[:, index][:, :, index] if M.ndim == 3 else M[:, index]
