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
# # 0. KFAC in 30 minutes: one idea, one file, one check
#
# **Part I: Start.** What is KFAC, what is it good for, and how do I write one that I can trust?
#
# The gradient of a loss says in which direction the loss falls, but not how long a step in this direction may be. The
# *curvature*, a matrix of second derivatives, says how fast the gradient changes. For a layer with a million weights
# this matrix has $10^{12}$ entries. KFAC, *Kronecker-factored approximate curvature*, replaces the matrix by two small
# ones. People use them to [train in fewer steps](13_in_practice.py), to put
# [error bars on a network's answers](29_laplace.py), to find the
# [training data behind an answer](30_influence.py), to [remove weights](31_pruning.py) and to
# [merge networks](32_merging.py).

# %% tags=["hide-input"] alt="Three heat maps of 24 by 24 entries, ruled into tiles of 6 by 6: the exact curvature of a layer; KFAC's approximation, in which all tiles are multiples of one pattern; and their difference, which is fainter but not zero." caption="The curvature of a small layer, KFAC's approximation $B \\otimes A$, and the difference. A tile belongs to a pair of the layer's outputs. In KFAC every tile is the same matrix $A$, times one entry of $B$."
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

import kfac_scratch
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.curvature import block_index, diagonal_blocks, ggn, hessian
from kfac_scratch.show import code, matrices, style

set_up(1)  # a seed, float64, the GPU where there is one
model, loss = Sequential(Linear(5, 4), Tanh(), Linear(4, 3)), CrossEntropyLoss()
X, y = torch.randn(100, 5).cumsum(1), torch.randint(3, (100,))  # correlated inputs
F = diagonal_blocks(model, ggn(model, loss, X, y))["0"]
K = kfac(layer_ios(model, loss, X, y)["0"]).dense()
titles = {"exact curvature $F$": F, r"KFAC, $B \otimes A$": K, "difference": F - K}
matrices(titles, blocks=dict.fromkeys(titles, (6, 6)))

