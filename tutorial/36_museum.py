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
# # 36. The bug museum: mistakes that looked right
#
# **Part IX: Scale and trust.** What goes wrong in implementations of KFAC, why does nobody notice,
# and which test would have told?
#
# KFAC needs two averages of outer products for a layer, and an inverse. Public implementations have had mistakes in
# each of them: the shapes fit, the matrix is positive definite, and the network trains. This chapter collects such
# mistakes, the *pieces* of the museum. Each changes *one* function of a right KFAC, and the oracle of
# [Chapter 35](35_conformance.py) has to reject it. [Figure 36.1] shows which of its test cases do.

# %%
import textwrap
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from matplotlib.patches import Patch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import CrossEntropyLoss, Linear, Sequential, Tanh

from kfac_scratch.checks import set_up
from kfac_scratch.conformance.cases.families import CASES, family
from kfac_scratch.conformance.judging import truth
from kfac_scratch.conformance.judging.harness import answer, parts_of, request, verdict
from kfac_scratch.conformance.judging.judge import Result, judge
from kfac_scratch.conformance.protocol import NotSupported, Request
from kfac_scratch.conformance.selftest.museum import PIECES, Adapter, Piece, naive
from kfac_scratch.conformance.selftest.museum.adapter import KFAC, type2
from kfac_scratch.conformance.selftest.mutants import catalogue, run_mutants
from kfac_scratch.conformance.selftest.mutations import MUTANTS
from kfac_scratch.conformance.vocabulary import PASSING
from kfac_scratch.show import code

set_up(device="cpu")  # seed 0, float64; everything here is tiny

museum = {piece.slug: piece for piece in PIECES}


# %% tags=["hide-input"] fold="Computed: the verdicts of twelve cases on all pieces"
def column(name: str, flavour: str) -> dict[str, str]:
    """The verdicts of one case on all pieces."""
    case, found, right = CASES[name], {}, {}
    data = case.build()
    sizes = truth.sizes(case, data)
    for slug, piece in museum.items():
        adapter = piece.adapter()
        try:
            got, again = (answer(adapter, case, request(case, data, flavour)) for _ in range(2))
        except ValueError:
            found[slug] = "error"
            continue
        except NotSupported:
            found[slug] = "not-supported"
            continue
        if frozenset(got) not in right:  # a layer's parts: joint, or weight and bias
            right[frozenset(got)] = truth.expected(case, data, flavour, parts_of(got))
        expected, documented = right[frozenset(got)], dict.fromkeys(got, 1.0)
        same = all(torch.equal(got[key], again[key]) for key in got)
        judgement = judge(case, flavour, got, expected, documented, sizes)
        found[slug] = judgement.verdict if same else "error"
    return found


columns = [
    ("tokens-cross-entropy-ignored-mean", "expand"),
    ("conv2d-circular-pooled-mse", "reduce"),
    ("batches-unequal-ekfac", "ekfac"),
    ("inverse-factored-0.25-mlp", "expand"),
    ("one-datum-mse-relu-inplace-mean", "expand"),
    ("attention-tokens-mse", "expand"),
    ("used-in-a-row-mse", "expand"),
    ("conv2d-stride-per-location-mse-mean", "expand"),
    ("conv2d-dilation-pooled-mse", "reduce"),
    ("empirical-mlp-cross-entropy-mean", "expand"),
    ("inverse-exact-0.25-mlp", "expand"),
    ("ekfac-flattened-mse", "ekfac"),
]
table = {name: column(name, flavour) for name, flavour in columns}
caught = {
    name: {slug for slug, found in of_case.items() if found not in PASSING}
    for name, of_case in table.items()
}

# %% tags=["hide-input"] alt="A grid with one row for each piece and one column for each case that was chosen. Most cells are empty. Two rows, the empirical Fisher and zeros for the input of the bias, are full or almost full; most rows have one or two coloured cells only." caption="Every piece against twelve test cases. An empty cell is a case that lets the mistake pass. Most mistakes are rejected by two of these cases at most."
kinds = {"undocumented-scale": "C0", "inconsistent-scale": "C2", "wrong": "C3", "error": "C1"}
fig, ax = plt.subplots(figsize=(9.4, 7.4), layout="constrained")
for x, of_case in enumerate(table.values()):
    for y, slug in enumerate(museum):
        if of_case[slug] in kinds:
            ax.add_patch(plt.Rectangle((x, y), 0.92, 0.88, color=kinds[of_case[slug]]))
