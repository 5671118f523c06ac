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
# # 34. Many processes: one step, taken together
#
# **Part IX: Scale and trust.** How do several processes take the step that one process would take with all data,
# and what do they send each other for it?
#
# Each of $P$ processes, the *ranks*, has a copy of the model and a shard of the batch. For SGD the ranks exchange
# gradients. For KFAC that is not sufficient: the weights of the ranks move apart ([Figure 34.1]). The ranks also need the
# factors of the whole batch, made of the factors $A_r$ and $B_r$ of every rank $r$,
#
# $$
# B = \sum_r B_r , \qquad A = \frac{\sum_r R_r A_r}{\sum_r R_r} ,
# $$
#
# where $R_r$ is the number of inputs of the layer on rank $r$, called rows, and $B_r$ is scaled by the rank's share of
# the loss.

# %%
import copy
import json

import matplotlib.pyplot as plt
import torch
from torch import nn

from kfac_scratch import KFAC, LayerIO, ekfac, kfac, layer_ios, type2
from kfac_scratch.approximations.ekfac import second_moments
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.distributed.joint import joint_kfac
from kfac_scratch.distributed.sharing import assignment, columns, grid_rows
from kfac_scratch.losses import divisor
from kfac_scratch.show import RESULTS, code

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"] alt="A line that rises from zero over ten steps: the distance between the weights of two ranks, as a share of the way that rank 0 has moved." caption="Two ranks that exchange gradients and no curvature: the distance between their weights, relative to the distance of rank 0 from the start. With equal weights it would be 0."
torch.manual_seed(0)
start = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
loss = nn.CrossEntropyLoss()
drifts = []
batches = [(torch.randn(24, 6), torch.randint(4, (24,))) for _ in range(10)]
models = [copy.deepcopy(start) for _ in range(2)]
optimizers = [KFAC(model, loss, fisher=type2) for model in models]
for X, y in batches:
    for model, optimizer, part in zip(
        models, optimizers, (slice(0, 12), slice(12, 24)), strict=True
    ):
        optimizer.zero_grad()
        loss(model(X[part]), y[part]).backward()
        optimizer.observe(X[part], y[part])
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        p.grad = q.grad = (p.grad + q.grad) / 2
    for optimizer in optimizers:
        optimizer.step()
    at = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (start, *models)]
    drifts.append(((at[1] - at[2]).norm() / (at[1] - at[0]).norm()).item())

print(f"distance of the ranks after 10 steps: {drifts[-1]:.2f} times rank 0's from the start")
assert drifts[-1] > 0.05
fig, ax = plt.subplots(figsize=(6, 2.8), layout="constrained")
ax.plot(range(1, 11), drifts, "o-")
ax.set(xlabel="step", ylabel="distance / that from the start", ylim=(0, None))
plt.show()

