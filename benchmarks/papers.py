"""The methods of papers, for `benchmarks.training`: KFAC's optimizer with their matrices.

Every method has the axes of KFAC and one for each choice that its paper leaves or makes. Where a
matrix has an average, newest, window and moving are choices; where it has two dampings, so are
these. The functions under `proof` are what makes a method that method.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from benchmarks.averaging import AVERAGES, WINDOW
from benchmarks.methods import (
    AVERAGE,
    DAMPINGS,
    INVERSE,
    INVERSES,
    LENGTH,
    MOMENTS,
    RELATIVE,
    SHARED,
    Choice,
    Config,
    Method,
    amortised_ekfac,
    curvature,
)
from benchmarks.tasks import Task
from kfac_scratch import KFAC, empirical, foof, kfac, monte_carlo
from kfac_scratch.approximations.adaptive_rank import AdaptiveRank
from kfac_scratch.approximations.brand import (
    Brand,
    ContinuedInverse,
    Repaired,
    corrected,
    refreshed,
)
from kfac_scratch.approximations.cg_fac import cg_fac, truncated_inverse
from kfac_scratch.approximations.estimators import Estimator, Latest
from kfac_scratch.approximations.kpsvd import (
    Recompressed,
    deflation,
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
    mini_block_shared,
)
from kfac_scratch.approximations.randomized import (
    Decomposition,
    Sketch,
    SketchedInverse,
    randomized,
    rsvd,
    smallest_kept,
    srevd,
    trace_matched,
    zero_tail,
)
from kfac_scratch.approximations.skfac import (
    Window,
    mean_over_positions,
    reduce_sum,
    skfac,
    spatial_subsampling,
)
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.optimizer.coarse_spaces import nicolaides_space, residual_space, spectral_space
from kfac_scratch.optimizer.two_level import additive, adef1, adef2, bnn, coarse_correction

AT = "kfac_scratch.approximations"
TOLERANCE = Choice((1e-1, 1e-2, 1e-3))  # of power iterations
TAILS = {"trace": trace_matched, "smallest": smallest_kept, "zero": zero_tail}
RANK = Choice((8, 16, 32, 64))


def of(approximation: Callable[[LayerIO], Matrix]) -> Callable[..., KFAC]:
    """An approximation under every average and damping."""
    return partial(curvature, approximation=approximation)


# ---- TEKFAC -------------------------------------------------------------------------------------


def amortised_tekfac(task: Task, model: nn.Module, config: Config) -> KFAC:
    return amortised_ekfac(task, model, config, AVERAGES["moving"](tkfac))


# ---- KPSVD and its sums -------------------------------------------------------------------------


def product(task: Task, model: nn.Module, config: Config) -> KFAC:
    """KPSVD: of the newest batch, or the nearest product to the average."""
    tolerance = config["tolerance"]
    newest = Latest(partial(kpsvd, tolerance=tolerance))
    moving = Recompressed(partial(nearest_product, tolerance=tolerance))
    found = {"newest": newest, "moving": moving}[config["average"]]
    return curvature(task, model, config, found)


SUMS: dict[str, Callable[[Config], Callable[[LayerIO], Matrix]]] = {
    "deflation": lambda config: partial(deflation, tolerance=config["tolerance"]),
    "lanczos": lambda config: partial(lanczos, steps=config["steps"]),
    "kfac-corrected": lambda config: partial(kfac_corrected, tolerance=config["tolerance"]),
}


def sum_of_two(name: str, task: Task, model: nn.Module, config: Config) -> KFAC:
    """The sum of two products, of the newest batch or, for deflation, of the average too.

    Damping is that of factors, guarded: with an exact damping so small, sums are seldom positive.
    """
    newest = Latest(SUMS[name](config))
    found: dict[str, Estimator] = {"newest": newest}
    if name == "deflation":
        found["moving"] = Recompressed(partial(nearest_sum, tolerance=config["tolerance"]))
    estimator = found[config.get("average", "newest")]
    return curvature(task, model, config, estimator, invert=guarded_inverse)


TWO_AVERAGES = {"average": Choice(("newest", "moving"))}

# ---- SKFAC --------------------------------------------------------------------------------------

POSITIONS: dict[str, Callable[[LayerIO], LayerIO]] = {
    "reduce sum": reduce_sum,
    "every second": partial(spatial_subsampling, stride=2),
    "every fourth": partial(spatial_subsampling, stride=4),
    "mean": mean_over_positions,  # the paper's code
}


def columns(task: Task, model: nn.Module, config: Config) -> KFAC:
    """SKFAC: a window of columns, at some of the positions."""
    positions = POSITIONS[config["positions"]]
    found = Window(config["batches"], lambda io: skfac(positions(io)))
    return curvature(task, model, config, found)


# ---- randomised and updated eigenpairs ----------------------------------------------------------


def sketched(decomposition: Decomposition, task: Task, model: nn.Module, config: Config) -> KFAC:
    """RS-KFAC and SRE-KFAC: tail, damping and average are axes."""
    inverse = INVERSES[config["inverse"]]
    invert = SketchedInverse(decomposition, TAILS[config["tail"]], inverse)
    return curvature(task, model, config, randomized(config["rank"]), invert=invert)


def adaptive(task: Task, model: nn.Module, config: Config) -> KFAC:
    """RS-KFAC with the rank of its author's code, which follows the spectrum of every factor."""
    sketch, tail = Sketch(config["rank"]), TAILS[config["tail"]]
    found = AdaptiveRank(sketch, period=config["period"], tail=tail)
    return curvature(task, model, config, found)


