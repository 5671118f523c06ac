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
# # 15. TKFAC: factors that know each other's size
#
# **Part V: Better and faster.** KFAC averages inputs as if every datum counted the same. In the curvature block it
# does not. What if every input is weighted by its vector, and every vector by its input?
#
# A trained classifier is right, and sure, about most of its data. For these data the vectors $g$ that the loss sends
# back are nearly zero, and so are their terms in the exact block. KFAC's factor of the inputs is the mean of
# $a a^\top$ over *all* data. So it mostly describes data that hardly contribute to the block ([Figure 15.1]).

# %% tags=["hide-input"]
from collections.abc import Iterator

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, MSELoss, Sequential, Tanh

from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.approximations.tkfac import (
    PartialTraces,
    _weighted_factors,
    even_traces_inverse,
    tkfac,
)
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.damping import balance, factored_inverse, relative_inverse
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one


def random_io(N: int, S: int = 1, V: int = 2) -> LayerIO:
    """Inputs and vectors of a layer with 5 inputs and 3 outputs, made up."""
    return LayerIO(torch.randn(N, S, 5), torch.randn(V, N, S, 3))


# %% tags=["hide-input"] alt="Three 15 by 15 heat maps of a layer on two data, of which one has no gradient. The exact block and TKFAC look the same. KFAC has the same tiles in the right places, but the pattern within the tiles is another one." caption="A layer on two data, of which the second has no gradient: the exact block, KFAC, and TKFAC, which is exact here."
io = random_io(2, V=1)
forgotten = LayerIO(io.a, torch.stack([io.g[:, 0], 0 * io.g[:, 1]], dim=1))
F, K, T = forgotten.block(), kfac(forgotten).dense(), tkfac(forgotten).dense()
assert_exact(T, F)
assert relative_error(K, F) > 0.3
picture = {"exact $F$": F, r"KFAC $B \otimes A$": K, "TKFAC": T}
matrices(picture, blocks=dict.fromkeys(picture, (5, 5)))

# %% [markdown]
# TKFAC weights every $a a^\top$ by the squared length of its $g$, and every $g g^\top$ by the squared length of its
# $a$. For one position per datum it is
#
# $$
# T = \frac{1}{\operatorname{tr} F}
# \Bigl( \sum_{vn} \lVert a_n \rVert^2\, g_{vn} g_{vn}^\top \Bigr) \otimes
# \Bigl( \sum_{vn} \lVert g_{vn} \rVert^2\, a_n a_n^\top \Bigr) ,
# \qquad
# \operatorname{tr} F = \sum_{vn} \lVert g_{vn} \rVert^2 \lVert a_n \rVert^2 .
# $$
#
# After this chapter you will be able to
#
# - derive these weights: they give the partial traces of the block, which are sums of its entries, and $T$ is the
#   only Kronecker product with the same partial traces;
# - say in which sense TKFAC is the nearest product, and in which sense KFAC may be nearer;
# - average it over batches, damp it, and correct its eigenvalues (TEKFAC).
#
# ## A datum without gradient
#
# [Figure 15.1] has two data, and nothing comes back to the second: $g_2 = 0$. The block is the
# block of the first datum alone, $F = g_1 g_1^\top \otimes a_1 a_1^\top$, a Kronecker product. KFAC has the
# right $B$, but its $A$ is half $a_1 a_1^\top$ and half $a_2 a_2^\top$, and the second half is not in the block.
#
# ## Summing over the other side
#
# Rows and columns of $F$ are numbered by pairs: an output $o$ and an input $i$. The sum over all $o = p$ in
# $F_{(o,i),(p,j)}$ is a matrix over the inputs. The sum over all $i = j$ is a matrix over the
# outputs. They are the **partial traces** of $F$,
#
# $$
# A_{ij} = \sum_o F_{(o,i),(o,j)} ,
# \qquad
# B_{op} = \sum_i F_{(o,i),(p,i)} .
# \tag{15.1}
# $$
#
# (In this chapter $A$ and $B$ are these, not KFAC's.) Write the diagonal of $F$ as a table with rows $o$ and
# columns $i$. Then the diagonals of $B$ and $A$ are the sums along its rows and columns, its marginals. Both have
# the trace of $F$. Since $F$ is a sum of $\operatorname{vec}(G) \operatorname{vec}(G)^\top$ with entries
# $G_{oi} G_{pj}$, over all gradients $G_{vn}$,
#
# $$
# \begin{aligned}
# A_{ij} &= \sum_{v,n} \sum_o (G_{vn})_{oi} (G_{vn})_{oj} ,
# & A &= \sum_{v,n} G_{vn}^\top G_{vn} , \\
# B_{op} &= \sum_{v,n} \sum_i (G_{vn})_{oi} (G_{vn})_{pi} ,
# & B &= \sum_{v,n} G_{vn} G_{vn}^\top .
# \end{aligned}
# \tag{15.2}
# $$
#
# As loops, once from the block and once from the gradients:


# %%
def partial_traces(F: Tensor, d_out: int, d_in: int) -> tuple[Tensor, Tensor]:
    A, B = torch.zeros(d_in, d_in), torch.zeros(d_out, d_out)
    F = F.reshape(d_out, d_in, d_out, d_in)  # o i p j
    for o in range(d_out):
        A += F[o, :, o, :]
    for i in range(d_in):
        B += F[:, i, :, i]
    return A, B


def from_gradients(io: LayerIO) -> tuple[Tensor, Tensor]:
    A, B = torch.zeros(5, 5), torch.zeros(3, 3)
    for v in range(io.g.shape[0]):
        for n in range(io.g.shape[1]):
            G = torch.zeros(3, 5)
            for s in range(io.g.shape[2]):
                G += torch.outer(io.g[v, n, s], io.a[n, s])
            A += G.T @ G
            B += G @ G.T
    return A, B