ax.set(xlim=(0, len(table)), ylim=(len(museum), 0))
labels = [name.removesuffix("-mean").removesuffix("-mse") for name in table]
ax.set_xticks([x + 0.5 for x in range(len(table))], labels, rotation=50, ha="right")
ax.set_yticks([y + 0.5 for y in range(len(museum))], [piece.title for piece in PIECES])
ax.tick_params(length=0, labelsize="small")
handles = [Patch(color=color, label=name) for name, color in kinds.items()]
fig.legend(handles=handles, loc="outside upper right", ncols=4, fontsize="small")
plt.show()

# %% [markdown]
# No single case rejects all pieces, and neither does training. If the scale of the curvature is wrong by a factor $c$
# in all layers, then
#
# $$
# \bigl( c\, B \otimes A + \delta I \bigr)^{-1}
# = \frac1c \Bigl( B \otimes A + \frac{\delta}{c} I \Bigr)^{-1} ,
# $$
#
# so that another damping and another learning rate give the same steps.
#
# After this chapter you will be able to
#
# - recognise mistakes in the loss, in layers, in averages and in damping, by the scale or the layout that they leave;
# - choose three test cases that catch most of them;
# - say which mistakes training with tuned settings cannot show.
#
# ## The threads
#
# The code of all pieces is ours. Where a mistake was discussed in public, the text names the thread, and also what
# speaks for the other side: a documented convention is no mistake, and several threads end with one. The table has the
# month in which a thread was opened, its state in 2026, and what it was about. Pull requests are marked with PR.
#
# | thread | opened, state | subject |
# | --- | --- | --- |
# | [natural-gradients #2](https://github.com/wiseodd/natural-gradients/issues/2) | 2019-05, open | mistake, agreed by the author: a scale |
# | [curvlinops #82](https://github.com/f-dangel/curvlinops/issues/82) | 2024-03, closed | a scale; the mistake was in the calling code |
# | [curvlinops #108](https://github.com/f-dangel/curvlinops/issues/108) | 2024-05, closed | labelled a bug: a scale |
# | [kfac-pytorch #109](https://github.com/gpauloski/kfac-pytorch/issues/109) | 2023-06, closed | labelled a question: another matrix |
# | [kfac-pytorch #267](https://github.com/gpauloski/kfac-pytorch/issues/267) | 2026-05, open | an error at the first step |
# | [pytorch-a2c-ppo-acktr-gail #54](https://github.com/ikostrikov/pytorch-a2c-ppo-acktr-gail/issues/54) | 2018-02, open | suspected: a scale for strides |
# | [lbann #2010](https://github.com/LBANN/lbann/pull/2010) (PR) | 2021-11, merged | labelled a bug: wrong results for convolutions |
# | [nngeometry #75](https://github.com/tfjgeorge/nngeometry/pull/75) (PR) | 2023-11, merged | a scale, kept as the paper has it |
# | [curvlinops #156](https://github.com/f-dangel/curvlinops/pull/156) (PR) | 2024-11, merged | labelled a bug: wrong from the second product on |
# | [EKFAC-pytorch #4](https://github.com/Thrandis/EKFAC-pytorch/issues/4) | 2019-02, closed | no mistake: a name |
# | [singd #17](https://github.com/f-dangel/singd/issues/17) | 2023-10, closed | labelled a bug: a wrong update |
#
# How severe a mistake is depends on the use of the curvature. A scale that is wrong in all layers has no effect on
# tuned training, as shown [below](#what-training-does-not-tell), but it changes every use of the curvature itself. A
# wrong matrix changes both. An error at the first step is noticed at once. The oracle separates the three: its verdicts
# on the pieces are `undocumented-scale` or `inconsistent-scale`, `wrong`, and `error`.

# %% tags=["hide-input"] fold="Checked: the table names the thread of every piece that has one"
named = {
    "wiseodd/natural-gradients #2",
    "f-dangel/curvlinops #82",
    "f-dangel/curvlinops #108",
    "gpauloski/kfac-pytorch #109",
    "gpauloski/kfac-pytorch #267",
    "ikostrikov/pytorch-a2c-ppo-acktr-gail #54",
    "LBANN/lbann #2010",
    "tfjgeorge/nngeometry #75",
    "f-dangel/curvlinops #156",
    "Thrandis/EKFAC-pytorch #4",
    "f-dangel/singd #17",
}
assert named == {piece.thread for piece in PIECES if piece.thread}
print(f"{len(museum)} pieces, {len(named)} with a public thread")

# %% [markdown]
# ## A KFAC to read
#
# Every piece is a change to a KFAC that is written for reading: hooks,
# one backward pass for every vector, and a function of a few lines for every decision. These are the
# decisions about a layer's factors:

# %% tags=["remove-input"]
code(naive.record, naive.with_ones, naive.input_factor, naive.vector_factor, naive.mixed)

# %% [markdown]
# The vectors in the factor $B$ belong to the *sum* of the loss's terms. Only $B$ is divided by the number of terms.
# The vectors come from a square root of the loss's Hessian (type-2), from sampled
# labels or from the labels of the data; [Chapter 3](03_losses.py) derives all three.

# %% tags=["remove-input"]
code(type2)

# %% [markdown]
# The functions are the fields of one dataclass, `KFAC`, so that a piece of the museum is the same
# dataclass with one field exchanged. If the oracle rejects a piece, the exchanged function is the cause, provided that
# the naive KFAC itself passes. The cell shows this for four cases, one for every room below. The tests run all of them.


# %% tags=["hide-input"] fold="Checked: the naive KFAC passes four cases"
def judged(adapter: Adapter, case: tuple[str, str]) -> Result:
    """The oracle's verdict on one case."""
    return verdict(adapter, CASES[case[0]], case[1])


def say(result: Result) -> None:
    """Print a verdict and its words."""
    print(f"{result.case}, {result.flavour}: {result.verdict}")
    if result.words:
        print(textwrap.fill(result.words, 88, initial_indent="    ", subsequent_indent="    "))


shown: set[str] = set()


def ask(slug: str) -> Result:
    """What the oracle says of a piece, in the case that is made for it."""
    result = judged(museum[slug].adapter(), museum[slug].case)
    say(result)
    assert not result.passes
    shown.add(slug)
    return result


def exhibit(slug: str) -> object:
    """What is right, and under it the piece."""
    return code(museum[slug].right, museum[slug].wrong)


for slug in ("mean-gradients", "positions", "equal", "missing"):
    result = judged(Adapter(), museum[slug].case)
    say(result)
    assert result.verdict in ("exact", "definition")

# %% [markdown]
# `exact` means: equal to the exact curvature block, because a theorem says so for this case.
# `definition` means: equal to what KFAC is defined to be, where that is not exact.
#
# ## Room 1: the loss
#
# ### Gradients of the mean loss
#
# [wiseodd/natural-gradients #2](https://github.com/wiseodd/natural-gradients/issues/2). After a backward
# pass, `.grad` of a layer's output has one row per datum, and these rows look like
# per-datum gradients. But the loss was divided by $N$ before the pass. Each row has a factor $1/N$, its
# square $1/N^2$, so $B$ is too small by $N^2$. The author agreed within a week: natural
# gradients need a negative log-likelihood, a sum over data.

# %% tags=["beside", "remove-input"]
exhibit("mean-gradients")

# %%
result = ask("mean-gradients")
assert "too small by N²" in result.words

# %% [markdown]
# The sizes of every case are coprime, so the number names the size that is missing.
#
# ### One half
#
# [f-dangel/curvlinops #82](https://github.com/f-dangel/curvlinops/issues/82). "KFAC factors are twice
# as large as BackPACK's and ASDL's." A squared error with one half in front has second derivative 1,
# PyTorch's has 2. Both are right. A mistake arises if a program uses one and expects the other. The thread ends
# with a factor in the code that called the library.

# %% tags=["beside", "remove-input"]
exhibit("half")

# %%
assert "too small by 2." in ask("half").words

# %% [markdown]
# ### A mean over what?
#
# [f-dangel/curvlinops #108](https://github.com/f-dangel/curvlinops/issues/108). For cross-entropy on `[N, C]`,
# `reduction="mean"` is the mean over data. `MSELoss` divides by the number of
# output entries, cross-entropy on sequences by that of tokens, and with class weights by the sum of
# the labels' weights.

# %% tags=["beside", "remove-input"]
exhibit("batch-size")

# %%
assert "C = 5" in ask("batch-size").words

# %% [markdown]
# ### The empirical Fisher
#
# [gpauloski/kfac-pytorch #109](https://github.com/gpauloski/kfac-pytorch/issues/109). The Fisher is an
# average over labels drawn *from the model*. The labels of the data give another matrix,
# whose vectors are the gradients of training. The thread is a question. Code that documents the empirical
# Fisher has no bug. Code that documents the Fisher and computes the empirical Fisher has one.

# %% tags=["beside", "remove-input"]
code(museum["empirical"].wrong)

# %%
assert "the empirical Fisher" in ask("empirical").words

