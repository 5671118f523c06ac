"""The exact Fisher of categorical logits with several positions has vectors at the wrong positions.

`register_softmax_cross_entropy_loss` takes logits as "an ND array of floats". For a label per
position, a column of the Fisher's square root belongs to one position and class, and is zero at
all other positions. `multiply_fisher_factor_replicated_one_hot_unweighted` puts the root of the
probability at that place, but then subtracts the probabilities of all positions times it. So
`fisher_exact` and `ggn_exact` are wrong as soon as logits have more than two axes. One datum, two
positions with equal logits for two classes:

```python
import jax, jax.numpy as jnp, kfac_jax, numpy as np

logits = jnp.zeros((1, 2, 2))
loss = kfac_jax.CategoricalLogitsNegativeLogProbLoss(logits)
columns = [
    loss.multiply_ggn_factor_replicated_one_hot(index)[0].ravel()
    for index in np.ndindex(2, 2)
]
S = jnp.stack(columns, 1)
print(S @ S.T)
print(jax.hessian(lambda f: jax.nn.logsumexp(f.reshape(1, 2, 2), -1).sum())(logits.ravel()))
# prints
#   [[ 4.9999997e-01  3.1720129e-09  3.1720129e-09  4.2785677e-09]
#    [ 3.1720129e-09  4.9999997e-01 -4.2785677e-09 -3.1720129e-09]
#    [ 3.1720129e-09 -4.2785677e-09  4.9999997e-01 -3.1720129e-09]
#    [ 4.2785677e-09 -3.1720129e-09 -3.1720129e-09  4.9999997e-01]]
#   [[ 0.25 -0.25  0.    0.  ]
#    [-0.25  0.25  0.    0.  ]
#    [ 0.    0.    0.25 -0.25]
#    [ 0.    0.   -0.25  0.25]]
```

Expected: twice the same, the loss's Hessian.

Suggestion: subtract `probs * sqrt_probs_slice` at the positions `index[:-1]` only. The patch that
proves this finding mends `kfac_jax_masked_bias` as well, because its cases need both.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-jax", "0.0.8"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_jax:Adapter"
TITLE = "Exact Fisher of cross-entropy: a position's vector reaches other positions"
CASES = (
    ("tokens-cross-entropy-all-mean", "expand"),
    ("tokens-cross-entropy-all-sum", "expand"),
)
CAUSE = (
    "kfac_jax/_src/loss_functions.py, line 1055, "
    "CategoricalLogitsNegativeLogProbLoss.multiply_fisher_factor_replicated_one_hot_unweighted: "
    "probs of all positions are subtracted."
)
DOCUMENTED = "'The input logits of the loss as an ND array of floats'"
THREAD = ""
WITH = ("kfac_jax_masked_bias",)


@contextmanager
def patch() -> Iterator[None]:
    """Subtract at the column's own position."""
    losses = import_module("kfac_jax._src.loss_functions")
    blocks = import_module("kfac_jax._src.curvature_blocks.kronecker_factored")
    update = blocks.RepeatedDenseKroneckerFactored.update_curvature_matrix_estimate
    bias = import_module(f"{__name__.rpartition('.')[0]}.kfac_jax_masked_bias")
    also = nullcontext() if hasattr(update, "mended_source") else bias.patch()
    old = "return (padded_slice - probs * sqrt_probs_slice,)"
    new = (
        "at = (slice(None),) + index[:-1]\n"
        "  own = probs[at] * self._sqrt_probs[(slice(None),) + index][:, None]\n"
        "  return (padded_slice - jnp.zeros_like(probs).at[at].set(own),)"
    )
    owner = losses.CategoricalLogitsNegativeLogProbLoss
    name = "multiply_fisher_factor_replicated_one_hot_unweighted"
    with also, mended(owner, name, (old, new)):
        yield
