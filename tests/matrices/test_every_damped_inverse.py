"""Every damped inverse of the package in float32: one law, with one constant for all widths.

The relative error of a damped step is at most `2 * eps * top / damping + 20 * eps`, where `top` is
the matrix's largest eigenvalue. Approximations and inversions are found in the package, and every
pair that goes together is tried: what is added is tested, or fails for want of an example.
Without damping the smallest eigenvalue takes its place.

The truth is that of the stored matrix in float64. Up to width 64 it is a dense solve. For Kronecker
products it is one solve for each eigenvalue of `B`, elsewhere the same inversion in float64.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from functools import cache, partial
from importlib import import_module
from inspect import isclass, isfunction, signature
from typing import get_args, get_origin, get_type_hints

import pytest
import torch

from kfac_scratch import approximations, matrices
from kfac_scratch.approximations.adaptive_rank import AdaptiveRank
from kfac_scratch.approximations.batch_gradients import OfBatch
from kfac_scratch.approximations.brand import Brand, Repaired, refreshed
from kfac_scratch.approximations.cg_fac import Gradients
from kfac_scratch.approximations.ekfac import AmortisedEKFAC
from kfac_scratch.approximations.estimators import Latest, MovingAverage
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.kl_shampoo import KLShampoo, kl_factors
from kfac_scratch.approximations.kpsvd import Recompressed, deflation, kfac_corrected, nearest_sum
from kfac_scratch.approximations.mini_block import (
    BlocksByRows,
    mini_block_filters,
)
from kfac_scratch.approximations.randomized import Randomized, Sketch, randomized
from kfac_scratch.approximations.shampoo import ShampooBound
from kfac_scratch.approximations.skfac import Window
from kfac_scratch.approximations.tkfac import PartialTraces
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import positive_part
from kfac_scratch.matrices.block_diagonal import BlockDiagonal, FiltersAndBias
from kfac_scratch.matrices.damping import HasDiagonal, HasFactors, relative_damping
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.one_hot import OneHot
from kfac_scratch.optimizer.two_level import coarse_inverse
from tests.spectra import (
    SPECTRA,
    badly_scaled,
    counts,
    few_samples,
    images,
    relu,
    repeated_features,
    tabular,
    tokens,
)
from tests.thinned import thinned

EPS, D_OUT = torch.finfo(torch.float32).eps, 6
FRACTIONS = [1e3, 1e-2, 1e-4, 1e-6, 1e-7]
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore:Power iteration stopped")]

# ---- what there is ------------------------------------------------------------------------------


def public(package):
    """Functions and classes that the modules of a package define."""
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = import_module(info.name)
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", "") == info.name:
                yield name, thing


def makes_a_matrix(thing):
    """Whether a type is that of a matrix, or of one of several."""
    kinds = get_args(thing) or (thing,)
    return all(isclass(kind) and issubclass(kind, Matrix) for kind in kinds)


def is_approximation(thing):
    """A function of a layer, one that makes such a function, or an estimator."""
    if isclass(thing):
        return hasattr(thing, "update") and not getattr(thing, "_is_protocol", False)
    if not isfunction(thing):
        return False
    returned, parameters = get_type_hints(thing)["return"], list(signature(thing).parameters)
    if get_origin(returned) is get_origin(Callable[[LayerIO], Matrix]):
        (takes, *_), result = get_args(returned)
        return takes is LayerIO and makes_a_matrix(result)
    return parameters[:1] == ["io"] and makes_a_matrix(returned)


def is_inversion(thing):
    return isfunction(thing) and list(signature(thing).parameters)[:2] == ["M", "damping"]


FOUND = {name: thing for name, thing in public(approximations) if is_approximation(thing)}
del FOUND["zero_factors"]  # the start of `Brand`: there is no curvature to be inverted
INVERSIONS = {
    name: thing
    for package in (matrices, approximations)
    for name, thing in public(package)
    if is_inversion(thing) and name != "guarded"  # the matrix that `guarded_inverse` inverts
}


class HasEigenvectors(type):
    """Of matrices whose exact inverse is found by orthonormal eigenvectors."""

    def __instancecheck__(cls, M):
        without = (KroneckerSum, Gradients, BlockDiagonal, BlocksByRows, FiltersAndBias)
        return not isinstance(M, without)


class WithEigenvectors(metaclass=HasEigenvectors):
    """Stands for all kinds that `inverse_root` takes."""


GOES_WITH = {
    "exact_inverse": object,
    "factored_inverse": HasFactors,
    "even_traces_inverse": PartialTraces,
    "guarded_inverse": KroneckerSum,
    "kernel_inverse": Gradients,
    "inverse_root": WithEigenvectors,
    "shampoo_inverse": ShampooBound,
}
INACCURATE = {"truncated_inverse"}  # it stops early, and says so
PASSED_ON = {"default_inverse"}  # to one of the others, see test_damping
NEEDS_DAMPING = ["mini_block_rows"]  # blocks of low rank, whatever their rank


def followed(estimator):
    """An estimator's matrix after two batches."""

    def approximation(io):
        half = len(io.a) // 2
        parts = [
            LayerIO(a, 2**0.5 * g)
            for a, g in zip(io.a.split(half), io.g.split(half, 1), strict=True)
        ]
        return estimator.update(estimator.update(None, parts[0], 1.0), parts[1], 0.5)

    return approximation


