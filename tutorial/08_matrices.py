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
# # 8. Matrices: working with Kronecker factors
#
# **Part III: KFAC.** Which operations on $B \otimes A$ with a damping need only the factors, and never the big matrix?
#
# The curvature of a layer with $d_\text{out} d_\text{in}$ parameters is a matrix with
# $(d_\text{out} d_\text{in})^2$ entries, and KFAC replaces it by two factors that together have
# $d_\text{out}^2 + d_\text{in}^2$. With the eigenvalues $\alpha_i$, $\beta_o$ and the eigenvectors $Q_A$, $Q_B$ of the
# factors, the damped inverse acts on a matrix $V$ of the layer's shape as
#
# $$
# (B \otimes A + \delta I)^{-1} \operatorname{vec}(V)
# = \operatorname{vec}\bigl( Q_B\, \widetilde V Q_A^\top \bigr),
# \qquad
# \widetilde V_{oi} = \frac{(Q_B^\top V Q_A)_{oi}}{\beta_o \alpha_i + \delta} .
# $$

# %% tags=["hide-input"]
import textwrap
import time

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn

from kfac_scratch import curvature
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, largest_error, set_up
from kfac_scratch.linalg import psd_eigh, scale_in_basis, vec
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker, KroneckerEigen
from kfac_scratch.matrices.kronecker_sum import KroneckerSum
from kfac_scratch.matrices.matrix import Matrix
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import code, matrices, source

set_up()  # seed 0, float64, the GPU where there is one

eigvalsh, inv, kron = torch.linalg.eigvalsh, torch.linalg.inv, torch.kron
EXACT = 1e-10  # what we call equal in float64


def spd(size: int, floor: float = 0.1) -> Tensor:
    """A symmetric positive definite matrix."""
    M = torch.randn(size, size)
    return M @ M.T / size + floor * torch.eye(size)


# %% tags=["hide-input"] alt="Left: a heat map of the base-ten logarithm of all products of eigenvalues of a 12 by 20 layer, falling from one corner to the opposite one. Right: on log axes, the factor by which each direction is scaled against its eigenvalue: a straight line falling with slope minus one without damping, flattening out to the left of the damping for two damped inverses." caption="Left: logarithms of all eigenvalues of the product, one for each pair of eigenvalues of the factors. Right: the number with which the inverse multiplies each direction. With damping $\\delta$ it is at most $1 / \\delta$."
spread = Kronecker(torch.logspace(0, -4, 20).diag(), torch.logspace(0, -3, 12).diag())
table = spread.eigen().scale.flip((0, 1))
eigenvalues = spread.eigenvalues().cpu().numpy()

fig, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
image = left.imshow(table.log10().cpu().numpy(), cmap="viridis")
left.set(xlabel="eigenvalue of $A$", ylabel="eigenvalue of $B$", xticks=[], yticks=[])
fig.colorbar(image, ax=left, shrink=0.8, label=r"$\log_{10} \beta\alpha$")
for delta, style in ((0.0, ":"), (1e-4, "--"), (1e-2, "-")):
    label = rf"$\delta = {delta:g}$"
    right.loglog(eigenvalues, 1 / (eigenvalues + delta), style, label=label)
right.set(xlabel=r"eigenvalue $\beta\alpha$", ylabel=r"$1 / (\beta\alpha + \delta)$")
right.legend()
plt.show()

# %% [markdown]
# After this chapter you can
#
# - multiply with $B \otimes A$, invert it with damping, and take its root, determinant and trace from the factors
#   alone;
# - say when the damped matrix is a Kronecker product, and prove when it is not;
# - precondition the gradients of a whole network, and say what that costs;
# - tell how many digits survive in float32, and which mistakes keep all eigenvalues.
#
# ## What a matrix has to do
#
# The rest of the package uses few properties of a curvature matrix $M$. It is symmetric and positive semi-definite, it
# acts on $\operatorname{vec}(V)$ for a matrix $V$ of the shape of the layer's weight, and we write its action on the
# matrix: `M @ V` has the shape of `V` and satisfies
#
# $$
# \operatorname{vec}(\mathtt{M\,@\,V}) = M \operatorname{vec}(V) .
# \tag{8.1}
# $$
#
# Its damped inverse undoes the damped product, for every $V$ and every damping $\delta$ for which
# the inverse exists:
#
# $$
# \mathtt{M.inverse}(\delta)\;\mathtt{@}\;(\mathtt{M\,@\,V} + \delta V) = V .
# \tag{8.2}
# $$
#
# This equation contains two decisions. Damping is an argument of the inverse and not a property of the matrix, so it
# cannot be stored by accident and added twice. And the inverse is a map that acts on $V$, not an array: it may be a
# Kronecker product, an eigendecomposition or an iteration.

# %% tags=["beside", "remove-input"]
source(Matrix)

# %% [markdown]
# One function can check both equations for all kinds of matrices. It compares each matrix with its *dense twin*,
# `M.dense()`, which is too large for a real layer. (`EXACT` is $10^{-10}$, and `spd` makes a random symmetric positive
# definite matrix.)


# %%
def obeys_laws(M: Matrix, shape: tuple[int, int], damping: float = 0.1) -> bool:
    dense, V = M.dense(), torch.randn(7, *shape)  # seven at a time
    product = vec(V) @ dense.T
    undone = M.inverse(damping) @ (M @ V + damping * V)
    return largest_error(vec(M @ V), product) <= EXACT and largest_error(undone, V) <= EXACT


