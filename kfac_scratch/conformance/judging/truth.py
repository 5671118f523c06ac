r"""What is right, by plain autodiff: Jacobians, loss Hessians, and the definition of KFAC.

With the Jacobian $J_W$ of all outputs by a layer's matrix, the loss's Hessian $H$ at the output,
and the Jacobian $J_{ns}$ of all outputs by the layer's result at datum $n$ and position $s$:

$$
F = J_W^\top H J_W , \qquad
A = \frac{1}{NS} \sum_{n,s} a_{ns} a_{ns}^\top , \qquad
B = \sum_{n,s} J_{ns}^\top H J_{ns} ,
$$

where the row $a_{ns}$ is itself a derivative, of $z_{ns}$ by $W$. KFAC-reduce has the mean of
$a_{ns}$ and the sum of $J_{ns}$ over $s$. Means leave out positions that a mask does not count.
For the empirical Fisher, $H$ is the outer product of every datum's gradient. Nothing of the
package's own capture, losses or matrices is used here.

Sources: Martens and Grosse 2015 (arXiv:1503.05671); Eschenhagen et al. 2023 (arXiv:2311.00636);
George et al. 2018 (arXiv:1806.03884).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

from kfac_scratch.conformance.cases.case import EXACT, TOLERANCES, Case, Data
from kfac_scratch.conformance.cases.ops import (
    Op,
    Parameters,
    apply,
    as_layer,
    calls,
    forward,
    layer_ops,
    tied_uses,
)
from kfac_scratch.conformance.judging.pieces import LayerParts, PieceKey
from kfac_scratch.conformance.vocabulary import Flavour, PartName

Blocks = dict[str, Float[Tensor, "groups D D"]]


@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """A layer's Kronecker factors, one pair per group.

    Attributes:
        A: Of the inputs.
        B: Of the vectors.
        turned: Those of layers that apply the transpose, which add a product of their own.
    """

    A: Float[Tensor, "groups d_in d_in"]
    B: Float[Tensor, "groups d_out d_out"]
    turned: "KroneckerFactors | None" = None

    def dense(self) -> Float[Tensor, "groups D D"]:
        """`B ⊗ A` of every group, and `A ⊗ B` of what is turned."""
        D = self.A.shape[-1] * self.B.shape[-1]
        M = torch.einsum("gop,gij->goipj", self.B, self.A).reshape(-1, D, D)
        if self.turned is None:
            return M
        return M + KroneckerFactors(self.turned.B, self.turned.A).dense()


def expected(
    case: Case, data: Data, flavour: Flavour, parts: LayerParts | None = None
) -> dict[PieceKey, Tensor]:
    """What is right, by layer and part: blocks, or damped inverses times the gradient.

    Args:
        case: What is asked.
        data: Its numbers.
        flavour: Of KFAC.
        parts: For each layer `joint`, or `weight` and `bias`; by default `joint`.
    """
    K = factors(case, data, flavour) if case.needs_factors(flavour) else {}
    found = asked_columns(case, flavour, parts, exact(case, data), K)
    return {key: piece.right(data) for key, piece in found.items()}


def asked_columns(
    case: Case,
    flavour: Flavour,
    parts: LayerParts | None,
    F: Mapping[str, Float[Tensor, "groups D D"]],
    K: "Mapping[str, KroneckerFactors]",
) -> "dict[PieceKey, Columns]":
    """What is asked for, by layer and part, made of every layer's exact block and factors."""
    ops, found = layer_ops(case.ops), {}
    for name in case.judged:
        for part in (parts or {}).get(name, ("joint",)):
            chosen = columns_of(case, ops[name], part)
            if chosen:
                op = ops[name]
                found[name, part] = Columns(case, flavour, op, chosen, F.get(name), K.get(name))
    return found


def columns_of(case: Case, op: Op, part: PartName) -> list[int]:
    """Which columns of `[W | b]` a part has, of those that a case judges."""
    inputs = list(range(op.matrix_shape()[1]))
    weight, bias = (inputs[:-1], inputs[-1:]) if op["bias"] else (inputs, [])
    if case.part == "bias":
        return [] if part == "weight" else bias
    return {"joint": inputs, "weight": weight, "bias": bias}[part]


def entries(op: Op, columns: Sequence[int]) -> Int[Tensor, "entries"]:
    """Where the entries of some columns stand among all of `[W | b]`, rows behind each other."""
    d_out, d_in = op.matrix_shape()
    return torch.arange(d_out * d_in).reshape(d_out, d_in)[:, columns].flatten()


