"""EKFAC goes into the eigenbasis and out of it with the same matrices.

Eigenvectors are the columns of `Ua` and `Ub` (they come from `torch.linalg.eigh`, and
`cov_kfe_scale` multiplies by them from the right). To solve with the EKFAC matrix, a gradient G is
taken to `Ub.T @ G @ Ua`, divided by the scale, and taken back by `Ub @ _ @ Ua.T`. `KFE.mvp` has
`Ub @ G @ Ua` both times. With a scale of ones, nothing should happen to G:

```python
import torch
from asdl.symmatrix import KFE

torch.manual_seed(0)
Ua, Ub = (torch.linalg.eigh(M @ M.T)[1] for M in (torch.randn(3, 3), torch.randn(2, 2)))
G = torch.randn(2, 3)
kfe = KFE(Ua.clone(), Ub.clone(), (torch.ones(2, 3), torch.ones(2)))
print(G)
print(kfe.mvp(G, eps=0.0))
# prints
#   tensor([[ 1.1006, -1.0712,  0.1227],
#           [-0.5663,  0.3731, -0.8920]])
#   tensor([[ 0.9266, -1.1252,  0.4993],
#           [-0.3026,  0.9684,  0.4757]])
```

Expected: twice the same. The bias goes the same way, `Ub.mv` twice, and `EkfacGradientMaker`
preconditions with these products.

Suggestion: `Ub.T.mm(vec_weight_2d).mm(Ua)` and `Ub.mm(vec_weight_2d_kfe).mm(Ua.T)`, and
`Ub.T.mv(vec_bias)` for the bias.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "asdfghjkl", "0.1a5"
ADAPTER = "kfac_scratch.conformance.adapters.asdfghjkl:Adapter"
TITLE = "Two transposes are missing where EKFAC solves"
CASES = (
    ("empirical-mlp-nobias-mse", "ekfac"),
    ("empirical-mlp-mse-mean", "ekfac"),
    ("empirical-mlp-cross-entropy-mean", "ekfac"),
)
CAUSE = (
    "asdl/symmatrix.py, lines 602 and 604, KFE.mvp: Ub from the left and Ua from the right, into "
    "the eigenbasis as well as out of it; lines 608 and 610 for the bias."
)
DOCUMENTED = "silent"
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """In by the transpose from the left, out by the transpose from the right; the bias, too."""
    kfe = import_module("asdl.symmatrix").KFE
    there = ("Ub.mm(vec_weight_2d).mm(Ua)", "Ub.T.mm(vec_weight_2d).mm(Ua)")
    back = ("Ub.mm(vec_weight_2d_kfe).mm(Ua)", "Ub.mm(vec_weight_2d_kfe).mm(Ua.T)")
    bias = ("Ub.mv(vec_bias)", "Ub.T.mv(vec_bias)")
    with mended(kfe, "mvp", there, back, bias):
        yield
