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
# # 23. Influence: which data does an answer rest on?
#
# **Part V: Curvature in use.** A network gives a wrong answer. Which of the training data are to blame?
#
# The direct way to find out is to leave out a training sample, train again, and look at the answer. With 200 samples
# this takes 200 trainings. Curvature gives an estimate of all of them at the price of one product for each sample:
# at the end of training the loss is nearly a parabola, and the minimum of a parabola is known after a change, too.

# %% tags=["hide-input"]
from collections.abc import Callable
from copy import deepcopy
from textwrap import fill

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from kfac_scratch.applications.influence import (
    influence_by_block,
    influence_scores,
    inverse_as_sum,
    product_kernels,
    self_influence,
)
from kfac_scratch.applications.trained import trained_weights
from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import empirical
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.show import code

set_up()  # seed 0, float64, the GPU where there is one


def block(io: LayerIO) -> Dense:
    """The exact block of a layer."""
    return Dense(io.block())


def diagonal(io: LayerIO) -> Diagonal:
    """The diagonal of that block."""
    return Diagonal(io.gradients().square().sum((0, 1)))


def identity(io: LayerIO) -> Diagonal:
    """No curvature: scores are then inner products of gradients."""
    return Diagonal(torch.ones(io.g.shape[-1], io.a.shape[-1]))


# %% [markdown]
# Here is an image that a small network reads wrongly, with the training images that help it most and those that harm
# it most. To help means: without this image, the loss of the answer would be larger. A tenth of the labels
# was changed before training, and nobody told the network which.

# %% tags=["hide-input"]
N, WRONG, DECAY = 200, 20, 0.5
SUM = nn.CrossEntropyLoss(reduction="sum")
digits = load_digits()


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, the same for tests, and the places of wrong labels."""
    torch.manual_seed(seed)
    order = torch.randperm(len(digits.target))
    X, y = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
    wrong = torch.randperm(N)[:WRONG]
    y[wrong] = (y[wrong] + torch.randint(1, 10, (WRONG,))) % 10
    return X[:N], y[:N], X[N:], y[N:], wrong


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))


def decay(model: nn.Module) -> Tensor:
    return DECAY / 2 * sum(p.square().sum() for p in model.parameters())


def to_minimum(model: nn.Module, X: Tensor, y: Tensor, steps: int = 200) -> nn.Module:
    """Minimise the sum of losses and the weight decay with L-BFGS."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        history_size=30,
        tolerance_grad=1e-8,
        tolerance_change=1e-13,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = SUM(model(X), y) + decay(model)
        value.backward()
        return value

    optimizer.step(closure)
    return model


def inverses(model: nn.Module, X: Tensor, y: Tensor, structure: Callable, damping: float) -> dict:
    """The damped inverse of every block."""
    return {n: structure(io).inverse(damping) for n, io in layer_ios(model, SUM, X, y).items()}


X, y, X_test, y_test, wrong = problem(0)
model = to_minimum(network(), X, y, steps=600)
missed = (model(X_test).argmax(1) != y_test).nonzero().flatten()
by_kfac = inverses(model, X, y, kfac, DECAY)
scores = influence_scores(model, SUM, by_kfac, [(X_test[missed], y_test[missed])], [(X, y)])
q = int(scores.min(1).values.argmin())  # the answer with the most harmful image
query = X_test[missed[q]].unsqueeze(0), y_test[missed[q]].unsqueeze(0)
order = scores[q].argsort(descending=True)
helps, harms = order[:5], order.flip(0)[:5]

# %% tags=["hide-input"] alt="An image of a digit on the left. To the right, two rows of five training images each, those that help and those that harm, with their labels. Frames mark images whose label was changed." caption="Left: an image that the network reads wrongly. Right: the five training images that help most, above, and that harm most, below, with their labels. A frame marks a label that was changed."
fig, axes = plt.subplots(2, 7, figsize=(9, 3.2), layout="constrained")
for ax in axes.flat:
    ax.set_axis_off()
