r"""Exact curvature by plain autodiff: slow, obvious, and independent of the rest of the package.

For a loss $L(f(\theta), y)$ over a batch, with the Jacobian
$J = \partial f / \partial \theta$ of all outputs, this module writes the definitions down:

$$
\underbrace{\nabla^2_\theta L}_\text{Hessian}
= \underbrace{J^\top (\nabla^2_f L)\, J}_\text{GGN} + \sum_k \frac{\partial L}{\partial f_k}
    \nabla^2_\theta f_k ,
\qquad
F = J^\top \Bigl(\tfrac{1}{D} \sum_n \mathbb{E}_{\hat y \sim p(\cdot \mid f_n)}
    [\nabla \ell_n \nabla \ell_n^\top]\Bigr) J .
$$

Everything acts on one flat vector: the trainable parameters in the order of
`model.named_parameters()`, each stacked by rows. `block_index` selects one layer's block from it,
in the layout of `LayerIO.block()`.

Use the dense functions for networks with up to a few thousand parameters $D$, in tests and
pictures: their memory is $D^2$, or the number of outputs times $D$. Use the products
(`*_product`) for larger ones: they need memory for a few vectors, and each costs about as much as
two to four gradients. Not for training: nothing here is cached or approximated.

Sources: Schraudolph 2002; Martens 2014 (arXiv:1412.1193), §§5, 8, 9; Kunstner et al. 2019
(arXiv:1905.12558).
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.func import functional_call, grad, jacrev, jvp, vjp
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Module, MSELoss

from kfac_scratch.capture.layer_groups import layer_groups
from kfac_scratch.losses import divisor

Product = Callable[[Float[Tensor, " D"]], Float[Tensor, " D"]]


def parameter_vector(model: Module) -> Float[Tensor, " D"]:
    """The trainable parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in _parameters(model).values()])


def flatten_values(model: Module, values: Mapping[str, Tensor]) -> Float[Tensor, " D"]:
    """Values by parameter name in the order of `parameter_vector`; a missing name means zeros."""
    parts = [values.get(name, torch.zeros_like(p)) for name, p in _parameters(model).items()]
    return torch.cat([part.detach().flatten() for part in parts])


def jacobian(model: Module, X: Tensor) -> Float[Tensor, "out D"]:
    """The derivative of every output entry (`out = f.numel()`, samples first) by every parameter.

    Cost: one reverse pass for each output entry; memory `out * D`.
    """
    network, theta = _network(model, X), parameter_vector(model)
    return jacrev(lambda t: network(t).flatten())(theta)


def loss_hessian(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "out out"]:
    """The second derivatives of the loss by the network's outputs: memory `out**2`."""
    gradient = grad(lambda v: loss(v.reshape(f.shape), y))
    return jacrev(gradient)(f.detach().flatten())


def hessian(model: Module, loss: Module, X: Tensor, y: Tensor) -> Float[Tensor, "D D"]:
    """The second derivatives of the loss by the parameters. Cost: `D` reverse passes."""
    network = _network(model, X)
    gradient = grad(lambda t: loss(network(t), y))  # torch 2.13: jacrev is wrong for LayerNorm
    return jacrev(gradient)(parameter_vector(model))


def ggn(model: Module, loss: Module, X: Tensor, y: Tensor) -> Float[Tensor, "D D"]:
    """The generalised Gauss-Newton matrix: the Hessian of the loss of the linearised network."""
    J, f = jacobian(model, X), _output(model, X)
    return J.T @ loss_hessian(loss, f, y) @ J


def fisher(model: Module, loss: Module, X: Tensor, y: Tensor) -> Float[Tensor, "D D"]:
    """The Fisher by its definition: gradients at every label, weighted by its probability.

    The average over labels is a finite sum: over classes, over {0, 1}, or over two points around
    a Gaussian's mean that have its variance. `y` only says how many terms the loss has.

    Raises:
        NotImplementedError: For losses whose targets change the likelihood (weights, smoothing).
    """
    f, J = _output(model, X), jacobian(model, X)
    # one label concerns all classes at one position, or a single output entry
    shape = (*f.shape[:2], -1) if isinstance(loss, CrossEntropyLoss) else (-1, 1, 1)
    J = J.reshape(*f.reshape(shape).shape, -1)  # [N, C, P, D] or [entries, 1, 1, D]
    F = J.new_zeros(J.shape[-1], J.shape[-1])
    for label, probability in _labels(loss, f):
        score = grad(_sum(loss))(f, label) * probability.sqrt()
        G = (J * score.reshape(shape).unsqueeze(-1)).sum(1).flatten(0, 1)  # one row per label
        F += G.T @ G
    return F / divisor(loss, f, y)


def empirical_fisher(model: Module, loss: Module, X: Tensor, y: Tensor) -> Float[Tensor, "D D"]:
    """The outer products of every sample's gradient at its label, over `losses.divisor`."""
    f, J = _output(model, X), jacobian(model, X)
    g = grad(_sum(loss))(f, y)
    G = torch.einsum("nkd,nk->nd", J.reshape(len(f), -1, J.shape[-1]), g.reshape(len(f), -1))
    return G.T @ G / divisor(loss, f, y)


def hessian_product(model: Module, loss: Module, X: Tensor, y: Tensor) -> Product:
    """The function `v -> H v`: derivative of the gradient along `v` (Pearlmutter 1994)."""
    network, theta = _network(model, X), parameter_vector(model)
    gradient = grad(lambda t: loss(network(t), y))
    return lambda v: vjp(gradient, theta)[1](v)[0]


