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
# # 17. SKFAC: factors of few columns
#
# **Part V: Better and faster.** A small batch tells a wide layer little. Can its curvature be
# inverted at the price of the batch, not of the layer?
#
# KFAC's factors have the size of the layer, although for a small batch each is a sum of few outer products. SKFAC,
# swift KFAC, keeps the vectors of these products as the columns of a matrix $U$, in the place of the factor
# $A = U U^\top$. It inverts the small matrix $U^\top U$ instead of $A$, both with damping ([Figure 17.1]).

# %% tags=["hide-input"]
from textwrap import fill

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import Conv2d, CrossEntropyLoss, Linear, Module, Sequential, Tanh
from torch.utils.flop_counter import FlopCounterMode

from kfac_scratch.approximations.estimators import Latest, MovingAverage, weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.skfac import (
    Window,
    at_positions,
    mean_over_positions,
    push_through,
    reduce_sum,
    skfac,
    spatial_subsampling,
    subsampled,
)
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import empirical, monte_carlo, type2, type2_classwise
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.kronecker_columns import (
    FactoredWoodburyInverse,
    KroneckerColumns,
    reduced_columns,
)
from kfac_scratch.matrices.low_rank import FourBlocks, LowRankKronecker
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"]
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
loss, generator = CrossEntropyLoss(), torch.Generator(images.device)


def network() -> Sequential:
    return Sequential(Linear(64, 100), Tanh(), Linear(100, 100), Tanh(), Linear(100, 10))


net, X, y = network(), images[:32], labels[:32]
ios = layer_ios(net, loss, X, y, monte_carlo(1, generator))
for name, io in ios.items():
    A, B = kfac(io).A, kfac(io).B
    ranks = [torch.linalg.matrix_rank(M).item() for M in (A, B)]
    print(f"layer {name}: A is {len(A)} × {len(A)} of rank {ranks[0]},", end=" ")
    print(f"B is {len(B)} × {len(B)} of rank {ranks[1]}")
    assert max(ranks) <= 32

# %% tags=["hide-input"] alt="Three heat maps: the columns U of a layer, 101 rows by 32 columns; the factor A, 101 by 101, their outer products; and the small matrix of the columns' inner products, 32 by 32." caption="The middle layer on a batch of 32: the columns $U$ that the batch gives, KFAC's factor $A = U U^\\top$ of 101 rows, and the matrix $U^\\top U$ of 32 rows that SKFAC inverts. Each of the two products follows from $U$."
columns = ios["2"].a[:, 0].T / 32**0.5
assert_exact(columns @ columns.T, kfac(ios["2"]).A)
matrices(
    {"$U$": columns, r"$A = U U^\top$": columns @ columns.T, r"$U^\top U$": columns.T @ columns}
)

# %% [markdown]
# The main formula is an identity, not an approximation. Here $\gamma$ is the damping of the factor. SKFAC's step is
# KFAC's step for the same batch:
#
# $$
# (U U^\top + \gamma I)^{-1} = \tfrac1\gamma \bigl( I - U (U^\top U + \gamma I)^{-1} U^\top \bigr) .
# $$
#
# After this chapter you will be able to
#
# - derive the identity and count what it saves, and say when it saves nothing;
# - compute the step of the batch's own gradient without a division by the damping;
# - reduce the positions of a convolution: Reduce Sum and Spatial Subsampling;
# - say why one batch needs more damping than an average, and what a window of batches is.
#
# The network has two hidden layers of 100 units. Each of 32 handwritten digits
# sends back one vector, the gradient for a label drawn from the model. The printed ranks are those of the factors:
# $A + \gamma I$ of the middle layer has 32 eigenvalues that depend on the batch and 69 that
# are equal to $\gamma$.
#
# ## Woodbury's identity
#
# Put the columns whose outer products make up a factor side by side, $A = U U^\top$. For the inputs,
# $U$ is $[d_\text{in}, N S]$ with the columns $a_{ns} / \sqrt{N S}$; for the vectors it is
# $[d_\text{out}, V N S]$ with the columns $g_{vns}$. We write $K$ for the number of columns.
#
# <div class="admonition theorem" markdown="1" id="thm-17.1">
# <p class="admonition-title" markdown="1"><b>Theorem 17.1 (Woodbury)</b></p>
#
# For every matrix $U$ of shape $[d, K]$ and every $\gamma \gt 0$,
#
# $$
# \begin{aligned}
# (U U^\top + \gamma I)^{-1} U &= U (U^\top U + \gamma I)^{-1} , \\
# (U U^\top + \gamma I)^{-1} &= \tfrac1\gamma \bigl( I - U (U^\top U + \gamma I)^{-1} U^\top \bigr) .
# \end{aligned}
# \tag{17.1}
# $$
#
# </div>
#
# **Proof.** $U (U^\top U + \gamma I) = (U U^\top + \gamma I)\, U$, since both are $U U^\top U + \gamma U$.
# Multiplication by the two inverses, one from each side, gives the first line. Let $X = (U U^\top + \gamma I)^{-1}$.
# Then $(U U^\top + \gamma I) X = I$ says $\gamma X = I - U\, U^\top X$, and $U^\top X$ is the transpose of the first
# line. $\blacksquare$
#
# The first line *pushes* $U$ *through* the inverse: on the left a $d \times d$ matrix is inverted, on the right a
# $K \times K$ one. Entry $(k, l)$ of $U^\top U$ is the inner product of two columns, a similarity of two data.
# By the second line the inverse divides by $\gamma$ and then corrects the
# result in the span of the columns. By hand:


# %%
def inverse_by_hand(U: Tensor, gamma: float) -> Tensor:
    d, K = U.shape
    gram = torch.zeros(K, K)
    for k in range(K):
        for m in range(K):
            gram[k, m] = U[:, k] @ U[:, m]
    middle = torch.linalg.inv(gram + gamma * torch.eye(K))
    inverse = torch.eye(d) / gamma
    for k in range(K):
        for m in range(K):
            inverse -= middle[k, m] * torch.outer(U[:, k], U[:, m]) / gamma
    return inverse


io = ios["2"]
N, gamma = 32, 0.1
U = torch.stack([io.a[n, 0] / N**0.5 for n in range(N)], dim=1)  # [d_in, N]
A = kfac(io).A
assert_exact(U @ U.T, A)
assert_exact(inverse_by_hand(U, gamma), torch.linalg.inv(A + gamma * eye_like(A)))

