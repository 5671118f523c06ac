"""Who computes KFAC's factors: this package, and the peers that do the same work.

A contender is made from a problem, a Fisher and a flavour: what is timed, and the products of its
blocks with given matrices, which are compared before anything is timed. The peers:

- curvlinops: `KFACLinearOperator`, weight and bias together.
- BackPACK: `KFLR` and `KFAC(1)`; weight and bias apart. Its convolutions are a mix of both
  flavours: inputs as in expand, vectors summed over positions as in reduce. It forms parameter
  gradients, too.
- nngeometry: `FIM` and `FIM_MonteCarlo` of chains of layers, expand.
- laplace-torch: `kron` of its curvlinops backend, without the decomposition that `fit` adds; weight
  and bias apart. It evaluates the loss once more.
- SINGD: what its hooks collect in one forward and backward pass, the empirical Fisher. It forms
  parameter gradients, too, and multiplies rows with its preconditioner, the identity here.

A Python with all of them, from the root of the repository:

    python -m venv peers && peers/bin/pip install torch==2.13.0 torchvision==0.28.0
    peers/bin/pip install curvlinops-for-pytorch backpack-for-pytorch nngeometry laplace-torch
    peers/bin/pip install singd jaxtyping tqdm scikit-learn
    PYTHONPATH=. peers/bin/python -m benchmarks.factors

A `torchvision` of another build than `torch`, such as one for CUDA beside one for CPUs, breaks the
import of laplace-torch: uninstall it, nothing here needs it. Peers that are not installed are named
in every row.
"""

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measure import Run, first_line
from benchmarks.nets import TINY, NetsOfASize, Problem, problem_of
from kfac_scratch import EXPAND, REDUCE, Plans, empirical, kfac_over, monte_carlo, type2
from kfac_scratch.matrices.kronecker import Kronecker

FISHERS = {"type-2": type2, "MC-1": monte_carlo(1), "empirical": empirical}
FLAVOURS = {"expand": EXPAND, "reduce": REDUCE}
EXACT = 1e-3  # float32, sums over thousands of rows in different orders
SAMPLED, DRAWS = 0.5, 8  # of the mean of so many draws; a wrong scale of 2 would be an error of 1
SEEDS = count()  # of the libraries that draw the same labels in every call
Matrices = dict[str, Tensor]  # by layer


class NotCoveredError(Exception):
    """A peer does not do this row, and why."""


@dataclass(frozen=True)
class Contender:
    """What is timed, and how its result multiplies a matrix `[d_out, d_in]` for every layer.

    Products have as many columns as the library's matrices: without the bias, they are compared on
    the weight. `expected` is what they should be, by this package, for a Fisher.
    """

    run: Run
    products: Callable[[Any, Matrices], Matrices]
    expected: Callable[[str], dict[str, Kronecker]]


PLANS = Plans()


def ours(problem: Problem, fisher: str, flavour: str) -> dict[str, Kronecker]:
    """The factors by this package. The model is tried once, as in a loop over batches."""
    options = {"flavour": FLAVOURS[flavour], "layers": problem.layers, "progress": False}
    options["plan"] = PLANS
    data = [(problem.X, problem.y)]
    return kfac_over(problem.model, problem.loss, data, FISHERS[fisher], **options)


def _by_us(problem: Problem, flavour: str) -> Callable[[str], dict[str, Kronecker]]:
    return lambda fisher: ours(problem, fisher, flavour)


def of_curvlinops(problem: Problem, fisher: str, flavour: str) -> Contender:
    operator = importlib.import_module("curvlinops").KFACLinearOperator
    names = [f"{layer}.{kind}" for layer in problem.layers for kind in ("weight", "bias")]
    params: Any = {name: problem.model.get_parameter(name) for name in names}
    annotation = str(inspect.signature(operator).parameters["params"].annotation)
    params = params if "dict" in annotation.lower() else list(params.values())
    kinds = {"type-2": "type-2", "MC-1": "mc", "empirical": "empirical"}
    options = {"fisher_type": kinds[fisher], "kfac_approx": flavour, "num_data": len(problem.X)}
    options |= {"separate_weight_and_bias": False, "check_deterministic": False}
    options |= {"num_per_example_loss_terms": 1}

    def run() -> Any:
        data = [(problem.X, problem.y)]
        K = operator(problem.model, problem.loss, params, data, seed=next(SEEDS), **options)
        if hasattr(K, "compute_kronecker_factors"):  # later releases have computed them
            K.compute_kronecker_factors()
        return K

    def products(K: Any, V: Matrices) -> Matrices:
        shapes = [problem.model.get_parameter(name).shape for name in names]
        flat = [part for M in V.values() for part in (M[:, :-1].flatten(), M[:, -1])]
        parts = (K @ torch.cat(flat)).split([shape.numel() for shape in shapes])
        pairs = zip(parts[::2], parts[1::2], strict=True)
        columns = [torch.cat([W.reshape(len(b), -1), b[:, None]], dim=1) for W, b in pairs]
        return dict(zip(V, columns, strict=True))

    return Contender(run, products, _by_us(problem, flavour))