@dataclass(frozen=True, eq=False)
class Columns:
    """Some columns of a layer: what is right for the block that they have by themselves."""

    case: Case
    flavour: Flavour
    op: Op
    columns: list[int]
    F: "Float[Tensor, 'groups D D'] | None"
    K: "KroneckerFactors | None"

    def right(self, data: Data) -> Tensor:
        """The block `[groups, D, D]`, or the damped inverse times the gradient `[groups, D]`."""
        if not self.case.damping:
            return self.matrix()
        form, damping = self.case.damping
        W = self.gradient(data)
        if form == "exact":
            M = self.matrix()
            M = M + damping * torch.eye(M.shape[-1]).to(M)
        else:
            M = factored_damping(self.factors(), damping)
        return torch.linalg.solve(M, W)

    def gradient(self, data: Data) -> Float[Tensor, "groups D"]:
        """The loss's gradient by these columns."""
        return matrix(self.op, gradients(self.case, data))[..., self.columns].flatten(1)

    def matrix(self) -> Float[Tensor, "groups D D"]:
        """The exact block where the case says so, else what the definition gives."""
        if self.case.flavours[self.flavour] == EXACT:
            return self.exact()
        if self.flavour == "ekfac":
            return _rescaled(self.factors(), self.exact())
        return self.factors().dense()

    def factors(self) -> "KroneckerFactors":
        """KFAC's factors for these columns."""
        assert self.K is not None
        A = self.K.A[:, self.columns][:, :, self.columns]
        return KroneckerFactors(A, self.K.B, self.K.turned)

    def exact(self) -> Float[Tensor, "groups D D"]:
        """The exact block of these columns."""
        assert self.F is not None
        index = entries(self.op, self.columns)
        return self.F[:, index][:, :, index]


# ---- the exact blocks ----------------------------------------------------------------------------


def exact(case: Case, data: Data) -> Blocks:
    """Every layer's block of the GGN, or of the empirical Fisher."""
    f = output(case, data)
    J = jacrev(lambda theta: output(case, data, theta).flatten())(dict(data.parameters))
    H = output_curvature(case, f, data.y)
    blocks = {}
    for name, op in layer_ops(case.ops).items():
        rows = matrix(op, {key: J[key] for key in op.shapes()}, batch=1)  # [F, groups, o, i]
        rows = rows.flatten(2)
        blocks[name] = torch.einsum("fgd,fh,hge->gde", rows, H, rows)
    return blocks


def output(case: Case, data: Data, theta: dict[str, Tensor] | None = None) -> Tensor:
    """What the loss sees: the network's output, or a differential operator of it."""
    theta = dict(data.parameters) if theta is None else theta
    if not case.operator:
        return forward(case.ops, theta, data.X)

    def u(x: Tensor) -> Tensor:
        return forward(case.ops, theta, x.unsqueeze(0)).squeeze()

    def operator(x: Tensor, c: Tensor) -> Tensor:
        laplacian = hessian(u)(x).trace()
        return c[0] * u(x) + c[1:-1] @ grad(u)(x) + c[-1] * laplacian

    assert data.coefficients is not None
    return vmap(operator)(data.X, data.coefficients).unsqueeze(1)


def output_curvature(case: Case, f: Tensor, y: Tensor) -> Float[Tensor, "F F"]:
    """The loss's curvature with respect to all output entries."""
    loss = case.loss.module(f)
    if case.fisher != "empirical":
        return hessian(lambda v: loss(v.reshape(f.shape), y))(f.flatten())
    D = case.loss.divisor(f, y)
    g = D * grad(lambda v: loss(v, y))(f).flatten(1)  # [N, F / N], of the sum of the loss's terms
    own = torch.block_diag(*[g_n.unsqueeze(0) for g_n in g])  # [N, F]
    return own.T @ own / D


