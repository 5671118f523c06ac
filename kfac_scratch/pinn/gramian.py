r"""The Gauss-Newton matrix of a PINN: its products, its blocks, the whole matrix and the kernel.

All residuals together are a vector $\rho$ with one entry for each residual of each point. With its
Jacobian $J$, whose rows are the gradients $\operatorname{vec}(\sum_s g_{ns} a_{ns}^\top)$ of all
layers side by side,

$$
\nabla L = J^\top \rho, \qquad \text{Gramian } J^\top J, \qquad \text{kernel } J J^\top .
$$

Products with $J$ need two small matrix products per layer and no graph: $(J V)_n = \sum_s
g_{ns}^\top V a_{ns}$.

Sources: Müller and Zeinhofer 2023 (arXiv:2302.13163) for the Gramian; Dangel, Müller and Zeinhofer
2024 (arXiv:2405.15603), §3; Guzmán-Cordero et al. 2025 (arXiv:2505.12149) for the kernel.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.layer_io import LayerIO
from kfac_scratch.pinn.constants import pinn_blocks
from kfac_scratch.pinn.terms import Linearization

Direction = Mapping[str, Tensor]  # a matrix [d_out, d_in] for each block; a missing one is zero


def block_weights(model: Module) -> dict[str, Tensor]:
    """The `W` of every block, copied."""
    values = {name: p.detach() for name, p in model.named_parameters()}
    return {
        name: W.clone()
        for block in pinn_blocks(model)
        for name, W in zip(block.names, block.matrices(values), strict=True)
    }


def assign(model: Module, W: Direction) -> None:
    """Write the `W` of every block into the model's parameters."""
    with torch.no_grad():
        for block in pinn_blocks(model):
            for name, value in block.parameters([W[n] for n in block.names]).items():
                model.get_parameter(name).copy_(value)


@contextmanager
def kept_on_error(model: Module) -> Iterator[dict[str, Tensor]]:
    """The `W` of every block, copied, and written back if anything raises.

    Memory: a copy of the weights.
    """
    W = block_weights(model)
    try:
        yield W
    except BaseException:  # an interrupt from the keyboard, too
        assign(model, W)
        raise


def check_direction(direction: Direction) -> None:
    """Refuse a direction that is not finite, before any weight has moved.

    Raises:
        ValueError: Naming the block.
    """
    for name, V in direction.items():
        if not bool(V.isfinite().all()):
            raise ValueError(
                f"The step of block {name!r} is not finite; the weights were not changed. Look for "
                "points where the residual has no derivative, or use a larger damping."
            )


def moved(W: Direction, direction: Direction, step: float = 1.0) -> dict[str, Tensor]:
    """`W + step * direction`."""
    return {n: torch.add(W[n], direction[n], alpha=step) if n in direction else W[n] for n in W}


def inner_product(x: Direction, y: Direction) -> Float[Tensor, ""]:
    """The inner product of two directions."""
    zero = next(iter(x.values())).new_zeros(())
    return sum(((x[n] * y[n]).sum() for n in x.keys() & y.keys()), zero)


def flat(terms: Iterable[Sequence[Linearization]]) -> list[Linearization]:
    """All parts of all terms, one after the other."""
    return [part for term in terms for part in term]


def residuals(parts: Sequence[Linearization]) -> Float[Tensor, " K"]:
    """All residuals as one vector: part by part, and within a part residual by residual."""
    return torch.cat([part.residuals.flatten() for part in parts])


def times(parts: Sequence[Linearization], v: Direction) -> Float[Tensor, " K"]:
    """The product `J v`. Cost: `N * S * d_out * d_in` operations for each layer, and no graph."""
    return torch.cat([_times(part, v).flatten() for part in parts])


def _times(part: Linearization, v: Direction) -> Float[Tensor, "M N"]:
    """`g^T V a` for every residual, beginning with the product with the longer of `g` and `a`."""
    total = torch.zeros_like(part.residuals)
    for name in v.keys() & part.ios.keys():
        (a, g), V = (part.ios[name].a, part.ios[name].g), v[name]
        products = (a @ V.T) * g if len(V) < V.shape[1] else (g @ V) * a
        total += products.sum((2, 3))
    return total


