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
# # 31. Pruning: which weights does a network need?
#
# **Part VIII: Curvature in use.** Which weights can a trained network do without?
#
# Setting a weight to zero raises the objective of the training. The curvature predicts by how much, without a trial.
# The curvature also tells how the other weights should change, so that the objective rises least. This change is called
# the **reply** here. With a reply, half of the hidden units of a network can be removed, and its accuracy falls little,
# although it is not trained again: [Figure 31.1].

# %% tags=["hide-input"]
from copy import deepcopy
from itertools import combinations
from statistics import median
from textwrap import fill
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kfac_scratch.applications.pruning import (
    column_costs,
    costs_with_reply,
    costs_without_reply,
    eigenbasis_costs,
    factored_damping,
    lowest,
    predicted_increase,
    reply,
    row_costs,
    within_eigenbasis,
    without_column,
    without_row,
)
from kfac_scratch.applications.trained import (
    parameters_from,
    trained_weights,
    weights_without_biases,
)
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.data_loader import over_loader
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.matrices.diagonal import Diagonal
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.show import code, table

set_up()  # seed 0, float64, the GPU where there is one

Weights = dict[str, Tensor]  # a matrix [W | b] for each layer

# %% tags=["hide-input"] fold="Trained: three networks that read digits"
SUM, DECAY = nn.CrossEntropyLoss(reduction="sum"), 1.0
digits = load_digits()
images, labels = torch.tensor(digits.data) / 16, torch.tensor(digits.target)


class Trained(NamedTuple):
    """A network, its data, its weights and its curvature."""

    model: nn.Module
    X: Tensor
    y: Tensor
    X_test: Tensor
    y_test: Tensor
    W: Weights
    K: dict[str, Kronecker]


def objective(model: nn.Module, X: Tensor, y: Tensor) -> Tensor:
    """J: the sum of the losses, and half the decay times the sum of all squares."""
    return SUM(model(X), y) + DECAY / 2 * sum(p.square().sum() for p in model.parameters())


def train(seed: int) -> Trained:
    torch.manual_seed(seed)
    order = torch.randperm(len(labels))
    few, rest = order[:500], order[500:]
    X, y = images[few], labels[few]
    hidden = [nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 32), nn.Tanh()]
    model = nn.Sequential(*hidden, nn.Linear(32, 10))
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=150, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(model, X, y)
        value.backward()
        return value

    optimizer.step(closure)
    K = over_loader(kfac, model, SUM, [(X, y)])
    return Trained(model, X, y, images[rest], labels[rest], trained_weights(model, K), K)


def having(net: Trained, W: Weights) -> nn.Module:
    """The network with other weights."""
    model = deepcopy(net.model)
    model.load_state_dict(parameters_from(model, W), strict=False)
    return model


# %% tags=["hide-input"] fold="Accuracy, loss and objective of a choice of weights"
def accuracy(net: Trained, W: Weights) -> float:
    """The share of test images that are read correctly."""
    return (having(net, W)(net.X_test).argmax(1) == net.y_test).double().mean().item()


def loss(net: Trained, W: Weights) -> float:
    """L: the sum of the losses."""
    return SUM(having(net, W)(net.X), net.y).item()


def J(net: Trained, W: Weights) -> float:
    return objective(having(net, W), net.X, net.y).item()


networks = [train(seed) for seed in range(3)]
print("test accuracy:", *(f"{accuracy(net, net.W):.3f}" for net in networks))
assert all(accuracy(net, net.W) > 0.94 for net in networks)


# %% tags=["hide-input"] fold="Five ways to remove units"
def embedded(columns: Tensor, alive: list[int], d_in: int) -> Tensor:
    """Columns at their places in a matrix of zeros."""
    W = torch.zeros(len(columns), d_in)
    W[:, alive] = columns
    return W


def without_units(W: Tensor, K: Kronecker, number: int) -> Tensor:
    """Remove the cheapest column, let the others reply, and so on. The last is the bias's."""
    alive = list(range(W.shape[1]))
    for _ in range(number):
        left = Kronecker(K.A[alive][:, alive], K.B)  # columns that are gone cannot reply
        columns = W[:, alive]
        cheapest = int(column_costs(columns, left)[:-1].argmin())
        columns = without_column(columns, left, cheapest)
        W = embedded(columns, alive, W.shape[1])
        del alive[cheapest]
    return W


def removed(
    net: Trained, share: float, method: str, seed: int = 0, damping: float = DECAY
) -> Weights:
    """Weights without a share of the units of both hidden layers."""
    V, generator = dict(net.W), torch.Generator(net.X.device).manual_seed(seed)
    for layer, consumer in (("0", "2"), ("2", "4")):
        W, K = net.W[consumer], factored_damping(net.K[consumer], damping)
        number = round(share * (W.shape[1] - 1))
        if method in ("cost, with reply", "same units, no reply"):
            replied = without_units(W, K, number)
            kept = (replied != 0).any(0)
            V[consumer] = replied if method == "cost, with reply" else W * kept
            continue
        scores = {
            "cost": column_costs(W, K)[:-1],
            "norm": W[:, :-1].norm(dim=0) * net.W[layer].norm(dim=1),
            "random": torch.rand(W.shape[1] - 1, generator=generator),
        }
        V[consumer] = W.index_fill(1, scores[method].argsort()[:number], 0.0)
    return V


# %% tags=["hide-input"] fold="Code of the figure" alt="Test accuracy against the share of hidden units that were removed, for five methods. With reply, the accuracy stays near that of the whole network up to half of the units and beyond. Without a reply it falls much earlier, even if the same units are removed." caption="Test accuracy when a share of the hidden units is removed, without training again. With reply, the accuracy stays near that of the whole network up to half of the units. Lines: the median of three networks. Bands: from the worst to the best."
METHODS = ("cost, with reply", "same units, no reply", "cost", "norm", "random")
SHARES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
of_units = {
    (method, share): [
        accuracy(net, removed(net, share, method, s)) for s, net in enumerate(networks)
    ]
    for method in METHODS
    for share in SHARES
}
fig, ax = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
for method in METHODS:
    values = [of_units[method, share] for share in SHARES]
    ax.plot(SHARES, [median(v) for v in values], "o-", ms=4, label=method)
    ax.fill_between(SHARES, [*map(min, values)], [*map(max, values)], alpha=0.2, lw=0)
