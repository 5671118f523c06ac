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
# # 28. When KFAC pays for PINNs: nine methods, equal trials
#
# **Part VII: PINNs.** Which method gets furthest on a differential equation in the same time, and what decides it?
#
# [Chapter 27](27_pinn.py) derived KFAC for PINNs, and KFAC\*, whose step lengths come from the exact quadratic model.
# They compete with first-order methods, whose steps are cheap, and with exact Gauss-Newton methods, whose steps are
# good. Two numbers decide between KFAC\* and an exact method: how many steps of KFAC\* take as long as one exact step,
# and how many it needs to get as far. The first can be counted. An exact step solves with the matrix $J^\top J$ of the
# weights or with the **kernel** $J J^\top$ of the $N$ residuals, where $J$ is their Jacobian. For $S$ Taylor
# coefficients at each point and many more weights than residuals, and if the decompositions of KFAC's factors cost
# little,
#
# $$
# \frac{\text{operations, kernel}}{\text{operations, KFAC*}} \approx \frac{N}{10\, S} .
# \tag{28.1}
# $$
#
# The second has to be measured. [Figure 28.1] shows the effect of both: the error after equal time.

# %% tags=["hide-input"]
import json
import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from kfac_scratch.checks import set_up
from kfac_scratch.pinn.krylov import KFACKrylov
from kfac_scratch.pinn.preconditioners import TermWise, ekfac_inverse
from kfac_scratch.pinn.problems import mlp, poisson
from kfac_scratch.pinn.solvers import two_directions_per_layer
from kfac_scratch.pinn.steps import GaussNewton, KFACStar
from kfac_scratch.pinn.terms import Term, pinn_loss
from kfac_scratch.show import RESULTS, Markdown, diverging, table

set_up()  # seed 0, float64, the GPU where there is one