# %% [markdown]
# KFAC makes one approximation for every layer by itself:
#
# $$
# F \;\approx\; B \otimes A,
# \qquad
# A = \frac1N \sum_n a_n a_n^\top,
# \qquad
# B = \sum_{n, c} g_{cn} g_{cn}^\top.
# \tag{0.1}
# $$
#
# - $F$ is the curvature of the loss with respect to the layer's weights $W$, with one row and column per weight: the
#   *Fisher matrix*, which takes the place of the second derivatives.
# - $N$ is the number of examples in the batch, and $n$ counts them.
# - $a_n$ is what the layer receives for example $n$, with a 1 at the end for the bias.
# - $g_{cn}$ is the gradient with respect to the layer's output of the loss that example $n$ would have with label $c$,
#   times $\sqrt{p_{cn} / N}$. Here $p_{cn}$ is the probability that the model gives to label $c$.
# - $\otimes$ is the Kronecker product: $B \otimes A$ is the matrix $B$ with every entry $B_{ij}$ replaced by the tile
#   $B_{ij} A$.
#
# **After this chapter** you can derive [(0.1)], write a KFAC optimizer in [80 lines](kfac_in_80_lines.py) of PyTorch,
# test it up to rounding, and say where it is not exact. You need the chain rule and a training loop in PyTorch.
#
# ## The derivation
#
# **What is $F$?** Let $p_{cn}$ be the probability that the model gives to label $c$ for example $n$, and $G_{cn}$
# the gradient of $-\log p_{cn}$, the cross-entropy at label $c$, with respect to $W$. The *Fisher matrix* of a
# mean loss averages the outer products of these gradients over the examples, and over the labels as the *model*
# predicts them:
#
# $$
# F = \frac1N \sum_{n, c} p_{cn} \operatorname{vec}(G_{cn}) \operatorname{vec}(G_{cn})^\top ,
# \tag{0.2}
# $$
#
# where $\operatorname{vec}$ writes a matrix as one long vector, row after row. $F$ equals the Gauss-Newton matrix,
# which is the Hessian of the loss after the network has been replaced by its linear approximation
# ([Chapters 2](02_curvature.py) and [3](03_losses.py)). So $F$ is a curvature, and it has no negative eigenvalues.
# For squared error the same holds, with a Gaussian distribution of the right variance in the place of $p$.
#
# **What is a gradient made of?** The layer computes $z_n = W a_n$. By the chain rule, the gradient with respect to
# $W$ is the outer product of the gradient with respect to $z_n$ and the input $a_n$. Let $g_{cn}$ be the gradient of
# $-\log p_{cn}$ with respect to $z_n$, times $\sqrt{p_{cn} / N}$. Then
#
# $$
# \sqrt{p_{cn} / N}\; G_{cn} = g_{cn} a_n^\top,
# \qquad
# \operatorname{vec}(g_{cn} a_n^\top) = g_{cn} \otimes a_n .
# \tag{0.3}
# $$
#
# **Put [(0.3)] into [(0.2)].** Kronecker products are multiplied factor by factor, so that
#
# $$
# \begin{aligned}
# F &= \sum_{n, c} (g_{cn} \otimes a_n)(g_{cn} \otimes a_n)^\top
#    = \sum_{n} \Bigl(\sum_c g_{cn} g_{cn}^\top\Bigr) \otimes \bigl(a_n a_n^\top\bigr) \\
#   &\approx \Bigl(\sum_{n, c} g_{cn} g_{cn}^\top\Bigr) \otimes \Bigl(\frac1N \sum_n a_n a_n^\top\Bigr)
#    = B \otimes A .
# \end{aligned}
# \tag{0.4}
# $$
#
# Only the second line approximates: it replaces an average of products by the product of the averages. The line is
# exact if the entries of one factor are uncorrelated with the entries of the other over the examples.
#
# **How is it inverted?** If the weights change by a small $d$, the loss changes by about
# $\operatorname{vec}(G)^\top d + \tfrac12 d^\top F d$, where $G$ is the loss's gradient with respect to $W$. An
# optimizer adds $\tfrac12 \delta \lVert d \rVert^2$: the *damping* $\delta \gt 0$ keeps the step short where the
# curvature is small. The sum is smallest at $d = -(F + \delta I)^{-1} \operatorname{vec}(G)$.
#
# Let $A = Q_A \Lambda_A Q_A^\top$ and $B = Q_B \Lambda_B Q_B^\top$ be eigendecompositions. Then $B \otimes A$ has the
# eigenvectors $Q_B \otimes Q_A$, and its eigenvalues are all products $\beta_i \alpha_j$ of one eigenvalue of $B$ and
# one of $A$. With $(Q_B \otimes Q_A) \operatorname{vec}(M) = \operatorname{vec}(Q_B M Q_A^\top)$ ([Theorem 1.1]),
#
# $$
# (B \otimes A + \delta I)^{-1} \operatorname{vec}(G)
# = \operatorname{vec}\bigl( Q_B\, M\, Q_A^\top \bigr),
# \qquad
# M_{ij} = \frac{(Q_B^\top G\, Q_A)_{ij}}{\beta_i \alpha_j + \delta} .
# \tag{0.5}
# $$
#
# No matrix in [(0.5)] is larger than $A$, $B$ or $W$.
#
# ## The file, piece by piece
#
# All code of this section is from one file that needs PyTorch and nothing else. Download
# [kfac_in_80_lines.py](kfac_in_80_lines.py){ download="kfac_in_80_lines.py" } and run it:
# `python kfac_in_80_lines.py` trains with Adam and with KFAC, three settings each, and checks one case
# in which KFAC is exact. In this chapter's cells the file is the module `short`.

# %% tags=["hide-input"]
sys.path += [str(Path.cwd()), str(Path(kfac_scratch.__file__).parents[1] / "tutorial")]
try:
    import kfac_in_80_lines as short
except ModuleNotFoundError:
    way_out = (
        "Download kfac_in_80_lines.py from this chapter's page and put it beside the notebook."
    )
    raise ModuleNotFoundError(way_out) from None

# %% [markdown]
# ### The vectors
#
# The gradient of $-\log p_c$ with respect to the network's outputs $f$ is $p - e_c$, where $e_c$ is 1 at
# label $c$ and 0 elsewhere. Its weight in [(0.2)] is $p_c / N$. The factor $B$ multiplies $g$ by itself, so that $g$
# gets the root of the weight. These vectors give the **exact Fisher**: all labels are used, and none is sampled.

# %% tags=["remove-input"]
code(short.cross_entropy_vectors)

# %% [markdown]
# ### The hooks
#
# A forward hook sees what a layer receives and what it returns. The input becomes $a$. The output is kept with its
# graph, because the vectors are sent back to it.

# %% tags=["remove-input"]
code(short.KFAC.record)

# %% [markdown]
# ### The factors
#
# `torch.autograd.grad` sends all vectors from the outputs $f$ to every $z$ at once. The factor $A$ is a mean. The
# factor $B$ is a sum, because the $1/N$ is in $g$ already. Whoever divides again makes a mistake that
# training does not show (Exercise 0.3). Running averages smooth both over the batches.

