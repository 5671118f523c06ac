"""Well-known mistakes: what a case's answer becomes if one of them is made.

Each is a computation by `ways` with one step replaced, another question, or the right answer in
another layout. It is tried only on a case that it concerns: `padding_mode` where a convolution has
one, say. To add a mistake, write the step and one line of `MISTAKES`, and export the vectors, which
list it. Its key is published, as the flag of cases that catch it (see `flags`): it never changes
its meaning.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT, IGNORED, Case, Data
from kfac_scratch.conformance.cases.ops import NORMS, Op, calls, layer_ops, tied_uses
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.layout import places
from kfac_scratch.conformance.judging.pieces import PieceKey, Pieces
from kfac_scratch.conformance.judging.ways import (
    Batch,
    Network,
    Question,
    Way,
    averaged,
    classes_last,
    input_factor,
    itself,
    reduced,
    term_weights,
    vector_factor,
)
from kfac_scratch.conformance.vocabulary import FLAVOURS, Fisher, Flavour

Holds = Callable[[Question], bool]


@dataclass(frozen=True)
class Mistake:
    """One mistake.

    Attributes:
        key: Its name, and that of the flag of cases that catch it.
        words: What follows "It looks": "as if ..." or "like ...".
        concerns: Whether a question has what it is about.
        answer: What is got with it. It may raise a RuntimeError where it makes no sense.
    """

    key: str
    words: str
    concerns: Holds
    answer: Callable[[Question], Pieces]


def step(key: str, words: str, concerns: Holds, **steps: Callable[..., Any]) -> Mistake:
    """A way with other steps."""
    return Mistake(key, words, all_of(has_way, concerns), Way(**steps).pieces)


# ---- what a question has -------------------------------------------------------------------------


def layers(asked: Question) -> list[Op]:
    """The layers that are judged."""
    ops = layer_ops(asked.case.ops)
    return [ops[name] for name in asked.case.judged]


def has_way(asked: Question) -> bool:
    """Whether every weight has one product; see `Way`."""
    return not asked.case.operator and not tied(asked)


def tied(asked: Question) -> bool:
    """Whether a weight is applied both ways."""
    return bool(tied_uses(asked.case.ops))


def defined(asked: Question) -> bool:
    """Whether the definition is by autodiff, which it is not for a differential operator."""
    return not asked.case.operator


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


def uneven_calls(asked: Question) -> bool:
    """Whether the calls of a layer have different numbers of positions."""
    network, ops = asked.networks[0], asked.case.ops
    return any(
        len({network.rows(i, op).shape[2] for i in calls(ops, op.name)}) > 1 for op in layers(asked)
    )


def longer_calls(asked: Question) -> bool:
    """Whether a call of a layer has several positions."""
    network, ops = asked.networks[0], asked.case.ops
    return any(
        network.rows(i, op).shape[2] > 1 for op in layers(asked) for i in calls(ops, op.name)
    )


def elsewhere(place_of: Callable[[Case, int], int]) -> Holds:
    """Whether some function of a place is another place than that of a layer that is judged."""

    def holds(asked: Question) -> bool:
        ops = asked.case.ops
        places = [i for op in layers(asked) for i in calls(ops, op.name)]
        return any(place_of(asked.case, i) != i for i in places)

    return holds


def norms(*kinds: str) -> Holds:
    """Whether there are norms of some kinds."""
    return lambda asked: any(op.kind in kinds for op in asked.case.ops)


def like_layers(asked: Question) -> bool:
    """Whether two layers have matrices of one shape."""
    shapes = [(op.groups, *op.matrix_shape()) for op in layers(asked)]
    return len({*shapes}) < len(shapes)


def has_loss(*kinds: str) -> Holds:
    """Whether a Fisher that is no empirical one has a loss of some kinds."""
    return lambda asked: asked.case.fisher != "empirical" and asked.case.loss.kind in kinds


def root_is_chosen(asked: Question) -> bool:
    """Whether vectors are columns of a root of the loss's Hessian."""
    return asked.case.fisher == "type2"


def weights(asked: Question) -> bool:
    """Whether the loss has weights."""
    return bool(asked.case.loss.weight or asked.case.loss.entry_weight)


