"""What is averaged: factors, mini-batches, second moments, and the linear algebra below."""

from kfac_scratch.conformance.selftest.mutations.mutant import Mutant
from kfac_scratch.conformance.vocabulary import Flavour

FACTORS = "return Kronecker(gram(io.a).div_(io.rows), gram(io.g.flatten(0, 1)))"
SUMS = "return Kronecker(self.A.div_(self.rows), self.B.div_(divisor))"


def kfac(name: str, before: str, after: str, case: str, flavour: Flavour = "expand") -> Mutant:
    """A mutant of `kfac`."""
    return Mutant(name, before, after, (case, flavour))


def ekfac(name: str, before: str, after: str, case: str) -> Mutant:
    """A mutant of `ekfac`."""
    return Mutant(name, before, after, (case, "ekfac"))


MUTANTS = [
    kfac(
        "inputs divided by the data only",
        "RunningFactors(A, B, io.rows)",
        "RunningFactors(A, B, len(io.a))",
        "positions-mse-mean-bias",
    ),
    kfac(
        "Taylor coefficients not counted",
        FACTORS,
        FACTORS.replace("io.rows", "len(io.a)"),
        "operator-expand-2d-mean",
    ),
    kfac(
        "the square of the sum over data",
        "B = gram(io.g.flatten(0, 1))\n",
        "B = gram(io.g.sum(1))\n",
        "mlp-cross-entropy-sum",
    ),
    kfac(
        "the last mini-batch only",
        "B.add_(state.B), state.rows + io.rows",
        "B, state.rows + io.rows",
        "batches-unequal-cross-entropy-sum",
    ),
    kfac(
        "inputs of the first mini-batch only",
        "A.add_(state.A)",
        "2 * state.A",
        "batches-unequal-mse-mean",
    ),
    kfac(
        "rows of later mini-batches not counted",
        "B.add_(state.B), state.rows + io.rows",
        "B.add_(state.B), state.rows",
        "batches-unequal-mse-mean",
    ),
    kfac(
        "mini-batches with equal weights",
        "return ScaledVectors(vectors, here**0.5)",
        "return ScaledVectors(vectors, 3.5**0.5)",
        "batches-unequal-mse-mean",
    ),
    kfac(
        "each mini-batch divided by its own size",
        "        self.terms += here\n",
        "        self.terms = here\n",
        "batches-equal-mse-mean",
    ),
    kfac(
        "a sum divided like a mean, over mini-batches",
        'D = of_sum.terms if getattr(loss, "reduction", None) == "mean" else 1.0',
        "D = of_sum.terms or 1.0",
        "batches-equal-mse-sum",
    ),
    kfac(
        "the number of terms for its root",
        "return ScaledVectors(vectors, here**0.5)",
        "return ScaledVectors(vectors, here)",
        "mlp-cross-entropy-mean",
    ),
    kfac("factors exchanged in scale", SUMS, SUMS.replace(".div_(divisor)", ""), "mlp-mse-mean"),
    ekfac(
        "squares before the sum over positions",
        "moments += LayerIO(a, part).gradients().square().sum((0, 1))",
        'moments += torch.einsum("vnso,nsi->oi", part.square(), a.square())',
        "ekfac-flattened-mse",
    ),
    ekfac(
        "the square of the mean gradient",
        "return g.square().sum((0, 2)).T @ a.squeeze(1).square()",
        "return ((g.sum(2).transpose(1, 2) @ a.squeeze(1)).square()).sum(0)",
        "mlp-cross-entropy-sum",
    ),
    ekfac(
        "KFAC's own eigenvalues",
        "return rescaled(one_product(io).eigen(), io)",
        "return kfac(io).eigen()",
        "mlp-cross-entropy-sum",
    ),
    ekfac(
        "the plain diagonal",
        "a, g = io.a @ QA, io.g @ QB",
        "a, g = io.a, io.g",
        "mlp-cross-entropy-sum",
    ),
    ekfac(
        "eigenvectors transposed",
        "a, g = io.a @ QA, io.g @ QB",
        "a, g = io.a @ QA.T, io.g @ QB.T",
        "mlp-cross-entropy-sum",
    ),
    ekfac(
        "decay on the wrong side",
        "torch.lerp(scale, M.scale, decay)",
        "torch.lerp(M.scale, scale, decay)",
        "mlp-cross-entropy-sum",
    ),
    Mutant(
        "the Gram matrix of columns stored as rows",
        "pairs = zip(x.split(32), y.split(32), strict=True)",
        "pairs = [(x[:3], y[:3])]",
        ("conv2d-plain-per-location-mse-mean", "expand"),
    ),
    Mutant(
        "one datum missing in the Gram matrix",
        "return _symmetric_product(rows.reshape(-1, d), _product)",
        "return _symmetric_product(rows.reshape(-1, d)[1:], _product)",
        ("deep-linear-mse-sum-bias", "expand"),
    ),
    Mutant(
        "centred covariances",
        "return x.mT @ y\n",
        "return (x - x.mean(0)).mT @ (y - y.mean(0))\n",
        ("deep-linear-mse-sum-bias", "expand"),
    ),
]