# %% [markdown]
# After this chapter you will be able to
#
# - say what ranks must send for one joint step, and weigh factors of shards of unequal size;
# - place inverses on ranks, and count the numbers that each placement sends;
# - recognise mistakes that run without an error, such as plain means of factors.
#
# ## The question
#
# A batch that is too large for one device is cut into *shards*, one for each rank. The gradient of the batch is the
# mean of the ranks' gradients, if the loss is a mean and all shards have the same number of terms. PyTorch's
# `DistributedDataParallel` computes this mean.
#
# KFAC needs more, because each rank computes the curvature of its own shard only. In [Figure 34.1], two ranks in one
# process exchange gradients and no curvature. Each has an optimizer of its own, and both get the same gradient.
#
# The ranks began with the same weights and always got the same gradient. But each multiplied it by the inverse of its own
# matrix. So they took different steps, and from then on their gradients belong to different points. The mean of two such
# gradients is the gradient of neither network, and PyTorch raises no error. So in a job of several processes, an
# optimizer of this package raises an error until one line, the last one here, tells it that the processes belong
# together:
#
# ``````py
# torch.distributed.init_process_group()
# optimizer = KFAC(model, loss)  # the model may be a DistributedDataParallel
# distribute(optimizer)
# ``````
#
# The training loop stays as it is, with one exception: with `DistributedDataParallel`, a loss that is a sum, or shards of
# unequal size, need another factor in the loss (Exercise 34.1). This chapter shows what the line does. The command
# `torchrun --nproc-per-node 2 examples/digits.py` trains a transformer with it, and reaches the loss of one process.
#
# ## The loss of the batch, and its curvature
#
# Rank $r$ has a shard, and a loss that is a mean over $D_r$ terms, one for each target. With class weights, or with
# targets that the loss ignores, $D_r \gt 0$ is the sum of the targets' weights, which is 0 for an ignored one. With
# $D = \sum_r D_r$, the loss of the whole batch is
#
# $$
# \mathcal{L} = \sum_r \frac{D_r}{D} \mathcal{L}_r .
# \tag{34.1}
# $$
#
# Its gradient follows by linearity. The curvature follows, too. [Chapter 4](04_layer_io.py) describes a layer by its
# inputs $a$ and by vectors $g$ whose outer products sum to the curvature of the loss. A loss that is multiplied by
# $c$ multiplies this curvature by $c$, and so the vectors by $\sqrt{c}$.
#
# <div class="admonition theorem" markdown="1" id="thm-34.1">
# <p class="admonition-title" markdown="1"><b>Theorem 34.1 (the joined layer)</b></p>
#
# Let the outputs of a sample depend on its own input alone. Let $(a_r, g_r)$ be a layer's inputs and vectors for the
# shard and the loss of rank $r$, with the exact (type-2) Fisher. Then the layer on the whole batch, with the loss
# of [(34.1)], is
#
# $$
# (a, g) = \operatorname{concatenate}_r \Bigl( a_r, \sqrt{D_r / D}\; g_r \Bigr) ,
# \tag{34.2}
# $$
#
# where samples stand one after another. If the loss is a sum, the factor is 1.
#
# </div>
#
# **Proof.** The loss is a sum over samples. So its curvature with respect to all outputs is block diagonal, with one
# block for each sample. By [(34.1)], the block of a sample of rank $r$ is $D_r / D$ times its block for
# $\mathcal{L}_r$. A square root of the latter, times $\sqrt{D_r / D}$, is a square root of the former. The columns of
# the square root are sent back to the layer by linear maps, which keep the factor. The outputs of a sample depend on
# its own input alone, so that these maps are the same whether or not the other shards are there. $\square$
#
# The check has shards of 5 and 19 samples, of which some targets are ignored:

# %% tags=["hide-input"] fold="Checked: the joined layer, with unequal shards and ignored targets"
X, y = torch.randn(24, 6), torch.randint(4, (24,))
y[[0, 1, 2, 9, 17]] = -100  # ignored by the loss
shards = [(X[:5], y[:5]), (X[5:], y[5:])]
terms = [divisor(loss, start(X), y) for X, y in shards]
shares = [count / sum(terms) for count in terms]

local = [layer_ios(start, loss, X, y, type2)["0"] for X, y in shards]
whole = layer_ios(start, loss, X, y, type2)["0"]
scaled = [LayerIO(io.a, share**0.5 * io.g) for io, share in zip(local, shares, strict=True)]
print("terms of the ranks", terms)
assert_exact(torch.cat([io.a for io in scaled]), whole.a)
assert_exact(torch.cat([io.g for io in scaled], dim=1), whole.g)

# %% [markdown]
# ## What is sent for the curvature
#
# An approximation is a function of $(a, g)$. So every approximation of this book can be distributed in one way: send
# all $a$ and $g$ to everybody, and let each rank compute. A layer with $d_\text{in}$ inputs and $d_\text{out}$
# outputs then takes $N S (d_\text{in} + V d_\text{out})$ numbers, for $N$ samples, $S$ positions in each, and $V$
# vectors that are sent back for each sample.
#
# KFAC has a cheaper way, because its factors are sums over samples. An input at one position is a *row* of $a$. With
# $R_r$ rows on rank $r$,
#
# $$
# B = \sum_r B_r , \qquad
# A = \frac{\sum_r R_r A_r}{\sum_r R_r} ,
# \tag{34.3}
# $$
#
# where $B_r$ is made of the scaled vectors of [(34.2)]. The two factors weigh ranks differently: $A$ by their rows, $B$,
# in its vectors, by their terms of the loss. Both factors are symmetric, so half of the entries of each are sent. In
# code:

# %%
own = [kfac(io) for io in scaled]
rows = [io.rows for io in scaled]
A = sum(R * K.A for R, K in zip(rows, own, strict=True)) / sum(rows)
B = sum(K.B for K in own)
assert_exact(A, kfac(whole).A)
assert_exact(B, kfac(whole).B)

# %% [markdown]
# The shipped function does the same for all layers at once, since few large messages are faster than many small ones.
# `ranks.summed` adds up over the ranks:

# %% tags=["remove-input"]
code(joint_kfac)

# %% [markdown]
# For [EKFAC](14_ekfac.py), the eigenvectors are those of the joint factors. Its eigenvalues are second moments, which
# are sums over samples again, in the basis that all ranks share:

# %% tags=["hide-input"] fold="Checked: second moments add up over ranks"
basis = kfac(whole).eigen()  # of the joint factors
moments = sum(second_moments(io, basis.QA, basis.QB) for io in scaled)
assert_exact(moments, ekfac(whole).scale)

# %% [markdown]
# ## What goes wrong
#
# All of the following mistakes run without an error. We measure the distance of their matrix from the right one by
# products with random directions. The second mistake, plain means, is what public code does ([kfac-pytorch, `base.py`,
# line
# 333](https://github.com/gpauloski/kfac-pytorch/blob/869cf110334e5a6e9ea054bafdc4558313a821e8/kfac/layers/base.py#L333);
# [kfac_pytorch of DP-KFAC, `kfac_preconditioner_inv.py`, line
# 99](https://github.com/lzhangbv/kfac_pytorch/blob/c45acb8fc8a47848fefcc0e665ab292184f36215/kfac/kfac_preconditioner_inv.py#L99-L100)).
# It is right where all shards have equally many terms and rows, as with the usual samplers, and wrong for our shards of 5
# and 19 samples.

# %% tags=["hide-input"] fold="Measured: the distance of five mistakes from the right matrix"
V = torch.randn(50, 8, 7)


def distance(M, right) -> float:
    """The relative distance of two matrices, measured on random directions."""
    return relative_error(M @ V, right @ V)


def product(A, B):
    """A Kronecker product of two factors."""
    return type(kfac(whole))(A, B)


unscaled = [kfac(io) for io in local]  # with the divisors of the ranks' own losses
mean_A = sum(K.A for K in unscaled) / 2
mistakes = {
    "the curvature of rank 0 alone": unscaled[0],
    "plain means of both factors": product(mean_A, sum(K.B for K in unscaled) / 2),
    "A weighted by the terms of the loss": product(
        sum(s * K.A for s, K in zip(shares, unscaled, strict=True)), B
    ),
    "divisors of the ranks' own losses": product(A, sum(K.B for K in unscaled)),
}
for name, M in mistakes.items():
    print(f"{name:36} off by {distance(M, kfac(whole)):.2f}")
    assert distance(M, kfac(whole)) > 0.01

eigen = [ekfac(io) for io in scaled]
averaged = type(eigen[0])(
    sum(M.QA for M in eigen) / 2, sum(M.QB for M in eigen) / 2, sum(M.scale for M in eigen)
)
print(f"{'EKFAC: means of the eigenvectors':36} off by {distance(averaged, ekfac(whole)):.2f}")
assert distance(averaged, ekfac(whole)) > 0.1

# %% [markdown]
# One more mistake appears only when the number of ranks changes. Let $s_i$ be the vector of a single term. The vector of
# the *mean* loss is $s_i / N$. Kfac-pytorch, the code of KAISA, takes the mean over $i$ of the outer products of these
# ([`modules.py`, line
# 140](https://github.com/gpauloski/kfac-pytorch/blob/869cf110334e5a6e9ea054bafdc4558313a821e8/kfac/layers/modules.py#L134-L141)
# and [`utils.py`, line
# 55](https://github.com/gpauloski/kfac-pytorch/blob/869cf110334e5a6e9ea054bafdc4558313a821e8/kfac/layers/utils.py#L51-L55)),
# which is $1 / N^2$ times the right matrix, the mean of $s_i s_i^\top$. With one rank, another damping compensates for
# the factor. On $P$ ranks with $N / P$ samples each, the same program has the factor $1 / (N / P)^2 = P^2 / N^2$. The
# batch is the same, and the matrix is $P^2$ times as large. If $N / P$ stays the same and ranks are added, one damping
# fits all of them. The code of DP-KFAC, which began as a fork of kfac-pytorch, multiplies the vectors by the size of the
# batch first ([`utils.py`, line
# 137](https://github.com/lzhangbv/kfac_pytorch/blob/c45acb8fc8a47848fefcc0e665ab292184f36215/kfac/utils.py#L132-L140)).

