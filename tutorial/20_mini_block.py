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
# # 20. Mini-block Fisher: one block per neuron
#
# **Part V: Better and faster.** KFAC uses multiples of one matrix $A$ for all neurons of a layer. Are steps better if
# every neuron has its own exact matrix, and the coupling of neurons is dropped?
#
# A neuron is one output of a layer, and its weights are one row of $W$. The mini-block Fisher keeps the parts of the
# layer's curvature block $F$ that belong to single neurons and replaces the rest by zeros ([Figure 20.1]).
# [Bahamou et al. (2023)](bibliography.md#mini-block) propose it as MBF, between first-order methods, whose matrix is
# diagonal, and KFAC.

# %% tags=["hide-input"]
import json

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import (
    BCEWithLogitsLoss,
    Conv2d,
    CrossEntropyLoss,
    Flatten,
    Linear,
    MSELoss,
    Sequential,
    Tanh,
)
from torch.nn.functional import avg_pool2d

from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.kfac import foof, kfac
from kfac_scratch.approximations.mini_block import (
    BlocksByRows,
    BlocksByRowsInverse,
    _blocks,
    _merged,
    mini_block,
    mini_block_filters,
    mini_block_rows,
    mini_block_shared,
)
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.curvature import ggn_product
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import empirical, type2
from kfac_scratch.matrices.block_diagonal import BlockDiagonal, FiltersAndBias
from kfac_scratch.matrices.damping import levenberg_marquardt, reduction_ratio
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import RESULTS, code, matrices, style

set_up()  # seed 0, float64, the GPU where there is one


def random_io(N: int, S: int = 1, V: int = 2) -> LayerIO:
    """Inputs and vectors of a layer with 5 inputs and 3 outputs, made up."""
    return LayerIO(torch.randn(N, S, 5), torch.randn(V, N, S, 3))


# %% tags=["hide-input"] alt="Heat maps of a 15 by 15 block in three versions. The exact block has nine 5 by 5 parts, all of which differ. The mini-block version has the three parts on the diagonal, exactly, and zero elsewhere. KFAC fills all nine parts, each with a multiple of one and the same pattern." caption="A layer with three neurons and five inputs. The mini-blocks are exact, and the rest is zero. KFAC has nine multiples of one matrix $A$."
torch.manual_seed(1)
io = random_io(12, V=1)
io = LayerIO(io.a * torch.tensor([2.0, 1.5, 1.0, 1.0, 0.7]), io.g)
matrices(
    {"exact block": io.block(), "mini-block": mini_block(io).dense(), "KFAC": kfac(io).dense()},
    blocks=dict.fromkeys(("exact block", "mini-block", "KFAC"), (5, 5)),
)

# %% [markdown]
# With one position per datum, the block of neuron $o$ is
#
# $$
# F_o = \sum_n \Bigl( \sum_v g_{vno}^2 \Bigr)\, a_n a_n^\top :
# $$
#
# a second moment of the inputs like KFAC's $A$, but with different weights of the data for every neuron.
#
# After this chapter you will be able to
#
# - compute the blocks, and prove that no other matrix without coupling of neurons is nearer to $F$;
# - say where they are exact, and why the step can be better than KFAC's although the matrix is farther from the block;
# - count the cost, and choose among three ways to reduce it.
#
# ## A neuron is a row
#
# A layer's block is a sum of outer products of gradients ([Theorem 4.1]), and $\operatorname{vec}$
# stacks the rows of a gradient. So the part of $F$ that couples row $o$ with row $p$ is
#
# $$
# F_{op} = \sum_{v,n} (G_{vn})_{o \cdot}^\top\, (G_{vn})_{p \cdot}
# \qquad \in \mathbb{R}^{d_\text{in} \times d_\text{in}} .
# \tag{20.1}
# $$
#
# With one position, $G_{vn} = g_{vn} a_n^\top$, and its row $o$ is the input times the number $g_{vno}$. Then
#
# $$
# F_{op} = \sum_n \Bigl( \sum_v g_{vno}\, g_{vnp} \Bigr)\, a_n a_n^\top,
# \qquad
# F_o = F_{oo} = \sum_n \Bigl( \sum_v g_{vno}^2 \Bigr)\, a_n a_n^\top .
# \tag{20.2}
# $$
#
# $F_o$ is a weighted second moment of the inputs. The weight of a datum is the sum of squares of its vectors' entries
# at neuron $o$. KFAC's $A$ is the same for all neurons. By hand:


# %%
def mini_block_by_hand(io: LayerIO) -> Tensor:
    V, N, S, d_out = io.g.shape
    F = torch.zeros(d_out, io.a.shape[2], io.a.shape[2])
    for o in range(d_out):
        for v in range(V):
            for n in range(N):
                row = torch.zeros(io.a.shape[2])
                for s in range(S):
                    row += io.g[v, n, s, o] * io.a[n, s]
                F[o] += torch.outer(row, row)
    return F


for S in (1, 4):
    io = random_io(7, S)
    blocks, F = mini_block_by_hand(io), io.block()
    for o in range(3):
        assert_exact(blocks[o], F[5 * o : 5 * o + 5, 5 * o : 5 * o + 5])
    assert_exact(mini_block(io).blocks, blocks)

io = random_io(7)
weight = io.g.square().sum((0, 2))  # [N, d_out]
assert_exact(mini_block(io).blocks[1], io.a[:, 0].T @ (weight[:, 1:2] * io.a[:, 0]))

# %% [markdown]
# ### In the package
#
# With one position, the blocks depend on the vectors only through the sum of squares, so that `_merged` first merges
# all vectors of a datum into one. The blocks are then one batched product of matrices.

# %% tags=["beside", "remove-input"]
code(mini_block, _blocks, _merged)

# %% [markdown]
# The result is a `BlockDiagonal`: $K$ small matrices as one tensor. Its inverse needs one batched
# Cholesky factorisation, and its product with a gradient is one batched product.

