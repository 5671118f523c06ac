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
# # 22. Two levels: what KFAC's blocks leave out
#
# **Part V: Better and faster.** KFAC solves every layer by itself. Can a handful of numbers put back
# what happens between the layers?
#
# All methods so far have one block per layer. Where two layers can lower the loss in the same way, each of them does
# so, and the common step is too long: [Figure 22.1]. A second level adds a small system for the whole network: a few
# directions, often one for each layer, and the exact curvature between them.

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh
from torch.nn.functional import avg_pool2d
from torch.utils.flop_counter import FlopCounterMode

from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.curvature import block_index, ggn
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import monte_carlo, type2
from kfac_scratch.matrices.damping import levenberg_marquardt, reduction_ratio
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.coarse_spaces import (
    krylov_space,
    nicolaides_space,
    residual_space,
    spectral_space,
)
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.optimizer.step_control import Step, dot, graft
from kfac_scratch.optimizer.two_level import (
    _corrected,
    additive,
    adef1,
    adef2,
    bnn,
    coarse_correction,
    coarse_inverse,
    coarse_matrix,
    joint_curvature,
    two_level,
)
from kfac_scratch.show import code, matrices, style, table

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"] alt="Contours of a quadratic model over the steps of two layers with one weight each: long ellipses from the top left to the bottom right. The step of the blocks lies beyond the minimum along the diagonal, at 36 percent of the possible decrease. The additive form goes on along the diagonal, to a point that is higher than the start. ADEF2 goes back along the diagonal, to 94 percent. The exact step is at the bottom right." caption="Two layers with one weight each, coupled by $c = 0.8$; contours of the quadratic model. Percentages are shares of the possible decrease. Both layers take their full step, which is too much. The second level moves along the diagonal, the direction of ones: added to the step it goes too far, and in ADEF2 it goes back."
F2, r2, Z2 = torch.tensor([[1.0, 0.8], [0.8, 1.0]]), torch.tensor([1.0, 0.8]), torch.ones(2, 1)
Q2 = Z2 @ torch.linalg.inv(Z2.T @ F2 @ Z2) @ Z2.T
small = {"start": 0 * r2, "blocks": r2, "additive": r2 + Q2 @ r2}
small |= {"ADEF2": r2 + Q2 @ (r2 - F2 @ r2), "exact": torch.linalg.solve(F2, r2)}


def decrease(p: Tensor) -> Tensor:
    """How much the quadratic model falls, for steps of shape [..., 2]."""
    return p @ r2 - (p @ F2 * p).sum(-1) / 2


part = {name: (decrease(p) / decrease(small["exact"])).item() for name, p in small.items()}
assert part["additive"] < 0 < part["blocks"] < 0.5 < 0.9 < part["ADEF2"] < part["exact"]

w1, w2 = torch.linspace(-0.3, 2.3, 120), torch.linspace(-0.4, 1.7, 120)
heights = -decrease(torch.stack(torch.meshgrid(w1, w2, indexing="xy"), -1))
fig, ax = plt.subplots(figsize=(6.6, 4.2), layout="constrained")
ax.contour(
    *(t.cpu() for t in (w1, w2, heights)),
    levels=[-0.45, -0.3, -0.15, 0, 0.4, 1, 2],
    colors="C0",
    linestyles="solid",
    linewidths=1,
    alpha=0.4,
)
arrow = {"arrowstyle": "->", "shrinkA": 4, "shrinkB": 4}
for tail, head in (("start", "blocks"), ("blocks", "additive"), ("blocks", "ADEF2")):
    towards = arrow | {"color": "C0" if tail == "start" else "C1"}
    ax.annotate("", small[head].tolist(), xytext=small[tail].tolist(), arrowprops=towards)
for name, color, marker, place in (
    ("start", ax.xaxis.label.get_color(), "o", (-8, -16)),
    ("blocks", "C0", "o", (8, -12)),
    ("additive", "C1", "s", (8, -2)),
    ("ADEF2", "C1", "D", (9, -8)),
    ("exact", "C3", "*", (8, -4)),
):
    ax.plot(*small[name].tolist(), marker, color=color, markersize=8)
    words = name if name == "start" else f"{name}, {part[name]:.0%}".replace("-", "\N{MINUS SIGN}")
    ax.annotate(words, small[name].tolist(), xytext=place, textcoords="offset points", color=color)
ax.set(xlabel="step of the first layer", ylabel="step of the second layer")
plt.show()

# %% [markdown]
# Let $r$ be the gradient of the whole network, $F$ its curvature, $F_\delta = F + \delta I$, and $x = M^{-1} r$ the
# step of the blocks. The columns of $Z$ are the directions. This chapter compares four ways to use them. ADEF2, the
# third of them, is
#
# $$
# p = x + Z E^{-1} Z^\top (r - F_\delta\, x) ,
# \qquad E = Z^\top F_\delta\, Z .
# $$
#
# After this chapter you will be able to
#
# - multiply by the curvature of the whole network with the layers' inputs and vectors alone;
# - build the small system, and combine it with KFAC's step in four ways;
# - prove what ADEF2 guarantees, and say where the guarantee does not help;
# - compare a second level with other uses of a product with the curvature.
#
# Two papers have tried second levels. [Tselepidis et al. (2020)](bibliography.md#two-level), who brought the idea to
# KFAC, see improved convergence in a few experiments. [Koroko et al. (2023)](bibliography.md#two-level-koroko), who
# tried more directions, see no real gain. At the size of this chapter the gain is small.
#
# ## What the blocks leave out
#
# The damped quadratic model $q(p) = \tfrac12 p^\top F_\delta\, p - r^\top p$ has its minimum at
# $p_* = F_\delta^{-1} r$. KFAC's step is $x = M^{-1} r$, with a block-diagonal $M$. The smallest example
# has two layers with one weight each:
#
# $$
# F_\delta = \begin{pmatrix} 1 & c \\ c & 1 \end{pmatrix}, \qquad
# r = \begin{pmatrix} 1 \\ 1 \end{pmatrix}, \qquad
# F_\delta^{-1} r = \frac{1}{1 + c}\, r, \qquad x = r .
# \tag{22.1}
# $$
#
# A step of 1 is right for each layer, provided that the other layer does not move. If both move and $c$ is near 1, the
# common step is too long by a factor of two. With $L$ layers that can all lower the loss in the same way, the factor is
# up to $L$.
#
# Linear solvers with one block for each part of the unknowns are called block Jacobi methods. They reduce errors within
# a part well, and errors that all parts have in common badly. The usual remedy is a second level: a very
# small system for the whole, solved exactly, beside the many systems of the parts.
#
# The network of this chapter has four layers and is trained on small digits. The folded cell has what the rest of the
# chapter needs: the exact matrix, KFAC, and functions that turn vectors into layers and back. It measures a step $p$ by
# two shares of the possible decrease of $q$: with the step as it is, and with the best multiple of it.

# %% tags=["hide-input"] fold="The digits, the network, its exact matrix and KFAC"
digits = load_digits()
images = avg_pool2d(torch.tensor(digits.images) / 16, 2).flatten(1)  # 4 by 4 pixels
targets, loss = torch.tensor(digits.target), CrossEntropyLoss()
Layers = dict[str, Tensor]


def network() -> Sequential:
    widths = (16, 12, 12, 12, 10)
    layers = [Linear(i, o) for i, o in zip(widths[:-1], widths[1:], strict=True)]
    return Sequential(*(m for layer in layers for m in (layer, Tanh())))[:-1]


