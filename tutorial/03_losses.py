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
# **Part I: Curvature.** What does a loss send back through the network, and why is the result the
# Fisher?
#
# [Chapter 2](02_curvature.py) took the network out of the question: the GGN is $J^\top H_f J$, and
# all that a loss contributes is $H_f$, its Hessian with respect to the outputs. Autodiff, however,
# does not send matrices backward. It sends vectors. This chapter splits $H_f$ into vectors, in three
# ways. Two of them give the same matrix, which is at once the GGN and the Fisher. The third gives
# another matrix that looks similar and is often mistaken for it.

# %%
import copy
import itertools

import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.nn import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    Linear,
    Module,
    MSELoss,
    PoissonNLLLoss,
    Sequential,
    Tanh,
)
from torch.nn.functional import one_hot
from torch.testing import assert_close

from kfac_scratch import curvature, losses
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, largest_error, set_up
from kfac_scratch.losses import divisor, empirical, monte_carlo, type2, type2_classwise
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one

# %% [markdown]
# ## A loss is a likelihood
#
# Let the network's output $f_n \in \mathbb{R}^C$ for datum $n$ be the parameters of a distribution
# $p(y \mid f_n)$ of the target. Asking for the parameters that make the data most probable means
# minimising a sum of negative logarithms. Every loss of this chapter is of the form
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
# Only the first may surprise. A Gaussian of variance $\sigma^2$ has $-\log p = \lVert y - f
# \rVert^2 / (2 \sigma^2) + \text{const}$, so the squared error *without* a half belongs to
# $\sigma^2 = \tfrac12$. (With the half, the variance is 1: another loss, half the curvature.) The
# constant depends on nothing that is trained; compare differences of two outputs:

# %%
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

# %%
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
# Now differentiate each term twice by the outputs.
#
# **Squared error.** $\partial \ell / \partial f = 2 (f - y)$, and once more, $\nabla^2 \ell = 2 I$.
#
# **Softmax and cross-entropy.** Write the term as $\ell = -f_y + \log \sum_k e^{f_k}$. The derivative
# of the logarithm by $f_c$ is $e^{f_c} / \sum_k e^{f_k} = p_c$. So
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
# $y$ (or $e_y$) and $f$ meet in $y^\top f$ only, which is linear in $f$. This will be the reason that
# GGN and Fisher are one.


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
# The Hessian [(3.3)] has rank $C - 1$, since the softmax does not see a shift of all logits. So a root
# with one column less exists, and one can be written down. Take away a first column that makes the
# first row of what remains zero. This is $s_1 = H e_1 / \sqrt{H_{11}}$, and with
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
# probability. The same step takes away the next column, and so on; the last class has none. The
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
# `type2` is that. The general shape $[N, C, P]$ with $P$ positions is for losses with several labels
# per datum, to which we come below; here $P = 1$. What it returns makes its vectors when they are
# read, so that those of a thousand classes are never all in memory; `[:]` reads all of them.

# %% tags=["remove-input"]
code(type2, losses.HessianRoot, losses._root_columns, losses._diagonal_root)

# %%
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
# same. The columns of [(3.5)] are one too many, but they mean something. Picture the predictions for three classes as points of a triangle whose corners are certainty.
# Column $c$ is an arrow from the prediction towards corner $c$, shortened by $\sqrt{p_c}$.

# %% tags=["hide-input"] alt="Two triangles whose corners are the three classes. Left: a prediction near the centre, with three arrows of similar length towards the corners. Right: a prediction near one corner, where all three arrows are short." caption="The columns of [(3.5)] for an undecided (left) and a confident prediction (right). The ellipse is that of the Hessian, the sum of the arrows' outer products."
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


# %%
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

# %%
for kind, y in targets.items():
    for loss in (kind(reduction="sum"), kind(reduction="mean")):
        GGN = curvature.ggn(model, loss, X, y)
        assert_exact(curvature.fisher(model, loss, X, y), GGN)

