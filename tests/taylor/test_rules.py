"""The rules of Taylor mode against nested autodiff: any function that a rule exists for."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from kfac_scratch.taylor import jets
from kfac_scratch.taylor.expansions import laplacian
from kfac_scratch.taylor.jets import taylor_coefficients
from kfac_scratch.taylor.partials import Partials
from kfac_scratch.taylor.rules import RULES
from tests.taylor.test_taylor import close, derivative

W = torch.linspace(-1, 2, 6, dtype=torch.float64).reshape(3, 2)


def like(x):
    """The constant matrix, where the jet is."""
    return W.to(x.device)


def layer_norm(x, shape, weight=1.0, bias=0.0, eps=1e-5):
    """By its definition: a third derivative through PyTorch's own function is wrong, silently."""
    axes = tuple(-1 - i for i in range(len(shape)))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True) + eps).sqrt() * weight + bias


def normed_arrays(x, norm):
    squares = functional.linear(x[..., None] * x[:, None], like(x).T)  # [N, 3, 2]
    normed = norm(squares.exp(), (3, 2)).mean((1, 2), keepdim=True)[:, 0]
    normed = normed + norm(squares.sin(), (2,))[:, 1]
    return normed + functional.linear(
        x[:, :, None] * x[:, None], like(x).T, like(x)[0]
    ).sigmoid().sum(1)


METHODS = {
    name: (lambda x, name=name: getattr(x, name)())
    for name in (
        *("tanh", "sigmoid", "exp", "sin", "cos", "sinh", "cosh", "log", "erf", "atan", "arctan"),
        *("relu", "abs", "square", "sqrt", "rsqrt", "reciprocal", "neg"),
    )
}
MODULES = {
    "elu": nn.ELU(),
    "elu-2": nn.ELU(2.0),
    "mish": nn.Mish(),
    "silu": nn.SiLU(),
    "gelu": nn.GELU(),
    "gelu-tanh": nn.GELU("tanh"),
    "softplus": nn.Softplus(),
    "softplus-3-1": nn.Softplus(3.0, 1.0),
    "layer-norm": nn.LayerNorm(3, elementwise_affine=False, eps=0.1),
    "dropout": nn.Dropout().eval(),
    "no-dropout": nn.Dropout(0.0),
}
CALLS = {
    "builtin-abs": lambda x: abs(x - 1),
    "F.elu": lambda x: functional.elu(x - 1, 0.5),
    "F.softplus": lambda x: functional.softplus(x, 2.0, 1.5),
    "base": lambda x: 2.0**x,
    "base-tensor": lambda x: like(x)[1:, 1].exp().sum() ** x,
    "torch.pow-base": lambda x: torch.pow(3.0, x),
    "jet-to-jet": lambda x: x ** x.sin(),
    "pow": lambda x: x.pow(3) + torch.pow(x, 0.5),
    "add-alpha": lambda x: torch.add(x, x * x, alpha=3.0),
    "add-alpha-constant": lambda x: torch.add(x.sin(), like(x)[:, 0], alpha=3.0),
    "constant-add-alpha": lambda x: torch.add(like(x)[:, 0], x.sin(), alpha=3.0),
    "sub-alpha": lambda x: torch.sub(x, x * x, alpha=3.0) - torch.sub(like(x)[:, 0], x, alpha=0.5),
    "mean": lambda x: x.mean(-1, keepdim=True) * x + torch.mean(x * x, dim=1, keepdim=True),
    "mean-without-axis": lambda x: torch.stack([x.mean(-1), x.sum(1) ** 2], dim=1),
    "prod": lambda x: x.prod(1, keepdim=True) + x.prod(-1).unsqueeze(1),
    "index": lambda x: torch.stack([x[:, 0] * x[:, 1], x[..., 2]], -1),
    "columns": lambda x: x[:, [0, 2]] * x[..., 1:2] + x[:, :2],
    "new-axis": lambda x: (x[:, None] * x[..., None]).sum((1, 2)).unsqueeze(-1),
    "reshape": lambda x: (x.reshape(-1, 3, 1) * x.reshape((4, 1, 3))).reshape(4, 9),
    "view": lambda x: (x.view(x.size(0), -1, 1) * like(x)).flatten(1),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(1) * x.ndim * len(x) * x.size()[1],
    "unbind": lambda x: torch.stack([*x.unbind(1), x.sin().unbind(-1)[0] * x.unbind(1)[2]], -1),
    "affine-layer-norm": lambda x: functional.layer_norm(x, (3,), like(x)[:, 0], like(x)[:, 1]),
    "split": lambda x: torch.cat([torch.cos(p) for p in torch.split(x, 1, dim=1)], -1) * x,
    "split-sizes": lambda x: x.split([1, 2], -1)[1] * x.split([1, 2], dim=1)[0],
    "chunk": lambda x: x.chunk(3, -1)[0] * torch.concat(x.chunk(3, 1)[1:], dim=1),
    "where": lambda x: torch.where(x > 1, x**3, x.sin()),
    "where-constants": lambda x: (
        torch.where(x <= 1, 0.0, x * x)
        + torch.where(torch.tensor([True, False, True], device=x.device), x * x, 1.0)
    ),
    "comparisons": lambda x: x * x * ((x >= 1) & (x < 1.2)) + x * (x < 1) * x,
    "ones": lambda x: torch.ones_like(x) * x + torch.zeros_like(x) + torch.full_like(x, 2.0),
    "matrix": lambda x: torch.div(x * x, 1 + x) @ like(x) + torch.matmul(x, like(x)),
    "vector": lambda x: ((x * x) @ like(x)[:, 0]).unsqueeze(1),
    "einsum": lambda x: torch.einsum("ni, io -> no", x * x, like(x)),
    "einsum-per-point": lambda x: torch.einsum(
        "io,ni,n->no", like(x), x * x, torch.arange(4.0, device=x.device)
    ),
    "einsum-two": lambda x: torch.einsum("ni,nj,jk->nki", x.sin(), x * x, like(x)).flatten(1),
    "einsum-order": lambda x: torch.einsum(
        "bc,nab,nbda->ncd",
        like(x).T,
        x.sin()[..., None] * x[:, None, :2],
        (x[:, :2, None] * x[:, None].cos())[:, :, None],
    ).flatten(1),
    "einsum-dot": lambda x: torch.einsum("ni,ni->n", x.sin(), x[:, [2, 0, 1]]).unsqueeze(1),
    "einsum-list": lambda x: torch.einsum("ni,nji->nj", [x, x[:, :, None] * x[:, None]]),
    "three-axes": lambda x: normed_arrays(x, functional.layer_norm),
}
CASES = METHODS | MODULES | CALLS
EXPANSION = Partials(torch.eye(3), [(0, 1, 2), (1, 1, 2)], [{(0, 2): 1.0, (1, 1): -2.0}])