# %% [markdown]
# ## A layer by its columns
#
# SKFAC's matrix is the same $B \otimes A$ as KFAC's, stored as columns. `reduced_columns` is for the case of many
# columns. If there are more than the factor has rows, a QR decomposition $U^\top = Q R$ gives $U U^\top = R^\top R$,
# and the $d$ columns of $R^\top$ replace $U$. So the columns never need more memory than the factor.

# %% tags=["remove-input"]
code(skfac, reduced_columns)

# %% [markdown]
# A product with the matrix needs no factor either: $B V A = U_B (U_B^\top V U_A) U_A^\top$, with a
# small matrix in the middle.

# %%
for fisher in (monte_carlo(1, generator), type2):
    for name, io in layer_ios(net, loss, X, y, fisher).items():
        M, dense = skfac(io), kfac(io)
        G = torch.randn(io.g.shape[-1], io.a.shape[-1])
        assert_exact(M @ G, dense @ G)
        assert_exact(M.trace(), dense.trace())
        held, full = M.UA.numel() + M.UB.numel(), dense.A.numel() + dense.B.numel()
        print(f"layer {name}, V = {len(io.g)}: {M.UA.shape[1]} columns for A,", end=" ")
        print(f"{M.UB.shape[1]} for B; {held} numbers, KFAC {full}")
        assert held <= full

# %% [markdown]
# In the second half of the output each datum has nine type-2 vectors, one less than classes, so that $B$ has 288
# columns and `reduced_columns` reduces them to $d_\text{out}$. **The number of columns is $V N S$ for $B$ and $N S$
# for $A$, not $N$.** SKFAC is for the Monte Carlo or the empirical Fisher ($V = 1$), small batches and one position.
#
# ## The paper's inverse
#
# SKFAC damps both factors ([Chapter 9](09_damping.py)) and applies the identity to each. With the
# Cholesky factor $L L^\top = U^\top U + \gamma I$ and $W = L^{-1} U^\top$, the inverse of a factor is
#
# $$
# (U U^\top + \gamma I)^{-1} = \tfrac1\gamma \bigl( I - W^\top W \bigr) ,
# \tag{17.2}
# $$
#
# two thin products and a subtraction. [The authors'
# code](https://github.com/fL0n9/SKFAC-MindSpore/tree/aca020fc5dfe3fddff7c0928f4ad2fe414653666) puts $\sqrt\delta$
# on both sides ([`skfac_layer.py`, lines 327 and
# 354](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/skfac_layer.py#L327)).
# The package balances them with $\pi$, which needs the traces of the factors only, and these are the sums of all
# squared entries of the columns.

# %% tags=["remove-input"]
code(KroneckerColumns.inverse_of_damped_factors, FactoredWoodburyInverse, factored_inverse)

# %%
for io in ios.values():
    M, G = skfac(io), io.gradients().sum((0, 1))
    assert_exact(factored_inverse(M, 0.1) @ G, factored_inverse(kfac(io), 0.1) @ G)
    explicit = Kronecker(*(inverse_by_hand(U, gamma) for U in (M.UA, M.UB)))
    assert_exact(M.inverse_of_damped_factors(gamma, gamma) @ G, explicit @ G)

# %% [markdown]
# The last lines compare two forms: the explicit inverse of a factor, as in the authors' code
# ([line 363](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/skfac_layer.py#L363)),
# and the inverse that is only applied. They agree up to rounding. The explicit one is a $d \times d$ matrix: it costs
# $K d^2$ to form, and $d^3$ to multiply with a gradient. If the same inverse serves hundreds of steps, as in that
# code, forming it once is the better choice for $2 K \gt d$: applying it takes two products with $K$ columns each.
#
# ### What it saves
#
# We count the operations from a batch's rows to a step: factors, decompositions, and one product with
# a gradient. PyTorch counts the operations of matrix products. We add the operations of the decompositions.

# %%
aten = torch.ops.aten
decompositions = {
    aten.linalg_cholesky_ex: lambda L, *_, **__: L[-1] ** 3 // 3,
    aten.cholesky_inverse: lambda L, *_, **__: 2 * L[-1] ** 3 // 3,
    aten.linalg_solve_triangular: lambda L, R, *_, **__: L[-1] ** 2 * R[-1],
}


def operations(step, io: LayerIO, G: Tensor) -> int:
    with FlopCounterMode(display=False, custom_mapping=decompositions) as counter:
        step(io, G)
    return counter.get_total_flops()


def kfac_step(io: LayerIO, G: Tensor) -> Tensor:
    return factored_inverse(kfac(io), 0.1) @ G


def skfac_step(io: LayerIO, G: Tensor) -> Tensor:
    return factored_inverse(skfac(io), 0.1) @ G


widths = [32, 64, 128, 256, 512]
counts = {"KFAC": [], "SKFAC, N = 8": [], "SKFAC, N = 32": []}
for d in widths:
    for (name, row), N in zip(counts.items(), (32, 8, 32), strict=True):
        io = LayerIO(torch.randn(N, 1, d), torch.randn(1, N, 1, d))
        row.append(operations(kfac_step if name == "KFAC" else skfac_step, io, torch.randn(d, d)))

# %% tags=["hide-input"] alt="Log-log plot of operations against the width of a layer from 32 to 512. KFAC's line is the steepest, with slope three; the two lines of SKFAC have slope two, that of 8 data below that of 32 data. At width 32 the line of SKFAC with 32 data lies near KFAC's, at width 512 it is more than ten times lower." caption="Operations for one step of a square layer. KFAC's grow with the third power of the width, SKFAC's with the second."
fig, ax = plt.subplots(figsize=(6.2, 3.6))
for (name, row), marker in zip(counts.items(), "osd", strict=True):
    ax.loglog(widths, row, marker + "-", label=name)
ax.set(xlabel="width of the layer", ylabel="operations", xticks=widths, xticklabels=widths)
ax.minorticks_off()
ax.legend()
plt.show()

gain = [k / s for k, s in zip(counts["KFAC"], counts["SKFAC, N = 32"], strict=True)]
print("KFAC's operations over SKFAC's, 32 data:", [round(ratio, 1) for ratio in gain])
assert counts["KFAC"][-1] > 6 * counts["KFAC"][-2]  # towards a factor of 8
assert counts["SKFAC, N = 32"][-1] < 4.5 * counts["SKFAC, N = 32"][-2]  # towards 4
assert gain[0] < 2 < 10 < gain[-1]

