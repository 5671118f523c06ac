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
# # 30. Influence: which data does an answer rest on?
#
# **Part VIII: Curvature in use.** A network gives a wrong answer. Which of the training data are to blame?
#
# One can leave out a training sample, train again, and look at the answer. For all samples this takes as many trainings
# as there are samples. Curvature gives an estimate without any further training: near its minimum the training loss is
# nearly quadratic, and one Newton step leads to the minimum without the sample. [Figure 30.1] shows the estimates for a
# small network that reads handwritten digits. Some labels of its training images were changed at random.

# %%
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
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.show import code, style, table

set_up()  # seed 0, float64, the GPU where there is one


def block(io: LayerIO) -> Dense:
    """The exact block of a layer: the Gauss-Newton matrix of its weights."""
    return Dense(io.block())


def diagonal(io: LayerIO) -> Diagonal:
    """The diagonal of that block."""
    return Diagonal(io.gradients().square().sum((0, 1)))


def identity(io: LayerIO) -> Diagonal:
    """No curvature: scores are then inner products of gradients."""
    return Diagonal(torch.ones(io.g.shape[-1], io.a.shape[-1]))


# %% tags=["hide-input"] fold="The digits, the network, and its scores"
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


def to_minimum(model: nn.Module, X: Tensor, y: Tensor, steps: int = 1500) -> nn.Module:
    """Minimise the sum of losses and the weight decay with L-BFGS."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=steps,
        history_size=100,
        tolerance_grad=1e-6,
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
model = to_minimum(network(), X, y)
missed = (model(X_test).argmax(1) != y_test).nonzero().flatten()
by_kfac = inverses(model, X, y, kfac, DECAY)
scores = influence_scores(model, SUM, by_kfac, [(X_test[missed], y_test[missed])], [(X, y)])
q = int(scores.min(1).values.argmin())  # the query with the most harmful image
query = X_test[missed[q]].unsqueeze(0), y_test[missed[q]].unsqueeze(0)
order = scores[q].argsort(descending=True)
helps, harms = order[:5], order.flip(0)[:5]

# %% tags=["hide-input"] alt="A test image of a digit on the left. To the right, two rows of five training images each, with their labels: those that help above, those that harm below. Frames mark images whose label was changed." caption="Left: a test image that the network reads wrongly. Right: the training images that help it most, above, and those that harm it most, below. The number is the label that the network was trained with. A frame marks a label that was changed."
said = int(model(query[0]).argmax())
fig = plt.figure(figsize=(6.4, 2.7), layout="constrained")
left, right = fig.subfigures(1, 2, width_ratios=(1, 2.4))
panel = left.subplots()
panel.imshow(query[0].reshape(8, 8).cpu().numpy(), cmap="viridis")
panel.set_title(f"a {int(query[1])}, read as {said}", fontsize=13)
rows_of_images = right.subplots(2, 5)
for row, (what, images) in enumerate((("help", helps), ("harm", harms))):
    rows_of_images[row, 0].set_ylabel(what, fontsize=13)
    for ax, n in zip(rows_of_images[row], images.tolist(), strict=True):
        ax.imshow(X[n].reshape(8, 8).cpu().numpy(), cmap="viridis")
        ax.set_title(str(int(y[n])), fontsize=13)
        if n in wrong:
            ax.add_patch(
                plt.Rectangle((-0.5, -0.5), 8, 8, fill=False, lw=4, ec="C3", clip_on=False)
            )
for ax in (panel, *rows_of_images.flat):
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# A training image **helps** if the loss of the test image would be larger without it. It **harms** if that loss would
# be smaller. Most of the images that harm have a changed label:

# %% tags=["hide-input"] fold="Checked: the labels of the ten images"
harmful = torch.isin(harms, wrong).sum().item()
print(f"changed labels: {WRONG} of {N} images,")
print(f"    {harmful} of the {len(harms)} that harm most")
alike = (y[helps] == query[1]).sum().item()
print(f"right answer {int(query[1])} as the label:")
print(f"    {alike} of the {len(helps)} that help most")
assert harmful >= 3
assert alike >= 4

# %% [markdown]
# The figure sorts the training images $n$ by their score for the test image $q$,
#
# $$
# s_{qn} = \bigl\langle \nabla \ell_q , \; (M + \delta I)^{-1} \, \nabla \ell_n \bigr\rangle ,
# $$
#
# an inner product of the gradients of their losses. $M$ is the curvature of the training loss, here approximated by
# KFAC, and $\delta$ is the weight decay.
#
# After this chapter you will be able to
#
# - derive the score, and correct its size where the whole change is known;
# - compute the scores of all training data batch by batch, and test them against real changes;
# - read the score of a layer as a product of two similarities, one of errors and one of inputs;
# - choose the damping, and recognise mistakes that a list of influential data does not show.
#
# ## Leaving one out
#
# Training ends at a minimum $\hat W$ of
#
# $$
# J(W) = \sum_n \ell_n(W) + \tfrac{\delta}{2} \lVert W \rVert^2 ,
# $$
#
# where $W$ holds all weights, $\ell_n$ is the loss of sample $n$, without a factor $1/N$, and $\delta \gt 0$ is the
# weight decay of this **sum**. Let $\hat W(\varepsilon)$ be the minimum of $J - \varepsilon \ell_n$ that
# starts at $\hat W(0) = \hat W$. At $\varepsilon = 1$, sample $n$ is left out. The gradient is zero at every such
# minimum:
#
# $$
# \nabla J(\hat W(\varepsilon)) = \varepsilon \, \nabla \ell_n(\hat W(\varepsilon)) .
# $$
#
# Take the derivative of both sides with respect to $\varepsilon$ at 0. The left side gives the Hessian of $J$ times
# $\hat W'(0)$, by the chain rule. The right side gives $\nabla \ell_n(\hat W)$, because the other term of the
# product rule has the factor $\varepsilon = 0$. The Hessian of $J$ is that of the losses, plus $\delta I$. We replace
# the Hessian of the losses by the Gauss-Newton matrix $M$, which is positive semi-definite and has Kronecker
# factors. For a model that is linear in its weights the two are equal. For a network they differ:
#
# $$
# \hat W'(0) \approx (M + \delta I)^{-1} \, \nabla \ell_n .
# \tag{30.1}
# $$
#
# A query $q$ is any sample, from the training data or not. When sample $n$ is left out, the query's loss $\ell_q$
# grows, to first order in $\varepsilon$, by the **influence** of $n$ on $q$, also called the **score**:
#
# $$
# s_{qn} = \bigl\langle \nabla \ell_q , \; (M + \delta I)^{-1} \, \nabla \ell_n \bigr\rangle .
# \tag{30.2}
# $$
#
# A positive score says that $n$ helps, a negative one that it harms. The damping of the inverse is no free parameter:
# it is the weight decay.
#
# ### Where the whole change is known
#
# <div class="admonition theorem" markdown="1" id="thm-30.1">
# <p class="admonition-title" markdown="1"><b>Theorem 30.1 (ridge regression)</b></p>
#
# Let the model be $f(x) = x^\top w$ with one output, and let $\ell_n = (f(x_n) - t_n)^2$. The **leverage**
# $h_n = 2 x_n^\top (M + \delta I)^{-1} x_n$ of a sample is at least 0 and less than 1. Without the sample, the minimum
# moves by exactly $(M + \delta I)^{-1} \nabla \ell_n / (1 - h_n)$.
#
# </div>
#
# *Proof.* Write $P = M + \delta I$ for the Hessian of $J$. Without the sample, the Hessian is
# $P_n = P - 2 x_n x_n^\top$. It is positive definite, because it is $\delta I$ plus the curvature of the other samples.
# Its determinant is $(1 - h_n) \det P$, so that $h_n \lt 1$. The gradient at the old minimum is
# $-\nabla \ell_n$ when the sample is left out. One Newton step leads to the minimum of a parabola, so that the move is
# $P_n^{-1} \nabla \ell_n$. By the Sherman-Morrison formula,
# $P_n^{-1} = P^{-1} + 2 P^{-1} x_n x_n^\top P^{-1} / (1 - h_n)$. Since $\nabla \ell_n$ is a multiple of $x_n$, the
# second term of $P_n^{-1} \nabla \ell_n$ is $h_n / (1 - h_n)$ times the first one. $\square$
#
# The formula [(30.1)] gives a move that is too small by the factor $1 - h_n$. The sum of all leverages is the trace of
# $P^{-1} M$, which is less than the number of weights. So most leverages are small where samples are many
# and weights are few.
#
# A prediction $f(x)$ is linear in $w$. If the query's gradient in [(30.2)] is that of its prediction, in place of its
# loss, then the score over $1 - h_n$ is the whole change of the prediction. The function of the package takes such a
# number as its argument `measurement`. With one output and the squared error, KFAC is the exact block, because every
# sample sends back the same vector. So the check of the theorem can use it:

# %% tags=["hide-input"] fold="Checked: ridge regression, with each sample left out in turn"
SQUARED = nn.MSELoss(reduction="sum")
Phi, t, ridge = torch.randn(12, 3), torch.randn(12, 1), 0.8
P = 2 * Phi.T @ Phi + ridge * torch.eye(3)
w = torch.linalg.solve(P, 2 * Phi.T @ t)
linear = nn.Linear(3, 1, bias=False)
with torch.no_grad():
    linear.weight.copy_(w.T)

new = torch.randn(4, 3), torch.randn(4, 1)
inverse = {name: kfac(io).inverse(ridge) for name, io in layer_ios(linear, SQUARED, Phi, t).items()}
scored = influence_scores(
    linear, SQUARED, inverse, [new], [(Phi, t)], measurement=lambda f, t: f.squeeze(1)
)
moves = []
for n in range(len(Phi)):  # train again without each sample
    rest = torch.arange(len(Phi)) != n
    A, b = Phi[rest], t[rest]
    moves.append(torch.linalg.solve(2 * A.T @ A + ridge * torch.eye(3), 2 * A.T @ b) - w)
exact = new[0] @ torch.cat(moves, 1)  # the changes of the predictions
leverage = 2 * ((Phi @ P.inverse()) * Phi).sum(1)
assert_exact(scored / (1 - leverage), exact)
print(f"leverage from {leverage.min():.2f} to {leverage.max():.2f}, sum {leverage.sum():.2f}")
print(f"error of the scores alone: {relative_error(scored, exact):.0%}")
assert leverage.min() >= 0
assert leverage.max() < 1
assert leverage.sum() < 3
assert leverage.min() < relative_error(scored, exact) < leverage.max()

# %% [markdown]
# ## The scores of a network
#
# For a network we make a second approximation: we keep the block of $M$ for each layer, and replace the entries between
# layers by zeros. The inverse then consists of blocks, and the score is a sum over layers. A block is either exact, or
# approximated by [KFAC](05_kfac.py) or [EKFAC](14_ekfac.py).
#
# By hand: form the gradient of every sample and the matrix of every block, and solve.

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
# The package multiplies the gradients of the queries by the inverse, once. Then it reads the training data batch by
# batch. It forms the gradients of one batch and one block at a time, and takes their inner products with what
# it has kept of the queries. All data at once and batches of 64 give the scores of the naive version:

# %% tags=["remove-input"]
code(influence_by_block)

# %%
assert_exact(influence_scores(model, SUM, by_kfac, [few], [(X, y)]), naive)
batches = list(zip(X.split(64), y.split(64), strict=True))
assert_exact(influence_scores(model, SUM, by_kfac, [few], batches), naive)

# %% [markdown]
# ### Against real changes
#
# Leave out the image that harms the query of [Figure 30.1] most, and train on from the old weights:


# %% tags=["hide-input"] fold="Measured: the query without its most harmful image"
def without(samples: Tensor) -> nn.Module:
    """The network after some images are left out."""
    stays = ~torch.isin(torch.arange(N), samples)
    return to_minimum(deepcopy(model), X[stays], y[stays], steps=300)


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
# The network now reads the query correctly. The sign of the score is right, but its size is not. The score extends the
# slope of the loss along a straight line, and a loss cannot fall below zero.
#
# Three more things differ from the theory here: $M$ is not the Hessian, the blocks of KFAC are not $M$, and a
# network has many minima. To see the effect of the first order by itself, take the last layer alone, with fixed hidden
# units and with its exact block. Its loss is convex, its block is the Hessian, and Newton's method finds the minimum up
# to rounding. We compute the scores with its exact block and with KFAC.


# %% tags=["hide-input"] fold="The last layer alone: Newton's method and scores"
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
        if slope.abs().max() < 1e-11:
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
of_layer = {
    name: influence_scores(
        best,
        SUM,
        inverses(best, Z[:, :-1], y, s, DECAY),
        [(asked[0][:, :-1], asked[1])],
        [(Z[:, :-1], y)],
    )
    for name, s in (("exact block", block), ("KFAC", kfac))
}


def losses_of(W: Tensor) -> Tensor:
    return cross_entropy(asked[0] @ W.T, asked[1], reduction="none")


# %% [markdown]
# The weight of one sample's loss is 1. First we make it a little smaller and a little larger:

# %% tags=["hide-input"] fold="Measured: small changes of the weight of one sample"
off = []
for step in (1e-1, 1e-2, 1e-3):  # differences around the weight 1 of one sample
    moved = torch.ones(2, N)
    moved[0, 7] -= step
    moved[1, 7] += step
    slope = (losses_of(last_layer(moved[0])) - losses_of(last_layer(moved[1]))) / (2 * step)
    off.append([relative_error(values[:, 7], slope) for values in of_layer.values()])
    print(f"weight of sample 7 changed by {step:g}: error of the scores", end=" ")
    print(", ".join(f"{name} {e:.1g}" for name, e in zip(of_layer, off[-1], strict=True)))
exact, kronecker = zip(*off, strict=True)
assert 80 < exact[0] / exact[1] < 120  # of second order: the score is the derivative
assert 80 < exact[1] / exact[2] < 120
assert min(kronecker) > 0.05  # KFAC's score is not

# %% [markdown]
# With the exact block, the error falls with the square of the step. So the score is the rate at which the query's loss
# grows when the weight of the sample decreases. KFAC's score differs from this rate. Leaving a sample out is a large
# step: its weight falls from 1 to 0. We do this for the samples with a changed label and for every tenth sample, and
# compare the real changes of ten queries' losses with the predicted ones:


# %% tags=["hide-input"] fold="Measured: real changes when samples are left out in turn"
def ranks(x: Tensor) -> Tensor:
    return x.argsort(0).argsort(0).to(x)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Of the columns of two matrices, the mean over columns."""
    x, y = (ranks(t) - (len(t) - 1) / 2 for t in (x, y))
    return float(((x * y).sum(0) / (x.square().sum(0) * y.square().sum(0)).sqrt()).mean())


