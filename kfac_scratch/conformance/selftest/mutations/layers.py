"""What a layer's matrix multiplies: geometry, groups, biases."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Flavour


def layers(name: str, before: str, after: str, case: str, flavour: Flavour = "expand") -> Mutant:
    """A mutant of `layers`."""
    return Mutant(name, before, after, (case, flavour))


MUTANTS = [
    layers(
        "stride ignored",
        "dilation * (k - 1) + 1, stride)[..., ::dilation]",
        "dilation * (k - 1) + 1, 1)[..., ::dilation]",
        "conv2d-stride-per-location-mse-mean",
    ),
    layers(
        "dilation ignored",
        "x.unfold(axis, dilation * (k - 1) + 1, stride)[..., ::dilation]",
        "x.unfold(axis, dilation * (k - 1) + 1, stride)[..., :k]",
        "conv2d-dilation-per-location-mse-mean",
    ),
    layers(
        "dilation ignored in averages",
        "start = dilation * torch.arange(k, device=x.device)",
        "start = torch.arange(k, device=x.device)",
        "conv2d-dilation-pooled-mse",
        "reduce",
    ),
    layers(
        "stride ignored in averages",
        "index = start + stride * torch.arange(",
        "index = start + torch.arange(",
        "conv2d-stride-pooled-mse",
        "reduce",
    ),
    layers(
        "padding ignored",
        "    if not any(amounts):\n        return x\n",
        "    if any(amounts):\n        return x\n",
        "conv2d-padding-pooled-mse",
    ),
    layers(
        "the larger half of an odd padding in front",
        "sides = [(total // 2, total - total // 2) for total in totals]",
        "sides = [(total - total // 2, total // 2) for total in totals]",
        "conv2d-same-per-location-mse",
    ),
    layers(
        "a word that occurs twice counted once",
        "ones.new_zeros(len(x), layer.num_embeddings).scatter_add_(1, tokens, ones)",
        "ones.new_zeros(len(x), layer.num_embeddings).scatter_(1, tokens, ones)",
        "embedding-pooled-mse",
        "reduce",
    ),
    layers(
        "padding on the other axis",
        "for pair in reversed(sides) for side in pair",
        "for pair in [(0, 0), *sides] for side in pair",
        "conv2d-padding-pooled-mse",
    ),
    layers(
        "channels of the wrong group",
        "return x.permute(1, 0, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))",
        "return x.flip(1).permute(1, 0, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))",
        "conv2d-groups-per-location-mse",
    ),
    layers(
        "groups interleaved",
        "x = x.unflatten(1, (layer.groups, -1))  #",
        "x = x.unflatten(1, (-1, layer.groups)).transpose(1, 2)  #",
        "conv2d-groups-per-location-mse",
    ),
    layers(
        "groups interleaved in averages",
        "rows = x.reshape(len(x), layer.groups, -1).movedim(1, 0)",
        "rows = x.reshape(len(x), -1, layer.groups).movedim(2, 0)",
        "conv1d-groups-pooled-mse",
        "reduce",
    ),
    layers(
        "groups interleaved at the output",
        "g = g.reshape(V, N, layer.groups, g.shape[2] // layer.groups, -1)",
        "g = g.reshape(V, N, -1, layer.groups, g[0, 0, 0].numel()).transpose(2, 3)",
        "cnn-groups-mse",
    ),
    layers(
        "a transpose missing for convolutions",
        "return g.permute(2, 0, 1, 4, 3)",
        "return g.permute(2, 0, 1, 3, 4).reshape(g.permute(2, 0, 1, 4, 3).shape)",
        "cnn-flat-mse",
    ),
    layers(
        "kernel before channels in a patch",
        "return x.permute(1, 0, 2, *range(3 + dims, 3 + 2 * dims), *range(3, 3 + dims))",
        "return x.permute(1, 0, *range(3 + dims, 3 + 2 * dims), 2, *range(3, 3 + dims))",
        "one-patch-mse",
    ),
    layers(
        "zeros for the input of a convolution's bias",
        "columns[:, :, d:] = x.new_tensor(ends).unsqueeze(-1)",
        "columns[:, :, d:] = 0",
        "conv2d-plain-per-location-mse-mean",
    ),
    layers(
        "zeros for the input of a linear layer's bias",
        "columns = rows.new_ones(*rows.shape[:-1], len(ends))",
        "columns = rows.new_zeros(*rows.shape[:-1], len(ends))",
        "bias-mse-mean",
    ),
    layers(
        "the bias's input as large as the layer",
        "columns = rows.new_ones(*rows.shape[:-1], len(ends))",
        "columns = rows.shape[-1] * rows.new_ones(*rows.shape[:-1], len(ends))",
        "bias-cross-entropy-sum",
    ),
    layers(
        "float32 buffers in a float64 model",
        "return torch.cat([rows, columns], dim=-1)",
        "return torch.cat([rows.float(), columns.float()], dim=-1)",
        "attention-tokens-mse",
    ),
    layers(
        "positions averaged by the wrong number",
        "x = torch.tensordot(x, pattern / positions, dims=([2], [0]))",
        "x = torch.tensordot(x, pattern / size, dims=([2], [0]))",
        "conv2d-plain-pooled-mse",
        "reduce",
    ),
    layers(
        "a sum over positions for their mean",
        "return rows if rows.shape[2] == 1 else rows.mean(2, keepdim=True)",
        "return rows if rows.shape[2] == 1 else rows.sum(2, keepdim=True)",
        "mean-pooled-mse-mean-bias",
        "reduce",
    ),
]
