"""What a question has: the conditions on which a mistake is tried on a case."""

from collections.abc import Callable
from typing import Any

from kfac_scratch.conformance.cases.case import IGNORED, Case
from kfac_scratch.conformance.cases.ops import Op, calls, layer_ops, tied_uses
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.ways import Question
from kfac_scratch.conformance.vocabulary import Flavour

Holds = Callable[[Question], bool]


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
