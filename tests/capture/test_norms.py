"""Scales and shifts of normalisations: their blocks are exact, and KFAC's are, too."""

import pytest
import torch
from torch import nn
from torch.nn import Conv2d, CrossEntropyLoss, Flatten, Linear, MSELoss, Sequential, Tanh

from kfac_scratch import (
    EXPAND,
    KFAC,
    REDUCE,
    coarse_correction,
    ekfac,
    empirical,
    exact_inverse,
    kfac,
    kfac_over,
    layer_groups,
    layer_ios,
    two_level,
    type2,
    uncovered,
)
from kfac_scratch.capture.layer_groups import parameters_of
from kfac_scratch.capture.layers import NORMS
from kfac_scratch.curvature import diagonal_blocks, empirical_fisher, ggn
from tests.capture.test_plan import C, D, N, Net, S, sequences, vectors
from tests.laws import check_equal


def images(device):
    return torch.randn(N, 2, 3, 4, device=device)


def volumes(device):
    return torch.randn(N, 2, 3, 2, 2, device=device)


def after_conv(norm, space=(2, 3)):
    return Sequential(Conv2d(2, 4, 2), norm, Tanh(), Flatten(), Linear(4 * space[0] * space[1], C))


def on_sequences(norm):
    return Net(lambda m, x: m.b(m.norm(m.a(x)).tanh().mean(1)), a=Linear(D, D), norm=norm, b=head())


def head():
    return Linear(D, C)


def positions_first(norm):
    def forward(m, x):
        return m.b(m.norm(m.a(x.transpose(0, 1).flatten(0, 1))).tanh().view(-1, len(x), D).sum(0))

    return Net(forward, a=Linear(D, D), norm=norm, b=head())


def twice(norm):
    return Net(lambda m, x: m.b(m.norm(m.norm(m.a(x)).sin())), a=Linear(D, D), norm=norm, b=head())


def collected(norm, inputs):
    """A norm with statistics that it has collected, for evaluation."""
    norm(inputs("cpu"))
    return norm.eval()


MODELS = {
    "LayerNorm": (lambda: Sequential(Linear(D, D), nn.LayerNorm(D), Tanh(), head()), vectors),
    "LayerNorm, no shift": (lambda: on_sequences(nn.LayerNorm(D, bias=False)), sequences),
    "LayerNorm of sequences": (lambda: on_sequences(nn.LayerNorm(D)), sequences),
    "LayerNorm of two axes": (lambda: on_sequences(nn.LayerNorm((S, D))), sequences),
    "LayerNorm, positions first": (lambda: positions_first(nn.LayerNorm(D)), sequences),
    "LayerNorm, twice": (lambda: twice(nn.LayerNorm(D)), vectors),
    "RMSNorm": (lambda: on_sequences(nn.RMSNorm(D)), sequences),
    "GroupNorm": (lambda: after_conv(nn.GroupNorm(2, 4)), images),
    "GroupNorm of vectors": (lambda: twice(nn.GroupNorm(2, D)), vectors),
    "InstanceNorm1d": (lambda: on_sequences(nn.InstanceNorm1d(S, affine=True)), sequences),
    "InstanceNorm2d": (lambda: after_conv(nn.InstanceNorm2d(4, affine=True)), images),
    "InstanceNorm2d, its statistics": (
        lambda: Sequential(
            collected(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), images),
            Flatten(),
            Linear(24, C),
        ),
        images,
    ),
    "InstanceNorm3d": (
        lambda: Sequential(nn.InstanceNorm3d(2, affine=True), Tanh(), Flatten(), Linear(24, C)),
        volumes,
    ),
    "BatchNorm1d": (
        lambda: Sequential(collected(nn.BatchNorm1d(D), vectors), Linear(D, C)),
        vectors,
    ),
    "BatchNorm2d": (
        lambda: Sequential(collected(nn.BatchNorm2d(2), images), Flatten(), Linear(24, C)),
        images,
    ),
    "BatchNorm3d": (
        lambda: Sequential(collected(nn.BatchNorm3d(2), volumes), Flatten(), Linear(24, C)),
        volumes,
    ),
}


def test_every_kind_of_normalisation_is_tested():
    kinds = {kind.__name__ for kind in NORMS}
    assert {name.partition(",")[0].partition(" ")[0] for name in MODELS} == kinds


def problem(name, device):
    make, inputs = MODELS[name]
    model, X = make().to(device), inputs(device)
    with torch.no_grad():  # ones and zeros would hide a scale that is left out
        for module in model.modules():
            if isinstance(module, NORMS):
                for p in module.parameters():
                    p.copy_(1 + torch.randn_like(p) / 3)
    names = [name for name, module in model.named_modules() if parameters_of(module)]
    return model, X, torch.randn(N, C, device=device), names