chosen = torch.cat([wrong, torch.arange(0, N, 10)]).unique()
real = []
for n in chosen.tolist():
    weights = torch.ones(N)
    weights[n] = 0
    real.append(losses_of(last_layer(weights)) - losses_of(W))
real = torch.stack(real, 1)
odd = torch.isin(chosen, wrong)
print(f"{len(chosen)} samples left out in turn, {len(real)} queries")
agreement, steeper = {}, {}
for name, values in of_layer.items():
    print(name)
    for label, which in (("right labels", ~odd), ("changed labels", odd)):
        x, r = values[:, chosen[which]].reshape(-1, 1), real[:, which].reshape(-1, 1)
        agreement[name, label] = rank_correlation(x, r)
        steeper[name, label] = float((r / x).median())
        print(f"    {label:15} rank correlation {agreement[name, label]:.2f},", end=" ")
        print(f"real change over prediction: median {steeper[name, label]:.2f}")
for label in ("right labels", "changed labels"):
    assert agreement["exact block", label] > max(0.9, agreement["KFAC", label])
    assert agreement["KFAC", label] > 0.2
    assert steeper["exact block", label] > 1
    assert 0 < steeper["KFAC", label] < 0.9
assert steeper["exact block", "changed labels"] > steeper["exact block", "right labels"]