# %% tags=["beside", "remove-input"]
code(BlockDiagonal.__matmul__, BlockDiagonal.inverse)

# %%
io = random_io(7, S=4)
M, V, delta = mini_block(io), torch.randn(3, 5), 0.1
step = M.inverse(delta) @ V
assert_exact(M @ step + delta * step, V)
for o in range(3):  # every neuron solves its own small system
    assert_exact(step[o], torch.linalg.solve(M.blocks[o] + delta * torch.eye(5), V[o]))

# %% [markdown]
# ## The best of its kind
#
# <div class="admonition theorem" markdown="1" id="thm-20.1">
# <p class="admonition-title" markdown="1"><b>Theorem 20.1 (the nearest matrix without coupling)</b></p>
#
# Let $M$ have the blocks $F_o$ on its diagonal and zeros elsewhere, and let $T$ be any matrix of this form, with blocks
# $T_o$. In the Frobenius norm
#
# $$
# \begin{aligned}
# \lVert F - M \rVert^2 &= \lVert F \rVert^2 - \sum_o \lVert F_o \rVert^2 , \\
# \lVert F - T \rVert^2 &= \lVert F - M \rVert^2 + \sum_o \lVert F_o - T_o \rVert^2 ,
# \end{aligned}
# \tag{20.3}
# $$
#
# and $\operatorname{tr} M = \operatorname{tr} F$. As $F$ is positive semi-definite, so is $M$.
#
# </div>
#
# **Proof.** The squared norm is a sum over entries. $F - M$ has the entries outside of the blocks,
# $F - T$ these entries and the differences inside. The trace is a sum over the diagonal, which lies inside. For a
# vector $x$ with parts $x_o$, $x^\top M x = \sum_o x_o^\top F_o x_o$, and each term is $y^\top F y$ for a
# vector $y$ that is zero outside of neuron $o$. $\blacksquare$
#
# So the mini-block Fisher is never farther from $F$ than the diagonal, than KFAC restricted to its diagonal blocks
# $B_{oo} A$, and than $I \otimes A$ for any $A$. The theorem does *not* compare $M$ with KFAC itself, which couples
# neurons. Either $M$ or KFAC may be nearer:

# %%
nearer = 0
for seed in range(200):
    torch.manual_seed(seed)
    io = random_io(7)
    F, M = io.block(), mini_block(io)
    error, K = relative_error(M.dense(), F), kfac(io)
    inside = torch.block_diag(*(K.B[o, o] * K.A for o in range(3)))
    for other in (F.diagonal().diag(), inside, foof(io).dense()):
        assert error < relative_error(other, F)
    assert_exact(M.trace(), F.trace())
    assert_exact((F - M.dense()).norm() ** 2, F.norm() ** 2 - M.blocks.norm() ** 2)
    nearer += int(error < relative_error(K.dense(), F))
print(f"of 200 layers, mini-blocks are nearer to F than KFAC in {nearer}")
assert 0 < nearer < 200

# %% [markdown]
# ## Where it is exact
#
# The mini-block Fisher is exact if and only if all $F_{op}$ of [(20.1)] with $o \ne p$ vanish. Three cases:
#
# - The layer has **one neuron**.
# - **No vector reaches two neurons**: $g_{vno}\, g_{vnp} = 0$ for $o \ne p$, or with several positions
#   $g_{vnso}\, g_{vntp} = 0$ for all $s$ and $t$. An example is a layer of neurons of which every datum uses one
#   ("experts").
# - **The last layer, with one position and a loss that does not mix outputs.** The loss Hessian of a squared error
#   is $2 I$ per datum and that of binary cross-entropy is diagonal, so each of the type-2 vectors has a single entry
#   that is not zero. This holds for *every* network before the last layer, but not for softmax with cross-entropy.

# %%
io = random_io(9, S=4)
one = LayerIO(io.a, io.g[..., :1])
assert_exact(mini_block(one).dense(), one.block())

mine = torch.arange(9)[:, None] % 3 == torch.arange(3)
experts = LayerIO(io.a, io.g * mine[:, None])
assert_exact(mini_block(experts).dense(), experts.block())
print(f"experts: KFAC is off by {relative_error(kfac(experts).dense(), experts.block()):.0%}")

net, X = Sequential(Linear(5, 4), Tanh(), Linear(4, 3)), torch.randn(11, 5)
labels = {
    MSELoss: torch.randn(11, 3),
    BCEWithLogitsLoss: torch.rand(11, 3),
    CrossEntropyLoss: torch.randint(3, (11,)),
}
for kind, y in labels.items():
    hidden, last = layer_ios(net, kind(), X, y).values()
    errors = [relative_error(mini_block(io).dense(), io.block()) for io in (hidden, last)]
    print(f"{kind.__name__:17} hidden layer {errors[0]:.2f}, last layer {errors[1]:.2f}")
    assert errors[0] > 0.1
    assert (errors[1] < 1e-14) == (kind is not CrossEntropyLoss)

# %% [markdown]
# KFAC is exact in other cases ([Chapter 5](05_kfac.py)), among them a single datum, and deep linear networks with
# squared error. In both of these $F$ is a Kronecker product $B \otimes A$, whose part between neurons $o$ and $p$ is
# $B_{op} A$, so that mini-blocks are exact only if $B$ is diagonal. For the experts above KFAC is not exact. So neither
# method is exact whenever the other is. Both are exact if $F = B \otimes A$ with a diagonal $B$:

# %%
linear = Sequential(Linear(5, 4), Linear(4, 3))
io = layer_ios(linear, MSELoss(), X, torch.randn(11, 3))["0"]
assert_exact(kfac(io).dense(), io.block())
print(
    f"deep linear: mini-blocks are off by {relative_error(mini_block(io).dense(), io.block()):.0%}"
)
assert relative_error(mini_block(io).dense(), io.block()) > 0.1

