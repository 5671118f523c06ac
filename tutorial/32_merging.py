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
# # 32. Merging: one network from several
#
# **Part VIII: Curvature in use.** Can networks that were trained apart become one, without their data?
#
# Each network comes with its weights and with a curvature matrix for each layer. Where the curvature is
# large, the data of the network have determined the weights. Along these directions the merged network should have the
# weights of that network. A plain average of the weights treats all directions alike. [Figure 32.1] compares the plain
# average with merging by curvature.

# %% tags=["hide-input"]
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_scratch.applications.merging import merged, merged_block
from kfac_scratch.applications.trained import parameters_from, trained_weights
from kfac_scratch.approximations.kfac import foof, kfac
from kfac_scratch.capture.layer_groups import groups_of
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.data_loader import over_loader
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.optimizer.preconditioner import block_matrices
from kfac_scratch.show import code, table

set_up()  # seed 0, float64, the GPU where there is one

Weights = dict[str, Tensor]  # a matrix [W | b] for each layer

# %% tags=["hide-input"] fold="Trained: a start, two networks on parts of the data, and one on all data, four times"
SUM, DECAY = nn.CrossEntropyLoss(reduction="sum"), 3.0
digits = load_digits()
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
LAYERS = ("0", "2")


class Family(NamedTuple):
    """A start, two networks that were trained from it on parts of the data, and one on all."""

    start: nn.Module
    models: list[nn.Module]
    joint: nn.Module
    parts: list[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]


def train(
    start: nn.Module, X: Tensor, y: Tensor, penalty: Callable[[nn.Module], Tensor], steps: int
) -> nn.Module:
    """A copy at a minimum of the sum of the losses and a penalty."""
    model = deepcopy(start)
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=steps, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = SUM(model(X), y) + penalty(model)
        value.backward()
        return value

    optimizer.step(closure)
    return model


def decay_towards(weights: list[Tensor]) -> Callable[[nn.Module], Tensor]:
    """The weight decay towards some weights, as a penalty."""

    def penalty(model: nn.Module) -> Tensor:
        pairs = zip(model.parameters(), weights, strict=True)
        return DECAY / 2 * sum((p - q).square().sum() for p, q in pairs)

    return penalty


def family(seed: int) -> Family:
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    X, y = images[order[:1000]], labels[order[:1000]]
    initial = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    zeros = [torch.zeros_like(p) for p in initial.parameters()]
    start = train(initial, X[:60], y[:60], decay_towards(zeros), 100)
    to_start = decay_towards([p.detach() for p in start.parameters()])
    parts = [(X[y < 5], y[y < 5]), (X[y >= 5], y[y >= 5])]
    models = [train(start, *part, to_start, 150) for part in parts]
    test = (images[order[1000:]], labels[order[1000:]])
    return Family(start, models, train(start, X, y, to_start, 150), parts, test)


def having(model: nn.Module, W: Weights) -> nn.Module:
    """A copy with other weights."""
    model = deepcopy(model)
    model.load_state_dict(parameters_from(model, W), strict=False)
    return model


def accuracy(f: Family, model: nn.Module) -> float:
    """The share of test images, of all ten digits, that are read correctly."""
    X, y = f.test
    return (model(X).argmax(1) == y).double().mean().item()


families = [family(seed) for seed in range(4)]


# %% tags=["hide-input"] fold="Six ways to merge two networks"
def block(io: LayerIO) -> Dense:
    """The exact block of a layer."""
    return Dense(io.block())


def diagonal(io: LayerIO) -> Diagonal:
    """The diagonal of that block."""
    return Diagonal(io.gradients().square().sum((0, 1)))


def inputs_summed(io: LayerIO) -> Kronecker:
    """The input factor alone, as a sum over the data."""
    mean = foof(io)
    return Kronecker(io.rows * mean.A, mean.B)


def plus(K: Kronecker, decay: float) -> KroneckerEigen:
    """`K + decay * I`."""
    E = K.eigen()
    return replace(E, scale=E.scale + decay)


def weights(f: Family) -> tuple[list[Weights], Weights]:
    return [trained_weights(m, LAYERS) for m in f.models], trained_weights(f.start, LAYERS)


def curvature(f: Family, approximation: Callable[[LayerIO], Matrix]) -> list[dict[str, Matrix]]:
    """That of each model, on its own data."""
    found = zip(f.models, f.parts, strict=True)
    return [over_loader(approximation, model, SUM, [part]) for model, part in found]


TINY = 1e-3


def ways(f: Family, K: list[dict[str, Kronecker]]) -> dict[str, Weights]:
    (Ws, W0), D, R = weights(f), curvature(f, diagonal), curvature(f, inputs_summed)
    damped = [{n: plus(M, DECAY) for n, M in Ks.items()} for Ks in K]
    return {
        "average": {n: (Ws[0][n] + Ws[1][n]) / 2 for n in LAYERS},
        "diagonal": merged(Ws, D, DECAY, W0),
        "KFAC without the decay": merged(Ws, K, TINY, W0),
        "KFAC, start twice": merged(Ws, damped, 0.0, W0),
        "KFAC, start once": merged(Ws, K, DECAY, W0),
        "RegMean": merged(Ws, R, TINY, W0),
    }


curvatures = [curvature(f, kfac) for f in families]
found = [ways(f, K) for f, K in zip(families, curvatures, strict=True)]
results = {
    "start": [accuracy(f, f.start) for f in families],
    "model 1": [accuracy(f, f.models[0]) for f in families],
    "model 2": [accuracy(f, f.models[1]) for f in families],
}
for way in found[0]:
    both = zip(families, found, strict=True)
    results[way] = [accuracy(f, having(f.start, W[way])) for f, W in both]