# %% tags=["remove-input"]
code(short.KFAC.observe)

# %% [markdown]
# ### The step
#
# The weights and the bias make one matrix, with the bias as its last column. The rest is [(0.5)].

# %% tags=["remove-input"]
code(short.KFAC.step)

# %% [markdown]
# ## Does it train?
#
# The file's task has ten random inputs and three classes. The network has two hidden layers of 16 units. Every step
# gets 256 new examples, so that the training loss is a loss on unseen data. Both optimizers are tuned over six
# settings each, compared on one seed by the loss of the last twenty steps. The best setting then runs
# with five other seeds, and both optimizers see the same networks and examples.

# %%
adam = [(rate,) for rate in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)]
ours = [(rate, damping) for rate in (0.05, 0.1, 0.2) for damping in (0.01, 0.03)]
curves = {}
for name, settings in {"Adam": adam, "KFAC": ours}.items():
    ends = {setting: short.train(*setting)[-20:].mean().item() for setting in settings}
    best = min(ends, key=ends.get)
    print(
        f"{name}, the best of {len(ends)}: learning rate {best[0]}",
        *[f"damping {d}" for d in best[1:]],
    )
    assert settings[0][0] < best[0] < settings[-1][0]  # the rate is at neither end of its list
    curves[name] = torch.stack([short.train(*best, seed=seed) for seed in range(1, 6)]).cpu()

# %% tags=["hide-input"] alt="The loss against the step for Adam and for KFAC, each as a median over five seeds with a band from the smallest to the largest. KFAC's curve falls below 0.3 after fewer than half of Adam's steps and ends below Adam's curve." caption="Loss on new examples: the median over five seeds and the range between the smallest and the largest. Both methods run with the best of six settings. The dotted line is the loss of 0.3. The output below counts the steps until a run is first below this line."
TARGET = 0.3
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for name, runs in curves.items():
    colour = style({"Adam": "AdamW", "KFAC": "KFAC"}[name])["color"]
    ax.plot(range(1, 101), runs.median(0).values, color=colour)
    ax.fill_between(range(1, 101), runs.amin(0), runs.amax(0), color=colour, alpha=0.2, lw=0)
    ax.text(102, runs.median(0).values[-5:].mean(), name, color=colour, va="center")
ax.axhline(TARGET, linestyle=":", color=ax.xaxis.label.get_color(), linewidth=1)
ax.set(xlabel="step", ylabel="loss", ylim=(0, 1.2))
plt.show()

# %%
sent = {
    "Adam": 1,
    "KFAC": 1 + 3,
}  # vectors that are sent back in a step: the loss's, and one for each label
first = {name: (runs < TARGET).int().argmax(1) + 1 for name, runs in curves.items()}
for name, steps in first.items():
    assert all((runs < TARGET).any() for runs in curves[name])
    low, middle, high = steps.min(), steps.median(), steps.max()
    print(f"{name}: {middle} steps ({low} to {high}) to a loss of {TARGET},", end=" ")
    print(f"{sent[name] * middle} vectors; last losses {curves[name][:, -20:].mean():.2f}")
assert first["KFAC"].max() < first["Adam"].min()
assert sent["KFAC"] * first["KFAC"].min() > sent["Adam"] * first["Adam"].max()

# %% [markdown]
# **What this shows.** With six settings tried for each, KFAC needs fewer steps on this task, for every seed.
#
# **What this does not show.** A step of KFAC costs more: this file sends back four vectors instead of one, and
# decomposes two matrices per layer. Adam reaches the target with fewer vectors. An optimizer in
# practice sends back only one more vector, for a sampled label, and renews the factors every ten steps or so.
# [Chapter 13](13_in_practice.py) compares such an optimizer with others on larger tasks, in steps and in seconds.
#
# ## Is it right?
#
# Tuning the learning rate and the damping hides a mistake in KFAC's scale (Exercise 0.3). So a test needs a network on
# which KFAC is exact. Linear layers without activations, and squared error, make one. A mean of $D$ squares has, with
# respect to the outputs, the Hessian $2/D$ times the identity. Its root gives one vector $\sqrt{2/D}\, e_c$ for every
# output $c$ ([Chapter 3](03_losses.py)). No activation changes these vectors on their way back, so that $g$ is the
# same for all examples. A constant is uncorrelated with every variable, so that [(0.4)] holds with $=$. The outputs
# are linear in the weights of one layer, so that $F$ is the Hessian with respect to them. Autograd computes this
# Hessian without KFAC, and $B \otimes A$ must equal the Hessian, its scale included, up to rounding:

# %% tags=["remove-input"]
code(short.check_exactness)

# %%
short.check_exactness()
text = Path(short.__file__).read_text(encoding="utf-8")
for old, new in {" / len(layer.a)": "", "(2 / y.numel())": "(2 / len(y))"}.items():
    broken = {"__name__": "broken"}
    exec(text.replace(old, new), broken)  # the same file with a mistake
    try:
        broken["check_exactness"]()
    except AssertionError:
        print(f"found: {old.strip()!r} replaced by {new!r}")
    else:
        raise AssertionError("the mistake was not found")

# %% [markdown]
# The file's $A$ and $B$ also equal the package's, here for cross-entropy and a network with an activation:

# %%
optimizer, f = short.KFAC(model, lr=0.1, damping=0.01), model(X)
optimizer.observe(f, short.cross_entropy_vectors(f))
for layer, io in zip(optimizer.layers, layer_ios(model, loss, X, y).values(), strict=True):
    assert_exact(layer.A, kfac(io).A)
    assert_exact(layer.B, kfac(io).B)

# %% [markdown]
# ## Three ways in which it is not exact
#
# In general $B \otimes A$ is not the curvature. Three things are lost, here for the network of [Figure 0.1]:
#
# 1. **Within a layer**, inputs and vectors vary together. The error's entries are $N$ times the covariances of
#    $a_n a_n^\top$ and $\sum_c g_{cn} g_{cn}^\top$ over the examples ([Theorem 5.1]). One example has no error.
# 2. **Between layers**, the Fisher matrix of the whole network has entries, too. KFAC sets them to zero.
# 3. **The Fisher matrix is not the Hessian**: it leaves out the second derivatives of the network itself.
#
# The cell prints the norm of each difference, relative to the norm of the matrix that is approximated.

# %%
whole, layers = ggn(model, loss, X, y), block_index(model).values()
between = whole.clone()
for places in layers:
    between[places.flatten()[:, None], places.flatten()] = 0
H = diagonal_blocks(model, hessian(model, loss, X, y))["0"]
lost = {
    "within the layer ": relative_error(K, F),
    "between layers   ": (between.norm() / whole.norm()).item(),
    "Fisher or Hessian": relative_error(F, H),
}
for what, error in lost.items():
    print(f"{what} {error:.2f}")
    assert error > 0.02

one = X[:1], y[:1]
assert_exact(
    kfac(layer_ios(model, loss, *one)["0"]).dense(),
    diagonal_blocks(model, ggn(model, loss, *one))["0"],
)

# %% [markdown]
# The cell's last statement checks the other exact case: one example. With one example KFAC equals $F$ for every layer
# that is used once for an example, whatever the activations, and for cross-entropy as well as squared error.
# [Chapter 6](06_weight_sharing.py) treats the other layers.
#
# ## Where to go from here
#
# | You want to | Read |
# | --- | --- |
# | implement KFAC | [LayerIO](04_layer_io.py), [KFAC](05_kfac.py), [weight sharing](06_weight_sharing.py) |
# | train with it | [damping](09_damping.py), [the optimizer](11_averages.py), [in practice](13_in_practice.py), [which one when](23_comparison.py) |
# | know how sure a network is | [Laplace](29_laplace.py) |
# | solve differential equations | [Taylor mode](26_taylor.py), [PINNs](27_pinn.py) |
# | check your own code | [Is your KFAC right?](35_conformance.py), [the bug museum](36_museum.py) |
# | understand everything | [Flattening](01_flattening.py), then in order; [the reading map](reading_map.md) |
#
# ## Exercises
#
# **Exercise 0.1 (write it yourself).** In a network of linear layers with squared error, a layer was given the inputs
# `a` of shape `[N, d_in]`, with the 1 for the bias, and the $V$ vectors `g` of shape `[V, N, d_out]` were sent back
# to it. Write a function that returns $A$ and $B$. The checker compares $B \otimes A$ with the Hessian. It does
# not accept the first attempt below:


# %%
def check(candidate) -> str:
    """Compare a function's factors with a layer's Hessian, for 11 examples and 2 outputs."""
    torch.manual_seed(0)
    linear = Sequential(Linear(5, 4), Linear(4, 2))
    X, y = torch.randn(11, 5), torch.randn(11, 2)
    io = layer_ios(linear, torch.nn.MSELoss(), X, y)["0"]
    exact = diagonal_blocks(linear, hessian(linear, torch.nn.MSELoss(), X, y))["0"]
    A, B = candidate(io.a[:, 0], io.g[:, :, 0])
    found = torch.kron(B, A)
    if found.shape != exact.shape:
        return f"B ⊗ A is {list(found.shape)}, the Hessian {list(exact.shape)}"
    scale = ((found * exact).sum() / exact.square().sum()).item()
    if relative_error(found, scale * exact) > 1e-10:
        return "not a multiple of the Hessian"
    return "right" if abs(scale - 1) < 1e-10 else f"right, but {scale:.4g} times as large"