ax.set(xlabel="share of hidden units removed", ylabel="test accuracy", ylim=(0, 1))
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# Let $w$ be the weights of a layer at the minimum of the objective, and let $H$ be the curvature of the objective
# there. Setting $w_i$ to zero costs
#
# $$
# \tfrac12 \frac{w_i^2}{(H^{-1})_{ii}} , \qquad
# \text{with the reply} \quad \Delta = - \frac{w_i}{(H^{-1})_{ii}} H^{-1} e_i .
# $$
#
# Here $H$ is KFAC's $B \otimes A$ plus the weight decay.
#
# After this chapter you will be able to
#
# - predict by how much the objective rises when weights become zero, with and without a reply;
# - remove single weights, whole units, and coefficients in the eigenbasis of KFAC;
# - say which part of a method matters most: the costs, the reply, or several rounds;
# - say where the predictions end to hold.
#
# ## Half of the hidden units
#
# Three networks with two hidden layers of 48 and 32 units learn to read digits. Each has its own random start and its
# own random choice of training data. The weights and the bias of a layer form one matrix $W$, whose last column is the
# bias. A hidden unit is a column in the weights of the layer that uses it.
#
# [Figure 31.1] compares five methods. Each removes the same share of units from both hidden layers.
#
# - "Cost, with reply" removes the cheapest column and lets the other columns reply. Then it computes all costs again,
#   and so on, until enough columns are gone.
# - "Same units, no reply" sets the same columns to zero and changes nothing else.
# - "Cost" sets the columns of lowest cost to zero. These costs are computed once, when all columns are there.
# - "Norm" sets the columns of smallest norm to zero: the norm of the column times the norm of the unit's own weights.
# - "Random" sets random columns to zero.
#
# These are the accuracies of the three networks:

# %% tags=["hide-input"] fold="Measured: the accuracies without half and without three quarters of the units"
whole = [accuracy(net, net.W) for net in networks]
for method in METHODS:
    half, three_quarters = (of_units[method, share] for share in (0.5, 0.75))
    print(f"{method:20} half:", *(f"{a:.3f}" for a in half), end="   ")
    print("three quarters:", *(f"{a:.3f}" for a in three_quarters))
for i, before in enumerate(whole):
    assert of_units["cost, with reply", 0.5][i] > before - 0.02
    assert of_units["cost, with reply", 0.5][i] > of_units["same units, no reply", 0.5][i]
    assert of_units["cost, with reply", 0.75][i] > of_units["same units, no reply", 0.75][i] + 0.1
    assert of_units["same units, no reply", 0.75][i] > of_units["cost", 0.75][i] + 0.1
    for method in METHODS[2:]:
        assert of_units["cost, with reply", 0.5][i] > of_units[method, 0.5][i] + 0.02
        assert of_units["cost, with reply", 0.75][i] > of_units[method, 0.75][i] + 0.2

# %% [markdown]
# With reply, the accuracy without half of the units is little below that of the whole network. Both parts of the method
# matter. If the same units are removed without a reply, more accuracy is lost. If the units are chosen by costs that
# are computed only once, still more is lost: each of these costs assumes that all other units reply.
#
# The columns of zeros can be cut out of the matrices, together with the rows that make these units. The result is a
# smaller network with the same outputs:

# %% tags=["hide-input"] fold="Checked: the smaller network has the same outputs"
net = networks[0]
W = removed(net, 0.5, "cost, with reply")
first, second = (W[consumer][:, :-1].any(0) for consumer in ("2", "4"))  # units that are left
cut = {
    "0": W["0"][first],
    "2": W["2"][second][:, torch.cat([first, torch.ones(1, dtype=torch.bool)])],
    "4": W["4"][:, torch.cat([second, torch.ones(1, dtype=torch.bool)])],
}
hidden = net.X_test
for name in ("0", "2"):
    hidden = (hidden @ cut[name][:, :-1].T + cut[name][:, -1]).tanh()
outputs = hidden @ cut["4"][:, :-1].T + cut["4"][:, -1]
assert_exact(outputs, having(net, W)(net.X_test))
small, large = (sum(V.numel() for V in weights.values()) for weights in (cut, net.W))
print(f"{large} parameters before, {small} after")
assert small < large / 2

# %% [markdown]
# ## What a change costs
#
# Let $L(W)$ be the **sum** of the losses over all data. Training with weight decay $\delta$ minimises
#
# $$
# J(W) = L(W) + \tfrac{\delta}{2} \lVert W \rVert^2 .
# $$
#
# At the minimum the gradient of $J$ is zero. So a change $\Delta$ of the weights costs, to second order,
#
# $$
# J(W + \Delta) - J(W) \approx \tfrac12 \langle \Delta, (M + \delta I) \Delta \rangle ,
# \tag{31.1}
# $$
#
# with the Hessian $M$ of $L$. In place of the Hessian we use KFAC, which approximates the generalised Gauss-Newton
# matrix: one block $M = B \otimes A$ for each layer. $A$ is the mean of $a a^\top$ over the inputs $a$ of the layer,
# whose last entry is 1 for the bias. $B$ is the sum over the data of $g g^\top$, with the vectors $g$ that are sent
# back to the layer's outputs. The product with a matrix is $(B \otimes A) \Delta = B \Delta A$. The damping of $M$ is
# not free to choose: it is the weight decay of the training.
#
# The loss $L$ alone is not at a minimum. Its gradient is $-\delta W$, because $\nabla L + \delta W = 0$. So the
# increase of $L$ has a term of first order:
#
# $$
# L(W + \Delta) - L(W) \approx - \delta \langle W, \Delta \rangle + \tfrac12 \langle \Delta, M \Delta \rangle .
# $$
#
# Without a reply, the first term is positive: it is $\delta$ times the sum of the squares of the weights that become
# zero. With a reply it is positive in the following experiment, too. So the second term alone predicts too little. The
# experiment sets half of the weights to zero. (Later sections derive how these weights are chosen and how the others
# reply.)