# %% tags=["hide-input"] alt="Two scatter plots of the predicted against the real change of the losses of ten queries when training images are left out. With the exact block the points lie close to the diagonal, most of them a little further from zero than predicted; with KFAC they scatter widely around it." caption="The last layer: predicted and real change of the queries' losses when training images are left out in turn. On the dashed line both are equal. Both axes are logarithmic away from zero."
fig, axes = plt.subplots(1, 2, figsize=(6.2, 3.4), sharex=True, sharey=True, layout="constrained")
end = float(max(real.abs().max(), *(v[:, chosen].abs().max() for v in of_layer.values())))
for ax, (name, values) in zip(axes, of_layer.items(), strict=True):
    for label, which, marker in (("right label", ~odd, "o"), ("changed label", odd, "x")):
        x, r = values[:, chosen[which]].flatten(), real[:, which].flatten()
        ax.plot(x.cpu(), r.cpu(), marker, label=label, ms=4)
    ax.plot((-end, end), (-end, end), lw=1, ls="--")
    ax.set_xscale("symlog", linthresh=1e-3)
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.set(title=name, xlabel="predicted change", xticks=[-0.1, -0.001, 0.001, 0.1])
axes[0].set(ylabel="real change", yticks=[-0.1, -0.01, -0.001, 0, 0.001, 0.01, 0.1])
axes[0].legend()
plt.show()

