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
# # 9. Damping: how far to trust the model
#
# **Part III: KFAC.** Why does the inverse of a curvature matrix need damping, how much, and at which place in the
# formula?
#
# Damping is the small positive number $\delta$ that earlier chapters passed to every inverse. It is a filter on the
# directions of a step: along an eigenvector of the curvature with eigenvalue $\lambda$, the fraction
# $\lambda / (\lambda + \delta)$ of the undamped step, Newton's, is left ([Figure 9.1]).

# %% tags=["hide-input"]
import itertools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.func import functional_call
from torch.nn import CrossEntropyLoss, Linear, Module, MSELoss, Sequential, Tanh
from torch.nn.utils import vector_to_parameters
from torch.testing import assert_close

from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, set_up
from kfac_scratch.curvature import block_index, ggn, parameter_vector
from kfac_scratch.linalg import eye_like, psd_eigh
from kfac_scratch.matrices.damping import (
    balance,
    factored_inverse,
    levenberg_marquardt,
    reduction_ratio,
    relative_damping,
)
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.matrix import LinearMap
from kfac_scratch.moving.filtering import damping_filter
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.show import code

set_up()  # seed 0, float64, the GPU where there is one

kron, inv = torch.kron, torch.linalg.inv

# %% tags=["hide-input"]
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]

model, loss = Sequential(Linear(64, 20), Tanh(), Linear(20, 10)), CrossEntropyLoss()
optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
for _ in range(40):
    optimizer.zero_grad()
    loss(model(images[:500]), labels[:500]).backward()
    optimizer.step()

X, y = images[500:700], labels[500:700]
value = loss(model(X), y)
slopes = torch.autograd.grad(value, list(model.parameters()))
gradient = dict(zip(dict(model.named_parameters()), slopes, strict=True))
factors = {name: kfac(io) for name, io in layer_ios(model, loss, X, y).items()}


def step(inverses: dict[str, LinearMap]) -> dict[str, Tensor]:
    """Minus the inverse times the gradient, for all layers."""
    return {name: -v for name, v in preconditioner(model, inverses)(gradient).items()}


def after(s: dict[str, Tensor]) -> float:
    """The loss after a full step."""
    moved = {name: p.detach() + s[name] for name, p in model.named_parameters()}
    return loss(functional_call(model, moved, (X,)), y).item()


def length(s: dict[str, Tensor]) -> float:
    return torch.cat([v.flatten() for v in s.values()]).norm().item()


weights = length({name: p.detach() for name, p in model.named_parameters()})
print(f"loss {value.item():.3f}, length of the vector of all weights {weights:.1f}")

# %% tags=["hide-input"] alt="An S-shaped curve over the eigenvalue on a logarithmic axis, which rises from zero to one and crosses one half where the eigenvalue equals the damping, one thousandth. Left of it the directions take a gradient step, right of it a Newton step. Short strokes below the curve are the eigenvalues of the first layer's curvature; most of them lie left of the damping." caption="The fraction $\\lambda / (\\lambda + \\delta)$ of the Newton step that damping keeps, for $\\delta = 10^{-3}$. Strokes: the eigenvalues of the first layer's $B \\otimes A$. The damping separates directions with a Newton step from directions with a gradient step."
fig, ax = plt.subplots(figsize=(6.6, 2.5), layout="constrained")
axis, strokes = torch.logspace(-9, 0, 200).cpu(), factors["0"].eigenvalues().flatten().cpu()
strokes = strokes[strokes > 1e-9]
ax.semilogx(axis, axis / (axis + 1e-3), color="C0")
ax.plot(strokes, torch.full_like(strokes, -0.1), "|", color="C0", alpha=0.25, rasterized=True)
ax.axvline(1e-3, linestyle=":", color=ax.xaxis.label.get_color(), linewidth=1)
ax.text(2e-9, 0.3, "gradient step\nwith rate $1 / \\delta$")
ax.text(3e-2, 0.55, "Newton\nstep")
ax.text(8e-4, 0.95, r"damping $\delta$", ha="right")
ax.set(xlabel=r"eigenvalue $\lambda$", ylabel=r"$\lambda / (\lambda + \delta)$")
plt.show()

# %% [markdown]
# For a layer with gradient $G$ and factors $A$ and $B$, the damped step is
#
# $$
# \operatorname{vec}(S) = -(B \otimes A + \delta I)^{-1} \operatorname{vec}(G) .
# $$
#
# After this chapter you will be able to
#
# - give the two reasons for damping, noise in small eigenvalues and a model that is local;
# - say what a damping does to each direction, and in which unit it is measured;
# - choose between exact and factored damping, and say why the second needs its constant $\pi$;
# - let the loss decide how much damping is needed.
#
# The example is a network of two layers for the handwritten digits of the earlier chapters, after
# a short training. Its gradient and curvature come from a batch of 200 images.
#
# ## What happens without
#
# Some pixels are zero in all images of the batch. The factor $A$ of the first layer then has rows of zeros, and
# $B \otimes A$ has no inverse. The package raises an error. In many implementations round-off makes the zero
# eigenvalues tiny, and no error is raised. So the next cell also takes steps with very small dampings:

# %%
try:
    factors["0"].inverse(0.0)
except ValueError as error:
    print(error)
else:
    raise AssertionError("a singular matrix was inverted")

losses, lengths = {}, {}
for damping in (1e-12, 1e-8, 1e-4, 0.1, 10.0):
    s = step({name: K.inverse(damping) for name, K in factors.items()})
    losses[damping], lengths[damping] = after(s), length(s)
    print(f"damping {damping:.0e}: length {lengths[damping]:9.2f}, loss {losses[damping]:9.3f}")
assert losses[1e-12] > 10 * value > 10 * losses[0.1]
assert lengths[1e-12] > 10 * weights
assert losses[0.1] < losses[10.0] < value  # too much damping: hardly a step

