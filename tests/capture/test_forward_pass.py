"""Capture is exact and leaves nothing behind. What it refuses: see test_refusals."""

import threading

import pytest
import torch
from torch import nn
from torch.nn import (
    CrossEntropyLoss,
    Linear,
    Module,
    MSELoss,
    ReLU,
    Sequential,
    Tanh,
)
from torch.utils.checkpoint import checkpoint

from kfac_scratch import (
    EXPAND,
    REDUCE,
    empirical,
    kfac,
    layer_groups,
    layer_ios,
    stream,
    type2,
)
from kfac_scratch.curvature import diagonal_blocks, empirical_fisher, ggn
from tests.laws import check_equal
from tests.nets import LOSSES, NETS, REDUCTIONS, problem
from tests.thinned import thinned

N, D, C = 5, 3, 2
COVERED = [net for net in NETS if str(net) not in ("layer_norm", "batch_norm_in_eval_mode")]


# ---- exact ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", COVERED, ids=str)
def test_block_is_the_exact_ggn_block(net, loss, reduction, device):
    model, *data = problem(net, loss, reduction, device=device)
    exact = diagonal_blocks(model, ggn(model, *data))
    ios = layer_ios(model, *data)
    assert set(ios) == set(exact)
    for name, io in ios.items():
        check_equal(io.block(), exact[name])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("net", COVERED, ids=str)
def test_block_is_the_exact_empirical_fisher_block(net, loss, device):
    model, *data = problem(net, loss, device=device)
    exact = diagonal_blocks(model, empirical_fisher(model, *data))
    for name, io in layer_ios(model, *data, empirical).items():
        check_equal(io.block(), exact[name])


@pytest.mark.parametrize("net", COVERED[:8], ids=str)
def test_gradients_of_all_layers_give_the_whole_ggn(net, device):
    """Also the blocks between layers."""
    model, *data = problem(net, device=device)
    found = {block.name: block for block in layer_groups(model)}
    G = {name: io.gradients() for name, io in layer_ios(model, *data).items()}
    V, n = next(iter(G.values())).shape[:2]
    rows = []
    for v in range(V):
        for i in range(n):
            p = {}
            for name, block in found.items():
                p |= block.parameters([G[name][v, i]])
            rows.append(torch.cat([p[name].flatten() for name, _ in model.named_parameters()]))
    rows = torch.stack(rows)
    check_equal(rows.T @ rows, ggn(model, *data))


def check_same(io, expected, size=1.0):
    """A softmax ignores its keys' bias, so that a sum of vectors may vanish: `size` is theirs."""
    check_equal(io.a, expected.a)
    assert (io.g - expected.g).abs().max() <= 1e-12 * size


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("net", thinned(COVERED, 2), ids=str)
def test_chunks_of_vectors_together_are_all_vectors(net, flavour, device):
    model, *data = problem(net, CrossEntropyLoss, device=device)
    whole = layer_ios(model, *data, flavour=flavour, chunk=1000)
    for chunk in (1, 2):
        parts = list(stream(model, *data, flavour=flavour, chunk=chunk))
        assert all(
            len(io.g) <= chunk for part in parts for tied in part.values() for io in tied.parts
        )
        for name, io in layer_ios(model, *data, flavour=flavour, chunk=chunk).items():
            for part, of_whole in zip(io.parts, whole[name].parts, strict=True):
                check_same(part, of_whole)


@pytest.mark.parametrize("net", COVERED, ids=str)
def test_reduce_setting_is_the_reduced_view(net, device):
    model, *data = problem(net, CrossEntropyLoss, device=device)
    ios = layer_ios(model, *data, flavour=REDUCE)
    for name, io in layer_ios(model, *data).items():
        reduced = zip(io.parts, ios[name].parts, io.reduced().parts, strict=True)
        for part, reduced_part, view in reduced:
            assert (part.positions, reduced_part.positions) == (1, part.a.shape[1])
            check_same(reduced_part, view, size=part.g.abs().max())


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("net", thinned(COVERED), ids=str)
def test_precision_is_the_models_whatever_the_default(net, flavour, dtype, default, device):
    data = problem(net, CrossEntropyLoss, device=device, dtype=dtype)
    torch.set_default_dtype(default)
    for io in layer_ios(*data, flavour=flavour).values():
        M, first = kfac(io), io.parts[0]
        V = torch.ones(first.g.shape[-1], first.a.shape[-1], dtype=dtype, device=device)
        factors = [t for part in io.parts for t in (part.a, part.g, kfac(part).A, kfac(part).B)]
        for t in (*factors, M @ V, M.inverse(0.1) @ V):
            assert t.dtype == dtype
            assert t.device.type == device.type
    assert all(M.dtype == dtype for M in diagonal_blocks(data[0], ggn(*data)).values())