# %% [markdown]
# No scale repairs it. The last sentence of the verdict is computed: when an answer is wrong up to any scale,
# the oracle computes what well-known mistakes would give, and compares. If a case cannot tell two mistakes
# apart, the oracle names both.
#
# ## Room 2: layers
#
# ### The layer that is never called
#
# [gpauloski/kfac-pytorch #267](https://github.com/gpauloski/kfac-pytorch/issues/267). `nn.MultiheadAttention`
# has a submodule `out_proj` with a weight that receives a gradient. But the attention multiplies with
# the weight inside a fused function and never calls the submodule, so no hook runs. In this thread, the
# result was an error about a factor that was never computed. Code that skips such layers
# without an error trains the layer without curvature, or with the identity.

# %% tags=["beside", "remove-input"]
code(museum["never-called"].wrong)

# %%
assert ask("never-called").verdict == "error"

# %% [markdown]
# (The attention in our cases calls its layers. This piece exchanges the call, as PyTorch does. How the
# package finds such a weight all the same is the subject of [Chapter 10](10_capture.py).)
#
# ### Positions of the input
#
# [ikostrikov/pytorch-a2c-ppo-acktr-gail #54](https://github.com/ikostrikov/pytorch-a2c-ppo-acktr-gail/issues/54).
# A convolution averages over the positions of its *output*, with one patch for each.
# With a stride there are fewer of them than pixels in the input. The thread, still open,
# suspects a factor of the stride squared; the author had followed another code.

# %% tags=["beside", "remove-input"]
exhibit("input-positions")

# %%
assert ask("input-positions").verdict == "undocumented-scale"

# %% [markdown]
# ### A transpose
#
# [LBANN/lbann #2010](https://github.com/LBANN/lbann/issues/2010). A convolution keeps its channels before
# its positions. A reshape without the transpose gives the right shape, and mixes entries of different
# patches in one row. The trace is right, too.

# %% tags=["beside", "remove-input"]
exhibit("transpose")

# %%
assert ask("transpose").verdict == "wrong"
P = torch.randn(7, 6, 5)  # [N, d_in, S]
right, wrong = (naive.input_factor(f(P), 5) for f in (naive.in_rows, museum["transpose"].wrong))
torch.testing.assert_close(right.trace(), wrong.trace())
assert (right - wrong).norm() > 0.1 * right.norm()

# %% [markdown]
# ### In place, twice
#
# This piece has no thread of its own. A forward hook that returns nothing leaves the network as it was. But
# `ReLU(inplace=True)` writes into the tensor that the hook kept, and the gradient of this tensor is then
# the gradient of the activation's result: the factor $B$ lacks the derivative of the activation.

# %% tags=["beside", "remove-input"]
exhibit("activation-in-place")

# %%
assert ask("activation-in-place").verdict == "wrong"

# %% [markdown]
# ## Room 3: averages
#
# ### The number of positions
#
# [tfjgeorge/nngeometry #75](https://github.com/tfjgeorge/nngeometry/issues/75). The paper on convolutions
# ([Grosse and Martens 2016](bibliography.md#kfc)) puts a *sum* over positions into one factor and a mean
# into the other; here $A$ is a mean and $B$ a sum. Each pair is right. A mixture is wrong by $S$.
# (In this case $S$ is also $T$, the number of positions of the output.)
# The thread announces a fix and then takes it back: the scale had been that of the paper. For a
# library that documents it, the verdict is `scaled`, which passes.

# %% tags=["beside", "remove-input"]
exhibit("positions")

# %%
assert "S or T = 16" in ask("positions").words

# %% [markdown]
# ### Mini-batches
#
# The factors over a data set are averages over mini-batches, weighted by their sizes. Three mistakes have no effect
# with a single batch: equal weights for unequal batches, the
# weight on the wrong side, and, with several workers, a sum of averages, each over the data of one worker.

# %% tags=["remove-input"]
code(naive.mixed, museum["equal"].wrong, museum["wrong-side"].wrong, museum["local"].wrong)

# %% tags=["hide-input"] fold="Checked: all three are rejected"
for slug in ("equal", "wrong-side", "local"):
    ask(slug)

# %% [markdown]
# The first of these is the least visible. All batches but the last have one size, so the error is
# small. Averages weighted equally, on standard normal inputs:


# %% tags=["hide-input"] fold="Computed: the error of equal weights, for three sizes of data"
def equal_weights(N: int, size: int) -> float:
    """Relative error of `A` if every mini-batch counts the same."""
    a = torch.randn(N, 1, 5, generator=torch.Generator().manual_seed(0))
    A = naive.input_factor(a, 1)
    parts = [naive.input_factor(part, 1) for part in a.split(size)]
    return ((torch.stack(parts).mean(0) - A).norm() / A.norm()).item()