# %% [markdown]
# Nearly without damping the step is many times longer than the vector of all weights, and the
# loss is many times larger afterwards, on the very batch on which gradient and curvature
# were computed. With a damping of 0.1 the step lowers the loss. Damping is needed for two different reasons.
#
# ## Reason one: small eigenvalues are noise
#
# A step divides the gradient's coefficient along an eigenvector by the eigenvalue. So small
# eigenvalues have the largest effect, and their relative error is the largest, too. Take the factor $A$ of
# the first layer, from 100 images. Eigenvalue $\alpha_i$ is the mean of $(q_i^\top a)^2$ over
# these images. Measure the same mean along the same $q_i$ with *other* images:

# %%
a = layer_ios(model, loss, images, labels)["0"].a.squeeze(1)
few, fresh = a[500:600], a[600:]
alpha, QA = psd_eigh(few.T @ few / len(few))
measured = (fresh @ QA).square().mean(0)

kept = alpha > 1e-10  # without the pixels that are always zero
ratio = (measured / alpha)[kept]
print("mean of (qᵀa)² over other images, relative to the eigenvalue:")
print(
    f"  ten largest {ratio[-10:].median().item():.2f}, ten smallest {ratio[:10].median().item():.2f}"
)
assert 0.7 < ratio[-10:].median() < 1.5
assert ratio[:10].median() > 3
assert measured[~kept].max() > 1e-6  # some directions of eigenvalue zero are not flat at all

# %% [markdown]
# The large eigenvalues are nearly right. The small ones are too small, for a systematic reason: the decomposition finds
# the directions along which *these* 100 images vary least. Dividing by a number that is too small gives a step that is
# too long. Adding $\delta$ to all eigenvalues corrects the small ones and hardly changes the large ones.
#
# ## Reason two: the model is local
#
# Exact curvature from infinitely many data would still need damping. The step minimises
# a *model* of the loss, the quadratic function
#
# $$
# m(s) = L + h^\top s + \tfrac12 s^\top M s ,
# \tag{9.1}
# $$
#
# where $h$ is the gradient of all weights as one vector and $M$ is the curvature. The model agrees with the loss near
# $s = 0$ only, but its minimiser $-M^{-1} h$ may be far away. One remedy is a penalty on the squared length of the
# step,
#
# $$
# m(s) + \tfrac{\delta}{2} \lVert s \rVert^2
# \quad\text{with the gradient}\quad
# h + M s + \delta s .
# \tag{9.2}
# $$
#
# The gradient vanishes at $s_\delta = -(M + \delta I)^{-1} h$, the damped step. Another remedy is a bound:
# minimise $m$ among all steps that are no longer than some radius. This is
# called a **trust region**. Both give the same steps:
#
# <div class="admonition theorem" markdown="1" id="thm-9.1">
# <p class="admonition-title" markdown="1"><b>Theorem 9.1 (damping is a trust region)</b></p>
#
# Let $M$ be symmetric positive semi-definite and $\delta \gt 0$. Among all steps that are not
# longer than $s_\delta = -(M + \delta I)^{-1} h$, the model $m$ is smallest at $s_\delta$. The
# length $\lVert s_\delta \rVert$ falls as $\delta$ grows, if $h \ne 0$.
#
# </div>
#
# **Proof.** $s_\delta$ minimises [(9.2)], which is convex. So for every $s$,
# $m(s) + \tfrac{\delta}{2} \lVert s \rVert^2 \ge m(s_\delta) + \tfrac{\delta}{2} \lVert s_\delta \rVert^2$.
# If $\lVert s \rVert \le \lVert s_\delta \rVert$, then $m(s) \ge m(s_\delta)$. For the length, write
# $h = \sum_i c_i u_i$ with the orthonormal eigenvectors $u_i$ of $M$ and their eigenvalues
# $\lambda_i$. Then
#
# $$
# s_\delta = -\sum_i \frac{c_i}{\lambda_i + \delta}\, u_i ,
# \qquad
# \lVert s_\delta \rVert^2 = \sum_i \frac{c_i^2}{(\lambda_i + \delta)^2} ,
# \tag{9.3}
# $$
#
# and every summand with $c_i \ne 0$ falls as $\delta$ grows. $\blacksquare$

# %%
R, h = torch.randn(12, 8), torch.randn(12)
M = R @ R.T / 8  # of rank 8: four flat directions


def m(s: Tensor) -> Tensor:
    """The model's change, for one step or for many."""
    return s @ h + (s @ M * s).sum(-1) / 2


damped = {d: -torch.linalg.solve(M + d * eye_like(M), h) for d in (0.01, 0.1, 1.0, 10.0)}
for s in damped.values():
    anywhere, near = torch.randn(5000, 12), s + 0.1 * s.norm() * torch.randn(5000, 12)
    anywhere *= s.norm() / anywhere.norm(dim=1, keepdim=True)  # as long as s
    inside = torch.cat([anywhere, near[near.norm(dim=1) <= s.norm()]])
    assert len(inside) > 5000
    assert m(s) < m(inside).min()
lengths = [s.norm().item() for s in damped.values()]
assert lengths == sorted(lengths, reverse=True)

# %% [markdown]
# An optimizer may fix the damping or the radius. The steps come from the same family.
#
# ## Damping as a filter
#
# Equation [(9.3)] can be read direction by direction, in two ways:
#
# $$
# \frac{c_i}{\lambda_i + \delta}
# = \underbrace{\frac{\lambda_i}{\lambda_i + \delta}}_{\text{filter}} \cdot
#   \underbrace{\frac{c_i}{\lambda_i}}_{\text{Newton}}
# = \underbrace{\frac{\delta}{\lambda_i + \delta}}_{1 - \text{filter}} \cdot
#   \underbrace{\frac{c_i}{\delta}}_{\text{gradient}} .
# \tag{9.4}
# $$
#
# Where $\lambda_i$ is far above $\delta$, the filter is one and the step is Newton's. Where it is far below, the step
# is a gradient step with learning rate $1 / \delta$. At $\lambda_i = \delta$ the Newton step and this gradient step are
# equal, and the damped step is half as long. So $\delta$ is a place on the axis of eigenvalues: in the directions with
# larger eigenvalues the curvature is trusted. The sum of the filter over all directions,
# $\sum_i \lambda_i / (\lambda_i + \delta)$, counts these directions. The cell does so for the first layer.

