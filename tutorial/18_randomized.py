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
# # 18. Randomised KFAC: a few eigenpairs, without the others
#
# **Part V: Better and faster.** An eigendecomposition computes all eigenpairs of a factor, though
# only a few of them matter. How are those few found without the others?
#
# KFAC inverts two factors per layer, and the number of operations grows with the *cube* of the layer's width. But a
# factor has few eigenvalues that matter: [Figure 18.1]. RS-KFAC and SRE-KFAC find the leading eigenpairs by a few
# products with the factor and replace all other eigenvalues by one number. Their cost grows with the square of the
# width.

# %% tags=["hide-input"]
import json
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

from kfac_scratch.approximations.adaptive_rank import AdaptiveRank, rank_by_ratio
from kfac_scratch.approximations.estimators import Estimator, MovingAverage, weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.approximations.randomized import (
    Randomized,
    Sketch,
    SketchedInverse,
    leading,
    nystrom,
    randomized,
    range_basis,
    rsvd,
    smallest_kept,
    srevd,
    trace_matched,
    zero_tail,
)
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like, psd_eigh
from kfac_scratch.losses import monte_carlo
from kfac_scratch.matrices.damping import factored_inverse, relative_factored_inverse
from kfac_scratch.matrices.low_rank import FourBlocks
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import RESULTS, code, style

set_up()  # seed 0, float64, the GPU where there is one
device = torch.get_default_device()

# %% tags=["hide-input"] fold="A network with two wide layers, and its training by KFAC"
digits = load_digits()
order = torch.randperm(len(digits.target), device="cpu")
images = torch.tensor(digits.data, device=device)[order] / 16
labels = torch.tensor(digits.target, device=device)[order]
loss = CrossEntropyLoss()


def network() -> Sequential:
    torch.manual_seed(1)
    return Sequential(Linear(64, 256), Tanh(), Linear(256, 256), Tanh(), Linear(256, 10))


def train(estimator: Estimator, steps: int = 30, period: int = 5) -> tuple[list[float], dict]:
    """Losses on 1500 images before every step, and the curvature after the last one."""
    model, states, losses = network(), {}, []
    params = dict(model.named_parameters())
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


losses_kfac, states = train(MovingAverage(kfac))
factors = states["2"]
spectra = {"A": psd_eigh(factors.A)[0].flip(0), "B": psd_eigh(factors.B)[0].flip(0)}

# %% tags=["hide-input"] alt="Two log plots, one for each factor of the middle layer: all 257 or 256 eigenvalues against their number, relative to the largest. They fall by two orders of magnitude or more within the first 30 and further from there. Triangles on the first 32 mark what is kept. A horizontal line over the others is the one number that replaces them; it lies below the dotted line of a damping of one percent." caption="The factors of the middle layer after 30 steps. Line: all eigenvalues, relative to the largest. Triangles: the 32 eigenpairs that RS-KFAC finds and keeps. Horizontal line: the number $c$ that replaces all others, their mean. Dotted: a damping of 1 % of the largest eigenvalue, below which eigenvalues hardly count."
looks = {  # the same in all figures of this chapter
    "RS": {"color": "C1", "marker": "^"},
    "SRE": {"color": "C2", "marker": "v"},
    "Nyström": {"color": "C3", "marker": "s"},
}
fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained", sharey=True)
for ax, (name, values) in zip(axes, spectra.items(), strict=True):
    M = getattr(factors, name)
    kept, _ = leading(M, Sketch(32))
    c = trace_matched(kept, M.trace(), len(M))
    first, color = values[0], looks["RS"]["color"]
    ax.semilogy(range(1, len(values) + 1), (values / first).cpu(), color=style("KFAC")["color"])
    ax.semilogy(range(1, 33), (kept / first).cpu(), **looks["RS"], linestyle="", markersize=4)
    ax.semilogy([33, len(values)], 2 * [float(c / first)], color=color, linewidth=2)
    ax.axhline(0.01, linestyle=":", linewidth=1, color=ax.xaxis.label.get_color())
    notes = {
        "eigenvalues": ((150, float(values[149] / first)), style("KFAC")["color"]),
        "kept: U and d": ((12, float(values[11] / first)), color),
        "the rest: c": ((180, float(c / first)), color),
        "damping": ((200, 0.01), ax.xaxis.label.get_color()),
    }
    for label, (at, paint) in notes.items():
        ax.annotate(label, at, (4, 4), textcoords="offset points", color=paint)
    ax.set(title=f"factor {name}", xlabel="number of the eigenvalue", ylim=(1e-8, 2))
axes[0].set_ylabel("relative to the largest")
plt.show()

for name, values in spectra.items():
    share = values.cumsum(0) / values.sum()
    visible = int((values > 0.01 * values[0]).sum())
    print(
        f"{name}: {len(values)} eigenvalues, of which {visible} are above 1 % of the largest;",
        end=" ",
    )
    print(f"the first 32 hold {share[31].item():.1%} of the trace")
    assert visible < 64
    assert share[31] > 0.9

# %% [markdown]
# For a factor $M$ with leading eigenvalues $d$ and eigenvectors in the columns of $U$, the number $c$ for all others,
# and a damping $\gamma$, the inverse needs no further eigenvectors:
#
# $$
# \begin{aligned}
# \hat M &= U \operatorname{diag}(d)\, U^\top + c\, (I - U U^\top) , \\
# (\hat M + \gamma I)^{-1} X &= \tfrac{1}{c + \gamma} X
# + U \operatorname{diag} \Bigl( \tfrac{1}{d_i + \gamma} - \tfrac{1}{c + \gamma} \Bigr) U^\top X .
# \end{aligned}
# $$
#
# After this chapter you will be able to
#
# - find leading eigenpairs by a few products with a factor, in three ways, and order the three;
# - choose the number $c$, and say what each choice does to a step;
# - invert the damped product of two such factors exactly;
# - say where the method equals KFAC, and which power of the width it saves.
#
# ## The spectrum of a factor
#
# The network has two hidden layers of 256 units and is trained on handwritten digits. A step $p$ is
# scaled down where $p^\top (M + \delta I)\, p$, its squared length in KFAC's damped matrix $M$, would exceed 0.01, so
# that it stays in a region where the quadratic model can be trusted.
#
# The damping decides which eigenvalues matter: $1 / (\lambda + \gamma)$ is nearly $1 / \gamma$ for every eigenvalue far
# below $\gamma$. With a damping of 1 % of the largest eigenvalue, only the eigenvalues counted above lie above it.
#
# ### Why the spectrum falls, and what is not proved
#
# A factor is a moving average, $M_t = \rho M_{t-1} + (1 - \rho) X_t X_t^\top$, with a batch of $N$
# columns $X_t$. After $j$ batches, $M_t = \rho^j M_{t-j} + {}$a matrix of rank at most $j N$.
#
# <div class="admonition theorem" markdown="1" id="thm-18.1">
# <p class="admonition-title" markdown="1"><b>Theorem 18.1 (the average forgets)</b></p>
#
# All eigenvalues of $M_t$ but the largest $jN$ are at most $\rho^j$ times the largest of $M_{t-j}$:
#
# $$
# \lambda_{jN + 1}(M_t) \le \rho^j \lambda_1(M_{t-j}) .
# \tag{18.1}
# $$
#
# </div>
#
# **Proof.** Weyl's inequality, $\lambda_{i + k + 1}(P + R) \le \lambda_{i + 1}(P) + \lambda_{k + 1}(R)$, with
# $i = 0$, $P = \rho^j M_{t-j}$, $k = jN$ and $\lambda_{jN+1}(R) = 0$. $\blacksquare$
#
# The paper's abstract says that, because of this average, the spectrum "must decay", and over "a constant number of
# modes irrespectively of the layer width". Both are in the bound: $jN$ does not depend on the width. This is why the
# cost can fall from the cube of the width to its square. But for common numbers the bound is weak. We count how many
# eigenvalues it allows until $\rho^j$ is $\tfrac{1}{33}$:

# %% tags=["hide-input"] fold="Counted: eigenvalues that the bound allows"
rho, N = 0.95, 256
j = int(torch.tensor(1 / 33).log() / torch.tensor(rho).log()) + 1
print(f"{j} batches of {N}: at most {j * N} eigenvalues are larger than 1/33 of the largest")
assert j * N > 8192

# %% [markdown]
# The layers of common networks are narrower, so that the bound says nothing about their factors. It proves *that* the
# spectrum decays, not that 32 or 200 eigenpairs are enough. That they are enough is an observation, as in
# [Figure 18.1], and depends on the data, the network and the batch. The abstract, too, shows only numerically that "in
# practice this decay is very rapid".
#
# ## A basis from a few products
#
# Let $M$ be a factor with eigenpairs $(\lambda_i, q_i)$. Multiply it with a vector of random numbers:
#
# $$
# M \omega = \sum_i \lambda_i\, (q_i^\top \omega)\, q_i .
# \tag{18.2}
# $$
#
# The coefficients $q_i^\top \omega$ are independent normal numbers of equal variance. So $M \omega$ is a
# random mixture of eigenvectors with their eigenvalues as weights, and the leading eigenvectors dominate it. A few
# such mixtures, say $q = r + 10$ of them, nearly span the space of the leading $r$. After a second product the weights
# are $\lambda_i^2$, after a third $\lambda_i^3$. As loops:


# %%
def basis_by_hand(M: Tensor, columns: int, iterations: int) -> Tensor:
    vectors = []
    for _ in range(columns):
        vectors.append(M @ torch.randn(len(M)))
    for _ in range(iterations + 1):
        orthonormal = []
        for v in vectors:
            for u in orthonormal:
                v = v - (u @ v) * u
            for u in orthonormal:  # once more, against round-off
                v = v - (u @ v) * u
            orthonormal.append(v / v.norm())
        vectors = [M @ u for u in orthonormal]
    return torch.stack(orthonormal, 1)


# %% [markdown]
# We try it on a matrix with 60 rows whose eigenvalues fall by a factor of ten in every ten.


# %% tags=["hide-input"] fold="Measured: how much of the leading eigenvectors a basis misses"
def made_up(d: int, rate: float = 0.1) -> tuple[Tensor, Tensor]:
    """A matrix whose eigenvalues fall by a factor of ten in every `1 / rate`."""
    Q, values = torch.linalg.qr(torch.randn(d, d)).Q, 10 ** (-rate * torch.arange(d))
    return Q * values @ Q.T, values


M, values = made_up(60)
leading_vectors = psd_eigh(M)[1].flip(1)[:, :6]
for iterations in range(4):
    Q = basis_by_hand(M, 12, iterations)
    assert_exact(Q.T @ Q, torch.eye(12))
    missed = (leading_vectors - Q @ Q.T @ leading_vectors).norm() / 6**0.5
    print(f"{iterations} iterations miss {missed.item():.0e} of the six leading eigenvectors")
assert missed < 0.01

# %% [markdown]
# ### In the package
#
# The package takes all $q$ vectors at once, and a QR decomposition in the place of the two inner loops. The seed of the
# random start is a field of `Sketch`, so that a result can be repeated. Since the start is independent of $M$, all
# factors may use the same one.

# %% tags=["beside", "remove-input"]
code(range_basis)

# %% [markdown]
# ## Three decompositions
#
# Given $Q$, with $q$ orthonormal columns, the paper has two approximations of $M$. Both take one more
# product with $M$.
#
# **SRE** compresses $M$ to the span of $Q$ on both sides:
#
# $$
# Q Q^\top M Q Q^\top = (Q W) \operatorname{diag}(\theta)\, (Q W)^\top ,
# \qquad Q^\top M Q = W \operatorname{diag}(\theta)\, W^\top .
# \tag{18.3}
# $$
#
# The $\theta_i$ are called Ritz values. **RS** takes a singular value decomposition
# $Q^\top M = \tilde U \operatorname{diag}(\sigma)\, V^\top$ and takes $V \operatorname{diag}(\sigma)\, V^\top$, without
# $\tilde U$ ([the author's code, line
# 141](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/RS_KFAC_optimizer_file.py#L141)).
# Which matrix is this? Its square is $V \operatorname{diag}(\sigma^2)\, V^\top = (Q^\top M)^\top (Q^\top M)$, so
#
# $$
# V \operatorname{diag}(\sigma)\, V^\top = \bigl( M Q Q^\top M \bigr)^{1/2} .
# \tag{18.4}
# $$
#
# A third approximation is not in the paper, and has long been known for kernel matrices. It is named after
# **Nyström**:
#
# $$
# M Q\, (Q^\top M Q)^{-1} Q^\top M .
# \tag{18.5}
# $$

# %% tags=["remove-input"]
code(rsvd, srevd, nystrom)


# %% tags=["hide-input"] fold="Checked: the three functions give (18.3), the root (18.4), and (18.5)"
def from_pairs(d: Tensor, U: Tensor, c: Tensor | float = 0.0) -> Tensor:
    return (U * (d - c)) @ U.T + c * torch.eye(len(U))