EXAMPLES = {
    "randomized": randomized(20),
    "mini_block_filters": mini_block_filters(4),
    "deflation": partial(deflation, tolerance=1e-2),
    "kfac_corrected": partial(kfac_corrected, tolerance=1e-2),
    "MovingAverage": followed(MovingAverage(kfac)),
    "Latest": followed(Latest(kfac)),
    "AmortisedEKFAC": followed(AmortisedEKFAC(2)),
    "Recompressed": followed(Recompressed(partial(nearest_sum, tolerance=1e-2))),
    "Window": followed(Window(2)),
    "AdaptiveRank": followed(AdaptiveRank(Sketch(20))),
    "Brand": followed(Brand(8)),
    "OfBatch": followed(OfBatch(Latest(kfac))),
    "kl_factors": partial(kl_factors, damping=0.1),
    "KLShampoo": followed(KLShampoo(0.1)),
    "Repaired": followed(Repaired(Brand(8), refreshed(Sketch(8)), 2)),
}
FEW_ROWS = ["skfac", "mini_block_rows", "cg_fac", "Window", "Brand", "Repaired"]  # keep rows
SLOW = [  # by conjugate gradients to the last digit, and a factor for each neuron
    *(("exact_inverse", name) for name in ("cg_fac", "deflation", "lanczos", "kfac_corrected")),
    *(("exact_inverse", name) for name in ("Recompressed", "mini_block")),
]

ITERATIVE = ["kpsvd", "ekpsvd", "deflation", "lanczos", "kfac_corrected", "Recompressed"]


def test_every_inversion_goes_with_a_kind_of_matrix_or_is_inaccurate_by_intent():
    assert set(INVERSIONS) == set(GOES_WITH) | INACCURATE | PASSED_ON


@pytest.mark.parametrize("name", FOUND)
def test_every_approximation_has_an_example(name):
    thing = FOUND[name]
    needed = [p for p in signature(thing).parameters.values() if p.default is p.empty]
    assert name in EXAMPLES or [p.name for p in needed] == ["io"], f"add {name} to EXAMPLES"


# ---- layers and truths --------------------------------------------------------------------------


def embedding(d, N, g):
    """The rows of `tokens`, which the layer keeps as the numbers of their columns."""
    return tokens(d, N, g)


def independent(d, N, g):
    """Well conditioned: independent features of one scale, and sixteen rows for each."""
    return torch.randn(16 * d, d, generator=g, dtype=torch.float64)


