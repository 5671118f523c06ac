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
# # 27. KFAC for PINNs: derivatives share weights
#
# **Part VII: PINNs.** What is KFAC for a loss that is made of derivatives?
#
# A physics-informed neural network (PINN) is trained to satisfy a differential equation. Its loss contains derivatives
# of the network with respect to its *inputs*, and a differential operator often makes this loss badly conditioned.
# [Chapter 26](26_taylor.py) wrote the network with its derivatives as a network of Taylor coefficients in which all of
# them share the weights. KFAC for a PINN is KFAC for this network:
#
# $$
# F = \sum_n \operatorname{vec}(G_n) \operatorname{vec}(G_n)^\top
# \approx \sum_{n s} g_{ns} g_{ns}^\top \; \otimes \; \frac{1}{N S} \sum_{n s} a_{ns} a_{ns}^\top ,
# \qquad G_n = \sum_s g_{ns} a_{ns}^\top .
# $$
#
# Here $a_{ns}$ is coefficient $s$ of $S$ of a layer's input at point $n$ of $N$ (the value, the first derivatives, the
# Laplacian), and $g_{ns}$ is the derivative of the scaled residual at this point with respect to coefficient $s$ of the
# layer's output. [Figure 27.1] shows both sides of $\approx$.

# %% tags=["hide-input"]
import textwrap
from itertools import product

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from kfac_scratch.approximations.ekfac import ekfac
from kfac_scratch.approximations.kfac import kfac
from kfac_scratch.checks import assert_exact, relative_error, set_up
from kfac_scratch.layer_io import LayerIO
from kfac_scratch.linalg import eye_like
from kfac_scratch.matrices.kronecker import Kronecker
from kfac_scratch.pinn import gramian as pinn_gramian
from kfac_scratch.pinn import terms as pinn
from kfac_scratch.pinn.gramian import (
    block_weights,
    flat,
    gramian,
    inner_product,
    joined,
    kernel_matrix,
    residuals,
    times,
    transposed_times,
)
from kfac_scratch.pinn.krylov import KFACKrylov, krylov_direction
from kfac_scratch.pinn.preconditioners import TermWise, congruence, damped_factors, ekfac_inverse
from kfac_scratch.pinn.problems import heat, kovasznay, mlp, poisson
from kfac_scratch.pinn.solvers import (
    best_combination,
    dense_solver,
    kernel_solver,
    line_search,
)
from kfac_scratch.pinn.steps import GaussNewton, KFACStar
from kfac_scratch.pinn.terms import Term, linearize
from kfac_scratch.show import code, diverging, matrices, style
from kfac_scratch.taylor.expansions import laplacian, value_only

set_up()  # seed 0, float64, the GPU where there is one