a = torch.randn(4, 1, 5).repeat_interleave(3, 0)  # all pairs of an input and a vector
io = LayerIO(a, torch.tensor([1.0, 2.0, 3.0]).diag().repeat(4, 1).reshape(1, 12, 1, 3))
assert_exact(mini_block(io).dense(), io.block())
assert_exact(kfac(io).dense(), io.block())

# %% [markdown]
# ## Near as a matrix, good as a step
#
# We take networks of three seeds, before and after training, and compute two numbers for every layer. The first is the
# distance to the exact block. The second is the quality of the step: with a gradient $h$ and $F_\delta = F + \delta I$,
# the damped quadratic model $q(p) = \tfrac12 p^\top F_\delta\, p - h^\top p$ has its minimum at $F_\delta^{-1} h$. A
# step in the direction $p$ with the best length reaches the share
#
# $$
# \frac{(h^\top p)^2}{(p^\top F_\delta\, p)\; (h^\top F_\delta^{-1} h)} \in [0, 1]
# \tag{20.4}
# $$
#
# of the decrease that is possible. The share does not depend on the length of $p$, hence not on a learning
# rate. The damping $\delta$ is 1 % of the mean eigenvalue of $F$.

# %%
digits = load_digits()
images = avg_pool2d(torch.tensor(digits.images) / 16, 2).flatten(1)  # 4 by 4 pixels
targets, loss = torch.tensor(digits.target), CrossEntropyLoss()


def network() -> Sequential:
    return Sequential(Linear(16, 12), Tanh(), Linear(12, 12), Tanh(), Linear(12, 10))


def trained(seed: int, steps: int) -> tuple[Sequential, Tensor, Tensor]:
    """A network, and 500 images that it was not trained on."""
    torch.manual_seed(seed)
    order = torch.randperm(len(targets))
    X, y, model = images[order], targets[order], network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        batch = torch.randint(1000, (100,))
        optimizer.zero_grad()
        loss(model(X[batch]), y[batch]).backward()
        optimizer.step()
    return model, X[1000:1500], y[1000:1500]


def share(M: Matrix, F: Tensor, h: Tensor) -> float:
    delta = 0.01 * F.diagonal().mean().item()
    damped, p = F + delta * eye_like(F), (M.inverse(delta) @ h).flatten()
    best = h.flatten() @ torch.linalg.solve(damped, h.flatten())
    return ((h.flatten() @ p) ** 2 / (p @ damped @ p) / best).item()


def diagonal(io: LayerIO) -> Diagonal:
    return Diagonal(io.block().diagonal().reshape(io.g.shape[-1], -1))


# %%
methods = {"diagonal": diagonal, "KFAC": kfac, "EKFAC": ekfac, "mini-block": mini_block}
measured = {}  # [seeds, (error, share)] by training, method and layer
for steps in (0, 400):
    for seed in range(3):
        model, X, y = trained(seed, steps)
        at_labels = layer_ios(model, loss, X, y, empirical)
        for layer, io in layer_ios(model, loss, X, y).items():
            F, h = io.block(), at_labels[layer].gradients().sum((0, 1))
            for name, method in methods.items():
                M = method(io)
                row = relative_error(M.dense(), F), share(M, F, h)
                measured.setdefault((steps, name, layer), []).append(row)
measured = {key: torch.tensor(rows, device="cpu") for key, rows in measured.items()}

for steps in (0, 400):
    print(f"\nafter {steps} steps{'':9}  error in layer 0 / 2 / 4       share in layer 0 / 2 / 4")
    for name in methods:
        rows = torch.stack([measured[steps, name, layer] for layer in ("0", "2", "4")])
        for k in (0, 1):
            numbers = zip(rows[:, :, k].mean(1), rows[:, :, k].std(1), strict=True)
            start = f"{name:12}" if k == 0 else ""
            print(start, *(f"{m:6.2f} ± {s:.2f}" for m, s in numbers), end="" if k == 0 else "\n")

for layer, farther, better in (("0", 2, -0.1), ("4", 0, 0.2)):  # trained, first and last layer:
    K, M = (measured[400, name, layer].mean(0) for name in ("KFAC", "mini-block"))
    assert M[0] > farther * K[0]  # however far away,
    assert M[1] > K[1] + better  # the step is as good as KFAC's, or better
K, M = (measured[0, name, "0"].mean(0) for name in ("KFAC", "mini-block"))
assert K[1] > M[1] + 0.2  # untrained: KFAC's is better
assert measured[0, "mini-block", "4"][:, 1].min() > 0.99  # but for the last layer

# %% tags=["hide-input"] alt="Two scatter plots of the share of the possible decrease against the relative error, one point for each of three layers and three seeds. Left, untrained: KFAC and EKFAC sit at error zero and share one, mini-block at errors from 0.3 to 0.8 and shares from 0.55 to one, the diagonal far right and low. Right, trained: KFAC spreads over errors from 0.2 to 0.8 with shares from 0.3 to 0.6; mini-block has errors of 0.55 to 0.7 and shares from 0.5 to 0.85; the diagonal stays far right and low." caption="Three layers, three seeds. Up is a better step, left a nearer matrix. The distance does not determine how good the step is: on the right, at similar errors, mini-blocks reach more than KFAC."
DRAWN = {name: style(name) for name in ("KFAC", "EKFAC", "gradient")}
DRAWN |= {"diagonal": {"color": "C1", "marker": "v"}, "mini-block": {"color": "C3", "marker": "^"}}
fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained", sharey=True)
for ax, steps in zip(axes, (0, 400), strict=True):
    for name in methods:
        points = torch.cat([measured[steps, name, layer] for layer in ("0", "2", "4")])
        ax.plot(*points.T, linestyle="", **DRAWN[name], label=name, alpha=0.8)
    title = "trained" if steps else "untrained"
    ax.set(xlabel="relative error of the block", title=title, xlim=(-0.04, 1.04), ylim=(0, 1.05))
axes[0].set_ylabel("share of the possible decrease")
axes[0].legend(fontsize="small", loc="lower left")
plt.show()