# %% [markdown]
# We can now say what the arrows in the picture are. By [(3.2)], the gradient at label $c$ is $p - e_c$,
# and the term that it contributes to the expectation [(3.6)] is $p_c\, (p - e_c)(p - e_c)^\top$. The
# column $s_c = \sqrt{p_c}\, (e_c - p)$ of [(3.5)] **is** the enumerated score of class $c$, up to a sign
# that outer products do not see. (`type2_classwise`, of which more below, has these columns.)

# %%
loss, y = CrossEntropyLoss(reduction="sum"), targets[CrossEntropyLoss]
p = f.softmax(1)
for c, column in enumerate(type2_classwise(loss, f, y)):
    score = -torch.func.grad(loss)(f, torch.full_like(y, c))
    assert_close(column, p[:, c : c + 1].sqrt() * score)

# %% [markdown]
# ### Where the equality ends
#
# [Theorem 3.1] holds for every likelihood, [Theorem 3.2] needs a Hessian without $y$. Take a Gaussian
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
# \tag{3.7}
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
# of [(3.7)], and each vector must be $p - e_c$ for *some* class, exactly. What remains is how often
# each class occurs. We take a number that depends on all classes, $u^\top \widehat H u$ for a fixed
# $u$. Its expectation and its standard error $\sigma$ are known exactly, by enumeration. If the code
# is right, a mean of this many independent terms is nearly normal, and a deviation of more than
# $5 \sigma$ has a probability of less than one in a million. The cell also prints how small an error
# it would notice.

# %%
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
# \tag{3.8}
# $$
#
# is called the **empirical Fisher**. The name suggests an estimate of the Fisher; it is
# not one, because the labels do not come from the model. For the squared error the gradient at the
# outputs is twice the residual $r_n = f_n - y_n$, and so, beside $\mathrm{GGN} = \frac{1}{D} \sum_n 2\,
# J_n^\top J_n$,
#
# $$
# E = \frac{1}{D} \sum_n 4\, J_n^\top r_n r_n^\top J_n.
# \tag{3.9}
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
# **When they do not.** By [(3.9)], the empirical Fisher is a square of residuals.
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
# Before the picture, two points in numbers. The step $-\mathrm{GGN}^{-1} \nabla L$ is exactly the way to
# the minimum, so it is the measure of the other's length and course.

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


# %% tags=["hide-input"] alt="Three direction fields over slope and intercept with contours of the loss. The gradient's arrows cross the long valley and its paths bend into it. The Fisher's arrows all point straight at the minimum. Most of the empirical Fisher's arrows point past it, and its paths make detours or leave the picture." caption="Directions and four paths for linear regression with misspecified noise. All paths may be equally long. Preconditioned by the Fisher they are straight and arrive. The empirical Fisher sends some on long detours."
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
# None of this forbids using $E$ as a preconditioner. It only is no approximation of the Fisher or the
# GGN in general, and it should be neither tested nor named as one.
#
# ## Many labels for one datum
#
# A language model predicts a label at every position $s = 1, \dots, P$ of a sequence. PyTorch puts
# the classes on axis 1, so $f$ has shape $[N, C, P]$. The labels are independent given the outputs,
# hence the Hessian of one datum, of size $C P$, is block-diagonal with one block per position, and its exact
# root has **$(C - 1) P$ columns**: each is nonzero at a single position. This is what `type2` returns.
#
# That is many backward passes. It is tempting to send, for each class, its columns for *all*
# positions at once: $C$ passes instead of $(C - 1) P$. Is it allowed? The outer product of a sum is not the
# sum of outer products; with $s_c = \sum_s s_{cs}$,
#
# $$
# s_c s_c^\top = \sum_s s_{cs} s_{cs}^\top
# + \underbrace{\sum_{s \neq s'} s_{cs} s_{cs'}^\top}_{\text{cross terms}},
# \tag{3.10}
# $$
#
# and the cross terms claim that the loss couples positions, which it does not.
#
# ### In the package
#
# The shortcut has a name of its own, `type2_classwise`, and nothing uses it unless it is asked for. Its
# columns are those of [(3.5)]: the cross terms of another root would be others.

