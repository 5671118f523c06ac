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
# # 1. Flattening: vec, Kronecker products and the vec trick
#
# **Part II: Curvature.** How does a weight matrix become a vector, and how can I multiply with
# a matrix that is far too big to write down?
#
# KFAC, *Kronecker-factored approximate curvature*, makes the curvature of a network affordable. Curvature is good for
# training in fewer steps, for error bars on predictions, for finding the training data behind an answer, and for
# deciding which weights to remove or how to merge two models ([the reading map](reading_map.md) names a chapter on
# each). But curvature is a matrix with one row and one column per parameter. KFAC replaces this matrix, layer by layer,
# by a Kronecker product of two small matrices, and never forms the product. With the rows of a matrix $V$ lined up as
# $\operatorname{vec}(V)$, the small matrices suffice for a multiplication:
#
# $$
# (B \otimes A) \operatorname{vec}(V) = \operatorname{vec}(B V A^\top).
# $$

# %% tags=["hide-input"]
import torch
from torch import Tensor
from torch.testing import assert_close

from kfac_scratch.checks import set_up
from kfac_scratch.linalg import kron_matvec, psd_eigh, unvec, vec
from kfac_scratch.moving.cells import kronecker_cells
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"] alt="Heat maps of a 3 by 3 matrix B, a 4 by 4 matrix A and their 12 by 12 Kronecker product. Lines divide the product into nine blocks of 4 by 4; every block repeats the pattern of A in a colour strength given by one entry of B." caption="Every block of the product is a copy of $A$, scaled by one entry of $B$."
B, A = torch.randn(3, 3), torch.randn(4, 4)
product = {"$B$": B, "$A$": A, r"$B \otimes A$": torch.kron(B, A)}
matrices(product, blocks={r"$B \otimes A$": (4, 4)})

# %% [markdown]
# After this chapter you can
#
# - flatten a layer's weight and bias in the right order, and translate a formula for stacked columns to stacked rows;
# - multiply with $B \otimes A$, invert it and decompose it from its factors;
# - say when a Kronecker product plus a multiple of the identity is again a Kronecker product;
# - find a wrong order of factors, which a comparison of shapes or of eigenvalues does not show.
#
# One square layer shows how much memory the factors save:

# %%
d = 1024
dense_bytes, factor_bytes = 4 * (d * d) ** 2, 4 * 2 * d * d
print(f"curvature of one {d} × {d} layer: {dense_bytes / 2**40:.0f} TiB in float32")
print(f"its two Kronecker factors:        {factor_bytes / 2**20:.0f} MiB")

# %% [markdown]
# ## Rows, one after the other
#
# The *vectorisation* of a matrix $V \in \mathbb{R}^{m \times n}$ lines up its entries. We stack
# the **rows**: entry $(i, j)$ goes to position $i n + j$ when both are counted from zero,
#
# $$
# \operatorname{vec}(V)_{i n + j} = V_{ij}.
# \tag{1.1}
# $$
#
# By hand, this is two loops:


# %%
def vec_by_hand(V: Tensor) -> Tensor:
    entries = []
    for row in V:
        for entry in row:
            entries.append(entry)
    return torch.stack(entries)


V = torch.arange(6.0).reshape(2, 3)
print(V)
print(vec_by_hand(V))

# %% [markdown]
# ### In the package
#
# PyTorch stores the rows of a matrix one after the other, too, so that `flatten` computes $\operatorname{vec}$. We
# stack rows for this reason: `weight.flatten()`, `weight.grad.flatten()` and
# `torch.nn.utils.parameters_to_vector` need no reordering. Leading dimensions are a batch.

# %% tags=["beside", "remove-input"]
code(vec, unvec)

# %%
assert_close(vec(V), vec_by_hand(V))
assert_close(unvec(vec(V), rows=2), V)
assert_close(vec(V), torch.nn.utils.parameters_to_vector([V]))

# %% [markdown]
# Textbooks and several KFAC papers stack **columns** instead. We call that $\operatorname{cvec}$
# and need it only to translate: stacking the columns of $V$ is stacking the rows of $V^\top$,
#
# $$
# \operatorname{cvec}(V) = \operatorname{vec}(V^\top).
# \tag{1.2}
# $$


# %%
def cvec(V: Tensor) -> Tensor:
    return vec(V.mT)