# %% tags=["hide-input"] fold="Measured: real and predicted increases of J and of L"
def with_zeros(net: Trained, share: float) -> Weights:
    """Zeros by the costs with reply, and the reply."""
    costs = {n: costs_with_reply(W, net.K[n], DECAY) for n, W in net.W.items()}
    keep = lowest(costs, share, weights_without_biases(net.model, net.W))
    return {n: reply(W, net.K[n], DECAY, keep[n]) for n, W in net.W.items()}


def predicted(net: Trained, V: Weights, decay: float) -> float:
    return sum(predicted_increase(V[n] - W, net.K[n], decay).item() for n, W in net.W.items())


print("         J: real  predicted |  L: real  M alone  with first order")
for seed, net in enumerate(networks):
    V = with_zeros(net, 0.5)
    of_J, of_L = J(net, V) - J(net, net.W), loss(net, V) - loss(net, net.W)
    first = -DECAY * sum((W * (V[n] - W)).sum().item() for n, W in net.W.items())
    full, alone = predicted(net, V, DECAY), predicted(net, V, 0.0)
    print(
        f"seed {seed}    {of_J:5.2f} {full:10.2f} |    {of_L:5.2f} {alone:8.2f} {first + alone:17.2f}"
    )
    assert 0.7 < full / of_J < 1
    assert first > 0
    assert alone < 0.2 * of_L
    assert 0.5 * of_L < first + alone < of_L

# %% [markdown]
# The prediction of [(31.1)] for $J$ is somewhat below the real increase. For $L$, the curvature alone ("M alone")
# explains only a small part of the increase.
#
# For a linear model under the squared error, $J$ *is* quadratic, and KFAC is the Hessian of $L$
# ([Chapter 5](05_kfac.py)). Then [(31.1)] is exact, however large the change.

# %% tags=["hide-input"] fold="Checked: exact for a linear model, and not without the decay"
X, Y, prior = torch.randn(30, 4), torch.randn(30, 3), 0.7
SQUARED = nn.MSELoss(reduction="sum")
linear = nn.Sequential(nn.Linear(4, 3))
Phi = torch.cat([X, torch.ones(30, 1)], 1)  # with a column for the bias


def J_linear(W: Tensor) -> Tensor:
    return (X @ W[:, :-1].T + W[:, -1] - Y).square().sum() + prior / 2 * W.square().sum()


W_linear = torch.linalg.solve(2 * Phi.T @ Phi + prior * torch.eye(5), 2 * Phi.T @ Y).T
M_linear = over_loader(kfac, linear, SQUARED, [(X, Y)])["0"]
keep = torch.rand(3, 5) > 0.4
for V in (torch.where(keep, W_linear, 0.0), reply(W_linear, M_linear, prior, keep)):
    increase = J_linear(V) - J_linear(W_linear)
    assert_exact(predicted_increase(V - W_linear, M_linear, prior), increase)
    assert relative_error(predicted_increase(V - W_linear, M_linear, 0.0), increase) > 0.01

# %% [markdown]
# ## One weight
#
# Let $H = M + \delta I$, and let $w$ be the vector of all weights of a block. The weight $w_i$ becomes zero, which
# means $\Delta_i = -w_i$. The cost depends on what the other weights do. In [optimal brain
# damage](bibliography.md#obd), by LeCun, Denker and Solla, all other weights stay. In the [optimal brain
# surgeon](bibliography.md#obs), by Hassibi and Stork, they reply.
#
# <div class="admonition theorem" markdown="1" id="thm-31.1">
# <p class="admonition-title" markdown="1"><b>Theorem 31.1 (the cost of one weight)</b></p>
#
# Let a quadratic function have the positive definite Hessian $H$ and its minimum at $w$. Setting $w_i$ to zero costs
#
# $$
# \begin{aligned}
# \text{without a reply:} \quad & \tfrac12 w_i^2 H_{ii} , \\
# \text{with the best reply:} \quad & \tfrac12 \frac{w_i^2}{(H^{-1})_{ii}} , \quad
# \Delta = - \frac{w_i}{(H^{-1})_{ii}} H^{-1} e_i .
# \end{aligned}
# \tag{31.2}
# $$
#
# The second cost is at most the first.
#
# </div>
#
# *Proof.* Without a reply $\Delta = -w_i e_i$, with the unit vector $e_i$. For the best reply, the derivative by every
# other weight is zero, so that $H \Delta = \lambda e_i$ with a number $\lambda$. Then $\Delta = \lambda H^{-1} e_i$,
# and $\Delta_i = -w_i$ gives $\lambda = - w_i / (H^{-1})_{ii}$. The cost is $\tfrac12 \Delta^\top H \Delta = \tfrac12
# \lambda \Delta_i$. No change of the other weights is one of the replies, so the best reply
# costs no more. $\square$
#
# The next cell computes both costs without the formulas. For the second one, it puts $\Delta_i = -w_i$ into the
# quadratic and solves for all other changes.


# %%
def random_layer(d_out: int, d_in: int) -> tuple[Tensor, Kronecker]:
    """Weights, and factors as random rows make them."""
    a, g = torch.randn(d_in + 3, d_in), torch.randn(d_out + 3, d_out)
    return torch.randn(d_out, d_in), Kronecker(a.T @ a / len(a), g.T @ g / len(g))


W, M = random_layer(4, 6)
H, w = M.dense() + DECAY * torch.eye(W.numel()), W.flatten()
without, best = [], []
for i in range(len(w)):
    change = torch.zeros_like(w)
    change[i] = -w[i]
    without.append(change @ H @ change / 2)
    others = torch.arange(len(w)) != i
    change[others] = torch.linalg.solve(H[others][:, others], H[others, i] * w[i])
    best.append(change @ H @ change / 2)

