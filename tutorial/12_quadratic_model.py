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
# # 12. The quadratic model: lengths from exact curvature
#
# **Part IV: Training.** How long should a step be, and how much of the previous step should it keep, by the exact
# curvature of the batch?
#
# For a *direction* the exact curvature of all layers is too expensive, and KFAC uses blocks instead. The *length* along
# a given direction is a single number, and for it the exact curvature is affordable. [Figure 12.1] shows runs with such
# lengths on a loss where two layers interact.

# %% tags=["hide-input"]
import math
import statistics
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Module, MSELoss, Sequential, Tanh
from torch.nn.utils import vector_to_parameters

from kfac_scratch.checks import assert_exact, set_up
from kfac_scratch.curvature import flatten_values, ggn, ggn_gram, parameter_vector
from kfac_scratch.linalg import eye_like
from kfac_scratch.losses import type2
from kfac_scratch.matrices.damping import levenberg_marquardt, reduction_ratio
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.quadratic_model import _minimised, quadratic_model, ratio_after_step
from kfac_scratch.optimizer.step_control import Step, dot, graft
from kfac_scratch.show import code

set_up()  # seed 0, float64, the GPU where there is one
squared = MSELoss()
plain_rule: dict[str, Any] = {"controls": [], "invert": exact_inverse, "momentum": 0.9}
plain_rule |= {"damping": 1e-3, "decay": 0.95, "factor_every": 10, "inverse_every": 10}
exact = plain_rule | {"lr": 1.0, "momentum": 0.0, "fisher": type2, "decay": 0.0}
exact |= {"factor_every": 1, "inverse_every": 1}


def net(*values: float, layers: int) -> Sequential:
    """One layer with two inputs, or two layers with one weight each."""
    one = [Linear(2, 1, bias=False)]
    two = [Linear(1, 1, bias=False), Tanh(), Linear(1, 1, bias=False)]
    model = Sequential(*(one if layers == 1 else two))
    vector_to_parameters(torch.tensor(values), model.parameters())
    return model


def path(model: Module, make, X: Tensor, y: Tensor, steps: int) -> tuple[Tensor, float]:
    """All points of a run, and the last loss."""
    optimizer, points = make(model), [parameter_vector(model)]
    for _ in range(steps):
        optimizer.zero_grad()
        squared(model(X), y).backward()
        if isinstance(optimizer, KFAC):
            optimizer.observe(X, y)
        optimizer.step()
        points.append(parameter_vector(model))
    return torch.stack(points), squared(model(X), y).item()


def first_order(make_net, X: Tensor, y: Tensor, steps: int) -> dict[str, tuple[Tensor, float]]:
    """SGD, momentum and Adam, each with the best of three learning rates."""
    rules = {
        "SGD": lambda r: lambda m: torch.optim.SGD(m.parameters(), r),
        "momentum": lambda r: lambda m: torch.optim.SGD(m.parameters(), r / 3, momentum=0.9),
        "Adam": lambda r: lambda m: torch.optim.Adam(m.parameters(), r),
    }
    rates = (0.05, 0.2, 0.4)
    every = {
        k: [path(make_net(), rule(r), X, y, steps) for r in rates] for k, rule in rules.items()
    }
    return {k: min(found, key=lambda p: p[1]) for k, found in every.items()}


def adapt(damping: float, ratio: float | None) -> float:
    return levenberg_marquardt(damping, ratio, factor=0.5)


def damped_ggn(model: Module, X: Tensor, y: Tensor, steps: int, damping: float = 0.1):
    """All points of a run with the exact damped GGN (chapter 9), and the last loss."""
    points = [parameter_vector(model)]
    for _ in range(steps):
        value = squared(model(X), y)
        h = torch.cat([v.flatten() for v in torch.autograd.grad(value, list(model.parameters()))])
        G = ggn(model, squared, X, y)
        s = -torch.linalg.solve(G + damping * eye_like(G), h)
        vector_to_parameters(points[-1] + s, model.parameters())
        points.append(points[-1] + s)
        after, predicted = squared(model(X), y).item(), (h @ s + s @ G @ s / 2).item()
        damping = adapt(damping, reduction_ratio(value.item(), after, predicted))
    return torch.stack(points), squared(model(X), y).item()


