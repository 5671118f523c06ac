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
# All methods so far cut the curvature of a network into one block per layer. In the language of linear
# solvers, this is block Jacobi, a method that is known to be good at what is local and bad at what is
# global. The usual cure is a second level: a very small system for the whole, solved exactly, beside
# the many local ones. This chapter builds the second level, proves what it can promise, and finds
# out how much of what is missing it brings back. Two papers have answered the last question.
# [Tselepidis et al. (2020)](bibliography.md#two-level), who brought the idea to KFAC, see improved convergence in a few
# experiments. [Koroko et al. (2023)](bibliography.md#two-level-koroko), who tried more coarse spaces, see no real gain.
# At the size of this chapter the gain is small.

# %%
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh
from torch.nn.functional import avg_pool2d

from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, set_up
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
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one


# %% [markdown]
# ## What the blocks leave out
#
# Let $r$ be the gradient of the whole network, $F$ its curvature and $F_\delta = F + \delta I$. The
# damped parabola $q(p) = \tfrac12 p^\top F_\delta\, p - r^\top p$ has its minimum at
# $F_\delta^{-1} r$. Blocks give $x = M^{-1} r$ instead, with a block-diagonal $M$. The smallest example
# has two layers with one weight each:
#
# $$
# F_\delta = \begin{pmatrix} 1 & c \\ c & 1 \end{pmatrix}, \qquad
# r = \begin{pmatrix} 1 \\ 1 \end{pmatrix}, \qquad
# F_\delta^{-1} r = \frac{1}{1 + c}\, r, \qquad x = r .
# \tag{22.1}
# $$
#
# Each layer alone would take a step of 1, and each is right to do so, if the other does nothing. Together
# they do the same thing twice, and with $c$ near 1 the step is too long by a factor of two. With
# $L$ layers that all can lower the loss in the same way, it is a factor of up to $L$. Real networks
# are like this. We train four layers on small digits, and collect everything that the rest of the
# chapter needs: the exact matrix, KFAC, and functions to go between vectors and layers.

# %%
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
        F = ggn(self.model, loss, self.X, self.y)
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


# %%
problem = Problem(seed=0)
r = problem.gradient()
x = problem.joined(problem.fine(problem.split(r)))


def by_exact_blocks(problem: Problem, r: Tensor) -> Tensor:
    exact = {name: Dense(io.block()).inverse(problem.delta) for name, io in problem.ios.items()}
    return problem.joined({name: exact[name] @ v for name, v in problem.split(r).items()})


for name, p in (("KFAC", x), ("exact blocks", by_exact_blocks(problem, r))):
    unit, scaled = problem.reached(p, r)
    print(f"{name:13} reaches {unit:6.2f} of the decrease, {scaled:.2f} with the best length")
    assert unit < 0 < scaled < 0.9

# %% [markdown]
# A step of length one does not lower the parabola at all, it raises it above its start. This is not only
# KFAC's doing, as the exact blocks raise it, too. It is [(22.1)] with four layers. A learning rate, a trust
# region or a line search repairs the length, so what counts is the second number. Of what KFAC
# misses there, one part comes from its model of each block. The rest is missing with exact blocks,
# too: that is what a second level could bring back.

# %% tags=["hide-input"] alt="Heat map of a matrix of 16 by 16 parts for four layers. Each part holds the mean magnitude of the correlation between weights of two layers. The parts off the diagonal blocks have about the same strength as those within a block." caption="How strongly weights of two layers are coupled: root mean square of $F_{kl} / \\sqrt{F_{kk} F_{ll}}$ over all pairs of weights (without a weight with itself). Coupling between layers is about as strong as within."
size = problem.F.diagonal().sqrt()
correlation = (problem.F / torch.outer(size, size)).square()
correlation -= correlation.diagonal().diag()
layers = [index.flatten() for index in problem.index.values()]
pairs = torch.tensor([[correlation[i][:, j].mean().sqrt() for j in layers] for i in layers])
between = pairs[~torch.eye(4, dtype=torch.bool)]
assert between.mean() > 0.4 * pairs.diagonal().mean()
matrices({"layers 0, 2, 4, 6": pairs}, digits=2)

