r"""Pruning: which weights a trained network can do without, and how the others reply.

Training with weight decay $\delta$ ends at a minimum of $J = L + \tfrac{\delta}{2} \lVert W
\rVert^2$. There, a change $\Delta$ of a block costs

$$
J(W + \Delta) - J(W) \approx \tfrac12 \langle \Delta, (M + \delta I) \Delta \rangle
$$

with the curvature $M$ of the *sum* $L$ of the losses. The damping is the weight decay. The loss
alone has the gradient $-\delta W$ at that point, so that its increase also has a term of first
order.

Setting one weight to zero costs $\tfrac12 w_i^2 (M + \delta I)_{ii}$ if the others stay (optimal
brain damage), and $\tfrac12 w_i^2 / ((M + \delta I)^{-1})_{ii}$ if they reply in the best way
(optimal brain surgeon). A reply to several zeros solves a system of equations. The costs of
single weights do not add up to the cost of several, except in the eigenbasis.

Sources: LeCun, Denker and Solla 1989; Hassibi and Stork 1993; Wang et al. 2019 (arXiv:1905.05934)
for Kronecker factors and the eigenbasis; Frantar and Alistarh 2023 (arXiv:2301.00774) for the input
factor alone.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kfac_scratch.applications.trained import WithDiagonal
from kfac_scratch.linalg import conjugate_gradient, eye_like
from kfac_scratch.matrices.damping import balance
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.matrix import LinearMap, check_damping


def costs_without_reply(
    W: Float[Tensor, "d_out d_in"], M: WithDiagonal, decay: float
) -> Float[Tensor, "d_out d_in"]:
    r"""Optimal brain damage: the cost of each weight's zero, $\tfrac12 w_i^2 (M + \delta I)_{ii}$.

    Use it as a baseline. Not to rank weights that depend on each other: `costs_with_reply`.

    Law: exact on a quadratic, for one weight. Several cost more or less than the sum.
    Cost: that of the diagonal.

    Args:
        W: Trained weights.
        M: The curvature of the sum of the losses.
        decay: The weight decay of that sum.

    Raises:
        ValueError: If the decay is negative.
        TypeError: For a matrix that does not know its diagonal.
    """
    _check(W, M, decay)
    return W.square() * (M.diagonal().reshape(W.shape) + decay) / 2


def costs_with_reply(
    W: Float[Tensor, "d_out d_in"], M: WithDiagonal, decay: float
) -> Float[Tensor, "d_out d_in"]:
    r"""Optimal brain surgeon: the cost of each weight's zero if the others reply.

    It is $\tfrac12 w_i^2 / ((M + \delta I)^{-1})_{ii}$.

    Use it to choose what is set to zero, and `reply` afterwards. Not for many weights at once
    without rounds: each cost assumes that no other weight is set to zero.

    Law: exact on a quadratic, for one weight. Never more than `costs_without_reply`.
    Cost: that of the inverse, and of its diagonal.

    Args:
        W: Trained weights.
        M: As in `costs_without_reply`.
        decay: As there; positive if the matrix is singular.

    Raises:
        ValueError: If the decay is negative, or 0 for a singular matrix.
        TypeError: For a matrix whose inverse does not know its diagonal.
    """
    _check(W, M, decay)
    inverse = M.inverse(decay)
    if not isinstance(inverse, WithDiagonal):
        raise TypeError(
            f"The inverse of a {type(M).__name__} does not know its diagonal: use Kronecker, "
            "KroneckerEigen, Dense or Diagonal."
        )
    return W.square() / inverse.diagonal().reshape(W.shape) / 2


def lowest(
    costs: Mapping[str, Float[Tensor, "d_out d_in"]],
    share: float,
    prunable: Mapping[str, Bool[Tensor, "d_out d_in"]],
) -> dict[str, Bool[Tensor, "d_out d_in"]]:
    """A mask of the weights to keep, if a share of those that may go is set to zero.

    The cheapest go.

    There is one threshold for all blocks. The costs are in units of the loss, so that they may be
    compared between layers.

    Args:
        costs: The cost of every weight, by block.
        share: Of the weights that may go, between 0 and 1; rounded to a whole number of them.
        prunable: Which may go: `weights_without_biases`, for example.

    Returns:
        True where a weight is kept, by block.

    Raises:
        ValueError: If the share is not between 0 and 1, the blocks differ, a shape differs, or a
            cost is not a number.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}: pass a number between 0 and 1.")
    if set(costs) != set(prunable):
        raise ValueError(
            f"costs has the blocks {sorted(costs)}, prunable {sorted(prunable)}: pass the same."
        )
    for name, cost in costs.items():
        if cost.shape != prunable[name].shape:
            raise ValueError(
                f"The costs of block {name!r} have the shape {tuple(cost.shape)}, prunable has "
                f"{tuple(prunable[name].shape)}."
            )
        if cost.isnan().any():
            raise ValueError(f"A cost of block {name!r} is not a number: look at its curvature.")
    allowed = torch.cat([costs[name][may].flatten() for name, may in prunable.items()])
    going = torch.zeros_like(allowed, dtype=torch.bool)
    going[allowed.argsort(stable=True)[: round(share * len(allowed))]] = True
    keep, parts = {}, going.split([int(may.sum()) for may in prunable.values()])
    for (name, may), part in zip(prunable.items(), parts, strict=True):
        keep[name] = torch.ones_like(may).masked_scatter(may, ~part)
    return keep