# %% [markdown]
# In the untrained networks $F$ is close to $B \otimes A$, so that KFAC is nearly exact, and $B$ is not diagonal.
# Without the coupling of neurons the step loses a good part of its decrease in the first two layers. In the last layer
# the step loses almost nothing: all classes have nearly the same probability in an untrained network, so $B$ is nearly
# a multiple of $I - \tfrac1C \mathbf{1} \mathbf{1}^\top$, and the columns of the gradient are orthogonal to the ones.
#
# After training $F$ is no longer close to $B \otimes A$. If different neurons have large vectors on different data, one
# $A$ for all neurons has a large error. In the first layer KFAC is still much nearer to $F$, but its step is
# no better. In the last layer mini-blocks are better by both numbers.
#
# The eigenvectors $u_k$ of $F$, with eigenvalues $\lambda_k$, help to understand the steps. The exact damped
# inverse multiplies $u_k$ by $1 / (\lambda_k + \delta)$, so that
#
# $$
# (\lambda_k + \delta)\; u_k^\top (M + \delta I)^{-1} u_k
# \tag{20.5}
# $$
#
# is 1 for $M = F$. For another $M$ this is the component along $u_k$ of the step for the gradient $u_k$, relative to
# the exact step. A number above 1 means too long a step in this direction, and a number below 1 too short a step.

# %%
model, X, y = trained(0, 400)
io = layer_ios(model, loss, X, y)["4"]
F, h = io.block(), layer_ios(model, loss, X, y, empirical)["4"].gradients().sum((0, 1))
curvatures, U = torch.linalg.eigh(F)
delta = 0.01 * F.diagonal().mean().item()
stretched = {}
for name, method in (("KFAC", kfac), ("mini-block", mini_block)):
    inverse = method(io).inverse(delta).dense()
    stretched[name] = ((curvatures + delta) * (U.T @ inverse @ U).diagonal()).flip(0).cpu()
    tenths = stretched[name].unflatten(0, (10, -1)).mean(1)
    print(f"{name:11} by tenths, steepest first:", *(f"{t:.2f}" for t in tenths))
assert stretched["KFAC"][:13].mean() > 1.5 * stretched["mini-block"][:13].mean() > 1.5
assert stretched["KFAC"][91:117].mean() < 0.6 < stretched["mini-block"][91:117].mean()

flattest = U[:, :13]  # a common shift of all logits, one for each of 13 inputs
assert curvatures[:13].max() < 1e-12 * curvatures.max()
assert (flattest.T @ h.flatten()).norm() < 1e-12 * h.norm()

# %% tags=["hide-input"] alt="Line plot of how far the inverses of KFAC and mini-block stretch 130 eigenvectors of the exact block, relative to the right inverse, on a logarithmic axis from 0.1 to 8. KFAC starts at about 5 for the steepest directions and falls, with fluctuations, to 0.1 at direction 117, crossing 1 after about a third. Mini-block starts below 2 and stays between 0.6 and 2 up to direction 117, then drops to about 0.13, where KFAC is exactly 1." caption="The last layer of a trained network, from steep to flat directions; 1 is right. The 13 flattest directions on the right have no curvature and no gradient."
fig, ax = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
for name, values in stretched.items():
    ax.semilogy(values, color=DRAWN[name]["color"], label=name)
ax.axhline(1, color=ax.xaxis.label.get_color(), linewidth=0.8, linestyle="--")
ticks = (0.1, 0.2, 0.5, 1, 2, 5)
ax.set_yticks(ticks, [f"{t:g}" for t in ticks])
ax.minorticks_off()
ax.set(xlabel="eigenvector of F, steepest first", ylabel="stretched by, relative to right")
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# By this measure KFAC's steps are too long along steep directions and too short along most flat ones. Those of
# mini-blocks are right up to a factor of two, with one exception: the 13 flattest directions add the same number to all
# logits. Softmax does not depend on such a number, so that $F$ has no curvature along these directions, and KFAC has
# none either. Mini-blocks have, since the curvature of a common shift vanishes only with the coupling of neurons. But
# the gradient has no component along such a direction. So this error hardly matters for the step.
#
# These are small networks of one kind, and one damping. The experiment does not show that mini-blocks are the
# better choice. It shows that the order of distances to the block need not be the order of the steps.
#
# ## What it costs
#
# Per layer, with $N$ data, one position and merged vectors, counting multiplications:
#
# | | numbers kept | update | inverse | step |
# | --- | --- | --- | --- | --- |
# | KFAC | $d_\text{in}^2 + d_\text{out}^2$ | $N d_\text{in}^2 + V N d_\text{out}^2$ | $\sim d_\text{in}^3 + d_\text{out}^3$ | $d_\text{in} d_\text{out} (d_\text{in} + d_\text{out})$ |
# | mini-block | $d_\text{out} d_\text{in}^2$ | $N d_\text{out} d_\text{in}^2$ | $\sim d_\text{out} d_\text{in}^3$ | $d_\text{out} d_\text{in}^2$ |
#
# The step is cheaper than KFAC's. In the other columns, the terms $d_\text{in}^2$ and $d_\text{in}^3$ have the factor
# $d_\text{out}$. The inverse can be recomputed rarely, and a GPU can solve the small systems in parallel; according to
# the paper's abstract, an iteration costs only slightly more than that of a first-order method. But the factor
# remains in the memory:


# %%
def numbers(d_in: int, d_out: int) -> tuple[int, int, int]:
    """What KFAC and mini-blocks keep for a layer, and the numbers in the exact block."""
    return d_in**2 + d_out**2, d_out * d_in**2, (d_in * d_out) ** 2


for d_in, d_out in ((17, 10), (785, 1000), (1025, 4096)):
    ours = "  ".join(f"{n * 4 / 2**20:12,.1f}" for n in numbers(d_in, d_out))
    print(f"{d_in:5} to {d_out:4}, MiB in float32: KFAC, mini-block, exact {ours}")