for S in (1, 4):
    io = random_io(7, S)
    F = io.block()
    A, B = partial_traces(F, 3, 5)
    for one, other in zip(from_gradients(io), (A, B), strict=True):
        assert_exact(one, other)
    assert_exact(A.trace(), F.trace())
    assert_exact(B.trace(), F.trace())

# %% [markdown]
# The partial traces of a Kronecker product $Y \otimes X$ are $\operatorname{tr}(Y)\, X$ and
# $\operatorname{tr}(X)\, Y$. So a product is determined by its partial traces. With $\operatorname{tr} F > 0$, the
# product with those of $F$ is
#
# $$
# T = \frac{1}{\operatorname{tr} F}\, B \otimes A .
# \tag{15.3}
# $$
#
# <div class="admonition theorem" markdown="1" id="thm-15.1">
# <p class="admonition-title" markdown="1"><b>Theorem 15.1 (TKFAC)</b></p>
#
# $T$ has both partial traces of $F$, and therefore its trace. It is the only Kronecker product
# that has them. If $F$ is a Kronecker product, then $T = F$.
#
# </div>
#
# **Proof.** The sum over the outputs in $T$ gives $\operatorname{tr}(B)\, A / \operatorname{tr} F = A$, and the sum
# over the inputs gives $B$, because $\operatorname{tr} A = \operatorname{tr} B = \operatorname{tr} F$. If
# $Y \otimes X$ has these as well, then $X = A / \operatorname{tr} Y$, $Y = B / \operatorname{tr} X$ and
# $\operatorname{tr} X \operatorname{tr} Y = \operatorname{tr} F$, hence $Y \otimes X = T$. If $F$ is a product, it is
# the only product with its own partial traces, so $T = F$. $\blacksquare$
#
# By the last sentence **TKFAC is exact wherever a Kronecker product can be exact.** KFAC is not:
# by [Theorem 5.1], it is exact only where $B_n = \sum_v g_{vn} g_{vn}^\top$ and
# $A_n = a_n a_n^\top$ are uncorrelated over the data, and the two data above are not such a case.
#
# ## With one position: weights
#
# For $G_{vn} = g_{vn} a_n^\top$ we have $G^\top G = \lVert g \rVert^2 a a^\top$ and
# $G G^\top = \lVert a \rVert^2 g g^\top$. So [(15.2)] is
#
# $$
# A = \sum_n \Bigl( \sum_v \lVert g_{vn} \rVert^2 \Bigr) a_n a_n^\top ,
# \qquad
# B = \sum_n \lVert a_n \rVert^2 \sum_v g_{vn} g_{vn}^\top ,
# \tag{15.4}
# $$
#
# which are KFAC's sums with a weight for every datum: in $A$ the squared lengths of its vectors, in $B$ that of its
# input. No gradient is formed; beyond KFAC's cost there are only these lengths.
# [Gao et al. (2021)](bibliography.md#tkfac), who found the method, write it as $\delta\, \Psi \otimes \Phi$ with
# $\Phi = A / \delta$ and $\Psi = B / \delta$ of trace one, and $\delta = \operatorname{tr} F$. "T" stands for
# trace-restricted. (That the partial traces determine the product, and Theorem 15.2 below, are not from the paper's
# abstract.)
#
# ### In the package
#
# With more than one position, gradients are formed, but only a bounded number of them at a time.

# %% tags=["beside", "remove-input"]
code(tkfac, _weighted_factors)

# %%
for S in (1, 4):
    io = random_io(7, S)
    F, T, K = io.block(), tkfac(io), kfac(io)
    A, B = partial_traces(F, 3, 5)
    assert_exact(T.A, A)
    assert_exact(T.B, B)
    assert_exact(T.dense(), torch.kron(B, A) / F.trace())
    for ours, kfacs, exact in zip(
        partial_traces(T.dense(), 3, 5), partial_traces(K.dense(), 3, 5), (A, B), strict=True
    ):
        assert_exact(ours, exact)
        assert relative_error(kfacs, exact) > 0.05
    print(f"{S} position(s): trace of KFAC over that of F: {(K.trace() / F.trace()).item():.3f}")

# %% [markdown]
# What is KFAC's trace, then? With one position and $b_n = \sum_v \lVert g_{vn} \rVert^2$,
#
# $$
# \operatorname{tr} F = \sum_n b_n \lVert a_n \rVert^2
# = \operatorname{tr}(\text{KFAC}) + N \operatorname{Cov} \bigl( b_n, \lVert a_n \rVert^2 \bigr) ,
# \tag{15.5}
# $$
#
# because KFAC's trace is the product of $\sum_n b_n$ and the mean of $\lVert a_n \rVert^2$. It is too large if
# large inputs have small vectors. Let all inputs be multiples of one vector and all vectors of another,
# $a_n = c_n a$ and $g_n = g / c_n$: every datum has the same gradient $g a^\top$, the block is $N$ times that of one
# datum, and KFAC is too large by the mean of $c_n^2$ times the mean of $c_n^{-2}$.

# %%
c = torch.tensor([0.3, 1, 2, 5]).reshape(4, 1, 1)
io = LayerIO(c * torch.randn(5), torch.randn(2, 1, 1, 3) / c)
factor = c.square().mean() * c.pow(-2).mean()
print(f"KFAC is {factor.item():.2f} times too large")
assert_exact(tkfac(io).dense(), io.block())
assert_exact(kfac(io).dense(), factor * io.block())