def reply(
    W: Float[Tensor, "d_out d_in"],
    M: WithDiagonal,
    decay: float,
    keep: Bool[Tensor, "d_out d_in"],
    max_iter: int = 300,
    tol: float | None = None,
) -> Float[Tensor, "d_out d_in"]:
    r"""The best weights $v$ with zeros outside of `keep`: $H_{KK} v_K = (H w)_K$.

    $H$ is $M + \delta I$, $w$ the trained weights, and $K$ the set of those to keep.

    Use it after every choice of zeros, by whatever cost: which weights go matters less than how
    the others reply. Not if far more than half of the weights go at once, which leaves the
    quadratic: do it in rounds, with the curvature at the new weights.

    Law: exact on a quadratic. Without zeros, the weights stay.
    Cost: a product with the matrix for each of at most `max_iter` conjugate gradient steps.

    Args:
        W: Trained weights.
        M: The curvature of the sum of the losses.
        decay: The weight decay of that sum.
        keep: True where a weight may differ from zero.
        max_iter: The number of steps after which the last iterate is returned.
        tol: As in `conjugate_gradient`.

    Raises:
        ValueError: If the decay is negative, the mask's shape is another, or the damped matrix is
            not positive definite.
        TypeError: For a matrix that does not know its diagonal, which preconditions.
    """
    _check(W, M, decay)
    if keep.shape != W.shape or keep.dtype != torch.bool:
        raise ValueError(
            f"keep is {keep.dtype} of shape {tuple(keep.shape)}: pass torch.bool of shape "
            f"{tuple(W.shape)}, True where a weight is kept."
        )
    diagonal = M.diagonal().reshape(W.shape) + decay
    if not (diagonal[keep] > 0).all():
        raise ValueError(
            "The curvature has zeros on its diagonal, so that the reply is not determined: pass a "
            "positive decay."
        )

    def product(V: Tensor) -> Tensor:
        return torch.where(keep, M @ V + decay * V, V)

    def precondition(V: Tensor) -> Tensor:
        return torch.where(keep, V / diagonal, V)

    b = torch.where(keep, M @ W + decay * W, 0.0)
    return torch.where(keep, conjugate_gradient(product, b, precondition, max_iter, tol), 0.0)


def row_costs(W: Float[Tensor, "d_out d_in"], K: Kronecker) -> Float[Tensor, " d_out"]:
    r"""The cost of zeros in each row if the others reply.

    It is $\tfrac12 w_o^\top A w_o / (B^{-1})_{oo}$ for the row $w_o$.

    Use it to remove whole outputs of a layer: neurons, or filters. Not for their inputs in the next
    layer: `column_costs`.

    Law: exact on a quadratic with the Hessian `B ⊗ A`, for one row.

    Args:
        W: Trained weights.
        K: The curvature with both factors damped, see `factored_damping`.

    Raises:
        ValueError: If `B` is not positive definite.
    """
    _check(W, K, 0.0)
    return ((W @ K.A) * W).sum(1) / Dense(K.B).inverse(0.0).M.diagonal() / 2


def without_row(
    W: Float[Tensor, "d_out d_in"], K: Kronecker, row: int
) -> Float[Tensor, "d_out d_in"]:
    r"""The best weights with zeros in one row: $W - (B^{-1})_{:o} / (B^{-1})_{oo} \, w_o^\top$.

    `A` is not in it: the reply to a row is the same for all inputs.

    Args:
        W: Trained weights.
        K: As in `row_costs`.
        row: Which output goes.

    Raises:
        ValueError: If `B` is not positive definite.
    """
    _check(W, K, 0.0)
    column = Dense(K.B).inverse(0.0).M[:, row]
    found = W - torch.outer(column / column[row], W[row])
    found[row] = 0.0  # where rounding has left less
    return found


