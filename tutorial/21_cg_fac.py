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
# # 21. CG-FAC: solve with products alone
#
# **Part V: Better and faster.** Products with a layer's exact block can be computed without the block. Are such
# products enough to solve a system with the block, and does the exact block give better steps than KFAC?
#
# Conjugate gradients (CG) solve a linear system with products alone. A product with the exact block $F$ of a layer
# needs only the layer's inputs and backpropagated vectors, so that CG-FAC solves $F X + \delta X = G$ without
# approximating the block. In exact arithmetic, a batch of $N$ data with one vector each needs at most $N + 1$ products,
# however large the layer is ([Figure 21.1]).

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh
from torch.utils.flop_counter import FlopCounterMode

from kfac_scratch.approximations.cg_fac import (
    Gradients,
    KernelInverse,
    TruncatedInverse,
    cg_fac,
    gradient_kernel,
    kernel_inverse,
    same_batch_step,
    truncated_inverse,
)
from kfac_scratch.approximations.estimators import Latest, MovingAverage, weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.skfac import skfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.linalg import conjugate_gradient, eye_like
from kfac_scratch.losses import empirical, monte_carlo
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import code, matrices, style

set_up()  # seed 0, float64, the GPU where there is one


def random_io(N: int, S: int = 1, V: int = 1) -> LayerIO:
    """Inputs and vectors of a layer with 7 inputs and 5 outputs, made up."""
    return LayerIO(torch.randn(N, S, 7), torch.randn(V, N, S, 5))


# %% tags=["hide-input"] alt="Plot of the error against the number of steps, logarithmic. For the exact block it drops to round-off at step seven. For KFAC it falls gradually, to about 1e-8 at step thirty." caption="Error of conjugate gradients for a batch of six data and a layer of five outputs and seven inputs. With the exact block, which has rank six, the seventh step reaches the solution. KFAC's matrix of the same batch has rank 30, and the error falls slowly."
six, start, delta = random_io(6), torch.randn(5, 7), 1.0
errors = {"exact block": [], "KFAC": []}
for M, row in zip((cg_fac(six), skfac(six)), errors.values(), strict=True):
    right = Dense(M.dense()).inverse(delta) @ start
    for k in range(1, 31):
        X = truncated_inverse(M, delta, k, tol=0.0) @ start
        row.append(max(relative_error(X, right), 1e-16))
ranks = [torch.linalg.matrix_rank(M.dense()).item() for M in (cg_fac(six), skfac(six))]
assert ranks == [6, 30]
fig, ax = plt.subplots(figsize=(6.2, 3.3))
ax.semilogy(range(1, 31), errors["exact block"], **style("GGN"), markersize=4)
ax.semilogy(range(1, 31), errors["KFAC"], **style("KFAC"), markersize=4)
ax.axvline(7, linestyle=":", linewidth=1, color=ax.xaxis.label.get_color())
ax.text(7.5, 1e-12, "exact block")
ax.text(17, 5e-3, "KFAC", color=style("KFAC")["color"])
ax.set(xlabel="steps $k$", ylabel="relative error of $X_k$")
plt.show()

# %% [markdown]
# The block is a sum of outer products of the gradients $G_{vn}$ of single data, and its product with a matrix $X$ of
# the layer's shape is
#
# $$
# F X = \sum_{v, n} \langle G_{vn}, X \rangle\, G_{vn} .
# $$
#
# [Chen (2021)](bibliography.md#cg-fac) introduced the method as an iterative KFAC that forms neither the Fisher matrix
# nor the factors. The abstract does not say whether the products are with the exact block or with KFAC's matrix. This
# chapter has both: `cg_fac` is the exact block, and `skfac` is KFAC's matrix.
#
# After this chapter you will be able to
#
# - multiply with the exact block, and say what KFAC's product does differently;
# - prove that a truncated solution descends, and how many steps are enough;
# - solve the same system directly, by the kernel of the gradients;
# - say when CG costs less than KFAC, and why the exact block of one batch needs much damping.
#
# ## A product without the block
#
# The block is a sum of outer products of gradients, $F = \sum_{vn} \operatorname{vec}(G_{vn})
# \operatorname{vec}(G_{vn})^\top$ ([Theorem 4.1]). Its product with $X$ has two parts. The first is the inner product
# of every gradient with $X$. The second is the sum of the gradients with these inner products as weights:
#
# $$
# F X = \sum_{v, n} \langle G_{vn}, X \rangle\, G_{vn} ,
# \qquad
# \langle G_{vn}, X \rangle = \sum_s g_{vns}^\top X a_{ns} ,
# \tag{21.1}
# $$
#
# where $\langle X, Y \rangle = \sum_{ij} X_{ij} Y_{ij}$. Neither part needs a gradient $G_{vn}$ in memory. For the
# inner products, the inputs are multiplied by $X$ as by the layer's weight, and the results by the vectors. For the sum
# with weights $c_{vn}$, the vectors are first combined to $\sum_v c_{vn} g_{vns}$, which gives one weight gradient. So
# a product costs about a forward and a backward pass of one layer, $2 N S\, d_\text{in} d_\text{out}$ operations each,
# for any number of vectors. By hand, with loops and with the gradients:


# %%
def product_by_hand(io: LayerIO, X: Tensor) -> Tensor:
    V, N, S, _ = io.g.shape
    result = torch.zeros_like(X)
    for v in range(V):
        for n in range(N):
            weight = sum(io.g[v, n, s] @ X @ io.a[n, s] for s in range(S))
            result += weight * sum(torch.outer(io.g[v, n, s], io.a[n, s]) for s in range(S))
    return result


for S in (1, 3):
    io, X = random_io(4, S, V=2), torch.randn(5, 7)
    assert_exact(product_by_hand(io, X).flatten(), io.block() @ X.flatten())
    assert_exact(cg_fac(io) @ X, product_by_hand(io, X))