io = random_io(7)
b, squares = io.g.square().sum((0, 2, 3)), io.a.square().sum((1, 2))
covariance = ((b - b.mean()) * (squares - squares.mean())).mean()
assert_exact(kfac(io).trace() + 7 * covariance, io.block().trace())

# %% [markdown]
# Wherever KFAC is exact, $F$ is a Kronecker product, so that TKFAC is exact, too: deep linear networks with squared
# error, the last layer with squared error, one datum. In ordinary networks neither is exact.

# %%
X, targets, classes = torch.randn(11, 5), torch.randn(11, 3), torch.randint(3, (11,))
linear = Sequential(Linear(5, 4), Linear(4, 6), Linear(6, 3))
for io in layer_ios(linear, MSELoss(), X, targets).values():
    assert_exact(tkfac(io).dense(), io.block())

bent = Sequential(Linear(5, 4), Tanh(), Linear(4, 6), Tanh(), Linear(6, 3))
for io in layer_ios(bent, CrossEntropyLoss(), X[:1], classes[:1]).values():
    assert_exact(tkfac(io).dense(), io.block())
for io in layer_ios(bent, CrossEntropyLoss(), X, classes).values():
    k, t = (relative_error(M.dense(), io.block()) for M in (kfac(io), tkfac(io)))
    print(f"tanh and cross-entropy: KFAC {k:.3f}, TKFAC {t:.3f}")
    assert t > 0.01

# %% [markdown]
# **What is lost.** With one position and a bias, KFAC is exact for the bias *alone*, [(5.10)]: the bias's
# block is $\sum_n B_n$, and KFAC's is $B$ times a corner of $A$ that is one. TKFAC's $B$ is weighted by
# $\lVert a_n \rVert^2$. So the trace of the whole block is right, and the block of the bias is wrong.

# %%
lengths = torch.linspace(0.2, 3, 11)[:, None]
io = layer_ios(bent, CrossEntropyLoss(), lengths * X, classes)["0"]
bias = slice(5, None, 6)  # last column of W, rows stacked
exact = io.block()[bias, bias]
assert_exact(kfac(io).dense()[bias, bias], exact)
print(f"error of the bias's block: {relative_error(tkfac(io).dense()[bias, bias], exact):.3f}")
assert relative_error(tkfac(io).dense()[bias, bias], exact) > 0.05

# %% [markdown]
# ## A trained network
#
# How unequal are the weights? We train on handwritten digits, as in [Chapter 14](14_ekfac.py), and
# sort 200 fresh images by $b_n$, the weight that TKFAC gives them in $A$.

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
X, y = images[1000:1200], labels[1000:1200]
methods = {"KFAC": kfac, "TKFAC": tkfac, "EKFAC": ekfac, "TEKFAC": tekfac}
shares, errors = {}, {name: [] for name in methods}
for number in train(model, 160):
    if number % 10:
        continue
    io = layer_ios(model, loss, X, y)["2"]
    F = io.block()
    for name, method in methods.items():
        errors[name].append(relative_error(method(io).dense(), F))
    if number in (0, 20, 100):
        weights = io.g.square().sum((0, 2, 3)).sort(descending=True).values
        shares[number] = weights.cumsum(0) / weights.sum()
        half = (shares[number] < 0.5).sum().item() + 1
        print(f"after {number:3} steps: half of the weight is on {half} of 200 images")
assert (shares[0] < 0.5).sum() > 80 > 40 > (shares[100] < 0.5).sum()

# %% tags=["hide-input"] alt="Two plots. Left: the share of all weight against the number of images, sorted by weight. Before training it is nearly the diagonal; after 100 steps it rises steeply and is almost one after a hundred images. Right: relative errors of four approximations of the middle layer's block against training steps. All rise; TKFAC and TEKFAC are below KFAC and EKFAC throughout." caption="Left: the share of the weight that the images with the most weight have. KFAC's weights would be the dashed diagonal. Right: relative error of the middle layer's block in training; TEKFAC is the subject of a later section."
fig, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.5), layout="constrained")
for number, share in shares.items():
    left.plot(range(1, 201), share.cpu(), label=f"after {number} steps")
left.plot([0, 200], [0, 1], "--", color=left.xaxis.label.get_color(), linewidth=1)
left.set(xlabel="images, by weight", ylabel="share of all weight")
left.legend(fontsize="small")
for (name, curve), style in zip(errors.items(), ("o-", "o-", "--", "--"), strict=True):
    right.plot(range(0, 161, 10), curve, style, markersize=3, label=name)
right.set(xlabel="steps", ylabel="relative error", ylim=(0, None))
right.legend(fontsize="small")
plt.show()

# %% [markdown]
# Before training all images have nearly the same weight, and the weights make little difference. Afterwards most of
# the block comes from few images, and most of KFAC's mean over all inputs comes from the others. TKFAC's error is the
# smaller one at every measurement. The cell prints every fourth ratio:

# %%
K, T = torch.tensor(errors["KFAC"]), torch.tensor(errors["TKFAC"])
print("TKFAC's error over KFAC's:", ", ".join(f"{r:.2f}" for r in (T / K)[::4].tolist()))
assert (T < K).all()
assert (T / K)[4:].mean() < 0.95