def column_costs(W: Float[Tensor, "d_out d_in"], K: Kronecker) -> Float[Tensor, " d_in"]:
    r"""The cost of zeros in each column if the others reply.

    It is $\tfrac12 w_i^\top B w_i / (A^{-1})_{ii}$ for the column $w_i$.

    Use it for the neurons of the layer before: those whose outputs others can stand in for cost
    little. Not for the column of a bias, whose input is 1.

    Law: exact on a quadratic with the Hessian `B ⊗ A`, for one column.

    Args:
        W: Trained weights.
        K: As in `row_costs`.

    Raises:
        ValueError: If `A` is not positive definite.
    """
    _check(W, K, 0.0)
    return row_costs(W.T, Kronecker(K.B, K.A))


def without_column(
    W: Float[Tensor, "d_out d_in"], K: Kronecker, column: int
) -> Float[Tensor, "d_out d_in"]:
    r"""The best weights with zeros in one column: $W - w_i (A^{-1})_{i:} / (A^{-1})_{ii}$.

    Args:
        W: Trained weights.
        K: As in `row_costs`.
        column: Which input goes.

    Raises:
        ValueError: If `A` is not positive definite.
    """
    _check(W, K, 0.0)
    return without_row(W.T, Kronecker(K.B, K.A), column).T


def factored_damping(K: Kronecker, decay: float) -> Kronecker:
    r"""`(B + sqrt(decay) / pi * I) ⊗ (A + sqrt(decay) * pi * I)`: factored damping as a product.

    Use it for whole rows and columns, whose formulas need a Kronecker product. Not for single
    weights, whose formulas take the exact damping.

    Law: its inverse is `factored_inverse(K, decay)`.

    Args:
        K: The curvature.
        decay: The weight decay of the sum of the losses.

    Raises:
        ValueError: If the decay is negative.
    """
    check_damping(decay)
    pi, root = balance(K), math.sqrt(decay)
    return Kronecker(K.A + root * pi * eye_like(K.A), K.B + root / pi * eye_like(K.B))


def eigenbasis_costs(
    W: Float[Tensor, "d_out d_in"], M: KroneckerEigen, decay: float
) -> Float[Tensor, "d_out d_in"]:
    r"""The cost of each coefficient's zero in the eigenbasis.

    It is $\tfrac12 c_{oi}^2 (s_{oi} + \delta)$ with the coefficients $Q_B^\top W Q_A$.

    Use it to compress weights, and not to make them sparse: weights with few coefficients are still
    dense. Both bases have to be stored.

    Law: here costs add up, and the best reply leaves the kept coefficients as they are.

    Args:
        W: Trained weights.
        M: The curvature of the sum of the losses: `kfac(io).eigen()`, `ekfac(io)`.
        decay: The weight decay of that sum.

    Raises:
        ValueError: If the decay is negative.
    """
    _check(W, M, decay)
    return (M.QB.T @ W @ M.QA).square() * (M.scale + decay) / 2


def within_eigenbasis(
    W: Float[Tensor, "d_out d_in"], M: KroneckerEigen, keep: Bool[Tensor, "d_out d_in"]
) -> Float[Tensor, "d_out d_in"]:
    """The weights without the coefficients outside of `keep`.

    Args:
        W: Trained weights.
        M: The eigenbasis.
        keep: True where a coefficient is kept.
    """
    return M.QB @ torch.where(keep, M.QB.T @ W @ M.QA, 0.0) @ M.QA.T


def predicted_increase(
    change: Float[Tensor, "d_out d_in"], M: LinearMap, decay: float
) -> Float[Tensor, ""]:
    r"""The cost of a change, $\tfrac12 \langle \Delta, (M + \delta I) \Delta \rangle$.

    It is the growth of the loss *with* its weight decay.

    Law: exact at a minimum, if the loss is quadratic with the Hessian `M`, as for a linear model
    under the squared error.

    Args:
        change: New weights minus trained ones.
        M: The curvature of the sum of the losses.
        decay: The weight decay of that sum.

    Raises:
        ValueError: If the decay is negative.
    """
    check_damping(decay)
    return (change * (M @ change + decay * change)).sum() / 2


def _check(W: Tensor, M: object, decay: float) -> None:
    check_damping(decay)
    if not isinstance(M, WithDiagonal):
        raise TypeError(
            f"A {type(M).__name__} does not know its diagonal: use Kronecker, KroneckerEigen, "
            "Dense or Diagonal."
        )
    D = M.diagonal().numel()
    if W.numel() != D:
        raise ValueError(f"W has {W.numel()} weights, but the matrix belongs to {D}.")
    if not W.isfinite().all():
        raise ValueError("W has an entry that is not finite.")
