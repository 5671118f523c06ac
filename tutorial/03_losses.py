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
# # 3. Losses: likelihoods and the vectors they send back
#
# **Part II: Curvature.** What does a loss send back through the network, and why is the result the
# Fisher?
#
# The GGN of [Chapter 2](02_curvature.py) is $\sum_n J_n^\top H_n J_n$, and all that a loss contributes is $H_n$, its
# Hessian with respect to the outputs for datum $n$. Autodiff sends vectors backward, not matrices. So write $H_n$ as a
# sum of outer products of vectors $s_{vn}$, and send these. For a loss that is a sum over data, the result also says
# how far a step $\Delta$ of the parameters $W$ moves the predictions $p_W$, as measured by the divergence KL:
#
# $$
# F = \sum_n J_n^\top H_n J_n = \sum_{v, n} \bigl(J_n^\top s_{vn}\bigr) \bigl(J_n^\top s_{vn}\bigr)^\top,
# \qquad
# \operatorname{KL}(p_W \,\Vert\, p_{W + \Delta}) \approx \tfrac12\, \Delta^\top F \Delta .
# $$
#
# This makes $F$ the Fisher information of the predictions. Gradients at labels that are drawn from the predictions give
# it in expectation. Gradients at the labels of the data give another matrix, which is often mistaken for it.

# %% tags=["hide-input"]
import copy
import itertools

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import BCEWithLogitsLoss, CrossEntropyLoss, Linear, Module, MSELoss, Sequential, Tanh
from torch.nn.functional import one_hot
from torch.testing import assert_close

from kfac_scratch import curvature, losses
from kfac_scratch.checks import assert_exact, largest_error, set_up
from kfac_scratch.losses import divisor, empirical, monte_carlo, type2, type2_classwise
from kfac_scratch.moving.triangle import probability_triangle
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"] alt="Two triangles whose corners are the three classes. Left: a prediction near the centre, with three arrows of similar length towards the corners. Right: a prediction near one corner, where all three arrows are short." caption="What a loss sends back: the vectors of [(3.5)] for an undecided (left) and a confident prediction (right). The ellipse is that of the Hessian, the sum of the arrows' outer products."
corners = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5]], device="cpu")
turn = torch.linspace(0, 2 * torch.pi, 100, device="cpu")
circle = torch.stack([turn.cos(), turn.sin()])
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.3), layout="constrained")
for ax, probabilities in zip(axes, ([0.4, 0.35, 0.25], [0.05, 0.88, 0.07]), strict=True):
    p3 = torch.tensor(probabilities, device="cpu")
    at, S3 = p3 @ corners, p3.sqrt().diag() - torch.outer(p3, p3.sqrt())
    ax.fill(*corners.T, fill=False, linewidth=1, edgecolor=ax.xaxis.label.get_color(), alpha=0.5)
    lengths, axes_of_ellipse = torch.linalg.eigh(corners.T @ S3 @ S3.T @ corners)
    ellipse = at[:, None] + axes_of_ellipse @ (lengths.sqrt()[:, None] * circle)
    ax.fill(*ellipse, color="C0", alpha=0.2)
    for c in range(3):
        arrow = {"arrowstyle": "->", "color": f"C{c + 1}", "linewidth": 2}
        ax.annotate("", xy=(at + S3[:, c] @ corners).tolist(), xytext=at.tolist(), arrowprops=arrow)
        ax.annotate(f"$e_{c + 1}$", corners[c].tolist(), xytext=(4, 4), textcoords="offset points")
    ax.set(
        aspect="equal",
        title=f"$p$ = ({', '.join(map(str, probabilities))})",
        xlim=(-0.1, 1.3),
        ylim=(-0.28, 1.0),
    )
    ax.axis("off")
plt.show()

# %% [markdown]
# A prediction for three classes is a point of a triangle. At a corner, one class has probability one. Vector $s_c$
# points from the prediction towards corner $c$. Drag the prediction: towards a corner, all arrows and the ellipse
# shrink, because cross-entropy has little curvature where the network is sure.

# %% tags=["hide-input"]
probability_triangle(first=0.5, second=-0.5)

# %% [markdown]
# After this chapter you can
#
# - say which distribution a loss stands for, and derive its Hessian;
# - choose the vectors: exact (`type2`), drawn (`monte_carlo`), or at the data's labels (`empirical`);
# - prove that the Fisher is the GGN for these losses, and that it is the curvature of KL;
# - say what the natural gradient is, in which sense it does not depend on coordinates, and what it is not.
#
# ## A loss is a likelihood
#
# Let the network's output $f_n \in \mathbb{R}^C$ for datum $n$ be the parameters of a distribution
# $p(y \mid f_n)$ of the target. The weights that make the data most probable are those that
# minimise a sum of negative logarithms. Every loss of this chapter is of the form
#
# $$
# L = \frac{1}{D} \sum_n \ell(f_n, y_n),
# \qquad
# \ell(f, y) = -\log p(y \mid f) + \text{const},
# \tag{3.1}
# $$
#
# with a **divisor** $D$ that the reduction decides. (In this chapter $D$ is always this number,
# never a number of parameters.) Which distributions are they?
#
# | Loss | Term $\ell(f, y)$ | Distribution $p(y \mid f)$ |
# | --- | --- | --- |
# | `MSELoss` | $\lVert f - y \rVert^2$ | Gaussian with mean $f$ and variance $\tfrac12$ in each entry |
# | `CrossEntropyLoss` | $-\log p_y$ with $p = \operatorname{softmax}(f)$ | categorical, class $c$ with probability $p_c$ |
# | `BCEWithLogitsLoss` | $-y \log p - (1 - y) \log(1 - p)$ with $p = \sigma(f)$, for each entry | Bernoulli, 1 with probability $p$ |
#
# The first needs a word. A Gaussian of variance $\sigma^2$ has $-\log p = \lVert y - f
# \rVert^2 / (2 \sigma^2) + \text{const}$, so the squared error *without* a half belongs to
# $\sigma^2 = \tfrac12$. (With the half, the variance is 1: another loss, half the curvature.) The
# constant depends on nothing that is trained; compare differences of two outputs:

# %% tags=["hide-input"]
N, C = 7, 3
X = torch.randn(N, 4)
model = Sequential(Linear(4, 6), Tanh(), Linear(6, C))
f = model(X).detach()
targets = {
    MSELoss: torch.randn(N, C),
    CrossEntropyLoss: torch.arange(N) % C,
    BCEWithLogitsLoss: (torch.arange(N * C) % 2).reshape(N, C).double(),
}
likelihoods = {
    MSELoss: lambda f: torch.distributions.Normal(f, 0.5**0.5),
    CrossEntropyLoss: lambda f: torch.distributions.Categorical(logits=f),
    BCEWithLogitsLoss: lambda f: torch.distributions.Bernoulli(logits=f),
}
for kind, y in targets.items():
    loss, other = kind(reduction="sum"), f + torch.randn(N, C)
    of_loss = loss(f, y) - loss(other, y)
    of_likelihood = [likelihoods[kind](outputs).log_prob(y).sum() for outputs in (other, f)]
    assert_close(of_loss, of_likelihood[0] - of_likelihood[1])
print("differences of the loss are differences of the log-likelihood, for all three losses")

# %% [markdown]
# ### The divisor
#
# With `reduction="sum"`, $D = 1$. With `"mean"`, PyTorch divides by the number of *terms*, and what a
# term is depends on the loss: for the squared error and BCE every output entry is one, for
# cross-entropy every label. With class weights it divides by the sum of the labels' weights, and
# ignored labels do not count. By hand, $D$ is the sum divided by the mean:


# %%
def divisor_by_hand(loss: Module, f: Tensor, y: Tensor) -> float:
    total = copy.copy(loss)
    total.reduction = "sum"
    return (total(f, y) / loss(f, y)).item()


# %% [markdown]
# The package counts instead:

# %% tags=["remove-input"]
code(divisor)

# %% tags=["hide-input"]
tokens, token_labels = torch.randn(N, C, 5), torch.randint(C, (N, 5))
weighted = CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0]), ignore_index=1)
for loss, outputs, y in [
    *((kind(), f, y) for kind, y in targets.items()),
    (CrossEntropyLoss(), tokens, token_labels),
    (weighted, f, targets[CrossEntropyLoss]),
]:
    print(
        f"{type(loss).__name__:18} outputs {tuple(outputs.shape)!s:10} D = {divisor(loss, outputs, y):.1f}"
    )
    assert_close(divisor(loss, outputs, y), divisor_by_hand(loss, outputs, y))

