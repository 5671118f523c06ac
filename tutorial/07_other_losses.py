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
# # 7. Other losses: many labels, weights, your own
#
# **Part III: KFAC.** Which vectors does a loss send back if a datum has many labels, if the labels have weights, or if
# the loss is your own?
#
# [Chapter 3](03_losses.py) described a loss by vectors $s_{vn}$ whose outer products sum to its Hessian at the outputs.
# There each datum had one label, and all labels counted alike. This chapter gives the vectors for sequences, for the
# options of PyTorch's losses, and for a loss that the package does not know. The weight of a label multiplies the
# Hessian, so its square root multiplies the vectors:
#
# $$
# \nabla^2_f L = \sum_v s_{vn} s_{vn}^\top
# \quad\text{for each datum } n,
# \qquad
# s \to \sqrt{\text{weight}}\; s .
# $$
#
# For a sequence, it is tempting to send back one vector per class for all positions together. [Figure 7.1] shows the
# wrong entries that this adds to the curvature.

# %% tags=["hide-input"]
import itertools

import torch
from torch import Tensor
from torch.nn import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    Linear,
    Module,
    MSELoss,
    PoissonNLLLoss,
    Sequential,
    Tanh,
)

from kfac_scratch import curvature, losses
from kfac_scratch.capture.forward_pass import layer_ios
from kfac_scratch.checks import assert_exact, largest_error, set_up
from kfac_scratch.losses import type2, type2_classwise
from kfac_scratch.show import code, matrices

set_up()  # seed 0, float64, the GPU where there is one


def curvature_of(vectors: Tensor) -> Tensor:
    """What vectors [V, N, ...] say about the outputs: one block for each datum."""
    s = vectors[:].flatten(2)
    return torch.block_diag(*torch.einsum("vni,vnj->nij", s, s))


N, C, P = 7, 3, 5
tokens, token_labels = torch.randn(N, C, P), torch.randint(C, (N, P))

# %% tags=["hide-input"] alt="Two heat maps of 15 by 15. The exact Hessian of one sequence couples each position with itself only. The shortcut has further entries of both signs that couple different positions." caption="The curvature at the outputs of one sequence, with one block for each of five positions and three classes in each. Left, with a vector for every class and position: the Hessian. Right, with one vector per class for all positions: the cross terms of [(7.1)] fill the space between the blocks."
by_position = torch.arange(C * P).reshape(C, P).T.flatten()  # positions first
loss = CrossEntropyLoss()
exact_root, shortcut = (fisher(loss, tokens, token_labels) for fisher in (type2, type2_classwise))
pictures = {"type2: the Hessian": exact_root, "type2_classwise": shortcut}
pictures = {
    name: curvature_of(v)[: C * P, : C * P][by_position][:, by_position]
    for name, v in pictures.items()
}
matrices(pictures, blocks=dict.fromkeys(pictures, (C, C)))

# %% [markdown]
# After this chapter you can
#
# - send the vectors of a loss with a label at every position, and say when fewer of them are enough;
# - say what class weights, label smoothing, soft targets and `ignore_index` do to the curvature;
# - use a loss of your own with one function of a few lines.
#
# ## Many labels for one datum
#
# A language model predicts a label at every position $s = 1, \dots, P$ of a sequence. PyTorch puts
# the classes on axis 1, so $f$ has shape $[N, C, P]$. The labels are independent given the outputs,
# hence the Hessian of one datum, of size $C P$, is block-diagonal with one block per position, and its exact
# root has **$(C - 1) P$ columns**: each is nonzero at a single position. This is what `type2` returns.
#
# So many vectors need many backward passes. It is tempting to send, for each class, its columns for *all* positions at
# once: $C$ passes instead of $(C - 1) P$. In general this is wrong. The outer product of a sum is not the sum of outer
# products. With the column $s_{cs}$ of class $c$ and position $s$, and $s_c = \sum_s s_{cs}$,
#
# $$
# s_c s_c^\top = \sum_s s_{cs} s_{cs}^\top
# + \underbrace{\sum_{s \neq s'} s_{cs} s_{cs'}^\top}_{\text{cross terms}},
# \tag{7.1}
# $$
#
# and the cross terms couple positions, which the loss does not.
#
# ### In the package
#
# The shortcut is the function `type2_classwise`, which is never a default. Its columns $s_{cs}$ are those of [(3.5)];
# another root would have other cross terms.

# %% tags=["remove-input"]
code(type2_classwise, losses._class_vectors)