# %% tags=["hide-input"]
x = torch.linspace(-2, 2, 41)[:, None]
bent = (lambda: net(0.3, 2.5, layers=2)), x, (2 * x).tanh() + 0.1 * (5 * x).sin()
common = torch.randn(60, 1)
alike = torch.cat([common, common + 0.15 * torch.randn(60, 1)], dim=1)
straight = (lambda: net(2.0, 1.5, layers=1)), alike, alike @ torch.tensor([[-1.0], [2.0]])

adapted = exact | {"damping": 0.1, "adapt_damping": adapt, "adapt_every": 1}
by_model = adapted | {"controls": [quadratic_model()]}
left_paths, right_paths = first_order(*straight, steps=30), first_order(*bent, steps=30)
left_paths["KFAC"] = path(
    straight[0](), lambda m: KFAC(m, squared, **exact | {"damping": 0.0}), *straight[1:], 1
)
for name, options in {"KFAC": adapted, "KFAC, quadratic model": by_model}.items():
    right_paths[name] = path(bent[0](), lambda m, o=options: KFAC(m, squared, **o), *bent[1:], 30)
right_paths["exact GGN"] = damped_ggn(bent[0](), *bent[1:], 30)

# %% tags=["hide-input"] alt="Two contour plots with paths. Left, a narrow straight valley: SGD, momentum and Adam drop across it, swing, and move along its floor only a little, while KFAC goes to the minimum in one step. Right, a bent valley along a hyperbola: SGD zigzags, momentum and KFAC creep along near the start, Adam follows the bend in wide swings, and KFAC with the quadratic model and the exact GGN go around the bend to the minimum in a few steps." caption="Thirty steps on two landscapes (contours of the logarithm of the loss). Left: one layer with two inputs that are nearly equal. KFAC has the exact Hessian, and one step is enough. Right: $f(x) = w_2 \\tanh(w_1 x)$, where both layers change together along the valley. KFAC's blocks do not contain the curvature between layers, and KFAC stays near the start; with the quadratic model it reaches the minimum."
ink = plt.rcParams["text.color"]
looks = {
    "SGD": {"color": "C2", "marker": "x"},
    "momentum": {"color": "C2", "marker": "+", "linestyle": ":"},
    "Adam": {"color": "C1", "marker": "s", "markersize": 3},
    "KFAC": {"color": "C0", "marker": "o", "markersize": 4},
    "KFAC, quadratic model": {"color": "C0", "marker": "*", "linestyle": "--", "markersize": 8},
    "exact GGN": {"color": ink, "marker": "o", "markerfacecolor": "none", "markersize": 7},
}
places = {
    "left": {
        "SGD": (-0.75, -0.6),
        "momentum": (-0.75, 0.7),
        "Adam": (1.5, 0.75),
        "KFAC": (-1.45, 1.7),
    },
    "right": {
        "SGD": (0.95, 2.45),
        "momentum": (-0.28, 1.4),
        "Adam": (1.45, 1.3),
        "KFAC": (0.62, 1.75),
        "KFAC, quadratic model": (0.5, 0.3),
        "exact GGN": (2.0, 1.2),
    },
}
fig, axes = plt.subplots(1, 2, figsize=(7.8, 4.0), layout="constrained")
areas = (-1.6, 2.8, -0.9, 2.5), (-0.3, 3.0, -0.2, 3.0)
for ax, (_, X, y), paths, area, labels_at in zip(
    axes, (straight, bent), (left_paths, right_paths), areas, places.values(), strict=True
):
    u, v = torch.linspace(*area[:2], 90), torch.linspace(*area[2:], 90)
    a, b = u[None, :, None], v[:, None, None]
    f = a * X[:, 0] + b * X[:, 1] if ax is axes[0] else b * (a * X[:, 0]).tanh()
    height = (f - y[:, 0]).square().mean(-1).log()
    ax.contour(u.cpu(), v.cpu(), height.cpu(), 14, linewidths=0.5, alpha=0.6, cmap="viridis")
    for name, (points, _) in paths.items():
        ax.plot(*points.T.cpu(), linewidth=1.2, **looks[name])
        ax.text(
            *labels_at[name], name.replace(", ", ",\n"), color=looks[name]["color"], weight="bold"
        )
    ax.set(xlim=area[:2], ylim=area[2:], xlabel=r"$w_1$", ylabel=r"$w_2$")