Q = range_basis(M, Sketch(rank=12, oversampling=0, iterations=0))
assert_exact(from_pairs(*srevd(M, Q)), Q @ Q.T @ M @ Q @ Q.T)
assert_exact(from_pairs(*rsvd(M, Q)) @ from_pairs(*rsvd(M, Q)), M @ Q @ Q.T @ M)
assert_exact(from_pairs(*nystrom(M, Q)), M @ Q @ torch.linalg.solve(Q.T @ M @ Q, Q.T @ M))

# %% [markdown]
# <div class="admonition theorem" markdown="1" id="thm-18.2">
# <p class="admonition-title" markdown="1"><b>Theorem 18.2 (the order)</b></p>
#
# Let $M$ be positive definite. For the same $Q$, RS $\preceq$ Nyström $\preceq M$. The eigenvalues of SRE, RS,
# Nyström and $M$, in this order and each from the largest on, satisfy
#
# $$
# \theta_i \le \sigma_i \le \nu_i \le \lambda_i , \qquad i \le q .
# \tag{18.6}
# $$
#
# SRE itself need not be below $M$.
#
# </div>
#
# **Proof.** $P \preceq R$ means that $R - P$ is positive semi-definite; then every eigenvalue of $P$ is at most that of
# $R$ with the same number. *SRE and RS:* $Q^\top M Q = (Q^\top M)\, Q$, and a product with $Q$, whose norm is 1, makes
# no singular value larger. *RS and $M$:* $Q Q^\top \preceq I$, so $M Q Q^\top M \preceq M^2$, and taking roots keeps
# the order $\preceq$ (squaring would not). *Nyström and $M$:* with $H = M^{1/2}$, [(18.5)] is $H P H$, where $P$
# projects onto the range of $HQ$. *RS and Nyström:* let $N$ be any matrix with $0 \preceq N \preceq M$ whose range lies
# in that of $MQ$. Then $N = H C H$ with $0 \preceq C \preceq I$, and the range of $C$ lies in
# $H^{-1} \operatorname{range}(MQ) = \operatorname{range}(HQ)$. Thus $C = P C P \preceq P$ and $N \preceq H P H$:
# Nyström is the largest of all such $N$, and RS is one of them. $\blacksquare$
#
# So all three make eigenvalues too small, SRE the most and Nyström the least, from the same products with $M$.


# %% tags=["hide-input"] fold="Checked: the order of eigenvalues and matrices, and that SRE is not below M"
def smallest_eigenvalue(P: Tensor) -> float:
    return torch.linalg.eigvalsh(P)[0].item()


chain = [*(f(M, Q)[0] for f in (srevd, rsvd, nystrom)), values[:12]]
for lower, upper in pairwise(chain):
    assert (lower <= upper + 1e-12).all()
S, R, Y = (from_pairs(*f(M, Q)) for f in (srevd, rsvd, nystrom))
assert smallest_eigenvalue(M - Y) > -1e-12
assert smallest_eigenvalue(Y - R) > -1e-12
print(f"smallest eigenvalue of M - SRE: {smallest_eigenvalue(M - S):.3f}")
assert smallest_eigenvalue(M - S) < -0.01

# %% [markdown]
# How far from $M$ are they? We take rank 12 and up to four iterations.

# %% tags=["hide-input"] fold="Measured: errors of three decompositions, mean over 20 seeds"
steps, kinds = range(5), {"SRE": srevd, "RS": rsvd, "Nyström": nystrom}
curves: dict[str, list[float]] = {name: [] for name in kinds}
for iterations in steps:
    for name, f in kinds.items():
        sketches = [Sketch(12, 0, iterations, seed) for seed in range(20)]
        found = [relative_error(from_pairs(*leading(M, s, f)), M) for s in sketches]
        curves[name].append(sum(found) / len(found))
d, U = (t.flip(-1) for t in psd_eigh(M))
best = relative_error(from_pairs(d[:12], U[:, :12]), M)
for k in (0, 1):
    print(f"{k} iterations:", ", ".join(f"{n} {c[k]:.3f}" for n, c in curves.items()), end=", ")
    print(f"twelve exact eigenpairs {best:.3f}")
    assert best < curves["Nyström"][k] < curves["RS"][k] < curves["SRE"][k]

# %% tags=["hide-input"] alt="Mean relative error of three approximations of rank twelve against the number of iterations. SRE starts highest, RS and Nyström nearly together far below it; all meet the dashed line of the best error by four iterations." caption="Error of rank 12, mean over 20 seeds. Dashed: the best that any twelve eigenpairs can do."
fig, ax = plt.subplots(figsize=(6.0, 3.0))
for name, curve in curves.items():
    ax.plot(steps, curve, **looks[name], label=name)
ax.axhline(best, linestyle="--", linewidth=1, color=ax.xaxis.label.get_color())
ax.set(xlabel="iterations", ylabel="relative error", ylim=(0, None), xticks=list(steps))
ax.legend()
plt.show()

# %% [markdown]
# One more product lowers the error much more than another decomposition does. After two iterations, the curves of the
# three nearly coincide. ([Theorem 18.2] orders eigenvalues. The order of errors need not hold for *one* matrix and
# seed.)
#
# ### Oversampling
#
# The last pairs that a basis gives are the least accurate. So a few more than $r$ columns are drawn, and their pairs
# are dropped in the end. The number of further columns, $\ell$, is called oversampling. A factor with at most
# $r + \ell$ rows is decomposed in full.

# %% tags=["beside", "remove-input"]
code(leading)

# %% tags=["hide-input"] fold="Measured: the error with and without oversampling"
plain, more = (
    sum(relative_error(from_pairs(*leading(M, Sketch(12, extra, 0, s))), M) for s in range(20)) / 20
    for extra in (0, 10)
)
print(f"RS without iterations: error {plain:.3f}, with oversampling {more:.3f}, best {best:.3f}")
assert best < more < plain

