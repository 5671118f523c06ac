r"""Merging: one network that knows what several networks have learnt, without their data.

Networks $k$ of the same shape were trained on parts of the data, each with the weight decay
$\delta$ towards the same start $W_0$. Near its own minimum, the $k$-th sum of losses and its decay
are nearly quadratic, with the curvature $M_k + \delta I$. Training on all data is approximated by
the minimum of the sum of these quadratics, with the decay counted *once*:

$$
\Bigl( \sum_k M_k + \delta I \Bigr) W
= \sum_k (M_k + \delta I) W_k - (K - 1) \, \delta W_0 .
$$

Each network is the maximum of a posterior, which contains the prior around the start. The product
of the posteriors contains the prior $K$ times, and has to be divided by it $K - 1$ times. The
choice of $M_k$ is the method: for $\delta = 0$, the identity averages weights, a diagonal is Fisher
merging, and the input factor alone, as a sum over data, is RegMean. Both factors are KFAC merging.

Sources: Matena and Raffel 2022 (arXiv:2111.09832), Jin et al. 2023 (arXiv:2212.09849), Tam, Bansal
and Raffel 2024 (arXiv:2312.04339).
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from jaxtyping import Float
from torch import Tensor

from kfac_scratch.applications.trained import WithDiagonal
from kfac_scratch.linalg import conjugate_gradient
from kfac_scratch.matrices.matrix import check_damping

Weights = Mapping[str, Float[Tensor, "d_out d_in"]]
"""A matrix `[W | b]` for each block, by its name."""


def merged(
    weights: Sequence[Weights],
    matrices: Sequence[Mapping[str, WithDiagonal]],
    decay: float,
    start: Weights,
    max_iter: int | None = None,
) -> dict[str, Float[Tensor, "d_out d_in"]]:
    """The weights of one network from those of several, block by block.

    Use it for networks of one shape that were trained from the same start, in order not to train on
    all data again. Not for networks from different starts: their hidden units do not correspond,
    and the minima are far from each other. And not with the curvature of a *mean* loss, which the
    decay would outweigh, and which does not grow with the number of data.

    Law: for linear models under the squared error, with KFAC or the block, it is the model that
    would have been trained on all data.
    Cost: a product with every matrix for each step of conjugate gradients.

    Args:
        weights: Of each network: `trained_weights`.
        matrices: Of each network, by block: the curvature of its sum of losses at its weights.
        decay: The weight decay of every sum, towards the start.
        start: The weights to which the decay drew all networks: zeros, or those of a network that
            was trained before.
        max_iter: As in `conjugate_gradient`.

    Raises:
        ValueError: For fewer than two networks, networks with other blocks or shapes, a negative
            decay, or a decay of 0 for a direction in which no network has curvature.
        TypeError: For a matrix that does not know its diagonal.
    """
    check_damping(decay)
    _check(weights, matrices, start)
    return {
        name: merged_block(
            [Ws[name] for Ws in weights],
            [Ms[name] for Ms in matrices],
            decay,
            start[name],
            max_iter,
        )
        for name in start
    }


def merged_block(
    Ws: Sequence[Float[Tensor, "d_out d_in"]],
    Ms: Sequence[WithDiagonal],
    decay: float,
    start: Float[Tensor, "d_out d_in"],
    max_iter: int | None = None,
) -> Float[Tensor, "d_out d_in"]:
    """`merged` for one block: the solution of the module's equation by conjugate gradients.

    The summed diagonals precondition.

    Args:
        Ws: The block's weights in each network.
        Ms: Its curvature in each.
        decay: As in `merged`.
        start: As there.
        max_iter: As there.

    Raises:
        ValueError: If some direction has neither curvature nor decay.
    """
    differences = [W - start for W in Ws]  # so that no term with the start is left
    b = reduce(torch.add, (M @ D + decay * D for M, D in zip(Ms, differences, strict=True)))
    diagonal = reduce(torch.add, (M.diagonal() for M in Ms)).reshape(start.shape) + decay
    if not (diagonal > 0).all():
        raise ValueError(
            "Some weights have no curvature in any network, so that their values are not "
            "determined: pass a positive decay."
        )

    def product(V: Tensor) -> Tensor:
        return reduce(torch.add, (M @ V for M in Ms)) + decay * V

    return start + conjugate_gradient(product, b, lambda V: V / diagonal, max_iter)


def _check(
    weights: Sequence[Weights], matrices: Sequence[Mapping[str, object]], start: Weights
) -> None:
    if len(weights) < 2 or len(weights) != len(matrices):
        raise ValueError(
            f"There are the weights of {len(weights)} networks and the matrices of "
            f"{len(matrices)}: pass both for each of two networks or more."
        )
    for k, (Ws, Ms) in enumerate(zip(weights, matrices, strict=True)):
        for what, blocks in (("weights", Ws), ("matrices", Ms)):
            if set(blocks) != set(start):
                raise ValueError(
                    f"{what}[{k}] has the blocks {sorted(blocks)}, start {sorted(start)}: networks "
                    "of one shape have the same."
                )
        for name, W in Ws.items():
            if W.shape != start[name].shape:
                raise ValueError(
                    f"Block {name!r} has the shape {tuple(W.shape)} in weights[{k}], and "
                    f"{tuple(start[name].shape)} in start."
                )
            M = Ms[name]
            if not isinstance(M, WithDiagonal):
                raise TypeError(
                    f"matrices[{k}][{name!r}] is a {type(M).__name__}, which does not know its "
                    "diagonal: use Kronecker, KroneckerEigen, Dense or Diagonal."
                )
