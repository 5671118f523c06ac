"""Mistakes about damping."""

import torch
from torch import Tensor

from kfac_scratch.conformance.selftest.museum.piece import Piece

PLACE = 4  # of the room


def divided(V: Tensor, eigenvalues: Tensor, damping: float) -> Tensor:
    """Wrong: damping added in place."""
    return V / eigenvalues.add_(damping)


DAMPING_IN_PLACE = Piece(
    "damping-in-place",
    "damping added in place",
    "divided",
    divided,
    "One underscore saves an allocation. The first product is right. Every later one has the "
    "damping once more.",
    ("inverse-exact-0.25-mlp", "expand"),
    "f-dangel/curvlinops #156",
)


def balance(A: Tensor, B: Tensor) -> Tensor:
    """Wrong: π and π² confused."""
    return A.diagonal().mean() / B.diagonal().mean()


PI_SQUARED = Piece(
    "pi-squared",
    "π and π² confused",
    "balance",
    balance,
    "The ratio of mean eigenvalues is π². Code that names the ratio `pi` takes a root later, "
    "and a reader who knows the paper, or a port, does not expect it.",
    ("inverse-factored-0.25-mlp", "expand"),
    "Thrandis/EKFAC-pytorch #4",
    "The code there takes the root later; who asked had taken its `pi` for the paper's. The "
    "piece is what that reading leads to.",
)


def damped_factors(A: Tensor, B: Tensor, pi: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Wrong: the damping missing in one term."""
    A = A + damping**0.5 * pi * torch.eye(len(A)).to(A)
    B = B + 1 / pi * torch.eye(len(B)).to(B)
    return A, B


MISSING = Piece(
    "missing",
    "the damping missing in one term",
    "damped_factors",
    damped_factors,
    "Of two terms that look alike, one has the factor and one has not. Everything stays "
    "positive definite, and steps only get shorter.",
    ("inverse-factored-0.25-mlp", "expand"),
    "f-dangel/singd #17",
    "There it was one term of an iterative inverse, `C_tC` for `C_tC * damping`.",
)

PIECES = [DAMPING_IN_PLACE, PI_SQUARED, MISSING]
