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
# # 6. Weight sharing: expand and reduce
#
# **Part III: KFAC.** What becomes of the Kronecker product when a layer is applied not once per
# datum but at many positions?
#
# A convolution applies the same weights at every pixel, a transformer at every token, a graph network at every node.
# The gradient of one datum is then a sum over positions, and the curvature is a sum over *pairs* of positions.
# [Figure 6.1] shows for three networks which pairs contribute.

# %% tags=["hide-input"]
import textwrap
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import (
    Conv1d,
    Conv2d,
    CrossEntropyLoss,
    Embedding,
    Linear,
    Module,
    MSELoss,
    ReLU,
    Sequential,
    Tanh,
)
from torch.nn.functional import unfold
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.kfac import kfac, kfac_in_full
from kfac_scratch.capture.flavours import REDUCE
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.capture.layers import _averaged_patches, averaged_rows, input_rows
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.curvature import diagonal_blocks, ggn
from kfac_scratch.layer_io import LayerIO, TiedIO
from kfac_scratch.losses import type2, type2_classwise
from kfac_scratch.matrices.diagonal_kronecker import DiagonalKronecker
from kfac_scratch.moving.pooling import pool_position
from kfac_scratch.one_hot import OneHot
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one


class Attention(Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # [N, S, d]
        scores = self.q(x) @ self.k(x).mT / x.shape[-1] ** 0.5
        return x + self.o(scores.softmax(-1) @ self.v(x))


class Mean(Module):
    """Average over positions, as before a classification of whole sequences, images or graphs."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(self.axes)


def pairs(io: LayerIO) -> Tensor:
    return (torch.einsum("vnso,vnto->nst", io.g, io.g) * (io.a @ io.a.mT)).sum(0)


N, S = 7, 5
X, per_token, per_datum = torch.rand(N, S, 4), torch.randn(N, S, 4), torch.randn(N, 4)
apart = Sequential(Linear(4, 6), Tanh(), Linear(6, 4))
mixing = Sequential(Linear(4, 4), Attention(4))
for parameter in mixing[1].parameters():
    parameter.data *= 3  # a strong attention, to see something
pooled = Sequential(Linear(4, 6), Tanh(), Linear(6, 4), Mean(1))
tables = {
    "loss per token": pairs(layer_ios(apart, MSELoss(), X, per_token)["0"]),
    "same, after attention": pairs(layer_ios(mixing, MSELoss(), X, per_token)["0"]),
    "loss of the average": pairs(layer_ios(pooled, MSELoss(), X, per_datum)["0"]),
}
tables = {name: table / table.abs().max() for name, table in tables.items()}

# %% tags=["hide-input"] alt="Three 5 by 5 heat maps. The first is diagonal. The second has a strong diagonal and weaker entries elsewhere. The third is filled evenly." caption="The contribution of each pair of five positions to the trace of a layer's curvature block. Left: tokens do not mix, and only the pairs of a position with itself contribute. Middle: attention mixes tokens, and other pairs contribute, too. Right: the loss is that of an average over tokens, and all pairs contribute."
matrices(tables)

# %% [markdown]
# KFAC has two settings for such a layer ([Eschenhagen et al. 2023](bibliography.md#weight-sharing)). **Expand** treats
# positions as if they were data, so that it keeps the diagonals of these tables. **Reduce** averages the inputs
# $a_{ns}$ over the positions $s$ of a datum $n$, and sums the vectors $g_{vns}$ that the loss sends back to them. It is
# made for networks as in the right table:
#
# $$
# \begin{aligned}
# \text{expand:} \quad
# A &= \tfrac{1}{N S} \textstyle\sum_{n, s} a_{ns} a_{ns}^\top, \\
# B &= \textstyle\sum_{v, n, s} g_{vns} g_{vns}^\top, \\
# \text{reduce:} \quad
# A &= \tfrac{1}{N} \textstyle\sum_n \bar a_n \bar a_n^\top, \\
# B &= \textstyle\sum_{v, n} \hat g_{vn} \hat g_{vn}^\top,
# \end{aligned}
# $$
#
# with the mean input $\bar a_n = \tfrac1S \sum_s a_{ns}$ and the summed vector $\hat g_{vn} = \sum_s g_{vns}$.
#
# After this chapter you will be able to
#
# - write a convolution, attention, or a graph layer as one matrix at many positions;
# - derive expand and reduce, with the right factors of $S$, and choose one for a layer;
# - say for which networks each of them is exact, and test an implementation with these;
# - handle padded sentences, tied embeddings and biases.
#
# The table says which setting is exact. Each row is derived and asserted in a section below.
#
# | Layer | expand | reduce |
# | --- | --- | --- |
# | one position for each datum | KFAC of [Chapter 5](05_kfac.py) | the same |
# | deep linear, squared error at every position | exact | not exact |
# | deep linear, squared error of the average, before the average | not exact | exact |
# | the same, behind the average | exact | exact |
# | a bias whose input is 1 at every position | exact without cross terms | exact |
# | the keys of softmax attention | not zero | zero |
#
# ## One matrix, many positions
#
# Convolutions, sequences, attention and graphs lead to the same form. In each of them a layer computes
#
# $$
# z_{ns} = W a_{ns}, \qquad n = 1, \dots, N, \quad s = 1, \dots, S,
# \tag{6.1}
# $$
#
# with the same $W$ for all positions $s$.
#
# **Convolution.** An output pixel is the inner product of a kernel with the patch of the image
# that the kernel covers. Flatten the patches into rows $a_{ns}$ and the kernels into rows of $W$:
# the convolution is a product of matrices. The positions are the output pixels.
# [Chapter 4](04_layer_io.py#layers-as-rows) makes the rows with loops.

# %% tags=["hide-input"] fold="Checked: the product is the convolution"
conv, x = Conv2d(1, 3, kernel_size=2, bias=False), torch.randn(1, 1, 4, 5)
rows = []
for i in range(3):
    for j in range(4):
        rows.append(x[0, :, i : i + 2, j : j + 2].flatten())
patches, W = torch.stack(rows), conv.weight.detach().flatten(1)  # [S, d_in], [d_out, d_in]

assert_exact((patches @ W.T).T.reshape(3, 3, 4), conv(x)[0].detach())
assert_exact(input_rows(conv, x)[0, 0], patches)  # what the package does

# %% tags=["hide-input"] alt="Four heat maps: a 4 by 5 image, the 12 by 4 matrix of its 2 by 2 patches, the 4 by 3 matrix of three flattened kernels, and the 12 by 3 matrix of outputs, one row per output pixel." caption="A convolution as a product: the image, its twelve $2 \\times 2$ patches as rows $a_s$, three flattened kernels as columns of $W^\\top$, and the output with one row per position."
product = {"image": x[0, 0], "patches $a$": patches, r"$W^\top$": W.T, r"$a W^\top$": patches @ W.T}
matrices(product)

# %% [markdown]
# **A linear layer along a sequence** is already of the form [(6.1)], the positions being tokens.
#
# **Attention** mixes tokens, but none of its weights does. Queries, keys, values and outputs are linear
# layers that are applied to every token. The softmax between them is a part of the rest of the network, through which
# the backward pass computes $g$. (The classes `Attention` and `Mean`, an average over positions, are in the
# folded cell at the top.)

# %% [markdown]
# **A graph layer** applies a linear layer to every node and then averages over the neighbours of
# each node. The average is a product with a fixed matrix from the left. The weights are applied to one node at a time,
# so the positions are the nodes.


# %%
class Graph(Module):
    def __init__(self, d_in: int, d_out: int, adjacency: Tensor) -> None:
        super().__init__()
        self.linear = Linear(d_in, d_out)
        self.register_buffer("average", adjacency / adjacency.sum(1, keepdim=True))

    def forward(self, x: Tensor) -> Tensor:  # [N, S, d_in]
        return self.average @ self.linear(x)


# %% [markdown]
# For each of the four examples, the folded cell compares every block made of $a$ and $g$ with the block by autodiff. It
# prints the shapes. As in all chapters, a bias is the last column of $W$, and every $a_{ns}$ then ends with a 1.


# %% tags=["hide-input"] fold="Checked: the exact blocks of four kinds of networks"
def path(S: int) -> Tensor:
    """Adjacency of a path: every node is a neighbour of itself and of the nodes beside it."""
    i = torch.arange(S)
    return ((i - i[:, None]).abs() <= 1).double()


examples = {
    "convolution": (Sequential(Conv1d(4, 3, 2, padding=1), Tanh(), Mean(2)), torch.randn(N, 4, S)),
    "sequence": (Sequential(Linear(4, 3), Tanh(), Mean(1)), torch.randn(N, S, 4)),
    "attention": (Sequential(Attention(4), Mean(1), Linear(4, 3)), torch.randn(N, S, 4)),
    "graph": (Sequential(Graph(4, 3, path(S)), Tanh(), Mean(1)), torch.randn(N, S, 4)),
}
for kind, (model, X) in examples.items():
    y = torch.randint(3, (N,))
    exact = diagonal_blocks(model, ggn(model, CrossEntropyLoss(), X, y))
    for name, io in layer_ios(model, CrossEntropyLoss(), X, y).items():
        assert_exact(io.block(), exact[name])
        print(f"{kind:12} {name:9} a {list(io.a.shape)!s:10}  g {list(io.g.shape)}")

# %% [markdown]
# ## The exact block, and its cross terms
#
# All positions use the same $W$, so the gradient of vector $v$ for datum $n$ is a sum over
# positions, and its outer product with itself a double sum:
#
# $$
# \begin{aligned}
# G_{vn} &= \sum_s g_{vns} a_{ns}^\top, \\
# F &= \sum_{v, n} \operatorname{vec}(G_{vn}) \operatorname{vec}(G_{vn})^\top
# = \sum_{v, n} \sum_{s, s'} (g_{vns}\, g_{vns'}^\top) \otimes (a_{ns}\, a_{ns'}^\top).
# \end{aligned}
# \tag{6.2}
# $$
#
# The last step uses $\operatorname{vec}(g a^\top) = g \otimes a$, [(1.5)], and the mixed product [(1.9)], for every
# pair of positions. The terms with $s \neq s'$ are the **cross terms**. With one position there are none. As loops:

# %%
model, X = examples["attention"]
io = layer_ios(model, CrossEntropyLoss(), X, y)["0.v"]
F = torch.zeros(4 * 5, 4 * 5)
for n in range(N):
    for g in io.g[:, n]:  # [S, d_out] for each vector
        for s in range(S):
            for t in range(S):
                outer = torch.outer(g[s], g[t]), torch.outer(io.a[n, s], io.a[n, t])
                F += torch.kron(*outer)
assert_exact(F, io.block())

# %% [markdown]
# The trace of the term for $(s, s')$ is
# $\sum_{v,n} (g_{vns}^\top g_{vns'})(a_{ns}^\top a_{ns'})$, and over all pairs these numbers add up to
# $\operatorname{tr} F$. [Figure 6.1] shows them as $S \times S$ tables, for three kinds of networks: one loss
# per token, and tokens that do not mix; one loss per token, after attention; one loss for the
# average of all tokens.


# %% tags=["hide-input"] fold="Measured: the share of the cross terms in the trace"
off = {name: (1 - table.trace() / table.sum()).item() for name, table in tables.items()}
for name, share in off.items():
    print(f"{name:22} cross terms make up {share:.0%} of the trace")
assert abs(off["loss per token"]) < 1e-10
assert 0.05 < off["same, after attention"] < off["loss of the average"]

# %% [markdown]
# ## Two settings, two approximations
#
# The first table of [Figure 6.1] has no cross terms, and in the last one all pairs contribute. Each of these two
# extremes leads to an approximation.
#
# In the **expand setting**, the loss has a term for every position, and positions do not mix. Every vector $v$ reaches
# one position of a datum and is zero at the others, so that all cross terms are zero. Expand drops the cross terms in
# every network. A sum over $NS$ terms is left, in which a position counts as a datum. It is replaced by the product of
# averages, as in [(5.3)]:
#
# $$
# F \approx \sum_{v, n, s} (g_{vns}\, g_{vns}^\top) \otimes (a_{ns}\, a_{ns}^\top)
# \approx \underbrace{\Bigl(\sum_{v, n, s} g_{vns}\, g_{vns}^\top\Bigr)}_{B_\text{expand}} \otimes
# \underbrace{\Bigl(\frac{1}{N S} \sum_{n, s} a_{ns}\, a_{ns}^\top\Bigr)}_{A_\text{expand}}.
# \tag{6.3}
# $$
#
# In the **reduce setting**, positions are averaged or added up before the loss. In the simplest case
# every position receives the same vector, and then the sum over positions in $G_{vn}$ is a sum of the
# inputs. In general, write $\bar a_n = \tfrac1S \sum_s a_{ns}$ and
# $\bar g_{vn} = \tfrac1S \sum_s g_{vns}$. A sum of products is the sum of the $g$ times the mean of the $a$, plus a
# covariance (the same algebra as in [(5.4)]):
#
# $$
# G_{vn} = \sum_s g_{vns}\, a_{ns}^\top
# = \Bigl(\sum_s g_{vns}\Bigr) \bar a_n^\top
# + \underbrace{\sum_s (g_{vns} - \bar g_{vn})(a_{ns} - \bar a_n)^\top}_{\text{covariance over positions: drop it}}.
# \tag{6.4}
# $$
#
# Without the covariance, $G_{vn}$ is a single outer product, as if the layer had been applied once, to
# $\bar a_n$. Then the block is replaced by the product of averages over data:
#
# $$
# F \approx
# \underbrace{\Bigl(\sum_{v, n} \hat g_{vn}\, \hat g_{vn}^\top\Bigr)}_{B_\text{reduce}} \otimes
# \underbrace{\Bigl(\frac1N \sum_n \bar a_n \bar a_n^\top\Bigr)}_{A_\text{reduce}},
# \qquad \hat g_{vn} = \sum_s g_{vns}.
# \tag{6.5}
# $$
#
# Inputs are **averaged** and vectors are **summed**, because the product of these two in [(6.4)] has the scale of the
# gradient. So reduce takes a product of averages twice, first over the positions of a datum and then over data. Expand
# takes one product of averages, over the positions of all data.

# %% [markdown]
# ### In the package
#
# `kfac` averages over data and positions, which is expand. (The code shown is its form for rows that are stored in
# full.) Reduce is the same function of a layer after its method `reduced`. The next cell compares both with loops.

# %% tags=["beside", "remove-input"]
code(kfac_in_full, LayerIO.reduced)

# %%
io = layer_ios(pooled, MSELoss(), torch.rand(N, S, 4), per_datum)["0"]
expand, reduce = kfac(io), kfac(io.reduced())

a, g = io.a, io.g
A = sum(torch.outer(a[n, s], a[n, s]) for n in range(N) for s in range(S)) / (N * S)
B = sum(torch.outer(g[v, n, s], g[v, n, s]) for v in range(4) for n in range(N) for s in range(S))
assert_exact(expand.dense(), torch.kron(B, A))

mean, total = a.mean(1), g.sum(2)
A = sum(torch.outer(mean[n], mean[n]) for n in range(N)) / N
B = sum(torch.outer(total[v, n], total[v, n]) for v in range(4) for n in range(N))
assert_exact(reduce.dense(), torch.kron(B, A))

# %% tags=["hide-input"] fold="Checked: equation (6.4)"
spread = torch.einsum("vnso,nsi->vnoi", g - g.mean(2, keepdim=True), a - a.mean(1, keepdim=True))
assert_exact(io.reduced().gradients() + spread, io.gradients())  # equation 6.4

# %% [markdown]
# ## When they are exact
#
# <div class="admonition theorem" markdown="1" id="thm-6.1">
# <p class="admonition-title" markdown="1"><b>Theorem 6.1 (expand and reduce)</b></p>
#
# **Expand** equals the exact block if every vector of a datum reaches a single position, and one of the matrices
# $\sum_v g_{vns} g_{vns}^\top$ and $a_{ns} a_{ns}^\top$ is the same for all data and positions.
#
# **Reduce** equals the exact block if each vector of a datum is the same at all its positions
# ($g_{vns}$ does not depend on $s$), and one of the matrices $\sum_v \hat g_{vn} \hat g_{vn}^\top$
# and $\bar a_n \bar a_n^\top$ is the same for all data.
#
# </div>
#
# **Proof.** If the first condition of expand holds, the first step of [(6.3)] is exact. If that of reduce holds, the
# dropped term of [(6.4)] is zero. If the second condition holds, the product of averages is exact by [Theorem 5.1].
# $\blacksquare$
#
# For a deep linear network with squared error the second conditions hold, because its Jacobians and the
# Hessian of the loss are constant. Which of the first conditions holds depends on where positions are averaged:
#
# - If they are never averaged, and the loss has a term for every position, expand is exact.
# - If they are averaged after layer $l$, reduce is exact for the layers up to $l$. Behind the average one position is
#   left, so that both settings agree and are exact.
#
# The folded cell tries each place of the average, and finds the settings that are exact for each layer:


# %% tags=["hide-input"] fold="Checked: which setting is exact for each layer"
def linear_network(pool_after: int | None) -> Sequential:
    """Four linear layers, positions averaged after one of them (0: at once, None: never)."""
    sizes, layers = (5, 4, 6, 3, 2), []
    for i in range(5):
        layers += [Linear(sizes[i - 1], sizes[i])] if i > 0 else []
        layers += [Mean(1)] if pool_after == i else []
    return Sequential(*layers)


def which(io: LayerIO) -> str:
    F = io.block()
    exact = [
        name
        for name, part in (("expand", io), ("reduce", io.reduced()))
        if relative_error(kfac(part).dense(), F) < 1e-10
    ]
    return "both" if len(exact) == 2 else exact[0] if exact else "neither"


N, S = 11, 7
X = torch.rand(N, S, 5)
table = {}
for pool_after in (None, 4, 3, 2, 1, 0):
    y = torch.randn(N, S, 2) if pool_after is None else torch.randn(N, 2)
    for reduction in ("mean", "sum"):
        ios = layer_ios(linear_network(pool_after), MSELoss(reduction=reduction), X, y)
        table[pool_after] = [which(io) for io in ios.values()]
        expected = ["reduce"] * (pool_after or 0) + ["both"] * (4 - (pool_after or 0))
        assert table[pool_after] == (["expand"] * 4 if pool_after is None else expected)

print("average after   " + "".join(f"layer {i:<4}" for i in range(1, 5)))
for pool_after, row in table.items():
    where = "never" if pool_after is None else f"layer {pool_after}" if pool_after else "the input"
    print(f"{where:16}" + "".join(f"{entry:10}" for entry in row))

# %% [markdown]
# In the next figure a slider moves the average along the chain of layers. The layers before it need reduce, and behind
# it both settings agree. Without an average, only expand is exact. The bars are the relative errors of both settings.

# %% tags=["hide-input"] fold="Code of the figure"
places = {"at the input": 0} | {f"after layer {i}": i for i in (1, 2, 3, 4)} | {"never": None}
targets = {
    place: torch.ones(N, S, 2) if place is None else torch.ones(N, 2) for place in places.values()
}
captured = {
    words: layer_ios(linear_network(place), MSELoss(), X, targets[place])
    for words, place in places.items()
}
pool_position(captured, position=2)

# %% [markdown]
# ### The error of the wrong setting
#
# Let the average be at the end, and use expand. All positions of a datum receive the same vector. If we write it as
# $g_{vn}/S$, then
#
# $$
# B_\text{reduce} = \sum_{v,n} g_{vn} g_{vn}^\top = S\, B_\text{expand}.
# \tag{6.6}
# $$
#
# The two factors $B$ agree up to the number $S$. The rest of the error is in $A$. The exact block is the Kronecker
# product of $B_\text{expand}$ with the mean over data of $\tfrac1S \sum_{s,s'} a_{ns} a_{ns'}^\top$, and
# $A_\text{expand}$ has only the terms $s = s'$ of this sum. If inputs at different positions are uncorrelated with mean
# zero, the other terms cancel on average. If inputs are positive, as behind a ReLU, the other terms do not cancel, and
# expand is too small: by a factor of at most $S$ in every direction, and exactly $S$ for a bias, whose input is 1.

# %% tags=["hide-input"] fold="Checked: the factor S; measured: the error of expand"
X, y = torch.rand(N, S, 5), torch.randn(N, 2)
for name, io in layer_ios(linear_network(4), MSELoss(), X, y).items():
    F, expand, reduce = io.block(), kfac(io), kfac(io.reduced())
    assert_exact(reduce.dense(), F)
    assert_exact(reduce.B, S * expand.B)
    error = relative_error(expand.dense(), F)
    size = (expand.dense().norm() / F.norm()).item()
    bias = slice(io.a.shape[-1] - 1, None, io.a.shape[-1])  # the last entry of every row of W
    assert_exact(S * expand.dense()[bias, bias], F[bias, bias])
    assert torch.linalg.eigvalsh(S * expand.dense() - F)[0] > -1e-12 * F.norm()
    print(f"layer {name}: expand is {error:.0%} off, its norm is {size:.2f} of the exact one")
    assert error > 0.01
print(f"1 / S = {1 / S:.2f}")

# %% [markdown]
# Now let the loss have a term per token, and use reduce. With several loss terms per datum, reduce is
# not uniquely defined. We take [(6.5)] literally, with one vector per entry of the output. Another reading sends one
# vector per class to all positions at once; here its $B$ is $S$ times as large. In both, the mean input stands for the
# inputs at the single positions, and the block is wrong:

# %% tags=["hide-input"] fold="Measured: the error of reduce for a loss per token"
X, y = 3 * torch.randn(N, S, 5), torch.randn(N, S, 2)
model = linear_network(None)
classwise = layer_ios(model, MSELoss(), X, y, type2_classwise)
for name, io in layer_ios(model, MSELoss(), X, y).items():
    assert_exact(kfac(io).dense(), io.block())
    assert_exact(kfac(classwise[name].reduced()).B, S * kfac(io.reduced()).B)
    error = relative_error(kfac(io.reduced()).dense(), io.block())
    print(f"layer {name}: reduce is {error:.0%} off")
    assert error > 0.01

# %% [markdown]
# ### One datum is not enough any more
#
# For a single datum with one position, KFAC is exact in every network with every loss ([Chapter 5](05_kfac.py)). For a
# single datum with a loss at each of several positions, expand is not. Expand treats the positions as data, and for
# cross-entropy the Hessians of the loss differ between them:


# %% tags=["hide-input"] fold="Measured: the error of expand for one datum"
class ClassesFirst(Module):
    """`CrossEntropyLoss` wants the classes on axis 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


tagger, loss = Sequential(Linear(5, 3), ClassesFirst()), CrossEntropyLoss()
for positions in (1, 7):
    X = 2 * torch.randn(1, positions, 5)
    io = layer_ios(tagger, loss, X, torch.randint(3, (1, positions)))["0"]
    error = relative_error(kfac(io).dense(), io.block())
    print(f"one datum, {positions} position(s): expand is {error:.1e} off")
    assert error < 1e-10 if positions == 1 else error > 0.05

# %% [markdown]
# ### Biases
#
# The input of a bias is usually one at every position. Then its gradient is $\sum_s g_{vns} = \hat g_{vn}$, and its
# exact block is $\sum_{v,n} \hat g_{vn} \hat g_{vn}^\top = B_\text{reduce}$. **Reduce is exact for a bias whose input
# is 1 at every position, in any network with any loss.** The block of expand is $B_\text{expand}$ for this bias, which
# is exact only if the cross terms vanish or cancel. Both statements are good tests of an implementation.
#
# The condition matters for tied layers with biases of their own. The input of such a bias is 1 at the positions of one
# call and 0 at those of the others ([Chapter 4](04_layer_io.py)). Its average is less than 1, and reduce is not exact:


# %% tags=["hide-input"] fold="Checked: reduce is exact for biases, except for those of tied layers"
def bias_errors(model: Module, X: Tensor, y: Tensor) -> tuple[float, float]:
    """Of expand and reduce, on the rows and columns of the first layer's bias."""
    name, io = next(iter(layer_ios(model, MSELoss(), X, y).items()))
    d_in = io.a.shape[-1]
    bias = slice(d_in - 1, None, d_in)
    F = diagonal_blocks(model, ggn(model, MSELoss(), X, y))[name][bias, bias]
    return relative_error(kfac(io).B, F), relative_error(kfac(io.reduced()).B, F)


X = torch.rand(N, S, 4)
errors = {
    "tokens apart": bias_errors(apart, X, torch.randn(N, S, 4)),
    "attention": bias_errors(mixing, X, torch.randn(N, S, 4)),
    "average": bias_errors(pooled, X, torch.randn(N, 4)),
}
for kind, (expand, reduce) in errors.items():
    print(f"{kind:14} expand {expand:.1e}   reduce {reduce:.1e}")
    assert reduce < 1e-10
assert errors["tokens apart"][0] < 1e-10
assert min(errors["attention"][0], errors["average"][0]) > 0.01

one, other = Linear(4, 4), Linear(4, 4)
other.weight = one.weight  # one W, two biases: the last two columns
two_calls = Sequential(one, Tanh(), other)
io = layer_ios(two_calls, MSELoss(), torch.randn(N, 4), torch.randn(N, 4))["0"]
for call in (0, 1):
    own = slice(4 + call, None, 6)
    F = io.block()[own, own]
    off = relative_error(kfac(io.reduced()).dense()[own, own], F)
    print(f"tied layers, bias of call {call + 1}: reduce {off:.2f} off")
    assert off > 0.1

# %% [markdown]
# ## Convolutions and padding
#
# In vision, a convolutional network with global average pooling is in the reduce setting. Suppose that such a network
# is linear. The average sends the same vector to every output pixel, so reduce is exact for the last convolution. For
# an earlier convolution, reduce is exact if the vectors are still the same at all pixels after the backward pass
# through the later ones. That is so if the later layers treat all pixels alike: with kernels of size one, or if the
# image is wrapped around (*circular* padding) with stride one. It is not so with zero padding, the usual choice, or
# with no padding, because pixels at the border take part in fewer outputs than those in the middle.


# %% tags=["hide-input"] fold="Checked: reduce is exact if the later layers treat all pixels alike"
def convolutional(kernel: int, **settings) -> Sequential:
    return Sequential(
        Conv2d(2, 3, kernel, **settings),
        Conv2d(3, 4, kernel, **settings),
        Mean(2, 3),
        Linear(4, 3),
    )


X, y = torch.rand(5, 2, 6, 7), torch.randn(5, 3)
cases = {
    "1 × 1 kernels": convolutional(1),
    "circular padding": convolutional(3, padding=1, padding_mode="circular"),
    "zero padding": convolutional(3, padding=1),
    "no padding": convolutional(3),
}
found = {}
for case, model in cases.items():
    ios = layer_ios(model, MSELoss(), X, y).values()
    found[case] = [relative_error(kfac(io.reduced()).dense(), io.block()) for io in ios]
    print(f"{case:18}" + "".join(f"{error:10.1e}" for error in found[case]))

for case in ("1 × 1 kernels", "circular padding"):
    assert max(found[case]) < 1e-10
for case in ("zero padding", "no padding"):
    assert found[case][0] > 1e-3
    assert max(found[case][1:]) < 1e-10

# %% [markdown]
# The output has one column per layer. With zero padding, and with no padding, reduce is wrong for the first
# convolution. Its error is smaller than that of the wrong setting above. It comes from pixels near the border, whose
# share is small in a large image.

# %% [markdown]
# ## Three networks on real data
#
# Networks that are trained in practice are not linear. How large are the errors of both settings then? We classify
# handwritten digits, $8 \times 8$ pixels, in three ways: with a convolutional network; with
# attention over the eight rows of an image, each row with a one-hot code of its place; and with a
# graph network whose nodes are the rows, on a path. Each of them averages over positions before the
# classifier, which is the reduce setting.

# %% tags=["hide-input"] fold="The data and the three networks"
digits = load_digits()
images = torch.tensor(digits.data).reshape(-1, 8, 8) / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images))
images, labels = images[order], labels[order]
tokens = torch.cat([images, torch.eye(8).expand(len(images), 8, 8)], dim=2)  # [N, rows, 16]

