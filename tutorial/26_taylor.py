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
# # 26. Taylor mode: derivatives that travel forward
#
# **Part VII: PINNs.** How do the derivatives in a differential equation get through a network, in one
# forward pass?
#
# A physics-informed network $u$ is trained to solve a differential equation, say $\Delta u = f$. Its loss contains
# derivatives of $u$ with respect to its *input* $x$. The usual way differentiates the network by reverse mode, and the
# result by reverse mode again. In that computation, a layer is no longer one product of its matrix with its inputs, and
# KFAC needs such products. This chapter computes the derivatives *on the way forward*, together with the value
# ([Figure 26.1]). Behind an activation $\sigma$, applied to every entry of $z$, the Laplacian is
#
# $$
# \Delta \sigma(z) = \sigma'(z) \, \Delta z + \sigma''(z) \sum_i (\partial_i z)^2 ,
# $$
#
# and a linear layer multiplies its matrix with $d + 2$ vectors instead of one, for an input of $d$ coordinates: the
# value, $d$ first derivatives and the Laplacian. That is weight sharing ([Chapter 6](06_weight_sharing.py)).

# %% tags=["hide-input"] fold="Set-up"
import time
from collections.abc import Callable
from functools import partial
from math import factorial

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_scratch import checks
from kfac_scratch.show import code, diverging
from kfac_scratch.taylor import activations, rules
from kfac_scratch.taylor import jets as taylor
from kfac_scratch.taylor.expansions import SecondOrder, laplacian, second_order_sum
from kfac_scratch.taylor.faa_di_bruno import partitions
from kfac_scratch.taylor.jets import Elementwise, forward_laplacian
from kfac_scratch.taylor.partials import Partials, biharmonic, univariate_jets

checks.set_up()  # seed 0, float64, the GPU where there is one
assert_exact = partial(checks.assert_exact, tolerance=1e-12)  # two digits more than elsewhere

# %% tags=["hide-input"] alt="Five heat maps, one for each layer of a small network, with one row for the value, three for first derivatives and one for the Laplacian. The input has the point in its first row, the identity in the next three, and zeros in the last; from the first activation on, all rows are filled." caption="The coefficients of one point on their way through the network. Rows: value, three first derivatives, Laplacian. At the input: the point, the identity, zero. The first activation makes the Laplacian, and from there on all rows are filled."
net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh()).requires_grad_(False)
h = taylor.Jet(laplacian(3).start(torch.randn(1, 3)), laplacian(3))
stages = {"input": h.c[0]}
for name, layer in zip(("linear", "tanh", "linear", "tanh"), net, strict=True):
    h = layer(h)
    stages[f"{name} {len(stages)}"] = h.c[0]
fig, axes = plt.subplots(1, 5, figsize=(9.4, 2.6), layout="constrained")
for ax, (name, c) in zip(axes, stages.items(), strict=True):
    end = c.abs().max().item()
    ax.imshow(c.tolist(), cmap=diverging(), vmin=-end, vmax=end, aspect="auto")
    ax.set(title=name, xticks=[], yticks=range(5), yticklabels=[])
axes[0].set_yticklabels(["$u$", r"$\partial_1$", r"$\partial_2$", r"$\partial_3$", r"$\Delta$"])
plt.show()
assert (stages["linear 1"][-1] == 0).all()
assert (stages["tanh 2"][-1] != 0).all()
_ = torch.manual_seed(0)

# %% [markdown]
# After this chapter you will be able to
#
# - compute derivatives of any order along a direction in one forward pass, by rules for layers and activations;
# - compute a Laplacian with $d + 2$ vectors, and say why second derivatives may be summed early;
# - say what a differential operator makes of a linear layer: weight sharing with a bias at one position;
# - count how much more nested reverse mode costs.
#
# ## One layer by hand
#
# Take a point $x$ and a direction $v$, and walk along the line $x + \tau v$. Every intermediate
# quantity of the network is then a function of one number $\tau$, and we want its derivatives at $\tau = 0$. Call the
# value of such a quantity $h_0$, its first derivative $h_1$, its second $h_2$. The list
# $(h_0, h_1, h_2, \dots)$ is called a **jet**. At the input the jet is $(x, v, 0, 0, \dots)$.
#
# A linear layer $z = W h + b$ multiplies derivatives by the same $W$. The bias does not depend on $\tau$:
#
# $$
# z_0 = W h_0 + b, \qquad z_1 = W h_1, \qquad z_2 = W h_2 .
# \tag{26.1}
# $$
#
# An activation $\sigma$ acts on every entry by itself. Differentiate $\sigma(z(\tau))$ once with the
# chain rule, and once more with the chain rule and the product rule:
#
# $$
# h_0 = \sigma(z_0), \qquad
# h_1 = \sigma'(z_0) \, z_1, \qquad
# h_2 = \sigma'(z_0) \, z_2 + \sigma''(z_0) \, z_1^2 .
# \tag{26.2}
# $$
#
# All products are entry by entry. For $\sigma = \tanh$ with the value $t = \tanh(z_0)$, $\sigma' = 1 - t^2$
# and $\sigma'' = -2 t (1 - t^2)$. These rules suffice for a small network. The
# reference is nested reverse mode: differentiate, contract with $v$, and repeat.