@pytest.mark.parametrize("flavour", [EXPAND, REDUCE], ids=["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_of_scales_and_shifts_are_exact(name, flavour, device):
    """Those of KFAC and EKFAC as well, whatever the positions."""
    model, X, y, names = problem(name, device)
    exact = diagonal_blocks(model, ggn(model, MSELoss(), X, y), names)
    ios = layer_ios(model, MSELoss(), X, y, flavour=flavour, layers=names)
    over = kfac_over(
        model, MSELoss(), [(X[:2], y[:2]), (X[2:], y[2:])], flavour=flavour, layers=names
    )
    assert list(ios) == list(exact)
    assert uncovered(model, layer_groups(model, names)) == []
    norms = [n for n, module in model.named_modules() if isinstance(module, NORMS)]
    assert norms
    for n in norms:
        assert (ios[n].a.shape, ios[n].positions) == ((N, 1, 1), 1)
        for found in (ios[n].block(), kfac(ios[n]).dense(), ekfac(ios[n]).dense()):
            check_equal(found, exact[n])
        check_equal(over[n].dense(), exact[n])
    if flavour is EXPAND:
        for n, io in ios.items():
            check_equal(io.block(), exact[n])


@pytest.mark.parametrize("name", ["LayerNorm of sequences", "GroupNorm", "LayerNorm, twice"])
def test_the_empirical_block_of_a_scale_is_exact(name, device):
    model, X, y, names = problem(name, device)
    exact = diagonal_blocks(model, empirical_fisher(model, MSELoss(), X, y), names)
    for n, io in layer_ios(model, MSELoss(), X, y, empirical, layers=names).items():
        check_equal(io.block(), exact[n])


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_frozen_scales_or_shifts_have_no_rows(frozen, device):
    model, X, y, names = problem("LayerNorm of sequences", device)
    getattr(model.norm, frozen).requires_grad_(False)
    exact = diagonal_blocks(model, ggn(model, MSELoss(), X, y), names)
    ios = layer_ios(model, MSELoss(), X, y, layers=names)
    assert ios["norm"].g.shape[-1] == D
    check_equal(ios["norm"].block(), exact["norm"])


def test_normalisations_have_a_block_only_if_they_are_named(device):
    model, X, y, names = problem("LayerNorm of sequences", device)
    with pytest.warns(UserWarning, match=r"'norm\.weight', 'norm\.bias'.*if they are named there"):
        ios = layer_ios(model, MSELoss(), X, y)
    assert list(ios) == ["a", "b"]
    assert list(layer_ios(model, MSELoss(), X, y, layers=names)) == ["a", "norm", "b"]


def test_two_normalisations_with_one_scale_are_refused():
    model = Sequential(nn.LayerNorm(D), nn.LayerNorm(D))
    model[1].weight = model[0].weight
    with pytest.raises(NotImplementedError, match=r"'0' and '1' share a scale.*leave both out"):
        layer_groups(model, ["0", "1"])


def test_a_scale_that_is_used_elsewhere_is_refused(device):
    model, X, y, names = problem("LayerNorm of sequences", device)
    model.way = lambda m, x: m.b((m.norm(m.a(x)) + m.norm.bias).mean(1))
    with pytest.raises(NotImplementedError, match=r"'norm\.bias' is not"):
        layer_ios(model, MSELoss(), X, y, layers=names)


def test_statistics_in_training_mode_stay_as_they_are(device):
    """Only the normalisation itself writes them, once for every forward pass of the batch."""
    model, X, y, names = problem("InstanceNorm2d, its statistics", device)
    before = {name: b.clone() for name, b in model.named_buffers()}
    layer_ios(model, MSELoss(), X, y, layers=names)
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_have_the_precision_of_factors(dtype, device):
    model, X, y, names = problem("LayerNorm of sequences", device)
    model = model.to(dtype)
    ios = layer_ios(model, MSELoss(), X.to(dtype), y.to(dtype), layers=names)
    assert all(t.dtype == torch.float32 for io in ios.values() for t in (io.a, io.g))


def test_an_optimizer_steps_scales_and_shifts_by_their_exact_block(device):
    """With one layer: a damped Newton step on the scale and shift alone."""
    model, X, _, _ = problem("LayerNorm", device)
    y, loss = torch.randint(C, (N,), device=device), CrossEntropyLoss()
    for p in (*model[0].parameters(), *model[3].parameters()):
        p.requires_grad_(False)
    options = {"fisher": type2, "invert": exact_inverse, "controls": [], "layers": ["1"]}
    optimizer = KFAC(model, loss, lr=1.0, momentum=0.0, damping=0.1, **options)
    loss(model(X), y).backward()
    g = torch.cat([model[1].weight.grad, model[1].bias.grad])
    H = diagonal_blocks(model, ggn(model, loss, X, y), ["1"])["1"]
    before = torch.cat([p.detach().clone() for p in model[1].parameters()])
    optimizer.observe(X, y)
    optimizer.step()
    after = torch.cat([p.detach() for p in model[1].parameters()])
    exact = torch.linalg.solve(H + 0.1 * torch.eye(len(H), device=H.device), g)
    check_equal(before - after, exact)


def test_two_levels_have_the_blocks_of_named_normalisations(device):
    """In the preconditioner, and as a step control of the optimizer."""
    model, X, y, names = problem("LayerNorm of sequences", device)
    ios = layer_ios(model, MSELoss(), X, y, layers=names)
    maps = {n: kfac(io).inverse(0.1) for n, io in ios.items()}
    values = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    moved = two_level(model, ios, maps, 0.1)(values)
    assert set(moved) == set(values)
    without = two_level(
        model,
        {n: io for n, io in ios.items() if n != "norm"},
        {n: M for n, M in maps.items() if n != "norm"},
        0.1,
        rest=lambda v: 0 * v,
    )(values)
    assert not without["norm.weight"].any()
    assert moved["norm.weight"].any()

    controls = [coarse_correction(type2)]
    optimizer = KFAC(model, MSELoss(), lr=0.1, damping=0.1, layers=names, controls=controls)
    before = model.norm.weight.detach().clone()
    MSELoss()(model(X), y).backward()
    optimizer.observe(X, y)
    optimizer.step()
    assert not torch.equal(model.norm.weight, before)