results["joint training"] = [accuracy(f, f.joint) for f in families]

# %% tags=["hide-input"] fold="Code of the figure" alt="Horizontal bars of test accuracy on all ten digits. Models 1 and 2 read about half of the test images, less than the start. KFAC without the decay is below the start. The average, the diagonal and KFAC with the start counted twice are above it, KFAC with the start counted once and RegMean are higher, and joint training is the highest." caption="Test accuracy on all ten digits. Model 1 has seen only the digits 0 to 4 in its training, model 2 only 5 to 9. Orange: merged from these two. Blue: trained. Every way to merge except KFAC without the decay is above the start. RegMean, which uses only the inputs, is the best of them. Bars: the median of four repetitions. Lines: from the worst to the best."
fig, ax = plt.subplots(figsize=(7.5, 4), layout="constrained")
names = list(results)
middle = [median(results[name]) for name in names]
below = [m - min(results[name]) for m, name in zip(middle, names, strict=True)]
above = [max(results[name]) - m for m, name in zip(middle, names, strict=True)]
colours = ["C1" if name in found[0] else "C0" for name in names]
ax.barh(names, middle, color=colours, alpha=0.75)
ax.errorbar(middle, names, xerr=[below, above], fmt="none", ecolor="C3", capsize=3)
ax.invert_yaxis()
ax.set(xlabel="test accuracy, all digits", xlim=(0, 1))
plt.show()

# %% [markdown]
# Let $W_k$ be the weights of network $k$, $M_k$ the curvature of its loss, and $\delta$ the weight decay of its
# training towards the weights $W_0$ from which all $K$ networks started. The merged weights $W$ are the solution of
#
# $$
# \Bigl( \sum_k M_k + \delta I \Bigr) W = \sum_k (M_k + \delta I) W_k - (K - 1) \, \delta W_0 .
# $$
#
# After this chapter you will be able to
#
# - derive this equation from a product of posteriors, and solve it for Kronecker factors;
# - say for which models the merged weights are those of joint training;
# - name the choice of $M_k$ that gives the average, Fisher merging, RegMean and KFAC merging;
# - say what the decay does, and why KFAC without the decay fails here;
# - use the curvature of one task when a network learns the next one.
#
# ## Two halves of ten digits
#
# A network learns to read all ten digits from a few images. This network is called the **start**. Then two copies of
# the start are trained further: model 1 sees only images of the digits 0 to 4, model 2 only images of 5 to 9. The
# images that have trained the start are among them. Both have a weight decay towards the start. The goal is a network
# that reads all ten digits. Joint training, on the data of both models and with the same decay, shows what is possible.
# The experiment is repeated four times, with other data and other random weights.
#
# [Figure 32.1] compares these networks with six ways to merge models 1 and 2. The next section explains each of them.
# "Start once" and "start twice" tell how often the decay towards the start is counted. Some pixels are always zero, so
# that their weights have no curvature in either model. RegMean and KFAC "without the decay" therefore have a tiny decay
# here. These are the accuracies of the four repetitions:

# %% tags=["hide-input"] fold="Measured: the test accuracies; checked: what the text says of them"
for name, values in results.items():
    print(f"{name:22}", *(f"{a:.3f}" for a in values))
for i in range(len(families)):
    at = {name: values[i] for name, values in results.items()}
    assert max(at["model 1"], at["model 2"]) < 0.55
    assert at["KFAC, start once"] > max(at["start"], at["average"]) + 0.004
    assert at["KFAC without the decay"] < at["start"] - 0.05
    merged_ways = {way: at[way] for way in found[0]}
    assert min(merged_ways, key=merged_ways.get) == "KFAC without the decay"
    assert max(merged_ways, key=merged_ways.get) == "RegMean"
    assert all(a > 0.8 for way, a in at.items() if way in found[0] and "without" not in way)
    assert at["joint training"] > at["RegMean"] + 0.01
for other in ("diagonal", "KFAC, start twice"):
    gains = [a - b for a, b in zip(results["KFAC, start once"], results[other], strict=True)]
    print(f"KFAC, start once, against {other}:", *(f"{gain:+.3f}" for gain in gains))
    assert sum(gains) / len(gains) > 0.005
    assert min(gains) > -0.005

