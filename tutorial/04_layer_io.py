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
# # 4. LayerIO: what flows through a layer
#
# **Part III: KFAC.** What must be recorded while a network runs, so that the curvature of each layer can be computed
# from the record alone?
#
# Two tensors for each layer are enough: $a$, the vectors that the layer's matrix $W$ multiplies, and $g$, the
# derivatives that backward passes bring to the layer's output. [Figure 4.1] shows where they are in a network. KFAC,
# Kronecker-factored approximate curvature, is a function of these two tensors.

# %% tags=["hide-input"]
import copy
import textwrap
import warnings

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from kfac_scratch import curvature
from kfac_scratch.capture import calls
from kfac_scratch.capture import forward_pass as capture
from kfac_scratch.capture.forward_pass import layer_ios, stream
from kfac_scratch.capture.layer_groups import layer_groups, uncovered
from kfac_scratch.capture.layers import input_rows, output_rows, weight_matrix, weight_view
from kfac_scratch.capture.plan import plan
from kfac_scratch.checks import assert_exact, largest_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.losses import divisor, empirical, monte_carlo, type2
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one


EXACT = 1e-10  # what we call equal in float64

# %% tags=["hide-input"] alt="A network from left to right: input x, matrix W1, tanh, matrix W2, loss. Blue arrows to the right carry a1 into W1, z1 out of it, a2 into W2 and z2 into the loss. Orange arrows to the left carry g2 from the loss to the output of W2, and g1 to the output of W1. Below each matrix stands its gradient, G1 as g1 times a1 transposed and G2 as g2 times a2 transposed." caption="The forward pass (blue) brings $a$ to every matrix. A backward pass (orange) brings $g$ to every matrix's output. Their outer product is the gradient."
fig, ax = plt.subplots(figsize=(5.4, 2.5))
boxes = {0.0: "$x$", 2.0: "$W_1$", 4.0: "tanh", 6.0: "$W_2$", 8.0: "loss"}
for at, text in boxes.items():
    frame = {"boxstyle": "round,pad=0.35", "fc": "none"}
    ax.text(at, 0, text, ha="center", va="center", fontsize=13, bbox=frame)
forward, backward = ["$a_1$", "$z_1$", "$a_2$", "$z_2$"], [None, "$g_1$", "", "$g_2$"]
for start, there, back in zip(boxes, forward, backward, strict=False):
    ends = (start + 0.65, start + 1.35)
    for height, (tail, head), colour, text in (
        (0.28, ends, "C0", there),
        (-0.28, ends[::-1], "C1", back),
    ):
        if text is None:
            continue
        arrow = {"arrowstyle": "->", "color": colour, "lw": 2}
        ax.annotate("", xy=(head, height), xytext=(tail, height), arrowprops=arrow)
        ax.text(start + 1, 2.6 * height, text, ha="center", va="center", color=colour, fontsize=14)
for at, layer in ((2.0, 1), (6.0, 2)):
    product = rf"$G_{layer} = g_{layer}\, a_{layer}^\top$"
    ax.text(at, -1.45, product, ha="center", va="center", color="C2", fontsize=13)
    ax.plot([at, at], [-1.15, -0.5], ":", color="C2", linewidth=1.5)
ax.set(xlim=(-0.6, 8.7), ylim=(-1.8, 1.05))
ax.axis("off")
plt.show()

# %% [markdown]
# For every datum $n$, backward passes start with $V$ vectors at the network's output, which are the columns of a square
# root of the loss's Hessian there. They bring $g_{1n}, \dots, g_{Vn}$ to the layer's output. A layer may also use $W$
# at several positions $s$ of a datum, such as the tokens of a sentence. A gradient is then a sum over positions, and
# the layer's exact curvature is a sum over gradients:
#
# $$
# G_{vn} = \sum_s g_{vns}\, a_{ns}^\top,
# \qquad
# \text{block} = \sum_{v, n} \operatorname{vec}(G_{vn}) \operatorname{vec}(G_{vn})^\top .
# $$
#
# Here $\operatorname{vec}$ writes a matrix as one vector, row by row. The curvature matrix is the generalised
# Gauss-Newton matrix (GGN) of [Chapter 2](02_curvature.py): the Hessian of the loss if the network is replaced by its
# linearisation. The *block* of a layer is the part whose rows and columns belong to the layer's parameters. The
# formulas are the same for a perceptron, a convolutional network and a transformer, and for each loss of
# [Chapter 3](03_losses.py).
#
# After this chapter you will be able to
#
# - derive the gradient and the curvature block of any layer that applies a matrix;
# - record $a$ and $g$ of a network by hand, with the right scale;
# - say what a row $a_{ns}$ is for a convolution, an embedding, and a weight that is used twice;
# - name the mistakes that no error message reports: in-place activations, lost calls, mean losses.

# %% [markdown]
# ## A gradient is an outer product
#
# Begin with one datum and one layer, $z = W a$ with $W \in \mathbb{R}^{d_\text{out} \times d_\text{in}}$. The rest
# of the network and the loss turn $z$ into a number $\ell$, the loss of this datum.
# Entry $W_{oi}$ occurs in one output only, $z_o = \sum_i W_{oi} a_i$, so
# $\partial z_k / \partial W_{oi}$ is $a_i$ for $k = o$ and zero for all other $k$. The chain rule
# sums over all entries of $z$ through which $W_{oi}$ can act, and just one term is left:
#
# $$
# \frac{\partial \ell}{\partial W_{oi}}
# = \sum_k \frac{\partial \ell}{\partial z_k} \frac{\partial z_k}{\partial W_{oi}}
# = g_o a_i,
# \qquad g := \frac{\partial \ell}{\partial z} \in \mathbb{R}^{d_\text{out}} .
# \tag{4.1}
# $$
#
# The gradient of a matrix with $d_\text{out} d_\text{in}$ entries is the outer product
# $g a^\top$ of two vectors. Its rank is at most one, whatever the rest of the network looks like.

# %%
d_out, d_in = 3, 4
W = torch.randn(d_out, d_in, requires_grad=True)
a = torch.randn(d_in)

z = W @ a
ell = z.tanh().exp().sum()  # any function of z
g, gradient = torch.autograd.grad(ell, (z, W))

by_hand = torch.zeros(d_out, d_in)
for o in range(d_out):
    for i in range(d_in):
        by_hand[o, i] = g[o] * a[i]

# %% tags=["hide-input"] fold="Checked: the loops give the gradient, and its rank is one"
assert_exact(by_hand, gradient)
print("rank of the gradient:", torch.linalg.matrix_rank(gradient).item())
assert torch.linalg.matrix_rank(gradient) == 1

# %% [markdown]
# **Where is the bias?** A layer with weight $W'$, input $a'$ and bias $b$ computes $z = W' a' + b = [W'\; b]
# \begin{pmatrix} a' \\ 1 \end{pmatrix}$. As in [Chapter 1](01_flattening.py), we call the first factor $W$
# and the second one $a$: the bias is the last column of $W$, and the last entry of $a$ is the constant one.
# Then [(4.1)] contains the bias as well: its gradient is $g \cdot 1$, the last column of $g a^\top$. From
# here on $a$ includes the one and $d_\text{in}$ counts it.