axes[0].set_title("one layer, two inputs")
axes[1].set_title("two layers, one weight each")
plt.show()

# %% [markdown]
# The **quadratic model** of the loss around the present parameters is
#
# $$
# m(\Delta) = h^\top \Delta + \tfrac12 \Delta^\top (C + \delta I)\, \Delta ,
# \qquad \Delta = -\eta P + \mu \Delta_0 ,
# \tag{12.1}
# $$
#
# with the gradient $h$, the exact GGN $C$ of *all* layers on the batch, the damping $\delta$, KFAC's direction $-P$,
# where $P$ is the gradient times KFAC's damped inverse, and the previous change of the parameters $\Delta_0$. The
# learning rate $\eta$ and the momentum $\mu$ are the two numbers that minimise $m$.
#
# After this chapter you will be able to
#
# - compute learning rate and momentum from two forward derivatives, so that neither is tuned;
# - say why these steps are the method of conjugate gradients on a quadratic loss;
# - adapt the damping by the same model, and read from a run when curvature matrices should be renewed.
#
# ## The minimum over two directions
#
# Let $\tilde C = C + \delta I$ and $U = [-P, \Delta_0]$, a matrix with two columns, so that
# $\Delta = U (\eta, \mu)^\top$. Then
#
# $$
# m = (U^\top h)^\top \begin{bmatrix} \eta \\ \mu \end{bmatrix}
# + \tfrac12 \begin{bmatrix} \eta \\ \mu \end{bmatrix}^{\!\top}
# U^\top \tilde C\, U \begin{bmatrix} \eta \\ \mu \end{bmatrix} ,
# $$
#
# a quadratic in two variables. Its gradient vanishes at
#
# $$
# \begin{bmatrix} \eta \\ \mu \end{bmatrix}
# = - \begin{bmatrix}
# P^\top \tilde C P & -P^\top \tilde C \Delta_0 \\
# -P^\top \tilde C \Delta_0 & \Delta_0^\top \tilde C \Delta_0
# \end{bmatrix}^{-1}
# \begin{bmatrix} -h^\top P \\ h^\top \Delta_0 \end{bmatrix} ,
# \tag{12.2}
# $$
#
# where the model's value is $\tfrac12 h^\top \Delta$. The entries of the matrix need no product of $C$ with a vector.
# Since $C = \sum_n J_n^\top H_n J_n$, we have $u^\top C w = \sum_n (J_n u)^\top H_n (J_n w)$, and $J_n u$ is one
# forward derivative. So learning rate and momentum together cost two forward derivatives. In the code, `ggn_gram`
# computes $U^\top C\, U$ in this way, and a pseudo-inverse is used because the matrix is singular in the first step,
# where $\Delta_0 = 0$.

# %% tags=["remove-input"]
code(quadratic_model, _minimised)

# %% [markdown]
# ### On a quadratic loss: conjugate gradients
#
# <div class="admonition theorem" markdown="1" id="thm-12.1">
# <p class="admonition-title" markdown="1"><b>Theorem 12.1 (conjugate gradients)</b></p>
#
# Let the loss be a quadratic function with a positive definite matrix $C$ and let $\delta = 0$. Let the
# preconditioner $Q$ in $P = Q h$ be fixed and positive definite. Then the steps of [(12.2)] are
# those of the conjugate gradient method with the preconditioner $Q$. They end at the minimum after
# at most as many steps as there are parameters.
#
# </div>
#
# **Proof.** Step $t$ of the conjugate gradient method goes along $d_t = -P_t + \beta_t d_{t-1}$, where $d_{t-1}$ is a
# multiple of the method's previous change $\Delta_{t-1}$. So the next change of the method lies in the plane of $P_t$
# and $\Delta_{t-1}$. The method is known to reach the minimum over *all* points
# $\theta_0 + \operatorname{span}(P_1, \dots, P_t)$. This set contains the plane through the present point, so that the
# method reaches the minimum over this plane, too. [(12.2)] computes the same minimum. By induction both are at the same
# point, with the same previous change. $\blacksquare$
#
# The optimizer satisfies the premise if its preconditioner is fixed. `invert` is a function that we can pass, so we
# pass one that ignores the curvature. Beside it runs the textbook's method of conjugate gradients:

# %%
R = torch.randn(12, 12)
Q = R @ R.T / 12 + 0.3 * torch.eye(12)  # any positive definite matrix
X, y = torch.randn(30, 4), torch.randn(30, 3)
linear = Sequential(Linear(4, 3, bias=False))
C = ggn(linear, squared, X, y)  # [12, 12], the same everywhere
options = plain_rule | {"controls": [quadratic_model()], "damping": 0.0, "fisher": type2}
optimizer = KFAC(linear, squared, **options | {"invert": lambda M, damping: Dense(Q)})

theta = parameter_vector(linear)
r = torch.autograd.grad(squared(linear(X), y), linear[0].weight)[0].flatten()
d, rz = torch.zeros(12), torch.ones(())
for k in range(12):
    z = Q @ r  # one step of conjugate gradients
    rz, rz_before = r @ z, rz
    d = -z + rz / rz_before * d if k else -z
    alpha = rz / (d @ C @ d)
    theta, r = theta + alpha * d, r + alpha * C @ d

    optimizer.zero_grad()  # one step of the optimizer
    squared(linear(X), y).backward()
    optimizer.observe(X, y)
    optimizer.step()
    assert (parameter_vector(linear) - theta).norm() < 1e-7 * theta.norm()
minimum = torch.linalg.lstsq(X, y).solution.T
print(f"distance to the minimum: {(linear[0].weight - minimum).norm().item():.1e}")
assert (linear[0].weight - minimum).norm() < 1e-7

# %% [markdown]
# ### On a network
#
# The classical test of KFAC is an autoencoder, a network that reproduces its input through a narrow layer. We
# compare on one batch of 400 digits. Adam has the best of three learning rates. KFAC with fixed rates has the best
# of eight settings. KFAC with the quadratic model has no learning rate and no momentum to be tuned, and its damping
# starts from a guess.
#
# The damping is adapted by the rule of Levenberg and Marquardt ([Chapter 9](09_damping.py)), which is passed as
# `adapt_damping`. The rule compares the change of the loss with the change that the model predicted, [(9.13)]. The
# ratio is measured on the batch of the step, with the exact GGN and without damping:

# %% tags=["remove-input"]
code(ratio_after_step)

# %% [markdown]
# `record` is called after every step with a dictionary of numbers. A *control* is a function that gets a `Step`,
# which holds direction, rates and damping, and returns a changed one. The control `probe` changes nothing: it
# measures the curvature along the direction. We put it in front of the quadratic model.

# %%
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
pixels = images[:400]


def autoencoder() -> Sequential:
    torch.manual_seed(0)
    encoder = Linear(64, 30), Tanh(), Linear(30, 6)
    return Sequential(*encoder, Linear(6, 30), Tanh(), Linear(30, 64))


def reconstruct(make, steps: int = 40) -> list[float]:
    """Squared error per image before every step, and after the last."""
    model, errors = autoencoder(), []
    optimizer = make(model)
    for _ in range(steps):

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = squared(model(pixels), pixels)
            value.backward()
            return value

        if isinstance(optimizer, KFAC):
            optimizer.observe(pixels, pixels)
        errors.append(64 * optimizer.step(closure).item())
    return [*errors, 64 * squared(model(pixels), pixels).item()]


def probe(step: Step) -> Step:
    """A control that only looks: curvature along P by KFAC, by exact blocks, and by everything."""
    layers = [{name: step.direction[name] for name in names} for names in step.layers]
    ((_, batch),) = step.batches
    rows = torch.stack([flatten_values(batch.model, values) for values in layers])
    gram = ggn_gram(*batch, rows)
    (damping,) = set(step.damping.values())
    damped = dot(step.direction, step.gradient)  # P^T (M + damping I) P, if the inverse is fresh
    by_kfac = damped - damping * dot(step.direction, step.direction)
    curvatures.append((by_kfac, gram.trace().item(), gram.sum().item()))
    return step