# %% tags=["hide-input"] fold="Code of the figure" alt="Two rows of two heat maps, for the interior term and the boundary term, of the middle layer. The exact block and KFAC's approximation beside it; the boundary pair looks alike, the interior pair differs in scale and in many details." caption="Poisson's equation, the middle layer of a small network: the exact block and KFAC, in one colour scale for each row. Bottom: for the boundary term, whose residual is a value, both look alike. Top: for the interior term, whose residual is a Laplacian, KFAC is much too large."
generator = torch.Generator(torch.get_default_device()).manual_seed(0)
first = flat(linearize(mlp(2, 6, 5, 1), poisson(2).terms(60, 20, generator)))
fig, axes = plt.subplots(2, 2, figsize=(5.4, 5.0), layout="constrained")
for row, part, title in zip(axes, first, ("interior", "boundary"), strict=True):
    F, K = part.ios["2"].block(), kfac(part.ios["2"]).dense()
    end = F.abs().max().item()
    for ax, M, kind in zip(row, (F, K), ("exact", "KFAC"), strict=True):
        ax.imshow(M.tolist(), cmap=diverging(), vmin=-end, vmax=end)
        ax.set(title=f"{title}: {kind}", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# After this chapter you will be able to
#
# - write an equation, its boundary conditions and measurements as terms of a loss,
# - get gradient, Jacobian products and Gauss-Newton blocks of that loss from one forward and one reverse pass,
# - say where KFAC of such a loss is exact, and how wrong it can be elsewhere,
# - invert the sum of two Kronecker products, and choose the length of a step by the exact model.
#
# [Chapter 28](28_pinn_results.py) measures when this pays.
#
# ## A differential equation as data
#
# The example is Poisson's equation on the unit square, $\Delta u + f = 0$ with $u = 0$ on the boundary. We choose the
# solution, $u^* = \sin \pi x_1 \sin \pi x_2$, and get the right-hand side $f = 2 \pi^2 u^*$. The loss measures how far
# a network $u$ is from satisfying both,
#
# $$
# L = \frac{w_1}{2 N_1} \sum_{n} \bigl( \Delta u(x_n) + f(x_n) \bigr)^2
# + \frac{w_2}{2 N_2} \sum_{n} u(x_n')^2 ,
# \tag{27.1}
# $$
#
# with points $x_n$ inside and $x_n'$ on the boundary. A term of the loss consists of three things: a *function of the
# network's Taylor coefficients*, a set of points, and the expansion, which says which coefficients are needed:


# %%
def solution(x: Tensor) -> Tensor:
    return torch.sin(torch.pi * x).prod(1, keepdim=True)


inside, border = torch.rand(60, 2), torch.rand(20, 2)
border[:10, 0], border[10:, 1] = torch.randint(2, (2, 10)) * 1.0
terms = [
    Term(lambda u, x: u.lap + 2 * torch.pi**2 * solution(x), inside, laplacian(2)),
    Term(lambda u, x: u.value, border, value_only(2)),
]
model = mlp(2, 6, 5, 1)
print(f"loss {pinn.pinn_loss(model, terms).item():.2f}")

# %% [markdown]
# Another equation is another function. Here is the equation of Allen and Cahn,
# $\partial_t u = \tfrac{1}{100} \partial_x^2 u + u - u^3$. It is nonlinear and has the time as coordinate 0. Its terms
# are the equation, an initial condition, and a measurement. Any number of terms may be added.


# %%
def allen_cahn(u, x):
    return u.d[0] - 0.01 * u.lap - u.value + u.value**3


def start(u, x):
    return u.value - x[:, 1:] ** 2 * torch.cos(torch.pi * x[:, 1:])


X = torch.rand(50, 2) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
phases = [
    Term(allen_cahn, X, laplacian(2, coordinates=[1])),
    Term(start, X * torch.tensor([0.0, 1.0]), value_only(2), weight=10.0),
    Term(lambda u, x: u.value + 0.9, torch.tensor([[0.5, 0.0]]), value_only(2)),  # one measurement
]
print(f"loss {pinn.pinn_loss(mlp(2, 6, 1), phases).item():.2f}")

# %% [markdown]
# A common mistake in such code raises no error: an output of shape $[N, 1]$ minus a target of shape $[N]$ is
# a matrix $[N, N]$, and its mean square is a plausible number. The package refuses such a residual. It also refuses a
# residual that does not use the derivative for which it declared the expansion:

# %% tags=["hide-input"] fold="Checked: two mistakes are refused"
mistakes = {
    "shapes": Term(lambda u, x: u.lap - solution(x)[:, 0], inside, laplacian(2)),
    "ignored": Term(lambda u, x: u.value - solution(x), inside, laplacian(2)),
}
for name, term in mistakes.items():
    try:
        linearize(model, [term])
        raise AssertionError("should have been refused")
    except ValueError as error:
        print(f"{name}:", *textwrap.wrap(str(error), 90), sep="\n    ")

# %% [markdown]
# ## One forward pass, one reverse pass
#
# Put all residuals into one vector $\rho$, scaled such that $L = \tfrac12 \lVert \rho \rVert^2$:
# an entry is $\rho_n = \sqrt{w / N} \, r(x_n)$. Let $J$ be its Jacobian with respect to all weights. Then
#
# $$
# \nabla L = J^\top \rho , \qquad \text{Gauss-Newton matrix } F = J^\top J .
# \tag{27.2}
# $$
#
# Texts on PINNs call this matrix the Gramian. A row of $J$ is found by backpropagation. A layer
# applies $W$ to the $S$ coefficients $a_{ns}$ of datum $n$, $z_{ns} = W a_{ns}$. Send the residual back
# through the network *of coefficients*, and let $g_{ns}$ be the vector that arrives at $z_{ns}$:
#
# $$
# g_{ns} = \frac{\partial \rho_n}{\partial z_{ns}} , \qquad
# \frac{\partial \rho_n}{\partial W} = \sum_{s=1}^S g_{ns} a_{ns}^\top = G_n .
# \tag{27.3}
# $$
#
# These $a$ and $g$ are a `LayerIO`, with one vector per residual of a datum ($V = 1$ for a scalar equation). The block
# of the layer is `io.block()`, and every approximation of the earlier parts applies to it. Only the
# bias differs from other layers: its inputs are $[1, 0, \dots, 0]$.
#
# In the package the reverse pass has two stages. First, the residual is linearised with respect to the few coefficients
# of the network's output. This works for nonlinear equations, and shows which coefficients are not used. Then one call
# of autodiff goes back to the outputs of all layers.

# %% tags=["remove-input"]
code(pinn._linearized)

# %% [markdown]
# We check these $a$ and $g$ against nested reverse mode, which does not use Taylor coefficients:

# %%
lin = linearize(model, terms)
parts = flat(lin)
x = inside.clone().requires_grad_()
(du,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
ddu = [torch.autograd.grad(du[:, i].sum(), x, create_graph=True)[0][:, i] for i in (0, 1)]
rho = (ddu[0] + ddu[1] + 2 * torch.pi**2 * solution(x)[:, 0]) / 60**0.5
assert_exact(parts[0].residuals[0], rho.detach())
for n in range(0, 60, 10):
    rows = torch.autograd.grad(rho[n], [model[2].weight, model[2].bias], retain_graph=True)
    G = parts[0].ios["2"].gradients()[0, n]
    assert_exact(G[:, :-1], rows[0])
    assert_exact(G[:, -1], rows[1])
gradient = transposed_times(parts, residuals(parts))
expected = torch.autograd.grad(pinn.pinn_loss(model, terms), model[0].weight)[0]
assert_exact(gradient["0"][:, :-1], expected)
for name, io in parts[0].ios.items():
    print(f"layer {name}: a {list(io.a.shape)}, g {list(io.g.shape)}")

# %% [markdown]
# The gradient needs no pass of its own: it follows from the same $a$ and $g$. So do products with the Jacobian,
# $(J V)_n = \sum_s g_{ns}^\top V a_{ns}$:

# %% tags=["remove-input"]
code(pinn_gramian._times, pinn_gramian.transposed_times)

# %% [markdown]
# ## KFAC, and when it is exact
#
# KFAC-expand treats the coefficients of a datum as if they were data, as in [Chapter 6](06_weight_sharing.py):
#
# $$
# A = \frac{1}{N S} \sum_{n, s} a_{ns} a_{ns}^\top , \qquad
# B = \sum_{n, s} g_{ns} g_{ns}^\top , \qquad
# F \approx B \otimes A .
# \tag{27.4}
# $$

# %%
for part, title in zip(parts, ("interior", "boundary"), strict=True):
    errors = [relative_error(kfac(io).dense(), io.block()) for io in part.ios.values()]
    print(f"{title}: relative errors", *(f"{e:.2f}" for e in errors))

# %% [markdown]
# The interior term is approximated badly, as [Figure 27.1] shows. Is that a bug? To tell, we need a case in which KFAC
# must be exact. Take a *linear* network, that is, linear layers with nothing between them. Take an operator that is a
# sum of the coefficients with factors that may differ from datum to datum: $r_n = \sum_s c_{ns} u_{ns}$ with
# $u_{n0} = u$, $u_{ni} = \partial_i u$, and so on. The layers behind the one that we look at are one matrix, so all
# positions get the same vector $v$, up to their factor: $g_{ns} = c_{ns} v$. With $Z_n = [a_{n1}, \dots, a_{nS}]^\top$,
# and the scale in $v$,
#
# $$
# F = v v^\top \otimes \sum_n Z_n^\top c_n c_n^\top Z_n , \qquad
# B \otimes A = v v^\top \otimes \frac{\sum_n \lVert c_n \rVert^2}{N S} \sum_n Z_n^\top Z_n .
# \tag{27.5}
# $$
#
# <div class="admonition theorem" markdown="1" id="thm-27.1">
# <p class="admonition-title" markdown="1"><b>Theorem 27.1 (an exact case)</b></p>
#
# In a linear network with one output, and for one term of the loss, let every point occur with several rows of factors
# $c = (\pm 1, \dots, \pm 1)$ which are an orthogonal design: $\sum c c^\top$ over the rows of a point is a multiple of
# $I$. Then KFAC-expand is exact in every layer.
#
# </div>
#
# **Proof.** Let a point $x_k$ have $m$ rows. Their sum in $F$ is
# $Z_k^\top (\sum c c^\top) Z_k = m Z_k^\top Z_k$, since the diagonal of $\sum c c^\top$ is $m$. On the right
# $\lVert c_n \rVert^2 = S$ cancels the $1 / S$, and $Z_k^\top Z_k$ also occurs $m$ times. $\blacksquare$
#
# This case tests every factor of an implementation: $1/N$, $1/S$, and the zeros in the bias column. The cell also
# checks that KFAC is not exact with a bias that reaches all positions, and that it is exact for a single datum without
# derivatives:

# %% tags=["hide-input"] fold="Checked: an orthogonal design and a single datum are exact, and two other cases are not"
S = 4
signs = torch.tensor(list(product([1.0, -1.0], repeat=S)))  # all 16 rows
points = torch.randn(3, 2).repeat_interleave(len(signs), 0)
signs = signs.repeat(3, 1)


def design(u, x):
    return sum(signs[:, s : s + 1] * part for s, part in enumerate([u.value, *u.d, u.lap]))


linear = nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 4), nn.Linear(4, 1))
for io in flat(linearize(linear, [Term(design, points, laplacian(2))]))[0].ios.values():
    assert_exact(kfac(io).dense(), io.block())
    everywhere = LayerIO(io.a.clone(), io.g)  # the pitfall of Chapter 26: a bias that reaches all
    everywhere.a[:, :, -1] = 1.0
    assert relative_error(kfac(everywhere).dense(), io.block()) > 0.01