@cache
def layer(spectrum, d, rows, S):
    """A layer with inputs of a spectrum, and vectors that depend on the sample."""
    g = torch.Generator().manual_seed(0)
    a = spectrum(d, rows, g)
    a = a[: len(a) // S * S].reshape(-1, S, a.shape[1])
    v = torch.relu(torch.randn(1, *a.shape[:2], D_OUT, generator=g, dtype=torch.float64))
    size = torch.rand(len(a), 1, 1, generator=g, dtype=torch.float64) / len(a) ** 0.5
    rows = OneHot(a.argmax(-1), d, torch.float32) if spectrum is embedding else a.float()
    return LayerIO(rows, (size * v).float())


@cache
def stored(name, spectrum, d, S):
    """A method's matrix of a layer, in the form that is inverted, with its largest eigenvalue."""
    rows = 48 if name in FEW_ROWS else 2 * d
    io = layer(spectrum, d, rows, S)
    M = EXAMPLES.get(name, FOUND[name])(io)
    M = M.low_rank() if isinstance(M, Randomized) else M
    V = torch.randn(D_OUT, d, generator=torch.Generator().manual_seed(3)).double()
    M64 = in_float64(M)
    for _ in range(10):
        V = M64 @ (V / V.norm())
    return M, float(V.norm()), io.gradients().sum((0, 1))


def in_float64(value):
    """The same numbers, in every tensor of a matrix; factors without their asymmetric round-off."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.double()
    if isinstance(value, Kronecker | PartialTraces | ShampooBound):
        A, B = value.A.double(), value.B.double()
        return type(value)((A + A.T) / 2, (B + B.T) / 2)
    if isinstance(value, DiagonalKronecker):
        B = value.B.double()
        return DiagonalKronecker(value.a.double(), (B + B.T) / 2)
    if is_dataclass(value) and not isclass(value):
        parts = {f.name: in_float64(getattr(value, f.name)) for f in fields(value)}
        return replace(value, **parts)
    return value


def truth(M, invert, damping, V):
    """The step of the stored matrix in float64."""
    M64, exact = in_float64(M), invert is INVERSIONS["exact_inverse"]
    if exact and isinstance(M64, Kronecker | PartialTraces):
        return kronecker_truth(M64 if isinstance(M64, Kronecker) else M64.kronecker(), damping, V)
    if exact and V.shape[-1] <= 64:
        dense = M64.dense()
        eye = torch.eye(len(dense), dtype=dense.dtype)
        return torch.linalg.solve(dense + damping * eye, V.flatten(-2).T).T.reshape(V.shape)
    return invert(with_positive_factors(M64), damping) @ V


def with_positive_factors(M):
    """The same factors without the negative eigenvalues that rounding to float32 has made."""
    if not isinstance(M, Kronecker | PartialTraces | ShampooBound):
        return M
    return replace(M, A=positive_part(M.A), B=positive_part(M.B))


def kronecker_truth(K, damping, V):
    b, Q = torch.linalg.eigh(K.B)
    eye = torch.eye(len(K.A), dtype=K.A.dtype)
    rows = [
        torch.linalg.solve(s * K.A + damping * eye, v.T).T
        for s, v in zip(b, (Q.T @ V).unbind(-2), strict=True)
    ]
    return Q @ torch.stack(rows, -2)


def smallest(M, damping):
    """The smallest damped eigenvalue: the damping, except in sums that may be indefinite."""
    if not isinstance(M, KroneckerSum):
        return damping
    return min(damping, float(torch.linalg.eigvalsh(in_float64(M).dense())[0]) + damping)


def check_law(name, inversion, spectrum, d, S=1, fractions=FRACTIONS):
    M, top, gradient = stored(name, spectrum, d, S)
    if not isinstance(M, GOES_WITH[inversion]):
        return
    for fraction in fractions:
        damping = fraction * top
        lowest = smallest(M, damping) if inversion == "exact_inverse" else damping
        if lowest <= 20 * EPS * top and lowest < damping:
            continue  # an indefinite sum, or one within round-off of it: nothing is promised
        check_step(M, inversion, damping, top / lowest, gradient)


def check_step(M, inversion, damping, condition, gradient):
    invert, g = INVERSIONS[inversion], torch.Generator().manual_seed(1)
    V = torch.randn(gradient.shape, generator=g, dtype=torch.float64).float()
    V = torch.stack([V, gradient])  # generic, and in the range of the matrix
    x = truth(M, invert, damping, V.double())
    found = (invert(M, damping) @ V).double()
    error = ((found - x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).max()
    assert error <= (2 * condition + 20) * EPS, (inversion, damping, condition, float(error))


# ---- the law ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("inversion", GOES_WITH)
def test_the_damped_inverse_of_every_approximation_obeys_the_law_at_width_64(name, inversion):
    check_law(name, inversion, relu, 64, S=2)
    check_law(name, inversion, repeated_features, 64)


@pytest.mark.filterwarnings("default:Conjugate gradients stopped")  # but near enough for the law
@pytest.mark.parametrize("name", thinned(FOUND, 2))
@pytest.mark.parametrize("inversion", GOES_WITH)
def test_the_damped_inverse_of_every_approximation_obeys_the_law_on_columns_of_many_scales(
    name, inversion
):
    check_law(name, inversion, tabular, 12)
    check_law(name, inversion, badly_scaled, 8, S=2)


@pytest.mark.parametrize("name", thinned(FOUND, 2))
@pytest.mark.parametrize("inversion", GOES_WITH)
def test_the_damped_inverse_of_every_approximation_obeys_the_law_on_rare_words(name, inversion):
    check_law(name, inversion, counts, 16)
    check_law(name, inversion, embedding, 8, S=2)


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("inversion", GOES_WITH)
@pytest.mark.parametrize("spectrum", [relu, tabular])
def test_a_damping_relative_to_the_mean_eigenvalue_obeys_the_law(name, inversion, spectrum):
    M, top, gradient = stored(name, spectrum, 16, 1)
    if not isinstance(M, GOES_WITH[inversion]):
        return
    assert isinstance(M, HasDiagonal)
    damping, dense = relative_damping(M, 1e-3), in_float64(M).dense()
    assert damping == pytest.approx(1e-3 * float(dense.trace()) / len(dense), rel=1e-5)
    lowest = smallest(M, damping) if inversion == "exact_inverse" else damping
    if lowest == damping:  # else the sum is indefinite
        check_step(M, inversion, damping, top / damping, gradient)


@pytest.mark.parametrize("name", FOUND)
def test_without_damping_the_condition_number_takes_the_place_of_the_damping(name):
    """Or the matrix is singular, and refused."""
    M, _, gradient = stored(name, independent, 8, 1)
    s = torch.linalg.eigvalsh(in_float64(M).dense())
    if s[0] > 1e-3 * s[-1] and name not in NEEDS_DAMPING:
        check_step(M, "exact_inverse", 0.0, float(s[-1] / s[0]), gradient)
    else:
        with pytest.raises(ValueError, match=r"singular|positive"):
            M.inverse(0.0)


MAIN = [("exact_inverse", "kfac"), ("factored_inverse", "kfac"), ("exact_inverse", "ekfac")]


@pytest.mark.slow
@pytest.mark.parametrize(("inversion", "name"), MAIN)
@pytest.mark.parametrize("spectrum", [*SPECTRA, embedding])
def test_the_main_inverses_obey_the_same_law_at_width_1024_on_every_spectrum(
    inversion, name, spectrum
):
    check_law(name, inversion, spectrum, 1024, fractions=[1e-4, 1e-7])


PAIRS = [(i, n) for i in GOES_WITH for n in FOUND if (i, n) not in SLOW]
DIRECT = [(i, n) for i, n in PAIRS if n not in ITERATIVE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("d", "spectrum", "fractions", "pair"),
    [
        *((256, images, FRACTIONS, pair) for pair in PAIRS),
        *((1024, repeated_features, [1e-4], pair) for pair in DIRECT),
        *((1024, tabular, [1e-7], pair) for pair in DIRECT),
        *((1024, embedding, [1e-7], pair) for pair in DIRECT if pair[1] not in FEW_ROWS),
    ],
)
def test_the_damped_inverse_of_every_approximation_obeys_the_same_law_when_wide(
    d, spectrum, fractions, pair
):
    inversion, name = pair
    check_law(name, inversion, spectrum, d, fractions=fractions)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FEW_ROWS if name != "Repaired"])  # keeps factors
@pytest.mark.parametrize("inversion", GOES_WITH)
@pytest.mark.parametrize("d", [2048, 4096])
def test_what_keeps_rows_obeys_the_same_law_at_the_largest_widths(name, inversion, d):
    check_law(name, inversion, relu, d, fractions=[1e-4])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inversion", "d"),
    [("exact_inverse", 2048), ("factored_inverse", 2048), ("factored_inverse", 4096)],
)
def test_kfac_obeys_the_same_law_at_the_largest_widths(inversion, d):
    """The exact inverse decomposes `A` in float64: minutes at width 4096, and not asked there."""
    check_law("kfac", inversion, few_samples, d, fractions=[1e-4])


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_the_coarse_level_obeys_the_law(d, fraction):
    io = layer(images, d, 48, 1)
    _, top, gradient = stored("cg_fac", images, d, 1)
    Z = {"0": torch.randn(5, D_OUT, d, generator=torch.Generator().manual_seed(2)).float()}
    Z["0"][0], damping = gradient, fraction * top
    step = coarse_inverse({"0": io}, Z, damping)({"0": gradient})["0"]
    exact = coarse_inverse({"0": in_float64(io)}, {"0": Z["0"].double()}, damping)
    x = exact({"0": gradient.double()})["0"]
    assert (step.double() - x).norm() <= (2 * EPS / fraction + 20 * EPS) * x.norm()


def test_a_cut_that_grows_with_the_width_fails_the_law(monkeypatch):
    """A rule that reads well and is wrong: below `d * eps` of the largest, zero."""

    def cut(M, size=None):
        s, Q = torch.linalg.eigh(M)
        return s.where(s > len(s) * torch.finfo(s.dtype).eps * s.max(), 0.0), Q

    monkeypatch.setattr("kfac_scratch.matrices.kronecker.psd_eigh", cut)
    with pytest.raises(AssertionError):
        check_law("kfac", "exact_inverse", images, 256)