# %% [markdown]
# Each model forgets the digits that it does not see. Except for KFAC without the decay, the merged networks are better
# than the start, although they were merged from weights and matrices alone, without images. KFAC with the start counted
# once is better than the average in every repetition. In the mean of the repetitions, it is also better than the
# diagonal and than KFAC with the start counted twice; in a single repetition these accuracies may be equal.
#
# The next sections answer two questions: which equation the matrices enter, and why KFAC without the decay is the worst
# way of all.
#
# ## A product of posteriors
#
# Network $k$ minimises the sum $L_k$ of the losses over its data, with a weight decay $\delta$ towards the start $W_0$.
# Its training ends at the minimum $W_k$. Joint training would minimise
#
# $$
# \sum_k L_k(W) + \tfrac{\delta}{2} \lVert W - W_0 \rVert^2 .
# $$
#
# In terms of probabilities, $e^{-L_k}$ is the likelihood of the data of network $k$. The decay corresponds to a normal
# prior with mean $W_0$ and precision $\delta I$. The weights of each network are the maximum of a posterior, which is
# likelihood times prior. The product of all $K$ posteriors contains the prior $K$ times. Joint training contains the
# prior once. So the product has to be divided by the prior $K - 1$ times:
#
# $$
# p(W \mid \text{all data}) \propto \frac{\prod_k p(W \mid \text{data } k)}{p(W)^{K - 1}} .
# $$
#
# By [Laplace's approximation](29_laplace.py), posterior $k$ is approximately normal, with mean $W_k$ and precision
# $M_k + \delta I$. Here $M_k$ is the curvature of $L_k$ at $W_k$. The logarithm of $p(W \mid \text{all data})$ is then
# quadratic in $W$. At its maximum its gradient is zero:
#
# $$
# \Bigl( \sum_k M_k + \delta I \Bigr) W = \sum_k (M_k + \delta I) W_k - (K - 1) \, \delta W_0 .
# \tag{32.1}
# $$
#
# Suppose that all $M_k$ share an eigenvector. If one network has much more curvature along this eigenvector than the
# others, and much more than the decay, the merged weights along it are nearly those of this one network. Each layer
# is merged on its own.
#
# The choice of $M_k$ is the method:
#
# | $M_k$ | Method |
# | --- | --- |
# | the same for all $k$ | the average of the weights, as in [model soups](bibliography.md#soups) |
# | diagonal | [Fisher merging](bibliography.md#fisher-merging) |
# | $I \otimes A_k$ | [RegMean](bibliography.md#regmean) |
# | $B_k \otimes A_k$ | KFAC merging, as in [MaTS](bibliography.md#mats) |
#
# Here $A_k$ is the input factor and $B_k$ the output factor of KFAC on the data of network $k$; for RegMean, $A_k$ is a
# sum over the data. The table compares only the matrices, for $\delta = 0$. With equal matrices and a decay, the
# solution is not the average.
#
# "KFAC, start once" in [Figure 32.1] is [(32.1)]. "KFAC, start twice" leaves out the last term of [(32.1)] and has
# $2 \delta$ in place of $\delta$ on the left. This is the maximum of the product of both posteriors, in which the prior
# occurs twice.
#
# The sum of several Kronecker products is in general not a Kronecker product. So [(32.1)] is solved by conjugate
# gradients, which need only products with each $M_k$. The function below takes $W - W_0$ as the unknown and has
# $W_k - W_0$ on the right, so that the term with $W_0$ vanishes.

# %% tags=["remove-input"]
code(merged_block)

# %% [markdown]
# [Figure 32.2] shows an example with two weights. The data of network 1 mainly determine the first weight, those of
# network 2 the second.

# %% tags=["hide-input"] fold="Code of the figure" alt="A plane of two weights. The ellipse around network 1 is narrow in the first weight, the ellipse around network 2 is narrow in the second. The average lies between both networks. The merged point lies near the crossing of the long axes of the two ellipses." caption="Two networks in a plane of two weights. Each ellipse is a level line of the objective of one network, its loss with the decay. It is narrow along the weight that the data of this network determine. The merged weights of [(32.1)] have nearly the first weight of network 1 and the second of network 2. They are also those of joint training. The average is not."
Hs = [torch.diag(torch.tensor([9.0, 0.3])), torch.diag(torch.tensor([0.3, 9.0]))]
targets, decay = [torch.tensor([2.0, 0.3]), torch.tensor([0.2, 1.5])], 1.0
minima = [
    torch.linalg.solve(H + decay * torch.eye(2), H @ t) for H, t in zip(Hs, targets, strict=True)
]
Ws_plane = [w.reshape(1, 2) for w in minima]
plane = merged_block(Ws_plane, [Dense(H) for H in Hs], decay, torch.zeros(1, 2))
joint = torch.linalg.solve(
    sum(Hs) + decay * torch.eye(2), sum(H @ t for H, t in zip(Hs, targets, strict=True))
)
assert_exact(plane.flatten(), joint)

fig, ax = plt.subplots(figsize=(5.6, 4), layout="constrained")
angle = torch.linspace(0, 2 * torch.pi, 100)
circle = torch.stack([angle.cos(), angle.sin()])
for k, (H, w) in enumerate(zip(Hs, minima, strict=True)):
    ring = w[:, None] + 0.8 * (H + decay * torch.eye(2)).diagonal().rsqrt()[:, None] * circle
    ax.plot(*ring.cpu(), color=f"C{k}", alpha=0.7)
points = {
    "network 1": (minima[0], "o", (32, 0)),
    "network 2": (minima[1], "o", (-24, 34)),
    "average": (sum(minima) / 2, "s", (10, 0)),
    "merged": (plane[0], "*", (10, 0)),
    "start": (torch.zeros(2), "x", (10, 0)),
}
for k, (name, (w, marker, offset)) in enumerate(points.items()):
    ax.plot(*w.cpu(), marker, ms=8, color=f"C{k}")
    ax.annotate(
        name,
        w.tolist(),
        xytext=offset,
        textcoords="offset points",
        color=f"C{k}",
        va="center",
    )
ax.set(xlabel="first weight", ylabel="second weight", xlim=(-0.9, 2.9), aspect="equal")
plt.show()

# %% [markdown]
# ## Where it is exact
#
# <div class="admonition theorem" markdown="1" id="thm-32.1">
# <p class="admonition-title" markdown="1"><b>Theorem 32.1 (linear models)</b></p>
#
# Let every network be one linear layer, trained to its minimum under the squared error, and let $\delta > 0$. With the
# exact block or with KFAC as $M_k$, the solution of [(32.1)] is the model that is trained on all data, with the same
# decay towards the same start.
#
# </div>
#
# *Proof.* The loss of network $k$ with its decay is quadratic, and its Hessian is $M_k + \delta I$, since KFAC is the
# exact block here ([Chapter 5](05_kfac.py)). Its gradient is $(M_k + \delta I)(W - W_k)$. The sum of these gradients
# over $k$ contains the gradient of the decay $K$ times. Minus $(K - 1) \, \delta (W - W_0)$, it is the gradient of
# joint training. Setting it to zero gives [(32.1)]. $\square$
#
# We train three linear models on data sets of different sizes and with different covariances of the inputs, and one on
# all the data. The first cell has the training in closed form:


# %%
def ridge(X: Tensor, Y: Tensor, decay: float, start: Tensor) -> Tensor:
    """The minimum of the squared error and the decay towards a start."""
    Phi = torch.cat([X, torch.ones(len(X), 1)], 1)  # with a column for the bias
    H = 2 * Phi.T @ Phi + decay * torch.eye(Phi.shape[1])
    return torch.linalg.solve(H, 2 * Phi.T @ Y + decay * start.T).T


# %% [markdown]
# The merged weights are those of the union of the data, with the exact blocks and with KFAC. Other ways to merge are
# off:

# %% tags=["hide-input"] fold="Checked: exact with blocks and KFAC; measured: the errors of four other ways"
SQUARED, decay = nn.MSELoss(reduction="sum"), 0.4
sets = [(torch.randn(n, 5) @ torch.randn(5, 5), torch.randn(n, 3)) for n in (20, 35, 15)]
start = torch.randn(3, 6)
union = ridge(*(torch.cat(t) for t in zip(*sets, strict=True)), decay, start)
linear = nn.Sequential(nn.Linear(5, 3))  # the curvature does not depend on its weights
Ws = [ridge(*part, decay, start) for part in sets]


def of_linear(structure: Callable[[LayerIO], Matrix]) -> list[Matrix]:
    return [over_loader(structure, linear, SQUARED, [part])["0"] for part in sets]


for structure in (block, kfac):
    assert_exact(merged_block(Ws, of_linear(structure), decay, start), union)

Ks = of_linear(kfac)
wrong = {
    "average": sum(Ws) / 3,
    "diagonal": merged_block(Ws, of_linear(diagonal), decay, start),
    "KFAC, start three times": merged_block(Ws, [plus(K, decay) for K in Ks], 0.0, start),
    "KFAC without the decay": merged_block(Ws, Ks, 0.0, start),
}
for name, W in wrong.items():
    print(f"{name:24} off by {relative_error(W, union):.3f}")
    assert relative_error(W, union) > 1e-3

# %% [markdown]
# ### Two networks, directly
#
# Two positive definite Kronecker products can be diagonalised at once, by one transformation of each factor
# ([`KroneckerSum`](16_kpsvd.py)). So without decay and for $K = 2$, no iteration is needed. The decay adds a third
# product, $\delta \, I \otimes I$. Three products can in general not be diagonalised at once.

# %%
direct = KroneckerSum(*Ks[:2]).inverse(0.0) @ (Ks[0] @ Ws[0] + Ks[1] @ Ws[1])
assert_exact(merged_block(Ws[:2], Ks[:2], 0.0, start), direct, tolerance=1e-8)

# %% [markdown]
# ## RegMean is merging by the input factor
#
# [RegMean](bibliography.md#regmean) looks for weights whose outputs, on the inputs of each network, are as near as
# possible to the outputs of that network:
#
# $$
# \min_W \sum_k \sum_{a \in \text{data } k} \lVert W a - W_k a \rVert^2 .
# $$
#
# The derivative is zero at
#
# $$
# W = \Bigl( \sum_k W_k A_k \Bigr) \Bigl( \sum_k A_k \Bigr)^{-1},
# \qquad A_k = \sum_{a \in \text{data } k} a a^\top .
# \tag{32.2}
# $$
#
# This is [(32.1)] with $M_k = I \otimes A_k$ and without decay. Here $A_k$ is a **sum** over the data. The function
# `foof` also returns $I \otimes A_k$, but with the mean over the data in place of the sum. With means, a network with
# few data counts as much as a network with many.
#
# The input factor of KFAC is a mean, too. But for the squared error and $N_k$ data its output factor is
# $B_k = 2 N_k I$, so that the product is twice $I \otimes A_k$ with the sum $A_k$. For the squared error and without
# decay, KFAC is therefore the same as RegMean, and `foof` is not.

# %% tags=["hide-input"] fold="Checked: RegMean is merging by sums, and means give another result"
zero = torch.zeros(3, 6)
As = [M.A for M in of_linear(inputs_summed)]
regmean = torch.linalg.solve(sum(As), sum(W @ A for W, A in zip(Ws, As, strict=True)), left=False)
assert_exact(merged_block(Ws, of_linear(inputs_summed), 0.0, zero), regmean)
assert_exact(merged_block(Ws, of_linear(kfac), 0.0, zero), regmean)
for K, (X, _) in zip(of_linear(kfac), sets, strict=True):
    assert_exact(K.B, 2 * len(X) * torch.eye(3))
means = merged_block(Ws, of_linear(foof), 0.0, zero)
print(f"with means instead of sums: off by {relative_error(means, regmean):.3f}")
assert relative_error(means, regmean) > 0.02

# %% [markdown]
# ## What the decay does
#
# In [Figure 32.1], KFAC without the decay is worse than the plain average. First we measure how far the merged weights
# lie from the start:


# %% tags=["hide-input"] fold="Measured: the distances of weights from the start"
def distance(W: Weights, W0: Weights) -> float:
    return sum((W[n] - W0[n]).square().sum().item() for n in W0) ** 0.5


