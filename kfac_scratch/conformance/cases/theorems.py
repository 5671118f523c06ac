"""Why an expectation holds, in a sentence each: what a case's `theorem` refers to."""

THEOREMS = {
    "deep-linear": (
        "In a network without activations under squared error, the vectors sent backward are the "
        "same for all data, so that one of the two averaged factors is constant and the average of "
        "products is the product of averages."
    ),
    "deep-linear-positions": (
        "With a loss term per position, the vector of one term reaches one position only, and is "
        "the same for all data and positions: KFAC-expand is exact."
    ),
    "deep-linear-pooled": (
        "If positions are averaged or summed before the loss, all positions of a datum receive the "
        "same vector, so that only the sum of its inputs matters: KFAC-reduce is exact. "
        "KFAC-expand lacks the products of different positions."
    ),
    "after-the-pool": (
        "Behind the pool there is one position, where expand and reduce are the same thing, and "
        "exact under squared error."
    ),
    "one-datum": "With one datum and one position there is one term in the average.",
    "constant-hessian": (
        "If inputs differ by elements of the first weight's null space, every later activation, "
        "the output and the loss's Hessian are the same for all data: vectors are constant for the "
        "first layer, inputs for the others. This holds for any loss and any nonlinearity."
    ),
    "last-layer": (
        "Under squared error the vectors at the last layer are columns of a multiple of the "
        "identity, whatever network is before it."
    ),
    "bias": (
        "The input of a bias is 1 for all data, so the bias's block is the vectors' factor: exact "
        "for any network and loss, for KFAC-reduce with several positions, too."
    ),
    "invariant-convolutions": (
        "Before global average pooling, convolutions that treat all positions alike (1 x 1, or "
        "circular padding with stride 1) send the same vector to all positions: reduce is exact."
    ),
    "last-convolution": (
        "With squared error per location, or behind a global pool, the last convolution receives "
        "constant vectors, whatever its stride, padding, dilation and groups are."
    ),
    "repeated-use": (
        "The calls of one layer are its positions. If their results are added in a network without "
        "activations, all receive the same vector: reduce is exact."
    ),
    "operator-reduce": (
        "In a network without activations, the operator c (u + sum_i du/dx_i + Lap u) sends the "
        "same vector to all Taylor coefficients of a layer: KFAC-reduce over them is exact."
    ),
    "operator-expand": (
        "With coefficients of both signs from an orthogonal design, products of different Taylor "
        "coefficients cancel over the data: KFAC-expand over coefficients is exact, 1/S included."
    ),
    "definition": (
        "No theorem: KFAC is not exact here. What is expected is the definition, which this case "
        "tells from its neighbours."
    ),
    "expectation": (
        "Labels drawn from the model's distribution give gradients whose outer products average to "
        "the loss's Hessian; with M labels, each carries 1/sqrt(M)."
    ),
}
