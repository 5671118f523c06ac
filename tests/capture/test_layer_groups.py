import pytest
import torch
from torch import nn
from torch.nn import Conv1d, Embedding, LayerNorm, Linear, Module, Sequential

from kfac_scratch import layer_groups, uncovered
from tests.laws import check_equal


def values(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def names(model, **options):
    return [name for block in layer_groups(model, **options) for name in block.names]


def test_w_is_the_weight_with_the_bias_as_last_column(device):
    model = Sequential(Linear(3, 2)).to(device)
    v, (block,) = values(model), layer_groups(model)
    (W,) = block.matrices(v)
    check_equal(W[:, :3], v["0.weight"])
    check_equal(W[:, 3], v["0.bias"])


MODELS = {
    "linear": lambda: Linear(3, 2),
    "no-bias": lambda: Sequential(Linear(3, 2, bias=False)),
    "conv-groups": lambda: Sequential(Conv1d(4, 6, 3, groups=2), Conv1d(6, 6, 2, groups=6)),
    "embedding": lambda: Sequential(Embedding(5, 3), Linear(3, 2)),
    "tied": lambda: tied(True),
    "tied-own-biases": lambda: tied(False),
    "frozen-weight": lambda: frozen("weight"),
    "frozen-bias": lambda: frozen("bias"),
}


def tied(share_bias):
    model = Sequential(Linear(3, 3), Linear(3, 3))
    model[1].weight = model[0].weight
    if share_bias:
        model[1].bias = model[0].bias
    return model


def frozen(what):
    model = Sequential(Linear(3, 2), Linear(2, 4))
    getattr(model[0], what).requires_grad_(False)
    return model


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_parameters_undoes_matrices(make, device):
    model = make().to(device)
    v, seen = values(model), {}
    for block in layer_groups(model):
        seen |= block.parameters(block.matrices(v))
    assert set(seen) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, value in seen.items():
        check_equal(value, v[name])
    assert uncovered(model, layer_groups(model)) == []


def test_groups_are_named_after_their_first_layer():
    assert names(Linear(3, 2)) == [""]
    assert names(MODELS["conv-groups"]()) == ["0[0]", "0[1]"] + [f"1[{i}]" for i in range(6)]
    assert names(MODELS["tied"]()) == ["0"]
    assert names(MODELS["embedding"](), layers=["1"]) == ["1"]


def test_own_biases_of_a_shared_weight_are_columns_of_their_own():
    (block,) = layer_groups(tied(False))
    assert list(block.biases) == ["0.bias", "1.bias"]
    assert block.bias_inputs("0.bias") == [1.0, 0.0]
    assert block.bias_inputs("1.bias") == [0.0, 1.0]
    assert block.bias_inputs(None) == [0.0, 0.0]


def test_frozen_parameters_have_no_columns():
    bias_only, _ = layer_groups(frozen("weight"))
    assert bias_only.weight is None
    assert bias_only.matrices(values(frozen("weight")))[0].shape == (2, 1)
    assert len(layer_groups(MODELS["linear"]().requires_grad_(False))) == 0


class Custom(Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.slope = Linear(3, 2), LayerNorm(2), nn.PReLU()
        self.scale = nn.Parameter(torch.ones(2))
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)


def test_what_is_not_covered_is_named():
    model = Custom()
    assert uncovered(model, layer_groups(model)) == [
        "scale",
        "norm.weight",
        "norm.bias",
        "slope.weight",
        "attention.bias_k",
        "attention.bias_v",
    ]


def test_a_parametrized_weight_has_no_block():
    model = Sequential(Linear(3, 2), nn.utils.parametrizations.weight_norm(Linear(2, 2)))
    assert names(model) == ["0"]
    assert len(uncovered(model, layer_groups(model))) == 3
    with pytest.raises(NotImplementedError, match="parametrization"):
        layer_groups(model, ["1"])


def test_unknown_layers_are_refused():
    with pytest.raises(ValueError, match="no layer 'head'"):
        layer_groups(Sequential(Linear(3, 2)), ["head"])


def test_named_layers_of_other_kinds_are_refused():
    with pytest.raises(NotImplementedError, match="'slope' is a PReLU"):
        layer_groups(Custom(), ["slope"])


def test_named_layers_without_trainable_parameters_are_refused():
    model = Sequential(Linear(3, 2), Linear(2, 2))
    model[0].requires_grad_(False)
    assert names(model) == ["1"]
    with pytest.raises(ValueError, match=r"'0' has no trainable parameter.*leave it out"):
        layer_groups(model, ["0", "1"])


def test_an_embedding_and_a_linear_layer_of_one_weight_are_one_block():
    """Its matrix is the linear layer's, which has a column for the bias."""
    model = Sequential(Embedding(3, 2), Linear(2, 3))
    model[1].weight = model[0].weight
    (block,) = layer_groups(model)
    assert (block.names, [part.name for part in block.parts]) == (["0"], ["1", "0"])
    values = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    (W,) = block.matrices(values)
    assert torch.equal(W, torch.cat([values["0.weight"], values["1.bias"].unsqueeze(1)], 1))
    back = block.parameters([W])
    assert all(torch.equal(back[name], value) for name, value in values.items())
    assert names(model, layers=["1"]) == ["1"]
    model[0].weight.requires_grad_(False)
    (block,) = layer_groups(model)
    assert (block.names, block.parameter_names) == (["1"], ("1.bias",))


def test_a_bias_of_two_blocks_is_refused():
    model = Sequential(Linear(3, 3), Linear(3, 3))
    model[1].bias = model[0].bias
    with pytest.raises(ValueError, match=r"share the bias '0\.bias'"):
        layer_groups(model)


@pytest.mark.parametrize("first", ["c", "c[0]"])
def test_two_blocks_of_one_name_are_refused(first):
    """A module may be called as a group of a convolution is."""
    modules = {"c": Conv1d(4, 6, 3, groups=2), "c[0]": Linear(3, 2)}
    model = Module()
    for name in sorted(modules, key=lambda name: name != first):
        model.add_module(name, modules[name])
    with pytest.raises(ValueError, match=r"Two blocks have the name 'c\[0\]'.*Rename the module"):
        layer_groups(model)
    assert names(model, layers=["c"]) == ["c[0]", "c[1]"]
    assert names(model, layers=["c[0]"]) == ["c[0]"]