said = int(model(query[0]).argmax())
grid = fig.add_subplot(axes[0, 0].get_gridspec()[:, :2])
grid.imshow(query[0].reshape(8, 8).cpu().numpy(), cmap="viridis")
grid.set_axis_off()
grid.set_title(f"a {int(query[1])}, read as {said}")
for row, (what, chosen) in enumerate((("helps", helps), ("harms", harms))):
    for ax, n in zip(axes[row, 2:], chosen.tolist(), strict=True):
        ax.imshow(X[n].reshape(8, 8).cpu().numpy(), cmap="viridis")
        ax.set_title(f"{what}: {int(y[n])}", fontsize=10)
        if n in wrong:
            ax.add_patch(
                plt.Rectangle((-0.5, -0.5), 8, 8, fill=False, lw=4, ec="C3", clip_on=False)
            )
plt.show()

# %% tags=["hide-input"]
harmful = torch.isin(harms, wrong).sum().item()
print(f"the labels of the images that harm most: {y[harms].tolist()}, the answer: {said}")
print(f"of these five images, {harmful} have a changed label, of all images {WRONG} in {N}")
assert harmful >= 3
assert (y[helps] == query[1]).all()

# %% [markdown]
# ## Leaving one out
#
# Training ends at a minimum $\hat W$ of
#
# $$
# J(W) = \sum_n \ell_n(W) + \tfrac{\delta}{2} \lVert W \rVert^2 ,
# $$
#
# with the **sum** of the losses and its weight decay $\delta$. Let $\hat W(\varepsilon)$ be the minimum of
# $J - \varepsilon \ell_n$. At $\varepsilon = 1$, sample $n$ is left out. The gradient is zero at every such minimum:
#
# $$
# \nabla J(\hat W(\varepsilon)) = \varepsilon \, \nabla \ell_n(\hat W(\varepsilon)) .
# $$
#
# Differentiate both sides by $\varepsilon$ at 0. On the left the chain rule gives the Hessian of $J$ times
# $\hat W'$, on the right $\nabla \ell_n$ is left. For the Hessian of the losses we take the Gauss-Newton matrix
# $M$, which is positive semi-definite and has Kronecker factors:
#
# $$
# \hat W'(0) = (M + \delta I)^{-1} \, \nabla \ell_n .
# \tag{23.1}
# $$
#
# A query $q$ is any sample, seen or not. When $n$ is left out, its loss changes to first order by the **influence**
#
# $$
# s_{qn} = \bigl\langle \nabla \ell_q , \; (M + \delta I)^{-1} \, \nabla \ell_n \bigr\rangle .
# \tag{23.2}
# $$
#
# If $s_{qn}$ is positive, leaving $n$ out makes the query's loss larger, so that $n$ helps. No number of samples is
# in the formula, and no free damping: $\delta$ is the weight decay.
#
# ### Where the whole change is known
#
# <div class="admonition theorem" markdown="1" id="thm-23.1">
# <p class="admonition-title" markdown="1"><b>Theorem 23.1 (ridge regression)</b></p>
#
# Let the model be linear with one output, and the loss the squared error. Without sample $n$, the minimum moves by exactly
# $(M + \delta I)^{-1} \nabla \ell_n / (1 - h_n)$, with the leverage $h_n = 2 x_n^\top (M + \delta I)^{-1} x_n$.
#
# </div>
#
# *Proof.* Write $P = M + \delta I$ for the Hessian of $J$. Without the sample, the Hessian is $P - 2 x_n x_n^\top$, and
# the gradient at the old minimum is $-\nabla \ell_n$. A parabola's minimum is one Newton step away, so the move is
# $(P - 2 x_n x_n^\top)^{-1} \nabla \ell_n$. By the Sherman-Morrison formula that inverse is
# $P^{-1} + 2 P^{-1} x_n x_n^\top P^{-1} / (1 - h_n)$. Now $\nabla \ell_n$ is a multiple of $x_n$, so that the second term
# is $h_n / (1 - h_n)$ times the first one. $\square$
#
# So the score is too small by the sample's leverage. Leverage lies between 0 and 1. It is small where many samples
# share the work.