# %% tags=["beside", "remove-input"]
code(LayerIO.inner_products, LayerIO.combination, Gradients.__matmul__)

# %% [markdown]
# ### What KFAC does differently
#
# Take one vector and one position per datum, and collect $\mathcal M_{nm} = g_n^\top X a_m$ in an $N \times N$ matrix.
# Let $\mathbf a$, $[N, d_\text{in}]$, and $\mathbf g$, $[N, d_\text{out}]$, have the inputs and the vectors as rows.
# Then $\mathcal M = \mathbf g X \mathbf a^\top$ and
#
# $$
# F X = \mathbf g^\top \operatorname{diag}(\mathcal M)\, \mathbf a ,
# \qquad
# B X A = \tfrac1N\, \mathbf g^\top \mathcal M\, \mathbf a .
# \tag{21.2}
# $$
#
# The two products differ only in the matrix in the middle ([Figure 21.2]). The block's product combines every
# vector with the input of its own datum. KFAC's product combines all vectors with all inputs, and divides by $N$.

# %% tags=["hide-input"] alt="Two heat maps of 8 by 8 entries. Left, only the diagonal is filled. Right, all entries are filled, each an eighth of the size." caption="The matrix between $\\mathbf g^\\top$ and $\\mathbf a$ in a product with the exact block, and with KFAC: the diagonal of $\\mathcal M$, and an eighth of $\\mathcal M$."
io, X = random_io(8), torch.randn(5, 7)
a, g = io.a.squeeze(1), io.g.squeeze((0, 2))
pairs = g @ X @ a.T
assert_exact(cg_fac(io) @ X, g.T @ pairs.diagonal().diag() @ a)
assert_exact(kfac(io) @ X, g.T @ pairs @ a / 8)
matrices({"exact block": pairs.diagonal().diag(), "KFAC": pairs / 8})

# %% [markdown]
# KFAC's product, too, can be computed without the factors: [SKFAC](17_skfac.py)'s matrix has this product. CG-FAC can
# be run with either operator, `cg_fac(io)` or `skfac(io)`. The repository DeepFormer of the paper's author has the
# second operator in two lines that are commented out ([`CG_KFAC.py`, lines 166 to
# 167](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L166-L168)).
# For a single datum with one position the two operators are equal.

# %% tags=["hide-input"] fold="Checked: KFAC's product without factors, and that both operators are equal for one datum"
for S in (1, 3):
    io, X = random_io(4, S, V=2), torch.randn(5, 7)
    assert_exact(skfac(io) @ X, kfac(io) @ X)
io = random_io(1, V=3)
assert_exact(cg_fac(io) @ X, skfac(io) @ X)  # one datum has no pairs

# %% [markdown]
# ## Conjugate gradients
#
# We look for $X$ with $F X + \delta X = G$. Write $M = F + \delta I$. The solution is the minimizer of
# the quadratic function
#
# $$
# q(X) = \tfrac12 \langle X, M X \rangle - \langle X, G \rangle .
# \tag{21.3}
# $$
#
# Products with $M$ give $G$, $M G$, $M^2 G$ and so on. The combinations of the first $k$ of these matrices are a
# *Krylov space*, and step $k$ of conjugate gradients gives the minimizer of $q$ in this space. The method needs one
# product per step and keeps three matrices in memory. Start from $X = 0$ with the residual $R = G$ and the direction
# $P = R$. In each step, go along $P$ to the minimum of $q$ on this line. Then change the new residual to a direction
# that is *conjugate* to the last one, $\langle P, M P_\text{old} \rangle = 0$: after a step along $P$, $q$ is still
# minimal along $P_\text{old}$.


# %%
def cg_by_hand(M, G: Tensor, steps: int) -> Tensor:
    X, R = torch.zeros_like(G), G
    P = R
    for _ in range(steps):
        MP = M(P)
        step = (R * R).sum() / (P * MP).sum()
        X = X + step * P
        new = R - step * MP
        P = new + (new * new).sum() / (R * R).sum() * P
        R = new
    return X


# %% tags=["hide-input"] fold="Checked: step k is the minimum over the Krylov space, by hand and in the package"
io, G, delta = random_io(8), torch.randn(5, 7), 0.5
F = io.block()
for k in (1, 3, 6):
    powers = [G.flatten()]  # the Krylov space, and the minimum of q in it
    for _ in range(k - 1):
        powers.append(F @ powers[-1] + delta * powers[-1])
    Q = torch.linalg.qr(torch.stack(powers, dim=1)).Q
    lowest = Q @ torch.linalg.solve(Q.T @ (F + delta * eye_like(F)) @ Q, Q.T @ G.flatten())
    X = cg_by_hand(lambda P: cg_fac(io) @ P + delta * P, G, k)
    assert_exact(X.flatten(), lowest)
    assert_exact(truncated_inverse(cg_fac(io), delta, k, tol=0.0) @ G, X)

# %% [markdown]
# The package's loop has three additions. If several systems are solved at once, each of them stops as soon as its
# residual is below `tol` times its right-hand side. The residual may be preconditioned. A direction
# without positive curvature raises an error.

# %% tags=["remove-input"]
code(conjugate_gradient)