for name in ("0", "2"):  # a nonlinear net and many points, even without derivatives
    io = parts[1].ios[name]
    assert relative_error(kfac(io).dense(), io.block()) > 1e-3
one_point = flat(linearize(model, [Term(lambda u, x: u.value, border[:1], value_only(2))]))[0]
for io in one_point.ios.values():
    assert_exact(kfac(io).dense(), io.block())

# %% [markdown]
# *With* derivatives, a single datum is not enough. Its first input ends with 1 and the others end with 0. If another
# input is not zero, $A$ has a rank of at least two, but $F$ has a rank of at most one. So KFAC with $B \ne 0$ is not
# exact.
#
# ### How wrong can it be?
#
# <div class="admonition theorem" markdown="1" id="thm-27.2">
# <p class="admonition-title" markdown="1"><b>Theorem 27.2 (too small by at most a known factor)</b></p>
#
# For a scalar equation and any network, $F \preceq N S^2 \; B \otimes A$. In particular, KFAC has curvature
# in every direction in which the exact block has curvature.
#
# </div>
#
# **Proof.** For a matrix $V$ of the layer's shape and $v = \operatorname{vec}(V)$, by the inequality of Cauchy and
# Schwarz,
#
# $$
# \begin{aligned}
# v^\top F v = \sum_n \Bigl( \sum_s g_{ns}^\top V a_{ns} \Bigr)^2
# &\le S \sum_{n s} \bigl( g_{ns}^\top V a_{ns} \bigr)^2 , \\
# N S \; v^\top (B \otimes A) \, v
# &= \sum_{n s, n' s'} \bigl( g_{ns}^\top V a_{n's'} \bigr)^2 .
# \end{aligned}
# $$
#
# Each square on the right of the first line is one of the squares of the second line. $\blacksquare$
#
# There is no such bound in the other direction: KFAC can be far too large. In the last layer of Poisson's equation,
# only the Laplacian is sent back. The positions of the value and of the first derivatives are dead, $g_{ns} = 0$, but
# their inputs count in $A$. The last bias even has no influence at all on $\Delta u$, and KFAC gives it curvature.

