"""A weight that an embedding and a linear layer have in common."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant

MUTANTS = [
    Mutant(
        "the embedding's use is lost",
        "first, biases = Kronecker(direct.A, direct.B), len(direct.A) - len(turned.B)",
        "first, biases = Kronecker(direct.A, direct.B), len(direct.A) - len(turned.B)\n"
        "    turned = type(direct)(0 * turned.A, turned.B)",
        ("tied-head-tokens-cross-entropy", "expand"),
    ),
    Mutant(
        "the embedding counted in the first batch alone",
        "self.add(before.direct, io.direct), self.add(before.turned, io.turned)",
        "self.add(before.direct, io.direct), before.turned or self.add(None, io.turned)",
        ("tied-head-in-batches", "expand"),
    ),
]
