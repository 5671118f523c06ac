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
# # 25. Relatives: Shampoo, SOAP and Muon
#
# **Part VI: Relatives.** Shampoo, SOAP and Muon precondition the gradients of matrices, as KFAC does, and need neither
# the loss nor the layers: why take KFAC, and when not?
#
# These optimizers need only the gradient of a model. KFAC needs the layer of a weight, its inputs, and the Hessian of
# the loss. Without memory, that is, with no average over earlier batches, and without damping, Shampoo, SOAP and Muon
# with an exact polar factor give the same step ([Figure 25.1]). For a gradient with the singular value decomposition
# $G = U \Sigma W^\top$, and $L = G G^\top$, $R = G^\top G$,
#
# $$
# L^{-1/4} G R^{-1/4} = U \Sigma^{-1/2} \Sigma\, \Sigma^{-1/2} W^\top = U W^\top .
# \tag{25.1}
# $$
#
# Powers are taken on the range of a matrix, and SOAP needs distinct nonzero singular values.

# %%
import itertools
import json
import math
import operator

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

from kfac_scratch import (
    KFAC,
    LayerIO,
    ekfac,
    empirical,
    graft,
    kfac,
    kpsvd,
    layer_ios,
    monte_carlo,
    tekfac,
    tkfac,
    type2,
)
from kfac_scratch.approximations.batch_gradients import OfBatch, from_gradient, pooled
from kfac_scratch.approximations.kl_shampoo import kl_factors
from kfac_scratch.approximations.muon import CUBIC, MUON, newton_schulz, polar_factor
from kfac_scratch.approximations.shampoo import shampoo_bound
from kfac_scratch.approximations.soap import soap
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.linalg import vec
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.rearranged import Rearranged
from kfac_scratch.matrices.roots import inverse_root
from kfac_scratch.show import RESULTS, code, matrices, style

set_up()  # seed 0, float64, the GPU where there is one

data = load_digits()
images = torch.tensor(data.images[:1400]).unflatten(0, (-1,))[:, ::2, ::2].flatten(1) / 16
labels = torch.tensor(data.target[:1400])
net, loss = Sequential(Linear(16, 12), Tanh(), Linear(12, 10)), CrossEntropyLoss()
adam = torch.optim.Adam(net.parameters(), 1e-2)
for _ in range(300):
    chosen = torch.randint(1400, (100,))
    adam.zero_grad()
    loss(net(images[chosen]), labels[chosen]).backward()
    adam.step()
ios = layer_ios(net, loss, images, labels, type2)
of_data = layer_ios(net, loss, images, labels, empirical)

# %% tags=["hide-input"] alt="Three heat maps with 4 rows and 7 columns. Left a random gradient. In the middle the step of Shampoo, SOAP and Muon, with entries of similar size as the gradient's. Right the step of Shampoo with the power one half, where the direction with the smallest singular value dominates." caption="A gradient, and the steps without memory. Shampoo, SOAP and Muon make all singular values equal to 1. The power 1/2 on each side inverts them."
own = torch.Generator(images.device).manual_seed(0)
example = torch.randn(4, 7, generator=own, device=images.device)
inverted = torch.linalg.pinv(example).T
matrices(
    {
        "gradient": example / torch.linalg.matrix_norm(example, 2),
        "Shampoo = SOAP = Muon": polar_factor(example),
        "Shampoo, power 1/2": inverted / torch.linalg.matrix_norm(inverted, 2),
    }
)

# %% [markdown]
# The methods differ once they average over batches. After this chapter you will be able to
#
# - read each of them as a line of the table below;
# - check an implementation by four identities;
# - say on which small tasks they were compared with KFAC, and what those runs do not show.
#
# Every method of the family makes three choices:
#
# 1. **Which gradients?** Those of every sample, or their mean over a batch. With labels of the data, or
#    of the model.
# 2. **Which matrix?** An approximation of the sum of their outer products.
# 3. **Which power** of the matrix multiplies the gradient: the inverse, or the inverse root.
#
# In the table, names in `code` type are functions of the package, and $B$ and $A$ are Shampoo's sums $L$ and $R$.
#
# | Method | Gradients | Matrix | Power |
# | --- | --- | --- | --- |
# | KFAC, EKFAC | of samples, labels of the model | `kfac`, `ekfac` | $-1$ |
# | TKFAC, TEKFAC, KPSVD | of samples, labels of the model | `tkfac`, `tekfac`, `kpsvd` | $-1$ |
# | Adam | of batches | a diagonal | $-1/2$ |
# | Shampoo | of batches | `shampoo_bound`, $B^{1/2} \otimes A^{1/2}$ | $-1/2$ |
# | Shampoo with power 1/2 | of batches | `tkfac` | $-1/2$ |
# | SOAP | of batches | `tekfac` | $-1/2$ |
# | KL-Shampoo | of batches | `kl_factors` | $-1/2$ |
# | Muon | of one batch, with momentum | `tekfac`, without memory | $-1/2$ |
#
# ## One gradient, three steps
#
# Let there be one gradient $G$, of shape `[4, 7]`, and no averages. The cell has the steps of the three optimizers,
# each by its own formula:

# %%
G = torch.randn(4, 7)


def power(M: Tensor, p: float) -> Tensor:
    """A power of a PSD matrix on its range."""
    d, Q = torch.linalg.eigh(M)
    kept = d > 1e-12 * d[-1]
    return (Q[:, kept] * d[kept] ** p) @ Q[:, kept].T


left, right = G @ G.T, G.T @ G  # Shampoo's L and R
by_shampoo = power(left, -1 / 4) @ G @ power(right, -1 / 4)

QL, QR = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
rotated = QL.T @ G @ QR  # SOAP: Adam in the eigenbasis of L and R
seen = rotated.abs() > 1e-12
by_soap = QL @ torch.where(seen, rotated / rotated.square().sqrt(), 0) @ QR.T

U, _, Wh = torch.linalg.svd(G, full_matrices=False)  # Muon: the singular values become 1
by_muon = U @ Wh

assert_exact(by_shampoo, by_muon)
assert_exact(by_soap, by_muon)

# %% [markdown]
# All three steps are equal, by [(25.1)] and $L = U \Sigma^2 U^\top$, $R = W \Sigma^2 W^\top$.
#
# If the nonzero singular values are distinct, $G$ becomes the diagonal $\Sigma$ in the eigenbases of $L$ and $R$, up to
# order and signs, and Adam without memory divides every entry by its size. So these exact forms differ only in their
# **memory**: Shampoo averages $L$ and $R$ over batches, SOAP also the squares in the eigenbasis, and Muon none of them.
# The power matters, too. Some implementations of Shampoo take $1/2$ in the place of $1/4$ on each side. Without memory
# that *inverts* the singular values:

# %%
with_half = power(left, -1 / 2) @ G @ power(right, -1 / 2)
assert_exact(with_half, torch.linalg.pinv(G).T)
assert relative_error(with_half, by_muon) > 0.1

# %% [markdown]
# ## A gradient is a layer
#
# KFAC's functions take a `LayerIO`: inputs $a$ and vectors $g$ with $G_n = \sum_s g_{ns} a_{ns}^\top$. A bare
# gradient can be written so, since $G = \sum_i G_{:,i} e_i^\top$. And a batch becomes *one* sample if its
# samples are put where positions were:

# %% tags=["remove-input"]
code(from_gradient, pooled)

# %% [markdown]
# The gradient of the pooled layer is that of the whole batch. For a mean loss over $N$ samples,
# `pooled(io).block()` is $N \operatorname{vec}(\bar G) \operatorname{vec}(\bar G)^\top$ with
# $\bar G$ the `.grad` that PyTorch computes. With the factor $N$ it estimates the Fisher ([(25.3)] says how well), but
# the inverse root gives a step that is shorter by $\sqrt N$ than that of Adam, which has no such factor. Code that
# confuses both has a learning rate that is wrong by $\sqrt N$.

# %% tags=["hide-input"] fold="Checked: both layers have the gradient of PyTorch, and TKFAC of them is Shampoo's"
net.zero_grad()
loss(net(images), labels).backward()
grads = {n: torch.cat([net[int(n)].weight.grad, net[int(n)].bias.grad[:, None]], 1) for n in ios}
for n, io in of_data.items():
    assert_exact(from_gradient(grads[n]).gradients()[0, 0], grads[n])
    mean = vec(grads[n])
    assert_exact(pooled(io).block(), 1400 * torch.outer(mean, mean))
    assert_exact(tkfac(pooled(io)).B, 1400 * grads[n] @ grads[n].T)  # Shampoo's L
    assert_exact(kfac(pooled(io)).dense(), kfac(io).dense())
    assert relative_error(tkfac(pooled(io)).dense(), tkfac(io).dense()) > 0.1

# %% [markdown]
# The last two lines compare batch and samples. KFAC of both is equal, because KFAC-expand does not use which rows belong
# to one sample. TKFAC of the batch differs from TKFAC of the samples, and its factors are Shampoo's sums. So the methods
# of this chapter are relatives of TKFAC.
#
# ## Shampoo is TKFAC
#
# Shampoo's sums $L = \sum_k G_k G_k^\top$ and $R = \sum_k G_k^\top G_k$ are the partial traces of the block,
# which [Chapter 15](15_tkfac.md) calls $B$ and $A$. TKFAC is $B \otimes A / \operatorname{tr} A$. Shampoo
# as published takes roots, which give an upper bound
# ([Gupta et al. 2018](bibliography.md#shampoo)). If no gradient has a rank above $r$, the block
# $F = \sum_k \operatorname{vec}(G_k) \operatorname{vec}(G_k)^\top$ obeys
#
# $$
# F \preceq r \; B^{1/2} \otimes A^{1/2} .
# \tag{25.2}
# $$
#
# Without momentum, a preconditioner that is too large gives steps that are too short. TKFAC is no such bound:

# %% tags=["hide-input"] fold="Checked: Shampoo's matrix is a bound, TKFAC is none"
for io in of_data.values():
    F = io.block()
    rank = min(io.a.shape[1], io.a.shape[2], io.g.shape[3])
    assert torch.linalg.eigvalsh(rank * shampoo_bound(io).dense() - F)[0] > -1e-10 * F.norm()
    assert torch.linalg.eigvalsh(tkfac(io).dense() - F)[0] < -1e-2 * F.norm()