def ggn_product(model: Module, loss: Module, X: Tensor, y: Tensor) -> Product:
    """The function `v -> G v`: forward, loss Hessian, backward (Schraudolph 2002)."""
    network, theta = _network(model, X), parameter_vector(model)
    gradient = grad(lambda f: loss(f, y))

    def product(v: Tensor) -> Tensor:
        f, Jv = _jvp(network, theta, v)
        HJv = vjp(gradient, f)[1](Jv)[0]
        return vjp(network, theta)[1](HJv)[0]

    return product


def ggn_gram(
    model: Module,
    loss: Module,
    X: Any,
    y: Tensor,
    directions: Float[Tensor, "K D"],
    theta: Float[Tensor, " D"] | None = None,
) -> Float[Tensor, "K K"]:
    """All products `u^T G v` of some directions, by one forward derivative for each direction.

    Args:
        model: The network.
        loss: The loss.
        X: Its input.
        y: Targets.
        directions: Changes of the parameters, as rows in the order of `parameter_vector`.
        theta: The parameters at which to linearise. Default: those of the model.
    """
    network, theta = _network(model, X), parameter_vector(model) if theta is None else theta
    gradient = grad(lambda f: loss(f, y))
    pairs = [_jvp(network, theta, v) for v in directions]
    J = torch.stack([Jv.flatten() for _, Jv in pairs])
    HJ = torch.stack([vjp(gradient, f)[1](Jv)[0].flatten() for f, Jv in pairs])
    return J @ HJ.T


def empirical_fisher_product(model: Module, loss: Module, X: Tensor, y: Tensor) -> Product:
    """The function `v -> E v`: project on every sample's gradient, send the projections back."""
    network, theta = _network(model, X), parameter_vector(model)
    f = _output(model, X)
    g, D = grad(_sum(loss))(f, y), divisor(loss, f, y)

    def product(v: Tensor) -> Tensor:
        Jv = _jvp(network, theta, v)[1]
        along = (g * Jv).reshape(len(g), -1).sum(1)  # [N]
        along = along.reshape(-1, *[1] * (g.ndim - 1))
        return vjp(network, theta)[1](g * along)[0] / D

    return product


def block_index(
    model: Module, layers: Collection[str] | None = None
) -> dict[str, Int[Tensor, "d_out d_in"]]:
    """The places of every block's `W`, bias columns included, in the flat parameter vector.

    `M[index][:, index]` with the flattened index is a layer's block of a dense matrix `M`.

    Args:
        model: Any module.
        layers: Names of the layers, see `layer_groups`. Default: all supported ones.
    """
    places, start = {}, 0
    for name, p in _parameters(model).items():
        places[name] = torch.arange(start, start + p.numel(), device=p.device).reshape(p.shape)
        start += p.numel()
    groups = layer_groups(model, layers)
    return {n: W for b in groups for n, W in zip(b.names, b.matrices(places), strict=True)}


def diagonal_blocks(
    model: Module, M: Float[Tensor, "D D"], layers: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Cut a dense matrix into the blocks of a model's layers, or of the named ones, by name."""
    index = {name: W.flatten() for name, W in block_index(model, layers).items()}
    return {name: M[i][:, i] for name, i in index.items()}


def _parameters(model: Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _network(model: Module, X: Any) -> Callable[[Tensor], Tensor]:
    """The network as a function of its flat parameter vector."""
    shapes = {name: p.shape for name, p in _parameters(model).items()}
    places = _places(model)

    def network(theta: Tensor) -> Tensor:
        parts = theta.split([shape.numel() for shape in shapes.values()])
        values = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}
        everywhere = {place: values[name] for place, name in places.items()}
        return functional_call(model, everywhere, (X,), tie_weights=False)

    return network


def _places(model: Module) -> dict[str, str]:
    """The parameter's name for every place of the model that holds a trainable parameter.

    With this, `functional_call` need not find tied weights by itself, which damages a model that
    has one module under two names (PyTorch issue 164759).
    """
    names = {id(p): name for name, p in _parameters(model).items()}
    return {
        f"{path}.{attribute}" if path else attribute: names[id(p)]
        for path, module in model.named_modules()
        for attribute, p in module._parameters.items()
        if id(p) in names
    }


def _jvp(network: Callable[[Tensor], Tensor], theta: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    f, Jv = jvp(network, (theta,), (v,))  # type: ignore[misc]  # (two values without has_aux)
    return f, Jv


def _output(model: Module, X: Tensor) -> Tensor:
    with torch.no_grad():
        return model(X).clone()


def _sum(loss: Module) -> Module:
    """The same loss with sum reduction."""
    total = copy.copy(loss)
    setattr(total, "reduction", "sum")  # noqa: B010
    return total


def _labels(loss: Module, f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels for all outputs at once, and the probability of each: a finite sum for `fisher`."""
    match loss:
        case CrossEntropyLoss(weight=None, label_smoothing=0.0):
            p = f.softmax(1)
            for c in range(f.shape[1]):
                yield torch.full_like(f[:, 0], c, dtype=torch.long), p[:, c : c + 1]
        case BCEWithLogitsLoss(weight=None, pos_weight=None):
            yield torch.ones_like(f), f.sigmoid()
            yield torch.zeros_like(f), (-f).sigmoid()
        case MSELoss():  # variance 1/2: the squared error itself is the negative log-likelihood
            for side in (-1, 1):
                yield f + side * 0.5**0.5, torch.full_like(f, 0.5)
        case _:
            raise NotImplementedError(
                f"The labels of {loss} are not drawn from a distribution that depends on the "
                "outputs alone. Its GGN exists: use ggn."
            )