# %% [markdown]
# ## Three Hessians
#
# Now differentiate each term twice with respect to the outputs.
#
# **Squared error.** $\partial \ell / \partial f = 2 (f - y)$, and once more, $\nabla^2 \ell = 2 I$.
#
# **Softmax and cross-entropy.** Write the term as $\ell = -f_y + \log \sum_k e^{f_k}$. The derivative
# of the logarithm with respect to $f_c$ is $e^{f_c} / \sum_k e^{f_k} = p_c$. So
#
# $$
# \frac{\partial \ell}{\partial f} = p - e_y
# \tag{3.2}
# $$
#
# with the unit vector $e_y$ of the label. This depends on $f$ only through $p$. By the
# quotient rule $\partial p_c / \partial f_k = p_c\, (\delta_{ck} - p_k)$, where $\delta_{ck}$ is 1 for
# $c = k$ and else 0, and as a matrix
#
# $$
# \nabla^2 \ell = \operatorname{diag}(p) - p p^\top.
# \tag{3.3}
# $$
#
# **Bernoulli.** From $p = \sigma(f)$ one gets $\ell = \log(1 + e^f) - y f$, then
# $\partial \ell / \partial f = p - y$, and $\nabla^2 \ell = p (1 - p)$ for each entry.
#
# The same happened three times: **the target dropped out of the second derivative.** In each case
# $y$ (or $e_y$) and $f$ stand together in $y^\top f$ only, which is linear in $f$. For this reason GGN and Fisher
# will be equal.


# %%
def hessian_by_hand(loss: Module, f_n: Tensor) -> Tensor:
    """For one datum, without the divisor."""
    match loss:
        case MSELoss():
            return 2 * torch.eye(C)
        case CrossEntropyLoss():
            p = f_n.softmax(0)
            return p.diag() - torch.outer(p, p)
        case BCEWithLogitsLoss():
            p = f_n.sigmoid()
            return (p * (1 - p)).diag()


for kind, y in targets.items():
    for loss in (kind(reduction="sum"), kind(reduction="mean")):
        H_f = torch.block_diag(*(hessian_by_hand(loss, f_n) for f_n in f)) / divisor(loss, f, y)
        assert_exact(curvature.loss_hessian(loss, f, y), H_f)

# %% [markdown]
# ## A square root
#
# Suppose that the Hessian $H_n$ of datum $n$ (divisor included) is written with a **square root**:
# $H_n = S_n S_n^\top = \sum_v s_{vn} s_{vn}^\top$, where $s_{vn}$ are the columns of $S_n$. Then with
# the Jacobian $J_n$ of datum $n$
#
# $$
# \mathrm{GGN} = \sum_n J_n^\top H_n J_n
# = \sum_{v, n} \bigl(J_n^\top s_{vn}\bigr) \bigl(J_n^\top s_{vn}\bigr)^\top.
# \tag{3.4}
# $$
#
# Every bracket is what automatic differentiation computes: *put $s_{vn}$ at the outputs and go
# backward*. The GGN is a sum of outer products of such vectors, and so is each of its blocks. This is
# all that the following chapters ever need from a loss, so in this package a loss is described by one
# function: it returns vectors of shape $[V, N, \dots]$, $V$ of them for every datum, shaped like the
# output. Their outer products, datum by datum, must sum to the Hessian:


# %%
def curvature_of(vectors: Tensor) -> Tensor:
    """What vectors [V, N, ...] say about the outputs: one block for each datum."""
    s = vectors[:].flatten(2)
    return torch.block_diag(*torch.einsum("vni,vnj->nij", s, s))


def sent_back(vectors: Tensor, J: Tensor) -> Tensor:
    """The sum of outer products at the parameters, right side of (3.4)."""
    total = 0
    for s_v in vectors[:].flatten(2):
        for s_vn, J_n in zip(s_v, J.reshape(*s_v.shape, -1), strict=True):
            gradient = J_n.T @ s_vn
            total = total + torch.outer(gradient, gradient)
    return total


# %% [markdown]
# Which square roots? For the squared error $\sqrt 2\, I$, for BCE the diagonal matrix of
# $\sqrt{p (1 - p)}$. For the softmax, claim
#
# $$
# S = \operatorname{diag}(\sqrt p) - p \sqrt{p}^{\,\top}
# \qquad\text{with columns}\qquad
# s_c = \sqrt{p_c}\, (e_c - p).
# \tag{3.5}
# $$
#
# To verify it, multiply out. With $q = \sqrt p$, entry by entry, $q^\top q = \sum_c p_c = 1$ and
# $\operatorname{diag}(q)\, q = p$, and therefore
#
# $$
# S S^\top = \operatorname{diag}(p) - p\, (\operatorname{diag}(q)\, q)^\top
# - (\operatorname{diag}(q)\, q)\, p^\top + p\, (q^\top q)\, p^\top
# = \operatorname{diag}(p) - p p^\top.
# $$
#
# ### One vector less
#
# The Hessian $H$ of [(3.3)] has rank $C - 1$, since the softmax does not change if all logits are shifted. So a root
# with one column less exists, and one can be written down. Choose a first column $s_1$ such that the first row and
# column of $H - s_1 s_1^\top$ are zero. This is $s_1 = H e_1 / \sqrt{H_{11}}$, and with
# $q_c = \sum_{k \ge c} p_k$, of which $q_1 = 1$,
#
# $$
# s_1 = \frac{p_1 (e_1 - p)}{\sqrt{p_1 q_2}}
# = \sqrt{p_1 q_2}\, \Bigl( e_1 - \sum_{i > 1} \frac{p_i}{q_2}\, e_i \Bigr),
# \qquad
# (H - s_1 s_1^\top)_{ij} = p_i \delta_{ij} - p_i p_j \Bigl( 1 + \frac{p_1}{q_2} \Bigr)
# = q_2 \Bigl( \frac{p_i}{q_2} \delta_{ij} - \frac{p_i}{q_2} \frac{p_j}{q_2} \Bigr)
# $$
#
# for $i, j > 1$. What remains is the Hessian of the softmax over the other classes, times their
# probability. The same step gives the next column, and so on; the last class has none. The
# result is lower triangular, a Cholesky factor in closed form:
#
# $$
# s_c = \sqrt{\frac{p_c\, q_{c+1}}{q_c}} \Bigl( e_c - \sum_{i > c} \frac{p_i}{q_{c+1}}\, e_i \Bigr),
# \qquad c = 1, \dots, C - 1 .
# $$
#
# It saves one backward pass in $C$: half of them for two classes. All ratios are at most one, and
# come from the logits by logarithms, so that no digits are lost where the softmax is saturated.
#
# ### In the package
#
# `type2` returns this root. The general shape $[N, C, P]$ with $P$ positions is for losses with several labels
# per datum ([Chapter 7](07_other_losses.py)); here $P = 1$. The vectors are computed when they are
# read, so that those of a thousand classes are never all in memory; `[:]` reads all of them.

# %% tags=["remove-input"]
code(type2, losses.HessianRoot, losses._root_columns, losses._diagonal_root)

# %% tags=["hide-input"]
J = curvature.jacobian(model, X)
for kind, y in targets.items():
    for loss in (kind(reduction="sum"), kind(reduction="mean")):
        vectors = type2(loss, f, y)
        H_f, GGN = curvature.loss_hessian(loss, f, y), curvature.ggn(model, loss, X, y)
        assert_exact(curvature_of(vectors), H_f)
        assert_exact(sent_back(vectors, J), GGN)
    print(f"{kind.__name__:18} {len(vectors)} vectors of shape {tuple(vectors.shape[1:])}")

# %% tags=["hide-input"] alt="Heat maps of the five by five matrices for one prediction: the Hessian, symmetric with positive diagonal and negative rest, and two different square roots, one full and one lower triangular with four columns." caption="A Hessian [(3.3)] for five classes and two of its square roots: that of [(3.5)] and the triangular one of `type2`. Both give the same curvature."
p = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
q = p.sqrt()
H_p, S_p = p.diag() - torch.outer(p, p), q.diag() - torch.outer(p, q)
total = CrossEntropyLoss(reduction="sum")
triangular = type2(total, p.log()[None], torch.tensor([0]))[:].squeeze(1).T
assert_close(S_p @ S_p.T, H_p)
assert_close(triangular @ triangular.T, H_p)
matrices({"Hessian": H_p, "$S$": S_p, "triangular root": triangular})

# %% [markdown]
# A square root is not unique: $S Q$ is another one for every orthogonal $Q$, and the curvature is the
# same. The columns of [(3.5)] are one too many, but they mean something: in [Figure 3.1], column $c$ is the arrow
# from the prediction towards corner $c$, shortened by $\sqrt{p_c}$.