# %% [markdown]
# The figure counts operations and has two limits. First, an operation of a decomposition takes longer than one of a
# product, so that times differ from this count. Second, KFAC decomposes its averages only every so many steps,
# because they change slowly, while SKFAC decomposes anew for each batch. With a decomposition every 100 steps KFAC's
# costs for it fall to a hundredth, and then SKFAC saves only in the products.
#
# ## The batch's own gradient
#
# If the gradient comes from the same batch, it is a combination of the same columns. For the empirical Fisher, $g_n$
# is the gradient of a datum's loss divided by $\sqrt D$, so that the gradient of the mean loss is
# $G = \sum_n g_n a_n^\top / \sqrt D$. In general,
#
# $$
# G = \sum_{v, n} c_{vn} G_{vn} = U_B\, C\, U_A^\top ,
# \tag{17.3}
# $$
#
# where $C$, of shape $[V N S, N S]$, has $\sqrt{N S}\, c_{vn}$ at the entries that join $g_{vns}$ with its own
# $a_{ns}$ and zeros elsewhere. The first line of [(17.1)], used on both sides, gives
#
# $$
# (B + \gamma_B I)^{-1} G\, (A + \gamma_A I)^{-1}
# = U_B\, (U_B^\top U_B + \gamma_B I)^{-1}\, C\, (U_A^\top U_A + \gamma_A I)^{-1}\, U_A^\top .
# \tag{17.4}
# $$
#
# All matrices between $U_B$ and $U_A^\top$ are small.

# %% tags=["remove-input"]
code(push_through)

# %% [markdown]
# With type-2 vectors it works as well, although the labels do not enter them: the columns for a datum span all
# gradients that any label can have. Here we let least squares find $c$. With another root of the same Hessian, the
# scores of all classes, $c$ would be zero except at the datum's own class (Exercise 17.2). Monte Carlo vectors, one
# per datum, do not in general span the gradient for the data's labels.

# %%
f = net(X).detach().requires_grad_()
(head,) = torch.autograd.grad(loss(f, y), f)  # gradient with respect to the outputs, [N, C]
weights = dict(net.named_parameters())
gradient = dict(
    zip(weights, torch.autograd.grad(loss(net(X), y), list(weights.values())), strict=True)
)
for fisher in (empirical, type2):
    vectors = fisher(loss, f, y)[:]  # [V, N, C]
    found = torch.linalg.pinv(vectors.permute(1, 2, 0)) @ head.unsqueeze(2)  # [N, V, 1]
    c = found.squeeze(2).T
    for name, io in layer_ios(net, loss, X, y, fisher).items():
        G = torch.cat([gradient[f"{name}.weight"], gradient[f"{name}.bias"].unsqueeze(1)], dim=1)
        assert_exact(torch.einsum("vn,vnoi->oi", c, io.gradients()), G)
        assert_exact(
            push_through(io, c, 0.1, 0.2), skfac(io).inverse_of_damped_factors(0.1, 0.2) @ G
        )

drawn = monte_carlo(1, generator)(loss, f, y)[0:1].squeeze(0)
outside = head - (head * drawn).sum(1, keepdim=True) / drawn.square().sum(1, keepdim=True) * drawn
print(
    f"share of the gradient that Monte Carlo vectors miss: {(outside.norm() / head.norm()).item():.2f}"
)
assert outside.norm() > 0.1 * head.norm()

# %% [markdown]
# In exact arithmetic both formulas give the same step. In floating point they differ. [(17.2)] subtracts a matrix
# close to a projection from $I$ and multiplies the difference by $1 / \gamma$. If the gradient lies in the span, the
# difference is small and its relative error large. We repeat the step in single precision.

# %%
io = layer_ios(net, loss, X, y, empirical)["2"]
c = torch.full((1, 32), 32**-0.5)
single, G = LayerIO(io.a.float(), io.g.float() * 100), io.gradients().sum((0, 1)) * 32**-0.5
io, G = LayerIO(io.a, io.g * 100), G * 100  # a unit in which both factors are of order one
forms = {"Woodbury": [], "eigenpairs": [], "only G is rounded": [], "pushed through": []}
gammas = torch.logspace(-7, 0, 15).tolist()
for gamma in gammas:
    right = push_through(io, c, gamma, gamma)
    assert relative_error(skfac(io).inverse_of_damped_factors(gamma, gamma) @ G, right) < 0.01
    M = skfac(single)
    steps = (
        M.inverse_of_damped_factors(gamma, gamma) @ G.float(),
        M.low_rank().inverse_of_damped_factors(gamma, gamma) @ G.float(),
        skfac(io).inverse_of_damped_factors(gamma, gamma) @ G.float().double(),
        push_through(single, c.float(), gamma, gamma),
    )
    for row, step in zip(forms.values(), steps, strict=True):
        row.append(relative_error(step.double(), right))

# %% tags=["hide-input"] alt="Log-log plot of the relative error of a step in single precision against the damping of the factors, from one down to ten to the minus seven. The step that is pushed through stays at a small error, the three others grow by two orders of magnitude for each order of magnitude of the damping, until they exceed the step itself." caption="Error of a step in single precision, for the batch's own gradient. All forms that divide by the damping lose all digits, even in double precision if the gradient was rounded; the one that does not keeps them."
fig, ax = plt.subplots(figsize=(6.2, 3.4))
for (name, row), style in zip(forms.items(), ("-", "--", ":", "-"), strict=True):
    ax.loglog(gammas, row, "." + style, label=name)
ax.axhline(1, linestyle=":", linewidth=1, color=ax.xaxis.label.get_color())
ax.set(xlabel=r"damping of each factor, $\gamma$", ylabel="relative error")
ax.legend()
plt.show()
print({name: f"{row[0]:.1e}" for name, row in forms.items()})
assert min(forms["Woodbury"][0], forms["only G is rounded"][0]) > 1
assert forms["pushed through"][0] < 0.1