class Problem:
    """A trained network on data that it has not seen, with both levels and the exact solution."""

    def __init__(self, seed: int, steps: int = 100, fraction: float = 0.1):
        torch.manual_seed(seed)
        order = torch.randperm(len(targets))
        X, y, self.model = images[order], targets[order], network()
        optimizer = torch.optim.Adam(self.model.parameters(), lr=0.02)
        for _ in range(steps):
            batch = torch.randint(1000, (100,))
            optimizer.zero_grad()
            loss(self.model(X[batch]), y[batch]).backward()
            optimizer.step()
        self.X, self.y, self.index = X[1000:1300], y[1000:1300], block_index(self.model)
        self.ios = layer_ios(self.model, loss, self.X, self.y)
        parts = zip(self.X.split(50), self.y.split(50), strict=True)  # with less memory at once
        F = torch.stack([ggn(self.model, loss, *part) for part in parts]).mean(0)
        self.delta = fraction * F.diagonal().mean().item()
        self.F = F + self.delta * eye_like(F)
        self.maps = {name: kfac(io).inverse(self.delta) for name, io in self.ios.items()}
        self.product = joint_curvature(self.ios, self.delta)

    def gradient(self) -> Tensor:
        value = loss(self.model(self.X), self.y)
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, self.model.parameters())])

    def split(self, v: Tensor) -> Layers:
        return {name: v[index] for name, index in self.index.items()}

    def joined(self, layers: Layers) -> Tensor:
        v = torch.zeros(len(self.F))
        for name, index in self.index.items():
            v[index] = layers[name]
        return v

    def fine(self, r: Layers) -> Layers:
        return {name: self.maps[name] @ v for name, v in r.items()}

    def step(self, r: Tensor, combine: Callable, space: Callable) -> Tensor:
        Q = coarse_inverse(self.ios, space(self.maps, self.split(r)), self.delta)
        return self.joined(combine(self.fine, self.product, Q)(self.split(r)))

    def reached(self, p: Tensor, r: Tensor) -> tuple[float, float]:
        """Shares of the possible decrease: by the step as it is, and with the best length."""
        best = r @ torch.linalg.solve(self.F, r)
        as_it_is = (2 * r @ p - p @ self.F @ p) / best
        return as_it_is.item(), ((r @ p) ** 2 / (p @ self.F @ p) / best).item()


# %% tags=["hide-input"] fold="Measured: the step of the blocks"
problem = Problem(seed=0)
r = problem.gradient()
x = problem.joined(problem.fine(problem.split(r)))


def by_exact_blocks(problem: Problem, r: Tensor) -> Tensor:
    exact = {name: Dense(io.block()).inverse(problem.delta) for name, io in problem.ios.items()}
    return problem.joined({name: exact[name] @ v for name, v in problem.split(r).items()})


for name, p in (("KFAC", x), ("exact blocks", by_exact_blocks(problem, r))):
    unit, scaled = problem.reached(p, r)
    print(f"{name:13} share of the decrease {unit:6.2f}, with the best length {scaled:.2f}")
    assert unit < 0 < scaled < 0.9

# %% [markdown]
# The first share is negative: a step of length one does not lower the quadratic model but raises it. The reason is not
# KFAC's model of a block, since exact blocks raise $q$ as well. It is the coupling of [(22.1)], with four layers. A
# learning rate, a trust region or a line search repairs the length, so the second share is the one that counts. A part
# of what KFAC misses there is due to its model of each block. The rest is missing with exact blocks, too.
# A second level could bring back this rest.

# %% tags=["hide-input"] alt="Heat map of a matrix of 16 by 16 parts for four layers. Each part holds the mean magnitude of the correlation between weights of two layers. The parts off the diagonal blocks are three quarters as strong as those within a block, on average." caption="How strongly weights of two layers are coupled: root mean square of $F_{kl} / \\sqrt{F_{kk} F_{ll}}$ over all pairs of weights (without a weight with itself). Coupling between layers is of the same order as within."
size = problem.F.diagonal().sqrt()
correlation = (problem.F / torch.outer(size, size)).square()
correlation -= correlation.diagonal().diag()
layers = [index.flatten() for index in problem.index.values()]
pairs = torch.tensor([[correlation[i][:, j].mean().sqrt() for j in layers] for i in layers])
between = pairs[~torch.eye(4, dtype=torch.bool)]
assert 0.4 < between.mean() / pairs.diagonal().mean() < 1
matrices({"layers 0, 2, 4, 6": pairs}, digits=2)

# %% [markdown]
# ## The whole curvature, from the layers
#
# A second level needs $F$ between layers. No additional pass through the network is necessary, because a backward pass
# sends the vector $v$ of datum $n$ through all layers. The gradient with respect to all weights consists of the
# gradients $G_{vn}^{(l)}$ of the layers $l$. So
# $F = \sum_{vn} \operatorname{vec}(G_{vn}) \operatorname{vec}(G_{vn})^\top$ holds for the whole network
# as it does for a block, and
#
# $$
# \begin{aligned}
# c_{vn} &= \sum_l \langle G_{vn}^{(l)}, X_l \rangle \\
# &= \sum_l \sum_s g_{vns}^{(l)\top} X_l\, a_{ns}^{(l)} , \\
# (F X)_l &= \sum_{v,n} c_{vn}\, G_{vn}^{(l)} .
# \end{aligned}
# \tag{22.2}
# $$
#
# The layers exchange only the sum over $l$: one number per vector and datum. With a separate
# $c_{vn}^{(l)}$ for each layer, the result is the block-diagonal product.

# %% tags=["beside", "remove-input"]
code(LayerIO.inner_products, joint_curvature)

# %% [markdown]
# By hand, for every fiftieth datum, and the product against the exact matrix:

# %%
X = problem.split(torch.randn(len(problem.F)))
V = len(problem.ios["0"].g)
c = torch.zeros(V, 300)
for name, io in problem.ios.items():
    for v in range(V):
        for n in range(0, 300, 50):
            c[v, n] += io.g[v, n, 0] @ X[name] @ io.a[n, 0]
in_one_go = sum(io.inner_products(X[name]) for name, io in problem.ios.items())
assert_exact(in_one_go[:, ::50], c[:, ::50])
assert_exact(problem.joined(problem.product(X)), problem.F @ problem.joined(X))

# %% [markdown]
# ## The coarse level
#
# Choose a few directions, the columns of $Z \in \mathbb{R}^{D \times m}$. The span of these directions is called the
# coarse space. The code of the first paper has one direction per layer: all ones in this layer, zero elsewhere, so
# $m = L$. In domain decomposition, this is the coarse space of Nicolaides. Among all steps $Z y$, the quadratic model
# is lowest at
#
# $$
# \begin{aligned}
# y &= E^{-1} Z^\top r , \quad E = Z^\top F_\delta Z , \\
# Z y &= Q r , \quad Q = Z E^{-1} Z^\top ,
# \end{aligned}
# \tag{22.3}
# $$
#
# since $q(Zy) = \tfrac12 y^\top E y - (Z^\top r)^\top y$. The matrix $E$ is $m$ by $m$. With directions
# $z_k$ that each lie in one layer $l(k)$, [(22.2)] gives it from the layers' inputs and vectors,
#
# $$
# \begin{aligned}
# E &= \Phi \Phi^\top + \delta\, Z^\top Z , \\
# \Phi_{k, vn} &= \langle G_{vn}^{(l(k))}, z_k \rangle .
# \end{aligned}
# \tag{22.4}
# $$
#
# For directions of ones and one position, $\Phi_{l, vn}$ is the sum of the entries of a gradient, which is the sum of
# the entries of $a$ times the sum of those of $g$. The matrix $Z^\top Z$ is diagonal with the number of weights of each
# layer.

# %% tags=["beside", "remove-input"]
code(coarse_matrix, coarse_inverse)