# %% tags=["hide-input"] fold="Checked: the bound, and KFAC with and without dead positions"
io = parts[0].ios["4"]
N, S, _ = io.a.shape
for of_layer in parts[0].ios.values():
    gap = N * S**2 * kfac(of_layer).dense() - of_layer.block()
    assert torch.linalg.eigvalsh(gap)[0] > -1e-10 * gap.trace()
alive = io.g.abs().amax((0, 1, 3)) > 0
pruned = LayerIO(io.a[:, alive], io.g[:, :, alive])
print(f"last layer: {int(alive.sum())} of {S} positions alive")
print(f"error {relative_error(kfac(io).dense(), io.block()):.2f},", end=" ")
print(f"and without the dead ones {relative_error(kfac(pruned).dense(), io.block()):.1e}")
assert io.block()[-1, -1] == 0 < kfac(io).dense()[-1, -1]
assert_exact(kfac(pruned).dense(), io.block())

# %% [markdown]
# Leaving out dead positions makes the last layer exact here. The package does not leave them out. This chapter does not
# measure the effect on training.
#
# ## Two terms, one inverse
#
# Interior and boundary have factors of their own. KFAC for [(27.1)] is a sum of two products, each with
# damped factors,
#
# $$
# P = \tilde B_1 \otimes \tilde A_1 + \tilde B_2 \otimes \tilde A_2 , \qquad
# \tilde A = A + \lambda I , \quad \tilde B = B + \lambda I .
# \tag{27.6}
# $$
#
# Two positive definite matrices can be diagonalised by one congruence. Take a matrix $K_A$ with
# $K_A^\top (\tilde A_1 + \tilde A_2) K_A = I$ and $K_A^\top \tilde A_1 K_A = \operatorname{diag}(\alpha)$; then
# $K_A^\top \tilde A_2 K_A = \operatorname{diag}(1 - \alpha)$. With the same for $B$,
#
# $$
# P^{-1} = (K_B \otimes K_A)
# \operatorname{diag} \left( \frac{1}{\beta_o \alpha_i + (1 - \beta_o)(1 - \alpha_i)} \right)
# (K_B \otimes K_A)^\top .
# \tag{27.7}
# $$
#
# Whitening by the sum of both terms keeps all $\alpha_i$ and $\beta_o$ in $[0, 1]$, and needs no inverse of a single
# term's factor.

# %% tags=["remove-input"]
code(congruence)

# %%
factors = [kfac(part.ios["2"]) for part in parts]
damped = tuple(damped_factors(K, 1.0, 1e-3) for K in factors)
P = damped[0].dense() + damped[1].dense()
V = torch.randn(5, 7)
assert_exact((congruence(damped) @ V).flatten(), torch.linalg.solve(P, V.flatten()))

# %% [markdown]
# ### The damping in an average from the identity
#
# The authors' code [averages factors over
# steps](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/kfac.py#L600),
# $\hat A_t = \beta \hat A_{t-1} + (1 - \beta) A_t$, and starts from $\hat A_0 = I$. Written as a sum,
# $\hat A_t = \beta^t I + (1 - \beta^t) \bar A_t$ with a proper weighted mean $\bar A_t$. So $\beta^t$ is a damping that
# decays from $\beta$ in the first step towards zero. Without this damping, the first steps would use only the $\lambda$
# that is set by hand, which may be as small as $10^{-10}$. `TermWise` keeps this damping and writes it explicitly, as
# `damped_factors(K, 1 - b**t, damping + b**t)`.

# %% tags=["hide-input"] fold="Checked: the average from the identity is this damping"
decay, A_hat, state = 0.6, eye_like(factors[0].A), None
for t in range(1, 4):
    batch = linearize(model, poisson(2).terms(60, 20, generator))
    A_hat = decay * A_hat + (1 - decay) * kfac(batch[0][0].ios["2"]).A
    state, _ = TermWise(decay).update(state, batch, 1e-10, t)
    ours = damped_factors(state["2"][0], 1 - decay**t, decay**t).A
    assert_exact(ours, A_hat)

# %% [markdown]
# ## From a preconditioner to a step
#
# Let $\Delta = -P^{-1} \nabla L$. How far should the step go along $\Delta$? The paper has two answers. **KFAC** adds
# momentum and searches along the line, by evaluating the loss at many powers of two. **KFAC\*** minimises the exact
# Gauss-Newton model in the plane of $\Delta$ and the last step $\delta$:
#
# $$
# \min_{\alpha, \mu} \; \tfrac12 \bigl\lVert J (\alpha \Delta + \mu \delta) + \rho \bigr\rVert^2
# + \tfrac{\lambda}{2} \lVert \alpha \Delta + \mu \delta \rVert^2 .
# \tag{27.8}
# $$
#
# These are two equations with two unknowns. They need $J \Delta$ and $J \delta$, which are a few products of small
# matrices with the $a$ and $g$ that are already there. More than two directions are possible.
# `two_directions_per_layer` gives each layer its own $\alpha$ and $\mu$, from the same products, and the minimum of the
# model is not higher, because these directions span the plane.