# %% tags=["hide-input"] fold="Measured: the autoencoder by three methods"
history: list[dict[str, float]] = []
curvatures: list[tuple[float, float, float]] = []
often = plain_rule | {"factor_every": 5, "inverse_every": 5}
model_options = {"controls": [probe, quadratic_model()], "adapt_damping": levenberg_marquardt}
model_options |= {"damping": 1e-2, "record": history.append}
runs = {"quadratic model": reconstruct(lambda m: KFAC(m, squared, **often | model_options))}
runs["Adam"] = min(
    (reconstruct(lambda m, r=r: torch.optim.Adam(m.parameters(), r)) for r in (0.01, 0.03, 0.1)),
    key=lambda errors: errors[-1],
)
fixed = [
    {"lr": r, "damping": d, "momentum": p}
    for r in (0.03, 0.3)
    for d in (1e-3, 1e-1)
    for p in (0.0, 0.9)
]
tried = [reconstruct(lambda m, o=o: KFAC(m, squared, **often | o)) for o in fixed]
runs["fixed rates"] = min(tried, key=lambda errors: errors[-1])

for name, errors in runs.items():
    print(f"{name:16} error {errors[0]:.1f} -> {errors[-1]:.2f}")
diverged = sum(errors[-1] > errors[0] for errors in tried)
print(f"fixed rates: {diverged} of {len(tried)} settings end above the start")
assert runs["quadratic model"][-1] < 0.8 * min(runs["Adam"][-1], runs["fixed rates"][-1])

# %% tags=["hide-input"] alt="Six small plots against the step: the error of the three methods, of which the quadratic model falls fastest; its learning rate, which stays below one half and has teeth of five steps; its momentum, which begins at zero, swings, and then stays below one; the damping, which falls every five steps by more than an order of magnitude in all; the reduction ratio at every fifth step, above three quarters; and the KL divergence and the norm of the steps." caption="The autoencoder, and what `record=` collected with the quadratic model (dashed). Learning rate and momentum come from [(12.2)]. The damping falls at every fifth step, because the reduction ratio is above $\\tfrac34$ (dotted)."
fig, axes = plt.subplots(2, 3, figsize=(7.8, 5.0), layout="constrained")
styles = {"quadratic model": ("C0", "--"), "Adam": ("C1", "-"), "fixed rates": ("C0", "-")}
heights = {"quadratic model": 0.75, "Adam": 1.3, "fixed rates": 0.8}
for name, errors in runs.items():
    colour, style = styles[name]
    axes[0, 0].semilogy(errors, style, color=colour)
    label = name.removesuffix(" rates").removeprefix("quadratic ")
    axes[0, 0].text(42, heights[name] * errors[-1], label, color=colour, va="center")
axes[0, 0].set(title="error per image", xlim=(-2, 72), ylim=(0.8, 40))
for ax, key in zip(
    (axes[0, 1], axes[0, 2], axes[1, 0]), ("model_lr", "model_momentum", "damping"), strict=True
):
    ax.plot([row[key] for row in history], "--", color="C0")
    ax.set_title(key.removeprefix("model_").replace("lr", "learning rate"))
axes[0, 1].set_yscale("log")
axes[1, 0].set_yscale("log")
ratios = [(row["step"], row["ratio"]) for row in history if "ratio" in row]
axes[1, 1].plot(*zip(*ratios, strict=True), "o", markersize=4, color="C0")
axes[1, 1].axhline(0.75, linestyle=":", color=axes[1, 1].xaxis.label.get_color(), linewidth=1)
axes[1, 1].set(title="reduction ratio", ylim=(0, 1.6))
for key, style, label in (("step_norm", "--", "norm"), ("kl", ":", "KL")):
    values = [row[key] for row in history]
    axes[1, 2].semilogy(values, style, color="C0")
    axes[1, 2].text(len(values) + 1, values[-1], label, color="C0")
axes[1, 2].set(title="steps", xlim=(-2, 52))
for ax in axes[1]:
    ax.set_xlabel("step")
plt.show()

# %% tags=["hide-input"] fold="Measured: learning rates, and curvature along the direction"
rates_ = [row["model_lr"] for row in history]
fresh, stale = statistics.median(rates_[10::5]), statistics.median(rates_[14::5])
print(
    f"learning rate: median {statistics.median(rates_):.2f}, right after new matrices {fresh:.2f},",
    end=" ",
)
print(f"four steps later {stale:.2f}")
blocks_, all_ = ([row[k] / row[0] for row in curvatures[10::5]] for k in (1, 2))
print("curvature along a fresh direction, over KFAC's: by exact blocks", end=" ")
print(f"{statistics.median(blocks_):.1f}, by all layers {statistics.median(all_):.1f}")
assert 0 < stale < fresh < 0.7
assert 1.5 < statistics.median(blocks_) < statistics.median(all_) / 1.5
assert history[-1]["damping"] < 0.1 * history[0]["damping"]

