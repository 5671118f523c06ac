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
# # 24. Large batches: who makes use of them?
#
# **Part V: Better and faster.** Twice the batch on twice the machines should take half the steps. Up to which
# batch size is that so, and does an optimizer that uses curvature move the limit?
#
# A larger batch has less noise in its gradient. While noise limits training, twice the batch halves the number of
# steps: **perfect scaling**. From a **critical batch size** on, the curvature limits training, and a larger batch does
# not change the curvature. An optimizer that divides by curvature should profit from larger batches. [Figure 24.1] shows
# this in the **noisy quadratic model**, where the mean square $v_i$ of coordinate $i$ obeys
#
# $$
# v_i \leftarrow (1 - \eta h_i^{1-q})^2 \, v_i + \eta^2 h_i^{-2q} c_i / B ,
# $$
#
# with the learning rate $\eta$, the curvature $h_i$, the variance $c_i$ of one sample's gradient and the batch size $B$.
# SGD has $q = 0$, the natural gradient $q = 1$.

# %%
import json
import math

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from kfac_scratch.checks import assert_exact, set_up
from kfac_scratch.show import RESULTS, Markdown, style

set_up()  # seed 0, float64, the GPU where there is one


# %% tags=["hide-input"] fold="Computed: critical batch sizes in the noisy quadratic model"
def risk(h: Tensor, q: float, eta: float, B: float, steps: int) -> Tensor:
    """The expected loss after so many steps from `x = 1`, by the recursion's closed form."""
    factor = (1 - eta * h ** (1 - q)) ** 2
    noise = eta**2 * h ** (-2 * q) * h / B
    decayed = factor**steps
    return 0.5 * (h * (decayed + noise * (1 - decayed) / (1 - factor))).sum()


def fewest_steps(h: Tensor, q: float, B: float, target: float) -> float:
    """Over learning rates up to the largest stable one."""
    best = math.inf
    for eta in torch.logspace(-5, 0, 60).tolist():
        eta = 1.9 * eta / float((h ** (1 - q)).max())
        if risk(h, q, eta, B, 10**7) > target:
            continue
        low, high = 0, 10**7
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if risk(h, q, eta, B, middle) <= target else (middle, high)
        best = min(best, high)
    return best


h = 1 / torch.arange(1, 1001)
target = 0.05 * float(0.5 * h.sum())
sizes = [2**k for k in range(0, 17, 2)]
powers = {"SGD": 0.0, "power 1/2": 0.5, "natural gradient": 1.0}
ideal = {name: [fewest_steps(h, q, B, target) for B in sizes] for name, q in powers.items()}


def critical(steps: list[float]) -> int:
    """The last batch size up to which four times the batch took at most half the steps."""
    saved = [later <= steps[k] / 2 for k, later in enumerate(steps[1:])]
    return sizes[saved.index(False) if False in saved else len(saved)]


for name, steps in ideal.items():
    print(f"{name:16} critical size {critical(steps):5}   steps {steps}")
assert critical(ideal["SGD"]) < critical(ideal["power 1/2"]) < critical(ideal["natural gradient"])

