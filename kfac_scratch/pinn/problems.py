r"""Differential equations with known solutions, to train on and to measure against.

A `Problem` draws the points of its terms, and knows its solution. Each equation is one small
function of the field and the points: to solve another one, write that function and a `Term`.

| Problem | Equation | Solution |
| --- | --- | --- |
| `poisson` | $\Delta u + f = 0$ | $\prod_i \sin \pi x_i$ |
| `poisson_cosines` | $\Delta u + f = 0$ | $\sum_i \cos \pi x_i$ |
| `helmholtz` | $\Delta u + k^2 u = f$ | $\prod_i \sin k_i \pi x_i$ |
| `heat` | $\partial_t u = \tfrac14 \Delta u$ | $e^{-d \pi^2 t / 4} \prod_i \sin \pi x_i$ |
| `log_fokker_planck` | of $p = e^q$, drift $-x / 2$, noise $\sqrt 2$ | a spreading Gaussian |
| `burgers` | $\partial_t u + u \, \partial_x u = \nu \, \partial_x^2 u$ | a travelling front |
| `kovasznay` | stationary Navier-Stokes, three unknowns | Kovasznay's flow |

Sources: Dangel, Müller and Zeinhofer 2024 (arXiv:2405.15603), §4, for Poisson, heat and
Fokker-Planck; Kovasznay 1948.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import pi

import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.nn import Linear, Module, Sequential, Tanh

from kfac_scratch.pinn.terms import Field, Term
from kfac_scratch.taylor.expansions import laplacian, value_only

Bounds = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Problem:
    """A differential equation on a box, with its solution.

    It has many parameters, because all of them define the equation.

    Attributes:
        box: Bounds of each coordinate.
        solution: From points `[N, d]` to values `[N, outputs]`.
        equation: The residual in the interior.
        condition: The residual on the boundary.
        faces: The faces on which the condition holds: a coordinate, and 0 for its lower end, 1 for
            its upper one. Points are drawn uniformly from this list, so that a face that is listed
            twice gets twice as many.
        space: The coordinates of the Laplacian. Default: all.
        outputs: The number of unknown functions.
    """

    box: Bounds
    solution: Callable[[Tensor], Tensor]
    equation: Callable[[Field, Tensor], Tensor]
    condition: Callable[[Field, Tensor], Tensor]
    faces: Sequence[tuple[int, int]]
    space: Sequence[int] | None = None
    outputs: int = 1

    def terms(self, interior: int, boundary: int, generator: Generator) -> list[Term]:
        """The terms at fresh points: the equation inside, the condition on the boundary."""
        d = len(self.box)
        inside, outside = self.points(interior, generator), self.points(boundary, generator)
        face = torch.randint(
            len(self.faces), (boundary,), generator=generator, device=generator.device
        )
        ends = torch.tensor(self.faces, device=generator.device)[face]  # [N, 2]
        bounds = torch.tensor(self.box, dtype=outside.dtype, device=outside.device)
        rows = torch.arange(boundary, device=outside.device)
        outside[rows, ends[:, 0]] = bounds[ends[:, 0], ends[:, 1]]
        return [
            Term(self.equation, inside, laplacian(d, self.space)),
            Term(self.condition, outside, value_only(d)),
        ]

    def points(self, N: int, generator: Generator) -> Float[Tensor, "N d"]:
        """Points with a uniform distribution in the box."""
        low, high = torch.tensor(self.box, device=generator.device, dtype=torch.float64).T
        X = torch.rand(
            N, len(self.box), generator=generator, device=generator.device, dtype=torch.float64
        )
        return (low + (high - low) * X).to(torch.get_default_dtype())

    def error(self, model: Module, X: Float[Tensor, "N d"]) -> float:
        """The root mean square of the difference to the solution, over points and outputs."""
        with torch.no_grad():
            return float((model(X) - self.solution(X)).square().mean().sqrt())


def mlp(*sizes: int) -> Sequential:
    """A multilayer perceptron: linear layers of these sizes with tanh between them."""
    layers: list[Module] = []
    for d_in, d_out in pairwise(sizes):
        layers += [Linear(d_in, d_out), Tanh()]
    return Sequential(*layers[:-1])


def dirichlet(solution: Callable[[Tensor], Tensor]) -> Callable[[Field, Tensor], Tensor]:
    """The residual of `u = solution`, for boundaries, initial values and measurements."""
    return lambda u, x: u.value - solution(x)


def _all_faces(d: int, first: int = 0) -> list[tuple[int, int]]:
    return [(i, end) for i in range(first, d) for end in (0, 1)]


def _sines(x: Tensor, frequency: float = 1.0) -> Float[Tensor, "N 1"]:
    return (frequency * pi * x).sin().prod(1, keepdim=True)


# ---- the problems -------------------------------------------------------------------------------


def poisson(d: int) -> Problem:
    """Poisson's equation for a product of sines, zero on the boundary of the unit cube."""

    def equation(u: Field, x: Tensor) -> Tensor:
        return u.lap + d * pi**2 * _sines(x)

    return Problem([(0.0, 1.0)] * d, _sines, equation, dirichlet(_sines), _all_faces(d))


