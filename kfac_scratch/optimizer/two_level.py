r"""Two-level KFAC: what the blocks leave out, put back in a small space.

A block-diagonal preconditioner $M^{-1}$ sees no curvature between layers. A second, coarse level
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

Sources: Tselepidis, Kohler and Orvieto 2020 (arXiv:2011.00573), the additive form with one
direction per layer; Koroko et al. 2023 (arXiv:2303.18083) for other coarse spaces; the names of the
forms are those of Tang, Nabben, Vuik and Erlangga 2009 (doi:10.1007/s10915-009-9272-6).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.border import check_callable, check_function
from kfac_scratch.capture.hooks import layer_ios
from kfac_scratch.capture.layer_groups import layer_groups, layer_names
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import BackpropagatedVectors
from kfac_scratch.matrices.matrix import LinearMap, check_damping
from kfac_scratch.optimizer.coarse_spaces import BlockValues, CoarseSpace, Space, nicolaides_space
from kfac_scratch.optimizer.preconditioner import Preconditioner, block_matrices, blockwise
from kfac_scratch.optimizer.step_control import Control, Step

BlockMap = Callable[[BlockValues], dict[str, Tensor]]
Combination = Callable[[BlockMap, BlockMap, BlockMap], BlockMap]

# ---- the curvature of all layers ----------------------------------------------------------------


def gradient_products(
    ios: Mapping[str, LayerIO], X: BlockValues
) -> dict[str, Float[Tensor, "V N"]]:
    """Products of every vector's gradient with `X`, for each block: `sum_s g^T X a`."""
    return {name: torch.einsum("vnso,nso->vn", io.g, io.a @ X[name].mT) for name, io in ios.items()}


def joint_curvature(ios: Mapping[str, LayerIO], damping: float = 0.0) -> BlockMap:
    """The product with `F + damping * I`, cross-blocks included, of all blocks on one batch.

    Exact for a model's GGN or Fisher, because the vectors of all layers are the same ones, seen at
    different depths. Needs `layer_ios` with `EXPAND`.
    """
    check_damping(damping)

    def product(X: BlockValues) -> dict[str, Tensor]:
        total = torch.stack(list(gradient_products(ios, X).values())).sum(0)  # [V, N]
        return {
            name: torch.einsum("vn,vnso,nsi->oi", total, io.g, io.a) + damping * X[name]
            for name, io in ios.items()
        }

    return product


# ---- the coarse level ---------------------------------------------------------------------------


def coarse_matrix(ios: Mapping[str, LayerIO], Z: Space, damping: float) -> Float[Tensor, "m m"]:
    r"""The exact Galerkin matrix $E = Z^\top (F + \delta I) Z$.

    $F$ is a sum of outer products of gradients, so that $Z^\top F Z$ is one of their products with
    the directions. Damping enters as $\delta Z^\top Z$.
    """
    phi, lengths = [], []
    for name, io in ios.items():
        z = torch.einsum("nsi,moi->mnso", io.a, Z[name])
        phi.append(torch.einsum("vnso,mnso->mvn", io.g, z).flatten(1))
        lengths.append(Z[name].flatten(1) @ Z[name].flatten(1).T)
    rows = torch.cat(phi)  # [m, VN]
    return rows @ rows.T + damping * torch.block_diag(*lengths)


def coarse_inverse(ios: Mapping[str, LayerIO], Z: Space, damping: float) -> BlockMap:
    r"""The map $Q = Z E^{-1} Z^\top$.

    Depends on the span of the directions only; directions that are zero, or depend on others, do
    no harm.
    """
    E = coarse_matrix(ios, Z, damping)
    size = E.diagonal().sqrt()
    size = size.where(size > 0, 1.0)  # of a direction that is zero
    scale = torch.outer(size, size)
    inverse = torch.linalg.pinv(E / scale, hermitian=True) / scale
    counts = [len(Z[name]) for name in ios]

    def apply(r: BlockValues) -> dict[str, Tensor]:
        onto = [torch.einsum("moi,oi->m", Z[name], r[name]) for name in ios]
        y = (inverse @ torch.cat(onto)).split(counts)
        return {n: torch.einsum("m,moi->oi", c, Z[n]) for n, c in zip(ios, y, strict=True)}

    return apply