# %% [markdown]
# The literature calls Shampoo's matrix an upper bound of the block, and its square near the best product
# ([Morwani et al. 2025](bibliography.md#shampoo-square)). The first is about $B^{1/2} \otimes A^{1/2}$, the second
# about $B \otimes A$, which is TKFAC up to a factor.
#
# ## One weight for every sample
#
# For a layer with one position and one vector for each sample, and $g_n$ scaled so that
# $F = \sum_n g_n g_n^\top \otimes a_n a_n^\top$, every product in the family is a pair of weighted sums,
#
# $$
# A = \sum_n w^A_n \, a_n a_n^\top , \qquad B = \sum_n w^B_n \, g_n g_n^\top ,
# $$
#
# and the methods differ in two numbers for each sample:
#
# $$
# \begin{aligned}
# \text{KFAC} && w^A_n &= 1 / N , & w^B_n &= 1 , \\
# \text{TKFAC} && w^A_n &= \lVert g_n \rVert^2 , & w^B_n &= \lVert a_n \rVert^2 , \\
# \text{KPSVD} && w^A_n &= g_n^\top B\, g_n , & w^B_n &= a_n^\top A\, a_n , \\
# \text{KL-Shampoo} && w^A_n &= g_n^\top B^{-1} g_n / d_\text{out} , & w^B_n &= a_n^\top A^{-1} a_n / d_\text{in} .
# \end{aligned}
# $$
#
# The matrix is $B \otimes A$, for TKFAC divided by $\operatorname{tr} A$. (Shampoo's sums are TKFAC's.) KFAC is exact
# if $a_n a_n^\top$ and $g_n g_n^\top$ are uncorrelated over the samples. TKFAC has both partial traces right. KPSVD
# minimises the distance $\lVert F - B \otimes A \rVert$, and KL-Shampoo, for a positive definite $F$, a divergence of
# Gaussians, $\operatorname{KL}(\mathcal N(0, F) \,\Vert\, \mathcal N(0, B \otimes A))$.
#
# KFAC gives all samples the same weight. TKFAC weights a sample's input by the size of its vector. In the last two
# lines, the weights of each factor depend on the other factor: they describe a fixed point of an iteration. KPSVD's
# lines hold up to a scale of each factor.

# %% tags=["hide-input"] fold="Checked: the weights of TKFAC, KPSVD and KL-Shampoo"
io = of_data["0"]
a, g = io.a[:, 0], io.g[0, :, 0]


def weighted(w: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("n,ni,nj->ij", w, x, x)


def quadratic(x: Tensor, M: Tensor) -> Tensor:
    return torch.einsum("ni,ij,nj->n", x, M, x)


assert_exact(tkfac(io).A, weighted(g.square().sum(1), a))
assert_exact(tkfac(io).B, weighted(a.square().sum(1), g))
K = kpsvd(io, 1e-13)
for found, again in ((K.A, weighted(quadratic(g, K.B), a)), (K.B, weighted(quadratic(a, K.A), g))):
    assert_exact(again / again.norm(), found / found.norm())
inputs = a.square().sum(0).topk(5).indices  # without pixels that are always blank,
small = LayerIO(io.a[:, :, inputs], io.g[..., :3])  # the block has full rank: no damping
K = kl_factors(small, 0.0, steps=200)
a_, g_ = small.a[:, 0], small.g[0, :, 0]
assert_exact(K.A, weighted(quadratic(g_, torch.linalg.inv(K.B)) / g_.shape[1], a_))
assert_exact(K.B, weighted(quadratic(a_, torch.linalg.inv(K.A)) / a_.shape[1], g_))

# %% [markdown]
# With $A = B = I$ on their right sides, the last two lines become TKFAC's, up to a factor. Shampoo's sums are the first
# step, from the identity, of the power iteration that ends at KPSVD ([Chapter 16](16_kpsvd.md)), and of the **flip-flop**
# that ends at KL-Shampoo: it takes the best $B$ for $A$, then the best $A$ for $B$, and so on. [Figure 25.2] follows both
# iterations from the identity.

# %% tags=["hide-input"] alt="Two panels, against half steps and against flip-flops, from 0 to 8. Left: the cosine between the exact block and the iterates of power iteration rises steeply in the first two half steps and is flat afterwards; a dotted line marks KFAC below the final value. Right: the divergence of the flip-flop falls in the same way." caption="From the identity. Left: cosine of the angle to the exact block, power iteration, one factor for each half step; dotted: KFAC. Right: divergence, both factors for each flip-flop. Once both factors have been updated, little is gained."
F, R = io.block(), Rearranged(io)
damping = 1e-3 * float(F.diagonal().mean())
damped = F + damping * torch.eye(len(F))


def cosine(M: Tensor) -> float:
    return float((M * F).sum() / M.norm() / F.norm())


def divergence(M: Tensor) -> float:
    """Per weight, of the damped block from a product."""
    ratio = torch.linalg.solve(M, damped)
    return float(0.5 * (ratio.trace() - torch.logdet(ratio) - len(F)) / len(F))


A, cosines = torch.eye(io.a.shape[-1]), [cosine(torch.eye(len(F)))]
for _ in range(4):
    B = R.to_outputs(A / A.norm())
    cosines.append(cosine(Kronecker(A, B).dense()))
    A = R.to_inputs(B / B.norm())
    cosines.append(cosine(Kronecker(A, B).dense()))
assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(cosines))
size = float(damped.diagonal().mean())
kls = [divergence(size * torch.eye(len(F)))]
kls += [divergence(kl_factors(io, damping, steps=k).dense()) for k in range(1, 9)]
assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(kls))
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
axes[0].plot(cosines, "o-")
axes[0].axhline(cosine(kfac(io).dense()), linestyle=":", color="C1")
axes[0].text(8, cosine(kfac(io).dense()) - 0.03, "KFAC", color="C1", ha="right")
axes[0].set(xlabel="half steps", title="cosine to the block")
axes[1].plot(kls, "o-")
axes[1].set(xlabel="flip-flops", title="divergence per weight", yscale="log")
plt.show()

