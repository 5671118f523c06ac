# mypy: ignore-errors
"""KFAC in JAX: a port that reads `kfac-vectors/1` and writes results for the judge.

Usage: `python jax_kfac.py VECTORS RESULTS`, with jax, numpy and safetensors. All derivatives are
JAX's: outputs by what is added to a layer's result, and the loss's by the outputs. A layer's inputs
are its patches.
"""

import json
import sys
from math import prod
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from safetensors.numpy import load_file, save_file

jax.config.update("jax_enable_x64", True)
PAD = {"zeros": "constant", "circular": "wrap", "reflect": "reflect", "replicate": "edge"}


# ---- the network ---------------------------------------------------------------------------------


def apply(op, theta, one, x, *others):
    """One operation on a batch. A bias is added where `one` is 1."""
    middle = tuple(range(1, x.ndim - 1))
    match op["kind"]:
        case "linear":
            return x @ theta[op["name"] + ".weight"].T + theta.get(op["name"] + ".bias", 0.0) * one
        case "conv":
            return convolved(op, theta, x)
        case "embedding":
            return theta[op["name"] + ".weight"][x]
        case "layer-norm" | "group-norm" | "batch-norm":
            return normalised(op, theta, x)
        case "relu":
            return jnp.maximum(x, 0)
        case "tanh":
            return jnp.tanh(x)
        case "sigmoid":
            return jax.nn.sigmoid(x)
        case "flatten":
            return x.reshape(len(x), -1)
        case "mean-positions":
            return x.mean(middle)
        case "sum-positions":
            return x.sum(middle)
        case "mean-space":
            return x.reshape(*x.shape[:2], -1).mean(2)
        case "classes-first":
            return jnp.moveaxis(x, -1, 1)
        case "transpose":
            return jnp.swapaxes(x, 1, -1)
        case "mask":
            return x * jnp.array(op["settings"]["kept"])[:, None]
        case "add":
            return x + others[0]
        case "attention":
            key, value = others
            scores = jnp.einsum("nsd,ntd->nst", x, key) / np.sqrt(x.shape[-1])
            return jax.nn.softmax(scores, -1) @ value
        case "multihead":
            heads = op["settings"]["heads"]
            q, k, v = (t.reshape(*t.shape[:2], heads, -1) for t in (x, *others))
            scores = jnp.einsum("nshd,nthd->nhst", q, k) / np.sqrt(q.shape[-1])
            z = jnp.einsum("nhst,nthd->nshd", jax.nn.softmax(scores, -1), v)
            return z.reshape(*z.shape[:2], -1)
    raise NotImplementedError(f"the operation {op['kind']}")


def normalised(op, theta, x):
    """A normalisation, with its scale and shift."""
    own, weight, bias = op["settings"], *(theta[op["name"] + end] for end in (".weight", ".bias"))
    if op["kind"] == "layer-norm":
        return standard(x, own["eps"]) * weight + bias
    weight, bias = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in (weight, bias))
    if op["kind"] == "group-norm":
        rows = x.reshape(len(x), own["groups"], -1)
        return standard(rows, own["eps"]).reshape(x.shape) * weight + bias
    mean, variance = (jnp.array(own[key]).reshape(weight.shape) for key in ("mean", "variance"))
    return (x - mean) / jnp.sqrt(variance + own["eps"]) * weight + bias


def standard(x, eps):
    """Mean 0 and variance 1 over the last axis."""
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + eps)