assert_exact(costs_without_reply(W, M, DECAY).flatten(), torch.stack(without))
assert_exact(costs_with_reply(W, M, DECAY).flatten(), torch.stack(best))
ratio = torch.stack(best) / torch.stack(without)
print(f"cost with reply over cost without: from {ratio.min():.2f} to {ratio.max():.2f}")
assert (ratio <= 1).all()
assert ratio.min() < 0.9

# %% [markdown]
# For $B \otimes A$ plus damping, the diagonal of the inverse follows from the eigenvectors of both factors
# ([Chapter 8](08_matrices.py)). No matrix of the block's size is formed.

# %% tags=["remove-input"]
code(costs_without_reply, costs_with_reply)

# %% [markdown]
# ## Many weights
#
# Now let $K$ be the set of weights that are kept. All others become zero. Let $v$ be the weights after the reply, with
# zeros outside of $K$. At the best reply, the derivative by every kept weight is zero, $(H (v - w))_K = 0$. This is a
# system of equations for $v_K$:
#
# $$
# H_{KK} \, v_K = (H w)_K .
# \tag{31.3}
# $$
#
# A dense solve takes time in proportion to the cube of the number of kept weights. Conjugate gradients need only
# products with $H$, which for $B \otimes A$ are products with two small matrices. Entries outside of $K$ are masked.

# %% tags=["remove-input"]
code(reply)

# %%
keep = torch.rand(4, 6) > 0.5
k, v = keep.flatten(), torch.zeros_like(w)
v[k] = torch.linalg.solve(H[k][:, k], (H @ w)[k])
assert_exact(reply(W, M, DECAY, keep), v.reshape(W.shape))

# %% [markdown]
# The costs of single weights do not add up to the cost of a set, because each of them assumes that no other weight is
# set to zero:

# %% tags=["hide-input"] fold="Measured: the cost of a set of weights, and the sum of their costs"
together = predicted_increase(reply(W, M, DECAY, keep) - W, M, DECAY)
added = costs_with_reply(W, M, DECAY)[~keep].sum()
plain = predicted_increase(torch.where(keep, W, 0.0) - W, M, DECAY)
added_plain = costs_without_reply(W, M, DECAY)[~keep].sum()
print(f"with reply:    together {together:.3f}, added {added:.3f}")
print(f"without reply: together {plain:.3f}, added {added_plain:.3f}")
assert relative_error(added, together) > 1e-3
assert relative_error(added_plain, plain) > 1e-3

# %% [markdown]
# All costs are in units of the loss, so one threshold can serve all layers. The function `lowest` returns a mask: it
# sets the cheapest weights of the whole network to zero and keeps the others.
#
# ## Rows and columns
#
# Single zeros save little time on most computers. Whole rows and columns can be cut out. A row of $W$ makes one output
# of the layer. A column of $W$ uses one input. For one Kronecker product, the best reply to either has a closed form.
#
# <div class="admonition theorem" markdown="1" id="thm-31.2">
# <p class="admonition-title" markdown="1"><b>Theorem 31.2 (a row, a column)</b></p>
#
# Let the Hessian be $B \otimes A$, positive definite, and let $w_o^\top$ be row $o$ of the minimum $W$. Zeros in this
# row cost, with the best reply,
#
# $$
# \tfrac12 \frac{w_o^\top A \, w_o}{(B^{-1})_{oo}} ,
# \qquad
# \Delta = - \frac{B^{-1} e_o}{(B^{-1})_{oo}} \, w_o^\top .
# \tag{31.4}
# $$
#
# For zeros in column $i$, let $w_i$ be this column of $W$. The cost is $\tfrac12 w_i^\top B \, w_i / (A^{-1})_{ii}$,
# and the reply is $- w_i \, e_i^\top A^{-1} / (A^{-1})_{ii}$.
#
# </div>
#
# *Proof.* The gradient of $\tfrac12 \langle \Delta, B \Delta A \rangle$ is $B \Delta A$. At the best reply it is zero
# outside of row $o$: $B \Delta A = e_o u^\top$ with a vector $u$. So $\Delta = B^{-1} e_o \, u^\top A^{-1}$. Its row
# $o$ is $-w_o^\top$, which gives $u^\top A^{-1} = - w_o^\top / (B^{-1})_{oo}$. The cost is half the inner product of
# $u$ with row $o$ of $\Delta$. Columns are rows of the transposed problem. $\square$
#
# The factor $A$ is not part of the reply to a row, and $B$ is not part of the reply to a column. The matrix
# $B \otimes A + \delta I$ is not one Kronecker product, so the theorem does not apply to it. `factored_damping` damps
# both factors instead ([Chapter 9](09_damping.py)), which is an approximation.

# %% tags=["remove-input"]
code(column_costs, without_column)

# %% tags=["hide-input"] fold="Checked: rows and columns in closed form"
keep = torch.ones(4, 6, dtype=torch.bool)
keep[:, 2] = False
assert_exact(without_column(W, M, 2), reply(W, M, 0.0, keep))
assert_exact(column_costs(W, M)[2], predicted_increase(reply(W, M, 0.0, keep) - W, M, 0.0))
keep = torch.ones(4, 6, dtype=torch.bool)
keep[1] = False
assert_exact(without_row(W, M, 1), reply(W, M, 0.0, keep))
assert_exact(row_costs(W, M)[1], predicted_increase(reply(W, M, 0.0, keep) - W, M, 0.0))
other_inputs, other_outputs = Kronecker(torch.eye(6), M.B), Kronecker(M.A, torch.eye(4))
assert_exact(without_row(W, other_inputs, 1), without_row(W, M, 1))
assert_exact(without_column(W, other_outputs, 2), without_column(W, M, 2))
assert relative_error(row_costs(W, other_inputs), row_costs(W, M)) > 0.1