# %% [markdown]
# ## Scores: the Fisher
#
# Statistics arrives at the same matrix from the other side. The **score** is the derivative of the
# log-likelihood, $\nabla_f \log p(y \mid f) = -\nabla_f\, \ell(f, y)$. Draw a label $y$ *from the model
# itself* and ask how the score varies:
#
# $$
# F_f = \mathbb{E}_{y \sim p(\cdot \mid f)}
# \bigl[ \nabla_f\, \ell(f, y)\; \nabla_f\, \ell(f, y)^\top \bigr].
# \tag{3.6}
# $$
#
# This is the Fisher information of the outputs. It contains no second derivatives. And yet:
#
# <div class="admonition theorem" markdown="1" id="thm-3.1">
# <p class="admonition-title" markdown="1"><b>Theorem 3.1 (information equality)</b></p>
#
# Under the model, the score has mean zero, and its covariance is the expected Hessian:
# $\mathbb{E}[\nabla \ell] = 0$ and $\mathbb{E}[\nabla \ell\, \nabla \ell^\top] =
# \mathbb{E}[\nabla^2 \ell]$, all expectations over $y \sim p(\cdot \mid f)$.
#
# </div>
#
# **Proof.** Probabilities sum to one for every $f$, so derivatives of their sum vanish. (For
# densities, read integrals for sums.) Since $\nabla p = p\, \nabla \log p$,
#
# $$
# 0 = \nabla \sum_y p(y \mid f) = \sum_y p(y \mid f)\, \nabla \log p(y \mid f)
# = \mathbb{E}[\nabla \log p].
# $$
#
# Differentiate once more, by the product rule and with $\nabla p = p\, \nabla \log p$ again:
#
# $$
# 0 = \sum_y \Bigl( p\; \nabla \log p\; \nabla \log p^\top + p\; \nabla^2 \log p \Bigr)
# = \mathbb{E}[\nabla \log p\; \nabla \log p^\top] + \mathbb{E}[\nabla^2 \log p].
# $$
#
# With $\nabla \ell = -\nabla \log p$ this is the claim. $\blacksquare$
#
# If now the Hessian of a term does not depend on $y$, as for our three losses, its expectation is
# itself.
#
# <div class="admonition theorem" markdown="1" id="thm-3.2">
# <p class="admonition-title" markdown="1"><b>Theorem 3.2 (Fisher = GGN)</b></p>
#
# For the squared error, softmax cross-entropy and BCE with logits, $F_f = \nabla^2_f\, \ell$ for each
# datum. Hence the Fisher of the network, $\frac{1}{D} \sum_n \mathbb{E}_y[\nabla_\theta \ell\,
# \nabla_\theta \ell^\top]$, is the GGN.
#
# </div>
#
# **Proof.** The first claim is [Theorem 3.1]. For the second, the chain rule gives
# $\nabla_\theta\, \ell = J_n^\top \nabla_f\, \ell$, and $J_n$ does not depend on $y$:
# $\mathbb{E}[J_n^\top \nabla \ell\, \nabla \ell^\top J_n] = J_n^\top F_f J_n$. $\blacksquare$
#
# The left-hand side, gradients at drawn labels, is called Fisher of **type I**, the right-hand side,
# the Hessian of the likelihood, of **type II**; hence the name `type2`.
#
# An expectation can be checked without drawing anything: enumerate. There are $C$ classes with
# probabilities $p_c$. For a Gaussian entry, the two points $f \pm \sigma$ with weight $\tfrac12$ have
# the right mean and variance, and the score is linear in $y$, so second moments are all that counts.


