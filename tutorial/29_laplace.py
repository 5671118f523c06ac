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
# **Part VIII: Curvature in use.** A trained network gives one answer. How sure is it of that answer, and how large
# should its weight decay have been?
#
# Training finds the weights at which a loss is smallest. The curvature there says which other weights fit almost
# as well: along a flat direction, even distant ones. So curvature turns one set of weights into a distribution over
# weights. From it follow error bars, and a number that compares weight decays without validation data. Error bars
# need no further training, only a matrix for each layer, as the chapters before have made.

# %%
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


# %% [markdown]
# Here is what comes out, on a curve that was measured on the left and on the right but not in the middle. Two
# small networks fit it, each with its own approximation of the curvature. The bands are two standard deviations of
# the output. With Kronecker factors the band opens where there were no data.


# %% tags=["hide-input"]
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

# %% tags=["hide-input"] alt="Two plots of a fitted sine curve with noisy points on the left and the right and none in the middle. With Kronecker factors, the band around the curve is narrow at the points and wide in the middle and outside. With the diagonal it has the same large width everywhere." caption="A network's fit and two standard deviations of its output. Left: with Kronecker factors. Right: another network, with the diagonal. Prior and noise were chosen by the evidence in both."
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
# ## From a minimum to a distribution
#
# Let $L(W)$ be the **sum** of the losses over all data, and let training minimise
#
# $$
# J(W) = \beta L(W) + \sum_l \tfrac{\delta_l}{2} \lVert W_l \rVert^2 .
# $$
#
# $e^{-\beta L}$ is the likelihood, up to a constant, if $\beta L$ is a negative log-likelihood. The rest is minus the
# logarithm of a normal prior with precision $\delta_l$. So $-J$ is the logarithm of the posterior plus a constant.
# [Laplace's approximation](bibliography.md#laplace) replaces $J$ by its parabola at the minimum $\hat W$. For the
# curvature of $L$ we take the Gauss-Newton matrix, which is positive semi-definite, and of that one block $M_l$ for
# each layer. A density whose negative logarithm is a parabola is normal:
#
# $$
# p(W \mid \text{data}) \approx \prod_l \mathcal N \bigl( W_l; \; \hat W_l, \; \Sigma_l \bigr) ,
# \qquad \Sigma_l = (\beta M_l + \delta_l I)^{-1} .
# \tag{29.1}
# $$
#
# It describes the surroundings of one minimum. A network has many.
#
# <div class="admonition warning" markdown="1">
# <p class="admonition-title">The scale of the loss</p>
#
# The scale of $M$ matters here. With the curvature of a *mean* loss, the posterior would be that of a single
# datum: much too wide. `laplace` refuses a mean loss. $\delta$ goes with $\beta L$; with a mean of $N$ losses the
# decay is $\delta / (\beta N)$.
#
# </div>
#
# For the squared error, PyTorch's loss has no $\tfrac12$ in front. So a normal noise with variance $\sigma^2$ means
# $\beta = 1 / (2 \sigma^2)$. For cross-entropy, $\beta$ is 1.
#
# ### Where it is exact
#
# A linear model under the squared error has a $J$ that *is* a parabola. Then [(29.1)] is the posterior of
# Bayesian linear regression. KFAC is exact: the vectors of the squared error are the same for all data, so
# that $B \otimes A$ is the block ([Chapter 5](05_kfac.py)).

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
J = beta * SQUARED(linear(X), Y) + prior / 2 * squares(linear)
assert max(g.abs().max() for g in torch.autograd.grad(J, linear.parameters())) < 1e-10
try:
    laplace(linear, nn.MSELoss(), [(X, Y)], prior, beta)
except ValueError as error:
    print(fill(str(error), 100))
else:
    raise AssertionError("a mean loss was accepted")