def matrix(op: Op, values: dict[str, Tensor], batch: int = 0) -> Float[Tensor, "... groups o i"]:
    """Values shaped like a layer's parameters as one matrix per group, the bias as last column."""
    weight = values[f"{op.name}.weight"]
    weight = weight.transpose(batch, batch + 1) if op.kind == "embedding" else weight
    lead = weight.shape[:batch]
    W = weight.flatten(batch + 1).reshape(*lead, op.groups, weight.shape[batch] // op.groups, -1)
    bias = values.get(f"{op.name}.bias")
    return W if bias is None else torch.cat([W, bias.reshape(*lead, *W.shape[-3:-1], 1)], -1)


# ---- the definition of KFAC ----------------------------------------------------------------------


def factors(case: Case, data: Data, flavour: Flavour) -> dict[str, KroneckerFactors]:
    """Every layer's Kronecker factors, of KFAC-expand or KFAC-reduce."""
    found = {}
    H, tied = output_curvature(case, output(case, data), data.y), tied_uses(case.ops)
    uses = {name: calls(case.ops, name) for name in layer_ops(case.ops)}
    for name, places in uses.items():
        pair = factors_of(case, data, flavour, places, H)
        turned = factors_of(case, data, flavour, tied[name], H) if name in tied else None
        found[name] = KroneckerFactors(pair.A, pair.B, turned)
    return found


def factors_of(
    case: Case, data: Data, flavour: Flavour, places: Sequence[int], H: Float[Tensor, "F F"]
) -> KroneckerFactors:
    """The factors of the operations at some places, which are the positions of one layer."""
    a, J = inputs_at(case, data, places), derivatives_at(case, data, places)
    counted = counted_rows(a, case.mask(data.y))
    if flavour == "reduce":
        (a, counted), J = row_means(a, counted), J.sum(3, keepdim=True)
    return KroneckerFactors(second_moment(a, counted), torch.einsum("fgnso,fh,hgnsp->gop", J, H, J))


def counted_rows(
    a: Float[Tensor, "groups N S d_in"], mask: Bool[Tensor, "N T"] | None
) -> Bool[Tensor, "N S"] | None:
    """Which rows of a layer a mask counts; all if the layer has another number of positions."""
    return None if mask is None or mask.shape[1] != a.shape[2] else mask


def row_means(
    a: Float[Tensor, "groups N S d_in"], counted: Bool[Tensor, "N S"] | None
) -> tuple[Float[Tensor, "groups N 1 d_in"], Bool[Tensor, "N 1"] | None]:
    """Every datum's mean row over positions that are counted, and which data have any."""
    if counted is None:
        return a.mean(2, keepdim=True), None
    numbers = counted.sum(1, keepdim=True)
    total = (a * counted.unsqueeze(-1)).sum(2, keepdim=True)
    return total / numbers.clamp(min=1).unsqueeze(-1), numbers > 0


def second_moment(
    a: Float[Tensor, "groups N S d_in"], counted: Bool[Tensor, "N S"] | None = None
) -> Float[Tensor, "groups d_in d_in"]:
    """The mean of `a a^T` over the rows that are counted."""
    rows = a.shape[1] * a.shape[2] if counted is None else counted.sum()
    a = a if counted is None else a * counted.unsqueeze(-1)
    return torch.einsum("gnsi,gnsj->gij", a, a) / rows


def layer_inputs(case: Case, data: Data, name: str) -> Float[Tensor, "groups N S d_in"]:
    """What a layer's matrix multiplies, at all its calls."""
    return inputs_at(case, data, calls(case.ops, name))


def inputs_at(case: Case, data: Data, places: Sequence[int]) -> Float[Tensor, "groups N S d_in"]:
    """What the matrices of operations multiply, as the positions of one layer."""
    record = recorded(case, data)
    return torch.cat([rows_of(as_layer(case.ops[i]), record[i][0], data) for i in places], 2)


def recorded(case: Case, data: Data) -> list[tuple[Tensor, Tensor]]:
    """What every operation of the network is given first, and its result."""
    record: list[tuple[Tensor, Tensor]] = []
    forward(case.ops, data.parameters, data.X, record=record)
    return record


def rows_of(op: Op, x: Tensor, data: Data) -> Float[Tensor, "groups N S d_in"]:
    """What an operation's matrix multiplies, as `d z[n, s, first output] / d W[first]`."""
    theta = {key: data.parameters[key] for key in op.shapes()}
    J = matrix(op, jacrev(partial(_first_output, op, x))(theta), batch=3)[..., 0, :]
    return torch.stack([J[g, :, :, g] for g in range(op.groups)])  # of [groups, N, S, groups, d_in]


def _first_output(op: Op, x: Tensor, theta: Parameters) -> Float[Tensor, "groups N S"]:
    return _positions(op, apply(op, theta, x))[..., 0]


def derivatives(case: Case, data: Data, name: str) -> Float[Tensor, "F groups N S d_out"]:
    """Every output entry's derivative by what a layer returns at each datum and position."""
    return derivatives_at(case, data, calls(case.ops, name))


def derivatives_at(
    case: Case, data: Data, places: Sequence[int]
) -> Float[Tensor, "F groups N S d_out"]:
    """Every output entry's derivative by what operations return, as the positions of one layer."""
    op = as_layer(case.ops[places[0]])
    return torch.cat([positions(op, J) for J in slopes(case, data, places)], 3)


def slopes(case: Case, data: Data, places: Sequence[int]) -> list[Tensor]:
    """Every output entry's derivative by the results of operations, `[F, *result]` each."""
    record = recorded(case, data)
    zero = {i: torch.zeros_like(record[i][1]) for i in places}
    J = jacrev(lambda d: forward(case.ops, data.parameters, data.X, added=d).flatten())(zero)
    return [J[i] for i in places]


def positions(op: Op, J: Float[Tensor, "F ..."]) -> Float[Tensor, "F groups N S d_out"]:
    """Derivatives by a layer's result, with its shared axes as one."""
    return vmap(partial(_positions, op))(J)


def _positions(op: Op, z: Tensor) -> Float[Tensor, "groups N S d_out"]:
    """What a layer returns, with its shared axes as one."""
    if op.kind in ("linear", "embedding"):
        return z.reshape(1, len(z), -1, z.shape[-1])
    z = z.flatten(2).mT.unflatten(-1, (op.groups, -1))  # [N, S, groups, d_out]
    return z.permute(2, 0, 1, 3)


def _rescaled(factors: KroneckerFactors, F: Float[Tensor, "groups D D"]) -> Tensor:
    """EKFAC: the diagonal of the exact block in KFAC's eigenbasis, and nothing else."""
    QA, QB = torch.linalg.eigh(factors.A)[1], torch.linalg.eigh(factors.B)[1]
    U = KroneckerFactors(QA, QB).dense()
    scale = torch.einsum("gde,gdf,gfe->ge", U, F, U)
    return U * scale.unsqueeze(-2) @ U.mT


# ---- damped inverses -----------------------------------------------------------------------------


def gradients(case: Case, data: Data) -> dict[str, Tensor]:
    """The loss's gradient, by parameter."""
    loss = case.loss.module(data.X)
    theta = dict(data.parameters)
    return grad(lambda theta: loss(output(case, data, theta), data.y))(theta)


def factored_damping(factors: KroneckerFactors, damping: float) -> Float[Tensor, "groups D D"]:
    """`(B + sqrt(damping) / pi) ⊗ (A + sqrt(damping) pi)` (Martens and Grosse 2015, §6.3)."""
    mean_A = factors.A.diagonal(dim1=1, dim2=2).mean(1)
    mean_B = factors.B.diagonal(dim1=1, dim2=2).mean(1)
    pi = (mean_A / mean_B).sqrt()[:, None, None]
    eye_A, eye_B = (torch.eye(M.shape[-1]).to(M) for M in (factors.A, factors.B))
    return KroneckerFactors(
        factors.A + damping**0.5 * pi * eye_A, factors.B + damping**0.5 / pi * eye_B
    ).dense()


def sizes(case: Case, data: Data) -> dict[str, dict[str, int]]:
    """Every layer's sizes by the letters of the field, for naming a scale."""
    f, found = output(case, data), {}
    C = f.shape[class_axis(case)]
    for name, op in layer_ops(case.ops).items():
        d_out, d_in = op.matrix_shape()
        S = data.X.shape[1] + 2 if case.operator else layer_inputs(case, data, name).shape[2]
        found[name] = {
            "N": len(data.X),
            "S": S,
            "C": C,
            "T": f[0].numel() // C,
            "d_in": d_in - bool(op["bias"]),
            "d_out": d_out,
            "batches": max(1, len(case.batches)),
        }
    return found


def letters(case: Case, data: Data) -> dict[str, dict[str, int | float]]:
    """Every layer's sizes, and what else a scale may be made of where it is another number.

    `S_in` are the positions of a convolution's input. `W` is what a mean over positions is divided
    by, or over data where there is one position; `K` is how many there are if none is left out.
    """
    all_sizes: dict[str, dict[str, int | float]] = {
        name: {**of_layer} for name, of_layer in sizes(case, data).items()
    }
    for name, op in layer_ops(case.ops).items():
        if op.kind == "conv":
            S_in = recorded(case, data)[calls(case.ops, name)[0]][0][0, 0].numel()
            all_sizes[name] |= {"S_in": S_in} if S_in != all_sizes[name]["S"] else {}
    counted = _counted(case, data)
    return {name: of_layer | counted for name, of_layer in all_sizes.items()}


def _counted(case: Case, data: Data) -> dict[str, int | float]:
    """`W`, and `K` unless it is the number of data; nothing if all positions count alike."""
    f, mask = output(case, data), case.mask(data.y)
    K = f.numel() // f.shape[class_axis(case)]
    W = float(K if mask is None else mask.sum())
    if case.loss.kind == "cross-entropy" and case.loss.reduction == "mean":
        W = case.loss.divisor(f, data.y)
    if abs(W - K) <= TOLERANCES["float32"] * K:
        return {}
    return {"W": W} | ({"K": K} if len(data.X) != K else {})


def class_axis(case: Case) -> int:
    """Which axis of the output has the classes or output features."""
    channels_first = case.loss.kind == "cross-entropy" or case.ops[-1].kind == "conv"
    return 1 if channels_first else -1