# %%
SQUARED = nn.MSELoss(reduction="sum")
Phi, t, ridge = torch.randn(12, 3), torch.randn(12, 1), 0.8
P = 2 * Phi.T @ Phi + ridge * torch.eye(3)
w = torch.linalg.solve(P, 2 * Phi.T @ t)
linear = nn.Linear(3, 1, bias=False)
with torch.no_grad():
    linear.weight.copy_(w.T)

new = torch.randn(4, 3), torch.randn(4, 1)
M = {name: kfac(io) for name, io in layer_ios(linear, SQUARED, Phi, t).items()}
scored = influence_scores(
    linear, SQUARED, {name: K.inverse(ridge) for name, K in M.items()}, [new], [(Phi, t)]
)
moves = []
for n in range(len(Phi)):  # train again without each sample
    rest = torch.arange(len(Phi)) != n
    A, b = Phi[rest], t[rest]
    moves.append(torch.linalg.solve(2 * A.T @ A + ridge * torch.eye(3), 2 * A.T @ b) - w)
slopes = 2 * (new[0] @ w - new[1]) * new[0]  # of each query's loss
exact = slopes @ torch.cat(moves, 1)
leverage = 2 * ((Phi @ P.inverse()) * Phi).sum(1)
assert_exact(scored / (1 - leverage), exact)
print(f"leverage from {leverage.min():.2f} to {leverage.max():.2f}")
print(f"error of the scores alone: {relative_error(scored, exact):.0%}")
assert relative_error(scored, exact) > 0.02

# %% [markdown]
# ## The scores of a network
#
# A naive version forms the gradient of every sample and the whole matrix of every block, and solves:

# %%
few = X_test[:3], y_test[:3]


def gradient(x: Tensor, label: Tensor) -> dict[str, Tensor]:
    """The gradient of one sample's loss, `[W | b]` for every layer."""
    loss = SUM(model(x.unsqueeze(0)), label.unsqueeze(0))
    W0, b0, W2, b2 = torch.autograd.grad(loss, model.parameters())
    layers = {"0": (W0, b0), "2": (W2, b2)}
    return {name: torch.cat([W, b.unsqueeze(1)], 1).flatten() for name, (W, b) in layers.items()}


naive = torch.zeros(3, N)
for name, io in layer_ios(model, SUM, X, y).items():
    K = kfac(io).dense()
    of_queries = torch.stack([gradient(*sample)[name] for sample in zip(*few, strict=True)])
    of_data = torch.stack([gradient(*sample)[name] for sample in zip(X, y, strict=True)])
    naive += of_queries @ torch.linalg.solve(K + DECAY * torch.eye(len(K)), of_data.T)

# %% [markdown]
# The package multiplies the gradients of the queries by the inverse, once. Then the training data pass by, batch
# by batch, and only one batch's gradients of one block are there at a time.

# %% tags=["remove-input"]
code(influence_by_block)

# %%
assert_exact(influence_scores(model, SUM, by_kfac, [few], [(X, y)]), naive)
batches = list(zip(X.split(64), y.split(64), strict=True))
assert_exact(influence_scores(model, SUM, by_kfac, [few], batches), naive)

# %% [markdown]
# Is it true? Leave out the image that harms the query of the first figure most, and train on from the old weights:


# %%
def without(samples: Tensor) -> nn.Module:
    """The network after some images are left out."""
    stays = ~torch.isin(torch.arange(N), samples)
    return to_minimum(deepcopy(model), X[stays], y[stays], steps=60)


after = without(harms[:1])
before_loss, after_loss = (SUM(m(query[0]), query[1]).item() for m in (model, after))
answer = int(after(query[0]).argmax())
print(f"before: a {int(query[1])}, read as {said}, loss {before_loss:.2f}")
print(f"without one image of {N}: read as {answer}, loss {after_loss:.2f}")
print(f"predicted change {scores[q].min():.2f}, real change {after_loss - before_loss:.2f}")
assert answer == query[1]
assert after_loss < before_loss / 2
assert scores[q].min() < after_loss - before_loss  # the first order goes too far

