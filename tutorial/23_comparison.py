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
# # 23. Which one when: all methods side by side
#
# **Part V: Better and faster.** The nine chapters before this one explain some twenty methods. Which one should you
# use, and when does the choice matter?
#
# This chapter compares the methods in two ways. The first half applies them to the same trained networks with the same
# batch and the same damping. It measures quality by four numbers and counts the cost by formulas, without a clock.
# The second half compares stored training runs, in steps and in seconds. The guide at the end is made of these runs
# only.
#
# After this chapter you will be able to
#
# - say which of four numbers measures the quality of a step, and why the distance of matrices does not;
# - count what a method costs for the layers of your network;
# - choose a method, or KFAC, by runs in which every method had the same number of trials.

# %%
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Module, MSELoss, Sequential, Tanh
from torch.nn.functional import avg_pool2d

from kfac_scratch.approximations.brand import Brand
from kfac_scratch.approximations.cg_fac import cg_fac, truncated_inverse
from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.kfac import foof, kfac
from kfac_scratch.approximations.kpsvd import (
    ekpsvd,
    guarded_inverse,
    kfac_corrected,
    kpsvd,
    lanczos,
)
from kfac_scratch.approximations.mini_block import (
    mini_block,
    mini_block_filters,
    mini_block_rows,
    mini_block_shared,
)
from kfac_scratch.approximations.randomized import randomized
from kfac_scratch.approximations.skfac import skfac
from kfac_scratch.approximations.tekfac import tekfac
from kfac_scratch.approximations.tkfac import tkfac
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, set_up
from kfac_scratch.curvature import block_index, ggn
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import conjugate_gradient, eye_like
from kfac_scratch.matrices.damping import factored_inverse
from kfac_scratch.matrices.dense import Dense
from kfac_scratch.matrices.matrix import LinearMap, Matrix
from kfac_scratch.optimizer.coarse_spaces import krylov_space, nicolaides_space, residual_space
from kfac_scratch.optimizer.two_level import additive, adef2, coarse_inverse, joint_curvature
from kfac_scratch.show import RESULTS, Markdown

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"] fold="The stored runs"
TRAINED = {
    "T4": "a convolutional network, accuracy .98",
    "T3": "a deep autoencoder, squared error .40",
    "T2": "a graph network, accuracy .96",
    "wide": "layers of 1024, batch 64, accuracy .95",
    "deep": "16 layers, accuracy .95",
    "curves": "a second autoencoder, squared error 4.2",
}
trained_on = {}
for name in TRAINED:
    path = RESULTS / f"training-{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    if "kfac-expand" in stored.get("summary", {}) and "calls" in stored["finals"]["sgd"][0]:
        trained_on[name] = stored
if not trained_on:
    print("No results of the benchmark: this chapter shows them in a clone of the repository.")

# %% tags=["hide-input"] alt="Two panels with one row for each of eleven methods and up to three marks in a row, one for each task. Left the steps to the target, right the CPU seconds, both relative to KFAC's on a logarithmic axis. No row lies left of 1 on all its tasks in steps, and marks at the right edge are runs that miss the target." caption="Median steps and CPU seconds to a target, KFAC = 1 (Chapter 5's method in the optimizer of Chapter 11). T4: a convolutional network, T3: an autoencoder, T2: a graph network. Marks at the right edge missed the target. No method is left of 1 on all tasks in steps. Intervals and tests follow below."
ROWS = {
    "adamw": "AdamW",
    "sgd": "SGD",
    "no-curvature": "KFAC without curvature",
    "ekfac": "EKFAC",
    "tkfac": "TKFAC",
    "kpsvd": "KPSVD",
    "rs-kfac": "RS-KFAC",
    "skfac": "SKFAC",
    "two-level": "two-level",
    "soap": "SOAP",
    "muon": "Muon",
}
if {"T2", "T3", "T4"} <= set(trained_on):
    fig, axes = plt.subplots(1, 2, figsize=(8.6, 4.2), layout="constrained", sharey=True)
    for ax, key, what in zip(axes, ("steps", "cpu"), ("steps", "CPU seconds"), strict=True):
        for k, (task, marker) in enumerate((("T4", "o"), ("T3", "s"), ("T2", "^"))):
            medians = trained_on[task]["summary"]
            for y, name in enumerate(ROWS):
                if name in medians:
                    value = medians[name][key]
                    at = value / medians["kfac-expand"][key] if value else 9
                    style = {"color": f"C{k}", "label": task if y == 0 else None}
                    style["markerfacecolor"] = f"C{k}" if value else "none"
                    ax.plot(at, y + 0.2 * (k - 1), marker, markersize=6, clip_on=False, **style)
        ax.axvline(1, linestyle=":", linewidth=1, color=ax.xaxis.label.get_color())
        ax.set(xscale="log", xlim=(0.3, 9), xlabel=f"{what}, KFAC = 1")
        ax.set_xticks([0.5, 1, 2, 4, 9], labels=["½", "1", "2", "4", "missed"])
        ax.minorticks_off()
        ax.grid(axis="y", alpha=0.2)
    axes[0].set_yticks(range(len(ROWS)), ROWS.values())
    axes[0].invert_yaxis()
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    plt.show()
    for name in ROWS:
        of = [s["summary"] for s in trained_on.values() if name in s["summary"]]
        ratios = [(m[name]["steps"] or math.inf) / m["kfac-expand"]["steps"] for m in of]
        assert max(ratios) >= 1, name

# %% [markdown]
# ## What is compared
#
# A method is two choices: a matrix for each layer, from its inputs and vectors, and a damped inverse of
# it. Most matrices have an exact damped inverse. Sums of two products are damped by factors, and guarded
# against negative eigenvalues ([Chapter 16](16_kpsvd.py)). CG-FAC stops after a few steps. KFAC is listed
# with both dampings of [Chapter 9](09_damping.py), so that the effect of the damping can be separated from
# the effect of the matrix.


# %%
def exactly(M: Matrix, damping: float) -> LinearMap:
    return M.inverse(damping)


def single(io: LayerIO) -> Matrix:
    return mini_block_filters(1)(io)


def exact_block(io: LayerIO) -> Dense:
    return Dense(io.block())


few = partial(truncated_inverse, max_iter=5, tol=0.0)
many = partial(truncated_inverse, max_iter=20, tol=0.0)

