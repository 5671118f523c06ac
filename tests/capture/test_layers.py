import pytest
import torch
from torch.nn import Embedding, Linear

from kfac_scratch.capture.layers import (
    averaged_rows,
    check_layer,
    input_rows,
    output_rows,
    weight_matrix,
    weight_tensor,
)
from tests.cases import GEOMETRIES
from tests.laws import check_equal

N, V = 5, 3
LAYERS = {
    "linear": (lambda: Linear(7, 4), lambda: torch.randn(N, 7)),
    "linear-sequence": (lambda: Linear(7, 4), lambda: torch.randn(N, 2, 7)),
    "linear-grid": (lambda: Linear(7, 4, bias=False), lambda: torch.randn(N, 2, 3, 7)),
    "embedding": (lambda: Embedding(7, 4), lambda: torch.randint(7, (N,))),
    "embedding-grid": (lambda: Embedding(7, 4), lambda: torch.randint(7, (N, 2, 3))),
    "embedding-padded": (
        lambda: Embedding(7, 4, padding_idx=2),
        lambda: torch.randint(7, (N, 11)),
    ),
} | {
    name: (make, lambda shape=shape: torch.randn(N, *shape))
    for name, (make, shape) in GEOMETRIES.items()
}
EVERY = pytest.mark.parametrize("name", LAYERS)


def example(name, device, dtype=torch.float64):
    make, inputs = LAYERS[name]
    layer, x = make().to(device, dtype), inputs()
    return layer, (x.to(device, dtype) if x.is_floating_point() else x.to(device))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_is_one_matrix_applied_to_rows(name, dtype, device):
    layer, x = example(name, device, dtype)
    a, W = input_rows(layer, x).to(dtype), weight_matrix(layer, layer.weight)
    z = torch.einsum("knsi,koi->knso", a, W)
    if getattr(layer, "bias", None) is not None:
        z = z + layer.bias.reshape(len(W), 1, 1, -1)
    check_equal(z, output_rows(layer, layer(x).unsqueeze(0))[:, 0])


@EVERY
def test_gradient_of_the_weight_is_the_sum_of_outer_products(name, device):
    """Also where a row is zero: the padding index of an embedding has no gradient."""
    layer, x = example(name, device)
    z = layer(x)
    g = torch.randn(V, *z.shape, device=device)
    (expected,) = torch.autograd.grad(z, layer.weight, g, is_grads_batched=True)
    G = torch.einsum("kvnso,knsi->vkoi", output_rows(layer, g), input_rows(layer, x))
    for v in range(V):
        check_equal(weight_tensor(layer, G[v]), expected[v])


@EVERY
def test_averaged_rows_are_the_mean_of_the_rows(name, device):
    layer, x = example(name, device)
    rows, S = averaged_rows(layer, x)
    full = input_rows(layer, x)
    assert full.shape[2] == S
    check_equal(rows, full.mean(2, keepdim=True))


@EVERY
def test_weight_tensor_undoes_weight_matrix(name, device):
    layer, _ = example(name, device)
    check_equal(weight_tensor(layer, weight_matrix(layer, layer.weight)), layer.weight)


@pytest.mark.parametrize(
    "setting", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}]
)
def test_embeddings_with_side_effects_are_refused(setting):
    with pytest.raises(NotImplementedError, match=f"'words' has {next(iter(setting))}"):
        check_layer("words", Embedding(5, 3, **setting))