def points(device):
    """Positive, and on both sides of every kink."""
    torch.manual_seed(1)
    return (0.3 + 1.5 * torch.rand(4, 3)).to(device)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_equals_nested_autodiff(name, device):
    f = NESTED.get(name, CASES[name])
    X, eye = points(device), torch.eye(3, device=device)
    c, second = (taylor_coefficients(CASES[name], X, e) for e in (EXPANSION, laplacian(3)))
    close(second[:, 0], CASES[name](X))
    for s, alpha in enumerate(EXPANSION.names):
        if isinstance(alpha, tuple):
            expected = derivative(f, X, [eye[i] for i in alpha])
            assert (c[:, s] - expected).abs().max() <= 1e-10 * max(1, expected.abs().max()), alpha
    lap = torch.stack([derivative(f, X, [v, v]) for v in eye]).sum(0)
    assert (second[:, -1] - lap).abs().max() <= 1e-10 * max(1, lap.abs().max())


NESTED = {  # PyTorch's own have no third derivative, or a wrong one
    "layer-norm": lambda x: layer_norm(x, (3,), eps=0.1),
    "affine-layer-norm": lambda x: layer_norm(x, (3,), like(x)[:, 0], like(x)[:, 1]),
    "three-axes": lambda x: normed_arrays(x, layer_norm),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "elu-2": lambda x: torch.where(x > 0, x, 2 * x.exp() - 2),
    "F.elu": lambda x: torch.where(x > 1, x - 1, ((x - 1).exp() - 1) / 2),
    "mish": lambda x: x * x.exp().log1p().tanh(),
    "silu": lambda x: x * x.sigmoid(),
    "gelu": lambda x: x * (1 + (x / 2**0.5).erf()) / 2,
    "gelu-tanh": lambda x: x * (1 + ((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh()) / 2,
    "softplus": lambda x: x.exp().log1p(),
    "softplus-3-1": lambda x: torch.where(3 * x > 1, x, (3 * x).exp().log1p() / 3),
    "F.softplus": lambda x: torch.where(2 * x > 1.5, x, (2 * x).exp().log1p() / 2),
}


def test_every_rule_has_a_case(monkeypatch):
    """By the functions that the cases call, as PyTorch names them, or as methods."""
    called = set()

    class Noted(dict):
        def __getitem__(self, name):
            called.add(name)
            return super().__getitem__(name)

        def get(self, name, default=None):
            called.add(name)
            return super().get(name, default)

    monkeypatch.setattr(jets, "RULES", Noted(RULES))
    for f in CASES.values():
        taylor_coefficients(f, points("cpu"), laplacian(3))
    assert set(RULES) <= called


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "words"),
    [
        (lambda x: x.mean(0, keepdim=True), "Axis 0 of a jet"),
        (lambda x: x.prod(0), "Axis 0"),
        (lambda x: torch.stack([x, x]), "Axis 0"),
        (lambda x: x.split(2)[0], "Axis 0"),
        (lambda x: x.unbind()[0], "Axis 0"),
        (lambda x: x.flatten(), "Axis 0"),
        (lambda x: x.unsqueeze(0)[:, 0], "Axis 0"),
        (lambda x: x.reshape(3, 4), "first axis of a jet is that of its 4 points"),
        (lambda x: x.reshape(-1), "first axis"),
        (lambda x: x[x[:, 0] > 1], "keeps all of its points"),
        (lambda x: x[..., 1:, :], "keeps all of its points"),
        (lambda x: x[:, 0] * x[:, 1:2], "Jets of 1 and of 2 axes|Jets of 2 and of 1 axes"),
        (lambda x: x + x[:, 0], "Jets of"),
        (lambda x: x[:, 0] + torch.ones(4, 4), "a jet of 1 axes"),
        (lambda x: x[:, 0] @ torch.ones(4, 2), "multiplied by a constant matrix"),
        (lambda x: x[:, 0], r"shape \(4,\), not \[4, outputs\]: out.unsqueeze\(1\)"),
        (lambda x: x[:, None], r"not \[4, outputs\]"),
        (lambda x: torch.einsum("ni,mi->nm", x, x), "axis of the points first"),
        (lambda x: torch.einsum("ni,ni->i", x, x), "axis of the points first"),
        (lambda x: torch.einsum("ni,ni", x, x), "an output"),
        (lambda x: torch.einsum("ni,ni,ni->n", x, x, x), "one or two of them"),
        (lambda x: torch.einsum("n...,...->n", x, torch.ones(3)), "no ellipsis"),
        (lambda x: torch.einsum("nii,ni->n", x[:, None] * x[..., None], x), "stands twice"),
        (lambda x: (-1.0) ** x, "must be positive"),
        (lambda x: functional.layer_norm(x[:, None], (1, 2)), "end not on"),
        (lambda x: x ** torch.ones(3), r"\(exponent \* x.log\(\)\).exp\(\)"),
        (lambda x: x.softmax(-1), "no method 'softmax'"),
        (nn.Dropout(), r"call eval\(\) first"),
    ],
)
def test_what_has_no_rule_says_what_to_do(f, words, device):
    kinds = (ValueError, IndexError, NotImplementedError, AttributeError)
    with pytest.raises(kinds, match=words):
        taylor_coefficients(f, points("cpu"), laplacian(3))


@pytest.mark.parametrize("coordinates", [[0, 0], [2], [-1], [0, 1, 1]])
def test_a_laplacian_over_coordinates_twice_or_outside_is_refused(coordinates):
    with pytest.raises(ValueError, match=r"different numbers from 0 to 1"):
        laplacian(2, coordinates)
    assert laplacian(2, []).C.sum() == 0