METHODS: dict[str, tuple[Callable[[LayerIO], Matrix], Callable[[Matrix, float], LinearMap]]] = {
    "diagonal": (single, exactly),
    "FOOF": (foof, exactly),
    "mini-block, shared": (mini_block_shared, exactly),
    "KFAC, factored damping": (kfac, factored_inverse),
    "KFAC": (kfac, exactly),
    "RS-KFAC, rank 4": (randomized(4, oversampling=2), exactly),
    "RS-KFAC, rank 8": (randomized(8, oversampling=2), exactly),
    "TKFAC": (tkfac, exactly),
    "KPSVD": (kpsvd, exactly),
    "EKFAC": (ekfac, exactly),
    "TEKFAC": (tekfac, exactly),
    "KPSVD's basis": (ekpsvd, exactly),
    "Lanczos, two products": (lanczos, guarded_inverse),
    "KFAC-CORRECTED": (kfac_corrected, guarded_inverse),
    "mini-block": (mini_block, exactly),
    "CG-FAC, 5 steps": (cg_fac, few),
    "CG-FAC, 20 steps": (cg_fac, many),
    "exact block": (exact_block, exactly),
}

# %% [markdown]
# Three methods are missing because they would repeat a row. SKFAC computes KFAC's step with factored
# damping without KFAC's matrix ([Chapter 17](17_skfac.py)). Mini-blocks by their rows give the step of mini-blocks
# ([Chapter 20](20_mini_block.py)). B-KFAC follows a stream of batches, and after one batch it equals KFAC. The three
# methods differ in cost, and the table of costs below has them.

# %% tags=["hide-input"] fold="Checked: SKFAC, mini-blocks by rows and B-KFAC repeat a row"
io, V = LayerIO(torch.randn(9, 1, 12), torch.randn(1, 9, 1, 11)), torch.randn(11, 12)
pairs = {
    "SKFAC": (factored_inverse(skfac(io), 0.1), factored_inverse(kfac(io), 0.1)),
    "mini-block by rows": (mini_block_rows(io).inverse(0.1), mini_block(io).inverse(0.1)),
    "B-KFAC, one batch": (Brand(rank=9).update(None, io, 1.0).inverse(0.1), kfac(io).inverse(0.1)),
}
for name, (one, other) in pairs.items():
    assert ((one @ V) - (other @ V)).abs().max() < 1e-10 * (other @ V).abs().max(), name

# %% [markdown]
# ### Four numbers
#
# Let $F$ be the exact block of a layer, $M$ the method's matrix, $P$ its damped inverse, $h$ the layer's gradient,
# and $F_\delta = F + \delta I$. The four numbers are
#
# 1. the relative distance of the matrices, $\lVert M - F \rVert / \lVert F \rVert$, the subject of most
#    theorems;
# 2. that of the damped inverses, $\lVert P - F_\delta^{-1} \rVert / \lVert F_\delta^{-1} \rVert$;
# 3. the share of the possible decrease of the layer's damped quadratic model that is reached along $p = P h$ with the
#    best length, [(20.4)];
# 4. the same for the whole network, with its exact curvature between layers, along all layers' steps together, as in
#    [Chapter 22](22_two_level.py). Here exact blocks do not reach 1, because they leave out the curvature between
#    layers.
#
# There are two tasks with three seeds each. A classifier of digits has softmax and cross-entropy, and an autoencoder
# reconstructs them with squared error. All layers of a network have the same damping, 1 % of the mean eigenvalue of
# its GGN. The batch has 400 images that were not trained on.

# %% tags=["hide-input"] fold="Two tasks, and networks trained on them"
digits = load_digits()
small = avg_pool2d(torch.tensor(digits.images) / 16, 2).flatten(1)  # 4 by 4 pixels
TASKS = {
    "classifier": (CrossEntropyLoss(), torch.tensor(digits.target), (16, 12, 12, 10)),
    "autoencoder": (MSELoss(), small, (16, 12, 5, 12, 16)),
}


@dataclass(frozen=True)
class Problem:
    """A network on a batch: layers, exact curvature, gradient."""

    ios: dict[str, LayerIO]
    index: dict[str, Tensor]
    F: Tensor  # damped
    h: Tensor
    delta: float
    blocks: dict[str, tuple[Tensor, Tensor]]  # of every layer: F, and its damped inverse

    def share(self, p: Tensor) -> float:
        best = self.h @ torch.linalg.solve(self.F, self.h)
        return ((self.h @ p) ** 2 / (p @ self.F @ p) / best).item()

    def split(self, v: Tensor) -> dict[str, Tensor]:
        return {name: v[i] for name, i in self.index.items()}

    def joined(self, layers: dict[str, Tensor]) -> Tensor:
        v = torch.zeros_like(self.h)
        for name, i in self.index.items():
            v[i] = layers[name]
        return v


def trained(task: str, seed: int, steps: int = 250) -> Problem:
    loss, targets, widths = TASKS[task]
    torch.manual_seed(seed)
    layers: list[Module] = []
    for d_in, d_out in zip(widths[:-1], widths[1:], strict=True):
        layers += [Linear(d_in, d_out), Tanh()]
    model, order = Sequential(*layers[:-1]), torch.randperm(len(small))
    X, y = small[order], targets[order]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(steps):
        batch = torch.randint(1000, (100,))
        optimizer.zero_grad()
        loss(model(X[batch]), y[batch]).backward()
        optimizer.step()
    X, y = X[1000:1400], y[1000:1400]
    gradient = torch.autograd.grad(loss(model(X), y), list(model.parameters()))
    h, parts = (
        torch.cat([g.flatten() for g in gradient]),
        zip(X.split(50), y.split(50), strict=True),
    )
    F = torch.stack([ggn(model, loss, *part) for part in parts]).mean(0)  # with less memory at once
    ios, index = layer_ios(model, loss, X, y), block_index(model)
    return damped(F, h, ios, index, 0.01 * F.diagonal().mean().item())


def damped(F: Tensor, h: Tensor, ios: dict, index: dict, delta: float) -> Problem:
    blocks = {name: io.block() for name, io in ios.items()}
    both = {name: (B, torch.linalg.inv(B + delta * eye_like(B))) for name, B in blocks.items()}
    return Problem(ios, index, F + delta * eye_like(F), h, delta, both)


# %% tags=["hide-input"] fold="The four numbers of every method"
def dense(P: LinearMap, like: Tensor) -> Tensor:
    eye = torch.eye(like.numel()).unflatten(1, like.shape)
    return (P @ eye).flatten(1)


def measure(problem: Problem, matrix: Callable, inverse: Callable) -> tuple[Tensor, float]:
    """Three numbers for each layer, and the share of the network."""
    rows, p = [], {}
    for name, h in problem.split(problem.h).items():
        F, exact = problem.blocks[name]
        M = matrix(problem.ios[name])
        P = inverse(M, problem.delta)
        p[name] = P @ h
        v, q = h.flatten(), p[name].flatten()
        reached = (v @ q) ** 2 / (q @ (F @ q + problem.delta * q)) / (v @ exact @ v)
        distance, of_inverse = torch.zeros(()), torch.tensor(float("nan"))
        if matrix is not cg_fac:  # the exact block, whose inverse by a few steps is no linear map
            distance = (M.dense() - F).norm() / F.norm()
            of_inverse = (dense(P, h) - exact).norm() / exact.norm()
        rows.append(torch.stack([distance, of_inverse, reached]).cpu())
    return torch.stack(rows), problem.share(problem.joined(p))


