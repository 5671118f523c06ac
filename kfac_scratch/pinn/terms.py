r"""PINNs: a differential equation as a loss, and the `LayerIO`s of its residuals.

A `Term` of the loss has points, an expansion, and a function that makes residuals of the network's
derivatives at the points. All terms together give

$$
L = \sum_t \frac{w_t}{2 N_t} \sum_n \lVert r_t(x_n) \rVert^2 = \tfrac12 \lVert \rho \rVert^2 ,
\qquad \rho_{tn} = \sqrt{w_t / N_t} \; r_t(x_n) .
$$

One Taylor pass forward and one reverse pass give the residuals $\rho$, and for every layer the
rows $a$ that enter it and the vectors $g = \partial \rho / \partial z$ that come back. No
optimizer here needs more. All coefficients meet the same weights, so this pair is a `LayerIO`, its
block is the exact Gauss-Newton block, and *every* approximation of this package applies.

Source: Dangel, Müller and Zeinhofer 2024 (arXiv:2405.15603), §3.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import check_function, check_instance
from kfac_scratch.capture.layer_groups import LayerGroup, layer_groups
from kfac_scratch.capture.plan import (
    check_sums,
    random_half,
    random_like,
    separating_sets,
)
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.pinn.constants import Constant, constants, slopes_of
from kfac_scratch.taylor.expansions import Expansion
from kfac_scratch.taylor.faa_di_bruno import Multiset
from kfac_scratch.taylor.jets import Jet, taylor_coefficients


@dataclass(frozen=True, eq=False)
class Field:
    """A network's output and its derivatives at `N` points, each of shape `[N, outputs]`."""

    parts: Sequence[Tensor]
    expansion: Expansion

    @property
    def value(self) -> Float[Tensor, "N outputs"]:
        """The value of `u`."""
        return self.parts[0]

    @property
    def d(self) -> list[Tensor]:
        """The first derivatives: `u.d[0]` is the one along the first direction."""
        names = self.expansion.names
        return [self._named(a) for a in names if isinstance(a, tuple) and len(a) == 1]

    @property
    def sums(self) -> list[Tensor]:
        """The sums of derivatives, in the order of the expansion."""
        return [self._named(name) for name in self.expansion.names if isinstance(name, int)]

    @property
    def lap(self) -> Float[Tensor, "N outputs"]:
        """The first sum, which is the Laplacian with the expansion `laplacian(d)`."""
        return self._named(0)

    def partial(self, *alpha: int) -> Float[Tensor, "N outputs"]:
        """The derivative along directions, given by their numbers in any order."""
        return self._named(tuple(sorted(alpha)))

    def _named(self, name: Multiset | int) -> Tensor:
        if name not in self.expansion.names:
            raise ValueError(
                f"{'Sum' if isinstance(name, int) else 'Derivative'} {name} does not travel with "
                f"this expansion, which has {self.expansion.names}."
            )
        return self.parts[self.expansion.names.index(name)]


@dataclass(frozen=True, eq=False)
class Term:
    """One part of the loss: `weight / (2 N) sum_n |residual(u, x_n)|^2`.

    Attributes:
        residual: From the field and the points to residuals `[N]` or `[N, M]`, linear or not. The
            residuals at point `n` depend on the field at point `n` only. They may use trainable
            parameters of the model that are in no layer: unknown constants of the equation.
        X: The points.
        expansion: The derivatives that the field has.
        weight: The weight of this term in the loss.
    """

    residual: Callable[[Field, Tensor], Tensor]
    X: Float[Tensor, "N d"]
    expansion: Expansion
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_function("residual", self.residual, "residual=lambda u, x: u.lap")
        check_instance("X", self.X, Tensor, "X=torch.rand(100, 2)")
        check_instance("expansion", self.expansion, Expansion, "expansion=laplacian(2)")


@dataclass(frozen=True, eq=False)
class Linearization:
    """Scaled residuals at some points and, layer by layer, their derivatives.

    Law: `io.gradients()[m, n]` is the derivative of `residuals[m, n]` with respect to the layer's
    `W`. The loss is half the squared norm of all residuals.
    """

    residuals: Float[Tensor, "M N"]
    ios: dict[str, LayerIO]


