"""From a data loader to matrices: any approximation of every block, over all batches at once.

There is one loop over batches for all approximations. It knows the model and the loss. An
`Accumulator` knows neither, and makes a matrix of the parts.

Source: Martens and Grosse 2015 (arXiv:1503.05671), §3: factors are expectations over the data.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, TypedDict, Unpack

from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from kfac_scratch.approximations.accumulators import Accumulator, FactorSums, M, accumulator
from kfac_scratch.border import check_function
from kfac_scratch.capture.counted import Counted
from kfac_scratch.capture.flavours import EXPAND, Flavour
from kfac_scratch.capture.forward_pass import ForwardPass, check_vectors, forward_pass
from kfac_scratch.capture.layer_groups import LayerGroup
from kfac_scratch.capture.plan import Plan, Plans
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import (
    LIKELIHOODS,
    BackpropagatedVectors,
    ScaledVectors,
    divisor,
    type2,
)
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import KroneckerSum


class LoaderOptions(TypedDict, total=False):
    """The keyword arguments of `over_loader`."""

    flavour: Flavour
    layers: Collection[str] | None
    chunk: int | None
    count_terms: Callable[[Module, Tensor, Tensor], float]
    progress: bool | None
    plan: Plan | Plans | None
    counted: Counted | None


def over_loader(
    approximation: Callable[[LayerIO], M] | Accumulator[M],
    model: Module,
    loss: Module,
    data: Iterable[tuple[Any, Tensor]],
    fisher: BackpropagatedVectors = type2,
    *,
    flavour: Flavour = EXPAND,
    layers: Collection[str] | None = None,
    chunk: int | None = None,
    count_terms: Callable[[Module, Tensor, Tensor], float] = divisor,
    progress: bool | None = None,
    plan: Plan | Plans | None = None,
    counted: Counted | None = None,
) -> dict[str, M]:
    """An approximation of every block over a whole data loader, as if it were one batch.

    Use it where one matrix stands for a whole data set: Laplace, influence, pruning. Not in
    training, where an `Estimator` follows the batches.

    Law: equal, up to rounding, to the approximation of one batch with all samples, for batches of
    any sizes. Units: those of the loss over all samples, with the reduction of `loss`.
    Cost: that of `layer_ios` for every batch, with one plan for each kind of batch, and of the
    accumulator. Of a batch's rows, those of
    one layer are held at a time.

    It has many parameters, because it passes those of `layer_ios` on.

    Args:
        approximation: A function of a `LayerIO`, which gets all samples at once, so that memory
            grows with their number. Or an `Accumulator`, such as `FactorSums()` for KFAC, which
            bounds the memory.
        model: Any module, see `layer_ios`.
        loss: The loss of one batch. With mean reduction, the result is for the mean over all
            samples.
        data: Batches `(X, y)`, on the model's device.
        fisher: The vectors that are sent backward, see `losses`.
        flavour: `EXPAND` or `REDUCE`.
        layers: Names of the layers to cover. Default: all supported ones.
        chunk: How many vectors are sent backward at once, see `layer_ios`.
        count_terms: The number of terms that a batch loss is the mean of, 1 for a sum. Default:
            `losses.divisor`.
        progress: Show a progress bar. Default: on a terminal only.
        plan: As in `layer_ios`, for all batches. Default: one is made for every kind of batch.
        counted: As in `layer_ios`, for every batch.

    Raises:
        ValueError: If there is no batch, and for everything that `layer_ios` refuses.
        NotImplementedError: For another loss than the three, without `count_terms`.
    """
    check_function("fisher", fisher, "fisher=type2")
    check_function("count_terms", count_terms, "count_terms=divisor")
    gather, of_sum = accumulator(approximation), _OfSum(fisher, count_terms)
    states: dict[str, Any] = {}
    options: Any = {
        "flavour": flavour,
        "layers": layers,
        "chunk": chunk,
        "plan": Plans() if plan is None else plan,
        "counted": counted,
    }
    for X, y in batches(data, progress):
        run = forward_pass(model, loss, X, y, of_sum, **options)
        parts = run.sent_back()
        for group, gs in next(parts):
            states |= _with_inputs(gather, states, run, group, gs)
        for part in parts:
            for group, gs in part:
                for name, g in run.vectors_by_block(group, gs).items():
                    states[name] = gather.add_vectors(states[name], g)
    D = of_sum.terms if getattr(loss, "reduction", None) == "mean" else 1.0
    return {name: gather.matrix(state, D) for name, state in states.items()}


class _OfSum:
    """The vectors of a loss with sum reduction, and the number of terms of all batches."""

    def __init__(
        self,
        fisher: BackpropagatedVectors,
        count_terms: Callable[[Module, Tensor, Tensor], float],
    ) -> None:
        self.fisher, self.count_terms, self.terms = fisher, count_terms, 0.0

    def __call__(self, loss: Module, f: Tensor, y: Tensor) -> ScaledVectors:
        vectors = self.fisher(loss, f, y)
        check_vectors(vectors, f)
        if self.count_terms is divisor and type(loss) not in LIKELIHOODS:
            raise NotImplementedError(
                f"To join batches of {type(loss).__name__}, the number of terms of each is needed: "
                "pass a function count_terms(loss, f, y), for example lambda loss, f, y: f.numel() "
                "for a mean over all entries, or one that returns 1 for a sum."
            )
        here = self.count_terms(loss, f, y)
        self.terms += here
        return ScaledVectors(vectors, here**0.5)


def _with_inputs(
    gather: Accumulator[M],
    states: Mapping[str, Any],
    run: ForwardPass,
    group: LayerGroup,
    gs: list[Float[Tensor, "V N S d_out"]],
) -> dict[str, Any]:
    """The states of one group of layers after the first vectors of a batch, and its rows.

    Here the rows of a group are made, and only those of one are there at a time.
    """
    ios = run.layer_ios(group, run.rows(group), gs)
    return {name: gather.add(states.get(name), io) for name, io in ios.items()}


def batches(
    data: Iterable[tuple[Any, Tensor]], progress: bool | None = None, name: str = "data"
) -> Iterator[tuple[Any, Tensor]]:
    """The batches, each of which must be a pair, behind a progress bar.

    Args:
        data: Pairs `(X, y)`.
        progress: Show the bar. Default: on a terminal only.
        name: The parameter's name, as the user wrote it.

    Raises:
        TypeError: For a tensor, or another thing that is not a list of pairs.
        ValueError: If there is none.
    """
    if isinstance(data, Tensor) or not isinstance(data, Iterable):
        raise TypeError(
            f"{name} must yield batches (X, y), as a DataLoader does, got a "
            f"{type(data).__name__}: for one batch, pass [(X, y)]."
        )
    bar = tqdm(data, desc="KFAC", disable=None if progress is None else not progress)
    count = 0
    for batch in bar:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise TypeError(
                f"Batch {count} of {name} is a {type(batch).__name__}, not a pair (X, y). Yield "
                "pairs, for example ((batch['x'], batch['y']) for batch in loader)."
            )
        count += 1
        yield batch[0], batch[1]
    if count == 0:
        raise ValueError(f"{name} yielded no batch.")


def kfac_over(
    model: Module,
    loss: Module,
    data: Iterable[tuple[Any, Tensor]],
    fisher: BackpropagatedVectors = type2,
    **options: Unpack[LoaderOptions],
) -> dict[str, Kronecker | DiagonalKronecker | KroneckerSum]:
    """KFAC of every block over a whole data loader, in the memory of one batch and the factors.

    It is `over_loader(FactorSums(), model, loss, data, fisher, ...)`, which describes the
    arguments. Use it for KFAC of a whole data set. Not for other approximations: `over_loader`.

    Cost: memory `d_in**2 + d_out**2` for each layer, one part of one batch's vectors, and the rows
    of one layer.
    """
    return over_loader(FactorSums(), model, loss, data, fisher, **options)