# %% [markdown]
# The learning rate is far below one in the whole run. Along KFAC's direction the exact curvature is several times
# KFAC's, because of the approximation within layers and because of the missing blocks between layers; $\eta$ corrects
# the common length. The momentum adds a second direction. The learning rate jumps every five steps, when matrices and
# inverses are renewed: with a fresh inverse the step is longer than with the same inverse four steps later.
#
# **Limits of the model.** The model's gradient and curvature are those of the *batch*. On a small batch the two numbers
# fit the noise of this batch, and the momentum continues a step that fitted the noise of another one. So use the model
# with large batches. The parameters of another optimizer, `rest=` in [Chapter 13](13_in_practice.py), are not in the
# model.
#
# ## Paths on a landscape
#
# The problems of [Figure 12.1] have two parameters, so that whole runs can be drawn. Its left problem is a linear
# regression with two inputs that are nearly equal; the Hessian is KFAC's $B \otimes A$. Its right problem has one
# weight in each of two layers. The loss hardly changes if one weight grows and the other shrinks, so that the valley
# is bent. KFAC treats each layer by itself: its matrix is diagonal, and the valley is *not* along an axis. The
# first-order methods have the best of three learning rates each.

# %% tags=["hide-input"] fold="Checked: the quadratic model ends with the loss of the exact GGN"
for title, paths in {"straight": left_paths, "bent": right_paths}.items():
    for name, (points, value) in paths.items():
        print(f"{title:8} {name:21} loss {value:.1e} after {len(points) - 1:2} steps")
assert left_paths["KFAC"][1] < 1e-20 < left_paths["Adam"][1]
floor = right_paths["exact GGN"][1]
assert right_paths["KFAC, quadratic model"][1] < 1.1 * floor
assert right_paths["KFAC"][1] > 5 * floor

# %% [markdown]
# With two parameters the plane of $P$ and $\Delta_0$ is the whole space, if they are not parallel. From the second step
# on, the quadratic model therefore computes the exact damped Gauss-Newton step at its point. Only its first step
# differs from a run with the exact GGN, and both runs end with nearly the same loss. In a real network the plane is two
# directions out of many. There, too, the model contains curvature between layers, which blocks do not.
#
# ## Spectra during training
#
# What a damping does depends on the eigenvalues that it is added to. How do these change in a run? We train a
# classifier on digits with a learning rate schedule and the control `graft`, which keeps KFAC's direction in every
# layer and gives it the length of Adam's step. We record the eigenvalues of both factors of the middle layer.
# `trusted` sums $\lambda / (\lambda + \delta)$ over the eigenvalues $\lambda$ of $B \otimes A$, the number of
# directions that the damping $\delta$ lets through.

# %%
loss = CrossEntropyLoss()
torch.manual_seed(0)
model = Sequential(Linear(64, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 10))
options = plain_rule | {"lr": 0.02, "controls": [graft()], "momentum": 0.5}
rows, spectra, losses = [], [], []
options |= {"factor_every": 2, "inverse_every": 4, "record": rows.append}
optimizer = KFAC(model, loss, **options)
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, 0.02, total_steps=100, cycle_momentum=False
)
for index in torch.randint(1000, (100, 100)):
    optimizer.zero_grad()
    value = loss(model(images[index]), labels[index])
    value.backward()
    optimizer.observe(images[index], labels[index])
    optimizer.step()
    schedule.step()
    losses.append(value.item())
    M = optimizer.matrices["2"]
    spectra.append((torch.linalg.eigvalsh(M.A), torch.linalg.eigvalsh(M.B)))
A_spectra, B_spectra = (torch.stack(s) for s in zip(*spectra, strict=True))
print(f"loss of a batch {losses[0]:.2f} -> {statistics.mean(losses[-10:]):.3f}")


def growth(s: Tensor, start: int, end: int) -> float:
    """The factor of the eigenvalue that changes most."""
    return (s[end] / s[start]).log().abs().max().exp().item()


def trusted(number: int) -> float:
    """Directions that damping lets through: the sum of the filter of chapter 9."""
    products = torch.outer(B_spectra[number], A_spectra[number])
    return (products / (products + 1e-3)).sum().item()


