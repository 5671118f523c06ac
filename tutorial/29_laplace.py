# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 29. Laplace: how sure is a network?
#
# **Part VIII: Curvature in use.** A trained network gives one answer. How sure is the network of this answer, and how
# strong should its weight decay have been?
#
# Training finds the weights at which a loss is smallest. The curvature of the loss there tells which other weights fit
# the data almost as well. Laplace's approximation makes a normal distribution over weights from the curvature. This
# distribution gives error bars, and a number that compares weight decays without validation data: [Figure 29.1].

# %% tags=["hide-input"]
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from textwrap import fill

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from kfac_scratch.applications.laplace import (
    Laplace,
    effective_parameters,
    evidence_gradient,
    laplace,
    log_evidence,
    mackay,
    mackay_noise,
    mackay_shared,
    sampled_weights,
)
from kfac_scratch.applications.online import OnlinePrior
from kfac_scratch.applications.predictive import (
    functional_covariance,
    output_vectors,
    predicted_outputs,
)
from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.show import code

set_up()  # seed 0, float64, the GPU where there is one


def block(io: LayerIO) -> Dense:
    """The exact block of a layer."""
    return Dense(io.block())


def diagonal(io: LayerIO) -> Diagonal:
    """The diagonal of that block."""
    return Diagonal(io.gradients().square().sum((0, 1)))