assert numbers(785, 1000)[1] > 300 * numbers(785, 1000)[0]

# %% [markdown]
# For wide layers the blocks are too large. There are three ways to save memory.
#
# ### First way: do not form the blocks
#
# If there are fewer data than inputs, $F_o$ has a low rank. With the rows
# $R_o = \operatorname{diag}(|g_{\cdot o}|)\, a$, where $|g_{no}|$ is the norm over the vectors, [(20.2)] says
# $F_o = R_o^\top R_o$, and Woodbury's identity turns the large system into one of size $N$,
#
# $$
# \begin{aligned}
# &(R_o^\top R_o + \delta I)^{-1} \\
# &\quad = \tfrac1\delta \bigl( I - R_o^\top (R_o R_o^\top + \delta I)^{-1} R_o \bigr).
# \end{aligned}
# \tag{20.6}
# $$
#
# To check it, multiply by $R_o^\top R_o + \delta I$ and use
# $(R_o^\top R_o + \delta I) R_o^\top = R_o^\top (R_o R_o^\top + \delta I)$. The small matrices are
#
# $$
# (R_o R_o^\top)_{nm} = |g_{no}|\, |g_{mo}|\; a_n^\top a_m .
# \tag{20.7}
# $$
#
# All neurons share the inner products of the inputs, which are computed once. No matrix $R_o$ is
# formed: only the layer's inputs and vectors and the small factorisations are kept.

# %% tags=["remove-input"]
code(BlocksByRows.inverse, BlocksByRowsInverse.__matmul__)

# %%
io = LayerIO(torch.randn(20, 1, 300), torch.randn(4, 20, 1, 6))
full, low, V = mini_block(io), mini_block_rows(io), torch.randn(6, 300)
assert_exact(low.inverse(0.01) @ V, full.inverse(0.01) @ V)
assert_exact(low @ V, full @ V)
kept = low.U.a.numel() + low.U.g.numel() + low.inverse(0.01).L.numel()
print(f"numbers kept: {full.blocks.numel():,} in blocks, {kept:,} in rows and small factors")
assert full.blocks.numel() > 50 * kept

several = LayerIO(torch.randn(4, 3, 300), torch.randn(2, 4, 3, 6))  # V N rows for each neuron
assert_exact(mini_block_rows(several).inverse(0.1) @ V, mini_block(several).inverse(0.1) @ V)

# %% [markdown]
# With this way there is no average over many batches: a sum of their blocks has a high rank, and rows can be
# collected but not averaged.
#
# ### Second way: one block for all neurons
#
# Give all neurons the mean of their blocks,
#
# $$
# \begin{aligned}
# F &\approx I \otimes \bar F , \\
# \bar F &= \frac{1}{d_\text{out}} \sum_o F_o
# = \frac{1}{d_\text{out}} \sum_{v,n} G_{vn}^\top G_{vn} .
# \end{aligned}
# \tag{20.8}
# $$
#
# Of all matrices $I \otimes A$ this one is nearest to $F$, since by [(20.3)] the nearest one minimises
# $\sum_o \lVert F_o - A \rVert^2$, and the minimiser is the mean. Two methods of other chapters are close
# relatives. With one position,
# $\bar F \propto \sum_n \bigl( \sum_v \lVert g_{vn} \rVert^2 \bigr) a_n a_n^\top$: this is KFAC's input
# factor with every datum weighted by the squared size of its vectors. Up to scale, $\bar F$ is the input factor of
# **TKFAC** ([Chapter 15](15_tkfac.py)), here with $I$ as the other factor. If $\sum_v \lVert g_{vn} \rVert^2$ is the
# same for all data, it is **FOOF**, $I \otimes A$, up to scale.

# %% tags=["remove-input"]
code(mini_block_shared)

# %%
io = random_io(9)
shared, F = mini_block_shared(io), io.block()
assert_exact(shared.A, mini_block(io).blocks.mean(0))
tkfac_input = torch.einsum("vnoi,vnoj->ij", io.gradients(), io.gradients())
assert_exact(3 * shared.A, tkfac_input)
assert_exact(shared.trace(), F.trace())
for _ in range(100):
    noise = 0.1 * torch.randn(5, 5)
    other = Kronecker(shared.A + noise + noise.T, shared.B)
    assert relative_error(shared.dense(), F) < relative_error(other.dense(), F)

unit = LayerIO(io.a, io.g / io.g.norm(dim=-1, keepdim=True))
A, B = mini_block_shared(unit).A, foof(unit).A
assert_exact(A / A.trace(), B / B.trace())
assert relative_error(shared.A / shared.A.trace(), foof(io).A / foof(io).A.trace()) > 0.01

# %% [markdown]
# ### Third way: smaller blocks
#
# A convolution's row of $W$ consists of one filter for each input channel. Smaller blocks are one block for each
# *filter*: for a kernel of $k \times k$ a block is $k^2 \times k^2$, for any number of channels. Rows and filters
# are our reading of the paper, not checked: its abstract speaks of many mini-blocks of modest size in every layer,
# and does not say where a layer is cut. [Theorem 20.1] holds for every partition into blocks. A `LayerIO` does not
# contain the size of the kernel, which therefore is an argument; a bias is treated as a filter with a single entry.

# %% tags=["beside", "remove-input"]
code(mini_block_filters, FiltersAndBias.__matmul__)

# %%
conv = Sequential(Conv2d(3, 2, (2, 2)), Tanh(), Flatten(), Linear(32, 3))
io = layer_ios(conv, loss, torch.randn(8, 3, 5, 5), torch.randint(3, (8,)))["0"]
F, rows, filters = io.block(), mini_block(io), mini_block_filters(size=4)(io)
for piece in range(3):
    at = slice(4 * piece, 4 * piece + 4)
    assert_exact(filters.filters.blocks[piece], F[at, at])
