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
# # 5. KFAC: the product of averages
#
# **Part III: KFAC.** What is lost when the curvature of a layer becomes one Kronecker product,
# and when is nothing lost?
#
# KFAC stands for *Kronecker-factored approximate curvature*. [Chapter 4](04_layer_io.py) computed the exact curvature
# block $F$ of a layer from what the layer received for datum $n$, $a_n$, and the vectors that the loss sent back to its
# output, $g_{vn}$ with $v = 1, \dots, V$. For one datum the block is a Kronecker product of two small matrices. For
# many data it is a sum of such products, which is no Kronecker product in general. KFAC replaces it by $N$ times the
# product of two averages over the $N$ data:
#
# $$
# F = \sum_n \Bigl(\sum_v g_{vn} g_{vn}^\top\Bigr) \otimes a_n a_n^\top
# \;\approx\;
# \underbrace{\Bigl(\sum_{n, v} g_{vn} g_{vn}^\top\Bigr)}_{B} \otimes
# \underbrace{\Bigl(\frac{1}{N} \sum_n a_n a_n^\top\Bigr)}_{A} .
# $$

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Module, MSELoss, Sequential, Tanh

from kfac_scratch.approximations.accumulators import FactorSums
from kfac_scratch.approximations.kfac import foof, kfac, kfac_in_full
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.capture.layer_groups import layer_groups
from kfac_scratch.checks import assert_exact, largest_error, relative_error, set_up
from kfac_scratch.curvature import block_index, diagonal_blocks, empirical_fisher, ggn
from kfac_scratch.data_loader import kfac_over
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like, unvec, vec
from kfac_scratch.losses import empirical, monte_carlo, type2_classwise
from kfac_scratch.moving.pairing import matched_pairs
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one


def mlp(*sizes: int, activation: type[Module] | None = Tanh, bias: bool = True) -> Sequential:
    """Linear layers with an activation between them, or with nothing between them."""
    layers: list[Module] = []
    for d_in, d_out in zip(sizes, sizes[1:], strict=False):
        layers += [Linear(d_in, d_out, bias=bias)]
        layers += [activation()] if activation else []
    return Sequential(*layers[:-1]) if activation else Sequential(*layers)


model, loss = mlp(5, 4, 3), CrossEntropyLoss()
N = 7
X, y = 2 * torch.randn(N, 5), torch.randint(3, (N,))

# %% tags=["hide-input"] alt="Three 24 by 24 heat maps with 6 by 6 blocks ruled off: the exact curvature block of a layer, KFAC's Kronecker product, in which every tile repeats one pattern, and the difference of the two, which is fainter but clearly not zero." caption="The exact block of the first layer, KFAC, and what is lost, in one colour scale. There is one $6 \\times 6$ tile for every pair of output units. In KFAC all tiles are multiples of $A$, in the exact block they are not."
io = layer_ios(model, loss, X, y)["0"]  # the first layer
F, K = io.block(), kfac(io).dense()
picture = {"exact $F$": F, r"KFAC $B \otimes A$": K, "difference": F - K}
matrices(picture, blocks=dict.fromkeys(picture, (6, 6)))

# %% [markdown]
# Two factors are cheap to store and to invert, and that makes curvature usable for training. After this chapter you can
#
# - derive KFAC's two factors and compute them from $a$ and $g$, with the right scale;
# - say what the error is (a covariance), and measure it without forming the block;
# - list the networks for which KFAC is exact, and test an implementation with them;
# - tell KFAC of the Fisher, of sampled labels, and of the empirical Fisher apart.
#
# ## A first step
#
# Among other things, KFAC is for steps that take curvature into account. With $G_l$ the gradient of the loss with
# respect to the $W$ of layer $l$, KFAC's step is $-\eta\, (B_l \otimes A_l + \delta I)^{-1} \operatorname{vec}(G_l)$
# for every layer, with a damping $\delta$, the subject of [Chapter 9](09_damping.py). `inverse` computes it exactly,
# in the eigenbasis of both factors ([Chapter 8](08_matrices.py)). We compare one such step with one gradient step
# from the same start, each with the best step size of a wide grid, on images of handwritten digits.

# %%
digits = load_digits()
images = torch.tensor(digits.data) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
images, labels = images[order], labels[order]

network_ = mlp(64, 20, 10)
value = loss(network_(images[:500]), labels[:500])
names = [name for name, _ in network_.named_parameters()]
slopes = torch.autograd.grad(value, list(network_.parameters()))
gradient = dict(zip(names, slopes, strict=True))

inverses = {
    n: kfac(io).inverse(1e-3)
    for n, io in layer_ios(network_, loss, images[:500], labels[:500]).items()
}
natural = preconditioner(network_, inverses)(gradient)


def after_step(step: dict[str, Tensor], rate: float) -> float:
    moved = {n: p - rate * step[n] for n, p in network_.named_parameters()}
    return loss(torch.func.functional_call(network_, moved, (images[:500],)), labels[:500]).item()


rates = [2.0**k for k in range(-8, 8)]
best = {name: min(after_step(step, rate) for rate in rates)
        for name, step in (("gradient", gradient), ("KFAC", natural))}  # fmt: skip
print(f"loss {value:.3f}; after the best gradient step {best['gradient']:.3f},", end=" ")
print(f"after the best KFAC step {best['KFAC']:.3f}")
assert best["KFAC"] < best["gradient"] < value

# %% [markdown]
# We measure two things, here and in all chapters that follow. `assert_exact` is for theorems: no entry
# may deviate by more than $10^{-10}$ of the largest one. `relative_error` is for approximations: the norm of
# the difference over the norm of the exact matrix. The norm is the Frobenius norm,
# $\lVert M \rVert = (\sum_{ij} M_{ij}^2)^{1/2}$. Both raise an error if the expected matrix is zero.

# %% tags=["remove-input"]
code(assert_exact, largest_error, relative_error)


# %% [markdown]
# ## A sum of Kronecker products
#
# Throughout this chapter a layer is applied once per datum, $z_n = W a_n$ with the bias as the
# last column of $W$ and a one as the last entry of $a_n$. [Chapter 6](06_weight_sharing.py) lifts
# this restriction. The loss sends $V$ vectors back to $z_n$, namely $g_{1n}, \dots, g_{Vn}$, and
# each gives one gradient $G_{vn} = g_{vn} a_n^\top$. The exact block is
#
# $$
# \begin{aligned}
# F
# &= \sum_{n=1}^{N} \sum_{v=1}^{V} \operatorname{vec}(g_{vn} a_n^\top)
#    \operatorname{vec}(g_{vn} a_n^\top)^\top
#   && \text{the definition} \\
# &= \sum_{n, v} (g_{vn} \otimes a_n)(g_{vn} \otimes a_n)^\top
#   && \operatorname{vec}(g a^\top) = g \otimes a \\
# &= \sum_{n, v} (g_{vn} g_{vn}^\top) \otimes (a_n a_n^\top)
#   && \text{mixed product} \\
# &= \sum_{n} \Bigl(\sum_{v} g_{vn} g_{vn}^\top\Bigr) \otimes (a_n a_n^\top)
#   && \otimes \text{ is linear in each factor.}
# \end{aligned}
# \tag{5.1}
# $$
#
# The second and third lines are [(1.5)] and [(1.9)]. Give the two small matrices of a datum names,
# one of size $d_\text{out} \times d_\text{out}$ and one of size $d_\text{in} \times d_\text{in}$:
#
# $$
# B_n = \sum_{v} g_{vn} g_{vn}^\top,
# \qquad
# A_n = a_n a_n^\top,
# \qquad
# F = \sum_{n} B_n \otimes A_n.
# \tag{5.2}
# $$
#
# Note where the sums stand. The vectors $v$ of *one* datum cause no trouble, because they share
# the same $a_n$. Only the sum over data is in the way.