# %% [markdown]
# ## SOAP is EKFAC of TKFAC
#
# SOAP runs Adam in the eigenbasis of Shampoo's factors. Adam keeps second moments, and second moments of gradients in a
# Kronecker basis are EKFAC's eigenvalues ([Chapter 14](14_ekfac.md)). So SOAP's matrix is EKFAC with TKFAC's basis,
# which is TEKFAC. TKFAC's basis has a property that KFAC's basis does not have in general: the sums over the rows and
# columns of the table of second moments are the eigenvalues of $B$ and of $A$.

# %% tags=["hide-input"] alt="A heat map of the second moments of a layer in the eigenbasis of TKFAC, with 12 rows and 17 columns, large at one corner. A narrow strip to its right shows the row sums, one below it the column sums." caption="Second moments $s_{oi}$ in TKFAC's eigenbasis (logarithmic), their row sums and their column sums: these are the eigenvalues of $B$ and of $A$."
T = tekfac(io)
rows, columns = T.scale.sum(1), T.scale.sum(0)
assert_exact(rows, torch.diag(T.QB.T @ tkfac(io).B @ T.QB))
assert_exact(columns, torch.diag(T.QA.T @ tkfac(io).A @ T.QA))
assert_exact(torch.outer(rows, columns) / T.scale.sum(), tkfac(io).eigen().scale)
E = ekfac(io)
adafactor = torch.outer(E.scale.sum(1), E.scale.sum(0)) / E.scale.sum()
assert relative_error(adafactor, kfac(io).eigen().scale) > 0.01
fig, axes = plt.subplots(
    2, 2, figsize=(6, 4.4), layout="constrained", width_ratios=[10, 1], height_ratios=[10, 1]
)
tables = {(0, 0): T.scale.flip(0, 1), (0, 1): rows.flip(0)[:, None], (1, 0): columns.flip(0)[None]}
for place, table in tables.items():
    logarithm = table.clamp(min=1e-6 * rows.max()).log10()
    axes[place].imshow(logarithm.cpu().numpy(), cmap="viridis", aspect="auto")
axes[1, 1].axis("off")
axes[0, 0].set(ylabel="eigenvector of $B$", xticks=[], yticks=[])
axes[0, 1].set(xticks=[], yticks=[], title="sum")
axes[1, 0].set(xticks=[], yticks=[], xlabel="eigenvector of $A$: column sums")
plt.show()

# %% [markdown]
# The rank-one table with these sums, with entries $s^{\text{row}}_o s^{\text{col}}_i / \sum s$, is what Adafactor keeps
# of Adam's moments. In TKFAC's basis the entries are TKFAC's eigenvalues. In KFAC's basis they differ from KFAC's. The
# identity tests an implementation: if factors and moments are sums over the same gradients and the sums of the table
# are not the eigenvalues, basis and moments do not belong together.
#
# ## Muon: without memory
#
# Muon approximates $U W^\top$ of [(25.1)], the **polar factor** of the gradient, without a decomposition, by an odd
# polynomial $X \leftarrow a X + b X X^\top X + c (X X^\top)^2 X$ that acts on every singular value as
# $x \leftarrow a x + b x^3 + c x^5$. The coefficients $(\tfrac32, -\tfrac12, 0)$ of Newton and Schulz make it converge
# to 1 from every value between 0 and $\sqrt 3$. Muon's coefficients give a polynomial that is steeper at zero. Its
# values reach a band around 1 in a few steps, unless they start very small, and stay in it without converging.