SEEDS = range(3)
problems = {task: [trained(task, seed) for seed in SEEDS] for task in TASKS}
measured = {
    (task, name): [measure(problem, *method) for problem in problems[task]]
    for task in TASKS
    for name, method in METHODS.items()
}

# %% [markdown]
# The methods of [Chapter 22](22_two_level.py) add a second level to KFAC, so only the fourth number applies to them.
# For comparison there are conjugate gradients for the whole network, preconditioned by KFAC, with two products.


# %% tags=["hide-input"] fold="The share of methods for the whole network"
def two_level_share(problem: Problem, combine: Callable, space: Callable) -> float:
    maps = {name: kfac(io).inverse(problem.delta) for name, io in problem.ios.items()}
    r, F = problem.split(problem.h), joint_curvature(problem.ios, problem.delta)
    Q = coarse_inverse(problem.ios, space(maps, r), problem.delta)

    def fine(x: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: maps[name] @ v for name, v in x.items()}

    return problem.share(problem.joined(combine(fine, F, Q)(r)))


def cg_share(problem: Problem, steps: int = 2) -> float:
    maps = {name: kfac(io).inverse(problem.delta) for name, io in problem.ios.items()}

    def fine(row: Tensor) -> Tensor:
        layers = problem.split(row.flatten())
        return problem.joined({name: maps[name] @ v for name, v in layers.items()}).reshape(1, -1)

    row = conjugate_gradient(lambda x: x @ problem.F, problem.h.reshape(1, -1), fine, steps, 0.0)
    return problem.share(row.flatten())


NETWORK = {
    "two-level, ones": partial(two_level_share, combine=additive, space=nicolaides_space),
    "two-level, fine steps": partial(two_level_share, combine=adef2, space=residual_space),
    "two-level, fine steps twice": partial(
        two_level_share, combine=adef2, space=krylov_space(residual_space)
    ),
    "KFAC and 2 steps of CG": cg_share,
}
network = {
    (task, name): torch.tensor([share(problem) for problem in problems[task]], device="cpu")
    for task in TASKS
    for name, share in NETWORK.items()
}

# %% tags=["hide-input"] fold="Printed: four numbers for every method, with deviations over three seeds"
for task in TASKS:
    print(f"{task:26} matrix     inverse       share     network")
    for name in METHODS:
        per_seed = [(layers.mean(0), share) for layers, share in measured[task, name]]
        layers = torch.stack([layers for layers, _ in per_seed])
        network[task, name] = torch.tensor([share for _, share in per_seed], device="cpu")
        four = torch.cat([layers, network[task, name][:, None]], 1)
        numbers = zip(four.mean(0).tolist(), four.std(0).tolist(), strict=True)
        cells = ("        –  " if m != m else f"{m:5.2f} ± {s:.2f}" for m, s in numbers)
        print(f"{name:23}", *cells)
    for name in NETWORK:
        values = network[task, name]
        print(f"{name:59} {values.mean():5.2f} ± {values.std():.2f}")
    print()

# %% [markdown]
# ## What the numbers say
#
# **The loss decides how much there is to gain.** With squared error, the loss Hessian is the same for all
# data. Only the Jacobians of the network vary between data, and here they vary little: $F$ is a
# Kronecker product up to a few percent, even after training. KFAC is sufficient there, and refinements
# of the matrix give the same numbers. With softmax, a datum that the network has learned has almost no curvature. Then
# inputs and vectors are correlated, KFAC is off by one half, and methods differ.


# %% tags=["hide-input"] fold="Checked: products are near for the autoencoder, and far for the classifier"
def mean(task: str, name: str, k: int) -> float:
    """Mean over layers and seeds of distance (0), distance of the inverse (1) or share (2)."""
    return torch.stack([layers[:, k].mean() for layers, _ in measured[task, name]]).mean().item()


products = ("KFAC", "TKFAC", "KPSVD", "EKFAC", "TEKFAC", "KPSVD's basis")
for name in products:
    assert mean("autoencoder", name, 0) < 0.1
    assert mean("autoencoder", name, 2) > 0.9
    assert mean("classifier", name, 0) > 0.2
    assert mean("classifier", name, 2) < 0.75

# %% [markdown]
# **Theorems about distance hold, and say little about the step.** KPSVD is nearer than TKFAC and KFAC, corrected
# eigenvalues are nearer than the product whose basis they use, and two products are nearer than one. The next cell
# asserts this for every layer of the classifier and every seed. In the third column of the classifier, the mini-block
# Fisher has the largest share of all approximate matrices, and one of the larger distances. The cell also takes all
# pairs of methods on one layer, and counts the pairs in which the nearer matrix has the worse step.


# %% tags=["hide-input"] fold="Counted: pairs in which the nearer matrix has the worse step"
def inversions(task: str, k: int) -> float:
    """Share of pairs in which the smaller distance goes with the smaller decrease."""
    names = [n for n in METHODS if "CG" not in n and n != "exact block"]
    rows = torch.stack([torch.cat([x for x, _ in measured[task, n]]) for n in names])
    wrong = total = 0
    for i, j in combinations(range(len(names)), 2):
        nearer = rows[i, :, k] - rows[j, :, k]
        better = rows[i, :, 2] - rows[j, :, 2]
        wrong, total = wrong + int((nearer * better > 0).sum()), total + rows.shape[1]
    return wrong / total


for task in TASKS:
    by_matrix, by_inverse = inversions(task, 0), inversions(task, 1)
    print(f"{task:12} the nearer matrix has the worse step in {by_matrix:.0%} of all pairs,")
    print(f"{'':12} the nearer damped inverse in {by_inverse:.0%}")
    assert 0.05 < by_matrix < 0.5
    assert by_inverse < by_matrix + 0.1

for seed in SEEDS:
    at = {name: measured["classifier", name][seed][0] for name in METHODS}
    for nearer, farther in (
        ("KPSVD", "TKFAC"),
        ("KPSVD", "KFAC"),
        ("EKFAC", "KFAC"),
        ("TEKFAC", "TKFAC"),
        ("KPSVD's basis", "KPSVD"),
        ("Lanczos, two products", "KPSVD"),
        ("KFAC-CORRECTED", "KFAC"),
        ("mini-block", "diagonal"),
        ("mini-block", "mini-block, shared"),
    ):
        assert (at[nearer][:, 0] <= at[farther][:, 0] + 1e-9).all()
    assert at["mini-block"][:, 0].mean() > at["KFAC"][:, 0].mean()
    assert at["mini-block"][:, 2].mean() > at["TEKFAC"][:, 2].mean() + 0.02