assert_exact(filters.bias.scale[1, 0], F[25, 25])
errors = [relative_error(M.dense(), F) for M in (rows, filters, diagonal(io))]
print("error of rows {:.3f}, filters {:.3f}, single weights {:.3f}".format(*errors))
assert errors[0] < errors[1] < errors[2]

# %% tags=["hide-input"] alt="Heat maps of a 26 by 26 block. The exact one is full. The second has two blocks of 13 by 13 on its diagonal. The third has six blocks of 4 by 4, and two single entries for the biases." caption="A convolution with three input channels, two output channels, a kernel of $2 \\times 2$ and a bias. Finer cuts keep less."
matrices({"exact block": F, "rows": rows.dense(), "filters": filters.dense()})

# %% [markdown]
# ## Training with it
#
# The paper compares MBF with several methods in seconds and in generalisation, on autoencoders, convolutional and graph
# networks, and uses the empirical Fisher. This section tests something else, the quality of a direction, without a
# learning rate. Each method uses the same fixed batch of 200 images with all
# pixels, the best length of its direction by the exact damped quadratic model, as in [(20.4)], and
# a damping by the rule of [Chapter 9](09_damping.py). We count steps, not seconds. The vectors are
# first type-2, as in the experiments above, and then those of the empirical Fisher.

# %%
pixels = torch.tensor(digits.data) / 16


def minimise(seed: int, method, fisher=type2, steps: int = 12) -> list[float]:
    torch.manual_seed(seed)
    batch = torch.randperm(len(targets))[:200]
    X, y, damping = pixels[batch], targets[batch], 0.01
    model = Sequential(Linear(64, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 10))
    parameters, losses = dict(model.named_parameters()), []
    for _ in range(steps):
        before = loss(model(X), y)
        losses.append(before.item())
        h = dict(
            zip(parameters, torch.autograd.grad(before, list(parameters.values())), strict=True)
        )
        step = h
        if method is not None:
            ios = layer_ios(model, loss, X, y, fisher)
            step = preconditioner(model, {n: method(io).inverse(damping) for n, io in ios.items()})(
                h
            )
        p, slope = flat(step, parameters), flat(h, parameters) @ flat(step, parameters)
        length = slope / (p @ (ggn_product(model, loss, X, y)(p) + damping * p))
        with torch.no_grad():
            for name, w in parameters.items():
                w -= length * step[name]
            after = loss(model(X), y).item()
            ratio = reduction_ratio(before.item(), after, -0.5 * (length * slope).item())
            if after > before:  # a step that failed is taken back
                for name, w in parameters.items():
                    w += length * step[name]
        damping = levenberg_marquardt(damping, ratio, factor=0.7)
    return losses


def flat(values: dict[str, Tensor], names: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in names])


# %%
single = mini_block_filters(1)  # blocks of one weight: the diagonal
contestants = {"gradient": None, "diagonal": single, "KFAC": kfac, "mini-block": mini_block}
curves = {
    name: torch.tensor([minimise(seed, method) for seed in range(3)], device="cpu")
    for name, method in contestants.items()
}
of_labels = {
    f"{name}, empirical": torch.tensor(
        [minimise(seed, method, empirical) for seed in range(3)], device="cpu"
    )
    for name, method in contestants.items()
    if method is not None
}
for name, runs in (curves | of_labels).items():
    print(f"{name:21} loss after 11 steps:", *(f"{run[-1]:8.4f}" for run in runs))
assert of_labels["mini-block, empirical"][:, -1].max() < 0.2
assert of_labels["diagonal, empirical"][:, -1].min() > 0.5
for seed in range(3):
    assert curves["mini-block"][seed, -1] < 0.5 * curves["gradient"][seed, -1]
    assert curves["mini-block"][seed, -1] < 0.5 * curves["diagonal"][seed, -1]

# %% tags=["hide-input"] alt="Training loss, on a logarithmic axis, against steps for four methods with three seeds each. The gradient and the diagonal fall slowly and stay near one. KFAC and mini-block fall by two orders of magnitude within twelve steps, and their curves overlap." caption="Training loss, three seeds each. Neither KFAC nor mini-blocks end lower for all seeds; the diagonal ends near the gradient."
fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for name, runs in curves.items():
    colour = DRAWN[name]["color"]
    ax.semilogy(runs.T, color=colour, linewidth=1, alpha=0.4)
    ax.semilogy(runs.log().mean(0).exp(), color=colour, label=name)
ax.set(xlabel="step", ylabel="training loss")
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# The large gap is between KFAC and mini-blocks on one side, and the gradient and the diagonal on the other. The
# diagonal has the same vectors and the same trace as the mini-blocks, but lacks the correlations of the inputs. With
# the empirical Fisher this gap remains. KFAC and mini-blocks then reach higher losses in this test, whose step lengths
# and damping are those of the GGN's quadratic model.
#
# **In seconds.** The training benchmark of [Chapter 13](13_in_practice.py) ran mini-blocks on the convolutional
# network T4. It did *not* run them on the deep autoencoder T3, although autoencoders are a task of the paper. The
# benchmark's second autoencoder, `curves`, includes them; the last lines say whether its results are stored:

# %% tags=["hide-input"] fold="Measured: mini-blocks in the training benchmark"
for task in ("T3", "T4", "curves"):
    file = RESULTS / f"training-{task}.json"
    summary = json.loads(file.read_text())["summary"] if file.exists() else {}
    for name in ("adamw", "kfac-expand", "mini-block") if summary else ():
        row = summary.get(name)
        if row is None:
            shown = "not run"
        elif row["steps"] is None:
            shown = f"misses the target in the median run, {row['hits']} hits"
        else:
            shown = f"{row['steps']:.0f} steps, {row['cpu']:.2f} CPU seconds (medians)"
        print(f"{task} {name:12} {shown}")
    if not summary:
        print(f"{task}: no results")
    assert task == "curves" or not summary or ("mini-block" in summary) == (task == "T4")