# %% [markdown]
# <div class="admonition theorem" markdown="1" id="thm-21.1">
# <p class="admonition-title" markdown="1"><b>Theorem 21.1 (every step descends, and K + 1 are enough)</b></p>
#
# Let $X_k$ be the result of $k$ steps from zero, in exact arithmetic, for $M = F + \delta I$ with $F \succeq 0$,
# $\delta \gt 0$ and $G \ne 0$.
#
# 1. $q(X_k)$ falls with $k$ until the solution is reached, and $\langle X_k, G \rangle \gt 0$ for all $k \ge 1$.
# 2. $X_1$ is $G$ times the step length that minimizes $q$ along $G$.
# 3. If $F$ is a sum of $K$ outer products of gradients, $X_{K + 1}$ is the solution. If $G$ is a combination of the
#    same $K$ gradients, $X_K$ is the solution.
#
# </div>
#
# **Proof.** The Krylov spaces grow, so the minima do not rise. If $X_k$ is still the minimizer in the next space, its
# residual, which lies in that space, is orthogonal to itself, hence zero. The first space is the line through $G$,
# which proves (2). On this line $q$ falls below $q(0) = 0$, so $0 \gt q(X_k) = \tfrac12 \langle X_k, M X_k \rangle -
# \langle X_k, G \rangle$. As $\langle X_k, M X_k \rangle \ge 0$, the inner product with $G$ is positive, which
# completes (1). For (3), split $G$ into parts $G_\lambda$, one for each eigenvalue $\lambda$ of $M$. A combination of
# $M^j G$ is $\sum_\lambda p(\lambda)\, G_\lambda$ with a polynomial $p$ of degree $k - 1$. The solution is
# $\sum_\lambda \lambda^{-1} G_\lambda$. A polynomial of degree $k - 1$ can take the values $\lambda^{-1}$ at $k$
# points. $F$ has rank $K$ at most, so $M$ has at most $K$ eigenvalues that are not $\delta$, and $\delta$ itself. If
# $G$ is in the span of the gradients, its part at $\delta$ is zero. $\blacksquare$
#
# By (1), $-X_k$ is a descent direction for every $k$, if $G$ is the gradient. By (3), $K = V N$ gradients need
# $V N + 1$ products at most, *however large the layer is*. [Figure 21.1] shows this at step seven. KFAC's matrix of the
# same batch can have $N \cdot V N$ different eigenvalues that are not zero, since each eigenvalue of $B$ is multiplied
# by each eigenvalue of $A$.

# %% tags=["hide-input"] fold="Checked: the three statements, for the exact block and for KFAC's matrix"
delta = 1.0
for M in (cg_fac(six), skfac(six)):
    values = []
    for k in range(1, 31):
        X = truncated_inverse(M, delta, k, tol=0.0) @ start
        values.append(((M @ X + delta * X) * X).sum() / 2 - (X * start).sum())
        assert (X * start).sum() > 0
    assert all(new <= old + 1e-9 for old, new in zip(values[:-1], values[1:], strict=True))
    X = truncated_inverse(M, delta, 1) @ start
    assert_exact(X, start * (start * start).sum() / ((M @ start + delta * start) * start).sum())
assert errors["exact block"][6] < 1e-8 < 1e-5 < min(errors["exact block"][4], errors["KFAC"][6])

own = six.combination(torch.randn(1, 6))  # a combination of the same gradients: one step less
assert_exact(truncated_inverse(cg_fac(six), delta, 6, 0.0) @ own, cg_fac(six).inverse(delta) @ own)

# %% [markdown]
# Converged conjugate gradients agree with the inverses of other chapters: for the exact block with the dense inverse,
# for KFAC's operator with the exactly damped inverse in the eigenbasis ([Chapter 9](09_damping.py)).
# `inverse(damping)` iterates to convergence, `truncated_inverse` stops after a few steps. The truncated inverse is not
# a linear map, since the polynomial that it applies depends on $G$.

# %% tags=["hide-input"] fold="Checked: converged solutions against dense inverses, and that the truncated inverse is not linear"
for S in (1, 3):
    io, X = random_io(4, S, V=2), torch.randn(2, 5, 7)
    dense = Dense(io.block()).inverse(0.1)
    assert_exact(cg_fac(io).inverse(0.1) @ X, dense @ X)
    assert_exact(truncated_inverse(skfac(io), 0.1, 100, 1e-12) @ X, kfac(io).inverse(0.1) @ X)
few = truncated_inverse(cg_fac(io), 0.1, 2)
assert not torch.allclose(few @ (X[0] + X[1]), few @ X[0] + few @ X[1], rtol=0.01)

# %% [markdown]
# ## The same, directly
#
# The solution is $G / \delta$ plus a combination of the $K$ gradients, whose $K$ weights can be computed directly.
# Let $U$ have the columns $\operatorname{vec}(G_{vn})$, so that $F = U U^\top$. Woodbury's identity
# ([Theorem 17.1]) needs $T = U^\top U$, the **kernel** of all inner products of two gradients. With one position
# each entry is a product of two inner products,
#
# $$
# \langle G_{vn}, G_{wm} \rangle = (g_{vn}^\top g_{wm})\, (a_n^\top a_m) ,
# \tag{21.4}
# $$
#
# so that the kernel is the entrywise product of two small Gram matrices, and costs
# $K^2 (d_\text{in} + d_\text{out})$ instead of $K^2 d_\text{in} d_\text{out}$. Then
#
# $$
# \begin{aligned}
# (F + \delta I)^{-1} X &= \tfrac1\delta \Bigl( X - \sum\nolimits_{vn} y_{vn} G_{vn} \Bigr) ,
# & (T + \delta I)\, y &= \bigl( \langle G_{vn}, X \rangle \bigr)_{vn} , \\
# (F + \delta I)^{-1} \sum\nolimits_{vn} c_{vn} G_{vn} &= \sum\nolimits_{vn} y_{vn} G_{vn} ,
# & (T + \delta I)\, y &= c .
# \end{aligned}
# \tag{21.5}
# $$
#
# The second line is for a gradient of the same batch, in the form of [(17.4)] that does not divide by the damping. For
# the empirical Fisher all $c_{vn}$ are equal: the plain gradient gives all data the same weight, and the step has other
# weights $y$.

# %% tags=["remove-input"]
code(gradient_kernel, KernelInverse.__matmul__, same_batch_step)