# %% tags=["remove-input"]
code(best_combination, KFACStar.step)

# %% [markdown]
# The last lines of `step` are a safeguard which the paper's algorithm lacks: a combination that does not lower the true
# loss is halved until it does. In the first step there is no $\delta$, and the step minimises the model along
# $\Delta$. With a fixed $P$, a linear residual and $\lambda = 0$, these steps are those of preconditioned conjugate
# gradients (Exercise 27.3). This special case is a reason to expect that the momentum helps.
#
# ### More directions
#
# The plane of $\Delta$ and $\delta$ is a small part of the space. Conjugate gradients solve
# $(J^\top J + \lambda I) p = -\nabla L$ with $P$ as the preconditioner. After $k$ iterations they have found the
# minimum of the model over
#
# $$
# \operatorname{span} \bigl\{ \Delta, \; P^{-1} (J^\top J + \lambda I) \Delta, \; \dots, \;
# (P^{-1} (J^\top J + \lambda I))^{k-1} \Delta \bigr\} .
# \tag{27.9}
# $$
#
# One iteration gives the best multiple of $\Delta$. Each further iteration needs a product with $J$ and one with
# $J^\top$, and no pass through a graph. The result is combined with the last $m$ steps as in [(27.8)]: $k = m = 1$
# gives the directions of KFAC\*. With $\lambda > 0$ and $k$ as large as the number of weights, exact arithmetic gives
# the direction of Gauss-Newton. Then the preconditioner changes the number of iterations, but not their limit.

# %% tags=["remove-input"]
code(krylov_direction, KFACKrylov.step)

# %% [markdown]
# How much does the preconditioner help? We take a network that has been trained for a few steps. We measure how far the
# model is from its minimum after $k$ iterations, relative to the start: without a preconditioner, with KFAC, and with
# EKFAC in the basis of [(27.7)], which a later section explains.

# %% tags=["hide-input"] fold="Measured: the distance from the minimum after k iterations, with three preconditioners"
torch.manual_seed(0)
net = mlp(2, 24, 24, 1)
draw = torch.Generator(torch.get_default_device()).manual_seed(0)
fixed = poisson(2).terms(200, 60, draw)
state = None
for _ in range(10):
    state = KFACKrylov(20, 1, 1e-6, preconditioner=TermWise(0.6, ekfac_inverse)).step(
        net, fixed, state
    )
trained = linearize(net, fixed)
rows, rho = flat(trained), residuals(flat(trained))


def gap(P, k: int, damping: float) -> float:
    """How far `k` iterations are from the model's minimum, relative to the start."""

    def model_value(p) -> float:
        return ((rho + times(rows, p)).square().sum() + damping * inner_product(p, p)).item() / 2

    lowest, highest = (
        model_value(kernel_solver(rows, rho)(damping).step),
        rho.square().sum().item() / 2,
    )
    return (model_value(krylov_direction(rows, P, damping, k)) - lowest) / (highest - lowest)


preconditioners = {
    "none": {
        n: Kronecker(*(torch.eye(d) for d in reversed(V.shape)))
        for n, V in block_weights(net).items()
    },
    "KFAC": TermWise(0.0).update(None, trained, 1e-8, 1)[1],
    "EKFAC": TermWise(0.0, ekfac_inverse).update(None, trained, 1e-8, 1)[1],
}
numbers, gaps = (1, 2, 5, 10, 20, 40), {}
for name, P in preconditioners.items():
    gaps[name] = [gap(P, k, 1e-12) for k in numbers]
    print(f"{name:6}", *(f"k = {k}: {g:.1e}  " for k, g in zip(numbers, gaps[name], strict=True)))
assert gaps["EKFAC"][4] < gaps["KFAC"][4] < gaps["none"][4]

# %% tags=["hide-input"] fold="Code of the figure" alt="Distance to the minimum of the model against the number of iterations, logarithmic. Without a preconditioner the line falls slowly, with KFAC and EKFAC much faster. EKFAC starts above KFAC at one iteration and lies below KFAC from two iterations on." caption="Conjugate gradients on the Gauss-Newton model: distance from the minimum, relative to the start. After 20 iterations the distance is smaller with KFAC as the preconditioner than without one, and slightly smaller still with EKFAC."
fig, ax = plt.subplots(figsize=(5.6, 3.2), layout="constrained")
for name, values in gaps.items():
    look = style("GGN" if name == "none" else name)
    ax.semilogy(numbers, values, **look)
    ax.text(41.5, values[-1], name, color=look["color"], va="center")
ax.set(xlabel="iterations $k$", ylabel="relative distance", xlim=(0, 47))
plt.show()

# %% [markdown]
# The damping of a preconditioner should be close to that of the model. In the next measurement, with
# $\lambda = 10^{-3}$ in the model and $10^{-8}$ in $P$, directions of small curvature get too much weight, and the
# result is worse than without a preconditioner. These are the relative distances after 20 iterations:

# %% tags=["hide-input"] fold="Measured: the damping is missing in the preconditioner"
ignorant = {name: gap(P, 20, 1e-3) for name, P in preconditioners.items()}
print(*(f"{name} {g:.2f}  " for name, g in ignorant.items()))
assert ignorant["none"] < min(ignorant["KFAC"], ignorant["EKFAC"])