# %% [markdown]
# Most real changes are larger than those that the exact block predicts, as leverage makes them in
# [Theorem 30.1]. They are larger still for changed labels.
# KFAC's predictions scatter more, and most of them are too large or have the wrong sign.
#
# ## Two kernels
#
# The gradient of a linear layer is $\nabla \ell = g a^\top$, an error times an input. The input $a$ is what the layer
# receives, the error $g$ is the gradient of the loss with respect to what the layer computes. Let the inverse be a
# Kronecker product $\mathcal B \otimes \mathcal A$, such as that of damped factors ([Chapter 9](09_damping.py)). Then
# the score of the layer is a product:
#
# $$
# \bigl\langle g_q a_q^\top , \; \mathcal B \, g_n a_n^\top \mathcal A \bigr\rangle
# = (g_q^\top \mathcal B \, g_n) \, (a_q^\top \mathcal A \, a_n) .
# \tag{30.3}
# $$
#
# Each factor is a kernel, a similarity of two samples: the first one compares errors, the second one inputs. A training
# image has no influence through this layer if one of the factors is zero. No gradient is formed. After the queries'
# errors and inputs are multiplied by $\mathcal B$ and $\mathcal A$, a score costs $d_\text{out} + d_\text{in}$
# operations instead of $d_\text{out} d_\text{in}$.

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
exactly_damped = influence_scores(model, SUM, {"2": K.inverse(DECAY)}, [query], [(X, y)])
apart = relative_error(errors * inputs, exactly_damped)
print(f"distance from the scores with (30.2)'s damping: {apart:.0%}")
assert 0.01 < apart < 1