# %% [markdown]
# ## One number for the rest
#
# $U$ and $d$ have $r$ columns. Every direction orthogonal to $U$ gets the same eigenvalue $c$, the *tail*:
# $\hat M = U \operatorname{diag}(d)\, U^\top + c\, (I - U U^\top)$. The damped inverse follows without a further
# decomposition, because $\hat M + \gamma I$ has the eigenvalues $d_i + \gamma$ on the span of $U$ and $c + \gamma$ on
# its complement:
#
# $$
# (\hat M + \gamma I)^{-1} X = \tfrac{1}{c + \gamma} X
# + U \operatorname{diag} \Bigl( \tfrac{1}{d_i + \gamma} - \tfrac{1}{c + \gamma} \Bigr) U^\top X .
# \tag{18.7}
# $$
#
# $X$ is divided by $c + \gamma$, and its part in the span of $U$ is corrected. How is $c$ chosen?
# Suppose that the eigenpairs are exact. Then $\hat M$ and $M$ have the same eigenvectors, and
#
# $$
# \bigl\lVert (\hat M + \gamma I)^{-1} - (M + \gamma I)^{-1} \bigr\rVert_2
# = \max_{i \gt r} \Bigl\lvert \tfrac{1}{c + \gamma} - \tfrac{1}{\lambda_i + \gamma} \Bigr\rvert .
# \tag{18.8}
# $$
#
# - $c = 0$ drops all other eigenvalues. The inverse is too large in *every* direction of the tail, and
#   steps along the first of them are $(\lambda_{r+1} + \gamma) / \gamma$ times too long.
# - $c = d_r$ continues the spectrum at its last kept value. The inverse is too small in every direction of the tail,
#   and steps there are too short.
# - $c = (\operatorname{tr} M - \sum_i d_i) / (\operatorname{size}(M) - r)$, the mean of the other eigenvalues, keeps
#   the trace exact. It needs only the diagonal of $M$.
#
# The author's code had the first choice ([`RS_KFAC_optimizer_file.py`, line
# 19](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/RS_KFAC_optimizer_file.py#L19))
# and later the second ([`solver_LA_utils.py`, line
# 7](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L7));
# this package's default is the third.

# %% tags=["remove-input"]
code(trace_matched, smallest_kept, zero_tail)

# %% tags=["hide-input"] fold="Checked: (18.7) and (18.8); measured: the error of the inverse for three tails"
M, values = made_up(60, rate=0.04)
d, U = (t.flip(-1) for t in psd_eigh(M))
d, U, gamma, eye = d[:12], U[:, :12], 0.05, torch.eye(60)
exact, tails = torch.linalg.inv(M + gamma * eye), {}
for tail in (zero_tail, smallest_kept, trace_matched):
    c = tail(d, M.trace(), 60)
    wrong = torch.linalg.inv(from_pairs(d, U, c) + gamma * eye) - exact
    predicted = (1 / (c + gamma) - 1 / (values[12:] + gamma)).abs().max()
    assert_exact(torch.linalg.matrix_norm(wrong, 2), predicted)
    formula = eye / (c + gamma) + U @ torch.diag(1 / (d + gamma) - 1 / (c + gamma)) @ U.T
    assert_exact(formula, exact + wrong)
    tails[tail.__name__] = (c.item(), predicted.item())
    print(f"{tail.__name__:14} c = {c.item():.4f}, error of the inverse {predicted.item():.2f}")
assert tails["trace_matched"][1] < min(tails["zero_tail"][1], tails["smallest_kept"][1])

# %% tags=["hide-input"] alt="The error of the damped inverse against the tail value c on a logarithmic axis: a curve with a kink at its minimum. Marks show that c equal to zero lies left of the minimum, the smallest kept eigenvalue right of it, and the mean of the tail nearest to it." caption="The error [(18.8)] for every tail value, and the three choices. Zero is drawn at the left edge."
fig, ax = plt.subplots(figsize=(6.0, 3.0))
grid = torch.logspace(-4, 0, 300)
ax.semilogx(
    grid.cpu(),
    (1 / (grid[:, None] + gamma) - 1 / (values[12:] + gamma)).abs().amax(1).cpu(),
)
for name, (c, error) in tails.items():
    (dot,) = ax.plot(max(c, 1e-4), error, "o", clip_on=False)
    place, side = ((-8, -3), "right") if name == "smallest_kept" else ((8, 5), "left")
    ax.annotate(
        *(name, (max(c, 1e-4), error), place),
        textcoords="offset points",
        ha=side,
        color=dot.get_color(),
    )
ax.set(xlabel="c", ylabel="error of the inverse", ylim=(0, None), xlim=(1e-4, 1))
plt.show()

# %% [markdown]
# The minimum is the best $c$ for this norm and damping (Exercise 18.2). The mean is not always the best of
# the three. If the damping is far below the whole tail, the smallest eigenvalues decide the maximum in [(18.8)], and
# $c = 0$ can be nearer to them. But only the mean keeps the trace, for every damping.
#
# ## Both factors, one inverse
#
# With damped factors, $(B + \gamma_B I)^{-1} G (A + \gamma_A I)^{-1}$ is [(18.7)] from the left and from the right. The
# package's `inverse(damping)` is the inverse of the damped *product*, $(\hat B \otimes \hat A + \delta I)^{-1}$. It
# does not need the missing eigenvectors either. $\hat B \otimes \hat A$ has four kinds of eigenvalues: $d^B_i d^A_j$,
# $d^B_i c_A$, $c_B d^A_j$ and $c_B c_A$. With
#
# $$
# \begin{aligned}
# w_{ij} &= \tfrac{1}{d^B_i d^A_j + \delta} , & w_{i0} &= \tfrac{1}{d^B_i c_A + \delta} , \\
# w_{0j} &= \tfrac{1}{c_B d^A_j + \delta} , & w_{00} &= \tfrac{1}{c_B c_A + \delta} ,
# \end{aligned}
# $$
#
# the step begins with $w_{00} G$. Then follow a correction in the span of $U_B$, a correction in the span of $U_A$, and
# a correction of the part that lies in both spans and was corrected twice:
#
# $$
# \begin{aligned}
# P = w_{00} G &+ U_B \operatorname{diag}(w_{i0} - w_{00})\, U_B^\top G
# + G\, U_A \operatorname{diag}(w_{0j} - w_{00})\, U_A^\top \\
# &+ U_B \bigl[ (w_{ij} - w_{i0} - w_{0j} + w_{00}) \odot (U_B^\top G\, U_A) \bigr] U_A^\top .
# \end{aligned}
# \tag{18.9}
# $$
#
# This costs $\mathcal{O}(d_\text{out} d_\text{in} (r_A + r_B))$, the square of the width.

# %% tags=["remove-input"]
code(FourBlocks.__matmul__)

# %% tags=["hide-input"] fold="Checked: (18.9) against an inverse with all eigenvectors"
M = Randomized(factors.A, factors.B, Sketch(rank=20))
L, G = M.low_rank(), torch.randn(256, 257)
d, W = torch.linalg.eigh(L.factors()[0])  # with all eigenvectors, those of the tail included
e, Z = torch.linalg.eigh(L.factors()[1])
assert_exact(M.inverse(0.01) @ G, Z @ ((Z.T @ G @ W) / (torch.outer(e, d) + 0.01)) @ W.T)
assert_exact(M.trace(), L.trace())