# ---- both levels together -----------------------------------------------------------------------


def additive(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    """The paper's form: the sum of both steps. Counts twice what both levels see."""
    return lambda r: _sum(fine(r), Q(r))


def adef1(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    """Coarse step first, then the fine one on what is left. Not symmetric."""

    def step(r: BlockValues) -> dict[str, Tensor]:
        x = Q(r)
        return _sum(fine(_difference(r, F(x))), x)

    return step


def adef2(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    r"""Fine step first, then the coarse one on what is left.

    Law: the error to $F_\delta^{-1} r$ in the norm of $F_\delta$ is at most that of the fine step,
    for every fine level, every coarse space and every `r`.
    """

    def step(r: BlockValues) -> dict[str, Tensor]:
        x = fine(r)
        return _sum(x, Q(_difference(r, F(x))))

    return step


def bnn(fine: BlockMap, F: BlockMap, Q: BlockMap) -> BlockMap:
    """Coarse, fine, coarse: the symmetric form (balancing Neumann-Neumann)."""
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
    """What `preconditioner(model, maps)` is for one level: gradients to a step, by parameter name.

    Beyond KFAC's work a step costs one product with the curvature, as many with the directions as
    there are, and an `m` by `m` system.

    Args:
        model: The module that the blocks belong to.
        ios: All its blocks on one batch, from `layer_ios`, which define `F`.
        maps: The fine level, usually damped inverses, for the same blocks.
        damping: The damping of `F`.
        space: Where the coarse level looks, for example `nicolaides_space` or
            `krylov_space(residual_space)`.
        combine: How to use both levels, `adef2`, `additive`, `adef1` or `bnn`.
        rest: What to do with values of parameters that no block covers, as in `preconditioner`.

    Raises:
        ValueError: If blocks, `ios` and maps do not go together, or a value has no block and
            `rest` is not given.
    """
    check_levels(space, combine)
    groups = [block for block in layer_groups(model) if set(block.names) & set(ios)]
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
    """Two levels as a step control: corrects the preconditioned gradient of an optimizer's step.

    Put it first, before what changes the length of the step. Every step sends the vectors of
    `fisher` back once more: the cross-blocks are those of the batch itself.

    Args:
        fisher: The vectors, see `losses`.
        space: Where the coarse level looks.
        combine: `additive` or `adef2`, which use the fine level once. A step of `adef2` may ascend,
            since its guarantee is about another norm: in training, `additive` is the safer one.
    """
    check_function("fisher", fisher, "fisher=type2")
    check_levels(space, combine)

    def control(step: Step) -> Step:
        if step.batch is None:
            raise ValueError("A coarse level needs the batch: call observe(X, y) in every step.")
        damping, *others = set(step.damping.values())
        if others:
            raise ValueError(f"A coarse level needs one damping for all, got {[damping, *others]}.")
        model, loss, X, y = step.batch
        groups = [block for block in layer_groups(model) if set(block.names) <= set(step.inverses)]
        with torch.enable_grad():
            ios = layer_ios(model, loss, X, y, fisher, layers=layer_names(model, groups))
        r, x = (block_matrices(groups, values) for values in (step.gradient, step.direction))
        Q = coarse_inverse(ios, space(step.inverses, r), damping)
        both = combine(lambda _: x, joint_curvature(ios, damping), Q)
        return replace(step, direction=blockwise(groups, lambda _: both(r))(step.gradient))

    return control


def _sum(x: BlockValues, y: BlockValues) -> dict[str, Tensor]:
    return {name: x[name] + y[name] for name in x}


def _difference(x: BlockValues, y: BlockValues) -> dict[str, Tensor]:
    return {name: x[name] - y[name] for name in x}
