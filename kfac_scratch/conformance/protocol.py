"""What the author of another implementation writes: an adapter, in 20 to 60 lines.

An adapter gets a `Request` (a PyTorch module, a loss, data) and returns every layer's `LayerBlock`:
the raw numbers of the implementation, and how they are laid out. It never permutes or rescales
anything by itself: it says what the documentation says, and the harness does the rest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from kfac_scratch.conformance.vocabulary import (
    BiasPlace,
    DampingForm,
    Fisher,
    Flavour,
    LossKind,
    PartName,
    Precision,
)


class NotSupported(Exception):  # noqa: N818
    """Raised by an adapter for what the implementation does not offer. Say what, in a sentence."""


@dataclass(frozen=True)
class Capabilities:
    """What an implementation offers. A case that needs more is `not-supported`, not an error.

    Attributes:
        name: The implementation's name.
        version: Its version.
        fishers: Of `type2`, `mc`, `empirical`.
        flavours: Of `expand`, `reduce`, `ekfac`.
        ops: Kinds of operations it can look through, see `ops`; empty for all.
        losses: Of `mse`, `cross-entropy`, `bce`.
        dtypes: Of `float64`, `float32`.
        batches: Whether it accumulates over mini-batches.
        damping: Of `exact`, `factored`: which damped inverses it applies to a gradient.
        operators: Whether it takes differential operators (PINNs).
        projections: Whether it has blocks for the four layers inside `nn.MultiheadAttention`:
            `NAME.q_proj`, `.k_proj`, `.v_proj`, which are no modules, and `NAME.out_proj`, which
            is a module that PyTorch never calls, so that no hook on it runs.
        ties: Whether it has a block for the weight of an embedding that a linear layer has, too:
            one, under the embedding's name, in the layout of its weight. It is the sum of KFAC of
            both, each as if it were alone.
        masks: Whether it takes masks of the positions that are part of the data.
        libraries: Those that its numbers depend on beside PyTorch, with versions (`jax 0.8.2`).
    """

    name: str
    version: str
    fishers: frozenset[Fisher] = frozenset({"type2"})
    flavours: frozenset[Flavour] = frozenset({"expand"})
    ops: frozenset[str] = frozenset()
    losses: frozenset[LossKind] = frozenset({"mse", "cross-entropy"})
    dtypes: frozenset[Precision] = frozenset({"float64", "float32"})
    batches: bool = True
    damping: frozenset[DampingForm] = frozenset()
    operators: bool = False
    projections: bool = False
    ties: bool = False
    masks: bool = False
    libraries: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked of an implementation.

    Attributes:
        case: The case's identifier.
        model: An `nn.Sequential` with named layers, or a general module, in training mode; batch
            normalisations in it are in evaluation mode and must stay there.
        loss: `MSELoss`, `CrossEntropyLoss` or `BCEWithLogitsLoss`, with all its weights.
        batches: Pairs `(X, y)`. The curvature is that of the loss over all of them.
        layers: Names of the layers whose blocks are wanted.
        flavour: `expand`, `reduce` or `ekfac`, which has the eigenvectors of `expand`.
        fisher: `type2`, `mc` or `empirical`.
        samples: Labels drawn per datum, for `mc`.
        seed: For `mc`: other seeds must give other, independent draws.
        damping: `(form, value)` if the damped inverse times `gradient` is wanted, not the block.
        gradient: By name of parameter.
        coefficients: `[N, d + 2]` if the loss sees `c_0 u + sum_i c_i du/dx_i + c_{d+1} Lap u` of
            the network's output `u`.
        masks: For each mini-batch, which positions `[N, T]` are part of the data; empty if all are.
            The others are padding: in no mean over positions.
    """

    case: str
    model: nn.Module
    loss: nn.Module
    batches: list[tuple[Tensor, Tensor]]
    layers: tuple[str, ...]
    flavour: Flavour = "expand"
    fisher: Fisher = "type2"
    samples: int = 1
    seed: int = 0
    damping: tuple[DampingForm, float] | None = None
    gradient: Mapping[str, Tensor] = field(default_factory=dict)
    coefficients: Tensor | None = None
    masks: Sequence[Tensor] = ()


@dataclass(frozen=True, eq=False)
class KroneckerAnswer:
    """Two factors: `A` of the layer's inputs, `B` of its outputs. Their order does not matter.

    A grouped convolution's factors have a leading axis of groups.
    """

    A: Tensor
    B: Tensor


@dataclass(frozen=True, eq=False)
class EigenAnswer:
    """Eigenvectors as columns, and eigenvalues `[d_out, d_in]`, as EKFAC has them."""

    QA: Tensor
    QB: Tensor
    scale: Tensor


@dataclass(frozen=True, eq=False)
class DenseAnswer:
    """A whole block, whose rows and columns are numbered as `LayerBlock.axes` says."""

    M: Tensor


@dataclass(frozen=True, eq=False)
class VectorAnswer:
    """A damped inverse times the gradient: of any shape, numbered as `LayerBlock.axes` says."""

    v: Tensor


Part = KroneckerAnswer | EigenAnswer | DenseAnswer | VectorAnswer


@dataclass(frozen=True, eq=False)
class LayerBlock:
    """One layer's numbers and their layout. Give `joint`, or `weight` and (if there is one) `bias`.

    Attributes:
        joint: Weight and bias together.
        weight: The weight by itself.
        bias: The bias by itself.
        bias_at: Where the bias stands in `joint`: `last` or `first` among the inputs, or `behind`
            the whole weight.
        axes: How the weight is numbered, slowest axis first, for instance `o i` (rows behind each
            other, as PyTorch stores it), `i o`, `o i h w`, `h w i o`. Empty: as PyTorch has it.
    """

    joint: Part | None = None
    weight: Part | None = None
    bias: Part | None = None
    bias_at: BiasPlace = "last"
    axes: str = ""


@runtime_checkable
class Adapter(Protocol):
    """An implementation, as the oracle sees it."""

    def capabilities(self) -> Capabilities:
        """What it offers."""
        ...

    def blocks(self, request: Request) -> Mapping[str, LayerBlock]:
        """Raw blocks by name of layer.

        Raises:
            NotSupported: If the implementation does not offer this.
        """
        ...

    def scale(self, request: Request, layer: str, part: PartName) -> float | None:
        """The factor between the raw block and the canonical one, as the documentation says.

        The canonical block is that of the loss exactly as PyTorch computes it, and for the
        empirical Fisher `sum_n grad_n grad_n^T / D` with the gradients of the sum of the loss's
        terms and the number `D` by which the loss divides it. None if the documentation is silent;
        the judge then fits one number. `part` is `joint`, `weight` or `bias`.
        """
        ...
