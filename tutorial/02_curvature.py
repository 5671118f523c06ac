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
# # 2. Curvature: Jacobians, Hessian, GGN
#
# **Part II: Curvature.** What is the curvature of a network, and why is the Hessian not what we
# approximate?
#
# A gradient says in which direction the loss falls, but not how far to go. The length of a step depends on how fast
# the gradient changes: on the curvature, a matrix of second derivatives with one row and one column per parameter. With
# the Jacobian $J$ of the outputs $f_k$ and the Hessian $H_f$ of the loss with respect to the outputs, this matrix has
# two parts:
#
# $$
# \underbrace{\nabla^2_\theta L}_\text{Hessian}
# = \underbrace{J^\top H_f\, J}_\text{GGN}
# + \sum_k \frac{\partial L}{\partial f_k}\, \nabla^2_\theta f_k .
# $$
#
# KFAC approximates the first part, the generalised Gauss-Newton matrix. [Figure 2.1] shows steps with the Hessian and
# with the GGN on a function of two parameters:

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.func import functional_call, jacrev
from torch.nn import (
    BCEWithLogitsLoss,
    CrossEntropyLoss,
    Linear,
    Module,
    MSELoss,
    Parameter,
    ReLU,
    Sequential,
    Tanh,
)
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from kfac_scratch.checks import assert_exact, largest_error, set_up
from kfac_scratch.curvature import (
    block_index,
    diagonal_blocks,
    ggn,
    ggn_product,
    hessian,
    hessian_product,
    jacobian,
    loss_hessian,
    parameter_vector,
)
from kfac_scratch.moving.descent import valley_steps
from kfac_scratch.show import code, matrices, style

set_up()  # seed 0, float64, the GPU where there is one


def relative(part: Tensor, whole: Tensor) -> float:
    """Largest entry of a part, relative to that of the whole."""
    return (part.abs().max() / whole.abs().max()).item()


class Rosenbrock(Module):
    """The function as a network: it ignores its input."""

    def __init__(self, *start: float):
        super().__init__()
        self.theta = Parameter(torch.tensor(start))

    def forward(self, X: Tensor) -> Tensor:
        first, second = self.theta
        return torch.stack([1 - first, 10 * (second - first**2)])[None]


