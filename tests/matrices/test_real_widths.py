"""Damped inverses in float32 at real widths: laws whose constant does not depend on the width.

The truth is computed in float64 from the same stored matrix. `unit` is what rounding of the stored
matrix alone may do to a damped step: `eps` times the largest eigenvalue over the damping.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch

from kfac_scratch import Kronecker, factored_inverse
from kfac_scratch.linalg import psd_eigh
from tests.spectra import SPECTRA, factor, few_samples, images, relu, repeated_features

EPS = torch.finfo(torch.float32).eps
WIDTHS = [64, 256, pytest.param(1024, marks=pytest.mark.slow)]
each_width = pytest.mark.parametrize("d", WIDTHS)
pytestmark = pytest.mark.long


@cache
def factors(spectrum, d):
    """Two factors as a network in float32 stores them, with their exact decompositions."""
    A = factor(spectrum, d, torch.float32, "cpu")
    B = factor(relu, max(d // 4, 16), torch.float32, "cpu")
    return (A, *torch.linalg.eigh(A.double())), (B, *torch.linalg.eigh(B.double()))


def problem(spectrum, d, fraction):
    """A product of two factors, a damping relative to its top, a gradient, and the exact step."""
    (A, a, QA), (B, b, QB) = factors(spectrum, d)
    scale = torch.outer(b.clamp(min=0), a.clamp(min=0))
    damping = fraction * float(scale.max())
    V = torch.randn(len(B), d, generator=torch.Generator().manual_seed(1)).float()
    step = QB @ (QB.T @ V.double() @ QA / (scale + damping)) @ QA.T
    return SimpleNamespace(K=Kronecker(A, B), damping=damping, V=V, step=step, unit=EPS / fraction)


def relative(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm())


@each_width
@pytest.mark.parametrize("fraction", [1e-2, 1e-4, 1e-7])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_damped_step_is_right_to_rounding_whatever_the_width_and_damping(spectrum, d, fraction):
    p = problem(spectrum, d, fraction)
    assert relative(p.K.inverse(p.damping) @ p.V, p.step) <= 20 * EPS


@each_width
@pytest.mark.parametrize("fraction", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_damped_inverse_undoes_the_damped_product_up_to_its_condition(spectrum, d, fraction):
    p = problem(spectrum, d, fraction)
    back = p.K.inverse(p.damping) @ (p.K @ p.V + p.damping * p.V)
    assert relative(back, p.V.double()) <= 2 * p.unit + 20 * EPS


@each_width
@pytest.mark.parametrize("fraction", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_factored_inverse_obeys_the_same_law(spectrum, d, fraction):
    p = problem(spectrum, d, fraction)
    twin = Kronecker(p.K.A.double(), p.K.B.double())
    expected = factored_inverse(twin, p.damping) @ p.V.double()
    assert relative(factored_inverse(p.K, p.damping) @ p.V, expected) <= p.unit + 20 * EPS


@each_width
@pytest.mark.parametrize("spectrum", [relu, images, few_samples, repeated_features])
def test_eigenvalues_above_round_off_are_kept(spectrum, d):
    M = factor(spectrum, d, torch.float32, "cpu")
    exact, (found, _) = torch.linalg.eigvalsh(M.double()), psd_eigh(M)
    assert (found.double() - exact).abs().max() <= EPS * exact[-1]
    assert (found[exact > 20 * EPS * exact[-1]] > 0).all()


@each_width
def test_undamped_a_null_space_is_refused(d):
    p = problem(few_samples, d, 1e-2)
    with pytest.raises(ValueError, match="singular"):
        p.K.inverse(0.0)


@pytest.mark.parametrize("d", [256])
def test_a_cut_that_grows_with_the_width_would_be_caught(d):
    """A rule that reads well and is wrong: below `d * eps` of the largest, zero."""
    p = problem(images, d, 1e-6)
    eigen = p.K.eigen()
    a = torch.linalg.eigvalsh(p.K.A.double()).clamp(min=0).float()
    b = torch.linalg.eigvalsh(p.K.B.double()).clamp(min=0).float()
    a, b = (s.where(s > len(s) * EPS * s.max(), 0.0) for s in (a, b))
    cut = type(eigen)(eigen.QA, eigen.QB, torch.outer(b, a))
    assert relative(cut.inverse(p.damping) @ p.V, p.step) > 100 * EPS