# %%
K = factors["0"]
eigen = K.eigen()
W = torch.cat([gradient["0.weight"], gradient["0.bias"][:, None]], dim=1)  # bias: last column
coefficients = eigen.QB.T @ W @ eigen.QA  # of the gradient, by the formula of chapter 8
assert_exact(eigen.QB @ coefficients @ eigen.QA.T, W)

for damping in (1e-6, 1e-4, 1e-2):
    trusted = (eigen.scale / (eigen.scale + damping)).sum().item()
    print(f"damping {damping:.0e}: {trusted:6.1f} of {eigen.scale.numel()} directions are trusted")
    along = eigen.QB.T @ (K.inverse(damping) @ W) @ eigen.QA
    assert_exact(along, coefficients / (eigen.scale + damping))

# %% [markdown]
# Move $\delta$ along the axis of eigenvalues. Directions with eigenvalues far above $\delta$ keep nearly their whole
# Newton step. With more damping there are fewer of them. For directions with eigenvalue zero the fraction is zero.

# %% tags=["hide-input"]
damping_filter(eigen.scale.flatten(), damping=1e-4)

# %% tags=["hide-input"] alt="Two plots against the eigenvalue on a logarithmic axis. Left: the filter for three dampings, S-shaped curves that rise from zero to one and cross one half where the eigenvalue equals the damping. Right: the size of the step along every eigenvector of the first layer, as clouds of dots for the three dampings. The clouds agree for large eigenvalues; to the left they separate, and the smaller the damping, the higher the cloud." caption="Left: the fraction of the Newton step that damping lets through. Right: how far the step goes along each eigenvector of the first layer's curvature, $\\lvert c_i \\rvert / (\\lambda_i + \\delta)$. Damping takes away what the smallest eigenvalues would contribute."
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
grid = torch.logspace(-9, 0, 200)
spectrum, c = eigen.scale.flatten().cpu(), coefficients.flatten().abs().cpu()
shown = spectrum > 1e-9
for power in (-6, -4, -2):
    passed, label = grid / (grid + 10.0**power), rf"$\delta = 10^{{{power}}}$"
    (line,) = left.semilogx(grid.cpu(), passed.cpu(), label=label)
    left.axvline(10.0**power, color=line.get_color(), linestyle=":", linewidth=1)
    size = c[shown] / (spectrum[shown] + 10.0**power)
    right.loglog(spectrum[shown], size, ".", markersize=3, alpha=0.5, rasterized=True)
left.set(xlabel=r"eigenvalue $\lambda$", ylabel=r"$\lambda / (\lambda + \delta)$")
right.set(xlabel=r"eigenvalue $\lambda_i$", ylabel="step along its eigenvector", ylim=(1e-7, 1e3))
left.legend()
plt.show()

# %% [markdown]
# ## Where to put it: exact damping
#
# For KFAC, $M = B \otimes A$ for each layer. [Chapter 8](08_matrices.py) showed that damping leaves
# the Kronecker products, but not the eigenbasis: with $A = Q_A \operatorname{diag}(\alpha) Q_A^\top$,
# $B = Q_B \operatorname{diag}(\beta) Q_B^\top$ and a gradient $G$ in the shape of $W$,
#
# $$
# (B \otimes A + \delta I)^{-1} \operatorname{vec}(G)
# = \operatorname{vec}\Bigl( Q_B \Bigl[
# \frac{(Q_B^\top G\, Q_A)_{oi}}{\beta_o \alpha_i + \delta} \Bigr]_{oi} Q_A^\top \Bigr) .
# \tag{9.5}
# $$
#
# This is exact for every $\delta$, and another $\delta$ needs no other decomposition.

# %%
small = Kronecker(*(R @ R.T / 9 for R in (torch.randn(5, 9), torch.randn(3, 9))))
A, B, G = small.A, small.B, torch.randn(3, 5)
I5, I3, I15, eig = torch.eye(5), torch.eye(3), torch.eye(15), small.eigen()

by_hand = eig.QB.T @ G @ eig.QA
for o, i in itertools.product(range(3), range(5)):
    by_hand[o, i] /= eig.scale[o, i] + 0.1
by_hand = eig.QB @ by_hand @ eig.QA.T
assert_exact(by_hand, small.inverse(0.1) @ G)
assert_exact(by_hand.flatten(), inv(kron(B, A) + 0.1 * I15) @ G.flatten())

