"""What is recorded: calls, settings, names."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Flavour


def capture(name: str, before: str, after: str, case: str, flavour: Flavour = "expand") -> Mutant:
    """A mutant of `capture`."""
    return Mutant(name, before, after, (case, flavour))


MUTANTS = [
    capture(
        "settings in another order",
        "each(stride), around",
        "each(dilation), around",
        "conv2d-stride-per-location-mse-mean",
    ),
    capture(
        "padding that the function does not get",
        "around = padding if isinstance(padding, str) else each(padding)",
        "around = each(0)",
        "conv2d-padding-per-location-mse-mean",
    ),
    capture(
        "a bias that is not seen",
        "return name if part else None",
        "return None",
        "bias-cross-entropy-mean",
    ),
    capture(
        "the first matrix of a group alone",
        "return group, range(number, number + rows.index(total) + 1)",
        "return group, range(number, number + 1)",
        "conv2d-groups-per-location-mse",
    ),
    capture(
        "vectors of another call",
        "at_calls = [_or_zeros(None if c.edge is None else next(grads), c.z, stack) for c in calls]",
        "at_calls = [_or_zeros(None if c.edge is None else next(grads), c.z, stack) for c in calls][::-1]",
        "used-in-a-row-mse",
    ),
    capture(
        "the last call's inputs only",
        "return [_joined(of_matrix, 1) for",
        "return [of_matrix[-1].repeat(1, len(of_matrix), 1) for",
        "used-in-a-row-mse",
    ),
    capture(
        "the last call's vectors only",
        "return [_joined(of_matrix, 2) for",
        "return [torch.cat([0 * row for row in of_matrix[:-1]] + of_matrix[-1:], dim=2) for",
        "used-in-a-row-mse",
    ),
    capture(
        "calls in another order for vectors",
        "rows = [c.vectors(g).unbind() for c, g in zip(calls, gs, strict=True)]",
        "rows = [c.vectors(g).unbind() for c, g in zip(calls, gs, strict=True)][::-1]",
        "ekfac-used-in-a-row-mse",
        "ekfac",
    ),
    capture(
        "vectors averaged in KFAC-reduce",
        "else g.sum(3, keepdim=True, dtype",
        "else g.mean(3, keepdim=True, dtype",
        "mean-pooled-mse-mean-bias",
        "reduce",
    ),
    capture(
        "the sum over calls of the same vector",
        "of_matrix[0] if len(of_matrix) == 1 else torch.stack(of_matrix).sum(0)",
        "of_matrix[0]",
        "used-in-a-row-mse",
        "reduce",
    ),
    capture(
        "calls averaged without their numbers of positions",
        "return total / sum(S for _, S in parts)",
        "return total / len(parts) ** 2",
        "used-in-a-row-mse",
        "reduce",
    ),
    capture(
        "the mean of means of calls at different numbers of positions",
        "return total / sum(S for _, S in parts)",
        "return torch.stack([mean for mean, _ in parts]).mean(0)",
        "used-at-other-positions-mse",
        "reduce",
    ),
    capture(
        "queries and keys exchanged",
        'return [f"{prefix}{x}_proj" for x in "qkv"]',
        'return [f"{prefix}{x}_proj" for x in "kqv"]',
        "multihead-tokens-cross-entropy",
    ),
    capture(
        "expand for reduce",
        "REDUCE = Flavour(_averaged_inputs, _summed_outputs, _all_positions)",
        "REDUCE = EXPAND",
        "sum-pooled-mse-mean-bias",
        "reduce",
    ),
    capture(
        "no bias column in averages",
        "row = _of_trainable(group, with_ends(row, group.bias_inputs(call.bias)))",
        "row = _of_trainable(group, with_ends(row, [0.0 for _ in group.biases]))",
        "pooled-bias-mse",
        "reduce",
    ),
    capture(
        "the bias before the weights",
        "row = _of_trainable(group, with_ends(row, group.bias_inputs(call.bias)))",
        "row = with_ends(row, group.bias_inputs(call.bias)).roll(len(group.biases), -1)",
        "deep-linear-mse-mean-bias",
        "reduce",
    ),
    capture(
        "one vector alone",
        "vectors = fisher(loss, at_least_float32(f), y)",
        "vectors = fisher(loss, at_least_float32(f), y)[:1]",
        "mlp-bce-sum",
    ),
    capture(
        "vectors of a softmaxed output",
        "vectors = fisher(loss, at_least_float32(f), y)",
        "vectors = fisher(loss, at_least_float32(f).softmax(1), y)",
        "mlp-cross-entropy-sum",
    ),
    Mutant(
        "biases of frozen columns",
        "return [float(bias == name) for name in self.biases]",
        "return [0.0 for name in self.biases]",
        ("bias-cross-entropy-mean", "expand"),
    ),
    Mutant(
        "the mean of the vectors in the reduced view",
        "self.g.sum(2, keepdim=True), S)",
        "self.g.mean(2, keepdim=True), S)",
        ("operator-reduce-1d-sum", "reduce"),
    ),
    Mutant(
        "the sum of the inputs in the reduced view",
        "LayerIO(self.a.mean(1, keepdim=True)",
        "LayerIO(self.a.sum(1, keepdim=True)",
        ("operator-reduce-2d-mean", "reduce"),
    ),
    Mutant(
        "vectors of mini-batches joined in another order than their inputs",
        "torch.cat([io.a for io in ios]), torch.cat(g, dim=1), S, counted",
        "torch.cat([io.a for io in ios]), torch.cat(g[::-1], dim=1), S, counted",
        ("batches-unequal-ekfac", "ekfac"),
    ),
]