# %% [markdown]
# ## The evidence
#
# How probable are the data under the whole model, whatever the weights? That is the integral over all weights of
# likelihood times prior, the **evidence** $Z$. The integral of $e^{-J}$ is known from the determinant of the
# parabola's Hessian. The prior's normaliser divides it, which leaves, at $\hat W$,
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
# The second term normalises the noise of $n$ targets; for cross-entropy, $n$ is 0. The first term rewards a good
# fit. The third one asks for weights that the prior expects. The last one is the price of complexity: it grows with
# every direction of the weights that the data have narrowed down. A large $\delta$ makes the price small and the
# fit bad, and the evidence weighs one against the other.
#
# ### By eigenvalues
#
# With the eigenvalues $s_i$ of $M$ the last term is $\tfrac12 \sum_i \log(1 + \beta s_i / \delta)$. A singular $M$
# is no trouble. For $B \otimes A$ the eigenvalues are the products of the factors', so that two
# small decompositions are enough.

# %% tags=["remove-input"]
code(log_evidence)

# %% [markdown]
# For the linear model, $Z$ is the density of the targets. Each output's targets are normal, with covariance
# $I / (2 \beta) + \Phi \Phi^\top / \delta$ for the inputs $\Phi$.

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
# at most the evidence with the exact blocks. Both count at least as many determined parameters, $\gamma$ of [(29.3)].
#
# </div>
#
# *Proof.* Both keep the diagonal of the precision $P = \beta M + \delta I$ in some orthonormal basis and drop the
# rest. By Hadamard's inequality, $\det P$ is at most the product of its diagonal, in any basis. So the price of
# complexity does not fall. The second statement is $\gamma = D - \delta \operatorname{tr} P^{-1}$ for $D$ parameters,
# with $(P^{-1})_{ii} \ge 1 / P_{ii}$. $\square$
#
# Neither overestimates the evidence of the blocks. The proof fails for KFAC, whose eigenvalues are no diagonal of
# the block. Random layers show both signs:


# %%
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
# So compare the evidences of models, priors and noises under one structure, and never across structures.
#
# ## Climbing the evidence
#
# When the prior changes, the weights follow. At a minimum of $J$ this changes [(29.2)] by nothing to first order, but
# for $M$, which moves with the weights. With $M$ fixed the derivatives are simple. Let
#
# $$
# \gamma_l = \sum_i \frac{\beta s_{li}}{\beta s_{li} + \delta_l} .
# \tag{29.3}
# $$
#
# Each term is a number between 0 and 1: the share of the precision in one direction that comes from the data. So
# $\gamma$ counts how many parameters the data determine. Then
#
# $$
# \frac{\partial \log Z}{\partial \log \delta_l} = \tfrac12 (\gamma_l - \delta_l \lVert W_l \rVert^2),
# \qquad
# \frac{\partial \log Z}{\partial \log \beta} = -\beta L + \tfrac{n}{2} - \tfrac12 \sum_l \gamma_l .
# \tag{29.4}
# $$

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
# With the old $\gamma$, zero derivatives give [MacKay's](bibliography.md#evidence) steps,
# $\delta_l = \gamma_l / \lVert W_l \rVert^2$ and $\sigma^2 = L / (n - \sum_l \gamma_l)$. The second one is the
# textbook's estimate of a variance, with as many parameters fitted.
#
# The weights move when the prior moves, so one trains a little, takes a step, and trains on. That is how the
# networks of the first figure got their priors. They did not get the noise:

# %% tags=["hide-input"] fold="Checked: the noise that the evidence finds, from three starts"
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
assert curves["diagonal"][1].prior["0"] > 2 * curves["Kronecker"][1].prior["0"]

model, p = curves["Kronecker"]  # one network, one prior, one noise: what do both say of it?
same = laplace(model, SQUARED, [(x, y)], p.prior, p.beta, diagonal)
for name, q in {"Kronecker": p, "diagonal": same}.items():
    print(
        f"{name:10} on one network: {sum(map(float, effective_parameters(q).values())):.1f} determined"
    )
assert sum(effective_parameters(same).values()) > sum(effective_parameters(p).values())

