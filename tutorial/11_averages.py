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
# # 11. Averages and lengths: from a matrix to an optimizer
#
# **Part IV: Training.** Every batch gives another gradient and another curvature matrix. How do they become one
# sequence of steps, and how long is each step?
#
# [Figure 11.1] shows why the second half of the question matters. The same small network is trained for 15 steps with
# KFAC, with each of three dampings and four learning rates. The left panel shows the update rule without a control. In
# the other two panels a *control* changes the length of each step.

# %% tags=["hide-input"]
import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Module, MSELoss, Sequential, Tanh

from kfac_scratch.approximations.estimators import MovingAverage, weight_of_newest
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, largest_error, set_up
from kfac_scratch.curvature import block_index, flatten_values, ggn, parameter_vector
from kfac_scratch.layer_io import LayerIO, concatenate
from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import type2
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.preconditioner import preconditioner
from kfac_scratch.optimizer.step_control import (
    Step,
    _grafted,
    _kl_clipped,
    _norm_constrained,
    graft,
    kl_clip,
    norm_constraint,
    squared_length,
)
from kfac_scratch.show import code

set_up()  # seed 0, float64, the GPU where there is one
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
loss = CrossEntropyLoss()
plain_rule: dict[str, Any] = {  # no control, exact damping, constant periods
    "controls": [],
    "invert": exact_inverse,
    "momentum": 0.9,
    "damping": 1e-3,
    "decay": 0.95,
    "factor_every": 10,
    "inverse_every": 10,
}


def network() -> Sequential:
    torch.manual_seed(0)
    return Sequential(Linear(64, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 10))