# %% [markdown]
# ## The same matrix at several positions
#
# A linear layer along a sequence applies one $W$ to every token. A convolution applies one $W$ to
# every patch. A layer that a network calls twice applies one $W$ to two inputs. In all these cases
#
# $$
# z_s = W a_s, \qquad s = 1, \dots, S .
# \tag{4.2}
# $$
#
# To differentiate, pretend that each position has a copy $W_s$ of its own, so that $z_s = W_s a_s$. The copy
# occurs in $z_s$ alone, and its own input $a_s$ does not depend on it. So [(4.1)] holds: the derivative with
# respect to copy $s$ is $g_s a_s^\top$, where $g_s = \partial \ell / \partial z_s$. All copies are equal to
# $W$. By the chain rule, the derivative with respect to $W$ is the sum of the derivatives with respect to
# the copies:
#
# $$
# G := \frac{\partial \ell}{\partial W} = \sum_{s=1}^{S} g_s a_s^\top .
# \tag{4.3}
# $$
#
# The positions may even feed into each other, as in a recurrent network where $a_2$ depends on
# $z_1$. Equation [(4.3)] still holds: $g_1$ is the derivative along all paths from $z_1$ to $\ell$,
# including those through $z_2$. Backpropagation computes this derivative. [Figure 4.2] shows the three terms of an
# example in which the second input depends on the first output.

# %%
S = 3
xs = torch.randn(S, d_in)
z1 = W @ xs[0]
a2 = torch.cat([z1.sin(), xs[1, :1]])
z2 = W @ a2
z3 = W @ xs[2]
ell = (z1 * z3).sum() + z2.exp().sum() + (z2 * z3).prod()

gs = torch.autograd.grad(ell, (z1, z2, z3), retain_graph=True)
(gradient,) = torch.autograd.grad(ell, W)
terms = [torch.outer(g, a) for g, a in zip(gs, (xs[0], a2.detach(), xs[2]), strict=True)]
assert_exact(sum(terms), gradient)
assert largest_error(terms[-1], gradient) > 0.01  # one position alone is not the gradient

# %% tags=["hide-input"] alt="Four heat maps of 3 by 4 matrices: three outer products, in each of which all rows are multiples of one row, and their sum, which has no such pattern." caption="Every position adds one outer product. Each term has rank one, the sum need not."
terms = {rf"$g_{s} a_{s}^\top$": t for s, t in enumerate(terms, start=1)}
matrices(terms | {"$G$, their sum": gradient})

# %% [markdown]
# ## From gradients to curvature
#
# Now take $N$ data and a loss, $L = \frac{1}{D} \sum_n \ell_n(f_n)$. Here $f_n \in \mathbb{R}^C$ is the
# network's output for datum $n$, and $\ell_n$ is the loss of datum $n$ as a function of this output. The
# loss divides by the number $D$, which is $N$ for the mean of a cross-entropy and 1 for a sum. The vector
# $\theta$ has all parameters of the network. The GGN is the Jacobian's transpose times the Hessian of $L$ with
# respect to all outputs times the Jacobian. Each term of $L$ depends on one $f_n$ only, so this Hessian has one
# block $H_n$ for each datum and zeros elsewhere:
#
# $$
# \operatorname{GGN} = \sum_n J_n^\top H_n J_n,
# \qquad J_n = \frac{\partial f_n}{\partial \theta},
# \qquad H_n = \frac{\partial^2 L}{\partial f_n^2} .
# \tag{4.4}
# $$
#
# If $H_n$ is positive semi-definite, as for the losses of [Chapter 3](03_losses.py), it is a sum of outer products of
# $V$ vectors, the columns of a square root of $H_n$. The function `type2` of that chapter computes them. Chapter 3
# calls them $s_{vn}$. Here they are called $\sigma_{vn} \in \mathbb{R}^C$, because $s$ numbers positions:
#
# $$
# H_n = \sum_{v=1}^{V} \sigma_{vn} \sigma_{vn}^\top .
# \tag{4.5}
# $$
#
# The factor $1/D$ is in $H_n$, so each vector has a factor $1/\sqrt{D}$: the vectors carry all of the loss's scale.
# Insert [(4.5)] into [(4.4)]:
#
# $$
# \operatorname{GGN}
# = \sum_{n} J_n^\top \Bigl( \sum_v \sigma_{vn} \sigma_{vn}^\top \Bigr) J_n
# = \sum_{v, n} \bigl( J_n^\top \sigma_{vn} \bigr) \bigl( J_n^\top \sigma_{vn} \bigr)^\top .
# \tag{4.6}
# $$
#
# The vector $J_n^\top \sigma_{vn}$ is a gradient: that of the number $\sigma_{vn}^\top f_n$ with
# respect to $\theta$, with $\sigma_{vn}$ held fixed. A backward pass computes it if it starts at the
# network's output with $\sigma_{vn}$ in place of the gradient of a loss. The part that belongs to one layer
# follows from [(4.3)] with $\ell = \sigma_{vn}^\top f_n$:
#
# <div class="admonition theorem" markdown="1" id="thm-4.1">
# <p class="admonition-title" markdown="1"><b>Theorem 4.1 (the block of a layer)</b></p>
#
# Let a layer compute $z_{ns} = W a_{ns}$, and let the network use $W$ nowhere else. Let data not meet, that is,
# $\partial f_n / \partial z_{ms} = 0$ for $m \ne n$. Let the $\sigma_{vn}$ satisfy [(4.5)], and let
# $g_{vns} = (\partial f_n / \partial z_{ns})^\top \sigma_{vn}$ be what arrives at $z_{ns}$ when
# $\sigma_{vn}$ is sent backward. Then the block of the GGN that belongs to
# $\operatorname{vec}(W)$, the entries of $W$ row by row, is
#
# $$
# \sum_{v, n} \operatorname{vec}(G_{vn}) \operatorname{vec}(G_{vn})^\top,
# \qquad G_{vn} = \sum_s g_{vns} a_{ns}^\top .
# \tag{4.7}
# $$
#
# </div>
#
# **Proof.** The rows and columns of [(4.6)] that belong to $\operatorname{vec}(W)$ are made of the
# entries of $J_n^\top \sigma_{vn}$ that belong to $\operatorname{vec}(W)$. These are the derivative
# of $\sigma_{vn}^\top f_n$ with respect to $W$. The positions of other data add nothing to it, as data do not meet.
# Those of datum $n$ add up to $G_{vn}$ by [(4.3)]. $\blacksquare$
#
# No step was an approximation. Other vectors in the same formula give other matrices. If the vectors are
# random with $\mathbb{E} [\sum_v \sigma_{vn} \sigma_{vn}^\top] = H_n$, the sum [(4.7)] is random and its
# expectation is the block of the GGN. If there is one vector per datum, $\nabla \ell_n / \sqrt{D}$ at the
# label of the data, the sum is the block of the empirical Fisher. A cell [below](#many-vectors-or-one) checks both.