# %%
V, d_in, d_out = len(io.g), io.a.shape[-1], io.g.shape[-1]
B_n, A_n = [], []
for n in range(N):
    B_n.append(sum(torch.outer(io.g[v, n, 0], io.g[v, n, 0]) for v in range(V)))
    A_n.append(torch.outer(io.a[n, 0], io.a[n, 0]))
F = sum(torch.kron(B, A) for B, A in zip(B_n, A_n, strict=True))

assert_exact(F, io.block())
assert_exact(F, diagonal_blocks(model, ggn(model, loss, X, y))["0"])  # by plain autodiff
print(f"F is {len(F)} × {len(F)}; B_n is {d_out} × {d_out} and A_n is {d_in} × {d_in}")

# %% [markdown]
# ## The product of averages
#
# Think of the index $n$ as random, each datum with probability $1/N$, and write $\mathbb{E}$ for
# the average over data. Then
#
# $$
# \begin{aligned}
# F = N\, \mathbb{E}[B_n \otimes A_n]
# &\approx N\, \mathbb{E}[B_n] \otimes \mathbb{E}[A_n] \\
# &= \underbrace{\Bigl(\sum_{n, v} g_{vn} g_{vn}^\top\Bigr)}_{B} \otimes
#   \underbrace{\Bigl(\frac{1}{N} \sum_n a_n a_n^\top\Bigr)}_{A}.
# \end{aligned}
# \tag{5.3}
# $$
#
# The one sign that is not an equality replaces the average of a product by the product of the
# averages. That is all of KFAC. It would be an identity if $B_n$ and $A_n$ were uncorrelated.
#
# The factor $N$ went to $B$, so that $B$ is a sum and $A$ a mean. It could have gone anywhere,
# because $B \otimes A = (cB) \otimes (A/c)$. Our choice keeps all scale of the loss in one place,
# the vectors $g$ (they carry the $1/\sqrt{D}$ of a loss that is a mean over $D$ terms), and gives
# $A$ a lower right corner of exactly one whenever there is a bias.
#
# ### In the package
#
# Data, positions and vectors are rows of two tall matrices. `gram` sums $r r^\top$ over all rows
# $r$ of one of them. (The divisor is data times positions.) `kfac` is this function, except for the
# rows of an embedding, whose $A$ is diagonal ([Chapter 6](06_weight_sharing.py)).

# %% tags=["beside", "remove-input"]
code(kfac_in_full)

# %%
K = kfac(io)
assert_exact(K.B, sum(B_n))
assert_exact(K.A, sum(A_n) / N)
assert_exact(K.dense(), torch.kron(sum(B_n), sum(A_n) / N))
assert abs(K.A[-1, -1] - 1) < 1e-12

print(f"numbers stored: exact {F.numel()}, KFAC {K.A.numel() + K.B.numel()}")
print(f"relative error: {relative_error(K.dense(), F):.3f} (Figure 5.1)")

# %% [markdown]
# ## The error is a covariance
#
# How large is the error of [(5.3)]? For numbers, the average of a product minus the product of the averages is
# the covariance, $\mathbb{E}[xy] - \mathbb{E}[x]\mathbb{E}[y] = \mathbb{E}[(x - \bar x)(y - \bar y)]$.
# The same algebra works for $\otimes$, because it is bilinear. With $\bar B = \mathbb{E}[B_n]$ and
# $\bar A = \mathbb{E}[A_n]$,
#
# $$
# \begin{aligned}
# \sum_n (B_n - \bar B) \otimes (A_n - \bar A)
# &= \underbrace{\sum_n B_n \otimes A_n}_{F}
# - \underbrace{\sum_n B_n}_{N \bar B} \otimes \bar A
# - \bar B \otimes \underbrace{\sum_n A_n}_{N \bar A}
# + N \bar B \otimes \bar A \\
# &= F - N \bar B \otimes \bar A = F - B \otimes A.
# \end{aligned}
# \tag{5.4}
# $$
#
# The left side looks like a covariance, but it has Kronecker products where a covariance matrix
# has outer products. A renumbering turns one into the other. Entry $((i,j),(k,l))$ of
# $B \otimes A$ is $B_{ik} A_{jl}$. Let $\mathcal{R}$ put it into row $(i,k)$ and column $(j,l)$:
#
# $$
# \mathcal{R}(M)_{(i,k),(j,l)} = M_{(i,j),(k,l)},
# \qquad
# \mathcal{R}(B \otimes A) = \operatorname{vec}(B) \operatorname{vec}(A)^\top.
# \tag{5.5}
# $$
#
# $\mathcal{R}$ only moves entries, so it is linear and keeps the norm. Applied to [(5.4)]:
#
# <div class="admonition theorem" markdown="1" id="thm-5.1">
# <p class="admonition-title" markdown="1"><b>Theorem 5.1 (the error of KFAC)</b></p>
#
# Rearranged, KFAC's error is $N$ times the covariance matrix, over the data, of the entries of
# $B_n = \sum_v g_{vn} g_{vn}^\top$ with the entries of $A_n = a_n a_n^\top$:
#
# $$
# \begin{aligned}
# \mathcal{R}(F - B \otimes A)
# &= \sum_n \operatorname{vec}(B_n - \bar B) \operatorname{vec}(A_n - \bar A)^\top \\
# &= N \operatorname{Cov}\bigl(\operatorname{vec} B_n, \operatorname{vec} A_n\bigr),
# \end{aligned}
# \tag{5.6}
# $$
#
# and therefore $\lVert F - B \otimes A \rVert = N \lVert \operatorname{Cov} \rVert$. KFAC is exact
# **if and only if** no entry of $B_n$ is correlated with any entry of $A_n$. In particular it is
# exact if one of the two is the same for all data.
#
# </div>


# %%
def rearrange(M: Tensor, d_out: int, d_in: int) -> Tensor:
    M = M.reshape(d_out, d_in, d_out, d_in)  # i j k l
    return M.permute(0, 2, 1, 3).reshape(d_out * d_out, d_in * d_in)


entries_B, entries_A = vec(torch.stack(B_n)), vec(torch.stack(A_n))  # one row per datum
covariance = (entries_B - entries_B.mean(0)).T @ (entries_A - entries_A.mean(0)) / N