def test_autocast_gives_the_parameters_precision(device):
    model, loss, X, y = simple(device)
    model, X, y = model.float(), X.float(), y.float()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        ios = layer_ios(model, loss, X, y)
    assert all(t.dtype == torch.float32 for io in ios.values() for t in (io.a, io.g))


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("s", [(), (1,)])
@pytest.mark.parametrize("d", [1, 3])
def test_capture_works_for_layers_of_size_one(n, s, d, device):
    model = Sequential(Linear(d, 1), Tanh(), Linear(1, d)).to(device)
    X = torch.randn(n, *s, d, device=device)
    data = MSELoss(), X, torch.randn_like(X)
    exact = diagonal_blocks(model, ggn(model, *data))
    for name, io in layer_ios(model, *data).items():
        check_equal(io.block(), exact[name])


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_frozen_parameters_are_no_part_of_a_block(what, device):
    model, *data = simple(device)
    getattr(model[0], what).requires_grad_(False)
    exact = diagonal_blocks(model, ggn(model, *data))
    for flavour in (EXPAND, REDUCE):
        for name, io in layer_ios(model, *data, flavour=flavour).items():
            check_equal(io.block(), exact[name])


def test_a_frozen_layer_has_no_block(device):
    model, *data = simple(device)
    model[0].requires_grad_(False)
    assert list(layer_ios(model, *data)) == ["2"]


def test_a_layer_that_the_output_ignores_has_no_curvature(device):
    class Ignores(Sequential):
        def forward(self, x):
            self[1](x)
            with torch.no_grad():
                features = self[0](x)
            return self[2](features)

    model = Ignores(Linear(D, D), Linear(D, 7), Linear(D, C)).to(device)
    data = MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)
    ios = layer_ios(model, *data)
    assert not ios["0"].g.any()
    assert not ios["1"].g.any()
    assert ios["2"].g.any()


def test_a_layers_input_may_come_by_keyword(device):
    class Keyword(Sequential):
        def forward(self, x):
            return self[0](input=x)

    model = Keyword(Linear(D, C)).to(device)
    data = MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)
    check_equal(layer_ios(model, *data)["0"].a[:, 0, :-1], data[1])


def test_capture_works_under_no_grad(device):
    data = simple(device)
    expected = layer_ios(*data)
    with torch.no_grad():
        for name, io in layer_ios(*data).items():
            check_equal(io.g, expected[name].g)


def test_capture_sees_checkpointed_segments(device):
    model, *data = simple(device)

    class Checkpointed(Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    expected = layer_ios(model, *data)
    for chunk in (1, None):
        for name, io in layer_ios(Checkpointed(), *data, chunk=chunk).items():
            check_equal(io.g, expected[name.removeprefix("net.")].g)
            check_equal(io.a, expected[name.removeprefix("net.")].a)


def test_a_subclass_that_computes_the_same(device):
    class Mine(Linear):
        def forward(self, input):
            return input @ self.weight.T + self.bias

    model = Sequential(Mine(D, C)).to(device)
    data = MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)
    exact = diagonal_blocks(model, ggn(model, *data))
    check_equal(layer_ios(model, *data)["0"].block(), exact["0"])


# ---- leaves nothing behind --------------------------------------------------------------------


class Probe(Module):
    """Raises on demand, in the forward or in the backward pass."""

    def __init__(self):
        super().__init__()
        self.fail = None

    def forward(self, x):
        if self.fail == "forward":
            raise ZeroDivisionError("forward")
        return Raises.apply(x, self.fail)


class Raises(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, fail):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.fail = inputs[1]

    @staticmethod
    def backward(ctx, g):
        if ctx.fail == "backward":
            raise ZeroDivisionError("backward")
        return g, None


def simple(device):
    torch.manual_seed(0)
    model = Sequential(Linear(D, 4), ReLU(inplace=True), Linear(4, C)).to(device)
    return model, MSELoss(), torch.randn(N, D, device=device), torch.randn(N, C, device=device)


def state(model, X):
    return {
        "hooks": [
            len(hooks)
            for m in model.modules()
            for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)
        ],
        "modes": [m.training for m in model.modules()],
        "flags": [p.requires_grad for p in model.parameters()] + [X.requires_grad],
        "grads": [p.grad if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "input grad": X.grad,
        "versions": [t._version for t in (*model.parameters(), *model.buffers(), X)],
        "values": [p.tolist() for p in model.parameters()],
        "grad mode": torch.is_grad_enabled(),
    }


