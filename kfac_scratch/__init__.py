"""Kronecker-factored curvature, understood, checked and trusted.

Everything that is public stands here: `from kfac_scratch import kfac, layer_ios`. The modules below
say where a thing is defined; none of them passes on another's functions. What belongs to one topic
under short names is used with its module: `from kfac_scratch import curvature`, then
`curvature.ggn(...)`; likewise `checks`, `linalg`, `show`, `applications.pruning`,
`applications.merging`, `taylor.activations` and `pinn.problems`.
"""

from kfac_scratch.applications.influence import (
    influence_by_block,
    influence_scores,
    inverse_as_sum,
    product_kernels,
    self_influence,
)
from kfac_scratch.applications.laplace import (
    EvidenceGradient,
    Laplace,
    effective_parameters,
    evidence_gradient,
    laplace,
    log_evidence,
    mackay,
    mackay_noise,
    mackay_shared,
    sampled_weights,
)
from kfac_scratch.applications.online import OnlinePrior
from kfac_scratch.applications.predictive import (
    functional_covariance,
    output_vectors,
    predicted_outputs,
    probit,
    sampled_probabilities,
)
from kfac_scratch.applications.trained import (
    parameters_from,
    trained_weights,
    weights_without_biases,
)
from kfac_scratch.approximations.accumulators import Accumulator, FactorSums, Gathered
from kfac_scratch.approximations.adaptive_rank import AdaptiveRank, rank_by_ratio
from kfac_scratch.approximations.batch_gradients import OfBatch, from_gradient, pooled
from kfac_scratch.approximations.brand import (
    Brand,
    ContinuedInverse,
    Repaired,
    corrected,
    is_low_rank_update,
    refreshed,
)
from kfac_scratch.approximations.cg_fac import cg_fac, kernel_inverse, truncated_inverse
from kfac_scratch.approximations.ekfac import AmortisedEKFAC, ekfac, ekfac_reduce, rescaled
from kfac_scratch.approximations.estimators import Approximation, Estimator, Latest, MovingAverage
from kfac_scratch.approximations.kfac import foof, kfac, kfac_reduce
from kfac_scratch.approximations.kl_shampoo import KLShampoo, kl_factors
from kfac_scratch.approximations.kpsvd import (
    Recompressed,
    deflation,
    ekpsvd,
    guarded,
    guarded_inverse,
    kfac_corrected,
    kpsvd,
    lanczos,
    nearest_product,
    nearest_sum,
)
from kfac_scratch.approximations.mini_block import (
    mini_block,
    mini_block_filters,
    mini_block_rows,
    mini_block_shared,
)
from kfac_scratch.approximations.muon import CUBIC, MUON, newton_schulz, polar_factor
from kfac_scratch.approximations.randomized import (
    Sketch,
    SketchedInverse,
    nystrom,
    randomized,
    rsvd,
    smallest_kept,
    srevd,
    trace_matched,
    zero_tail,
)
from kfac_scratch.approximations.shampoo import (
    ShampooBound,
    one_sided,
    shampoo_bound,
    shampoo_inverse,
)
from kfac_scratch.approximations.skfac import (
    Window,
    mean_over_positions,
    reduce_sum,
    skfac,
    spatial_subsampling,
    subsampled,
)
from kfac_scratch.approximations.soap import soap
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.approximations.tkfac import even_traces_inverse, tkfac
from kfac_scratch.capture.flavours import EXPAND, REDUCE, Flavour
from kfac_scratch.capture.forward_pass import layer_ios, stream
from kfac_scratch.capture.layer_groups import LayerGroup, layer_groups, uncovered
from kfac_scratch.capture.plan import Plan, Plans, plan
from kfac_scratch.data_loader import kfac_over, over_loader
from kfac_scratch.distributed.distribute import distribute
from kfac_scratch.distributed.over_ranks import kfac_over_ranks
from kfac_scratch.distributed.ranks import Ranks
from kfac_scratch.layer_io import LayerIO, TiedIO
from kfac_scratch.losses import (
    BackpropagatedVectors,
    ScaledVectors,
    Vectors,
    divisor,
    empirical,
    monte_carlo,
    type2,
    type2_classwise,
)
from kfac_scratch.matrices.block_diagonal import BlockDiagonal
from kfac_scratch.matrices.damping import (
    default_inverse,
    factored_inverse,
    levenberg_marquardt,
    relative_damping,
    relative_factored_inverse,
    relative_inverse,
)
from kfac_scratch.matrices.dense import Dense, DenseEigen
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker, DiagonalKroneckerEigen
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.kronecker_columns import KroneckerColumns
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.matrices.low_rank import LowRankKronecker
from kfac_scratch.matrices.matrix import LinearMap, Matrix, exact_inverse
from kfac_scratch.matrices.roots import inverse_root
from kfac_scratch.one_hot import OneHot
from kfac_scratch.optimizer.coarse_spaces import (
    krylov_space,
    nicolaides_space,
    residual_space,
    spectral_space,
)
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.periods import Growing
from kfac_scratch.optimizer.preconditioner import Preconditioner, inverses, preconditioner
from kfac_scratch.optimizer.quadratic_model import quadratic_model
from kfac_scratch.optimizer.step_control import graft, kl_clip, norm_constraint
from kfac_scratch.optimizer.two_level import (
    additive,
    adef1,
    adef2,
    bnn,
    coarse_correction,
    two_level,
)
from kfac_scratch.pinn.hessian_free import HessianFree
from kfac_scratch.pinn.krylov import KFACKrylov
from kfac_scratch.pinn.preconditioners import Joined, PinnPreconditioner, TermWise
from kfac_scratch.pinn.steps import GaussNewton, KFACStar, PinnKFAC, PinnOptimizer, Spring
from kfac_scratch.pinn.terms import Field, Linearization, Term, linearize, pinn_loss
from kfac_scratch.taylor.expansions import (
    SecondOrder,
    directional,
    laplacian,
    second_order_sum,
    value_only,
)
from kfac_scratch.taylor.jets import Elementwise, Jet, forward_laplacian, taylor_coefficients
from kfac_scratch.taylor.partials import Partials, biharmonic, univariate_jets