for f, W in zip(families, found, strict=True):
    Ws, W0 = weights(f)
    models = [distance(V, W0) for V in Ws]
    far = distance(W["KFAC without the decay"], W0)
    once = distance(W["KFAC, start once"], W0)
    assert distance(W["KFAC, start twice"], W0) < once
    joint = distance(trained_weights(f.joint, LAYERS), W0)
    regmean = distance(W["RegMean"], W0)
    print(
        f"models {models[0]:.1f} and {models[1]:.1f}, joint {joint:.1f};",
        f"KFAC start once {once:.1f}, without decay {far:.1f}; RegMean {regmean:.1f}",
    )
    assert far > 2 * max(models)
    assert max(models) < once < joint < far < regmean

# %% [markdown]
# The weights of KFAC without the decay lie far from the start. Most eigenvalues of the curvature are smaller than the
# decay. In [(32.1)] without the decay, the sum of the matrices has small eigenvalues, too, and solving the equation
# divides by them. The matrices of the two models have different eigenvectors. So the result need not lie between the
# weights of both models.
#
# With the decay, the merged weights stay nearer to the start. With the start counted twice, they stay nearer still.
# Diagonal matrices cannot lead so far: without decay, each merged weight lies between those of the two models.

# %% tags=["hide-input"] fold="Checked: eigenvalues below the decay, and weights between those of both models"
shares = []
for f, both in zip(families, curvatures, strict=True):
    for Ms in both:
        s = torch.cat([M.eigenvalues() for M in Ms.values()])
        shares.append((s < DECAY).double().mean().item())
    (V1, V2), W0 = weights(f)
    D1, D2 = ({n: Diagonal(M.scale + 1e-9) for n, M in Ms.items()} for Ms in curvature(f, diagonal))
    V = merged([V1, V2], [D1, D2], 0.0, W0)
    for n in LAYERS:
        assert (V[n] > torch.minimum(V1[n], V2[n]) - 1e-9).all()
        assert (V[n] < torch.maximum(V1[n], V2[n]) + 1e-9).all()
print(
    f"in each of the {len(shares)} models, at least {min(shares):.0%} of the eigenvalues are below the decay"
)
assert min(shares) > 0.8

# %% [markdown]
# ### Why RegMean does well without the decay
#
# The distance alone does not explain the errors: the weights of RegMean lie further from the start than those of KFAC
# without the decay, and RegMean is the best way here. Both have the same input factors. They differ in $B_k$. If all
# networks had $B_k = N_k B$ with the same invertible $B$, then $B$ would cancel in [(32.1)] without decay, and KFAC
# would be the same as RegMean. So the harm comes from the difference between $B_1$ and $B_2$. To see in which layer, we
# give both models the same $B$ in one layer at a time:


# %% tags=["hide-input"] fold="Measured: the accuracy with one common factor B in one layer"
def with_common_factor(f: Family, K: list[dict[str, Kronecker]], layer: str) -> Weights:
    """KFAC without the decay, and with one B for both networks in one layer."""
    numbers = [len(y) for _, y in f.parts]
    common = (K[0][layer].B + K[1][layer].B) / sum(numbers)
    changed = [
        {**Ks, layer: Kronecker(Ks[layer].A, number * common)}
        for Ks, number in zip(K, numbers, strict=True)
    ]
    Ws, W0 = weights(f)
    return merged(Ws, changed, TINY, W0)


for i, (f, K) in enumerate(zip(families, curvatures, strict=True)):
    first, last = (accuracy(f, having(f.start, with_common_factor(f, K, n))) for n in LAYERS)
    print(
        f"own factors {results['KFAC without the decay'][i]:.3f},",
        f"one B in the first layer {first:.3f}, in the last {last:.3f};",
        f"RegMean {results['RegMean'][i]:.3f}",
    )
    assert first > results["KFAC without the decay"][i] + 0.2
    assert first > results["average"][i]
    assert last < results["average"][i] - 0.1

# %% [markdown]
# The harm comes from the first layer. Its $B_k$ has few large eigenvalues. In all other directions of the hidden units,
# the quadratic says that a change costs almost nothing, and without the decay the merged weights change far along them.
# RegMean has $B = I$. It keeps all hidden units near those of network $k$, on the data of network $k$.
#
# Two measurements show this. The first is how far merging moves the inputs of the hidden units, on the
# data of each network, in relation to how far training has moved them from the start. The second is the
# increase of $L_1 + L_2$, real and predicted by the quadratics of KFAC. At $W_k$ the gradient of $L_k$ is
# $-\delta (W_k - W_0)$, because the gradient of $L_k$ with its decay is zero. So the prediction is
#
# $$
# \sum_k \Bigl( - \delta \langle W_k - W_0, W - W_k \rangle + \tfrac12 \langle W - W_k, M_k (W - W_k) \rangle \Bigr) .
# $$


# %% tags=["hide-input"] fold="Two measures: how far units move, and by how much the loss rises"
def moved(f: Family, V: Weights) -> float:
    """How far V moves the inputs of the hidden units, over how far training has moved them."""
    (Ws, W0), by_merging, by_training = weights(f), 0.0, 0.0
    for W, (X, _) in zip(Ws, f.parts, strict=True):
        a = torch.cat([X, torch.ones(len(X), 1)], 1)
        by_merging += (a @ (V["0"] - W["0"]).T).square().sum().item()
        by_training += (a @ (W0["0"] - W["0"]).T).square().sum().item()
    return (by_merging / by_training) ** 0.5