def batches(steps: int, size: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches out of the first 1000 images, the same ones in every call."""
    generator = torch.Generator(images.device).manual_seed(1)
    for index in torch.randint(1000, (steps, size), generator=generator):
        yield images[index], labels[index]


def training_loss(model: Module) -> float:
    with torch.no_grad():
        return loss(model(images[:1000]), labels[:1000]).item()


def train(model: Module, optimizer, data, schedule=None) -> list[float]:
    """The loss of every batch before the step on it."""
    losses = []
    for X, y in data:
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        if isinstance(optimizer, KFAC):
            optimizer.observe(X, y)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(value.item())
    return losses


# %% tags=["hide-input"] fold="Measured: the loss after 15 steps, for 12 settings with and without controls"
dampings, rates = (1e-5, 1e-3, 1e-1), (1e-3, 1e-2, 1e-1, 1.0)
controls = {"no control": [], "KL clip": [kl_clip(1e-3)], "graft": [graft()]}
outcome = {}
for name, chosen in controls.items():
    for damping, lr in itertools.product(dampings, rates):
        model = network()
        options = {"lr": lr, "damping": damping, "factor_every": 5, "inverse_every": 5}
        optimizer = KFAC(model, loss, **plain_rule | options | {"controls": chosen})
        train(model, optimizer, batches(15))
        outcome[name, damping, lr] = training_loss(model)

start = training_loss(network())
worse = {
    name: sum(outcome[name, d, r] > start for d in dampings for r in rates) for name in controls
}

# %% tags=["hide-input"] alt="Three heat maps of the loss after 15 steps, for three dampings and four learning rates, with the number in every cell. Without control most cells with small damping or large learning rate have losses from tens to many thousands, and a diagonal of few cells is good. With a KL clip the columns of the larger learning rates are equal. With graft the column of learning rate 0.01 is good for all dampings." caption="Loss after 15 steps of KFAC. The numbers are losses, the colours their logarithms. Without control, a learning rate is good only together with a damping that suits it. With a KL clip, the larger learning rates give equal numbers: the learning rate has no effect. With graft, one learning rate suits all dampings."
fig, axes = plt.subplots(1, 3, figsize=(7.8, 3.1), layout="constrained", sharey=True)
for ax, name in zip(axes, controls, strict=True):
    table = [[outcome[name, d, r] for r in rates] for d in dampings]
    ax.imshow([[math.log10(v) for v in row] for row in table], vmin=-1.3, vmax=3, aspect="auto")
    for (i, row), j in itertools.product(enumerate(table), range(len(rates))):
        text = f"{row[j]:.2f}" if row[j] < 10 else f"{row[j]:.0f}" if row[j] < 1e3 else "> 10³"
        shade = "#f4f4f4" if row[j] < 20 else "#222222"
        ax.text(j, i, text, ha="center", va="center", fontsize=9, color=shade)
    ax.set_xticks(range(len(rates)), [f"{r:g}" for r in rates])
    ax.set_yticks(range(len(dampings)), [f"$10^{{{math.log10(d):.0f}}}$" for d in dampings])
    ax.set(title=name, xlabel=r"learning rate $\eta$")
axes[0].set_ylabel(r"damping $\delta$")
plt.show()

# %% [markdown]
# In formulas, step $t$ of the optimizer does three things for every layer:
#
# $$
# \begin{aligned}
# M_t &= (1 - w_t)\, M_{t-1} + w_t \hat M_t && \text{average,} \\
# P_t &= (M_t + \delta I)^{-1} h_t && \text{precondition,} \\
# \Delta_t &= -\nu_t\, \eta P_t + \mu\, \Delta_{t-1} && \text{move.}
# \end{aligned}
# \tag{11.1}
# $$
#
# Here $\hat M_t$ is the matrix and $h_t$ the gradient that batch $t$ gives. KFAC's matrix is a Kronecker product $B
# \otimes A$ of two small factors for each layer ([Chapter 5](05_kfac.py)). Further, $w_t$ is the weight of the newest
# matrix, $\delta$ the damping, $\eta$ the learning rate, $\mu$ the momentum and $\Delta_t$ the change of the
# parameters. The number $\nu_t$ is 1 in the plain rule, and is otherwise chosen by a control.
#
# After this chapter you will be able to
#
# - write KFAC's optimizer as a loop of ten lines, and explain each of them;
# - average matrices over batches without a start value, and recognise two mistakes of public code, a decay on the wrong
#   side and a start at the identity;
# - say what each control bounds, and notice when a learning rate has no effect.
#
# In all comparisons the networks start with the same weights and get the same batches, so that only the optimizer
# differs. Most runs use the plain rule, with a few settings changed: no control, exact damping
# ([Chapter 9](09_damping.py)), new matrices and inverses every ten steps. The optimizer's own defaults are the subject
# of [Chapter 13](13_in_practice.py#with-no-argument).
#
# ## An optimizer in ten lines
#
# Earlier chapters have derived nearly all parts of the optimizer. `layer_ios` returns the inputs and vectors of each
# layer ([Chapter 4](04_layer_io.py)), `kfac` makes a matrix of them ([Chapter 5](05_kfac.py)), `inverse` damps and
# inverts the matrix ([Chapter 9](09_damping.py)), and `preconditioner` applies the inverses to a gradient
# ([Chapter 8](08_matrices.py)). `weight_of_newest` and `update` take the average, which the next section derives.

# %%
average, lr, momentum, damping = MovingAverage(kfac), 0.1, 0.9, 0.1
mine, matrices = network(), {}
parameters = dict(mine.named_parameters())
change = {name: torch.zeros_like(p) for name, p in parameters.items()}

for count, (X, y) in enumerate(batches(10), start=1):
    slopes = torch.autograd.grad(loss(mine(X), y), list(parameters.values()))
    gradient = dict(zip(parameters, slopes, strict=True))
    weight = weight_of_newest(0.95, count)
    for name, io in layer_ios(mine, loss, X, y).items():
        matrices[name] = average.update(matrices.get(name), io, weight)
    inverses = {name: M.inverse(damping) for name, M in matrices.items()}
    for name, P in preconditioner(mine, inverses)(gradient).items():
        change[name] = momentum * change[name] - lr * P
        parameters[name].data += change[name]
# %% [markdown]
# The package's optimizer has PyTorch's interface. The training loop has one line more than usual: `observe` passes the
# batch to the optimizer. If every batch is observed, the steps are those of our loop, to the last bit.

# %%
theirs = network()
always = {"factor_every": 1, "inverse_every": 1}
options = plain_rule | always | {"lr": lr, "momentum": momentum, "damping": damping}
optimizer = KFAC(theirs, loss, fisher=type2, **options)
for X, y in batches(10):
    optimizer.zero_grad()
    loss(theirs(X), y).backward()
    optimizer.observe(X, y)
    optimizer.step()

# %% tags=["hide-input"] fold="Checked: equal to our loop, bit by bit"
for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
    assert torch.equal(p, q)
print(f"loss {training_loss(network()):.3f} -> {training_loss(theirs):.3f} after 10 steps")
assert training_loss(theirs) < 0.7 * training_loss(network())

# %% [markdown]
# ### In the package
#
# The backward pass of training has already sent vectors through the network. They cannot be used here, because they are
# the gradients for the labels of the *data*, which give the empirical Fisher, another matrix ([Chapter 5](05_kfac.py)).
# So, if an update is due, `observe` makes a backward pass of its own: by default with one vector per datum, for a label
# drawn from the model. In [`step`][kfac_scratch.optimizer.optimizer.KFAC.step], the method `_inverted` renews inverses
# that are due, the controls change the step, and `_move` takes it. (`placement` is for several processes,
# [Chapter 34](34_many_processes.py).)

# %% tags=["remove-input"]
code(KFAC._inverted, KFAC._controlled, KFAC._move)

# %% [markdown]
# ### How often
#
# A step without an update costs a forward and a backward pass and, for each layer, a few products with small matrices.
# The curvature matrices cost another forward and backward pass, and an inverse costs
# $O(d_\text{in}^3 + d_\text{out}^3)$. Curvature changes more slowly than the gradient, so that matrices and inverses
# may be renewed every so many steps: `factor_every` and `inverse_every` are numbers, or functions of the number of
# steps so far. Their default is 1 in the first twenty steps, in which curvature changes fast, and grows to 10 at step
# 180.
#
# The next cell counts forward passes of whole batches for two constant periods, and compares the losses.
# (Before the first update, capture tries the network on up to eight samples, see [Chapter 10](10_capture.py).)

# %% tags=["hide-input"] fold="Counted: forward passes for two periods"
reached = {}
for every in (1, 10):
    model, passes = network(), []
    model.register_forward_hook(lambda _, X, __, seen=passes: seen.append(len(X[0])))
    options = {"lr": 0.01, "damping": 0.01, "controls": [graft()]}
    options |= {"factor_every": every, "inverse_every": every}
    optimizer = KFAC(model, loss, **plain_rule | options)
    train(model, optimizer, batches(60))
    reached[every] = training_loss(model)
    print(f"every {every:2}: {passes.count(100)} forward passes, loss {reached[every]:.3f}")
    assert passes.count(100) == 60 + 60 // every
    assert max(n for n in passes if n not in (100, 1000)) <= 8  # 1000 are those of the final loss
assert max(reached.values()) < 0.3
default = KFAC(network(), loss)
assert default.factor_every == default.inverse_every
assert [default.factor_every(step) for step in (0, 19, 20, 180, 1000)] == [1, 1, 2, 10, 10]

# %% [markdown]
# ## Averages over batches
#
# The matrix of one batch is a noisy estimate. An optimizer averages over many batches. But the parameters move, so
# old batches should have a smaller weight. Optimizers usually take an exponential average: with a **decay** $\rho$, a
# batch that is $k$ batches old has the weight $\rho^k$. Divided by the sum of the weights,
#
# $$
# M_t = \frac{1}{Z_t} \sum_{i=1}^{t} \rho^{\,t-i} \hat M_i ,
# \qquad
# Z_t = \sum_{i=1}^{t} \rho^{\,t-i} = \frac{1 - \rho^t}{1 - \rho} ,
# \tag{11.2}
# $$
#
# where $\hat M_i$ is the matrix of batch $i$ alone. An implementation stores only $M_t$, and needs the weight of the
# newest matrix:
#
# <div class="admonition theorem" markdown="1" id="thm-11.1">
# <p class="admonition-title" markdown="1"><b>Theorem 11.1 (bias-corrected average)</b></p>
#
# Let $w_t = (1 - \rho) / (1 - \rho^t)$ for $0 \le \rho \lt 1$. The recursion
#
# $$
# M_t = (1 - w_t)\, M_{t-1} + w_t \hat M_t
# \tag{11.3}
# $$
#
# gives [(11.2)] for every $t \ge 1$, whatever $M_0$ is.
#
# </div>
#
# **Proof.** By [(11.2)], $w_t = 1 / Z_t$. The weights in $Z_t$ are those in $Z_{t-1}$ times $\rho$, and the weight 1 of
# the newest batch, so that $Z_t = \rho Z_{t-1} + 1$. In the same way [(11.2)] gives
#
# $$
# Z_t M_t = \rho Z_{t-1} M_{t-1} + \hat M_t .
# $$
#
# Divide by $Z_t$. The coefficient of $M_{t-1}$ is $\rho Z_{t-1} / Z_t = 1 - 1 / Z_t = 1 - w_t$. For
# $t = 1$ it is zero. $\blacksquare$
#
# No start value is needed, because $w_1 = 1$. The package calls a rule that makes the next matrix of the last one and
# of a batch an **estimator**. `MovingAverage` makes an estimator of any function of one batch:

# %% tags=["remove-input"]
code(weight_of_newest, MovingAverage.update)

# %%
model, decay = network(), 0.9
stream = [layer_ios(model, loss, X, y)["0"] for X, y in batches(60)]


def estimate(estimator, ios: list[LayerIO], decay: float):
    M = None
    for count, io in enumerate(ios, start=1):
        M = estimator.update(M, io, weight_of_newest(decay, count))
    return M


def weighted(tensors: list[Tensor]) -> Tensor:
    """Equation (11.2) by hand."""
    weights = [decay ** (len(tensors) - 1 - i) for i in range(len(tensors))]
    return sum(w * t for w, t in zip(weights, tensors, strict=True)) / sum(weights)


for t in (1, 2, 7):
    M = estimate(MovingAverage(kfac), stream[:t], decay)
    assert_exact(M.A, weighted([kfac(io).A for io in stream[:t]]))
    assert_exact(M.B, weighted([kfac(io).B for io in stream[:t]]))
by_hand = weighted([kfac(io).A for io in stream[:7]])
print(f"Theorem 11.1: after 7 batches A differs by {largest_error(M.A, by_hand):.0e}")

# %% [markdown]
# ### How many batches is that?
#
# If the $\hat M_i$ are independent with the same variance, their weighted mean has the variance of a plain mean over
#
# $$
# \frac{(\sum_i \rho^{t-i})^2}{\sum_i \rho^{2(t-i)}} \;\longrightarrow\; \frac{1 + \rho}{1 - \rho}
# \tag{11.4}
# $$
#
# batches for large $t$. For $\rho = 0.95$ these are 39. The words "a decay of 0.95" have two meanings. Here, and in
# [Martens and Grosse (2015)](bibliography.md#kfac), 0.95 is the weight of the *old* matrix. In some code it is the
# weight of the *new* one; then $\rho$ is 0.05, and by [(11.4)] the average is as noisy as one over 1.1 batches. The
# next cell does not train the network, and measures how far each average is from the factor of all 1000 images:

# %% tags=["hide-input"] fold="Measured: the distance of A from that of all images"
whole = kfac(layer_ios(model, loss, images[:1000], labels[:1000])["0"])


def noise(decay: float) -> float:
    """Mean relative error of `A` over the last twenty batches."""
    M, errors = None, []
    for count, io in enumerate(stream, start=1):
        M = MovingAverage(kfac).update(M, io, weight_of_newest(decay, count))
        errors.append(((M.A - whole.A).norm() / whole.A.norm()).item())
    return statistics.mean(errors[-20:])


errors = {decay: noise(decay) for decay in (0.0, 0.05, 0.95)}
for decay, error in errors.items():
    print(f"decay {decay:4}: {(1 + decay) / (1 - decay):4.1f} batches, relative error {error:.3f}")
assert errors[0.05] > 0.8 * errors[0.0]  # 0.95 on the wrong side
assert errors[0.95] < 0.4 * errors[0.0]

# %% [markdown]
# ### Do not start at the identity
#
# Some implementations start the average at $M_0 = I$ and use the constant weight $w = 1 - \rho$. Unrolled, each
# factor is
#
# $$
# A_t = \rho^t I + (1 - \rho) \sum_{i=1}^{t} \rho^{\,t-i} \hat A_i
# = \rho^t I + (1 - \rho^t)\, \bar A_t
# \tag{11.5}
# $$
#
# with the corrected average $\bar A_t$ of [(11.2)]. Both factors start at the identity, so that
#
# $$
# B_t \otimes A_t = (1 - \rho^t)^2 \,
# \bigl( \bar B_t + \gamma_t I \bigr) \otimes \bigl( \bar A_t + \gamma_t I \bigr) ,
# \qquad \gamma_t = \frac{\rho^t}{1 - \rho^t} .
# \tag{11.6}
# $$
#
# Up to the number in front, the right side is factored damping, [(9.6)], with $\sqrt\delta = \gamma_t$ and $\pi = 1$.
# **A start at the identity is a damping that decays**, by a schedule that follows from $\rho$ alone: for $\rho = 0.95$
# the damping is $\gamma_1^2 = 361$ in the first step. The value $\pi = 1$ does not suit the factors, because $A$ has
# entries of order one, while $B$ has the scale of the loss and is small. The following estimator starts at the
# identity. [Figure 11.2] compares it with the corrected average.


# %%
@dataclass(frozen=True)
class FromIdentity:
    """The uncorrected average that starts at the identity."""

    decay: float

    def update(self, state: Kronecker | None, io: LayerIO, weight: float) -> Kronecker:
        new = kfac(io)
        old = Kronecker(eye_like(new.A), eye_like(new.B)) if state is None else state
        return old.mixed(new, 1 - self.decay)


# %% tags=["hide-input"] fold="Checked: (11.6); measured: the share of the identity, and the length of a step"
G, lengths, shares, hidden = torch.randn(16, 65), {}, {}, {}
biased = right = None
for t, io in enumerate(stream, start=1):
    biased = FromIdentity(0.95).update(biased, io, weight_of_newest(0.95, t))
    right = MovingAverage(kfac).update(right, io, weight_of_newest(0.95, t))
    gamma = 0.95**t / (1 - 0.95**t)
    lengths[t] = ((biased.inverse(1e-3) @ G).norm() / (right.inverse(1e-3) @ G).norm()).item()
    shares[t] = 0.95**t * len(right.B) / biased.B.trace().item()
    hidden[t] = gamma**2
    if t in (1, 10, 30, 60):
        same = Kronecker(right.A + gamma * eye_like(right.A), right.B + gamma * eye_like(right.B))
        assert_exact(biased.dense(), (1 - 0.95**t) ** 2 * same.dense())
        print(
            f"batch {t:2}: hidden damping {hidden[t]:7.1e}, identity {shares[t]:4.0%} of", end=" "
        )
        print(f"the trace of B, step {lengths[t]:.3f} times as long")
assert max(lengths.values()) < 0.5 < shares[60] < shares[1]
assert lengths[10] < lengths[30] < lengths[60]

# %% tags=["hide-input"] fold="Code of the figure" alt="Two plots against the number of batches from 1 to 60. Left, on a logarithmic axis, the hidden damping falls from several hundred to a few thousandths. Right, the share of the identity in the trace of B stays near one, and the length of a step, relative to that with the corrected average, stays near zero for thirty batches and then rises to about a quarter." caption="An average that starts at the identity, with $\\rho = 0.95$. Left: the damping $\\gamma_t^2$ that it adds. Right: the share of the identity in the trace of $B$, and the length of a step relative to that with the corrected average. After 60 batches, most of $B$ is the identity."
fig, (ax, other) = plt.subplots(1, 2, figsize=(7.8, 2.9), layout="constrained")
ax.semilogy(hidden.keys(), hidden.values())
ax.set(xlabel="batch", ylabel=r"hidden damping $\gamma_t^2$")
for curve, name, place in ((shares, "identity in the trace of $B$", 0.9), (lengths, "step", 0.1)):
    (line,) = other.plot(curve.keys(), curve.values())
    other.text(2, place, name, color=line.get_color(), va="center")
other.set(xlabel="batch", ylabel="share, relative length", ylim=(-0.02, 1.05))
plt.show()

# %% [markdown]
# After 60 updates, which at one update every ten steps are 600 steps, most of the trace of $B$ still comes from the
# identity. With a multiple of the identity in place of $B$, a step uses the curvature of $A$ alone. A damping that was
# tuned for such an optimizer does not suit another one.
#
# ### Factors, not products
#
# The optimizer averages both factors separately. The product of the averages is not the average of the products. For
# two batches with the weights $1 - w$ and $w$,
#
# $$
# \begin{aligned}
# & (1 - w)\, B_1 \otimes A_1 + w\, B_2 \otimes A_2 \\
# &\quad = \bigl( (1 - w) B_1 + w B_2 \bigr) \otimes \bigl( (1 - w) A_1 + w A_2 \bigr) \\
# &\qquad + w (1 - w)\, (B_1 - B_2) \otimes (A_1 - A_2) .
# \end{aligned}
# \tag{11.7}
# $$
#
# The difference is a covariance of $B$ and $A$ over batches. KFAC averages factors for two reasons. The average of
# products is a sum of Kronecker products, which has no cheap inverse. And the average of factors is the matrix that
# KFAC would give for *one large batch* made of the small ones, if the parameters do not change. The average of products
# depends on how the data were cut into batches.

# %% tags=["hide-input"] fold="Checked: (11.7), and one large batch made of two"
first, second = stream[:2]
K1, K2, w = kfac(first), kfac(second), 0.3
product = (1 - w) * K1.dense() + w * K2.dense()
covariance = w * (1 - w) * Kronecker(K1.A - K2.A, K1.B - K2.B).dense()
assert_exact(product, K1.mixed(K2, w).dense() + covariance)
print(f"relative size of the covariance: {(covariance.norm() / product.norm()).item():.4f}")

plain = estimate(MovingAverage(kfac), [first, second], decay=1.0)  # the plain mean
union = concatenate([first, second], shares=[0.5, 0.5])  # a mean over twice as many samples
assert_exact(plain.dense(), kfac(union).dense())
products = (K1.dense() + K2.dense()) / 2
assert (products - kfac(union).dense()).norm() > 1e-4 * products.norm()

# %% [markdown]
# Other kinds of matrices have other averages. `Diagonal` and `Dense` average entries. An eigenbasis is not averaged but
# replaced, and its eigenvalues are carried over ([Chapter 14](14_ekfac.py)). Each kind has a method `mixed` for this;
# without it `MovingAverage` raises an error.
#
# ## How long is a step?
#
# The undamped Newton step ends at the minimum of a quadratic loss. KFAC's step ends at the minimum of an *approximate*
# quadratic, which is estimated from a few batches, block by block. [Chapter 9](09_damping.py) damped one such step.
# [Figure 11.1] has the results of 15 of them:

# %% tags=["hide-input"] fold="Checked: what Figure 11.1 shows"
assert worse["no control"] > 6
assert worse["graft"] < worse["no control"]
assert all(outcome["graft", d, r] < start for d in dampings for r in rates[:3])
equal = [outcome["KL clip", d, 0.1] / outcome["KL clip", d, 1.0] for d in dampings[:2]]
assert max(abs(ratio - 1) for ratio in equal) < 1e-3  # the learning rate has no effect
good = [max(outcome["graft", d, 0.01] for d in dampings), outcome["no control", 1e-5, 0.01]]
assert good[0] < 0.5 * start < start < good[1]
assert any(outcome["KL clip", 1e-5, r] > start for r in rates)
print(
    f"Runs that end above {start:.2f}, the loss at the start: {worse['no control']} of 12", end=" "
)
print(f"without control,\n{worse['KL clip']} with a KL clip,", end=" ")
print(f"{worse['graft']} with graft, all of these with a learning rate of 1")
print(f"graft, learning rate .01: loss at most {good[0]:.2f} for all three dampings")
print("KL clip, small damping: rates .1 and 1 end at the same loss, to", end=" ")
print(f"{max(abs(ratio - 1) for ratio in equal):.0e} of it")

# %% [markdown]
# Without control, a learning rate is good only with certain dampings. The reason is the length of
# the step: a small damping makes it long, and so does a large learning rate. Each control of the package fixes the
# length by another measure. Not every setting is good with a control. With a KL clip, runs with a damping that
# is far too small still fail, and a grafted step with $\eta = 1$ is too long, as Adam's would be. But one learning
# rate of graft is good for all three dampings.
#
# In the package a control is a function from a `Step` to a `Step`. A `Step` is a value that holds gradient, direction
# and rates, before any parameter has moved.
#
# ## The KL clip
#
# The first measure is the effect of the step on the model's *predictions*. By the expansion that
# [Chapter 3](03_losses.py#the-natural-gradient) proves, the KL divergence between the predicted distributions before
# and after a small change $\Delta$, averaged over the data, is
#
# $$
# \operatorname{KL} = \tfrac12\, \Delta^\top F \Delta + O(\lVert \Delta \rVert^3)
# \tag{11.8}
# $$
#
# with the Fisher $F$. So an optimizer can keep $\Delta^\top F \Delta$ below a limit $\kappa$. If $F$ is replaced by the
# optimizer's damped matrix, no product with it is needed:
#
# <div class="admonition theorem" markdown="1" id="thm-11.2">
# <p class="admonition-title" markdown="1"><b>Theorem 11.2 (KL clip)</b></p>
#
# Let $P = (M + \delta I)^{-1} h$ with the gradient $h$, let $\Delta = -\eta P$ and
#
# $$
# \nu = \min \Bigl( 1, \sqrt{\kappa \,/\, \eta^2\, h^\top P} \Bigr) .
# \tag{11.9}
# $$
#
# Then $\nu \Delta$ satisfies $(\nu \Delta)^\top (M + \delta I)\, (\nu \Delta) \le \kappa$, with
# equality if $\nu \lt 1$. In particular
# $\tfrac12 (\nu \Delta)^\top M (\nu \Delta) \le \kappa / 2$.
#
# </div>
#
# **Proof.**
# $\Delta^\top (M + \delta I) \Delta = \eta^2 P^\top (M + \delta I) P = \eta^2 P^\top h$. Scaling the step by $\nu$
# scales this number by $\nu^2$. The last claim holds because $\delta I$ is positive definite. $\blacksquare$
#
# For a block-diagonal $M$ the product $h^\top P$ is a sum over layers of $\langle P_l, G_l \rangle$, the sum of the
# products of all entries of the layer's gradient $G_l$ and its preconditioned gradient $P_l$. The optimizer has
# computed both already.

# %% tags=["remove-input"]
code(_kl_clipped, squared_length)


# %% [markdown]
# The next cells check the theorem on a trained network, with the blocks of KFAC for $M$, and measure what the limit
# means for the predictions. The function `a_step` makes a step as the optimizer would, with any function from gradients
# to directions. The first number below is $\nu$. The second, the squared length with damping, must be the limit.


# %% tags=["hide-input"] fold="A step as the optimizer would make it"
def a_step(model: Module, X: Tensor, y: Tensor, direction, lr: float = 1.0) -> Step:
    """A step as the optimizer would make it, with a given function from gradients to directions."""
    named = dict(model.named_parameters())
    slopes = torch.autograd.grad(loss(model(X), y), list(named.values()))
    gradient = dict(zip(named, slopes, strict=True))
    rates, zero = dict.fromkeys(named, lr), {n: torch.zeros_like(p) for n, p in named.items()}
    layers = tuple(tuple(g) for _, g in itertools.groupby(named, lambda n: n.split(".")[0]))
    rest = {"momentum": dict.fromkeys(named, 0.0), "damping": dict.fromkeys(named, 0.0)}
    memory = {name: {} for name in named}
    return Step(
        gradient, direction(gradient), zero, rates, rates, layers=layers, memory=memory, **rest
    )


# %% tags=["hide-input"] fold="Checked: Theorem 11.2 on a trained network"
model = network()
train(model, torch.optim.Adam(model.parameters(), lr=0.02), batches(60))
X, y = images[1000:1050], labels[1000:1050]
Ms, damping, limit = {n: kfac(io) for n, io in layer_ios(model, loss, X, y).items()}, 1e-2, 1e-3
kfac_direction = preconditioner(model, {n: M.inverse(damping) for n, M in Ms.items()})
apply = preconditioner(model, Ms)


def lengths_squared(change: dict[str, Tensor]) -> tuple[float, float]:
    """In the metrics of M and of M with damping."""
    plain = sum((change[n] * v).sum().item() for n, v in apply(change).items())
    return plain, plain + damping * sum(v.square().sum().item() for v in change.values())


unclipped = a_step(model, X, y, kfac_direction)
clipped = kl_clip(limit)(unclipped)
undamped, damped = lengths_squared(clipped.change())
print(
    f"nu = {clipped.notes['nu']:.4f}; squared length {damped / limit:.12f} of the limit, ", end=""
)
print(f"without damping {undamped / limit:.3f}")
assert clipped.notes["nu"] < 1
assert abs(damped / limit - 1) < 1e-10
assert undamped < limit
assert kl_clip(1e9)(unclipped).change()["0.weight"].equal(unclipped.change()["0.weight"])

factored = preconditioner(model, {n: factored_inverse(M, damping) for n, M in Ms.items()})
assert lengths_squared(kl_clip(limit)(a_step(model, X, y, factored)).change())[1] < 0.99 * limit

# %% [markdown]
# The cell also checks that with factored damping the length stays below the limit. There the matrix that is inverted is
# larger than $M + \delta I$ ([Theorem 9.2]), so that $h^\top P$ is larger than the squared length. Now we compare the
# limit with the KL divergence itself, for steps with the exact GGN of all layers and with KFAC:


# %% tags=["hide-input"] fold="Measured: KL divergence of clipped steps"
def kl_after(change: dict[str, Tensor]) -> float:
    """KL divergence from the predictions before the change to those after, mean over the data."""
    moved = {n: p.detach() + change[n] for n, p in model.named_parameters()}
    before = model(X).log_softmax(1)
    after = torch.func.functional_call(model, moved, (X,)).log_softmax(1)
    return (before.exp() * (before - after)).sum(1).mean().item()


F = ggn(model, loss, X, y)


def newton_direction(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
    P = torch.linalg.solve(F + damping * eye_like(F), flatten_values(model, gradient))
    parts = P.split([g.numel() for g in gradient.values()])
    return {n: v.reshape(gradient[n].shape) for n, v in zip(gradient, parts, strict=True)}


for name, direction in {"exact": newton_direction, "KFAC": kfac_direction}.items():
    wrong = []
    for limit in (1e-2, 1e-4, 1e-6):
        change = kl_clip(limit)(a_step(model, X, y, direction)).change()
        flat = flatten_values(model, change)
        quadratic, true = (flat @ F @ flat / 2).item(), kl_after(change)
        wrong.append(abs(true / quadratic - 1))
        print(f"{name:5} half the limit {limit / 2:.0e}:", end=" ")
        print(f"KL {true:.2e}, to second order {quadratic:.2e}")
        assert quadratic < limit / 2 if name == "exact" else quadratic > limit
    assert wrong[2] < 0.05  # (11.8)
    assert name == "KFAC" or wrong[2] < wrong[0] / 5

# %% [markdown]
# With the exact GGN the quadratic [(11.8)] stays below half of the limit, and the KL divergence approaches the
# quadratic as the limit gets smaller. At the largest limit they differ. With KFAC the clip bounds the length by
# *KFAC's* matrix, and the predictions change several times as much as half the limit. To find the cause of the
# difference, we measure the same step with KFAC's blocks, with the exact blocks, and with the exact GGN of all layers:

# %% tags=["hide-input"] fold="Measured: the squared length of one step by three matrices"
change = kl_clip(1e-3)(a_step(model, X, y, kfac_direction)).change()
flat, places = flatten_values(model, change), block_index(model).values()
in_blocks = sum(
    flat[i.flatten()] @ F[i.reshape(-1, 1), i.flatten()] @ flat[i.flatten()] for i in places
)
seen = [lengths_squared(change)[0], in_blocks.item(), (flat @ F @ flat).item()]
print(
    "squared length over the limit: KFAC {:.2f}, exact blocks {:.2f}, all {:.2f}".format(
        *(length / 1e-3 for length in seen)
    )
)
assert 2 * seen[0] < seen[1] < seen[2]

# %% [markdown]
# Both approximations contribute: the product of averages within a layer, and the missing blocks between layers. The
# exact curvature along the step is larger than KFAC's. [Chapter 9](09_damping.py) gives the reason: a step is long in
# directions in which KFAC's curvature is small, and among these are the directions in which KFAC errs to the small
# side. So the limit $\kappa$ does not bound the KL divergence; it is a number to be tuned.
#
# The clip leaves out two parts of the change. *Momentum* is added afterwards: if successive steps agree,
# $\mu = 0.9$ makes the change up to ten times as long, a hundred times in squared length. *Weight decay* is added
# afterwards, too. Public implementations of the clip leave both out as well.
#
# ### The learning rate cancels
#
# While the clip is active, [(11.9)] says that $\nu \eta = \sqrt{\kappa / h^\top P}$. **The learning rate cancels.**
# This explains the equal columns in [Figure 11.1]. The cancellation is harmful if the learning rate has a schedule. A
# clip that uses the *current* rate undoes the schedule, and steps do not get shorter. The package uses the base rate in
# the clip, so that the schedule acts. We compare it with the other version:


# %%
def clip_with_current_rate(limit: float):
    return lambda step: kl_clip(limit)(replace(step, base_lr=step.lr))


# %% tags=["hide-input"] fold="Checked: equal weights for two learning rates; measured: two clips with a schedule"
def clipped_run(control, lr: float, steps: int, scheduled: bool = True) -> tuple[Module, list]:
    model, rows = network(), []
    options = {"momentum": 0.0, "damping": 1e-2, "fisher": type2, "record": rows.append}
    optimizer = KFAC(model, loss, lr=lr, **plain_rule | options | {"controls": [control]})
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    train(model, optimizer, batches(steps), cosine if scheduled else None)
    return model, rows


dead = [clipped_run(kl_clip(1e-4), lr, 12, scheduled=False) for lr in (0.3, 1.2)]
assert all(row["nu"] < 1 for _, rows in dead for row in rows)
for p, q in zip(*(model.parameters() for model, _ in dead), strict=True):
    assert (p - q).abs().max() < 1e-9  # four times the learning rate, the same weights

kinds = {"current rate in the clip": clip_with_current_rate, "base rate in the clip": kl_clip}
histories = {name: clipped_run(kind(1e-4), 1.0, 60)[1] for name, kind in kinds.items()}
falls = {}
for name, rows in histories.items():
    early, late = (statistics.median(r["kl"] for r in part) for part in (rows[:12], rows[42:54]))
    falls[name] = late / early
    print(f"{name:25} KL per step: {early:.1e} at first, {late:.1e} near the end")
assert falls["current rate in the clip"] > 0.5
assert falls["base rate in the clip"] < 0.1

# %% tags=["hide-input"] alt="Two plots against the step. Left, the KL divergence of each step on a logarithmic axis: with the current rate in the clip it stays level until the last steps; with the base rate in the clip it falls by orders of magnitude, as the cosine schedule says. Right, nu: below one throughout for the base rate, and for the current rate it rises to one only in the last steps." caption="A cosine schedule from 1 to 0, with both clips. Left: the KL divergence of each step, to second order. Right: $\\nu$. The clip that uses the current rate lengthens the steps that the schedule shortens, until it is no longer active."
fig, (left, right) = plt.subplots(1, 2, figsize=(7.8, 3.1), layout="constrained")
looks = {"current rate in the clip": ("C4", "--"), "base rate in the clip": ("C0", "-")}
for name, rows in histories.items():
    colour, style = looks[name]
    left.semilogy([max(row["kl"], 1e-8) for row in rows], style, color=colour)
    right.semilogy([row["nu"] for row in rows], style, color=colour)
    left.text(1, 1e-4 if "current" in name else 1e-7, name, color=colour)
left.set(xlabel="step", ylabel="KL of the step", ylim=(1e-8, 1e-3))
right.set(xlabel="step", ylabel=r"$\nu$")
plt.show()

# %% [markdown]
# So look at $\nu$, which the optimizer's argument `record` collects. If $\nu \lt 1$ in every step, the learning rate
# has no effect. Then tune $\kappa$, and give the clip the base rate if there is a schedule.
#
# ## A norm, and Adam's norm
#
# **`norm_constraint`** bounds the Euclidean length of the step by a number $c$:
# $\nu = \min(1, c / \lVert \eta P \rVert)$. This bound holds for every $P$.
#
# **`graft`** takes the length of each layer's step from Adam and the direction from KFAC. With Adam's step $u_l$ (at
# learning rate 1) for layer $l$,
#
# $$
# P_l \leftarrow \frac{\lVert u_l \rVert}{\lVert P_l \rVert}\, P_l .
# \tag{11.10}
# $$
#
# Learning rates that are usual for Adam then suit KFAC, too. The scale of each layer's matrix cancels: $B \otimes A$
# and $5 (B \otimes A)$ give the same step if the damping is multiplied by 5, too.

# %% tags=["remove-input"]
code(_norm_constrained, _grafted)

# %% tags=["hide-input"] fold="Checked: Adam's length, KFAC's direction, no scale, and the norm's limit"
grafted = graft()(unclipped)
copy = network()
copy.load_state_dict(model.state_dict())
adam = torch.optim.Adam(copy.parameters(), lr=1.0)
loss(copy(X), y).backward()
adam.step()
for layer in ("0", "2", "4"):
    names = f"{layer}.weight", f"{layer}.bias"
    moved = [(copy.get_parameter(n) - model.get_parameter(n)).flatten() for n in names]
    mine_ = torch.cat([grafted.direction[n].flatten() for n in names])
    kfac_ = torch.cat([unclipped.direction[n].flatten() for n in names])
    assert_exact(mine_.norm(), torch.cat(moved).norm())
    assert_exact(mine_ / mine_.norm(), kfac_ / kfac_.norm())

fivefold = {n: Kronecker(M.A, 5 * M.B).inverse(5 * damping) for n, M in Ms.items()}
other = a_step(model, X, y, preconditioner(model, fivefold))
assert_exact(graft()(other).direction["2.weight"], grafted.direction["2.weight"])
assert not torch.allclose(other.direction["2.weight"], unclipped.direction["2.weight"])

short = norm_constraint(0.1)(unclipped).change()
assert abs(torch.cat([v.flatten() for v in short.values()]).norm().item() - 0.1) < 1e-10

# %% [markdown]
# Grafting discards the length that the curvature gives. For a linear regression KFAC is the exact Hessian
# ([Chapter 5](05_kfac.py)), so that one step with $\eta = 1$ and without damping ends at the minimum. A first grafted
# step has the same direction but Adam's length, and many steps are needed.

# %% tags=["hide-input"] fold="Measured: a linear regression without control and with graft"
squared, inputs = MSELoss(), torch.randn(40, 6)
targets = inputs @ torch.randn(6, 3) + 0.3 * torch.randn(40, 3)
best = (inputs @ torch.linalg.lstsq(inputs, targets).solution - targets).square().mean().item()
plain = plain_rule | {"lr": 1.0, "momentum": 0.0, "damping": 0.0, "fisher": type2}
grafting = plain | {"controls": [graft()], "lr": 0.1}


def regress(options: dict, steps: int) -> float:
    """How far above the minimum the loss is after some steps."""
    torch.manual_seed(0)
    linear = Sequential(Linear(6, 3, bias=False))
    optimizer = KFAC(linear, squared, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        squared(linear(inputs), targets).backward()
        optimizer.observe(inputs, targets)
        optimizer.step()
    return squared(linear(inputs), targets).item() - best


print(f"no control: {regress(plain, 1):.1e} above the minimum after 1 step")
print(f"graft: {regress(grafting, 1):.2f} after 1 step, {regress(grafting, 5):.2f} after 5")
assert regress(plain, 1) < 1e-12
assert regress(grafting, 5) > 1e-2

# %% [markdown]
# ### Several controls
#
# `controls=[graft(), norm_constraint(0.1)]` first grafts and then limits. The order matters: in the other order, graft
# would replace the limited length. A KL clip behind a graft has another problem. Graft has multiplied each layer by a
# number of its own, so that $P$ is no longer $(M + \delta I)^{-1} h$, the sum in [(11.9)] is no longer a squared
# length, and [Theorem 11.2] does not apply. The clip still shortens long steps, but not to the limit that it was given.
# So use `norm_constraint` behind a graft.

# %% tags=["hide-input"] fold="Checked: a norm's limit behind a graft holds, a KL clip's does not"
both, limit = graft()(unclipped), 1e-3
meaningful = norm_constraint(0.1)(both).change()
assert abs(torch.cat([v.flatten() for v in meaningful.values()]).norm().item() - 0.1) < 1e-10
forgotten = graft()(replace(norm_constraint(0.1)(unclipped), memory={n: {} for n in both.memory}))
assert_exact(forgotten.direction["0.weight"], both.direction["0.weight"])
behind = kl_clip(limit)(both)
assert behind.notes["nu"] < 1
ratio = lengths_squared(behind.change())[1] / limit
print(f"a KL clip behind a graft: squared length {ratio:.2f} of the limit")
assert abs(ratio - 1) > 0.05

# %% [markdown]
# ## In one minute
#
# - **One loop.** For every layer the optimizer averages a matrix, inverts it with damping, and multiplies the gradient:
#   [(11.1)]. It observes batches with vectors of its own, every few steps.
# - **Averages.** With the weight $w_t = (1 - \rho) / (1 - \rho^t)$ of the newest matrix, the average is right from the
#   first batch on, without a start value ([Theorem 11.1]). Here the decay $\rho$ belongs to the *old* matrix.
# - **No start at the identity.** A start at $I$ acts as a factored damping $\gamma_t^2$ that decays with $t$, [(11.6)].
# - **Length.** Damping and learning rate both change the length of a step. A control bounds or sets it by one measure:
#   the change of the predictions (KL clip), the norm, or Adam's length (graft).
# - **Check $\nu$.** While a KL clip is active, the learning rate cancels.
#
# [Chapter 12](12_quadratic_model.py) chooses the length by the exact curvature of the batch.
# [Chapter 13](13_in_practice.py) is about the finished optimizer: results, use, defaults and mistakes.
#
# ## Exercises
#
# **Exercise 11.1.** Write the step yourself. Fill in `my_step`, without `preconditioner` and without
# `Kronecker.inverse`: the update [(11.1)] for one layer with weight $W$ and bias $b$, with factors $A$ and $B$,
# exact damping, and $\nu = 1$. Then call `check_step(my_step)`. It trains a network with your step and compares
# every parameter with the shipped optimizer.

# %%
State = tuple[Tensor, Tensor, Tensor] | None  # A, B and the previous change of a layer


def my_step(G: Tensor, io: LayerIO, state: State, count: int) -> tuple[Tensor, State]:
    """The change of the matrix `[W, b]` of shape `[d_out, d_in + 1]`, and the next state.

    `G` is its gradient; `io.a` of shape `[N, 1, d_in + 1]` are inputs, `io.g` of shape
    `[V, N, 1, d_out]` are vectors, and `count` is the number of batches so far, with this one.
    Learning rate .1, momentum .9, decay .95, damping .1.
    """
    raise NotImplementedError


# %% tags=["hide-input"] fold="The function check_step"
def check_step(step) -> None:
    """Five steps with `step` and with `KFAC`: the same parameters."""
    mine, theirs = network(), network()
    options = plain_rule | {"lr": 0.1, "damping": 0.1, "factor_every": 1, "inverse_every": 1}
    optimizer = KFAC(theirs, loss, fisher=type2, **options)
    train(theirs, optimizer, batches(5))
    states = dict.fromkeys(("0", "2", "4"))
    for count, (X, y) in enumerate(batches(5), start=1):
        loss(mine(X), y).backward()
        for name, io in layer_ios(mine, loss, X, y).items():
            layer = mine.get_submodule(name)
            G = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            change, states[name] = step(G, io, states[name], count)
            layer.weight.data += change[:, :-1]
            layer.bias.data += change[:, -1]
        mine.zero_grad()
    for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert_exact(p.data, q.data)


# %% [markdown]
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The inverse with exact damping divides by $\lambda_i \lambda_o + \delta$ in the eigenbases of both factors
# ([Chapter 9](09_damping.py)). The cell that checks all solutions runs this code.
#
# ```
# def solution(G, io, state, count):
#     a, g = io.a[:, 0], io.g[:, :, 0]
#     A, B = a.T @ a / len(a), torch.einsum("vni,vnj->ij", g, g)
#     previous = torch.zeros_like(G)
#     if state is not None:
#         old_A, old_B, previous = state
#         w = (1 - 0.95) / (1 - 0.95**count)
#         A, B = (1 - w) * old_A + w * A, (1 - w) * old_B + w * B
#     (la, Qa), (lb, Qb) = torch.linalg.eigh(A), torch.linalg.eigh(B)
#     P = Qb @ (Qb.T @ G @ Qa / (torch.outer(lb, la) + 0.1)) @ Qa.T
#     change = 0.9 * previous - 0.1 * P
#     return change, (A, B, change)
# ```
#
# </details>
#
# **Exercise 11.2.** [Martens and Grosse (2015)](bibliography.md#kfac) use the decay
# $\rho_t = \min(1 - 1/t, \rho)$ in $M_t = \rho_t M_{t-1} + (1 - \rho_t) \hat M_t$. What is $M_t$
# as long as $t \le 1 / (1 - \rho)$? Is it [(11.2)]?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With $\rho_t = 1 - 1/t$, $t M_t = (t - 1) M_{t-1} + \hat M_t$, so $t M_t$ is the sum of all $\hat M_i$ and $M_t$ their
# plain mean. It is not [(11.2)], whose weights decay from the first batch on, and which is the plain mean only for
# $\rho = 1$. From $t = 1 / (1 - \rho)$ on, the weights of old batches decay at the same rate in both.
#
# </details>
#
# **Exercise 11.3.** Multiply the loss by $c$. How must damping, learning rate and the limit of the
# KL clip change, so that all steps stay the same? And with graft?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Gradient and curvature are multiplied by $c$. With the damping $c\, \delta$, $P$ stays the same, by [(9.11)]. So
# the learning rate stays, too; but $h^\top P$ in [(11.9)] is multiplied by $c$, and the limit must be $c\, \kappa$.
# With graft only the damping changes, because Adam's step does not depend on the scale of the loss (up to its
# $\epsilon$).
#
# </details>
#
# **Exercise 11.4.** An average with decay $\rho$ is updated every $T$ steps. What decay gives the same effective
# memory in steps with an update in every step? Compute it for $\rho = 0.95$ and $T = 10$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# After $T$ steps the weight of the old matrices must be multiplied by $\rho$ in both cases, so that the decay per step
# is $\rho^{1/T} = 0.95^{0.1} = 0.9949$. By [(11.4)] this average has ten times as many batches in it.
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(G: Tensor, io: LayerIO, state: State, count: int) -> tuple[Tensor, State]:  # 11.1
    a, g = io.a[:, 0], io.g[:, :, 0]
    A, B = a.T @ a / len(a), torch.einsum("vni,vnj->ij", g, g)
    previous = torch.zeros_like(G)
    if state is not None:
        old_A, old_B, previous = state
        w = (1 - 0.95) / (1 - 0.95**count)
        A, B = (1 - w) * old_A + w * A, (1 - w) * old_B + w * B
    (la, Qa), (lb, Qb) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    P = Qb @ (Qb.T @ G @ Qa / (torch.outer(lb, la) + 0.1)) @ Qa.T
    change = 0.9 * previous - 0.1 * P
    return change, (A, B, change)


check_step(solution)
try:  # the checker sees a wrong weight of the newest matrix
    check_step(lambda G, io, state, count: solution(G, io, state, count + 1))
except AssertionError:
    print("11.1: the solution takes KFAC's steps, and a wrong weight is found")
else:
    raise AssertionError("check_step finds nothing")

As = [kfac(io).A for io in stream[:30]]  # 11.2
theirs_A = torch.zeros_like(As[0])
for t, new in enumerate(As, start=1):
    rho = min(1 - 1 / t, 0.95)
    theirs_A = rho * theirs_A + (1 - rho) * new
    if t <= 20:
        assert_exact(theirs_A, torch.stack(As[:t]).mean(0))
    if t == 10:
        assert not torch.allclose(
            theirs_A, estimate(MovingAverage(kfac), stream[:10], 0.95).A, rtol=1e-3
        )


def scaled_run(c: float, limit: float | None) -> Tensor:  # 11.3
    model = network()
    chosen = [graft(eps=1e-30)] if limit is None else [kl_clip(limit)]
    options = plain_rule | {"lr": 0.1, "damping": 1e-2 * c, "controls": chosen}
    optimizer = KFAC(model, loss, fisher=lambda *batch: c**0.5 * type2(*batch)[:], **options)
    for X, y in batches(5):
        optimizer.zero_grad()
        (c * loss(model(X), y)).backward()
        optimizer.observe(X, y)
        optimizer.step()
    return parameter_vector(model)


assert_exact(scaled_run(7.0, 7e-4), scaled_run(1.0, 1e-4))
assert not torch.allclose(scaled_run(7.0, 1e-4), scaled_run(1.0, 1e-4), rtol=0.01)
assert_exact(scaled_run(7.0, None), scaled_run(1.0, None))

per_step = 0.95 ** (1 / 10)  # 11.4
ratio = (1 + per_step) / (1 - per_step) / ((1 + 0.95) / (1 - 0.95))
print(f"11.4: decay {per_step:.4f}, {ratio:.1f} times as many batches")
assert abs(per_step - 0.9949) < 5e-5
assert abs(ratio - 10) < 0.1

# %% [markdown]
# ## Further reading
#
# [Martens and Grosse (2015)](bibliography.md#kfac), section 5, average the factors.
# [Ba, Grosse and Martens (2017)](bibliography.md#kl-clip) scale steps by their KL divergence;
# [Agarwal et al. (2020)](bibliography.md#grafting) study grafting;
# [Kingma and Ba (2015)](bibliography.md#adam) have the bias correction and the norm that graft uses.
# [Benzing (2022)](bibliography.md#foof) asks whether KFAC works for the reasons that are usually given.
