"""Every model that people train: capture's blocks are exact, and it says what it leaves out."""

from dataclasses import replace

import pytest
import torch
from torch.nn import CrossEntropyLoss
from torch.utils._pytree import tree_map_only

from kfac_scratch import layer_groups, layer_ios, plan, uncovered
from kfac_scratch.capture.calls import Axis
from kfac_scratch.capture.layer_groups import parameters_of
from kfac_scratch.capture.layers import NORMS
from kfac_scratch.capture.plan import Plan
from kfac_scratch.curvature import block_index, loss_hessian
from tests.capture.models import MODELS
from tests.second_device import NAME as SECOND_DEVICE
from tests.thinned import thinned

LOSS = CrossEntropyLoss()


def problem(case, device):
    """A model with random parameters and statistics, a batch, and labels."""
    model, X = case.build(), case.inputs()
    with torch.no_grad():
        for p in model.parameters():  # ones and zeros would hide a factor that is left out
            p.add_(torch.randn_like(p) / 4)
    model, X = model.to(device), tree_map_only(torch.Tensor, lambda x: x.to(device), X)
    f = model(X).detach()
    return model, X, torch.randint(f.shape[1], f[:, 0].shape, device=device)


def names_of(model):
    """All layers that may have a block, normalisations among them."""
    return [
        name
        for name, module in model.named_modules()
        if any(p.requires_grad for p in parameters_of(module))
    ]


def exact_blocks(model, X, y, names):
    r"""`J^T H J` of every block, by one plain reverse pass for each output."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    f = model(X)
    rows = [
        torch.autograd.grad(
            entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for entry in f.flatten()
    ]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    H = loss_hessian(LOSS, f, y)
    columns = {name: J[:, W.flatten()] for name, W in block_index(model, names).items()}
    return {name: part.T @ H @ part for name, part in columns.items()}


def worst(ios, exact):
    """The largest error of a block, relative to its largest entry."""
    assert list(ios) == list(exact)
    assert all(block.abs().max() > 0 for block in exact.values())
    return max(
        float((ios[name].block() - block).abs().max() / block.abs().max())
        for name, block in exact.items()
    )


@pytest.mark.parametrize("name", thinned(MODELS))
def test_a_model_is_exact_or_refused_with_a_way_out(name, device):
    case = MODELS[name]
    if name == "LSTM" and device.type == SECOND_DEVICE:
        pytest.skip("the second device has no kernel for a fused LSTM")
    model, X, y = problem(case, device)
    names = names_of(model)
    if case.refusal:
        with pytest.raises(ValueError, match=case.refusal):
            layer_ios(model, LOSS, X, y, layers=names)
        names = [name for name in names if name not in case.left_out]
    ios = layer_ios(model, LOSS, X, y, layers=names)
    assert worst(ios, exact_blocks(model, X, y, names)) <= case.tolerance
    assert set(uncovered(model, layer_groups(model, names))) == set(case.uncovered)
    norms = {n for n, module in model.named_modules() if isinstance(module, NORMS)}
    unnamed = layer_groups(model, [n for n in names if n not in norms])
    scales = {p for p, _ in model.named_parameters() if p.rpartition(".")[0] in norms}
    assert set(uncovered(model, unnamed)) == set(case.uncovered) | scales


@pytest.mark.parametrize("name", ["attention, positions first"])
def test_the_comparison_sees_a_wrong_axis(name, device):
    """Samples and positions exchanged in the one call whose order cannot be read off its shape."""
    model, X, y = problem(MODELS[name], device)
    names = names_of(model)
    found, exact = plan(model, X, layers=names), exact_blocks(model, X, y, names)
    assert worst(layer_ios(model, LOSS, X, y, layers=names, plan=found), exact) <= 1e-10
    (place,) = found.places["attention.out_proj"]
    assert place.axis == Axis(0, X.shape[1], 1)
    exchanged = replace(place, axis=Axis(0, 1, X.shape[1]))
    wrong = Plan({**found.places, "attention.out_proj": (exchanged,)}, found.output)
    assert worst(layer_ios(model, LOSS, X, y, layers=names, plan=wrong), exact) > 1e-2