# %% tags=["hide-input"] fold="Fitted: two networks, with the prior and the noise of largest evidence"
def train(model: nn.Module, objective: Callable[[], Tensor], steps: int) -> None:
    """Minimise an objective with L-BFGS."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective()
        value.backward()
        return value

    optimizer.step(closure)


def squares(model: nn.Module) -> Tensor:
    return sum(p.square().sum() for p in model.parameters())


SQUARED = nn.MSELoss(reduction="sum")
NOISE = 0.2  # of the data; the network does not get this number
x = torch.cat([torch.rand(50, 1) * 2 - 4, torch.rand(50, 1) * 2 + 2])
y = x.sin() + NOISE * torch.randn_like(x)


def curve_objective(model: nn.Module, prior: float, beta: float) -> Tensor:
    return beta * SQUARED(model(x), y) + prior / 2 * squares(model)


def regression(approximation: Callable, seed: int = 0) -> tuple[nn.Module, Laplace]:
    """Fit the curve, choose prior and noise by the evidence, fit again, and so on."""
    torch.manual_seed(seed)
    model, prior, beta = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1)), 0.1, 5.0
    for _ in range(12):
        train(model, partial(curve_objective, model, prior, beta), 100)
        p = laplace(model, SQUARED, [(x, y)], prior, beta, approximation)
        prior, beta = mackay_shared(p).prior["0"], mackay_noise(p).beta
    train(model, partial(curve_objective, model, prior, beta), 100)
    return model, laplace(model, SQUARED, [(x, y)], prior, beta, approximation)


curves = {"Kronecker": regression(kfac), "diagonal": regression(diagonal)}

# %% tags=["hide-input"] fold="Code of the figure" alt="Two plots of a fitted sine curve with noisy points on the left and the right and none in the middle. With Kronecker factors, the band around the curve is narrow at the points and much wider in the middle. With the diagonal it is wide everywhere." caption="Two networks, fitted to the same points, and two standard deviations of their outputs. Left: with Kronecker factors the band is narrow at the data and wide in the gap. Right: with the diagonal it is wide at the data, too. The evidence chose prior and noise of both."
grid = torch.linspace(-6, 6, 121).unsqueeze(1)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
for ax, (name, (model, p)) in zip(axes, curves.items(), strict=True):
    f, covariance = (t.detach().cpu() for t in predicted_outputs(p, model, grid))
    f, sd = f.flatten(), covariance.flatten().sqrt()
    ax.fill_between(grid.cpu().flatten(), f - 2 * sd, f + 2 * sd, alpha=0.3, lw=0)
    ax.plot(grid.cpu(), f)
    ax.plot(x.cpu(), y.cpu(), ".", ms=4)
    ax.set(title=name, xlabel="x", ylim=(-3, 3))
axes[0].set_ylabel("output")
plt.show()

# %% [markdown]
# Let $\hat W$ be the trained weights of a layer. In Laplace's approximation they are the mean of the distribution, and
# the covariance of the layer's weights is
#
# $$
# \Sigma = (\beta M + \delta I)^{-1} .
# $$
#
# $M$ is the curvature of the *sum* of the losses over all data, for example KFAC's $B \otimes A$. $\beta$ is a factor
# in front of this sum, and $\delta$ is the weight decay. Seen as a probability, the weight decay is a normal prior with
# the precision $\delta$, which is the inverse of a variance.
#
# After this chapter you will be able to
#
# - turn a trained network and its curvature into a distribution over weights, and say where this is exact;
# - compute the evidence, and choose weight decay, noise and inputs by it;
# - move the weight decay while a network trains;
# - compute error bars of outputs, and say why they belong to the linearised network.
#
# ## From a minimum to a distribution
#
# Let $L(W)$ be the **sum** of the losses over all data, and let training minimise
#
# $$
# J(W) = \beta L(W) + \sum_l \tfrac{\delta_l}{2} \lVert W_l \rVert^2 .
# $$
#
# If $\beta L$ is a negative log-likelihood, $e^{-\beta L}$ is the likelihood, up to a constant. The second term is
# minus the logarithm of a normal prior with precision $\delta_l$, up to a constant. So $-J$ is the logarithm of the
# posterior plus a constant. [Laplace's approximation](bibliography.md#laplace) replaces $J$ by a parabola with the same
# minimum $\hat W$ and the same curvature there. As the curvature of $L$ we take the Gauss-Newton matrix, which is
# positive semi-definite, and we keep only its block $M_l$ of each layer. A density whose negative logarithm is a
# parabola is normal:
#
# $$
# p(W \mid \text{data}) \approx \prod_l \mathcal N \bigl( W_l; \; \hat W_l, \; \Sigma_l \bigr) ,
# \qquad \Sigma_l = (\beta M_l + \delta_l I)^{-1} .
# \tag{29.1}
# $$
#
# The loss of a network has many minima. This distribution describes the surroundings of one of them.
#
# <div class="admonition warning" markdown="1">
# <p class="admonition-title">The scale of the loss</p>
#
# The scale of $M$ matters here. With the curvature of a *mean* loss, the posterior would be that of a single
# datum, which is much too wide. The decay $\delta$ belongs to $\beta L$, the sum. If the training minimises a mean of
# $N$ losses, its decay is $\delta / (\beta N)$.
#
# </div>
#
# PyTorch's squared error has no factor $\tfrac12$. So a normal noise with variance $\sigma^2$ means
# $\beta = 1 / (2 \sigma^2)$. For cross-entropy, $\beta$ is 1.
#
# ### Where it is exact
#
# For a linear model under the squared error, $J$ *is* a parabola. Then [(29.1)] is the posterior of Bayesian linear
# regression. KFAC is exact here, because the vectors $g$ of the squared error are the same for all data
# ([Chapter 5](05_kfac.py)). The cell computes the posterior by hand and compares the variances of the outputs:

# %%
X, Y, prior, beta = torch.randn(11, 4), torch.randn(11, 3), 0.3, 1.7
Phi = torch.cat([X, torch.ones(11, 1)], 1)  # with a column for the bias
P = 2 * beta * Phi.T @ Phi + prior * torch.eye(5)  # precision of every output's weights
W = torch.linalg.solve(P, 2 * beta * Phi.T @ Y).T
linear = nn.Linear(4, 3)
with torch.no_grad():
    linear.weight.copy_(W[:, :-1])
    linear.bias.copy_(W[:, -1])

p = laplace(linear, SQUARED, [(X, Y)], prior, beta)
new = torch.randn(2, 4)
phi = torch.cat([new, torch.ones(2, 1)], 1)
_, covariance = predicted_outputs(p, linear, new)
variance = ((phi @ P.inverse()) * phi).sum(1)
assert_exact(covariance, variance[:, None, None] * torch.eye(3))

# %% tags=["hide-input"] fold="Checked: these weights are the minimum, and a mean loss is refused"
J = beta * SQUARED(linear(X), Y) + prior / 2 * squares(linear)
assert max(g.abs().max() for g in torch.autograd.grad(J, linear.parameters())) < 1e-10
try:
    laplace(linear, nn.MSELoss(), [(X, Y)], prior, beta)
except ValueError as error:
    print(fill(str(error), 100))
else:
    raise AssertionError("a mean loss was accepted")

# %% [markdown]
# `laplace` refuses a mean loss, with the message above.
#
# ## The evidence
#
# How probable are the data under the whole model, with any weights? The answer is the integral of likelihood times
# prior over all weights, the **evidence** $Z$. With the parabola in place of $J$, the integral of $e^{-J}$ follows from
# the determinant of the Hessian. The integral is divided by the normalisers of prior and likelihood. At $\hat W$ this
# gives
#
# $$
# \begin{aligned}
# \log Z = {} & -\beta L - \tfrac{n}{2} \log \tfrac{\pi}{\beta} \\
# & - \sum_l \Bigl[ \tfrac{\delta_l}{2} \lVert W_l \rVert^2
# + \tfrac12 \log \det \bigl( I + \tfrac{\beta}{\delta_l} M_l \bigr) \Bigr] .
# \end{aligned}
# \tag{29.2}
# $$
#
# The four terms are
#
# - the fit;
# - the normaliser of the noise of $n$ target numbers (for cross-entropy, $n$ is 0);
# - minus the size of the weights, in units of the prior;
# - minus the price of complexity. This price grows with every direction of the weights that the data have narrowed
#   down.
#
# A large $\delta$ makes the price small and the fit bad. The evidence weighs one against the other.
#
# ### By eigenvalues
#
# Let $s_i$ be the eigenvalues of $M$. The last term is $\tfrac12 \sum_i \log(1 + \beta s_i / \delta)$, which is defined
# for a singular $M$, too. The eigenvalues of $B \otimes A$ are the products of the eigenvalues of $B$ and $A$, so that
# two small decompositions are enough.

# %% tags=["remove-input"]
code(log_evidence)

# %% [markdown]
# For the linear model, the evidence is a known density. The targets of each output are normal with mean zero and
# covariance $I / (2 \beta) + \Phi \Phi^\top / \delta$, where $\Phi$ holds the inputs, with a column of ones for the
# bias. With the exact block, KFAC and EKFAC, [(29.2)] is the logarithm of this density. With the diagonal it is
# smaller:

# %%
targets = MultivariateNormal(torch.zeros(11), torch.eye(11) / (2 * beta) + Phi @ Phi.T / prior)
exact = sum(targets.log_prob(column) for column in Y.T)
print(f"probability of the targets, logarithm: {exact:.4f}")
for structure in (block, kfac, ekfac, diagonal):
    value = log_evidence(laplace(linear, SQUARED, [(X, Y)], prior, beta, structure)).to(exact)
    print(f"    evidence, {structure.__name__:9}: {value:.4f}")
    if structure is diagonal:
        assert value < exact
        assert relative_error(value, exact) > 1e-3
    else:
        assert_exact(value, exact)

# %% [markdown]
# ### What may be compared
#
# <div class="admonition theorem" markdown="1" id="thm-29.1">
# <p class="admonition-title" markdown="1"><b>Theorem 29.1 (order of the evidences)</b></p>
#
# At the same weights and with one $\delta$ for each layer, the evidence with EKFAC, and the one with the diagonal, is
# at most the evidence with the exact blocks. Let $\gamma = D - \delta \operatorname{tr} (\beta M + \delta I)^{-1}$ for
# a layer of $D$ parameters. With EKFAC and with the diagonal, $\gamma$ is at least that of the exact block.
#
# </div>
#
# *Proof.* Both approximations keep the diagonal of the precision $P = \beta M + \delta I$ in some orthonormal basis,
# and put zeros beside it. By Hadamard's inequality, $\det P$ is at most the product of this diagonal, in any basis. So
# the price of complexity does not fall. The second statement follows from $(P^{-1})_{ii} \ge 1 / P_{ii}$, in the same
# basis. $\square$
#
# The proof does not apply to KFAC, because the eigenvalues of $B \otimes A$ are in general not the diagonal of the
# block in any such basis. In random layers, the evidence with KFAC is sometimes larger and sometimes smaller than with
# the exact block:


# %% tags=["hide-input"] fold="Checked: the theorem in 60 random layers, and both signs for KFAC"
def price(io: LayerIO, structure: Callable) -> float:
    return float(torch.log1p(structure(io).eigenvalues()).sum())


signs = []
for seed in range(60):
    torch.manual_seed(seed)
    io = LayerIO(torch.randn(40, 1, 2), torch.randn(1, 40, 1, 2))
    assert price(io, block) <= min(price(io, ekfac), price(io, diagonal))
    spectra = [structure(io).eigenvalues() for structure in (block, ekfac, diagonal)]
    counts = [float((s / (s + 1)).sum()) for s in spectra]
    assert counts[0] <= min(counts[1:])
    signs.append(price(io, kfac) < price(io, block))
print(f"KFAC has the larger evidence in {sum(signs)} of {len(signs)} layers, and else the smaller")
assert 0 < sum(signs) < len(signs)

# %% [markdown]
# So compare the evidences of models, priors and noises with one structure, and never evidences of different structures.
#
# ## Climbing the evidence
#
# When the prior changes, the weights at the minimum of $J$ change, too. Because $J$ is at its minimum, this change has
# no effect of first order on the fit and on the size of the weights together. It does change $M$. We neglect this and
# take $M$ as fixed. Then the derivatives are short. Let
#
# $$
# \gamma_l = \sum_i \frac{\beta s_{li}}{\beta s_{li} + \delta_l} .
# \tag{29.3}
# $$
#
# Each term is a number between 0 and 1: the share of the precision in one direction that comes from the data. So
# $\gamma$ counts how many parameters the data determine. It is the $\gamma$ of [Theorem 29.1]. The derivatives are
#
# $$
# \frac{\partial \log Z}{\partial \log \delta_l} = \tfrac12 (\gamma_l - \delta_l \lVert W_l \rVert^2),
# \qquad
# \frac{\partial \log Z}{\partial \log \beta} = -\beta L + \tfrac{n}{2} - \tfrac12 \sum_l \gamma_l .
# \tag{29.4}
# $$
#
# For the network of [Figure 29.1] with Kronecker factors, the data determine few of the parameters:

# %% tags=["hide-input"] fold="Checked: the derivatives of the evidence, against autodiff"
model, p = curves["Kronecker"]
gamma = {name: g.item() for name, g in effective_parameters(p).items()}
total = sum(W.numel() for W in p.weights.values())
print(f"of {total} parameters the data determine {sum(gamma.values()):.1f}")


def at(log_delta: Tensor, log_beta: Tensor) -> Tensor:
    """[(29.2)] as a function of the first layer's prior and of beta, for autodiff."""
    beta, value = log_beta.exp(), -log_beta.exp() * p.loss
    value = value - p.numbers / 2 * (math.pi / beta).log()
    for name, delta in {"0": log_delta.exp(), "2": torch.tensor(p.prior["2"])}.items():
        s, W = p.matrices[name].eigenvalues(), p.weights[name]
        value = value - (delta * W.square().sum() + torch.log1p(beta * s / delta).sum()) / 2
    return value