def stored(name: str) -> dict:
    """A result of the repository's benchmarks; empty where there is none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


PROBLEMS = {
    "poisson-2d": "Poisson, 2d",
    "heat": "heat, 1+1d",
    "poisson-5d": "Poisson, 5d",
    "poisson-2d-deep": "Poisson, 2d, deep",
}
trained = {name: stored(f"pinn-training-{name}") for name in PROBLEMS}
trained = {name: result for name, result in trained.items() if result.get("summary")}
NO_RESULTS = "No results of the benchmark: run this chapter in a clone of the repository."
COLOURS = {"Adam": "C1", "L-BFGS": "C1", "KFAC": "C0", "KFAC*": "C0", "KFACKrylov": "C0"}

# %% tags=["hide-input"] alt="One panel for each problem: nine methods from the smallest median error at the top to the largest at the bottom, as dots on a logarithmic axis with a line from the smallest to the largest of three seeds. (Without the benchmark's files, an empty picture.)" caption="Error after 60 seconds of one processor: median, and the span of three seeds. Blue: KFAC; orange: first-order and quasi-Newton methods; green: methods with the exact Gauss-Newton matrix. Smaller is better."
fig, axes = plt.subplots(2, 2, figsize=(8.6, 5.6), layout="constrained")
for ax, (name, result) in zip(axes.flat, trained.items(), strict=False):
    rows = sorted(result["summary"].items(), key=lambda item: -(item[1]["median"] or math.inf))
    for y, (method, row) in enumerate(rows):
        errors = [e for e in row["errors"] if e is not None and math.isfinite(e)]
        if errors:
            ax.plot([min(errors), max(errors)], [y, y], color=COLOURS.get(method, "C2"))
            ax.plot(row["median"], y, "o", color=COLOURS.get(method, "C2"))
    ax.set_yticks(range(len(rows)), [method for method, _ in rows], fontsize="small")
    ax.set(xscale="log", title=PROBLEMS[name], xlabel="error")
for ax in axes.flat[len(trained) :]:
    ax.set_visible(False)
plt.show()


# %% tags=["remove-input"]
def error_text(value: float | None) -> str:
    """One digit, as in 2e-6, since three seeds give no more."""
    if value is None or not math.isfinite(value):
        return "—"
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


methods = list(next(iter(trained.values()))["summary"]) if trained else []
table(
    ["median error", *(name.removeprefix("poisson-") for name in trained)],
    [
        [m, *(error_text(result["summary"][m]["median"]) for result in trained.values())]
        for m in methods
    ],
) if trained else Markdown(NO_RESULTS)

# %% [markdown]
# After this chapter you will be able to
#
# - count how many steps of KFAC take as long as one step of an exact method,
# - read the table above with its limits, and say which method to try first on a problem of yours,
# - run the comparison again, on your machine or for your problem.
#
# ## What was run
#
# `python -m benchmarks.pinn_training` trains nine methods on four problems. Every method has the same number of trials
# on one seed, and the same processor time for each. The first trial has the settings of its paper, or the package's
# defaults. The best settings then run on three seeds that the search has not seen, 60 seconds of processor time each,
# and the methods take turns. The error is the root mean square of $u - u^*$, with $u$ the network and $u^*$ the
# solution, on points that are not trained on. The seconds include the drawing of training points, and not the measuring
# of the error. Every search also chooses for how many steps the training points are kept before new ones are drawn. A
# run counts the calls of its method's functions. A run that did not call them gets no error and is not ranked.

# %% tags=["remove-input"]
WEIGHTS = {"poisson-2d": (2, 64, 1), "heat": (2, 64, 1), "poisson-5d": (5, 64, 1)} | {
    "poisson-2d-deep": (2, 64, 64, 48, 48, 1)
}
POINTS = {"poisson-2d": 1020, "heat": 1020, "poisson-5d": 3500, "poisson-2d-deep": 1020}


def weights(sizes: tuple[int, ...]) -> int:
    return sum((a + 1) * b for a, b in zip(sizes[:-1], sizes[1:], strict=True))


table(
    ["problem", "weights", "points"],
    [[PROBLEMS[n], f"{weights(sizes):,}", f"{POINTS[n]:,}"] for n, sizes in WEIGHTS.items()],
)

# %% [markdown]
# Gauss-Newton, ENGD, SPRING and Hessian-free use the exact matrix $J^\top J$: the first three by a factorisation of
# $J^\top J + \lambda I$ or of the kernel, whichever is smaller, the last by conjugate gradients. Gauss-Newton and ENGD
# solve the same system; the first adapts $\lambda$ and takes the whole step or none, the second keeps $\lambda$ and
# searches along the line. SPRING is ENGD with momentum. `KFACKrylov` is KFAC\* with more directions: KFAC preconditions
# the exact model ([Chapter 27](27_pinn.py)).

# %% tags=["hide-input"] alt="Error against seconds of processor time for six methods, one panel for each problem, logarithmic axes, median of three seeds. (Without the benchmark's files, an empty picture.)" caption="Error against processor seconds, medians over three seeds, both axes logarithmic. With few weights a method with the exact matrix (green) ends lowest, on the deep network KFACKrylov does."
CURVES = {
    "Adam": ("C1", "-"),
    "Hessian-free": ("C2", ":"),
    "KFAC*": ("C0", "-"),
    "KFACKrylov": ("C0", "--"),
    "Gauss-Newton": ("C2", "-"),
    "ENGD": ("C2", "--"),
}


def at(run: dict, second: float) -> float:
    """The last error that was measured until then."""
    seen = [e for s, e in zip(run["seconds"], run["errors"], strict=True) if s <= second]
    return math.inf if not seen or seen[-1] is None else seen[-1]


times = [0.3 * 1.2**k for k in range(30)]
times = [t for t in times if t < 60] + [60.5]
fig, axes = plt.subplots(2, 2, figsize=(9.2, 6.4), layout="constrained")
for ax, (name, result) in zip(axes.flat, trained.items(), strict=False):
    ends: list[float] = []
    for method, (colour, line) in CURVES.items():
        runs = result["finals"].get(method, [])
        middle = [sorted(at(run, t) for run in runs)[len(runs) // 2] for t in times if runs]
        if not runs or not math.isfinite(middle[-1]):
            continue
        ax.loglog(times, middle, line, color=colour, linewidth=1.4)
        y = middle[-1]
        while any(abs(math.log(y / other)) < 0.55 for other in ends):
            y *= 1.12
        ends.append(y)
        ax.annotate(method, (64, y), color=colour, fontsize="x-small", va="center")
    ax.set(title=PROBLEMS[name], xlabel="processor seconds", ylabel="error", xlim=(0.3, 260))
for ax in axes.flat[len(trained) :]:
    ax.set_visible(False)
plt.show()

# %% [markdown]
# ## What the runs say
#
# Three seeds are too few for a sign test: even three wins of three have the probability 1/8 by chance. So the next cell
# calls a method *ahead* of another only if the worst of its three runs is better than the best of the other's. It
# compares the best method with the exact matrix, the best form of KFAC and the best of Adam and L-BFGS. The best of a
# group is the method with the lowest median of the same three runs, which favours it.

# %% tags=["hide-input"]
EXACT = ("Gauss-Newton", "ENGD", "SPRING", "Hessian-free")
FIRST = ("Adam", "L-BFGS")
KFACS = ("KFAC", "KFAC*", "KFACKrylov")


def span(result: dict, method: str) -> tuple[float, float]:
    errors = [math.inf if e is None else e for e in result["summary"][method]["errors"]]
    return min(errors), max(errors)


def ahead(result: dict, one: str, other: str) -> bool:
    return span(result, one)[1] < span(result, other)[0]


def compared(result: dict, one: str, other: str) -> str:
    if ahead(result, one, other):
        return "is ahead of"
    return "is behind" if ahead(result, other, one) else "overlaps with"


def lowest(result: dict, among: tuple[str, ...]) -> str:
    rows = result["summary"]
    return min(among, key=lambda m: rows[m]["median"] or math.inf)


for name, result in trained.items():
    best_exact, best_kfac, best_first = (lowest(result, of) for of in (EXACT, KFACS, FIRST))
    print(PROBLEMS[name])
    for one, other in ((best_exact, best_kfac), (best_kfac, best_first), ("KFACKrylov", "KFAC*")):
        print(f"    {one} {compared(result, one, other)} {other}")
    steps = {m: result["summary"][m]["steps"] for m in ("Gauss-Newton", "KFAC*", "Adam")}
    print("    median steps:", ", ".join(f"{m} {n:.0f}" for m, n in steps.items()))

few = [name for name in trained if name != "poisson-2d-deep"]  # the networks with few weights
for name in few:
    result = trained[name]
    assert all(ahead(result, lowest(result, EXACT), kfac) for kfac in KFACS)
    assert ahead(result, "KFACKrylov", "KFAC*")
    assert ahead(result, "KFAC*", "Adam")
    assert span(result, "KFAC*")[1] < span(result, "Adam")[0] / 4
if "heat" in trained:
    assert span(trained["heat"], "KFAC*")[1] < 1e-3
if few:
    text = f"""