for name, s in {"A": A_spectra, "B": B_spectra}.items():
    early, late = growth(s, 0, 40), growth(s, 60, 99)
    print(f"{name}: an eigenvalue changes by up to a factor {early:.0f} in steps 0 to 40,", end=" ")
    print(f"and {late:.1f} in steps 60 to 99")
    assert early > 5 * late
    assert 0.7 < math.log10(early) / {"A": 1, "B": 3}[name] < 1.3  # orders of magnitude
print(
    f"of 272 directions, damping passes {trusted(0):.0f} at first, {trusted(40):.0f} after 40 steps"
)
assert trusted(40) > 1.5 * trusted(0)
assert B_spectra[0, 7] > 10 * B_spectra[0, 6]  # nine large eigenvalues: one less than classes

# %% tags=["hide-input"] alt="Three plots against the step, with logarithmic axes. Left, the 17 eigenvalues of A as lines: the largest stays near its value, and the others rise by about one order of magnitude within 40 steps and then hardly change. Middle, the 16 eigenvalues of B: nine are large from the start, and seven rise by three orders of magnitude within 40 steps and then stay. Right, the loss of the batches, the learning rate of the schedule, which rises and then falls, and the norm of the steps, which follows it." caption="Eigenvalues of both factors of the middle layer during training, and the run that they are from. Within 40 steps small eigenvalues of A grow by about one order of magnitude and those of B by about three; after that both hardly change."
fig, (left, middle, right) = plt.subplots(1, 3, figsize=(7.8, 3.1), layout="constrained")
left.semilogy(A_spectra.cpu(), color="C0", linewidth=0.9)
middle.semilogy(B_spectra.cpu(), color="C0", linewidth=0.9)
for values, colour, style, label in (
    (losses, "C0", "-", "loss"),
    ([row["lr"] for row in rows], "C4", "--", "rate"),
    ([row["step_norm"] for row in rows], "C3", ":", "norm of\nthe step"),
):
    right.semilogy(values, style, color=colour, linewidth=1.1)
    right.text(103, values[-1], label, color=colour, va="center")
left.set(title="eigenvalues of $A$", xlabel="step")
middle.set(title="eigenvalues of $B$", xlabel="step")
right.set(title="the run", xlabel="step", xlim=(-3, 150))
plt.show()

# %% [markdown]
# At first $B$ has nine large eigenvalues. The vectors of the loss have ten entries that sum to zero, so they lie in a
# space of nine dimensions, and units that are not yet saturated send them back by nearly the same linear map for
# every datum. Within a few dozen steps small eigenvalues grow, in $A$ by about one order of magnitude and in $B$ by
# about three, and afterwards they hardly change. So matrices should be renewed often at first and may be kept longer
# later, as [Chapter 14](14_ekfac.py) finds for bases. `factor_every` and `inverse_every` are attributes that a loop
# may change at any time. The effect of a constant damping changes when the eigenvalues do, because only its ratio to
# them counts ([Chapter 9](09_damping.py)).
#
# ## In one minute
#
# - **Two numbers from exact curvature.** Learning rate and momentum minimise the quadratic model of the batch in
#   the plane of KFAC's direction and the previous change, [(12.2)]. They cost two forward derivatives.
# - **Conjugate gradients.** On a quadratic loss with a fixed preconditioner the steps are those of conjugate
#   gradients ([Theorem 12.1]).
# - **Between layers.** The model contains the blocks between layers, and the parts of each block, that KFAC leaves out.
#   In the autoencoder the learning rate is well below one for this reason.
# - **Damping.** The rule of Levenberg and Marquardt compares the model's prediction with the change of the loss.
# - **When.** Use the model with large batches. Renew matrices often at first, when spectra change, and less often
#   later.
#
# ## Exercises
#
# **Exercise 12.1.** Write the control yourself. Fill in `my_rates`, then call `check_rates(my_rates)`, which
# compares your numbers with those of the package in four steps.


# %%
def my_rates(
    h: Tensor, P: Tensor, previous: Tensor, C: Tensor, damping: float
) -> tuple[float, float]:
    """Learning rate and momentum, from vectors of shape `[D]` and `C` of shape `[D, D]`.

    In the first step `previous` is zero.
    """
    raise NotImplementedError