# %% tags=["hide-input"] alt="Two panels of the singular value after 5 and after 10 steps against the one before, from 0.0001 to 1 on a logarithmic axis. Left, the cubic polynomial: after 5 steps it is near 1 only for values above 0.1. Right, Muon's polynomial: after 5 steps it reaches the band between 0.68 and 1.2 already at 0.005 and oscillates in it." caption="A singular value after 5 and 10 steps, by its value before, relative to the norm of the matrix. Left: the convergent cubic needs many steps for small values. Right: Muon's polynomial has all values above 0.01 in its band after five."
before = torch.logspace(-4, 0, 400)
fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for ax, (name, (c1, c3, c5)) in zip(axes, {"cubic": CUBIC, "Muon": MUON}.items(), strict=True):
    x = before.clone()
    for step in range(1, 11):
        x = c1 * x + c3 * x**3 + c5 * x**5
        if step in (5, 10):
            ax.plot(before.cpu(), x.cpu(), label=f"{step} steps")
        if name == "Muon" and step == 5:
            assert 0.6 < x[before > 0.01].min() < 0.75
            assert 1.1 < x.max() < 1.25
    ax.set(xscale="log", xlabel="singular value before", title=name)
axes[0].legend()
plt.show()
assert_exact(newton_schulz(G, 30), polar_factor(G))
assert relative_error(newton_schulz(G, 30, MUON), polar_factor(G)) > 0.01

# %% [markdown]
# ## The mean of squares, or the square of the mean
#
# Call $F_1$ the mean of $\operatorname{vec}(G_n) \operatorname{vec}(G_n)^\top$ and $m$ the mean of
# $\operatorname{vec}(G_n)$ over the whole population. With labels of the model $F_1$ is the Fisher, with labels of the
# data the empirical Fisher. The mean gradient $\bar G$ of $N$ samples, drawn independently, gives an estimate of $F_1$
# that is biased in general:
#
# $$
# N \, \mathbb E \bigl[ \operatorname{vec}(\bar G) \operatorname{vec}(\bar G)^\top \bigr]
# = F_1 + (N - 1) \, m m^\top .
# \tag{25.3}
# $$
#
# In the mean of $N^2$ products of two gradients, $N$ are of a gradient with itself, which gives $F_1 / N$, and the others
# are of independent gradients, with the mean $m m^\top$. So the second term is a bias. It vanishes at a stationary
# point, where $m = 0$. It vanishes *everywhere* if the labels are drawn from the model: then the mean over labels of
# every sample's gradient is zero. The cell checks the equation with all $6^3$ draws of three out of six samples, and the
# last statement with all $10^2$ labels of two samples:

# %% tags=["hide-input"] fold="Checked: the bias, and that it vanishes for labels of the model"
six = of_data["2"].gradients()[0, :6].flatten(1)
mean, F_1 = six.mean(0), six.T @ six / 6
draws = [six[list(c)].mean(0) for c in itertools.product(range(6), repeat=3)]
expected = 3 * sum(torch.outer(x, x) for x in draws) / len(draws)
assert_exact(expected, F_1 + 2 * torch.outer(mean, mean))
assert relative_error(expected, F_1) > 0.1

two = images[:2]
chances, total = net(two).detach().softmax(1), {}
for pair in itertools.product(range(10), repeat=2):
    sampled = layer_ios(net, loss, two, torch.tensor(pair), empirical)
    for n, io_ in sampled.items():
        share = chances[0, pair[0]] * chances[1, pair[1]]
        total[n] = total.get(n, 0) + share * pooled(io_).block()
for n, io_ in layer_ios(net, loss, two, labels[:2], type2).items():
    assert_exact(total[n], io_.block())

# %% [markdown]
# One batch gives a matrix of rank one, so an estimate of higher rank needs many batches. In the next figure the exact
# block of the second layer stands beside KFAC and TEKFAC of all samples, and beside SOAP's matrix from 400 batches of
# 100, once with the labels of the data and once with labels of the model.

# %% tags=["hide-input"] alt="Five square heat maps of a layer's block: exact, KFAC, TEKFAC, SOAP with data's labels and SOAP with the model's labels. All show the same tiles; SOAP with the data's labels is paler." caption="The last layer's exact block and four approximations, on one scale; the first 52 of 130 rows. SOAP's moments come from 400 batch gradients. With labels of the model they look like TEKFAC's of all samples, with the data's they are too small."
generator = torch.Generator(images.device).manual_seed(1)
batch_gradients = {"data's labels": [], "model's labels": []}
for _ in range(400):
    index = torch.randperm(1400, generator=generator, device=images.device)[:100]
    for name, fisher in (
        ("data's labels", empirical),
        ("model's labels", monte_carlo(1, generator)),
    ):
        part = layer_ios(net, loss, images[index], labels[index], fisher, layers=["2"])["2"]
        batch_gradients[name].append(pooled(part).gradients()[0, 0])
io = ios["2"]
F = io.block()
shown = {"exact": F, "KFAC": kfac(io).dense(), "TEKFAC": tekfac(io).dense()}
for name, gradients in batch_gradients.items():
    stacked = torch.cat(gradients, dim=1).T.unflatten(0, (400, -1)) / 20  # [400, d_in, d_out]
    eyes = torch.eye(stacked.shape[1]).expand(400, -1, -1)
    shown[f"SOAP, {name}"] = tekfac(LayerIO(eyes, stacked[None])).dense()
matrices({name: M[:52, :52] for name, M in shown.items()}, blocks=dict.fromkeys(shown, (13, 13)))