# %% [markdown]
# ### In the package
#
# The curvature of a layer on a batch thus needs two tensors. They form one immutable value, the
# `LayerIO`. KFAC and the approximations of Part V are functions of this value, without the network.
#
# The method `gradients` is [(4.3)], and the method `block` is [(4.7)]. The block is computed by its
# definition, which is too expensive for large layers. The loop goes through the vectors one by one,
# so that the gradients of all of them never exist at once.

# %% tags=["beside", "remove-input"]
code(LayerIO.gradients, LayerIO.block)

# %% [markdown]
# | field | shape | what it is |
# | --- | --- | --- |
# | `a` | $[N, S, d_\text{in}]$ | inputs of $W$; with a bias, the last column is 1 |
# | `g` | $[V, N, S, d_\text{out}]$ | vectors sent back to $W$'s output; all scale of the loss |
#
# The tensor `a` has no axis $V$, because the forward pass does not depend on what is sent backward. All scale of
# the loss is in `g`: if the loss is multiplied by $c > 0$, type-2 vectors are multiplied by $\sqrt{c}$ and
# the block by $c$, while `a` stays the same. A `LayerIO` has two more fields, `positions` and `counted`, for layers
# with several positions ([Chapter 6](06_weight_sharing.py)). This chapter does not need them.

# %% [markdown]
# ## Recording, by hand
#
# How do we get $a$ and $g$ out of a network that somebody else wrote? PyTorch calls a *forward
# hook* after a module has run, with the module's input and output. The input is $a$. The output is
# the tensor $z$ from which the rest of the network is computed, so we may ask for derivatives with respect
# to it.
#
# For $g$ we need $V$ vectors for each of $N$ data. All data can share a backward pass, because $f_n$
# depends on datum $n$ only: a pass that starts with $\sigma_{v1}, \dots, \sigma_{vN}$ at the $N$
# outputs gives $g_{vns}$ at all $z_{ns}$. Several vectors of one datum
# cannot share a pass, because their results would be added up. So there are $V$ backward passes,
# which `is_grads_batched=True` runs as one. PyTorch stores one datum in each row, so the code's inputs `a`
# have the shape $[N, d_\text{in}]$.


# %%
def capture_by_hand(model, loss, X, y, pass_on=torch.clone) -> dict[str, LayerIO]:
    ran = {}

    def record(layer, inputs, output):
        ran[layer] = inputs[0].detach(), output
        return pass_on(output)  # what the next layer gets: a copy, see below

    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    hooks = [layer.register_forward_hook(record) for layer in linear.values()]
    f = model(X)
    for hook in hooks:
        hook.remove()

    outputs = [ran[layer][1] for layer in linear.values()]
    vectors = type2(loss, f, y)[:]  # [V, N, C], all of them
    gs = torch.autograd.grad(f, outputs, vectors, is_grads_batched=True)

    ios = {}
    for (name, layer), g in zip(linear.items(), gs, strict=True):
        a = ran[layer][0]
        a = torch.cat([a, torch.ones(len(a), 1)], dim=1)  # the bias column
        ios[name] = LayerIO(a.unsqueeze(1), g.unsqueeze(2))  # S = 1
    return ios


N = 5
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
X, y = torch.randn(N, 4), torch.randint(3, (N,))
loss = nn.CrossEntropyLoss()

for name, io in capture_by_hand(model, loss, X, y).items():
    print(f"layer {name}: a {tuple(io.a.shape)}, g {tuple(io.g.shape)}")

# %% [markdown]
# Are these the right $a$ and $g$? [Chapter 2](02_curvature.py)'s `curvature.ggn` builds the whole matrix
# [(4.4)] from full Jacobians, without layers, hooks or vectors; `diagonal_blocks` cuts a layer's
# rows and columns out of it. The function `check` compares each layer's block with this one and returns the largest
# error, as a share of the largest exact entry. All errors in this chapter are such shares. A cross-entropy that is
# a sum over data instead of a mean must give the same `a`, and a `g` that is $\sqrt{N}$ times as large.


# %% tags=["hide-input"] fold="Checked: both blocks, and the scale of the loss"
def check(ios: dict[str, LayerIO], model, loss, X, y) -> dict[str, float]:
    exact = curvature.diagonal_blocks(model, curvature.ggn(model, loss, X, y))
    assert ios.keys() == exact.keys()
    return {name: largest_error(io.block(), exact[name]) for name, io in ios.items()}


errors = check(capture_by_hand(model, loss, X, y), model, loss, X, y)
print({name: f"{e:.0e}" for name, e in errors.items()})
assert max(errors.values()) <= EXACT

reductions = (loss, nn.CrossEntropyLoss(reduction="sum"))
mean, total = (capture_by_hand(model, reduction, X, y)["0"] for reduction in reductions)
assert torch.equal(total.a, mean.a)  # N times the loss, the same inputs
assert_exact(total.g, N**0.5 * mean.g)

# %% [markdown]
# ## The theorem, checked
#
# We try three networks: a perceptron, a convolutional network with an in-place activation, and a
# network that applies one layer twice. Each has a squared error and a cross-entropy, averaged and
# summed. All layers get their exact block. For each network and loss, the largest error is printed:


# %% tags=["hide-input"] fold="Checked: twelve pairs of a network and a loss"
def targets(loss: nn.Module, f: Tensor) -> Tensor:
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.randint(f.shape[1], (len(f),))
    return torch.randn_like(f)


again = nn.Linear(4, 4)
networks = {
    "perceptron": (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 4, 2, dilation=2),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        (2, 7, 5),
    ),
    "tied": (nn.Sequential(again, nn.Tanh(), again, nn.Tanh(), nn.Linear(4, 3)), (4,)),
}

report = []
for name, (net, shape) in networks.items():
    for kind in (nn.MSELoss, nn.CrossEntropyLoss):
        for reduction in ("mean", "sum"):
            X, criterion = torch.randn(N, *shape), kind(reduction=reduction)
            with torch.no_grad():
                y = targets(criterion, net(X))
            errors = check(layer_ios(net, criterion, X, y), net, criterion, X, y)
            case = f"{name:>13} {kind.__name__:>17} {reduction:>5}"
            report.append(f"{case}: {max(errors.values()):.0e}")
            assert max(errors.values()) <= EXACT
print("\n".join(report))

# %% [markdown]
# ### More than the blocks
#
# Equation [(4.6)] holds for the whole GGN, and [Theorem 4.1] takes one layer's part of it. So the record of all layers
# gives the full matrix. For each pair $(v, n)$, join the gradients of *all* layers to one long vector; the sum of the
# outer products of these vectors is the GGN, with the blocks that couple two layers. Block-diagonal methods drop
# these blocks. Two tensors per layer are enough to compute them, if every parameter belongs to a layer.

# %% tags=["hide-input"] fold="Checked: the full GGN from the gradients of all layers"
model = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 4))
X, y = torch.randn(N, 5), torch.randint(4, (N,))

