"""Masks of the positions that are part of the data."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant

MUTANTS = [
    Mutant(
        "means over all rows, zeros included",
        "return self.counted.sum().clamp(min=1).to(self.a.dtype)",
        "return self.a.shape[0] * self.a.shape[1]",
        ("padded-sentences-cross-entropy", "expand"),
    ),
    Mutant(
        "means of a sample over all its positions",
        "return a.sum(1, keepdim=True) / numbers.clamp(min=1).unsqueeze(-1), numbers > 0",
        "return a.mean(1, keepdim=True), numbers > 0",
        ("padded-sentences-cross-entropy", "reduce"),
    ),
    Mutant(
        "rows of batches counted as if none were padding",
        "state.rows + io.rows)",
        "state.rows + io.a.shape[0] * io.a.shape[1])",
        ("padded-sentences-in-batches", "expand"),
    ),
]