# %% [markdown]
# With dense matrices, the coarse level is three lines. The package has to give the same:

# %%
Z = torch.zeros(len(problem.F), 4)
for k, index in enumerate(problem.index.values()):
    Z[index, k] = 1  # ones in layer k
E = Z.T @ problem.F @ Z
Q_dense = Z @ torch.linalg.inv(E) @ Z.T

ones = nicolaides_space(problem.maps, problem.split(r))
assert_exact(coarse_matrix(problem.ios, ones, problem.delta), E)
Q = coarse_inverse(problem.ios, ones, problem.delta)
assert_exact(problem.joined(Q(problem.split(r))), Q_dense @ r)

# %% tags=["hide-input"] fold="Checked: $E$ from sums of inputs and of vectors"
sums = torch.stack([io.g[:, :, 0].sum(2) * io.a[:, 0].sum(1) for io in problem.ios.values()])
weights = torch.tensor([float(index.numel()) for index in problem.index.values()])
assert_exact(E, sums.flatten(1) @ sums.flatten(1).T + problem.delta * weights.diag())
coupling = E / torch.outer(E.diagonal(), E.diagonal()).sqrt()
print("E, scaled to a diagonal of ones:")
print("\n".join(" ".join(f"{entry:6.2f}" for entry in row) for row in coupling.tolist()))
assert coupling[3, :3].abs().max() < 1e-10 < coupling[0, 1].abs()

# %% [markdown]
# The last row is zero beside the diagonal. Ones in the last layer add the same number to all logits, and softmax
# does not depend on such a number: $\sum_o g_{vno} = 0$. So the direction of the last layer has no curvature, and it
# is coupled to no other.
#
# ## Four ways to use both
#
# How should the fine level $M^{-1}$ and the coarse level $Q$ be combined? The first paper adds the two steps,
# $M^{-1} r + Q r$. But the fine step may already contain what the coarse step adds, and then the sum contains it
# twice. The classical way is to apply the second level to the residual of the first one, the part of the
# gradient that the first step has not used up. There are three such forms, with names from the literature on linear
# solvers:
#
# $$
# \begin{aligned}
# \text{additive:} &\quad x + Q r , \quad x = M^{-1} r \\
# \text{ADEF1:} &\quad y = Q r + M^{-1} (r - F_\delta Q r) \\
# \text{ADEF2:} &\quad x + Q (r - F_\delta x) \\
# \text{BNN:} &\quad y + Q (r - F_\delta y)
# \end{aligned}
# \tag{22.5}
# $$
#
# ADEF1 takes the coarse step first, ADEF2 the fine step, and BNN takes a coarse, a fine and again a coarse step.

# %% tags=["beside", "remove-input"]
code(additive, adef1, adef2, bnn)

# %% [markdown]
# As matrices, with $M^{-1}$ and $Q$ written out:


# %%
def four_forms(M_inverse: Tensor, F: Tensor, Q: Tensor) -> dict[str, Tensor]:
    eye = eye_like(F)
    return {
        "additive": M_inverse + Q,
        "ADEF1": Q + M_inverse @ (eye - F @ Q),
        "ADEF2": M_inverse + Q @ (eye - F @ M_inverse),
        "BNN": Q + (eye - Q @ F) @ M_inverse @ (eye - F @ Q),
    }


M_inverse = torch.zeros_like(problem.F)
for name, index in problem.index.items():
    M_inverse[index.flatten()[:, None], index.flatten()] = problem.maps[name].dense()
P = four_forms(M_inverse, problem.F, Q_dense)
forms = {"additive": additive, "ADEF1": adef1, "ADEF2": adef2, "BNN": bnn}
for name, combine in forms.items():
    step = combine(problem.fine, problem.product, Q)
    assert_exact(problem.joined(step(problem.split(r))), P[name] @ r)
for name in ("additive", "ADEF2"):  # the steps of Figure 22.1
    assert_exact(four_forms(eye_like(F2), F2, Q2)[name] @ r2, small[name])

# %% [markdown]
# ADEF2 has a guarantee that assumes nothing about the fine level. The fine level may be KFAC, EKFAC or an arbitrary
# map.
#
# <div class="admonition theorem" markdown="1" id="thm-22.1">
# <p class="admonition-title" markdown="1"><b>Theorem 22.1 (ADEF2 is never worse)</b></p>
#
# Let $p_* = F_\delta^{-1} r$ and $\lVert v \rVert_{F_\delta}^2 = v^\top F_\delta v$. Let $e = p_* - x$ be the error
# of the fine step and $\Pi = Q F_\delta$. The error of ADEF2 is $(I - \Pi) e$, and
#
# $$
# \lVert (I - \Pi) e \rVert_{F_\delta}^2 = \lVert e \rVert_{F_\delta}^2 - \lVert \Pi e \rVert_{F_\delta}^2 .
# \tag{22.6}
# $$
#
# The quadratic model at ADEF2's step is never higher than at the fine step. If a coarse space contains another one, its
# step is never worse than that of the other.
#
# </div>
#
# **Proof.** $r = F_\delta p_*$, so ADEF2's step is $x + Q F_\delta (p_* - x) = x + \Pi e$. From
# $Q F_\delta Q = Z E^{-1} E E^{-1} Z^\top = Q$ follows $\Pi^2 = \Pi$, and
# $u^\top F_\delta \Pi v = u^\top F_\delta Q F_\delta v$ is symmetric in $u$ and $v$. So $\Pi$ is the
# projection onto the span of $Z$ that is orthogonal in the inner product of $F_\delta$, and [(22.6)] is
# the theorem of Pythagoras. The quadratic model is
# $q(p) = \tfrac12 \lVert p - p_* \rVert_{F_\delta}^2 - \tfrac12 r^\top p_*$. A projection
# onto a larger span removes at least as much. $\blacksquare$
#
# The other forms have no such guarantee. For 500 random gradients we count how often each form has a larger error than
# KFAC's step:


# %% tags=["hide-input"] fold="Counted: random gradients for which a form is worse than KFAC"
gradients = torch.randn(len(problem.F), 500)
exact = torch.linalg.solve(problem.F, gradients)


def squared_error(steps: Tensor) -> Tensor:
    return ((steps - exact) * (problem.F @ (steps - exact))).sum(0)


worse = {
    name: int((squared_error(steps @ gradients) > squared_error(M_inverse @ gradients)).sum())
    for name, steps in P.items()
}
print("worse than KFAC, of 500:", ", ".join(f"{name} {count}" for name, count in worse.items()))
assert worse["ADEF2"] == 0
assert worse["additive"] > 250
assert worse["BNN"] > 0

# %% [markdown]
# ### What each form solves exactly
#
# Without any direction ($Z$ empty), all four forms are the fine step $x$. In other cases they differ:
#
# | | additive | ADEF1 | ADEF2 | BNN |
# | --- | --- | --- | --- | --- |
# | exact if $Z = I$ | no | yes | yes | yes |
# | exact if $r = F_\delta Z y$ | no | yes | no | yes |
# | $Z^\top (r - F_\delta p) = 0$ | no | no | yes | yes |
# | exact if $M = F_\delta$ | no | yes | yes | yes |
# | symmetric | yes | no | no | yes |
#
# The second and the third row differ by the order of the steps. ADEF1 and BNN start with the coarse step. If the exact
# step lies in the coarse space, the coarse step finds it, and the residual for the fine step is zero. ADEF2 and BNN end
# with the coarse step. So the residual of their result is orthogonal to the coarse space. BNN has both properties, and
# costs a second product with $F$.