# %% tags=["hide-input"] alt="A scatter plot with one point for each training image: how alike the hidden units are on the horizontal axis, how alike the errors are on the vertical axis. Images with the query's label lie above the horizontal axis, those with the label that the network gave lie below it, and most others lie near it." caption="The two kernels of the last layer between the query of Figure 30.1 and every training image. The score is the product of both coordinates."
fig, ax = plt.subplots(figsize=(6, 4), layout="constrained")
kinds = {f"label {int(query[1])}": y == query[1], f"label {said}": y == said}
kinds["other labels"] = ~(kinds[f"label {int(query[1])}"] | kinds[f"label {said}"])
for (name, which), marker in zip(kinds.items(), "os.", strict=True):
    ax.plot(inputs[0, which].cpu(), errors[0, which].cpu(), marker, label=name, ms=5)
ax.axhline(0, lw=0.5)
ax.axvline(0, lw=0.5)
ax.set(xlabel=r"inputs: $a_q^\top \mathcal{A} a_n$", ylabel=r"errors: $g_q^\top \mathcal{B} g_n$")
ax.legend(loc="lower left")
plt.show()
share = [float((errors[0, y == label] > 0).double().mean()) for label in (query[1], said)]
assert share[0] > 0.9
assert share[1] < 0.1

# %% [markdown]
# The errors of nearly all images with the query's label point in the direction of the query's error: such images help
# if their inputs are similar. The errors of images with the label that the network gave point the other way: such
# images harm.
#
# Damped factors are not the damping of [(30.2)], which adds $\delta$ to the eigenvalues $\lambda_{oi}$ of the block.
# The inverse then has the eigenvalues $1 / (\lambda_{oi} + \delta)$, a matrix with the indices $o$ and $i$ that is no
# product of a function of $o$ and one of $i$. A singular value decomposition of this matrix makes it a sum of such
# products, and its first terms approximate it. Then the scores are a sum of as many pairs of kernels.
#
# Not all entries are equally important. The eigenvalue $\lambda_{oi}$ is a sum of squared components of gradients along
# one eigenvector, so that these components of a query and of a sample are about proportional to $\sqrt{\lambda_{oi}}$.
# Both are factors of the score, so that an error in the entry is multiplied by about $\lambda_{oi}$. So the function
# decomposes the matrix weighted by $\lambda_{oi}$, or for EKFAC by the product of the means of its rows and columns.

# %% tags=["remove-input"]
code(inverse_as_sum)

# %% tags=["hide-input"] fold="Two functions: scores from a sum of products, and a sum without weights"
first = layer_ios(model, SUM, X, y)["0"]
some = X_test[:20], y_test[:20]
a_few = layer_ios(model, SUM, *some, empirical)["0"]
full = min(first.g.shape[-1], first.a.shape[-1])
print(f"first layer, {first.g.shape[-1]} x {first.a.shape[-1]}: {full} terms are the whole")


def by_pairs(terms: list[Kronecker]) -> Tensor:
    pairs = [product_kernels(term, a_few, rows["n"]["0"]) for term in terms]
    return sum(e * a for e, a in pairs)


def unweighted(E: KroneckerEigen, count: int) -> list[Kronecker]:
    """The first terms of the decomposition without weights."""
    U, s, V = torch.linalg.svd(1 / (E.scale + DECAY), full_matrices=False)
    return [
        Kronecker(E.QA * v @ E.QA.T, E.QB * (size * u) @ E.QB.T)
        for u, size, v in zip(U.T[:count], s[:count], V[:count], strict=True)
    ]


# %% [markdown]
# How many terms does the first layer need, and what do the weights gain? The tolerances are 0.1, 0.01 and 0.0001.

# %% tags=["hide-input"] fold="Measured: terms and errors for KFAC and EKFAC"
sizes = {}
for structure in (kfac, ekfac):
    M0 = structure(first)
    whole = influence_scores(model, SUM, {"0": M0.inverse(DECAY)}, [some], [(X, y)])
    for tolerance in (1e-1, 1e-2, 1e-4):
        terms = inverse_as_sum(M0, DECAY, tolerance)
        error = relative_error(by_pairs(terms), whole)
        plain = relative_error(by_pairs(unweighted(M0.eigen(), len(terms))), whole)
        print(f"    {structure.__name__:5} {len(terms):2} terms: error {error:.0e},", end=" ")
        print(f"without weights {plain:.0e}")
        sizes[structure.__name__, tolerance] = len(terms)
        if len(terms) < full:
            assert error < 2 * tolerance
            assert error < plain / 2
        else:
            assert_exact(by_pairs(terms), whole)
