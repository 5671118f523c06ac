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
# # 13. In practice: results, use, and silent mistakes
#
# **Part IV: Training.** What does KFAC gain in a training run, how is it used, and which mistakes raise no error?
#
# The settings of every method below were searched with the same effort. The runs in the figure and in the table are
# from seeds that the search has not seen.

# %% tags=["hide-input"]
import io as files
import itertools
import json
import math
import statistics
import textwrap
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import (
    Conv2d,
    CrossEntropyLoss,
    Flatten,
    LayerNorm,
    Linear,
    Module,
    ReLU,
    Sequential,
    Tanh,
)

from kfac_scratch.approximations.ekfac import AmortisedEKFAC, ekfac
from kfac_scratch.approximations.estimators import Latest
from kfac_scratch.approximations.kfac import foof, kfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, set_up
from kfac_scratch.losses import empirical
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.matrix import exact_inverse
from kfac_scratch.optimizer.optimizer import KFAC
from kfac_scratch.optimizer.step_control import graft
from kfac_scratch.show import RESULTS, Markdown

set_up()  # seed 0, float64, the GPU where there is one
ABSENT = (
    "**No results.** The results of the benchmark are part of the repository and not of the "
    "package: run this chapter in a clone of the repository."
)
TASKS = {  # network, what is measured, target, and +1 if it should rise
    "T1": ("small vision transformer", "validation accuracy", 0.95, 1),
    "T2": ("graph network, 200 labels", "validation accuracy", 0.96, 1),
    "T3": ("deep autoencoder", "training error", 0.40, -1),
    "T4": ("small convolutional network", "validation accuracy", 0.98, 1),
    "T5": ("character-level transformer", "validation loss", 2.2, -1),
}
FIRST_ORDER = ("sgd", "adamw")
METHODS = {
    "sgd": "SGD",
    "adamw": "AdamW",
    "kfac-expand": "KFAC",
    "kfac-reduce": "KFAC, reduce",
    "ekfac": "EKFAC",
    "no-curvature": "no curvature",
}
results, searches = {}, {}
for path in sorted(RESULTS.glob("training-T*.json")):
    stored = json.loads(path.read_text())
    if "finals" in stored:
        task = path.stem.removeprefix("training-")
        results[task] = {
            name: stored["finals"][name] for name in METHODS if name in stored["finals"]
        }
        searches[task] = stored["search"]


def quartiles(runs: list[dict], key: str) -> tuple[float, float, float]:
    """Quarter, median and three quarters of the runs; a run that misses the target is infinite."""
    values = sorted(math.inf if run[key] is None else run[key] for run in runs)
    return tuple(values[round(q * (len(values) - 1))] for q in (0.25, 0.5, 0.75))


def shown(runs: list[dict], key: str, digits: int, between: str = "<br>") -> str:
    """Median and quartiles, or how many runs hit the target if the median run misses it."""
    low, middle, high = ("∞" if math.isinf(v) else f"{v:.{digits}f}" for v in quartiles(runs, key))
    hits = sum(run[key] is not None for run in runs)
    return f"{middle}{between}{low}–{high}" if middle != "∞" else f"{hits} of {len(runs)} hit"