# %% tags=["hide-input"] fold="Checked: every row of the table"
inside = problem.F @ Z @ torch.randn(4)
answer = torch.linalg.solve(problem.F, inside)
nothing = {n: torch.zeros(0, *i.shape) for n, i in problem.index.items()}
everything = {n: torch.eye(i.numel()).unflatten(1, i.shape) for n, i in problem.index.items()}
p_star = torch.linalg.solve(problem.F, r)
with_exact_fine = four_forms(torch.linalg.inv(problem.F), problem.F, Q_dense)
for name, combine in forms.items():
    starts, ends = name in ("ADEF1", "BNN"), name in ("ADEF2", "BNN")
    assert_exact(problem.step(r, combine, lambda maps, r: nothing), x)
    full = problem.step(r, combine, lambda maps, r: everything)
    assert_exact(full, p_star + x if name == "additive" else p_star)
    in_reach = relative_error(P[name] @ inside, answer)
    assert (in_reach < 1e-9) == starts
    left = Z.T @ (r - problem.F @ P[name] @ r)
    assert (left.abs().max() < 1e-9 * (Z.T @ r).abs().max()) == ends
    assert (relative_error(with_exact_fine[name] @ r, p_star) < 1e-9) == (name != "additive")
    symmetric = relative_error(P[name].T, P[name]) < 1e-9
    assert symmetric == (name in ("additive", "BNN"))
    print(f"{name:9} all directions: off by {relative_error(full, p_star):.0e},", end=" ")
    print(f"in the coarse space: {in_reach:.0e}")
assert_exact(P["ADEF1"], P["ADEF2"].T)

# %% [markdown]
# ## Which directions?
#
# Is a vector of ones a good direction? For diffusion on a grid it is: the errors that fine levels reduce slowly are
# smooth, and a constant on every subdomain represents them. The weights of a network have no such order. Flip the signs
# of all weights into and out of a tanh neuron. The network computes the same function, but in its new weights the
# direction of ones is another one. The package has four coarse spaces. Each is a function of the fine level and the
# gradient:

# %% tags=["beside", "remove-input"]
code(nicolaides_space, residual_space, spectral_space, krylov_space)

# %% [markdown]
# The `residual_space` takes from each layer its own fine step, $z_l = M_l^{-1} r_l$. Its effect can be stated in full:
#
# <div class="admonition theorem" markdown="1" id="thm-22.2">
# <p class="admonition-title" markdown="1"><b>Theorem 22.2 (one length per layer)</b></p>
#
# If the fine step $x$ lies in the span of $Z$, ADEF2's step is the minimum of the quadratic model over that
# span, whatever $x$ is. With the residual space it is $\sum_l \alpha_l z_l$ with the lengths
# $\alpha_l$, one for each layer, that are best together. It is at least as good as KFAC with the best
# common length.
#
# </div>
#
# **Proof.** $x = \Pi x$, so $x + \Pi (p_* - x) = \Pi p_* = Q r$, which is [(22.3)]. The common length is
# the special case of equal $\alpha_l$. $\blacksquare$
#
# [Theorem 22.1] is another statement, about steps *as they are*. If $x$ does not lie in the span and both steps
# are given their best length, ADEF2's may be the worse one. The coarse step repairs the length of $x$ in a few
# directions only, and so it also turns the step.

# %%
step = problem.step(r, adef2, residual_space)
span = torch.zeros(len(problem.F), 4)
for k, (name, index) in enumerate(problem.index.items()):
    span[index, k] = problem.fine(problem.split(r))[name]
lengths = torch.linalg.solve(span.T @ problem.F @ span, span.T @ r)
assert_exact(step, span @ lengths)
common = (r @ x) / (x @ problem.F @ x)
print("best lengths per layer:", *(f"{t:.2f}" for t in lengths.tolist()), end=";  ")
print(f"common: {common:.2f}")
unit, scaled = problem.reached(step, r)
assert abs(unit - scaled) < 1e-9  # its best length is 1
assert scaled >= problem.reached(x, r)[1]

# %% [markdown]
# ## Does it help?
#
# Both papers train other networks. The code of the first one has networks for CIFAR-10 and
# CIFAR-100, and linear and non-linear MLPs on Gaussian data ([README](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/README.md)). The code of the second one
# stores results of, among others, FACES, CURVES and MNIST, a cuda-convnet, ResNet-18 and ResNet-34
# ([folder](https://github.com/Abdoulaye-Koroko/natural-gradients/tree/97105b613b54915b83c627e8aa5ca6e45edc2c2d/apps/mlp_cnn/results_ref/twolevel_kfac)).
# This chapter has no network of that size. With a small one we can compare with the exact step. The methods are
#
# - KFAC and exact blocks, as above;
# - the additive form with ones, and ADEF2 with ones, with the flattest direction of each layer, with the fine steps,
#   and with the fine steps and another application of KFAC to each of them ("twice");
# - conjugate gradients, preconditioned by KFAC. They use products with $F$, too. One step of them is
#   KFAC with the best length, and two steps take one product more.


# %% tags=["hide-input"] fold="Measured: steps of eight methods on four networks"
def conjugate_gradients(product, fine, r: Layers, steps: int) -> Layers:
    """Preconditioned conjugate gradients for `F x = r` from zero, on dictionaries of layers."""

    def dot(a: Layers, b: Layers) -> Tensor:
        return sum((a[name] * b[name]).sum() for name in a)

    def add(a: Layers, b: Layers, factor: Tensor) -> Layers:
        return {name: a[name] + factor * b[name] for name in a}

    x, left = {name: torch.zeros_like(v) for name, v in r.items()}, r
    p = z = fine(left)
    for _ in range(steps):
        Fp, before = product(p), dot(left, z)
        length = before / dot(p, Fp)
        x, left = add(x, p, length), add(left, Fp, -length)
        z = fine(left)
        p = add(z, p, dot(left, z) / before)
    return x


two_levels = {
    "additive, ones (the paper)": (additive, nicolaides_space),
    "ADEF2, ones": (adef2, nicolaides_space),
    "ADEF2, flattest": (adef2, spectral_space),
    "ADEF2, fine steps": (adef2, residual_space),
    "ADEF2, fine steps, twice": (adef2, krylov_space(residual_space)),
}
shares: dict[str, list[tuple[float, float]]] = {}
for seed in range(4):
    one = Problem(seed)
    r = one.gradient()
    steps = {"KFAC": one.joined(one.fine(one.split(r))), "exact blocks": by_exact_blocks(one, r)}
    steps |= {name: one.step(r, *choice) for name, choice in two_levels.items()}
    cg = conjugate_gradients(one.product, one.fine, one.split(r), steps=2)
    steps["two steps of CG with KFAC"] = one.joined(cg)
    for name, p in steps.items():
        shares.setdefault(name, []).append(one.reached(p, r))
measured = {name: torch.tensor(rows, device="cpu") for name, rows in shares.items()}

# %% tags=["hide-input"] fold="Checked: the order of the methods"
K, nearest = measured["KFAC"], measured["ADEF2, fine steps, twice"]
assert (measured["ADEF2, ones"][:, 0] >= K[:, 0]).all()  # Theorem 22.1
assert (measured["ADEF2, fine steps"][:, 1] >= K[:, 1]).all()  # Theorem 22.2
assert (nearest[:, 1] >= measured["ADEF2, fine steps"][:, 1]).all()
assert (measured["additive, ones (the paper)"][:, 1] - K[:, 1]).abs().max() < 0.1
assert measured["exact blocks"][:, 1].mean() > nearest[:, 1].mean() + 0.1
assert measured["two steps of CG with KFAC"][:, 1].mean() > nearest[:, 1].mean() + 0.05
table(
    ["share of the possible decrease", "as it is", "best length"],
    [
        [name]
        + [f"{mean:.2f} ± {std:.2f}" for mean, std in zip(rows.mean(0), rows.std(0), strict=True)]
        for name, rows in measured.items()
    ],
)

