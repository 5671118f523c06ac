"""What skeletons are written from: Python with `$$name`, `$$dashed`, `$$library` and `$$module`."""

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

ADAPTER = Template('''\
"""$name: KFAC for linear layers under squared error, in forty lines.

Scale: the curvature is that of the loss exactly as PyTorch computes it, so that every scale is 1.

Not asked for: other losses, convolutions, several mini-batches. What this code meets and does not
cover (positions, a layer that is used twice) it refuses with a reason.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kfac_scratch.conformance.protocol import (
    Capabilities,
    KroneckerAnswer,
    LayerBlock,
    NotSupported,
    Request,
)


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
        """Both factors of every layer."""
        inputs, outputs, f = recorded(request)
        grads = sent_back(request, f, list(outputs.values()))
        found = {}
        for name, g in zip(outputs, grads, strict=True):
            a = with_bias(request, name, inputs[name])
            A, B = a.T @ a / len(a), torch.einsum("vno,vnp->op", g, g)
            found[name] = LayerBlock(joint=KroneckerAnswer(A, B))
        return found


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
''')

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