# %% [markdown]
# ### As an approximation
#
# `randomized(rank)` is a function of a [`LayerIO`](api/layer_io.md), as every approximation. Its result
# keeps KFAC's two factors, because the factors are averaged over batches: an average of two
# bases of eigenvectors has no meaning ([Chapter 14](14_ekfac.py)). The factors are decomposed when the
# inverse is taken, every so many steps. RS is the default, `low_rank(srevd)` is SRE-KFAC.

# %% tags=["beside", "remove-input"]
code(Randomized.low_rank)

# %% [markdown]
# ### In the optimizer
#
# The argument `approximation=` chooses the matrix, and `invert=` its inverse. Decomposition, tail and damping belong to
# the inverse, and `SketchedInverse` has all three as fields. With it, SRE-KFAC is one line of the optimizer's
# arguments:

# %% tags=["beside", "remove-input"]
code(SketchedInverse.__call__)

# %% tags=["hide-input"] fold="Measured: the length of a step for four variants"
variants = {
    "RS-KFAC": SketchedInverse(),
    "SRE-KFAC": SketchedInverse(srevd),
    "RS, continued": SketchedInverse(tail=smallest_kept),
    "RS, no tail": SketchedInverse(tail=zero_tail),
}
M, G = Randomized(factors.A, factors.B, Sketch(rank=8, iterations=0)), torch.randn(256, 257)
steps_of = {name: invert(M, 0.01) @ G for name, invert in variants.items()}
assert_exact(steps_of["RS-KFAC"], factored_inverse(M, 0.01) @ G)  # the optimizer's default
for name, step in steps_of.items():
    print(f"{name:13} length of a step {(step.norm() / steps_of['RS-KFAC'].norm()).item():.2f}")
assert (
    steps_of["RS, continued"].norm() < steps_of["RS-KFAC"].norm() < steps_of["RS, no tail"].norm()
)

# %%
model = network()
optimizer = KFAC(
    model, loss, approximation=randomized(16), invert=SketchedInverse(srevd), damping=1e-3
)
for _ in range(20):
    batch = torch.randint(1500, (64,))
    optimizer.zero_grad()
    loss(model(images[batch]), labels[batch]).backward()
    optimizer.observe(images[batch], labels[batch])
    optimizer.step()
final = loss(model(images[:1500]), labels[:1500]).item()
print(f"SRE-KFAC in the optimizer, 20 steps: loss {final:.2f}")
assert final < 0.5

# %% [markdown]
# ## A rank that follows the spectrum
#
# One rank for all layers is too large for some and too small for others. The author's later, distributed code adapts
# the rank ([`adaptive_rank_utils.py`, lines 13 to
# 30](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/adaptive_rank_utils.py#L13-L30)).
# After a decomposition, the rule takes the smallest eigenvalue that was kept, as a fraction of the largest. It aims at
# $d_r / d_1 = .033$. If the mean of the last five fractions is above .053, the next decompositions have ten eigenpairs
# more. If the mean is below .026, they have ten less, and in between the rank stays. The package has the rule without
# the mean and without the band, so that the rank changes at every decomposition:
#
# $$
# r \leftarrow r + s \quad \text{if } d_r \gt \epsilon\, d_1 , \qquad
# r \leftarrow r - s \quad \text{otherwise} .
# \tag{18.10}
# $$
#
# With exact eigenpairs, $r$ moves towards the number of eigenvalues above $\epsilon\, d_1$, and then stays within one
# step of it. The next rank depends on the last one. So the rule belongs to an estimator,
# whose state holds the factors and the last eigenpairs. Each factor has a rank of its own.

# %% tags=["remove-input"]
code(rank_by_ratio, AdaptiveRank.update)

# %% tags=["hide-input"] fold="Measured: the ranks of six factors in 40 steps"
model, ranks = network(), []
adaptive = AdaptiveRank(Sketch(16), rank_by_ratio(0.033, step=4, lowest=4))
optimizer = KFAC(model, loss, approximation=adaptive, damping=1e-3, factor_every=1)
for _ in range(40):
    batch = torch.randint(1500, (64,))
    optimizer.zero_grad()
    loss(model(images[batch]), labels[batch]).backward()
    optimizer.observe(images[batch], labels[batch])
    optimizer.step()
    modes = {name: state.modes for name, state in optimizer.matrices.items()}
    ranks.append([len(d) for M in modes.values() for d in (M.dA, M.dB)])
print("layer and factor   0 A   0 B   2 A   2 B   4 A   4 B")
for step in (0, 5, 10, 20, 39):
    print(f"rank in step {step:2}   ", "".join(f"{r:6}" for r in ranks[step]))
right = [
    int((d > 0.033 * d[-1]).sum())
    for state in optimizer.matrices.values()
    for d in (psd_eigh(state.factors.A)[0], psd_eigh(state.factors.B)[0])
]
print("above the ratio   ", "".join(f"{r:6}" for r in right))
assert all(r <= 4 or abs(r - n) <= 8 for r, n in zip(ranks[-1], right, strict=True))
assert loss(model(images[:1500]), labels[:1500]).item() < 0.5

# %% [markdown]
# The last row has the right numbers, from all eigenvalues. The factors change in training, and the ranks follow them.
#
# ## Where it is exact
#
# If the rank reaches the sizes of both factors, the method is KFAC. If the factors have rank $r$ or less, it
# is KFAC as well, since $M \Omega$ then spans the whole range of $M$. For example, a factor from one batch of $N$ rows
# has rank at most $N$, for every width of the layer. Otherwise the method is not exact, and the error depends on the
# eigenvalues that were replaced.

# %% tags=["hide-input"] fold="Checked: two exact cases and one that is not; measured: errors of a step by rank"
io = LayerIO(torch.randn(6, 1, 90), torch.randn(1, 6, 1, 70))
G = torch.randn(70, 90)
assert_exact(randomized(90)(io).inverse(0.1) @ G, kfac(io).inverse(0.1) @ G)
assert_exact(randomized(6)(io).inverse(0.1) @ G, kfac(io).inverse(0.1) @ G)
assert relative_error(randomized(4)(io).inverse(0.1) @ G, kfac(io).inverse(0.1) @ G) > 0.01

h = torch.randn(256, 257)
step = factors.inverse(0.01) @ h
for rank in (4, 8, 16, 32, 64):
    approximate = Randomized(factors.A, factors.B, Sketch(rank)).inverse(0.01) @ h
    print(f"rank {rank:2}: error of a step {relative_error(approximate, step):.1e}")
