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
# # 22. Laplace: how sure is a network?
#
# **Part V: Curvature in use.** A trained network gives one answer. How sure is it of that answer, and how large
# should its weight decay have been?
#
# Training finds the weights at which a loss is smallest. The curvature there says what else would have
# fitted almost as well: in a flat direction, very different weights do. So curvature turns one set of
# weights into a distribution over weights. From it follow error bars, and a number that compares weight decays
# without validation data. Nothing is trained again; all that is needed is a matrix for each layer, which the
# chapters before have made.

# %% tags=["hide-input"]
import math
from collections.abc import Callable
from functools import partial

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
from kfac_scratch.show import code

set_up()  # seed 0, float64, the GPU where there is one


def block(io: LayerIO) -> Dense:
    """The exact block of a layer."""
    return Dense(io.block())


def diagonal(io: LayerIO) -> Diagonal:
    """Its diagonal."""
    return Diagonal(io.gradients().square().sum((0, 1)))


# %% [markdown]
# Here is what comes out, on a curve that was measured on the left and on the right but not in the middle. A
# small network fits it. The bands are two standard deviations, for two approximations of the same curvature.
# The one with Kronecker factors knows where there were no data.


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
NOISE = 0.2  # that of the data, which nobody tells the network
x = torch.cat([torch.rand(50, 1) * 2 - 4, torch.rand(50, 1) * 2 + 2])
y = x.sin() + NOISE * torch.randn_like(x)


def curve_objective(model: nn.Module, prior: float, beta: float) -> Tensor:
    return beta * SQUARED(model(x), y) + prior / 2 * squares(model)


def regression(approximation: Callable, rounds: int = 12) -> tuple[nn.Module, Laplace]:
    """Fit the curve, choose prior and noise by the evidence, fit again, and so on."""
    torch.manual_seed(0)
    model, prior, beta = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 1)), 0.1, 5.0
    for _ in range(rounds):
        train(model, partial(curve_objective, model, prior, beta), 100)
        p = laplace(model, SQUARED, [(x, y)], prior, beta, approximation)
        prior, beta = mackay_shared(p).prior["0"], mackay_noise(p).beta
    train(model, partial(curve_objective, model, prior, beta), 100)
    return model, laplace(model, SQUARED, [(x, y)], prior, beta, approximation)


curves = {"Kronecker": regression(kfac), "diagonal": regression(diagonal)}

# %% tags=["hide-input"] alt="Two plots of a fitted sine curve with noisy points on the left and the right and none in the middle. With Kronecker factors, the band around the curve is narrow at the points and wide in the middle and outside. With the diagonal it has the same large width everywhere." caption="A network's fit and two standard deviations of its output. Left: with Kronecker factors. Right: with the diagonal of the same curvature. Prior and noise were chosen by the evidence in both."
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
# $e^{-\beta L}$ is the probability of the data, up to a constant, if the loss is a negative log-likelihood. The
# other term is the logarithm of a normal prior with precision $\delta_l$. So $J$ is the negative logarithm of
# the posterior. [Laplace's approximation](bibliography.md#laplace) replaces $J$ by its parabola at the minimum.
# Its Hessian is $\beta M + \delta I$, with the curvature $M$ of $L$. A normal distribution is what has a parabola
# as its negative logarithm:
#
# $$
# p(W \mid \text{data}) \approx \prod_l \mathcal N \bigl( W_l, \; (\beta M_l + \delta_l I)^{-1} \bigr) .
# \tag{22.1}
# $$
#
# We take the generalised Gauss-Newton matrix for $M$, which is never negative, and one block for each layer.
#
# <div class="admonition warning" markdown="1">
# <p class="admonition-title">The scale of the loss</p>
#
# Here a factor in $M$ is no matter of taste. With the curvature of a *mean* loss, the posterior would be
# that of a single datum: much too wide. `laplace` refuses a mean loss. $\delta$ is the weight decay of the
# sum; the decay of a mean over $N$ data is $\delta / N$.
#
# </div>
#
# For the squared error, PyTorch's loss has no $\tfrac12$ in front. So a normal noise with variance $\sigma^2$ means
# $\beta = 1 / (2 \sigma^2)$. For cross-entropy, $\beta$ is 1.
#
# ### Where it is exact
#
# A linear model under the squared error has a $J$ that *is* a parabola. Then [(22.1)] is the posterior of
# Bayesian linear regression. With KFAC, too: the vectors of the squared error are the same for all data, so
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
assert_exact(p.weights[""], W)
assert_exact(covariance[:, 0, 0], ((phi @ P.inverse()) * phi).sum(1))