BRANDS: dict[str, Callable[[Config, Brand], Estimator]] = {
    "b-kfac": lambda config, brand: brand,
    "b-r-kfac": lambda config, brand: Repaired(
        brand, refreshed(Sketch(config["rank"]), brand.tail), config["repair"]
    ),
    "b-kfac-c": lambda config, brand: Repaired(brand, corrected(0.5), config["repair"]),
}


def updated(name: str, task: Task, model: nn.Module, config: Config) -> KFAC:
    """The three of Brand new K-FACs. `continued` is the tail of their author's code."""
    continued = config["tail"] == "continued"
    tail = zero_tail if continued else TAILS[config["tail"]]
    found = BRANDS[name](config, Brand(config["rank"], tail))
    own = {"invert": ContinuedInverse(DAMPINGS[config["inverse"]])} if continued else {}
    return curvature(task, model, config, found, **own)


TAIL = {"tail": Choice(tuple(TAILS))}
BRAND_TAIL = {"tail": Choice(("trace", "zero", "continued"))}
REPAIR = {"repair": Choice((1, 2, 4))}  # updates from one to the next
BRAND_PROOF = (f"{AT}.brand:brand_update",)

# ---- mini-blocks, conjugate gradients, two levels -----------------------------------------------

FISHERS = {"model": None, "data": empirical}


def blocks_of_paper(size: int) -> Callable[[LayerIO], Any]:
    """A block for every filter of a convolution; one for all rows of a fully connected layer."""

    def approximation(io: LayerIO) -> Matrix:
        convolution = io.a.shape[1] > 1 and (io.a.shape[-1] - 1) % size == 0
        return (mini_block_filters(size) if convolution else mini_block_shared)(io)

    return approximation


BLOCKS = {"paper": blocks_of_paper(9), "rows": mini_block}


def blocks(task: Task, model: nn.Module, config: Config) -> KFAC:
    """Mini-block Fisher. The paper's vectors are those of the data's labels."""
    fisher = FISHERS[config["labels"]]
    return curvature(task, model, config, BLOCKS[config["blocks"]], fisher=fisher)


def conjugate(task: Task, model: nn.Module, config: Config) -> KFAC:
    """CG-FAC on the newest batch; nothing is inverted."""
    invert = partial(truncated_inverse, max_iter=config["iterations"])
    return curvature(task, model, config, Latest(cg_fac), invert=invert)


SPACES = {"nicolaides": nicolaides_space, "residual": residual_space, "spectral": spectral_space}
FORMS = {"additive": additive, "adef1": adef1, "adef2": adef2, "bnn": bnn}


