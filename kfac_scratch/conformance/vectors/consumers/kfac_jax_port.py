"""A network of the oracle in JAX, and what kfac-jax computes for it; no import of this package.

A network is a list of operations `{"kind", "name", "inputs", "settings"}`, as `ops` describes them;
arrays are as PyTorch has them. Inside, weights are `[in, out]` and `[h, w, in, out]`, as kfac-jax
wants them, and the classes of cross-entropy are on the last axis.

By itself it is a program: `python kfac_jax_port.py VECTORS RESULTS` answers `kfac-vectors/1` with
jax, kfac-jax, numpy and safetensors alone.
"""
# mypy: ignore-errors

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import kfac_jax
import numpy as np
from safetensors.numpy import load_file, save_file

jax.config.update("jax_enable_x64", True)
MODES = {"type2": "ggn_exact", "mc": "fisher_gradients", "empirical": "fisher_empirical"}
PADDING = {"circular": "wrap", "reflect": "reflect", "replicate": "edge"}
IGNORED = -100  # as a target of cross-entropy
KINDS = {  # the operations of `apply`
    *("linear", "conv", "relu", "sigmoid", "tanh", "flatten", "mean-positions", "sum-positions"),
    *("mean-space", "classes-first", "mask", "add", "attention"),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """What is asked.

    Attributes:
        ops: The network.
        parameters: By name.
        batches: Pairs of input and target.
        loss: `mse`, `cross-entropy` or `bce`.
        divisor: The number by which the loss divides the sum of its terms.
        fisher: `type2`, `mc` or `empirical`.
        samples: Labels per datum, for `mc`.
        seed: For `mc`.
    """

    ops: list[dict]
    parameters: dict[str, np.ndarray]
    batches: list[tuple[np.ndarray, np.ndarray]]
    loss: str
    divisor: float
    fisher: str = "type2"
    samples: int = 1
    seed: int = 0
    names: list[str] = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "names", sorted(self.parameters))


@dataclass(frozen=True, eq=False)
class Estimate:
    """An estimator, and the state in which it has seen all mini-batches."""

    problem: Problem
    estimator: kfac_jax.BlockDiagonalCurvature
    state: kfac_jax.BlockDiagonalCurvature.State

    def factors(self) -> dict[str, tuple[np.ndarray, np.ndarray] | str]:
        """Every layer's `A` and `B`, the block's scale in `B`; or what else kfac-jax made of it."""
        found, indices = {}, self.estimator.jaxpr.layer_indices
        blocks = zip(self.estimator.blocks, self.state.blocks_states, indices, strict=True)
        for block, state, places in blocks:
            name = self.problem.names[places[0]].rpartition(".")[0]
            if isinstance(block, kfac_jax.KroneckerFactored):
                A, B = (np.asarray(factor.value) for factor in state.factors)
                found[name] = A, B * float(block.scale(state, use_cache=False))
            else:
                found[name] = type(block).__name__
        return found

    def solve(self, gradient: dict[str, np.ndarray], damping: float, exact: bool) -> dict:
        """The damped inverse times a gradient, by parameter, laid out as `native` does."""
        result = self.estimator.multiply_matpower(
            self.state,
            {name: native(name, g) for name, g in gradient.items()},
            identity_weight=damping,
            power=-1,
            exact_power=exact,
            use_cached=False,
            pmap_axis_name=None,
        )
        return {name: np.asarray(v) for name, v in result.items()}


def estimate(problem: Problem) -> Estimate:
    """Mini-batches are averaged with the weights of their sizes."""
    parameters = {name: native(name, p) for name, p in problem.parameters.items()}
    estimator = kfac_jax.BlockDiagonalCurvature(
        lambda *args: registered(problem, *args),
        default_estimation_mode=MODES[problem.fisher],
        num_samples=problem.samples if problem.fisher == "mc" else 1,
    )
    key, state = jax.random.PRNGKey(problem.seed), None
    for X, y in problem.batches:
        args = (parameters, (jnp.asarray(X), jnp.asarray(y)))
        first = state is None
        state = estimator.init(key, args, None, None) if first else state
        state = estimator.update_curvature_matrix_estimate(
            state,
            ema_old=0.0 if first else 1.0,
            ema_new=float(len(X)),
            identity_weight=0.0,
            batch_size=len(X),
            rng=key,
            func_args=args,
        )
    return Estimate(problem, estimator, state)


