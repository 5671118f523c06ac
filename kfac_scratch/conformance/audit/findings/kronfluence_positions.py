"""The strategy `kfac` is too small by the number of positions, layer by layer; `ekfac` is not.

Both covariances are means over data and positions, and `Kfac.prepare` multiplies their
eigenvalues. Of S positions, the gradients of S terms add up in a datum's gradient, so that one of
the two must be a sum over positions (KFC's equation 32; in tensorflow/kfac this is
`_renorm_coeff`). `ekfac` squares gradients of data, and has the right scale. On a network without
activations under squared error, both are exact for a layer that is applied to several positions.
The GGN by a loss that is linear in the output:

```python
import torch
from kronfluence.analyzer import prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.factor.covariance import fit_covariance_matrices_with_loader as covariances
from kronfluence.factor.eigen import fit_lambda_matrices_with_loader as lambdas
from kronfluence.factor.eigen import perform_eigendecomposition
from kronfluence.task import Task
from kronfluence.utils.state import State
from torch import nn

class GGN(Task):
    def compute_train_loss(self, batch, model, sample=False):
        X, v = batch
        return (v * model(X)).sum()

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

for S in (1, 3):
    torch.manual_seed(0)
    task, state = GGN(), State(cpu=True)
    model = prepare_model(nn.Sequential(nn.Linear(2, 2)), task)
    X = torch.randn(7, S, 2).repeat(2 * S, 1, 1)  # each position and class has its own vector
    v = torch.eye(2 * S).reshape(2 * S, S, 2).repeat_interleave(7, 0)
    inputs = (model, state, task, [(X, v)], FactorArguments(use_empirical_fisher=True))
    C = covariances(*inputs, disable_tqdm=True)[1]
    Q = perform_eigendecomposition(C, model, state, inputs[-1], disable_tqdm=True)
    L = lambdas(*inputs, eigen_factors=Q, disable_tqdm=True)[1]
    kfac = Q["activation_eigenvalues"]["0"].sum() * Q["gradient_eigenvalues"]["0"].sum()
    ekfac = L["lambda_matrix"]["0"].sum() / L["num_lambda_processed"]["0"]
    print(f"S = {S}: trace of ekfac / trace of kfac = {(ekfac / kfac).item():.4f}")
# prints
#   S = 1: trace of ekfac / trace of kfac = 1.0000
#   S = 3: trace of ekfac / trace of kfac = 3.0000
```

Expected: 1 for both. The default damping is relative to a layer's own mean eigenvalue, so that the
scale cancels within a layer; between layers with different numbers of positions it does not, and
convolutions or tokens are weighted by S against a classifier behind a pool. With a given damping,
it does not cancel at all.

Suggestion: divide the gradients' covariance by the number of data, which
`fit_covariance_matrices_with_loader` counts, instead of the number of rows. This is right with
masks and for layers that are used several times, too. `ekfac` needs only the eigenvectors, and
does not change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended
from kfac_scratch.conformance.cases.families import CASES as CATALOGUE

PATTERNS = (
    *("positions-*", "nd-positions-*", "mean-pooled-*", "sum-pooled-*", "tokens-*", "masked-*"),
    *(
        "attention-tokens-*",
        "attention-pooled-cross-entropy",
        "flattened-*",
        "used-*",
        "cnn-flat-*",
        "cnn-pooled-*",
    ),
    *(f"conv2d-{name}-p*" for name in ("plain", "stride", "padding", "dilation", "nobias")),
    *("1x1-convolutions-*", "class-weights-tokens", "sampled-tokens-*"),
)
LIBRARY, VERSION = "kronfluence", "1.0.1"
ADAPTER = "kfac_scratch.conformance.adapters.kronfluence:Adapter"
TITLE = "kfac, unlike ekfac, is too small by the number of positions"
CASES = tuple((case, "expand") for case in CATALOGUE if any(fnmatchcase(case, p) for p in PATTERNS))
CAUSE = (
    "kronfluence/module/linear.py, line 53, and kronfluence/module/conv2d.py, line 132, "
    "get_flattened_gradient: the number of rows (data times positions) is returned as the count "
    "by which the covariance of gradients is divided."
)
DOCUMENTED = (
    "'uncentered activation and pre-activation pseudo-gradient covariance matrices' "
    "(DOCUMENTATION.md); silent about the scale of several positions"
)
THREAD = "https://github.com/tensorflow/kfac/issues/41"
UPSTREAM = (
    "The thread of June 2020, which is closed, is about TensorFlow's KFAC: its factor of "
    "the inputs is a mean over positions, too, and a coefficient of the block makes up for it"
)


@contextmanager
def patch() -> Iterator[None]:
    """The gradients' covariance as a mean over data, and a sum over positions."""
    fitting = import_module("kronfluence.factor.covariance")
    count = "'num_gradient_covariance_processed'"
    data = f"dict.fromkeys(factor, num_data_processed) if factor_name == {count} else factor"
    counted = ("saved_factors[factor_name] = factor", f"saved_factors[factor_name] = {data}")
    with mended(fitting, "fit_covariance_matrices_with_loader", counted):
        yield