# %% [markdown]
# The sign is right, the size is not: a loss cannot fall below zero, and (23.2) is a straight line. How good is the line?
# In a network two things differ from the theory: $M$ is not the Hessian, and training finds other minima. The
# last layer alone, with the hidden units fixed, has neither trouble. Its loss is convex, $M$ is the Hessian, and
# Newton's method finds the minimum to all digits.


# %%
def hidden(X: Tensor) -> Tensor:
    """The hidden units and a 1, the inputs of the last layer."""
    return torch.cat([model[1](model[0](X)), torch.ones(len(X), 1)], 1).detach()


Z = hidden(X)
TARGETS = nn.functional.one_hot(y, 10).to(Z)


def last_layer(weights: Tensor) -> Tensor:
    """Its minimum, with a weight for every sample's loss, by Newton's method."""
    W = torch.zeros(10, Z.shape[1])
    for _ in range(30):
        p = (Z @ W.T).softmax(1)
        slope = (weights.unsqueeze(1) * (p - TARGETS)).T @ Z + DECAY * W
        if slope.abs().max() < 1e-12:
            return W
        curved = weights[:, None, None] * (p.diag_embed() - p.unsqueeze(2) * p.unsqueeze(1))
        H = torch.einsum("nab,ni,nj->aibj", curved, Z, Z).reshape(W.numel(), -1)
        H.diagonal().add_(DECAY)
        W = W - torch.linalg.solve(H, slope.flatten()).reshape(W.shape)
    raise AssertionError("Newton's method did not converge")


best = nn.Sequential(nn.Linear(16, 10))
W = last_layer(torch.ones(N))
with torch.no_grad():
    best[0].weight.copy_(W[:, :-1])
    best[0].bias.copy_(W[:, -1])
asked = hidden(X_test[:10]), y_test[:10]
in_turn = {
    s.__name__: influence_scores(
        best,
        SUM,
        inverses(best, Z[:, :-1], y, s, DECAY),
        [(asked[0][:, :-1], asked[1])],
        [(Z[:, :-1], y)],
    )
    for s in (block, kfac)
}


def losses_of(W: Tensor) -> Tensor:
    return cross_entropy(asked[0] @ W.T, asked[1], reduction="none")


off = []
for step in (1e-1, 1e-2, 1e-3):  # differences around the weight 1 of one sample
    moved = torch.ones(2, N)
    moved[0, 7] -= step
    moved[1, 7] += step
    slope = (losses_of(last_layer(moved[0])) - losses_of(last_layer(moved[1]))) / (2 * step)
    off.append(relative_error(slope, in_turn["block"][:, 7]))
    print(f"weight of sample 7 changed by {step:g}: error of the score {off[-1]:.0e}")
assert 80 < off[0] / off[1] < 120  # a second order: the score is the derivative
assert off[2] < 1e-4

# %% [markdown]
# The score is the derivative. To leave a sample out is a large step along it:

# %%
chosen = torch.cat([wrong[:20], torch.arange(0, N, 10)]).unique()
real = []
for n in chosen.tolist():
    weights = torch.ones(N)
    weights[n] = 0
    real.append(losses_of(last_layer(weights)) - losses_of(W))
real = torch.stack(real, 1)
odd = torch.isin(chosen, wrong)
slopes_of = {}
for name, values in in_turn.items():
    print(name)
    for label, which in (("right labels", ~odd), ("changed labels", odd)):
        x, r = values[:, chosen[which]].flatten(), real[:, which].flatten()
        correlation = torch.corrcoef(torch.stack([x, r]))[0, 1].item()
        slopes_of[name, label] = float((x * r).sum() / x.square().sum())
        print(f"    {label:15} correlation {correlation:.3f},", end=" ")
        print(f"real change over prediction {slopes_of[name, label]:.2f}")
        assert correlation > 0.6
assert min(slopes_of["block", label] for label in ("right labels", "changed labels")) > 1.2