assert_exact(rearrange(K.dense(), d_out, d_in), torch.outer(vec(K.B), vec(K.A)))
assert_exact(rearrange(F - K.dense(), d_out, d_in), N * covariance)
error = (F - K.dense()).norm()
assert abs(error - N * covariance.norm()) <= 1e-10 * error
print(f"‖F − B ⊗ A‖ = {error:.6f},  N ‖Cov‖ = {N * covariance.norm():.6f}")

# %% [markdown]
# For one entry of each, the covariance is an average of signed areas: datum $n$ adds the rectangle between its point
# and the point of the means.

# %% tags=["hide-input"] alt="Two panels with a point for each of 40 data: an entry of A_n to the right, an entry of B_n upward. From the point of the means to each datum there is a rectangle, blue where the product of the deviations is positive and orange where it is negative. Left, a layer of a tanh network: the points rise, and blue areas outweigh orange ones. Right, a layer of a deep linear network: all points lie on a horizontal line and there are no areas." caption="The sum of the signed areas is one entry of $F - B \\otimes A$. Left, a layer of a network with tanh, and the pair of entries with the largest error. Right, a deep linear network with squared error: $B_n$ does not vary, so there is no area."
many, targets_ = 2 * torch.randn(40, 5), torch.randn(40, 3)
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.2), layout="constrained")
for ax, (title, kind) in zip(axes, {"tanh": Tanh, "linear": None}.items(), strict=True):
    layer = layer_ios(mlp(5, 4, 3, activation=kind), MSELoss(), many, targets_)["0"]
    every_A = vec(torch.einsum("nsi,nsj->nij", layer.a, layer.a))
    every_B = vec(torch.einsum("vnso,vnsp->nop", layer.g, layer.g))
    lost = rearrange(layer.block() - kfac(layer).dense(), 4, 6)
    if title == "tanh":
        row, column = divmod(lost.abs().argmax().item(), lost.shape[1])
    x, z = every_A[:, column], every_B[:, row]
    areas = (x - x.mean()) * (z - z.mean())
    assert abs(areas.sum() - lost[row, column]) < 1e-10 * every_B.abs().max()  # (5.6), one entry
    for x_n, z_n, area in zip(x.tolist(), z.tolist(), areas.tolist(), strict=True):
        corner = (x.mean().item(), z.mean().item())
        colour = "C0" if area > 0 else "C1"
        size = (x_n - corner[0], z_n - corner[1])
        ax.add_patch(plt.Rectangle(corner, *size, color=colour, alpha=0.12, linewidth=0))
    ax.plot(x.cpu(), z.cpu(), "o", color="C2", markersize=4)
    ax.set(title=f"{title}: signed area {abs(areas.sum().item()):.2f}", xlabel="entry of $A_n$")
    ax.ticklabel_format(useOffset=False)
axes[0].set_ylabel("entry of $B_n$")
axes[1].set_ylim(0, 2 * every_B[:, row].abs().max().item() + 1e-3)
plt.show()

# %% [markdown]
# Take a layer with two inputs and two outputs, six inputs $a$ and six vectors $g$. The slider decides which $a$ is
# paired with which $g$. At the left end every $a$ is paired with every $g$ equally often, nothing is correlated, and
# KFAC is exact. At the right end the longest input is always paired with the longest vector. $A$ depends on the inputs
# alone and $B$ on the vectors alone, so they never change, and the whole change of $F$ becomes KFAC's error.

# %% tags=["hide-input"]
source = torch.Generator(torch.get_default_device()).manual_seed(4)
few_a, few_g = torch.randn(6, 2, generator=source) + 0.4, torch.randn(6, 2, generator=source)
matched_pairs(few_a, few_g, share=0.6)

# %% [markdown]
# The norm of the error can be computed without the block. Inner products between data are enough, and here these are
# squares of inner products of vectors:
#
# $$
# \begin{aligned}
# \langle B_n \otimes A_n, B_m \otimes A_m \rangle
# &= \langle B_n, B_m \rangle \langle A_n, A_m \rangle, \\
# \langle A_n, A_m \rangle &= (a_n^\top a_m)^2, \\
# \langle B_n, B_m \rangle &= \sum_{v, w} (g_{vn}^\top g_{wm})^2.
# \end{aligned}
# \tag{5.7}
# $$
#
# So $\lVert F \rVert^2$ is the sum over $n$ and $m$ of the products of two $N \times N$ tables, and
# $\lVert F - B \otimes A \rVert^2$ is the same with one table centred: the means of its rows and
# of its columns are subtracted, and the mean of all its entries is added back. We can measure
# KFAC's error on wide layers without ever forming their block.


# %%
def error_without_block(io: LayerIO) -> float:
    """Relative error of KFAC from inner products between data (one position only)."""
    a, g = io.a.squeeze(1), io.g.squeeze(2)
    table_A = (a @ a.T).square()  # [N, N]
    table_B = torch.zeros_like(table_A)
    for gv in g:
        table_B += torch.einsum("no,wmo->wnm", gv, g).square().sum(0)
    mean = table_A.mean(0)
    centred = table_A - mean - mean[:, None] + mean.mean()
    return ((centred * table_B).sum().clamp(min=0) / (table_A * table_B).sum()).sqrt().item()


assert abs(error_without_block(io) - relative_error(K.dense(), F)) < 1e-10

# %% [markdown]
# ## Where KFAC is exact
#
# Each of the following follows from [Theorem 5.1] by asking: what does not vary with $n$?
#
# **A single datum.** With $N = 1$ nothing varies, so that KFAC is exact for any activations, any loss and any kind of
# vectors. A test with $N = 1$ is tempting for this reason, and weak: it does not test how data are averaged, as the
# section on pitfalls below shows.

# %%
for loss, target in ((CrossEntropyLoss(), torch.tensor([1])), (MSELoss(), torch.rand(1, 3))):
    for fisher in (None, empirical, monte_carlo(2)):
        chosen = {} if fisher is None else {"fisher": fisher}
        for layer in layer_ios(mlp(5, 4, 6, 3), loss, X[:1], target, **chosen).values():
            assert_exact(kfac(layer).dense(), layer.block())

# %% [markdown]
# **Deep linear networks with squared error.** Let $f_n = W_L \cdots W_1 x_n$, possibly with
# biases. The Jacobian of $f_n$ with respect to $z_n$, the output of layer $l$, is
# $J = W_L \cdots W_{l+1}$ for every datum, and the Hessian of the squared error with respect to
# $f_n$ is $\tfrac{2}{D} I$ for every datum. The type-2 vectors are $J^\top$ times the columns of a
# square root of that Hessian, hence
#
# $$
# B_n = \sum_v g_{vn} g_{vn}^\top = J^\top \Bigl(\frac{2}{D} I\Bigr) J,
# \tag{5.8}
# $$
#
# in which nothing depends on $n$.
#
# <div class="admonition theorem" markdown="1" id="thm-5.2">
# <p class="admonition-title" markdown="1"><b>Theorem 5.2 (deep linear networks)</b></p>
#
# For a network of linear layers without activations, each of which is used once for every datum, and for `MSELoss`,
# with mean or sum, with or without biases and for every $N$, type-2 KFAC equals every layer's block of the GGN.
#
# </div>
#
# This theorem is the best test of an implementation: all sizes may differ, $N$ may be large, and a wrong factor of two
# or $N$ or $C$ is found. The cell's last lines use one layer twice. Then its gradient is a sum over two positions, and
# KFAC is not exact, not even for a single datum ([Chapter 6](06_weight_sharing.py) has settings for that).