# %% tags=["hide-input"] fold="Checked: the trace grows with the square of the number of ranks"
scores = torch.randn(24, 4)  # of single terms
traces = {}
for P in (1, 2, 4):
    parts = [part / len(part) for part in scores.split(24 // P)]  # of mean losses
    traces[P] = float(sum((g.mT @ g / len(g)).trace() for g in parts) / P)
    print(f"{P} ranks: the trace is {traces[P] / traces[1]:.2f} times that of one rank")
    assert abs(traces[P] / traces[1] - P**2) < 1e-9

# %% [markdown]
# ## Labels
#
# Theorem 34.1 is about the exact Fisher. With [Monte Carlo](03_losses.py), every rank draws labels for its own shard.
# If all ranks have one seed, the samples at the same place of two shards get the same random number. Each label alone
# is drawn from the right distribution, so the factor is right on average. But the draws of two ranks are no longer
# independent, and their errors do not cancel. The extreme case has two equal shards. Then the second rank repeats the
# draws of the first. In the next cell, 12 samples on each of two ranks estimate an entry of $B$ whose true value is 0, by
# the mean of products of two random signs:

# %% tags=["hide-input"] fold="Measured: the error of labels with one seed, and with own seeds"
errors = {}
for name in ("one seed", "own seeds"):
    squares = []
    for trial in range(400):
        seeds = (trial, trial) if name == "one seed" else (trial, trial + 1000)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        draws = [torch.randn(12, 2, generator=generator).sign() for generator in generators]
        estimate = sum(float((d[:, 0] * d[:, 1]).mean()) for d in draws) / 2
        squares.append(estimate**2)
    errors[name] = sum(squares) / len(squares)
    print(f"{name}: mean squared error {errors[name]:.3f}")
assert 1.5 < errors["one seed"] / errors["own seeds"] < 2.7  # twice as large, up to chance

# %% [markdown]
# So `distribute` gives every rank a stream of its own, and a checkpoint has all of them.
#
# ## Who inverts
#
# All ranks have the joint factors. If every rank inverts all of them, no time is saved. So every layer gets an *owner*,
# the rank that inverts its factors. Layers are assigned from the largest to the smallest, each to the rank that has the
# least work so far, as in KAISA's code
# ([`assignment.py`, line
# 228](https://github.com/gpauloski/kfac-pytorch/blob/869cf110334e5a6e9ea054bafdc4558313a821e8/kfac/assignment.py#L228)):

# %% tags=["remove-input"]
code(assignment)

# %% [markdown]
# Then the inverse must be applied to the gradient. There are two extremes, and a choice between them. The names are
# those of KAISA, [Pauloski et al. (2021)](bibliography.md#kaisa) ([`enums.py`, line
# 40](https://github.com/gpauloski/kfac-pytorch/blob/869cf110334e5a6e9ea054bafdc4558313a821e8/kfac/enums.py#L40-L54)):
#
# - The owner sends the inverse to all ranks, whenever it is new. Every rank applies all inverses. This is *comm-opt*:
#   little is sent if inverses are seldom renewed, and every rank has all inverses in memory.
# - The owner keeps the inverse, applies it, and sends the result in every step. This is *mem-opt*: every rank has the
#   inverses of its own layers only.
# - Between them, the ranks stand in a grid of $m$ rows and $P / m$ columns. The owner's column gets the inverse, and
#   every rank of the column sends results along its row. This is *hybrid-opt*.
#
# The paper adapts this choice to memory and network. It reports convergence that is 18.1 to 36.3 % faster than that of
# the original optimizers with the same batch, for ResNet-50, Mask R-CNN, U-Net and BERT on up to 128 GPUs. This is not
# tested here, because we have no cluster.

# %% tags=["hide-input"] alt="Three grids of four ranks. With one row of four, each layer's inverse is at its owner alone. With two rows and two columns, it is at both ranks of a column. With four rows and one column, all inverses are at all ranks." caption="Four ranks and four layers; rank $k$ owns layer $k$. Below the rank's name: the inverses that it holds. Left to right, with one, two and four rows: mem-opt, hybrid-opt, comm-opt."
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2))
owners = assignment({f"layer {i}": 1.0 for i in range(4)}, 4)
for ax, m in zip(axes, (1, 2, 4), strict=True):
    across, down = grid_rows(4, m), columns(4, m)
    for r, row in enumerate(across):
        for c, rank in enumerate(row):
            held = [name.split()[1] for name, owner in owners.items() if owner in down[c]]
            ax.add_patch(
                plt.Rectangle((c, -r), 0.9, 0.8, fill=False, edgecolor=f"C{c}", linewidth=2)
            )
            ax.text(
                c + 0.45,
                -r + 0.4,
                f"rank {rank}\n{', '.join(held)}",
                ha="center",
                va="center",
                fontsize=8,
            )
    ax.set(xlim=(-0.1, 4), ylim=(-3.1, 0.9), title=f"{m} {'row' if m == 1 else 'rows'}")
    ax.axis("off")
plt.show()