# %% tags=["hide-input"] alt="Horizontal dot plot of the share of the possible decrease with the best length, for eight methods and four seeds each. KFAC, the additive form, ADEF2 with ones and with the flattest directions lie around 0.45. ADEF2 with fine steps is slightly higher, near 0.5, and with fine steps twice near 0.55. Exact blocks and two steps of conjugate gradients lie near 0.7." caption="The shares with the best length, four seeds. A second level (squares) moves KFAC's shares little. Exact blocks, or one more product with the curvature (triangles), move them more."
fig, ax = plt.subplots(figsize=(7.6, 3.4), layout="constrained")
for k, (name, rows) in enumerate(measured.items()):
    if name == "KFAC":
        look = style("KFAC")
    else:
        color, marker = ("C1", "s") if name in two_levels else ("C2", "^")
        look = {"color": color, "marker": marker}
    ax.plot(rows[:, 1], [k] * len(rows), linestyle="none", alpha=0.6, **look)
ax.set_yticks(range(len(measured)), list(measured))
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="share of the possible decrease, with the best length")
plt.show()

# %% [markdown]
# With the best length, the additive form and ADEF2 with ones reach about as much as KFAC. ADEF2 with ones keeps the
# promise of [Theorem 22.1] for steps as they are: its steps are less bad than KFAC's. But they are still far too long,
# and a common length repairs this at once. One length per layer is a little better than a common length. A second
# application of KFAC doubles the coarse space and adds a little more. Even then the gain is smaller than that of exact
# blocks *without* any coupling, or of a second step of conjugate gradients.
#
# So the coupling between layers is strong ([Figure 22.2]), and it makes the steps too long. But four or eight
# numbers do not describe it, because many directions take part in it.
#
# ### Ten steps on one batch
#
# Each method now minimises the loss of one fixed batch, with the best length of every step and an adaptive damping:


# %% tags=["hide-input"] fold="A loop with the best length for every step"
def minimise(seed: int, choice: tuple | None, steps: int = 11) -> list[float]:
    torch.manual_seed(seed)
    batch = torch.randperm(len(targets))[:200]
    X, y, delta, losses = images[batch], targets[batch], 0.01, []
    model = network()
    index, w = block_index(model), torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for _ in range(steps):
        before = loss(model(X), y)
        losses.append(before.item())
        g = torch.autograd.grad(before, list(model.parameters()))
        r = {name: torch.cat([v.flatten() for v in g])[i] for name, i in index.items()}
        ios = layer_ios(model, loss, X, y)
        maps, F = {n: kfac(io).inverse(delta) for n, io in ios.items()}, joint_curvature(ios, delta)

        def fine(r: Layers, maps: dict = maps) -> Layers:
            return {name: maps[name] @ v for name, v in r.items()}

        p = fine(r)
        if choice == ("CG",):
            p = conjugate_gradients(F, fine, r, steps=2)
        elif choice is not None:
            p = choice[0](fine, F, coarse_inverse(ios, choice[1](maps, r), delta))(r)
        slope = sum((r[n] * p[n]).sum() for n in p).item()
        length = slope / sum((p[n] * Fp).sum() for n, Fp in F(p).items()).item()
        moved = w.clone()
        for name, i in index.items():
            moved[i] -= length * p[name]
        torch.nn.utils.vector_to_parameters(moved, model.parameters())
        after = loss(model(X), y).item()
        ratio = reduction_ratio(before.item(), after, -0.5 * length * slope)
        w = moved if after <= before else w  # a step that failed is taken back
        torch.nn.utils.vector_to_parameters(w.clone(), model.parameters())
        delta = levenberg_marquardt(delta, ratio, factor=0.7)
    return losses


# %% tags=["hide-input"] fold="Measured: five methods, nine seeds"
contestants = {
    "KFAC": None,
    "additive, ones": (additive, nicolaides_space),
    "ADEF2, ones": (adef2, nicolaides_space),
    "ADEF2, fine steps, twice": (adef2, krylov_space(residual_space)),
    "two steps of CG": ("CG",),
}
final = {
    name: torch.tensor([minimise(seed, choice)[-1] for seed in range(9)], device="cpu").log()
    for name, choice in contestants.items()
}
apart = {}  # from KFAC, in standard errors of the mean of the differences
for name, ends in final.items():
    difference = ends - final["KFAC"]
    apart[name] = 0.0 if name == "KFAC" else (3 * difference.mean() / difference.std()).item()
assert (final["ADEF2, ones"] > final["KFAC"]).all()
assert apart["ADEF2, ones"] > 3
assert max(abs(a) for name, a in apart.items() if name != "ADEF2, ones") < 2
table(
    ["loss after 10 steps", "geometric mean", "smallest to largest", "below KFAC"],
    [
        [name, f"{ends.mean().exp():.2f}", f"{ends.min().exp():.2f} to {ends.max().exp():.2f}"]
        + ["" if name == "KFAC" else f"{int((ends < final['KFAC']).sum())} of 9"]
        for name, ends in final.items()
    ],
)

# %% tags=["hide-input"] alt="Horizontal dot plot of the loss after ten steps on a logarithmic axis, for five methods with nine seeds each. The dots of KFAC, of the additive form, of ADEF2 with fine steps twice and of conjugate gradients spread over the same range. Those of ADEF2 with ones lie to the right of it." caption="The loss after ten steps for nine seeds (dots) and its geometric mean (bars). Only ADEF2 with ones differs from KFAC by more than the seeds do."
fig, ax = plt.subplots(figsize=(7.6, 2.6), layout="constrained")
for k, (name, ends) in enumerate(final.items()):
    look = {"color": "C2" if "CG" in name else "C1", "marker": "^" if "CG" in name else "s"}
    look = style("KFAC") if name == "KFAC" else look
    ax.semilogx(ends.exp(), [k] * len(ends), linestyle="none", alpha=0.6, **look)
    ax.vlines(ends.mean().exp(), k - 0.35, k + 0.35, color=look["color"], linewidth=3)
ax.set_yticks(range(len(final)), list(final))
ax.invert_yaxis()
ax.set_xticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
ax.minorticks_off()
ax.set(xlabel="training loss after ten steps")
plt.show()

# %% [markdown]
# ADEF2 with ones ends above KFAC for every seed. This does not contradict [Theorem 22.1], which is about steps as they
# are: here every step gets its best length, as in the second column of the table before. The mean difference of each
# other method from KFAC is smaller than two standard errors. So nine seeds show no gain of a second level, and none of
# conjugate gradients.
#
# The networks here are small and the batch is fixed. The two papers have other conditions: deeper networks, small
# batches, averages, a fixed rule for the length. At the size of this chapter, ones gain nothing, and the fine steps
# gain a little in a single step. In general, a second level should be compared with the other uses of a product with
# $F$. The outcome also depends on the task. [Chapter 23](23_comparison.py) has an autoencoder with nearly exact blocks,
# so that only coupling is missing. There one length per layer gains more than exact blocks would, and ones again gain
# nothing.
#
# ## In training
#
# `two_level` is the counterpart of `preconditioner` ([Chapter 9](09_damping.py)): gradients of
# parameters in, a step out. It takes the inputs and vectors of the layers on a batch, in addition to the inverses.

# %%
parameters = dict(problem.model.named_parameters())
value = loss(problem.model(problem.X), problem.y)
g = dict(zip(parameters, torch.autograd.grad(value, list(parameters.values())), strict=True))
step = two_level(problem.model, problem.ios, problem.maps, problem.delta)(g)
flat = torch.cat([step[name].flatten() for name in parameters])
assert_exact(flat, problem.step(problem.gradient(), adef2, nicolaides_space))
one_level = preconditioner(problem.model, problem.maps)(g)
assert step.keys() == one_level.keys()

