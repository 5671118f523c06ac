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
# # 16. KPSVD: the nearest Kronecker product
#
# **Part V: Better and faster.** Which Kronecker product is nearest to the exact block, and what does a
# second one buy?
#
# KFAC multiplies two averages, TKFAC two weighted averages. KPSVD multiplies the two matrices whose Kronecker product
# has the smallest distance to the exact block. A singular value decomposition finds them, and a second pair of
# matrices makes the distance smaller again: [Figure 16.1].

# %% tags=["hide-input"]
import textwrap
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch
from warnings import catch_warnings, simplefilter

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.estimators import MovingAverage
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.kpsvd import (
    Recompressed,
    _common_basis,
    _damped,
    deflation,
    ekpsvd,
    guarded,
    guarded_inverse,
    kfac_corrected,
    kpsvd,
    lanczos,
    nearest_product,
    nearest_sum,
)
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import conjugate_gradient, simultaneous_eigh, vec
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_sum import Congruence, ConjugateGradientInverse, KroneckerSum
from kfac_scratch.matrices.rearranged import Rearranged, lanczos_svd, power_svd
from kfac_scratch.show import code, matrices, style

set_up()  # seed 0, float64, the GPU where there is one


def random_io(N: int, S: int = 1, V: int = 2) -> LayerIO:
    """Inputs and vectors of a layer with 5 inputs and 3 outputs, made up."""
    return LayerIO(torch.randn(N, S, 5), torch.randn(V, N, S, 3))


# %% tags=["hide-input"] alt="Four 15 by 15 heat maps in one colour scale, each with nine tiles. In the exact block, the first tile on the diagonal is strong in its first two rows and columns, the other two tiles on the diagonal in their last three. KFAC repeats one mixed pattern in all tiles on the diagonal. The nearest product repeats the pattern of the last two tiles, weaker in the first. The nearest sum of two products looks like the exact block." caption="A layer on two kinds of data: the first kind uses output 1 and inputs 1 and 2, the second kind the other outputs and inputs. KFAC mixes the kinds, the nearest product describes mostly the second kind, and the nearest sum of two products has a term for each. The numbers are relative distances to the exact block."
own = torch.Generator(torch.get_default_device()).manual_seed(0)
first_kind = torch.arange(400)[:, None] < 200
strengths = [
    torch.where(first_kind, torch.tensor(one), torch.tensor(other))
    for one, other in (
        ([1.0, 1, 0.3, 0.3, 0.3], [0.3, 0.3, 1, 1, 1]),
        ([1.0, 0.3, 0.3], [0.3, 1, 1]),
    )
]
a, g = (torch.randn(*x.shape, generator=own) * x for x in strengths)
io = LayerIO(a[:, None], g[None, :, None])
F, picture, distances = io.block(), {"exact block": io.block()}, []
for name, method in (("KFAC", kfac), ("KPSVD", kpsvd), ("two products", deflation)):
    M = method(io).dense()
    distances.append(relative_error(M, F))
    picture[f"{name}: {distances[-1]:.2f}"] = M
assert distances[0] > distances[1] > 2 * distances[2]
matrices(picture, blocks=dict.fromkeys(picture, (5, 5)))

# %% [markdown]
# Let $R$ be the exact block $F$ with its entries moved such that Kronecker products become outer products. With its
# singular values $\sigma_1 \ge \sigma_2 \ge \dots$, and with matrices $B_k$ and $A_k$ of norm one in the place of its
# singular vectors,
#
# $$
# \begin{aligned}
# F &= \sum_k \sigma_k\, B_k \otimes A_k , \\
# \sum_{k \gt r} \sigma_k^2 &= \Bigl\lVert F - \sum_{k \le r} \sigma_k\, B_k \otimes A_k \Bigr\rVert^2 ,
# \end{aligned}
# $$
#
# and no other sum of $r$ products is nearer to $F$. KPSVD is the case $r = 1$.
#
# After this chapter you will be able to
#
# - find the nearest Kronecker product without forming the block, and prove that its factors are positive semi-definite;
# - order the errors of KFAC, TKFAC, KPSVD and sums of two products, and count what each of them costs;
# - invert a sum of two products, and repair a sum that is not positive definite;
# - say why a nearer matrix need not give a better step.
#
# ## A problem of rank one
#
# [Chapter 5](05_kfac.py) moved the entries of a matrix such that Kronecker products become outer
# products: $\mathcal{R}(M)$ has the entry $M_{(o,i),(p,j)}$ in row $(o,p)$ and column $(i,j)$, so that
# $\mathcal{R}(B \otimes A) = \operatorname{vec}(B) \operatorname{vec}(A)^\top$. Moving entries
# does not change the Frobenius norm. With $R = \mathcal{R}(F)$,
#
# $$
# \lVert F - B \otimes A \rVert = \lVert R - \operatorname{vec}(B) \operatorname{vec}(A)^\top \rVert ,
# \tag{16.1}
# $$
#
# and likewise for sums of products. So the nearest Kronecker product is the nearest matrix of rank one, in another
# arrangement. A singular value decomposition gives the nearest matrix of rank one: with the singular values
# $\sigma_1 \ge \sigma_2 \ge \dots$ of $R$ and its singular vectors $y_k$, $x_k$ it is $\sigma_1 y_1 x_1^\top$, and the
# squared error is $\sum_{k \ge 2} \sigma_k^2$. This is due to [Van Loan and Pitsianis (1993)](bibliography.md#kpsvd).
# The name KPSVD stands for Kronecker product singular value decomposition. With the block and $R$ written down:


# %%
def rearranged(M: Tensor, d_out: int, d_in: int) -> Tensor:
    M = M.reshape(d_out, d_in, d_out, d_in)  # o i p j
    return M.permute(0, 2, 1, 3).reshape(d_out * d_out, d_in * d_in)


io = random_io(9)
F = io.block()
R = rearranged(F, 3, 5)
U, sigma, Vh = torch.linalg.svd(R)
nearest = sigma[0] * torch.kron(U[:, 0].reshape(3, 3), Vh[0].reshape(5, 5))
assert_exact((F - nearest).square().sum(), F.square().sum() - sigma[0] ** 2)

# %% tags=["hide-input"] fold="Checked: the package's KPSVD is this matrix; measured: three errors"
assert_exact(kpsvd(io, tolerance=1e-12).dense(), nearest)
for name, M in (("KFAC", kfac(io)), ("TKFAC", tkfac(io)), ("KPSVD", kpsvd(io))):
    print(f"{name:5} error {relative_error(M.dense(), F):.4f}")

# %% [markdown]
# ## Products without the block
#
# For a layer with 1000 inputs and outputs, $R$ has $10^{12}$ entries. But products with $R$ and $R^\top$ suffice to
# find singular vectors, and they do not need $R$ itself. $F$ is a sum of
# $\operatorname{vec}(G) \operatorname{vec}(G)^\top$ over all gradients $G = G_{vn}$, with entries $G_{oi} G_{pj}$. In
# row $(o,p)$ and column $(i,j)$, that is the entry of $G \otimes G$:
#
# $$
# F = \sum_{v,n} \operatorname{vec}(G_{vn}) \operatorname{vec}(G_{vn})^\top
# \quad\Longrightarrow\quad
# R = \sum_{v,n} G_{vn} \otimes G_{vn} .
# \tag{16.2}
# $$
#
# The vec trick [(1.6)] gives the product of $G \otimes G$ with a vector:
#
# $$
# \begin{aligned}
# R \operatorname{vec}(X) &= \operatorname{vec} \Bigl( \sum_{v,n} G_{vn} X G_{vn}^\top \Bigr) , \\
# R^\top \operatorname{vec}(Y) &= \operatorname{vec} \Bigl( \sum_{v,n} G_{vn}^\top Y G_{vn} \Bigr) .
# \end{aligned}
# \tag{16.3}
# $$
#
# With $X = I$ and $Y = I$ these are the partial traces of [(15.2)]: TKFAC's factors are $R \operatorname{vec}(I)$
# and $R^\top \operatorname{vec}(I)$. With one position, $G = g a^\top$, and the products need no gradients either:
#
# $$
# \begin{aligned}
# \sum_{v,n} G_{vn} X G_{vn}^\top &= \sum_n (a_n^\top X a_n) \sum_v g_{vn} g_{vn}^\top , \\
# \sum_{v,n} G_{vn}^\top Y G_{vn} &= \sum_n \Bigl( \sum_v g_{vn}^\top Y g_{vn} \Bigr) a_n a_n^\top .
# \end{aligned}
# \tag{16.4}
# $$
#
# Each side gives every datum a number, and this number is the datum's weight in the sum over the other side. A product
# with $R$ and one with $R^\top$ cost together about twice as much as KFAC's factors. By hand, for any number of
# positions:


# %%
def to_outputs_by_hand(io: LayerIO, X: Tensor) -> Tensor:
    Y = torch.zeros(io.g.shape[-1], io.g.shape[-1])
    for v in range(io.g.shape[0]):
        for n in range(io.g.shape[1]):
            G = sum(torch.outer(g, a) for g, a in zip(io.g[v, n], io.a[n], strict=True))
            Y += G @ X @ G.T
    return Y


# %% tags=["hide-input"] fold="Checked: R is a sum of G ⊗ G, the products are right, and TKFAC is one of them"
X, Y = (M + M.T for M in (torch.randn(5, 5), torch.randn(3, 3)))
for S in (1, 4):
    io = random_io(7, S)
    G, R = io.gradients().flatten(0, 1), rearranged(io.block(), 3, 5)
    assert_exact(R, sum(torch.kron(M, M) for M in G))
    assert_exact((R @ X.flatten()).reshape(3, 3), to_outputs_by_hand(io, X))
    assert_exact(Rearranged(io).to_outputs(X), to_outputs_by_hand(io, X))
    assert_exact(Rearranged(io).to_inputs(Y).flatten(), R.T @ Y.flatten())
    assert_exact(Rearranged(io).to_inputs(torch.eye(3)), tkfac(io).A)

# %% [markdown]
# ### In the package
#
# A `Rearranged` holds a layer, and in `plus` further products $B \otimes A$, each of which costs one inner product.
# Sums of two products need them, see below.

# %% tags=["beside", "remove-input"]
code(Rearranged.to_outputs, Rearranged.to_inputs)

# %% [markdown]
# ## Power iteration
#
# Fix $A$. Which $B$ is best? The error [(16.1)] is a least-squares problem in every row of $R$, with
# the solution $\operatorname{vec}(B) = R \operatorname{vec}(A) / \lVert A \rVert^2$. Then fix $B$, solve
# for $A$, and repeat. Up to scale one such turn is $X \leftarrow R^\top Y$, $Y \leftarrow R X$: the **power
# iteration** for $R^\top R$. The error falls with every turn, and the part of the iterate in the directions of the
# other singular vectors shrinks by $(\sigma_2 / \sigma_1)^2$ or more.

# %% tags=["remove-input"]
code(power_svd)

# %% [markdown]
# The iteration needs a start. By [(16.3)], if $X$ is positive semi-definite, so is every $G X G^\top$. So products
# with $R$ and with $R^\top$ of such matrices are such matrices again, and so is the limit.
#
# <div class="admonition theorem" markdown="1" id="thm-16.1">
# <p class="admonition-title" markdown="1"><b>Theorem 16.1 (the factors are positive semi-definite)</b></p>
#
# Among all products of symmetric matrices, a product of two positive semi-definite matrices is nearest to $F$. The
# power iteration that starts at $Y = I$ converges to such a product, and all its iterates are such products. After
# the first turn the iterate is at least as near to $F$ as TKFAC.
#
# </div>
#
# **Proof.** Write $R^\top Y$ for the matrix of $R^\top \operatorname{vec}(Y)$. The best partner of a $Y$ of norm one
# leaves the squared error $\lVert F \rVert^2 - \lVert R^\top Y \rVert^2$. Let $\lvert Y \rvert$ have the eigenvectors
# of $Y$ and the absolute values of its eigenvalues, so that its norm is that of $Y$, and $\lvert Y \rvert \pm Y$ are
# positive semi-definite. Then so are $R^\top \lvert Y \rvert \pm R^\top Y$, and two such matrices have a non-negative
# inner product,
#
# $$
# \lVert R^\top \lvert Y \rvert \rVert^2 - \lVert R^\top Y \rVert^2
# = \bigl\langle R^\top \lvert Y \rvert - R^\top Y ,\; R^\top \lvert Y \rvert + R^\top Y \bigr\rangle \ge 0 .
# $$
#
# So $\lvert Y \rvert$ is at least as good. The inner product of a best semi-definite $Y$ with $I$ is its
# trace, which is positive. So $I$ is not orthogonal to all best matrices, and the iteration converges to one of
# them. The first turn sets $X = R^\top I$, TKFAC's $A$, and takes the best $B$ for it.
# $\blacksquare$
#
# From a start that is not semi-definite, both factors may come out negative. Their product is the same, and
# the package turns both signs.

# %% tags=["hide-input"] fold="Checked: three starts lead to one product, with semi-definite factors, and errors fall"
io = random_io(40)
F, R = io.block(), Rearranged(io)
for start in (torch.eye(3), -torch.eye(3), Y):
    K = power_svd(R, start, tolerance=1e-12)
    assert_exact(K.dense(), kpsvd(io, tolerance=1e-12).dense())
    for factor in (K.A, K.B):
        assert torch.linalg.eigvalsh(factor).min() > -1e-12
errors = [
    relative_error(power_svd(R, torch.eye(3), 0.0, turns).dense(), F) for turns in range(1, 6)
]
assert errors == sorted(errors, reverse=True)
assert errors[0] <= relative_error(tkfac(io).dense(), F)

# %% [markdown]
# ## The order of errors
#
# [Koroko et al. (2022)](bibliography.md#kpsvd-kfac) propose four methods. **KPSVD** is the nearest product.
# **Deflation** subtracts it from $F$ and adds the product nearest to the rest. **Lanczos** finds the same
# two terms at once. **KFAC-CORRECTED** adds to KFAC the product nearest to KFAC's error. Let
# $\kappa_1 \ge \kappa_2 \ge \dots$ be the singular values of $R$ minus KFAC's outer product, which by
# [Theorem 5.1] is $N$ times a covariance matrix.
#
# <div class="admonition theorem" markdown="1" id="thm-16.2">
# <p class="admonition-title" markdown="1"><b>Theorem 16.2 (errors)</b></p>
#
# The squared errors, in the Frobenius norm, are
#
# $$
# \begin{aligned}
# \text{KFAC} &: \lVert F - B \otimes A \rVert^2 , \\
# \text{KFAC-CORRECTED} &: \lVert F - B \otimes A \rVert^2 - \kappa_1^2 , \\
# \text{KPSVD} &: \lVert F \rVert^2 - \sigma_1^2 , \\
# \text{Deflation, Lanczos} &: \lVert F \rVert^2 - \sigma_1^2 - \sigma_2^2 .
# \end{aligned}
# \tag{16.5}
# $$
#
# Hence Deflation is never farther than KPSVD, which is never farther than KFAC or TKFAC; and Deflation is
# never farther than KFAC-CORRECTED, which is never farther than KFAC. With one position,
# $\sigma_k$ and $\kappa_k$ are all singular values, and KFAC's squared error is $\sum_k \kappa_k^2$. With more
# positions, they are the singular values that belong to symmetric matrices, and "nearest" means nearest among
# products of symmetric factors.
#
# </div>
#
# **Proof.** Each line is the error of a truncated singular value decomposition. KPSVD is the best among all
# products, Deflation the best among all sums of two, and both KFAC-CORRECTED and KPSVD (with a
# second term of zero) are among these. $\blacksquare$


# %% tags=["hide-input"] fold="Checked: the errors of all four methods, with one and with four positions"
def symmetric(d: int) -> Tensor:
    """An orthonormal basis of the symmetric matrices, in columns."""
    unit = torch.eye(d * d).reshape(d, d, d, d)
    both = unit + unit.mT
    return torch.stack([(M / M.norm()).flatten() for i in range(d) for M in both[i, i:]], dim=1)


def squared_error(M: Tensor, F: Tensor) -> Tensor:
    return (M - F).square().sum()


for S in (1, 4):
    io = random_io(20, S)
    F, K = io.block(), kfac(io).dense()
    sigma, kappa = (
        torch.linalg.svdvals(symmetric(3).T @ rearranged(M, 3, 5) @ symmetric(5))
        for M in (F, F - K)
    )
    total = F.square().sum()
    assert_exact(squared_error(kpsvd(io).dense(), F), total - sigma[0] ** 2)
    for method in (deflation, lanczos):
        assert_exact(squared_error(method(io).dense(), F), total - sigma[:2].square().sum())
    corrected = squared_error(kfac_corrected(io).dense(), F)
    assert_exact(corrected, squared_error(K, F) - kappa[0] ** 2)

# %% [markdown]
# The theorem does *not* order KFAC-CORRECTED and KPSVD, although the first has two terms and the second one. If KFAC is
# far off, a single correction may not suffice. Two layers with one-hot data are examples: in one of them KFAC-CORRECTED
# is the nearer one, in the other KPSVD. Nor does it order EKFAC and KPSVD. With one-hot data $F$ is diagonal, so that
# EKFAC is exact. On the two data of [Figure 15.1], of which one has no gradient, KPSVD is exact.


