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
# # 14. EKFAC: the right eigenvalues in KFAC's basis
#
# **Part V: Better and faster.** The eigenvalues of KFAC are products of averages. Which ones would
# be best for its eigenvectors?
#
# KFAC approximates the curvature block of a layer by $B \otimes A$. Let $A$ have the eigenvalues $\alpha_i$ with
# eigenvectors $q_i$, the columns of $Q_A$, and let $B$ have $\beta_o$ with $r_o$, the columns of $Q_B$. Then KFAC has
# the eigenvectors $U = Q_B \otimes Q_A$ and the eigenvalues $\beta_o \alpha_i$. EKFAC keeps the basis $U$, which its
# paper calls the Kronecker-factored eigenbasis, and replaces the eigenvalues ([Figure 14.1]).

# %% tags=["hide-input"]
from collections.abc import Iterator
from textwrap import fill

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, MSELoss, Sequential, Tanh

from kfac_scratch.approximations.ekfac import (
    AmortisedEKFAC,
    ekfac,
    ekfac_reduce,
    rescaled,
    second_moments,
)
from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.approximations.kfac import kfac, kfac_reduce
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import empirical
from kfac_scratch.matrices.kronecker import KroneckerEigen
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"] alt="Three 12 by 12 heat maps in one colour scale: the exact block in KFAC's eigenbasis, with a strong diagonal and weaker entries beside it; KFAC, a diagonal that differs from the first in several entries; and EKFAC, exactly the diagonal of the first." caption="A block $F$ of a small layer in KFAC's eigenbasis $U$. KFAC's diagonal has the products $\\beta_o \\alpha_i$. EKFAC's diagonal is the diagonal of $U^\\top F U$. Neither has the entries beside the diagonal."
own = torch.Generator(torch.get_default_device()).manual_seed(1)
io = LayerIO(torch.randn(8, 1, 4, generator=own), torch.randn(1, 8, 1, 3, generator=own))
K, E = kfac(io).eigen(), ekfac(io)
U = torch.kron(K.QB, K.QA)
rotated = {r"exact: $U^\top F U$": U.T @ io.block() @ U}
rotated |= {"KFAC": K.scale.flatten().diag(), "EKFAC": E.scale.flatten().diag()}
assert_exact(E.scale.flatten(), (U.T @ io.block() @ U).diagonal())
matrices(rotated)

# %% [markdown]
# The Kronecker structure is needed for the basis, because a general orthogonal matrix of this size can be neither
# stored nor applied. It is not needed for the eigenvalues: there are only as many of them as weights. EKFAC's
# eigenvalues are
#
# $$
# s_{oi} = \sum_{v, n} \bigl( Q_B^\top G_{vn} Q_A \bigr)_{oi}^2
# $$
#
# with the gradients $G_{vn}$ of single data ([Theorem 4.1]): the second moments of the gradient along the basis
# vectors.
#
# After this chapter you will be able to
#
# - compute EKFAC's eigenvalues, and prove that no other eigenvalues in this basis are nearer to the block;
# - say which part of KFAC's error they correct, and which part stays;
# - keep eigenvalues fresh while the basis is old, and carry them over when it changes.
#
# ## The best diagonal in a given basis
#
# Let $F$ be the exact block of a layer and $U$ any orthogonal matrix of the same size. We look for
# numbers $s_k$ such that $U \operatorname{diag}(s)\, U^\top$ is as near to $F$ as possible in the
# Frobenius norm, $\lVert M \rVert^2 = \sum_{kl} M_{kl}^2 = \operatorname{tr}(M^\top M)$. This norm
# does not change under rotation: $\operatorname{tr}(U^\top M^\top U\, U^\top M U) = \operatorname{tr}(M^\top M)$,
# as $U U^\top = I$ and factors may be moved around a trace. Therefore
#
# $$
# \begin{aligned}
# \lVert F - U \operatorname{diag}(s)\, U^\top \rVert^2
# &= \lVert U^\top F U - \operatorname{diag}(s) \rVert^2 \\
# &= \sum_{k \ne l} (U^\top F U)_{kl}^2 + \sum_k \bigl( (U^\top F U)_{kk} - s_k \bigr)^2 .
# \end{aligned}
# \tag{14.1}
# $$
#
# The first sum does not depend on $s$. The second one is zero for
#
# $$
# s_k = (U^\top F U)_{kk} = u_k^\top F u_k ,
# \tag{14.2}
# $$
#
# the curvatures along the basis vectors. In other words: matrices that are diagonal in the basis $U$ are a linear
# space, and [(14.2)] is the orthogonal projection of $F$ onto it.
#
# <div class="admonition theorem" markdown="1" id="thm-14.1">
# <p class="admonition-title" markdown="1"><b>Theorem 14.1 (the best eigenvalues)</b></p>
#
# Let $s$ be as in [(14.2)] and $E = U \operatorname{diag}(s)\, U^\top$. For all numbers $t$,
#
# $$
# \begin{aligned}
# \lVert F - E \rVert^2 &= \lVert F \rVert^2 - \lVert s \rVert^2 , \\
# \lVert F - U \operatorname{diag}(t)\, U^\top \rVert^2
# &= \lVert F - E \rVert^2 + \lVert s - t \rVert^2 ,
# \end{aligned}
# \tag{14.3}
# $$
#
# and $\operatorname{tr} E = \operatorname{tr} F$. If $F$ is positive semi-definite, so is $E$.
#
# </div>
#
# **Proof.** By [(14.1)], the squared error with the numbers $t$ is the first sum plus $\lVert s - t \rVert^2$, and
# with $s$ it is the first sum. This is the second line. With $t = 0$ it reads
# $\lVert F \rVert^2 = \lVert F - E \rVert^2 + \lVert s \rVert^2$, the first line. The trace of $U^\top F U$ is the
# trace of $F$ and also the sum of the $s_k$, the trace of $E$. If $F$ is positive semi-definite,
# $s_k = u_k^\top F u_k \ge 0$. $\blacksquare$
#
# With $U = Q_B \otimes Q_A$ and $t_{oi} = \beta_o \alpha_i$, the second line compares EKFAC with KFAC: **EKFAC is
# never farther from the block than KFAC**, and equally near only if it equals KFAC. EKFAC corrects the part
# $\lVert s - \beta \alpha^\top \rVert$ of KFAC's error. The entries of $U^\top F U$ beside the diagonal stay wrong.
#
# ## As second moments
#
# How is $s$ computed without $F$? The block is a sum of outer products of gradients,
# $F = \sum_{vn} \operatorname{vec}(G_{vn}) \operatorname{vec}(G_{vn})^\top$ ([Theorem 4.1]). The basis
# vector $r_o \otimes q_i$ is the matrix $r_o q_i^\top$ with its rows lined up, by [(1.5)]. So
#
# $$
# s_{oi} = \sum_{v, n} \bigl( (r_o \otimes q_i)^\top \operatorname{vec}(G_{vn}) \bigr)^2
# = \sum_{v, n} \bigl( Q_B^\top G_{vn} Q_A \bigr)_{oi}^2 .
# \tag{14.4}
# $$
#
# So every gradient is rotated, its entries are squared, and the squares are added up. As loops:


# %%
def second_moments_by_hand(io: LayerIO, QA: Tensor, QB: Tensor) -> Tensor:
    s = torch.zeros(len(QB), len(QA))
    for v in range(io.g.shape[0]):
        for n in range(io.g.shape[1]):
            G = torch.zeros(len(QB), len(QA))
            for position in range(io.g.shape[2]):
                G += torch.outer(io.g[v, n, position], io.a[n, position])
            s += (QB.T @ G @ QA) ** 2
    return s


def random_io(N: int, S: int = 1, V: int = 2) -> LayerIO:
    """Inputs and vectors of a layer with 5 inputs and 3 outputs, made up."""
    return LayerIO(torch.randn(N, S, 5), torch.randn(V, N, S, 3))


for S in (1, 4):
    io = random_io(7, S)
    F, K = io.block(), kfac(io).eigen()
    U = torch.kron(K.QB, K.QA)
    s = second_moments_by_hand(io, K.QA, K.QB)
    assert_exact(s.flatten(), (U.T @ F @ U).diagonal())
    assert_exact(second_moments(io, K.QA, K.QB), s)

# %% [markdown]
# With one position per datum, $G_{vn} = g_{vn} a_n^\top$ and its rotation is the outer product of
# $Q_B^\top g_{vn}$ and $Q_A^\top a_n$. The square of an outer product is the outer product of
# squares. With $\beta_o = \sum_{vn} (r_o^\top g_{vn})^2$ and
# $\alpha_i = \tfrac1N \sum_n (q_i^\top a_n)^2$, the eigenvalues that KFAC has,
#
# $$
# \begin{aligned}
# s_{oi} &= \sum_n \Bigl( \sum_v (r_o^\top g_{vn})^2 \Bigr) (q_i^\top a_n)^2 , \\
# s_{oi} - \beta_o \alpha_i
# &= N \operatorname{Cov} \Bigl( \sum_v (r_o^\top g_{vn})^2,\; (q_i^\top a_n)^2 \Bigr) .
# \end{aligned}
# \tag{14.5}
# $$
#
# KFAC takes the product of averages, EKFAC the average of products. By [Theorem 5.1], the entries of KFAC's error are
# $N$ times the covariances of the entries of $B_n = \sum_v g_{vn} g_{vn}^\top$ with those of $A_n = a_n a_n^\top$.
# EKFAC adds the diagonal part of this covariance in KFAC's basis. The two agree if and only if no squared projection
# of $g$ is correlated with one of $a$.
#
# ### In the package
#
# The case of one position never forms a gradient: two rotations, two squares, one product of
# matrices.

# %% tags=["beside", "remove-input"]
code(ekfac, second_moments)