# %% [markdown]
# ## Factored damping
#
# An eigendecomposition costs several times as much as a Cholesky factorisation. The original KFAC
# therefore damps each factor, so that the inverse is a Kronecker product and two factorisations
# suffice. How should $\delta$ be shared? Take any $\pi \gt 0$ and multiply out; the Kronecker
# product is linear in each factor:
#
# $$
# \begin{aligned}
# \Bigl(B + \tfrac{\sqrt\delta}{\pi} I\Bigr) \otimes \bigl(A + \pi \sqrt\delta I\bigr)
# &= B \otimes A + \delta\, I \otimes I + E_\pi , \\
# E_\pi &= \pi \sqrt\delta\; B \otimes I + \tfrac{\sqrt\delta}{\pi}\; I \otimes A .
# \end{aligned}
# \tag{9.6}
# $$
#
# The first two terms are the exactly damped matrix; $E_\pi$ is the error. For $\pi = 1$ this is [(1.11)]. In general no
# $\pi$ makes $E_\pi$ vanish, but one $\pi$ makes its trace, the sum of its eigenvalues, smallest. With
# $\operatorname{tr}(B \otimes I) = d_\text{in} \operatorname{tr} B$, the trace is
#
# $$
# \operatorname{tr} E_\pi
# = \sqrt\delta \Bigl( \pi\, d_\text{in} \operatorname{tr} B
# + \tfrac{1}{\pi}\, d_\text{out} \operatorname{tr} A \Bigr) .
# \tag{9.7}
# $$
#
# The derivative with respect to $\pi$ is
# $\sqrt\delta\, (d_\text{in} \operatorname{tr} B - d_\text{out} \operatorname{tr} A / \pi^2)$. It is zero where
#
# $$
# \pi^2 = \frac{d_\text{out} \operatorname{tr} A}{d_\text{in} \operatorname{tr} B}
# = \frac{\operatorname{tr} A / d_\text{in}}{\operatorname{tr} B / d_\text{out}} ,
# \tag{9.8}
# $$
#
# a ratio of mean eigenvalues, and this is the minimum, since [(9.7)] grows without bound in both
# directions. In words: each factor gets damping in proportion to its own size.


# %%
def excess(K: Kronecker, damping: float, pi: float) -> Tensor:
    """E of (9.6): what factored damping adds beyond `damping * I`."""
    root, I_A, I_B = damping**0.5, eye_like(K.A), eye_like(K.B)
    whole = kron(K.B + root / pi * I_B, K.A + pi * root * I_A)
    return whole - K.dense() - damping * eye_like(whole)


d, pi = 0.1, balance(small).item()
assert_exact(excess(small, d, pi), d**0.5 * (pi * kron(B, I5) + kron(I3, A) / pi))
assert_close(pi**2, (A.trace() / 5 / (B.trace() / 3)).item())
traces = {factor: excess(small, d, factor * pi).trace().item() for factor in (0.5, 0.9, 1, 1.1, 2)}
print("trace of E at multiples of pi:", {f: round(t, 3) for f, t in traces.items()})
assert min(traces, key=traces.__getitem__) == 1

# %% [markdown]
# ### In the package

# %% tags=["beside", "remove-input"]
code(factored_inverse, balance)

# %%
inverse = factored_inverse(small, d)
assert_exact(inverse.dense(), inv(kron(B + d**0.5 / pi * I3, A + pi * d**0.5 * I5)))
assert not torch.allclose(inverse.dense(), small.inverse(d).dense(), rtol=0.05)

# %% [markdown]
# ### It always damps too much
#
# <div class="admonition theorem" markdown="1" id="thm-9.2">
# <p class="admonition-title" markdown="1"><b>Theorem 9.2 (factored damping over-damps)</b></p>
#
# Let $A$ and $B$ be symmetric positive semi-definite, $\delta, \pi \gt 0$. Then $E_\pi$ is positive
# semi-definite. In the eigenbasis of $B \otimes A$, every coefficient of the factored step is that
# of the exact step, times
#
# $$
# \frac{x y + 1}{(x + 1)(y + 1)} \le 1
# \qquad\text{with}\quad x = \frac{\alpha_i}{\pi \sqrt\delta},\quad y = \frac{\pi \beta_o}{\sqrt\delta} .
# \tag{9.9}
# $$
#
# </div>
#
# **Proof.** Adding multiples of the identity changes no eigenvectors, so the matrices in
# [(9.6)] share the basis $Q_B \otimes Q_A$. The eigenvalues of $E_\pi$ are
# $\pi \sqrt\delta \beta_o + \sqrt\delta \alpha_i / \pi \ge 0$. The factored step divides by
# $(\beta_o + \sqrt\delta / \pi)(\alpha_i + \pi \sqrt\delta) = \delta (y + 1)(x + 1)$ and the exact
# step by $\beta_o \alpha_i + \delta = \delta (xy + 1)$. The ratio is [(9.9)], and
# $(x + 1)(y + 1) = xy + 1 + x + y$. $\blacksquare$
#
# So, whatever $\pi$ is, the factored step is along no eigenvector longer than the exact one. Along each eigenvector it
# is the exact step for the damping $\delta (1 + x + y)$, which differs from one to the next. Where both eigenvalues are
# large compared with their share of the damping, or both are small, the ratio [(9.9)] is near one. It is small where
# one is large and the other small. A Kronecker product has many such mixed directions, because each eigenvalue of one
# factor is paired with each of the other.

# %%
alpha, beta = psd_eigh(A)[0], psd_eigh(B)[0]
for any_pi in (0.3, 1.0, pi, 5.0):
    assert torch.linalg.eigvalsh(excess(small, d, any_pi)).min() >= -1e-12
    x, y_ = alpha / (any_pi * d**0.5), beta * any_pi / d**0.5
    expected = (torch.outer(y_, x) + 1) / torch.outer(y_ + 1, x + 1)
    whole = Kronecker(inv(A + any_pi * d**0.5 * I5), inv(B + d**0.5 / any_pi * I3))
    factored, solved = (eig.QB.T @ (P @ G) @ eig.QA for P in (whole, small.inverse(d)))
    assert_exact(factored, expected * solved)
    assert expected.max() < 1

# %% [markdown]
# ### Why pi is not optional
#
# $B \otimes A = (B / c) \otimes (c A)$: how the scale is split between the factors is a
# convention. Ours gives all of the loss's scale to $B$ ([Chapter 5](05_kfac.py)); other implementations differ.
# A step should not depend on the convention. By [(9.8)], $\pi$ becomes
# $c \pi$, so that
#
# $$
# \Bigl(\tfrac1c B + \tfrac{\sqrt\delta}{c \pi} I\Bigr) \otimes \bigl(c A + c \pi \sqrt\delta I\bigr)
# = \Bigl(B + \tfrac{\sqrt\delta}{\pi} I\Bigr) \otimes \bigl(A + \pi \sqrt\delta I\bigr) .
# \tag{9.10}
# $$
#
# The damped matrix stays the same. With a fixed $\pi = 1$ it does not:


# %%
def fixed_pi(K: Kronecker, damping: float) -> Kronecker:
    root, I_A, I_B = damping**0.5, eye_like(K.A), eye_like(K.B)
    return Kronecker(inv(K.A + root * I_A), inv(K.B + root * I_B))


for c in (1e-3, 200.0):  # 200 is the size of our batch: conventions differ by that much
    other = Kronecker(c * A, B / c)
    assert_exact(other.dense(), small.dense())
    assert_exact(factored_inverse(other, d).dense(), factored_inverse(small, d).dense())
    share = (fixed_pi(other, d) @ G).norm() / (fixed_pi(small, d) @ G).norm()
    print(f"c = {c:5g}, pi = 1: a step {share:.3f} times as long")
    assert share < 0.5

# %% [markdown]
# ### How much shorter, on digits
#
# Steps of the trained network for a range of dampings:

# %%
dampings = torch.logspace(-8, 2, 21).tolist()
exact = Kronecker.inverse
curves, best = {}, {}
for kind, invert in {"exact": exact, "factored": factored_inverse, "π = 1": fixed_pi}.items():
    steps = [step({name: invert(K, d) for name, K in factors.items()}) for d in dampings]
    curves[kind] = ([length(s) for s in steps], [after(s) for s in steps])
    best[kind], at = min(zip(curves[kind][1], dampings, strict=True))
    print(f"{kind:8} lowest loss after a full step {best[kind]:.3f}, at damping {at:.0e}")
    assert best[kind] < value

shares = [f / e for f, e in zip(curves["factored"][0], curves["exact"][0], strict=True)]
print(f"factored steps are {min(shares):.2f} to {max(shares):.2f} times as long as exact ones")
assert min(shares) < 0.5 < max(shares) < 1
assert best["π = 1"] < best["factored"] < best["exact"]  # here!

# %% tags=["hide-input"] alt="Two log-log plots against the damping, each with three curves: exact, factored, and factored with pi equal to one. Left, the length of the step: all fall, the exact one is the longest throughout, and the curves come together for very large damping. Right, the loss after the full step: high for small damping, a minimum in between, then a rise to the loss before the step. The minimum of the factored curves lies at smaller damping and is lower." caption="Length of a full step (left) and the loss after it (right; the horizontal line is the loss before). Factored damping takes shorter steps at the same damping, so its best damping is smaller."
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
for (kind, (long, loss_after)), style in zip(curves.items(), ("-", "--", ":"), strict=True):
    left.loglog(dampings, long, style, label=kind)
    right.loglog(dampings, loss_after, style)
right.axhline(value.item(), color=right.xaxis.label.get_color(), linestyle=":", linewidth=1)
left.set(xlabel=r"damping $\delta$", ylabel=r"$\Vert s \Vert$")
right.set(xlabel=r"damping $\delta$", ylabel="loss after the step")
left.legend()
plt.show()

# %% [markdown]
# A damping that was tuned for one kind does not suit another; so a reported damping needs the name of its kind. The
# *lowest* loss does not belong to exact damping here; even $\pi = 1$ reaches a lower one. Exact damping inverts
# $B \otimes A + \delta I$ exactly, but $B \otimes A$ is an approximation, and the extra damping of mixed directions
# happens to suit this network. An exact inverse makes a step well defined and independent of conventions. It does not
# make it the best step.
#
# | | exact | factored | $\pi = 1$ |
# | --- | --- | --- | --- |
# | excess of damping | none | [(9.6)] | larger |
# | step, relative to exact | 1 | at most 1 | at most 1 |
# | same for $cA$, $B / c$ | yes | yes | no |
# | same for $cL$, $c\delta$ | yes | yes | no |
# | made by | eigen-vectors | Cholesky | Cholesky |
# | products in a step | 4 | 2 | 2 |
#
# ## The unit of damping
#
# Multiply the loss by $c$. Then gradient and curvature are multiplied by $c$, and
#
# $$
# (c M + c\, \delta I)^{-1} (c\, h) = (M + \delta I)^{-1} h .
# \tag{9.11}
# $$
#
# The step is the same **if damping is multiplied by $c$ as well**. Damping has the unit of
# curvature. A common $c$ is the number of data: for `reduction="sum"` instead of `"mean"`, the
# same value of $\delta$ damps $N$ times less.

# %%
of_mean = factors["2"]
of_sum = kfac(layer_ios(model, CrossEntropyLoss(reduction="sum"), X, y)["2"])
N, V = len(X), torch.randn(10, 21)
for invert in (exact, factored_inverse):
    assert_exact(invert(of_sum, N * 1e-3) @ (N * V), invert(of_mean, 1e-3) @ V)
    assert not torch.allclose(invert(of_sum, 1e-3) @ (N * V), invert(of_mean, 1e-3) @ V, rtol=0.1)
assert not torch.allclose(fixed_pi(of_sum, N * 1e-3) @ (N * V), fixed_pi(of_mean, 1e-3) @ V)

# %% [markdown]
# With $\pi = 1$ even the scaled damping gives another step; Exercise 9.2 asks why.
#
# A damping that suits one loss or layer need not suit another. A remedy is to state damping as a
# fraction $\varphi$ of the mean eigenvalue of each layer's own curvature:
#
# $$
# \delta_l = \varphi \cdot \frac{\operatorname{tr} M_l}{d_\text{out} d_\text{in}} .
# \tag{9.12}
# $$

# %% tags=["beside", "remove-input"]
code(relative_damping)