# %% [markdown]
# At a damping of $10^{-7}$ the three forms that divide by it have relative errors far above one. The Cholesky factor
# is not the reason: eigenpairs have the same error, and so has the inverse in double precision if only $G$ was
# rounded. A rounded $G$ is no longer *exactly* in the span, and its part outside of the span is divided by
# $\gamma^2$. The form that is pushed through does not use $G$.
#
# ## Exact damping
#
# $(B + \gamma_B I) \otimes (A + \gamma_A I)$ exceeds $B \otimes A + \delta I$ ([Chapter 9](09_damping.py)).
# Can few columns also invert the latter? It is no Kronecker product, but its eigenvalues are known. A
# thin singular value decomposition $U_A = Q_A \operatorname{diag}(\sigma)\, P^\top$ gives the
# eigenvectors $Q_A$ of $A$, and $\sigma^2$ for their eigenvalues $\alpha_j$; likewise $\beta_i$ for $B$.
# All other eigenvalues are zero. Complete both bases in any way. The eigenvalues of
# $B \otimes A + \delta I$ are $\beta_i \alpha_j + \delta$ where both vectors are known, and $\delta$
# everywhere else.
#
# So the inverse divides by $\delta$ everywhere and corrects a rectangle. Other low-rank methods give the unknown
# directions an eigenvalue that is not zero, so the package treats the general case. Let $A$ have the eigenvalue $c_A$
# outside of its known vectors and $B$ have $c_B$. The table then has four blocks. Write $w$ for the inverse
# eigenvalues of each,
#
# $$
# \begin{aligned}
# w_{ij} &= \frac{1}{\beta_i \alpha_j + \delta} , & w_{i\cdot} &= \frac{1}{\beta_i c_A + \delta} , \\
# w_{\cdot j} &= \frac{1}{c_B \alpha_j + \delta} , & w &= \frac{1}{c_B c_A + \delta} .
# \end{aligned}
# \tag{17.5}
# $$
#
# The inverse first scales everything by $w$. In the span of $Q_B$ it adds the correction $w_{i\cdot} - w$, and in
# the span of $Q_A$ the correction $w_{\cdot j} - w$. The intersection of both was then corrected twice, and gets
# $w_{ij} - w_{i\cdot} - w_{\cdot j} + w$ in addition. Products cost $d_\text{in} d_\text{out}$ times the number of
# columns, as before.

# %% tags=["hide-input"] alt="Two heat maps of 8 by 12 eigenvalues. Left, for few columns: the upper left rectangle of 2 by 3 has small, varying values, and all the rest is one constant. Right, with tails: four blocks; rows beside the rectangle and columns below it vary along one direction, and the lower right block is one constant." caption="Eigenvalues of $(B \\otimes A + \\delta I)^{-1}$, arranged by eigenvectors of $B$ (rows) and of $A$ (columns), the largest first. Three vectors of $A$ and two of $B$ are known."
Q_A, Q_B = (torch.linalg.qr(torch.randn(d, d)).Q for d in (12, 8))
known = torch.tensor([3.0, 2.0, 1.2]), torch.tensor([2.0, 1.0])


def table(c_A: float, c_B: float) -> Tensor:
    """Eigenvalues of the damped inverse, by applying it to every pair of eigenvectors."""
    tails = torch.tensor([c_A, c_B])
    M = LowRankKronecker(Q_A[:, :3], known[0], tails[0], Q_B[:, :2], known[1], tails[1])
    inverse = M.inverse(0.5)
    pairs = torch.einsum("po,qi->oipq", Q_B, Q_A)
    return torch.einsum("oipq,oipq->oi", pairs, inverse @ pairs)


assert_exact(table(0.0, 0.0)[:2, :3], 1 / (torch.outer(known[1], known[0]) + 0.5))
assert_exact(table(0.9, 0.6)[2:, 3:], torch.full((6, 9), 1 / (0.9 * 0.6 + 0.5)))
matrices(
    {r"few columns: $c_A = c_B = 0$": table(0.0, 0.0), r"$c_A = 0.9$, $c_B = 0.6$": table(0.9, 0.6)}
)

# %% tags=["remove-input"]
code(KroneckerColumns.inverse, KroneckerColumns.low_rank, FourBlocks.__matmul__)

# %%
for io in ios.values():
    M, G = skfac(io), io.gradients().sum((0, 1))
    for delta in (1e-3, 1e-1):
        exact, factored = M.inverse(delta) @ G, factored_inverse(M, delta) @ G
        assert_exact(exact, kfac(io).inverse(delta) @ G)
        assert not torch.allclose(factored, exact, rtol=0.05)
        assert factored.norm() < exact.norm()
    print(
        f"factored over exact damping, length of the step: {(factored.norm() / exact.norm()).item():.2f}"
    )

# %% [markdown]
# ## Convolutions: fewer positions
#
# A convolution has $S$ patches per datum, so that $N S$ columns soon outnumber $d_\text{in}$. SKFAC
# brings them back to about $N$. The paper's abstract names two methods for it, "Spatial Subsampling and Reduce
# Sum".
#
# **Reduce Sum**: one row for each datum, from a sum over the patches, and one over the vectors. With the mean of
# the patches in place of their sum, which only changes the scale of $A$, this is KFAC-reduce ([Chapter
# 6](06_weight_sharing.py)), and `reduce_sum(io)` is `io.reduced()`. The authors' code takes the mean of both
# ([lines 166 and
# 194](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/skfac_layer.py#L166)),
# here `mean_over_positions(io)`. The curvature is then $S^2$ times smaller, and the damping must be, too.
#
# **Spatial Subsampling**: let a subset $\mathcal T$ of the positions stand for all,
#
# $$
# A_{\mathcal T} = \frac{1}{N \lvert \mathcal T \rvert} \sum_{n, s \in \mathcal T} a_{ns} a_{ns}^\top ,
# \qquad
# B_{\mathcal T} = \frac{S}{\lvert \mathcal T \rvert} \sum_{v, n, s \in \mathcal T} g_{vns} g_{vns}^\top .
# \tag{17.6}
# $$
#
# $A$ is a mean and needs no correction; $B$ is a sum and needs the factor. In a partition of the positions into
# parts of equal size, the mean of all $A_{\mathcal T}$ is the full $A$, and the mean of all $B_{\mathcal T}$ is the
# full $B$: each part is an unbiased estimate of both. For an image the subset is a grid, every second row and every
# second column, say: the positions that the same convolution would have if it moved two pixels at a time.
# `spatial_subsampling(io, 2)` keeps those. (`subsampled` keeps every so many positions of a sequence, and
# `at_positions` any others.)
#
# The abstract says that both methods reduce "across the spatial dimension or receptive fields of feature maps". We
# read the abstract and the public code only, and know no formula for a reduction within a receptive field, that
# is, of the entries of one patch. So there is none here.

