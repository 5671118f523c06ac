"""Every damped solve of a PINN's step: one law, with one constant for all widths and precisions.

The relative error is at most `2 * eps * condition + 20 * eps`, where the condition of a damped
matrix is its largest eigenvalue over its smallest, or over the damping. It is the law of
`tests/matrices/test_every_damped_inverse.py`. What solves is found in the package, and fails for
want of an example.

All numbers of layers and factors have float32 at most, so that both precisions solve the same
system. Its truth comes from float64, and from residuals of exact products where float64 is judged.
"""

import math
import pkgutil
from functools import cache
from importlib import import_module
from inspect import isclass, isfunction, signature, unwrap
from types import CodeType

import pytest
import torch

from kfac_scratch import pinn
from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.pinn.gramian import (
    gramian,
    kernel_matrix,
    layer_gramian,
    layer_jacobian,
    residuals,
    transposed_times,
)
from kfac_scratch.pinn.hessian_free import truncated_solutions
from kfac_scratch.pinn.krylov import krylov_direction
from kfac_scratch.pinn.preconditioners import (
    Joined,
    SumInverse,
    TermWise,
    congruence,
    damped_factors,
    ekfac_inverse,
    kfac_inverse,
    kfac_of_parts,
)
from kfac_scratch.pinn.solvers import (
    best_combination,
    dense_solver,
    kernel_solver,
    layerwise_solver,
)
from kfac_scratch.pinn.terms import Linearization
from tests.matrices.test_every_damped_inverse import in_float64
from tests.spectra import few_samples, images, relu, tabular
from tests.thinned import thinned

FRACTIONS = [1e3, 1e-2, 1e-4, 1e-6, 1e-7]
DTYPES = [torch.float32, torch.float64]
pytestmark = pytest.mark.long

# ---- what there is ------------------------------------------------------------------------------

SOLVES = (
    {"inverse", "inv", "pinv", "solve", "solve_triangular", "lstsq", "eigh", "svd", "reciprocal"}
    | {"cholesky", "cholesky_ex", "cholesky_solve", "cholesky_inverse", "cholesky_factor"}
    | {"psd_eigh", "simultaneous_eigh", "conjugate_gradient", "exact_inverse", "factored_inverse"}
)
BY_ANOTHER = {"PinnKFAC", "KFACStar", "KFACKrylov", "GaussNewton", "Spring"}  # of the examples
BY_ANOTHER |= {"HessianFree"}
NO_SOLVE = {"damped_factors", "PinnState", "PinnPreconditioner"}  # hold a damping only


def functions(thing):
    """A function, or the methods of a class."""
    parts = vars(thing).values() if isclass(thing) else [thing]
    return [unwrap(part) for part in parts if isfunction(part)]


def named(code):
    """The names in some code, and in what is defined inside."""
    inner = [part for part in code.co_consts if isinstance(part, CodeType)]
    return set(code.co_names).union(*(named(part) for part in inner))


def reached(thing, seen):
    """The names in the code of a thing, and in that of everything of its package it names."""
    seen.add(thing)
    names = set().union(*(named(f.__code__) for f in functions(thing)))
    for inner in {DEFINED[name] for name in names & DEFINED.keys()} - seen:
        names |= reached(inner, seen)
    return names


def solves(thing):
    """It takes a damping, or its code reaches something that solves."""
    taken = {name for f in functions(thing) for name in signature(f).parameters}
    return "damping" in taken or bool(reached(thing, set()) & SOLVES)


MODULES = [
    import_module(f"{pinn.__name__}.{info.name}") for info in pkgutil.iter_modules(pinn.__path__)
]
DEFINED = {
    name: thing
    for module in MODULES
    for name, thing in vars(module).items()
    if (isfunction(thing) or isclass(thing)) and thing.__module__ == module.__name__
}
FOUND = {name for name, thing in DEFINED.items() if not name.startswith("_") and solves(thing)}


def test_every_function_that_solves_has_an_example_or_hands_the_solve_on():
    assert set(EXAMPLES) | BY_ANOTHER | NO_SOLVE == FOUND


