r"""KFAC: average over inputs and over vectors separately.

The exact block of a layer is an average of products, KFAC is the product of averages,

$$
\sum_{v,n} \operatorname{vec}(g_{vn} a_n^\top) \operatorname{vec}(g_{vn} a_n^\top)^\top
\;\approx\;
\Bigl(\sum_{v,n} g_{vn} g_{vn}^\top\Bigr) \otimes \Bigl(\frac{1}{N} \sum_n a_n a_n^\top\Bigr)
= B \otimes A .
$$

Sources: Martens and Grosse 2015 (arXiv:1503.05671), §3; with weight sharing, Eschenhagen et al.
2023 (arXiv:2311.00636): KFAC-expand is `kfac(io)`, KFAC-reduce is `kfac(io.reduced())`; input
factor only, Benzing 2022 (arXiv:2201.12250).
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import Module
from tqdm import tqdm

from kfac_scratch.capture import EXPAND, Setting, stream
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like, gram
from kfac_scratch.losses import Fisher, divisor, type2
from kfac_scratch.matrices import Kronecker


def kfac(io: LayerIO) -> Kronecker:
    """Approximate a layer's block by its input factor and its vector factor.

    `A` is the mean of `a a^T` over data and positions, `B` the sum of `g g^T` over all vectors.
    Law: exact if `a a^T` or `sum_v g g^T` is the same for all data and there is one position.
    """
    N, S, _ = io.a.shape
    return Kronecker(gram(io.a).div_(N * S), gram(io.g.flatten(0, 1)))


def foof(io: LayerIO) -> Kronecker:
    """Keep only the input factor: `I ⊗ A`.

    Source: Benzing 2022 (arXiv:2201.12250), §5, where it is called FOOF.
    """
    factors = kfac(io)
    return Kronecker(factors.A, eye_like(factors.B))


def kfac_over(
    model: Module,
    loss: Module,
    data: Iterable[tuple[Tensor, Tensor]],
    fisher: Fisher = type2,
    *,
    setting: Setting = EXPAND,
    layers: Collection[str] | None = None,
    chunk: int | None = None,
    terms: Callable[[Module, Tensor, Tensor], float] = divisor,
    progress: bool | None = None,
) -> dict[str, Kronecker]:
    """KFAC of every block over a whole data loader, as if it were one batch.

    Batches may differ in size: factors are summed and divided once, at the end. Memory is that of
    one batch with `chunk` vectors, and of the factors.

    Args:
        model: Any module, see `capture.layer_ios`.
        loss: The loss of one batch. With mean reduction, the result is for the mean over all data.
        data: Batches `(X, y)`, on the model's device.
        fisher: Which vectors to send backward, see `losses`.
        setting: `EXPAND` or `REDUCE`.
        layers: Names of the layers to cover.
        chunk: How many vectors are sent backward at once, see `layer_ios`.
        terms: How many terms a batch loss is the mean of, 1 for a sum: `losses.divisor`.
        progress: Show a progress bar. Default: on a terminal only.

    Raises:
        ValueError: If there is no batch, and for everything that `layer_ios` refuses.
    """
    sums: dict[str, _Sums] = {}
    D = 0.0

    def of_sum(loss: Module, f: Tensor, y: Tensor) -> Tensor:
        nonlocal D
        here = terms(loss, f, y)
        D += here
        return here**0.5 * fisher(loss, f, y)

    for X, y in tqdm(data, desc="KFAC", disable=None if progress is None else not progress):
        parts = stream(model, loss, X, y, of_sum, setting=setting, layers=layers, chunk=chunk)
        for i, ios in enumerate(parts):
            for name, io in ios.items():
                _add(sums, name, io, with_inputs=i == 0)
    if not sums:
        raise ValueError("The data loader yielded no batch.")
    D = D if getattr(loss, "reduction", None) == "mean" else 1.0
    return {name: total.factors(D) for name, total in sums.items()}


def _add(sums: "dict[str, _Sums]", name: str, io: LayerIO, with_inputs: bool) -> None:
    """Add a part of a batch to a layer's sums; the parts of one batch have the same inputs."""
    N, S, _ = io.a.shape
    B = gram(io.g.flatten(0, 1))
    if name not in sums:
        sums[name] = _Sums(gram(io.a), B, N * S)
        return
    total = sums[name]
    total.B += B
    if with_inputs:
        total.A += gram(io.a)
        total.rows += N * S


@dataclass(eq=False)
class _Sums:
    """Running sums of `a a^T` and `g g^T`, and the number of rows `a`."""

    A: Tensor
    B: Tensor
    rows: int

    def factors(self, D: float) -> Kronecker:
        return Kronecker(self.A.div_(self.rows), self.B.div_(D))