def padded(op, x):
    """The padding before a convolution."""
    own = op["settings"]
    if own["padding"] == "same":
        totals = [own["dilation"] * (k - 1) for k in own["kernel"]]
        widths = [(total // 2, total - total // 2) for total in totals]
    else:
        widths = [(own["padding"],) * 2] * (x.ndim - 2)
    return jnp.pad(x, [(0, 0), (0, 0), *widths], mode=PAD[own["padding_mode"]])


def geometry(op):
    """Stride, dilation and axes as `lax` wants them."""
    dims, own = len(op["settings"]["kernel"]), op["settings"]
    letters = "DHW"[3 - dims :]
    return {
        "window_strides": [own["stride"]] * dims,
        "padding": [(0, 0)] * dims,
        "rhs_dilation": [own["dilation"]] * dims,
        "dimension_numbers": (f"NC{letters}", f"OI{letters}", f"NC{letters}"),
    }


def convolved(op, theta, x):
    """A convolution."""
    weight, groups = theta[op["name"] + ".weight"], op["settings"]["groups"]
    z = lax.conv_general_dilated(padded(op, x), weight, feature_group_count=groups, **geometry(op))
    bias = theta.get(op["name"] + ".bias", jnp.zeros(len(weight)))
    return z + bias.reshape(-1, *[1] * (x.ndim - 2))


def forward(case, theta, X, coefficients, added):
    """What the loss sees, and every operation's first input and result."""
    one, record, results = 1.0, [], []
    if case["operator"]:
        X, one = taylor(case, X)
    for op, extra in zip(case["ops"], added, strict=True):
        x = [X if place < 0 else results[place] for place in op["inputs"]]
        results.append(apply(op, theta, one, *x) + extra)
        record.append((x[0], results[-1]))
    if case["operator"]:
        return jnp.einsum("ns,nso->no", coefficients, results[-1]), record, one
    return results[-1], record, one


def taylor(case, X):
    """The coefficients (x, dx/dx_i, Lap x) of the input, and those of a constant 1."""
    if any(op["kind"] != "linear" for op in case["ops"]):
        raise NotImplementedError("operators of networks with activations")
    N, d = X.shape
    slopes = jnp.broadcast_to(jnp.eye(d), (N, d, d))
    X = jnp.concatenate([X[:, None], slopes, jnp.zeros((N, 1, d))], 1)
    return X, jnp.zeros((d + 2, 1)).at[0].set(1.0)


# ---- what KFAC is made of ------------------------------------------------------------------------


def rows(op, x, one):
    """A layer's inputs `[groups, N, S, i]`, with those of the bias."""
    if op["kind"] == "linear":
        a = x.reshape(1, len(x), -1, x.shape[-1])
    elif op["kind"] == "embedding":
        a = jax.nn.one_hot(x.reshape(1, len(x), -1), op["settings"]["d_in"], dtype=jnp.float64)
    else:
        numbers = geometry(op)["dimension_numbers"]
        a = lax.conv_general_dilated_patches(
            padded(op, x),
            op["settings"]["kernel"],
            geometry(op)["window_strides"],
            geometry(op)["padding"],
            rhs_dilation=geometry(op)["rhs_dilation"],
            dimension_numbers=numbers,
        )
        a = a.reshape(len(x), op["settings"]["groups"], -1, prod(a.shape[2:]))
        a = jnp.transpose(a, (1, 0, 3, 2))
    if not op["settings"]["bias"]:
        return a
    return jnp.concatenate([a, jnp.broadcast_to(one, (*a.shape[:3], 1))], -1)


def positions(op, z):
    """A layer's result `[..., o]` or `[N, o, ...]` as `[groups, N, S, o]`."""
    if op["kind"] in ("linear", "embedding"):
        return z.reshape(1, len(z), -1, z.shape[-1])
    groups = op["settings"]["groups"]
    return jnp.transpose(z.reshape(len(z), groups, z.shape[1] // groups, -1), (1, 0, 3, 2))


def joined(uses):
    """The calls of one layer as its positions."""
    a, J = zip(*uses, strict=True)
    return jnp.concatenate(a, 2), jnp.concatenate(J, 3)


def layer_rows(case, theta, X, coefficients):
    """Outputs, and every layer's `a [groups, N, S, i]` and `J [F, groups, N, S, o]`."""
    none = [0.0] * len(case["ops"])
    f, record, one = forward(case, theta, X, coefficients, none)
    zero = [jnp.zeros_like(z) for _, z in record]

    def summed(added):  # data do not meet, so the sum over them has each datum's derivative
        return forward(case, theta, X, coefficients, added)[0].sum(0).reshape(-1)

    J, found = jax.jacrev(summed)(zero), {}
    for i, op in enumerate(case["ops"]):
        if op["kind"] in ("linear", "conv", "embedding"):
            a, g = rows(op, record[i][0], one), jax.vmap(lambda z, op=op: positions(op, z))(J[i])
            found.setdefault(op["name"], []).append((a, g))
    return f, {name: joined(uses) for name, uses in found.items()}


def terms(loss, f, y):
    """The sum of a loss's terms."""
    weight = jnp.array(loss["weight"] or 1.0)
    match loss["kind"]:
        case "mse":
            return ((f - y) ** 2).sum()
        case "bce":
            entry = jnp.array(loss.get("entry_weight", 1.0))
            one = weight * y * jax.nn.softplus(-f) + (1 - y) * jax.nn.softplus(f)
            return (entry * one).sum()
        case "cross-entropy":
            target, smoothing = probabilities(f, y), loss.get("label_smoothing", 0.0)
            spread = target.sum(1, keepdims=True) / f.shape[1]
            target = (1 - smoothing) * target + smoothing * spread
            weight = jnp.broadcast_to(weight, f.shape[1]).reshape(-1, *[1] * (f.ndim - 2))
            return -(weight * target * jax.nn.log_softmax(f, 1)).sum()
    raise NotImplementedError(f"the loss {loss['kind']}")


def probabilities(f, y):
    """The targets of cross-entropy, one-hot if they are labels; nothing for those of -100."""
    if jnp.issubdtype(y.dtype, jnp.floating):
        return y
    return jnp.moveaxis(jax.nn.one_hot(y, f.shape[1], dtype=f.dtype), -1, 1)


def divisor(loss, f, y):
    """The number by which the sum is divided."""
    if loss["reduction"] == "sum":
        return 1.0
    if loss["kind"] != "cross-entropy":
        return f.size
    if jnp.issubdtype(y.dtype, jnp.floating):
        return f.size / f.shape[1]
    weight = jnp.broadcast_to(jnp.array(loss["weight"] or 1.0), f.shape[1])
    return jnp.where(y == -100, 0.0, weight[y]).sum()


def curvature(case, f, y):
    """`[N, F, F]`: the loss's Hessian, or the outer product of each datum's gradient."""

    def own(v, y):
        return terms(case["loss"], v.reshape(1, *f.shape[1:]), y[None])

    flat = f.reshape(len(f), -1)
    D = divisor(case["loss"], f, y)
    if case["fisher"] == "type2":
        return jax.vmap(jax.hessian(own))(flat, y) / D
    g = jax.vmap(jax.grad(own))(flat, y)
    return g[:, :, None] * g[:, None] / D


def factors(a, J, H):
    """`A` and `B` of every group."""
    A = jnp.einsum("gnsi,gnsj->gij", a, a) / (a.shape[1] * a.shape[2])
    return A, jnp.einsum("fgnso,nfh,hgnsp->gop", J, H, J)


def kron(B, A):
    """Of every group."""
    return jax.vmap(jnp.kron)(B, A)


def ekfac(a, J, H):
    """The exact block's diagonal in the basis of the factors' eigenvectors."""
    A, B = factors(a, J, H)
    QA, QB = jnp.linalg.eigh(A)[1], jnp.linalg.eigh(B)[1]
    G = jnp.einsum("fgnso,gop,gnsi,gij->nfgpj", J, QB, a, QA)
    scale = jnp.einsum("nfgpj,nfh,nhgpj->gpj", G, H, G).reshape(len(A), 1, -1)
    U = kron(QB, QA)
    return U * scale @ jnp.swapaxes(U, 1, 2)


def block(case, flavour, a, J, H):
    """One layer's block, or the bias's part of it."""
    if flavour == "ekfac":
        return ekfac(a, J, H)
    if flavour == "reduce":
        a, J = a.mean(2, keepdims=True), J.sum(3, keepdims=True)
    A, B = factors(a, J, H)
    if case["part"] == "bias":
        A = A[:, -1:, -1:]
    if case["damping"] and case["damping"]["form"] == "factored":
        root = np.sqrt(case["damping"]["value"])
        trace_A, trace_B = (jnp.trace(M, axis1=1, axis2=2) / M.shape[1] for M in (A, B))
        pi = jnp.sqrt(trace_A / trace_B)[:, None, None]
        A, B = A + root * pi * jnp.eye(A.shape[1]), B + root / pi * jnp.eye(B.shape[1])
    return kron(B, A)


def solved(case, M, theta, tensors, name):
    """The damped inverse times JAX's own gradient of the loss."""

    def total(theta):
        f = forward(case, theta, tensors["X"], None, [0.0] * len(case["ops"]))[0]
        return terms(case["loss"], f, tensors["y"]) / divisor(case["loss"], f, tensors["y"])

    gradient, (groups, D) = jax.grad(total)(theta), M.shape[:2]
    W = gradient[f"{name}.weight"]
    W = W.reshape(len(W), -1)
    if f"{name}.bias" in gradient:
        W = jnp.concatenate([W, gradient[f"{name}.bias"][:, None]], 1)
    if case["damping"]["form"] == "exact":
        M = M + case["damping"]["value"] * jnp.eye(D)
    return jnp.linalg.solve(M, W.reshape(groups, D, 1))[..., 0]


def answer(case, tensors):
    """All flavours of all layers of a case."""
    if case.get("masked"):
        raise NotImplementedError("masks of positions")
    tensors = {name: jnp.array(x) for name, x in tensors.items()}
    theta = {
        name.removeprefix("parameters/"): x
        for name, x in tensors.items()
        if name.startswith("parameters/")
    }
    f, layers = layer_rows(case, theta, tensors["X"], tensors.get("coefficients"))
    H, found = curvature(case, f, tensors["y"]), {}
    for flavour in case["flavours"]:
        for name in case["layers"]:
            M = block(case, flavour, *layers[name], H)
            if case["damping"]:
                M = solved(case, M, theta, tensors, name)
            found[f"{flavour}/{name}"] = np.array(M)
    return found


def main(vectors, results):
    """Answer every case, or say why not."""
    results.mkdir(parents=True, exist_ok=True)
    lacking = {}
    for case in json.loads((vectors / "manifest.json").read_text(encoding="utf-8"))["cases"]:
        try:
            save_file(answer(case, load_file(vectors / case["file"])), results / case["file"])
        except NotImplementedError as reason:
            lacking[case["id"]] = str(reason)
    about = {"name": "JAX", "version": jax.__version__, "not_supported": lacking}
    (results / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