d_out, d_in = 3, 5
A, B = spd(d_in), spd(d_out)
M = Kronecker(A, B)
assert obeys_laws(M, (d_out, d_in))
print(f"entries of the factors: {A.numel() + B.numel()}, of the matrix: {M.dense().numel()}")

# %% [markdown]
# (The arguments are in alphabetical order, `Kronecker(A, B)`; the product is $B \otimes A$, with
# the factor of the outputs first, as in [Chapter 1](01_flattening.py).)
#
# ## What can be read off
#
# **The product** with a vector is the vec trick, [(1.6)]: $B V A^\top$, and $A^\top = A$ here.
# **The diagonal**: entry $(o, i)$, $(o, i)$ of $B \otimes A$ is $B_{oo} A_{ii}$ by [(1.4)]. **The
# trace** is the sum of these, and the double sum is a product of two sums:
#
# $$
# \operatorname{tr}(B \otimes A) = \sum_{o, i} B_{oo} A_{ii}
# = \Bigl( \sum_o B_{oo} \Bigr) \Bigl( \sum_i A_{ii} \Bigr)
# = \operatorname{tr}(B) \operatorname{tr}(A) .
# \tag{8.3}
# $$

# %%
dense = kron(B, A)
assert_exact(M.diagonal(), dense.diagonal())
assert_exact(M.trace(), dense.trace())

# %% [markdown]
# ## Eigenvalues, eigenvectors, and every function of them
#
# Let $A q = \alpha q$ and $B r = \beta r$. By the mixed product, [(1.9)],
#
# $$
# (B \otimes A)(r \otimes q) = (B r) \otimes (A q) = \beta \alpha\, (r \otimes q) .
# \tag{8.4}
# $$
#
# So every pair of eigenvectors gives an eigenvector, and every *product* of eigenvalues an eigenvalue. There are
# $d_\text{out} d_\text{in}$ pairs. If the $q$ are orthonormal and the $r$ are, then so are the $r \otimes q$, as
# $(r \otimes q)^\top (r' \otimes q') = (r^\top r')(q^\top q')$. They are a basis, so there are no further eigenvalues.
#
# Collect eigenvectors as the columns of $Q_A$ and $Q_B$. By [(1.5)], the eigenvector
# $r \otimes q$ is the matrix $r q^\top$ with its rows lined up; so the coefficient of $V$ along
# it is $r^\top V q$, and all coefficients together are the matrix $Q_B^\top V Q_A$. The
# eigenvalues form a matrix of the same shape, $\Lambda_{oi} = \beta_o \alpha_i$. Multiplying with
# $B \otimes A$ means: go to the eigenbasis, scale every entry, go back,
#
# $$
# (B \otimes A) \operatorname{vec}(V)
# = \operatorname{vec}\Bigl( Q_B \bigl( \Lambda \odot (Q_B^\top V Q_A) \bigr) Q_A^\top \Bigr),
# \qquad \Lambda = \beta \alpha^\top .
# \tag{8.5}
# $$
#
# For a product alone, $B V A$ is cheaper. The eigenbasis is useful because a function of a symmetric matrix acts on its
# eigenvalues: replace $\Lambda$ by $1 / (\Lambda + \delta)$, $\sqrt{\Lambda}$ or whatever is needed, entry by entry,
# and keep the rest.

# %%
(alpha, QA), (beta, QB) = psd_eigh(A), psd_eigh(B)

products = []
for b in beta:
    for a in alpha:
        products.append(b * a)
assert_exact(torch.stack(products).sort().values, eigvalsh(dense))
assert_exact(M.eigenvalues(), eigvalsh(dense))

V, Lambda = torch.randn(d_out, d_in), torch.outer(beta, alpha)
assert_exact(QB @ (Lambda * (QB.T @ V @ QA)) @ QA.T, M @ V)

# %% [markdown]
# ### In the package
#
# `KroneckerEigen` stores $Q_A$, $Q_B$ and the scales. Its inverse, its square roots and its product are
# one line each, and `Kronecker` gets them by decomposing its factors: two small
# eigendecompositions instead of a large one. The matrix of scales need not have the form
# $\Lambda = \beta \alpha^\top$, of rank one: EKFAC will use others ([Chapter 14](14_ekfac.py)).

# %% tags=["beside", "remove-input"]
code(
    Kronecker.eigen,
    KroneckerEigen.__matmul__,
    KroneckerEigen.inverse,
    KroneckerEigen.inverse_sqrt,
    scale_in_basis,
)

# %%
eigen = M.eigen()
assert_exact(eigen.dense(), dense)
assert_exact(eigen.diagonal(), dense.diagonal())
assert_exact(M.inverse(0.1).dense(), inv(dense + 0.1 * torch.eye(len(dense))))
assert_exact(M.sqrt().dense() @ M.sqrt().dense(), dense)

arbitrary = KroneckerEigen(QA, QB, torch.rand(d_out, d_in))  # scales of full rank
assert obeys_laws(arbitrary, (d_out, d_in))

# %% [markdown]
# ## Determinants
#
# The determinant is the product of the eigenvalues. Its logarithm, which a Laplace approximation
# needs, is
#
# $$
# \log\det(B \otimes A)
# = \sum_{o, i} \log (\beta_o \alpha_i)
# = \sum_{o, i} (\log \beta_o + \log \alpha_i)
# = d_\text{in} \log\det B + d_\text{out} \log\det A .
# \tag{8.6}
# $$
#
# The term $\log \beta_o$ does not depend on $i$ and is counted $d_\text{in}$ times, so the exponent of $\det B$
# is the size of the *other* factor. With damping, the logarithm of $\beta_o \alpha_i + \delta$
# does not split, and the eigenvalues are needed,
#
# $$
# \log\det(B \otimes A + \delta I) = \sum_{o, i} \log(\beta_o \alpha_i + \delta) .
# \tag{8.7}
# $$

