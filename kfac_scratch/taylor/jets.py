r"""Taylor mode: the derivatives of a network by its input, in one forward pass.

A `Jet` stands for a batch of vectors `[N, h]` that depend on the network's input. It holds their
value and some derivatives: the coefficients `c[n, s]` that an `Expansion` names. `Jet` overloads
PyTorch's functions, so that a module can be called with a jet in place of a tensor. So *any*
forward pass that is built of the functions in `RULES` has a Taylor mode: residual connections,
Fourier features, a factor that enforces boundary conditions.

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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from kfac_scratch.taylor import activations
from kfac_scratch.taylor.activations import Derivatives
from kfac_scratch.taylor.expansions import Expansion, laplacian


@dataclass(frozen=True, eq=False)
class Jet:
    """A batch of vectors `[N, h]` with their derivatives, to be used like the tensor of values.

    Use it through `taylor_coefficients`, which makes the first jet. Not with in-place operations or
    indices of the first axis, which have no rule.

    Cost: `S` times the memory of the values, and `S` times the work of a linear layer.
    """

    c: Float[Tensor, "N S h"]
    expansion: Expansion

    @property
    def shape(self) -> torch.Size:
        """The shape of the values, `[N, h]`."""
        return self.c[:, 0].shape

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

    def __add__(self, other: Jet | Tensor | float | int) -> Jet:
        return _add(self, other)

    def __sub__(self, other: Jet | Tensor | float | int) -> Jet:
        return _add(self, -other)

    def __rsub__(self, other: Tensor | float | int) -> Jet:
        return _add(-self, other)

    def __mul__(self, other: Jet | Tensor | float | int) -> Jet:
        return _multiply(self, other)

    def __truediv__(self, other: Jet | Tensor | float | int) -> Jet:
        return _divide(self, other)

    def __rtruediv__(self, other: Tensor | float | int) -> Jet:
        return _divide(other, self)

    def __neg__(self) -> Jet:
        return replace(self, c=-self.c)

    def __pow__(self, exponent: float | int) -> Jet:
        return _power(self, exponent)

    def __matmul__(self, M: Any) -> Jet:
        return _matmul(self, M)

    def __getitem__(self, key: Any) -> Jet:
        match key:
            case (slice(start=None, stop=None, step=None), slice() | list() as columns):
                return replace(self, c=self.c[..., columns])
        raise IndexError("A jet is indexed by a slice of its last axis only: x[:, 0:1].")

    def sum(self, dim: int, keepdim: bool = False) -> Jet:
        """The sum over the last axis, which must be kept."""
        return _sum(self, dim, keepdim)

    __radd__, __rmul__ = __add__, __mul__


def elementwise(derivatives: Derivatives, x: Jet) -> Jet:
    """The jet of an elementwise function of a jet, given the function's derivatives."""
    return replace(x, c=x.expansion.compose(derivatives, x.c))


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
        return elementwise(self.derivatives, x) if isinstance(x, Jet) else self.derivatives(x, 0)[0]


def taylor_coefficients(
    model: Callable[[Any], Any], X: Float[Tensor, "N d"], expansion: Expansion
) -> Tensor:
    """The coefficients `[N, S, outputs]` of a network's output at `X`, in one forward pass.

    Use it for derivatives by the input that a residual needs. Not for functions without a rule
    (see `RULES`): nested autodiff takes any.

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


# ---- the rules ----------------------------------------------------------------------------------


def _linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    c = x.c @ weight.T
    return replace(x, c=c if bias is None else c + _to_value(bias, x))


def _to_value(constant: Float[Tensor, "... h"], x: Jet) -> Float[Tensor, "... S h"]:
    """A constant as coefficients: it has no derivatives."""
    zeros = constant.new_zeros(*constant.shape[:-1], x.c.shape[1] - 1, constant.shape[-1])
    return torch.cat([constant.unsqueeze(-2), zeros], dim=-2)


def _matmul(x: Any, M: Any) -> Jet:
    if isinstance(x, Tensor) or isinstance(M, Jet) or M.ndim != 2:
        raise ValueError("A jet is multiplied by a constant matrix from the right: x @ M.")
    return replace(x, c=x.c @ M)


def _add(x: Any, y: Any, alpha: float | int = 1) -> Jet:
    if isinstance(x, Jet) and isinstance(y, Jet):
        return replace(x, c=torch.add(x.c, y.c, alpha=alpha))
    if isinstance(y, Jet):
        return _add(alpha * y, x)
    y = alpha * torch.as_tensor(y, dtype=x.c.dtype, device=x.c.device)
    return replace(x, c=x.c + _to_value(y if y.ndim else y.expand(1), x))


def _multiply(x: Any, y: Any) -> Jet:
    if isinstance(x, Jet) and isinstance(y, Jet):
        return replace(x, c=x.expansion.product(x.c, y.c))
    if isinstance(y, Jet):
        return _multiply(y, x)
    return replace(x, c=x.c * (y.unsqueeze(-2) if isinstance(y, Tensor) and y.ndim > 1 else y))


def _divide(x: Any, y: Any) -> Jet:
    return _multiply(x, _power(y, -1) if isinstance(y, Jet) else 1 / y)


def _power(x: Jet, exponent: float | int) -> Jet:
    return elementwise(partial(activations.power, exponent=exponent), x)


def _cat(xs: Sequence[Any], dim: int = 0) -> Jet:
    if dim not in (1, -1):
        raise ValueError(f"Jets are joined along their last axis, not along {dim}.")
    like = next(x for x in xs if isinstance(x, Jet))
    parts = [x.c if isinstance(x, Jet) else _to_value(x, like) for x in xs]
    return replace(like, c=torch.cat(parts, dim=-1))


def _sum(x: Jet, dim: int, keepdim: bool = False) -> Jet:
    if dim not in (1, -1) or not keepdim:
        raise ValueError("A jet is summed over its last axis only: x.sum(-1, keepdim=True).")
    return replace(x, c=x.c.sum(-1, keepdim=True))


def _gelu(x: Jet, approximate: str = "none") -> Jet:
    if approximate != "none":
        raise NotImplementedError("Taylor mode has the exact GELU only: nn.GELU().")
    return elementwise(activations.gelu, x)


def _softplus(x: Jet, beta: float = 1.0, threshold: float = 20.0) -> Jet:
    return elementwise(partial(activations.softplus, beta=beta, threshold=threshold), x)


def _of(derivatives: Derivatives) -> Callable[..., Jet]:
    return lambda x, inplace=False: elementwise(derivatives, x)


RULES: dict[str, Callable[..., Jet]] = {
    "linear": _linear,
    "matmul": _matmul,
    "add": _add,
    "sub": lambda x, y: _add(-y, x),
    "neg": lambda x: -x,
    "mul": _multiply,
    "div": _divide,
    "pow": _power,
    "square": lambda x: _power(x, 2),
    "cat": _cat,
    "sum": _sum,
    "gelu": _gelu,
    "softplus": _softplus,
    "tanh": _of(activations.tanh),
    "sigmoid": _of(activations.sigmoid),
    "silu": _of(activations.silu),
    "relu": _of(activations.relu),
    "exp": _of(activations.exp),
    "sin": _of(activations.sin),
    "cos": _of(activations.cos),
}