# %%
for reduction in ("mean", "sum"):
    for bias in (True, False):
        for size in (1, 2, 11):
            linear, loss = mlp(5, 4, 6, 3, activation=None, bias=bias), MSELoss(reduction=reduction)
            X, y = torch.rand(size, 5), torch.rand(size, 3)
            exact = diagonal_blocks(linear, ggn(linear, loss, X, y))
            for name, layer in layer_ios(linear, loss, X, y).items():
                assert_exact(kfac(layer).dense(), exact[name])
print("exact: mean and sum, with and without bias, N = 1, 2, 11")

again = Linear(4, 4)
tied = Sequential(Linear(5, 4), again, again, Linear(4, 3))  # deep and linear, a layer used twice
for size in (1, 11):
    X, y = torch.rand(size, 5), torch.rand(size, 3)
    twice = layer_ios(tied, MSELoss(), X, y)["1"]
    for name, setting in {"expand": kfac(twice), "reduce": kfac(twice.reduced())}.items():
        off = relative_error(setting.dense(), twice.block())
        print(f"used twice, N = {size:2}, {name}: error {off:.2f}")
        assert off > 0.05

# %% [markdown]
# **The last layer with squared error**, in *any* network. Nothing comes after it, so $J = I$ in
# [(5.8)] even if everything before it is nonlinear. The other layers of the same network are
# not exact:

# %%
nonlinear, loss = mlp(5, 4, 6, 3), MSELoss()
X, y = torch.randn(11, 5), torch.randn(11, 3)
for name, layer in layer_ios(nonlinear, loss, X, y).items():
    error = relative_error(kfac(layer).dense(), layer.block())
    print(f"layer {name}: relative error {error:.1e}")
    if name == "4":
        assert_exact(kfac(layer).dense(), layer.block())
    else:
        assert error > 0.01

# %% [markdown]
# **Data that the first layer cannot tell apart.** The theorems so far need squared error. Here is
# one for any nonlinearity, and any loss whose Hessian does not depend on the target, like those of
# [Chapter 3](03_losses.py) without class weights. If the first layer $W_0$ has more inputs than
# outputs, there are directions that it maps to zero. Move the inputs along these only,
#
# $$
# x_n = x_0 + U c_n, \qquad W_0 U = 0,
# \tag{5.9}
# $$
#
# and the output of the first layer is the same for all $n$. Then so are all later activations,
# the logits, the Hessian of the loss, and every Jacobian. For the first layer $B_n$ does not vary,
# although $A_n$ does, as much as you like. For the later layers nothing varies. For the empirical
# Fisher KFAC is exact, too, if all targets are the same.


# %%
def indistinguishable(first: Linear, N: int) -> Tensor:
    """Inputs that differ, but not for a layer with fewer outputs than inputs."""
    U = torch.linalg.svd(first.weight.detach()).Vh[first.out_features :]  # rows span the null space
    return torch.rand(first.in_features) + torch.randn(N, len(U)) @ U


deep = mlp(9, 4, 6, 3)
X = indistinguishable(deep[0], 11)
same, other = torch.full((11,), 2), torch.arange(11) % 3
for loss in (CrossEntropyLoss(), CrossEntropyLoss(reduction="sum")):
    for layer in layer_ios(deep, loss, X, other).values():
        assert_exact(kfac(layer).dense(), layer.block())
    for layer in layer_ios(deep, loss, X, same, empirical).values():
        assert_exact(kfac(layer).dense(), layer.block())

wrong = layer_ios(deep, loss, X, other, empirical)["0"]
print(f"empirical, targets vary: {relative_error(kfac(wrong).dense(), wrong.block()):.3f}")
assert relative_error(kfac(wrong).dense(), wrong.block()) > 0.01

# %% [markdown]
# **The biases**, in any network, with any loss, for any $N$. The input that belongs to the bias is
# always one, so the corner entry of $A_n$ does not vary. Pick the rows and columns of $F$ that
# belong to the bias, the last entry of every row of $W$. By [(5.2)] they form, with the index $-1$ for the last row
# and column,
#
# $$
# F_\text{bias} = \sum_n B_n (A_n)_{-1,-1} = \sum_n B_n = B = A_{-1,-1} B.
# \tag{5.10}
# $$
#
# So whenever KFAC is used for a bias *alone*, there is no approximation within the block. And you
# can test the factor $B$ of any implementation on any nonlinear network.

# %%
X, y, loss = torch.randn(11, 5), torch.randint(3, (11,)), CrossEntropyLoss()
exact = diagonal_blocks(nonlinear, ggn(nonlinear, loss, X, y))
for name, layer in layer_ios(nonlinear, loss, X, y).items():
    d_in = layer.a.shape[-1]
    bias = slice(d_in - 1, None, d_in)  # the last entry of every row of W
    K = kfac(layer)
    assert_exact(K.A[-1, -1] * K.B, exact[name][bias, bias])
    whole = relative_error(K.dense(), exact[name])
    print(f"layer {name}: bias block exact, whole block {whole:.3f} off")
    assert whole > 0.01

# %% [markdown]
# ## Where it is not
#
# What happens without the conditions of [Theorem 5.2]? Two were used in its proof:
# constant Jacobians and a constant Hessian of the loss. Take away one at a time.
#
# *Cross-entropy instead of squared error.* The network is still linear, so the Jacobians are
# constant, but the Hessian $\operatorname{diag}(p_n) - p_n p_n^\top$ depends on the predicted
# probabilities and so on the datum. *Tanh instead of nothing.* The loss has a constant Hessian,
# but the derivatives of the activations depend on the datum.


# %%
def errors(model: Module, loss: Module, X: Tensor, y: Tensor) -> list[float]:
    ios = layer_ios(model, loss, X, y)
    return [relative_error(kfac(io).dense(), io.block()) for io in ios.values()]


X = 2 * torch.randn(50, 5)
linear = mlp(5, 4, 6, 3, activation=None)
for parameter in (*linear.parameters(), *nonlinear.parameters()):
    parameter.data *= 2  # predictions that are not all alike
targets, classes = torch.randn(50, 3), torch.randint(3, (50,))
table = {
    "linear, squared error": errors(linear, MSELoss(), X, targets),
    "linear, cross-entropy": errors(linear, CrossEntropyLoss(), X, classes),
    "tanh,   squared error": errors(nonlinear, MSELoss(), X, targets),
    "tanh,   cross-entropy": errors(nonlinear, CrossEntropyLoss(), X, classes),
}
for regime, row in table.items():
    print(regime, "  ".join(f"{error:8.1e}" for error in row))
assert max(table["linear, squared error"]) < 1e-10
assert min(table["linear, cross-entropy"]) > 0.05
assert min(table["tanh,   squared error"][:-1]) > 0.05
assert table["tanh,   squared error"][-1] < 1e-10
assert min(table["tanh,   cross-entropy"]) > 0.05