# %% [markdown]
# ## In which sense it is the best
#
# "Nearest" needs a distance. In the Frobenius norm the nearest product is another one, the subject of
# [Chapter 16](16_kpsvd.py). TKFAC is the nearest in the sense of **relative entropy**, which for two
# positive definite matrices is
#
# $$
# \mathcal{D}(F, M) = \operatorname{tr} \bigl( F \log F - F \log M - F + M \bigr) ,
# \tag{15.6}
# $$
#
# with the logarithm of matrices. It is zero for $M = F$ and positive otherwise. For diagonal matrices of trace one it
# is the Kullback-Leibler divergence of two tables of probabilities. For tables it is known that, of all products of
# two distributions, the product of the table's own marginals is nearest to it. The same holds here:
#
# <div class="admonition theorem" markdown="1" id="thm-15.2">
# <p class="admonition-title" markdown="1"><b>Theorem 15.2 (nearest in relative entropy)</b></p>
#
# Let $F$ be positive definite. Among all positive definite Kronecker products $M$, the one with the smallest
# $\mathcal{D}(F, M)$ is TKFAC.
#
# </div>
#
# **Proof.** Let $M = \mu\, Y \otimes X$ with $\operatorname{tr} X = \operatorname{tr} Y = 1$. The logarithm turns
# the product into a sum, $\log M = \log(\mu) I + \log Y \otimes I + I \otimes \log X$, and
# $\operatorname{tr} \bigl( F\, (I \otimes \log X) \bigr) = \operatorname{tr}(A \log X)$ with the partial trace $A$.
# Up to a constant that does not depend on $M$,
#
# $$
# \mathcal{D}(F, M) = \mu - \operatorname{tr}(F) \log \mu
# - \operatorname{tr}(A \log X) - \operatorname{tr}(B \log Y) + \text{const} .
# \tag{15.7}
# $$
#
# The first two terms are smallest for $\mu = \operatorname{tr} F$. The third is, up to a constant,
# $\operatorname{tr} F$ times the relative entropy of $A / \operatorname{tr} F$ and $X$, both of trace one. So it is
# smallest for $X = A / \operatorname{tr} F$, and the fourth for $Y = B / \operatorname{tr} F$. $\blacksquare$


# %%
def log(M: Tensor) -> Tensor:
    eigenvalues, Q = torch.linalg.eigh(M)
    return Q * eigenvalues.log() @ Q.T


def relative_entropy(F: Tensor, M: Tensor) -> float:
    return (F @ (log(F) - log(M)) - F + M).trace().item()


larger = 0
for seed in range(100):
    torch.manual_seed(seed)
    io = random_io(30)
    F, T, K = io.block(), tkfac(io).kronecker(), kfac(io)
    best = relative_entropy(F, T.dense())
    assert best < relative_entropy(F, K.dense())
    for size in (0.3, 0.03):  # any other product
        X, Y = torch.randn(5, 5), torch.randn(3, 3)
        A, B = (P + size * P.trace() * Z @ Z.T for P, Z in ((T.A, X), (T.B, Y)))
        assert best < relative_entropy(F, torch.kron(B, A) / (1 + size) ** 2)
    larger += int(relative_error(T.dense(), F) > relative_error(K.dense(), F))
print(f"always nearer than KFAC in relative entropy; farther in Frobenius norm: {larger} of 100")
assert larger <= 2

# %% [markdown]
# ## Not always nearer than KFAC
#
# The paper's abstract announces an upper bound of TKFAC's error; [a
# summary](https://liner.com/review/tracerestricted-kroneckerfactored-approximation-to-natural-gradient) says that
# it is "generally smaller" than KFAC's, and that measured errors were smaller, too. TKFAC's errors were smaller here,
# too, in all or nearly all random layers above and at every measurement in the training. But an upper bound does not
# order two errors, and TKFAC is not always the nearer one in the Frobenius norm. The partial traces of the error
# $F - T$ are zero. So if one entry of its diagonal is not zero, others are not, either. KFAC's error has no such
# constraint.
#
# Take eight data: $a = (10, \pm c)$ and $g = (10, \pm c)$ with all four combinations of signs, for
# $c = \tfrac12$ and for $c = \tfrac32$. The signs are independent; only the size $c$ is common to $a$ and $g$.

# %%
points = torch.cartesian_prod(*3 * [torch.tensor([-1.0, 1.0])])
c, ten = torch.where(points[:, 0] < 0, 0.5, 1.5), torch.full((8,), 10.0)
a, g = torch.stack([ten, c * points[:, 1]], 1), torch.stack([ten, c * points[:, 2]], 1)
io = LayerIO(a[:, None], g[None, :, None])
F = io.block()
k, t = (relative_error(M.dense(), F) for M in (kfac(io), tkfac(io)))
print(f"KFAC {k:.3e}, TKFAC {t:.3e}, ratio {t / k:.3f}")
assert abs(t / k - 2) < 0.1
rows = ((kfac(io).dense() - F).diagonal(), (tkfac(io).dense() - F).diagonal())
for name, row in zip(("KFAC", "TKFAC"), rows, strict=True):
    print(f"{name:5} diagonal of the error:", " ".join(f"{x:7.3f}" for x in row.tolist()))
assert abs(rows[0][:3]).max() < 1e-10 < abs(rows[0][3])

# %% [markdown]
# KFAC errs in a single entry, the one of the second output and second input. TKFAC keeps the sums over rows and
# columns of the diagonal, written as a two by two table. So it errs in all four entries, with alternating signs, and
# the norm of its error is about twice that of KFAC. The rearranged matrix $R = \mathcal{R}(F)$ of
# [Chapter 5](05_kfac.py) shows the general form of TKFAC's error. With $e = \operatorname{vec} I$, of the size of the
# inputs or of the outputs,
#
# $$
# \mathcal{R}(T) = \frac{(R\, e)(e^\top R)}{e^\top R\, e} ,
# \tag{15.8}
# $$
#
# a matrix of rank one with the same products with $e$ as $R$. So the error is $R - \mathcal{R}(T) = P R$ with
# $P = I - (R e) e^\top / (e^\top R\, e)$. This $P$ is a projection, $P^2 = P$, and an orthogonal one only if $R e$ is
# a multiple of $e$. In general it is oblique, and an oblique projection makes some vectors longer.


