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
# # 19. Brand new KFAC: eigenpairs that follow the batches
#
# **Part V: Better and faster.** Can the eigenpairs of a moving average be kept up to date without ever
# forming the matrix that is averaged?
#
# The randomised inverses of [Chapter 18](18_randomized.py) store and multiply KFAC's factors, which costs the square
# of a layer's width. B-KFAC keeps only $r$ eigenpairs of each factor and updates them with the $K$ vectors of each new
# batch. The update decomposes a matrix of $r + K$ rows ([Figure 19.1]), and its cost is *linear* in the width.

# %% tags=["hide-input"]
import json
from contextlib import ExitStack
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

import kfac_scratch.approximations.brand as parts_of_brand
import kfac_scratch.approximations.randomized as parts_of_sketches
from kfac_scratch.approximations.brand import (
    Brand,
    ContinuedInverse,
    Repaired,
    corrected,
    is_low_rank_update,
    product_of_rows,
    refreshed,
    ritz,
    truncated,
    updated_factor,
)
from kfac_scratch.approximations.estimators import Estimator, MovingAverage, weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.randomized import (
    Randomized,
    Sketch,
    smallest_kept,
    trace_matched,
    zero_tail,
)
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import psd_eigh
from kfac_scratch.losses import monte_carlo
from kfac_scratch.matrices.low_rank import LowRankKronecker
from kfac_scratch.matrices.low_rank_update import brand_update, reorthonormalized, split_by_span
from kfac_scratch.moving.following import online_eigenpairs
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import RESULTS, code, matrices, style

set_up()  # seed 0, float64, the GPU where there is one
device = torch.get_default_device()


def from_pairs(U: Tensor, d: Tensor, c: Tensor | float = 0.0) -> Tensor:
    return (U * (d - c)) @ U.T + c * torch.eye(len(U))


# %% tags=["hide-input"] alt="Three heat maps of 16 by 16 entries. In the coordinates of the layer all entries of the sum are filled. In the basis of U and Q only the upper left corner of five by five is filled. In the new eigenvectors only the first five entries of the diagonal are." caption="A sum of three eigenpairs and a batch of two columns, in three bases: the coordinates of the layer, $U$ and $Q$ (with eleven more vectors), and the new eigenvectors. Only the corner of five rows is decomposed."
own = torch.Generator(device).manual_seed(0)
U = torch.linalg.qr(torch.randn(16, 3, generator=own)).Q
d, X = torch.tensor([4.0, 3.0, 2.0]), torch.randn(16, 2, generator=own) / 2
total = from_pairs(U, d) + X @ X.T
basis = torch.linalg.qr(torch.cat([U, X], 1), mode="complete").Q
corner = torch.zeros(16, 16)
corner[:5, :5] = (basis.T @ total @ basis)[:5, :5]
assert_exact(basis @ corner @ basis.T, total)
V, e = brand_update(U, d, X)
assert_exact(from_pairs(V, e), total)
diagonal = torch.cat([e, torch.zeros(11)]).diag()
matrices({r"$M + X X^\top$": total, r"in $[U\ Q]$": corner, "in the new eigenvectors": diagonal})

# %% [markdown]
# Let $U$ have $r$ eigenvectors as columns, $X$ the $K$ vectors of a batch, and $Q$ an orthonormal basis of the part of
# $X$ that is orthogonal to $U$. Then
#
# $$
# U \operatorname{diag}(d)\, U^\top + X X^\top
# = [U\ Q] \; \bigl( \text{a matrix with } r + K \text{ rows} \bigr) \; [U\ Q]^\top .
# $$
#
# The small matrix has the eigenvalues of the sum, and $[U\ Q]$ maps its eigenvectors to those of the sum. Before the
# next batch only the leading $r$ eigenpairs are kept.
#
# After this chapter you will be able to
#
# - update the eigenpairs of a moving average with a batch, exactly and without a matrix of the layer's size;
# - say what a truncation loses, why its error decays, and which number replaces the eigenvalues that were cut off;
# - tell for which layers the update is of low rank, and check that a run really used it;
# - apply the inverse to a gradient in factors, and say which costs are then linear in the width;
# - keep eigenvectors orthonormal where round-off destroys a plain implementation.
#
# ## One update
#
# Let $M = U \operatorname{diag}(d)\, U^\top$ with $r$ orthonormal columns in $U$, and let a batch add $X X^\top$, where
# $X$ has $K$ columns. The columns of the sum lie in the span of $U$ and $X$ together. So split $X$ into a part in the
# span of $U$ and a part orthogonal to it, and let $Q$ be an orthonormal basis of the second part:
#
# $$
# X = U C + Q R , \qquad C = U^\top X , \qquad Q R = X - U C , \qquad U^\top Q = 0 .
# \tag{19.1}
# $$
#
# With $[U\ Q]$, the columns of both side by side, the sum is a small matrix in a known basis:
#
# $$
# M + X X^\top
# = [U\ Q]
# \underbrace{\left( \begin{bmatrix} \operatorname{diag}(d) & 0 \\ 0 & 0 \end{bmatrix}
# + \begin{bmatrix} C \\ R \end{bmatrix} \begin{bmatrix} C \\ R \end{bmatrix}^\top \right)}_{W \operatorname{diag}(e)\, W^\top}
# [U\ Q]^\top .
# \tag{19.2}
# $$
#
# The matrix in the middle has $r + K$ rows, or fewer if $Q$ has fewer than $K$ columns. Its eigenvalues $e$ are those
# of the sum, and all other eigenvalues of the sum are zero. The eigenvectors are the columns of $[U\ Q]\, W$, which are
# orthonormal, as $[U\ Q]$ and $W$ both have orthonormal columns. **The update is exact.** For a layer of width $p$ no
# matrix of size $p \times p$ occurs, and the cost is of the order of $p\, (r + K)^2 + (r + K)^3$. [Brand
# (2006)](bibliography.md#brand-svd) found the update for singular values. The code adds one column after the other:


# %%
def update_by_hand(U: Tensor, d: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    for x in X.T:  # add one column at a time
        c = U.T @ x
        rest = x - U @ c
        q = rest / rest.norm()
        h = torch.cat([c, rest.norm().reshape(1)])
        middle = torch.cat([d, torch.zeros(1)]).diag() + torch.outer(h, h)
        d, W = torch.linalg.eigh(middle)
        U = torch.cat([U, q[:, None]], 1) @ W
    return U, d


U, d, X = torch.linalg.qr(torch.randn(30, 4)).Q, torch.tensor([4.0, 3, 2, 1]), torch.randn(30, 3)
for update in (update_by_hand, brand_update):
    V, w = update(U, d, X)
    assert_exact(V.T @ V, torch.eye(7))
    assert_exact(from_pairs(V, w), from_pairs(U, d) + X @ X.T)

# %% [markdown]
# The package takes all columns at once. `split_by_span` is [(19.1)], and `reorthonormalized` removes round-off. The
# section [What goes wrong in practice](#what-goes-wrong-in-practice) shows both.

# %% tags=["beside", "remove-input"]
code(brand_update)

# %% [markdown]
# ## The average, and its tail
#
# A moving average is $(1 - w) M + w X X^\top$, where $X X^\top$ is the factor of the new batch. The factor of the
# inputs is $\tfrac1N \sum_n a_n a_n^\top$, so its columns are $a_n / \sqrt N$. The factor $B$ is a sum without
# $\tfrac1N$, and its columns are $g_{vn}$. The update adds the columns $\sqrt w\, X$.
#
# As in [Chapter 18](18_randomized.py), let all directions orthogonal to $U$ have a common eigenvalue, the tail
# $c$. The update then includes the tail without additional cost:
#
# <div class="admonition theorem" markdown="1" id="thm-19.1">
# <p class="admonition-title" markdown="1"><b>Theorem 19.1 (a tail is a shift)</b></p>
#
# Let $M = U \operatorname{diag}(d)\, U^\top + c\, (I - U U^\top)$ and $c' = (1 - w)\, c$. If $V, e$ are the eigenpairs
# [(19.2)] of $U \operatorname{diag} \bigl( (1 - w)\, d - c' \bigr)\, U^\top + w X X^\top$, then
#
# $$
# (1 - w) M + w X X^\top = V \operatorname{diag}(e + c')\, V^\top + c' (I - V V^\top) .
# \tag{19.3}
# $$
#
# </div>
#
# **Proof.** $M = U \operatorname{diag}(d - c)\, U^\top + c I$. Multiply by $1 - w$, add $w X X^\top$, and replace
# the part without $I$ by its eigenpairs: $V \operatorname{diag}(e)\, V^\top + c' I$. $\blacksquare$
#
# So an update maps a matrix with a tail to a matrix with a tail, exactly. For instance, an average that starts at the
# identity (an empty $U$ and $c = 1$) has the tail $\rho^t$ after $t$ batches of weight $1 - \rho$, if nothing is cut
# off. The author's code adds $\rho^t$ to the damping instead ([`solver_LA_utils.py`, line
# 9](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L9)),
# which gives the same inverse in this case.
#
# "The author's code" in this chapter is that repository, at this commit. The repository belongs to the author's thesis
# and not to the paper, whose abstract names no code. Its algorithms are called B, B-R and B-R-C, and
# its scripts train them beside KFAC, R-KFAC and SGD on CIFAR-10, CIFAR-100 and ImageNet.

# %% tags=["beside", "remove-input"]
code(updated_factor)


# %% tags=["hide-input"] fold="Checked: without truncation the update is exact, from zero and from the identity"
def none(d: int, c: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """No eigenpairs, and a tail."""
    return torch.zeros(d, 0), torch.zeros(0), torch.tensor(c)


zero, one, exact = none(60), none(60, c=1.0), torch.zeros(60, 60)
for _ in range(6):
    X = torch.randn(60, 3)
    zero, one = (updated_factor(f, X, 0.1, 20, trace_matched) for f in (zero, one))
    exact = 0.9 * exact + 0.1 * X @ X.T
assert zero[0].shape == (60, 18)
assert_exact(from_pairs(*zero), exact)  # nothing was cut off yet
assert_exact(from_pairs(*one), exact + 0.9**6 * torch.eye(60))

# %% [markdown]
# ## Truncation is the only error
#
# Every batch adds up to $K$ eigenpairs. Before the next batch the state is truncated to its leading $r$. An inverse
# between two batches uses all $r + K$. Apart from round-off, the truncation is the only step that causes an error.
#
# <div class="admonition theorem" markdown="1" id="thm-19.2">
# <p class="admonition-title" markdown="1"><b>Theorem 19.2 (errors add up, and decay)</b></p>
#
# Let $M_t$ be the exact average after batch $t$ and $\hat M_t$ the one of the updates, both with the constant weight
# $1 - \rho$ and from the same start. Let $T_i$ be the matrix before the truncation that follows batch $i$ less the one
# after it. Then
#
# $$
# M_t - \hat M_t = \sum_{i \lt t} \rho^{t - i}\, T_i .
# \tag{19.4}
# $$
#
# Without a tail, all $T_i \succeq 0$, so $\hat M_t \preceq M_t$. With the tail that matches the trace, all
# $\operatorname{tr} T_i = 0$, so $\operatorname{tr} \hat M_t = \operatorname{tr} M_t$.
#
# </div>
#
# **Proof.** The update itself is exact, so $\hat M_{t+1} = \rho\, (\hat M_t - T_t) + (1 - \rho) X X^\top$ with the
# columns $X$ of batch $t + 1$. Subtract this equation from $M_{t+1} = \rho M_t + (1 - \rho) X X^\top$: the error
# $E_t = M_t - \hat M_t$ satisfies $E_{t+1} = \rho\, (E_t + T_t)$ and is zero at the start. Without a tail, $T_i$ is the
# part that was cut off, and its eigenvalues are not negative. The matched tail keeps the trace in every truncation.
# $\blacksquare$

# %% tags=["hide-input"] fold="Checked: the error is the sum (19.4), and positive semi-definite without a tail"
factor, exact, errors = none(60), torch.zeros(60, 60), torch.zeros(60, 60)
for _ in range(20):
    X = torch.randn(60, 3)
    cut = from_pairs(*factor) - from_pairs(*truncated(factor, 10, zero_tail))
    factor, errors = updated_factor(factor, X, 0.1, 10, zero_tail), 0.9 * (errors + cut)
    exact = 0.9 * exact + 0.1 * X @ X.T
assert_exact(exact - from_pairs(*factor), errors)
assert torch.linalg.eigvalsh(errors)[0] > -1e-12
print(f"relative error after 20 batches: {relative_error(from_pairs(*factor), exact):.2f}")

# %% [markdown]
# ### Which tail?
#
# In this package the tail is a part of the matrix that is updated. The author's code has no tail between updates. For
# an inverse, that code gives all other directions the smallest eigenvalue of the state ([line
# 7](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L7-L13)).
# Do the two rules differ in accuracy? We update with a stream of batches, with variances that decay and directions that
# drift, and compare the inverse of the damped average with the exact one. Three rows use a rule for the tail in every
# update, and "tail at the end only" is the rule of the author's code. The last row truncates the *exact* average to 24
# eigenpairs and the matched tail; the updates have eight more between truncations. The errors are means over the last
# 40 batches.


# %% tags=["hide-input"] fold="Measured: the inverse of a drifting average, with four rules for the tail"
def stream(batches: int, rate: float, drift: float, d: int = 120, N: int = 8) -> list[Tensor]:
    """Columns of batches; their principal directions turn slowly."""
    torch.manual_seed(0)
    Q, scale = torch.linalg.qr(torch.randn(d, d)).Q, 10 ** (-rate * torch.arange(d))
    Z = drift * torch.randn(d, d) / d**0.5
    turn, found = torch.linalg.matrix_exp(Z - Z.T), []  # a rotation by a small angle
    for _ in range(batches):
        found.append(Q @ (scale[:, None] * torch.randn(d, N)) / N**0.5)
        Q = turn @ Q
    return found


def inverse_error(M: Tensor, exact: Tensor, gamma: float = 0.1) -> float:
    eye = gamma * torch.linalg.matrix_norm(exact, 2) * torch.eye(len(M))
    return relative_error(torch.linalg.inv(M + eye), torch.linalg.inv(exact + eye))


def best(M: Tensor, rank: int) -> Tensor:
    """The leading eigenpairs of the exact average, and the trace-matched tail."""
    d, U = (t.flip(-1) for t in psd_eigh(M))
    return from_pairs(U[:, :rank], d[:rank], trace_matched(d[:rank], M.trace(), len(M)))


rank, batches = 24, stream(100, rate=0.02, drift=0.02)
states = {"trace_matched": none(120), "zero_tail": none(120), "smallest_kept": none(120)}
tails = {f.__name__: f for f in (trace_matched, zero_tail, smallest_kept)}
exact, early, history = torch.zeros(120, 120), None, []
for t, X in enumerate(batches, start=1):
    w = weight_of_newest(0.95, t)
    exact = (1 - w) * exact + w * X @ X.T
    states = {k: updated_factor(f, X, w, rank, tails[k]) for k, f in states.items()}
    row = {f"tail: {k}": inverse_error(from_pairs(*f), exact) for k, f in states.items()}
    U, d, _ = states["zero_tail"]
    row["tail at the end only"] = inverse_error(from_pairs(U, d, d[-1]), exact)
    history.append(row | {"truncated average": inverse_error(best(exact, rank), exact)})
    early = exact if t == 60 else early
mean = {k: sum(row[k] for row in history[60:]) / 40 for k in history[-1]}
for name, value in mean.items():
    print(f"{name:22} {value:.3f}")
assert_exact(from_pairs(*states["trace_matched"]).trace(), exact.trace())
assert mean["tail: trace_matched"] < 1.2 * mean["truncated average"]
assert mean["tail: trace_matched"] < mean["tail at the end only"] < mean["tail: smallest_kept"]
assert mean["tail: trace_matched"] < mean["tail: zero_tail"]

# %% tags=["hide-input"] alt="Error of the damped inverse against the number of batches, with four rules for the tail and for the truncated exact average. The trace-matched tail is lowest, just below the truncated exact average. With a tail at the end only and without a tail, errors at the end are larger; with a tail of the smallest kept eigenvalue they are largest." caption="Error of the damped inverse while 100 batches go by, truncated to 24 eigenpairs of 120 before every update. The trace-matched tail has nearly the error of the truncated exact average (dashed), for which the whole matrix is needed."
fig, ax = plt.subplots(figsize=(6.8, 3.5), layout="constrained")
raised = (-0.01, 0.05, 0.0, 0.02, -0.06)  # so that labels do not meet
for number, (name, up) in enumerate(zip(history[-1], raised, strict=True)):
    values = [row[name] for row in history]
    dashes = "--" if name == "truncated average" else "-"
    ax.plot(range(1, 101), values, dashes, color=f"C{number}")
    ax.text(102, values[-1] + up, name, color=f"C{number}", va="center", fontsize="small")
ax.set(xlabel="batches", ylabel="error of the inverse", ylim=(0, None), xlim=(0, 145))
ax.set_xticks(range(0, 101, 20))
plt.show()

# %% [markdown]
# On this stream the trace-matched tail is as accurate as the truncated exact average, for which the whole matrix is
# needed. A direction that was cut off keeps the eigenvalue $c$. When the data return to this direction, its eigenvalue
# starts from $c$ and not from zero, which helps if $c$ is near the eigenvalues that were cut off. The smallest kept
# eigenvalue is never below them, so that with this tail all $T_i \preceq 0$, and these errors add up by [(19.4)].
#
# The next figure shows such a stream batch by batch, with 16 rows and 2 columns a batch.

# %% tags=["hide-input"] fold="Code of the figure"
figure = online_eigenpairs(
    stream(30, rate=0.12, drift=0.05, d=16, N=2), ranks=(2, 4, 6, 10), seen=12
)
errors, shares = (figure.numbers[name] for name in ("errors", "shares"))
first, last = ([row[t] for row in errors] for t in (0, 29))
assert max(first) < 1e-10
assert max(errors[0][1], *errors[3][:6]) < 1e-10
assert min(errors[0][2], errors[3][6]) > 1e-6
assert last == sorted(last, reverse=True)
assert last[0] > 10 * last[3]
assert min(row[29][0] for row in shares) > 0.99
figure

# %% [markdown]
# As long as nothing was cut off, B-KFAC's factor is the exact average: with $r = 10$ for 6 batches, with $r = 2$ for the
# first two only. From then on the error depends on $r$. The eigenvector of the largest eigenvalue is in the span of
# B-KFAC's eigenvectors for all four ranks, up to 1 %. What a small rank lacks is behind the dashed line.
#
# ## In the package
#
# An estimator ([`estimators`](api/approximations.estimators.md)) maps a state, a batch and its weight to the next
# state. `MovingAverage(kfac)` is the moving average of KFAC's factors. The state of `Brand(rank)` has the eigenpairs
# and the tails of both factors. It represents a matrix that can be multiplied and inverted.

# %% tags=["beside", "remove-input"]
code(Brand.update)

# %% [markdown]
# We make up ten batches of 4 data for a layer with 90 inputs and 70 outputs. With rank 40 nothing is cut off, and the
# inverse is that of KFAC's average. With smaller ranks the step has an error, but the trace is still KFAC's:


# %% tags=["hide-input"] fold="Checked: rank 40 is exact. Measured: the error of a step for smaller ranks"
def follow(estimator: Estimator, ios: list[LayerIO]):
    state = None
    for t, io in enumerate(ios, start=1):
        state = estimator.update(state, io, weight_of_newest(0.95, t))
    return state


def made_up(d_in: int, d_out: int, N: int = 4) -> LayerIO:
    a, g = (torch.randn(N, 1, d) * 0.9 ** torch.arange(d) for d in (d_in, d_out))
    return LayerIO(a, g.unsqueeze(0))


ios = [made_up(90, 70) for _ in range(10)]
G = torch.randn(70, 90)
K = follow(MovingAverage(kfac), ios)
assert_exact(follow(Brand(rank=40), ios).inverse(0.1) @ G, K.inverse(0.1) @ G)  # 40 columns in all
for rank in (4, 8, 16, 32):
    M = follow(Brand(rank), ios)
    error = relative_error(M.inverse(0.001) @ G, K.inverse(0.001) @ G)
    print(f"rank {rank:2}: {M.UA.shape[1]} eigenpairs, error of a step {error:.3f}")
    assert_exact(M.trace(), K.trace())
assert error < 0.1

small = [made_up(11, 7) for _ in range(10)]  # too small for a truncation to make sense
assert_exact(follow(Brand(rank=8), small).dense(), follow(MovingAverage(kfac), small).dense())

# %% [markdown]
# ### When the low-rank update does not run
#
# A batch has $N S$ rows of inputs and $V N S$ rows of vectors. If $r + N S$ exceeds $d_\text{in}$, the low-rank update
# of $A$ saves nothing: unless rows are linearly dependent, its small matrix has all $d_\text{in}$ rows. For $B$ the
# condition is $r + V N S \gt d_\text{out}$. The package then decomposes the factor in full, and the result is KFAC's.
# **Most convolutions have too many positions** $S$ for the low-rank update. Type-2 vectors, $V = C - 1$, can be too
# many as well; Monte Carlo and empirical vectors have $V = 1$. One function decides at every update:

# %% tags=["beside", "remove-input"]
code(is_low_rank_update)

# %% tags=["hide-input"] fold="Asked: rank 64, three widths, three sizes of a batch"
print("rank 64, batches of N samples with one position and one vector: is the update of low rank?")
for width in (101, 257, 1025):
    answers = {N: is_low_rank_update(width, 64, N) for N in (32, 128, 700)}
    print(
        f"width {width:4}: ",
        ", ".join(f"N = {N}: {'yes' if a else 'no'}" for N, a in answers.items()),
    )
assert not is_low_rank_update(101, 64, 128)
assert is_low_rank_update(1025, 64, 700)

# %% [markdown]
# A run in which all answers are "no" has the name B-KFAC and the results of KFAC. An autoencoder of widths up to 101
# with batches of 700 images is such a case: B-KFAC on this network would be KFAC, so that [Chapter
# 23](23_comparison.py) trains B-KFAC on a wider one. The author's code has the same rule: a factor gets low-rank
# updates if its layer is `Linear` and rank and batch together are below its size
# ([`distributed_B_kfac_lean_Kfactors_batchsize.py`, line
# 237](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/distributed_B_kfac_lean_Kfactors_batchsize.py#L237)),
# as the abstract says ("typically for all FC layers"). To know whether a run used the update, count the calls, as the
# section [In the optimizer](#in-the-optimizer) does.
#
# ## A gradient in factors
#
# The cost of applying the inverse is linear in the width, too, if no matrix of the layer's size is formed. The gradient
# of a batch is a product, $\sum_n g_n a_n^\top = \hat g^\top \hat a$. The rows of $\hat a$ are the inputs $a_n$, and
# those of $\hat g$ the vectors $g_n$ for the *data's* labels. If the approximated factors $\hat A, \hat B$ are damped
# separately, the inverse is applied to each side separately:
#
# $$
# P = \bigl[ \hat g\, (\hat B + \gamma_B I)^{-1} \bigr]^\top
# \bigl[ \hat a\, (\hat A + \gamma_A I)^{-1} \bigr] .
# \tag{19.5}
# $$
#
# Each bracket multiplies $K$ rows by a low-rank matrix plus a multiple of $I$. With $r$ eigenpairs and width $p$ this
# product costs $\mathcal{O}(K p\, r)$.

# %% tags=["beside", "remove-input"]
code(product_of_rows)

# %% tags=["hide-input"] fold="Checked: the product of rows is the step with both damped factors"
M = follow(Brand(rank=8), ios)
inverse = M.inverse_of_damped_factors(0.1, 0.2)
g, a = torch.randn(5, 70), torch.randn(5, 90)
h, b = product_of_rows(inverse, g, a)
assert_exact(h.T @ b, inverse @ (g.T @ a))
A, B = M.factors()
A, B = A + 0.1 * torch.eye(90), B + 0.2 * torch.eye(70)
assert_exact(h.T @ b, torch.linalg.solve(B, g.T @ a) @ torch.linalg.inv(A))

# %% [markdown]
# The step itself has $d_\text{out} d_\text{in}$ entries. Forming $h^\top b$, and adding it to the weights, costs
# $\mathcal{O}(d_\text{out} d_\text{in} K)$, as much as the gradient, which every method computes. Only the cost that
# B-KFAC *adds* is **linear**. The table counts multiplications for a square layer, with $K = 128$ rows and $r = 64$,
# and with KFAC's inverses as four products with eigenvectors:

# %% tags=["hide-input"] fold="Counted: multiplications of the gradient and of three methods"
K_rows, r = 128, 64
print("   width     gradient     KFAC adds     RS-KFAC adds     B-KFAC adds")
for width in (512, 2048, 8192, 32768):
    gradient, kfac_adds = K_rows * width**2, 4 * width**3
    rs_adds, brand_adds = 4 * r * width**2, 2 * 2 * K_rows * width * (r + K_rows)
    print(f"{width:8} {gradient:12.1e} {kfac_adds:13.1e} {rs_adds:16.1e} {brand_adds:15.1e}")
assert brand_adds < 0.05 * gradient < rs_adds < 0.05 * kfac_adds

# %% [markdown]
# At large widths the added cost is small compared with the gradient. The narrower the layer, the smaller is the gain,
# and below a width of $r + K$ the low-rank update does not run. Momentum and weight decay act on the formed step.
#
# [Figure 19.3] shows the stored result of the repository's benchmark, `python -m benchmarks.scaling`: times
# of one square layer on one thread, with a batch of fixed size ([Chapter 18](18_randomized.py) describes how they are
# measured).

# %% tags=["hide-input"] alt="Two log-log plots of time against width. Left, updates of one factor's inverse: KFAC rises most steeply, then RS-KFAC; B-KFAC and SKFAC have slope one at large widths. In the narrowest layer B-KFAC is slowest. Right, what a step adds: KFAC and RS-KFAC above, B-KFAC and SKFAC below them. From a width of about 1000 the cost of the gradient is between the two pairs, at smaller widths it is lowest." caption="Time against the width: an update of one factor's inverse (left), and what a step adds to the gradient (right). At large widths B-KFAC and SKFAC have slope one in both, and add less than the gradient (dashed) costs. In the narrowest layer B-KFAC's update is the slowest."
file = RESULTS / "scaling-cpu.json"
WIDTHS = [256, 2048, 16384]
LOOKS = {"K-FAC": style("KFAC"), "RS-KFAC": {"color": "C1", "marker": "^"}}
LOOKS |= {"B-KFAC": {"color": "C3", "marker": "s"}, "SKFAC": {"color": "C4", "marker": "d"}}
LOOKS |= {"gradient": style("gradient") | {"linestyle": "--"}}
scaling = json.loads(file.read_text()) if file.exists() else None
if scaling is None:
    print("No stored benchmark here: clone the repository and run python -m benchmarks.scaling")
else:
    fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.8), layout="constrained", sharey=True)
    for ax, part in zip(axes, ("update", "apply"), strict=True):
        for method, look in LOOKS.items():
            wanted = (method, "share" if method == "gradient" else part)
            points = [r for r in scaling["rows"] if (r["method"], r["part"]) == wanted]
            if method != "gradient" or part == "apply":
                widths = [r["width"] for r in points]
                times = [sorted(r["seconds"])[len(r["seconds"]) // 2] for r in points]
                (line,) = ax.loglog(widths, times, **look, markersize=4)
                end, name = (1.15 * widths[-1], times[-1]), method.replace("K-FAC", "KFAC")
                at = {"B-KFAC": "bottom", "SKFAC": "top"}.get(method, "center")
                ax.text(*end, name, color=line.get_color(), va=at, fontsize="small")
        ax.set(title={"update": "update of a factor", "apply": "added to a step"}[part])
        ax.set(xlabel="width", xlim=(None, 1e5))
        ax.set_xticks(WIDTHS, labels=[str(d) for d in WIDTHS])
        ax.minorticks_off()
    axes[0].set_ylabel("seconds")
    plt.show()

# %% tags=["hide-input"] fold="Printed: fitted powers, crossings and errors. Checked: two methods are nearly linear"
if scaling is not None:
    print(f"{scaling['processor']}, {scaling['threads']} thread, rank {scaling['rank']}")
    for row in scaling["exponents"]:
        if row["method"] in ("K-FAC", "RS-KFAC", "B-KFAC", "SKFAC"):
            low, high = row["interval"]
            print(f"{row['method']:8} {row['part']:6} grows as d^{row['exponent']:.2f}", end="")
            print(f" ({low:.2f} to {high:.2f}) for d in {row['widths']}")
    print("faster than K-FAC from width")
    for method in ("RS-KFAC", "B-KFAC", "SKFAC"):
        print(f"    {method:8}", scaling["faster than K-FAC from"][method])
    print(f"error of the damped inverse at width {scaling['errors']['width']}")
    for method, error in scaling["errors"]["of the inverse"].items():
        print(f"    {method:24} {error:.3f}")
    power = {(r["method"], r["part"]): r["exponent"] for r in scaling["exponents"]}
    linear = [power[m, p] for m in ("B-KFAC", "SKFAC") for p in ("update", "apply")]
    assert max(linear) < 1.5 < power["RS-KFAC", "update"] < 2.5 < power["K-FAC", "update"]

# %% [markdown]
# The expected powers are 3 for KFAC, 2 for RS-KFAC, and 1 for B-KFAC and [SKFAC](17_skfac.py). SKFAC has the lowest
# cost, because it uses the last batch only, and therefore has a larger error. B-KFAC includes earlier batches, at a
# cost that is larger by a constant factor. Its eigenpairs contain only batches with which they were updated. If every
# batch is to count, the update is needed at every step, while KFAC and RS-KFAC may invert less often.
#
# ## Training
#
# We train the network of [Chapter 18](18_randomized.py) in the same way, once with the moving average of KFAC's factors
# and once with B-KFAC of rank 32:

# %% tags=["hide-input"] fold="Measured: losses with KFAC and with B-KFAC"
digits = load_digits()
order = torch.randperm(len(digits.target), device="cpu")
images = torch.tensor(digits.data, device=device)[order] / 16
labels = torch.tensor(digits.target, device=device)[order]
loss = CrossEntropyLoss()


def train(estimator: Estimator, steps: int = 30, period: int = 5) -> tuple[list[float], dict]:
    """Losses on 1500 images before every step, and the curvature after the last one."""
    torch.manual_seed(1)
    model = Sequential(Linear(64, 256), Tanh(), Linear(256, 256), Tanh(), Linear(256, 10))
    states, losses, params = {}, [], dict(model.named_parameters())
    for t in range(1, steps + 1):
        batch = torch.randint(1500, (64,))
        X, y = images[batch], labels[batch]
        for name, io in layer_ios(model, loss, X, y, monte_carlo(1)).items():
            states[name] = estimator.update(states.get(name), io, weight_of_newest(0.95, t))
        if t % period == 1:
            inverses = {name: M.inverse(0.01) for name, M in states.items()}
        losses.append(loss(model(images[:1500]), labels[:1500]).item())
        gradient = torch.autograd.grad(loss(model(X), y), list(params.values()))
        step = preconditioner(model, inverses)(dict(zip(params, gradient, strict=True)))
        inner = sum((step[k] * g).sum() for k, g in zip(params, gradient, strict=True))
        with torch.no_grad():
            for k, p in params.items():
                p -= min(1.0, float(0.01 / inner) ** 0.5) * step[k]
    return losses, states


curves = {"KFAC": train(MovingAverage(kfac))[0]}
curves["B-KFAC"], states = train(Brand(rank=32))
print("step       1     6    11    16    21    26")
for name, curve in curves.items():
    print(f"{name:7}", " ".join(f"{value:5.2f}" for value in curve[::5]))
print(
    f"the middle layer: {states['2'].UA.shape[1]} eigenpairs of 257 and {states['2'].UB.shape[1]} of 256"
)
difference = max(abs(x - y) / x for x, y in zip(*curves.values(), strict=True))
print(f"largest difference of the losses: {difference:.1%}")
assert max(curve[-1] for curve in curves.values()) < 0.5
assert difference < 0.5

# %% [markdown]
# In this run the eigenpairs give nearly the losses of the full factors. The experiment does not test the paper's claim,
# which is about time: for a slightly modified VGG16_bn on CIFAR-10, two of the three algorithms are faster than RS-KFAC
# for any target test accuracy. The same abstract states limits: the inverses are less accurate than those of RS-KFAC,
# and the algorithms reach 91 % sooner than SENG, another method, but underperform it for higher accuracies.
#
# ## Two repairs
#
# If a dense factor fits into memory, the errors of truncation can be repaired from time to time. The dense average $M$
# is kept beside the eigenpairs, and every $T$ batches
#
# - **B-R-KFAC** replaces the eigenpairs by those of RS-KFAC;
# - **B-KFAC-C** corrects a random share of them, as the code does
#   ([`B_R_C_utils_for_C.py`, line 3](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/B_R_C_utils_for_C.py#L3-L17)).
#   Let $U_S$ be the chosen eigenvectors. They are replaced by the Ritz
#   pairs of $M$ in their span: $U_S^\top M\, U_S = W \operatorname{diag}(\mu)\, W^\top$,
#   $U_S \leftarrow U_S W$, $d_S \leftarrow \mu$.

# %% tags=["beside", "remove-input"]
code(refreshed, ritz)

# %% [markdown]
# <div class="admonition theorem" markdown="1" id="thm-19.3">
# <p class="admonition-title" markdown="1"><b>Theorem 19.3 (a correction never increases the error)</b></p>
#
# Let $\hat M = U \operatorname{diag}(d)\, U^\top + c\, (I - U U^\top)$ be the matrix before the correction and
# $\hat M'$ the one after it, with the same tail $c$. In the Frobenius norm
#
# $$
# \lVert M - \hat M' \rVert^2 = \lVert M - \hat M \rVert^2
# - \lVert U_S^\top (M - \hat M)\, U_S \rVert^2 .
# \tag{19.6}
# $$
#
# </div>
#
# **Proof.** Complete $U_S$ to an orthonormal basis. In this basis $\hat M$ has no entries between $S$ and the
# rest, since the columns of $U$ are eigenvectors. $\hat M'$ differs from $\hat M$ in the block of $S$ only, where it
# equals $M$. So the squared error decreases by exactly the share of this block. $\blacksquare$
#
# A correction changes eigenvalues and rotates eigenvectors within their span, which stays the same. So no correction
# finds a direction that was cut off. The theorem is about the error of the matrix, not about that of its inverse.

# %% tags=["hide-input"] fold="Checked: (19.6), and that the span stays, in 100 corrections"
d, U = (t.flip(-1)[..., :24] for t in psd_eigh(early))  # eigenpairs of forty batches ago
M, c, old = exact, 0.01, relative_error(from_pairs(U, d, 0.01), exact)
for _ in range(100):
    S = torch.randperm(24)[:6]
    mu, V = ritz(M, d, U, S)
    before, after = ((M - from_pairs(*pairs, c)).square().sum() for pairs in ((U, d), (V, mu)))
    gain = (U[:, S].T @ (M - from_pairs(U, d, c)) @ U[:, S]).square().sum()
    assert abs(before - after - gain) < 1e-10 * before
    assert_exact(V @ V.T, U @ U.T)
    U, d = V, mu
new = relative_error(from_pairs(U, d, c), M)
print(f"error {old:.3f} before, {new:.3f} after 100 corrections of six eigenpairs")

# %% [markdown]
# How useful are the updates between two refreshes? The abstract says that they reduce the inversion error of
# RS-KFAC at little cost. We refresh once, take 20 more batches of a drifting stream, and compare 40 eigenpairs that
# were kept fixed with eigenpairs that were updated (up to 48 between truncations).

# %% tags=["hide-input"] fold="Measured: fixed, updated, corrected and refreshed eigenpairs"
vectors = torch.randn(1, 8, 1, 3)
drifting = [LayerIO(X.T.unsqueeze(1) * 8**0.5, vectors) for X in stream(80, rate=0.05, drift=0.03)]
average = follow(MovingAverage(kfac), drifting).A
sketch = Sketch(40)
at_60 = follow(Repaired(Brand(40), refreshed(sketch), period=60), drifting[:60])
assert_exact(at_60.dense(), Randomized(at_60.factors.A, at_60.factors.B, sketch).dense())
estimators = {
    "B-R, refreshed 20 batches ago": Repaired(Brand(40), refreshed(sketch), period=60),
    "B, never refreshed": Brand(40),
    "B-C, corrected every 5 batches": Repaired(Brand(40), corrected(0.2), period=5),
    "refreshed now": Repaired(Brand(40), refreshed(sketch), period=80),
}
found = {"fixed for 20 batches": inverse_error(at_60.modes.factors()[0], average)}
for name, estimator in estimators.items():
    state = follow(estimator, drifting)
    modes = state if isinstance(state, LowRankKronecker) else state.modes
    found[name] = inverse_error(modes.factors()[0], average)
for name, error in found.items():
    print(f"{name:32} error of the inverse {error:.3f}")
stale, followed_since, *_ = found.values()
assert followed_since < 0.5 * stale
assert found["B, never refreshed"] < 0.5 * stale

# %% [markdown]
# On this stream the updates reduce the error, as the abstract says: updated eigenpairs have less than half the error of
# fixed ones. The cost is not measured here. With updates, neither the refresh nor the corrections change the error
# much. Errors of old truncations decay by [(19.4)] in any case.
#
# ## In the optimizer
#
# All three algorithms are estimators, and the optimizer takes them as its `approximation=`. The optimizer saves and
# loads their state with its own. We train with each algorithm and count the calls of its parts:

# %% tags=["hide-input"] fold="Counted: calls of the four parts in 30 steps of three algorithms"
PARTS = {
    "low-rank updates": (parts_of_brand, "brand_update"),
    "updates in full": (parts_of_brand, "updated_in_full"),
    "sketches (R)": (parts_of_sketches, "range_basis"),
    "corrections (C)": (parts_of_brand, "ritz"),
}
three = {
    "B-KFAC": Brand(32),
    "B-R-KFAC": Repaired(Brand(32), refreshed(Sketch(32)), period=10),
    "B-KFAC-C": Repaired(Brand(32), corrected(0.2), period=5),
}
counts = {}
for name, approximation in three.items():
    torch.manual_seed(1)
    model = Sequential(Linear(64, 256), Tanh(), Linear(256, 256), Tanh(), Linear(256, 10))
    optimizer = KFAC(model, loss, approximation=approximation, damping=1e-3, factor_every=1)
    with ExitStack() as stack:
        spies = {
            what: stack.enter_context(patch.object(where, part, wraps=getattr(where, part)))
            for what, (where, part) in PARTS.items()
        }
        for _ in range(30):
            batch = torch.randint(1500, (64,))
            optimizer.zero_grad()
            loss(model(images[batch]), labels[batch]).backward()
            optimizer.observe(images[batch], labels[batch])
            optimizer.step()
    counts[name] = {what: spy.call_count for what, spy in spies.items()}
    final = loss(model(images[:1500]), labels[:1500]).item()
    print(
        f"{name:8} loss {final:.2f};", ", ".join(f"{n} {w}" for w, n in counts[name].items() if n)
    )
    assert final < 0.5
assert set(counts["B-KFAC"].values()) == {121, 59, 0}
assert counts["B-R-KFAC"]["sketches (R)"] == 5 * 3
assert counts["B-KFAC-C"]["corrections (C)"] == 6 * 6

# %% [markdown]
# Three layers have six factors. Two of them are too small for 32 eigenpairs and 64 columns: the factor of the 65 inputs
# and the factor of the 10 outputs. Both are decomposed in full in all 30 updates, with one exception: the 64 columns of
# the first batch fit into the factor of the inputs, because there are no eigenpairs yet. Sketches are made of all
# factors but the smallest.
#
# `invert=ContinuedInverse()` has the tail of the author's code, and its damping, which is a fraction of the largest
# eigenvalue as in [Chapter 18](18_randomized.py):

# %% tags=["beside", "remove-input"]
code(ContinuedInverse.__call__)

# %% tags=["hide-input"] fold="Checked: ContinuedInverse() inverts factors with that tail and that damping"
M = follow(Brand(8, zero_tail), ios)
A, B = (from_pairs(U, d, d[-1]) for U, d in ((M.UA, M.dA), (M.UB, M.dB)))
A, B = (F + 0.1 * torch.linalg.eigvalsh(F)[-1] * torch.eye(len(F)) for F in (A, B))
assert_exact(ContinuedInverse()(M, 0.1) @ (B @ G @ A), G)

# %% [markdown]
# ## What goes wrong in practice
#
# **A batch that adds nothing.** If $X$ lies in the span of $U$, then $X - UC$ of [(19.1)] is zero in exact arithmetic.
# On a computer the difference is round-off, a matrix of tiny numbers that is *not* orthogonal to $U$. A QR
# decomposition scales its columns to length one, and they enter $[U\ Q]$. Such batches arise from repeated data, from
# units that are dead, or if the average already contains all directions of the data. The author's code uses this QR
# ([`Brand_S_subroutine.py`, line
# 28](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/Brand_S_subroutine.py#L28)).
# That code also truncates to $r$ eigenpairs before every update ([line
# 14](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/Brand_S_subroutine.py#L14-L21)),
# which removes the wrong directions as long as there are $r$ right ones. We try two ranks, with an average of rank
# eight:


# %%
def naive_update(U: Tensor, d: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    C = U.T @ X
    Q, R = torch.linalg.qr(X - U @ C)
    H = torch.cat([C, R])
    w, W = torch.linalg.eigh(torch.cat([d, torch.zeros(len(R))]).diag() + H @ H.T)
    return (torch.cat([U, Q], 1) @ W).flip(1), w.flip(0)


U, d = torch.linalg.qr(torch.randn(100, 8)).Q, torch.linspace(3, 1, 8)
X = U @ torch.randn(8, 8)  # nothing that U does not have
M = from_pairs(U, d) + 10 * X @ X.T
wrong = {}
for update, rank in ((naive_update, 8), (naive_update, 16), (brand_update, 16)):
    V, w = U, d
    for _ in range(10):
        V, w = update(V[:, :rank], w[:rank], X)
    inverse = 10 * torch.eye(100) + V * (1 / (w + 0.1) - 10) @ V.T  # (18.7)
    wrong[update, rank] = relative_error(inverse, torch.linalg.inv(M + 0.1 * torch.eye(100)))
    orthogonality = (V.T @ V - torch.eye(len(w))).norm().item()
    print(
        f"{update.__name__:12} r = {rank:2}: {len(w):2} pairs, |V'V - I| = {orthogonality:.0e},",
        end=" ",
    )
    print(f"error of M {relative_error(from_pairs(V, w), M):.0e},", end=" ")
    print(f"of its inverse {wrong[update, rank]:.0e}")
    assert relative_error(from_pairs(V, w), M) < 1e-12
assert max(wrong[naive_update, 8], wrong[brand_update, 16]) < 1e-12 < 1e-7
assert wrong[naive_update, 16] > 1e-7

# %% [markdown]
# With $r = 8$ the naive inverse is as accurate as the package's. With $r = 16$, which exceeds the rank of the average,
# wrong directions are kept and enter the next update. The sum $V \operatorname{diag}(w)\, V^\top$ is right in all
# cases, because [(19.2)] uses only $X = UC + QR$. The *inverse* is wrong, because [(18.7)] needs orthonormal columns. A
# test that compares matrices does not find this fault; a test that compares inverses does. Whether the fault occurred
# in the author's experiments is not known. A rank below the average's, or a little noise in all directions, avoids it.

# %% tags=["remove-input"]
code(split_by_span, reorthonormalized)

# %% [markdown]
# The package projects twice, a known remedy for Gram-Schmidt. It then computes a basis that reveals the rank, and drops
# directions below the precision. A computed direction just above the precision still has a part in the span of $U$, so
# the basis is projected once more. Directions are dropped by the precision and not by a coarser bound: a part of $X$
# that is $10^{-9}$ of the whole adds only $10^{-18}$ in $R R^\top$, but $10^{-9}$ in the product $C R^\top$. Finally,
# round-off makes $[U\ Q]\, W$ slightly less orthonormal in every update, and these deviations add up. A step
# $U \leftarrow U\, (3 I - U^\top U) / 2$ replaces a small deviation by one of the order of its square:


# %% tags=["hide-input"] fold="Measured: orthogonality after 300 updates in single precision, without and with the step"
def without_the_step(U: Tensor, d: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    C, Q, R = split_by_span(U, X)
    H = torch.cat([C, R])
    w, W = torch.linalg.eigh(torch.cat([d, d.new_zeros(len(R))]).diag() + H @ H.T)
    return (torch.cat([U, Q], 1) @ W).flip(1), w.flip(0)


deviations = []
for update in (without_the_step, brand_update):
    torch.manual_seed(0)
    U, d = torch.zeros(80, 0, dtype=torch.float32), torch.zeros(0, dtype=torch.float32)
    for _ in range(300):
        X = 0.9 ** torch.arange(80)[:, None] * torch.randn(80, 8)
        U, d = update(U[:, :30], 0.95 * d[:30], X.float())
    deviations.append((U.T @ U - torch.eye(38, dtype=torch.float32)).abs().max().item())
    print(f"{update.__name__:16} after 300 updates: |U'U - I| = {deviations[-1]:.0e}")
assert deviations[1] < 3e-6
assert deviations[0] > 3 * deviations[1]

# %% [markdown]
# **The wrong end of the spectrum.** `eigh` returns eigenvalues in ascending order, so its first $r$ are the smallest.
# The functions here return eigenvalues in descending order.
#
# **The weight without the root.** Columns enter as $X X^\top$, so a weight $w$ multiplies $X$ by $\sqrt w$. With the
# factor $w$ instead of $\sqrt w$ the batch has the weight $w^2$, which is too small, and no error is raised:

# %%
X = torch.randn(30, 3)
V, w = brand_update(torch.zeros(30, 0), torch.zeros(0), 0.05 * X)
assert_exact(from_pairs(V, w), 0.05**2 * X @ X.T)

# %% [markdown]
# ## The paper and this package
#
# What is in [Puiu (2022)](bibliography.md#brand), as far as its abstract tells, and what is here. Entries that begin
# with "code" are taken from the author's code (above); whether the paper does the same is not checked.
#
# | | the paper | here |
# | --- | --- | --- |
# | algorithms | three, of the update, a correction and RS-KFAC; the code has B, B-R and B-R-C, which refreshes and corrects | `Brand`, `Repaired` with `refreshed` or with `corrected`; not both repairs at once |
# | basis of a batch | code: [QR without a test of the rank](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/Brand_S_subroutine.py#L28) | projected twice, and directions of round-off dropped |
# | truncation | code: before the next update, or [at once](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/Brand_S_subroutine.py#L93-L97) as in its [script for CIFAR-10](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/example_shell_files/CIFAR10_sh_files/trun_1_GPU_B_R_C_KFAC_lean_Cifar10.sh) | before the next update |
# | tail | code: none between updates, [the smallest eigenvalue at an inverse](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L7) | a part of the matrix, `trace_matched`; `Brand(rank, zero_tail)` with `ContinuedInverse()` for the code's |
# | start of the average | code: the identity, [as $\rho^t$ in the damping](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L9) | none |
# | damping | code: [each factor by a fraction of its largest eigenvalue](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L9) | `factored_inverse`; `ContinuedInverse()` for the code's |
# | application | linear in the width; the code applies the inverses [to the formed gradient](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/distributed_B_kfac_lean_Kfactors_batchsize.py#L604-L607), which is quadratic | `product_of_rows` is linear; the optimizer applies the inverse to the formed gradient, at the price of RS-KFAC's |
# | layers | typically all fully connected ones | any; too narrow ones are updated in full |
# | rank | code: [220](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/distributed_B_R_C_kfac_lean_Kfactors_batchsize.py#L39); or [adaptive, 5 down or 10 up, 70 at least](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/adaptive_rank_utils.py#L59-L66) | 64, constant |
# | schedule | code: B-updates [every 5 and later every update of factors, C every 5 and later every 2 B-updates](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/schedules/BRC_schedules.py#L12-L18), of a [share .2](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/distributed_B_R_C_kfac_lean_Kfactors_batchsize.py#L64-L65); R [every 5 and later every 2 inversions](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/schedules/BR_schedules.py#L15); [decay .95](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/distributed_B_R_C_kfac_lean_Kfactors_batchsize.py#L32) | B with every update, `period` chosen; share .2 |
# | headline | CIFAR-10 with a slightly modified VGG16_bn: two of the three sooner than RS-KFAC at any target test accuracy; 91 % sooner than SENG, but worse than it for higher accuracies | on layers with 1025 inputs ([Chapter 23](23_comparison.py)) the three are ahead of KFAC, and B-KFAC is ahead of RS-KFAC in seconds; SENG not tested, because it is not in this package |
#
# ## In one minute
#
# - **Update.** A batch of $K$ columns changes $r$ eigenpairs to $r + K$ by an eigendecomposition of $r + K$ rows,
#   [(19.2)]. The update is exact, with a tail as well, and its cost is linear in the width.
# - **Error.** Apart from round-off, only the truncation to $r$ eigenpairs causes an error, and old errors decay with
#   the average, [(19.4)].
# - **Tail.** On a drifting stream the trace-matched tail was as accurate as the truncated exact average. The smallest
#   kept eigenvalue, as the tail of the updates, was the least accurate.
# - **Limit.** The update is of low rank only if $r$ and the rows of a batch fit into the width. Most convolutions and
#   narrow layers are decomposed in full. Count the calls.
# - **Repairs.** With dense factors in memory, B-R-KFAC refreshes the eigenpairs and B-KFAC-C corrects a share of them.
# - **Tests.** Compare inverses: columns that are not orthonormal can give the right matrix and a wrong inverse.
#
# ## Exercises
#
# **Exercise 19.1.** Start with $U$ empty and $c = 0$, and update with one batch of weight 1. Show that the damped
# inverse is that of Woodbury's identity,
# $(X X^\top + \gamma I)^{-1} = \tfrac1\gamma \bigl( I - X (X^\top X + \gamma I)^{-1} X^\top \bigr)$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The update is exact, so $U \operatorname{diag}(d)\, U^\top = X X^\top$, and both are the inverse of the same
# matrix. With a singular value decomposition $X = U \operatorname{diag}(s)\, Y^\top$, Woodbury's is
# $\tfrac1\gamma \bigl( I - U \operatorname{diag} \bigl( s^2 / (s^2 + \gamma) \bigr) U^\top \bigr)$, which is [(18.7)]
# for $c = 0$ and $d = s^2$. With one batch, B-KFAC has the inverse of [SKFAC](17_skfac.py).
#
# </details>
#
# **Exercise 19.2.** Let $\rho = 0.95$, and let there be no tail. Every truncation removes at most
# $\operatorname{tr} T_i \le \tau$. Bound the trace of the error.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# By [(19.4)], $\operatorname{tr} E_t \le \tau \sum_{k \ge 1} \rho^k = \tau \rho / (1 - \rho) = 19\, \tau$, for all
# times. Errors do not grow with the number of batches.
#
# </details>
#
# **Exercise 19.3.** The exact damping of the product, [(18.9)], can be applied to a gradient in factors as well. How
# many rows do the two factors of the step have?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With $G = \hat g^\top \hat a$ of $K$ rows, every term of [(18.9)] is a product of rows. The terms that begin with
# $U_B$ share $r_B$ rows on the left. The others are $\hat g^\top \bigl( w_{00} \hat a + \hat a\, U_A
# \operatorname{diag}(w_{0j} - w_{00})\, U_A^\top \bigr)$. So there are $K + r_B$ rows, and the cost is linear in the
# width.
#
# </details>
#
# **Exercise 19.4.** Write `follow_by_hand(U, d, c, X, w)`: the eigenpairs and the tail of
# $(1 - w) M + w X X^\top$ with $M = U \operatorname{diag}(d)\, U^\top + c\, (I - U U^\top)$, by [Theorem 19.1], with
# `torch.linalg.qr` and `torch.linalg.eigh` only. Do not form a matrix of $d$ rows and columns. Compare with
# `updated_factor`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def follow_by_hand(U, d, c, X, w):
#     C = U.T @ X
#     Q, R = torch.linalg.qr(X - U @ C)
#     H, new_c = torch.cat([C, R]), (1 - w) * c
#     shifted = torch.cat([(1 - w) * d - new_c, torch.zeros(len(R))])
#     e, W = torch.linalg.eigh(shifted.diag() + w * H @ H.T)
#     return torch.cat([U, Q], 1) @ W, e + new_c, new_c
# ```
#
# The plain QR is safe here because $X$ has parts outside of the span of $U$ that are not small.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
X, gamma = torch.randn(30, 3), 0.1  # 19.1
U, d, c = updated_factor(none(30), X, 1.0, 5, zero_tail)
woodbury = X @ torch.linalg.inv(X.T @ X + gamma * torch.eye(3)) @ X.T
inverse = torch.eye(30) / gamma + (U * (1 / (d + gamma) - 1 / gamma)) @ U.T
assert_exact(inverse, (torch.eye(30) - woodbury) / gamma)

assert abs(sum(0.95**k for k in range(1, 2000)) - 19) < 1e-10  # 19.2

M = follow(Brand(rank=8), ios)  # 19.3
delta, w = 0.1, M.inverse(0.1)
X = M.UB.T @ g.T  # [r_B, K]
middle = w.both - w.left.unsqueeze(1) - w.right + w.rest
left = torch.cat([g, M.UB.T])
b = w.rest * a + (a @ M.UA * (w.right - w.rest)) @ M.UA.T
below = (w.left - w.rest).unsqueeze(1) * (X @ a) + (middle * (X @ (a @ M.UA))) @ M.UA.T
assert_exact(left.T @ torch.cat([b, below]), M.inverse(delta) @ (g.T @ a))


def follow_by_hand(
    U: Tensor, d: Tensor, c: Tensor, X: Tensor, w: float
) -> tuple[Tensor, Tensor, Tensor]:  # 19.4
    C = U.T @ X
    Q, R = torch.linalg.qr(X - U @ C)
    H, new_c = torch.cat([C, R]), (1 - w) * c
    shifted = torch.cat([(1 - w) * d - new_c, torch.zeros(len(R))])
    e, W = torch.linalg.eigh(shifted.diag() + w * H @ H.T)
    return torch.cat([U, Q], 1) @ W, e + new_c, new_c


start = torch.linalg.qr(torch.randn(40, 5)).Q, torch.arange(6.0, 1, -1), torch.tensor(0.3)
X = torch.randn(40, 4)
ours, theirs = follow_by_hand(*start, X, 0.1), updated_factor(start, X, 0.1, 5, trace_matched)
assert_exact(from_pairs(*ours), from_pairs(*theirs))
assert_exact(from_pairs(*ours), 0.9 * from_pairs(*start) + 0.1 * X @ X.T)
assert ours[0].shape == (40, 9)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Puiu (2022)](bibliography.md#brand) introduces the three algorithms and the linear application, and uses
# Brand's update for KFAC. [Brand (2006)](bibliography.md#brand-svd) derives the update for singular values.
# [Chapter 17](17_skfac.py) has a window of batches instead of eigenpairs: nothing is truncated, but the cost grows with
# the number of batches. In the package, `LowRankKronecker` is the matrix of Chapters 17 to 19.