# %% [markdown]
# In the optimizer of [Chapter 11](11_averages.py) the second level is a step control, `coarse_correction`. It captures
# the batch of the step once more, with vectors of its own. The additive form and ADEF2 start from the fine step, which
# the optimizer has already. The other two apply the inverses once more. The control belongs in front of whatever
# changes the length.
#
# A step of ADEF2 is nearer to the exact one in the norm of $F_\delta$, but it may *ascend*:
# nothing makes $r^\top p$ positive, and the same holds for ADEF1. The additive form and BNN are positive definite. The
# default is the additive form, because of the measurement in the next section.

# %% tags=["remove-input"]
code(coarse_correction, _corrected)

# %% tags=["hide-input"] fold="Checked: the optimizer takes the step of two_level"
settings = {"lr": 1.0, "momentum": 0.0, "damping": problem.delta, "fisher": type2}
settings |= {"invert": exact_inverse}
optimizer = KFAC(
    problem.model, loss, controls=[coarse_correction(type2, combine=adef2)], **settings
)
before = {name: p.detach().clone() for name, p in parameters.items()}
optimizer.zero_grad()
loss(problem.model(problem.X), problem.y).backward()
optimizer.observe(problem.X, problem.y)
optimizer.step()
taken = torch.cat([(before[name] - p.detach()).flatten() for name, p in parameters.items()])

problem.model.load_state_dict(before)
ios = layer_ios(problem.model, loss, problem.X, problem.y)
fine = {name: kfac(io).inverse(problem.delta) for name, io in ios.items()}
expected = two_level(problem.model, ios, fine, problem.delta)(g)
assert_exact(taken, torch.cat([expected[name].flatten() for name in parameters]))

# %% [markdown]
# ### Each form at three learning rates
#
# Batches of 100 images, KFAC's moving average, one drawn label for each image, and the same damping for all. Nothing
# changes the lengths but the learning rate, and every form gets the same three learning rates and three seeds. A
# control behind the coarse level counts how often a step points uphill on its own batch, $r^\top p \lt 0$.


# %% tags=["hide-input"] fold="Measured: four forms, three learning rates, three seeds"
def watch(uphill: list[bool]) -> Callable[[Step], Step]:
    """A control that changes nothing, and notes whether the step ascends."""

    def control(step: Step) -> Step:
        uphill.append(dot(step.direction, step.gradient) < 0)
        return step

    return control


def train(seed: int, choice: tuple | None, lr: float, *length) -> tuple[float, float]:
    """Loss on 1000 images after 25 steps, and the share of steps that point uphill."""
    torch.manual_seed(seed)
    model, uphill = network(), []
    coarse = [] if choice is None else [coarse_correction(monte_carlo(1), *choice)]
    optimizer = KFAC(
        *(model, loss),
        lr=lr,
        momentum=0.0,
        damping=1e-3,
        decay=0.9,
        invert=exact_inverse,
        controls=[*coarse, watch(uphill), *length],
        factor_every=1,
        inverse_every=1,
    )
    for _ in range(25):
        batch = torch.randint(1000, (100,))
        optimizer.zero_grad()
        loss(model(images[batch]), targets[batch]).backward()
        optimizer.observe(images[batch], targets[batch])
        optimizer.step()
    with torch.no_grad():
        return loss(model(images[:1000]), targets[:1000]).item(), sum(uphill) / 25


forms_in_training = {
    "no coarse level": None,
    "additive, ones": (nicolaides_space, additive),
    "ADEF2, ones": (nicolaides_space, adef2),
    "ADEF2, fine steps": (residual_space, adef2),
}
rates = (0.03, 0.1, 0.3)
ended = {}  # [rates, seeds, (loss, share uphill)]
for name, choice in forms_in_training.items():
    ended[name] = torch.tensor(
        [[train(seed, choice, lr) for seed in range(3)] for lr in rates], device="cpu"
    )

plain, summed, ones_after, fine_after = (runs[..., 0] for runs in ended.values())
assert max(plain[:2].max(), summed[:2].max()) < 0.6  # the additive form trains as KFAC does
assert ones_after.min() > 0.8  # ones after the fine step: at no rate
assert fine_after[0].min() > 2 * plain[0].max()  # fine steps: slow at KFAC's rate,
assert fine_after[2].max() < 0.5 < plain[2].min()  # and good at a larger one, where KFAC fails
assert max(runs[..., 1].mean() for runs in ended.values()) < 0.1  # seldom uphill
table(
    ["loss of three seeds", *(f"rate {lr}" for lr in rates), "uphill"],
    [
        [name]
        + [" ".join(f"{value:.2f}" for value in row) for row in runs[..., 0]]
        + [f"{runs[..., 1].mean():.0%}"]
        for name, runs in ended.items()
    ],
)

# %% [markdown]
# The additive form trains as KFAC does. ADEF2 with ones fails at each of the three rates. Steps uphill are not the
# reason, since there are hardly any. A likely reason is the learning rate $\eta$. The correction $Q (r - F_\delta x)$
# is the best one beside the fine step $x$. The optimizer takes $\eta$ times both, while beside $\eta x$ the correction
# $Q (r - \eta F_\delta x)$ would be the best.
#
# ADEF2 with the fine steps depends on the rate, because its lengths are already the best ones for the quadratic model,
# a fraction of KFAC's. At the rates that suit KFAC it is slow. At the largest rate it is about as good as KFAC at a
# smaller one, and KFAC fails there. So a comparison at one common rate can favour either of them. With its own rate for
# each of the two, there is no clear winner here, and ADEF2 costs a product with $F$ more.
#
# ### A graft per layer discards the second level
#
# The control `graft` ([Chapter 11](11_averages.py)) is the optimizer's default. It gives the step of *every layer* the
# length of Adam's step. But a second level changes the lengths of layers relative to each other. With the residual
# space it changes nothing else: by [Theorem 22.2], ADEF2's step in layer $l$ is $\alpha_l z_l$. The graft keeps only
# the sign of $\alpha_l$. A layer with a negative sign goes uphill with Adam's full length. A graft for the *whole
# network*, `per="network"`, keeps the ratios:


# %% tags=["hide-input"] fold="Checked: what both grafts keep"


def one_step(*controls) -> dict[str, Tensor]:
    """What one step of the optimizer does to the trained network, layer by layer."""
    problem.model.load_state_dict(before)
    optimizer = KFAC(problem.model, loss, controls=controls, **settings)
    optimizer.zero_grad()
    loss(problem.model(problem.X), problem.y).backward()
    optimizer.observe(problem.X, problem.y)
    optimizer.step()
    moved = [(before[name] - p.detach()).flatten() for name, p in parameters.items()]
    problem.model.load_state_dict(before)
    return problem.split(torch.cat(moved))


betas, with_fine_steps = (0.9, 0.99), coarse_correction(type2, residual_space, adef2)
raw, without = one_step(with_fine_steps), one_step()
grafted, alone = one_step(with_fine_steps, graft(betas)), one_step(graft(betas))
kept = one_step(with_fine_steps, graft(betas, per="network"))
common = kept["0"].norm() / raw["0"].norm()
for name in raw:
    sign = (raw[name] * without[name]).sum().sign()
    assert_exact(grafted[name], sign * alone[name])  # nothing of the coarse level but a sign
    assert_exact(kept[name], common * raw[name])  # everything but one common length