assert sizes["kfac", 1e-4] < full / 2
assert sizes["ekfac", 1e-2] > full / 2

# %% [markdown]
# KFAC's eigenvalues are products $\lambda_{oi} = \beta_o \alpha_i$, so that a few pairs of kernels suffice. EKFAC's are
# free numbers, and this small layer needs most of the terms.
#
# ## The damping is the weight decay
#
# Many programs tune the damping of influence. By [(30.2)] it is the weight decay. To check this on a
# network, for which [(30.1)] is an approximation, leave out half of the training data at random, and train again from
# new random weights. By [(30.2)] the query's loss grows by the sum of the scores of all samples that were left out.
# This is a constant minus the sum of $s_{qn}$ over the samples that stay. The rank correlation between the predicted
# and the real losses of a query, over many halves, is the [linear datamodeling score](bibliography.md#trak). We average
# it over queries. Perfect predictions would give 1. The columns of the table are dampings; the weight decay is 0.5.

# %% tags=["hide-input"] fold="The experiment: networks trained on random halves of the data"
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
    to_minimum(model, X, y, steps=200)
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

# %% tags=["hide-input"] fold="Checked: the order of structures and dampings"
assert (qualities["block"][:, 1] > qualities["block"][:, [0, 2]].max(1).values).all()
assert (qualities["KFAC"][:, 1] > qualities["KFAC"][:, 2]).all()
assert (qualities["KFAC"][:, 1] - qualities["KFAC"][:, 0]).abs().max() < 0.05
assert (qualities["block"][:, 1] - qualities["KFAC"][:, 1]).max() < 0.15
assert (qualities["KFAC"][:, 1] - qualities["EKFAC"][:, 1]).abs().max() < 0.05
assert (qualities["KFAC"][:, 1] > qualities["diagonal"].max(1).values + 0.1).all()
assert (qualities["KFAC"][:, 1] > qualities["gradients alone"][:, 1] + 0.1).all()
table(
    ["median of three seeds", *(f"{damping:g}" for damping in DAMPINGS)],
    [[name, *(f"{v.median():.2f}" for v in values.T)] for name, values in qualities.items()],
)

# %% tags=["hide-input"] alt="Lines of the rank correlation against the damping on a logarithmic axis, for five structures, with ranges over three seeds. The block's line is highest at the weight decay; KFAC and EKFAC lie together below it; the diagonal and gradients alone are far lower." caption="Rank correlation of the predicted with the real losses of networks that were trained on random halves. Median and range of three seeds. The exact block is best at the weight decay (vertical line)."
fig, ax = plt.subplots(figsize=(6.8, 4), layout="constrained")
looks = {
    "block": style("GGN"),
    "KFAC": style("KFAC"),
    "EKFAC": style("EKFAC"),
    "diagonal": {"color": "C4", "marker": "^"},
    "gradients alone": style("gradient"),
}
shifts = {"block": 0, "KFAC": 7, "EKFAC": -7, "diagonal": 6, "gradients alone": -7}  # of labels
for name, values in qualities.items():
    middle = values.median(0).values.cpu()
    low, high = values.min(0).values.cpu(), values.max(0).values.cpu()
    ax.errorbar(DAMPINGS, middle, [middle - low, high - middle], capsize=3, **looks[name])
    ax.annotate(
        name,
        (DAMPINGS[-1], float(middle[-1])),
        xytext=(12, shifts[name]),
        textcoords="offset points",
        color=looks[name]["color"],
        va="center",
    )
ax.axvline(DECAY, lw=1, ls=":")
ax.set(xscale="log", xlabel="damping", ylabel="rank correlation", ylim=(0, 1), xlim=(0.035, 30))
ax.set_xticks(DAMPINGS, [f"{damping:g}" for damping in DAMPINGS])
ax.set_xticks([], minor=True)
plt.show()

# %% [markdown]
# Of the three dampings, the weight decay is the best one for the exact blocks, for all three seeds. KFAC's correlation
# comes close to theirs. It is smaller where the damping is too large, but a damping that is too small makes little
# difference here. EKFAC is no better than KFAC. With a diagonal, or with no curvature at all, the predictions are much
# worse.
#
# ### Wrong labels
#
# A sample's influence on itself, $s_{nn}$, says how far the network follows this sample alone. It should be large for
# samples with a wrong label, and it is. But the samples' losses alone find about as many:

# %% tags=["hide-input"] fold="Measured: wrong labels found by self-influence and by losses"
print(f"wrong labels among the {WRONG} most suspicious of {N} training images, by seed:")
for name in ("self-influence", "loss"):
    print(f"    {name:15}", [hits[name] for _, hits in outcomes])
found = [sum(hits[name] for _, hits in outcomes) for name in ("self-influence", "loss")]
assert min(found) > 0.6 * 3 * WRONG
assert abs(found[0] - found[1]) <= 0.1 * 3 * WRONG
print(f"by chance one would find {WRONG * WRONG / N:g}")

# %% [markdown]
# ## What goes wrong in practice
#
# **A mean in place of the sum.** The gradient of a mean loss is divided by the number of samples in *its* batch. Then
# scores depend on how many queries are asked together. The package refuses such a loss:

# %% tags=["beside"]
try:
    influence_scores(model, nn.CrossEntropyLoss(), by_kfac, [few], [(X, y)])
except ValueError as error:
    print(fill(str(error), 60))
else:
    raise AssertionError("a mean loss was accepted")

# %% [markdown]
# **Inverses that are added up.** The curvatures of batches may be added up. Their inverses may not. Some programs solve
# with the curvature of each batch and add up the results. If each of $k$ batches had the curvature $M / k$, the sum
# would be
#
# $$
# k \, (M / k + \delta I)^{-1} = k^2 \, (M + k \delta I)^{-1}
# $$
#
# in place of $(M + \delta I)^{-1}$. Along an eigenvector of $M$ with the eigenvalue $m$ this is too large by the factor
# $k^2 (m + \delta) / (m + k \delta)$, which lies between $k$, for small $m$, and $k^2$, for large $m$. Batches that
# differ make the sum larger still, because a mean of inverses is never smaller than the inverse of the mean. But the
# scores of different training images are nearly in the right proportion, so that a list of the most influential images
# hardly shows the mistake:

# %% tags=["hide-input"] fold="Measured: inverses of four batches, added up"
quarters = list(zip(X.split(N // 4), y.split(N // 4), strict=True))
added = sum(
    influence_scores(model, SUM, inverses(model, *part, kfac, DECAY), [few], [(X, y)])
    for part in quarters
)
right = influence_scores(model, SUM, by_kfac, [few], [(X, y)])
ratio = float((added * right).sum() / right.square().sum())
r = torch.corrcoef(torch.stack([added.flatten(), right.flatten()]))[0, 1].item()
parts = len(quarters)
print(f"{parts} batches: too large by a factor of {ratio:.1f}, with a correlation of {r:.2f}")
tops = zip(added.abs().topk(10).indices, right.abs().topk(10).indices, strict=True)
common = [int(torch.isin(a, b).sum()) for a, b in tops]
print(f"of the 10 most influential images of each query, both lists contain {common}")
assert parts < ratio < parts**2
assert r > 0.9
assert sum(common) / len(common) >= 7

# %% [markdown]
# **Weights that are not at a minimum.** [(30.1)] assumes that the gradient of $J$ is zero. After early stopping it is
# not. Then further training changes the query's loss even if no sample is left out, and no score contains this change.
# Nor is the gradient zero if the decay of the inverse is another one than that of training.
#
# **Whole effects.** A score is a first-order prediction. Its size is wrong for a sample with a large leverage, and for
# many samples that are left out together. [Figure 30.2] shows this for single samples. For halves of the data, [Figure
# 30.4] shows that the *order* of the predicted losses is still useful.
#
# ## In one minute
#
# - **Score.** The influence of a training sample on a query is the inner product of their gradients with the inverse
#   curvature in between, [(30.2)]. It predicts, to first order, how much the query's loss grows if the sample is left
#   out.
# - **Size.** For the predictions of ridge regression, division by one minus the leverage makes the score exact
#   ([Theorem 30.1]). In general the order of scores is more reliable than their size.
# - **Damping.** It is the weight decay of the sum of the losses.
# - **Kernels.** With Kronecker factors, a layer's score is a product of two similarities, [(30.3)], or a sum of a few
#   such products.
# - **Wrong labels.** Look at the losses first: here they find about as many as self-influence.
#
# ## Exercises
#
# **Exercise 30.1.** Show that the influence of a sample on itself is never negative. What does it mean if it is zero?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $(M + \delta I)^{-1}$ is positive definite for $\delta \gt 0$. So $s_{nn} \ge 0$, and $s_{nn} = 0$ only if the
# sample's gradient is zero: to first order, no weight changes its loss. The gradient with respect to a bias of the last
# layer is the gradient with respect to the output. So in a network with such a bias, no change of the output would
# lower the sample's loss to first order either. With the squared error, the sample is then fitted perfectly. With
# cross-entropy this never happens, because no probability is exactly 1.
#
# </details>
#
# **Exercise 30.2.** What is the sum of the influences of all training samples on a query, at a minimum of $J$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# At a minimum, $\sum_n \nabla \ell_n = -\delta \hat W$. So the sum is $-\delta \langle \nabla \ell_q, (M + \delta
# I)^{-1} \hat W \rangle$. To first order, this is the growth of the query's loss if all data are left out. It is far
# from the whole effect: without data the minimum of $J$ is at zero, so that the weights move by $-\hat W$, and not by
# $-\delta (M + \delta I)^{-1} \hat W$.
#
# </details>
#
# **Exercise 30.3.** All losses, that of the query among them, and the decay are multiplied by $c \gt 0$. How do the
# minimum and the scores change?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The minimum stays, because $J$ is multiplied by $c$. Both gradients get a factor $c$ and the inverse gets $1/c$, so
# that scores are multiplied by $c$. A score has the unit of the loss.
#
# </details>
#
# **Exercise 30.4 (write it).** EKFAC's inverse with the damping of [(30.2)] is no product of two kernels, but one can
# compute its scores without a gradient all the same. Write a function `scores(E, queries, data, damping)` for a layer
# with one position. `E` has the fields `QA`, `QB` and `scale` of [Chapter 14](14_ekfac.py), and `queries` and `data`
# are `LayerIO`s with one vector for each sample, such as `rows["q"]["2"]`. Compare it with `influence_scores`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# In the eigenbasis a gradient is again an outer product, of $Q_B^\top g$ and $Q_A^\top a$.
#
# ```
# def solution(E, queries, data, damping):
#     (gq, aq), (gn, an) = (
#         (io.g[0, :, 0] @ E.QB, io.a[:, 0] @ E.QA) for io in (queries, data)
#     )
#     return torch.einsum("qo,qi,oi,no,ni->qn", gq, aq, 1 / (E.scale + damping), gn, an)
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(E: KroneckerEigen, queries: LayerIO, data: LayerIO, damping: float) -> Tensor:  # 30.4
    (gq, aq), (gn, an) = ((io.g[0, :, 0] @ E.QB, io.a[:, 0] @ E.QA) for io in (queries, data))
    return torch.einsum("qo,qi,oi,no,ni->qn", gq, aq, 1 / (E.scale + damping), gn, an)


E = ekfac(layer_ios(model, SUM, X, y)["2"])
by_package = influence_scores(model, SUM, {"2": E.inverse(DECAY)}, [query], [(X, y)])
assert_exact(solution(E, rows["q"]["2"], rows["n"]["2"], DECAY), by_package)

own = self_influence(model, SUM, by_kfac, [(X, y)])  # 30.1
assert (own > 0).all()
fitted = linear(Phi).detach()  # targets that ridge regression predicts perfectly
assert self_influence(linear, SQUARED, inverse, [(Phi, t)]).max() > 0.1
assert (self_influence(linear, SQUARED, inverse, [(Phi, fitted)]) == 0).all()
everyone = influence_scores(model, SUM, by_kfac, [few], [(X, y)]).sum(1)  # 30.2
W = trained_weights(model, by_kfac)
at_queries = layer_ios(model, SUM, *few, empirical)


def along(vectors: dict[str, Tensor]) -> Tensor:
    """The inner products of the queries' gradients with the inverse times some vectors."""
    parts = [
        io.inner_products(by_kfac[name] @ vectors[name]).flatten()
        for name, io in at_queries.items()
    ]
    return torch.stack(parts).sum(0)


assert_exact(everyone, -DECAY * along(W), tolerance=1e-4)  # the gradient is not quite zero
slope = torch.autograd.grad(SUM(model(X), y) + decay(model), list(model.parameters()))
(W0, b0), (W2, b2) = slope[:2], slope[2:]
left = {"0": torch.cat([W0, b0.unsqueeze(1)], 1), "2": torch.cat([W2, b2.unsqueeze(1)], 1)}
assert_exact(everyone, along({name: left[name] - DECAY * W[name] for name in W}))  # with it
TRIPLED = nn.CrossEntropyLoss(weight=torch.full((10,), 3.0), reduction="sum")  # 30.3
M3 = {name: kfac(io) for name, io in layer_ios(model, TRIPLED, X, y).items()}
thrice = {name: K.inverse(3 * DECAY) for name, K in M3.items()}
assert_exact(influence_scores(model, TRIPLED, thrice, [few], [(X, y)]), 3 * right)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Cook and Weisberg (1982)](bibliography.md#cook-weisberg) for linear models; [Koh and Liang
# (2017)](bibliography.md#influence) for networks; [Grosse et al. (2023)](bibliography.md#ekfac-influence) for EKFAC and
# language models; [Park et al. (2023)](bibliography.md#trak) for the linear datamodeling score.