# %% tags=["hide-input"] fold="Measured: angles of the matrices and of the steps"
exact_step = torch.linalg.solve(F + 1e-3 * F.diagonal().mean() * torch.eye(len(F)), vec(grads["2"]))
print(f"{'':24}{'sine of the angle':>18}{'trace':>8}{'cosine of the step':>20}")
sines, steps = {}, {}
for name, M in shown.items():
    sines[name] = max(0.0, 1 - cosine(M) ** 2) ** 0.5
    step = torch.linalg.solve(M + 1e-3 * F.diagonal().mean() * torch.eye(len(F)), vec(grads["2"]))
    steps[name] = float(step @ exact_step / step.norm() / exact_step.norm())
    print(f"{name:24}{sines[name]:18.3f}{float(M.trace() / F.trace()):8.2f}{steps[name]:20.3f}")
assert sines["TEKFAC"] < sines["SOAP, model's labels"] < sines["SOAP, data's labels"]

# %% [markdown]
# The columns compare each matrix with the exact block by angle and trace, and its damped step with the exact one. For
# this network, the *labels* make more of a difference than the pooling: with labels of the model, SOAP comes close to
# TEKFAC of all samples. The repository's optimizer has both choices as an argument.
#
# ## In the optimizer
#
# Three arguments name the three choices. This is SOAP, with exact eigenvectors:

# %%
torch.manual_seed(0)
model = Sequential(Linear(16, 12), Tanh(), Linear(12, 10))
optimizer = KFAC(
    model,
    loss,
    fisher=empirical,  # which gradients: the data's labels,
    approximation=OfBatch(soap(basis_every=10)),  # of batches; which matrix
    invert=inverse_root,  # which power
    controls=[graft()],  # the length of Adam's step
    damping=1e-12,
)
for step in range(60):
    index = torch.arange(step * 100, step * 100 + 100) % 1400
    optimizer.zero_grad()
    value = loss(model(images[index]), labels[index])
    value.backward()
    optimizer.observe(images[index], labels[index])
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:2}: loss {value.item():.3f}")
assert value.item() < 0.7

# %% [markdown]
# This form is for understanding, and for exchanging one choice at a time. In practice, SOAP, Shampoo and Muon need no
# capture. Take an optimizer that uses gradients only: `torch.optim.Muon`, the package `pytorch-optimizer` for SOAP, or
# [facebookresearch/optimizers](https://github.com/facebookresearch/optimizers/tree/f60660661194de26d3ee78bae6d15820ff8e583d)
# for Shampoo.

# %% [markdown]
# ## In training
#
# `benchmarks/training.py` gives every method the same number of trials on small tasks, on one CPU thread: a vision
# transformer (T1), a graph network (T2), an autoencoder (T3), a convolutional network (T4) and a language model of
# characters (T5). SOAP and Muon are those of the packages
# named above. Shampoo, with the length of Adam's step and either power, is implemented in forty lines of the benchmark.
# The settings of all methods are searched in the same way. A hit is the first of two consecutive evaluations that reach
# the task's target. The numbers are medians over seeds that the search has not seen, with an interval that holds the
# median with a confidence of 90 %. "—" means that the median run, or that end of the interval, missed.

# %% tags=["hide-input"] fold="Printed: medians of the family on every task"
FAMILY = ("kfac-expand", "ekfac", "soap", "shampoo", "muon", "adamw", "sgd")
trained = {}
for path_ in sorted(RESULTS.glob("training-T*.json")):
    stored = json.loads(path_.read_text())
    if set(FAMILY) <= set(stored.get("summary", {})):
        trained[path_.stem.removeprefix("training-")] = stored
if not trained:
    print(
        "No results of the benchmark: run this chapter in a clone of the repository, which has them."
    )


def number(value: float | None, digits: int) -> str:
    return "—" if value is None or math.isinf(value) else f"{value:.{digits}f}"


for task, stored in trained.items():
    trials = {len(stored["search"][name]["trials"]) for name in FAMILY}
    seeds = len(stored["finals"]["adamw"])
    print(
        f"{task}: {'/'.join(map(str, trials))} trials each, {seeds} final seeds, "
        f"{stored['processor']}, torch {stored['versions']['torch']}"
    )
    for name in FAMILY:
        row = stored["summary"][name]
        steps, cpu = (
            f"{number(row[key], n):>6} [{', '.join(number(v, n) for v in row[f'{key}_interval'])}]"
            for key, n in (("steps", 0), ("cpu", 2))
        )
        print(f"    {name:12} hits {row['hits']}/{seeds}   steps {steps:20} CPU seconds {cpu}")

