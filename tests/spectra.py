"""Spectra of factors at real widths: rows of inputs whose Gram matrices are as ill-conditioned."""

import torch
from torch.nn.functional import one_hot


def relu(d, N, g):
    """Features of two random ReLU layers, and a bias: one large eigenvalue, a flat bulk."""
    X, W = (torch.randn(*shape, d, generator=g, dtype=torch.float64) for shape in ((N,), (d,)))
    H = torch.relu(torch.relu(X @ W * (2 / d) ** 0.5) @ W.T * (2 / d) ** 0.5)
    H[:, -1] = 1
    return H


def images(d, N, g):
    """A spectrum that falls like that of natural images, in a random basis."""
    Z = torch.randn(N, d, generator=g, dtype=torch.float64) / torch.arange(1, d + 1)
    return Z @ torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64)).Q.T


def few_samples(d, N, g):
    """Fewer rows than columns: rank d / 4."""
    return relu(d, max(d // 4, 2), g)


def repeated_features(d, N, g):
    """Every feature four times: rank d / 4."""
    return relu(d // 4, N, g).repeat(1, 4)


def tokens(d, N, g):
    """One-hot rows with Zipf's frequencies: diagonal, some entries are zero."""
    frequencies = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    drawn = frequencies.multinomial(4 * d, replacement=True, generator=g)
    return one_hot(drawn, d).double()


def counts(d, N, g):
    """Bags of 20 words with Zipf's frequencies: sparse, and most words are rare."""
    frequencies = 1 / torch.arange(1, d + 1, dtype=torch.float64)
    drawn = frequencies.expand(N, d).multinomial(20, replacement=True, generator=g)
    return one_hot(drawn, d).double().sum(1)


def tabular(d, N, g):
    """Columns in units of their own: scales from 1e-2 to 1e2, and means as large as the spread."""
    scales = torch.logspace(-2, 2, d, dtype=torch.float64)
    return (1 + torch.randn(N, d, generator=g, dtype=torch.float64)) * scales


def badly_scaled(d, N, g):
    """Independent features with scales from 1e-3 to 1e3."""
    scales = torch.logspace(-3, 3, d, dtype=torch.float64)
    return torch.randn(N, d, generator=g, dtype=torch.float64) * scales


SPECTRA = [
    relu,
    images,
    few_samples,
    repeated_features,
    tokens,
    counts,
    tabular,
    badly_scaled,
]


def factor(spectrum, d, dtype, device):
    """The mean outer product of `2 d` rows, as a network in this precision would store it."""
    rows = spectrum(d, 2 * d, torch.Generator().manual_seed(0)).to(device, dtype)
    return rows.T @ rows / len(rows)