# %% [markdown]
# A hidden unit is a row of one layer and a column of the next, so both formulas can remove it. The reply to a row
# changes the other units of the same layer, which are nonlinear functions of their weights. The reply to a column
# leaves these units as they are. It changes only how the next layer combines them, which is linear. [Figure 31.1] is
# drawn with columns.
#
# ### Why half of the units can go
#
# The factor $1 / (A^{-1})_{ii}$ in the cost of a column is the mean of the squared error when input $i$ is predicted
# linearly from the other inputs. So a unit costs little if it is nearly a linear combination of the other units and of
# the bias. If few eigenvalues hold most of the trace of $A$, the units repeat each other in this way. In these networks
# they do:

# %% tags=["hide-input"] fold="Code of the figure" alt="Cumulative share of the trace of A against the number of eigendirections, for the inputs of the second and the third layer. Both curves reach 99 percent at about ten directions, of 49 and 33 inputs." caption="The share of the trace of $A$ that its largest eigenvalues hold, for the two layers that use hidden units (median of three networks). Layer 2 uses the units of the first hidden layer, layer 4 those of the second. About ten directions hold 99 % (dashed line)."
fig, ax = plt.subplots(figsize=(7, 3.2), layout="constrained")
needed = {}
for name in ("2", "4"):
    spectra = torch.stack([torch.linalg.eigvalsh(net.K[name].A).flip(0) for net in networks])
    held = spectra.cumsum(1) / spectra.sum(1, keepdim=True)
    needed[name] = [int((row < 0.99).sum()) + 1 for row in held]
    middle = held.median(0).values.cpu()
    ax.plot(
        range(1, len(middle) + 1), middle, "o-", ms=3, label=f"layer {name}: {len(middle)} inputs"
    )
ax.axhline(0.99, ls="--", lw=1, alpha=0.6)
ax.set(xlabel="eigendirections", ylabel="share of the trace", ylim=(0.6, 1.01))
ax.legend(loc="lower right")
plt.show()
for name, numbers in needed.items():
    d_in = networks[0].K[name].A.shape[0]
    print(f"layer {name}: {numbers} of {d_in} directions hold 99 %")
    assert max(numbers) < d_in / 2.5

# %% [markdown]
# ## In the eigenbasis
#
# The costs of weights do not add, because $H$ has entries beside its diagonal. In the eigenbasis of $B \otimes A$, $H$
# is diagonal. [EigenDamage](bibliography.md#eigendamage) prunes in this basis. With $A = Q_A \Lambda_A Q_A^\top$ and
# $B = Q_B \Lambda_B Q_B^\top$, the matrix $C = Q_B^\top W Q_A$ holds the coefficients of $W$.
#
# <div class="admonition theorem" markdown="1" id="thm-31.3">
# <p class="admonition-title" markdown="1"><b>Theorem 31.3 (costs add)</b></p>
#
# Let $s_{oi} = (\Lambda_B)_{oo} (\Lambda_A)_{ii}$ be the eigenvalues of $M$. On the quadratic of [(31.1)], zeros in a
# set of coefficients cost exactly $\sum \tfrac12 C_{oi}^2 (s_{oi} + \delta)$, summed over the set. The best reply
# leaves all other coefficients as they are.
#
# </div>
#
# *Proof.* In this basis $H$ is diagonal. Then [(31.1)] is a sum over coefficients. In [(31.3)] the diagonal $H_{KK}$
# cancels, so that the kept coefficients stay. $\square$

# %%
E = M.eigen()
keep = torch.rand(4, 6) > 0.5
cost = predicted_increase(within_eigenbasis(W, E, keep) - W, E, DECAY)
assert_exact(cost, eigenbasis_costs(W, E, DECAY)[~keep].sum())

# %% [markdown]
# In the networks for digits, we set nine tenths of the coefficients to zero:

# %% tags=["hide-input"] fold="Measured: a tenth of the coefficients, in the eigenbasis"
for seed, net in enumerate(networks):
    bases = {n: K.eigen() for n, K in net.K.items()}
    everything = {n: torch.ones_like(W, dtype=torch.bool) for n, W in net.W.items()}
    costs = {n: eigenbasis_costs(W, bases[n], DECAY) for n, W in net.W.items()}
    keep = lowest(costs, 0.9, everything)
    V = {n: within_eigenbasis(W, bases[n], keep[n]) for n, W in net.W.items()}
    dense = sum(W.numel() for W in net.W.values())
    stored = sum(int(k.sum()) for k in keep.values())
    of_bases = sum(E.QA.numel() + E.QB.numel() for E in bases.values())
    print(
        f"seed {seed}: accuracy {accuracy(net, V):.3f} with {stored} of {dense} coefficients,",
        end=" ",
    )
    print(f"{of_bases} numbers for the bases")
    assert accuracy(net, V) > accuracy(net, net.W) - 0.03
    assert of_bases > dense

# %% [markdown]
# With a tenth of the coefficients, the accuracy falls little. But both bases have to be stored, too, and here they have
# more numbers than the weights. To save memory, EigenDamage removes whole rows and columns of $C$, and with them
# columns of the bases.
#
# ## The input factor alone
#
# With $B = I$ and $\delta = 0$, each row of $W$ is a least-squares problem of its own, $A_{KK} v_K = (A w)_K$. Here $w$
# is the row, and $K$ is its set of kept entries. Only the inputs of the layer are needed: no loss and no backward pass.
# [SparseGPT](bibliography.md#sparsegpt) solves this problem approximately in large language models.

# %%
inputs_only = Kronecker(M.A, torch.eye(4))
keep = torch.rand(4, 6) > 0.4
V = reply(W, inputs_only, 0.0, keep)
for row, k, w in zip(V, keep, W, strict=True):
    assert_exact(row[k], torch.linalg.solve(M.A[k][:, k], (M.A @ w)[k]))

# %% [markdown]
# ## What matters most?
#
# A method has three parts: a cost that chooses the zeros, the reply, and the number of rounds. In each round, a method
# sets a part of the weights to zero, lets the others reply, and computes the curvature at the new weights. The rounds
# are a short loop:


# %%
def in_rounds(net: Trained, share: float, rounds: int = 6) -> Weights:
    """Each round keeps the same share of the weights that are left."""
    W, may = net.W, weights_without_biases(net.model, net.W)
    for i in range(1, rounds + 1):
        K = over_loader(kfac, having(net, W), SUM, [(net.X, net.y)])
        costs = {n: costs_with_reply(w, K[n], DECAY) for n, w in W.items()}
        keep = lowest(costs, 1 - (1 - share) ** (i / rounds), may)
        W = {n: reply(w, K[n], DECAY, keep[n]) for n, w in W.items()}
    return W


# %% [markdown]
# Rounds use the formulas beyond their assumptions. After the first round, the gradient of $J$ at the kept weights is
# not zero, and [(31.1)] leaves this gradient out. The costs also assume that weights which are already zero can reply.
#
# To separate the three parts, six methods prune the three networks to four sparsities, with one threshold for all
# layers. "Magnitude" chooses the weights of smallest absolute value. "Damage" and "surgeon" choose by the two costs of
# [(31.2)]. The costs of "damage" use the diagonal of the exact block of the generalised Gauss-Newton matrix. The
# surgeon's costs and all replies use KFAC. Biases are not set to zero, but they reply.


# %% tags=["hide-input"] fold="The six methods"
def diagonal(io: LayerIO) -> Diagonal:
    """The diagonal of the exact block."""
    return Diagonal(io.gradients().square().sum((0, 1)))


def masked(W: Weights, keep: Weights) -> Weights:
    return {n: torch.where(keep[n], w, 0.0) for n, w in W.items()}


def all_methods(net: Trained, share: float) -> dict[str, Weights]:
    M, may = net.K, weights_without_biases(net.model, net.W)
    D = over_loader(diagonal, net.model, SUM, [(net.X, net.y)])
    magnitude = lowest({n: W.abs() for n, W in net.W.items()}, share, may)
    damage = {n: costs_without_reply(W, D[n], DECAY) for n, W in net.W.items()}
    surgeon = {n: costs_with_reply(W, M[n], DECAY) for n, W in net.W.items()}
    chosen = lowest(surgeon, share, may)
    return {
        "magnitude": masked(net.W, magnitude),
        "damage": masked(net.W, lowest(damage, share, may)),
        "surgeon": masked(net.W, chosen),
        "magnitude, reply": {n: reply(W, M[n], DECAY, magnitude[n]) for n, W in net.W.items()},
        "surgeon, reply": {n: reply(W, M[n], DECAY, chosen[n]) for n, W in net.W.items()},
        "surgeon, reply, rounds": in_rounds(net, share),
    }


# %% tags=["hide-input"] fold="Measured: the test accuracy of six methods at four sparsities"
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
pruned: dict[str, dict[float, list[float]]] = {}
for share in SPARSITIES:
    for net in networks:
        for method, V in all_methods(net, share).items():
            pruned.setdefault(method, {}).setdefault(share, []).append(accuracy(net, V))

table(
    ["", *(f"{share:.0%}".replace("%", " %") for share in SPARSITIES)],
    [
        [method, *(f"{100 * median(accuracies):.1f}" for accuracies in row.values())]
        for method, row in pruned.items()
    ],
)

# %% [markdown]
# The table shows the test accuracy in percent, the median of the three networks, for each share of zeros.
#
# - **Reply.** At 80 % and 90 % of zeros the reply matters more than the choice: either choice with a reply is better
#   than every choice without a reply. With a reply, magnitude and surgeon are about equally good at 90 %. Without a
#   reply, all three choices read many test images wrongly there.
# - **Rounds.** They help at 90 % and 95 %. At 50 % they change little.
# - **Choice.** Without a reply, optimal brain damage is better than magnitude in most cases, and worse in some. The
#   surgeon's costs assume a reply. Without a reply, the surgeon is sometimes better than magnitude and sometimes worse.

# %% tags=["hide-input"] fold="Checked: what the list says, in every network"
for i in range(3):
    for share, gap in ((0.8, 0.05), (0.9, 0.1)):
        at = {method: row[share][i] for method, row in pruned.items()}
        alone = [at["magnitude"], at["damage"], at["surgeon"]]
        replied = [at["magnitude, reply"], at["surgeon, reply"]]
        assert min(replied) > max(alone) + gap
    assert max(alone) < 0.75  # at 90 %
    assert abs(replied[0] - replied[1]) < 0.04
    with_rounds, at_once = pruned["surgeon, reply, rounds"], pruned["surgeon, reply"]
    for share in (0.9, 0.95):
        assert with_rounds[share][i] > at_once[share][i] + 0.05
    assert abs(with_rounds[0.5][i] - at_once[0.5][i]) < 0.02
    assert pruned["surgeon, reply"][0.5][i] > accuracy(networks[i], networks[i].W) - 0.01
for method, row in pruned.items():
    spans = (f"{100 * min(a):.1f} to {100 * max(a):.1f}" for a in row.values())
    print(f"{method:22}", *(f"{span:>13}" for span in spans))
better = {}
for method in ("damage", "surgeon"):
    gains = [
        a - b
        for share in SPARSITIES
        for a, b in zip(pruned[method][share], pruned["magnitude"][share], strict=True)
    ]
    print(f"{method}: better than magnitude in {sum(g > 0 for g in gains)} of {len(gains)} cases")
    assert min(gains) < -0.005
    assert max(gains) > 0.005
    better[method] = sum(g > 0 for g in gains) / len(gains)
assert better["damage"] > 0.5
assert better["surgeon"] < 0.7

# %% [markdown]
# The first lines show the worst and the best of the three networks, in percent.
#
# ### Where the quadratic ends
#
# Rounds help because one large step leaves the region in which $J$ is near the quadratic of [(31.1)]. The predicted
# increase is then far below the real one.