q = replace(p, beta=2 * p.beta)  # away from the maximum, where derivatives are zero
here = torch.tensor(q.prior["0"]).log(), torch.tensor(q.beta).log()
assert_exact(log_evidence(q).to(here[0]), at(*here))
by_delta, by_beta = torch.func.grad(at, (0, 1))(*here)
assert_exact(evidence_gradient(q).log_prior["0"], by_delta.reshape(1))
assert_exact(torch.tensor(evidence_gradient(q).log_beta), by_beta)
assert 1 < sum(gamma.values()) < total / 2

# %% [markdown]
# If the derivatives are set to zero with the present $\gamma$, they give the steps of
# [MacKay](bibliography.md#evidence): $\delta_l = \gamma_l / \lVert W_l \rVert^2$ and
# $\sigma^2 = L / (n - \sum_l \gamma_l)$. The second one is the textbook's estimate of a variance after a fit of
# $\sum_l \gamma_l$ parameters.
#
# The weights move when the prior moves. So training and steps of the prior take turns, as they did for the networks of
# [Figure 29.1]. These networks were not given the noise of the data. The evidence found these values:

# %% tags=["hide-input"] fold="Measured: the noise that the evidence finds, from three starts"
for name, (_, p) in curves.items():
    sigma = (1 / (2 * p.beta)) ** 0.5
    print(f"{name:10} noise {sigma:.2f} (true: {NOISE}), prior {p.prior['0']:.2f}")


