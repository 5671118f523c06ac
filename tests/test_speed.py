"""Costs that must not grow: numbers and operations are counted, times are not."""

import pytest
import torch
from torch import Tensor
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Linear, MSELoss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_scratch import monte_carlo, stream, type2


class Largest(TorchDispatchMode):
    """The number of entries of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t.untyped_storage().nbytes() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.entries = max([self.entries, *(size // 8 for size in made)])
        return result


@pytest.mark.parametrize("positions", [1, 4])
@pytest.mark.parametrize("kind", [CrossEntropyLoss, MSELoss, BCEWithLogitsLoss])
def test_vectors_of_a_stream_are_bounded_by_the_chunk(kind, positions, device):
    """One vector of `C * P` has `N * P * C` entries; all of them have `C * P` times as many."""
    N, C = 2, 40
    model = torch.nn.Sequential(Linear(3, C)).to(device)
    X = torch.randn(N, positions, 3, device=device)
    y = model(X).detach().sigmoid()
    if kind is CrossEntropyLoss:
        model.append(Transposed())
        y = torch.randint(C, (N, positions), device=device)
    with Largest() as largest:
        parts = sum(len(ios["0"].g) for ios in stream(model, kind(), X, y, type2, chunk=1))
    assert parts >= (C - 1) * positions
    assert largest.entries <= 3 * N * positions * C


class Transposed(torch.nn.Module):
    """Classes on axis 1."""

    def forward(self, x):
        return x.mT


def test_sampled_classes_are_kept_as_numbers(device):
    """`M` labels for each sample, and not `M * C` entries of their scores."""
    N, C, M = 3, 50, 200
    model = Linear(3, C).to(device)
    X, y = torch.randn(N, 3, device=device), torch.randint(C, (N,), device=device)
    with Largest() as largest:
        parts = list(stream(model, CrossEntropyLoss(), X, y, monte_carlo(M), chunk=1))
    assert len(parts) == M
    assert largest.entries <= max(M * N, 3 * N * C)