print("rows:   ", vec(V).tolist())
print("columns:", cvec(V).tolist())
assert not torch.equal(vec(V), cvec(V))

# %% [markdown]
# ## A matrix of matrices
#
# The Kronecker product of $B \in \mathbb{R}^{p \times m}$ and $A \in \mathbb{R}^{q \times n}$
# replaces every entry of $B$ by that entry times all of $A$:
#
# $$
# B \otimes A =
# \begin{pmatrix}
# B_{11} A & \cdots & B_{1m} A \\
# \vdots & & \vdots \\
# B_{p1} A & \cdots & B_{pm} A
# \end{pmatrix}
# \in \mathbb{R}^{pq \times mn}.
# \tag{1.3}
# $$
#
# Its rows are numbered by a pair, block $i$ and row $j$ within the block, and so are its
# columns. By the positions of [(1.1)], row $(i, j)$ is row $i q + j$ and column $(k, l)$ is column $k n + l$, so that
# [(1.3)] says
#
# $$
# (B \otimes A)_{(i, j), (k, l)} = B_{ik} A_{jl}.
# \tag{1.4}
# $$


# %%
def kron_by_hand(B: Tensor, A: Tensor) -> Tensor:
    (p, m), (q, n) = B.shape, A.shape
    K = torch.zeros(p * q, m * n)
    for i in range(p):
        for j in range(q):
            for k in range(m):
                for ell in range(n):
                    K[i * q + j, k * n + ell] = B[i, k] * A[j, ell]
    return K


assert_close(kron_by_hand(B, A), torch.kron(B, A))

# %% [markdown]
# Equation [(1.4)] says which two numbers are multiplied in each cell of $B \otimes A$. For a layer whose weight matrix
# $W$ has three rows and four columns, each row and each column of $B \otimes A$ belongs to one weight. Point at a cell
# to see its two weights. The rows in which they stand in $W$ are the indices of $B$'s entry, and their columns are the
# indices of $A$'s entry.

# %% tags=["hide-input"]
kronecker_cells(B, A, cell=(6, 3))

# %% [markdown]
# A gradient can be a Kronecker product of two vectors. For one datum, the gradient with respect
# to the weights of a linear layer is an outer product $g a^\top$: $a$ is the layer's input, and $g$ is the gradient
# with respect to its output. By [(1.1)] its entries $g_i a_j$ are lined up as
#
# $$
# \operatorname{vec}(g a^\top) = g \otimes a.
# \tag{1.5}
# $$

# %%
g, a = torch.randn(3), torch.randn(4)
assert_close(vec(torch.outer(g, a)), torch.kron(g, a))

# %% [markdown]
# ## The vec trick
#
# <div class="admonition theorem" markdown="1" id="thm-1.1">
# <p class="admonition-title" markdown="1"><b>Theorem 1.1 (vec trick)</b></p>
#
# For all $B \in \mathbb{R}^{p \times m}$, $V \in \mathbb{R}^{m \times n}$ and
# $A \in \mathbb{R}^{q \times n}$,
#
# $$
# (B \otimes A) \operatorname{vec}(V) = \operatorname{vec}(B V A^\top).
# \tag{1.6}
# $$
#
# </div>
#
# **Proof.** Compare the entries at position $(i, j)$. On the left, by [(1.4)],
#
# $$
# \sum_{k, l} (B \otimes A)_{(i, j), (k, l)} \operatorname{vec}(V)_{(k, l)}
# = \sum_{k, l} B_{ik} A_{jl} V_{kl}
# = \sum_{k, l} B_{ik} V_{kl} (A^\top)_{lj},
# $$
#
# which is entry $(i, j)$ of $B V A^\top$. $\blacksquare$
#
# The left factor mixes the rows of $V$, the right factor its columns. For a weight matrix, rows
# belong to outputs and columns to inputs. **So $B$, the factor of the outputs, stands first**,
# and $A$, the factor of the inputs, second.

# %% [markdown]
# ### In the package
#
# The right-hand side of [(1.6)] never forms $B \otimes A$. It folds the vector, multiplies
# twice with small matrices, and flattens again.

# %% tags=["beside", "remove-input"]
code(kron_matvec)

# %% [markdown]
# With rectangular factors, a missing transpose would raise an error. A batch of vectors works as well:

# %%
B, A = torch.randn(5, 3), torch.randn(2, 4)
v = torch.randn(7, 3 * 4)  # seven vectors

assert_close(kron_matvec(B, A, v), v @ torch.kron(B, A).mT)
print("largest difference:", (kron_matvec(B, A, v) - v @ torch.kron(B, A).mT).abs().max().item())

# %% [markdown]
# ## The other convention
#
# What happens to [Theorem 1.1] if columns are stacked? By [(1.2)] and the theorem itself,
#
# $$
# \operatorname{cvec}(B V A^\top)
# = \operatorname{vec}(A V^\top B^\top)
# = (A \otimes B) \operatorname{vec}(V^\top)
# = (A \otimes B) \operatorname{cvec}(V).
# \tag{1.7}
# $$
#
# The factors change places, and [Martens and Grosse (2015)](bibliography.md#kfac), who stack columns, write
# the factor of the inputs first. Both conventions are right, but a mixture of the two is wrong:

# %%
m, n = 4, 4  # a square layer, where nothing complains about shapes
B, A, V = torch.randn(m, m), torch.randn(n, n), torch.randn(m, n)

right = vec(B @ V @ A.mT)
mixed = torch.kron(A, B) @ vec(V)  # their order of factors, our order of entries

assert_close(torch.kron(B, A) @ vec(V), right)
assert_close(torch.kron(A, B) @ cvec(V), cvec(B @ V @ A.mT))
assert not torch.allclose(mixed, right)
print(f"relative error of the mixture: {((mixed - right).norm() / right.norm()).item():.2f}")

# %% [markdown]
# The mixture is far from right, but no shape shows the mistake. $A \otimes B$ and $B \otimes A$ differ
# only by a renumbering of rows and columns: for square factors, and with the permutation $K$ for
# which $K \operatorname{vec}(V) = \operatorname{cvec}(V)$, [(1.6)] and [(1.7)] give
#
# $$
# A \otimes B = K (B \otimes A) K^\top.
# \tag{1.8}
# $$
#
# Therefore trace, determinant, norm and all eigenvalues agree. A test that compares only these does not find the
# mistake.

# %%
K = torch.eye(m * n)[cvec(torch.arange(16.0).reshape(m, n)).long()]
assert_close(K @ vec(V), cvec(V))
assert_close(torch.kron(A, B), K @ torch.kron(B, A) @ K.mT)

B, A = B @ B.mT, A @ A.mT  # symmetric, so that the eigenvalues are real
ours, theirs = torch.kron(B, A), torch.kron(A, B)
linalg = torch.linalg
for statistic in (torch.trace, linalg.det, linalg.matrix_norm, linalg.eigvalsh):
    assert_close(statistic(ours), statistic(theirs))
assert not torch.allclose(ours, theirs)

# %% tags=["hide-input"] alt="Two 16 by 16 heat maps with 4 by 4 blocks drawn in, B Kronecker A and A Kronecker B. Both hold the same values, but at different places." caption="The same numbers in two orders. The two products have the same shape, norm and eigenvalues, and differ in the places of their entries."
pair = {r"$B \otimes A$ (rows stacked)": ours, r"$A \otimes B$ (columns stacked)": theirs}
matrices(pair, blocks=dict.fromkeys(pair, (4, 4)))

# %% [markdown]
# ## What the product inherits from its factors
#
# Apply [Theorem 1.1] twice and you get the **mixed product**: $(D \otimes C)(B \otimes A)$ sends
# $\operatorname{vec}(V)$ to $\operatorname{vec}(D B V A^\top C^\top)$, and so
#
# $$
# (D \otimes C)(B \otimes A) = (D B) \otimes (C A).
# \tag{1.9}
# $$
#
# The inverse and the eigendecomposition are special cases. If the factors are invertible, then $D = B^{-1}$ and
# $C = A^{-1}$ make the right side the identity. Symmetric factors have orthonormal eigenvectors,
# $B = Q_B \Lambda_B Q_B^\top$ and $A = Q_A \Lambda_A Q_A^\top$, and [(1.9)], used twice, separates the eigenvectors
# from the eigenvalues. The transpose follows from [(1.3)], and so does the trace of square factors.
#
# $$
# \begin{aligned}
# (B \otimes A)^\top &= B^\top \otimes A^\top, \\
# (B \otimes A)^{-1} &= B^{-1} \otimes A^{-1}, \\
# \operatorname{tr}(B \otimes A) &= \operatorname{tr}(B) \operatorname{tr}(A), \\
# B \otimes A &= (Q_B \otimes Q_A)(\Lambda_B \otimes \Lambda_A)(Q_B \otimes Q_A)^\top.
# \end{aligned}
# \tag{1.10}
# $$