# ---- problems and truths ------------------------------------------------------------------------


def float32_values(x):
    """The nearest numbers of float32."""
    return x.float().double()


@cache
def layer(spectrum, d, N, S, seed=0):
    """A layer with inputs of a spectrum; both factors have the largest eigenvalue 1."""
    g = torch.Generator().manual_seed(seed)
    a = spectrum(d, N * S, g)[: N * S]
    a = a[: len(a) // S * S].reshape(-1, S, d)
    v = torch.randn(1, *a.shape[:2], outputs(d), generator=g, dtype=torch.float64)
    K = kfac(LayerIO(a, v))
    tops = [torch.linalg.eigvalsh(M)[-1] for M in (K.A, K.B)]
    return LayerIO(float32_values(a / tops[0].sqrt()), float32_values(v / tops[1].sqrt()))


def outputs(d):
    return 2 if d > 64 else 4


def to(dtype, value):
    """A layer or a product in a precision."""
    return type(value)(*(x.to(dtype) for x in vars(value).values() if isinstance(x, torch.Tensor)))


def parts(spectrum, d, dtype, N):
    """Two terms, with different numbers of coefficients, of a network with two layers."""
    result = []
    for seed, S in enumerate((3, 1)):
        ios = {"0": layer(spectrum, d, N, S, seed), "1": layer(relu, d // 2, N, S, seed + 7)}
        n = min(len(io.a) for io in ios.values())
        rho = torch.randn(1, n, generator=torch.Generator().manual_seed(seed)).float()
        ios = {name: to(dtype, LayerIO(io.a[:n], io.g[:, :n])) for name, io in ios.items()}
        result.append(Linearization(rho.to(dtype), ios))
    return result


def directions(spectrum, d, dtype):
    """A generic direction, and one in the range of a layer's curvature."""
    io, g = layer(spectrum, d, d, 1), torch.Generator().manual_seed(1)
    generic = torch.randn(outputs(d), d, generator=g, dtype=torch.float64)
    return [float32_values(V).to(dtype) for V in (generic, io.gradients().sum((0, 1)))]


def solved(Ms, b, dtype):
    """The solution for a sum of matrices, refined by a residual of exact products for float64."""
    M, b = torch.stack([N.double() for N in Ms]).sum(0), b.double().flatten()
    x = torch.linalg.solve(M, b)
    if dtype == torch.float64:
        x = x + torch.linalg.solve(M, b.new_tensor(residual(Ms, x, b)))
    return x


def residual(Ms, x, b):
    result = []
    for rows in torch.arange(len(b)).split(64):
        products = [-p[rows] * q for M in Ms for p in halves(M) for q in halves(x)]
        result += [math.fsum(row) for row in torch.cat([b[rows, None], *products], 1).tolist()]
    return result


def halves(x):
    """Two parts with so few digits that products of parts are exact."""
    return float32_values(x), x - float32_values(x)


def flat(direction):
    return torch.cat([V.flatten() for V in direction.values()]).double()


def check_law(found, exact, condition, dtype):
    error = float((found.double().flatten() - exact.flatten()).norm() / exact.norm())
    eps = torch.finfo(dtype).eps
    assert error <= (2 * condition + 20) * eps, (error / eps, condition)


# ---- one layer: sums of Kronecker products ------------------------------------------------------


def damped_products(spectrum, d, dtype, fraction, n):
    """Layers of `n` kinds, their factors, and the factors with damping."""
    layers = [layer(spectrum, d, 2 * d, 3 - t, t) for t in range(n)]
    factors = [kfac_of_parts([io]) for io in layers]
    factors = [to(torch.float32, Kronecker(K.A + K.A.T, K.B + K.B.T)) for K in factors]
    damped = [to(torch.float32, damped_factors(K, 1.0, fraction**0.5)) for K in factors]
    return [tuple(to(dtype, x) for x in xs) for xs in (damped, factors, layers)]


def sums(invert, most):
    def check(spectrum, d, dtype, fraction):
        for n in range(1, most + 1):
            damped, factors, layers = damped_products(spectrum, d, dtype, fraction, n)
            Ms = [to(torch.float64, K).dense() for K in damped]
            s = torch.linalg.eigvalsh(torch.stack(Ms).sum(0))
            inverse = invert(damped, factors, layers)
            for V in directions(spectrum, d, dtype):
                exact = solved(Ms, V, dtype)
                check_law(inverse @ V, exact, float(s[-1] / s[0]), dtype)

    return check


def corrected(spectrum, d, dtype, fraction):
    """The truth of `ekfac_inverse`: its matrix, dense, by the definition and in float64."""
    for n in (1, 2):
        damped, factors, layers = damped_products(spectrum, d, dtype, fraction, n)
        basis = congruence(tuple(to(torch.float64, K) for K in damped))
        Q = torch.kron(basis.KB, basis.KA)
        block = sum(to(torch.float64, io).block() for io in layers)
        products = (sum(to(torch.float64, K).dense() for K in Ks) for Ks in (damped, factors))
        added = torch.sub(*products)
        inverse = Q / (Q * ((added + block) @ Q)).sum(0) @ Q.T
        s = torch.linalg.eigvalsh(inverse)
        for V in directions(spectrum, d, dtype):
            exact = inverse @ V.double().flatten()
            found = ekfac_inverse(damped, factors, layers) @ V
            check_law(found, exact, float(s[-1] / s[0]), dtype)


def term_wise(spectrum, d, dtype, fraction):
    """Late in training, when the identity that decays is gone."""
    lin, damping = parts(spectrum, d, dtype, d), fraction**0.5
    averages, inverses = TermWise().update(None, [[part] for part in lin], damping, 2000)
    factors = [to(torch.float64, K) for K in averages["0"]]
    M = torch.stack([damped_factors(K, 1.0, damping).dense() for K in factors]).sum(0)
    s = torch.linalg.eigvalsh(M)
    for V in directions(spectrum, d, dtype):
        exact = torch.linalg.solve(M, V.double().flatten())
        check_law(inverses["0"] @ V, exact, float(s[-1] / s[0]), dtype)


def joined_terms(spectrum, d, dtype, fraction):
    lin = parts(spectrum, d, dtype, d)
    for approximation in (kfac, ekfac):
        preconditioner = Joined(approximation)
        state, _ = preconditioner.update(None, [lin], 1.0, 2000)
        M = in_float64(state["0"]).dense()
        damping = fraction * float(torch.linalg.eigvalsh(M)[-1])
        inverse = preconditioner.update(None, [lin], damping, 2000)[1]["0"]
        for V in directions(spectrum, d, dtype):
            exact = torch.linalg.solve(M + damping * eye_like(M), V.double().flatten())
            check_law(inverse @ V, exact, 1 / fraction, dtype)


# ---- all layers: the Gauss-Newton system --------------------------------------------------------


def systems(spectrum, d, dtype):
    """Fewer residuals than weights, and more."""
    for N in (d // 4, 2 * outputs(d) * d) if d <= 64 else (d // 2,):
        yield parts(spectrum, d, dtype, N)


def gauss_newton(solver):
    """The truth for the stored matrix, with the damping that the solver has used."""

    def check(spectrum, d, dtype, fraction):
        for lin in systems(spectrum, d, dtype):
            rho = residuals(lin)
            gradient = transposed_times(lin, rho)
            if solver is kernel_solver:
                Ms, rights = {"": kernel_matrix(lin)}, {"": rho}
            elif solver is dense_solver:
                Ms, rights = {"": gramian(lin)}, {"": flat(gradient)}
            else:
                Ms, rights = {n: layer_gramian(lin, n) for n in gradient}, gradient
            top = max(float(torch.linalg.eigvalsh(M.double())[-1]) for M in Ms.values())
            step, used = solver(lin, rho)(fraction * top)
            exact = {
                n: -solved([M, used * eye_like(M.double())], rights[n], dtype)
                for n, M in Ms.items()
            }
            if solver is kernel_solver:
                J = torch.cat([layer_jacobian(lin, n) for n in gradient], dim=1)
                exact = {"": J.double().T @ exact[""]}
            assert used <= 2 * max(fraction, 10 * torch.finfo(dtype).eps) * top
            check_law(flat(step), flat(exact), top / used, dtype)

    return check


def krylov(spectrum, d, dtype, fraction):
    """In the whole space: with so many iterations that conjugate gradients have converged."""
    lin = parts(spectrum, d, dtype, d // 4)
    G, h = gramian(lin).double(), transposed_times(lin, residuals(lin))
    top = float(torch.linalg.eigvalsh(G)[-1])
    eyes = {n: Kronecker(eye_like(V.T @ V), eye_like(V @ V.T)) for n, V in h.items()}
    found = krylov_direction(lin, eyes, fraction * top, 10 * len(G))
    exact = -solved([G, fraction * top * eye_like(G)], flat(h), dtype)
    check_law(flat(found), exact, 1 / fraction, dtype)


def hessian_free(spectrum, d, dtype, fraction):
    """As `krylov`: with so many iterations that conjugate gradients have converged."""
    lin = parts(spectrum, d, dtype, d // 4)
    G, h = gramian(lin).double(), transposed_times(lin, residuals(lin))
    damping = fraction * float(torch.linalg.eigvalsh(G)[-1])
    start = {n: torch.zeros_like(V) for n, V in h.items()}
    found = truncated_solutions(lin, damping, start, 10 * len(G), -1.0)[-1]
    check_law(flat(found), -solved([G, damping * eye_like(G)], flat(h), dtype), 1 / fraction, dtype)


def combination(spectrum, d, dtype, fraction):
    """Three directions, of which two are nearly parallel; the truth is a least-squares problem."""
    for lin in systems(spectrum, d, dtype):
        h, g = transposed_times(lin, residuals(lin)), torch.Generator().manual_seed(1)
        noise = {n: torch.randn(V.shape, generator=g).to(V) for n, V in h.items()}
        near = {n: V + 1e-2 * V.abs().max() * noise[n] for n, V in h.items()}
        given = [noise, h, near]
        J = torch.cat([layer_jacobian(lin, n) for n in h], dim=1).double()
        damping = fraction * float(torch.linalg.matrix_norm(J, 2)) ** 2
        D = torch.stack([flat(V) for V in given], dim=1)
        tall = torch.cat([J @ D, damping**0.5 * D])
        right = torch.cat([-residuals(lin).double(), D.new_zeros(len(D))])
        scale = tall.norm(dim=0)
        s = torch.linalg.svdvals(tall / scale)
        exact = torch.linalg.lstsq(tall / scale, right.unsqueeze(1)).solution[:, 0] / scale
        found = best_combination(lin, given, damping).double()
        check_law(D @ found, D @ exact, float(s[0] / s[-1]) ** 2, dtype)


EXAMPLES = {
    "congruence": sums(lambda damped, *_: congruence(damped), 2),
    "kfac_inverse": sums(kfac_inverse, 3),
    "SumInverse": sums(lambda damped, *_: SumInverse(damped, congruence(damped)), 2),
    "ekfac_inverse": corrected,
    "TermWise": term_wise,
    "Joined": joined_terms,
    "dense_solver": gauss_newton(dense_solver),
    "kernel_solver": gauss_newton(kernel_solver),
    "layerwise_solver": gauss_newton(layerwise_solver),
    "best_combination": combination,
    "krylov_direction": krylov,
    "truncated_solutions": hessian_free,
}

# ---- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", thinned(EXAMPLES, 2))
def test_every_damped_solve_obeys_the_law_at_small_widths(name, dtype):
    for spectrum in (images, few_samples, tabular):
        for fraction in FRACTIONS:
            EXAMPLES[name](spectrum, 12, dtype, fraction)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_damped_solve_obeys_the_same_law_at_width_512(name, dtype):
    EXAMPLES[name](relu, 512, dtype, 1e-4)