# %% [markdown]
# ## The bill
#
# If the ranks stand in a ring, a sum over all of them makes every rank send $2 (P - 1) / P$ numbers for each summed
# number. Let $G$ be the number of parameters, $F$ the entries of all factors, counted once for symmetric ones, $I$ those
# of all inverses, and $T_F$, $T_I$ the steps between two updates and two inversions. In a grid of $m$ rows, a rank sends
# in a step, on average over ranks,
#
# $$
# \underbrace{\frac{2 (P - 1)}{P} \Bigl( G + \frac{F}{T_F} \Bigr)}_{\text{gradients, factors}}
# + \underbrace{\frac{m - 1}{P} \frac{I}{T_I}}_{\text{inverses}}
# + \underbrace{\Bigl( 1 - \frac{m}{P} \Bigr) G}_{\text{results}} .
# \tag{34.4}
# $$
#
# For the inverses, an owner sends to the $m - 1$ other ranks of its column. For the results, each of those $m$ ranks
# sends to the $P / m - 1$ others of its row. The tests compare (34.4) with the bytes that real processes write, which
# agree within 2 %. Here is the formula for the layers of a ResNet-50 and of GPT-2 on 64 ranks, with $T_F = 10$ and
# $T_I = 100$:


# %% tags=["hide-input"] fold="Computed: numbers sent, for ResNet-50 and GPT-2"
def resnet50() -> list[tuple[int, int]]:
    """Outputs and inputs of all layers; a 3 x 3 convolution has nine times its channels."""
    layers, c = [(64, 147)], 64
    for width, count, out in ((64, 3, 256), (128, 4, 512), (256, 6, 1024), (512, 3, 2048)):
        for block in range(count):
            layers += [(width, c), (width, 9 * width), (out, width)]
            layers += [(out, c)] if block == 0 else []
            c = out
    return [*layers, (1000, 2049)]


def gpt2(d: int = 768, blocks: int = 12) -> list[tuple[int, int]]:
    """GPT-2 small without its embeddings."""
    return blocks * [(3 * d, d + 1), (d, d + 1), (4 * d, d + 1), (d, 4 * d + 1)]


