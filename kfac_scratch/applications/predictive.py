r"""Predictions with a Laplace approximation: mean and covariance of a linearised network's outputs.

$f(x, W + \Delta) \approx f(x, W) + J(x) \Delta$ makes the outputs normal, with covariance
$J \Sigma J^\top$. The Jacobian's rows are gradients $\sum_s g_s a_s^\top$, so that a `LayerIO`
whose vectors are unit vectors holds it.

The posterior's curvature is that of this *linearised* network, the generalised Gauss-Newton matrix.
So weights are sampled for the linearised network, too. A sample of weights that is sent through the
network itself meets its nonlinearity, which the curvature never saw.

Source: Immer, Korzepa and Bauer 2021 (arXiv:2008.08216), on predicting with the linearised network;
MacKay 1992 (Neural Computation 4(5)), for the probit approximation.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import Module, MSELoss

from kfac_scratch.applications.laplace import Laplace
from kfac_scratch.applications.trained import layers_of
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import LinearMap

CHUNK = 2**24  # numbers of gradients that are formed at once


def output_vectors(loss: Module, f: Tensor, y: Tensor) -> Float[Tensor, "C N C"]:
    """Unit vectors at the model's output: `LayerIO.gradients()` is then the Jacobian.

    Use it as `fisher=` where the outputs' own derivatives are needed, with any loss and targets:
    both are ignored. Not for curvature.

    Raises:
        ValueError: If an output is not one vector for each sample.
    """
    if f.ndim != 2:
        raise ValueError(
            f"The model's output has the shape {tuple(f.shape)}: predictions need one vector for "
            "each sample, [N, C]."
        )
    return torch.eye(f.shape[1]).to(f).unsqueeze(1).expand(-1, *f.shape)


def functional_covariance(covariance: LinearMap, io: LayerIO) -> Float[Tensor, "N V V"]:
    r"""The covariances $\langle G_u, \Sigma G_v \rangle$ of every sample's vectors.

    Use it with `output_vectors`, for the part of a layer's weights in the outputs' covariance.

    Cost: a product with the covariance for each vector of each sample. Gradients are formed for a
    chunk of the samples at a time, of at most `CHUNK` numbers.

    Args:
        covariance: Of the block's weights.
        io: The layer, with vectors `u` and `v`.
    """
    V, N, _, d_out = io.g.shape
    chunk = max(1, CHUNK // (V * d_out * io.a.shape[-1]))
    found = []
    for n in range(0, N, chunk):
        G = LayerIO(io.a[n : n + chunk], io.g[:, n : n + chunk]).gradients()
        found.append(torch.einsum("unoi,vnoi->nuv", G, covariance @ G))
    return torch.cat(found)


def predicted_outputs(
    posterior: Laplace, model: Module, X: Any
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C C"]]:
    """Mean and covariance of the outputs of the linearised network.

    Use it for predictions with their uncertainty. For regression, add the noise `1 / (2 beta)` to
    the variances. Not for outputs with positions.

    Cost: a forward pass and `C` reverse passes, and `functional_covariance` for every block.

    Args:
        posterior: Of this model.
        model: As it was given to `laplace`.
        X: Inputs.

    Raises:
        ValueError: If the model has not the blocks of the posterior, its outputs are not `[N, C]`,
            and for what `layer_ios` refuses.
    """
    with torch.no_grad():
        f = model(X)
    layers = layers_of(model, posterior.weights)
    ios = layer_ios(model, MSELoss(), X, f, output_vectors, layers=layers)
    if set(ios) != set(posterior.weights):
        raise ValueError(
            f"The model has the blocks {sorted(ios)}, the posterior {sorted(posterior.weights)}: "
            "predict with the model that the posterior was made for."
        )
    parts = [functional_covariance(S, ios[name]) for name, S in posterior.covariances().items()]
    return f, torch.stack(parts).sum(0)


def probit(f: Float[Tensor, "N C"], covariance: Float[Tensor, "N C C"]) -> Float[Tensor, "N C"]:
    r"""Class probabilities by the probit approximation: logits over $\sqrt{1 + \pi v / 8}$.

    Use it for a fast answer. It knows the variances `v` alone, no covariances:
    `sampled_probabilities` knows both.
    """
    v = covariance.diagonal(dim1=1, dim2=2)
    return (f / (1 + math.pi / 8 * v).sqrt()).softmax(1)


def sampled_probabilities(
    f: Float[Tensor, "N C"],
    covariance: Float[Tensor, "N C C"],
    samples: int,
    generator: Generator | None = None,
) -> Float[Tensor, "N C"]:
    """The mean of the class probabilities over samples of normal logits.

    Use it where classes are correlated. Its error falls with the root of the number of samples.

    Args:
        f: Mean of the logits.
        covariance: Their covariance.
        samples: How many.
        generator: Source of randomness on the device of `f`. Default: torch's own.
    """
    s, Q = torch.linalg.eigh(covariance)
    root = Q * s.clamp_min(0).sqrt().unsqueeze(-2)
    noise = torch.randn(samples, *f.shape, 1, generator=generator, device=f.device, dtype=f.dtype)
    return (f + (root @ noise).squeeze(-1)).softmax(-1).mean(0)
