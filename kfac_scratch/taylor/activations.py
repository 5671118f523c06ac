r"""Derivatives of elementwise functions, of any order.

Taylor mode needs the numbers $\sigma(z), \sigma'(z), \dots, \sigma^{(K)}(z)$ of a function
$\sigma$ at $z$. A function here returns them as a list of $K + 1$ tensors; its cost is some
elementwise operations for each. If $t = \sigma(z)$ solves $t' = q(t)$ with a polynomial $q$, every
derivative is a polynomial in $t$,

$$
\sigma^{(k)} = p_k(t), \qquad p_0(t) = t, \qquad p_{k+1} = p_k' \, q .
$$

Source: Griewank and Walther 2008, Evaluating Derivatives, chapter 13, whose recurrences these are.
"""

from collections.abc import Callable
from functools import lru_cache
from math import pi, prod

import torch
from torch import Tensor

from kfac_scratch.taylor.faa_di_bruno import partitions

Derivatives = Callable[[Tensor, int], list[Tensor]]


def evaluate(sigma: Derivatives, z: Tensor, K: int) -> list[Tensor]:
    """The value and `K` derivatives of a function at `z`.

    Raises:
        ValueError: If `sigma` returns fewer than `K` derivatives.
    """
    outer = sigma(z, K)
    if len(outer) <= K:
        raise ValueError(
            f"{K} derivatives of an elementwise function are needed here, but "
            f"{getattr(sigma, '__name__', sigma)} returned value and {len(outer) - 1} of them. "
            "An expansion of order K needs K, and K + 1 in a reverse pass."
        )
    return outer


def tanh(z: Tensor, K: int) -> list[Tensor]:
    """The hyperbolic tangent, by `t' = 1 - t^2`."""
    return _solution_of((1, 0, -1), z.tanh(), K)


def sigmoid(z: Tensor, K: int) -> list[Tensor]:
    """The logistic sigmoid, by `s' = s - s^2`."""
    return _solution_of((0, 1, -1), z.sigmoid(), K)


def exp(z: Tensor, K: int) -> list[Tensor]:
    """The exponential: every derivative is the function itself."""
    return [z.exp()] * (K + 1)


def sin(z: Tensor, K: int) -> list[Tensor]:
    """The sine, whose derivatives repeat after four."""
    s, c = z.sin(), z.cos()
    return [(s, c, -s, -c)[k % 4] for k in range(K + 1)]


def cos(z: Tensor, K: int) -> list[Tensor]:
    """The cosine: the first derivative of the sine."""
    return sin(z, K + 1)[1:]


def softplus(z: Tensor, K: int, beta: float = 1.0, threshold: float = 20.0) -> list[Tensor]:
    """The softplus `log(1 + exp(beta z)) / beta`; its first derivative is `sigmoid(beta z)`.

    It is linear where `beta z > threshold`, and its derivatives are those of a line there, as
    PyTorch's are. The jump at the threshold is that of the value, and has no derivative.
    """
    value = torch.nn.functional.softplus(z, beta, threshold)
    curved, linear = sigmoid(beta * z, K - 1), beta * z > threshold
    slopes = [(beta**k * s).masked_fill(linear, 0.0 if k else 1.0) for k, s in enumerate(curved)]
    return [value, *slopes][: K + 1]


def silu(z: Tensor, K: int) -> list[Tensor]:
    """The SiLU, `z sigmoid(z)`."""
    return _times_z(z, sigmoid(z, K))


def gelu(z: Tensor, K: int) -> list[Tensor]:
    r"""The exact GELU `z Phi(z)`, with the Gaussian distribution function; not its tanh fit."""
    return _times_z(z, [(1 + (z / 2**0.5).erf()) / 2, *_gaussian(z, K - 1)])


def relu(z: Tensor, K: int) -> list[Tensor]:
    """The ReLU. Its derivatives from the second on are zero, which ignores the kink at 0.

    Use it in products and compositions that are smooth enough, such as `relu(z)**3`. Not as the
    activation of a PINN with second derivatives: its Laplacian is zero almost everywhere.
    """
    return [z.relu(), (z > 0).to(z.dtype), *([torch.zeros_like(z)] * (K - 1))][: K + 1]


def sinh(z: Tensor, K: int) -> list[Tensor]:
    """The hyperbolic sine, whose derivatives repeat after two."""
    return [z.cosh() if k % 2 else z.sinh() for k in range(K + 1)]


def cosh(z: Tensor, K: int) -> list[Tensor]:
    """The hyperbolic cosine: the first derivative of the hyperbolic sine."""
    return sinh(z, K + 1)[1:]


def log(z: Tensor, K: int) -> list[Tensor]:
    """The natural logarithm, whose first derivative is `1 / z`."""
    return [z.log(), *power(z, K - 1, -1)]