def two_levels(task: Task, model: nn.Module, config: Config) -> KFAC:
    """KFAC and a coarse level for the whole network."""
    space, form = SPACES[config["space"]], FORMS[config["form"]]
    controls = (coarse_correction(monte_carlo(1), space, form),)
    return curvature(task, model, config, kfac, controls=controls)


PAPERS = {
    "foof": Method(SHARED | AVERAGE, of(foof), (f"{AT}.kfac:eye_like",)),
    "tkfac": Method(SHARED | INVERSE | AVERAGE, of(tkfac), (f"{AT}.tkfac:check_not_reduced",)),
    "tekfac": Method(SHARED, amortised_tekfac, (MOMENTS, f"{AT}.tkfac:check_not_reduced")),
    "kpsvd": Method(
        SHARED | INVERSE | TWO_AVERAGES | {"tolerance": TOLERANCE},
        product,
        (f"{AT}.kpsvd:power_svd",),
    ),
    "deflation": Method(
        SHARED | TWO_AVERAGES | {"tolerance": TOLERANCE},
        partial(sum_of_two, "deflation"),
        (f"{AT}.kpsvd:power_svd",),
    ),
    "lanczos": Method(
        SHARED | {"steps": Choice((4, 8, 12))},
        partial(sum_of_two, "lanczos"),
        (f"{AT}.kpsvd:lanczos_svd",),
    ),
    "kfac-corrected": Method(
        SHARED | {"tolerance": TOLERANCE},
        partial(sum_of_two, "kfac-corrected"),
        (f"{AT}.kpsvd:power_svd",),
    ),
    "skfac": Method(
        SHARED
        | INVERSE
        | {"batches": Choice((1, 2, WINDOW)), "positions": Choice(tuple(POSITIONS))},
        columns,
        (f"{AT}.skfac:reduced_columns",),
    ),
    "rs-kfac": Method(
        SHARED | INVERSE | AVERAGE | TAIL | {"rank": RANK},
        partial(sketched, rsvd),
        (f"{AT}.randomized:range_basis",),
    ),
    "sre-kfac": Method(
        SHARED | INVERSE | AVERAGE | TAIL | {"rank": RANK},
        partial(sketched, srevd),
        (f"{AT}.randomized:range_basis",),
    ),
    "rs-kfac, adaptive rank": Method(
        SHARED | RELATIVE | TAIL | {"rank": RANK, "period": Choice((1, 2, 4))},
        adaptive,
        (f"{AT}.adaptive_rank:leading",),
    ),
    "b-kfac": Method(
        SHARED | RELATIVE | BRAND_TAIL | {"rank": RANK}, partial(updated, "b-kfac"), BRAND_PROOF
    ),
    "b-r-kfac": Method(
        SHARED | RELATIVE | BRAND_TAIL | REPAIR | {"rank": RANK},
        partial(updated, "b-r-kfac"),
        (*BRAND_PROOF, f"{AT}.randomized:range_basis"),
    ),
    "b-kfac-c": Method(
        SHARED | RELATIVE | BRAND_TAIL | REPAIR | {"rank": RANK},
        partial(updated, "b-kfac-c"),
        (*BRAND_PROOF, f"{AT}.brand:ritz"),
    ),
    "mini-block": Method(
        SHARED | AVERAGE | {"labels": Choice(tuple(FISHERS)), "blocks": Choice(tuple(BLOCKS))},
        blocks,
        (f"{AT}.mini_block:check_not_reduced",),
    ),
    "cg-fac": Method(
        SHARED | {"iterations": Choice((5, 10, 20))},
        conjugate,
        (f"{AT}.cg_fac:conjugate_gradient",),
    ),
    "two-level": Method(
        SHARED
        | INVERSE
        | AVERAGE
        | LENGTH
        | {"space": Choice(tuple(SPACES)), "form": Choice(tuple(FORMS))},
        two_levels,
        ("kfac_scratch.optimizer.two_level:_corrected",),
    ),
}