# %% tags=["hide-input"] fold="Checked: the kernel, and both lines of (21.5)"
for S in (1, 3):
    io, X = random_io(4, S, V=2), torch.randn(5, 7)
    U = io.gradients().flatten(0, 1).flatten(1).T
    assert_exact(gradient_kernel(io), U.T @ U)
    dense, c = Dense(io.block()).inverse(0.1), torch.randn(2, 4)
    assert_exact(kernel_inverse(cg_fac(io), 0.1) @ X, dense @ X)
    assert_exact(same_batch_step(io, c, 0.1), dense @ io.combination(c))

# %% [markdown]
# ## What a step costs
#
# According to the abstract, time and memory are proved to be much less than KFAC's. For the memory we count numbers:
# inputs and vectors have $N (d_\text{in} + V d_\text{out})$ numbers per position, KFAC's factors $d_\text{in}^2 +
# d_\text{out}^2$. For the time we count operations as in [Chapter 17](17_skfac.py), for a square layer of width $d$
# and data with one vector and one position ([Figure 21.3]).

# %% tags=["hide-input"] fold="Counted: operations of four methods for eight sizes of a batch"
aten = torch.ops.aten
decompositions = {
    aten.linalg_cholesky_ex: lambda L, *_, **__: L[-1] ** 3 // 3,
    aten.cholesky_inverse: lambda L, *_, **__: 2 * L[-1] ** 3 // 3,
    aten.cholesky_solve: lambda R, L, *_, **__: 2 * L[-1] ** 2 * R[-1],
}


def operations(step) -> int:
    with FlopCounterMode(display=False, custom_mapping=decompositions) as counter:
        step()
    return counter.get_total_flops()


d, sizes = 256, [4, 8, 16, 32, 64, 128, 256, 512]
G = torch.randn(d, d)
K = factored_inverse(kfac(LayerIO(torch.randn(512, 1, d), torch.randn(1, 512, 1, d))), 0.1)
applied = operations(lambda: K @ G)
counts = {"CG, 10 steps": [], "kernel": [], "kernel, own gradient": [], "KFAC, fresh factors": []}
for N in sizes:
    io = LayerIO(torch.randn(N, 1, d), torch.randn(1, N, 1, d))
    steps = (
        lambda io=io: truncated_inverse(cg_fac(io), 0.1, 10, 0.0) @ G,
        lambda io=io: kernel_inverse(cg_fac(io), 0.1) @ G,
        lambda io=io, N=N: same_batch_step(io, torch.ones(1, N), 0.1),
        lambda io=io: factored_inverse(kfac(io), 0.1) @ G,
    )
    for row, step in zip(counts.values(), steps, strict=True):
        row.append(operations(step))
cg = counts["CG, 10 steps"]
assert abs(cg[4] / (10 * 4 * 64 * d**2) - 1) < 0.05  # 4 N d² a step
assert cg[0] < applied < cg[4]
assert all(k < c for k, c in zip(counts["kernel"][:6], cg[:6], strict=True))

# %% tags=["hide-input"] alt="Log-log plot of operations against the size of the batch, for a layer of width 256. Ten steps of CG rise in proportion to the batch. The kernel's two lines lie far below it and come nearer as the batch grows. KFAC with fresh factors is almost flat. A horizontal line, one product with a kept inverse, is crossed by CG at about 26 data and by the kernel at about 200." caption="Operations for one step of a layer of width 256. Dashed: one product with an inverse of KFAC that was kept. The kernel costs less than this product up to 128 data, ten steps of CG up to 16."
looks = ({"color": "C1", "marker": "s"}, {"color": "C3", "marker": "^"})
looks += ({"color": "C4", "marker": "d"}, style("KFAC"))
fig, ax = plt.subplots(figsize=(7.2, 3.6), layout="constrained")
heights = ("center", "bottom", "center", "top")
for (name, row), look, va in zip(counts.items(), looks, heights, strict=True):
    (line,) = ax.loglog(sizes, row, **look, markersize=4)
    ax.text(590, row[-1], name, color=line.get_color(), va=va, fontsize="small")
ax.axhline(applied, linestyle="--", linewidth=1, color=style("KFAC")["color"])
ax.set(xlabel="data in the batch, $N$", ylabel="operations", xticks=sizes, xticklabels=sizes)
ax.set_xlim(3.5, 3500)
ax.minorticks_off()
plt.show()
assert cg[2] < applied < cg[3]
assert counts["kernel"][5] < applied < counts["kernel"][6]

# %% [markdown]
# A product with the block takes about $4 N d^2$ operations, a product with KFAC's inverse $4 d^3$. So $k$ steps of CG
# cost less than KFAC's product if $k N \lt d$ or, for a layer that is not square,
# $k N \lt \tfrac12 (d_\text{in} + d_\text{out})$. KFAC must also compute its inverse, but can keep it for many steps.
# **CG costs much less for wide layers and small batches**, and not for a batch as large as the layer is wide. For small
# batches with one vector per datum, the direct solver costs less than ten steps of CG, and is exact. With many vectors
# per datum conjugate gradients have an advantage: the size of the kernel is $V N$, while a product with the block costs
# nearly the same for all $V$.
#
# ## How many steps are worth taking?
#
# We train three layers on handwritten digits for a few steps, and take 48 images that the training did not use. The
# curvature of the middle layer comes from labels drawn from the model, its gradient from the data's labels. [Figure
# 21.4] shows which part of the largest possible decrease of the damped quadratic function [(21.3)] a step reaches.
# KFAC's direction has the step length that is best for this function.

# %% tags=["hide-input"] fold="Measured: the part of the decrease for ten numbers of steps and three dampings"
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
loss, generator = CrossEntropyLoss(), torch.Generator(images.device)


def network() -> Sequential:
    return Sequential(Linear(64, 32), Tanh(), Linear(32, 32), Tanh(), Linear(32, 10))


def problem(model: Sequential, X: Tensor, y: Tensor) -> tuple[LayerIO, Tensor]:
    """What flows through the middle layer, and its gradient."""
    own = layer_ios(model, loss, X, y, empirical)["2"]
    drawn = layer_ios(model, loss, X, y, monte_carlo(1, generator))["2"]
    return drawn, own.gradients().sum((0, 1)) / len(X) ** 0.5