# %%
def rearranged(M: Tensor, d_out: int, d_in: int) -> Tensor:
    M = M.reshape(d_out, d_in, d_out, d_in)  # o i p j
    return M.permute(0, 2, 1, 3).reshape(d_out * d_out, d_in * d_in)


io = random_io(7)
R, e_out, e_in = rearranged(io.block(), 3, 5), torch.eye(3).flatten(), torch.eye(5).flatten()
RT = rearranged(tkfac(io).dense(), 3, 5)
assert_exact(RT, torch.outer(R @ e_in, e_out @ R) / (e_out @ R @ e_in))
P = torch.eye(9) - torch.outer(R @ e_in, e_out) / (e_out @ R @ e_in)
assert_exact(P @ R, R - RT)
assert_exact(P @ P, P)
assert torch.linalg.matrix_norm(P, 2) > 1.01  # oblique: an orthogonal projection has norm 1
assert torch.linalg.matrix_rank(R - RT) == torch.linalg.matrix_rank(R) - 1

# %% [markdown]
# ## TEKFAC
#
# TKFAC's eigenvectors are an orthogonal basis, and [Theorem 14.1] gives the best
# eigenvalues for any basis. TKFAC's basis with these eigenvalues is TEKFAC, by
# [Gao et al. (2020)](bibliography.md#tekfac).

# %% tags=["beside", "remove-input"]
code(tekfac)

# %%
for S in (1, 4):
    for seed in range(50):
        torch.manual_seed(seed)
        io = random_io(7, S)
        F, T, E = io.block(), tkfac(io).dense(), tekfac(io)
        assert relative_error(E.dense(), F) < relative_error(T, F)
        assert_exact(E.trace(), F.trace())

# %% [markdown]
# So TEKFAC is never farther than TKFAC. Is it nearer than EKFAC? The two differ in the basis, and no theorem orders
# bases. On the two data of [Figure 15.1] TEKFAC is exact and EKFAC is not. In the second example EKFAC is the nearer
# one. Let inputs lie along two diagonals, twice as many along the first, but with vectors of half the squared length.
# Then TKFAC's $A$ has two equal eigenvalues, every orthogonal basis consists of eigenvectors, and a datum of small
# length determines which one the decomposition returns.

# %%
E, TE, F = ekfac(forgotten), tekfac(forgotten), forgotten.block()
print(f"a datum without gradient: EKFAC {relative_error(E.dense(), F):.3f}, TEKFAC", end=" ")
print(f"{relative_error(TE.dense(), F):.3f}")
assert_exact(TE.dense(), F)
assert relative_error(E.dense(), F) > 0.1

a = torch.tensor([[1.0, 1], [1, 1], [1, -1], [0.1, 0]])
g = torch.tensor([[1.0, 0], [1, 0], [0, 2**0.5], [1, 0]])
hidden = LayerIO(a[:, None], g[None, :, None])
E, TE, F = ekfac(hidden), tekfac(hidden), hidden.block()
print(f"a hidden basis:           EKFAC {relative_error(E.dense(), F):.3f}, TEKFAC", end=" ")
print(f"{relative_error(TE.dense(), F):.3f}")
assert relative_error(TE.dense(), F) > 5 * relative_error(E.dense(), F)

# %% [markdown]
# On the trained network, [Figure 15.2], the basis of TKFAC was the better one:

# %%
assert errors["TEKFAC"][-1] < errors["EKFAC"][-1]
print({name: round(curve[-1], 3) for name, curve in errors.items()})

# %% [markdown]
# ## What the weights cost
#
# All errors so far were measured against the block *of the same data*. An optimizer has a batch and needs the block
# of all data. KFAC's $A$ is a mean over all images of the batch. TKFAC's is, after training, a mean over the few
# images with large weight, so it scatters more from batch to batch. We measure the distance to the block of all
# images, for batches of different sizes.

# %%
torch.manual_seed(0)
everything = layer_ios(model, loss, images, labels)["2"]
F, sizes = everything.block(), (20, 50, 200, 800)
distances = {"KFAC": [], "TKFAC": [], "the batch's own block": []}
for N in sizes:
    trials = []
    for _ in range(10):
        batch = torch.randperm(len(images))[:N]
        io = layer_ios(model, loss, images[batch], labels[batch])["2"]
        candidates = kfac(io).dense(), tkfac(io).dense(), io.block()
        trials.append([relative_error(M, F) for M in candidates])
    for curve, value in zip(distances.values(), torch.tensor(trials).mean(0), strict=True):
        curve.append(value.item())
for name, curve in distances.items():
    print(f"{name:22}", " ".join(f"{value:6.2f}" for value in curve))
assert distances["KFAC"][0] < 0.8 * distances["the batch's own block"][0]
assert distances["the batch's own block"][-1] < 0.7 * distances["KFAC"][-1]
assert distances["TKFAC"][0] < distances["the batch's own block"][0]
assert distances["TKFAC"][-1] < distances["KFAC"][-1]

# %% tags=["hide-input"] alt="Log-log plot of the distance to the block of all images against the size of the batch, for KFAC, TKFAC and the batch's own exact block. For 20 images the exact block is the farthest. For 800 images the exact block is nearest by far, and TKFAC is nearer than KFAC." caption="Distance of what a batch gives to the block of all 1797 images, by the size of the batch (mean of ten batches). In small batches, a wrong but steady matrix is nearer than a right but noisy one."
fig, ax = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
for (name, curve), style in zip(distances.items(), ("o-", "o-", "s--"), strict=True):
    ax.loglog(sizes, curve, style, markersize=4, label=name)