# %% [markdown]
# ## The evidence
#
# How probable are the data under the whole model, whatever the weights? That is the integral over all weights of
# likelihood times prior, the **evidence** $Z$. The integral of a normal distribution is known, by the determinant
# of its precision. Divided by the same integral of the prior, this leaves
#
# $$
# \log Z = -\beta L - \tfrac{n}{2} \log \tfrac{\pi}{\beta}
# - \sum_l \Bigl[ \tfrac{\delta_l}{2} \lVert W_l \rVert^2
# + \tfrac12 \log \det \bigl( I + \tfrac{\beta}{\delta_l} M_l \bigr) \Bigr] .
# \tag{22.2}
# $$
#
# The second term is there for the squared error alone, of $n$ numbers; it is the noise's own normaliser. The first
# term rewards a good fit. The last one is the price of complexity: it grows with every direction of the weights
# that the data have narrowed down. A large $\delta$ makes the price small and the fit bad, and the
# evidence weighs one against the other.
#
# With the eigenvalues $s_i$ of $M$ the last term is $\tfrac12 \sum_i \log(1 + \beta s_i / \delta)$. A singular $M$
# is no trouble. For $B \otimes A$ the eigenvalues are the products of the factors', so that two
# small decompositions are enough.

# %% tags=["beside", "remove-input"]
code(log_evidence)

# %% [markdown]
# For the linear model it is the probability of the targets, which are normal, too: with the noise and with
# what the prior lets the weights do.

# %%
targets = MultivariateNormal(torch.zeros(11), torch.eye(11) / (2 * beta) + Phi @ Phi.T / prior)
exact = sum(targets.log_prob(column) for column in Y.T)
print(f"probability of the targets, logarithm: {exact:.4f}")
for structure in (block, kfac, ekfac, diagonal):
    value = log_evidence(laplace(linear, SQUARED, [(X, Y)], prior, beta, structure)).to(exact)
    print(f"    evidence, {structure.__name__:9}: {value:.4f}")
    if structure is diagonal:
        assert relative_error(value, exact) > 1e-3
    else:
        assert_exact(value, exact)

# %% [markdown]
# ### What may be compared
#
# <div class="admonition theorem" markdown="1" id="thm-22.1">
# <p class="admonition-title" markdown="1"><b>Theorem 22.1 (order of the evidences)</b></p>
#
# At the same weights, the evidence with EKFAC, and the one with the diagonal, is at most the evidence with the
# exact blocks.
#
# </div>
#
# *Proof.* Both keep the diagonal of the block in some orthonormal basis and drop the rest. By Hadamard's
# inequality, the determinant of a positive definite matrix is at most the product of its diagonal, in any
# basis. So the price of complexity rises. $\square$
#
# Both are therefore too modest, never too proud. KFAC has no such order, because its eigenvalues are no
# diagonal of the block. Random layers show both signs:


# %%
def price(io: LayerIO, structure: Callable) -> float:
    return float(torch.log1p(structure(io).eigenvalues()).sum())


signs = []
for seed in range(60):
    torch.manual_seed(seed)
    io = LayerIO(torch.randn(40, 1, 2), torch.randn(1, 40, 1, 2))
    assert price(io, block) <= min(price(io, ekfac), price(io, diagonal))
    signs.append(price(io, kfac) < price(io, block))
print(f"KFAC has the larger evidence in {sum(signs)} of {len(signs)} layers, and else the smaller")
assert 0 < sum(signs) < len(signs)

# %% [markdown]
# So evidences compare *models, priors and noises under one structure*. They do not compare structures.
#
# ## Climbing the evidence
#
# At fixed weights and curvature, [(22.2)] has simple derivatives. Let
#
# $$
# \gamma_l = \sum_i \frac{\beta s_{li}}{\beta s_{li} + \delta_l} .
# \tag{22.3}
# $$
#
# Each term is a number between 0 and 1: the share of the precision in one direction that comes from the data. So
# $\gamma$ counts how many parameters the data determine. Then
#
# $$
# \frac{\partial \log Z}{\partial \log \delta_l} = \tfrac12 (\gamma_l - \delta_l \lVert W_l \rVert^2),
# \qquad
# \frac{\partial \log Z}{\partial \log \beta} = -\beta L + \tfrac{n}{2} - \tfrac12 \sum_l \gamma_l .
# \tag{22.4}
# $$

# %%
model, p = curves["Kronecker"]
gamma = {name: g.item() for name, g in effective_parameters(p).items()}
total = sum(W.numel() for W in p.weights.values())
print(f"of {total} parameters the data determine {sum(gamma.values()):.1f}")


