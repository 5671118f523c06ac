"""What the tensors and fields of `kfac-vectors/1` mean: copied into every manifest."""

VECTORS_FORMAT = "kfac-vectors/1"
CONVENTIONS = {
    "op": (
        "Operations run in order. `inputs` are places in this list, -1 is X. Two operations of "
        "one name share parameters. linear: W x + b on the last axis. conv: over the axes behind "
        "the channels (axis 1), as PyTorch defines it; padding_mode zeros, circular, reflect or "
        "replicate; padding `same` gives as many results as inputs, with dilation * (k - 1) "
        "entries around, of an odd number the larger half behind. relu (inplace is a trap for "
        "hooks only), tanh, sigmoid: each entry. flatten: all axes behind the batch as one. "
        "mean-positions, sum-positions: over all axes between the batch and the last. mean-space: "
        "mean over all axes behind the channels. classes-first: the last axis moves to place 1. "
        "mask: axis 1 times `kept`. add: sum of two. attention: softmax(q k^T / sqrt(d)) v of "
        "three results, over axis 1. multihead: the same for each of `heads` shares of the last "
        "axis; the layers around it are those of one module, `name`. embedding: row x of the "
        "weight, W being its transpose. tied-linear: the weight of the embedding `words`, applied "
        "to the last axis; KFAC of that layer is the sum over both uses, the second one turned. "
        "transpose: axis 1 and the last are exchanged. layer-norm: "
        "over the last axis, group-norm: over `groups` of channels (axis 1) with what is behind "
        "them, (x - mean) / sqrt(variance + eps) times weight plus bias; batch-norm: the same "
        "with the given `mean` and `variance` of each channel. Norms have no blocks."
    ),
    "loss": (
        "As PyTorch defines them. D is what the sum of terms is divided by: 1 for sum; for mean, "
        "the number of target entries (mse, bce), or the sum of the targets' class weights "
        "without ignored targets (-100; cross-entropy, classes on axis 1). `weight` is the class "
        "weights of cross-entropy or pos_weight of bce, `entry_weight` what PyTorch calls weight "
        "of bce. mse has no factor 1/2. Targets of cross-entropy may be probabilities, of the "
        "outputs' shape: then D is the number of data."
    ),
    "operator": (
        "If true, the loss does not see u = network(x) but c_0 u + sum_i c_i du/dx_i + "
        "c_(d+1) Laplacian(u), with each datum's row of `coefficients`. The network is applied to "
        "d + 2 Taylor coefficients (u, du/dx_i, Laplacian), which are the layers' positions."
    ),
    "W": (
        "A layer's matrix: weight flattened to [d_out, rest] with the bias as its last column; for "
        "a grouped convolution one matrix per group."
    ),
    "block": (
        "[groups, D, D] with D = d_out * columns of W: rows of W behind each other, so entry "
        "(o, i) is number o * columns + i. With part `bias`: the bias's entries alone, "
        "[groups, d_out, d_out]. With damping: the damped inverse times `gradient`, [groups, D]."
    ),
    "equals-ggn": "J_W^T H J_W, with H the loss's Hessian by the outputs, of all data.",
    "definition": (
        "expand: B (x) A with A = mean over data and positions of a a^T, a a layer's input with a "
        "1 for the bias, and B = sum over data and positions of J^T H J, J the derivative of a "
        "datum's outputs by the layer's result there. reduce: a averaged and J summed over "
        "positions first. Calls of one layer are its positions, one behind the other. ekfac: in "
        "the basis of expand's eigenvectors, the diagonal of the exact block."
    ),
    "fisher": (
        "type2: H is the loss's Hessian. empirical: H is, for every datum, g g^T / D, with g the "
        "gradient by its outputs of the sum of the loss's terms."
    ),
    "masked": (
        "If true, positions whose targets are ignored (-100) are padding: the means of a a^T and, "
        "for reduce, of a are over the other positions, in layers with as many as the targets."
    ),
    "batches": "Sizes of the mini-batches. The curvature is that of the loss over all data.",
    "damping": (
        "exact: block + value * identity. factored: (B + sqrt(value) / pi) (x) "
        "(A + sqrt(value) pi), pi^2 = (trace A / columns) / (trace B / d_out)."
    ),
    "parameters/NAME": "By name: layer.weight, layer.bias.",
    "X, y, coefficients": "Inputs, targets, and for an operator its coefficients.",
    "outputs": "What the loss sees.",
    "loss_hessian": (
        "[N, F, F], H of every datum; F counts its outputs in order. Where it is a multiple of the "
        "identity, the tensor is absent and the manifest's `loss_hessian` is the number."
    ),
    "cotangents/LAYER": (
        "[N, F, groups, S, d_out], the derivative of a datum's outputs by the layer's result. "
        "Absent for operators, and where the result is the output."
    ),
    "factors/FLAVOUR/LAYER/A or B": "[groups, columns, columns] and [groups, d_out, d_out].",
    "expected/ggn/LAYER": "What every flavour that is `equals-ggn` must be.",
    "expected/FLAVOUR/LAYER": "What a flavour must be that is neither exact nor B (x) A.",
    "gradient/NAME": "With damping: the loss's gradient by parameter.",
    "stored": (
        "Where a flavour's expectation is: `expected/...` followed by the layer, or `factors/...`: "
        "then it is B (x) A, entry (o i, p j) = B[o, p] A[i, j]."
    ),
    "rounding": (
        "Inputs, targets and parameters are exact. What is computed is rounded by at most 4e-12 "
        "of a tensor's largest entry, so that files are the same wherever they are made."
    ),
    "results": (
        "Write results/ID.safetensors in float64 with a tensor FLAVOUR/LAYER per judged layer, in "
        "the layout of `block`; and results/about.json: name, version, not_supported (reasons by "
        "pattern of ID or ID/FLAVOUR), scales (by pattern of ID/FLAVOUR/LAYER, by what the "
        "documentation says that results exceed these; null if it is silent; 1 if absent)."
    ),
}