def poisson_cosines(d: int) -> Problem:
    """Poisson's equation for a sum of cosines on the unit cube."""

    def solution(x: Tensor) -> Tensor:
        return (pi * x).cos().sum(1, keepdim=True)

    def equation(u: Field, x: Tensor) -> Tensor:
        return u.lap + pi**2 * solution(x)

    return Problem([(0.0, 1.0)] * d, solution, equation, dirichlet(solution), _all_faces(d))


def helmholtz(d: int, wave: float = 4.0, frequency: float = 2.0) -> Problem:
    """Helmholtz' equation `lap u + wave^2 u = f` on the unit cube.

    The operator is indefinite if the wave number exceeds the lowest frequency of the cube.
    """

    def solution(x: Tensor) -> Tensor:
        return _sines(x, frequency)

    def equation(u: Field, x: Tensor) -> Tensor:
        source = (wave**2 - d * (frequency * pi) ** 2) * solution(x)
        return u.lap + wave**2 * u.value - source

    return Problem([(0.0, 1.0)] * d, solution, equation, dirichlet(solution), _all_faces(d))


def heat(d: int) -> Problem:
    """The heat equation with conductivity 1/4; coordinate 0 is the time, the others are space."""

    def solution(x: Tensor) -> Tensor:
        return (-d * pi**2 / 4 * x[:, :1]).exp() * _sines(x[:, 1:])

    def equation(u: Field, x: Tensor) -> Tensor:
        return u.d[0] - u.lap / 4

    faces = [(0, 0)] * (2 * d) + _all_faces(d + 1, first=1)  # half of the points at time 0
    box = [(0.0, 1.0)] * (d + 1)
    return Problem(box, solution, equation, dirichlet(solution), faces, range(1, d + 1))


def log_fokker_planck(d: int) -> Problem:
    """The Fokker-Planck equation for the logarithm `q` of a Gaussian density.

    Its variance grows from 1 towards 2.

    `d_t q = d / 2 + x . grad q / 2 + |grad q|^2 + lap q`: not linear in `q`.
    """

    def solution(x: Tensor) -> Tensor:
        variance = 2 - (-x[:, :1]).exp()
        square = x[:, 1:].square().sum(1, keepdim=True)
        return -square / (2 * variance) - d / 2 * (2 * pi * variance).log()

    def equation(u: Field, x: Tensor) -> Tensor:
        gradient = torch.cat(u.d[1:], dim=1)  # [N, d]
        drift = (x[:, 1:] * gradient).sum(1, keepdim=True) / 2
        square = gradient.square().sum(1, keepdim=True)
        return u.d[0] - d / 2 - drift - square - u.lap

    box = [(0.0, 1.0)] + [(-5.0, 5.0)] * d
    space = range(1, d + 1)
    return Problem(box, solution, equation, dirichlet(solution), [(0, 0)], space)


def burgers(viscosity: float = 0.1) -> Problem:
    """Burgers' equation for a front `(1 - tanh((x - t/2) / 4v)) / 2`, which keeps its shape."""

    def solution(x: Tensor) -> Tensor:
        return (1 - ((x[:, 1:] - x[:, :1] / 2) / (4 * viscosity)).tanh()) / 2

    def equation(u: Field, x: Tensor) -> Tensor:
        return u.d[0] + u.value * u.d[1] - viscosity * u.lap

    faces = [(0, 0), (0, 0), (1, 0), (1, 1)]
    return Problem([(0.0, 1.0), (-1.0, 1.0)], solution, equation, dirichlet(solution), faces, [1])


def kovasznay(reynolds: float = 20.0) -> Problem:
    """The Navier-Stokes equations for Kovasznay's flow: velocities `u` and `v`, pressure `p`.

    Momentum in both directions and the conservation of mass: three residuals for each point.
    """
    rate = reynolds / 2 - (reynolds**2 / 4 + 4 * pi**2) ** 0.5

    def solution(x: Tensor) -> Tensor:
        growth, phase = (rate * x[:, :1]).exp(), 2 * pi * x[:, 1:]
        v = rate / (2 * pi) * growth * phase.sin()
        return torch.cat([1 - growth * phase.cos(), v, (1 - growth**2) / 2], dim=1)

    def equation(u: Field, x: Tensor) -> Tensor:
        flow = u.value[:, :1] * u.d[0][:, :2] + u.value[:, 1:2] * u.d[1][:, :2]
        pressure = torch.stack([u.d[0][:, 2], u.d[1][:, 2]], dim=1)
        momentum = flow + pressure - u.lap[:, :2] / reynolds
        return torch.cat([momentum, u.d[0][:, :1] + u.d[1][:, 1:2]], dim=1)

    box = [(-0.5, 1.0), (-0.5, 1.5)]
    return Problem(box, solution, equation, dirichlet(solution), _all_faces(2), outputs=3)