# %% [markdown]
# **Damping is a part of the method.** The two rows of KFAC have the same matrix. The error of the inverse that
# factored damping adds is larger than what any refinement of the matrix removes, and factored damping reduces the
# share of the step in both tasks. Sums of two products use factored damping. They should be compared with the row of
# KFAC with factored damping.

# %% tags=["hide-input"] fold="Checked: factored damping has the farther inverse and the worse step"
for task in TASKS:
    factored, exact = "KFAC, factored damping", "KFAC"
    assert mean(task, factored, 1) > mean(task, exact, 1) + 0.1
    assert mean(task, factored, 2) < mean(task, exact, 2)
    for name in ("Lanczos, two products", "KFAC-CORRECTED"):
        assert mean(task, name, 0) < mean(task, exact, 0)
        assert mean(task, name, 1) > mean(task, exact, 1) + 0.1

# %% [markdown]
# **Solving for one right-hand side is easier than approximating a matrix.** Twenty steps of CG build no
# matrix, and reach the share of the exact block within a tenth in both tasks. Five steps are not enough.
#
# **A second level helps where the blocks are already good.** In the classifier, exact blocks would gain much over KFAC,
# and the second level gains little. In the autoencoder, blocks are nearly exact, and only the coupling between layers
# is missing. There one length per layer ([Theorem 22.2]) gains more than exact blocks would, and a second direction
# adds little. A coarse space of ones gains nothing in either task. The cell prints what the second level with fine
# steps adds to KFAC's share.

# %% tags=["hide-input"] fold="Checked: CG-FAC, two-level methods and exact blocks"
share = {key: values.mean().item() for key, values in network.items()}
for task in TASKS:
    assert share[task, "CG-FAC, 20 steps"] > share[task, "exact block"] - 0.1
    assert share[task, "CG-FAC, 5 steps"] < share[task, "CG-FAC, 20 steps"] - 0.05
    assert abs(share[task, "two-level, ones"] - share[task, "KFAC"]) < 0.1
gain = {task: share[task, "two-level, fine steps"] - share[task, "KFAC"] for task in TASKS}
print("added by a second level:", *(f"{task} {value:.2f}" for task, value in gain.items()))
assert gain["autoencoder"] > 0.08 > gain["classifier"]
assert share["autoencoder", "two-level, fine steps"] > share["autoencoder", "exact block"]

# %% [markdown]
# ### Another damping
#
# One percent of the mean eigenvalue is a choice. The next table has a tenth of it and ten times more, for the layers
# of the classifier and two of the three seeds:

# %% tags=["hide-input"] fold="Printed: shares under three dampings"
watched = ("KFAC, factored damping", "KFAC", "TEKFAC", "mini-block")
shares: dict[str, list[float]] = {name: [] for name in watched}
for times in (0.1, 1.0, 10.0):
    changed = [
        damped(p.F - p.delta * eye_like(p.F), p.h, p.ios, p.index, times * p.delta)
        for p in problems["classifier"][:2]
    ]
    for name in watched:
        rows = torch.cat([measure(problem, *METHODS[name])[0] for problem in changed])
        shares[name].append(rows[:, 2].mean().item())
print(f"{'share per layer, at':24}    0.1%    1.0%   10.0%")
for name, values in shares.items():
    print(f"{name:24}", *(f"{value:7.2f}" for value in values))
for k in range(3):
    assert shares["mini-block"][k] > shares["KFAC"][k]
assert all(values == sorted(values) for values in shares.values())

# %% [markdown]
# With more damping, all shares rise and the methods become more alike, because every method represents the identity
# exactly. Mini-blocks stay ahead of KFAC.
#
# ## What it costs
#
# Seconds depend on the machine, so this section counts operations. A product of an $m \times k$ with a $k \times n$
# matrix takes $2 m k n$ operations, a symmetric eigendecomposition about $9 d^3$, a Cholesky inverse $d^3$, a Cholesky
# factorisation $\tfrac13 d^3$ (Golub and Van Loan). Only these leading terms are kept. $K = V N$ is the number of
# vectors, and the numbers *kept* are those that live from step to step, without the weights.


# %% tags=["hide-input"] fold="Operations and numbers kept, by method"
def mul(m: float, k: float, n: float) -> float:
    return 2 * m * k * n


@dataclass(frozen=True)
class Cost:
    """Numbers kept, and operations for new statistics, a new inverse, and one step."""

    kept: float
    update: float
    inverse: float
    step: float


def costs(d_in: int, d_out: int, N: int, K: int, r: int) -> dict[str, Cost]:
    D, both = d_in * d_out, d_in**2 + d_out**2
    grams = mul(d_in, N, d_in) + mul(d_out, K, d_out)
    eigen = 9 * (d_in**3 + d_out**3)
    sides = mul(d_out, d_out, d_in) + mul(d_out, d_in, d_in)  # multiply from both sides
    moments = mul(N, d_in, d_in) + mul(K, d_out, d_out) + mul(d_out, K, d_in)
    product = 2 * mul(N, d_in, d_out)  # with the exact block, for one vector per datum
    q, narrow = r + 10, 2 * (mul(d_out, r, d_in) + mul(d_in, r, d_out))
    sketch = 4 * mul(1, q, both)
    tracked = r + K
    return {
        "diagonal": Cost(D, mul(d_out, K, d_in), D, D),
        "FOOF": Cost(d_in**2, mul(d_in, N, d_in), d_in**3, mul(d_out, d_in, d_in)),
        "mini-block, shared": Cost(d_in**2, mul(d_in, N, d_in), d_in**3, mul(d_out, d_in, d_in)),
        "KFAC, factored damping": Cost(2 * both, grams, d_in**3 + d_out**3, sides),
        "KFAC": Cost(2 * both, grams, eigen, 2 * sides),
        "TKFAC": Cost(2 * both, grams, eigen, 2 * sides),
        "KPSVD": Cost(2 * both, 18 * grams, eigen, 2 * sides),  # as counted in Chapter 16
        "EKFAC": Cost(2 * both + D, grams + moments, eigen, 2 * sides),
        "TEKFAC": Cost(2 * both + D, grams + moments, eigen, 2 * sides),
        "Lanczos, two products": Cost(6 * both, 24 * grams, 2 * eigen, 2 * sides),
        "RS-KFAC": Cost(both + r * (d_in + d_out), grams, sketch, narrow),
        "B-KFAC": Cost(
            tracked * (d_in + d_out),
            3 * mul(d_in + d_out, tracked, tracked) + 2 * 9 * tracked**3,
            0,
            2 * (mul(d_out, tracked, d_in) + mul(d_in, tracked, d_out)),
        ),
        "B-KFAC, step on rows": Cost(
            tracked * (d_in + d_out),
            3 * mul(d_in + d_out, tracked, tracked) + 2 * 9 * tracked**3,
            0,
            2 * mul(K, tracked, d_in + d_out),
        ),
        "SKFAC": Cost(
            N * d_in + K * d_out,
            0,
            mul(N, d_in, N) + mul(K, d_out, K) + (N**3 + K**3) / 3,
            2 * (mul(d_out, d_in, N) + mul(d_in, d_out, K)),
        ),
        "mini-block": Cost(
            2 * d_out * d_in**2, d_out * mul(d_in, N, d_in), d_out * d_in**3, mul(d_out, d_in, d_in)
        ),
        "mini-block by rows": Cost(
            N * (d_in + d_out) + d_out * N**2,
            0,
            mul(N, d_in, N) + d_out * N**3 / 3,
            2 * mul(d_out, d_in, N) + mul(d_out, N, N),
        ),
        "CG-FAC, 20 steps": Cost(N * d_in + K * d_out, 0, 0, 20 * product),
        "two-level, fine steps twice": Cost(
            2 * both + N * d_in + K * d_out, grams, eigen, 4 * sides + 2 * product
        ),
        "KFAC and 2 steps of CG": Cost(
            2 * both + N * d_in + K * d_out, grams, eigen, 4 * sides + 2 * product
        ),
    }