def noise(p: Laplace) -> float:
    return (1 / (2 * p.beta)) ** 0.5


sigma = {name: [noise(p)] for name, (_, p) in curves.items()}
for seed in (1, 2):  # other starts of the network, on the same data
    sigma["Kronecker"].append(noise(regression(kfac, seed)[1]))
    sigma["diagonal"].append(noise(regression(diagonal, seed)[1]))
for name, values in sigma.items():
    print(f"{name:10} noise with three starts:", ", ".join(f"{s:.2f}" for s in values))
assert all(abs(s - NOISE) < 0.05 for s in sigma["Kronecker"])
assert min(sigma["diagonal"]) > 1.3 * max(sigma["Kronecker"])
places = torch.tensor([[-3.0], [0.0]])  # among the data, and in the gap
spread = {
    name: predicted_outputs(p, m, places)[1].flatten().sqrt() for name, (m, p) in curves.items()
}
assert spread["Kronecker"][1] > 2 * spread["Kronecker"][0]
assert spread["diagonal"][1] < 2 * spread["diagonal"][0]
assert spread["diagonal"][0] > 2 * spread["Kronecker"][0]
assert curves["diagonal"][1].prior["0"] > 2 * curves["Kronecker"][1].prior["0"]

model, p = curves["Kronecker"]  # one network, one prior, one noise: what do both say of it?
same = laplace(model, SQUARED, [(x, y)], p.prior, p.beta, diagonal)
for name, q in {"Kronecker": p, "diagonal": same}.items():
    print(
        f"{name:10} on one network: {sum(map(float, effective_parameters(q).values())):.1f} determined"
    )
assert sum(effective_parameters(same).values()) > sum(effective_parameters(p).values())

# %% [markdown]
# With Kronecker factors, the noise is nearly the true one. With the diagonal it is too large. The last two lines
# compare both structures on one network: the diagonal leaves out the correlations of the weights, and so it counts many
# more parameters as determined. A larger $\gamma$ makes the prior precision larger. Then the fit is worse, and the
# evidence explains the larger error as noise.
#
# After a step, the weights are trained again and $M$ changes. The evidence at the new weights may be smaller than
# before, so record it. The function `mackay_shared` has one number for all layers. This is the safer start.
#
# ## A prior for each input
#
# Can the evidence find out which inputs matter? Give column $i$ of a layer's $W$ its own precision $d_i$. MacKay
# called this *automatic relevance determination*: an input that explains nothing gets a precision so large that its
# weights vanish. The precision of the posterior becomes $\beta B \otimes A + I \otimes D$ with
# $D = \operatorname{diag}(d)$. In general no single $Q_B \otimes Q_A$ diagonalises this sum of two products.
#
# <div class="admonition theorem" markdown="1" id="thm-29.2">
# <p class="admonition-title" markdown="1"><b>Theorem 29.2 (a prior for each column)</b></p>
#
# With $A' = D^{-1/2} A D^{-1/2}$,
#
# $$
# \beta B \otimes A + I \otimes D
# = (I \otimes D^{1/2}) \, (\beta B \otimes A' + I) \, (I \otimes D^{1/2}) .
# $$
#
# </div>
#
# *Proof.* $(I \otimes D^{1/2}) (B \otimes A') (I \otimes D^{1/2}) = B \otimes D^{1/2} A' D^{1/2} = B \otimes A$, and
# $(I \otimes D^{1/2}) (I \otimes D^{1/2}) = I \otimes D$. $\square$
#
# The matrix in the middle is a Kronecker product with damping 1. So the decompositions of $B$ and $A'$ give
# covariance and determinant exactly. The number of determined parameters in column $i$ is a sum over rows $r$, and
# MacKay's step for the column follows as before:
#
# $$
# \gamma_i = \sum_r \bigl( 1 - d_i \Sigma_{ri, ri} \bigr) ,
# \qquad
# d_i \leftarrow \gamma_i / \lVert W_{:i} \rVert^2 .
# \tag{29.5}
# $$

