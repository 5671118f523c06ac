"""KFAC ignores `CrossEntropyLoss.weight` and `BCEWithLogitsLoss`'s `weight` and `pos_weight`.

The operators with `fisher_type="type-2"`. `GGNLinearOperator` differentiates the loss and has the
weights. On one datum KFAC is the GGN, so that the two operators should agree. They do without
weights:

```python
import torch
from torch import nn
from curvlinops import GGNLinearOperator, KFACLinearOperator

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(3, 3)).double()
params, X = list(model.parameters()), torch.randn(1, 3).double()
weight = torch.tensor([1.0, 0.25, 3.0]).double()
for loss, y in (
    (nn.CrossEntropyLoss(reduction="sum"), torch.tensor([2])),
    (nn.CrossEntropyLoss(weight, reduction="sum"), torch.tensor([2])),
    (nn.CrossEntropyLoss(weight, label_smoothing=0.2, reduction="sum"), torch.tensor([2])),
    (nn.BCEWithLogitsLoss(pos_weight=weight), torch.ones(1, 3).double()),
    (nn.BCEWithLogitsLoss(weight), torch.ones(1, 3).double()),
):
    M = torch.eye(12).double()
    G = GGNLinearOperator(model, loss, params, [(X, y)]) @ M
    K = KFACLinearOperator(
        model, loss, params, [(X, y)], fisher_type="type-2", separate_weight_and_bias=False
    ) @ M
    print((G.diagonal() / K.diagonal())[-3:])
# prints
#   tensor([1.0000, 1.0000, 1.0000], dtype=torch.float64)
#   tensor([3.0000, 3.0000, 3.0000], dtype=torch.float64)
#   tensor([2.6833, 2.6833, 2.6833], dtype=torch.float64)
#   tensor([1.0000, 0.2500, 3.0000], dtype=torch.float64)
#   tensor([1.0000, 0.2500, 3.0000], dtype=torch.float64)
```

Expected: ones. Got: the ignored weights. `loss_hessian_matrix_sqrt` has the square root of the
Hessian for the plain losses. With `fisher_type="mc"` and a class weight, labels are drawn from the
softmax, and every drawn label brings its own weight, which is another matrix; the targets' weights
never enter.

Suggestion: multiply the root by the root of `weight[y]` (with label smoothing, the mean of `weight`
under the smoothed target), and of `weight` and `1 + (pos_weight - 1) y`; with `reduction="mean"`
the cross-entropy divides by the sum of `weight[y]`, which takes the place of the number of loss
terms. Or refuse such losses, as `KFACLinearOperator.__init__` does for losses it does not
know.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "curvlinops", "3.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.curvlinops:Adapter"
TITLE = "The weights of a loss are ignored by KFAC and EKFAC"
CASES = (
    *(
        (f"{case}-{reduction}", flavour)
        for case in (
            "class-weights-mlp",
            "pos-weight-one-datum",
            "pos-weight-constant",
            "pos-weight-mlp",
            "label-smoothing-class-weights-one-datum",
            "label-smoothing-class-weights-constant",
            "label-smoothing-class-weights-mlp",
            "entry-weights-pos-weight-mlp",
        )
        for reduction in ("mean", "sum")
        for flavour in ("expand", "reduce", "ekfac")
    ),
    *(
        (case, flavour)
        for case in (
            "class-weights-constant-sum",
            "entry-weights-one-datum-mean",
            "entry-weights-constant-mean",
            "entry-weights-mlp-mean",
            "entry-weights-pos-weight-one-datum-mean",
            "entry-weights-pos-weight-constant-mean",
        )
        for flavour in ("expand", "reduce", "ekfac")
    ),
    ("class-weights-tokens", "expand"),
    ("batches-class-weights", "expand"),
)
CAUSE = (
    "curvlinops/kfac_utils.py, lines 123 and 138, loss_hessian_matrix_sqrt: c and hess_diag do "
    "not depend on the loss's weights; curvlinops/kfac.py, line 609: the mean is taken over the "
    "number of terms, where PyTorch divides by the sum of the targets' weights."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """The Hessian's root and the loss's divisor with weights."""
    kfac = import_module("curvlinops.kfac")
    mean_weight = (
        "1.0 if loss_func.weight is None else ((1 - loss_func.label_smoothing) * ("
        "(loss_func.weight * target_one_datum).sum() if target_one_datum.is_floating_point() "
        "else loss_func.weight[target_one_datum]) "
        "+ loss_func.label_smoothing * loss_func.weight.mean()).item()"
    )
    entries = (
        "sqrt(c) * ((1.0 if loss_func.weight is None else loss_func.weight) * "
        "(1.0 if loss_func.pos_weight is None else "
        "1 + (loss_func.pos_weight - 1) * target_one_datum.squeeze(0)) * p * (1 - p)).sqrt()"
    )
    plain = (
        "not isinstance(self._loss_func, CrossEntropyLoss) or self._loss_func.weight is None "
        "or self._loss_func.reduction == 'sum' or y.is_floating_point()"
    )
    total = "sum(self._loss_func.weight[t].sum().item() for _, t in self._loop_over_data())"
    terms = "self._N_data * self._num_per_example_loss_terms"
    root = f"(1.0 if {plain} else ({terms} / {total}) ** 0.5)"
    with (
        mended(
            kfac,
            "loss_hessian_matrix_sqrt",
            ("c = 1.0", f"c = ({mean_weight})"),
            ("sqrt(c) * (p * (1 - p)).sqrt()", entries),
        ),
        mended(
            kfac.KFACLinearOperator,
            "_compute_loss_and_backward",
            ("hessian_sqrts.mul_(scale)", f"hessian_sqrts.mul_(scale * {root})"),
        ),
    ):
        yield