# %%
def jet_by_hand(net: nn.Sequential, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative of a network of linear layers and tanh along `v`."""
    h0, h1, h2 = x, v, torch.zeros_like(v)
    for layer in net:
        if isinstance(layer, nn.Linear):
            h0, h1, h2 = layer.weight @ h0 + layer.bias, layer.weight @ h1, layer.weight @ h2
        else:
            t = torch.tanh(h0)
            slope, bend = 1 - t**2, -2 * t * (1 - t**2)
            h0, h1, h2 = t, slope * h1, slope * h2 + bend * h1**2
    return h0, h1, h2


def derivative(f: Callable[[Tensor], Tensor], X: Tensor, directions: list[Tensor]) -> Tensor:
    """The derivative of a scalar network along directions, by nested reverse mode."""
    X = X.detach().requires_grad_()
    u = f(X).squeeze(1)
    for v in directions:
        (gradient,) = torch.autograd.grad(u.sum(), X, create_graph=True)
        u = (gradient * v).sum(1)
    return u.detach()


net = nn.Sequential(
    nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)
).requires_grad_(False)  # fmt: skip
X, v = torch.randn(5, 3), torch.randn(3)
by_hand = torch.stack([torch.cat(jet_by_hand(net, x, v)) for x in X])  # [N, 3]
for k in range(3):
    assert_exact(by_hand[:, k], derivative(net, X, [v] * k))
print("value, first and second derivative at the first point:", *(f"{h:.4f}" for h in by_hand[0]))

# %% [markdown]
# Nested reverse mode multiplies with $W$ and its transpose several times, in an order that autodiff determines.
# The jet multiplies $W$ with three vectors side by side, and adds the bias to one of them.
#
# ## Any order: the formula of Faà di Bruno
#
# The pattern of [(26.2)] continues to any order. We state it for several directions $v_1, \dots, v_R$ at once, which
# also gives mixed derivatives. A derivative $\partial^\alpha$ is then named by a **multiset** $\alpha$ of directions,
# as $\{1, 1, 2\}$ for $\partial_{v_1} \partial_{v_1} \partial_{v_2}$. Its order $\lvert \alpha \rvert$ is the number of
# members. A *partition* $\pi$ of $\alpha$ puts the members into non-empty blocks; equal members count as different ones
# here, so that $\{1, 1\}$ has two partitions, one block or two.
#
# <div class="admonition theorem" markdown="1" id="thm-26.1">
# <p class="admonition-title" markdown="1"><b>Theorem 26.1 (Faà di Bruno)</b></p>
#
# Let $z$ be a scalar function of $x$ and $\sigma$ a function of one variable, both smooth enough. Then
#
# $$
# \partial^\alpha \sigma(z) = \sum_{\pi} \sigma^{(\lvert \pi \rvert)}(z)
# \prod_{\beta \in \pi} \partial^\beta z ,
# \tag{26.3}
# $$
#
# summed over all partitions $\pi$ of $\alpha$, with $\lvert \pi \rvert$ the number of blocks.
#
# </div>
#
# **Proof.** By induction over the order; without any direction both sides are $\sigma(z)$.
# Differentiate one term along another direction $v$. The factor $\sigma^{(k)}(z)$
# becomes $\sigma^{(k+1)}(z) \, \partial_v z$: the new member is a block by itself. Each of the factors
# $\partial^\beta z$ becomes $\partial_v \partial^\beta z$: the new member joins that block. Every partition of the
# larger multiset arises once in this way. $\blacksquare$
#
# ### As an algorithm
#
# The proof gives an algorithm: put the last member into a block by itself, or into each of the existing blocks.
# Equal products are merged and get a factor that counts them.

# %% tags=["beside", "remove-input"]
code(partitions)

# %% [markdown]
# Along one direction only the sizes of the blocks matter. If $n_j$ blocks have size $j$, there are
# $k! / \prod_j n_j! \, (j!)^{n_j}$ partitions of that shape, because permuting members within a block, or
# blocks of equal size, changes nothing. We print the rules for the first four orders, and check
# that count.

# %% tags=["hide-input"] fold="Checked: the number of partitions of every shape, up to order four"
for k in range(1, 5):
    terms = []
    for blocks, count in partitions((0,) * k).items():
        sizes = [len(block) for block in blocks]
        expected = factorial(k)
        for j in set(sizes):
            expected //= factorial(sizes.count(j)) * factorial(j) ** sizes.count(j)
        assert count == expected
        factors = " ".join(f"z{j}" for j in sizes)
        terms.append(f"{count if count > 1 else ''} σ{chr(39) * len(sizes)} {factors}".strip())
    print(f"h{k} =", " + ".join(terms))

# %% [markdown]
# These are derivatives. Taylor coefficients are $h_k / k!$. Some papers and libraries use Taylor coefficients, and
# their formula has other factors. Both conventions agree up to order one, so a test of first derivatives does not tell
# them apart.
#
# The derivatives of the activations are needed up to the same order. For $\tanh$ every one of them is a
# polynomial in $t$: if $\sigma^{(k)} = p_k(t)$, the chain rule gives $\sigma^{(k+1)} = p_k'(t) (1 - t^2)$. The
# [`activations`](api/taylor.activations.md) module has this and more functions. Six orders, along two
# directions, against nested reverse mode:

# %%
V = torch.randn(2, 3)
expansion = univariate_jets(V, 6)
coefficients = taylor.taylor_coefficients(net, X, expansion)  # [N, S, 1]
print("S =", len(expansion.names), "coefficients:", *expansion.names[:5], "and so on")
for s, alpha in enumerate(expansion.names):
    assert_exact(coefficients[:, s, 0], derivative(net, X, [V[r] for r in alpha]))

# %% [markdown]
# ### The growth of nested reverse mode
#
# Nested reverse mode differentiates a graph that already contains the previous derivative. In the count below, the
# graph grows by more than half with every order. A jet of order $k$ needs $k + 1$ numbers for each unit and the terms
# of [(26.3)], with equal ones merged. We count the nodes of the graph that autodiff keeps, for a network of two hidden
# layers.


# %% tags=["hide-input"] fold="Counted: nodes of the graph, and how they grow"
def nodes(u: Tensor) -> int:
    """How many operations autodiff has recorded for a tensor."""
    seen, left = set(), [u.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    return len(seen)


nested, forward = [], []
x = X.clone().requires_grad_()
u = net(x).squeeze(1)
for k in range(1, 7):
    u = (torch.autograd.grad(u.sum(), x, create_graph=True)[0] * v).sum(1)
    nested.append(nodes(u))
    forward.append(
        nodes(
            taylor.taylor_coefficients(net, X.clone().requires_grad_(), univariate_jets(v[None], k))
        )
    )
growth = [b / a for a, b in zip(nested, nested[1:], strict=False)]
print("nested: ", nested, "\nforward:", forward)
assert min(growth) > 1.5
assert growth[-1] > 2 > forward[-1] / forward[-2]
assert forward[-1] < nested[-1] / 2
assert forward[0] > nested[0]

# %% tags=["hide-input"] alt="Number of recorded operations against the order of the derivative, on a logarithmic axis. Nested reverse mode is nearly a straight line, which rises from about ten to over a thousand at order six; Taylor mode starts higher and stays below three hundred." caption="Operations that autodiff records for one derivative of order $k$. Nested reverse mode grows by a factor with every order, Taylor mode by some tens of operations. Taylor mode records more operations at order one and far fewer at order six."
fig, ax = plt.subplots(figsize=(5.4, 3.2), layout="constrained")
ax.semilogy(range(1, 7), nested, "o-", label="nested reverse mode")
ax.semilogy(range(1, 7), forward, "s-", label="Taylor mode")
ax.set(xlabel="order $k$", ylabel="operations recorded")
ax.legend()
plt.show()

# %% [markdown]
# ## The forward Laplacian
#
# Many differential equations contain sums of derivatives, for example the
# Laplacian $\Delta u = \sum_i \partial_i^2 u$. One jet for every coordinate would carry
# $1 + 2 d$ vectors through the network, of which $d$ are summed at the end. The sum may be taken earlier. By [(26.2)],
# at every activation
#
# $$
# \sum_i \partial_i^2 \sigma(z)
# = \sigma'(z) \underbrace{\sum_i \partial_i^2 z}_{\ell}
# + \sigma''(z) \underbrace{\sum_i (\partial_i z)^2}_{q} .
# \tag{26.4}
# $$
#
# The second derivatives enter through their sum $\ell$ only, because the derivative of highest order
# is *linear* in [(26.3)]: only the partition with a single block contains it. And linear layers commute with sums. So
#
# $$
# \bigl( z, \; \partial_1 z, \dots, \partial_d z, \; \ell \bigr)
# \qquad \text{with } S = d + 2 \text{ vectors}
# \tag{26.5}
# $$
#
# is closed: these vectors at the output of a layer depend only on those at its input. This is the
# **forward Laplacian**. The argument does not need unit weights. For any matrix $C$,
# also one that differs from datum to datum,
#
# $$
# \begin{aligned}
# \ell_C &= \sum_{ij} C_{ij} \, \partial_i \partial_j z , \\
# \sum_{ij} C_{ij} \, \partial_i \partial_j \sigma(z)
# &= \sigma'(z) \, \ell_C + \sigma''(z) \sum_{ij} C_{ij} \, \partial_i z \, \partial_j z .
# \end{aligned}
# \tag{26.6}
# $$
#
# ### An example in numbers
#
# Let $z = (x_1 + x_2, \; x_1 - 2 x_2)$, $\sigma(z) = z^2$ and $u = \sigma(z_1) + \sigma(z_2)$, at the point $x = (1,
# 2)$. Here $\sigma' = 2 z$ and $\sigma'' = 2$. The cell carries the value, two first derivatives and the Laplacian
# through the three layers. By hand, $u = 2 x_1^2 - 2 x_1 x_2 + 5 x_2^2$, with Laplacian $4 + 10$.

# %%
W = torch.tensor([[1.0, 1.0], [1.0, -2.0]])
h = torch.tensor(
    [[1.0, 2.0], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
)  # x, first derivatives, Laplacian
z = h @ W.T
value, first, top = z[0], z[1:3], z[3]
squared = torch.stack([value**2, *(2 * value * first), 2 * value * top + 2 * first.square().sum(0)])
total = squared.sum(1)
for name, *rows in zip(("u", "∂₁u", "∂₂u", "Δu"), h, z, squared, total, strict=True):
    x, linear, square, sum_ = (str(row.int().tolist()) for row in rows)
    print(f"{name:4} input {x:8} linear {linear:9} squared {square:9} sum {sum_}")
assert total.tolist() == [18.0, 0.0, 18.0, 14.0]

# %% [markdown]
# The same with loops, for a network of linear layers and tanh, one point and any $C$:


# %%
def forward_laplacian_by_hand(net: nn.Sequential, x: Tensor, C: Tensor) -> Tensor:
    """`sum_ij C_ij d_i d_j u` at one point."""
    d = len(x)
    value, first, top = x, list(torch.eye(d)), torch.zeros(d)
    for layer in net:
        if isinstance(layer, nn.Linear):
            value = layer.weight @ value + layer.bias
            first, top = [layer.weight @ h for h in first], layer.weight @ top
        else:
            t = torch.tanh(value)
            slope, bend = 1 - t**2, -2 * t * (1 - t**2)
            q = sum(C[i, j] * first[i] * first[j] for i in range(d) for j in range(d))
            value, first, top = t, [slope * h for h in first], slope * top + bend * q
    return top


# %% [markdown]
# In the package, `SecondOrder` holds directions and the weights $C$, and its method `form` is the weighted sum of
# products in [(26.6)]. Training needs the reverse pass of this rule at every step. This pass contains $\sigma'''$ and
# is written by hand. (Tests differentiate [(26.3)] by autodiff and compare.)

# %% tags=["remove-input"]
code(SecondOrder.form, taylor.forward_laplacian)

# %% tags=["hide-input"] fold="Checked: Laplacians, sums with any C, and sums over some coordinates, against nested reverse mode"
hessian = torch.stack(
    [torch.stack([derivative(net, X, [e, f]) for f in torch.eye(3)], 1) for e in torch.eye(3)], 1
)  # [N, 3, 3]
u, du, lap = forward_laplacian(net, X)
assert_exact(lap.squeeze(1), hessian.diagonal(dim1=1, dim2=2).sum(1))
assert_exact(u, net(X))
assert_exact(du[:, 1, 0], derivative(net, X, [torch.eye(3)[1]]))

C = torch.randn(3, 3)  # neither symmetric nor definite
expected = torch.einsum("ij,nij->n", C, hessian)
assert_exact(torch.stack([forward_laplacian_by_hand(net, x, C) for x in X])[:, 0], expected)
assert_exact(taylor.taylor_coefficients(net, X, second_order_sum(C))[:, -1, 0], expected)

heat = taylor.taylor_coefficients(
    net, X, laplacian(3, coordinates=[1, 2])
)  # coordinate 0 is the time
assert_exact(heat[:, -1, 0], hessian[:, 1, 1] + hessian[:, 2, 2])

per_datum = torch.randn(5, 3, 3)
found = taylor.taylor_coefficients(net, X, second_order_sum(per_datum))[:, -1, 0]
assert_exact(found, torch.einsum("nij,nij->n", per_datum, hessian))
assert not torch.allclose(found, expected)

# %% [markdown]
# ## What it costs
#
# There are three ways to compute a Laplacian. *Forward*: as above. *Nested*: the gradient by reverse mode, and each of
# its $d$ entries differentiated by reverse mode. *Hessian*: the trace of `torch.func.hessian`. We count the
# multiplications in products of matrices, where PyTorch dispatches them, for the Laplacian and for its gradient with
# respect to the weights. In units of one plain forward pass, a forward Laplacian with its reverse pass should cost
#
# $$
# \underbrace{d + 2}_{\text{forward}} + \underbrace{2 (d + 2)}_{\text{reverse}} = 3 (d + 2) ,
# \tag{26.7}
# $$
#
# since reverse mode multiplies with every $W$ twice, once for its input and once for $W$ itself (but
# not for the network's input, which makes it a little less). We also count the numbers that are
# written to memory for one point, and take the time of a batch of 100 points on the machine that built this page.


# %% tags=["hide-input"] fold="Counted: multiplications, numbers written and milliseconds"
def by_forward(net: nn.Module, X: Tensor) -> Tensor:
    return forward_laplacian(net, X)[2].squeeze(1)


def by_nesting(net: nn.Module, X: Tensor) -> Tensor:
    X = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(X).sum(), X, create_graph=True)
    columns = (
        torch.autograd.grad(gradient[:, i].sum(), X, create_graph=True)[0][:, i]
        for i in range(X.shape[1])
    )
    return sum(columns)


def by_hessian(net: nn.Module, X: Tensor) -> Tensor:
    hessian = torch.func.vmap(torch.func.hessian(lambda x: net(x).squeeze()))(X)
    return hessian.diagonal(dim1=1, dim2=2).sum(1)


class Count(TorchDispatchMode):
    """Multiplications in products of matrices, and numbers that are written to memory."""

    multiplications, written = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm", "mv"):
            self.multiplications += result.numel() * tensors[-2].shape[-1]
        if isinstance(result, Tensor):
            self.written += 0 if func.is_view else result.numel()
        return result


def cost(laplacian: Callable[[nn.Module, Tensor], Tensor], d: int) -> tuple[float, float, float]:
    """Both counts for one datum, the first in units of a forward pass; the best of five times."""
    net, X = nn.Sequential(), torch.randn(100, d)
    for i, (a, b) in enumerate([(d, 64), (64, 64), (64, 48), (48, 1)]):
        net.extend([nn.Linear(a, b), nn.Tanh()] if i < 3 else [nn.Linear(a, b)])

    def run() -> None:
        torch.autograd.grad(laplacian(net, X).sum(), net.parameters(), allow_unused=True)

    with Count() as count:
        run()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    unit = sum(p.numel() for p in net.parameters() if p.ndim == 2)
    return count.multiplications / len(X) / unit, count.written / len(X), min(times)


WAYS = {"forward": by_forward, "nested": by_nesting, "Hessian": by_hessian}
sizes = [2, 5, 10, 20, 50]
costs = {name: [cost(way, d) for d in sizes] for name, way in WAYS.items()}
for column, what in enumerate(("multiplications", "numbers written", "milliseconds")):
    print(f"{what:>16}, d = " + "".join(f"{d:>9}" for d in sizes))
    for name in WAYS:
        print(f"{name:>20} " + "".join(f"{row[column]:9.1f}" for row in costs[name]))
for i, d in enumerate(sizes):
    assert 2 * (d + 2) < costs["forward"][i][0] <= 3 * (d + 2)
    if d >= 10:
        assert costs["nested"][i][0] > 1.5 * costs["forward"][i][0]
        assert costs["Hessian"][i][0] > 1.5 * costs["forward"][i][0]
assert costs["nested"][-1][1] > 1.2 * costs["forward"][-1][1]
assert costs["Hessian"][-1][1] > 1.2 * costs["forward"][-1][1]
assert costs["nested"][0][1] < costs["forward"][0][1]  # with d = 2, nesting writes fewer numbers

# %% tags=["hide-input"] alt="Multiplications in units of a forward pass against the dimension from 2 to 50, on logarithmic axes. The forward Laplacian lies just below a dashed line; nesting and the Hessian lie above it by a factor of about two at large dimensions." caption="Multiplications for a Laplacian and its gradient with respect to the weights, in units of one forward pass. Dashed: the bound $3 (d + 2)$ of [(26.7)]."
fig, ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
for name, values in costs.items():
    (line,) = ax.loglog(sizes, [row[0] for row in values], "o-")
    ax.annotate(
        name,
        (sizes[-1], values[-1][0]),
        (7, -14 if name == "nested" else -2),
        textcoords="offset points",
        color=line.get_color(),
    )
ax.loglog(sizes, [3 * (d + 2) for d in sizes], "--", linewidth=1, color=ax.xaxis.label.get_color())
ax.set(xlabel="dimension $d$", ylabel="forward passes", xlim=(1.8, 90))
ax.set_xticks(sizes, labels=sizes)
ax.minorticks_off()
plt.show()

# %% [markdown]
# In many dimensions, the forward Laplacian needs about half of the multiplications, and writes fewer numbers. With
# $d = 2$ it saves a smaller part of them, and writes more numbers than nesting. The times of such small networks need
# not follow the counts. The benchmark `python -m benchmarks.pinn` measures time and memory, also on a GPU. The larger
# benefit is that layers keep their form, as the next sections show.
#
# ## Any forward pass, by overloading
#
# A class `Jet` holds the coefficients `c` of shape $[N, S, h]$ and behaves like the tensor of values, of
# shape $[N, h]$. If an argument of a PyTorch function has a method `__torch_function__`, PyTorch calls this method
# in place of the function. So a *jet can be passed to a model in place of a tensor*, and the model is not changed. The
# rule of a linear layer, `_linear`, multiplies all coefficients, and adds the bias to the value only:

# %% tags=["remove-input"]
code(taylor.Jet.__torch_function__, rules._linear, taylor.taylor_coefficients)

# %% [markdown]
# Sums of jets are sums of coefficients, a constant that is added changes the value only, and products follow
# the rule of Leibniz. These rules are enough for several usual architectures: residual connections, features
# $\sin(B x), \cos(B x)$ with fixed frequencies, and networks multiplied by a function that vanishes on
# the boundary, so that the condition $u = 0$ holds there exactly. An activation that PyTorch does not know comes
# with its derivatives:


# %%
def sinc_like(z: Tensor, K: int) -> list[Tensor]:
    """`z sin(z)`, as a list of its derivatives up to order K."""
    s = activations.sin(z, K)
    return [z * s[0]] + [z * s[k] + k * s[k - 1] for k in range(1, K + 1)]


class Hard(nn.Module):
    """A network that is zero where the first coordinate is 0 or 1."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies = torch.randn(3, 4)
        self.first, self.second, self.last = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 1)
        self.activation = Elementwise(sinc_like)

    def forward(self, x: Tensor) -> Tensor:
        z = x @ self.frequencies
        h = torch.tanh(self.first(torch.cat([torch.sin(z), torch.cos(z)], dim=1)))
        h = h + self.activation(self.second(h))  # a residual connection
        return x[:, :1] * (1 - x[:, :1]) * self.last(h)