# %% [markdown]
# So `KFACKrylov` adds the larger of two numbers to the factors: the damping of the model, `damping`, and a small
# constant, `floor`. The damping is adapted by the rule of Levenberg and Marquardt ([Chapter 9](09_damping.py)).
#
# ## The competitors: exact Gauss-Newton
#
# KFAC avoids the matrix $J^\top J + \lambda I$, which has $D^2$ entries for $D$ weights. For $\lambda > 0$, however,
#
# $$
# (J^\top J + \lambda I)^{-1} J^\top \rho = J^\top (J J^\top + \lambda I)^{-1} \rho ,
# \tag{27.10}
# $$
#
# since both sides, multiplied by $J^\top J + \lambda I$, give $J^\top \rho$. On the right is the *kernel* $J J^\top$,
# with one row for each residual. PINNs are trained with some hundred to some thousand points. Then the kernel is small,
# whatever the size of the network. Both forms give the same step:

# %%
both = [solver(parts, residuals(parts))(1e-3).step for solver in (dense_solver, kernel_solver)]
for name in block_weights(model):
    assert_exact(both[0][name], both[1][name])
assert gramian(parts).shape == (59, 59)
assert kernel_matrix(parts).shape == (80, 80)
assert torch.linalg.matrix_rank(kernel_matrix(parts)) <= 59

# %% tags=["remove-input"]
code(kernel_solver)

# %% [markdown]
# `GaussNewton` uses either form with the rule of Levenberg and Marquardt ([Chapter 9](09_damping.py)): a step that
# lowers the loss as predicted lowers $\lambda$, and a step that fails is not taken. `HessianFree` solves the same
# system by conjugate gradients, without a matrix, and stops early. `Spring` keeps $\lambda$ fixed, adds momentum to the
# kernel form, and searches along the line. Without momentum, its direction is that of damped energy natural gradients,
# ENGD.
#
# ## Any approximation runs on a PINN
#
# Interior and boundary have different numbers of positions. Some approximations accept one batch only. For these, the
# missing positions of the boundary are filled up with zeros. Zeros add nothing to the gradients $G_n$, so the block of
# the joined batch is exactly the sum of the blocks. Everything that is computed from the $G_n$ is the same, too: the
# trace of EKFAC, for example. The output shows relative errors:

# %% tags=["hide-input"] fold="Checked: the joined batch; measured: the errors of KFAC, reduce and EKFAC"
APPROXIMATIONS = {"KFAC": kfac, "reduce": lambda io: kfac(io.reduced()), "EKFAC": ekfac}
for name in block_weights(model):
    batch = joined([part.ios[name] for part in parts])
    F = sum(part.ios[name].block() for part in parts)
    assert_exact(batch.block(), F)
    assert_exact(ekfac(batch).trace(), F.trace())
    for what, io in (("interior", parts[0].ios[name]), ("joined", batch)):
        errors = {
            kind: relative_error(f(io).dense(), io.block()) for kind, f in APPROXIMATIONS.items()
        }
        print(f"layer {name}, {what:8}:", *(f"{kind} {e:6.2f}  " for kind, e in errors.items()))
        assert errors["EKFAC"] <= errors["KFAC"]
        assert what == "joined" or name == "0" or errors["EKFAC"] < errors["KFAC"] / 2
    separate = sum(kfac(part.ios[name]).dense() for part in parts)
    print(f"layer {name}, one KFAC for each term: {relative_error(separate, F):.2f}")

# %% [markdown]
# On the interior term, KFAC has the wrong scale, because its factors sum over all pairs of positions: dead positions
# count in $A$, and contributions that cancel in $G_n$ do not cancel in $A$ and $B$. In the second and the third layer
# EKFAC corrects most of this error, in the first layer only a little. For the sum of two terms there is also a
# corrected form in the common basis of [(27.7)]. This basis is not orthogonal, but the diagonal of the exact block in
# it costs no more than in an orthogonal one. The corrected form is `TermWise(inverse=ekfac_inverse)`, which is called
# EKFAC in [Figure 27.2].

# %% tags=["hide-input"] fold="Code of the figure" alt="Three heat maps of the interior term of the middle layer: the exact block, KFAC, which is much too large, and EKFAC, which has the size and part of the pattern of the exact block." caption="The interior term of the middle layer in one colour scale. KFAC is much too large. EKFAC has the size of the exact block and a part of its pattern."
io = parts[0].ios["2"]
shown = {"exact": io.block(), "KFAC": kfac(io).dense(), "EKFAC": ekfac(io).dense()}
assert shown["KFAC"].norm() > 2 * shown["exact"].norm()
matrices(shown, scale=io.block().abs().max().item())

# %% [markdown]
# A matrix that is nearer in the Frobenius norm need not be better in training ([Chapter 14](14_ekfac.py)). [Chapter
# 28](28_pinn_results.py) trains `KFACKrylov` with each of them as its preconditioner.
#
# ## A system of equations
#
# The same code accepts systems of equations. A stationary flow has three unknowns, two velocities and a pressure,
# and three residuals at every point: two for momentum, one for mass. Then $V = 3$ vectors per datum are sent back. The
# equations of Navier and Stokes are nonlinear; $J$ linearises them around the present field. Kovasznay's flow behind a
# grid is an exact solution to compare with.

