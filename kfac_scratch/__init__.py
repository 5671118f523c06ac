"""Kronecker-factored curvature, understood, checked and trusted."""

from kfac_scratch.blocks import blocks, uncovered
from kfac_scratch.capture import EXPAND, REDUCE, layer_ios, stream
from kfac_scratch.damping import factored_inverse
from kfac_scratch.ekfac import ekfac, rescaled
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
)
from kfac_scratch.preconditioner import Preconditioner, preconditioner

__version__ = "0.1.0"

__all__ = [
    "EXPAND",
    "REDUCE",
    "Dense",
    "Diagonal",
    "Fisher",
    "Kronecker",
    "KroneckerEigen",
    "KroneckerSum",
    "LayerIO",
    "LinearMap",
    "Matrix",
    "Preconditioner",
    "blocks",
    "concatenate",
    "divisor",
    "ekfac",
    "empirical",
    "factored_inverse",
    "foof",
    "kfac",
    "kfac_over",
    "layer_ios",
    "monte_carlo",
    "preconditioner",
    "rescaled",
    "stream",
    "type2",
    "type2_classwise",
    "uncovered",
]