# %%
for name, K in factors.items():
    print(f"layer {name}: mean eigenvalue {relative_damping(K, 1.0):.1e}")
    assert_close(relative_damping(K, 1.0), K.eigenvalues().mean().item())
sum_step = of_sum.inverse(relative_damping(of_sum, 0.1)) @ (N * V)
assert_exact(sum_step, of_mean.inverse(relative_damping(of_mean, 0.1)) @ V)

# %% [markdown]
# With this choice the trust region becomes an ellipsoid, with longer steps in flat layers.
#
# ## Levenberg and Marquardt: ask the loss
#
# How much damping is right depends on how well the model predicts the loss. Every step tests the prediction.
# The **reduction ratio** is the change of the loss divided by the predicted change:
#
# $$
# \rho = \frac{L(\theta + s) - L(\theta)}{h^\top s + \tfrac12 s^\top M s} .
# \tag{9.13}
# $$
#
# The denominator is $m(s) - L$ of [(9.1)], *without* the penalty, which is not part of the loss. For the damped step it
# is negative, if $h \ne 0$. Since $(M + \delta I) s = -h$, we can replace $h$ by $-M s - \delta s$:
#
# $$
# \begin{aligned}
# h^\top s + \tfrac12 s^\top M s
# &= -s^\top M s - \delta s^\top s + \tfrac12 s^\top M s \\
# &= -\tfrac12 s^\top M s - \delta \lVert s \rVert^2 .
# \end{aligned}
# \tag{9.14}
# $$
#
# So $\rho$ is positive if and only if the loss went down. A ratio near one says that the model was right, one near zero
# or below that the step left the region in which it is. Hence the rule: above $\tfrac34$ shrink the damping, below
# $\tfrac14$ raise it, in between leave it. Gradient, curvature and both losses must be of the same batch, or the ratio
# also contains the difference between batches.

# %% tags=["remove-input"]
code(reduction_ratio, levenberg_marquardt)

# %% [markdown]
# On a loss that *is* quadratic, the ratio is one for every step:

# %%
for s in (*damped.values(), torch.randn(12)):
    at_0, at_s = 3.0, 3.0 + m(s).item()
    assert abs(reduction_ratio(at_0, at_s, m(s).item()) - 1) < 1e-10
for d_, s in damped.items():
    assert_close(m(s), -(s @ M @ s) / 2 - d_ * s @ s)
assert [levenberg_marquardt(1.0, r, factor=0.5) for r in (0.9, 0.5, 0.1, -3.0)] == [0.5, 1, 2, 2]

# %% [markdown]
# ### A run
#
# A small network learns a wave from 40 points. We use two models of its loss: the exact GGN of all weights together,
# and KFAC's blocks. Each prediction uses the model's own $M$, so that for KFAC the ratio measures the whole model: the
# quadratic form *and* the approximation of its curvature. A step after which the loss is higher is not taken; only the
# damping changes.


# %%
def kfac_matrix(net: Module, loss: Module, X: Tensor, y: Tensor) -> Tensor:
    """KFAC's blocks in one matrix over all weights; the rest is zero."""
    theta = parameter_vector(net)
    M = torch.zeros(len(theta), len(theta))
    for name, io in layer_ios(net, loss, X, y).items():
        place = block_index(net)[name].flatten()
        M[place[:, None], place] = kfac(io).dense()
    return M


def run(curvature, damping: float, adapt: bool = True, steps: int = 60) -> list[tuple]:
    torch.manual_seed(1)
    net = Sequential(Linear(1, 10), Tanh(), Linear(10, 10), Tanh(), Linear(10, 1))
    squared = MSELoss()
    X = torch.linspace(-1, 1, 40)[:, None]
    y, history = (5 * X).sin(), []
    for _ in range(steps):
        before = squared(net(X), y)
        h = torch.cat([v.flatten() for v in torch.autograd.grad(before, list(net.parameters()))])
        M, theta = curvature(net, squared, X, y), parameter_vector(net)
        s = -torch.linalg.solve(M + damping * eye_like(M), h)

        vector_to_parameters(theta + s, net.parameters())
        value = squared(net(X), y).item()
        ratio = reduction_ratio(before.item(), value, (h @ s + s @ M @ s / 2).item())
        history.append((before.item(), damping, ratio))
        if adapt:
            damping = levenberg_marquardt(damping, ratio)
            if not value < before.item():  # also if it is not a number
                vector_to_parameters(theta, net.parameters())
    return history


# %%
runs = {"exact GGN": run(ggn, 1.0), "KFAC": run(kfac_matrix, 1.0)}
fixed = {d: run(ggn, d, adapt=False) for d in (1e-6, 1.0)}
for name, history in (runs | {f"fixed at {d:g}": h for d, h in fixed.items()}).items():
    start, end = history[0], history[-1]
    print(f"{name:14} loss {start[0]:.3f} -> {end[0]:.1e}, damping now {end[1]:.0e}")
final, final_kfac = (history[-1] for history in runs.values())
assert final[0] < final_kfac[0] < 0.5 * runs["KFAC"][0][0]
assert all(final[0] < history[-1][0] / 10 for history in fixed.values())
assert final[1] < 0.01
assert final_kfac[1] > 3 * final[1]  # KFAC's model is trusted less

# %% tags=["hide-input"] alt="Three plots against the step number, for the exact GGN and for KFAC: the loss, which falls for both, much further with the exact GGN; the damping, which falls by orders of magnitude for the exact GGN, and for KFAC falls first, rises again and then swings about its first value; and the reduction ratio, mostly between one half and one for the exact GGN and swinging slowly between below zero and one for KFAC, with the two thresholds as dotted lines." caption="Levenberg-Marquardt with two models. Left: loss (dashed: exact GGN with a fixed damping of 1). Middle: the damping. Right: the reduction ratio, cut at $-0.5$, and the two thresholds."
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 3.2), layout="constrained")
for name, history in runs.items():
    loss_, damping_, ratio_ = zip(*history, strict=True)
    left.semilogy(loss_, label=name)
    middle.semilogy(damping_)
    shown_ratio = [float("nan") if r is None else max(r, -0.5) for r in ratio_]
    right.plot(shown_ratio, ".-", linewidth=0.7, markersize=4)