def has_setting(name: str) -> Holds:
    """Whether the loss has some setting."""
    return lambda asked: bool(getattr(asked.case.loss, name))


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


def images(asked: Question) -> bool:
    """Whether the output is an image, channels first."""
    f = asked.networks[0].output()
    return f.ndim == 4 and truth.class_axis(asked.case) == 1


def unweighted_terms(asked: Question) -> bool:
    """Whether all terms of the loss have the same weight."""
    return not weights(asked) and not has_ignored(asked)


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


def before_norm(case: Case, place: int) -> int:
    """The norm that gives an operation its inputs; the place itself if none does."""
    (source,) = case.ops[place].inputs[:1] or (place - 1,)
    return source if source >= 0 and case.ops[source].kind in NORMS else place


def behind_norm(case: Case, place: int) -> int:
    """The norm that takes a result; the place itself if none does."""
    for i, op in enumerate(case.ops):
        if place in (op.inputs or (i - 1,)) and op.kind in NORMS:
            return i
    return place


def calls_alike(rows: Sequence[Tensor]) -> Tensor:
    """Rows of all calls, with one share of the mean for each call."""
    total = sum(of_call.shape[2] for of_call in rows)
    shares = [(total / (len(rows) * of_call.shape[2])) ** 0.5 for of_call in rows]
    return torch.cat([share * of_call for share, of_call in zip(shares, rows, strict=True)], 2)


def calls_alike_reduced(batch: Batch) -> Batch:
    """KFAC-reduce of the mean of the calls' means; `calls_alike` has taken half of the way."""
    total, calls = sum(batch.calls), len(batch.calls)
    shares = [(total / (calls * S)) ** 0.5 for S in batch.calls for _ in range(S)]
    return reduced(replace(batch, a=batch.a * batch.a.new_tensor(shares).unsqueeze(-1)))


def calls_reduced(batch: Batch) -> Batch:
    """KFAC-reduce of every call by itself."""
    a, g = (x.split([*batch.calls], axis) for x, axis in ((batch.a, 2), (batch.g, 3)))
    means = torch.cat([of_call.mean(2, keepdim=True) for of_call in a], 2)
    sums = torch.cat([of_call.sum(3, keepdim=True) for of_call in g], 3)
    return replace(batch, a=means, g=sums, counted=None)


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