# %% tags=["hide-input"] alt="A scatter plot of the predicted against the real change of the losses of ten queries for 40 left-out images. With the exact block the points lie along the diagonal; with KFAC they scatter around it." caption="The last layer: predicted and real change of the losses of ten queries, when each of 40 images is left out. The line is where both are equal."
fig, ax = plt.subplots(figsize=(5, 4), layout="constrained")
for (name, values), marker in zip(in_turn.items(), "ox", strict=True):
    ax.plot(values[:, chosen].flatten().cpu(), real.flatten().cpu(), marker, label=name, ms=4)
ends = [float(real.min()), float(real.max())]
ax.plot(ends, ends, lw=1, ls="--")
ax.set(xlabel="predicted change", ylabel="change after training again")
ax.legend()
plt.show()

# %% [markdown]
# The real changes are larger than those that the exact block predicts, as leverage makes them in
# [Theorem 23.1]. KFAC's predictions scatter more, and some are too large.
#
# ## Two kernels
#
# A linear layer's gradient is an error times an input, $\nabla \ell = g a^\top$. With an inverse that is itself a Kronecker
# product $\mathcal B \otimes \mathcal A$, such as that of damped factors ([Chapter 8](08_damping.py)), the score of
# the layer is a product:
#
# $$
# \bigl\langle g_q a_q^\top , \; \mathcal B \, g_n a_n^\top \mathcal A \bigr\rangle
# = (g_q^\top \mathcal B \, g_n) \, (a_q^\top \mathcal A \, a_n) .
# \tag{23.3}
# $$
#
# The first factor says how alike the errors are, the second one how alike the inputs are. A training image has a
# large influence only if both are large. No gradient is formed, so that a score costs $d_{out} + d_{in}$ operations
# instead of $d_{out} d_{in}$.

# %% tags=["remove-input"]
code(product_kernels)

# %%
rows = {
    which: layer_ios(model, SUM, *part, empirical) for which, part in (("q", query), ("n", (X, y)))
}
K = kfac(layer_ios(model, SUM, X, y)["2"])  # the last layer
errors, inputs = product_kernels(factored_inverse(K, DECAY), rows["q"]["2"], rows["n"]["2"])
by_gradients = influence_scores(model, SUM, {"2": factored_inverse(K, DECAY)}, [query], [(X, y)])
assert_exact(errors * inputs, by_gradients)

# %% tags=["hide-input"] alt="A scatter plot with one point for each training image: how alike the hidden units are on the horizontal axis, how alike the errors are on the vertical axis. Images with the query's label and with the answer's label lie far from the horizontal axis." caption="The two kernels of the last layer between the query and every training image. The score is the product of both coordinates."
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
kinds = {f"label {int(query[1])}": y == query[1], f"label {said}": y == said}
kinds["other labels"] = ~(kinds[f"label {int(query[1])}"] | kinds[f"label {said}"])
for (name, which), marker in zip(kinds.items(), "os.", strict=True):
    ax.plot(inputs[0, which].cpu(), errors[0, which].cpu(), marker, label=name, ms=5)
ax.axhline(0, lw=0.5)
ax.axvline(0, lw=0.5)
ax.set(xlabel="inputs alike", ylabel="errors alike")
ax.legend()
plt.show()

# %% [markdown]
# With the exact damping of [(23.2)] the inverse has the eigenvalues $1 / (s_{oi} + \delta)$, which are no products. But a
# few terms of a singular value decomposition make them to any precision, so that a few pairs of kernels are enough.
# Where do errors matter? Along an eigenvector with the eigenvalue $s_{oi}$, the gradients of a query and of a sample are
# each about $\sqrt{s_{oi}}$ large. So errors are weighed by $s_{oi}$.

# %% tags=["remove-input"]
code(inverse_as_sum)