for N, size in ((7, 5), (1_000, 128), (60_000, 128)):
    print(f"N = {N:6}, batches of {size:3}: {equal_weights(N, size):.1e}")
assert equal_weights(60_000, 128) < 1e-3 < 0.05 < equal_weights(7, 5)

# %% [markdown]
# With 60 000 data, the error is below a tolerance of $10^{-3}$, which is common in float32.
# With batches of 5 and 2 data, the same mistake is large. **An oracle should use small problems**, because there
# such a mistake is large.
#
# ### Squares of positions
#
# EKFAC squares gradients in KFAC's eigenbasis ([Chapter 14](14_ekfac.py)). With weight sharing, the
# gradient of a datum is a sum over positions, and is squared after the sum. KFAC's factors treat
# positions as data, so code that joins both to one axis is right for KFAC and wrong for EKFAC.

# %% tags=["beside", "remove-input"]
exhibit("squares")

# %%
assert ask("squares").verdict == "wrong"

# %% [markdown]
# ## Room 4: damping
#
# ### One underscore
#
# [f-dangel/curvlinops #156](https://github.com/f-dangel/curvlinops/issues/156). The damping is added to
# stored eigenvalues in place. The first product with the inverse is right; every later one has the
# damping once more. A test with one product cannot find the mistake. The oracle asks for everything twice.

# %% tags=["beside", "remove-input"]
exhibit("damping-in-place")

# %%
assert "twice" in ask("damping-in-place").words

# %% [markdown]
# ### A name
#
# [Thrandis/EKFAC-pytorch #4](https://github.com/Thrandis/EKFAC-pytorch/issues/4). Damping both factors needs
# the number $\pi$, whose *square* is the ratio of their mean eigenvalues ([Chapter 9](09_damping.py)).
# That code calls the ratio `pi` and takes the root later, so it is right. The author of the thread had taken `pi` for
# the paper's $\pi$, and said so later. A port that mixes both readings has this mistake:

# %% tags=["beside", "remove-input"]
exhibit("pi-squared")

# %%
assert ask("pi-squared").verdict == "wrong"

# %% [markdown]
# ### A factor in one of two terms
#
# [f-dangel/singd #17](https://github.com/f-dangel/singd/issues/17). In an update with two terms that look
# alike, one had the factor of the damping and the other lacked it: `C_tC` for `C_tC * damping`. The matrix
# stays positive definite, and steps become shorter. Rebuilt for the damping of two factors:

# %% tags=["beside", "remove-input"]
exhibit("missing")

# %%
assert ask("missing").verdict == "wrong"

# %% [markdown]
# ## The depot
#
# The other pieces of the museum. Most have no thread of their own and occur in more than one place. The verdicts are
# computed.

# %% tags=["hide-input"] fold="Printed: the other pieces and their verdicts"
for piece in [piece for piece in PIECES if piece.slug not in shown]:
    print(piece.title.upper(), piece.url)
    print(textwrap.fill(piece.why, 88))
    ask(piece.slug)
    print()

# %% [markdown]
# ## Which cases catch what
#
# No single case rejects all pieces. [Figure 36.1] shows every piece against twelve cases, which together reject nearly
# all. Mistakes about sampled labels are left out, because they need many draws. The figure computes the expected
# block of each case once for all pieces. Otherwise it does what the oracle does: ask twice, compare, judge.


# %% tags=["hide-input"] fold="Checked: every case of the figure is the only one that rejects some piece"
missed = sorted(set(museum) - set.union(*caught.values()))
print(f"left to cases of their own: {', '.join(missed)}")
assert {"uniform", "samples"} <= {*missed}
assert not any(judged(museum[slug].adapter(), museum[slug].case).passes for slug in missed)
for name, slugs in caught.items():
    alone = slugs - set.union(*(caught[other] for other in table if other != name))
    print(f"{name:36} {len(slugs):2} pieces, alone: {', '.join(sorted(alone))}")
    assert alone
often = {slug: sum(slug in slugs for slugs in caught.values()) for slug in museum}
print(
    f"{sum(n <= 2 for n in often.values())} of {len(museum)} pieces are seen by two cases at most"
)
assert sum(n <= 2 for n in often.values()) > len(museum) / 2

# %% [markdown]
# Every one of these cases is the only one of the twelve that rejects some piece, so none can be left out.
#
# The three best cases, chosen greedily: first the one that catches most, then the one that catches
# most of what is left.