# %%
for S in (1, 4):
    io = random_io(7, S)
    F, K, E = io.block(), kfac(io).eigen(), ekfac(io)
    assert_exact(E.QA, K.QA)
    error = (F - E.dense()).square().sum()
    assert_exact(error, F.square().sum() - E.scale.square().sum())
    to_kfac = (F - K.dense()).square().sum()
    assert_exact(to_kfac, error + (E.scale - K.scale).square().sum())
    assert_exact(E.trace(), F.trace())
    assert abs(K.trace() - F.trace()) > 1e-4 * F.trace()
    assert E.scale.min() >= 0
    print(f"{S} position(s): error of KFAC {relative_error(K.dense(), F):.3f},", end=" ")
    print(f"of EKFAC {relative_error(E.dense(), F):.3f}")

io = random_io(7)
K, E = kfac(io).eigen(), ekfac(io)
along_g, along_a = (io.g.squeeze(2) @ K.QB).square().sum(0), (io.a.squeeze(1) @ K.QA).square()
covariance = (along_g - along_g.mean(0)).T @ (along_a - along_a.mean(0)) / 7
assert_exact(E.scale - K.scale, 7 * covariance)

# %% [markdown]
# ### Per datum, not per position
#
# With weight sharing, a datum's gradient is a sum over positions, and [(14.4)] squares the sum. A sum of
# squares of every position's gradient lacks the products of different positions. It is
# the best diagonal for another matrix, the block of data with one position each.

# %%
io = random_io(7, S=4)
E = ekfac(io)
flat = LayerIO(io.a.reshape(28, 1, 5), io.g.reshape(2, 28, 1, 3))  # positions as if they were data
per_position = KroneckerEigen(E.QA, E.QB, second_moments(flat, E.QA, E.QB))
wrong, right = (relative_error(M.dense(), io.block()) for M in (per_position, E))
print(f"error: {right:.3f} per datum, {wrong:.3f} per position")
assert_exact(kfac(flat).dense(), kfac(io).dense())  # KFAC itself cannot tell them apart
assert wrong > 1.05 * right
assert abs(per_position.trace() - io.block().trace()) > 0.01 * io.block().trace()

# %% [markdown]
# **KFAC-reduce has eigenvectors, too.** They come from the mean input and the summed vector over
# positions ([Chapter 6](06_weight_sharing.py)), and [Theorem 14.1] holds for any basis. The second
# moments still need every datum's gradient, which is the sum of products $g_s a_s^\top$ and not the
# product of $\sum_s g_s$ and the mean $a_s$. So EKFAC-reduce takes its basis from `io.reduced()` and its
# moments from `io`. A reduced layer knows how many positions a row stands for, and EKFAC refuses it.

# %% tags=["remove-input"]
code(ekfac_reduce)

# %%
K, E = kfac_reduce(io), ekfac_reduce(io)
right, plain = (relative_error(M.dense(), io.block()) for M in (E, K))
print(f"error: {right:.3f} of EKFAC-reduce, {plain:.3f} of KFAC-reduce")
assert right < plain
assert_exact(E.trace(), io.block().trace())
try:
    ekfac(io.reduced())
except ValueError as error:
    print(fill(str(error), 90))
else:
    raise AssertionError("the gradients of data are lost")

# %% [markdown]
# In training, `KFAC(model, loss, approximation=AmortisedEKFAC(factors=MovingAverage(kfac_reduce)))` averages
# EKFAC-reduce over batches (see [the amortised form](#the-amortised-form)). It needs the default flavour, which keeps
# a row for every position. The first batch gives the same matrix:

# %%
amortised_reduce = AmortisedEKFAC(factors=MovingAverage(kfac_reduce))
assert_exact(amortised_reduce.update(None, io, 1.0).dense(), E.dense())

# %% [markdown]
# ## Where EKFAC is exact
#
# $F = B \otimes A$ is diagonal in its own eigenbasis. So **EKFAC is exact wherever KFAC is**: a single datum, deep
# linear networks with squared error, the last layer with squared error ([Chapter 5](05_kfac.py) has the list). By
# [Theorem 14.1], EKFAC is exact if and only if $F$ is diagonal in KFAC's basis. In an ordinary network it is not:

# %%
X, targets, classes = torch.randn(11, 5), torch.randn(11, 3), torch.randint(3, (11,))
linear = Sequential(Linear(5, 4), Linear(4, 6), Linear(6, 3))
for io in layer_ios(linear, MSELoss(), X, targets).values():
    assert_exact(ekfac(io).dense(), io.block())

bent = Sequential(Linear(5, 4), Tanh(), Linear(4, 6), Tanh(), Linear(6, 3))
last = layer_ios(bent, MSELoss(), X, targets)["4"]
assert_exact(ekfac(last).dense(), last.block())
for io in layer_ios(bent, CrossEntropyLoss(), X, classes).values():
    k, e = (relative_error(M.dense(), io.block()) for M in (kfac(io), ekfac(io)))
    print(f"tanh and cross-entropy: KFAC {k:.3f}, EKFAC {e:.3f}")
    assert 0.01 < e < k

# %% [markdown]
# ## A trained network
#
# How much does EKFAC gain in a trained network? We train three layers on handwritten digits and look at the
# eigenvalues of every layer. [(14.3)] gives the share of KFAC's squared error that is in the eigenvalues.