# %% tags=["hide-input"] alt="Steps to the target against the batch size, both logarithmic, in the noisy quadratic model, for SGD, the power one half and the natural gradient. All fall along straight lines at first. SGD becomes flat at the smallest batch size, the power one half later, the natural gradient last and lowest; for small batches it is no better than the power one half." caption="The noisy quadratic model: fewest steps to 5 % of the first loss, by the best learning rate for each batch size. A straight line of slope $-1$ is perfect scaling. SGD leaves it first, the natural gradient last."
fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
drawn = {"SGD": style("gradient"), "power 1/2": style("AdamW"), "natural gradient": style("GGN")}
for name, steps in ideal.items():
    (line,) = ax.loglog(sizes, steps, **drawn[name])
    ax.annotate(
        name,
        (sizes[-1], steps[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        color=line.get_color(),
        va="center",
    )
ax.set(xlabel="batch size", ylabel="steps to the target")
ax.margins(x=0.25)
plt.show()

# %% [markdown]
# After this chapter you will be able to
#
# - compute the critical batch size of an optimizer in the noisy quadratic model;
# - say for which batch sizes preconditioning helps most, and why it helps less below;
# - design a fair test of large batches for your own network.
#
# Two papers have tested whether KFAC profits from large batches, and disagree:
#
# | | [Zhang et al. 2019](bibliography.md#noisy-quadratic) | [Ma et al. 2020](bibliography.md#inefficiency) |
# | --- | --- | --- |
# | what the abstract says | preconditioning, by Adam or KFAC, gives much larger critical batch sizes than SGD with momentum | KFAC scales no better to large batches than SGD, and is as sensitive to its settings |
# | networks | several, and a noisy quadratic model | residual networks and AlexNet, on CIFAR-10 and SVHN |
#
# This chapter derives what theory says in the simplest model, and then shows what the repository's benchmark measures
# on one small network. It does not decide between the papers: their networks are much larger.

# %% [markdown]
# ## The noisy quadratic model
#
# Take a loss $\tfrac12 \sum_i h_i x_i^2$ whose gradient is known with noise. One sample's gradient has the variance
# $c_i$ in direction $i$, and a batch of $B$ samples has $c_i / B$. The step divides direction $i$ by a power of its
# curvature:
#
# $$
# x_i \leftarrow x_i - \eta \, h_i^{-q} \Bigl( h_i x_i + \sqrt{c_i / B} \; \xi_i \Bigr) ,
# \qquad \xi_i \sim \mathcal N(0, 1) .
# \tag{24.1}
# $$
#
# $q = 0$ is SGD and $q = 1$ a natural gradient step. $q = 1/2$ stands for methods that multiply the gradient by the
# power $-1/2$ of a curvature matrix, as those of [Chapter 25](25_relatives.py) do. The mean square
# $v_i = \mathbb E[x_i^2]$ obeys a recursion that needs no simulation:
#
# $$
# v_i \leftarrow (1 - \eta h_i^{1-q})^2 \, v_i + \eta^2 h_i^{-2q} c_i / B .
# \tag{24.2}
# $$
#
# The first term shrinks $v_i$, and does so slowest in the directions of smallest $h_i^{1-q}$. The second term adds noise,
# and is divided by $B$. The experiment has a thousand directions with $h_i = 1 / i$, starts at $x_i = 1$, and takes
# $c_i = h_i$ as in the paper. The last holds at a minimum of a model with the distribution of the data, where the
# covariance of a sample's gradient is the Fisher, and the Fisher is the Hessian.


# %% tags=["hide-input"] fold="Checked: the recursion against a simulation, and its closed form"
def simulated(h: Tensor, q: float, eta: float, B: float, steps: int, runs: int) -> Tensor:
    """The expected loss as an average over runs of (24.1)."""
    x = torch.ones(runs, len(h))
    for _ in range(steps):
        x = x - eta * h**-q * (h * x + (h / B).sqrt() * torch.randn_like(x))
    return 0.5 * (h * x.square()).sum(1).mean()


found, drawn = risk(h, 0.5, 0.3, 8.0, 20), simulated(h, 0.5, 0.3, 8.0, 20, 400)
print(f"expected loss after 20 steps: {found:.4f} by (24.2), {drawn:.4f} in 400 runs")
assert abs(found - drawn) < 0.02 * found

v = torch.ones_like(h)
for _ in range(20):
    v = (1 - 0.3 * h**0.5) ** 2 * v + 0.3**2 * h**-1 * h / 8.0
assert_exact(0.5 * (h * v).sum(), found)

# %% [markdown]
# For every batch size, take the learning rate that reaches 5 % of the first loss in the fewest steps. In practice this
# rate is unknown. Here it makes the comparison fair. [Figure 24.1] shows the result. The *critical
# size* printed above the figure is the first batch size from which four times the batch does not halve the steps.
#
# In this model, the first paper's statement holds: of the three powers $q$, the larger one has the larger critical batch size. With
# small batches, noise limits all three methods, and the natural gradient gains much less. It is *not* ahead of the power
# $1/2$ there. By [(24.2)], dividing by curvature multiplies the noise, too, most of all where the curvature is small.

# %% tags=["hide-input"] fold="Checked: the order of the methods at the smallest and the largest batch"
gain = [slow / fast for slow, fast in zip(ideal["SGD"], ideal["natural gradient"], strict=True)]
print(
    f"SGD's steps over the natural gradient's: {gain[0]:.1f} with batches of {sizes[0]}, ", end=""
)
print(f"{gain[-1]:.0f} with batches of {sizes[-1]}")
assert 2 < gain[0] < 4
assert gain[-1] > 100
assert ideal["natural gradient"][0] > ideal["power 1/2"][0]
assert ideal["natural gradient"][-1] < ideal["power 1/2"][-1] / 5

# %% [markdown]
# ## What the model leaves out
#
# - The curvature is exact, known at no cost, and the same for every batch. KFAC's matrix is an approximation that is
#   averaged over batches, damped, and renewed now and then.
# - The loss is a parabola. A step of any network has a length beyond which the parabola means nothing, and that length
#   does not grow with the batch.
# - The learning rate is constant, and the best one for each batch size. No method has momentum.
#
# Any of these may remove the advantage. So it has to be measured.
#
# ## One network, five batch sizes
#
# The convolutional network of the benchmark's task T4 is trained to a validation accuracy of 98 %, with batches of 32 up
# to 512 of its 1400 images of digits. For *every* batch size, SGD, AdamW and KFAC each get the same number of trials, as
# [Chapter 13](13_in_practice.py) describes, within the same number of steps. The numbers are medians over seeds that the
# search has not seen, each with a confidence interval of 90 %. A run *hits* if it reaches the target; "—" means that the
# median run, or that end of the interval, does not. `python -m benchmarks.training --task batch-32` makes the runs of one
# size again.

# %% tags=["hide-input"] fold="Printed: steps and images for every batch size"
COMPARED = ("sgd", "adamw", "kfac-expand")
trained = {}
for path in sorted(RESULTS.glob("training-batch-*.json")):
    stored = json.loads(path.read_text())
    if set(COMPARED) <= set(stored.get("summary", {})):
        trained[int(path.stem.removeprefix("training-batch-"))] = stored
trained = dict(sorted(trained.items()))
if not trained:
    print(
        "No results of the benchmark: run this chapter in a clone of the repository, which has them."
    )


def number(value: float | None) -> str:
    return "—" if value is None else f"{value:.0f}"


for batch, stored in trained.items():
    trials = {len(stored["search"][name]["trials"]) for name in COMPARED}
    seeds = len(stored["finals"]["sgd"])
    print(f"batch {batch}: {'/'.join(map(str, trials))} trials each, {seeds} final seeds")
    for name in COMPARED:
        row = stored["summary"][name]
        interval = ", ".join(number(v) for v in row["steps_interval"])
        images = None if row["steps"] is None else row["steps"] * batch
        cells = f"steps {number(row['steps']):>4} [{interval}]"
        print(f"    {name:12} hits {row['hits']}/{seeds}   {cells:26} images {number(images):>7}")

# %% tags=["hide-input"] alt="Median steps to the target against the batch size for SGD, AdamW and KFAC, both axes logarithmic, with bars for the intervals. (Without the benchmark's files, an empty picture.)" caption="Measured: median steps to 98 % validation accuracy with intervals of 90 %. Dotted: perfect scaling from KFAC's smallest batch. A method that runs parallel to it scales perfectly."
fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
drawn = {"sgd": style("gradient"), "adamw": style("AdamW"), "kfac-expand": style("KFAC")}
labels = {"sgd": "SGD", "adamw": "AdamW", "kfac-expand": "KFAC"}
for name in COMPARED:
    colour = drawn[name]["color"]
    rows = {b: stored["summary"][name] for b, stored in trained.items()}
    rows = {b: row for b, row in rows.items() if row["steps"] is not None}
    low = [row["steps"] - row["steps_interval"][0] for row in rows.values()]
    high = [(row["steps_interval"][1] or row["steps"]) - row["steps"] for row in rows.values()]
    middle = [row["steps"] for row in rows.values()]
    if rows:
        ax.errorbar(list(rows), middle, [low, high], capsize=2, **drawn[name])
        ax.annotate(
            labels[name],
            (max(rows), middle[-1]),
            xytext=(8, 0 if max(rows) == max(trained) else 12),  # SGD misses the last size
            textcoords="offset points",
            color=colour,
            va="center",
        )
    if name == "kfac-expand" and rows:
        first = min(rows)
        ax.plot(
            list(trained), [rows[first]["steps"] * first / b for b in trained], ":", color=colour
        )
ax.set(xscale="log", yscale="log", xlabel="batch size", ylabel="steps to the target")
ax.margins(x=0.25)
plt.show()

# %% [markdown]
# Under perfect scaling, the number of images stays constant. Where the steps of a method stop falling, its critical
# batch size on this task is passed. The papers ask whether KFAC needs fewer steps, and whether its advantage grows with
# the batch. The next cell compares its steps with those of SGD and AdamW at every batch size.

# %% tags=["hide-input"] fold="Printed: KFAC's steps as a share of the others'"
sized = {b: {n: stored["summary"][n]["steps"] for n in COMPARED} for b, stored in trained.items()}
for rival in COMPARED[:2]:
    shares = {
        b: of["kfac-expand"] / of[rival]
        for b, of in sized.items()
        if of["kfac-expand"] and of[rival]
    }
    told = ", ".join(f"{b}: {share:.2f}" for b, share in shares.items())
    print(f"KFAC's steps as a share of {rival}'s, by batch size: {told or 'no pair of hits'}")
    missed = [b for b, of in sized.items() if of["kfac-expand"] and not of[rival]]
    if missed:
        print(f"    {rival} misses with batches of {', '.join(map(str, missed))}")

# %% tags=["hide-input"] fold="Checked: the statements below"
if {32, 64, 128, 256, 512} <= set(trained):
    steps_of = {n: [sized[b][n] for b in sorted(sized)] for n in COMPARED}
    images_of = [steps * b for steps, b in zip(steps_of["kfac-expand"], sorted(sized), strict=True)]
    assert max(images_of[:3]) < 1.1 * min(images_of[:3])  # 32, 64, 128: perfect scaling
    assert images_of[3] > 1.5 * images_of[2]  # 256: past it
    assert steps_of["sgd"][3] > 0.75 * steps_of["sgd"][0]  # SGD gains little from 32 to 256
    assert shares[256] < min(shares[64], shares[512])

# %% tags=["remove-input"]
FINDINGS = """
On this network, KFAC scales nearly perfectly from 32 to 128 images, and the next doublings save little. SGD's steps
hardly fall from 32 to 256: its critical batch size, in the sense above, is at most 32. KFAC's advantage over AdamW is larger with 256 images than
with 64, as the model and the first paper say, and no larger with 512. The second paper trains much larger networks, and
these runs neither confirm nor refute its finding.
"""
Markdown(FINDINGS if {32, 64, 128, 256, 512} <= set(trained) else "")

# %% [markdown]
# Such a table has three limits. The target is reached early, so the end of training is not in it. The budget of trials
# is small against the number of settings, and KFAC has more of them. One network on 1400 images has a critical batch
# size that says nothing about yours. For a fair test of your own, double the batch, search each optimizer's learning
# rate again, and see whether the steps halve.
#
# ## In one minute
#
# - A larger batch removes noise. It does not change the curvature, which limits training with large batches.
# - In the noisy quadratic model, preconditioning moves the critical batch size up. It gains most with large batches
#   and least where noise limits training.
# - Two papers with different experiments come to different conclusions about KFAC.
# - A comparison needs a search of settings for every method at every batch size.
#
# ## Exercises
#
# **Exercise 24.1.** What is the expected loss of (24.1) after infinitely many steps with $q = 1$ and $c_i = h_i$? How
# must the learning rate depend on the batch size for this loss to stay the same?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With $q = 1$ every direction has the factor $(1 - \eta)^2$ and the noise $\eta^2 / (h_i B)$. The fixed point is
# $v_i = \eta / ((2 - \eta) h_i B)$, and the loss $\tfrac12 \sum_i h_i v_i = D \eta / (2 (2 - \eta) B)$ for $D$ weights.
# For small $\eta$ it depends on $\eta / B$ alone: twice the batch allows twice the learning rate.
#
# </details>
#
# **Exercise 24.2.** The loss of Exercise 24.1 grows with the number of weights. With what does that of SGD grow, for
# small $\eta$? What does damping change, a step that divides by $h_i + \delta$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# SGD's fixed point is $v_i = \eta / ((2 - \eta h_i) B)$, so that the loss is about $\eta \sum_i h_i / (4 B)$: the trace
# of the curvature. For the natural gradient every weight has the same term, however flat its direction is. With damping,
# $v_i = \eta / ((2 - \eta r_i) (h_i + \delta) B)$ with $r_i = h_i / (h_i + \delta)$, and the loss is about
# $\eta \sum_i r_i / (4 B)$. Directions with $h_i \ll \delta$ hardly count.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
eta, B = 0.1, 16.0
assert_exact(risk(h, 1.0, eta, B, 10**5), torch.tensor(len(h) * eta / (2 * (2 - eta) * B)))  # 24.1
at_rest = 0.5 * (h * eta / ((2 - eta * h) * B)).sum()
assert_exact(risk(h, 0.0, eta, B, 10**9), at_rest)  # 24.2
assert abs(at_rest / (eta * h.sum() / (4 * B)) - 1) < 0.05
delta = 0.01
r = h / (h + delta)
v = eta / ((2 - eta * r) * (h + delta) * B)  # a step with damping does not change it
assert_exact((1 - eta * r) ** 2 * v + (eta / (h + delta)) ** 2 * h / B, v)
assert abs(0.5 * (h * v).sum() / (eta * r.sum() / (4 * B)) - 1) < 0.05

# %% [markdown]
# ## Further reading
#
# [Zhang et al. 2019](bibliography.md#noisy-quadratic) and [Ma et al. 2020](bibliography.md#inefficiency). How several
# processes share a large batch: [Chapter 34](34_many_processes.py).
