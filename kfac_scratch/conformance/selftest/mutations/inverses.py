"""Damped inverses."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Flavour

INVERSE = "return M.inverse_of_damped_factors(root * pi, root / pi)"
EXACT, FACTORED = "inverse-exact-0.25-mlp", "inverse-factored-0.25-mlp"


def damping(name: str, before: str, after: str) -> Mutant:
    """A mutant of `damping`."""
    return Mutant(name, before, after, (FACTORED, "expand"))


def matrices(name: str, before: str, after: str, case: str, flavour: Flavour = "expand") -> Mutant:
    """A mutant of `matrices`."""
    return Mutant(name, before, after, (case, flavour))


MUTANTS = [
    damping(
        "pi squared",
        "return torch.where(usable, ratio, torch.ones_like(ratio)).sqrt()",
        "return torch.where(usable, ratio, torch.ones_like(ratio))",
    ),
    damping("pi upside down", "ratio = mean_A / mean_B", "ratio = mean_B / mean_A"),
    damping(
        "traces for means",
        "return self.A.diagonal().mean(), self.B.diagonal().mean()",
        "return self.A.trace(), self.B.trace()",
    ),
    damping("no pi", INVERSE, INVERSE.replace("root * pi", "root").replace("root / pi", "root")),
    damping(
        "the damping for its root",
        "float(balance(M)), damping**0.5\n    return M.inverse",
        "float(balance(M)), damping\n    return M.inverse",
    ),
    damping("pi on the same side twice", INVERSE, INVERSE.replace("root / pi", "root * pi")),
    damping("one factor not damped", INVERSE, INVERSE.replace("(root * pi", "(0.0")),
    matrices(
        "damping stored in place",
        INVERSE,
        "M.A.diagonal().add_(root * pi)\n    " + INVERSE,
        "inverse-factored-0.01-mlp",  # twice the root of 0.25 is 1, as if it were missing
    ),
    matrices(
        "the damping twice",
        "return 1 / (eigenvalues + damping)",
        "return 1 / (eigenvalues + 2 * damping)",
        EXACT,
    ),
    matrices(
        "no damping",
        "return 1 / (eigenvalues + damping)",
        "return 1 / (eigenvalues + 1e-12)",
        EXACT,
    ),
    matrices(
        "the damping subtracted",
        "return 1 / (eigenvalues + damping)",
        "return 1 / (eigenvalues - damping)",
        EXACT,
    ),
    matrices(
        "the root of the inverse",
        "return 1 / (eigenvalues + damping)",
        "return (eigenvalues + damping).rsqrt()",
        EXACT,
    ),
    matrices(
        "factors damped for eigenvalues",
        "return KroneckerEigen(QA, QB, torch.outer(b, a))",
        "return KroneckerEigen(QA, QB, torch.outer(b + 0.1, a + 0.1))",
        EXACT,
    ),
    matrices(
        "sums of eigenvalues for products",
        "return KroneckerEigen(QA, QB, torch.outer(b, a))",
        "return KroneckerEigen(QA, QB, b.unsqueeze(1) + a)",
        EXACT,
    ),
    matrices(
        "factors exchanged in a product",
        "return self.B @ V @ self.A.mT\n",
        "return (self.B @ V @ self.A.mT).flip(-1)\n",
        FACTORED,
    ),
    matrices(
        "the inverse of half a Cholesky factor",
        "return Dense(torch.cholesky_inverse(L))",
        "return Dense(torch.cholesky_inverse(L.mT))",
        FACTORED,
    ),
    Mutant(
        "eigenvectors transposed in a product",
        "return QB @ (scale * (QB.mT @ V @ QA)) @ QA.mT",
        "return QB.mT @ (scale * (QB @ V @ QA.mT)) @ QA",
        (EXACT, "expand"),
    ),
    Mutant(
        "rotated and not rotated back",
        "return QB @ (scale * (QB.mT @ V @ QA)) @ QA.mT",
        "return scale * (QB.mT @ V @ QA)",
        (EXACT, "ekfac"),
    ),
    Mutant(
        "small eigenvalues set to zero",
        "return eigenvalues.where(eigenvalues > unit.tiny, 0.0)",
        "return eigenvalues.where(eigenvalues > 0.1 * eigenvalues.max(), 0.0)",
        (EXACT, "expand"),
    ),
]