# %%
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
loss = CrossEntropyLoss()


def network() -> Sequential:
    return Sequential(Linear(64, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 10))


def train(model: Sequential, steps: int) -> Iterator[int]:
    """Stop before every step, and once at the end."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for number in range(steps):
        yield number
        batch = torch.randint(1000, (100,))
        optimizer.zero_grad()
        loss(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    yield steps


model = network()
list(train(model, 100))
X, y = images[1000:1200], labels[1000:1200]
ios = layer_ios(model, loss, X, y)
for name, io in ios.items():
    F, K, E = io.block(), kfac(io).eigen(), ekfac(io)
    k, e = relative_error(K.dense(), F), relative_error(E.dense(), F)
    print(f"layer {name}: KFAC {k:.3f}, EKFAC {e:.3f}; ", end="")
    print(f"in the eigenvalues: {1 - e**2 / k**2:.0%} of the squared error")
    assert_exact(E.trace(), F.trace())
    assert 0.8 * k < e < k

# %% tags=["hide-input"] alt="Three log-log scatter plots, one per layer, of EKFAC's eigenvalues against KFAC's products, with the diagonal as a dashed line. The points form clouds about the diagonal, which scatter by a factor of several to both sides." caption="Every eigenvalue of KFAC and its correction. On the dashed line EKFAC would agree with KFAC; the points lie on both sides of it, some by a factor of two and more. (Eigenvalues of zero are left out.)"
fig, axes = plt.subplots(1, 3, figsize=(9.4, 3.2), layout="constrained")
for ax, (name, io) in zip(axes, ios.items(), strict=True):
    products, moments = kfac(io).eigen().scale.flatten(), ekfac(io).scale.flatten()
    shown = products > 1e-8 * products.max()
    x, corrected = products[shown].cpu(), moments[shown].cpu()
    ax.loglog(x, corrected, ".", markersize=3, alpha=0.6, rasterized=True)
    ends = [x.min(), x.max()]
    ax.loglog(ends, ends, "--", color=ax.xaxis.label.get_color(), linewidth=1)
    ax.set(title=f"layer {name}", xlabel=r"KFAC: $\beta_o \alpha_i$")
axes[0].set_ylabel(r"EKFAC: $s_{oi}$")
plt.show()

factor = ekfac(ios["2"]).scale / kfac(ios["2"]).eigen().scale
print(f"layer 2: corrections from {factor.min().item():.2f} to {factor.max().item():.2f}")
assert factor.max() > 2 > 0.5 > factor.min()

# %% [markdown]
# KFAC gets the order of magnitude right, over many orders of magnitude. Individual eigenvalues are
# off by the printed factors, and a step divides by them. But only a small share of the *error* was in the
# eigenvalues. Most of it is in the basis: $F$ is far from diagonal in it, and no eigenvalues correct this. (This is
# one small network with one seed. The share depends on the network.)
#
# ## What EKFAC does not promise
#
# The theorem has two limits. First, it compares diagonals *in KFAC's basis*. The plain diagonal of $F$ uses another
# basis, that of the weights themselves. The paper's abstract says that a diagonal is likely to be more effective in
# KFAC's basis, not that it always is. We draw random layers and count those where the other basis is the better one:


# %%
def random_layer(seed: int) -> LayerIO:
    torch.manual_seed(seed)
    return LayerIO(torch.randn(8, 1, 4), torch.randn(1, 8, 1, 3))


trials, diagonal_wins = 400, []
for seed in range(trials):
    io = random_layer(seed)
    F, K, E = io.block(), kfac(io), ekfac(io)
    plain, k, e = (relative_error(M, F) for M in (F.diagonal().diag(), K.dense(), E.dense()))
    assert e <= k
    if plain < e:
        diagonal_wins.append((plain, e))
print(f"of {trials} layers, the plain diagonal is nearer to F than EKFAC in {len(diagonal_wins)}")
print(f"an example: diagonal {diagonal_wins[0][0]:.3f}, EKFAC {diagonal_wins[0][1]:.3f}")
assert 0 < len(diagonal_wins) < trials / 10

# %% [markdown]
# So "likely" is right: in more than nine of ten of these layers, KFAC's basis is the better one.
#
# Second, the theorem is about the block, and an optimizer uses the damped *inverse*. The smallest eigenvalues weigh
# most in the inverse, and the largest ones in the Frobenius norm of the block. For the same layers we compare the
# inverses with $(F + \delta I)^{-1}$. We also compare steps: a step $p$ from a gradient $h$, with the best learning
# rate, lowers the damped quadratic model by $\tfrac12 (h^\top p)^2 / \bigl( p^\top (F + \delta I) p \bigr)$.

# %%
farther, lower = 0, 0
for seed in range(trials):
    io = random_layer(seed)
    damped = io.block() + 0.1 * io.block().trace() / 12 * torch.eye(12)
    delta = (0.1 * io.block().trace() / 12).item()
    h = io.gradients().sum((0, 1))
    distance, decrease = [], []
    for M in (kfac(io), ekfac(io)):
        distance.append((M.inverse(delta).dense() - torch.linalg.inv(damped)).norm())
        p = (M.inverse(delta) @ h).flatten()
        decrease.append((h.flatten() @ p) ** 2 / (p @ damped @ p))
    farther += int(distance[1] > distance[0])
    lower += int(decrease[1] < decrease[0])
print(f"EKFAC's inverse is farther off than KFAC's in {farther} of {trials} layers,")
print(f"and its step lowers the quadratic model less in {lower}")
assert 0 < farther < lower < trials / 2

# %% [markdown]
# So EKFAC was never farther from the block than KFAC, and in most layers its inverse was nearer and its step better,
# but not in all.
#
# ## Basis now and then, eigenvalues often
#
# Two eigendecompositions cost $O(d_\text{out}^3 + d_\text{in}^3)$, and they use the hardware less well than
# products of matrices. A rotation of a batch costs $N (d_\text{in}^2 + V d_\text{out}^2)$ with one position. So a
# basis may be computed rarely, and fresh eigenvalues in it often. [Theorem 14.1] holds for *any* orthogonal basis:
# fresh eigenvalues in an old basis are still the best ones for this basis.

# %% tags=["beside", "remove-input"]
code(rescaled)

# %% [markdown]
# We train once more and watch the middle layer, always on the same 200 images. KFAC and its basis are
# kept after 5 steps, when the network changes fast, and in a second experiment after 100 steps.

# %%
kinds = ("stale KFAC", "fresh KFAC", "stale basis, fresh eigenvalues", "fresh EKFAC")
measured, young = {}, network()
for number in train(young, 160):
    if number % 5 or number == 0:
        continue
    io = layer_ios(young, loss, X, y)["2"]
    if number in (5, 100):
        old, start = kfac(io).eigen(), number
        measured[start] = []
    F = io.block()
    now = old, kfac(io), rescaled(old, io), ekfac(io)
    row = [relative_error(M.dense(), F) for M in now]
    measured[start].append((number - start, *row, (old.trace() / F.trace()).item()))
    assert row[2] <= row[0]
    assert row[3] <= row[1]

# %%
after_30 = {start: rows[6] for start, rows in measured.items()}
for start, row in after_30.items():
    print(f"kept after {start} steps, and {row[0]} steps later:")
    for kind, error in zip(kinds, row[1:5], strict=True):
        print(f"    {kind:31} error {error:.3f}")
    print(f"    stale trace over true trace {row[5]:.2f}")
loss_of_basis = {start: row[3] - row[4] for start, row in after_30.items()}
assert loss_of_basis[5] > 0.2
assert 0 < loss_of_basis[100] < 0.1
assert max(after_30[5][5], 1 / after_30[5][5]) > 1.5

# %% tags=["hide-input"] alt="Two plots of the relative error of four approximations of the middle layer against training steps since the basis was kept. Left, kept after 5 steps: stale KFAC rises to about one, the stale basis with fresh eigenvalues stays a little below it, and fresh KFAC and fresh EKFAC are far lower. Right, kept after 100 steps: all four are close together, with fresh EKFAC lowest and stale KFAC highest." caption="Errors of four approximations after a basis was kept. Left: kept after 5 steps; within 20 steps the old basis is of little use, even with fresh eigenvalues. Right: kept after 100 steps; with fresh eigenvalues the old basis stays nearly as good as a fresh one."
fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained", sharey=True)
for ax, (start, rows) in zip(axes, measured.items(), strict=True):
    steps, *curves = list(zip(*rows, strict=True))[:5]
    for kind, curve, style in zip(kinds, curves, ("-", "--", "-", "--"), strict=True):
        ax.plot(steps[:13], curve[:13], "." + style, label=kind)
    ax.set(xlabel="steps since then", title=f"kept after {start} steps", ylim=(0, None))
axes[0].set_ylabel("relative error")
axes[1].legend(fontsize="small")
plt.show()

# %% [markdown]
# In the beginning the network changes fast, and a basis is out of date after a few steps. Fresh eigenvalues then
# correct the *scale* of the block, since their trace is exact, and little else. Later a basis can be kept much
# longer. So the period between two bases should be short at first and may be long later. The loop also asserts the
# one statement that [Theorem 14.1] proves for every step: fresh eigenvalues are no worse than old ones.
#
# ### What may be averaged
#
# The moments of one batch are noisy, so eigenvalues are averaged over batches: `decay` is the weight of the old ones.
# In a fixed basis this is right, because [(14.2)] is linear in $F$, so with a decay $\mu$
#
# $$
# \mu\, s + (1 - \mu)\, s'
# = \operatorname{diag} \bigl( U^\top (\mu F + (1 - \mu) F') U \bigr) ,
# \tag{14.6}
# $$
#
# the average of best eigenvalues is best for the average of the blocks. If the basis has changed in
# between, $s_k$ and $s'_k$ are curvatures along different directions with the same number, and their
# average is a curvature along neither.

# %%
first = layer_ios(model, loss, images[:200], labels[:200])["2"]
second = layer_ios(model, loss, images[200:400], labels[200:400])["2"]
M1, M2, average = ekfac(first), ekfac(second), (first.block() + second.block()) / 2
same = rescaled(M1, second, decay=0.5)
U = torch.kron(M1.QB, M1.QA)
assert_exact(same.scale.flatten(), (U.T @ average @ U).diagonal())

mixed = KroneckerEigen(M1.QA, M1.QB, (M1.scale + M2.scale) / 2)
right, wrong = (relative_error(M.dense(), average) for M in (same, mixed))
print(f"error: {right:.3f} in one basis, {wrong:.3f} with eigenvalues of two bases")
assert wrong > right
assert_exact(mixed.trace(), same.trace())  # the trace does not see it

# %% [markdown]
# Two batches of the same network have similar bases, whose eigenvectors come in a similar order.
# So the loss is small here. If the order differs, the average is meaningless, even for the same matrix:

# %%
turned = KroneckerEigen(M1.QA.flip(1), M1.QB, M1.scale.flip(1))  # the same matrix
assert_exact(turned.dense(), M1.dense())
mixed = KroneckerEigen(M1.QA, M1.QB, (M1.scale + turned.scale) / 2)
F = first.block()
print(
    f"error: {relative_error(M1.dense(), F):.3f}, averaged {relative_error(mixed.dense(), F):.3f}"
)
assert relative_error(mixed.dense(), F) > 1.2 * relative_error(M1.dense(), F)

# %% [markdown]
# So, when the basis changes, either start the eigenvalues anew, or carry the old *matrix* over: the
# best numbers for $U \operatorname{diag}(s)\, U^\top$ in the new basis are its curvatures along the new
# vectors, by [(14.2)]. Exercise 14.3 computes them with small matrices only.
#
# ### The amortised form
#
# `AmortisedEKFAC` does all of this, batch after batch. It averages
# KFAC's factors, which is cheap. Every `basis_every` batches it takes a new basis from them and carries the
# old matrix over. In between it averages eigenvalues in its present basis. The argument `weight` is
# the share of the new batch in the average, so that `1 - weight` is $\mu$.

# %% tags=["beside", "remove-input"]
code(AmortisedEKFAC.update, KroneckerEigen.carried_over)

# %%
ios = [layer_ios(model, loss, images[b : b + 200], labels[b : b + 200])["2"] for b in (0, 200, 400)]
estimator, state = AmortisedEKFAC(basis_every=2), None
for count, io in enumerate(ios, start=1):
    state = estimator.update(state, io, weight=1 / count)  # the plain average of all batches
assert_exact(state.trace(), torch.stack([io.block().trace() for io in ios]).mean())

before = AmortisedEKFAC().update(None, ios[0], 1.0)  # carried over into a basis, or into itself
assert_exact(before.M.carried_over(before.M).dense(), before.dense())
moved = before.M.carried_over(ekfac(ios[1]))
assert_exact(moved.trace(), before.trace())
assert relative_error(moved.dense(), before.dense()) > 0.05

# %% [markdown]
# The trace of the average is exact whenever and however often the basis changes, because a carried
# matrix keeps its trace. Carrying over loses the entries of the old matrix beside the diagonal in the new
# basis, as the last line of the cell shows.
#
# ## What goes wrong in practice
#
# **The square of the mean for the mean of the squares.** The gradient of the batch is at hand after every backward
# pass, gradients of single data are not. So it is tempting to rotate the *batch* gradient and to average its square
# over steps, scaled by $N$. The authors' code offers that as an option, `ra` ([`ekfac.py`, line
# 103](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py#L103)). Its
# default is [(14.4)]: the squares of single gradients ([line
# 170](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py#L170)), and
# for convolutions of each datum's sum over positions ([lines 142 to
# 146](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py#L142-L146)).
# With $\hat G_n$ for the rotated gradients,
#
# $$
# \Bigl( \sum_n \hat G_n \Bigr)_{oi}^2
# = \sum_n (\hat G_n)_{oi}^2 + \sum_{n \ne m} (\hat G_n)_{oi} (\hat G_m)_{oi} .
# \tag{14.7}
# $$
#
# Only the first sum is [(14.4)]. The second has $N (N - 1)$ terms. On average over batches of independent data each
# of them is the square of an entry of the mean gradient. All these entries vanish only at a stationary point. We try
# it with the gradients of the labels in the data, that is, with the empirical Fisher. Its vectors carry
# $1 / \sqrt N$, so the left side is $N$ times the square of the mean gradient, as in that implementation. The cell
# prints the sums over all entries:

# %%
torch.manual_seed(2)
for state, net in (("untrained", network()), ("trained", model)):
    io = layer_ios(net, loss, X, y, empirical)["2"]
    E = ekfac(io)
    mean_squared = (E.QB.T @ io.gradients().sum((0, 1)) @ E.QA).square()
    print(f"{state}: sum of squares {E.trace().item():.2f},", end=" ")
    print(f"square of the sum {mean_squared.sum().item():.2f}")
    if state == "untrained":
        assert mean_squared.sum() > 2 * E.trace()
    assert not torch.allclose(mean_squared, E.scale, rtol=0.5)

# %% [markdown]
# The second term grows with $N$, and we took 200 images. With fewer data in a batch the two are nearer, and for
# $N = 1$ they are equal. The square of the mean has a use, too: Adam averages it, in the basis of the weights instead
# of KFAC's. ([SOAP](25_relatives.py) does so in Shampoo's basis.) But it is another matrix, to which [Theorem 14.1]
# does not apply.

# %%
io = layer_ios(network(), loss, X, y, empirical)["2"]
ratios = []
for N in (1, 20, 200):
    part = LayerIO(io.a[:N], io.g[:, :N])
    of_sum = (io.gradients()[:, :N].sum((0, 1))).square().sum()
    ratios.append((of_sum / part.gradients().square().sum()).item())
print("square of the sum over sum of squares, 1, 20 and 200 data:", *(f"{r:.2f}" for r in ratios))
assert abs(ratios[0] - 1) < 1e-10
assert ratios[0] < ratios[2]

# %% [markdown]
# **Scales and basis that do not belong together.** `eigh` returns eigenvectors with arbitrary signs,
# and orders them by eigenvalue, so their order may change from one call to the next. Signs do not
# matter, since [(14.4)] squares. The order does. An implementation that recomputes the basis
# and goes on with the old scales, or that restores only one of the two from a checkpoint, pairs
# numbers with the wrong vectors. The eigenvalues, the trace and the determinant all look right.

# %%
signs = torch.sign(torch.randn(17))
assert_exact(KroneckerEigen(M1.QA * signs, M1.QB, M1.scale).dense(), M1.dense())
unpaired = KroneckerEigen(M1.QA, M1.QB, M1.scale[:, torch.randperm(17)])
assert_exact(unpaired.eigenvalues(), M1.eigenvalues())
assert relative_error(unpaired.dense(), M1.dense()) > 0.5

# %% [markdown]
# **Eigenvectors averaged.** The mean of two orthogonal matrices is not orthogonal
# ([Chapter 8](08_matrices.py)), so [Theorem 14.1] does not apply to it. Average the factors,
# decompose, and then rescale:

# %%
averaged = (M1.QA + M2.QA) / 2
assert (averaged.T @ averaged - eye_like(averaged)).abs().max() > 0.1
basis = kfac(LayerIO(torch.cat([first.a, second.a]), torch.cat([first.g, second.g], 1) / 2**0.5))
proper = rescaled(rescaled(basis.eigen(), first), second, decay=0.5)
broken = KroneckerEigen(averaged, (M1.QB + M2.QB) / 2, proper.scale)
assert relative_error(proper.dense(), average) < 0.9 * relative_error(broken.dense(), average)

# %% [markdown]
# **Moments per position.** The section [above](#per-datum-not-per-position) shows this mistake. A test of KFAC's
# factors does not find it, since they are the same.
#
# ## The paper and this package
#
# What is in [George et al. (2018)](bibliography.md#ekfac), as far as its abstract and
# [its authors' code](https://github.com/Thrandis/EKFAC-pytorch/tree/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2) tell,
# and what is here. Line numbers are those of
# [`ekfac.py`](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py).
#
# | | the paper | here |
# | --- | --- | --- |
# | algorithm | KFAC's eigenvectors with second moments as eigenvalues | the same: `ekfac`, and `AmortisedEKFAC` in training |
# | new basis | the abstract: "cheap partial updates"; the code: every `update_freq` steps, from one batch ([line 66](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py#L66)) | every `basis_every` updates, 10 by default, from averaged factors |
# | moments at a new basis | the code: those of the batch; with `ra`, KFAC's products again ([line 276](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py#L276)) | carried over into it, which keeps the trace |
# | average over batches | the code: none by default ([line 35](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py#L35)); with `ra`, of the squared gradient of the mini-batch | of the moments of single samples; the other is another quantity, as shown above |
# | shared weights | the code: the moments of a sample's gradient, in the basis of KFAC-expand | the same, or in that of KFAC-reduce |
# | Fisher | the code: the gradients of the loss that is given, in the README's example that of the data's labels | any; in the optimizer, one drawn label for each sample |
# | damping | the code: added to the eigenvalues ([line 172](https://github.com/Thrandis/EKFAC-pytorch/blob/2de112a5c4138b2ddfba352ddec6e4b059ebb0d2/ekfac.py#L172)) | the same, `exact_inverse` |
# | numbers | the code's README: damping .1, a basis every 100 steps | those of the optimizer, [Chapter 13](13_in_practice.py) |
# | headline | provably better than KFAC as an approximation, and faster than it in the training of several deep networks | the proof: [Theorem 14.1]; training: [Chapter 23](23_comparison.py) trains it beside its controls; networks of the size of the paper's are out of reach here |
#
# ## In one minute
#
# - **Eigenvalues.** In a given basis the nearest matrix has the curvatures along the basis vectors as eigenvalues
#   ([Theorem 14.1]). In KFAC's basis they are second moments of rotated gradients of single data, [(14.4)].
# - **Promise.** EKFAC is never farther from the block than KFAC, and has its trace. It does not promise a better
#   inverse or step.
# - **Limit.** The basis stays KFAC's. On the trained network most of KFAC's error was in the basis.
# - **In training.** The basis is renewed rarely and the eigenvalues often. Eigenvalues may be averaged in one basis
#   only.
# - **Check** that squares are taken per datum, not per position and not of the batch's gradient.
#
# ## Exercises
#
# **Exercise 14.1.** Let the inputs be one-hot vectors (an embedding, without a bias), each with its own frequency,
# and let the layer have one output. Show that EKFAC is exact. Is KFAC?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $a_n a_n^\top$ is diagonal, $B_n$ is a number, so $F = \sum_n B_n a_n a_n^\top$ and $A$ are diagonal.
# Since all frequencies differ, the eigenvectors of $A$ are the unit vectors, up to sign, and $F$ is diagonal in this
# basis. KFAC replaces the mean of $B_n$ over the data with token $i$ by the mean over all data, so it is exact only
# if these means are equal.
#
# </details>
#
# **Exercise 14.2.** Which orthogonal basis makes the error of [(14.3)] smallest? Which one gives the
# plain diagonal?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The eigenvectors of $F$: then $\lVert s \rVert = \lVert F \rVert$ and the error is zero. $U = I$ gives the plain
# diagonal. KFAC's basis is in general neither: its error is never below the first and may be above the second.
#
# </details>
#
# **Exercise 14.3.** The basis changes from $Q$ to $Q'$, and the old gradients are gone. Let $E$ be the
# old EKFAC matrix. Which eigenvalues are best for $E$ in the new basis? Compute them with matrices
# of the size of the factors only.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With $R_A = Q_A^\top Q_A'$ and $R_B = Q_B^\top Q_B'$, the new basis vector $(o, i)$ has the
# coordinates $(R_B)_{po} (R_A)_{ji}$ in the old basis, so by [(14.2)] the curvature of $E$ along it is
# $\sum_{pj} (R_B)_{po}^2\, s_{pj} (R_A)_{ji}^2$. As matrices,
# $(R_B \odot R_B)^\top s\, (R_A \odot R_A)$. What $F$ had off the diagonal is lost.
#
# </details>
#
# **Exercise 14.4.** Write EKFAC yourself: from `io.a` of shape $[N, S, d_\text{in}]$ and `io.g` of shape
# $[V, N, S, d_\text{out}]$ to the bases and the eigenvalues $s$, with `torch.linalg.eigh` and `torch.einsum` only.
# Compare `KroneckerEigen(QA, QB, s).dense()` with `ekfac(io).dense()`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def solution(io):
#     N, S = io.a.shape[:2]
#     QA = torch.linalg.eigh(torch.einsum("nsi,nsj->ij", io.a, io.a) / (N * S))[1]
#     QB = torch.linalg.eigh(torch.einsum("vnso,vnsp->op", io.g, io.g))[1]
#     G = torch.einsum("vnso,nsi->vnoi", io.g @ QB, io.a @ QA)
#     return QA, QB, G.square().sum((0, 1))
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(io: LayerIO) -> tuple[Tensor, Tensor, Tensor]:  # 14.4
    N, S = io.a.shape[:2]
    QA = torch.linalg.eigh(torch.einsum("nsi,nsj->ij", io.a, io.a) / (N * S))[1]
    QB = torch.linalg.eigh(torch.einsum("vnso,vnsp->op", io.g, io.g))[1]
    G = torch.einsum("vnso,nsi->vnoi", io.g @ QB, io.a @ QA)
    return QA, QB, G.square().sum((0, 1))


for S in (1, 4):
    io = random_io(20, S)
    assert_exact(KroneckerEigen(*solution(io)).dense(), ekfac(io).dense())

tokens = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])  # 14.1
io = LayerIO(torch.eye(4)[tokens][:, None], torch.randn(2, 10, 1, 1))
assert_exact(ekfac(io).dense(), io.block())
assert relative_error(kfac(io).dense(), io.block()) > 0.05

io = random_layer(0)  # 14.2
F, I4, I3 = io.block(), torch.eye(4), torch.eye(3)
assert_exact(second_moments(io, I4, I3).flatten(), F.diagonal())
assert_exact(torch.linalg.eigvalsh(F).norm(), F.norm())

RA, RB = M1.QA.T @ M2.QA, M1.QB.T @ M2.QB  # 14.3
carried, U = RB.square().T @ M1.scale @ RA.square(), torch.kron(M2.QB, M2.QA)
assert_exact(carried.flatten(), (U.T @ M1.dense() @ U).diagonal())
assert not torch.allclose(carried, second_moments(first, M2.QA, M2.QB), rtol=0.01)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [George et al. (2018)](bibliography.md#ekfac) introduce EKFAC and the amortised form;
# [Gao et al. (2021)](bibliography.md#tkfac) make KFAC's trace exact in another way, by weighting the
# factors; [Martens and Grosse (2015)](bibliography.md#kfac) for the basis. In the package,
# `KroneckerEigen` of [Chapter 8](08_matrices.py) does the rest: an EKFAC matrix is inverted, damped
# and sampled from like any other.