def sent(
    layers: list[tuple[int, int]], P: int, m: int, T_F: int = 10, T_I: int = 100
) -> dict[str, float]:
    """The parts of (34.4), with EKFAC's form of an inverse."""
    G = sum(o * i for o, i in layers)
    F = sum(d * (d + 1) // 2 for layer in layers for d in layer) + len(layers)
    inverses = sum(o * o + i * i + o * i for o, i in layers)
    ring = 2 * (P - 1) / P
    return {
        "gradients": ring * G,
        "factors": ring * F / T_F,
        "inverses": (m - 1) / P * inverses / T_I,
        "results": (1 - m / P) * G,
    }


P = 64
for name, layers in (("ResNet-50", resnet50()), ("GPT-2 small", gpt2())):
    for mode, m in (("mem-opt", 1), ("comm-opt", P)):
        parts = {what: count / 1e6 for what, count in sent(layers, P, m).items()}
        extra = sum(parts.values()) / parts["gradients"] - 1
        words = ", ".join(f"{what} {count:.1f}" for what, count in parts.items())
        print(f"{name}, {mode}: {words} million; {extra:.0%} more than gradients")

# %% [markdown]
# So KFAC's factors and inverses are a fraction of the gradients, which any data-parallel training sends, if they are not
# renewed in every step. With these $T_F$ and $T_I$, mem-opt sends more than comm-opt, since results go out in every step.
#
# The repository measures the placements with real processes, `python -m benchmarks.distributed`. Every rank is a
# process of one machine, so what is compared here is work, memory and numbers sent, and not the time of a step in a
# cluster. All matrices and inverses are renewed in every step, which is the most that a placement can cost:

# %% tags=["hide-input"] fold="Printed: placements, as the benchmark measured them"
FILE = RESULTS / "distributed-cpu.json"
if FILE.exists():
    print(
        f"{'placement':14} {'CPU time of a step':>18} {'matrices, inverses':>19} {'in collectives':>15}"
    )
    for row in json.loads(FILE.read_text())["rows"]:
        count = sum(n for what, n in row["sent"].items() if what != "control")
        held = f"{row['MiB']:.1f} MiB"
        print(
            f"{row['name']:14} {1e3 * row['seconds']:15.0f} ms {held:>19} {count / 1e6:10.2f} 10^6"
        )
else:
    print("No results here: clone the repository and run python -m benchmarks.distributed")

# %% [markdown]
# Each column has the largest value of any rank: ranks that own less hold less. The last column counts the numbers
# that a rank hands to collectives in a step, to send or to receive. Copying between the processes is a part of
# the time. Where a line has more time than that of $P = 1$, the copying costs more than sharing the work saves.
#
# ## Where it stops
#
# More ranks make shards smaller, and share out the inversions. Sharing inversions has a limit, because one inversion
# runs on one rank. The cost of an inversion grows with the third power of the width. Let the widest layer have a share
# $s$ of all cost. Then the busiest rank has at least this share, however many ranks there are:

# %% tags=["hide-input"] alt="Two falling lines on logarithmic axes over the number of ranks. Both follow the ideal line 1/P at first. That of ResNet-50 becomes flat near five ranks, that of GPT-2 near thirty." caption="The share of all inversions that the busiest rank has. Dotted: the ideal. The lines become flat where the busiest rank has the widest layer and nothing else."
fig, ax = plt.subplots(figsize=(6, 3.4))
sizes = [2**k for k in range(11)]
for name, layers in (("ResNet-50", resnet50()), ("GPT-2 small", gpt2())):
    costs = {str(k): float(o**3 + i**3) for k, (o, i) in enumerate(layers)}
    total, busiest = sum(costs.values()), []
    for size in sizes:
        owner = assignment(costs, size)
        loads = [0.0] * size
        for layer, rank in owner.items():
            loads[rank] += costs[layer]
        busiest.append(max(loads) / total)
    ax.loglog(sizes, busiest, marker="o", markersize=3, label=name)
    share = max(costs.values()) / total
    print(f"{name}: the widest layer has {share:.1%} of the cost, and 1/s is {1 / share:.1f}")
    assert busiest[-1] == share
ax.loglog(sizes, [1 / size for size in sizes], ":", label="ideal")
ax.set(xlabel="ranks", ylabel="share of the busiest rank")
ax.legend()
plt.show()

# %% [markdown]
# ## A plan on paper
#
# For thousands of ranks we have no measurement. The following is a calculation with assumptions:
#
# - A rank computes matrix products with $10^{14}$ operations in a second, and eigendecompositions with $10^{12}$. An
#   eigendecomposition of width $d$ takes as long as six products, $12 d^3$ operations.
# - Numbers have four bytes. Sending overlaps with computing, and latency is neglected. So a step takes the larger of
#   both times. *SPD-KFAC* ([Shi et al. (2021)](bibliography.md#spd-kfac)) aims at this. It sends factors while
#   others are computed, places inversions by their load, and reports 10 to 35 % less time on 64 GPUs than the best method
#   before. The package does not overlap.
# - Factors are renewed every 10 steps, inverses every 100 steps.
# - Every rank has 32 images, or 4096 tokens, however many ranks there are (*weak scaling*).
#
# With more ranks, the inversions of each rank fall to the share of the widest layer. All other work of a rank stays
# the same. What a rank sends grows towards a limit, by [(34.4)].

# %% tags=["hide-input"] alt="Two panels, ResNet-50 and GPT-2. Milliseconds of a step over the number of ranks, up to 4096. At 50 GB/s, the time falls at first, as inversions are shared, and is then constant. At 3 GB/s it rises within the first few ranks, where sending takes longer than computing, and is then constant, for mem-opt above comm-opt." caption="The plan: time of a step with a fixed batch for each rank. Lines that rise and become flat are limited by what is sent."
MACS = {
    "ResNet-50": 32 * 4.1e9,
    "GPT-2 small": 4096 * sum(o * i for o, i in gpt2()),
}  # a forward pass
ROWS = {"ResNet-50": 32 * 1000, "GPT-2 small": 4096}  # of a layer; for ResNet-50 a rough mean


def milliseconds(name: str, P: int, m: int, bytes_per_second: float) -> dict[str, float]:
    """The two times of the plan."""
    layers = resnet50() if name == "ResNet-50" else gpt2()
    costs = {str(k): float(o**3 + i**3) for k, (o, i) in enumerate(layers)}
    owner, loads = assignment(costs, P), [0.0] * P
    for layer, rank in owner.items():
        loads[rank] += costs[layer]
    products = 6 * MACS[name] + sum(4 * (o * o * i + o * i * i) for o, i in layers) * m / P
    products += sum(ROWS[name] * (o * o + i * i) for o, i in layers) / 10  # half of 2 d^2, each
    compute = products / 1e14 + 12 * max(loads) / 100 / 1e12
    return {
        "compute": 1e3 * compute,
        "send": 1e3 * 4 * sum(sent(layers, P, m).values()) / bytes_per_second,
    }


fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharex=True)
sizes = [2**k for k in range(13)]
for ax, name in zip(axes, MACS, strict=True):
    for speed, style in ((50e9, "-"), (3.1e9, "--")):
        for mode, color in (("comm-opt", "C0"), ("mem-opt", "C1")):
            plans = [milliseconds(name, P, P if mode == "comm-opt" else 1, speed) for P in sizes]
            times = [max(plan.values()) for plan in plans]
            ax.loglog(sizes, times, style, color=color, label=f"{mode}, {speed / 1e9:.0f} GB/s")
            print(
                f"{name}, {mode}, {speed / 1e9:.0f} GB/s: {times[0]:.0f} ms alone, {times[-1]:.0f} ms"
            )
            assert (plans[-1]["send"] > plans[-1]["compute"]) == (speed < 10e9)
            assert (times[-1] < times[0]) == (speed > 10e9)
    parts = sent(resnet50() if name == "ResNet-50" else gpt2(), 4096, 1)
    assert parts["gradients"] > sum(parts.values()) / 2
    ax.set(xlabel="ranks", ylabel="milliseconds of a step", title=name)
