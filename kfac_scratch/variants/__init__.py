"""Better and faster: one file per paper, each a function of `LayerIO`."""

from kfac_scratch.variants.brand import Brand, Repaired, corrected, refreshed
from kfac_scratch.variants.cg_fac import cg_fac, kernel_inverse, truncated_inverse
from kfac_scratch.variants.coarse_spaces import krylov, nicolaides, residual, spectral
from kfac_scratch.variants.kpsvd import (
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
from kfac_scratch.variants.mini_block import (
    mini_block,
    mini_block_filters,
    mini_block_rows,
    mini_block_shared,
)
from kfac_scratch.variants.randomized import Sketch, nystrom, randomized, rs, sre
from kfac_scratch.variants.skfac import Window, averaged, skfac, subsampled
from kfac_scratch.variants.tekfac import tekfac
from kfac_scratch.variants.tkfac import tkfac
from kfac_scratch.variants.two_level import (
    additive,
    adef1,
    adef2,
    bnn,
    coarse_correction,
    two_level,
)

__all__ = [
    "Brand",
    "Recompressed",
    "Repaired",
    "Sketch",
    "Window",
    "additive",
    "adef1",
    "adef2",
    "averaged",
    "bnn",
    "cg_fac",
    "coarse_correction",
    "corrected",
    "deflation",
    "ekpsvd",
    "guarded",
    "guarded_inverse",
    "kernel_inverse",
    "kfac_corrected",
    "kpsvd",
    "krylov",
    "lanczos",
    "mini_block",
    "mini_block_filters",
    "mini_block_rows",
    "mini_block_shared",
    "nearest_product",
    "nearest_sum",
    "nicolaides",
    "nystrom",
    "randomized",
    "refreshed",
    "residual",
    "rs",
    "skfac",
    "spectral",
    "sre",
    "subsampled",
    "tekfac",
    "tkfac",
    "truncated_inverse",
    "two_level",
]