ax.set(xlabel="images in the batch", ylabel="relative distance to the full block")
ax.set_xticks(sizes, [str(N) for N in sizes])
ax.set_yticks([0.25, 0.5, 1, 2], ["0.25", "0.5", "1", "2"])
ax.minorticks_off()
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# For 20 images the batch's exact block is the worst estimate of the three: a Kronecker product has far fewer numbers
# to be estimated. TKFAC lies between it and KFAC. With large batches TKFAC's smaller error shows.
#
# ## Over batches
#
# Which numbers should be averaged over batches? Equation [(15.3)] divides by the trace, and a mean of ratios is not
# the ratio of the means. But partial traces are linear in $F$. The mean of the partial traces of several blocks is
# the partial trace of their mean. So the state that an estimator keeps is $A$ and $B$ as in [(15.2)], the two
# fields of `PartialTraces`, without the division. The division is made when the matrix is used.

# %% tags=["beside", "remove-input"]
code(PartialTraces.kronecker)

# %% [markdown]
# `MovingAverage` moves $A$ and $B$ towards those of the newest batch. For TKFAC this
# gives **TKFAC of the averaged block, exactly**, for any number of batches and any decay. KFAC has no such
# property.

# %%
first = layer_ios(model, loss, images[:200], labels[:200])["2"]
second = layer_ios(model, loss, images[200:400], labels[200:400])["2"]
second = LayerIO(2 * second.a, second.g)  # a batch of larger inputs
average = 0.7 * first.block() + 0.3 * second.block()
A, B = partial_traces(average, 16, 17)

M = MovingAverage(tkfac).update(tkfac(first), second, 0.3)
assert_exact(M.dense(), torch.kron(B, A) / average.trace())

ratios = MovingAverage(lambda io: tkfac(io).kronecker())
wrong = ratios.update(tkfac(first).kronecker(), second, 0.3)
error = relative_error(partial_traces(wrong.dense(), 16, 17)[0], A)
print(f"factors of trace one, averaged: error of the partial trace {error:.3f}")
assert_exact(wrong.trace(), average.trace())  # the trace does not see it
assert error > 0.01

# %% [markdown]
# ## Damping
#
# `M.inverse(damping)` is exact, as for every Kronecker product. The cheaper way damps both factors by a
# share of $\sqrt\delta$ (here $\delta$ is the damping). The paper splits the trace evenly, so that both
# factors have trace $\sqrt{\operatorname{tr} F}$, and adds $\sqrt\delta$ to both. [Chapter 9](09_damping.py)
# balances by $\pi^2$, the ratio of the *mean* eigenvalues. With equal traces that is
# $d_\text{out} / d_\text{in}$, so the two agree for square layers only. Otherwise the balance by $\pi$ adds less
# trace: of all $\pi$ it gives the damped product the smallest trace. In both cases this trace is larger than that of
# $F + \delta I$.
#
# In the optimizer, `invert=even_traces_inverse` is the paper's damping, and `invert=factored_inverse`, the default,
# is that of Chapter 9.
#
# **For convolutional networks** the paper has a second damping, "to maintain the superiority of second-order
# optimization methods during training", as its abstract says. The abstract of the TEKFAC paper takes it over. We
# have seen the full text of neither. [Public notes on
# both](https://github.com/baolgr/new_adafisher/blob/6a841f5a2ee22b62f631e5ff4ce7e2ced3116ce3/docs/reports/plan.md#45-tekfac)
# quote it for TEKFAC: in a convolutional layer it is $\operatorname{tr}(\Theta) / \dim \Theta$ with TEKFAC's
# eigenvalues $\Theta$, their mean, or a fixed number over $\dim \Theta$ if that is larger. The linear layers of
# such a network get the largest of these. In the package, `invert=relative_inverse` with `damping=1.0` takes the
# mean of each layer's own eigenvalues. The fixed number is missing, and so is the rule for linear layers, for which
# one would have to know all layers at once. For TKFAC the notes name an equation, (5.16), and not the formula.

# %% tags=["remove-input"]
code(even_traces_inverse)


# %%
def damped(K: Kronecker, damping: float, pi: float) -> Tensor:
    A = K.A + pi * damping**0.5 * torch.eye(len(K.A))
    B = K.B + damping**0.5 / pi * torch.eye(len(K.B))
    return torch.kron(B, A)


io = LayerIO(torch.randn(40, 1, 12), torch.randn(1, 40, 1, 3))
T, delta = tkfac(io), 0.1
root = T.trace().sqrt()
even = Kronecker(T.A / root, T.B / root)  # the same matrix, both factors of equal trace
assert_exact(even.dense(), T.dense())
assert_exact(balance(even).square(), torch.tensor(3 / 12))
excess = {}
for name, pi in (("even traces (paper)", 1.0), ("even means (pi)", balance(even).item())):
    M = damped(even, delta, pi)
    excess[name] = (M.trace() - T.trace() - delta * 36).item()
    print(f"{name:20} trace in excess of exact damping: {excess[name]:.2f}")
assert 0 < excess["even means (pi)"] < 0.9 * excess["even traces (paper)"]

G = io.gradients().sum((0, 1))
exact_step = (torch.linalg.inv(damped(even, delta, 1.0)) @ G.flatten()).reshape(3, 12)
assert_exact(even_traces_inverse(T, delta) @ G, exact_step)
difference = relative_error(factored_inverse(T, delta) @ G, exact_step)
print(f"by mean eigenvalues, the step differs by {difference:.1%}")
assert difference > 0.01

