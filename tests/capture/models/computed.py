"""Weights that are computed from parameters."""

from torch import nn
from torch.nn import (
    Conv2d,
    Identity,
    Linear,
    Module,
    ModuleDict,
    Sequential,
    Tanh,
    functional,
)
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from tests.capture.models.case import C, Case, D, Made, images, parameter, vectors

PARAMETRIZED = "the weight is computed from it"


def parametrized(kind, layer, x):
    head = Linear(2 * (x().ndim > 3) * 9 or D, C)
    return Sequential(kind(layer), Tanh(), nn.Flatten(), head)


def low_rank(m, x):
    """Unmerged, as libraries write it: a frozen layer, and two small ones beside it."""
    return m.head((m.base(x) + 0.5 * m.B(m.A(x))).tanh())


class Adapted(Module):
    """A linear layer with an adapter, as the library peft arranges it."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.scaling = base, {"default": 0.5}
        self.lora_dropout = ModuleDict({"default": Identity()})
        self.lora_A = ModuleDict({"default": Linear(D, 2, bias=False)})
        self.lora_B = ModuleDict({"default": Linear(2, D, bias=False)})

    def forward(self, x):
        result = self.base_layer(x)
        for name, A in self.lora_A.items():
            low = A(self.lora_dropout[name](x))
            result = result + self.lora_B[name](low) * self.scaling[name]
        return result


def adapted():
    model = Sequential(Adapted(Linear(D, D)), Tanh(), Linear(D, C))
    model[0].base_layer.requires_grad_(False)
    return model


def merged(m, x):
    return m.head(functional.linear(x, m.base.weight + m.B.weight @ m.A.weight, m.base.bias).tanh())


def merged_parameters(m, x):
    return m.head(functional.linear(x, m.base.weight + m.B @ m.A, m.base.bias).tanh())


def lora(forward, A, B):
    base = Linear(D, D)
    base.requires_grad_(False)
    return Made(forward, base=base, A=A, B=B, head=Linear(D, C))


COMPUTED = {
    "weight norm": Case(
        lambda: Sequential(weight_norm(Linear(D, D)), Tanh(), Linear(D, C)),
        vectors,
        {
            "0.bias": "its layer's weight is no parameter",
            "0.parametrizations.weight.original0": PARAMETRIZED,
            "0.parametrizations.weight.original1": PARAMETRIZED,
        },
    ),
    "weight norm of a convolution": Case(
        lambda: Sequential(weight_norm(Conv2d(2, 2, 2)), Tanh(), nn.Flatten(), Linear(18, C)),
        images,
        {
            "0.bias": "its layer's weight is no parameter",
            "0.parametrizations.weight.original0": PARAMETRIZED,
            "0.parametrizations.weight.original1": PARAMETRIZED,
        },
    ),
    "spectral norm": Case(
        lambda: Sequential(spectral_norm(Linear(D, D)), Tanh(), Linear(D, C)).eval(),
        vectors,
        {
            "0.bias": "its layer's weight is no parameter",
            "0.parametrizations.weight.original": PARAMETRIZED,
        },
    ),
    "LoRA": Case(
        lambda: lora(low_rank, Linear(D, 2, bias=False), Linear(2, D, bias=False)), vectors
    ),
    "LoRA in modules of peft's structure": Case(adapted, vectors),
    "LoRA of layers, merged": Case(
        lambda: lora(merged, Linear(D, 2, bias=False), Linear(2, D, bias=False)),
        vectors,
        {"A.weight": PARAMETRIZED, "B.weight": PARAMETRIZED},
        r"'A' \(Linear\).*layers=\[\.\.\.\]",
        ["A", "B"],
    ),
    "LoRA of parameters, merged": Case(
        lambda: lora(merged_parameters, parameter(2, D), parameter(D, 2)),
        vectors,
        {"A": PARAMETRIZED, "B": PARAMETRIZED},
    ),
}