model = Hard()
expansion = Partials(torch.eye(3), [(0, 0, 1, 2)], sums=[{(0, 0): 1.0, (1, 1): -1.0}])
wave = taylor.taylor_coefficients(model, X, expansion)
for s, alpha in enumerate(expansion.names[:-1]):
    assert_exact(wave[:, s, 0], derivative(model, X, [torch.eye(3)[i] for i in alpha]))
second = [derivative(model, X, [torch.eye(3)[i]] * 2) for i in (0, 1)]
assert_exact(wave[:, -1, 0], second[0] - second[1])
on_boundary = torch.cat([torch.ones(5, 1), torch.randn(5, 2)], dim=1)
assert (model(on_boundary) == 0).all()

# %% [markdown]
# ## A network of coefficients
#
# Line up the $S$ coefficients of every layer's input as rows, as in [Figure 26.1]. Then by [(26.1)] a linear layer
# computes
#
# $$
# z_{ns} = W a_{ns}, \qquad
# a_{n0} = \begin{pmatrix} h_{n0} \\ 1 \end{pmatrix}, \quad
# a_{ns} = \begin{pmatrix} h_{ns} \\ 0 \end{pmatrix} \text{ for } s \gt 0 ,
# \tag{26.8}
# $$
#
# with the value at $s = 0$, and the bias in the last column of $W$, as always. That is a layer with weight sharing and
# $S = d + 2$ positions. Only the bias is unusual: its input is 1 at one position and 0 at all others. Between the
# linear layers, an activation mixes the positions, as attention does. [Chapter 27](27_pinn.py) applies KFAC to this
# network.