def at(log_delta: Tensor) -> Tensor:
    """The evidence as a function of the first layer's prior, for autodiff."""
    s, W = p.matrices["0"].eigenvalues(), p.weights["0"]
    return (
        -(log_delta.exp() * W.square().sum() + torch.log1p(p.beta * s / log_delta.exp()).sum()) / 2
    )


by_autodiff = torch.func.grad(at)(torch.tensor(p.prior["0"]).log())
assert_exact(evidence_gradient(p).log_prior["0"], by_autodiff.reshape(1))
assert 1 < sum(gamma.values()) < total / 2

# %% [markdown]
# Setting the derivatives to zero gives [MacKay's](bibliography.md#evidence) steps,
# $\delta = \gamma / \lVert W \rVert^2$ and $\sigma^2 = L / (n - \gamma)$. The second one is the textbook's estimate
# of a variance, with $\gamma$ parameters fitted.
#
# The weights move when the prior moves, so one trains a little, takes a step, and trains on. That is how the
# networks of the first figure got their priors. Nobody told them the noise:

# %%
for name, (_, p) in curves.items():
    sigma = (1 / (2 * p.beta)) ** 0.5
    print(f"{name:10} noise {sigma:.2f} (true: {NOISE}), prior {p.prior['0']:.2f}", end=", ")
    print(f"evidence {log_evidence(p):.1f}")
sigma = {name: (1 / (2 * p.beta)) ** 0.5 for name, (_, p) in curves.items()}
assert abs(sigma["Kronecker"] - NOISE) < 0.05
assert sigma["diagonal"] > 1.3 * sigma["Kronecker"]
places = torch.tensor([[-3.0], [0.0]])  # among the data, and in the gap
spread = {
    name: predicted_outputs(p, m, places)[1].flatten().sqrt() for name, (m, p) in curves.items()
}
assert spread["Kronecker"][1] > 2 * spread["Kronecker"][0]

# %% [markdown]
# The diagonal explains the curve as noise. It drops what the weights know of each other, so every weight
# seems more determined than it is. The price of complexity is overrated, and a large prior precision wins.
#
# MacKay's step is no ascent once the weights are trained again, because $M$ moves with them. Keep the best
# evidence that you see. With one prior per layer there is a nearly flat direction besides, since one layer's
# scale can be traded for another's; `mackay_shared` has one number for all.
#
# ## A prior for each input
#
# Could the evidence find out which inputs matter? Give column $i$ of the first layer's $W$ a precision $d_i$ of
# its own. MacKay called this *automatic relevance determination*: an input that explains nothing gets a precision
# so large that its weights vanish. The precision of the posterior becomes $\beta B \otimes A + I \otimes D$ with
# $D = \operatorname{diag}(d)$, which is a sum of two products and has no eigenvectors that are a product.
#
# <div class="admonition theorem" markdown="1" id="thm-22.2">
# <p class="admonition-title" markdown="1"><b>Theorem 22.2 (a prior for each column)</b></p>
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
# *Proof.* $(I \otimes D^{1/2}) (B \otimes A') (I \otimes D^{1/2}) = B \otimes D^{1/2} A' D^{1/2} = B \otimes A$.
# $\square$
#
# The matrix in the middle is a Kronecker product with damping 1. One more decomposition, of $A'$, gives
# covariance and determinant exactly.

# %%
d = torch.rand(5) + 0.1
p = laplace(linear, SQUARED, [(X, Y)], d, beta)
M = p.matrices[""].dense()
precision = beta * M + torch.kron(torch.eye(3), d.diag())
V = torch.randn(3, 5)
assert_exact((p.covariances()[""] @ V).flatten(), precision.inverse() @ V.flatten())
price_now = (precision.logdet() - 3 * d.log().sum()) / 2
by_hand = (
    -beta * p.loss - 33 / 2 * math.log(math.pi / beta) - (d * W.square()).sum() / 2 - price_now
)
assert_exact(log_evidence(p).to(by_hand), by_hand)

# %% [markdown]
# We put a second image beside every digit, of the same size, that is pure noise. The network does not know which
# is which. With one prior for all inputs, it fits the noise of its few training images. With a prior per input it
# can switch inputs off.

# %%
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
    """MacKay's step for each layer, told as columns."""
    gamma = effective_parameters(p)
    shared = {n: gamma[n].sum() / W.square().sum() for n, W in p.weights.items()}
    prior = {n: delta.expand(p.weights[n].shape[1]) for n, delta in shared.items()}
    return Laplace(p.weights, p.matrices, p.loss, p.numbers, prior, p.beta)


found = {}
for seed in (0, 1):
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
shown = ax.imshow(picture, cmap="viridis")
ax.set_xticks([3.5, 11.5], ["digit", "noise"])
ax.set_yticks([])
fig.colorbar(shown, ax=ax, label="log10 of the precision")
plt.show()