# %%
flow = kovasznay()
torch.manual_seed(0)
net, state = mlp(2, 24, 3), None
flow_terms = flow.terms(200, 80, generator)
test = flow.points(400, generator)
before = flow.error(net, test)
method = GaussNewton()
for _ in range(60):
    state = method.step(net, flow_terms, state)
after = flow.error(net, test)
print(f"vectors per datum {len(linearize(net, flow_terms)[0][0].residuals)},", end=" ")
print(f"error {before:.2f} before, {after:.1e} after 60 steps")
assert after < before / 8

# %% tags=["hide-input"] fold="Code of the figure" alt="Two panels over the box from -0.5 to 1 and -0.5 to 1.5. Left, the learned horizontal velocity in colours with arrows of the flow, which wind around periodic cells. Right, the error of the horizontal velocity, small and irregular." caption="Kovasznay's flow, learned. Left: horizontal velocity and the direction of the flow. Right: error of the horizontal velocity."
xs, ys = torch.linspace(-0.5, 1, 50), torch.linspace(-0.5, 1.5, 50)
grid = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1).view(-1, 2)
with torch.no_grad():
    learned = net(grid)
error = (learned - flow.solution(grid))[:, 0].view(50, 50)
u, v = (learned[:, k].view(50, 50) for k in (0, 1))
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.8), layout="constrained")
for ax, f, title in zip(axes, (u, error), ("$u$", "error of $u$"), strict=True):
    end = f.abs().max().item()
    image = ax.imshow(
        f.tolist(),
        cmap=diverging(),
        vmin=-end,
        vmax=end,
        origin="lower",
        extent=(-0.5, 1, -0.5, 1.5),
    )
    fig.colorbar(image, ax=ax, shrink=0.85)
    ax.set(title=title)
axes[0].quiver(
    *(
        t[::5, ::5].tolist()
        for t in (grid.view(50, 50, 2)[..., 0], grid.view(50, 50, 2)[..., 1], u, v)
    )
)
plt.show()

# %% [markdown]
# ## An unknown constant
#
# In an inverse problem a constant of the equation is unknown, and measurements of the solution are given instead. The
# constant is a parameter of the model that belongs to no layer and is used by a residual. It is one more block: a layer
# whose input is 1 at every point. KFAC of this block is exact. The matrix methods also contain its off-diagonal blocks
# with the layers. In the example the constant is the conductivity of a rod:


# %%
class Rod(nn.Module):
    """A network for the temperature, and the unknown conductivity of the rod, which is 1/4."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.conductivity = mlp(2, 12, 1), nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


torch.manual_seed(0)
rod, rod_problem, state = Rod(), heat(1), None
measured = rod_problem.points(40, generator)
rod_terms = [
    Term(
        lambda u, x: u.d[0] - rod.conductivity * u.lap,
        rod_problem.points(80, generator),
        laplacian(2, [1]),
    ),
    Term(lambda u, x: u.value - rod_problem.solution(x), measured, value_only(2)),
]

# %% tags=["hide-input"] fold="Trained: 60 steps of Gauss-Newton find the conductivity"
constant = flat(linearize(rod, rod_terms))[0].ios["conductivity"]
assert_exact(kfac(constant).dense(), constant.block())
for _ in range(60):
    state = GaussNewton().step(rod, rod_terms, state)
print(f"conductivity 1 before, {rod.conductivity.item():.3f} after 60 steps, 0.25 in truth")
assert abs(rod.conductivity.item() - 0.25) < 0.02

# %% [markdown]
# ## What goes wrong in practice
#
# **A line search that can choose NaN.** Python's `min` over a list that contains NaN depends on the order, because
# every comparison with NaN is false. [A grid search that takes the smallest of 31
# losses](https://github.com/f-dangel/kfac-pinns-experiments/blob/83ed050950aa8dc8aeed8cc1368a87059fa322e0/kfac_pinns_exp/optim/line_search.py#L87)
# can pick a step at which the loss overflowed. Here a loss that is not a number counts as infinite.

# %%
losses = [float("nan"), 0.5, 1.0]
assert min(losses) != min(reversed(losses))


def overflowing(step: float) -> float:
    return float("nan") if step > 0.3 else (step - 0.2) ** 2


print("step and loss:", line_search(overflowing, before=1.0))
assert line_search(overflowing, before=1.0) == (0.25, (0.25 - 0.2) ** 2)

# %% [markdown]
# **Single precision.** A damping below the round-off has no effect. Single precision has a relative round-off of
# $\varepsilon \approx 10^{-7}$, so the entries of $A + \lambda I$ are known up to $\varepsilon \lVert A \rVert$. With
# $\lambda = 10^{-10}$, a singular factor can stay singular, and its square root or inverse is then noise or NaN.

# %% tags=["hide-input"] fold="Checked: the damping is lost in round-off"
single = kfac(io).A.float()
eigenvalues = torch.linalg.eigvalsh(single + 1e-10 * torch.eye(len(single), dtype=torch.float32))
exact = torch.linalg.eigvalsh(kfac(io).A)
rounded = (torch.linalg.eigvalsh(single).double() - exact).abs().max()
print(f"round-off moves eigenvalues by {rounded.item():.1e}, the damping by 1e-10")
assert rounded > 1e-10
assert (single.diagonal() + 1e-10 == single.diagonal()).all()

# %% [markdown]
# **Several reverse passes.** A second reverse pass for the gradient, and further passes for products with $J$, give the
# same numbers as the $a$ and $g$ of the first pass. They cost time.
#
# ## In one minute
#
# - A term of a PINN's loss is a function of the network's Taylor coefficients. These share the weights of every layer.
# - One forward and one reverse pass give $a_{ns}$ and $g_{ns}$. Gradient, Jacobian products and Gauss-Newton blocks
#   follow from these.
# - KFAC-expand is exact for linear networks with orthogonal designs ([Theorem 27.1]), and for a single datum without
#   derivatives. It is too small by at most the factor $N S^2$ ([Theorem 27.2]), and can be far too large.
# - The damped sum of two Kronecker products has a closed-form inverse, [(27.7)].
# - KFAC\* takes the length of its step and of its momentum from the exact model; more directions lead to the
#   Gauss-Newton step.
#
# ## Exercises
#
#
# **Exercise 27.1.** The input factor of the *first* layer does not depend on the network. Which matrix is
# it for the Laplacian in $d$ dimensions? Read off $A_{-1,-1}$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The inputs of the first layer are $(x, 1)$, $(e_i, 0)$ for each $i$, and $(0, 0)$. So $S A$ has the blocks
# $\tfrac1N \sum x x^\top + I$, $\bar x$ and $1$, with $S = d + 2$, and $A_{-1,-1} = 1 / S$, in every layer.
#
# </details>
#
# **Exercise 27.2.** Show that KFAC-*reduce* is exact for a linear network with biases, any points, and the operator
# $u + \sum_i \partial_i u + \Delta u$.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With $c_n = (1, \dots, 1)$, all $g_{ns} = v$. Then $G_n = v \sum_s a_{ns}^\top = (S v)\, \bar a_n^\top$: the sum of
# the vectors times the mean of the inputs. $F = (S v)(S v)^\top \otimes \sum_n \bar a_n \bar a_n^\top$, and the reduced
# $B$ is $N (S v)(S v)^\top$, the reduced $A$ the mean of $\bar a_n \bar a_n^\top$.
#
# </details>
#
# **Exercise 27.3.** Let $\rho$ be linear in the weights, $\lambda = 0$ in [(27.8)], and $P$ fixed. Why is KFAC\* the
# method of preconditioned conjugate gradients?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Conjugate gradients minimise the quadratic loss in each step over the plane spanned by the preconditioned residual,
# which is $\Delta$, and the last direction $\delta$: the minimum over all earlier directions lies in it. [(27.8)] is
# the minimum over the same plane, from the same point, and the first step is the one along $\Delta$ in both.
#
# </details>
#
# **Exercise 27.4.** A term has weight $w$. How do $A$, $B$, and the exact block change with it? With what in [(27.6)]
# does this interfere?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# $\rho$ and $g$ have the factor $\sqrt w$, so $B$ and $F$ have $w$, and $A$ has none. The damping $\lambda$ is added to
# $B$ as it is: relative to a heavier term it is smaller. A balanced damping would use $\pi$, as in
# [Chapter 9](09_damping.py).
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"] fold="Checked: the exercises"
A = kfac(parts[0].ios["0"]).A  # 27.1
corner = inside.T @ inside / 60 + torch.eye(2)
assert_exact(4 * A[:2, :2], corner)
assert_exact(4 * A[:2, 2], inside.mean(0))
assert all(abs(kfac(io).A[-1, -1] - 1 / 4) < 1e-12 for io in parts[0].ios.values())

sum_term = Term(lambda u, x: u.value + sum(u.d) + u.lap, inside, laplacian(2))  # 27.2
for io in flat(linearize(linear, [sum_term]))[0].ios.values():
    assert_exact(kfac(io.reduced()).dense(), io.block())
    assert relative_error(kfac(io).dense(), io.block()) > 0.01


class Fixed:  # 27.3
    def update(self, state, terms, damping, count):
        return None, {"0": Kronecker(torch.diag(torch.arange(1.0, 6.0)), torch.eye(1)).inverse(0.0)}


affine, features = nn.Sequential(nn.Linear(4, 1)), torch.randn(20, 4)
fit = [Term(lambda u, x: u.value - x[:, :1].sin() ** 2, features, value_only(4))]
state = None
for _ in range(5):  # as many steps as weights
    state = KFACStar(damping=0.0, preconditioner=Fixed()).step(affine, fit, state)
left = flat(linearize(affine, fit))
assert transposed_times(left, residuals(left))["0"].abs().max() < 1e-8

heavy = Term(terms[0].residual, inside, terms[0].expansion, weight=9.0)  # 27.4
for name, io in flat(linearize(model, [heavy]))[0].ios.items():
    assert_exact(kfac(io).B, 9 * kfac(parts[0].ios[name]).B)
    assert_exact(kfac(io).A, kfac(parts[0].ios[name]).A)
print("all hold")

# %% [markdown]
# ## Further reading
#
# [Dangel et al. (2024)](bibliography.md#pinns) derive KFAC for PINNs and KFAC\*. [Müller and Zeinhofer
# (2023)](bibliography.md#engd) introduce the exact method with a dense matrix, energy natural gradients;
# [Guzmán-Cordero et al. (2025)](bibliography.md#engd-w) its kernel form with momentum, after
# [Goldshlager et al. (2024)](bibliography.md#spring), who had it for quantum chemistry. Each of their
# methods is a dozen lines in [`pinn.steps`](api/pinn.steps.md) and [`pinn.solvers`](api/pinn.solvers.md).