# %% [markdown]
#
# ## What goes wrong in practice
#
# **The other order of the weights.** If vec stacks columns, the weights of a neuron are not next to
# each other. Contiguous blocks of $d_\text{out}$ rows on the diagonal then belong to *inputs*: each couples the weights
# of all neurons for one input, which is another method.

# %%
io = random_io(9)
by_columns = torch.arange(15).reshape(3, 5).T.flatten()
F_columns = io.block()[by_columns][:, by_columns]  # the block for a vec that stacks columns
assert_exact(F_columns[0::3, 0::3], mini_block(io).blocks[0])  # strided: every third row
wrong = F_columns[:5, :5]
assert relative_error(wrong, mini_block(io).blocks[0]) > 0.1

# %% [markdown]
# **The gradient of the batch instead of gradients of data.** The batch's gradient is available after every backward
# pass, and its rows have the right shape. But the outer product of *one* row with itself has rank one, and its
# expectation is not $F_o$ (the square of a sum is not the sum of the squares, [(14.7)]). The damped inverse then only
# divides the row by a number, and its direction stays that of the gradient:

# %%
io = random_io(9)
G = io.gradients().sum((0, 1))
rank_one, delta = BlockDiagonal(G.unsqueeze(2) * G.unsqueeze(1)), 0.1
expected = G / (G.square().sum(1, keepdim=True) + delta)  # rows divided by a number
assert_exact(rank_one.inverse(delta) @ G, expected)
M = mini_block(io)
cosine = torch.cosine_similarity(M.inverse(delta) @ G, G)
print("cosine of row and step, true blocks:", *(f"{c:.2f}" for c in cosine.tolist()))
assert cosine.max() < 0.999

# %% [markdown]
# **One block per position.** With weight sharing, [(20.1)] sums over positions before it multiplies. Flattening
# positions into the batch drops the products of different positions, as it does for EKFAC
# ([Chapter 14](14_ekfac.py)). KFAC-expand stays the same, and mini-blocks change.

# %%
io = random_io(7, S=4)
flattened = LayerIO(io.a.reshape(28, 1, 5), io.g.reshape(2, 28, 1, 3))
assert_exact(kfac(flattened).dense(), kfac(io).dense())
right, wrong = (relative_error(mini_block(x).dense(), io.block()) for x in (io, flattened))
print(f"error: {right:.3f} per datum, {wrong:.3f} per position")
assert wrong > 1.02 * right

# %% [markdown]
# **Which Fisher.** The paper uses gradients at the labels of the data, the *empirical* Fisher, which needs no
# additional backward pass. Late in training the empirical Fisher and the Fisher differ. If a datum's label has the
# probability $1 - \epsilon$, its gradient at the outputs is of order $\epsilon$. So its part in the empirical Fisher is
# of order $\epsilon^2$, and in the Fisher of order $\epsilon$. By the quadratic model with the GGN and its damping, the
# step of the empirical Fisher reached a smaller share of the decrease. The share measures one step by one model, and
# both kinds train, above and below. (Which model describes the loss better is another question; see [Chapter
# 3](03_losses.py).)

# %%
shares = []
for seed in range(3):
    model, X, y = trained(seed, 400)
    at_labels, ios = layer_ios(model, loss, X, y, empirical), layer_ios(model, loss, X, y)
    h = at_labels["4"].gradients().sum((0, 1))
    F = ios["4"].block()
    shares.append([share(mini_block(x["4"]), F, h) for x in (ios, at_labels)])
    print(f"last layer, seed {seed}: share {shares[-1][0]:.2f}, empirical {shares[-1][1]:.2f}")
    assert shares[-1][0] > shares[-1][1] + 0.2

# %% [markdown]
# In the optimizer, the Fisher is an argument, and `fisher=empirical` is the paper's choice. The default uses
# one label for each image, drawn from the model.

# %%
for name, fisher in (("empirical", empirical), ("one drawn label", None)):
    torch.manual_seed(0)
    model = Sequential(Linear(64, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 10))
    optimizer = KFAC(model, loss, approximation=mini_block, fisher=fisher, damping=0.01)
    for _ in range(40):
        batch = torch.randint(1000, (100,))
        optimizer.zero_grad()
        loss(model(pixels[batch]), targets[batch]).backward()
        optimizer.observe(pixels[batch], targets[batch])
        optimizer.step()
    final = loss(model(pixels[:1000]), targets[:1000]).item()
    print(f"{name:15} loss after 40 steps {final:.2f}")
    assert final < 0.7