def decrease(M: Matrix, damping: float, X: Tensor, G: Tensor) -> float:
    """By how much a step lowers the damped quadratic function."""
    return ((X * G).sum() - ((M @ X + damping * X) * X).sum() / 2).item()


model = network()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(20):
    batch = torch.randint(1000, (100,))
    optimizer.zero_grad()
    loss(model(images[batch]), labels[batch]).backward()
    optimizer.step()

io, G = problem(model, images[1000:1048], labels[1000:1048])
M, mean = cg_fac(io), cg_fac(io).trace().item() / G.numel()
counts, reached = [1, 2, 3, 5, 7, 10, 14, 20, 28, 40], {}
for multiple in (0.1, 1.0, 10.0):
    delta = multiple * mean
    best = decrease(M, delta, kernel_inverse(M, delta) @ G, G)
    parts = [decrease(M, delta, truncated_inverse(M, delta, k, 0.0) @ G, G) / best for k in counts]
    direction = kfac(io).inverse(delta) @ G
    length = (direction * G).sum() / ((M @ direction + delta * direction) * direction).sum()
    with_kfac = decrease(M, delta, length * direction, G) / best
    reached[multiple] = parts, with_kfac
    shown = ", ".join(
        f"{k}: {part:.0%}" for k, part in zip(counts, parts, strict=True) if k in (1, 5, 20)
    )
    print(f"damping {multiple:4} times the mean eigenvalue: {shown} (steps); KFAC {with_kfac:.0%}")
    assert all(old <= new + 1e-9 for old, new in zip(parts[:-1], parts[1:], strict=True))
    assert parts[0] < with_kfac < parts[-3] > 0.8

# %% tags=["hide-input"] alt="Three plots of the reached part of the possible decrease against steps of CG, for three dampings. Each curve rises to one, from near zero for the smallest damping and from almost one half for the largest. A horizontal line for KFAC is crossed after a few steps; the smaller the damping, the lower the line and the more steps are needed to reach one." caption="Part of the possible decrease of the batch's own quadratic function. Squares: CG. Dotted: KFAC's direction with the best step length. A few steps of CG reach more; a smaller damping needs more steps to reach all of the decrease."
fig, axes = plt.subplots(1, 3, figsize=(9.2, 3), layout="constrained", sharey=True)
for ax, (multiple, (parts, with_kfac)) in zip(axes, reached.items(), strict=True):
    ax.semilogx(counts, parts, "s-", color="C1", markersize=4)
    ax.axhline(with_kfac, linestyle=":", color=style("KFAC")["color"])
    ax.text(40, with_kfac - 0.02, "KFAC", color=style("KFAC")["color"], ha="right", va="top")
    ax.set(title=f"damping {multiple:g} × mean", xlabel="steps", xticks=[1, 3, 10, 40])
    ax.set_xticklabels([1, 3, 10, 40])
    ax.minorticks_off()
axes[0].set_ylabel("part of the decrease")
plt.show()

# %% [markdown]
# By this measure the exact block gives better steps. KFAC's direction, even with the best length, reaches a part of the
# possible decrease only, and a few steps of conjugate gradients reach more. A smaller damping needs more steps, as
# the larger ratio of the largest eigenvalue to the smallest suggests.
#
# ### Exact for which data?
#
# The quadratic function above is that of 48 images. We now evaluate steps of the smallest damping in the function of
# all 1000 training images, with the same damping.

# %% tags=["hide-input"] fold="Measured: the same steps for their own 48 images and for 1000 images"
all_io, all_G = problem(model, images[:1000], labels[:1000])
everything, delta = cg_fac(all_io), 0.1 * mean
judged = {"own 48 images": [], "1000 images": []}
for k in counts:
    X = truncated_inverse(M, delta, k, 0.0) @ G
    judged["own 48 images"].append(decrease(M, delta, X, G))
    judged["1000 images"].append(decrease(everything, delta, X, all_G))
print("steps          ", " ".join(f"{k:7}" for k in counts))
for name, row in judged.items():
    print(f"{name:15}", " ".join(f"{value:7.2f}" for value in row))
assert min(judged["own 48 images"]) > 0
assert judged["1000 images"][-1] < -10 * judged["own 48 images"][-1]

# %% tags=["hide-input"] alt="Plot of the decrease of two quadratic functions against steps of CG for a small damping. The curve of the batch's own function rises and becomes flat; that of the 1000 images is negative from the second step and falls far below zero." caption="Decrease of two quadratic functions by the same steps, at a tenth of the mean eigenvalue as damping. With more steps the function of the batch's own images decreases more, and that of the 1000 images increases. The vertical axis is logarithmic on both sides of zero."
fig, ax = plt.subplots(figsize=(6.8, 3.3), layout="constrained")
for (name, row), (mark, colour) in zip(judged.items(), (("s-", "C1"), ("^-", "C3")), strict=True):
    ax.semilogx(counts, row, mark, color=colour, markersize=4)
    ax.text(44, row[-1], name, color=colour, va="center", fontsize="small")
ax.set_yscale("symlog", linthresh=0.1)
ax.axhline(0, linestyle=":", linewidth=1, color=ax.xaxis.label.get_color())
ax.set(xlabel="steps of CG on the batch", ylabel="decrease", xticks=[1, 3, 10, 40])
ax.set_xticklabels([1, 3, 10, 40])
ax.set_xlim(0.9, 130)
ax.minorticks_off()
plt.show()