- **Few weights** ({", ".join(PROBLEMS[name] for name in few)}): the exact matrix is small, and on each of these
  problems the best method with the exact matrix is ahead of all three forms of KFAC.
- **More directions**: `KFACKrylov`, which uses KFAC as the preconditioner of the exact model, is ahead of KFAC\\* on
  each of them, with fewer than half of its steps.
- **First order**: KFAC\\* is ahead of Adam on each of them.
- **Heat**: all three seeds of KFAC\\* end below 1e-3.
"""
    for name in few:
        steps = {m: trained[name]["summary"][m]["steps"] for m in ("KFACKrylov", "KFAC*")}
        assert steps["KFACKrylov"] < 0.5 * steps["KFAC*"]
    if "poisson-2d-deep" in trained:
        result = trained["poisson-2d-deep"]
        assert all(ahead(result, "KFACKrylov", m) for m in result["summary"] if m != "KFACKrylov")
        assert ahead(result, lowest(result, EXACT), "KFAC*")
        assert ahead(result, "KFAC*", "Adam")
        text += """
- **Many weights, few points** (Poisson, 2d, deep): `KFACKrylov` is ahead of all eight others. The kernel makes exact steps
  affordable here, and the best exact method is ahead of KFAC\\*. KFAC as the preconditioner of the exact model
  makes more steps in the same time than any of the exact methods.