# %% tags=["hide-input"] fold="Code of the figure" alt="Real increase of J against the predicted increase, both on logarithmic axes, for sparsities from 30 to 95 percent and three networks. The points are near the diagonal at small values and up to five times above it at large ones." caption="The real and the predicted increase of $J$ for sparsities from 30 % (lower left) to 95 % (upper right), with zeros and reply in one step, for three networks. On the dashed line both are equal. The more weights become zero, the further the real increase lies above the line."
levels = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
ratios: dict[float, list[float]] = {share: [] for share in levels}
fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
for seed, net in enumerate(networks):
    points = []
    for share in levels:
        V = with_zeros(net, share)
        points.append((predicted(net, V, DECAY), J(net, V) - J(net, net.W)))
        ratios[share].append(points[-1][0] / points[-1][1])
    ax.loglog(*zip(*points, strict=True), "o-", ms=4, label=f"seed {seed}")
ends = [min(p for p, _ in points), max(p for p, _ in points)]
ax.loglog(ends, ends, "--", lw=1)
ax.set(xlabel="predicted increase of J", ylabel="real increase of J")
ax.legend()
plt.show()

# %% tags=["hide-input"] fold="Measured: the predicted over the real increase"
for share, values in ratios.items():
    print(f"{share:4.0%} of zeros: predicted over real", *(f"{r:.2f}" for r in values))
assert all(0.7 < r < 1.05 for share in (0.3, 0.4, 0.5) for r in ratios[share])
assert all(r < 0.45 for share in (0.9, 0.95) for r in ratios[share])

# %% [markdown]
# So a change with a lower prediction can have a higher real cost. Here is an example. We remove half of the units as in
# [Figure 31.1], with the decay as damping and with a tenth of it. With the smaller damping, the predicted increase
# of $J$ is larger and the real one is smaller. The weights are larger then, but the loss grows less.

# %% tags=["hide-input"] fold="Measured: two dampings"
for seed, net in enumerate(networks):
    found, losses, squares = [], [], []
    for damping in (DECAY, DECAY / 10):
        V = removed(net, 0.5, "cost, with reply", damping=damping)
        found.append((predicted(net, V, DECAY), J(net, V) - J(net, net.W)))
        print(
            f"seed {seed}, damping {damping}: predicted {found[-1][0]:.1f}, real {found[-1][1]:.1f}"
        )
        losses.append(loss(net, V))
        squares.append(sum(W.square().sum() for W in V.values()))
    assert losses[1] < losses[0]
    assert squares[1] > squares[0]
    assert found[1][0] > found[0][0]
    assert found[1][1] < 0.95 * found[0][1]

# %% [markdown]
# ## What goes wrong
#
# **Dead inputs.** Some pixels are zero in all training images. Then $A$ has a row of zeros, and without decay the block
# has no inverse: the package refuses it. With decay, the weights of these pixels are zero at the minimum, so that
# removing them costs nothing. After a finite number of training steps they are nearly zero.

# %% tags=["hide-input"] fold="Measured: the costs of dead pixels; checked: a singular block is refused"
net = networks[0]
dead = (net.X == 0).all(0)
costs = costs_with_reply(net.W["0"], net.K["0"], DECAY)[:, :-1]
print(f"{int(dead.sum())} of 64 pixels are zero in all training images of seed 0")
print(
    f"their dearest weight costs {costs[:, dead].max():.0e}, the others' median {costs[:, ~dead].median():.0e}"
)
assert costs[:, dead].max() < 1e-2 * costs[:, ~dead].median()
try:
    costs_with_reply(net.W["0"], net.K["0"], 0.0)
except ValueError as error:
    print(fill(str(error), 100))
else:
    raise AssertionError("a singular block was inverted")

# %% [markdown]
# **The column of the bias.** The bias is the last column of $W$, and its input is 1. `column_costs` gives a cost for
# this column, too, but it is not a unit. The experiments above never remove it.
#
# **A mean loss.** $M$ must belong to the *sum* of the losses. The curvature of the mean is the curvature of the sum,
# divided by the number of data. Then the decay outweighs the curvature, and the kept weights hardly change in the
# reply.


# %% tags=["hide-input"] fold="Measured: replies by the curvature of the sum and of the mean, with 80 % of zeros"
def distance(V: Weights, W: Weights) -> float:
    return sum((V[n] - W[n]).square().sum().item() for n in W) ** 0.5


MEAN, losses = nn.CrossEntropyLoss(), []
for seed, net in enumerate(networks):
    wrong = over_loader(kfac, net.model, MEAN, [(net.X, net.y)])
    keep = {n: V != 0 for n, V in with_zeros(net, 0.8).items()}
    right = {n: reply(W, net.K[n], DECAY, keep[n]) for n, W in net.W.items()}
    of_mean = {n: reply(W, wrong[n], DECAY, keep[n]) for n, W in net.W.items()}
    print(
        f"seed {seed}: accuracy with sum {accuracy(net, right):.3f}, mean {accuracy(net, of_mean):.3f};",
        end=" ",
    )
    print(f"loss {loss(net, right):.0f} and {loss(net, of_mean):.0f}")
    assert_exact(wrong["0"].trace() * len(net.X), net.K["0"].trace())
    silent = masked(net.W, keep)
    assert distance(of_mean, silent) < 0.2 * distance(right, silent)
    losses.append(loss(net, of_mean) / loss(net, right))
assert min(losses) > 1.5

