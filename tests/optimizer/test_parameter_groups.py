import pytest
import torch
from torch.nn import LayerNorm, Linear, Sequential

from kfac_scratch.capture.layer_groups import layer_groups, layer_names
from kfac_scratch.optimizer.parameter_groups import covered, trainable


def network():
    first, last = Linear(5, 4), Linear(4, 4)
    tied = Linear(4, 4)
    tied.weight = last.weight
    return Sequential(first, LayerNorm(4), last, tied)


def groups(*parameters, **numbers):
    return [{"params": list(parameters), **numbers}]


def test_names_are_the_models():
    model = network()
    model[0].bias.requires_grad_(False)
    found = trainable(model, groups(*model.parameters()), ())
    assert list(found) == ["0.weight", "1.weight", "1.bias", "2.weight", "2.bias", "3.bias"]
    assert all(found[name] is p for name, p in model.named_parameters() if name in found)


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_numbers_must_not_be_negative(value):
    model = network()
    with pytest.raises(ValueError, match="damping must be at least 0"):
        trainable(model, groups(*model.parameters(), damping=value), ["damping"])


def test_foreign_parameters_are_refused():
    with pytest.raises(ValueError, match=r"shape \(7, 2\) is not one of the model's"):
        trainable(network(), groups(torch.nn.Parameter(torch.ones(7, 2))), ())


def test_blocks_are_covered_whole_or_not_at_all():
    model = network()
    found = layer_groups(model)
    assert [b.name for b in covered(found, {"0.weight", "0.bias"})] == ["0"]
    assert covered(found, {"1.weight"}) == []
    with pytest.raises(ValueError, match="block '0' only a part was given"):
        covered(found, {"0.weight"})
    with pytest.raises(ValueError, match="block '2'"):
        covered(found, {"2.weight", "2.bias"})  # the tied layer's bias is missing


def test_a_frozen_bias_is_no_part():
    model = network()
    model[0].bias.requires_grad_(False)
    assert [b.name for b in covered(layer_groups(model), {"0.weight"})] == ["0"]


def test_layers_of_blocks_are_named_with_those_that_share():
    model = network()
    assert layer_names(model, layer_groups(model)[1:]) == ["2", "3"]
    assert [b.name for b in layer_groups(model, layer_names(model, layer_groups(model)))] == [
        "0",
        "2",
    ]