__version__ = "0.1.0"

__all__ = [
    "CUBIC",
    "EXPAND",
    "KFAC",
    "MUON",
    "REDUCE",
    "Accumulator",
    "AdaptiveRank",
    "AmortisedEKFAC",
    "Approximation",
    "BackpropagatedVectors",
    "BlockDiagonal",
    "Brand",
    "ContinuedInverse",
    "Dense",
    "DenseEigen",
    "Diagonal",
    "DiagonalKronecker",
    "DiagonalKroneckerEigen",
    "Elementwise",
    "Estimator",
    "EvidenceGradient",
    "FactorSums",
    "Field",
    "Flavour",
    "Gathered",
    "GaussNewton",
    "Growing",
    "HessianFree",
    "Jet",
    "Joined",
    "KFACKrylov",
    "KFACStar",
    "KLShampoo",
    "Kronecker",
    "KroneckerColumns",
    "KroneckerEigen",
    "KroneckerSum",
    "Laplace",
    "Latest",
    "LayerGroup",
    "LayerIO",
    "LinearMap",
    "Linearization",
    "LowRankKronecker",
    "Matrix",
    "MovingAverage",
    "OfBatch",
    "OneHot",
    "OnlinePrior",
    "Partials",
    "PinnKFAC",
    "PinnOptimizer",
    "PinnPreconditioner",
    "Plan",
    "Plans",
    "Preconditioner",
    "Ranks",
    "Recompressed",
    "Repaired",
    "ScaledVectors",
    "SecondOrder",
    "ShampooBound",
    "Sketch",
    "SketchedInverse",
    "Spring",
    "Term",
    "TermWise",
    "TiedIO",
    "Vectors",
    "Window",
    "additive",
    "adef1",
    "adef2",
    "biharmonic",
    "bnn",
    "cg_fac",
    "coarse_correction",
    "corrected",
    "default_inverse",
    "deflation",
    "directional",
    "distribute",
    "divisor",
    "effective_parameters",
    "ekfac",
    "ekfac_reduce",
    "ekpsvd",
    "empirical",
    "even_traces_inverse",
    "evidence_gradient",
    "exact_inverse",
    "factored_inverse",
    "foof",
    "forward_laplacian",
    "from_gradient",
    "functional_covariance",
    "graft",
    "guarded",
    "guarded_inverse",
    "influence_by_block",
    "influence_scores",
    "inverse_as_sum",
    "inverse_root",
    "inverses",
    "is_low_rank_update",
    "kernel_inverse",
    "kfac",
    "kfac_corrected",
    "kfac_over",
    "kfac_over_ranks",
    "kfac_reduce",
    "kl_clip",
    "kl_factors",
    "kpsvd",
    "krylov_space",
    "lanczos",
    "laplace",
    "laplacian",
    "layer_groups",
    "layer_ios",
    "levenberg_marquardt",
    "linearize",
    "log_evidence",
    "mackay",
    "mackay_noise",
    "mackay_shared",
    "mean_over_positions",
    "mini_block",
    "mini_block_filters",
    "mini_block_rows",
    "mini_block_shared",
    "monte_carlo",
    "nearest_product",
    "nearest_sum",
    "newton_schulz",
    "nicolaides_space",
    "norm_constraint",
    "nystrom",
    "one_sided",
    "output_vectors",
    "over_loader",
    "parameters_from",
    "pinn_loss",
    "plan",
    "polar_factor",
    "pooled",
    "preconditioner",
    "predicted_outputs",
    "probit",
    "product_kernels",
    "quadratic_model",
    "randomized",
    "rank_by_ratio",
    "reduce_sum",
    "refreshed",
    "relative_damping",
    "relative_factored_inverse",
    "relative_inverse",
    "rescaled",
    "residual_space",
    "rsvd",
    "sampled_probabilities",
    "sampled_weights",
    "second_order_sum",
    "self_influence",
    "shampoo_bound",
    "shampoo_inverse",
    "skfac",
    "smallest_kept",
    "soap",
    "spatial_subsampling",
    "spectral_space",
    "srevd",
    "stream",
    "subsampled",
    "taylor_coefficients",
    "tekfac",
    "tkfac",
    "trace_matched",
    "trained_weights",
    "truncated_inverse",
    "two_level",
    "type2",
    "type2_classwise",
    "uncovered",
    "univariate_jets",
    "value_only",
    "weights_without_biases",
    "zero_tail",
]