assert relative_error(approximate, step) < 0.01

# %% [markdown]
# ## What the paper claims
#
# In the paper's experiments (VGG16 with batch normalisation on CIFAR-10), randomised KFAC takes about 2.5 times less
# time per epoch than KFAC and about 3.3 times less to the same accuracy. It performs on par with SENG, another natural
# gradient method, whose cost is linear in the width. (SENG is not in this package.) The outputs that are stored in the
# notebooks of [the author's
# repository](https://github.com/ConstantinPuiu/Randomized-KFACs/tree/2e11df097f04743f9e57e9a976c405249d579536) show the
# times: on a V100, 50 epochs take 1613 to 1645 seconds with RS-KFAC (nine runs) and 3756 to 3811 with KFAC (five).
# SRE-KFAC takes 1356 to 1359 (three runs), on an A100.
#
# These claims combine two statements: training is the same, and the inverses are cheaper. We look at each.
#
# **Training is the same.** We train with the same seeds, once with all eigenpairs and once with 16 of up to 257:

# %% tags=["hide-input"] fold="Measured: losses with all eigenpairs, and with 16"
losses_rs, _ = train(MovingAverage(randomized(16)))
difference = max(abs(a - b) / a for a, b in zip(losses_kfac, losses_rs, strict=True))
print("step           1     6    11    16    21    26")
for name, curve in (("KFAC", losses_kfac), ("RS-KFAC", losses_rs)):
    print(f"{name:9}", " ".join(f"{value:5.2f}" for value in curve[::5]))
print(f"largest difference: {difference:.1%}")
assert max(losses_kfac[-1], losses_rs[-1]) < 0.5
assert difference < 0.5

# %% [markdown]
# **The inverses are cheaper**, from some width on. Times depend on the machine, so this chapter does not
# measure them. The repository has a benchmark, `python -m benchmarks.scaling`, which times one square layer
# in single precision on one thread, and a stored result in `benchmarks/results`. A downloaded notebook does not have
# this folder, and leaves the figure out.

# %% tags=["hide-input"] alt="Two log-log plots of time against the width of a layer. Left, the inverse update: K-FAC is the steepest line and reaches tens of seconds at width 8192, RS-KFAC and SRE-KFAC are flatter and nearly coincide. Right, applying the inverse: K-FAC again steeper than RS-KFAC." caption="Time for one update of a factor's inverse (left), and for applying both to a gradient (right), against the width of a square layer."
RESULT = RESULTS / "scaling-cpu.json"
WIDTHS = [256, 1024, 4096]
scaling = json.loads(RESULT.read_text()) if RESULT.exists() else None
if scaling is None:
    print("No stored benchmark here: clone the repository and run python -m benchmarks.scaling")