# %%
first = layer_ios(model, SUM, X, y)["0"]
a_few = layer_ios(model, SUM, X_test[:20], y_test[:20], empirical)["0"]
print(f"first layer, {first.g.shape[-1]} x {first.a.shape[-1]}")
for structure in (kfac, ekfac):
    M0 = structure(first)
    whole = influence_scores(
        model, SUM, {"0": M0.inverse(DECAY)}, [(X_test[:20], y_test[:20])], [(X, y)]
    )
    sizes = []
    for tolerance in (1e-1, 1e-2, 1e-4):
        terms = inverse_as_sum(M0, DECAY, tolerance)
        pairs = [product_kernels(term, a_few, rows["n"]["0"]) for term in terms]
        error = relative_error(sum(e * a for e, a in pairs), whole)
        print(f"    {structure.__name__:5} {len(terms):2} terms: error {error:.0e}")
        sizes.append((len(terms), error))
    assert sizes[0][0] < sizes[2][0] <= 16
    assert sizes[2][1] < 1e-2 * sizes[0][1]
    assert sizes[1][1] < 0.1

# %% [markdown]
# ## The damping is the weight decay
#
# In many codes the damping of influence is a number to be tuned. [(23.2)] leaves no choice. To check this on a network,
# where nothing is exact, leave out half of the training data at random, and train again from the beginning. By
# [(23.2)] the half $H$ that stays gives the query a loss of a constant minus $\sum_{n \in H} s_{qn}$. The rank
# correlation between this and the real losses, over many halves, is the
# [linear datamodeling score](bibliography.md#trak): 1 would be perfect.

# %% tags=["hide-input"]
HALVES, QUERIES = 30, 60


def train_on_each(masks: Tensor, X: Tensor, y: Tensor, steps: int = 300) -> dict[str, Tensor]:
    """One network for every mask, all trained at once with Adam."""
    models = [network() for _ in masks]
    values, _ = stack_module_state(models)
    values = {name: v.detach().clone().requires_grad_() for name, v in values.items()}
    adam = torch.optim.Adam(values.values(), lr=0.03, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 0.01, steps)
    for _ in range(steps):
        f = vmap(lambda p: functional_call(models[0], p, (X,)))(values)
        losses = cross_entropy(f.transpose(1, 2), y.expand(len(masks), -1), reduction="none")
        value = (losses * masks).sum() + DECAY / 2 * sum(v.square().sum() for v in values.values())
        adam.zero_grad()
        value.backward()
        adam.step()
        schedule.step()
    return {name: v.detach() for name, v in values.items()}