# %%
by_factors = d_in * B.logdet() + d_out * A.logdet()
assert_exact(by_factors, dense.logdet())
assert_exact(M.logdet(), dense.logdet())
assert (
    largest_error(d_out * B.logdet() + d_in * A.logdet(), dense.logdet()) > 0.01
)  # exponents swapped

damped = dense + 0.1 * torch.eye(len(dense))
assert_exact(M.logdet(0.1), damped.logdet())

# %% [markdown]
# Why logarithms? Already for a small layer the determinant can lie below the smallest number of float64:

# %%
large = Kronecker(spd(90) / 10, spd(70) / 10)
print(f"determinant: {large.eigenvalues().prod().item()}, logarithm: {large.logdet().item():.1f}")
assert large.eigenvalues().prod() == 0
assert_exact(large.logdet(), 90 * large.B.logdet() + 70 * large.A.logdet())

# %% [markdown]
# ## The inverse with damping
#
# Without damping the inverse is a Kronecker product again, $B^{-1} \otimes A^{-1}$ by [(1.10)]. Curvature from a few
# data is singular or nearly so, hence damping is the normal case, and the damped matrix is in general no Kronecker
# product:
#
# <div class="admonition theorem" markdown="1" id="thm-8.1">
# <p class="admonition-title" markdown="1"><b>Theorem 8.1 (damping leaves the Kronecker products)</b></p>
#
# Let $A$ and $B$ be symmetric positive semi-definite and $\delta \gt 0$. Then
# $B \otimes A + \delta I$ and its inverse are Kronecker products if and only if $A$ or $B$ is a multiple
# of the identity.
#
# </div>
#
# **Proof.** If $A = c I$, then $B \otimes A + \delta I = (cB + \delta I) \otimes I$, and likewise for $B$. Now the
# other direction. A matrix is a Kronecker product only if all of its $d_\text{in} \times d_\text{in}$
# blocks are multiples of one matrix: that is what [(1.3)] says. Multiplying with
# $Q_B^\top \otimes I$ from the left and $Q_B \otimes I$ from the right turns Kronecker products
# into Kronecker products (mixed product), and $B \otimes A + \delta I$ into a block-diagonal
# matrix with the blocks $\beta_o A + \delta I$. These would have to be multiples of one matrix.
# None of them is zero, so for every $o$ and $p$ there is a number $c$ with
# $\beta_o A + \delta I = c\,(\beta_p A + \delta I)$, that is,
# $(\beta_o - c \beta_p) A = (c - 1) \delta I$. Either $A$ is a multiple of the identity, or both
# sides vanish. Then $c = 1$, hence $(\beta_o - \beta_p) A = 0$ and $\beta_o = \beta_p$ (as
# $A = 0$ would be a multiple of the identity). All eigenvalues of $B$ are equal, and $B$ is a
# multiple of the identity. Finally, if the inverse were a product $Y \otimes X$, then so would be
# its inverse $Y^{-1} \otimes X^{-1}$, the damped matrix. $\blacksquare$
#
# This can be checked numerically. Rearrange $M$ such that every block becomes a row; call the result $R$.
# $M$ is a Kronecker product if and only if all rows of $R$ are multiples of one row, that is, if $R$ has rank one. In
# general the rank of $R$ is the smallest number of Kronecker products that add up to $M$.


# %%
def rearranged(M: Tensor) -> Tensor:
    """One row for each block of `M`: rank one for a Kronecker product."""
    return M.reshape(d_out, d_in, d_out, d_in).permute(0, 2, 1, 3).reshape(d_out**2, d_in**2)


white = kron(B, 2 * torch.eye(d_in)) + 0.1 * torch.eye(d_out * d_in)  # A = 2 I
cases = {"B ⊗ A": dense, "damped": damped, "its inverse": inv(damped), "B ⊗ 2I, damped": white}
ranks = {name: torch.linalg.matrix_rank(rearranged(K)).item() for name, K in cases.items()}
print("number of Kronecker products:", ranks)
assert ranks["B ⊗ A"] == 1
assert ranks["damped"] == 2
assert ranks["its inverse"] > 2
assert ranks["B ⊗ 2I, damped"] == 1

# %% [markdown]
# The damped matrix is a sum of two products, $B \otimes A + \delta\, I \otimes I$. Its inverse is a sum of several
# products, here of three. The eigenbasis needs no such sum. Adding $\delta I$ adds $\delta$ to every eigenvalue and
# keeps the eigenvectors, so [(8.5)] with $1 / (\beta_o \alpha_i + \delta)$ *is* the inverse. It is exact, and costs two
# small eigendecompositions and, for each $V$, products with four small matrices.
#
# What does damping change? Each coefficient of the gradient in the eigenbasis is divided by its
# curvature plus $\delta$. Where the curvature is far above $\delta$ this is a Newton step, and
# where it is far below it is a gradient step with learning rate $1 / \delta$. So along flat directions, where the
# estimated curvature is least reliable, the step is limited ([Figure 8.1]).

# %% [markdown]
# ### A preview: factored damping
#
# Many implementations damp the factors instead, $(B + \sqrt\delta I) \otimes (A + \sqrt\delta I)$, because then the
# inverse stays a Kronecker product and each factor can be inverted by itself. By [(1.11)] the damped matrix then has an
# extra term, $\sqrt\delta (B \otimes I + I \otimes A)$. The extra term is positive semi-definite, so in every direction
# the factored inverse is at most the exact one: factored damping is stronger than $\delta$.