# %% tags=["hide-input"] fold="Checked: covariance, evidence and determined parameters, against dense matrices"
d, (R, S) = torch.rand(5) + 0.1, (torch.randn(5, 6), torch.randn(3, 4))
K = Kronecker(R @ R.T, S @ S.T)  # any positive definite factors
p = Laplace({"layer": W}, {"layer": K}, 0.0, 0, {"layer": d}, beta)
precision = beta * K.dense() + torch.kron(torch.eye(3), d.diag())
V = torch.randn(3, 5)
assert_exact((p.covariances()["layer"] @ V).flatten(), precision.inverse() @ V.flatten())
by_hand = -((d * W.square()).sum() + precision.logdet() - 3 * d.log().sum()) / 2
assert_exact(log_evidence(p).to(by_hand), by_hand)
gamma = (1 - d * precision.inverse().diagonal().reshape(3, 5)).sum(0)
assert_exact(effective_parameters(p)["layer"], gamma)

# %% [markdown]
# For an experiment, we put a second image beside every digit. It has the same size and is pure noise. The network is
# not told which half is the digit. With one prior for all inputs, the network fits the noise of its few training
# images. With a prior for each input, the evidence can switch inputs off.

# %% tags=["hide-input"] fold="Trained: one prior, or a prior for each input"
digits = load_digits()
images = torch.tensor(digits.data) / 16
labels = torch.tensor(digits.target)
CROSS = nn.CrossEntropyLoss(reduction="sum")
N_TRAIN = 200


def beside_noise(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test data, with an image of noise beside each digit."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator, device="cpu")
    noise = torch.rand(images.shape, generator=generator, device="cpu", dtype=images.dtype)
    device = torch.get_default_device()
    inputs = torch.cat([images.cpu(), noise], 1)[order].to(device)
    classes = labels.cpu()[order].to(device)
    train_set, test_set = slice(0, N_TRAIN), slice(N_TRAIN, None)
    return inputs[train_set], classes[train_set], inputs[test_set], classes[test_set]


def penalised(model: nn.Module, X: Tensor, y: Tensor, priors: dict[str, Tensor]) -> Tensor:
    """The loss, and half of every weight's square times its column's precision."""
    value = CROSS(model(X), y)
    for name, d in priors.items():
        layer = model[int(name)]
        value = value + (layer.weight.square().sum(0) @ d[:-1]) / 2
        value = value + d[-1] * layer.bias.square().sum() / 2
    return value


def by_evidence(seed: int, step: Callable[[Laplace], Laplace]) -> tuple[Laplace, float]:
    """Train and move the prior in turn; the last posterior and the accuracy on other data."""
    X, y, X_test, y_test = beside_noise(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 16), nn.Tanh(), nn.Linear(16, 10))
    priors = {"0": torch.ones(129), "2": torch.ones(17)}
    for _ in range(12):
        train(model, partial(penalised, model, X, y, priors), 30)
        p = laplace(model, CROSS, [(X, y)], priors)
        priors = step(p).prior
    right = (model(X_test).argmax(1) == y_test).double().mean().item()
    return p, right


def equal_columns(p: Laplace) -> Laplace:
    """MacKay's step for each layer, in equal columns."""
    gamma = effective_parameters(p)
    shared = {n: gamma[n].sum() / W.square().sum() for n, W in p.weights.items()}
    prior = {n: delta.expand(p.weights[n].shape[1]) for n, delta in shared.items()}
    return Laplace(p.weights, p.matrices, p.loss, p.numbers, prior, p.beta)


found = {}
for seed in range(3):
    for name, step in {"one prior": equal_columns, "a prior each": mackay}.items():
        p, accuracy = found[seed, name] = by_evidence(seed, step)
        of_inputs = effective_parameters(p)["0"]
        print(f"seed {seed}, {name:12}: evidence {log_evidence(p):6.1f},", end=" ")
        print(f"accuracy {accuracy:.3f}, determined: digit {of_inputs[:64].sum():.1f},", end=" ")
        print(f"noise {of_inputs[64:128].sum():.1f}")