TE = tekfac(io)
mean_eigenvalue = (TE.trace() / TE.scale.numel()).item()
assert_exact(relative_inverse(TE, 1.0) @ G, TE.inverse(mean_eigenvalue) @ G)

# %% [markdown]
# ## What goes wrong in practice
#
# **The weights of the batch for the weights of the data.** One can weight KFAC's factors by traces of the *batch*:
# $\operatorname{tr}(B)\, A$ and $\operatorname{tr}(A)\, B$, with KFAC's $A$ and $B$, divided by the trace of their
# product. Within one batch these numbers are the same for all data, so they cancel. What is left is KFAC, to the
# last digit. A sum over batches weights every batch by its traces. If a batch is one datum, that is TKFAC again. So
# it is in [code by others for
# adapters](https://github.com/idiap/bayesian-peft/blob/1f76c96e6819b3899a4e762ce1ea4c79071ca998/peft/src/peft/tuners/lora/model.py#L851-L857):
# the function has traces of a batch, and [the
# script](https://github.com/idiap/bayesian-peft/blob/1f76c96e6819b3899a4e762ce1ea4c79071ca998/lm/scripts/compute_hessian/opt-350m_tkfac.sh#L12)
# that calls it has batches of one text. (Within a text, all positions get the same weight.)

# %%
io = random_io(7)
K = kfac(io)
A, B = K.B.trace() * K.A, K.A.trace() * K.B
assert_exact(PartialTraces(A, B).dense(), K.dense())
assert relative_error(tkfac(io).dense(), K.dense()) > 0.05

one_by_one = [kfac(LayerIO(io.a[n : n + 1], io.g[:, n : n + 1])) for n in range(7)]
A = sum(K.B.trace() * K.A for K in one_by_one)
B = sum(K.A.trace() * K.B for K in one_by_one)
assert_exact(PartialTraces(A, B).dense(), tkfac(io).dense())

# %% [markdown]
# A test on data with equal lengths would not notice. Use data with $g_n = 0$, as in the first figure.
#
# **Weights per position.** With weight sharing, [(15.4)] for every position as if it were a datum leaves out the
# products of different positions, and the trace is that of another matrix. It is right in expectation if these
# products have mean zero.
# [The notes](https://github.com/baolgr/new_adafisher/blob/6a841f5a2ee22b62f631e5ff4ce7e2ced3116ce3/docs/reports/plan.md#44-tkfac)
# say that the paper assumes inputs and vectors of different positions of a convolution to be uncorrelated (Assumption
# 4.1). So the paper's TKFAC of a convolution is this sum, and the package's is not:

# %%
io = random_io(7, S=4)
flat = LayerIO(io.a.reshape(28, 1, 5), io.g.reshape(2, 28, 1, 3))
assert_exact(tkfac(flat).trace(), flat.block().trace())
assert abs(tkfac(flat).trace() - io.block().trace()) > 0.01 * io.block().trace()
assert_exact(kfac(flat).dense(), kfac(io).dense())  # KFAC gives no hint

# %% [markdown]
# **Zero over zero.** If nothing comes back to a layer, all of $A$, $B$ and the trace are zero, and
# $B \otimes A / \operatorname{tr} F$ is not a number. The package returns zero.

# %%
dead = tkfac(LayerIO(io.a, 0 * io.g))
assert (dead.dense() == 0).all()
assert_exact(dead.inverse(0.5).dense(), 2 * torch.eye(15))