# %%
delta = 0.1
factored = Kronecker(A + delta**0.5 * torch.eye(d_in), B + delta**0.5 * torch.eye(d_out))
exact = M.inverse(delta).dense()
approximate = factored.inverse(0.0).dense()
print(f"relative difference: {largest_error(approximate, exact):.2f}")
assert largest_error(approximate, exact) > 0.1
assert eigvalsh(exact - approximate).min() > -EXACT  # the difference is positive semi-definite

# %% [markdown]
# [Chapter 9](09_damping.py) says how to share $\delta$ between the factors, and what the extra damping does.
#
# ## Square roots, and samples
#
# A Laplace approximation and its relatives need samples $x$ of a normal distribution with
# covariance $(M + \delta I)^{-1}$. If $R R^\top = (M + \delta I)^{-1}$ and $\varepsilon$ is
# standard normal, then
#
# $$
# x = R \varepsilon, \qquad
# \operatorname{Cov}(x) = \mathbb{E}[R \varepsilon \varepsilon^\top R^\top] = R R^\top
# = (M + \delta I)^{-1} .
# \tag{8.8}
# $$
#
# (From here to the end of this section $R$ is a root, not the rearranged matrix.) In the eigenbasis a root is again a
# change of scales, $1 / \sqrt{\beta_o \alpha_i + \delta}$. The package's `inverse_sqrt` is the symmetric one. Any root
# will do: $R$ times an orthogonal matrix has the same $R R^\top$. For $\delta = 0$, $R = B^{-1/2} \otimes A^{-1/2}$ and
# the sample is the matrix $B^{-1/2} E A^{-1/2}$ with standard normal $E$: the *matrix normal* distribution, with
# covariance $B^{-1}$ between rows and $A^{-1}$ between columns.
#
# A check of the covariance needs no random number. Send all unit vectors through $R$, which
# gives its columns, and multiply:

# %%
unit = torch.eye(d_out * d_in).reshape(-1, d_out, d_in)
R = vec(M.inverse_sqrt(delta) @ unit).T  # columns: images of unit vectors
assert_exact(R @ R.T, inv(damped))

E = torch.randn(d_out, d_in)  # without damping: the matrix normal
roots = Kronecker(inv(Dense(A).sqrt().M), inv(Dense(B).sqrt().M))
assert_exact(M.inverse_sqrt(0.0) @ E, roots.B @ E @ roots.A)

# %% [markdown]
# One statistical test is left: that samples are made from noise as in [(8.8)]. For a unit vector $u$,
# the square of $u^\top x$ has the mean $u^\top \operatorname{Cov}(x)\, u$ and, relative to that,
# the variance 2 (that of a squared standard normal). The average over $K$ samples therefore has
# the relative standard error $\sqrt{2 / K}$. We allow a deviation of five standard errors, in each coordinate
# direction:

# %%
K = 20_000
samples = vec(M.inverse_sqrt(delta) @ torch.randn(K, d_out, d_in))  # [K, D]
ratio = samples.square().mean(0) / inv(damped).diagonal()
deviations = (ratio - 1) / (2 / K) ** 0.5  # in standard errors
print(f"largest deviation: {deviations.abs().max().item():.1f} standard errors")
assert deviations.abs().max() < 5

twice = ((2 * ratio - 1) / (2 / K) ** 0.5).abs().min()
assert twice > 5  # a covariance wrong by a factor of two is noticed

# %% [markdown]
# ## Other matrices under the same laws
#
# `Diagonal` stores one number per parameter, the least of all kinds, and `Dense` the whole matrix. Both obey the laws,
# and a method that uses no more than the laws runs with all kinds.

# %%
S = spd(d_out * d_in)
second = Kronecker(spd(d_in), spd(d_out))
zoo = {
    "Dense": Dense(S),
    "Diagonal": Diagonal(torch.rand(d_out, d_in)),
    "Kronecker": M,
    "KroneckerEigen": arbitrary,
    "KroneckerSum": KroneckerSum(M, second),
}
for name, matrix in zoo.items():
    assert obeys_laws(matrix, (d_out, d_in)), name
    assert_exact(matrix.trace(), matrix.dense().trace())
    assert_exact(matrix.diagonal(), matrix.dense().diagonal())
    print(f"{name:>14}: inverse is a {type(matrix.inverse(0.1)).__name__}")

# %% [markdown]
# The last line is different. Two Kronecker products have different eigenvectors in general, so that the eigenbasis of
# neither inverts their sum. [Chapter 16](16_kpsvd.py#a-sum-of-two-products-and-its-inverse) needs such sums, and
# derives their inverse.
#
# ## A step for a whole network
#
# An optimizer has a dictionary of gradients, one for each parameter; curvature comes in blocks, one for each layer.
# `preconditioner` translates: it arranges weight and bias gradients as the block's matrix,
# $[\text{weight} \mid \text{bias}]$, applies the block's map, and takes the result apart again.

# %% tags=["remove-input"]
code(preconditioner)

# %% [markdown]
# Here is one step on a real, small problem: three cultivars of wine, told apart by thirteen
# chemical measurements, by a network with one hidden layer. The dense twin puts the same
# Kronecker products on the diagonal of one large matrix, adds $\delta I$, and solves.

# %%
wine = load_wine()
X, y = torch.tensor(wine.data, dtype=torch.float64), torch.tensor(wine.target)
X, y = X.to(torch.get_default_device()), y.to(torch.get_default_device())
X = (X - X.mean(0)) / X.std(0)
model = nn.Sequential(nn.Linear(13, 8), nn.Tanh(), nn.Linear(8, 3))
loss, delta = nn.CrossEntropyLoss(), 0.1