# %% tags=["remove-input"]
code(type2_classwise, losses._class_vectors)

# %%
loss, P = CrossEntropyLoss(), 5
H_f = curvature.loss_hessian(loss, tokens, token_labels)
exact_root, shortcut = (fisher(loss, tokens, token_labels) for fisher in (type2, type2_classwise))
print("type2:", tuple(exact_root.shape), "  type2_classwise:", tuple(shortcut.shape))
assert len(exact_root) == (C - 1) * P
assert len(shortcut) == C
assert_exact(curvature_of(exact_root), H_f)
assert largest_error(curvature_of(shortcut), H_f) > 1e-2

# %% tags=["hide-input"] alt="Two heat maps of 15 by 15. The exact Hessian of one sequence couples each position with itself only. The shortcut has further entries of both signs that couple different positions." caption="What the two say about one sequence (three classes at five positions, positions together). The cross terms of [(3.10)] fill the space between the blocks."
by_position = torch.arange(C * P).reshape(C, P).T.flatten()  # positions first
pictures = {"type2: the Hessian": exact_root, "type2_classwise": shortcut}
pictures = {
    name: curvature_of(v)[: C * P, : C * P][by_position][:, by_position]
    for name, v in pictures.items()
}
matrices(pictures, blocks=dict.fromkeys(pictures, (C, C)))

# %% [markdown]
# When does nobody notice? KFAC in its expand setting ([Chapter 6](06_weight_sharing.py)) asks of the vectors
# that reach a layer only for the sum of *their own* outer products over all positions,
# $\sum_{v n s} g_{vns} g_{vns}^\top$. As long as no later layer mixes positions, what arrives at position $s$
# of a layer started at position $s$ of the output. Then both give the same sum. Once
# positions are mixed, by attention, by a convolution or by a mean, the vectors of different positions
# are added up on the way, and cross terms enter. We watch the first layer of a small network for
# sequences, without and with attention. Here $g$ comes from `layer_ios`, the subject of
# [Chapter 4](04_layer_io.py).


# %%
class TokenModel(Module):
    """A logit per class and position; optionally, one head of attention in between."""

    def __init__(self, attention: bool):
        super().__init__()
        self.first, self.last = Linear(4, 6), Linear(6, C)
        self.query, self.key = Linear(6, 2), Linear(6, 2)
        self.attention = attention

    def forward(self, X: Tensor) -> Tensor:  # [N, P, 4] -> [N, C, P]
        h = self.first(X).tanh()
        if self.attention:
            h = (self.query(h) @ self.key(h).mT).softmax(-1) @ h
        return self.last(h).mT


def sum_of_outer_products(model: Module, fisher, layer: str) -> Tensor:
    g = layer_ios(model, loss, sequences, token_labels, fisher, layers=[layer])[layer].g
    return torch.einsum("vnso,vnsp->op", g, g)


sequences = torch.randn(N, P, 4)
for attention, layer in itertools.product((False, True), ("first", "last")):
    network = TokenModel(attention)
    exact, short = (sum_of_outer_products(network, v, layer) for v in (type2, type2_classwise))
    error = largest_error(short, exact)
    print(f"{'attention' if attention else 'no mixing':9}  {layer:5} layer: {error:.1e}")
    mixed = attention and layer == "first"
    assert error > 1e-2 if mixed else error < 1e-10

# %% [markdown]
# The last layer agrees in both networks, since nothing follows it. But the agreement is one of these sums, not of
# curvature. The exact block of a layer that is used at several positions adds up a datum's gradient over
# positions *before* taking the outer product, and meets the cross terms even where nothing
# mixes:

# %%
network = TokenModel(attention=False)
GGN = curvature.ggn(network, loss, sequences, token_labels)
exact = curvature.diagonal_blocks(network, GGN)["last"]
for fisher in (type2, type2_classwise):
    io = layer_ios(network, loss, sequences, token_labels, fisher, layers=["last"])["last"]
    error = largest_error(io.block(), exact)
    print(f"{fisher.__name__:16} relative error of the block: {error:.1e}")
    assert error < 1e-10 if fisher is type2 else error > 1e-2