# %%
def spd(size: int) -> Tensor:
    M = torch.randn(size, size)
    return M @ M.mT + torch.eye(size)


kron, inv = torch.kron, torch.linalg.inv
B, A, D, C = spd(3), spd(4), torch.randn(3, 3), torch.randn(4, 4)
assert_close(kron(D, C) @ kron(B, A), kron(D @ B, C @ A))
assert_close(kron(D, C).mT, kron(D.mT, C.mT))
assert_close(inv(kron(B, A)), kron(inv(B), inv(A)))
assert_close(kron(B, A).trace(), B.trace() * A.trace())

(eigenvalues_B, QB), (eigenvalues_A, QA) = psd_eigh(B), psd_eigh(A)
eigenvalues = torch.kron(eigenvalues_B, eigenvalues_A)  # all products of one with the other
Q = kron(QB, QA)
assert_close(Q @ eigenvalues.diag() @ Q.mT, kron(B, A))

# %% [markdown]
# ### What it does not inherit
#
# A sum of Kronecker products is in general not a Kronecker product. For $\delta \gt 0$ and symmetric positive
# semi-definite factors, $B \otimes A + \delta I$ is one only if $A$ or $B$ is a multiple of the identity
# ([Theorem 8.1]). If $A = c I$, then $B \otimes A + \delta I = (c B + \delta I) \otimes I$. Adding
# $\sqrt{\delta} I$ to *both* factors gives an approximation of the damped matrix:
#
# $$
# (B + \sqrt{\delta} I) \otimes (A + \sqrt{\delta} I)
# = B \otimes A + \delta I
# + \underbrace{\sqrt{\delta}\,(B \otimes I + I \otimes A)}_{\text{extra}}.
# \tag{1.11}
# $$
#
# For such factors, the exact damped inverse needs only the eigendecompositions of the two factors, because adding
# $\delta I$ does not change the eigenvectors in [(1.10)]:
#
# $$
# (B \otimes A + \delta I)^{-1}
# = (Q_B \otimes Q_A)(\Lambda_B \otimes \Lambda_A + \delta I)^{-1}(Q_B \otimes Q_A)^\top.
# \tag{1.12}
# $$

# %%
damping = 0.1
I3, I4, I12 = torch.eye(3), torch.eye(4), torch.eye(12)
damped = kron(B, A) + damping * I12
factored = kron(B + damping**0.5 * I3, A + damping**0.5 * I4)

assert not torch.allclose(factored, damped)
assert_close(kron(B, 2 * I4) + damping * I12, kron(2 * B + damping * I3, I4))  # A = 2 I


def products_needed(M: Tensor) -> int:
    """How many Kronecker products add up to M: the rank with one row for each 4 × 4 block."""
    blocks = M.reshape(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16)
    return torch.linalg.matrix_rank(blocks).item()


needed = [products_needed(M) for M in (kron(B, A), damped, kron(B, 2 * I4) + damping * I12)]
print("Kronecker products that add up to B ⊗ A, damped, damped with A = 2 I:", needed)
assert needed == [1, 2, 1]
assert_close(factored - damped, damping**0.5 * (kron(B, I4) + kron(I3, A)))
assert_close(Q @ (1 / (eigenvalues + damping)).diag() @ Q.mT, inv(damped))

# %% [markdown]
# ## What it costs
#
# For an $m \times n$ layer, a product with the dense matrix takes $m^2 n^2$ multiplications, and the vec trick takes
# $m n (m + n)$. PyTorch counts operations (a multiplication and an addition are two):

# %%
from torch.utils.flop_counter import FlopCounterMode


def operations(function, *arguments) -> int:
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


