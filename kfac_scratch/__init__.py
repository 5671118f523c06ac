"""Kronecker-factored curvature, understood, checked and trusted."""

from kfac_scratch.blocks import blocks, uncovered
from kfac_scratch.capture import EXPAND, REDUCE, layer_ios, stream
from kfac_scratch.damping import factored_inverse, levenberg_marquardt
from kfac_scratch.ekfac import AmortisedEKFAC, ekfac, rescaled
from kfac_scratch.estimators import Averaged, Estimator, Latest
from kfac_scratch.kfac import foof, kfac, kfac_over
from kfac_scratch.kronecker_sum import KroneckerSum
from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.losses import (
    Fisher,
    divisor,
    empirical,
    monte_carlo,
    type2,
    type2_classwise,
)
from kfac_scratch.matrices import (
    Dense,
    Diagonal,
    Kronecker,
    KroneckerEigen,
    LinearMap,
    Matrix,
    exact_inverse,
)
from kfac_scratch.optimizer import KFAC
from kfac_scratch.preconditioner import Preconditioner, inverses, preconditioner
from kfac_scratch.quadratic_model import quadratic_model
from kfac_scratch.step_control import graft, kl_clip, norm_constraint

__version__ = "0.1.0"

__all__ = [
    "EXPAND",
    "KFAC",
    "REDUCE",
    "AmortisedEKFAC",
    "Averaged",
    "Dense",
    "Diagonal",
    "Estimator",
    "Fisher",
    "Kronecker",
    "KroneckerEigen",
    "KroneckerSum",
    "Latest",
    "LayerIO",
    "LinearMap",
    "Matrix",
    "Preconditioner",
    "blocks",
    "concatenate",
    "divisor",
    "ekfac",
    "empirical",
    "exact_inverse",
    "factored_inverse",
    "foof",
    "graft",
    "inverses",
    "kfac",
    "kfac_over",
    "kl_clip",
    "layer_ios",
    "levenberg_marquardt",
    "monte_carlo",
    "norm_constraint",
    "preconditioner",
    "quadratic_model",
    "rescaled",
    "stream",
    "type2",
    "type2_classwise",
    "uncovered",
]