# %% tags=["hide-input"] fold="Measured: three layers, and the errors of four methods"
def counted(counts: list[list[int]], outputs: list[float], inputs: list[float]) -> LayerIO:
    """Data with `a = inputs[j] e_j` and `g = outputs[i] e_i`, `counts[i][j]` times each."""
    table = torch.tensor(counts)
    i, j = table.nonzero().repeat_interleave(table[table > 0], dim=0).T
    return LayerIO(
        torch.tensor(inputs).diag()[j][:, None], torch.tensor(outputs).diag()[i][None, :, None]
    )


near = counted([[3, 0, 0], [0, 2, 0], [0, 0, 1]], [1.0, 1, 1], [1.0, 1, 1])
far = counted([[1, 2, 3], [0, 1, 2], [0, 2, 1]], [3.0, 1, 1], [1.0, 1, 3])
forgotten = random_io(2, V=1)
forgotten = LayerIO(forgotten.a, torch.stack([forgotten.g[:, 0], 0 * forgotten.g[:, 1]], dim=1))
table = {}
for name, layer in (("one-hot", near), ("long", far), ("two data", forgotten)):
    F = layer.block()
    table[name] = [
        relative_error(f(layer).dense(), F) for f in (kfac, ekfac, kpsvd, kfac_corrected)
    ]
    print(f"{name:9} KFAC {table[name][0]:.3f}, EKFAC {table[name][1]:.3f},", end=" ")
    print(f"KPSVD {table[name][2]:.3f}, KFAC-CORRECTED {table[name][3]:.3f}")
assert table["one-hot"][3] < 0.9 * table["one-hot"][2]
assert table["long"][3] > 3 * table["long"][2]
assert table["one-hot"][1] < 1e-10 < table["one-hot"][2]
assert table["two data"][2] < 1e-10 < table["two data"][1]

# %% [markdown]
# In the first layer all data have length one. In the second, "long", some inputs and vectors are three times as long.
# KPSVD is exact wherever a Kronecker product can be exact, as TKFAC is. But KPSVD does not keep the trace:

# %% tags=["hide-input"] fold="Measured: the trace of KPSVD"
io = random_io(20)
print(f"trace of KPSVD over that of F: {(kpsvd(io).trace() / io.block().trace()).item():.3f}")
assert abs(kpsvd(io).trace() / io.block().trace() - 1) > 0.01

# %% [markdown]
# ## Two products
#
# Deflation finds its second term by the power iteration for $R - \sigma_1 y_1 x_1^\top$, and
# `plus` takes the first term with a minus sign. But products with this difference need not keep matrices positive
# semi-definite, and the start $I$ may be orthogonal to the second pair. The cell has an example. Its layer stays the
# same if inputs 1 and 2 and outputs 1 and 2 are exchanged, and the second pair changes its
# sign under that exchange, as $\operatorname{diag}(1, -1, 0)$ does. From the identity the iteration finds the third
# singular value. So the package starts the second search at the identity plus a fixed random matrix.

# %% tags=["beside", "remove-input"]
code(nearest_sum, Rearranged.generic)

# %% tags=["hide-input"] fold="Checked: the identity misses the second pair, the package's start finds it"
io = counted([[4, 1, 1], [1, 4, 1], [1, 1, 3]], [1.0, 1, 1], [1.0, 1, 1])
R = Rearranged(io)
sigma = torch.linalg.svdvals(symmetric(3).T @ rearranged(io.block(), 3, 3) @ symmetric(3))
rest = R.minus(power_svd(R, torch.eye(3), tolerance=1e-13))
print("singular values:", " ".join(f"{s:.4f}" for s in sigma[:3].tolist()))
for name, start in (("identity", torch.eye(3)), ("generic", R.generic())):
    found = power_svd(rest, start).A.norm() ** 2
    print(f"second from the {name} start: {found.item():.4f}")
    assert abs(found - sigma[2 if name == "identity" else 1]) < 1e-6

# %% [markdown]
# The convergence to a second pair is slower, since $\sigma_3 / \sigma_2$ is usually nearer to one
# than $\sigma_2 / \sigma_1$. The **Golub-Kahan-Lanczos** method finds both pairs from the same products. It keeps
# orthonormal $X_1, X_2, \dots$ and $Y_1, Y_2, \dots$, where each new matrix is the part of $R^\top Y_k$ or
# $R X_k$ that is orthogonal to the earlier ones. In these bases $R$ is lower bidiagonal. The singular vectors of this
# small matrix are the coefficients of approximate singular vectors of $R$, for all pairs at once. Round-off destroys
# the orthogonality, so each new matrix is made orthogonal to all earlier ones twice.

# %% tags=["remove-input"]
code(lanczos_svd)

# %% [markdown]
# We compare both on a network that was trained on handwritten digits, as in the last two chapters.