def registered(problem: Problem, parameters: dict, data: tuple) -> jax.Array:
    """The network with its loss told to kfac-jax, which takes it to be `weight * sum / batch`."""
    X, y = data
    f = forward(problem.ops, parameters, X)
    weight = sum(len(X) for X, _ in problem.batches) / problem.divisor
    if problem.loss == "cross-entropy":
        f = jnp.moveaxis(f, 1, -1)
        some_ignored = any((y == IGNORED).any() for _, y in problem.batches)
        mask = (y != IGNORED).astype(f.dtype) if some_ignored else None
        kfac_jax.register_softmax_cross_entropy_loss(f, jnp.maximum(y, 0), mask, weight)
    elif problem.loss == "mse":
        kfac_jax.register_squared_error_loss(f, y, weight)
    else:
        kfac_jax.register_sigmoid_cross_entropy_loss(f, y, weight)
    return f.sum()


def native(name: str, p: np.ndarray) -> jax.Array:
    """A parameter in the layout that kfac-jax wants."""
    if name.endswith(".weight"):
        p = p.T if p.ndim == 2 else p.transpose(2, 3, 1, 0)
    return jnp.asarray(p)


def forward(ops: list[dict], parameters: dict, X: jax.Array) -> jax.Array:
    """The network's output."""
    results = []
    for i, op in enumerate(ops):
        x = [X if place < 0 else results[place] for place in op["inputs"] or (i - 1,)]
        results.append(apply(op, parameters, *x))
    return results[-1]


def apply(op: dict, parameters: dict, x: jax.Array, *others: jax.Array) -> jax.Array:
    """One operation."""
    match op["kind"]:
        case "linear":
            z = x @ parameters[op["name"] + ".weight"]
            return z + parameters[op["name"] + ".bias"] if op["settings"]["bias"] else z
        case "conv":
            return convolved(op["name"], op["settings"], parameters, x)
        case "relu" | "sigmoid" | "tanh":
            return getattr(jax.nn, op["kind"])(x)
        case "flatten":
            return x.reshape(len(x), -1)
        case "mean-positions":
            return x.reshape(len(x), -1, x.shape[-1]).mean(1)
        case "sum-positions":
            return x.reshape(len(x), -1, x.shape[-1]).sum(1)
        case "mean-space":
            return x.reshape(*x.shape[:2], -1).mean(2)
        case "classes-first":
            return jnp.moveaxis(x, -1, 1)
        case "mask":
            return x * jnp.asarray(op["settings"]["kept"], x.dtype)[:, None]
        case "add":
            return x + others[0]
        case "attention":
            key, value = others
            scores = x @ jnp.swapaxes(key, -1, -2) / x.shape[-1] ** 0.5
            return jax.nn.softmax(scores, -1) @ value
    raise ValueError(f"Unknown operation {op['kind']!r}.")


