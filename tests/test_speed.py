"""Costs that must not grow: numbers and operations are counted, times are not."""

import weakref

import pytest
import torch
from torch import Tensor
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Linear, MSELoss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kfac_scratch import LayerIO, cg_fac, kfac_over, monte_carlo, stream, type2
from kfac_scratch.approximations.accumulators import Gathered
from kfac_scratch.capture.forward_pass import ForwardPass, default_chunk


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


class Written(TorchDispatchMode):
    """The number of entries that operations write into new memory."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        old = {t.untyped_storage().data_ptr() for t in tree_leaves(args) if isinstance(t, Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in old:
                self.entries += t.numel()
        return result


class Transposed(torch.nn.Module):
    """Classes on axis 1."""

    def forward(self, x):
        return x.mT


def test_the_default_chunk_fits_into_a_budget_and_is_bounded(device):
    on_cpu = device.type == "cpu"
    budget, least = (4 * 2**20, 1) if on_cpu else (256 * 2**20, 32)
    for bytes_ in (8, 2**12, 2**14, 2**20, 2**22, 2**25):
        outputs = [torch.zeros(1, device=device).expand(bytes_ // 8)]  # of float64
        chunk = default_chunk(outputs)
        assert chunk == 512 or chunk == least or budget / 2 < chunk * bytes_ <= budget
        assert least <= chunk <= 512
        assert chunk > least or 2 * bytes_ * least > budget


def test_many_sampled_vectors_go_back_in_few_passes_of_bounded_size():
    model = Linear(3, 4)
    X, y = torch.randn(5, 3), torch.randint(4, (5,))
    parts = [len(ios[""].g) for ios in stream(model, CrossEntropyLoss(), X, y, monte_carlo(3000))]
    assert parts == [512] * 5 + [440]
    wide = Linear(3, 2**17)
    y = torch.randint(4, (5,))
    parts = [len(ios[""].g) for ios in stream(wide, CrossEntropyLoss(), X, y, monte_carlo(3))]
    assert parts == [1] * 3


def test_rows_of_one_layer_at_a_time_are_held_over_a_loader(monkeypatch):
    """Of all other layers the rows are gone, or not there yet."""
    held, most, rows = weakref.WeakSet(), 0, ForwardPass.rows

    def watched(run, group):
        nonlocal most
        made = rows(run, group)
        held.update(a for a, _ in made)
        most = max(most, len(held))
        return made

    monkeypatch.setattr(ForwardPass, "rows", watched)
    model = torch.nn.Sequential(*[Linear(4, 4) for _ in range(5)])
    X, y = torch.randn(7, 4), torch.randint(4, (7,))
    kfac_over(model, CrossEntropyLoss(), [(X, y)] * 2, chunk=2)
    assert most == 1
    list(stream(model, CrossEntropyLoss(), X, y))
    assert most == 5


def test_gathered_vectors_are_copied_once():
    """Joining what came so far with every part would copy the first of `V` vectors `V` times."""
    V, N, d = 64, 3, 5
    gather, io = Gathered(cg_fac), LayerIO(torch.randn(N, 1, d), torch.randn(1, N, 1, d))
    with Written() as written:
        state = gather.add(None, io)
        for _ in range(V - 1):
            state = gather.add_vectors(state, torch.ones(1, N, 1, d))
        filled, written.entries = written.entries, 0
        gather.matrix(state, 1.0)
    assert filled <= V * N * d
    assert written.entries <= 5 * V * N * d


def test_sampled_classes_are_kept_as_numbers(device):
    """`M` labels for each sample, and not `M * C` entries of their scores."""
    N, C, M = 3, 50, 200
    model = Linear(3, C).to(device)
    X, y = torch.randn(N, 3, device=device), torch.randint(C, (N,), device=device)
    with Largest() as largest:
        parts = list(stream(model, CrossEntropyLoss(), X, y, monte_carlo(M), chunk=1))
    assert len(parts) == M
    assert largest.entries <= max(M * N, 3 * N * C)
