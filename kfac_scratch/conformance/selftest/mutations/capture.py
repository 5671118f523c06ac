"""What hooks see: calls, copies, settings, names."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Flavour


def capture(name: str, before: str, after: str, case: str, flavour: Flavour = "expand") -> Mutant:
    """A mutant of `capture`."""
    return Mutant(name, before, after, (case, flavour))


MUTANTS = [
    capture(
        "an in-place activation writes over what was recorded",
        "return output.clone()  # the next",
        "return output  # the next",
        "one-datum-mse-relu-inplace-mean",
    ),
    capture(
        "the last call's inputs only",
        "return list(rows[0] if len(rows) == 1 else torch.cat(rows, dim=2))",
        "return list(rows[-1].repeat(1, 1, len(rows), 1))",
        "used-in-a-row-mse",
    ),
    capture(
        "the last call's vectors only",
        "return rows[0] if len(rows) == 1 else torch.cat(rows, dim=3)",
        "return torch.cat([0 * row for row in rows[:-1]] + rows[-1:], dim=3)",
        "used-in-a-row-mse",
    ),
    capture(
        "calls in another order for vectors",
        "for c, g in zip(calls, gs, strict=True)]\n    return rows[0]",
        "for c, g in zip(calls, gs, strict=True)][::-1]\n    return rows[0]",
        "ekfac-used-in-a-row-mse",
        "ekfac",
    ),
    capture(
        "vectors averaged in KFAC-reduce",
        "c.vectors(g).sum(3, keepdim=True, dtype",
        "c.vectors(g).mean(3, keepdim=True, dtype",
        "mean-pooled-mse-mean-bias",
        "reduce",
    ),
    capture(
        "the sum over calls of the same vector",
        "return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)",
        "return sums[0]",
        "used-in-a-row-mse",
        "reduce",
    ),
    capture(
        "calls averaged without their numbers of positions",
        "return list(torch.stack(sums).sum(0) / sum(counts))",
        "return list(torch.stack(sums).sum(0) / len(counts) ** 2)",
        "used-in-a-row-mse",
        "reduce",
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
        "ends = row.new_tensor(group.bias_inputs(call.layer)).expand(*row.shape[:-1], -1)",
        "ends = 0 * row.new_tensor(group.bias_inputs(call.layer)).expand(*row.shape[:-1], -1)",
        "pooled-bias-mse",
        "reduce",
    ),
    capture(
        "the bias before the weights",
        "means.append(torch.cat([row, ends] if",
        "means.append(torch.cat([ends, row] if",
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
        'return [float(bias is layer._parameters.get("bias")) for bias in self.biases.values()]',
        "return [0.0 for bias in self.biases.values()]",
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
        "torch.cat([io.a for io in ios]), torch.cat(g, dim=1), max",
        "torch.cat([io.a for io in ios]), torch.cat(g[::-1], dim=1), max",
        ("batches-unequal-ekfac", "ekfac"),
    ),
]