# %% [markdown]
# In the function of its own images the result improves with every CG step. In that of the 1000 images it becomes worse.
# A block of 48 gradients has rank 48 at most, and the layer has 1056 weights. In directions where the batch has no
# curvature, the exact solution divides by the damping alone, so that noise of the gradient there gives a long step.
# **Stopping early saves products, and it also keeps the step small in such directions**, as damping does. With the
# small damping of this experiment, fewer steps were better for other data.
#
# KFAC's factors can be averaged over many batches, which adds curvature in further directions. The block cannot be
# averaged by averages of inputs and vectors: the block of averaged rows is not the average of the blocks. The rows of
# several batches, kept side by side, are a larger batch and cost as much.

# %%
first, second = random_io(4), random_io(4)
joined = concatenate([first, second], shares=[0.5, 0.5])
assert_exact(cg_fac(joined).dense(), (first.block() + second.block()) / 2)
mean_of_rows = LayerIO((first.a + second.a) / 2, (first.g + second.g) / 2)
assert relative_error(mean_of_rows.block(), (first.block() + second.block()) / 2) > 0.3

# %% [markdown]
# ## Training with it
#
# We train the same network from new initial weights, for 40 steps of 32 images each, with a fixed learning rate. Four
# methods use the newest batch only: KFAC, five steps of CG with KFAC's matrix and with the exact block, and the direct
# solver. Two methods use KFAC's moving averages: KFAC, and ten steps of CG as in the author's code (see below). So the
# effects of conjugate gradients and of averages are separated. The table has the final loss for four dampings.

# %% tags=["hide-input"] fold="Measured: the final loss of six methods with four dampings"
methods = {
    "KFAC, newest batch": (Latest(kfac), lambda M, damping: M.inverse(damping)),
    "CG, KFAC's matrix": (Latest(skfac), lambda M, damping: truncated_inverse(M, damping, 5, 0.0)),
    "CG, exact block": (Latest(cg_fac), lambda M, damping: truncated_inverse(M, damping, 5, 0.0)),
    "exact block, direct": (Latest(cg_fac), kernel_inverse),
    "KFAC, moving average": (MovingAverage(kfac), lambda M, damping: M.inverse(damping)),
    "CG, moving average": (
        MovingAverage(kfac),
        lambda M, damping: truncated_inverse(M, damping, 10, 0.1),
    ),
}


def run(estimator, inverse, damping: float) -> float:
    torch.manual_seed(1)
    model, states = network(), {}
    weights, draws = dict(model.named_parameters()), torch.Generator(images.device).manual_seed(0)
    for t in range(1, 41):
        batch = torch.randint(1000, (32,), generator=draws)
        X, y = images[batch], labels[batch]
        for name, io in layer_ios(model, loss, X, y, monte_carlo(1, draws)).items():
            states[name] = estimator.update(states.get(name), io, weight_of_newest(0.95, t))
        gradient = torch.autograd.grad(loss(model(X), y), list(weights.values()))
        inverses = {name: inverse(M, damping) for name, M in states.items()}
        step = preconditioner(model, inverses)(dict(zip(weights, gradient, strict=True)))
        with torch.no_grad():
            for name, W in weights.items():
                W -= 0.1 * step[name]
    return loss(model(images[:1000]), labels[:1000]).item()


dampings = [1e-2, 3e-2, 1e-1, 3e-1]
results = {name: [run(*how, d) for d in dampings] for name, how in methods.items()}
print("damping              ", " ".join(f"{d:8}" for d in dampings))
for name, row in results.items():
    print(f"{name:21}", " ".join(f"{value:8.2f}" for value in row))
*of_newest, k, solved = results.values()
for row in of_newest:
    assert abs(row[-1] - k[-1]) < 0.1 * k[-1]  # much damping: all alike
    assert row[2] < 1
    assert row[0] > 3 * max(k[0], solved[0])  # little damping: one batch is not enough
assert max(abs(x / y - 1) for x, y in zip(k[1:], solved[1:], strict=True)) < 0.2
assert max(k[0], solved[0]) < 2

# %% [markdown]
# At the largest damping the six losses are nearly equal. At the smallest, every method with one batch fails, KFAC
# included. Both methods with averages train at all four dampings, and ten steps of CG are about as good as the inverse.
# So averages helped here. The exact block did not: at the damping 0.03 it fails, where KFAC of the same batch trains.
# Each loss is from one run. The paper's claims are about cost, for which we counted operations and measured no time.
#
# ## KFAC as a preconditioner
#
# Let $K$ now be KFAC's damped matrix. Conjugate gradients for $K^{-1/2} M K^{-1/2}$ need only products with $M$ and
# $K^{-1}$. If $K$ is near $M$, all eigenvalues of the preconditioned matrix are near one, and few steps give a small
# error. Is KFAC's inverse a good preconditioner? We try one layer whose inputs and vectors have very different scales.

# %% tags=["hide-input"] fold="Measured: the error with and without KFAC as a preconditioner"
torch.manual_seed(0)
io = LayerIO(
    torch.randn(6, 1, 7) * torch.logspace(0, -1.5, 7),
    torch.randn(1, 6, 1, 5) * torch.logspace(0, -1.5, 5),
)
M, G = cg_fac(io), torch.randn(5, 7)
delta = 0.01 * M.trace().item() / 35
right, inverse = Dense(M.dense()).inverse(delta) @ G, kfac(io).inverse(delta)
errors = {"plain": [], "preconditioned by KFAC": []}
for k in range(1, 41):
    for P, row in zip((None, inverse), errors.values(), strict=True):
        row.append(max(relative_error(TruncatedInverse(M, delta, k, 0.0, P) @ G, right), 1e-16))
print("error after one step:", {name: f"{row[0]:.2f}" for name, row in errors.items()})
print("steps to 1e-8:", {n: 1 + sum(e > 1e-8 for e in row) for n, row in errors.items()})
plain, helped = errors.values()
assert helped[0] < 0.9 * plain[0]
assert plain[9] < 1e-6 < 1e-3 < helped[9]