# %% tags=["hide-input"] alt="One row of dots for each task: the median number of steps to the target of EKFAC, SOAP, Shampoo, Muon, AdamW and SGD relative to KFAC, on a logarithmic axis. (Without the benchmark's files, an empty picture.)" caption="Median steps to the target relative to KFAC's. A method right of the dotted line needs more steps than KFAC. A method whose median run misses is not drawn."
same = {"kfac-expand": "KFAC", "ekfac": "EKFAC", "adamw": "AdamW", "sgd": "gradient"}
DRAWN = {name: style(method) for name, method in same.items()}
others = {"soap": ("C3", "^"), "shampoo": ("C4", "v"), "muon": ("C2", "<")}
DRAWN |= {name: {"color": colour, "marker": marker} for name, (colour, marker) in others.items()}
fig, ax = plt.subplots(figsize=(8, 0.6 * len(trained) + 1.4), layout="constrained")
for k, name in enumerate(FAMILY):
    points = []
    for i, stored in enumerate(trained.values()):
        ours, theirs = (stored["summary"][n]["steps"] for n in (name, "kfac-expand"))
        if ours is not None and theirs is not None:
            points.append((ours / theirs, i + 0.08 * (k - 3)))
    if points:
        ax.plot(*zip(*points, strict=True), linestyle="", **DRAWN[name], label=name)
ax.axvline(1, linestyle=":", linewidth=1)
ax.set(xscale="log", xlabel="steps to the target, KFAC = 1")
ax.set_yticks(range(len(trained)), list(trained))
ax.invert_yaxis()
if trained:
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
plt.show()

# %% [markdown]
# In steps, KFAC or EKFAC is first on each of T1 to T4. In CPU time, KFAC is first on none of them: by the medians, its
# steps take longer than those of SOAP and Muon. On the language model (T5) Muon is first in both. KFAC needs fewer steps
# and less time than AdamW there, with intervals that do not overlap. The few trials on T5 did not find the best settings
# of KFAC: its defaults, which were chosen on the other tasks ([Chapter 13](13_in_practice.py)), need fewer steps than any
# method of the table.
#
# The intervals describe these tasks only. Runs with the same seed are pairs: they have the same start and the same
# batches. The next cell counts, for each other method, the pairs in which KFAC needs fewer steps and those in which it
# needs more, and prints the probability of so many or more wins if both were equally likely. With five seeds it cannot be
# below $2^{-5}$, and among so many comparisons a single value of that size is weak evidence.

# %% tags=["hide-input"] fold="Tested: pairs of runs that KFAC wins and loses"


def chance(wins: int, losses: int) -> float:
    """Of at least so many wins, if wins and losses are equally likely."""
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


for task, stored in trained.items():
    told = []
    ours = [run["steps"] or math.inf for run in stored["finals"]["kfac-expand"]]
    for name in FAMILY[1:]:
        theirs = [run["steps"] or math.inf for run in stored["finals"][name]]
        wins, losses = (
            sum(f(x, y) for x, y in zip(ours, theirs, strict=True))
            for f in (operator.lt, operator.gt)
        )
        told.append(f"{name} {wins}:{losses} ({chance(wins, losses):.3f})")
    print(f"{task}: KFAC against", *(f"    {line}" for line in told), sep="\n")
for task in {"T1", "T2", "T3", "T4"} & set(trained):  # the statements above
    first = {
        key: min(FAMILY, key=lambda name: trained[task]["summary"][name][key] or math.inf)
        for key in ("steps", "cpu")
    }
    assert first["steps"] in {"kfac-expand", "ekfac"}
    assert first["cpu"] != "kfac-expand"
if "T5" in trained:
    of = trained["T5"]["summary"]
    for key in ("steps", "cpu"):
        assert min(FAMILY, key=lambda name: of[name][key] or math.inf) == "muon"
        assert of["kfac-expand"][f"{key}_interval"][1] < of["adamw"][f"{key}_interval"][0]
    bare = json.loads((RESULTS / "defaults-cpu.json").read_text())["rows"]
    defaults = next(row["median"] for row in bare if row["task"] == "T5")
    assert defaults < min(of[name]["steps"] or math.inf for name in FAMILY)