# %% tags=["remove-input"]
code(reduce_sum, spatial_subsampling, at_positions)


# %%
class Pool(Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def train(model: Module, steps: int, pictures: Tensor) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        batch = torch.randint(1000, (100,))
        optimizer.zero_grad()
        loss(model(pictures[batch]), labels[batch]).backward()
        optimizer.step()


pictures = images.reshape(-1, 1, 8, 8)
cnn = Sequential(Conv2d(1, 6, 3), Tanh(), Conv2d(6, 8, 3), Tanh(), Pool(), Linear(8, 10))
train(cnn, 60, pictures)
io = layer_ios(cnn, loss, pictures[1000:1050], labels[1000:1050], type2)["2"]
F, expand, S = io.block(), kfac(io), io.a.shape[1]  # S = 16: positions on a grid of 4 × 4

parts = [kfac(subsampled(io, 4, start)) for start in range(4)]
assert_exact(sum(part.A for part in parts) / 4, expand.A)
assert_exact(sum(part.B for part in parts) / 4, expand.B)
assert_exact(skfac(subsampled(io, 1)).dense(), expand.dense())
grid = [kfac(spatial_subsampling(io, 2, (r, c))) for r in (0, 1) for c in (0, 1)]
assert_exact(sum(part.A for part in grid) / 4, expand.A)
assert_exact(sum(part.B for part in grid) / 4, expand.B)
assert_exact(spatial_subsampling(io, 2).a, at_positions(io, torch.tensor([0, 2, 8, 10])).a)
assert_exact(skfac(mean_over_positions(io)).dense() * S**2, kfac(io.reduced()).dense())

views = {
    "expand": io,
    "every second position": subsampled(io, 2),
    "every fourth position": subsampled(io, 4),
    "spatial subsampling": spatial_subsampling(io, 2),
    "reduce sum": reduce_sum(io),
    "the code's averages": mean_over_positions(io),
}
errors = {}
print("                       positions | distance from expand | distance from the exact block")
for name, view in views.items():
    M = skfac(view).dense()
    errors[name] = relative_error(M, expand.dense()), relative_error(M, F)
    print(f"{name:22} {view.a.shape[1]:9} | {errors[name][0]:20.2f} | {errors[name][1]:.3f}")
assert errors["spatial subsampling"][0] < 0.7 * errors["every fourth position"][0]
assert errors["reduce sum"][1] < 0.7 * errors["expand"][1]
assert errors["the code's averages"][1] > 0.98

G, averages, sums = torch.randn(8, 55), skfac(mean_over_positions(io)), skfac(reduce_sum(io))
step = sums.inverse_of_damped_factors(0.1, 0.1 * S**2) @ G
assert_exact(averages.inverse_of_damped_factors(0.1, 0.1) @ G, S**2 * step)

# %% [markdown]
# The table has three results. First, which positions are kept matters as much as how many. The flat axis runs along
# the rows of the image, so that every fourth of $4 \times 4$ positions is one *column* of it, its left border. A
# grid of the same size is much nearer to expand. Second, near to expand need not mean near to the block. This
# network averages its output over all positions, the setting for which reduce is made ([Chapter
# 6](06_weight_sharing.py)), and there one averaged patch is a better approximation than sixteen. Third, the
# curvature of the code's averages is $1 / S^2$ of Reduce Sum's. As a matrix it is far from the block. Its step is
# Reduce Sum's step, with $S^2$ times the damping on the side of the outputs and $S^2$ times the length, as the last
# line asserts. If damping and learning rate are tuned for the averages, as the authors did, the scale does no harm. A
# damping that is taken from another method would be wrong by this factor.
#
# In the optimizer, the choice is a part of the approximation. Layers with one position, such as the last one
# here, are not changed by any of them:

# %%
choices = {
    "reduce sum": Window(5, lambda io: skfac(reduce_sum(io))),
    "spatial subsampling": Window(5, lambda io: skfac(spatial_subsampling(io, 2))),
}
for name, approximation in choices.items():
    torch.manual_seed(0)
    small = Sequential(Conv2d(1, 6, 3), Tanh(), Conv2d(6, 8, 3), Tanh(), Pool(), Linear(8, 10))
    optimizer = KFAC(small, loss, approximation=approximation, damping=1e-4)
    before = loss(small(pictures[:1000]), labels[:1000]).item()
    for _ in range(40):
        batch = torch.randint(1000, (32,))
        optimizer.zero_grad()
        loss(small(pictures[batch]), labels[batch]).backward()
        optimizer.observe(pictures[batch], labels[batch])
        optimizer.step()
    after = loss(small(pictures[:1000]), labels[:1000]).item()
    print(f"{name:19} loss before training {before:.2f}, after 40 steps {after:.2f}")
    assert after < 0.7 * before

# %% [markdown]
# ## What one batch does not know
#
# So far SKFAC was equal to KFAC, since both had one batch. In training KFAC averages its factors over many steps.
# Many batches have many columns. The authors' code therefore keeps the columns of one batch. Between two updates,
# which are 834 steps apart
# ([`config.py`, line 38](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/config.py#L38)),
# it applies an old batch's inverse to the gradients of new ones. New gradients are not in the old span. A gradient
# that is orthogonal to the columns on both sides is divided by $\gamma_A \gamma_B$, however large the true curvature
# is there.

# %%
trained = network()
train(trained, 3, images)
own, other = (
    layer_ios(trained, loss, images[k : k + 32], labels[k : k + 32], empirical)["2"]
    for k in (1000, 1100)
)
M = skfac(own)
trace_A, trace_B = M.UA.square().sum().item(), M.UB.square().sum().item()
beyond_A, beyond_B = (eye_like(Q @ Q.T) - Q @ Q.T for Q in (M.low_rank().UA, M.low_rank().UB))
batches, lengths = {"own batch": own, "another batch": other}, {}
fractions = torch.logspace(-6, 0, 13).tolist()
for name, io in batches.items():
    G = io.gradients().sum((0, 1))
    share = ((beyond_B @ G @ beyond_A).norm() / G.norm()).item()
    print(
        f"{name}: {share:.3f} of the gradient's length is orthogonal to the columns on both sides"
    )
    lengths[name] = [
        (M.inverse_of_damped_factors(f * trace_A, f * trace_B) @ G).norm().item() for f in fractions
    ]
    assert share < 1e-10 if name == "own batch" else 1e-3 < share < 0.9

# %% tags=["hide-input"] alt="Log-log plot of the length of a step against the damping of the factors as a fraction of their traces. For the batch's own gradient the curve levels off as the damping falls; for another batch's gradient it keeps rising, a hundredfold for each tenth of the damping." caption="Length of a step for the gradient of the batch that the factors come from, and for that of another batch. As the damping falls, the first levels off and the second keeps growing."
fig, ax = plt.subplots(figsize=(6.2, 3.4))
for (name, row), style in zip(lengths.items(), ("-", "--"), strict=True):
    ax.loglog(fractions, row, "." + style, label=name)
ax.set(xlabel=r"$\gamma$ as a fraction of each factor's trace", ylabel="length of the step")
ax.legend()
plt.show()
growth = {name: row[0] / row[2] for name, row in lengths.items()}
print(
    {name: f"{ratio:.1f}" for name, ratio in growth.items()},
    "times longer at a tenth of the damping",
)
assert growth["another batch"] > 50 > 10 > growth["own batch"]

# %% [markdown]
# The own batch's step has a limit, as [(17.4)] shows: without damping it is
# $U_B (U_B^\top U_B)^{-1} C\, (U_A^\top U_A)^{-1} U_A^\top$ if the columns are independent. For
# another batch the step grows without bound as the damping falls, along directions in which the columns have no
# curvature. **SKFAC needs more damping than KFAC's average**, and still more if an inverse is
# kept for long.
#
# ## A window of batches
#
# Columns of several batches can be put side by side. With shares $w_t$ that sum to one,
#
# $$
# A = \sum_t w_t A_t = U U^\top , \qquad
# U = \bigl[ \sqrt{w_1}\, U_1 , \; \sqrt{w_2}\, U_2 , \; \dots \bigr] .
# \tag{17.7}
# $$
#
# With the shares of a moving average this *is* KFAC's moving average of the factor, as long as no batch is dropped,
# and the factor is never formed. `Window` is an estimator that keeps the last few batches. The shares of dropped
# batches are left out, and the rest is scaled so that its sum is one.

# %% tags=["remove-input"]
code(Window.update)

# %%
stream = [
    layer_ios(trained, loss, images[k : k + 8], labels[k : k + 8], empirical)["2"]
    for k in range(1000, 1048, 8)
]
window, average = None, None
for t, io in enumerate(stream, start=1):
    weight = weight_of_newest(0.9, t)
    window, average = (
        Window(6).update(window, io, weight),
        MovingAverage(kfac).update(average, io, weight),
    )
G = sum(io.gradients().sum((0, 1)) for io in stream)
assert_exact(window.columns().UA @ window.columns().UA.T, average.A)
assert_exact(window.inverse(0.1) @ G, average.inverse(0.1) @ G)
assert_exact(factored_inverse(window.columns(), 0.1) @ G, factored_inverse(average, 0.1) @ G)

delta = 0.01 * (window.columns().trace() / G.numel()).item()
averaged_inverse = sum(kfac(io).inverse(delta) @ G for io in stream) / 6
print(
    f"average of inverses, error: {relative_error(averaged_inverse, average.inverse(delta) @ G):.2f}"
)
assert relative_error(averaged_inverse, average.inverse(delta) @ G) > 0.2

# %% [markdown]
# An average of inverses is another matrix, as the last line shows: each inverse is $1 / \delta$
# in all directions that its own batch does not have. An average of columns is meaningless: $\tfrac12 (U_1 + U_2)$
# adds columns of unrelated data, and the signs of a QR decomposition are
# arbitrary. The package refuses it.

# %%
state = skfac(stream[0])
try:
    MovingAverage(skfac).update(state, stream[1], 0.5)
    raise AssertionError
except TypeError as refused:
    print(fill(str(refused), 90))
wrong = KroneckerColumns((state.UA + skfac(stream[1]).UA) / 2, (state.UB + skfac(stream[1]).UB) / 2)
right = MovingAverage(kfac).update(kfac(stream[0]), stream[1], 0.5)
assert relative_error(wrong.UB @ wrong.UB.T, right.B) > 0.3

# %% [markdown]
# ## Training with it
#
# The paper's abstract reports that SKFAC performs comparably to KFAC on CIFAR-10 and ImageNet, and that it bridges
# the gap in time between first- and second-order methods. We can look at the first half, in a small way: we train
# the digits network for 40 steps of 32 data each, with KFAC's moving average, with SKFAC on the newest batch, and
# with a window of six. The learning rate is the same, the damping varies.

# %%
estimators = {
    "KFAC, moving average": (MovingAverage(kfac), factored_inverse),
    "SKFAC, newest batch": (Latest(skfac), factored_inverse),
    "SKFAC, window of 6": (Window(6), lambda M, d: factored_inverse(M.columns(), d)),
}


def run(estimator, inverse, damping: float) -> tuple[float, Sequential]:
    torch.manual_seed(1)
    model, states = network(), {}
    weights, draws = dict(model.named_parameters()), torch.Generator(images.device).manual_seed(0)
    for t in range(1, 41):
        batch = torch.randint(1000, (32,), generator=draws)
        X, y = images[batch], labels[batch]
        for name, io in layer_ios(model, loss, X, y, monte_carlo(1, draws)).items():
            states[name] = estimator.update(states.get(name), io, weight_of_newest(0.95, t))
        G = torch.autograd.grad(loss(model(X), y), list(weights.values()))
        inverses = {name: inverse(M, damping) for name, M in states.items()}
        step = preconditioner(model, inverses)(dict(zip(weights, G, strict=True)))
        with torch.no_grad():
            for name, W in weights.items():
                W -= 0.1 * step[name]
    return loss(model(images[:1000]), labels[:1000]).item(), model


dampings = [1e-3, 1e-2, 3e-2, 1e-1, 3e-1]
results = {name: [run(*how, d)[0] for d in dampings] for name, how in estimators.items()}
for name, row in results.items():
    print(f"{name:21}", " ".join(f"{value:8.2f}" for value in row))
best = {name: min(row) for name, row in results.items()}
assert results["SKFAC, newest batch"][0] > 5 * max(best.values())
assert max(best.values()) < 0.5 < 1 < loss(network()(images), labels).item()

same = [run(Latest(f), g, 0.1)[1] for f, g in ((kfac, factored_inverse), (skfac, factored_inverse))]
for W, V in zip(*(model.parameters() for model in same), strict=True):
    assert_exact(V, W)  # one batch each: the same network after 40 steps

# %% tags=["hide-input"] alt="Log-log plot of the loss after 40 steps against the damping for three methods. At large damping the three curves almost coincide. At small damping all rise, SKFAC on the newest batch most and KFAC with a moving average least, with the window in between." caption="Loss on 1000 digits after 40 steps. With enough damping, one batch does nearly as well as the average of many. With less, it does not."
fig, ax = plt.subplots(figsize=(6.2, 3.4))
for (name, row), style in zip(results.items(), ("-", "--", "-."), strict=True):
    ax.loglog(dampings, row, "o" + style, markersize=4, label=name)
ax.set(xlabel=r"damping $\delta$", ylabel="loss after 40 steps")
ax.legend()
plt.show()

# %% [markdown]
# With the best damping of each, all three train the network. That agrees with "comparable", under a condition that
# the plot shows. Where the damping is large, the step depends little on the factors, and the three nearly coincide.
# Where it is small, the single batch fails first. (A new inverse in every step, as here, favours the single batch:
# see [what one batch does not know](#what-one-batch-does-not-know).) The window lies between, but its small systems
# have six times as many unknowns. The plot is not about time. By the last lines of the cell, KFAC and SKFAC from one
# batch each train *the same network*. So all differences in the plot come from the averages over batches, none from
# the form of the inverse.
#
# ## What goes wrong in practice
#
# Three cases are about what the authors' code takes for granted. It is an example for one network, a ResNet-50 with
# batches of 32 images, for which its
# [README](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/README.md?plain=1#L157)
# states a top-1 accuracy of 75.95 % on ImageNet after 49 epochs. Nothing below says that this number is wrong.
#
# **The bias left out.** The code inverts the factor of the inputs without the column of ones ([`skfac_layer.py`,
# line
# 349](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/skfac_layer.py#L349)).
# Its own network has no biases in these layers ([`resnet_skfac.py`, line
# 137](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/resnet_skfac.py#L137)),
# so nothing is lost there. In a network with biases, these would be updated by the plain gradient, at a scale that
# has nothing to do with that of the weights' step. The step of the weights would also change, since weights and bias
# interact in $A$. The next cell measures this change, too.
#
# **One damping for both sides.** $\sqrt\delta$ on both factors is not invariant. If a factor of ten is moved from the
# inputs to the vectors, which leaves $B \otimes A$ unchanged, the step changes:

# %%
io = ios["2"]
M, G = skfac(io), io.gradients().sum((0, 1))
moved = KroneckerColumns(M.UA / 10, M.UB * 10)
root = 0.1**0.5
without_pi = [m.inverse_of_damped_factors(root, root) @ G for m in (M, moved)]
print(f"without pi, change of the step: {relative_error(without_pi[1], without_pi[0]):.2f}")
assert relative_error(without_pi[1], without_pi[0]) > 0.1
assert_exact(factored_inverse(moved, 0.1) @ G, factored_inverse(M, 0.1) @ G)

weights_only = skfac(LayerIO(io.a[..., :-1], io.g))
with_bias, without = (
    factored_inverse(M, 0.01) @ G,
    factored_inverse(weights_only, 0.01) @ G[:, :-1],
)
print(
    f"without the bias, change of the weights' step: {relative_error(without, with_bias[:, :-1]):.2f}"
)
assert relative_error(without, with_bias[:, :-1]) > 1e-3

# %% [markdown]
# **A batch size written into the code.** The code divides by 32 ([`skfac_layer.py`, line
# 155](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/skfac_layer.py#L155)).
# That is the batch size of its configuration ([`config.py`, line
# 23](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/src/config.py#L23)).
# With another one, the scale of the curvature is off by the ratio, and with it the meaning of the damping.
#
# **A damping below round-off.** $U^\top U + \gamma I$ is decomposed in the precision of $U$. Data that occur
# twice make $U^\top U$ singular, and a $\gamma$ below a millionth of its entries disappears in single
# precision. The package refuses what it cannot decompose. The exact inverse is a way out, since it decomposes the
# columns themselves and not their inner products:

# %%
four_times = torch.full((3, 4), 1000.0).float()  # four data, all the same
try:
    KroneckerColumns(four_times, four_times).inverse_of_damped_factors(1e-6, 1e-6)
    raise AssertionError
except ValueError as refused:
    print(fill(str(refused), 90))
exact = KroneckerColumns(four_times.double(), four_times.double()).inverse(1e-6)
single = KroneckerColumns(four_times, four_times).inverse(1e-6)
G = torch.randn(3, 3)
assert relative_error((single @ G.float()).double(), exact @ G) < 1e-3

# %% [markdown]
# ## The paper and this package
#
# What is in [Tang et al. (2021)](bibliography.md#skfac), as far as its abstract and [its authors'
# code](https://github.com/fL0n9/SKFAC-MindSpore/tree/aca020fc5dfe3fddff7c0928f4ad2fe414653666) tell, and what is
# here.
#
# | | the paper | here |
# | --- | --- | --- |
# | fully connected layers | a small matrix, inverted in place of the factor | the same, `skfac` |
# | form | the code: explicit inverses of the factors' size | applied, never formed; pushed through for the batch's own gradient |
# | convolutions | spatial subsampling, and reduce sum; the code averages inputs and vectors | `spatial_subsampling`, `reduce_sum`; `mean_over_positions` for the code |
# | receptive fields | the abstract names them as something to reduce over: not checked | nothing |
# | Fisher | the code: the gradients of the loss for the data's labels | any; in the optimizer, one drawn label for each sample |
# | bias | the code: not in the factor, and none in its network | a column like any other |
# | damping | the code: $\sqrt\lambda$ on both factors; $\lambda = .03$ at first, [times .87 in ten epochs](https://github.com/fL0n9/SKFAC-MindSpore/blob/aca020fc5dfe3fddff7c0928f4ad2fe414653666/train.py#L57) | `factored_inverse`, balanced by $\pi$; the exact one, too |
# | average over batches | the code: none | `Window`, or `Latest` for none |
# | schedule | the code: a new batch every 834 iterations, batches of 32, momentum .9 | the optimizer's, [Chapter 11](11_averages.py) |
# | headline | performance comparable to KFAC's on CIFAR-10 and ImageNet, and a wall-clock time that bridges the gap to first-order methods | [Chapter 23](23_comparison.py) trains it beside its controls, among them first-order methods, in steps and in seconds; networks of the size of the paper's are out of reach here |
#
# ## In one minute
#
# - **Identity.** SKFAC keeps the columns of the factors and inverts their inner products ([Theorem 17.1]). For one
#   batch its step is KFAC's.
# - **Cost.** The number of columns is $V N S$ for the vectors and $N S$ for the inputs. SKFAC saves where both are
#   smaller than the width.
# - **Own gradient.** For the batch's own gradient, [(17.4)] needs no division by the damping and survives single
#   precision.
# - **Convolutions.** Reduce Sum is KFAC-reduce; Spatial Subsampling keeps a grid of positions.
# - **Damping.** One batch has no curvature outside of its span, so that SKFAC needs more damping. A window of
#   batches is between it and KFAC's average.
#
# ## Exercises
#
# **Exercise 17.1.** Let the columns of $U$ be independent. What does $\gamma\, (U U^\top + \gamma I)^{-1}$ become for
# $\gamma \to 0$? What is $U^\top (U U^\top + \gamma I)^{-1} U$ then?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $I - U (U^\top U)^{-1} U^\top$, by the second line of [(17.1)]: the projection onto all that is
# orthogonal to the columns. By the first line, the other is
# $U^\top U (U^\top U + \gamma I)^{-1} \to I$: in the inner product of the inverse, different columns are orthogonal
# and each has length one.
#
# </details>
#
# **Exercise 17.2.** For cross-entropy with the mean over $N$ labels, `type2_classwise` sends for class $v$
# the score $s_v = \sqrt{p_v / N}\, (e_v - p)$ at the output, with the predicted probabilities $p$. Which $c$ gives the
# gradient of a datum with label $y$? What goes wrong when the network is sure of another class?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The gradient is $(p - e_y) / N = -s_y / \sqrt{N p_y}$, so $c_y = -1 / \sqrt{N p_y}$ and all others are
# zero. Gradients of deeper layers are linear in those of the output, so the same $c$ holds in every
# layer. If $p_y$ is tiny, $s_y$ is tiny too: in low precision it underflows while the gradient does
# not.
#
# </details>
#
# **Exercise 17.3.** A square layer of width $d$, batches of $N$ rows, $V = S = 1$. From how many batches on does a
# window hold more numbers than KFAC's two factors? What is the rank of a moving average after $t$ steps?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# A batch has $2 d N$ numbers, the factors $2 d^2$, so from $d / N$ batches on, just when the
# columns can span everything. A moving average has rank $\min(t N, d)$ at most. Its rank grows with
# every batch, although old batches have small weights: the rank alone does not measure the information.
#
# </details>
#
# **Exercise 17.4.** Write SKFAC's step yourself: from the columns $U_A$ and $U_B$, a gradient $G$ and a damping
# $\gamma$ of both factors to $(B + \gamma I)^{-1} G (A + \gamma I)^{-1}$, without forming $A$, $B$ or an inverse of
# their size. Compare it with `KroneckerColumns(UA, UB).inverse_of_damped_factors(gamma, gamma) @ G`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def solution(UA, UB, G, gamma):
#     def solve(U, M):
#         small = U.T @ U + gamma * torch.eye(U.shape[1])
#         return (M - U @ torch.linalg.solve(small, U.T @ M)) / gamma
#
#     return solve(UA, solve(UB, G).T).T
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(UA: Tensor, UB: Tensor, G: Tensor, gamma: float) -> Tensor:  # 17.4
    def solve(U: Tensor, M: Tensor) -> Tensor:
        small = U.T @ U + gamma * torch.eye(U.shape[1])
        return (M - U @ torch.linalg.solve(small, U.T @ M)) / gamma

    return solve(UA, solve(UB, G).T).T


M, G = skfac(ios["2"]), torch.randn(100, 101)
assert_exact(solution(M.UA, M.UB, G, 0.1), M.inverse_of_damped_factors(0.1, 0.1) @ G)

U = torch.randn(7, 3)  # 17.1
small = torch.linalg.inv(U @ U.T + 1e-9 * torch.eye(7))
P = torch.eye(7) - U @ torch.linalg.inv(U.T @ U) @ U.T
torch.testing.assert_close(1e-9 * small, P, atol=1e-6, rtol=0)
torch.testing.assert_close(P @ P, P)
middle = U.T @ torch.linalg.inv(U @ U.T + 1e-6 * torch.eye(7)) @ U
torch.testing.assert_close(middle, torch.eye(3), atol=1e-4, rtol=0)

f = net(X).detach().requires_grad_()  # 17.2
(head,) = torch.autograd.grad(loss(f, y), f)
p = f.softmax(1)[torch.arange(32), y]
own_class = type2_classwise(loss, f, y)[y, torch.arange(32)]
assert_exact(own_class * (-1 / (32 * p).sqrt()).unsqueeze(1), head)

average = None  # 17.3
for t in range(1, 6):
    io = LayerIO(torch.randn(3, 1, 12), torch.randn(1, 3, 1, 12))
    average = MovingAverage(kfac).update(average, io, weight_of_newest(0.9, t))
    assert torch.linalg.matrix_rank(average.A) == min(3 * t, 12)
held = sum(Window(4).update(None, io, 1.0).columns().UA.numel() * 2 for _ in range(4))
assert held == 2 * 12**2
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Tang et al. (2021)](bibliography.md#skfac) for SKFAC. What comes after a window is to keep only the
# most important directions of all batches so far, as [Puiu (2022)](bibliography.md#brand) does, or to
# draw them at random ([Puiu 2022](bibliography.md#randomized)). [CG-FAC](21_cg_fac.py) uses the same rows
# to solve with the *exact* block.