def diagonal(factor: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The diagonal of a factor, and zeros beside it."""
    return lambda x: factor(x).diagonal(dim1=1, dim2=2).diag_embed()


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


def of_last_inputs(a: Tensor, g: Tensor) -> Tensor:
    """Squares of calls at one position, each with the inputs of the last one."""
    return squares_of_positions(a[:, :, -1:].expand(a.shape), g)


def unweighted(case: Case, f: Tensor, y: Tensor) -> Tensor:
    """The weights of terms without those of the loss."""
    return term_weights(replace(case, loss=replace(case.loss, weight=(), entry_weight=())), f, y)


def not_ignored(case: Case, f: Tensor, y: Tensor) -> Tensor:
    """The weights of terms if none is left out."""
    return term_weights(case, f, y.clamp_min(0))


def together(case: Case, S: Tensor, f: Tensor) -> Tensor:
    """One vector for all positions."""
    return S.sum(0)


def by_last_axis(case: Case, S: Tensor, f: Tensor) -> Tensor:
    """Of an image, one vector for each column of pixels: for all channels and rows."""
    width = f.shape[-1]
    total = S.sum((0, 1))  # [N, height width, C]
    pixels = torch.eye(width).to(f).repeat(1, total.shape[1] // width)
    return torch.stack([total * of_column.unsqueeze(-1) for of_column in pixels])


def all_positions_subtracted(case: Case, S: Tensor, f: Tensor) -> Tensor:
    """The root of a softmax's Hessian, every column with the probabilities of all positions."""
    p = classes_last(case, f).softmax(-1)
    own = torch.einsum("tu,kc->tkuc", *(torch.eye(n).to(f) for n in p.shape[1:]))
    columns = own.unsqueeze(2) - p  # [T, K, N, T2, C]
    return (p.sqrt().permute(1, 2, 0)[..., None, None] * columns).flatten(0, 1)


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


def squared(sizes: Sequence[float]) -> list[float]:
    """The squares of the shares."""
    return [(size / sum(sizes)) ** 2 for size in sizes]


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


def bases_turned(of_batches: Sequence[truth.KroneckerFactors], A: Any, B: Any) -> Any:
    """The transposes of eigenvectors, in the place of factors."""
    K = averaged(of_batches, A, B)
    return truth.KroneckerFactors(*(torch.linalg.eigh(M)[1].mT for M in (K.A, K.B)))


def in_given_basis(piece: truth.Columns, data: Data) -> Tensor:
    """EKFAC in a basis that is taken as it is."""
    U, F = piece.factors().dense(), piece.exact()
    return U * torch.einsum("gde,gdf,gfe->ge", U, F, U).unsqueeze(-2) @ U.mT


def uniformly(p: Tensor) -> Tensor:
    """A root of the curvature if all labels are drawn alike."""
    C = p.shape[-1]
    return (p.unsqueeze(-1) - torch.eye(C).to(p)) / C**0.5


# ---- damped inverses -----------------------------------------------------------------------------


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


# ---- other questions -----------------------------------------------------------------------------


def right_for(asked: Question) -> Pieces:
    """What is right for another question, by a way where there is one: it keeps derivatives."""
    if has_way(asked):
        return Way().pieces(asked)
    data = asked.networks[0].data if len(asked.networks) == 1 else asked.data
    return truth.expected(asked.case, data, asked.flavour, asked.parts)


def of_flavour(asked: Question, other: Flavour) -> Pieces:
    """The definition of another flavour."""
    case = replace(asked.case, flavours={other: DEFINITION})
    return right_for(replace(asked, flavour=other, case=case))


def exact_block(asked: Question) -> Pieces:
    """What KFAC approximates."""
    case = replace(asked.case, flavours={asked.flavour: EXACT})
    return truth.expected(case, asked.data, asked.flavour, asked.parts)


def of_fisher(asked: Question, fisher: Fisher) -> Pieces:
    """Another Fisher."""
    return right_for(replace(asked, case=replace(asked.case, fisher=fisher)))


def with_loss(asked: Question, **settings: Any) -> Pieces:
    """The loss with other settings, also in its divisor."""
    loss = replace(asked.case.loss, **settings)
    return right_for(replace(asked, case=replace(asked.case, loss=loss)))


def of_data(asked: Question, keep: slice) -> Pieces:
    """Some data alone."""
    data, c = asked.data, asked.data.coefficients
    part = replace(
        data, X=data.X[keep], y=data.y[keep], coefficients=None if c is None else c[keep]
    )
    return right_for(replace(asked, networks=[Network(asked.case, part)]))


def of_batch(asked: Question, place: int) -> Pieces:
    """One mini-batch alone."""
    return right_for(replace(asked, networks=[asked.networks[place]]))


def without_scales(asked: Question) -> Pieces:
    """Norms whose scales are 1."""
    return right_for(replace(asked, networks=[_unscaled(network) for network in asked.networks]))


def _unscaled(network: Network) -> Network:
    norm_weights = {f"{op.name}.weight" for op in network.case.ops if op.kind in NORMS}
    parameters = {
        name: torch.ones_like(p) if name in norm_weights else p
        for name, p in network.data.parameters.items()
    }
    return Network(network.case, replace(network.data, parameters=parameters))


def of_other_layer(asked: Question) -> Pieces:
    """Every layer's answer for the next one whose matrix has the same shape."""
    found: dict[PieceKey, Tensor] = {}
    right = right_for(asked)
    for op in layers(asked):
        shape = op.groups, op.matrix_shape()
        alike = [
            other.name for other in layers(asked) if (other.groups, other.matrix_shape()) == shape
        ]
        following = alike[(alike.index(op.name) + 1) % len(alike)]
        found |= {(op.name, part): M for (name, part), M in right.items() if name == following}
    if found.keys() != right.keys():
        raise ValueError("Layers of one shape come in different parts.")
    return found


def use_alone(asked: Question, kept: Callable[[Any], Any]) -> Pieces:
    """One of both uses of a weight that is applied both ways, by what is kept of its factors."""
    case, flavour = asked.case, asked.flavour
    K = truth.factors(case, asked.data, flavour)
    K |= {name: kept(K[name]) for name in tied_uses(case.ops)}
    F = truth.exact(case, asked.data)
    found = truth.asked_columns(case, flavour, asked.parts, F, K)
    return {key: piece.right(asked.data) for key, piece in found.items()}


def other_fisher(fisher: Fisher) -> Holds:
    """Whether another Fisher is asked for."""
    return lambda asked: asked.case.fisher not in (fisher, "mc")


QUESTIONS = [
    *(
        Mistake(
            other,
            f"like the definition of KFAC-{other}",
            defined,
            partial(of_flavour, other=other),
        )
        for other in FLAVOURS[:2]
    ),
    Mistake("exact", "like the exact block", always, exact_block),
    *(
        Mistake(
            fisher,
            f"like the {fisher} Fisher",
            other_fisher(fisher),
            partial(of_fisher, fisher=fisher),
        )
        for fisher in ("empirical", "type2")
    ),
    Mistake(
        "weights",
        "like the same without the loss's weights",
        has_setting("weight"),
        partial(with_loss, weight=()),
    ),
    Mistake(
        "entry-weights",
        "like the same without the weights of the loss's entries",
        has_setting("entry_weight"),
        partial(with_loss, entry_weight=()),
    ),
    Mistake(
        "label-smoothing",
        "like the same without label smoothing",
        has_setting("label_smoothing"),
        partial(with_loss, label_smoothing=0.0),
    ),
    Mistake(
        "norm-scales", "like the same with norms whose scales are 1", norms(*NORMS), without_scales
    ),
    Mistake(
        "first-datum-alone",
        "like the first datum alone",
        always,
        partial(of_data, keep=slice(None, 1)),
    ),
    Mistake(
        "last-datum-alone",
        "like the last datum alone",
        always,
        partial(of_data, keep=slice(-1, None)),
    ),
    Mistake(
        "first-batch-alone", "like the first mini-batch alone", batches, partial(of_batch, place=0)
    ),
    Mistake(
        "last-batch-alone", "like the last mini-batch alone", batches, partial(of_batch, place=-1)
    ),
    Mistake(
        "other-layer", "like another layer that has the same shape", like_layers, of_other_layer
    ),
    Mistake(
        "embedding-alone",
        "as if the embedding alone had the weight",
        tied,
        partial(use_alone, kept=lambda K: replace(K, turned=None)),
    ),
    Mistake(
        "head-alone",
        "as if the head alone had the weight",
        tied,
        partial(use_alone, kept=lambda K: replace(K, A=0 * K.A)),
    ),
]

# ---- all of them ---------------------------------------------------------------------------------

SOFTMAX = has_loss("cross-entropy")

STEPS = [
    step(
        "padding-mode",
        "as if padding_mode were ignored",
        padding_modes,
        op=with_setting("padding_mode", "zeros"),
    ),
    step(
        "dilation",
        "as if dilation were ignored",
        has("dilation", 1),
        op=with_setting("dilation", 1),
    ),
    step("stride", "as if stride were ignored", has("stride", 1), op=with_setting("stride", 1)),
    step("padding", "as if padding were ignored", has("padding", 0), op=with_setting("padding", 0)),
    step(
        "channels-of-other-group",
        "as if the groups of a convolution had the channels of each other",
        has("groups", 1),
        seen=groups_rolled,
    ),
    step(
        "groups-as-one",
        "as if the groups of a convolution had one pair of factors",
        has("groups", 1),
        input_factor=of_all_groups(input_factor),
        vector_factor=of_all_groups(vector_factor),
    ),
    step(
        "transpose",
        "as if patches were reshaped where they are transposed",
        convolutions,
        cut=reshaped,
    ),
    step("bias-zeros", "as if the input of the bias were 0", biases, cut=without_ones),
    step(
        "bias-summed",
        "as if the 1 of the bias were summed over positions",
        all_of(biases, has_positions),
        input_factor=ones_summed,
    ),
    step("centred", "as if the mean were subtracted from the inputs", always, input_factor=centred),
    step(
        "diagonal-inputs",
        "as if the factor of the inputs were diagonal",
        always,
        input_factor=diagonal(input_factor),
    ),
    step(
        "diagonal-vectors",
        "as if the factor of the vectors were diagonal",
        always,
        vector_factor=diagonal(vector_factor),
    ),
    step(
        "before-norm",
        "as if the inputs were those from before a norm",
        elsewhere(before_norm),
        input_of=before_norm,
    ),
    step(
        "behind-norm",
        "as if vectors did not pass through a norm",
        elsewhere(behind_norm),
        result_of=behind_norm,
    ),
    step(
        "activation-in-place",
        "as if an activation had written over what was recorded",
        elsewhere(behind),
        result_of=behind,
    ),
    step("last-call", "like a layer's last call alone", reuse, used=lambda places: places[-1:]),
    step("first-call", "like a layer's first call alone", reuse, used=lambda places: places[:1]),
    step(
        "inputs-of-last-call",
        "as if every call had the inputs of the last",
        reuse,
        used_inputs=each_by_last,
    ),
    step(
        "calls-reversed",
        "as if the inputs of a layer's calls came in the opposite order",
        reuse,
        used_inputs=lambda places: places[::-1],
    ),
    step(
        "calls-alike",
        "as if all calls had one number of positions",
        uneven_calls,
        joined=calls_alike,
        reduced=calls_alike_reduced,
    ),
    step(
        "calls-reduced",
        "as if every call were reduced to one position by itself",
        all_of(reuse, flavour("reduce"), longer_calls),
        reduced=calls_reduced,
    ),
    step(
        "last-inputs-first-vectors",
        "as if a layer had the inputs of its last call alone, and the vectors of its first",
        reuse,
        used_inputs=lambda places: places[-1:],
        used_vectors=lambda places: places[:1],
    ),
    step(
        "calls-squared",
        "as if every call had the inputs of the last everywhere, and a square of its own",
        all_of(reuse, flavour("ekfac")),
        used_inputs=each_by_last,
        squares=squares_of_positions,
    ),
    step(
        "last-inputs-in-scales",
        "as if every call had the inputs of the last in EKFAC's scales, and a square of its own",
        all_of(reuse, flavour("ekfac")),
        squares=of_last_inputs,
    ),
    step(
        "batch-axis",
        "as if the softmax were over the batch",
        SOFTMAX,
        probabilities=lambda f: f.softmax(0),
    ),
    step(
        "last-axis",
        "as if the softmax were over the last axis",
        all_of(SOFTMAX, lambda asked: asked.networks[0].output().ndim > 2),
        probabilities=lambda f: f.softmax(-1),
    ),
    step(
        "first-datum",
        "as if all data had the prediction of the first",
        SOFTMAX,
        probabilities=lambda f: f[:1].softmax(1).expand_as(f),
    ),
    step(
        "hessian-diag-p",
        "as if the softmax's Hessian were diag(p)",
        SOFTMAX,
        softmax_root=lambda p: p.sqrt().diag_embed(),
    ),
    step(
        "hessian-diagonal",
        "as if the softmax's Hessian were diagonal",
        SOFTMAX,
        softmax_root=lambda p: (p * (1 - p)).sqrt().diag_embed(),
    ),
    step(
        "uniform",
        "as if labels were drawn uniformly",
        all_of(SOFTMAX, lambda asked: asked.case.fisher == "mc"),
        softmax_root=uniformly,
    ),
    step(
        "batch-size",
        "as if the mean loss divided by the number of data",
        uneven_mean,
        seen=by_data,
    ),
    step(
        "mean-gradients",
        "as if gradients were those of each mini-batch's mean loss",
        all_of(batches, lambda asked: asked.case.fisher == "empirical"),
        seen=of_mean_loss,
    ),
    step(
        "weights-in-curvature",
        "like the same without the loss's weights, divided by their sum all the same",
        all_of(has_setting("weight"), SOFTMAX, lambda asked: asked.case.loss.reduction == "mean"),
        term_weights=unweighted,
    ),
    step(
        "padding-counted",
        "as if the padding were counted",
        lambda asked: asked.case.masked,
        mask=lambda case, y: None,
    ),
    step(
        "ignored-targets",
        "as if ignored targets had curvature",
        has_ignored,
        term_weights=not_ignored,
    ),
    step(
        "one-vector",
        "as if one vector were sent back for all positions",
        all_of(root_is_chosen, output_positions),
        columns=together,
    ),
    step(
        "one-vector-for-channels",
        "as if one vector were sent back for all channels and rows of an image",
        all_of(root_is_chosen, output_positions, images, has_loss("mse")),
        columns=by_last_axis,
    ),
    step(
        "all-positions-subtracted",
        "as if the softmax's vector of one position reached all others",
        all_of(root_is_chosen, SOFTMAX, output_positions, unweighted_terms),
        columns=all_positions_subtracted,
    ),
    step(
        "cross-terms",
        "as if different data were summed before the square",
        lambda asked: asked.case.fisher != "mc",  # whose labels are independent
        vector_factor=data_joined,
    ),
    step(
        "cross-terms-in-scales",
        "as if different data were summed before the square, also in EKFAC's scales",
        flavour("ekfac"),
        vector_factor=data_joined,
        squares=gradients_joined,
    ),
    step(
        "mean-inputs",
        "as if inputs were averaged over positions before the product, as in KFAC-reduce",
        all_of(has_positions, flavour("expand")),
        input_factor=of_mean_inputs,
    ),
    step(
        "summed-vectors",
        "as if vectors were summed over positions before the product, as in KFAC-reduce",
        all_of(has_positions, flavour("expand")),
        vector_factor=of_summed_vectors,
    ),
    step(
        "reduce-eigenvectors",
        "as if EKFAC had the eigenvectors of KFAC-reduce",
        all_of(has_positions, flavour("ekfac")),
        input_factor=of_mean_inputs,
        vector_factor=of_summed_vectors,
    ),
    step(
        "squares",
        "as if every position of a datum were squared by itself",
        all_of(has_positions, flavour("ekfac")),
        squares=squares_of_positions,
    ),
    step(
        "equal",
        "as if all mini-batches had one size",
        unequal,
        input_shares=equally,
        vector_shares=equally,
    ),
    step(
        "equal-for-inputs",
        "as if all mini-batches had one size, for the inputs alone",
        unequal,
        input_shares=equally,
    ),
    step(
        "equal-for-vectors",
        "as if all mini-batches had one size, for the vectors alone",
        unequal,
        vector_shares=equally,
    ),
    step(
        "equal-and-squared",
        "as if mini-batches had equal shares for the inputs, and squared ones for the vectors",
        unequal,
        input_shares=equally,
        vector_shares=squared,
    ),
    step(
        "wrong-side",
        "as if the shares of the old and the new in a running mean were exchanged",
        unequal,
        input_shares=on_the_wrong_side,
        vector_shares=on_the_wrong_side,
    ),
    step(
        "inputs-of-first-batch",
        "as if the inputs were those of the first mini-batch",
        batches,
        input_shares=only(0),
    ),
    step(
        "inputs-of-last-batch",
        "as if the inputs were those of the last mini-batch",
        batches,
        input_shares=only(-1),
    ),
    step(
        "eigenvectors",
        "as if eigenvectors were averaged",
        all_of(batches, flavour("ekfac"), lambda asked: asked.case.loss.reduction == "mean"),
        averaged=bases_averaged,
        solved=in_given_basis,
    ),
    step(
        "bases-turned",
        "as if eigenvectors were the rows of a matrix that has them as columns",
        all_of(flavour("ekfac"), lambda asked: asked.case.loss.reduction == "mean"),
        averaged=bases_turned,
        solved=in_given_basis,
    ),
]

MISTAKES: list[Mistake] = [*QUESTIONS, *STEPS, *DAMPING]


def answers(asked: Question) -> Iterator[tuple[Mistake, Pieces]]:
    """Every mistake that a question is about and that can be made there, with what is got."""
    for mistake in MISTAKES:
        try:
            if mistake.concerns(asked):
                yield mistake, mistake.answer(asked)
        except (RuntimeError, ValueError):  # the steps do not fit together on this case
            continue


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
