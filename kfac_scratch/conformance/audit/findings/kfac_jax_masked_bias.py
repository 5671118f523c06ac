"""Masked positions count in the bias's part of a repeated dense layer's input factor.

`RepeatedDenseKroneckerFactored` takes a position to be masked if its vectors `dy` are all zero,
sets its inputs to zero and does not count it. The column of ones for the bias is appended
afterwards, also for masked positions. So the factor's last row and column, and the block's entries
for the bias, are sums over all positions divided by the number of unmasked ones. With the
estimation modes `ggn_exact` and `fisher_exact` this happens without any masks: each pass has one
position's vectors, so that all other positions look masked, and the bias's block is too large by
the number of positions.

```python
import jax, jax.numpy as jnp, kfac_jax

jax.config.update("jax_enable_x64", True)
key = jax.random.PRNGKey(0)
params = {"w": jax.random.normal(key, (3, 2)), "b": jnp.zeros(2)}
X = jax.random.normal(key, (5, 7, 3))  # 5 data, 7 positions

def func(params, X):
    f = X @ params["w"] + params["b"]
    kfac_jax.register_squared_error_loss(f)
    return jnp.sum(f)

for mode in ("ggn_exact", "fisher_exact"):
    estimator = kfac_jax.BlockDiagonalCurvature(func, default_estimation_mode=mode)
    state = estimator.init(key, (params, X), None, None)
    state = estimator.update_curvature_matrix_estimate(
        state, 0.0, 1.0, 0.0, batch_size=5, rng=key, func_args=(params, X)
    )
    block, of_block = estimator.blocks[0], state.blocks_states[0]
    A, B = (factor.value for factor in of_block.factors)
    print(mode, "bias", float(block.scale(of_block, False) * A[-1, -1] * B[0, 0]))
# prints
#   ggn_exact bias 97.99999999999994
#   fisher_exact bias 97.99999999999994
```

Expected: 14, the second derivative of the loss, `sum(f**2) / 5`, by an output's bias: 2 · 7.

Suggestion: append `mask` instead of ones; or multiply by the mask after the ones are appended.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-jax", "0.0.8"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_jax:Adapter"
TITLE = "Masked positions count in the bias's column of ones"
CASES = (
    ("positions-mse-mean-bias", "expand"),
    ("positions-mse-sum-bias", "expand"),
)
CAUSE = (
    "kfac_jax/_src/curvature_blocks/kronecker_factored.py, line 556, "
    "RepeatedDenseKroneckerFactored.update_curvature_matrix_estimate: ones for all positions, "
    "where the inputs before have been multiplied by the mask."
)
DOCUMENTED = (
    "a comment in the code: 'we identify masked repeats by checking if all corresponding entries "
    "of dy are zero' and 'zero out corresponding elts of x'"
)
THREAD = ""


@contextmanager
def patch() -> Iterator[None]:
    """The mask as the bias's column."""
    blocks = import_module("kfac_jax._src.curvature_blocks.kronecker_factored")
    ones = "x_one = jnp.ones_like(x[:, :1])"
    masked = "x_one = mask.reshape(-1, 1) if self._use_masking else jnp.ones_like(x[:, :1])"
    owner = blocks.RepeatedDenseKroneckerFactored
    with mended(owner, "update_curvature_matrix_estimate", (ones, masked)):
        yield
