"""What skeletons are written from: Python with `$$name`, `$$dashed`, `$$library` and `$$module`.

An adapter comes in the four shapes that an implementation's numbers have: `SHAPES`.
"""

from string import Template

FAMILY = Template('''\
"""Cases of the family `$dashed`: linear layers without activations under squared error.

Sizes within a case are pairwise coprime, so that a wrong scale names what was forgotten. The
identifier is published: it never changes its meaning, and neither do the case's numbers.
"""

from kfac_scratch.conformance.cases.case import Case
from kfac_scratch.conformance.cases.families.common import ALL_EXACT, chain, loss

CASES = [
    Case(
        "$dashed-linear-mse-mean",  # the identifier, which numbers are drawn from
        "deep-linear",  # why the expectation holds: a key of `theorems.THEOREMS`
        chain(3, 7, 5),  # the network: inputs, hidden units, outputs
        loss("mse", "mean"),
        (11, 3),  # the input's shape, data first
        ALL_EXACT,  # what expand, reduce and ekfac must be
        tags=("linear", "mse"),
    ),
]
''')

WITH_NUMBERS = '''\
"""$name: KFAC for linear layers under squared error, in forty lines.

Scale: the curvature is that of the loss exactly as PyTorch computes it, so that every scale is 1.

Not asked for: other losses, convolutions, several mini-batches. What this code meets and does not
cover (positions, a layer that is used twice) it refuses with a reason.
"""

from collections.abc import Mapping
${partial}from typing import Any

import torch
from torch import Tensor

$imports


class Adapter:
    """KFAC by forward hooks; the bias is the last input."""

    def capabilities(self) -> Capabilities:
        """Linear layers, squared error, one batch."""
        return Capabilities(
            "$name", "1", ops=frozenset({"linear"}), losses=frozenset({"mse"}), batches=False
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """The loss's own."""
        return 1.0

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Every layer's block, as $shape."""
        inputs, outputs, f = recorded(request)
        grads = sent_back(request, f, list(outputs.values()))
        found = {}
        for name, g in zip(outputs, grads, strict=True):
            a = with_bias(request, name, inputs[name])
            A, B = a.T @ a / len(a), torch.einsum("vno,vnp->op", g, g)
            answer = $answer
            found[name] = LayerBlock(joint=answer)
        return found
$product

def recorded(request: Request) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Inputs and outputs of all layers by name, and the network's output."""
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, x: Tensor, z: Tensor) -> Tensor:
        if x.ndim > 2:
            raise NotSupported(f"{name}: a layer that is applied at several positions")
        if name in inputs:
            raise NotSupported(f"{name}: a layer that is used twice")
        inputs[name], outputs[name] = x.detach(), z
        return z.clone()  # the next layer may write in place

    handles = [
        request.model.get_submodule(name).register_forward_hook(
            lambda layer, x, z, name=name: keep(name, x[0], z)
        )
        for name in request.layers
    ]
    f = request.model(request.batches[0][0])
    for handle in handles:
        handle.remove()
    return inputs, outputs, f


def sent_back(request: Request, f: Tensor, outputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Vectors `[V, N, d_out]` at every layer: the root of the loss's Hessian, sent backward."""
    D = f.numel() if request.loss.reduction == "mean" else 1
    basis = torch.eye(f[0].numel()).to(f).reshape(-1, 1, *f.shape[1:])
    vectors = hessian_root(D) * basis.expand(-1, *f.shape)
    grads: Any = torch.autograd.grad(f, outputs, vectors, is_grads_batched=True)
    return tuple(grads)


def hessian_root(divisor: float) -> float:
    """The root of the second derivative of a squared error that is divided by a number."""
    return (2.0 / divisor) ** 0.5


def with_bias(request: Request, name: str, x: Tensor) -> Tensor:
    """A layer's inputs, with a 1 behind them if it has a bias."""
    has_bias = request.model.get_submodule(name).bias is not None
    return torch.cat([x, torch.ones_like(x[:, :1])], 1) if has_bias else x
'''