def attempt(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    return a.T @ a, g[0].T @ g[0]


print(check(attempt))

# %% [markdown]
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The attempt uses the first vector only, and its $A$ is a sum. With all vectors the checker says that the
# product is 11 times as large, which is $N$. The right function is
#
# ```py
# def solution(a, g):
#     return a.T @ a / len(a), torch.einsum("vni,vnj->ij", g, g)
# ```
#
# </details>
#
# **Exercise 0.2 (sampled labels).** With many classes, one vector for every label is too expensive. Write
# `sampled_vectors(f)` that draws one label per example from the model and returns `[1, N, C]`. By which factor must the
# vector be multiplied, so that $B$ is right in expectation?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Label $c$ is drawn with probability $p_c$, so that its weight $p_c$ is in the drawing already. What remains is
# $1/\sqrt N$: the vector is $(p - e_{\hat y}) / \sqrt N$ with $\hat y \sim p$. The expectation of its outer product is
# $\sum_c p_c (p - e_c)(p - e_c)^\top / N$. The function stands in the folded cell below.
#
# </details>
#
# **Exercise 0.3 (why training does not tell).** Somebody's $B$ is too small by a factor of $N^2$, because the vectors
# were divided by $N$ once more. Which learning rate and damping give the same steps as the right $B$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# For every $s \gt 0$, $\eta s\, (s B \otimes A + s \delta I)^{-1} = \eta\, (B \otimes A + \delta I)^{-1}$.
# With $s = 1/N^2$, a learning rate and a damping that are both divided by $N^2$ give the right steps. So a search
# over both hides the mistake.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
assert check(attempt) == "not a multiple of the Hessian"
assert (
    check(lambda a, g: (a.T @ a, torch.einsum("vni,vnj->ij", g, g)))
    == "right, but 11 times as large"
)
assert check(lambda a, g: (a.T @ a / len(a), torch.einsum("vni,vnj->ij", g, g))) == "right"


def sampled_vectors(f: Tensor) -> Tensor:
    p = f.detach().softmax(1)
    drawn = torch.multinomial(p, 1)[:, 0]
    return (p - torch.eye(p.shape[1])[drawn])[None] / len(p) ** 0.5


p, N, one_hot = f.detach().softmax(1), len(f), torch.eye(3)
labels = p - N**0.5 * sampled_vectors(f)[0]  # what the vectors took for the labels
assert_exact(labels.amax(1), torch.ones(N))
assert_exact(labels.sum(1), torch.ones(N))
expected = sum(
    torch.einsum("n,ni,nj->nij", p[:, c], p - one_hot[c], p - one_hot[c]) / N for c in range(3)
)
vectors = short.cross_entropy_vectors(f)
assert_exact(torch.einsum("cni,cnj->nij", vectors, vectors), expected)

A, B, G, s = layer.A, layer.B, torch.randn(3, 5), 1 / N**2
step = torch.linalg.solve(torch.kron(B, A) + 0.01 * torch.eye(15), G.flatten())
assert_exact(
    s * torch.linalg.solve(torch.kron(s * B, A) + s * 0.01 * torch.eye(15), G.flatten()), step
)
print("all hold")

# %% [markdown]
# ## In one minute
#
# - For one example, a layer's gradient is an outer product $g a^\top$. So the layer's Fisher matrix is a sum of
#   products $(\sum_c g_{cn} g_{cn}^\top) \otimes (a_n a_n^\top)$ over the examples.
# - KFAC replaces the average of products by the product of averages: $F \approx B \otimes A$. Here $A$ is a mean and
#   $B$ a sum, because $g$ contains the $1/N$.
# - KFAC stores two small matrices. Two small eigendecompositions give the damped inverse.
# - $B \otimes A$ equals $F$ for one example, and for linear layers with squared error. Test your code there.
# - KFAC drops the covariance within a layer, everything between layers, and the difference between Fisher and Hessian.
#
# ## Further reading
#
# [Martens and Grosse (2015)](bibliography.md#kfac) introduce KFAC for training.
# [Dangel et al. (2025)](bibliography.md#from-scratch) is another tutorial with code and the same exact test.