# %%
H_f = curvature.loss_hessian(loss, tokens, token_labels)
print("type2:", tuple(exact_root.shape), "  type2_classwise:", tuple(shortcut.shape))
assert len(exact_root) == (C - 1) * P
assert len(shortcut) == C
assert_exact(curvature_of(exact_root), H_f)
assert largest_error(curvature_of(shortcut), H_f) > 1e-2

# %% [markdown]
# When is the shortcut exact? KFAC in its expand setting ([Chapter 6](06_weight_sharing.py)) needs of the vectors
# $g_{vns}$ that reach position $s$ of a layer only the sum of their outer products, each vector with itself,
# $\sum_{v n s} g_{vns} g_{vns}^\top$. As long as no later layer mixes positions, the vector at position $s$ of a layer
# comes from position $s$ of the output only. Then both kinds of vectors give the same sum. Once positions are mixed, by
# attention, by a convolution or by a mean, the vectors of different positions are added up on the way, and cross terms
# enter. We compare the sums at two layers of a small network for sequences, without and with attention. Here $g$ comes
# from `layer_ios`, the subject of [Chapter 4](04_layer_io.py).


# %%
class TokenModel(Module):
    """A logit per class and position; optionally, one head of attention in between."""

    def __init__(self, attention: bool):
        super().__init__()
        self.first, self.last = Linear(4, 6), Linear(6, C)
        self.query, self.key = Linear(6, 2), Linear(6, 2)
        self.attention = attention

    def forward(self, X: Tensor) -> Tensor:  # [N, P, 4] -> [N, C, P]
        h = self.first(X).tanh()
        if self.attention:
            h = (self.query(h) @ self.key(h).mT).softmax(-1) @ h
        return self.last(h).mT


def sum_of_outer_products(model: Module, fisher, layer: str) -> Tensor:
    g = layer_ios(model, loss, sequences, token_labels, fisher, layers=[layer])[layer].g
    return torch.einsum("vnso,vnsp->op", g, g)


sequences = torch.randn(N, P, 4)
for attention, layer in itertools.product((False, True), ("first", "last")):
    network = TokenModel(attention)
    exact, short = (sum_of_outer_products(network, v, layer) for v in (type2, type2_classwise))
    error = largest_error(short, exact)
    print(f"{'attention' if attention else 'no mixing':9}  {layer:5} layer: {error:.1e}")
    mixed = attention and layer == "first"
    assert error > 1e-2 if mixed else error < 1e-10

# %% [markdown]
# At the last layer the sums agree in both networks, since no layer follows it. But only these sums agree, not the
# curvature. The exact block of a layer that is used at several positions adds up a datum's gradient over positions
# *before* the outer product is taken, and so contains the cross terms even if no layer mixes positions:

# %%
network = TokenModel(attention=False)
GGN = curvature.ggn(network, loss, sequences, token_labels)
exact = curvature.diagonal_blocks(network, GGN)["last"]
for fisher in (type2, type2_classwise):
    io = layer_ios(network, loss, sequences, token_labels, fisher, layers=["last"])["last"]
    error = largest_error(io.block(), exact)
    print(f"{fisher.__name__:16} relative error of the block: {error:.1e}")
    assert error < 1e-10 if fisher is type2 else error > 1e-2

# %% [markdown]
# ## Weights, smoothing, soft targets
#
# The options of PyTorch's losses change the Hessian in a simple way. With each of them the term of a label is a
# weighted sum of log-probabilities, and every $-\log p_c$ has the *same* Hessian [(3.3)], which does not depend on $c$:
#
# $$
# \ell = -\sum_c q_c w_c \log p_c
# \quad\Longrightarrow\quad
# \nabla^2 \ell = \Bigl(\sum_c q_c w_c\Bigr) \bigl(\operatorname{diag}(p) - p p^\top\bigr).
# \tag{7.2}
# $$
#
# Here $q$ is the target distribution ($e_y$ for a label, or what smoothing makes of it) and $w$ the class weights. So
# the vectors are those of the plain loss times one number per label, $\sqrt{\sum_c q_c w_c}$. An ignored label has the
# number zero. Without class weights $\sum_c q_c = 1$: **soft targets and label smoothing do not change the curvature.**
# For BCE, `pos_weight` multiplies the first part of the term, $-y \log p$, by $w$, and the number is $w\, y + (1 - y)$.
#
# ### In the package
#
# `_hessian_weights` returns this number for each label, divided as the loss's reduction says. `type2` and `monte_carlo`
# multiply by its square root.

# %% tags=["remove-input"]
code(losses._hessian_weights)