# %% [markdown]
# ## Sums of higher order
#
# The plate equation has $\Delta^2 u = \sum_{ij} \partial_i^2 \partial_j^2 u$. All its derivatives of order
# four travel as one sum, by the same argument, but those of lower order that [(26.3)] needs must be
# kept. These belong to all multisets contained in some $\{i, i, j, j\}$: the value, $d$ of order one,
# $d (d + 1) / 2$ of order two, and $d^2$ of order three.
#
# A second way avoids mixed derivatives. A fourth derivative along $e_i \pm e_j$ contains
# $\partial_i^2 \partial_j^2$ six times, and in the sum over both signs the terms of odd order in $e_j$ cancel:
#
# $$
# \begin{aligned}
# \Delta^2 = \sum_i D_{e_i}^4 + \tfrac16 \sum_{i \lt j} \bigl(
# & D_{e_i + e_j}^4 + D_{e_i - e_j}^4 \\
# & - 2 D_{e_i}^4 - 2 D_{e_j}^4 \bigr) ,
# \end{aligned}
# \tag{26.9}
# $$
#
# with $D_v^4$ the fourth derivative along $v$. That takes $d^2$ directions with three kept coefficients each.

# %% tags=["hide-input"] fold="Checked: both ways give the same biharmonic, and how many coefficients each needs"
for d in (2, 3, 6):
    directions, weights = list(torch.eye(d)), [1.0 - (d - 1) / 3] * d
    for i in range(d):
        for j in range(i):
            directions += [torch.eye(d)[i] + torch.eye(d)[j], torch.eye(d)[i] - torch.eye(d)[j]]
            weights += [1 / 6, 1 / 6]
    mixed = biharmonic(d)
    along = Partials(
        torch.stack(directions), sums=[{(r,) * 4: w for r, w in enumerate(weights)}]
    )  # fmt: skip
    plate = nn.Sequential(nn.Linear(d, 7), nn.Tanh(), nn.Linear(7, 7), nn.SiLU(), nn.Linear(7, 1))
    Z = torch.randn(4, d)
    a, b = (taylor.taylor_coefficients(plate, Z, e)[:, -1] for e in (mixed, along))
    assert (a - b).abs().max() < 1e-11 * a.abs().max()
    print(f"d = {d}: {len(mixed.names)} coefficients with mixed derivatives,", end=" ")
    print(f"{len(along.names)} with directions")
    assert len(mixed.names) == 2 + d + d * (d + 1) // 2 + d**2
    assert len(along.names) == 2 + 3 * d**2