# %% [markdown]
# ## The whole curvature, from the layers
#
# A second level has to know $F$ between layers. It does not need another pass through the network. The
# vector $v$ of datum $n$ is sent back through all layers at once, and its gradient with respect to
# all weights is the collection of the $G_{vn}^{(l)}$, one for each layer $l$. So
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
# The only thing that layers exchange is the sum over $l$: one number per vector and datum. Leave it out,
# with $c_{vn}^{(l)}$ for each layer by itself, and the result is the block-diagonal product.

# %% tags=["beside", "remove-input"]
code(LayerIO.inner_products, joint_curvature)

# %%
X = problem.split(torch.randn(len(problem.F)))
V = len(problem.ios["0"].g)
c = torch.zeros(V, 300)
for name, io in problem.ios.items():
    for v in range(V):
        for n in range(0, 300, 50):  # a few data, for the loop's sake
            c[v, n] += io.g[v, n, 0] @ X[name] @ io.a[n, 0]
in_one_go = sum(io.inner_products(X[name]) for name, io in problem.ios.items())
assert_exact(in_one_go[:, ::50], c[:, ::50])
assert_exact(problem.joined(problem.product(X)), problem.F @ problem.joined(X))

# %% [markdown]
# ## The coarse level
#
# Choose a few directions, the columns of $Z \in \mathbb{R}^{D \times m}$. The paper takes one per layer:
# all ones in this layer, zero elsewhere, so $m = L$. In domain decomposition, this is the coarse
# space of Nicolaides. Among all steps $Z y$, the parabola is lowest at
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
# For the ones of Nicolaides, $\Phi_{l, vn}$ is the sum of the entries of a gradient, a sum over $a$ times
# a sum over $g$, and $Z^\top Z$ is diagonal with the number of weights of each layer.

# %% tags=["beside", "remove-input"]
code(coarse_matrix, coarse_inverse)

# %%
ones = nicolaides_space(problem.maps, problem.split(r))
Z = torch.zeros(len(problem.F), 4)
for k, index in enumerate(problem.index.values()):
    Z[index, k] = 1
E = coarse_matrix(problem.ios, ones, problem.delta)
assert_exact(E, Z.T @ problem.F @ Z)
sums = torch.stack([io.g[:, :, 0].sum(2) * io.a[:, 0].sum(1) for io in problem.ios.values()])
weights = torch.tensor([float(index.numel()) for index in problem.index.values()])
assert_exact(E, sums.flatten(1) @ sums.flatten(1).T + problem.delta * weights.diag())

Q = coarse_inverse(problem.ios, ones, problem.delta)
assert_exact(problem.joined(Q(problem.split(r))), Z @ torch.linalg.solve(E, Z.T @ r))
coupling = E / torch.outer(E.diagonal(), E.diagonal()).sqrt()
print("coarse matrix, scaled to a diagonal of ones:")
print("\n".join(" ".join(f"{entry:6.2f}" for entry in row) for row in coupling.tolist()))
assert coupling[3, :3].abs().max() < 1e-10 < coupling[0, 1].abs()

# %% [markdown]
# The last row is a surprise. A direction of ones in the last layer adds the same to all logits, and softmax
# does not see that: $\sum_o g_{vno} = 0$. The paper's direction for the last layer has no curvature and is
# coupled to nothing.
#
# ## Four ways to use both
#
# Fine level $M^{-1}$, coarse level $Q$: how are they combined? The paper adds the two steps,
# $M^{-1} r + Q r$. But if the fine step already does what the coarse one wants to do, the sum does it
# twice. The classical way is to do one after the other, with what is *left* of the gradient after the
# first one. There are three such forms, named as in the literature on linear solvers:
#
# $$
# \begin{aligned}
# \text{additive:} &\quad x + Q r , \quad x = M^{-1} r \\
# \text{ADEF1:} &\quad Q r + M^{-1} (r - F_\delta Q r) \\
# \text{ADEF2:} &\quad x + Q (r - F_\delta x) \\
# \text{BNN:} &\quad \text{coarse, fine, coarse}
# \end{aligned}
# \tag{22.5}
# $$