ios = layer_ios(model, loss, X, y)
G = torch.cat([io.gradients().flatten(2) for io in ios.values()], dim=2)  # [V, N, parameters]
full = torch.einsum("vnd,vne->de", G, G)

order = torch.cat([W.flatten() for W in curvature.block_index(model).values()])
exact = curvature.ggn(model, loss, X, y)[order][:, order]  # each bias behind its row of W
print(f"relative error of the full GGN: {largest_error(full, exact):.0e}")
assert_exact(full, exact)

block_diagonal = torch.block_diag(*[io.block() for io in ios.values()])
assert largest_error(block_diagonal, exact) > 0.1  # the coupling is not small

# %% tags=["hide-input"] alt="Two 24 by 24 heat maps divided into four blocks. In the full GGN all four blocks are filled; in the second picture only the two diagonal blocks are." caption="Left: the full GGN of a network with two layers, from the joined gradients. Right: the blocks of the two layers, which block-diagonal methods keep."
pair = {"full GGN": full, "layer blocks": block_diagonal}
matrices(pair, blocks=dict.fromkeys(pair, (12, 12)))

# %% [markdown]
# ## Layers as rows
#
# [Theorem 4.1] is for layers of the form $z_{ns} = W a_{ns}$. The inputs $a_{ns}^\top$ are then called
# the layer's *rows*: they are the rows of the matrices `a[n]`. Here are three kinds of layers and their
# rows. (A transposed convolution is one more. It spreads every pixel of its input over a patch of its
# output, so the row of an output pixel has the input pixels that reach it, and zeros elsewhere.)
#
# **A linear layer** on an input of shape $[N, \ast, d]$ multiplies each vector along the last axis with $W$.
# Every index into the axes $\ast$ is one position $s$.
#
# **A convolution** takes a patch of its input, as large as the kernel, and multiplies it with the
# kernel; then it moves on to the next patch. With the patch and the kernel both flattened in the
# same order (channel, then row, then column), this is a row times a matrix. Padding, stride and
# dilation decide which entries a patch consists of:


# %%
def patches_by_hand(conv: nn.Conv2d, image: Tensor) -> Tensor:
    (kh, kw), (sh, sw) = conv.kernel_size, conv.stride
    (dh, dw), (ph, pw) = conv.dilation, conv.padding
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * ph, width + 2 * pw)
    padded[:, ph : ph + height, pw : pw + width] = image

    rows = []
    for top in range(0, padded.shape[1] - dh * (kh - 1), sh):
        for left in range(0, padded.shape[2] - dw * (kw - 1), sw):
            patch = padded[
                :,
                top : top + dh * (kh - 1) + 1 : dh,
                left : left + dw * (kw - 1) + 1 : dw,
            ]
            rows.append(patch.flatten())  # channel, row, column
    return torch.stack(rows)  # [S, d_in]


# %% tags=["hide-input"] fold="Checked: rows times the flattened kernel are the convolution"
conv = nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False)
image = torch.randn(2, 5, 4)
rows = patches_by_hand(conv, image)
z = rows @ conv.weight.flatten(1).T  # [S, d_out]
assert_exact(z.T, conv(image).flatten(1))
assert_exact(rows, input_rows(conv, image[None])[0, 0])

# %% tags=["hide-input"] alt="A 5 by 5 image with the numbers from -12 to 12, and the four 3 by 3 patches that a kernel with stride 2 sees in it: top left, top right, bottom left, bottom right. The centre of the image, 0, is a corner of all four." caption="An image and its four patches for a 3 × 3 kernel with stride 2. They overlap in the middle row and column of the image."
conv = nn.Conv2d(1, 1, 3, stride=2, bias=False)
tiny = torch.arange(-12.0, 13.0).reshape(5, 5)
rows = input_rows(conv, tiny[None, None])[0, 0]  # [S, d_in]
patches = {f"patch {s + 1}": row.reshape(3, 3) for s, row in enumerate(rows)}
matrices({"image": tiny} | patches, digits=0)

# %% tags=["hide-input"] alt="A 4 by 9 heat map with numbers: row 1 is patch 1 of the previous figure read from left to right and top to bottom, and so on." caption="The rows $a_{ns}$ of this image: each patch, flattened."
matrices({"$a_n$: one row for each patch": rows}, digits=0)

# %% [markdown]
# **An embedding** looks up column $t$ of $W$ for token $t$ (PyTorch stores the transpose, one token
# per row). Looking up is multiplying with a one-hot vector, so $a_{ns}$ is one-hot. The row of a padding token is
# zero.
#
# ### In the package
#
# The package's functions follow the definitions above. Groups of a convolution are a leading axis: each
# group is a layer of its own, with its own channels in and out and its own $W$. The argument `ends` has
# the numbers that are appended to each row for bias columns, such as the single 1 of one bias.

# %% tags=["remove-input"]
code(input_rows, output_rows, weight_matrix, weight_view)

# %% [markdown]
# One check covers them all: a layer without bias must compute $W$ times its rows.

# %% tags=["hide-input"] fold="Checked: seven layers without bias compute W times their rows"
kinds = [
    (nn.Linear(4, 3, bias=False), torch.randn(2, 5, 7, 4)),
    (nn.Conv1d(2, 3, 3, stride=2, padding=1, bias=False), torch.randn(2, 2, 11)),
    (nn.Conv2d(4, 6, (2, 3), groups=2, padding=1, bias=False), torch.randn(2, 4, 5, 3)),
    (nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=False), torch.randn(2, 2, 5, 4)),
    (nn.Conv3d(2, 3, (2, 1, 3), dilation=(2, 1, 1), bias=False), torch.randn(2, 2, 4, 3, 5)),
    (nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, bias=False), torch.randn(2, 2, 3, 4)),
    (nn.Embedding(7, 3), torch.randint(7, (2, 5))),
]
for layer, x in kinds:
    a = input_rows(layer, x)  # [groups, N, S, d_in]
    z = output_rows(layer, layer(x).unsqueeze(0)).squeeze(1)  # [groups, N, S, d_out]
    W = weight_matrix(layer, layer.weight).unsqueeze(1)  # [groups, 1, d_out, d_in]
    assert_exact(a @ W.mT, z)
    print(f"{type(layer).__name__:>15}: a {tuple(a.shape)}, z {tuple(z.shape)}")

# %% [markdown]
# Wrong rows can have the right shape, so that no error is raised. An example is a circular padding that is replaced by
# zeros.

# %% tags=["hide-input"] fold="Checked: zeros for a circular padding, the same shape and other rows"
circular, x = kinds[3]
zeros = copy.deepcopy(circular)
zeros.padding_mode = "zeros"
assert input_rows(zeros, x).shape == input_rows(circular, x).shape
assert largest_error(input_rows(zeros, x), input_rows(circular, x)) > 0.1