# %% tags=["hide-input"] alt="Logarithmic plot of the error against steps. Plain CG stays near one for three steps, falls to about 3e-3 at step six, and drops to round-off after it. Preconditioned by KFAC the error starts lower and falls slowly over thirty steps and more." caption="Error of conjugate gradients with the exact block, plain and preconditioned by KFAC, for six data, five outputs and seven inputs. The preconditioner reduces the error of the first three steps only."
fig, ax = plt.subplots(figsize=(6.8, 3.3), layout="constrained")
looks, places = (style("GGN"), style("KFAC")), ((7.5, 1e-9), (12, 3e-3))
for (name, row), look, place in zip(errors.items(), looks, places, strict=True):
    ax.semilogy(range(1, 41), row, **look, markersize=3)
    ax.text(*place, name, color=look["color"])
ax.set(xlabel="steps", ylabel="relative error", xticks=[1, 7, 20, 40])
plt.show()

# %% [markdown]
# In the first steps of this example KFAC's inverse reduces the error. Later it delays convergence. The plain matrix has
# at most seven different eigenvalues, so that seven steps are enough up to round-off. KFAC's inverse multiplies the
# many equal eigenvalues $\delta$ by different numbers, and [Theorem 21.1] no longer bounds the number of steps by
# seven. For a small batch and a small damping, use KFAC as a preconditioner for very few steps or not at all.
#
# ## What goes wrong in practice
#
# This section is about the author's repository
# [DeepFormer](https://github.com/closest-git/DeepFormer/tree/fa96626bf2ad267e3d0d92eaac11e63bc438b580), whose README
# cites the paper. DeepFormer is an experimental project about transformers. Its first commit is a month younger than
# the paper, and its training script uses KFAC with CG switched off ([line
# 416](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/examples/pytorch_cifar10_resnet.py#L416)).
# Whether the paper's experiments ran this code is not known.
#
# **A tolerance on the square.** The loop there stops at $\lVert R \rVert^2 \lt 0.01\, \lVert G \rVert^2$
# ([`CG_KFAC.py`, line
# 194](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L194)),
# or after 10 steps. So `T_r = 0.01` means ten percent of the norm, and not one. `tol` here is for the norm:

# %% tags=["hide-input"] fold="Checked: a tolerance of .1 needs fewer steps than one of .01, and tol= is for the norm"
io, G = random_io(20), torch.randn(5, 7)
M, delta = cg_fac(io), 0.5


def residual(k: int) -> float:
    X = truncated_inverse(M, delta, k, tol=0.0) @ G
    return relative_error(M @ X + delta * X, G)


needed = {tol: next(k for k in range(1, 60) if residual(k) <= tol) for tol in (0.1, 0.01)}
print("steps:", needed)
assert needed[0.1] < needed[0.01]
for tol, k in needed.items():
    assert_exact(truncated_inverse(M, delta, 60, tol) @ G, truncated_inverse(M, delta, k, 0.0) @ G)

# %% [markdown]
# **Stored factors.** The line that is active there multiplies with stored moving averages of $A$ and $B$ ([line
# 166](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L166),
# called with them in [line
# 215](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L215)).
# So the system is that of KFAC's matrix. The code forms the factors that the abstract avoids, and converges to the
# solution that two eigendecompositions give directly. But the factors are averages, which helped in the table above.
#
# **The gradient as a substitute.** If the residual there is larger at the end than at the start, the plain gradient
# replaces the step ([lines 204 to
# 206](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L204-L206)).
# Such steps are counted, and `dump` reports them as `Bad` ([line
# 54](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L54)). The
# norm of the residual can grow although conjugate gradients converge. And the gradient has another scale than the
# solution, which is up to $1 / \delta$ times as long. The package returns the $X_k$ that was reached. A direction of
# negative curvature, which means a mistake elsewhere in the program, raises an error:

# %%
try:
    conjugate_gradient(lambda X: -X, G, lambda R: R, max_iter=5, tol=0.1)
    raise AssertionError
except ValueError as refused:
    print(refused)

# %% [markdown]
# **A warm start.** A start from the last step's solution can save products, but [Theorem 21.1] no longer holds: its
# proof needs the start $X = 0$. After one step from a bad start the result can be a direction of ascent:

# %%
warm = -10 * G
moved = warm + truncated_inverse(M, delta, 1) @ (G - (M @ warm + delta * warm))
print(f"inner product with the gradient: {(moved * G).sum().item():.1f}")
assert (moved * G).sum() < 0