before = loss(model(X), y)
names = [name for name, _ in model.named_parameters()]
gradients = dict(zip(names, torch.autograd.grad(before, list(model.parameters())), strict=True))
factors = {name: kfac(io) for name, io in layer_ios(model, loss, X, y).items()}
inverses = {name: K.inverse(delta) for name, K in factors.items()}
step = preconditioner(model, inverses)(gradients)

index = curvature.block_index(model)
D = sum(p.numel() for p in model.parameters())
twin = torch.zeros(D, D)
for name, K in factors.items():
    place = index[name].flatten()
    twin[place[:, None], place] = K.dense()
flat = torch.cat([gradients[name].flatten() for name in names])
expected = torch.linalg.solve(twin + delta * torch.eye(D), flat)

actual = torch.cat([step[name].flatten() for name in names])
print(f"{D} parameters, difference of the two steps: {largest_error(actual, expected):.0e}")
assert_exact(actual, expected)

# %% tags=["hide-input"] alt="Heat map of the 139 by 139 dense twin in the order of the model's parameters. It has entries in the diagonal blocks of the two layers and nothing between the layers. In the second layer rows and columns of the bias are filled; in the first the bias has entries only with itself." caption="The dense twin of the whole network, in the order of `model.named_parameters()`: weight, bias, weight, bias."
matrices({"one Kronecker product per layer": twin}, scale=float(twin.abs().max()) / 5)

# %% [markdown]
# Layers are not coupled. Weights and bias of one layer are, with one exception: in the first layer
# the coupling is the last column of $A$, the mean of the inputs, and our inputs are standardised.

# %%
assert factors["0"].A[:-1, -1].abs().max() <= EXACT
assert factors["2"].A[:-1, -1].abs().max() > 0.01

# %% [markdown]
# ## What it costs
#
# Decomposing a matrix of size $d$ takes of the order of $d^3$ operations. For a layer with $d$ inputs and $d$ outputs,
# the factors have size $d$ and the block has size $d^2$: of the order of $d^3$ against $(d^2)^3 = d^6$. The next cell
# measures the seconds of an inverse and one product together, and fits straight lines to the four largest sizes:


# %%
def seconds(function, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def slope(sizes: list[int], times: list[float], last: int = 4) -> float:
    """Exponent of the growth: slope of a straight line through the last points of a log-log plot."""
    x, y = (torch.tensor(v, device="cpu").log()[-last:] for v in (sizes, times))
    return ((x - x.mean()) @ (y - y.mean()) / (x - x.mean()).square().sum()).item()


threads = torch.get_num_threads()
torch.set_num_threads(1)  # cleaner timings
timings = {"dense": ([], []), "Kronecker": ([], [])}
for kind, sizes in (
    ("dense", [4, 8, 12, 16, 20, 26, 32]),
    ("Kronecker", [4, 8, 16, 32, 64, 128]),
):
    for d in sizes:
        K = Kronecker(*(spd(d).cpu() for _ in range(2)))
        K, V = Dense(K.dense()) if kind == "dense" else K, torch.randn(d, d, device="cpu")
        timings[kind][0].append(d)
        timings[kind][1].append(seconds(lambda K=K, V=V: K.inverse(0.1) @ V))
torch.set_num_threads(threads)

slopes = {kind: slope([float(d) for d in sizes], times) for kind, (sizes, times) in timings.items()}
print("measured exponents:", {kind: round(value, 1) for kind, value in slopes.items()})
at_32 = {kind: times[sizes.index(32)] for kind, (sizes, times) in timings.items()}
print(f"at d = 32, dense takes {at_32['dense'] / at_32['Kronecker']:.0f} times as long,", end=" ")
print(f"with {32**4 / (2 * 32**2):.0f} times as many numbers")

# %% tags=["hide-input"] alt="Log-log plot of seconds for a damped inverse and one product against the size of the layer. The dense curve climbs steeply and ends at size 32. The Kronecker curve climbs slowly and lies far below it at size 32." caption="Damped inverse and one product, on one CPU core of the machine that built this page. In the legend: the fitted exponents."
fig, ax = plt.subplots(figsize=(6, 3.2))
for (kind, (sizes, times)), marker in zip(timings.items(), "os", strict=True):
    ax.loglog(sizes, times, f"{marker}-", label=rf"{kind}: $d^{{{slopes[kind]:.1f}}}$")
ax.set(xlabel="inputs = outputs $d$", ylabel="seconds")
ticks = [4, 8, 16, 32, 64, 128]
ax.set_xticks(ticks, labels=ticks)
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# Do not expect exactly three and six: for small matrices, and all factors here are small, most of the time is overhead.
# What matters is the gap between the curves.
#
# ## How many digits survive
#
# A number in float32 has a relative precision of $\varepsilon \approx 10^{-7}$. A computed eigenvalue of a matrix has
# an error of about $\varepsilon \lambda_\text{max}$, relative to the *largest* one, because the rounding of the
# matrix's entries changes it by that much. Along the eigenvector of the smallest eigenvalue we divide by
# $\lambda_\text{min} + \delta$, so the relative error of a dense inverse is of the order of
#
# $$
# \varepsilon \, \frac{\lambda_\text{max}}{\lambda_\text{min} + \delta} ,
# \tag{8.9}
# $$
#
# precision times condition number. Curvature is badly conditioned, and the condition number of
# $B \otimes A$ is the *product* of those of its factors.
#
# Working with the factors loses fewer digits. An error of $\varepsilon \alpha_\text{max}$ in $\alpha_i$ and one of
# $\varepsilon \beta_\text{max}$ in $\beta_o$ change $\beta_o \alpha_i$ by about
# $\varepsilon (\beta_o \alpha_\text{max} + \beta_\text{max} \alpha_i)$. Relative to what we divide by,
#
# $$
# \varepsilon \max_{o, i}
# \frac{\beta_o \alpha_\text{max} + \beta_\text{max} \alpha_i}{\beta_o \alpha_i + \delta}
# \;\le\; \varepsilon \Bigl(
# \frac{\alpha_\text{max}}{\alpha_\text{min}} + \frac{\beta_\text{max}}{\beta_\text{min}} \Bigr) .
# \tag{8.10}
# $$
#
# Without damping, the *sum* of the condition numbers has taken the place of their product, because
# the small eigenvalues of the block are products of those of the factors, each with a small relative error. In both
# cases damping decides how many digits are left.


# %%
def ill_conditioned(size: int, smallest: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues from 1 down to ten to the power of `smallest`, and eigenvectors."""
    return torch.logspace(0, smallest, size), torch.linalg.qr(torch.randn(size, size)).Q


(alpha_, QA_), (beta_, QB_) = ill_conditioned(30, -5), ill_conditioned(20, -4)
truth = KroneckerEigen(QA_, QB_, torch.outer(beta_, alpha_))
A_, B_ = QA_ * alpha_ @ QA_.T, QB_ * beta_ @ QB_.T
V, eye = torch.randn(20, 30), torch.eye(600)

dampings = torch.logspace(-9, 0, 10).tolist()
reference = [truth.inverse(d) @ V for d in dampings]
measured, predicted = {}, {}
for dtype in (torch.float32, torch.float64):
    by_factors, big = Kronecker(A_.to(dtype), B_.to(dtype)), kron(B_, A_).to(dtype)
    steps = {
        "factors": [by_factors.inverse(d) @ V.to(dtype) for d in dampings],
        "dense": [torch.linalg.solve(big + d * eye.to(dtype), vec(V).to(dtype)) for d in dampings],
    }
    for way, xs in steps.items():
        pairs = zip(xs, reference, strict=True)
        measured[way, dtype] = [largest_error(x.double().flatten(), vec(r)) for x, r in pairs]
    eps, moved = torch.finfo(dtype).eps, beta_[:, None] + alpha_
    predicted["factors", dtype] = [eps * (moved / (truth.scale + d)).max().item() for d in dampings]
    predicted["dense", dtype] = [eps / (1e-9 + d) for d in dampings]

for (way, dtype), errors in measured.items():
    print(f"{way:>7} {str(dtype)[6:]}: {errors[0]:.0e} at damping {dampings[0]:.0e}", end=", ")
    print(f"{errors[-1]:.0e} at damping {dampings[-1]:.0e}")

# %% tags=["hide-input"] alt="Log-log plot of the relative error of a step against the damping, for float32 and float64 and for the dense matrix and its factors. All curves fall towards larger damping. In each precision the dense curve lies above that of the factors for small damping, and in float32 its error comes close to one. Dashed lines for the predictions run above the curves for small damping and meet them for large damping." caption="Error of one damped step for an ill-conditioned matrix. Dashed: the predictions for the dense matrix and for the factors."
fig, ax = plt.subplots(figsize=(6.5, 3.6))
for (way, dtype), errors in measured.items():
    marker = "o" if way == "factors" else "s"
    (line,) = ax.loglog(dampings, errors, f"{marker}-", label=f"{way}, {str(dtype)[6:]}")
    ax.loglog(dampings, predicted[way, dtype], "--", color=line.get_color(), linewidth=0.9)
ax.set(xlabel=r"damping $\delta$", ylabel="relative error", ylim=(1e-16, 1e3))
ax.legend(fontsize="small")
plt.show()

for key, errors in measured.items():
    assert all(e < 30 * bound for e, bound in zip(errors, predicted[key], strict=True))
single = {way: measured[way, torch.float32] for way in ("dense", "factors")}
assert single["dense"][0] > 0.1 > 10 * single["factors"][0]  # no digit left; some left
assert max(single["dense"][-1], single["factors"][-1]) < 1e-5  # damping restores them

# %% [markdown]
# Rounding can even make the smallest eigenvalues negative, although the exact matrix is positive semi-definite. With
# $\lambda + \delta$ close to zero or below it, a step would explode or change its sign. `psd_eigh` sets negative
# eigenvalues within round-off to zero. For matrices that are negative beyond that it raises an error, since those were
# not positive semi-definite in the first place. It changes no positive eigenvalue: a small genuine one cannot be told
# from round-off, and damping makes the difference harmless. A common rule sets eigenvalues below $d \cdot \mathrm{eps}$
# of the largest to zero, with the machine precision $\mathrm{eps}$. In float32 it removes genuine eigenvalues of a wide
# layer, here of inputs whose spectrum falls with a power of the index, and the step along every direction that it
# removes is too long:


# %%
def refused(function) -> None:
    """Run what has to fail, and print why it does."""
    try:
        function()
    except ValueError as reason:
        print(textwrap.fill(f"ValueError: {reason}", width=90))
    else:
        raise AssertionError("this should have been refused")


thin = torch.randn(30, 4, dtype=torch.float32)
singular = thin @ thin.T  # rank 4, so 26 eigenvalues are zero
raw, (kept, _) = eigvalsh(singular), psd_eigh(singular)
print(f"smallest eigenvalue: {raw.min().item():.0e} computed, {kept.min().item():.0e} used")
pixels = (torch.randn(1024, 512) / torch.arange(1, 513)).float()
wide = pixels.T @ pixels / 1024
(eigenvalues, _), exact = psd_eigh(wide), eigvalsh(wide.double())
below = exact < 512 * torch.finfo(torch.float32).eps * exact.max()
print(f"{below.sum().item()} of 512 eigenvalues lie below d eps times the largest")
assert below.sum() > 100
torch.testing.assert_close(eigenvalues.double(), exact, rtol=1e-6, atol=0)  # all of them genuine
assert raw.min() < 0
assert kept.min() == 0
refused(lambda: psd_eigh(singular - 0.1 * torch.eye(30, dtype=torch.float32)))

# %% [markdown]
# ## What goes wrong in practice
#
# **Damping that grows.** An implementation stores eigenvalues and adds the damping to them in place, inside the
# product. The first product is right. The second has twice the damping, the third three times
# ([an example, since fixed](https://github.com/f-dangel/curvlinops/pull/156), for the biases). A test that multiplies
# once passes.


# %%
class Growing:
    """What not to do."""

    def __init__(self, K: KroneckerEigen, damping: float) -> None:
        self.K, self.damping = K, damping

    def __matmul__(self, V: Tensor) -> Tensor:
        scale = self.K.scale
        scale += self.damping  # in place: the stored eigenvalues change
        return KroneckerEigen(self.K.QA, self.K.QB, 1 / scale) @ V


V, correct = torch.randn(d_out, d_in), M.inverse(0.1)
growing = Growing(M.eigen(), 0.1)
errors = [largest_error(growing @ V, correct @ V) for _ in range(5)]
print("error of product 1, 2, ...:", [f"{e:.2f}" for e in errors])
assert errors[0] <= EXACT
assert all(later > earlier for earlier, later in zip(errors, errors[1:], strict=False))
assert torch.equal(correct @ V, correct @ V)

# %% [markdown]
# Immutable values prevent it: in this package `inverse` returns another matrix and no method
# writes to a tensor.
#
# **Factors exchanged, eigenvectors transposed.** For a square layer $A V B$ has the right shape,
# and so does a change of basis with $Q^\top$ for $Q$. Both mistakes keep all eigenvalues, so the
# trace, the determinant and the norm are right. Only products show them:

# %%
sq_A, sq_B, V = spd(4), spd(4), torch.randn(4, 4)
square = Kronecker(sq_A, sq_B)
exchanged = Kronecker(sq_B, sq_A)
e = square.eigen()
transposed = KroneckerEigen(e.QA.T, e.QB.T, e.scale)
for wrong in (exchanged, transposed):
    assert_exact(wrong.eigenvalues(), square.eigenvalues())
    assert_exact(wrong.logdet(0.1), square.logdet(0.1))
    assert largest_error(wrong.inverse(0.1) @ V, square.inverse(0.1) @ V) > 0.1

# %% [markdown]
# **Averages of the wrong thing.** Curvature is averaged over batches, workers or time. Average the matrices, and then
# invert. The average of the inverses is another matrix. It is at least as large in every direction, because the inverse
# is convex (for numbers: the mean of $1/x$ is at least $1$ over the mean of $x$), so that steps are too long. The
# product of averaged factors is not the average of the products, either; KFAC uses it as a further approximation:

# %%
pieces = [Kronecker(spd(d_in, 0.01), spd(d_out, 0.01)) for _ in range(4)]
average = torch.stack([K.dense() for K in pieces]).mean(0)
of_average = Dense(average).inverse(0.1).M
of_inverses = torch.stack([K.inverse(0.1).dense() for K in pieces]).mean(0)
print(f"traces: {of_average.trace().item():.0f} inverse of the average,", end=" ")
print(f"{of_inverses.trace().item():.0f} average of the inverses")
assert eigvalsh(of_inverses - of_average).min() > 0

by_factor = Kronecker(
    torch.stack([K.A for K in pieces]).mean(0), torch.stack([K.B for K in pieces]).mean(0)
)
assert largest_error(by_factor.dense(), average) > 0.01

# %% [markdown]
# **Averaged eigenvectors.** An implementation decomposes at every step and smooths what it
# stores, eigenvectors included. But eigenvectors are defined only up to a sign, and their order
# may change. The average of $q$ and $-q$ is zero; the average of two orthogonal matrices is not
# orthogonal. Even for one and the same matrix:

# %%
signs = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])
QA_again = QA * signs  # just as good: A = Q diag(alpha) Q^T still
assert_exact(QA_again * alpha @ QA_again.T, A)
averaged = (QA + QA_again) / 2
assert largest_error(averaged.T @ averaged, torch.eye(d_in)) > 0.1
assert largest_error(averaged * alpha @ averaged.T, A) > 0.1

# %% [markdown]
# **No damping.** The factor $A$ is a mean of $N S$ outer products, for $N$ data with $S$ positions each, so it is
# singular if $N S \lt d_\text{in}$. A pixel that is zero in all images or a token that is not in the batch makes it
# singular, too. An inverse without damping raises an error if an eigenvalue is exactly zero:

# %%
counts = torch.tensor([2.0, 0.0, 1.0, 0.0, 3.0])  # one-hot inputs: A is diagonal
unseen = Kronecker((counts / counts.sum()).diag(), B)
refused(lambda: unseen.inverse(0.0))
assert_exact(unseen.inverse(1e-3) @ (unseen @ E + 1e-3 * E), E)

# %% [markdown]
# More often round-off turns the zero into a tiny number of random size and sign. Its inverse is an
# enormous number with no correct digit. So without damping the package sets, in each factor, eigenvalues of at most
# $10\, \mathrm{eps}$ of the largest to zero (`told_from_zero`), and raises an error here as well:

# %%
few = torch.randn(3, d_in)  # three data
smallest = eigvalsh(few.T @ few / 3)[: d_in - 3]
print("eigenvalues that should be zero:", [f"{v:.0e}" for v in smallest.tolist()])
assert smallest.abs().max() < 1e-13
starved = Kronecker(few.T @ few / 3, B)
refused(lambda: starved.inverse(0.0))
assert_exact(starved.inverse(1e-3) @ (starved @ E + 1e-3 * E), E)

# %% [markdown]
# ## In one minute
#
# - A product with $B \otimes A$, and its trace, determinant and eigenvalues, come from the factors.
# - Damping keeps the eigenvectors and changes the eigenvalues to $\beta_o \alpha_i + \delta$. The damped matrix is no
#   Kronecker product, unless a factor is a multiple of the identity.
# - So the damped inverse takes two small eigendecompositions and products with four small matrices, and is exact.
# - Average matrices and then invert. Never average inverses or eigenvectors.
#
# ## Exercises
#
# **Exercise 8.1.** The *effective number of parameters* is
# $\operatorname{tr}\bigl(M (M + \delta I)^{-1}\bigr)$. Compute it for $M = B \otimes A$. What
# does it tend to for $\delta \to 0$ and $\delta \to \infty$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Both matrices share the eigenvectors, so the trace is
# $\sum_{oi} \beta_o \alpha_i / (\beta_o \alpha_i + \delta)$. Each summand lies between 0 and 1.
# The limit is the rank of $M$ for $\delta \to 0$, and zero for $\delta \to \infty$.
#
# </details>
#
# **Exercise 8.2.** [(5.7)] uses that $\langle B_1 \otimes A_1, B_2 \otimes A_2 \rangle =
# \langle B_1, B_2 \rangle \langle A_1, A_2 \rangle$ for the inner product
# $\langle X, Y \rangle = \sum_{ij} X_{ij} Y_{ij}$. Show it. How do you compute the distance of two
# Kronecker products without forming them?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# By [(1.4)] the entries are products, so the sum over both pairs of indices is a product of two
# sums. The squared distance is $\lVert B_1 \rVert^2 \lVert A_1 \rVert^2
# - 2 \langle B_1, B_2 \rangle \langle A_1, A_2 \rangle
# + \lVert B_2 \rVert^2 \lVert A_2 \rVert^2$.
#
# </details>
#
# **Exercise 8.3.** For which $D$ is $B \otimes A + \delta D$ a Kronecker product for all
# $\delta$, with $D$ not a multiple of $B \otimes A$? Interpret the damping $D = I \otimes A$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# For $D = Y \otimes A$ or $D = B \otimes X$: then one factor is common and can be taken out, for
# example $B \otimes A + \delta\, I \otimes A = (B + \delta I) \otimes A$. For no others: divide by
# $\delta$ and let it grow, and $D$ itself must be a product; two rearranged matrices of rank one add
# up to rank one only if they share their column or their row. This damps in the metric of the
# inputs: weights that act on large inputs are held back more than weights that act on small ones.
#
# </details>
#
# **Exercise 8.4.** Sample from the normal distribution with covariance $(B \otimes A)^{-1}$ with
# Cholesky decompositions of $A$ and $B$ only. Is the sample for one noise matrix the same as with
# symmetric roots?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Let $A = L_A L_A^\top$ and $B = L_B L_B^\top$. Then $A^{-1} = L_A^{-\top} L_A^{-1}$, so
# $R = L_B^{-\top} \otimes L_A^{-\top}$ is a root, and by [(1.6)] the sample is
# $L_B^{-\top} E L_A^{-1}$: two triangular solves. Samples differ, as $R$ differs by an orthogonal
# matrix; the distribution is the same.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
effective = (Lambda / (Lambda + 0.1)).sum()  # 8.1
assert_exact(effective, (dense @ inv(damped)).trace())
assert abs((Lambda / (Lambda + 1e-13)).sum() - d_out * d_in) < 1e-8
assert (Lambda / (Lambda + 1e13)).sum() < 1e-8

inner = (M.B * second.B).sum() * (M.A * second.A).sum()  # 8.2
squares = [K.B.square().sum() * K.A.square().sum() for K in (M, second)]
assert_exact(inner, (M.dense() * second.dense()).sum())
distance = (squares[0] - 2 * inner + squares[1]).sqrt()
assert_exact(distance, torch.dist(M.dense(), second.dense()))

damped_in_metric = dense + 0.1 * kron(torch.eye(d_out), A)  # 8.3
assert_exact(kron(B + 0.1 * torch.eye(d_out), A), damped_in_metric)
assert torch.linalg.matrix_rank(rearranged(damped_in_metric)) == 1

R = kron(inv(torch.linalg.cholesky(B)).T, inv(torch.linalg.cholesky(A)).T)  # 8.4
assert_exact(R @ R.T, inv(dense))
assert largest_error(R @ vec(E), vec(M.inverse_sqrt(0.0) @ E)) > 0.01
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Martens and Grosse (2015)](bibliography.md#kfac) for factored damping;
# [Van Loan and Pitsianis (1993)](bibliography.md#kpsvd) for the rearrangement $R$;
# [George et al. (2018)](bibliography.md#ekfac) for better scales in the same eigenbasis.