def ranks(x: Tensor) -> Tensor:
    return x.argsort(0).argsort(0).to(x)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Of the columns of two matrices, the mean over columns."""
    x, y = (ranks(t) - (len(t) - 1) / 2 for t in (x, y))
    return float(((x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt()).mean())


STRUCTURES = {"block": block, "KFAC": kfac, "EKFAC": ekfac, "diagonal": diagonal}
DAMPINGS = (DECAY / 10, DECAY, 10 * DECAY)


def experiment(seed: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """The score of every structure at every damping; how many wrong labels are found."""
    X, y, X_test, y_test, wrong = problem(seed)
    masks = torch.stack([(torch.randperm(N) < N // 2).to(X) for _ in range(HALVES)])
    everything = torch.cat([torch.ones_like(masks[:1]), masks])
    values = train_on_each(everything, X, y)
    queries = X_test[:QUERIES], y_test[:QUERIES]
    model = network()
    f = vmap(lambda p: functional_call(model, p, (queries[0],)))(values)[1:]
    labels = queries[1].expand(HALVES, -1)
    losses = cross_entropy(f.transpose(1, 2), labels, reduction="none")  # [HALVES, QUERIES]
    model.load_state_dict({name: v[0] for name, v in values.items()})
    to_minimum(model, X, y)
    ios = layer_ios(model, SUM, X, y)

    def quality(structure: Callable, damping: float) -> float:
        chosen = {name: structure(io).inverse(damping) for name, io in ios.items()}
        s = influence_scores(model, SUM, chosen, [queries], [(X, y)])
        return rank_correlation(-masks @ s.T, losses)

    found = {n: [quality(s, d) for d in DAMPINGS] for n, s in STRUCTURES.items()}
    found["gradients alone"] = [quality(identity, 1.0)] * len(DAMPINGS)
    own = {name: kfac(io).inverse(DECAY) for name, io in ios.items()}
    suspects = {
        "self-influence": self_influence(model, SUM, own, [(X, y)]),
        "loss": cross_entropy(model(X), y, reduction="none").detach(),
    }
    hits = {n: int(torch.isin(s.topk(WRONG).indices, wrong).sum()) for n, s in suspects.items()}
    return found, hits


outcomes = [experiment(seed) for seed in range(3)]
qualities = {
    name: torch.tensor([found[name] for found, _ in outcomes]) for name in outcomes[0][0]
}  # [seeds, dampings]

# %%
print("rank correlation with real losses: median of three seeds (smallest to largest)")
for name, values in qualities.items():
    cells = [f"{v.median():.2f} ({v.min():.2f} to {v.max():.2f})" for v in values.T]
    print(f"    {name:16}" + "   ".join(cells))
print("    damping         " + "   ".join(f"{d:<19g}" for d in DAMPINGS))
assert (qualities["block"][:, 1] > qualities["block"][:, [0, 2]].max(1).values).all()
assert (qualities["KFAC"][:, 1] > qualities["KFAC"][:, 2]).all()
assert (qualities["KFAC"][:, 1] - qualities["EKFAC"][:, 1]).abs().max() < 0.05
assert (qualities["KFAC"][:, 1] > qualities["diagonal"].max(1).values + 0.1).all()
assert (qualities["KFAC"][:, 1] > qualities["gradients alone"][:, 1] + 0.1).all()

# %% tags=["hide-input"] alt="Lines of the rank correlation against the damping on a logarithmic axis, for five structures, with ranges over three seeds. The block's line is highest at the weight decay; KFAC and EKFAC lie together below it; the diagonal and gradients alone are far lower." caption="How well the scores predict the losses of networks that were trained on random halves. Median and range of three seeds. The vertical line is the weight decay."
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
for (name, values), marker in zip(qualities.items(), "osv^x", strict=True):
    middle = values.median(0).values.cpu()
    low, high = values.min(0).values.cpu(), values.max(0).values.cpu()
    ax.errorbar(
        DAMPINGS, middle, [middle - low, high - middle], marker=marker, label=name, capsize=3
    )
ax.axvline(DECAY, lw=1, ls=":")
ax.set(xscale="log", xlabel="damping", ylabel="rank correlation", ylim=(0, 1))
ax.legend(ncols=2, fontsize=9)
plt.show()

# %% [markdown]
# The exact blocks predict best at the weight decay, in all three seeds. Kronecker factors come close, and the
# eigenvalue correction changes nothing here. With a diagonal, or with no curvature at all, much is lost.
#
# ### Wrong labels
#
# A sample's influence on itself says how far the network follows this sample alone. Samples with a wrong label should stand out.
# They do. But the loss alone finds as many:

# %%
print(f"wrong labels among the {WRONG} most suspicious of {N} training images, by seed:")
for name in ("self-influence", "loss"):
    print(f"    {name:15}", [hits[name] for _, hits in outcomes])
found = [sum(hits[name] for _, hits in outcomes) for name in ("self-influence", "loss")]
assert min(found) > 0.6 * 3 * WRONG
assert abs(found[0] - found[1]) <= 0.1 * 3 * WRONG

# %% [markdown]
# ## What goes wrong in practice
#
# **A mean in place of the sum.** With a mean loss a gradient is divided by the number of samples of *its* batch. Scores then depend on
# how many queries are asked together. The package refuses such a loss:

# %%
try:
    influence_scores(model, nn.CrossEntropyLoss(), by_kfac, [few], [(X, y)])
except ValueError as error:
    print(fill(str(error), 100))
else:
    raise AssertionError("a mean loss was accepted")

# %% [markdown]
# **Inverses that are added up.** Curvature may be summed over batches. Its inverse may not. A code that solves in every
# batch and adds the results up has scores that are too large by up to the square of the number of batches: each batch has a part of the
# curvature, and there are several. The order of the scores stays nearly the same, so that no picture of the most
# influential images shows it:

# %%
quarters = list(zip(X.split(N // 4), y.split(N // 4), strict=True))
added = sum(
    influence_scores(model, SUM, inverses(model, *part, kfac, DECAY), [few], [(X, y)])
    for part in quarters
)
right = influence_scores(model, SUM, by_kfac, [few], [(X, y)])
ratio = float((added * right).sum() / right.square().sum())
r = torch.corrcoef(torch.stack([added.flatten(), right.flatten()]))[0, 1].item()
print(f"four batches: too large by {ratio:.1f}, with a correlation of {r:.2f}")
assert 4 < ratio < 16
assert r > 0.9

# %% [markdown]
# **Weights that are not at a minimum.** [(23.1)] holds where the gradient of $J$ is zero. After early stopping, or with another
# decay in training than in the inverse, part of what the scores predict would have happened anyway by training on.
#
# **Whole effects.** A score is a first order. One sample of 200 is a small change, half of the samples is not. The figures
# above show how far one can go.
#
# ## In one minute
#
# - The influence of a training sample on a query is an inner product of their gradients in the metric of the
#   inverse curvature.
# - It predicts the change of the query's loss if the sample is left out. For ridge regression, dividing by one
#   minus the leverage makes it exact.
# - The damping is the weight decay of the sum of the losses.
# - With Kronecker factors a score is a product of two similarities, or a sum of a few such products.
# - For wrong labels, look at the losses first.
#
# ## Exercises
#
# **Exercise 23.1.** Show that the influence of a sample on itself is never negative. What does it mean if it is zero?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $(M + \delta I)^{-1}$ is positive definite for $\delta > 0$. So $s_{nn} \ge 0$, and $s_{nn} = 0$ only if the
# sample's gradient is zero: it is fitted perfectly.
#
# </details>
#
# **Exercise 23.2.** What is the sum of the influences of all training samples on a query, at a minimum of $J$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# At a minimum, $\sum_n \nabla \ell_n = -\delta \hat W$. So the sum is
# $-\delta \langle \nabla \ell_q, (M + \delta I)^{-1} \hat W \rangle$: what the query would lose if all data were left
# out, to first order. It is not zero, because the decay pulls at the weights.
#
# </details>
#
# **Exercise 23.3.** All losses and the decay are multiplied by $c$. How do the minimum and the scores change?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The minimum stays. Both gradients get a factor $c$ and the inverse gets $1/c$, so that scores are multiplied by $c$: they
# are in units of the loss.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
own = self_influence(model, SUM, by_kfac, [(X, y)])  # 23.1
assert (own > 0).all()
everyone = influence_scores(model, SUM, by_kfac, [few], [(X, y)]).sum(1)  # 23.2
W = trained_weights(model, by_kfac)
at_queries = layer_ios(model, SUM, *few, empirical)


def along(vectors: dict[str, Tensor]) -> Tensor:
    """The inner products of the queries' gradients with the inverse times some vectors."""
    parts = [
        io.inner_products(by_kfac[name] @ vectors[name]).flatten()
        for name, io in at_queries.items()
    ]
    return torch.stack(parts).sum(0)


with_decay = SUM(model(X), y) + decay(model)
W0, b0, W2, b2 = torch.autograd.grad(with_decay, model.parameters())  # small: L-BFGS stops early
left = {"0": torch.cat([W0, b0.unsqueeze(1)], 1), "2": torch.cat([W2, b2.unsqueeze(1)], 1)}
assert_exact(everyone, along({name: left[name] - DECAY * W[name] for name in W}))
copies = X.repeat(3, 1), y.repeat(3)  # 23.3: three times the loss
thrice = inverses(model, *copies, kfac, 3 * DECAY)
assert_exact(3 * influence_scores(model, SUM, thrice, [few], [(X, y)]), right)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Cook and Weisberg (1982)](bibliography.md#cook-weisberg) for linear models; [Koh and Liang (2017)](bibliography.md#influence)
# for networks; [Grosse et al. (2023)](bibliography.md#ekfac-influence) for EKFAC and language models;
# [Park et al. (2023)](bibliography.md#trak) for the linear datamodeling score.