def table(rows: list[list[str]]) -> str:
    """Markdown of rows, of which the first is the head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def by_task(key: str, digits: int) -> Markdown:
    if not results:
        return Markdown(ABSENT)
    head = ["", *results]
    body = [
        [label, *(shown(of[name], key, digits) if name in of else "" for of in results.values())]
        for name, label in METHODS.items()
    ]
    return Markdown(table([head, *body]))


# %% tags=["hide-input"] alt="One plot for each task of the measured quantity against the step, for SGD, AdamW, KFAC with expand and reduce, EKFAC and the control without curvature: the median over seeds as a line and the range between the quartiles as a band, with the target as a dotted line. On T1 to T4 the three curves of KFAC and EKFAC lie close together and reach the target first. On T5 KFAC and EKFAC do, and KFAC-reduce misses the target in most runs. (Without the benchmark's files, an empty picture.)" caption="What was measured, with the settings that won each method's search: medians and quartiles over the final seeds. A line ends where the method's schedule does. Dotted: the target."
looks = {
    "sgd": {"color": "C2", "marker": "x"},
    "adamw": {"color": "C1", "marker": "s"},
    "kfac-expand": {"color": "C0", "marker": "o"},
    "kfac-reduce": {"color": "C0", "marker": "o", "markerfacecolor": "none", "linestyle": "--"},
    "ekfac": {"color": "#1797a6", "marker": "D"},
    "no-curvature": {"color": "C4", "marker": "", "linestyle": ":"},
}
spacing = {}  # steps between two measurements
for task, finals in results.items():
    hit = next(run for of in finals.values() for run in of if run["steps"] is not None)
    *_, target, sign = TASKS[task]
    reached = [v is not None and sign * v >= sign * target for v in hit["metric"]]
    spacing[task] = hit["steps"] // next(
        i + 1 for i in range(len(reached) - 1) if reached[i] and reached[i + 1]
    )
rows = max(1, (len(results) + 1) // 2)
size = (7.8, 0.6 + 2.1 * rows)
fig, axes = plt.subplots(rows, 2, figsize=size, layout="constrained", squeeze=False)
for ax, (task, finals) in zip(axes.flat, results.items(), strict=False):
    network_, measured, target, sign = TASKS[task]
    for name, runs in finals.items():
        length = min(len(run["metric"]) for run in runs)
        values = torch.tensor([run["metric"][:length] for run in runs], device="cpu")
        low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], device="cpu"), dim=0)
        steps = [(k + 1) * spacing[task] for k in range(length)]
        style = {"markersize": 4, "markevery": max(1, length // 8), "linewidth": 1.2}
        ax.plot(steps, middle, label=METHODS[name], **style | looks[name])
        ax.fill_between(steps, low, high, color=looks[name]["color"], alpha=0.15, linewidth=0)
    ax.axhline(target, linestyle=":", color=ax.xaxis.label.get_color(), linewidth=1)
    ax.set(title=f"{task}: {network_}", xlabel="step", ylabel=measured)
    if sign > 0:
        ax.set_ylim(target - 0.12, 1.0)
    else:
        first = max(run["metric"][0] for runs in finals.values() for run in runs)
        ax.set(xscale="log", yscale="log", ylim=(0.6 * target, min(20 * target, 1.2 * first)))
for ax in axes.flat[len(results) :]:
    ax.axis("off")
if results:
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# The next table has the steps to the target on the tasks of [Figure 13.1], a vision transformer (T1), a graph
# network (T2), an autoencoder (T3), a convolutional network (T4) and a character-level transformer (T5): the median over
# seeds, and below it the quartiles. If the median run misses the target, the table says how many runs hit it. `KFAC` is KFAC-expand,
# [Chapter 14](14_ekfac.py) derives EKFAC, and the control `no curvature` is explained below.

# %% tags=["remove-input"]
by_task("steps", 0)

# %% [markdown]
# The runs are `KFAC(model, loss)` with other settings. Without any setting, a step of a linear layer or convolution is
#
# $$
# W \leftarrow W - \eta\, \frac{\lVert u \rVert}{\lVert P \rVert}\, P + \mu\, \Delta_0 ,
# \qquad
# P = \Bigl(B + \tfrac{\sqrt\delta}{\pi} I\Bigr)^{-1} G \,\bigl(A + \pi \sqrt\delta\, I\bigr)^{-1} ,
# \tag{13.1}
# $$
#
# with averaged factors $A$ and $B$ ([Chapter 11](11_averages.py)), the gradient $G$ of the layer, factored damping
# $\delta$ with its $\pi$ ([Chapter 9](09_damping.py)), Adam's step $u$ for this layer, and the previous change
# $\Delta_0$. The fraction is the *graft*: $P$ gives the direction of the new part of the step and $u$ its length
# ([Chapter 11](11_averages.py)).
#
# After this chapter you will be able to
#
# - say how much KFAC gained in steps and in time on these tasks, and where it gained nothing in time;
# - train with KFAC: groups, schedules, half precision, checkpoints, other approximations;
# - recognise five mistakes that raise no error.
#
# ## What KFAC gains
#
# `benchmarks/training.py` measured the table and [Figure 13.1] on one CPU thread:
#
# - Every method has the same budget of steps, the same family of schedules (a cosine to a horizon
#   of its own choice, with or without warm-up), the same ranges for shared settings, and the same
#   number of trials.
# - Settings are tried on one seed, and the best of them on a few more. The setting wins whose product of steps and
#   seconds to the target is smallest. All numbers here are from fresh seeds.
# - A **hit** is the first of two consecutive measurements that reach the target. A run that misses
#   counts as infinite in the median. CPU time is the time of training, measurements excluded.
# - All KFAC methods have the graft. `no curvature` is a control: the same code with a damping
#   of 1000, which leaves the gradient with the graft. A gain of this control is not due to curvature.
#
# A step of KFAC costs more than a step of AdamW. So the next table has the CPU seconds to the target:

# %% tags=["remove-input"]
by_task("cpu", 2)

# %% [markdown]
# The next cell compares every method with the best first-order method of its task. *Clearly fewer* means that the
# quartiles do not overlap: at least three quarters of the runs needed less than at least three quarters of the
# first-order method's runs. A method *hits* or *misses* here if its median run does.


# %% tags=["hide-input"] fold="Checked: every method against the best first-order method"
def verdict(runs: list[dict], others: list[dict], key: str) -> tuple[float, str]:
    """The ratio of the medians, and what the quartiles say."""
    (low, middle, high), (low_, reference, high_) = (quartiles(r, key) for r in (runs, others))
    if math.isinf(middle):
        return math.inf, "misses"
    if math.isinf(reference):
        return 0.0, "hits where first-order methods miss"
    word = (
        "clearly fewer" if high < low_ else "clearly more" if low > high_ else "no clear difference"
    )
    return middle / reference, word


found: dict[tuple[str, str, str], tuple[float, str]] = {}
for (task, finals), key in itertools.product(results.items(), ("steps", "cpu")):
    rival = min(FIRST_ORDER, key=lambda name: quartiles(finals[name], key)[1])
    for name, runs in finals.items():
        found[task, name, key] = verdict(runs, finals[rival], key)


def listed(name: str, key: str) -> str:
    """On each task: the ratio, or that first-order methods miss."""
    of = {task: found[task, name, key] for task in results if (task, name, key) in found}
    return "; ".join(
        f"{task} {word}" + (f" ({ratio:.2f})" if 0 < ratio < math.inf else "")
        for task, (ratio, word) in of.items()
    )


CURVED = [name for name in METHODS if name not in (*FIRST_ORDER, "no-curvature")]
unclear = [
    f"{METHODS[name]} on {task}"
    for task, name in itertools.product(results, CURVED)
    if (task, name, "cpu") in found
    and found[task, name, "cpu"][1] in ("no clear difference", "clearly more", "misses")
]
final_gaps = []
for task, finals in results.items():
    ratio, seconds = (found[task, "kfac-expand", key][0] for key in ("steps", "cpu"))
    assert ratio < 0.7  # 0 where first-order methods miss
    assert found[task, "kfac-expand", "steps"][1] not in ("no clear difference", "clearly more")
    assert ratio < seconds or seconds == 0
    of_control = found[task, "no-curvature", "steps"][1]
    assert (of_control == "clearly fewer") == (task == "T5")
    if task == "T5":  # KFAC gains beyond the control
        assert verdict(finals["kfac-expand"], finals["no-curvature"], "steps")[1] == "clearly fewer"
    if TASKS[task][-1] > 0:
        ends = (
            statistics.median(r["metric"][-1] for r in finals[n]) for n in ("adamw", "kfac-expand")
        )
        final_gaps.append(abs(next(ends) - next(ends)))
        assert final_gaps[-1] < 0.04
conclusions = f"""
- **Steps.** KFAC needs clearly fewer steps than the best first-order method on all
  {len(results)} tasks, or hits the target where both miss: {listed("kfac-expand", "steps")}.