# %% tags=["hide-input"] fold="Measured: training with both grafts"
grafts = {}
for per in ("layer", "network"):
    for name in ("no coarse level", "ADEF2, fine steps"):
        controlled = [
            train(seed, forms_in_training[name], 0.03, graft(betas, per=per)) for seed in range(3)
        ]
        grafts[per, name] = torch.tensor([value for value, _ in controlled], device="cpu")
mean = {key: values.mean() for key, values in grafts.items()}
assert mean["network", "ADEF2, fine steps"] < mean["layer", "ADEF2, fine steps"]
assert mean["layer", "no coarse level"] < mean["layer", "ADEF2, fine steps"]
table(
    ["loss of three seeds", "graft per layer", "graft per network"],
    [
        [name, *(" ".join(f"{v:.2f}" for v in grafts[per, name]) for per in ("layer", "network"))]
        for name in ("no coarse level", "ADEF2, fine steps")
    ],
)

# %% [markdown]
# So a comparison of coarse levels behind a graft per layer says little about them. In
# [Chapter 23](23_comparison.py) the kind of graft is one of the settings that are searched.
#
# ### What it costs
#
# In every step, `coarse_correction` captures the batch once more: one forward pass, and one backward pass for each
# vector. For a layer with one position, a product with $F$ takes $2 N d_\text{out} (d_\text{in} + V)$ multiplications,
# and each direction takes half as many in $\Phi$. For comparison, the forward pass of the layer takes
# $N d_\text{out} d_\text{in}$.
# The additive form needs no product with $F$. With ones, its $\Phi$ could be computed from the sums of $a$ and of $g$
# at next to no cost. The package does not use this special case.