def pinn_loss(model: Module, terms: Sequence[Term], chunk: int | None = None) -> Float[Tensor, ""]:
    """The PINN's loss: the sum of all terms, by one forward pass; autograd can differentiate it.

    Use it for first-order optimizers and to evaluate. Not for curvature: `linearize` gives the
    residuals with their derivatives.

    Cost: about `S` ordinary forward passes for a term with `S` coefficients.

    Args:
        model: As in `linearize`.
        terms: The terms of the loss.
        chunk: How many points go through the network at once. Default: all.
    """
    check_terms(terms)
    squares = []
    for part, scale in (pair for term in terms for pair in _parts(term, chunk)):
        c = taylor_coefficients(model, part.X, part.expansion)
        squares.append((scale * _residuals(part, list(c.unbind(1)))).square().sum())
    return torch.stack(squares).sum() / 2


def linearize(
    model: Module, terms: Sequence[Term], chunk: int | None = None
) -> list[list[Linearization]]:
    """For each term its residuals and their derivatives, by one forward and one reverse pass.

    Use it for every second-order method here. Not for the loss alone: `pinn_loss`.

    Cost: with `M` residuals at each point and `S` coefficients, about `S` forward and `M * S`
    reverse passes of the network; memory `N * S * (d_in + M * d_out)` for each layer.

    Args:
        model: A network built of functions for which `taylor_coefficients` has rules.
        terms: The terms of the loss.
        chunk: How many points go through the network at once; each such part of a term is a
            `Linearization` of its own. This bounds the graph's memory, and parts that fit into the
            cache are faster. Default: all.

    Raises:
        ValueError: If a residual has a wrong shape, is not finite, ignores a derivative that was
            declared for it, or depends on the field at other points; if a layer never runs; if a
            trainable parameter is in no layer, and in no residual or in the network, too.
        NotImplementedError: If the network calls a function that has no rule, or uses a parameter
            where no call of its layer explains it. That is tried on up to eight points, once for
            each kind of network and expansion.
    """
    check_terms(terms)
    groups = layer_groups(model)
    unknown = dict.fromkeys(constants(model, groups), False)
    with torch.enable_grad():
        for term in terms:
            _check_once(model, groups, term)
        result = [
            [_linearized(model, groups, unknown, *pair) for pair in _parts(term, chunk)]
            for term in terms
        ]
    if names := [constant.name for constant, used in unknown.items() if not used]:
        raise ValueError(
            f"No linear layer holds the trainable parameters {names}, and no residual uses them, "
            "so that no step could change them: freeze them with requires_grad_(False)."
        )
    return result


def check_terms(terms: object) -> None:
    """Refuse what is not a list of terms.

    Raises:
        TypeError: Naming what was passed and the way out.
    """
    if isinstance(terms, Term):
        raise TypeError("terms must be a list of Term, got one Term: pass [term].")
    for i, term in enumerate(terms if isinstance(terms, Sequence) else [terms]):
        check_instance(f"terms[{i}]", term, Term, "Term(residual, X, laplacian(2))")