# %% tags=["hide-input"] fold="Computed: the best three cases"
left, best = set(museum), []
for _ in range(3):
    best.append(max(table, key=lambda name: len(caught[name] & left)))
    left -= caught[best[-1]]
    print(f"{best[-1]}: {len(museum) - len(left)} of {len(museum)} pieces")
assert len(left) < len(museum) / 2
assert {family(CASES[name]) for name in best} == {"sharing", "convolutions", "weights"}

# %% [markdown]
# Tokens with ignored targets under cross-entropy, a convolution with unusual padding and a pool behind
# it, and EKFAC over two unequal mini-batches. If you can write only three tests, write these. Each
# combines several features that are usually tested alone. The other pieces need cases of their own.
#
# ## What training does not tell
#
# "It trains" is the most common argument for an implementation. To test this argument, we train
# a small network on handwritten digits for 25 steps, with KFAC from the empirical Fisher, once right
# and with three pieces of the museum, for a range of dampings. Every step has a prescribed length,
# so that only its direction matters.

# %% tags=["hide-input"] fold="Training with prescribed lengths of steps"
digits = load_digits()
images = torch.tensor(digits.data[:1000]) / 16
classes = torch.tensor(digits.target[:1000])
loss = CrossEntropyLoss()


def direction(model: Sequential, adapter: Adapter, X: Tensor, y: Tensor, damping: float) -> dict:
    """The damped inverse times the gradient, for every layer."""
    names = [name for name, _ in model.named_parameters()]
    gradient = torch.autograd.grad(loss(model(X), y), list(model.parameters()))
    asked = Request(
        "one step",
        model,
        loss,
        [(X, y)],
        ("0", "2"),
        fisher="empirical",
        damping=("exact", damping),
        gradient=dict(zip(names, gradient, strict=True)),
    )
    found = {name: block.joint.v for name, block in adapter.blocks(asked).items()}
    length = sum(v.square().sum() for v in found.values()).sqrt()
    return {name: v / length for name, v in found.items()}


def trained(kfac: KFAC, damping: float, seed: int, steps: int = 25) -> float:
    """The loss after some steps whose lengths decrease from 1 to 0."""
    torch.manual_seed(seed)
    model = Sequential(Linear(64, 12), Tanh(), Linear(12, 10))
    for step in range(steps):
        batch = torch.randint(1000, (100,))
        p = direction(model, Adapter(kfac), images[batch], classes[batch], damping)
        for name, v in p.items():
            layer = model.get_submodule(name)
            W = v.reshape(layer.out_features, -1) * (1 - step / steps)
            layer.weight.data -= W[:, :-1]
            layer.bias.data -= W[:, -1]
    return loss(model(images), classes).item()


# %% tags=["hide-input"] fold="Computed: losses for every damping and seed"
contestants = {"right": KFAC()} | {
    museum[slug].title: museum[slug].adapter().kfac
    for slug in ("mean-gradients", "bias-zeros", "cross-terms")
}
seeds, N = range(3), 100
dampings = {name: [10.0**k for k in range(-3, 2)] for name in contestants}
dampings[museum["mean-gradients"].title] = [d / N**2 for d in dampings["right"]]
losses = {
    name: torch.tensor([[trained(kfac, d, seed) for d in dampings[name]] for seed in seeds])
    for name, kfac in contestants.items()
}
start = torch.log(torch.tensor(10.0)).item()  # of ten classes, guessed
for name, of_name in losses.items():
    tuned = of_name.mean(0).min().item()
    print(f"{name:48} {tuned:.3f} with the best damping, of {start:.2f} at the start")
    assert tuned < 0.2 * start

# %% tags=["hide-input"] alt="Loss after 25 steps against damping on a logarithmic axis, for right KFAC and three mistakes. The curve of the mean loss's gradients is that of right KFAC, moved to the left by a factor of ten thousand. Zeros for the bias follow right KFAC for large dampings and fail for small ones; the square of the sum is flat." caption="The loss after 25 steps (lines: mean over three seeds; dots: each seed). The factor that is $N^2$ too small moves the whole curve to the left by $N^2 = 10^4$ and changes nothing else."
fig, ax = plt.subplots(figsize=(7.6, 3.8), layout="constrained")
for name, of_name in losses.items():
    (line,) = ax.semilogx(dampings[name], of_name.mean(0).cpu(), label=name)
    for row in of_name.cpu():
        ax.semilogx(dampings[name], row, ".", color=line.get_color(), markersize=4)