# %% tags=["beside", "remove-input"]
code(additive, adef1, adef2, bnn)

# %% [markdown]
# ADEF2 has a guarantee that needs nothing from the fine level, which may be KFAC, EKFAC, or nonsense.
#
# <div class="admonition theorem" markdown="1" id="thm-22.1">
# <p class="admonition-title" markdown="1"><b>Theorem 22.1 (ADEF2 is never worse)</b></p>
#
# Let $p_* = F_\delta^{-1} r$ and $\lVert v \rVert_F^2 = v^\top F_\delta v$. Let $e = p_* - x$ be the error
# of the fine step and $\Pi = Q F_\delta$. The error of ADEF2 is $(I - \Pi) e$, and
#
# $$
# \lVert (I - \Pi) e \rVert_F^2 = \lVert e \rVert_F^2 - \lVert \Pi e \rVert_F^2 .
# \tag{22.6}
# $$
#
# Its parabola is never higher than that of the fine step, and a larger coarse space is never worse than
# a part of it.
#
# </div>
#
# **Proof.** $r = F_\delta p_*$, so ADEF2's step is $x + Q F_\delta (p_* - x) = x + \Pi e$. From
# $Q F_\delta Q = Z E^{-1} E E^{-1} Z^\top = Q$ follows $\Pi^2 = \Pi$, and
# $u^\top F_\delta \Pi v = u^\top F_\delta Q F_\delta v$ is symmetric in $u$ and $v$. So $\Pi$ is the
# projection onto the span of $Z$ that is orthogonal in the inner product of $F_\delta$, and [(22.6)] is
# Pythagoras. The parabola is $q(p) = \tfrac12 \lVert p - p_* \rVert_F^2 - \tfrac12 r^\top p_*$. A projection
# onto a larger span removes at least as much. $\blacksquare$
#
# The other forms have no such guarantee. We draw 500 random gradients and count:


# %%
def matrix_of(problem: Problem, combine: Callable) -> Tensor:
    """A two-level map with the fixed coarse space of Nicolaides, as a matrix."""
    P = combine(problem.fine, problem.product, Q)
    columns = [problem.joined(P(problem.split(e))) for e in torch.eye(len(problem.F))]
    return torch.stack(columns, 1)


forms = {"additive": additive, "ADEF1": adef1, "ADEF2": adef2, "BNN": bnn}
P = {name: matrix_of(problem, combine) for name, combine in forms.items()}
gradients = torch.randn(len(problem.F), 500)
exact = torch.linalg.solve(problem.F, gradients)


def squared_error(steps: Tensor) -> Tensor:
    return ((steps - exact) * (problem.F @ (steps - exact))).sum(0)


fine = torch.block_diag(*(problem.maps[name].dense() for name in problem.index))
inverse_order = torch.cat([index.flatten() for index in problem.index.values()]).argsort()
M_inverse = fine[inverse_order][:, inverse_order]
worse = {
    name: int((squared_error(steps @ gradients) > squared_error(M_inverse @ gradients)).sum())
    for name, steps in P.items()
}
print("worse than KFAC, of 500:", worse)
assert worse["ADEF2"] == 0
assert worse["additive"] > 250
assert worse["BNN"] > 0

