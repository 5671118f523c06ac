"""Differential operators: Taylor coefficients as positions."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Task

REDUCE: Task = ("operator-reduce-2d-mean", "reduce")
EXPAND: Task = ("operator-expand-2d-mean", "expand")

MUTANTS = [
    Mutant(
        "a bias that has derivatives",
        "bias[:, 0] = bias.new_tensor(",
        "bias[:] = bias.new_tensor(",
        REDUCE,
    ),
    Mutant(
        "no bias column for the value",
        "bias[:, 0] = bias.new_tensor(",
        "bias[:, :0] = bias.new_tensor(",
        REDUCE,
    ),
    Mutant(
        "residuals divided by N, not by its root",
        "yield part, (term.weight / N) ** 0.5",
        "yield part, term.weight / N",
        REDUCE,
    ),
    Mutant(
        "vectors without the residual's weight",
        "c, outputs, scale * slope, retain_graph",
        "c, outputs, slope, retain_graph",
        REDUCE,
    ),
    Mutant(
        "the value's slope alone",
        "torch.stack([zero if g is None else g for g in of_m], dim=1)",
        "torch.stack([of_m[0], *[zero] * (len(leaves) - 1)], dim=1)",
        REDUCE,
    ),
    Mutant(
        "a bias added to every derivative",
        "return _with(x, c if bias is None else c + _coefficients(bias, x))",
        "return _with(x, c if bias is None else c + bias)",
        REDUCE,
    ),
    Mutant(
        "second derivatives of the input",
        "X.new_zeros(N, len(self.C), d)], dim=1)",
        "X.new_ones(N, len(self.C), d)], dim=1)",
        REDUCE,
    ),
    Mutant(
        "directions exchanged with the value",
        "torch.cat([X.unsqueeze(1), V,",
        "torch.cat([V[:, :1], X.unsqueeze(1), V[:, 1:],",
        EXPAND,
    ),
    Mutant(
        "points in place of directions",
        "V = self.directions.to(X).expand(N, -1, d)",
        "V = X.unsqueeze(1).expand(N, len(self.directions), d)",
        REDUCE,
    ),
]