axes[0].legend(fontsize=7)
plt.show()

# %% [markdown]
# With the fast network, computing takes longer than sending, and a step of 4096 ranks costs less than one of a rank
# alone, because inversions are shared. With the slow one, sending takes longer, and most of what is sent are the
# gradients, as in every data-parallel training. There, comm-opt is faster, and mem-opt needs less memory.
#
# More ranks with larger batches need not mean fewer steps, and the papers differ. [Osawa et al.
# (2019)](bibliography.md#osawa-2019) trained ResNet-50 on ImageNet to 75 % with batches of 131,072 images in 978 steps,
# and say that KFAC can handle larger batches than first-order methods. [Ma et al. (2020)](bibliography.md#inefficiency)
# tuned both for each batch size, on CIFAR-10 and SVHN, and found that KFAC does not scale to large batches better than
# SGD. [Chapter 24](24_large_batches.py) has more.
#
# ## No factors at all
#
# *DP-KFAC* ([Zhang et al. (2022)](bibliography.md#dp-kfac)) sends no factors: the owner of a layer makes its matrix from
# its own shard ([`kfac_preconditioner_inv_dp.py`, line
# 80](https://github.com/lzhangbv/kfac_pytorch/blob/c45acb8fc8a47848fefcc0e665ab292184f36215/kfac/kfac_preconditioner_inv_dp.py#L75-L95)).
# This saves three costs: the term $F / T_F$ of [(34.4)], the work of making a layer's factors on all other ranks, and
# their memory. On 64 GPUs the paper reports 1.55 to 1.65 times less computing, 2.79 to 3.15 times less communication and
# 1.14 to 1.47 times less memory in an update of the curvature, and says that it converges as the joint methods do.
# DP-KFAC's matrix is another estimate: it has the noise of a shard, which is smaller for larger shards. The shards of
# this chapter have 5 and 19 samples, much less than a GPU has, so the cell measures larger ones, too:

# %% tags=["hide-input"] fold="Measured: the distance of a shard's matrix from the batch's"
noise = [distance(M, kfac(whole)) for M in unscaled]
print(
    f"the matrices of the two shards are {noise[0]:.2f} and {noise[1]:.2f} from that of the batch"
)
assert min(noise) > 0.05

falls = []
for size in (10, 100, 1000):  # samples of each of two shards
    parts = [torch.randn(size, 6) for _ in range(2)]
    of_shard, of_both = (
        kfac(layer_ios(start, loss, X, torch.zeros(len(X), dtype=torch.long), type2)["0"])
        for X in (parts[0], torch.cat(parts))
    )
    falls.append(distance(of_shard, of_both))
    print(f"shards of {size:4} samples: {falls[-1]:.3f} from that of the batch")
assert falls[0] > 2 * falls[1] > 4 * falls[2]