# %% [markdown]
# ## Blocks: which parameters belong to one $W$
#
# Most blocks belong to one layer each, and a block has its layer's name. Four situations need a rule.
#
# - **Shared weights.** Layers that share a weight are one block, as there is one $W$. Their positions are joined, so
#   that the numbers $S$ of the layers are added. If each layer has a bias of its own, $W$ has one column for each bias,
#   and a row of $a$ contains a 1 for its own bias and a 0 for the others. An embedding and a linear layer may share a
#   weight, too, as in language models. This weight is one block as well, but one of the layers applies $W^\top$, so
#   that the block needs a pair of `LayerIO` ([Chapter 6](06_weight_sharing.py#one-weight-both-ways)).
# - **Groups** of a convolution are blocks of their own, named `layer[0]`, `layer[1]`, …
# - **Frozen parameters** have no columns: a frozen bias means no column of ones, a frozen weight
#   leaves only that column.
# - **A layer whose parameters are all frozen** has no block.
#
# The cell has one network for each rule. It prints the shapes, and compares every block with the exact one.


# %% tags=["hide-input"] fold="Checked: blocks of shared, grouped and frozen layers"
def shapes(model: nn.Module, X: Tensor) -> None:
    with torch.no_grad():
        y = torch.randn_like(model(X))
    ios = layer_ios(model, nn.MSELoss(), X, y)
    for name, io in ios.items():
        print(f"  {name}: a {tuple(io.a.shape)}, g {tuple(io.g.shape)}")
    assert max(check(ios, model, nn.MSELoss(), X, y).values()) <= EXACT


shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
shared[2].weight = shared[0].weight
print("shared weight, two biases: one block with S = 2")
shapes(shared, torch.randn(N, 4))
io = layer_ios(shared, nn.MSELoss(), torch.randn(N, 4), torch.randn(N, 4))["0"]
assert torch.equal(io.a[0, :, -2:], torch.eye(2))  # first call: first bias; second: second

print("two groups: two blocks")
shapes(nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten()), torch.randn(N, 4, 5))

frozen = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 2))
frozen[0].weight.requires_grad = False
frozen[2].bias.requires_grad = False
frozen[4].requires_grad_(False)
print("frozen weight of layer 0: one column; frozen bias of layer 2: 6 columns, not 7;")
print("all of layer 4 frozen: no block")
shapes(frozen, torch.randn(N, 4))
assert "4" not in layer_ios(frozen, nn.MSELoss(), torch.randn(N, 4), torch.randn(N, 2))

# %% [markdown]
# ## The engineering of a recorder
#
# The theorem holds for any program that records $a$ and $g$. The rest of the chapter is about that program: why it
# copies outputs, how the package records, what it does not cover, what it leaves behind, and how much memory it needs.
# [Chapter 10](10_capture.py) goes on with networks in which hooks record too little.
#
# ### Why the hook returns a copy
#
# The hook above returns a copy of the output. A perceptron with `Tanh` gets the same blocks without a copy. But many
# networks save memory by activations that write *into* their input. The cell records such a network with and without
# the copy, and prints the errors of both blocks:

# %% tags=["hide-input"] fold="Checked: an in-place activation makes one block wrong, unless the hook copies"
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
X, y = torch.randn(N, 4), torch.randint(3, (N,))
not_copied = capture_by_hand(model, loss, X, y, pass_on=lambda z: z)
assert max(check(not_copied, model, loss, X, y).values()) <= EXACT
in_place = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))

with_copy = check(capture_by_hand(in_place, loss, X, y), in_place, loss, X, y)
without = capture_by_hand(in_place, loss, X, y, pass_on=lambda z: z)
without_copy = check(without, in_place, loss, X, y)
for kind, errors in (("with a copy", with_copy), ("without a copy", without_copy)):
    print(f"{kind:>14}:", {name: f"{e:.0e}" for name, e in errors.items()})
assert max(with_copy.values()) <= EXACT
assert without_copy["0"] > 0.1

# %% [markdown]
# Without the copy, the block of the first layer is wrong, and there is no error and no warning. The
# tensor that we recorded as $z$ has been overwritten. Autograd now takes it for
# $\operatorname{relu}(z)$, so we get the derivative with respect to the output of the activation. The factor
# $\operatorname{relu}'(z)$ is missing. It is 1 for active units and 0 for the others, so a multiplication with it
# repairs the vectors. With the copy, the activation overwrites the copy. The copy costs memory: a layer's output may be
# stored twice until the backward pass is over.

# %% tags=["hide-input"] fold="Checked: the missing factor repairs the vectors"
correct = capture_by_hand(in_place, loss, X, y)["0"].g
wrong = without["0"].g
active = (in_place[0](X) > 0).unsqueeze(1)
assert_exact(wrong * active.to(wrong), correct)
assert largest_error(wrong, correct) > 0.1
print(f"share of active units: {active.double().mean().item():.2f}")

# %% [markdown]
# ### The package's recorder
#
# The package's capture has three pieces. The first one records. It watches functions instead of modules, because
# every linear layer calls `functional.linear` in the end, and code that has weights but no layers may use `@` or
# `einsum`. A `TorchFunctionMode` of PyTorch sees each such call with its arguments, and
# the recorder keeps those calls that get a layer's weight. There are three differences from our hook:
#
# - It keeps a list of calls, as a weight may be used several times.
# - It notes the output's place in autograd's graph, `edge`. This place stays valid when the output is overwritten, so
#   that most copies are not needed.
# - It notes the version of the input, a counter that PyTorch increases whenever a tensor is written to. So a later
#   change of the *input* is noticed as well.
#
# [Chapter 10](10_capture.py) builds such a recorder by hand. It also explains the details of `_record` that
# this chapter passes over: when a copy is needed, functions that use a part of a weight (`unused`), products
# from the left (`order`), and normalisations (`ScaleUse`).

# %% tags=["remove-input"]
code(calls.recorded, calls.Recorder._record)

# %% [markdown]
# The second piece sends vectors backward, at most `chunk` of them at once. Recorded outputs that the
# network's output does not depend on get zeros, which is their derivative. A single vector is sent
# without batching, because a few operations of PyTorch cannot be batched. If the user gives no `chunk`,
# the first vectors show whether the network contains such an operation.
#
# The third piece is the whole procedure: find the layers, run forward and record, ask the loss for its
# vectors, send them back in parts of at most `chunk`, and arrange everything as `LayerIO`. The function `forward_pass`
# is its first half. It raises an error if one of its checks fails. The value that it returns makes the
# tensors of one layer at a time, so that a loop over a data set need not hold those of all layers.
# [`stream`][kfac_scratch.capture.forward_pass.stream] gives all layers, part by part, and
# [`layer_ios`][kfac_scratch.capture.forward_pass.layer_ios] joins the parts.

# %% tags=["remove-input"]
code(capture.forward_pass)

# %% [markdown]
# ### What is not covered
#
# A layer norm has parameters, but they are not a matrix that is applied to rows. It gets a block only if
# `layers=[...]` names it, and [Chapter 10](10_capture.py#a-real-transformer) derives that block. For the
# parameters of some other layers, such as `nn.PReLU`, the package has no block. If parameters were left
# out silently, the caller would believe that a step is taken for the whole network. So a warning names the parameters
# without a block:

# %% tags=["hide-input"] fold="Checked: one warning, and none if the layers are named"
normed = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
X, y = torch.randn(N, 4), torch.randn(N, 3)
print("uncovered:", uncovered(normed, layer_groups(normed)))

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    layer_ios(normed, nn.MSELoss(), X, y)
    assert len(caught) == 1
    print(textwrap.fill(f"{caught[0].category.__name__}: {caught[0].message}", width=90))

    layer_ios(normed, nn.MSELoss(), X, y, layers=["0", "2"])  # meant: no second warning
    assert len(caught) == 1

# %% [markdown]
# A layer that would get a wrong block, or for which the package has no rule, is refused with an error that says what to
# do. The errors below are for a
# layer of an unknown kind that is asked for by name, for an embedding that changes its own weight, and for two
# convolutions in opposite directions with one kernel.


# %% tags=["hide-input"] fold="Checked: three networks are refused"
def refused(expected: type[Exception] | tuple, *arguments, **options) -> None:
    """Run a capture that has to fail, and print why it does."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            layer_ios(*arguments, **options)
    except expected as reason:
        print(textwrap.fill(f"{type(reason).__name__}: {reason}", width=90), end="\n\n")
    else:
        raise AssertionError("this should have been refused")


tokens = torch.randint(6, (N, 2))
sloped = nn.Sequential(nn.Linear(4, 6), nn.PReLU(), nn.Linear(6, 3))
refused(NotImplementedError, sloped, nn.MSELoss(), X, y, layers=["1"])

normalised = nn.Sequential(nn.Embedding(6, 4, max_norm=1.0), nn.Linear(4, 3))
refused(NotImplementedError, normalised, nn.MSELoss(), tokens, torch.randn(N, 2, 3))

both_ways = nn.Sequential(nn.Conv1d(2, 3, 3), nn.ConvTranspose1d(3, 2, 3))
both_ways[1].weight = both_ways[0].weight  # one kernel for both directions
refused(NotImplementedError, both_ways, nn.MSELoss(), torch.randn(N, 2, 5), torch.randn(N, 2, 5))

# %% [markdown]
# [Theorem 4.1] has two conditions: $f_n$ depends on no datum but $n$, and the recorded calls are all that the network
# does with $W$. The package tests both on a few data first. A network is refused if the vector of one datum arrives at
# the rows of another, or if the recorded calls do not explain the gradient of every parameter. Both checks, the theorem
# that one random vector is enough for the second, and what the checks can miss are in
# [Chapter 10](10_capture.py#two-checks).

# %% [markdown]
# ### What capture leaves behind
#
# Capture leaves nothing behind in the modules. No hook is registered, and the function mode ends with the forward pass,
# also if the forward pass fails. Derivatives are returned by `torch.autograd.grad`, which writes no `.grad`. The
# modules' training modes and the parameters' `requires_grad` stay as they were. The trial runs of `plan` put buffers
# and the state of the random generator back. The forward pass of the batch itself changes both, as every forward pass
# does.


# %% tags=["hide-input"] fold="Checked: hooks, modes, gradients and flags stay, and a plan restores the random state"
def traces(model: nn.Module) -> list:
    hooks = [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()]
    modes = [m.training for m in model.modules()]
    grads = [p.grad is None for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    return [hooks, modes, grads, flags, torch._C._len_torch_function_stack()]


model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.0), nn.Linear(6, 3)).eval()
before = traces(model)
assert before[0] == [0, 0, 0, 0]
assert all(before[2])
layer_ios(model, nn.MSELoss(), X, y)
assert traces(model) == before
assert not X.requires_grad

refused(RuntimeError, model, nn.MSELoss(), torch.randn(N, 5), y)  # one input too many
assert traces(model) == before

noisy = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))
state = torch.get_rng_state()
plan(noisy, X)
assert torch.equal(torch.get_rng_state(), state)
noisy(X)
if not X.is_cuda:  # a GPU has a generator of its own
    assert not torch.equal(torch.get_rng_state(), state)
print("hooks, modes, gradients, flags and random state are as before, also after a failure")

# %% [markdown]
# ### Memory, and chunks
#
# A `LayerIO` holds
#
# $$
# \underbrace{N S d_\text{in}}_{a} + \underbrace{V N S d_\text{out}}_{g}
# \tag{4.8}
# $$
#
# numbers. (An embedding keeps the numbers of its tokens in place of $a$.) For a linear layer, $a$ is as large as the
# input that training keeps for the backward pass, and a column of ones. For a convolution $a$ is larger, as an entry of
# the image is repeated in every patch that contains it ([Chapter 6](06_weight_sharing.py) shows when patches can be
# avoided). The tensor $g$ is $V$ times as large as the layer's output. For the vectors of `type2`, $V$ is the number of
# outputs $C$, or $C - 1$ for cross-entropy (times the positions, if there is a loss at each). With many classes, $g$
# may not fit into memory. But the block is a *sum* over vectors, and so is $B = \sum_{v,n,s} g_{vns} g_{vns}^\top$,
# the factor that KFAC takes from $g$ ([Chapter 5](05_kfac.py)). So `stream` yields a `LayerIO` with at most `chunk`
# vectors at a time, and the caller adds up. Fewer vectors at a time need less memory and more backward passes. Without
# a `chunk`, the package chooses one from a budget of bytes:

# %% tags=["remove-input"]
code(capture.default_chunk)

# %% [markdown]
# The next cell counts the numbers in $g$ and the backward passes for a network with 61 classes. For every chunk, the
# sum over the parts is the same $B$.


# %% tags=["hide-input"] fold="Counted: numbers in g, and backward passes, for six chunks"
C, N_large = 61, 100
wide = nn.Sequential(nn.Linear(50, 80), nn.Tanh(), nn.Linear(80, C))
X, y = torch.randn(N_large, 50), torch.randint(C, (N_large,))


def held(ios: dict[str, LayerIO]) -> int:
    return sum(io.g.numel() for io in ios.values())


together = layer_ios(wide, loss, X, y)
assert held(together) == (C - 1) * N_large * (80 + C)  # (4.8), with S = 1
B = torch.einsum("vnso,vnsp->op", together["0"].g, together["0"].g)

chunks, numbers, passes = [1, 2, 5, 10, 20, 60], [], []
for chunk in chunks:
    count, in_parts, largest = 0, torch.zeros_like(B), 0
    for ios in stream(wide, loss, X, y, chunk=chunk):
        g = ios["0"].g.flatten(0, 2)
        in_parts += g.T @ g
        count, largest = count + 1, max(largest, held(ios))
    passes.append(count)
    numbers.append(largest)
    assert_exact(in_parts, B)
    assert largest == chunk * N_large * (80 + C)
    assert count * chunk == C - 1
print(f"in g at once: {numbers[0]:,} numbers with chunk 1, {numbers[-1]:,} with chunk 60")

# %% tags=["hide-input"] alt="Log-log plot over the chunk size from 1 to 60: the numbers held in g grow in proportion to the chunk, the backward passes fall from 60 to 1, as 60 divided by the chunk." caption="Memory grows in proportion to the chunk, and the number of backward passes falls in inverse proportion."
fig, ax = plt.subplots(figsize=(5.5, 2.9))
curves = {"numbers in $g$ at once": (numbers, "o-"), "backward passes": (passes, "s-")}
for (name, (values, marks)), side in zip(curves.items(), ("right", "left"), strict=True):
    (line,) = ax.loglog(chunks, values, marks)
    place = {"xytext": (0, 8), "textcoords": "offset points", "ha": side}
    ax.annotate(name, (chunks[3], values[3]), color=line.get_color(), **place)
ax.set(xlabel="chunk", ylim=(0.5, max(numbers) * 6))
ax.set_xticks(chunks, labels=chunks)
ax.minorticks_off()
plt.show()

# %% [markdown]
# ### Many vectors or one
#
# Memory is also saved by fewer vectors. `monte_carlo(1)` draws one label per datum from
# the model and sends one vector, whatever $V$ is for `type2`. So $g$ is smaller by the factor $V$, and the block is
# right in expectation only. [Chapter 3](03_losses.py) derives the error, which falls as $1 / \sqrt M$ with $M$ samples.
# The gradients at the data's labels, `empirical`, are one vector per datum as well, and give the block of the
# empirical Fisher exactly. The cell checks all three against autodiff.

# %% tags=["hide-input"] fold="Checked: type-2, sampled and empirical vectors"
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
X, y = torch.randn(N, 4), torch.randint(3, (N,))
exact = curvature.diagonal_blocks(model, curvature.ggn(model, loss, X, y))["0"]
generator = torch.Generator(torch.get_default_device()).manual_seed(0)

io = layer_ios(model, loss, X, y)["0"]
print(f"type-2, {len(io.g):>5} vectors: error {largest_error(io.block(), exact):.0e}")
assert_exact(io.block(), exact)
errors = []
for samples in (1, 10, 100, 1000):
    fisher = monte_carlo(samples, generator)
    io = layer_ios(model, loss, X, y, fisher)["0"]
    errors.append(largest_error(io.block(), exact))
    print(f"sampled, {len(io.g):>4} vectors: error {errors[-1]:.2f}")
assert min(errors) > EXACT
assert errors[-1] < errors[0] / 3  # about 1 / sqrt(1000) on average

io = layer_ios(model, loss, X, y, empirical)["0"]
matrix = curvature.empirical_fisher(model, loss, X, y)
assert_exact(io.block(), curvature.diagonal_blocks(model, matrix)["0"])

# %% [markdown]
# ## What goes wrong in practice
#
# Some of the following mistakes have happened in public code, as linked. Most of them give no error.
#
# **Per-datum gradients of a mean loss.** The gradient of $L = \frac1N \sum_n \ell_n$ with respect
# to $z_n$ is $\frac1N \nabla \ell_n$. A program that takes it for the gradient of datum $n$ and averages the
# outer products over data gets a result that is $N^2$ times too small ([an
# example](https://github.com/wiseodd/natural-gradients/issues/2)). Even with a sum instead of an
# average, the result is $N$ times too small, as curvature is quadratic in gradients but linear in the
# loss. The right scale is $g = \nabla \ell_n / \sqrt{D}$. The function `divisor` of
# [Chapter 3](03_losses.py) computes $D$.

# %% tags=["hide-input"] fold="Checked: both factors, and the right scale"
z = model[0](X).detach().requires_grad_()
(of_mean,) = torch.autograd.grad(loss(model[1:](z), y), z)  # [N, d_out]
right = layer_ios(model, loss, X, y, empirical)["0"].g[0, :, 0]

B_right = right.T @ right
ratio_average = (B_right.trace() / (of_mean.T @ of_mean / N).trace()).item()
ratio_sum = (B_right.trace() / (of_mean.T @ of_mean).trace()).item()
print(f"N = {N}: averaged, too small by {ratio_average:.0f}; summed, too small by {ratio_sum:.0f}")
assert abs(ratio_average - N**2) <= 1e-9
assert abs(ratio_sum - N) <= 1e-9
assert_exact(divisor(loss, model(X), y) ** 0.5 * of_mean, right)

# %% [markdown]
# **A hook that never runs.** `nn.MultiheadAttention` has a submodule `out_proj`, an ordinary
# linear layer. Its forward pass is never called, because the parent module reads its weight and passes it to a
# function. A hook for this layer is never called either
# ([an example](https://github.com/gpauloski/kfac-pytorch/issues/267), with an error at the first
# step). Yet the weight of `out_proj` is used. The package records the function that uses the weight
# ([Chapter 10](10_capture.py)), so that all four projections (to queries, keys, values and the output)
# have their exact blocks:


# %% tags=["hide-input"] fold="Checked: the hook of out_proj does not run, and the package has its block"
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.attend(x, x, x)[0]


attention, sequence, y = Attention(), torch.randn(N, 3, 4), torch.randn(N, 3, 4)
ran = []
hook = attention.attend.out_proj.register_forward_hook(lambda *_: ran.append(1))
attention(sequence).square().sum().backward()
ios = layer_ios(attention, nn.MSELoss(), sequence, y)
hook.remove()
assert ran == []
assert attention.attend.out_proj.weight.grad.abs().max() > 0
errors = check(ios, attention, nn.MSELoss(), sequence, y)
print("\n".join(f"{name:>15}: {error:.0e}" for name, error in errors.items()))
assert "attend.out_proj" in errors
assert max(errors.values()) <= EXACT

# %% [markdown]
# **The last call only.** A dictionary from layer to recording, as in `capture_by_hand`, keeps the
# last call of a layer that runs twice. The first call is overwritten, and its term of every
# gradient [(4.3)] is lost:

# %% tags=["hide-input"] fold="Checked: the last call alone gives a wrong block"
tied, shape = networks["tied"]
X, y = torch.randn(N, *shape), torch.randint(3, (N,))
last_only = check(capture_by_hand(tied, loss, X, y), tied, loss, X, y)
print("last call only:", {name: f"{e:.0e}" for name, e in last_only.items()})
assert last_only["0"] > 0.1
assert last_only["4"] <= EXACT  # runs once
assert max(check(layer_ios(tied, loss, X, y), tied, loss, X, y).values()) <= EXACT

# %% [markdown]
# **A bias column of zeros.** The ones are lost by `a.new_zeros` in place of `a.new_ones`, or by a step that
# changes them after they are appended, such as padding. The weight's part of the block remains right,
# so a test without biases passes. The block's rows and columns of the bias are zero.

# %% tags=["hide-input"] fold="Checked: the bias has zero rows and columns, all else is right"
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
io = layer_ios(model, loss, X, y)["0"]
no_bias = LayerIO(torch.cat([io.a[..., :-1], torch.zeros_like(io.a[..., -1:])], -1), io.g)
block, broken = (x.block().reshape(6, 5, 6, 5) for x in (io, no_bias))
assert_exact(broken[:, :-1, :, :-1], block[:, :-1, :, :-1])
assert broken[:, -1].abs().max() == 0
assert block[:, -1].abs().max() > 0

# %% [markdown]
# **Batch normalisation in training mode** breaks the assumption of [Theorem 4.1] that $f_n$
# depends on datum $n$ only. The vectors of all data are sent backward together, and are mixed when they pass the
# normalisation. `capture_by_hand` runs, but its result before the normalisation is not the block. The package refuses
# the network. In evaluation mode the statistics are constants, and all blocks are exact.


# %% tags=["hide-input"] fold="Checked: wrong before the normalisation, refused, and exact in evaluation mode"
def with_norm(**options) -> nn.Module:
    norm = nn.BatchNorm1d(6, affine=False, **options)
    return nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, 3))


mixing = with_norm(track_running_stats=False)  # always uses the statistics of the batch
X = torch.randn(N, 4)
X2 = X.clone()
X2[1] += 1.0  # another datum changes
assert largest_error(mixing(X2)[0], mixing(X)[0]) > 1e-3  # and so does datum 0's output

wrong = check(capture_by_hand(mixing, loss, X, y), mixing, loss, X, y)
print(f"before the normalisation: error {wrong['0']:.2f}; after it: {wrong['3']:.0e}\n")
assert wrong["0"] > 0.01
assert wrong["3"] <= EXACT
refused(ValueError, mixing, loss, X, y)

normed = with_norm()
normed(X)  # collect statistics
normed.eval()
assert max(check(layer_ios(normed, loss, X, y), normed, loss, X, y).values()) <= EXACT

# %% [markdown]
# [Chapter 10](10_capture.py#what-goes-wrong-in-practice) shows mistakes in finding $a$ and $g$, such as a
# batch that is not on axis 0 or an input that is overwritten.

# %% [markdown]
# ## In one minute
#
# - The gradient of one datum for a matrix that is used once is $g a^\top$. Used at several positions, it is the sum of
#   the positions' outer products.
# - If data do not meet, then with the columns of a square root of the loss's Hessian as vectors, the outer products of
#   these gradients sum to the layer's exact GGN block ([Theorem 4.1]). All scale of the loss is in $g$.
# - A convolution, an embedding and a tied layer differ in what their rows $a_{ns}$ are, and in how many there are.
# - A recorder must copy outputs that are overwritten, record every use of a weight, and refuse networks in which data
#   meet.
#
# ## Exercises
#
# **Exercise 4.1.** What is the largest rank that the block of a layer can have, and the largest
# rank of a single gradient $G_{vn}$? When is the block singular for certain?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The block is a sum of $V N$ matrices of rank at most one, so its rank is at most $V N$ and it is
# singular whenever $V N \lt d_\text{out} d_\text{in}$, which for a batch is common. (With `type2`
# and cross-entropy, $H_n$ has rank at most $C - 1$, since adding a constant to all logits changes
# nothing. So it has $V = C - 1$ vectors, and the bound is $(C - 1) N$.) This is one reason for damping. By
# [(4.3)], a gradient has rank at most $S$.
#
# </details>
#
# **Exercise 4.2.** Compute the gradient of the loss itself, with respect to every layer's $W$, from
# `layer_ios(..., fisher=empirical)`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The empirical vectors are $\nabla \ell_n / \sqrt{D}$ and the gradient is
# $\frac{1}{D} \sum_n \nabla \ell_n$. So it is $\frac{1}{\sqrt{D}} \sum_n G_{1n}$.
#
# </details>
#
# **Exercise 4.3.** Compute the trace of the block without forming any gradient, for $S = 1$ and for
# general $S$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The trace of $\operatorname{vec}(G) \operatorname{vec}(G)^\top$ is $\sum_{oi} G_{oi}^2$. With
# [(4.3)] that is $\sum_{s, s'} (g_s^\top g_{s'}) (a_s^\top a_{s'})$: two $S \times S$ matrices of
# inner products, multiplied entry by entry and summed. For $S = 1$ it is $\lVert g \rVert^2 \lVert
# a \rVert^2$.
#
# </details>
#
# **Exercise 4.4.** Is the block of a layer that is called twice the sum of two blocks, one for each
# call?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Not in general. The *gradient* is a sum over calls, $G = G_1 + G_2$, and the outer product of a sum has cross
# terms $\operatorname{vec}(G_1) \operatorname{vec}(G_2)^\top$ and its transpose.
# [Chapter 6](06_weight_sharing.py) is about these terms.
#
# </details>
#
# **Exercise 4.5.** `LayerIO.reduced` averages $a$ and sums $g$ over positions. Show that this
# does not change $G_{vn}$ if all positions of a datum receive the same vector, or if all have the
# same input.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The reduced gradient is $(\sum_s g_s)(\frac1S \sum_{s'} a_{s'})^\top$. If $g_s = g$ for all $s$,
# it is $S g \cdot \frac1S \sum_s a_s^\top = \sum_s g_s a_s^\top$. If $a_s = a$ for all $s$, it is
# $(\sum_s g_s) a^\top$, which is the same sum again.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
X, y = torch.randn(N, 4), torch.randint(3, (N,))
io = layer_ios(model, loss, X, y)["0"]
rank = torch.linalg.matrix_rank(io.block())  # 4.1
assert rank == (3 - 1) * N
assert rank < len(io.block())

loss(model(X), y).backward()  # 4.2
gradients = layer_ios(model, loss, X, y, empirical)["0"].gradients()
from_io = gradients.sum((0, 1)) / N**0.5
assert_exact(from_io, torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1))

X = torch.randn(N, 4)
io = layer_ios(tied, loss, X, y)["0"]  # S = 2
gg = io.g @ io.g.mT  # [V, N, S, S]
assert_exact((gg * (io.a @ io.a.mT)).sum(), io.block().trace())  # 4.3
assert torch.linalg.matrix_rank(io.gradients()).max() <= 2  # 4.1

parts = [LayerIO(io.a[:, s : s + 1], io.g[:, :, s : s + 1]) for s in range(2)]  # 4.4
assert largest_error(sum(part.block() for part in parts), io.block()) > 0.1
crossed = torch.einsum("vnd,vne->de", *(part.gradients().flatten(2) for part in parts))
assert_exact(sum(part.block() for part in parts) + crossed + crossed.T, io.block())

same_g = LayerIO(io.a, io.g[:, :, :1].expand_as(io.g))  # 4.5
same_a = LayerIO(io.a[:, :1].expand_as(io.a), io.g)
for x in (same_g, same_a):
    assert_exact(x.reduced().gradients(), x.gradients())
assert largest_error(io.reduced().gradients(), io.gradients()) > 0.01
print("Exercises 4.1 to 4.5: all hold")

# %% [markdown]
# ## Further reading
#
# [Grosse and Martens (2016)](bibliography.md#kfc) treat convolutions as matrices on rows of patches.
# [Eschenhagen et al. (2023)](bibliography.md#weight-sharing) use weight sharing as the common view
# of linear layers, convolutions and attention. [BackPACK](bibliography.md#backpack) computes other quantities
# from the same two tensors. PyTorch has notes on
# [autograd and in-place operations](https://docs.pytorch.org/docs/stable/notes/autograd.html).
#
# [Chapter 5](05_kfac.py) replaces the block by one Kronecker product. This is KFAC's approximation.