# %% [markdown]
# Exercise 26.3 finds a set of coefficients that is smaller than both.
#
# ## What goes wrong in practice
#
# **A network whose second derivative is zero.** ReLU is piecewise linear, so $\sigma'' = 0$ wherever it exists, and the
# Laplacian of a ReLU network is zero at every point where it is defined. The residual of $\Delta u = f$ at these points
# is then $-f$ for all weights, and no error is raised: the loss and its gradients are finite. The function
# $\max(0, z)^2$ has a second derivative that is not zero for $z > 0$:

# %%
kinked = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
assert (forward_laplacian(kinked, X)[2] == 0).all()
assert (by_nesting(kinked, X) == 0).all()  # nesting does not help


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) ** 2


bent = nn.Sequential(nn.Linear(3, 8), SquaredReLU(), nn.Linear(8, 1))
assert_exact(forward_laplacian(bent, X)[2].squeeze(1), by_nesting(bent, X))
assert forward_laplacian(bent, X)[2].abs().max() > 0.01

# %% [markdown]
# **The bias in every row.** If the coefficients are stacked into one batch of $N S$ vectors and handed to
# `nn.Linear`, the bias is added to derivatives, too. The error is invisible in a network whose biases are still zero,
# as some initialisations make them.


# %%
def careless(net: nn.Sequential, X: Tensor) -> Tensor:
    h = taylor.Jet(laplacian(3).start(X), laplacian(3))
    for layer in net:
        linear = isinstance(layer, nn.Linear)
        h = taylor.Jet(layer(h.c), h.expansion) if linear else layer(h)  # b reaches all S rows
    return h.c[:, -1]