# %% tags=["hide-input"]
X = torch.randn(N, 4)
model = Sequential(Linear(4, 6), Tanh(), Linear(6, C))
f = model(X).detach()
targets = {
    MSELoss: torch.randn(N, C),
    CrossEntropyLoss: torch.arange(N) % C,
    BCEWithLogitsLoss: (torch.arange(N * C) % 2).reshape(N, C).double(),
}
w, soft = torch.tensor([0.5, 2.0, 1.0]), torch.softmax(torch.randn(N, C), 1)
hard, bits = targets[CrossEntropyLoss], targets[BCEWithLogitsLoss]
options = {
    "class weights": (CrossEntropyLoss(weight=w), hard),
    "ignore_index": (CrossEntropyLoss(ignore_index=2), hard),
    "label_smoothing": (CrossEntropyLoss(label_smoothing=0.1), hard),
    "all three": (CrossEntropyLoss(weight=w, ignore_index=2, label_smoothing=0.1), hard),
    "soft targets": (CrossEntropyLoss(), soft),
    "soft, weights, smoothing": (CrossEntropyLoss(weight=w, label_smoothing=0.1), soft),
    "pos_weight": (BCEWithLogitsLoss(pos_weight=w), bits),
    "weight and pos_weight": (BCEWithLogitsLoss(weight=1 / w, pos_weight=w), bits),
}
plain = {kind: curvature_of(type2(kind(), f, y)) for kind, y in targets.items()}
for name, (loss, y) in options.items():
    H_f, ours = curvature.loss_hessian(loss, f, y), curvature_of(type2(loss, f, y))
    ignoring = largest_error(plain[type(loss)], H_f)
    print(
        f"{name:25} error {largest_error(ours, H_f):.1e}   if the option is ignored {ignoring:.2f}"
    )
    assert_exact(ours, H_f)
    assert ignoring < 1e-10 if name in ("label_smoothing", "soft targets") else ignoring > 0.1

# %% [markdown]
# With class weights, the sum of $e^{-\ell(f, y)}$ over the labels $y$ depends on $f$, so that $\ell$ is no longer the
# negative log-likelihood of a distribution. The GGN exists all the same. `monte_carlo` draws from the unweighted model
# and multiplies by the same square root. The reference function `fisher`, which follows the definition, raises an
# error:

# %%
try:
    curvature.fisher(model, CrossEntropyLoss(weight=w), X, hard)
    raise AssertionError("a weighted loss has no distribution of labels")
except NotImplementedError as error:
    print(error)

# %% [markdown]
# ## Your own loss in five lines
#
# Another loss needs a function with the arguments and the result of `type2`. It need not be registered. Take counts
# with a Poisson distribution of rate $e^f$. Its term is $\ell = e^f - y f + \log y!$, so $\nabla^2 \ell = e^f$ for each
# entry. This does not contain $y$, and there is one vector per output entry.


# %%
def poisson(loss: PoissonNLLLoss, f: Tensor, y: Tensor) -> Tensor:
    """A square root of the Hessian of `PoissonNLLLoss(log_input=True)`."""
    D = f.numel() if loss.reduction == "mean" else 1
    root = (f.detach().exp() / D).sqrt()  # [N, C]
    return root.diag_embed().movedim(-1, 0)  # [V, N, C] with V = C


counts = torch.randint(5, (N, C)).double()
for loss in (PoissonNLLLoss(), PoissonNLLLoss(reduction="sum")):
    H_f = curvature.loss_hessian(loss, f, counts)
    assert_exact(curvature_of(poisson(loss, f, counts)), H_f)

    GGN = curvature.ggn(model, loss, X, counts)
    for name, block in curvature.diagonal_blocks(model, GGN).items():
        ours = layer_ios(model, loss, X, counts, poisson)[name].block()
        assert_exact(ours, block)

# %% [markdown]
# `type2`, in contrast, raises an error for a loss that it does not know, and the message says what to do.

# %%
try:
    type2(PoissonNLLLoss(), f, counts)
    raise AssertionError("type2 must not guess")
except NotImplementedError as error:
    print(error)

# %% [markdown]
# ## What goes wrong in practice
#
# **The weight on the vector.** Curvature is linear in the loss, and outer products are quadratic in vectors. If a
# vector is multiplied by the weight instead of its root, the curvature is multiplied by the square of the weight:

# %%
heavy = CrossEntropyLoss(weight=torch.full((C,), 4.0), reduction="sum")
light = CrossEntropyLoss(reduction="sum")
right, wrong = type2(heavy, f, hard)[:], 4 * type2(light, f, hard)[:]
H_f = curvature.loss_hessian(heavy, f, hard)
assert_exact(curvature_of(right), H_f)
assert_exact(curvature_of(wrong), 4 * H_f)