# %% [markdown]
# ## Weights, smoothing, soft targets
#
# PyTorch's losses have options. What do they do to the Hessian? Each changes a term into a weighted
# sum of the log-probabilities, and every $-\log p_c$ has the *same* Hessian [(3.3)], since its label
# dropped out:
#
# $$
# \ell = -\sum_c q_c w_c \log p_c
# \quad\Longrightarrow\quad
# \nabla^2 \ell = \Bigl(\sum_c q_c w_c\Bigr) \bigl(\operatorname{diag}(p) - p p^\top\bigr).
# \tag{3.11}
# $$
#
# Here $q$ is the target distribution ($e_y$ for a label, or what smoothing makes of it) and $w$
# the class weights. So the vectors are those of before times one number per label,
# $\sqrt{\sum_c q_c w_c}$. An ignored label has the number zero. Without class weights $\sum_c q_c = 1$:
# **soft targets and label smoothing leave the curvature as it is.** For BCE, `pos_weight` multiplies
# the first part of the term, $-y \log p$, by $w$, and the number is $w\, y + (1 - y)$.
#
# ### In the package
#
# One number for each label. Everything else, `type2` and `monte_carlo`, multiplies by its square root.

# %% tags=["remove-input"]
code(losses._hessian_weights)

# %%
w, soft = torch.tensor([0.5, 2.0, 1.0]), torch.softmax(torch.randn(N, C), 1)
hard, bits = targets[CrossEntropyLoss], targets[BCEWithLogitsLoss]
options = {
    "class weights": (CrossEntropyLoss(weight=w), hard),
    "ignore_index": (CrossEntropyLoss(ignore_index=2), hard),
    "label_smoothing": (CrossEntropyLoss(label_smoothing=0.1), hard),
    "all three": (CrossEntropyLoss(weight=w, ignore_index=2, label_smoothing=0.1), hard),
    "soft targets": (CrossEntropyLoss(), soft),
    "soft, weights, smoothing": (CrossEntropyLoss(weight=w, label_smoothing=0.1), soft),
    "pos_weight": (BCEWithLogitsLoss(pos_weight=w), bits),
    "weight and pos_weight": (BCEWithLogitsLoss(weight=1 / w, pos_weight=w), bits),
}
plain = {kind: curvature_of(type2(kind(), f, y)) for kind, y in targets.items()}
for name, (loss, y) in options.items():
    H_f, ours = curvature.loss_hessian(loss, f, y), curvature_of(type2(loss, f, y))
    ignoring = largest_error(plain[type(loss)], H_f)
    print(
        f"{name:25} error {largest_error(ours, H_f):.1e}   if the option is ignored {ignoring:.2f}"
    )
    assert_exact(ours, H_f)
    assert ignoring < 1e-10 if name in ("label_smoothing", "soft targets") else ignoring > 0.1

# %% [markdown]
# With weights, the sum of $e^{-\ell(f, y)}$ over the labels $y$ depends on $f$, so that $\ell$ is no
# longer the negative log-likelihood of a distribution. The GGN exists all the same. `monte_carlo` draws from the
# unweighted model and multiplies by the number above. The oracle `fisher`, which stands for the
# definition, refuses:

# %%
try:
    curvature.fisher(model, CrossEntropyLoss(weight=w), X, hard)
    raise AssertionError("a weighted loss has no distribution of labels")
except NotImplementedError as error:
    print(error)

# %% [markdown]
# ## Your own loss in five lines
#
# Another likelihood needs a function of the same kind, nothing to register. Take counts with a
# Poisson distribution of rate $e^f$. Its term is $\ell = e^f - y f + \log y!$, so $\nabla^2 \ell = e^f$:
# no $y$ in it, one vector per output entry.