@pytest.mark.parametrize("where", [None, "forward", "loss", "fisher", "backward"])
@pytest.mark.parametrize("chunk", [1, 32])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("input_requires_grad", [True, False])
def test_capture_leaves_nothing_behind(where, chunk, training, input_requires_grad, device):
    torch.manual_seed(0)
    probe = Probe()
    model = Sequential(Linear(D, 4), nn.Dropout(0.5), probe, ReLU(inplace=True), Linear(4, C))
    model = model.to(device).train(training)
    model[4].eval()
    model[4].bias.requires_grad_(False)
    user_hook = model[0].register_forward_hook(lambda *_: None)
    X = torch.randn(N, D, device=device, requires_grad=input_requires_grad)
    y = torch.randn(N, C, device=device)
    model(X).sum().backward()  # the user's own gradients
    X.grad = None
    probe.fail = where
    before = state(model, X)

    def fisher(loss, f, y):
        if where == "fisher":
            raise ZeroDivisionError("fisher")
        return type2(loss, f, y)

    y = y[:, :1] if where == "loss" else y
    if where is None:
        layer_ios(model, MSELoss(), X, y, fisher, chunk=chunk)
    else:
        with pytest.raises((ZeroDivisionError, ValueError, RuntimeError)):
            layer_ios(model, MSELoss(), X, y, fisher, chunk=chunk)
    assert state(model, X) == before
    user_hook.remove()


def test_an_abandoned_stream_leaves_no_hooks(device):
    model, *data = simple(device)
    before = state(model, data[1])
    next(stream(model, *data, chunk=1))
    assert state(model, data[1]) == before


def test_two_threads_do_not_see_each_other(device):
    problems = [simple(device) for _ in range(2)]
    found = [None, None]

    def run(i):
        found[i] = layer_ios(*problems[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    check_equal(found[0]["0"].g, found[1]["0"].g)


class Meet(nn.Module):
    """Wait for another thread at this point of the forward pass."""

    def __init__(self):
        super().__init__()
        self.wait = lambda: None

    def forward(self, x):
        self.wait()
        return x


def test_two_threads_may_capture_one_model_at_the_same_time(device):
    meet = Meet()
    model = nn.Sequential(nn.Linear(4, 3), meet, nn.Tanh(), nn.Linear(3, 2)).to(device)
    batches = [(torch.randn(5, 4, device=device), torch.randn(5, 2, device=device)) for _ in "ab"]
    alone = [layer_ios(model, nn.MSELoss(), X, y) for X, y in batches]
    meet.wait, found = threading.Barrier(2, timeout=20).wait, [{}, {}]

    def run(i):
        found[i] = layer_ios(model, nn.MSELoss(), *batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for ios, expected in zip(found, alone, strict=True):
        for name in expected:
            check_same(ios[name], expected[name])


@pytest.mark.parametrize("fisher", [type2, empirical])
def test_autocast_does_not_reach_what_capture_computes_itself(fisher, device):
    """The first layer's input is in float32, and its averaged patches stay so; so do vectors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 3)).to(
        device, torch.float32
    )
    X = torch.randn(7, 2, 5, 5, device=device, dtype=torch.float32)
    y, seen = torch.randint(3, (7,), device=device), []

    def watched(loss, f, y):
        seen.append(f.dtype)
        return fisher(loss, f, y)

    full = layer_ios(model, nn.CrossEntropyLoss(), X, y, fisher, flavour=REDUCE)["0"].a
    with torch.autocast(device.type, torch.bfloat16):
        half = layer_ios(model, nn.CrossEntropyLoss(), X, y, watched, flavour=REDUCE)["0"].a
    assert torch.equal(half, full)
    assert seen == [torch.float32]


def test_reduced_inputs_of_a_layer_used_at_two_lengths_are_the_mean_over_all_positions(device):
    class Twice(Module):
        def __init__(self):
            super().__init__()
            self.layer = Linear(3, 3)

        def forward(self, x):  # on 5 positions, then on their mean
            return self.layer(self.layer(x).tanh().mean(1))

    torch.manual_seed(0)
    model, loss = Twice().to(device), MSELoss()
    X, y = torch.randn(4, 5, 3, device=device), torch.randn(4, 3, device=device)
    reduced = layer_ios(model, loss, X, y, flavour=REDUCE)["layer"]
    expected = layer_ios(model, loss, X, y)["layer"].reduced()
    check_equal(reduced.a, expected.a)
    check_equal(reduced.g, expected.g)