# %% tags=["hide-input"] fold="Measured: a trained network, and both methods on its middle layer"
torch.manual_seed(0)
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
loss = CrossEntropyLoss()
model = Sequential(Linear(64, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
for _ in range(100):
    batch = torch.randint(1000, (100,))
    optimizer.zero_grad()
    loss(model(images[batch]), labels[batch]).backward()
    optimizer.step()

X, y = images[1000:1200], labels[1000:1200]
ios = layer_ios(model, loss, X, y)
R = Rearranged(ios["2"])
start = R.generic()
first, second = lanczos_svd(R, start, steps=60)[:2]
sigma = [(K.A.norm() ** 2).item() for K in (first, second)]
steps = range(2, 17)
missing = {"power": ([], []), "Lanczos": ([], [])}
for k in steps:
    power = power_svd(R, R.identity(), 0.0, k), power_svd(R.minus(first), start, 0.0, k)
    both = lanczos_svd(R, start, steps=k)[:2]
    for name, pairs in (("power", power), ("Lanczos", both)):
        for curve, K, s in zip(missing[name], pairs, sigma, strict=True):
            curve.append(max(1 - (K.A.norm() ** 2).item() / s, 1e-16))

# %% tags=["hide-input"] alt="Logarithmic plot of what is missing of the first and second singular value against the number of steps, for power iteration and for Lanczos. All fall until round-off. Power iteration needs about fifteen steps for the first and more than sixteen for the second value; Lanczos needs seven for the first and nine for the second." caption="The middle layer of a trained network: what is missing of the first two singular values. A step is one product with $R$ and one with its transpose. Power iteration needs the steps for its second value in addition to those for the first; Lanczos has both at once."
fig, ax = plt.subplots(figsize=(6.4, 3.7), layout="constrained")
label_at = {  # number of the point, offset of the label, side that it begins at
    "power, first": (14, (6, 2), "left"),
    "power, second": (14, (6, 2), "left"),
    "Lanczos, first": (2, (-6, -6), "right"),
    "Lanczos, second": (1, (6, 4), "left"),
}
for (name, curves), dashes in zip(missing.items(), ("o--", "s-"), strict=True):
    for curve, which, color in zip(curves, ("first", "second"), ("C0", "C1"), strict=True):
        k, offset, side = label_at[f"{name}, {which}"]
        ax.semilogy(steps, curve, dashes, color=color, markersize=3)
        ax.annotate(
            *(f"{name}, {which}", (steps[k], curve[k]), offset),
            textcoords="offset points",
            ha=side,
            color=color,
        )
ax.set(xlabel="steps", ylabel=r"relative error of $\sigma$", ylim=(1e-16, 2), xlim=(0.2, 16.5))
plt.show()

at = {k: (missing["power"][1][k - 2], missing["Lanczos"][1][k - 2]) for k in (2, 10)}
print(f"second value after 10 steps: power {at[10][0]:.0e}, Lanczos {at[10][1]:.0e}")
assert at[10][1] < 1e-4 * at[10][0]
assert at[2][1] > 0.01

# %% [markdown]
# ### What it costs
#
# With one position, a product with $R$ costs as much as KFAC's factors, and so does a product with $R^\top$. So
# the number of products is the cost in units of KFAC's factors, before any inversion. We count them in the three
# layers, with the default tolerance of $10^{-6}$, for each method as it is called in training:


# %% tags=["hide-input"] fold="Counted: products with the rearranged block"
def products(method, io: LayerIO) -> int:
    """How many products with the rearranged block a method makes."""
    with ExitStack() as stack:
        spies = [
            stack.enter_context(patch.object(Rearranged, name, autospec=True, side_effect=product))
            for name, product in (
                ("to_outputs", Rearranged.to_outputs),
                ("to_inputs", Rearranged.to_inputs),
            )
        ]
        with catch_warnings():
            simplefilter("ignore")  # that 1000 iterations were not enough
            method(io)
    return sum(spy.call_count for spy in spies)


prices = {
    name: [products(method, io) for io in ios.values()]
    for name, method in (
        ("KPSVD", kpsvd),
        ("Deflation", deflation),
        ("KFAC-CORRECTED", kfac_corrected),
        ("Lanczos, 12 steps", lanczos),
        ("KPSVD to 1e-2", partial(kpsvd, tolerance=1e-2)),
    )
}
print("products with R in layers 0, 2, 4")
for name, row in prices.items():
    print(f"{name:18}", " ".join(f"{count:5}" for count in row))
assert 10 <= min(prices["KPSVD"]) <= max(prices["KPSVD"]) <= 30
assert max(prices["Deflation"]) > 3 * max(prices["KPSVD"])
assert set(prices["Lanczos, 12 steps"]) == {24}
assert max(prices["KPSVD to 1e-2"]) < min(prices["KPSVD"])

# %% [markdown]
# So KPSVD costs ten to thirty times as much as KFAC's factors here, and two terms cost several times more, because the
# second pair converges more slowly. On other layers the cost may be higher: only the limit of 1000 iterations, at
# which `power_svd` stops and warns, bounds the number. The cost of Lanczos is known in advance, but no test tells
# whether its steps were enough.
#
# These are costs of *one* update. The paper's abstract speaks of "only a slight additional cost", which is no
# contradiction: its authors' code plans an update every 100 steps, from a quarter of the batch ([`train_mlp.py`, lines
# 30 and
# 100](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/apps/mlp_cnn/train_mlp.py#L100)).
# In the results that are stored there, 200 epochs with KPSVD take .99 to 1.08 times the seconds of KFAC, with
# KFAC-CORRECTED 1.07 to 1.31, with Deflation 1.09 to 1.41, and with Lanczos 1.14 to 1.87
# ([folder](https://github.com/Abdoulaye-Koroko/natural-gradients/tree/97105b613b54915b83c627e8aa5ca6e45edc2c2d/apps/mlp_cnn/results_ref/kpsvd_approx)).
#
# ### Antisymmetric pairs
#
# With more than one position, $R$ may have singular pairs of *antisymmetric* matrices. The Kronecker product of two
# antisymmetric matrices is symmetric and may be a part of $F$, but the inverses of this chapter need symmetric factors.
# Products with $R$ map symmetric matrices to symmetric ones and antisymmetric matrices to antisymmetric ones. So an
# iteration that starts at a symmetric matrix stays symmetric, if round-off is removed as in the listing above. In the
# cell, half of the block consists of such a pair: all gradients are the identity or a rotation $J$ by a right angle.

# %% tags=["hide-input"] fold="Checked: symmetric factors leave half of this block aside"
J = torch.tensor([[0.0, 1], [-1, 0]])
io = LayerIO(torch.eye(2).expand(2, 2, 2), torch.stack([torch.eye(2), J])[None])
assert_exact(io.gradients()[0, 1], J.T)
F = io.block()
print("all singular values:", torch.linalg.svdvals(rearranged(F, 2, 2)).round(decimals=3).tolist())
assert_exact(F, torch.kron(torch.eye(2), torch.eye(2)) + torch.kron(J, J))  # a sum of two products
assert_exact(deflation(io).dense(), torch.eye(4))  # of which one is left aside
assert relative_error(deflation(io).dense(), F) > 0.5

C, basis = rearranged(F - kfac(io).dense(), 2, 2), symmetric(2)  # KFAC's error
kappa = torch.linalg.svdvals(basis.T @ C @ basis)  # of symmetric matrices alone
print(
    f"squared error of KFAC {C.square().sum():.2f}, from symmetric pairs {kappa.square().sum():.2f}"
)
assert kappa.square().sum() < C.square().sum() - 0.1

# %% [markdown]
# ## A sum of two products, and its inverse
#
# A step needs the inverse of $B_1 \otimes A_1 + B_2 \otimes A_2$. In general the two products have different
# eigenvectors, so that no orthogonal basis makes both diagonal. If the first product is positive definite, another
# basis, which is not orthogonal, makes both diagonal. (Such sums also occur when two losses act on one layer.)
#
# Take two symmetric matrices $P$ and $M$ with $P$ positive definite. Let $P = L L^\top$ be the Cholesky decomposition
# of the first, and $L^{-1} M L^{-\top} = E \operatorname{diag}(p) E^\top$ the eigendecomposition of the second as seen
# in the coordinates of the first. Set $K = L^{-\top} E$. Then
#
# $$
# \begin{aligned}
# K^\top P K &= E^\top L^{-1} (L L^\top) L^{-\top} E = E^\top E = I, \\
# K^\top M K &= E^\top (L^{-1} M L^{-\top}) E = \operatorname{diag}(p) .
# \end{aligned}
# \tag{16.6}
# $$
#
# Do this for the pair $A_1, A_2$, which gives $K_A$ and $p$, and for the pair $B_1, B_2$, which
# gives $K_B$ and $q$. By the mixed product, with $K = K_B \otimes K_A$,
#
# $$
# K^\top (B_1 \otimes A_1 + B_2 \otimes A_2) K
# = I \otimes I + \operatorname{diag}(q) \otimes \operatorname{diag}(p)
# = \operatorname{diag}(1 + q_o p_i) .
# \tag{16.7}
# $$
#
# Invert both sides, $K^{-1} (\cdots)^{-1} K^{-\top} = \operatorname{diag}(1 / (1 + q_o p_i))$,
# and solve:
#
# $$
# (B_1 \otimes A_1 + B_2 \otimes A_2)^{-1}
# = (K_B \otimes K_A) \operatorname{diag}\Bigl(\frac{1}{1 + q_o p_i}\Bigr) (K_B \otimes K_A)^\top .
# \tag{16.8}
# $$
#
# This is the form of [(8.5)], with matrices at both ends that are not orthogonal.
#
# ### In the package
#
# `simultaneous_eigh` is [(16.6)], line by line: two triangular solves for $L^{-1} M L^{-\top}$, an
# eigendecomposition, and one more solve for $K$. `KroneckerSum` calls this function twice and returns a
# `Congruence`, which is the right-hand side of [(16.8)].

# %% tags=["beside", "remove-input"]
code(simultaneous_eigh)


# %%
def spd(size: int) -> Tensor:
    """A symmetric positive definite matrix."""
    M = torch.randn(size, size)
    return M @ M.T / size + 0.1 * torch.eye(size)


M, second = Kronecker(spd(5), spd(3)), Kronecker(spd(5), spd(3))
p, KA = simultaneous_eigh(M.A, second.A)
q, KB = simultaneous_eigh(M.B, second.B)
assert_exact(KA.T @ M.A @ KA, torch.eye(5))
assert_exact(KA.T @ second.A @ KA, p.diag())

total = KroneckerSum(M, second)
by_hand = torch.kron(KB, KA) @ (1 / (1 + torch.outer(q, p))).flatten().diag() @ torch.kron(KB, KA).T
assert_exact(by_hand, torch.linalg.inv(total.dense()))

direct = total.inverse(0.0)
assert isinstance(direct, Congruence)
V = torch.randn(3, 5)
assert_exact(direct @ (total @ V), V)

# %% [markdown]
# ### With damping
#
# With damping there is a third term, $\delta I$. In the common basis it becomes $\delta K^\top K =
# \delta\, (K_B^\top K_B) \otimes (K_A^\top K_A)$. For an orthogonal basis this would be $\delta I$. The common
# basis is not orthogonal, and the third term is not diagonal in it:

# %% tags=["hide-input"] alt="Two 15 by 15 heat maps. The sum of two Kronecker products is diagonal in the common basis; the identity has entries of both signs everywhere." caption="In the common basis of two products the sum is diagonal, but the identity no longer is."
K = torch.kron(KB, KA)
in_basis = {"the sum": K.T @ total.dense() @ K, "the identity": K.T @ K}
off_diagonal = [(C - C.diagonal().diag()).abs().max() for C in in_basis.values()]
assert off_diagonal[0] <= 1e-10
assert off_diagonal[1] > 0.1
matrices(in_basis, scale=float(in_basis["the identity"].abs().max()) / 4)

# %% [markdown]
# In general no basis makes three matrices diagonal. `inverse` with a positive damping
# therefore returns a `ConjugateGradientInverse`: each product with it solves a system by *conjugate
# gradients*, which need only products with $M + \delta I$, and these are cheap. The number of
# iterations depends on how far the eigenvalues are spread. A preconditioner narrows the spread:
# here the inverse of the damped first term, $(B_1 \otimes A_1 + \delta I)^{-1}$, which [(8.5)] gives
# exactly. If the first term is much larger than the second, few iterations suffice.

# %% tags=["beside", "remove-input"]
code(KroneckerSum.inverse, ConjugateGradientInverse.__matmul__)

# %% tags=["hide-input"] fold="Counted: iterations, with and without the first term; checked: the solution"
steep = Kronecker(torch.logspace(0, -3, 12).diag(), torch.logspace(0, -2, 10).diag())
small = Kronecker(0.1 * spd(12), 0.01 * spd(10))
both, delta = KroneckerSum(steep, small), 1e-3
b = torch.randn(10, 12)


def iterations(precondition) -> int:
    count = 0

    def matvec(X: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return both @ X + delta * X

    conjugate_gradient(matvec, b, precondition)
    return count


first = steep.inverse(delta)
plain, with_first = iterations(lambda X: X), iterations(lambda X: first @ X)
print(f"iterations: {plain} without, {with_first} with the first term as preconditioner")
assert with_first < plain

iterative = both.inverse(delta)
assert isinstance(iterative, ConjugateGradientInverse)
undamped_twin = both.dense() + delta * torch.eye(120)
assert_exact(vec(iterative @ b), torch.linalg.solve(undamped_twin, vec(b)))

# %% [markdown]
# ## A sum that is not positive definite
#
# $F$ is positive semi-definite, and so is the nearest product. The nearest sum of two products may be indefinite. Its
# second pair is orthogonal to the first, $\langle A_1, A_2 \rangle = \operatorname{tr}(A_1 A_2) = 0$. Let $A_1$ and
# $B_1$ be positive definite, and $A_2$ and $B_2$ not zero.
#
# - If $A_2$ is symmetric, then $A_1^{1/2} A_2 A_1^{1/2}$ is symmetric with trace zero. So it has eigenvalues of both
#   signs, and by Sylvester's law of inertia so has $A_2$. The same holds for $B_2$.
# - With several positions the best second pair may be antisymmetric, as above. Then the factors have no real
#   eigenvalues but zero, and the trace of $B_2 \otimes A_2$ is zero.
#
# In both cases $B_2 \otimes A_2$ is indefinite, and the sum need not be positive. One-hot data suffice for an
# example. Their block is diagonal and its entries form a table, and the best approximation of rank two of a table with
# non-negative entries may have negative entries:

# %% tags=["hide-input"] fold="Measured: negative entries, and eigenvalues of both signs"
io = counted([[2, 1, 0], [1, 2, 1], [0, 1, 2]], [1.0, 1, 1], [1.0, 1, 1])
M = deflation(io)
print("diagonal of F:  ", io.block().diagonal().round(decimals=2).tolist())
print("of two products:", M.diagonal().round(decimals=2).tolist())
assert M.diagonal().min() < -0.1 < 0 <= io.block().diagonal().min()

some = deflation(random_io(40))  # symmetric factors
for factor in (some.second.A, some.second.B):
    values = torch.linalg.eigvalsh(factor)
    print("eigenvalues of a factor of a second term:", values.round(decimals=2).tolist())
    assert values.min() < 0 < values.max()
assert torch.equal(J, -J.T)  # the other kind: J ⊗ J is the second term of the last section
assert (
    torch.linalg.eigvalsh(torch.kron(J, J)).min()
    < 0
    < torch.linalg.eigvalsh(torch.kron(J, J)).max()
)

# %% [markdown]
# The damped inverse of an eigenvalue $-\lambda$ is $1 / (\delta - \lambda)$. It makes a step of any
# length, and a step uphill if $\delta \lt \lambda$. By [(16.7)] the sum is positive definite if and only
# if $q_o p_i \gt -1$ for all pairs. If it is not, `KroneckerSum.inverse` raises an error. The cell scales a second term
# to both sides of this limit, and prints the errors:

# %% tags=["hide-input"] fold="Checked: the limit, and what the package refuses"
nearest, correction = some.first, some.second
p = simultaneous_eigh(nearest.A, correction.A)[0]
q = simultaneous_eigh(nearest.B, correction.B)[0]
critical = -1 / torch.outer(q, p).min().item()  # 1 + c q p = 0


def scaled(c: float) -> KroneckerSum:
    return KroneckerSum(nearest, Kronecker(c * correction.A, correction.B))


def refused(function) -> None:
    """Run what has to fail, and print why it does."""
    try:
        function()
    except ValueError as reason:
        print(textwrap.fill(f"ValueError: {reason}", width=90))
    else:
        raise AssertionError("this should have been refused")


V, mild, wild = torch.randn(3, 5), scaled(0.9 * critical), scaled(1.1 * critical)
assert torch.linalg.eigvalsh(mild.dense()).min() > 0 > torch.linalg.eigvalsh(wild.dense()).min()
assert_exact(mild.inverse(0.0) @ (mild @ V), V)
refused(lambda: wild.inverse(0.0))
refused(lambda: scaled(10 * critical).inverse(0.01) @ V)  # found while iterating
refused(lambda: correction.inverse(0.1))  # not a curvature by itself
refused(lambda: KroneckerSum(correction, nearest).inverse(0.0))  # the order matters

# %% [markdown]
# Training cannot stop at an error. So the package multiplies the second term by the largest
# $\theta \le 1$ for which $1 + \theta q_o p_i$ is at least a margin, a tenth by default. This needs no further
# decomposition, and it shrinks only the correction, only as far as needed. Before that, the
# first term's factors are damped as in [Chapter 9](09_damping.py), because $\delta I$ as a third term is not diagonal
# in the common basis.

# %% tags=["remove-input"]
code(guarded, guarded_inverse, _common_basis)

# %% tags=["hide-input"] fold="Checked: the guarded sum is positive definite, and its inverse is exact"
delta = 0.01
safe = guarded(M, delta)
lowest = torch.linalg.eigvalsh(safe.dense()).min().item()
print(
    f"lowest eigenvalue: {torch.linalg.eigvalsh(M.dense()).min().item():.3f}, guarded {lowest:.3f}"
)
assert lowest > 0
V = torch.randn(3, 3)
assert_exact(guarded_inverse(M, delta) @ (safe @ V), V)
assert_exact(
    (guarded_inverse(M, delta) @ V).flatten(), torch.linalg.solve(safe.dense(), V.flatten())
)

# %% [markdown]
# How often is the guard needed? We draw layers with data of very different sizes, and take four dampings, in units
# of the mean eigenvalue.

# %% tags=["hide-input"] fold="Counted: indefinite sums, and shrunk second terms"
trials, indefinite, shrunk = 200, 0, dict.fromkeys((1e-6, 1e-4, 1e-2, 1e-1), 0)
for seed in range(trials):
    torch.manual_seed(seed)
    size = torch.randn(40, 1, 1).exp()
    io = LayerIO(size * torch.randn(40, 1, 4), size * torch.randn(1, 40, 1, 3))
    M, mean = deflation(io), (io.block().trace() / 12).item()
    indefinite += int(torch.linalg.eigvalsh(M.dense()).min() < -1e-9)
    for fraction in shrunk:
        shrunk[fraction] += int(not torch.equal(guarded(M, fraction * mean).second.A, M.second.A))
print(f"of {trials} layers, the nearest sum of two products is indefinite in {indefinite}")
print("second term shrunk, by damping:", shrunk)
assert indefinite > trials / 4
assert shrunk[1e-6] > shrunk[1e-2] > shrunk[1e-1]

# %% [markdown]
# ## Nearer matrices, better steps?
#
# The paper reports that all four methods are nearer to the Fisher than KFAC, and faster than KFAC on
# three autoencoders. [Theorem 16.2] proves the first part. On the classifier from above we measure the error of the
# matrix and the value of its step. The step is $p = -M_\delta^{-1} h$ for the gradient $h$ of the layer, with the best
# learning rate, and its value is the share of the damped parabola's largest possible decrease that it reaches.
#
# No form of damping applies to all methods. Sums of two products are damped by factors: with exact damping,
# $M + \delta I$, they are far from positive definite here, as the last lines print. Matrices in an eigenbasis have the
# exact damping only. Single products have both. So there are two columns, and only numbers of one column can be
# compared. Sums occur twice: guarded as above, and with the absolute values $1 + \lvert q_o \rvert \lvert p_i \rvert$
# of the authors' code ([`deflation.py`, lines 316 to
# 322](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/deflation.py#L316-L322)).
# "KPSVD + diagonal" is not in the paper: the eigenvectors of KPSVD with the eigenvalues of [Theorem 14.1].

# %% tags=["hide-input"] fold="Measured: errors and shares of eight methods on three layers"
methods = {
    "KFAC": kfac,
    "TKFAC": tkfac,
    "EKFAC": ekfac,
    "TEKFAC": tekfac,
    "KPSVD": kpsvd,
    "KPSVD + diagonal": ekpsvd,
    "KFAC-CORRECTED": kfac_corrected,
    "Deflation": deflation,
}
BY_FACTORS = ("KFAC", "TKFAC", "KPSVD", "KFAC-CORRECTED", "Deflation")
gradients = torch.autograd.grad(loss(model(X), y), list(model.parameters()))
errors, by_factors, exactly = ({name: [] for name in methods} for _ in range(3))
absolute, lowest = {"KFAC-CORRECTED": [], "Deflation": []}, {"KFAC-CORRECTED": [], "Deflation": []}


def absolute_inverse(M: KroneckerSum, delta: float) -> Congruence:
    first = _damped(M.first, delta)
    p, KA = simultaneous_eigh(first.A, M.second.A)
    q, KB = simultaneous_eigh(first.B, M.second.B)
    return Congruence(KA, KB, 1 / (1 + torch.outer(q, p).abs()))


for layer, io in ios.items():
    h = torch.cat([gradients[int(layer)], gradients[int(layer) + 1][:, None]], dim=1)
    F = io.block()
    delta = 0.01 * F.diagonal().mean().item()
    damped = F + delta * torch.eye(len(F))
    best = h.flatten() @ torch.linalg.solve(damped, h.flatten())

    def share(inverse, h=h, damped=damped, best=best) -> float:
        p = (inverse @ h).flatten()
        return ((h.flatten() @ p) ** 2 / (p @ damped @ p) / best).item()

    for name, method in methods.items():
        M = method(io)
        errors[name].append(relative_error(M.dense(), F))
        if isinstance(M, KroneckerSum):
            by_factors[name].append(share(guarded_inverse(M, delta)))
            absolute[name].append(share(absolute_inverse(M, delta)))
            lowest[name].append(torch.linalg.eigvalsh(M.dense()).min().item() / delta + 1)
        else:
            exactly[name].append(share(M.inverse(delta)))
            if name in BY_FACTORS:
                by_factors[name].append(share(factored_inverse(M, delta)))


# %% [markdown]
# Every column has three numbers, for the layers 0, 2 and 4. "Absolute" is the inverse of the authors' code.


# %% tags=["hide-input"] fold="Printed: errors and shares"
def numbers(row: list[float], digits: int = 3) -> str:
    return " ".join(f"{x:6.{digits}f}" for x in row) if row else "     –      –      –"


print(f"{'':21}{'error':20}   {'share, by factors':20}   share, exactly")
for name in methods:
    print(f"{name:18}", "   ".join(numbers(row[name]) for row in (errors, by_factors, exactly)))
for name in absolute:
    print(f"{name + ', absolute':41} {numbers(absolute[name])}")
print("\nlowest eigenvalue of M + δI, divided by δ")
for name, row in lowest.items():
    print(f"{name:18}", numbers(row, 0))

# %% tags=["hide-input"] alt="Scatter plots for three layers, the relative error against the share of the best decrease, one row for damping by factors and one for exact damping. In the upper row Deflation and KFAC-CORRECTED have the smallest errors; TKFAC has the largest or nearly the largest decrease in each layer, with a larger error. In the lower row TKFAC and TEKFAC lead." caption="Every method on every layer, above damped by factors, below exactly. If nearer meant better, points of one panel would lie on a line falling to the right."
marks = {
    "TKFAC": ("C1", "s"),
    "TEKFAC": ("C3", "v"),
    "KPSVD": ("C4", "P"),
    "KPSVD + diagonal": ("C5", "X"),
    "KFAC-CORRECTED": ("C6", "^"),
    "Deflation": ("C8", "*"),
}
looks = {name: {"color": color, "marker": marker} for name, (color, marker) in marks.items()}
looks |= {name: style(name) for name in ("KFAC", "EKFAC")}
fig, axes = plt.subplots(2, 3, figsize=(9.4, 6.0), layout="constrained", sharex="col")
handles = {}
for row, shares in zip(axes, (by_factors, exactly), strict=True):
    for layer, ax in enumerate(row):
        for name in filter(shares.get, methods):
            point = errors[name][layer], shares[name][layer]
            (handles[name],) = ax.plot(*point, **looks[name], markersize=7, linestyle="")
for layer, ax in enumerate(axes[0]):
    ax.set(title=f"layer {2 * layer}")
    axes[1, layer].set(xlabel="relative error")
axes[0, 0].set_ylabel("share, by factors")
axes[1, 0].set_ylabel("share, exactly")
fig.legend(
    *([handles[name] for name in methods], list(methods)),
    loc="outside lower center",
    ncols=4,
    fontsize="small",
)
plt.show()

# %% tags=["hide-input"] fold="Checked: errors are ordered, shares are ordered otherwise"
for layer in range(3):
    E = {name: errors[name][layer] for name in methods}
    assert E["Deflation"] < E["KPSVD"] < min(E["KFAC"], E["TKFAC"])
    assert E["Deflation"] < E["KFAC-CORRECTED"] < min(E["KFAC"], E["TKFAC"])
    assert E["KPSVD + diagonal"] <= E["KPSVD"]
    assert E["TEKFAC"] < E["TKFAC"]
    assert by_factors["KFAC-CORRECTED"][layer] > by_factors["KFAC"][layer]
    assert max(row[layer] for row in lowest.values()) < 0
of_factors = {name: sum(by_factors[name]) for name in BY_FACTORS}
of_exact = {name: sum(row) for name, row in exactly.items() if row}
assert of_factors["Deflation"] > of_factors["KPSVD"]
for name in ("KPSVD", "Deflation", "KFAC-CORRECTED"):
    assert of_factors[name] < 0.95 * of_factors["TKFAC"]
assert of_exact["KPSVD"] < 0.97 * of_exact["TKFAC"]
by_damping = min(of_exact[name] - of_factors[name] for name in ("TKFAC", "KPSVD"))
for two, one in (("KFAC-CORRECTED", "KFAC"), ("Deflation", "KPSVD")):
    assert by_damping > of_factors[two] - of_factors[one] > 0
for name, row in absolute.items():
    assert abs(sum(row) - of_factors[name]) < 0.1 * of_factors[name]

# %% [markdown]
# The errors are ordered as the theorems say. The second term also improves the step, if both are damped
# in the same way: KFAC-CORRECTED reaches more than KFAC in all three layers, and Deflation more than KPSVD in the sum
# over layers. This agrees with the paper. But the order of the errors is not the order of the shares. TKFAC is farther
# from the block than KPSVD, and in the sum over layers its step is better than those of KPSVD, Deflation and
# KFAC-CORRECTED. The Frobenius norm weighs the large eigenvalues most, and a damped inverse the small ones.
# (The relative entropy, in which TKFAC is nearest by [Theorem 15.2], compares eigenvalues by their ratio.)
# The form of the damping changes the shares of TKFAC and KPSVD more than a second term changes those of KFAC or KPSVD.
# Three layers of one classifier are no rule, and other networks may give other orders. But they are a counterexample
# to "nearer, hence better". The paper's abstract does not say "hence": it reports two measurements, both on
# autoencoders.
#
# ## Over batches
#
# The factors of a single product may be averaged, as KFAC's are: both factors have the same norm, and both are positive
# semi-definite, so that no sign is arbitrary. (Still, averages of factors are not factors of the average.) Factors of
# sums must not be averaged. The signs of a second pair are arbitrary, and when $\sigma_1$ and $\sigma_2$, or
# $\sigma_2$ and $\sigma_3$, change places from one batch to the next, so do the terms. `MovingAverage` refuses a
# `KroneckerSum` for that reason.
#
# Averages of blocks have neither problem. The average of the old matrix and the new block, $(1 - w) M + w F$, consists
# of a batch and two further products, so that products with its rearrangement are available. The estimator
# `Recompressed` takes the nearest sum to this average.

# %% tags=["beside", "remove-input"]
code(Recompressed.update)

# %% tags=["hide-input"] fold="Measured: averages of factors, and of blocks"
two = [random_io(1, V=1) for _ in range(2)]  # two data: the average is a sum of two products
average = 0.5 * two[0].block() + 0.5 * two[1].block()
old, now = (deflation(io) for io in two)
by_factors = KroneckerSum(old.first.mixed(now.first, 0.5), old.second.mixed(now.second, 0.5))
by_blocks = Recompressed(nearest_sum).update(old, two[1], 0.5)
for name, M in {"factors": by_factors, "blocks": by_blocks}.items():
    print(f"averages of {name}: error {relative_error(M.dense(), average):.3f}")
assert_exact(by_blocks.dense(), average)
assert relative_error(by_factors.dense(), average) > 0.1

M = kpsvd(random_io(20))
new = random_io(20)
M2 = Recompressed(nearest_product).update(M, new, 0.25)
target = 0.75 * M.dense() + 0.25 * new.block()
assert squared_error(M2.dense(), target) < squared_error(
    MovingAverage(kpsvd).update(M, new, 0.25).dense(), target
)

# %% [markdown]
# ## What goes wrong in practice
#
# This section is about [the authors' public
# code](https://github.com/Abdoulaye-Koroko/natural-gradients/tree/97105b613b54915b83c627e8aa5ca6e45edc2c2d), in its
# state of September 2024, not about the paper. The same repository stores
# [results](https://github.com/Abdoulaye-Koroko/natural-gradients/tree/97105b613b54915b83c627e8aa5ca6e45edc2c2d/apps/mlp_cnn/results_ref/kpsvd_approx)
# of all four methods on the paper's three autoencoders, and they agree with the abstract. They are single runs of 200
# epochs. A script beside them picks, for each method, the best of [16
# settings](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/apps/mlp_cnn/results_ref/kpsvd_approx/.ipynb_checkpoints/main-checkpoint.py#L191-L193),
# as many as for KFAC. The table has the epochs until the final training loss of KFAC. KPSVD did not reach it on two
# tasks, and ended as far above as stated.
#
# | | CURVES | FACES | MNIST |
# | --- | --- | --- | --- |
# | KPSVD | 176 | 1.3 % above | .2 % above |
# | Deflation | 159 | 20 | 36 |
# | Lanczos | 29 | 19 | 34 |
# | KFAC-CORRECTED | 29 | 16 | 32 |
#
# The training code of these runs is not in the repository: that script imports a module `train_autoencoder`, which is
# missing. So the faults below need not have been in these runs.
#
# **The inverse of another matrix.** To stay positive, the code divides by $1 + \lvert q_o \rvert \lvert p_i \rvert$
# instead of $1 + q_o p_i$ in [(16.8)]. The result is positive definite, but it is not the inverse of the sum. Where
# $q_o p_i \lt 0$, the second term enters with the wrong sign. By the table above, the steps are nevertheless
# about as good as those of the guarded inverse.

# %% tags=["hide-input"] fold="Measured: the error of this inverse"
M = deflation(random_io(40))
safe = guarded(M, 0.1)
(p, KA), (q, KB) = (
    simultaneous_eigh(safe.first.A, safe.second.A),
    simultaneous_eigh(safe.first.B, safe.second.B),
)
V = torch.randn(3, 5)
right, wrong = (
    Congruence(KA, KB, 1 / (1 + x)) for x in (torch.outer(q, p), torch.outer(q, p).abs())
)
assert_exact(right @ (safe @ V), V)
print(f"with absolute values: error {relative_error(wrong @ (safe @ V), V):.2f}")
assert relative_error(wrong @ (safe @ V), V) > 0.02

# %% [markdown]
# **A test that always passes.** Its Lanczos method takes two steps ([`lanczos.py`, line
# 58](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/lanczos.py#L58))
# and means to restart from the sum of the two pairs until they have converged. Such restarts converge, as the next cell
# shows. But $X$ and $Y$ are a singular pair only if *both* $R \operatorname{vec}(X) = \sigma \operatorname{vec}(Y)$ and
# $R^\top \operatorname{vec}(Y) = \sigma \operatorname{vec}(X)$. One of the two equations holds after any number of
# steps, by construction, and the code tests only this one ([`optim_utils.py`, lines 393 to
# 396](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/utils/optim_utils.py#L393-L396)).
# So it never restarts. When we ran that function on the three layers of this network, its second value was 71 to 98 %
# too small.

# %% tags=["hide-input"] fold="Measured: both residuals after two steps, and the second value after restarts"
R, pairs = Rearranged(ios["2"]), lanczos_svd(Rearranged(ios["2"]), start, steps=2)[:2]
found = [(K.A.norm() ** 2).item() for K in pairs]
residuals = [
    ((R.to_outputs(K.A) - s * K.B).norm() / s, (R.to_inputs(K.B) - s * K.A).norm() / s)
    for K, s in zip(pairs, found, strict=True)
]
for number, (one, other) in enumerate(residuals, start=1):
    print(f"pair {number} after two steps: residuals {one.item():.0e} and {other.item():.0e}")
    assert one < 1e-12 < 1e-3 < other
restarted = start
for _ in range(100):
    pairs = lanczos_svd(R, restarted, steps=2)[:2]
    restarted = sum(K.B / K.B.norm() for K in pairs)
misses = [1 - (K.A.norm() ** 2).item() / s for K, s in zip(pairs, sigma, strict=True)]
print(f"missing of the second value: {1 - found[1] / sigma[1]:.0%} after two steps,", end=" ")
print(f"{abs(misses[1]):.0e} after 100 restarts")
assert 1 - found[1] / sigma[1] > 0.1 > 1e-6 > abs(misses[1])

# %% [markdown]
# **A second term that repeats the first.** The function for a second pair takes the first away only if it is called
# with the name of the method ([`optim_utils.py`, line
# 226](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/utils/optim_utils.py#L226)).
# The optimizers for Deflation and KFAC-CORRECTED both pass another name, `"kpsvd"` ([`deflation.py`, line
# 55](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/deflation.py#L55),
# [`kfac_cor.py`, line
# 55](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/kfac_cor.py#L55)).
# So Deflation's second term is its first term again, and KFAC-CORRECTED adds to KFAC the nearest product instead of the
# product nearest to KFAC's error. When we ran that optimizer on random data, both terms had the same direction to four
# digits. Even with the best scale, a repeated first term is no better than one product:

# %% tags=["hide-input"] fold="Measured: errors with the second term, and with a repeated first term"
io = ios["2"]
F, first_term = io.block(), kpsvd(io)


def best_scaled(M: Tensor) -> float:
    return relative_error(M * ((M * F).sum() / M.square().sum()), F)


repeated = best_scaled(KroneckerSum(first_term, first_term).dense())
added = best_scaled(KroneckerSum(kfac(io), first_term).dense())
print(f"Deflation: error {best_scaled(deflation(io).dense()):.3f}, repeated {repeated:.3f}")
print(f"KFAC-CORRECTED: error {best_scaled(kfac_corrected(io).dense()):.3f}, added {added:.3f}")
assert_exact(torch.tensor(repeated), torch.tensor(relative_error(first_term.dense(), F)))
assert added > 1.05 * best_scaled(kfac_corrected(io).dense())

# %% [markdown]
# **A variable before its value.** At its second update of the curvature, the file for KFAC-CORRECTED uses `rho`, which
# it sets eight lines later, and raises an error ([`kfac_cor.py`, lines 260 to
# 268](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/kfac_cor.py#L260-L268)).
# The training script of the repository never reaches a second update. It updates when a counter is a multiple of 100
# ([`train_mlp.py`, line
# 162](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/apps/mlp_cnn/train_mlp.py#L162)),
# and the counter moves with the updates instead of the steps ([`kfac_cor.py`, line
# 149](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/kfac_cor.py#L149-L151)),
# so that this script keeps the curvature of the first batch, for all methods and for KFAC.
#
# **Only nearby positions.** For convolutions $G_{vn}$ is a sum over positions, and $G X G^\top$ has a term for every
# pair of positions. To save time, the code keeps pairs within a "radius" ([`optim_utils.py`, lines 123 to
# 128](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/utils/optim_utils.py#L123-L128)):
# the pairs whose *numbers* differ by less than the size of the kernel. Numbers run along rows of the image, so the code
# keeps horizontal neighbours and drops vertical ones. (The paper's autoencoders have no convolutions. The results for
# convolutional networks that are stored there were not checked.)

# %% tags=["hide-input"] fold="Counted: pairs of positions on an image of 3 × 4"
T, width = 12, 4  # an image of 3 x 4 positions, numbered by rows; a kernel of size 3
pairs = [(s, t) for s in range(T) for t in range(T)]
near = [
    (s, t) for s, t in pairs if max(abs(s // width - t // width), abs(s % width - t % width)) < 3
]
kept = [(s, t) for s, t in pairs if abs(s - t) < 3]
print(
    f"{len(near)} pairs of positions share a pixel, {len(set(near) & set(kept))} of them are kept"
)
print(f"{len(set(kept) - set(near))} pairs are kept that share none")
assert len(set(near) & set(kept)) < len(near) / 2
assert set(kept) - set(near)

# %% [markdown]
# ## The paper and this package
#
# What is in [Koroko et al. (2022)](bibliography.md#kpsvd-kfac), as far as its abstract and [its authors'
# code](https://github.com/Abdoulaye-Koroko/natural-gradients/tree/97105b613b54915b83c627e8aa5ca6e45edc2c2d) tell, and
# what is here.
#
# | | the paper | here |
# | --- | --- | --- |
# | algorithms | KPSVD, Deflation, Lanczos, KFAC-CORRECTED | `kpsvd`, `deflation`, `lanczos`, `kfac_corrected`; `ekpsvd` is an addition |
# | iterations | the code: residual $10^{-6}$, 1000 at most, from [the pair of the last update](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/kpsvd.py#L264); Lanczos with 2 steps, never restarted | residual $10^{-6}$ of $\sigma_1$, the same limit, with a warning at it, from the identity; Lanczos with 12 steps |
# | convolutions | the code: pairs of positions that are near in raster order | all pairs of positions |
# | Fisher | the code: labels drawn from the model, for a quarter of the batch | any; in the optimizer, one drawn label for each sample |
# | damping, one product | the code: [$\sqrt\lambda$ on both factors, with $\pi$ as an option](https://github.com/Abdoulaye-Koroko/natural-gradients/blob/97105b613b54915b83c627e8aa5ca6e45edc2c2d/optimizers/kpsvd.py#L290-L310) that is off in its script; for convolutions $\lambda$ divided by the positions | `factored_inverse`, with $\pi$, not divided |
# | damping, two products | the code: $\lambda$ on both first factors, and the inverse of $1 + \lvert q p \rvert$ | `guarded_inverse`: $\pi$ and $\sqrt\lambda$, and the second term shrunk as far as needed: the inverse of the matrix `guarded` |
# | average over batches | the code: of each factor, the old one with up to .95 | `Recompressed`: nearest to the averaged block; or `Latest` |
# | schedule | the code: matrices and inverses every 100 steps | the optimizer's, [Chapter 11](11_averages.py) |
# | numbers | the code: damping $10^{-3}$, clipping $10^{-2}$, by default | not used |
# | headline | more accurate than KFAC at a slight additional cost, and faster than KFAC and first-order methods on three deep autoencoders | accuracy: [Theorem 16.2]; cost: counted above; training: [Chapter 23](23_comparison.py) trains each beside its controls, with smaller autoencoders among the tasks |
#
# ## In one minute
#
# - **Rearranged.** With its entries moved, a Kronecker product is a matrix of rank one. So the nearest product is the
#   first singular triple of $R = \sum G \otimes G$, and the nearest sum of two has the first two.
# - **Products.** The iteration needs only products with $R$ and $R^\top$, and each costs as much as KFAC's factors. On
#   the trained network KPSVD takes ten to thirty of them, and a second term several times as many.
# - **Positive.** KPSVD's factors are positive semi-definite ([Theorem 16.1]). A sum of two products may be indefinite:
#   shrink its second term with `guarded_inverse`.
# - **Inverse.** One basis, which is not orthogonal, makes both products diagonal, [(16.8)]. It leaves no place for
#   $\delta I$, so that damping enters by the factors.
# - **Nearer is not better.** The errors are ordered ([Theorem 16.2]). The steps on the trained network are not: TKFAC's
#   were better than KPSVD's.
#
# ## Exercises
#
# **Exercise 16.1.** With one position, let $C = R - \operatorname{vec}(B) \operatorname{vec}(A)^\top$ for KFAC's
# factors, with singular values $\kappa_k$. Show that KFAC is a nearest product if and only if
# $C \operatorname{vec}(A) = 0$, $C^\top \operatorname{vec}(B) = 0$ and $\kappa_1 \le \lVert A \rVert \lVert B \rVert$.
# Is it enough that KFAC's factors are multiples of those of KPSVD?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# If $C$ is orthogonal to both factors, the singular values of
# $R = \operatorname{vec}(B) \operatorname{vec}(A)^\top + C$ are $\lVert A \rVert \lVert B \rVert$ and the $\kappa_k$,
# and KFAC belongs to the largest if no $\kappa_k$ is larger. Conversely, a nearest product is $\sigma_1 y_1 x_1^\top$
# for a first pair. If this is KFAC, then $R \operatorname{vec}(A) = \lVert A \rVert^2 \operatorname{vec}(B)$, hence
# $C \operatorname{vec}(A) = 0$, and the other side likewise. The condition holds if $C = 0$, without correlation.
# Multiples are not enough: for $a_n = c_n a$ and $g_n = g / c_n$ the block has rank one and both methods have its
# factors up to scale, but KFAC is too large by the mean of $c^2$ times the mean of $c^{-2}$ ([Chapter
# 15](15_tkfac.py)).
#
# </details>
#
# **Exercise 16.2.** What does one turn of the power iteration give if it starts from KFAC's $B$ instead of
# the identity? Which guarantee does this start give that the identity does not give?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $X = R^\top \operatorname{vec}(B)$ is the best partner for $B$ and is at least as good as KFAC's own $A$. So after any
# number of turns the product is at least as near as KFAC. From the identity this holds only in the limit, but every
# iterate is at least as near as TKFAC.
#
# </details>
#
# **Exercise 16.3.** To save iterations, an estimator starts every power iteration at the $B$ of the previous batch.
# Find data that change from one batch to the next such that it stays at the old pair.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# If the old data used the first output only and the new data use the second only, then for the old
# $B = e_1 e_1^\top$ and all new gradients, $G^\top B G = 0$. The new data add nothing to
# $R^\top \operatorname{vec}(B)$, and the iteration stays at the old pair, however small its weight. A small multiple of
# the identity, added to the start, avoids this.
#
# </details>
#
# **Exercise 16.4.** Write $B \otimes A + \delta I$ as a `KroneckerSum` that is inverted directly,
# without conjugate gradients. This chapter says that a sum of two products has no direct inverse with damping. Why is
# this no contradiction?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# `KroneckerSum(Kronecker(delta * I, I), Kronecker(A, B)).inverse(0.0)`: two terms, of which the first is positive
# definite. The Cholesky factors are multiples of the identity, so the common basis is orthogonal up to scale, and
# [(16.8)] is [(8.5)] in another scaling. The identity may be one of two terms. Only a third term is not diagonal in the
# common basis.
#
# </details>
#
# **Exercise 16.5.** Write KPSVD yourself for one position, by [(16.4)]: from `a` of shape $[N, d_\text{in}]$, `g` of
# shape $[V, N, d_\text{out}]$ and a number of turns to $A$ and $B$, with `torch.einsum` only. Compare
# `Kronecker(A, B).dense()` with `kpsvd(io).dense()`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def solution(a, g, turns):
#     B = torch.eye(g.shape[2])
#     for _ in range(turns):
#         A = torch.einsum("vno,op,vnp,ni,nj->ij", g, B, g, a, a)
#         A = A / A.norm()  # then B has the scale
#         B = torch.einsum("ni,ij,nj,vno,vnp->op", a, A, a, g, g)
#     return A, B
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"]
def solution(a: Tensor, g: Tensor, turns: int) -> tuple[Tensor, Tensor]:  # 16.5
    B = torch.eye(g.shape[2])
    for _ in range(turns):
        A = torch.einsum("vno,op,vnp,ni,nj->ij", g, B, g, a, a)
        A = A / A.norm()  # then B has the scale
        B = torch.einsum("ni,ij,nj,vno,vnp->op", a, A, a, g, g)
    return A, B


io = random_io(20)
A, B = solution(io.a[:, 0], io.g[:, :, 0], 100)
assert_exact(Kronecker(A, B).dense(), kpsvd(io, tolerance=1e-12).dense())

a = torch.randn(5, 1, 5).repeat_interleave(4, 0)  # 16.1: all pairs of 5 inputs and 4 vectors
io = LayerIO(a, torch.randn(1, 4, 1, 3).repeat(1, 5, 1, 1))
assert_exact(kpsvd(io).dense(), kfac(io).dense())
io = random_io(20)
K, R = kfac(io), Rearranged(io)
assert relative_error(kpsvd(io).dense(), K.dense()) > 0.01
C = rearranged(io.block() - K.dense(), 3, 5)
assert (C @ K.A.flatten()).norm() > 1e-3 * C.norm() * K.A.norm()
c = torch.tensor([0.3, 1, 2, 5]).reshape(4, 1, 1)
io = LayerIO(c * torch.randn(5), torch.randn(1, 1, 1, 3) / c)
K, M = kfac(io), kpsvd(io, tolerance=1e-12)
assert_exact(K.dense(), c.square().mean() * c.pow(-2).mean() * M.dense())
io = random_io(20)
K, R = kfac(io), Rearranged(io)

F = io.block()  # 16.2
for turns in range(1, 5):
    assert relative_error(power_svd(R, K.B, 0.0, turns).dense(), F) <= relative_error(K.dense(), F)

old = Kronecker(torch.eye(2)[0].diag(), torch.eye(2)[0].diag())  # 16.3
new = LayerIO(torch.eye(2)[1][None, None], torch.eye(2)[1][None, None, None])
R = Rearranged(LayerIO(new.a, 0.9**0.5 * new.g), (Kronecker(0.1 * old.A, old.B),))
stuck, found = power_svd(R, old.B), power_svd(R, old.B + 0.01 * torch.eye(2))
assert_exact(stuck.dense(), 0.1 * old.dense())
assert relative_error(found.dense(), 0.9 * new.block()) < 1e-4

M, E = Kronecker(spd(5), spd(3)), torch.randn(3, 5)  # 16.4
as_sum = KroneckerSum(Kronecker(0.1 * torch.eye(5), torch.eye(3)), M).inverse(0.0)
assert isinstance(as_sum, Congruence)
assert_exact(as_sum @ E, M.inverse(0.1) @ E)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Koroko et al. (2022)](bibliography.md#kpsvd-kfac) for the four methods and their experiments;
# [Van Loan and Pitsianis (1993)](bibliography.md#kpsvd) for the rearrangement. For TKFAC and TEKFAC see
# [Chapter 15](15_tkfac.py). Golub and Van Loan, *Matrix Computations*, for simultaneous diagonalisation and conjugate
# gradients.