# %% [markdown]
# There is one column per layer. These errors are not small. The factors keep how the entries of a layer's input vary
# together, and how those of the vectors at its output do. They do not keep which inputs came with which vectors.

# %% [markdown]
# ## How wrong on real data?
#
# How does the error depend on the network and on the number of data? We classify the digits
# ($8 \times 8$ pixels, ten classes) with networks of different width and depth, before and
# after a short training, and measure each layer with [(5.7)], on up to 256 images.


# %%
def train(model: Module, X: Tensor, y: Tensor, steps: int = 60) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        CrossEntropyLoss()(model(X), y).backward()
        optimizer.step()


def errors_of(model: Module, N: int) -> list[float]:
    ios = layer_ios(model, CrossEntropyLoss(), images[:N], labels[:N])
    return [error_without_block(io) for io in ios.values()]


# %%
def network(width: int, depth: int) -> Sequential:
    return mlp(64, *[width] * (depth - 1), 10)


networks = {("width", w): network(w, 3) for w in (5, 10, 20, 40)}
networks |= {("depth", d): network(20, d) for d in (1, 2, 4, 8)}
before = {key: errors_of(model, 128) for key, model in networks.items()}
for model in networks.values():
    train(model, images[:500], labels[:500])
after = {key: errors_of(model, 128) for key, model in networks.items()}

sizes, example = [1, 2, 4, 8, 16, 32, 64, 128, 256], networks["width", 20]
for N in sizes:
    after["N", N] = errors_of(example, N)
with torch.no_grad():
    hits = (example(images[500:]).argmax(1) == labels[500:]).double().mean().item()
print(f"three layers of width 20: {hits:.0%} of unseen digits are right")
assert hits > 0.8