def of_backpack(problem: Problem, fisher: str, flavour: str) -> Contender:
    library = importlib.import_module("backpack")
    extensions = importlib.import_module("backpack.extensions")
    kinds = {"type-2": extensions.KFLR, "MC-1": partial(extensions.KFAC, mc_samples=1)}
    if fisher not in kinds:
        raise NotCoveredError("no empirical Fisher")
    if flavour != "expand":
        raise NotCoveredError("one flavour")
    if not all(type(m).__module__.startswith("torch.") for m in problem.model.modules()):
        raise NotCoveredError("chains of PyTorch's modules only")
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    model = library.extend(copy.deepcopy(problem.model))  # whose hooks stay
    loss = library.extend(copy.deepcopy(problem.loss))
    field = kinds[fisher]().savefield

    def run() -> nn.Module:
        model.zero_grad()
        with library.backpack(kinds[fisher]()):
            loss(model(problem.X), problem.y).backward()
        return model

    def products(found: nn.Module, V: Matrices) -> Matrices:
        factors = {n: getattr(found.get_submodule(n).weight, field) for n in V}
        return _kronecker_products(factors, V)

    def mix(fisher: str) -> dict[str, Kronecker]:
        expand, reduced = (ours(problem, fisher, f) for f in ("expand", "reduce"))
        S = _positions(problem)
        return {n: Kronecker(S[n] * M.A, reduced[n].B) for n, M in expand.items()}

    return Contender(run, products, mix)


def _positions(problem: Problem) -> dict[str, int]:
    found, handles = {}, []
    for name in problem.layers:
        keep = partial(_keep_positions, found, name)
        handles.append(problem.model.get_submodule(name).register_forward_hook(keep))
    problem.model(problem.X)
    for handle in handles:
        handle.remove()
    return found


def _keep_positions(found: dict[str, int], name: str, m: nn.Module, x: Any, z: Tensor) -> None:
    found[name] = z[0, 0].numel() if isinstance(m, nn.Conv2d) else z[0, ..., 0].numel()


def of_nngeometry(problem: Problem, fisher: str, flavour: str) -> Contender:
    metrics = importlib.import_module("nngeometry.metrics")
    kind = importlib.import_module("nngeometry.object").PMatKFAC
    backend = importlib.import_module("nngeometry.backend").TorchHooksJacobianBackend
    if flavour != "expand":
        raise NotCoveredError("expand only")
    if problem.X.ndim == 3:
        raise NotCoveredError("linear layers of matrices only")
    data = torch.utils.data.TensorDataset(problem.X, problem.y)
    loader = torch.utils.data.DataLoader(data, batch_size=len(problem.X))
    terms = copy.deepcopy(problem.loss)
    terms.reduction = "none"

    def losses(X: Tensor, y: Tensor) -> Tensor:
        return terms(problem.model(X), y).unsqueeze(1)

    def of_losses() -> Any:
        return kind(generator=backend(problem.model, losses), examples=loader)

    model, device = problem.model, problem.X.device.type
    runs = {
        "type-2": lambda: metrics.FIM(model, loader, kind, "classif_logits", device),
        "MC-1": lambda: metrics.FIM_MonteCarlo(model, loader, kind, "classif_logits", 1, device),
        "empirical": of_losses,
    }

    def products(found: Any, V: Matrices) -> Matrices:
        return _kronecker_products({n: (B, A) for n, (A, B) in found.data.items()}, V)

    return Contender(runs[fisher], products, _by_us(problem, flavour))


def of_laplace(problem: Problem, fisher: str, flavour: str) -> Contender:
    backends = importlib.import_module("laplace.curvature")
    chosen = set(problem.layers)
    model = copy.deepcopy(problem.model)
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            p.requires_grad_(name in chosen)
    options: dict[str, Any] = {"kfac_approx": flavour}
    if fisher == "empirical":
        backend = backends.CurvlinopsEF(model, "classification")
    else:
        backend = backends.CurvlinopsGGN(model, "classification", stochastic=fisher == "MC-1")
        options |= {"mc_samples": 1} if fisher == "MC-1" else {}

    def run() -> Any:
        seed, N = next(SEEDS), len(problem.X)
        return backend.kron(problem.X, problem.y, N=N, seed=seed, **options)[1]

    def products(found: Any, V: Matrices) -> Matrices:
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        kfacs = dict(zip(names, found.kfacs, strict=True))
        N = len(problem.X)  # its loss is the sum over data, ours the mean
        of_layer = {n: kfacs[f"{n}.weight"] for n in V}
        return _kronecker_products({n: (B / N, A) for n, (B, A) in of_layer.items()}, V)

    return Contender(run, products, _by_us(problem, flavour))


