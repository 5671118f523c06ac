"""The second device of the tests: what it refuses, what it allows, and a mistake that it shows."""

import io as files
from copy import deepcopy

import pytest
import torch
from torch.nn import Conv2d, CrossEntropyLoss, Flatten, Linear, Sequential, Tanh

import kfac_scratch.losses
from kfac_scratch import EXPAND, REDUCE, OneHot, empirical, kfac, layer_ios, monte_carlo, type2
from tests import second_device
from tests.second_device import NAME, Elsewhere

MISSING = second_device.why_missing()
pytestmark = pytest.mark.skipif(bool(MISSING), reason=MISSING)
REFUSED = "same device"


@pytest.fixture(autouse=True)
def _in_use():
    with second_device.in_use():
        yield


def there(*shape):
    return torch.randn(*shape, device=NAME)


# ---- what it refuses -----------------------------------------------------------------------------

MIXED = {
    "sum": lambda x: x + torch.ones(3),
    "sum the other way round": lambda x: torch.ones(3) + x,
    "product": lambda x: x @ torch.eye(3),
    "product with a batch": lambda x: torch.einsum("i,nij->nj", x, torch.ones(2, 3, 3)),
    "stack": lambda x: torch.stack([x, torch.ones(3)]),
    "stack of numbers": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "in place": lambda x: x.add_(torch.ones(3)),
    "into the CPU's": lambda x: torch.ones(3).add_(x),
    "into a number of the CPU's": lambda x: torch.tensor(1.0).add_(x.sum()),
    "condition": lambda x: x.where(torch.ones(3) > 0, 0.0),
    "values by index": lambda x: x.index_put_((torch.tensor([1]),), torch.ones(1)),
    "CPU's values by its index": lambda x: torch.ones(3)[torch.ones(3, device=NAME) > 0],
    "gradient": lambda x: torch.autograd.grad(x.requires_grad_() * x, x, torch.ones(3))[0] + 1,
    "layer": lambda x: Linear(3, 3)(x),
    "under vmap": lambda x: torch.vmap(lambda r: r * torch.ones(3))(x.expand(2, 3)),
    "generator": lambda x: x.normal_(generator=torch.Generator()),
    "factory's generator": lambda x: torch.randn(3, device=NAME, generator=torch.Generator()),
    "CPU's factory": lambda x: torch.randn(3, generator=torch.Generator(NAME)),
}


@pytest.mark.parametrize("what", MIXED)
def test_devices_do_not_mix(what):
    with pytest.raises(RuntimeError, match=rf"{REFUSED}|expected a generator"):
        MIXED[what](there(3))


# ---- what it allows ------------------------------------------------------------------------------


def test_numbers_of_the_cpu_are_allowed_entry_by_entry():
    x, two = there(3), torch.tensor(2.0)
    for y in (x * two, two * x, x / (1 / two), x.where(x < 0, two), x.clamp_min(two)):
        assert y.device == x.device
    assert torch.equal(x * two, 2 * x)
    assert torch.equal(x.masked_fill(x < 9, two), torch.full_like(x, 2.0))


def test_copies_are_allowed():
    x, here = there(3), torch.zeros(3)
    assert type(x.cpu()) is torch.Tensor
    assert torch.equal(here.copy_(x), x.cpu())
    assert torch.equal(x.copy_(torch.ones(3)).cpu(), torch.ones(3))
    assert torch.equal(here.to(NAME).cpu(), here)
    assert x[torch.tensor([0, 2])].device == x.device  # an index, as CUDA does
    assert (x.tolist(), f"{x[0]:.1f}", float(x[0])) == ([1.0] * 3, "1.0", 1.0)


def test_what_is_made_there_is_there():
    like = torch.ones(2, 2, dtype=torch.float32, device=NAME)
    made = [
        torch.eye(3, device=NAME),
        torch.arange(3, device=NAME),
        torch.randperm(3, device=NAME),
        torch.tensor([1.0], device=NAME),
        torch.nn.functional.one_hot(torch.tensor([1], device=NAME)),
        like.new_tensor([1.0]),
        like.new_zeros(3),
    ]
    assert {type(x) for x in made} == {Elsewhere}
    assert all(x.shape == x.numbers.shape for x in made)
    assert [x.dtype for x in made[-2:]] == [torch.float32] * 2  # also where the default is another


def test_generators_draw_the_cpu_s_numbers():
    generator = torch.Generator(NAME).manual_seed(1)
    assert generator.device == torch.device(NAME, 0)
    assert torch.Generator().device.type == "cpu"
    drawn = torch.randn(3, device=NAME, generator=generator)
    assert torch.equal(drawn.cpu(), torch.randn(3, generator=torch.Generator().manual_seed(1)))