# %% [markdown]
# ### What each form solves exactly
#
# | | additive | ADEF1 | ADEF2 | BNN |
# | --- | --- | --- | --- | --- |
# | $Z$ empty | $M^{-1} r$ | $M^{-1} r$ | $M^{-1} r$ | $M^{-1} r$ |
# | $Z = I$, all directions | $M^{-1} r + p_*$ | $p_*$ | $p_*$ | $p_*$ |
# | $r = F_\delta Z y$ | not exact | $p_* = Z y$ | not exact | $p_* = Z y$ |
# | what is left, $Z^\top (r - F_\delta p)$ | not 0 | not 0 | 0 | 0 |
# | $M = F_\delta$ | not exact | exact | exact | exact |
# | symmetric | yes | no | no | yes |
#
# Two of the rows say what "after" means. Forms that *start* with the coarse step solve what lies in its
# reach, and leave nothing for the fine step to spoil. Forms that *end* with it leave nothing behind. BNN
# does both, for a second product with $F$.

# %%
inside = problem.F @ Z @ torch.randn(4)
answer = torch.linalg.solve(problem.F, inside)
everything = {n: torch.eye(i.numel()).unflatten(1, i.shape) for n, i in problem.index.items()}
p_star = torch.linalg.solve(problem.F, r)


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


for name, combine in forms.items():
    starts, ends = name in ("ADEF1", "BNN"), name in ("ADEF2", "BNN")
    full = problem.step(r, combine, lambda maps, r: everything)
    assert_exact(full, p_star + x if name == "additive" else p_star)
    assert (relative(P[name] @ inside, answer) < 1e-9) == starts
    left = Z.T @ (r - problem.F @ P[name] @ r)
    assert (left.abs().max() < 1e-9 * (Z.T @ r).abs().max()) == ends
    symmetric = relative(P[name].T, P[name]) < 1e-9
    assert symmetric == (name in ("additive", "BNN"))
    print(f"{name:9} all directions: off by {relative(full, p_star):.0e},", end=" ")
    print(f"in reach: {relative(P[name] @ inside, answer):.0e}")
assert_exact(P["ADEF1"], P["ADEF2"].T)

# %% [markdown]
# ## Which directions?
#
# Why should a vector of ones be a good direction? For a diffusion on a grid, the slow error is smooth, and
# a constant per domain catches it. Weights of a network have no such order. Flip the signs of all weights
# into and out of a tanh neuron, and the network computes the same, while ones become something else.
# Four answers, each a function of the fine level and the gradient:

# %% tags=["beside", "remove-input"]
code(nicolaides_space, residual_space, spectral_space, krylov_space)

# %% [markdown]
# The `residual_space` space takes from each layer its own fine step, $z_l = M_l^{-1} r_l$. This one we
# understand completely.
#
# <div class="admonition theorem" markdown="1" id="thm-22.2">
# <p class="admonition-title" markdown="1"><b>Theorem 22.2 (one length per layer)</b></p>
#
# If the fine step $x$ lies in the span of $Z$, ADEF2's step is the minimum of the parabola over that
# span, whatever $x$ is. With the residual space it is $\sum_l \alpha_l z_l$ with the best lengths
# $\alpha_l$, one for each layer, in view of all others. It is at least as good as KFAC with the best
# common length.
#
# </div>
#
# **Proof.** $x = \Pi x$, so $x + \Pi (p_* - x) = \Pi p_* = Q r$, which is [(22.3)]. The common length is
# the special case of equal $\alpha_l$. $\blacksquare$
#
# Without $x$ in the span, [Theorem 22.1] compares steps *as they are*. Give both the best length, and
# ADEF2 may be the worse one: the coarse step repairs the length of $x$ in the few directions it has, and
# by that turns it.

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
# The experiments of both papers are trainings of other networks. The first one's code has networks for CIFAR-10 and
# CIFAR-100, and linear and non-linear MLPs on Gaussian data ([README](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/README.md)). The second one's code
# stores results of, among others, FACES, CURVES and MNIST, a cuda-convnet, ResNet-18 and ResNet-34
# ([folder](https://github.com/Abdoulaye-Koroko/natural-gradients/tree/97105b613b54915b83c627e8aa5ca6e45edc2c2d/apps/mlp_cnn/results_ref/twolevel_kfac)).
# We have no such network here. At our size we can compare with the exact answer instead. The competitors:
#
# - KFAC and exact blocks, as above;
# - the paper's additive form with ones, and ADEF2 with ones, with the fine steps, and with the fine steps
#   enriched by another application of KFAC;
# - conjugate gradients, preconditioned by KFAC, for two steps. This is what else a product with $F$ can
#   be used for: one step of it is KFAC with the best length, two steps take one more product.