"""
        steps = {m: result["summary"][m]["steps"] for m in ("KFACKrylov", *EXACT)}
        assert steps["KFACKrylov"] == max(steps.values())
else:
    text = NO_RESULTS
Markdown(text.strip())

# %% [markdown]
# A problem that is missing in the tables has no stored result yet;
# `python -m benchmarks.pinn_training --search --finals --missing` runs what is missing.
#
# ## Count first
#
# The costs of a step, for a network of $D$ weights in layers of width $h$, of which the largest layer has
# $D_\text{layer}$, and $N$ residuals:
#
# | | arithmetic | memory |
# | --- | --- | --- |
# | dense Gauss-Newton | $N D^2 + D^3 / 3$ | $N D + D^2$ |
# | kernel form | $N^2 D + N^3 / 3$ | $N D_\text{layer} + N^2$ |
# | KFAC\* | $c \, N S D + c' \sum h^3$ | $N S \sum h + \sum h^2$ |
#
# We take $c = 10$ (a forward and a reverse pass, two factors, three products with the Jacobian) and $c' = 20$
# (decompositions), which are rough. As long as $N \ll D$ and the decompositions are not the larger part, the ratio of
# the last two lines is [(28.1)]: the number of points and of coefficients decides, and not the size of the network.

# %%
NETS = [
    (2, 64, 1),
    (2, 64, 64, 48, 48, 1),
    (5, 256, 256, 128, 128, 1),
    (100, 768, 768, 512, 512, 1),
]


def operations(sizes: tuple[int, ...], N: int) -> tuple[float, float, float]:
    """Multiplications of a step: dense, by the kernel, and of KFAC*."""
    D, S = weights(sizes), sizes[0] + 2
    cubes = sum((a + 1) ** 3 + b**3 for a, b in zip(sizes[:-1], sizes[1:], strict=True))
    return N * D**2 + D**3 / 3, N**2 * D + N**3 / 3, 10 * N * S * D + 20 * cubes


print(f"{'D':>10} {'N':>7} {'dense':>14} {'kernel':>12} {'KFAC*':>9}   KFAC* steps per exact step")
ratio = {}
for sizes in NETS:
    D = weights(sizes)
    for N in (1_000, 30_000):
        per_step = operations(sizes, N)
        ratio[D, N] = min(per_step[:2]) / per_step[2]
        numbers = "".join(
            f"{c / 1e9:{width},.2f}" for c, width in zip(per_step, (15, 13, 10), strict=True)
        )
        print(f"{D:10,} {N:7,}{numbers} {ratio[D, N]:10.0f}")
print("(10^9 multiplications per step)")
assert all(r < 50 for (_, N), r in ratio.items() if N == 1_000)
assert max(ratio.values()) > 100

# %% [markdown]
# The runs above made fewer steps of KFAC\* for each exact step than these counts say. The counts have only products and
# decompositions of large matrices, and leave out all other work of a step. In a small network this other work can take
# a large part of the time.

# %% tags=["hide-input"] fold="Printed: KFAC* steps per exact step, counted and in the runs"
for name, result in trained.items():
    *exact, ours = operations(WEIGHTS[name], POINTS[name])
    made = {m: result["summary"][m]["steps"] for m in ("Gauss-Newton", "KFAC*")}
    counted, measured = min(exact) / ours, made["KFAC*"] / made["Gauss-Newton"]
    print(f"{PROBLEMS[name]:18} counted {counted:4.1f}, in the runs {measured:3.1f}")
    assert measured < counted

# %% [markdown]
# ## A run on this page
#
# This example is small enough for this page: 200 points inside, 60 on the boundary, 24 hidden units. Every method makes
# 40 steps, Adam 150. No settings are searched for, so that the example shows how the methods are called, and not which
# is better. `KFACKrylov` is the line with 20 directions.


# %%
def train(method, steps: int, seed: int = 0) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(seed)
    net, state, errors = mlp(2, 24, 1), None, []
    problem = poisson(2)
    draw = torch.Generator(torch.get_default_device()).manual_seed(seed)
    terms, test = problem.terms(200, 60, draw), problem.points(500, draw)
    for _ in range(steps):
        state = method.step(net, terms, state)
        errors.append(problem.error(net, test))
    return net, errors


class Adam:
    """Stochastic gradients, here of all points, as a method like the others."""

    def step(self, net: nn.Module, terms: list[Term], optimizer=None):
        optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=0.01)
        optimizer.zero_grad()
        pinn_loss(net, terms).backward()
        optimizer.step()
        return optimizer


example = {
    "Adam": (Adam(), 150),
    "KFAC*": (KFACStar(preconditioner=TermWise(0.6)), 40),
    "KFAC* per layer": (
        KFACStar(candidates=two_directions_per_layer, preconditioner=TermWise(0.6)),
        40,
    ),
    "KFAC*, 20 directions": (
        KFACKrylov(20, 1, 1e-8, preconditioner=TermWise(0.6, ekfac_inverse)),
        40,
    ),
    "Gauss-Newton": (GaussNewton(), 40),
}
runs = {name: train(*pair) for name, pair in example.items()}
for name, (_, errors) in runs.items():
    print(f"{name:20} error {errors[-1]:.1e} after {len(errors)} steps")
final = {name: errors[-1] for name, (_, errors) in runs.items()}
assert final["Gauss-Newton"] < final["KFAC*"] / 3
assert final["KFAC*"] < final["Adam"]


def steps_to(name: str, error: float) -> int:
    return next(i + 1 for i, e in enumerate(runs[name][1]) if e <= error)


needed = steps_to("Gauss-Newton", final["KFAC* per layer"])
print(f"Gauss-Newton is as far as KFAC* per layer after 40 steps in {needed} steps")
assert needed < 25

# %% tags=["hide-input"] alt="Three square panels over the unit square. The solution of the trained network is a single smooth bump. The error fields of Gauss-Newton and of KFAC star have patterns of both signs, with much smaller numbers for Gauss-Newton." caption="The solution, and two error fields $u - u^*$, each in its own colour scale: compare the numbers at the scales."
grid = torch.stack(
    torch.meshgrid(torch.linspace(0, 1, 60), torch.linspace(0, 1, 60), indexing="xy"), -1
)
with torch.no_grad():
    flat_grid = grid.view(-1, 2)
    truth = poisson(2).solution(flat_grid)
    fields = {"Gauss-Newton: $u$": runs["Gauss-Newton"][0](flat_grid)}
    for name in ("Gauss-Newton", "KFAC* per layer"):
        fields[f"{name}: error"] = runs[name][0](flat_grid) - truth
fig, axes = plt.subplots(1, 3, figsize=(9.4, 3.0), layout="constrained")
for ax, (title, f) in zip(axes, fields.items(), strict=True):
    end = f.abs().max().item()
    image = ax.imshow(
        f.view(60, 60).tolist(),
        cmap=diverging(),
        vmin=-end,
        vmax=end,
        origin="lower",
        extent=(0, 1, 0, 1),
    )
    ax.set(title=title, xticks=[0, 1], yticks=[0, 1])
    fig.colorbar(image, ax=ax, shrink=0.85)
plt.show()

# %% [markdown]
# ## Which preconditioner?
#
# Any approximation of [Chapter 27](27_pinn.py) can be the preconditioner of `KFACKrylov`. Here it is trained with each
# of them for ten seconds, with the settings of one search for all: `python -m benchmarks.pinn preconditioners`.

# %% tags=["hide-input"]
shorter = stored("pinn-preconditioners-cpu").get("rows", [])
errors = {(row["problem"], row["method"]): sorted(row["final"])[1] for row in shorter}
short = list(dict.fromkeys(problem for problem, _ in errors))
print(f"{'median error after 10 s':24}", *(f"{name:>16}" for name in short))
for kind in dict.fromkeys(kind for _, kind in errors):
    print(f"{kind:24}", *(f"{errors[name, kind]:16.1e}" for name in short))
for name in short:
    of_problem = {kind: error for (problem, kind), error in errors.items() if problem == name}
    worse = [of_problem.pop(f"{kind} of all terms") for kind in ("EKFAC", "KPSVD")]
    order = sorted(of_problem, key=of_problem.get)
    print(f"{name}, from the best:\n    {', '.join(order)}")
    assert min(worse) > 5 * of_problem[order[-1]]
    assert of_problem[order[-1]] < 10 * of_problem[order[0]]

# %% [markdown]
# Four of the six end within a factor of ten, and in a different order on each problem: TKFAC is first on the small
# network, and last of the four on the deep one. So none of these four is best on both problems. EKFAC of all terms and
# KPSVD are far behind on both problems. Yet both are nearer to the exact block of all terms than KFAC of all terms is,
# in Frobenius norm ([Chapter 14](14_ekfac.py), [Chapter 16](16_kpsvd.py)). A possible reason, which is not tested here,
# is that a small error in this norm says little about directions of small curvature.

# %% [markdown]
# ## Larger networks
#
# The same program has two larger problems, which run only by name: Poisson's equation in 5 dimensions with 117 thousand
# weights, and in 100 dimensions. The exact matrix of the first has $1.4 \cdot 10^{10}$ entries. Its kernel has $600^2$,
# since it has 600 points.

# %% tags=["hide-input"]
LARGER = {"poisson-5d-wide": "5d, wide", "poisson-100d": "100d"}
larger = {n: stored(f"pinn-training-{n}") for n in LARGER}
larger = {n: result for n, result in larger.items() if result.get("summary")}
table(
    ["median error", *(LARGER[n] for n in larger)],
    [
        [m, *(error_text(result["summary"][m]["median"]) for result in larger.values())]
        for m in next(iter(larger.values()))["summary"]
    ],
) if larger else Markdown("They have not been run: there is no stored result.")

# %% [markdown]
# ## What goes wrong in practice
#
# **What is compared with what.** Before you compare numbers of two papers, find out whether their errors are absolute
# or relative (divided by the root mean square of $u^*$), whether momentum acts on steps or on directions before the
# line search, and whether the time includes logging. The errors here are absolute.
#
# **An exact method in its slow form.** The published curves of exact methods for a network of ten thousand weights are
# made with the *dense* system. The table of operations above has both forms, at 9,873 weights and 1,000 points. The
# kernel gives the same step for a fraction of the operations.

# %%
dense, by_kernel, _ = operations((2, 64, 64, 48, 48, 1), 1000)
print(f"dense / kernel: {dense / by_kernel:.0f} times the operations")

# %% [markdown]
# **A search that is shorter than the run.** Trials here last a tenth of a final run. A setting that is slow at first
# and better in the end may not be found. The authors searched with runs of full length.
#
# ## The paper and this page
#
# | | [Dangel et al. (2024)](bibliography.md#pinns) | here |
# | --- | --- | --- |
# | search | [50 random settings](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/exp09_reproduce_poisson2d/sweeps/KFAC.yaml#L17) for each method and problem, 1000 s each | 6 for each, 6 s of processor time; then 3 seeds, 60 s |
# | machine | a GPU | one processor, one thread, float64 |
# | KFAC | [31 step lengths](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/line_search.py#L42) a step, the smallest loss is taken | powers of two from the last length on, until the loss rises |
# | momentum | [on directions](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/kfac.py#L645), before the line search | the same |
# | factors start from | [the identity](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/kfac.py#L312), in every tuned run | the same, written as a damping |
# | first step of KFAC\* | [a length of $10^{-6}$](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/kfac.py#L146) | the best length along the direction |
# | a step that raises the loss | is taken by KFAC\* | is halved |
# | SPRING | [a learning rate and a bound on the step's norm](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/spring.py#L242) | a line search |
# | headline | competes with the most expensive second-order methods on small problems; scales to larger networks and dimensions, where it outperforms first-order methods and L-BFGS | the table at the top of this page, four small problems; larger ones: above |
#
# The smallest loss of a list that contains NaN [is taken by
# `min`](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/line_search.py#L87)
# in that line search: [Chapter 27](27_pinn.py) shows what this can give.
#
# ## In one minute
#
# - The table at the top compares nine methods after equal numbers of trials and equal processor time, on fresh seeds.
# - With few weights, try a method with the exact matrix first: on three such problems the best of them was ahead of KFAC.
# - With few points, the kernel makes the exact step affordable for networks of many weights. By the count [(28.1)], a
#   step of KFAC\* is much cheaper if $N \gg 10\, S$. The runs showed a smaller saving than the counts.
# - The form of KFAC to try first is the preconditioner of the exact model, `KFACKrylov`. It was ahead of KFAC\* on all
#   four problems, and ahead of all other methods on the deep network.
#
# ## Exercises
#
# **Exercise 28.1.** Write the step of Gauss-Newton in the kernel's form yourself: given $J$ with one row for each
# residual, $\rho$ and $\lambda$, return $p$ with $(J^\top J + \lambda I)\, p = - J^\top \rho$, and never form a matrix
# of the size of $J^\top J$. The cell below checks `kernel_step`; replace its body by yours.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# `return -J.T @ torch.linalg.solve(J @ J.T + damping * torch.eye(len(J)), rho)`, by (27.10) of [Chapter 27](27_pinn.py).
#
# </details>


# %%
def kernel_step(J: torch.Tensor, rho: torch.Tensor, damping: float) -> torch.Tensor:
    return -J.T @ torch.linalg.solve(J @ J.T + damping * torch.eye(len(J)), rho)


J_, rho_ = torch.randn(20, 3000), torch.randn(20)
p_ = kernel_step(J_, rho_, 0.1)
left_ = J_.T @ (J_ @ p_) + 0.1 * p_ + J_.T @ rho_
assert left_.norm() < 1e-10 * (J_.T @ rho_).norm(), "this is not the damped Gauss-Newton step"
print("kernel_step is right")

# %% [markdown]
# **Exercise 28.2.** A problem in 100 dimensions has $N = 1000$ residuals. Which method has the cheaper step by
# [(28.1)], and by which factor? What changes if the Laplacian is estimated from 10 random directions?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $S = 102$, so the ratio is $1000 / 1020 \approx 1$: both steps cost about the same. With 10 directions in the place of
# 100 coordinates, $S = 12$, and the ratio is 8. The leading term of the kernel's cost does not contain $S$, as the rows
# of $J$ are summed over it.
#
# </details>
#
# ## Further reading
#
# [Dangel et al. (2024)](bibliography.md#pinns) compare SGD, Adam, L-BFGS, Hessian-free, ENGD, KFAC and KFAC\* on a GPU;
# their code is public. [Müller and Zeinhofer (2023)](bibliography.md#engd) introduce ENGD, [Guzmán-Cordero et al.
# (2025)](bibliography.md#engd-w) its kernel form with momentum, after [Goldshlager et al.
# (2024)](bibliography.md#spring).