def of_singd(problem: Problem, fisher: str, flavour: str) -> Contender:
    kind = importlib.import_module("singd.optim.optimizer").SINGD
    if fisher != "empirical":
        raise NotCoveredError("empirical Fisher only")
    model = copy.deepcopy(problem.model)  # whose hooks stay
    options = {"kfac_approx": flavour, "loss_average": "batch", "warn_unsupported": False}
    optimizer = kind(model, **options)

    def run() -> Any:
        model.zero_grad()
        optimizer.H_Ks, optimizer.H_Cs = {}, {}
        problem.loss(model(problem.X), problem.y).backward()
        return optimizer.H_Ks, optimizer.H_Cs

    def products(found: Any, V: Matrices) -> Matrices:
        K, C = found
        return _kronecker_products({n: (C[n].to_dense(), K[n].to_dense()) for n in V}, V)

    return Contender(run, products, _by_us(problem, flavour))


def _kronecker_products(factors: dict[str, Any], V: Matrices) -> Matrices:
    return {n: B @ V[n][:, : len(A)] @ A for n, (B, A) in factors.items()}


def of_this_package(problem: Problem, fisher: str, flavour: str) -> Contender:
    run = partial(ours, problem, fisher, flavour)

    def products(found: dict[str, Kronecker], V: Matrices) -> Matrices:
        return {n: M @ V[n] for n, M in found.items()}

    return Contender(run, products, _by_us(problem, flavour))


CONTENDERS: dict[str, Callable[[Problem, str, str], Contender]] = {
    "ours": of_this_package,
    "curvlinops": of_curvlinops,
    "backpack": of_backpack,
    "nngeometry": of_nngeometry,
    "laplace": of_laplace,
    "singd": of_singd,
}


def contenders(
    problem: Problem, fisher: str, flavour: str
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that do the row, and for the others the reason why not."""
    found, notes = {}, {}
    for name, make in CONTENDERS.items():
        try:
            contender = make(problem, fisher, flavour)
            contender.run()
            found[name] = contender
        except ImportError as error:
            notes[name] = f"not installed ({error.name})"
        except NotCoveredError as reason:
            notes[name] = f"not covered: {reason}"
        except Exception as error:
            notes[name] = f"{type(error).__name__}: {first_line(error)}"
    return found, notes


def prepared(
    who: str, net: str, fisher: str, flavour: str, nets: NetsOfASize, device: torch.device
) -> tuple[Run, Run]:
    """For a process of its own: a tiny run of a contender that warms up, and the run.

    It has many parameters, because all that a process gets must be named. `gradient` is no
    contender: one forward and backward pass, what a first-order step needs.
    """
    runs = []
    for of in (problem_of(TINY, net, device), problem_of(nets, net, device)):
        make = CONTENDERS.get(who)
        runs.append(_gradient(of) if make is None else make(of, fisher, flavour).run)
    return runs[0], runs[1]


def _gradient(of: Problem) -> Run:
    parameters = list(of.model.parameters())
    return lambda: torch.autograd.grad(of.loss(of.model(of.X), of.y), parameters)


def disagreements(problem: Problem, fisher: str, found: dict[str, Contender]) -> dict[str, float]:
    """Largest error of each contender's products, relative to the largest entry of ours.

    Sampled factors come from different draws: the mean of a few is compared with the exact factors,
    which they estimate, in the Frobenius norm.

    Raises:
        AssertionError: If one does other work than this package.
    """
    sampled = fisher == "MC-1"
    size, tolerance = (torch.linalg.norm, SAMPLED) if sampled else (_largest, EXACT)
    errors = {}
    for name, contender in found.items():
        mine = contender.expected("type-2" if sampled else fisher)
        V = _random_matrices(mine)
        draws = [contender.products(contender.run(), V) for _ in range(DRAWS if sampled else 1)]
        theirs = {n: torch.stack([draw[n] for draw in draws]).mean(0) for n in draws[0]}
        pairs = [(_on_columns(mine[n], V[n], R.shape[1]), R) for n, R in theirs.items()]
        largest = max(float(size(P)) for P, _ in pairs)
        errors[name] = max(float(size(P - R)) for P, R in pairs) / largest
        assert len(theirs) == len(mine), f"{name} leaves layers out"
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not wrong, f"other factors than ours: {wrong}"
    return errors


def _random_matrices(blocks: dict[str, Kronecker]) -> Matrices:
    device = next(iter(blocks.values())).A.device
    generator = torch.Generator(device).manual_seed(0)
    sizes = {name: (len(M.B), len(M.A)) for name, M in blocks.items()}
    return {n: torch.randn(s, generator=generator, device=device) for n, s in sizes.items()}


def _on_columns(M: Kronecker, V: Tensor, columns: int) -> Tensor:
    return M.B @ V[:, :columns] @ M.A[:columns, :columns]


def _largest(M: Tensor) -> Tensor:
    return M.abs().max()
