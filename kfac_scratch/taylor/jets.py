r"""Taylor mode: the derivatives of a network by its input, in one forward pass.

A `Jet` stands for a batch of vectors `[N, h]` that depend on the network's input. It holds their
value and some derivatives: the coefficients `c[n, s]` that an `Expansion` names. `Jet` overloads
PyTorch's functions, so that a module can be called with a jet in place of a tensor. So *any*
forward pass that is built of the functions in `rules.RULES` has a Taylor mode: residual
connections, Fourier features, a factor that enforces boundary conditions.

$$
\begin{aligned}
\text{linear:} \quad & c_s \mapsto W c_s, \text{ and the bias is added to the value only}, \\
\text{elementwise:} \quad & \text{the formula of Faà di Bruno, see `expansions`}, \\
\text{product:} \quad & \text{the rule of Leibniz.}
\end{aligned}
$$

All $S$ coefficients meet the same $W$: a linear layer of a jet is a layer with shared weights.

Sources: Bettencourt, Johnson and Duvenaud 2019; Dangel et al. 2024 (arXiv:2405.15603), §3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.taylor import activations, rules
from kfac_scratch.taylor.activations import Derivatives
from kfac_scratch.taylor.expansions import Expansion, laplacian
from kfac_scratch.taylor.rules import RULES


@dataclass(frozen=True, eq=False)
class Jet:
    """A batch of vectors `[N, h]` with their derivatives, to be used like the tensor of values.

    Inside a network, it may be a batch of arrays `[N, ...]` of any shape. Use it through
    `taylor_coefficients`, which makes the first jet. Not with in-place operations or
    indices of the first axis, which have no rule.

    Cost: `S` times the memory of the values, and `S` times the work of a linear layer.
    """

    c: Float[Tensor, "N S *shape"]
    expansion: Expansion

    @property
    def shape(self) -> torch.Size:
        """The shape of the values, `[N, h]`, say."""
        return self.c[:, 0].shape

    @property
    def ndim(self) -> int:
        """The number of axes of the values."""
        return self.c.ndim - 1

    def dim(self) -> int:
        """The number of axes of the values."""
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        """The shape of the values, or the length of one axis."""
        return self.shape if dim is None else self.shape[dim]

    @property
    def dtype(self) -> torch.dtype:
        """The coefficients' dtype."""
        return self.c.dtype

    @property
    def device(self) -> torch.device:
        """The coefficients' device."""
        return self.c.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """The rule for one of PyTorch's functions, applied."""
        rule = RULES.get(func.__name__)
        if rule is None:
            raise NotImplementedError(
                f"Taylor mode has no rule for torch's {func.__name__!r}. It has: "
                f"{', '.join(sorted(RULES))}. A function of single entries needs only its "
                "derivatives: taylor.Elementwise(derivatives)."
            )
        return rule(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """A method is the function of its name: `x.tanh()` is `torch.tanh(x)`."""
        if name not in RULES:
            raise AttributeError(
                f"A jet has no method {name!r}. Its methods are: {', '.join(sorted(RULES))}."
            )
        return partial(RULES[name], self)

    def __getitem__(self, key: Any) -> Jet:
        return rules.take(self, key)

    def __len__(self) -> int:
        return len(self.c)

    def __add__(self, other: Any) -> Jet:
        return rules.add(self, other)

    def __sub__(self, other: Any) -> Jet:
        return rules.add(self, other, alpha=-1)

    def __rsub__(self, other: Any) -> Jet:
        return rules.add(other, self, alpha=-1)

    def __mul__(self, other: Any) -> Jet:
        return rules.multiply(self, other)

    def __truediv__(self, other: Any) -> Jet:
        return rules.divide(self, other)

    def __rtruediv__(self, other: Any) -> Jet:
        return rules.divide(other, self)

    def __neg__(self) -> Jet:
        return rules.multiply(self, -1)

    def __abs__(self) -> Jet:
        return rules.elementwise(activations.abs, self)

    def __pow__(self, exponent: Any) -> Jet:
        return rules.raised(self, exponent)

    def __rpow__(self, base: Any) -> Jet:
        return rules.raised(base, self)

    def __matmul__(self, M: Any) -> Jet:
        return rules.matmul(self, M)

    def __gt__(self, other: Any) -> Tensor:
        return RULES["gt"](self, other)

    def __lt__(self, other: Any) -> Tensor:
        return RULES["lt"](self, other)

    def __ge__(self, other: Any) -> Tensor:
        return RULES["ge"](self, other)

    def __le__(self, other: Any) -> Tensor:
        return RULES["le"](self, other)

    __radd__, __rmul__ = __add__, __mul__


class Elementwise(Module):
    """An activation given by its derivatives: `derivatives(z, K)` lists value and `K` derivatives.

    Use it for activations without a rule. Not for those in `activations`, whose PyTorch modules
    have a rule already.

    Cost: that of `derivatives(z, K)` at every call. `K` is the order of the expansion, and one more
    in a reverse pass.
    """

    def __init__(self, derivatives: Derivatives) -> None:
        super().__init__()
        self.derivatives = derivatives

    def forward(self, x: Any) -> Any:
        """The value at a tensor, all coefficients of a jet."""
        return (
            rules.elementwise(self.derivatives, x)
            if isinstance(x, Jet)
            else self.derivatives(x, 0)[0]
        )


def taylor_coefficients(
    model: Callable[[Any], Any], X: Float[Tensor, "N d"], expansion: Expansion
) -> Tensor:
    """The coefficients `[N, S, outputs]` of a network's output at `X`, in one forward pass.

    Use it for derivatives by the input that a residual needs. Not for functions without a rule
    (see `rules.RULES`): nested autodiff takes any.

    Law: coefficient `s` is the derivative `expansion.names[s]`; autograd can differentiate it.
    Cost: about `S` ordinary forward passes, and `S` times their memory.

    Raises:
        NotImplementedError: If the network calls a function that has no rule.
        ValueError: If points and expansion do not fit, or the output is not `[N, outputs]`.
    """
    if X.ndim != 2:
        raise ValueError(f"Taylor mode needs inputs of shape [N, d], got {tuple(X.shape)}.")
    out = model(Jet(expansion.start(X), expansion))
    if not isinstance(out, Jet):
        raise ValueError(f"The network's output is a {type(out).__name__}: it ignores its input.")
    if out.ndim != 2 or len(out) != len(X):
        raise ValueError(
            f"The network's output has shape {tuple(out.shape)}, not [{len(X)}, outputs]: "
            "out.unsqueeze(1) makes [N, 1] of [N]."
        )
    return out.c


def forward_laplacian(
    model: Callable[[Any], Any], X: Float[Tensor, "N d"]
) -> tuple[Float[Tensor, "N k"], Float[Tensor, "N d k"], Float[Tensor, "N k"]]:
    """A network's value, gradient and Laplacian with respect to its input.

    Use it for the Laplacian by itself. Not in a loss of several terms: `linearize` and `pinn_loss`
    take expansions.

    Cost: about `d + 2` ordinary forward passes, and `d + 2` times their memory.
    """
    c = taylor_coefficients(model, X, laplacian(X.shape[1]))
    return c[:, 0], c[:, 1:-1], c[:, -1]