def test_a_saved_tensor_is_loaded_where_it_was():
    x, file = there(3), files.BytesIO()
    torch.save({"x": x}, file)
    file.seek(0)
    back = torch.load(file, weights_only=True)["x"]
    assert back.device == x.device
    assert torch.equal(back, x)
    file.seek(0)
    moved = torch.load(file, weights_only=True, map_location="cpu")["x"]
    assert type(moved) is torch.Tensor


def test_a_change_of_precision_reaches_the_numbers():
    layer = Linear(2, 3).to(NAME).to(torch.float32)
    assert layer.weight.dtype == layer.weight.numbers.dtype == torch.float32


def test_tied_weights_arrive_tied():
    model = Sequential(Linear(3, 3), Linear(3, 3))
    model[1].weight = model[0].weight
    model.to(NAME)
    assert model[0].weight is model[1].weight
    assert deepcopy(model)[0].weight.device == model[0].weight.device


@pytest.mark.parametrize("transform", [torch.func.jacfwd, torch.func.jacrev, torch.func.hessian])
def test_derivatives_are_the_cpu_s(transform):
    def f(x):
        return torch.nn.functional.mse_loss(x.tanh() @ x, x.new_ones(()))

    x = there(3)
    assert torch.equal(transform(f)(x).cpu(), transform(f)(x.cpu()))


def test_autocast_lowers_products_and_only_where_it_is_on():
    x = torch.ones(3, 3, dtype=torch.float32, device=NAME)
    with torch.autocast(NAME, torch.bfloat16):
        assert (x @ x).dtype == Linear(3, 3).float().to(NAME)(x).dtype == torch.bfloat16
        assert (x + x).dtype == torch.float32
        with torch.autocast(NAME, enabled=False):
            assert (x @ x).dtype == torch.float32
    assert (x @ x).dtype == torch.float32


def test_rows_of_ones_take_their_own_turn():
    """Another kind of tensor with operations of its own, before and behind one of this device."""
    x = torch.randn(2, 3, 4)
    ones = OneHot(torch.tensor([[0, 3, -1], [2, 2, 1]]), 4, x.dtype)
    far = OneHot(ones.columns.to(NAME), 4, x.dtype)
    assert torch.equal((far * x.to(NAME)).cpu(), ones * x)
    assert torch.equal((x.to(NAME) * far).cpu(), x * ones)
    with pytest.raises(RuntimeError, match=REFUSED):
        far * x
    with pytest.raises(RuntimeError, match=REFUSED):
        x.to(NAME) * ones


# ---- what it is for ------------------------------------------------------------------------------

FISHERS = {
    "type2": lambda device: type2,
    "monte carlo": lambda device: monte_carlo(2, torch.Generator(device).manual_seed(0)),
    "empirical": lambda device: empirical,
}


def captured(device, fisher=type2, flavour=EXPAND):
    """Factors of every block of a network, on the CPU."""
    torch.manual_seed(0)
    model = Sequential(Conv2d(2, 3, 3), Tanh(), Flatten(), Linear(27, 3)).to(device)
    X, y = torch.randn(5, 2, 5, 5).to(device), torch.tensor([0, 1, 2, 0, 1]).to(device)
    ios = layer_ios(model, CrossEntropyLoss(), X, y, fisher, flavour=flavour)
    matrices = {name: kfac(io) for name, io in ios.items()}
    assert all(M.A.device.type == torch.device(device).type for M in matrices.values())
    return [t.cpu() for M in matrices.values() for t in (M.A, M.B)]


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("fisher", FISHERS)
def test_factors_are_the_cpu_s(fisher, flavour):
    here, far = (captured(device, FISHERS[fisher](device), flavour) for device in ("cpu", NAME))
    for a, b in zip(here, far, strict=True):
        assert (a - b).abs().max() <= 1e-12 * a.abs().max()


def per_position(device):
    """Type-2 vectors of outputs with several positions."""
    f = torch.ones(2, 3, 4, device=device)
    return type2(CrossEntropyLoss(), f, torch.zeros(2, 4, dtype=torch.long, device=device))[:]


def test_a_tensor_made_without_its_device_is_seen_there_only(monkeypatch):
    """The mistake that this device is for: `torch.arange(C)`, and no `device=`."""
    right = per_position("cpu")
    assert torch.equal(per_position(NAME).cpu(), right)

    class Forgetful:
        """PyTorch for a module that forgets where its numbers should be."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def arange(self, *args, device=None, **kwargs):
            return torch.arange(*args, **kwargs)

    monkeypatch.setattr(kfac_scratch.losses, "torch", Forgetful())
    assert torch.equal(per_position("cpu"), right)  # on the CPU, nothing is wrong
    with pytest.raises(RuntimeError, match=REFUSED):
        per_position(NAME)
