"""KFAC ignores the dilation of a convolution's kernel.

A 2d convolution with `rhs_dilation` is registered automatically as `conv2d`, and its block
computes the input factor from patches of neighbouring pixels, and its scale from the number of
locations that a kernel without dilation has. `patches_moments` says that it "does not support
dilation" and would refuse it, but is not told. A mean over all locations, one datum: the GGN of
one output channel is the outer product of the mean patch, up to a factor.

```python
import jax, jax.numpy as jnp, kfac_jax

jax.config.update("jax_enable_x64", True)
key = jax.random.PRNGKey(0)
X = jnp.zeros((1, 5, 5, 1)).at[0, :, ::2, 0].set(1.0)  # every other column of the image is one

for dilation in (1, 2):
    def func(w, X, dilation=dilation):
        f = jax.lax.conv_general_dilated(
            X, w, (1, 1), "VALID", rhs_dilation=(dilation,) * 2,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        kfac_jax.register_squared_error_loss(f)
        return jnp.sum(f)

    w = jnp.zeros((2, 2, 1, 1))
    estimator = kfac_jax.BlockDiagonalCurvature(func, default_estimation_mode="ggn_exact")
    state = estimator.init(key, (w, X), None, None)
    state = estimator.update_curvature_matrix_estimate(
        state, 0.0, 1.0, 0.0, batch_size=1, rng=key, func_args=(w, X)
    )
    print(dilation, type(estimator.blocks[0]).__name__)
    print(state.blocks_states[0].factors[0].value)
# prints
#   1 Conv2DTwoKroneckerFactored
#   [[0.5 0.  0.5 0. ]
#    [0.  0.5 0.  0.5]
#    [0.5 0.  0.5 0. ]
#    [0.  0.5 0.  0.5]]
#   2 Conv2DTwoKroneckerFactored
#   [[0.5 0.  0.5 0. ]
#    [0.  0.5 0.  0.5]
#    [0.5 0.  0.5 0. ]
#    [0.  0.5 0.  0.5]]
```

Expected: with a dilation of 2, the two columns of a patch are equal, so that all entries of the
factor are; the 3x3 locations alternate between ones and zeros, 2/3 of them ones.

Suggestion: hand `rhs_dilation` to `patches_moments`, so that it refuses; or register such
convolutions with a generic block, as grouped ones are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from kfac_scratch.conformance.audit.mending import mended

LIBRARY, VERSION = "kfac-jax", "0.0.8"
ADAPTER = "kfac_scratch.conformance.adapters.kfac_jax:Adapter"
TITLE = "The dilation of a convolution is ignored"
CASES = (
    ("conv2d-dilation-per-location-mse-mean", "expand"),
    ("conv2d-dilation-pooled-mse", "expand"),
)
CAUSE = (
    "kfac_jax/_src/curvature_blocks/kronecker_factored.py, line 649, compute_inputs_stats, and "
    "line 612, num_locations: strides and padding of the layer are used, rhs_dilation is not."
)
DOCUMENTED = (
    "'Currently, patches_moments does not support dilation' (its docstring, of an argument)"
)
THREAD = ""


def extent(block: Any) -> tuple[int, ...]:
    """The sizes of a dilated kernel with its holes."""
    dilation = block._layer_tag_eq.params["rhs_dilation"]
    return tuple(
        (k - 1) * d + 1 for k, d in zip(block.weights_spatial_shape, dilation, strict=True)
    )


@contextmanager
def patch() -> Iterator[None]:
    """Moments of patches with the holes, of which those of the kernel are kept."""
    kronecker = import_module("kfac_jax._src.curvature_blocks.kronecker_factored")
    block = kronecker.Conv2DTwoKroneckerFactored
    before = vars(block)["num_locations"]

    def locations(self: Any) -> int:
        params = self._layer_tag_eq.params
        shape, strides = self.inputs_spatial_shape, params["window_strides"]
        return kronecker.psm.num_conv_locations(shape, extent(self), strides, params["padding"])

    wide = ("kernel_spatial_shape=self.weights_spatial_shape", "kernel_spatial_shape=self.extent")
    sizes = "k, h, c = input_cov_v.shape"
    kept = (
        "u, v = self._layer_tag_eq.params['rhs_dilation']\n"
        "  input_cov_m = input_cov_m[::u, ::v, :, ::u, ::v]\n"
        "  input_cov_v = input_cov_v[::u, ::v]\n"
        f"  {sizes}"
    )
    block.extent, block.num_locations = property(extent), property(locations)
    try:
        with mended(block, "compute_inputs_stats", wide, (sizes, kept)):
            yield
    finally:
        block.num_locations = before
        del block.extent