# %% [markdown]
# **A loss that is not convex in the outputs.** Its Hessian has a negative eigenvalue for some outputs, and there it has
# no real square root, because a sum of outer products has none. An example is the squared error of a sigmoid,
# $(\sigma(f) - y)^2$. Make the sigmoid a part of the network instead. Then the loss is the squared error, and the GGN
# is another matrix, which is semi-definite.


# %%
def squared_sigmoid(f: Tensor) -> Tensor:
    return (f.sigmoid() - 1.0).square()  # y = 1


logit = torch.tensor([-3.0, 0.0, 3.0])
curve = torch.func.vmap(torch.func.grad(torch.func.grad(squared_sigmoid)))(logit)
slope = logit.sigmoid() * (1 - logit.sigmoid())
for f_n, hessian, ggn in zip(logit, curve, 2 * slope.square(), strict=True):
    print(
        f"output {f_n:+.0f}: second derivative {hessian:+.3f}, GGN with the sigmoid inside {ggn:.3f}"
    )
assert curve[0] < 0 < curve[2]

# %% [markdown]
# ## In one minute
#
# - With $P$ labels per datum, the exact root has $(C - 1) P$ vectors. One vector per class is enough where no layer
#   mixes positions, and only for sums of outer products over positions.
# - Class weights and `pos_weight` multiply each label's vectors by a square root. Without class weights, soft targets
#   and smoothing do not change the curvature.
# - A loss of your own needs one function that returns vectors. Test it against `curvature.loss_hessian`.
# - A loss with class weights is in general no negative log-likelihood: its GGN exists, its Fisher does not.
#
# ## Exercises
#
# **Exercise 7.1.** Multiply the column $s_{cs}$ of each position by a sign $\varepsilon_s = \pm 1$, drawn for each
# position by a fair coin, before columns are added up over positions. Show that the expected outer product has no cross
# terms.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The cross term of $s \ne s'$ is multiplied by $\varepsilon_s \varepsilon_{s'}$, whose mean is zero. The other terms
# are multiplied by $\varepsilon_s^2 = 1$. So $C$ vectors are right in expectation, even if the network mixes positions.
#
# </details>
#
# **Exercise 7.2 (write it).** Write vectors for the loss $\sum \sqrt{1 + (f - y)^2}$, a smooth form of the absolute
# error, summed over all entries. Is the GGN with these vectors a Fisher? The cell below has `check_vectors` and one
# solution.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The first derivative of a term is $r / \sqrt{1 + r^2}$ with $r = f - y$, the second $(1 + r^2)^{-3/2}$. So there are
# $C$ vectors with one entry $(1 + r^2)^{-3/4}$ each. They contain the label. The Fisher is an expectation over
# labels, so it does not depend on $y$: it is another matrix.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
columns = type2_classwise(CrossEntropyLoss(), tokens, token_labels)[:]  # [C, N, C, P]
total = 0
for signs in itertools.product((-1.0, 1.0), repeat=P):
    total = total + curvature_of(columns * torch.tensor(signs)) / 2**P
assert_exact(total, curvature.loss_hessian(CrossEntropyLoss(), tokens, token_labels))


class SmoothAbsolute(Module):
    """The sum of sqrt(1 + r²) over all entries."""

    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return (1 + (f - y).square()).sqrt().sum()


def smooth_absolute(loss: Module, f: Tensor, y: Tensor) -> Tensor:
    """A solution of Exercise 7.2."""
    return (1 + (f.detach() - y).square()).pow(-3 / 4).diag_embed().movedim(-1, 0)


def check_vectors(vectors) -> None:
    loss, y = SmoothAbsolute(), targets[MSELoss]
    assert_exact(curvature_of(vectors(loss, f, y)), curvature.loss_hessian(loss, f, y))
    exact = curvature.diagonal_blocks(model, curvature.ggn(model, loss, X, y))
    for name, io in layer_ios(model, loss, X, y, vectors).items():
        assert_exact(io.block(), exact[name])


check_vectors(smooth_absolute)
other = [curvature.loss_hessian(SmoothAbsolute(), f, targets[MSELoss] + k) for k in (0, 1)]
assert largest_error(*other) > 0.1  # it depends on the label
print("Exercises 7.1 and 7.2: all hold")

# %% [markdown]
# ## Further reading
#
# [The KFAC-from-scratch tutorial](bibliography.md#from-scratch) treats reductions of losses and sequences.
# [Eschenhagen et al. (2023)](bibliography.md#weight-sharing) distinguish losses with one term per datum from those with
# one per position; [Chapter 6](06_weight_sharing.py) shows what this means for KFAC.