# %% tags=["hide-input"] fold="Counted: multiplications of a product and of the coarse matrix"
def multiplications(compute: Callable, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        compute(*arguments)
    return counter.get_total_flops() // 2


V, N = len(problem.ios["0"].g), len(problem.X)
in_phi = sum(N * i.shape[0] * (i.shape[1] + V) for i in problem.index.values())
of_product = multiplications(problem.product, problem.split(r))
of_matrix = multiplications(coarse_matrix, problem.ios, ones, problem.delta)
forward = sum(N * i.numel() for i in problem.index.values())
print(f"product with F {of_product:,}, coarse matrix of ones {of_matrix:,}, forward {forward:,}")
assert of_product == 2 * in_phi
assert of_matrix == in_phi + 4 * 4 * V * N + len(problem.F)  # the rest: products of directions

# %% [markdown]
# ## What goes wrong in practice
#
# **Damping with the identity.** $Z^\top (F + \delta I) Z = Z^\top F Z + \delta Z^\top Z$, and the entry of $Z^\top Z$
# for a direction of ones is the number of weights of its layer. The authors' code of the time of the paper adds $\delta
# I$ ([`gkfac.py`, line
# 190](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L190)),
# and so does its last version ([line
# 176](https://github.com/ntselepidis/KFAC-Pytorch/blob/2ff652ff0adef75ff16d37c80cbd4d147ba34cb5/optimizers/gkfac.py#L176)).
# The code of Koroko et al. adds $\delta n_l$ with the number of weights $n_l$ ([`twolevel_kfac.py`, line
# 1130](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/twolevel_kfac.py#L1130)).
# With $\delta I$ the damping of the coarse level is too small by the factor $n_l$, here more than a hundred. Then $Q
# F_\delta$ is no projection, and [Theorem 22.1] does not hold:

# %%
r = problem.gradient()
wrong = E + problem.delta * (torch.eye(4) - weights.diag())
x = problem.joined(problem.fine(problem.split(r)))
corrected = [x + Z @ torch.linalg.solve(e, Z.T @ (r - problem.F @ x)) for e in (E, wrong)]
right_share, wrong_share = (problem.reached(p, r)[0] for p in corrected)
print(f"weights per layer: {weights.int().tolist()}")
print(f"share {right_share:.2f}, with the wrong damping {wrong_share:.2f}")
assert right_share >= wrong_share
assert weights.min() > 100
for e, projects in ((E, True), (wrong, False)):
    PI = Z @ torch.linalg.solve(e, Z.T @ problem.F)
    assert (relative_error(PI @ PI, PI) < 1e-9) == projects

# %% [markdown]
# **Factors between layers.** The authors' code approximates $E_{kl}$ by
# $(\mathbf{1}^\top A_{kl} \mathbf{1}) (\mathbf{1}^\top B_{kl} \mathbf{1})$, where $A_{kl}$ and $B_{kl}$ are Kronecker
# factors between two layers, averaged over batches ([line 185](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L185)). The exact matrix [(22.4)] needs no
# factors and costs less, but it is the matrix of a single batch. Here the approximation changes it a little:

# %% tags=["hide-input"] fold="Measured: the error of factors between layers"
a = torch.stack([io.a[:, 0].sum(1) for io in problem.ios.values()])  # [L, N]
b = torch.stack([io.g[:, :, 0].sum(2) for io in problem.ios.values()])  # [L, V, N]
factored = (a @ a.T / 300) * torch.einsum("kvn,lvn->kl", b, b)
exact_E = coarse_matrix(problem.ios, ones, 0.0)
print(f"factored coarse matrix: off by {relative_error(factored, exact_E):.0%}")
assert relative_error(factored, exact_E) > 0.01

# %% [markdown]
# **The other triangle.** The authors' code computes the lower triangle of $E$ and fills the upper one by
# `E = E + E.T`, before it writes the diagonal ([lines 183 to 190](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L183-L190)).
# But `E` is kept from one inversion to the next ([line 180](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L180-L181)). At the
# second inversion its upper triangle is no longer empty, and the old entries are added once more, every time. The last
# version does the same with the two matrices whose entrywise product is $E$ ([line 174](https://github.com/ntselepidis/KFAC-Pytorch/blob/2ff652ff0adef75ff16d37c80cbd4d147ba34cb5/optimizers/gkfac.py#L174-L175)).
# The code clips the length of every step ([line 248](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L248)), inverts every 100 steps, and stops if
# a step points uphill ([line 247](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L247)). We do not know
# how the mistake affected the experiments of the paper. At the first inversion, $E$ is right.

# %%
truth, kept, history = torch.tensor([[1.0, 0.5], [0.5, 1.0]]), torch.zeros(2, 2), []
for _ in range(4):
    kept[1, 0] = truth[1, 0]
    kept = kept + kept.T  # right would be: the lower triangle only
    kept[0, 0], kept[1, 1] = 1.0, 1.0
    history.append(kept[0, 1].item())
print("off-diagonal entry, truth 0.5:", *history)
assert history == [0.5, 1.0, 1.5, 2.0]
assert torch.linalg.eigvalsh(kept).min() < 0  # soon the coarse matrix is indefinite

# %% [markdown]
# **Other vectors in every layer.** [(22.2)] needs the *same* vector $v$ of datum $n$ in all layers. Type-2 vectors are
# the same in all layers, and so are Monte Carlo vectors from one backward pass. If labels are drawn anew for each
# layer, every block is still right in expectation. But the coupling has a random sign and averages to zero:

# %% tags=["hide-input"] fold="Measured: the coupling with labels drawn once, and for each layer"
once = layer_ios(problem.model, loss, problem.X, problem.y, monte_carlo(100))
anew = {
    name: layer_ios(problem.model, loss, problem.X, problem.y, monte_carlo(100))[name]
    for name in problem.ios
}
for name, ios in (("labels drawn once", once), ("labels drawn for each layer", anew)):
    M = coarse_matrix(ios, ones, 0.0)[:3, :3]  # the last one has no curvature
    coupling = M / torch.outer(M.diagonal(), M.diagonal()).sqrt()
    print(f"{name:28} coupling of the first two layers {coupling[0, 1].item():5.2f}")
    assert (coupling[0, 1].abs() > 0.3) == (ios is once)

# %% [markdown]
# ## The paper and this package
#
# What is in [Tselepidis et al. (2020)](bibliography.md#two-level), as far as its abstract and its authors' code of the
# time tell, and what is here.
#
# | | the paper | here |
# | --- | --- | --- |
# | form | a coarse correction is added to the preconditioner; code: each level [with a weight](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/utils/get_args.py#L58-L59), both 1 | `additive`, without weights; also `adef1`, `adef2`, `bnn` |
# | coarse space | code: [one direction of ones for each layer](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L301) | `nicolaides_space`; spaces of the [second paper's code](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/twolevel_kfac.py#L602-L614), too: `residual_space`, `spectral_space`, `krylov_space` |
# | coarse matrix | the Fisher at a coarser scale; code: [Kronecker products of sums](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L185) over pairs of layers, averaged | the exact Galerkin matrix of the step's batch |
# | damping of the coarse level | code: [a multiple of the identity](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L190) | $\delta Z^\top Z$, which is that of $F + \delta I$ |
# | Fisher | the actual one, not the empirical; code: [labels drawn from the model](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/main.py#L92) | that of `coarse_correction(fisher)`, with the same vectors in all layers |
# | schedule | code: factors every [10 steps, inverses every 100](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/utils/get_args.py#L52-L54); decay [up to .95](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L318) | the optimizer's, [Chapter 11](11_averages.py); the coarse level in every step |
# | numbers | code: damping $10^{-3}$, [KL clipping $10^{-2}$](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/utils/get_args.py#L49-L50) | damping is the optimizer's; `kl_clip` is a control |
# | headline | a small set of experiments suggests better convergence; the second paper, [Koroko et al. (2023)](bibliography.md#two-level-koroko), finds no real gain with several coarse spaces | [Chapter 23](23_comparison.py) trains it beside its controls |
#
# ## In one minute
#
# - **What is missing.** Blocks leave out the coupling of layers. Its first effect is a step that is too long.
# - **Product.** The curvature of the whole network needs one number per vector and datum from all layers, [(22.2)].
# - **Second level.** In the span of a few directions the system of the whole network is solved exactly, [(22.3)].
# - **ADEF2** is never farther from the exact step than the fine step, in the norm of $F_\delta$ ([Theorem 22.1]). With
#   the fine steps as directions it finds the best length for each layer ([Theorem 22.2]). The other forms have no such
#   guarantee.
# - **Measured here.** Directions of ones gain nothing over KFAC with a good length. In a single step, one length per
#   layer gains a little, and exact blocks or a second step of conjugate gradients gain more. Over ten steps, none of
#   these gains exceeds the spread of the seeds.
# - **In training.** The additive form descends, ADEF2 may ascend. A learning rate shortens a step that already has its
#   best length. A graft per layer discards what the second level finds.
#
# ## Exercises
#
# **Exercise 22.1.** Let $F$ be block-diagonal and $M = F_\delta$. What do the four forms do?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $x$ is exact, so $r - F_\delta x = 0$, and ADEF2 adds nothing. For ADEF1, $M^{-1} F_\delta Q r = Q r$ cancels
# $Q r$. BNN is ADEF2 with ADEF1 for its fine level. The additive form adds $Q r$, and goes too far.
#
# </details>
#
# **Exercise 22.2.** Show that BNN may be nested either way: ADEF2 with ADEF1 as fine level, or
# ADEF1 with ADEF2 as fine level.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ADEF2 is $(I - Q F_\delta) M^{-1} + Q$, ADEF1 is $M^{-1} (I - F_\delta Q) + Q$. Insert one for $M^{-1}$ in the
# other, and use $(I - Q F_\delta) Q = 0$ and $Q (I - F_\delta Q) = 0$, which follow from $Q F_\delta Q = Q$. Both
# give $(I - Q F_\delta) M^{-1} (I - F_\delta Q) + Q$.
#
# </details>
#
# **Exercise 22.3.** In [(22.1)], take a single direction for the *whole* network,
# $z = x$. Which step does ADEF2 give? Why is it the exact step here, for every $c$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# It is the minimum along $x$, by the proof of [Theorem 22.2]: KFAC with the best length,
# $(r^\top x) / (x^\top F_\delta x)\, x = \frac{2}{2 + 2c}\, x$. It is exact since both layers are alike, so that
# $r$ is an eigenvector of $F_\delta$. With the gradient $(1, 0)^\top$ it is not exact.
#
# </details>
#
# **Exercise 22.4 (write it).** Write a function `lengths(ios, steps, gradient, damping)` that returns the best lengths
# $\alpha_l$ of [Theorem 22.2] for layers with one position, without a matrix of the size of $F$. All three dictionaries
# have the names of the layers as keys; `steps` and `gradient` have a matrix $[d_\text{out}, d_\text{in}]$ for each.
# Compare its values with the variable `lengths` above.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The directions are the steps, so that [(22.4)] gives $E$, and $\alpha = E^{-1} Z^\top r$.
#
# ```
# def solution(ios, steps, gradient, damping):
#     phi = torch.stack([
#         torch.einsum("vno,oi,ni->vn", io.g[:, :, 0], steps[name], io.a[:, 0]).flatten()
#         for name, io in ios.items()
#     ])
#     squares = torch.stack([steps[name].square().sum() for name in ios])
#     onto = torch.stack([(steps[name] * gradient[name]).sum() for name in ios])
#     return torch.linalg.solve(phi @ phi.T + damping * squares.diag(), onto)
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(ios: dict, steps: Layers, gradient: Layers, damping: float) -> Tensor:  # 22.4
    phi = torch.stack(
        [
            torch.einsum("vno,oi,ni->vn", io.g[:, :, 0], steps[name], io.a[:, 0]).flatten()
            for name, io in ios.items()
        ]
    )
    squares = torch.stack([steps[name].square().sum() for name in ios])
    onto = torch.stack([(steps[name] * gradient[name]).sum() for name in ios])
    return torch.linalg.solve(phi @ phi.T + damping * squares.diag(), onto)


of_layers = problem.split(r)
assert_exact(solution(problem.ios, problem.fine(of_layers), of_layers, problem.delta), lengths)

M = problem.F.clone()  # 22.1
mask = torch.zeros_like(M, dtype=torch.bool)
for i in layers:
    mask[i[:, None], i] = True
M = M.where(mask, 0.0)
Q_small = Z @ torch.linalg.solve(Z.T @ M @ Z, Z.T)
solve = torch.linalg.inv(M)
for name, form in four_forms(solve, M, Q_small).items():
    if name == "additive":
        assert relative_error(form @ r, solve @ r) > 1e-3
    else:
        assert_exact(form, solve)

nested = adef1(adef2(problem.fine, problem.product, Q), problem.product, Q)  # 22.2
assert_exact(problem.joined(nested(problem.split(r))), P["BNN"] @ r)

for c in (0.0, 0.5, 0.9):  # 22.3
    F, one = torch.tensor([[1.0, c], [c, 1.0]]), torch.ones(2)
    assert_exact((one @ one) / (one @ F @ one) * one, torch.linalg.solve(F, one))
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Tselepidis et al. (2020)](bibliography.md#two-level) bring the second level to KFAC;
# [Koroko et al. (2023)](bibliography.md#two-level-koroko) compare coarse spaces and find no real gain.
# [Tang et al. (2009)](bibliography.md#two-level-forms) compare the forms of [(22.5)] for linear systems,
# where their names come from. [Martens and Grosse (2015)](bibliography.md#kfac) choose the length of
# the step by the exact quadratic model ([Chapter 12](12_quadratic_model.py)), and keep the coupling of neighbouring
# layers in a block-tridiagonal inverse.
