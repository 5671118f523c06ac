"""Mistakes in one step of a computation: of the inputs, the vectors, the products, the sums."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import Case, Data
from kfac_scratch.conformance.cases.ops import NORMS, Op
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.mistakes.concerns import (
    all_of,
    always,
    batches,
    biases,
    convolutions,
    elsewhere,
    flavour,
    has,
    has_ignored,
    has_loss,
    has_positions,
    has_setting,
    images,
    longer_calls,
    output_positions,
    padding_modes,
    reuse,
    root_is_chosen,
    unequal,
    uneven_calls,
    uneven_mean,
    unweighted_terms,
)
from kfac_scratch.conformance.judging.mistakes.mistake import step
from kfac_scratch.conformance.judging.ways import (
    Batch,
    averaged,
    classes_last,
    input_factor,
    reduced,
    term_weights,
    vector_factor,
)


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