def transposed_times(parts: Sequence[Linearization], y: Float[Tensor, " K"]) -> dict[str, Tensor]:
    """The product `J^T y`; with all residuals for `y`, it is the gradient of the loss.

    Cost: as `times`.
    """
    result: dict[str, Tensor] = {}
    for part, of_part in zip(parts, y.split([p.residuals.numel() for p in parts]), strict=True):
        scale = of_part.view_as(part.residuals)[..., None, None]
        for name, io in part.ios.items():
            product = _weighted_sum(scale, io)
            result[name] = product + result[name] if name in result else product
    return result


def _weighted_sum(scale: Float[Tensor, "V N 1 1"], io: LayerIO) -> Float[Tensor, "d_out d_in"]:
    """`sum_vns scale_vn g_vns a_ns^T`. The shorter of `g` and `a` is scaled."""
    if io.g.shape[-1] < io.a.shape[-1]:
        return (scale * io.g).sum(0).flatten(0, 1).T @ io.a.flatten(0, 1)
    return io.g.flatten(0, 2).T @ (scale * io.a).flatten(0, 2)


def layer_jacobian(parts: Sequence[Linearization], name: str) -> Float[Tensor, "K D"]:
    """The columns of `J` that belong to one block. Memory: `K * D`."""
    return torch.cat([part.ios[name].gradients().flatten(2).flatten(0, 1) for part in parts])


def gramian(parts: Sequence[Linearization]) -> Float[Tensor, "D D"]:
    """The Gramian `J^T J` of all blocks, one part at a time.

    Cost: `K * D**2` operations, halved by symmetry; memory `D**2`, and `D` times the residuals of
    one part.

    Raises:
        ValueError: If there are no parts.
    """
    if not parts:
        raise ValueError("There are no points: the Gramian needs at least one linearised part.")
    size = sum(io.a.shape[-1] * io.g.shape[-1] for io in parts[0].ios.values())
    total = parts[0].residuals.new_zeros(size, size)
    for part in parts:
        _add_outer(total, torch.cat([layer_jacobian([part], name) for name in part.ios], dim=1).T)
    return _mirrored(total)


def layer_gramian(parts: Sequence[Linearization], name: str) -> Float[Tensor, "D D"]:
    """The block of `J^T J` that belongs to one layer."""
    return torch.stack([part.ios[name].block() for part in parts]).sum(0)


def kernel_matrix(parts: Sequence[Linearization]) -> Float[Tensor, "K K"]:
    """The kernel `J J^T`, block by block.

    Cost: `K**2 * D` operations, halved by symmetry; memory `K**2`, and `K` times the weights of the
    largest block.
    """
    size = sum(part.residuals.numel() for part in parts)
    total = parts[0].residuals.new_zeros(size, size)
    for name in parts[0].ios:
        _add_outer(total, layer_jacobian(parts, name))
    return _mirrored(total)


def _add_outer(total: Float[Tensor, "K K"], X: Float[Tensor, "K D"], size: int = 128) -> None:
    """Add the lower triangle of `X X^T`, `size` rows at a time: half the work."""
    for start in range(0, len(X), size):
        end = start + size
        total[start:end, :end].addmm_(X[start:end], X[:end].T)


def _mirrored(lower: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    """The symmetric matrix with this lower triangle."""
    return lower.tril() + lower.tril(-1).T


def joined(ios: Sequence[LayerIO]) -> LayerIO:
    """The points of several terms as one batch of a layer.

    Terms with fewer coefficients or residuals are padded with zeros, which change no gradient.
    Law: `joined(ios).block()` is the sum of the blocks. Memory: that of all points, each with the
    largest numbers of coefficients and residuals.
    """
    V, S = max(len(io.g) for io in ios), max(io.a.shape[1] for io in ios)
    a = [torch.nn.functional.pad(io.a, (0, 0, 0, S - io.a.shape[1])) for io in ios]
    g = [
        torch.nn.functional.pad(io.g, (0, 0, 0, S - io.a.shape[1], 0, 0, 0, V - len(io.g)))
        for io in ios
    ]
    return LayerIO(torch.cat(a), torch.cat(g, dim=1))