# %%
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

# %%
print(f"{'share of the possible decrease':34}as it is      with the best length")
for name, rows in measured.items():
    (unit, scaled), (du, ds) = rows.mean(0), rows.std(0)
    print(f"{name:28} {unit:8.2f} ± {du:.2f}     {scaled:8.2f} ± {ds:.2f}")
K, nearest = measured["KFAC"], measured["ADEF2, fine steps, twice"]
assert (measured["ADEF2, ones"][:, 0] >= K[:, 0]).all()  # Theorem 22.1
assert (measured["ADEF2, fine steps"][:, 1] >= K[:, 1]).all()  # Theorem 22.2
assert (nearest[:, 1] >= measured["ADEF2, fine steps"][:, 1]).all()
assert (measured["additive, ones (the paper)"][:, 1] - K[:, 1]).abs().max() < 0.1
assert measured["exact blocks"][:, 1].mean() > nearest[:, 1].mean() + 0.1
assert measured["two steps of CG with KFAC"][:, 1].mean() > nearest[:, 1].mean() + 0.05

# %% tags=["hide-input"] alt="Horizontal dot plot of the share of the possible decrease with the best length, for eight methods and four seeds each. KFAC, the additive form, ADEF2 with ones and with the flattest directions lie around 0.45. ADEF2 with fine steps is slightly higher, near 0.5, and with fine steps twice near 0.55. Exact blocks and two steps of conjugate gradients lie near 0.7." caption="What is reached with the best length, four seeds. The second level moves little. Better blocks, or one more product with the curvature, move more."
fig, ax = plt.subplots(figsize=(7.6, 3.4), layout="constrained")
for k, rows in enumerate(measured.values()):
    ax.plot(rows[:, 1], [k] * len(rows), "o", alpha=0.6, color=f"C{min(k, 2) if k < 7 else 3}")
ax.set_yticks(range(len(measured)), list(measured))
ax.invert_yaxis()
ax.set(xlim=(0, 1), xlabel="share of the possible decrease, with the best length")
plt.show()

# %% [markdown]
# In this network, the paper's form changes nothing that a learning rate would not hide. ADEF2 with ones keeps its promise,
# and shortens the step as it is, but from there to a useful step is a long way; a common length gets there at
# once. One length per layer is a little better than a common length. Doubling the space with a second
# application of KFAC adds a little more. Even then, less is gained than by exact blocks *without* any
# coupling, or by spending a product on a second step of conjugate gradients.
#
# So the coupling between layers is strong (the first figure), it is visible (the length), and still
# four or eight numbers do not catch it. It lives in many directions. Over a
# whole run of training, on one fixed batch, with the best length of every step and an adaptive damping:


# %%
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


contestants = {
    "KFAC": None,
    "additive, ones": (additive, nicolaides_space),
    "ADEF2, ones": (adef2, nicolaides_space),
    "ADEF2, fine steps, twice": (adef2, krylov_space(residual_space)),
    "two steps of CG": ("CG",),
}
curves = {
    name: torch.tensor([minimise(seed, choice) for seed in range(3)], device="cpu")
    for name, choice in contestants.items()
}
for name, runs in curves.items():
    print(f"{name:25} loss after 10 steps:", *(f"{run[-1]:7.4f}" for run in runs))
