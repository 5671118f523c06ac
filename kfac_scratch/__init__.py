"""Kronecker-factored curvature, understood, checked and trusted."""

from kfac_scratch.approximations.ekfac import AmortisedEKFAC, ekfac, rescaled
from kfac_scratch.approximations.estimators import Averaged, Estimator, Latest
from kfac_scratch.approximations.kfac import foof, kfac, kfac_over
from kfac_scratch.capture.hooks import EXPAND, REDUCE, layer_ios, stream
from kfac_scratch.capture.layer_groups import blocks, uncovered
from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.losses import (
    Fisher,
    divisor,
    empirical,
    monte_carlo,
    type2,
    type2_classwise,
)
from kfac_scratch.matrices.damping import factored_inverse, levenberg_marquardt
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.matrices.matrix import LinearMap, Matrix, exact_inverse
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.preconditioner import Preconditioner, inverses, preconditioner
from kfac_scratch.optimizer.quadratic_model import quadratic_model
from kfac_scratch.optimizer.step_control import graft, kl_clip, norm_constraint

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