def increases(f: Family, K: list[dict[str, Kronecker]], V: Weights) -> tuple[float, float]:
    """The predicted and the real increase of the sum of both losses."""
    (Ws, W0), predicted, real = weights(f), 0.0, 0.0
    for W, Ms, model, (X, y) in zip(Ws, K, f.models, f.parts, strict=True):
        for n in LAYERS:
            change, gradient = V[n] - W[n], -DECAY * (W[n] - W0[n])
            predicted += (change * (gradient + Ms[n] @ change / 2)).sum().item()
        real += (SUM(having(model, V)(X), y) - SUM(model(X), y)).item()
    return predicted, real


# %% tags=["hide-input"] fold="Measured: three ways to merge, by both measures"
of_trace, measures = [], {}
for f, K, W in zip(families, curvatures, found, strict=True):
    for Ms in K:
        s = torch.linalg.eigvalsh(Ms["0"].B).flip(0)
        of_trace.append(int((s.cumsum(0) < 0.95 * s.sum()).sum()) + 1)
        assert of_trace[-1] < len(s) / 3
    measured = {}
    for way in ("KFAC without the decay", "KFAC, start once", "RegMean"):
        measured[way] = (moved(f, W[way]), *increases(f, K, W[way]))
        measures.setdefault(way, []).append(measured[way])
    without, regmean = measured["KFAC without the decay"], measured["RegMean"]
    assert without[0] > 2 > 1 > regmean[0]
    assert without[1] < 0.5 * regmean[1]
    assert without[2] > 3 * regmean[2]
print(f"at most {max(of_trace)} of {len(s)} eigenvalues of B hold 95 % of its trace")

rows = [[way, *map(median, zip(*values, strict=True))] for way, values in measures.items()]
table(
    ["", "moved", "predicted", "real"],
    [[way, f"{ratio:.2f}", f"{by_kfac:.0f}", f"{real:.0f}"] for way, ratio, by_kfac, real in rows],
)

# %% [markdown]
# The table shows medians of the four repetitions. "Moved" is the first measure. "Predicted" and "real" are increases of
# $L_1 + L_2$.
#
# KFAC without the decay has the smallest predicted increase and the largest real increase. On the data of each network,
# the hidden units of the merged network are far from those of network $k$. The quadratics do not hold over such
# distances. The weights of RegMean are further from the start, but mainly along inputs that hardly occur in the data:
# its hidden units move less than in training.
#
# On these digits RegMean is better than KFAC in all repetitions. It also needs no loss and no backward pass. Whether
# RegMean is better on other data is not tested here.
#
# ## One task after the other
#
# So far both networks are there at once. In *continual learning* the data of task 1 are gone when those of task 2
# arrive, and one network is trained on both in turn. By Bayes' rule, the posterior after task 1 is the prior of
# task 2. With Laplace's approximation of that posterior, task 2 minimises
#
# $$
# L_2(W) + \tfrac12 \bigl\langle W - W_1, \, (M_1 + \delta I) (W - W_1) \bigr\rangle .
# \tag{32.3}
# $$
#
# Up to a factor in front of $M_1$ and the decay, this is [elastic weight consolidation](bibliography.md#ewc) with the
# diagonal, and the method of [Ritter, Botev and Barber](bibliography.md#online-laplace) with Kronecker factors. The
# decay towards the start is counted once: it is in the posterior of task 1, and task 2 has no decay of its own. For
# linear models under the squared error, with the exact block or KFAC, the minimum is once more the model of all data:


# %%
def after(precision: Tensor, W: Tensor, X: Tensor, Y: Tensor) -> Tensor:
    """The minimum of the squared error of one more set and a quadratic around `W`."""
    Phi = torch.cat([X, torch.ones(len(X), 1)], 1)
    by_data = torch.kron(torch.eye(3), 2 * Phi.T @ Phi)
    right = precision @ W.flatten() + 2 * (Y.T @ Phi).flatten()
    return torch.linalg.solve(precision + by_data, right).reshape(3, 6)


first_two = ridge(*(torch.cat(t) for t in zip(*sets[:2], strict=True)), decay, start)
for structure in (block, kfac):
    prior = of_linear(structure)[0].dense() + decay * torch.eye(18)
    assert_exact(after(prior, ridge(*sets[0], decay, start), *sets[1]), first_two)

# %% [markdown]
# For networks this is not so. Model 1 of every repetition is trained further on the images of the digits 5 to 9. We
# minimise [(32.3)] with $M_1 = 0$, with the diagonal, and with KFAC. The first four numbers of a line are accuracies on
# all digits, the others on the digits 0 to 4, which the first task has taught:


# %% tags=["hide-input"] fold="Trained: model 1, on the second half of the digits, with three priors"
def continued(f: Family, Ms: dict[str, Matrix]) -> nn.Module:
    """Model 1, trained on the data of model 2 with [(32.3)]."""
    first = f.models[0]
    groups, W1 = groups_of(first, LAYERS), trained_weights(first, LAYERS)

    def penalty(model: nn.Module) -> Tensor:
        W = block_matrices(groups, dict(model.named_parameters()))
        D = {n: W[n] - W1[n] for n in LAYERS}
        return sum((D[n] * (Ms[n] @ D[n] + DECAY * D[n])).sum() for n in LAYERS) / 2

    return train(first, *f.parts[1], penalty, 100)


def of_old_digits(f: Family, model: nn.Module) -> float:
    """The share of test images of the digits 0 to 4 that are read correctly."""
    X, y = (t[f.test[1] < 5] for t in f.test)
    return (model(X).argmax(1) == y).double().mean().item()