assert (careless(net, X) - lap).abs().max() > 0.1 * lap.abs().max()
unbiased = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
for layer in (unbiased[0], unbiased[2]):
    nn.init.zeros_(layer.bias)
assert_exact(careless(unbiased, X), forward_laplacian(unbiased, X)[2])

# %% [markdown]
# **Functions that mix data.** Batch normalisation in training mode makes the output for one point depend on all others.
# Then "the derivative with respect to the point's own input" is no longer what the network computes for the batch.
# `Jet` has rules for functions that act on each datum alone. A function without a rule raises an error that names it,
# even if it acts on each datum alone, as softsign does:

# %%
for layer in (nn.BatchNorm1d(3, affine=False, track_running_stats=False), nn.Softsign()):
    try:
        taylor.taylor_coefficients(layer, X, laplacian(3))
        raise AssertionError("should have been refused")
    except NotImplementedError as error:
        print(str(error)[:84], "...")

# %% [markdown]
# ## In one minute
#
# - A jet holds a value and its derivatives along a direction. Linear layers multiply every entry; activations follow
#   the formula of Faà di Bruno.
# - Derivatives of the highest order enter linearly, so their sum can be carried in place of its terms. The Laplacian
#   needs $d + 2$ vectors.
# - The graph of nested reverse mode grows by a factor with every order. For a Laplacian in many dimensions
#   it needs about twice the multiplications.
# - With coefficients as positions, a PINN's linear layers are layers with weight sharing. The bias has the input 1 at
#   the value and 0 at derivatives.
# - The Laplacian of a ReLU network is zero almost everywhere. Batch normalisation in training mode mixes data, and
#   Taylor mode has no rule for it.
#
# ## Exercises
#
# **Exercise 26.1.** Find the rule for the product $f g$ of two scalar functions in the forward
# Laplacian: $\Delta (f g)$ from the coefficients of $f$ and $g$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $\partial_i^2 (f g) = (\partial_i^2 f)\, g + 2\, \partial_i f\, \partial_i g + f\, \partial_i^2 g$, and the sum over
# $i$ needs second derivatives only summed up: $\Delta (f g) = g\, \Delta f + 2 \sum_i \partial_i f\, \partial_i g + f\,
# \Delta g$. So [(26.5)] is closed under products as well.
#
# </details>
#
# **Exercise 26.2.** Which directions and weights give $\ell_C$ of [(26.6)], for a symmetric $C$ of rank
# $r$, with $S = r + 2$ coefficients? When is this of use?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Let $C = \sum_k w_k v_k v_k^\top$, say from the eigenvectors, $r$ of them with $w_k \ne 0$. Then
# $\sum_{ij} C_{ij} \partial_i \partial_j = \sum_k w_k D_{v_k}^2$. Carry the first derivatives along the
# $v_k$ only. It saves work for $r \lt d$, provided that the equation does not need the whole gradient.
#
# </details>
#
# **Exercise 26.3.** Show that the biharmonic operator needs no other coefficients than $z$,
# $\partial_i z$, $\partial_i \partial_j z$ for $i \le j$, $\partial_i \Delta z$ and $\Delta^2 z$. How many are these?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# In [(26.3)] for $\{i, i, j, j\}$, summed over $i$ and $j$, a block of three occurs with a block of one: $4 \sum_{ij}
# \partial_i z \, \partial_i \partial_j^2 z = 4 \sum_i \partial_i z\, \partial_i \Delta z$. So derivatives of order
# three are needed in these sums only. And for $\partial_i \Delta \sigma(z)$ itself they enter linearly, through the
# same sums; the rest has orders one and two. Together $2 + 2 d + d (d + 1) / 2$ coefficients instead of $2 + d + d (d +
# 1) / 2 + d^2$.
#
# </details>
#
# **Exercise 26.4.** A jet of order $K$ along one direction, and a network with hidden layers of width $h$.
# How does the work of the linear layers grow with $K$, and how that of the activations?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Each linear layer multiplies $K + 1$ vectors: proportional to $K h^2$. An activation has a term for every partition of
# every number up to $K$ into sizes, proportional to $h$. Up to powers of $K$, their number grows like $e^{c \sqrt K}$,
# slower than any geometric growth.
#
# </details>
#
# **Exercise 26.5 (write it).** Write a function `third_derivative(net, x, v)` for a network of linear layers and tanh,
# a point `x` and a direction `v`, both of shape `[d]`. It returns the third derivative along `v`, of shape `[1]`, in
# one forward pass and without autodiff. Begin with `jet_by_hand`. The cell below has `check_third_derivative`, which
# compares your function with nested reverse mode, and one solution.
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
E = laplacian(3)  # 26.1
f, g = (taylor.taylor_coefficients(n, X, E) for n in (net, model))
df, dg = f[:, 1:4], g[:, 1:4]
product = g[:, 0] * f[:, 4] + 2 * (df * dg).sum(1) + f[:, 0] * g[:, 4]
assert_exact(product, E.product(f, g)[:, 4])
assert_exact(product.squeeze(1), by_nesting(lambda x: net(x) * model(x), X).detach())