ax.set(xlabel="damping", ylabel="loss after 25 steps", ylim=(0, None))
ax.legend(fontsize="small")
plt.show()

# %% [markdown]
# Every implementation trains, with its own best damping, to a small part of the initial loss. A single one of these
# curves gives no reason to doubt it.
#
# For the factor that is $N^2$ too small, this follows from the identity at the top of this chapter. Let $c$ be the
# wrong scale, the same in all layers. Then
#
# $$
# \bigl( c\, B \otimes A + \delta I \bigr)^{-1}
# = \frac1c \Bigl( B \otimes A + \frac{\delta}{c} I \Bigr)^{-1} ,
# \tag{36.1}
# $$
#
# so a wrong KFAC with damping $c\,\delta$ and learning rate $c\,\eta$ gives *exactly* the same training as
# the right one with $\delta$ and $\eta$.

# %% tags=["hide-input"] fold="Checked: both curves are equal"
right, scaled = losses["right"], losses[museum["mean-gradients"].title]
print(f"largest difference between the two curves: {(right - scaled).abs().max():.1e}")
assert (right - scaled).abs().max() < 1e-6 * start

# %% [markdown]
# **Tuned training cannot find a scale that is wrong in all layers.** The mistake has an effect where the scale matters:
# when a damping is taken from a paper, when the loss's reduction or the batch size is changed, when damping is adapted
# by a predicted decrease, and in every use of curvature beyond optimisation (Laplace approximations, influence
# functions, pruning). The thread curvlinops #82 began with a comparison of libraries.
#
# No damping of the range corrects the other two mistakes. Both increase the loss here:

# %% tags=["hide-input"] fold="Measured: the loss of the other two, tuned, against the right one"
for slug in ("bias-zeros", "cross-terms"):
    factor = losses[museum[slug].title].mean(0).min() / right.mean(0).min()
    print(f"{museum[slug].title}: {factor:.2f} times the loss of what is right, both tuned")
    assert factor > 1.1

# %% [markdown]
# Only the comparison with the right KFAC shows this increase. One experiment of this size says nothing about other
# networks. It shows that a falling loss is weak evidence.
#
# Three habits hide mistakes, and the oracle does the opposite of each:
#
# | habit | what it hides | instead |
# |---|---|---|
# | look at training | every common scale, and much else | compare numbers with a theorem |
# | float32, with tolerances of $10^{-3}$ | everything small, every wrong buffer | float64, ten digits |
# | one batch, one call, sizes like 32 and 64 | batches, states, and which size was forgotten | two unequal batches, every question twice, coprime sizes |
#
# ## Who tests the oracle?
#
# An oracle that accepts everything is useless. So we put mistakes into
# *our own* implementation, too: snippets of source, each with a wrong replacement and the name of the case
# that has to reject it.

# %% tags=["hide-input"] fold="Checked: four mutants are rejected by the case that they name"
print(f"{len(MUTANTS)} mutants of our code, {len(catalogue())} with the museum")
assert len(MUTANTS) >= 60
few = [
    "softmax over the batch",
    "stride ignored",
    "rows of later mini-batches not counted",
    "a bias that has derivatives",
]
for mutant in (m for m in MUTANTS if m.name in few):
    (rejection,) = run_mutants([mutant])
    print(f"{mutant.module}: {mutant.name}")
    print(textwrap.indent(f"- {mutant.before.strip()}\n+ {mutant.after.strip()}", "    "))
    assert rejection.as_named
    say(rejection.result)

# %% [markdown]
# A mutant is imported as a second copy of the package, in which one snippet differs; a snippet that no
# longer occurs exactly once is an error, so an outdated catalogue fails.
# `python -m kfac_scratch.conformance mutants` runs all of it.
#
# When the catalogue was first run, two of its mutants passed every
# case: EKFAC with squares of positions, because no case had asked EKFAC about a shared layer, and the
# groups of a convolution cut wrongly at its output, because in every case with groups all
# channels received the same vectors. (Two others passed because they change nothing, and left the
# catalogue.) The family `extra` holds the cases that were added.

# %% tags=["hide-input"] fold="Printed: the mutants that the cases of the family reject"
extra = [name for name, case in CASES.items() if family(case) == "extra"]
needed = [m.name for m in MUTANTS if m.case[0] in extra]
print(*needed, sep="\n")
assert len(needed) >= 2

