r"""Two-level KFAC: curvature between layers, in a small space.

A block-diagonal preconditioner $M^{-1}$ has no curvature between layers. A second, coarse level
solves the whole network's system exactly in the span of a few directions $Z$,

$$
Q = Z E^{-1} Z^\top, \qquad E = Z^\top F_\delta Z, \qquad F_\delta = F + \delta I ,
$$

where $F$ is the full curvature of all layers on a batch. There are four ways to use both:

| name | step |
|---|---|
| `additive` | $M^{-1} r + Q r$ |
| `adef1` | $M^{-1} (r - F_\delta Q r) + Q r$ |
| `adef2` | $x + Q (r - F_\delta x)$ with $x = M^{-1} r$ |
| `bnn` | $y - Q F_\delta y + Q r$ with $y = M^{-1} (r - F_\delta Q r)$ |

Everything here maps dictionaries of matrices `[d_out, d_in]` by block name to such dictionaries.

Sources: Tselepidis, Kohler and Orvieto 2020 (arXiv:2011.00573), the additive form, with one
direction per layer in their code (github.com/ntselepidis/KFAC-Pytorch at 74b6c7d,
`optimizers/gkfac.py`, line 301); Koroko et al. 2023 (arXiv:2303.18083) for other coarse spaces; the
names of the forms are those of Tang, Nabben, Vuik and Erlangga 2009
(doi:10.1007/s10915-009-9272-6).
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import check_callable, check_function
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.capture.layer_groups import groups_of, layer_names
from kfac_scratch.capture.plan import Plans
from kfac_scratch.layer_io import LayerIO, check_not_reduced, concatenate
from kfac_scratch.losses import BackpropagatedVectors
from kfac_scratch.matrices.matrix import LinearMap, check_damping
from kfac_scratch.optimizer.coarse_spaces import BlockValues, CoarseSpace, Space, nicolaides_space
from kfac_scratch.optimizer.preconditioner import Preconditioner, block_matrices, blockwise
from kfac_scratch.optimizer.step_control import Batches, Control, Step

BlockMap = Callable[[BlockValues], dict[str, Tensor]]
Combination = Callable[[BlockMap, BlockMap, BlockMap], BlockMap]

# ---- the curvature of all layers ----------------------------------------------------------------


def joint_curvature(ios: Mapping[str, LayerIO], damping: float = 0.0) -> BlockMap:
    """The product with `F + damping * I` of all blocks on one batch, cross-blocks included.

    Law: exact for a model's GGN or Fisher, because the vectors of all layers are the same ones,
    sent back to different depths. Use it with `LayerIO`s of `EXPAND`, not of `REDUCE`.

    Cost: `2 * N * S * d_out * (d_in + V)` operations for each layer.

    Args:
        ios: All blocks on one batch.
        damping: The multiple of the identity that is added. The default is the curvature itself.

    Raises:
        ValueError: If rows stand for several positions (`flavour=REDUCE`): the gradient of a sample
            is not in them.
    """
    check_damping(damping)
    for name, io in ios.items():
        check_not_reduced(io, f"The curvature between blocks (block {name!r})")

    def product(X: BlockValues) -> dict[str, Tensor]:
        products = [io.inner_products(X[name]) for name, io in ios.items()]
        total = torch.stack(products).sum(0)  # [V, N]
        return {
            name: torch.einsum("vn,vnso,nsi->oi", total, io.g, io.a) + damping * X[name]
            for name, io in ios.items()
        }

    return product


# ---- the coarse level ---------------------------------------------------------------------------


def coarse_matrix(ios: Mapping[str, LayerIO], Z: Space, damping: float) -> Float[Tensor, "m m"]:
    r"""The exact Galerkin matrix $E = Z^\top (F + \delta I) Z$.

    $F$ is a sum of outer products of gradients, so that $Z^\top F Z$ is a sum of outer products of
    their inner products with the directions. Damping enters as $\delta Z^\top Z$.

    Cost: one inner product of every direction with every gradient of its layer.
    """
    phi, lengths = [], []
    for name, io in ios.items():
        check_not_reduced(io, f"The coarse level (block {name!r})")
        z = torch.einsum("nsi,moi->mnso", io.a, Z[name])
        phi.append(torch.einsum("vnso,mnso->mvn", io.g, z).flatten(1))
        lengths.append(Z[name].flatten(1) @ Z[name].flatten(1).T)
    rows = torch.cat(phi)  # [m, VN]
    return rows @ rows.T + damping * torch.block_diag(*lengths)


def coarse_inverse(ios: Mapping[str, LayerIO], Z: Space, damping: float) -> BlockMap:
    r"""The map $Q = Z E^{-1} Z^\top$.

    Law: it depends on the span of the directions only. Directions that are zero, or depend on
    others, add nothing to it; a pseudo-inverse leaves them out.

    Cost: that of `coarse_matrix`, and an eigendecomposition of size `m`.

    Warns:
        UserWarning: If directions are zero, or depend on others up to round-off.
    """
    E = coarse_matrix(ios, Z, damping)
    size = E.diagonal().sqrt()
    size = size.where(size > 0, 1.0)  # of a direction that is zero
    scale = torch.outer(size, size)
    s, U = torch.linalg.eigh(E / scale)
    kept = s > len(s) * torch.finfo(s.dtype).eps * s[-1:]
    if (rank := int(kept.sum())) < len(s):
        warnings.warn(
            f"{len(s) - rank} of {len(s)} coarse directions are zero or depend on the others: the "
            f"coarse space has dimension {rank}.",
            stacklevel=2,
        )
    inverse = (U * torch.where(kept, 1 / s.where(kept, 1.0), 0.0)) @ U.T / scale
    counts = [len(Z[name]) for name in ios]

    def apply(r: BlockValues) -> dict[str, Tensor]:
        onto = [torch.einsum("moi,oi->m", Z[name], r[name]) for name in ios]
        y = (inverse @ torch.cat(onto)).split(counts)
        return {n: torch.einsum("m,moi->oi", c, Z[n]) for n, c in zip(ios, y, strict=True)}

    return apply


# ---- both levels together -----------------------------------------------------------------------


def additive(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    """The paper's form: the sum of both steps.

    Use it in training: with a symmetric positive definite fine level it is so, too, and its steps
    descend. Not as a better solution of the system: curvature that both levels have counts twice.

    Cost: one fine step, no product with the curvature.
    """
    return lambda r: _sum(fine(r), Q(r))


def adef1(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    """The coarse step first, then the fine step on its residual.

    Use it where the gradient lies near the coarse space, which it solves exactly. Not with controls
    that need a symmetric map: it is none.

    Cost: one fine step and one product with the curvature.
    """

    def step(r: BlockValues) -> dict[str, Tensor]:
        x = Q(r)
        return _sum(fine(_difference(r, F(x))), x)

    return step


def adef2(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    r"""The fine step first, then the coarse step on its residual.

    Use it to solve the system of one batch better than the fine level. Not in training without a
    check: its guarantee is about another norm and about steps as they are, before a learning rate.
    In chapter 22 it trains with `residual_space` and a learning rate ten times KFAC's, and does not
    train with `nicolaides_space`.

    Law: the error to $F_\delta^{-1} r$ in the norm of $F_\delta$ is at most that of the fine step,
    for every fine level, every coarse space and every `r`.
    Cost: one fine step and one product with the curvature.
    """

    def step(r: BlockValues) -> dict[str, Tensor]:
        x = fine(r)
        return _sum(x, Q(_difference(r, F(x))))

    return step


def bnn(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    """Coarse, fine, coarse: the symmetric form (balancing Neumann-Neumann).

    Use it where a symmetric positive definite map is needed, for conjugate gradients. Not for the
    least cost.

    Cost: one fine step and two products with the curvature.
    """
    return adef2(adef1(fine, F, Q), F, Q)


# ---- for a model --------------------------------------------------------------------------------


def two_level(
    model: Module,
    ios: Mapping[str, LayerIO],
    maps: Mapping[str, LinearMap],
    damping: float,
    *,
    space: CoarseSpace = nicolaides_space,
    combine: Combination = adef2,
    rest: Callable[[Tensor], Tensor] | None = None,
) -> Preconditioner:
    """Two-level KFAC as a preconditioner: gradients to a step, by parameter name.

    Use it for one batch's system with curvature between layers. Not for averages over batches: the
    cross-blocks are those of `ios`.

    Cost: beyond `preconditioner(model, maps)`, the products with the curvature that `combine`
    takes, `coarse_matrix`, and an `m` by `m` system at every step.

    It has many parameters, because it has two levels and a rule to combine them.

    Args:
        model: The module that the blocks belong to.
        ios: All its blocks on one batch, from `layer_ios`, which define `F`.
        maps: The fine level, usually damped inverses, for the same blocks.
        damping: The damping of `F`.
        space: The coarse space, for example `nicolaides_space` or `krylov_space(residual_space)`.
        combine: The use of both levels: `adef2`, `additive`, `adef1` or `bnn`. The default has the
            guarantee for one system; `coarse_correction`, for training, has `additive`.
        rest: The map for values of parameters that no block covers, as in `preconditioner`.

    Raises:
        ValueError: If blocks, `ios` and maps do not go together, or a value has no block and
            `rest` is not given.
    """
    check_levels(space, combine)
    groups = groups_of(model, ios)
    names = [name for block in groups for name in block.names]
    if not set(names) == set(ios) == set(maps):
        raise ValueError(
            f"Two levels need the same blocks: {sorted(names)} are the model's, {sorted(ios)} have "
            f"a LayerIO, {sorted(maps)} have a map."
        )
    F = joint_curvature(ios, damping)

    def fine(r: BlockValues) -> dict[str, Tensor]:
        return {name: maps[name] @ v for name, v in r.items()}

    def step(r: BlockValues) -> Mapping[str, Tensor]:
        return combine(fine, F, coarse_inverse(ios, space(maps, r), damping))(r)

    return blockwise(groups, step, rest)


def check_levels(space: object, combine: object) -> None:
    """Refuse what is no coarse space, or no combination of both levels.

    Raises:
        TypeError: Naming the argument, its value and the way out.
    """
    check_function("space", space, "space=nicolaides_space")
    check_callable("combine", combine, "combine=additive")


def coarse_correction(
    fisher: BackpropagatedVectors,
    space: CoarseSpace = nicolaides_space,
    combine: Combination = additive,
) -> Control:
    """Two-level KFAC as a control: it corrects the preconditioned gradient of an optimizer's step.

    Use it as the first control, before those that change the length of the step. Not before
    `graft`, the optimizer's default: new lengths for every layer discard the ratios of lengths that
    a coarse level finds, and leave only signs of those of `residual_space`. And not with groups
    that differ in damping: a coarse level has one.

    Cost: in every step one more capture of the batch with the vectors of `fisher`, which gives the
    cross-blocks, and the coarse level as in `two_level`.

    Args:
        fisher: The vectors, see `losses`.
        space: The coarse space.
        combine: `additive`, `adef1`, `adef2` or `bnn`. With a positive definite fine level,
            `additive` and `bnn` are positive definite, too, and their steps descend. Those of
            `adef1` and `adef2` may ascend: the guarantee of `adef2` is about another norm.

    Raises:
        ValueError: From the control, if the batch is not known or dampings differ.
    """
    check_function("fisher", fisher, "fisher=type2")
    check_levels(space, combine)
    return partial(_corrected, fisher, space, combine, Plans())


def _corrected(
    fisher: BackpropagatedVectors,
    space: CoarseSpace,
    combine: Combination,
    plans: Plans,
    step: Step,
) -> Step:
    if not step.batches:
        raise ValueError("A coarse level needs the batch: call observe(X, y) in every step.")
    if step.placement.size > 1:
        raise NotImplementedError(
            f"A coarse level needs the whole batch, which is spread over {step.placement.size} "
            "processes here: train in one process, or without two_level."
        )
    damping, *others = set(step.damping.values())
    if others:
        raise ValueError(f"A coarse level needs one damping for all, got {[damping, *others]}.")
    model = step.batches[0][1].model
    groups = groups_of(model, step.inverses)
    ios = _on_all(step.batches, fisher, layer_names(model, groups), plans)
    r, x = (block_matrices(groups, values) for values in (step.gradient, step.direction))
    Q = coarse_inverse(ios, space(step.inverses, r), damping)

    def fine(v: BlockValues) -> dict[str, Tensor]:
        return dict(x) if v is r else {name: step.inverses[name] @ V for name, V in v.items()}

    both = combine(fine, joint_curvature(ios, damping), Q)
    return replace(step, direction=blockwise(groups, lambda _: both(r))(step.gradient))


def _on_all(
    batches: Batches, fisher: BackpropagatedVectors, layers: list[str], plans: Plans
) -> dict[str, LayerIO]:
    """Every layer on all batches together."""
    with torch.enable_grad():
        parts = [layer_ios(*batch, fisher, layers=layers, plan=plans) for _, batch in batches]
    if len(parts) == 1:
        return parts[0]
    shares = [share for share, _ in batches]
    return {n: concatenate([ios[n] for ios in parts], shares) for n in parts[0]}


def _sum(x: BlockValues, y: BlockValues) -> dict[str, Tensor]:
    return {name: x[name] + y[name] for name in x}


def _difference(x: BlockValues, y: BlockValues) -> dict[str, Tensor]:
    return {name: x[name] - y[name] for name in x}