def no_curvature(io: LayerIO) -> Diagonal:
    """Zeros."""
    return Diagonal(torch.zeros(io.g.shape[-1], io.a.shape[-1]))


priors = {"no curvature": no_curvature, "the diagonal": diagonal, "KFAC": kfac}
in_turn_of: dict[str, list[nn.Module]] = {}
remembered: dict[str, list[float]] = {}
for name, approximation in priors.items():
    firsts = [over_loader(approximation, f.models[0], SUM, f.parts[:1]) for f in families]
    pairs = zip(families, firsts, strict=True)
    in_turn_of[name] = [continued(f, M) for f, M in pairs]
for name, models in in_turn_of.items():
    of_all = [accuracy(f, m) for f, m in zip(families, models, strict=True)]
    of_old = [of_old_digits(f, m) for f, m in zip(families, models, strict=True)]
    print(f"{name:16}", *(f"{a:.3f}" for a in of_all), " old digits", *(f"{a:.3f}" for a in of_old))
    results[f"in turn, {name}"], remembered[name] = of_all, of_old
for name in ("KFAC, start once", "joint training"):
    print(f"{name:16}", *(f"{a:.3f}" for a in results[name]))
for i, once in enumerate(results["KFAC, start once"]):
    for values in (
        [results[f"in turn, {name}"][i] for name in priors],
        [remembered[name][i] for name in priors],
    ):
        assert values[0] < values[1] < values[2]
    assert results["in turn, KFAC"][i] < once - 0.05
    assert remembered["KFAC"][i] < 0.75

# %% [markdown]
# With KFAC the network forgets the least, in every repetition, but still much. Merging model 1 with model 2, which was
# trained apart, reads more of all ten digits. Why is so much forgotten? [(32.3)] replaces the losses of task 1 by a
# quadratic at $W_1$. We compare the increase of these losses that the quadratic predicts at the end with the real
# increase: with KFAC as $M_1$, and with the exact Gauss-Newton matrix of all layers together.

# %% tags=["hide-input"] fold="Measured: how much the losses of task 1 rise, and what the quadratic predicts"
for f, model in zip(families, in_turn_of["KFAC"], strict=True):
    (X, _), first = f.parts[0], f.models[0]
    M = over_loader(kfac, first, SUM, f.parts[:1])
    W0, W1, W = (trained_weights(m, LAYERS) for m in (f.start, first, model))
    D = {n: W[n] - W1[n] for n in LAYERS}
    linear_part = -DECAY * sum(((W1[n] - W0[n]) * D[n]).sum() for n in LAYERS)  # J's gradient is 0
    by_kfac = linear_part + sum((D[n] * (M[n] @ D[n])).sum() / 2 for n in LAYERS)
    at, towards = parameters_from(first, W1), parameters_from(first, D)
    f1, u = torch.func.jvp(lambda p: torch.func.functional_call(first, p, (X,)), (at,), (towards,))  # noqa: B023
    p = f1.softmax(1)
    by_ggn = linear_part + ((p * u.square()).sum() - (p * u).sum(1).square().sum()) / 2
    real = sum(SUM(m(X), f.parts[0][1]).detach() * c for m, c in ((model, 1), (first, -1)))
    print(
        f"increase: by KFAC {by_kfac:.0f}, by the exact matrix {by_ggn:.0f}, real {real:.0f};",
        end=" ",
    )
    change = model(X).detach() - f1
    unseen, seen = (change[:, part].mean().item() for part in (slice(5, 10), slice(5)))
    print(f"outputs 5 to 9 {unseen:+.1f}, 0 to 4 {seen:+.1f}")
    print(f"    mean probability of a digit of 5 to 9 before: {p[:, 5:].mean():.4f}")
    assert 0 < by_kfac < real / 10
    assert 0 < by_ggn < real / 5
    assert unseen > seen + 1
    assert p[:, 5:].mean() < 0.01

# %% [markdown]
# Even with the exact matrix, the predicted increase is far too small. Model 1 had no images of the digits 5 to 9 in its
# further training, and gives each of them a tiny probability $p$ for an image of task 1. The curvature of the loss
# along such an output is $p (1 - p)$, which is tiny, too. A parabola with this curvature says that neither a lower nor
# a higher output matters. The loss is not symmetric: if the output falls, the loss hardly changes. If the output rises,
# the loss grows much faster than the parabola. Task 2 raises these outputs for images of task 1, as the last numbers of
# the lines show.
#
# ## What goes wrong
#
# **A mean loss.** The curvature must belong to the sum of the losses. The curvature of a mean loss is small, and the
# decay outweighs it. Then [(32.1)] is nearly $W - W_0 = \sum_k (W_k - W_0)$, whatever the data have determined.

# %% tags=["hide-input"] fold="Measured: merging by the curvature of the mean and of the sum"
MEAN = nn.CrossEntropyLoss()
for i, f in enumerate(families):
    Ws, W0 = weights(f)
    pairs = zip(f.models, f.parts, strict=True)
    Ms = [over_loader(kfac, model, MEAN, [part]) for model, part in pairs]
    V = merged(Ws, Ms, DECAY, W0)
    changes = {n: W0[n] + sum(W[n] - W0[n] for W in Ws) for n in W0}
    assert distance(V, changes) < 0.05 * distance(changes, W0)
    of_mean = accuracy(f, having(f.start, V))
    print(f"mean {of_mean:.3f}, sum {results['KFAC, start once'][i]:.3f}")
    assert of_mean < results["KFAC, start once"][i]