PRECONDITIONER = '''\
"""$name: an optimizer's preconditioner, which knows no loss and shows no matrix.

As it stands, the implementation is the class `Preconditioner` below: put yours in its place. It is
driven with linear losses, see `drivers`; what it does to every unit vector tells its matrix.

Scale: sums over rows, so that with linear losses every scale is 1. With a mean loss as its users
pass it, gradients are divided by `D`, what the mean divides by, and the block is too small by `D`.

Not asked for: convolutions, several mini-batches, whose running average is not that of all data.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kfac_scratch.conformance import drivers
from kfac_scratch.conformance.protocol import (
    Capabilities,
    LayerBlock,
    NotSupported,
    Request,
    VectorAnswer,
)


class Preconditioner:
    """KFAC for linear layers: hooks see inputs and gradients, and `step` changes `.grad`.

    The averages start at the identity.
    """

    def __init__(self, model: nn.Module, damping: float = 1.0, decay: float = 0.1) -> None:
        self.damping, self.decay = damping, decay
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
        self.inputs: dict[nn.Linear, Tensor] = {}
        self.A = {m: torch.eye(matrix(m).shape[1]).to(m.weight) for m in self.layers}
        self.B = {m: torch.eye(m.out_features).to(m.weight) for m in self.layers}
        for m in self.layers:
            m.register_forward_hook(self.forward)

    def forward(self, layer: nn.Linear, args: tuple[Tensor, ...], z: Tensor) -> Tensor:
        """What a layer gets; what it returns is watched."""
        if layer in self.inputs:
            raise NotSupported("a layer that is used twice")
        a = args[0].detach().flatten(0, -2)
        ones = a.new_ones(len(a), int(layer.bias is not None))
        self.inputs[layer] = torch.cat([a, ones], 1)
        z = z.clone()  # the next layer may write in place
        z.register_hook(lambda g: self.backward(layer, g))
        return z

    def backward(self, layer: nn.Linear, g: Tensor) -> None:
        """The running averages: of a mean over rows for `A`, and of a sum for `B`."""
        a, g = self.inputs.pop(layer), g.flatten(0, -2)
        for factors, new in ((self.A, a.mT @ a / len(a)), (self.B, g.mT @ g)):
            factors[layer] = self.decay * factors[layer] + (1 - self.decay) * new

    def step(self) -> None:
        """Every layer's gradient becomes `(B x A + damping)^-1` times it."""
        for m in self.layers:
            (a, QA), (b, QB) = torch.linalg.eigh(self.A[m]), torch.linalg.eigh(self.B[m])
            W = QB.mT @ matrix(m) @ QA / (torch.outer(b, a) + self.damping)
            set_matrix(m, QB @ W @ QA.mT)


def matrix(layer: nn.Linear) -> Tensor:
    """A layer's gradient, or its values if there is none, with the bias as last column."""
    parts = [p if p.grad is None else p.grad for p in layer.parameters()]
    return torch.cat([p.detach().reshape(len(p), -1) for p in parts], 1)


def set_matrix(layer: nn.Linear, W: Tensor) -> None:
    """The inverse of `matrix`."""
    parts = W.split([layer.in_features, W.shape[1] - layer.in_features], 1)
    for p, part in zip(layer.parameters(), parts, strict=False):
        p.grad = part.reshape(p.shape).clone()


class Adapter:
    """What the preconditioner does to every unit vector."""

    def capabilities(self) -> Capabilities:
        """Linear layers, any loss, one batch, and what it does to a gradient."""
        return Capabilities(
            "$name",
            "1",
            fishers=frozenset({"type2", "empirical"}),
            ops=frozenset({"linear"}),
            losses=frozenset({"mse", "cross-entropy", "bce"}),
            batches=False,
            damping=frozenset({"exact"}),
        )

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """As the documentation says."""
        return 1.0 if request.fisher == "type2" else 1 / self.divisor

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Every layer's block, or its preconditioned gradient if that is asked for."""
        self.divisor = drivers.total_divisor(request)  # runs the model: before there are hooks
        [(X, v)] = drivers.rows(request) if request.fisher == "type2" else request.batches
        implementation = Preconditioner(request.model)
        for _ in range(drivers.updates_to_forget(implementation.decay)):
            f = request.model(X)
            loss = (f * v).sum() if request.fisher == "type2" else request.loss(f, v)
            loss.backward()
        for name, p in request.model.named_parameters():
            p.grad = request.gradient[name].clone() if request.damping else p.grad
        if request.damping:
            implementation.damping = request.damping[1]
            implementation.step()
        return {name: self.block(implementation, request, name) for name in request.layers}

    def block(self, implementation: Preconditioner, request: Request, name: str) -> LayerBlock:
        """One layer's."""
        layer = request.model.get_submodule(name)
        assert isinstance(layer, nn.Linear)

        def precondition(W: Tensor, damping: float) -> Tensor:
            set_matrix(layer, W)
            implementation.damping = damping
            implementation.step()
            return matrix(layer)

        if request.damping:
            return LayerBlock(joint=VectorAnswer(matrix(layer)))
        return LayerBlock(joint=drivers.from_preconditioner(precondition, matrix(layer)))
'''