for seed in (0, 1):
    (one, accuracy), (each, better) = found[seed, "one prior"], found[seed, "a prior each"]
    assert log_evidence(each) > log_evidence(one)
    assert better > accuracy
    of_noise = [effective_parameters(p)["0"][64:128].sum() for p in (each, one)]
    assert of_noise[0] < of_noise[1] / 20

# %% [markdown]
# The noise is switched off, and so are the dead pixels at the border of the digits. No datum was held out.
#
# ## Predictions
#
# A distribution over weights gives one over outputs. The network is replaced by its tangent at the trained weights,
# $f(x, W + \Delta) \approx f(x, W) + J(x) \Delta$, with the Jacobian $J$. Then outputs are normal, with covariance
# $J \Sigma J^\top$. A row of $J$ is the gradient of one output, and a `LayerIO` whose vectors are unit
# vectors holds these gradients. So the covariance is a sum of quadratic forms over layers:

# %% tags=["beside", "remove-input"]
code(functional_covariance, output_vectors)

# %% [markdown]
# Why the tangent? The Gauss-Newton matrix is the exact curvature of the *linearised* network. The posterior fits that
# network, and not the one that was trained. If sampled weights are put into the network itself, they meet a
# nonlinearity that the curvature never saw. We do both with the same samples.

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
# <div class="admonition warning" markdown="1">
# <p class="admonition-title">What it does not give</p>
#
# On clean, easy data such as these digits, the tangent's probabilities are too cautious: accuracy is kept, and
# confidence drops below it. An error bar is worth most where data are few or noisy, and the evidence is worth most
# for choices that validation data would have to make.
#
# </div>
#
# ## In one minute
#
# - Curvature of the *sum* of losses plus prior precision is the precision of the weights.
# - The evidence adds fit and the price of complexity. With Kronecker factors it costs two small decompositions for
#   each layer, and its derivatives cost nothing more.
# - It chooses weight decay, noise, and with [Theorem 22.2] the inputs, without validation data.
# - The diagonal is not enough: it mistakes ignorance for certainty.
# - Predict with the tangent, not with sampled weights.
#
# Do not use it for a network that was trained with another weight decay: its weights are no minimum of $J$. And do
# not compare evidences of different structures.
#
# ## Exercises
#
# **Exercise 22.1.** Show that $\delta \lVert W \rVert^2 = \gamma$ at the prior of the largest evidence means: the
# determined directions have, on average, weights as large as the prior expects.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The prior expects $w_i^2 = 1 / \delta$ in each direction, so that $\delta w_i^2 = 1$. Directions that the data do not
# determine stay near 0 after training. With $\gamma$ directions of the expected size and the rest at 0, the sum
# $\delta \lVert W \rVert^2$ is $\gamma$.
#
# </details>
#
# **Exercise 22.2.** A block is called by another name and its curvature is multiplied by $c$ by mistake. How does the
# evidence's best prior change for a linear model, if $c$ is large?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# All directions with $c \beta s \gg \delta$ count as determined, so that $\gamma$ grows towards the number of
# parameters. MacKay's $\delta = \gamma / \lVert W \rVert^2$ grows with it: too strong a decay. A factor that
# training hides is visible here.
#
# </details>
#
# **Exercise 22.3.** Compute the posterior of the last layer alone. Which of its variances are the same as in the posterior
# of all layers, and why are the outputs' variances smaller?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Blocks are independent of each other, so the last layer's own covariance is the same. The outputs' covariance is a
# sum over layers of positive terms, of which one is left.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
gamma = effective_parameters(p)  # 22.2
larger = Laplace(
    p.weights, {n: Dense(100 * M.dense()) for n, M in p.matrices.items()}, p.loss, 0, p.prior
)
assert mackay(larger).prior["2"] > mackay(p).prior["2"]
last = laplace(model, CROSS, [(X, y)], prior=0.1, layers=["2"])  # 22.3
V = torch.randn_like(p.weights["2"])
assert_exact(last.covariances()["2"] @ V, p.covariances()["2"] @ V)
few = X_test[:5]
variances = [predicted_outputs(q, model, few)[1].diagonal(dim1=1, dim2=2) for q in (last, p)]
assert (variances[0] < variances[1]).all()
print("all hold")

# %% [markdown]
# ## Further reading
#
# [MacKay (1992)](bibliography.md#evidence) for the evidence; [Ritter, Botev and Barber (2018)](bibliography.md#kfac-laplace)
# for Kronecker factors in it; [Immer et al. (2021)](bibliography.md#marglik) for choosing hyper-parameters during
# training; [Daxberger et al. (2021)](bibliography.md#laplace-redux) and their library laplace-torch.