left.semilogy([h_[0] for h_ in fixed[1.0]], "--", color="C0", linewidth=1, label="damping 1")
for threshold in (0.25, 0.75):
    right.axhline(threshold, color=right.xaxis.label.get_color(), linestyle=":", linewidth=1)
left.set(xlabel="step", title="loss")
middle.set(xlabel="step", title="damping")
right.set(xlabel="step", title=r"ratio $\rho$", ylim=(-0.6, 2))
left.legend()
plt.show()

# %% [markdown]
# With exact curvature, damping starts high, while the model is good for short steps only, and
# falls as the minimum comes near, so that the steps become Gauss-Newton steps. Neither of the two
# fixed dampings does both. KFAC's damping soon returns to its first value. Its $M$ is not the GGN: it leaves out the
# curvature between layers, for example, and this error stays when the minimum is near. So the ratio falls below the
# threshold whenever the damping gets low.
#
# ### The end, and after the end
#
# At a minimum [(9.13)] becomes $0 / 0$, and in floating point round-off over round-off. If the loss does not change
# in its last digit, the ratio is zero, and a rule that uses this ratio raises the damping again and again.
# `reduction_ratio` returns `None` when the predicted change is within the round-off of the loss, and damping stays. The
# opposite case is a step so long that the loss is not a number. Every comparison with `nan` is false, so that a
# rule with two comparisons leaves damping where it is, and the next step is as bad. `nan` must count as the worst
# ratio.

# %%
before, promised, nan = 0.8, -1e-18, float("nan")  # `promised`: the predicted change
after_step = before + promised  # as on the parabola: the true ratio is one
naive = (after_step - before) / promised
assert levenberg_marquardt(0.1, naive) > 0.1 > naive == 0
assert levenberg_marquardt(0.1, reduction_ratio(before, after_step, promised)) == 0.1
assert not any([nan > 3 / 4, nan < 1 / 4])
assert levenberg_marquardt(0.1, reduction_ratio(before, nan, -0.5)) > 0.1

# %% [markdown]
# ## What goes wrong in practice
#
# **Damping stored in the factors.** Factors are averaged over steps,
# $\bar A \leftarrow \mu \bar A + (1 - \mu) A_t$ with a decay $\mu$. An implementation adds the
# damping to $\bar A$ in place, inverts, and averages on with the same tensor. The added damping $e$ then
# stays in the average. It obeys $e \leftarrow \mu e + \gamma$ if $\gamma$ is added each time, with the fixed point
#
# $$
# e = \frac{\gamma}{1 - \mu} .
# \tag{9.15}
# $$

# %%
decay, gamma = 0.95, 0.01
stored, clean = torch.zeros(5, 5), torch.zeros(5, 5)
for _ in range(800):
    R = torch.randn(5, 20)
    new = (1 - decay) * R @ R.T / 20
    stored, clean = decay * stored + new, decay * clean + new
    stored += gamma * I5  # damp in place, then invert `stored`
effective = (stored - clean).diagonal()
print(f"asked for {gamma}, got {effective.mean().item():.3f}")
assert_exact(effective, torch.full((5,), gamma / (1 - decay)))
# %% [markdown]
# An optimizer with twenty times the damping still works, but the best value of its setting is far from that of other
# implementations. [Chapter 8](08_matrices.py) shows the same mistake with stored eigenvalues.
#
# **Pi or pi squared?** The traces give $\pi^2$. In one
# [public discussion](https://github.com/Thrandis/EKFAC-pytorch/issues/4), a reader doubted lines
# that were right, because the variable called `pi` held $\pi^2$ and was used under a root. A "correction" of
# such lines to the formula of the paper, with the same variable, damps with $\pi^2$ in the place of
# $\pi$. No error is raised, because the two shares still multiply to $\delta$. But the trace of $E_\pi$ is no longer
# minimal, and the step depends on the convention:

# %%
confused = balance(small).item() ** 2
assert abs(confused - pi) > 0.1 * pi
assert excess(small, d, confused).trace() > 1.01 * excess(small, d, pi).trace()
for c in (0.1, 10.0):
    other = Kronecker(c * A, B / c)
    E, E_c = excess(small, d, confused), excess(other, d, balance(other).item() ** 2)
    print(f"c = {c:4g}: trace of E {E_c.trace() / E.trace():.2f} times as large")
    assert not torch.allclose(E_c, E, rtol=0.1)

# %% [markdown]
# **Damping in one term only.** Methods without inverses update their estimate $X$ by expressions in which the
# curvature occurs several times, and each occurrence needs the damping ([an example of a forgotten
# one](https://github.com/f-dangel/singd/issues/17)). A small iteration of that kind is
# $X \leftarrow 2 X - \tfrac12 X M_1 X - \tfrac12 X M_2 X$. With $M_1 = M_2 = M + \delta I$ it stops at the inverse,
# where $X = X (M + \delta I) X$. Forget $\delta$ in $M_2$, and the fixed point is
# $X = X (M + \tfrac{\delta}{2} I) X$: the iteration converges to the inverse with half the damping.


# %%
def iterate(M1: Tensor, M2: Tensor) -> Tensor:
    X = eye_like(M1) / M1.trace()
    for _ in range(60):
        X = 2 * X - X @ M1 @ X / 2 - X @ M2 @ X / 2
    return X


assert_exact(iterate(A + 0.1 * I5, A + 0.1 * I5), inv(A + 0.1 * I5))
forgotten = iterate(A + 0.1 * I5, A)
assert not torch.allclose(forgotten, inv(A + 0.1 * I5), rtol=0.01)
assert_exact(forgotten, inv(A + 0.05 * I5))