# %% [markdown]
# ## In one minute
#
# - **Cost.** At a minimum of loss plus decay, a change costs [(31.1)] to second order. The damping is the weight decay.
# - **Choice and reply.** Choose the weights that become zero by their costs, then let all others reply. At high
#   sparsity the reply mattered more than the choice.
# - **Sets.** Costs of single weights do not add. Costs of coefficients in the eigenbasis do ([Theorem 31.3]).
# - **Units.** For one Kronecker product, the reply to whole rows and columns has a closed form ([Theorem 31.2]).
#   Removing columns with a reply removes units.
# - **Rounds.** Fresh curvature matters most at high sparsity, where one quadratic is not enough.
#
# ## Exercises
#
#
# **Exercise 31.1.** Two units always have equal values. The inputs of the next layer have no other linear dependence.
# Replace $A$ by $A + \epsilon I$. What does each of the two columns $w_1$, $w_2$ cost for $\epsilon \to 0$? What does
# the second one cost after the first is gone? Conclude why the costs are computed again after each column.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Let $A$ be without damping. The vector $(e_1 - e_2) / \sqrt 2$ is an eigenvector of $A + \epsilon I$ with the
# eigenvalue $\epsilon$. So the first diagonal entries of the inverse are $1 / (2 \epsilon)$ up to a bounded number.
# Column 1 costs about $\epsilon \, w_1^\top B w_1$ and column 2 about $\epsilon \, w_2^\top B w_2$. Both costs go to
# zero. When column 1 is gone, the reply has made column 2 equal to $w_1 + w_2$ in the limit. Its cost is now
# $\tfrac12 (w_1 + w_2)^\top B (w_1 + w_2) / (A_r^{-1})_{22}$, where $A_r$ is $A$ without row and column 1. This does
# not go to zero, unless $w_1 = -w_2$. With costs that were computed once, both columns would be removed.
#
# </details>
#
# **Exercise 31.2.** SparseGPT visits the inputs in order. At input $j$, only the weights of later inputs may reply. So
# it needs $(A_{j:, j:})^{-1}$ for each $j$, where $A_{j:, j:}$ is $A$ from row and column $j$ on. Let $U$ be the upper
# triangular Cholesky factor of the whole inverse, $A^{-1} = U^\top U$. Show that $U_{jj}^2$ is the first diagonal entry
# of $(A_{j:, j:})^{-1}$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Then $A = U^{-1} U^{-\top}$ with $U^{-1}$ upper triangular. Rows $j$ and later of $U^{-1}$ are zero before column $j$,
# so $A_{j:, j:} = T T^\top$ with the trailing block $T = (U^{-1})_{j:, j:}$. Its inverse is $T^{-\top} T^{-1}$, and
# $T^{-1} = U_{j:, j:}$ is upper triangular. The first column of $U_{j:, j:}$ is zero below its first entry $U_{jj}$.
# The first diagonal entry of $T^{-\top} T^{-1}$ is the squared norm of this column, $U_{jj}^2$.
#
# </details>
#
# **Exercise 31.3.** For which positive definite $H$ do both costs of [(31.2)] agree for every weight? No weight is
# zero.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The quadratic has only one best reply, because $H$ is positive definite. So the costs agree if and only if this reply
# changes no other weight, which means that $H^{-1} e_i$ is a multiple of $e_i$. This holds for every $i$ if and only if
# $H$ is diagonal.
#
# </details>
#
# **Exercise 31.4 (write it).** Write a function `cost_of_two(W, M, damping, i, j)` that returns the cost of removing
# two weights at once with a reply, where `i` and `j` are places in `W.flatten()`. Solve a system with two unknowns
# only. The inverse of $H$ may be computed. The cell below has `check_cost_of_two`, which compares your function with
# `reply` for every pair, and one solution.
#
# <details class="solution" markdown="1">
# <summary>Hint</summary>
#
# The best change is $\Delta = -H^{-1} E \lambda$ with the two columns $E$ of the identity and $E^\top \Delta = -w_E$.
# Its cost is $\tfrac12 w_E^\top (E^\top H^{-1} E)^{-1} w_E$.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
W, M = random_layer(3, 4)  # 31.1
rows = torch.randn(20, 3)
rows = torch.cat([rows, rows[:, :1]], 1)  # the last input repeats the first
for damping in (1e-3, 1e-6):
    K = Kronecker(rows.T @ rows / 20 + damping * torch.eye(4), M.B)
    limit = damping * ((M.B @ W) * W).sum(0)[[0, 3]]  # the inverse has 1 / (2 * damping) there
    assert relative_error(column_costs(W, K)[[0, 3]], limit) < 1e-2
left = Kronecker(K.A[:3, :3], K.B)
merged_column = without_column(W, K, 3)[:, :3]
assert relative_error(merged_column[:, 0], W[:, 0] + W[:, 3]) < 1e-4
assert column_costs(merged_column, left)[0] > 1e3 * column_costs(W, K)[0]

A = random_layer(3, 6)[1].A  # 31.2
U = torch.linalg.cholesky(A.inverse(), upper=True)
corners = torch.stack([A[j:, j:].inverse()[0, 0] for j in range(6)])
assert_exact(U.diagonal().square(), corners)
assert relative_error(A.inverse().diagonal(), corners) > 0.01

D = Diagonal(torch.rand(3, 4) + 0.1)  # 31.3
assert_exact(costs_with_reply(W, D, 0.2), costs_without_reply(W, D, 0.2))
ratio = costs_with_reply(W, M, 0.2) / costs_without_reply(W, M, 0.2)
assert (ratio < 1).all()


def cost_of_two(W: Tensor, M: Kronecker, damping: float, i: int, j: int) -> Tensor:
    """A solution of Exercise 31.4."""
    inverse = torch.linalg.inv(M.dense() + damping * torch.eye(W.numel()))
    pair = torch.tensor([i, j])
    removed = W.flatten()[pair]
    return removed @ torch.linalg.solve(inverse[pair][:, pair], removed) / 2


def check_cost_of_two(function) -> None:
    single = costs_with_reply(W, M, 0.2).flatten()
    for i, j in combinations(range(W.numel()), 2):
        keep = torch.ones(W.numel(), dtype=torch.bool)
        keep[[i, j]] = False
        change = reply(W, M, 0.2, keep.reshape(W.shape)) - W
        assert_exact(function(W, M, 0.2, i, j), predicted_increase(change, M, 0.2))
        assert function(W, M, 0.2, i, j) >= single[[i, j]].max() * (1 - 1e-9)


check_cost_of_two(cost_of_two)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [LeCun, Denker and Solla (1989)](bibliography.md#obd) and [Hassibi and Stork (1993)](bibliography.md#obs) for single
# weights; [Wang et al. (2019)](bibliography.md#eigendamage) for Kronecker factors, rows and columns and the eigenbasis;
# [Frantar and Alistarh (2023)](bibliography.md#sparsegpt) for the input factor alone, at scale.