# %% [markdown]
# The diagonal's noise is too large. It drops the weights' correlations, so that more of them look determined than
# are. Then MacKay's step asks for a larger prior precision, and the fit gets worse, which is taken for noise.
#
# After a step the weights are trained again and $M$ moves. Nothing says that the evidence of the new weights is
# larger, so watch it. `mackay_shared` has one number for all layers, which is the safer start.
#
# ## A prior for each input
#
# Could the evidence find out which inputs matter? Give column $i$ of a layer's $W$ its own precision $d_i$. MacKay
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

# %%
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
# We put a second image beside every digit, of the same size, that is pure noise. The network does not know which
# is which. With one prior for all inputs, it fits the noise of its few training images. With a prior per input it
# can switch inputs off.

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
        print(
            f"seed {seed}, {name:12}: evidence {log_evidence(p):7.1f}, accuracy {accuracy:.3f},",
            end=" ",
        )
        print(
            f"determined: {of_inputs[:64].sum():.1f} of the digit, {of_inputs[64:128].sum():.1f} of the noise"
        )

# %% tags=["hide-input"] alt="A map of 8 by 16 pixels. The left half, the digit, has a pattern of small and large precisions, with large ones at the left and right border. The right half, the noise, has large precisions everywhere." caption="Logarithm of the precision that every input pixel got, seed 0. Left half: the digit. Right half: noise. Bright pixels are switched off."
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
# The noise is switched off, and no validation set was used. A pixel that is zero in all training images does not enter
# the evidence: its weights are zero and the data determine none of them. The step is then 0/0, and the package takes
# the largest precision that it allows.
#
# ## While a network trains
#
# So far each step of the prior waited until the weights were near a minimum. The prior can also move while they are on
# their way ([Immer et al., 2021](bibliography.md#marglik), with gradient steps for the prior). A random batch of $b$ of
# $N$ data, whose losses have the sum $L_{\text{batch}}$, estimates $J$ by
#
# $$
# \frac{N}{b} \, \beta L_{\text{batch}}(W) + \sum_l \tfrac{\delta_l}{2} \lVert W_l \rVert^2 .
# \tag{29.6}
# $$
#
# Any optimizer can minimise it. Every few epochs the curvature is computed at the present weights, and the prior takes
# MacKay's step. `OnlinePrior` holds the objective and takes the step:

# %% tags=["remove-input"]
code(OnlinePrior.objective, OnlinePrior.update)

# %% [markdown]
# A third of the labels of our training digits are replaced by random ones. With a small decay the network learns many
# of them by heart. With too strong a decay it learns too little. We train once with each decay of a list, and judge
# each network on test data. And we train once with a prior that moves, without any test data.


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
    print(
        f"seed {seed}: best of the list {fixed[seed, best]:.3f} with {decays[best]:g},"
        f" online {right:.3f} with {prior:.1f}, smallest decay {fixed[seed, 0]:.3f}"
        f" (training labels: {by_heart[seed]:.3f})"
    )
    assert right > fixed[seed, 0] + 0.05
    assert right > fixed[seed, best] - 0.03
    assert by_heart[seed] > 0.85  # about 0.7 of the labels are right
    assert fixed[seed, -1] < fixed[seed, best] - 0.05

# %% tags=["hide-input"] alt="The test accuracy rises with the decay up to a maximum and falls steeply beyond it. The three points of the online prior lie close to the top." caption="Test accuracy with a third of the training labels random. Line and band: a training for each decay, median and range of three seeds. Points: one training for each seed, whose prior moved without test data."
fig, ax = plt.subplots(figsize=(6.5, 3.4), layout="constrained")
low, high = fixed.min(0).values.cpu(), fixed.max(0).values.cpu()
ax.fill_between(decays, low, high, alpha=0.3, lw=0)
ax.semilogx(decays, fixed.median(0).values.cpu(), label="fixed decay")
ax.plot([prior for *_, prior in chosen], [right for right, *_ in chosen], "o", label="online")
ax.set(xlabel="prior precision (weight decay)", ylabel="test accuracy")
ax.legend()
plt.show()