# %% [markdown]
# The cost of training itself is the unit: forward and backward pass of the layer take three products,
# $6 N d_\text{in} d_\text{out}$. The layer has 1024 inputs and outputs, the batch 256 data with one vector each, and
# the rank of low-rank methods is 64. There are new statistics every 10 steps and a new inverse every 100. SKFAC,
# mini-blocks by rows and CG-FAC use one batch only, and every new batch brings new rows. So their inverse is counted
# at every tenth step.

# %% tags=["hide-input"] fold="Printed: the cost of every method for one layer"
d_in, d_out, N = 1024, 1024, 256
unit = 6 * N * d_in * d_out
table = costs(d_in, d_out, N, K=N, r=64)
one_batch = ("SKFAC", "mini-block by rows", "CG-FAC, 20 steps")


def per_step(name: str) -> float:
    cost = table[name]
    every = 10 if name in one_batch else 100
    return (cost.update / 10 + cost.inverse / every + cost.step) / unit


print(f"{'':28}{'kept':>9} {'update':>9} {'inverse':>9} {'step':>8} {'per step':>9}")
for name, cost in table.items():
    numbers = (cost.update / unit, cost.inverse / unit, cost.step / unit, per_step(name))
    print(f"{name:28}{cost.kept / (d_in * d_out):8.1f}×", *(f"{x:9.2f}" for x in numbers))
assert per_step("RS-KFAC") < 0.25 * per_step("KFAC")
assert table["B-KFAC, step on rows"].step < 0.3 * table["B-KFAC"].step
assert per_step("mini-block") > 5 * per_step("KFAC")
assert per_step("mini-block by rows") < 0.05 * per_step("mini-block")

# %% [markdown]
# *Kept* is in units of the layer's weights, the others in passes through the layer.
# With a batch smaller than the layer is wide, KFAC's *step* costs more than its statistics: four products
# with full matrices, for the exact damping, two for the factored one. Low-rank methods save these products. B-KFAC has
# two rows. In the first, its step starts from the gradient as a matrix, as in the optimizer of this package. In the
# second, the step starts from the rows whose product the gradient is, as in the paper for fully connected layers, and
# costs less than a third. Full mini-blocks are too expensive for such a layer. By rows a step costs less than a
# twentieth of that. EKFAC costs little more than KFAC. Two levels and two steps of CG cost the same. These counts
# ignore the hardware: eigendecompositions use a GPU badly, and many small Cholesky factorisations at once use it
# well.
#
# ## One picture