def curvature_at(*start: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, Hessian and GGN of the Rosenbrock function."""
    network, none, zero = Rosenbrock(*start), torch.zeros(1), torch.zeros(1, 2)
    (gradient,) = torch.autograd.grad(loss(network(none), zero), network.parameters())
    return gradient, hessian(network, loss, none, zero), ggn(network, loss, none, zero)


def rosenbrock(point: Tensor) -> float:
    return ((1 - point[0]) ** 2 + 100 * (point[1] - point[0] ** 2) ** 2).item()


def descend(step, steps: int) -> list[Tensor]:
    path = [torch.tensor(start)]
    for _ in range(steps):
        path.append(path[-1] - step(*curvature_at(*path[-1].tolist())))
    return path


def damped_gauss_newton(steps: int, damping: float = 1.0) -> list[Tensor]:
    path = [torch.tensor(start)]
    for _ in range(steps):
        slope, _, GGN = curvature_at(*path[-1].tolist())
        candidate = path[-1] - torch.linalg.solve(GGN + damping * torch.eye(2), slope)
        if rosenbrock(candidate) < rosenbrock(path[-1]):
            path.append(candidate)
            damping /= 4
        else:
            damping *= 4
    return path


loss = MSELoss(reduction="sum")
start = (-0.5, 0.2625)
paths = {
    "gradient descent": descend(lambda slope, H, GGN: slope / 600, 300),
    "Newton": descend(lambda slope, H, GGN: torch.linalg.solve(H, slope), 8),
    "damped Gauss-Newton": damped_gauss_newton(30),
}
losses = {name: [rosenbrock(p) for p in path] for name, path in paths.items()}
x1, x2 = torch.meshgrid(
    torch.linspace(-1.9, 1.7, 240, device="cpu"),
    torch.linspace(-1.7, 2.4, 240, device="cpu"),
    indexing="xy",
)
surface = (1 - x1) ** 2 + 100 * (x2 - x1**2) ** 2

# %% tags=["hide-input"] alt="Left: paths on the Rosenbrock function. Gradient descent moves slowly along the valley floor. Newton first jumps backwards up the valley's tangent and then returns. Damped Gauss-Newton follows the valley to the minimum. Right: the loss, which for Newton rises before it falls." caption="The paths from ● to the minimum ★, and the loss along them. Newton's first step raises the loss; every step of damped Gauss-Newton lowers the loss."
fig, (ax, curves) = plt.subplots(1, 2, figsize=(8.6, 3.8), layout="constrained")
ax.contour(x1, x2, surface, [1, 10, 50, 150, 400, 900], colors="C0", linewidths=1, alpha=0.3)
for (name, path), method in zip(paths.items(), ("gradient", "Newton", "GGN"), strict=True):
    points = torch.stack(path).cpu()
    ax.plot(points[:, 0], points[:, 1], **style(method), markersize=4, label=name)
    curves.semilogy(losses[name], **style(method), markersize=3)
curves.set_xscale("symlog", linthresh=20)
ax.plot(*start, "o", color="C1", markersize=8)
ax.plot(1, 1, "*", color="C3", markersize=12)
ax.set(xlabel=r"$\theta_1$", ylabel=r"$\theta_2$", xlim=(-1.9, 1.7), ylim=(-1.7, 2.4))
curves.set(xlabel="step (logarithmic beyond 20)", ylabel="loss", ylim=(1e-12, 1e4))
ax.legend(loc="lower left")
plt.show()

# %% [markdown]
# Newton's method, which uses the Hessian, first jumps away from the minimum. Gauss-Newton with damping follows the
# valley. After this chapter you can
#
# - derive the two parts of the Hessian, and say which network has the first part as its Hessian;
# - say what the semi-definiteness of the GGN gives, and when its quadratic model has a minimum;
# - say where Hessian and GGN agree, for the whole matrix and layer by layer;
# - multiply with both without writing them down.
#
# The next figure shows the effect of curvature on a step for two weights. Four methods start at the same point of a
# valley and take fifteen steps each. Three of them differ only in their matrix: the Hessian, the GGN, or the blocks of
# KFAC, one for each layer. The fourth is gradient descent. Drag the start, and change the damping $\delta$ that is
# added to each matrix. From the first start, KFAC follows the valley more slowly than the GGN: KFAC leaves out the
# entries that couple the two layers.

# %% tags=["hide-input"]
valley_steps(start=(2.7, 2.3), damping=0.1)

# %% [markdown]
# Throughout, $X$ holds $N$ data, the network turns each into $C$ outputs, and $\theta$ is the
# vector of all its $D$ parameters, flattened by rows as in [Chapter 1](01_flattening.py). All
# outputs together form the vector $f(\theta) \in \mathbb{R}^{NC}$, datum after datum.
# The targets are constant, so that the loss is a function $\ell$ of the outputs alone. We assume that $\ell$ is twice
# continuously differentiable. (In the cells `loss` is the sum of all squared errors.) The loss as a function of the
# parameters is a composition:
#
# $$
# L(\theta) = \ell(f(\theta)).
# \tag{2.1}
# $$
#
# The sizes of the example are different primes, so that code which confuses two sizes is likely to fail.

# %%
N, C = 7, 2
model = Sequential(Linear(3, 5), Tanh(), Linear(5, C))
X, y = torch.randn(N, 3), torch.randn(N, C)

theta = parameter_vector(model)
D = len(theta)
print(f"{N} data × {C} outputs = {N * C} entries of f, {D} parameters")
assert (5 * 3 + 5) + (C * 5 + C) == D

# %% [markdown]
# ## A parabola at a point
#
# Fix a point $\theta$ and a direction $v$. The loss along this line, $\varphi(t) =
# L(\theta + t v)$, is a function of one number. If $L$ is smooth, $\varphi$ has a Taylor expansion, whose
# derivatives at $t = 0$ follow from the chain rule,
#
# $$
# \varphi'(0) = \sum_i \frac{\partial L}{\partial \theta_i} v_i = \nabla L^\top v,
# \qquad
# \varphi''(0) = \sum_{i, j} \frac{\partial^2 L}{\partial \theta_i \partial \theta_j} v_i v_j
# = v^\top (\nabla^2_\theta L)\, v,
# $$
#
# and hence
#
# $$
# L(\theta + t v) = L(\theta) + t\, \nabla L^\top v + \tfrac{1}{2} t^2\, v^\top (\nabla^2_\theta L)\, v
# + \mathcal{O}(t^3).
# \tag{2.2}
# $$
#
# The **Hessian** $\nabla^2_\theta L$ is the only symmetric matrix for which [(2.2)] holds for all $v$: the number
# $v^\top (\nabla^2_\theta L)\, v$ is the curvature of the loss in direction $v$, and a symmetric
# matrix is determined by these numbers. A test of [(2.2)] need not know how
# large the error is: if the error is of third order, then halving a small $t$ divides it by about $2^3 = 8$.


# %%
def network_at(theta: Tensor, model: Module = model, X: Tensor = X) -> Tensor:
    """All outputs as one vector, for any value of the flat parameter vector."""
    values, start = {}, 0
    for name, p in model.named_parameters():
        values[name] = theta[start : start + p.numel()].reshape(p.shape)
        start += p.numel()
    return functional_call(model, values, (X,)).flatten()


def loss_at(theta: Tensor) -> Tensor:
    return loss(network_at(theta), y.flatten())


def parabola_error(M: Tensor, t: float) -> float:
    parabola = loss_at(theta) + t * gradient @ v + 0.5 * t**2 * v @ M @ v
    return abs(loss_at(theta + t * v) - parabola).item()


gradient, H = jacrev(loss_at)(theta), hessian(model, loss, X, y)
v = torch.randn(D)
v = v / v.norm()
ratio = parabola_error(H, 2e-3) / parabola_error(H, 1e-3)
print(f"error at t = 0.002 divided by error at t = 0.001: {ratio:.2f}")
assert abs(ratio - 8) < 0.3

# %% [markdown]
# ## The network as a linear map
#
# The first derivative of all outputs by all parameters is the **Jacobian**
# $J \in \mathbb{R}^{NC \times D}$ with entries $J_{ki} = \partial f_k / \partial \theta_i$. It maps a small change
# $d$ of the parameters to the change of the outputs, $f(\theta + d) \approx f(\theta) + J d$. Autodiff
# gives us two products with $J$, and neither needs the matrix:
#
# | Product | Name | What runs |
# | --- | --- | --- |
# | $J v$ | Jacobian-vector product, `jvp` | one pass forward, with $v$ carried along |
# | $J^\top u$ | vector-Jacobian product, `vjp` | one pass backward, starting from $u$ at the outputs |
#
# `backward` computes the second product; a gradient is the special case $\nabla L = J^\top
# \nabla \ell$. Send back a unit vector and you get one row of $J$. By hand, therefore:


# %%
def jacobian_by_hand(model: Module, X: Tensor) -> Tensor:
    rows = []
    for output in model(X).flatten():
        derivatives = torch.autograd.grad(output, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([d.flatten() for d in derivatives]))
    return torch.stack(rows)


# %% [markdown]
# ### In the package
#
# The same rows, all sent back at once: `jacrev` stacks the backward passes with `vmap`. The helper
# `_network` makes the model a function of one flat vector, as `network_at` does above.

# %% tags=["beside", "remove-input"]
code(jacobian)

# %%
J = jacobian(model, X)
print("Jacobian:", tuple(J.shape))
assert_close(J, jacobian_by_hand(model, X))
assert_close(J @ v, torch.func.jvp(network_at, (theta,), (v,))[1])
assert_close(gradient, J.T @ (2 * (network_at(theta) - y.flatten())))

# %% [markdown]
# ## The chain rule, twice
#
# What is the second derivative of a composition? Differentiate [(2.1)] once by $\theta_i$. The
# loss reaches $\theta_i$ through every output, so the chain rule sums over outputs,
#
# $$
# \frac{\partial L}{\partial \theta_i}
# = \sum_k \frac{\partial \ell}{\partial f_k} \frac{\partial f_k}{\partial \theta_i}.
# \tag{2.3}
# $$
#
# Now differentiate by $\theta_j$. Both factors of each summand depend on $\theta$, so the product
# rule gives two sums. In the first, $\partial \ell / \partial f_k$ depends on $\theta_j$ through
# every output $f_m$, which calls for the chain rule again:
#
# $$
# \frac{\partial^2 L}{\partial \theta_j \partial \theta_i}
# = \sum_{k, m} \frac{\partial f_m}{\partial \theta_j}
# \frac{\partial^2 \ell}{\partial f_m \partial f_k} \frac{\partial f_k}{\partial \theta_i}
# + \sum_k \frac{\partial \ell}{\partial f_k}
# \frac{\partial^2 f_k}{\partial \theta_j \partial \theta_i}.
# \tag{2.4}
# $$
#
# Write $H_f = \nabla^2_f \ell$ for the Hessian of the loss with respect to the *outputs*, a matrix
# of size $NC$, and $r_k = \partial \ell / \partial f_k$ for the slope of the loss at output $k$,
# which for a squared error is twice the residual. As matrices,
#
# $$
# \underbrace{\nabla^2_\theta L}_{\text{Hessian}}
# = \underbrace{J^\top H_f\, J}_{\text{GGN}}
# + \underbrace{\sum_k r_k \nabla^2_\theta f_k}_{\text{curvature of the network}}.
# \tag{2.5}
# $$
#
# The first term contains the curvature of the *loss*, and of the network only the linear map $J$. The
# second contains the curvature of the *network*, one Hessian per output, each weighted by the slope of the loss.
# The first term alone is the **generalised Gauss-Newton matrix** (GGN). This cell computes the second term by hand:


# %%
def network_curvature_by_hand(model: Module, loss: Module, X: Tensor, y: Tensor) -> Tensor:
    theta, f = parameter_vector(model), model(X).detach().requires_grad_()
    slopes = torch.autograd.grad(loss(f, y), f)[0].flatten()
    total = torch.zeros(len(theta), len(theta))
    for k, slope in enumerate(slopes):

        def output(t: Tensor, k: int = k) -> Tensor:
            return network_at(t, model, X)[k]

        total += slope * torch.func.hessian(output)(theta)
    return total


# %% [markdown]
# ### In the package
#
# Hessian, $H_f$ and GGN are written as they are defined. Dense matrices are for small networks: every faster
# method is checked against them.

# %% tags=["remove-input"]
code(hessian, loss_hessian, ggn)

# %%
GGN = ggn(model, loss, X, y)
rest = network_curvature_by_hand(model, loss, X, y)
print(f"H - GGN - (curvature of the network): {relative(H - GGN - rest, H):.1e}")
assert relative(H - GGN - rest, H) < 1e-10
assert relative(rest, H) > 1e-2


# %% tags=["hide-input"] alt="Three heat maps of 32 by 32: the Hessian equals the GGN plus a third matrix. The third is of visible size and has an empty lower right block, that of the last layer." caption="The two terms of [(2.5)], in colours that end at 40 % of the largest entry. Lines separate the first layer from the last; the last layer's block of the third matrix is zero, by [Theorem 2.3]."
def with_layers(fig):
    """Rule off the layers: the first has 20 parameters."""
    for ax in fig.axes[:-1]:
        ax.axhline(19.5, color=ax.xaxis.label.get_color(), linewidth=0.8, alpha=0.7)
        ax.axvline(19.5, color=ax.xaxis.label.get_color(), linewidth=0.8, alpha=0.7)
    return fig


three = {"Hessian": H, "GGN": GGN, "curvature of the network": rest}
with_layers(matrices(three, scale=0.4 * H.abs().max().item()))

# %% [markdown]
# The loss is a sum over data, and no term depends on two of them. So $H_f$ is block-diagonal with one
# block $H_n \in \mathbb{R}^{C \times C}$ for each datum, and with $J_n$ for the rows of $J$ that
# belong to datum $n$ the GGN becomes a sum of small contributions,
#
# $$
# \mathrm{GGN} = \sum_n J_n^\top H_n J_n.
# \tag{2.6}
# $$

# %%
H_f = loss_hessian(loss, model(X), y).reshape(N, C, N, C)
by_datum = [J.reshape(N, C, D)[n].T @ H_f[n, :, n] @ J.reshape(N, C, D)[n] for n in range(N)]
assert_exact(sum(by_datum), GGN)
assert H_f[0, :, 1].abs().max() == 0

# %% [markdown]
# ## The GGN is a Hessian, of another network
#
# The GGN drops the second term of [(2.5)]. At $\theta$, the GGN is also the exact Hessian of another function. Replace
# the network by its linearisation,
#
# $$
# f^{\text{lin}}(\theta') = f(\theta) + J (\theta' - \theta),
# \tag{2.7}
# $$
#
# and keep the loss as it is.
#
# <div class="admonition theorem" markdown="1" id="thm-2.1">
# <p class="admonition-title" markdown="1"><b>Theorem 2.1 (the GGN linearises the network)</b></p>
#
# At $\theta' = \theta$, the Hessian of $\ell(f^{\text{lin}}(\theta'))$ is the GGN of
# $\ell(f(\theta'))$.
#
# </div>
#
# **Proof.** Apply [(2.5)] to the network $f^{\text{lin}}$. Its Jacobian is $J$ everywhere, and its
# second derivatives are zero, so the second term is gone and the Hessian is
# $J^\top \bigl(\nabla^2_f \ell\bigr) J$ with $\nabla^2_f \ell$ taken at $f^{\text{lin}}(\theta')$.
# At $\theta' = \theta$ this is $f(\theta)$, and the Hessian is the GGN. $\blacksquare$
#
# We check the theorem with cross-entropy, whose $H_f$ depends on the outputs. At $\theta$ the two matrices agree. At
# another point, the Hessian of the linearised network is not the GGN at $\theta$:

# %%
cross_entropy, labels = CrossEntropyLoss(reduction="sum"), torch.arange(N) % C
f0 = network_at(theta)


def loss_of_linearised(t: Tensor) -> Tensor:
    return cross_entropy((f0 + J @ (t - theta)).reshape(N, C), labels)


exact = ggn(model, cross_entropy, X, labels)
here, elsewhere = (torch.func.hessian(loss_of_linearised)(t) for t in (theta, theta + v))
print(f"at θ: {largest_error(here, exact):.1e}   elsewhere: {largest_error(elsewhere, exact):.1e}")
assert_exact(here, exact)
assert largest_error(elsewhere, exact) > 1e-3

# %% [markdown]
# So there are two parabolas at $\theta$. Both have the right value and the right slope. The Hessian's parabola has the
# right curvature, too. With the GGN in [(2.2)], the error is in general of second order, and halving $t$ divides it
# by about 4.

# %%
ratio = parabola_error(GGN, 2e-3) / parabola_error(GGN, 1e-3)
print(f"error at t = 0.002 divided by error at t = 0.001: {ratio:.2f}")
assert abs(ratio - 4) < 0.3

# %% [markdown]
# ### What is gained
#
# The GGN's parabola fits worse, but for a convex loss it is curved downward in no direction.
#
# <div class="admonition theorem" markdown="1" id="thm-2.2">
# <p class="admonition-title" markdown="1"><b>Theorem 2.2 (the GGN is positive semi-definite)</b></p>
#
# If the loss is convex in the outputs, then $v^\top \mathrm{GGN}\, v \ge 0$ for every $v$, whatever
# the network.
#
# </div>
#
# **Proof.** $v^\top J^\top H_f J v = (J v)^\top H_f (J v)$, and the Hessian of a convex function is
# positive semi-definite. $\blacksquare$
#
# Squared error and cross-entropy are convex in $f$. The loss as a function of $\theta$ is not, and
# its Hessian usually has negative eigenvalues. Along their eigenvectors the parabola is unbounded below, so that
# its stationary point is no minimum.
#
# A semi-definite matrix does not guarantee a minimum, however. In a direction of the null space the GGN's model is a
# straight line, which is unbounded below if the gradient has a component in this direction:
#
# <div class="admonition theorem" markdown="1" id="cor-2.1">
# <p class="admonition-title" markdown="1"><b>Corollary 2.1 (when the model has a minimum)</b></p>
#
# Let the loss be convex in the outputs. The quadratic model
# $\nabla L^\top d + \tfrac12\, d^\top \mathrm{GGN}\, d$ is bounded below if and only if $\nabla L$
# lies in the range of the GGN. This holds if $\nabla_f\, \ell$ lies in the range of $H_f$, as it does for the squared
# error, cross-entropy and BCE with logits. With $\mathrm{GGN} + \delta I$, $\delta \gt 0$, the model has a minimum.
#
# </div>
#
# **Proof.** Split $\nabla L$ into a part in the range and a part $n$ in the null space, which is orthogonal to it. At
# $d = -t n$ the model is $-t \lVert n \rVert^2$, which is unbounded below unless $n = 0$. If $n = 0$, then
# $\nabla L = \mathrm{GGN}\, u$ for some $u$, and completing the square shows the minimum at $-u$. For the second
# claim, let $\nabla_f\, \ell = H_f w$ and $S S^\top = H_f$. Then $\nabla L = J^\top S (S^\top w)$ lies in the range
# of $J^\top S$, which is the range of $(J^\top S)(J^\top S)^\top = \mathrm{GGN}$. The squared error has $H_f = 2 I$, up
# to its divisor, and BCE a diagonal without zeros. The range of the softmax's $\operatorname{diag}(p) - p p^\top$ is
# the vectors whose entries sum to zero, such as $p - e_y$. $\blacksquare$
#
# A second reason for the GGN is that it contains no second derivative of the network, only $J$. The third reason is
# that KFAC needs a sum of outer products. A positive semi-definite $H_f$ has a square root $S$ with
# $S S^\top = H_f$, and then
#
# $$
# \mathrm{GGN} = (J^\top S)(J^\top S)^\top
# = \sum_v \bigl(J^\top s_v\bigr)\bigl(J^\top s_v\bigr)^\top
# \tag{2.8}
# $$
#
# is a sum of outer products of vectors $J^\top s_v$ (here $v$ numbers the columns of $S$), each of
# which is one backward pass that starts from a column $s_v$. [Chapter 3](03_losses.py) finds these
# columns for the common losses, and shows that for these losses the GGN is the Fisher matrix.

# %%
eigenvalues_H, eigenvalues_GGN = torch.linalg.eigvalsh(H), torch.linalg.eigvalsh(GGN)
print(f"smallest eigenvalue: Hessian {eigenvalues_H[0]:.3f}, GGN {eigenvalues_GGN[0]:.1e}")
assert eigenvalues_H[0] < -1e-3 * eigenvalues_H[-1]
assert eigenvalues_GGN[0] > -1e-12 * eigenvalues_GGN[-1]

S = torch.linalg.cholesky(H_f.reshape(N * C, N * C))
sent_back = [torch.func.vjp(network_at, theta)[1](s)[0] for s in S.T]
outer_products = sum(torch.outer(w, w) for w in sent_back)
assert_exact(outer_products, GGN)

bits = labels[:, None].double().expand(N, C)
for kind, target in ((MSELoss, y), (CrossEntropyLoss, labels), (BCEWithLogitsLoss, bits)):
    G = ggn(model, kind(), X, target)
    slope = jacrev(lambda t: kind()(network_at(t).reshape(N, C), target))(theta)  # noqa: B023
    values, basis = torch.linalg.eigh(G)
    null = basis[:, values < 1e-12 * values[-1]]
    part = relative(null.T @ slope, slope)
    print(f"{kind.__name__:18} null space of {null.shape[1]} dimensions, gradient in it {part:.0e}")
    assert null.shape[1] > 0
    assert part < 1e-10

# %% [markdown]
# ## When do the two agree?
#
# The second term of [(2.5)] vanishes if every product $r_k \nabla^2_\theta f_k$ does. Three cases are common.
#
# **A network that is linear in its parameters** has $\nabla^2_\theta f_k = 0$, and Hessian and GGN agree for every
# loss. A *deep* linear network, however, is linear in its inputs but not in its parameters,
# since $W_2 W_1 x$ multiplies one parameter with another.


# %%
def disagreement(model: Module, loss: Module, X: Tensor, y: Tensor) -> float:
    H = hessian(model, loss, X, y)
    return largest_error(ggn(model, loss, X, y), H)


shallow, deep = Linear(3, C), Sequential(Linear(3, 5), Linear(5, C))
for name, network in {"linear": shallow, "deep linear": deep, "tanh": model}.items():
    print(f"{name:12} squared error {disagreement(network, loss, X, y):.1e}", end="   ")
    print(f"cross-entropy {disagreement(network, cross_entropy, X, labels):.1e}")

assert disagreement(shallow, loss, X, y) < 1e-10
assert disagreement(shallow, cross_entropy, X, labels) < 1e-10
assert disagreement(deep, loss, X, y) > 1e-2

# %% [markdown]
# **Outputs at which the loss has no slope.** For the squared error $r_k = 2 (f_k - y_k)$ is zero where the network
# interpolates the data. Near such a point the GGN is nearly the Hessian, which is why Gauss-Newton
# converges fast on problems with small residuals. (Cross-entropy has the slope $p - e_y$, the
# predicted probabilities minus the one-hot label, which is never exactly zero.) Here the network
# makes its own targets:

# %%
target = model(X).detach()
print(f"at zero residual:  {disagreement(model, loss, X, target):.1e}")
print(f"at small residual: {disagreement(model, loss, X, target + 0.01 * y):.1e}")
assert disagreement(model, loss, X, target) < 1e-10
assert disagreement(model, loss, X, target + 0.01 * y) > 1e-5

# %% [markdown]
# **Within one layer of a piecewise linear network.** This case matters for KFAC, which
# approximates the diagonal blocks of the layers and sets the blocks between two layers to zero.
#
# <div class="admonition theorem" markdown="1" id="thm-2.3">
# <p class="admonition-title" markdown="1"><b>Theorem 2.3 (same-layer blocks of a ReLU network)</b></p>
#
# Let a network consist of linear layers, each used once, and piecewise linear activations, and let
# no activation stand at a kink. Then, for every loss, the diagonal block of the Hessian that belongs
# to one layer equals that of the GGN. If the network ends with a linear layer, this holds for that layer with any
# activations.
#
# </div>
#
# **Proof.** Let only the weights $W$ of one layer vary. What the layer receives, $a$, comes from
# earlier layers and does not change. Its output $z = W a$ is linear in $W$. Everything after it is
# affine in $z$ as long as no activation crosses a kink, which a small enough change does not do.
# So each output is locally an affine function of $W$, and $\nabla^2_W f_k = 0$. After a linear layer at the end
# nothing follows, so that its outputs are linear in $W$ whatever the activations before it. $\blacksquare$
#
# The blocks *between* two layers differ in general: the outputs contain products of the weights of one
# layer with those of another.

# %% [markdown]
# ### In the package
#
# To speak of blocks, we must know where a layer's $W$, with its bias as last column, lies in the
# flat vector. `block_index` sends the positions through the same operations as the values, the
# trick at the end of [Chapter 1](01_flattening.py), and `diagonal_blocks` cuts the blocks out.

# %% tags=["remove-input"]
code(block_index, diagonal_blocks)

# %%
relu = Sequential(Linear(3, 5), ReLU(), Linear(5, C))
print(block_index(relu)["2"])  # layer "2": ten weights and two biases


def by_layer(model: Module, loss: Module, y: Tensor) -> dict[str, float]:
    H, G = hessian(model, loss, X, y), ggn(model, loss, X, y)
    H_blocks, G_blocks = diagonal_blocks(model, H), diagonal_blocks(model, G)
    return {name: relative(H_blocks[name] - G_blocks[name], H) for name in H_blocks}


# %%
for name, network in {"ReLU": relu, "deep linear": deep, "tanh": model}.items():
    for what, (criterion, t) in {"squared": (loss, y), "entropy": (cross_entropy, labels)}.items():
        first, last = by_layer(network, criterion, t).values()
        print(f"{name:12} {what:8} first layer {first:.1e}   last layer {last:.1e}")
        assert last < 1e-10
        assert first > 1e-4 if network is model else first < 1e-10

H_relu, GGN_relu = hessian(relu, loss, X, y), ggn(relu, loss, X, y)
assert relative((H_relu - GGN_relu)[:20, 20:], H_relu) > 1e-2  # between layers they differ
assert torch.linalg.eigvalsh(H_relu)[0] < 0  # so the whole Hessian is still indefinite

# %% tags=["hide-input"] alt="Heat maps of Hessian minus GGN. For the ReLU network the two diagonal blocks are empty and the blocks between the layers are not. For the tanh network the block of the first layer is filled as well." caption="Hessian minus GGN. With ReLU all nonzero entries lie in the blocks between the layers."
tanh_label, relu_label = "tanh: Hessian − GGN", "ReLU: Hessian − GGN"
with_layers(matrices({relu_label: H_relu - GGN_relu, tanh_label: H - GGN}))

# %% [markdown]
# For a network as in [Theorem 2.3], **a method that treats every layer by itself loses nothing by using the
# GGN instead of the Hessian**, because their blocks are the same. If the loss is convex in the outputs, the blocks are
# positive semi-definite by [Theorem 2.2]. So negative eigenvalues of the whole Hessian of such a network come from the
# blocks between layers.
#
# ## A picture: down the banana valley
#
# With two parameters both models can be drawn. The Rosenbrock function
# $(1 - \theta_1)^2 + 100\, (\theta_2 - \theta_1^2)^2$ is the squared error of a "network"
# with one datum, the two outputs
#
# $$
# f(\theta) = \begin{pmatrix} 1 - \theta_1 \\ 10\, (\theta_2 - \theta_1^2) \end{pmatrix},
# \qquad
# J = \begin{pmatrix} -1 & 0 \\ -20\, \theta_1 & 10 \end{pmatrix},
# \tag{2.9}
# $$
#
# and the targets zero. Only $f_2$ is curved, with $\partial^2 f_2 / \partial \theta_1^2 = -20$. By
# [(2.5)], Hessian and GGN $= 2 J^\top J$ differ in a single entry,
#
# $$
# \nabla^2 L - 2 J^\top J = \begin{pmatrix} -400\, (\theta_2 - \theta_1^2) & 0 \\ 0 & 0 \end{pmatrix}.
# \tag{2.10}
# $$
#
# The two agree on the parabola $\theta_2 = \theta_1^2$, the floor of the valley. Above the parabola the
# entry is negative. The Hessian's determinant is
# $400 - 80000\, (\theta_2 - \theta_1^2)$, so that the Hessian is indefinite wherever
# $\theta_2 \gt \theta_1^2 + \tfrac{1}{200}$. The determinant of the GGN is 400 everywhere.


# %%
slope, H_start, GGN_start = curvature_at(*start)
assert_close((H_start - GGN_start)[0, 0].item(), -400 * (start[1] - start[0] ** 2))
for shift, sign in {-1e-3: 1, 1e-3: -1}.items():  # just below and just above the boundary
    _, H_edge, GGN_edge = curvature_at(0.7, 0.7**2 + 1 / 200 + shift)
    assert torch.linalg.det(H_edge).sign() == sign
    assert_close(torch.linalg.det(H_edge).item(), 400 - 80000 * (1 / 200 + shift))
    assert_close(torch.linalg.det(GGN_edge).item(), 400.0)
print("eigenvalues of the Hessian:", [round(e, 1) for e in torch.linalg.eigvalsh(H_start).tolist()])
print(
    "eigenvalues of the GGN:    ", [round(e, 1) for e in torch.linalg.eigvalsh(GGN_start).tolist()]
)

# %% [markdown]
# The starting point lies above that boundary. Here are both quadratic models of the loss there:

# %% tags=["hide-input"] alt="Two panels over the curved valley of the Rosenbrock function, with a point on the left side of the valley. Left: the contours of the Hessian's model are hyperbolas around a saddle, which lies up the valley's tangent, away from the minimum. Right: the contours of the GGN's model are long ellipses around a minimum, down the tangent." caption="The quadratic models (dashed) of the loss (solid) at the same point ●. The stationary point × of the Hessian's model is a saddle, away from the loss's minimum ★. The stationary point of the GGN's model is a minimum. It lies on the side of ★, but so far away that the model no longer fits the loss."
offset = torch.stack([x1 - start[0], x2 - start[1]], -1)
height = (1 - start[0]) ** 2 + 100 * (start[1] - start[0] ** 2) ** 2

fig, axes = plt.subplots(1, 2, figsize=(8.6, 3.8), sharey=True, layout="constrained")
for ax, M, name in zip(axes, (H_start, GGN_start), ("Hessian", "GGN"), strict=True):
    quadratic = height + offset @ slope.cpu() + 0.5 * ((offset @ M.cpu()) * offset).sum(-1)
    levels = [0.3, 1, 2, 3, 4, 8, 20, 50]
    ax.contour(x1, x2, surface, [1, 10, 50, 150, 400, 900], colors="C0", linewidths=1, alpha=0.5)
    ax.contour(x1, x2, quadratic, levels, colors="C1", linewidths=1, linestyles="dashed")
    stationary = torch.tensor(start) - torch.linalg.solve(M, slope)
    ax.plot(*stationary.tolist(), "x", color="C1", markersize=9, markeredgewidth=2.5)
    ax.plot(*start, "o", color="C2", markersize=8)
    ax.plot(1, 1, "*", color="C3", markersize=12)
    ax.set(title=f"model of the {name}", xlabel=r"$\theta_1$", xlim=(-1.9, 1.7), ylim=(-1.7, 2.4))
axes[0].set_ylabel(r"$\theta_2$")
plt.show()

# %% [markdown]
# Newton's method jumps to the stationary point of the Hessian's model, $\theta - (\nabla^2_\theta
# L)^{-1} \nabla L$. Where the Hessian is indefinite this point is a saddle, and the loss need not fall on the
# way. Gauss-Newton jumps to the stationary point of the GGN's model. If the GGN is positive definite, the loss falls at
# first, since its slope in the direction of the step is $-\nabla L^\top \mathrm{GGN}^{-1} \nabla L \lt 0$
# wherever $\nabla L \ne 0$, but the jump can be far too long. The remedy is **damping**: add
# $\delta I$ before solving,
#
# $$
# \theta \leftarrow \theta - (\mathrm{GGN} + \delta I)^{-1} \nabla L,
# \tag{2.11}
# $$
#
# with a $\delta$ that shrinks after a step that lowered the loss, and otherwise grows until one does. For a squared
# error this is the method of Levenberg and Marquardt. [Figure 2.1] has three methods with one start. (Their code is
# in the folded cell at the top.)


# %% [markdown]
# Gradient descent runs with a rate at which it does not diverge, and with far more steps than the others:

# %%
for name, values in losses.items():
    print(f"{name:20} start {values[0]:.2f}   after one step {values[1]:6.2f}   ", end="")
    print(f"after {len(values) - 1} steps {values[-1]:.0e}")

assert losses["Newton"][1] > 10 * losses["Newton"][0]  # uphill, and to the wrong side:
assert paths["Newton"][1][0] < paths["Newton"][0][0]
assert all(p[1] <= p[0] ** 2 + 1e-12 for p in paths["Newton"][1:])  # on or below the parabola
accepted = losses["damped Gauss-Newton"]
assert all(after < before for before, after in zip(accepted, accepted[1:], strict=False))
assert accepted[-1] < 1e-12
assert losses["gradient descent"][-1] > 0.1

# %% [markdown]
# Newton's method recovers here, because on this function each of its steps lands on or below the
# parabola, where the Hessian is positive definite. (This follows from the second row of the linear system for the
# step.) Networks give no such guarantee, and Newton's method can also converge to a saddle.
#
# ## Products without matrices
#
# A network with a million parameters has a Hessian of a trillion entries. The largest eigenvalues, the
# solution of a linear system, and a check of an approximation can be computed from products with vectors
# alone. A product costs about as much as a few gradients.
#
# **The Hessian** ([Pearlmutter, 1994](https://doi.org/10.1162/neco.1994.6.1.147)). The number
# $\nabla L^\top v$ is a function of $\theta$ like any other; hold $v$ fixed and differentiate it:
#
# $$
# \frac{\partial}{\partial \theta_i} \sum_j \frac{\partial L}{\partial \theta_j} v_j
# = \sum_j \frac{\partial^2 L}{\partial \theta_i \partial \theta_j} v_j
# = \bigl((\nabla^2_\theta L)\, v\bigr)_i.
# \tag{2.12}
# $$
#
# **The GGN** ([Schraudolph, 2002](bibliography.md#ggn)). Read $J^\top H_f J v$ from right to left:
# push $v$ forward through the network, multiply by the small $H_f$, send the result backward,
#
# $$
# v \;\mapsto\; J v \;\mapsto\; H_f (J v) \;\mapsto\; J^\top \bigl(H_f J v\bigr).
# \tag{2.13}
# $$
#
# In plain PyTorch, the Hessian's product is two calls of `grad`. The GGN's product can compute $J v$ with backward
# passes only: $u \mapsto J^\top u$ is linear in $u$, and the backward pass through this map sends $v$ to $J v$.


# %%
def hessian_product_by_hand(model: Module, v: Tensor) -> Tensor:
    parameters = list(model.parameters())
    first = torch.autograd.grad(loss(model(X), y), parameters, create_graph=True)
    along = torch.cat([g.flatten() for g in first]) @ v
    return torch.cat([g.flatten() for g in torch.autograd.grad(along, parameters)])


def ggn_product_by_hand(model: Module, v: Tensor) -> Tensor:
    f, parameters = model(X), list(model.parameters())
    u = torch.zeros_like(f, requires_grad=True)
    back = torch.autograd.grad(f, parameters, u, create_graph=True)  # J^T u, for any u
    (Jv,) = torch.autograd.grad(torch.cat([b.flatten() for b in back]) @ v, u, retain_graph=True)
    HJv = 2 * Jv  # for this loss, the Hessian is 2 I
    return torch.cat([b.flatten() for b in torch.autograd.grad(f, parameters, HJv)])


# %% [markdown]
# ### In the package
#
# Both return a function, so that what does not depend on $v$ is prepared once. The Hessian product
# sends $v$ backward through the gradient, which gives $v^\top \nabla^2_\theta L$. The Hessian is symmetric, so that
# this row has the entries of the product. In the GGN product the three arrows of [(2.13)] are the last
# three lines.

# %% tags=["remove-input"]
code(hessian_product, ggn_product)

# %%
H_times, GGN_times = hessian_product(model, loss, X, y), ggn_product(model, loss, X, y)
assert_close(H_times(v), H @ v)
assert_close(GGN_times(v), GGN @ v)
assert_close(H_times(v), hessian_product_by_hand(model, v))
assert_close(GGN_times(v), ggn_product_by_hand(model, v))
assert not torch.allclose(H_times(v), GGN_times(v))

# %% [markdown]
# The product with the $i$-th unit vector is column $i$. Stack the products with all unit vectors and
# you have the dense matrix back; `vmap` does it in one go:

# %%
columns = torch.stack([GGN_times(unit) for unit in torch.eye(D)], dim=1)
assert_exact(columns, GGN)
assert_exact(torch.func.vmap(H_times)(torch.eye(D)).mT, H)

# %% [markdown]
# Times differ from machine to machine. So we count the operations of all matrix multiplications, as in
# [Chapter 1](01_flattening.py), while the hidden layer grows:


# %%
class Operations(TorchDispatchMode):
    """Counts multiplications and additions in matrix products, inside `torch.func` as well."""

    total = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.overloadpacket in flop_registry:
            self.total += flop_registry[op.overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def operations(function, *arguments) -> int:
    with Operations() as counter:
        function(*arguments)
    return counter.total


def gradient_of(net: Module, loss: Module, data: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(net(data), target), list(net.parameters()))


rows = []
for width in (4, 8, 16, 32, 64):
    net = Sequential(Linear(16, width), Tanh(), Linear(width, 10))
    problem = net, loss, torch.randn(64, 16), torch.randn(64, 10)
    unit = torch.ones_like(parameter_vector(net))
    counts = {
        "gradient": operations(gradient_of, *problem),
        "Hessian product": operations(hessian_product(*problem), unit),
        "GGN product": operations(ggn_product(*problem), unit),
        "dense Hessian": operations(hessian, *problem),
    }
    rows.append((len(unit), counts))
    in_gradients = (f"{name} {c / counts['gradient']:.2f}" for name, c in counts.items())
    print(f"{len(unit):5,} parameters, in gradients:  ", "   ".join(in_gradients))
    assert counts["Hessian product"] < 3 * counts["gradient"]
    assert counts["GGN product"] < 3 * counts["gradient"]
    assert counts["dense Hessian"] > len(unit) * counts["gradient"]

# %% tags=["hide-input"] alt="Log-log plot of operations against the number of parameters. Gradient, Hessian product and GGN product are three parallel lines close to each other. The dense Hessian lies far above them and rises twice as steeply." caption="Operations for a batch of 64 data. Each product costs less than three gradients at every size; the dense Hessian costs more than one gradient per parameter."
sizes = [size for size, _ in rows]
fig, ax = plt.subplots(figsize=(6.4, 3.4))
for name, marker in zip(rows[0][1], "osD^", strict=True):
    ax.loglog(sizes, [c[name] for _, c in rows], marker + "-", label=name)
ax.set(xlabel="parameters $D$", ylabel="operations")
ax.set_xticks(sizes, labels=sizes)
ax.minorticks_off()
ax.legend()
plt.show()

# %% [markdown]
# ## What goes wrong in practice
#
# **A factor in the loss's definition.** PyTorch's `MSELoss()` divides by *all* output entries, $NC$,
# `CrossEntropyLoss()` by the labels, here $N$, and textbooks put $\tfrac12$ before the square. Every
# one of these factors scales the curvature ([Chapter 36](36_museum.py) has an example from a library). Compare
# matrices, and let $N$, $C$ and 2 all differ, so that the ratio of the matrices tells which factor is wrong. The cell
# therefore uses three outputs instead of two:


# %%
class HalfSquare(Module):
    def forward(self, f: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (f - y).square().sum()


wide, y3 = Sequential(Linear(3, 5), Tanh(), Linear(5, 3)), torch.randn(N, 3)
plain = ggn(wide, loss, X, y3)
mean, half = ggn(wide, MSELoss(), X, y3), ggn(wide, HalfSquare(), X, y3)
for name, scaled in {"mean": mean, "sum with a half": half}.items():
    print(f"{name}: 1 / {(plain.trace() / scaled.trace()).item():.0f} of the plain sum", end="")
    print(f" ({N} data, 3 outputs)")
assert_exact(N * 3 * mean, plain)
assert largest_error(N * mean, plain) > 0.1
assert_exact(2 * half, plain)
per_datum = CrossEntropyLoss()
assert_exact(N * ggn(model, per_datum, X, labels), exact)

# %% [markdown]
# **The softmax on the wrong side of the cut.** The GGN depends on where the composition [(2.1)] is cut. If the
# network ends with `LogSoftmax` and the loss is `NLLLoss`, then $\ell$ is linear in $f$, $H_f = 0$, and the GGN is
# zero, although $L$ is the same function as before. The curvature of the softmax now belongs to the second term. The
# range condition of Corollary 2.1 fails: $\nabla L \ne 0$ is not in the range of the zero matrix, and the quadratic
# model is unbounded below. Keep functions such as the softmax, with which the loss is still convex, on the side of the
# loss:

# %%
inside = Sequential(*model, torch.nn.LogSoftmax(1))
outside_loss = torch.nn.NLLLoss(reduction="sum")
H_entropy = hessian(model, cross_entropy, X, labels)
assert_exact(hessian(inside, outside_loss, X, labels), H_entropy)
assert ggn(inside, outside_loss, X, labels).abs().max() == 0
assert exact.abs().max() > 0
slope_inside = jacrev(lambda t: cross_entropy(network_at(t).reshape(N, C), labels))(theta)
print(f"GGN zero, norm of the gradient {slope_inside.norm():.2f}: the model has no minimum")
assert slope_inside.norm() > 0.1

# %% [markdown]
# **A slice instead of a block.** The parameters of a layer are neighbours in the flat vector, but
# $(\operatorname{vec} W, b)$ is not $\operatorname{vec}([W\; b])$. A slice has the right size
# and the right eigenvalues, but most of its entries are in the wrong place:

# %%
slice_, block = GGN[:20, :20], diagonal_blocks(model, GGN)["0"]
assert_close(torch.linalg.eigvalsh(slice_), torch.linalg.eigvalsh(block))
print(f"relative error of the slice: {largest_error(slice_, block):.2f}")
assert largest_error(slice_, block) > 0.1

# %% [markdown]
# **A product that is out of date.** `hessian_product` keeps a copy of the parameters. So it multiplies by the same
# matrix at every call, but after an optimizer step this is the matrix of the *old* point. Make a new product after
# every step:

# %%
moving = Sequential(Linear(3, 5), Tanh(), Linear(5, C))
stale = hessian_product(moving, loss, X, y)
before = stale(v)
with torch.no_grad():
    for p in moving.parameters():
        p.add_(0.1)  # as an optimiser does: in place
assert_close(stale(v), before)
assert not torch.allclose(hessian_product(moving, loss, X, y)(v), before)

# %% [markdown]
# **A different network at every call.** With dropout in training mode, every forward pass draws another
# network. A product with this network is not a function of the vector: two calls give two answers for one
# vector. Call `model.eval()` first.

# %%
dropout = Sequential(Linear(3, 5), torch.nn.Dropout(0.5), Linear(5, C))
product = hessian_product(dropout, loss, X, y)
assert not torch.allclose(product(v), product(v))
dropout.eval()
assert_close(product(v), product(v))

# %% [markdown]
# ## In one minute
#
# - The Hessian is $J^\top H_f J$, the GGN, plus slopes of the loss times second derivatives of the network.
# - The GGN is the Hessian of the linearised network. It is positive semi-definite if the loss is convex in the outputs.
# - For such a loss, the GGN's quadratic model has a minimum if the gradient lies in the GGN's range, as for the usual
#   losses, and always with damping.
# - Hessian and GGN agree where the network is linear in its parameters or the slopes vanish. Their same-layer blocks
#   agree in a piecewise linear network, away from kinks, if each layer is used once.
# - A product with either matrix costs a few gradients.
#
# ## Exercises
#
# **Exercise 2.1.** Show that undamped Gauss-Newton reaches the minimum of the Rosenbrock function in
# two steps from *every* starting point. Why is Gauss-Newton damped nevertheless?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# With as many outputs as parameters and an invertible $J$, the step $d$ solves $f + J d = 0$. Its
# first row, $1 - \theta_1 - d_1 = 0$, sets $\theta_1$ to 1, where it stays. For
# $d_1 = 0$ the second row is $10 (\theta_2 - \theta_1^2) + 10 d_2 = 0$, which the second
# step solves exactly. But after the first step $\theta_2 - \theta_1^2 = -d_1^2$, so that the loss
# is $100\, d_1^4$, which can be more than at the start. In a network, no second step repairs this in general.
#
# </details>
#
# **Exercise 2.2.** Let one layer of a ReLU network be used twice, $x \mapsto W \operatorname{relu}(W
# x)$. Where does the proof of [Theorem 2.3] break, and what happens to the claim?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The input of the second call depends on $W$, so that the output is locally quadratic in $W$ instead of
# affine. In general the blocks differ: the term that couples two layers with separate weights now lies in one block.
#
# </details>
#
# **Exercise 2.3.** Write the parameters as a function of others, $\theta = \tau(\psi)$, with Jacobian
# $T = \partial \theta / \partial \psi$. How do Hessian and GGN with respect to $\psi$ follow from
# those with respect to $\theta$? If $T$ is invertible, which of them would you expect to give steps
# that do not depend on the parametrisation?
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# The Jacobian of the network becomes $J T$, hence the GGN becomes $T^\top \mathrm{GGN}\, T$. The
# Hessian becomes $T^\top (\nabla^2_\theta L) T + \sum_i \frac{\partial L}{\partial \theta_i}
# \nabla^2_\psi \tau_i$, by [(2.5)] with $\tau$ in the place of the network. The GGN transforms as
# a metric tensor, so that the step $-\mathrm{GGN}^{-1} \nabla L$ in $\psi$ is, to first
# order, the same as in $\theta$: it is $T^{-1}$ times the step in $\theta$. Newton's step is in general not.
#
# </details>
#
# **Exercise 2.4.** Find the largest eigenvalue of the GGN with products from `ggn_product`.
#
# <details class="solution" markdown="1">
# <summary>Solution</summary>
#
# Power iteration: start with a random vector, multiply, normalise, repeat. The length before
# normalising tends to the largest eigenvalue, because the part of the vector along the leading
# eigenvector grows fastest.
#
# </details>
#
# The solutions, checked:

# %% tags=["hide-input"]
point = torch.tensor([-1.7, 3.3])
for _ in range(2):
    slope, _, GGN_here = curvature_at(*point.tolist())
    point = point - torch.linalg.solve(GGN_here, slope)
assert_close(point, torch.ones(2))

tied = Linear(3, 3)
assert by_layer(Sequential(tied, ReLU(), tied), loss, torch.randn(N, 3))["0"] > 1e-2
assert by_layer(Sequential(tied, ReLU(), Linear(3, 3)), loss, torch.randn(N, 3))["0"] < 1e-10

psi = theta.asinh()  # θ = sinh(ψ)
T = psi.cosh().diag()
H_psi = torch.func.hessian(lambda psi: loss_at(psi.sinh()))(psi)
assert_exact(T.mT @ H @ T + (gradient * psi.sinh()).diag(), H_psi)
assert largest_error(T.mT @ H @ T, H_psi) > 1e-3
J_psi = jacrev(lambda psi: network_at(psi.sinh()))(psi)
GGN_psi = 2 * J_psi.mT @ J_psi
assert_exact(T.mT @ GGN @ T, GGN_psi)

w, length = torch.randn(D), 0.0
for _ in range(300):
    w = GGN_times(w / w.norm())
    length = w.norm()
assert_close(length, eigenvalues_GGN[-1])
print("all hold")

# %% [markdown]
# ## Appendix: the spectrum of a trained network
#
# How different are Hessian and GGN for a trained network? The data are three spiral arms, one for each class. For
# cross-entropy each $H_n$ has rank at most $C - 1$, because adding the same number to all logits changes nothing. By
# [(2.6)], the rank of the GGN is at most $N (C - 1)$. With few data, this bound is less than the number of parameters.

# %%
arm = torch.arange(42) % 3
radius = torch.linspace(0.3, 2.0, 42)
angle = 2 * torch.pi / 3 * arm + 1.6 * radius
spirals = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)

mlp = Sequential(Linear(2, 8), Tanh(), Linear(8, 8), Tanh(), Linear(8, 3))
mean_entropy, optimizer = CrossEntropyLoss(), torch.optim.Adam(mlp.parameters(), lr=0.02)
history = []
for step in range(601):
    value = mean_entropy(mlp(spirals), arm)
    if step in (0, 25, 50, 75, 100, 150, 200, 300, 400, 500, 600):
        pair = (hessian(mlp, mean_entropy, spirals, arm), ggn(mlp, mean_entropy, spirals, arm))
        history.append((step, value.item(), *pair))
    optimizer.zero_grad()
    value.backward()
    optimizer.step()

for step, value, H_mlp, GGN_mlp in history[:: len(history) // 2]:
    low = torch.linalg.eigvalsh(H_mlp)[0].item()
    rank, gap = torch.linalg.matrix_rank(GGN_mlp).item(), (H_mlp - GGN_mlp).norm() / H_mlp.norm()
    print(f"step {step:3}: loss {value:.4f}, smallest eigenvalue of H {low:9.1e}, ", end="")
    print(f"rank of the GGN {rank} of {len(GGN_mlp)}, ‖H − GGN‖/‖H‖ = {gap:.2f}")
    assert rank <= 42 * (3 - 1) < len(GGN_mlp)
    assert low < 0
    assert torch.linalg.eigvalsh(GGN_mlp)[0] > -1e-12
assert history[-1][1] < 0.1 * history[0][1]

# %% [markdown]
# Weyl's inequality bounds the distance of two symmetric matrices' eigenvalues, paired in order of size, by the spectral
# norm of the difference:
#
# $$
# |\lambda_i(\nabla^2_\theta L) - \lambda_i(\mathrm{GGN})|
# \le \lVert \nabla^2_\theta L - \mathrm{GGN} \rVert_2.
# \tag{2.14}
# $$
#
# At the start, the network's own curvature is most of the Hessian. Once the data are fitted, the GGN
# is most of it, and the five largest eigenvalues of the GGN are somewhat smaller than the Hessian's. The Hessian still
# has negative eigenvalues, and the GGN has none. The relative distance of the two matrices
# need not vanish with the slopes, as it does for a squared error: with cross-entropy, the slopes $p - e_y$ and the
# loss Hessian get small together.

# %%
for _, _, H_mlp, GGN_mlp in history:
    apart = torch.linalg.eigvalsh(H_mlp) - torch.linalg.eigvalsh(GGN_mlp)
    assert apart.abs().max() <= torch.linalg.matrix_norm(H_mlp - GGN_mlp, 2) * (1 + 1e-10)

for step, _, *pair in (history[0], history[-1]):
    top_H, top_GGN = (torch.linalg.eigvalsh(M).flip(0)[:5] for M in pair)
    ratios = top_GGN / top_H
    distance = (pair[0] - pair[1]).norm() / pair[0].norm()
    print(f"step {step:3}: distance {distance:.2f}, five largest eigenvalues of the GGN", end="")
    print(" relative to those of H:", ", ".join(f"{ratio:.2f}" for ratio in ratios.tolist()))
    assert distance > 0.5 if step == 0 else distance < 0.4
    assert ratios.min() < 0.4 if step == 0 else ratios.min() > 0.5

# %% tags=["hide-input"] alt="Three panels. Sorted eigenvalues of Hessian and GGN before training: the Hessian's fall well below zero. The same after training: the largest are close, the Hessian still has small negative ones, the GGN none. Third: the loss and the relative distance of the two matrices during training." caption="Eigenvalues in order of size before and after training, on a scale that is linear near zero; and how far apart the two matrices are during training."
fig, axes = plt.subplots(1, 3, figsize=(9.4, 3.2), layout="constrained")
for ax, (step, _, *pair) in zip(axes, (history[0], history[-1]), strict=False):
    for M, label, marker in zip(pair, ("Hessian", "GGN"), "o.", strict=True):
        ax.plot(torch.linalg.eigvalsh(M).flip(0).cpu(), marker, markersize=4, label=label)
    ax.set_yscale("symlog", linthresh=1e-4)
    ax.axhline(0, color=ax.xaxis.label.get_color(), linewidth=0.6, alpha=0.5)
    ax.set(title=f"after {step} steps", xlabel="index", ylabel="eigenvalue" if step == 0 else "")
axes[0].legend()
steps, values, *_ = zip(*history, strict=True)
gaps = [((H_ - G_).norm() / H_.norm()).item() for _, _, H_, G_ in history]
axes[2].semilogy(steps, values, "o-", color="C2", label="loss")
axes[2].semilogy(steps, gaps, "s-", color="C3", label=r"$\|H - \mathrm{GGN}\|\, /\, \|H\|$")
axes[2].set(title="during training", xlabel="step")
axes[2].legend()
plt.show()

# %% [markdown]
# ## Further reading
#
# [Schraudolph (2002)](bibliography.md#ggn) multiplies with the GGN, and
# [Pearlmutter (1994)](https://doi.org/10.1162/neco.1994.6.1.147) with the Hessian.
# [Martens (2014)](bibliography.md#new-insights), sections 8 and 9, gives reasons for the GGN beyond
# approximation. [Botev, Ritter and Barber (2017)](bibliography.md#kfra) use that the blocks of
# [Theorem 2.3] agree. [Chapter 3](03_losses.py) continues with the square root of $H_f$.