# %% [markdown]
# These runs say nothing about large models, long training, GPUs, or the loss at the end of
# training. The networks are small, and KFAC has rules for their layers and losses. For another loss, or a layer without
# a rule, the relatives need no new rule.
#
# ## What goes wrong
#
# - **Basis and moments out of step.** When a new basis is sorted, the second moments must be sorted with it.
#   [Emerging-Optimizers #274](https://github.com/NVIDIA-NeMo/Emerging-Optimizers/pull/274) lost this step, and
#   [#300](https://github.com/NVIDIA-NeMo/Emerging-Optimizers/pull/300) describes it; [HeavyBall
#   #42](https://github.com/HomebrewML/HeavyBall/issues/42) is about the first moments. SOAP's own code sorts the second
#   moments ([`soap.py`, line
#   414](https://github.com/nikhilvyas/SOAP/blob/a1e553530fde97d0e6b307d7c82ac6d38b072340/soap.py#L414)). Test: a
#   relabelled basis must not change a step.
# - **The wrong root.** Two ports took $-1/2$ for $-1/4$ on each side
#   ([pytorch-optimizer #502](https://github.com/jettify/pytorch-optimizer/issues/502),
#   [shampoo.pytorch #2](https://github.com/moskomule/shampoo.pytorch/issues/2)), a third computed
#   $-1/2$ by an iteration that should have given $-1/4$, and tested it on multiples of the identity
#   ([Odyssey #5497](https://github.com/HomericIntelligence/Odyssey/pull/5497)). Test a root on a matrix with
#   two different eigenvalues, whose root is known.
# - **The kernel taken for the matrix.** Muon scales its step by the matrix's shape. For a convolution, the step is
#   reshaped to a tensor, whose last two axes are those of the kernel and not of the matrix ([`muon.py`, line
#   40](https://github.com/KellerJordan/Muon/blob/857d1adc159e098212f828d927460782d3da59e9/muon.py#L40) reads the last two
#   axes of the gradient; [pytorch-image-models #2791](https://github.com/huggingface/pytorch-image-models/pull/2791)
#   mended the same in another optimizer).
# - **The first step.** In the first step, SOAP's own code makes a basis from the gradient and leaves the weights as they
#   are ([`soap.py`, line
#   153](https://github.com/nikhilvyas/SOAP/blob/a1e553530fde97d0e6b307d7c82ac6d38b072340/soap.py#L153)). A comparison
#   step by step must leave this step out, too.
# - **The factor $N$.** The block of `pooled` is $N$ times that of `from_gradient`, as said above.
#
# ## In one minute
#
# - The methods choose gradients, a matrix and a power. Without memory and damping, and for distinct singular values,
#   Shampoo, SOAP and Muon with an exact polar factor give the same step, (25.1).
# - Shampoo's sums are TKFAC's factors. SOAP is EKFAC of TKFAC. Pooling a batch changes TKFAC, and does not change KFAC.
# - Batch gradients estimate the Fisher with a bias, (25.3), that vanishes for labels of the model.
# - Four checks of an implementation: row and column sums (SOAP), a batch of one (`pooled` changes nothing), the
#   polar factor (no memory), a matrix with two different eigenvalues (roots).
# - KFAC uses gradients of samples and divides by curvature. For this it needs the layer and the loss. On four small
#   tasks KFAC or EKFAC needed the fewest steps, and Muon on a small language model, after equal searches. KFAC was not the fastest in CPU time
#   on any of the five.
#
# ## Exercises
#
# **Exercise 25.1.** Why is $r$ needed in (25.2)? Find a block of one gradient for which
# $B^{1/2} \otimes A^{1/2}$ alone is no bound.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# A gradient of rank one satisfies (25.2) with $r = 1$, so take $G = I_3$, of rank 3. The block
# $\operatorname{vec}(I) \operatorname{vec}(I)^\top$ has the eigenvalue 3, and $B^{1/2} \otimes A^{1/2}$ is the identity.
#
# </details>
#
# **Exercise 25.2.** Show that `kfac(from_gradient(G))` is $G G^\top \otimes I / d_\text{in}$. Which relative is
# that?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The inputs are the unit vectors, one at each position: their mean outer product is $I / d_\text{in}$. The
# vectors are the columns of $G$: the sum of their outer products is $G G^\top$. This is Shampoo on the side of
# the outputs alone.
#
# </details>
#
# **Exercise 25.3.** Write SOAP's step for one gradient $G$ in ten lines, with exact eigenvectors and damping, and check
# it against `inverse_root(tekfac(from_gradient(G)), damping) @ G`. Why does the result not depend on the order of the
# eigenvectors?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The step is $Q_B \bigl( (Q_B^\top G Q_A) / \sqrt{s + \delta} \bigr) Q_A^\top$, where the division is entry by entry,
# $Q_B$ and $Q_A$ have the eigenvectors of $G G^\top$ and $G^\top G$, and $s$ are the squares of $Q_B^\top G Q_A$. A
# permutation of the columns of $Q_A$ permutes the columns of $s$ and of the rotated gradient alike, and the last product
# undoes it. The check is the next cell.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
eye = from_gradient(torch.eye(3))  # 25.1
assert_exact(torch.linalg.eigvalsh(eye.block())[-1], torch.tensor(3.0))
assert_exact(shampoo_bound(eye).dense(), torch.eye(9))
assert_exact(kfac(from_gradient(G)).dense(), torch.kron(G @ G.T, torch.eye(7) / 7))  # 25.2
moments = tekfac(from_gradient(G))  # 25.3
step = moments.QB @ ((moments.QB.T @ G @ moments.QA) / (moments.scale + 1e-6).sqrt()) @ moments.QA.T
assert_exact(inverse_root(moments, 1e-6) @ G, step)
order = torch.randperm(7)
permuted = (
    moments.QB
    @ ((moments.QB.T @ G @ moments.QA[:, order]) / (moments.scale[:, order] + 1e-6).sqrt())
    @ moments.QA[:, order].T
)
assert_exact(permuted, step)

# %% [markdown]
# ## Further reading
#
# Shampoo: [Gupta et al. 2018](bibliography.md#shampoo). Its square and the power iteration: [Morwani et al.
# 2025](bibliography.md#shampoo-square). SOAP: [Vyas et al. 2025](bibliography.md#soap). KL-Shampoo: [Lin et al.
# 2025](bibliography.md#kl-shampoo). Muon: [Jordan et al. 2024](bibliography.md#muon). The shipped functions:
# `batch_gradients`, `shampoo`, `soap`, `kl_shampoo` and `muon`; tests check their identities.