m, n = 24, 36
B, A, v = torch.randn(m, m), torch.randn(n, n), torch.randn(m * n)
dense = operations(torch.mm, kron(B, A), v[:, None])
trick = operations(kron_matvec, B, A, v)
print(f"{m} × {n} layer: dense {dense:,}, vec trick {trick:,}, ratio {dense / trick:.1f}")
assert dense == 2 * m**2 * n**2
assert trick == 2 * m * n * (m + n)

# %% [markdown]
# ## Many parameters, one vector
#
# A network has several parameters. Its gradient is the concatenation of their flattened
# gradients, and the columns of its Jacobian, the matrix of first derivatives, follow the same order. Here is a layer
# $z = W a + b$. Output $i$ depends on row $i$ of $W$ only, and its derivative with respect to that row is
# $a^\top$. With one row for each output and the columns in the order of [(1.1)],
#
# $$
# \frac{\partial z}{\partial \operatorname{vec}(W)} = I \otimes a^\top,
# \qquad
# \frac{\partial z}{\partial b} = I.
# \tag{1.13}
# $$
#
# Now append a one to $a$ and write the bias as the **last column** of the matrix:
# $z = [W\; b] \begin{pmatrix} a \\ 1 \end{pmatrix}$. The same derivative becomes a single
# Kronecker product,
#
# $$
# \frac{\partial z}{\partial \operatorname{vec}([W\; b])}
# = I \otimes \begin{pmatrix} a^\top & 1 \end{pmatrix}.
# \tag{1.14}
# $$
#
# So a layer with a bias needs one Kronecker product instead of two blocks. For this reason a bias is always the last
# column of $W$ in this package.

# %%
d_out, d_in = 3, 4
W, b, a = torch.randn(d_out, d_in), torch.randn(d_out), torch.rand(d_in) + 0.5

by_parameter = torch.func.jacrev(lambda W, b: W @ a + b, argnums=(0, 1))(W, b)
apart = torch.cat([J.reshape(d_out, -1) for J in by_parameter], dim=1)  # [vec W, b]

a1 = torch.cat([a, torch.ones(1)])
Wb = torch.cat([W, b[:, None]], dim=1)
joint = torch.func.jacrev(lambda Wb: Wb @ a1)(Wb).reshape(d_out, -1)  # vec [W b]

assert_close(apart[:, : d_out * d_in], torch.kron(torch.eye(d_out), a[None]))
assert_close(apart[:, d_out * d_in :], torch.eye(d_out))
assert_close(joint, torch.kron(torch.eye(d_out), a1[None]))

# %% [markdown]
# The two vectors $(\operatorname{vec} W, b)$ and $\operatorname{vec}([W\; b])$ hold the same
# numbers, but in the second the bias is interleaved: one entry after every row. An index translates the first into
# the second. The index is made by sending positions through the same operations as the values:

# %%
positions = torch.arange(float(d_out * d_in + d_out))
W_at, b_at = positions.split([d_out * d_in, d_out])
order = vec(torch.cat([W_at.reshape(d_out, d_in), b_at[:, None]], dim=1)).long()
print(order.tolist())

assert_close(joint, apart[:, order])
assert_close(joint.mT @ joint, (apart.mT @ apart)[order][:, order])  # rows and columns of a matrix
assert not torch.allclose(joint.mT @ joint, apart.mT @ apart)

# %% tags=["hide-input"] alt="Two 15 by 15 heat maps of the same Gram matrix. With the bias kept apart, three blocks of 4 by 4 stand on the diagonal and stripes for the bias at the end of rows and columns. With the bias as last column of W there are three blocks of 5 by 5 on the diagonal and nothing else." caption="$J^\\top J$ of one layer, whose rows and columns belong to the 15 parameters, for the two orders. With the bias as the last column of $W$, $J^\\top J$ is block-diagonal, with one block for each output."
orders = {r"$(\mathrm{vec}\,W,\ b)$": apart.mT @ apart, r"$\mathrm{vec}\,[W\ b]$": joint.mT @ joint}
matrices(orders, blocks={r"$\mathrm{vec}\,[W\ b]$": (5, 5)})

# %% [markdown]
# ## What goes wrong in practice
#
# **Factors in the other order.** A formula from a paper that stacks columns is applied to gradients that PyTorch
# flattened. The dense $A \otimes B$ has the size of $B \otimes A$ for every layer, so that no error is raised. With
# $d_\text{in} \neq d_\text{out}$, the product $A V B^\top$ does raise one. Compare matrices, not only their spectra.
#
# **The other layout of weights.** Some frameworks store a dense layer as inputs × outputs and
# compute $a^\top \mathtt{kernel}$. Flattening that kernel by rows stacks the *columns* of our
# $W$, so there $A \otimes B$ is right:

# %%
kernel = W.mT.contiguous()  # d_in × d_out
assert_close(kernel.flatten(), cvec(W))

# %% [markdown]
# **A transpose that only changes strides.** `V.T` moves no entries in memory. `view(-1)` then raises an error.
# `flatten` and `reshape` make a copy instead, and what is written into the copy does not reach `V`:

# %%
try:
    W.mT.view(-1)
    raise AssertionError("view should refuse a transposed matrix")
except RuntimeError as error:
    print(error)

transposed = W.mT.clone(memory_format=torch.preserve_format)
transposed.flatten()[0] = 1e3  # writes into a copy
assert_close(transposed, W.mT)

# %% [markdown]
# **Bias and weight in different orders.** The gradient and the curvature may be concatenated in different orders. Both
# have the same sizes, so that no error is raised. Use one of the two orders everywhere, and convert what
# comes from outside with an index as above.

# %% [markdown]
# ## In one minute
#
# - $\operatorname{vec}$ stacks rows, as PyTorch does; a bias is the last column of $W$.
# - $(B \otimes A) \operatorname{vec}(V) = \operatorname{vec}(B V A^\top)$, with the factor of the outputs first. The
#   gradient of one datum is $g \otimes a$.
# - Inverse, trace and eigenvalues of a Kronecker product come from the factors. For symmetric factors, the exact damped
#   inverse comes from their eigendecompositions.
# - Test with $d_\text{in} \ne d_\text{out}$, and compare entries: eigenvalues do not depend on the factors' order.
#
# ## Exercises
#
# **Exercise 1.1.** Show that $\operatorname{vec}(U)^\top \operatorname{vec}(V) =
# \operatorname{tr}(U^\top V)$. Does it matter whether rows or columns are stacked?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Both sides are $\sum_{ij} U_{ij} V_{ij}$. The order of the sum does not matter, so inner
# products, and with them norms, are the same in both conventions.
#
# </details>
#
# **Exercise 1.2.** Use [(1.5)] and [(1.9)] to write the outer product of a per-datum gradient
# with itself as a Kronecker product. This is the identity that KFAC starts from.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# A vector is a matrix with one column, so the mixed product applies:
# $(g \otimes a)(g \otimes a)^\top = (g \otimes a)(g^\top \otimes a^\top) = (g g^\top) \otimes
# (a a^\top)$. For *one* datum this is exact. KFAC's approximation is to average the two factors
# separately over data.
#
# </details>
#
# **Exercise 1.3.** What is $\det(B \otimes A)$ for $B \in \mathbb{R}^{m \times m}$ and
# $A \in \mathbb{R}^{n \times n}$? Which exponent belongs to which determinant?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# By [(1.9)], $B \otimes A = (B \otimes I_n)(I_m \otimes A)$. The second matrix is block-diagonal
# with $m$ copies of $A$; the first is so with $n$ copies of $B$ after the renumbering of
# [(1.8)]. Hence $\det(B \otimes A) = \det(B)^n \det(A)^m$.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
U, V = torch.randn(3, 4), torch.randn(3, 4)
assert_close(vec(U) @ vec(V), (U.mT @ V).trace())
assert_close(cvec(U) @ cvec(V), (U.mT @ V).trace())

g, a = torch.randn(3), torch.randn(4)
gradient = torch.kron(g, a)
assert_close(torch.outer(gradient, gradient), torch.kron(torch.outer(g, g), torch.outer(a, a)))

B, A, det = spd(3), spd(4), torch.linalg.det
assert_close(det(torch.kron(B, A)), det(B) ** 4 * det(A) ** 3)
assert not torch.allclose(det(torch.kron(B, A)), det(B) ** 3 * det(A) ** 4)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Van Loan and Pitsianis (1993)](bibliography.md#kpsvd) find the nearest Kronecker product to a
# given matrix. [The KFAC-from-scratch tutorial](bibliography.md#from-scratch) shows both
# conventions side by side. [Martens and Grosse (2015)](bibliography.md#kfac) introduce KFAC, with
# columns stacked.