final = {name: runs[:, -1].log().mean() for name, runs in curves.items()}
assert final["additive, ones"] > final["KFAC"] - 0.7  # not even half of KFAC's loss
assert final["two steps of CG"] < final["additive, ones"] < final["ADEF2, ones"]
assert final["ADEF2, ones"] > final["KFAC"]

# %% tags=["hide-input"] alt="Training loss on a logarithmic axis against ten steps, for five methods with three seeds each. ADEF2 with ones is the highest, the additive form lies a little above KFAC, ADEF2 with fine steps twice and two steps of conjugate gradients lie below KFAC. Seeds of neighbouring methods overlap." caption="Three seeds each, thin, and their geometric mean. Ones do not help, and after the fine step they hurt; fine steps twice and conjugate gradients do help."
fig, ax = plt.subplots(figsize=(6.8, 3.8), layout="constrained")
for k, (name, runs) in enumerate(curves.items()):
    ax.semilogy(runs.T, color=f"C{k}", linewidth=0.8, alpha=0.35)
    ax.semilogy(runs.log().mean(0).exp(), color=f"C{k}", label=name)
ax.set(xlabel="step", ylabel="training loss")
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# That ADEF2 with ones is the worst of all does not contradict [Theorem 22.1]. The theorem is about steps as
# they are, and here every step gets its best length. Part of what ones repair is the length, and the
# rest turns the direction for the worse, as the table said before. The best two need more: as many
# products with directions as there are layers, twice, or a second product with $F$.
#
# Our nets are small, our batch is fixed, and a deeper network couples more layers. The conditions of the two papers
# are others: small batches, averages, a fixed rule for the length. What can be said is
# that at this size ones gain nothing, that fine steps twice gain a little, and that a
# second level should be measured against the other uses of a product with $F$. And this is a classifier.
# In [Chapter 23](23_comparison.py) there is an autoencoder whose blocks KFAC models almost exactly, so that
# coupling is all that is missing: there one length per layer recovers half of it, ones again nothing.
#
# ## In training
#
# `two_level` is the counterpart of `preconditioner` ([Chapter 9](09_damping.py)): gradients of
# parameters in, a step out. It takes the layers' inputs and vectors of a batch, besides the inverses.

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
# In the optimizer of [Chapter 11](11_averages.py) the second level is a step control: the additive form
# and ADEF2 start from the fine step, which the optimizer has already, and the other two apply the inverses once
# more. It looks at the batch of the step once more, with vectors of its own, and belongs in front of whatever
# changes the length. A step of ADEF2 is nearer to the exact one in the norm of $F_\delta$, but it may *ascend*:
# nothing makes $r^\top p$ positive, and the same holds for ADEF1. The additive form and BNN are positive definite. The
# default is the additive form. The next section shows why.

# %% tags=["remove-input"]
code(coarse_correction, _corrected)

# %%
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
# ### What training makes of each form
#
# Batches of 100 images, KFAC's moving average, one drawn label for each image, and the same damping for all. Nothing
# changes the lengths but the learning rate, and every form gets the same three learning rates and three seeds. A control
# behind the coarse level counts how often a step points uphill on its own batch, $r^\top p \lt 0$.


# %%
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
print(f"{'loss, three seeds':20}", "".join(f"learning rate {lr:<12}" for lr in rates), "uphill")
for name, runs in ended.items():
    cells = ["".join(f"{v:7.2f}" for v in row[:, 0].tolist()) for row in runs]
    print(f"{name:18}", "     ".join(cells), f"{runs[..., 1].mean():11.0%}")

plain, summed, ones_after, fine_after = (runs[..., 0] for runs in ended.values())
assert max(plain[:2].max(), summed[:2].max()) < 0.6  # the additive form trains as KFAC does
assert ones_after.min() > 0.8  # ones after the fine step: at no rate
assert fine_after[0].min() > 2 * plain[0].max()  # fine steps: slow at KFAC's rate,
assert fine_after[2].max() < 0.5 < plain[2].min()  # and good at a larger one, where KFAC fails
assert max(runs[..., 1].mean() for runs in ended.values()) < 0.1  # seldom uphill