# %% [markdown]
# For convolutions there are the blocks of filters, `mini_block_filters(size)`. A network with both kinds of layers
# needs a function that tells them apart by the length of their rows, here for kernels of $3 \times 3$ with one and six
# input channels and a bias: `lambda io: (mini_block_filters(9) if io.a.shape[-1] in {10, 55} else mini_block)(io)`.
#
# **One damping for neurons of different scale.** A neuron with small vectors has a small block, and a
# damping chosen for the layer may be much larger than this block. Exercise 20.3 is about this case.
#
# ## The paper and this package
#
# What is in [Bahamou et al. (2023)](bibliography.md#mini-block), as far as its abstract tells, and what is
# here. We found no public code of the authors.
#
# | | the paper | here |
# | --- | --- | --- |
# | fully connected layers | many mini-blocks of modest size; where they are cut is not checked | a block for every neuron: `mini_block`; `mini_block_rows` for few samples |
# | convolutions | many mini-blocks of modest size; where they are cut is not checked | a block for every filter: `mini_block_filters(size)`, and the bias by its diagonal |
# | one block for all neurons | not checked | `mini_block_shared` |
# | Fisher | empirical | any: `fisher=empirical` is the paper's, one drawn label the default |
# | damping | not checked | `exact_inverse`, one number for all blocks |
# | average and schedule | not checked | the optimizer's, [Chapter 11](11_averages.py) |
# | convergence | an idealised version converges linearly, proved | not shown |
# | headline | a cost per step only slightly above that of first-order methods, by the parallelism of GPUs; effective in time and in generalisation on autoencoders, convolutional and graph networks | [Chapter 23](23_comparison.py) trains it beside its controls; graph networks and the time on a GPU are not tested, because the benchmark has neither |
#
# ## In one minute
#
# - **Blocks.** Every neuron has its own weighted second moment of the inputs, [(20.2)]; the coupling of neurons is
#   left out.
# - **Distance.** Of all matrices without coupling the mini-block Fisher is nearest to $F$ ([Theorem 20.1]). KFAC, which
#   couples neurons, may be nearer.
# - **Exact cases** are a single neuron, experts, and the last layer with one position and a loss that does not mix
#   outputs.
# - **Steps** can be better than KFAC's although the matrix is farther away: on the trained networks here they were
#   as good or better, on the untrained ones worse in the first two layers.
# - **Cost.** Memory and inverse have a factor $d_\text{out}$. Rows, one block for all neurons, or filters cost less.
#
# ## Exercises
#
# **Exercise 20.1.** The input of a layer is one-hot (an embedding, with one position and no bias). Show that
# mini-blocks are diagonal, and that the mini-block Fisher then equals the diagonal of $F$. What does KFAC keep that
# they lose?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $a_n a_n^\top$ has a single nonzero entry, on the diagonal, so $F_o$ is diagonal by [(20.2)]. KFAC's
# $B \otimes A$ has a diagonal $A$, and keeps the coupling of neurons for one token.
#
# </details>
#
# **Exercise 20.2.** Replace $W$ by $W' = W T$ and the inputs by $T^{-1} a$, with an invertible $T$: the same network in
# other coordinates. Let all $F_o$ be invertible. Show that the undamped mini-block step is the same, and that the step
# of the diagonal is not. What about $W' = T W$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The gradient with respect to $W'$ is $G T^{-\top}$, so row $o$ becomes $G_o T^{-\top}$ and the block
# $T^{-1} F_o T^{-\top}$. The step is $G_o T^{-\top} (T^{-1} F_o T^{-\top})^{-1} = G_o F_o^{-1} T$, and
# this is the old step in the coordinates $W' = W T$. The diagonal of $T^{-1} F_o T^{-\top}$ does not
# transform in this way. With $W' = T W$ the rows are mixed, and so are the blocks: mini-blocks are not invariant, and
# undamped KFAC is.
#
# </details>
#
# **Exercise 20.3.** Multiply all vectors of one neuron by 100, and this neuron's gradient as well. How do the undamped
# step, the step with a fixed damping, and the step with a damping relative to the block change?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $F_o$ grows by the factor $10^4$ and the row by 100, so the undamped step falls to a hundredth. With
# $\delta_o = c \operatorname{tr} F_o / d_\text{in}$, the damping grows by $10^4$, too, and the same holds. With a
# fixed $\delta$ the factor is different for every eigenvalue of $F_o$, so that the step changes its direction.
#
# </details>
#
# **Exercise 20.4.** Write the step yourself, for one position: from `a` of shape $[N, d_\text{in}]$, `g` of shape
# $[V, N, d_\text{out}]$, a gradient $G$ and a damping to the step of every neuron. Compare it with
# `mini_block(io).inverse(damping) @ G`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def solution(a, g, G, damping):
#     F = torch.einsum("vno,ni,nj->oij", g.square(), a, a)
#     return torch.linalg.solve(F + damping * torch.eye(a.shape[1]), G)
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(a: Tensor, g: Tensor, G: Tensor, damping: float) -> Tensor:  # 20.4
    F = torch.einsum("vno,ni,nj->oij", g.square(), a, a)
    return torch.linalg.solve(F + damping * torch.eye(a.shape[1]), G)


io, G = random_io(9), torch.randn(3, 5)
assert_exact(solution(io.a[:, 0], io.g[:, :, 0], G, 0.1), mini_block(io).inverse(0.1) @ G)

tokens = torch.tensor([0, 1, 1, 2, 2, 2, 3, 4])  # 20.1
io = LayerIO(torch.eye(5)[tokens][:, None], torch.randn(2, 8, 1, 3))
assert_exact(mini_block(io).dense(), io.block().diagonal().diag())

io, T = random_io(40), torch.randn(5, 5) + 3 * torch.eye(5)  # 20.2
moved = LayerIO(io.a @ torch.linalg.inv(T).T, io.g)
h, h_moved = io.gradients().sum((0, 1)), moved.gradients().sum((0, 1))
assert_exact(mini_block(moved).inverse(0.0) @ h_moved, (mini_block(io).inverse(0.0) @ h) @ T)
wrong = (diagonal(io).inverse(0.0) @ h) @ T
assert relative_error(diagonal(moved).inverse(0.0) @ h_moved, wrong) > 0.1

large = LayerIO(io.a, io.g * torch.tensor([100.0, 1.0, 1.0]))  # 20.3
M, L, row = mini_block(io), mini_block(large), h.clone()
row[0] *= 100
assert_exact((L.inverse(0.0) @ row)[0], (M.inverse(0.0) @ h)[0] / 100)
mean = M.blocks[0].trace().item() / 5
assert_exact((L.inverse(1e4 * mean) @ row)[0], (M.inverse(mean) @ h)[0] / 100)
changed = (L.inverse(mean) @ row)[0], (M.inverse(mean) @ h)[0]
assert torch.cosine_similarity(*changed, dim=0) < 0.999
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Bahamou et al. (2023)](bibliography.md#mini-block) introduce the method, with an idealised version
# that converges linearly, and experiments on autoencoders, convolutional and graph networks.
# [Benzing (2022)](bibliography.md#foof) argues for $I \otimes A$, "gradient descent on neurons".
# [Gao et al. (2021)](bibliography.md#tkfac) weight both of KFAC's factors as [(20.8)] weights one.
# [Kunstner et al. (2019)](bibliography.md#empirical-fisher) discuss the empirical Fisher.