def with_numbers(
    shape: str, answer: str, imports: str, partial: str = "", product: str = ""
) -> Template:
    """An adapter's template, with the lines in which the shapes differ."""
    found = {"shape": shape, "answer": answer, "imports": imports}
    found |= {"partial": partial, "product": product}
    return Template(Template(WITH_NUMBERS).safe_substitute(found))


PROTOCOL = """\
from kfac_scratch.conformance.protocol import (
    Capabilities,
    LayerBlock,
    NotSupported,
    Request,
)"""
PRODUCT = '''

def product(A: Tensor, B: Tensor, W: Tensor) -> Tensor:
    """The block times a gradient `[d_out, d_in]`, as code without matrices has it."""
    return B @ W @ A
'''
SHAPES = {
    "factors": with_numbers(
        "its two factors",
        "KroneckerAnswer(A, B)",
        PROTOCOL.replace("Capabilities,", "Capabilities,\n    KroneckerAnswer,"),
    ),
    "dense": with_numbers(
        "a whole matrix",
        "DenseAnswer(torch.kron(B, A))",
        PROTOCOL.replace("Capabilities,", "Capabilities,\n    DenseAnswer,"),
    ),
    "product": with_numbers(
        "its products with unit vectors",
        "drivers.from_products(partial(product, A, B), torch.outer(B[0], A[0]))",
        f"from kfac_scratch.conformance import drivers\n{PROTOCOL}",
        partial="from functools import partial\n",
        product=PRODUCT,
    ),
    "preconditioner": Template(PRECONDITIONER),
}

FINDING = Template('''\
"""The squared error is taken with one half in front of it.

Text for the maintainer: what is expected, what is got, and a reproduction that needs nothing of
this package. As it stands, the library with the mistake is the class `Adapter` below: KFAC that is
right but for `second_derivative`. PyTorch's squared error has no factor in front of it, so that its
second derivative is 2:

```python
import torch

f = torch.zeros(1, 1, requires_grad=True)
loss = torch.nn.MSELoss(reduction="sum")
print(torch.func.hessian(lambda v: loss(v, torch.ones(1, 1)))(f.detach()).item())
# prints
#   2.0
```

Expected: 2. The library's `second_derivative` returns 1, and every block is too small by 1/2.

Suggestion: return 2, or write the factor 1/2 into the documentation.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from kfac_scratch.conformance.adapters.ours import Adapter as Right
from kfac_scratch.conformance.audit.mending import mended
from kfac_scratch.conformance.protocol import (
    Capabilities,
    KroneckerAnswer,
    LayerBlock,
    Request,
)

LIBRARY, VERSION = "$library", "1"  # as the adapter's capabilities say
ADAPTER = "$module:Adapter"
TITLE = "The squared error is halved"
CASES = (
    ("deep-linear-mse-mean-bias", "expand"),
    ("last-layer-mse-tanh-sum", "expand"),
)
CAUSE = "$name.py, the last line of Adapter.second_derivative: 1 is returned, 2 is right."
DOCUMENTED = "silent"
THREAD = ""


class Adapter(Right):
    """The library with the mistake. Delete it, and give ADAPTER another one."""

    def capabilities(self) -> Capabilities:
        """KFAC-expand under squared error."""
        return Capabilities(LIBRARY, VERSION, losses=frozenset({"mse"}))

    def scale(self, request: Request, layer: str, part: str) -> float | None:
        """The documentation does not say."""
        return None

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """What is right, as if the second derivative were another one."""
        c, blocks = self.second_derivative() / 2, super().blocks(request)
        parts = {name: block.joint for name, block in blocks.items()}
        return {
            name: LayerBlock(joint=KroneckerAnswer(K.A, c * K.B))
            for name, K in parts.items()
            if isinstance(K, KroneckerAnswer)
        }

    def second_derivative(self) -> float:
        """Of the squared error."""
        return 1.0


@contextmanager
def patch() -> Iterator[None]:
    """One expression is replaced, and nothing else."""
    with mended(Adapter, "second_derivative", ("return 1.0", "return 2.0")):
        yield
''')