cnn = Sequential(
    Conv2d(1, 8, 3, padding=1),
    ReLU(),
    Conv2d(8, 8, 3, stride=2, padding=1),
    ReLU(),
    Conv2d(8, 8, 3, stride=2, padding=1),
    ReLU(),
    Mean(2, 3),
    Linear(8, 10),
)
transformer = Sequential(
    Linear(16, 10), Attention(10), Linear(10, 10), Tanh(), Mean(1), Linear(10, 10)
)
graph = Sequential(
    Graph(16, 12, path(8)), Tanh(), Graph(12, 12, path(8)), Tanh(), Mean(1), Linear(12, 10)
)
networks = {
    "cnn": (cnn, images[:, None]),
    "attention": (transformer, tokens),
    "graph": (graph, tokens),
}

# %% tags=["hide-input"] fold="Trained: 180 steps of Adam for each network"
lines = []
for kind, (model, inputs) in networks.items():
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(180):
        batch = slice(100 * (step % 6), 100 * (step % 6) + 100)
        optimizer.zero_grad()
        CrossEntropyLoss()(model(inputs[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        hits = (model(inputs[600:]).argmax(1) == labels[600:]).double().mean().item()
    lines.append(f"{kind:10} {hits:.0%} of unseen digits are right")
    assert hits > 0.5
print("\n".join(lines))

# %% [markdown]
# For every layer we compare both settings with the exact GGN block on 100 images. A part of expand's relative
# error is its wrong scale, so we also print the cosine
# $\langle K, F \rangle / (\lVert K \rVert \lVert F \rVert)$, which ignores the scale. The last of the three numbers is
# the norm of the approximation, relative to that of the exact block.


# %% tags=["hide-input"] fold="Measured: error, cosine and norm of both settings"
def cosine(K: Tensor, F: Tensor) -> float:
    if K.norm() < 1e-12 * F.norm():
        return 0.0  # zero up to round-off
    return ((K * F).sum() / K.norm() / F.norm()).item()


N, loss = 100, CrossEntropyLoss()
shared = {}
form = "{:24}{:7.2f} {:7.2f} {:6.2f}    {:7.2f} {:7.2f} {:6.2f}".format
lines = [f"{'':33}expand{'':20}reduce"]
lines += [f"{'layer':20}S     error  cosine   norm      error  cosine   norm"]
for kind, (model, inputs) in networks.items():
    for name, io in layer_ios(model, loss, inputs[:N], labels[:N]).items():
        F, S = io.block(), io.a.shape[1]
        row = []
        for part in (io, io.reduced()):
            K = kfac(part).dense()
            row += [relative_error(K, F), cosine(K, F), (K.norm() / F.norm()).item()]
        lines.append(form(f"{kind + ' ' + name:18}{S:3}", *row))
        if S > 1:
            shared[kind, name] = row
        else:
            assert abs(row[0] - row[3]) < 1e-8  # one position: no difference

keys = shared.pop(("attention", "1.k"))
averages = [sum(row[i] for row in shared.values()) / len(shared) for i in range(6)]
lines.append(form("mean over S > 1, no keys", *averages))
print("\n".join(lines))
assert averages[3] < averages[0]  # error
assert averages[4] > averages[1]  # cosine
assert averages[2] < averages[5]  # norm
assert keys[3] > 0.99

# %% tags=["hide-input"] alt="Three 80 by 80 heat maps for the first convolution of the digit network, with 10 by 10 tiles, one per pair of output channels. In the exact block a few tiles are strong. Reduce has the same strong tiles. Expand has its strong tiles mostly along the diagonal." caption="The first convolution of the trained network: exact block, expand and reduce in one colour scale, which ends at a third of the largest entry. One tile per pair of output channels."
model, inputs = networks["cnn"]
io = layer_ios(model, loss, inputs[:N], labels[:N])["0"]
F = io.block()
picture = {"exact": F, "expand": kfac(io).dense(), "reduce": kfac(io.reduced()).dense()}
matrices(picture, blocks=dict.fromkeys(picture, (10, 10)), scale=F.abs().max().item() / 3)

# %% tags=["hide-input"] alt="Three 51 by 51 heat maps for the first linear layer of the graph network. The exact block and KFAC-reduce look the same. KFAC-expand has the same pattern, but is hardly visible." caption="The first layer of the graph network, three of its twelve output units. Inputs of neighbouring nodes are alike, so that their contributions add up: reduce is close, expand much too small."
model, inputs = networks["graph"]
io = layer_ios(model, loss, inputs[:N], labels[:N])["0.linear"]
part = slice(0, 3 * 17)
picture = {"exact": io.block(), "expand": kfac(io).dense(), "reduce": kfac(io.reduced()).dense()}
picture = {name: M[part, part] for name, M in picture.items()}
matrices(picture, blocks=dict.fromkeys(picture, (17, 17)))

# %% [markdown]
# On average over these layers, reduce is nearer to the exact block, although the networks are not linear and borders
# are padded. Expand is mostly too small, for the reason given below [(6.6)]. The mean in the last row leaves out the
# keys of the attention, which the next section is about.
#
# ### Reduce is zero for keys
#
# <div class="admonition theorem" markdown="1" id="thm-6.2">
# <p class="admonition-title" markdown="1"><b>Theorem 6.2 (keys)</b></p>
#
# For the key projection of softmax attention, with scores $q_s^\top k_t / \sqrt{d}$, KFAC-reduce is
# the zero matrix, whatever the data, the loss, and the rest of the network.
#
# </div>
#
# **Proof.** Token $s$ attends to token $t$ with the score $q_s^\top k_t / \sqrt{d}$. Shift all keys
# of a datum by the same vector $c$. All scores of token $s$ change by the same number
# $q_s^\top c / \sqrt{d}$, and a softmax does not change if all its inputs are shifted by the same number. So the output
# of the network is constant in the direction of a common shift. The derivative in this direction is
# $\sum_t g_{vnt}^\top c$, which is zero for every $c$. Hence $\hat g_{vn} = \sum_t g_{vnt} = 0$ and
# $B_\text{reduce} = 0$. $\blacksquare$
#
# The proof also holds for attention with a mask. It does not hold with rotary position codes: they rotate every key by
# another angle after the projection, so that a common shift of the projection's outputs is no common shift of the keys.
#
# By the same argument a bias of the keys has no effect on the output. So its exact block is zero, and reduce is exact
# for it, as for all biases with input 1. But the rest of the exact block is not zero. An optimizer that uses reduce for
# keys divides their gradient by the damping alone. Expand is not zero:

# %% tags=["hide-input"] fold="Checked: reduce is zero for keys, and its inverse divides by the damping"
model, inputs = networks["attention"]
io = layer_ios(model, loss, inputs[:N], labels[:N])["1.k"]
F, expand, reduce = io.block(), kfac(io), kfac(io.reduced())
print(f"norm of the exact block {F.norm():.1e}, of reduce {reduce.dense().norm():.1e}")
print(f"cosine of expand with the exact block: {cosine(expand.dense(), F):.2f}")
assert reduce.dense().norm() < 1e-12 * F.norm()
assert cosine(expand.dense(), F) > 0.3

V = torch.randn(10, 11)
assert_exact(reduce.inverse(1e-3) @ V, V / 1e-3)

# %% tags=["hide-input"] alt="Three 55 by 55 heat maps for half of the key projection. The exact block and KFAC-expand are filled with similar patterns, KFAC-reduce is empty." caption="The key projection: reduce is zero. Exact block and expand are each scaled to their largest entry, and only five of the ten output units are drawn."
part = slice(0, 5 * 11)  # five of the ten output units
shown = {"exact": F, "expand": expand.dense(), "reduce": reduce.dense()}
shown = {name: M[part, part] / M.abs().max() for name, M in shown.items() if name != "reduce"}
matrices(shown | {"reduce": reduce.dense()[part, part]}, blocks=dict.fromkeys(shown, (11, 11)))

# %% [markdown]
# ## Which one to use
#
# - The loss has a term per position, as in language models and segmentation: use **expand**.
# - Positions are averaged before the loss, as in the classification of images, sequences and graphs: use **reduce**.
#   Behind the average both agree.
# - A network has both: choose layer by layer. `layer_ios` takes `flavour`, which is the setting, and `layers`.
# - Keys of attention: use expand.
#
# For convolutions reduce is cheaper, as it needs no patches: see the [appendix](#appendix-reduce-without-patches).
#
# This is advice about the matrix: which of the two is nearer to the exact block. In training, the paper found **little
# difference** between them, for a graph network and a vision transformer. With either, a fixed target of validation was
# reached in 50 to 75 % of the steps of a first-order reference, and in a comparable share of its time. It also used the
# lower cost of reduce, to choose hyperparameters of a Wide ResNet by the marginal likelihood. This chapter repeats none
# of these experiments, because they need networks and data of another size.
#
# There is one more choice for losses per token. Type-2 vectors are an exact square root of the loss
# Hessian only with one vector for every class *and position* ([Chapter 7](07_other_losses.py)). One
# vector per class, sent to all positions at once, is cheaper by a factor of $S$. If
# positions do not mix, both have the same factors of expand. If attention mixes them, the factors differ:

# %% tags=["hide-input"] fold="Checked: one vector per class is enough for expand, unless positions mix"
for model, mixes in ((apart, False), (mixing, True)):
    X, y = torch.rand(N, 5, 4), torch.randn(N, 5, 4)
    full = next(iter(layer_ios(model, MSELoss(), X, y, type2).values()))
    cheap = next(iter(layer_ios(model, MSELoss(), X, y, type2_classwise).values()))
    error = relative_error(kfac(cheap).dense(), kfac(full).dense())
    print(f"{len(full.g):2} or {len(cheap.g)} vectors: expand differs by {error:.1e}")
    assert error > 0.05 if mixes else error < 1e-10

# %% [markdown]
# ## Other ways to share a weight
#
# [Chapter 4](04_layer_io.py) has three more kinds of rows. A **grouped convolution** is one block
# per group. **Tied weights** are positions: the rows of all calls are joined along $S$.
# An **embedding** multiplies one-hot rows, so $A$ of expand is a diagonal matrix that holds how
# often each token occurs. With 50,000 words a matrix of that size does not fit into memory, and neither
# do the rows. So capture keeps the words' numbers, as a tensor [`OneHot`][kfac_scratch.one_hot.OneHot] that forms its
# rows where an operation needs them. KFAC keeps the diagonal, and multiplies with $B$ and with a vector:

# %% tags=["remove-input"]
code(OneHot.counts, DiagonalKronecker.__matmul__)

# %% [markdown]
# The folded cell checks all three kinds:

# %% tags=["hide-input"] fold="Checked: groups, a layer that is called three times, and an embedding"
grouped = Sequential(Conv1d(4, 6, 3, groups=2), Tanh(), Mean(2))
X, y = torch.randn(N, 4, 9), torch.randn(N, 6)
for name, block in diagonal_blocks(grouped, ggn(grouped, MSELoss(), X, y)).items():
    io = layer_ios(grouped, MSELoss(), X, y)[name]
    assert_exact(io.block(), block)
    print(f"{name}: a {list(io.a.shape)}")

layer = Linear(4, 4)
tied = Sequential(layer, Tanh(), layer, Tanh(), layer)
X, y = torch.randn(N, 4), torch.randn(N, 4)
io = layer_ios(tied, MSELoss(), X, y)["0"]
assert_exact(io.block(), diagonal_blocks(tied, ggn(tied, MSELoss(), X, y))["0"])
print(
    f"three calls: a {list(io.a.shape)}, expand {relative_error(kfac(io).dense(), io.block()):.2f} off"
)

words = torch.randint(6, (N, 5))
model = Sequential(Embedding(6, 4), Tanh(), Mean(1))
io = layer_ios(model, MSELoss(), words, y)["0"]
assert_exact(io.block(), diagonal_blocks(model, ggn(model, MSELoss(), words, y))["0"])
assert_exact(kfac(io).a, words.flatten().bincount(minlength=6) / words.numel())
assert_exact(kfac(io).dense(), kfac_in_full(io).dense())

# %% [markdown]
# ## Padded sentences
#
# Sentences of different lengths make a rectangular batch when the short ones are padded with a
# token that stands for no word. The loss ignores the network's outputs there. If no other position reads
# the padding either, the vectors are zero at these positions, and the exact block does not depend on them.
# Expand does depend on them. Its $B$ is a sum, to which zero vectors add nothing, but its $A$ is a *mean
# over all rows*. Let $A_\text{words}$ be the mean of $a a^\top$ over the rows of words, and
# $A_\text{padding}$ over those of the padding, which has a share $p$ of all rows. Then
#
# $$
# A_\text{expand} = (1 - p)\, A_\text{words} + p\, A_\text{padding},
# \tag{6.7}
# $$
#
# and if most rows are padding, $A$ is mostly $A_\text{padding}$. Reduce has the same problem, because its mean
# over the positions of a sentence contains the padding. The means must be taken over the words
# alone. Only the user knows which positions are words, so `layer_ios`, `over_loader` and the optimizer take
# a function `counted(X, y)`. It returns a mask with one entry for each position, true for words.
#
# The mask is checked: a vector that is not zero at a position that is not counted is an error. This
# happens if the loss does not ignore the padding, as in the last lines of the cell. It also happens if
# other positions read the padding, as they do in attention without `key_padding_mask`. Then the block
# depends on the padding, which must be counted.

# %% tags=["hide-input"] fold="Checked: equation (6.7), and a mask that the loss contradicts is refused"
PAD, IGNORED, WORDS, LENGTH = 0, -100, 12, 16  # cross-entropy ignores targets of -100


class Tagger(Module):
    """A class for every word: classes on axis 1, as the loss has them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Sequential(Embedding(WORDS, 4), Linear(4, 4), Tanh(), Linear(4, 3))

    def forward(self, X: Tensor) -> Tensor:
        return self.net(X).movedim(2, 1)


def padded(words: int, sentences: int = 30) -> tuple[Tensor, Tensor]:
    """Sentences of so many words each."""
    X, y = torch.randint(1, WORDS, (sentences, LENGTH)), torch.randint(3, (sentences, LENGTH))
    X[:, words:], y[:, words:] = PAD, IGNORED
    return X, y


def is_word(X: Tensor, y: Tensor) -> Tensor:
    return X != PAD


tagger, tags = Tagger(), CrossEntropyLoss()
X, y = padded(words=LENGTH // 4)
of_all = layer_ios(tagger, tags, X, y)["net.1"]
of_words = layer_ios(tagger, tags, X, y, counted=is_word)["net.1"]
assert_exact(of_words.block(), of_all.block())  # no gradient depends on the padding

p = (~of_words.counted).double().mean()
padding = of_all.a[:, -1:]  # the last position of every sentence
A_padding = torch.einsum("nsi,nsj->ij", padding, padding) / len(X)
assert_exact(kfac(of_all).A, (1 - p) * kfac(of_words).A + p * A_padding)
assert relative_error(kfac(of_all).A, kfac(of_words).A) > 0.1
assert relative_error(kfac(of_all.reduced()).A, kfac(of_words.reduced()).A) > 0.1

try:  # targets at the padding, too: the loss does not ignore it
    layer_ios(tagger, tags, X, y.clamp(min=0), counted=is_word)
except ValueError as reason:
    print(textwrap.fill(f"ValueError: {reason}", width=90))
else:
    raise AssertionError("this should have been refused")

# %% [markdown]
# How much the padding matters depends on the embedding of its token. This embedding gets no gradient, so it
# stays as it was initialised. In the figure it has the size of the other embeddings. Every point is
# the mean of ten networks, each with data of its own.

# %% tags=["hide-input"] fold="Measured: errors for six shares of padding" alt="Two lines over the share of padding, from zero to fifteen sixteenths. The relative error of KFAC with the words alone stays level, that of KFAC with all positions rises." caption="Distance of KFAC-expand from the exact block of the first linear layer, mean and range of ten networks. It grows with the padding if all positions count."
lengths = [16, 12, 8, 4, 2, 1]
errors: dict[str, list[list[float]]] = {"all positions": [], "words alone": []}
for words in lengths:
    for name, counted in (("all positions", None), ("words alone", is_word)):
        errors[name].append([])
        for seed in range(10):
            torch.manual_seed(seed)
            model, batch = Tagger(), padded(words)
            io = layer_ios(model, tags, *batch, counted=counted)["net.1"]
            errors[name][-1].append(relative_error(kfac(io).dense(), io.block()))

shares = [1 - words / LENGTH for words in lengths]
for name, found in errors.items():
    mean = torch.tensor(found).mean(1)
    low, high = torch.tensor(found).amin(1), torch.tensor(found).amax(1)
    (line,) = plt.plot(shares, mean.cpu(), marker="o")
    plt.fill_between(shares, low.cpu(), high.cpu(), alpha=0.2)
    plt.text(0.96, mean[-1].item(), name, color=line.get_color(), va="center")
plt.xlim(-0.05, 1.25)
plt.xticks([0, 0.25, 0.5, 0.75, 1])
plt.xlabel("share of the padding")
plt.ylabel("relative error")
plt.show()

first, last = ({name: sum(e[i]) / 10 for name, e in errors.items()} for i in (0, -1))
print(f"without padding both are {first['words alone']:.0%} off")
print(f"with one word of {LENGTH}: {last['words alone']:.0%} and {last['all positions']:.0%}")
assert first["words alone"] == first["all positions"]
assert last["words alone"] < 1.2 * first["words alone"]
assert last["all positions"] > last["words alone"] + 0.1

# %% [markdown]
# An approximation that is a function of the gradients of data needs no mask, because a zero vector adds
# nothing to a gradient. TKFAC ([Chapter 15](15_tkfac.py)) needs none either: it weights every row of $A$
# with the square of its vector's norm, which is zero for padding.

# %% [markdown]
# ## One weight, both ways
#
# Many language models use one matrix $W$ in two layers. The last layer, the head, multiplies its
# input by $W$ and gets a number for every word of the vocabulary. The first layer, the embedding, looks up
# a word's row of the same $W$. For the word at position $t$ of datum $n$ this is $W^\top e_{nt}$, where
# $e_{nt}$ is the one-hot vector of the word. Let $h_{vnt}$ be the vector that comes back to the output
# of the embedding there. By [(4.3)], the gradient with respect to $W^\top$ has the terms
# $h_{vnt} e_{nt}^\top$, and the one with respect to $W$ has their transposes. The gradient of a datum is
# the sum over both uses:
#
# $$
# G_{vn} = \sum_s g_{vns}\, a_{ns}^\top + \sum_t e_{nt}\, h_{vnt}^\top .
# \tag{6.8}
# $$
#
# A `LayerIO` has one `a` for all vectors $v$, and `a` is the factor on the right of each outer product. In
# the second sum, the factor on the right is $h_{vnt}$, which depends on $v$. So one `LayerIO` cannot hold
# both sums, and capture gives a pair of them, the `TiedIO`.
#
# Inserting [(6.8)] into [(4.7)] gives the exact block. The outer product of a sum has four parts: the block of
# the head, that of the embedding, and two with a term of one sum and a term of the other. KFAC of
# the pair leaves out these *mixed parts* and takes one Kronecker product for each use. Let $A$ and $B$ be the
# head's factors ([Chapter 5](05_kfac.py)). The embedding's factors $A'$ and $B'$ change places, as it
# applies $W^\top$:
#
# $$
# K = B \otimes A + A' \otimes B',
# \qquad
# A' = \operatorname{diag}(\text{share of each word in the text}),
# \quad
# B' = \sum_{v,n,t} h_{vnt} h_{vnt}^\top .
# \tag{6.9}
# $$

# %% tags=["hide-input"] fold="Checked: the block of a tied weight, and equation (6.9)"
VOCABULARY, SHORT = 7, 5


class Tied(Module):
    """A language model without a past: it says the next word by the present one."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = Embedding(VOCABULARY, 4), Linear(4, 4)
        self.head = Linear(4, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, X: Tensor) -> Tensor:
        return self.head(self.inner(self.words(X)).tanh()).movedim(2, 1)


def sentences(number: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(VOCABULARY, (number, SHORT + 1))
    return text[:, :-1], text[:, 1:]


model, loss = Tied(), CrossEntropyLoss()
X, y = sentences(20)
io, exact = layer_ios(model, loss, X, y)["words"], diagonal_blocks(model, ggn(model, loss, X, y))
assert isinstance(io, TiedIO)
assert_exact(io.block(), exact["words"])

K, of_head, of_words = kfac(io), kfac(io.direct), kfac(io.turned)
frequencies = X.flatten().bincount(minlength=VOCABULARY) / X.numel()
assert_exact(K.second.B, frequencies.diag())
assert_exact(
    K.dense(), torch.kron(of_head.B, of_head.A) + torch.kron(frequencies.diag(), of_words.B)
)

# %% [markdown]
# How far is $K$ from the exact block? The next cell prints four errors: of $K$, of each of its
# two products alone, and of the sum of the *exact* blocks of both uses. The last error is due to the mixed
# parts alone. It would remain if both Kronecker products were exact.

# %% tags=["hide-input"] fold="Measured: four errors for a tied weight"
places = torch.arange(VOCABULARY * 4).reshape(VOCABULARY, 4).T.flatten()  # W^T, read as W is


def turned(block: Tensor) -> Tensor:
    """A block on the transpose of the weight as one on the weight."""
    found = torch.empty_like(block)
    found[places.unsqueeze(1), places] = block
    return found


kinds = (
    "KFAC of both uses",
    "KFAC of the head alone",
    "KFAC of the embedding alone",
    "exact blocks of both uses, no mixed parts",
)
errors = {kind: [] for kind in kinds}
for seed in range(10):
    torch.manual_seed(seed)
    model, (X, y) = Tied(), sentences(20)
    io = layer_ios(model, loss, X, y)["words"]
    both, head = kfac(io).dense(), kfac(io.direct).dense()
    embedding = turned(kfac(io.turned).dense())
    assert_exact(head + embedding, both)
    apart = io.direct.block() + turned(io.turned.block())
    for kind, M in zip(kinds, (both, head, embedding, apart), strict=True):
        errors[kind].append(relative_error(M, io.block()))
for kind, found in errors.items():
    print(f"{kind:42}{sum(found) / 10:5.0%} off ({min(found):.0%} to {max(found):.0%})")
assert min(errors[kinds[-1]]) > 0.05

try:
    ekfac(io)
except NotImplementedError as reason:
    print("\n" + textwrap.fill(f"NotImplementedError: {reason}", width=90))
else:
    raise AssertionError("this should have been refused")

# %% [markdown]
# The mixed parts are a large part of the block, and no Kronecker product for one use contains them. A
# sum of two products is also harder to invert than one ([Chapter 16](16_kpsvd.py)). So the optimizer does
# not precondition such a weight. It raises an error, which asks to leave both layers out with `layers=[...]`
# and to give their weight to another optimizer with `rest`. Approximations that need rows, such as EKFAC,
# refuse the pair, as the last lines above show.

# %% [markdown]
# ## What goes wrong in practice
#
# For a single convolution with a squared error at every output pixel, expand is exact. With an average over pixels,
# reduce is exact. So any error that is left there is a mistake of the implementation. We make ten mistakes on purpose
# and measure their errors. Stride, padding and dilation all differ from their defaults, and every size from every
# other. PyTorch's own `unfold` makes the patches, so that we can get them wrong:

# %% tags=["hide-input"] fold="Measured: the errors of ten mistakes"
settings = {"kernel_size": (3, 2), "stride": 2, "padding": 1, "dilation": 2}
conv = Conv2d(2, 5, bias=False, **settings)
X = torch.randn(7, 2, 9, 11)
z = conv(X)
N, S, pixels = len(X), z.shape[2] * z.shape[3], X.shape[2] * X.shape[3]
per_pixel, averaged = Sequential(conv), Sequential(conv, Mean(2, 3))
io = layer_ios(per_pixel, MSELoss(), X, torch.randn_like(z))["0"]
io_mean = layer_ios(averaged, MSELoss(), X, torch.randn(N, 5))["0"]


def factor_A(**wrong) -> Tensor:
    a = unfold(X, **{**settings, **wrong}).mT.flatten(0, 1)  # [N S, d_in]
    return a.T @ a / len(a)


A, B = factor_A(), kfac(io).B
assert_exact(A, kfac(io).A)
kernel_first = torch.arange(2 * 3 * 2).reshape(2, 3, 2).permute(1, 2, 0).flatten()
mean = io_mean.reduced()
mistakes = {
    "correct (expand)": (torch.kron(B, A), io),
    "A divided by N, not N S": (torch.kron(B, S * A), io),
    "A divided by input pixels": (torch.kron(B, S / pixels * A), io),
    "patches in the order of another framework": (
        torch.kron(B, A[kernel_first][:, kernel_first]),
        io,
    ),
    "factors in the wrong order": (torch.kron(A, B), io),
    "stride ignored": (torch.kron(B, factor_A(stride=1)), io),
    "padding ignored": (torch.kron(B, factor_A(padding=0)), io),
    "dilation ignored": (torch.kron(B, factor_A(dilation=1)), io),
    "correct (reduce)": (kfac(mean).dense(), io_mean),
    "g averaged, not summed": (kfac(LayerIO(mean.a, mean.g / S)).dense(), io_mean),
    "a summed, not averaged": (kfac(LayerIO(mean.a * S, mean.g)).dense(), io_mean),
    "expand instead of reduce": (kfac(io_mean).dense(), io_mean),
}
for mistake, (wrong, right) in mistakes.items():
    error = relative_error(wrong, right.block())
    print(f"{mistake:42}{error:9.1e}")
    assert error < 1e-10 if "correct" in mistake else error > 0.01

# %% [markdown]
# **Divided by the wrong number of positions.** The factors need the number of *output* positions.
# With a stride the input has more pixels, and the curvature comes out too small (raised in
# [pytorch-a2c-ppo-acktr #54](https://github.com/ikostrikov/pytorch-a2c-ppo-acktr-gail/issues/54)).
#
# **Is there a factor $S$?** Papers distribute $1/S$ differently over the two factors, and the
# question has come up in public ([nngeometry #75](https://github.com/tfjgeorge/nngeometry/pull/75),
# [tensorflow/kfac #41](https://github.com/tensorflow/kfac/issues/41)). A comparison of the products $B \otimes A$ with
# the exact block answers it, in a case in which KFAC is exact.
#
# **Axes in another order.** A patch has a channel axis and spatial axes, and frameworks order them
# differently. The order must be that of the flattened weight, here channels first. A wrong order changes no size, so
# no error is raised. (A similar mistake, a missing transpose, was mended in
# [LBANN #2010](https://github.com/LBANN/lbann/pull/2010).)
#
# **Layers that are never called.** The output projection of `torch.nn.MultiheadAttention` is a layer, but a function
# uses its weight: see [Chapter 10](10_capture.py).

# %% [markdown]
# ## In one minute
#
# - One matrix at many positions: the gradient of a datum is a sum over positions, and its curvature has cross terms.
# - Expand treats positions as data and drops the cross terms. Reduce averages $a$, sums $g$, and drops a covariance
#   over positions. Use expand for a loss per position, reduce for a loss of the average.
# - In deep linear networks with squared error, expand is exact for a loss at every position, reduce before an average.
#   Behind the average both are.
# - Reduce is exact for biases whose input is 1 at every position, and zero for the keys of attention.
# - The usual mistakes are factors of $S$, the order of the axes of a patch, and counted padding.
#
# ## Exercises
#
# **Exercise 6.1.** A deep linear network averages over $S$ positions at the end, and all positions
# of a datum have the same input. By which factor is expand off?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With equal inputs $a_{ns} = \bar a_n$, so $A_\text{expand} = A_\text{reduce}$, while
# $B_\text{expand} = B_\text{reduce} / S$ by [(6.6)]. Reduce is exact, so expand is the exact block
# divided by $S$.
#
# </details>
#
# **Exercise 6.2.** Show that $A_\text{expand} - A_\text{reduce}$ is positive semi-definite, and say
# in words what it is.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $\tfrac1S \sum_s a_{ns} a_{ns}^\top - \bar a_n \bar a_n^\top
# = \tfrac1S \sum_s (a_{ns} - \bar a_n)(a_{ns} - \bar a_n)^\top$, the covariance of the inputs of datum
# $n$ over its positions. The difference is its mean over data.
#
# </details>
#
# **Exercise 6.3.** Circular padding with stride one keeps reduce exact. Why does stride two in the
# second convolution break it for the first?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With stride two, shifting the input by one pixel does not shift the output. Pixels with even and
# with odd coordinates meet different entries of the kernel, so they receive different vectors, and
# the first condition of [Theorem 6.1] fails. (This is for an odd kernel. A kernel of size two with stride two
# meets every pixel once, but pixels next to each other with different entries, so that it fails, too.)
#
# </details>
#
# **Exercise 6.4.** Positions are *added up* instead of averaged before the loss. Which of the two
# settings is exact now?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Reduce, as before: all positions receive the same vector, now without the factor $1/S$. Inputs are averaged
# and vectors are summed. The formula needs no change, because all scale is in $g$.
#
# </details>
#
# **Exercise 6.5.** Is reduce zero for the queries of attention, too?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# No. Shifting all *queries* by $c$ changes the score for token $t$ by $c^\top k_t / \sqrt d$, which
# differs between the $t$ that softmax compares.
#
# </details>
#
# **Exercise 6.6 (write it).** Write `expand(a, g)` and `reduce(a, g)` that return $A$ and $B$ from $a$ of shape
# $[N, S, d_\text{in}]$ and $g$ of shape $[V, N, S, d_\text{out}]$, with torch alone. The cell below has
# `check_settings`, which tests yours where they must be exact.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def expand_by_hand(a, g):
#     rows, vectors = a.flatten(0, 1), g.flatten(0, 2)
#     return rows.T @ rows / len(rows), vectors.T @ vectors
#
#
# def reduce_by_hand(a, g):
#     return expand_by_hand(a.mean(1, keepdim=True), g.sum(2, keepdim=True))
# ```
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises; check_settings of Exercise 6.6"
S = 5
X, y = torch.rand(N, 1, 5).expand(N, S, 5), torch.randn(N, 2)
for io in layer_ios(linear_network(4), MSELoss(), X, y).values():
    assert_exact(S * kfac(io).dense(), io.block())

X = torch.rand(N, S, 5)
for io in layer_ios(linear_network(4), MSELoss(), X, y).values():
    gap = kfac(io).A - kfac(io.reduced()).A
    centred = io.a - io.a.mean(1, keepdim=True)
    assert_exact(gap, torch.einsum("nsi,nsj->ij", centred, centred) / (N * S))
    assert torch.linalg.eigvalsh(gap)[0] > -1e-12

circular = {"padding": 1, "padding_mode": "circular"}
for stride in (1, 2):
    strided = Sequential(Conv2d(2, 3, 3, **circular), Conv2d(3, 4, 3, stride=stride, **circular))
    strided.append(Mean(2, 3))
    io = layer_ios(strided, MSELoss(), torch.rand(N, 2, 6, 8), torch.randn(N, 4))["0"]
    error = relative_error(kfac(io.reduced()).dense(), io.block())
    assert error < 1e-10 if stride == 1 else error > 1e-3


class Sum(Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1)


added = Sequential(Linear(5, 4), Linear(4, 2), Sum())
for io in layer_ios(added, MSELoss(), X, y).values():
    assert_exact(kfac(io.reduced()).dense(), io.block())
    assert relative_error(kfac(io).dense(), io.block()) > 0.01

model, inputs = networks["attention"]
io = layer_ios(model, CrossEntropyLoss(), inputs[:50], labels[:50])["1.q"]
assert kfac(io.reduced()).dense().norm() > 0.01 * io.block().norm()


def expand_by_hand(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A solution of Exercise 6.6."""
    rows, vectors = a.flatten(0, 1), g.flatten(0, 2)
    return rows.T @ rows / len(rows), vectors.T @ vectors


def reduce_by_hand(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """A solution of Exercise 6.6: one position that has the mean input and the summed vector."""
    return expand_by_hand(a.mean(1, keepdim=True), g.sum(2, keepdim=True))


def check_settings(expand, reduce) -> None:
    X = torch.rand(11, 7, 5)
    for setting, pool_after, shape in ((expand, None, (11, 7, 2)), (reduce, 4, (11, 2))):
        for reduction in ("mean", "sum"):
            loss, y = MSELoss(reduction=reduction), torch.randn(*shape)
            for io in layer_ios(linear_network(pool_after), loss, X, y).values():
                A, B = setting(io.a, io.g)
                assert_exact(torch.kron(B, A), io.block())


check_settings(expand_by_hand, reduce_by_hand)
print("Exercises 6.1 to 6.6: all hold")

# %% [markdown]
# ## Appendix: reduce without patches
#
# Reduce costs less: the paper finds it generally faster than expand. Expand needs all $N S$ patches, and every pixel of
# the image is copied into each patch that contains it. With stride one and away from the border, these are as many as
# the kernel has entries. Reduce needs only the *average* patch. Entry $j$ of it, for a kernel along one axis, is
#
# $$
# \begin{aligned}
# \bar a_j &= \frac1S \sum_{s=0}^{S-1} x_{\,s \cdot \text{stride} + j \cdot \text{dilation}}
# = \frac1S \sum_p x_p P_{pj}, \\
# P_{pj} &= \begin{cases} 1 & p = s \cdot \text{stride} + j \cdot \text{dilation for some } s, \\
# 0 & \text{else}. \end{cases}
# \end{aligned}
# \tag{6.10}
# $$
#
# The pattern $P$ says which pixels meet which entry of the kernel. In two dimensions there is one pattern per axis,
# because rows and columns of the image are chosen independently. So the average patch is the image contracted with
# one small matrix per axis, and no patch is ever formed. Patterns of this kind are those of
# [Dangel (2024)](bibliography.md#einsum), who writes convolutions as contractions and reports that a KFAC variant
# becomes up to 4.5 times faster.


# %% tags=["hide-input"] alt="Three heat maps of zeros and ones with three rows, one per entry of the kernel, and ten columns, one per pixel. For stride 1 each row is a bar of eight pixels, shifted by one from row to row. For stride 2 every second pixel is marked. For dilation 2 bars of six pixels are shifted by two." caption="The pattern $P^\\top$ for ten pixels and a kernel of three: each row marks the pixels that one entry of the kernel meets."
def pattern(pixels: int, k: int, stride: int, dilation: int) -> Tensor:
    S = (pixels - dilation * (k - 1) - 1) // stride + 1
    P = torch.zeros(pixels, k)
    for j in range(k):
        for s in range(S):
            P[s * stride + j * dilation, j] = 1
    return P


shown = {f"stride {s}, dilation {d}": pattern(10, 3, s, d).T for s, d in ((1, 1), (2, 1), (1, 2))}
matrices(shown)

# %% [markdown]
# ### In the package
#
# With `flavour=REDUCE`, the inputs are averaged while they are captured. For each axis, the loop builds the pattern and
# contracts the image with it.

# %% tags=["remove-input"]
code(_averaged_patches)

# %% tags=["hide-input"] fold="Checked: four convolutions, and the pattern"
X, y = torch.rand(5, 2, 6, 7), torch.randn(5, 3)
for settings in ({}, {"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"dilation": 2}):
    model = Sequential(Conv2d(2, 3, (3, 2), **settings), Tanh(), Mean(2, 3))
    slow = layer_ios(model, MSELoss(), X, y)["0"].reduced()
    fast = layer_ios(model, MSELoss(), X, y, flavour=REDUCE)["0"]
    assert_exact(fast.a, slow.a)
    assert_exact(fast.g, slow.g)

x = torch.randn(10)
assert_exact(
    averaged_rows(Conv1d(1, 1, 3, stride=2), x.reshape(1, 1, 10))[0].flatten(),
    x @ pattern(10, 3, 2, 1) / 4,
)

# %% [markdown]
# How much is saved? We time both ways to the averaged patch, and record the largest tensor that
# each creates:


# %% tags=["hide-input"] fold="Measured: seconds and the largest tensor"
class Largest(TorchDispatchMode):
    """Remember the size of the largest storage that any operation returns."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor):
                self.size = max(self.size, t.untyped_storage().nbytes())
        return out


def cost(function, *arguments) -> tuple[float, float]:
    """Median seconds, and megabytes of the largest tensor."""
    with Largest() as largest:
        function(*arguments)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function(*arguments)
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[1], largest.size / 2**20


def with_patches(conv: Conv2d, x: Tensor) -> Tensor:
    return input_rows(conv, x).mean(2, keepdim=True)


kernels, measured = [1, 3, 5, 7, 9], {"patches, then average": [], "without patches": []}
image = torch.randn(8, 8, 32, 32, device="cpu")
for k in kernels:
    conv = Conv2d(8, 1, k, padding=k // 2, device="cpu")
    with torch.device("cpu"):
        assert_exact(averaged_rows(conv, image)[0], with_patches(conv, image))
        measured["patches, then average"].append(cost(with_patches, conv, image))
        measured["without patches"].append(cost(averaged_rows, conv, image))

# %% tags=["hide-input"] alt="Two plots against the size of the kernel from 1 to 9, for 8 images of 32 by 32 pixels with 8 channels. Left, time: with patches it rises steeply, without it stays low. Right, the largest tensor in memory: with patches it grows with the square of the kernel, without it stays near the size of the image." caption="The averaged patch with and without all patches, on the CPU of the machine that built this page. Without patches, neither time nor memory grows with the size of the kernel as it does with them."
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.2))
for (name, rows), marker in zip(measured.items(), "os", strict=True):
    for ax, values in zip(axes, zip(*rows, strict=True), strict=True):
        (line,) = ax.semilogy(kernels, values, f"{marker}-")
        place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "right"}
        ax.annotate(name, (kernels[-1], values[-1]), color=line.get_color(), **place)
        ax.margins(y=0.15)
axes[0].set(xlabel="kernel size", ylabel="seconds", xticks=kernels)
axes[1].set(xlabel="kernel size", ylabel="largest tensor in MiB", xticks=kernels)
plt.show()
slow, fast = (rows[-1] for rows in measured.values())
print(
    f"9 × 9 kernel: {slow[0] / fast[0]:.0f} times faster, {slow[1] / fast[1]:.0f} times less memory"
)
assert fast[1] < slow[1] / 20

# %% [markdown]
# ## Further reading
#
# [Eschenhagen et al. (2023)](bibliography.md#weight-sharing) introduce the two settings as K-FAC-expand and
# K-FAC-reduce, prove that each is exact for deep linear networks in its setting, and train with both.
# [Grosse and Martens (2016)](bibliography.md#kfc) derive what is now called expand, for convolutions, from
# assumptions about images: compare these with [Theorem 6.1]. [Dangel et al. (2025)](bibliography.md#from-scratch)
# derive KFAC with code. In [Dangel, Müller and Zeinhofer (2024)](bibliography.md#pinns) positions are the coefficients
# of a Taylor expansion.