# %% [markdown]
# ## The paper and this package
#
# What is in [Gao et al. (2021)](bibliography.md#tkfac) on TKFAC and in [Gao et al. (2020)](bibliography.md#tekfac)
# on TEKFAC, as far as their abstracts, [a summary of
# TKFAC](https://github.com/junaidaliop/zij/blob/74a271e44cd8b7d1d855bd90a879c4449e359033/docs/math/tkfac.md#L7) and
# [notes on both
# papers](https://github.com/baolgr/new_adafisher/blob/6a841f5a2ee22b62f631e5ff4ce7e2ced3116ce3/docs/reports/plan.md#44-tkfac)
# tell, and what is here. We found no code of the authors.
#
# | | the paper | here |
# | --- | --- | --- |
# | algorithms | TKFAC; TEKFAC, with the theorem that it is at least as near as TKFAC | `tkfac`; `tekfac`, and `AmortisedEKFAC(factors=MovingAverage(tkfac))` in training |
# | shared weights | positions as if they were uncorrelated | partial traces of the exact block, with the products of all positions |
# | average over batches | of the damped factors; for TEKFAC, of the eigenvalues and of the factors | of the factors without damping and without their division by the trace, which is exact for the averaged block |
# | Fisher | not checked | any; in the optimizer, one drawn label for each sample |
# | damping | $\sqrt\lambda$ on two factors of equal trace | `even_traces_inverse`; the default is `factored_inverse`, which adds less |
# | damping for convolutional networks | for TEKFAC the mean eigenvalue, with a floor; for TKFAC not checked | `relative_inverse` with `damping=1.0`, without the floor |
# | numbers | not checked | those of the optimizer, [Chapter 13](13_in_practice.py) |
# | headline, TKFAC | performs better than several state-of-the-art algorithms on some deep networks | [Chapter 23](23_comparison.py) trains it beside its controls, without the damping for convolutional networks; networks of the size of the paper's are out of reach here |
# | headline, TEKFAC | outperforms SGD with momentum, Adam, EKFAC and TKFAC on several deep networks | the same |
#
# ## In one minute
#
# - **Weights.** TKFAC weights inputs by the squared lengths of the vectors and vectors by those of the inputs,
#   [(15.4)].
# - **Traces.** These sums are the partial traces of the block. TKFAC is the only Kronecker product that has them,
#   and it is exact wherever a Kronecker product can be exact ([Theorem 15.1]).
# - **Nearest** in relative entropy ([Theorem 15.2]), but not always nearer than KFAC in the Frobenius norm.
# - **TEKFAC** is TKFAC's basis with the best eigenvalues, never farther than TKFAC. No theorem compares it with EKFAC.
# - **Cost.** Its estimate varies more from batch to batch than KFAC's. Partial traces may be averaged exactly;
#   divide by the trace afterwards.
#
# ## Exercises
#
# **Exercise 15.1.** Inputs and vectors are one-hot: each datum has $a_n = e_i$ and $g_n = e_o$. What is
# $F$, and what are KFAC and TKFAC?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $F$ is diagonal, and its entry $(o, i)$ is the number of data with that output and that input. All
# lengths are one, so weights do nothing: KFAC and TKFAC are equal, and their entries are the row sum
# times the column sum over $N$, what one would expect if output and input were independent. The
# relative entropy of [Theorem 15.2] is then $N$ times their mutual information.
#
# </details>
#
# **Exercise 15.2.** Show that KFAC and TKFAC are equal if all inputs have the same length and all
# $b_n = \sum_v \lVert g_{vn} \rVert^2$ are equal. Does it suffice that one of the two holds?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With $\lVert a_n \rVert^2 = \alpha$ and $b_n = \beta$, [(15.4)] is $\beta$ and $\alpha$ times KFAC's sums,
# and $\operatorname{tr} F = N \alpha \beta$, so [(15.3)] is KFAC. One does not suffice: with equal
# lengths of the inputs $B$ is KFAC's up to scale, but $A$ is weighted by $b_n$. So KFAC and TKFAC also differ in
# layers whose inputs are normalised.
#
# </details>
#
# **Exercise 15.3.** Which number $\mu$ makes $\mu$ times KFAC's product nearest to $F$ in relative entropy?
# Does it make KFAC as good as TKFAC?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# In [(15.7)], $X$ and $Y$ are fixed, and the best $\mu$ is $\operatorname{tr} F$: it gives KFAC the trace of $F$. The
# factors are still the unweighted ones, so the last two terms stay larger than TKFAC's.
#
# </details>
#
# **Exercise 15.4.** Write TKFAC for one position yourself: from `a` of shape $[N, d_\text{in}]$ and `g` of shape
# $[V, N, d_\text{out}]$ to the matrix $T$. Compare it with `tkfac(io).dense()`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def solution(a, g):
#     of_a, of_g = a.square().sum(1), g.square().sum((0, 2))
#     A, B = a.T @ (of_g[:, None] * a), torch.einsum("n,vno,vnp->op", of_a, g, g)
#     return torch.kron(B, A) / (of_a @ of_g)
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(a: Tensor, g: Tensor) -> Tensor:  # 15.4
    of_a, of_g = a.square().sum(1), g.square().sum((0, 2))
    A, B = a.T @ (of_g[:, None] * a), torch.einsum("n,vno,vnp->op", of_a, g, g)
    return torch.kron(B, A) / (of_a @ of_g)


io = random_io(7)
assert_exact(solution(io.a[:, 0], io.g[:, :, 0]), tkfac(io).dense())

counts = torch.tensor([[3, 1, 0], [0, 2, 4]])  # 15.1
o, i = counts.nonzero().repeat_interleave(counts[counts > 0], 0).T
io = LayerIO(torch.eye(3)[i][:, None], torch.eye(2)[o][None, :, None])
assert_exact(io.block(), counts.flatten().double().diag())
expected = torch.outer(counts.sum(1), counts.sum(0)) / counts.sum()
for M in (kfac(io), tkfac(io)):
    assert_exact(M.dense(), expected.to(M.dense()).flatten().diag())
table = counts / counts.sum()
information = torch.special.xlogy(table, table / torch.outer(table.sum(1), table.sum(0))).sum()
present = counts.flatten() > 0
F, M = counts.flatten()[present].double(), expected.flatten()[present].double()
entropy = (F * (F / M).log()).sum()  # the traces of F and M are equal
assert_exact(entropy, counts.sum() * information.double())

a, g = (
    torch.nn.functional.normalize(M, dim=-1)
    for M in (torch.randn(9, 1, 5), torch.randn(1, 9, 1, 3))
)
assert_exact(tkfac(LayerIO(a, g)).dense(), kfac(LayerIO(a, g)).dense())  # 15.2
io = LayerIO(a, torch.randn(9, 1, 1) * g)
assert relative_error(tkfac(io).dense(), kfac(io).dense()) > 0.05

io = random_io(30)  # 15.3
F, K = io.block(), kfac(io).dense()
right = K * F.trace() / K.trace()
for factor in (0.9, 1.1):
    assert relative_entropy(F, right) < relative_entropy(F, factor * right)
assert relative_entropy(F, tkfac(io).dense()) < relative_entropy(F, right)
assert abs(Dense(right).trace() - F.trace()) < 1e-10 * F.trace()
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Gao et al. (2021)](bibliography.md#tkfac) for TKFAC, its bound, and its use on several deep
# networks; [Gao et al. (2020)](bibliography.md#tekfac) for TEKFAC; [George et al. (2018)](bibliography.md#ekfac) for
# eigenvalues in a given basis. The next chapter continues with [(15.8)], which is half of one step of a
# method for the nearest Kronecker product.