else:
    fig, axes = plt.subplots(1, 2, figsize=(9.2, 3.6), layout="constrained", sharey=True)
    for ax, part in zip(axes, ("update", "apply"), strict=True):
        for method in ("K-FAC", "RS-KFAC", "SRE-KFAC"):
            points = [r for r in scaling["rows"] if (r["method"], r["part"]) == (method, part)]
            if points:
                times = [sorted(r["seconds"])[len(r["seconds"]) // 2] for r in points]
                look = style("KFAC") if method == "K-FAC" else looks[method.removesuffix("-KFAC")]
                ax.loglog([r["width"] for r in points], times, **look, label=method)
        ax.set(title=part, xlabel="width")
        ax.set_xticks(WIDTHS, labels=[str(d) for d in WIDTHS])
        ax.minorticks_off()
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    plt.show()

# %% tags=["hide-input"] fold="Printed and checked: the powers of the width"
if scaling is not None:
    print(f"{scaling['processor']}, {scaling['threads']} thread, rank {scaling['rank']}")
    for row in scaling["exponents"]:
        if row["method"] in ("K-FAC", "RS-KFAC", "SRE-KFAC"):
            low, high = row["interval"]
            print(f"{row['method']:8} {row['part']:6} grows as d^{row['exponent']:.2f}", end="")
            print(f" ({low:.2f} to {high:.2f}) for d in {row['widths']}")
    print("faster than K-FAC from width", scaling["faster than K-FAC from"]["RS-KFAC"])
    power = {(r["method"], r["part"]): r["exponent"] for r in scaling["exponents"]}
    assert power["RS-KFAC", "update"] < 2.5 < power["K-FAC", "update"]
    assert power["RS-KFAC", "apply"] < 2.6 < power["K-FAC", "apply"]

# %% [markdown]
# The expected powers are 3 and 2. Measured powers may be a few tenths larger, where matrices outgrow the caches and
# operations wait for memory. The interval comes from repetitions on one machine, and says nothing about another. Two
# remarks on the width from which RS-KFAC is faster. First, it depends on the rank: the lines of RS and SRE rise with
# it. Second, the averages of the factors, which all methods need, are in neither plot. They grow with the square, and
# RS-KFAC stores the same $d^2$ numbers as KFAC. [Chapter 19](19_brand.py) avoids these numbers.
#
# ## What goes wrong in practice
#
# **Powers without QR.** In $M^3 \Omega$, eigenvectors have weights $\lambda_i^3$. In single precision, weights below
# $10^{-7}$ of the largest are lost. These are the weights of eigenvalues below about one 200th of the first. A QR
# decomposition after every product keeps the directions of small eigenvalues. The author's code for SRE-KFAC multiplies
# without it, three times by default, four times in its notebook ([`SRE_KFAC_optimizer_file.py`, lines 44 to
# 48](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/SRE_KFAC_optimizer_file.py#L44-L48)).
# For RS-KFAC it calls PyTorch's `svd_lowrank`, which has the QR decompositions ([`RS_KFAC_optimizer_file.py`, line
# 140](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/RS_KFAC_optimizer_file.py#L140)).
# We compare the Ritz values, and the damped inverses from 30 of them:

# %% tags=["hide-input"] fold="Measured: powers with and without QR"
M32, values32 = (t.float() for t in made_up(60))
Y = torch.randn(60, 40, dtype=torch.float32)
for _ in range(3):
    Y = M32 @ Y
naive = srevd(M32, torch.linalg.qr(Y).Q)[0]
careful = srevd(M32, range_basis(M32, Sketch(30, 10, 2)))[0]
for number in (10, 20, 30):
    wrong, right = (abs(d[number - 1] / values32[number - 1] - 1).item() for d in (naive, careful))
    print(f"relative error of eigenvalue {number}: {wrong:.0e} without QR, {right:.0e} with")
assert wrong > 0.1 > 0.001 > right

G32, effects = torch.randn(60, 8, dtype=torch.float32), []
for fraction in (0.1, 0.01, 0.0001):
    eye32 = torch.eye(60, dtype=torch.float32)
    exact = torch.linalg.solve(M32 + fraction * eye32, G32)
    found = []
    for Q in (torch.linalg.qr(Y).Q, range_basis(M32, Sketch(30, 10, 2))):
        d, U = srevd(M32, Q)
        M30 = (U[:, :30] * d[:30]) @ U[:, :30].T
        found.append(relative_error(torch.linalg.solve(M30 + fraction * eye32, G32), exact))
    print(f"damping {fraction}: error of a step {found[0]:.3f} without QR, {found[1]:.3f} with")
    effects.append(found)
assert effects[0][0] < 0.03
assert effects[1][0] < 0.2

# %% [markdown]
# The code's dampings are between .1 and .01 of the largest eigenvalue, above the eigenvalues that are lost. With these
# dampings the loss matters little, as the first two lines of steps show. With a small damping, most of the error
# comes from the low rank itself, also with QR.
#
# **Comparisons need the same damping.** At full rank the method equals KFAC only if both damp the same matrix. The
# author's code damps each factor by itself, relative to its largest eigenvalue, $\gamma_A = \lambda_\text{rel}\, d^A_1$
# ([`RS_KFAC_optimizer_file.py`, line
# 16](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/RS_KFAC_optimizer_file.py#L16)).
# Many implementations of KFAC damp the product, and so does the KFAC that it is compared with, by
# $\lambda_\text{rel}\, d^A_1 d^B_1$ ([`standard_kfac_optimizer_file.py`, line
# 128](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/standard_kfac_optimizer_file.py#L128)).
# The two differ at any rank:

# %% tags=["hide-input"] fold="Checked: the damping of factors; measured: the difference to that of the product"
L = randomized(90)(io).low_rank()
both = L.inverse_of_damped_factors(0.1 * float(L.dA[0]), 0.1 * float(L.dB[0]))
K = kfac(io)
A, B = K.A + 0.1 * L.dA[0] * eye_like(K.A), K.B + 0.1 * L.dB[0] * eye_like(K.B)
assert_exact(both @ G, torch.linalg.inv(B) @ G @ torch.linalg.inv(A))
product = K.inverse(0.01 * float(L.dA[0] * L.dB[0])) @ G
print(f"damped factors and damped product differ by {relative_error(both @ G, product):.0%}")
assert relative_error(both @ G, product) > 0.1

# %% [markdown]
# A relative damping makes the method independent of the loss's scale, but it changes whenever the largest
# eigenvalue does. In the optimizer, `invert=relative_factored_inverse` has this damping, and `damping=` is then
# $\lambda_\text{rel}$. For a fair comparison KFAC can have it, too:

# %% tags=["remove-input"]
code(relative_factored_inverse)

# %% tags=["hide-input"] fold="Checked: RS-KFAC and KFAC with this damping, and the scale of the loss"
continued = SketchedInverse(tail=smallest_kept, invert=relative_factored_inverse)
assert_exact(continued(randomized(90)(io), 0.1) @ G, both @ G)
assert_exact(relative_factored_inverse(K, 0.1) @ G, both @ G)
louder = LayerIO(io.a, 3 * io.g)  # a loss that is multiplied by nine
assert_exact(relative_factored_inverse(kfac(louder), 0.1) @ (9 * G), both @ G)

# %% [markdown]
# **An average that starts at the identity**, $M_0 = I$, is never of low rank: $M_t = \rho^t I + L_t$. But $L_t$ has the
# same eigenvectors, and $\rho^t$ can be added to the damping, which is exact. (The averages of this package
# have no start value.)

# %% tags=["hide-input"] fold="Checked: the start as a part of the damping"
L_t, M_t = torch.zeros(20, 20), torch.eye(20)
for _ in range(3):
    X = torch.randn(20, 2)
    L_t, M_t = (0.9 * old + 0.1 * X @ X.T for old in (L_t, M_t))
d, U = leading(L_t, Sketch(rank=6, oversampling=0))
started = torch.linalg.inv(M_t + 0.01 * torch.eye(20))
assert_exact(torch.linalg.inv(from_pairs(d, U) + (0.9**3 + 0.01) * torch.eye(20)), started)

# %% [markdown]
# **Periods that differ.** In the author's notebooks, one for each solver in the paper's table, the randomised inverses
# are recomputed every 50 steps, from epoch 20 on every 30
# ([notebook](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/RS_KFAC_main_notebook.ipynb?plain=1#L5467)),
# those of KFAC every 30
# ([notebook](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Standard_KFAC_benchmark_main_notebook.ipynb?plain=1#L3083)).
# A fair comparison has equal periods, or two separate numbers: the cost of an update, and how often it is needed. In
# the stored outputs the period made little difference: an epoch of KFAC takes 75 to 76 seconds throughout, one of
# RS-KFAC 31 to 32 at first and about 33 in the last twenty epochs, with equal periods.
#
# ## The paper and this package
#
# What is in [Puiu (2022)](bibliography.md#randomized), as far as its abstract and its author's public code tell, and
# what is here. The code exists twice: [with the
# paper](https://github.com/ConstantinPuiu/Randomized-KFACs/tree/2e11df097f04743f9e57e9a976c405249d579536), and, later,
# [distributed](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/tree/74bac503b2187ded16755a71d5b5ae246dd32bac),
# for a thesis.
#
# | | the paper | here |
# | --- | --- | --- |
# | algorithms | RS-KFAC, SRE-KFAC | `randomized`, and `SketchedInverse(srevd)`; `nystrom` is an addition |
# | powers | the code: three products by default, four in the notebooks, without QR in between for SRE-KFAC; the distributed optimizer has RS-KFAC only | QR after every product |
# | tail | the code: zero; distributed: the smallest eigenvalue | `trace_matched`; `zero_tail` and `smallest_kept` by `SketchedInverse` |
# | start of the average | the code: [the identity](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/Lib_files/RS_KFAC_optimizer_file.py#L99); distributed: the same, as [$\rho^t$ in the damping](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/solver_utils/solver_LA_utils.py#L9) | none |
# | damping | the code: each factor by a fraction of its largest eigenvalue: [.1, later .05 and .01](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/RS_KFAC_main_notebook.ipynb?plain=1#L5469) | `factored_inverse`; `relative_factored_inverse` for the code's |
# | rank | the code: [220 to 230](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/RS_KFAC_main_notebook.ipynb?plain=1#L5471), oversampling 10 to 12 | 64, 10, with 2 iterations |
# | adaptive rank | the distributed code: ratio .033 in a band, mean of five, steps of 10, from 10 to [700](https://github.com/ConstantinPuiu/Distributed_Brand_and_Randomized_KFACs/blob/74bac503b2187ded16755a71d5b5ae246dd32bac/solvers/distributed_R_kfac_lean_Kfactors_batchsize.py#L42) | `AdaptiveRank` with these numbers, without band and mean, and a rank for each factor |
# | schedule | the code: factors every 10 steps, inverses every 50, later 30; decay .95 | the optimizer's, [Chapter 11](11_averages.py) |
# | step | the code: [no momentum, weight decay $7 \cdot 10^{-4}$, every layer's root mean square at most .07](https://github.com/ConstantinPuiu/Randomized-KFACs/blob/2e11df097f04743f9e57e9a976c405249d579536/RS_KFAC_main_notebook.ipynb?plain=1#L5454-L5458) | the length of Adam's step; `graft` and others are controls |
# | headline | the cost falls from the cube to the square of the width: per epoch about 2.5 times and to the same accuracy about 3.3 times less time than KFAC, on par with SENG (CIFAR-10, VGG16) | the powers of the width: measured above; training: [Chapter 23](23_comparison.py) trains both beside their controls, on wide layers, too; SENG and networks of the size of the paper's are not tested, because the one is not in this package and the others are out of reach |
#
# ## In one minute
#
# - **Spectrum.** The eigenvalues of an averaged factor fall fast. Eigenvalues below the damping need not be known one
#   by one.
# - **Basis.** A few products with random columns, each followed by QR, span the leading eigenvectors. RS, SRE and
#   Nyström take eigenpairs from this basis ([Theorem 18.2]); two iterations make them nearly equal.
# - **Tail.** One number $c$ stands for all other eigenvalues. Zero makes steps too long, the last kept eigenvalue too
#   short; the mean keeps the trace.
# - **Inverse.** The damped inverse is exact for the approximated factors, of one by [(18.7)], of their product by
#   [(18.9)].
# - **Cost.** The square of the width in the place of the cube, for inverse and step. The factors are still stored.
# - **Compare** methods with the same damping and the same period.
#
# ## Exercises
#
# **Exercise 18.1.** A factor has $d$ rows. Count the multiplications of `range_basis` and `rsvd`, without terms of
# order $d q^2$. An eigendecomposition takes about $10 d^3$. By which factor are the former fewer, for $d = 2048$,
# $q = 74$ and 2 iterations?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Three products with $Q$ (the first and two iterations) and one for $Q^\top M$, $d^2 q$ each: $4 d^2 q$. The
# ratio is $10 d / (4 q) \approx 69$. The measured ratio of times is smaller: QR decompositions
# and the singular value decomposition of a thin matrix, which are not counted here, run at a lower speed.
#
# </details>
#
# **Exercise 18.2.** Which $c$ makes the error [(18.8)] smallest?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The numbers $1 / (\lambda_i + \gamma)$ fill an interval, from $1 / (\lambda_{r+1} + \gamma)$ to
# $1 / (\lambda_d + \gamma)$. The best $1 / (c + \gamma)$ is its midpoint, and the error half its length.
#
# </details>
#
# **Exercise 18.3.** RS is "half a power step ahead of SRE". Show that the squares of its singular
# values are the Ritz values of $M^2$ for the same $Q$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $\sigma^2$ are the eigenvalues of $(Q^\top M)(Q^\top M)^\top = Q^\top M^2 Q$.
#
# </details>
#
# **Exercise 18.4.** Write RS for one factor yourself, with `torch.linalg.qr` and `torch.linalg.svd` only: from $M$, a
# random start of $q$ columns, the rank, the number of iterations and $\gamma$ to the matrix $(\hat M + \gamma I)^{-1}$
# with the mean as the tail. Compare it with the eigenpairs of `leading` and `trace_matched`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def solution(M, start, rank, iterations, gamma):
#     Q = torch.linalg.qr(M @ start).Q
#     for _ in range(iterations):
#         Q = torch.linalg.qr(M @ Q).Q
#     _, d, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
#     d, U = d[:rank], Vh[:rank].T
#     c = (M.trace() - d.sum()) / (len(M) - rank)
#     weights = 1 / (d + gamma) - 1 / (c + gamma)
#     return torch.eye(len(M)) / (c + gamma) + U @ weights.diag() @ U.T
# ```
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"]
def solution(M: Tensor, start: Tensor, rank: int, iterations: int, gamma: float) -> Tensor:  # 18.4
    Q = torch.linalg.qr(M @ start).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(M @ Q).Q
    _, d, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    d, U = d[:rank], Vh[:rank].T
    c = (M.trace() - d.sum()) / (len(M) - rank)
    weights = 1 / (d + gamma) - 1 / (c + gamma)
    return torch.eye(len(M)) / (c + gamma) + U @ weights.diag() @ U.T


M, _ = made_up(60)
d, U = leading(M, Sketch(rank=12, oversampling=4, iterations=1, seed=3))
expected = torch.linalg.inv(from_pairs(d, U, trace_matched(d, M.trace(), 60)) + 0.1 * torch.eye(60))
start = torch.randn(60, 16, generator=torch.Generator(device).manual_seed(3))
assert_exact(solution(M, start, 12, 1, 0.1), expected)

ratio = 10 * 2048 / (4 * 74)  # 18.1
assert 69 < ratio < 70

_, values = made_up(60, rate=0.04)  # 18.2
inverses = 1 / (values[12:] + gamma)
middle = (inverses.max() + inverses.min()) / 2
least = (inverses.max() - inverses.min()) / 2
assert_exact((inverses - middle).abs().max(), least)
assert all((inverses - shift * middle).abs().max() > least for shift in (0.99, 1.01))
assert all(least < error for _, error in tails.values())

M, _ = made_up(60)  # 18.3
Q = range_basis(M, Sketch(12, 0, 0))
assert_exact(rsvd(M, Q)[0].square(), srevd(M @ M, Q)[0])
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Puiu (2022)](bibliography.md#randomized) introduces both methods. [Halko et al. (2011)](bibliography.md#halko) is the
# standard text on randomised decompositions, with bounds for the error that a random basis leaves; [Tropp et al.
# (2017)](bibliography.md#nystrom) treat positive semi-definite matrices. [Chapter 17](17_skfac.py) uses the low rank of
# a *single* batch, where no randomness is needed.