# %%
def labels_with_probability(loss: Module, f_n: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every label of one datum and its probability: a finite sum in place of an expectation."""
    if isinstance(loss, CrossEntropyLoss):
        return list(zip(torch.arange(C), f_n.softmax(0), strict=True))
    pairs = []
    for corner in itertools.product((0.0, 1.0), repeat=C):  # a choice for every entry
        bits = torch.tensor(corner)
        if isinstance(loss, MSELoss):
            pairs.append((f_n + (2 * bits - 1) * 0.5**0.5, torch.tensor(0.5**C)))
        else:
            p = f_n.sigmoid()
            pairs.append((bits, torch.where(bits == 1, p, 1 - p).prod()))
    return pairs


def fisher_by_hand(loss: Module, f: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the scores of each datum, and the sum over data of outer products times probability."""
    means, blocks = [], []
    for f_n in f:
        pairs = labels_with_probability(loss, f_n)
        scores = [(p, torch.func.grad(loss)(f_n[None], label[None])[0]) for label, p in pairs]
        means.append(sum(p * score for p, score in scores))
        blocks.append(sum(p * torch.outer(score, score) for p, score in scores))
    return torch.stack(means), torch.block_diag(*blocks)


# %% tags=["hide-input"]
for kind, y in targets.items():
    loss = kind(reduction="sum")
    mean_score, F_f = fisher_by_hand(loss, f)
    H_f, GGN = curvature.loss_hessian(loss, f, y), curvature.ggn(model, loss, X, y)
    print(
        f"{kind.__name__:18} mean score {mean_score.abs().max():.1e}, Fisher - Hessian {largest_error(F_f, H_f):.1e}"
    )
    assert mean_score.abs().max() < 1e-12
    assert_exact(F_f, H_f)
    assert_exact(J.T @ F_f @ J, GGN)

# %% [markdown]
# ### In the package
#
# `curvature.fisher` is the oracle for this definition: it takes gradients at every label, weighted by
# its probability, and uses no Hessian.

# %% tags=["remove-input"]
code(curvature.fisher, curvature._labels)

# %% tags=["hide-input"]
for kind, y in targets.items():
    for loss in (kind(reduction="sum"), kind(reduction="mean")):
        GGN = curvature.ggn(model, loss, X, y)
        assert_exact(curvature.fisher(model, loss, X, y), GGN)
print("the oracle's Fisher is the GGN, for three losses and both reductions")

# %% [markdown]
# We can now say what the arrows in the picture are. By [(3.2)], the gradient at label $c$ is $p - e_c$,
# and the term that it contributes to the expectation [(3.6)] is $p_c\, (p - e_c)(p - e_c)^\top$. The
# column $s_c = \sqrt{p_c}\, (e_c - p)$ of [(3.5)] **is** the enumerated score of class $c$, times $\sqrt{p_c}$.
# ([Chapter 7](07_other_losses.py)'s `type2_classwise` has these columns.)

# %%
loss, y = CrossEntropyLoss(reduction="sum"), targets[CrossEntropyLoss]
p = f.softmax(1)
for c, column in enumerate(type2_classwise(loss, f, y)):
    score = -torch.func.grad(loss)(f, torch.full_like(y, c))
    assert_close(column, p[:, c : c + 1].sqrt() * score)

# %% [markdown]
# ### Where the equality ends
#
# [Theorem 3.1] holds for every smooth likelihood, [Theorem 3.2] needs a Hessian without $y$. Take a Gaussian
# whose network predicts the mean $m$ *and* the logarithm $t$ of the variance: $\ell = \tfrac12 t +
# \tfrac12 (y - m)^2 e^{-t}$. Its Hessian depends on $y$, is indefinite unless $y = m$, and only its average is the
# Fisher. Three points and weights (those of Gauss and Hermite) average exactly here, because
# they are exact for polynomials of degree up to five in $y$, and outer products of scores have
# degree four.


# %%
def gaussian_term(outputs: Tensor, y: Tensor) -> Tensor:
    m, t = outputs
    return 0.5 * t + 0.5 * (y - m) ** 2 * torch.exp(-t)


outputs = torch.tensor([0.3, -0.4])
deviation = torch.exp(outputs[1] / 2)
points = outputs[0] + deviation * 3**0.5 * torch.tensor([-1.0, 0.0, 1.0])
weights = torch.tensor([1 / 6, 2 / 3, 1 / 6])
hessians = torch.stack(
    [torch.func.jacrev(torch.func.grad(gaussian_term))(outputs, y) for y in points]
)
scores = torch.stack([torch.func.grad(gaussian_term)(outputs, y) for y in points])
F_f = torch.einsum("k,ki,kj->ij", weights, scores, scores)

assert_close(weights @ scores, torch.zeros(2))
assert_close(F_f, torch.einsum("k,kij->ij", weights, hessians))  # Theorem 3.1
assert_close(F_f, torch.diag(torch.stack([torch.exp(-outputs[1]), torch.tensor(0.5)])))
assert all(largest_error(H, F_f) > 0.1 for H in hessians)  # but not Theorem 3.2
assert torch.linalg.eigvalsh(hessians[0])[0] < 0

# %% [markdown]
# ## The Fisher measures how far a step moves the predictions
#
# What matters about a step $\Delta$ of the parameters is how it changes the predictions. So measure it by what it
# does to the model's distributions. With parameters $W$, datum $n$ has the distribution $p(y \mid f_n(W))$.
# The labels of different data are independent, and all of them together have the distribution $p_W$, the
# product over $n$. The **Kullback–Leibler divergence** compares it with the model after the step,
#
# $$
# \operatorname{KL}(p_W \,\Vert\, p_{W + \Delta})
# = \sum_n \mathbb{E}_{y \sim p(\cdot \mid f_n(W))}
# \bigl[ \ell(f_n(W + \Delta), y) - \ell(f_n(W), y) \bigr].
# \tag{3.7}
# $$
#
# In words: by how much does the loss rise on average, if labels come from the model *before* the step? The
# divergence is never negative, and it is zero if and only if the two models predict the same.
#
# <div class="admonition theorem" markdown="1" id="thm-3.3">
# <p class="admonition-title" markdown="1"><b>Theorem 3.3 (the Fisher is the curvature of KL)</b></p>
#
# Let $F$ be the Fisher of the network for a summed loss, $D = 1$, and let $f_n$ and $\log p$ be three times
# continuously differentiable. Then
#
# $$
# \operatorname{KL}(p_W \,\Vert\, p_{W + \Delta})
# = \tfrac12\, \Delta^\top F \Delta + O(\lVert \Delta \rVert^3).
# $$
#
# For a mean loss, whose Fisher is divided by $D$, the same holds for $\operatorname{KL} / D$.
#
# </div>
#
# **Proof.** Expand [(3.7)] at $\Delta = 0$. There it is zero. The labels come from $p_W$, which $\Delta$ does
# not change, so derivatives go into the expectation. Write $\ell_n$ for $\ell(f_n(W), y)$ as a function of $W$.
# The proof of [Theorem 3.1] used nothing but that probabilities sum to one, so it holds for derivatives by
# $W$ as well. Its first statement says that the first derivative of [(3.7)] vanishes,
# $\sum_n \mathbb{E}[\nabla_W\, \ell_n] = 0$. Its second statement says what the second derivative is,
# $\sum_n \mathbb{E}[\nabla^2_W\, \ell_n] = \sum_n \mathbb{E}[\nabla_W\, \ell_n\, \nabla_W\, \ell_n^\top] = F$. Taylor's
# theorem bounds the rest by the third derivative. $\blacksquare$
#
# The theorem holds for every likelihood, also for those to which [Theorem 3.2] does not apply. And it contains a
# Hessian, $\mathbb{E}[\nabla^2_W\, \ell_n]$, whose second part (the part that the GGN leaves out) is
# $\sum_c \mathbb{E}[\partial \ell_n / \partial f_c]\, \nabla^2_W f_c = 0$: under the model's labels, nothing is left
# out.
#
# To check it, we compute KL by enumeration, along a line $\Delta = t d$. Its second derivative at $t = 0$ must be
# $d^\top F d$. Its third derivative says more: what remains, divided by $t^3$, must tend to a sixth of it.


# %%
def kl(loss: Module, f: Tensor, other: Tensor) -> Tensor:
    """KL(p_f || p_other) over all data, from (3.7) with every label enumerated."""
    total = 0
    for f_n, other_n in zip(f, other, strict=True):
        for label, probability in labels_with_probability(loss, f_n):
            rise = loss(other_n[None], label[None]) - loss(f_n[None], label[None])
            total = total + probability * rise
    return total


def outputs_at(theta: Tensor) -> Tensor:
    """The network's outputs for all data with the parameters `theta`, one flat vector."""
    parameters = dict(model.named_parameters())
    parts = theta.split([p.numel() for p in parameters.values()])
    values = {k: v.reshape(parameters[k].shape) for k, v in zip(parameters, parts, strict=True)}
    return torch.func.functional_call(model, values, (X,))


theta = curvature.parameter_vector(model)
d = torch.randn(len(theta))
d = d / d.norm()
lengths = [0.2 / 2**k for k in range(6)]

# %%
remainders = {}
for kind, target in targets.items():
    criterion = kind(reduction="sum")
    along = lambda t: kl(criterion, f, outputs_at(theta + t * d))  # noqa: B023, E731
    first = torch.func.grad(along)
    second = torch.func.grad(first)
    third = torch.func.grad(second)
    zero = torch.tensor(0.0)
    dFd = d @ curvature.fisher(model, criterion, X, target) @ d
    assert abs(first(zero)) < 1e-12
    assert_exact(second(zero), dFd)  # Theorem 3.3

    rest = torch.stack([along(t) - t**2 * dFd / 2 for t in lengths])
    cubic = rest / torch.tensor(lengths) ** 3
    off = (cubic - third(zero) / 6).abs() / abs(third(zero) / 6)
    print(f"{kind.__name__:18} remainder / t³: from {cubic[0]:+.4f} to {cubic[-1]:+.4f}", end=", ")
    print(f"by autodiff {third(zero) / 6:+.4f}")
    assert abs(third(zero)) > 1e-3  # there is a cubic term
    assert 0.45 < off[-1] / off[-2] < 0.55  # and what is left of the remainder is of order t⁴

    swapped = lambda t: kl(criterion, outputs_at(theta + t * d), f)  # noqa: B023, E731
    assert_exact(torch.func.grad(torch.func.grad(swapped))(zero), dFd)  # the other direction
    remainders[kind] = torch.stack([along(t) for t in lengths]), rest.abs()

# %% [markdown]
# The last assert exchanges the two models. KL is not symmetric, but its quadratic part is the same in both directions.

# %% tags=["hide-input"] alt="Log-log plot over the length of the step from 0.006 to 0.2 for three losses. KL divergences fall by a factor of four for each halving, along a line of slope two. What remains after subtracting the quadratic form falls by eight, along a line of slope three." caption="KL (filled) falls with the square of the step, the remainder of [Theorem 3.3] (open) with its cube. Thin lines have the slopes 2 and 3."
fig, ax = plt.subplots(figsize=(5.6, 3.4))
for i, (kind, (divergence, rest)) in enumerate(remainders.items()):
    ax.loglog(lengths, divergence.tolist(), "o", color=f"C{i}", label=kind.__name__)
    ax.loglog(lengths, rest.tolist(), "o", color=f"C{i}", fillstyle="none")
    for values, slope in ((divergence, 2), (rest, 3)):
        line = [values[-1].item() * (t / lengths[-1]) ** slope for t in lengths]
        ax.loglog(lengths, line, color=f"C{i}", linewidth=0.8)
ax.set(xlabel="length $t$ of the step", ylabel="KL, and its remainder")
ax.legend()
plt.show()

# %% [markdown]
# ## The natural gradient
#
# The gradient is called the direction of steepest descent. This is true among steps of the same *Euclidean*
# length, and that length has no meaning: it adds squares of weights and of biases, which may have
# different units. Measure the length of a step by KL instead, that is by $\tfrac12 \Delta^\top F \Delta$.
#
# <div class="admonition theorem" markdown="1" id="thm-3.4">
# <p class="admonition-title" markdown="1"><b>Theorem 3.4 (steepest descent in KL)</b></p>
#
# Let $F$ be positive definite and $g = \nabla L \neq 0$. Among all $\Delta$ with
# $\Delta^\top F \Delta \le \varepsilon^2$, the change $g^\top \Delta$ of the linearised loss is smallest for
#
# $$
# \Delta = - \frac{\varepsilon}{\sqrt{g^\top F^{-1} g}}\; F^{-1} g,
# \qquad \text{and there}\quad g^\top \Delta = - \varepsilon \sqrt{g^\top F^{-1} g},
# \tag{3.8}
# $$
#
# and for no other $\Delta$. The vector $F^{-1} \nabla L$ is the **natural gradient**.
#
# </div>
#
# **Proof.** By the inequality of Cauchy and Schwarz,
#
# $$
# - g^\top \Delta = - (F^{-1/2} g)^\top (F^{1/2} \Delta)
# \le \lVert F^{-1/2} g \rVert\, \lVert F^{1/2} \Delta \rVert
# \le \varepsilon \sqrt{g^\top F^{-1} g},
# $$
#
# with equality if and only if $F^{1/2} \Delta$ is a multiple $-c\, F^{-1/2} g$ with $c > 0$ and has the length
# $\varepsilon$. $\blacksquare$
#
# By [Theorem 3.3] this is the best step of a given KL *in the limit* of short steps. We watch it with a model of two
# parameters, a logistic regression $p = \sigma(w x + b)$: how much does the loss fall, divided by
# $\sqrt{2 \operatorname{KL} / D}$, the length of the step? In the limit, no direction exceeds
# $\sqrt{g^\top F^{-1} g}$.

# %%
points = torch.linspace(0, 4, 40)
hits = torch.bernoulli(torch.sigmoid(2 * points - 4)).double()
logistic = BCEWithLogitsLoss()  # D = 40


def logits(theta: Tensor) -> Tensor:
    return theta[0] * points + theta[1]


def gradient_and_fisher(network, at: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the coordinates `at`, of which `network` makes the logits."""
    J, p = torch.func.jacrev(network)(at), network(at).sigmoid()
    return J.T @ (p - hits) / len(hits), (J.T * (p * (1 - p))) @ J / len(hits)


at = torch.tensor([0.5, 0.5])
g, F = gradient_and_fisher(logits, at)
best = (g @ torch.linalg.solve(F, g)).sqrt()
turns = torch.linspace(0, 2 * torch.pi, 361)[:-1]
candidates = torch.stack([turns.cos(), turns.sin()], 1)
candidates = torch.cat([candidates, -g[None] / g.norm(), -torch.linalg.solve(F, g)[None]])
for length in (0.3, 0.03, 0.003):
    rates = []
    for direction in candidates:
        step = length * direction / (direction @ F @ direction).sqrt()
        before, after = (torch.distributions.Bernoulli(logits=logits(v)) for v in (at, at + step))
        size = (2 * torch.distributions.kl_divergence(before, after).mean()).sqrt()
        rates.append(
            ((logistic(logits(at), hits) - logistic(logits(at + step), hits)) / size).item()
        )
    *circle, plain, natural = rates
    print(
        f"length {length}: gradient {plain:.4f}, natural {natural:.4f}, best of 360 {max(circle):.4f}"
    )
    assert max(circle) < best + length  # the limit is approached in proportion to the length
    assert plain < 0.95 * natural
    assert abs(natural - best) < length
print(f"limit of the natural gradient: {best:.4f}")

# %% [markdown]
# ### The same step in all coordinates
#
# KL compares distributions, so it does not depend on how these are parametrised. Let $W = \varphi(\eta)$ with
# other coordinates $\eta$ and an invertible Jacobian $K = \partial W / \partial \eta$. By the chain rule,
# gradient and Fisher in the coordinates $\eta$ are
#
# $$
# g_\eta = K^\top g, \qquad F_\eta = K^\top F K,
# \qquad\text{hence}\qquad
# K F_\eta^{-1} g_\eta = F^{-1} g, \qquad K g_\eta = K K^\top g.
# \tag{3.9}
# $$
#
# A step $-h F_\eta^{-1} g_\eta$ in $\eta$ thus moves $W$ by
# $\varphi(\eta - h F_\eta^{-1} g_\eta) - \varphi(\eta) = -h F^{-1} g + O(h^2)$. **To first order in $h$ the natural
# gradient makes the same step in all coordinates.** If $\varphi$ is affine, there is no second order, and the step is
# exactly the same. If $h$ tends to zero, the two *paths* agree. The plain gradient moves $W$ by
# $-h K K^\top g + O(h^2)$ instead. This depends on $\varphi$ already in first order, even if $\varphi$ is only a
# change of units.
#
# Try two changes of coordinates of the logistic regression. The first measures $x$ in other units, as degrees
# Celsius become Fahrenheit: affine. The second replaces the intercept $b$ by the threshold $c = -b / w$ at which
# $p = \tfrac12$: $\varphi(w, c) = (w, -w c)$, not affine, but quadratic.


# %%
def other_units(eta: Tensor) -> Tensor:  # p = σ(w (1.8 x + 32) + b)
    return torch.stack([1.8 * eta[0], 32 * eta[0] + eta[1]])


def threshold(eta: Tensor) -> Tensor:  # p = σ(w (x - c))
    return torch.stack([eta[0], -eta[0] * eta[1]])


def moved(chart, eta: Tensor, h: float, natural: bool) -> tuple[Tensor, Tensor]:
    """One step in the coordinates of a chart, seen there and as a move of slope and intercept."""
    g, F = gradient_and_fisher(lambda e: logits(chart(e)), eta)
    step = -h * (torch.linalg.solve(F, g) if natural else g)
    return step, chart(eta + step) - chart(eta)


same_point = {
    other_units: torch.stack([at[0] / 1.8, at[1] - 32 * at[0] / 1.8]),
    threshold: torch.stack([at[0], -at[1] / at[0]]),
}
for chart, eta in same_point.items():
    assert_close(chart(eta), at)
    K = torch.func.jacrev(chart)(eta)
    g_eta, F_eta = gradient_and_fisher(lambda e: logits(chart(e)), eta)  # noqa: B023
    assert_exact(g_eta, K.T @ g)  # (3.9)
    assert_exact(F_eta, K.T @ F @ K)
    for h in (0.1, 0.05):
        natural, plain = (
            largest_error(moved(chart, eta, h, kind)[1], -h * step)
            for kind, step in ((True, torch.linalg.solve(F, g)), (False, g))
        )
        print(
            f"{chart.__name__:12} h = {h:<5} differs by: natural {natural:.1e}, plain {plain:.1e}"
        )
        assert plain > 0.3  # whatever the length of the step
        if chart is other_units:
            assert natural < 1e-10
        else:  # the quadratic term of φ, and nothing else
            (dw, dc), total = moved(chart, eta, h, natural=True)
            of_second_order = total + h * torch.linalg.solve(F, g)
            assert_close(of_second_order, torch.stack([0 * dw, -dw * dc]))
            assert dw * dc != 0

# %% tags=["hide-input"] alt="Two panels with contours of a loss over slope and intercept, and two paths in each from the same start to the minimum. Left, the gradient: the path computed with the intercept and the path computed with the threshold run far apart. Right, the natural gradient: both paths lie on one curve." caption="The same descent, computed in the coordinates slope and intercept (line) and in slope and threshold (dots), drawn in the first: 300 steps. The plain gradient takes two paths, the natural gradient one."
starts = {"intercept": (lambda e: e, at), "threshold": (threshold, same_point[threshold])}
fig, axes = plt.subplots(1, 2, figsize=(7.6, 3.4), sharey=True, layout="constrained")
ws, bs = torch.linspace(0.2, 3.0, 80), torch.linspace(-6.0, 1.2, 80)
surface = torch.stack(
    [torch.stack([logistic(logits(torch.stack([w, b])), hits) for w in ws]) for b in bs]
)
apart = {}
for ax, natural in zip(axes, (False, True), strict=True):
    levels = surface.min().item() + torch.logspace(-2, 0, 7, device="cpu")
    ax.contour(ws.cpu(), bs.cpu(), surface.cpu(), levels, colors="C4", linewidths=0.8)
    paths = {}
    for name, (chart, eta) in starts.items():
        path = [chart(eta)]
        for _ in range(300):
            eta = eta + moved(chart, eta, 0.02 if natural else 0.1, natural)[0]
            path.append(chart(eta))
        paths[name] = torch.stack(path)
        style = {"intercept": "-", "threshold": "."}[name]
        every = 1 if style == "-" else 8
        colour = {"intercept": "C0", "threshold": "C1"}[name]
        ax.plot(
            *paths[name][::every].T.cpu(),
            style,
            color=colour,
            linewidth=2,
            label=f"with the {name}",
        )
    ax.set(title="natural gradient" if natural else "gradient", xlabel="slope $w$")
    apart[natural] = torch.cdist(*paths.values()).min(1).values.max().item()
axes[0].set_ylabel("intercept $b$")
axes[0].legend()
plt.show()
print(f"largest distance of the two paths: gradient {apart[False]:.2f}, natural {apart[True]:.3f}")
assert apart[True] < 0.03 < 0.2 < apart[False]

# %% [markdown]
# ### What the natural gradient is not
#
# - **It is not Newton's step.** It divides by the Fisher, which is the GGN, and not by the Hessian of the loss at the
#   data's labels. [Chapter 2](02_curvature.py) says where the two agree.
# - **It has no length.** [Theorem 3.4] is about short steps and leaves $\varepsilon$ open. The step with $h = 1$ may
#   raise the loss, for example where predictions are sure, so that $F$ is small.
# - **With damping it depends on the coordinates again.** The $I$ in $(F + \delta I)^{-1} \nabla L$ measures Euclidean
#   lengths.
# - **It is not the step of the empirical Fisher**, the subject of a section below, which is not the second derivative
#   of KL.
# - **It needs an inverse, which may not exist.** With fewer output entries, $N C$, than parameters $F$ is singular.
#   For the losses here $\nabla L$ lies in the range of $F$, so that $F^+ \nabla L$ with the pseudoinverse $F^+$ is a
#   step of steepest descent.

# %% tags=["hide-input"]
criterion, target = CrossEntropyLoss(), targets[CrossEntropyLoss]
assert (
    largest_error(
        curvature.hessian(model, criterion, X, target),
        curvature.fisher(model, criterion, X, target),
    )
    > 0.1
)

sure = torch.tensor([2.0, 4.0])
g_sure, F_sure = gradient_and_fisher(logits, sure)
after = sure - torch.linalg.solve(F_sure, g_sure)
losses_of_step = [logistic(logits(v), hits).item() for v in (sure, after)]
print(
    "where the model is sure, a step with h = 1 changes the loss from {:.2f} to {:.2f}".format(
        *losses_of_step
    )
)
assert losses_of_step[1] > losses_of_step[0]

eta, damping = same_point[other_units], 0.1
K = torch.func.jacrev(other_units)(eta)
damped = torch.linalg.solve(F + damping * torch.eye(2), g)
in_other_units = K @ torch.linalg.solve(K.T @ F @ K + damping * torch.eye(2), K.T @ g)
print(
    f"damped natural gradients in two units differ by {largest_error(in_other_units, damped):.2f}"
)
assert largest_error(in_other_units, damped) > 0.1

for kind, target in targets.items():
    criterion = kind()
    F_net = curvature.fisher(model, criterion, X, target)
    g_net = torch.func.grad(lambda t: criterion(outputs_at(t), target))(theta)  # noqa: B023
    values, basis = torch.linalg.eigh(F_net)
    kept = basis[:, values > 1e-10 * values[-1]]
    print(f"{kind.__name__:18} rank {kept.shape[1]} of {len(theta)}; the gradient is in the range")
    assert kept.shape[1] < len(theta)
    assert_exact(kept @ (kept.T @ g_net), g_net, tolerance=1e-8)

# %% [markdown]
# ## Monte Carlo: draw the labels
#
# With many classes, one backward pass per class is too much. An expectation can be estimated: draw
# $M$ labels $\hat y_{1n}, \dots, \hat y_{Mn}$ from $p(\cdot \mid f_n)$ and average,
#
# $$
# \widehat{H}_n = \frac{1}{D M} \sum_{m = 1}^{M} \nabla \ell(f_n, \hat y_{mn})\,
# \nabla \ell(f_n, \hat y_{mn})^\top,
# \qquad
# s_{mn} = \frac{1}{\sqrt{D M}}\, \nabla \ell(f_n, \hat y_{mn}).
# \tag{3.10}
# $$
#
# The factor $1 / (D M)$ belongs to outer products, so each *vector* carries its square root. The
# estimate is unbiased, because every summand has the mean $F_f$, and the summands are
# independent, so that its variance is that of one summand divided by $M$. Again nothing need be drawn to
# check this. For three classes and $M$ draws there are $3^M$ outcomes; we visit all of them:


# %%
def all_outcomes(p: Tensor, M: int) -> tuple[Tensor, Tensor]:
    """Exact mean and variance (summed over entries) of the estimate for one datum, D = 1."""
    mean, square = 0, 0
    for drawn in itertools.product(range(len(p)), repeat=M):
        gradients = p - one_hot(torch.tensor(drawn), len(p)).to(p.dtype)  # [M, C]
        estimate = gradients.T @ gradients / M
        probability = p[list(drawn)].prod()
        mean = mean + probability * estimate
        square = square + probability * estimate.square().sum()
    return mean, square - mean.square().sum()


H_0 = hessian_by_hand(loss, f[0])
_, variance_of_one = all_outcomes(p[0], 1)
for M in (1, 2, 3, 4):
    mean, variance = all_outcomes(p[0], M)
    print(f"M = {M}: bias {largest_error(mean, H_0):.1e}, variance {variance:.4f}")
    assert_exact(mean, H_0)
    assert_close(M * variance, variance_of_one)

# %% [markdown]
# ### In the package
#
# `monte_carlo(M)` returns a function of the same kind as `type2`. It draws all labels at once, and makes
# the scores when they are read: a label of cross-entropy is one number, its score has $C$. Gaussian
# scores need no labels: $2 (f - \hat y)$ with $\hat y$ of variance $\tfrac12$ is normal with variance 2.

# %% tags=["remove-input"]
code(monte_carlo, losses.SampledScores, losses._sampled, losses._scores)

# %% [markdown]
# How should one test a random function? First test all that is not random about it. Undo the scale
# of [(3.10)], and each vector must be $p - e_c$ for *some* class, exactly. What remains is how often
# each class occurs. We take a number that depends on all classes, $u^\top \widehat H u$ for a fixed
# $u$. Its expectation and its standard error $\sigma$ are known exactly, by enumeration. If the code
# is right, a mean of 20,000 independent terms is nearly normal, and a deviation of more than
# $5 \sigma$ has a probability of less than one in a million. The cell also prints how large an error
# must be to be found.

# %% tags=["hide-input"]
loss, M = CrossEntropyLoss(), 20_000
generator = torch.Generator(device=f.device).manual_seed(0)
vectors = monte_carlo(M, generator)(loss, f, y)[:]
D = divisor(loss, f, y)

drawn = p - (M * D) ** 0.5 * vectors  # one-hot labels, if the scale is right
assert_close(drawn, drawn.round(), atol=1e-10, rtol=0)
assert_close(drawn.sum(-1), torch.ones(M, N))

u = torch.linspace(-1, 2, N * C).reshape(N, C)
per_label = ((u * p).sum(1, keepdim=True) - u).square() / D  # [N, C], for M = 1
expected = (p * per_label).sum()
sigma = ((p * per_label.square()).sum() - (p * per_label).sum(1).square().sum()).sqrt() / M**0.5
found = torch.einsum("vnc,nc->vn", vectors, u).square().sum()
H_f = curvature.loss_hessian(loss, f, y)
assert_close(expected, u.flatten() @ H_f @ u.flatten())
print(
    f"deviation {((found - expected) / sigma).item():+.2f} σ, with 5 σ = {5 * sigma / expected:.1%} of the value"
)
assert (found - expected).abs() < 5 * sigma

# %% tags=["hide-input"] alt="Log-log plot of the relative error of the Monte Carlo estimate against the number of samples. Measured points lie on the predicted straight line, which falls by one decade for every two decades of samples." caption="Error of the estimated $H_f$ (root mean square of 40 repetitions) on the line that enumeration predicts. One more digit costs a hundred times the samples."
total_variance = sum(all_outcomes(p_n, 1)[1] for p_n in p) / D**2
samples = [1, 3, 10, 30, 100, 300, 1000]
errors = []
for M in samples:
    estimates = (curvature_of(monte_carlo(M, generator)(loss, f, y)) for _ in range(40))
    errors.append(sum((e - H_f).square().sum() / 40 for e in estimates).sqrt() / H_f.norm())
fig, ax = plt.subplots(figsize=(5.6, 3.2))
predicted = [(total_variance / M).sqrt() / H_f.norm() for M in samples]
ax.loglog(samples, [e.item() for e in predicted], "-", color="C1", label="predicted")
ax.loglog(samples, [e.item() for e in errors], "o", color="C0", label="measured")
ax.set(xlabel="samples $M$", ylabel="relative error")
ax.legend()
plt.show()

# %% [markdown]
# ## The empirical Fisher is another matrix
#
# Drawing labels seems roundabout when the data already have some. The matrix
#
# $$
# E = \frac{1}{D} \sum_n \nabla_\theta\, \ell(f_n, y_n)\; \nabla_\theta\, \ell(f_n, y_n)^\top
# \tag{3.11}
# $$
#
# is called the **empirical Fisher**. The name suggests an estimate of the Fisher; it is
# not one, because the labels do not come from the model. For the squared error the gradient at the
# outputs is twice the residual $r_n = f_n - y_n$, and so, beside $\mathrm{GGN} = \frac{1}{D} \sum_n 2\,
# J_n^\top J_n$,
#
# $$
# E = \frac{1}{D} \sum_n 4\, J_n^\top r_n r_n^\top J_n.
# \tag{3.12}
# $$
#
# ### In the package
#
# One vector per datum, of the same kind as before. PyTorch's gradient of a mean loss contains $1 / D$,
# while a vector needs $1 / \sqrt D$: hence the factor in the last line of `empirical`.

# %% tags=["remove-input"]
code(empirical, curvature.empirical_fisher)

# %%
for kind, y in targets.items():
    loss = kind()
    E, GGN = curvature.empirical_fisher(model, loss, X, y), curvature.ggn(model, loss, X, y)
    assert_exact(sent_back(empirical(loss, f, y), J), E)
    print(f"{kind.__name__:18} relative difference to the Fisher: {largest_error(E, GGN):.2f}")
    assert largest_error(E, GGN) > 0.1

# %% [markdown]
# **When the two agree.** On average over targets drawn from the model they are equal; that is
# the definition of the Fisher. So they come close for large $N$ if the model is *right*, parameters and
# noise included. A single datum has $C$ possible labels, and we enumerate the average:

# %%
loss, one = CrossEntropyLoss(), X[:1]
average = sum(
    p[0, c] * curvature.empirical_fisher(model, loss, one, torch.tensor([c])) for c in range(C)
)
exact = curvature.ggn(model, loss, one, torch.tensor([0]))
assert_exact(average, exact)

# %% [markdown]
# **When they do not.** By [(3.12)], the empirical Fisher is a square of residuals.
#
# - Where the network fits its data exactly, $E = 0$, whatever the curvature.
# - Where all residuals are ten times larger, $E$ is a hundred times larger, while the GGN of a
#   squared error does not depend on $y$ at all. Steps that divide by $E$ are tiny far from the solution
#   and, if the data can be fitted, huge near it: the wrong way round.
# - Even with a perfect mean, noise of variance $\sigma^2$ gives $4 \sigma^2$ in the place of 2, so the
#   scale is right only for $\sigma^2 = \tfrac12$, the variance that the loss assumes.

# %%
loss = MSELoss()
E = curvature.empirical_fisher(model, loss, X, f)
assert E.abs().max() < 1e-20
assert curvature.ggn(model, loss, X, f).abs().max() > 0.1

residual = torch.randn(N, C)
small, large = (curvature.empirical_fisher(model, loss, X, f + k * residual) for k in (1, 10))
assert_exact(100 * small, large)
assert_close(curvature.ggn(model, loss, X, f), curvature.ggn(model, loss, X, f + residual))

line, inputs = Linear(1, 1), torch.linspace(-1, 1, 20_000)[:, None]
for variance in (0.5, 0.05):
    noise = variance**0.5 * torch.randn(len(inputs), 1)
    vectors = empirical(loss, line(inputs), line(inputs).detach() + noise)
    ratio = vectors.square().sum() / type2(loss, line(inputs), inputs)[:].square().sum()
    # a mean of z² over 20,000 normal z: standard error sqrt(2 / 20,000)
    print(f"noise variance {variance}: E / Fisher = {ratio:.3f} (expected {2 * variance})")
    assert abs(ratio / (2 * variance) - 1) < 5 * (2 / 20_000) ** 0.5

# %% [markdown]
# The shape is wrong, too, not only the scale. [Kunstner, Balles and Hennig
# (2019)](bibliography.md#empirical-fisher) make this visible with linear regression, where the GGN is
# the Hessian and its step leads to the minimum at once. We draw our own version: a straight line is fitted to data
# whose noise grows with the input. Each panel shows, for every pair of slope and intercept, the
# direction in which $-\nabla L$, $-\mathrm{GGN}^{-1} \nabla L$ and $-E^{-1} \nabla L$ lead.

# %%
generator = torch.Generator(device=f.device).manual_seed(1)
x = 0.3 + 2.2 * torch.rand(400, 1, generator=generator)
t = 1.5 * x - 1 + 0.6 * x**2 * torch.randn(400, 1, generator=generator)
inputs = torch.cat([x, torch.ones_like(x)], 1)  # slope and intercept
best = torch.linalg.lstsq(inputs, t).solution[:, 0]


def directions(parameters: Tensor) -> dict[str, Tensor]:
    r = inputs @ parameters - t[:, 0]
    gradient = 2 * r @ inputs / len(r)
    fisher = 2 * inputs.T @ inputs / len(r)
    empirical_fisher = 4 * (inputs.T * r**2) @ inputs / len(r)
    return {
        "gradient": -gradient,
        "Fisher": -torch.linalg.solve(fisher, gradient),
        "empirical Fisher": -torch.linalg.solve(empirical_fisher, gradient),
    }


def angle(v: Tensor, w: Tensor) -> float:
    return torch.rad2deg(torch.acos((v @ w / v.norm() / w.norm()).clamp(-1, 1))).item()


# %% [markdown]
# Before the picture, two points in numbers. The step $-\mathrm{GGN}^{-1} \nabla L$ leads exactly to the minimum. The
# length and the direction of the empirical step are compared with it.

# %%
far, near = best + torch.tensor([1.5, 3.0]), best + torch.tensor([0.02, -0.03])
for name, point in {"far away": far, "near": near}.items():
    steps = directions(point)
    assert_close(point + steps["Fisher"], best)  # one step, from anywhere
    ratio = steps["empirical Fisher"].norm() / steps["Fisher"].norm()
    off = angle(steps["empirical Fisher"], best - point)
    print(
        f"{name}: the empirical step is {ratio:.2f} of the right length and {off:.0f}° off course"
    )
    assert ratio < 0.2 if point is far else ratio > 0.4
    assert off > 3

net = Linear(1, 1)  # the same matrices by the oracle
with torch.no_grad():
    net.weight.fill_(far[0])
    net.bias.fill_(far[1])
E = curvature.empirical_fisher(net, MSELoss(), x, t)
assert_close(
    -torch.linalg.solve(E, curvature.ggn(net, MSELoss(), x, t) @ (far - best)),
    directions(far)["empirical Fisher"],
)


# %% [markdown]
# Now the whole plane:


# %% tags=["hide-input"] alt="Three direction fields over slope and intercept with contours of the loss. The gradient's arrows cross the long valley and its paths bend into it. The Fisher's arrows all point straight at the minimum. Most of the empirical Fisher's arrows point past it, and its paths make detours or leave the picture." caption="Directions and four paths for linear regression with noise that grows with the input. All paths have the same number of steps. Preconditioned by the Fisher they lead straight to the minimum ★. Preconditioned by the empirical Fisher some make long detours."
def points_around(count: int) -> Tensor:
    axes = torch.linspace(-2.2, 2.2, count), torch.linspace(-3.6, 3.6, count)
    return best + torch.stack(torch.meshgrid(*axes, indexing="xy"), -1)


grid, fine = points_around(15), points_around(100)
excess = fine - best
surface = torch.einsum("abi,ij,abj->ab", excess, inputs.T @ inputs / len(x), excess).cpu()
scale = torch.tensor([4.4, 7.2])


def directions_at(points: Tensor) -> dict[str, Tensor]:
    found = torch.func.vmap(directions)(points.reshape(-1, 2))
    return {name: step.reshape(points.shape) for name, step in found.items()}


fig, axes = plt.subplots(1, 3, figsize=(9.4, 3.5), sharey=True, layout="constrained")
for i, (ax, name) in enumerate(zip(axes, directions(far), strict=True)):
    ax.contour(
        *fine.permute(2, 0, 1).cpu(),
        surface,
        [0.1, 0.5, 2, 6, 15],
        colors="C0",
        linewidths=1,
        alpha=0.5,
    )
    field = directions_at(grid)[name] / scale
    field = (field / field.norm(dim=-1, keepdim=True) * scale).cpu()
    arrows = {"angles": "xy", "scale_units": "xy", "scale": 18, "width": 0.005, "color": f"C{i}"}
    ax.quiver(*grid.permute(2, 0, 1).cpu(), *field.permute(2, 0, 1), alpha=0.6, **arrows)
    path = [best + torch.tensor([[1.8, 2.6], [-1.8, 3.0], [-1.7, -3.0], [1.9, -2.2]])]
    for _ in range(250):
        step = directions_at(path[-1])[name]
        length = (step / scale).norm(dim=-1, keepdim=True)
        remaining = ((path[-1] - best) / scale).norm(dim=-1, keepdim=True)
        path.append(path[-1] + step / length * (0.05 * remaining).clamp(max=0.006))
    ax.plot(*torch.stack(path).permute(2, 0, 1).cpu(), color=f"C{i}", linewidth=2)
    left = (((path[-1] - best) / scale).norm(dim=-1)).max().item()
    assert left > 0.1 if name == "empirical Fisher" else left < 0.1
    ax.plot(*best.cpu(), "*", color="C3", markersize=12)
    ax.set(title=name, xlabel="slope", xlim=(best[0].item() - 2.4, best[0].item() + 2.4))
axes[0].set_ylabel("intercept")
plt.show()

# %% [markdown]
# One may still use $E$ as a preconditioner. But in general it is no approximation of the Fisher or the
# GGN, and it should be neither tested nor named as one.

# %% [markdown]
# ## What goes wrong in practice
#
# Mistakes in KFAC's factor $B$ can be made here, before any layer is reached. One comparison,
# `curvature_of(vectors)` against the autodiff Hessian, catches those that do not involve chance. We make
# them one by one.


# %%
def softmax_root(f: Tensor, axis: int) -> Tensor:
    """Vectors of (3.5) for classes on axis 1; the softmax should be taken along the same axis."""
    p = f.softmax(axis)
    columns = []
    for c in range(f.shape[1]):
        e_c = torch.zeros_like(p)
        e_c[:, c] = 1
        columns.append(p[:, c : c + 1].sqrt() * (e_c - p))
    return torch.stack(columns)


square, entropy, y = MSELoss(), CrossEntropyLoss(), targets[MSELoss]
hard = targets[CrossEntropyLoss]
total = CrossEntropyLoss(reduction="sum")
by_mean = torch.func.grad(entropy)(f, hard)[None]  # what .backward() of a mean loss leaves behind
mistakes = {
    "½ ‖f − y‖² in place of ‖f − y‖²": (type2(square, f, y)[:] / 2**0.5, square, f, y),
    "mean over N in place of N·C": (type2(square, f, y)[:] * C**0.5, square, f, y),
    "softmax over the batch": (softmax_root(f, 0), total, f, hard),
    "softmax over positions": (softmax_root(tokens, 2), total, tokens, token_labels),
    "empirical in place of Fisher": (empirical(entropy, f, hard), entropy, f, hard),
    "one more 1/N: mean-loss gradients": (by_mean, entropy, f, hard),
}
for name, (vectors, loss, outputs, labels) in mistakes.items():
    H_f = curvature.loss_hessian(loss, outputs, labels)
    error = largest_error(curvature_of(vectors), H_f)
    print(f"{name:35} relative error {error:.2f}")
    assert error > 0.1
roots = curvature_of(softmax_root(f, 1)), curvature_of(type2(total, f, hard))
assert (roots[0] - roots[1]).abs().max() < 1e-10 * f.abs().max()

# %% [markdown]
# The axis is a subtle one, since `softmax(-1)` is right for outputs of shape $[N, C]$ and wrong as
# soon as there are positions behind the classes. On the last line, the gradients of a mean loss at the labels of the
# data, which contain $1 / N$ each, are taken for those of single data: two mistakes at once.
# [Chapter 4](04_layer_io.py) has more about the second.
#
# **Mixing data.** Outer products belong to one datum each. Summing gradients over the batch first, as one
# plain `backward` does, adds the terms $n \neq n'$. The blocks on the diagonal are right, and so a test with a
# single datum passes:

# %%
vectors = type2(entropy, f, hard)[:]
summed = torch.einsum("vi,vj->ij", vectors.flatten(1), vectors.flatten(1))
H_f = curvature.loss_hessian(entropy, f, hard)
assert largest_error(summed, H_f) > 0.1
alone = type2(entropy, f[:1], hard[:1])[:].flatten(1)
assert_close(alone.T @ alone, curvature.loss_hessian(entropy, f[:1], hard[:1]))

# %% [markdown]
# **The square root of the number of samples.** With $1 / M$ on the vectors in place of $1 / \sqrt M$, the
# curvature is $M$ times too small, and for $M = 1$ it is right. Our deterministic test of Monte Carlo,
# that undoing the scale must give one-hot labels, finds the mistake:


# %%
def are_labels(vectors: Tensor, M: int) -> bool:
    labels = f.softmax(1) - (M * divisor(entropy, f, hard)) ** 0.5 * vectors
    return torch.allclose(labels, labels.round(), atol=1e-10)


for M in (1, 4):
    right = monte_carlo(M, generator)(entropy, f, hard)[:]
    wrong = right * M**0.5 / M
    print(f"M = {M}: right {are_labels(right, M)}, wrong {are_labels(wrong, M)}")
    assert are_labels(right, M)
    assert are_labels(wrong, M) == (M == 1)

# %% [markdown]
# **Labels from the wrong distribution.** If classes are drawn uniformly, not with the probabilities of the
# model, the vectors still are scores of labels, and the test above passes. What finds this mistake is the expectation,
# by enumeration, or the $5 \sigma$ test. At initialisation $p$ is nearly uniform, and the error is small, so test with
# outputs that are not small:


# %%
def uniform_error(outputs: Tensor) -> float:
    p = outputs.softmax(1)
    scores = p - torch.eye(C)[:, None]  # [C, N, C]
    H = curvature.loss_hessian(total, outputs, hard)
    assert_exact(curvature_of(p.T[..., None].sqrt() * scores), H)
    return largest_error(curvature_of(scores / C**0.5), H)


print(*(f"outputs × {factor}: {uniform_error(factor * f):.3f}  " for factor in (0.01, 1, 5)))
assert uniform_error(f / 100) < 0.05 < uniform_error(5 * f)

M = 20_000
drawn = torch.randint(C, (M, N), generator=generator)
vectors = (f.softmax(1) - one_hot(drawn, C)) / (M * divisor(entropy, f, hard)) ** 0.5
assert are_labels(vectors, M)
found = torch.einsum("vnc,nc->vn", vectors, u).square().sum()
print(f"the statistical test finds a deviation of {((found - expected) / sigma).item():+.0f} σ")
assert (found - expected).abs() > 5 * sigma

# %% [markdown]
# ## In one minute
#
# - A loss is a negative log-likelihood, divided by $D$. For squared error, cross-entropy and BCE its Hessian at the
#   outputs does not contain the label.
# - Columns of a square root of this Hessian, sent backward, give the GGN. Scores at labels that the model draws give
#   the same matrix in expectation, with an error of $1 / \sqrt M$.
# - For these losses the GGN is the Fisher. Gradients at the *data's* labels give the empirical Fisher, another matrix.
# - $\operatorname{KL}(p_W \Vert p_{W + \Delta}) = \tfrac12 \Delta^\top F \Delta$ up to third order.
# - The natural gradient $F^{-1} \nabla L$ is steepest descent in KL. It is the same step in all coordinates to first
#   order, until damping is added.
#
# ## Exercises
#
# **Exercise 3.1.** The rank of [(3.3)] is at most $C - 1$, yet [(3.5)] has $C$ columns. Compute
# $S \sqrt p$, and use the result to find a root with $C - 1$ columns.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $S \sqrt p = \operatorname{diag}(\sqrt p) \sqrt p - p\, (\sqrt p^{\,\top} \sqrt p) = p - p = 0$. Take an
# orthogonal $Q$ whose last column is $\sqrt p$, a unit vector. Then $S Q$ is a root as well, and its last
# column is zero: leave it out. The triangular root of `type2` is one of these.
#
# </details>
#
# **Exercise 3.2.** With $\ell = \tfrac12 \lVert f - y \rVert^2$ in place of $\lVert f - y \rVert^2$, by
# which factors do GGN and empirical Fisher change? Why not by the same?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The Hessian is halved, $I$ in place of $2 I$. The empirical Fisher contains the gradient twice and
# becomes a quarter, $J^\top r r^\top J$. A curvature is linear in the loss, a product of gradients
# quadratic.
#
# </details>
#
# **Exercise 3.3.** Show that BCE with logit $f$ has the curvature of cross-entropy with two classes
# and the logits $(0, f)$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The softmax of $(0, f)$ is $(1 - p, p)$ with $p = \sigma(f)$. The logits depend on $f$ through the Jacobian
# $j = (0, 1)^\top$, linearly, so the curvature is
# $j^\top \nabla^2 \ell\, j$, the lower right entry of [(3.3)]: $p - p^2 = p (1 - p)$.
#
# </details>
#
# **Exercise 3.4.** What is the variance of the Monte Carlo estimate of $p (1 - p)$ for one Bernoulli entry and
# one sample? For which $p$ is a single sample enough?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The squared score is $(1 - p)^2$ with probability $p$ and $p^2$ with probability $1 - p$. Hence the
# variance is $p (1 - p)^4 + (1 - p) p^4 - p^2 (1 - p)^2 = p (1 - p) (1 - 2 p)^2$. It vanishes at
# $p = \tfrac12$, where both labels give the same square, and at $0$ and $1$.
#
# </details>
#
# **Exercise 3.5 (write it).** Write a function `natural_step(network, theta, loss, y, damping)` that returns
# $-(F + \delta I)^{-1} \nabla L$. Here `network` maps parameters to outputs, as `outputs_at` does. Use `type2` for
# the vectors, `torch.func` for the rest, and nothing of `curvature`. The cell below has `check_natural_step`, which
# compares your function with `curvature`, and one solution.
#
# **Exercise 3.6.** For which networks and losses is $\tfrac12 \Delta^\top F \Delta$ the divergence itself, without a
# remainder, for steps of any length?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# If the outputs are linear in the parameters and the loss is the squared error. The divergence of two Gaussians of
# variance $\tfrac12$ is the squared distance of their means, $\sum_n \lVert J_n \Delta \rVert^2$, and
# $F = \sum_n 2 J_n^\top J_n$. For cross-entropy, a remainder is left even for a linear network.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
p = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05])
root = p.sqrt()
assert_close(S_p @ root, torch.zeros(5), atol=1e-14, rtol=0)
Q = torch.linalg.qr(torch.cat([root[:, None], torch.randn(5, 4)], 1)).Q.flip(1)
fewer = (S_p @ Q)[:, :-1]
assert_close(fewer @ fewer.T, H_p)
turned = torch.linalg.pinv(S_p) @ triangular
assert_close(turned.T @ turned, torch.eye(4))

y = targets[MSELoss]
half = lambda f: 0.5 * (f - y).square().sum()  # noqa: E731
square = MSELoss(reduction="sum")
assert_close(2 * torch.func.grad(half)(f), torch.func.grad(lambda f: square(f, y))(f))
n = N * C
assert_close(
    torch.func.jacrev(torch.func.grad(half))(f).reshape(n, n),
    curvature.loss_hessian(square, f, y) / 2,
)

logit = f[:, :1]
with_zero = torch.cat([torch.zeros_like(logit), logit], 1)
two = curvature_of(type2(CrossEntropyLoss(reduction="sum"), with_zero, hard % 2))
one = curvature_of(
    type2(BCEWithLogitsLoss(reduction="sum"), logit, targets[BCEWithLogitsLoss][:, :1])
)
assert_close(one, two[1::2, 1::2])

for q in (0.5, 0.3, 0.01):
    squares, weights = torch.tensor([(1 - q) ** 2, q**2]), torch.tensor([q, 1 - q])
    variance = weights @ squares**2 - (weights @ squares) ** 2
    assert_close(variance.item(), q * (1 - q) * (1 - 2 * q) ** 2)


def natural_step(network, theta: Tensor, loss: Module, y: Tensor, damping: float) -> Tensor:
    """A solution of Exercise 3.5."""
    f, send = torch.func.vjp(network, theta)
    sent = [send(s_n)[0] for s_v in type2(loss, f, y)[:] for s_n in one_datum_each(s_v)]
    (gradient,) = send(torch.func.grad(loss)(f, y))
    F = sum(torch.outer(v, v) for v in sent)
    return -torch.linalg.solve(F + damping * torch.eye(len(theta)), gradient)


def one_datum_each(vectors: Tensor) -> Tensor:
    """From [N, C] to [N, N, C]: outer products of different data must not mix."""
    return torch.stack([torch.eye(len(vectors))[n, :, None] * vectors for n in range(len(vectors))])


def check_natural_step(function) -> None:
    for kind, y in targets.items():
        for loss in (kind(), kind(reduction="sum")):
            found = function(outputs_at, theta, loss, y, 0.1)
            gradient = torch.func.grad(lambda t: loss(outputs_at(t), y))(theta)  # noqa: B023
            system = curvature.ggn(model, loss, X, y) + 0.1 * torch.eye(len(theta))
            assert_exact(found, -torch.linalg.solve(system, gradient))


check_natural_step(natural_step)

straight = Linear(4, C)
shift = torch.randn(C, 4)
for kind, exactly in ((MSELoss, True), (CrossEntropyLoss, False)):
    loss, y = kind(reduction="sum"), targets[kind]
    step = curvature.flatten_values(straight, {"weight": shift})
    half_form = step @ curvature.fisher(straight, loss, X, y) @ step / 2
    divergence = kl(loss, straight(X), straight(X) + X @ shift.T)
    assert (abs(divergence / half_form - 1) < 1e-10) == exactly
print("Exercises 3.1 to 3.6: all hold")

# %% [markdown]
# ## Further reading
#
# [Martens (2014)](bibliography.md#new-insights), sections 5, 8 and 9, on natural gradients and
# when the Fisher is the GGN. [Kunstner, Balles and Hennig (2019)](bibliography.md#empirical-fisher) on the
# empirical Fisher. [The KFAC-from-scratch tutorial](bibliography.md#from-scratch) derives the same roots
# and draws labels likewise. What the vectors do inside the network is the subject of
# [Chapter 4](04_layer_io.py).