# %%
def poisson(loss: PoissonNLLLoss, f: Tensor, y: Tensor) -> Tensor:
    """A square root of the Hessian of `PoissonNLLLoss(log_input=True)`."""
    D = f.numel() if loss.reduction == "mean" else 1
    root = (f.detach().exp() / D).sqrt()  # [N, C]
    return root.diag_embed().movedim(-1, 0)  # [V, N, C] with V = C


counts = torch.randint(5, (N, C)).double()
for loss in (PoissonNLLLoss(), PoissonNLLLoss(reduction="sum")):
    H_f = curvature.loss_hessian(loss, f, counts)
    assert_exact(curvature_of(poisson(loss, f, counts)), H_f)

    GGN = curvature.ggn(model, loss, X, counts)
    for name, block in curvature.diagonal_blocks(model, GGN).items():
        ours = layer_ios(model, loss, X, counts, poisson)[name].block()
        assert_exact(ours, block)

# %% [markdown]
# `type2`, in contrast, refuses a loss that it does not know, and says what to do. A wrong guess
# would not be noticed.

# %%
try:
    type2(PoissonNLLLoss(), f, counts)
    raise AssertionError("type2 must not guess")
except NotImplementedError as error:
    print(error)

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
# soon as there are positions behind the classes. On the last line, the gradients of a mean loss, which
# contain $1 / N$ each, are taken for those of single data; [Chapter 4](04_layer_io.py) meets this again.
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
# that undoing the scale must give one-hot labels, sees it:


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
# model, the vectors still are scores of labels, and the test above passes. It takes the expectation, by
# enumeration, or the $5 \sigma$ test. At initialisation, with $p$ nearly uniform, the mistake is
# nearly invisible, so test with outputs that are not small:


# %%
def uniform_error(outputs: Tensor) -> float:
    p = outputs.softmax(1)
    scores = p - torch.eye(C)[:, None]  # [C, N, C]
    H = curvature.loss_hessian(total, outputs, hard)
    assert_exact(curvature_of(p.T[..., None].sqrt() * scores), H)
    return largest_error(curvature_of(scores / C**0.5), H)


print(
    f"outputs / 100: {uniform_error(f / 100):.3f}   outputs: {uniform_error(f):.3f}   outputs × 5: {uniform_error(5 * f):.3f}"
)
assert uniform_error(f / 100) < 0.05 < uniform_error(5 * f)

M = 20_000
drawn = torch.randint(C, (M, N), generator=generator)
vectors = (f.softmax(1) - one_hot(drawn, C)) / (M * divisor(entropy, f, hard)) ** 0.5
assert are_labels(vectors, M)
found = torch.einsum("vnc,nc->vn", vectors, u).square().sum()
print(f"the statistical test finds a deviation of {((found - expected) / sigma).item():+.0f} σ")
assert (found - expected).abs() > 5 * sigma

# %% [markdown]
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

logits = f[:, :1]
with_zero = torch.cat([torch.zeros_like(logits), logits], 1)
two = curvature_of(type2(CrossEntropyLoss(reduction="sum"), with_zero, hard % 2))
one = curvature_of(type2(BCEWithLogitsLoss(reduction="sum"), logits, bits[:, :1]))
assert_close(one, two[1::2, 1::2])

for q in (0.5, 0.3, 0.01):
    squares, weights = torch.tensor([(1 - q) ** 2, q**2]), torch.tensor([q, 1 - q])
    variance = weights @ squares**2 - (weights @ squares) ** 2
    assert_close(variance.item(), q * (1 - q) * (1 - 2 * q) ** 2)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Martens (2014)](bibliography.md#new-insights), sections 5, 8 and 9, on natural gradients and
# when the Fisher is the GGN. [Kunstner, Balles and Hennig (2019)](bibliography.md#empirical-fisher) on the
# empirical Fisher. [The KFAC-from-scratch tutorial](bibliography.md#from-scratch) derives the same roots
# and draws labels likewise. What the vectors do inside the network is the subject of
# [Chapter 4](04_layer_io.py).