# %% tags=["hide-input"] alt="Three plots of the relative error of KFAC: against the width of the hidden layers, against the number of layers, and against the number of data. In the first two, the error before training is near zero and the error after training is large, and it grows slowly with width and depth. In the third, the error is zero for one datum, rises over the first few, and then falls slowly." caption="Relative error of KFAC on digits. Lines are means over the layers of a network, bands reach from the best to the worst layer. The right panel shows the three layers of one trained network."
fig, axes = plt.subplots(1, 3, figsize=(9.4, 3.1), sharey=True)
for ax, kind in zip(axes, ("width", "depth"), strict=False):
    for label, measured in (("untrained", before), ("trained", after)):
        x = [size for k, size in measured if k == kind]
        rows = [measured[kind, size] for size in x]
        (line,) = ax.plot(x, [sum(row) / len(row) for row in rows], "o-", label=label)
        low, high = [min(row) for row in rows], [max(row) for row in rows]
        ax.fill_between(x, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(x, labels=x)
    ax.set_xlabel({"width": "width (3 layers)", "depth": "layers (width 20)"}[kind])
axes[0].set(ylabel="relative error of KFAC", ylim=(0, 1))
axes[0].legend()
for layer, row in enumerate(zip(*(after["N", N] for N in sizes), strict=True), 1):
    axes[2].semilogx(sizes, row, "o-", base=2, label=f"layer {layer}")
axes[2].set_xticks(sizes[::2], labels=sizes[::2])
axes[2].set_xlabel("data $N$")
axes[2].legend()
plt.show()

mean = {key: sum(row) / len(row) for key, row in after.items()}
start = {key: sum(row) / len(row) for key, row in before.items()}
trained = [mean[key] for key in start]
print(f"mean error after training: {min(trained):.0%} to {max(trained):.0%}")
assert min(trained) > 0.1
assert all(mean[key] > 3 * start[key] for key in start)  # training matters most
assert max(mean[key] for key in start) < 3 * min(mean[key] for key in start)
assert max(after["N", 1]) < 1e-7
assert min(after["N", 2]) > 0.05

# %% [markdown]
# Training matters far more than width or depth. [Theorem 5.1] says why. An untrained
# network predicts nearly the same probabilities for every image, so $B_n$ hardly varies, and what
# does not vary cannot be correlated. The trained network is sure about most images. For those the
# Hessian $\operatorname{diag}(p_n) - p_n p_n^\top$ is nearly zero, and most of $B$ comes from the
# images whose predictions are still unsure. We can count them: $(\sum_n t_n)^2 / \sum_n t_n^2$ with
# $t_n = \operatorname{tr} B_n$ is $N$ if all contribute alike and 1 if one contributes everything.


# %%
def contributing(model: Module, N: int) -> float:
    g = layer_ios(model, CrossEntropyLoss(), images[:N], labels[:N])["4"].g
    t = g.square().sum((0, 2, 3))  # the trace of every B_n
    return (t.sum() ** 2 / t.square().sum()).item()


fresh = network(20, 3)
few, all_of_them = contributing(example, 128), contributing(fresh, 128)
print(f"of 128 images, {all_of_them:.0f} contribute before training and {few:.0f} after")
assert few < 0.5 * 128 < 0.9 * 128 < all_of_them

# %% [markdown]
# ## The whole network
#
# There is a second approximation, made before the first one: layers are treated one at a time.
# The GGN of a network has blocks for every *pair* of layers, which show how a change in one layer
# alters the slope for another. As in [Chapter 4](04_layer_io.py), they come from the same
# gradients.

# %%
X, y, loss = 2 * torch.randn(20, 5), torch.randint(3, (20,)), CrossEntropyLoss()
ios = layer_ios(nonlinear, loss, X, y)
gradients = torch.cat([vec(io.gradients()).flatten(0, 1) for io in ios.values()], dim=1)

places = torch.cat([W.flatten() for W in block_index(nonlinear).values()])
G = ggn(nonlinear, loss, X, y)[places][:, places]  # layer by layer, the bias a column of W
assert_exact(gradients.T @ gradients, G)

diagonal = torch.block_diag(*(io.block() for io in ios.values()))
K = torch.block_diag(*(kfac(io).dense() for io in ios.values()))
print(f"error of dropping the pairs of layers: {relative_error(diagonal, G):.2f}")
print(f"error of KFAC:                         {relative_error(K, G):.2f}")
assert 0.1 < relative_error(diagonal, G) < relative_error(K, G)

# %% tags=["hide-input"] alt="Three heat maps of 75 by 75 entries. The exact generalised Gauss-Newton matrix is filled everywhere. In the second, only the three blocks on the diagonal are left. The third, KFAC, has the same three blocks with a more regular pattern in them." caption="The curvature of a network with three layers. First the blocks between layers are dropped, then each block on the diagonal becomes a Kronecker product. (Colours end at a quarter of the largest entry.)"
stages = {"exact GGN": G, "block diagonal": diagonal, "KFAC": K}
matrices(stages, scale=G.abs().max().item() / 4)

# %% [markdown]
# The two errors are perpendicular to each other: one lies outside the diagonal blocks, one inside.
# So their squares add up, and neither can make up for the other. The exactness theorems above
# are about the blocks on the diagonal only. Even where KFAC is exact in that sense, as for deep
# linear networks, the blocks between layers are not zero:

# %%
first, second = relative_error(diagonal, G), (diagonal - K).norm() / G.norm()
assert abs(first**2 + second**2 - relative_error(K, G) ** 2) < 1e-10

ios = layer_ios(linear, MSELoss(), X, torch.zeros(20, 3))
gradients = torch.cat([vec(io.gradients()).flatten(0, 1) for io in ios.values()], dim=1)
K = torch.block_diag(*(kfac(io).dense() for io in ios.values()))
assert_exact(K, torch.block_diag(*(io.block() for io in ios.values())))
assert relative_error(K, gradients.T @ gradients) > 0.1

# %% [markdown]
# ## Sampled vectors
#
# So far the vectors were *type-2*, an exact square root of the loss Hessian. [Chapter 3](03_losses.py) also draws
# labels from the model and sends back the gradients at those, $M$ for each datum, with an error that falls like
# $1 / \sqrt M$. In KFAC only $B$ is affected, and $B \otimes A$ is linear in $B$, so that
#
# $$
# \mathbb{E}[\hat B \otimes A] = \mathbb{E}[\hat B] \otimes A = B \otimes A.
# \tag{5.11}
# $$
#
# **The expectation of Monte Carlo KFAC is type-2 KFAC**, not the exact block. How
# fast does the error fall? Let datum $n$ have the vector $h_{cn}$ for label $c$, with probability
# $p_{cn}$. One sample of $\hat B$ is $\sum_n h_{c_n n} h_{c_n n}^\top$ with independent labels
# $c_n$. The variances of its entries add up to
#
# $$
# \begin{aligned}
# \sigma^2 &= \sum_n \Bigl(\sum_c p_{cn} \lVert h_{cn} \rVert^4 - \lVert B_n \rVert^2\Bigr)
# = \sum_n \Bigl(\sum_c \frac{\lVert g_{cn} \rVert^4}{p_{cn}} - \lVert B_n \rVert^2\Bigr), \\
# \mathbb{E} \lVert \hat B \otimes A - B \otimes A \rVert^2
# &= \frac{1}{M} \sigma^2 \lVert A \rVert^2
# \end{aligned}
# \tag{5.12}
# $$
#
# for $M$ samples. The second form has another root of the loss Hessian, whose column for class $c$ gives
# $g_{cn} = \sqrt{p_{cn}}\, h_{cn}$ up to its sign: that of `type2_classwise`, which is as exact for a loss
# with one label for each datum. So the error to expect is known in advance.

# %%
N, loss = 64, CrossEntropyLoss()
X, y = images[:N], labels[:N]
io = layer_ios(example, loss, X, y, type2_classwise)["2"]
F, K = io.block(), kfac(io)

with torch.no_grad():
    p = example(X).softmax(1)  # [N, C]
g = io.g.squeeze(2)  # [C, N, d_out]
fourth = (g.square().sum(-1) ** 2 / p.T).sum()
squares = torch.einsum("vno,wno->nvw", g, g).square().sum()  # of the norms of all B_n
sigma = (fourth - squares).sqrt()

generator = torch.Generator(device=X.device).manual_seed(0)


def sampled(M: int) -> LayerIO:
    return layer_ios(example, loss, X, y, monte_carlo(M, generator), layers=["2"])["2"]


# %% [markdown]
# Now the check. By Chebyshev's inequality, the distance of $\hat B$ from its mean exceeds
# $5 \sigma / \sqrt{M}$ with a probability of at most $1/5^2$, four percent. With many samples this is
# a small distance, and a factor of two in the scale would be outside:

# %%
M = 4000
bound = 5 * sigma / M**0.5
distance = (kfac(sampled(M)).B - K.B).norm()
print(f"distance {distance:.2e}, bound {bound:.2e}, norm of B {K.B.norm():.2e}")
assert distance <= bound < K.B.norm() / 2  # half or twice B would fail
assert_exact(kfac(sampled(1)).A, K.A)

# %% tags=["hide-input"]
counts, repeats = [1, 2, 4, 8, 16, 32, 64], 12
to_kfac, to_exact = [], []
for M in counts:
    squared = torch.zeros(2)
    for _ in range(repeats):
        sample = torch.kron(kfac(sampled(M)).B, K.A)
        squared += torch.stack([(sample - K.dense()).norm() ** 2, (sample - F).norm() ** 2])
    rms = (squared / repeats).sqrt() / F.norm()
    to_kfac.append(rms[0].item())
    to_exact.append(rms[1].item())

# %% tags=["hide-input"] alt="Double logarithmic plot against the number of samples M from 1 to 64. The distance of sampled KFAC from type-2 KFAC falls on the predicted line with slope minus one half. The distance from the exact block levels off at the error of KFAC itself, drawn as a horizontal line." caption="Sampling error falls as $1 / \\sqrt{M}$, as [(5.12)] predicts. The distance to the exact block does not: what remains is KFAC's own error, which no number of samples removes."
predicted = [(sigma * K.A.norm() / F.norm() / M**0.5).item() for M in counts]
own = relative_error(K.dense(), F)
fig, ax = plt.subplots(figsize=(6.4, 3.4))
ax.loglog(counts, to_kfac, "o", label="distance to type-2 KFAC")
ax.loglog(counts, predicted, "--", color=ax.lines[0].get_color(), label="predicted")
ax.loglog(counts, to_exact, "s-", label="distance to the exact block")
ax.axhline(own, color=ax.lines[2].get_color(), linestyle=":", label="KFAC's own error")
ax.set(xlabel="samples $M$", ylabel="relative to the exact block")
ax.set_xticks(counts, labels=counts)
ax.set_yticks([0.25, 0.5, 1, 2], labels=[0.25, 0.5, 1, 2])
ax.minorticks_off()
ax.legend()
plt.show()
expected = [(own**2 + e**2) ** 0.5 for e in predicted]
assert all(0.5 < t / e < 2 for t, e in zip(to_kfac, predicted, strict=True))
assert all(0.5 < t / e < 2 for t, e in zip(to_exact, expected, strict=True))
enough = (predicted[0] / own) ** 2
print(f"sampling is as wrong as KFAC itself with M = {enough:.1f} samples,")
print(f"and {enough**0.5:.1f} times as wrong with one")
assert enough > 1  # a single sample does not reach it

# %% [markdown]
# The two errors add in squares, because the sampling error has mean zero. Beyond the printed
# number of samples most of the error is KFAC's own, and more samples reduce it little. With a single one,
# the usual choice in training, sampling dominates on this small batch. Larger batches help, as
# [(5.12)] has more data to average over, and so does averaging the factors over steps, which is what
# optimisers do.
#
# ## The empirical Fisher is another matrix
#
# The gradients that training computes anyway, at the labels of the *data*, give KFAC of the empirical Fisher.
# [Chapter 3](03_losses.py) shows why that is another matrix. Two errors add up here: that of KFAC, and the distance of
# the two matrices.

# %%
io = layer_ios(example, loss, X, y, empirical)["2"]
E, KE = io.block(), kfac(io).dense()
assert_exact(E, diagonal_blocks(example, empirical_fisher(example, loss, X, y))["2"])
print(f"empirical Fisher from the Fisher:      {relative_error(E, F):.2f}")
print(f"its KFAC from the empirical Fisher:    {relative_error(KE, E):.2f}")
print(f"its KFAC from the Fisher:              {relative_error(KE, F):.2f}")
print(f"KFAC of the Fisher from the Fisher:    {relative_error(K.dense(), F):.2f}")
assert min(relative_error(E, F), relative_error(KE, E), relative_error(KE, F)) > 0.05

# %% [markdown]
# ## Without $B$
#
# How much does each factor contribute? [Benzing (2022)](bibliography.md#foof) leaves $B$ out and
# keeps $I \otimes A$. Its damped inverse acts on a gradient from the right only,
#
# $$
# (I \otimes A + \delta I)^{-1} \operatorname{vec}(V) = \operatorname{vec}\bigl(V (A + \delta I)^{-1}\bigr).
# \tag{5.13}
# $$
#
# The paper calls it FOOF and reports that it often trains at least as well. It needs no vectors $g$
# at all. It is not an approximation of the block: its scale does not depend on the loss.

# %% tags=["remove-input"]
code(foof)

# %%
X, y = torch.randn(11, 5), torch.randint(3, (11,))
io = layer_ios(nonlinear, CrossEntropyLoss(), X, y)["2"]
V = torch.randn(6, 5)
A = kfac(io).A
assert_exact(foof(io).inverse(0.1) @ V, V @ torch.linalg.inv(A + 0.1 * eye_like(A)))
doubled = LayerIO(io.a, 2 * io.g)  # a loss four times as large
assert_exact(kfac(doubled).dense(), 4 * kfac(io).dense())
assert_exact(foof(doubled).dense(), foof(io).dense())

# %% [markdown]
# ## All of the data
#
# A data set does not fit into one batch. How are the factors of batches combined? Let batch $k$
# have $N_k$ data and a loss that is a mean over $D_k$ terms. The loss of everything is a mean over
# $D = \sum_k D_k$ terms, so the vectors of batch $k$, which carry $1/\sqrt{D_k}$, need
# $1/\sqrt{D}$ instead:
#
# $$
# B = \sum_k \frac{D_k}{D} B_k,
# \qquad
# A = \sum_k \frac{N_k}{N} A_k.
# \tag{5.14}
# $$
#
# Batches count by their size. In a stream one does not know $D$ before the end, so the package
# undoes the division of every batch, adds up, and divides once:

# %% tags=["remove-input"]
code(kfac_over, FactorSums)

# %%
loss, X, y = CrossEntropyLoss(), images[:64], labels[:64]
whole = {name: kfac(io) for name, io in layer_ios(example, loss, X, y).items()}
unequal = list(zip(X.split([40, 20, 4]), y.split([40, 20, 4]), strict=True))
over = kfac_over(example, loss, unequal, progress=False)
for name, K in whole.items():
    assert_exact(over[name].dense(), K.dense())

# %% [markdown]
# A small last batch is where an implementation with equal weights goes wrong. It is the same
# mistake as to average the accuracies of batches, and it goes unnoticed as long as the size of
# the data set is a multiple of the size of the batch:


# %%
def equal_weights(batches: list[tuple[Tensor, Tensor]], name: str) -> Tensor:
    parts = [kfac(layer_ios(example, loss, *batch)[name]) for batch in batches]
    B, A = torch.stack([K.B for K in parts]).mean(0), torch.stack([K.A for K in parts]).mean(0)
    return torch.kron(B, A)


equal = list(zip(X.split(16), y.split(16), strict=True))
for name in ("2", "4"):
    exact = whole[name].dense()
    assert_exact(equal_weights(equal, name), exact)
    error = relative_error(equal_weights(unequal, name), exact)
    print(f"layer {name}: equal weights for batches of 40, 20 and 4 are {error:.0%} off")
    assert error > 0.01

# %% [markdown]
# ## What goes wrong in practice
#
# Many mistakes with KFAC are mistakes of scale, and training hides them, because step size and damping
# can be tuned until they cancel. The test with [Theorem 5.2] finds them. Here are six wrong
# versions for one layer of a deep linear network with squared error. Next to $N = 11$ we try the
# test with a single datum.


# %%
def mistakes(model: Module, name: str, X: Tensor, y: Tensor) -> dict[str, Tensor]:
    loss = MSELoss()
    io = layer_ios(model, loss, X, y)[name]
    N, C = y.shape
    A, B = kfac(io).A, kfac(io).B
    no_bias = io.a * torch.cat([torch.ones(io.a.shape[-1] - 1), torch.zeros(1)])
    label = kfac(layer_ios(model, loss, X, y, empirical)[name])
    return {
        "correct": torch.kron(B, A),
        "loss with ½ in front": torch.kron(B / 2, A),
        "divided by N, not N C": torch.kron(C * B, A),
        "empirical, not Fisher": label.dense(),
        "A is a sum": torch.kron(B, N * A),
        "factors in wrong order": torch.kron(A, B),
        "bias column of zeros": kfac(LayerIO(no_bias, io.g)).dense(),
    }


linear = mlp(5, 4, 6, 3, activation=None)
X, y = torch.randn(11, 5), torch.randn(11, 3)
found = {}
for size in (1, 11):
    io = layer_ios(linear, MSELoss(), X[:size], y[:size])["1"]
    for mistake, wrong in mistakes(linear, "1", X[:size], y[:size]).items():
        found[mistake, size] = relative_error(wrong, io.block())
for mistake in mistakes(linear, "1", X, y):
    print(f"{mistake:24} N = 1: {found[mistake, 1]:8.1e}   N = 11: {found[mistake, 11]:8.1e}")

several = {mistake: error for (mistake, size), error in found.items() if size == 11}
assert several.pop("correct") < 1e-10
assert min(several.values()) > 0.05
assert found["A is a sum", 1] < 1e-10  # a single datum does not see it
assert min(found[mistake, 1] for mistake in several if mistake != "A is a sum") > 0.05

# %% [markdown]
# With a single datum the mistake "A is a sum" passes, and so would every other mistake in an average over data.
#
# **Half the squared error or all of it?** `MSELoss` has no $\tfrac12$ in front, so its Hessian is
# $2 I / D$. Texts that start from $\tfrac12 \lVert f - y \rVert^2$ get $I / D$. Both are right
# about their own loss; a comparison has to know which one is meant.
#
# **Divided by what?** `MSELoss()` averages over all $N C$ entries of the output, not over the $N$
# data. [Chapter 36](36_museum.py) shows a library that got this wrong.
#
# **The empirical Fisher taken for the Fisher.** Reading the factors off an ordinary backward pass
# gives the empirical one. A library may choose that; its users should know
# ([a question to kfac-pytorch](https://github.com/gpauloski/kfac-pytorch/issues/109)).
#
# **Gradients of a mean taken for gradients of a datum.** [Chapter 4](04_layer_io.py) shows that a
# factor $B$ made of these is too small by $N$ or $N^2$.
#
# **Equal weights for unequal batches**, as above. Test with a last batch that is smaller.
#
# ## In one minute
#
# - KFAC, Kronecker-factored approximate curvature, replaces an average of products $B_n \otimes A_n$ by the product of
#   the averages: $B = \sum_{v, n} g_{vn} g_{vn}^\top$ and $A = \frac1N \sum_n a_n a_n^\top$.
# - Its error is $N$ times the covariance of the entries of $B_n$ with those of $A_n$.
# - If every layer is used once, it is exact for one datum, for deep linear networks with squared error, and for the
#   last layer with squared error. Test with the second of these.
# - On real data a block is wrong by tens of per cent after training, and steps are useful all the same.
# - With sampled vectors the expectation is KFAC, not the block. The empirical Fisher is another matrix.
#
# ## Exercises
#
# **Exercise 5.1.** Is the trace of $B \otimes A$ that of $F$? Show that the difference is $N$
# times the covariance of two numbers, and that it vanishes if all inputs have the same length.
# What does this say about $F - B \otimes A$ for such inputs: can KFAC be a bound on $F$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The trace of a Kronecker product is the product of the traces, so
# $\operatorname{tr} F = \sum_n \operatorname{tr} B_n \operatorname{tr} A_n$ and
# $\operatorname{tr}(B \otimes A) = N\, \mathbb{E}[\operatorname{tr} B_n]\, \mathbb{E}[\operatorname{tr} A_n]$.
# The difference is $N \operatorname{Cov}(\sum_v \lVert g_{vn} \rVert^2, \lVert a_n \rVert^2)$. With
# inputs of equal length it is zero. Then the eigenvalues of $F - B \otimes A$ add up to zero, so
# unless KFAC is exact there are positive and negative ones: neither matrix bounds the other.
#
# </details>
#
# **Exercise 5.2.** By [(5.5)], the Kronecker product nearest to $F$ is found by the singular value
# decomposition of $\mathcal{R}(F)$. Compute its error. How much worse is KFAC?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# A Kronecker product becomes a matrix of rank one, and $\mathcal{R}$ keeps the norm. The nearest
# matrix of rank one is the leading term of the singular value decomposition; the error is the
# root of the sum of squares of all other singular values. It can only be smaller than KFAC's.
#
# </details>
#
# **Exercise 5.3.** Let data be split into batches of equal size, and average the *products*
# $B_k \otimes A_k$ instead of the factors. What do you get with batches of one datum? Why does
# nobody do it?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With one datum per batch every product is exact, and so is their average: it is $F$, by [(5.2)].
# But it is a sum of Kronecker products again, which can neither be stored in two factors nor
# inverted by inverting two factors. The error of the average is the covariance *within* batches.
#
# </details>
#
# **Exercise 5.4.** Is there a network whose *whole* GGN, pairs of layers included, equals KFAC for
# any number of data?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# A network of a single linear layer with squared error. There is no other layer, and the last
# layer is exact.
#
# </details>
#
# **Exercise 5.5 (write it).** Write two functions with torch alone, for one position: `factors(a, g)` returns $A$ and
# $B$ from $a$ of shape $[N, d_\text{in}]$ and $g$ of shape $[V, N, d_\text{out}]$, and `step(A, B, G, damping)`
# returns $(B \otimes A + \delta I)^{-1} \operatorname{vec}(G)$ as a matrix, without a matrix larger than $A$, $B$ or
# $G$. The cell below has `check_kfac`, which tests yours with [Theorem 5.2], and a solution.
#
# The solutions, checked:

# %% tags=["hide-input"]
io = layer_ios(nonlinear, CrossEntropyLoss(), torch.randn(11, 5), torch.randint(3, (11,)))["0"]
F, K = io.block(), kfac(io).dense()
lengths, sizes_ = io.a.square().sum((1, 2)), io.g.square().sum((0, 2, 3))
covariance = ((lengths - lengths.mean()) * (sizes_ - sizes_.mean())).sum()
assert abs(F.trace() - K.trace() - covariance) < 1e-12 < abs(covariance)

unit = LayerIO(io.a / io.a.norm(dim=-1, keepdim=True), io.g)
gap = unit.block() - kfac(unit).dense()
assert abs(gap.trace()) < 1e-12
assert torch.linalg.eigvalsh(gap)[0] < -1e-6
assert torch.linalg.eigvalsh(gap)[-1] > 1e-6

U, s, Vh = torch.linalg.svd(rearrange(F, 4, 6))
nearest = torch.kron(s[0] * unvec(U[:, 0], 4), unvec(Vh[0], 6))
error = (nearest - F).norm()
assert abs(error - s[1:].norm()) <= 1e-10 * error
assert error < (K - F).norm()
print(
    f"nearest Kronecker product {relative_error(nearest, F):.3f}, KFAC {relative_error(K, F):.3f}"
)

single = [LayerIO(io.a[n : n + 1], io.g[:, n : n + 1]) for n in range(11)]
assert_exact(sum(kfac(part).dense() for part in single), F)  # g carries the 1/N of the average

only, X, y = Sequential(Linear(5, 3)), torch.randn(11, 5), torch.randn(11, 3)
W = block_index(only)["0"].flatten()
io = layer_ios(only, MSELoss(), X, y)["0"]
assert_exact(kfac(io).dense(), ggn(only, MSELoss(), X, y)[W][:, W])
assert len(layer_groups(only)) == 1


def factors(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A solution of Exercise 5.5: data are averaged in A and summed in B."""
    rows = g.flatten(0, 1)  # vectors and data
    return a.T @ a / len(a), rows.T @ rows


def step(A: Tensor, B: Tensor, G: Tensor, damping: float) -> Tensor:
    """A solution of Exercise 5.5: in the eigenbasis of both factors."""
    alpha, QA = torch.linalg.eigh(A)
    beta, QB = torch.linalg.eigh(B)
    scaled = (QB.T @ G @ QA) / (beta[:, None] * alpha + damping)
    return QB @ scaled @ QA.T


def check_kfac(factors, step) -> None:
    for reduction in ("mean", "sum"):
        linear, loss = mlp(5, 4, 6, 3, activation=None), MSELoss(reduction=reduction)
        X, y = torch.rand(11, 5), torch.rand(11, 3)
        exact = diagonal_blocks(linear, ggn(linear, loss, X, y))
        for name, io in layer_ios(linear, loss, X, y).items():
            A, B = factors(io.a[:, 0], io.g[:, :, 0])
            assert_exact(torch.kron(B, A), exact[name])
            G = torch.randn(io.g.shape[-1], io.a.shape[-1])
            system = exact[name] + 0.1 * eye_like(exact[name])
            assert_exact(step(A, B, G, 0.1).flatten(), torch.linalg.solve(system, G.flatten()))


check_kfac(factors, step)
print("Exercises 5.1 to 5.5: all hold")

# %% [markdown]
# ## Further reading
#
# [Martens and Grosse (2015)](bibliography.md#kfac) introduce KFAC; their section 3 has the
# covariance of this chapter in terms of cumulants. [Heskes (2000)](bibliography.md#heskes) had the
# product of averages before. [Kunstner et al. (2019)](bibliography.md#empirical-fisher) on the
# empirical Fisher, [Benzing (2022)](bibliography.md#foof) on doubts about the reasons why KFAC
# works, [the KFAC-from-scratch tutorial](bibliography.md#from-scratch) for the test with deep
# linear networks.