# %% [markdown]
# ## The paper and this package
#
# What is in [Chen (2021)](bibliography.md#cg-fac), as far as its abstract tells, and what is here. Entries that begin
# with "code" are about DeepFormer, as above.
#
# | | the paper | here |
# | --- | --- | --- |
# | system | without forming the Fisher or its factors; with which of the two operators is not checked; code: [KFAC's averaged factors](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L166) | the exact block of the newest batch, `cg_fac`; KFAC's matrix of it, `skfac`; the code's is `approximation=kfac` with `invert=truncated_inverse` |
# | steps | code: [at most 10](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L38-L39), until the *squared* residual is .01 of the start | at most 20, until the residual is .01 of the start; both are arguments |
# | without convergence | code: what the steps have reached; [the plain gradient](https://github.com/closest-git/DeepFormer/blob/fa96626bf2ad267e3d0d92eaac11e63bc438b580/kfac/CG_KFAC.py#L204-L206) if the residual has grown | what the steps have reached, which descends |
# | direct solution | not in the abstract | `kernel_inverse`, for few gradients |
# | average over batches | code: of the factors | none |
# | headline | proved: time and memory much less than KFAC's | operations and numbers counted above, with the condition for it; the abstract reports no training. [Chapter 23](23_comparison.py) trains it beside its controls |
#
# ## In one minute
#
# - **Product.** A product with the exact block costs a forward and a backward pass of one layer, [(21.1)]. KFAC's
#   product combines the vectors and inputs of all pairs of data, [(21.2)].
# - **Steps.** $V N + 1$ steps of CG are enough in exact arithmetic, and fewer steps also give a descent direction
#   ([Theorem 21.1]).
# - **Directly.** The kernel of the $V N$ gradients gives the same solution, [(21.5)]. For small batches and $V = 1$ it
#   costs less than ten steps.
# - **Cost.** $k$ steps cost less than a product with KFAC's inverse if $k N \lt \tfrac12 (d_\text{in} + d_\text{out})$.
# - **Limit.** The block of one batch is exact for this batch only. With a small damping, an accurate solution was a bad
#   step for other data. Averages over batches helped in training, and `cg_fac` has none.
#
# ## Exercises
#
# **Exercise 21.1.** All data of a batch are copies of three, with the same vectors. How many steps are enough?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Four, if $V = 1$. Copies do not raise the rank: the columns of $U$ span at most $3 V$ dimensions, so $F + \delta I$
# has at most $3 V$ eigenvalues besides $\delta$, and $3 V + 1$ steps are enough.
#
# </details>
#
# **Exercise 21.2.** $G$ is a combination of the batch's gradients with weights $c$. Show that all $X_k$ are
# combinations of them as well, and write conjugate gradients in the $K$ weights alone. By which matrix does a step
# multiply?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $M U c = U (U^\top U + \delta I)\, c = U (T + \delta I)\, c$. So the Krylov space of $M$ from $U c$ is $U$ times
# that of $T + \delta I$ from $c$. Inner products are $\langle U c, U c' \rangle = c^\top T c'$. Conjugate gradients
# for $(T + \delta I)\, y = c$ in *this* inner product give $X_k = U y_k$. A step costs of the order of $K^2$.
#
# </details>
#
# **Exercise 21.3.** Show that the solution $X$ shrinks when the damping grows, in $\langle X, G \rangle$ and in
# $\lVert X \rVert$, and that $X_1$ shrinks as well. Which $X_k$ have a limit for $\delta \to 0$, if $G$ is not in
# the span of the gradients?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With the parts $G_\lambda$ for the eigenvalues $\lambda$ of $F$,
# $\langle X, G \rangle = \sum_\lambda \lVert G_\lambda \rVert^2 / (\lambda + \delta)$ and
# $\lVert X \rVert^2 = \sum_\lambda \lVert G_\lambda \rVert^2 / (\lambda + \delta)^2$, and
# $X_1 = G\, \lVert G \rVert^2 / (\langle G, F G \rangle + \delta \lVert G \rVert^2)$. The solution grows like
# $1 / \delta$, because of the part $G_0$. The solution is the last $X_k$. All earlier $X_k$ have a limit: their Krylov
# space contains no matrix but zero that $F$ maps to zero, so that $q$ has a minimum in it without damping, too.
# So an early stop bounds the step as $\delta \to 0$, and the solution has no such bound.
#
# </details>
#
# **Exercise 21.4.** Write `product(io, X)` for `io.a` of shape $[N, S, d_\text{in}]$ and `io.g` of shape
# $[V, N, S, d_\text{out}]$ with two calls of `torch.einsum`, without loops and without a gradient of a single datum.
# Compare with `io.block()`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def product(io, X):
#     weights = torch.einsum("vnso,oi,nsi->vn", io.g, X, io.a)
#     return torch.einsum("vn,vnso,nsi->oi", weights, io.g, io.a)
# ```
#
# Without the package `opt_einsum`, PyTorch multiplies from left to right, and computes $X^\top g_{vns}$ for every
# vector. The package computes $X a_{ns}$, once for all vectors.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
io, G = random_io(3), torch.randn(5, 7)  # 21.1
copies = concatenate([io] * 5, [1.0] * 5)
assert_exact(truncated_inverse(cg_fac(copies), 1.0, 4, 0.0) @ G, cg_fac(copies).inverse(1.0) @ G)

io, c = random_io(6), torch.randn(6)  # 21.2
T, y, r = gradient_kernel(io), torch.zeros(6), c
p = r
for k in range(1, 4):
    Mp = T @ p + 0.5 * p
    step = (r @ T @ r) / (p @ T @ Mp)
    y, new = y + step * p, r - step * Mp
    p = new + (new @ T @ new) / (r @ T @ r) * p
    r = new
    found = truncated_inverse(cg_fac(io), 0.5, k, 0.0) @ io.combination(c[None])
    assert_exact(io.combination(y[None]), found)

io, G = random_io(3), torch.randn(5, 7)  # 21.3
M, dampings = cg_fac(io), (1e-6, 1e-4, 1e-2, 1.0)
solutions = [kernel_inverse(M, d) @ G for d in dampings]
for row in (solutions, [truncated_inverse(M, d, 1, 0.0) @ G for d in dampings]):
    assert all(a.norm() > b.norm() for a, b in zip(row[:-1], row[1:], strict=True))
    assert all((a * G).sum() > (b * G).sum() for a, b in zip(row[:-1], row[1:], strict=True))
assert solutions[0].norm() > 50 * solutions[1].norm()
for k in (1, 2, 3):
    first, second = (truncated_inverse(M, d, k, 0.0) @ G for d in dampings[:2])
    assert relative_error(first, second) < 0.01


def product(io: LayerIO, X: Tensor) -> Tensor:  # 21.4
    weights = torch.einsum("vnso,oi,nsi->vn", io.g, X, io.a)
    return torch.einsum("vn,vnso,nsi->oi", weights, io.g, io.a)


for S in (1, 3):
    io, X = random_io(4, S, V=2), torch.randn(5, 7)
    assert_exact(product(io, X).flatten(), io.block() @ X.flatten())
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Chen (2021)](bibliography.md#cg-fac) introduces CG-FAC. [Martens (2014)](bibliography.md#new-insights) discusses
# curvature products, damping and stopping early. [Tang et al. (2021)](bibliography.md#skfac) and
# [Chapter 17](17_skfac.py) use the same identities with KFAC's factors in place of the exact block.