# %% [markdown]
# The test accuracy is near the best of the list. Nothing guarantees that: [(29.2)] neglects the gradient of $J$, which
# is not zero yet. And the first step has to wait. A network with random weights is unsure of every image, so that its
# curvature is large, and its weights are small. So $\gamma / \lVert W \rVert^2$ is a large decay, which would keep the
# network from learning:

# %%
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
# A distribution over weights gives one over outputs. The network is replaced by its tangent at the trained weights,
# $f(x, \hat W + \Delta) \approx f(x, \hat W) + \mathrm J(x) \Delta$, with the Jacobian $\mathrm J$. Then outputs are
# normal, with covariance $\mathrm J \Sigma \mathrm J^\top$ and the $\Sigma$ of [(29.1)]. A row of $\mathrm J$ is the
# gradient of one output, and a `LayerIO` whose vectors are unit vectors holds these gradients. So the
# covariance is a sum of quadratic forms over layers:

# %% tags=["remove-input"]
code(functional_covariance, output_vectors)

# %% [markdown]
# Why the tangent? The Gauss-Newton matrix is the exact curvature of the *linearised* network. The posterior belongs to
# that network, not to the trained one. Sampled weights in the network itself meet a nonlinearity that the
# curvature never saw. We do both with the same samples.

# %%
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


def both_ways(sampled: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Class probabilities with sampled weights, in the network and in its tangent."""
    moved = {name: sampled[name] - W for name, W in p.weights.items()}
    f, change = torch.func.jvp(outputs, (dict(p.weights),), (moved,))
    return outputs(sampled).softmax(1), (f + change).softmax(1)


through, tangent = (t.mean(0) for t in torch.vmap(both_ways)(samples))
trained, sent, linearised = map(accuracy, (model(X_test), through, tangent))
print(
    f"accuracy: trained weights {trained:.3f}, samples through the tangent {linearised:.3f},",
    end=" ",
)
print(f"samples through the network {sent:.3f}")
assert linearised > trained - 0.1
assert sent < linearised - 0.1

# %% [markdown]
# The probabilities are as good as the prior is. With this prior, which was not chosen by the
# evidence, the tangent is too cautious: it is right more often than its confidence says.

# %%
right, sure = accuracy(tangent), tangent.max(1).values.mean().item()
print(
    f"samples through the tangent: right in {right:.2f} of the images, with a confidence of {sure:.2f}"
)
assert sure < right - 0.1

# %% [markdown]
# ## In one minute
#
# - Curvature of the *sum* of losses plus prior precision is the precision of the weights.
# - The evidence is fit minus price of complexity. With Kronecker factors it needs one decomposition of each factor, and
#   so do its derivatives.
# - It chooses weight decay, noise, and with [Theorem 29.2] the inputs, without validation data. A single training
#   can be enough.
# - The diagonal is not enough: it misses the weights' correlations.
# - Sample in the tangent, not in the network.
#
# A network that was trained with another weight decay is at no minimum of $J$, which [(29.1)] needs. And evidences of
# different structures are not to be compared.
#
# ## Exercises
#
# **Exercise 29.1.** The prior expects $\delta \lVert W \rVert^2$ to be the number $D$ of parameters. Show that the
# posterior expects the same if and only if $\delta \lVert \hat W \rVert^2 = \gamma$, which is MacKay's fixed point.
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
# The solutions, checked:

# %% tags=["hide-input"]
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
print("all hold")

# %% [markdown]
# ## Further reading
#
# [MacKay (1992)](bibliography.md#evidence) for the evidence; [Ritter, Botev and Barber
# (2018)](bibliography.md#kfac-laplace) for Kronecker factors in it; [Immer et al. (2021)](bibliography.md#marglik) for
# choosing hyper-parameters during training; [Daxberger et al. (2021)](bibliography.md#laplace-redux) and their library
# laplace-torch.
