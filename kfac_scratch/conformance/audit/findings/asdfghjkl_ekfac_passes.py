"""With several backward passes, the eigenvectors of the passes are added up.

`fisher_exact` runs one backward pass per class, and `fisher_mc` one per sample. Each pass has its
own eigenvectors `Ub`, and its own scale. `accumulate_result` adds them to those before: the sum of
orthogonal matrices is not orthogonal, and the tuple of the scale gets longer, of which `KFE.mvp`
reads the first pass. `EkfacGradientMaker` accepts `fisher_emp` alone, which has one pass;
`FisherConfig` accepts the others with the shape `kfe`, without a word:

```python
import torch
from asdl.fisher import FisherConfig, get_fisher_maker
from torch import nn

torch.manual_seed(0)
for kind in ("fisher_emp", "fisher_exact"):
    model, X = nn.Sequential(nn.Linear(3, 4, bias=False)).double(), torch.randn(5, 3).double()
    config = FisherConfig(kind, ["kfe"], loss_type="cross_entropy", data_size=5)
    maker = get_fisher_maker(model, config)
    output = maker.setup_model_call(model, X)
    maker.setup_loss_call(nn.CrossEntropyLoss(reduction="sum"), output, torch.zeros(5).long())
    maker.forward_and_backward()
    kfe = model[0].fisher.kfe
    print(kind, (kfe.Ua.T @ kfe.Ua).diagonal().round().tolist(), len(kfe.scale))
# prints
#   fisher_emp [1.0, 1.0, 1.0] 1
#   fisher_exact [16.0, 16.0, 16.0] 4
```

Expected: ones and 1 in both lines, or the error that `EkfacGradientMaker` raises. With four equal
passes, `Ua` is four times orthogonal; `Ub` is no multiple of an orthogonal matrix.

Suggestion: move the check of `EkfacGradientMaker` to `get_fisher_maker`; or keep the factors of
all passes, and take the eigenvectors once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "EKFAC adds up the eigenvectors of several backward passes"
CASES = (("mlp-mse-mean", "ekfac"), ("mlp-cross-entropy-mean", "ekfac"))
CAUSE = (
    "asdl/operations/operation.py, lines 304 to 307, backward_pre_process: Ua, Ub and the tuple of "
    "the scale are handed to accumulate_result, which adds."
)
DOCUMENTED = (
    "EkfacGradientMaker raises 'supports only fisher_emp'; FisherConfig is silent about the shape "
    "kfe with several passes"
)
THREAD = ""
BESIDE = ("asdfghjkl_ekfac_basis",)


@contextmanager
def patch() -> Iterator[None]:
    """Eigenvectors and scale of the rows of all passes."""
    operation = import_module("asdl.operations.operation").Operation
    first = "Ua = self.cov_kfe_A(module, in_data)"
    passes = (
        "passes = self.__dict__.setdefault('_passes', [])\n"
        "            passes.append((in_data, out_grads))\n"
        "            in_data, out_grads = (torch.cat(rows) for rows in zip(*passes))\n"
        "            self._op_results.pop(OP_COV_KFE, None)\n"
        f"            {first}"
    )
    scale = "self.cov_kfe_scale(module, in_data, out_grads, Ua, Ub, bias=bias)"
    total = f"tuple(s * len(passes) for s in {scale})"
    with mended(operation, "backward_pre_process", (first, passes), (scale, total)):
        yield