def atan(z: Tensor, K: int) -> list[Tensor]:
    """The inverse tangent, by Leibniz's rule for `(1 + z^2) f' = 1`."""
    f = [z.atan(), 1 / (1 + z * z)]
    for k in range(1, K):
        f.append(-(2 * k * z * f[k] + (k * (k - 1) * f[k - 1] if k > 1 else 0)) * f[1])
    return f[: K + 1]


def erf(z: Tensor, K: int) -> list[Tensor]:
    """The error function; its first derivative is a Gaussian of variance 1/2, times 2."""
    density = _gaussian(2**0.5 * z, K - 1)
    return [z.erf(), *(2 ** (1.5 + k / 2) * phi for k, phi in enumerate(density))]


def elu(z: Tensor, K: int, alpha: float = 1.0) -> list[Tensor]:
    """The ELU: the identity where `z > 0`, else `alpha (exp(z) - 1)`; the kink is ignored."""
    right = [z, torch.ones_like(z), *[torch.zeros_like(z)] * (K - 1)][: K + 1]
    left = z.clamp(max=0).exp()  # finite where it is not chosen
    return [
        torch.where(z > 0, line, alpha * (left if k else left - 1)) for k, line in enumerate(right)
    ]


def mish(z: Tensor, K: int) -> list[Tensor]:
    """The Mish, `z tanh(softplus(z))`."""
    return _times_z(z, composed(tanh, softplus(z, K)))


def gelu_tanh(z: Tensor, K: int) -> list[Tensor]:
    """The tanh fit of the GELU, `z (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2`."""
    c = (2 / pi) ** 0.5
    cubic = [0.044715 * c * f for f in power(z, K, 3)]
    line = [c * z, torch.full_like(z, c)]
    inner = [f + line[k] if k < 2 else f for k, f in enumerate(cubic)]
    value, *slopes = composed(tanh, inner)
    return _times_z(z, [(1 + value) / 2, *(f / 2 for f in slopes)])


def abs(z: Tensor, K: int) -> list[Tensor]:
    """The absolute value. Its derivatives from the second on are zero: the kink is ignored."""
    return [z.abs(), z.sign(), *[torch.zeros_like(z)] * (K - 1)][: K + 1]


def composed(sigma: Derivatives, inner: list[Tensor]) -> list[Tensor]:
    """The derivatives of `sigma(h)` of one variable, given those of `h`: Faà di Bruno's formula."""
    outer = sigma(inner[0], len(inner) - 1)
    result = [outer[0]]
    for k in range(1, len(inner)):
        terms = partitions((0,) * k).items()
        result.append(
            torch.stack(
                [
                    n
                    * outer[len(pi)]
                    * prod((inner[len(b)] for b in pi[1:]), start=inner[len(pi[0])])
                    for pi, n in terms
                ]
            ).sum(0)
        )
    return result


def power(z: Tensor, K: int, exponent: float | int) -> list[Tensor]:
    """The power `z^p`; for a whole `p >= 0`, derivatives beyond the p-th are zero."""
    factors = [prod(exponent - i for i in range(k)) for k in range(K + 1)]
    return [c * z ** (exponent - k) if c else torch.zeros_like(z) for k, c in enumerate(factors)]


def _gaussian(z: Tensor, K: int) -> list[Tensor]:
    """The Gaussian density, `phi^(k) = -z phi^(k-1) - (k-1) phi^(k-2)`."""
    phi = [(-z * z / 2).exp() / (2 * pi) ** 0.5]
    for k in range(1, K + 1):
        phi.append(-z * phi[-1] - ((k - 1) * phi[-2] if k > 1 else 0))
    return phi[: K + 1]


def _times_z(z: Tensor, f: list[Tensor]) -> list[Tensor]:
    """The product `z f(z)` by Leibniz's rule: its k-th derivative is `z f^(k) + k f^(k-1)`."""
    return [z * f[0], *(z * f[k] + k * f[k - 1] for k in range(1, len(f)))]


def _solution_of(slope: tuple[int, ...], t: Tensor, K: int) -> list[Tensor]:
    """All derivatives of a function `t` with `t' = slope(t)`, a polynomial (constant first)."""
    return [t, *(_horner(_polynomial(slope, k), t) for k in range(1, K + 1))][: K + 1]


@lru_cache
def _polynomial(slope: tuple[int, ...], k: int) -> tuple[int, ...]:
    if k == 0:
        return (0, 1)
    derivative = [i * c for i, c in enumerate(_polynomial(slope, k - 1))][1:]
    result = [0] * (len(derivative) + len(slope) - 1)
    for i, c in enumerate(derivative):
        for j, q in enumerate(slope):
            result[i + j] += c * q
    return tuple(result)


def _horner(coefficients: tuple[int, ...], t: Tensor) -> Tensor:
    *rest, leading = coefficients
    value = torch.full_like(t, leading)
    for c in reversed(rest):
        value = value * t + c if c else value * t
    return value
