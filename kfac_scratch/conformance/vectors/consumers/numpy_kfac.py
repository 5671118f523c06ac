# mypy: ignore-errors
"""KFAC in numpy: a port that reads `kfac-vectors/1` and writes results for the judge.

Usage: `python numpy_kfac.py VECTORS RESULTS`. It knows nothing but the files: the derivatives are
written by hand. Linear layers with and without shared weights, pools, residuals, all losses, the
empirical Fisher, EKFAC and damped inverses are there; convolutions, attention, normalisations,
embeddings, masks and differential operators are not.
"""

import json
import sys
from pathlib import Path

import numpy as np

DTYPES = {"F64": np.float64, "I64": np.int64}


# ---- files ---------------------------------------------------------------------------------------


def read(path):
    """A safetensors file: eight bytes of length, a header in JSON, numbers."""
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        flat = np.frombuffer(content[begin + first : begin + last], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def write(path, tensors):
    """The same, of float64 only."""
    header, position = {}, 0
    for name, x in tensors.items():
        end = position + 8 * x.size
        header[name] = {"dtype": "F64", "shape": x.shape, "data_offsets": [position, end]}
        position = end
    head = json.dumps(header).encode()
    numbers = b"".join(np.ascontiguousarray(x, np.float64).tobytes() for x in tensors.values())
    path.write_bytes(len(head).to_bytes(8, "little") + head + numbers)


# ---- the network, forward and backward -----------------------------------------------------------


def sigmoid(x):
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def softmax(x):
    """Over axis 1."""
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def apply(op, theta, x, *others):
    """One operation."""
    middle = tuple(range(1, x.ndim - 1))
    match op["kind"]:
        case "linear":
            return x @ theta[op["name"] + ".weight"].T + theta.get(op["name"] + ".bias", 0)
        case "relu":
            return np.maximum(x, 0)
        case "tanh":
            return np.tanh(x)
        case "sigmoid":
            return sigmoid(x)
        case "flatten":
            return x.reshape(len(x), -1)
        case "mean-positions":
            return x.mean(middle)
        case "sum-positions":
            return x.sum(middle)
        case "classes-first":
            return np.moveaxis(x, -1, 1)
        case "transpose":
            return np.swapaxes(x, 1, -1)
        case "mask":
            return x * np.array(op["settings"]["kept"])[:, None]
        case "add":
            return x + others[0]
    raise NotImplementedError(f"the operation {op['kind']}")


def back(op, theta, x, z, g):
    """Vectors `[F, N, ...]` at an operation's result, taken to its inputs."""
    middle = tuple(range(2, x.ndim))
    match op["kind"]:
        case "linear":
            return [g @ theta[op["name"] + ".weight"]]
        case "relu":
            return [g * (x > 0)]
        case "tanh":
            return [g * (1 - z**2)]
        case "sigmoid":
            return [g * z * (1 - z)]
        case "flatten":
            return [g.reshape(len(g), *x.shape)]
        case "mean-positions" | "sum-positions":
            g = np.broadcast_to(np.expand_dims(g, middle), (len(g), *x.shape))
            positions = np.prod(x.shape[1:-1])
            return [g / positions if op["kind"] == "mean-positions" else g]
        case "classes-first":
            return [np.moveaxis(g, 2, -1)]
        case "transpose":
            return [np.swapaxes(g, 2, -1)]
        case "mask":
            return [g * np.array(op["settings"]["kept"])[:, None]]
        case "add":
            return [g, g]
    raise NotImplementedError(f"the operation {op['kind']}")


def forward(ops, theta, X):
    """Every operation's first input, and its result."""
    inputs, results = [], []
    for op in ops:
        x = [X if place < 0 else results[place] for place in op["inputs"]]
        inputs.append(x[0])
        results.append(apply(op, theta, *x))
    return inputs, results


def joined(uses):
    """The calls of one layer as its positions."""
    a, J = zip(*uses, strict=True)
    return np.concatenate(a, 1), np.concatenate(J, 2)


def layer_rows(ops, theta, X):
    """Every layer's inputs `a [N, S, i]` and derivatives `J [F, N, S, o]` of a datum's outputs."""
    inputs, results = forward(ops, theta, X)
    N, f = len(X), results[-1]
    arriving = [0] * len(ops)
    eye = np.eye(f[0].size).reshape(-1, 1, *f.shape[1:])
    arriving[-1] = np.broadcast_to(eye, (f[0].size, *f.shape))
    for i in reversed(range(len(ops))):
        sent = back(ops[i], theta, inputs[i], results[i], arriving[i])
        for place, g in zip(ops[i]["inputs"], sent, strict=True):
            if place >= 0:
                arriving[place] = arriving[place] + g
    rows = {}
    for i, op in enumerate(ops):
        if op["kind"] == "linear":
            a = inputs[i].reshape(N, -1, inputs[i].shape[-1])
            if op["settings"]["bias"]:
                a = np.concatenate([a, np.ones((*a.shape[:2], 1))], 2)
            J = arriving[i].reshape(f[0].size, N, -1, results[i].shape[-1])
            rows.setdefault(op["name"], []).append((a, J))
    return f, {name: joined(uses) for name, uses in rows.items()}


# ---- losses --------------------------------------------------------------------------------------


def curvature(case, f, y):
    """`[N, F, F]`: the loss's Hessian, or the outer product of each datum's gradient."""
    gradient, hessian, D = derivatives(case["loss"], f, y)
    if case["fisher"] == "type2":
        return hessian / D
    g = gradient.reshape(len(f), -1)
    return g[:, :, None] * g[:, None] / D


def derivatives(loss, f, y):
    """First and second derivatives of the sum of a loss's terms, and by what it is divided."""
    mean, weight = loss["reduction"] == "mean", np.array(loss["weight"] or 1.0)
    if loss["kind"] == "cross-entropy":
        weight = np.broadcast_to(weight, f.shape[1])
        return cross_entropy(weight, mean, loss.get("label_smoothing", 0.0), f, y)
    if loss["kind"] == "mse":
        gradient, second = 2 * (f - y), np.full(f.shape, 2.0)
    else:
        p, times, entry = sigmoid(f), y * weight + 1 - y, np.array(loss.get("entry_weight", 1.0))
        gradient, second = entry * (times * p - y * weight), entry * times * p * (1 - p)
    hessian = second.reshape(len(f), -1, 1) * np.eye(f[0].size)
    return gradient, hessian, f.size if mean else 1


def cross_entropy(weight, mean, smoothing, f, y):
    """Classes are on axis 1; targets of -100 count nothing."""
    N, C = f.shape[:2]
    p = softmax(f).reshape(N, C, -1)
    T = p.shape[2]
    if y.shape == f.shape and y.dtype == np.float64:  # probabilities
        hit, D = y.reshape(N, C, T), N * T
    else:
        y = y.reshape(N, -1)
        hit = (y[:, None] == np.arange(C)[:, None]).astype(np.float64)  # [N, C, T]
        D = np.einsum("nct,c->", hit, weight)
    kept = hit.sum(1, keepdims=True)
    target = weight[:, None] * ((1 - smoothing) * hit + smoothing / C * kept)  # [N, C, T]
    own = target.sum(1)  # [N, T]
    one = p[:, :, None] * np.eye(C)[:, :, None] - p[:, :, None] * p[:, None]  # [N, C, C, T]
    H = np.einsum("ncdt,nt,tu->nctdu", one, own, np.eye(T)).reshape(N, C * T, C * T)
    return own[:, None] * p - target, H, D if mean else 1


# ---- KFAC ----------------------------------------------------------------------------------------


def factors(a, J, H):
    """`A` and `B` with all positions in one sum."""
    A = np.einsum("nsi,nsj->ij", a, a) / (a.shape[0] * a.shape[1])
    return A, np.einsum("fnso,nfh,hnsp->op", J, H, J)


def ekfac(a, J, H):
    """Eigenvectors of the factors, and the exact block's diagonal in their basis."""
    A, B = factors(a, J, H)
    QA, QB = np.linalg.eigh(A)[1], np.linalg.eigh(B)[1]
    G = np.einsum("fnso,nsi->nfoi", J @ QB, a @ QA)
    scale = np.einsum("nfoi,nfh,nhoi->oi", G, H, G).reshape(-1)
    U = np.kron(QB, QA)
    return U * scale @ U.T


def block(case, flavour, rows, H):
    """One layer's block, or the bias's part of it."""
    a, J = rows
    if flavour == "ekfac":
        return ekfac(a, J, H)
    if flavour == "reduce":
        a, J = a.mean(1, keepdims=True), J.sum(2, keepdims=True)
    A, B = factors(a, J, H)
    if case["part"] == "bias":
        A = A[-1:, -1:]
    if case["damping"] and case["damping"]["form"] == "factored":
        value = case["damping"]["value"]
        pi = np.sqrt(np.trace(A) / len(A) / (np.trace(B) / len(B)))
        A = A + np.sqrt(value) * pi * np.eye(len(A))
        B = B + np.sqrt(value) / pi * np.eye(len(B))
    return np.kron(B, A)


def answer(case, tensors):
    """All flavours of all layers of a case."""
    check(case)
    theta = tensors_under(tensors, "parameters/")
    f, rows = layer_rows(case["ops"], theta, tensors["X"])
    H = curvature(case, f, tensors["y"])
    found = {}
    for flavour in case["flavours"]:
        for name in case["layers"]:
            M = block(case, flavour, rows[name], H)
            if case["damping"]:
                M = solved(case["damping"], M, gradient(tensors, name))
            found[f"{flavour}/{name}"] = M[None]
    return found


def solved(damping, M, v):
    """The damped inverse times a vector."""
    if damping["form"] == "exact":
        M = M + damping["value"] * np.eye(len(M))
    return np.linalg.solve(M, v)


def gradient(tensors, name):
    """Of the loss by `[W | b]`, rows behind each other."""
    own = tensors_under(tensors, "gradient/")
    W, b = own[f"{name}.weight"], own.get(f"{name}.bias")
    return (W if b is None else np.concatenate([W, b[:, None]], 1)).reshape(-1)


def tensors_under(tensors, prefix):
    """Tensors of one kind."""
    return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}


def check(case):
    """Refuse what is not written here."""
    if case["operator"]:
        raise NotImplementedError("differential operators")
    if case.get("masked"):
        raise NotImplementedError("masks of positions")
    for op in case["ops"]:
        if op["kind"] in ("conv", "attention", "mean-space"):
            raise NotImplementedError(f"the operation {op['kind']}")


def main(vectors, results):
    """Answer every case, or say why not."""
    results.mkdir(parents=True, exist_ok=True)
    lacking = {}
    for case in json.loads((vectors / "manifest.json").read_text(encoding="utf-8"))["cases"]:
        try:
            write(results / case["file"], answer(case, read(vectors / case["file"])))
        except NotImplementedError as reason:
            lacking[case["id"]] = str(reason)
    about = {"name": "numpy, by hand", "version": np.__version__, "not_supported": lacking}
    (results / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