# %% [markdown]
# **Networks that do not correspond.** The order of hidden units is arbitrary. If two units change places, with their
# incoming and outgoing weights, no output changes, but the weight matrices change. Networks from different starts need
# not have corresponding units at the same places. We merge each joint network with a copy of itself whose units were
# permuted. Both networks have the same outputs, but the network that is merged from them reads fewer digits correctly.
# If the network is merged with itself, it loses almost no accuracy.

# %% tags=["hide-input"] fold="Measured: a network merged with its permuted twin, and with itself"
torch.manual_seed(0)
for f in families:
    W, W0 = trained_weights(f.joint, LAYERS), trained_weights(f.start, LAYERS)
    order = torch.randperm(32)
    bias = torch.tensor([32])
    permuted = {"0": W["0"][order], "2": W["2"][:, torch.cat([order, bias])]}
    twin = having(f.joint, permuted)
    X, y = (torch.cat(t) for t in zip(*f.parts, strict=True))
    assert_exact(twin(X), f.joint(X))
    Ms = [over_loader(kfac, model, SUM, [(X, y)]) for model in (f.joint, twin)]
    with_twin = merged([W, permuted], Ms, DECAY, W0)
    with_itself = merged([W, W], [Ms[0], Ms[0]], DECAY, W0)
    three = [accuracy(f, having(f.start, V)) for V in (W, with_twin, with_itself)]
    print(f"the network {three[0]:.3f}, with its twin {three[1]:.3f}, with itself {three[2]:.3f}")
    assert three[1] < three[0] - 0.01
    assert three[2] > three[1] + 0.01
    assert three[2] > three[0] - 0.01

# %% [markdown]
# ## In one minute
#
# - **Equation.** Merging multiplies posteriors. Each contains the prior around the start, which has to be counted once:
#   [(32.1)].
# - **Exact** for linear models under the squared error: the merged model is that of all data ([Theorem 32.1]).
# - **The choice of the matrix is the method:** average, Fisher merging, RegMean, KFAC. RegMean uses the input factor
#   alone, as a sum over the data. It was the best way here, and needs no backward pass.
# - **Decay.** KFAC without the decay was worse than the average here: it moved the hidden units so far that the
#   quadratics did not hold.
# - **One task after the other.** The posterior of one task is the prior of the next. The networks here
#   forgot much nevertheless, because the quadratic at $W_1$ does not hold as far as task 2 moves the weights.
# - **Conditions.** The hidden units of the networks must correspond, as they may after a common start. The curvature
#   must belong to the sum of the losses.
#
# ## Exercises
#
#
# **Exercise 32.1.** Merge a network with itself ($W_1 = W_2$, $M_1 = M_2$). By which factor does its distance from the
# start change, along an eigenvector of $M_1$ with the eigenvalue $s$? Why is the factor not 1?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Let $d$ and $d_1$ be the components of $W - W_0$ and $W_1 - W_0$ along the eigenvector. Then [(32.1)] is
# $(2 s + \delta) \, d = 2 (s + \delta) \, d_1$. The factor is $2 (s + \delta) / (2 s + \delta)$, which is between 1 and
# 2. It is not 1 because the formula treats the two copies as networks with different data. Then there are twice as many
# data, and the decay has less influence.
#
# </details>
#
# **Exercise 32.2.** A third task arrives after [(32.3)]. Which quadratic takes the place of the first two tasks, and
# around which weights? How often does it contain the decay? Show that for linear models under the squared error, with
# exact blocks, the third training ends at the model of all data.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The objective [(32.3)] has the curvature $M_1 + M_2 + \delta I$ at its minimum $W_{12}$. So the third training
# minimises $L_3(W) + \tfrac12 \langle W - W_{12}, (M_1 + M_2 + \delta I) (W - W_{12}) \rangle$, with one decay. For
# linear models the quadratic is the loss of both tasks with the decay, up to a constant.
#
# </details>
#
# **Exercise 32.3.** A network has no data: $M_k = 0$ and $W_k = W_0$. Show that it does not change the merged weights.
# What does it do to the plain average?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# This network adds $\delta W_0$ to the sum on the right of [(32.1)]. It also raises $K$ by one, so that the last term
# subtracts one more $\delta W_0$. Both cancel, and nothing is added on the left. The plain average moves towards the
# start.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
Ws = [ridge(*part, decay, start) for part in sets]
E = Ks[0].eigen()  # 32.1
twice = merged_block([Ws[0], Ws[0]], [E, E], decay, start)
coefficients = [E.QB.T @ (W - start) @ E.QA for W in (twice, Ws[0])]
assert_exact(coefficients[0], coefficients[1] * 2 * (E.scale + decay) / (2 * E.scale + decay))

both = Ks[0].dense() + Ks[1].dense() + decay * torch.eye(18)  # 32.2
assert_exact(after(both, merged_block(Ws[:2], Ks[:2], decay, start), *sets[2]), union)

nothing = Kronecker(torch.zeros(6, 6), torch.zeros(3, 3))  # 32.3
assert_exact(merged_block([*Ws, start], [*Ks, nothing], decay, start), union)
assert relative_error((sum(Ws) + start) / 4, sum(Ws) / 3) > 0.01
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Matena and Raffel (2022)](bibliography.md#fisher-merging) for merging by a diagonal;
# [Jin et al. (2023)](bibliography.md#regmean) for the input factor;
# [Tam, Bansal and Raffel (2024)](bibliography.md#mats) for Kronecker factors and conjugate gradients;
# [Wortsman et al. (2022)](bibliography.md#soups) for averages of networks that were tuned from one start.