def _linearized(
    model: Module,
    groups: list[LayerGroup],
    unknown: dict[Constant, bool],
    part: Term,
    scale: float,
) -> Linearization:
    """One part of a term; notes which of the unknown constants its residual uses."""
    c, calls = _forward(model, groups, part)
    tried = CHECKED.setdefault(model, set())
    r, slopes, of_constants = _operator(part, c.detach(), _sets(part, tried), list(unknown))
    tried.add(_code(part.residual))
    outputs = [z for group in groups for _, z in calls[group.name]]
    sent = [  # one reverse pass for each residual at a point
        torch.autograd.grad(
            c, outputs, scale * slope, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for slope in slopes
    ]
    back = iter(
        _cat([of_residual.unsqueeze(0) for of_residual in of_call], 0).flatten(2, -2)
        for of_call in zip(*sent, strict=True)  # [M, N, S, d_out]
    )
    ios = {}
    for group in groups:
        a = _cat([a for a, _ in calls[group.name]], 1)
        ios[group.name] = LayerIO(a, _cat([next(back) for _ in calls[group.name]], 2))
    for constant, found in zip(unknown, of_constants, strict=True):
        unknown[constant] |= found is not None
        zero = r.new_zeros(*r.T.shape, constant.value.numel())
        ios[constant.name] = constant.io(zero if found is None else scale * found)
    return Linearization(scale * r.T, ios)


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    """`torch.cat`, which copies a single tensor, too."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


def _operator(
    part: Term,
    c: Float[Tensor, "N S k"],
    sets: Bool[Tensor, "sets N"],
    unknown: Sequence[Constant],
) -> tuple[Tensor, Float[Tensor, "M N S k"], list[Tensor | None]]:
    """Residuals, and their derivatives by the coefficients of the output, and by the constants.

    Args:
        part: What the residuals are.
        c: The coefficients.
        sets: Points that are tried apart from the others.
        unknown: The constants.
    """
    leaves = [coefficient.clone().requires_grad_() for coefficient in c.unbind(1)]
    r = _residuals(part, leaves)
    if not r.isfinite().all():
        raise ValueError("A residual is not finite.")
    of_residuals = [
        torch.autograd.grad(column.sum(), leaves, retain_graph=True, allow_unused=True)
        if column.requires_grad
        else [None] * len(leaves)
        for column in r.unbind(1)
    ]
    for s in part.expansion.tops:
        if all(slopes[s] is None for slopes in of_residuals):
            raise ValueError(
                f"The residual ignores {part.expansion.names[s]} (a tuple: a derivative, a number: "
                "a sum), which the expansion computes only for it: declare a smaller expansion."
            )
    _check_apart(r, leaves, sets)
    zero = torch.zeros_like(c[:, 0])
    slopes = [torch.stack([zero if g is None else g for g in of_m], dim=1) for of_m in of_residuals]
    return r.detach(), torch.stack(slopes), slopes_of(r, unknown)


def _check_apart(
    r: Float[Tensor, "N M"], leaves: list[Tensor], sets: Bool[Tensor, "sets N"]
) -> None:
    """Refuse residuals that depend on the field at other points than their own.

    What is sent to the residuals of a set of points must be zero, exactly, at all others.
    """
    if not r.requires_grad:
        return
    for points in sets:
        v = random_like(r) * points.unsqueeze(1)
        sent = torch.autograd.grad(r, leaves, v, retain_graph=True, allow_unused=True)
        if any(bool(g[~points].any()) for g in sent if g is not None):
            raise ValueError(
                "A residual depends on the field at other points than its own, as u.value.mean() "
                "does, so that it has no Jacobian point by point: make it a function of each point "
                "alone."
            )


def _sets(part: Term, tried: set[Hashable]) -> Bool[Tensor, "sets N"]:
    """Sets that tell any two points apart, for a residual that is new; for others, one half."""
    N, device = len(part.X), part.X.device
    if _code(part.residual) in tried:
        return random_half(N, device).unsqueeze(0)
    return separating_sets(N, device)


def _code(residual: Callable[..., Any]) -> Hashable:
    """What a residual computes, the same for functions that are made again and again."""
    kind: Any = type(residual)
    code: Hashable = getattr(residual, "__code__", kind)
    return code


CHECKED: WeakKeyDictionary[Module, set[Hashable]] = WeakKeyDictionary()
"""For every network, with which layers, parameters and expansions it was checked, and of which
residuals any two points were told apart."""


def _check_once(model: Module, groups: list[LayerGroup], term: Term) -> None:
    """Check that the recorded calls explain the gradient of every parameter, see `capture.plan`.

    It is tried on few points, once for each kind of network and expansion.
    """
    kind = (
        tuple(type(module) for module in model.modules()),
        tuple((group.name, group.parameter_names) for group in groups),
        tuple(constant.name for constant in constants(model, groups)),
        type(term.expansion),
    )
    known = CHECKED.setdefault(model, set())
    if kind in known:
        return
    few = slice(0, 8)
    part = replace(term, X=term.X[few], expansion=term.expansion.part(few))
    c, calls = _forward(model, groups, part)
    _check_outside(c, constants(model, groups))
    parameters = {name: p for group in groups for name, p in group.trainable.items()}
    ends = [*(z for group in groups for _, z in calls[group.name]), *parameters.values()]
    sent = iter(
        torch.autograd.grad(
            c, ends, random_like(c), retain_graph=True, allow_unused=True, materialize_grads=True
        )
    )
    gs = {
        group.name: _cat([next(sent).flatten(1, -2) for _ in calls[group.name]], 1)
        for group in groups
    }
    gradients = dict(zip(parameters, sent, strict=True))
    for group in groups:
        rows = _cat([a for a, _ in calls[group.name]], 1)
        check_sums(group, [rows], [gs[group.name]], gradients, [c.dtype])
    known.add(kind)


def _check_outside(c: Float[Tensor, "N S k"], unknown: Sequence[Constant]) -> None:
    """Refuse parameters that the network uses, but no layer holds."""
    values = [constant.value for constant in unknown]
    sent = (
        torch.autograd.grad(c.sum(), values, retain_graph=True, allow_unused=True) if values else []
    )
    if names := [u.name for u, g in zip(unknown, sent, strict=True) if g is not None]:
        raise ValueError(
            f"No linear layer holds the trainable parameters {names}, which the network uses, so "
            "that no step could change them: freeze them with requires_grad_(False)."
        )


def _residuals(part: Term, coefficients: list[Tensor]) -> Float[Tensor, "N M"]:
    N, outputs = coefficients[0].shape
    r = part.residual(Field(coefficients, part.expansion), part.X)
    if r.ndim not in (1, 2) or len(r) != N or (r.ndim == 2 and r.shape[1] == N > max(outputs, 1)):
        raise ValueError(
            f"A residual has shape {tuple(r.shape)}, not [{N}] or [{N}, M]. The field's parts are "
            f"[{N}, {outputs}]: does it combine them with something of shape [{N}]?"
        )
    return r.reshape(N, -1)


def _parts(term: Term, chunk: int | None) -> Iterator[tuple[Term, float]]:
    """A term in parts of at most `chunk` points, each with the scale of its residuals."""
    N = len(term.X)
    if N == 0 or (chunk is not None and chunk < 1):
        raise ValueError(
            f"A term needs at least 1 point and chunk at least 1, got N={N}, chunk={chunk}."
        )
    for start in range(0, N, chunk or N):
        rows = slice(start, start + (chunk or N))
        part = replace(term, X=term.X[rows], expansion=term.expansion.part(rows))
        yield part, (term.weight / N) ** 0.5


def _forward(
    model: Module, groups: list[LayerGroup], part: Term
) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """The output's coefficients, and inputs `a` and outputs `z` of every call of every block."""
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {group.name: [] for group in groups}
    with ExitStack() as hooks:
        for group in groups:
            for layer in group.layers:
                record = partial(_record, group, calls[group.name])
                hooks.callback(layer.register_forward_hook(record, prepend=True).remove)
        c = taylor_coefficients(model, part.X, part.expansion)
    if silent := [name for name, of_block in calls.items() if not of_block]:
        raise ValueError(f"The layers {silent} never ran: freeze or remove them.")
    return c, calls


def _record(
    group: LayerGroup,
    calls: list[tuple[Tensor, Tensor]],
    layer: Any,
    inputs: tuple[Jet],
    output: Jet,
) -> None:
    """Record a call; the bias is a column that is 1 for the value and 0 for every derivative.

    Positions at which the layer is applied to one point follow each coefficient.
    """
    c = inputs[0].c.detach()
    columns = [] if group.weight is None else [c]
    bias = c.new_zeros(*c.shape[:-1], len(group.biases))
    names = (n for n, b in group.biases.items() if b is layer._parameters.get("bias"))
    bias[:, 0] = bias.new_tensor(group.bias_inputs(next(names, None)))
    calls.append((torch.cat([*columns, bias], dim=-1).flatten(1, -2), output.c))