# %% tags=["hide-input"] fold="check_rates, which compares your numbers with the package's"
inputs = torch.randn(40, 6)
targets = inputs @ torch.randn(6, 3) + 0.3 * torch.randn(40, 3)


def check_rates(rates) -> None:
    """Four steps on a regression: the numbers of `rates` and those of `quadratic_model`."""
    torch.manual_seed(1)
    model, found, recorded = Sequential(Linear(6, 4), Tanh(), Linear(4, 3)), [], []

    def look(step: Step) -> Step:
        flat = [flatten_values(model, v) for v in (step.gradient, step.direction, step.previous)]
        found.append(rates(*flat, ggn(model, squared, inputs, targets), 0.1))
        return step

    options = {"damping": 0.1, "controls": [look, quadratic_model()], "record": recorded.append}
    path(model, lambda m: KFAC(m, squared, **plain_rule | options), inputs, targets, 4)
    for mine, row in zip(found, recorded, strict=True):
        assert_exact(
            torch.tensor(mine), torch.tensor([row["model_lr"], row["model_momentum"]]), 1e-7
        )


# %% [markdown]
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# In the first step the second row of the matrix is zero. The pseudo-inverse then gives $\mu = 0$.
#
# ```
# def solution(h, P, previous, C, damping):
#     U = torch.stack([-P, previous], 1)
#     damped = U.T @ C @ U + damping * U.T @ U
#     lr, momentum = (-torch.linalg.pinv(damped, hermitian=True) @ U.T @ h).tolist()
#     return lr, momentum
# ```
#
# </details>
#
# **Exercise 12.2.** Let KFAC be exact, $M = C$, and take the first step with [(12.2)]. What is
# $\eta$? What is it for $M = 2 C$ and damping $2 \delta$ in the inverse?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $\Delta_0 = 0$ leaves $\eta = h^\top P / (P^\top \tilde C P)$. With $P = \tilde C^{-1} h$ numerator and denominator
# are the same and $\eta = 1$. With $2 \tilde C$ the direction is half as long,
# $P = \tfrac12 \tilde C^{-1} h$, and $\eta = 2$: the common scale of the preconditioner cancels.
#
# </details>
#
# **Exercise 12.3.** What is the reduction ratio of *any* step (with a prediction other than zero) if the loss is a
# quadratic function and $C$ its Hessian? What does the rule of Levenberg and Marquardt then do to the damping?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The prediction, which is made without damping, is the change of the loss. So the ratio is 1 in every step. It is above
# $\tfrac34$, and the damping falls in every adaptation.
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(h: Tensor, P: Tensor, previous: Tensor, C: Tensor, damping: float):  # 12.1
    U = torch.stack([-P, previous], 1)
    damped = U.T @ C @ U + damping * U.T @ U
    lr, momentum = (-torch.linalg.pinv(damped, hermitian=True) @ U.T @ h).tolist()
    return lr, momentum


check_rates(solution)
try:  # the checker sees a forgotten damping
    check_rates(lambda h, P, previous, C, damping: solution(h, P, previous, C, 0.0))
except AssertionError:
    print("12.1: the solution agrees with the package, and a forgotten damping is found")
else:
    raise AssertionError("check_rates finds nothing")

for factor in (1.0, 2.0):  # 12.2
    seen: list[dict[str, float]] = []
    options = {"controls": [quadratic_model()], "damping": 0.1, "fisher": type2}
    options |= {"record": seen.append, "adapt_damping": adapt, "adapt_every": 1}
    options["invert"] = lambda M, damping, c=factor: Kronecker(M.A, c * M.B).inverse(c * damping)
    path(Sequential(Linear(6, 3)), lambda m, o=options: KFAC(m, squared, **o), inputs, targets, 3)
    assert abs(seen[0]["model_lr"] - factor) < 1e-8
    assert all(abs(row["ratio"] - 1) < 1e-6 for row in seen)  # 12.3
    assert seen[0]["damping"] > seen[1]["damping"] > seen[2]["damping"]
print(
    f"12.2 and 12.3: learning rate {factor:.0f}, ratios", [round(row["ratio"], 6) for row in seen]
)

# %% [markdown]
# ## Further reading
#
# [Martens and Grosse (2015)](bibliography.md#kfac), sections 6 and 7: damping, and the quadratic model with its
# momentum. For conjugate gradients: Golub and Van Loan, *Matrix Computations*, chapter 11.