def convolved(name: str, settings: dict, parameters: dict, x: jax.Array) -> jax.Array:
    """A 2d convolution of channels-first images."""
    x, p = x.transpose(0, 2, 3, 1), settings["padding"]
    if settings["padding_mode"] != "zeros":
        mode = PADDING[settings["padding_mode"]]
        x, p = jnp.pad(x, [(0, 0), (p, p), (p, p), (0, 0)], mode), 0
    z = jax.lax.conv_general_dilated(
        x,
        parameters[f"{name}.weight"],
        window_strides=(settings["stride"],) * 2,
        padding=((p, p),) * 2,
        rhs_dilation=(settings["dilation"],) * 2,
        feature_group_count=settings["groups"],
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if settings["bias"]:
        z = z + parameters[f"{name}.bias"][None, None, None]
    return z.transpose(0, 3, 1, 2)


def unknown(ops: list[dict]) -> set[str]:
    """The operations that are not written here."""
    same = {"same" for op in ops if op["settings"].get("padding") == "same"}
    return same | {op["kind"] for op in ops} - KINDS


# ---- files in, files out -------------------------------------------------------------------------


def refused(case: dict) -> str:
    """Why a case is not asked for; empty if it is."""
    kinds = [len(op["settings"]["kernel"]) for op in case["ops"] if op["kind"] == "conv"]
    groups = any(op["settings"]["groups"] > 1 for op in case["ops"] if op["kind"] == "conv")
    names = [op["name"] for op in case["ops"] if op["name"]]
    reasons = {
        "expand only": "expand" not in case["flavours"],
        "no differential operators": case["operator"],
        "no class weights, nor those of outputs": (
            case["loss"]["weight"] or case["loss"].get("entry_weight")
        ),
        "labels as targets": "label_smoothing" in case["loss"] or "probabilities" in case["tags"],
        "operations that this port has": unknown(case["ops"]),
        "convolutions over two axes only, without groups": any(k != 2 for k in kinds) or groups,
        "no Kronecker block for a layer that is used twice": len({*names}) < len(names),
        "mini-batches are normalized one by one, as documented": (
            case["fisher"] == "empirical" and len(case["batches"]) > 1
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def problem(case: dict, tensors: dict[str, np.ndarray]) -> Problem:
    """A case of the vectors as a problem."""
    loss, y = case["loss"], tensors["y"]
    prefix, cuts = "parameters/", np.cumsum(case["batches"])[:-1]
    return Problem(
        case["ops"],
        {k.removeprefix(prefix): p for k, p in tensors.items() if k.startswith(prefix)},
        list(zip(np.split(tensors["X"], cuts), np.split(y, cuts), strict=True)),
        loss["kind"],
        float((y != IGNORED).sum()) if loss["reduction"] == "mean" else 1.0,
        case["fisher"],
    )


def answer(case: dict, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every layer's block, or its damped inverse times the gradient, in canonical layout."""
    made, found = estimate(problem(case, tensors)), {}
    factors = made.factors()
    for name in case["layers"]:
        weight = tensors[f"parameters/{name}.weight"]
        A, B = factors[name]
        order = np.arange(len(A))
        if weight.ndim == 4:  # from (h, w, i) to (i, h, w)
            numbers = np.arange(weight[0].size).reshape(*weight.shape[2:], weight.shape[1])
            order[: weight[0].size] = numbers.transpose(2, 0, 1).ravel()
        A = A[order][:, order]
        found[f"expand/{name}"] = np.kron(B, A[-1:, -1:] if case["part"] == "bias" else A)[None]
    return solutions(case, tensors, made) if case["damping"] else found


def solutions(case: dict, tensors: dict, made: Estimate) -> dict[str, np.ndarray]:
    """Rows of `[W | b]` behind each other."""
    prefix, damping = "gradient/", case["damping"]
    gradient = {k.removeprefix(prefix): g for k, g in tensors.items() if k.startswith(prefix)}
    solved, found = made.solve(gradient, damping["value"], damping["form"] == "exact"), {}
    for name in case["layers"]:
        W = solved[f"{name}.weight"]
        W = (W.T if W.ndim == 2 else W.transpose(3, 2, 0, 1)).reshape(W.shape[-1], -1)
        bias = [solved[f"{name}.bias"][:, None]] if f"{name}.bias" in solved else []
        found[f"expand/{name}"] = np.concatenate([W, *bias], 1).reshape(1, -1)
    return found


def main(vectors: Path, results: Path) -> None:
    """Answer every case, or say why not."""
    results.mkdir(parents=True, exist_ok=True)
    lacking, scales = {"*/reduce": "expand only", "*/ekfac": "expand only"}, {}
    for case in json.loads((vectors / "manifest.json").read_text(encoding="utf-8"))["cases"]:
        reason, tensors = refused(case), load_file(vectors / case["file"])
        if reason:
            lacking[case["id"]] = reason
            continue
        save_file(answer(case, tensors), results / case["file"])
        if case["fisher"] == "empirical":
            scales[f"{case['id']}/*"] = 1 / problem(case, tensors).divisor
    about = {"name": "kfac-jax", "version": kfac_jax.__version__, "not_supported": lacking}
    text = json.dumps(about | {"scales": scales}, indent=1)
    (results / "about.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
