"""Mistakes that are the right answer to another question: another loss, batch, flavour or layer."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.cases.case import DEFINITION, EXACT
from kfac_scratch.conformance.cases.ops import NORMS, tied_uses
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.mistakes.concerns import (
    Holds,
    always,
    batches,
    defined,
    has_setting,
    has_way,
    layers,
    like_layers,
    norms,
    tied,
)
from kfac_scratch.conformance.judging.mistakes.mistake import Mistake
from kfac_scratch.conformance.judging.pieces import PieceKey, Pieces
from kfac_scratch.conformance.judging.ways import (
    Network,
    Question,
    Way,
)
from kfac_scratch.conformance.vocabulary import FLAVOURS, Fisher, Flavour


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