# %% [markdown]
# `distribute(optimizer, owner_local=True)` does this.
#
# ## When a rank fails
#
# A *collective*, an operation in which all ranks take part, such as a sum, waits for all of them. If one rank is killed,
# or hangs, the others wait. On CPUs, PyTorch's default is 30 minutes, and the message then names no rank. So the package
# exchanges a few numbers on the CPU before ranks send each other anything: what a rank is about to do, in which step, and
# whether it refuses. (The backward pass of `DistributedDataParallel` has its own messages; an exchange comes before the
# forward pass.) This has three consequences.
#
# - **All ranks refuse together.** Suppose that one rank finds a number that is not finite in its shard, or a matrix
#   without an inverse. Then all ranks raise the same error, which names that rank, and no rank has changed anything.
# - **Another order is an error.** If one rank calls `step` and another `observe`, the error of every rank names both.
# - **A lost rank is named.** After a time-out that you choose, every rank that is left says which one has not
#   arrived, or has stopped responding, and where it was seen last.
#
# `state_dict` gathers what the ranks hold. So every rank calls it, and one of them writes the file. Any number of
# ranks, and a single process, can read it.
#
# ## In one minute
#
# - Ranks that exchange gradients and no curvature take different steps.
# - A layer of the whole batch is the joined rows of the ranks, with vectors scaled by the root of the rank's share of
#   the loss. $B$ is a sum, and $A$ a mean weighted by rows.
# - Plain means of factors are right only if all shards have the same number of terms and rows.
# - Every layer has an owner, who inverts its factors. The widest layer limits how many ranks are of use for this.
# - Comm-opt sends inverses when they are new, mem-opt sends results in every step and holds fewer inverses: [(34.4)].
#
# ## Exercises
#
# **Exercise 34.1.** Two ranks have 10 and 30 samples, and a loss that is a *sum*. `DistributedDataParallel` gives
# both the mean of their two gradients. By which factor must rank $r$ multiply its loss, so that this mean is the
# gradient of the whole batch's loss? And which factor does a mean loss need?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The gradient of the sum is $G_0 + G_1 = \frac12 (2 G_0 + 2 G_1)$: the factor is $P = 2$ on both. For a mean it is
# $P D_r / D$: $2 \cdot 10 / 40 = \frac12$ on the first rank, $2 \cdot 30 / 40 = \frac32$ on the second.
# `distribute(optimizer).joint_loss` is the loss with this factor.
#
# </details>
#
# **Exercise 34.2.** Why may the ranks not add up their own damped inverses, or take their mean?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Because the inverse of a mean is not the mean of inverses. For numbers $x_r > 0$, the mean of $1 / x_r$ is at least
# $1$ over the mean of $x_r$, with equality only if all $x_r$ are equal. So the step is too long in directions
# that have little curvature on some rank.
#
# </details>
#
# **Exercise 34.3.** A network has 100 layers of width 1000 and one of width 4000. From how many ranks on do more of them
# not shorten the inversions?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# In units of $1000^3$, and with equal numbers of inputs and outputs, the cost is $100 \cdot 2 + 64 \cdot 2 = 328$, of
# which the wide layer has $128$. Its share is $128 / 328$, so three ranks are enough: one for the wide layer, two for
# $100$ units each.
#
# </details>
#
# **Exercise 34.4 (write it).** Write a function `joined(factors, rows, shares)` that returns the factors `(A, B)` of
# the whole batch. It gets a list of `(A, B)` of the ranks for their own mean losses, the ranks' numbers of rows, and
# their shares $D_r / D$ of the loss. The cell below has `check_joined` and one solution.
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
G0, G1 = torch.randn(3), torch.randn(3)  # gradients of sums
assert_exact((2 * G0 + 2 * G1) / 2, G0 + G1)
assert_exact((0.5 * G0 / 10 + 1.5 * G1 / 30) / 2, (G0 + G1) / 40)
x = torch.rand(5) + 0.1
assert (1 / x).mean() > 1 / x.mean()
costs = {f"narrow {i}": 2.0 for i in range(100)} | {"wide": 128.0}
for size, busiest in ((2, 164.0), (3, 128.0), (4, 128.0)):
    owner = assignment(costs, size)
    loads = [sum(costs[n] for n in costs if owner[n] == rank) for rank in range(size)]
    assert max(loads) == busiest


def joined(factors: list, rows: list[int], shares: list[float]) -> tuple:
    """A solution of Exercise 34.4: vectors scaled by a root scale `B` by the share."""
    A = sum(R * A for R, (A, _) in zip(rows, factors, strict=True)) / sum(rows)
    return A, sum(share * B for share, (_, B) in zip(shares, factors, strict=True))


def check_joined(function) -> None:
    A, B = function([(K.A, K.B) for K in unscaled], [io.rows for io in local], shares)
    assert_exact(A, kfac(whole).A)
    assert_exact(B, kfac(whole).B)


check_joined(joined)

# %% [markdown]
# ## Further reading
#
# - [Osawa et al. (2019)](bibliography.md#osawa-2019) trained with KFAC in many processes and very large batches.
# - [Pauloski et al. (2021)](bibliography.md#kaisa) have the grid between comm-opt and mem-opt,
#   [Shi et al. (2021)](bibliography.md#spd-kfac) the overlap of sending and computing, and
#   [Zhang et al. (2022)](bibliography.md#dp-kfac) factors that are not sent.
# - The API has [`distribute`][kfac_scratch.distributed.distribute.distribute],
#   [`joint_update`][kfac_scratch.distributed.joint.joint_update] and [`Ranks`][kfac_scratch.distributed.ranks.Ranks].