# %% tags=["hide-input"] fold="Code of the figure" alt="Two scatter plots, classifier and autoencoder, of the share of the possible decrease of the whole network against the cost per step on a logarithmic axis, with error bars over seeds. In the classifier, all Kronecker methods lie near one third, mini-block near 0.44 at about a hundred times the cost, two steps of CG near 0.5 and CG-FAC near 0.7. In the autoencoder, KFAC, TKFAC and EKFAC lie near 0.7 together with CG-FAC, mini-block at 0.45, and two-level with fine steps twice and two steps of CG are the highest, above 0.8." caption="Share of the whole network's possible decrease, against the cost per step in passes through a layer of 1024 by 1024, from the table. Bars: three seeds. The order of the methods depends on the loss."
shown = {
    "diagonal": "diagonal",
    "FOOF": "FOOF",
    "mini-block, shared": "mini-block, shared",
    "KFAC, factored damping": "KFAC, factored damping",
    "RS-KFAC, rank 8": "RS-KFAC",
    "KFAC": "KFAC",
    "TEKFAC": "TEKFAC",
    "mini-block": "mini-block",
    "CG-FAC, 20 steps": "CG-FAC, 20 steps",
    "two-level, fine steps twice": "two-level, fine steps twice",
    "KFAC and 2 steps of CG": "KFAC and 2 steps of CG",
}
fig, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained", sharey=True)
for ax, task in zip(axes, TASKS, strict=True):
    for k, (name, priced) in enumerate(shown.items()):
        values, style = network[task, name], {"fmt": "os^"[k // 5], "color": f"C{k % 5}"}
        ax.errorbar(per_step(priced), values.mean(), values.std(), label=name, capsize=2, **style)
    exact = network[task, "exact block"].mean()
    ax.axhline(exact, linestyle="--", linewidth=0.8, color=ax.xaxis.label.get_color())
    ax.set(xscale="log", xlabel="cost per step, in passes", title=task, ylim=(0, 1))
axes[0].text(
    per_step("diagonal"),
    network["classifier", "exact block"].mean() + 0.015,
    "exact blocks",
    fontsize="small",
)
axes[0].set_ylabel("share of the possible decrease")
fig.legend(
    *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small"
)
plt.show()

# %% [markdown]
# ## In training
#
# In training, a learning rate, a schedule, an average and a damping matter besides the matrix. `benchmarks/training.py`
# puts every method into the optimizer of [Chapter 11](11_averages.py), with the length of each layer's step from Adam.
# Three rules make the comparison fair:
#
# - **Equal trials.** On a task every method gets the same number of settings to try, the same budget of steps and the
#   same schedules. All trials are stored. Settings are searched on some seeds; the numbers are from others.
# - **Controls.** If a method that averages over a window and damps factors were compared with a KFAC that does
#   neither, the comparison would measure the average and the damping. So KFAC is searched for under all six
#   combinations of an average (newest batch, a window of five, moving) and a damping (exact, factored). Further
#   controls are KFAC whose search may choose both (`kfac-expand`), KFAC's optimizer without curvature, SGD and AdamW.
# - **Counted calls.** Every run counts calls of the functions that make the method. A rank above every width, for
#   example, makes RS-KFAC the same as KFAC; such a run counts as a miss.
#
# `python -m benchmarks.training --check` checks what is stored against these rules, and so does a test. `kpsvd` and
# the sums of two products `deflation`, `lanczos` and `kfac-corrected` are from [Chapter 16](16_kpsvd.py), `sre-kfac`
# is from [Chapter 18](18_randomized.py), and `soap`, `shampoo` and `muon` are from [Chapter 25](25_relatives.py).
#
# The task `wide` has two layers with 1025 inputs, and a batch of 64. Its target was lowered once, before any of the final
# runs: in a first search, with an accuracy of .97 as target and fewer trials, KFAC and SGD had no hit.


# %% tags=["hide-input"] fold="Printed: settings and medians of every method"
def number(value: float | None, digits: int) -> str:
    return "—" if value is None else f"{value:.{digits}f}"


def setting(config: dict) -> str:
    """The average and the damping that a search ended with, as far as it had a choice."""
    return f"{config.get('average', '')} {config.get('inverse', '')}".strip()


for task, stored in trained_on.items():
    trials = len(stored["search"]["sgd"]["trials"])
    seeds = len(stored["finals"]["sgd"])
    print(f"{task}: {TRAINED[task]}; {trials} trials each, {seeds} final seeds")
    print(f"    {'':24}{'chosen':18} hits   steps [90 %]          CPU seconds [90 %]")
    for name, row in sorted(
        stored["summary"].items(), key=lambda item: item[1]["steps"] or math.inf
    ):
        chosen = setting(stored["search"][name]["winner"])
        steps, cpu = (
            f"{number(row[key], n)} [{', '.join(number(v, n) for v in row[f'{key}_interval'])}]"
            for key, n in (("steps", 0), ("cpu", 2))
        )
        print(f"    {name:24}{chosen:18} {row['hits']}/{seeds}    {steps:22} {cpu}")
    print()

# %% [markdown]
# Medians, with an interval that holds the median at a confidence of at least 90 %. The next cell tests whether a method
# is better than KFAC. It compares each method with two searches for KFAC: its control, which is KFAC under the same
# average and damping where the task has it, and KFAC that may choose. One search is not sufficient: the six controls
# and KFAC that may choose are one method, and on T3 their medians differ by nearly a factor of two. Runs are pairs: the
# same seed gives the same start and the same batches. A method is "ahead" if it wins so many pairs that a fair coin
# would do as well in at most one of twenty trials, against both; "behind" if it loses so many to both. With this many
# comparisons, some verdicts are to be expected by chance.

# %% tags=["hide-input"] fold="Tested: which method is ahead of KFAC, and which behind"


def coin(wins: int, losses: int) -> float:
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / 2**n


SUMS = ("deflation", "lanczos", "kfac-corrected")  # damped by factors, guarded
GRADIENTS = ("sgd", "adamw", "soap", "shampoo", "muon")
AVERAGED = {"skfac": "window", "lanczos": "newest", "kfac-corrected": "newest", "cg-fac": "newest"}


def control(stored: dict, name: str) -> str:
    """KFAC under the average and the damping of a method, where the task has it."""
    if name == "two-level" and "kfac, two lengths" in stored["finals"]:
        return "kfac, two lengths"  # which may choose the length of the network, as it may
    config = stored["search"][name]["winner"]
    average = config.get("average", AVERAGED.get(name, "moving"))
    damping = config.get("inverse", "factored" if name in SUMS else "exact")
    same = f"kfac, {average}, {damping}"
    return same if same in stored["finals"] and name not in GRADIENTS else "kfac-expand"


verdicts: dict[tuple[str, str, str], str] = {}
for task, stored in trained_on.items():
    for key in ("steps", "cpu"):
        found: dict[str, list[str]] = {"ahead": [], "behind": []}
        for name, runs in stored["finals"].items():
            if name.startswith("kfac") and "corrected" not in name:
                continue
            against = set()
            for rival in {control(stored, name), "kfac-expand"}:
                pairs = [
                    tuple(math.inf if run[key] is None else run[key] for run in pair)
                    for pair in zip(runs, stored["finals"][rival], strict=True)
                ]
                wins, losses = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
                won, lost = coin(wins, losses) <= 0.05, coin(losses, wins) <= 0.05
                against.add("ahead" if won else "behind" if lost else "open")
            verdict = against.pop() if len(against) == 1 else "open"
            verdicts[task, name, key] = verdict
            if verdict != "open":
                found[verdict].append(name)
        print(f"{task:7}{key:6} ahead of KFAC: {', '.join(found['ahead']) or 'none'}")
        print(f"{'':13} behind it: {', '.join(found['behind']) or 'none'}")

# %% tags=["hide-input"] fold="Code of the figure" alt="For each task one panel: methods as dots at the median CPU seconds to the target relative to KFAC's, with bars for the interval, sorted. (Without the benchmark's files, an empty picture.)" caption="CPU seconds to the target, KFAC that may choose = 1. Bars: intervals of 90 %. Hollow: KFAC under fixed averages and dampings. Methods whose median run misses are not drawn."
rows = max(-(-len(trained_on) // 3), 1)
fig, axes = plt.subplots(rows, 3, figsize=(10.4, 4.6 * rows), layout="constrained", squeeze=False)
for ax in axes.flat[len(trained_on) :]:
    ax.set_axis_off()
for ax, task in zip(axes.flat, trained_on, strict=False):
    table_ = trained_on[task]["summary"]
    unit_ = table_["kfac-expand"]["cpu"]
    rows_ = sorted((n for n in table_ if table_[n]["cpu"]), key=lambda n: -table_[n]["cpu"])
    for y, name in enumerate(rows_):
        low, high = (v or table_[name]["cpu"] for v in table_[name]["cpu_interval"])
        color = "C0" if name.startswith("kfac") else "C2" if name in ("sgd", "adamw") else "C3"
        ax.plot([low / unit_, high / unit_], [y, y], color=color, linewidth=1)
        hollow = {"markerfacecolor": "none"} if name.startswith("kfac, ") else {}
        ax.plot(table_[name]["cpu"] / unit_, y, "o", color=color, **hollow)
    ax.set_yticks(range(len(rows_)), rows_, fontsize="x-small")
    ax.axvline(1, linestyle=":", linewidth=0.8, color="C0")
    ax.set(xscale="log", title=task, xlabel="CPU seconds, KFAC = 1")
    low, high = ax.get_xlim()
    ticks = [2.0**k for k in range(-6, 7) if low <= 2.0**k <= high]
    ax.set_xticks(ticks, [f"{t:g}" if t >= 1 else f"1/{1 / t:g}" for t in ticks])
    ax.minorticks_off()
plt.show()

# %% [markdown]
# ## Which one when
#
# The guide lists questions of a user. Below each question, a line names the tasks on which a method was
# ahead of KFAC, or behind it, in steps and in seconds. "Open" means that the pairs of runs do not decide.
# A task in parentheses was not run for that method. There is no line without a run.

# %% tags=["hide-input"] fold="The guide, from the tests above"
GUIDE = {
    "First a usual optimizer, or KFAC?": ("adamw", "sgd"),
    "KFAC without its curvature?": ("no-curvature",),
    "A better matrix of the same size?": ("ekfac", "tkfac", "tekfac", "kpsvd", "foof"),
    "A sum of two products?": ("deflation", "lanczos", "kfac-corrected"),
    "Blocks for single neurons?": ("mini-block",),
    "Columns of a batch in the place of factors?": ("skfac",),
    "A few eigenpairs?": (
        "rs-kfac",
        "sre-kfac",
        "rs-kfac, adaptive rank",
        "b-kfac",
        "b-r-kfac",
        "b-kfac-c",
    ),
    "No matrix at all?": ("cg-fac",),
    "A coarse level for the network?": ("two-level",),
    "Gradients only?": ("soap", "shampoo", "muon"),
}


def answer(name: str, key: str) -> str:
    by: dict[str, list[str]] = {"ahead": [], "behind": [], "open": []}
    for task in trained_on:
        if (task, name, key) in verdicts:
            by[verdicts[task, name, key]].append(task)
    return ", ".join(f"{verdict} {' '.join(of)}" for verdict, of in by.items() if of)


for question, names in GUIDE.items():
    lines = [n for n in names if any((task, n, "steps") in verdicts for task in trained_on)]
    if lines:
        print(question)
    for name in lines:
        missing = [t for t in trained_on if (t, name, "steps") not in verdicts]
        left = f"   ({' '.join(missing)})" if missing else ""
        print(
            f"    {name:24}steps: {answer(name, 'steps'):32} seconds: {answer(name, 'cpu')}{left}"
        )

# %% tags=["remove-input"]
FINDINGS = """
For these small networks, the runs say:

- **KFAC or a usual optimizer?** In steps, SGD and AdamW are behind on T2, T3, T4 and the wide layers. In seconds, AdamW
  is not behind on the convolutional network and ahead on the wide layers, because its steps are cheaper.
- **A better matrix.** On T2 and T4, no method is ahead of KFAC in steps. On the autoencoder KPSVD and deflation are; the
  paper of both trains deep autoencoders. In seconds neither is ahead.
- **A coarse level** needs the fewest steps of all on the autoencoder, and more seconds: every step captures the batch
  once more. On the convolutional network it is behind in both. On the chain of 16 layers it halves KFAC's steps. KFAC
  alone does so too (`kfac, two lengths`), if one length for the whole network takes the place of one for each layer.
  So the length made the difference there.
- **A few eigenpairs** save seconds where a layer has 513 or 1025 inputs, and are too few where the widest has 101. On
  the wide layers RS-KFAC, SRE-KFAC and all three algorithms of Chapter 19 are ahead of KFAC in steps and in seconds. In
  seconds, B-KFAC is ahead of RS-KFAC, B-R-KFAC is behind it, and B-KFAC-C is open. In steps, the three are open against
  RS-KFAC. Chapter 19's paper has two of the three ahead of RS-KFAC, for larger networks than these.
- **Columns of a batch.** On the wide layers SKFAC has KFAC's steps, and is ahead of it in seconds. AdamW is ahead of both.
- **Gradients only.** SOAP is never ahead of KFAC in steps here. It is ahead in seconds on the two tasks with the
  smallest networks.
- **Averages and dampings** change KFAC's steps as much as most methods do. With equal trials, SKFAC and KFAC-CORRECTED
  are ahead of KFAC neither on T3 nor on T4.
"""
Markdown(FINDINGS if {"T2", "T3", "T4", "deep", "wide"} <= set(trained_on) else "")

# %% tags=["hide-input"] fold="Checked: every statement of the list"
if {"T2", "T3", "T4"} <= set(trained_on):

    def verdict_of(task: str, name: str) -> tuple[str, str]:
        return verdicts[task, name, "steps"], verdicts[task, name, "cpu"]

    for task in ("T2", "T3", "T4"):
        assert {verdicts[task, name, "steps"] for name in ("sgd", "adamw")} == {"behind"}
        assert verdicts[task, "soap", "steps"] != "ahead"
    assert verdicts["T4", "adamw", "cpu"] == "open"
    for name in ("kpsvd", "deflation"):
        assert verdict_of("T3", name) == ("ahead", "open")
    for task in ("T2", "T4"):
        assert "ahead" not in {
            v for (t, _, key), v in verdicts.items() if (t, key) == (task, "steps")
        }
    steps_on_T3 = {n: row["steps"] or math.inf for n, row in trained_on["T3"]["summary"].items()}
    assert min(steps_on_T3, key=steps_on_T3.get) == "two-level"
    assert verdict_of("T3", "two-level") == ("ahead", "behind")
    assert verdict_of("T4", "two-level") == ("behind", "behind")
    assert verdicts["T4", "rs-kfac", "cpu"] == "ahead"
    assert verdict_of("T3", "rs-kfac") == ("behind", "behind")
    assert verdicts["T2", "soap", "cpu"] == verdicts["T3", "soap", "cpu"] == "ahead"
    if "deep" in trained_on:
        of_deep = trained_on["deep"]["summary"]
        for name in ("two-level", "kfac, two lengths"):
            assert of_deep[name]["steps_interval"][1] < of_deep["kfac-expand"]["steps_interval"][0]
        assert verdicts["deep", "two-level", "steps"] == "open"
    for task in ("T3", "T4"):
        for name in ("skfac", "kfac-corrected"):
            assert "ahead" not in verdict_of(task, name)
if "wide" in trained_on:
    OF_CHAPTER_19 = ("b-kfac", "b-r-kfac", "b-kfac-c")
    for name in ("rs-kfac", "sre-kfac", *OF_CHAPTER_19):
        assert verdict_of("wide", name) == ("ahead", "ahead")
    assert verdict_of("wide", "skfac") == ("open", "ahead")
    assert verdict_of("wide", "adamw") == ("behind", "ahead")
    assert verdicts["wide", "sgd", "steps"] == "behind"

    def against(name: str, rival: str, key: str) -> str:
        runs = trained_on["wide"]["finals"]
        pairs = [(a[key], b[key]) for a, b in zip(runs[name], runs[rival], strict=True)]
        wins, losses = sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
        return (
            "ahead"
            if coin(wins, losses) <= 0.05
            else "behind"
            if coin(losses, wins) <= 0.05
            else "open"
        )

    assert [against(n, "rs-kfac", "cpu") for n in OF_CHAPTER_19] == ["ahead", "behind", "open"]
    assert [against(n, "rs-kfac", "steps") for n in OF_CHAPTER_19] == ["open"] * 3
    assert against("adamw", "skfac", "cpu") == "ahead"

# %% [markdown]
# The theorems of the chapters hold without a run:
#
# | If you need | then | because |
# | --- | --- | --- |
# | a matrix that is nearer to the block, whatever it costs | KPSVD, sums of products, corrected eigenvalues | theorem: nearest product; nearest in a basis; two terms are nearer than one |
# | the exact block of a layer whose loss does not mix outputs | mini-blocks, in the last layer | theorem: then the block has no other entries |
# | KFAC's step for layers much wider than the batch | SKFAC, or mini-blocks by rows | theorem: the same step as KFAC's or mini-blocks' on that batch |
# | a posterior, an influence, a determinant | KFAC, EKFAC | both are matrices with roots, for sampling; CG and rows give products only |
#
# Before any of this: expand or reduce ([Chapter 6](06_weight_sharing.py)), which labels
# ([Chapter 3](03_losses.py)), and how much damping ([Chapter 9](09_damping.py)).
#
# ### What this page leaves open
#
# The networks are small. Targets are reached within tens or hundreds of steps, so the runs say nothing about the end of
# long training. A search of so few trials in ten or more dimensions depends on chance. The six controls of KFAC differ
# in an average and a damping only, and the spread of their rows shows the size of this effect. Every method takes the
# length of a layer's step from Adam, so step controls of the papers are not tested. We chose the axes of the search for
# KFAC and for the other methods. An expert of a method may find better ones, and can change them in
# `benchmarks/papers.py`.
#
# ## In one minute
#
# - The nearer matrix often has the worse step. Compare methods by the decrease along their step.
# - With squared error, KFAC's matrix is near the exact block, and refinements gain little. With softmax they differ.
# - Damping is a part of a method: compare methods under the same damping and the same average.
# - KFAC's step costs more than its statistics if the batch is smaller than the layer is wide. Low rank saves this.
# - The guide above says for every method on which task it was ahead of KFAC or behind, in steps and in seconds.
#
# ## Exercises
#
# **Exercise 23.1.** A method multiplies its steps by 10. Which of the four numbers change? And if it
# multiplies its matrix by 10?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# A step times 10 is a damped inverse times 10. The shares do not change, because they use the best length. The
# distance of the inverse changes, and the distance of the matrix does not. A matrix times 10 has another distance and
# another inverse. Its share changes, too, since $10 M + \delta I$ is $M$ with a tenth of the damping. So FOOF, whose
# matrix does not have the scale of the loss, cannot be judged at one damping.
#
# </details>
#
# **Exercise 23.2.** From how many data on is SKFAC's step with factored damping as expensive as KFAC's, for
# a square layer and $V = 1$?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# KFAC: $4 d^3$. SKFAC: two products with $N$ rows on each side, $8 N d^2$. So $N = d / 2$. It saves the
# statistics and the inverse as well.
#
# </details>
#
# **Exercise 23.3.** The share of the exact block of one layer is 1. Why is the share of the network with exact blocks
# below 1? Is there a bound below 1 for all block-diagonal methods?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The network's quadratic model has coupling between layers. There is no such bound if the best step has a positive
# product with the gradient in every layer, as here: then *some* positive definite block-diagonal matrix gives this
# step. Among block-diagonal matrices the exact blocks are nearest to the GGN, but they do not give the best step.
#
# </details>
#
# **Exercise 23.4 (write it).** FOOF's matrix is $I \otimes A$. Write a function `foof_step(io, h, damping)` that
# returns its damped step $(I \otimes A + \delta I)^{-1}$ applied to the gradient `h` of shape `[d_out, d_in]`, with the
# inputs `io.a` of shape `[N, S, d_in]` and one linear solve. The matrix $A$ is the mean of $a a^\top$. The cell below
# has `check_foof_step`, which compares your function with the package on all layers, and one solution. `problem.share`
# then gives the fourth number of your method.
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
problem = problems["classifier"][0]  # 23.1
for name, io in problem.ios.items():
    h = problem.split(problem.h)[name]
    F = problem.blocks[name][0]
    ten = 10 * kfac(io).dense()
    one = Dense(ten).inverse(10 * problem.delta) @ h
    assert (10 * one - kfac(io).inverse(problem.delta) @ h).abs().max() < 1e-8 * (
        10 * one
    ).abs().max()
    other = Dense(ten).inverse(problem.delta) @ h
    assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) < 0.999
scaled = {name: 10 * v for name, v in problem.split(problem.h).items()}
assert abs(problem.share(problem.joined(scaled)) - problem.share(problem.h)) < 1e-12

square = costs(1000, 1000, 500, 500, 1)  # 23.2
assert square["SKFAC"].step == square["KFAC, factored damping"].step

best = torch.linalg.solve(problem.F, problem.h)  # 23.3
positive = [(best[i] * problem.h[i]).sum() > 0 for i in problem.index.values()]
assert problem.share(best) > 1 - 1e-9
of_all = f"{sum(map(int, positive))} of {len(positive)}"
print(f"the best step has a positive product with the gradient in {of_all} layers")


def foof_step(io: LayerIO, h: Tensor, damping: float) -> Tensor:
    """A solution of Exercise 23.4."""
    a = io.a.flatten(0, 1)
    A = a.T @ a / len(a)
    return torch.linalg.solve(A + damping * eye_like(A), h, left=False)


def check_foof_step(function: Callable[[LayerIO, Tensor, float], Tensor]) -> None:
    for problem in (p for task in TASKS for p in problems[task]):
        steps = {}
        for name, h in problem.split(problem.h).items():
            steps[name] = function(problem.ios[name], h, problem.delta)
            expected = foof(problem.ios[name]).inverse(problem.delta) @ h
            assert_exact(steps[name], expected)
        assert 0 < problem.share(problem.joined(steps)) < 1


check_foof_step(foof_step)

# %% [markdown]
# ## Further reading
#
# The papers behind the rows: [Martens and Grosse (2015)](bibliography.md#kfac),
# [Benzing (2022)](bibliography.md#foof), [George et al. (2018)](bibliography.md#ekfac),
# [Gao et al. (2021)](bibliography.md#tkfac), [Koroko et al. (2022)](bibliography.md#kpsvd-kfac),
# [Tang et al. (2021)](bibliography.md#skfac), Puiu ([2022a](bibliography.md#randomized),
# [2022b](bibliography.md#brand)), [Bahamou et al. (2023)](bibliography.md#mini-block),
# [Chen (2021)](bibliography.md#cg-fac) and [Tselepidis et al. (2020)](bibliography.md#two-level).