- **Time.** {listed("kfac-expand", "cpu")}. The gain in time is smaller than in steps,
  because a step costs more. No clear gain in time is left for {", ".join(unclear)}: where time
  is what counts, KFAC does not win there.
- **Control.** The same code without curvature, in steps against the best first-order method where
  that one hits: {listed("no-curvature", "steps")}. On T5 the control has a gain, which is
  not due to curvature, and KFAC needs clearly fewer steps than the control.
- **End.** Where the target is an accuracy, AdamW and KFAC differ by at most
  {100 * max(final_gaps, default=0):.1f} percentage points when their schedules end. There the two differ in
  when they reach the target, and little in where they end.
"""
Markdown(conclusions if results else ABSENT)

# %% [markdown]
# These sentences have limits. The searches are short, so that SGD and AdamW miss targets for which a longer search
# might have found settings; the comparison is of what equal effort finds. Another search may end with other settings:
# [Chapter 23](23_comparison.py) searches for KFAC under six fixed combinations of average and damping, and the results
# of these six searches differ much. The networks are small, and $d_\text{in}^3 + d_\text{out}^3$, the cost of the
# inverses, grows faster with the width than any other cost of a step. A search for every method is rarely possible in
# practice, and KFAC has more settings than AdamW. The cell below has all numbers.

# %% tags=["hide-input", "hide-output"] fold="Measured: all numbers of the tasks"
lines = []
for task, finals in results.items():
    network_, measured, target, _ = TASKS[task]
    lines.append(f"{task}: {network_}, {measured} {target}")
    lines.append(f"{'':13} trials  hits  {'steps':22} {'CPU seconds':24} ms per step")
    for name, runs in finals.items():
        hits = sum(run["steps"] is not None for run in runs)
        rate = statistics.median(
            1e3 * run["total"] / len(run["metric"]) / spacing[task] for run in runs
        )
        counts = f"{len(searches[task][name]['trials']):6}  {hits}/{len(runs)}"
        numbers = f"{shown(runs, 'steps', 0, ' '):22} {shown(runs, 'cpu', 3, ' '):24}"
        lines.append(f"{METHODS[name]:13} {counts}   {numbers} {rate:11.2f}")
        for run in runs:  # what was stored must follow from the stored curves
            *_, sign = TASKS[task]
            good = [v is not None and sign * v >= sign * target for v in run["metric"]]
            first = next((i + 1 for i in range(len(good) - 1) if good[i] and good[i + 1]), None)
            assert run["steps"] == (None if first is None else first * spacing[task])
print("\n".join(lines) or ABSENT)

# %% [markdown]
# ### With no argument
#
# Most users will not search. The defaults of `KFAC(model, loss)` are the choices of
# [Chapter 11](11_averages.py) that made a run depend least on its numbers:
#
# - **Graft**, so that a learning rate means the same for every layer and damping. Its averages
#   are shorter than Adam's own: $\beta = (0.9, 0.99)$.
# - **Factored damping**, small. With the graft it changes the direction of $P$, not the length of the step along it.
# - **Periods that begin with 1** and grow to 10. A short run depends on its first matrices, and a long
#   one should not pay for frequent renewals.
# - **AdamW** for parameters without a block.
#
# They were chosen by a random search over the first four tasks together, on seeds that are not those below, with a
# constant learning rate. Their bound was fixed in advance: at most 1.5 times the steps of KFAC with settings searched
# for each task and with a schedule. Of several searches the one with the fewest steps counts: on T4 that is one of the
# six in [Chapter 23](23_comparison.py), which found a faster setting than the search above. The fifth task is a
# language model that writes the manual of Python character by character. It took no part in the choice. The defaults can
# need fewer steps than searched settings, as a search has few trials.

# %% tags=["hide-input"] fold="Checked: the defaults against their bound"
file_of_defaults = RESULTS / "defaults-cpu.json"
bare = json.loads(file_of_defaults.read_text())["rows"] if file_of_defaults.exists() else []
head = ["Task", "searched", "bound", "defaults"]
body = []
for row in bare:
    low, middle, high = quartiles(row["runs"], "steps")
    body.append(
        [row["task"], f"{row['tuned']:g}", f"{row['bound']:g}", f"{middle:g}<br>{low:g}–{high:g}"]
    )
    assert middle == (row["median"] or math.inf)
    assert row["within"] == (middle <= row["bound"])
    if row["task"] == "T4" and results:  # another search than the one of the table above
        assert row["tuned"] < quartiles(results["T4"]["kfac-expand"], "steps")[1]
missed = [row["task"] for row in bare if not row["within"]]
within = f"all but {', '.join(missed)}" if missed else f"all {len(bare)} tasks"
stable = sum(row["stable"] for row in bare)
text = f"""
Steps to the target: KFAC with settings searched for the task, the bound, and the defaults (median
and quartiles over seeds). The defaults are within the bound on {within}. On {stable} of {len(bare)}
tasks no mean loss between two measurements was above the loss at the start.
"""
Markdown(f"{table([head, *body])}\n\n{text}" if bare else ABSENT)

# %% [markdown]
# The defaults were chosen on four of these five small problems. On another problem they may do worse. A run with the
# defaults is a baseline before a search.
#
# ## Using it
#
# The loop has one line more than PyTorch's, `observe`. The next example has the parts of a real loop: layers without
# a block, a schedule, groups, weight decay. `KFAC` preconditions linear layers, convolutions and embeddings. All
# other parameters, here those of a `LayerNorm`, go to the optimizer that `rest=` makes for them. Its groups are
# appended to `param_groups`, so that a schedule acts on all of them. Groups work as everywhere in PyTorch, and may
# have their own damping.

# %% tags=["hide-input"]
digits = load_digits()
order = torch.randperm(len(digits.target))
images, labels = torch.tensor(digits.data)[order] / 16, torch.tensor(digits.target)[order]
loss = CrossEntropyLoss()
plain_rule: dict[str, Any] = {"controls": [], "invert": exact_inverse, "momentum": 0.9}
plain_rule |= {"damping": 1e-3, "decay": 0.95, "factor_every": 10, "inverse_every": 10}


def network() -> Sequential:
    torch.manual_seed(0)
    return Sequential(Linear(64, 16), Tanh(), Linear(16, 16), Tanh(), Linear(16, 10))


def batches(steps: int, size: int = 100) -> Iterator[tuple[Tensor, Tensor]]:
    """Random batches out of the first 1000 images, the same ones in every call."""
    generator = torch.Generator(images.device).manual_seed(1)
    for index in torch.randint(1000, (steps, size), generator=generator):
        yield images[index], labels[index]


# %%
def train(model: Module, optimizer, data, schedule=None) -> list[float]:
    """The loss of every batch before the step on it."""
    losses = []
    for X, y in data:
        optimizer.zero_grad()
        value = loss(model(X), y)
        value.backward()
        optimizer.observe(X, y)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        losses.append(value.item())
    return losses


torch.manual_seed(0)
model = Sequential(Linear(64, 24), LayerNorm(24), Tanh(), Linear(24, 10))
recorded = []
groups = [
    {"params": model[0].parameters(), "damping": 1e-3},
    {"params": model[1].parameters()},
    {"params": model[3].parameters(), "damping": 1e-2, "weight_decay": 0.01},
]
optimizer = KFAC(
    model,
    loss,
    groups,
    lr=0.02,
    momentum=0.5,
    controls=[graft()],
    rest=lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    record=recorded.append,
)
for X, y in itertools.islice(batches(5), 5):
    optimizer.update_curvature(X, y)  # optional: look at a few batches before the first step
schedule = torch.optim.lr_scheduler.OneCycleLR(
    optimizer, [0.02, 0.02, 0.01], total_steps=40, cycle_momentum=False
)
losses = train(model, optimizer, batches(40), schedule)
print(f"loss {losses[0]:.2f} -> {statistics.mean(losses[-5:]):.3f}")
print("recorded:", ", ".join(recorded[0]))
print(
    "groups:",
    [("rest" if "rest" in g else f"damping {g['damping']:g}") for g in optimizer.param_groups],
)
assert statistics.mean(losses[-5:]) < 0.3 * losses[0]
assert max(group["lr"] for group in optimizer.param_groups) < 1e-4  # the schedule has ended

# %% [markdown]
# ### Which approximation
#
# The matrix of a layer is an argument: a function of `LayerIO`, or an estimator if it remembers
# more than an average. Every method of the part *Better and faster* can be passed. The view of weight sharing
# ([Chapter 6](06_weight_sharing.py)), the inverse and the Fisher are arguments, too. On a small convolutional
# network:


# %%
def convolutional() -> Sequential:
    torch.manual_seed(0)
    return Sequential(
        Conv2d(1, 6, 3, stride=2), ReLU(), Conv2d(6, 8, 2), ReLU(), Flatten(), Linear(32, 10)
    )


pictures = [(X.reshape(-1, 1, 8, 8), y) for X, y in batches(30)]
variants = {
    "kfac": {},
    "kfac, reduced view": {"approximation": lambda io: kfac(io.reduced())},
    "kfac, factored damping": {"invert": factored_inverse},
    "ekfac": {"approximation": ekfac},
    "amortised ekfac": {"approximation": AmortisedEKFAC(basis_every=2)},
    "newest batch only": {"approximation": Latest(kfac)},
    "input factor only": {"approximation": foof},
}
for name, options in variants.items():
    model = convolutional()
    common = plain_rule | {"lr": 0.005, "controls": [graft()]}
    common |= {"factor_every": 5, "inverse_every": 5}
    optimizer = KFAC(model, loss, **common | options)
    losses = train(model, optimizer, pictures)
    kind = type(optimizer.matrices["0"]).__name__
    print(f"{name:23} {kind:14} loss {losses[0]:.2f} -> {statistics.mean(losses[-5:]):.2f}")
    assert statistics.mean(losses[-5:]) < 0.7 * losses[0]

# %% [markdown]
# Few steps with one learning rate do not show which is best, only that all of them run.
#
# ### Mixed precision
#
# Keep the parameters in float32 and run the forward pass in `bfloat16`; call `observe` in the same context as the
# forward pass. Factors and inverses stay in float32, because the eight bits of a `bfloat16` mantissa are too few for
# an inversion ([Chapter 8](08_matrices.py)). With `float16`, step through a `GradScaler` as usual. Parameters that
# are themselves in half precision are accepted, and their factors are in float32, too, but inputs and vectors have
# been rounded to half precision before. So this is not recommended.

# %%
model = network().float()
optimizer = KFAC(model, loss, lr=0.02, damping=1e-3, controls=[graft()])
for X, y in batches(20):
    optimizer.zero_grad()
    with torch.autocast(images.device.type, torch.bfloat16):
        value = loss(model(X.float()), y)
        optimizer.observe(X.float(), y)
    value.backward()
    optimizer.step()
M = optimizer.matrices["2"]
print(f"loss {value.item():.2f}; {M.A.dtype}, {next(model.parameters()).dtype}")
assert M.A.dtype == M.B.dtype == next(model.parameters()).dtype == torch.float32
assert value < 1.5

# %% [markdown]
# ### Stop and go on
#
# `state_dict` holds the matrices, the inverses, the counters and, if a generator was given, its state. These are
# tensors and numbers only, so that `torch.load` reads them with `weights_only=True`. A run that was interrupted ends
# with the same bits as a run without a break. (The schedule has a state of its own.)


# %%
def resumable() -> tuple[Sequential, KFAC]:
    model = network()
    options = {"lr": 0.02, "controls": [graft()], "factor_every": 3, "inverse_every": 4}
    generator = torch.Generator(images.device).manual_seed(5)
    return model, KFAC(model, loss, approximation=AmortisedEKFAC(2), generator=generator, **options)


data = list(batches(20))
whole_model, whole_run = resumable()
train(whole_model, whole_run, data)

model, optimizer = resumable()
train(model, optimizer, data[:10])
file = files.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

file.seek(0)
saved = torch.load(file, weights_only=True)
model, optimizer = resumable()
model.load_state_dict(saved["model"])
optimizer.load_state_dict(saved["optimizer"])
train(model, optimizer, data[10:])
assert all(
    torch.equal(p, q) for p, q in zip(model.parameters(), whole_model.parameters(), strict=True)
)
print(f"{len(file.getvalue()) / 1024:.0f} KiB; equal to the last bit")

# %% [markdown]
# ### What is refused
#
# Where a step would be wrong, the optimizer raises an error, with the place and the way out, *before* a parameter or
# a matrix has changed, so that a loop may catch the error and go on with the next batch.

# %%
normed = Sequential(Linear(64, 24), LayerNorm(24), Linear(24, 10))
broken = images[:50].clone()
broken[7, 3] = float("nan")


def singular() -> None:
    optimizer = KFAC(network(), loss, damping=0.0)
    train(optimizer.model, optimizer, data[:1])


fine, half = KFAC(network(), loss), network()
refused = {
    "nothing observed": fine.step,
    "a layer without a rule": lambda: KFAC(normed, loss, rest=None),
    "half of a block": lambda: KFAC(half, loss, [half[0].weight]),
    "broken batch": lambda: fine.observe(broken, labels[:50]),
    "no damping": singular,
    "another checkpoint": lambda: KFAC(network(), loss).load_state_dict(saved["optimizer"]),
}
for name, act in refused.items():
    try:
        act()
    except ValueError as error:
        print(textwrap.fill(f"{name}: {error}", 92, subsequent_indent="    "))
    else:
        raise AssertionError(f"{name} was not refused")
went_on = train(fine.model, fine, data[:2])
assert all(math.isfinite(value) for value in went_on)

# %% [markdown]
# ### What is promised
#
# A step that raises an error changes no parameter and no matrix, wherever the error occurs: in `observe`, in a control,
# in `record`, or by Ctrl-C between two parameters. Three things make this possible. Matrices are values: `observe`
# makes new ones, and `step` decides whether they replace the old ones. Inputs, matrices, gradients, inverses and the
# step are checked before the first parameter moves; this takes one sum for each tensor and one transfer from the
# device. And the optimizer keeps the old values of what it writes in place until the step is complete.
#
# An infinite input is a good test, since the loss stays finite behind a `Tanh`. One run gets such a batch and skips it.
# A second run never gets it.


# %%
def run_with(bad_batch: bool) -> Sequential:
    model = network()
    generator = torch.Generator(images.device).manual_seed(2)
    options = {"lr": 0.02, "controls": [graft()], "factor_every": 1, "generator": generator}
    optimizer = KFAC(model, loss, **options)
    train(model, optimizer, data[:3])
    if bad_batch:
        hidden = images[:50].clone()
        hidden[7, 3] = float("inf")
        assert loss(model(hidden), labels[:50]).isfinite()
        try:
            train(model, optimizer, [(hidden, labels[:50])])
        except ValueError as error:
            print(textwrap.fill(str(error), 92))
    train(model, optimizer, data[3:6])
    return model


survivor, twin = run_with(bad_batch=True), run_with(bad_batch=False)
for p, q in zip(survivor.parameters(), twin.parameters(), strict=True):
    assert torch.equal(p, q)
print("the same parameters, to the last bit")

# %% [markdown]
# ## What goes wrong in practice
#
# Most of the following mistakes are in public code. None of them raises an error.
#
# **Two mistakes that compensate each other.** [One implementation](https://github.com/lzhangbv/kfac_pytorch) has
# `factor_decay=0.95` and computes `alpha * new + (1 - alpha) * current`. So the decay is the weight of the *new*
# matrix, and old matrices have hardly any weight. The same code adds damping to the running factor in place, and by
# [(9.15)] this multiplies the damping by $1 / (1 - \rho)$, which is 20 for the decay that was meant. With the decay on
# the wrong side, the factor is $1 / 0.95$ and is not noticed. Repairing the decay alone gives twenty times the damping.

# %%
for decay in (0.95, 0.05):
    stored = 0.0
    for _ in range(400):
        stored = decay * stored + 0.01  # in place, with every update
    print(f"weight of the old {decay}: asked for a damping of 0.01, got {stored:.4f}")
    assert abs(stored - 0.01 / (1 - decay)) < 1e-8

# %% [markdown]
# **The identity in the average.** The same code, and a
# [widely used one](https://github.com/gpauloski/kfac-pytorch), start both factors at the identity.
# By [(11.6)] this is a damping that decays.
#
# **A batch size inside the damping.** Gradients of a mean loss carry $1 / N$. If a hook stores
# these $g$ and takes the *mean* of $g g^\top$, as the widely used code does, the result is
# $B / N^2$ with our $B$. The missing factor is the same in every step, so that training works. But the damping has
# the effect of $N^2$ times the number that was given, and this effect changes with the batch size. A test for it: if
# every datum is repeated four times, nothing should change.


# %%
def mean_of_outer_products(X: Tensor, y: Tensor) -> Tensor:
    """What a hook sees: gradients of the mean loss, averaged once more."""
    model = network()
    f = model(X)
    (g,) = torch.autograd.grad(loss(f, y), f)
    return g.T @ g / len(g)


X, y = images[:50], labels[:50]
X4, y4 = X.repeat(4, 1), y.repeat(4)
once, repeated = (kfac(layer_ios(network(), loss, *data_)["4"]).B for data_ in ((X, y), (X4, y4)))
assert_exact(repeated, once)
assert_exact(mean_of_outer_products(X4, y4), mean_of_outer_products(X, y) / 16)

# %% [markdown]
# **A learning rate without effect.** Both implementations clip the step with the current rate, $\eta^2$ in [(11.9)].
# While the clip is active, the rate cancels, and a schedule of it has no effect.
#
# **A damping that arrives late.** An inverse holds the damping that it was made with. If the damping is adapted in
# every step and the inverse renewed in every tenth, nine of ten values are never used, and the reduction ratio belongs
# to another damping than the one that is adapted. So our optimizer inverts anew in the step after an adaptation. (With
# an eigendecomposition at hand, another damping needs no other decomposition, [(9.5)].) The same holds for a damping
# that you set by hand or by a schedule:

# %%
optimizer = KFAC(network(), loss, **plain_rule | {"damping": 1e-2})
train(optimizer.model, optimizer, data[:3])
optimizer.param_groups[0]["damping"] = 1.0
X, y = data[3]
train(optimizer.model, optimizer, [(X, y)])
V = torch.randn(16, 65)
assert_exact(optimizer.inverses["0"] @ V, optimizer.matrices["0"].inverse(1.0) @ V)

# %% [markdown]
# **A setting that was judged by one seed.** The best of many settings on one seed is partly luck, and so is a small
# difference at the end of a curve. Judge on seeds that the search has not seen.
#
# ## In one minute
#
# - **Results** are compared in steps and in CPU time, with equal searches, fresh seeds and their spread. The first
#   section prints what follows from them.
# - **Start** with `KFAC(model, loss)` and no argument: graft, small factored damping, periods that grow.
# - **Use.** `observe` before `step`; `rest=` for parameters without a block; groups, schedules and checkpoints as
#   in PyTorch.
# - **Errors** are raised before anything has changed, so that a loop may skip a batch.
# - **Check** five silent mistakes: the side of the decay, a start at the identity, a batch size in the damping, a
#   clip with the current rate, a damping that arrives late.
#
# ## Exercises
#
# **Exercise 13.1.** Write the factors of an implementation with hooks. A forward hook has the inputs `a` of the
# last layer, without the bias. A backward hook has `g`, the gradient of the *mean* loss with respect to the layer's
# outputs. Fill in `my_factors` such that both are KFAC's factors (with the labels of the data, to keep it short),
# and call `check_factors(my_factors)`.


# %%
def my_factors(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """`A` of shape `[d_in + 1, d_in + 1]` and `B` of shape `[d_out, d_out]`.

    `a` has the shape `[N, d_in]` and `g` has the shape `[N, d_out]`.
    """
    raise NotImplementedError


# %% tags=["hide-input"] fold="check_factors, which compares your factors with those of the package"
def check_factors(factors) -> None:
    """Against `kfac`, for two batch sizes."""
    for size in (10, 50):
        model, X, y = network(), images[:size], labels[:size]
        a = model[:4](X)
        f = model[4](a)
        (g,) = torch.autograd.grad(loss(f, y), f)
        right = kfac(layer_ios(model, loss, X, y, fisher=empirical)["4"])
        A, B = factors(a.detach(), g)
        assert_exact(A, right.A)
        assert_exact(B, right.B)


# %% [markdown]
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The bias is one more input that is 1. The gradient of the mean loss is $1/N$ times the gradient $\nabla_n$ of the
# datum's own loss, and $B = \frac1N \sum_n \nabla_n \nabla_n^\top = N \sum_n g_n g_n^\top$.
#
# ```
# def solution(a, g):
#     a = torch.cat([a, torch.ones(len(a), 1)], 1)
#     return a.T @ a / len(a), len(g) * g.T @ g
# ```
#
# </details>
#
# **Exercise 13.2.** A method needs $r$ times the steps of AdamW, and a step takes $c$ times as long. When is it
# faster? Compute $r$ and $c$ of KFAC on T4 from the folded numbers above, and compare $r c$ with the ratio of the
# CPU seconds.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# It is faster if $r c \lt 1$. Where the product is near one, the gain in steps only makes up for the longer time of a
# step. The last cell prints the numbers.
#
# </details>
#
# **Exercise 13.3.** You change the loss to `reduction="sum"`, with batches of 100. Which arguments of a run with
# graft must change so that all steps stay the same?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The loss, its gradient and its curvature are multiplied by 100. So the damping must be multiplied by 100 and
# nothing else: the direction of $P$ is then the same, and with graft the length of the step is Adam's, which does not
# depend on the scale of the gradient (up to its $\epsilon$).
#
# </details>
#
# The solutions, checked:


# %% tags=["hide-input"] fold="Checked: the exercises"
def solution(a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:  # 13.1
    a = torch.cat([a, torch.ones(len(a), 1)], 1)
    return a.T @ a / len(a), len(g) * g.T @ g


check_factors(solution)
try:  # the checker sees the batch size
    check_factors(lambda a, g: (solution(a, g)[0], g.T @ g / len(g)))
except AssertionError:
    print("13.1: the solution is exact, and the mean of outer products is found")
else:
    raise AssertionError("check_factors finds nothing")

if "T4" in results:  # 13.2
    of = {name: results["T4"][name] for name in ("adamw", "kfac-expand")}
    rate = {
        name: statistics.median(run["total"] / len(run["metric"]) for run in runs)
        for name, runs in of.items()
    }
    r = quartiles(of["kfac-expand"], "steps")[1] / quartiles(of["adamw"], "steps")[1]
    c = rate["kfac-expand"] / rate["adamw"]
    seconds = quartiles(of["kfac-expand"], "cpu")[1] / quartiles(of["adamw"], "cpu")[1]
    print(f"13.2: r = {r:.2f}, c = {c:.2f}, r c = {r * c:.2f}; ratio of the seconds {seconds:.2f}")
    assert abs(r * c - seconds) < 0.1


def summed_run(reduction: str, damping: float) -> Tensor:  # 13.3
    model, rule = network(), CrossEntropyLoss(reduction=reduction)
    generator = torch.Generator(images.device).manual_seed(3)
    options = plain_rule | {"lr": 0.02, "damping": damping, "controls": [graft(eps=1e-30)]}
    optimizer = KFAC(model, rule, generator=generator, **options)
    for X, y in batches(5):
        optimizer.zero_grad()
        rule(model(X), y).backward()
        optimizer.observe(X, y)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


assert_exact(summed_run("sum", 0.1), summed_run("mean", 1e-3), 1e-8)
assert not torch.allclose(summed_run("sum", 1e-3), summed_run("mean", 1e-3), rtol=0.01)
print("13.3: a hundred times the damping, the same steps")

# %% [markdown]
# ## Further reading
#
# [Martens and Grosse (2015)](bibliography.md#kfac) have the whole method as pseudocode.
# [Agarwal et al. (2020)](bibliography.md#grafting) study grafting. [Chapter 23](23_comparison.py) compares all
# methods of this book in training, [Chapter 35](35_conformance.py) judges implementations by exact cases, and
# [Chapter 36](36_museum.py) collects their mistakes.