# %% [markdown]
# ## In one minute
#
# - **Why.** Small eigenvalues are estimated too small, and the quadratic model holds near the present point only.
# - **What.** Damping keeps the fraction $\lambda / (\lambda + \delta)$ of the Newton step along each eigenvector,
#   [(9.4)]. It is the same as a bound on the length ([Theorem 9.1]).
# - **Where.** Exact damping needs eigenvectors. Factored damping needs two Cholesky factorisations and over-damps,
#   most where one eigenvalue is large and the other small ([Theorem 9.2]). Without $\pi$ it depends on the scale of
#   the factors.
# - **Unit.** Damping has the unit of curvature: a loss that is multiplied by $c$ needs $c \delta$.
# - **How much.** The reduction ratio compares the change of the loss with the model's prediction. A low ratio raises
#   the damping, a high one lowers it.
#
# ## Exercises
#
# **Exercise 9.1.** For $A = \alpha I$ (a single input, say), $B \otimes A + \delta I$ *is* a
# Kronecker product. Of what? Does factored damping find it?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $(B + \tfrac{\delta}{\alpha} I) \otimes \alpha I$: all of the damping goes to $B$. Factored damping
# puts some into $A$, for every $\pi$, and $E_\pi$ is positive semi-definite with a positive trace.
# So factored damping is not exact even here.
#
# </details>
#
# **Exercise 9.2.** Multiply the loss by $c$ and the damping too. Why is the factored step unchanged
# with $\pi$ from [(9.8)], but not with $\pi = 1$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The loss changes $B$ to $c B$ and leaves $A$ alone, $\pi$ becomes $\pi / \sqrt c$ and $\sqrt\delta$
# becomes $\sqrt{c \delta}$. Then $\sqrt{c \delta} / (\pi / \sqrt c) = c \sqrt\delta / \pi$ and
# $\sqrt{c \delta}\, \pi / \sqrt c = \sqrt\delta\, \pi$, as it should be. With $\pi = 1$ both factors
# get $\sqrt c$ times as much, where $B$ needs $c$ and $A$ needs $1$.
#
# </details>
#
# **Exercise 9.3.** Write factored damping yourself: from $A$, $B$, a gradient $G$ and $\delta$ to the step, with
# $\pi$ from [(9.8)] and with `torch.cholesky_solve` in the place of inverses. Compare it with
# `factored_inverse(Kronecker(A, B), d) @ G`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# ```
# def solution(A, B, G, damping):
#     pi = (A.trace() / len(A) / (B.trace() / len(B))).sqrt()
#     LA = torch.linalg.cholesky(A + pi * damping**0.5 * torch.eye(len(A)))
#     LB = torch.linalg.cholesky(B + damping**0.5 / pi * torch.eye(len(B)))
#     return torch.cholesky_solve(torch.cholesky_solve(G, LB).T, LA).T
# ```
#
# </details>
#
# **Exercise 9.4.** How many directions are trusted, in the sense of the sum of the filter, if all $D$ eigenvalues
# are equal to $\lambda$? Which damping trusts half of them?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $D \lambda / (\lambda + \delta)$. The damping $\delta = \lambda$ trusts $D / 2$: every direction by one half.
#
# </details>
#
# **Exercise 9.5.** Where does factored damping with $\pi$ from [(9.8)] shorten a coefficient most, for $x$ and $y$
# of [(9.9)] with a given product $x y = p$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The ratio is $(p + 1) / (p + 1 + x + y)$. For a given product the sum $x + y$ is smallest at $x = y = \sqrt p$ and
# grows without bound as one of them goes to zero. So mixed directions are shortened most: the ratio comes arbitrarily
# close to zero.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
multiple = Kronecker(0.7 * I5, B)
assert_exact(kron(B + d / 0.7 * I3, 0.7 * I5), multiple.dense() + d * I15)  # 9.1
assert not torch.allclose(factored_inverse(multiple, d).dense(), multiple.inverse(d).dense())

for c in (0.01, 30.0):  # 9.2
    scaled = Kronecker(A, c * B)
    assert_exact(factored_inverse(scaled, c * d) @ (c * G), factored_inverse(small, d) @ G)
    assert not torch.allclose(fixed_pi(scaled, c * d) @ (c * G), fixed_pi(small, d) @ G, rtol=0.05)


def solution(A: Tensor, B: Tensor, G: Tensor, damping: float) -> Tensor:  # 9.3
    pi = (A.trace() / len(A) / (B.trace() / len(B))).sqrt()
    LA = torch.linalg.cholesky(A + pi * damping**0.5 * torch.eye(len(A)))
    LB = torch.linalg.cholesky(B + damping**0.5 / pi * torch.eye(len(B)))
    return torch.cholesky_solve(torch.cholesky_solve(G, LB).T, LA).T


assert_exact(solution(A, B, G, d), factored_inverse(small, d) @ G)
equal = torch.full((7,), 0.3)  # 9.4
assert_close((equal / (equal + 0.3)).sum(), torch.tensor(3.5))
p_, xs = 2.0, torch.logspace(-4, 4, 81)  # 9.5
shortened = (p_ + 1) / ((xs + 1) * (p_ / xs + 1))
assert (xs[shortened.argmax()] - p_**0.5).abs() < 0.2
assert shortened[0] < 1e-3
assert shortened[-1] < 1e-3
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Martens and Grosse (2015)](bibliography.md#kfac), section 6, for factored damping and for the
# adaptation of the damping in KFAC; their section 6.4 rescales the step with exact curvature, which
# repairs part of what KFAC's model gets wrong. Nocedal and Wright, *Numerical Optimization*,
# chapters 4 and 10, for trust regions and Levenberg-Marquardt.