# %% tags=["hide-input"] fold="Code of the figure" alt="A map of 8 by 16 pixels. The left half, the digit, has a pattern of small and large precisions, with large ones at the left and right border. The right half, the noise, has large precisions everywhere." caption="The logarithm of the precision that every input pixel got, seed 0. Bright pixels are switched off: all of the noise (right half), and the border of the digit (left half)."
p, _ = found[0, "a prior each"]
pixels = p.prior["0"][:128].log10().cpu()
picture = torch.cat([pixels[:64].reshape(8, 8), pixels[64:].reshape(8, 8)], 1)
fig, ax = plt.subplots(figsize=(7, 3.4), layout="constrained")
shown = ax.imshow(picture.numpy(), cmap="viridis")
ax.set_xticks([3.5, 11.5], ["digit", "noise"])
ax.set_yticks([])
fig.colorbar(shown, ax=ax, label="log10 of the precision")
plt.show()

for seed in range(3):
    (one, accuracy), (each, better) = found[seed, "one prior"], found[seed, "a prior each"]
    assert log_evidence(each) > log_evidence(one)
    assert better > accuracy
    of_noise = [effective_parameters(p)["0"][64:128].sum() for p in (each, one)]
    assert of_noise[0] < of_noise[1] / 20

# %% [markdown]
# With a prior for each input, the weights of the noise are switched off. In all three repetitions the evidence is
# larger, and so is the accuracy on other images. No validation set was used.
#
# Some pixels are zero in all training images. They do not enter the evidence: their weights are zero, and the data
# determine none of them. MacKay's step is then 0/0, and the package takes the largest precision that it allows.
#
# ## While a network trains
#
# So far each step of the prior waited until the weights were near a minimum. The prior can also move while the weights
# are on their way ([Immer et al., 2021](bibliography.md#marglik), with gradient steps for the prior). Let
# $L_{\text{batch}}$ be the sum of the losses of a random batch of $b$ of the $N$ data. Then $J$ is estimated by
#
# $$
# \frac{N}{b} \, \beta L_{\text{batch}}(W) + \sum_l \tfrac{\delta_l}{2} \lVert W_l \rVert^2 .
# \tag{29.6}
# $$
#
# Any optimizer can minimise this estimate. Every few epochs the curvature is computed at the present weights, and the
# prior takes MacKay's step. `OnlinePrior` holds the objective and takes the step:

# %% tags=["remove-input"]
code(OnlinePrior.objective, OnlinePrior.update)

# %% [markdown]
# For a test, a third of the labels of the training digits are replaced by random ones. With a small decay the network
# learns many of them by heart. With too strong a decay it learns too little. We train once with each decay of a list
# and judge each network on test data. Then we train once with a prior that moves, without any test data:


# %% tags=["hide-input"] fold="Trained: with a prior that follows the evidence, and with fixed decays"
def wrong_labels(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training data of which a third have random labels, and test data as they are."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator, device="cpu").to(images.device)
    X, y = images[order], labels[order]
    y[:100] = torch.randint(10, (100,), generator=generator, device="cpu").to(y)
    return X[:300], y[:300], X[300:], y[300:]


def correct(model: nn.Module, X: Tensor, y: Tensor) -> float:
    return (model(X).argmax(1) == y).double().mean().item()


def trained_online(seed: int, prior: float, moving: bool) -> tuple[float, float, float]:
    """Train by Adam; the accuracies on test and training data, and the last prior."""
    X, y, X_test, y_test = wrong_labels(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    online = OnlinePrior(model, CROSS, [(X, y)], prior)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for epoch in range(120):
        for batch in torch.randperm(300).split(100):
            optimizer.zero_grad()
            online.objective(model(X[batch]), y[batch]).backward()
            optimizer.step()
        if moving and epoch >= 20 and epoch % 5 == 0:
            online.update()
    return correct(model, X_test, y_test), correct(model, X, y), online.posterior.prior["0"]


decays = [0.01, 0.3, 1.0, 3.0, 6.0, 12.0, 24.0]
runs = torch.tensor([[trained_online(s, d, False)[:2] for d in decays] for s in range(3)])
fixed, by_heart = runs[..., 0], runs[:, 0, 1]
chosen = [trained_online(seed, 1.0, True) for seed in range(3)]
for seed, (right, _, prior) in enumerate(chosen):
    best = fixed[seed].argmax().item()
    print(f"seed {seed}: best fixed decay {decays[best]:g}, test {fixed[seed, best]:.3f};", end=" ")
    print(f"moving prior {prior:.1f}, test {right:.3f}")
    print(f"    smallest decay: test {fixed[seed, 0]:.3f}, training labels {by_heart[seed]:.3f}")
    assert right > fixed[seed, 0] + 0.05
    assert right > fixed[seed, best] - 0.03
    assert by_heart[seed] > 0.85  # about 0.7 of the labels are right
    assert fixed[seed, -1] < fixed[seed, best] - 0.05

# %% tags=["hide-input"] fold="Code of the figure" alt="The test accuracy rises with the decay up to a maximum and falls steeply beyond it. The three points of the online prior lie close to the top." caption="Test accuracy with a third of the training labels random. Line and band: fixed decays, median and range of three seeds. The points, one for each seed, are trainings with a moving prior. They are near the top of the line, although no test data chose their decay."
fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
low, high = fixed.min(0).values.cpu(), fixed.max(0).values.cpu()
ax.fill_between(decays, low, high, alpha=0.3, lw=0)
ax.semilogx(decays, fixed.median(0).values.cpu())
ax.text(0.02, 0.75, "fixed decay", color="C0")
ax.plot([prior for *_, prior in chosen], [right for right, *_ in chosen], "o")
ax.text(2.4, 0.885, "moving prior", color="C1", ha="right")
ax.set(xlabel="prior precision (weight decay)", ylabel="test accuracy")
plt.show()

# %% [markdown]
# With the moving prior, the test accuracy is near the best of the list. This is not guaranteed: [(29.2)] neglects the
# gradient of $J$, which is not zero during the training.
#
# The first step of the prior has to wait for some epochs. A network with random weights gives all classes similar
# probabilities, so that its curvature is large. Its weights are small. Both make $\gamma / \lVert W \rVert^2$ large. A
# step before training would give a decay that is several times the decay in the end:

# %% tags=["hide-input"] fold="Measured: the decay by a step before training, and in the end"
for seed, (*_, settled) in enumerate(chosen):
    X, y, *_ = wrong_labels(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    at_once = mackay_shared(laplace(model, CROSS, [(X, y)])).prior["0"]
    print(f"seed {seed}: {at_once:.1f} before training, {settled:.1f} in the end")
    assert at_once > 3 * settled

# %% [markdown]
# ## Predictions
#
# A distribution over weights gives a distribution over outputs. The network is replaced by its tangent at the trained
# weights, $f(x, \hat W + \Delta) \approx f(x, \hat W) + \mathrm J(x) \Delta$, with the Jacobian $\mathrm J$. Then the
# outputs are normal, with covariance $\mathrm J \Sigma \mathrm J^\top$ and the $\Sigma$ of [(29.1)]. A row of
# $\mathrm J$ is the gradient of one output. A `LayerIO` whose vectors are unit vectors holds these gradients. So the
# covariance is a sum of quadratic forms over layers:

# %% tags=["remove-input"]
code(functional_covariance, output_vectors)

# %% [markdown]
# Why do we take the tangent? The Gauss-Newton matrix is the exact Hessian of the loss for the *linearised* network. So
# the posterior belongs to that network, and not to the trained one. The curvature contains nothing of how the trained
# network bends away from its tangent. We send the same samples of the weights through both:

# %% tags=["hide-input"] fold="Trained: a network for digits, and 300 samples of its weights"
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
X, y = images[:200], labels[:200]
train(model, lambda: CROSS(model(X), y) + 0.05 * squares(model), 200)
p = laplace(model, CROSS, [(X, y)], prior=0.1)
samples = sampled_weights(p, 300)
X_test, y_test = images[200:600], labels[200:600]


def outputs(weights: dict[str, Tensor]) -> Tensor:
    theta = {f"{n}.weight": W[:, :-1] for n, W in weights.items()}
    theta |= {f"{n}.bias": W[:, -1] for n, W in weights.items()}
    return torch.func.functional_call(model, theta, (X_test,))


def accuracy(f: Tensor) -> float:
    return (f.argmax(1) == y_test).double().mean().item()


# %%
def both_ways(sampled: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Class probabilities with sampled weights, in the network and in its tangent."""
    moved = {name: sampled[name] - W for name, W in p.weights.items()}
    f, change = torch.func.jvp(outputs, (dict(p.weights),), (moved,))
    return outputs(sampled).softmax(1), (f + change).softmax(1)


through, tangent = (t.mean(0) for t in torch.vmap(both_ways)(samples))

# %% tags=["hide-input"] fold="Measured: the accuracy both ways"
trained, sent, linearised = map(accuracy, (model(X_test), through, tangent))
print(f"accuracy: trained weights {trained:.3f};", end=" ")
print(f"samples in the tangent {linearised:.3f}, in the network {sent:.3f}")
assert linearised > trained - 0.1
assert sent < linearised - 0.1

# %% [markdown]
# The samples are about as accurate in the tangent as the trained weights. In the network itself they are much less
# accurate.
#
# The quality of the probabilities depends on the prior. The prior of this network was not chosen by the evidence. With
# it, the tangent is too cautious: its answers are right much more often than its confidence says.

# %% tags=["hide-input"] fold="Measured: accuracy and confidence"
right, sure = accuracy(tangent), tangent.max(1).values.mean().item()
print(f"samples in the tangent: right in {right:.2f} of the images, mean confidence {sure:.2f}")
assert sure < right - 0.1

# %% [markdown]
# ## In one minute
#
# - **Distribution.** The precision of the weights is the curvature of the *sum* of the losses plus the precision of the
#   prior, [(29.1)]. The network must be at a minimum of $J$: it must have been trained with this prior as its weight
#   decay.
# - **Evidence.** [(29.2)] is the fit minus a price of complexity. With Kronecker factors, the evidence and its
#   derivatives need one decomposition of each factor. Compare evidences of one structure only.
# - **Choices.** The evidence chooses weight decay, noise, and with [Theorem 29.2] the inputs, without validation data.
#   A single training can be enough.
# - **Structure.** The diagonal leaves out the correlations of the weights. It counted too many parameters as
#   determined, and estimated too much noise.
# - **Predictions.** Error bars belong to the linearised network. Sampled weights in the network itself were much less
#   accurate.
#
# ## Exercises
#
#
# **Exercise 29.1.** Under the prior, the expectation of $\delta \lVert W \rVert^2$ is the number $D$ of parameters.
# Show that the expectation under the posterior is the same if and only if $\delta \lVert \hat W \rVert^2 = \gamma$,
# which is MacKay's fixed point.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The posterior's mean of $\delta \lVert W \rVert^2$ is $\delta \lVert \hat W \rVert^2 + \delta \operatorname{tr}
# \Sigma$. The second term is $\sum_i \delta / (\beta s_i + \delta) = D - \gamma$.
#
# </details>
#
# **Exercise 29.2.** A layer's curvature is multiplied by $c > 1$ by mistake. In which direction does MacKay's step for
# its prior move, and what does $\gamma$ tend to for a large $c$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Every term of $\gamma$ grows with $c$, so that $\delta = \gamma / \lVert W \rVert^2$ grows: too strong a decay. For a
# large $c$ every term with $s_i > 0$ tends to 1, so that $\gamma$ tends to the rank of $M$.
#
# </details>
#
# **Exercise 29.3.** Compute the posterior of the last layer alone. Which of its variances are the same as in the
# posterior of all layers, and why are the outputs' variances smaller?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Blocks are independent of each other, so the last layer's own covariance is the same. The outputs' covariance is a
# sum over layers of positive semi-definite terms, of which one is left.
#
# </details>
#
# **Exercise 29.4 (write it).** Write a function `evidence(A, B, W, loss, delta)` for one layer and cross-entropy, where
# `loss` is the sum of the losses. Use the eigenvalues of the factors, and form no matrix of the size of
# $B \otimes A$. Compare it with `log_evidence`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def evidence(A, B, W, loss, delta):
#     s = torch.outer(torch.linalg.eigvalsh(B), torch.linalg.eigvalsh(A))
#     return -loss - (delta * W.square().sum() + torch.log1p(s / delta).sum()) / 2
# ```
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
s = p.matrices["2"].eigenvalues()  # 29.1
assert_exact((0.1 / (s + 0.1)).sum(), s.numel() - effective_parameters(p)["2"].sum())


def times(c: float) -> Laplace:  # 29.2
    larger = {name: Kronecker(M.dense(), c * torch.ones(1, 1)) for name, M in p.matrices.items()}
    flat = {name: W.reshape(1, -1) for name, W in p.weights.items()}
    return Laplace(flat, larger, p.loss, 0, p.prior)


assert mackay(times(100)).prior["2"] > mackay(p).prior["2"]
assert (effective_parameters(times(100))["2"] > effective_parameters(p)["2"]).all()
large = s > 1e-6 * s.max()
assert abs(effective_parameters(times(1e9))["2"] - large.sum()) < 0.5
last = laplace(model, CROSS, [(X, y)], prior=0.1, layers=["2"])  # 29.3
V = torch.randn_like(p.weights["2"])
assert_exact(last.covariances()["2"] @ V, p.covariances()["2"] @ V)
few = X_test[:5]
variances = [predicted_outputs(q, model, few)[1].diagonal(dim1=1, dim2=2) for q in (last, p)]
assert (variances[0] < variances[1]).all()


def evidence(A: Tensor, B: Tensor, W: Tensor, loss: float, delta: float) -> Tensor:  # 29.4
    s = torch.outer(torch.linalg.eigvalsh(B), torch.linalg.eigvalsh(A))
    return -loss - (delta * W.square().sum() + torch.log1p(s / delta).sum()) / 2


factors = Kronecker(R @ R.T, S @ S.T)
alone = Laplace({"layer": V[:3, :5]}, {"layer": factors}, 7.0, 0, {"layer": 0.3})
expected = log_evidence(alone).to(V)
assert_exact(evidence(factors.A, factors.B, V[:3, :5], 7.0, 0.3), expected)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [MacKay (1992)](bibliography.md#evidence) for the evidence; [Ritter, Botev and Barber
# (2018)](bibliography.md#kfac-laplace) for Kronecker factors in it; [Immer et al. (2021)](bibliography.md#marglik) for
# choosing hyper-parameters during training; [Daxberger et al. (2021)](bibliography.md#laplace-redux) and their library
# laplace-torch.