# %% [markdown]
# The additive form trains as KFAC does. ADEF2 with ones fails at each of the three rates. Steps uphill are not the
# reason, since there are hardly any. Its coarse part is the right one beside a fine step of length one, as in
# [Theorem 22.1], and a learning rate shortens both.
#
# ADEF2 with the fine steps depends on the rate. Its lengths are the best ones for the parabola, a fraction of
# KFAC's. At the rates that suit KFAC it is slow. At the largest one it does as well as KFAC at its own rate, and KFAC
# fails there. So at one common rate either of them can win. Each at its own rate, there is no clear
# winner here, and ADEF2 costs a product with $F$ more.
#
# ### What a graft per layer leaves of it
#
# The control `graft` ([Chapter 11](11_averages.py)) is the optimizer's default. It gives the step of *every layer* the length
# of Adam's. But the second level is about the lengths of layers relative to each other. With the residual space it is
# about nothing else: ADEF2's step in layer $l$ is $\alpha_l z_l$. After the graft, only the sign of $\alpha_l$ is left, and
# where it is negative, a layer goes uphill with Adam's full length. A graft for the *whole network*, `per="network"`, keeps the ratios:


# %%
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

for length, per in (("per layer", "layer"), ("for the network", "network")):
    for name in ("no coarse level", "ADEF2, fine steps"):
        runs = [
            train(seed, forms_in_training[name], 0.03, graft(betas, per=per)) for seed in range(3)
        ]
        print(f"graft {length:16}{name:18}", *(f"{value:6.2f}" for value, _ in runs))
        ended[length, name] = sum(value for value, _ in runs) / 3
assert ended["for the network", "ADEF2, fine steps"] < ended["per layer", "ADEF2, fine steps"]
assert ended["per layer", "no coarse level"] < ended["per layer", "ADEF2, fine steps"]

# %% [markdown]
# So a comparison of coarse levels behind a graft per layer says little about them. In
# [Chapter 23](23_comparison.py) the kind of graft is one of the settings that are searched.
#
# The extra cost of a step is one product with $F$, [(22.2)], about that of a forward and a backward pass
# per vector, and half of that for each set of directions in $\Phi$. The additive form with ones needs
# no product. Its $\Phi$ consists of sums of $a$ and of $g$, and costs next to nothing.
#
# ## What goes wrong in practice
#
# **Damping with the identity.** $Z^\top (F + \delta I) Z = Z^\top F Z + \delta Z^\top Z$, and a direction of
# ones has as many entries as the layer has weights. The authors'
# code of the days of the paper adds $\delta I$ ([`gkfac.py`, line 190](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L190),
# and so does its last version, [line 176](https://github.com/ntselepidis/KFAC-Pytorch/blob/2ff652ff0adef75ff16d37c80cbd4d147ba34cb5/optimizers/gkfac.py#L176)). The code of Koroko et al. adds
# $\delta n_l$ ([`twolevel_kfac.py`, line 1130](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/twolevel_kfac.py#L1130)). With $\delta I$ the
# coarse level is damped by a number that is hundreds of times too small, and it is no projection any more:

# %%
r = problem.gradient()
wrong = E + problem.delta * (torch.eye(4) - weights.diag())
x = problem.joined(problem.fine(problem.split(r)))
corrected = [x + Z @ torch.linalg.solve(e, Z.T @ (r - problem.F @ x)) for e in (E, wrong)]
right_share, wrong_share = (problem.reached(p, r)[0] for p in corrected)
print(
    f"weights per layer: {weights.int().tolist()}; share {right_share:.2f}, wrong {wrong_share:.2f}"
)
assert right_share >= wrong_share