# %% [markdown]
# ## In one minute
#
# - Most mistakes are a division by the wrong size, a wrong axis, or a state that is kept or overwritten.
# - A scale that is wrong in all layers changes nothing in tuned training. It changes everything that uses the curvature
#   itself.
# - Small problems with coprime sizes, two unequal batches and repeated questions make mistakes large.
# - Three cases reject more than half of the pieces: tokens with ignored targets, a convolution with unusual padding,
#   EKFAC over unequal batches.
# - Mutations of one's own code show which case is missing.
#
# ## Exercises
#
# **Exercise 36.1.** A library has the factor $A$ too large by $S$ and $B$ too small by $S$. Which verdict
# does it get, for a layer's block and for the inverse with factored damping?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The block $B \otimes A$ is right, so the verdict is `exact` or `definition`: only products are
# compared. Factored damping does not change either, since $\pi$ is the root of the ratio of mean
# eigenvalues and takes part in the exchange: $\pi$ is $S$ times as large, so that
# $A + \sqrt\delta\, \pi I$ is $S$ times and $B + \sqrt\delta / \pi\, I$ one $S$-th of what it was.
#
# </details>
#
# **Exercise 36.2.** Which pieces of the museum does a test with a single datum, a single position, and
# a cross-entropy with reduction `mean` let pass that a test with two data rejects? Why is "one
# datum" nevertheless among the cases?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# All that are about averages over data: the first datum's prediction, the square of the sum, gradients of
# the mean loss, everything about mini-batches. But with one datum KFAC is *exact* for any
# network and loss, so that there, and hardly anywhere else, the Hessian of the loss, the activations'
# derivatives and the order of entries are checked against plain autodiff without any approximation.
#
# </details>
#
# **Exercise 36.3.** In [(36.1)], let the scale be wrong by $c$ in one layer only. Is there still a
# damping and a learning rate that repair it?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Yes, if both may be chosen for that layer alone: the derivation holds layer by layer. With one
# damping and one learning rate for all layers, no: in the limit of large damping the preconditioner is
# $I / \delta$ in all layers whatever $c$ is, in the limit of small damping the layer's step is $1/c$ times
# too long relative to the others. This is why the judge tells `undocumented-scale` from
# `inconsistent-scale`.
#
# </details>
#
# **Exercise 36.4 (write it).** Write a piece of your own: a function in the place of `naive.vector_factor` that
# averages the vectors of KFAC-expand over positions and does not sum them. Which cases reject it, and which scale do
# they name? The cell below has `check_piece`, which shows your function to two cases, and one solution.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $B$ is a sum over positions in KFAC-expand. With a mean it is too small by $S$, which every case
# with $S \gt 1$ names, unless layers have different $S$: then the verdict is `inconsistent-scale`.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
S = 5
A, B = (M @ M.T for M in (torch.randn(4, 6), torch.randn(3, 6)))  # 36.1
damped = [naive.damped_factors(F, H, naive.balance(F, H), 0.1) for F, H in ((A, B), (S * A, B / S))]
one, other = (torch.kron(H, F) for F, H in damped)
torch.testing.assert_close(one, other)

single = ("one-datum-cross-entropy-tanh-mean", "expand")  # 36.2
for slug in ("first-datum", "cross-terms", "mean-gradients", "equal", "wrong-side", "local"):
    assert judged(museum[slug].adapter(), single).passes

c, delta = 0.01, 0.3  # 36.3
M = torch.kron(B, A)
one = torch.linalg.inv(c * M + delta * torch.eye(12))
other = torch.linalg.inv(M + delta / c * torch.eye(12)) / c
torch.testing.assert_close(one, other)


def mean_over_positions(g: Tensor, terms: float) -> Tensor:
    return torch.einsum("vnso,vnsp->op", g, g) / terms / g.shape[2]


def check_piece(function: Callable[[Tensor, float], Tensor]) -> None:  # 36.4
    yours = Piece("yours", "a mean over positions", "vector_factor", function, "", single)
    result = judged(yours.adapter(), ("positions-mse-mean-bias", "expand"))
    say(result)
    assert result.verdict == "undocumented-scale"
    assert judged(yours.adapter(), ("deep-linear-mse-mean-bias", "expand")).passes


check_piece(mean_over_positions)

# %% [markdown]
# ## Further reading
#
# [Grosse and Martens (2016)](bibliography.md#kfc) and
# [Eschenhagen et al. (2023)](bibliography.md#weight-sharing) for the two scales of a shared layer;
# [Kunstner et al. (2019)](bibliography.md#empirical-fisher) on the empirical Fisher taken for the Fisher;
# [Dangel et al. (2025)](bibliography.md#from-scratch), a tutorial on KFAC with tests in every section.
# The cases and the judge are the subject of [Chapter 35](35_conformance.py).