w, Q = torch.linalg.eigh(torch.outer(v, v) - torch.outer(X[0], X[0]))  # 26.2: rank two
used = w.abs() > 1e-8
low_rank = SecondOrder(Q.T[used], w[None, used])
assert len(low_rank.names) == 2 + 2
full = taylor.taylor_coefficients(
    net, X, second_order_sum(torch.outer(v, v) - torch.outer(X[0], X[0]))
)
assert_exact(taylor.taylor_coefficients(net, X, low_rank)[:, -1], full[:, -1])

counts = [2 + 2 * d + d * (d + 1) // 2 for d in (2, 3, 6)]  # 26.3
assert all(n < len(biharmonic(d).names) for n, d in zip(counts, (2, 3, 6), strict=True))
third = Partials(torch.eye(2), sums=[{(0, 0, 0): 1.0, (0, 1, 1): 1.0}])  # sums of order three
assert len(third.names) == 1 + 2 + 3 + 1

numbers = [len(partitions((0,) * k)) for k in range(1, 9)]  # 26.4
assert numbers == [1, 2, 3, 5, 7, 11, 15, 22]


def third_derivative(net: nn.Sequential, x: Tensor, v: Tensor) -> Tensor:
    """A solution of Exercise 26.5."""
    h0, h1, h2, h3 = x, v, torch.zeros_like(v), torch.zeros_like(v)
    for layer in net:
        if isinstance(layer, nn.Linear):
            h0 = layer.weight @ h0 + layer.bias
            h1, h2, h3 = (layer.weight @ h for h in (h1, h2, h3))
        else:
            t = torch.tanh(h0)
            s1, s2, s3 = 1 - t**2, -2 * t * (1 - t**2), -2 * (1 - t**2) * (1 - 3 * t**2)
            h3 = s1 * h3 + 3 * s2 * h1 * h2 + s3 * h1**3
            h0, h1, h2 = t, s1 * h1, s1 * h2 + s2 * h1**2
    return h3


def check_third_derivative(function: Callable[[nn.Sequential, Tensor, Tensor], Tensor]) -> None:
    found = torch.stack([function(net, x, v) for x in X])
    assert_exact(found[:, 0], derivative(net, X, [v] * 3))


check_third_derivative(third_derivative)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Griewank and Walther (2008)](bibliography.md#griewank-walther), chapter 13, is the textbook on Taylor mode.
# [Bettencourt et al. (2019)](bibliography.md#jax-jet) bring it to machine learning. The forward Laplacian is from [Li
# et al. (2024)](bibliography.md#forward-laplacian), for wave functions of many electrons. [Dangel et al.
# (2025)](bibliography.md#collapsing) explain it as a sum that is pulled through the network, with more operators of
# higher order. [Dangel et al. (2024)](bibliography.md#pinns) treat the coefficients as positions with shared weights
# and derive KFAC for them, the subject of the next chapter.