# %% [markdown]
# **Factors between layers.** The authors' code approximates $E_{kl}$ by
# $(\mathbf{1}^\top A_{kl} \mathbf{1}) (\mathbf{1}^\top B_{kl} \mathbf{1})$ with KFAC-like factors between two
# layers, which it averages over batches ([line 185](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L185)). The exact matrix [(22.4)] is
# cheaper, since it needs no factors; it is that of one batch:

# %%
a = torch.stack([io.a[:, 0].sum(1) for io in problem.ios.values()])  # [L, N]
b = torch.stack([io.g[:, :, 0].sum(2) for io in problem.ios.values()])  # [L, V, N]
factored = (a @ a.T / 300) * torch.einsum("kvn,lvn->kl", b, b)
exact_E = coarse_matrix(problem.ios, ones, 0.0)
print(f"factored coarse matrix: off by {relative(factored, exact_E):.0%}")
assert relative(factored, exact_E) > 0.01

# %% [markdown]
# **The other triangle.** The authors' code computes the lower triangle of $E$ and fills the upper one by
# `E = E + E.T`, before it writes the diagonal ([lines 183 to 190](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L183-L190)).
# But `E` is kept from one inversion to the next ([line 180](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L180-L181)), and at the
# second one its upper triangle is no longer empty. What was there is added once more, every time. The last version does
# the same with the two matrices whose entrywise product is $E$ ([line 174](https://github.com/ntselepidis/KFAC-Pytorch/blob/2ff652ff0adef75ff16d37c80cbd4d147ba34cb5/optimizers/gkfac.py#L174-L175)).
# The code clips the length of every step ([line 248](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L248)), inverts every 100 steps, and stops if
# a step points uphill ([line 247](https://github.com/ntselepidis/KFAC-Pytorch/blob/74b6c7d7a70c959fa35d1690cd86a6f920b5da7b/optimizers/gkfac.py#L247)). What the fault did to the experiments of the paper, we do
# not know. With the first inversion alone, $E$ is right.

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
# **Other vectors in every layer.** [(22.2)] needs the *same* vector $v$ of datum $n$ in all layers. Type-2
# vectors are, as are Monte Carlo vectors from one backward pass. Draw labels for each layer anew, and
# every block is still fine, but the coupling has a random sign and averages to zero:

# %%
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
# What is in [Tselepidis et al. (2020)](bibliography.md#two-level), as far as its abstract and its authors' code of those
# days tell, and what is here.
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
# **Exercise 22.3.** In [(22.1)], take the residual space of the *whole* network, the single direction
# $z = x$. Which step does ADEF2 give? And why is it the right one here, for every $c$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The minimum along $x$, by the proof of [Theorem 22.2]: KFAC with the best length,
# $(r^\top x) / (x^\top F_\delta x)\, x = \frac{2}{2 + 2c}\, x$. It is exact since both layers are alike, so that
# $r$ is an eigenvector of $F_\delta$. With a gradient $(1, 0)^\top$ it is not.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
M = problem.F.clone()  # 22.1
mask = torch.zeros_like(M, dtype=torch.bool)
for i in layers:
    mask[i[:, None], i] = True
M = M.where(mask, 0.0)
Q_small = Z @ torch.linalg.solve(Z.T @ M @ Z, Z.T)
solve = torch.linalg.inv(M)
assert_exact(solve + Q_small - Q_small @ M @ solve, solve)
assert_exact(solve + Q_small - solve @ M @ Q_small, solve)
assert relative(solve @ r + Q_small @ r, solve @ r) > 1e-3

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
# [Koroko et al. (2023)](bibliography.md#two-level-koroko) compare coarse spaces, and find little.
# [Tang et al. (2009)](bibliography.md#two-level-forms) compare the forms of [(22.5)] for linear systems,
# where their names come from. [Martens and Grosse (2015)](bibliography.md#kfac) address the length of
# the step with the exact parabola, and coupling of neighbouring layers with a block-tridiagonal inverse.
